//! Specifications as runtimes get them, field by field: `specs.json` was written before they were
//! made of types.

#![allow(clippy::unwrap_used)]

use oci_spec::runtime::{LinuxIntelRdt, User};
use serde_json::Value;
use shipway_executor::{
    DeviceNode, Edits, Hook, HookPoint, NetworkMode, ProcessSpec, ResourceLimits, Rlimit, Security,
    spec::{self, Host, SpecContext, mount},
};

fn host(arch: &str) -> Host {
    Host { arch: arch.into(), seccomp: true, cgroup2: true, caps: u64::MAX }
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

fn process() -> ProcessSpec {
    ProcessSpec {
        id: "x".into(),
        group: "g".into(),
        args: vec!["/bin/true".into(), "a b".into()],
        env: vec!["A=1".into()],
        cwd: "/w/../v".into(),
        ..Default::default()
    }
}

fn root() -> User {
    spec::user(0, 0, vec![])
}

fn user() -> User {
    spec::user(7, 8, vec![8, 9])
}

fn node(path: &str, kind: &str, mode: Option<u32>) -> DeviceNode {
    DeviceNode {
        path: path.into(),
        kind: kind.parse().unwrap(),
        major: 1,
        minor: 3,
        mode,
        uid: mode,
        gid: None,
        access: "rw".into(),
    }
}

fn rdt() -> LinuxIntelRdt {
    let mut rdt = LinuxIntelRdt::default();
    rdt.set_clos_id(Some("x".into()))
        .set_schemata(Some(vec!["L3:0=f".into()]))
        .set_enable_monitoring(Some(true));
    rdt
}

fn edits() -> Edits {
    let hook = |when: &str, timeout| Hook {
        when: HookPoint::of(when).unwrap(),
        path: "/h".into(),
        args: vec!["h".into()],
        env: vec!["H=1".into()],
        timeout,
    };
    Edits {
        env: vec!["A=2".into(), "AB=3".into()],
        nodes: vec![
            node("/dev/n", "c", Some(0o600)),
            node("/dev/b", "b", None),
            node("/p", "p", None),
            node("/dev/n", "c", None),
        ],
        interfaces: vec![("ib0".into(), "eth9".into())],
        hooks: [
            "prestart",
            "createRuntime",
            "createContainer",
            "startContainer",
            "poststart",
            "poststop",
        ]
        .map(|when| hook(when, None))
        .into_iter()
        .chain([hook("prestart", Some(5))])
        .collect(),
        rdt: Some(rdt()),
        groups: vec![0, 44, 8, 44],
        mounts: vec![
            mount("/cdi", "bind", "/host/cdi", ["ro", "rbind"]),
            mount("/none", "", "", [""; 0]),
        ],
    }
}

/// Capabilities are a set.
fn sorted(mut spec: Value) -> Value {
    let process = if spec["process"].is_object() { &mut spec["process"] } else { &mut spec };
    for set in process["capabilities"].as_object_mut().into_iter().flatten() {
        set.1.as_array_mut().unwrap().sort_by_key(Value::to_string);
    }
    spec
}

fn build(spec: &ProcessSpec, user: &User, context: &SpecContext, host: &Host) -> Value {
    sorted(serde_json::to_value(spec::build(spec, user, context, host).unwrap()).unwrap())
}

fn cases() -> Vec<(&'static str, Value)> {
    let limits = vec![
        Rlimit { name: "nofile".into(), soft: 10, hard: -1 },
        Rlimit { name: "as".into(), soft: 1 << 40, hard: 1 << 40 },
    ];
    let insecure = ProcessSpec {
        security: Security::Insecure,
        network: NetworkMode::Host,
        rlimits: limits,
        hostname: "name".into(),
        group: String::new(),
        env: vec!["PATH=/bin".into()],
        tty: true,
        ..process()
    };
    let limited = ProcessSpec {
        resources: ResourceLimits {
            memory: Some(1 << 30),
            memory_swap: Some(-1),
            cpu_shares: Some(512),
            cpu_period: Some(100_000),
            cpu_quota: Some(50_000),
            cpuset_cpus: "0-1".into(),
            cpuset_mems: "0".into(),
        },
        edits: edits(),
        network: NetworkMode::None,
        ..process()
    };
    let crowded = SpecContext {
        netns: Some("/run/netns/a".into()),
        mounts: vec![
            mount("/a/b", "tmpfs", "tmpfs", ["size=1"]),
            mount("/a", "overlay", "overlay", ["lowerdir=/l", "upperdir=/u", "workdir=/w", "rw"]),
            mount("/a/b/", "tmpfs", "tmpfs", ["nosuid", "size=3"]),
            mount("/dev/shm", "tmpfs", "tmpfs", ["size=9"]),
            mount("/etc/hosts", "bind", "/run/hosts", ["nosuid", "noexec", "nodev", "rbind", "ro"]),
        ],
        read_only_root: true,
        apparmor: Some("profile".into()),
        ..context()
    };
    let old = Host { seccomp: false, cgroup2: false, caps: 0b1011, ..host("amd64") };
    let edited = ProcessSpec { edits: edits(), ..insecure.clone() };
    let joined = spec::process(&limited, &user(), Some("profile"), &host("amd64"));
    vec![
        ("sandbox", build(&process(), &root(), &context(), &host("amd64"))),
        ("arm64", build(&process(), &user(), &context(), &host("arm64"))),
        ("s390x", build(&process(), &user(), &context(), &host("s390x"))),
        ("insecure", build(&insecure, &user(), &crowded, &host("amd64"))),
        ("insecure on an old host", build(&insecure, &user(), &context(), &old)),
        ("insecure with devices", build(&edited, &user(), &context(), &host("amd64"))),
        ("limited", build(&limited, &user(), &crowded, &old)),
        ("limited as root", build(&limited, &root(), &context(), &host("amd64"))),
        ("keeper", serde_json::to_value(spec::keeper("g", "/c")).unwrap()),
        ("joined", sorted(serde_json::to_value(joined.unwrap()).unwrap())),
    ]
}

#[test]
fn specifications_have_every_field_that_they_had() {
    let expected: Value = serde_json::from_str(include_str!("specs.json")).unwrap();
    let cases = cases();
    assert_eq!(cases.len(), expected.as_object().unwrap().len());
    for (name, spec) in cases {
        assert_eq!(spec, expected[name], "{name}");
    }
}
