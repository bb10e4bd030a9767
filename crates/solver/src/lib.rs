//! A generic scheduler with a cache-key graph. It knows no containers, no sessions and no protobuf.
//!
//! See [`port`] for the words: an [`Operation`] is one vertex's work, a [`CacheMap`] says what its
//! result depends on, a [`CacheStore`] remembers results by [`CacheKey`].
//!
//! One task owns the graph of all builds (rows `so.graph`, `so.loop`). It feeds events to a
//! synchronous, total state machine (`step.rs`, between the types of `event.rs`; the decisions are
//! in `advance.rs` and `work.rs`, the data in `graph.rs`, the keys in `keys.rs`) and does what that
//! asks for (`driver.rs`). A vertex that runs reports why the cache had nothing for it
//! (`miss.rs`). Interest is counted from requests down: dropping a [`Job::build`] future or a
//! [`Job`] cancels what no other job wants.

pub mod memory;
pub mod port;

mod advance;
mod driver;
mod event;
mod graph;
mod handle;
mod ids;
mod imports;
mod keys;
mod lost;
mod miss;
mod step;
#[cfg(test)]
mod trace;
mod work;

pub use handle::{Job, Solver};
pub use port::{
    CacheKey, CacheMap, CacheStore, Completion, ImportedCache, InputMap, JobId, KeyPart, Limits,
    OpContext, Operation, RecordMeta, SolvedVertex, Vertex, VertexId,
};
