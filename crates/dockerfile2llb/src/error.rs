//! A failure while converting: a fault and the places in the Dockerfile that it is about (row
//! `dfr.errors`).

use shipway_dockerfile::{self as df, Source, Token};
use shipway_fault::{Detail, Fault, SourceFile, Span};
use std::{borrow::Cow, sync::Arc};

/// A fault whose places are not attached yet, because only the frontend holds the text.
#[derive(Clone, Debug)]
pub struct ConvertError {
    pub fault: Fault,
    pub places: Vec<df::Lines>,
    /// A place that the reference does not report. Clients that ask for columns get it where there
    /// is no other.
    near: Option<df::Lines>,
    /// What on the lines is meant; without it what the message quotes.
    token: Option<Token>,
    /// Further failures of the same check.
    pub others: Vec<ConvertError>,
}

pub type Result<T, E = ConvertError> = std::result::Result<T, E>;

impl ConvertError {
    /// A failure with the class and code of what is wrong with a Dockerfile.
    pub fn new(message: impl Into<Cow<'static, str>>) -> Self {
        Fault::unknown(message).into()
    }

    /// Adds a place. Each level that knows one adds it, as the reference does, so that clients draw
    /// the same lines; the same place twice in a row says nothing new.
    #[must_use]
    pub fn at(mut self, lines: df::Lines) -> Self {
        self.places.push(lines);
        self
    }

    /// Replaces the places.
    #[must_use]
    pub fn only_at(mut self, lines: df::Lines) -> Self {
        self.places = vec![lines];
        self
    }

    /// Says that it is about an instruction which the base image brings.
    #[must_use]
    pub fn of_trigger(mut self) -> Self {
        self.token = Some(Token::Word(0));
        self
    }

    /// Says where it is without making that a place.
    #[must_use]
    pub fn near(mut self, lines: df::Lines) -> Self {
        self.near.get_or_insert(lines);
        self
    }

    /// Says what it is about, unless a nearer caller already did.
    #[must_use]
    pub fn about(mut self, token: Token) -> Self {
        self.token.get_or_insert(token);
        self
    }

    /// Adds advice.
    #[must_use]
    pub fn hint(mut self, advice: impl Into<Cow<'static, str>>) -> Self {
        self.fault = self.fault.hint(advice);
        self
    }

    /// Says what was being done.
    #[must_use]
    pub fn context(mut self, what: impl Into<Cow<'static, str>>) -> Self {
        self.fault = self.fault.context(what);
        self
    }

    /// Adds `(did you mean …?)` if an option is near enough to `word`.
    #[must_use]
    pub fn suggest<'a>(mut self, word: &str, options: impl IntoIterator<Item = &'a str>) -> Self {
        let Some(near) = df::suggest(word, options, true) else { return self };
        let old = &self.fault;
        let mut fault =
            Fault::new(old.code(), format!("{old} (did you mean {near}?)")).with_class(old.class());
        for hint in old.hints() {
            fault = fault.hint(hint.to_owned());
        }
        for detail in old.details() {
            fault = fault.detail(detail.clone());
        }
        self.fault = fault;
        self
    }

    /// The first of the failures with the others in it.
    pub fn all(failures: impl IntoIterator<Item = Self>) -> Result<()> {
        let mut failures = failures.into_iter();
        let Some(first) = failures.next() else { return Ok(()) };
        Err(Self { others: failures.collect(), ..first })
    }

    /// The lines of each place; with the text of the file also the columns in them.
    pub fn spans(&self, source: Option<&Source<'_>>) -> Vec<Vec<Span>> {
        let near = self.near.filter(|_| source.is_some() && self.places.is_empty());
        let places = self.places.iter().copied().chain(near);
        let spans = |lines: df::Lines| match (source, &self.token) {
            (None, _) => lines.spans(),
            (Some(source), None) => source.spans_of_message(lines, &self.fault.to_string()),
            (Some(source), token) => source.spans(lines, token.as_ref()),
        };
        places.map(spans).collect()
    }

    /// The fault with the lines of `file` to draw.
    pub fn into_fault(self, file: &Arc<SourceFile>, source: Option<&Source<'_>>) -> Fault {
        let places = self.spans(source);
        places.into_iter().fold(self.fault, |fault, spans| {
            fault.detail(Detail::Source { file: file.clone(), spans })
        })
    }
}

impl From<Fault> for ConvertError {
    fn from(fault: Fault) -> Self {
        Self { fault, places: Vec::new(), near: None, token: None, others: Vec::new() }
    }
}

impl From<df::Error> for ConvertError {
    fn from(error: df::Error) -> Self {
        let (places, token) = (error.lines.into_iter().collect(), error.token.clone());
        Self { places, token, ..Fault::from(error).into() }
    }
}
