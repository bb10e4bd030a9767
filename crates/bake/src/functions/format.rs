//! `format` and `formatlist`: texts by verbs, as Go's `Sprintf` has them.

use super::{
    Args, CallError, Entry,
    Param::{Nullable, Text},
    Result, texts,
};
use crate::{
    convert::convert,
    number::Number,
    value::{Type, Value},
};

/// Width and precision of a verb, at most.
const MAX_WIDTH: usize = 4096;

pub(super) static TABLE: &[Entry] = &[
    ("format", &[Text], Some(Nullable), |a| Ok(Value::string(format(a.text(0)?, &a.values[1..])?))),
    ("formatlist", &[Text], Some(Nullable), format_list),
];

/// Lists among the arguments are gone through together.
fn format_list(args: &Args<'_>) -> Result<Value> {
    let values = &args.values[1..];
    let mut length: Option<(usize, usize)> = None;
    for (n, items) in values.iter().enumerate().filter_map(|(n, v)| Some((n, v.sequence()?))) {
        match length {
            Some((first, length)) if length != items.len() => {
                return Err(CallError::argument(
                    n + 1,
                    format!(
                        "argument {} has length {}, which is inconsistent with argument {} of length {length}",
                        n + 1,
                        items.len(),
                        first + 1,
                    ),
                ));
            }
            Some(_) => {}
            None => length = Some((n, items.len())),
        }
    }
    let mut all = Vec::new();
    for n in 0..length.map_or(1, |(_, length)| length) {
        let row: Vec<Value> = values
            .iter()
            .map(|v| v.sequence().and_then(|i| i.get(n)).unwrap_or(v).clone())
            .collect();
        all.push(
            format(args.text(0)?, &row)
                .map_err(|e| format!("error on format iteration {n}: {}", e.why))?,
        );
    }
    Ok(Value::strings(all))
}

/// One verb, such as `%-8.2f`.
#[derive(Default)]
struct Verb<'f> {
    raw: &'f str,
    plus: bool,
    minus: bool,
    space: bool,
    zero: bool,
    sharp: bool,
    width: Option<usize>,
    precision: Option<usize>,
}

fn format(layout: &str, values: &[Value]) -> Result<String> {
    let mut out = String::new();
    let mut next = 0usize;
    let mut highest = 0usize;
    let mut rest = layout;
    while let Some(at) = rest.find('%') {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        if let Some(after) = rest.strip_prefix("%%") {
            out.push('%');
            rest = after;
            continue;
        }
        let offset = layout.len() - rest.len();
        let (verb, mode, index, length) = verb(rest, offset)?;
        if let Some(index) = index {
            next = index;
        }
        let value = values.get(next).ok_or_else(|| {
            format!(
                "not enough arguments for {:?} at {offset}: need index {} but have {} total",
                verb.raw,
                next + 1,
                values.len()
            )
        })?;
        next += 1;
        highest = highest.max(next);
        let unsupported =
            |why: String| format!("unsupported value for {:?} at {offset}: {why}", verb.raw);
        out.push_str(&show(&verb, mode, value, offset).map_err(unsupported)?);
        rest = &rest[length..];
    }
    out.push_str(rest);
    if highest < values.len() {
        let verb = if highest == 0 {
            "no verbs in format string".to_owned()
        } else {
            format!("only {highest} used by format string")
        };
        return Err(CallError::argument(highest + 1, format!("too many arguments; {verb}")));
    }
    Ok(out)
}

