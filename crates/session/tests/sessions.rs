//! A hub with clients that are served in-process over real tunnels.

use parking_lot::Mutex;
use std::{collections::BTreeMap, pin::Pin, sync::Arc, time::Duration};

use bytes::Bytes;
use futures::{Stream, StreamExt};
use shipway_fault::{Code, Fault};
use shipway_filesync::{
    FileSyncRequest, Packet, PacketStream, ReceiveOptions, Receiver, SendOptions, SendRoot, Sender,
    packets,
};
use shipway_grpc::{
    Answers, Duplex, FileSend, FileSendServer, RawAnswers, TunnelPeer, fault_of, serve_tunnel,
    status_of,
};
use shipway_oci::Digest;
use shipway_proto::{
    containerd::services::content::v1::{
        self as content,
        content_server::{Content, ContentServer},
    },
    grpc::health::v1::{
        HealthCheckRequest, HealthCheckResponse,
        health_server::{Health, HealthServer},
    },
    moby::{
        buildkit::secrets::v1::{
            GetSecretRequest, GetSecretResponse,
            secrets_server::{Secrets, SecretsServer},
        },
        exporter::v1::{
            ExporterRequest, FinalizeExportRequest, FinalizeExportResponse, FindExportersRequest,
            FindExportersResponse,
            exporter_server::{Exporter, ExporterServer},
        },
        filesync::v1::{
            BytesMessage,
            file_sync_server::{FileSync, FileSyncServer},
        },
        sshforward::v1::{
            BytesMessage as SshBytes, CheckAgentRequest, CheckAgentResponse,
            ssh_server::{Ssh, SshServer},
        },
    },
};
use shipway_session::*;
use shipway_storage::BlobReader as _;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tonic::{Request, Response, Status, Streaming, metadata::MetadataMap, service::Routes};

/// A client with one directory, one secret, one agent and two export targets.
#[derive(Clone)]
struct Client {
    dir: Arc<tempfile::TempDir>,
    out: Arc<Mutex<Vec<u8>>>,
    healthy: bool,
}

type Stream_<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl Health for Client {
    type WatchStream = tokio_stream::Empty<Result<HealthCheckResponse, Status>>;
    async fn check(
        &self,
        _: Request<HealthCheckRequest>,
    ) -> Result<Response<HealthCheckResponse>, Status> {
        if self.healthy {
            Ok(Response::new(HealthCheckResponse { status: 1 }))
        } else {
            std::future::pending().await
        }
    }
    async fn watch(
        &self,
        _: Request<HealthCheckRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        Err(Status::unimplemented(""))
    }
}

fn packet_stream(
    incoming: impl Stream<Item = Result<Packet, Status>> + Send + 'static,
) -> (PacketStream, Stream_<Packet>) {
    let (sink, stream) = packets();
    (
        PacketStream::new(incoming.map(|p| p.map_err(|s| fault_of(&s))), sink),
        Box::pin(stream.map(Ok)),
    )
}

#[tonic::async_trait]
impl FileSync for Client {
    type DiffCopyStream = Stream_<Packet>;
    type TarStreamStream = Stream_<Packet>;
    async fn diff_copy(
        &self,
        request: Request<Streaming<Packet>>,
    ) -> Result<Response<Self::DiffCopyStream>, Status> {
        let metadata = request.metadata().clone();
        let values = |key: &str| {
            metadata
                .get_all(key)
                .iter()
                .filter_map(|v| v.to_str().ok().map(str::to_owned))
                .collect()
        };
        let asked = FileSyncRequest::from_pairs(values);
        if asked.dir_name != "context" {
            return Err(status_of(&Fault::not_found(format!(
                "no access allowed to dir {:?}",
                asked.dir_name
            ))));
        }
        let options = SendOptions {
            include: asked.include,
            exclude: asked.exclude,
            follow: asked.follow,
            ..SendOptions::default()
        };
        let (stream, answers) = packet_stream(request.into_inner());
        shipway_task::spawn("test", Sender::new(self.dir.path(), options).run(stream));
        Ok(Response::new(answers))
    }
    async fn tar_stream(
        &self,
        _: Request<Streaming<Packet>>,
    ) -> Result<Response<Self::TarStreamStream>, Status> {
        Err(Status::unimplemented(""))
    }
}

