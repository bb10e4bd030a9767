//! Pushing a written image (rows `ex.img.push`, `ex.img.pbd`, `ex.img.insecure`).

use crate::{port::ExportInput, writer::Written};
use futures::{FutureExt as _, StreamExt as _, TryStreamExt as _};
use shipway_archive::CompressionKind;
use shipway_fault::{Context as _, Fault, Result};
use shipway_oci::{Descriptor, Digest, ImageName, media};
use shipway_progress::Reporter;
use shipway_refs::{Compression, Fetch, ImmutableRef};
use shipway_registry::{BodyStream, Mode, Registry, Repository};
use shipway_session::SessionGroup;
use shipway_sources::SessionCredentials;
use shipway_storage::{BlobReader, ContentStore, DISTRIBUTION_SOURCE, Labels};
use std::{collections::BTreeMap, sync::Arc};

/// Blobs on their way at once; the registry client bounds them per host besides.
const PARALLEL: usize = 8;
/// Most bytes of a label that containerd takes, key and value together.
const MAX_LABEL: usize = 4096;

/// How to push.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct PushOptions {
    pub by_digest: bool,
    pub insecure: bool,
}

/// The blobs of an image to push. Layers that are known by descriptor only are passed on from where
/// they are when the registry does not have them, and not stored here.
#[derive(Clone)]
pub(crate) struct Blobs {
    content: Arc<dyn ContentStore>,
    /// Layers that are not here, and the images that have them.
    lazy: Arc<BTreeMap<Digest, String>>,
    states: Arc<Vec<ImmutableRef>>,
    /// How layers are compressed that stay here once they were sent from here.
    keep: Option<Compression>,
}

impl Blobs {
    pub fn new(content: &Arc<dyn ContentStore>, input: &ExportInput, written: &Written) -> Self {
        let lazy = written.manifests.iter().flat_map(|m| m.lazy.clone()).collect();
        let states = input.platforms.iter().map(|p| p.state.clone()).collect();
        Self {
            content: content.clone(),
            lazy: Arc::new(lazy),
            states: Arc::new(states),
            keep: None,
        }
    }

    /// The same for an image in the store that lacks layers which no snapshotter serves: those that
    /// the registry has to be sent are stored on their way, as BuildKit does (row
    /// `ex.img.incomplete`).
    pub fn keeping(self, compression: Compression) -> Self {
        Self { keep: Some(compression), ..self }
    }

    /// The bytes of a blob as a stream for the registry client.
    async fn body(self, digest: Digest) -> Result<BodyStream> {
        let reader = match self.lazy.contains_key(&digest) {
            true => self.elsewhere(digest).await?,
            false => self.content.reader(digest).await?,
        };
        let next = |mut reader: Box<dyn BlobReader>| async move {
            Ok::<_, Fault>(reader.next().await?.map(|bytes| (bytes, reader)))
        };
        Ok(futures::stream::try_unfold(reader, next).boxed())
    }

    /// A reader of a layer that is not here, unless it was fetched since.
    async fn elsewhere(&self, digest: Digest) -> Result<Box<dyn BlobReader>> {
        let mut missing = None;
        for state in self.states.iter() {
            if let Some(compression) = self.keep {
                state.blobs(compression, Fetch::Everything, None).await?;
            }
            match state.blob_reader(digest).await {
                // Another platform's state may have the layer.
                Err(e) if e.is_not_found() => missing = missing.or(Some(e)),
                reader => return reader,
            }
        }
        Err(missing.unwrap_or_else(|| Fault::not_found(format!("no state has layer {digest}"))))
    }

    /// Repositories of the same registry that have the blob, by containerd's label or because it
    /// would be fetched from there; the ones most like the target come first, since a user that may
    /// push here may probably read there.
    async fn mountable(&self, descriptor: &Descriptor, name: &ImageName) -> Vec<String> {
        if let Some(origin) = self.lazy.get(&descriptor.digest) {
            let origin = origin.parse::<ImageName>().ok();
            let origin = origin
                .filter(|o| o.registry() == name.registry() && o.repository() != name.repository());
            return origin.map(|o| o.repository().to_owned()).into_iter().collect();
        }
        let Ok(info) = self.content.info(descriptor.digest).await else { return Vec::new() };
        let keys = [source_label(name), format!("{DISTRIBUTION_SOURCE}.{}", name.registry())];
        by_likeness(
            keys.iter().filter_map(|key| info.labels.get(key)).flat_map(|label| label.split(',')),
            name.repository(),
        )
    }

