//! Builds driven from outside: registration by id, references by id, and the returned result.

use crate::{BridgeService, containers::HeldContainer};
use parking_lot::Mutex;
use shipway_fault::{Fault, Result};
use shipway_frontend::{Bridge, BuildRef, Container, FrontendResult};
use shipway_grpc::HealthService;
use shipway_identity::Caller;
use shipway_proto::{
    MAX_MESSAGE,
    grpc::health::v1::health_server::HealthServer,
    moby::buildkit::v1::{frontend::llb_bridge_server::LlbBridgeServer, types::WorkerRecord},
};
use std::{collections::HashMap, sync::Arc, time::Duration};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::{oneshot, watch},
};
use tonic::service::Routes;

/// States that one build may hold.
const MAX_REFS: usize = 20_000;
/// Containers that one build may hold at a time.
const MAX_CONTAINERS: usize = 500;

/// How long a call waits for its build to be registered (row `gwfwd.wait`).
const GRACE: Duration = Duration::from_secs(3);

/// Says what workers there are, for Ping.
pub type WorkerSource = Arc<dyn Fn() -> Vec<WorkerRecord> + Send + Sync>;

/// One build driven through the gateway.
pub struct GatewayBuild {
    /// The engine's side.
    pub(crate) bridge: Arc<dyn Bridge>,
    refs: Mutex<HashMap<String, Arc<dyn BuildRef>>>,
    containers: Mutex<HashMap<String, HeldContainer>>,
    returned: Mutex<Option<oneshot::Sender<Result<FrontendResult>>>>,
}

impl GatewayBuild {
    /// A build over `bridge`, and where its result will arrive.
    pub fn new(bridge: Arc<dyn Bridge>) -> (Arc<Self>, oneshot::Receiver<Result<FrontendResult>>) {
        let (sender, receiver) = oneshot::channel();
        (
            Arc::new(Self {
                bridge,
                refs: Mutex::default(),
                containers: Mutex::default(),
                returned: Mutex::new(Some(sender)),
            }),
            receiver,
        )
    }

    /// Remembers a reference under its id.
    pub(crate) fn keep(&self, build_ref: &Arc<dyn BuildRef>) -> Result<String> {
        let id = build_ref.id().to_owned();
        let mut refs = self.refs.lock();
        if refs.len() >= MAX_REFS && !refs.contains_key(&id) {
            let message = format!("the build asked for more than {MAX_REFS} states");
            return Err(Fault::new(shipway_fault::Code::ResourceExhausted, message));
        }
        refs.insert(id.clone(), build_ref.clone());
        Ok(id)
    }

    /// Remembers the states that failed operations left, where a failure is reported to the client.
    pub(crate) fn keep_failed<T>(&self, result: Result<T>) -> Result<T> {
        if let Err(fault) = &result {
            for state in self.bridge.failed_states(fault) {
                // Without room the failure is reported all the same.
                let _ = self.keep(&state);
            }
        }
        result
    }

    /// The reference that was handed out as `id`.
    pub(crate) fn find(&self, id: &str) -> Result<Arc<dyn BuildRef>> {
        self.refs
            .lock()
            .get(id)
            .cloned()
            .ok_or_else(|| Fault::not_found(format!("no such ref: {id}")))
    }

    /// Remembers a container; a name is used once at a time.
    pub(crate) fn add_container(&self, name: String, held: HeldContainer) -> Result<()> {
        let mut containers = self.containers.lock();
        if containers.contains_key(&name) {
            return Err(Fault::new(
                shipway_fault::Code::AlreadyExists,
                format!("Container {name} already exists"),
            ));
        }
        if containers.len() >= MAX_CONTAINERS {
            let message =
                format!("the build has {MAX_CONTAINERS} containers, and more are not allowed");
            return Err(Fault::new(shipway_fault::Code::ResourceExhausted, message)
                .hint("release those that are not needed any more"));
        }
        containers.insert(name, held);
        Ok(())
    }

