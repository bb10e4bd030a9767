//! Texts: case, parts, patterns, encodings.

use std::collections::BTreeMap;

use base64::{Engine, prelude::BASE64_STANDARD};
use shipway_gocompat::{csv_fields, path};
use unicode_segmentation::UnicodeSegmentation;

use super::{
    Args, CallError, Entry,
    Param::{Any, Nullable, Number as Num, Text, Texts},
    Result,
};
use crate::{
    json,
    value::{Type, Value},
};

/// Bytes of a text that a function makes longer, at most.
const MAX_TEXT: usize = 16 << 20;
/// Bytes of a compiled pattern, at most.
const MAX_PATTERN: usize = 1 << 20;

fn text(s: impl Into<std::sync::Arc<str>>) -> Result<Value> {
    Ok(Value::string(s))
}

pub(super) static TABLE: &[Entry] = &[
    ("base64decode", &[Text], None, |a| {
        let bytes = BASE64_STANDARD.decode(a.text(0)?).map_err(|_| {
            format!("failed to decode base64 data '{}'", a.text(0).unwrap_or_default())
        })?;
        text(
            String::from_utf8(bytes)
                .map_err(|_| "the result of decoding the provided string is not valid UTF-8")?,
        )
    }),
    ("base64encode", &[Text], None, |a| text(BASE64_STANDARD.encode(a.text(0)?))),
    ("basename", &[Text], None, |a| text(path::base(a.text(0)?))),
    ("chomp", &[Text], None, |a| text(a.text(0)?.trim_end_matches(['\r', '\n']))),
    ("csvdecode", &[Text], None, csv),
    ("dirname", &[Text], None, |a| {
        let name = a.text(0)?;
        let end = name.rfind('/').map_or(0, |n| n + 1);
        text(path::clean(&name[..end]))
    }),
    ("homedir", &[], None, |a| text(a.host.home().ok_or("the home directory is not known")?)),
    ("indent", &[Num, Text], None, |a| {
        let spaces = usize::try_from(a.whole(0)?)
            .map_err(|_| CallError::argument(0, "must not be negative"))?;
        let lines = a.text(1)?.matches('\n').count();
        if spaces.saturating_mul(lines) > MAX_TEXT {
            return Err("the text would be too long".into());
        }
        text(a.text(1)?.replace('\n', &format!("\n{}", " ".repeat(spaces))))
    }),
    ("join", &[Text], Some(Texts), |a| {
        if a.values.len() < 2 {
            return Err("at least one list is required".into());
        }
        let mut all = Vec::new();
        for n in 1..a.values.len() {
            all.extend(a.texts(n)?);
        }
        let separator = a.text(0)?;
        if separator.len().saturating_mul(all.len()) > MAX_TEXT {
            return Err("the text would be too long".into());
        }
        text(all.join(separator))
    }),
    ("jsondecode", &[Text], None, |a| {
        let json: json::Json =
            serde_json::from_str(a.text(0)?).map_err(|e| format!("invalid JSON: {e}"))?;
        Ok(value_of(&json))
    }),
    ("jsonencode", &[Nullable], None, |a| text(encode(a.value(0)?))),
    ("lower", &[Text], None, |a| text(a.text(0)?.to_lowercase())),
    ("regex", &[Text, Text], None, |a| {
        let regex = pattern(a, 0)?;
        let captures = regex.captures(a.text(1)?);
        captured(&regex, &captures.ok_or("pattern did not match any part of the given string")?)
    }),
    ("regexall", &[Text, Text], None, |a| {
        let regex = pattern(a, 0)?;
        let all: Vec<Value> =
            regex.captures_iter(a.text(1)?).map(|c| captured(&regex, &c)).collect::<Result<_>>()?;
        let ty = all.first().map_or(Type::String, Value::ty);
        Ok(match all.iter().all(|v| v.ty() == ty) {
            true => Value::list(ty, all),
            false => Value::tuple(all),
        })
    }),
    ("regex_replace", &[Text, Text, Text], None, |a| {
        let regex = pattern(a, 1)?;
        let (all, with) = (a.text(0)?, a.text(2)?);
        if all.len().saturating_add(1).saturating_mul(with.len()) > MAX_TEXT {
            return Err("the text could be too long".into());
        }
        text(regex.replace_all(all, with).into_owned())
    }),
    ("replace", &[Text, Text, Text], None, |a| {
        let (all, what, with) = (a.text(0)?, a.text(1)?, a.text(2)?);
        if all.len().saturating_add(1).saturating_mul(with.len()) > MAX_TEXT {
            return Err("the text could be too long".into());
        }
        text(all.replace(what, with))
    }),
    ("reverse", &[Text], None, |a| text(a.text(0)?.graphemes(true).rev().collect::<String>())),
    ("sanitize", &[Text], None, |a| {
        let kept =
            |c: char| if c.is_ascii_alphanumeric() || c == '_' || c == '-' { c } else { '_' };
        text(a.text(0)?.chars().map(kept).collect::<String>())
    }),
    ("sort", &[Texts], None, |a| {
        let mut texts = a.texts(0)?;
        texts.sort_unstable();
        Ok(Value::strings(texts))
    }),
    ("split", &[Text, Text], None, |a| {
        let (separator, all) = (a.text(0)?, a.text(1)?);
        Ok(match separator.is_empty() {
            true => Value::strings(all.chars().map(String::from)),
            false => Value::strings(all.split(separator)),
        })
    }),
    ("strlen", &[Text], None, |a| Ok(Value::Number(a.text(0)?.graphemes(true).count().into()))),
    ("substr", &[Text, Num, Num], None, substr),
    ("title", &[Text], None, |a| {
        let mut before = ' ';
        let each = a.text(0)?.chars().flat_map(|c| {
            let starts = !(before.is_alphanumeric() || before == '_');
            before = c;
            let upper: Vec<char> = if starts { c.to_uppercase().collect() } else { vec![c] };
            upper
        });
        text(each.collect::<String>())
    }),
    ("trim", &[Text, Text], None, |a| {
        let cut = a.text(1)?;
        text(a.text(0)?.trim_matches(|c| cut.contains(c)))
    }),
    ("trimprefix", &[Text, Text], None, |a| {
        let all = a.text(0)?;
        text(all.strip_prefix(a.text(1)?).unwrap_or(all))
    }),
    ("trimspace", &[Text], None, |a| text(a.text(0)?.trim())),
    ("trimsuffix", &[Text, Text], None, |a| {
        let all = a.text(0)?;
        text(all.strip_suffix(a.text(1)?).unwrap_or(all))
    }),
    ("upper", &[Text], None, |a| text(a.text(0)?.to_uppercase())),
    ("urlencode", &[Text], None, |a| {
        let mut out = String::new();
        for byte in a.text(0)?.bytes() {
            match byte {
                b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => {
                    out.push(char::from(byte));
                }
                b' ' => out.push('+'),
                _ => out.push_str(&format!("%{byte:02X}")),
            }
        }
        text(out)
    }),
    ("byteslen", &[Any], None, no_bytes),
    ("bytesslice", &[Any, Num, Num], None, no_bytes),
];

