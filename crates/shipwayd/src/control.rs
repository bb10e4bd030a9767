//! The Control service (rows `ctl.*`): requests off the wire into the engine, and back.

use crate::{drain::Drain, filter, history, memory, prune, status, worker};
use parking_lot::Mutex;
use shipway_engine::{BuildPolicy, BuildRequest, Engine, ExporterRequest, Progress};
use shipway_fault::{Fault, Result};
use shipway_grpc::{Answers, headers::DAEMON_GONE, status_of};
use shipway_identity::Caller;
use shipway_llb::{Definition, SourcePolicy};
use shipway_proto::{
    moby::buildkit::v1::{self as wire, control_server::Control},
    pb,
};
use shipway_refs::{PruneOptions, UsageRecord};
use shipway_remotecache::CacheRequest;
use shipway_session::SessionId;
use std::{collections::BTreeMap, path::PathBuf, time::SystemTime};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming, metadata::MetadataValue};
use tracing::Instrument as _;

/// The worker as ListWorkers shows it.
pub struct WorkerInfo {
    /// Stable id.
    pub id: String,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Platforms, native first.
    pub platforms: worker::Platforms,
    /// Rules of garbage collection.
    pub gc: Vec<crate::gc::Rule>,
    /// A directory on the disk that those rules are about.
    pub disk: PathBuf,
}

impl WorkerInfo {
    /// The record on the wire, without devices.
    pub fn record(&self) -> wire::types::WorkerRecord {
        worker::record(
            &self.id,
            self.labels.clone(),
            &self.platforms.now(),
            self.gc.iter().map(crate::gc::Rule::to_wire).collect(),
        )
    }
}

/// The service.
pub struct ControlService {
    /// What builds.
    pub engine: Engine,
    /// What ListWorkers says.
    pub worker: std::sync::Arc<WorkerInfo>,
    /// Wakes the garbage collector after builds.
    pub gc: crate::gc::Trigger,
    /// Whether the daemon is ending.
    pub drain: Drain,
}

/// Who makes the request.
pub fn caller<T>(request: &Request<T>) -> Result<Caller, Status> {
    Caller::of(request.extensions()).cloned().map_err(|f| status_of(&f))
}

/// The status of a build that failed because the daemon ends.
fn gone(fault: &Fault) -> Status {
    let mut status = status_of(fault);
    status.metadata_mut().insert(DAEMON_GONE, MetadataValue::from_static("1"));
    status
}

type Answer<T> = std::result::Result<Response<T>, Status>;
type Sent<T> = ReceiverStream<std::result::Result<T, Status>>;

fn definitions(map: BTreeMap<String, pb::Definition>) -> BTreeMap<String, Definition> {
    map.into_iter().map(|(k, d)| (k, Definition::from_pb(d))).collect()
}

