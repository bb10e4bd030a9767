//! Processes in containers over one stream (rows `gw.exec.*`): messages are distinguished by the id
//! that the client gives each process.

use crate::build::GatewayBuild;
use bytes::Bytes;
use shipway_executor::{Control, ExitStatus, Output, OutputTarget, ProcessIo, Stream};
use shipway_fault::{Code, Detail, Fault, Result};
use shipway_frontend::ContainerProcess;
use shipway_grpc::status_of;
use shipway_llb::{SecretEnv, SecurityMode};
use shipway_proto::{
    google::rpc,
    moby::buildkit::v1::frontend::{self as wire, exec_message::Input},
};
use std::{collections::HashMap, sync::Arc};
use tokio::{
    sync::{mpsc, oneshot},
    task::JoinSet,
};
use tonic::{Status, Streaming};

/// Code of a process whose own is not known (row `gw.exec.exit`).
const UNKNOWN_EXIT: u32 = 255;
/// Messages under way to or from one process.
const QUEUE: usize = 16;

type Answers = mpsc::Sender<Result<wire::ExecMessage, Status>>;

/// The ends that lead to a process.
struct Ends {
    input: Option<mpsc::Sender<Bytes>>,
    control: mpsc::Sender<Control>,
}

/// Serves one stream until the client ends it and all processes have ended, or it goes away.
pub(crate) async fn serve(
    build: Arc<GatewayBuild>,
    mut incoming: Streaming<wire::ExecMessage>,
    answers: Answers,
) {
    let (mut ends, mut running) = (HashMap::new(), JoinSet::new());
    let work = async {
        while let Some(message) = incoming.message().await? {
            handle(&build, message, &mut ends, &mut running, &answers)
                .await
                .map_err(|f| status_of(&f))?;
        }
        ends.clear();
        while running.join_next().await.is_some() {}
        Ok::<_, Status>(())
    };
    let result = tokio::select! {
        result = work => result,
        () = answers.closed() => Ok(()),
    };
    if let Err(status) = result {
        let _ = answers.send(Err(status)).await;
    }
}

async fn handle(
    build: &GatewayBuild,
    message: wire::ExecMessage,
    ends: &mut HashMap<String, Ends>,
    running: &mut JoinSet<()>,
    answers: &Answers,
) -> Result<()> {
    let id = message.process_id;
    if id.is_empty() {
        return Err(Fault::invalid("ProcessID required"));
    }
    let unknown = || Fault::not_found(format!("IO for process {id:?} not found"));
    match message.input {
        Some(Input::Init(init)) => {
            if ends.contains_key(&id) {
                return Err(Fault::new(
                    Code::AlreadyExists,
                    format!("Process {id} already exists"),
                ));
            }
            let (process, theirs) = start(build, id.clone(), init, answers.clone())?;
            ends.insert(id, theirs);
            running.spawn(shipway_task::named("run a process", process));
        }
        Some(Input::File(file)) => {
            let process = ends.get_mut(&id).ok_or_else(unknown)?;
            if let Some(input) =
                process.input.as_ref().filter(|_| file.fd == 0 && !file.data.is_empty())
            {
                // A process that has ended reads no more.
                let _ = input.send(file.data.into()).await;
            }
            if file.eof && file.fd == 0 {
                process.input = None;
            }
        }
        Some(Input::Resize(size)) => {
            let control = Control::Resize { rows: size.rows, columns: size.cols };
            let _ = ends.get(&id).ok_or_else(unknown)?.control.send(control).await;
        }
        Some(Input::Signal(signal)) => {
            let number = number(&signal.name)
                .ok_or_else(|| Fault::invalid(format!("Unknown signal {}", signal.name)))?;
            let _ = ends.get(&id).ok_or_else(unknown)?.control.send(Control::Signal(number)).await;
        }
        Some(Input::Started(_) | Input::Exit(_) | Input::Done(_)) | None => {}
    }
    Ok(())
}

