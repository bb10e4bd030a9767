//! Sizes and durations as people write and read them.

use shipway_fault::{Fault, Result};
use shipway_gocompat::{GoDuration, parse_size};

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

/// `64MiB`, `1.5GiB`: four digits at most, in powers of 1024.
pub(crate) fn binary(bytes: i64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let (mut value, mut unit) = (bytes as f64, 0);
    while value >= 1024.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    let before = format!("{value:.0}").len();
    let text = format!("{value:.*}", 4usize.saturating_sub(before));
    let text =
        if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.') } else { &text };
    format!("{text}{}", units[unit])
}

/// As [`bytes()`], with as many digits as the value has.
pub(crate) fn exact_bytes(bytes: i64) -> String {
    match scaled(bytes) {
        Some((value, unit)) => format!("{value}{unit}"),
        None => format!("{bytes}B"),
    }
}

/// Bytes as Docker's flags have them: `64m`, `1.5gb`, `1GiB`, in powers of 1024.
pub(crate) fn parse_bytes(text: &str) -> Result<i64> {
    parse_size(text).ok_or_else(|| {
        Fault::invalid(format!("invalid size: '{text}'"))
            .hint("write it as a number with a unit, such as 512m or 2g")
    })
}

/// Nanoseconds of a duration that is not negative, as Go writes it: `1h30m`, `1.5s`, `300ms`.
pub(crate) fn parse_duration(text: &str) -> Result<i64> {
    let parsed = text.parse().ok().map(|GoDuration(nanos)| nanos).filter(|nanos| *nanos >= 0);
    parsed.ok_or_else(|| {
        Fault::invalid(format!("invalid duration {text:?}"))
            .hint("write it as 24h, 1h30m, 10s or the like")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_print_and_parse() {
        for (n, expected) in [
            (0, "0B"),
            (999, "999B"),
            (1000, "1.00kB"),
            (1234, "1.23kB"),
            (20_000_000, "20.00MB"),
            (3_210_000_000, "3.21GB"),
        ] {
            assert_eq!(bytes(n), expected);
        }
        for (n, expected) in [
            (0, "0B"),
            (1023, "1023B"),
            (64 << 20, "64MiB"),
            (1600, "1.562KiB"),
            (3 << 29, "1.5GiB"),
        ] {
            assert_eq!(binary(n), expected);
        }
        for (text, expected) in [
            ("64m", Some(64 << 20)),
            ("1.5gb", Some(3 << 29)),
            ("10", Some(10)),
            ("1GiB", Some(1 << 30)),
            ("x", None),
            ("1q", None),
        ] {
            assert_eq!(parse_bytes(text).ok(), expected, "{text}");
        }
    }

    #[test]
    fn durations_are_not_negative() {
        assert_eq!(parse_duration("1h30m").ok(), Some(5_400_000_000_000));
        for text in ["", "1", "-1s"] {
            assert!(parse_duration(text).is_err(), "{text}");
        }
    }
}
