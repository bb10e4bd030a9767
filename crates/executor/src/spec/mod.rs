//! The OCI runtime specification (v1.0.2) of a process (rows `exec.*`).
//!
//! [`build`] turns a [`ProcessSpec`] whose user is resolved into the JSON that a runtime reads. It
//! looks at nothing but its arguments.

mod seccomp;

use crate::{Identity, NetworkMode, ProcessSpec, ResourceLimits, Security};
use serde_json::{Map, Value, json};
use shipway_gocompat::path::rooted;
use shipway_storage::Mount;

/// PATH of a process that names none (row `exec.path`).
pub const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Host name of a process that names none (row `exec.hostname`).
pub const DEFAULT_HOSTNAME: &str = "buildkitsandbox";
/// Annotation by which the runc shim groups containers under one shim process.
pub const GROUP_ANNOTATION: &str = "io.containerd.runc.v2.group";

const DEFAULT_CAPS: &[&str] = &[
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FSETID",
    "CAP_FOWNER",
    "CAP_MKNOD",
    "CAP_NET_RAW",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETFCAP",
    "CAP_SETPCAP",
    "CAP_NET_BIND_SERVICE",
    "CAP_SYS_CHROOT",
    "CAP_KILL",
    "CAP_AUDIT_WRITE",
];

/// Capabilities by number, as the kernel counts them.
const ALL_CAPS: &[&str] = &[
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETPCAP",
    "CAP_LINUX_IMMUTABLE",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST",
    "CAP_NET_ADMIN",
    "CAP_NET_RAW",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_SYS_MODULE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_CHROOT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_PACCT",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_NICE",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_MKNOD",
    "CAP_LEASE",
    "CAP_AUDIT_WRITE",
    "CAP_AUDIT_CONTROL",
    "CAP_SETFCAP",
    "CAP_MAC_OVERRIDE",
    "CAP_MAC_ADMIN",
    "CAP_SYSLOG",
    "CAP_WAKE_ALARM",
    "CAP_BLOCK_SUSPEND",
    "CAP_AUDIT_READ",
    "CAP_PERFMON",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
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

/// Devices of the insecure mode beside the runtime's own: path, kind, major, minor.
const INSECURE_DEVICES: &[(&str, &str, i64, i64)] = &[
    ("/dev/kmsg", "c", 1, 11),
    ("/dev/cuse", "c", 10, 203),
    ("/dev/fuse", "c", 10, 229),
    ("/dev/kvm", "c", 10, 232),
    ("/dev/net/tun", "c", 10, 200),
    ("/dev/loop-control", "c", 10, 237),
];
const LOOP_DEVICES: i64 = 8;

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

/// What surrounds the process: decided by the executor.
#[derive(Clone, Debug)]
pub struct Surroundings {
    /// Cgroup of the container: a path, or `slice:prefix:name`.
    pub cgroups_path: String,
    /// A network namespace to join; `None` makes a new one, or stays in the host's in
    /// [`NetworkMode::Host`].
    pub netns: Option<String>,
    /// Mounts beside the standard ones, in order; the source of a bind is a host path.
    pub mounts: Vec<SpecMount>,
    /// Whether the root file system is read-only.
    pub read_only_root: bool,
    /// AppArmor profile, if any.
    pub apparmor: Option<String>,
}

/// A mount and where it goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SpecMount {
    /// Absolute path in the container.
    pub target: String,
    /// The mount.
    pub mount: Mount,
}

/// A mount in the runtime's words.
fn mount(target: &str, kind: &str, source: &str, options: &[&str]) -> Value {
    json!({ "destination": target, "type": kind, "source": source, "options": options })
}

fn standard_mounts(insecure: bool) -> Vec<Value> {
    let sys = if insecure { "rw" } else { "ro" };
    vec![
        mount("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"]),
        mount("/dev", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
        mount(
            "/dev/pts",
            "devpts",
            "devpts",
            &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
        ),
        mount(
            "/dev/shm",
            "tmpfs",
            "shm",
            &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"],
        ),
        mount("/dev/mqueue", "mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
        mount("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", sys]),
        mount("/sys/fs/cgroup", "cgroup", "cgroup", &[sys, "nosuid", "noexec", "nodev"]),
    ]
}