    /// Notes that the repository has the layer, so that the next push to the same registry can
    /// mount it (row `ex.img.distsrc`). Failing to fails nothing.
    async fn pushed(&self, layer: &Descriptor, name: &ImageName) {
        // Layers that are not here were never fetched; they have no labels.
        let Ok(info) = self.content.info(layer.digest).await else { return };
        let key = source_label(name);
        let known = info.labels.get(&key).map(String::as_str).unwrap_or_default();
        let mut repositories: Vec<&str> =
            known.split(',').filter(|r| !r.is_empty()).chain([name.repository()]).collect();
        repositories.sort_unstable();
        repositories.dedup();
        let value = repositories.join(",");
        if value == known || key.len() + value.len() > MAX_LABEL {
            return;
        }
        if let Err(fault) =
            self.content.update_labels(layer.digest, &Labels::from([(key, value)])).await
        {
            tracing::debug!(error = %fault, digest = %layer.digest, "failed to label a layer with its repository");
        }
    }
}

/// containerd's label for the registry of `name`.
fn source_label(name: &ImageName) -> String {
    format!("{DISTRIBUTION_SOURCE}.{}", name.registry_host())
}

/// The repositories without `target`, each once, those first that have most leading path components
/// in common with it.
fn by_likeness<'a>(repositories: impl Iterator<Item = &'a str>, target: &str) -> Vec<String> {
    let common = |repository: &&str| {
        repository.split('/').zip(target.split('/')).take_while(|(a, b)| a == b).count()
    };
    let mut all: Vec<&str> = repositories.filter(|r| !r.is_empty() && *r != target).collect();
    all.sort_by_key(|repository| (std::cmp::Reverse(common(repository)), *repository));
    all.dedup();
    all.into_iter().map(str::to_owned).collect()
}

async fn push_data(
    repository: &Repository,
    blobs: &Blobs,
    blob: Descriptor,
    reporter: &Reporter,
) -> Result<()> {
    let from = blobs.mountable(&blob, repository.name()).await;
    let (source, digest) = (blobs.clone(), blob.digest);
    let open = move || source.clone().body(digest).boxed();
    let (progress, size) = (reporter.clone(), blob.size as i64);
    let id = format!("pushing layer {}", blob.digest);
    let shown = id.clone();
    let count = move |sent: u64| progress.status(shown.clone(), sent as i64, size, false);
    repository.push_blob(&blob, from.iter().map(String::as_str), open, count).await?;
    if blob.size > 1 << 20 {
        reporter.status(id, size, size, true);
    }
    if CompressionKind::of_media_type(&blob.media_type).is_some() {
        blobs.pushed(&blob, repository.name()).await;
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
    let parsed: ImageName =
        name.parse().map_err(|e: shipway_oci::NameError| Fault::invalid(e.to_string()))?;
    let tagged = name.rsplit_once('/').map_or(name, |(_, last)| last).contains(':');
    if options.by_digest && tagged {
        return Err(Fault::invalid(format!("can't push tagged ref {parsed} by digest")));
    }
    let mut repository = registry.repository(
        &parsed,
        Arc::new(SessionCredentials::new(sessions.clone())),
        Mode::Push,
    );
    if options.insecure {
        repository = repository.insecure();
    }
    let (data, manifests) = written.blobs();
    reporter.status("pushing layers", 0, 0, false);
    let repository = &repository;
    // Registries do not keep these (row `ex.c.nondist`).
    let data = data.into_iter().filter(|blob| !media::is_foreign(&blob.media_type));
    futures::stream::iter(data.map(|blob| push_data(repository, blobs, blob, reporter)))
        .buffer_unordered(PARALLEL)
        .try_collect::<Vec<()>>()
        .await
        .context(|| format!("failed to push {name}"))?;
    reporter.status("pushing layers", 0, 0, true);
    let status =
        format!("pushing manifest for {}@{}", parsed.clone().without_digest(), written.root.digest);
    reporter.status(status.clone(), 0, 0, false);
    for manifest in manifests {
        let bytes = blobs.content.read_all(manifest.digest, 4 << 20).await?;
        let is_root = manifest.digest == written.root.digest;
        let reference = match parsed.tag() {
            Some(tag) if is_root && !options.by_digest => tag.to_owned(),
            _ => manifest.digest.to_string(),
        };
        repository
            .push_manifest(bytes, &manifest.media_type, &reference)
            .await
            .context(|| format!("failed to push {name}"))?;
    }
    reporter.status(status, 0, 0, true);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_label_is_containerds() {
        for (name, want) in [
            ("alpine", "docker.io"),
            ("localhost:5000/a/b", "localhost"),
            ("r.example.com/a", "r.example.com"),
        ] {
            assert_eq!(
                source_label(&name.parse().unwrap()),
                format!("containerd.io/distribution.source.{want}")
            );
        }
    }

    #[test]
    fn the_repositories_most_like_the_target_are_tried_first() {
        let all = ["x/y", "team/app/base", "", "team/app/web", "team/other", "x/y"];
        assert_eq!(
            by_likeness(all.into_iter(), "team/app/web"),
            ["team/app/base", "team/other", "x/y"]
        );
    }
}
