//! How the text of an instruction falls into keyword, flags and words, before anything is expanded.

use crate::{
    error::{Error, Result},
    token::Token,
};
use shipway_gocompat::quote;

/// The blanks that separate words of a Dockerfile.
pub(crate) const BLANKS: [char; 5] = ['\t', '\x0b', '\x0c', '\r', ' '];

/// Keyword, flags and the rest of an instruction.
pub(crate) fn split(line: &str, escape: char) -> (&str, Vec<String>, &str) {
    let line = line.trim();
    match line.split_once(BLANKS) {
        None => (line, Vec::new(), ""),
        Some((keyword, rest)) => {
            let (flags, rest) = flags(rest.trim_start_matches(BLANKS), escape);
            (keyword, flags, rest.trim())
        }
    }
}

/// Takes words with `--` in front off `line`, quotes and escapes resolved; a lone `--` ends them.
/// The reference reads bytes here and garbles what is not ASCII (`--exclude=é`); we do not follow
/// it in that.
fn flags(line: &str, escape: char) -> (Vec<String>, &str) {
    let mut flags = Vec::new();
    let mut rest = line.trim_start();
    while rest.starts_with("--") {
        let mut word = String::new();
        let mut quoted = false;
        let mut quote = None;
        let mut chars = rest.chars();
        loop {
            let before = chars.as_str();
            let Some(c) = chars.next() else {
                rest = "";
                break;
            };
            match quote {
                None if c.is_whitespace() => {
                    rest = before;
                    break;
                }
                None if c == '\'' || c == '"' => {
                    quote = Some(c);
                    quoted = true;
                }
                Some(open) if c == open => quote = None,
                // At the end of the text an escape means nothing.
                _ if c == escape => word.extend(chars.next()),
                _ => word.push(c),
            }
        }
        if word == "--" {
            return (flags, rest);
        }
        if quoted || !word.is_empty() {
            flags.push(word);
        }
        rest = rest.trim_start();
    }
    (flags, rest)
}

/// All of `rest` as one word; nothing when it is empty.
pub(crate) fn one(rest: &str) -> Vec<String> {
    if rest.is_empty() { Vec::new() } else { vec![rest.to_owned()] }
}

/// Words between blanks, whatever quotes say.
pub(crate) fn blank_separated(rest: &str) -> Vec<String> {
    if rest.is_empty() {
        return Vec::new();
    }
    // Blanks at the ends are gone already, and inside each run of them separates once.
    rest.split(BLANKS).filter(|w| !w.is_empty()).map(str::to_owned).collect()
}

/// Words between blanks that are neither quoted nor escaped; quotes and escapes stay for the
/// expansion.
pub(crate) fn quoted(rest: &str, escape: char) -> Vec<&str> {
    let mut words = Vec::new();
    let mut start = None;
    let mut quote = None;
    let mut chars = rest.char_indices();
    while let Some((at, c)) = chars.next() {
        match quote {
            None if c.is_whitespace() => {
                if let Some(start) = start.take() {
                    words.push(&rest[start..at]);
                }
                continue;
            }
            None if c == '\'' || c == '"' => quote = Some(c),
            Some(open) if c == open => quote = None,
            _ => {}
        }
        start.get_or_insert(at);
        // Nothing can be escaped between single quotes.
        if c == escape && quote != Some('\'') && chars.next().is_none() {
            // An escape at the very end is dropped.
            words.extend(start.take().map(|start| &rest[start..at]).filter(|w| !w.is_empty()));
        }
    }
    words.extend(start.map(|start| &rest[start..]));
    words
}

/// The pairs of `ENV` and `LABEL`: key, value and `=`, or nothing as separator for the old form
/// with one pair.
pub(crate) fn pairs(keyword: &str, rest: &str, escape: char) -> Result<Vec<String>> {
    let words = quoted(rest, escape);
    let Some(first) = words.first() else { return Ok(Vec::new()) };
    if !first.contains('=') {
        let Some((key, value)) = rest.split_once(BLANKS) else {
            let error =
                Error::new(format!("{keyword} must have two arguments")).at(Token::Arguments);
            return Err(error.hint(example(keyword)));
        };
        return Ok(vec![
            key.to_owned(),
            value.trim_start_matches(BLANKS).to_owned(),
            String::new(),
        ]);
    }
    let mut args = Vec::with_capacity(words.len() * 3);
    for word in words {
        let Some((key, value)) = word.split_once('=') else {
            let message = format!(
                "Syntax error - can't find = in {}. Must be of the form: name=value",
                quote(word)
            );
            return Err(Error::new(message)
                .at(Token::Text(word.to_owned()))
                .hint("quote a value that contains blanks"));
        };
        args.extend([key.to_owned(), value.to_owned(), "=".to_owned()]);
    }
    Ok(args)
}
/// How an instruction is written.
pub(crate) fn example(keyword: &str) -> String {
    let rest = match keyword {
        "ADD" | "COPY" => "<source>… <destination>",
        "ARG" => "<name>[=<default>]",
        "ENV" | "LABEL" => "<key>=<value>…",
        "EXPOSE" => "<port>[/<protocol>]…",
        "FROM" => "<image> [AS <name>]",
        "HEALTHCHECK" => "CMD <command>, or HEALTHCHECK NONE",
        "MAINTAINER" => "<name>",
        "ONBUILD" => "<instruction>",
        "SHELL" => "[\"<executable>\", \"<argument>\"…]",
        "STOPSIGNAL" => "<signal>",
        "USER" => "<user>[:<group>]",
        "VOLUME" => "<path>…",
        "WORKDIR" => "<path>",
        _ => "…",
    };
    format!("write {keyword} {rest}")
}
