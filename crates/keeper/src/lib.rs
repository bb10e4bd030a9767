//! The keeper: the process that answers reads of lazy layers.
//!
//! A lazy layer is an EROFS mount whose contents are in `<n>.data` of a directory, or which is
//! `<n>.img` there as a whole; or, where the kernel cannot mount it, it is the tree `<n>` itself.
//! The keeper serves that directory to the kernel. What a read wants is in the layer's data file
//! already, and then it is answered from there; or it is parked and reported to the daemon, which
//! fetches it, verifies it, writes it, and says so.
//!
//! ```text
//! kernel ──▶ serve ──▶ engine ──▶ layer (pread)         present: answered by its reader
//!              ▲         │
//!              │         ▼ parked, Miss
//!            slots     control ◀── message ──▶ client    the daemon's process
//! ```
//!
//! The daemon may end at any moment, and so may the keeper. What has to outlive the keeper is in
//! file descriptors: the connection to the kernel, requests in flight
//! ([`Slots`](shipway_fusewire::Slots)), and for each layer its data, its metadata and its map of
//! good blocks, a file of one bit each that the keeper alone changes. Their names say what they are
//! and their sizes the rest, so they are the whole state. The service manager holds them and the
//! daemon does ([`client::Holder`]); a new keeper gets them from either and goes on.
//!
//! Nothing that comes from outside the host is looked at here: FUSE's fixed headers, messages of
//! fixed size, and metadata that we have written ourselves: their first block
//! ([`shipway_erofs::first_block`], which the flat image begins with), and for trees, piece by
//! piece and with bounds all the same, the rest ([`shipway_erofs::Stored`]).
//!
//! - [`mod@message`]: what daemon and keeper say.
//! - [`mod@client`]: the daemon's side.
//! - [`run()`]: the process; [`supervise()`]: another one that holds its state where no service
//!   manager does. The program `shipway-keeper` is either.
//!
//! Dependencies: `sd-notify` knows which file descriptors the service manager passed. It does not
//! send any, so that is done here. `tracing-subscriber` writes the program's log. `libc` has what
//! rustix lacks: numbers of system calls, `seccomp` and `signalfd`. `unsafe` is in the module `sys`
//! alone.

#![allow(
    clippy::disallowed_types,
    reason = "parking_lot allocates when a thread first waits, and nothing may while serving"
)]

pub mod client;
mod confine;
mod control;
mod engine;
mod layer;
mod limits;
mod map;
pub mod message;
mod parking;
mod run;
mod serve;
mod socket;
mod store;
mod supervise;
mod sys;
mod tree;

pub use confine::confine;
pub use run::{DEADLINE, Options, run};
pub use supervise::supervise;
