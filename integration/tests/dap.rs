//! Builds in an editor: what the Debug Adapter Protocol says of a Dockerfile's steps, by our client
//! and by buildx on the same build.

#![allow(clippy::unwrap_used)]

use serde_json::{Value, json};
use shipway_integration::{any, nothing_left, remove_everything};
use shipway_testkit::{Lab, wait_for};
use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    process::{Child, ChildStdin, Command, Stdio},
    sync::mpsc::{Receiver, channel},
    time::Duration,
};

const PATIENCE: Duration = Duration::from_secs(60);

/// An editor that talks to an adapter.
struct Editor {
    child: Child,
    input: ChildStdin,
    messages: Receiver<Value>,
    /// Events and answers that came while something else was waited for.
    events: Vec<Value>,
    answers: Vec<Value>,
    seq: i64,
}

impl Editor {
    #[track_caller]
    fn start(command: &mut Command) -> Self {
        let command = command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.stderr(Stdio::null()).spawn().unwrap();
        let (input, output) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let (send, messages) = channel();
        std::thread::spawn(move || {
            let mut output = BufReader::new(output);
            loop {
                let mut length = 0;
                loop {
                    let mut line = String::new();
                    if output.read_line(&mut line).unwrap_or(0) == 0 {
                        return;
                    }
                    match line.trim().split_once(": ") {
                        Some((_, value)) => length = value.parse().unwrap_or(length),
                        None => break,
                    }
                }
                let mut body = vec![0; length];
                output.read_exact(&mut body).unwrap();
                let _ = send.send(serde_json::from_slice(&body).unwrap());
            }
        });
        Self { child, input, messages, events: Vec::new(), answers: Vec::new(), seq: 0 }
    }

    #[track_caller]
    fn send(&mut self, command: &str, arguments: Value) -> i64 {
        self.seq += 1;
        let message =
            json!({"seq": self.seq, "type": "request", "command": command, "arguments": arguments});
        let body = message.to_string();
        write!(self.input, "Content-Length: {}\r\n\r\n{body}", body.len()).unwrap();
        self.input.flush().unwrap();
        self.seq
    }

    /// Waits for one more message, which is kept.
    #[track_caller]
    fn hear(&mut self, what: &str) {
        let message = self.messages.recv_timeout(PATIENCE).unwrap_or_else(|_| {
            panic!("{what} did not come; there were {:#?} {:#?}", self.events, self.answers);
        });
        match message["type"].as_str() {
            Some("event") => self.events.push(message),
            _ => self.answers.push(message),
        }
    }

    /// The answer to the request `seq`.
    #[track_caller]
    fn answer(&mut self, seq: i64) -> Value {
        loop {
            if let Some(at) = self.answers.iter().position(|a| a["request_seq"] == seq) {
                return self.answers.remove(at);
            }
            self.hear("an answer");
        }
    }

    /// The answer to a request, which must be a good one.
    #[track_caller]
    fn ask(&mut self, command: &str, arguments: Value) -> Value {
        let seq = self.send(command, arguments);
        let answer = self.answer(seq);
        assert_eq!(answer["success"], true, "{command}: {answer}");
        answer["body"].clone()
    }

    /// The next event of this name.
    #[track_caller]
    fn event(&mut self, name: &str) -> Value {
        loop {
            if let Some(at) = self.events.iter().position(|e| e["event"] == name) {
                return self.events.remove(at)["body"].clone();
            }
            self.hear(name);
        }
    }

    /// Why the build stops next, and the line at which it does.
    #[track_caller]
    fn stop(&mut self) -> (String, i64) {
        let stopped = self.event("stopped");
        let thread = stopped["threadId"].clone();
        let frames = self.ask("stackTrace", json!({"threadId": thread}));
        let line = frames["stackFrames"][0]["line"].as_i64().unwrap();
        (stopped["reason"].as_str().unwrap().to_owned(), line)
    }

