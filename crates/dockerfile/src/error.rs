//! What is wrong with a Dockerfile: the words users know, the lines, the column where we can tell, and advice.

use shipway_fault::{Fault, Position, Span};

use crate::ast::Lines;

/// The result of everything here.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A mistake in a Dockerfile.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    /// What is wrong, in the words of the reference.
    pub message: String,
    /// The lines to show; `None` while nobody has said where.
    pub lines: Option<Lines>,
    /// The exact place, when it is known.
    pub at: Option<Position>,
    /// What to do about it.
    pub hint: Option<String>,
}

impl Error {
    /// A mistake whose place is not known yet.
    pub fn new(message: impl Into<String>) -> Self {
        Self { message: message.into(), lines: None, at: None, hint: None }
    }

    /// Says where, unless somebody nearer already did.
    #[must_use]
    pub fn on(mut self, lines: Lines) -> Self {
        self.lines.get_or_insert(lines);
        self
    }

    /// Adds advice.
    #[must_use]
    pub fn hint(mut self, advice: impl Into<String>) -> Self {
        self.hint.get_or_insert(advice.into());
        self
    }

    /// Finds the exact place in the file's lines: the first stretch that the message quotes and the lines contain.
    #[must_use]
    pub(crate) fn locate(mut self, file: &[&str]) -> Self {
        let Some(lines) = self.lines.filter(|_| self.at.is_none()) else { return self };
        let wanted = quoted(&self.message);
        let count = (lines.end - lines.start + 1).max(1) as usize;
        for (n, line) in file.iter().skip((lines.start - 1).max(0) as usize).take(count).enumerate() {
            let Some(at) = wanted.iter().find_map(|w| line.find(w)) else { continue };
            let character = line[..at].chars().count() as i32;
            self.at = Some(Position { line: lines.start + n as i32, character });
            break;
        }
        self
    }

    /// The lines as spans, empty when unknown.
    pub fn spans(&self) -> Vec<Span> {
        self.lines.map(Lines::spans).unwrap_or_default()
    }
}

impl From<Error> for Fault {
    /// Loses the lines: whoever has the file adds them as [`shipway_fault::Detail::Source`] from [`Error::spans`] first.
    fn from(error: Error) -> Self {
        // The reference answers with gRPC's `Unknown` here, and clients print the words only.
        let fault = Fault::unknown(error.message);
        match error.hint {
            Some(hint) => fault.hint(hint),
            None => fault,
        }
    }
}

/// The stretches of a message that come from the file: what is quoted, a flag, what follows a colon.
fn quoted(message: &str) -> Vec<&str> {
    let message = message.split_once(" on line ").and_then(|(_, m)| m.split_once(": ")).map_or(message, |(_, m)| m);
    let message = message.split_once(" (did you mean").map_or(message, |(m, _)| m);
    let mut found: Vec<&str> = message.split(' ').filter(|w| w.starts_with("--") && w.len() > 2).collect();
    for quote in ['"', '\''] {
        found.extend(message.split(quote).skip(1).step_by(2).filter(|w| !w.is_empty()));
    }
    found.extend(message.rsplit_once(": ").map(|(_, w)| w).filter(|w| !w.is_empty()));
    found
}
