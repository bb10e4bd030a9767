//! Whole images from one store to another: platforms that share layers, attestations, and images
//! that are not what they say.

#![allow(clippy::unwrap_used)]

mod common;

use bytes::Bytes;
use common::{ABOUT, Lab};
use parking_lot::Mutex;
use serde_json::{Value, json};
use shipway_archive::{Compression, CompressionKind, Dialect, recompress};
use shipway_convert::{Converted, First, Options, Packing, Source, Step, Stored, convert};
use shipway_fault::Result;
use shipway_oci::{Descriptor, Digest, Index, Manifest, media};
use shipway_storage::Labels;
use std::{fs, sync::Arc};

const TOC: &str = "containerd.io/snapshot/stargz/toc.digest";

impl Lab {
    /// A layer with one file, and its diffID.
    async fn layer(&self, text: &str, kind: CompressionKind) -> (Descriptor, Digest) {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("file"), text.repeat(5000)).unwrap();
        self.packed(dir.path(), kind).await
    }

    /// Converts the image `old` in this store to one in `to`.
    async fn convert(&self, old: &Descriptor, to: &Self, options: &Options) -> Result<Converted> {
        let (source, target) = self.ends(old, to).await;
        convert(source, target, options, Arc::new(|_| {})).await
    }
}

fn options(kind: CompressionKind) -> Options {
    let compression = Compression { kind, ..Compression::default() };
    Options { packing: Packing { compression, ..Packing::default() }, platforms: Vec::new() }
}

const GZIP: CompressionKind = CompressionKind::Gzip;
const ESTARGZ: CompressionKind = CompressionKind::Estargz;

/// The tar of a blob.
async fn tar(lab: &Lab, layer: &Descriptor) -> Vec<u8> {
    let blob = lab.storage().content.read_all(layer.digest, 1 << 20).await.unwrap();
    let kind = CompressionKind::of(layer).unwrap();
    let mut pieces = Some(blob).into_iter();
    let plain = Compression { kind: CompressionKind::Uncompressed, ..Compression::default() };
    let mut out = Vec::new();
    recompress(&mut || Ok(pieces.next()), kind, plain, None, &mut |bytes: Bytes| {
        out.extend_from_slice(&bytes);
        Ok(())
    })
    .unwrap();
    out
}

#[tokio::test]
async fn an_index_keeps_its_platforms_and_what_is_said_of_them() {
    let lab = Lab::new().await;
    let shared = lab.layer("shared", GZIP).await;
    let amd = lab.image("linux/amd64", &[shared.clone(), lab.layer("amd", GZIP).await]).await;
    let arm =
        lab.image("linux/arm64", &[shared, lab.layer("arm", CompressionKind::Zstd).await]).await;
    let about = lab.attestation(&amd).await;
    let old = lab.index(vec![amd.clone(), arm, about.clone()]).await;
    let to = Lab::new().await;
    let done = lab.convert(&old, &to, &options(ESTARGZ)).await.unwrap();
    assert_eq!(done.layers, 3, "the shared one once");
    // Everything is kept by the name alone.
    to.fake.gc();
    assert_eq!(to.fake.count().leases, 1, "the test's own");
    assert_eq!(to.storage().images.get("new").await.unwrap().target.digest, done.root.digest);
    let index: Index = to.read(&done.root).await;
    assert_eq!(index.media_type.as_deref(), Some(media::OCI_INDEX));
    let platforms: Vec<_> =
        index.manifests.iter().map(|m| m.platform.as_ref().unwrap().to_string()).collect();
    assert_eq!(platforms, ["linux/amd64", "linux/arm64", "unknown/unknown"]);
    for image in &index.manifests[..2] {
        let manifest: Manifest = to.read(image).await;
        assert_eq!(manifest.annotations["k"], "v");
        assert_eq!(manifest.media_type.as_deref(), Some(media::OCI_MANIFEST));
        let config: Value = to.read(&manifest.config).await;
        assert_eq!(config["unknown"], json!({"kept": [1, 2]}));
        for (layer, diff_id) in
            manifest.layers.iter().zip(config["rootfs"]["diff_ids"].as_array().unwrap())
        {
            assert_eq!(CompressionKind::of(layer), Some(ESTARGZ));
            assert_eq!(Digest::of(tar(&to, layer).await).to_string(), diff_id.as_str().unwrap());
        }
    }
    // The statements are the same bytes, about the image that it is now.
    let statement = &index.manifests[2];
    assert_eq!(statement.digest, about.digest);
    assert_eq!(statement.annotations[ABOUT], index.manifests[0].digest.to_string());
    let manifest: Manifest = to.read(statement).await;
    assert!(to.storage().content.has(&manifest.layers[0]).await.unwrap());
    // Once more is nothing more, and back is the same files.
    let copy = Lab::new().await;
    let same = to.convert(&done.root, &copy, &options(ESTARGZ)).await.unwrap();
    assert_eq!((&same.root, same.layers), (&done.root, 0));
    let gzip = Lab::new().await;
    let back = to.convert(&done.root, &gzip, &options(GZIP)).await.unwrap();
    assert_eq!(back.layers, 3);
    let index: Index = gzip.read(&back.root).await;
    let manifest: Manifest = gzip.read(&index.manifests[0]).await;
    assert!(manifest.layers.iter().all(|l| CompressionKind::of(l) == Some(GZIP)));
}

