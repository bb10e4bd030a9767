//! Pushing a written image (rows `ex.img.push`, `ex.img.pbd`, `ex.img.insecure`).

use crate::{port::ExportInput, writer::Written};
use futures::{FutureExt as _, StreamExt as _, TryStreamExt as _};
use shipway_fault::{Context as _, Fault, Result};
use shipway_oci::{Descriptor, Digest, ImageName};
use shipway_progress::Reporter;
use shipway_refs::{Compression, ImmutableRef};
use shipway_registry::{BodyStream, Mode, Registry, Repository};
use shipway_session::SessionGroup;
use shipway_sources::SessionCredentials;
use shipway_storage::{BlobReader, ContentStore, DISTRIBUTION_SOURCE};
use std::{collections::BTreeMap, sync::Arc};
use tokio::sync::OnceCell;

/// Blobs on their way at once; the registry client bounds them per host besides.
const PARALLEL: usize = 8;

/// How to push.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct PushOptions {
    pub by_digest: bool,
    pub insecure: bool,
}

/// The blobs of an image to push. Layers that are known by descriptor only are fetched when the registry does not have them.
#[derive(Clone)]
pub(crate) struct Blobs {
    content: Arc<dyn ContentStore>,
    /// Layers that are not here, and the images that have them.
    lazy: Arc<BTreeMap<Digest, String>>,
    states: Arc<Vec<ImmutableRef>>,
    compression: Compression,
    fetched: Arc<OnceCell<()>>,
    reporter: Reporter,
}

impl Blobs {
    pub fn new(
        content: &Arc<dyn ContentStore>,
        input: &ExportInput,
        written: &Written,
        compression: Compression,
        reporter: &Reporter,
    ) -> Self {
        let lazy = written.manifests.iter().flat_map(|m| m.lazy.clone()).collect();
        let states = input.platforms.iter().map(|p| p.state.clone()).collect();
        let (content, reporter) = (content.clone(), reporter.clone());
        Self { content, lazy: Arc::new(lazy), states: Arc::new(states), compression, fetched: Arc::default(), reporter }
    }

    /// The bytes of a blob as a stream for the registry client.
    async fn body(self, digest: Digest) -> Result<BodyStream> {
        if self.lazy.contains_key(&digest) {
            let fetch = async || {
                for state in self.states.iter() {
                    state.blobs(self.compression, true, Some(&self.reporter)).await?;
                }
                Ok::<_, Fault>(())
            };
            self.fetched.get_or_try_init(fetch).await?;
        }
        let reader = self.content.reader(digest).await?;
        let next = |mut reader: Box<dyn BlobReader>| async move { Ok::<_, Fault>(reader.next().await?.map(|bytes| (bytes, reader))) };
        Ok(futures::stream::try_unfold(reader, next).boxed())
    }

    /// A repository of the same registry that has the blob: by containerd's label, or the one it would be fetched from.
    async fn mountable(&self, descriptor: &Descriptor, name: &ImageName) -> Option<String> {
        if let Some(origin) = self.lazy.get(&descriptor.digest) {
            let origin: ImageName = origin.parse().ok()?;
            return (origin.registry() == name.registry() && origin.repository() != name.repository())
                .then(|| origin.repository().to_owned());
        }
        let info = self.content.info(descriptor.digest).await.ok()?;
        let label = info.labels.get(&format!("{DISTRIBUTION_SOURCE}.{}", name.registry()))?;
        label.split(',').find(|r| !r.is_empty() && *r != name.repository()).map(str::to_owned)
    }
}

async fn push_data(repository: &Repository, blobs: &Blobs, blob: Descriptor, reporter: &Reporter) -> Result<()> {
    let from = blobs.mountable(&blob, repository.name()).await;
    let (source, digest) = (blobs.clone(), blob.digest);
    let open = move || source.clone().body(digest).boxed();
    let (progress, size) = (reporter.clone(), blob.size as i64);
    let id = format!("pushing layer {}", blob.digest);
    let shown = id.clone();
    let count = move |sent: u64| progress.status(shown.clone(), sent as i64, size, false);
    repository.push_blob(&blob, from.as_deref(), open, count).await?;
    if blob.size > 1 << 20 {
        reporter.status(id, size, size, true);
    }
    Ok(())
}

/// Pushes `written` under `name`.
pub(crate) async fn push(
    registry: &Registry,
    blobs: &Blobs,
    written: &Written,
    name: &str,
    options: PushOptions,
    sessions: &SessionGroup,
    reporter: &Reporter,
) -> Result<()> {
    let parsed: ImageName = name.parse().map_err(|e: shipway_oci::NameError| Fault::invalid(e.to_string()))?;
    let tagged = name.rsplit_once('/').map_or(name, |(_, last)| last).contains(':');
    if options.by_digest && tagged {
        return Err(Fault::invalid(format!("can't push tagged ref {parsed} by digest")));
    }
    let mut repository = registry.repository(&parsed, Arc::new(SessionCredentials::new(sessions.clone())), Mode::Push);
    if options.insecure {
        repository = repository.insecure();
    }
    let (data, manifests) = written.blobs();
    reporter.status("pushing layers", 0, 0, false);
    let repository = &repository;
    futures::stream::iter(data.into_iter().map(|blob| push_data(repository, blobs, blob, reporter)))
        .buffer_unordered(PARALLEL)
        .try_collect::<Vec<()>>()
        .await
        .context(|| format!("failed to push {name}"))?;
    reporter.status("pushing layers", 0, 0, true);
    let status = format!("pushing manifest for {}@{}", parsed.clone().without_digest(), written.root.digest);
    reporter.status(status.clone(), 0, 0, false);
    for manifest in manifests {
        let bytes = blobs.content.read_all(manifest.digest, 4 << 20).await?;
        let is_root = manifest.digest == written.root.digest;
        let reference = match parsed.tag() {
            Some(tag) if is_root && !options.by_digest => tag.to_owned(),
            _ => manifest.digest.to_string(),
        };
        repository.push_manifest(bytes, &manifest.media_type, &reference).await.context(|| format!("failed to push {name}"))?;
    }
    reporter.status(status, 0, 0, true);
    Ok(())
}
