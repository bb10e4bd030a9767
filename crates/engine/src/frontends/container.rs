//! The engine's containers: what a frontend asks for, over an operation's mounts and processes.

use crate::build::{Build, reads};
use bytes::Bytes;
use futures::FutureExt as _;
use futures::future::BoxFuture;
use shipway_executor::{ExitStatus, ProcessIo};
use shipway_fault::{Context as _, Result};
use shipway_frontend::{Container, ContainerProcess, ContainerRequest, FileStat};
use shipway_llb::{ExecMeta, ExecOp};
use shipway_oci::Digest;
use shipway_ops::ContainerSpec;
use shipway_progress::Reporter;
use shipway_refs::ImmutableRef;
use shipway_rootfs::{Access, RootView};
use std::{
    os::fd::{AsFd as _, AsRawFd as _},
    path::{Path, PathBuf},
};

pub(crate) struct EngineContainer(shipway_ops::Container);

impl EngineContainer {
    /// Solves what the container shows, and takes its mounts.
    pub(crate) async fn new(build: &Build, request: ContainerRequest) -> Result<Self> {
        let scope = &build.scope;
        let mut spec = ContainerSpec {
            name: request.name,
            network: request.network,
            proxied: scope.proxied,
            hostname: request.hostname,
            extra_hosts: request.extra_hosts,
            ..ContainerSpec::default()
        };
        for wanted in request.mounts {
            let mut mount = wanted.mount;
            mount.input = None;
            if let Some(state) = wanted.state {
                mount.input = Some(spec.inputs.len());
                let here =
                    async |state: ImmutableRef| state.materialize(None).await.map(|()| state);
                spec.inputs.push(build.states.with(state.as_ref(), here).await?);
            }
            spec.mounts.push(mount);
        }
        // No vertex reports what a container fetches: it is what was asked for before.
        let reporter = Reporter::new(
            Digest::of(&spec.name),
            format!("container {}", spec.name),
            Vec::new(),
            None,
        );
        let container = shipway_ops::Container::new(
            scope.parts.services.clone(),
            scope.data.clone(),
            spec,
            &reporter,
        );
        container.await.map(Self)
    }

    async fn read<T: Send + 'static>(
        &self,
        mount: usize,
        f: impl FnOnce(&Path) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let mounts = self.0.snapshot(mount)?.to_vec();
        let read = move || {
            let view = RootView::open(&mounts, Access::Read)?;
            f(&PathBuf::from(format!("/proc/self/fd/{}", view.as_fd().as_raw_fd())))
        };
        let done = shipway_task::blocking("read from a container", read).await;
        done.context(|| format!("read from mount {mount} of a container"))
    }
}

impl Container for EngineContainer {
    fn start(
        &self,
        process: ContainerProcess,
        io: ProcessIo,
    ) -> BoxFuture<'static, Result<ExitStatus>> {
        let meta = ExecMeta {
            args: process.args,
            env: process.env,
            cwd: if process.cwd.is_empty() { "/".into() } else { process.cwd },
            user: process.user,
            remove_mount_stubs_recursive: process.remove_mount_stubs_recursive,
            ..ExecMeta::default()
        };
        let exec = ExecOp {
            meta,
            security: process.security,
            secret_env: process.secret_env,
            ..ExecOp::default()
        };
        Box::pin(self.0.start(exec, process.tty, io))
    }

    fn read_file<'a>(
        &'a self,
        mount: usize,
        path: &'a str,
        range: Option<(u64, u64)>,
    ) -> BoxFuture<'a, Result<Bytes>> {
        async move {
            let path = path.to_owned();
            self.read(mount, move |root| reads::read_file(root, &path, range)).await
        }
        .boxed()
    }

    fn read_dir<'a>(
        &'a self,
        mount: usize,
        path: &'a str,
        include: Option<&'a str>,
    ) -> BoxFuture<'a, Result<Vec<FileStat>>> {
        async move {
            let (path, include) = (path.to_owned(), include.map(str::to_owned));
            self.read(mount, move |root| reads::read_dir(root, &path, include.as_deref())).await
        }
        .boxed()
    }

    fn stat_file<'a>(&'a self, mount: usize, path: &'a str) -> BoxFuture<'a, Result<FileStat>> {
        async move {
            let path = path.to_owned();
            self.read(mount, move |root| reads::stat_file(root, &path)).await
        }
        .boxed()
    }

    fn release(&self) -> BoxFuture<'_, Result<()>> {
        async move { self.0.release().await }.boxed()
    }
}
