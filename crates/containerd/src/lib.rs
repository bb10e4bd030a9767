//! The only user of containerd-client: implements storage and executor.
//!
//! [`Containerd`] is one containerd daemon; [`Containerd::storage`] gives the four stores of one
//! namespace. All calls go through `conn`, which knows headers, deadlines and errors. Works with
//! containerd 1.6 to 2.x.
//!
//! `containerd-client` (floor 3 and nowhere else) has generated stubs only; readers, writers, label
//! rules and reconnecting are ours. Its build script runs `protoc`.

mod conn;
mod content;
mod daemon;
mod fault;
mod images;
mod leases;
mod network;
mod snapshots;
mod tasks;
mod wire;

pub use daemon::{Containerd, ContainerdNamespaces, Version};
pub use network::{Bridge, NamedNetwork, NetworkConfig, NetworkDefault};
pub use tasks::{RuntimeOptions, TaskConfig, TaskExecutor};
