//! Word expansion in the manner of a shell: quotes, escapes, `$v`, `${v}` with its operators, and
//! splitting into words.
//!
//! The rules are those users know from the reference, oddities included (rows `df.expand`,
//! `df.expand.pat`). Everything is one pass over the text; nesting is bounded, and so is the size
//! of a result, since `ENV A=$A$A` doubles with every line.

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet, HashMap},
};

use crate::{
    error::{Error, Result},
    glob,
    work::Work,
};
use shipway_gocompat::quote;

/// How deep `${a:-${b:-…}}` may go.
const MAX_DEPTH: usize = 100;
/// How much longer than its text a result may become.
const MAX_GROWTH: usize = 1 << 20;

/// The variables that words may use.
pub trait Env {
    /// The value of `name`, `None` when it is not set.
    fn get(&self, name: &str) -> Option<Cow<'_, str>>;
}

/// No variables at all.
impl Env for () {
    fn get(&self, _: &str) -> Option<Cow<'_, str>> {
        None
    }
}

impl Env for HashMap<String, String> {
    fn get(&self, name: &str) -> Option<Cow<'_, str>> {
        self.get(name).map(|v| Cow::Borrowed(v.as_str()))
    }
}

impl Env for BTreeMap<String, String> {
    fn get(&self, name: &str) -> Option<Cow<'_, str>> {
        self.get(name).map(|v| Cow::Borrowed(v.as_str()))
    }
}

/// Pairs as in an image config; the last one of a name counts.
impl Env for [(String, String)] {
    fn get(&self, name: &str) -> Option<Cow<'_, str>> {
        self.iter().rev().find(|(k, _)| k == name).map(|(_, v)| Cow::Borrowed(v.as_str()))
    }
}

/// What became of a text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Expanded {
    /// The text, variables replaced and quotes gone.
    pub text: String,
    /// Variables that were used and set.
    pub matched: BTreeSet<String>,
    /// Variables that were used and not set; lint rule `UndefinedVar` is about them.
    pub unmatched: BTreeSet<String>,
}

/// How to read words: with which escape character, and what to leave alone.
#[derive(Clone, Debug)]
pub struct Lex {
    escape: char,
    raw_quotes: bool,
    raw_escapes: bool,
    skip_quotes: bool,
    keep_unset: bool,
    work: Work,
}

impl Lex {
    /// Words of a Dockerfile whose escape character is `escape`.
    pub fn new(escape: char) -> Self {
        Self {
            escape,
            raw_quotes: false,
            raw_escapes: false,
            skip_quotes: false,
            keep_unset: false,
            work: Work::default(),
        }
    }

    /// Contents of inline files: quotes mean nothing and the escape is always `\`.
    pub fn for_contents() -> Self {
        Self { skip_quotes: true, ..Self::new('\\') }
    }

    /// Expands as part of `work`, which others do parts of, too.
    #[must_use]
    pub fn part_of(self, work: &Work) -> Self {
        Self { work: work.clone(), ..self }
    }

    /// The work that it is part of.
    pub fn work(&self) -> &Work {
        &self.work
    }

    /// Keeps the quotes in the result.
    #[must_use]
    pub fn raw_quotes(self) -> Self {
        Self { raw_quotes: true, ..self }
    }

    /// Keeps the escape characters in the result.
    #[must_use]
    pub fn raw_escapes(self) -> Self {
        Self { raw_escapes: true, ..self }
    }

    /// Leaves variables that are not set as they are written.
    #[must_use]
    pub fn keep_unset(self) -> Self {
        Self { keep_unset: true, ..self }
    }

    /// Expands `text` to one text; blanks stay.
    pub fn word<E: Env + ?Sized>(&self, text: &str, env: &E) -> Result<Expanded> {
        self.word_noting(text, env, &mut BTreeSet::new())
    }

