//! `history export`: records as a bundle that Docker Desktop imports (row `bx.history.export`).
//!
//! A `.dockerbuild` file is an OCI layout in a gzipped tar. Each record is a manifest: its config
//! is the record, its layers are the files that are kept of the build. Several records lie in an
//! index. Traces are left out, since they may hold command lines of clients.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    io::IsTerminal as _,
    path::PathBuf,
    sync::Arc,
};

use async_trait::async_trait;
use bytes::Bytes;
use futures::{StreamExt as _, stream};
use shipway_client::{Client, HistoryBlob, HistoryRecord, HistoryResult};
use shipway_convert::Source;
use shipway_fault::{Code, Fault, Result};
use shipway_imagetools::{ArchiveKind, ArchiveWriter, Copier};
use shipway_oci::{Descriptor, Digest, Hasher, Index, Manifest, gojson, media};
use shipway_registry::BodyStream;

use super::records::{self, Found};
use crate::{builders::BuildState, output::NewFile};

/// Media type of a record.
const RECORD: &str = "application/vnd.buildkit.historyrecord.v0";
/// On a layer that is an image: its media type. Its own is another, so that nobody looks for what
/// the image names.
const WAS: &str = "vnd.export-build.descriptor.mediatype";
/// On a manifest in an index: the id of the build.
const REFERENCE: &str = "vnd.buildkit.history.reference";
/// Most bytes of a document that is read whole.
const MAX_DOCUMENT: u64 = 16 << 20;

/// Write builds to a file that Docker Desktop imports
///
/// Without their traces, and without what the daemon no longer has.
#[derive(clap::Args, Debug)]
pub(super) struct Args {
    /// Ids of builds, or ^N for the Nth before the latest [default: the latest]
    #[arg(value_name = "REF", conflicts_with = "all")]
    references: Vec<String>,
    /// The file, instead of standard output
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// All builds that ended
    #[arg(long)]
    all: bool,
    /// Let the daemon complete the records first
    #[arg(long)]
    finalize: bool,
}

/// What a bundle is made of: documents that were made, and blobs that the daemon has.
struct Contents {
    client: Client,
    made: HashMap<Digest, Bytes>,
}

impl Contents {
    fn put(&mut self, media_type: &str, value: &impl serde::Serialize) -> Result<Descriptor> {
        let bytes = gojson::to_string_pretty(value)
            .map_err(|e| Fault::internal(format!("encode a record: {e}")))?;
        let descriptor = Descriptor::of(media_type, bytes.as_bytes());
        self.made.insert(descriptor.digest, bytes.into());
        Ok(descriptor)
    }

    /// The blob as a layer; none if it is one already, or is gone.
    async fn layer(
        &self,
        blob: &HistoryBlob,
        seen: &mut HashSet<String>,
    ) -> Result<Option<Descriptor>> {
        if !seen.insert(blob.digest.clone()) {
            return Ok(None);
        }
        let digest: Digest = blob
            .digest
            .parse()
            .map_err(|e| Fault::invalid(format!("{:?} is not a valid digest: {e}", blob.digest)))?;
        let Some(size) = self.client.blob_size(&blob.digest).await? else {
            tracing::warn!("{digest} is left out: the daemon no longer has it");
            return Ok(None);
        };
        let mut layer = Descriptor::new(blob.media_type.clone(), digest, size);
        layer.annotations = blob.annotations.clone();
        Ok(Some(layer))
    }

    async fn result(
        &self,
        result: &HistoryResult,
        seen: &mut HashSet<String>,
        layers: &mut Vec<Descriptor>,
    ) -> Result<()> {
        for blob in &result.attestations {
            layers.extend(self.layer(blob, seen).await?);
        }
        for blob in result.results.values() {
            if let Some(mut layer) = self.layer(blob, seen).await? {
                layer.annotations.insert(WAS.to_owned(), layer.media_type);
                layer.media_type = "application/json".to_owned();
                layers.push(layer);
            }
        }
        Ok(())
    }

    async fn record(
        &mut self,
        record: &HistoryRecord,
        platform: &str,
        state: Option<&BuildState>,
    ) -> Result<Descriptor> {
        let record = HistoryRecord { trace: None, ..record.clone() };
        let mut value = record.bundled();
        value["DefaultPlatform"] = platform.into();
        if let Some(state) = state {
            value["localState"] =
                serde_json::to_value(state).map_err(|e| Fault::internal(e.to_string()))?;
        }
        let config = self.put(RECORD, &value)?;
        let (mut seen, mut layers) = (HashSet::new(), Vec::new());
        if let Some(logs) = &record.logs {
            layers.extend(self.layer(logs, &mut seen).await?);
        }
        if let Some(result) = &record.result {
            self.result(result, &mut seen, &mut layers).await?;
        }
        if let Some(failure) = &record.failure {
            layers.extend(self.layer(failure, &mut seen).await?);
        }
        for result in record.results.values() {
            self.result(result, &mut seen, &mut layers).await?;
        }
        let manifest = Manifest {
            schema_version: 2,
            media_type: Some(media::OCI_MANIFEST.to_owned()),
            artifact_type: None,
            config,
            layers,
            subject: None,
            annotations: BTreeMap::new(),
        };
        self.put(media::OCI_MANIFEST, &manifest)
    }
}