    /// Begins a build of `context`, with a breakpoint at `line`.
    #[track_caller]
    fn begin(&mut self, context: &str, line: i64, stop_on_entry: bool) {
        self.ask("initialize", json!({"clientID": "test", "adapterID": "dockerfile"}));
        let dockerfile = format!("{context}/Dockerfile");
        let launch =
            json!({"dockerfile": dockerfile, "contextPath": context, "stopOnEntry": stop_on_entry});
        // buildx answers only when the configuration is done.
        let launched = self.send("launch", launch);
        self.event("initialized");
        let breakpoints = json!({"source": {"path": dockerfile}, "breakpoints": [{"line": line}]});
        self.ask("setBreakpoints", breakpoints);
        let configured = self.send("configurationDone", json!({}));
        for seq in [launched, configured] {
            let answer = self.answer(seq);
            assert_eq!(answer["success"], true, "{answer}");
        }
    }

    /// Goes on, by one of the requests for that.
    #[track_caller]
    fn go(&mut self, how: &str) {
        self.ask(how, json!({"threadId": 1}));
    }

    #[track_caller]
    fn evaluate(&mut self, expression: &str) -> String {
        let arguments = json!({"expression": expression, "frameId": 1, "context": "repl"});
        self.ask("evaluate", arguments)["result"].as_str().unwrap().to_owned()
    }

    /// What a scope of the current step has, by name.
    #[track_caller]
    fn scope(&mut self, name: &str) -> Vec<(String, String, i64)> {
        let scopes = self.ask("scopes", json!({"frameId": 1}));
        let scopes = scopes["scopes"].as_array().unwrap().clone();
        let scope =
            scopes.iter().find(|s| s["name"] == name).unwrap_or_else(|| panic!("{scopes:?}"));
        self.variables(&scope["variablesReference"])
    }

    #[track_caller]
    fn variables(&mut self, of: &Value) -> Vec<(String, String, i64)> {
        let all = self.ask("variables", json!({"variablesReference": of}));
        let text = |v: &Value| v.as_str().unwrap().to_owned();
        let each = all["variables"].as_array().unwrap().iter();
        each.map(|v| {
            (text(&v["name"]), text(&v["value"]), v["variablesReference"].as_i64().unwrap())
        })
        .collect()
    }

    #[track_caller]
    fn end(mut self) {
        drop(self.input);
        let child = &mut self.child;
        wait_for("the adapter to end", PATIENCE, || {
            child.try_wait().unwrap().ok_or_else(|| "it runs".to_owned())
        });
    }
}

const FAILING: &str = "FROM busybox
ENV GREETING=hello
WORKDIR /work
RUN echo one > one
RUN mkdir two && cat one && exit 9
";

fn shipway(lab: &Lab) -> Editor {
    let mut command = lab.shipway_command();
    Editor::start(command.args(["dap", "build", "."]))
}

#[test]
fn an_editor_goes_through_a_build_and_looks_into_its_failed_step() {
    let lab = Lab::complete(any());
    let context = lab.context("dap", &[("Dockerfile", FAILING)]);
    let context = context.to_str().unwrap();
    let mut editor = shipway(&lab);
    editor.begin(context, 4, false);
    let changed = editor.event("breakpoint");
    assert_eq!(
        (&changed["breakpoint"]["verified"], &changed["breakpoint"]["line"]),
        (&json!(true), &json!(4))
    );
    assert_eq!(editor.stop(), ("breakpoint".to_owned(), 4));
    let threads = editor.ask("threads", json!({}));
    assert_eq!(threads["threads"][0]["id"], 1);

    // Before the step has run.
    assert_eq!(editor.evaluate("GREETING"), "hello");
    assert_eq!(editor.evaluate("exec sh -c 'pwd; ls; exit 3'"), "/work\nexit code: 3\n");
    let environment = editor.scope("Environment");
    assert!(environment.contains(&("GREETING".into(), "hello".into(), 0)), "{environment:?}");
    let arguments = editor.scope("Arguments");
    assert!(arguments.contains(&("cwd".into(), "/work".into(), 0)), "{arguments:?}");

    editor.go("next");
    assert_eq!(editor.stop(), ("step".to_owned(), 5));
    assert_eq!(editor.evaluate("cat /work/one"), "one\n");
    let files = editor.scope("File Explorer");
    let work = files.iter().find(|(name, ..)| name == "work").unwrap().2;
    assert_eq!(editor.variables(&json!(work)), [("one".into(), "4 bytes".into(), 0)]);

    // What it left when it failed.
    editor.go("continue");
    assert_eq!(editor.stop(), ("exception".to_owned(), 5));
    let exception = editor.ask("exceptionInfo", json!({"threadId": 1}));
    assert!(exception["description"].as_str().unwrap().contains("exit code: 9"), "{exception}");
    assert_eq!(editor.evaluate("exec ls /work"), "one\ntwo\n");
    let seq = editor.send("evaluate", json!({"expression": "nonsense here"}));
    assert_eq!(editor.answer(seq)["success"], false);

    editor.go("continue");
    assert_eq!(editor.event("exited")["exitCode"], 1);
    editor.event("terminated");
    editor.ask("disconnect", json!({}));
    editor.end();
    remove_everything(&lab);
    nothing_left(&lab);
}

