//! Containers that a frontend asks for (rows `gw.ctr.*`, `gw.exec`): mounts as an operation has
//! them, and processes as callers start them.

use crate::{
    JobData, Services,
    exec::{
        self,
        mounts::{MountContext, MountGuards, MountPlan},
    },
};
use parking_lot::Mutex;
use shipway_executor::{ExecMount, ExitStatus, ProcessIo, RootFs};
use shipway_fault::{Fault, Result};
use shipway_llb::{ExecMeta, ExecOp, HostIp, Mount, NetMode};
use shipway_netproxy::Capture;
use shipway_progress::Reporter;
use shipway_refs::ImmutableRef;
use shipway_storage::Mount as SnapshotMount;
use std::{future::Future, sync::Arc};
use tokio::sync::{oneshot, watch};
use tokio_util::{
    sync::{CancellationToken, DropGuard},
    task::TaskTracker,
};

/// What a container is made of.
#[derive(Clone, Debug, Default)]
pub struct ContainerSpec {
    /// How it is called in messages.
    pub name: String,
    /// Its mounts; one has the destination `/`.
    pub mounts: Vec<Mount>,
    /// The states that they show.
    pub inputs: Vec<ImmutableRef>,
    /// Its network.
    pub network: NetMode,
    /// Whether it sees it through a proxy only.
    pub proxied: bool,
    /// Its host name; empty for the default.
    pub hostname: String,
    /// Lines of its `/etc/hosts`.
    pub extra_hosts: Vec<HostIp>,
}

/// A container with its mounts taken. Its processes end with it; dropping it is enough.
pub struct Container {
    services: Arc<Services>,
    job: JobData,
    spec: ContainerSpec,
    /// Its id for the executor.
    id: String,
    /// What the first process takes.
    unused: Mutex<Option<(RootFs, Vec<ExecMount>)>>,
    snapshots: Vec<Option<Vec<SnapshotMount>>>,
    /// Held by the processes too, until nothing is left of them.
    guards: Mutex<Option<Arc<Mutex<Option<MountGuards>>>>>,
    /// Whether the first process has come as far as it will: it runs, or it never did.
    begun: Arc<watch::Sender<bool>>,
    processes: TaskTracker,
    end: CancellationToken,
    _end: DropGuard,
}

impl Container {
    /// Takes the mounts of `spec` on behalf of `job`.
    pub async fn new(
        services: Arc<Services>,
        job: JobData,
        spec: ContainerSpec,
        reporter: &Reporter,
    ) -> Result<Self> {
        let meta = ExecMeta {
            args: vec![format!("container {}", spec.name)],
            cwd: "/".into(),
            ..ExecMeta::default()
        };
        let exec = ExecOp { meta, mounts: spec.mounts.clone(), ..ExecOp::default() };
        let mounting = MountContext { sessions: &job.sessions, reporter, jobs: &[] };
        let MountPlan { root, mounts, snapshots, guards } =
            exec::mounts::plan(&services, &exec, &spec.inputs, mounting, None).await?;
        let end = CancellationToken::new();
        Ok(Self {
            services,
            job,
            spec,
            id: exec::container_id(),
            unused: Mutex::new(Some((root, mounts))),
            snapshots,
            guards: Mutex::new(Some(Arc::new(Mutex::new(Some(guards))))),
            begun: Arc::new(watch::Sender::new(false)),
            processes: TaskTracker::new(),
            _end: end.clone().drop_guard(),
            end,
        })
    }

    /// Starts a process; settings of `process` that belong to the container are ignored. The first
    /// process is the container's init: the others end with it. The returned future resolves when
    /// the process has ended, which may also be because it could not start.
    pub fn start(
        &self,
        mut process: ExecOp,
        tty: bool,
        mut io: ProcessIo,
    ) -> impl Future<Output = Result<ExitStatus>> + Send + 'static {
        process.network = self.spec.network;
        process.meta.hostname.clone_from(&self.spec.hostname);
        process.meta.extra_hosts.clone_from(&self.spec.extra_hosts);
        let first = self.unused.lock().take();
        let guards = self.guards.lock().clone();
        let (services, job, id) = (self.services.clone(), self.job.clone(), self.id.clone());
        let proxied = self.spec.proxied && self.spec.network != NetMode::None;
        let begun = self.begun.clone();
        let first = first.map(|parts| (parts, Begin(begun.clone())));
        let run = async move {
            let guards = guards.ok_or_else(|| Fault::not_found("the container was released"))?;
            job.entitlements.check(&process)?;
            let env = exec::environment(&process, &job.sessions).await?;
            let mut spec = exec::process(&services, &process, env, &job.id, guards);
            spec.tty = tty;
            match first {
                Some(((root, mounts), begin)) => {
                    if proxied {
                        let jobs = job.clone();
                        spec.proxy = Some(
                            services
                                .proxy(Arc::new(move || vec![jobs.clone()]), Capture::default())
                                .await?,
                        );
                    }
                    spec.id = id;
                    let (started, runs) = oneshot::channel();
                    let report = io.started.replace(started);
                    let note = async {
                        let runs = runs.await.is_ok();
                        drop(begin);
                        report.filter(|_| runs).map(|r| r.send(()))
                    };
                    tokio::join!(services.executor.run(spec, root, mounts, io), note).0
                }
                None => {
                    let _ = begun.subscribe().wait_for(|begun| *begun).await;
                    services.executor.exec(&id, spec, io).await
                }
            }
        };
        let end = self.end.clone();
        let process = self.processes.track_future(async move {
            tokio::select! {
                biased;
                ended = run => ended,
                () = end.cancelled() => Err(Fault::cancelled()),
            }
        });
        let task = shipway_task::spawn("run a process in a container", process);
        async move {
            task.await.unwrap_or_else(|e| {
                Err(Fault::internal(format!("run a process in a container: {e}")))
            })
        }
    }

    /// The snapshot behind mount number `index`, for looking into.
    pub fn snapshot(&self, index: usize) -> Result<&[SnapshotMount]> {
        let mount = self.snapshots.get(index).ok_or_else(|| {
            Fault::invalid(format!(
                "mount index {index} is out of bounds ({} available)",
                self.snapshots.len()
            ))
        })?;
        mount.as_deref().ok_or_else(|| Fault::invalid(format!("mountable {index} not found")))
    }

    /// Ends all processes and gives the mounts back; an error if there were processes to end.
    pub async fn release(&self) -> Result<()> {
        let ended = !self.processes.is_empty();
        self.end.cancel();
        self.processes.close();
        self.processes.wait().await;
        self.unused.lock().take();
        self.guards.lock().take();
        if ended { Err(Fault::cancelled()) } else { Ok(()) }
    }
}

/// Lets processes join a container, once it is dropped.
struct Begin(Arc<watch::Sender<bool>>);

impl Drop for Begin {
    fn drop(&mut self) {
        self.0.send_replace(true);
    }
}
