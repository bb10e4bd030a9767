//! Processes in a step's container: one at a time is at the terminal, the others go on without.

use std::{
    io::Write,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use parking_lot::Mutex;
use shipway_client::{DebugContainer, DebugProcess, Event, Invocation, ProcessInput};
use shipway_fault::{Fault, Result};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::{mpsc, watch},
};
use tokio_util::task::AbortOnDropHandle;

use super::{
    quoted,
    terminal::{Key, Terminal, Typed},
};

/// Events that wait for the terminal.
const QUEUE: usize = 16;

/// How a process ended: its code, or why it has none.
type Ended = Option<std::result::Result<u32, Fault>>;

/// A process that was started.
struct Running {
    number: usize,
    command: String,
    tty: bool,
    input: ProcessInput,
    /// Where what it says goes, while it is at the terminal.
    sink: Arc<Mutex<Option<mpsc::Sender<Event>>>>,
    /// What it says first, until it is at the terminal.
    first: Mutex<Option<mpsc::Receiver<Event>>>,
    ended: watch::Receiver<Ended>,
    _life: AbortOnDropHandle<()>,
}

/// What became of a process at the terminal.
#[derive(Debug)]
pub(crate) enum Attached {
    /// It ended, with this code.
    Ended(u32),
    /// The person went away from it.
    Away,
}

/// The processes of one container.
#[derive(Default)]
pub(crate) struct Processes {
    all: Vec<Running>,
    last: AtomicUsize,
}

impl Processes {
    /// Starts a process; gives its number.
    pub(crate) async fn start(
        &mut self,
        container: &DebugContainer,
        invocation: Invocation,
    ) -> Result<usize> {
        let number = self.last.fetch_add(1, Ordering::Relaxed);
        let command: Vec<String> = invocation.args.iter().map(|a| quoted(a)).collect();
        let tty = invocation.tty;
        let process = container.start(invocation).await?;
        let input = process.input.clone();
        let (to, first) = mpsc::channel(QUEUE);
        let sink = Arc::new(Mutex::new(Some(to)));
        let (end, ended) = watch::channel(None);
        let life = shipway_task::spawn("follow a process", follow(process, sink.clone(), end));
        self.all.push(Running {
            number,
            command: command.join(" "),
            tty,
            input,
            sink,
            first: Mutex::new(Some(first)),
            ended,
            _life: AbortOnDropHandle::new(life),
        });
        Ok(number)
    }

    /// Puts a process at the terminal, until it ends or the person goes away.
    pub(crate) async fn attach(&self, number: usize, terminal: &mut Terminal) -> Result<Attached> {
        let running = self.find(number)?;
        let first = running.first.lock().take();
        let mut events = first.unwrap_or_else(|| {
            let (to, events) = mpsc::channel(QUEUE);
            // Of one that has ended nothing more comes.
            if running.ended.borrow().is_none() {
                *running.sink.lock() = Some(to);
            }
            events
        });
        let raw = running.tty.then(|| terminal.raw()).transpose()?;
        let done = converse(running, terminal, &mut events).await;
        *running.sink.lock() = None;
        drop(raw);
        done
    }

    fn find(&self, number: usize) -> Result<&Running> {
        self.all.iter().find(|r| r.number == number).ok_or_else(|| {
            Fault::not_found(format!("no process {number}")).hint("`ps` lists processes")
        })
    }

    /// The process that was started last and runs still.
    pub(crate) fn latest(&self) -> Option<usize> {
        let running = self.all.iter().rev().find(|r| r.ended.borrow().is_none());
        running.map(|r| r.number)
    }

    /// Kills a process.
    pub(crate) async fn kill(&self, number: usize) -> Result<()> {
        self.find(number)?.input.signal("KILL").await;
        Ok(())
    }

    /// Number, state and command of each, a line each.
    pub(crate) fn list(&self) -> String {
        let line = |running: &Running| {
            let state = match &*running.ended.borrow() {
                None => "running".to_owned(),
                Some(Ok(code)) => format!("exited {code}"),
                Some(Err(_)) => "failed".to_owned(),
            };
            format!("{:<4} {state:<11} {}\n", running.number, running.command)
        };
        self.all.iter().map(line).collect()
    }
}

/// Passes on what a process says, if anybody is there, and notes its end.
async fn follow(
    mut process: DebugProcess,
    sink: Arc<Mutex<Option<mpsc::Sender<Event>>>>,
    end: watch::Sender<Ended>,
) {
    let mut ended = Err(Fault::unavailable("the daemon ended the process"));
    loop {
        match process.next().await {
            Ok(Some(Event::Exited(code, None))) => ended = Ok(code),
            Ok(Some(Event::Exited(_, Some(fault)))) => ended = Err(fault),
            Ok(Some(event)) => {
                let to = sink.lock().clone();
                if let Some(to) = to {
                    let _ = to.send(event).await;
                }
            }
            Ok(None) => break,
            Err(fault) => {
                ended = Err(fault);
                break;
            }
        }
    }
    end.send_replace(Some(ended));
    // Closes what the terminal listens to, after the last word.
    sink.lock().take();
}

fn write(event: &Event) {
    // A terminal that is gone must not end the process.
    match event {
        Event::Stdout(data) => {
            let mut out = std::io::stdout().lock();
            let _ = out.write_all(data).and_then(|()| out.flush());
        }
        Event::Stderr(data) => {
            let _ = std::io::stderr().lock().write_all(data);
        }
        Event::Exited(..) => {}
    }
}

async fn converse(
    running: &Running,
    terminal: &mut Terminal,
    events: &mut mpsc::Receiver<Event>,
) -> Result<Attached> {
    let failed = |e| Fault::io("watch signals", e);
    let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
    let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
    let (input, mut ended) = (&running.input, running.ended.clone());
    let resize = async |terminal: &Terminal| {
        if let Some((rows, columns)) = terminal.size().filter(|_| running.tty) {
            input.resize(rows, columns).await;
        }
    };
    resize(terminal).await;
    loop {
        tokio::select! {
            // What it said is shown before its end.
            biased;
            event = events.recv() => match event {
                Some(event) => write(&event),
                None => break,
            },
            () = async { _ = ended.wait_for(Option::is_some).await } => {
                while let Ok(event) = events.try_recv() {
                    write(&event);
                }
                break;
            }
            key = terminal.typed() => match key {
                Key::Resized => resize(terminal).await,
                Key::Typed(Typed::Bytes(bytes)) => input.write(bytes.into()).await,
                Key::Typed(Typed::Away(bytes)) => {
                    input.write(bytes.into()).await;
                    return Ok(Attached::Away);
                }
                Key::Typed(Typed::End) => input.close().await,
            },
            _ = interrupt.recv() => input.signal("INT").await,
            _ = terminate.recv() => {
                input.signal("TERM").await;
                return Err(Fault::cancelled());
            }
        }
    }
    let ended = ended.wait_for(Option::is_some).await.ok().and_then(|e| e.clone());
    ended.unwrap_or_else(|| Err(Fault::internal("a process was not followed"))).map(Attached::Ended)
}
