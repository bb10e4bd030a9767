//! Owns the life of one process: prepare, create, start, wait or kill, answer, clean up.

use super::{
    Inner,
    api::{ProcessRef, SIGKILL, Stdio, lost},
    cgroup::{MemoryCgroup, MemoryCount},
    exec::Running,
    left::{self, StoredRecord},
    orphans,
    prepare::{self, Prepared},
    shims::Slot,
    stdio, tracker,
};
use crate::network::NetnsGuard;
use bytes::Bytes;
use shipway_executor::{
    Control, ExecMount, ExitStatus, NetworkMode, ProcessIo, ProcessSpec, RootFs, set_variables,
    spec,
};
use shipway_fault::{Class, Code, Context, Fault, Result};
use shipway_gocompat::path::rooted;
use shipway_rootfs::Opened;
use shipway_task::{blocking, spawn};
use std::{convert::Infallible, num::NonZero, sync::Arc, time::Duration};
use tokio::{
    net::unix::pipe,
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot},
    task::JoinHandle,
};

/// How long output may trickle on after the process ended.
const DRAIN: Duration = Duration::from_secs(5);
/// How long a killed process may take to end before the kill is repeated.
const DEATH: Duration = Duration::from_secs(1);
/// How often it is repeated.
const KILLS: usize = 10;

pub(super) type ExitSender = oneshot::Sender<Result<ExitStatus>>;

/// How the daemon is done with a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ended<T> {
    /// It ended so.
    Exited(T),
    /// It goes on, for a later run of the daemon.
    Left,
}

/// Runs `process` and answers; returns when nothing is left of it. Kills it when its caller no
/// longer waits for the answer any more.
pub(super) async fn supervise(
    inner: Arc<Inner>,
    process: ProcessSpec,
    root: RootFs,
    mounts: Vec<ExecMount>,
    io: ProcessIo,
    mut answer: ExitSender,
) {
    if let Err(e) = check_id(&process.id) {
        let _ = answer.send(Err(e));
        return;
    }
    // A warm shim may be free after the wait.
    let Some(starting) = inner.starts.one(&mut answer).await else { return };
    let mut slot = inner.shims.take();
    let mut parts = Parts { prepared: None, netns: None, created: false };
    let result =
        run(&inner, &process, &root, mounts, io, (&mut slot, starting), &mut parts, &mut answer)
            .await;
    let mut result = match result {
        Ok(Ended::Left) => return left::leave(&inner, process, parts, &slot),
        Ok(Ended::Exited(status)) => Ok(status),
        Err(e) => Err(e),
    };
    if let Err(e) = parts.restore().await {
        result = result.and(Err(e));
    }
    let reusable = result.is_ok() && prepare::leaves_network_clean(&process);
    let cut_off = result.as_ref().is_err_and(|e| e.code() != Code::Cancelled);
    // From here on the caller goes on, and may want to wait for the rest.
    let cleaning = inner.cleaning.token();
    let _ = answer.send(result);
    clean_up(&inner, &process.id, parts, reusable, slot).await;
    if cut_off {
        let (namespace, id) = (inner.api.namespace().to_owned(), process.id);
        let remove = move || {
            orphans::remove_one(&namespace, &id);
            Ok(())
        };
        let _ = blocking("remove orphans of a container", remove).await;
    }
    drop(cleaning);
}

/// Processes that may be started at the same time: more than the machine has processors for would
/// each want a shim of its own and take as long.
pub(super) struct StartLimit(Arc<Semaphore>);

impl Default for StartLimit {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(
            2 * std::thread::available_parallelism().map_or(1, NonZero::get),
        )))
    }
}

impl StartLimit {
    /// One start, to be dropped when it is over; `None` if the caller no longer waits for the
    /// process.
    async fn one(&self, answer: &mut ExitSender) -> Option<OwnedSemaphorePermit> {
        tokio::select! {
            permit = self.0.clone().acquire_owned() => permit.ok(),
            () = answer.closed() => None,
        }
    }
}

/// What the process holds besides its container.
pub(super) struct Parts {
    pub(super) prepared: Option<Prepared>,
    pub(super) netns: Option<NetnsGuard>,
    /// Whether the slot's shim ran for it.
    pub(super) created: bool,
}

impl Parts {
    /// What the process has to know of its network.
    fn variables(&self, process: &ProcessSpec) -> Vec<String> {
        let proxy = self.netns.iter().flat_map(NetnsGuard::variables);
        let trust = self
            .prepared
            .iter()
            .filter_map(|p| p.trust.as_ref())
            .flat_map(|t| t.environment(&process.env));
        proxy.chain(trust).collect()
    }

