//! Values as the reference's programs spell and read them: numbers, sizes and lists; and what was
//! meant by a misspelled word. What Go itself reads is in crate `gocompat`.

use crate::error::{Error, Result};
use shipway_gocompat::csv_fields;

/// A number of at most 32 bits without sign.
pub fn number(text: &str, radix: u32) -> Option<u32> {
    if text.starts_with('+') { None } else { u32::from_str_radix(text, radix).ok() }
}

/// The fields of one CSV line.
pub fn csv(line: &str) -> Result<Vec<String>> {
    let line = line.strip_suffix('\n').map_or(line, |l| l.strip_suffix('\r').unwrap_or(l));
    if line.is_empty() {
        return Err(Error::new("EOF"));
    }
    csv_fields(line, ',').map_err(|e| Error::new(e.to_string()))
}

/// `message` with the nearest of `options` proposed, when `word` is near enough to one to be a
/// typing error.
pub fn with_suggestion(
    message: String,
    word: &str,
    options: &[&str],
    case_sensitive: bool,
) -> Error {
    match suggest(word, options.iter().copied(), case_sensitive) {
        Some(near) => Error::new(format!("{message} (did you mean {near}?)")),
        None => Error::new(message),
    }
}

/// Longest word, in bytes, that is compared with others: what is longer is not a typing error, and
/// comparing takes the product of the lengths.
const MAX_WORD: usize = 128;
/// Most names that one word is compared with.
const MAX_OPTIONS: usize = 1000;

/// The option nearest to `word`, at most two edits away; none when `word` is one of them. Without
/// case sensitivity the answer takes the case of `word`.
pub fn suggest<'a>(
    word: &str,
    options: impl IntoIterator<Item = &'a str>,
    case_sensitive: bool,
) -> Option<String> {
    if word.len() > MAX_WORD {
        return None;
    }
    let fold = |s: &str| if case_sensitive { s.to_owned() } else { s.to_lowercase() };
    let folded = fold(word);
    let mut best: Option<(usize, String)> = None;
    for option in options.into_iter().take(MAX_OPTIONS) {
        let option = fold(option);
        if option == folded {
            return None;
        }
        // Two edits cannot bridge more characters than two.
        if option.len().abs_diff(folded.len()) > 8 {
            continue;
        }
        let distance = edits(&folded, &option);
        if distance < best.as_ref().map_or(3, |(d, _)| *d) {
            best = Some((distance, option));
        }
    }
    let (_, option) = best?;
    Some(if !case_sensitive && word != word.to_lowercase() && word == word.to_uppercase() {
        option.to_uppercase()
    } else {
        option
    })
}

fn edits(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, cb) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(ca != *cb);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}