/// Later mounts of the same place replace earlier ones; parents come before children (row
/// `exec.mnt.order`).
fn mounts(insecure: bool, extra: &[SpecMount]) -> Vec<Value> {
    let mut all = standard_mounts(insecure);
    for m in extra {
        let place = rooted(&m.target);
        all.retain(|v| v["destination"] != place.as_str());
        let options: Vec<&str> = m.mount.options.iter().map(String::as_str).collect();
        all.push(mount(&place, &m.mount.kind, &m.mount.source, &options));
    }
    let depth = |v: &Value| {
        v["destination"].as_str().map_or(0, |d| d.split('/').filter(|c| !c.is_empty()).count())
    };
    // Stable: among mounts of one depth the given order stays, and a mount under /dev or /sys comes
    // after it.
    all.sort_by_key(depth);
    all
}

fn capabilities(security: Security, held: u64) -> Value {
    match security {
        Security::Sandbox => {
            json!({ "bounding": DEFAULT_CAPS, "permitted": DEFAULT_CAPS, "effective": DEFAULT_CAPS })
        }
        Security::Insecure => {
            let all: Vec<&str> = ALL_CAPS
                .iter()
                .enumerate()
                .filter(|(n, _)| held >> n & 1 == 1)
                .map(|(_, c)| *c)
                .collect();
            json!({ "bounding": all, "permitted": all, "effective": all, "inheritable": all, "ambient": all })
        }
    }
}

fn resources(limits: &ResourceLimits, insecure: bool) -> Value {
    let mut r = Map::new();
    r.insert(
        "devices".into(),
        if insecure {
            json!([{ "allow": true, "type": "c", "access": "rwm" }, { "allow": true, "type": "b", "access": "rwm" }])
        } else {
            json!([{ "allow": false, "access": "rwm" }])
        },
    );
    let mut memory = Map::new();
    let mut cpu = Map::new();
    limits.memory.map(|v| memory.insert("limit".into(), json!(v)));
    limits.memory_swap.map(|v| memory.insert("swap".into(), json!(v)));
    limits.cpu_shares.map(|v| cpu.insert("shares".into(), json!(v)));
    limits.cpu_quota.map(|v| cpu.insert("quota".into(), json!(v)));
    limits.cpu_period.map(|v| cpu.insert("period".into(), json!(v)));
    for (name, value) in [("cpus", &limits.cpuset_cpus), ("mems", &limits.cpuset_mems)] {
        if !value.is_empty() {
            cpu.insert(name.into(), json!(value));
        }
    }
    if !memory.is_empty() {
        r.insert("memory".into(), Value::Object(memory));
    }
    if !cpu.is_empty() {
        r.insert("cpu".into(), Value::Object(cpu));
    }
    Value::Object(r)
}

fn namespaces(network: NetworkMode, around: &Surroundings, host: &Host) -> Vec<Value> {
    let mut all: Vec<Value> =
        ["pid", "ipc", "uts", "mount"].iter().map(|n| json!({ "type": n })).collect();
    match (&around.netns, network) {
        (Some(path), _) => all.push(json!({ "type": "network", "path": path })),
        (None, NetworkMode::Host) => {}
        (None, _) => all.push(json!({ "type": "network" })),
    }
    if host.cgroup2 {
        all.push(json!({ "type": "cgroup" }));
    }
    all
}

/// The part of the specification that is about the process itself, run as `who`.
pub fn process(spec: &ProcessSpec, who: &Identity, apparmor: Option<&str>, host: &Host) -> Value {
    let mut env = spec.env.clone();
    if !env.iter().any(|e| e.starts_with("PATH=")) {
        env.push(format!("PATH={DEFAULT_PATH}"));
    }
    let cwd = rooted(&spec.cwd);
    let mut p = json!({
        "terminal": spec.tty,
        "user": { "uid": who.uid, "gid": who.gid, "additionalGids": who.groups },
        "args": spec.args,
        "env": env,
        "cwd": cwd,
        "capabilities": capabilities(spec.security, host.caps),
        "noNewPrivileges": false,
    });
    if !spec.rlimits.is_empty() {
        let limits: Vec<Value> = spec
            .rlimits
            .iter()
            // A negative limit is "unlimited", which the kernel spells as all ones.
            .map(|l| json!({ "type": format!("RLIMIT_{}", l.name.to_uppercase()), "soft": l.soft as u64, "hard": l.hard as u64 }))
            .collect();
        p["rlimits"] = json!(limits);
    }
    if let (Some(profile), Security::Sandbox) = (apparmor, spec.security) {
        p["apparmorProfile"] = json!(profile);
    }
    p
}

