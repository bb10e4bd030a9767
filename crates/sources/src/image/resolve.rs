//! From a name to a manifest and a config: asked of the registry, or taken from containerd's image
//! store.

use super::{
    attrs::{ImageSpec, LocalImages},
    select,
};
use crate::{
    SourceContext,
    memo::ResolvedName,
    remote::{MAX_DOCUMENT, Remote, media_type_of},
};
use bytes::Bytes;
use serde::de::DeserializeOwned;
use shipway_attest::Stored;
use shipway_fault::{Class, Code, Context, Fault, Result};
use shipway_llb::ResolveMode;
use shipway_oci::{
    Descriptor, Digest, ImageConfig, ImageName, Index, Manifest, Platform, media, timestamp,
};
use shipway_progress::LogStream;
use shipway_refs::DOCUMENT_KIND;
use shipway_storage::{
    DISTRIBUTION_SOURCE, GC_EXPIRE, GC_FLAT, ImageRecord, Labels, LeaseId, Storage,
};
use std::time::{Duration, SystemTime};

/// Indexes within indexes that are followed.
const MAX_DEPTH: usize = 3;
/// Most layers of an image; overlayfs has fewer, others have 127.
const MAX_LAYERS: usize = 512;
/// How long fetched manifests and configs are kept for the next build.
const KEEP: Duration = Duration::from_secs(7 * 24 * 3600);

/// An image of one platform.
#[derive(Clone, Debug)]
pub(crate) struct Resolved {
    /// What the name led to: the index, or the manifest itself.
    pub main: Descriptor,
    /// Digest of the manifest.
    pub digest: Digest,
    pub manifest: Manifest,
    pub config: Bytes,
    pub parsed: ImageConfig,
    /// Why it is the one of containerd's store, if no registry said so.
    pub stored: Option<Stored>,
}

/// Where an image is looked for, and for which build.
pub(crate) struct NameResolver<'a> {
    pub storage: &'a Storage,
    pub remote: &'a dyn Remote,
    pub prefer: LocalImages,
    pub cx: &'a SourceContext,
}

/// Where documents are read from.
pub(crate) struct Documents<'a> {
    pub storage: &'a Storage,
    /// Where else, unless only the store may be asked.
    pub remote: Option<&'a dyn Remote>,
}

impl NameResolver<'_> {
    /// Finds the image that `spec` names for `platform`.
    pub(crate) async fn resolve(&self, spec: &ImageSpec, platform: &Platform) -> Result<Resolved> {
        let documents = Documents { storage: self.storage, remote: Some(self.remote) };
        let key = (spec.name.to_string(), spec.mode);
        if let Some(known) = self.cx.memo.image(&key) {
            let local = Documents { storage: self.storage, remote: None };
            let (documents, any) =
                if known.stored.is_some() { (&local, false) } else { (&documents, true) };
            match documents.image(known.main, platform, any).await {
                // A local image need not be for all platforms.
                Err(e) if known.stored.is_some() && e.is_not_found() => {}
                other => return Ok(Resolved { stored: known.stored, ..other? }),
            }
        }
        let mut found = match spec.name.digest().filter(|_| spec.mode != ResolveMode::ForcePull) {
            Some(digest) => self.pinned(&documents, spec, digest, platform).await?,
            None => self.named(&documents, spec, platform).await?,
        };
        // What was said of the tag is so of the digest that the frontend made of it.
        found.stored = self.cx.memo.stored(found.main.digest).or(found.stored);
        self.cx
            .memo
            .keep_image(key, ResolvedName { main: found.main.clone(), stored: found.stored });
        Ok(found)
    }

    /// A digest is its content, wherever that is.
    async fn pinned(
        &self,
        documents: &Documents<'_>,
        spec: &ImageSpec,
        digest: Digest,
        platform: &Platform,
    ) -> Result<Resolved> {
        let records = self.records(&spec.name).await?;
        let built = |record: &ImageRecord| record.built().map(Stored::Built);
        if let Some(found) = self.serving(&records, platform, built).await? {
            return Ok(found);
        }
        let main = match stored_manifest(self.storage, &spec.name, digest).await? {
            Some(main) => main,
            None => self.remote.resolve(&spec.name.reference()).await?,
        };
        documents.image(main, platform, true).await
    }

    async fn named(
        &self,
        documents: &Documents<'_>,
        spec: &ImageSpec,
        platform: &Platform,
    ) -> Result<Resolved> {
        let records = if spec.mode == ResolveMode::ForcePull {
            Vec::new()
        } else {
            self.records(&spec.name).await?
        };
        let preferred: Vec<ImageRecord> = records
            .iter()
            .filter(|r| spec.mode == ResolveMode::PreferLocal || self.prefer.prefers(r))
            .cloned()
            .collect();
        let wanted =
            |record: &ImageRecord| Some(record.built().map_or(Stored::Wanted, Stored::Built));
        if let Some(found) = self.serving(&preferred, platform, wanted).await? {
            tracing::debug!(image = %spec.name, digest = %found.main.digest, "taken from containerd's image store");
            return Ok(found);
        }
        let reference = spec.name.reference();
        if spec.mode == ResolveMode::Default && !records.is_empty() {
            match self.remote.resolve_soon(&reference).await {
                Ok(main) => return documents.image(main, platform, true).await,
                Err(error) => {
                    if let Some(found) =
                        self.serving(&records, platform, |_| Some(Stored::Fallback)).await?
                    {
                        tracing::warn!(image = %spec.name, digest = %found.main.digest, %error, "registry did not resolve the image, using the one in containerd's image store");
                        self.cx.reporter.log(
                            LogStream::Stderr,
                            format!("using the local image: {error}\n").as_bytes(),
                        );
                        return Ok(found);
                    }
                }
            }
        }
        let main = self.remote.resolve(&reference).await?;
        documents.image(main, platform, true).await
    }

    /// What containerd's image store has under the name.
    async fn records(&self, name: &ImageName) -> Result<Vec<ImageRecord>> {
        let mut records = Vec::new();
        for candidate in names(name) {
            match self.storage.images.get(&candidate).await {
                Ok(record) if name.digest().is_none_or(|d| d == record.target.digest) => {
                    records.push(record)
                }
                Ok(_) => {}
                Err(e) if e.is_not_found() => {}
                Err(e) => {
                    return Err(e).context(|| format!("look for image {candidate} in containerd"));
                }
            }
        }
        Ok(records)
    }

    /// The first of `records` of which containerd has all, but perhaps the layers, for this
    /// platform.
    async fn serving(
        &self,
        records: &[ImageRecord],
        platform: &Platform,
        stored: impl Fn(&ImageRecord) -> Option<Stored>,
    ) -> Result<Option<Resolved>> {
        let documents = Documents { storage: self.storage, remote: None };
        for record in records {
            match documents.image(record.target.clone(), platform, false).await {
                Ok(found) => return Ok(Some(Resolved { stored: stored(record), ..found })),
                // Another platform's, or a pull of it was cut short: the registry may have the
                // right one.
                Err(e) if e.is_not_found() => {
                    tracing::debug!(image = %record.name, reason = %e, "the local image is not complete for the platform")
                }
                Err(e) => return Err(e),
            }
        }
        Ok(None)
    }
}

