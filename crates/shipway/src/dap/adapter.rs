//! The conversation with an editor. One build, which is its one thread; what takes long is done by
//! tasks, so that the editor can always ask.

use std::{
    any::Any,
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    sync::Arc,
};

use serde::Deserialize;
use serde_json::{Value, json};
use shipway_client::{Client, DebugBuild, Event, FileEntry, Outcome, SolveOptions, Status, Step};
use shipway_fault::{Fault, Result};
use tokio::{
    io::{AsyncRead, AsyncWrite, BufReader},
    sync::mpsc,
};
use tokio_util::task::AbortOnDropHandle;

use super::{
    program::{Point, Program},
    wire::{self, Request, Writer},
};
use crate::{
    Persona,
    debugger::{listing, quoted, words},
    failure,
};

/// The id of the only thread.
const THREAD: i64 = 1;
/// Most of what a command says that is shown.
const MAX_OUTPUT: usize = 1 << 20;
/// Breakpoints of one file.
const MAX_BREAKPOINTS: usize = 10_000;
/// Things that are shown at one stop.
const MAX_SHOWN: usize = 100_000;

/// How an editor asks for a build.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Launch {
    /// The Dockerfile.
    pub(crate) dockerfile: Option<String>,
    /// The context.
    pub(crate) context_path: Option<String>,
    /// Stage to build.
    pub(crate) target: Option<String>,
    /// Whether it stops before its first step.
    pub(crate) stop_on_entry: bool,
}

/// A build that can begin.
pub(crate) struct Prepared {
    pub(crate) client: Client,
    pub(crate) options: SolveOptions,
    /// The Dockerfile on this machine.
    pub(crate) path: PathBuf,
    /// What the build calls it.
    pub(crate) filename: String,
    /// What the build reads, as long as this lives.
    pub(crate) kept: Box<dyn Any + Send + Sync>,
}

/// A build that has begun.
struct Session {
    build: DebugBuild,
    program: Program,
    path: PathBuf,
    _kept: Box<dyn Any + Send + Sync>,
}

/// What a task has done.
enum Done {
    Began(Box<Result<Session>>),
    Ran(Result<()>),
    Ended(Result<Outcome>),
}

/// How far the build goes before it stops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Goal {
    /// To a breakpoint, or its end.
    End,
    /// To this step.
    Step(usize),
}

/// What the editor can ask more of.
#[derive(Clone, Debug)]
enum Shown {
    Process,
    Variables,
    Mounts,
    Directory(String),
}

enum State {
    /// Not begun.
    Waiting,
    Running,
    Stopped(Box<Stop>),
    Ended,
}

/// A stop.
#[derive(Default)]
struct Stop {
    failure: Option<Fault>,
    step: Option<Step>,
    shown: Vec<Shown>,
}

/// The adapter, which writes to `W`.
pub(crate) struct Adapter<W> {
    to: Writer<W>,
    launch: Option<Launch>,
    configured: bool,
    /// Where breakpoints are wanted, by path: id and line.
    breakpoints: BTreeMap<PathBuf, Vec<(i64, i64)>>,
    last_breakpoint: i64,
    session: Option<Arc<Session>>,
    /// The step that runs next, or failed.
    at: usize,
    goal: Goal,
    pause: bool,
    state: State,
    done: mpsc::Sender<Done>,
    task: Option<AbortOnDropHandle<()>>,
    /// Steps whose names were shown.
    named: BTreeSet<String>,
}

/// The same file, however it is called.
fn same(path: &str) -> PathBuf {
    std::fs::canonicalize(path).unwrap_or_else(|_| PathBuf::from(path))
}

