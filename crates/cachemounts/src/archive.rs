//! An artifact at a place: found by its keys, and written.

use crate::{
    Keys, Named, Place,
    entry::Tree,
    format::{self, Blob, CREATED, Index, MountRecord, TREE},
    keys::MAX_SIZE,
};
use bytes::Bytes;
use shipway_fault::{Code, Context as _, Fault, Result};
use shipway_oci::{Descriptor, Digest, media, timestamp};
use std::{sync::Arc, time::SystemTime};

/// Artifacts whose times are compared when the place does not say which name is the newest.
const MAX_CANDIDATES: usize = 16;

/// Saved cache mounts that were found.
#[derive(Clone)]
pub struct Archive {
    pub(crate) place: Arc<dyn Place>,
    name: String,
    pub(crate) index: Index,
}

/// What is known of a saved cache mount before it is restored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SavedMount {
    /// Regular files.
    pub files: u64,
    /// Bytes of those files.
    pub bytes: u64,
}

/// The bytes of a blob, checked.
pub(crate) async fn blob(place: &dyn Place, blob: &Descriptor) -> Result<Bytes> {
    let bytes = place.read(blob).await?;
    if Digest::of(&bytes) == blob.digest {
        return Ok(bytes);
    }
    let why = format!("the blob {} at {} is damaged", blob.digest, place.shown());
    Err(Fault::new(Code::DataLoss, why))
}

async fn manifest(place: &dyn Place, name: &str) -> Result<Option<shipway_oci::Manifest>> {
    let Some(bytes) = place.manifest(name).await? else { return Ok(None) };
    if bytes.len() as u64 > format::MAX_DOCUMENT {
        return Err(Fault::invalid(format!("the manifest {name} is too large")));
    }
    format::manifest(&bytes).map(Some)
}

impl Archive {
    /// What is under the exact key, or else under the newest name that begins as the first
    /// fallback that any name begins with; a fallback that is a name itself comes before longer
    /// ones.
    pub async fn find(place: &Arc<dyn Place>, keys: &Keys) -> Result<Option<Self>> {
        if let Some(found) = Self::open(place, keys.exact()).await? {
            return Ok(Some(found));
        }
        for prefix in keys.fallback() {
            let found = match Self::open(place, prefix).await? {
                None => Self::newest(place, prefix).await?,
                found => found,
            };
            if found.is_some() {
                return Ok(found);
            }
        }
        Ok(None)
    }

    /// What is under this very name.
    pub async fn open(place: &Arc<dyn Place>, name: &str) -> Result<Option<Self>> {
        let read = async || -> Result<Option<Self>> {
            let Some(manifest) = manifest(&**place, name).await? else { return Ok(None) };
            let index = Index::decode(&blob(&**place, &manifest.config).await?)?;
            Ok(Some(Self { place: place.clone(), name: name.to_owned(), index }))
        };
        read().await.context(|| format!("read the cache mounts {name} from {}", place.shown()))
    }

    /// What was written last under a name that begins with `prefix`.
    pub async fn newest(place: &Arc<dyn Place>, prefix: &str) -> Result<Option<Self>> {
        let mut names = place.names(prefix).await?;
        names.retain(|n| n.name.starts_with(prefix));
        names.sort_by(|a, b| (b.written, &b.name).cmp(&(a.written, &a.name)));
        names.truncate(MAX_CANDIDATES);
        let name = if names.iter().all(|n| n.written.is_some()) {
            names.into_iter().next().map(|n| n.name)
        } else {
            let mut newest: Option<(SystemTime, String)> = None;
            for Named { name, .. } in names {
                // What is something else is no candidate.
                let Ok(Some(manifest)) = manifest(&**place, &name).await else { continue };
                let created = manifest.annotations.get(CREATED).and_then(|t| timestamp::parse(t));
                let candidate = (created.unwrap_or(SystemTime::UNIX_EPOCH), name);
                newest = newest.max(Some(candidate));
            }
            newest.map(|(_, name)| name)
        };
        match name {
            Some(name) => Self::open(place, &name).await,
            None => Ok(None),
        }
    }

    /// One without mounts, to be written.
    pub fn empty(place: &Arc<dyn Place>) -> Self {
        Self { place: place.clone(), name: String::new(), index: Index::default() }
    }

    /// The name that it was found under.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What it has of the mount `id`.
    pub fn mount(&self, id: &str) -> Option<SavedMount> {
        self.index.mounts.get(id).map(|m| SavedMount { files: m.files, bytes: m.bytes })
    }

    /// The files of a mount, of at most `max_size` bytes.
    pub(crate) async fn tree(&self, record: &MountRecord, max_size: u64) -> Result<Tree> {
        let bytes = blob(&*self.place, &record.tree.descriptor(TREE)).await?;
        Tree::decode(&bytes, &record.packs, max_size)
    }

    /// What is there of the mount `id` for another save to use: its files and packs.
    pub(crate) async fn base(&self, id: &str) -> Result<Option<(Tree, Vec<Blob>)>> {
        let Some(record) = self.index.mounts.get(id) else { return Ok(None) };
        Ok(Some((self.tree(record, MAX_SIZE).await?, record.packs.clone())))
    }

    /// Writes it under `name`, unless it is there as it is. Its trees and packs are at the place.
    /// Gives the manifest that was written.
    pub async fn publish(&self, name: &str, unchanged: bool) -> Result<Option<Descriptor>> {
        if unchanged && name == self.name {
            return Ok(None);
        }
        let created = timestamp::format_whole(SystemTime::now());
        let (config, manifest) = self.index.encode(&created)?;
        let descriptor = Descriptor::of(format::INDEX, &config);
        let published = async || -> Result<Option<Descriptor>> {
            self.place.write(&descriptor, config.clone().into()).await?;
            let descriptor = Descriptor::of(media::OCI_MANIFEST, &manifest);
            self.place.publish(name, &descriptor, manifest.clone().into()).await?;
            Ok(Some(descriptor))
        };
        published()
            .await
            .context(|| format!("write the cache mounts {name} to {}", self.place.shown()))
    }
}