/// Why an image of the store is used, for the progress.
pub(crate) fn explain_stored(stored: Stored, now: SystemTime) -> String {
    match stored {
        Stored::Built(time) => {
            format!("local image, built {}", ago(now.duration_since(time).unwrap_or_default()))
        }
        Stored::Wanted => "local image".to_owned(),
        Stored::Fallback => "local image: the registry could not be asked".to_owned(),
    }
}

/// A time in the past in one unit.
fn ago(past: Duration) -> String {
    let seconds = past.as_secs();
    let (number, unit) = match seconds {
        0..60 => (seconds, "second"),
        60..3600 => (seconds / 60, "minute"),
        3600..86_400 => (seconds / 3600, "hour"),
        _ => (seconds / 86_400, "day"),
    };
    format!("{number} {unit}{} ago", if number == 1 { "" } else { "s" })
}

/// Names under which containerd may know the image.
fn names(name: &ImageName) -> Vec<String> {
    let mut names = vec![name.to_string()];
    if name.digest().is_some() {
        names.push(name.clone().without_digest().to_string());
    }
    names
}

/// The manifest with this digest, if it is in the content store and came from the image's own
/// repository.
async fn stored_manifest(
    storage: &Storage,
    name: &ImageName,
    digest: Digest,
) -> Result<Option<Descriptor>> {
    let info = match storage.content.info(digest).await {
        Ok(info) => info,
        Err(e) if e.is_not_found() => return Ok(None),
        Err(e) => return Err(e).context(|| format!("look for {digest} in containerd")),
    };
    let repositories = info.labels.get(&format!("{DISTRIBUTION_SOURCE}.{}", name.registry()));
    if info.size > MAX_DOCUMENT
        || !repositories.is_some_and(|r| r.split(',').any(|r| r == name.repository()))
    {
        return Ok(None);
    }
    let bytes = match storage.content.read_all(digest, MAX_DOCUMENT).await {
        // A prune may come between the two.
        Err(e) if e.is_not_found() => return Ok(None),
        other => other?,
    };
    Ok(media_type_of(&bytes).map(|t| Descriptor::new(t, digest, info.size)))
}