#[async_trait]
impl Source for Contents {
    async fn root(&self) -> Result<Descriptor> {
        Err(Fault::internal("a bundle is copied by its root"))
    }

    async fn manifest(&self, descriptor: &Descriptor) -> Result<Bytes> {
        match self.made.get(&descriptor.digest) {
            Some(bytes) => Ok(bytes.clone()),
            None => {
                let bytes = self.client.blob(&descriptor.digest.to_string(), MAX_DOCUMENT).await?;
                Ok(bytes.into())
            }
        }
    }

    async fn config(&self, descriptor: &Descriptor) -> Result<Bytes> {
        self.manifest(descriptor).await
    }

    async fn blob(&self, descriptor: &Descriptor) -> Result<BodyStream> {
        if let Some(bytes) = self.made.get(&descriptor.digest) {
            return Ok(stream::iter([Ok(bytes.clone())]).boxed());
        }
        let parts = self.client.blob_stream(&descriptor.digest.to_string()).await?.boxed();
        let next = |(mut parts, mut hasher, digest): (
            stream::BoxStream<'static, Result<Vec<u8>>>,
            Hasher,
            Digest,
        )| async move {
            match parts.next().await.transpose()? {
                Some(part) => {
                    hasher.update(&part);
                    Ok(Some((Bytes::from(part), (parts, hasher, digest))))
                }
                None if hasher.finish() == digest => Ok(None),
                None => Err(Fault::new(Code::DataLoss, format!("the blob {digest} is damaged"))),
            }
        };
        Ok(stream::try_unfold((parts, Hasher::new(), descriptor.digest), next).boxed())
    }
}

pub(super) async fn run(
    client: &Client,
    args: Args,
    state: impl Fn(&str) -> Option<BuildState>,
) -> Result<()> {
    if args.output.is_none() && std::io::stdout().is_terminal() {
        return Err(Fault::invalid("refusing to write to console, use --output to specify a file"));
    }
    let found = chosen(client, &args).await?;
    let workers = client.workers(Vec::new()).await?;
    let platform = workers.iter().flat_map(|w| &w.platforms).next();
    let platform = platform.map(|p| p.clone().normalized().to_string()).unwrap_or_default();
    let mut contents = Contents { client: client.clone(), made: HashMap::new() };
    let mut entries = Vec::new();
    for Found { record, .. } in &found {
        let state = state(&record.reference);
        let mut entry = contents.record(record, &platform, state.as_ref()).await?;
        if found.len() > 1 {
            entry.annotations.insert(REFERENCE.to_owned(), record.reference.clone());
        }
        entries.push(entry);
    }
    let root = match <[Descriptor; 1]>::try_from(entries) {
        Ok([only]) => only,
        Err(manifests) => {
            let index = Index {
                schema_version: 2,
                media_type: Some(media::OCI_INDEX.to_owned()),
                manifests,
                annotations: BTreeMap::new(),
            };
            contents.put(media::OCI_INDEX, &index)?
        }
    };
    let file = NewFile::open(args.output.as_deref())?;
    let writer = ArchiveWriter::new(ArchiveKind::OciGzip, file.writer()?).await?;
    let target = writer.unnamed();
    let source: Arc<dyn Source> = Arc::new(contents);
    Copier::new(target.clone(), Arc::new(|_| {})).copy(&source, &root).await?;
    target.finish(&root).await?;
    writer.finish().await?;
    file.keep()
}

/// The records that are exported.
async fn chosen(client: &Client, args: &Args) -> Result<Vec<Found>> {
    let ended = |found: &Found| found.record.completed_at.is_some();
    let mut chosen = Vec::new();
    match (args.all, args.references.as_slice()) {
        (true, _) => {
            chosen = records::list(client, "", &[]).await?;
            chosen.retain(ended);
        }
        (false, []) => {
            let mut all = records::list(client, "", &[]).await?;
            all.retain(ended);
            chosen.extend(all.into_iter().next());
        }
        (false, references) => {
            for reference in references {
                let found = records::find(client, reference).await?;
                if !ended(&found) {
                    return Err(Fault::new(
                        Code::FailedPrecondition,
                        format!("the build {} still runs", found.record.reference),
                    )
                    .hint("`shipway history logs` follows it to its end"));
                }
                chosen.push(found);
            }
        }
    }
    if chosen.is_empty() {
        return Err(Fault::not_found("no records found"));
    }
    if args.finalize {
        for found in &mut chosen {
            let reference = found.record.reference.clone();
            client.finalize_history(&reference).await?;
            *found = records::find(client, &reference).await?;
        }
    }
    Ok(chosen)
}
