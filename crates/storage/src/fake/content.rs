//! Blobs of the fake.

use super::{Blob, FakeStorage, filter::Filters, relabel};
use crate::{
    BlobInfo, BlobReader, BlobWriter, ContentStore, Ingest, Labels, LeaseId, LeaseResource,
};
use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use shipway_fault::{Code, Fault, Result};
use shipway_oci::Digest;

/// Small, so that callers meet more than one chunk.
const CHUNK: usize = 64 << 10;

fn info(digest: Digest, blob: &Blob) -> BlobInfo {
    BlobInfo { digest, size: blob.bytes.len() as u64, labels: blob.labels.clone() }
}

fn missing(digest: Digest) -> Fault {
    Fault::not_found(format!("blob {digest} is not stored"))
}

#[async_trait]
impl ContentStore for FakeStorage {
    async fn info(&self, digest: Digest) -> Result<BlobInfo> {
        self.state().blobs.get(&digest).map(|b| info(digest, b)).ok_or_else(|| missing(digest))
    }

    async fn list(&self, filters: &[String]) -> Result<Vec<BlobInfo>> {
        let filters = Filters::parse(filters)?;
        let state = self.state();
        let blobs = state.blobs.iter().filter(|(d, b)| {
            filters.matches(&|f| (f == "digest").then(|| d.to_string()), &b.labels)
        });
        Ok(blobs.map(|(d, b)| info(*d, b)).collect())
    }

    async fn update_labels(&self, digest: Digest, labels: &Labels) -> Result<BlobInfo> {
        let mut state = self.state();
        let blob = state.blobs.get_mut(&digest).ok_or_else(|| missing(digest))?;
        relabel(&mut blob.labels, labels);
        let info = info(digest, blob);
        state.committed(1);
        Ok(info)
    }

    async fn reader(&self, digest: Digest) -> Result<Box<dyn BlobReader>> {
        let state = self.state();
        let blob = state.blobs.get(&digest).ok_or_else(|| missing(digest))?;
        Ok(Box::new(Reader { bytes: blob.bytes.clone(), offset: 0 }))
    }

    async fn writer(&self, lease: &LeaseId, ingest: Ingest) -> Result<Box<dyn BlobWriter>> {
        let shared = ingest.expected.and_then(|digest| self.0.peers.blob(digest));
        let mut state = self.state();
        state.known(lease)?;
        state.committed(1);
        if let Some(digest) = ingest.expected.filter(|d| state.blobs.contains_key(d)) {
            state.keep(lease, LeaseResource::Content(digest))?;
            return Err(Fault::new(Code::AlreadyExists, format!("blob {digest} exists")));
        }
        if ingest.reference.is_empty() {
            return Err(Fault::internal("an ingest needs a reference"));
        }
        // As over gRPC, references are made unique below the port.
        state.next += 1;
        let reference = format!("{}-{}", ingest.reference, state.next);
        state.ingests.insert(reference.clone());
        Ok(Box::new(Writer {
            fake: self.clone(),
            lease: lease.clone(),
            ingest: Ingest { reference, ..ingest },
            complete: shared.is_some(),
            bytes: shared.unwrap_or_default().into(),
        }))
    }
}

struct Reader {
    bytes: Bytes,
    offset: usize,
}

#[async_trait]
impl BlobReader for Reader {
    fn size(&self) -> u64 {
        self.bytes.len() as u64
    }

    async fn next(&mut self) -> Result<Option<Bytes>> {
        let end = self.bytes.len().min(self.offset.saturating_add(CHUNK));
        if self.offset >= end {
            return Ok(None);
        }
        let chunk = self.bytes.slice(self.offset..end);
        self.offset = end;
        Ok(Some(chunk))
    }

    async fn seek(&mut self, offset: u64) -> Result<()> {
        self.offset = usize::try_from(offset).unwrap_or(usize::MAX);
        Ok(())
    }
}

struct Writer {
    fake: FakeStorage,
    lease: LeaseId,
    ingest: Ingest,
    /// Whether another namespace had the bytes.
    complete: bool,
    bytes: BytesMut,
}

#[async_trait]
impl BlobWriter for Writer {
    fn is_complete(&self) -> bool {
        self.complete
    }

    async fn write(&mut self, bytes: Bytes) -> Result<()> {
        if !self.complete {
            self.bytes.extend_from_slice(&bytes);
        }
        Ok(())
    }

    async fn commit(
        mut self: Box<Self>,
        expected: Option<Digest>,
        labels: &Labels,
    ) -> Result<BlobInfo> {
        let bytes = self.bytes.split().freeze();
        let digest = Digest::of(&bytes);
        for want in [expected, self.ingest.expected].into_iter().flatten() {
            if want != digest {
                return Err(Fault::new(
                    Code::FailedPrecondition,
                    format!("unexpected commit digest {digest}, expected {want}"),
                ));
            }
        }
        if let Some(size) = self.ingest.size.filter(|s| *s != bytes.len() as u64) {
            return Err(Fault::new(
                Code::DataLoss,
                format!("write blob {digest}: {} bytes came of {size} announced", bytes.len()),
            ));
        }
        let mut state = self.fake.state();
        state.keep(&self.lease, LeaseResource::Content(digest))?;
        state.committed(1);
        let blob =
            state.blobs.entry(digest).or_insert_with(|| Blob { bytes, labels: Labels::new() });
        relabel(&mut blob.labels, labels);
        Ok(info(digest, blob))
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.fake.state().ingests.remove(&self.ingest.reference);
    }
}