/// A process, and the ends that lead to it.
fn start(
    build: &GatewayBuild,
    id: String,
    init: wire::InitMessage,
    answers: Answers,
) -> Result<(impl Future<Output = ()> + Send + 'static, Ends)> {
    let name = &init.container_id;
    let entered = build.enter_container(name);
    let (container, path, first) = entered.ok_or_else(|| {
        Fault::not_found(format!("container {name:?} previously released or not created"))
    })?;
    let fds = init.fds.clone();
    let (control, changes) = mpsc::channel(QUEUE);
    let (output, said) = mpsc::channel(QUEUE);
    let (started, runs) = oneshot::channel();
    // Only of the first one, which the others need, is the start awaited: clients do not read
    // another's start while they read output.
    let started = first.then_some(started);
    let (input, read) = if fds.contains(&0) { mpsc::channel(QUEUE) } else { mpsc::channel(1) };
    let io = ProcessIo {
        input: fds.contains(&0).then_some(read),
        output: OutputTarget::Queue(output),
        control: Some(changes),
        started,
    };
    let end = match process(init, path) {
        Ok(process) => container.start(process, io),
        Err(fault) => Box::pin(std::future::ready(Err(fault))),
    };
    let input = fds.contains(&0).then_some(input);
    let life = async move {
        let _ = follow(Said { id, answers, fds }, end, runs, said).await;
    };
    Ok((life, Ends { input, control }))
}

/// Messages about one process.
struct Said {
    id: String,
    answers: Answers,
    fds: Vec<u32>,
}

impl Said {
    async fn send(
        &self,
        input: Input,
    ) -> Result<(), mpsc::error::SendError<Result<wire::ExecMessage, Status>>> {
        self.answers
            .send(Ok(wire::ExecMessage { process_id: self.id.clone(), input: Some(input) }))
            .await
    }

    /// Output that the client has no place for is dropped.
    async fn output(
        &self,
        output: Output,
    ) -> Result<(), mpsc::error::SendError<Result<wire::ExecMessage, Status>>> {
        let fd = match output.stream {
            Stream::Stdout => 1,
            Stream::Stderr => 2,
        };
        if !self.fds.contains(&fd) {
            return Ok(());
        }
        self.send(Input::File(wire::FdMessage { fd, eof: false, data: output.bytes.to_vec() }))
            .await
    }
}

/// Reports a process to the client: that it started, what it writes, how it ended, and that this
/// was all.
async fn follow(
    said: Said,
    end: impl Future<Output = Result<ExitStatus>>,
    runs: oneshot::Receiver<()>,
    mut output: mpsc::Receiver<Output>,
) -> Result<(), mpsc::error::SendError<Result<wire::ExecMessage, Status>>> {
    let mut end = std::pin::pin!(end);
    let mut ended = None;
    tokio::select! {
        _ = runs => {}
        // One that could not start is said to have started, and to have ended.
        result = &mut end => ended = Some(result),
    }
    said.send(Input::Started(wire::StartedMessage {})).await?;
    let result = loop {
        if let Some(result) = ended.take() {
            break result;
        }
        tokio::select! {
            Some(piece) = output.recv() => said.output(piece).await?,
            result = &mut end => ended = Some(result),
        }
    };
    while let Some(piece) = output.recv().await {
        said.output(piece).await?;
    }
    for fd in said.fds.iter().copied().filter(|fd| *fd != 0) {
        said.send(Input::File(wire::FdMessage { fd, eof: true, data: Vec::new() })).await?;
    }
    said.send(Input::Exit(exit(result))).await?;
    said.send(Input::Done(wire::DoneMessage {})).await
}

fn exit(result: Result<ExitStatus>) -> wire::ExitMessage {
    let (code, fault) = match result {
        Ok(ExitStatus { code: 0, .. }) => return wire::ExitMessage::default(),
        Ok(status) => (
            status.code,
            Fault::unknown(format!("exit code: {}", status.code)).detail(Detail::Exit(status.code)),
        ),
        Err(fault) => (UNKNOWN_EXIT, fault),
    };
    let status = status_of(&fault);
    let details = <rpc::Status as prost::Message>::decode(status.details())
        .map(|s| s.details)
        .unwrap_or_default();
    let error =
        rpc::Status { code: status.code() as i32, message: status.message().to_owned(), details };
    wire::ExitMessage { code, error: Some(error) }
}

