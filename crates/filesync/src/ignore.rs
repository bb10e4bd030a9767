//! Ignore files such as `.dockerignore`, with the lines their patterns came from so that errors can
//! point there.

use shipway_fault::Result;
use shipway_gocompat::path::clean;

use crate::PatternMatcher;

/// One pattern of an ignore file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IgnoreRule {
    /// The pattern in the form that [`PatternMatcher`] and clients take.
    pub pattern: String,
    /// Its line, from 1.
    pub line: usize,
    /// The line as it was written, trimmed.
    pub text: String,
}

/// A parsed ignore file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct IgnoreFile {
    rules: Vec<IgnoreRule>,
}

impl IgnoreFile {
    /// Parses `data`: one pattern per line, `#` at a line's start comments, a first byte-order mark
    /// is skipped, leading slashes mean nothing. Pattern errors show when they are compiled.
    pub fn parse(data: &[u8]) -> Self {
        let text = String::from_utf8_lossy(data.strip_prefix(b"\xef\xbb\xbf").unwrap_or(data));
        let rules = text.lines().enumerate().filter_map(|(i, line)| {
            let text = line.trim();
            if line.starts_with('#') || text.is_empty() {
                return None;
            }
            let (bang, body) = match text.strip_prefix('!') {
                Some(rest) => ("!", rest.trim()),
                None => ("", text),
            };
            let mut body = if body.is_empty() { String::new() } else { clean(body) };
            if body.len() > 1 && body.starts_with('/') {
                body.remove(0);
            }
            Some(IgnoreRule {
                pattern: format!("{bang}{body}"),
                line: i + 1,
                text: text.to_owned(),
            })
        });
        Self { rules: rules.collect() }
    }

    /// Its rules in order.
    pub fn rules(&self) -> &[IgnoreRule] {
        &self.rules
    }

    /// Its patterns in order.
    pub fn patterns(&self) -> Vec<String> {
        self.rules.iter().map(|r| r.pattern.clone()).collect()
    }

    /// The rule that excludes `path`, if one does.
    pub fn excluder(&self, path: &str) -> Result<Option<&IgnoreRule>> {
        let matcher = PatternMatcher::new(self.rules.iter().map(|r| &r.pattern))?;
        let path = clean(path);
        let path = path.trim_start_matches('/');
        Ok(matcher
            .decider(path)
            .filter(|p| !p.is_negated())
            .and_then(|p| self.rules.get(p.index())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_become_patterns() {
        let file = IgnoreFile::parse(b"\xef\xbb\xbf# comment\r\n\r\n /abs/path \r\n!  keep/../me\n #not a comment\na/b/\n/\n");
        let got: Vec<_> = file.rules().iter().map(|r| (r.line, r.pattern.as_str())).collect();
        assert_eq!(got, [(3, "abs/path"), (4, "!me"), (5, "#not a comment"), (6, "a/b"), (7, "/")]);
    }

    #[test]
    fn the_excluding_line_is_found() {
        let file = IgnoreFile::parse(b"# nothing\n*.log\n!keep.log\nbuild\n");
        let line = |path| file.excluder(path).expect("valid").map(|r| r.line);
        assert_eq!(line("x.log"), Some(2));
        assert_eq!(line("keep.log"), None);
        assert_eq!(line("/build/out/a"), Some(4));
        assert_eq!(line("src"), None);
    }
}
