//! Stopping and starting the daemon under running builds (rows `dp.drain`, `dp.reconnect`).

#![allow(clippy::unwrap_used)]

use rustix::process::Signal;
use shipway_integration::{any, build};
use shipway_testkit::{Lab, wait_for};
use std::{
    io::{BufRead as _, BufReader, Write as _},
    net::{TcpListener, TcpStream},
    path::Path,
    process::{Child, Stdio},
    time::Duration,
};

/// Much longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(60);

/// What steps ask, one request after another, and wait for the answer of.
pub(crate) struct Gate(TcpListener);

impl Gate {
    pub(crate) fn new() -> Self {
        Self(TcpListener::bind(("127.0.0.1", 0)).unwrap())
    }

    pub(crate) fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.0.local_addr().unwrap())
    }

    /// Waits for a step that asks for `path`.
    #[track_caller]
    pub(crate) fn await_step(&self, path: &str) -> TcpStream {
        let (stream, _) = self.0.accept().unwrap();
        let mut lines = BufReader::new(&stream).lines().map_while(Result::ok);
        let asked = lines.next().unwrap_or_default();
        while lines.next().is_some_and(|line| !line.is_empty()) {}
        assert_eq!(asked.split(' ').nth(1), Some(path), "{asked}");
        stream
    }

    /// No step asks for anything.
    #[track_caller]
    pub(crate) fn is_quiet(&self) {
        self.0.set_nonblocking(true).unwrap();
        let asked = self.0.accept();
        self.0.set_nonblocking(false).unwrap();
        assert_eq!(asked.unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
    }
}

/// Lets a step go on.
pub(crate) fn open(step: TcpStream) {
    answer(step, "yes");
}

/// Gives a step `text` and lets it go on.
pub(crate) fn answer(mut step: TcpStream, text: &str) {
    let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n", text.len());
    write!(step, "{head}Connection: close\r\n\r\n{text}").unwrap();
}

/// A lab whose steps are on the host's network, and whose daemon waits long for builds.
fn lab() -> Lab {
    let mut lab = Lab::on(any());
    lab.configure_worker("networkMode = \"host\"\n");
    // Steps end with the daemon here; `outlive` is about those that do not.
    lab.configure_daemon("[system]\n  drainTimeout = \"1h\"\n  adoptTimeout = \"0s\"\n");
    lab.start_registry();
    shipway_testkit::BaseImage::busybox().push(&lab.registry(), "library/busybox", "latest");
    lab.start_daemon();
    lab
}

fn start(lab: &Lab, tag: &str, context: &Path) -> Child {
    let mut command = lab.shipway_command();
    command.args(["build", "--progress", "plain", "--tag", tag]).arg(context);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
}

#[track_caller]
fn succeeds(client: Child) {
    let output = client.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn a_daemon_that_is_stopped_lets_running_builds_end() {
    let mut lab = lab();
    let gate = Gate::new();
    let text = format!(
        "FROM busybox\nRUN wget -q -O /one {}\nRUN wget -q -O /two {}\n",
        gate.url("/one"),
        gate.url("/two")
    );
    let context = lab.context("drained", &[("Dockerfile", &*text)]);
    let client = start(&lab, "drained:1", &context);
    let first = gate.await_step("/one");
    lab.daemon().signal(Signal::TERM);
    wait_for("the daemon to be not ready", PATIENCE, || {
        let said = lab.shipway(["workers"]);
        match said.all().contains("the daemon is stopping and takes no more builds") {
            true => Ok(()),
            false => Err(said.all()),
        }
    });
    let refused = build(&lab, "late:1", &context, &["--reconnect-timeout", "0"]).failed();
    assert!(refused.all().contains("takes no more builds"), "{}", refused.all());
    assert!(refused.all().contains("another node"), "{}", refused.all());
    // A step that begins after the signal, too.
    open(first);
    open(gate.await_step("/two"));
    succeeds(client);
    wait_for("the daemon to end", PATIENCE, || match lab.daemon().alive() {
        Ok(()) => Err("it runs".into()),
        Err(_) => Ok(()),
    });
    lab.kill_daemon();
    lab.start_daemon();
    // All of it was kept: nobody opens the gate any more.
    build(&lab, "drained:1", &context, &[]).ok();
    assert!(lab.stop_daemon(), "the daemon had to be killed");
}

#[test]
fn a_build_goes_on_when_its_daemon_is_back() {
    let mut lab = lab();
    let gate = Gate::new();
    let text = format!(
        "FROM busybox\nRUN wget -q -O /one {}\nRUN wget -q -O /two {}\n",
        gate.url("/one"),
        gate.url("/two")
    );
    let context = lab.context("moved", &[("Dockerfile", &*text)]);
    let client = start(&lab, "moved:1", &context);
    open(gate.await_step("/one"));
    let cut_off = gate.await_step("/two");
    // The second signal ends the build, which the daemon would else wait for.
    lab.daemon().signal(Signal::TERM);
    wait_for("the daemon to be not ready", PATIENCE, || {
        let said = lab.shipway(["workers"]);
        if said.code == Some(0) { Err(said.all()) } else { Ok(()) }
    });
    assert!(lab.stop_daemon(), "the daemon had to be killed");
    drop(cut_off);
    lab.start_daemon();
    // The first step is not run again: it would ask for `/one`.
    let killed = gate.await_step("/two");
    lab.kill_daemon();
    drop(killed);
    lab.start_daemon();
    open(gate.await_step("/two"));
    succeeds(client);
    assert!(lab.stop_daemon(), "the daemon had to be killed");
}