#[tonic::async_trait]
impl Secrets for Client {
    async fn get_secret(
        &self,
        request: Request<GetSecretRequest>,
    ) -> Result<Response<GetSecretResponse>, Status> {
        match &*request.into_inner().id {
            "token" => Ok(Response::new(GetSecretResponse { data: b"s3cret".to_vec() })),
            "broken" => Err(Status::internal("helper failed")),
            id => Err(Status::not_found(format!("secret {id}"))),
        }
    }
}

#[tonic::async_trait]
impl Ssh for Client {
    type ForwardAgentStream = Answers<SshBytes>;
    async fn check_agent(
        &self,
        request: Request<CheckAgentRequest>,
    ) -> Result<Response<CheckAgentResponse>, Status> {
        match &*request.into_inner().id {
            "default" => Ok(Response::new(CheckAgentResponse {})),
            id => Err(Status::unknown(format!("unset ssh forward key {id}"))),
        }
    }
    async fn forward_agent(
        &self,
        request: Request<Streaming<SshBytes>>,
    ) -> Result<Response<Self::ForwardAgentStream>, Status> {
        let (mut duplex, answers) = Duplex::answering(request.into_inner());
        shipway_task::spawn("test", async move {
            let mut text = Vec::new();
            duplex.read_to_end(&mut text).await.expect("read");
            text.reverse();
            duplex.write_all(&text).await.expect("write");
            duplex.shutdown().await.expect("shutdown");
        });
        Ok(Response::new(answers))
    }
}

#[tonic::async_trait]
impl FileSend for Client {
    async fn diff_copy(
        &self,
        request: Request<Streaming<Bytes>>,
    ) -> Result<Response<RawAnswers>, Status> {
        let id = request
            .metadata()
            .get("buildkit-attachable-exporter-id")
            .and_then(|v| v.to_str().ok())
            .unwrap_or("0")
            .to_owned();
        let name = request
            .metadata()
            .get("exporter-md-name")
            .and_then(|v| v.to_str().ok())
            .unwrap_or_default()
            .to_owned();
        let mut incoming = request.into_inner();
        match &*id {
            "0" => {
                let mut out = name.into_bytes();
                while let Some(message) = incoming.message().await? {
                    out.extend(decode::<BytesMessage>(message)?.data);
                }
                *self.out.lock() = out;
                Ok(Response::new(Box::pin(futures::stream::empty())))
            }
            "1" => Err(Status::already_exists("target already exists")),
            _ => {
                let (stream, answers) =
                    packet_stream(incoming.map(|m| m.and_then(decode::<Packet>)));
                let dest = self.dir.path().join("exported");
                std::fs::create_dir(&dest).expect("dir");
                shipway_task::spawn(
                    "test",
                    Receiver::new(&dest, ReceiveOptions { merge: true, ..Default::default() })
                        .run(stream),
                );
                Ok(Response::new(Box::pin(
                    answers.map(|p| p.map(|p| Bytes::from(prost_encode(&p)))),
                )))
            }
        }
    }
}

fn decode<M: prost::Message + Default>(bytes: Bytes) -> Result<M, Status> {
    M::decode(bytes).map_err(|e| Status::invalid_argument(e.to_string()))
}

