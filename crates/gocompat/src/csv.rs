//! Go's `encoding/csv`, for one line.

use std::fmt;

/// A quote where none may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CsvError {
    /// Offset of the quote in bytes.
    pub offset: usize,
    /// Whether it is in a field that is not quoted.
    pub bare: bool,
}

impl fmt::Display for CsvError {
    /// The text of Go's error.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = match self.bare {
            true => "bare \" in non-quoted-field",
            false => "extraneous or missing \" in quoted-field",
        };
        write!(f, "parse error on line 1, column {}: {what}", self.offset + 1)
    }
}

impl std::error::Error for CsvError {}

/// The fields of `line`, which `comma` separates. A quoted field may have commas, and doubled
/// quotes that stand for one. An empty line is one empty field; Go reads none of it.
pub fn csv_fields(line: &str, comma: char) -> Result<Vec<String>, CsvError> {
    let mut fields = Vec::new();
    let mut at = 0;
    loop {
        if !line[at..].starts_with('"') {
            let field = line[at..].split(comma).next().unwrap_or_default();
            if let Some(quote) = field.find('"') {
                return Err(CsvError { offset: at + quote, bare: true });
            }
            fields.push(field.to_owned());
            at += field.len();
            if at == line.len() {
                return Ok(fields);
            }
            at += comma.len_utf8();
            continue;
        }
        at += 1;
        let mut field = String::new();
        loop {
            let Some(end) = line[at..].find('"') else {
                return Err(CsvError { offset: at, bare: false });
            };
            field.push_str(&line[at..at + end]);
            at += end + 1;
            match line[at..].chars().next() {
                Some('"') => {
                    field.push('"');
                    at += 1;
                }
                Some(c) if c == comma => {
                    at += comma.len_utf8();
                    fields.push(field);
                    break;
                }
                None => {
                    fields.push(field);
                    return Ok(fields);
                }
                Some(_) => return Err(CsvError { offset: at - 1, bare: false }),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_may_be_quoted() {
        for (text, expected) in [
            ("a", Some(&["a"][..])),
            ("", Some(&[""])),
            ("a,", Some(&["a", ""])),
            ("type=image,name=x", Some(&["type=image", "name=x"])),
            (r#"type=image,"name=a,b",push=true"#, Some(&["type=image", "name=a,b", "push=true"])),
            (r#""a""b",c"#, Some(&[r#"a"b"#, "c"])),
            (r#"a="b""#, None),
            (r#""a"#, None),
            (r#""a"b"#, None),
        ] {
            let expected = expected.map(|e| e.iter().map(|f| (*f).to_owned()).collect());
            assert_eq!(csv_fields(text, ',').ok(), expected, "{text}");
        }
        assert_eq!(csv_fields("a:b,c", ':').unwrap(), ["a", "b,c"]);
        let text = csv_fields(r#"a,b"c"#, ',').unwrap_err().to_string();
        assert_eq!(text, "parse error on line 1, column 4: bare \" in non-quoted-field");
    }
}
