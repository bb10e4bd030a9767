//! `kill -9` of the daemon, and of containerd, at random points of a build: what follows works,
//! what was cached is used, and nothing is left.

#![allow(clippy::unwrap_used)]

use shipway_integration::{
    any, build, ctr_run, nothing_left, nothing_left_at_the_end, remove_everything,
};
use shipway_testkit::{Lab, wait_for};
use std::{
    path::Path,
    process::{Child, Stdio},
    time::{Duration, Instant, SystemTime},
};

/// A build of about a second and a half: a stable first step, two that change each time, a copy,
/// and an export.
const DOCKERFILE: &str = "FROM busybox AS a\nRUN sleep 0.3; cat /proc/sys/kernel/random/uuid > /stable\nARG ROUND\n\
     RUN sleep 0.3; echo $ROUND > /round; dd if=/dev/urandom of=/noise bs=1M count=4 2>/dev/null\n\
     FROM busybox\nARG ROUND\nCOPY --from=a /stable /round /\nRUN sleep 0.3; echo $ROUND >> /round\nCOPY file /file\n";

fn start(lab: &Lab, context: &Path, round: usize) -> Child {
    let mut command = lab.shipway_command();
    command
        .args([
            "build",
            "--reconnect-timeout",
            "0",
            "--progress",
            "plain",
            "--tag",
            "crash:1",
            "--build-arg",
            &format!("ROUND={round}"),
        ])
        .arg(context);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
}

/// Spreads moments over the length of a build without needing luck: a low-discrepancy sequence,
/// moved by the clock.
fn moment(round: usize, length: Duration) -> Duration {
    let start = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().subsec_nanos()
        as f64
        / 1e9;
    length.mul_f64((round as f64 * 0.618_034 + start * 0.1).fract())
}

fn wait(moment: Duration) {
    let start = Instant::now();
    wait_for("a moment to pass", Duration::from_secs(60), || {
        if start.elapsed() >= moment { Ok(()) } else { Err(String::new()) }
    });
}

#[track_caller]
fn check_image(lab: &Lab, round: usize) -> String {
    let out = ctr_run(lab, "docker.io/library/crash:1", &["cat", "/round", "/file", "/stable"])
        .ok()
        .stdout;
    let mut lines = out.lines();
    let round = round.to_string();
    assert_eq!(
        [lines.next(), lines.next(), lines.next()],
        [Some(&*round), Some(&*round), Some("content")],
        "{out}"
    );
    lines.next().unwrap().to_owned()
}

#[test]
fn twenty_times_the_daemon_is_killed() {
    let mut lab = Lab::complete(any());
    // Steps go on without the daemon, and those that the next build does not want end soon.
    lab.configure_daemon("[system]\n  adoptTimeout = \"5s\"\n");
    let context = lab.context("crash", &[("Dockerfile", DOCKERFILE), ("file", "content\n")]);
    let round = |n: usize| format!("ROUND={n}");
    let mut length = build(&lab, "crash:1", &context, &["--build-arg", &round(0)]).ok().took;
    let stable = check_image(&lab, 0);
    let mut hit = 0;
    for n in 1..=20 {
        let mut client = start(&lab, &context, n);
        let at = moment(n, length);
        wait(at);
        match client.try_wait().unwrap() {
            None => hit += 1,
            // The first build was a cold one, on a machine that may have been busy: this one was
            // over by then.
            Some(_) => length = at,
        }
        lab.kill_daemon();
        client.wait().unwrap();
        lab.start_daemon();
        let again = build(&lab, "crash:1", &context, &["--build-arg", &round(n)]).ok();
        assert_eq!(check_image(&lab, n), stable, "round {n}: the cache was lost:\n{}", again.all());
    }
    assert!(hit >= 5, "only {hit} of 20 kills hit a build");
    let steps = lab.dir().join("shipwayd/executor/run");
    wait_for("steps that no build wanted to end", Duration::from_secs(60), || {
        let steps = std::fs::read_dir(&steps).unwrap().count();
        if steps == 0 { Ok(()) } else { Err(format!("{steps} steps")) }
    });
    remove_everything(&lab);
    nothing_left(&lab);
    nothing_left_at_the_end(&mut lab);
}

#[test]
fn containerd_is_killed_during_builds() {
    let mut lab = Lab::complete(any());
    let context = lab.context("crash", &[("Dockerfile", DOCKERFILE), ("file", "content\n")]);
    let round = |n: usize| format!("ROUND={n}");
    let length = build(&lab, "crash:1", &context, &["--build-arg", &round(0)]).ok().took;
    for n in 1..=6 {
        let client = start(&lab, &context, n);
        wait(moment(n, length));
        lab.kill_containerd();
        lab.start_containerd();
        // A completed build or a clear error, never a hang.
        let began = Instant::now();
        let output = client.wait_with_output().unwrap();
        assert!(began.elapsed() < Duration::from_secs(60), "round {n}: the build hung");
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.success() || text.contains("containerd"),
            "round {n}: no clear error:\n{text}"
        );
        build(&lab, "crash:1", &context, &["--build-arg", &round(n)]).ok();
        check_image(&lab, n);
    }
    remove_everything(&lab);
    nothing_left(&lab);
}
