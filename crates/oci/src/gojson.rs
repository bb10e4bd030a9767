//! JSON as Go's encoder writes it. Image IDs, manifests and descriptors are compared by digest with
//! what Go programs make of the same input, so the text has to agree to the byte.

use serde::Serialize;
use std::fmt::Write as _;

/// `value` on one line, escaped as Go does.
pub fn to_string(value: &impl Serialize) -> serde_json::Result<String> {
    serde_json::to_string(value).map(escape)
}

/// `value` indented by two spaces, escaped as Go does.
pub fn to_string_pretty(value: &impl Serialize) -> serde_json::Result<String> {
    serde_json::to_string_pretty(value).map(escape)
}

/// What becomes of a text that is JSON already (`json.RawMessage`): no white space outside of
/// strings, and what HTML or JavaScript would misread escaped. Escapes that are there stay as they
/// are written.
pub fn compact(json: &str) -> String {
    let (mut in_string, mut escaped) = (false, false);
    let kept = json.chars().filter(|&c| {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = in_string,
            '"' => in_string = !in_string,
            _ => {}
        }
        in_string || !c.is_ascii_whitespace()
    });
    escape(kept.collect())
}

/// Outside of strings these characters are nowhere, so the text need not be parsed.
fn escape(json: String) -> String {
    // Most texts have none: bytes are compared faster than characters.
    if !json.bytes().any(|b| matches!(b, b'<' | b'>' | b'&' | LINE_SEPARATOR)) {
        return json;
    }
    let (mut out, mut rest) = (String::with_capacity(json.len()), json.as_str());
    while let Some(at) = rest.find(['<', '>', '&', '\u{2028}', '\u{2029}']) {
        let (plain, special) = rest.split_at(at);
        out.push_str(plain);
        let mut chars = special.chars();
        let _ = chars.next().map(|c| write!(out, "\\u{:04x}", u32::from(c)));
        rest = chars.as_str();
    }
    out + rest
}

/// The first byte of U+2028 and U+2029 in UTF-8.
const LINE_SEPARATOR: u8 = 0xe2;

/// An RFC 3339 time as Go writes it after reading it: the fraction without trailing zeros and never
/// finer than nanoseconds, `Z` for every zone without an offset, other offsets kept. `None` for
/// what Go does not read.
pub fn time(text: &str) -> Option<String> {
    let (day, rest) = text.split_at_checked(10)?;
    let (clock, rest) = rest.split_at_checked(9)?;
    let digits = |text: &str, at: std::ops::Range<usize>| -> Option<u32> {
        let part = text.get(at)?;
        part.bytes().all(|b| b.is_ascii_digit()).then(|| part.parse().ok())?
    };
    let (year, month, dom) = (digits(day, 0..4)?, digits(day, 5..7)?, digits(day, 8..10)?);
    let (hour, minute, second) = (digits(clock, 1..3)?, digits(clock, 4..6)?, digits(clock, 7..9)?);
    let leap = year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    let days = match month {
        2 => 28 + u32::from(leap),
        4 | 6 | 9 | 11 => 30,
        1..=12 => 31,
        _ => return None,
    };
    let marks = [
        day.as_bytes()[4],
        day.as_bytes()[7],
        clock.as_bytes()[0],
        clock.as_bytes()[3],
        clock.as_bytes()[6],
    ];
    if marks != *b"--T::" || !(1..=days).contains(&dom) || hour > 23 || minute > 59 || second > 59 {
        return None;
    }
    let (fraction, zone) = match rest.strip_prefix('.') {
        Some(rest) => rest.split_at(rest.find(|c: char| !c.is_ascii_digit())?),
        None => ("", rest),
    };
    if fraction.is_empty() && rest.starts_with('.') {
        return None;
    }
    let zone = match zone.as_bytes() {
        b"Z" => "Z",
        [b'+' | b'-', _, _, b':', _, _] => match (digits(zone, 1..3)?, digits(zone, 4..6)?) {
            (0, 0) => "Z",
            (0..=23, 0..=59) => zone,
            _ => return None,
        },
        _ => return None,
    };
    let fraction = fraction.get(..9).unwrap_or(fraction).trim_end_matches('0');
    let dot = if fraction.is_empty() { "" } else { "." };
    Some(format!("{day}{clock}{dot}{fraction}{zone}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_escaped_and_raw_json_is_compacted() {
        assert_eq!(
            to_string(&["a<b>&\u{2028}\u{2029}\"\u{8}\u{c}\u{1f}\u{7f}é"]).unwrap(),
            "[\"a\\u003cb\\u003e\\u0026\\u2028\\u2029\\\"\\b\\f\\u001f\u{7f}é\"]"
        );
        for plain in ["", "plain", "\u{2027}\u{202a}é—"] {
            assert_eq!(to_string(&plain).unwrap(), format!("\"{plain}\""));
        }
        for (given, want) in [
            (
                "{ \"a\" : [ 1.50 , null ],\n\t\"b c\" : \" x \\\" < y \" }",
                "{\"a\":[1.50,null],\"b c\":\" x \\\" \\u003c y \"}",
            ),
            (r#" "\\" "#, r#""\\""#),
            (r#"["\u003c", "\/", "\\\" "]"#, r#"["\u003c","\/","\\\" "]"#),
        ] {
            assert_eq!(compact(given), want);
        }
    }

    #[test]
    fn times_are_read_and_written_as_go_does() {
        for (given, want) in [
            ("2020-01-02T03:04:05Z", "2020-01-02T03:04:05Z"),
            ("2020-01-02T03:04:05.000000000Z", "2020-01-02T03:04:05Z"),
            ("2020-01-02T03:04:05.1200Z", "2020-01-02T03:04:05.12Z"),
            ("2020-01-02T03:04:05.1234567899Z", "2020-01-02T03:04:05.123456789Z"),
            ("2020-01-02T03:04:05+00:00", "2020-01-02T03:04:05Z"),
            ("2020-01-02T03:04:05-00:00", "2020-01-02T03:04:05Z"),
            ("2020-01-02T03:04:05.5+02:30", "2020-01-02T03:04:05.5+02:30"),
            ("0001-01-01T00:00:00Z", "0001-01-01T00:00:00Z"),
            ("2024-02-29T00:00:00Z", "2024-02-29T00:00:00Z"),
        ] {
            assert_eq!(time(given).as_deref(), Some(want), "{given}");
        }
        for bad in [
            "",
            "now",
            "2020-01-02",
            "2020-01-02t03:04:05z",
            "2020-01-02T03:04:05",
            "2020-01-02T03:04:05.Z",
            "2020-02-30T00:00:00Z",
            "1900-02-29T00:00:00Z",
            "2020-01-02T24:00:00Z",
            "2020-01-02T03:04:60Z",
            "2020-01-02T03:04:05+24:00",
            "2020-01-02T03:04:05.5",
            "2020-01-02T03:04:05+0200",
            "2020/01/02T03:04:05Z",
            "2020-01-0éT03:04:05Z",
        ] {
            assert_eq!(time(bad), None, "{bad}");
        }
    }
}