    /// Takes out of the root filesystem what was put there for the process, before anybody else
    /// sees it.
    pub(super) async fn restore(&mut self) -> Result<()> {
        let Some(trust) = self.prepared.as_mut().and_then(|p| p.trust.take()) else {
            return Ok(());
        };
        blocking("restore a root filesystem", move || trust.restore()).await
    }
}

/// Counts what a process used, and takes away what it leaves of its mount points.
pub(super) async fn settle(parts: &mut Parts, cgroup: Option<MemoryCgroup>) -> Result<MemoryCount> {
    // Before the stubs: it leaves directories that they take away.
    parts.restore().await?;
    let stubs = parts.prepared.as_mut().and_then(|p| p.stubs.take());
    let count = blocking("count memory", move || {
        let memory = cgroup.map(|c| c.count()).unwrap_or_default();
        if let Some(stubs) = stubs {
            stubs.remove();
        }
        Ok(memory)
    });
    Ok(count.await.unwrap_or_default())
}

pub(super) async fn clean_up(
    inner: &Arc<Inner>,
    id: &str,
    parts: Parts,
    reusable: bool,
    slot: Arc<Slot>,
) {
    if parts.created {
        // Before the shim's only container goes, and the shim with it.
        inner.shims.keep(&slot).await;
    }
    if let Err(e) = inner.api.destroy(id).await {
        tracing::warn!(
            container = id,
            "failed to remove container, will retry at the next start: {e}"
        );
    }
    if let Some(lease) = parts.netns {
        inner.network.give_back(lease, reusable).await;
    }
    if let Some(prepared) = parts.prepared {
        let _ = blocking("clean up after a process", move || {
            drop(prepared);
            Ok(())
        })
        .await;
    }
    inner.shims.put(slot).await;
}

pub(super) fn check_id(id: &str) -> Result<()> {
    let good = !id.is_empty()
        && id.len() <= 76
        && id.chars().all(|c| c.is_ascii_alphanumeric() || c == '-')
        && !id.starts_with('-');
    if good { Ok(()) } else { Err(Fault::internal(format!("{id:?} is not a valid container id"))) }
}

/// The cgroup of a container.
pub(super) fn cgroups_path(inner: &Inner, process: &ProcessSpec) -> String {
    match process.cgroup_parent.as_deref().unwrap_or_default() {
        "" => inner.api.cgroups_path(&process.id),
        parent => cgroup_below(parent, &process.id, inner.config.options.systemd_cgroup),
    }
}

/// The cgroup of container `id` below `parent`, as the runtime takes it: a path, or
/// `slice:prefix:name` where systemd makes the cgroups or the parent is written so (row
/// `exec.cgroupparent`).
fn cgroup_below(parent: &str, id: &str, systemd: bool) -> String {
    match parent {
        p if p.contains(".slice") && p.ends_with(':') => format!("{p}{id}"),
        p if systemd => format!(
            "{}:shipway:{id}",
            p.trim_matches('/').rsplit('/').next().unwrap_or("system.slice")
        ),
        p => rooted(&format!("{p}/buildkit/{id}")),
    }
}

/// The runtime specification of a prepared process.
fn specification(
    inner: &Inner,
    process: &ProcessSpec,
    root: &RootFs,
    slot: &Slot,
    parts: &Parts,
) -> Result<Vec<u8>> {
    let prepared =
        parts.prepared.as_ref().ok_or_else(|| Fault::internal("a process was not prepared"))?;
    let ctx = spec::SpecContext {
        cgroups_path: cgroups_path(inner, process),
        netns: parts.netns.as_ref().map(|l| l.path().display().to_string()),
        mounts: prepared.mounts.clone(),
        read_only_root: root.read_only,
        apparmor: inner.config.apparmor.clone(),
    };
    let network = match inner.network.is_host(process) {
        true => NetworkMode::Host,
        false => process.network.clone(),
    };
    let mut process = ProcessSpec { group: slot.group.clone(), network, ..process.clone() };
    let variables = parts.variables(&process);
    set_variables(&mut process.env, variables);
    let spec = spec::build(&process, &prepared.user, &ctx, &inner.host)?;
    serde_json::to_vec(&spec)
        .map_err(|e| Fault::internal(format!("write the runtime specification: {e}")))
}

async fn create_container(
    inner: &Inner,
    process: &ProcessSpec,
    root: &RootFs,
    slot: &Slot,
    parts: &Parts,
) -> Result<()> {
    let spec = specification(inner, process, root, slot, parts)?;
    let snapshot = root.snapshot.as_ref().map(|s| s.0.as_str());
    inner.api.create_container(&process.id, spec, snapshot, slot.sandbox().as_deref()).await
}

