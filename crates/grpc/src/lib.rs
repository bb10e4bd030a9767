//! What every gRPC end of Shipway shares: listeners, TLS, HTTP/2 over a tunnelled stream, faults to
//! and from a status.
//!
//! - [`status_of`] and [`fault_of`]: a [`shipway_fault::Fault`] as a status with BuildKit's typed
//!   details, and back.
//! - [`Address`], [`Listener`], [`dial`]: where a server listens and how a client reaches it (row
//!   `net.listen`).
//! - [`TunnelChannel`], [`serve_tunnel`]: gRPC with roles chosen freely over any byte stream (row
//!   `ctl.session`).
//! - [`Duplex`]: a bidirectional stream of byte messages as a byte stream.
//! - [`headers`]: names of the metadata that sessions and their calls carry; [`RawCodec`],
//!   [`FileSendServer`]: messages left undecoded.
//! - [`platform_to_wire`], [`platform_of`]: platforms as messages, and back.
//! - [`TracedChannel`] and [`TraceRequests`]: a span of a trace for each call, made or served, and
//!   the W3C context in its headers (row `net.trace`).
//! - [`server`], [`tuned`]: message sizes and flow-control windows that every connection uses (row
//!   `net.maxmsg`).
//!
//! No service lives here but the health check that every server answers ([`HealthService`]), and
//! nothing that knows what a build is.
//!
//! Dependencies worth a word: `prost-reflect` writes the error details as JSON from their
//! descriptors, which Go clients expect; `listenfd` adopts systemd's sockets without `unsafe`;
//! `tokio-rustls` is what tonic uses, and is named here because TLS belongs to single listeners and
//! not to the whole server; `x509-parser` reads the names in clients' certificates, which rustls
//! verifies and does not show.

mod certificate;
mod details;
mod duplex;
pub mod headers;
mod health;
mod listen;
mod platform;
mod raw;
mod status;
mod tls;
mod traced;
mod tunnel;

pub use certificate::PeerCertificate;
pub use details::Program;
pub use duplex::{Answers, Duplex, Frame, FrameSink, frames};
pub use health::HealthService;
pub use listen::{Address, Connection, ListenOptions, Listener, Peer, dial};
pub use platform::{platform_of, platform_to_wire};
pub use raw::{FileSend, FileSendServer, RawAnswers, RawCodec};
pub use status::{fault_of, fault_of_io, status_of, tell_stacks};
pub use tls::{ClientTls, ServerTls};
pub use traced::{TraceRequests, TracedChannel, TracedService};
pub use tunnel::{TunnelChannel, TunnelPeer, serve_tunnel, server, tuned};
