//! What a mistake or a finding is about: a piece of an instruction, by name.

/// The piece of an instruction that something is to be said of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Token {
    /// The instruction's name.
    Keyword,
    /// A flag with its value, as the parser read it (`--from=x`), or its name alone (`--from`).
    Flag(String),
    /// Everything after the flags; the instruction's name if nothing follows.
    Arguments,
    /// A word after the flags, by its number from 0.
    Word(usize),
    /// A stretch of the text; the arguments if it stands nowhere, as when it came out of variables.
    Text(String),
    /// A parser directive. Mistakes in it are reported one line above, as by the reference; this is
    /// the line itself.
    Directive,
    /// The name of a variable where it is used, `$NAME` or `${NAME…}`.
    Variable(String),
}
