//! containerd's snapshots service, by the crate `containerd-snapshots`, none of whose types leave
//! this module.

use containerd_snapshots::{Info, Kind, Snapshotter, Usage, api::types, tonic};
use shipway_fault::{Class, Fault, Result};
use shipway_snapstore::{self as snapstore, Filters, Labels, Name, Store};
use std::{collections::HashMap, convert::Infallible, future::Future, sync::Arc};
use tokio::net::UnixStream;
use tokio_stream::{Stream, StreamExt as _};
use tonic::Status;
use tracing::{Instrument as _, Span, field::Empty};

/// Largest message, in bytes: what containerd's own client and server allow.
const MAX_MESSAGE: usize = 16 << 20;
/// The service, as traces name it.
const SERVICE: &str = "containerd.services.snapshots.v1.Snapshots";
/// Calls of one connection at the same time; containerd has one connection for all.
const MAX_CALLS: u32 = 1024;

/// Serves `connections` until `stopped`, and then until the calls have ended that run.
///
/// Connections come without errors: tonic before 0.12.3 ends its server at the first one.
pub async fn serve(
    store: Arc<Store>,
    connections: impl Stream<Item = UnixStream> + Send,
    stopped: impl Future<Output = ()> + Send,
) -> Result<()> {
    let service = containerd_snapshots::server(Arc::new(Rpc { store }))
        .max_decoding_message_size(MAX_MESSAGE)
        .max_encoding_message_size(MAX_MESSAGE);
    tonic::transport::Server::builder()
        .max_concurrent_streams(MAX_CALLS)
        .add_service(service)
        .serve_with_incoming_shutdown(connections.map(Ok::<_, Infallible>), stopped)
        .await
        .map_err(|e| Fault::internal(format!("the server ended: {e}")).with_source(e))
}

struct Rpc {
    store: Arc<Store>,
}

/// How the store makes a snapshot of a key on a parent, with labels.
type Make = fn(&Store, &Name, Option<&Name>, Labels) -> Result<Vec<snapstore::Mount>>;

impl Rpc {
    /// Makes a snapshot that is not committed, as `make` does it.
    async fn make(
        &self,
        what: &'static str,
        key: String,
        parent: String,
        labels: HashMap<String, String>,
        make: Make,
    ) -> Answer<Vec<types::Mount>> {
        let shown = key.clone();
        let work = move |store: &Store| {
            let (key, parent) = (Name::new(key)?, parent_of(parent)?);
            make(store, &key, parent.as_ref(), labels_of(labels)).map(mounts_of)
        };
        self.blocking(what, shown, work).await
    }

    /// Does what may wait for the disk where waiting holds up nobody. What has begun is finished,
    /// even if the caller goes.
    async fn blocking<T: Send + 'static>(
        &self,
        what: &'static str,
        key: String,
        work: impl FnOnce(&Store) -> Result<T> + Send + 'static,
    ) -> Answer<T> {
        let store = self.store.clone();
        let span = span(what, &key);
        let work = async move {
            let result = shipway_task::blocking(what, move || work(&store)).await;
            answer(what, result)
        };
        work.instrument(span).await
    }
}

/// The span of a call, its fields as OpenTelemetry names them.
fn span(method: &'static str, key: &str) -> Span {
    tracing::info_span!(
        "rpc",
        otel.name = format_args!("{SERVICE}/{method}"),
        otel.kind = "server",
        otel.status_code = Empty,
        rpc.system = "grpc",
        rpc.service = SERVICE,
        rpc.method = method,
        rpc.grpc.status_code = Empty,
        snapshot.key = key,
    )
}

/// A fault on its way to a caller.
#[derive(Debug)]
struct Failure(Fault);

type Answer<T> = std::result::Result<T, Failure>;

impl From<Failure> for Status {
    fn from(Failure(fault): Failure) -> Self {
        let mut message = fault.to_string();
        for hint in fault.hints() {
            message.push_str("\nhint: ");
            message.push_str(hint);
        }
        Self::new(tonic::Code::from_i32(fault.code() as i32), message)
    }
}

