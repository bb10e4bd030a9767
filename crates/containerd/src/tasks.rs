//! Owns the executor port over containerd's Containers and Tasks services.
//!
//! One process = one container record + one task. The record names the root snapshot, which makes
//! that a root of garbage collection; the snapshot's mounts go to the shim, and nothing is mounted
//! on the host. A process has a supervisor of its own (`run`) that outlives the caller's future: it
//! kills on loss of interest and cleans up in the background. Shims are kept warm and shared one
//! after another (`shims`). What a killed daemon leaves is found by label and by name, and removed
//! by [`Executor::sweep`], unless it is a process that can be gone on with (`left`).

mod api;
mod cgroup;
mod exec;
mod left;
mod orphans;
mod prepare;
mod run;
mod sandboxes;
mod shims;
mod spool;
mod stdio;
mod sweep;

use crate::{
    Containerd,
    network::{Network, NetworkConfig},
};
use api::TaskApi;
use async_trait::async_trait;
use parking_lot::{Mutex, MutexGuard};
use shims::Shims;
use shipway_executor::{
    CaBundle, ExecMount, Executor, ExitStatus, LeftProcess, OutputTarget, ProcessIo, ProcessSpec,
    RootFs, etc::Dns, spec::Host,
};
use shipway_fault::{Fault, Result};
use shipway_rootfs::Attached;
use shipway_task::spawn;
use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};
use tokio::sync::{RwLock, oneshot};
use tokio_util::task::TaskTracker;

/// How long the cleaning after a process may take.
const CLEANING: Duration = Duration::from_secs(5);

/// Settings of a [`TaskExecutor`].
#[derive(Clone, Debug)]
pub struct TaskConfig {
    /// Name of the runtime, such as `io.containerd.runc.v2`.
    pub runtime: String,
    /// Binary of the low-level runtime (`crun`, a path); the shim's default if none.
    pub binary: Option<String>,
    /// More options of the runtime.
    pub options: RuntimeOptions,
    /// The snapshotter of root filesystems.
    pub snapshotter: String,
    /// A directory of ours that the shim sees at the same path; best on a tmpfs such as `/run`.
    pub root: PathBuf,
    /// Network.
    pub network: NetworkConfig,
    /// Name servers and the like that replace the host's.
    pub dns: Dns,
    /// AppArmor profile of sandboxed processes.
    pub apparmor: Option<String>,
    /// Authorities that all processes are made to trust beside their image's.
    pub ca: Option<CaBundle>,
}

/// Options of the runc shim (row `toml.w.ctd`), by the names that containerd's own configuration
/// has for them.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "PascalCase")]
pub struct RuntimeOptions {
    /// Binary of the low-level runtime, unless the settings name one elsewhere.
    pub binary_name: String,
    /// Whether cgroups are made by systemd.
    pub systemd_cgroup: bool,
    /// Whether the root is changed without `pivot_root`, as is needed on a RAM disk.
    pub no_pivot_root: bool,
    /// Whether containers share the keyring.
    pub no_new_keyring: bool,
    /// Cgroup of the shim itself.
    pub shim_cgroup: String,
    /// Owner of the pipes of a process.
    pub io_uid: u32,
    /// Group of the pipes of a process.
    pub io_gid: u32,
}

impl RuntimeOptions {
    /// Reads the options for `runtime`; an unknown one is an error that names it.
    pub fn parse(runtime: &str, options: serde_json::Value) -> Result<Self> {
        if options.as_object().is_some_and(|o| !o.is_empty()) && !is_runc(runtime) {
            return Err(Fault::unimplemented(format!("options of the runtime {runtime}"))
                .hint("only those of runc's shim are understood: leave `options` out, or name a file of the shim's own"));
        }
        serde_json::from_value(options).map_err(|e| Fault::invalid(e.to_string()))
    }
}

/// Whether the shim of `runtime` takes runc's options.
fn is_runc(runtime: &str) -> bool {
    runtime.contains(".runc.")
}