/// The verb at the start of `text`, its letter, the argument that it names, and its length.
fn verb(text: &str, offset: usize) -> Result<(Verb<'_>, char, Option<usize>, usize)> {
    let unrecognized = || format!("unrecognized format character at offset {offset}");
    let bytes = text.as_bytes();
    let mut verb = Verb::default();
    let mut at = 1;
    let number = |at: &mut usize| -> Result<Option<usize>> {
        let start = *at;
        while bytes.get(*at).is_some_and(u8::is_ascii_digit) {
            *at += 1;
        }
        match text[start..*at].parse::<usize>() {
            Ok(n) if n <= MAX_WIDTH => Ok(Some(n)),
            _ if start == *at => Ok(None),
            _ => Err(format!("a number at offset {} is too large", offset + start).into()),
        }
    };
    while let Some(flag) = bytes.get(at) {
        match flag {
            b'+' => verb.plus = true,
            b'-' => verb.minus = true,
            b' ' => verb.space = true,
            b'0' => verb.zero = true,
            b'#' => verb.sharp = true,
            _ => break,
        }
        at += 1;
    }
    verb.width = number(&mut at)?;
    if bytes.get(at) == Some(&b'.') {
        at += 1;
        verb.precision = Some(number(&mut at)?.ok_or_else(unrecognized)?);
    }
    let mut index = None;
    if bytes.get(at) == Some(&b'[') {
        at += 1;
        let n = number(&mut at)?.and_then(|n| n.checked_sub(1));
        index = Some(n.ok_or_else(unrecognized)?);
        if bytes.get(at) != Some(&b']') {
            return Err(unrecognized().into());
        }
        at += 1;
    }
    let mode = text[at..].chars().next().ok_or_else(|| "unterminated format verb".to_owned())?;
    let length = at + mode.len_utf8();
    verb.raw = &text[..length];
    Ok((verb, mode, index, length))
}

fn show(verb: &Verb<'_>, mode: char, value: &Value, offset: usize) -> Result<String, String> {
    if mode != 'v' && value.is_null() {
        return Err("null value cannot be formatted".into());
    }
    let number = || match convert(value, &Type::Number)? {
        Value::Number(n) => Ok(n),
        _ => Err("a number is required".to_owned()),
    };
    match mode {
        'v' => Ok(padded(
            verb,
            match value {
                Value::String(s) if !verb.sharp => s.to_string(),
                Value::Number(n) if !verb.sharp => n.general(),
                other => texts::encode(other),
            },
        )),
        't' => Ok(match convert(value, &Type::Bool)? {
            Value::Bool(true) => "true".into(),
            _ => "false".into(),
        }),
        'b' | 'd' | 'o' | 'x' | 'X' => {
            let whole = number()?.to_whole().ok_or("an integer is required")?;
            let digits = whole.unsigned_abs();
            let digits = match mode {
                'b' => format!("{digits:b}"),
                'o' => format!("{digits:o}"),
                'x' => format!("{digits:x}"),
                'X' => format!("{digits:X}"),
                _ => digits.to_string(),
            };
            let digits = match verb.precision {
                Some(n) => format!("{digits:0>n$}"),
                None => digits,
            };
            Ok(signed(verb, whole < 0, digits))
        }
        'e' | 'E' | 'f' | 'g' | 'G' => {
            let n = number()?;
            let text = match (mode, verb.precision) {
                ('g' | 'G', None) => n.general(),
                ('g' | 'G', Some(p)) => general(n, p.max(1)),
                ('e' | 'E', p) => scientific(n, p.unwrap_or(6)),
                (_, p) => fixed(n, p.unwrap_or(6)),
            };
            let digits = text.trim_start_matches('-').to_owned();
            let digits = if mode.is_uppercase() { digits.to_uppercase() } else { digits };
            Ok(signed(verb, text.starts_with('-'), digits))
        }
        's' | 'q' => {
            use unicode_segmentation::UnicodeSegmentation;
            let text = match convert(value, &Type::String)? {
                Value::String(s) => s,
                _ => return Err("string required".into()),
            };
            let cut: String = match verb.precision {
                Some(n) if n > 0 => text.graphemes(true).take(n).collect(),
                _ => text.to_string(),
            };
            Ok(padded(verb, if mode == 's' { cut } else { texts::encode(&Value::string(cut)) }))
        }
        other => {
            Err(format!("unsupported format verb {other:?} in {:?} at offset {offset}", verb.raw))
        }
    }
}

/// With `places` digits behind the point, rounded half to even of the binary fraction.
fn fixed(n: Number, places: usize) -> String {
    match n.to_whole() {
        Some(whole) if places == 0 => whole.to_string(),
        Some(whole) => format!("{whole}.{:0<places$}", ""),
        None => format!("{:.places$}", n.to_f64()),
    }
}

