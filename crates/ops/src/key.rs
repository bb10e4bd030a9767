//! Encoding of what an operation's key depends on: a text in which every string is length-prefixed,
//! hashed. Unlike a rendering for people it stays the same when types gain fields, because every
//! field is written by hand.

use shipway_oci::Digest;
use std::fmt::Write as _;

/// Collects what a key depends on.
pub(crate) struct KeyWriter(String);

impl KeyWriter {
    /// A key of the given kind; change the name when the meaning of the operation changes.
    pub(crate) fn new(kind: &str) -> Self {
        Self(format!("{kind}\n"))
    }

    /// A named text.
    pub(crate) fn text(&mut self, name: &str, value: &str) -> &mut Self {
        let _ = writeln!(self.0, "{name} {}:{value}", value.len());
        self
    }

    /// A named list, unless it is empty.
    pub(crate) fn list<S: AsRef<str>>(&mut self, name: &str, values: &[S]) -> &mut Self {
        if !values.is_empty() {
            let _ = writeln!(self.0, "{name} [{}]", values.len());
            for value in values {
                self.text("-", value.as_ref());
            }
        }
        self
    }

    /// A named value that prints without blanks or line ends.
    pub(crate) fn value(&mut self, name: &str, value: impl std::fmt::Debug) -> &mut Self {
        let _ = writeln!(self.0, "{name} {value:?}");
        self
    }

    /// A name, if `set`.
    pub(crate) fn flag(&mut self, name: &str, set: bool) -> &mut Self {
        if set {
            let _ = writeln!(self.0, "{name}");
        }
        self
    }

    /// The key.
    pub(crate) fn digest(&self) -> Digest {
        Digest::of(self.0.as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighboring_values_cannot_be_confused() {
        let key = |a: &str, b: &str| KeyWriter::new("k").text("a", a).text("b", b).digest();
        assert_ne!(key("x\nb 1:y", ""), key("x", "y"));
    }
}