/// Logs a call within its span: what the caller has to mend is of interest only to who looks for
/// it.
fn answer<T>(what: &'static str, result: Result<T>) -> Answer<T> {
    let code = result.as_ref().map_or_else(|fault| fault.code() as i32, |_| 0);
    Span::current().record("rpc.grpc.status_code", code);
    match &result {
        Ok(_) => tracing::debug!("{what}"),
        Err(fault) if fault.class() == Class::User => tracing::debug!(%fault, "{what}"),
        Err(fault) => {
            Span::current().record("otel.status_code", "ERROR");
            tracing::error!(%fault, "{what}");
        }
    }
    result.map_err(Failure)
}

fn parent_of(parent: String) -> Result<Option<Name>> {
    if parent.is_empty() { Ok(None) } else { Name::new(parent).map(Some) }
}

fn labels_of(labels: HashMap<String, String>) -> Labels {
    labels.into_iter().collect()
}

fn info_of(info: snapstore::Info) -> Info {
    Info {
        kind: match info.kind {
            snapstore::Kind::Active => Kind::Active,
            snapstore::Kind::View => Kind::View,
            snapstore::Kind::Committed => Kind::Committed,
        },
        name: info.name.into(),
        parent: info.parent.map(String::from).unwrap_or_default(),
        labels: info.labels.into_iter().collect(),
        created_at: info.created.into(),
        updated_at: info.updated.into(),
    }
}

fn mounts_of(mounts: Vec<snapstore::Mount>) -> Vec<types::Mount> {
    let mount = |m: snapstore::Mount| types::Mount {
        r#type: m.kind.into(),
        source: m.source,
        options: m.options,
        ..types::Mount::default()
    };
    mounts.into_iter().map(mount).collect()
}

#[tonic::async_trait]
impl Snapshotter for Rpc {
    type Error = Failure;

    async fn stat(&self, key: String) -> Answer<Info> {
        span("Stat", &key).in_scope(|| {
            let found = Name::new(key.clone()).and_then(|name| self.store.stat(&name));
            answer("Stat", found.map(info_of))
        })
    }

    async fn update(&self, info: Info, fieldpaths: Option<Vec<String>>) -> Answer<Info> {
        let (paths, name) = (fieldpaths.unwrap_or_default(), info.name.clone());
        let update = move |store: &Store| {
            store.update(&Name::new(info.name)?, labels_of(info.labels), &paths).map(info_of)
        };
        self.blocking("Update", name, update).await
    }

    async fn usage(&self, key: String) -> Answer<Usage> {
        let counted = |usage: snapstore::Usage| Usage {
            inodes: i64::try_from(usage.inodes).unwrap_or(i64::MAX),
            size: i64::try_from(usage.bytes).unwrap_or(i64::MAX),
        };
        self.blocking("Usage", key.clone(), move |store| store.usage(&Name::new(key)?).map(counted))
            .await
    }

    async fn mounts(&self, key: String) -> Answer<Vec<types::Mount>> {
        self.blocking("Mounts", key.clone(), move |store| {
            store.mounts(&Name::new(key)?).map(mounts_of)
        })
        .await
    }

    async fn prepare(
        &self,
        key: String,
        parent: String,
        labels: HashMap<String, String>,
    ) -> Answer<Vec<types::Mount>> {
        self.make("Prepare", key, parent, labels, Store::prepare).await
    }

    async fn view(
        &self,
        key: String,
        parent: String,
        labels: HashMap<String, String>,
    ) -> Answer<Vec<types::Mount>> {
        self.make("View", key, parent, labels, Store::view).await
    }

    async fn commit(
        &self,
        name: String,
        key: String,
        labels: HashMap<String, String>,
    ) -> Answer<()> {
        let shown = key.clone();
        let work = move |store: &Store| {
            store.commit(&Name::new(name)?, &Name::new(key)?, labels_of(labels))
        };
        self.blocking("Commit", shown, work).await
    }

    async fn remove(&self, key: String) -> Answer<()> {
        self.blocking("Remove", key.clone(), move |store| store.remove(&Name::new(key)?)).await
    }

    async fn clear(&self) -> Answer<()> {
        self.blocking("Cleanup", String::new(), Store::cleanup).await
    }

    type InfoStream = tokio_stream::Iter<
        std::iter::Map<std::vec::IntoIter<snapstore::Info>, fn(snapstore::Info) -> Answer<Info>>,
    >;

