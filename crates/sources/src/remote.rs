//! Where the documents and layers of an image, or of a cache, are fetched from: a registry's repository, or a content store of a client.

use crate::{SessionCredentials, flight::Flights};
use async_trait::async_trait;
use bytes::Bytes;
use shipway_fault::{Context, Fault, Result};
use shipway_oci::{Descriptor, Digest, ImageName, media};
use shipway_progress::Reporter;
use shipway_refs::LayerSource;
use shipway_registry::Repository;
use shipway_session::{ClientStore, SessionGroup, SessionId};
use shipway_storage::{BlobReader, ContentStore, DISTRIBUTION_SOURCE, Ingest, Labels, LeaseId};
use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

/// How often a transfer tells how far it is.
const REPORT_EVERY: Duration = Duration::from_millis(100);
/// How long a registry is waited for where there is something else to go by.
const PATIENCE: Duration = Duration::from_secs(10);
/// Largest manifest, index or config that is read.
pub(crate) const MAX_DOCUMENT: u64 = 4 << 20;

/// One place that blobs come from.
#[derive(Clone)]
pub enum Remote {
    /// A repository of a registry.
    Registry(Box<Repository>),
    /// A content store of a client.
    Client {
        /// The store.
        store: ClientStore,
        /// Its name for messages.
        name: String,
    },
}

impl Remote {
    /// What the tag or digest `reference` leads to. A client's store has no tags.
    pub async fn resolve(&self, reference: &str) -> Result<Descriptor> {
        match self {
            Self::Registry(repository) => repository.resolve(reference).await.map_err(Fault::from),
            Self::Client { store, name } => {
                let bad = |_| Fault::invalid(format!("reference {name:?} must have digest"));
                let digest: Digest = reference.parse().map_err(bad)?;
                let bytes = store.read_all(digest, MAX_DOCUMENT).await?;
                let kind = media_type_of(&bytes)
                    .ok_or_else(|| Fault::invalid(format!("reference {name:?} contains neither an index nor a manifest")))?;
                Ok(Descriptor::new(kind, digest, bytes.len() as u64))
            }
        }
    }

    /// The same for who has something else to go by: a registry is asked once, and not waited for long.
    pub(crate) async fn resolve_soon(&self, reference: &str) -> Result<Descriptor> {
        let Self::Registry(repository) = self else { return self.resolve(reference).await };
        match tokio::time::timeout(PATIENCE, repository.resolve_once(reference)).await {
            Ok(answer) => answer.map_err(Fault::from),
            Err(_) => {
                let host = repository.name().registry();
                Err(Fault::unavailable(format!("{}: {host} has not answered within {} s", repository.name(), PATIENCE.as_secs())))
            }
        }
    }

    /// A manifest or index, verified.
    pub async fn manifest(&self, descriptor: &Descriptor) -> Result<Bytes> {
        match self {
            Self::Registry(repository) => repository.fetch_manifest(descriptor).await.map_err(Fault::from),
            Self::Client { store, .. } => store.read_all(descriptor.digest, MAX_DOCUMENT).await,
        }
    }

    /// What the place knows to refer to a manifest. A client's store knows nothing of that.
    pub(crate) async fn referrers(&self, subject: Digest) -> Result<Vec<Descriptor>> {
        match self {
            Self::Registry(repository) => repository.referrers(subject).await.map_err(Fault::from),
            Self::Client { .. } => Ok(Vec::new()),
        }
    }

    /// A small blob that is no manifest, verified.
    pub async fn small_blob(&self, descriptor: &Descriptor) -> Result<Bytes> {
        match self {
            Self::Registry(repository) => repository.fetch_small_blob(descriptor).await.map_err(Fault::from),
            Self::Client { store, .. } => store.read_all(descriptor.digest, MAX_DOCUMENT).await,
        }
    }

    /// Labels that say where a blob came from, so that it can be mounted across repositories of the registry.
    pub(crate) fn labels(&self) -> Labels {
        match self {
            Self::Registry(repository) => source_label(repository.name()),
            Self::Client { .. } => Labels::new(),
        }
    }

    fn name(&self) -> String {
        match self {
            Self::Registry(repository) => repository.name().to_string(),
            Self::Client { name, .. } => name.clone(),
        }
    }

    /// A blob that is known by its digest alone.
    pub(crate) async fn blob(&self, digest: Digest) -> Result<Pieces> {
        Ok(match self {
            Self::Registry(repository) => {
                let size = repository.blob_size(digest).await.map_err(Fault::from)?;
                let blob = Descriptor::new("application/octet-stream", digest, size);
                Pieces::Registry(Box::new(repository.fetch_blob(&blob, 0).await.map_err(Fault::from)?))
            }
            Self::Client { store, .. } => Pieces::Client(Box::new(store.reader(digest).await?)),
        })
    }

    async fn open(&self, layer: &Descriptor) -> Result<Pieces> {
        Ok(match self {
            Self::Registry(repository) => Pieces::Registry(Box::new(repository.fetch_blob(layer, 0).await.map_err(Fault::from)?)),
            Self::Client { store, .. } => Pieces::Client(Box::new(store.reader(layer.digest).await?)),
        })
    }
}