/// The runtime specification of `spec`, run as `who`.
pub fn build(spec: &ProcessSpec, who: &Identity, around: &Surroundings, host: &Host) -> Value {
    let insecure = spec.security == Security::Insecure;
    let mut linux = json!({
        "cgroupsPath": around.cgroups_path,
        "namespaces": namespaces(spec.network, around, host),
        "resources": resources(&spec.resources, insecure),
        "maskedPaths": if insecure { &[] } else { MASKED },
        "readonlyPaths": if insecure { &[] } else { READ_ONLY },
    });
    if insecure {
        let mut devices: Vec<Value> = INSECURE_DEVICES
            .iter()
            .map(|(path, kind, major, minor)| json!({ "path": path, "type": kind, "major": major, "minor": minor }))
            .collect();
        devices.extend((0..LOOP_DEVICES).map(
            |i| json!({ "path": format!("/dev/loop{i}"), "type": "b", "major": 7, "minor": i }),
        ));
        linux["devices"] = json!(devices);
    } else if host.seccomp {
        linux["seccomp"] = seccomp::profile(&host.arch, DEFAULT_CAPS);
    }
    let mut annotations = Map::new();
    if !spec.group.is_empty() {
        annotations.insert(GROUP_ANNOTATION.into(), json!(spec.group));
    }
    let extra: Vec<SpecMount> = around.mounts.iter().chain(&spec.edits.mounts).cloned().collect();
    let mut whole = json!({
        "ociVersion": "1.0.2",
        "process": process(spec, who, around.apparmor.as_deref(), host),
        "root": { "path": "rootfs", "readonly": around.read_only_root },
        "hostname": if spec.hostname.is_empty() { DEFAULT_HOSTNAME } else { &spec.hostname },
        "mounts": mounts(insecure, &extra),
        "linux": linux,
        "annotations": annotations,
    });
    spec.edits.apply(&mut whole, who);
    whole
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Rlimit;

    fn host() -> Host {
        Host { arch: "amd64".into(), seccomp: true, cgroup2: true, caps: u64::MAX }
    }

    fn around() -> Surroundings {
        Surroundings {
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

    #[test]
    fn a_sandboxed_process_has_the_defaults() {
        let v = build(&base(), &Identity::default(), &around(), &host());
        assert_eq!(v["process"]["cwd"], "/v");
        assert_eq!(v["process"]["env"][0], format!("PATH={DEFAULT_PATH}"));
        assert_eq!(v["hostname"], DEFAULT_HOSTNAME);
        assert_eq!(v["annotations"][GROUP_ANNOTATION], "g");
        assert!(v["process"].get("rlimits").is_none());
        assert!(v["linux"]["seccomp"].is_object());
        let kinds: Vec<&str> = v["linux"]["namespaces"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|n| n["type"].as_str())
            .collect();
        assert_eq!(kinds, ["pid", "ipc", "uts", "mount", "network", "cgroup"]);
    }

    #[test]
    fn an_insecure_process_on_the_hosts_network_has_everything() {
        let spec = ProcessSpec {
            security: Security::Insecure,
            network: NetworkMode::Host,
            rlimits: vec![Rlimit { name: "nofile".into(), soft: 10, hard: -1 }],
            ..base()
        };
        let v = build(&spec, &Identity::default(), &around(), &host());
        assert!(v["linux"].get("seccomp").is_none());
        assert_eq!(v["linux"]["maskedPaths"], json!([]));
        assert_eq!(v["process"]["capabilities"]["ambient"].as_array().map(Vec::len), Some(41));
        assert_eq!(
            v["process"]["rlimits"][0],
            json!({ "type": "RLIMIT_NOFILE", "soft": 10, "hard": u64::MAX })
        );
        assert!(!v["linux"]["namespaces"].to_string().contains("network"));
    }

    #[test]
    fn the_last_mount_of_a_place_wins_and_parents_come_first() {
        let tmpfs = |target: &str, size: &str| SpecMount {
            target: target.into(),
            mount: Mount {
                kind: "tmpfs".into(),
                source: "tmpfs".into(),
                target: String::new(),
                options: vec![size.into()],
            },
        };
        let a = Surroundings {
            mounts: vec![
                tmpfs("/a/b", "size=1"),
                tmpfs("/a", "size=2"),
                tmpfs("/a/b/", "size=3"),
                tmpfs("/dev/shm", "size=9"),
            ],
            ..around()
        };
        let v = build(&base(), &Identity::default(), &a, &host());
        let list: Vec<(String, String)> = v["mounts"]
            .as_array()
            .into_iter()
            .flatten()
            .map(|m| {
                (
                    m["destination"].as_str().unwrap_or_default().into(),
                    m["options"][0].as_str().unwrap_or_default().into(),
                )
            })
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
