//! The daemon's HTTP client: HTTP/1.1 over TCP or TLS with pooled connections, bounded in time,
//! following redirects without leaking credentials.
//!
//! A [`Client`] is one pool of connections with one set of [`TlsSettings`] and [`Timeouts`];
//! addresses in [`DeniedNetworks`] are never connected to, whatever name led there. Crate
//! `registry` and source `http` fetch by it. It knows nothing of registries: no tokens, no mirrors,
//! no retries.
//!
//! hyper with rustls (ring, because its alternative needs a C build) and HTTP/1.1: a layer is one
//! long stream, and HTTP/2's flow control makes those slower, not faster. A ready-made client such
//! as reqwest has no stall timeout per bytes moved, no control over which headers follow a redirect
//! and no way to tell that a server does not speak TLS. `rustls-native-certs` reads the machine's
//! trust store.

mod client;
mod connect;
mod denied;
mod error;
mod tls;

pub use client::{Body, BodyReader, Client, Response, display_of, full_body, join, no_body};
pub use denied::{DeniedNetworks, Network};
pub use error::HttpError;
pub use tls::{FileStamp, KeyPair, TlsSettings, native_roots};

use http::Uri;
use std::{net::IpAddr, time::Duration};

/// How long to wait for what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// For a connection, with its TLS handshake.
    pub connect: Duration,
    /// For the head of a response.
    pub response: Duration,
    /// A transfer that moves fewer than [`Timeouts::stall_bytes`] in this time is stalled.
    pub stall: Duration,
    /// See [`Timeouts::stall`].
    pub stall_bytes: u64,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(10),
            response: Duration::from_secs(15),
            stall: Duration::from_secs(25),
            stall_bytes: 4096,
        }
    }
}

/// Whether `host` (without port) is this machine by name or number.
pub fn is_loopback(host: &str) -> bool {
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

/// Host and port of an address, for messages.
pub fn host_of(uri: &Uri) -> &str {
    uri.authority().map_or("", |a| a.as_str().rsplit('@').next().unwrap_or_default())
}
