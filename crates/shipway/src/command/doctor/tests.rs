use std::os::unix::fs::PermissionsExt as _;

use super::*;

/// A host with these files, seen by the user ann.
pub(super) fn host(files: &[(&str, &str)]) -> (tempfile::TempDir, Host) {
    let dir = tempfile::tempdir().unwrap();
    let user = User { name: "ann".into(), uid: 1000, groups: vec![1000] };
    let host = Host { root: dir.path().to_owned(), user };
    for (path, text) in files {
        let path = host.path(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }
    (dir, host)
}

fn engine(version: Result<&str>) -> Engine {
    Engine {
        version: version.map(str::to_owned),
        namespaces: vec!["default".into(), "k8s.io".into()],
        snapshotters: vec!["native".into(), "overlayfs".into()],
        snapshots: None,
    }
}

fn config(text: &str) -> Config {
    toml::from_str(text).unwrap()
}

fn hints(found: &Found) -> String {
    match found {
        Found::Ok(_) => String::new(),
        Found::Note(fault) | Found::Missing(fault) => fault.hints().collect::<Vec<_>>().join("\n"),
    }
}

#[track_caller]
fn check(found: &Found, word: &str, says: &str, hint: &str) {
    let (is, said) = found.said();
    assert!(is == word && said.contains(says), "{found:?}, not {word} {says:?}");
    assert!(hints(found).contains(hint), "{found:?} does not advise {hint:?}");
}

#[test]
fn containerd_is_there_and_new_enough() {
    let silent = || engine(Err(failed("connect to containerd: no such file")));
    let config = config("");
    let (_dir, bare) = host(&[]);
    check(&bare.containerd(&config, &silent()), "missing", "connect", "apt install containerd");
    let (_dir, stopped) = host(&[("/usr/bin/containerd", "")]);
    check(&stopped.containerd(&config, &silent()), "missing", "connect", "systemctl start");
    let (_dir, closed) = host(&[("/run/containerd/containerd.sock", "")]);
    check(&closed.containerd(&config, &silent()), "missing", "connect", "sudo");
    for (version, word, hint) in [
        ("1.6.20~ds1", "ok", ""),
        ("v2.1.9", "ok", ""),
        ("1.5.9", "missing", "1.6 or newer"),
        ("unknown", "note", "1.6 or newer"),
    ] {
        check(&bare.containerd(&config, &engine(Ok(version))), word, version, hint);
    }
}

#[test]
fn what_the_configuration_names_is_looked_for() {
    let there = engine(Ok("2.0.0"));
    check(&namespace(&config(""), &there), "ok", "default", "");
    let moby = config("[worker.containerd]\nnamespace = 'moby'\nsnapshotter = 'shipway'\n");
    check(&namespace(&moby, &there), "note", "k8s.io", "dockerd");
    check(&snapshotter(&config(""), &there), "ok", "overlayfs", "");
    check(&snapshotter(&moby, &there), "missing", "shipway", "shipway-snapshotter setup");
    let zfs = config("[worker.containerd]\nsnapshotter = 'zfs'\n");
    check(&snapshotter(&zfs, &there), "missing", "zfs", "native, overlayfs");
    check(&snapshotter(&zfs, &engine(Err(failed("x")))), "note", "nothing is known", "containerd");
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("x.toml");
    assert!(Config::load(&file).is_ok());
    std::fs::write(&file, "worker = 1").unwrap();
    assert!(Config::load(&file).unwrap_err().to_string().contains("x.toml"));
}

#[test]
fn steps_need_a_shim_and_a_runtime() {
    let shim = ("/usr/bin/containerd-shim-runc-v2", "");
    let (_dir, none) = host(&[]);
    check(&none.runtime().into(), "missing", "containerd-shim-runc-v2", "apt install containerd");
    let (_dir, half) = host(&[shim]);
    check(&half.runtime().into(), "missing", "no runc", "apt install runc");
    let (_dir, all) = host(&[shim, ("/usr/sbin/runc", "")]);
    check(&all.runtime().into(), "ok", "/usr/sbin/runc", "");
}

#[test]
fn cgroups_are_of_a_version_or_not_there() {
    const TWO: &str = "/sys/fs/cgroup/cgroup.controllers";
    for (files, word, says, hint) in [
        (&[(TWO, "cpuset cpu io memory pids\n")][..], "ok", "version 2", ""),
        (&[(TWO, "cpu pids\n")], "note", "without memory", "cgroup_enable"),
        (&[("/sys/fs/cgroup/memory/tasks", "")], "ok", "version 1", ""),
        (&[], "missing", "none are mounted", "mount -t cgroup2"),
    ] {
        check(&host(files).1.cgroups(), word, says, hint);
    }
}

#[test]
fn a_network_is_configured_and_has_its_programs() {
    let network = |files: &[(&str, &str)], text: &str| {
        host(files).1.network(&config(&format!("[worker.containerd]\n{text}")).worker.containerd)
    };
    let list = ("/etc/buildkit/cni.json", "{}");
    check(&network(&[], "networkMode = 'host'"), "ok", "host", "");
    check(&network(&[], ""), "note", "the host's", "bridge");
    check(&network(&[], "networkMode = 'cni'"), "missing", "cni.json", "cniConfigPath");
    check(&network(&[list], ""), "missing", "/opt/cni/bin", "containernetworking-plugins");
    let debian = ("/usr/lib/cni/bridge", "");
    check(&network(&[list, debian], ""), "missing", "/opt/cni/bin", "/usr/lib/cni");
    check(&network(&[list, debian], "cniBinaryPath = '/usr/lib/cni'"), "ok", "/usr/lib/cni", "");
    let bridge = "networkMode = 'bridge'\ncniBinaryPath = '/usr/lib/cni'";
    check(&network(&[debian], bridge), "missing", "host-local, loopback", "");
}

#[test]
fn a_resolver_is_one_that_steps_reach() {
    let at = |text: &'static str| ("/etc/resolv.conf", text);
    let resolved = ("/run/systemd/resolve/resolv.conf", "nameserver 192.0.2.1\n");
    let (_dir, far) = host(&[at("search x\nnameserver 192.0.2.9\n")]);
    check(&far.resolver(), "ok", "192.0.2.9", "");
    let (_dir, stub) = host(&[at("nameserver 127.0.0.53\n"), resolved]);
    check(&stub.resolver(), "ok", "192.0.2.1, by systemd-resolved", "");
    let (_dir, local) = host(&[at("nameserver 127.0.0.1\n")]);
    check(&local.resolver(), "note", "127.0.0.1", "[dns]");
    check(&host(&[]).1.resolver(), "note", "no server", "[dns]");
}

#[test]
fn emulators_are_found_in_images_by_a_flag() {
    let at = "/proc/sys/fs/binfmt_misc/qemu-aarch64";
    let entry = |text: &'static str| host(&[(at, text)]).1.emulators();
    check(&entry("enabled\ninterpreter /x\nflags: OCF\n"), "ok", "aarch64", "");
    check(&entry("enabled\ninterpreter /x\nflags: OC\n"), "note", "aarch64", "flags: F");
    check(&entry("disabled\nflags: F\n"), "note", "none", "qemu-user-static");
    check(&host(&[]).1.emulators(), "note", "none", "qemu-user-static");
}

#[test]
fn a_user_is_let_in_by_the_group_of_the_socket() {
    let (_dir, mut host) = host(&[("/s", ""), ("/etc/group", "root:x:0:\nshipway:x:77:ann\n")]);
    let socket = Path::new("/s");
    let set = |host: &Host, gid: u32, mode: u32| {
        let path = host.path(socket);
        std::os::unix::fs::chown(&path, Some(0), Some(gid)).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
    };
    set(&host, 77, 0o660);
    check(&host.socket(socket), "missing", "ann may not", "usermod -aG shipway ann");
    host.user.groups.push(77);
    check(&host.socket(socket), "ok", "group shipway", "");
    set(&host, 0, 0o660);
    check(&host.socket(socket), "missing", "ann may not", "SocketGroup=");
    set(&host, 0, 0o666);
    check(&host.socket(socket), "note", "everybody", "SocketMode");
    host.user.uid = 0;
    set(&host, 0, 0o600);
    check(&host.socket(socket), "ok", "root", "");
    check(&host.socket(Path::new("/none")), "missing", "/none", "shipwayd.socket");
}

#[test]
fn everything_is_looked_at_with_nothing_there() {
    let (_dir, host) = host(&[]);
    let silent = engine(Err(failed("connect to containerd: no such file")));
    let checks = host.checks(&config(""), &silent);
    let (text, well) = doctor::report(&checks);
    assert!(!well, "{text}");
    for check in checks.iter().chain(&rootless::checks(&host)) {
        let (word, _) = check.found.said();
        assert!(word == "ok" || !hints(&check.found).is_empty(), "{check:?} has no advice");
    }
}