    /// The container `name`.
    pub(crate) fn container(&self, name: &str) -> Option<Arc<dyn Container>> {
        self.containers.lock().get(name).map(|k| k.container.clone())
    }

    /// The container `name` for one more process, the PATH of processes that name none, and whether
    /// it is the first one.
    pub(crate) fn enter_container(
        &self,
        name: &str,
    ) -> Option<(Arc<dyn Container>, &'static str, bool)> {
        let mut containers = self.containers.lock();
        let kept = containers.get_mut(name)?;
        let first = !std::mem::replace(&mut kept.started, true);
        Some((kept.container.clone(), kept.path, first))
    }

    /// Forgets the container `name`.
    pub(crate) fn remove_container(&self, name: &str) -> Option<HeldContainer> {
        self.containers.lock().remove(name)
    }

    /// Ends what the build's containers still run.
    pub async fn release_containers(&self) {
        let left: Vec<HeldContainer> =
            self.containers.lock().drain().map(|(_, kept)| kept).collect();
        for kept in left {
            // What still runs now was left behind, and how it ends does not matter.
            let _ = kept.container.release().await;
        }
    }

    /// Delivers the result; the second time is an error (row `gw.return`).
    pub(crate) fn deliver(&self, result: Result<FrontendResult>) -> Result<()> {
        let sender = self.returned.lock().take().ok_or_else(|| {
            Fault::new(shipway_fault::Code::FailedPrecondition, "gateway result is already set")
        })?;
        // A build whose waiter is gone was cancelled; its client learns that from Solve.
        let _ = sender.send(result);
        Ok(())
    }
}

/// A build with its owner, where that matters.
type Owned = (Option<Arc<str>>, Arc<GatewayBuild>);

/// The running builds that a client drives, by `Solve.Ref`.
#[derive(Clone)]
pub struct Builds(Arc<watch::Sender<HashMap<String, Owned>>>);

impl Default for Builds {
    fn default() -> Self {
        Self(Arc::new(watch::Sender::new(HashMap::new())))
    }
}

/// Serves `build` alone over `io`, to a frontend that needs not say which build it means, until
/// that ends.
pub async fn serve(
    build: Arc<GatewayBuild>,
    io: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
) -> Result<()> {
    // Clients of Go's look whether the other end is in good health, as they do with the daemon
    // itself.
    let health = HealthServer::new(HealthService::default());
    let service = LlbBridgeServer::new(BridgeService::of(build))
        .max_decoding_message_size(MAX_MESSAGE)
        .max_encoding_message_size(MAX_MESSAGE);
    let routes = Routes::new(service).add_service(health);
    shipway_grpc::serve_tunnel(io, routes, shipway_grpc::TunnelPeer::Stranger).await
}

/// Keeps a build registered; dropping it takes the build out.
pub struct Registration {
    builds: Builds,
    id: String,
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.builds.0.send_modify(|m| {
            m.remove(&self.id);
        });
    }
}

impl Builds {
    /// Makes `build`, which is `owner`'s, reachable as `id`.
    pub fn register(
        &self,
        id: &str,
        owner: Option<Arc<str>>,
        build: Arc<GatewayBuild>,
    ) -> Registration {
        self.0.send_modify(|m| {
            m.insert(id.to_owned(), (owner, build));
        });
        Registration { builds: self.clone(), id: id.to_owned() }
    }

