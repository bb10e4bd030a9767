//! The vocabulary of images: digests, descriptors, platforms, names, manifests and configs.
//!
//! Own types rather than `oci-spec`'s: image configs have Docker's fields besides (healthcheck,
//! onbuild, shell), their bytes must be those that Go programs write ([`gojson`]), and every
//! identifier is a type of its own. `jiff` reads and writes times. Sources: OCI image-spec 1.1,
//! distribution-spec 1.1, the Docker image config.

mod checksum;
mod config;
mod descriptor;
mod digest;
pub mod gojson;
mod name;
mod network;
pub mod pattern;
mod platform;
pub mod soci;
pub mod timestamp;
mod xattr;

pub use checksum::ChecksumAlgorithm;
pub use config::{Config, Healthcheck, History, ImageConfig, Member, RootFs};
pub use descriptor::{Descriptor, Index, Manifest, media};
pub use digest::{ChainId, DiffId, Digest, DigestError, Hasher};
pub use name::{ImageName, NameError};
pub use network::{MAX_NETWORK_NAME, NetworkName, NetworkNameError};
pub use platform::{Platform, PlatformError};
pub use xattr::is_image_xattr;
