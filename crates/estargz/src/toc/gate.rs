//! What JSON passes through before the parser sees it: it is hashed, counted, and no text in it may
//! be long, since a parser holds each text as a whole.

use crate::Error;
use shipway_oci::{Digest, Hasher};
use std::io::{self, Read};

/// Most bytes of one text in the JSON, as written there. The longest that is right is an
/// attribute's value, 64 KiB in base64.
pub const MAX_STRING: usize = 128 << 10;

/// See the module.
pub struct Gate<R> {
    input: R,
    hasher: Hasher,
    size: u64,
    /// Bytes of the text that is being read; `None` between texts.
    text: Option<usize>,
    /// Whether the byte before was a backslash that escapes.
    escaped: bool,
}

impl<R: Read> Gate<R> {
    pub fn new(input: R) -> Self {
        Self { input, hasher: Hasher::new(), size: 0, text: None, escaped: false }
    }

    /// Reads what is left without a look at it, and gives the digest and the length of all.
    pub fn finish(mut self) -> io::Result<(Digest, u64)> {
        let mut buf = [0; 8192];
        while self.more(&mut buf)? > 0 {}
        Ok((self.hasher.finish(), self.size))
    }

    fn more(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.input.read(buf)?;
        self.hasher.update(&buf[..n]);
        self.size += n as u64;
        Ok(n)
    }

    /// Follows where texts begin and end.
    fn follow(&mut self, bytes: &[u8]) -> Result<(), Error> {
        let mut rest = bytes;
        while !rest.is_empty() {
            let Some(length) = &mut self.text else {
                let Some(quote) = rest.iter().position(|b| *b == b'"') else { return Ok(()) };
                (self.text, rest) = (Some(0), &rest[quote + 1..]);
                continue;
            };
            if self.escaped {
                self.escaped = false;
                *length += 1;
                rest = &rest[1..];
                continue;
            }
            let end = rest.iter().position(|b| *b == b'"' || *b == b'\\').unwrap_or(rest.len());
            *length += end;
            if *length > MAX_STRING {
                return Err(Error::TooLarge {
                    what: "a text in the table of contents",
                    size: *length as u64,
                    limit: MAX_STRING as u64,
                });
            }
            match rest.get(end) {
                None => return Ok(()),
                Some(b'"') => self.text = None,
                Some(_) => {
                    self.escaped = true;
                    *length += 1;
                }
            }
            rest = &rest[end + 1..];
        }
        Ok(())
    }
}

impl<R: Read> Read for Gate<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.more(buf)?;
        self.follow(&buf[..n]).map_err(io::Error::other)?;
        Ok(n)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A reader that gives some bytes at a time.
    struct Pieces<'a>(&'a [u8], usize);

    impl Read for Pieces<'_> {
        fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
            let n = self.1.min(buf.len()).min(self.0.len());
            buf[..n].copy_from_slice(&self.0[..n]);
            self.0 = &self.0[n..];
            Ok(n)
        }
    }

    #[test]
    fn long_texts_are_refused_wherever_they_are_cut() {
        let fits =
            format!(r#"{{"{}":"\"{}"}}"#, "k".repeat(MAX_STRING), "v".repeat(MAX_STRING - 2));
        let too_long = format!(r#"{{"a":"\"{}"}}"#, "v".repeat(MAX_STRING - 1));
        let escapes = format!(r#"{{"a":"{}"}}"#, r"\\".repeat(MAX_STRING / 2 + 1));
        for piece in [1, 7, 1000, 1 << 20] {
            let mut out = Vec::new();
            let mut gate = Gate::new(Pieces(fits.as_bytes(), piece));
            gate.read_to_end(&mut out).unwrap();
            let finished = gate.finish().unwrap();
            assert_eq!(
                (out == fits.as_bytes(), finished),
                (true, (Digest::of(&fits), fits.len() as u64))
            );
            for bad in [&too_long, &escapes] {
                let mut gate = Gate::new(Pieces(bad.as_bytes(), piece));
                let failed = gate.read_to_end(&mut Vec::new()).unwrap_err();
                assert_eq!(gate.finish().unwrap().0, Digest::of(bad));
                let error = failed.downcast::<Error>().unwrap();
                assert!(
                    matches!(error, Error::TooLarge { limit, .. } if limit == MAX_STRING as u64),
                    "{error}"
                );
            }
        }
    }
}
