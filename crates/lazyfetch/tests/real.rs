//! With a registry behind HTTP and a store on the disk.

#![allow(clippy::unwrap_used, clippy::single_range_in_vec_init)]

#[path = "../../estargz/tests/common/mod.rs"]
mod blobs;
mod http;

use async_trait::async_trait;
use bytes::Bytes;
use http::{Asked, Fake, Reply};
use parking_lot::Mutex;
use shipway_estargz::{Output, Toc, WriterOptions};
use shipway_fault::Fault;
use shipway_layerstore::{Description, Layer, LayerKey, LayerStore, Options, State};
use shipway_lazyfetch::{
    Credentials, Event, Fetcher, Finish, IndexRequest, LayerSpec, MAX_SOURCES, Profile, Settings,
    external_toc, index, sources,
};
use shipway_oci::{Descriptor, Digest, ImageName, Manifest, media};
use shipway_registry::{CredentialSource, Credentials as Secret, Given, Registry, RegistryConfig};
use std::{
    collections::{BTreeMap, HashMap},
    os::unix::fs::FileExt,
    sync::Arc,
};

/// A layer of a registry, and what is in it.
struct Blob {
    bytes: Vec<u8>,
    annotations: BTreeMap<String, String>,
    files: BTreeMap<String, Vec<u8>>,
}

impl Blob {
    fn new(output: Output) -> Self {
        let mut tar = tar::Builder::new(Vec::new());
        let mut dice = blobs::Dice(0x1234_5678);
        let mut header = tar::Header::new_ustar();
        header.set_mode(0o755);
        header.set_size(0);
        header.set_entry_type(tar::EntryType::Directory);
        tar.append_data(&mut header, "d/", &[][..]).unwrap();
        let mut files = BTreeMap::new();
        for n in 0..60 {
            let data: Vec<u8> =
                (0..1 + dice.below(30_000)).map(|_| dice.below(256) as u8).collect();
            let mut header = tar::Header::new_ustar();
            header.set_mode(0o644);
            header.set_size(data.len() as u64);
            tar.append_data(&mut header, format!("d/{n}"), &data[..]).unwrap();
            files.insert(format!("d/{n}"), data);
        }
        let options = WriterOptions {
            chunk_size: 5000,
            min_chunk_size: 20_000,
            ..WriterOptions::new(output)
        };
        let (bytes, written) = blobs::write(&tar.into_inner().unwrap(), options).unwrap();
        let annotations = written.annotations(shipway_estargz::Dialect::Containerd);
        Self { bytes, annotations, files }
    }

    fn digest(&self) -> Digest {
        Digest::of(&self.bytes)
    }

    fn request(&self, sources: Vec<Arc<dyn shipway_lazyfetch::Source>>) -> IndexRequest {
        IndexRequest {
            digest: self.digest(),
            size: Some(self.bytes.len() as u64),
            annotations: self.annotations.clone(),
            sources,
            external: None,
        }
    }

    fn create(&self, store: &LayerStore, output: Output, toc: &Toc) -> Arc<Layer> {
        let digest = self.annotations[shipway_estargz::TOC_DIGEST].parse().unwrap();
        let about = Description {
            blob_size: self.bytes.len() as u64,
            codec: output.codec(),
            repository: "r.io/c".into(),
        };
        store.create(LayerKey { blob: self.digest(), toc: digest }, &about, toc).unwrap()
    }

    /// Compares what is good with what it should be; gives the number of blocks.
    fn check(&self, layer: &Layer, toc: &Toc) -> u64 {
        let mut data = Vec::new();
        for (id, start) in toc.data_starts() {
            data.resize(start as usize, 0);
            let path = std::str::from_utf8(toc.entry(id).path()).unwrap();
            data.extend_from_slice(&self.files[path]);
        }
        data.resize(data.len().next_multiple_of(4096), 0);
        let (good, file) = (layer.good().unwrap(), layer.data().unwrap());
        for blocks in good.ranges() {
            let want = &data[blocks.start as usize * 4096..blocks.end as usize * 4096];
            let mut found = vec![1; want.len()];
            file.read_exact_at(&mut found, blocks.start * 4096).unwrap();
            assert!(found == want, "{blocks:?}");
        }
        good.ranges().iter().map(|r| r.end - r.start).sum()
    }
}

