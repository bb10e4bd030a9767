//! The last lines of a step's output as a terminal would show them: carriage returns overwrite,
//! escape sequences draw nothing.

use std::collections::VecDeque;

/// Lines that are kept; more than any log window has.
const LINES: usize = 64;
/// Characters of a line that are kept.
const WIDTH: usize = 1024;

/// Where the writer is within an escape sequence.
#[derive(Clone, Copy, Default, PartialEq)]
enum Escape {
    #[default]
    None,
    Begun,
    Sequence,
    /// A string such as a window's title, until a bell.
    Text,
}

/// A small terminal.
#[derive(Default)]
pub(super) struct Screen {
    lines: VecDeque<Vec<char>>,
    column: usize,
    escape: Escape,
    /// A character of several bytes that is not complete.
    partial: Vec<u8>,
    /// Bytes ever written.
    pub(super) written: u64,
}

impl Screen {
    /// Writes bytes of output.
    pub(super) fn write(&mut self, bytes: &[u8]) {
        self.written += bytes.len() as u64;
        let mut data = std::mem::take(&mut self.partial);
        data.extend_from_slice(bytes);
        for chunk in data.utf8_chunks() {
            for c in chunk.valid().chars() {
                self.put(c);
            }
        }
        if let Err(error) = std::str::from_utf8(&data)
            && error.error_len().is_none()
        {
            self.partial = data.split_off(error.valid_up_to());
        }
    }

    fn put(&mut self, c: char) {
        self.escape = match (self.escape, c) {
            (Escape::None, '\x1b') => Escape::Begun,
            (Escape::None, c) => {
                self.draw(c);
                Escape::None
            }
            (Escape::Begun, '[') => Escape::Sequence,
            (Escape::Begun, ']') => Escape::Text,
            (Escape::Begun, _) => Escape::None,
            (Escape::Sequence, '\x40'..='\x7e') => Escape::None,
            (Escape::Text, '\x07' | '\x1b') => Escape::None,
            (state, _) => state,
        };
    }

    fn draw(&mut self, c: char) {
        if self.lines.is_empty() {
            self.lines.push_back(Vec::new());
        }
        match c {
            '\n' => {
                self.lines.push_back(Vec::new());
                self.column = 0;
                if self.lines.len() > LINES {
                    self.lines.pop_front();
                }
            }
            '\r' => self.column = 0,
            '\x08' => self.column = self.column.saturating_sub(1),
            '\t' => (0..8 - self.column % 8).for_each(|_| self.draw(' ')),
            c if c.is_control() => {}
            c => {
                if let Some(line) = self.lines.back_mut()
                    && self.column < WIDTH
                {
                    if self.column < line.len() {
                        line[self.column] = c;
                    } else {
                        line.resize(self.column, ' ');
                        line.push(c);
                    }
                    self.column += 1;
                }
            }
        }
    }

    /// The last `height` lines that are not blank, cut at `width`.
    pub(super) fn last(&self, height: usize, width: usize) -> Vec<String> {
        let filled = self.lines.iter().rev().filter(|line| line.iter().any(|c| *c != ' '));
        let mut last: Vec<String> =
            filled.take(height).map(|line| line.iter().take(width).collect()).collect();
        last.reverse();
        last
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_looks_as_on_a_terminal() {
        let mut screen = Screen::default();
        screen.write(b"one\n\x1b[31mred\x1b[0m\n10%\r20%\r100%\n\n a\tb\n\x1b]0;title\x07caf\xc3");
        screen.write(b"\xa9\xffx");
        assert_eq!(screen.last(9, 80), ["one", "red", "100%", " a      b", "café\u{78}"]);
        assert_eq!(screen.last(2, 3), [" a ", "caf"]);
    }
}
