//! The status model of builds and its fan-out.
//!
//! A [`Reporter`] is one vertex's voice; it speaks into every [`Journal`] attached to it. A journal is one build's record: it
//! keeps everything for replay and feeds any number of watchers. Times are wall-clock.

mod event;
mod journal;

pub use event::{Event, Group, LogStream, SourceSpan, StatusUpdate, VertexUpdate, WarningUpdate};
pub use journal::{Journal, Reporter, Watcher};
