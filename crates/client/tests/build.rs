//! A build with everything a session offers, against a daemon that is only a Control service which
//! asks for it.

use parking_lot::Mutex;
use std::{collections::BTreeMap, os::unix::fs::MetadataExt, path::Path, sync::Arc};

use futures::TryStreamExt;
use shipway_client::{
    Client, ConnectOptions, DockerConfig, Export, FileTarget, Outcome, SecretSource, SolveOptions,
    Status, Target,
};
use shipway_fault::{Code, Fault, Result};
use shipway_filesync::{FileSyncRequest, PacketStream, ReceiveOptions, Receiver, packets};
use shipway_grpc::{
    Address, Duplex, ListenOptions, Listener, TunnelChannel, fault_of, frames, headers, status_of,
};
use shipway_proto::moby::{
    buildkit::{
        secrets::v1::{GetSecretRequest, secrets_client::SecretsClient},
        v1::{
            self as wire,
            control_server::{Control, ControlServer},
        },
    },
    filesync::v1::{
        BytesMessage, CredentialsRequest, FetchTokenRequest, auth_client::AuthClient,
        file_send_client::FileSendClient, file_sync_client::FileSyncClient,
    },
};
use tempfile::TempDir;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Streaming, metadata::MetadataMap};

type Answer<T> = std::result::Result<Response<T>, tonic::Status>;
type Sent<T> = ReceiverStream<std::result::Result<T, tonic::Status>>;

/// What is attached: the session's metadata and the way into it.
#[derive(Clone)]
struct Attached {
    metadata: MetadataMap,
    tunnel: TunnelChannel,
}

/// A daemon whose builds do what their frontend's name says.
struct Fake {
    dir: TempDir,
    sessions: watch::Sender<Option<Attached>>,
    cancelled: Mutex<Option<oneshot::Sender<()>>>,
    requests: mpsc::UnboundedSender<wire::SolveRequest>,
}

struct OnDrop(Option<oneshot::Sender<()>>);

impl Drop for OnDrop {
    fn drop(&mut self) {
        if let Some(sender) = self.0.take() {
            let _ = sender.send(());
        }
    }
}

impl Fake {
    async fn attached(&self) -> Attached {
        let mut sessions = self.sessions.subscribe();
        let found = sessions.wait_for(Option::is_some).await.expect("a sender");
        found.clone().expect("a session")
    }

    async fn work(&self, request: &wire::SolveRequest) -> Result<BTreeMap<String, String>> {
        let session = self.attached().await;
        assert_eq!(
            session.metadata.get(headers::SESSION_ID).expect("an id"),
            request.session.as_str()
        );
        match request.frontend.as_str() {
            "everything" => self.everything(&session).await,
            "fail" => {
                // Half a file, and then no more.
                let (sink, stream) = frames::<BytesMessage>();
                let mut client = FileSendClient::new(session.tunnel.channel());
                sink.send(BytesMessage { data: b"half".to_vec() }).await.expect("open");
                let _answers = client.diff_copy(Request::new(stream)).await.expect("answers");
                Err(Fault::invalid("no good")
                    .detail(shipway_fault::Detail::Vertex("sha256:v".into())))
            }
            "hang" => {
                let _guard = OnDrop(self.cancelled.lock().take());
                std::future::pending().await
            }
            other => Err(Fault::invalid(format!("no frontend {other}"))),
        }
    }

