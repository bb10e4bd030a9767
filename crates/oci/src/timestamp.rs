//! Times as RFC 3339 texts, in UTC, as Go writes them.

use jiff::Timestamp;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// `time` as `2006-01-02T15:04:05.999999999Z`, without trailing zeros in the fraction (Go's
/// `RFC3339Nano`). Times before 1970 become 1970.
pub fn format(time: SystemTime) -> String {
    Timestamp::try_from(time.max(UNIX_EPOCH)).unwrap_or_default().to_string()
}

/// Whole seconds since 1970, which may be negative, in the same form.
pub fn format_seconds(seconds: i64) -> String {
    Timestamp::from_second(seconds).unwrap_or_default().to_string()
}

/// `time` without its fraction, for labels that are read by programs with coarser clocks.
pub fn format_whole(time: SystemTime) -> String {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    format(UNIX_EPOCH + Duration::from_secs(since.as_secs()))
}

/// Reads an RFC 3339 time; times before 1970 become 1970.
pub fn parse(text: &str) -> Option<SystemTime> {
    // The library reads dates alone and other forms too.
    let is_strict =
        text.is_ascii() && text.as_bytes().get(10).is_some_and(|t| t.eq_ignore_ascii_case(&b'T'));
    let time: Timestamp = is_strict.then(|| text.parse().ok())??;
    Some(SystemTime::from(time).max(UNIX_EPOCH))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_round_trip() {
        for text in [
            "1970-01-01T00:00:00Z",
            "2024-02-29T12:34:56Z",
            "2026-11-21T05:00:00.25Z",
            "2000-12-31T23:59:59.000000001Z",
        ] {
            assert_eq!(parse(text).map(format).as_deref(), Some(text));
        }
        assert_eq!(
            parse("2026-01-01T02:00:00+02:00").map(format).as_deref(),
            Some("2026-01-01T00:00:00Z")
        );
        assert_eq!(parse("1950-01-01T02:00:00Z"), Some(UNIX_EPOCH));
        for bad in [
            "",
            "2026-13-01T00:00:00Z",
            "2026-01-01",
            "x026-01-01T00:00:00Z",
            "2026-01-01T00:00:00",
            "2026-01-01 00:00:00Z",
        ] {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn seconds_are_written_without_a_fraction() {
        for (seconds, want) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (-1, "1969-12-31T23:59:59Z"),
        ] {
            assert_eq!(format_seconds(seconds), want);
        }
        assert_eq!(
            format_whole(UNIX_EPOCH + Duration::from_millis(1_700_000_000_900)),
            "2023-11-14T22:13:20Z"
        );
    }
}
