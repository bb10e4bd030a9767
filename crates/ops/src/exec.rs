//! Processes (rows `exec.*`): the key, the mounts, the run, and what is said when it fails.

mod key;
mod limits;
mod logs;
pub(crate) mod mounts;
mod outcome;
pub(crate) mod proxied;

pub(crate) use key::{cache_map, selectors};

use crate::{
    Services,
    op::{Context, LlbOp},
    remains::{Places, Remain, Remains},
};
pub use logs::LogLimits;
use logs::StepLog;
use mounts::{Behalf, Held, OutputState, Plan};
use shipway_executor::{
    Edits, HostEntry, KeepAlive, NetworkMode, OutputSink, ProcessIo, ProcessSpec, ResourceLimits,
    Rlimit, Security, Stream,
};
use shipway_fault::{Fault, Result};
use shipway_gocompat::quote;
use shipway_llb::{ExecOp, Mount, NetMode, ProxyEnv, SecurityMode};
use shipway_netproxy::Capture;
use shipway_refs::ImmutableRef;
use shipway_session::SessionGroup;
use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{SystemTime, UNIX_EPOCH},
};

/// Runs the process and commits what it wrote.
pub(crate) async fn run(
    op: &LlbOp,
    exec: &ExecOp,
    inputs: Vec<ImmutableRef>,
    cx: &Context,
) -> Result<Vec<ImmutableRef>> {
    let jobs = (cx.jobs)();
    if !jobs.iter().any(|j| j.entitlements.check(&op.vertex.op).is_ok())
        && let Some(job) = jobs.first()
    {
        job.entitlements.check(&op.vertex.op)?;
    }
    let sessions = LlbOp::sessions(cx)?;
    let behalf = Behalf { sessions: &sessions, reporter: &cx.reporter, jobs: &jobs };
    let Plan { root, mut mounts, held, .. } =
        mounts::plan(&op.services, exec, &inputs, behalf).await?;
    let writable = root.mounts.clone();
    let env = environment(exec, &sessions).await?;
    let edits = op.services.edits(exec).await?;
    // Held by the process too: were this future dropped, the snapshots would go before the process
    // is dead.
    let held = Arc::new(Mutex::new(Some(held)));
    let resources = jobs
        .iter()
        .filter_map(|j| j.wishes.limits(op.vertex.digest))
        .reduce(|a, b| limits::wider(&a, &b));
    let resources = resources
        .or_else(|| op.vertex.metadata.resources.clone())
        .as_ref()
        .map(limits::of)
        .unwrap_or_default();
    let fetched = exec.proxied.then(Capture::default);
    let proxy = match &fetched {
        Some(fetched) => Some(op.services.proxy(cx.jobs.clone(), fetched.clone()).await?),
        None => None,
    };
    let process =
        process(&op.services, exec, env, jobs.first().map_or("", |j| &j.id), held.clone());
    let mut process = ProcessSpec { resources, edits, proxy, ..process };
    op.services.emulators.apply(&op.vertex.platform, &mut process.args, &mut mounts);
    let log = Arc::new(StepLog::new(cx.reporter.clone(), op.services.log_limits));
    let sink: OutputSink = {
        let log = log.clone();
        Arc::new(move |output| log.write(output.stream, &output.bytes))
    };
    let name = exec.meta.args.join(" ");
    let running = op.services.executor.run(process, root, mounts, ProcessIo::output(sink));
    let status = tokio::select! {
        status = running => status,
        never = log.pump() => match never {},
    };
    if let Some(summary) = fetched.as_ref().and_then(proxied::summary) {
        log.write(Stream::Stderr, &summary.into());
    }
    log.settle();
    op.fetched(fetched);
    let held = held.lock().unwrap_or_else(PoisonError::into_inner).take();
    let held = held.ok_or_else(|| Fault::internal("the snapshots of a step are gone"))?;
    if let Err(fault) =
        outcome::judge(&name, &exec.meta.valid_exit_codes, status, &log, &writable).await
    {
        log.flush();
        return Err(failed(op, exec, &inputs, held, fault));
    }
    commit(op, held, &name, cx).await
}

/// The failure of a process, with what it got and what it made of that, mount by mount.
fn failed(op: &LlbOp, exec: &ExecOp, inputs: &[ImmutableRef], held: Held, fault: Fault) -> Fault {
    if fault.is_cancelled() {
        return fault;
    }
    let input = |m: &Mount| m.input.and_then(|i| inputs.get(i)).cloned().map(Remain::Done);
    let mut mounts: Places = exec.mounts.iter().map(input).collect();
    for held in held.states {
        if let OutputState::Written { state, .. } = held.state {
            mounts[held.mount] = Some(Remain::Written(state));
        }
    }
    Remains::attach(fault, &op.vertex, exec.mounts.iter().map(input).collect(), mounts, None)
}

/// The outputs in order; those that the operation does not mention are empty states.
async fn commit(op: &LlbOp, held: Held, name: &str, cx: &Context) -> Result<Vec<ImmutableRef>> {
    let count = held.states.iter().filter_map(|s| Some(s.output? + 1)).max().unwrap_or(0);
    let mut results: Vec<Option<ImmutableRef>> = vec![None; count];
    for held in held.states {
        let Some(index) = held.output else { continue };
        let result = match held.state {
            OutputState::Same(same) => same,
            OutputState::Written { state, dest } => {
                op.commit(state, format!("mount {dest} from exec {name}"), Some(index), cx).await?
            }
        };
        results[index] = Some(result);
    }
    results.into_iter().map(|r| r.map_or_else(|| op.services.refs.scratch(), Ok)).collect()
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
    held: Arc<Mutex<Option<Held>>>,
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
        network: match exec.network {
            NetMode::Unset => NetworkMode::Default,
            NetMode::Host => NetworkMode::Host,
            NetMode::None => NetworkMode::None,
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
        tty: false,
        remove_stubs_recursively: meta.remove_mount_stubs_recursive,
        keep_alive: KeepAlive(Some(held)),
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