/// Buffers have functions, but nothing that makes one.
fn no_bytes(_: &Args<'_>) -> Result<Value> {
    Err(CallError::argument(0, "bytes required"))
}

fn pattern(args: &Args<'_>, n: usize) -> Result<regex::Regex> {
    regex::RegexBuilder::new(args.text(n)?)
        .size_limit(MAX_PATTERN)
        .build()
        .map_err(|e| CallError::argument(n, format!("invalid regexp pattern: {e}")))
}

/// The whole match, or its groups: by name if they have names.
fn captured(regex: &regex::Regex, captures: &regex::Captures<'_>) -> Result<Value> {
    let group = |m: Option<regex::Match<'_>>| {
        m.map_or(Value::Null(Type::String), |m| Value::string(m.as_str()))
    };
    let names: Vec<Option<&str>> = regex.capture_names().skip(1).collect();
    let named = names.iter().flatten().count();
    if names.is_empty() {
        return Ok(group(captures.get(0)));
    }
    if named == 0 {
        return Ok(Value::tuple(captures.iter().skip(1).map(group).collect()));
    }
    if named < names.len() {
        return Err(CallError::argument(
            0,
            "invalid regexp pattern: cannot mix both named and unnamed capture groups",
        ));
    }
    let named = names.iter().flatten().map(|n| ((*n).to_owned(), group(captures.name(n))));
    Ok(Value::object(named.collect()))
}

