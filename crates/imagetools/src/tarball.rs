//! Archives of images as `docker save` and OCI tools write them.

use async_trait::async_trait;
use bytes::Bytes;
use flate2::{Compression, write::GzEncoder};
use futures::StreamExt as _;
use serde_json::{Value, json};
use shipway_archive::ustar::{BLOCK, header};
use shipway_convert::{Progress, Source, Step, Target};
use shipway_fault::{Code, Fault, Result};
use shipway_oci::{Descriptor, Digest, ImageName, Index, Manifest, Platform, gojson, media};
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    io::Write as _,
    sync::Arc,
};
use tokio::{
    io::{AsyncWrite, AsyncWriteExt as _},
    sync::Mutex,
};

/// Compressed bytes that are written at once.
const PIECE: usize = 256 << 10;
/// Annotations of `index.json` that name an image: containerd's, in full, and OCI's, the tag.
pub(crate) const IMAGE_NAME: &str = "io.containerd.image.name";
pub(crate) const REF_NAME: &str = "org.opencontainers.image.ref.name";

/// What reads an archive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ArchiveKind {
    /// `docker load`, of every version: an OCI layout with `manifest.json`, which lists the image
    /// of one platform.
    Docker,
    /// Programs that read OCI layouts.
    Oci,
    /// The same, compressed with gzip.
    OciGzip,
}

impl std::str::FromStr for ArchiveKind {
    type Err = Fault;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "docker" => Ok(Self::Docker),
            "oci" => Ok(Self::Oci),
            "oci-gzip" => Ok(Self::OciGzip),
            other => Err(Fault::invalid(format!("{other:?} is not a format of archives"))
                .hint("it is docker, oci or oci-gzip")),
        }
    }
}

fn blob_path(digest: Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

/// What was written so far.
struct Written {
    out: Box<dyn AsyncWrite + Send + Unpin>,
    gzip: Option<GzEncoder<Vec<u8>>>,
    blobs: BTreeSet<Digest>,
    /// What manifests say, for `manifest.json`.
    manifests: HashMap<Digest, Manifest>,
    indexes: HashMap<Digest, Index>,
    images: Vec<(Option<ImageName>, Descriptor)>,
}

impl Written {
    async fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let failed = |e| Fault::io("write the archive", e);
        let Some(gzip) = &mut self.gzip else {
            return self.out.write_all(bytes).await.map_err(failed);
        };
        gzip.write_all(bytes).map_err(failed)?;
        if gzip.get_ref().len() >= PIECE {
            let packed = std::mem::take(gzip.get_mut());
            self.out.write_all(&packed).await.map_err(failed)?;
        }
        Ok(())
    }

    async fn file(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        self.write(&header(name, bytes.len() as u64, b'0', 0o644)).await?;
        self.write(bytes).await?;
        self.pad(bytes.len() as u64).await
    }

    async fn pad(&mut self, size: u64) -> Result<()> {
        let padding = (BLOCK as u64 - size % BLOCK as u64) % BLOCK as u64;
        self.write(&[0; BLOCK][..padding as usize]).await
    }

    async fn end(&mut self) -> Result<()> {
        let failed = |e| Fault::io("write the archive", e);
        self.write(&[0; 2 * BLOCK]).await?;
        if let Some(gzip) = self.gzip.take() {
            self.out.write_all(&gzip.finish().map_err(failed)?).await.map_err(failed)?;
        }
        self.out.flush().await.map_err(failed)
    }
}

/// Writes an archive from its beginning to its end. Blobs are written one after another, for the
/// bytes of an archive are in a row.
pub struct ArchiveWriter {
    kind: ArchiveKind,
    written: Arc<Mutex<Written>>,
}

/// One image of an archive that is being written.
struct Image {
    name: Option<ImageName>,
    written: Arc<Mutex<Written>>,
}

impl ArchiveWriter {
    /// An archive that is written to `out`.
    pub async fn new(
        kind: ArchiveKind,
        out: impl AsyncWrite + Send + Unpin + 'static,
    ) -> Result<Self> {
        let compresses = kind == ArchiveKind::OciGzip;
        let mut written = Written {
            out: Box::new(out),
            gzip: compresses.then(|| GzEncoder::new(Vec::new(), Compression::default())),
            blobs: BTreeSet::new(),
            manifests: HashMap::new(),
            indexes: HashMap::new(),
            images: Vec::new(),
        };
        written.write(&header("blobs/", 0, b'5', 0o755)).await?;
        written.write(&header("blobs/sha256/", 0, b'5', 0o755)).await?;
        Ok(Self { kind, written: Arc::new(Mutex::new(written)) })
    }

    /// Where an image called `name` is copied to.
    pub fn image(&self, name: ImageName) -> Arc<dyn Target> {
        Arc::new(Image { name: Some(name), written: self.written.clone() })
    }

    /// The same for an image without a name.
    pub fn unnamed(&self) -> Arc<dyn Target> {
        Arc::new(Image { name: None, written: self.written.clone() })
    }

