//! The OCI runtime specification (v1.0.2) of a process (rows `exec.*`).
//!
//! [`build`] turns a [`ProcessSpec`] whose user is resolved into what a runtime reads, in the types
//! of `oci-spec` (of which only the runtime's are used). It looks at nothing but its arguments.

mod seccomp;

use crate::{NetworkMode, ProcessSpec, ResourceLimits, Rlimit, Security};
use oci_spec::runtime::{
    self, Capability, Linux, LinuxCapabilities, LinuxCpu, LinuxDevice, LinuxDeviceCgroup,
    LinuxDeviceType, LinuxMemory, LinuxNamespace, LinuxNamespaceType, LinuxResources, Mount,
    PosixRlimit, PosixRlimitBuilder, PosixRlimitType, Process, Root, Spec, User,
};
use shipway_fault::{Fault, Result};
use shipway_gocompat::path::rooted;
use std::{collections::HashMap, path::PathBuf};

/// Version of the specification that is written.
const VERSION: &str = "1.0.2";
/// Root file system within the bundle, where the shim mounts it.
const ROOT: &str = "rootfs";
/// PATH of a process that names none (row `exec.path`).
pub const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Host name of a process that names none (row `exec.hostname`).
pub const DEFAULT_HOSTNAME: &str = "buildkitsandbox";
/// Annotation by which the runc shim groups containers under one shim process.
pub const GROUP_ANNOTATION: &str = "io.containerd.runc.v2.group";

const DEFAULT_CAPS: &[Capability] = &[
    Capability::Chown,
    Capability::DacOverride,
    Capability::Fsetid,
    Capability::Fowner,
    Capability::Mknod,
    Capability::NetRaw,
    Capability::Setgid,
    Capability::Setuid,
    Capability::Setfcap,
    Capability::Setpcap,
    Capability::NetBindService,
    Capability::SysChroot,
    Capability::Kill,
    Capability::AuditWrite,
];

/// Capabilities by number, as the kernel counts them.
const ALL_CAPS: &[Capability] = &[
    Capability::Chown,
    Capability::DacOverride,
    Capability::DacReadSearch,
    Capability::Fowner,
    Capability::Fsetid,
    Capability::Kill,
    Capability::Setgid,
    Capability::Setuid,
    Capability::Setpcap,
    Capability::LinuxImmutable,
    Capability::NetBindService,
    Capability::NetBroadcast,
    Capability::NetAdmin,
    Capability::NetRaw,
    Capability::IpcLock,
    Capability::IpcOwner,
    Capability::SysModule,
    Capability::SysRawio,
    Capability::SysChroot,
    Capability::SysPtrace,
    Capability::SysPacct,
    Capability::SysAdmin,
    Capability::SysBoot,
    Capability::SysNice,
    Capability::SysResource,
    Capability::SysTime,
    Capability::SysTtyConfig,
    Capability::Mknod,
    Capability::Lease,
    Capability::AuditWrite,
    Capability::AuditControl,
    Capability::Setfcap,
    Capability::MacOverride,
    Capability::MacAdmin,
    Capability::Syslog,
    Capability::WakeAlarm,
    Capability::BlockSuspend,
    Capability::AuditRead,
    Capability::Perfmon,
    Capability::Bpf,
    Capability::CheckpointRestore,
];

const MASKED: &[&str] = &[
    "/proc/acpi",
    "/proc/asound",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
    "/sys/devices/virtual/powercap",
];

