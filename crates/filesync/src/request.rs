//! The metadata with which a directory is asked for (rows `cb.filesync.md`, `cb.filesync.enc`).

use shipway_gocompat::parse_bool;
use std::fmt::Write;

const DIR_NAME: &str = "dir-name";
const INCLUDE: &str = "include-patterns";
const EXCLUDE: &str = "exclude-patterns";
const FOLLOW: &str = "followpaths";
/// Only our own clients know it: see [`FileSyncRequest::identify`].
const IDENTIFY: &str = "shipway-file-identities";

/// Which part of which directory a daemon wants.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FileSyncRequest {
    /// Name of the directory, such as `context`.
    pub dir_name: String,
    /// If any, only what matches these.
    pub include: Vec<String>,
    /// Nothing that matches these.
    pub exclude: Vec<String>,
    /// Paths to include with every link they lead through.
    pub follow: Vec<String>,
    /// Whether files are to be distinguished by more than size and time, by a client that can.
    pub identify: bool,
}

impl FileSyncRequest {
    /// Keys and values to send. A list with a value that a header cannot hold is escaped and marked
    /// with a second key.
    pub fn pairs(&self) -> Vec<(String, String)> {
        let mut pairs = Vec::new();
        let name = std::slice::from_ref(&self.dir_name);
        for (key, values) in [
            (DIR_NAME, name),
            (INCLUDE, &self.include),
            (EXCLUDE, &self.exclude),
            (FOLLOW, &self.follow),
        ] {
            let escaped = values
                .iter()
                .any(|v| v.bytes().any(|b| !(b' '..=b'~').contains(&b)) || v.trim() != v);
            if escaped {
                pairs.push((format!("{key}-encoded"), "1".to_owned()));
            }
            pairs.extend(
                values
                    .iter()
                    .map(|v| (key.to_owned(), if escaped { escape(v) } else { v.clone() })),
            );
        }
        if self.identify {
            pairs.push((IDENTIFY.to_owned(), "1".to_owned()));
        }
        pairs
    }

    /// The request that `lookup`, which gives all values of a key, holds.
    pub fn from_pairs(lookup: impl Fn(&str) -> Vec<String>) -> Self {
        let values = |key: &str| {
            let escaped =
                lookup(&format!("{key}-encoded")).first().and_then(|v| parse_bool(v)) == Some(true);
            let values = lookup(key);
            if escaped { values.iter().map(|v| unescape(v)).collect() } else { values }
        };
        Self {
            dir_name: values(DIR_NAME).into_iter().next().unwrap_or_default(),
            include: values(INCLUDE),
            exclude: values(EXCLUDE),
            follow: values(FOLLOW),
            identify: values(IDENTIFY).first().is_some_and(|v| v == "1"),
        }
    }
}

/// As a value in a URL's query.
fn escape(text: &str) -> String {
    let mut out = String::new();
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => {
                out.push(byte.into())
            }
            b' ' => out.push('+'),
            _ => _ = write!(out, "%{byte:02X}"),
        }
    }
    out
}

/// Undoes [`escape`]; a value that is not escaped properly is empty, as in other implementations.
fn unescape(text: &str) -> String {
    let mut out = Vec::new();
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        match byte {
            b'+' => out.push(b' '),
            b'%' => {
                let digit = |b: Option<u8>| b.and_then(|b| (b as char).to_digit(16));
                let (Some(high), Some(low)) = (digit(bytes.next()), digit(bytes.next())) else {
                    return String::new();
                };
                out.push((high * 16 + low) as u8);
            }
            _ => out.push(byte),
        }
    }
    String::from_utf8(out).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_survive_headers() {
        let request = FileSyncRequest {
            dir_name: "context".into(),
            include: vec!["a b".into(), "a%20+b".into()],
            exclude: vec!["é x+%".into(), "plain".into()],
            follow: vec!["tab\there".into()],
            identify: true,
        };
        let pairs = request.pairs();
        let values = |key: &str| {
            pairs.iter().filter(|(k, _)| k == key).map(|(_, v)| v.clone()).collect::<Vec<_>>()
        };
        assert_eq!(values("include-patterns"), ["a b", "a%20+b"]);
        assert_eq!(values("include-patterns-encoded"), [""; 0]);
        assert_eq!(values("exclude-patterns"), ["%C3%A9+x%2B%25", "plain"]);
        assert_eq!(values("exclude-patterns-encoded"), ["1"]);
        assert_eq!(FileSyncRequest::from_pairs(values), request);
        assert_eq!(unescape("%zz"), "");
    }
}