#[allow(clippy::too_many_arguments)]
async fn run(
    inner: &Arc<Inner>,
    process: &ProcessSpec,
    root: &RootFs,
    mounts: Vec<ExecMount>,
    io: ProcessIo,
    (slot, starting): (&mut Arc<Slot>, OwnedSemaphorePermit),
    parts: &mut Parts,
    answer: &mut ExitSender,
) -> Result<Ended<ExitStatus>> {
    let resumable =
        process.resumable.clone().filter(|_| left::can_be_left(inner, process, &mounts, &io));
    let spooled = resumable.is_some();
    let prepared = {
        let (inner, process, root) = (inner.clone(), process.clone(), root.clone());
        let (output, input) = (io.output.clone(), io.input.is_some());
        blocking("prepare a process", move || {
            prepare::prepare(&inner, &process, &root, &mounts, (&output, input, spooled))
        })
    };
    let (prepared, netns) =
        tokio::join!(prepared, inner.network.lease(&process.network, process.proxy.as_ref()));
    // Both are kept before either's failure is returned, so that both are cleaned up.
    let prepared = prepared.map(|p| parts.prepared = Some(p));
    parts.netns = netns.context(|| "set up the network of a step")?;
    prepared?;

    let id = process.id.as_str();
    create_container(inner, process, root, slot, parts).await?;
    let mut stdio = parts
        .prepared
        .as_mut()
        .and_then(|p| p.stdio.take())
        .ok_or_else(|| Fault::internal("a process has no output"))?;
    let fifos = Stdio {
        stdin: stdio.stdin(),
        stdout: Some(stdio.stdout()),
        stderr: stdio.stderr(),
        terminal: process.tty,
    };
    let mut created = inner.api.create_task(id, &root.mounts, fifos).await;
    if created.is_err() && slot.sandbox().is_some() && !inner.shims.lives(slot).await {
        // Somebody killed the warm shim: the process has not begun, and another shim will do.
        inner.shims.close(slot).await;
        *slot = inner.shims.fresh();
        inner.api.destroy(id).await?;
        create_container(inner, process, root, slot, parts).await?;
        created = inner.api.create_task(id, &root.mounts, fifos).await;
    }
    stdio.opened();
    let pid = created.map_err(explain)?;
    parts.created = true;
    slot.founded_by(id);
    let cgroup = MemoryCgroup::of(pid);
    if answer.is_closed() {
        return Err(Fault::cancelled());
    }
    let opened = match process.opened.clone() {
        Some(files) => {
            let watch = move || Opened::of(pid, move |path| files.add(path));
            Some(blocking("watch what a process opens", watch).await?)
        }
        None => None,
    };
    // Before the process begins: one that is not known would be swept away.
    let stored = match resumable {
        Some(what) => left::store(inner, process, what, slot, parts, cgroup.as_ref()).await,
        None => None,
    };
    let running = Arc::new(Running {
        root: root.clone(),
        dir: inner.config.root.join("run").join(id),
        variables: parts.variables(process),
        joined: tracker(),
    });
    let on_start = || {
        drop(starting);
        inner.running().insert(id.to_owned(), running.clone());
        let (inner, slot) = (inner.clone(), slot.clone());
        spawn("keep a shim warm", async move { inner.shims.keep(&slot).await });
    };
    let place = ProcessRef::first(id);
    let ended = start(inner, &place, stdio, io, answer, stored.as_ref(), on_start).await;
    inner.running().remove(id);
    if let Some(opened) = opened {
        let end = move || {
            drop(opened);
            Ok(())
        };
        blocking("note what a process opened", end).await?;
    }
    // The kernel has killed those who joined; their ends are reported before the container goes.
    let _ = tokio::time::timeout(DRAIN, running.joined.wait()).await;
    let Ended::Exited(code) = ended? else { return Ok(Ended::Left) };
    let memory = settle(parts, cgroup).await?;
    let (oom_killed, peak_memory) = (memory.oom_killed, memory.peak);
    Ok(Ended::Exited(ExitStatus { code, oom_killed, peak_memory }))
}

/// Starts a process that was created, and serves it to its end; `stored` is what a later run finds
/// of it.
pub(super) async fn start(
    inner: &Inner,
    place: &ProcessRef,
    mut stdio: stdio::Stdio,
    io: ProcessIo,
    answer: &mut ExitSender,
    stored: Option<&StoredRecord>,
    on_start: impl FnOnce() + Send,
) -> Result<Ended<u32>> {
    // Waiting begins before the start, so that no exit is missed.
    let exit = Exit::of(inner, place);
    if let Err(e) = inner.api.start(place).await {
        exit.0.abort();
        if let Some(stored) = stored {
            stored.withdraw().await;
        }
        // The task was there a moment ago, and a missing program has another error.
        return Err(if e.is_not_found() && !e.message().contains(EXEC) {
            lost(place, &e)
        } else {
            explain(e)
        });
    }
    stdio.opened();
    on_start();
    if let Some(started) = io.started {
        let _ = started.send(());
    }
    let input = io.input.zip(stdio.take_writer());
    let attended = attend(inner, place, input, io.control);
    exit.serve(inner, place, stdio, attended, answer, stored).await
}

