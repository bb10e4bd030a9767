//! Variables in texts of Compose files and of `.env` files.

/// Texts in texts, at most.
const MAX_DEPTH: usize = 32;
/// Bytes that a text may become.
const MAX_TEXT: usize = 1 << 20;

/// Why a text could not be interpolated.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Failure {
    /// It is not well-formed.
    Invalid(String),
    /// It says that a variable has to be set, which is not.
    Required(String),
}

/// `text` with `$NAME`, `${NAME}` and their forms with defaults replaced; `$$` is a dollar.
pub(crate) fn interpolate(
    text: &str,
    lookup: &dyn Fn(&str) -> Option<String>,
) -> Result<String, Failure> {
    replace(text, lookup, 0)
}

fn replace(
    text: &str,
    lookup: &dyn Fn(&str) -> Option<String>,
    depth: usize,
) -> Result<String, Failure> {
    let invalid = || Failure::Invalid(text.to_owned());
    if depth > MAX_DEPTH {
        return Err(invalid());
    }
    let mut out = String::new();
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        let after = &rest[at + 1..];
        let name = name_of(after);
        if let Some(escaped) = after.strip_prefix('$') {
            out.push('$');
            rest = escaped;
        } else if !name.is_empty() {
            out.push_str(&lookup(name).unwrap_or_default());
            rest = &after[name.len()..];
        } else if let Some(braced) = after.strip_prefix('{') {
            let end = closing(braced).ok_or_else(invalid)?;
            let inside = &braced[..end];
            out.push_str(&substitute(inside, lookup, depth).map_err(|failure| match failure {
                Failure::Invalid(_) => invalid(),
                other => other,
            })?);
            rest = &braced[end + 1..];
        } else {
            out.push('$');
            rest = after;
        }
        if out.len() > MAX_TEXT {
            return Err(invalid());
        }
    }
    out.push_str(rest);
    Ok(out)
}

/// The name at the start of `text`.
fn name_of(text: &str) -> &str {
    let is_name = |(n, c): (usize, char)| {
        c == '_' || c.is_ascii_alphabetic() || (n > 0 && c.is_ascii_digit())
    };
    let end = text.char_indices().find(|&pair| !is_name(pair)).map_or(text.len(), |(n, _)| n);
    &text[..end]
}

/// Where the brace that is open before `text` is closed.
fn closing(text: &str) -> Option<usize> {
    let mut open = 1usize;
    for (n, byte) in text.bytes().enumerate() {
        match byte {
            b'{' => open += 1,
            b'}' => {
                open -= 1;
                if open == 0 {
                    return Some(n);
                }
            }
            b'\n' => return None,
            _ => {}
        }
    }
    None
}

/// What is between braces: a name, and what is to be done where it is unset, empty or set.
fn substitute(
    inside: &str,
    lookup: &dyn Fn(&str) -> Option<String>,
    depth: usize,
) -> Result<String, Failure> {
    let name = name_of(inside);
    let rest = &inside[name.len()..];
    if name.is_empty() {
        return Err(Failure::Invalid(inside.to_owned()));
    }
    if rest.is_empty() {
        return Ok(lookup(name).unwrap_or_default());
    }
    let (also_empty, operator) = match rest.strip_prefix(':') {
        Some(operator) => (true, operator),
        None => (false, rest),
    };
    let Some(kind @ ('-' | '+' | '?')) = operator.chars().next() else {
        return Err(Failure::Invalid(inside.to_owned()));
    };
    let other = replace(&operator[1..], lookup, depth + 1)?;
    let value = lookup(name);
    let is_set = value.as_ref().is_some_and(|v| !(also_empty && v.is_empty()));
    match (kind, is_set) {
        ('-', false) | ('+', true) => Ok(other),
        ('?', false) => {
            let reason = if other.is_empty() { other } else { format!(": {other}") };
            Err(Failure::Required(format!("required variable {name} is missing a value{reason}")))
        }
        _ => Ok(value.unwrap_or_default()),
    }
}