    /// The same; `unmatched` gets the names that are not set also where the expansion fails.
    pub fn word_noting<E: Env + ?Sized>(
        &self,
        text: &str,
        env: &E,
        unmatched: &mut BTreeSet<String>,
    ) -> Result<Expanded> {
        self.work.read(text)?;
        let special = |c| {
            c == '$'
                || c == self.escape
                || c == '<'
                || c == '\u{feff}'
                || (!self.skip_quotes && (c == '"' || c == '\''))
        };
        if !text.contains(special) {
            return Ok(Expanded { text: text.to_owned(), ..Expanded::default() });
        }
        let mut pass = Pass::new(self, text, env);
        let text = pass.whole(text, None).inspect(|text| self.work.keep(text));
        unmatched.extend(pass.unmatched.iter().cloned());
        Ok(Expanded { text: text?, matched: pass.matched, unmatched: pass.unmatched })
    }

    /// Expands `text` and splits it at the blanks that are not quoted; blanks from variables split
    /// too.
    pub fn words<E: Env + ?Sized>(&self, text: &str, env: &E) -> Result<Vec<String>> {
        self.work.read(text)?;
        let mut words = Words::default();
        let whole = Pass::new(self, text, env).whole(text, Some(&mut words))?;
        self.work.keep(&whole);
        Ok(words.finish())
    }
}

#[derive(Default)]
struct Words {
    done: Vec<String>,
    word: String,
}

impl Words {
    fn push(&mut self, c: char) {
        if !c.is_whitespace() {
            self.word.push(c);
        } else if !self.word.is_empty() {
            self.done.push(std::mem::take(&mut self.word));
        }
    }

    fn finish(mut self) -> Vec<String> {
        if !self.word.is_empty() {
            self.done.push(self.word);
        }
        self.done
    }
}

struct Pass<'a, E: Env + ?Sized> {
    lex: &'a Lex,
    env: &'a E,
    rest: &'a str,
    raw_escapes: bool,
    /// An operator's word was read. When splitting, the reference then forgets what the current
    /// word had before it (`EXPOSE 80${x:-80}` exposes 80), and image configs shall be equal.
    forget: bool,
    depth: usize,
    budget: usize,
    matched: BTreeSet<String>,
    unmatched: BTreeSet<String>,
}

impl<'a, E: Env + ?Sized> Pass<'a, E> {
    fn new(lex: &'a Lex, text: &'a str, env: &'a E) -> Self {
        // The reference's scanner drops a byte order mark at the start.
        let rest = text.strip_prefix('\u{feff}').unwrap_or(text);
        let budget = text.len().saturating_mul(2).saturating_add(MAX_GROWTH);
        Self {
            lex,
            env,
            rest,
            raw_escapes: lex.raw_escapes,
            forget: false,
            depth: 0,
            budget,
            matched: BTreeSet::new(),
            unmatched: BTreeSet::new(),
        }
    }

    fn whole(&mut self, text: &str, words: Option<&mut Words>) -> Result<String> {
        self.until(None, self.raw_escapes, words).map_err(|e| Error {
            message: format!("failed to process {}: {}", quote(text), e.message),
            ..e
        })
    }

    fn peek(&self) -> Option<char> {
        self.rest.chars().next()
    }

    fn next(&mut self) -> Option<char> {
        let mut chars = self.rest.chars();
        let c = chars.next();
        self.rest = chars.as_str();
        c
    }

    fn next_is(&mut self, c: char) -> bool {
        let yes = self.peek() == Some(c);
        if yes {
            self.next();
        }
        yes
    }

    /// Reads up to `stop` (which is consumed), or to the end when there is none.
    fn until(
        &mut self,
        stop: Option<char>,
        raw_escapes: bool,
        words: Option<&mut Words>,
    ) -> Result<String> {
        let outer = std::mem::replace(&mut self.raw_escapes, raw_escapes);
        let result = self.read(stop, words);
        self.raw_escapes = outer;
        self.forget = stop.is_some();
        result
    }

