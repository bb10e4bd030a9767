//! Where the documents and layers of an image, or of a cache, are fetched from: the port
//! [`Remote`], a registry's repository, and a content store of a client.

use crate::{
    SessionCredentials,
    keyed_locks::KeyedLocks,
    snapshotter::{RemoteImage, SnapshotterControl},
};
use async_trait::async_trait;
use bytes::Bytes;
use parking_lot::Mutex;
use shipway_fault::{Code, Context, Fault, Result};
use shipway_oci::{Descriptor, Digest, Hasher, ImageName, media};
use shipway_progress::Reporter;
use shipway_refs::{LayerContents, LayerOrigins, LayerSource, LayerSourceId, is_for_snapshotters};
use shipway_registry::{Anonymous, CredentialSource, Mode, Registry, Repository};
use shipway_session::{ClientBlob, ClientStore, SessionGroup, SessionId};
use shipway_storage::{BlobReader, ContentStore, DISTRIBUTION_SOURCE, Ingest, Labels, LeaseId};
use std::{
    collections::HashMap,
    fmt,
    path::PathBuf,
    sync::{Arc, Weak},
    time::{Duration, Instant},
};

/// How often a transfer reports its progress.
const REPORT_EVERY: Duration = Duration::from_millis(100);
/// Docker Hub in names of images, and the host whose credentials clients have for it.
const DOCKER_HUB: &str = "docker.io";
const DOCKER_HUB_HOST: &str = "registry-1.docker.io";
/// How long a registry is waited for where there is something else to go by.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long the snapshotter is not given the same credentials again: every layer of an image asks.
const GIVEN: Duration = Duration::from_secs(60);
/// Largest manifest, index or config that is read.
pub(crate) const MAX_DOCUMENT: u64 = 4 << 20;

/// Where documents and blobs come from: the port between what needs them and what has them.
/// Everything it gives is checked against its digest, by itself or by the store that it is written
/// to.
#[async_trait]
pub trait Remote: Send + Sync {
    /// Its name for messages.
    fn name(&self) -> String;

    /// What the tag or digest `reference` leads to; `NotFound` if there is nothing.
    async fn resolve(&self, reference: &str) -> Result<Descriptor>;

    /// The same for callers that have something else to go by: it is asked once, and not waited for
    /// long.
    async fn resolve_soon(&self, reference: &str) -> Result<Descriptor> {
        self.resolve(reference).await
    }

    /// A manifest or index, verified.
    async fn manifest(&self, descriptor: &Descriptor) -> Result<Bytes>;

    /// A small blob that is not a manifest, verified.
    async fn small_blob(&self, descriptor: &Descriptor) -> Result<Bytes>;

    /// Length of a blob in bytes; `NotFound` if it is not there.
    async fn blob_size(&self, digest: Digest) -> Result<u64>;

    /// A blob from its beginning.
    async fn open(&self, blob: &Descriptor) -> Result<Box<dyn BlobStream>>;

    /// What is known to refer to a manifest.
    async fn referrers(&self, _subject: Digest) -> Result<Vec<Descriptor>> {
        Ok(Vec::new())
    }

    /// Labels for what was fetched.
    fn labels(&self) -> Labels {
        Labels::new()
    }

    /// The same place with the credentials of `sessions`; `None` where credentials play no part.
    fn for_sessions(&self, _sessions: &SessionGroup) -> Option<Arc<dyn Remote>> {
        None
    }

    /// The repository that it is, if it is one of a registry.
    fn repository(&self) -> Option<ImageName> {
        None
    }

    /// Whether it belongs to one client alone.
    fn is_clients(&self) -> bool {
        false
    }

    /// Whether it has gone for good.
    fn is_gone(&self) -> bool {
        false
    }
}

/// A blob as it comes.
#[async_trait]
pub trait BlobStream: Send {
    /// The next piece; `None` at the end.
    async fn next(&mut self) -> Result<Option<Bytes>>;
}

#[async_trait]
impl BlobStream for shipway_registry::BlobReader {
    async fn next(&mut self) -> Result<Option<Bytes>> {
        Self::next(self).await.map_err(Fault::from)
    }
}

/// A repository of a registry.
pub struct RegistryRemote(pub Repository);

#[async_trait]
impl Remote for RegistryRemote {
    fn name(&self) -> String {
        self.0.name().to_string()
    }