impl Documents<'_> {
    /// The image below `main`. `any` accepts a lone manifest whatever its platform, as clients
    /// expect of registries.
    pub(crate) async fn image(
        &self,
        main: Descriptor,
        platform: &Platform,
        any: bool,
    ) -> Result<Resolved> {
        let mut targets = vec![(main.clone(), 0)];
        let mut offered = String::new();
        while let Some((descriptor, depth)) = targets.pop() {
            let bytes = match self.read(&descriptor, Kind::Manifest).await {
                // One of several candidates may be missing locally; the next one may do.
                Err(e) if e.is_not_found() && !targets.is_empty() => continue,
                other => other?,
            };
            let kind = media_type_of(&bytes).unwrap_or_else(|| descriptor.media_type.clone());
            if media::is_index(&kind) {
                let index: Index = parse(&bytes, &descriptor)?;
                if depth >= MAX_DEPTH {
                    return Err(Fault::invalid(format!(
                        "index {} is nested too deeply",
                        main.digest
                    )));
                }
                offered = select::offered(&index);
                targets.extend(
                    select::candidates(&index, platform)
                        .into_iter()
                        .rev()
                        .map(|d| (d.clone(), depth + 1)),
                );
                continue;
            }
            let manifest: Manifest = parse(&bytes, &descriptor)?;
            let config = self.read(&manifest.config, Kind::Config).await?;
            let parsed: ImageConfig = parse(&config, &manifest.config)?;
            // An index has said already which platform this is, and of a registry's lone manifest
            // none is demanded.
            let accepted = descriptor.platform.is_some() || (any && depth == 0);
            if !accepted && parsed.platform().rank_for(platform).is_none() {
                offered = parsed.platform().to_string();
                continue;
            }
            check(&manifest, &parsed, &descriptor)?;
            let digest = descriptor.digest;
            return Ok(Resolved { main, digest, manifest, config, parsed, stored: None });
        }
        Err(Fault::not_found(format!(
            "no match for platform {platform} in manifest {}: not found",
            main.digest
        ))
        .hint(format!(
            "the image offers {}",
            if offered.is_empty() { "no platform" } else { &offered }
        )))
    }

    /// A document from the content store, or from the registry and then kept.
    pub(crate) async fn read(&self, descriptor: &Descriptor, kind: Kind) -> Result<Bytes> {
        match self.storage.content.read_all(descriptor.digest, MAX_DOCUMENT).await {
            Ok(bytes) => return Ok(bytes),
            Err(e) if e.is_not_found() => {}
            Err(e) if self.remote.is_none() => return Err(e),
            Err(error) => {
                tracing::warn!(%error, digest = %descriptor.digest, "failed to read a stored document, fetching it again")
            }
        }
        let Some(remote) = self.remote else {
            return Err(Fault::not_found(format!(
                "content {} is not in containerd",
                descriptor.digest
            )));
        };
        let bytes = match kind {
            Kind::Manifest => remote.manifest(descriptor).await?,
            Kind::Config => remote.small_blob(descriptor).await?,
        };
        if let Err(error) = self.keep(remote, bytes.clone()).await {
            tracing::warn!(%error, digest = %descriptor.digest, "failed to store a document for later builds");
        }
        Ok(bytes)
    }

    /// Puts a document into the content store under a lease of its own that ends by itself, so that
    /// the next build does not ask the registry (which counts manifests as pulls).
    async fn keep(&self, remote: &dyn Remote, bytes: Bytes) -> Result<()> {
        let lease = document_lease(Digest::of(&bytes));
        let kind = (DOCUMENT_KIND.0.to_owned(), DOCUMENT_KIND.1.to_owned());
        let labels = Labels::from([
            (GC_EXPIRE.to_owned(), timestamp::format_whole(SystemTime::now() + KEEP)),
            (GC_FLAT.to_owned(), String::new()),
            kind,
        ]);
        match self.storage.leases.create(&lease, &labels).await {
            Err(e) if !e.is_already_exists() => return Err(e),
            _ => {}
        }
        self.storage.content.put(&lease, bytes, &remote.labels()).await.map(drop)
    }
}

/// The lease that keeps the manifest or config `digest` for the next build.
pub fn document_lease(digest: Digest) -> LeaseId {
    LeaseId(format!("shipway-document-{}", digest.hex()))
}

#[derive(Clone, Copy)]
pub(crate) enum Kind {
    Manifest,
    Config,
}

pub(crate) fn parse<T: DeserializeOwned>(bytes: &[u8], descriptor: &Descriptor) -> Result<T> {
    serde_json::from_slice(bytes).map_err(|e| {
        Fault::new(
            Code::Unknown,
            format!(
                "{} {} is not what an image has: {e}",
                descriptor.media_type, descriptor.digest
            ),
        )
        .with_class(Class::User)
        .hint("the name may lead to an artifact (a chart, a signature) rather than to an image")
    })
}

fn check(manifest: &Manifest, config: &ImageConfig, descriptor: &Descriptor) -> Result<()> {
    let (layers, diffs) = (manifest.layers.len(), config.rootfs.diff_ids.len());
    if layers != diffs {
        return Err(Fault::invalid(format!(
            "mismatched image rootfs and manifest layers: manifest {} has {layers} layers and its config names {diffs}",
            descriptor.digest
        )));
    }
    if layers > MAX_LAYERS {
        return Err(Fault::invalid(format!(
            "manifest {} has {layers} layers, more than the {MAX_LAYERS} accepted",
            descriptor.digest
        )));
    }
    Ok(())
}
