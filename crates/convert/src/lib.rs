//! Images that exist, with other layers: the same files, compressed anew, so that an image somebody
//! else built can be pulled lazily.
//!
//! [`convert()`] reads an image from a [`Source`] and writes it to a [`Target`]: the store of a
//! containerd or a repository, in any combination ([`Stored`], [`Remote`]). Layers stream through,
//! each checked against the image's config on its way; what is done already is copied as it is, and
//! so is what is no image, such as attestations. Configs and manifests change only where digests
//! in them do.
//!
//! [`with_soci()`] leaves the layers as they are and puts indexes of them beside the image, for
//! snapshotters that read those.
//!
//! Dependencies that need a word: `tempfile` holds a layer on its way to a registry, which wants to
//! know the digest before it takes the last byte, and may want all of it once more.

mod convert;
mod image;
mod place;
mod remote;
mod soci;
mod stored;

pub use convert::{Converted, Options, convert};
pub use place::{
    Bytes, First, Input, LayerTarget, Packing, Progress, Source, Step, Target, file_stream,
};
pub use remote::Remote;
pub use soci::{SociOptions, WithSoci, with_soci};
pub use stored::Stored;
