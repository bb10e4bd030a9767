//! `strconv.Quote`.

use std::fmt::Write as _;

/// `text` in double quotes with Go's escapes, as `strconv.Quote` and the verb `%q` have it.
///
/// Which characters are printable depends on the version of Unicode: what is newer than Go's may be
/// shown here where Go escapes it.
pub fn quote(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 2);
    out.push('"');
    for c in text.chars() {
        let escape = match c {
            '"' | '\\' => c,
            '\x07' => 'a',
            '\x08' => 'b',
            '\t' => 't',
            '\n' => 'n',
            '\x0b' => 'v',
            '\x0c' => 'f',
            '\r' => 'r',
            c => {
                // Nothing fails to be written to a string.
                let _ = match c as u32 {
                    _ if is_printable(c) => out.write_char(c),
                    code @ ..0x80 => write!(out, "\\x{code:02x}"),
                    code @ ..0x10000 => write!(out, "\\u{code:04x}"),
                    code => write!(out, "\\U{code:08x}"),
                };
                continue;
            }
        };
        out.extend(['\\', escape]);
    }
    out.push('"');
    out
}

/// Whether `c` is a letter, a mark, a number, punctuation, a symbol or the ASCII space, as
/// `strconv.IsPrint`.
fn is_printable(c: char) -> bool {
    // The standard library has the table, but not in public. It escapes marks only at the beginning
    // of a text, so the character is asked for behind another one.
    let escaped = || ['_', c].iter().collect::<String>().escape_debug().count() > 2;
    matches!(c, ' '..='~') || c.is_alphanumeric() || !(c.is_ascii() || escaped())
}