    /// Writes what names the images, and ends the archive.
    pub async fn finish(self) -> Result<()> {
        let mut written = self.written.lock().await;
        let index = json(&index(&written.images))?;
        written.file("index.json", &index).await?;
        if self.kind == ArchiveKind::Docker {
            let manifest = json(&docker_manifest(&written)?)?;
            written.file("manifest.json", &manifest).await?;
        }
        written.file("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#).await?;
        written.end().await
    }
}

fn json(value: &impl serde::Serialize) -> Result<Vec<u8>> {
    let text = gojson::to_string(value);
    text.map(String::into_bytes).map_err(|e| Fault::internal(format!("encode an index: {e}")))
}

/// `index.json`: one entry for each name.
fn index(images: &[(Option<ImageName>, Descriptor)]) -> Index {
    let entry = |(name, root): &(Option<ImageName>, Descriptor)| {
        let mut entry = root.clone();
        let Some(name) = name else { return entry };
        entry.annotations.insert(IMAGE_NAME.to_owned(), name.to_string());
        let tag = name.tag().unwrap_or("latest");
        entry.annotations.insert(REF_NAME.to_owned(), tag.to_owned());
        entry
    };
    Index {
        schema_version: 2,
        media_type: Some(media::OCI_INDEX.to_owned()),
        manifests: images.iter().map(entry).collect(),
        annotations: BTreeMap::new(),
    }
}

/// `manifest.json`: of each image the manifest for this machine, or else the first one that is an
/// image.
fn docker_manifest(written: &Written) -> Result<Vec<Value>> {
    let mut entries: Vec<(Digest, Value)> = Vec::new();
    for (name, root) in &written.images {
        let digest = match written.indexes.get(&root.digest) {
            None => root.digest,
            Some(index) => {
                let host = Platform::host();
                let images = index.manifests.iter().filter(|entry| {
                    let is_image = |p: &Platform| p.os != "unknown";
                    entry.platform.as_ref().is_none_or(is_image)
                        && written.manifests.contains_key(&entry.digest)
                });
                let rank = |entry: &&Descriptor| {
                    let rank = entry.platform.as_ref().and_then(|p| p.rank_for(&host));
                    rank.unwrap_or(u32::MAX)
                };
                let best = images.min_by_key(rank);
                let best = best.ok_or_else(|| {
                    Fault::invalid(format!("{} has no image for one platform", root.digest))
                        .hint("write it with --format oci")
                })?;
                best.digest
            }
        };
        let tags: Vec<String> = name.iter().map(ImageName::familiar).collect();
        if let Some((_, entry)) = entries.iter_mut().find(|(d, _)| *d == digest) {
            if let Some(all) = entry["RepoTags"].as_array_mut() {
                all.extend(tags.into_iter().map(Value::from));
            }
            continue;
        }
        let manifest = written
            .manifests
            .get(&digest)
            .ok_or_else(|| Fault::internal(format!("the manifest {digest} was not written")))?;
        let layers: Vec<String> = manifest.layers.iter().map(|l| blob_path(l.digest)).collect();
        let config = blob_path(manifest.config.digest);
        entries.push((digest, json!({"Config": config, "RepoTags": tags, "Layers": layers})));
    }
    Ok(entries.into_iter().map(|(_, entry)| entry).collect())
}

#[async_trait]
impl Target for Image {
    async fn copy(
        &self,
        descriptor: &Descriptor,
        source: &Arc<dyn Source>,
        progress: &Progress,
    ) -> Result<()> {
        let (digest, size) = (descriptor.digest, descriptor.size);
        let mut written = self.written.lock().await;
        if written.blobs.contains(&digest) {
            progress(Step { digest, converts: false, done: size, size });
            return Ok(());
        }
        let mut bytes = source.blob(descriptor).await?;
        written.write(&header(&blob_path(digest), size, b'0', 0o644)).await?;
        let mut done = 0;
        while let Some(piece) = bytes.next().await.transpose()? {
            done += piece.len() as u64;
            if done > size {
                break;
            }
            written.write(&piece).await?;
            progress(Step { digest, converts: false, done, size });
        }
        if done != size {
            return Err(Fault::new(
                Code::DataLoss,
                format!("the blob {digest} does not have the {size} bytes that its image names"),
            ));
        }
        written.blobs.insert(digest);
        written.pad(size).await
    }

    async fn config(&self, descriptor: &Descriptor, bytes: Bytes) -> Result<()> {
        let mut written = self.written.lock().await;
        match written.blobs.insert(descriptor.digest) {
            true => written.file(&blob_path(descriptor.digest), &bytes).await,
            false => Ok(()),
        }
    }

    async fn manifest(&self, descriptor: &Descriptor, bytes: Bytes, _: &[Digest]) -> Result<()> {
        self.config(descriptor, bytes.clone()).await?;
        let unreadable = |e: serde_json::Error| {
            Fault::invalid(format!("the manifest {} cannot be read: {e}", descriptor.digest))
        };
        let mut written = self.written.lock().await;
        if media::is_index(&descriptor.media_type) {
            let index = serde_json::from_slice(&bytes).map_err(unreadable)?;
            written.indexes.insert(descriptor.digest, index);
        } else {
            let manifest = serde_json::from_slice(&bytes).map_err(unreadable)?;
            written.manifests.insert(descriptor.digest, manifest);
        }
        Ok(())
    }

    async fn finish(&self, root: &Descriptor) -> Result<()> {
        self.written.lock().await.images.push((self.name.clone(), root.clone()));
        Ok(())
    }
}
