//! Owns the content port over containerd's Content service: information, labels, and the way in and
//! out of blobs (`write` and `read` hold the streams).

mod read;
mod write;

use crate::{
    conn::{Connection, MAX_MESSAGE, deadline},
    wire,
};
use async_trait::async_trait;
use bytes::Bytes;
use containerd_client::services::v1::{
    self as api, content_client::ContentClient, leases_client::LeasesClient,
};
use shipway_fault::{Fault, Result};
use shipway_grpc::TracedChannel;
use shipway_oci::Digest;
use shipway_storage::{BlobInfo, BlobReader, BlobWriter, ContentStore, Ingest, Labels, LeaseId};

/// How often bytes are stored that others take away at the same time.
const PUTS: usize = 5;

/// Blobs of one namespace. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Content {
    connection: Connection,
}

impl Content {
    pub(crate) fn new(connection: Connection) -> Self {
        Self { connection }
    }

    fn client(&self) -> ContentClient<TracedChannel> {
        limited(ContentClient::new(self.connection.control()))
    }

    fn bulk(&self) -> ContentClient<TracedChannel> {
        limited(ContentClient::new(self.connection.bulk()))
    }

    /// Puts a blob that exists already into `lease`: containerd does so itself in some of the cases
    /// only.
    async fn keep(&self, lease: &LeaseId, digest: Digest) -> Result<()> {
        let resource = api::Resource { id: digest.to_string(), r#type: "content".into() };
        let request = self
            .connection
            .request(api::AddResourceRequest { id: lease.0.clone(), resource: Some(resource) })?;
        let mut leases = LeasesClient::new(self.connection.control());
        self.connection
            .call(
                || format!("add blob {digest} to lease {:?}", lease.0),
                deadline::QUICK,
                leases.add_resource(request),
            )
            .await
    }

    /// The information of a blob that another client stored first, with `labels` added and kept by
    /// `lease`.
    async fn adopt(&self, lease: &LeaseId, digest: Digest, labels: &Labels) -> Result<BlobInfo> {
        self.keep(lease, digest).await?;
        if labels.is_empty() {
            self.info(digest).await
        } else {
            self.update_labels(digest, labels).await
        }
    }

    async fn put_once(
        &self,
        lease: &LeaseId,
        digest: Digest,
        bytes: &Bytes,
        labels: &Labels,
    ) -> Result<()> {
        match write::put(self, lease, digest, bytes, labels).await {
            Err(e) if e.is_already_exists() => self.adopt(lease, digest, labels).await.map(drop),
            stored => stored,
        }
    }
}

fn limited(client: ContentClient<TracedChannel>) -> ContentClient<TracedChannel> {
    client.max_decoding_message_size(MAX_MESSAGE).max_encoding_message_size(MAX_MESSAGE)
}

fn info(info: Option<api::Info>) -> Result<BlobInfo> {
    let info = info
        .ok_or_else(|| Fault::internal("containerd sent an answer without a blob's information"))?;
    Ok(BlobInfo {
        digest: wire::digest_in(&info.digest)?,
        size: info.size.max(0) as u64,
        labels: wire::labels_in(info.labels),
    })
}

#[async_trait]
impl ContentStore for Content {
    async fn info(&self, digest: Digest) -> Result<BlobInfo> {
        let request = self.connection.request(api::InfoRequest { digest: digest.to_string() })?;
        let answer = self
            .connection
            .call(|| format!("look up blob {digest}"), deadline::QUICK, self.client().info(request))
            .await?;
        info(answer.info)
    }

    async fn list(&self, filters: &[String]) -> Result<Vec<BlobInfo>> {
        let request =
            self.connection.request(api::ListContentRequest { filters: filters.to_vec() })?;
        let what = || "list blobs".to_owned();
        let mut stream =
            self.connection.call(what, deadline::SLOW, self.client().list(request)).await?;
        let mut all = Vec::new();
        loop {
            match tokio::time::timeout(deadline::SLOW, stream.message()).await {
                Ok(Ok(Some(batch))) => {
                    for blob in batch.info {
                        all.push(info(Some(blob))?);
                    }
                }
                Ok(Ok(None)) => return Ok(all),
                Ok(Err(status)) => return Err(self.connection.fault(what(), status)),
                Err(_) => return Err(self.connection.stalled(what(), deadline::SLOW)),
            }
        }
    }

    async fn update_labels(&self, digest: Digest, labels: &Labels) -> Result<BlobInfo> {
        let changed = api::Info {
            digest: digest.to_string(),
            labels: wire::labels_out(labels),
            ..Default::default()
        };
        let request = self.connection.request(api::UpdateRequest {
            info: Some(changed),
            update_mask: wire::mask(wire::label_paths(labels)),
        })?;
        let answer = self
            .connection
            .call(
                || format!("set labels of blob {digest}"),
                deadline::QUICK,
                self.client().update(request),
            )
            .await?;
        info(answer.info)
    }

    async fn reader(&self, digest: Digest) -> Result<Box<dyn BlobReader>> {
        let size = self.info(digest).await?.size;
        Ok(Box::new(read::Reader::new(self.clone(), digest, size)))
    }

    async fn writer(&self, lease: &LeaseId, ingest: Ingest) -> Result<Box<dyn BlobWriter>> {
        Ok(Box::new(write::Writer::open(self.clone(), lease, ingest).await?))
    }

    async fn put(&self, lease: &LeaseId, bytes: Bytes, labels: &Labels) -> Result<Digest> {
        let digest = Digest::of(&bytes);
        for _ in 1..PUTS {
            match self.put_once(lease, digest, &bytes, labels).await {
                // It was there, and was collected before the lease had it.
                Err(e) if e.is_not_found() => {}
                done => return done.map(|()| digest),
            }
        }
        self.put_once(lease, digest, &bytes, labels).await.map(|()| digest)
    }
}
