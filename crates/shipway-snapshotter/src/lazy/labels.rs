//! What the labels of a Prepare say of the layer that is about to be pulled.

use shipway_estargz::TOC_DIGEST;
use shipway_fault::{Class, Code, Fault, Result};
use shipway_oci::{ChainId, DiffId, Digest, ImageName};
use shipway_snapstore::{Below, Labels, SNAPSHOT_REF};
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

/// Whether a layer may be what a snapshot is named by `labels`, over what is `below`: its chain ID
/// follows from the digest of the layer's tar. Where that digest is not known, the layer is what
/// the image's manifest says by its table of contents.
pub fn vouch(diff_id: Option<DiffId>, labels: &Labels, below: Below) -> Result<()> {
    let Some(diff_id) = diff_id else { return Ok(()) };
    let wanted = labels.get(SNAPSHOT_REF).map(String::as_str).unwrap_or_default();
    let parent = match below {
        Below::Nothing => None,
        Below::Chain(parent) => Some(parent),
        Below::Unknown => {
            let message = format!("it is not known what {wanted} stands on");
            return Err(
                Fault::new(Code::FailedPrecondition, message).with_class(Class::Environment)
            );
        }
    };
    let chain = ChainId::extend(parent, diff_id);
    if chain.to_string() == wanted {
        return Ok(());
    }
    let message = format!(
        "its tar has the digest {diff_id}, which makes it {chain}, and the image's config says \
         {wanted}"
    );
    Err(Fault::new(Code::DataLoss, message).with_class(Class::Environment))
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

    #[test]
    fn a_chain_id_says_which_layer_it_is() {
        let [one, two] = ["one", "two"].map(|tar| DiffId(Digest::of(tar)));
        let base = ChainId::extend(None, one);
        let of = |chain: ChainId| labels(&[(SNAPSHOT_REF, &chain.to_string())]);
        vouch(Some(one), &of(base), Below::Nothing).unwrap();
        vouch(Some(two), &of(ChainId::extend(Some(base), two)), Below::Chain(base)).unwrap();
        // What nobody has read as a whole.
        vouch(None, &of(base), Below::Unknown).unwrap();
        for (diff_id, chain, below, code) in [
            (two, base, Below::Nothing, Code::DataLoss),
            (one, base, Below::Chain(base), Code::DataLoss),
            (two, ChainId::extend(None, two), Below::Chain(base), Code::DataLoss),
            (one, base, Below::Unknown, Code::FailedPrecondition),
        ] {
            let fault = vouch(Some(diff_id), &of(chain), below).unwrap_err();
            assert_eq!(fault.code(), code, "{fault}");
        }
        vouch(Some(one), &labels(&[]), Below::Nothing).unwrap_err();
    }
}
