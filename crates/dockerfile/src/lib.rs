//! Dockerfile text to syntax tree, word expansion, lints; no I/O.
//!
//! Two passes: `lines` cuts the text into nodes (continuation lines, comments, directives,
//! heredocs, flags), `instruction` gives each node its meaning. [`Dockerfile::parse_with`] runs
//! both and gives the tree of [`ast`], whose words are still as written; [`Lex`] expands them when
//! the conversion knows the variables, and [`Command::expand`] knows which. [`Linter`] collects
//! violations from here and from the conversion. Words of errors and lints are those of the
//! reference, because clients and their users compare them; advice beyond them is a hint beside the
//! message.
//!
//! Parsing notes lines. Columns are looked for in the text when something is said ([`Source`],
//! [`Token`]), so they cost nothing before.
//!
//! Invariants: nothing here panics, recurses or allocates without bound on any text; nothing here
//! does I/O. `thiserror` is there for [`Error`] alone.

pub mod ast;
pub mod directive;
mod error;
mod expand;
mod file;
mod flags;
mod glob;
mod heredoc;
mod instruction;
mod json;
mod lex;
mod lines;
mod lint;
mod literals;
mod mount;
mod place;
mod print;
mod token;
mod words;
mod work;

pub use ast::*;
pub use error::{Error, Result};
pub use expand::Expander;
pub use file::parse_trigger;
pub use heredoc::{is_heredoc, strip_tabs};
pub use lex::{Env, Expanded, Lex};
pub use lint::{Finding, Fix, Lint, LintConfig, Linter, Rule, Selection, is_secret_name};
pub use literals::{csv, suggest};
pub use place::{Source, pin};
pub use token::Token;
pub use work::Work;
