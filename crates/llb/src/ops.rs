//! The operations in plain types (rows `op.*`). Field for field what the wire carries, with
//! `Option` where the wire has a negative index, and nothing that belongs to running them.

use bytes::Bytes;
use shipway_oci::NetworkName;
use std::collections::BTreeMap;

/// What a vertex does.
// One per vertex, never in bulk: the size of the largest does not matter.
#[allow(clippy::large_enum_variant)]
#[derive(Clone, Debug, PartialEq)]
pub enum Op {
    /// Fetches a filesystem from outside (row `op.source`).
    Source(SourceOp),
    /// Runs a process over mounts (row `op.exec`).
    Exec(ExecOp),
    /// Makes, copies and removes files without running a process (row `op.file`).
    File(FileOp),
    /// Stacks its inputs (row `op.merge`).
    Merge(MergeOp),
    /// Gives what one input changes in another (row `op.diff`).
    Diff(DiffOp),
    /// Builds the definition that a file of an input holds (row `op.build`).
    Build(BuildOp),
    /// Gives some inputs as they are; the others only have to succeed (row `op.passthrough`).
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

/// A process over mounts (rows `exec.*`).
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ExecOp {
    /// The process.
    pub meta: ExecMeta,
    /// Its mounts; one has the destination `/`.
    pub mounts: Vec<Mount>,
    /// Network that the process is on (row `exec.net`).
    pub network: NetMode,
    /// The daemon's network of that name, instead of the default one (row `exec.net.named`). On the
    /// wire it is one of the operation's worker constraints ([`NetworkName::constraint`]).
    pub named_network: Option<NetworkName>,
    /// How far the process is confined (row `exec.sec`).
    pub security: SecurityMode,
    /// Variables whose values are secrets of the session; not part of the cache key (row
    /// `exec.secretenv`).
    pub secret_env: Vec<SecretEnv>,
    /// Devices of the host that the process sees (row `exec.cdi`).
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
    /// Proxy variables of the process; not part of the cache key (row `exec.proxyenv`).
    pub proxy: Option<ProxyEnv>,
    /// Hosts to add to `/etc/hosts`; their addresses are not part of the cache key (row
    /// `exec.hosts`).
    pub extra_hosts: Vec<HostIp>,
    /// Host name inside; empty for the default (row `exec.hostname`).
    pub hostname: String,
    /// Limits of the process; those of the runtime where none is named (row `exec.ulimit`).
    pub ulimits: Vec<Ulimit>,
    /// Cgroup below which the process gets its own: a path, or a systemd slice; empty for the
    /// configured one (row `exec.cgroupparent`).
    pub cgroup_parent: String,
    /// Whether parents that were made for mount points are removed as well, not only the mount
    /// points (row `exec.cleanstubs`).
    pub remove_mount_stubs_recursive: bool,
    /// Exit codes that count as success; empty means only 0 (row `exec.validexit`).
    pub valid_exit_codes: Vec<i32>,
}

/// Proxy settings, given to the process in both cases of the names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ProxyEnv {
    /// `HTTP_PROXY`.
    pub http: String,
    /// `HTTPS_PROXY`.
    pub https: String,
    /// `FTP_PROXY`.
    pub ftp: String,
    /// `NO_PROXY`.
    pub no: String,
    /// `ALL_PROXY`.
    pub all: String,
}

/// A line for `/etc/hosts`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostIp {
    /// Name.
    pub host: String,
    /// Address.
    pub ip: String,
}

/// A resource limit.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ulimit {
    /// Name, such as `nofile`.
    pub name: String,
    /// What counts until the process raises it; -1 for no limit.
    pub soft: i64,
    /// How far it may be raised; -1 for no limit.
    pub hard: i64,
}

/// A variable that gets a secret of the session.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SecretEnv {
    /// Id of the secret.
    pub id: String,
    /// Name of the variable.
    pub name: String,
    /// Whether it is empty, instead of an error, where the session has no such secret.
    pub optional: bool,
}

/// A CDI device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CdiDevice {
    /// Name, such as `vendor.com/class=device`.
    pub name: String,
    /// Whether the step runs without it where the host has none.
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
    /// Whether the cache key may depend on the input's content instead of its definition (row
    /// `exec.mnt.contentcache`).
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
    /// A secret of the session as a file in memory (row `exec.mnt.secret`).
    Secret(SecretMount),
    /// A socket that leads to an SSH agent of the session (row `exec.mnt.ssh`).
    Ssh(SshMount),
    /// A directory that outlives the build, copied from the input when it is new (row
    /// `exec.mnt.cache`).
    Cache(CacheMount),
    /// A directory in memory (row `exec.mnt.tmpfs`).
    Tmpfs {
        /// Limit in bytes; 0 for none.
        size: i64,
    },
}

/// A file with a secret.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SecretMount {
    /// Id of the secret.
    pub id: String,
    /// User that owns the file.
    pub uid: u32,
    /// Group that owns the file.
    pub gid: u32,
    /// Permission bits.
    pub mode: u32,
    /// Whether there is no file, instead of an error, where the session has no such secret.
    pub optional: bool,
}

/// A socket of an SSH agent.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SshMount {
    /// Id of the agent.
    pub id: String,
    /// User that owns the socket.
    pub uid: u32,
    /// Group that owns the socket.
    pub gid: u32,
    /// Permission bits.
    pub mode: u32,
    /// Whether there is no socket, instead of an error, where the session has no such agent.
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

/// Who may use a cache mount at once (row `exec.mnt.cache.share`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum CacheSharing {
    /// All steps at once.
    #[default]
    Shared,
    /// A new one when busy.
    Private,
    /// One after the other.
    Locked,
}

