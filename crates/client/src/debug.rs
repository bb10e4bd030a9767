//! Builds that stay open when they fail, and steps to look into (rows `bx.debug.build`, `gw.ctr.*`,
//! `gw.exec.*`): containers over a step's states, processes in them, and files.

use std::{collections::BTreeMap, sync::Arc};

use bytes::Bytes;
use prost::Message as _;
use shipway_fault::{Context as _, Detail, Fault, Result, SourceFile, Span, Subject};
use shipway_grpc::fault_of;
use shipway_proto::{
    fsutil::types::Stat,
    moby::buildkit::v1::frontend::{
        self as wire, exec_message::Input, llb_bridge_client::LlbBridgeClient,
    },
    pb,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Streaming, metadata::AsciiMetadataValue};

use crate::{
    Client, Definition, Outcome, SolveOptions, Status,
    driven::{self, Driven},
    question::{self, gateway, of_build},
    token::Calls,
};

/// What asks our daemon for a failed step that it keeps, and the option that says which.
const FAILED_STEP: &str = "shipway.failed-step.v0";
const STEP: &str = "id";
/// Bytes of a file that are asked for at once.
const PIECE: i64 = 4 << 20;
/// Messages to a process that wait.
const QUEUE: usize = 16;

/// A state of a result.
#[derive(Clone, Debug)]
pub struct BuildState {
    /// Its platform; empty if the result has no other.
    pub platform: String,
    /// Its id in the build; empty for one without files.
    pub id: String,
    /// What makes it, encoded.
    pub definition: Option<Vec<u8>>,
    /// The image's config, as the frontend wrote it.
    pub config: Option<Vec<u8>>,
}

/// A place in a Dockerfile.
#[derive(Clone, Debug, PartialEq)]
pub struct Place {
    /// The text.
    pub file: Arc<SourceFile>,
    /// Where in it.
    pub spans: Vec<Span>,
}

/// A mount of a step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StepMount {
    /// Where it is.
    pub path: String,
    /// What it is: `bind`, `cache`, `tmpfs`, `secret`, `ssh`.
    pub kind: &'static str,
    /// Whether it cannot be written.
    pub readonly: bool,
    /// Whether what it showed is not there any more; it is empty then.
    pub lost: bool,
}

/// A step of a build, or a result, with what it sees: its mounts, environment, directory, user.
#[derive(Clone, Debug)]
pub struct Step {
    exec: pb::ExecOp,
    platform: Option<pb::Platform>,
    constraints: Option<pb::WorkerConstraints>,
    /// States of the mounts.
    states: Vec<String>,
    /// What it is called in progress.
    pub name: String,
    /// Where it is written.
    pub place: Option<Place>,
}

/// A process to start.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Invocation {
    /// Arguments, at least one.
    pub args: Vec<String>,
    /// `NAME=value`.
    pub env: Vec<String>,
    /// Working directory.
    pub cwd: String,
    /// User, by name or number; empty for root.
    pub user: String,
    /// Whether it has a terminal.
    pub tty: bool,
}

/// A process in a root file system alone.
fn in_root() -> pb::ExecOp {
    let root = pb::Mount { dest: "/".into(), input: 0, output: -1, ..Default::default() };
    let meta = pb::Meta { cwd: "/".into(), ..Default::default() };
    pb::ExecOp { meta: Some(meta), mounts: vec![root], ..Default::default() }
}

