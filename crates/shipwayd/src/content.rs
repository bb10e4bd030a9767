//! containerd's Content service, read-only (row `content.ro`): blobs of the build cache, what
//! builds wrote, and the logs of finished builds. The namespace may be shared, for
//! example with Kubernetes: its other images are not served.

use crate::control::caller;
use parking_lot::Mutex;
use shipway_fault::{Fault, Result};
use shipway_grpc::status_of;
use shipway_history::History;
use shipway_identity::Caller;
use shipway_oci::{Descriptor, Digest};
use shipway_proto::containerd::services::content::v1 as wire;
use shipway_refs::{DOCUMENT_KIND, RefStore};
use shipway_storage::{LeaseId, Storage};
use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};
use tokio::io::{AsyncReadExt as _, AsyncSeekExt as _};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

/// Chunks of a read.
const CHUNK: usize = 1 << 20;

/// Largest manifest or index that is read to see what a build wrote.
const MAX_DOCUMENT: u64 = 8 << 20;
/// Most blobs that one thing a build wrote leads to.
const MAX_PARTS: usize = 10_000;

/// The service.
pub struct ContentService {
    storage: Storage,
    refs: RefStore,
    history: Arc<History>,
    /// What written indexes and manifests lead to, once it was read.
    parts: Mutex<HashMap<Digest, Arc<HashSet<Digest>>>>,
}

/// What an index or a manifest names.
#[derive(Default, serde::Deserialize)]
#[serde(default)]
struct Document {
    manifests: Vec<Descriptor>,
    config: Option<Descriptor>,
    layers: Vec<Descriptor>,
}

/// What may be read.
#[derive(Default)]
struct Ours {
    /// Blobs of cached layers.
    cached: HashSet<Digest>,
    /// Leases of manifests and configs that are kept for the next build.
    documents: HashSet<LeaseId>,
    /// What builds wrote.
    written: Vec<Arc<HashSet<Digest>>>,
}

impl Ours {
    fn contains(&self, digest: Digest) -> bool {
        self.cached.contains(&digest)
            || self.documents.contains(&shipway_sources::document_lease(digest))
            || self.written.iter().any(|parts| parts.contains(&digest))
    }
}

type Answer<T> = std::result::Result<Response<T>, Status>;
type Chunks = ReceiverStream<std::result::Result<wire::ReadContentResponse, Status>>;

fn digest(text: &str) -> Result<Digest, Status> {
    text.parse().map_err(|e: shipway_oci::DigestError| Status::invalid_argument(e.to_string()))
}

fn read_only<T>(what: &str) -> Answer<T> {
    Err(status_of(&Fault::unimplemented(format!(
        "{what}: content is read-only on this socket, so {what}"
    ))))
}

impl ContentService {
    /// The blobs of `storage` that `refs` keeps or that `history` has written, and the files of
    /// `history`.
    pub fn new(storage: Storage, refs: RefStore, history: Arc<History>) -> Self {
        Self { storage, refs, history, parts: Mutex::default() }
    }

    /// What `caller` may read: where that is not everything, what their own builds wrote, and
    /// nothing of the cache, which has what others built.
    async fn ours(&self, caller: &Caller) -> Result<Ours> {
        let mut roots = self.history.written(|s| caller.sees(s.owner.as_deref()));
        if !caller.sees(None) {
            return Ok(Ours { written: self.parts_of_all(&roots).await?, ..Ours::default() });
        }
        let (label, value) = DOCUMENT_KIND;
        let documents = self.storage.leases.list(&[format!("labels.\"{label}\"=={value}")]).await?;
        // The history forgets; an image that was built here says so itself.
        roots.extend(
            self.storage
                .images
                .list(&[])
                .await?
                .into_iter()
                .filter(|i| i.built().is_some())
                .map(|i| i.target.digest),
        );
        let written = self.parts_of_all(&roots).await?;
        self.parts.lock().retain(|root, _| roots.contains(root));
        Ok(Ours {
            cached: self.refs.blobs_kept(),
            documents: documents.into_iter().map(|l| l.id).collect(),
            written,
        })
    }

    async fn parts_of_all(&self, roots: &HashSet<Digest>) -> Result<Vec<Arc<HashSet<Digest>>>> {
        let mut all = Vec::with_capacity(roots.len());
        for root in roots {
            all.push(self.parts_of(*root).await?);
        }
        Ok(all)
    }

