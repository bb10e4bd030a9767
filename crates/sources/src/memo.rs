//! What sources reported to one build. A tag that moves and a page that changes are, for the rest
//! of the build, what they were when it first asked (row `so.flight`).

use crate::{git::Tip, http::Known, image::ResolvedName};
use parking_lot::Mutex;
use shipway_attest::Stored;
use shipway_llb::ResolveMode;
use shipway_oci::Digest;
use shipway_refs::ImmutableRef;
use std::{collections::HashMap, fmt, sync::Arc};

/// One build's memory. Clones share it; states in it are held until the last clone goes.
#[derive(Clone, Default)]
pub struct SourceMemo(Arc<Inner>);

#[derive(Default)]
struct Inner {
    files: Mutex<HashMap<Digest, (Known, ImmutableRef)>>,
    tips: Mutex<HashMap<Digest, Tip>>,
    images: Mutex<HashMap<(String, ResolveMode), ResolvedName>>,
}

impl SourceMemo {
    pub(crate) fn file(&self, request: &Digest) -> Option<(Known, ImmutableRef)> {
        self.0.files.lock().get(request).cloned()
    }

    pub(crate) fn keep_file(&self, request: Digest, known: Known, state: ImmutableRef) {
        self.0.files.lock().insert(request, (known, state));
    }

    pub(crate) fn tip(&self, request: &Digest) -> Option<Tip> {
        self.0.tips.lock().get(request).cloned()
    }

    pub(crate) fn image(&self, key: &(String, ResolveMode)) -> Option<ResolvedName> {
        self.0.images.lock().get(key).cloned()
    }

    pub(crate) fn keep_image(&self, key: (String, ResolveMode), resolved: ResolvedName) {
        self.0.images.lock().insert(key, resolved);
    }

    /// Why an image of the node's store was taken that had this digest.
    pub(crate) fn stored(&self, digest: Digest) -> Option<Stored> {
        self.0.images.lock().values().find_map(|name| name.stored(digest))
    }

    pub(crate) fn keep_tip(&self, request: Digest, tip: Tip) {
        self.0.tips.lock().insert(request, tip);
    }
}

impl fmt::Debug for SourceMemo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "SourceMemo({} files, {} tips)",
            self.0.files.lock().len(),
            self.0.tips.lock().len()
        )
    }
}
