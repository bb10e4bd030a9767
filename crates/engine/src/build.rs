//! One build: its scope at the bottom, and what turns definitions into states above it.
//!
//! [`BuildScope`] is data that everything done for the build shares. [`EngineRef`]s, the lazy
//! states, know the scope and not each other; [`Build`] has both, and makes the states of what
//! frontends send.

mod call_log;
mod heavy;
mod intake;
mod lazy;
mod policy;
pub(crate) mod reads;
mod resolve;
mod scope;
mod state;
mod usage;
mod vertices;

pub(crate) use call_log::{CallLog, FrontendCall};
pub(crate) use intake::Build;
pub(crate) use lazy::LazyState;
pub(crate) use resolve::SourceQuery;
pub(crate) use scope::{BuildScope, Explainer, Shared};
pub use state::EngineRef;
pub(crate) use state::MAX_TRIES;
