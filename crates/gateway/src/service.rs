//! The gRPC service itself: each method routes to its build, converts, and calls the port.

use crate::{
    build::{Builds, GatewayBuild, WorkerSource},
    containers, convert, processes,
};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use bytes::Bytes;
use shipway_fault::{Fault, Result};
use shipway_frontend::{CacheImport, FrontendResult, SolveRequest, SourceRequest, Warning, Worker};
use shipway_grpc::{fault_of, platform_to_wire, status_of};
use shipway_identity::Caller;
use shipway_llb::{Caps, Definition, ResolveOptions};
use shipway_proto::moby::buildkit::v1::{
    apicaps::ApiCap,
    frontend::{self as wire, llb_bridge_server::LlbBridge},
    types::{BuildkitVersion, WorkerRecord},
};
use std::{collections::BTreeMap, sync::Arc};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

/// Metadata key that names the build (row `gwfwd.route`).
const BUILD_ID: &str = "buildkit-controlapi-buildid";

/// The largest file, or part of one, that fits into a message.
const MAX_FILE: u64 = 15 << 20;

/// Messages of processes that wait for the client.
const ANSWERS: usize = 64;

/// Which build a call means.
enum Route {
    /// The one named in the metadata.
    Named(Builds, WorkerSource),
    /// The only one.
    Only(Arc<GatewayBuild>),
}

/// LLBBridge, on the daemon's own socket or for one frontend.
pub struct BridgeService(Route);

type Answer<T> = std::result::Result<Response<T>, Status>;

impl BridgeService {
    /// Serves the builds of `builds`.
    pub fn new(builds: Builds, workers: WorkerSource) -> Self {
        Self(Route::Named(builds, workers))
    }

    /// Serves `build`.
    pub(crate) fn of(build: Arc<GatewayBuild>) -> Self {
        Self(Route::Only(build))
    }

    fn workers(&self) -> Vec<WorkerRecord> {
        match &self.0 {
            Route::Named(_, workers) => workers(),
            Route::Only(build) => {
                let Worker { id, labels, platforms, package, version, revision } =
                    build.bridge.worker();
                let platforms = platforms.iter().map(platform_to_wire).collect();
                let version =
                    BuildkitVersion { package, version, revision, ..BuildkitVersion::default() };
                vec![WorkerRecord {
                    id,
                    labels,
                    platforms,
                    buildkit_version: Some(version),
                    ..WorkerRecord::default()
                }]
            }
        }
    }

    async fn build<T>(&self, request: Request<T>) -> Result<(Arc<GatewayBuild>, T), Status> {
        let builds = match &self.0 {
            Route::Only(build) => return Ok((build.clone(), request.into_inner())),
            Route::Named(builds, _) => builds,
        };
        let id = request
            .metadata()
            .get(BUILD_ID)
            .and_then(|v| v.to_str().ok())
            .unwrap_or_default()
            .to_owned();
        if id.is_empty() {
            return Err(status_of(&Fault::invalid("no buildid found in context")));
        }
        let caller = Caller::of(request.extensions()).map_err(|f| status_of(&f))?.clone();
        let build = builds.get(&id, &caller).await.map_err(|f| status_of(&f))?;
        Ok((build, request.into_inner()))
    }
}

fn answer<T>(result: Result<T>) -> Answer<T> {
    result.map(Response::new).map_err(|f| status_of(&f))
}

fn capabilities(caps: &Caps) -> Vec<ApiCap> {
    caps.iter().map(|id| ApiCap { id: id.to_owned(), enabled: true, ..ApiCap::default() }).collect()
}

