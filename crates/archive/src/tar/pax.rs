//! Extended records (POSIX.1-2001 pax): a decimal length that counts itself, a space, a key, `=`, a
//! value, a newline. Both the key and the value may have newlines; only the length says where a
//! record ends.

/// One record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record<'a> {
    /// The whole record.
    pub whole: &'a [u8],
    pub key: &'a [u8],
    pub value: &'a [u8],
}

/// The first record, and what follows it; none if there is no valid one.
pub fn take(records: &[u8]) -> Option<(Record<'_>, &[u8])> {
    let space = records.iter().take(8).position(|b| *b == b' ')?;
    let length: usize = std::str::from_utf8(&records[..space]).ok()?.parse().ok()?;
    let (whole, rest) = records.split_at_checked(length)?;
    let text = whole.get(space + 1..)?.strip_suffix(b"\n")?;
    let equals = text.iter().position(|b| *b == b'=').filter(|at| *at > 0)?;
    Some((Record { whole, key: &text[..equals], value: &text[equals + 1..] }, rest))
}

/// A record with its length.
pub fn record(key: &[u8], value: &[u8]) -> Vec<u8> {
    let rest = key.len() + value.len() + 3;
    let mut len = rest + digits(rest);
    if digits(len) > digits(rest) {
        len = rest + digits(len);
    }
    [len.to_string().as_bytes(), b" ", key, b"=", value, b"\n"].concat()
}

fn digits(n: usize) -> usize {
    n.checked_ilog10().unwrap_or(0) as usize + 1
}

/// A decimal number of seconds, as nanoseconds.
pub fn nanoseconds(text: &str) -> Option<i64> {
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    if !fraction.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let fraction = format!("{fraction:0<9}").get(..9)?.parse::<i64>().ok()?;
    let seconds = whole.parse::<i64>().ok()?.checked_mul(1_000_000_000)?;
    if whole.starts_with('-') {
        seconds.checked_sub(fraction)
    } else {
        seconds.checked_add(fraction)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_count_their_own_length() {
        assert_eq!(record(b"a", b"b"), b"6 a=b\n");
        for n in 80..120 {
            let value = vec![b'\n'; n];
            let r = record(b"path", &value);
            let (read, rest) = take(&r).expect("a record");
            assert_eq!(
                (read.whole, read.key, read.value, rest),
                (&r[..], &b"path"[..], &value[..], &b""[..])
            );
        }
    }

    #[test]
    fn what_is_no_record_is_not_taken() {
        for bad in [
            "",
            "6 a=b",
            "6 a=b\n"[..4].as_ref(),
            "5 a=b\n",
            "x a=b\n",
            "99999999 a=b\n",
            "4 =\n",
            "5 ab\n",
            "0 a=b\n",
            "-6 a=b\n",
            "2 \n",
        ] {
            assert_eq!(take(bad.as_bytes()), None, "{bad:?}");
        }
        let two = b"6 a=b\n8 k=1\n2\n";
        let (first, rest) = take(two).expect("a record");
        assert_eq!(
            (first.value, take(rest).map(|(r, _)| r.value)),
            (&b"b"[..], Some(&b"1\n2"[..]))
        );
    }

    #[test]
    fn seconds_may_have_a_fraction() {
        for (text, expected) in [
            ("77", Some(77_000_000_000)),
            ("77.25", Some(77_250_000_000)),
            ("0.1234567891", Some(123_456_789)),
            ("-1.5", Some(-1_500_000_000)),
            ("1.x", None),
            ("", None),
        ] {
            assert_eq!(nanoseconds(text), expected, "{text}");
        }
    }
}