    /// Everything that `root`, which a build wrote, leads to.
    async fn parts_of(&self, root: Digest) -> Result<Arc<HashSet<Digest>>> {
        if let Some(known) = self.parts.lock().get(&root) {
            return Ok(known.clone());
        }
        let (mut parts, mut queue, mut whole) = (HashSet::from([root]), vec![root], true);
        while let Some(document) = queue.pop().filter(|_| parts.len() < MAX_PARTS) {
            let bytes = match self.storage.content.read_all(document, MAX_DOCUMENT).await {
                Ok(bytes) => bytes,
                Err(fault) if fault.is_not_found() => {
                    whole = false;
                    continue;
                }
                Err(fault) => return Err(fault),
            };
            let Ok(named) = serde_json::from_slice::<Document>(&bytes) else { continue };
            queue.extend(named.manifests.iter().map(|d| d.digest).filter(|d| parts.insert(*d)));
            parts.extend(named.config.iter().chain(&named.layers).map(|d| d.digest));
        }
        let parts = Arc::new(parts);
        // What is not all there now may be later.
        if whole {
            self.parts.lock().insert(root, parts.clone());
        }
        Ok(parts)
    }

    /// Refuses what is not ours, as if it were not there.
    async fn check(&self, digest: Digest, caller: &Caller) -> Result<(), Status> {
        match self.ours(caller).await {
            Ok(ours) if ours.contains(digest) => Ok(()),
            Ok(_) => Err(Status::not_found(format!("content {digest}: not found"))),
            Err(fault) => Err(status_of(&fault)),
        }
    }

    /// The length of the file of the history with this digest, if there is one that `caller` may
    /// see.
    fn size_of_file(&self, digest: Digest, caller: &Caller) -> Option<u64> {
        self.history.knows_of(digest, |s| caller.sees(s.owner.as_deref()))
    }

    /// The file of the history with this digest, if there is one that `caller` may see.
    async fn file(
        &self,
        digest: Digest,
        caller: &Caller,
    ) -> Result<Option<tokio::fs::File>, Status> {
        if self.size_of_file(digest, caller).is_none() {
            return Ok(None);
        }
        let history = self.history.clone();
        let open = move || history.open_file(digest);
        let opened = shipway_task::blocking("open a file of the history", open).await;
        opened.map(|file| file.map(tokio::fs::File::from_std)).map_err(|f| status_of(&f))
    }
}

async fn send(
    tx: &tokio::sync::mpsc::Sender<Result<wire::ReadContentResponse, Status>>,
    offset: u64,
    data: Vec<u8>,
) -> bool {
    tx.send(Ok(wire::ReadContentResponse { offset: offset as i64, data })).await.is_ok()
}

#[tonic::async_trait]
impl wire::content_server::Content for ContentService {
    async fn info(&self, request: Request<wire::InfoRequest>) -> Answer<wire::InfoResponse> {
        let (caller, request) = (caller(&request)?, request.into_inner());
        let digest = digest(&request.digest)?;
        let (size, labels) = match self.size_of_file(digest, &caller) {
            Some(size) => (size, Default::default()),
            None => {
                self.check(digest, &caller).await?;
                let info = self.storage.content.info(digest).await.map_err(|f| status_of(&f))?;
                (info.size, info.labels)
            }
        };
        let info = wire::Info {
            digest: digest.to_string(),
            size: size as i64,
            labels,
            ..Default::default()
        };
        Ok(Response::new(wire::InfoResponse { info: Some(info) }))
    }

    type ReadStream = Chunks;

