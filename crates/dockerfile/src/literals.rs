//! Values as the reference's programs spell and read them: numbers, sizes and lists; and what was
//! meant by a misspelled word. What Go itself reads is in crate `gocompat`.

use crate::error::{Error, Result};

/// A number of at most 32 bits without sign.
pub fn number(text: &str, radix: u32) -> Option<u32> {
    if text.starts_with('+') { None } else { u32::from_str_radix(text, radix).ok() }
}

/// An amount of memory such as `64m`, `1.5 GiB` or `100`.
pub fn bytes(text: &str) -> Option<i64> {
    let sep = text.rfind(|c: char| c.is_ascii_digit() || c == '.' || c == ' ')?;
    let (number, suffix) = if text[sep..].starts_with(' ') {
        (&text[..sep], &text[sep + 1..])
    } else {
        text.split_at(sep + 1)
    };
    // Rust would read words such as `inf`, Go would too; neither is an amount.
    if number.is_empty()
        || !number.chars().all(|c| c.is_ascii_digit() || matches!(c, '.' | '+' | 'e' | 'E' | '-'))
    {
        return None;
    }
    let size: f64 = number.parse().ok()?;
    if size < 0.0 {
        return None;
    }
    let suffix = suffix.to_ascii_lowercase();
    let factor = match suffix.as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 1,
        "m" | "mb" | "mib" => 2,
        "g" | "gb" | "gib" => 3,
        "t" | "tb" | "tib" => 4,
        "p" | "pb" | "pib" => 5,
        _ => return None,
    };
    Some((size * 1024f64.powi(factor)) as i64)
}

/// The fields of one CSV line.
pub fn csv(line: &str) -> Result<Vec<String>> {
    let line = line.strip_suffix('\n').map_or(line, |l| l.strip_suffix('\r').unwrap_or(l));
    if line.is_empty() {
        return Err(Error::new("EOF"));
    }
    let wrong = |at: usize, what: &str| {
        Error::new(format!("parse error on line 1, column {}: {what}", at + 1))
    };
    let bare = |at| wrong(at, "bare \" in non-quoted-field");
    let stray = |at| wrong(at, "extraneous or missing \" in quoted-field");
    let mut fields = Vec::new();
    let mut at = 0;
    loop {
        if !line[at..].starts_with('"') {
            let field = line[at..].split(',').next().unwrap_or_default();
            if let Some(quote) = field.find('"') {
                return Err(bare(at + quote));
            }
            fields.push(field.to_owned());
            at += field.len();
            if at == line.len() {
                return Ok(fields);
            }
            at += 1;
            continue;
        }
        at += 1;
        let mut field = String::new();
        loop {
            let Some(end) = line[at..].find('"') else { return Err(stray(at)) };
            field.push_str(&line[at..at + end]);
            at += end + 1;
            match line[at..].bytes().next() {
                Some(b'"') => {
                    field.push('"');
                    at += 1;
                }
                Some(b',') => {
                    at += 1;
                    fields.push(field);
                    break;
                }
                None => {
                    fields.push(field);
                    return Ok(fields);
                }
                Some(_) => return Err(stray(at - 1)),
            }
        }
    }
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

/// Longest word, in bytes, that is compared with others: what is longer is no typing error, and
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
