//! Arrays of strings in JSON, the exec form.
//!
//! What is not JSON is not an error: `["c:\x"]` is then text for a shell, as users of the reference
//! expect. Only an array with other things than strings is one. Nesting needs no recursion.

/// How a text reads as JSON.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Array {
    /// An array of strings.
    Strings(Vec<String>),
    /// An array with something else in it.
    Mixed,
    /// Not an array, or not JSON.
    Not,
}

/// Depth that the reference's reader accepts.
const MAX_DEPTH: usize = 10_000;

/// Reads `text` as an array.
pub fn array(text: &str) -> Array {
    let text = text.trim_start();
    if !text.starts_with('[') {
        return Array::Not;
    }
    Reader::new(text).whole().unwrap_or(Array::Not)
}

/// The string that the object in `text` has under `key`.
pub fn object_member(text: &str, key: &str) -> Option<String> {
    let mut reader = Reader::new(text);
    reader.blank();
    if reader.peek() != Some(b'{') {
        return None;
    }
    reader.wanted = Some(key);
    reader.whole()?;
    reader.member
}

struct Reader<'a> {
    text: &'a str,
    at: usize,
    /// The key whose value `member` is to hold.
    wanted: Option<&'a str>,
    member: Option<String>,
}

/// What may come next.
#[derive(Clone, Copy, PartialEq)]
enum Want {
    Value,
    ValueOrEnd,
    Key,
    KeyOrEnd,
    CommaOrEnd,
}

impl<'a> Reader<'a> {
    fn new(text: &'a str) -> Self {
        Self { text, at: 0, wanted: None, member: None }
    }

    fn blank(&mut self) {
        while let Some(b' ' | b'\t' | b'\n' | b'\r') = self.peek() {
            self.at += 1;
        }
    }

    fn peek(&self) -> Option<u8> {
        self.text.as_bytes().get(self.at).copied()
    }

    /// `None` when it is not JSON.
    fn whole(&mut self) -> Option<Array> {
        let mut strings = Vec::new();
        let mut mixed = false;
        let mut stack: Vec<u8> = Vec::new();
        let mut want = Want::Value;
        let mut wanted = false;
        loop {
            self.blank();
            let byte = self.peek()?;
            let top = stack.last().copied();
            match (byte, want) {
                (b']', Want::ValueOrEnd) => want = self.close(&mut stack),
                (b'}', Want::KeyOrEnd) => want = self.close(&mut stack),
                (b']', Want::CommaOrEnd) if top == Some(b'[') => want = self.close(&mut stack),
                (b'}', Want::CommaOrEnd) if top == Some(b'{') => want = self.close(&mut stack),
                (b',', Want::CommaOrEnd) => {
                    self.at += 1;
                    want = if top == Some(b'[') { Want::Value } else { Want::Key };
                }
                (b'"', Want::Key | Want::KeyOrEnd) => {
                    let key = self.string()?;
                    if stack.len() == 1 {
                        wanted = self.wanted == Some(&key);
                        if wanted {
                            self.member = None;
                        }
                    }
                    self.blank();
                    if self.peek()? != b':' {
                        return None;
                    }
                    self.at += 1;
                    want = Want::Value;
                }
                (b'"', Want::Value | Want::ValueOrEnd) => {
                    let string = self.string()?;
                    if stack.len() == 1 && top == Some(b'[') {
                        strings.push(string);
                    } else if stack.len() == 1 && wanted {
                        self.member = Some(string);
                    }
                    want = Want::CommaOrEnd;
                }
                (b'[' | b'{', Want::Value | Want::ValueOrEnd) => {
                    mixed |= !stack.is_empty();
                    stack.push(byte);
                    self.at += 1;
                    if stack.len() > MAX_DEPTH {
                        return None;
                    }
                    want = if byte == b'[' { Want::ValueOrEnd } else { Want::KeyOrEnd };
                }
                (_, Want::Value | Want::ValueOrEnd) => {
                    mixed = true;
                    self.scalar()?;
                    want = Want::CommaOrEnd;
                }
                _ => return None,
            }
            if stack.is_empty() {
                self.blank();
                let ended = self.at == self.text.len();
                return ended.then_some(if mixed { Array::Mixed } else { Array::Strings(strings) });
            }
        }
    }

    fn close(&mut self, stack: &mut Vec<u8>) -> Want {
        stack.pop();
        self.at += 1;
        Want::CommaOrEnd
    }

    fn scalar(&mut self) -> Option<()> {
        let rest = &self.text[self.at..];
        for word in ["null", "true", "false"] {
            if rest.starts_with(word) {
                self.at += word.len();
                return Some(());
            }
        }
        let end = rest
            .find(|c: char| !matches!(c, '0'..='9' | '+' | '-' | '.' | 'e' | 'E'))
            .unwrap_or(rest.len());
        let number = &rest[..end];
        let unsigned = number.strip_prefix('-').unwrap_or(number);
        let (mantissa, exponent) =
            unsigned.split_once(['e', 'E']).map_or((unsigned, None), |(m, e)| (m, Some(e)));
        let (whole, fraction) =
            mantissa.split_once('.').map_or((mantissa, None), |(w, f)| (w, Some(f)));
        let digits = |s: &str| !s.is_empty() && s.bytes().all(|b| b.is_ascii_digit());
        let valid = digits(whole)
            && (whole == "0" || !whole.starts_with('0'))
            && fraction.is_none_or(digits)
            && exponent.is_none_or(|e| digits(e.strip_prefix(['+', '-']).unwrap_or(e)));
        self.at += end;
        (valid && number.parse::<f64>().is_ok_and(f64::is_finite)).then_some(())
    }

    fn string(&mut self) -> Option<String> {
        self.at += 1;
        let mut out = String::new();
        loop {
            let rest = &self.text[self.at..];
            let plain = rest.find(|c: char| c == '"' || c == '\\' || c < ' ')?;
            out.push_str(&rest[..plain]);
            self.at += plain + 1;
            match rest.as_bytes()[plain] {
                b'"' => return Some(out),
                b'\\' => self.escape(&mut out)?,
                _ => return None,
            }
        }
    }

    fn escape(&mut self, out: &mut String) -> Option<()> {
        let byte = self.peek()?;
        self.at += 1;
        out.push(match byte {
            b'"' | b'\\' | b'/' => byte as char,
            b'b' => '\x08',
            b'f' => '\x0c',
            b'n' => '\n',
            b'r' => '\r',
            b't' => '\t',
            b'u' => self.unicode()?,
            _ => return None,
        });
        Some(())
    }

    /// Half a surrogate pair becomes the replacement character.
    fn unicode(&mut self) -> Option<char> {
        let first = self.hex()?;
        if (0xd800..0xdc00).contains(&first) && self.text[self.at..].starts_with("\\u") {
            let before = self.at;
            self.at += 2;
            let second = self.hex()?;
            if (0xdc00..0xe000).contains(&second) {
                return char::from_u32(0x10000 + ((first - 0xd800) << 10) + (second - 0xdc00));
            }
            self.at = before;
        }
        Some(char::from_u32(first).unwrap_or('\u{fffd}'))
    }

    fn hex(&mut self) -> Option<u32> {
        let digits = self.text.get(self.at..self.at + 4)?;
        if !digits.bytes().all(|b| b.is_ascii_hexdigit()) {
            return None;
        }
        self.at += 4;
        u32::from_str_radix(digits, 16).ok()
    }
}
