//! What functions of Go's standard library, and of `docker/go-units`, return, where options, files,
//! wire formats or error messages depend on it.
//!
//! Most functions are checked against `tests/go.jsonl`, a table of what Go 1.26 returns. A copy
//! that differs from Go on purpose is not here but with its only user, and says there how it
//! differs.

mod boolean;
mod csv;
mod duration;
mod glob;
mod mode;
pub mod path;
mod quote;
mod size;
mod url;

pub use boolean::parse_bool;
pub use csv::{CsvError, csv_fields};
pub use duration::{GoDuration, InvalidDuration};
pub use glob::{BadPattern, Glob, has_wildcards};
pub use mode::{FileKind, FileMode};
pub use quote::quote;
pub use size::parse_size;
pub use url::Url;