#[test]
fn a_build_in_an_editor_goes_well_or_is_given_up() {
    let lab = Lab::complete(any());
    let text = "FROM busybox AS tools\nRUN echo tool > /tool\nFROM busybox\nCOPY --from=tools /tool /tool\n";
    let context = lab.context("dap-well", &[("Dockerfile", text)]);
    let context = context.to_str().unwrap();
    let tag = "example.com/edited:1";
    let mut command = lab.shipway_command();
    let mut editor = Editor::start(command.args(["dap", "build", "--tag", tag, "."]));
    editor.begin(context, 4, true);
    let (reason, entry) = editor.stop();
    assert_eq!(reason, "entry");
    assert!(entry <= 3, "{entry}");
    editor.go("continue");
    assert_eq!(editor.stop(), ("breakpoint".to_owned(), 4));
    editor.go("stepOut");
    assert_eq!(editor.event("exited")["exitCode"], 0);
    editor.event("terminated");
    editor.end();
    assert_eq!(shipway_integration::ctr_run(&lab, tag, &["cat", "/tool"]).ok().stdout, "tool\n");

    // A Dockerfile that cannot be read, and an editor that goes away in the middle.
    std::fs::write(format!("{context}/Dockerfile"), "FRM busybox\n").unwrap();
    let mut editor = shipway(&lab);
    editor.begin(context, 1, true);
    assert_eq!(editor.event("exited")["exitCode"], 1);
    editor.end();
    std::fs::write(format!("{context}/Dockerfile"), "FROM busybox\nRUN sleep 1000\n").unwrap();
    let mut editor = shipway(&lab);
    editor.begin(context, 2, false);
    assert_eq!(editor.stop(), ("breakpoint".to_owned(), 2));
    editor.go("continue");
    editor.end();
    remove_everything(&lab);
    nothing_left(&lab);
}

#[test]
fn an_editor_sees_the_stops_that_buildx_shows_it() {
    let lab = Lab::complete(any());
    let Some(mut buildx) = lab.buildx() else {
        eprintln!("docker-buildx is not here: nothing to compare with");
        return;
    };
    let context = lab.context("dap-both", &[("Dockerfile", FAILING)]);
    let context = context.to_str().unwrap();
    let stops = |mut editor: Editor| {
        editor.begin(context, 4, false);
        let mut stops = vec![editor.stop()];
        editor.go("next");
        stops.push(editor.stop());
        editor.go("continue");
        stops.push(editor.stop());
        editor.child.kill().unwrap();
        editor.child.wait().unwrap();
        stops
    };
    let ours = stops(shipway(&lab));
    let buildx = buildx.env("BUILDX_EXPERIMENTAL", "1").args(["dap", "build", "."]);
    assert_eq!(ours, stops(Editor::start(buildx)));
}