impl<W: AsyncWrite + Unpin> Adapter<W> {
    /// Talks to an editor until it goes; `prepare` makes a build of what it asks for.
    pub(crate) async fn serve<P>(
        from: impl AsyncRead + Send + Unpin + 'static,
        to: W,
        prepare: impl Fn(Launch) -> P,
    ) -> Result<()>
    where
        P: Future<Output = Result<Prepared>> + Send + 'static,
    {
        let (requests, mut queue) = mpsc::channel(16);
        // Reading is not to be given up in the middle of a message.
        let reading = shipway_task::spawn("read requests of the editor", async move {
            let mut from = BufReader::new(from);
            loop {
                let request = wire::read(&mut from).await.transpose();
                let Some(request) = request else { return };
                let failed = request.is_err();
                if requests.send(request).await.is_err() || failed {
                    return;
                }
            }
        });
        let _reading = AbortOnDropHandle::new(reading);
        let (done, mut results) = mpsc::channel(1);
        let (events, mut statuses) = mpsc::channel(64);
        let mut adapter = Self {
            to: Writer::new(to),
            launch: None,
            configured: false,
            breakpoints: BTreeMap::new(),
            last_breakpoint: 0,
            session: None,
            at: 0,
            goal: Goal::End,
            pause: false,
            state: State::Waiting,
            done,
            task: None,
            named: BTreeSet::new(),
        };
        loop {
            tokio::select! {
                request = queue.recv() => {
                    let Some(request) = request else { return Ok(()) };
                    let request = request?;
                    if matches!(&*request.command, "disconnect" | "terminate") {
                        adapter.to.answer(&request, Ok(Value::Null)).await?;
                        return adapter.to.event("terminated", json!({})).await;
                    }
                    let begins = adapter.obey(&request).await?;
                    if begins {
                        let launch = adapter.launch.clone().unwrap_or_default();
                        adapter.begin(prepare(launch), events.clone());
                    }
                }
                Some(done) = results.recv() => adapter.went(done).await?,
                Some(status) = statuses.recv() => adapter.report(status).await?,
            }
        }
    }

    fn start(&mut self, work: impl Future<Output = Done> + Send + 'static) {
        let done = self.done.clone();
        self.state = State::Running;
        self.task = Some(AbortOnDropHandle::new(shipway_task::spawn("run a build", async move {
            let _ = done.send(work.await).await;
        })));
    }

    fn begin(
        &mut self,
        prepare: impl Future<Output = Result<Prepared>> + Send + 'static,
        events: mpsc::Sender<Status>,
    ) {
        self.start(async move {
            let begin = async {
                let Prepared { client, options, path, filename, kept } = prepare.await?;
                let mut build = client.debug(options, events).await?;
                let states = match build.run(false).await {
                    Ok(states) => states,
                    Err(fault) => return Err(build.fail(fault).await),
                };
                let definition = states.into_iter().next().and_then(|s| s.definition);
                let definition = definition
                    .ok_or_else(|| Fault::invalid("the build has no steps: its result is empty"))?;
                let program = Program::of(&definition, &filename)?;
                Ok(Session { build, program, path: same(&path.to_string_lossy()), _kept: kept })
            };
            Done::Began(Box::new(begin.await))
        });
    }

    /// Answers a request; whether the build is to begin.
    async fn obey(&mut self, request: &Request) -> Result<bool> {
        let arguments = &request.arguments;
        let body = match &*request.command {
            "initialize" => {
                let body = json!({
                    "supportsConfigurationDoneRequest": true,
                    "supportsEvaluateForHovers": true,
                    "supportsExceptionInfoRequest": true,
                    "supportsTerminateRequest": true,
                });
                self.to.answer(request, Ok(body)).await?;
                self.to.event("initialized", json!({})).await?;
                return Ok(false);
            }
            "launch" => match serde_json::from_value::<Option<Launch>>(arguments.clone()) {
                Ok(launch) => {
                    self.launch = Some(launch.unwrap_or_default());
                    Ok(Value::Null)
                }
                Err(e) => Err(Fault::invalid(format!("launch: {e}"))),
            },
            "configurationDone" => {
                self.configured = true;
                Ok(Value::Null)
            }
            "setBreakpoints" => Ok(self.set_breakpoints(arguments)),
            "setExceptionBreakpoints" => Ok(json!({"breakpoints": []})),
            "threads" => {
                let target = self.launch.as_ref().and_then(|l| l.target.clone());
                let name = target.unwrap_or_else(|| "build".to_owned());
                Ok(json!({"threads": [{"id": THREAD, "name": name}]}))
            }
            "pause" => {
                self.pause = true;
                Ok(Value::Null)
            }
            "continue" | "next" | "stepIn" | "stepOut" => return self.go(request).await,
            "stackTrace" => self.stack(),
            "scopes" => self.scopes(arguments).await,
            "variables" => self.variables(arguments).await,
            "evaluate" => self.evaluate(arguments).await,
            "exceptionInfo" => self.exception(),
            other => Err(Fault::unimplemented(format_args!("the request {other}"))),
        };
        self.to.answer(request, body).await?;
        Ok(matches!(self.state, State::Waiting) && self.launch.is_some() && self.configured)
    }

    fn set_breakpoints(&mut self, arguments: &Value) -> Value {
        let path = same(arguments["source"]["path"].as_str().unwrap_or_default());
        let wanted = arguments["breakpoints"].as_array().into_iter().flatten();
        let mut set = Vec::new();
        for wanted in wanted.take(MAX_BREAKPOINTS) {
            self.last_breakpoint += 1;
            set.push((self.last_breakpoint, wanted["line"].as_i64().unwrap_or_default()));
        }
        let answer: Vec<Value> = set.iter().map(|one| self.breakpoint(&path, *one)).collect();
        self.breakpoints.insert(path, set);
        json!({"breakpoints": answer})
    }

