//! Repositories as sources.

use crate::{Body, Credentials, Hope, Opened, Source, SourceError, Wanted, index::AT_ONCE};
use async_trait::async_trait;
use bytes::Bytes;
use futures::{StreamExt, stream};
use shipway_fault::Fault;
use shipway_oci::{Digest, ImageName, Manifest};
use shipway_registry::{BlobHost, BlobPart, BlobRange, Error, Kind, Mode, Registry};
use std::sync::Arc;

/// Most sources of a layer.
pub const MAX_SOURCES: usize = 16;
/// What is added to an image's tag for the image with its tables of contents (stargz-snapshotter).
const EXTERNAL_SUFFIX: &str = "-esgztoc";
/// Annotation of a table of contents in such an image: digest of the layer that it is of.
const EXTERNAL_LAYER: &str = "containerd.io/snapshot/stargz/layer.digest";

/// A repository at a host.
struct Remote(BlobHost);

/// The places that blobs of `repositories` come from: for each, in order, the mirrors and then the
/// registry itself. A repository whose configuration cannot be read is passed over if there are
/// others.
pub async fn sources(
    registry: &Registry,
    repositories: &[ImageName],
    credentials: &dyn Credentials,
) -> Result<Vec<Arc<dyn Source>>, Fault> {
    let (mut sources, mut failed) = (Vec::new(), None);
    let mut seen: Vec<(&str, &str)> = Vec::new();
    for name in repositories {
        let place = (name.registry(), name.repository());
        if seen.contains(&place) {
            continue;
        }
        seen.push(place);
        let repository = registry.repository(name, credentials.of(name), Mode::Pull);
        match repository.blob_hosts().await {
            Ok(hosts) => {
                let hosts = hosts.into_iter().map(|host| Arc::new(Remote(host)) as Arc<dyn Source>);
                sources.extend(hosts);
            }
            Err(error) => failed = Some(error),
        }
    }
    sources.truncate(MAX_SOURCES);
    match failed {
        Some(error) if sources.is_empty() => Err(error.into()),
        _ => Ok(sources),
    }
}

/// [`sources`] for the repositories of several layers, some at a time; in the same order.
pub async fn sources_of_all(
    registry: &Registry,
    repositories: &[Vec<ImageName>],
    credentials: &dyn Credentials,
) -> Vec<Result<Vec<Arc<dyn Source>>, Fault>> {
    let each = repositories.iter().map(|names| sources(registry, names, credentials));
    stream::iter(each).buffered(AT_ONCE).collect().await
}

/// The table of contents of the layer `layer` from the image that stargz-snapshotter's converter
/// puts it into: the one with `-esgztoc` after the tag. What it gives is not checked.
pub async fn external_toc(
    registry: &Registry,
    image: &ImageName,
    layer: Digest,
    credentials: &dyn Credentials,
) -> Result<Vec<u8>, Fault> {
    let nothing = || Fault::not_found(format!("there is no table of contents of {layer}"));
    let tag = image.tag().ok_or_else(nothing)?;
    let repository = registry.repository(image, credentials.of(image), Mode::Pull);
    let found = repository.resolve(&format!("{tag}{EXTERNAL_SUFFIX}")).await?;
    let manifest = repository.fetch_manifest(&found).await?;
    let manifest: Manifest = serde_json::from_slice(&manifest)
        .map_err(|e| Fault::invalid(format!("the manifest of the tables of contents: {e}")))?;
    let wanted = layer.to_string();
    let blob = manifest
        .layers
        .iter()
        .find(|l| l.annotations.get(EXTERNAL_LAYER) == Some(&wanted))
        .ok_or_else(nothing)?;
    if blob.size > shipway_estargz::MAX_COMPRESSED_TOC {
        return Err(Fault::invalid(format!("the table of contents has {} bytes", blob.size)));
    }
    let mut reader = repository.fetch_blob(blob, 0).await?.verified();
    let mut bytes = Vec::new();
    while let Some(piece) = reader.next().await? {
        bytes.extend_from_slice(&piece);
    }
    Ok(bytes)
}

#[async_trait]
impl Source for Remote {
    fn host(&self) -> &str {
        self.0.authority()
    }

    async fn open(
        &self,
        digest: Digest,
        size: Option<u64>,
        wanted: Wanted,
        fresh: bool,
    ) -> Result<Opened, SourceError> {
        let range = match wanted {
            Wanted::Range(range) => BlobRange::Bytes(range),
            Wanted::Last(n) => BlobRange::Last(n),
        };
        let part = self.0.open(digest, size, &range, fresh).await.map_err(failed)?;
        Ok(Opened { start: part.start(), size: part.size(), body: Box::new(Part(part)) })
    }

    async fn warm(&self, digest: Digest) {
        self.0.warm(digest).await;
    }
}

struct Part(BlobPart);

#[async_trait]
impl Body for Part {
    async fn next(&mut self) -> Result<Option<Bytes>, SourceError> {
        self.0.next().await.map_err(failed)
    }
}

fn failed(error: Error) -> SourceError {
    let hope = match error.kind() {
        Kind::TooManyRequests { retry_after: Some(after), .. } => Hope::After(*after),
        Kind::TooManyRequests { .. }
        | Kind::Connect { .. }
        | Kind::TimedOut { .. }
        | Kind::Broken { .. }
        | Kind::Local(_) => Hope::Soon,
        Kind::Status { status, .. } if *status >= 500 || *status == 408 => Hope::Soon,
        Kind::Auth { status, .. } if status.is_none_or(|s| s >= 500 || s == 429) => Hope::Soon,
        _ => Hope::Elsewhere,
    };
    SourceError::new(hope, error)
}
