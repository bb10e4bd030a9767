//! What a build brings to its vertices, and what the daemon brings.

use crate::{
    CacheMounts, DeviceGrants, Emulators, ExportPlan, FailedStates, HeldSteps, LogLimits, Nested,
    StepOptions,
};
use futures::future::BoxFuture;
use shipway_buildcache::Quota;
use shipway_cdi::CdiCatalog;
use shipway_executor::{CaBundle, Executor};
use shipway_fault::{Code, Fault, Result};
use shipway_llb::{ExecOp, NetMode, SecurityMode, SourceOp};
use shipway_netproxy::{Authority, EgressRules};
use shipway_oci::NetworkName;
use shipway_refs::RefStore;
use shipway_session::SessionGroup;
use shipway_sources::{SourceMemo, Sources};
use std::{
    collections::BTreeSet,
    path::PathBuf,
    sync::{Arc, OnceLock, Weak},
};
use tokio::sync::OnceCell;

/// What a build may do beyond the sandbox (row `so.ent`); granted by the daemon and asked for by
/// the build.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Entitlements {
    /// `network.host`.
    pub network_host: bool,
    /// `security.insecure`.
    pub security_insecure: bool,
    /// `network.NAME`.
    pub networks: NetworkGrants,
    /// `device`.
    pub devices: DeviceGrants,
}

/// The networks of the daemon's configuration, and those of them that a build may use (row
/// `exec.net.named`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NetworkGrants {
    /// All that there are.
    pub configured: BTreeSet<NetworkName>,
    /// Those that the build's steps may be on.
    pub allowed: BTreeSet<NetworkName>,
}

impl NetworkGrants {
    /// Refuses a network that the daemon does not have.
    pub fn find(&self, name: &NetworkName) -> Result<()> {
        if self.configured.contains(name) {
            return Ok(());
        }
        let there: Vec<&str> = self.configured.iter().map(NetworkName::as_str).collect();
        let hint = match there.as_slice() {
            [] => "the daemon's configuration names no networks: use default, none or host".into(),
            there => format!("the daemon's configuration has {}", there.join(", ")),
        };
        let message = format!("invalid network mode {:?}: no such network", name.as_str());
        Err(Fault::invalid(message).hint(hint))
    }
}

impl Entitlements {
    /// Refuses a process that asks for more, in BuildKit's words. Every build is asked about each
    /// of its own processes, before it has a vertex or a container for them: a result that is
    /// shared or cached needs the permission too. Devices are chosen by
    /// [`grant_devices`](Self::grant_devices).
    pub fn check(&self, exec: &ExecOp) -> Result<()> {
        let refuse = |name: &str| {
            Err(Fault::new(Code::PermissionDenied, format!("{name} is not allowed")).hint(format!(
                "ask for it with `--allow {name}`; the daemon's configuration must allow it too"
            )))
        };
        if exec.network == NetMode::Host && !self.network_host {
            return refuse("network.host");
        }
        if let Some(name) = &exec.named_network {
            self.networks.find(name)?;
            if !self.networks.allowed.contains(name) {
                return refuse(&name.entitlement());
            }
        }
        if exec.security == SecurityMode::Insecure && !self.security_insecure {
            return refuse("security.insecure");
        }
        Ok(())
    }
}

/// One build's part in the vertices it shares with others.
#[derive(Clone)]
pub struct JobData {
    /// The build's id (`Solve.Ref`).
    pub id: Arc<str>,
    /// Its client.
    pub sessions: SessionGroup,
    /// What it may do.
    pub entitlements: Entitlements,
    /// What sources reported to it.
    pub memo: SourceMemo,
    /// What it will export.
    pub export_plan: ExportPlan,
    /// What it wants of its steps besides their results.
    pub step_options: StepOptions,
    /// What it restores into cache mounts, and uses of them.
    pub cache_mounts: CacheMounts,
    /// What its failed operations left.
    pub failed: FailedStates,
    /// Who decides what its steps may fetch.
    pub judge: BuildJudge,
    /// How its operations have graphs solved.
    pub nested: Nested,
    /// What its operations are done for, in its trace.
    pub trace: tracing::Span,
}

/// Decides what may be used as a source.
pub trait Judge: Send + Sync {
    /// The source that takes the place of `source`, or why it is not allowed.
    fn judge(&self, source: SourceOp) -> BoxFuture<'_, Result<SourceOp>>;
}

/// A build's judge, which comes after the build's other parts; a build without one allows
/// everything.
#[derive(Clone, Default)]
pub struct BuildJudge(Arc<OnceLock<Weak<dyn Judge>>>);

impl BuildJudge {
    /// Makes `judge` the one; the first stays.
    pub fn set(&self, judge: Weak<dyn Judge>) {
        let _ = self.0.set(judge);
    }

    /// What takes the place of `source`.
    pub(crate) async fn judge(&self, source: SourceOp) -> Result<SourceOp> {
        match self.0.get() {
            None => Ok(source),
            // The build has ended, and cannot decide.
            Some(judge) => judge.upgrade().ok_or_else(Fault::cancelled)?.judge(source).await,
        }
    }
}

/// What all operations work with.
pub struct Services {
    /// States.
    pub refs: RefStore,
    /// Sources.
    pub sources: Sources,
    /// Processes.
    pub executor: Arc<dyn Executor>,
    /// Steps of an earlier run of the daemon that wait for a build.
    pub held: HeldSteps,
    /// Where sockets are made that steps get.
    pub sockets: PathBuf,
    /// Parent cgroup for steps that name none.
    pub cgroup_parent: Option<String>,
    /// Where devices of the host are described, unless steps get none.
    pub devices: Option<Arc<CdiCatalog>>,
    /// What runs programs for other processors.
    pub emulators: Emulators,
    /// How much of a step's output is passed on.
    pub log_limits: LogLimits,
    /// Where steps may send spans to; none where nobody would take them.
    pub trace_socket: Option<PathBuf>,
    /// What steps on the proxy network may reach at all.
    pub egress: Arc<EgressRules>,
    /// Authorities that the proxy network verifies servers with, beside the system's.
    pub ca: Option<CaBundle>,
    /// Keeps what operations write within limits.
    pub quota: Quota,
    /// The certificate authority of the proxy network, once a step needed it.
    pub authority: OnceCell<Arc<Authority>>,
}