    async fn read(&self, request: Request<wire::ReadContentRequest>) -> Answer<Chunks> {
        let (caller, request) = (caller(&request)?, request.into_inner());
        let digest = digest(&request.digest)?;
        let offset =
            u64::try_from(request.offset).map_err(|_| Status::out_of_range("negative offset"))?;
        let limit = if request.size > 0 { request.size as u64 } else { u64::MAX };
        let (tx, rx) = tokio::sync::mpsc::channel(4);
        if let Some(mut file) = self.file(digest, &caller).await? {
            let fail = |e| status_of(&Fault::io(format!("read the log {digest}"), e));
            file.seek(std::io::SeekFrom::Start(offset)).await.map_err(fail)?;
            shipway_task::spawn("send a file", async move {
                let (mut at, mut left) = (offset, limit);
                let mut buffer = vec![0; CHUNK];
                while let Ok(n) = file.read(&mut buffer).await {
                    let n = (n as u64).min(left);
                    if n == 0 || !send(&tx, at, buffer[..n as usize].to_vec()).await {
                        break;
                    }
                    at += n;
                    left -= n;
                }
            });
            return Ok(Response::new(ReceiverStream::new(rx)));
        }
        self.check(digest, &caller).await?;
        let mut reader = self.storage.content.reader(digest).await.map_err(|f| status_of(&f))?;
        if offset > reader.size() {
            return Err(Status::out_of_range(format!(
                "offset {offset} is past the end of {digest}"
            )));
        }
        reader.seek(offset).await.map_err(|f| status_of(&f))?;
        shipway_task::spawn("send a blob", async move {
            let (mut at, mut left) = (offset, limit);
            loop {
                match reader.next().await {
                    Ok(Some(bytes)) if left > 0 => {
                        let n = (bytes.len() as u64).min(left);
                        if !send(&tx, at, bytes[..n as usize].to_vec()).await {
                            break;
                        }
                        at += n;
                        left -= n;
                    }
                    Ok(_) => break,
                    Err(fault) => {
                        let _ = tx.send(Err(status_of(&fault))).await;
                        break;
                    }
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(rx)))
    }

    type ListStream = ReceiverStream<std::result::Result<wire::ListContentResponse, Status>>;

    async fn list(&self, request: Request<wire::ListContentRequest>) -> Answer<Self::ListStream> {
        let (caller, request) = (caller(&request)?, request.into_inner());
        let mut blobs =
            self.storage.content.list(&request.filters).await.map_err(|f| status_of(&f))?;
        let ours = self.ours(&caller).await.map_err(|f| status_of(&f))?;
        blobs.retain(|b| ours.contains(b.digest));
        let (tx, rx) = tokio::sync::mpsc::channel(4);
        shipway_task::spawn("list blobs", async move {
            for part in blobs.chunks(100) {
                let info = part.iter().map(|b| wire::Info {
                    digest: b.digest.to_string(),
                    size: b.size as i64,
                    labels: b.labels.clone(),
                    ..Default::default()
                });
                if tx.send(Ok(wire::ListContentResponse { info: info.collect() })).await.is_err() {
                    break;
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(rx)))
    }

    async fn update(&self, _: Request<wire::UpdateRequest>) -> Answer<wire::UpdateResponse> {
        read_only("Update")
    }

    async fn delete(&self, _: Request<wire::DeleteContentRequest>) -> Answer<()> {
        read_only("Delete")
    }

    async fn status(&self, _: Request<wire::StatusRequest>) -> Answer<wire::StatusResponse> {
        read_only("Status")
    }

    async fn list_statuses(
        &self,
        _: Request<wire::ListStatusesRequest>,
    ) -> Answer<wire::ListStatusesResponse> {
        read_only("ListStatuses")
    }

    type WriteStream = tokio_stream::Empty<std::result::Result<wire::WriteContentResponse, Status>>;

    async fn write(
        &self,
        _: Request<Streaming<wire::WriteContentRequest>>,
    ) -> Answer<Self::WriteStream> {
        read_only("Write")
    }

    async fn abort(&self, _: Request<wire::AbortRequest>) -> Answer<()> {
        read_only("Abort")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use shipway_history::{HistoryEncoders, HistoryLimits};
    use shipway_storage::{Labels, fake::FakeStorage};
    use tokio_stream::StreamExt as _;
    use wire::content_server::Content as _;

    /// A request of a daemon that asks nobody who they are.
    fn asked<T>(message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.extensions_mut().insert(Caller::unrestricted());
        request
    }

    #[tokio::test]
    async fn what_others_have_in_the_namespace_is_not_served() {
        let (fake, dir) = (FakeStorage::new().unwrap(), tempfile::tempdir().unwrap());
        let storage = fake.storage();
        let refs = RefStore::open(storage.clone(), dir.path().join("refs")).await.unwrap();
        let encode =
            HistoryEncoders { log: Arc::new(|_, _| Ok(())), fault: Arc::new(|_| Vec::new()) };
        let history =
            History::open(dir.path().join("history"), HistoryLimits::default(), encode).unwrap();
        let service = ContentService::new(storage.clone(), refs, Arc::new(history));
        let put = async |lease: LeaseId, labels: Labels, bytes: &'static [u8]| {
            storage.leases.create(&lease, &labels).await.unwrap();
            storage.content.put(&lease, bytes.into(), &Labels::new()).await.unwrap()
        };
        let theirs = put(LeaseId("cri".into()), Labels::new(), b"secret").await;
        let document = Digest::of(b"ours");
        let kind = Labels::from([(DOCUMENT_KIND.0.to_owned(), DOCUMENT_KIND.1.to_owned())]);
        put(shipway_sources::document_lease(document), kind, b"ours").await;

        let info = async |digest: Digest| {
            service.info(asked(wire::InfoRequest { digest: digest.to_string() })).await.map(drop)
        };
        assert_eq!(info(theirs).await.unwrap_err().code(), tonic::Code::NotFound);
        info(document).await.unwrap();
        let read = async |digest: Digest| {
            service
                .read(asked(wire::ReadContentRequest {
                    digest: digest.to_string(),
                    ..Default::default()
                }))
                .await
                .map(drop)
        };
        assert_eq!(read(theirs).await.unwrap_err().code(), tonic::Code::NotFound);
        read(document).await.unwrap();
        let mut listed =
            service.list(asked(wire::ListContentRequest::default())).await.unwrap().into_inner();
        let mut digests = Vec::new();
        while let Some(part) = listed.next().await {
            digests.extend(part.unwrap().info.into_iter().map(|i| i.digest));
        }
        assert_eq!(digests, [document.to_string()]);
    }
}
