//! Matching of one glob against one path, in time proportional to the product of their lengths whatever the pattern.

use shipway_fault::{Fault, Result};

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
    /// Compiles `pattern`; with `double_star`, `**` spans directories, otherwise it means `*`.
    pub fn new(pattern: &str, double_star: bool) -> Result<Self> {
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
                '[' => steps.push(class(&mut chars).ok_or_else(|| malformed(pattern))?),
                '\\' => steps.push(Step::Literal(chars.next().ok_or_else(|| malformed(pattern))?)),
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
    pub(crate) fn matches_or_parent(&self, path: &str) -> bool {
        self.run(path, true)
    }

    fn run(&self, text: &str, parents: bool) -> bool {
        let steps = &self.0;
        let literal = steps.iter().map_while(|s| if let Step::Literal(c) = s { Some(*c) } else { None });
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
                    Step::Class { negated, ranges } => (false, ranges.iter().any(|(a, b)| (*a..=*b).contains(&c)) != *negated),
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
fn class(chars: &mut std::iter::Peekable<std::str::Chars<'_>>) -> Option<Step> {
    let negated = chars.next_if_eq(&'^').is_some();
    let mut ranges = Vec::new();
    let bound = |chars: &mut std::iter::Peekable<std::str::Chars<'_>>| match chars.next()? {
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

fn malformed(pattern: &str) -> Fault {
    Fault::invalid(format!("syntax error in pattern {pattern:?}"))
        .hint("a pattern ends with a lone backslash or has an unclosed or empty [class]")
}