const READ_ONLY: &[&str] =
    &["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// Devices of the insecure mode beside the runtime's own; each is a character device: path, major,
/// minor.
const INSECURE_DEVICES: &[(&str, i64, i64)] = &[
    ("/dev/kmsg", 1, 11),
    ("/dev/cuse", 10, 203),
    ("/dev/fuse", 10, 229),
    ("/dev/kvm", 10, 232),
    ("/dev/net/tun", 10, 200),
    ("/dev/loop-control", 10, 237),
];
const LOOP_DEVICES: i64 = 8;
const LOOP_MAJOR: i64 = 7;

/// What the host offers, found once by the executor.
#[derive(Clone, Debug)]
pub struct Host {
    /// Machine, in Go's words.
    pub arch: String,
    /// Whether the kernel has seccomp filters.
    pub seccomp: bool,
    /// Whether the host runs cgroup v2 alone.
    pub cgroup2: bool,
    /// The capabilities the daemon may give away, by the kernel's numbers.
    pub caps: u64,
}

/// What the executor decides for a container, beside what its process asks for.
#[derive(Clone, Debug)]
pub struct SpecContext {
    /// Cgroup of the container: a path, or `slice:prefix:name`.
    pub cgroups_path: String,
    /// A network namespace to join; `None` makes a new one, or stays in the host's in
    /// [`NetworkMode::Host`].
    pub netns: Option<String>,
    /// Mounts beside the standard ones, in order; the source of a bind is a host path.
    pub mounts: Vec<Mount>,
    /// Whether the root file system is read-only.
    pub read_only_root: bool,
    /// AppArmor profile, if any.
    pub apparmor: Option<String>,
}

/// A mount at `destination`, an absolute path in the container; `kind` and `options` are those of
/// `mount(2)` and the runtime (`bind`, `tmpfs`; `rbind`, `ro`).
pub fn mount<O: Into<String>>(
    destination: &str,
    kind: &str,
    source: impl Into<PathBuf>,
    options: impl IntoIterator<Item = O>,
) -> Mount {
    let mut mount = Mount::default();
    mount
        .set_destination(destination.into())
        .set_typ(Some(kind.into()))
        .set_source(Some(source.into()))
        .set_options(Some(options.into_iter().map(Into::into).collect()));
    mount
}

/// The user that a process runs as: ids, and all its groups.
pub fn user(uid: u32, gid: u32, groups: Vec<u32>) -> User {
    let mut user = User::default();
    user.set_uid(uid).set_gid(gid).set_additional_gids(Some(groups));
    user
}

fn standard_mounts(insecure: bool) -> Vec<Mount> {
    let sys = if insecure { "rw" } else { "ro" };
    vec![
        mount("/proc", "proc", "proc", ["nosuid", "noexec", "nodev"]),
        mount("/dev", "tmpfs", "tmpfs", ["nosuid", "strictatime", "mode=755", "size=65536k"]),
        mount(
            "/dev/pts",
            "devpts",
            "devpts",
            ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
        ),
        mount(
            "/dev/shm",
            "tmpfs",
            "shm",
            ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"],
        ),
        mount("/dev/mqueue", "mqueue", "mqueue", ["nosuid", "noexec", "nodev"]),
        mount("/sys", "sysfs", "sysfs", ["nosuid", "noexec", "nodev", sys]),
        mount("/sys/fs/cgroup", "cgroup", "cgroup", [sys, "nosuid", "noexec", "nodev"]),
    ]
}

/// Later mounts of the same destination replace earlier ones; parents come before children (row
/// `exec.mnt.order`).
fn mounts<'a>(insecure: bool, extra: impl IntoIterator<Item = &'a Mount>) -> Vec<Mount> {
    let mut all = standard_mounts(insecure);
    for mount in extra {
        let destination = PathBuf::from(rooted(&mount.destination().to_string_lossy()));
        all.retain(|m| *m.destination() != destination);
        let mut mount = mount.clone();
        mount.set_destination(destination);
        all.push(mount);
    }
    // Stable: among mounts of one depth the given order stays, and a mount under /dev or /sys comes
    // after it.
    all.sort_by_key(|m| m.destination().components().count());
    all
}

fn capabilities(security: Security, held: u64) -> LinuxCapabilities {
    let set = |caps: &[Capability]| Some(caps.iter().copied().collect());
    let mut sets = LinuxCapabilities::default();
    match security {
        Security::Sandbox => {
            sets.set_bounding(set(DEFAULT_CAPS))
                .set_permitted(set(DEFAULT_CAPS))
                .set_effective(set(DEFAULT_CAPS))
                .set_inheritable(None)
                .set_ambient(None);
        }
        Security::Insecure => {
            let all = ALL_CAPS.iter().enumerate().filter(|(n, _)| held >> n & 1 == 1);
            let all: Vec<Capability> = all.map(|(_, c)| *c).collect();
            sets.set_bounding(set(&all))
                .set_permitted(set(&all))
                .set_effective(set(&all))
                .set_inheritable(set(&all))
                .set_ambient(set(&all));
        }
    }
    sets
}

fn device_rule(allow: bool, kind: Option<LinuxDeviceType>) -> LinuxDeviceCgroup {
    let mut rule = LinuxDeviceCgroup::default();
    rule.set_allow(allow).set_typ(kind).set_access(Some("rwm".into()));
    rule
}

