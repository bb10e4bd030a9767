//! One build: its scope at the bottom, and what turns definitions into states above it.

mod heavy;
mod intake;
mod policy;
pub(crate) mod reads;
mod resolve;
mod scope;
pub(crate) mod state;
mod vertices;

pub use policy::BuildPolicy;
pub(crate) use resolve::SourceQuery;
pub(crate) use scope::{BuildScope, Shared};
pub use state::EngineRef;
