//! Looking into builds: steps that failed, while their build waits and after it has ended, by the
//! client's own words and at a terminal.

#![allow(clippy::unwrap_used)]

use parking_lot::Mutex;
use shipway_integration::{any, containers_go, nothing_left, remove_everything};
use shipway_testkit::{Finished, Lab, wait_for};
use std::{
    io::{Read as _, Write as _},
    path::Path,
    process::{Child, ChildStdin, Command, Stdio},
    sync::Arc,
    time::Duration,
};

/// A program that is talked to: what it says is collected as it comes.
struct Talk {
    child: Child,
    input: Option<ChildStdin>,
    said: Arc<Mutex<String>>,
    /// How much of what was said has been looked at.
    seen: usize,
}

impl Talk {
    #[track_caller]
    fn start(command: &mut Command) -> Self {
        let command = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let said = Arc::new(Mutex::new(String::new()));
        let outputs: [Box<dyn std::io::Read + Send>; 2] =
            [Box::new(child.stdout.take().unwrap()), Box::new(child.stderr.take().unwrap())];
        for mut output in outputs {
            let said = said.clone();
            std::thread::spawn(move || {
                let mut buffer = [0; 4096];
                while let Ok(read @ 1..) = output.read(&mut buffer) {
                    said.lock().push_str(&String::from_utf8_lossy(&buffer[..read]));
                }
            });
        }
        let input = child.stdin.take();
        Self { child, input, said, seen: 0 }
    }

    /// The client on a terminal of 33 rows and 77 columns.
    #[track_caller]
    fn on_terminal(lab: &Lab, arguments: &[&str]) -> Self {
        let client = lab.shipway_command();
        let words = [client.get_program()].into_iter().chain(client.get_args());
        let words = words.map(|w| w.to_str().unwrap()).chain(arguments.iter().copied());
        let words: Vec<String> = words.map(|w| format!("'{w}'")).collect();
        let line = format!("stty rows 33 cols 77; exec {}", words.join(" "));
        let mut script = Command::new("script");
        Self::start(script.args(["-qefc", &line, "/dev/null"]).env("SHELL", "/bin/sh"))
    }

    #[track_caller]
    fn say(&mut self, text: &str) {
        self.input.as_mut().unwrap().write_all(text.as_bytes()).unwrap();
    }

    /// Waits until `text` is said after what was waited for before; gives what came until then.
    #[track_caller]
    fn hear(&mut self, text: &str) -> String {
        let (said, seen) = (self.said.clone(), self.seen);
        let end = wait_for(&format!("{text:?} to be said"), Duration::from_secs(60), || {
            let said = said.lock();
            match said[seen..].find(text) {
                Some(at) => Ok(seen + at + text.len()),
                None => Err(said[seen..].to_owned()),
            }
        });
        self.seen = end;
        self.said.lock()[seen..end].to_owned()
    }

    /// The exit code, and the last words.
    #[track_caller]
    fn end(mut self) -> (Option<i32>, String) {
        drop(self.input.take());
        let child = &mut self.child;
        let status = wait_for("the program to end", Duration::from_secs(60), || {
            child.try_wait().unwrap().ok_or_else(|| self.said.lock().clone())
        });
        let rest = self.said.lock()[self.seen..].to_owned();
        (status.code(), rest)
    }
}

/// A Dockerfile whose third step fails, as a user in a directory with variables.
const FAILING: &str = "FROM busybox
ENV GREETING=hello
ARG VERSION=7
WORKDIR /work
RUN chown 1234 /work
USER 1234
RUN --mount=type=secret,id=key,uid=1234,required=false --mount=type=bind,source=given,target=/given \\
    cat /given > half && mkdir dir && ln -s ../half dir/link && exit 9
";

fn failing(lab: &Lab, name: &str) -> String {
    let files = [("Dockerfile", FAILING), ("given", "half done\n"), ("key", "top-secret\n")];
    lab.context(name, &files).to_str().unwrap().to_owned()
}

/// The failed step, as the failure of its build names it.
#[track_caller]
fn failed_step(failed: &Finished) -> String {
    let (_, rest) = failed.stderr.split_once("hint: `shipway debug ").unwrap_or_else(|| {
        panic!("no step is named:\n{}", failed.stderr);
    });
    rest.split('`').next().unwrap().to_owned()
}

