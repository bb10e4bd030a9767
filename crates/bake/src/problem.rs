//! What is wrong with a definition, and where.

use std::ops::Range;

/// A stretch of a source: its number, and bytes of its text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SourceRange {
    pub(crate) source: usize,
    pub(crate) bytes: Range<usize>,
}

/// Something that is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Problem {
    /// What is wrong: a heading, a semicolon, a sentence.
    pub(crate) text: String,
    pub(crate) place: Option<SourceRange>,
    /// It is only an unknown name, which evaluation ahead of time passes over.
    pub(crate) undefined: bool,
}

/// A result, or what is wrong.
pub(crate) type Outcome<T> = Result<T, Box<Problem>>;

impl Problem {
    pub(crate) fn new(heading: &str, what: impl std::fmt::Display) -> Box<Self> {
        Box::new(Self { text: format!("{heading}; {what}"), place: None, undefined: false })
    }

    /// A problem without a heading.
    pub(crate) fn plain(what: impl std::fmt::Display) -> Box<Self> {
        Box::new(Self { text: what.to_string(), place: None, undefined: false })
    }

    pub(crate) fn undefined(what: impl std::fmt::Display) -> Box<Self> {
        Box::new(Self { text: what.to_string(), place: None, undefined: true })
    }

    /// With a place, if none is known.
    pub(crate) fn at(mut self: Box<Self>, place: Option<SourceRange>) -> Box<Self> {
        if self.place.is_none() {
            self.place = place;
        }
        self
    }
}
