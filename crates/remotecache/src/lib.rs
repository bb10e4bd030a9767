//! Build caches outside this machine (rows `rc.*`): in a registry, in a client's directory, or
//! inside an image's config.
//!
//! A cache is a manifest whose layers are those of the results and whose config is a
//! `format::CacheConfig`: which result has which layers, and which results it was made from.
//! The index of this machine is crate `buildcache`. An [`Import`] is a cache that one build looks
//! into besides: its results become lazy states, and nothing is fetched before it is read.
//! [`Export`] walks from a build's results back through the index and what the build imported,
//! and writes what it meets.
//!
//! Where a cache is kept is a [`CacheBackend`]'s business: `backend/` has one for registries, one
//! for clients' directories, and one for all kinds of object stores, which are crate
//! `objectcache`'s.
//!
//! The same places keep contents of cache mounts, which are crate `cachemounts`'s
//! ([`CacheBackend::mounts`]).
//!
//! The keys in it are this program's own (crate `solver`), so a cache of BuildKit's is read without
//! harm and without hits.

mod backend;
mod collect;
mod export;
mod format;
mod import;
mod layer_bytes;
mod options;

pub use backend::{
    Backends, CacheAt, CacheBackend, CacheClients, CacheSource, CacheWriter, INLINE,
};
pub use export::Export;
pub use import::{Import, ReadCache, read};
pub use layer_bytes::LayerBytes;
pub use options::{CacheRequest, ExportMode, ExportOptions, without_secrets};