#[test]
fn a_failed_step_is_entered_after_its_build() {
    let mut lab = Lab::complete(any());
    let context = failing(&lab, "after");
    let secret = format!("id=key,src={context}/key");
    let build = ["build", "--progress", "plain", "--secret", &secret, &context];
    let failed = lab.shipway(build).failed();
    let step = failed_step(&failed);

    // As its user, in its directory, with its variables, and what it left.
    let run = |command: &[&str]| {
        lab.shipway(["debug", &step, "--"].into_iter().chain(command.iter().copied()))
    };
    let said = run(&["sh", "-c", "id -u; pwd; echo $GREETING $VERSION; cat half /given"]).ok();
    let lines: Vec<&str> = said.lines().collect();
    assert_eq!(lines, ["1234", "/work", "hello 7", "half done", "half done"]);
    assert_eq!(run(&["sh", "-c", "echo more >> half; exit 7"]).code, Some(7));
    // Each time as it was left; and without what the client had for the build alone.
    assert_eq!(run(&["cat", "half"]).ok().stdout, "half done\n");
    run(&["cat", "/run/secrets/key"]).failed();
    assert_eq!(run(&["no-such-program"]).failed().code, Some(1));

    let shown = lab.shipway(["debug", &step, "--show"]).ok().stdout;
    for part in [
        ">>> RUN --mount=type=secret",
        "directory  /work",
        "user       1234",
        "variable   GREETING=hello",
        "variable   VERSION=7",
        "mount      /given (bind, read-only)",
    ] {
        assert!(shown.contains(part), "{part}:\n{shown}");
    }
    let list = lab.shipway(["debug", &step, "--ls", "/work"]).ok().stdout;
    assert!(list.lines().any(|l| l.starts_with("drwxr-xr-x") && l.ends_with(" dir")), "{list}");
    assert_eq!(lab.shipway(["debug", &step, "--cat", "/work/half"]).ok().stdout, "half done\n");
    let copy = lab.dir().join("copy");
    let to = copy.to_str().unwrap();
    lab.shipway(["debug", &step, "--cp", "/work", to]).ok();
    assert_eq!(std::fs::read_to_string(copy.join("half")).unwrap(), "half done\n");
    assert_eq!(std::fs::read_link(copy.join("dir/link")).unwrap(), Path::new("../half"));
    lab.shipway(["debug", &step, "--cat", "/work/none"]).failed();

    // The history does not have the id, so other users cannot find it.
    let records = lab.shipway(["debug", "histories", "--format", "{{json .}}"]).ok().stdout;
    assert!(records.contains("exit code: 9") && !records.contains(&step), "{records}");
    let other = lab.shipway(["debug", "0123456789012345678901234"]).failed();
    assert!(
        other.stderr.contains("is not kept") && other.stderr.contains("hint: "),
        "{}",
        other.stderr
    );

    // It is cache, by name, that goes with the rest.
    let usage = lab.shipway(["du", "--verbose"]).ok().stdout;
    assert!(usage.contains("left by a failed step"), "{usage}");
    let pruned = lab.shipway(["prune", "--all", "--verbose"]).ok().stdout;
    assert!(pruned.contains("left by a failed step"), "{pruned}");
    let gone = lab.shipway(["debug", &step, "--show"]).failed();
    assert!(gone.stderr.contains("is not kept any more"), "{}", gone.stderr);

    // And it does not outlive its daemon.
    let step = failed_step(&lab.shipway(build).failed());
    lab.shipway(["debug", &step, "--cat", "/work/half"]).ok();
    assert!(lab.stop_daemon());
    lab.start_daemon();
    let usage = lab.shipway(["du", "--verbose"]).ok().stdout;
    assert!(!usage.contains("left by a failed step"), "{usage}");
    remove_everything(&lab);
    nothing_left(&lab);
}

#[test]
fn only_the_last_failed_steps_are_kept() {
    let mut lab = Lab::complete(any());
    lab.configure_daemon("[system]\n  keepFailedSteps = 1\n");
    assert!(lab.stop_daemon(), "the daemon had to be killed");
    lab.start_daemon();
    let fail = |n: u32| {
        let text = format!("FROM busybox\nRUN echo {n} > /n && false\n");
        let context = lab.context(&format!("last-{n}"), &[("Dockerfile", &text)]);
        let failed = lab.shipway(["build", "--progress", "plain", context.to_str().unwrap()]);
        failed_step(&failed.failed())
    };
    let (first, second) = (fail(1), fail(2));
    assert_eq!(lab.shipway(["debug", &second, "--cat", "/n"]).ok().stdout, "2\n");
    let gone = lab.shipway(["debug", &first, "--cat", "/n"]).failed();
    assert!(gone.stderr.contains("is not kept"), "{}", gone.stderr);
    wait_for("what the first one left to go", Duration::from_secs(30), || {
        let usage = lab.shipway(["du", "--verbose"]).ok().stdout;
        match usage.matches("left by a failed step").count() {
            1 => Ok(()),
            _ => Err(usage),
        }
    });
}

