//! The proxy network (row `exec.proxynet`): a step that is built with it reaches the outside by the
//! daemon's HTTP proxy and by nothing else.
//!
//! [`Proxy`] serves one step. Every request has to pass the operator's [`EgressRules`], by the name
//! and by the address of its server, and is shown to the build's [`Policy`] before it is sent,
//! and noted in a [`Capture`] with the digest of what came back. HTTPS is opened with certificates
//! of an [`Authority`] that lives as long as the daemon and that steps are made to trust; towards
//! servers the machine's own trust store counts. Where connections go out, and how a step is kept
//! from others, is the executor's part.
//!
//! All that a step sends is hostile: heads, addresses, connections and records are bounded.

mod authority;
mod capture;
mod egress;
mod recorded;
mod serve;
mod target;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
mod upstream;

pub use authority::Authority;
pub use capture::{Capture, Incomplete, MAX_RECORDS, Material, ProxiedRequest};
pub use egress::EgressRules;
pub use serve::{MAX_CONNECTIONS, MAX_HEAD, Policy, Proxy};
pub use target::MAX_URL;
