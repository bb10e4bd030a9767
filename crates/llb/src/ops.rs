//! The operations in plain types (section 2 of the feature inventory). Field for field what the wire carries, with `Option`
//! where the wire has a negative index, and nothing that belongs to running them.

use bytes::Bytes;
use std::collections::BTreeMap;

/// What a vertex does.
// One per vertex, never in bulk: the size of the largest does not matter.
#[allow(clippy::large_enum_variant)]
#[derive(Clone, Debug, PartialEq)]
pub enum Op {
    /// Row `op.source`.
    Source(SourceOp),
    /// Row `op.exec`.
    Exec(ExecOp),
    /// Row `op.file`.
    File(FileOp),
    /// Row `op.merge`: indexes of the inputs, lowest first.
    Merge(MergeOp),
    /// Row `op.diff`.
    Diff(DiffOp),
    /// Row `op.build`.
    Build(BuildOp),
    /// Row `op.passthrough`.
    Passthrough(PassthroughOp),
}

/// A filesystem from outside: identifier with scheme, and attributes (names in [`crate::attr`]).
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SourceOp {
    /// Such as `docker-image://docker.io/library/busybox:latest`.
    pub identifier: String,
    /// Attributes.
    pub attrs: BTreeMap<String, String>,
}

impl SourceOp {
    /// Scheme and the rest of the identifier; `None` when there is no `://`.
    pub fn scheme(&self) -> Option<(&str, &str)> {
        self.identifier.split_once("://")
    }
}

/// A process over mounts (section 2.3).
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ExecOp {
    /// The process.
    pub meta: ExecMeta,
    /// Its mounts; one has the destination `/`.
    pub mounts: Vec<Mount>,
    /// Row `exec.net`.
    pub network: NetMode,
    /// Row `exec.sec`.
    pub security: SecurityMode,
    /// Row `exec.secretenv`.
    pub secret_env: Vec<SecretEnv>,
    /// Row `exec.cdi`.
    pub devices: Vec<CdiDevice>,
    /// Whether it sees its network through a proxy only (row `exec.proxynet`). Not on the wire: the
    /// build says so, not the definition.
    pub proxied: bool,
}

/// The process of an [`ExecOp`].
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ExecMeta {
    /// Arguments, at least one.
    pub args: Vec<String>,
    /// Environment, as `NAME=value`.
    pub env: Vec<String>,
    /// Working directory.
    pub cwd: String,
    /// User, or user:group, by name or number; empty for root.
    pub user: String,
    /// Row `exec.proxyenv`: not part of the cache key.
    pub proxy: Option<ProxyEnv>,
    /// Row `exec.hosts`.
    pub extra_hosts: Vec<HostIp>,
    /// Row `exec.hostname`; empty for the default.
    pub hostname: String,
    /// Row `exec.ulimit`.
    pub ulimits: Vec<Ulimit>,
    /// Row `exec.cgroupparent`.
    pub cgroup_parent: String,
    /// Row `exec.cleanstubs`: also remove the parents made for mount points.
    pub remove_mount_stubs_recursive: bool,
    /// Row `exec.validexit`; empty means only 0.
    pub valid_exit_codes: Vec<i32>,
}

/// Proxy settings, given to the process in both cases of the names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct ProxyEnv {
    pub http: String,
    pub https: String,
    pub ftp: String,
    pub no: String,
    pub all: String,
}

/// A line for `/etc/hosts`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct HostIp {
    pub host: String,
    pub ip: String,
}

/// A resource limit.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Ulimit {
    pub name: String,
    pub soft: i64,
    pub hard: i64,
}

/// A variable that gets a secret of the session.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct SecretEnv {
    pub id: String,
    pub name: String,
    pub optional: bool,
}

/// A CDI device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct CdiDevice {
    pub name: String,
    pub optional: bool,
}

/// Network of a process (row `exec.net`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum NetMode {
    /// The worker's sandbox network.
    #[default]
    Unset,
    /// The host's; needs an entitlement.
    Host,
    /// Loopback only.
    None,
}

/// Confinement of a process (row `exec.sec`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum SecurityMode {
    /// Confined.
    #[default]
    Sandbox,
    /// Privileged; needs an entitlement.
    Insecure,
}

/// A mount of a process (rows `exec.mnt.*`).
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Mount {
    /// Index of the vertex's input; `None` is scratch.
    pub input: Option<usize>,
    /// Path inside the input; empty for all of it.
    pub selector: String,
    /// Where it appears.
    pub dest: String,
    /// Index of the vertex's output; `None` throws writes away.
    pub output: Option<usize>,
    /// Whether it may not be written to.
    pub readonly: bool,
    /// What it is.
    pub kind: MountKind,
    /// Row `exec.mnt.contentcache`.
    pub content_cache: ContentCache,
    /// Identity of a mount's result (gateway containers).
    pub result_id: String,
}

/// What a mount is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum MountKind {
    /// An input, or scratch.
    #[default]
    Bind,
    /// Row `exec.mnt.secret`.
    Secret(SecretMount),
    /// Row `exec.mnt.ssh`.
    Ssh(SshMount),
    /// Row `exec.mnt.cache`.
    Cache(CacheMount),
    /// Row `exec.mnt.tmpfs`: size limit in bytes, 0 for none.
    Tmpfs {
        /// Limit.
        size: i64,
    },
}