    async fn list(&self, _: String, filters: Vec<String>) -> Answer<Self::InfoStream> {
        let span = span("List", "");
        let filters = span.in_scope(|| answer("List", Filters::parse(&filters)))?;
        let send: fn(snapstore::Info) -> Answer<Info> = |info| Ok(info_of(info));
        Ok(tokio_stream::iter(self.store.list(&filters).into_iter().map(send)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use containerd_snapshots::api::snapshots::v1::{
        self as wire, snapshots_client::SnapshotsClient,
    };
    use shipway_snapstore::{NoLazyLayers, Options};
    use std::path::Path;
    use tonic::{
        Code,
        transport::{Channel, Endpoint, Uri},
    };

    async fn client(root: &Path) -> SnapshotsClient<Channel> {
        let store = Store::open(root, Options::default(), Arc::new(NoLazyLayers)).unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        let connections = tokio_stream::iter([theirs]).chain(tokio_stream::pending());
        shipway_task::spawn("test", serve(Arc::new(store), connections, std::future::pending()));
        let mut ours = Some(ours);
        let connect = tower::service_fn(move |_: Uri| {
            std::future::ready(
                ours.take().ok_or(std::io::Error::from(std::io::ErrorKind::NotConnected)),
            )
        });
        let channel =
            Endpoint::from_static("http://[::]:0").connect_with_connector(connect).await.unwrap();
        SnapshotsClient::new(channel)
            .max_decoding_message_size(MAX_MESSAGE)
            .max_encoding_message_size(MAX_MESSAGE)
    }

    fn prepare(key: &str, parent: &str) -> wire::PrepareSnapshotRequest {
        wire::PrepareSnapshotRequest {
            key: key.into(),
            parent: parent.into(),
            ..Default::default()
        }
    }

    #[tokio::test]
    async fn the_ten_calls_arrive_with_their_fields_and_errors_as_codes() {
        let dir = tempfile::tempdir().unwrap();
        let mut client = client(dir.path()).await;
        let labels: HashMap<String, String> = [("l".to_owned(), "1".to_owned())].into();
        let request = wire::PrepareSnapshotRequest { labels: labels.clone(), ..prepare("a", "") };
        let mounts = client.prepare(request).await.unwrap().into_inner().mounts;
        assert_eq!(
            (mounts[0].r#type.as_str(), mounts[0].options.as_slice()),
            ("bind", &["rw".to_owned(), "rbind".to_owned()][..])
        );
        assert_eq!(client.prepare(prepare("a", "")).await.unwrap_err().code(), Code::AlreadyExists);
        assert_eq!(client.prepare(prepare("b", "x")).await.unwrap_err().code(), Code::NotFound);
        assert_eq!(
            client.prepare(prepare("", "")).await.unwrap_err().code(),
            Code::InvalidArgument
        );
        let again = client
            .mounts(wire::MountsRequest { key: "a".into(), ..Default::default() })
            .await
            .unwrap()
            .into_inner()
            .mounts;
        assert_eq!(again, mounts);
        let active = client
            .usage(wire::UsageRequest { key: "a".into(), ..Default::default() })
            .await
            .unwrap()
            .into_inner();
        assert_eq!(active.inodes, 1);

        let commit = wire::CommitSnapshotRequest {
            name: "c".into(),
            key: "a".into(),
            labels: labels.clone(),
            ..Default::default()
        };
        client.commit(commit).await.unwrap();
        let view =
            wire::ViewSnapshotRequest { key: "v".into(), parent: "c".into(), ..Default::default() };
        assert_eq!(
            client.view(view).await.unwrap().into_inner().mounts[0].options,
            ["ro", "rbind"]
        );
        let stat = client
            .stat(wire::StatSnapshotRequest { key: "c".into(), ..Default::default() })
            .await
            .unwrap()
            .into_inner();
        let info = stat.info.unwrap();
        assert_eq!(
            (info.kind, &info.labels, info.parent.as_str()),
            (wire::Kind::Committed as i32, &labels, "")
        );
        assert!(info.created_at.as_ref().unwrap().seconds > 1_700_000_000);

        // Go sends year 1 for times it does not set.
        let mut unset = info.created_at.clone().unwrap();
        (unset.seconds, unset.nanos) = (-62_135_596_800, 0);
        let unset = Some(unset);
        let changed = wire::Info {
            name: "c".into(),
            created_at: unset.clone(),
            updated_at: unset,
            ..Default::default()
        };
        let mut request = wire::UpdateSnapshotRequest { info: Some(changed), ..Default::default() };
        request.update_mask.get_or_insert_with(Default::default).paths = vec!["labels.l".into()];
        let updated = client.update(request).await.unwrap().into_inner().info.unwrap();
        assert!(updated.labels.is_empty());
        assert_eq!(updated.created_at, info.created_at);

        let remove =
            |key: &str| wire::RemoveSnapshotRequest { key: key.into(), ..Default::default() };
        assert_eq!(client.remove(remove("c")).await.unwrap_err().code(), Code::FailedPrecondition);
        client.remove(remove("v")).await.unwrap();
        client.remove(remove("c")).await.unwrap();
        client.cleanup(wire::CleanupRequest::default()).await.unwrap();
        assert_eq!(std::fs::read_dir(dir.path().join("trash")).unwrap().count(), 0);
        let filter =
            wire::ListSnapshotsRequest { filters: vec!["name=c".into()], ..Default::default() };
        let error = match client.list(filter).await {
            Err(error) => error,
            Ok(stream) => stream.into_inner().message().await.unwrap_err(),
        };
        assert_eq!(error.code(), Code::InvalidArgument);
        assert!(
            error.message().contains("unsupported operator") && error.message().contains("hint: "),
            "{}",
            error.message()
        );
    }

    /// What is written of spans as they end.
    #[derive(Clone, Default)]
    struct Trace(Arc<parking_lot::Mutex<Vec<u8>>>);

    impl std::io::Write for Trace {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().write(bytes)
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[tokio::test]
    async fn each_call_has_a_span_with_the_fields_of_opentelemetry() {
        let (trace, dir) = (Trace::default(), tempfile::tempdir().unwrap());
        let sink = trace.clone();
        let subscriber = tracing_subscriber::fmt()
            .json()
            .with_span_events(tracing_subscriber::fmt::format::FmtSpan::CLOSE)
            .with_writer(move || sink.clone());
        let guard = tracing::subscriber::set_default(subscriber.finish());
        let mut client = client(dir.path()).await;
        client.prepare(prepare("a", "")).await.unwrap();
        client.prepare(prepare("a", "")).await.unwrap_err();
        let request = wire::StatSnapshotRequest { key: "a".into(), ..Default::default() };
        client.stat(request).await.unwrap();
        drop(guard);
        let text = String::from_utf8(trace.0.lock().clone()).unwrap();
        let spans: Vec<serde_json::Value> = text
            .lines()
            .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap())
            .filter(|line| line["fields"]["message"] == "close" && line["span"]["name"] == "rpc")
            .map(|mut line| line["span"].take())
            .collect();
        let of = |field: &str| spans.iter().map(|span| &span[field]).collect::<Vec<_>>();
        assert_eq!(of("rpc.method"), ["Prepare", "Prepare", "Stat"]);
        assert_eq!(of("rpc.grpc.status_code"), [0, 6, 0]);
        for span in &spans {
            let name = format!("{SERVICE}/{}", span["rpc.method"].as_str().unwrap());
            assert_eq!((&span["otel.name"], &span["otel.kind"]), (&name.into(), &"server".into()));
            assert_eq!((&span["rpc.system"], &span["snapshot.key"]), (&"grpc".into(), &"a".into()));
        }
    }

    #[tokio::test]
    async fn long_lists_come_in_parts_and_large_messages_pass() {
        let dir = tempfile::tempdir().unwrap();
        let mut client = client(dir.path()).await;
        // More than the 4 MiB that gRPC allows by default, in one message of a hundred.
        let large: HashMap<String, String> = [("l".to_owned(), "x".repeat(60_000))].into();
        for i in 0..120 {
            let request = wire::PrepareSnapshotRequest {
                labels: large.clone(),
                ..prepare(&format!("k{i:03}"), "")
            };
            client.prepare(request).await.unwrap();
        }
        let mut stream =
            client.list(wire::ListSnapshotsRequest::default()).await.unwrap().into_inner();
        let mut sizes = Vec::new();
        while let Some(part) = stream.message().await.unwrap() {
            sizes.push(part.info.len());
        }
        assert_eq!(sizes, [100, 20]);
    }
}
