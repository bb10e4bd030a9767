//! How deep expressions may be nested. The parser of HCL calls itself for each level, so what is
//! nested deeper is refused before it gets there.

/// Levels of brackets, operators before an operand, and conditions within one another.
pub(crate) const MAX_NESTING: usize = 64;

/// Refuses text that is nested too deep. Counts brackets in texts and comments, too, which are
/// never that many.
pub(crate) fn check(text: &str) -> Result<(), String> {
    // Of every open bracket, the levels that its own line of operators adds.
    let mut open = vec![0usize];
    let (mut levels, mut in_row) = (0usize, 0usize);
    for byte in text.bytes() {
        match byte {
            b'(' | b'[' | b'{' => {
                open.push(0);
                levels += 1;
            }
            b')' | b']' | b'}' if open.len() > 1 => {
                levels = levels.saturating_sub(1 + open.pop().unwrap_or(0));
            }
            b'?' | b'!' | b'-' => {
                in_row += usize::from(byte != b'?');
                // A dash in a name or text is not a level; a row of them would be.
                if byte == b'?' || in_row > 3 {
                    if let Some(own) = open.last_mut() {
                        *own += 1;
                    }
                    levels += 1;
                }
            }
            b',' | b'\n' => levels -= open.last_mut().map_or(0, std::mem::take),
            _ => {}
        }
        if !matches!(byte, b'!' | b'-' | b' ' | b'\t') {
            in_row = 0;
        }
        if levels > MAX_NESTING {
            return Err(format!("expressions are nested more than {MAX_NESTING} levels deep"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_nested_too_deep_is_refused() {
        for unit in ["(", "[", "{", "!", "a?b:", "${"] {
            assert!(check(&unit.repeat(10)).is_ok(), "{unit}");
            assert!(check(&unit.repeat(MAX_NESTING + 5)).is_err(), "{unit}");
        }
    }

    #[test]
    fn what_is_only_long_is_not() {
        check(&"a = [1, (2)]\nb = a ? b : c\n".repeat(1000)).unwrap();
        check(&"# ----------------------------------------\n".repeat(100)).unwrap();
    }
}