    async fn resolve(&self, reference: &str) -> Result<Descriptor> {
        self.0.resolve(reference).await.map_err(Fault::from)
    }

    async fn resolve_soon(&self, reference: &str) -> Result<Descriptor> {
        match tokio::time::timeout(PATIENCE, self.0.resolve_once(reference)).await {
            Ok(answer) => answer.map_err(Fault::from),
            Err(_) => {
                let host = self.0.name().registry();
                Err(Fault::unavailable(format!(
                    "{}: {host} has not answered within {} s",
                    self.0.name(),
                    PATIENCE.as_secs()
                )))
            }
        }
    }

    async fn manifest(&self, descriptor: &Descriptor) -> Result<Bytes> {
        self.0.fetch_manifest(descriptor).await.map_err(Fault::from)
    }

    async fn small_blob(&self, descriptor: &Descriptor) -> Result<Bytes> {
        self.0.fetch_small_blob(descriptor).await.map_err(Fault::from)
    }

    async fn blob_size(&self, digest: Digest) -> Result<u64> {
        self.0.blob_size(digest).await.map_err(Fault::from)
    }

    async fn open(&self, blob: &Descriptor) -> Result<Box<dyn BlobStream>> {
        Ok(Box::new(self.0.fetch_blob(blob, 0).await.map_err(Fault::from)?))
    }

    async fn referrers(&self, subject: Digest) -> Result<Vec<Descriptor>> {
        self.0.referrers(subject).await.map_err(Fault::from)
    }

    /// Says where a blob came from, so that it can be mounted across repositories of the registry.
    fn labels(&self) -> Labels {
        source_label(self.0.name())
    }

    fn repository(&self) -> Option<ImageName> {
        Some(self.0.name().clone())
    }

    fn for_sessions(&self, sessions: &SessionGroup) -> Option<Arc<dyn Remote>> {
        let credentials = Arc::new(SessionCredentials::new(sessions.clone()));
        Some(Arc::new(Self(self.0.with_credentials(credentials))))
    }
}

/// A content store of a client. It has no tags, and knows of no referrers.
pub struct ClientRemote {
    /// The store.
    pub store: ClientStore,
    /// Its name for messages.
    pub name: String,
}

#[async_trait]
impl BlobStream for ClientBlob {
    async fn next(&mut self) -> Result<Option<Bytes>> {
        BlobReader::next(self).await
    }
}

#[async_trait]
impl Remote for ClientRemote {
    fn name(&self) -> String {
        self.name.clone()
    }

    async fn resolve(&self, reference: &str) -> Result<Descriptor> {
        let name = &self.name;
        let bad = |_| Fault::invalid(format!("reference {name:?} must have digest"));
        let digest: Digest = reference.parse().map_err(bad)?;
        let bytes = self.store.read_all(digest, MAX_DOCUMENT).await?;
        let kind = media_type_of(&bytes).ok_or_else(|| {
            Fault::invalid(format!("reference {name:?} contains neither an index nor a manifest"))
        })?;
        Ok(Descriptor::new(kind, digest, bytes.len() as u64))
    }

    async fn manifest(&self, descriptor: &Descriptor) -> Result<Bytes> {
        self.store.read_all(descriptor.digest, MAX_DOCUMENT).await
    }

    async fn small_blob(&self, descriptor: &Descriptor) -> Result<Bytes> {
        self.store.read_all(descriptor.digest, MAX_DOCUMENT).await
    }

    async fn blob_size(&self, digest: Digest) -> Result<u64> {
        self.store.size(digest).await
    }

    async fn open(&self, blob: &Descriptor) -> Result<Box<dyn BlobStream>> {
        Ok(Box::new(self.store.reader(blob.digest).await?))
    }

    fn is_clients(&self) -> bool {
        true
    }

    fn is_gone(&self) -> bool {
        self.store.is_gone()
    }
}

fn source_label(name: &ImageName) -> Labels {
    Labels::from([(
        format!("{DISTRIBUTION_SOURCE}.{}", name.registry()),
        name.repository().to_owned(),
    )])
}

