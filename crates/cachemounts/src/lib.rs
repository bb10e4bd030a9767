//! Contents of cache mounts that travel: saved from one machine's directory,
//! restored into another's.
//!
//! What is saved is an artifact (OCI image-spec 1.1, "Guidelines for Artifact Usage"): a manifest
//! of type [`ARTIFACT`] whose config, of type [`INDEX`], lists cache mounts by their ids. Each has
//! a *tree* ([`TREE`]): its files with owners, modes, times and extended attributes, and of which
//! *chunks* their contents are made. Chunks are cut where the content says so (FastCDC), so that
//! what is inserted into a file moves no other chunk, and lie one after another in *packs*
//! ([`PACK`]) of a few MB, each compressed as a whole. Trees and packs are the manifest's layers. A
//! second save names the packs of the first one and adds one of what is new.
//!
//! ```text
//! manifest ── config: {"version": 1, "mounts": {"/root/.cache": {tree, packs, …}}}
//!          ├─ tree   a JSON object a line: {"p": "a/b", "k": "file", "c": [[digest, pack, at, n]]}
//!          └─ packs  zstd of chunks
//! ```
//!
//! [`Place`] is the port to where artifacts are kept; [`Keys`] says under which name, and what else
//! will do. [`save()`] and [`restore()`] know a directory and a place, and no more: whose directory
//! it is, and who must not write meanwhile, is the business of callers.
//!
//! Artifacts are foreign bytes. Blobs are bounded and checked against their digests; paths are
//! relative, in order, and below directories that are entries themselves; there is nothing but
//! directories, regular files, links to those and symbolic links, which are made last. Nothing is
//! written through a link. Directories are read likewise: a step may change one while it is saved.
//!
//! `fastcdc` finds where chunks end; it has no dependencies.

mod archive;
mod entry;
mod format;
mod keys;
mod pack;
mod place;
mod request;
mod restore;
mod save;
mod scan;

pub use archive::{Archive, SavedMount};
pub use format::{ARTIFACT, INDEX, MAX_DOCUMENT, PACK, TREE};
pub use keys::{Keys, Limits, MAX_SIZE};
pub use place::{Named, Place};
pub use request::{DIGEST, Direction, FOUND, REQUEST, RESPONSE, Request};
pub use restore::{Restored, restore};
pub use save::{SaveOutcome, Saved, save};
