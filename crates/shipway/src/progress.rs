//! What a person sees of a build: a live view, plain lines, JSON, or nothing (the modes of
//! `--progress`).
//!
//! [`start`] gives the sender for events and runs the view on a thread of its own, so that a slow
//! terminal slows no transfer.

mod colors;
mod parts;
mod plain;
mod screen;
mod tasks;
mod trace;
mod tty;

use std::{
    io::{IsTerminal, Write},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use shipway_client::{Status, Warning};
use shipway_fault::{Fault, Result, nearest};
use tokio::{runtime::Handle, sync::mpsc, time::timeout};

use self::{colors::Palette, plain::Plain, trace::Trace, tty::Tty};
pub(crate) use self::{
    parts::part,
    tasks::{Task, Tasks},
};
use crate::explain::Explained;

/// Events waiting for the view.
const QUEUE: usize = 1024;

/// How often views are drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Pace {
    /// At most.
    frame: Duration,
    /// At least, for the running clocks.
    idle: Duration,
}

impl Pace {
    /// As `TTY_DISPLAY_RATE` says, in milliseconds.
    fn of(rate: Option<&str>) -> Self {
        match rate.and_then(|r| r.parse().ok()).filter(|ms| *ms > 0) {
            Some(ms) => Self { frame: Duration::from_millis(ms), idle: Duration::from_millis(ms) },
            None => Self { frame: Duration::from_millis(100), idle: Duration::from_millis(150) },
        }
    }
}

/// How progress is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Live on a terminal, plain otherwise.
    Auto,
    /// Live.
    Tty,
    /// Lines.
    Plain,
    /// Events as JSON, one per line.
    RawJson,
    /// Not at all.
    Quiet,
}

impl std::str::FromStr for Mode {
    type Err = Fault;

    fn from_str(text: &str) -> Result<Self> {
        Ok(match text {
            "" | "auto" => Self::Auto,
            "tty" => Self::Tty,
            "plain" => Self::Plain,
            "rawjson" => Self::RawJson,
            "quiet" | "none" => Self::Quiet,
            other => {
                let fault = Fault::invalid(format!("invalid progress mode {other}"));
                let known = ["auto", "tty", "plain", "rawjson", "quiet"];
                return Err(match nearest(other, known) {
                    Some(near) => fault.hint(format!("did you mean {near}?")),
                    None => fault.hint(format!("known modes are {}", known.join(", "))),
                });
            }
        })
    }
}

/// What is left of a view when it has ended.
#[derive(Default)]
pub(crate) struct Shown {
    /// Warnings of the build.
    pub(crate) warnings: Vec<Warning>,
    /// Why steps ran.
    pub(crate) explained: Explained,
}

/// A running view.
pub(crate) struct View {
    thread: JoinHandle<Shown>,
}

impl View {
    /// Waits until everything is drawn; the senders must be gone.
    pub(crate) async fn finish(self) -> Result<Shown> {
        let broken = |_| Fault::internal("the progress view panicked");
        let join = move || self.thread.join().map_err(broken);
        shipway_task::blocking("wait for the progress view", join).await
    }
}

enum Painter {
    Live(Tty, std::io::Stderr),
    Plain(Plain, std::io::Stderr),
    Json(std::io::Stderr),
    Nothing,
}

/// Starts a view on standard error. `phase` is the live view's headline.
pub(crate) fn start(mode: Mode, phase: &str) -> Result<(mpsc::Sender<Status>, View)> {
    let err = std::io::stderr();
    let terminal = err.is_terminal();
    let painter = match mode {
        Mode::Tty if !terminal => {
            return Err(Fault::invalid("failed to get console: standard error is not a terminal")
                .hint("use --progress plain"));
        }
        Mode::Auto | Mode::Tty if terminal => {
            let lines = std::env::var("BUILDKIT_TTY_LOG_LINES")
                .ok()
                .and_then(|v| v.parse().ok())
                .filter(|n| *n > 0);
            Painter::Live(Tty::new(phase, Palette::from_env(), lines), err)
        }
        Mode::Auto | Mode::Tty | Mode::Plain => Painter::Plain(
            Plain::new(std::env::var("PROGRESS_NO_TRUNC").is_ok_and(|v| v == "0")),
            err,
        ),
        Mode::RawJson => Painter::Json(err),
        Mode::Quiet => Painter::Nothing,
    };
    let pace = Pace::of(std::env::var("TTY_DISPLAY_RATE").ok().as_deref());
    let (events, queue) = mpsc::channel(QUEUE);
    let runtime = Handle::current();
    let thread = std::thread::Builder::new().name("progress".to_owned());
    let thread = thread
        .spawn(move || paint(painter, pace, queue, &runtime))
        .map_err(|e| Fault::io("start the progress view", e))?;
    Ok((events, View { thread }))
}

/// Seconds since 1970.
fn now() -> f64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs_f64()
}

fn paint(
    mut painter: Painter,
    pace: Pace,
    mut events: mpsc::Receiver<Status>,
    runtime: &Handle,
) -> Shown {
    let mut shown = Shown::default();
    let mut trace = Trace::new(matches!(painter, Painter::Live(..)));
    let mut drawn: Option<Instant> = None;
    loop {
        let event = runtime.block_on(async { timeout(pace.idle, events.recv()).await });
        match event {
            Ok(None) => break,
            Ok(Some(status)) => {
                shown.warnings.extend(status.warnings.iter().cloned());
                shown.explained.note(&status);
                if let Painter::Json(out) = &mut painter
                    && let Ok(line) = serde_json::to_string(&status)
                {
                    let _ = writeln!(out, "{line}");
                }
                trace.update(status, now());
                if drawn.is_some_and(|at| at.elapsed() < pace.frame) && !events.is_closed() {
                    continue;
                }
            }
            Err(_) => {}
        }
        drawn = Some(Instant::now());
        draw(&mut painter, &mut trace, false);
    }
    draw(&mut painter, &mut trace, true);
    shown
}

/// A terminal that is gone must not end the build, so failures to write are ignored.
fn draw(painter: &mut Painter, trace: &mut Trace, last: bool) {
    match painter {
        Painter::Live(tty, out) => {
            let mut text = tty.frame(trace, now(), tty::size(&out), last);
            if last {
                text.push_str(&trace.failures());
            }
            let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
        }
        Painter::Plain(plain, out) => {
            let mut text = plain.lines(trace, now());
            if last {
                text.push_str(&trace.failures());
            }
            let _ = out.write_all(text.as_bytes());
        }
        Painter::Json(_) | Painter::Nothing => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_environment_sets_the_pace() {
        let slow = Duration::from_secs(2);
        assert_eq!(Pace::of(Some("2000")), Pace { frame: slow, idle: slow });
        for usual in [None, Some(""), Some("0"), Some("-5"), Some("fast")] {
            assert_eq!(Pace::of(usual).frame, Duration::from_millis(100));
        }
    }
}
