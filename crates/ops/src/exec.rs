//! Processes (rows `exec.*`): the key, the mounts, the run, and what is said when it fails.

mod key;
mod limits;
mod logs;
pub(crate) mod mounts;
mod outcome;
pub(crate) mod proxied;
mod resume;
mod tracing;

use crate::{
    JobData, Services,
    content::ContentSelector,
    export_plan::BaseLayers,
    failed_state::{BySlot, FailedState, FailedStates},
    op::{Context, LlbOp, VertexOp},
};
use async_trait::async_trait;
pub use logs::LogLimits;
use logs::StepLog;
use mounts::{MountContext, MountGuards, MountPlan, OutputState};
use parking_lot::Mutex;
use resume::{HeldStates, HeldStep};
pub use resume::{HeldSteps, LeftSteps};
use shipway_executor::{
    Edits, ExitStatus, HostEntry, KeepAlive, NetworkMode, OpenedFiles, OutputTarget, ProcessIo,
    ProcessSpec, ResourceLimits, Resumable, Rlimit, Security, Stream,
};
use shipway_fault::{Fault, Result};
use shipway_gocompat::quote;
use shipway_host::is_out_of_space;
use shipway_llb::{ExecOp, Mount, MountKind, NetMode, ProxyEnv, SecurityMode};
use shipway_netproxy::Capture;
use shipway_oci::Digest;
use shipway_refs::{ImmutableRef, ReadOrder};
use shipway_session::SessionGroup;
use shipway_solver::CacheMap;
use shipway_storage::Mount as SnapshotMount;
use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{SystemTime, UNIX_EPOCH},
};

struct ExecVertex {
    exec: ExecOp,
    /// What the process on the proxy network asked for when it ran.
    fetched: Mutex<Option<Capture>>,
}

/// The work of `op`.
pub(crate) fn work(op: &ExecOp) -> Box<dyn VertexOp> {
    Box::new(ExecVertex { exec: op.clone(), fetched: Mutex::default() })
}

#[async_trait]
impl VertexOp for ExecVertex {
    async fn cache_map(&self, of: &LlbOp, _cx: &Context) -> Result<CacheMap> {
        key::cache_map(&self.exec, &of.vertex)
    }

    fn selectors(&self, input: usize) -> Option<Vec<ContentSelector>> {
        key::selectors(&self.exec, input)
    }

    /// Runs the process and commits what it wrote.
    async fn run(
        &self,
        of: &LlbOp,
        inputs: Vec<ImmutableRef>,
        cx: &Context,
    ) -> Result<Vec<ImmutableRef>> {
        let (exec, jobs) = (&self.exec, (cx.jobs)());
        let sessions = LlbOp::sessions(cx)?;
        let resources = jobs
            .iter()
            .filter_map(|j| j.step_options.limits(of.vertex.digest))
            .reduce(|a, b| limits::wider(&a, &b));
        let resources = resources
            .or_else(|| of.vertex.metadata.resources.clone())
            .as_ref()
            .map(limits::of)
            .unwrap_or_default();
        let edits = of.services.edits(exec).await?;
        let services = &of.services;
        // What a process reads is watched by this daemon only.
        let watched = jobs.iter().any(|j| j.export_plan.notes_opened(of.vertex.digest));
        let key = match services.held.outlive() && !watched {
            true => {
                let options: Vec<_> = jobs.iter().map(|j| j.step_options.clone()).collect();
                resume::key(exec, &of.vertex, &inputs, &options, (&resources, &edits))
            }
            false => None,
        };
        let step = Step { of, exec, inputs, cx, jobs, sessions, resources, edits, watched, key };
        if let Some(held) = key.and_then(|key| services.held.take(key))
            && let Some(states) = step.resume(held).await?
        {
            return Ok(states);
        }
        let (states, fetched) = step.run().await?;
        *self.fetched.lock() = fetched;
        Ok(states)
    }

    fn capture(&self, of: &LlbOp, capture: &mut shipway_attest::Capture) -> Result<()> {
        let exec = &self.exec;
        for mount in &exec.mounts {
            match &mount.kind {
                MountKind::Secret(s) => capture.add_secret(&s.id, s.optional),
                MountKind::Ssh(s) => capture.add_ssh(&s.id, s.optional),
                _ => {}
            }
        }
        exec.secret_env.iter().for_each(|s| capture.add_secret(&s.id, s.optional));
        capture.network |= exec.network != NetMode::None;
        if exec.proxied {
            let fetched = self.fetched.lock().clone();
            let (op, name) = (of.vertex.digest.to_string(), exec.meta.args.join(" "));
            proxied::record(fetched.as_ref(), &op, &name, capture);
        }
        Ok(())
    }