/// The exit of a process, which is being waited for.
pub(super) struct Exit(JoinHandle<Result<u32>>);

impl Exit {
    pub(super) fn of(inner: &Inner, place: &ProcessRef) -> Self {
        let (api, place) = (inner.api.clone(), place.clone());
        Self(spawn("wait for a process", async move { api.wait(&place).await }))
    }

    /// Serves a running process to its end, which comes at once if the caller no longer waits for
    /// `answer`; but if the daemon ends, a later run goes on with what is `stored`.
    pub(super) async fn serve(
        mut self,
        inner: &Inner,
        place: &ProcessRef,
        stdio: stdio::Stdio,
        attended: impl Future<Output = Infallible>,
        answer: &mut ExitSender,
        stored: Option<&StoredRecord>,
    ) -> Result<Ended<u32>> {
        let code = tokio::select! {
            code = &mut self.0 => flatten(code),
            () = answer.closed() => {
                if let Some(stored) = stored {
                    if inner.is_leaving() {
                        self.0.abort();
                        stdio.leave().await;
                        return Ok(Ended::Left);
                    }
                    // First: a later run must not take it for one that ended by itself.
                    stored.withdraw().await;
                }
                kill(inner, place, &mut self.0).await;
                Err(Fault::cancelled())
            }
            never = attended => match never {},
        };
        stdio.drain(if code.is_ok() { DRAIN } else { Duration::from_millis(100) }).await;
        code.map(Ended::Exited)
    }
}

/// Carries a process's input and control messages to it while it runs.
async fn attend(
    inner: &Inner,
    place: &ProcessRef,
    input: Option<(mpsc::Receiver<Bytes>, pipe::Sender)>,
    control: Option<mpsc::Receiver<Control>>,
) -> Infallible {
    let feed = async {
        if let Some((from, to)) = input {
            stdio::feed(from, to).await;
            if let Err(e) = inner.api.close_input(place).await {
                tracing::debug!("failed to close stdin of {place}: {e}");
            }
        }
    };
    let controlling = async {
        let Some(mut control) = control else { return };
        while let Some(message) = control.recv().await {
            let done = match message {
                Control::Signal(signal) => inner.api.signal(place, signal).await,
                Control::Resize { rows, columns } => inner.api.resize(place, rows, columns).await,
            };
            if let Err(e) = done {
                tracing::debug!("failed to deliver {message:?} to {place}: {e}");
            }
        }
    };
    tokio::join!(feed, controlling);
    std::future::pending().await
}

fn flatten(code: Result<Result<u32>, tokio::task::JoinError>) -> Result<u32> {
    code.unwrap_or_else(|e| Err(Fault::internal(format!("wait for a process: {e}"))))
}

/// Kills until the process is dead, within reason.
async fn kill(inner: &Inner, place: &ProcessRef, exit: &mut JoinHandle<Result<u32>>) {
    for _ in 0..KILLS {
        let _ = match place.exec.as_str() {
            "" => inner.api.kill(&place.container).await,
            _ => inner.api.signal(place, SIGKILL).await,
        };
        if tokio::time::timeout(DEATH, &mut *exit).await.is_ok() {
            return;
        }
    }
    exit.abort();
    tracing::warn!("{place} is still running after SIGKILL");
}

/// Where the runtime's own words begin.
const EXEC: &str = "exec: ";

/// A runtime's refusal in words of the step: a program that is not there is the user's error.
fn explain(fault: Fault) -> Fault {
    let text = fault.message();
    let Some(at) = text.find(EXEC) else { return fault };
    let message = text[at..].trim_end_matches(": unknown").to_owned();
    let missing = message.contains("executable file not found")
        || message.contains("no such file or directory");
    let code = if missing { Code::NotFound } else { Code::Unknown };
    Fault::new(code, message).with_class(Class::User).with_code(Code::Unknown)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cgroup_lies_below_the_parent_that_was_asked_for() {
        for (parent, systemd, want) in [
            ("builds", false, "/builds/buildkit/id"),
            ("/a/../../b/", false, "/b/buildkit/id"),
            ("user.slice:shipway:", false, "user.slice:shipway:id"),
            ("user.slice:shipway:", true, "user.slice:shipway:id"),
            ("/system.slice/builds.slice/", true, "builds.slice:shipway:id"),
        ] {
            assert_eq!(cgroup_below(parent, "id", systemd), want, "{parent} {systemd}");
        }
    }
}