    fn read(&mut self, stop: Option<char>, mut words: Option<&mut Words>) -> Result<String> {
        let mut out = String::new();
        while let Some(c) = self.peek() {
            if stop == Some(c) {
                self.next();
                return Ok(out);
            }
            let special = match c {
                '$' => Some(self.dollar()?),
                '<' => Some(self.angle()),
                '\'' if !self.lex.skip_quotes => Some(self.single_quoted()?),
                '"' if !self.lex.skip_quotes => Some(self.double_quoted()?),
                _ => None,
            };
            if let Some(text) = special {
                self.spend(text.len())?;
                let forget = std::mem::take(&mut self.forget);
                if let Some(words) = &mut words {
                    if forget {
                        words.word.clear();
                    }
                    if c == '$' {
                        text.chars().for_each(|c| words.push(c));
                    } else {
                        words.word.push_str(&text);
                    }
                }
                out.push_str(&text);
                continue;
            }
            self.next();
            if c != self.lex.escape {
                out.push(c);
                if let Some(words) = &mut words {
                    words.push(c);
                }
                continue;
            }
            let kept = self.raw_escapes.then_some(c);
            // An escape at the very end is dropped.
            for c in kept.into_iter().chain(self.next()) {
                out.push(c);
                if let Some(words) = &mut words {
                    words.word.push(c);
                }
            }
        }
        match stop {
            None => Ok(out),
            Some(stop) => Err(Error::new(format!(
                "unexpected end of statement while looking for matching {stop}"
            ))),
        }
    }

    fn spend(&mut self, bytes: usize) -> Result<()> {
        self.budget = self.budget.checked_sub(bytes).ok_or_else(|| {
            Error::new("the expanded text is too long")
                .hint("a variable probably contains itself several times over, as in ENV A=$A$A")
        })?;
        Ok(())
    }

    fn single_quoted(&mut self) -> Result<String> {
        self.next();
        let Some(end) = self.rest.find('\'') else {
            self.rest = "";
            return Err(Error::new(
                "unexpected end of statement while looking for matching single-quote",
            ));
        };
        let inner = &self.rest[..end];
        self.rest = &self.rest[end + 1..];
        Ok(if self.lex.raw_quotes { format!("'{inner}'") } else { inner.to_owned() })
    }

    fn double_quoted(&mut self) -> Result<String> {
        self.next();
        let mut out = String::new();
        if self.lex.raw_quotes {
            out.push('"');
        }
        loop {
            match self.peek() {
                None => {
                    return Err(Error::new(
                        "unexpected end of statement while looking for matching double-quote",
                    ));
                }
                Some('"') => {
                    self.next();
                    if self.lex.raw_quotes {
                        out.push('"');
                    }
                    return Ok(out);
                }
                Some('$') => {
                    let value = self.dollar()?;
                    self.spend(value.len())?;
                    out.push_str(&value);
                }
                Some(c) => {
                    self.next();
                    if c != self.lex.escape {
                        out.push(c);
                        continue;
                    }
                    if self.raw_escapes {
                        out.push(c);
                    }
                    match self.peek() {
                        None => {}
                        Some(escaped)
                            if escaped == '"' || escaped == '$' || escaped == self.lex.escape =>
                        {
                            self.next();
                            out.push(escaped);
                        }
                        Some(_) => out.push(c),
                    }
                }
            }
        }
    }

    /// `<<` keeps the blanks after it, so that a heredoc stays one word.
    fn angle(&mut self) -> String {
        self.next();
        if !self.next_is('<') {
            return "<".into();
        }
        let word = self.rest.trim_start_matches(['\t', '\r', ' ']);
        let blanks = &self.rest[..self.rest.len() - word.len()];
        self.rest = word;
        format!("<<{blanks}")
    }

    fn dollar(&mut self) -> Result<String> {
        self.next();
        if !self.next_is('{') {
            let name = self.name();
            return Ok(match name.as_str() {
                "" => "$".into(),
                name => match self.value(name) {
                    None if self.lex.keep_unset => format!("${name}"),
                    value => value.unwrap_or_default(),
                },
            });
        }
        self.depth += 1;
        let result = if self.depth > MAX_DEPTH {
            Err(Error::new("substitutions are nested too deeply"))
        } else {
            self.braces()
        };
        self.depth -= 1;
        result
    }