/// Variables of an environment file.
pub(crate) fn env_file(
    text: &str,
    lookup: &dyn Fn(&str) -> Option<String>,
) -> Result<Vec<(String, String)>, String> {
    let mut found: Vec<(String, String)> = Vec::new();
    let mut rest = text.strip_prefix('\u{feff}').unwrap_or(text);
    let blank = |c: char| matches!(c, '\t' | '\u{b}' | '\u{c}' | '\r' | ' ' | '\u{85}' | '\u{a0}');
    loop {
        rest = rest.trim_start();
        if rest.is_empty() {
            return Ok(found);
        }
        let line = 1 + text[..text.len() - rest.len()].matches('\n').count();
        if rest.starts_with('#') {
            rest = rest.find('\n').map_or("", |n| &rest[n..]);
            continue;
        }
        if let Some(after) = rest.strip_prefix("export")
            && after.starts_with(blank)
        {
            rest = after.trim_start_matches(blank);
        }
        let end = rest.find(['=', ':', '\n']);
        let key = rest[..end.unwrap_or(rest.len())].trim_end();
        let bad = |c: char| {
            !(c.is_alphanumeric() || matches!(c, '_' | '.' | '-' | '[' | ']') || blank(c))
        };
        if let Some(c) = key.chars().find(|c| bad(*c)) {
            let shown = rest.lines().next().unwrap_or_default();
            return Err(format!(
                "line {line}: unexpected character {:?} in variable name {shown:?}",
                c.to_string()
            ));
        }
        if key.contains(' ') {
            return Err(format!("line {line}: key cannot contain a space"));
        }
        let known = |name: &str| {
            lookup(name)
                .or_else(|| found.iter().rev().find(|(k, _)| k == name).map(|(_, v)| v.clone()))
        };
        let Some(end) = end.filter(|n| !rest[*n..].starts_with('\n')) else {
            // A name alone takes its value from around.
            if let Some(value) = lookup(key) {
                found.push((key.to_owned(), value));
            }
            rest = end.map_or("", |n| &rest[n..]);
            continue;
        };
        let value = rest[end + 1..].trim_start_matches(blank);
        let expand = |text: &str| {
            interpolate(text, &known).map_err(|failure| match failure {
                Failure::Invalid(text) => format!("invalid template: {text:?}"),
                Failure::Required(why) => why,
            })
        };
        let (value, after) = match value.chars().next() {
            Some(quote @ ('"' | '\'')) => {
                let (text, after) = quoted(&value[1..], quote).ok_or_else(|| {
                    format!(
                        "line {line}: unterminated quoted value {}",
                        value.lines().next().unwrap_or_default()
                    )
                })?;
                (if quote == '"' { expand(&unescaped(&text))? } else { text }, after)
            }
            _ => {
                let end = value.find('\n').unwrap_or(value.len());
                let text = value[..end].split(" #").next().unwrap_or_default().trim_end();
                (expand(text)?, &value[end..])
            }
        };
        found.push((key.to_owned(), value));
        rest = after;
    }
}

/// The text up to the closing quote, and what follows that.
fn quoted(text: &str, quote: char) -> Option<(String, &str)> {
    let mut out = String::new();
    let mut chars = text.char_indices();
    while let Some((n, c)) = chars.next() {
        match c {
            '\\' => match chars.next() {
                Some((_, next)) if next == quote => out.push(quote),
                Some((_, next)) => {
                    out.push('\\');
                    out.push(next);
                }
                None => return None,
            },
            c if c == quote => return Some((out, &text[n + c.len_utf8()..])),
            c => out.push(c),
        }
    }
    None
}

/// Escapes of double quotes; `\$` becomes what interpolation leaves alone.
fn unescaped(text: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some(at) = rest.find('\\') {
        out.push_str(&rest[..at]);
        let mut after = rest[at + 1..].chars();
        let with = match after.next() {
            Some('n') => "\n",
            Some('t') => "\t",
            Some('r') => "\r",
            Some('a') => "\u{7}",
            Some('b') => "\u{8}",
            Some('f') => "\u{c}",
            Some('v') => "\u{b}",
            Some('"') => "\"",
            Some('\\') => "\\",
            Some('$') => "$$",
            _ => {
                out.push('\\');
                rest = &rest[at + 1..];
                continue;
            }
        };
        out.push_str(with);
        rest = after.as_str();
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lookup(name: &str) -> Option<String> {
        match name {
            "A" => Some("a".into()),
            "EMPTY" => Some(String::new()),
            _ => None,
        }
    }

    #[test]
    fn variables_have_defaults_and_conditions() {
        for (text, expected) in [
            ("$A-${A}$$A $1 $", "a-a$A $1 $"),
            ("${NO}|${NO-x}|${EMPTY-x}|${EMPTY:-x}|${NO:-${A}}", "|x||x|a"),
            ("${A+x}|${NO+x}|${EMPTY:+x}|${EMPTY+x}", "x|||x"),
            ("${A:-b} and ${NO:-c}", "a and c"),
        ] {
            assert_eq!(interpolate(text, &lookup), Ok(expected.into()), "{text}");
        }
        assert_eq!(
            interpolate("${NO:?gone}", &lookup),
            Err(Failure::Required("required variable NO is missing a value: gone".into()))
        );
        for text in ["${A.b}", "${", "${}", "${A:x}"] {
            assert_eq!(interpolate(text, &lookup), Err(Failure::Invalid(text.into())));
        }
        let deep = format!("{}x{}", "${NO:-".repeat(MAX_DEPTH + 2), "}".repeat(MAX_DEPTH + 2));
        assert_eq!(interpolate(&deep, &lookup), Err(Failure::Invalid(deep)));
    }

    #[test]
    fn environment_files_have_quotes_comments_and_variables() {
        let text = "# x\nB=1 # y\nexport C = \"a\\n$B\"\nD='$B'\nA\nNO\nE=${D}\\n\nF: x\n";
        let found = env_file(text, &lookup).unwrap();
        let shown: Vec<String> = found.iter().map(|(k, v)| format!("{k}={v:?}")).collect();
        assert_eq!(
            shown,
            [r#"B="1""#, r#"C="a\n1""#, r#"D="$B""#, r#"A="a""#, r#"E="$B\\n""#, r#"F="x""#]
        );
        assert_eq!(env_file("a b=c\n", &lookup).unwrap_err(), "line 1: key cannot contain a space");
        assert!(env_file("x=\"y\n", &lookup).unwrap_err().contains("unterminated"));
        assert!(env_file("a/b=c\n", &lookup).unwrap_err().contains("unexpected character"));
    }
}
