//! `time.Duration`: how its texts are read and written.

use std::{error::Error, fmt, str::FromStr, time::Duration};

/// The largest size of a duration in nanoseconds, which only a negative one can have.
const LIMIT: u64 = 1 << 63;

const SECOND: u64 = 1_000_000_000;

/// A `time.Duration`: nanoseconds, of either sign. Its text is Go's, such as `1h30m` when read and
/// `1h30m0s` when written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GoDuration(pub i64);

/// A text is not a duration; shown as `time.ParseDuration` says it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InvalidDuration(String);

impl fmt::Display for InvalidDuration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "time: {}", self.0)
    }
}

impl Error for InvalidDuration {}

impl GoDuration {
    /// The duration as the standard library has it; `None` for a negative one.
    pub fn to_std(self) -> Option<Duration> {
        u64::try_from(self.0).ok().map(Duration::from_nanos)
    }
}

/// What is longer than 292 years becomes the longest that Go has.
impl From<Duration> for GoDuration {
    fn from(duration: Duration) -> Self {
        Self(i64::try_from(duration.as_nanos()).unwrap_or(i64::MAX))
    }
}

impl FromStr for GoDuration {
    type Err = InvalidDuration;

    /// Reads numbers with a unit each (`ns`, `us`, `µs`, `ms`, `s`, `m`, `h`), perhaps with a
    /// fraction, behind a sign or none; or `0`.
    fn from_str(text: &str) -> Result<Self, InvalidDuration> {
        let invalid = || InvalidDuration(format!("invalid duration {}", quote(text)));
        let (negative, mut rest) = match text.strip_prefix(['-', '+']) {
            Some(rest) => (text.starts_with('-'), rest),
            None => (false, text),
        };
        if rest == "0" {
            return Ok(Self(0));
        }
        if rest.is_empty() {
            return Err(invalid());
        }
        let mut total: u64 = 0;
        while !rest.is_empty() {
            let (whole, after) = digits(rest);
            let (fraction, after) = after.strip_prefix('.').map_or(("", after), digits);
            if whole.is_empty() && fraction.is_empty() {
                return Err(invalid());
            }
            let end = after.find(|c: char| c == '.' || c.is_ascii_digit()).unwrap_or(after.len());
            let unit = match &after[..end] {
                "ns" => 1,
                // The micro sign, and the Greek letter.
                "us" | "µs" | "μs" => 1_000,
                "ms" => 1_000_000,
                "s" => SECOND,
                "m" => 60 * SECOND,
                "h" => 3600 * SECOND,
                "" => {
                    return Err(InvalidDuration(format!(
                        "missing unit in duration {}",
                        quote(text)
                    )));
                }
                unknown => {
                    return Err(InvalidDuration(format!(
                        "unknown unit {} in duration {}",
                        quote(unknown),
                        quote(text)
                    )));
                }
            };
            let number: u64 =
                if whole.is_empty() { 0 } else { whole.parse().map_err(|_| invalid())? };
            let part = number
                .checked_mul(unit)
                .and_then(|nanos| nanos.checked_add(fraction_of(unit, fraction)));
            let sum = part.and_then(|part| part.checked_add(total));
            total = sum.filter(|sum| *sum <= LIMIT).ok_or_else(invalid)?;
            rest = &after[end..];
        }
        let nanos =
            if negative { 0_i64.checked_sub_unsigned(total) } else { i64::try_from(total).ok() };
        nanos.map(Self).ok_or_else(invalid)
    }
}

/// The digits that `text` begins with, and what comes after them.
fn digits(text: &str) -> (&str, &str) {
    text.split_at(text.bytes().take_while(u8::is_ascii_digit).count())
}

/// The nanoseconds of `digits` behind the point of a number of units. Digits that 63 bits do not
/// hold are not looked at, and the rest is computed in floating point, since Go rounds so.
fn fraction_of(unit: u64, digits: &str) -> u64 {
    let (mut number, mut scale) = (0_u64, 1.0);
    for digit in digits.bytes() {
        let longer = number.checked_mul(10).and_then(|n| n.checked_add(u64::from(digit - b'0')));
        let Some(longer) = longer.filter(|n| *n <= LIMIT) else { break };
        number = longer;
        scale *= 10.0;
    }
    (number as f64 * (unit as f64 / scale)) as u64
}

/// `text` as package `time` quotes it: of what is not ASCII it shows the bytes.
fn quote(text: &str) -> String {
    let mut out = String::from('"');
    for byte in text.bytes() {
        match byte {
            b'"' | b'\\' => out.extend(['\\', byte.into()]),
            b' '..=0x7f => out.push(byte.into()),
            _ => out += &format!("\\x{byte:02x}"),
        }
    }
    out.push('"');
    out
}

impl fmt::Display for GoDuration {
    /// Hours, minutes and seconds, or less than a second in the largest unit that fits.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let nanos = self.0.unsigned_abs();
        f.write_str(if self.0 < 0 { "-" } else { "" })?;
        match nanos {
            0 => f.write_str("0s"),
            1..1_000 => write!(f, "{nanos}ns"),
            1_000..1_000_000 => decimal(f, nanos, 1_000, "µs"),
            1_000_000..SECOND => decimal(f, nanos, 1_000_000, "ms"),
            _ => {
                let minutes = nanos / (60 * SECOND);
                match (minutes / 60, minutes % 60) {
                    (0, 0) => {}
                    (0, minutes) => write!(f, "{minutes}m")?,
                    (hours, minutes) => write!(f, "{hours}h{minutes}m")?,
                }
                decimal(f, nanos % (60 * SECOND), SECOND, "s")
            }
        }
    }
}

/// Writes `value` in units of `unit`, a power of ten, with the decimals that are needed.
fn decimal(f: &mut fmt::Formatter<'_>, value: u64, unit: u64, name: &str) -> fmt::Result {
    let fraction = format!("{:0width$}", value % unit, width = unit.ilog10() as usize);
    let fraction = fraction.trim_end_matches('0');
    let point = if fraction.is_empty() { "" } else { "." };
    write!(f, "{}{point}{fraction}{name}", value / unit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_reads_as_what_it_was() {
        let mut nanos: i64 = 1;
        while let Some(next) = nanos.checked_mul(7) {
            for nanos in [nanos, -nanos, nanos - 1, nanos / 1000 * 1000] {
                assert_eq!(GoDuration(nanos).to_string().parse(), Ok(GoDuration(nanos)), "{nanos}");
            }
            nanos = next;
        }
    }

    #[test]
    fn only_positive_ones_are_the_standard_librarys() {
        assert_eq!(GoDuration(1500).to_std(), Some(Duration::from_nanos(1500)));
        assert_eq!(GoDuration(-1).to_std(), None);
        assert_eq!(GoDuration::from(Duration::from_millis(5)), GoDuration(5_000_000));
        assert_eq!(GoDuration::from(Duration::MAX), GoDuration(i64::MAX));
    }
}