fn resources(limits: &ResourceLimits, insecure: bool) -> LinuxResources {
    let devices = if insecure {
        vec![
            device_rule(true, Some(LinuxDeviceType::C)),
            device_rule(true, Some(LinuxDeviceType::B)),
        ]
    } else {
        vec![device_rule(false, None)]
    };
    let text = |text: &String| Some(text.clone()).filter(|t| !t.is_empty());
    let (mut memory, mut cpu) = (LinuxMemory::default(), LinuxCpu::default());
    memory.set_limit(limits.memory).set_swap(limits.memory_swap);
    cpu.set_shares(limits.cpu_shares)
        .set_quota(limits.cpu_quota)
        .set_period(limits.cpu_period)
        .set_cpus(text(&limits.cpuset_cpus))
        .set_mems(text(&limits.cpuset_mems));
    let mut resources = LinuxResources::default();
    resources
        .set_devices(Some(devices))
        .set_memory(Some(memory).filter(|m| *m != LinuxMemory::default()))
        .set_cpu(Some(cpu).filter(|c| *c != LinuxCpu::default()));
    resources
}

fn namespace(kind: LinuxNamespaceType, path: Option<&String>) -> LinuxNamespace {
    let mut namespace = LinuxNamespace::default();
    namespace.set_typ(kind).set_path(path.map(PathBuf::from));
    namespace
}

fn namespaces(network: &NetworkMode, ctx: &SpecContext, host: &Host) -> Vec<LinuxNamespace> {
    use LinuxNamespaceType::{Cgroup, Ipc, Mount, Network, Pid, Uts};
    let mut all: Vec<LinuxNamespace> =
        [Pid, Ipc, Uts, Mount].map(|kind| namespace(kind, None)).into();
    if ctx.netns.is_some() || *network != NetworkMode::Host {
        all.push(namespace(Network, ctx.netns.as_ref()));
    }
    if host.cgroup2 {
        all.push(namespace(Cgroup, None));
    }
    all
}

fn rlimit(limit: &Rlimit) -> Result<PosixRlimit> {
    let kind = format!("RLIMIT_{}", limit.name.to_uppercase()).parse::<PosixRlimitType>();
    let kind =
        kind.map_err(|_| Fault::invalid(format!("{:?} is not a resource limit", limit.name)))?;
    // A negative limit is "unlimited", which the kernel spells as all ones.
    let limit =
        PosixRlimitBuilder::default().typ(kind).soft(limit.soft as u64).hard(limit.hard as u64);
    limit.build().map_err(|e| Fault::internal(format!("specify a resource limit: {e}")))
}

/// The part of the specification that is about the process itself, run as `user`.
///
/// # Errors
///
/// `InvalidArgument` for a resource limit that does not exist.
pub fn process(
    spec: &ProcessSpec,
    user: &User,
    apparmor: Option<&str>,
    host: &Host,
) -> Result<Process> {
    let mut env = spec.env.clone();
    if !env.iter().any(|e| e.starts_with("PATH=")) {
        env.push(format!("PATH={DEFAULT_PATH}"));
    }
    let rlimits = spec.rlimits.iter().map(rlimit).collect::<Result<Vec<_>>>()?;
    let apparmor = apparmor.filter(|_| spec.security == Security::Sandbox);
    let mut process = Process::default();
    process
        .set_terminal(Some(spec.tty))
        .set_user(user.clone())
        .set_args(Some(spec.args.clone()))
        .set_env(Some(env))
        .set_cwd(rooted(&spec.cwd).into())
        .set_capabilities(Some(capabilities(spec.security, host.caps)))
        .set_no_new_privileges(Some(false))
        .set_rlimits(Some(rlimits).filter(|all| !all.is_empty()))
        .set_apparmor_profile(apparmor.map(str::to_owned));
    Ok(process)
}

fn device(path: String, kind: LinuxDeviceType, major: i64, minor: i64) -> LinuxDevice {
    let mut device = LinuxDevice::default();
    device.set_path(path.into()).set_typ(kind).set_major(major).set_minor(minor);
    device
}

