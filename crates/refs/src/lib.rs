//! Life of filesystem states. A [`RefStore`] hands out refs: an [`ImmutableRef`] is a stack of
//! layers that may not exist on this machine yet, a [`MutableRef`] is being written, a [`NamedRef`]
//! is a mutable state that outlives builds (cache mounts, the client's directories, git
//! repositories).
//!
//! What is true here:
//! - A committed state's snapshot is *named by its chain id*, as containerd names an image's, so an
//!   image export needs no second copy, unless it is not what unpacking its layer gives
//!   (`exact.rs`). The diffID is found by hashing the layer's tar stream at commit; nothing is
//!   stored for it, unless an export comes next: then the same stream becomes its blob.
//! - One record = one flat lease without expiry, whose labels hold all there is to know. Pruning
//!   deletes leases and nothing else.
//! - Active snapshots and views of one run of the daemon hang on *epoch* leases, which the next
//!   life deletes.
//! - What may be lost lives in a small file: last use and use count.
//! - After a power cut, what was not on the disk is removed before anybody sees it (`durable.rs`).
//! - A layer that a remote snapshotter serves has a snapshot and no blob: nothing fetches that but
//!   who needs its bytes ([`Fetch`]).
//!
//! Nothing here knows LLB, sessions or registries: a lazy layer is fetched through its
//! [`LayerSource`], and served to whoever has the labels that the source knows.

mod background;
mod blobs;
mod contents;
mod durable;
mod early_blob;
mod exact;
mod frozen;
mod immutable;
mod last_used;
mod layer;
mod layer_lookup;
mod life;
mod materialize;
mod merge;
mod mount;
mod mutable;
mod named;
mod record;
mod retime;
mod run_lease;
mod store;
mod tree_copy;
mod usage;

pub use blobs::Fetch;
pub use contents::copy_contents;
pub use immutable::{ImmutableRef, View};
pub use layer::{Layer, LayerBlob, LayerOrigins, LayerSource, LayerSourceId, LazyLayer, NoOrigins};
pub use materialize::is_for_snapshotters;
pub use mount::LocalMount;
pub use mutable::MutableRef;
pub use named::{NamedRef, NamedRequest, Sharing};
pub use record::{DOCUMENT_KIND, RUN_KIND, RecordType, RefId};
pub use retime::REWRITTEN;
pub use shipway_archive::{Compression, CompressionKind, Dialect};
pub use shipway_treehash::{PathFilter, Selector, Verdict};
pub use store::RefStore;
pub use usage::{PruneOptions, UsageFilter, UsageRecord};
