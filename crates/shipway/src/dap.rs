//! The Debug Adapter Protocol over standard input and output, for editors (row `bx.dap`):
//! breakpoints in a Dockerfile, steps, what they see, and what failed.
//!
//! `wire` has the messages, `program` the order in which a build's steps are gone through,
//! `adapter` the conversation.

mod adapter;
mod program;
mod wire;

pub(crate) use adapter::{Adapter, Launch, Prepared};
