//! `strconv.ParseBool`.

/// The boolean that `text` is, as Go's `strconv.ParseBool` reads it: `1`, `t`, `T`, `true`, `TRUE`,
/// `True`, and `0`, `f`, `F`, `false`, `FALSE`, `False`. `None` for anything else, the empty text
/// included.
pub fn parse_bool(text: &str) -> Option<bool> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Some(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Some(false),
        _ => None,
    }
}
