//! Where in a file the thing stands that a finding or a mistake is about.
//!
//! Parsing notes lines only. Callers with something to report name a [`Token`], and [`Source`]
//! looks for it in the text when it is shown: the instruction's lines are joined once more, now
//! with a note of where each piece came from.

use shipway_fault::{Position, Span};

use crate::{ast::Lines, directive, error::Error, lines::continuation, token::Token, words};

/// A file in which places are looked for.
#[derive(Debug)]
pub struct Source<'a> {
    lines: Vec<&'a str>,
    escape: char,
}

impl<'a> Source<'a> {
    /// The text of a Dockerfile.
    pub fn new(text: &'a str) -> Self {
        let text = text.strip_prefix('\u{feff}').unwrap_or(text);
        let escape = directive::find("escape", text.as_bytes())
            .and_then(|d| d.value.chars().next())
            .unwrap_or('\\');
        Self { lines: text.split('\n').map(|line| line.trim_end_matches('\r')).collect(), escape }
    }

    /// One span per line as [`Lines::spans`] gives them, of which the one with the token on it has
    /// the token's characters.
    pub fn spans(&self, lines: Lines, token: Option<&Token>) -> Vec<Span> {
        pin(lines, token.and_then(|token| self.find(lines, token)))
    }

    /// The same for a message: what it quotes of the text, or a flag that it names.
    pub fn spans_of_message(&self, lines: Lines, message: &str) -> Vec<Span> {
        let Some(joined) = self.join(lines) else { return lines.spans() };
        pin(
            lines,
            quoted(message).into_iter().find_map(|word| self.span(&joined, joined.find(word)?)),
        )
    }

    /// The place of `text` in the instruction on `lines`, if it stands there as it is.
    pub fn find_text(&self, lines: Lines, text: &str) -> Option<Span> {
        let joined = self.join(lines)?;
        self.span(&joined, joined.find(text)?)
    }

    /// The place of `token` in the instruction on `lines`.
    pub fn find(&self, lines: Lines, token: &Token) -> Option<Span> {
        if *token == Token::Directive {
            let number = lines.start + 1;
            let end = characters(self.line(number)?.trim_end());
            return Some(Span {
                start: Position { line: number, character: 0 },
                end: Position { line: number, character: end },
            });
        }
        let joined = self.join(lines)?;
        let at = match token {
            Token::Directive => None,
            Token::Keyword => Some(joined.keyword()),
            Token::Flag(flag) => joined.flag(flag),
            Token::Arguments => Some(joined.arguments()),
            Token::Word(n) => joined.word(*n),
            Token::Text(text) => joined.find(text).or_else(|| Some(joined.arguments())),
            Token::Variable(name) => match variable(&joined.text, name, self.escape, true) {
                None => return self.in_bodies(joined.last + 1..=lines.end, name),
                found => found,
            },
        };
        self.span(&joined, at?)
    }

    fn line(&self, number: i32) -> Option<&'a str> {
        self.lines.get(usize::try_from(number).ok()?.checked_sub(1)?).copied()
    }

    /// A variable in the texts of heredocs, which follow the instruction's own lines.
    fn in_bodies(&self, mut lines: std::ops::RangeInclusive<i32>, name: &str) -> Option<Span> {
        lines.find_map(|number| {
            let line = self.line(number)?;
            let (start, end) = variable(line, name, '\\', false)?;
            let position =
                |at: usize| Position { line: number, character: characters(&line[..at]) };
            Some(Span { start: position(start), end: position(end) })
        })
    }

    /// The instruction's text as the parser sees it.
    fn join(&self, lines: Lines) -> Option<Joined> {
        let first = self.line(lines.start)?;
        let text = first.trim_start();
        let (line, mut continues) = continuation(text, self.escape);
        let piece = Piece { from: 0, line: lines.start, column: first.len() - text.len() };
        let mut joined = Joined {
            text: line.to_owned(),
            pieces: vec![piece],
            escape: self.escape,
            last: lines.start,
        };
        while continues && joined.last < lines.end {
            joined.last += 1;
            let line = self.line(joined.last)?;
            if line.trim_start().is_empty() || line.trim_start().starts_with('#') {
                continue;
            }
            let (line, more) = continuation(line, self.escape);
            joined.pieces.push(Piece { from: joined.text.len(), line: joined.last, column: 0 });
            joined.text.push_str(line);
            continues = more;
        }
        Some(joined)
    }

    /// A stretch of the joined text in the file; what goes over the end of a line is cut off there.
    fn span(&self, joined: &Joined, (start, end): (usize, usize)) -> Option<Span> {
        let piece = joined.pieces.iter().rfind(|p| p.from <= start)?;
        let next =
            joined.pieces.iter().find(|p| p.from > start).map_or(joined.text.len(), |p| p.from);
        let line = self.line(piece.line)?;
        let position = |at: usize| {
            let before = line.get(..piece.column + (at - piece.from))?;
            Some(Position { line: piece.line, character: characters(before) })
        };
        Some(Span { start: position(start)?, end: position(end.min(next))? })
    }
}

fn characters(text: &str) -> i32 {
    text.chars().count() as i32
}

/// One span per line, `exact` in the place of its line's; `exact` alone if it is on none of them.
pub fn pin(lines: Lines, exact: Option<Span>) -> Vec<Span> {
    let mut spans = lines.spans();
    let Some(exact) = exact else { return spans };
    match spans.iter_mut().find(|s| s.start.line == exact.start.line) {
        Some(span) => *span = exact,
        None => spans = vec![exact],
    }
    spans
}