    fn base_layers(&self, output: usize, _inputs: usize) -> BaseLayers {
        let is_output = |m: &&Mount| m.output == Some(output) && matches!(m.kind, MountKind::Bind);
        let mount = self.exec.mounts.iter().find(is_output);
        let inputs = mount.and_then(|m| m.input).into_iter().collect();
        BaseLayers { inputs, adds_layer: true }
    }
}

/// One run of an operation.
struct Step<'a> {
    of: &'a LlbOp,
    exec: &'a ExecOp,
    inputs: Vec<ImmutableRef>,
    cx: &'a Context,
    jobs: Vec<JobData>,
    sessions: SessionGroup,
    resources: ResourceLimits,
    edits: Edits,
    /// Whether a build wants to know which files it opens.
    watched: bool,
    /// By what a later run of the daemon knows it.
    key: Option<Digest>,
}

impl Step<'_> {
    fn name(&self) -> String {
        self.exec.meta.args.join(" ")
    }

    /// The process, which keeps `guards`.
    fn process(&self, env: Vec<String>, guards: Arc<Mutex<Option<MountGuards>>>) -> ProcessSpec {
        let job = self.jobs.first().map_or("", |j| &j.id);
        let (resources, edits) = (self.resources.clone(), self.edits.clone());
        let process = process(&self.of.services, self.exec, env, job, guards);
        ProcessSpec { resources, edits, ..process }
    }

    /// Starts the process and serves it to its end. Returns what it made, and what it fetched by
    /// the proxy network.
    async fn run(self) -> Result<(Vec<ImmutableRef>, Option<Capture>)> {
        let Self { of, exec, inputs, cx, jobs, sessions, .. } = &self;
        let mounting = MountContext { sessions, reporter: &cx.reporter, jobs };
        let MountPlan { root, mut mounts, guards, .. } =
            mounts::plan(&of.services, exec, inputs, mounting, None).await?;
        let writable = root.mounts.clone();
        let mut env = environment(exec, sessions).await?;
        mounts.extend(tracing::add(of.services.trace_socket.as_deref(), &mut env));
        let note = self.key.and_then(|_| guards.note(inputs)?.text());
        let resumable = self.key.zip(note).map(|(key, note)| Resumable { key, note });
        // Held by the process too: were this future dropped, the snapshots would go before the
        // process is dead.
        let guards = Arc::new(Mutex::new(Some(guards)));
        let fetched = exec.proxied.then(Capture::default);
        let proxy = match &fetched {
            Some(fetched) => Some(of.services.proxy(cx.jobs.clone(), fetched.clone()).await?),
            None => None,
        };
        let opened = self.watched.then(OpenedFiles::default);
        let process = self.process(env, guards.clone());
        let mut process = ProcessSpec { proxy, opened: opened.clone(), resumable, ..process };
        of.services.emulators.apply(&of.vertex.platform, &mut process.args, &mut mounts);
        let log = Arc::new(StepLog::new(cx.reporter.clone(), of.services.log_limits));
        let io = ProcessIo::output(log.clone().sink());
        let status = log.pumped(of.services.executor.run(process, root, mounts, io)).await;
        if let Some(summary) = fetched.as_ref().and_then(proxied::summary) {
            log.write(Stream::Stderr, &summary.into());
        }
        log.settle();
        let judged = self.judge(status, &log, &writable).await;
        let states = self.end(judged, guards, &log).await?;
        if let Some(opened) = opened.map(|opened| ReadOrder::from(opened.take())) {
            states.iter().for_each(|state| state.note_opened(opened.clone()));
        }
        Ok((states, fetched))
    }

    /// Goes on with a process that an earlier run of the daemon started. `None` if that leads
    /// nowhere: then nothing is left of it, and it is to be run.
    async fn resume(&self, held: HeldStep) -> Result<Option<Vec<ImmutableRef>>> {
        let HeldStep { process: left, states } = held;
        let services = &self.of.services;
        let plan = match self.take_over(&left.id, states).await {
            Ok(plan) => plan,
            Err(e) => {
                ::tracing::info!(container = left.id, "a step cannot be gone on with: {e}");
                services.executor.abandon(&left.id).await;
                return Ok(None);
            }
        };
        ::tracing::info!(container = left.id, vertex = %self.of.vertex.digest, "a step goes on");
        let writable = plan.root.mounts.clone();
        let guards = Arc::new(Mutex::new(Some(plan.guards)));
        let process =
            ProcessSpec { id: left.id, ..self.process(self.exec.meta.env.clone(), guards.clone()) };
        let (reporter, limits) = (self.cx.reporter.clone(), services.log_limits);
        let log = Arc::new(StepLog::begun(reporter, limits, left.started));
        let output = OutputTarget::Sink(log.clone().sink());
        let status = log.pumped(services.executor.resume(process, output)).await;
        let ended = status.is_ok();
        let judged = self.judge(status, &log, &writable).await;
        let notice = match &judged {
            Err(e) if e.is_cancelled() => None,
            // containerd has lost it, or nobody saw why it failed.
            Err(e) if !ended || left.ended_unseen => {
                Some(format!("[{e} while the daemon was away: the step is run again]\n"))
            }
            Ok(()) if left.ended_unseen => Some(
                "[the daemon was away when the step ended: the end of its output may be missing]\n"
                    .to_owned(),
            ),
            _ => None,
        };
        if let Some(notice) = &notice {
            log.write(Stream::Stderr, &notice.clone().into());
        }
        log.settle();
        if judged.is_err() && notice.is_some() {
            return Ok(None);
        }
        self.end(judged, guards, &log).await.map(Some)
    }

    /// The mounts of the process `id`, made of the states that it has. If nobody waits for them any
    /// more, the process is ended before they go.
    async fn take_over(&self, id: &str, states: HeldStates) -> Result<MountPlan> {
        let (services, exec, inputs) =
            (self.of.services.clone(), self.exec.clone(), self.inputs.clone());
        let (sessions, reporter, jobs) =
            (self.sessions.clone(), self.cx.reporter.clone(), self.jobs.clone());
        let (id, (sender, plan)) = (id.to_owned(), tokio::sync::oneshot::channel());
        shipway_task::spawn("take over a step", async move {
            let mounting = MountContext { sessions: &sessions, reporter: &reporter, jobs: &jobs };
            let plan = mounts::plan(&services, &exec, &inputs, mounting, Some(states)).await;
            if let Err(unwanted) = sender.send(plan) {
                services.executor.abandon(&id).await;
                drop(unwanted);
            }
        });
        plan.await.unwrap_or_else(|_| Err(Fault::internal("a step was not taken over")))
    }

    async fn judge(
        &self,
        status: Result<ExitStatus>,
        log: &StepLog,
        writable: &[SnapshotMount],
    ) -> Result<()> {
        let valid = &self.exec.meta.valid_exit_codes;
        outcome::judge(&self.name(), valid, status, log, writable).await
    }

    /// What the process made, once it was judged.
    async fn end(
        &self,
        judged: Result<()>,
        guards: Arc<Mutex<Option<MountGuards>>>,
        log: &StepLog,
    ) -> Result<Vec<ImmutableRef>> {
        let guards = guards.lock().take();
        let guards = guards.ok_or_else(|| Fault::internal("the snapshots of a step are gone"))?;
        if let Err(fault) = judged {
            log.flush();
            return Err(failed(self.of, self.exec, &self.jobs, &self.inputs, guards, fault));
        }
        commit(self.of, guards, &self.name(), self.cx).await
    }
}