/// A file with a secret.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct SecretMount {
    pub id: String,
    pub uid: u32,
    pub gid: u32,
    pub mode: u32,
    pub optional: bool,
}

/// A socket of an SSH agent.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct SshMount {
    pub id: String,
    pub uid: u32,
    pub gid: u32,
    pub mode: u32,
    pub optional: bool,
}

/// A directory kept between builds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CacheMount {
    /// Identity; empty means the destination.
    pub id: String,
    /// Who may use it at once.
    pub sharing: CacheSharing,
}

/// Row `exec.mnt.cache.share`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum CacheSharing {
    /// Everybody.
    #[default]
    Shared,
    /// A new one when busy.
    Private,
    /// One after the other.
    Locked,
}

/// Whether a mount's content may be hashed for the cache key.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum ContentCache {
    #[default]
    Default,
    On,
    Off,
}

/// Ordered file actions (section 2.4).
#[derive(Clone, Debug, Default, PartialEq)]
pub struct FileOp {
    /// At least one.
    pub actions: Vec<FileAction>,
}

/// One action. Indexes below the number of inputs name inputs, higher ones the results of actions (row `file.idx`).
#[derive(Clone, Debug, PartialEq)]
pub struct FileAction {
    /// What it changes; `None` is scratch.
    pub input: Option<usize>,
    /// What it copies from; `None` is scratch.
    pub secondary: Option<usize>,
    /// Output of the vertex that its result is, if any.
    pub output: Option<usize>,
    /// What it does.
    pub kind: FileActionKind,
}

/// What a file action does.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)]
pub enum FileActionKind {
    Copy(FileCopy),
    Mkfile(FileMkfile),
    Mkdir(FileMkdir),
    Rm(FileRm),
    Symlink(FileSymlink),
}

/// Rows `file.copy*`.
#[derive(Clone, Debug, Default, PartialEq)]
#[allow(missing_docs)]
pub struct FileCopy {
    pub src: String,
    pub dest: String,
    pub owner: Option<Chown>,
    /// Permission bits; `None` keeps the source's.
    pub mode: Option<u32>,
    /// Symbolic mode; wins over `mode` when not empty.
    pub mode_str: String,
    pub follow_symlink: bool,
    pub dir_copy_contents: bool,
    pub attempt_unpack: bool,
    pub create_dest_path: bool,
    pub allow_wildcard: bool,
    pub allow_empty_wildcard: bool,
    /// Nanoseconds since the epoch; `None` keeps the source's time.
    pub timestamp: Option<i64>,
    pub include_patterns: Vec<String>,
    pub exclude_patterns: Vec<String>,
    pub always_replace_existing_dest_paths: bool,
    pub required_paths: Vec<String>,
}

/// Row `file.mkfile`.
#[derive(Clone, Debug, Default, PartialEq)]
#[allow(missing_docs)]
pub struct FileMkfile {
    pub path: String,
    pub mode: u32,
    pub data: Bytes,
    pub owner: Option<Chown>,
    /// Nanoseconds since the epoch; `None` is now.
    pub timestamp: Option<i64>,
}

/// Row `file.mkdir`.
#[derive(Clone, Debug, Default, PartialEq)]
#[allow(missing_docs)]
pub struct FileMkdir {
    pub path: String,
    pub mode: u32,
    pub make_parents: bool,
    pub owner: Option<Chown>,
    /// Nanoseconds since the epoch; `None` is now.
    pub timestamp: Option<i64>,
}

/// Row `file.rm`.
#[derive(Clone, Debug, Default, PartialEq)]
#[allow(missing_docs)]
pub struct FileRm {
    pub path: String,
    pub allow_not_found: bool,
    pub allow_wildcard: bool,
}

/// Row `file.symlink`: `newpath` points to `oldpath`.
#[derive(Clone, Debug, Default, PartialEq)]
#[allow(missing_docs)]
pub struct FileSymlink {
    pub oldpath: String,
    pub newpath: String,
    pub owner: Option<Chown>,
    /// Nanoseconds since the epoch; `None` is now.
    pub timestamp: Option<i64>,
}

/// Owner of made files (row `file.owner`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Chown {
    pub user: Option<Owner>,
    pub group: Option<Owner>,
}

/// A user or group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Owner {
    /// By number.
    Id(u32),
    /// By name, looked up in an input's `/etc/passwd` or `/etc/group`; `None` is scratch.
    Name {
        /// The name.
        name: String,
        /// Where to look.
        input: Option<usize>,
    },
}

/// Row `op.merge`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MergeOp {
    /// Indexes of the inputs, lowest first; `None` is scratch.
    pub inputs: Vec<Option<usize>>,
}

/// Row `op.diff`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct DiffOp {
    pub lower: Option<usize>,
    pub upper: Option<usize>,
}

/// Row `op.build`.
#[derive(Clone, Debug, Default, PartialEq)]
#[allow(missing_docs)]
pub struct BuildOp {
    /// Index of the input that holds the builder; `None` is LLB itself.
    pub builder: Option<usize>,
    pub inputs: BTreeMap<String, Option<usize>>,
    /// Encoded definition, when it is given inline.
    pub definition: Option<Bytes>,
    pub attrs: BTreeMap<String, String>,
}

/// Row `op.passthrough`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct PassthroughOp {
    pub id: String,
    /// Input shown as each output.
    pub outputs: Vec<usize>,
}
