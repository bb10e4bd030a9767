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
//! - Active snapshots and views of one run of the daemon hang on *run leases*, which the next run
//!   deletes, but for those of processes that go on ([`Inherited`]).
//! - What may be lost lives in a small file: last use and use count.
//! - After a power cut, what was not on the disk is removed before it can be used (`durable.rs`).
//! - A layer that a remote snapshotter serves has a snapshot and no blob, which is fetched only
//!   when its bytes are needed ([`Fetch`]).
//!
//! Nothing here knows LLB, sessions or registries: a lazy layer is fetched through its
//! [`LayerSource`], and served in any namespace to callers with the labels that the source knows.
//!
//! # Layers
//!
//! A module uses those below it and to its right only:
//!
//! ```text
//! store         RefStore: what callers open
//! ├ load        an earlier run's states at a start     prune ── usage   what is on the disk
//! │
//! │ operations on handles
//! ├ merge       layers of several states               retime  times rewritten
//! ├ blobs       compressed blobs, export               layer_lookup
//! │
//! │ handles: while one lives, its state is in use
//! ├ mutable, named                         being written
//! ├ immutable ── frozen ── layered         not changing; assemble makes them of known layers
//! │  └── lower_files                       what is known of files before they are fetched
//! │
//! │ work on one record
//! ├ commit ── early_blob                   a written snapshot becomes a layer
//! ├ materialize ── pack ── layer_tree      a layer becomes a snapshot, or a blob
//! ├ fetch ── lease                         what a record's lease keeps
//! │
//! │ tables
//! ├ records                                states of layers in memory, and who uses them
//! ├ named_table                            named states, and who holds them
//! │
//! │ containerd's storage in this run of the daemon
//! ├ inherited ── active, blob_writer ── backend ── run_lease, last_used, durable, fill_marks
//! │                                            └── mount ── background
//! │
//! │ data
//! └ record ── exact ── layer, id           life, served; tree_copy ── contents
//! ```

mod active;
mod assemble;
mod backend;
mod background;
mod blob_writer;
mod blobs;
mod commit;
mod contents;
mod durable;
mod early_blob;
mod exact;
mod fetch;
mod fill_marks;
mod frozen;
mod id;
mod immutable;
mod inherited;
mod last_used;
mod layer;
mod layer_lookup;
mod layer_tree;
mod layered;
mod lease;
mod life;
mod load;
mod lower_files;
mod materialize;
mod merge;
mod mount;
mod mutable;
mod named;
mod named_table;
mod pack;
mod prune;
mod record;
mod records;
mod reordered;
mod retime;
mod rewritten;
mod run_lease;
mod served;
mod store;
mod tree_copy;
mod usage;

pub use blobs::Fetch;
pub use contents::copy_contents;
pub use id::RefId;
pub use immutable::ImmutableRef;
pub use inherited::Inherited;
pub use layer::{
    FilePieces, Layer, LayerBlob, LayerContents, LayerOrigins, LayerSource, LayerSourceId,
    LazyLayer, NoOrigins,
};
pub use layered::View;
pub use mount::LocalMount;
pub use mutable::MutableRef;
pub use named::{Filling, NamedRef, NamedRequest};
pub use named_table::Sharing;
pub use prune::{PruneOptions, Pruned, UsageFilter};
pub use record::{DOCUMENT_KIND, RUN_KIND, ReadOrder, RecordType};
pub use reordered::StepReads;
pub use retime::REWRITTEN;
pub use served::is_for_snapshotters;
pub use shipway_archive::{Compression, CompressionKind, Dialect};
pub use shipway_treehash::{PathFilter, PathVerdict, Selector};
pub use store::RefStore;
pub use usage::UsageRecord;