#[tokio::test]
async fn platforms_are_chosen_with_what_is_said_of_them() {
    let lab = Lab::new().await;
    let amd = lab.image("linux/amd64", &[lab.layer("amd", GZIP).await]).await;
    let arm = lab.image("linux/arm64", &[lab.layer("arm", GZIP).await]).await;
    let (first, second) = (lab.attestation(&amd).await, lab.attestation(&arm).await);
    let old = lab.index(vec![amd, arm, first, second]).await;
    let chunked = options(CompressionKind::ZstdChunked(Dialect::Podman));
    let of =
        |platform: &str| Options { platforms: vec![platform.parse().unwrap()], ..chunked.clone() };
    let to = Lab::new().await;
    let done = lab.convert(&old, &to, &of("linux/arm64")).await.unwrap();
    let index: Index = to.read(&done.root).await;
    let platforms: Vec<_> =
        index.manifests.iter().map(|m| m.platform.as_ref().unwrap().to_string()).collect();
    assert_eq!(platforms, ["linux/arm64", "unknown/unknown"]);
    assert_eq!(index.manifests[1].annotations[ABOUT], index.manifests[0].digest.to_string());
    let refused = lab.convert(&old, &to, &of("linux/s390x")).await.unwrap_err();
    assert!(refused.hints().any(|h| h.contains("linux/amd64, linux/arm64")), "{refused:?}");
}

#[tokio::test]
async fn within_one_store_only_what_changes_is_written() {
    let lab = Lab::new().await;
    let plain = lab.layer("plain", GZIP).await;
    let mut lazy = lab.layer("lazy", ESTARGZ).await;
    lazy.1 = Digest::of(tar(&lab, &lazy.0).await);
    lazy.0.annotations.insert(TOC.to_owned(), Digest::of("toc").to_string());
    let old = lab.image("linux/amd64", &[plain, lazy.clone()]).await;
    let before = lab.fake.count().blobs;
    let steps = Arc::new(Mutex::new(Vec::<Step>::new()));
    let heard = steps.clone();
    lab.storage().images.put("old", &old, &Labels::new()).await.unwrap();
    let (source, target) = (
        Arc::new(Stored::new(lab.storage(), "old".into())),
        Arc::new(Stored::new(lab.storage(), "new".into())),
    );
    let hears = Arc::new(move |step| heard.lock().push(step));
    let done = convert(source, target, &options(ESTARGZ), hears).await.unwrap();
    assert_eq!((done.layers, lab.fake.count().blobs), (1, before + 3), "layer, config, manifest");
    let manifest: Manifest = lab.read(&done.root).await;
    assert_eq!(manifest.layers[1], lazy.0, "it has its table already");
    assert_eq!(done.size.1, manifest.layers[0].size);
    let last = *steps.lock().last().unwrap();
    assert_eq!((last.done, last.converts), (last.size, true));
    // Unless it is to have another.
    let mut forced = options(ESTARGZ);
    forced.packing.compression.force = true;
    assert_eq!(lab.convert(&old, &lab, &forced).await.unwrap().layers, 2);
    // Or to be read in another order, which is told by a landmark.
    let mut first = options(ESTARGZ);
    first.packing.first = Some(First::Paths(Arc::from([b"/file".to_vec()])));
    let done = lab.convert(&old, &lab, &first).await.unwrap();
    assert_eq!(done.layers, 2);
    let manifest: Manifest = lab.read(&done.root).await;
    let tar = tar(&lab, &manifest.layers[0]).await;
    assert!(tar.windows(18).any(|name| name == b".prefetch.landmark"));
}

#[tokio::test]
async fn images_that_are_not_what_they_say_are_refused() {
    let lab = Lab::new().await;
    let good = lab.layer("good", GZIP).await;
    let refused = async |old: &Descriptor| {
        let to = Lab::new().await;
        let fault = lab.convert(old, &to, &options(ESTARGZ)).await.unwrap_err();
        assert!(to.storage().images.get("new").await.is_err(), "no name for what is not whole");
        fault.to_string()
    };
    let other = lab.image("linux/amd64", &[(good.0.clone(), Digest::of("another tar"))]).await;
    assert!(refused(&other).await.contains("the config promises"), "{}", refused(&other).await);
    let noise = lab.put(media::OCI_LAYER_GZIP, b"no gzip at all".to_vec()).await;
    let broken = lab.image("linux/amd64", &[(noise, good.1)]).await;
    assert!(refused(&broken).await.contains("decompress a layer"));
    let absent = (Descriptor::of(media::OCI_LAYER_GZIP, b"absent"), good.1);
    let absent = lab.image("linux/amd64", &[absent]).await;
    assert!(refused(&absent).await.contains("is not stored"));
    // Digests that the config does not have.
    let image = lab.image("linux/amd64", std::slice::from_ref(&good)).await;
    let mut manifest: Manifest = lab.read(&image).await;
    manifest.layers.push(good.0.clone());
    let more = lab.json(media::OCI_MANIFEST, &manifest).await;
    assert!(refused(&more).await.contains("the manifest has 2 layers, and the config 1"));
    manifest.layers = vec![good.0.clone(); 1001];
    let many = lab.json(media::OCI_MANIFEST, &manifest).await;
    assert!(refused(&many).await.contains("more than 1000 layers"));
    let many = lab.index(vec![image.clone(); 1001]).await;
    assert!(refused(&many).await.contains("more than 1000 entries"));
    // Indexes in indexes, up to a limit.
    let mut nested = image;
    for depth in 1..=5 {
        nested = lab.index(vec![nested]).await;
        let done = lab.convert(&nested, &Lab::new().await, &options(ESTARGZ)).await;
        assert_eq!(done.is_ok(), depth <= 4, "{depth}");
    }
    let strange = lab.put("application/octet-stream", b"{}".to_vec()).await;
    assert!(refused(&strange).await.contains("neither an image nor an index"));
    let source = Stored::new(lab.storage(), "absent".into());
    assert!(source.root().await.unwrap_err().to_string().contains("no image absent"));
}