    async fn everything(&self, session: &Attached) -> Result<BTreeMap<String, String>> {
        let channel = session.tunnel.channel();
        let methods: Vec<_> = session
            .metadata
            .get_all(headers::SESSION_METHOD)
            .iter()
            .filter_map(|m| m.to_str().ok())
            .collect();
        for method in [
            "/moby.filesync.v1.FileSync/DiffCopy",
            "/moby.filesync.v1.FileSend/DiffCopy",
            "/moby.filesync.v1.Auth/Credentials",
        ] {
            assert!(methods.contains(&method), "{methods:?}");
        }
        self.sync(session, "context", &["skipped"]).await?;
        let refused = self.sync(session, "other", &[]).await.expect_err("not offered");
        assert_eq!(
            (refused.code(), refused.message()),
            (Code::NotFound, "no access allowed to dir \"other\"")
        );

        let mut secrets = SecretsClient::new(channel.clone());
        let secret = secrets
            .get_secret(GetSecretRequest { id: "s".into(), ..Default::default() })
            .await
            .map_err(|s| fault_of(&s))?;
        assert_eq!(secret.into_inner().data, b"hush");
        let missing = secrets
            .get_secret(GetSecretRequest { id: "x".into(), ..Default::default() })
            .await
            .expect_err("no such secret");
        assert_eq!((missing.code(), missing.message()), (tonic::Code::NotFound, "not found"));

        let mut auth = AuthClient::new(channel.clone());
        let login = auth
            .credentials(CredentialsRequest { host: "r.example".into() })
            .await
            .map_err(|s| fault_of(&s))?
            .into_inner();
        assert_eq!((login.username.as_str(), login.secret.as_str()), ("user", "pass"));
        let refused =
            auth.fetch_token(FetchTokenRequest::default()).await.expect_err("no token server");
        assert!(refused.message().contains("wrong token server"), "{refused}");

        let (sink, stream) = frames::<BytesMessage>();
        let mut call = Request::new(stream);
        call.metadata_mut().insert(headers::EXPORTER_ID, "1".parse().expect("ascii"));
        for part in [&b"whole "[..], b"file"] {
            sink.send(BytesMessage { data: part.to_vec() }).await.expect("open");
        }
        drop(sink);
        let mut answers = FileSendClient::new(channel)
            .diff_copy(call)
            .await
            .map_err(|s| fault_of(&s))?
            .into_inner();
        assert!(answers.message().await.map_err(|s| fault_of(&s))?.is_none());
        Ok(BTreeMap::from([("containerimage.digest".to_owned(), "sha256:d".to_owned())]))
    }

    /// Receives the directory `name` into our own.
    async fn sync(&self, session: &Attached, name: &str, exclude: &[&str]) -> Result<()> {
        let exclude = exclude.iter().map(|e| (*e).to_owned()).collect();
        let request = FileSyncRequest { dir_name: name.into(), exclude, ..Default::default() };
        let (sink, stream) = packets();
        let mut call = Request::new(stream);
        for (key, value) in request.pairs() {
            let key: tonic::metadata::AsciiMetadataKey = key.parse().expect("a key");
            call.metadata_mut().append(key, value.parse().expect("ascii"));
        }
        let answers = FileSyncClient::new(session.tunnel.channel())
            .diff_copy(call)
            .await
            .map_err(|s| fault_of(&s))?
            .into_inner();
        let stream = PacketStream::new(answers.map_err(|s| fault_of(&s)), sink);
        Receiver::new(self.dir.path(), ReceiveOptions::default()).run(stream).await.map(drop)
    }
}

/// The service; a type of our own because the trait is foreign.
#[derive(Clone)]
struct Service(Arc<Fake>);

#[tonic::async_trait]
impl Control for Service {
    type PruneStream = Sent<wire::UsageRecord>;
    type StatusStream = Sent<wire::StatusResponse>;
    type SessionStream = shipway_grpc::Answers<wire::BytesMessage>;
    type ListenBuildHistoryStream = Sent<wire::BuildHistoryEvent>;

    async fn solve(&self, request: Request<wire::SolveRequest>) -> Answer<wire::SolveResponse> {
        let request = request.into_inner();
        let _ = self.0.requests.send(request.clone());
        let done = self.0.work(&request).await;
        done.map(|exporter_response| Response::new(wire::SolveResponse { exporter_response }))
            .map_err(|f| status_of(&f))
    }