fn linux(spec: &ProcessSpec, ctx: &SpecContext, host: &Host) -> Linux {
    let insecure = spec.security == Security::Insecure;
    let paths = |paths: &[&str]| {
        let paths = if insecure { &[] } else { paths };
        Some(paths.iter().map(|p| (*p).to_owned()).collect())
    };
    let devices = insecure.then(|| {
        let one = INSECURE_DEVICES.iter().map(|(path, major, minor)| {
            device((*path).to_owned(), LinuxDeviceType::C, *major, *minor)
        });
        let loops = (0..LOOP_DEVICES)
            .map(|i| device(format!("/dev/loop{i}"), LinuxDeviceType::B, LOOP_MAJOR, i));
        one.chain(loops).collect()
    });
    let filtered = host.seccomp && !insecure;
    let mut linux = Linux::default();
    linux
        .set_cgroups_path(Some(PathBuf::from(&ctx.cgroups_path)))
        .set_namespaces(Some(namespaces(&spec.network, ctx, host)))
        .set_resources(Some(resources(&spec.resources, insecure)))
        .set_masked_paths(paths(MASKED))
        .set_readonly_paths(paths(READ_ONLY))
        .set_devices(devices)
        .set_seccomp(filtered.then(|| seccomp::profile(&host.arch, DEFAULT_CAPS)));
    linux
}

/// The runtime specification of `spec`, run as `user`.
///
/// # Errors
///
/// As [`process`].
pub fn build(spec: &ProcessSpec, user: &User, ctx: &SpecContext, host: &Host) -> Result<Spec> {
    let insecure = spec.security == Security::Insecure;
    let mut annotations = HashMap::new();
    if !spec.group.is_empty() {
        annotations.insert(GROUP_ANNOTATION.into(), spec.group.clone());
    }
    let hostname = if spec.hostname.is_empty() { DEFAULT_HOSTNAME } else { &spec.hostname };
    let mut process = process(spec, user, ctx.apparmor.as_deref(), host)?;
    let mut linux = linux(spec, ctx, host);
    spec.edits.apply_to_process(&mut process);
    spec.edits.apply_to_linux(&mut linux, user);
    let mut root = Root::default();
    root.set_path(ROOT.into()).set_readonly(Some(ctx.read_only_root));
    let mut whole = Spec::default();
    whole
        .set_version(VERSION.into())
        .set_process(Some(process))
        .set_root(Some(root))
        .set_hostname(Some(hostname.into()))
        .set_mounts(Some(mounts(insecure, ctx.mounts.iter().chain(&spec.edits.mounts))))
        .set_linux(Some(linux))
        .set_annotations(Some(annotations))
        .set_hooks(spec.edits.hooks());
    Ok(whole)
}