impl Step {
    /// The step that failed with `fault`, if the daemon says what it left.
    pub fn of_failure(fault: &Fault) -> Option<Self> {
        let solve = fault.details().iter().find_map(|detail| match detail {
            Detail::Solve { input_ids, mount_ids, op, subject, description } => {
                Some((input_ids, mount_ids, op, subject, description))
            }
            _ => None,
        });
        let (inputs, mounts, op, subject, description) = solve?;
        let op = pb::Op::decode(&**op).ok()?;
        let name = description.get("llb.customname").cloned().unwrap_or_default();
        let place = fault.details().iter().find_map(|detail| match detail {
            Detail::Source { file, spans } => {
                Some(Place { file: file.clone(), spans: spans.clone() })
            }
            _ => None,
        });
        let (platform, constraints) = (op.platform, op.constraints);
        if let Some(pb::op::Op::Exec(exec)) = op.op
            && !mounts.is_empty()
        {
            let states = mounts.clone();
            return Some(Self { exec, platform, constraints, states, name, place });
        }
        // Of what runs no process, what it worked on can be looked into.
        let known = |id: &&String| !id.is_empty();
        let input = match subject {
            Some(Subject::CacheInput(n)) => usize::try_from(*n).ok().and_then(|n| inputs.get(n)),
            _ => None,
        };
        let state = input.filter(known).or_else(|| mounts.iter().rev().chain(inputs).find(known));
        let states = vec![state?.clone()];
        Some(Self { exec: in_root(), platform, constraints, states, name, place })
    }

    /// The operation `op`, encoded, over the states of its inputs.
    pub fn of_op(op: &[u8], inputs: &[String], name: String) -> Result<Self> {
        let op = pb::Op::decode(op)
            .map_err(|e| Fault::invalid(format!("failed to parse an operation: {e}")))?;
        let state = |n: i64| {
            let n = usize::try_from(n).ok();
            n.and_then(|n| inputs.get(n)).cloned().unwrap_or_default()
        };
        let (exec, states) = match op.op {
            Some(pb::op::Op::Exec(exec)) => {
                let states = exec.mounts.iter().map(|m| state(m.input)).collect();
                (exec, states)
            }
            _ => {
                let states = vec![state(0)];
                (in_root(), states)
            }
        };
        let (platform, constraints) = (op.platform, op.constraints);
        Ok(Self { exec, platform, constraints, states, name, place: None })
    }

    /// A result, in which its image's own program would run.
    pub fn of_result(state: &BuildState) -> Self {
        let states = vec![state.id.clone()];
        let mut exec = in_root();
        let config: serde_json::Value = state
            .config
            .as_deref()
            .and_then(|c| serde_json::from_slice(c).ok())
            .unwrap_or_default();
        let list = |key: &str| -> Vec<String> {
            let all = config["config"][key].as_array().into_iter().flatten();
            all.filter_map(|v| v.as_str().map(str::to_owned)).collect()
        };
        let text = |key: &str| config["config"][key].as_str().unwrap_or_default().to_owned();
        let cwd = text("WorkingDir");
        exec.meta = Some(pb::Meta {
            args: [list("Entrypoint"), list("Cmd")].concat(),
            env: list("Env"),
            cwd: if cwd.is_empty() { "/".to_owned() } else { cwd },
            user: text("User"),
            ..Default::default()
        });
        Self {
            exec,
            platform: None,
            constraints: None,
            states,
            name: "result".to_owned(),
            place: None,
        }
    }

    fn meta(&self) -> pb::Meta {
        self.exec.meta.clone().unwrap_or_default()
    }

    /// The process `args` in the place of the step's own; its own if there are none.
    pub fn invocation(&self, args: Vec<String>, tty: bool) -> Invocation {
        let meta = self.meta();
        Invocation {
            args: if args.is_empty() { meta.args } else { args },
            env: meta.env,
            cwd: meta.cwd,
            user: meta.user,
            tty,
        }
    }

    /// Its mounts.
    pub fn mounts(&self) -> Vec<StepMount> {
        let kind = |m: &pb::Mount| match m.mount_type() {
            pb::MountType::Bind => "bind",
            pb::MountType::Secret => "secret",
            pb::MountType::Ssh => "ssh",
            pb::MountType::Cache => "cache",
            pb::MountType::Tmpfs => "tmpfs",
        };
        let mounts = self.exec.mounts.iter().zip(&self.states);
        mounts
            .map(|(m, state)| StepMount {
                path: m.dest.clone(),
                kind: kind(m),
                readonly: m.readonly,
                lost: m.input >= 0 && state.is_empty(),
            })
            .collect()
    }

