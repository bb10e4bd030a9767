//! Images with SOCI indexes: whose layers are those of before, and whose indexes are of them.

#![allow(clippy::unwrap_used)]

mod common;

use common::{ABOUT, Lab};
use shipway_archive::{Compression, CompressionKind};
use shipway_convert::{Options, Packing, SociOptions, Stored, WithSoci, convert, with_soci};
use shipway_fault::Result;
use shipway_oci::{Descriptor, Digest, Index, Manifest, media, soci};
use shipway_plainlayer::{ZTOC_SPAN, Ztoc};
use std::{fs, sync::Arc};

impl Lab {
    /// A layer with some files, and its diffID.
    async fn layer(&self, text: &str, kind: CompressionKind) -> (Descriptor, Digest) {
        let dir = tempfile::tempdir().unwrap();
        for n in 0..5 {
            fs::write(dir.path().join(n.to_string()), text.repeat(2000 * n)).unwrap();
        }
        self.packed(dir.path(), kind).await
    }

    /// Puts indexes beside the image `old` of this store, in `to`.
    async fn soci(&self, old: &Descriptor, to: &Self, options: &SociOptions) -> Result<WithSoci> {
        let (source, target) = self.ends(old, to).await;
        with_soci(source, target, options, Arc::new(|_| {})).await
    }
}

/// Every layer, with spans of this length.
fn every(span: u64) -> SociOptions {
    SociOptions { span, min_layer: 0, platforms: Vec::new() }
}

const GZIP: CompressionKind = CompressionKind::Gzip;

#[tokio::test]
async fn an_index_has_images_and_the_indexes_of_their_layers() {
    let (lab, to) = (Lab::new().await, Lab::new().await);
    let shared = lab.layer("shared", GZIP).await;
    let zstd = lab.layer("zstd", CompressionKind::Zstd).await;
    let own = lab.layer("own", GZIP).await;
    let amd64 = lab.image("linux/amd64", &[shared.clone(), zstd.clone(), own.clone()]).await;
    let arm64 = lab.image("linux/arm64", std::slice::from_ref(&shared)).await;
    let said = lab.attestation(&amd64).await;
    let old = lab.index(vec![amd64.clone(), arm64.clone(), said.clone()]).await;
    let done = lab.soci(&old, &to, &every(4000)).await.unwrap();
    assert_eq!((done.layers, done.skipped.len()), (2, 1), "{done:?}");
    assert!(done.skipped[&zstd.0.digest].contains("zstd"));
    assert_eq!(to.storage().images.get("new").await.unwrap().target, done.root);
    let index: Index = to.read(&done.root).await;
    assert_eq!((&*done.root.media_type, index.manifests.len()), (media::OCI_INDEX, 5));
    // What is said of an image is said of it still.
    let [new_amd64, new_arm64, new_said, soci_amd64, soci_arm64] = &index.manifests[..] else {
        panic!("{index:?}")
    };
    assert_eq!(new_said.digest, said.digest);
    assert_eq!(new_said.annotations[ABOUT], new_amd64.digest.to_string());
    for (old, new, soci, layers) in [
        (&amd64, new_amd64, soci_amd64, &[&shared, &own][..]),
        (&arm64, new_arm64, soci_arm64, &[&shared]),
    ] {
        assert_eq!((&new.platform, &soci.platform), (&old.platform, &old.platform));
        assert_eq!(soci.artifact_type.as_deref(), Some(soci::INDEX_V2));
        assert_eq!(soci.annotations[soci::IMAGE_DIGEST], new.digest.to_string());
        let (was, is): (Manifest, Manifest) = (lab.read(old).await, to.read(new).await);
        assert_eq!((&is.layers, is.config.digest), (&was.layers, was.config.digest));
        assert_eq!(is.config.media_type, media::OCI_CONFIG);
        assert_eq!(is.annotations["escaped"], "<v>");
        assert_eq!(soci::index_of(&is), Some(soci.digest));
        assert_eq!(new.annotations, is.annotations);
        // As Go writes it.
        assert!(String::from_utf8(to.bytes(new).await).unwrap().contains("\\u003cv\\u003e"));
        let made: Manifest = to.read(soci).await;
        assert_eq!(made.config.media_type, soci::INDEX_V2);
        assert_eq!(to.bytes(&made.config).await, b"{}");
        assert_eq!(made.layers.len(), layers.len());
        for (ztoc, (layer, _)) in made.layers.iter().zip(layers) {
            assert_eq!(ztoc.media_type, soci::ZTOC);
            assert_eq!(ztoc.annotations[soci::LAYER_DIGEST], layer.digest.to_string());
            assert_eq!(ztoc.annotations[soci::LAYER_TYPE], layer.media_type);
            assert_eq!(ztoc.annotations[soci::SPAN_SIZE], "4000");
            let (bytes, blob) = (to.bytes(ztoc).await, to.bytes(layer).await);
            let read = Ztoc::read(&bytes).unwrap();
            assert_eq!((read.blob_size(), read.entries().len()), (layer.size, 5));
            for (range, digest) in read.span_digests() {
                let range = range.start as usize..range.end as usize;
                assert_eq!(Digest::of(&blob[range]), digest);
            }
        }
    }
    // The same again gives the same bytes, also of what has indexes already.
    let again = lab.soci(&old, &Lab::new().await, &every(4000)).await.unwrap();
    assert_eq!(again, done);
    let twice = to.soci(&done.root, &to, &every(4000)).await.unwrap();
    assert_eq!(twice.root, done.root);
}