/// A store in which every blob has four bytes, and which sends what the store's name says.
#[tonic::async_trait]
impl Content for Client {
    type ListStream = tokio_stream::Empty<Result<content::ListContentResponse, Status>>;
    type ReadStream = Stream_<content::ReadContentResponse>;
    type WriteStream = tokio_stream::Empty<Result<content::WriteContentResponse, Status>>;
    async fn info(
        &self,
        _: Request<content::InfoRequest>,
    ) -> Result<Response<content::InfoResponse>, Status> {
        Ok(Response::new(content::InfoResponse {
            info: Some(content::Info { size: 4, ..Default::default() }),
        }))
    }
    async fn read(
        &self,
        request: Request<content::ReadContentRequest>,
    ) -> Result<Response<Self::ReadStream>, Status> {
        let pieces = request
            .metadata()
            .get("buildkit-attachable-store-id")
            .map_or("", |id| id.to_str().unwrap_or_default());
        let pieces: Vec<_> = pieces
            .split('+')
            .map(|p| Ok(content::ReadContentResponse { offset: 0, data: p.into() }))
            .collect();
        Ok(Response::new(Box::pin(futures::stream::iter(pieces))))
    }
    async fn update(
        &self,
        _: Request<content::UpdateRequest>,
    ) -> Result<Response<content::UpdateResponse>, Status> {
        Err(Status::unimplemented(""))
    }
    async fn list(
        &self,
        _: Request<content::ListContentRequest>,
    ) -> Result<Response<Self::ListStream>, Status> {
        Err(Status::unimplemented(""))
    }
    async fn delete(
        &self,
        _: Request<content::DeleteContentRequest>,
    ) -> Result<Response<()>, Status> {
        Err(Status::unimplemented(""))
    }
    async fn status(
        &self,
        _: Request<content::StatusRequest>,
    ) -> Result<Response<content::StatusResponse>, Status> {
        Err(Status::unimplemented(""))
    }
    async fn list_statuses(
        &self,
        _: Request<content::ListStatusesRequest>,
    ) -> Result<Response<content::ListStatusesResponse>, Status> {
        Err(Status::unimplemented(""))
    }
    async fn write(
        &self,
        _: Request<Streaming<content::WriteContentRequest>>,
    ) -> Result<Response<Self::WriteStream>, Status> {
        Err(Status::unimplemented(""))
    }
    async fn abort(&self, _: Request<content::AbortRequest>) -> Result<Response<()>, Status> {
        Err(Status::unimplemented(""))
    }
}

fn prost_encode(message: &impl prost::Message) -> Vec<u8> {
    message.encode_to_vec()
}

impl Client {
    fn new() -> Self {
        Self {
            dir: Arc::new(tempfile::tempdir().expect("dir")),
            out: Arc::default(),
            healthy: true,
        }
    }

    fn metadata(id: &str) -> MetadataMap {
        let mut metadata = MetadataMap::new();
        metadata.insert("x-docker-expose-session-uuid", id.parse().expect("ascii"));
        metadata.insert("x-docker-expose-session-sharedkey", "key".parse().expect("ascii"));
        for method in ["/moby.filesync.v1.FileSync/DiffCopy", "/moby.filesync.v1.FileSend/DiffCopy"]
        {
            metadata.append("x-docker-expose-session-grpc-method", method.parse().expect("ascii"));
        }
        metadata
    }

    /// Attaches to `hub`; dropping or aborting the task disconnects.
    async fn attach(
        &self,
        hub: &SessionHub,
        metadata: &MetadataMap,
    ) -> (Session, tokio::task::JoinHandle<()>) {
        let (ours, theirs) = tokio::io::duplex(256 << 10);
        let routes = Routes::new(HealthServer::new(self.clone()))
            .add_service(FileSyncServer::new(self.clone()))
            .add_service(SecretsServer::new(self.clone()))
            .add_service(SshServer::new(self.clone()))
            .add_service(ContentServer::new(self.clone()))
            .add_service(FileSendServer::new(self.clone()));
        let task = shipway_task::spawn("test", async move {
            _ = serve_tunnel(theirs, routes, TunnelPeer::Daemon).await
        });
        (hub.register(metadata, ours).await.expect("registers"), task)
    }
}

async fn attached() -> (Client, Session, tokio::task::JoinHandle<()>) {
    let client = Client::new();
    let (session, task) = client.attach(&SessionHub::new(), &Client::metadata("s1")).await;
    (client, session, task)
}