    /// A breakpoint as it is known now.
    fn breakpoint(&self, path: &Path, (id, line): (i64, i64)) -> Value {
        let Some(session) = &self.session else {
            let message = "the build has not begun";
            return json!({"id": id, "verified": false, "line": line, "message": message});
        };
        match session.program.line_of(line).filter(|_| path == session.path) {
            Some(line) => json!({"id": id, "verified": true, "line": line}),
            None => {
                let message = "no step of this build is here";
                json!({"id": id, "verified": false, "line": line, "message": message})
            }
        }
    }

    fn stops_at(&self, at: usize) -> bool {
        let Some(session) = &self.session else { return false };
        let Some(point) = session.program.points.get(at) else { return false };
        let wanted = self.breakpoints.get(&session.path).into_iter().flatten();
        wanted.into_iter().any(|(_, line)| session.program.line_of(*line) == Some(point.lines.0))
    }

    async fn stop(&mut self, reason: &str, failure: Option<Fault>) -> Result<()> {
        self.pause = false;
        let mut body = json!({"reason": reason, "threadId": THREAD, "allThreadsStopped": true});
        let mut stop = Stop::default();
        if let Some(fault) = failure {
            body["description"] = "the step failed".into();
            body["text"] = fault.to_string().into();
            stop = Stop { step: Step::of_failure(&fault), failure: Some(fault), ..stop };
        }
        self.state = State::Stopped(Box::new(stop));
        self.to.event("stopped", body).await
    }

    /// Goes on as `request` says.
    async fn go(&mut self, request: &Request) -> Result<bool> {
        let State::Stopped(stop) = &mut self.state else {
            let refused = Err(Fault::invalid("the build does not stand still"));
            return self.to.answer(request, refused).await.map(|()| false);
        };
        let failure = stop.failure.take();
        let Some(session) = &self.session else { return Ok(false) };
        self.goal = match &*request.command {
            "continue" => Goal::End,
            "stepOut" => Goal::Step(session.program.out_of(self.at)),
            _ => Goal::Step(self.at + 1),
        };
        self.state = State::Running;
        self.to.answer(request, Ok(json!({"allThreadsContinued": true}))).await?;
        match failure {
            // It cannot go on beyond what failed.
            Some(fault) => self.end(Err(fault)),
            None => self.run(),
        }
        Ok(false)
    }

    /// Runs the next step, or ends the build.
    fn run(&mut self) {
        let Some(session) = self.session.clone() else { return };
        if self.at >= session.program.points.len() {
            return self.end(Ok(()));
        }
        let at = self.at;
        self.start(async move {
            let ran = session.program.run(&session.build, at).await;
            drop(session);
            Done::Ran(ran)
        });
    }

    fn end(&mut self, ran: Result<()>) {
        let session = self.session.take();
        self.start(async move {
            let Some(session) = session.and_then(Arc::into_inner) else {
                return Done::Ended(Err(Fault::internal("a build has two ends")));
            };
            Done::Ended(match ran {
                Ok(()) => session.build.finish().await,
                Err(fault) => Err(session.build.fail(fault).await),
            })
        });
    }

    /// A task is done.
    async fn went(&mut self, done: Done) -> Result<()> {
        match done {
            Done::Began(began) => match *began {
                Ok(session) => {
                    self.session = Some(Arc::new(session));
                    self.to
                        .event("thread", json!({"reason": "started", "threadId": THREAD}))
                        .await?;
                    for (path, set) in self.breakpoints.clone() {
                        for one in set {
                            let changed = self.breakpoint(&path, one);
                            let body = json!({"reason": "changed", "breakpoint": changed});
                            self.to.event("breakpoint", body).await?;
                        }
                    }
                    self.goal = Goal::End;
                    let entry = self.launch.as_ref().is_some_and(|l| l.stop_on_entry);
                    match () {
                        () if entry => self.stop("entry", None).await,
                        () if self.stops_at(0) => self.stop("breakpoint", None).await,
                        () => {
                            self.run();
                            Ok(())
                        }
                    }
                }
                Err(fault) => self.ended(Err(fault)).await,
            },
            Done::Ran(Ok(())) => {
                self.at += 1;
                let last = self.session.as_ref().is_none_or(|s| self.at >= s.program.points.len());
                match self.goal {
                    _ if last => {}
                    _ if self.stops_at(self.at) => return self.stop("breakpoint", None).await,
                    Goal::Step(at) if self.at >= at => return self.stop("step", None).await,
                    _ if self.pause => return self.stop("pause", None).await,
                    _ => {}
                }
                self.run();
                Ok(())
            }
            Done::Ran(Err(fault)) => self.stop("exception", Some(fault)).await,
            Done::Ended(ended) => self.ended(ended).await,
        }
    }

