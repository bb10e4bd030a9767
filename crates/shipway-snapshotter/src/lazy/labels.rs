//! What the labels of a Prepare say of the layer that is about to be pulled.

use shipway_estargz::TOC_DIGEST;
use shipway_oci::{Digest, ImageName};
use shipway_snapstore::Labels;
use std::collections::BTreeMap;

/// Labels that CRI, nerdctl and containerd's transfer service set (containerd,
/// `pkg/snapshotters/annotations.go`; "cri" in their names is history).
const IMAGE: &str = "containerd.io/snapshot/cri.image-ref";
const LAYER: &str = "containerd.io/snapshot/cri.layer-digest";
const MANIFEST: &str = "containerd.io/snapshot/cri.manifest-digest";
/// Labels that ctr-remote and BuildKit set (stargz-snapshotter, `fs/source`).
const STARGZ_IMAGE: &str = "containerd.io/snapshot/remote/stargz.reference";
const STARGZ_LAYER: &str = "containerd.io/snapshot/remote/stargz.digest";
/// What containerd passes on of a layer's annotations begins with this.
const PASSED_ON: &str = "containerd.io/snapshot/";

/// A layer that somebody is about to pull.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// Digest of its blob.
    pub layer: Digest,
    /// The image, as it was asked for.
    pub image: ImageName,
    /// Digest of the image's manifest.
    pub manifest: Option<Digest>,
    /// The annotations of the layer's descriptor that were passed on.
    pub annotations: BTreeMap<String, String>,
}

impl Wanted {
    /// Reads labels; `None` if they do not say where the layer is.
    pub fn of(labels: &Labels) -> Option<Self> {
        let get = |keys: [&str; 2]| keys.iter().find_map(|key| labels.get(*key));
        let layer = get([LAYER, STARGZ_LAYER])?.parse().ok()?;
        // A bare digest, which CRI passes for images that it knows by nothing else, has no place.
        let image = get([IMAGE, STARGZ_IMAGE]).filter(|i| !i.starts_with("sha256:"))?;
        let image = image.parse().ok()?;
        let manifest = labels.get(MANIFEST).and_then(|digest| digest.parse().ok());
        let annotations = labels
            .iter()
            .filter(|(key, _)| key.starts_with(PASSED_ON))
            .map(|(k, v)| (k.clone(), v.clone()))
            .collect();
        Some(Self { layer, image, manifest, annotations })
    }

    /// Digest of the blob and name of the image that a snapshot with these labels was made for, as
    /// they were told.
    pub fn pulled_for(labels: &Labels) -> Option<(&str, &str)> {
        let get = |keys: [&str; 2]| keys.iter().find_map(|key| labels.get(*key));
        Some((get([LAYER, STARGZ_LAYER])?, get([IMAGE, STARGZ_IMAGE])?))
    }

    /// Whether the annotations that were passed on name the digest of a table of contents. Those of
    /// zstd:chunked are not passed on.
    pub fn has_toc(&self) -> bool {
        self.annotations.contains_key(TOC_DIGEST)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(pairs: &[(&str, &str)]) -> Labels {
        pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
    }

    #[test]
    fn a_layer_has_a_digest_and_a_place() {
        let digest = Digest::of("layer").to_string();
        let cri = labels(&[
            (IMAGE, "r.example/a/b:1"),
            (LAYER, &digest),
            (MANIFEST, &Digest::of("manifest").to_string()),
            (TOC_DIGEST, &Digest::of("toc").to_string()),
            ("other", "x"),
        ]);
        let wanted = Wanted::of(&cri).unwrap();
        assert_eq!(wanted.image.locator(), "r.example/a/b");
        assert_eq!(wanted.manifest, Some(Digest::of("manifest")));
        assert!(wanted.has_toc() && !wanted.annotations.contains_key("other"));
        let stargz = labels(&[(STARGZ_IMAGE, "r.example/a:1"), (STARGZ_LAYER, &digest)]);
        assert!(!Wanted::of(&stargz).unwrap().has_toc());
        assert_eq!(Wanted::pulled_for(&stargz), Some((&*digest, "r.example/a:1")));
        assert_eq!(Wanted::pulled_for(&labels(&[(LAYER, &digest)])), None);
        for wrong in [
            labels(&[(LAYER, &digest)]),
            labels(&[(IMAGE, "r.example/a:1")]),
            labels(&[(IMAGE, &digest), (LAYER, &digest)]),
            labels(&[(IMAGE, "r.example/a:1"), (LAYER, "sha256:x")]),
            labels(&[(IMAGE, "???"), (LAYER, &digest)]),
        ] {
            assert_eq!(Wanted::of(&wrong), None, "{wrong:?}");
        }
    }
}