#[tokio::test]
async fn a_session_is_found_by_id_and_by_prefixed_id_until_it_ends() {
    let hub = SessionHub::new();
    let waiting = shipway_task::spawn("test", {
        let hub = hub.clone();
        async move { hub.get(&"local:s1".into()).await }
    });
    tokio::task::yield_now().await;
    let (session, task) = Client::new().attach(&hub, &Client::metadata("s1")).await;
    assert_eq!(waiting.await.expect("no panic").expect("found").id(), session.id());
    assert_eq!(
        (
            session.shared_key(),
            session.supports("/MOBY.filesync.v1.filesync/diffcopy"),
            session.supports("/x/Y")
        ),
        ("key", true, false)
    );
    task.abort();
    session.closed().await;
    assert!(hub.try_get(session.id()).is_none());
    assert_eq!(session.secret("token").await.expect_err("gone").code(), Code::Unavailable);
}

#[tokio::test(start_paused = true)]
async fn an_absent_session_is_waited_for_and_then_named() {
    let hub = SessionHub::new();
    let started = tokio::time::Instant::now();
    let fault = hub.get(&"nobody".into()).await.expect_err("absent");
    assert_eq!(fault.to_string(), "no active session for nobody: context deadline exceeded");
    assert_eq!(started.elapsed(), Duration::from_secs(5));
    assert!(hub.register(&MetadataMap::new(), tokio::io::duplex(1).0).await.is_err());
    let empty = SessionGroup::new(hub, []).any(|_| async { Ok(()) }).await;
    assert_eq!(empty.expect_err("nobody").to_string(), "no active sessions");
}

#[tokio::test]
async fn a_newer_session_takes_the_place_of_an_older_one() {
    let hub = SessionHub::new();
    let client = Client::new();
    let (old, old_task) = client.attach(&hub, &Client::metadata("s")).await;
    let (new, _task) = client.attach(&hub, &Client::metadata("s")).await;
    old_task.abort();
    old.closed().await;
    tokio::task::yield_now().await;
    assert!(!hub.get(new.id()).await.expect("the newer").is_closed());
    hub.close_all();
    new.closed().await;
}

#[tokio::test]
async fn a_session_is_its_owners_and_its_id_is_not_taken_over() {
    let all = SessionHub::new();
    let of = |name: &str| all.of_owner(Some(name.into()));
    let (anns, bobs) = (of("ann"), of("bob"));
    let client = Client::new();
    let (session, task) = client.attach(&anns, &Client::metadata("s")).await;
    let found = |hub: &SessionHub| hub.try_get(session.id()).is_some();
    assert!(found(&anns) && found(&all) && !found(&bobs));
    let group = SessionGroup::new(bobs.clone(), [session.id().clone()]);
    assert!(group.hub().try_get(session.id()).is_none());
    let fault = bobs.register(&Client::metadata("s"), tokio::io::duplex(1 << 16).0).await;
    let fault = fault.expect_err("the id is in use");
    assert_eq!(
        (fault.code(), fault.to_string().contains("somebody else's")),
        (Code::PermissionDenied, true)
    );
    assert!(found(&anns) && !session.is_closed());
    // One that has ended may be anybody's again.
    task.abort();
    session.closed().await;
    let (other, _task) = client.attach(&bobs, &Client::metadata("s")).await;
    assert!(bobs.try_get(other.id()).is_some() && anns.try_get(other.id()).is_none());
}

#[tokio::test(start_paused = true)]
async fn a_client_that_does_not_answer_is_detached() {
    let hub = SessionHub::new();
    let mut metadata = Client::metadata("ill");
    metadata.insert("x-buildkit-session-health-custom-timeout", "10".parse().expect("ascii"));
    let (session, _task) = Client { healthy: false, ..Client::new() }.attach(&hub, &metadata).await;
    session.closed().await;
    metadata.insert("x-docker-expose-session-uuid", "well".parse().expect("ascii"));
    let (session, _task) = Client::new().attach(&hub, &metadata).await;
    assert!(
        tokio::time::timeout(Duration::from_secs(60), session.closed()).await.is_err(),
        "a healthy one stays"
    );
}