    /// The same without what only the build's own client has: secrets and agents.
    #[must_use]
    pub fn without_session(mut self) -> Self {
        let all = std::mem::take(&mut self.exec.mounts).into_iter();
        let all = all.zip(std::mem::take(&mut self.states));
        let is_ours = |(mount, _): &(pb::Mount, String)| {
            !matches!(mount.mount_type(), pb::MountType::Secret | pb::MountType::Ssh)
        };
        (self.exec.mounts, self.states) = all.filter(is_ours).unzip();
        self.exec.secretenv.clear();
        self
    }
}

/// A build that the caller drives; it ends when this is dropped.
pub struct DebugBuild {
    driven: Driven,
    ask: wire::SolveRequest,
    result: wire::Result,
}

impl Client {
    /// Begins a build with a frontend, for looking into. Events go to `events` as they come.
    pub async fn debug(
        &self,
        mut options: SolveOptions,
        events: mpsc::Sender<Status>,
    ) -> Result<DebugBuild> {
        if options.frontend.is_empty() {
            return Err(Fault::invalid("a build that is looked into needs a frontend"));
        }
        let ask = driven::ask_frontend(&mut options);
        let driven = Driven::begin(self, options, events).await?;
        Ok(DebugBuild { driven, ask, result: wire::Result::default() })
    }
}

/// Enters the failed step that the daemon of `client` keeps under `id`; gives the failure as well.
pub async fn failed_step(client: &Client, id: &str) -> Result<(DebugBuild, Fault, Step)> {
    let options = SolveOptions { internal: true, ..SolveOptions::default() };
    let ask = wire::SolveRequest {
        frontend: FAILED_STEP.to_owned(),
        frontend_opt: BTreeMap::from([(STEP.to_owned(), id.to_owned())]),
        allow_result_return: true,
        allow_result_array_ref: true,
        ..Default::default()
    };
    // Nobody watches.
    let (events, _) = mpsc::channel(1);
    let driven = Driven::begin(client, options, events).await?;
    let mut build = DebugBuild { driven, ask, result: wire::Result::default() };
    let Err(fault) = build.run(false).await else {
        return Err(Fault::internal("a failed step was kept without its failure"));
    };
    let Some(step) = Step::of_failure(&fault) else {
        build.discard().await;
        return Err(match fault.to_string().contains("invalid frontend") {
            true => Fault::unimplemented("failed steps after their builds")
                .hint("this daemon keeps none: use `shipway debug build`"),
            false => fault,
        });
    };
    Ok((build, fault, step.without_session()))
}

impl DebugBuild {
    /// The build's id.
    pub fn reference(&self) -> &str {
        &self.driven.reference
    }

    /// Runs the frontend, and all steps of its result if `evaluate` says so.
    pub async fn run(&mut self, evaluate: bool) -> Result<Vec<BuildState>> {
        let ask = wire::SolveRequest { evaluate, ..self.ask.clone() };
        self.result = self.driven.solve(ask).await.map_err(|s| fault_of(&s))?;
        Ok(states(&self.result))
    }

    /// The state that `definition` makes, solved when it is needed; empty if it has no files.
    pub async fn solve(&self, definition: Definition) -> Result<String> {
        let ask = wire::SolveRequest {
            definition: Some(definition.into_wire()),
            allow_result_return: true,
            allow_result_array_ref: true,
            ..Default::default()
        };
        let result = self.driven.solve(ask).await.map_err(|s| fault_of(&s))?;
        Ok(states(&result).into_iter().next().map(|state| state.id).unwrap_or_default())
    }

