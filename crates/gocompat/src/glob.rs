//! `path.Match`, compiled: one pattern against one path, in time proportional to the product of
//! their lengths whatever the pattern.

use std::{error::Error, fmt, iter::Peekable, str::Chars};

/// A pattern is malformed: it ends with a lone backslash, or has an unclosed or empty class.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadPattern;

impl fmt::Display for BadPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("syntax error in pattern")
    }
}

impl Error for BadPattern {}

/// Whether `pattern` has a `*`, `?` or `[` that is not escaped.
pub fn has_wildcards(pattern: &str) -> bool {
    let mut chars = pattern.chars();
    while let Some(c) = chars.next() {
        match c {
            '\\' => drop(chars.next()),
            '*' | '?' | '[' => return true,
            _ => {}
        }
    }
    false
}

/// One step of a compiled pattern.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Step {
    /// This character.
    Literal(char),
    /// Any character but a slash.
    One,
    /// Any number of characters but slashes.
    Star,
    /// Any number of any characters.
    All,
    /// The entrance of "nothing, or any directories": skips [`Step::Dirs`] or enters it.
    MaybeDirs,
    /// Any characters up to and including some slash.
    Dirs,
    /// A character in, or not in, these ranges.
    Class { negated: bool, ranges: Vec<(char, char)> },
}

/// A pattern with wildcards, compiled.
#[derive(Clone, Debug)]
pub struct Glob(Vec<Step>);

impl Glob {
    /// Compiles a pattern of Go's `path.Match`: `*` and `?` match no slash, `**` means `*`. Unlike
    /// Go, which finds some mistakes only in certain texts, all are found here.
    pub fn new(pattern: &str) -> Result<Self, BadPattern> {
        Self::compile(pattern, false)
    }

    /// Compiles a pattern of `.dockerignore` (moby's `patternmatcher`), where `**` spans
    /// directories besides.
    pub fn with_double_star(pattern: &str) -> Result<Self, BadPattern> {
        Self::compile(pattern, true)
    }

    fn compile(pattern: &str, double_star: bool) -> Result<Self, BadPattern> {
        let mut chars = pattern.chars().peekable();
        let mut steps = Vec::new();
        while let Some(c) = chars.next() {
            match c {
                '*' if double_star && chars.peek() == Some(&'*') => {
                    chars.next();
                    // "**/" means the same as "**".
                    chars.next_if_eq(&'/');
                    match chars.peek() {
                        None => steps.push(Step::All),
                        Some(_) => steps.extend([Step::MaybeDirs, Step::Dirs]),
                    }
                }
                '*' => {
                    if steps.last() != Some(&Step::Star) {
                        steps.push(Step::Star);
                    }
                }
                '?' => steps.push(Step::One),
                '[' => steps.push(class(&mut chars).ok_or(BadPattern)?),
                '\\' => steps.push(Step::Literal(chars.next().ok_or(BadPattern)?)),
                c => steps.push(Step::Literal(c)),
            }
        }
        Ok(Self(steps))
    }

    /// Whether the whole of `text` matches.
    pub fn matches(&self, text: &str) -> bool {
        self.run(text, false)
    }

    /// Whether `path` or a directory above it matches, in one pass.
    pub fn matches_or_parent(&self, path: &str) -> bool {
        self.run(path, true)
    }

