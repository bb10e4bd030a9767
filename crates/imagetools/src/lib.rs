//! Images that exist: combined under a new name, copied between registries, containerd's store and
//! archives, and looked at. Nothing is built and no layer is changed, so that no daemon is needed
//! (rows `bx.imagetools.*`).
//!
//! - [`SourceSpec`], [`Request`] and [`Plan`]: an index made of manifests and indexes that are in
//!   registries, and pushed to others with all that it leads to.
//! - [`Copier`]: a manifest or index with everything below it, and with what refers to it, from a
//!   [`Source`](shipway_convert::Source) to a [`Target`](shipway_convert::Target), the ports that
//!   **convert** has for the same places.
//! - [`Kept`]: an image in containerd's store, whose missing blobs come from where its labels say.
//! - [`Archive`] reads what `docker save` and OCI tools write, [`ArchiveWriter`] writes it.
//! - [`Inspection`]: what an image is, as templates of buildx see it.
//!
//! Dependencies that need a word: `base64` opens signed statements (DSSE); `flate2`
//! compresses an archive on its way out; `tempfile` holds an
//! archive that comes compressed or through a pipe, which are read in another order than they
//! have.

#![cfg_attr(test, allow(clippy::unwrap_used))]

mod annotation;
mod archive;
mod combine;
mod copy;
mod create;
mod inspect;
mod kept;
mod tarball;

pub use annotation::{Annotation, Level};
pub use archive::{Archive, ArchiveImage};
pub use combine::{Combined, Entry, Part, combine, for_platforms};
pub use copy::Copier;
pub use create::{Described, Open, Plan, Request, SourceSpec, platform_of};
pub use inspect::Inspection;
pub use kept::Kept;
pub use tarball::{ArchiveKind, ArchiveWriter};
