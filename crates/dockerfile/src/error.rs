//! What is wrong with a Dockerfile: the words users know, the lines, what in them, and advice.

use crate::{ast::Lines, token::Token};
use shipway_fault::Fault;

/// The result of everything here.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A mistake in a Dockerfile.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    /// What is wrong, in the words of the reference.
    pub message: String,
    /// The lines to show; `None` while that is not known.
    pub lines: Option<Lines>,
    /// What in them; `None` leaves it to what the message quotes.
    pub token: Option<Token>,
    /// What to do about it.
    pub hint: Option<String>,
}

impl Error {
    /// A mistake whose place is not known yet.
    pub fn new(message: impl Into<String>) -> Self {
        Self { message: message.into(), lines: None, token: None, hint: None }
    }

    /// Says where, unless a nearer caller already did.
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

    /// Says what it is about, unless a nearer caller already did.
    #[must_use]
    pub fn at(mut self, token: Token) -> Self {
        self.token.get_or_insert(token);
        self
    }
}

impl From<Error> for Fault {
    /// Loses the place: callers that have the file add it as [`shipway_fault::Detail::Source`] from
    /// `Error::spans`.
    fn from(error: Error) -> Self {
        // The reference answers with gRPC's `Unknown` here, and clients print the words only.
        let fault = Fault::unknown(error.message);
        match error.hint {
            Some(hint) => fault.hint(hint),
            None => fault,
        }
    }
}
