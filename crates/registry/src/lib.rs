//! Distribution client (OCI distribution-spec 1.1): resolve, fetch with ranges, push, mount,
//! authentication, mirrors.
//!
//! A [`Registry`] is the daemon's one configured client: connections, tokens and the limits on
//! transfers are shared through it. A [`Repository`] is one image's repository as seen by one
//! request: it knows who pays (a [`CredentialSource`]) and whether the request reads or writes
//! ([`Mode`]). Where to go for a registry's name, mirrors first and the origin last, is decided by
//! [`RegistryConfig`]: the daemon's own `[registry."host"]` tables (rows `toml.reg*`, `dp.mirror`),
//! or the `hosts.toml` files that containerd reads.
//!
//! What this crate refuses to know: sessions (they implement [`CredentialSource`]), files of
//! credentials, images on disk. Nothing that a registry sends is trusted: every answer is bounded
//! in size and in time, and every manifest and blob is checked against its digest before it is
//! handed on as whole.
//!
//! `httpdate` reads the dates of `Retry-After`.

mod auth;
mod blob;
mod challenge;
mod config;
mod credentials;
mod endpoint;
mod error;
mod failure;
mod hosts;
mod hosts_toml;
mod limit;
mod manifests;
mod piece;
mod push;
mod repository;
mod request;

pub use blob::BlobReader;
pub use config::{HostConfig, RegistryConfig, Timing};
pub use credentials::{Anonymous, CredentialSource, Credentials, Given, Token};
pub use error::{Error, Kind};
pub use piece::{BlobHost, BlobPart, BlobRange};
pub use push::{BodyStream, Pushed};
pub use repository::{Mode, Registry, Repository};

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;