    /// What follows `${`.
    fn braces(&mut self) -> Result<String> {
        match self.peek() {
            None => return Err(missing("}")),
            Some('{' | '}' | ':') => return Err(Error::new("syntax error: bad substitution")),
            _ => {}
        }
        let name = self.name();
        match self.next() {
            Some('}') => Ok(match self.value(&name) {
                None if self.lex.keep_unset => format!("${{{name}}}"),
                value => value.unwrap_or_default(),
            }),
            Some(':') => {
                let op = self.next();
                self.operator(&name, true, op)
            }
            op @ Some('+' | '-' | '?' | '#' | '%') => self.operator(&name, false, op),
            Some('/') => self.replace(&name),
            op => Err(unsupported(false, op)),
        }
    }

    fn operator(&mut self, name: &str, colon: bool, op: Option<char>) -> Result<String> {
        let pattern = matches!(op, Some('#' | '%'));
        if colon && pattern {
            return Err(unsupported(colon, op));
        }
        let word = self
            .until(Some('}'), pattern, None)
            .map_err(|e| if self.rest.is_empty() { missing("}") } else { e })?;
        self.spend(word.len())?;
        let value = self.value(name);
        if value.is_none() && self.lex.keep_unset {
            return Ok(format!("${{{name}{}{word}}}", modifier(colon, op)));
        }
        let present = value.as_deref().is_some_and(|v| !(colon && v.is_empty()));
        let set = value.is_some();
        let value = value.unwrap_or_default();
        match op {
            Some('-') => Ok(if present { value } else { word }),
            Some('+') => Ok(if present { word } else { String::new() }),
            Some('?') if present => Ok(value),
            Some('?') => {
                let usual =
                    if set { "is not allowed to be empty" } else { "is not allowed to be unset" };
                Err(Error::new(format!("{name}: {}", if word.is_empty() { usual } else { &word })))
            }
            Some(op @ ('#' | '%')) => {
                let (pattern, greedy) =
                    word.strip_prefix(op).map_or((word.as_str(), false), |p| (p, true));
                if op == '%' {
                    glob::trim_suffix(pattern, &value, greedy, &self.lex.work)
                } else {
                    glob::trim_prefix(pattern, &value, greedy, &self.lex.work)
                }
            }
            op => Err(unsupported(colon, op)),
        }
    }

    /// `${name/pattern/replacement}`, with another `/` in front for all of them.
    fn replace(&mut self, name: &str) -> Result<String> {
        let all = self.next_is('/');
        let at_end = |rest: &str, what: &str, e| if rest.is_empty() { missing(what) } else { e };
        let pattern = self.until(Some('/'), true, None).map_err(|e| at_end(self.rest, "/", e))?;
        let replacement =
            self.until(Some('}'), true, None).map_err(|e| at_end(self.rest, "}", e))?;
        match self.value(name) {
            None if self.lex.keep_unset => Ok(format!("${{{name}/{pattern}/{replacement}}}")),
            value => glob::replace(
                &pattern,
                &value.unwrap_or_default(),
                &replacement,
                all,
                self.budget,
                &self.lex.work,
            ),
        }
    }

    /// A name, a number, or one of the shell's special parameters; empty when none follows.
    fn name(&mut self) -> String {
        let rest = self.rest;
        let length = match rest.chars().next() {
            Some('0'..='9') => rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len()),
            Some('@' | '*' | '#' | '?' | '-' | '$' | '!') => 1,
            _ => rest.find(|c: char| !(c.is_alphanumeric() || c == '_')).unwrap_or(rest.len()),
        };
        self.rest = &rest[length..];
        rest[..length].to_owned()
    }

    fn value(&mut self, name: &str) -> Option<String> {
        let value = self.env.get(name).map(Cow::into_owned);
        let names = if value.is_some() { &mut self.matched } else { &mut self.unmatched };
        if !names.contains(name) {
            names.insert(name.to_owned());
        }
        value
    }
}

fn modifier(colon: bool, op: Option<char>) -> String {
    format!("{}{}", if colon { ":" } else { "" }, op.unwrap_or('\u{fffd}'))
}

fn unsupported(colon: bool, op: Option<char>) -> Error {
    Error::new(format!("unsupported modifier ({}) in substitution", modifier(colon, op)))
}

fn missing(what: &str) -> Error {
    Error::new(format!(
        "syntax error: missing '{what}'{}",
        if what == "/" { " in ${}" } else { "" }
    ))
}
