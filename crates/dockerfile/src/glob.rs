//! The patterns of `${v#p}`, `${v%p}` and `${v/p/r}`: `*` for any text within a line, `?` for any
//! character, `\` to escape.
//!
//! A pattern is cut at its stars into pieces of fixed length. Placing the pieces one after the
//! other as early as possible decides whether it matches, and the last piece placed early or late
//! gives the shortest or the longest match, so nothing backtracks. A step counter bounds what is
//! left: long pieces that almost match everywhere.

use crate::{
    error::{Error, Result},
    work::Work,
};

/// Comparisons allowed for one substitution; about a tenth of a second.
const MAX_STEPS: u64 = 50_000_000;

#[derive(Clone, Copy)]
enum Unit {
    Char(char),
    Any,
}

struct Pattern {
    /// Never empty; between each two of them stands a star.
    pieces: Vec<Vec<Unit>>,
    greedy: bool,
}

impl Pattern {
    fn parse(pattern: &str, greedy: bool) -> Result<Self> {
        let invalid = |c: char| {
            Error::new(format!(
                "invalid pattern ({pattern}) in substitution: invalid escape '\\{c}'"
            ))
        };
        let mut pieces = vec![Vec::new()];
        let mut chars = pattern.chars().peekable();
        while let Some(c) = chars.next() {
            let unit = match c {
                '*' => {
                    pieces.push(Vec::new());
                    continue;
                }
                '?' => Unit::Any,
                // In `${…}` these two are escaped for the sake of the substitution, not of the
                // pattern.
                '\\' if matches!(chars.peek(), Some('}' | '/')) => continue,
                '\\' => match chars.next() {
                    Some(c @ ('*' | '?' | '\\')) => Unit::Char(c),
                    c => return Err(invalid(c.unwrap_or('\u{fffd}'))),
                },
                c => Unit::Char(c),
            };
            if let Some(piece) = pieces.last_mut() {
                piece.push(unit);
            }
        }
        Ok(Self { pieces, greedy })
    }
}

struct Search<'a> {
    pattern: &'a Pattern,
    text: &'a [char],
    work: &'a Work,
    /// Steps that it had in the beginning, and those that are left.
    begun: u64,
    steps: u64,
}

/// Whatever comes of it, its steps are gone.
impl Drop for Search<'_> {
    fn drop(&mut self) {
        self.work.take(self.begun - self.steps);
    }
}

impl<'a> Search<'a> {
    fn new(pattern: &'a Pattern, text: &'a [char], work: &'a Work) -> Self {
        let steps = work.left().min(MAX_STEPS);
        Self { pattern, text, work, begun: steps, steps }
    }

    fn fits(&mut self, piece: &[Unit], at: usize) -> Result<bool> {
        let Some(text) = self.text.get(at..at + piece.len()) else { return Ok(false) };
        for (unit, c) in piece.iter().zip(text) {
            self.steps = self.steps.checked_sub(1).ok_or_else(|| {
                Error::new("the pattern of a substitution takes too long to match")
            })?;
            let fits = match unit {
                Unit::Char(wanted) => wanted == c,
                Unit::Any => *c != '\n',
            };
            if !fits {
                return Ok(false);
            }
        }
        self.steps = self
            .steps
            .checked_sub(1)
            .ok_or_else(|| Error::new("the pattern of a substitution takes too long to match"))?;
        Ok(true)
    }

    /// The end of the line that `at` is in.
    fn line_end(&self, at: usize) -> usize {
        self.text[at..].iter().position(|c| *c == '\n').map_or(self.text.len(), |n| at + n)
    }

    /// The end of the match that starts at `start`.
    fn at(&mut self, start: usize) -> Result<Option<usize>> {
        let pattern = self.pattern;
        let (first, rest) = (&pattern.pieces[0], &pattern.pieces[1..]);
        if !self.fits(first, start)? {
            return Ok(None);
        }
        let mut end = start + first.len();
        for (i, piece) in rest.iter().enumerate() {
            let places = end..=self.line_end(end);
            let late = pattern.greedy && i + 1 == rest.len();
            let Some(place) =
                (if late { self.place(piece, places.rev())? } else { self.place(piece, places)? })
            else {
                return Ok(None);
            };
            end = place + piece.len();
        }
        Ok(Some(end))
    }