    /// Solves a state now.
    pub async fn evaluate(&self, state: &str) -> Result<()> {
        if state.is_empty() {
            return Ok(());
        }
        let request = wire::EvaluateRequest { r#ref: state.to_owned() };
        let mut gateway = gateway(self.driven.calls.clone());
        let done = gateway.evaluate(of_build(request, &self.driven.id)).await;
        done.map(drop).map_err(|s| fault_of(&s))
    }

    /// Takes the mounts of `step` into a container.
    pub async fn container(&self, step: &Step) -> Result<DebugContainer> {
        let name = shipway_host::random_id()?;
        let mounts = step.exec.mounts.iter().zip(&step.states);
        let mounts = mounts.map(|(mount, state)| pb::Mount {
            input: -1,
            output: -1,
            result_id: state.clone(),
            ..mount.clone()
        });
        let meta = step.meta();
        let request = wire::NewContainerRequest {
            container_id: name.clone(),
            mounts: mounts.collect(),
            network: step.exec.network,
            platform: step.platform.clone(),
            constraints: step.constraints.clone(),
            extra_hosts: meta.extra_hosts,
            hostname: meta.hostname,
        };
        let mut bridge = gateway(self.driven.calls.clone());
        let made = bridge.new_container(of_build(request, &self.driven.id)).await;
        made.map_err(|s| fault_of(&s).context("enter the step"))?;
        Ok(DebugContainer {
            gateway: bridge,
            build: self.driven.id.clone(),
            name,
            step: step.clone(),
        })
    }

    /// Ends the build with the result that its frontend gave last, which is exported.
    pub async fn finish(self) -> Result<Outcome> {
        let reference = self.driven.reference.clone();
        let done = wire::ReturnRequest { result: Some(self.result), error: None };
        let response = self.driven.end(done).await.context(|| "failed to solve")?;
        Ok(Outcome { reference, response })
    }

    /// Ends the build with the failure `fault`; gives what the daemon says of it.
    pub async fn fail(self, fault: Fault) -> Fault {
        let error = question::status_of(&shipway_grpc::status_of(&fault));
        let done = wire::ReturnRequest { result: None, error: Some(error) };
        self.driven.end(done).await.err().unwrap_or(fault).context("failed to solve")
    }

    /// Ends the build without a result.
    pub async fn discard(self) {
        let done = wire::ReturnRequest { result: Some(wire::Result::default()), error: None };
        if let Err(fault) = self.driven.end(done).await {
            tracing::debug!("end a build that was looked into: {fault}");
        }
    }
}

fn states(result: &wire::Result) -> Vec<BuildState> {
    use wire::result::Result as Kind;
    let refs = match &result.result {
        Some(Kind::Ref(one)) => vec![(String::new(), one)],
        Some(Kind::Refs(all)) => all.refs.iter().map(|(p, r)| (p.clone(), r)).collect(),
        _ => Vec::new(),
    };
    let state = |(platform, state): (String, &wire::Ref)| {
        let key = match platform.is_empty() {
            true => "containerimage.config".to_owned(),
            false => format!("containerimage.config/{platform}"),
        };
        BuildState {
            id: state.id.clone(),
            definition: state.def.as_ref().map(prost::Message::encode_to_vec),
            config: result.metadata.get(&key).cloned(),
            platform,
        }
    };
    refs.into_iter().map(state).collect()
}

/// A container over a step's mounts. Its first process is its init: the others end with it.
#[derive(Clone)]
pub struct DebugContainer {
    gateway: LlbBridgeClient<Calls>,
    build: AsciiMetadataValue,
    name: String,
    step: Step,
}

/// A file in a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileEntry {
    /// Its name.
    pub name: String,
    /// Type and permissions, as Go has them.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Bytes.
    pub size: i64,
    /// Nanoseconds since 1970.
    pub modified: i64,
    /// What a symbolic link leads to.
    pub link: String,
}

impl FileEntry {
    fn of(stat: Stat) -> Self {
        Self {
            name: stat.path,
            mode: stat.mode,
            uid: stat.uid,
            gid: stat.gid,
            size: stat.size,
            modified: stat.mod_time,
            link: stat.linkname,
        }
    }

    /// Whether it is a directory.
    pub fn is_dir(&self) -> bool {
        self.mode & (1 << 31) != 0
    }

    /// Whether it is a regular file.
    pub fn is_file(&self) -> bool {
        // Go's type bits: directory, symbolic link, device, pipe, socket, character device, other.
        self.mode & 0x8f28_0000 == 0
    }
}

