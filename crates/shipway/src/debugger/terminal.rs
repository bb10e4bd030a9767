//! Our end of a process's terminal: standard input, byte by byte or line by line, and its size.

use std::io::{IsTerminal, Read};

use bytes::Bytes;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use shipway_fault::{Fault, Result};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::mpsc,
};

/// Bytes that are read at once.
const BUFFER: usize = 4096;
/// Longest line of a person's; the rest of a longer one is another line.
const MAX_LINE: usize = 64 << 10;
/// With which a person goes from a process to the monitor: Ctrl-a, then c.
const ESCAPE: u8 = 1;

/// Standard input and output, for one reader at a time.
pub(crate) struct Terminal {
    input: mpsc::Receiver<Bytes>,
    /// Read, and not yet wanted.
    rest: Vec<u8>,
    /// Whether Ctrl-a was the last key.
    escaped: bool,
    ended: bool,
    is_terminal: bool,
    resized: Signal,
}

/// What a person typed for a process.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Typed {
    /// Bytes for it.
    Bytes(Vec<u8>),
    /// Ctrl-a c: what came before, and then no more.
    Away(Vec<u8>),
    /// There will be no more.
    End,
}

/// Bytes come as they are typed, and mean nothing, until this is dropped.
pub(crate) struct Raw(Option<Termios>);

impl Raw {
    fn enter(is_terminal: bool) -> Result<Self> {
        if !is_terminal {
            return Ok(Self(None));
        }
        let failed = |e: rustix::io::Errno| Fault::io("change the terminal's mode", e.into());
        let before = tcgetattr(std::io::stdin()).map_err(failed)?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(std::io::stdin(), OptionalActions::Now, &raw).map_err(failed)?;
        Ok(Self(Some(before)))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        if let Some(before) = &self.0 {
            // Of a terminal that is gone there is nothing to restore.
            let _ = tcsetattr(std::io::stdin(), OptionalActions::Now, before);
        }
    }
}

impl Terminal {
    /// Begins to read standard input.
    pub(crate) fn open() -> Result<Self> {
        let (to, input) = mpsc::channel(4);
        let read = move || {
            let mut buffer = [0; BUFFER];
            while let Ok(read @ 1..) = std::io::stdin().read(&mut buffer) {
                if to.blocking_send(Bytes::copy_from_slice(&buffer[..read])).is_err() {
                    return;
                }
            }
        };
        let thread = std::thread::Builder::new().name("standard input".to_owned());
        thread.spawn(read).map_err(|e| Fault::io("read standard input", e))?;
        let resized = signal(SignalKind::window_change())
            .map_err(|e| Fault::io("watch the terminal's size", e))?;
        let is_terminal = std::io::stdin().is_terminal() && std::io::stdout().is_terminal();
        Ok(Self { input, rest: Vec::new(), escaped: false, ended: false, is_terminal, resized })
    }

    /// Whether there is a person.
    pub(crate) fn is_terminal(&self) -> bool {
        self.is_terminal
    }

    /// Lets keys through to a process.
    pub(crate) fn raw(&self) -> Result<Raw> {
        Raw::enter(self.is_terminal)
    }

    /// Rows and columns, if there are any.
    pub(crate) fn size(&self) -> Option<(u32, u32)> {
        let size = tcgetwinsize(std::io::stdout()).ok()?;
        (size.ws_row > 0 && size.ws_col > 0).then(|| (size.ws_row.into(), size.ws_col.into()))
    }

    /// Waits until the size has changed.
    pub(crate) async fn resized(signal: &mut Signal) {
        signal.recv().await;
    }

    /// What is typed next for a process; the size's changes meanwhile go to `resize`.
    pub(crate) async fn typed(&mut self) -> Key {
        if !self.rest.is_empty() {
            let rest = std::mem::take(&mut self.rest);
            return Key::Typed(self.split(&rest));
        }
        if self.ended {
            Self::resized(&mut self.resized).await;
            return Key::Resized;
        }
        tokio::select! {
            read = self.input.recv() => match read {
                Some(bytes) => Key::Typed(self.split(&bytes)),
                None => {
                    self.ended = true;
                    Key::Typed(Typed::End)
                }
            },
            () = Self::resized(&mut self.resized) => Key::Resized,
        }
    }

    fn split(&mut self, bytes: &[u8]) -> Typed {
        if !self.is_terminal {
            return Typed::Bytes(bytes.to_vec());
        }
        let (typed, rest, escaped) = split(bytes, self.escaped);
        self.escaped = escaped;
        self.rest = rest.to_vec();
        typed
    }

    /// The next line, without its end; `None` if there are no more.
    pub(crate) async fn line(&mut self) -> Option<String> {
        self.escaped = false;
        loop {
            let end = self.rest.iter().position(|b| matches!(b, b'\n' | b'\r'));
            if let Some(end) = end.or_else(|| (self.rest.len() > MAX_LINE).then_some(MAX_LINE)) {
                let line: Vec<u8> = self.rest.drain(..=end).collect();
                return Some(String::from_utf8_lossy(&line).trim().to_owned());
            }
            match self.input.recv().await {
                Some(bytes) => self.rest.extend_from_slice(&bytes),
                None => {
                    self.ended = true;
                    let last = std::mem::take(&mut self.rest);
                    let last = String::from_utf8_lossy(&last).trim().to_owned();
                    return (!last.is_empty()).then_some(last);
                }
            }
        }
    }
}

/// What happened at the terminal.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Key {
    /// Something was typed.
    Typed(Typed),
    /// It has another size.
    Resized,
}

/// What of `bytes` is for the process, what comes after Ctrl-a c, and whether the last key was
/// Ctrl-a, as the one before was if `escaped`. Ctrl-a twice is Ctrl-a.
fn split(bytes: &[u8], mut escaped: bool) -> (Typed, &[u8], bool) {
    let mut out = Vec::with_capacity(bytes.len());
    for (n, byte) in bytes.iter().enumerate() {
        match (escaped, *byte) {
            (false, ESCAPE) => escaped = true,
            (true, b'c') => return (Typed::Away(out), &bytes[n + 1..], false),
            (true, ESCAPE) => {
                out.push(ESCAPE);
                escaped = false;
            }
            (true, other) => {
                out.extend([ESCAPE, other]);
                escaped = false;
            }
            (false, other) => out.push(other),
        }
    }
    (Typed::Bytes(out), &[], escaped)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_keys_lead_away_from_a_process() {
        let bytes = |text: &str| Typed::Bytes(text.into());
        assert_eq!(split(b"ls\n", false), (bytes("ls\n"), &b""[..], false));
        assert_eq!(split(b"ls\x01", false), (bytes("ls"), &b""[..], true));
        assert_eq!(split(b"cps\n", true), (Typed::Away(Vec::new()), &b"ps\n"[..], false));
        assert_eq!(split(b"a\x01cps", false), (Typed::Away(b"a".to_vec()), &b"ps"[..], false));
        assert_eq!(split(b"\x01\x01c\x01e", false), (bytes("\x01c\x01e"), &b""[..], false));
    }
}
