//! The status model of builds and its fan-out.
//!
//! A [`Reporter`] is one vertex's voice; it speaks into every [`Journal`] attached to it. A journal
//! is one build's record: it keeps what was said for replay and feeds any number of watchers. Times
//! are wall-clock.
//!
//! What is kept is bounded, whatever a step, a server or a frontend says: a counter is kept in its
//! last state only, and logs, warnings and vertices have limits per vertex and per journal (the
//! constants of `journal` and `reporter`).

mod event;
mod journal;
mod reporter;

pub use event::{
    CacheChanges, CacheMiss, Event, Group, LogStream, LogUpdate, SourceSpan, StatusUpdate,
    VertexUpdate, WarningUpdate,
};
pub use journal::{Journal, Watcher};
pub use reporter::Reporter;