fn substr(args: &Args<'_>) -> Result<Value> {
    let clusters: Vec<&str> = args.text(0)?.graphemes(true).collect();
    let (offset, length) = (args.whole(1)?, args.whole(2)?);
    let count = i64::try_from(clusters.len()).unwrap_or(i64::MAX);
    if offset >= 0 && length == 0 {
        return text("");
    }
    let from = if offset < 0 { (count + offset).max(0) } else { offset.min(count) };
    let rest = &clusters[usize::try_from(from).unwrap_or(usize::MAX)..];
    // What is counted from the end and has no length is all that follows.
    let taken = match usize::try_from(length) {
        Ok(0) | Err(_) => rest.len(),
        Ok(n) => n.min(rest.len()),
    };
    text(rest[..taken].concat())
}

fn csv(args: &Args<'_>) -> Result<Value> {
    // A line may go on inside quotes.
    let mut lines: Vec<String> = Vec::new();
    let mut open = false;
    for line in args.text(0)?.split('\n') {
        let line = line.strip_suffix('\r').unwrap_or(line);
        match lines.last_mut() {
            Some(last) if open => {
                last.push('\n');
                last.push_str(line);
            }
            _ if line.is_empty() => continue,
            _ => lines.push(line.to_owned()),
        }
        open ^= line.matches('"').count() % 2 == 1;
    }
    let row = |n: usize, line: &String| {
        csv_fields(line, ',').map_err(|_| format!("CSV parse error on line {}", n + 1))
    };
    let header = row(0, lines.first().ok_or("missing header line")?)?;
    for (n, name) in header.iter().enumerate() {
        if header[..n].contains(name) {
            return Err(format!("duplicate column name {name:?}").into());
        }
    }
    let mut rows = Vec::new();
    for (n, line) in lines.iter().enumerate().skip(1) {
        let fields = row(n, line)?;
        if fields.len() != header.len() {
            return Err(format!("CSV parse error on line {}: wrong number of fields", n + 1).into());
        }
        let fields = header.iter().cloned().zip(fields.into_iter().map(Value::string));
        rows.push(Value::object(fields.collect()));
    }
    let ty = Type::object(header.into_iter().map(|name| (name, Type::String)));
    Ok(Value::list(ty, rows))
}

/// JSON as a value; texts in it are no templates.
pub(crate) fn value_of(json: &json::Json) -> Value {
    match json {
        json::Json::Null | json::Json::Number(None) => Value::NULL,
        json::Json::Bool(b) => Value::Bool(*b),
        json::Json::Number(Some(n)) => Value::Number(*n),
        json::Json::Text(t) => Value::string(t.raw.as_str()),
        json::Json::Array(list) => Value::tuple(list.iter().map(value_of).collect()),
        json::Json::Object(members) => {
            let fields: BTreeMap<String, Value> =
                members.iter().map(|(name, v)| (name.raw.clone(), value_of(v))).collect();
            Value::object(fields)
        }
    }
}

/// A value in JSON, as Go writes it.
pub(crate) fn encode(value: &Value) -> String {
    let mut out = String::new();
    write(value, &mut out);
    out
}