fn source_label(name: &ImageName) -> Labels {
    Labels::from([(format!("{DISTRIBUTION_SOURCE}.{}", name.registry()), name.repository().to_owned())])
}

/// The media type of a manifest or index by what it says, or by its shape.
pub(crate) fn media_type_of(bytes: &[u8]) -> Option<String> {
    let json: serde_json::Value = serde_json::from_slice(bytes).ok()?;
    match json.get("mediaType").and_then(|t| t.as_str()) {
        Some(t) if media::is_index(t) || media::is_manifest(t) => Some(t.to_owned()),
        Some(_) => None,
        None if json.get("manifests").is_some_and(|m| m.is_array()) => Some(media::OCI_INDEX.into()),
        None if json.get("layers").is_some_and(|l| l.is_array()) => Some(media::OCI_MANIFEST.into()),
        None => None,
    }
}

/// A blob as it comes.
pub(crate) enum Pieces {
    Registry(Box<shipway_registry::BlobReader>),
    Client(Box<dyn BlobReader>),
}

impl Pieces {
    pub(crate) async fn next(&mut self) -> Result<Option<Bytes>> {
        match self {
            Self::Registry(reader) => reader.next().await.map_err(Fault::from),
            Self::Client(reader) => reader.next().await,
        }
    }
}

/// The layers of one place, fetched when somebody reads them: often a later build than the one that found the place, whose client may be gone.
pub(crate) struct RemoteLayers {
    remote: Remote,
    flights: Flights,
    /// The clients of builds that want the layers, the latest first. Before anybody said so, who found the place answers.
    wanted_by: Mutex<Option<SessionGroup>>,
}

impl RemoteLayers {
    pub(crate) fn new(remote: Remote, flights: Flights) -> Self {
        Self { remote, flights, wanted_by: Mutex::default() }
    }

    /// Lets `sessions` answer for the layers, before those that did up to now and are still there.
    pub(crate) fn join(&self, sessions: &SessionGroup) {
        let mut all = self.wanted_by.lock().unwrap_or_else(PoisonError::into_inner);
        let before: &[SessionId] = all.as_ref().map_or(&[], |g| g.ids());
        if before.starts_with(sessions.ids()) {
            return;
        }
        let staying = before.iter().filter(|id| sessions.hub().try_get(id).is_some());
        *all = Some(SessionGroup::new(sessions.hub().clone(), sessions.ids().iter().chain(staying).cloned()));
    }

    /// The place as its clients of now see it. A client's own store is nobody else's.
    fn remote(&self) -> Remote {
        let sessions = self.wanted_by.lock().unwrap_or_else(PoisonError::into_inner).clone();
        match (&self.remote, sessions) {
            (Remote::Registry(repository), Some(sessions)) => {
                Remote::Registry(Box::new(repository.with_credentials(Arc::new(SessionCredentials::new(sessions)))))
            }
            (remote, _) => remote.clone(),
        }
    }
}

#[async_trait]
impl LayerSource for RemoteLayers {
    async fn fetch(&self, layer: &Descriptor, content: &dyn ContentStore, lease: &LeaseId, progress: Option<&Reporter>) -> Result<()> {
        // Two builds that want the same layer: one fetches, the other finds it there.
        let _turn = self.flights.turn(&layer.digest.to_string()).await;
        let ingest = Ingest { reference: format!("shipway-layer-{}", layer.digest), expected: Some(layer.digest), size: Some(layer.size) };
        let mut writer = match content.writer(lease, ingest).await {
            Ok(writer) => writer,
            Err(e) if e.is_already_exists() => return Ok(()),
            Err(e) => return Err(e).context(|| format!("store layer {}", layer.digest)),
        };
        let mut report = Report::new(progress, layer);
        let mut pieces = self.remote().open(layer).await?;
        while let Some(piece) = pieces.next().await? {
            report.moved(piece.len() as u64);
            writer.write(piece).await.context(|| format!("store layer {}", layer.digest))?;
        }
        // The store checks the digest: it hashes what it writes in any case.
        writer.commit(Some(layer.digest), &self.remote.labels()).await.context(|| {
            format!("layer {} of {}: the bytes received are not the ones named, or cannot be stored", layer.digest, self.remote.name())
        })?;
        report.done();
        Ok(())
    }

    fn describe(&self) -> String {
        self.remote.name()
    }

    fn is_clients(&self) -> bool {
        matches!(self.remote, Remote::Client { .. })
    }

    fn is_gone(&self) -> bool {
        match &self.remote {
            Remote::Registry(_) => false,
            Remote::Client { store, .. } => store.is_gone(),
        }
    }
}

/// Tells watchers how far a layer is, in the words that clients draw: the digest as the counter's id.
struct Report<'a> {
    reporter: Option<&'a Reporter>,
    id: String,
    current: u64,
    total: u64,
    last: Instant,
}

impl<'a> Report<'a> {
    fn new(reporter: Option<&'a Reporter>, layer: &Descriptor) -> Self {
        let report = Self { reporter, id: layer.digest.to_string(), current: 0, total: layer.size, last: Instant::now() };
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
