//! Generated wire code of the BuildKit API.
//!
//! Modules mirror the protobuf packages of `proto/`: `moby::buildkit::v1` is Control, `pb` is LLB,
//! and so on. There is no logic here; crates that speak a wire convert these types at their edge
//! and let none of them further in.
#![allow(missing_docs, clippy::all)]

include!(concat!(env!("OUT_DIR"), "/wire.rs"));

/// Largest gRPC message sent or accepted, in bytes (row `net.maxmsg`: containerd's default, on both
/// sides).
pub const MAX_MESSAGE: usize = 16 << 20;
