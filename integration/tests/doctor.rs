//! `shipway doctor` on a host that has what it takes, and on one whose containerd is gone (row
//! P35).

#![allow(clippy::unwrap_used)]

use shipway_integration::any;
use shipway_testkit::{Finished, Lab};

/// The outcome of what is looked at, with what is said of it.
#[track_caller]
fn of<'a>(report: &'a Finished, what: &str) -> (&'a str, &'a str) {
    let line = report.lines().find_map(|line| {
        let (word, rest) = line.split_once(' ')?;
        let said = rest.trim_start().strip_prefix(what)?;
        (said.is_empty() || said.starts_with(": ")).then_some((word, said))
    });
    line.unwrap_or_else(|| panic!("{what} is not looked at:\n{}", report.all()))
}

#[test]
fn a_host_is_looked_at_and_what_is_missing_is_named_with_advice() {
    let mut lab = Lab::complete(any());
    let config = lab.dir().join("shipwayd.toml").display().to_string();
    let report = lab.shipway(["doctor", "--config", &config]);
    for what in [
        "the configuration",
        "containerd",
        "the snapshotter",
        "the runtime of steps",
        "cgroups",
        "the clock",
        "the socket",
        "a daemon that answers",
    ] {
        assert_eq!(of(&report, what).0, "ok", "{}", report.all());
    }
    let version = lab.flavour().version();
    assert!(
        of(&report, "containerd").1.contains(version.trim_start_matches('v')),
        "{}",
        report.all()
    );

    assert!(lab.stop_daemon(), "the daemon had to be killed");
    lab.kill_containerd();
    let report = lab.shipway(["doctor", "--config", &config]).failed();
    for what in ["containerd", "the socket", "a daemon that answers"] {
        assert_eq!(of(&report, what).0, "missing", "{}", report.all());
    }
    assert!(report.stdout.contains("hint: systemctl status containerd"), "{}", report.all());
    let report = lab.shipway(["doctor", "--rootless"]).failed();
    assert_eq!(of(&report, "shipwayd without root").0, "missing", "{}", report.all());
}
