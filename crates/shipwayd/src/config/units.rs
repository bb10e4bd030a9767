//! Durations and sizes as Go programs write them (rows `toml.t.*`).

use serde::{Deserialize, Deserializer, de::Error};
use std::time::Duration;

/// A duration: whole seconds, or Go's `1h30m`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Span(pub Duration);

/// A size: bytes, a unit string (1024-based), or a share of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskSpace {
    /// Bytes.
    Bytes(u64),
    /// Percent of the disk.
    Percent(u8),
}

impl DiskSpace {
    /// Bytes on a disk of `total` bytes.
    pub fn of(self, total: u64) -> u64 {
        match self {
            Self::Bytes(b) => b,
            Self::Percent(p) => total / 100 * u64::from(p),
        }
    }
}

/// Parses Go's duration text, such as `1h30m` or `500ms`.
pub fn go_duration(text: &str) -> Option<Duration> {
    let mut rest = text;
    let mut seconds = 0f64;
    if rest.is_empty() {
        return None;
    }
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let number: f64 = rest[..digits].parse().ok()?;
        rest = &rest[digits..];
        let end = rest.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(rest.len());
        seconds += number
            * match &rest[..end] {
                "ns" => 1e-9,
                "us" | "µs" => 1e-6,
                "ms" => 1e-3,
                "s" => 1.0,
                "m" => 60.0,
                "h" => 3600.0,
                _ => return None,
            };
        rest = &rest[end..];
    }
    Duration::try_from_secs_f64(seconds).ok()
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Raw {
    Number(i64),
    Text(String),
}

impl<'de> Deserialize<'de> for Span {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let bad = |what: &str| D::Error::custom(format!("invalid duration {what:?}: want seconds, or a text like \"48h\" or \"1h30m\""));
        match Raw::deserialize(d)? {
            Raw::Number(n) => u64::try_from(n).map(|s| Span(Duration::from_secs(s))).map_err(|_| bad(&n.to_string())),
            Raw::Text(t) => match t.parse::<u64>() {
                Ok(s) => Ok(Span(Duration::from_secs(s))),
                Err(_) => go_duration(&t).map(Span).ok_or_else(|| bad(&t)),
            },
        }
    }
}

/// Parses a size text, such as `10GB`, `512mb`, `20%` or `1024`.
pub fn disk_space(text: &str) -> Option<DiskSpace> {
    if let Some(percent) = text.strip_suffix('%') {
        return percent.trim().parse().ok().filter(|p| *p <= 100).map(DiskSpace::Percent);
    }
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let number: f64 = text[..digits].parse().ok()?;
    let unit = text[digits..].trim().to_lowercase();
    let shift = match unit.trim_end_matches('b').trim_end_matches('i') {
        "" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        "p" => 50,
        _ => return None,
    };
    Some(DiskSpace::Bytes((number * (1u64 << shift) as f64) as u64))
}

impl<'de> Deserialize<'de> for DiskSpace {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let bad = |what: &str| D::Error::custom(format!("invalid size {what:?}: want bytes, or a text like \"10GB\" or \"20%\""));
        match Raw::deserialize(d)? {
            Raw::Number(n) => u64::try_from(n).map(DiskSpace::Bytes).map_err(|_| bad(&n.to_string())),
            Raw::Text(t) => disk_space(&t).ok_or_else(|| bad(&t)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_durations_are_read_as_go_writes_them() {
        assert_eq!(disk_space("10GB"), Some(DiskSpace::Bytes(10 << 30)));
        assert_eq!(disk_space("512mb"), Some(DiskSpace::Bytes(512 << 20)));
        assert_eq!(disk_space("20%"), Some(DiskSpace::Percent(20)));
        assert_eq!(disk_space("x"), None);
        assert_eq!(go_duration("1h30m"), Some(Duration::from_secs(5400)));
        assert_eq!(go_duration("500ms"), Some(Duration::from_millis(500)));
        assert_eq!(go_duration("5"), None);
    }
}