    async fn status(&self, request: Request<wire::StatusRequest>) -> Answer<Self::StatusStream> {
        let (sink, stream) = mpsc::channel(1);
        let vertex = wire::Vertex {
            digest: "sha256:v".into(),
            name: request.into_inner().r#ref,
            ..Default::default()
        };
        let _ = sink
            .send(Ok(wire::StatusResponse { vertexes: vec![vertex], ..Default::default() }))
            .await;
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn session(
        &self,
        request: Request<Streaming<wire::BytesMessage>>,
    ) -> Answer<Self::SessionStream> {
        let (metadata, _, incoming) = request.into_parts();
        let (duplex, answers) = Duplex::answering(incoming.into_stream());
        let fake = self.0.clone();
        shipway_task::spawn("test", async move {
            let tunnel = TunnelChannel::connect(duplex).await.expect("tunnel");
            fake.sessions.send_replace(Some(Attached { metadata, tunnel }));
        });
        Ok(Response::new(answers))
    }

    async fn disk_usage(
        &self,
        _: Request<wire::DiskUsageRequest>,
    ) -> Answer<wire::DiskUsageResponse> {
        let record =
            |id: &str, size| wire::UsageRecord { id: id.into(), size, ..Default::default() };
        Ok(Response::new(wire::DiskUsageResponse {
            record: vec![record("big", 9), record("small", 1)],
        }))
    }

    async fn prune(&self, _: Request<wire::PruneRequest>) -> Answer<Self::PruneStream> {
        Err(tonic::Status::unimplemented("prune"))
    }

    async fn list_workers(
        &self,
        _: Request<wire::ListWorkersRequest>,
    ) -> Answer<wire::ListWorkersResponse> {
        Err(tonic::Status::unimplemented("workers"))
    }

    async fn info(&self, _: Request<wire::InfoRequest>) -> Answer<wire::InfoResponse> {
        Err(tonic::Status::unimplemented("info"))
    }

    async fn listen_build_history(
        &self,
        _: Request<wire::BuildHistoryRequest>,
    ) -> Answer<Self::ListenBuildHistoryStream> {
        Err(tonic::Status::unimplemented("history"))
    }

    async fn update_build_history(
        &self,
        _: Request<wire::UpdateBuildHistoryRequest>,
    ) -> Answer<wire::UpdateBuildHistoryResponse> {
        Err(tonic::Status::unimplemented("history"))
    }
}

/// A running fake, a client of it, and a place for files.
struct Scene {
    fake: Arc<Fake>,
    client: Client,
    home: TempDir,
    cancelled: oneshot::Receiver<()>,
    requests: mpsc::UnboundedReceiver<wire::SolveRequest>,
}

impl Scene {
    async fn new() -> Self {
        let home = tempfile::tempdir().expect("temp dir");
        let address = Address::Unix(home.path().join("daemon.sock"));
        let listeners = Listener::bind(&address, &ListenOptions::default()).await.expect("bind");
        let (cancelling, cancelled) = oneshot::channel();
        let (requests, asked) = mpsc::unbounded_channel();
        let fake = Arc::new(Fake {
            dir: tempfile::tempdir().expect("temp dir"),
            sessions: watch::Sender::new(None),
            cancelled: Mutex::new(Some(cancelling)),
            requests,
        });
        for listener in listeners {
            let server =
                shipway_grpc::server().add_service(ControlServer::new(Service(fake.clone())));
            shipway_task::spawn("test", server.serve_with_incoming(listener.incoming()));
        }
        let location = address.to_string().parse().expect("an address");
        let options = ConnectOptions { wait: true, ..Default::default() };
        let client = Client::connect(&location, &options).await.expect("connects");
        Self { fake, client, home, cancelled, requests: asked }
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.home.path().join(name)
    }

