//! What sources reported to one build. A tag that moves and a page that changes are, for the rest
//! of the build, what they were when it first asked (row `so.flight`).

use parking_lot::Mutex;
use shipway_attest::Stored;
use shipway_llb::ResolveMode;
use shipway_oci::{Descriptor, Digest};
use shipway_refs::{ImmutableRef, RefId};
use std::{collections::HashMap, fmt, sync::Arc, time::SystemTime};

/// What a reference leads to at the remote.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Tip {
    /// Commit, or annotated tag.
    pub sha: String,
    /// Full name of the reference, or the commit itself.
    pub reference: String,
    /// The commit that an annotated tag leads to.
    pub commit: Option<String>,
}

/// A file that was fetched and is kept as a state.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct KnownFile {
    pub digest: Digest,
    pub filename: String,
    pub etag: Option<String>,
    pub modified: Option<SystemTime>,
    pub state: RefId,
}

/// What a name without a digest led to when a build first asked (row `so.flight`).
#[derive(Clone)]
pub(crate) struct ResolvedName {
    pub main: Descriptor,
    pub stored: Option<Stored>,
}

impl ResolvedName {
    pub(crate) fn stored(&self, digest: Digest) -> Option<Stored> {
        self.stored.filter(|_| self.main.digest == digest)
    }
}

/// One build's memory. Clones share it; states in it are held until the last clone goes.
#[derive(Clone, Default)]
pub struct SourceMemo(Arc<Inner>);

#[derive(Default)]
struct Inner {
    files: Mutex<HashMap<Digest, (KnownFile, ImmutableRef)>>,
    tips: Mutex<HashMap<Digest, Tip>>,
    images: Mutex<HashMap<(String, ResolveMode), ResolvedName>>,
}

impl SourceMemo {
    pub(crate) fn file(&self, request: &Digest) -> Option<(KnownFile, ImmutableRef)> {
        self.0.files.lock().get(request).cloned()
    }

    pub(crate) fn keep_file(&self, request: Digest, known: KnownFile, state: ImmutableRef) {
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
