//! Image, OCI layout, blob, git, http and local sources: from an identifier to a pin, and from a
//! pin to a filesystem state.
//!
//! A source is *pinned* first, which costs as little as possible and gives the cache keys; only if
//! no result is cached under them is it *fetched*, and an image even then only by name: its layers
//! are fetched when they are read.
//!
//! Sources know registries, web servers and sessions, but no graph and no operation: [`Sources`] is
//! the whole of what those above see, and a state ([`shipway_refs::ImmutableRef`]) all they get.
//! [`SessionCredentials`] is also for pushes.

mod blob;
mod clients;
mod git;
mod http;
mod image;
mod keyed_locks;
mod keys;
mod local;
mod login;
mod memo;
mod port;
mod remote;
mod session;
mod snapshotter;
mod sources;

pub use clients::SshAgent;
pub use image::{LocalImages, document_lease};
pub use memo::SourceMemo;
pub use port::{PinnedSource, SourceContext, SourceSpec};
pub use remote::{BlobStream, ClientRemote, LayerSources, RegistryRemote, Remote};
pub use session::{SessionCredentials, forwarded_agent};
pub use sources::{SourceOptions, Sources};