/// What is to be started; `path` is the PATH of a process that names none.
fn process(init: wire::InitMessage, path: &str) -> Result<ContainerProcess> {
    let meta = init.meta.unwrap_or_default();
    if meta.args.is_empty() {
        return Err(Fault::invalid("a process needs arguments"));
    }
    let mut env = meta.env;
    let mut default = |name: &str, value: &str| {
        if !env.iter().any(|e| e.split('=').next() == Some(name)) {
            env.push(format!("{name}={value}"));
        }
    };
    default("PATH", path);
    if init.tty {
        default("TERM", "xterm");
    }
    Ok(ContainerProcess {
        args: meta.args,
        env,
        secret_env: init
            .secretenv
            .into_iter()
            .map(|s| SecretEnv { id: s.id, name: s.name, optional: s.optional })
            .collect(),
        cwd: meta.cwd,
        user: meta.user,
        tty: init.tty,
        security: SecurityMode::from_wire(init.security)?,
        remove_mount_stubs_recursive: meta.remove_mount_stubs_recursive,
    })
}

/// A signal's number on Linux, by its name without `SIG` (row `gw.exec.signal`).
fn number(name: &str) -> Option<u32> {
    const NAMES: [&str; 31] = [
        "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2",
        "PIPE", "ALRM", "TERM", "STKFLT", "CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG",
        "XCPU", "XFSZ", "VTALRM", "PROF", "WINCH", "IO", "PWR", "SYS",
    ];
    let number = match name {
        "IOT" => 6,
        "CLD" => 17,
        "POLL" => 29,
        name => NAMES.iter().position(|n| *n == name)? as u32 + 1,
    };
    Some(number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_are_known_by_name() {
        for (name, expected) in [
            ("HUP", Some(1)),
            ("KILL", Some(9)),
            ("TERM", Some(15)),
            ("SYS", Some(31)),
            ("SIGHUP", None),
            ("", None),
        ] {
            assert_eq!(number(name), expected, "{name}");
        }
    }

    #[test]
    fn ends_have_a_code_and_a_reason() {
        let code = |result| {
            let message = exit(result);
            (message.code, message.error.map(|e| e.message).unwrap_or_default())
        };
        assert_eq!(code(Ok(ExitStatus::default())), (0, String::new()));
        assert_eq!(
            code(Ok(ExitStatus { code: 99, ..Default::default() })),
            (99, "exit code: 99".into())
        );
        assert_eq!(code(Err(Fault::cancelled())), (255, "context canceled".into()));
    }

    #[tokio::test]
    async fn a_process_is_told_of_in_order() {
        let (answers, mut received) = mpsc::channel(16);
        let (started, runs) = oneshot::channel();
        let (out, output) = mpsc::channel(16);
        let said = Said { id: "p".into(), answers, fds: vec![0, 1] };
        for stream in [Stream::Stdout, Stream::Stderr] {
            out.send(Output { stream, bytes: Bytes::from_static(b"x") }).await.expect("room");
        }
        started.send(()).expect("somebody waits");
        drop(out);
        follow(said, async { Ok(ExitStatus::default()) }, runs, output)
            .await
            .expect("somebody listens");
        let mut kinds = Vec::new();
        while let Some(Ok(message)) = received.recv().await {
            kinds.push(match message.input {
                Some(Input::Started(_)) => "started",
                Some(Input::File(f)) if f.eof => "eof",
                Some(Input::File(_)) => "output",
                Some(Input::Exit(_)) => "exit",
                Some(Input::Done(_)) => "done",
                _ => "other",
            });
        }
        assert_eq!(kinds, ["started", "output", "eof", "exit", "done"]);
    }
}