/// The media type of a manifest or index by what it says, or by its shape.
pub(crate) fn media_type_of(bytes: &[u8]) -> Option<String> {
    let json: serde_json::Value = serde_json::from_slice(bytes).ok()?;
    match json.get("mediaType").and_then(|t| t.as_str()) {
        Some(t) if media::is_index(t) || media::is_manifest(t) => Some(t.to_owned()),
        Some(_) => None,
        None if json.get("manifests").is_some_and(|m| m.is_array()) => {
            Some(media::OCI_INDEX.into())
        }
        None if json.get("layers").is_some_and(|l| l.is_array()) => {
            Some(media::OCI_MANIFEST.into())
        }
        None => None,
    }
}

/// The layers of one place, fetched when they are read: often a later build than the one that
/// found the place, whose client may be gone.
struct RemoteLayers {
    id: LayerSourceId,
    remote: Arc<dyn Remote>,
    locks: KeyedLocks,
    /// The clients of builds that want the layers, the latest first. None yet: the client
    /// that found the place answers.
    wanted_by: Mutex<Option<SessionGroup>>,
    /// The image at its registry, where it is one.
    place: Option<RegistryImage>,
    control: Option<SnapshotterControl>,
    /// When the snapshotter was last given credentials.
    given: tokio::sync::Mutex<Option<Instant>>,
}

/// An image at its registry, and the credentials that it is read with.
pub(crate) struct RegistryImage {
    pub image: RemoteImage,
    pub credentials: Arc<dyn CredentialSource>,
}

/// The layers of all places that states have yet to fetch some of. Clones share them.
#[derive(Clone, Default)]
pub struct LayerSources {
    locks: KeyedLocks,
    known: Arc<Mutex<HashMap<LayerSourceId, Weak<RemoteLayers>>>>,
    registry: Option<Registry>,
    control: Option<SnapshotterControl>,
}

impl fmt::Debug for LayerSources {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LayerSources({:?})", self.known.lock().len())
    }
}

impl LayerOrigins for LayerSources {
    /// Images are found again by their names. The credentials are those of the next build
    /// that wants them.
    fn source(&self, origin: &str) -> Option<Arc<dyn LayerSource>> {
        let (registry, name) = (self.registry.as_ref()?, origin.parse::<ImageName>().ok()?);
        let credentials = Arc::new(Anonymous);
        let repository = registry.repository(&name, credentials.clone(), Mode::Pull);
        let image = RemoteImage { name, layers: Vec::new() };
        let place = RegistryImage { image, credentials };
        Some(self.of(Arc::new(RegistryRemote(repository)), Some(place)))
    }

    fn contents(&self) -> Option<Arc<dyn LayerContents>> {
        self.control.clone().map(|control| Arc::new(control) as _)
    }
}

impl LayerSources {
    /// Layers of images at registries, and of other places. A snapshotter that listens at the
    /// socket `control` is given the credentials of builds, and asked what it knows of files.
    pub fn new(registry: Registry, control: Option<PathBuf>) -> Self {
        let control = control.map(SnapshotterControl);
        Self { registry: Some(registry), control, ..Self::default() }
    }

    /// The layers of `remote`; each is fetched once however many want it. A remote snapshotter may
    /// have those of an image in a registry instead, `place`.
    pub(crate) fn of(
        &self,
        remote: Arc<dyn Remote>,
        place: Option<RegistryImage>,
    ) -> Arc<dyn LayerSource> {
        let layers = Arc::new(RemoteLayers {
            id: LayerSourceId::next(),
            remote,
            locks: self.locks.clone(),
            wanted_by: Mutex::default(),
            place,
            control: self.control.clone(),
            given: Default::default(),
        });
        let mut known = self.known.lock();
        known.retain(|_, layers| layers.strong_count() > 0);
        known.insert(layers.id, Arc::downgrade(&layers));
        layers
    }

    /// Lets `sessions` answer for the layers of the source `id`.
    pub(crate) fn wanted_by(&self, id: LayerSourceId, sessions: &SessionGroup) {
        let known = self.known.lock();
        if let Some(layers) = known.get(&id).and_then(Weak::upgrade) {
            layers.join(sessions);
        }
    }
}

impl RemoteLayers {
    /// Lets `sessions` answer for the layers, before those that did up to now and are still there.
    fn join(&self, sessions: &SessionGroup) {
        let mut all = self.wanted_by.lock();
        let before: &[SessionId] = all.as_ref().map_or(&[], |g| g.ids());
        if before.starts_with(sessions.ids()) {
            return;
        }
        let staying = before.iter().filter(|id| sessions.hub().try_get(id).is_some());
        *all = Some(SessionGroup::new(
            sessions.hub().clone(),
            sessions.ids().iter().chain(staying).cloned(),
        ));
    }

