//! What functions of Go's standard library return, where options, files, wire formats or error
//! messages depend on it.
//!
//! Each function is checked against `tests/go.jsonl`, a table of what Go 1.26 returns. A copy that
//! differs from Go on purpose is not here but with its only user, and says there how it differs.

mod boolean;
mod duration;
mod glob;
mod mode;
pub mod path;
mod quote;
mod url;

pub use boolean::parse_bool;
pub use duration::{GoDuration, InvalidDuration};
pub use glob::{BadPattern, Glob, has_wildcards};
pub use mode::{FileKind, FileMode};
pub use quote::quote;
pub use url::Url;
