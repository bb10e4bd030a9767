//! Fetches what lazy layers miss, from registries into layers on the disk.
//!
//! - [`index()`] finds and checks a layer's table of contents with one request.
//! - [`Fetcher`] is the engine, one for a daemon: it is told what was missed ([`Fetcher::miss`]),
//!   what will be read ([`Fetcher::learned`], [`Fetcher::landmark`]) and what to bring whole
//!   ([`Fetcher::background`]), and reports what became good, or why not ([`Event`]). What it asks
//!   for, and when, is decided by a state machine without clock or I/O (`queue.rs`).
//! - [`Profile`] is the order in which an image's files were first read; [`Profiles`] keeps such
//!   orders by manifest, and [`Profile::push`] and [`Profile::find`] share them as artifacts.
//!
//! Ports: a layer is a [`Target`], as [`shipway_layerstore::Layer`] is; bytes come from a
//! [`Source`], which [`sources`] makes of repositories; whoever takes a blob as a whole is a
//! [`Whole`], and [`Finish`] does that for the store.
//!
//! Nothing is believed that does not have the digest of the table of contents, and nothing is
//! written before. Nothing is asked for without limit: memory, connections, time and tries are
//! bounded, and a read that cannot be served fails at its deadline and begins anew with the next
//! one.
//!
//! Dependencies: `tokio` for tasks and time, `bytes` for pieces of answers, `async-trait` for ports
//! that are chosen at run time, `futures` to look at all layers at once; `serde_json` reads the
//! manifests of artifacts.

mod assemble;
mod background;
mod engine;
mod fetcher;
mod finish;
mod index;
mod layer;
mod line;
mod misses;
mod port;
mod profile;
mod queue;
mod read;
mod readahead;
mod remote;
mod settings;
mod stats;
#[cfg(test)]
mod trace;
mod whole;

pub use engine::Event;
pub use fetcher::Fetcher;
pub use finish::Finish;
pub use index::{ExternalToc, IndexRequest, Indexed, index, index_all};
pub use layer::LayerSpec;
pub use port::{
    Blob, Body, ChunkPlace, Credentials, Hope, Opened, Report, Source, SourceError, Target, Wanted,
    Whole, WriteError,
};
pub use profile::{ARTIFACT, Profile, Profiles};
pub use queue::Class;
pub use read::MAX_SKIP;
pub use readahead::Spans;
pub use remote::{MAX_SOURCES, external_toc, sources, sources_of_all};
pub use settings::Settings;
pub use stats::{Counters, LayerStats, SHORTEST};

/// Results of this crate.
pub type Result<T, E = shipway_fault::Fault> = std::result::Result<T, E>;