    async fn ended(&mut self, ended: Result<Outcome>) -> Result<()> {
        self.state = State::Ended;
        let code = i32::from(ended.is_err());
        if let Err(fault) = ended {
            let output = failure::describe(&fault, Persona::Shipway);
            self.to.event("output", json!({"category": "stderr", "output": output})).await?;
        }
        self.to.event("exited", json!({"exitCode": code})).await?;
        self.to.event("terminated", json!({})).await
    }

    /// What the build says.
    async fn report(&mut self, status: Status) -> Result<()> {
        for vertex in &status.vertexes {
            if vertex.started.is_some() && self.named.insert(vertex.digest.clone()) {
                let output = format!("=> {}\n", vertex.name);
                self.to.event("output", json!({"category": "console", "output": output})).await?;
            }
        }
        for log in &status.logs {
            let category = if log.stream == 2 { "stderr" } else { "stdout" };
            let output = String::from_utf8_lossy(&log.data);
            self.to.event("output", json!({"category": category, "output": output})).await?;
        }
        Ok(())
    }

    fn stack(&self) -> Result<Value> {
        let (State::Stopped(_), Some(session)) = (&self.state, &self.session) else {
            return Err(Fault::invalid("the build does not stand still"));
        };
        let Some(point) = session.program.points.get(self.at) else {
            return Ok(json!({"stackFrames": [], "totalFrames": 0}));
        };
        let name = session.path.file_name().unwrap_or_default().to_string_lossy();
        let frame = |(n, point): (usize, &Point)| {
            json!({
                "id": n + 1,
                "name": point.name,
                "source": {"name": name, "path": session.path},
                "line": point.lines.0,
                "endLine": point.lines.1,
                "column": 1,
            })
        };
        let callers = session.program.callers(self.at);
        let frames: Vec<Value> =
            std::iter::once(point).chain(callers).enumerate().map(frame).collect();
        Ok(json!({"stackFrames": frames, "totalFrames": frames.len()}))
    }

    /// The step at which the build stands, with what it sees.
    async fn here(&mut self) -> Result<(Arc<Session>, Step)> {
        let (State::Stopped(stop), Some(session)) = (&mut self.state, &self.session) else {
            return Err(Fault::invalid("the build does not stand still"));
        };
        let step = match &stop.step {
            Some(step) => step.clone(),
            None => {
                let step = session.program.step(&session.build, self.at).await?;
                stop.step.insert(step).clone()
            }
        };
        Ok((session.clone(), step))
    }

    /// A number by which the editor asks for more.
    fn show(&mut self, shown: Shown) -> Result<usize> {
        let State::Stopped(stop) = &mut self.state else {
            return Err(Fault::invalid("the build does not stand still"));
        };
        if stop.shown.len() >= MAX_SHOWN {
            return Err(Fault::invalid("too much is shown"));
        }
        stop.shown.push(shown);
        Ok(stop.shown.len())
    }

    async fn scopes(&mut self, arguments: &Value) -> Result<Value> {
        self.here().await?;
        // Of the steps that come later there is nothing yet.
        if arguments["frameId"].as_i64() != Some(1) {
            return Ok(json!({"scopes": []}));
        }
        let mut scopes = Vec::new();
        for (name, shown, expensive) in [
            ("Arguments", Shown::Process, false),
            ("Environment", Shown::Variables, false),
            ("Mounts", Shown::Mounts, false),
            ("File Explorer", Shown::Directory("/".to_owned()), true),
        ] {
            let number = self.show(shown)?;
            scopes
                .push(json!({"name": name, "variablesReference": number, "expensive": expensive}));
        }
        Ok(json!({"scopes": scopes}))
    }