#[tokio::test]
async fn groups_try_one_after_the_other() {
    let hub = SessionHub::new();
    let client = Client::new();
    let (_a, _task_a) = client.attach(&hub, &Client::metadata("a")).await;
    let (_b, _task_b) = client.attach(&hub, &Client::metadata("b")).await;
    let group = SessionGroup::new(hub, ["a".into(), "x:b".into(), "b".into(), "".into()]);
    assert_eq!(group.ids().len(), 2);
    let answer = group
        .any(|s| async move {
            if s.id().as_str() == "b" { Ok(7) } else { Err(Fault::not_found("not here")) }
        })
        .await;
    assert_eq!(answer.expect("b has it"), 7);
    assert!(
        group
            .any(|_| async { Err::<(), _>(Fault::not_found("nowhere")) })
            .await
            .is_err_and(|e| e.is_not_found())
    );
}

#[tokio::test]
async fn secrets_and_credentials() {
    let (_client, session, _task) = attached().await;
    assert_eq!(session.secret("token").await.expect("asks"), Some(b"s3cret".to_vec()));
    assert_eq!(session.secret("none").await.expect("asks"), None);
    assert!(
        session.secret("broken").await.expect_err("fails").to_string().contains("helper failed")
    );
    // This client has no Auth service at all.
    assert_eq!(session.credentials("example.com").await.expect("asks"), None);
    assert_eq!(session.fetch_token(TokenRequest::default()).await.expect("asks"), None);
    assert_eq!(session.token_authority("example.com", b"salt").await.expect("asks"), None);
}

#[tokio::test]
async fn a_blob_has_the_length_that_the_client_told() {
    let (_client, session, _task) = attached().await;
    let read = async |pieces: &str| {
        let mut blob = session.store(pieces)?.reader(Digest::of("it")).await?;
        let mut all = Vec::new();
        while let Some(piece) = blob.next().await? {
            all.extend_from_slice(&piece);
        }
        Ok::<_, Fault>(all)
    };
    assert_eq!(read("ab++cd").await.expect("reads"), b"abcd");
    assert_eq!(read("abc").await.expect_err("too short").code(), Code::Unavailable);
    for long in ["abcde", "ab+cde"] {
        assert_eq!(read(long).await.expect_err("too long").code(), Code::DataLoss);
    }
}

#[tokio::test]
async fn agents_are_forwarded() {
    let (_client, session, _task) = attached().await;
    assert!(session.ssh_check("").await.expect("asks"));
    assert!(session.ssh_check("other").await.is_err());
    let mut agent = session.ssh_forward("").expect("starts");
    agent.write_all(b"hello").await.expect("write");
    agent.shutdown().await.expect("shutdown");
    let mut text = String::new();
    agent.read_to_string(&mut text).await.expect("read");
    assert_eq!(text, "olleh");
}

#[tokio::test]
async fn directories_come_and_unknown_ones_are_refused() {
    let (client, session, _task) = attached().await;
    for name in ["a", "é b"] {
        std::fs::write(client.dir.path().join(name), name).expect("write");
    }
    let to = tempfile::tempdir().expect("dir");
    let request = FileSyncRequest {
        dir_name: "context".into(),
        include: vec!["é*".into()],
        ..Default::default()
    };
    let received = Receiver::new(to.path(), ReceiveOptions::default())
        .run(session.file_sync(&request).expect("starts"))
        .await;
    assert_eq!(received.expect("receives").tree.len(), 1);
    assert_eq!(std::fs::read_to_string(to.path().join("é b")).expect("read"), "é b");

    let request = FileSyncRequest { dir_name: "other".into(), ..Default::default() };
    let refused = Receiver::new(to.path(), ReceiveOptions::default())
        .run(session.file_sync(&request).expect("starts"))
        .await;
    let fault = refused.expect_err("refused");
    assert!(
        fault.is_not_found() && fault.to_string().contains("no access allowed to dir \"other\""),
        "{fault}"
    );
    // The failed transfer has not touched the earlier files.
    assert!(to.path().join("é b").exists());
}