/// The failure of a process, with what it got and what it made of that, mount by mount.
fn failed(
    of: &LlbOp,
    exec: &ExecOp,
    jobs: &[JobData],
    inputs: &[ImmutableRef],
    guards: MountGuards,
    fault: Fault,
) -> Fault {
    // A full disk has no room for what nobody may look into.
    if fault.is_cancelled() || is_out_of_space(&fault) {
        return fault;
    }
    let input = |m: &Mount| m.input.and_then(|i| inputs.get(i)).cloned().map(FailedState::Done);
    let mut mounts: BySlot = exec.mounts.iter().map(input).collect();
    for mounted in guards.states {
        if let OutputState::Written { state, .. } = mounted.state {
            mounts[mounted.mount] = Some(FailedState::Written(state));
        }
    }
    FailedStates::attach(
        fault,
        &of.vertex,
        jobs,
        exec.mounts.iter().map(input).collect(),
        mounts,
        None,
    )
}

/// The outputs in order; those that the operation does not mention are empty states.
async fn commit(
    of: &LlbOp,
    guards: MountGuards,
    name: &str,
    cx: &Context,
) -> Result<Vec<ImmutableRef>> {
    let count = guards.states.iter().filter_map(|s| Some(s.output? + 1)).max().unwrap_or(0);
    let mut results: Vec<Option<ImmutableRef>> = vec![None; count];
    for mounted in guards.states {
        let Some(index) = mounted.output else { continue };
        let result = match mounted.state {
            OutputState::Same(same) => same,
            OutputState::Written { state, dest } => {
                of.commit(state, format!("mount {dest} from exec {name}"), Some(index), cx).await?
            }
        };
        results[index] = Some(result);
    }
    results.into_iter().map(|r| r.map_or_else(|| of.services.refs.scratch(), Ok)).collect()
}

