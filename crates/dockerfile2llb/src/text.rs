//! Texts that must look as Go's programs write them, because clients and image configs are compared
//! by them.

use shipway_gocompat::quote;

/// A JSON array of strings as Go encodes it: also `<`, `>` and `&` are escaped. Empty for no
/// strings.
pub fn json_list<S: AsRef<str>>(items: &[S]) -> String {
    if items.is_empty() {
        return String::new();
    }
    let items: Vec<&str> = items.iter().map(AsRef::as_ref).collect();
    shipway_oci::gojson::to_string(&items).unwrap_or_default()
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
    fn lists_escape_as_go_does() {
        assert_eq!(json_list(&["a<b>&", "\"c"]), r#"["a\u003cb\u003e\u0026","\"c"]"#);
        assert_eq!(json_list::<&str>(&[]), "");
        assert_eq!(quoted_list(&["a", "b\n"]), r#"["a" "b\n"]"#);
    }
}