    async fn build(&self, options: SolveOptions) -> (Result<Outcome>, Vec<Status>) {
        let (sink, mut events) = mpsc::channel(16);
        let collect = async {
            let mut all = Vec::new();
            while let Some(event) = events.recv().await {
                all.push(event);
            }
            all
        };
        tokio::join!(self.client.build(options, sink, CancellationToken::new()), collect)
    }
}

fn options(frontend: &str) -> SolveOptions {
    SolveOptions { frontend: frontend.into(), reference: "the-ref".into(), ..Default::default() }
}

fn file(path: &Path) -> Export {
    Export {
        kind: "tar".into(),
        attrs: BTreeMap::new(),
        target: Target::File(FileTarget::Path(path.to_owned())),
    }
}

#[tokio::test]
async fn a_build_gets_what_its_session_offers() {
    let mut scene = Scene::new().await;
    let context = scene.path("context");
    std::fs::create_dir_all(context.join("dir")).expect("creates");
    std::fs::write(context.join("dir/file"), "content").expect("writes");
    std::fs::write(context.join("skipped"), "secret").expect("writes");
    std::fs::write(scene.path("secret"), "hush").expect("writes");
    std::fs::write(scene.path("config.json"), r#"{"auths":{"r.example":{"auth":"dXNlcjpwYXNz"}}}"#)
        .expect("writes");
    let mut options = options("everything");
    options.dirs.add("context", &context).expect("a directory");
    options.secrets.add("s", Some(SecretSource::File(scene.path("secret")))).expect("a secret");
    options.docker = Some(DockerConfig::load(&scene.path("config.json")).expect("loads"));
    options.frontend_attrs.insert("target".into(), "t".into());
    let image = Export {
        kind: "image".into(),
        attrs: BTreeMap::from([("name".into(), "x".into())]),
        target: Target::None,
    };
    options.exports = vec![image, file(&scene.path("out.tar"))];

    let (outcome, events) = scene.build(options).await;
    let outcome = outcome.expect("builds");
    assert_eq!(outcome.reference, "the-ref");
    assert_eq!(outcome.response["containerimage.digest"], "sha256:d");
    assert_eq!(events[0].vertexes[0].name, "the-ref");
    assert_eq!(std::fs::read_to_string(scene.path("out.tar")).expect("reads"), "whole file");
    let received = scene.fake.dir.path();
    assert_eq!(std::fs::read_to_string(received.join("dir/file")).expect("reads"), "content");
    assert_eq!(std::fs::metadata(received.join("dir/file")).expect("is there").uid(), 0);
    assert!(!received.join("skipped").exists());
    let request = scene.requests.recv().await.expect("a request");
    assert_eq!(
        request.exporters.iter().map(|e| e.r#type.as_str()).collect::<Vec<_>>(),
        ["image", "tar"]
    );
    assert_eq!(
        (request.exporter_deprecated.as_str(), request.frontend_attrs["target"].as_str()),
        ("image", "t")
    );
}

#[tokio::test]
async fn a_failure_keeps_its_details_and_leaves_no_half_file() {
    let scene = Scene::new().await;
    let mut options = options("fail");
    options.exports = vec![file(&scene.path("out.tar"))];
    let (outcome, _) = scene.build(options).await;
    let fault = outcome.expect_err("fails");
    assert_eq!(
        (fault.code(), fault.to_string().as_str()),
        (Code::InvalidArgument, "failed to solve: no good")
    );
    assert_eq!(fault.details(), [shipway_fault::Detail::Vertex("sha256:v".into())]);
    // The session's server is gone, and with it the receiving end; its file may take a moment
    // longer.
    let left = || {
        std::fs::read_dir(scene.home.path())
            .expect("reads")
            .filter_map(|e| e.ok()?.file_name().into_string().ok())
    };
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
    while left().any(|name| name.contains("out.tar")) {
        assert!(std::time::Instant::now() < deadline, "{:?}", left().collect::<Vec<_>>());
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn stopping_cancels_the_build_and_still_hears_its_end() {
    let mut scene = Scene::new().await;
    let stop = CancellationToken::new();
    let (sink, mut events) = mpsc::channel(16);
    let stop_then = async {
        scene.requests.recv().await.expect("a request");
        stop.cancel();
    };
    let (outcome, (), first) = tokio::join!(
        scene.client.build(options("hang"), sink, stop.clone()),
        stop_then,
        events.recv()
    );
    let fault = outcome.expect_err("cancelled");
    assert!(fault.is_cancelled(), "{fault:?}");
    assert!(first.is_some());
    scene.cancelled.await.expect("the daemon noticed");
}

#[tokio::test]
async fn dropping_a_build_cancels_it() {
    let mut scene = Scene::new().await;
    let client = scene.client.clone();
    let (sink, _events) = mpsc::channel(16);
    let building = shipway_task::spawn("test", async move {
        client.build(options("hang"), sink, CancellationToken::new()).await
    });
    scene.requests.recv().await.expect("a request");
    building.abort();
    scene.cancelled.await.expect("the daemon noticed");
}

#[tokio::test]
async fn usage_comes_smallest_first() {
    let scene = Scene::new().await;
    let records = scene.client.disk_usage(Vec::new()).await.expect("answers");
    assert_eq!(records.iter().map(|r| r.id.as_str()).collect::<Vec<_>>(), ["small", "big"]);
    assert_eq!(
        serde_json::to_string(&records[0]).expect("prints"),
        r#"{"id":"small","mutable":false,"inUse":false,"size":1,"createdAt":"1970-01-01T00:00:00Z","lastUsedAt":null,"usageCount":0,"parents":null,"description":"","recordType":"","shared":false}"#
    );
}