impl TaskConfig {
    /// runc, overlayfs, and the host's network unless there is a CNI configuration.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self {
            runtime: "io.containerd.runc.v2".into(),
            binary: None,
            options: RuntimeOptions::default(),
            snapshotter: "overlayfs".into(),
            root: root.into(),
            network: NetworkConfig::default(),
            dns: Dns::default(),
            apparmor: None,
            ca: None,
        }
    }
}

/// Runs processes as containerd tasks. Clones share it.
#[derive(Clone)]
pub struct TaskExecutor(Arc<Inner>);

pub(crate) struct Inner {
    config: TaskConfig,
    api: TaskApi,
    /// What begins the ids of our containers.
    id_prefix: String,
    /// Read by every process until its cleaning is done, written by what must not run beside one.
    gate: Arc<RwLock<()>>,
    host: Host,
    shims: Arc<Shims>,
    starts: run::StartLimit,
    network: Network,
    /// Processes, from the call to the end of the cleaning.
    busy: TaskTracker,
    /// Processes that have answered and are being cleaned up.
    cleaning: TaskTracker,
    /// The tmpfs that secrets are on, while there are any.
    secrets: Mutex<Weak<Attached>>,
    /// Containers that others may join, by id.
    running: Mutex<HashMap<String, Arc<exec::Running>>>,
    /// Processes of an earlier run that were neither resumed nor abandoned, by id.
    held: Mutex<HashMap<String, left::Held>>,
    /// What belongs to them, and to those that this run leaves.
    spared: Mutex<left::Spared>,
    /// Whether processes that may be resumed are left instead of killed.
    leaving: AtomicBool,
}

impl Inner {
    /// The name of a container as containerd knows it.
    fn prefixed(&self, id: &str) -> String {
        format!("{}{}", self.id_prefix, id.trim_start_matches("shipway-"))
    }

    fn running(&self) -> MutexGuard<'_, HashMap<String, Arc<exec::Running>>> {
        self.running.lock()
    }

    fn is_leaving(&self) -> bool {
        self.leaving.load(Ordering::Acquire)
    }
}

impl TaskExecutor {
    /// An executor in `namespace`. Nothing is asked of containerd; call [`Executor::sweep`] once
    /// before the first process.
    pub fn new(containerd: &Containerd, namespace: &str, config: TaskConfig) -> Result<Self> {
        if config.runtime.is_empty() || config.snapshotter.is_empty() {
            return Err(Fault::invalid(
                "the executor needs the names of a runtime and a snapshotter",
            ));
        }
        if !config.root.is_absolute() {
            return Err(Fault::invalid(format!(
                "the executor's directory {} is not absolute",
                config.root.display()
            )));
        }
        for dir in ["run", "secret"] {
            let dir = config.root.join(dir);
            std::fs::create_dir_all(&dir)
                .map_err(|e| Fault::io(format!("create {}", dir.display()), e))?;
        }
        let api = TaskApi::new(containerd.connection.in_namespace(namespace)?, &config);
        let busy = tracker();
        let id_prefix = orphans::id_prefix(&config.root);
        let shims = Arc::new(Shims::new(api.clone(), busy.clone(), &id_prefix));
        let network = Network::new(config.network.clone(), config.root.join("netns"))?;
        Ok(Self(Arc::new(Inner {
            api,
            id_prefix,
            gate: Arc::default(),
            host: host(),
            shims,
            starts: run::StartLimit::default(),
            network,
            busy,
            cleaning: tracker(),
            secrets: Mutex::default(),
            running: Mutex::default(),
            held: Mutex::default(),
            spared: Mutex::default(),
            leaving: AtomicBool::new(false),
            config,
        })))
    }

    /// Whether processes get CNI networks by default.
    pub fn has_cni(&self) -> bool {
        self.0.network.has_cni()
    }
}