    fn place(
        &mut self,
        piece: &[Unit],
        places: impl Iterator<Item = usize>,
    ) -> Result<Option<usize>> {
        for place in places {
            if self.fits(piece, place)? {
                return Ok(Some(place));
            }
        }
        Ok(None)
    }

    /// The leftmost match from `from` on.
    fn find(&mut self, from: usize) -> Result<Option<(usize, usize)>> {
        let pieces = &self.pattern.pieces;
        let one_line = !pieces.iter().flatten().any(|u| matches!(u, Unit::Char('\n')));
        let mut start = from;
        while start <= self.text.len() {
            if !self.fits(&pieces[0], start)? {
                start += 1;
                continue;
            }
            match self.at(start)? {
                Some(end) => return Ok(Some((start, end))),
                // What does not follow here does not follow later in the line either.
                None if one_line => start = self.line_end(start) + 1,
                None => start += 1,
            }
        }
        Ok(None)
    }
}

/// `${v#pattern}`, or `##` when greedy.
pub fn trim_prefix(pattern: &str, value: &str, greedy: bool, work: &Work) -> Result<String> {
    let pattern = Pattern::parse(pattern, greedy)?;
    let text: Vec<char> = value.chars().collect();
    let end = Search::new(&pattern, &text, work).at(0)?.unwrap_or(0);
    Ok(text[end..].iter().collect())
}

/// `${v%pattern}`, or `%%` when greedy: the prefix of everything written backwards.
pub fn trim_suffix(pattern: &str, value: &str, greedy: bool, work: &Work) -> Result<String> {
    let value: String = value.chars().rev().collect();
    let rest = trim_prefix(&reversed(pattern), &value, greedy, work)?;
    Ok(rest.chars().rev().collect())
}

fn reversed(pattern: &str) -> String {
    let mut units = Vec::new();
    let mut chars = pattern.chars();
    while let Some(c) = chars.next() {
        match (c, if c == '\\' { chars.next() } else { None }) {
            (c, Some(escaped)) => units.extend([escaped, c]),
            (c, None) => units.push(c),
        }
    }
    units.into_iter().rev().collect()
}

/// `${v/pattern/replacement}`, or `//` for all. The result must not grow by more than `budget`
/// bytes.
pub fn replace(
    pattern: &str,
    value: &str,
    replacement: &str,
    all: bool,
    budget: usize,
    work: &Work,
) -> Result<String> {
    let pattern = Pattern::parse(pattern, true)?;
    let text: Vec<char> = value.chars().collect();
    let mut search = Search::new(&pattern, &text, work);
    let mut out = String::new();
    let (mut from, mut copied) = (0, 0);
    while let Some((start, end)) = search.find(from)? {
        out.extend(&text[copied..start]);
        if !all {
            out.push_str(replacement);
            copied = end;
            break;
        }
        // An empty match right after a match does not count.
        if end > copied || start == 0 {
            template(replacement, &text[start..end], &mut out);
        }
        if out.len() > value.len() + budget {
            return Err(Error::new("the expanded text is too long"));
        }
        copied = end;
        from = end.max(from + 1);
    }
    out.extend(&text[copied..]);
    Ok(out)
}

/// The replacement of `//` knows `$0` and drops other `$names`, as the reference's regular
/// expressions do.
fn template(replacement: &str, matched: &[char], out: &mut String) {
    let mut rest = replacement;
    while let Some((before, after)) = rest.split_once('$') {
        out.push_str(before);
        rest = after;
        if let Some(after) = rest.strip_prefix('$') {
            out.push('$');
            rest = after;
            continue;
        }
        let (name, end) = match rest.strip_prefix('{') {
            Some(inner) => inner
                .find(|c: char| !(c.is_alphanumeric() || c == '_'))
                .filter(|n| inner[*n..].starts_with('}'))
                .map_or(("", 0), |n| (&inner[..n], n + 2)),
            None => {
                let n =
                    rest.find(|c: char| !(c.is_alphanumeric() || c == '_')).unwrap_or(rest.len());
                (&rest[..n], n)
            }
        };
        match name {
            "" => out.push('$'),
            "0" => out.extend(matched),
            _ => {}
        }
        rest = &rest[end..];
    }
    out.push_str(rest);
}