    fn run(&self, text: &str, parents: bool) -> bool {
        let steps = &self.0;
        let literal =
            steps.iter().map_while(|s| if let Step::Literal(c) = s { Some(*c) } else { None });
        let mut chars = text.chars();
        let mut start = 0;
        for expected in literal {
            if chars.next() != Some(expected) {
                return false;
            }
            start += 1;
        }
        let mut now = vec![false; steps.len() + 1];
        let mut next = now.clone();
        self.enter(&mut now, start);
        for c in chars {
            if parents && c == '/' && now[steps.len()] {
                return true;
            }
            next.fill(false);
            let mut alive = false;
            for (i, step) in steps.iter().enumerate().skip(start) {
                if !now[i] {
                    continue;
                }
                let (stay, advance) = match step {
                    Step::Literal(l) => (false, c == *l),
                    Step::One => (false, c != '/'),
                    Step::Star => (c != '/', false),
                    Step::All => (true, false),
                    Step::MaybeDirs => (false, false),
                    Step::Dirs => (true, c == '/'),
                    Step::Class { negated, ranges } => {
                        (false, ranges.iter().any(|(a, b)| (*a..=*b).contains(&c)) != *negated)
                    }
                };
                if stay {
                    self.enter(&mut next, i);
                }
                if advance {
                    self.enter(&mut next, i + 1);
                }
                alive |= stay || advance;
            }
            if !alive {
                return false;
            }
            std::mem::swap(&mut now, &mut next);
        }
        now[steps.len()]
    }

    /// Marks step `i` and the steps that can be reached from it without a character.
    fn enter(&self, states: &mut [bool], mut i: usize) {
        loop {
            if std::mem::replace(&mut states[i], true) {
                return;
            }
            match self.0.get(i) {
                Some(Step::Star | Step::All) => i += 1,
                Some(Step::MaybeDirs) => {
                    states[i + 1] = true;
                    i += 2;
                }
                _ => return,
            }
        }
    }
}

/// The rest of a class after its `[`.
fn class(chars: &mut Peekable<Chars<'_>>) -> Option<Step> {
    let negated = chars.next_if_eq(&'^').is_some();
    let mut ranges = Vec::new();
    let bound = |chars: &mut Peekable<Chars<'_>>| match chars.next()? {
        '-' | ']' => None,
        '\\' => chars.next(),
        c => Some(c),
    };
    loop {
        if !ranges.is_empty() && chars.next_if_eq(&']').is_some() {
            return Some(Step::Class { negated, ranges });
        }
        let low = bound(chars)?;
        let high = if chars.next_if_eq(&'-').is_some() { bound(chars)? } else { low };
        ranges.push((low, high));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_that_matches_has_all_that_is_in_it() {
        let paths = ["a", "a/b", "a/b/c", "ab", "b/a", "b/ab/c", "x/y/a/z"];
        for pattern in
            ["a", "*", "a*", "*/*", "**", "**/a", "a/**", "**/a/**", "b/**/c", "[^a]*", "?/?"]
        {
            let glob = Glob::with_double_star(pattern).unwrap();
            for path in paths {
                let above = path.match_indices('/').any(|(slash, _)| glob.matches(&path[..slash]));
                assert_eq!(
                    glob.matches_or_parent(path),
                    above || glob.matches(path),
                    "{pattern} {path}"
                );
            }
        }
    }

    #[test]
    fn two_stars_span_directories_only_where_they_are_asked_to() {
        for (pattern, path, spans) in [
            ("**/c", "a/b/c", true),
            ("a**c", "a/b/c", true),
            ("a**c", "abc", false),
            ("**", "a/b", true),
            ("**/c", "c", true),
        ] {
            assert_eq!(
                Glob::with_double_star(pattern).unwrap().matches(path),
                spans,
                "{pattern} {path}"
            );
        }
        assert!(!Glob::new("**/c").unwrap().matches("a/b/c"));
    }

    #[test]
    fn no_pattern_takes_long() {
        let (pattern, text) = ("a*".repeat(200) + "b", "a".repeat(2000));
        assert!(!Glob::new(&pattern).unwrap().matches(&text));
    }

    #[test]
    fn wildcards_can_be_escaped() {
        for (path, expected) in [
            ("/a*", true),
            ("/a\\*", false),
            ("/[a]", true),
            ("/a?", true),
            ("/a", false),
            ("a\\", false),
        ] {
            assert_eq!(has_wildcards(path), expected, "{path}");
        }
    }
}