#[tokio::test]
async fn a_single_image_becomes_an_index_and_platforms_can_be_chosen() {
    let (lab, to) = (Lab::new().await, Lab::new().await);
    let layer = lab.layer("layer", GZIP).await;
    let image = lab.image("linux/arm64", std::slice::from_ref(&layer)).await;
    let bare = Descriptor { platform: None, ..image.clone() };
    let done = lab.soci(&bare, &to, &every(ZTOC_SPAN)).await.unwrap();
    let index: Index = to.read(&done.root).await;
    assert!(index.manifests.iter().all(|entry| entry.platform == image.platform));
    assert_eq!(index.manifests.len(), 2);
    let other = lab.image("linux/amd64", std::slice::from_ref(&layer)).await;
    let both = lab.index(vec![image.clone(), other]).await;
    let wanted = |platform: &str| SociOptions {
        platforms: vec![platform.parse().unwrap()],
        ..every(ZTOC_SPAN)
    };
    let done = lab.soci(&both, &to, &wanted("linux/arm64")).await.unwrap();
    assert_eq!(to.read::<Index>(&done.root).await.manifests, index.manifests);
    let fault = lab.soci(&both, &to, &wanted("linux/s390x")).await.unwrap_err();
    assert!(fault.is_not_found(), "{fault}");
}

#[tokio::test]
async fn what_is_small_or_damaged_has_no_index() {
    let (lab, to) = (Lab::new().await, Lab::new().await);
    let layer = lab.layer("small", GZIP).await;
    let image = lab.image("linux/amd64", std::slice::from_ref(&layer)).await;
    let fault = lab.soci(&image, &to, &SociOptions::default()).await.unwrap_err();
    assert!(fault.to_string().contains("fewer than 10485760"), "{fault}");
    assert!(fault.hints().any(|hint| hint.contains("--soci-min-layer-size")));
    let lies = lab.image("linux/amd64", &[(layer.0.clone(), Digest::of("another"))]).await;
    let fault = lab.soci(&lies, &to, &every(ZTOC_SPAN)).await.unwrap_err();
    assert!(fault.to_string().contains("the config promises"), "{fault}");
    let mut cut = lab.bytes(&layer.0).await;
    cut.truncate(cut.len() / 2);
    let cut = (lab.put(media::OCI_LAYER_GZIP, cut).await, layer.1);
    let cut = lab.image("linux/amd64", &[cut]).await;
    assert!(lab.soci(&cut, &to, &every(ZTOC_SPAN)).await.is_err());
    assert!(to.storage().images.get("new").await.is_err(), "nothing has the name");
}

/// Other layers have other indexes, or none.
#[tokio::test]
async fn an_image_that_is_compressed_anew_has_no_index_of_what_was() {
    let (lab, to) = (Lab::new().await, Lab::new().await);
    let layer = lab.layer("layer", GZIP).await;
    let image = lab.image("linux/amd64", std::slice::from_ref(&layer)).await;
    let with = lab.soci(&image, &to, &every(ZTOC_SPAN)).await.unwrap().root;
    let converted = async |kind| {
        let compression = Compression { kind, ..Compression::default() };
        let packing = Packing { compression, ..Packing::default() };
        let options = Options { packing, platforms: Vec::new() };
        let source = Arc::new(Stored::new(to.storage(), "new".into()));
        let target = Arc::new(Stored::new(to.storage(), "other".into()));
        convert(source, target, &options, Arc::new(|_| {})).await.unwrap().root
    };
    assert_eq!(converted(GZIP).await, with, "nothing was to be done");
    let index: Index = to.read(&converted(CompressionKind::Zstd).await).await;
    assert_eq!(index.manifests.len(), 1, "{index:?}");
    assert!(!index.manifests[0].annotations.contains_key(soci::INDEX_DIGEST));
    assert_eq!(soci::index_of(&to.read(&index.manifests[0]).await), None);
}