fn registry() -> Registry {
    Registry::new(RegistryConfig::default())
}

fn status(code: u16) -> Reply {
    Reply { code, headers: Vec::new(), body: Bytes::new() }
}

fn store(directory: &tempfile::TempDir) -> LayerStore {
    let options = Options { fsync: false, boot_id: Some("boot".into()), ..Options::default() };
    LayerStore::open(directory.path(), options).unwrap()
}

/// On a file system that can make holes.
fn directory() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

/// The credentials of one repository.
struct For(&'static str);

struct Login(Option<Secret>);

impl Credentials for For {
    fn of(&self, repository: &ImageName) -> Arc<dyn CredentialSource> {
        let ours = repository.repository() == self.0;
        let login = || Secret { username: "me".into(), secret: "s3cret".into() };
        Arc::new(Login(ours.then(login)))
    }
}

#[async_trait]
impl CredentialSource for Login {
    async fn credentials(&self, _: &str) -> Result<Option<Given<Secret>>, Fault> {
        Ok(self.0.clone().map(Given::alone))
    }
}

/// A registry of blobs and manifests that wants a password.
async fn serve(blobs: HashMap<String, Bytes>) -> (Fake, Arc<Mutex<HashMap<String, Bytes>>>) {
    let kept = Arc::new(Mutex::new(blobs));
    let of_fake = kept.clone();
    let fake = Fake::start(move |asked| {
        if asked.header("authorization") != "Basic bWU6czNjcmV0" {
            let challenge = ("www-authenticate", "Basic realm=\"x\"".to_owned());
            return Reply { headers: vec![challenge], ..status(401) };
        }
        let (path, query) = asked.path.split_once('?').unwrap_or((&asked.path, ""));
        let name = path.rsplit('/').next().unwrap();
        let mut kept = of_fake.lock();
        match asked.method.as_str() {
            "POST" => Reply { headers: vec![("location", format!("{path}1"))], ..status(202) },
            "PUT" => {
                let name = query.strip_prefix("digest=").unwrap_or(name);
                kept.insert(name.to_owned(), asked.body.clone());
                kept.insert(Digest::of(&asked.body).to_string(), asked.body.clone());
                status(201)
            }
            _ => match kept.get(name) {
                Some(bytes) if !path.contains("/referrers/") => part(bytes, asked),
                _ => status(404),
            },
        }
    })
    .await;
    (fake, kept)
}

fn part(blob: &Bytes, asked: &Asked) -> Reply {
    let kind = ("content-type", media::OCI_MANIFEST.to_owned());
    let Some(range) = asked.header("range").strip_prefix("bytes=") else {
        return Reply { code: 200, headers: vec![kind], body: blob.clone() };
    };
    let total = blob.len();
    let (first, last) = range.split_once('-').unwrap();
    let range = match first {
        "" => total.saturating_sub(last.parse().unwrap())..total,
        _ => first.parse().unwrap()..last.parse::<usize>().unwrap() + 1,
    };
    let said = format!("bytes {}-{}/{total}", range.start, range.end - 1);
    Reply { code: 206, headers: vec![("content-range", said)], body: blob.slice(range) }
}

async fn until(
    events: &mut tokio::sync::mpsc::UnboundedReceiver<Event>,
    mut is_over: impl FnMut(&Event) -> bool,
) {
    loop {
        let event = events.recv().await.unwrap();
        if let Event::Failed { fault, .. } = &event {
            panic!("{fault}");
        }
        if is_over(&event) {
            return;
        }
    }
}

/// From a manifest's words to a layer that is whole on the disk: index, misses, background.
#[tokio::test]
async fn a_layer_comes_from_a_registry_onto_the_disk() {
    for output in [Output::Estargz, Output::ZstdChunked] {
        let blob = Blob::new(output);
        let name = blob.digest().to_string();
        let (fake, _) = serve([(name, Bytes::from(blob.bytes.clone()))].into()).await;
        let images = [format!("{}/a/b:1", fake.host), format!("{}/c:1", fake.host)]
            .map(|name| name.parse::<ImageName>().unwrap());
        // The first repository is not ours to read: the second one serves.
        let found = sources(&registry(), &images, &For("c")).await.unwrap();
        assert_eq!(found.len(), 2);
        let indexed = index(&blob.request(found.clone()), &Settings::default()).await.unwrap();
        let directory = directory();
        let layers = store(&directory);
        let layer = blob.create(&layers, output, &indexed.toc);
        let quiet = std::time::Duration::ZERO;
        let (fetcher, mut events) = Fetcher::new(Settings { quiet, ..Settings::default() });
        let number = layer.number().0;
        fetcher.add(LayerSpec { target: layer.clone(), sources: found, spans: None });
        fetcher.warm(number, 2);
        let all = layer.data_blocks();
        for start in (0..all).step_by(7) {
            let blocks = start..all.min(start + 2);
            fetcher.miss(number, blocks.clone());
            until(&mut events, |_| layer.good().unwrap().has(&blocks)).await;
        }
        assert!(blob.check(&layer, &indexed.toc) >= all / 4);
        let counters = fetcher.stats(number).unwrap().read();
        assert!(counters.misses > 0 && counters.failed == 0 && counters.network > 0);
        let (target, toc) = (layer.clone(), Arc::new(indexed.toc));
        let of_engine = toc.clone();
        fetcher.background(number, move |report| {
            Box::new(Finish::new(target, Some(of_engine), report).unwrap())
        });
        let is_over = |event: &Event| match event {
            Event::Whole { result, .. } => result.as_ref().map(|()| true).unwrap(),
            _ => false,
        };
        until(&mut events, is_over).await;
        assert_eq!(layer.state(), State::Whole);
        assert_eq!(blob.check(&layer, &toc), all);
        fetcher.remove(number);
        assert!(fetcher.stats(number).is_none());
    }
}

/// A blob that is not the one that the manifest names does not make a layer whole, though its
/// chunks are right.
#[tokio::test]
async fn a_wrong_blob_does_not_make_a_layer_whole() {
    let blob = Blob::new(Output::Estargz);
    let mut wrong = blob.bytes.clone();
    // The time in the header of a gzip member is no part of what it holds.
    wrong[4] ^= 1;
    let (fake, _) = serve([(blob.digest().to_string(), Bytes::from(wrong))].into()).await;
    let image = [format!("{}/c:1", fake.host).parse().unwrap()];
    let found = sources(&registry(), &image, &For("c")).await.unwrap();
    let indexed = index(&blob.request(found.clone()), &Settings::default()).await.unwrap();
    let directory = directory();
    let layers = store(&directory);
    let layer = blob.create(&layers, Output::Estargz, &indexed.toc);
    let (fetcher, mut events) = Fetcher::new(Settings::default());
    fetcher.add(LayerSpec { target: layer.clone(), sources: found, spans: None });
    let (target, toc) = (layer.clone(), Arc::new(indexed.toc));
    let of_engine = toc.clone();
    fetcher.background(layer.number().0, move |report| {
        Box::new(Finish::new(target, Some(of_engine), report).unwrap())
    });
    let is_over = |event: &Event| match event {
        Event::Whole { result, .. } => {
            assert!(result.as_ref().unwrap_err().to_string().contains("digest"));
            true
        }
        _ => false,
    };
    until(&mut events, is_over).await;
    assert_eq!(layer.state(), State::Lazy);
    blob.check(&layer, &toc);
}

#[tokio::test]
async fn profiles_are_shared_as_artifacts() {
    let image = br#"{"schemaVersion":2,"config":{},"layers":[]}"#;
    let subject = Descriptor::of(media::OCI_MANIFEST, image);
    let (fake, kept) = serve(HashMap::new()).await;
    let name: ImageName = format!("{}/c:1", fake.host).parse().unwrap();
    let registry = registry();
    let find = || Profile::find(&registry, &name, subject.digest, &For("c"));
    assert_eq!(find().await.unwrap(), None);
    let profile = |start| {
        let mut profile = Profile::new();
        profile.touch(Digest::of("layer"), start..start + 10);
        profile
    };
    for (start, created) in [(3, "2026-01-03T00:00:00Z"), (1, "2026-01-01T00:00:00Z")] {
        profile(start).push(&registry, &name, &subject, created, &For("c")).await.unwrap();
    }
    assert_eq!(find().await.unwrap(), Some(profile(3)));
    // Nonsense of somebody else is passed over.
    let mut nonsense = Manifest {
        schema_version: 2,
        media_type: Some(media::OCI_MANIFEST.into()),
        artifact_type: Some(shipway_lazyfetch::ARTIFACT.into()),
        config: Descriptor::of("application/vnd.oci.empty.v1+json", b"{}"),
        layers: vec![Descriptor::of(shipway_lazyfetch::ARTIFACT, b"nonsense")],
        subject: Some(subject.clone()),
        annotations: BTreeMap::from([("org.opencontainers.image.created".into(), "2027".into())]),
    };
    kept.lock().insert(Digest::of("nonsense").to_string(), "nonsense".into());
    let pushing = registry.repository(&name, For("c").of(&name), shipway_registry::Mode::Push);
    pushing.push_referrer(&nonsense).await.unwrap();
    assert_eq!(find().await.unwrap(), Some(profile(3)));
    nonsense.layers[0].size = 1 << 40;
    pushing.push_referrer(&nonsense).await.unwrap();
    assert_eq!(find().await.unwrap(), Some(profile(3)));
    assert!(Profile::find(&registry, &name, subject.digest, &For("x")).await.is_err());
}

#[tokio::test]
async fn a_table_of_contents_is_found_in_the_image_beside() {
    let (layer, toc) = (Digest::of("layer"), b"the table".to_vec());
    let mut described = Descriptor::of("application/octet-stream", &toc);
    described
        .annotations
        .insert("containerd.io/snapshot/stargz/layer.digest".into(), layer.to_string());
    let manifest = Manifest {
        schema_version: 2,
        media_type: Some(media::OCI_MANIFEST.into()),
        artifact_type: None,
        config: Descriptor::of(media::OCI_CONFIG, b"{}"),
        layers: vec![described.clone()],
        subject: None,
        annotations: BTreeMap::new(),
    };
    let bytes = Bytes::from(serde_json::to_vec(&manifest).unwrap());
    let kept = [
        ("1-esgztoc".to_owned(), bytes.clone()),
        (Digest::of(&bytes).to_string(), bytes),
        (described.digest.to_string(), toc.clone().into()),
    ];
    let (fake, kept) = serve(kept.into()).await;
    let registry = registry();
    let name: ImageName = format!("{}/c:1", fake.host).parse().unwrap();
    assert_eq!(external_toc(&registry, &name, layer, &For("c")).await.unwrap(), toc);
    let other = external_toc(&registry, &name, Digest::of("other"), &For("c")).await;
    assert!(other.unwrap_err().is_not_found());
    let image: ImageName = format!("{}/c:2", fake.host).parse().unwrap();
    let other = external_toc(&registry, &image, layer, &For("c")).await;
    assert!(other.unwrap_err().is_not_found());
    kept.lock().insert(described.digest.to_string(), "another table"[..9].into());
    external_toc(&registry, &name, layer, &For("c")).await.unwrap_err();
}

#[tokio::test]
async fn a_layer_has_no_more_than_some_sources_and_each_once() {
    let names = |count: usize| -> Vec<ImageName> {
        (0..count).map(|n| format!("r.io/{n}:1").parse().unwrap()).collect()
    };
    let found = |names: Vec<ImageName>| async move {
        sources(&registry(), &names, &For("c")).await.unwrap().len()
    };
    assert_eq!(found([names(3), names(3)].concat()).await, 3);
    assert_eq!(found(names(MAX_SOURCES + 5)).await, MAX_SOURCES);
}