#[tokio::test]
async fn files_and_directories_are_exported() {
    let (client, session, _task) = attached().await;
    let metadata =
        BTreeMap::from([("name".to_owned(), "n".to_owned()), ("bad".to_owned(), "\n".to_owned())]);
    let mut sink = session.file_send(0, &metadata).expect("starts");
    sink.write(Bytes::from(vec![b'x'; 7 << 20])).await.expect("write");
    assert_eq!(sink.finish().await.expect("delivers"), Delivered::Taken);
    assert_eq!(client.out.lock().len(), (7 << 20) + 1);

    let sink = session.file_send(1, &BTreeMap::new()).expect("starts");
    assert_eq!(sink.finish().await.expect("no error"), Delivered::NotNeeded);

    let from = tempfile::tempdir().expect("dir");
    std::fs::write(from.path().join("f"), "exported").expect("write");
    let roots =
        vec![SendRoot::under(from.path(), "linux_amd64", SendOptions::default()).expect("root")];
    let stream = session.file_send_dir(2).expect("starts");
    Sender::many(roots).expect("names").run(stream).await.expect("sends");
    let text =
        std::fs::read_to_string(client.dir.path().join("exported/linux_amd64/f")).expect("read");
    assert_eq!(text, "exported");
}

/// A client that looks at the result, chooses where it goes, and refuses a build that came out
/// without a digest.
struct Chooser;

#[tonic::async_trait]
impl Exporter for Chooser {
    async fn find_exporters(
        &self,
        request: Request<FindExportersRequest>,
    ) -> Result<Response<FindExportersResponse>, Status> {
        let asked = request.into_inner();
        let attrs =
            [("name".to_owned(), String::from_utf8_lossy(&asked.metadata["wanted"]).into_owned())]
                .into();
        let exporters = asked
            .refs
            .iter()
            .map(|_| ExporterRequest { r#type: "image".into(), attrs: BTreeMap::clone(&attrs) })
            .collect();
        Ok(Response::new(FindExportersResponse { exporters }))
    }

    async fn finalize_export(
        &self,
        request: Request<FinalizeExportRequest>,
    ) -> Result<Response<FinalizeExportResponse>, Status> {
        match request.into_inner().exporter_response.contains_key("containerimage.digest") {
            true => Ok(Response::new(FinalizeExportResponse {})),
            false => Err(Status::failed_precondition("nothing was exported")),
        }
    }
}

#[tokio::test]
async fn a_client_chooses_exporters_when_the_result_is_there() {
    let (ours, theirs) = tokio::io::duplex(256 << 10);
    shipway_task::spawn("test", async move {
        _ = serve_tunnel(theirs, Routes::new(ExporterServer::new(Chooser)), TunnelPeer::Daemon)
            .await
    });
    let session =
        SessionHub::new().register(&Client::metadata("s1"), ours).await.expect("registers");
    let metadata = BTreeMap::from([("wanted".to_owned(), b"app:1".to_vec())]);
    let chosen =
        session.find_exporters(metadata.clone(), vec!["ref".into()]).await.expect("answers");
    assert_eq!(
        chosen,
        [("image".to_owned(), BTreeMap::from([("name".to_owned(), "app:1".to_owned())]))]
    );
    assert!(
        session.find_exporters(metadata.clone(), Vec::new()).await.expect("answers").is_empty()
    );
    let done = BTreeMap::from([("containerimage.digest".to_owned(), "sha256:x".to_owned())]);
    session.finalize_export(done).await.expect("agrees");
    assert!(
        session
            .finalize_export(BTreeMap::new())
            .await
            .expect_err("refuses")
            .to_string()
            .contains("nothing was exported")
    );

    // One that does not care chooses nothing and refuses nothing.
    let (_client, session, _task) = attached().await;
    assert!(
        session.find_exporters(metadata, vec!["ref".into()]).await.expect("tolerated").is_empty()
    );
    session.finalize_export(BTreeMap::new()).await.expect("tolerated");
}