fn write(value: &Value, out: &mut String) {
    let quoted = |s: &str| shipway_oci::gojson::to_string(&s).unwrap_or_default();
    match value {
        Value::Null(_) => out.push_str("null"),
        Value::Bool(b) => out.push_str(if *b { "true" } else { "false" }),
        Value::Number(n) => out.push_str(&n.to_string()),
        Value::String(s) => out.push_str(&quoted(s)),
        Value::List(_, items) | Value::Set(_, items) | Value::Tuple(items) => {
            out.push('[');
            for (n, item) in items.iter().enumerate() {
                if n > 0 {
                    out.push(',');
                }
                write(item, out);
            }
            out.push(']');
        }
        Value::Map(_, fields) | Value::Object(fields) => {
            out.push('{');
            for (n, (name, item)) in fields.iter().enumerate() {
                if n > 0 {
                    out.push(',');
                }
                out.push_str(&quoted(name));
                out.push(':');
                write(item, out);
            }
            out.push('}');
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::check;

    #[test]
    fn texts_are_taken_apart_and_put_together() {
        check(r#"join("-", ["a", "b"], ["c"])"#, r#""a-b-c""#);
        check(r#"split(",", "a,b")"#, r#"["a","b"]"#);
        check(r#"substr("héllo", 1, 3)"#, r#""éll""#);
        check(r#"substr("hello", -2, -1)"#, r#""lo""#);
        check(r#"trim("xxaxx", "x")"#, r#""a""#);
        check(r#"title("hello brave world")"#, r#""Hello Brave World""#);
        check(r#"indent(2, "a\nb")"#, r#""a\n  b""#);
        check(r#"chomp("a\r\n\n")"#, r#""a""#);
        check(r#"sanitize("a.b/c-d_e")"#, r#""a_b_c-d_e""#);
        check(r#"reverse("abc")"#, r#""cba""#);
        check(r#"strlen("né")"#, "2");
        check(r#"dirname("a/b/c")"#, r#""a/b""#);
        check(r#"dirname("c")"#, r#"".""#);
        check(r#"basename("a/b/c/")"#, r#""c""#);
    }

    #[test]
    fn patterns_give_what_they_capture() {
        check(r#"regex("[a-z]+", "12ab3")"#, r#""ab""#);
        check(r#"regex("(\\d+)-(\\d+)", "x 1-2")"#, r#"["1","2"]"#);
        check(r#"regex("(?P<y>\\d+)", "2024")"#, r#"{"y":"2024"}"#);
        check(r#"regexall("\\d", "a1b2")"#, r#"["1","2"]"#);
        check(r#"regex_replace("a1b2", "(\\d)", "<$1>")"#, "\"a\\u003c1\\u003eb\\u003c2\\u003e\"");
        check(
            r#"regex("x", "a")"#,
            "error Error in function call; Call to function \"regex\" failed: pattern did not match any part of the given string.",
        );
    }

    #[test]
    fn encodings_go_both_ways() {
        check(r#"base64decode(base64encode("hällo"))"#, r#""hällo""#);
        check(r#"jsondecode("{\"a\": [1, null, \"$${x}\"]}")"#, r#"{"a":[1,null,"${x}"]}"#);
        check(r#"jsonencode({b = 1, a = [true, null]})"#, r#""{\"a\":[true,null],\"b\":1}""#);
        check(r#"urlencode("a b&ü")"#, r#""a+b%26%C3%BC""#);
        check("csvdecode(\"a,b\\n1,2\\n\")", r#"[{"a":"1","b":"2"}]"#);
    }

    #[test]
    fn what_would_be_huge_is_refused() {
        let huge = r#"replace(join("", [for n in range(1000) : "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"]), "a", join("", [for n in range(1000) : "bbbbbbbbbbbbbbbbbbbb"]))"#;
        check(
            huge,
            "error Error in function call; Call to function \"replace\" failed: the text could be too long.",
        );
    }
}
