//! Times.

use jiff::{SignedDuration, Timestamp, civil::DateTime, tz::Offset};
use shipway_gocompat::GoDuration;

use super::{
    CallError, Entry,
    Param::{Any, Number as Num, Text},
    Result,
};
use crate::{number::Number, value::Value};

pub(super) static TABLE: &[Entry] = &[
    ("formatdate", &[Text, Text], None, |a| {
        let (time, offset) = parse(a.text(1)?).map_err(|e| CallError::argument(1, e))?;
        Ok(Value::string(format(a.text(0)?, time, offset)?))
    }),
    ("formattimestamp", &[Text, Any], None, |a| {
        let (time, offset) = match a.value(1)? {
            Value::String(text) => parse(text).map_err(|e| CallError::argument(1, e))?,
            Value::Number(n) => (unix(*n)?, Offset::UTC),
            _ => {
                let why = "must be a string timestamp or a unix timestamp number";
                return Err(CallError::argument(1, why));
            }
        };
        Ok(Value::string(match a.text(0)? {
            "X" => time.as_second().to_string(),
            layout => format(layout, time, offset)?,
        }))
    }),
    ("timeadd", &[Text, Text], None, |a| {
        let (time, offset) = parse(a.text(0)?).map_err(|e| CallError::argument(0, e))?;
        let more: GoDuration =
            a.text(1)?.parse().map_err(|e: shipway_gocompat::InvalidDuration| {
                CallError::argument(1, e.to_string())
            })?;
        let sum =
            time.checked_add(SignedDuration::from_nanos(more.0)).map_err(|e| e.to_string())?;
        Ok(Value::string(rfc3339(sum, offset)))
    }),
    ("timestamp", &[], None, |a| {
        let now = Timestamp::try_from(a.host.now()).map_err(|e| e.to_string())?;
        Ok(Value::string(rfc3339(now, Offset::UTC)))
    }),
    ("unixtimestampparse", &[Num], None, |a| {
        let time = unix(a.number(0)?)?;
        let date = Offset::UTC.to_datetime(time);
        let week = date.date().iso_week_date();
        let number = |n: i64| Value::Number(n.into());
        let fields = [
            ("year", number(date.year().into())),
            ("year_day", number(date.day_of_year().into())),
            ("day", number(date.day().into())),
            ("month", number(date.month().into())),
            ("month_name", Value::string(MONTHS[month(date)])),
            ("weekday", number(weekday(date) as i64)),
            ("weekday_name", Value::string(DAYS[weekday(date)])),
            ("hour", number(date.hour().into())),
            ("minute", number(date.minute().into())),
            ("second", number(date.second().into())),
            ("rfc3339", Value::string(rfc3339(time, Offset::UTC))),
            ("iso_year", number(week.year().into())),
            ("iso_week", number(week.week().into())),
        ];
        Ok(Value::object(fields.into_iter().map(|(name, v)| (name.to_owned(), v)).collect()))
    }),
];

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] =
    ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

/// From 0.
fn month(date: DateTime) -> usize {
    usize::try_from(date.month()).unwrap_or(1).clamp(1, 12) - 1
}

/// From Sunday, which is 0.
fn weekday(date: DateTime) -> usize {
    usize::try_from(date.weekday().to_sunday_zero_offset()).unwrap_or(0).min(6)
}

fn unix(n: Number) -> Result<Timestamp> {
    let seconds = n.to_i64().ok_or_else(|| CallError::from("a whole number is required"))?;
    Timestamp::from_second(seconds).map_err(|e| e.to_string().into())
}

/// A time in RFC 3339, with the offset that it is written with.
fn parse(text: &str) -> Result<(Timestamp, Offset), String> {
    let invalid = || format!("not a valid RFC3339 timestamp: {text:?}");
    let bytes = text.as_bytes();
    let digits = |range: std::ops::Range<usize>| -> Option<i32> {
        let part = text.get(range)?;
        part.bytes().all(|b| b.is_ascii_digit()).then(|| part.parse().ok())?
    };
    let shape = bytes.len() >= 20
        && bytes[4] == b'-'
        && bytes[7] == b'-'
        && bytes[10] == b'T'
        && bytes[13] == b':'
        && bytes[16] == b':';
    if !shape || digits(0..4).is_none() {
        return Err(invalid());
    }
    let zone = text[19..].find(['Z', '+', '-']).map(|n| n + 19).ok_or_else(invalid)?;
    let offset = match &text[zone..] {
        "Z" => Offset::UTC,
        _ => {
            let (hours, minutes) = (digits(zone + 1..zone + 3), digits(zone + 4..zone + 6));
            let (Some(hours), Some(minutes), 6, Some(b':')) =
                (hours, minutes, text.len() - zone, bytes.get(zone + 3))
            else {
                return Err(invalid());
            };
            let seconds = (hours * 60 + minutes) * 60;
            Offset::from_seconds(if bytes[zone] == b'-' { -seconds } else { seconds })
                .map_err(|_| invalid())?
        }
    };
    let time: Timestamp = text.parse().map_err(|_| invalid())?;
    Ok((time, offset))
}