fn scientific(n: Number, places: usize) -> String {
    let text = format!("{:.places$e}", n.to_f64());
    let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
    let (sign, exponent) = match exponent.strip_prefix('-') {
        Some(e) => ('-', e),
        None => ('+', exponent),
    };
    format!("{digits}e{sign}{exponent:0>2}")
}

/// With `places` digits in all, without zeros at the end.
fn general(n: Number, places: usize) -> String {
    let text = scientific(n, places - 1);
    let exponent: i64 = text.split_once('e').and_then(|(_, e)| e.parse().ok()).unwrap_or_default();
    let trim = |digits: &str| match digits.contains('.') {
        true => digits.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => digits.to_owned(),
    };
    if exponent < -4 || exponent >= i64::try_from(places).unwrap_or(i64::MAX) {
        let (digits, exponent) = text.split_once('e').unwrap_or((&text, ""));
        return format!("{}e{exponent}", trim(digits));
    }
    let behind = i64::try_from(places).unwrap_or(i64::MAX) - 1 - exponent;
    trim(&fixed(n, usize::try_from(behind.max(0)).unwrap_or(0)))
}

fn signed(verb: &Verb<'_>, negative: bool, digits: String) -> String {
    let sign = match negative {
        true => "-",
        false if verb.plus => "+",
        false if verb.space => " ",
        false => "",
    };
    let width = verb.width.unwrap_or(0);
    if verb.zero && !verb.minus && sign.len() + digits.len() < width {
        let fill = width - sign.len() - digits.len();
        return format!("{sign}{}{digits}", "0".repeat(fill));
    }
    padded(verb, format!("{sign}{digits}"))
}

fn padded(verb: &Verb<'_>, text: String) -> String {
    use unicode_segmentation::UnicodeSegmentation;
    let width = verb.width.unwrap_or(0);
    let have = text.graphemes(true).count();
    if have >= width {
        return text;
    }
    let fill = if verb.zero && !verb.minus { "0" } else { " " }.repeat(width - have);
    if verb.minus { text + &fill } else { fill + &text }
}

#[cfg(test)]
mod tests {
    use super::super::tests::check;

    #[test]
    fn verbs_show_values_as_go_does() {
        check(
            r#"format("%d %5d|%-5d|%05d %x %X %o %b %+d", 1, 2, 3, 4, 255, 255, 8, 5, 6)"#,
            r#""1     2|3    |00004 ff FF 10 101 +6""#,
        );
        check(
            r#"format("%f %.2f %e %8.3f", 1.5, 2, 3, 4.5)"#,
            r#""1.500000 2.00 3.000000e+00    4.500""#,
        );
        check(
            r#"format("%s %q %10s|%-10s|%.2s", "a", "b\"", "c", "d", "efg")"#,
            r#""a \"b\\\"\"          c|d         |ef""#,
        );
        check(
            r#"format("%v %v %#v %t", true, [1, "a"], "x", "true")"#,
            r#""true [1,\"a\"] \"x\" true""#,
        );
        check(r#"format("%[2]s %[1]s", "a", "b")"#, r#""b a""#);
        check(
            r#"format("%v %g %.3g %%", 1234567, 1000000, 3.14159)"#,
            r#""1.234567e+06 1e+06 3.14 %""#,
        );
        check(r#"formatlist("%s-%s", "x", ["a", "b"])"#, r#"["x-a","x-b"]"#);
    }

    #[test]
    fn verbs_without_their_value_are_refused() {
        for (layout, why) in [
            (r#""%s""#, "not enough arguments for \"%s\" at 0: need index 1 but have 0 total"),
            (r#""%d", "x""#, "unsupported value for \"%d\" at 0: a number is required"),
            (r#""%d", 1.5"#, "unsupported value for \"%d\" at 0: an integer is required"),
            (r#""%9999999d", 1"#, "a number at offset 1 is too large"),
        ] {
            check(
                &format!("format({layout})"),
                &format!(
                    "error Error in function call; Call to function \"format\" failed: {why}."
                ),
            );
        }
        check(
            r#"format("a", 1)"#,
            "error Invalid function argument; Invalid value for argument 2 of format: too many arguments; no verbs in format string.",
        );
    }
}
