//! Symbolic modes (row `file.copy`), in the dialect of BSD's `setmode(3)`, which BuildKit speaks.

use rustix::fs::RawMode;
use shipway_fault::{Fault, Result};

/// Everything that `a` means, and no letter at all when something is taken away first: the sticky
/// bit belongs to none of them.
const ALL: RawMode = 0o6777;
const STICKY: RawMode = 0o1000;
const EXECUTE: RawMode = 0o111;

/// A list of changes, such as `u+x,go-w`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Symbolic(Vec<Change>);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    Set(RawMode),
    Clear(RawMode),
    /// Set if it is a directory, or if anyone may execute it before all changes.
    SetIfExecutable(RawMode),
    /// Permissions of one class for others.
    Copy {
        /// How far the class's bits are from the right.
        from: u32,
        /// All bits of the classes that are changed.
        to: RawMode,
        how: Op,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Op {
    Add,
    Remove,
    Assign,
}

impl Op {
    fn of(c: char) -> Option<Self> {
        match c {
            '+' => Some(Self::Add),
            '-' => Some(Self::Remove),
            '=' => Some(Self::Assign),
            _ => None,
        }
    }
}

/// Bits that a letter before the operator stands for.
fn class(c: char) -> Option<RawMode> {
    match c {
        'u' => Some(0o4700),
        'g' => Some(0o2070),
        'o' => Some(0o0007),
        'a' => Some(ALL),
        _ => None,
    }
}

fn shift(c: char) -> Option<u32> {
    match c {
        'u' => Some(6),
        'g' => Some(3),
        'o' => Some(0),
        _ => None,
    }
}

/// Reads one clause after the other.
#[derive(Default)]
struct Parser {
    changes: Vec<Change>,
    /// Whether the last `=` has cleared what it assigns to.
    assigned: bool,
}

impl Parser {
    /// Bits of `what` among those of `who`; without `who`, all.
    fn within(who: RawMode, what: RawMode) -> RawMode {
        if who == 0 { what } else { who & what }
    }

    fn bits(&mut self, op: Op, who: RawMode, bits: RawMode) {
        if op == Op::Assign {
            self.assigned = true;
            self.changes.push(Change::Clear(if who == 0 { ALL } else { who }));
        }
        let bits = Self::within(who, bits);
        self.changes.push(if op == Op::Remove { Change::Clear(bits) } else { Change::Set(bits) });
    }

    fn executable(&mut self, who: RawMode, bits: RawMode) {
        if bits != 0 {
            self.changes.push(Change::SetIfExecutable(Self::within(who, bits)));
        }
    }

    /// What follows an operator, up to the next operator or the end of the clause.
    fn permissions(
        &mut self,
        op: Op,
        mut who: RawMode,
        letters: &mut std::iter::Peekable<std::str::Chars<'_>>,
    ) {
        let (mut bits, mut conditional) = (0, 0);
        let others_only = who != 0 && who & !0o007 == 0;
        while let Some(c) = letters.next_if(|c| "rwxXstugo".contains(*c)) {
            match c {
                'r' => bits |= 0o444,
                'w' => bits |= 0o222,
                'x' => bits |= EXECUTE,
                'X' if op == Op::Remove => bits |= EXECUTE,
                'X' => conditional = EXECUTE,
                's' if !others_only => bits |= 0o6000,
                't' if !others_only => {
                    who |= STICKY;
                    bits |= STICKY;
                }
                's' | 't' => {}
                c => {
                    if bits != 0 {
                        self.bits(op, who, std::mem::take(&mut bits));
                    }
                    self.assigned |= op == Op::Assign;
                    self.executable(who, std::mem::take(&mut conditional));
                    let classes = [(0o400, 0o700), (0o040, 0o070), (0o004, 0o007)];
                    let to = classes
                        .iter()
                        .filter(|(r, _)| who == 0 || who & r != 0)
                        .map(|(_, all)| all)
                        .sum();
                    self.changes.push(Change::Copy {
                        from: shift(c).unwrap_or_default(),
                        to,
                        how: op,
                    });
                }
            }
        }
        if bits != 0 || (op == Op::Assign && !self.assigned) {
            self.bits(op, who, bits);
        }
        self.executable(who, conditional);
    }
}

impl Symbolic {
    /// Reads `text`; an octal number is accepted too.
    pub(crate) fn parse(text: &str) -> Result<Self> {
        let bad = || {
            Fault::invalid(format!(
                "{text:?} is not a file mode: want octal digits or changes such as u+x,go-w"
            ))
        };
        if text.starts_with(|c: char| c.is_ascii_digit()) {
            let bits =
                RawMode::from_str_radix(text, 8).ok().filter(|m| *m <= 0o7777).ok_or_else(bad)?;
            return Ok(Self(vec![Change::Clear(0o7777), Change::Set(bits)]));
        }
        let mut parser = Parser::default();
        for clause in text.split(',') {
            let mut letters = clause.chars().peekable();
            let mut who = 0;
            while let Some(bits) = letters.peek().copied().and_then(class) {
                who |= bits;
                letters.next();
            }
            let mut op = letters.next().and_then(Op::of).ok_or_else(bad)?;
            loop {
                if op == Op::Assign {
                    parser.assigned = false;
                }
                parser.permissions(op, who, &mut letters);
                match letters.next() {
                    None => break,
                    Some(c) => op = Op::of(c).ok_or_else(bad)?,
                }
            }
        }
        Ok(Self(parser.changes))
    }

    /// The mode that a file of mode `mode` gets.
    pub(crate) fn apply(&self, mode: RawMode, is_dir: bool) -> RawMode {
        let executable = is_dir || mode & EXECUTE != 0;
        self.0.iter().fold(mode & 0o7777, |mode, change| match *change {
            Change::Set(bits) => mode | bits,
            Change::Clear(bits) => mode & !bits,
            Change::SetIfExecutable(bits) => mode | if executable { bits } else { 0 },
            Change::Copy { from, to, how } => {
                let bits = (((mode >> from) & 7) * EXECUTE) & to;
                match how {
                    Op::Add => mode | bits,
                    Op::Remove => mode & !bits,
                    Op::Assign => mode & !to | bits,
                }
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(text: &str, before: RawMode, is_dir: bool, expected: RawMode) {
        let got = Symbolic::parse(text).expect(text).apply(before, is_dir);
        assert_eq!(got, expected, "{text}: {got:o}");
    }

    #[test]
    fn changes_are_those_of_chmod() {
        check("u+x", 0o644, false, 0o744);
        check("go-rwx", 0o755, false, 0o700);
        check("a=r,u+w", 0o777, false, 0o644);
        check("+x", 0o644, false, 0o755);
        check("g=u", 0o640, false, 0o660);
        check("go=u-w", 0o750, false, 0o755);
        check("u+s,+t", 0o755, false, 0o5755);
        check("755", 0o600, false, 0o755);
        check("u=rwx,go=rx", 0o600, false, 0o755);
        check("go=", 0o777, false, 0o700);
        check("u+r-w", 0o200, false, 0o400);
        for bad in ["", "u", "z+x", "u+q", "9", "77777", "u+x,", ",u+x", "o=x,g"] {
            assert!(Symbolic::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn execution_where_there_was_some() {
        check("a+X", 0o644, false, 0o644);
        check("a+X", 0o644, true, 0o755);
        check("a+X", 0o744, false, 0o755);
        // What counts is the mode before all changes.
        check("u+x,a+X", 0o644, false, 0o744);
        check("a-x,a+X", 0o744, false, 0o755);
        check("a-X", 0o755, false, 0o644);
    }

    #[test]
    fn special_bits_belong_to_their_classes() {
        check("a=rwx", 0o7000, false, 0o1777);
        check("=r", 0o7777, false, 0o1444);
        check("o+s", 0o755, false, 0o755);
        check("o+t", 0o755, false, 0o755);
        check("o=rwx", 0o7000, false, 0o7007);
        check("a+s", 0o755, false, 0o6755);
        check("g+s", 0o755, false, 0o2755);
        check("u+t", 0o755, false, 0o1755);
        check("0755", 0o7777, false, 0o755);
    }
}