    /// The build `id` of `caller`, which may be about to be registered. Only who has begun a build
    /// drives it: administrators see those of others, and no more.
    pub async fn get(&self, id: &str, caller: &Caller) -> Result<Arc<GatewayBuild>> {
        let mut changes = self.0.subscribe();
        let find = |m: &HashMap<String, Owned>| {
            let (owner, build) = m.get(id)?;
            caller.owns(owner.as_deref()).then(|| build.clone())
        };
        let found = tokio::time::timeout(GRACE, async {
            changes.wait_for(|m| find(m).is_some()).await.ok().and_then(|m| find(&m))
        })
        .await;
        found.ok().flatten().ok_or_else(|| {
            Fault::not_found(format!("no such job {id}"))
                .hint("the build ended, or was never started on this daemon")
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::{FutureExt as _, future::BoxFuture};
    use shipway_frontend::{FrontendOptions, SolveRequest, SourceMeta, SourceRequest, Warning};
    use shipway_grpc::Peer;
    use shipway_identity::{Allow, AuthConfig, Authenticator, Patterns, Policy};
    use shipway_llb::Definition;
    use shipway_oci::Platform;
    use shipway_proto::grpc::health::v1::{
        HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
    };
    use shipway_proto::moby::buildkit::v1::frontend::{
        self as wire, llb_bridge_client::LlbBridgeClient,
    };
    use std::collections::BTreeMap;

    struct Nothing;

    impl Bridge for Nothing {
        fn options(&self) -> &FrontendOptions {
            static NONE: FrontendOptions = FrontendOptions::new();
            &NONE
        }

        fn session(&self) -> &str {
            "s"
        }

        fn platforms(&self) -> Vec<Platform> {
            vec![Platform::host()]
        }

        fn worker(&self) -> shipway_frontend::Worker {
            shipway_frontend::Worker {
                id: "w".into(),
                labels: [("a".to_owned(), "b".to_owned())].into(),
                ..Default::default()
            }
        }

        fn solve(&self, _: SolveRequest) -> BoxFuture<'_, Result<FrontendResult>> {
            async move {
                let metadata = [("k".to_owned(), b"own".to_vec())].into();
                Ok(FrontendResult { metadata, ..FrontendResult::of(None) })
            }
            .boxed()
        }

        fn resolve_source(&self, _: SourceRequest) -> BoxFuture<'_, Result<SourceMeta>> {
            async move { Err(Fault::not_found("no source")) }.boxed()
        }

        fn inputs(&self) -> BoxFuture<'_, Result<BTreeMap<String, Definition>>> {
            async move { Ok(BTreeMap::new()) }.boxed()
        }

        fn warn(&self, _: Warning) -> BoxFuture<'_, Result<()>> {
            async move { Ok(()) }.boxed()
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_build_is_driven_by_its_owner_only() {
        let policy = Policy {
            name: "all".into(),
            subject: Patterns::new(["*"]),
            allow: Allow { admin: true, ..Allow::default() },
            ..Policy::default()
        };
        let config = AuthConfig { policy: vec![policy], ..AuthConfig::default() };
        let auth = Authenticator::new(config).unwrap();
        let user = async |uid| {
            let peer = Peer { uid: Some(uid), ..Peer::default() };
            auth.caller(&peer, &Default::default()).await.unwrap()
        };
        let (ann, bob, everybody) = (user(7).await, user(8).await, Caller::unrestricted());
        let (builds, (build, _returned)) =
            (Builds::default(), GatewayBuild::new(Arc::new(Nothing)));
        let _own = builds.register("own", ann.owner().cloned(), build.clone());
        let _open = builds.register("open", None, build);
        for (id, caller, found) in [
            ("own", &ann, true),
            // Who administers the daemon sees builds of others, and does not drive them.
            ("own", &bob, false),
            ("open", &bob, false),
            ("open", &everybody, true),
            ("none", &everybody, false),
        ] {
            assert_eq!(builds.get(id, caller).await.is_ok(), found, "{id} {caller:?}");
        }
    }

    struct Numbered(String);

    impl BuildRef for Numbered {
        fn id(&self) -> &str {
            &self.0
        }

        fn definition(&self) -> Option<&Definition> {
            None
        }

        fn evaluate(&self) -> BoxFuture<'_, Result<()>> {
            async move { Ok(()) }.boxed()
        }

        fn read_file<'a>(
            &'a self,
            path: &'a str,
            _: Option<(u64, u64)>,
        ) -> BoxFuture<'a, Result<bytes::Bytes>> {
            async move { Err(Fault::not_found(path.to_owned())) }.boxed()
        }

        fn read_dir<'a>(
            &'a self,
            path: &'a str,
            _: Option<&'a str>,
        ) -> BoxFuture<'a, Result<Vec<shipway_frontend::FileStat>>> {
            async move { Err(Fault::not_found(path.to_owned())) }.boxed()
        }

        fn stat_file<'a>(
            &'a self,
            path: &'a str,
        ) -> BoxFuture<'a, Result<shipway_frontend::FileStat>> {
            async move { Err(Fault::not_found(path.to_owned())) }.boxed()
        }
    }

    #[test]
    fn a_build_holds_no_more_states_than_it_may() {
        let (build, _returned) = GatewayBuild::new(Arc::new(Nothing));
        let keep = |number: usize| {
            build.keep(&(Arc::new(Numbered(number.to_string())) as Arc<dyn BuildRef>))
        };
        for number in 0..MAX_REFS {
            keep(number).unwrap();
        }
        assert_eq!(keep(MAX_REFS).unwrap_err().code(), shipway_fault::Code::ResourceExhausted);
        // Those that are known stay so.
        assert_eq!(keep(0).unwrap(), "0");
        assert!(
            build.find("0").is_ok()
                && build.find(&MAX_REFS.to_string()).is_err_and(|f| f.is_not_found())
        );
    }

    /// Go writes a map of byte slices, and the result's own metadata counts more.
    #[tokio::test]
    async fn metadata_of_old_clients_is_in_base64_and_comes_second() {
        let (build, returned) = GatewayBuild::new(Arc::new(Nothing));
        let (ours, theirs) = tokio::io::duplex(1 << 16);
        let serving = shipway_task::spawn("serve a frontend", serve(build, ours));
        let tunnel = shipway_grpc::TunnelChannel::connect(theirs).await.unwrap();
        let mut client = LlbBridgeClient::new(tunnel.channel());
        let exporter_attr = br#"{"k":"YXNrZWQ=","l":"YXNrZWQ=","n":null}"#.to_vec();
        client
            .solve(wire::SolveRequest { r#final: true, exporter_attr, ..Default::default() })
            .await
            .unwrap();
        let metadata = returned.await.unwrap().unwrap().metadata;
        assert_eq!(
            (&*metadata["k"], &*metadata["l"], &*metadata["n"]),
            (&b"own"[..], &b"asked"[..], &b""[..])
        );
        drop((client, tunnel));
        let _ = serving.await.unwrap();
    }

    #[tokio::test]
    async fn a_frontend_that_is_served_alone_names_no_build() {
        let (build, returned) = GatewayBuild::new(Arc::new(Nothing));
        let (ours, theirs) = tokio::io::duplex(1 << 16);
        let serving = shipway_task::spawn("serve a frontend", serve(build, ours));
        let tunnel = shipway_grpc::TunnelChannel::connect(theirs).await.unwrap();
        let mut client = LlbBridgeClient::new(tunnel.channel());
        let pong = client.ping(wire::PingRequest {}).await.unwrap().into_inner();
        assert_eq!(
            (pong.workers.len(), &*pong.workers[0].id, &*pong.workers[0].labels["a"]),
            (1, "w", "b")
        );
        let mut health = HealthClient::new(tunnel.channel());
        let status =
            health.check(HealthCheckRequest::default()).await.unwrap().into_inner().status();
        assert_eq!(status, ServingStatus::Serving);
        assert!(pong.frontend_api_caps.iter().any(|c| c.id == "gateway.exec" && c.enabled));
        let unknown = client
            .new_container(wire::NewContainerRequest {
                container_id: "c".into(),
                ..Default::default()
            })
            .await
            .unwrap_err();
        assert_eq!(unknown.code(), tonic::Code::Unimplemented);
        let result = wire::Result {
            metadata: [("k".to_owned(), b"v".to_vec())].into(),
            ..Default::default()
        };
        client.r#return(wire::ReturnRequest { result: Some(result), error: None }).await.unwrap();
        assert_eq!(returned.await.unwrap().unwrap().metadata["k"], b"v");
        drop((client, health, tunnel));
        // Ends with the connection, however that says it.
        let _ = serving.await.unwrap();
    }
}
