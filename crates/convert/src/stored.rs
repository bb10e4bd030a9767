//! Images in containerd's store.

use crate::{Bytes, Input, LayerTarget, Packing, Progress, Source, Step, Target};
use async_trait::async_trait;
use futures::{StreamExt as _, stream};
use shipway_archive::{CompressionKind, Packed};
use shipway_fault::{Code, Fault, Result};
use shipway_oci::{Descriptor, Digest, Hasher, timestamp};
use shipway_registry::BodyStream;
use shipway_storage::{
    BlobReader, GC_EXPIRE, GC_REF_CONTENT, Ingest, Labels, LeaseId, Storage, UNCOMPRESSED,
};
use shipway_task::blocking;
use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};
use tokio::sync::{OnceCell, mpsc};

/// Most bytes of a manifest or config.
const MAX_DOCUMENT: u64 = 4 << 20;
/// Pieces on their way from the thread that packs to the store.
const IN_FLIGHT: usize = 8;
/// What is written is kept this long if we are killed.
const LEASE_TIME: Duration = Duration::from_secs(6 * 3600);

/// An image in containerd's store.
pub struct Stored {
    storage: Storage,
    name: String,
    lease: OnceCell<LeaseId>,
}

impl Stored {
    /// The image `name` in `storage`.
    pub fn new(storage: Storage, name: String) -> Self {
        Self { storage, name, lease: OnceCell::new() }
    }

    /// Lets go of what was written, where it will get no name after all.
    pub async fn abandon(&self) {
        if let Some(lease) = self.lease.get() {
            // One that cannot be ended expires.
            let _ = self.storage.leases.delete(lease, false).await;
        }
    }

    /// What keeps everything until the name does.
    async fn lease(&self) -> Result<&LeaseId> {
        let make = async || {
            let id = LeaseId(format!("shipway-convert-{}", shipway_host::random_id()?));
            let expire = timestamp::format(SystemTime::now() + LEASE_TIME);
            self.storage
                .leases
                .create(&id, &Labels::from([(GC_EXPIRE.to_owned(), expire)]))
                .await?;
            Ok::<_, Fault>(id)
        };
        self.lease.get_or_try_init(make).await
    }
}

/// A blob as it is read, and what it is so far.
struct Reading {
    reader: Box<dyn BlobReader>,
    hasher: Hasher,
    digest: Digest,
}

#[async_trait]
impl Source for Stored {
    async fn root(&self) -> Result<Descriptor> {
        let found = self.storage.images.get(&self.name).await;
        Ok(found
            .map_err(|e| match e.is_not_found() {
                true => Fault::not_found(format!("containerd has no image {}", self.name))
                    .hint("names are written in full there, such as docker.io/library/app:1"),
                false => e,
            })?
            .target)
    }

    async fn manifest(&self, descriptor: &Descriptor) -> Result<Bytes> {
        self.storage.content.read_all(descriptor.digest, MAX_DOCUMENT).await
    }

    async fn config(&self, descriptor: &Descriptor) -> Result<Bytes> {
        self.storage.content.read_all(descriptor.digest, MAX_DOCUMENT).await
    }

    async fn blob(&self, descriptor: &Descriptor) -> Result<BodyStream> {
        let reader = self.storage.content.reader(descriptor.digest).await.map_err(|e| {
            match e.is_not_found() {
                true => e.hint("the image was pulled lazily, or for another platform: pull it as a whole, or convert it from its registry"),
                false => e,
            }
        })?;
        let reading = Reading { reader, hasher: Hasher::new(), digest: descriptor.digest };
        let next = |mut reading: Reading| async move {
            match reading.reader.next().await? {
                Some(bytes) => {
                    reading.hasher.update(&bytes);
                    Ok(Some((bytes, reading)))
                }
                None if reading.hasher.finish() == reading.digest => Ok(None),
                None => Err(Fault::new(
                    Code::DataLoss,
                    format!("blob {} is damaged in the content store", reading.digest),
                )),
            }
        };
        Ok(stream::try_unfold(reading, next).boxed())
    }
}

#[async_trait]
impl LayerTarget for Stored {
    async fn layer(
        &self,
        input: Input,
        from: CompressionKind,
        packing: &Packing,
    ) -> Result<Packed> {
        let lease = self.lease().await?;
        let reference = format!("shipway-convert-{}", shipway_host::random_id()?);
        let ingest = Ingest { reference, expected: None, size: None };
        let mut writer = self.storage.content.writer(lease, ingest).await?;
        let (send, mut pieces) = mpsc::channel::<Bytes>(IN_FLIGHT);
        let work = packing.clone();
        let packing = blocking("convert a layer", move || {
            // A failing send means that the caller is gone.
            work.pack(input, from, &mut |bytes| {
                send.blocking_send(bytes).map_err(|_| Fault::cancelled())
            })
        });
        while let Some(bytes) = pieces.recv().await {
            writer.write(bytes).await?;
        }
        let packed = packing.await?;
        let labels = Labels::from([(UNCOMPRESSED.to_owned(), packed.diff_id().to_string())]);
        writer.commit(Some(packed.digest), &labels).await?;
        Ok(packed)
    }
}

#[async_trait]
impl Target for Stored {
    async fn copy(
        &self,
        descriptor: &Descriptor,
        source: &Arc<dyn Source>,
        progress: &Progress,
    ) -> Result<()> {
        let (digest, size) = (descriptor.digest, descriptor.size);
        let reference = format!("shipway-convert-{}", digest.hex());
        let ingest = Ingest { reference, expected: Some(digest), size: Some(size) };
        let mut writer = match self.storage.content.writer(self.lease().await?, ingest).await {
            Err(e) if e.is_already_exists() => {
                progress(Step { digest, converts: false, done: size, size });
                return Ok(());
            }
            writer => writer?,
        };
        if !writer.is_complete() {
            let (mut bytes, mut done) = (source.blob(descriptor).await?, 0);
            while let Some(piece) = bytes.next().await.transpose()? {
                done += piece.len() as u64;
                writer.write(piece).await?;
                progress(Step { digest, converts: false, done, size });
            }
        }
        writer.commit(Some(digest), &Labels::new()).await?;
        progress(Step { digest, converts: false, done: size, size });
        Ok(())
    }

    async fn config(&self, _: &Descriptor, bytes: Bytes) -> Result<()> {
        self.storage.content.put(self.lease().await?, bytes, &Labels::new()).await.map(drop)
    }

    async fn manifest(&self, _: &Descriptor, bytes: Bytes, children: &[Digest]) -> Result<()> {
        let children = children.iter().enumerate();
        let labels = children.map(|(n, d)| (format!("{GC_REF_CONTENT}.{n}"), d.to_string()));
        self.storage.content.put(self.lease().await?, bytes, &labels.collect()).await.map(drop)
    }

    async fn finish(&self, root: &Descriptor) -> Result<()> {
        self.storage.images.put(&self.name, root, &Labels::new()).await?;
        // The name keeps it now.
        self.abandon().await;
        Ok(())
    }
}