    async fn variables(&mut self, arguments: &Value) -> Result<Value> {
        let (session, step) = self.here().await?;
        let State::Stopped(stop) = &self.state else { return Ok(Value::Null) };
        let number = arguments["variablesReference"].as_u64().and_then(|n| usize::try_from(n).ok());
        let shown = number.and_then(|n| n.checked_sub(1)).and_then(|n| stop.shown.get(n));
        let shown = shown.ok_or_else(|| Fault::invalid("there is no such variable"))?.clone();
        let plain = |name: &str, value: &str| json!({"name": name, "value": value, "variablesReference": 0});
        let process = step.invocation(Vec::new(), false);
        let variables = match shown {
            Shown::Process => {
                let command: Vec<String> = process.args.iter().map(|a| quoted(a)).collect();
                let user = if process.user.is_empty() { "root" } else { &process.user };
                vec![
                    plain("command", &command.join(" ")),
                    plain("cwd", &process.cwd),
                    plain("user", user),
                ]
            }
            Shown::Variables => {
                let pair = |entry: &String| {
                    let (name, value) = entry.split_once('=').unwrap_or((entry, ""));
                    plain(name, value)
                };
                process.env.iter().map(pair).collect()
            }
            Shown::Mounts => {
                let mounts = step.mounts();
                mounts.iter().map(|mount| plain(&mount.path, mount.kind)).collect()
            }
            Shown::Directory(path) => self.directory(&session, &step, &path).await?,
        };
        Ok(json!({"variables": variables}))
    }

    async fn directory(
        &mut self,
        session: &Session,
        step: &Step,
        path: &str,
    ) -> Result<Vec<Value>> {
        let container = session.build.container(step).await?;
        let entries = container.list(path).await;
        container.release().await;
        let mut variables = Vec::new();
        for entry in entries? {
            let FileEntry { name, size, link, .. } = &entry;
            let (value, number) = match () {
                () if entry.is_dir() => {
                    let below = format!("{}/{name}", path.trim_end_matches('/'));
                    ("directory".to_owned(), self.show(Shown::Directory(below))?)
                }
                () if !link.is_empty() => (format!("-> {link}"), 0),
                () => (format!("{size} bytes"), 0),
            };
            variables.push(json!({"name": name, "value": value, "variablesReference": number}));
        }
        Ok(variables)
    }

    async fn evaluate(&mut self, arguments: &Value) -> Result<Value> {
        let (session, step) = self.here().await?;
        let expression = arguments["expression"].as_str().unwrap_or_default();
        let process = step.invocation(Vec::new(), false);
        let name = expression.trim().trim_start_matches('$').trim_matches(['{', '}']);
        let entry = process.env.iter().find_map(|e| e.strip_prefix(name)?.strip_prefix('='));
        if let Some(value) = entry {
            return Ok(json!({"result": value, "variablesReference": 0}));
        }
        let words = words(expression)?;
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let container = match words.as_slice() {
            ["exec", _, ..] | ["ls" | "cat", _] => session.build.container(&step).await?,
            _ => {
                return Err(Fault::invalid(format!("{expression:?} is nothing to evaluate"))
                    .hint("want a variable, exec COMMAND, ls DIR or cat FILE"));
            }
        };
        let mut output = Vec::new();
        let work = async {
            match words.as_slice() {
                ["exec", command @ ..] => {
                    let command = command.iter().map(|w| (*w).to_owned()).collect();
                    let mut process = container.start(step.invocation(command, false)).await?;
                    process.input.close().await;
                    while let Some(event) = process.next().await? {
                        match event {
                            Event::Stdout(data) | Event::Stderr(data) => {
                                let room = MAX_OUTPUT.saturating_sub(output.len());
                                output.extend_from_slice(&data[..data.len().min(room)]);
                            }
                            Event::Exited(0, _) => {}
                            Event::Exited(_, Some(fault)) => return Err(fault),
                            Event::Exited(code, None) => {
                                output.extend(format!("exit code: {code}\n").into_bytes());
                            }
                        }
                    }
                }
                ["ls", path] => output = listing(&container.list(path).await?).into_bytes(),
                ["cat", path] => {
                    let mut add = |data: &[u8]| match output.len() + data.len() <= MAX_OUTPUT {
                        true => {
                            output.extend_from_slice(data);
                            Ok(())
                        }
                        false => Err(Fault::invalid(format!("{path} is too large to be shown"))),
                    };
                    container.read(path, &mut add).await?;
                }
                _ => {}
            }
            Ok(())
        };
        let done = work.await;
        container.release().await;
        done?;
        Ok(json!({"result": String::from_utf8_lossy(&output), "variablesReference": 0}))
    }

    fn exception(&self) -> Result<Value> {
        let failure = match &self.state {
            State::Stopped(stop) => stop.failure.as_ref(),
            _ => None,
        };
        let fault = failure.ok_or_else(|| Fault::invalid("nothing failed"))?;
        Ok(json!({
            "exceptionId": "failed step",
            "description": fault.to_string(),
            "breakMode": "always",
        }))
    }
}
