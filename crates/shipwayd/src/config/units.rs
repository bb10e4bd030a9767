//! Durations and sizes as Go programs write them (rows `toml.t.*`).

use serde::{Deserialize, Deserializer, de::Error};
use shipway_gocompat::{GoDuration, parse_size};
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

/// What a share of a disk of unknown size is taken for.
const SHARE_OF_UNKNOWN: u64 = 2_000_000_000;

impl DiskSpace {
    /// Bytes on a disk of `total` bytes, 0 if that is not known. A share is rounded up to whole
    /// gigabytes, as clients of BuildKit see it.
    pub fn of(self, total: u64) -> u64 {
        match self {
            Self::Bytes(b) => b,
            Self::Percent(0) => 0,
            Self::Percent(_) if total == 0 => SHARE_OF_UNKNOWN,
            Self::Percent(p) => ((total / 100 * u64::from(p)) / (1 << 30) + 1) * 1_000_000_000,
        }
    }

    /// Whether it is nothing.
    pub fn is_zero(self) -> bool {
        matches!(self, Self::Bytes(0) | Self::Percent(0))
    }
}

/// The value of `--…-gc-keepstorage`: `Reserved[,Free[,Maximum]]`, each in megabytes or as a share
/// of the disk (row `fl.oci.gc`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KeepStorage {
    /// Never go below.
    pub reserved: Option<DiskSpace>,
    /// Leave this much of the disk free.
    pub min_free: Option<DiskSpace>,
    /// Go below.
    pub max_used: Option<DiskSpace>,
}

impl std::str::FromStr for KeepStorage {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let size = |part: &str| match part.trim() {
            "" => Ok(None),
            part if part.ends_with('%') => disk_space(part).map(Some).ok_or(()),
            part => part
                .parse::<u64>()
                .map(|mb| Some(DiskSpace::Bytes(mb.saturating_mul(1_000_000))))
                .map_err(drop),
        };
        let sizes = text.split(',').map(size).collect::<Result<Vec<_>, ()>>();
        match sizes.as_deref() {
            Ok([reserved, more @ ..]) if more.len() <= 2 => {
                let more = |i: usize| more.get(i).copied().flatten();
                Ok(Self { reserved: *reserved, min_free: more(0), max_used: more(1) })
            }
            _ => Err(format!(
                "{text:?}: want \"Reserved[,Free[,Maximum]]\", each in MB or as a percentage such as 10%"
            )),
        }
    }
}

/// A duration that is not negative, as Go writes it, such as `1h30m` or `500ms`.
pub fn duration(text: &str) -> Option<Duration> {
    text.parse().ok().and_then(GoDuration::to_std)
}

/// How long something is good: `None`, written as a negative duration, for as long as the daemon
/// lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MaxAge(pub Option<Duration>);

impl<'de> Deserialize<'de> for MaxAge {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        match Raw::deserialize(d)? {
            Raw::Number(n) if n < 0 => Ok(Self(None)),
            Raw::Text(t) if t.starts_with('-') => Ok(Self(None)),
            other => other.span().map(|s| Self(Some(s.0))).map_err(D::Error::custom),
        }
    }
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Raw {
    Number(i64),
    Text(String),
}

impl Raw {
    fn span(&self) -> Result<Span, String> {
        let bad = |what: &str| {
            format!("invalid duration {what:?}: want seconds, or a text like \"48h\" or \"1h30m\"")
        };
        match self {
            Self::Number(n) => u64::try_from(*n)
                .map(|s| Span(Duration::from_secs(s)))
                .map_err(|_| bad(&n.to_string())),
            Self::Text(t) => match t.parse::<u64>() {
                Ok(s) => Ok(Span(Duration::from_secs(s))),
                Err(_) => duration(t).map(Span).ok_or_else(|| bad(t)),
            },
        }
    }
}

impl<'de> Deserialize<'de> for Span {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        Raw::deserialize(d)?.span().map_err(D::Error::custom)
    }
}

/// Parses a size text, such as `10GB`, `512mb`, `20%` or `1024`.
pub fn disk_space(text: &str) -> Option<DiskSpace> {
    if let Some(percent) = text.strip_suffix('%') {
        return percent.trim().parse().ok().filter(|p| *p <= 100).map(DiskSpace::Percent);
    }
    let bytes = parse_size(text)?;
    u64::try_from(bytes).ok().map(DiskSpace::Bytes)
}

impl<'de> Deserialize<'de> for DiskSpace {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let bad = |what: &str| {
            D::Error::custom(format!(
                "invalid size {what:?}: want bytes, or a text like \"10GB\" or \"20%\""
            ))
        };
        match Raw::deserialize(d)? {
            Raw::Number(n) => {
                u64::try_from(n).map(DiskSpace::Bytes).map_err(|_| bad(&n.to_string()))
            }
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
        assert_eq!(duration("1h30m"), Some(Duration::from_secs(5400)));
        assert_eq!(duration("5"), None);
        assert_eq!(duration("-5s"), None);
    }

    #[test]
    fn a_share_is_rounded_up_to_whole_gigabytes() {
        assert_eq!(DiskSpace::Percent(10).of(100 << 30), 11_000_000_000);
        assert_eq!(
            (DiskSpace::Percent(0).of(1 << 40), DiskSpace::Percent(5).of(0)),
            (0, SHARE_OF_UNKNOWN)
        );
        assert_eq!(DiskSpace::Bytes(5).of(0), 5);
    }

    #[test]
    fn what_to_keep_is_up_to_three_sizes() {
        let keep =
            |text: &str| text.parse::<KeepStorage>().map(|k| (k.reserved, k.min_free, k.max_used));
        let mb = |n: u64| Some(DiskSpace::Bytes(n * 1_000_000));
        assert_eq!(keep("9000"), Ok((mb(9000), None, None)));
        assert_eq!(
            keep("9000, 20%,30000"),
            Ok((mb(9000), Some(DiskSpace::Percent(20)), mb(30000)))
        );
        assert_eq!(keep(",20%"), Ok((None, Some(DiskSpace::Percent(20)), None)));
        for bad in ["x", "1,2,3,4", "1GB", "101%"] {
            assert!(keep(bad).unwrap_err().contains("want"), "{bad}");
        }
    }
}