async fn solve(build: &GatewayBuild, request: wire::SolveRequest) -> Result<wire::SolveResponse> {
    let solve = SolveRequest {
        definition: request.definition.filter(|d| !d.def.is_empty()).map(Definition::from_pb),
        frontend: request.frontend,
        options: request.frontend_opt,
        inputs: convert::definitions(request.frontend_inputs),
        evaluate: request.evaluate,
        policies: convert::policies(request.source_policies)?,
        cache_imports: request
            .cache_imports
            .into_iter()
            .map(|c| CacheImport { kind: c.r#type, attrs: c.attrs })
            .collect(),
    };
    let mut result = build.bridge.solve(solve).await?;
    if request.r#final {
        // Clients from before Return put metadata here, bytes as Go writes them; the result's own
        // counts more (row `gw.solve.compat`).
        if !request.exporter_attr.is_empty() {
            let bad = |e: &dyn std::fmt::Display| {
                Fault::invalid(format!("invalid exporter attributes: {e}"))
            };
            let extra: BTreeMap<String, Option<String>> =
                serde_json::from_slice(&request.exporter_attr).map_err(|e| bad(&e))?;
            for (key, value) in extra {
                let bytes =
                    BASE64_STANDARD.decode(value.unwrap_or_default()).map_err(|e| bad(&e))?;
                result.metadata.entry(key).or_insert(bytes);
            }
        }
        let reference = match &result.single {
            Some(Some(r)) => build.keep(r)?,
            _ => String::new(),
        };
        build.deliver(Ok(result))?;
        return Ok(wire::SolveResponse { r#ref: reference, result: None });
    }
    if request.allow_result_return {
        return Ok(wire::SolveResponse {
            r#ref: String::new(),
            result: Some(convert::result_to_wire(build, &result, request.allow_result_array_ref)?),
        });
    }
    match &result.single {
        Some(state) => {
            let r#ref = state.as_ref().map(|r| build.keep(r)).transpose()?.unwrap_or_default();
            Ok(wire::SolveResponse { r#ref, result: None })
        }
        None => Err(Fault::invalid("solve did not return default result")),
    }
}

async fn resolve_source(
    build: &GatewayBuild,
    request: wire::ResolveSourceMetaRequest,
) -> Result<wire::ResolveSourceMetaResponse> {
    let source = request.source.ok_or_else(|| Fault::invalid("source is required"))?;
    let http_checksum =
        request.http.and_then(|h| h.checksum_request).map(convert::checksum).transpose()?;
    let meta = build
        .bridge
        .resolve_source(SourceRequest {
            identifier: source.identifier,
            attrs: source.attrs,
            platform: convert::platform(request.platform),
            log_name: request.log_name,
            no_config: request.image.as_ref().is_some_and(|i| i.no_config),
            options: ResolveOptions {
                mode: convert::mode(&request.resolve_mode)?,
                attestations: request
                    .image
                    .filter(|i| i.attestation_chain || !i.resolve_attestations.is_empty())
                    .map(|i| i.resolve_attestations),
                git_objects: request.git.is_some_and(|g| g.return_object),
                http_checksum,
            },
            policies: convert::policies(request.source_policies)?,
        })
        .await?;
    Ok(meta.facts.to_pb(meta.source))
}

async fn resolve_image(
    build: &GatewayBuild,
    request: wire::ResolveImageConfigRequest,
) -> Result<wire::ResolveImageConfigResponse> {
    // Resolver type 1 is an OCI layout in the client's content store.
    let scheme = if request.resolver_type == 1 { "oci-layout" } else { "docker-image" };
    let mut attrs = BTreeMap::new();
    if request.resolver_type == 1 {
        attrs.insert("oci.session".to_owned(), request.session_id);
        attrs.insert("oci.store".to_owned(), request.store_id);
    }
    let meta = build
        .bridge
        .resolve_source(SourceRequest {
            identifier: format!("{scheme}://{}", request.r#ref),
            attrs,
            platform: convert::platform(request.platform),
            log_name: request.log_name,
            options: ResolveOptions {
                mode: convert::mode(&request.resolve_mode)?,
                ..ResolveOptions::default()
            },
            policies: convert::policies(request.source_policies)?,
            ..SourceRequest::default()
        })
        .await?;
    let image = meta
        .facts
        .image
        .ok_or_else(|| Fault::internal("an image was resolved without its config"))?;
    Ok(wire::ResolveImageConfigResponse {
        digest: image.digest.to_string(),
        config: image.config.to_vec(),
        r#ref: image.name,
    })
}

async fn read_file(
    build: &GatewayBuild,
    r: wire::ReadFileRequest,
) -> Result<wire::ReadFileResponse> {
    let state = build.find(&r.r#ref)?;
    bounded_file(&r, async |range| state.read_file(&r.file_path, range).await).await
}

/// A file, or the range of it that is asked for, by `read`; no more than fits into a message.
pub(crate) async fn bounded_file(
    r: &wire::ReadFileRequest,
    read: impl AsyncFnOnce(Option<(u64, u64)>) -> Result<Bytes>,
) -> Result<wire::ReadFileResponse> {
    let (offset, length) = r.range.map(convert::range).transpose()?.unwrap_or((0, 0));
    let wanted = if length == 0 { MAX_FILE + 1 } else { length.min(MAX_FILE + 1) };
    let data = read(Some((offset, wanted))).await?;
    if data.len() as u64 > MAX_FILE {
        let message = format!(
            "read {}: it is more than the {MAX_FILE} bytes that fit into one message",
            r.file_path
        );
        return Err(Fault::invalid(message).hint("read it in ranges"));
    }
    Ok(wire::ReadFileResponse { data: data.to_vec() })
}

async fn read_dir(build: &GatewayBuild, r: wire::ReadDirRequest) -> Result<wire::ReadDirResponse> {
    let include = (!r.include_pattern.is_empty()).then_some(r.include_pattern.as_str());
    let entries = build.find(&r.r#ref)?.read_dir(&r.dir_path, include).await?;
    Ok(wire::ReadDirResponse { entries: entries.into_iter().map(convert::stat).collect() })
}

async fn stat_file(
    build: &GatewayBuild,
    r: wire::StatFileRequest,
) -> Result<wire::StatFileResponse> {
    let stat = build.find(&r.r#ref)?.stat_file(&r.path).await?;
    Ok(wire::StatFileResponse { stat: Some(convert::stat(stat)) })
}

async fn warn(build: &GatewayBuild, r: wire::WarnRequest) -> Result<wire::WarnResponse> {
    let text = |b: Vec<u8>| String::from_utf8_lossy(&b).into_owned();
    build
        .bridge
        .warn(Warning {
            vertex: r.digest.parse().ok(),
            level: r.level,
            short: text(r.short),
            detail: r.detail.into_iter().map(text).collect(),
            url: r.url,
            file: r.info.map(|i| Arc::new(convert::source_file(i))),
            spans: convert::spans(r.ranges),
        })
        .await?;
    Ok(wire::WarnResponse {})
}

#[tonic::async_trait]
impl LlbBridge for BridgeService {
    async fn resolve_image_config(
        &self,
        request: Request<wire::ResolveImageConfigRequest>,
    ) -> Answer<wire::ResolveImageConfigResponse> {
        let (build, r) = self.build(request).await?;
        answer(resolve_image(&build, r).await)
    }

    async fn resolve_source_meta(
        &self,
        request: Request<wire::ResolveSourceMetaRequest>,
    ) -> Answer<wire::ResolveSourceMetaResponse> {
        let (build, r) = self.build(request).await?;
        answer(resolve_source(&build, r).await)
    }

    async fn solve(&self, request: Request<wire::SolveRequest>) -> Answer<wire::SolveResponse> {
        let (build, r) = self.build(request).await?;
        answer(build.keep_failed(solve(&build, r).await))
    }

    async fn read_file(
        &self,
        request: Request<wire::ReadFileRequest>,
    ) -> Answer<wire::ReadFileResponse> {
        let (build, r) = self.build(request).await?;
        answer(build.keep_failed(read_file(&build, r).await))
    }

    async fn read_dir(
        &self,
        request: Request<wire::ReadDirRequest>,
    ) -> Answer<wire::ReadDirResponse> {
        let (build, r) = self.build(request).await?;
        answer(build.keep_failed(read_dir(&build, r).await))
    }

    async fn stat_file(
        &self,
        request: Request<wire::StatFileRequest>,
    ) -> Answer<wire::StatFileResponse> {
        let (build, r) = self.build(request).await?;
        answer(build.keep_failed(stat_file(&build, r).await))
    }

    async fn evaluate(
        &self,
        request: Request<wire::EvaluateRequest>,
    ) -> Answer<wire::EvaluateResponse> {
        let (build, r) = self.build(request).await?;
        let result =
            async { build.find(&r.r#ref)?.evaluate().await.map(|()| wire::EvaluateResponse {}) };
        answer(build.keep_failed(result.await))
    }

    async fn ping(&self, request: Request<wire::PingRequest>) -> Answer<wire::PongResponse> {
        self.build(request).await?;
        Ok(Response::new(wire::PongResponse {
            frontend_api_caps: capabilities(&Caps::gateway()),
            llb_caps: capabilities(&Caps::llb()),
            workers: self.workers(),
        }))
    }

    async fn r#return(
        &self,
        request: Request<wire::ReturnRequest>,
    ) -> Answer<wire::ReturnResponse> {
        let (build, r) = self.build(request).await?;
        let result: Result<FrontendResult> = match r.error {
            Some(error) => {
                use prost::Message as _;
                let code = tonic::Code::from_i32(error.code);
                let message = error.message.clone();
                Err(fault_of(&Status::with_details(code, message, error.encode_to_vec().into())))
            }
            None => convert::result_from_wire(&build, r.result.unwrap_or_default()),
        };
        answer(build.deliver(result).map(|()| wire::ReturnResponse {}))
    }

    async fn inputs(&self, request: Request<wire::InputsRequest>) -> Answer<wire::InputsResponse> {
        let (build, _) = self.build(request).await?;
        answer(build.bridge.inputs().await.map(|m| wire::InputsResponse {
            definitions: m.into_iter().map(|(k, d)| (k, convert::definition_to_wire(&d))).collect(),
        }))
    }

    async fn warn(&self, request: Request<wire::WarnRequest>) -> Answer<wire::WarnResponse> {
        let (build, r) = self.build(request).await?;
        answer(warn(&build, r).await)
    }

    async fn new_container(
        &self,
        request: Request<wire::NewContainerRequest>,
    ) -> Answer<wire::NewContainerResponse> {
        let (build, r) = self.build(request).await?;
        answer(containers::new(&build, r).await.map(|()| wire::NewContainerResponse {}))
    }

    async fn release_container(
        &self,
        request: Request<wire::ReleaseContainerRequest>,
    ) -> Answer<wire::ReleaseContainerResponse> {
        let (build, r) = self.build(request).await?;
        answer(
            containers::release(&build, &r.container_id)
                .await
                .map(|()| wire::ReleaseContainerResponse {}),
        )
    }

    type ExecProcessStream = ReceiverStream<Result<wire::ExecMessage, Status>>;

    async fn exec_process(
        &self,
        request: Request<Streaming<wire::ExecMessage>>,
    ) -> Answer<Self::ExecProcessStream> {
        let (build, incoming) = self.build(request).await?;
        let (answers, queue) = mpsc::channel(ANSWERS);
        shipway_task::spawn("serve processes", processes::serve(build, incoming, answers));
        Ok(Response::new(ReceiverStream::new(queue)))
    }

    async fn read_file_container(
        &self,
        request: Request<wire::ReadFileRequest>,
    ) -> Answer<wire::ReadFileResponse> {
        let (build, r) = self.build(request).await?;
        answer(containers::read_file(&build, r).await)
    }

    async fn read_dir_container(
        &self,
        request: Request<wire::ReadDirRequest>,
    ) -> Answer<wire::ReadDirResponse> {
        let (build, r) = self.build(request).await?;
        answer(containers::read_dir(&build, r).await)
    }

    async fn stat_file_container(
        &self,
        request: Request<wire::StatFileRequest>,
    ) -> Answer<wire::StatFileResponse> {
        let (build, r) = self.build(request).await?;
        answer(containers::stat_file(&build, r).await)
    }
}
