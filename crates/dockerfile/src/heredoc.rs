//! Heredocs: `[fd]<<[-]WORD` in a line, with quotes around the word or parts of it to forbid
//! expansion (row `df.heredoc`).

use crate::{
    ast::Heredoc,
    error::{Error, Result},
    lex::Lex,
};

/// The heredocs that a line opens, without their texts. A line that is not made of words has none.
pub(crate) fn in_line(line: &str) -> Result<Vec<Heredoc>> {
    let words =
        Lex::new('\\').raw_quotes().raw_escapes().keep_unset().words(line, &()).unwrap_or_default();
    let mut found = Vec::new();
    for word in words {
        found.extend(parse(&word)?);
    }
    Ok(found)
}

/// Reads one word as a heredoc.
pub(crate) fn parse(word: &str) -> Result<Option<Heredoc>> {
    let digits = word.bytes().take_while(u8::is_ascii_digit).count();
    let Some(rest) = word[digits..].strip_prefix("<<") else { return Ok(None) };
    let (strip, rest) = rest.strip_prefix('-').map_or((false, rest), |rest| (true, rest));
    let rest = rest.trim_start_matches(['\t', '\n', '\x0c', '\r', ' ']);
    if rest.is_empty() || rest.contains('<') {
        return Ok(None);
    }
    let lex = Lex::new('\\').keep_unset();
    let mut names = lex.words(rest, &())?;
    if names.len() != 1 {
        return Ok(None);
    }
    let raw = lex.clone().raw_quotes().words(rest, &())?;
    if raw.len() != 1 {
        return Err(Error::new(format!(
            "internal lexing of heredoc produced inconsistent results: {rest}"
        )));
    }
    let quotes = |s: &str| s.bytes().filter(|b| matches!(b, b'\'' | b'"')).count();
    let name = names.remove(0);
    let expand = quotes(&name) == quotes(&raw[0]);
    let fd = if digits == 0 { 0 } else { word[..digits].parse().unwrap_or(u64::MAX) };
    Ok(Some(Heredoc { name, fd, expand, strip, data: String::new() }))
}

/// Whether `text` as a whole is the opening of one heredoc, as in `RUN <<EOF`.
pub fn is_heredoc(text: &str) -> bool {
    parse(text).is_ok_and(|h| h.is_some())
}

/// `data` without the tabs that lines begin with, as `<<-` asks for.
pub fn strip_tabs(data: &str) -> String {
    data.split_inclusive('\n').map(|line| line.trim_start_matches('\t')).collect()
}