#[test]
fn a_build_stops_at_its_failed_step_with_a_shell() {
    let lab = Lab::complete(any());
    let context = failing(&lab, "stops");
    let secret = format!("id=key,src={context}/key");
    let build = ["debug", "build", "--progress", "plain", "--secret", &secret, &context];
    let mut talk = Talk::on_terminal(&lab, &build);
    talk.hear("exit code: 9");
    talk.hear("Ctrl-a c");
    talk.hear("/work $ ");
    // Its mounts, secrets included, its variables and the terminal's size.
    talk.say("stty size; id -u; echo $GREETING-$VERSION; cat half /run/secrets/key; echo .\r");
    let said = talk.hear("\r\n.\r\n");
    for part in ["33 77", "1234", "hello-7", "half done", "top-secret"] {
        assert!(said.contains(part), "{part}: {said}");
    }
    // Ctrl-C is the shell's business: it ends a line that is edited, and what runs.
    talk.say("never\x03");
    talk.hear("/work $ ");
    talk.say("echo o$((1))n; sleep 1000; echo of$((1))f\r");
    talk.hear("o1n");
    talk.say("\x03");
    talk.hear("/work $ ");
    talk.say("rm half; echo done $((1+1))\r");
    talk.hear("done 2");

    talk.say("\x01c");
    talk.hear("goes on");
    talk.hear("(shipway) ");
    talk.say("ps\r");
    talk.hear("running     /bin/sh");
    talk.hear("(shipway) ");
    talk.say("ls\r");
    let list = talk.hear("(shipway) ");
    assert!(list.contains(" dir") && !list.contains(" half"), "{list}");
    talk.say("exec cat /given\r");
    talk.hear("half done");
    talk.hear("(shipway) ");
    talk.say("env\r");
    talk.hear("variable   GREETING=hello");
    talk.say("wher\r");
    talk.hear("did you mean where?");
    // As it was left.
    talk.say("rollback cat half\r");
    talk.hear("half done");
    talk.hear("(shipway) ");
    talk.say("reload\r");
    talk.hear("exit code: 9");
    talk.hear("/work $ ");
    talk.say("exit 3\r");
    talk.hear("exited with code 3");
    talk.say("exit\r");
    let (code, rest) = talk.end();
    assert_eq!(code, Some(1), "{rest}");
    assert!(rest.contains("ERROR: failed to build: failed to solve"), "{rest}");
    remove_everything(&lab);
    nothing_left(&lab);
}

#[test]
fn a_result_is_looked_into_and_then_exported() {
    let lab = Lab::complete(any());
    let text =
        "FROM busybox\nWORKDIR /work\nENV A=1\nRUN echo made > file\nCMD [\"cat\", \"file\"]\n";
    let context = lab.context("result", &[("Dockerfile", text)]);
    let context = context.to_str().unwrap();
    let tag = "example.com/looked-into:1";
    let run = |more: &[&str]| {
        let words = ["debug", "build", "--progress", "plain", "--tag", tag];
        let mut command = lab.shipway_command();
        let command = command.args(words).args(more).arg(context).stdin(Stdio::null());
        shipway_testkit::run(command)
    };
    let looked =
        run(&["--on", "always", "--invoke", "args=sh -c 'cat file; echo $A; pwd',env=A=2"]);
    assert_eq!(looked.ok().stdout, "made\n2\n/work\n");
    assert_eq!(shipway_integration::ctr_run(&lab, tag, &[]).ok().stdout, "made\n");
    // One that goes well is just built.
    assert_eq!(run(&[]).ok().stdout, "");
    for (arguments, why) in [
        (&["debug"][..], "nothing to look into"),
        (&["debug", "build", "--invoke", "what=x", context], "unknown key \"what\""),
        (&["debug", "build", "-"], "the build reads standard input"),
    ] {
        let mut command = lab.shipway_command();
        let refused = shipway_testkit::run(command.args(arguments).stdin(Stdio::null())).failed();
        assert!(refused.stderr.contains(why), "{why}: {}", refused.stderr);
    }
}

#[test]
fn a_client_that_is_killed_in_a_step_leaves_nothing() {
    let lab = Lab::complete(any());
    let context = failing(&lab, "killed");
    let mut command = lab.shipway_command();
    command.args(["debug", "build", "--progress", "plain", &context]);
    let mut talk = Talk::start(&mut command);
    talk.say("echo here $((1+1)); sleep 1000\n");
    talk.hear("here 2");
    talk.child.kill().unwrap();
    talk.child.wait().unwrap();
    containers_go(&lab, Duration::from_secs(30));
    remove_everything(&lab);
    nothing_left(&lab);
}