/// Whether a mount's content may be hashed for the cache key.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum ContentCache {
    /// Where that is safe.
    #[default]
    Default,
    /// Also where the builder would not do it by itself.
    On,
    /// Never.
    Off,
}

/// File actions, done in the order in which they need each other (rows `file.*`).
#[derive(Clone, Debug, Default, PartialEq)]
pub struct FileOp {
    /// At least one.
    pub actions: Vec<FileAction>,
}

/// One action. Indexes below the number of inputs name inputs, higher ones the results of actions
/// (row `file.idx`).
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
pub enum FileActionKind {
    /// Copies files from another state.
    Copy(FileCopy),
    /// Writes a file.
    Mkfile(FileMkfile),
    /// Makes a directory.
    Mkdir(FileMkdir),
    /// Removes files.
    Rm(FileRm),
    /// Makes a symbolic link.
    Symlink(FileSymlink),
}

/// A copy of files from one state into another (rows `file.copy*`).
#[derive(Clone, Debug, Default, PartialEq)]
pub struct FileCopy {
    /// Path in the state that is copied from.
    pub src: String,
    /// Path in the state that is changed; with a `/` at the end, a directory to copy into.
    pub dest: String,
    /// Owner of everything that is copied; `None` keeps the source's.
    pub owner: Option<Chown>,
    /// Permission bits; `None` keeps the source's.
    pub mode: Option<u32>,
    /// Symbolic mode; wins over `mode` when not empty.
    pub mode_str: String,
    /// Whether a link at the end of `src` is followed instead of copied.
    pub follow_symlink: bool,
    /// Whether a directory's contents are copied instead of the directory.
    pub dir_copy_contents: bool,
    /// Whether archives are unpacked instead of copied.
    pub attempt_unpack: bool,
    /// Whether directories above `dest` are made.
    pub create_dest_path: bool,
    /// Whether `src` may have wildcards.
    pub allow_wildcard: bool,
    /// Whether wildcards may match nothing.
    pub allow_empty_wildcard: bool,
    /// Nanoseconds since the epoch; `None` keeps the source's time.
    pub timestamp: Option<i64>,
    /// Patterns below `src` of what is copied; empty for everything.
    pub include_patterns: Vec<String>,
    /// Patterns below `src` of what is not copied.
    pub exclude_patterns: Vec<String>,
    /// Whether what is in the way at `dest` is removed, also a directory where a file goes.
    pub always_replace_existing_dest_paths: bool,
    /// Paths below `src` that must be there and be copied.
    pub required_paths: Vec<String>,
}

/// A file to write; one that is there is overwritten (row `file.mkfile`).
#[derive(Clone, Debug, Default, PartialEq)]
pub struct FileMkfile {
    /// Where.
    pub path: String,
    /// Permission bits of a new file.
    pub mode: u32,
    /// Contents.
    pub data: Bytes,
    /// Owner; `None` is root.
    pub owner: Option<Chown>,
    /// Nanoseconds since the epoch; `None` is now.
    pub timestamp: Option<i64>,
}

/// A directory to make; one that is there stays as it is (row `file.mkdir`).
#[derive(Clone, Debug, Default, PartialEq)]
pub struct FileMkdir {
    /// Where.
    pub path: String,
    /// Permission bits of what is made.
    pub mode: u32,
    /// Whether directories above it are made too.
    pub make_parents: bool,
    /// Owner; `None` is root.
    pub owner: Option<Chown>,
    /// Nanoseconds since the epoch; `None` is now.
    pub timestamp: Option<i64>,
}

/// Files to remove; a link is removed itself (row `file.rm`).
#[derive(Clone, Debug, Default, PartialEq)]
pub struct FileRm {
    /// What to remove.
    pub path: String,
    /// Whether it may be absent.
    pub allow_not_found: bool,
    /// Whether `path` may have wildcards.
    pub allow_wildcard: bool,
}

/// A symbolic link to make (row `file.symlink`).
#[derive(Clone, Debug, Default, PartialEq)]
pub struct FileSymlink {
    /// What it points to, as it is written into the link.
    pub oldpath: String,
    /// Where it is.
    pub newpath: String,
    /// Owner; `None` is root.
    pub owner: Option<Chown>,
    /// Nanoseconds since the epoch; `None` is now.
    pub timestamp: Option<i64>,
}

/// Owner of files that are made or copied (row `file.owner`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Chown {
    /// User; `None` is root.
    pub user: Option<Owner>,
    /// Group; `None` is the user's own, which for a number is the same number.
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

/// A stack of inputs (row `op.merge`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MergeOp {
    /// Indexes of the inputs, lowest first; `None` is scratch.
    pub inputs: Vec<Option<usize>>,
}

/// What one input changes in another (row `op.diff`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DiffOp {
    /// Index of the input to compare with; `None` is scratch.
    pub lower: Option<usize>,
    /// Index of the input that has the changes; `None` is scratch.
    pub upper: Option<usize>,
}

/// A definition to build that another vertex made (row `op.build`).
#[derive(Clone, Debug, Default, PartialEq)]
pub struct BuildOp {
    /// Index of the input that holds the builder; `None` is LLB itself.
    pub builder: Option<usize>,
    /// Indexes of inputs by name; `buildkit.llb.definition` holds the definition.
    pub inputs: BTreeMap<String, Option<usize>>,
    /// Encoded definition, when it is given inline.
    pub definition: Option<Bytes>,
    /// Attributes; `llbbuild.filename` names the file of the definition.
    pub attrs: BTreeMap<String, String>,
}

/// Inputs that are given on as they are (row `op.passthrough`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PassthroughOp {
    /// What the vertex is called.
    pub id: String,
    /// Input shown as each output.
    pub outputs: Vec<usize>,
}
