//! Encoding of what an operation's key depends on: a text in which every string is length-prefixed,
//! hashed. Unlike a rendering for people it stays the same when types gain fields, because every
//! field is written by hand.

use shipway_oci::{Digest, Hasher};
use shipway_solver::{CacheMap, InputMap, KeyPart};
use std::fmt::Write as _;

/// Parts of one key that are named each; what is beyond has one name.
const MAX_PARTS: usize = 128;
/// Longest name of a part, in bytes.
const MAX_PART_NAME: usize = 128;

/// Collects what a key depends on.
pub(crate) struct KeyWriter {
    text: String,
    /// What was written under which name, to say how two keys differ.
    parts: Vec<(String, Hasher)>,
    /// The part that all belongs to which is written; `None` where names are parts.
    part: Option<String>,
}

impl KeyWriter {
    /// A key of the given kind; change the name when the meaning of the operation changes.
    pub(crate) fn new(kind: &str) -> Self {
        Self { text: format!("{kind}\n"), parts: Vec::new(), part: None }
    }

    /// Lets everything that `write` writes be one part. The key is the same without.
    pub(crate) fn part(&mut self, name: &str, write: impl FnOnce(&mut Self)) -> &mut Self {
        let outer = self.part.replace(name.to_owned());
        write(self);
        self.part = outer;
        self
    }

    /// Writes a line, as a part called `name` unless it belongs to another one.
    fn line(&mut self, name: &str, line: std::fmt::Arguments<'_>) {
        let start = self.text.len();
        let _ = self.text.write_fmt(line);
        self.text.push('\n');
        let name = clipped(self.part.as_deref().unwrap_or(name));
        let at = self.parts.iter().position(|(known, _)| known == name).unwrap_or_else(|| {
            if self.parts.len() < MAX_PARTS {
                let name = if self.parts.len() + 1 < MAX_PARTS { name } else { "more" };
                self.parts.push((name.to_owned(), Hasher::new()));
            }
            self.parts.len() - 1
        });
        self.parts[at].1.update(&self.text[start..]);
    }

    /// A named text.
    pub(crate) fn text(&mut self, name: &str, value: &str) -> &mut Self {
        self.line(name, format_args!("{name} {}:{value}", value.len()));
        self
    }

    /// A named list, unless it is empty.
    pub(crate) fn list<S: AsRef<str>>(&mut self, name: &str, values: &[S]) -> &mut Self {
        if values.is_empty() {
            return self;
        }
        self.part(name, |key| {
            key.line(name, format_args!("{name} [{}]", values.len()));
            for value in values {
                key.text("-", value.as_ref());
            }
        })
    }

    /// A named list of `NAME=value`, unless it is empty; each is a part of its own.
    pub(crate) fn variables(&mut self, name: &str, values: &[String]) -> &mut Self {
        if values.is_empty() {
            return self;
        }
        self.line(&format!("number of {name}"), format_args!("{name} [{}]", values.len()));
        for value in values {
            let variable = value.split_once('=').map_or(value.as_str(), |(variable, _)| variable);
            self.part(&format!("{name} {variable}"), |key| {
                key.text("-", value);
            });
        }
        self
    }

    /// A named value that prints without blanks or line ends.
    pub(crate) fn value(&mut self, name: &str, value: impl std::fmt::Debug) -> &mut Self {
        self.line(name, format_args!("{name} {value:?}"));
        self
    }

    /// A name, if `set`.
    pub(crate) fn flag(&mut self, name: &str, set: bool) -> &mut Self {
        if set {
            self.line(name, format_args!("{name}"));
        }
        self
    }

    /// The key.
    pub(crate) fn digest(&self) -> Digest {
        Digest::of(self.text.as_bytes())
    }

    /// What an operation with this key, whose inputs are as `inputs` says, depends on.
    pub(crate) fn map(self, inputs: Vec<InputMap>) -> CacheMap {
        CacheMap { keys: vec![self.digest()], inputs, ephemeral: false, parts: self.parts() }
    }

    /// What it is made of.
    fn parts(self) -> Vec<KeyPart> {
        let part = |(name, hasher): (String, Hasher)| {
            let mut first = [0; 8];
            first.copy_from_slice(&hasher.finish().as_bytes()[..8]);
            KeyPart { name, fingerprint: u64::from_le_bytes(first) }
        };
        self.parts.into_iter().map(part).collect()
    }
}

/// As much of a part's name as is kept.
fn clipped(name: &str) -> &str {
    let mut end = name.len().min(MAX_PART_NAME);
    while !name.is_char_boundary(end) {
        end -= 1;
    }
    &name[..end]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighboring_values_cannot_be_confused() {
        let key = |a: &str, b: &str| KeyWriter::new("k").text("a", a).text("b", b).digest();
        assert_ne!(key("x\nb 1:y", ""), key("x", "y"));
    }

    #[test]
    fn parts_tell_how_two_keys_differ_and_change_none() {
        let write = |variables: &[&str], mount: &str| {
            let variables: Vec<String> = variables.iter().map(|v| (*v).to_owned()).collect();
            let mut key = KeyWriter::new("k");
            key.text("cwd", "/").variables("env", &variables).part("mount", |key| {
                key.text("dest", mount).flag("readonly", true);
            });
            (key.digest(), key.parts())
        };
        let names = |parts: &[KeyPart]| parts.iter().map(|p| p.name.clone()).collect::<Vec<_>>();
        let (first, before) = write(&["A=1", "B=1"], "/m");
        assert_eq!(names(&before), ["cwd", "number of env", "env A", "env B", "mount"]);
        let (second, now) = write(&["A=1", "B=2"], "/m");
        assert_ne!(first, second);
        let differ: Vec<_> = now.iter().filter(|p| !before.contains(p)).cloned().collect();
        assert_eq!(names(&differ), ["env B"]);
        // As it is without parts: what is in caches stays.
        let mut plain = KeyWriter::new("k");
        plain.text("cwd", "/").list("env", &["A=1", "B=1"]).text("dest", "/m");
        assert_eq!(plain.flag("readonly", true).digest(), first);
    }

    #[test]
    fn parts_are_so_many_and_have_names_so_long() {
        let variables: Vec<String> =
            (0..1000).map(|n| format!("{n}{}=", "é".repeat(1000))).collect();
        let mut key = KeyWriter::new("k");
        key.variables("env", &variables);
        let parts = key.parts();
        assert_eq!((parts.len(), &*parts[MAX_PARTS - 1].name), (MAX_PARTS, "more"));
        assert!(parts.iter().all(|part| part.name.len() <= MAX_PART_NAME));
    }
}
