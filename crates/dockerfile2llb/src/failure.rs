//! A failure while converting: a fault and the places in the Dockerfile that it is about (row `dfr.errors`).

use shipway_dockerfile as df;
use shipway_fault::{Detail, Fault, SourceFile};
use std::{borrow::Cow, sync::Arc};

/// A fault whose places are not attached yet, because only the frontend holds the text.
#[derive(Clone, Debug)]
pub struct Failure {
    pub fault: Fault,
    pub places: Vec<df::Lines>,
}

pub type Result<T, E = Failure> = std::result::Result<T, E>;

impl Failure {
    /// A failure with the class and code of what is wrong with a Dockerfile.
    pub fn new(message: impl Into<Cow<'static, str>>) -> Self {
        Fault::unknown(message).into()
    }

    /// Adds a place. Each level that knows one adds it, as the reference does, so that clients draw the same lines; the same
    /// place twice in a row says nothing new.
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
        let mut fault = Fault::new(old.code(), format!("{old} (did you mean {near}?)")).with_class(old.class());
        for hint in old.hints() {
            fault = fault.hint(hint.to_owned());
        }
        for detail in old.details() {
            fault = fault.detail(detail.clone());
        }
        self.fault = fault;
        self
    }

    /// The fault with the lines of `file` to draw.
    pub fn into_fault(self, file: &Arc<SourceFile>) -> Fault {
        self.places
            .into_iter()
            .filter(|lines| lines.start > 0)
            .fold(self.fault, |fault, lines| fault.detail(Detail::Source { file: file.clone(), spans: lines.spans() }))
    }
}

impl From<Fault> for Failure {
    fn from(fault: Fault) -> Self {
        Self { fault, places: Vec::new() }
    }
}

impl From<df::Error> for Failure {
    fn from(error: df::Error) -> Self {
        let places = error.lines.into_iter().collect();
        Self { fault: error.into(), places }
    }
}