fn zone(offset: Offset, colon: &str) -> String {
    let seconds = offset.seconds();
    let sign = if seconds < 0 { '-' } else { '+' };
    let minutes = seconds.abs() / 60;
    format!("{sign}{:02}{colon}{:02}", minutes / 60, minutes % 60)
}

/// In whole seconds.
fn rfc3339(time: Timestamp, offset: Offset) -> String {
    let d = offset.to_datetime(time);
    let zone = if offset.is_zero() { "Z".to_owned() } else { zone(offset, ":") };
    format!(
        "{:04}-{:02}-{:02}T{:02}:{:02}:{:02}{zone}",
        d.year(),
        d.month(),
        d.day(),
        d.hour(),
        d.minute(),
        d.second()
    )
}

/// `layout`: runs of one letter stand for a part of the time, what is in single quotes for itself.
fn format(layout: &str, time: Timestamp, offset: Offset) -> Result<String> {
    let d = offset.to_datetime(time);
    let mut out = String::new();
    let mut rest = layout;
    while let Some(first) = rest.chars().next() {
        if first == '\'' {
            // A doubled quote stands for one.
            let mut end = 1;
            loop {
                match rest[end..].find('\'').map(|n| n + end) {
                    None => return Err(CallError::argument(0, "unterminated literal '")),
                    Some(at) if rest[at + 1..].starts_with('\'') => end = at + 2,
                    Some(at) => {
                        out.push_str(&rest[1..at].replace("''", "'"));
                        rest = &rest[at + 1..];
                        break;
                    }
                }
            }
            continue;
        }
        if !first.is_ascii_alphabetic() {
            out.push(first);
            rest = &rest[first.len_utf8()..];
            continue;
        }
        let length = rest.find(|c| c != first).unwrap_or(rest.len());
        let (part, after) = rest.split_at(length);
        rest = after;
        let twelve = match d.hour() % 12 {
            0 => 12,
            n => n,
        };
        out.push_str(&match part {
            "YYYY" => format!("{:04}", d.year()),
            "YY" => format!("{:02}", d.year() % 100),
            "MMMM" => MONTHS[month(d)].to_owned(),
            "MMM" => MONTHS[month(d)][..3].to_owned(),
            "MM" => format!("{:02}", d.month()),
            "M" => d.month().to_string(),
            "DD" => format!("{:02}", d.day()),
            "D" => d.day().to_string(),
            "EEEE" => DAYS[weekday(d)].to_owned(),
            "EEE" => DAYS[weekday(d)][..3].to_owned(),
            "hh" => format!("{:02}", d.hour()),
            "h" => d.hour().to_string(),
            "HH" => format!("{twelve:02}"),
            "H" => twelve.to_string(),
            "AA" => if d.hour() < 12 { "AM" } else { "PM" }.to_owned(),
            "aa" => if d.hour() < 12 { "am" } else { "pm" }.to_owned(),
            "mm" => format!("{:02}", d.minute()),
            "m" => d.minute().to_string(),
            "ss" => format!("{:02}", d.second()),
            "s" => d.second().to_string(),
            "ZZZZZ" => zone(offset, ":"),
            "ZZZZ" => zone(offset, ""),
            "ZZZ" if offset.is_zero() => "UTC".to_owned(),
            "ZZZ" => zone(offset, ""),
            "Z" if offset.is_zero() => "Z".to_owned(),
            "Z" => zone(offset, ":"),
            other => {
                let why = format!("invalid date format verb {other:?}");
                return Err(CallError::argument(0, why));
            }
        });
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::super::tests::check;

    #[test]
    fn times_are_formatted_and_added() {
        let time = "2018-01-02T23:12:01Z";
        check(
            &format!(r#"formatdate("DD MMM YYYY hh:mm ZZZ", "{time}")"#),
            r#""02 Jan 2018 23:12 UTC""#,
        );
        check(
            &format!(r#"formatdate("EEEE, DD-MMM-YY hh:mm:ss ZZZ", "{time}")"#),
            r#""Tuesday, 02-Jan-18 23:12:01 UTC""#,
        );
        check(
            &format!(r#"formatdate("h'h'mm 'o''clock' HAA", "{time}")"#),
            r#""23h12 o'clock 11PM""#,
        );
        check(
            r#"formatdate("YYYY-MM-DD'T'hh:mm:ssZ", "2018-01-02T23:12:01-08:00")"#,
            r#""2018-01-02T23:12:01-08:00""#,
        );
        check(&format!(r#"timeadd("{time}", "1h30m")"#), r#""2018-01-03T00:42:01Z""#);
        check(&format!(r#"formattimestamp("X", "{time}")"#), r#""1514934721""#);
        check("unixtimestampparse(1690328596).rfc3339", r#""2023-07-25T23:43:16Z""#);
        check("timestamp()", r#""1970-01-01T00:00:00Z""#);
        check(
            r#"formatdate("JJ", "2018-01-02T23:12:01Z")"#,
            "error Invalid function argument; Invalid value for argument 1 of formatdate: invalid date format verb \"JJ\".",
        );
        check(
            r#"formatdate("D", "yesterday")"#,
            "error Invalid function argument; Invalid value for argument 2 of formatdate: not a valid RFC3339 timestamp: \"yesterday\".",
        );
    }
}
