//! Owns the life of a process that joins a running container.

use super::{
    Inner,
    api::{ProcessRef, Stdio},
    run::{self, ExitSender},
    stdio,
};
use shipway_executor::{ExitStatus, ProcessIo, ProcessSpec, RootFs, set_variables, spec};
use shipway_fault::{Fault, Result};
use shipway_rootfs::{Access, RootView, identity};
use shipway_task::blocking;
use std::{path::PathBuf, sync::Arc};
use tokio_util::task::TaskTracker;

/// A container whose first process runs.
pub(super) struct Running {
    /// Where its users are looked up.
    pub(super) root: RootFs,
    /// Its directory on the host.
    pub(super) dir: PathBuf,
    /// What its processes have to know of its network.
    pub(super) variables: Vec<String>,
    /// Those who joined.
    pub(super) joined: TaskTracker,
}

/// Runs `process` in `container` and answers. Kills it when its caller is gone.
pub(super) async fn supervise(
    inner: Arc<Inner>,
    container: String,
    process: ProcessSpec,
    io: ProcessIo,
    mut answer: ExitSender,
) {
    let result = join(&inner, container, process, io, &mut answer).await;
    let _ = answer.send(result);
}

async fn join(
    inner: &Arc<Inner>,
    container: String,
    process: ProcessSpec,
    io: ProcessIo,
    answer: &mut ExitSender,
) -> Result<ExitStatus> {
    run::check_id(&process.id)?;
    let running = inner.running().get(&container).cloned();
    let running =
        running.ok_or_else(|| Fault::not_found(format!("container {container} does not run")))?;
    let _joined = running.joined.token();
    let prepare = {
        let (inner, mut process, output, input) =
            (inner.clone(), process.clone(), io.output.clone(), io.input.is_some());
        move || {
            let view = RootView::open(&running.root.mounts, Access::Read)?;
            let who = identity::resolve(&view, &process.user)?;
            set_variables(&mut process.env, running.variables.clone());
            let user = spec::user(who.uid, who.gid, who.groups);
            let apparmor = inner.config.apparmor.as_deref();
            let spec = spec::process(&process, &user, apparmor, &inner.host)?;
            let bytes = serde_json::to_vec(&spec)
                .map_err(|e| Fault::internal(format!("write a process specification: {e}")))?;
            let prefix = format!("{}-", process.id);
            let shape = stdio::StdioShape { prefix: &prefix, terminal: process.tty, input };
            let output = stdio::Destination::Direct(output);
            Ok::<_, Fault>((bytes, stdio::Stdio::open(&running.dir, shape, &output)?))
        }
    };
    let (spec, stdio) = blocking("prepare a process", prepare).await?;
    let place = ProcessRef { container, exec: process.id };
    let fifos = Stdio {
        stdin: stdio.stdin(),
        stdout: Some(stdio.stdout()),
        stderr: stdio.stderr(),
        terminal: process.tty,
    };
    inner.api.exec(&place, spec, fifos).await?;
    let result = run::start(inner, &place, stdio, io, answer, None, || ()).await;
    if let Err(e) = inner.api.delete_process(&place).await {
        tracing::debug!(
            container = place.container,
            process = place.exec,
            "failed to delete process, its container will remove it: {e}"
        );
    }
    match result? {
        run::Ended::Exited(code) => Ok(ExitStatus { code, ..ExitStatus::default() }),
        run::Ended::Left => Err(Fault::cancelled()),
    }
}