impl DebugContainer {
    /// The step that it is of.
    pub fn step(&self) -> &Step {
        &self.step
    }

    /// The mount that has `path`, and the path in it.
    fn place(&self, path: &str) -> Result<(i32, String)> {
        if !path.starts_with('/') {
            return Err(Fault::invalid(format!("{path:?} is not an absolute path")));
        }
        let below = |dest: &str| {
            let rest = path.strip_prefix(dest.trim_end_matches('/'))?;
            (rest.is_empty() || rest.starts_with('/')).then_some(rest)
        };
        let mounts = self.step.exec.mounts.iter().enumerate();
        let found = mounts
            .filter_map(|(n, mount)| Some((n, mount, below(&mount.dest)?)))
            .max_by_key(|(_, mount, _)| mount.dest.len());
        let (n, mount, rest) =
            found.ok_or_else(|| Fault::not_found(format!("{path} is in no mount of the step")))?;
        let n = i32::try_from(n).map_err(|_| Fault::invalid("a step has too many mounts"))?;
        Ok((
            n,
            format!("{}/{}", mount.selector.trim_end_matches('/'), rest.trim_start_matches('/')),
        ))
    }

    /// What is at `path`.
    pub async fn stat(&self, path: &str) -> Result<FileEntry> {
        let (mount_index, inside) = self.place(path)?;
        let request = wire::StatFileRequest { r#ref: self.name.clone(), path: inside, mount_index };
        let answer = self.gateway.clone().stat_file_container(of_build(request, &self.build)).await;
        let stat = answer.map_err(|s| fault_of(&s))?.into_inner().stat.unwrap_or_default();
        Ok(FileEntry::of(stat))
    }

    /// What the directory `path` has.
    pub async fn list(&self, path: &str) -> Result<Vec<FileEntry>> {
        let (mount_index, dir_path) = self.place(path)?;
        let request = wire::ReadDirRequest {
            r#ref: self.name.clone(),
            dir_path,
            mount_index,
            ..Default::default()
        };
        let answer = self.gateway.clone().read_dir_container(of_build(request, &self.build)).await;
        let entries = answer.map_err(|s| fault_of(&s))?.into_inner().entries;
        Ok(entries.into_iter().map(FileEntry::of).collect())
    }

    /// Gives the contents of the file `path` to `write`, piece by piece.
    pub async fn read(&self, path: &str, mut write: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
        let (mount_index, file_path) = self.place(path)?;
        let mut offset = 0;
        loop {
            let request = wire::ReadFileRequest {
                r#ref: self.name.clone(),
                file_path: file_path.clone(),
                range: Some(wire::FileRange { offset, length: PIECE }),
                mount_index,
            };
            let read =
                self.gateway.clone().read_file_container(of_build(request, &self.build)).await;
            let data = read.map_err(|s| fault_of(&s))?.into_inner().data;
            write(&data)?;
            let length = i64::try_from(data.len()).unwrap_or(i64::MAX);
            if length < PIECE {
                return Ok(());
            }
            offset += length;
        }
    }

    /// Starts a process.
    pub async fn start(&self, invocation: Invocation) -> Result<DebugProcess> {
        let (to, queue) = mpsc::channel(QUEUE);
        let id = shipway_host::random_id()?;
        let Invocation { args, env, cwd, user, tty } = invocation;
        let init = wire::InitMessage {
            container_id: self.name.clone(),
            meta: Some(pb::Meta { args, env, cwd, user, ..Default::default() }),
            fds: vec![0, 1, 2],
            tty,
            security: self.step.exec.security,
            secretenv: self.step.exec.secretenv.clone(),
        };
        let input = ProcessInput { to, id };
        input.tell(Input::Init(init)).await;
        let stream = of_build(ReceiverStream::new(queue), &self.build);
        let from = self.gateway.clone().exec_process(stream).await;
        let from = from.map_err(|s| fault_of(&s).context("start a process in the step"))?;
        Ok(DebugProcess { from: from.into_inner(), input })
    }

    /// Ends its processes, and gives the mounts back.
    pub async fn release(mut self) {
        let request = wire::ReleaseContainerRequest { container_id: self.name };
        // That there were processes to end is not of interest, nor is a daemon that has gone.
        let _ = self.gateway.release_container(of_build(request, &self.build)).await;
    }
}

/// What leads to a process. What is sent to one that has ended is dropped.
#[derive(Clone)]
pub struct ProcessInput {
    to: mpsc::Sender<wire::ExecMessage>,
    id: String,
}

impl ProcessInput {
    async fn tell(&self, input: Input) {
        let message = wire::ExecMessage { process_id: self.id.clone(), input: Some(input) };
        let _ = self.to.send(message).await;
    }

