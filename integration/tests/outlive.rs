//! Steps that go on while their daemon is killed, stopped, upgraded (row `dp.outlive`).

#![allow(clippy::unwrap_used)]

use crate::drain::{Gate, answer, open};
use rustix::process::Signal;
use shipway_integration::{
    any, build, ctr_run, nothing_left, nothing_left_at_the_end, on_each, remove_everything,
};
use shipway_testkit::{BaseImage, Flavour, Lab, wait_for};
use std::{
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

/// Much longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(60);

/// A lab with `settings` of the daemon, whose steps are on the host's network.
fn lab(flavour: Flavour, settings: &str) -> Lab {
    let mut lab = Lab::on(flavour);
    lab.configure_worker("networkMode = \"host\"\n");
    lab.configure_daemon(&format!("[system]\n  drainTimeout = \"0s\"\n{settings}"));
    lab.start_registry();
    BaseImage::busybox().push(&lab.registry(), "library/busybox", "latest");
    lab.start_daemon();
    lab
}

fn command(lab: &Lab, tag: &str, context: &Path, more: &[&str]) -> Command {
    let mut command = lab.shipway_command();
    command.args(["build", "--progress", "plain", "--tag", tag]).args(more).arg(context);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    command
}

/// A client that sends its build again when the daemon is back.
fn start(lab: &Lab, tag: &str, context: &Path) -> Child {
    command(lab, tag, context, &[]).spawn().unwrap()
}

/// A client that does not.
fn start_once(lab: &Lab, tag: &str, context: &Path) -> Child {
    command(lab, tag, context, &["--reconnect-timeout", "0"]).spawn().unwrap()
}

#[track_caller]
fn succeeds(client: Child) -> String {
    let output = client.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{said}");
    said
}

#[track_caller]
fn fails(client: Child) {
    let output = client.wait_with_output().unwrap();
    assert!(!output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// Waits until the daemon has logged `text` for the `times`th time in the lab's life.
#[track_caller]
fn logged(lab: &Lab, text: &str, times: usize) {
    wait_for(&format!("{text:?} in the log"), PATIENCE, || {
        let log = std::fs::read_to_string(lab.dir().join("shipwayd.log")).unwrap_or_default();
        let found = log.matches(text).count();
        if found >= times { Ok(()) } else { Err(format!("{found} times")) }
    });
}

/// What is logged when a build gets a step of an earlier run.
const GOES_ON: &str = "a step goes on";

/// Steps of the lab, not the keepers of their shims, and how they are.
fn steps(lab: &Lab) -> Vec<String> {
    let listed = lab.ctr(["tasks", "list"]).ok();
    let steps = listed.lines().skip(1).filter(|l| !l.contains("-keeper"));
    steps.map(|l| l.split_whitespace().last().unwrap_or_default().to_owned()).collect()
}

/// Waits until the only step is `how`.
#[track_caller]
fn step_is(lab: &Lab, how: &str) {
    wait_for(&format!("a step that is {how}"), PATIENCE, || {
        let steps = steps(lab);
        if steps == [how] { Ok(()) } else { Err(format!("{steps:?}")) }
    });
}

/// How often a line is in the log of the last build.
fn times(log: &str, line: &str) -> usize {
    log.lines().filter(|l| l.split_whitespace().last() == Some(line)).count()
}

/// The paths in what `context` builds, and what `/count` says.
fn result(lab: &Lab, context: &Path, more: &[&str]) -> (String, String) {
    let tar = lab.dir().join("result.tar");
    let to = format!("type=tar,dest={}", tar.display());
    let (context, mut arguments) = (context.to_string_lossy(), vec!["build", "--output", &to]);
    arguments.extend(more);
    arguments.push(&context);
    lab.shipway(arguments).ok();
    let list = |arguments: &[&str]| {
        let mut command = Command::new("tar");
        shipway_testkit::run(command.arg("-f").arg(&tar).args(arguments)).ok().stdout
    };
    (list(&["-t", "-v", "--full-time"]), list(&["-x", "-O", "count"]))
}

/// Without what differs between two runs of a step: times.
fn without_times(list: &str) -> Vec<String> {
    let line = |l: &str| {
        let words: Vec<&str> = l.split_whitespace().collect();
        words
            .iter()
            .enumerate()
            .filter(|(n, _)| !(3..5).contains(n))
            .map(|(_, w)| *w)
            .collect::<Vec<_>>()
            .join(" ")
    };
    list.lines().map(line).collect()
}

#[test]
fn a_step_goes_on_while_its_daemon_is_killed_twice() {
    on_each(|flavour| {
        let mut lab = lab(flavour, "");
        let gate = Gate::new();
        let text = format!(
            "FROM busybox\nRUN --mount=type=cache,target=/c,sharing=locked --mount=type=bind,from=busybox,target=/m \
             echo first; echo x >> /count; echo x >> /c/n; wget -q -O /one {}; echo second; \
             wget -q -O /two {}; echo third >&2; echo y >> /count; cat /c/n > /n\n",
            gate.url("/one"),
            gate.url("/two")
        );
        let context = lab.context("outlived", &[("Dockerfile", &*text)]);
        let client = start(&lab, "outlived:1", &context);
        let one = gate.await_step("/one");
        wait_for("what the step said to be kept", PATIENCE, || {
            let kept = of_executor(&lab, "run").into_iter().map(|dir| dir.join("output"));
            let kept =
                kept.filter_map(|file| std::fs::read(file).ok()).collect::<Vec<_>>().concat();
            let kept = String::from_utf8_lossy(&kept).into_owned();
            if kept.contains("first") { Ok(()) } else { Err(kept) }
        });
        lab.kill_daemon();
        // It says something and asks the next thing while there is no daemon.
        open(one);
        let two = gate.await_step("/two");
        lab.start_daemon();
        logged(&lab, GOES_ON, 1);
        lab.kill_daemon();
        lab.start_daemon();
        logged(&lab, GOES_ON, 2);
        open(two);
        let said = succeeds(client);
        assert!(times(&said, "third") == 1, "{said}");
        gate.is_quiet();
        let log = lab.shipway(["history", "logs"]).ok().all();
        for line in ["first", "second", "third"] {
            assert_eq!(times(&log, line), 1, "{line}: {log}");
        }
        let shown = ctr_run(&lab, "docker.io/library/outlived:1", &["cat", "/count", "/n"]).ok();
        assert_eq!(shown.stdout, "x\ny\nx\n");
        // It is in the cache, and is what it would have been without interruption.
        let (outlived, count) = result(&lab, &context, &[]);
        gate.is_quiet();
        let uninterrupted = std::thread::scope(|scope| {
            let whole = scope.spawn(|| result(&lab, &context, &["--no-cache"]));
            open(gate.await_step("/one"));
            open(gate.await_step("/two"));
            whole.join().unwrap()
        });
        assert_eq!(without_times(&outlived), without_times(&uninterrupted.0));
        assert_eq!(count, uninterrupted.1);
        remove_everything(&lab);
        nothing_left(&lab);
        assert!(lab.stop_daemon(), "the daemon had to be killed");
    });
}

#[test]
fn a_step_that_ended_while_no_daemon_ran_is_committed_and_a_failed_one_run_again() {
    on_each(|flavour| {
        let mut lab = lab(flavour, "");
        let gate = Gate::new();
        let text = format!(
            "FROM busybox\nRUN echo first; echo x >> /count; wget -q -O /one {}; grep -q yes /one\n",
            gate.url("/one")
        );
        let context = lab.context("unseen", &[("Dockerfile", &*text)]);
        let client = start(&lab, "unseen:1", &context);
        let failing = gate.await_step("/one");
        lab.kill_daemon();
        answer(failing, "no");
        step_is(&lab, "STOPPED");
        lab.start_daemon();
        // Its reason is not known.
        let succeeding = gate.await_step("/one");
        lab.kill_daemon();
        open(succeeding);
        step_is(&lab, "STOPPED");
        lab.start_daemon();
        let said = succeeds(client);
        gate.is_quiet();
        assert!(said.contains("the step is run again"), "{said}");
        assert!(said.contains("the end of its output may be missing"), "{said}");
        assert_eq!(result(&lab, &context, &[]).1, "x\n");
        remove_everything(&lab);
        nothing_left(&lab);
        assert!(lab.stop_daemon(), "the daemon had to be killed");
    });
}

#[test]
fn a_daemon_that_is_upgraded_leaves_steps_but_those_that_hang_on_it() {
    let mut lab = lab(any(), "");
    let gate = Gate::new();
    let text = format!(
        "FROM busybox\nRUN echo x >> /count; wget -q -O /one {}; wget -q -O /two {}\n\
         RUN --mount=type=secret,id=s wget -q -O /three {}\n",
        gate.url("/one"),
        gate.url("/two"),
        gate.url("/three")
    );
    let context = lab.context("upgraded", &[("Dockerfile", &*text), ("secret", "s")]);
    let secret = format!("id=s,src={}", context.join("secret").display());
    let client = command(&lab, "upgraded:1", &context, &["--secret", &secret]).spawn().unwrap();
    let one = gate.await_step("/one");
    lab.daemon().signal(Signal::TERM);
    assert!(lab.stop_daemon(), "the daemon had to be killed");
    assert_eq!(steps(&lab), ["RUNNING"]);
    open(one);
    let two = gate.await_step("/two");
    lab.start_daemon();
    logged(&lab, GOES_ON, 1);
    // Again, while it is another's.
    lab.daemon().signal(Signal::TERM);
    assert!(lab.stop_daemon(), "the daemon had to be killed");
    assert_eq!(steps(&lab), ["RUNNING"]);
    lab.start_daemon();
    logged(&lab, GOES_ON, 2);
    open(two);
    let killed = gate.await_step("/three");
    lab.daemon().signal(Signal::TERM);
    assert!(lab.stop_daemon(), "the daemon had to be killed");
    assert!(steps(&lab).is_empty(), "a secret outlives the daemon");
    drop(killed);
    lab.start_daemon();
    open(gate.await_step("/three"));
    succeeds(client);
    gate.is_quiet();
    assert_eq!(result(&lab, &context, &["--secret", &secret]).1, "x\n");
    remove_everything(&lab);
    nothing_left(&lab);
    nothing_left_at_the_end(&mut lab);
}

#[test]
fn a_step_is_for_the_same_build_only_and_for_all_of_its_clients() {
    let mut lab = lab(any(), "");
    let gate = Gate::new();
    let text = |value: &str| {
        let (one, two) = (gate.url("/one"), gate.url("/two"));
        format!(
            "FROM busybox\nENV V={value}\nRUN echo x >> /count; wget -q -O /one {one}\nRUN wget -q -O /two {two}\n"
        )
    };
    let context = lab.context("same", &[("Dockerfile", &*text("1"))]);
    let changed = lab.context("changed", &[("Dockerfile", &*text("2"))]);
    let client = start_once(&lab, "same:1", &context);
    let one = gate.await_step("/one");
    lab.kill_daemon();
    fails(client);
    lab.start_daemon();
    let other = start_once(&lab, "changed:1", &changed);
    open(gate.await_step("/one"));
    open(gate.await_step("/two"));
    succeeds(other);
    // Two who send the build again have one step.
    let clients = ["same:1", "same:2"].map(|tag| start_once(&lab, tag, &context));
    logged(&lab, GOES_ON, 1);
    open(one);
    open(gate.await_step("/two"));
    clients.into_iter().map(succeeds).for_each(drop);
    gate.is_quiet();
    assert_eq!(result(&lab, &context, &[]).1, "x\n");
    remove_everything(&lab);
    nothing_left(&lab);
    assert!(lab.stop_daemon(), "the daemon had to be killed");
}

#[test]
fn a_step_that_is_given_up_after_a_restart_is_killed() {
    let mut lab = lab(any(), "");
    let gate = Gate::new();
    let text = format!("FROM busybox\nRUN echo x; wget -q -O /one {}\n", gate.url("/one"));
    let context = lab.context("given-up", &[("Dockerfile", &*text)]);
    let mut client = start(&lab, "given:1", &context);
    let _one = gate.await_step("/one");
    lab.kill_daemon();
    lab.start_daemon();
    logged(&lab, GOES_ON, 1);
    client.kill().unwrap();
    client.wait().unwrap();
    wait_for("the step to end", PATIENCE, || {
        let steps = steps(&lab);
        if steps.is_empty() { Ok(()) } else { Err(format!("{steps:?}")) }
    });
    // And is not taken for one that ended while nobody looked.
    lab.kill_daemon();
    lab.start_daemon();
    let client = start(&lab, "given:1", &context);
    open(gate.await_step("/one"));
    succeeds(client);
    remove_everything(&lab);
    nothing_left(&lab);
    assert!(lab.stop_daemon(), "the daemon had to be killed");
}

/// What the executor has in a directory of its own.
fn of_executor(lab: &Lab, place: &str) -> Vec<PathBuf> {
    let dir = lab.dir().join("shipwayd/executor").join(place);
    std::fs::read_dir(dir).into_iter().flatten().flatten().map(|e| e.path()).collect()
}

#[test]
fn a_step_that_nobody_wants_is_held_for_a_while_and_then_nothing_is_left() {
    let _bridge = crate::network::Bridge;
    let (mut lab, addresses) = crate::network::lab_on_a_bridge();
    let text = "FROM busybox\nRUN --mount=type=cache,target=/c,sharing=locked --mount=type=bind,from=busybox,source=bin,target=/m \
                mkfifo /f; echo waiting; read x < /f\n";
    let context = lab.context("unwanted", &[("Dockerfile", text)]);
    let client = start_once(&lab, "unwanted:1", &context);
    step_is(&lab, "RUNNING");
    lab.kill_daemon();
    fails(client);
    lab.configure_daemon("[system]\n  adoptTimeout = \"1h\"\n");
    lab.start_daemon();
    logged(&lab, "steps of an earlier run go on", 1);
    assert_eq!(steps(&lab), ["RUNNING"]);
    assert_eq!(crate::network::in_use(&addresses), 1);
    assert_eq!((of_executor(&lab, "netns").len(), of_executor(&lab, "run").len()), (1, 1));
    // Others come and go meanwhile, and take nothing of it with them.
    let quick = lab.context("quick", &[("Dockerfile", "FROM busybox\nRUN echo quick\n")]);
    build(&lab, "quick:1", &quick, &[]).ok();
    lab.shipway(["prune", "--all"]).ok();
    assert_eq!(steps(&lab), ["RUNNING"]);
    lab.kill_daemon();
    lab.daemon_flag("--adopt-timeout=1s");
    lab.start_daemon();
    logged(&lab, "no build came for a step", 1);
    wait_for("the step to end", PATIENCE, || {
        let steps = steps(&lab);
        if steps.is_empty() { Ok(()) } else { Err(format!("{steps:?}")) }
    });
    // The cache is free again.
    let after = "FROM busybox\nRUN --mount=type=cache,target=/c,sharing=locked echo free\n";
    build(&lab, "after:1", &lab.context("after", &[("Dockerfile", after)]), &[]).ok();
    remove_everything(&lab);
    nothing_left(&lab);
    assert!(lab.stop_daemon(), "the daemon had to be killed");
    assert_eq!(crate::network::in_use(&addresses), 0);
    assert!(of_executor(&lab, "netns").is_empty() && of_executor(&lab, "run").is_empty());
    let left = lab.leftovers();
    assert!(left.is_empty(), "{left:#?}");
}