/// A line's part of a joined text.
struct Piece {
    /// Where it begins in the joined text.
    from: usize,
    line: i32,
    /// Where it begins in its line, in bytes.
    column: usize,
}

struct Joined {
    text: String,
    pieces: Vec<Piece>,
    escape: char,
    /// The last line that was joined.
    last: i32,
}

impl Joined {
    /// Where the keyword ends and where the arguments begin and end.
    fn parts(&self) -> (usize, usize, usize) {
        let end = self.text.trim_end().len();
        let (keyword, _, rest) = words::split(&self.text, self.escape);
        (self.text.len() - self.text.trim_start().len() + keyword.len(), end - rest.len(), end)
    }

    fn keyword(&self) -> (usize, usize) {
        (self.text.len() - self.text.trim_start().len(), self.parts().0)
    }

    fn arguments(&self) -> (usize, usize) {
        match self.parts() {
            (_, start, end) if start < end => (start, end),
            _ => self.keyword(),
        }
    }

    fn word(&self, n: usize) -> Option<(usize, usize)> {
        let (start, end) = self.arguments();
        let rest = &self.text[start..end];
        let word = rest.split(words::BLANKS).filter(|w| !w.is_empty()).nth(n)?;
        // The word is a part of `rest`, so its distance is that of its beginning.
        let at = start + (word.as_ptr() as usize - rest.as_ptr() as usize);
        Some((at, at + word.len()))
    }

    fn flag(&self, flag: &str) -> Option<(usize, usize)> {
        let (keyword, rest, _) = self.parts();
        let flags = &self.text[keyword..rest];
        let name = flag.split('=').next().unwrap_or(flag);
        let found = |word: &str| bounded(flags, word).map(|at| (at, at + word.len()));
        let (start, end) = found(flag).or_else(|| found(name))?;
        Some((keyword + start, keyword + end + rest_of_word(&flags[end..])))
    }

    /// Where `text` stands after the keyword, best as a word of its own.
    fn find(&self, text: &str) -> Option<(usize, usize)> {
        let keyword = self.parts().0;
        let after = &self.text[keyword..];
        if text.is_empty() {
            return None;
        }
        let at = bounded(after, text).or_else(|| after.find(text)).map(|at| keyword + at);
        // Only the keyword itself is left.
        let at = at.or_else(|| {
            (self.text.trim_start().get(..text.len()) == Some(text)).then(|| self.keyword().0)
        })?;
        Some((at, at + text.len()))
    }
}

/// How far the word goes on at the beginning of `text`, blanks between quotes included.
fn rest_of_word(text: &str) -> usize {
    let mut quote = None;
    let end = text.find(|c: char| {
        match quote {
            None if matches!(c, '"' | '\'') => quote = Some(c),
            Some(open) if open == c => quote = None,
            _ => {}
        }
        quote.is_none() && c.is_whitespace()
    });
    end.unwrap_or(text.len())
}

/// Where `word` stands with nothing of a longer word on either side.
fn bounded(text: &str, word: &str) -> Option<usize> {
    let part = |c: char| c.is_alphanumeric() || matches!(c, '_' | '-' | '.' | '/');
    text.match_indices(word).map(|(at, _)| at).find(|at| {
        let (before, after) =
            (text[..*at].chars().next_back(), text[at + word.len()..].chars().next());
        !before.is_some_and(part) && !after.is_some_and(part)
    })
}

/// Where the name of the variable stands: not behind an escape, and not between single quotes if
/// `quotes` count.
fn variable(text: &str, name: &str, escape: char, quotes: bool) -> Option<(usize, usize)> {
    let (mut single, mut double) = (false, false);
    let mut chars = text.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '\'' if quotes && !double => single = !single,
            '"' if quotes && !single => double = !double,
            c if c == escape && !single => drop(chars.next()),
            '$' if !single => {
                let start = at + 1 + usize::from(text[at + 1..].starts_with('{'));
                let follows = text[start..].strip_prefix(name).map(|rest| rest.chars().next());
                if follows
                    .is_some_and(|next| !next.is_some_and(|c| c.is_alphanumeric() || c == '_'))
                {
                    return Some((start, start + name.len()));
                }
            }
            _ => {}
        }
    }
    None
}

/// The stretches of a message that come from the file: what is quoted, a flag, what follows a
/// colon.
fn quoted(message: &str) -> Vec<&str> {
    let message = message
        .split_once(" on line ")
        .and_then(|(_, m)| m.split_once(": "))
        .map_or(message, |(_, m)| m);
    let message = message.split_once(" (did you mean").map_or(message, |(m, _)| m);
    let mut found: Vec<&str> =
        message.split(' ').filter(|w| w.starts_with("--") && w.len() > 2).collect();
    for quote in ['"', '\''] {
        found.extend(message.split(quote).skip(1).step_by(2).filter(|w| !w.is_empty()));
    }
    found.extend(message.rsplit_once(": ").map(|(_, w)| w).filter(|w| !w.is_empty()));
    found
}
impl Error {
    /// The lines in `source` with the place in them, empty when unknown.
    pub fn spans(&self, source: &Source<'_>) -> Vec<Span> {
        match (self.lines, &self.token) {
            (None, _) => Vec::new(),
            (Some(lines), None) => source.spans_of_message(lines, &self.message),
            (Some(lines), token) => source.spans(lines, token.as_ref()),
        }
    }
}
