//! Sizes and durations as people write and read them.

use shipway_fault::{Fault, Result};

fn scaled(bytes: i64) -> Option<(f64, &'static str)> {
    let units = ["kB", "MB", "GB", "TB", "PB", "EB"];
    let mut value = bytes as f64;
    let mut unit = None;
    for name in units {
        if value.abs() < 1000.0 {
            break;
        }
        value /= 1000.0;
        unit = Some(name);
    }
    unit.map(|unit| (value, unit))
}

/// `12B`, `1.23kB`, `4.56GB`.
pub(crate) fn bytes(bytes: i64) -> String {
    match scaled(bytes) {
        Some((value, unit)) => format!("{value:.2}{unit}"),
        None => format!("{bytes}B"),
    }
}

/// As [`bytes`], with as many digits as the value has.
pub(crate) fn exact_bytes(bytes: i64) -> String {
    match scaled(bytes) {
        Some((value, unit)) => format!("{value}{unit}"),
        None => format!("{bytes}B"),
    }
}

/// Bytes as Docker's flags have them: `64m`, `1.5gb`, `1GiB`, in powers of 1024.
pub(crate) fn parse_bytes(text: &str) -> Result<i64> {
    let broken = || Fault::invalid(format!("invalid size: '{text}'")).hint("write it as a number with a unit, such as 512m or 2g");
    let at = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(at);
    let number: f64 = number.parse().map_err(|_| broken())?;
    let unit = unit.trim().to_lowercase();
    let unit = unit.strip_suffix("ib").or_else(|| unit.strip_suffix('b')).unwrap_or(&unit);
    let factor = ["", "k", "m", "g", "t", "p"].iter().position(|u| *u == unit).ok_or_else(broken)?;
    Ok((number * 1024f64.powi(factor as i32)) as i64)
}

/// Nanoseconds of a duration as Go writes it: `1h30m`, `1.5s`, `300ms`.
pub(crate) fn parse_duration(text: &str) -> Result<i64> {
    let broken = || Fault::invalid(format!("invalid duration {text:?}")).hint("write it as 24h, 1h30m, 10s or the like");
    if text == "0" {
        return Ok(0);
    }
    let units = [("ns", 1.0), ("us", 1e3), ("µs", 1e3), ("ms", 1e6), ("s", 1e9), ("m", 60e9), ("h", 3600e9)];
    let (mut rest, mut total) = (text, 0.0);
    while !rest.is_empty() || text.is_empty() {
        let at = rest.find(|c: char| !c.is_ascii_digit() && c != '.').ok_or_else(broken)?;
        let number: f64 = rest[..at].parse().map_err(|_| broken())?;
        let after = &rest[at..];
        let end = after.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(after.len());
        let (_, factor) = units.iter().find(|(name, _)| *name == &after[..end]).ok_or_else(broken)?;
        total += number * factor;
        rest = &after[end..];
    }
    Ok(total as i64)
}

/// Nanoseconds as Go prints a duration: `48h0m0s`, `1m30s`, `1.5s`, `0s`.
pub(crate) fn duration(nanos: i64) -> String {
    let seconds = nanos as f64 / 1e9;
    if nanos == 0 {
        return "0s".to_owned();
    }
    if seconds.abs() < 1.0 {
        return format!("{}ms", nanos as f64 / 1e6);
    }
    let whole = nanos / 1_000_000_000;
    let (h, m, s) = (whole / 3600, whole / 60 % 60, seconds - (whole / 60 * 60) as f64);
    match (h, m) {
        (0, 0) => format!("{s}s"),
        (0, _) => format!("{m}m{s}s"),
        _ => format!("{h}h{m}m{s}s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_print_and_parse() {
        for (n, expected) in
            [(0, "0B"), (999, "999B"), (1000, "1.00kB"), (1234, "1.23kB"), (20_000_000, "20.00MB"), (3_210_000_000, "3.21GB")]
        {
            assert_eq!(bytes(n), expected);
        }
        for (text, expected) in
            [("64m", Some(64 << 20)), ("1.5gb", Some(3 << 29)), ("10", Some(10)), ("1GiB", Some(1 << 30)), ("x", None), ("1q", None)]
        {
            assert_eq!(parse_bytes(text).ok(), expected, "{text}");
        }
    }

    #[test]
    fn durations_print_and_parse() {
        for (text, expected, printed) in [
            ("48h", 172_800e9, "48h0m0s"),
            ("1h30m", 5400e9, "1h30m0s"),
            ("1.5s", 1.5e9, "1.5s"),
            ("300ms", 3e8, "300ms"),
            ("0", 0.0, "0s"),
        ] {
            assert_eq!(parse_duration(text).ok(), Some(expected as i64), "{text}");
            assert_eq!(duration(expected as i64), printed);
        }
        for text in ["", "1", "h", "1x"] {
            assert!(parse_duration(text).is_err(), "{text}");
        }
    }
}
