//! What is wrong with a definition, and where.

use std::{ops::Range, sync::Arc};

use shipway_fault::{Detail, Fault, Position, SourceFile, Span};

use crate::source::Source;

/// A stretch of a source: its number, and bytes of its text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) source: usize,
    pub(crate) bytes: Range<usize>,
}

/// Something that is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Problem {
    /// What is wrong: a heading, a semicolon, a sentence.
    pub(crate) text: String,
    pub(crate) place: Option<Place>,
    /// It is no more than a name that means nothing, which who only looks ahead passes over.
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
    pub(crate) fn at(mut self: Box<Self>, place: Option<Place>) -> Box<Self> {
        if self.place.is_none() {
            self.place = place;
        }
        self
    }

    /// The same for who reads it, with the lines it is about.
    pub(crate) fn into_fault(self, sources: &[Source]) -> Fault {
        let Some((source, bytes)) =
            self.place.and_then(|p| Some((sources.get(p.source)?, p.bytes)))
        else {
            return Fault::invalid(self.text);
        };
        let (start, end) = (position(&source.text, bytes.start), position(&source.text, bytes.end));
        let columns = match start.line == end.line {
            true => format!("{},{}-{}", start.line, start.character + 1, end.character + 1),
            false => {
                let (a, b) = (start.character + 1, end.character + 1);
                format!("{},{a}-{},{b}", start.line, end.line)
            }
        };
        let file = SourceFile {
            filename: source.name.clone(),
            language: "HCL".into(),
            data: source.text.clone().into_bytes(),
            definition: None,
        };
        Fault::invalid(format!("{}:{columns}: {}", source.name, self.text))
            .detail(Detail::Source { file: Arc::new(file), spans: vec![Span { start, end }] })
    }
}

fn position(text: &str, at: usize) -> Position {
    let before = text.get(..at.min(text.len())).unwrap_or_default();
    let line_start = before.rfind('\n').map_or(0, |n| n + 1);
    let number = |n: usize| i32::try_from(n).unwrap_or(i32::MAX);
    Position {
        line: number(1 + before.matches('\n').count()),
        character: number(before[line_start..].chars().count()),
    }
}