/// The specification of a container in the cgroup `cgroups_path` that holds a shim of `group` and
/// whose process is never started.
pub fn keeper(group: &str, cgroups_path: &str) -> Spec {
    use LinuxNamespaceType::{Ipc, Mount, Network, Pid, Uts};
    let (mut process, mut linux) = (Process::default(), Linux::default());
    let (mut root, mut proc) = (Root::default(), runtime::Mount::default());
    // A runtime looks its program up before it waits for the start; its own binary is always there.
    process
        .set_terminal(None)
        .set_user(User::default())
        .set_args(Some(vec!["/proc/self/exe".into()]))
        .set_env(None)
        .set_cwd("/".into())
        .set_capabilities(None)
        .set_no_new_privileges(None)
        .set_rlimits(None);
    linux
        .set_cgroups_path(Some(cgroups_path.into()))
        .set_namespaces(Some([Pid, Mount, Ipc, Uts, Network].map(|n| namespace(n, None)).into()))
        .set_resources(None)
        .set_masked_paths(None)
        .set_readonly_paths(None);
    root.set_path(ROOT.into()).set_readonly(None);
    proc.set_destination("/proc".into())
        .set_typ(Some("proc".into()))
        .set_source(Some("proc".into()));
    let mut whole = Spec::default();
    whole
        .set_version(VERSION.into())
        .set_process(Some(process))
        .set_root(Some(root))
        .set_hostname(None)
        .set_mounts(Some(vec![proc]))
        .set_linux(Some(linux))
        .set_annotations(Some([(GROUP_ANNOTATION.to_owned(), group.to_owned())].into()));
    whole
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host() -> Host {
        Host { arch: "amd64".into(), seccomp: true, cgroup2: true, caps: u64::MAX }
    }

    fn context() -> SpecContext {
        SpecContext {
            cgroups_path: "/b/x".into(),
            netns: None,
            mounts: vec![],
            read_only_root: false,
            apparmor: None,
        }
    }

    fn base() -> ProcessSpec {
        ProcessSpec {
            id: "x".into(),
            group: "g".into(),
            args: vec!["/bin/true".into()],
            cwd: "/w/../v".into(),
            ..Default::default()
        }
    }

    fn built(spec: &ProcessSpec, ctx: &SpecContext) -> (Spec, Process, Linux) {
        let spec = build(spec, &User::default(), ctx, &host()).expect("a specification");
        let (process, linux) = (spec.process().clone(), spec.linux().clone());
        (spec, process.expect("a process"), linux.expect("a part for Linux"))
    }

    #[test]
    fn a_sandboxed_process_has_the_defaults() {
        let (spec, process, linux) = built(&base(), &context());
        assert_eq!(process.cwd().as_os_str(), "/v");
        assert_eq!(process.env(), &Some(vec![format!("PATH={DEFAULT_PATH}")]));
        assert_eq!(spec.hostname().as_deref(), Some(DEFAULT_HOSTNAME));
        let annotations = spec.annotations().as_ref().expect("annotations");
        assert_eq!(annotations[GROUP_ANNOTATION], "g");
        assert!(process.rlimits().is_none());
        assert!(linux.seccomp().is_some());
        use LinuxNamespaceType::{Cgroup, Ipc, Mount, Network, Pid, Uts};
        let kinds: Vec<_> = linux.namespaces().iter().flatten().map(LinuxNamespace::typ).collect();
        assert_eq!(kinds, [Pid, Ipc, Uts, Mount, Network, Cgroup]);
    }

    #[test]
    fn an_insecure_process_on_the_hosts_network_has_everything() {
        let spec = ProcessSpec {
            security: Security::Insecure,
            network: NetworkMode::Host,
            rlimits: vec![Rlimit { name: "nofile".into(), soft: 10, hard: -1 }],
            ..base()
        };
        let (_, process, linux) = built(&spec, &context());
        assert!(linux.seccomp().is_none());
        assert_eq!(linux.masked_paths(), &Some(vec![]));
        let ambient = process.capabilities().as_ref().and_then(|c| c.ambient().as_ref());
        assert_eq!(ambient.map(|a| a.len()), Some(41));
        let [limit] = process.rlimits().as_deref().expect("limits") else { panic!("one limit") };
        assert_eq!(
            (limit.typ(), limit.soft(), limit.hard()),
            (PosixRlimitType::RlimitNofile, 10, u64::MAX)
        );
        let mut kinds = linux.namespaces().iter().flatten().map(LinuxNamespace::typ);
        assert!(kinds.all(|n| n != LinuxNamespaceType::Network));
    }

    #[test]
    fn a_limit_that_does_not_exist_is_refused() {
        let rlimits = vec![Rlimit { name: "files".into(), soft: 1, hard: 1 }];
        let spec = ProcessSpec { rlimits, ..base() };
        let fault = build(&spec, &User::default(), &context(), &host()).expect_err("refused");
        assert_eq!(fault.to_string(), "\"files\" is not a resource limit");
    }

    #[test]
    fn the_last_mount_of_a_place_wins_and_parents_come_first() {
        let tmpfs = |target: &str, size: &str| mount(target, "tmpfs", "tmpfs", [size]);
        let ctx = SpecContext {
            mounts: vec![
                tmpfs("/a/b", "size=1"),
                tmpfs("/a", "size=2"),
                tmpfs("/a/b/", "size=3"),
                tmpfs("/dev/shm", "size=9"),
            ],
            ..context()
        };
        let (spec, ..) = built(&base(), &ctx);
        let list: Vec<(String, String)> = spec
            .mounts()
            .iter()
            .flatten()
            .map(|m| (m.destination().display().to_string(), m.options().iter().flatten().next()))
            .map(|(at, option)| (at, option.cloned().unwrap_or_default()))
            .collect();
        let place = |t: &str| list.iter().position(|(d, _)| d == t).unwrap_or(usize::MAX);
        assert!(place("/a") < place("/a/b"));
        assert_eq!(
            list.iter()
                .filter(|(d, _)| d == "/a/b" || d == "/dev/shm")
                .map(|(_, o)| o.as_str())
                .collect::<Vec<_>>(),
            ["size=3", "size=9"]
        );
    }
}
