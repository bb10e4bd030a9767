//! What sources told one build. A tag that moves and a page that changes are, for the rest of the
//! build, what they were when it first asked (row `so.flight`).

use crate::{git::Tip, http::Known, image::Told};
use shipway_attest::Stored;
use shipway_llb::ResolveMode;
use shipway_oci::Digest;
use shipway_refs::ImmutableRef;
use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// One build's memory. Clones share it; states in it are held until the last clone goes.
#[derive(Clone, Default)]
pub struct SourceMemo(Arc<Inner>);

#[derive(Default)]
struct Inner {
    files: Mutex<HashMap<Digest, (Known, ImmutableRef)>>,
    tips: Mutex<HashMap<Digest, Tip>>,
    images: Mutex<HashMap<(String, ResolveMode), Told>>,
}

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

impl SourceMemo {
    pub(crate) fn file(&self, request: &Digest) -> Option<(Known, ImmutableRef)> {
        lock(&self.0.files).get(request).cloned()
    }

    pub(crate) fn keep_file(&self, request: Digest, known: Known, state: ImmutableRef) {
        lock(&self.0.files).insert(request, (known, state));
    }

    pub(crate) fn tip(&self, request: &Digest) -> Option<Tip> {
        lock(&self.0.tips).get(request).cloned()
    }

    pub(crate) fn image(&self, key: &(String, ResolveMode)) -> Option<Told> {
        lock(&self.0.images).get(key).cloned()
    }

    pub(crate) fn keep_image(&self, key: (String, ResolveMode), told: Told) {
        lock(&self.0.images).insert(key, told);
    }

    /// Why an image of the node's store was taken that had this digest.
    pub(crate) fn stored(&self, digest: Digest) -> Option<Stored> {
        lock(&self.0.images).values().find_map(|told| told.stored(digest))
    }

    pub(crate) fn keep_tip(&self, request: Digest, tip: Tip) {
        lock(&self.0.tips).insert(request, tip);
    }
}

impl fmt::Debug for SourceMemo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "SourceMemo({} files, {} tips)",
            lock(&self.0.files).len(),
            lock(&self.0.tips).len()
        )
    }
}