    /// Gives the snapshotter the credentials of the clients of now. What comes of it shows when it
    /// asks the registry.
    async fn give_credentials(&self, place: &RegistryImage) {
        let Some(control) = &self.control else { return };
        let mut given = self.given.lock().await;
        if given.is_some_and(|time| time.elapsed() < GIVEN) {
            return;
        }
        let sessions = self.wanted_by.lock().clone();
        let source: Arc<dyn CredentialSource> = match sessions {
            Some(sessions) => Arc::new(SessionCredentials::new(sessions)),
            None => place.credentials.clone(),
        };
        let name = &place.image.name;
        let host = if name.registry() == DOCKER_HUB { DOCKER_HUB_HOST } else { name.registry() };
        let done = async {
            match source.credentials(host).await? {
                Some(found) => control.give(name, &found.what).await,
                None => Ok(true),
            }
        };
        match done.await {
            Ok(true) => *given = Some(Instant::now()),
            Ok(false) => {}
            Err(error) => {
                tracing::warn!(image = %name, %error, "failed to give the snapshotter credentials")
            }
        }
    }

    /// The place as its clients of now see it. A client's own store stays its own.
    fn remote(&self) -> Arc<dyn Remote> {
        let sessions = self.wanted_by.lock().clone();
        sessions
            .and_then(|sessions| self.remote.for_sessions(&sessions))
            .unwrap_or_else(|| self.remote.clone())
    }
}

#[async_trait]
impl LayerSource for RemoteLayers {
    fn id(&self) -> LayerSourceId {
        self.id
    }

    async fn fetch(
        &self,
        layer: &Descriptor,
        content: &dyn ContentStore,
        lease: &LeaseId,
        progress: Option<&Reporter>,
    ) -> Result<()> {
        // Two builds that want the same layer: one fetches, the other finds it there.
        let _one = self.locks.lock(&layer.digest.to_string()).await;
        let ingest = Ingest {
            reference: format!("shipway-layer-{}", layer.digest),
            expected: Some(layer.digest),
            size: Some(layer.size),
        };
        let mut writer = match content.writer(lease, ingest).await {
            Ok(writer) => writer,
            Err(e) if e.is_already_exists() => return Ok(()),
            Err(e) => return Err(e).context(|| format!("store layer {}", layer.digest)),
        };
        if writer.is_complete() {
            // Another namespace has it.
            return writer.commit(Some(layer.digest), &self.remote.labels()).await.map(drop);
        }
        let mut report = LayerReport::new(progress, layer);
        let mut pieces = self.remote().open(layer).await?;
        while let Some(piece) = pieces.next().await? {
            report.moved(piece.len() as u64);
            writer.write(piece).await.context(|| format!("store layer {}", layer.digest))?;
        }
        // The store checks the digest: it hashes what it writes in any case.
        writer.commit(Some(layer.digest), &self.remote.labels()).await.context(|| {
            format!(
                "layer {} of {}: the bytes received are not the ones named, or cannot be stored",
                layer.digest,
                self.remote.name()
            )
        })?;
        report.done();
        Ok(())
    }

    async fn open(&self, layer: &Descriptor) -> Result<Box<dyn BlobReader>> {
        let pieces = self.remote().open(layer).await?;
        Ok(Box::new(Passing {
            pieces,
            layer: layer.clone(),
            passed: 0,
            hasher: Some(Hasher::new()),
        }))
    }

    async fn enable_snapshotter(&self) {
        if let Some(place) = &self.place {
            self.give_credentials(place).await;
        }
    }

    async fn remote_labels(&self, layer: &Descriptor) -> Option<Labels> {
        let image = &self.place.as_ref()?.image;
        // What has no manifest is a cache: nothing says more of its layers than it does itself.
        let known = image.name.digest().is_some()
            || layer.annotations.keys().any(|key| is_for_snapshotters(key));
        known.then(|| image.labels(layer))
    }

    fn origin(&self) -> Option<String> {
        self.place.as_ref().map(|place| place.image.name.to_string())
    }

    fn describe(&self) -> String {
        self.remote.name()
    }

    fn is_clients(&self) -> bool {
        self.remote.is_clients()
    }

    fn is_gone(&self) -> bool {
        self.remote.is_gone()
    }
}