/// Exporters of a request: the list, or the deprecated pair when there is no list (row
/// `ctl.solve.legacyexp`); `SOURCE_DATE_EPOCH` goes to each (row `ctl.solve.sde`).
fn exporters(request: &wire::SolveRequest) -> Vec<ExporterRequest> {
    let mut all: Vec<ExporterRequest> = request
        .exporters
        .iter()
        .map(|e| ExporterRequest { kind: e.r#type.clone(), attrs: e.attrs.clone() })
        .collect();
    if all.is_empty() && !request.exporter_deprecated.is_empty() {
        all.push(ExporterRequest {
            kind: request.exporter_deprecated.clone(),
            attrs: request.exporter_attrs_deprecated.clone(),
        });
    }
    let epoch = request
        .frontend_attrs
        .get("build-arg:SOURCE_DATE_EPOCH")
        .filter(|v| v.parse::<i64>().is_ok());
    if let Some(epoch) = epoch {
        for e in &mut all {
            e.attrs.entry("source-date-epoch".into()).or_insert_with(|| epoch.clone());
        }
    }
    all
}

fn build_request(mut request: wire::SolveRequest, caller: Caller) -> Result<BuildRequest> {
    check_compatibility(request.compatibility_version)?;
    let policy = BuildPolicy {
        rules: request
            .source_policy
            .take()
            .map(SourcePolicy::from_pb)
            .transpose()?
            .unwrap_or_default(),
        session: Some(std::mem::take(&mut request.source_policy_session))
            .filter(|s| !s.is_empty())
            .map(|s| SessionId::new(&s)),
    };
    let exporters = exporters(&request);
    let cache = request.cache.unwrap_or_default();
    let of = |e: &wire::CacheOptionsEntry| CacheRequest {
        kind: e.r#type.clone(),
        attrs: e.attrs.clone(),
    };
    let in_registry = |reference: &String, attrs: &BTreeMap<String, String>| {
        let mut attrs = attrs.clone();
        attrs.insert("ref".into(), reference.clone());
        CacheRequest { kind: "registry".into(), attrs }
    };
    let mut cache_exports: Vec<CacheRequest> = cache.exports.iter().map(of).collect();
    if !cache.export_ref_deprecated.is_empty() {
        cache_exports
            .push(in_registry(&cache.export_ref_deprecated, &cache.export_attrs_deprecated));
    }
    let older = cache.import_refs_deprecated.iter().map(|r| in_registry(r, &BTreeMap::new()));
    let cache_imports = cache.imports.iter().map(of).chain(older).collect();
    Ok(BuildRequest {
        id: request.r#ref,
        // One without operations is scratch; none at all is a build that the client drives. Beside
        // a frontend it means nothing.
        definition: request
            .definition
            .filter(|d| !d.def.is_empty() || request.frontend.is_empty())
            .map(Definition::from_pb),
        frontend: request.frontend,
        options: request.frontend_attrs,
        inputs: definitions(request.frontend_inputs),
        session: SessionId::new(&request.session),
        exporters,
        session_exporters: request.enable_session_exporter,
        entitlements: request.entitlements,
        internal: request.internal,
        policy,
        proxied: request.proxy_network,
        compatibility: if request.compatibility_version == 0 {
            COMPATIBILITY
        } else {
            request.compatibility_version
        },
        cache_exports,
        cache_imports,
        caller,
    })
}

/// Versions of the defaults of exporters that a client may name; the last is meant when it names
/// none (row `ctl.solve.compat`).
const COMPATIBILITIES: [i64; 3] = [10, 20, COMPATIBILITY];
const COMPATIBILITY: i64 = 30;

fn check_compatibility(version: i64) -> Result<()> {
    if version == 0 || COMPATIBILITIES.contains(&version) {
        return Ok(());
    }
    Err(Fault::invalid(match version > COMPATIBILITY {
        true => format!(
            "unsupported compatibility-version {version}: upgrade buildkit (max supported: {COMPATIBILITY})"
        ),
        false => format!("unsupported compatibility-version {version} (supported: [10 20 30])"),
    }))
}

/// The header that lets clients correct their clocks (row `net.tshdr`).
fn with_time<T>(mut response: Response<T>) -> Response<T> {
    let now = shipway_oci::timestamp::format(std::time::SystemTime::now());
    if let Ok(value) = now.parse() {
        response.metadata_mut().insert("buildkit-current-timestamp", value);
    }
    response
}

impl ControlService {
    async fn would_prune(
        &self,
        request: wire::PruneRequest,
    ) -> Result<Response<wire::DiskUsageResponse>> {
        let options = prune::options(request, &self.worker.disk)?;
        let records = Mutex::new(Vec::new());
        let options = PruneOptions { dry_run: true, ..options };
        self.engine.parts().caches.prune(options, &|record| records.lock().push(record)).await?;
        Ok(prune::would_remove(&records.into_inner()))
    }
}

#[tonic::async_trait]
impl Control for ControlService {
    async fn disk_usage(
        &self,
        request: Request<wire::DiskUsageRequest>,
    ) -> Answer<wire::DiskUsageResponse> {
        if let Some(wanted) = prune::wanted(request.metadata()).map_err(|f| status_of(&f))? {
            return self.would_prune(wanted).await.map_err(|f| status_of(&f));
        }
        let request = request.into_inner();
        let filters =
            filter::parse_all(&request.filter, prune::FIELDS).map_err(|f| status_of(&f))?;
        let records = self.engine.parts().services.refs.usage().await.map_err(|f| status_of(&f))?;
        let now = SystemTime::now();
        let wanted = |r: &&UsageRecord| {
            prune::is_older(r, request.age_limit, now)
                && filter::any(&filters, &|field| prune::field(r, field))
        };
        let record = records.iter().filter(wanted).map(prune::to_wire).collect();
        Ok(Response::new(wire::DiskUsageResponse { record }))
    }

    type PruneStream = Sent<wire::UsageRecord>;

    async fn prune(&self, request: Request<wire::PruneRequest>) -> Answer<Self::PruneStream> {
        let options =
            prune::options(request.into_inner(), &self.worker.disk).map_err(|f| status_of(&f))?;
        let (services, caches) =
            (self.engine.parts().services.clone(), self.engine.parts().caches.clone());
        let (tx, rx) = mpsc::channel(64);
        let prune = async move {
            let refs = &services.refs;
            // A client that asks for space wants that, too, which waits for the next build.
            services.executor.retire_idle().await;
            refs.drained().await;
            let (removed, mut queue) = mpsc::unbounded_channel();
            // Bounded by the number of records; the receiver drains as fast as the client reads.
            let on_removed = move |record| drop(removed.send(record));
            let done = caches.prune(options, &on_removed);
            tokio::pin!(done);
            let mut outcome = None;
            loop {
                tokio::select! {
                    record = queue.recv() => match record {
                        Some(record) => {
                            if tx.send(Ok(prune::to_wire(&record))).await.is_err() {
                                return;
                            }
                        }
                        None => break,
                    },
                    result = &mut done, if outcome.is_none() => {
                        outcome = Some(result);
                        queue.close();
                    }
                }
            }
            if let Some(Err(fault)) = outcome {
                let _ = tx.send(Err(status_of(&fault))).await;
            }
        };
        shipway_task::spawn("prune", prune);
        Ok(Response::new(ReceiverStream::new(rx)))
    }

    async fn solve(&self, request: Request<wire::SolveRequest>) -> Answer<wire::SolveResponse> {
        let caller = caller(&request)?;
        let request = request.into_inner();
        let caller = caller.in_build(&request.r#ref);
        let request = build_request(request, caller).map_err(|f| status_of(&f))?;
        tracing::Span::current().record("shipway.build", &*request.id);
        let trace = shipway_telemetry::current();
        // As BuildKit calls it (row `ob.log`).
        let trace = trace.as_ref().map(|context| tracing::field::display(context.trace_id()));
        let span = tracing::info_span!("build", id = %request.id, traceID = trace);
        let _running = self.drain.admit().map_err(|fault| gone(&fault))?;
        let build = self.engine.build(request).instrument(span.clone());
        let outcome = tokio::select! {
            outcome = build => outcome,
            fault = self.drain.cut_off() => {
                tracing::info!(parent: &span, error = %fault, "build failed");
                return Err(gone(&fault));
            }
        };
        self.gc.wake();
        memory::give_back();
        match outcome {
            Ok(response) => {
                tracing::debug!(parent: &span, "build done");
                Ok(Response::new(wire::SolveResponse {
                    exporter_response: response.exporter_response,
                }))
            }
            Err(fault) => {
                tracing::info!(parent: &span, error = %fault, "build failed");
                Err(status_of(&fault))
            }
        }
    }

    type StatusStream = Sent<wire::StatusResponse>;

    async fn status(&self, request: Request<wire::StatusRequest>) -> Answer<Self::StatusStream> {
        let (caller, request) = (caller(&request)?, request.into_inner());
        let progress = self.engine.progress(&request.r#ref, &caller).await;
        let progress = progress.map_err(|f| status_of(&f))?;
        let (tx, rx) = mpsc::channel(16);
        match progress {
            Progress::Live(journal) => {
                let mut watcher = journal.watch();
                shipway_task::spawn("send progress", async move {
                    while let Some(events) = watcher.next().await {
                        for message in status::messages(&events) {
                            if tx.send(Ok(message)).await.is_err() {
                                return;
                            }
                        }
                    }
                });
            }
            Progress::Past(digest) => {
                let history = self.engine.parts().history.clone();
                let send = move || {
                    let missing = || Fault::not_found("the build was deleted from the history");
                    match history.open_file(digest).and_then(|file| file.ok_or_else(missing)) {
                        Ok(file) => {
                            let mut messages = status::read_blob(std::io::BufReader::new(file));
                            let _ = messages.try_for_each(|message| tx.blocking_send(Ok(message)));
                        }
                        Err(fault) => drop(tx.blocking_send(Err(status_of(&fault)))),
                    }
                    Ok(())
                };
                drop(shipway_task::blocking("send a log", send));
            }
        }
        Ok(with_time(Response::new(ReceiverStream::new(rx))))
    }

    type SessionStream = Answers<wire::BytesMessage>;

    async fn session(
        &self,
        request: Request<Streaming<wire::BytesMessage>>,
    ) -> Answer<Self::SessionStream> {
        let owner = caller(&request)?.owner().cloned();
        let hub = self.engine.parts().sessions.of_owner(owner);
        let (metadata, _, incoming) = request.into_parts();
        let answers = hub.attach(&metadata, incoming).await.map_err(|f| status_of(&f))?;
        Ok(Response::new(answers))
    }

    async fn list_workers(
        &self,
        request: Request<wire::ListWorkersRequest>,
    ) -> Answer<wire::ListWorkersResponse> {
        // Those who ask want to build here, or to know whether it is possible.
        self.drain.check().map_err(|fault| gone(&fault))?;
        let filters = filter::parse_all(&request.into_inner().filter, &["id", "labels."])
            .map_err(|f| status_of(&f))?;
        let there = self.engine.parts().services.devices().await.map_err(|f| status_of(&f))?;
        let record = wire::types::WorkerRecord {
            cdi_devices: worker::devices(&there),
            ..self.worker.record()
        };
        let lookup = |field: &str| match field {
            "id" => Some(record.id.clone()),
            label => label.strip_prefix("labels.").and_then(|l| record.labels.get(l).cloned()),
        };
        let keep = filter::any(&filters, &lookup);
        Ok(Response::new(wire::ListWorkersResponse {
            record: if keep { vec![record] } else { Vec::new() },
        }))
    }

    async fn info(&self, _: Request<wire::InfoRequest>) -> Answer<wire::InfoResponse> {
        Ok(Response::new(wire::InfoResponse { buildkit_version: Some(worker::version()) }))
    }

    type ListenBuildHistoryStream = Sent<wire::BuildHistoryEvent>;

    async fn listen_build_history(
        &self,
        request: Request<wire::BuildHistoryRequest>,
    ) -> Answer<Self::ListenBuildHistoryStream> {
        let (caller, request) = (caller(&request)?, request.into_inner());
        let stream = history::listen(self.engine.parts().history.clone(), request, caller)
            .map_err(|f| status_of(&f))?;
        Ok(with_time(Response::new(stream)))
    }

    async fn update_build_history(
        &self,
        request: Request<wire::UpdateBuildHistoryRequest>,
    ) -> Answer<wire::UpdateBuildHistoryResponse> {
        let (caller, request) = (caller(&request)?, request.into_inner());
        let history = self.engine.parts().history.clone();
        let known = history.summary(&request.r#ref);
        if known.is_some_and(|s| !caller.sees(s.owner.as_deref())) {
            return Err(status_of(&shipway_history::unknown(&request.r#ref)));
        }
        if request.delete || request.finalize {
            self.engine.finalize(&request.r#ref).await;
        }
        let update = move || {
            if request.delete {
                history.delete(&request.r#ref)
            } else if request.finalize {
                // One that is not there is final as well.
                Ok(())
            } else {
                history.pin(&request.r#ref, request.pinned)
            }
        };
        let done = shipway_task::blocking("update the history", update).await;
        done.map(|()| Response::new(wire::UpdateBuildHistoryResponse {})).map_err(|f| status_of(&f))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_of_defaults_that_are_not_known_are_refused_as_clients_know_it() {
        let said = |version| check_compatibility(version).map_err(|e| e.to_string());
        for fine in [0, 10, 20, 30] {
            assert_eq!(said(fine), Ok(()));
        }
        assert_eq!(
            said(31),
            Err("unsupported compatibility-version 31: upgrade buildkit (max supported: 30)".into())
        );
        assert_eq!(
            said(15),
            Err("unsupported compatibility-version 15 (supported: [10 20 30])".into())
        );
    }

    #[test]
    fn the_deprecated_exporter_counts_only_without_a_list() {
        let mut request =
            wire::SolveRequest { exporter_deprecated: "local".into(), ..Default::default() };
        assert_eq!(exporters(&request)[0].kind, "local");
        request.exporters.push(wire::Exporter { r#type: "image".into(), ..Default::default() });
        request.frontend_attrs.insert("build-arg:SOURCE_DATE_EPOCH".into(), "7".into());
        let all = exporters(&request);
        assert_eq!(
            (all.len(), all[0].kind.as_str(), all[0].attrs["source-date-epoch"].as_str()),
            (1, "image", "7")
        );
    }

    #[test]
    fn old_fields_of_a_request_mean_what_the_new_ones_do() {
        let entry = |kind: &str, key: &str, value: &str| wire::CacheOptionsEntry {
            r#type: kind.into(),
            attrs: [(key.to_owned(), value.to_owned())].into(),
        };
        let cache = wire::CacheOptions {
            export_ref_deprecated: "r/out".into(),
            export_attrs_deprecated: [("mode".to_owned(), "max".to_owned())].into(),
            import_refs_deprecated: vec!["r/one".into(), "r/two".into()],
            exports: vec![entry("inline", "a", "b")],
            imports: vec![entry("local", "src", "d")],
        };
        let request = wire::SolveRequest {
            frontend: "dockerfile.v0".into(),
            // Beside a frontend, a graph without operations means nothing.
            definition: Some(Default::default()),
            cache: Some(cache),
            internal: true,
            proxy_network: true,
            enable_session_exporter: true,
            source_policy_session: "policies".into(),
            ..Default::default()
        };
        let build = build_request(request, Caller::unrestricted()).unwrap();
        let shown = |all: &[CacheRequest]| {
            all.iter().map(|c| format!("{} {:?}", c.kind, c.attrs)).collect::<Vec<_>>()
        };
        assert_eq!(
            shown(&build.cache_exports),
            [r#"inline {"a": "b"}"#, r#"registry {"mode": "max", "ref": "r/out"}"#]
        );
        let imports = [
            r#"local {"src": "d"}"#,
            r#"registry {"ref": "r/one"}"#,
            r#"registry {"ref": "r/two"}"#,
        ];
        assert_eq!(shown(&build.cache_imports), imports);
        assert!(
            build.definition.is_none()
                && build.internal
                && build.proxied
                && build.session_exporters
        );
        assert_eq!(
            (build.policy.session.as_ref().map(SessionId::as_str), build.compatibility),
            (Some("policies"), COMPATIBILITY)
        );
        // Without a frontend, the same graph is the empty image.
        let scratch =
            wire::SolveRequest { definition: Some(Default::default()), ..Default::default() };
        assert!(build_request(scratch, Caller::unrestricted()).unwrap().definition.is_some());
    }

    #[test]
    fn streams_begin_with_the_daemons_clock() {
        let before = std::time::SystemTime::now();
        let response = with_time(Response::new(()));
        let told = response.metadata().get("buildkit-current-timestamp").unwrap().to_str().unwrap();
        let told = shipway_oci::timestamp::parse(told).unwrap();
        assert!(before <= told && told <= std::time::SystemTime::now(), "{told:?}");
    }
}
