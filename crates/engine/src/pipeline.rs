//! A build from beginning to end: solve, verify, attest, export.

use crate::{
    attestations,
    build::{Build, BuildScope, CallLog, FrontendCall, MAX_TRIES},
    export::{self, caches, verify},
    frontends::EngineBridge,
    request::{BuildRequest, BuildResponse},
};
use shipway_attest::AttestOptions;
use shipway_exporters::Exporter;
use shipway_fault::{Fault, Result};
use shipway_frontend::{Bridge as _, FrontendOptions, FrontendResult, SolveRequest};
use shipway_gateway::GatewayBuild;
use shipway_history::FinishedBuild;
use shipway_remotecache::CacheRequest;
use std::sync::Arc;
use tokio::sync::oneshot;

/// Runs a build from its request to its response.
pub(crate) async fn run(
    build: Arc<Build>,
    request: BuildRequest,
    wanted: AttestOptions,
    exporters: Vec<Arc<dyn Exporter>>,
) -> Result<BuildResponse> {
    let scope = &build.scope;
    caches::import_all(scope, &request.cache_imports)?;
    let call = FrontendCall {
        frontend: request.frontend.clone(),
        options: request.options.clone(),
        inputs: request.inputs.clone(),
    };
    let (internal, options, inputs) =
        (request.internal, request.options.clone(), request.inputs.clone());
    let bridge = EngineBridge {
        build: build.clone(),
        options: options.clone(),
        inputs,
        depth: 0,
        log: CallLog::root(call),
    };
    let platforms = options.get("platform").cloned();
    // A client that drives the build may look at its states until the build has ended.
    let mut _registration = None;
    let result: FrontendResult = if request.definition.is_none() && request.frontend.is_empty() {
        let (driven, returned) = GatewayBuild::new(Arc::new(bridge));
        let owner = scope.caller.owner().cloned();
        _registration = Some(scope.parts.builds.register(&scope.id, owner, driven.clone()));
        let returned = returned_by_client(scope, returned).await;
        driven.release_containers().await;
        returned?
    } else {
        let solve = SolveRequest {
            definition: request.definition,
            frontend: request.frontend,
            options: request.options,
            inputs: request.inputs,
            ..SolveRequest::default()
        };
        bridge.solve(solve).await?
    };
    let finishing = Finishing {
        exporters,
        cache_exports: request.cache_exports,
        by_session: request.session_exporters,
        internal,
        wanted,
        options,
        platforms,
    };
    let mut tries = 0;
    loop {
        tries += 1;
        match finish(&build, &finishing, &result).await {
            // What the cache had promised, and an exporter was the first to read, is gone: it is
            // made again.
            Err(fault) if tries < MAX_TRIES && made_again(&build, &result, &fault).await => {}
            done => return done,
        }
    }
}

/// How a build ends once its result is known.
struct Finishing {
    exporters: Vec<Arc<dyn Exporter>>,
    cache_exports: Vec<CacheRequest>,
    /// Whether the client chooses more exporters when it sees the result.
    by_session: bool,
    internal: bool,
    wanted: AttestOptions,
    options: FrontendOptions,
    platforms: Option<String>,
}

async fn made_again(build: &Build, result: &FrontendResult, fault: &Fault) -> bool {
    let mut again = false;
    for state in result.states() {
        again |= build.states.made_again(state.as_ref(), fault).await;
    }
    again
}

/// Solves and exports the result.
async fn finish(
    build: &Arc<Build>,
    how: &Finishing,
    result: &FrontendResult,
) -> Result<BuildResponse> {
    let (scope, mut exporters) = (&build.scope, how.exporters.clone());
    let mut input = export::solve_all(build, result, &exporters).await?;
    if how.by_session {
        exporters.extend(export::chosen_by_client(scope, result).await?);
    }
    verify::warn(scope, how.platforms.as_deref(), &input, exporters.len());
    let attested = attestations::add(build, &how.wanted, &how.options, result, &mut input).await?;
    let (mut response, written) =
        export::run_all(scope, &exporters, &how.cache_exports, &input).await?;
    for (key, value) in &result.metadata {
        if key.starts_with("frontend.") {
            response.insert(key.clone(), String::from_utf8_lossy(value).into_owned());
        }
    }
    let provenance = if how.internal {
        Vec::new()
    } else {
        attestations::record(scope, &how.wanted, &attested).await?
    };
    if how.by_session {
        let session = scope.data.sessions.hub().get(&scope.session).await?;
        session.finalize_export(response.clone()).await?;
    }
    let metadata = result
        .metadata
        .iter()
        .map(|(k, v)| (k.clone(), String::from_utf8_lossy(v).into_owned()))
        .collect();
    let finished = FinishedBuild { metadata, written, provenance };
    Ok(BuildResponse { exporter_response: response, finished })
}

/// Waits for the client to return a result through the gateway (row `ctl.solve.gwmode`).
async fn returned_by_client(
    scope: &BuildScope,
    returned: oneshot::Receiver<Result<FrontendResult>>,
) -> Result<FrontendResult> {
    let gone = async {
        match scope.data.sessions.hub().get(&scope.session).await {
            Ok(session) => session.closed().await,
            // A build without a session can still be driven.
            Err(_) => std::future::pending().await,
        }
    };
    tokio::select! {
        biased;
        result = returned => result.map_err(|_| Fault::cancelled())?,
        () = gone => Err(Fault::cancelled().context("the client disconnected")),
    }
}