/// The bytes of a layer on their way from one place to another.
struct Passing {
    pieces: Box<dyn BlobStream>,
    layer: Descriptor,
    passed: u64,
    /// `None` once they were checked.
    hasher: Option<Hasher>,
}

#[async_trait]
impl BlobReader for Passing {
    fn size(&self) -> u64 {
        self.layer.size
    }

    async fn next(&mut self) -> Result<Option<Bytes>> {
        let piece = self.pieces.next().await?;
        if let Some(piece) = &piece {
            self.passed += piece.len() as u64;
            self.hasher.iter_mut().for_each(|hasher| hasher.update(piece));
        }
        let digest = self.layer.digest;
        let wrong = match &piece {
            Some(_) => self.passed > self.layer.size,
            None => self.hasher.take().is_some_and(|hasher| hasher.finish() != digest),
        };
        if wrong {
            return Err(Fault::new(
                Code::DataLoss,
                format!("the bytes received of layer {digest} are not the ones named"),
            ));
        }
        Ok(piece)
    }

    async fn seek(&mut self, offset: u64) -> Result<()> {
        if offset == self.passed {
            return Ok(());
        }
        Err(Fault::unimplemented("reading a layer that is passed on from another place in it"))
    }
}

/// Reports how far a layer is, as clients draw it: the digest is the counter's id.
struct LayerReport<'a> {
    reporter: Option<&'a Reporter>,
    id: String,
    current: u64,
    total: u64,
    last: Instant,
}

impl<'a> LayerReport<'a> {
    fn new(reporter: Option<&'a Reporter>, layer: &Descriptor) -> Self {
        let report = Self {
            reporter,
            id: layer.digest.to_string(),
            current: 0,
            total: layer.size,
            last: Instant::now(),
        };
        report.say(false);
        report
    }

    fn moved(&mut self, bytes: u64) {
        self.current += bytes;
        if self.last.elapsed() >= REPORT_EVERY {
            self.last = Instant::now();
            self.say(false);
        }
    }

    fn done(&self) {
        self.say(true);
    }

    fn say(&self, done: bool) {
        if let Some(reporter) = self.reporter {
            reporter.status(self.id.clone(), self.current as i64, self.total as i64, done);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Pieces(Vec<&'static [u8]>);

    #[async_trait]
    impl BlobStream for Pieces {
        async fn next(&mut self) -> Result<Option<Bytes>> {
            let next = (!self.0.is_empty()).then(|| self.0.remove(0));
            Ok(next.map(Bytes::from_static))
        }
    }

    async fn passed(pieces: &[&'static [u8]], layer: &Descriptor) -> Result<Vec<u8>> {
        let pieces = Box::new(Pieces(pieces.to_vec()));
        let hasher = Some(Hasher::new());
        let mut reader = Passing { pieces, layer: layer.clone(), passed: 0, hasher };
        reader.seek(0).await?;
        let mut all = Vec::new();
        while let Some(piece) = reader.next().await? {
            all.extend_from_slice(&piece);
        }
        assert!(reader.next().await?.is_none());
        assert!(reader.seek(0).await.is_err(), "it cannot be read again");
        Ok(all)
    }

    #[tokio::test]
    async fn bytes_that_are_passed_on_are_those_of_their_digest() {
        let layer = Descriptor::of(media::OCI_LAYER_GZIP, b"abcdef");
        assert_eq!(passed(&[b"abc", b"def"], &layer).await.unwrap(), b"abcdef");
        let wrong: [&[&'static [u8]]; 4] = [&[b"abc", b"deF"], &[b"abc"], &[b"abc", b"defg"], &[]];
        for wrong in wrong {
            let fault = passed(wrong, &layer).await.unwrap_err();
            assert_eq!(fault.code(), Code::DataLoss, "{fault}");
        }
    }

    #[test]
    fn an_image_is_found_again_by_what_it_was_remembered_by() {
        let layers = LayerSources::new(Registry::new(Default::default()), None);
        let name: ImageName = "r.example/a/b:1".parse().unwrap();
        let name = name.with_digest(Digest::of("manifest"));
        let source = layers.source(&name.to_string()).unwrap();
        assert_eq!(source.origin(), Some(name.to_string()));
        assert!(layers.source("a name with spaces").is_none());
        assert!(LayerSources::default().source("r.example/a").is_none(), "without a registry");
        // As a label has it.
        assert!(!name.to_string().contains(' '));
    }
}
