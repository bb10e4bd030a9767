//! What an administrator installs is right: the sample configuration is understood by the daemon,
//! with every key it only mentions too, and systemd accepts the units.

#![allow(clippy::unwrap_used)]

use shipway_testkit::{built, run, which, workspace};
use std::{fs, process::Command};

const UNITS: &[&str] = &[
    "shipwayd.service",
    "shipwayd.socket",
    "shipway-snapshotter.service",
    "shipway-snapshotter.socket",
    "shipway-snapshotter-keeper.service",
    "shipway-snapshotter-keeper.socket",
];

/// What a systemd before 254 does not know and passes over.
const NEW_KEYS: &[&str] = &["FileDescriptorStorePreserve"];

/// How far the daemon comes with this configuration, where the files are that it names for knowing
/// callers: past it, it looks for containerd and finds none.
#[track_caller]
fn understood(text: &str) {
    let dir = tempfile::tempdir().unwrap();
    let etc = dir.path().join("etc");
    run(Command::new(built("shipway")).args(["certs", "--host", "h"]).arg(&etc)).ok();
    for ca in ["issuer-ca.pem", "kubernetes-ca.pem"] {
        fs::copy(etc.join("daemon/ca.pem"), etc.join(ca)).unwrap();
    }
    fs::write(etc.join("keys.json"), "{\"keys\":[]}").unwrap();
    fs::write(etc.join("kubernetes-token"), "token").unwrap();
    let text = text.replace("\"/etc/shipway/", &format!("\"{}/", etc.display()));
    let config = dir.path().join("shipwayd.toml");
    fs::write(&config, &text).unwrap();
    let mut daemon = Command::new(built("shipwayd"));
    daemon
        .arg("--config")
        .arg(&config)
        .arg("--root")
        .arg(dir.path())
        .args(["--containerd-worker-addr", "/nonexistent/containerd.sock"]);
    daemon.arg("--addr").arg(format!("unix://{}/d.sock", dir.path().display()));
    let done = run(&mut daemon).failed();
    assert!(done.stderr.contains("connect to containerd"), "{}\n{text}", done.stderr);
}

#[test]
fn the_sample_configuration_is_understood() {
    let text = fs::read_to_string(workspace().join("config/shipwayd.toml")).unwrap();
    understood(&text);
    // Keys that are only mentioned are "#key" without a space.
    let uncommented = text.lines().map(|line| {
        let body = line.trim_start();
        match body.strip_prefix('#').filter(|rest| !rest.starts_with(' ') && !rest.is_empty()) {
            Some(key) => key.to_owned(),
            None => line.to_owned(),
        }
    });
    understood(&uncommented.collect::<Vec<_>>().join("\n"));
}

#[test]
fn an_unknown_key_stops_the_daemon_and_names_the_nearest() {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("x.toml");
    fs::write(&config, "[worker.containerd]\nsnapshoter = \"overlayfs\"\n").unwrap();
    let done = run(Command::new(built("shipwayd")).arg("--config").arg(&config)).failed();
    for says in ["snapshoter", "x.toml", "did you mean `snapshotter`?"] {
        assert!(done.stderr.contains(says), "{}", done.stderr);
    }
}

/// Drivers of builders tell daemons by the words of this line: program, package, version, revision
/// (row `fl.version`).
#[test]
fn the_version_of_buildkitd_has_four_words() {
    use std::os::unix::process::CommandExt as _;
    let version = run(Command::new(built("shipwayd")).arg0("/usr/bin/buildkitd").arg("--version"))
        .ok()
        .stdout;
    let words: Vec<&str> = version.split_whitespace().collect();
    let [program, _, number, _] = words[..] else { panic!("{version}") };
    let parts: Vec<Option<u32>> = number
        .trim_start_matches('v')
        .splitn(3, '.')
        .map(|p| p.split('-').next()?.parse().ok())
        .collect();
    assert!(
        program == "buildkitd"
            && number.starts_with('v')
            && parts.len() == 3
            && parts.iter().all(Option::is_some),
        "{version}"
    );
    let help = run(Command::new(built("shipwayd")).arg("--help")).ok().stdout;
    assert!(help.contains("--config") && help.contains("--addr"), "{help}");
}

#[test]
fn systemd_accepts_the_units() {
    let Some(analyze) = which("systemd-analyze") else {
        // `cargo xtask test` lists what is absent.
        eprintln!("systemd-analyze is absent: the units are only read");
        UNITS.iter().for_each(|unit| drop(read_unit(unit)));
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    for unit in UNITS {
        let mut text = read_unit(unit);
        for program in ["shipwayd", "shipway-snapshotter"] {
            text = text
                .replace(&format!("/usr/local/bin/{program}"), built(program).to_str().unwrap());
        }
        fs::write(dir.path().join(unit), text).unwrap();
    }
    // The unit of a containerd that may be installed elsewhere.
    fs::write(dir.path().join("containerd.service"), "[Service]\nExecStart=/bin/true\n").unwrap();
    let units = UNITS.iter().map(|u| dir.path().join(u));
    let done = run(Command::new(analyze).arg("verify").arg("--man=no").args(units));
    let new = |line: &str| {
        line.contains("Unknown key")
            && NEW_KEYS.iter().any(|key| line.contains(&format!("'{key}'")))
    };
    let ours: Vec<_> = done.stderr.lines().filter(|l| l.contains("shipway") && !new(l)).collect();
    assert!(ours.is_empty(), "{}", ours.join("\n"));
}

/// A unit's text, after a look at its shape: sections, and keys with values.
#[track_caller]
fn read_unit(name: &str) -> String {
    let text = fs::read_to_string(workspace().join("systemd").join(name)).unwrap();
    for line in text.lines().filter(|l| !l.is_empty() && !l.starts_with('#')) {
        let section = line.starts_with('[') && line.ends_with(']');
        assert!(
            section || line.split_once('=').is_some_and(|(k, v)| !k.is_empty() && !v.is_empty()),
            "{name}: {line}"
        );
    }
    text
}