#[async_trait]
impl Executor for TaskExecutor {
    async fn run(
        &self,
        mut process: ProcessSpec,
        root: RootFs,
        mounts: Vec<ExecMount>,
        io: ProcessIo,
    ) -> Result<ExitStatus> {
        let (answer, result) = oneshot::channel();
        let guard = self.0.busy.token();
        let inner = self.0.clone();
        process.id = inner.prefixed(&process.id);
        // The supervisor notices that `result` was dropped by `answer` being closed.
        spawn("run a process", async move {
            let _open = inner.gate.clone().read_owned().await;
            run::supervise(inner, process, root, mounts, io, answer).await;
            drop(guard);
        });
        result.await.unwrap_or_else(|_| {
            Err(Fault::internal("the supervisor of a process ended without an answer"))
        })
    }

    async fn exec(
        &self,
        container: &str,
        process: ProcessSpec,
        io: ProcessIo,
    ) -> Result<ExitStatus> {
        let (answer, result) = oneshot::channel();
        let guard = self.0.busy.token();
        let (inner, container) = (self.0.clone(), self.0.prefixed(container));
        spawn("join a container", async move {
            exec::supervise(inner, container, process, io, answer).await;
            drop(guard);
        });
        result.await.unwrap_or_else(|_| {
            Err(Fault::internal("the supervisor of a process ended without an answer"))
        })
    }

    async fn retire_idle(&self) {
        // Other builds may go on meanwhile: what ends after this is theirs.
        let _ = tokio::time::timeout(CLEANING, self.0.cleaning.wait()).await;
        self.0.shims.retire_idle(None).await;
        self.0.network.retire_idle().await;
        // With nothing running, what there is was left by a call that failed, as when containerd
        // was killed.
        if let Ok(_closed) = self.0.gate.clone().try_write_owned()
            && let Err(e) = sweep::containers(&self.0).await
        {
            tracing::warn!("failed to clean up after processes, will retry at the next start: {e}");
        }
    }

    async fn drained(&self) {
        self.0.busy.wait().await;
        self.retire_idle().await;
        // What is left may be on the bridge.
        if self.0.spared.lock().is_empty() {
            self.0.network.close().await;
        }
    }

    async fn sweep(&self) -> Result<Vec<LeftProcess>> {
        sweep::sweep(&self.0).await
    }

    async fn resume(&self, process: ProcessSpec, output: OutputTarget) -> Result<ExitStatus> {
        let held = self.0.held.lock().remove(&process.id);
        let held =
            held.ok_or_else(|| Fault::not_found(format!("no process {} was left", process.id)))?;
        let (answer, result) = oneshot::channel();
        let guard = self.0.busy.token();
        let inner = self.0.clone();
        spawn("go on with a process", async move {
            let _open = inner.gate.clone().read_owned().await;
            left::supervise(inner, process, output, held, answer).await;
            drop(guard);
        });
        result.await.unwrap_or_else(|_| {
            Err(Fault::internal("the supervisor of a process ended without an answer"))
        })
    }

    async fn abandon(&self, id: &str) {
        let _busy = self.0.busy.token();
        let _open = self.0.gate.clone().read_owned().await;
        left::abandon(&self.0, id).await;
    }

    fn leave(&self) {
        self.0.leaving.store(true, Ordering::Release);
    }
}

/// A tracker whose `wait` returns whenever it tracks nothing: closed trackers take new work, too.
fn tracker() -> TaskTracker {
    let tracker = TaskTracker::new();
    tracker.close();
    tracker
}

/// What this host offers.
fn host() -> Host {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let status = read("/proc/self/status");
    let field = |name: &str| {
        status.lines().find_map(|l| l.strip_prefix(name)).map(str::trim).unwrap_or_default()
    };
    Host {
        arch: shipway_oci::Platform::host().architecture,
        seccomp: !field("Seccomp:").is_empty(),
        cgroup2: std::path::Path::new("/sys/fs/cgroup/cgroup.controllers").exists(),
        caps: u64::from_str_radix(field("CapPrm:"), 16).unwrap_or_default(),
    }
}
