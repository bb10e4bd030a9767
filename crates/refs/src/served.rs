//! Which layers the snapshotter serves without their blobs.

use shipway_oci::Descriptor;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

/// What annotations of layers that are made for remote snapshotters begin with: those that
/// containerd passes on to them, and those of zstd:chunked.
const ANNOTATIONS: [&str; 4] = [
    "containerd.io/snapshot/",
    "io.containers.estargz.",
    "io.github.containers.zstd-chunked.",
    "io.containers.zstd-chunked.",
];

/// Whether an annotation of a layer is for remote snapshotters: manifests that name the layer again
/// repeat it.
pub fn is_for_snapshotters(annotation: &str) -> bool {
    ANNOTATIONS.iter().any(|prefix| annotation.starts_with(prefix))
}

/// Whether the blob of a layer is annotated for remote snapshotters.
pub(crate) fn is_annotated(blob: &Descriptor) -> bool {
    blob.annotations.keys().any(|key| is_for_snapshotters(key))
}

/// Which layers the snapshotter has served, as far as it was seen.
#[derive(Default)]
pub(crate) struct Served {
    /// Some that are annotated for it.
    annotated: AtomicBool,
    /// Some that are not.
    plain: AtomicBool,
}

impl Served {
    /// Takes over whether an earlier run had layers served.
    pub fn load(&self, any: bool) {
        self.annotated.fetch_or(any, Relaxed);
    }

    /// Whether layers like the one with this blob were served.
    pub fn expects(&self, blob: &Descriptor) -> bool {
        self.of(blob).load(Relaxed)
    }

    /// The layer with this blob was served.
    pub fn seen(&self, blob: &Descriptor) {
        self.of(blob).store(true, Relaxed);
    }

    fn of(&self, blob: &Descriptor) -> &AtomicBool {
        if is_annotated(blob) { &self.annotated } else { &self.plain }
    }
}
