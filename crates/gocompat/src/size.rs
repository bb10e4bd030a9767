//! Sizes as the library `docker/go-units` reads them, which clients of BuildKit and Docker use.

/// Bytes of an amount such as `64m`, `1.5 GiB` or `100`, in powers of 1024; `None` if it is not
/// one.
pub fn parse_size(text: &str) -> Option<i64> {
    let sep = text.rfind(|c: char| c.is_ascii_digit() || c == '.' || c == ' ')?;
    let (number, suffix) = if text[sep..].starts_with(' ') {
        (&text[..sep], &text[sep + 1..])
    } else {
        text.split_at(sep + 1)
    };
    // Rust would read words such as `inf`, Go would too; neither is an amount.
    if number.is_empty()
        || !number.chars().all(|c| c.is_ascii_digit() || matches!(c, '.' | '+' | 'e' | 'E' | '-'))
    {
        return None;
    }
    let size: f64 = number.parse().ok()?;
    if size < 0.0 {
        return None;
    }
    let factor = match suffix.to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 1,
        "m" | "mb" | "mib" => 2,
        "g" | "gb" | "gib" => 3,
        "t" | "tb" | "tib" => 4,
        "p" | "pb" | "pib" => 5,
        _ => return None,
    };
    Some((size * 1024f64.powi(factor)) as i64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_have_units() {
        for (text, expected) in [
            ("64m", Some(64 << 20)),
            ("1.5gb", Some(3 << 29)),
            ("1.5 GiB", Some(3 << 29)),
            ("10", Some(10)),
            ("10b", Some(10)),
            ("1GiB", Some(1 << 30)),
            ("", None),
            ("x", None),
            ("1q", None),
            ("-1k", None),
            ("inf", None),
        ] {
            assert_eq!(parse_size(text), expected, "{text}");
        }
    }
}
