//! What a process is and how one runs it.

use crate::{Edits, OutputTarget, ProcessIo, Proxied};
use async_trait::async_trait;
use bytes::Bytes;
use parking_lot::Mutex;
use shipway_fault::Result;
use shipway_oci::{Digest, NetworkName};
use shipway_storage::{Mount, SnapshotKey};
use std::{any::Any, path::PathBuf, sync::Arc, time::SystemTime};

/// The root filesystem of a process: mounts that the shim itself performs, and the snapshot they
/// belong to.
#[derive(Clone, Debug)]
pub struct RootFs {
    /// The active snapshot or view; it becomes a garbage-collection root of the container.
    pub snapshot: Option<SnapshotKey>,
    /// Its mounts.
    pub mounts: Vec<Mount>,
    /// Whether the process may write.
    pub read_only: bool,
}

/// A mount into the process besides its root.
#[derive(Clone, Debug)]
pub struct ExecMount {
    /// Absolute path in the container.
    pub target: String,
    /// What is mounted.
    pub source: MountSource,
    /// Whether the process may write.
    pub read_only: bool,
}

/// What an [`ExecMount`] shows.
#[derive(Clone, Debug)]
pub enum MountSource {
    /// A snapshot's mounts, whole.
    Snapshot(Vec<Mount>),
    /// A path of the host (directory, file or socket), bind-mounted.
    Host(PathBuf),
    /// A fresh tmpfs; size in bytes, 0 for the kernel's default.
    Tmpfs {
        /// Limit in bytes; 0 for none.
        size: u64,
    },
    /// A file or directory within a snapshot. The path is resolved inside the snapshot; no link
    /// leads out of it.
    SnapshotPath {
        /// The snapshot's mounts.
        mounts: Vec<Mount>,
        /// Path within it; `NotFound` if there is nothing.
        path: String,
    },
    /// A file with these bytes, which never reach a disk: a secret. Mounted without set-user-id,
    /// devices or execution.
    Content {
        /// The bytes.
        bytes: Secret,
        /// Owner.
        uid: u32,
        /// Group.
        gid: u32,
        /// Permissions.
        mode: u32,
    },
}

/// Bytes that are not to be shown.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Secret(pub Bytes);

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "<{} secret bytes>", self.0.len())
    }
}

/// User of the process, as written: name, uid, `uid:gid`, `name:group`; resolved in the root
/// filesystem by the executor. Empty is root.
pub type User = String;

/// Network of the process (row `exec.net`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum NetworkMode {
    /// The daemon's configured default: CNI where configured, else the host's.
    #[default]
    Default,
    /// The host's.
    Host,
    /// Loopback only.
    None,
    /// One of those that the configuration names (row `exec.net.named`).
    Named(NetworkName),
}

/// Confinement of the process (row `exec.sec`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Security {
    /// Default seccomp, masked paths, default capabilities.
    #[default]
    Sandbox,
    /// Everything allowed.
    Insecure,
}

/// An entry of `/etc/hosts`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostEntry {
    /// Name.
    pub host: String,
    /// Address.
    pub ip: String,
}

/// A named limit (row `exec.ulimit`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rlimit {
    /// Name without `RLIMIT_`, lower case.
    pub name: String,
    /// Soft limit.
    pub soft: i64,
    /// Hard limit.
    pub hard: i64,
}

/// Parent cgroup as a path or systemd slice; `None` is the daemon's default.
pub type CgroupParent = Option<String>;

/// Limits of resources (row `llb.md.res`); `None` is unlimited.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct ResourceLimits {
    pub memory: Option<i64>,
    pub memory_swap: Option<i64>,
    pub cpu_shares: Option<u64>,
    pub cpu_period: Option<u64>,
    pub cpu_quota: Option<i64>,
    pub cpuset_cpus: String,
    pub cpuset_mems: String,
}

