//! Comma-separated `key=value` words, in which a field may be quoted: the form of `--output`,
//! `--secret`, `--cache-to` and others.

use std::collections::BTreeMap;

use shipway_fault::{Fault, Result};

/// The fields of `text`. A quoted field may hold commas, and doubled quotes that stand for one.
pub(crate) fn fields(text: &str) -> Result<Vec<String>> {
    separated(text, ',')
}

/// As [`fields`], with another separator.
pub(crate) fn separated(text: &str, comma: char) -> Result<Vec<String>> {
    let broken = || Fault::invalid(format!("{text:?} has a quote in the wrong place"));
    let mut out = Vec::new();
    let mut rest = text;
    loop {
        if let Some(quoted) = rest.strip_prefix('"') {
            let mut field = String::new();
            let mut quoted = quoted;
            loop {
                let (before, after) = quoted.split_once('"').ok_or_else(broken)?;
                field.push_str(before);
                match after.strip_prefix('"') {
                    Some(more) => {
                        field.push('"');
                        quoted = more;
                    }
                    None => {
                        rest = after;
                        break;
                    }
                }
            }
            out.push(field);
            match rest.strip_prefix(comma) {
                Some(more) => rest = more,
                None if rest.is_empty() => return Ok(out),
                None => return Err(broken()),
            }
        } else {
            let (field, more) =
                rest.split_once(comma).map_or((rest, None), |(field, more)| (field, Some(more)));
            if field.contains('"') {
                return Err(broken());
            }
            out.push(field.to_owned());
            match more {
                Some(more) => rest = more,
                None => return Ok(out),
            }
        }
    }
}

/// Keys, in lower case, and values; the last of equal keys counts.
pub(crate) fn attributes(text: &str) -> Result<BTreeMap<String, String>> {
    let pair = |field: String| match field.split_once('=') {
        Some((key, value)) => Ok((key.trim().to_lowercase(), value.to_owned())),
        None => Err(Fault::invalid(format!("invalid value {field}")).hint("write it as key=value")),
    };
    fields(text)?.into_iter().map(pair).collect()
}

/// Takes `type` out of attributes.
pub(crate) fn kind(text: &str, flag: &str) -> Result<(String, BTreeMap<String, String>)> {
    let mut attrs = attributes(text)?;
    match attrs.remove("type") {
        Some(kind) if !kind.is_empty() => Ok((kind, attrs)),
        _ => Err(Fault::invalid(format!("{flag} requires type=<type>"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_may_be_quoted() {
        for (text, expected) in [
            ("a", Some(vec!["a"])),
            ("", Some(vec![""])),
            ("type=image,name=x", Some(vec!["type=image", "name=x"])),
            (
                r#"type=image,"name=a,b",push=true"#,
                Some(vec!["type=image", "name=a,b", "push=true"]),
            ),
            (r#""a""b",c"#, Some(vec![r#"a"b"#, "c"])),
            (r#"a="b""#, None),
            (r#""a"#, None),
            (r#""a"b"#, None),
        ] {
            assert_eq!(
                fields(text).ok(),
                expected.map(|e| e.into_iter().map(str::to_owned).collect()),
                "{text}"
            );
        }
    }
}
