//! What exporters work with.

use crate::{LazyBlobs, Publishing};
use shipway_executor::Executor;
use shipway_refs::RefStore;
use shipway_registry::Registry;
use std::sync::Arc;

/// What all exporters of the daemon share.
pub(crate) struct ExportServices {
    pub refs: RefStore,
    pub registry: Registry,
    /// Names of images that may be replaced although CRI manages them and they are not ours; `*`
    /// stands for anything.
    pub replaceable: Vec<String>,
    pub publishing: Publishing,
    /// When blobs are fetched that images do without.
    pub lazy_blobs: LazyBlobs,
    /// Runs results, to see what they read.
    pub executor: Arc<dyn Executor>,
}
