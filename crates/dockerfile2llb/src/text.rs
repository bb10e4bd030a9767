//! Texts that must look as Go's programs write them, because clients and image configs are compared by them.

use shipway_gocompat::quote;
use std::time::Duration;

/// A JSON array of strings as Go encodes it: also `<`, `>` and `&` are escaped. Empty for no strings.
pub fn json_list<S: AsRef<str>>(items: &[S]) -> String {
    if items.is_empty() {
        return String::new();
    }
    let items: Vec<&str> = items.iter().map(AsRef::as_ref).collect();
    shipway_oci::gojson::to_string(&items).unwrap_or_default()
}

/// A duration as `%v` shows it, such as `1m30s`.
pub fn duration(d: Duration) -> String {
    let nanos = d.as_nanos();
    let with_fraction = |value: u128, unit: u128, suffix: &str| {
        let fraction = format!("{:0width$}", value % unit, width = unit.ilog10() as usize);
        let fraction = fraction.trim_end_matches('0');
        let dot = if fraction.is_empty() { "" } else { "." };
        format!("{}{dot}{}{suffix}", value / unit, if unit == 1 { "" } else { fraction })
    };
    match nanos {
        0 => "0s".into(),
        1..1_000 => format!("{nanos}ns"),
        1_000..1_000_000 => with_fraction(nanos, 1_000, "µs"),
        1_000_000..1_000_000_000 => with_fraction(nanos, 1_000_000, "ms"),
        _ => {
            let seconds = with_fraction(nanos % 60_000_000_000, 1_000_000_000, "s");
            let minutes = nanos / 60_000_000_000;
            match (minutes / 60, minutes % 60) {
                (0, 0) => seconds,
                (0, m) => format!("{m}m{seconds}"),
                (h, m) => format!("{h}h{m}m{seconds}"),
            }
        }
    }
}

/// Words in brackets, as `%v` shows a list.
pub fn list<S: AsRef<str>>(items: &[S]) -> String {
    format!("[{}]", items.iter().map(AsRef::as_ref).collect::<Vec<_>>().join(" "))
}

/// Quoted words in brackets, as `%q` shows a list.
pub fn quoted_list<S: AsRef<str>>(items: &[S]) -> String {
    let quoted: Vec<String> = items.iter().map(|i| quote(i.as_ref())).collect();
    list(&quoted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_look_like_gos() {
        for (nanos, want) in [
            (0, "0s"),
            (5, "5ns"),
            (1_500, "1.5µs"),
            (250_000_000, "250ms"),
            (1_500_000_000, "1.5s"),
            (90_000_000_000, "1m30s"),
            (3_600_000_000_000, "1h0m0s"),
            (3_661_010_000_000, "1h1m1.01s"),
        ] {
            assert_eq!(duration(Duration::from_nanos(nanos)), want);
        }
    }

    #[test]
    fn lists_escape_as_go_does() {
        assert_eq!(json_list(&["a<b>&", "\"c"]), r#"["a\u003cb\u003e\u0026","\"c"]"#);
        assert_eq!(json_list::<&str>(&[]), "");
        assert_eq!(quoted_list(&["a", "b\n"]), r#"["a" "b\n"]"#);
    }
}