    /// Writes to its standard input.
    pub async fn write(&self, data: Bytes) {
        self.tell(Input::File(wire::FdMessage { fd: 0, eof: false, data: data.to_vec() })).await;
    }

    /// Ends its standard input.
    pub async fn close(&self) {
        self.tell(Input::File(wire::FdMessage { fd: 0, eof: true, data: Vec::new() })).await;
    }

    /// Changes the size of its terminal.
    pub async fn resize(&self, rows: u32, cols: u32) {
        self.tell(Input::Resize(wire::ResizeMessage { rows, cols })).await;
    }

    /// Sends a signal, by its name without `SIG`.
    pub async fn signal(&self, name: &str) {
        self.tell(Input::Signal(wire::SignalMessage { name: name.to_owned() })).await;
    }
}

/// What a process does.
#[derive(Clone, Debug)]
pub enum Event {
    /// It writes to standard output, or to its terminal.
    Stdout(Bytes),
    /// It writes to standard error.
    Stderr(Bytes),
    /// It ended with this code; the reason if it never ran.
    Exited(u32, Option<Fault>),
}

/// A process in a container.
pub struct DebugProcess {
    from: Streaming<wire::ExecMessage>,
    /// What leads to it.
    pub input: ProcessInput,
}

/// The code of a process that has none of its own.
const UNKNOWN_EXIT: u32 = 255;

impl DebugProcess {
    /// What it does next; `None` when it has ended and everything was said.
    pub async fn next(&mut self) -> Result<Option<Event>> {
        while let Some(message) = self.from.message().await.map_err(|s| fault_of(&s))? {
            let data = |file: wire::FdMessage| Bytes::from(file.data);
            return Ok(Some(match message.input {
                Some(Input::File(file)) if file.data.is_empty() => continue,
                Some(Input::File(file)) if file.fd == 2 => Event::Stderr(data(file)),
                Some(Input::File(file)) => Event::Stdout(data(file)),
                Some(Input::Exit(exit)) => {
                    let fault = exit.error.filter(|_| exit.code == UNKNOWN_EXIT).map(|error| {
                        let code = tonic::Code::from_i32(error.code);
                        fault_of(&tonic::Status::new(code, error.message))
                    });
                    Event::Exited(exit.code, fault)
                }
                Some(Input::Done(_)) => return Ok(None),
                _ => continue,
            }));
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failure(
        op: pb::op::Op,
        inputs: &[&str],
        mounts: &[&str],
        subject: Option<Subject>,
    ) -> Fault {
        let list = |ids: &[&str]| ids.iter().map(|id| (*id).to_owned()).collect();
        let op = pb::Op { op: Some(op), ..Default::default() }.encode_to_vec();
        Fault::unknown("exit code: 1").detail(Detail::Solve {
            input_ids: list(inputs),
            mount_ids: list(mounts),
            op,
            subject,
            description: [("llb.customname".to_owned(), "RUN x".to_owned())].into(),
        })
    }

    fn exec() -> pb::op::Op {
        let mount = |dest: &str, input, kind: pb::MountType| pb::Mount {
            dest: dest.into(),
            input,
            mount_type: kind as i32,
            selector: if dest == "/src" { "sub".into() } else { String::new() },
            ..Default::default()
        };
        let meta = pb::Meta {
            args: vec!["false".into()],
            env: vec!["A=1".into()],
            cwd: "/w".into(),
            user: "u".into(),
            ..Default::default()
        };
        pb::op::Op::Exec(pb::ExecOp {
            meta: Some(meta),
            mounts: vec![
                mount("/", 0, pb::MountType::Bind),
                mount("/src", 1, pb::MountType::Bind),
                mount("/run/secrets/s", -1, pb::MountType::Secret),
                mount("/cache", -1, pb::MountType::Cache),
            ],
            secretenv: vec![pb::SecretEnv { id: "s".into(), ..Default::default() }],
            ..Default::default()
        })
    }

    #[test]
    fn a_failed_step_is_entered_where_it_was() {
        let step = Step::of_failure(&failure(exec(), &["i"], &["r", "", "", "c"], None)).unwrap();
        let shown = step.invocation(vec!["sh".into()], true);
        assert_eq!(
            (&*shown.cwd, &*shown.user, shown.env, shown.args),
            ("/w", "u", vec!["A=1".to_owned()], vec!["sh".to_owned()])
        );
        assert_eq!(step.invocation(Vec::new(), false).args, ["false"]);
        let mounts = step.mounts();
        let kinds: Vec<_> = mounts.iter().map(|m| (m.kind, m.lost)).collect();
        assert_eq!(kinds, [("bind", false), ("bind", true), ("secret", false), ("cache", false)]);
        let after = step.without_session();
        assert_eq!(after.mounts().len(), 3);
        assert_eq!(after.states, ["r", "", "c"]);
        assert!(after.exec.secretenv.is_empty());
    }

    #[test]
    fn of_a_step_without_process_its_state_is_entered() {
        let file = || pb::op::Op::File(pb::FileOp::default());
        let root = |inputs: &[&str], mounts: &[&str], subject| {
            Step::of_failure(&failure(file(), inputs, mounts, subject)).map(|s| s.states)
        };
        assert_eq!(root(&["a", "b"], &["", "c", ""], None), Some(vec!["c".to_owned()]));
        assert_eq!(
            root(&["a", "b"], &[], Some(Subject::CacheInput(1))),
            Some(vec!["b".to_owned()])
        );
        assert_eq!(root(&["", ""], &[], Some(Subject::CacheInput(9))), None);
        assert!(Step::of_failure(&Fault::unknown("x")).is_none());
    }

    #[test]
    fn a_result_runs_as_its_image_says() {
        let config = br#"{"config":{"Env":["A=1"],"Cmd":["c"],"Entrypoint":["e"],"User":"u"}}"#;
        let state = BuildState {
            platform: String::new(),
            id: "r".into(),
            definition: None,
            config: Some(config.to_vec()),
        };
        let shown = Step::of_result(&state).invocation(Vec::new(), false);
        assert_eq!(
            (shown.args, &*shown.cwd, &*shown.user),
            (vec!["e".into(), "c".into()], "/", "u")
        );
    }

    #[tokio::test]
    async fn paths_are_found_in_the_mounts_that_have_them() {
        let step = Step::of_failure(&failure(exec(), &[], &["r", "s", "", "c"], None)).unwrap();
        let channel = tonic::transport::Endpoint::from_static("http://127.0.0.1:1").connect_lazy();
        let container = DebugContainer {
            gateway: gateway(Calls::new(channel, None)),
            build: "b".parse().unwrap(),
            name: "c".into(),
            step,
        };
        let place = |path: &str| container.place(path).ok();
        assert_eq!(place("/etc/passwd"), Some((0, "/etc/passwd".into())));
        assert_eq!(place("/src/a/b"), Some((1, "sub/a/b".into())));
        assert_eq!(place("/src"), Some((1, "sub/".into())));
        assert_eq!(place("/srcs"), Some((0, "/srcs".into())));
        assert_eq!(place("/"), Some((0, "/".into())));
        assert_eq!(place("relative"), None);
    }
}