/// An id that no other container has had.
pub(crate) fn container_id() -> String {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos() as u64;
    format!("shipway-{:x}-{now:x}-{:x}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed))
}

/// The process of `exec`, without limits.
pub(crate) fn process(
    services: &Services,
    exec: &ExecOp,
    env: Vec<String>,
    job: &str,
    guards: Arc<Mutex<Option<MountGuards>>>,
) -> ProcessSpec {
    let meta = &exec.meta;
    let parent = if meta.cgroup_parent.is_empty() {
        services.cgroup_parent.clone()
    } else {
        Some(meta.cgroup_parent.clone())
    };
    ProcessSpec {
        id: container_id(),
        group: job.to_owned(),
        args: meta.args.clone(),
        env,
        cwd: meta.cwd.clone(),
        user: meta.user.clone(),
        hostname: meta.hostname.clone(),
        extra_hosts: meta
            .extra_hosts
            .iter()
            .map(|h| HostEntry { host: h.host.clone(), ip: h.ip.clone() })
            .collect(),
        network: match (&exec.named_network, exec.network) {
            (Some(name), _) => NetworkMode::Named(name.clone()),
            (None, NetMode::Unset) => NetworkMode::Default,
            (None, NetMode::Host) => NetworkMode::Host,
            (None, NetMode::None) => NetworkMode::None,
        },
        security: match exec.security {
            SecurityMode::Sandbox => Security::Sandbox,
            SecurityMode::Insecure => Security::Insecure,
        },
        rlimits: meta
            .ulimits
            .iter()
            .map(|u| Rlimit { name: u.name.clone(), soft: u.soft, hard: u.hard })
            .collect(),
        cgroup_parent: parent,
        resources: ResourceLimits::default(),
        edits: Edits::default(),
        proxy: None,
        opened: None,
        tty: false,
        remove_stubs_recursively: meta.remove_mount_stubs_recursive,
        keep_alive: KeepAlive(Some(guards)),
        resumable: None,
    }
}

fn proxies(proxy: &ProxyEnv) -> impl Iterator<Item = String> + '_ {
    [
        ("http_proxy", &proxy.http),
        ("https_proxy", &proxy.https),
        ("ftp_proxy", &proxy.ftp),
        ("no_proxy", &proxy.no),
        ("all_proxy", &proxy.all),
    ]
    .into_iter()
    .filter(|(_, value)| !value.is_empty())
    .flat_map(|(name, value)| {
        [format!("{}={value}", name.to_uppercase()), format!("{name}={value}")]
    })
}

/// The environment with proxies (row `exec.proxyenv`) and secrets (row `exec.secretenv`); PATH is
/// the executor's.
pub(crate) async fn environment(exec: &ExecOp, sessions: &SessionGroup) -> Result<Vec<String>> {
    let mut env = exec.meta.env.clone();
    env.extend(exec.meta.proxy.iter().flat_map(proxies));
    for wanted in &exec.secret_env {
        if wanted.id.is_empty() {
            return Err(Fault::invalid(format!(
                "secret ID missing for {} environment variable",
                quote(&wanted.name)
            )));
        }
        let value =
            mounts::secret(sessions, &wanted.id, wanted.optional).await?.unwrap_or_default();
        let value = String::from_utf8(value).map_err(|_| {
            Fault::invalid(format!(
                "secret {} is not text and cannot be the value of variable {}",
                wanted.id, wanted.name
            ))
        })?;
        env.push(format!("{}={value}", wanted.name));
    }
    Ok(env)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_output_has_the_layers_of_what_was_mounted_there() {
        let mount = |input, output| Mount { input, output, ..Mount::default() };
        let exec = work(&ExecOp {
            mounts: vec![mount(Some(2), Some(0)), mount(Some(1), None), mount(None, Some(1))],
            ..ExecOp::default()
        });
        let check = |output, inputs| {
            assert_eq!(exec.base_layers(output, 3), BaseLayers { inputs, adds_layer: true });
        };
        check(0, vec![2]);
        check(1, vec![]);
    }
}