/// A process to run in a container of its own.
#[derive(Clone, Debug, Default)]
pub struct ProcessSpec {
    /// Unique id of the container: letters, digits and dashes.
    pub id: String,
    /// Group of containers (a build) that may share one shim.
    pub group: String,
    /// Program and arguments.
    pub args: Vec<String>,
    /// Environment, `NAME=value`.
    pub env: Vec<String>,
    /// Working directory; created if absent (the caller has made sure it is inside the root).
    pub cwd: String,
    /// User as written.
    pub user: User,
    /// Host name; empty is `buildkitsandbox`.
    pub hostname: String,
    /// Additional lines of `/etc/hosts`.
    pub extra_hosts: Vec<HostEntry>,
    /// Network.
    pub network: NetworkMode,
    /// The proxy that is all it sees of that network; it has no other way out.
    pub proxy: Option<Proxied>,
    /// Confinement.
    pub security: Security,
    /// Limits by name.
    pub rlimits: Vec<Rlimit>,
    /// Parent cgroup.
    pub cgroup_parent: CgroupParent,
    /// Resource limits.
    pub resources: ResourceLimits,
    /// What its devices change.
    pub edits: Edits,
    /// Whether stdout is a terminal.
    pub tty: bool,
    /// Whether stub files made for mount points are removed afterwards along with parent
    /// directories made for them.
    pub remove_stubs_recursively: bool,
    /// Where the files are noted that the process and its children open, if anybody asks for them:
    /// then it does not start where that cannot be known.
    pub opened: Option<OpenedFiles>,
    /// What must live until nothing is left of the process, also when its future is dropped before
    /// that: its snapshots.
    pub keep_alive: KeepAlive,
    /// By what a later run of the daemon finds the process if this one ends before it; `None` for
    /// one that is of no use then.
    pub resumable: Option<Resumable>,
}

/// What is stored of a process that may go on without the daemon that started it. Nothing in it is
/// secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resumable {
    /// Equal for processes that do the same with the same files, and for no others.
    pub key: Digest,
    /// What the caller needs to go on with it.
    pub note: String,
}

/// A process of an earlier run of the daemon that goes on, or has ended since.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeftProcess {
    /// Id of its container, for [`Executor::resume`] and [`Executor::abandon`].
    pub id: String,
    /// What was stored of it.
    pub stored: Resumable,
    /// When it was started.
    pub started: SystemTime,
    /// Whether it ended while no daemon ran: then nobody read the end of its output.
    pub ended_unseen: bool,
}

/// Files that were opened in a root filesystem, in the order in which they first were: absolute
/// paths as processes in there see them, each once. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct OpenedFiles(Arc<Mutex<Vec<Vec<u8>>>>);

impl OpenedFiles {
    /// Notes the next file.
    pub fn add(&self, path: Vec<u8>) {
        self.0.lock().push(path);
    }

    /// Takes what was noted so far.
    pub fn take(&self) -> Vec<Vec<u8>> {
        std::mem::take(&mut self.0.lock())
    }
}

/// Something that is only held.
#[derive(Clone, Default)]
pub struct KeepAlive(pub Option<Arc<dyn Any + Send + Sync>>);

impl std::fmt::Debug for KeepAlive {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if self.0.is_some() { "held" } else { "nothing" })
    }
}

/// How a process ended.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExitStatus {
    /// Exit code; 128 + n for signal n.
    pub code: u32,
    /// Whether the kernel killed something in the container for want of memory.
    pub oom_killed: bool,
    /// Peak memory in bytes, where the kernel reports it.
    pub peak_memory: Option<u64>,
}

/// Runs processes.
#[async_trait]
pub trait Executor: Send + Sync {
    /// Runs a process to its end and returns how it ended. When the future is dropped, the process
    /// is killed and everything made for it is removed in the background; [`Executor::drained`]
    /// waits for that.
    async fn run(
        &self,
        process: ProcessSpec,
        root: RootFs,
        mounts: Vec<ExecMount>,
        io: ProcessIo,
    ) -> Result<ExitStatus>;

    /// Runs another process in the container whose first process `run` was given as `container`,
    /// which must have started; of `process` only what is the process's own counts. It ends with
    /// the first one at the latest, and with the future.
    async fn exec(
        &self,
        container: &str,
        process: ProcessSpec,
        io: ProcessIo,
    ) -> Result<ExitStatus>;

    /// Ends what is only kept ready for processes to come.
    async fn retire_idle(&self);

    /// Waits until nothing is left of processes whose futures were dropped, nor anything kept ready
    /// for others.
    async fn drained(&self);

    /// Removes containers, tasks and mounts that an earlier run of this daemon left behind, but for
    /// processes that may be resumed. Those go on, with all that they have; each is to be resumed
    /// or abandoned.
    async fn sweep(&self) -> Result<Vec<LeftProcess>>;

    /// Goes on with a process that [`Executor::sweep`] returned, as if it had been run with
    /// `process`, whose id is the one that was returned: its output comes from the beginning, and
    /// dropping the future kills it.
    async fn resume(&self, process: ProcessSpec, output: OutputTarget) -> Result<ExitStatus>;

    /// Kills a process that [`Executor::sweep`] returned, and waits until nothing is left of it.
    async fn abandon(&self, id: &str);

    /// The daemon ends: from now on processes that may be resumed are left as they are when their
    /// futures are dropped.
    fn leave(&self);
}
