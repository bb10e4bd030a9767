//! Parser directives: `# syntax=`, `# escape=`, `# check=` at the top of a file (rows `df.dir.*`).

use crate::ast::{Directive, Lines};
use crate::error::{Error, Result};

const NAMES: [&str; 3] = ["syntax", "escape", "check"];

/// Reads `name = value`; the name in lower case, only known ones.
pub(crate) fn parse_line(line: &str) -> Option<(String, String)> {
    let blank = |c: char| matches!(c, '\t' | '\n' | '\x0c' | '\r' | ' ');
    let line = line.trim_start();
    let (name, value) = line.split_once('=')?;
    let name = name.trim_end_matches(blank).to_ascii_lowercase();
    if !NAMES.contains(&name.as_str()) {
        return None;
    }
    let end = value.trim_end_matches(blank);
    if end.is_empty() {
        // A value of blanks only is a blank; without a value it is not a directive.
        return value.chars().next_back().map(|c| (name, c.to_string()));
    }
    Some((name, end.trim_start_matches(blank).to_owned()))
}

/// Reads lines from the top while they are directives.
pub(crate) struct Directives {
    comment: &'static str,
    line: i32,
    done: bool,
    pub(crate) found: Vec<Directive>,
}

impl Directives {
    pub(crate) fn new(comment: &'static str) -> Self {
        Self { comment, line: 0, done: false, found: Vec::new() }
    }

    /// Whether `line` is a directive; it then is the last of `found`.
    pub(crate) fn feed(&mut self, line: &str) -> Result<bool> {
        self.line += 1;
        if self.done {
            return Ok(false);
        }
        let Some((name, value)) = line.strip_prefix(self.comment).and_then(parse_line) else {
            self.done = true;
            return Ok(false);
        };
        if self.found.iter().any(|d| d.name == name) {
            return Err(Error::new(format!("only one {name} parser directive can be used")));
        }
        self.found.push(Directive { name, value, line: self.line });
        Ok(true)
    }
}

/// A directive found without parsing the whole file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FoundDirective {
    /// The value up to the first blank: for `syntax` the image.
    pub first_word: String,
    /// The whole value: for `syntax` the command line.
    pub value: String,
    /// Its line.
    pub lines: Lines,
}

/// The directive `name` (`syntax`, `escape` or `check`) of a Dockerfile.
pub fn find(name: &str, text: &[u8]) -> Option<FoundDirective> {
    let (text, before) = without_shebang(text);
    in_comments(name, text, "#", before)
}

/// The frontend a file asks for, in any of the forms the reference accepts: `# syntax=`,
/// `// syntax=` or a JSON object with a key `syntax`; a first line `#!…` is passed over (row
/// `df.dir.syntax`).
pub fn syntax(text: &[u8]) -> Option<FoundDirective> {
    let (text, before) = without_shebang(text);
    in_comments("syntax", text, "#", before)
        .or_else(|| in_comments("syntax", text, "//", before))
        .or_else(|| {
            let value = crate::json::object_member(&String::from_utf8_lossy(text), "syntax")?;
            // An object has no line of its own; the reference says how many lines it passed over.
            Some(FoundDirective {
                first_word: value.clone(),
                value,
                lines: Lines { start: before, end: before },
            })
        })
}

/// The text after a byte order mark and a line `#!…`, and how many lines are gone.
fn without_shebang(text: &[u8]) -> (&[u8], i32) {
    let text = text.strip_prefix(b"\xef\xbb\xbf").unwrap_or(text);
    if !text.starts_with(b"#!") {
        return (text, 0);
    }
    (text.iter().position(|b| *b == b'\n').map_or(&[], |n| &text[n + 1..]), 1)
}

fn in_comments(
    name: &str,
    text: &[u8],
    comment: &'static str,
    before: i32,
) -> Option<FoundDirective> {
    let mut directives = Directives::new(comment);
    directives.line = before;
    for line in text.split(|b| *b == b'\n') {
        let line = String::from_utf8_lossy(line.strip_suffix(b"\r").unwrap_or(line));
        match directives.feed(&line) {
            Ok(true) => {}
            Ok(false) | Err(_) => break,
        }
    }
    let found = directives.found.into_iter().find(|d| d.name == name)?;
    let first_word = found.value.split(' ').next().unwrap_or_default().to_owned();
    Some(FoundDirective {
        first_word,
        value: found.value,
        lines: Lines { start: found.line, end: found.line },
    })
}
