//! The engine: builds by id, from request to response.

use crate::{
    attestations,
    bridge::{BuildScope, EngineBridge},
    caches, export,
    history::History,
    image_frontend::ImageFrontends,
    request::{BuildRequest, BuildResponse},
    state,
    trail::{Asked, Producers, Trail},
    verify,
};
use shipway_attest::{AttestOptions, Builder};
use shipway_dockerfile2llb::DockerfileFrontend;
use shipway_exporters::{Exporter, Exporters};
use shipway_fault::{Code, Fault, Result};
use shipway_frontend::{Bridge as _, FrontendResult, Options, SolveRequest, Worker};
use shipway_gateway::{Builds, GatewayBuild};
use shipway_oci::{Digest, Platform};
use shipway_ops::{Ahead, BuildJudge, JobData, LlbOp, Nested, NestedGraphs, Services, Wishes};
use shipway_progress::Journal;
use shipway_remotecache::{Backends, CacheIndex, CacheRequest};
use shipway_session::{SessionGroup, SessionHub, SessionId};
use shipway_solver::{JobId, Solver};
use shipway_sources::SourceMemo;
use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};
use tokio::sync::{oneshot, watch};

/// Longest name of a build: it is kept with everything that is remembered of it.
const MAX_REF: usize = 1024;

/// How long a status request waits for its build to begin (row `so.st.replay`).
const STATUS_GRACE: Duration = Duration::from_secs(6);

/// How long, and how many, ended builds can be followed from memory (row `so.st.keep`): a status
/// request may come after a short build's end.
const RECENT: (Duration, usize) = (Duration::from_secs(10), 64);

/// What an engine is made of.
pub struct EngineParts {
    /// What operations work with.
    pub services: Arc<Services>,
    /// The scheduler.
    pub solver: Solver<LlbOp>,
    /// Attached clients.
    pub sessions: SessionHub,
    /// The solver's store.
    pub caches: CacheIndex,
    /// How long the import of a cache may take; the build goes on without one that takes longer.
    pub import_deadline: Duration,
    /// The kinds of places that caches are kept in.
    pub cache_backends: Backends,
    /// Exporters.
    pub exporters: Exporters,
    /// Builds driven by clients.
    pub builds: Builds,
    /// Finished builds.
    pub history: Arc<History>,
    /// Platforms that steps can run for, native first; at least one.
    pub platforms: Vec<Platform>,
    /// Entitlements that builds may be granted.
    pub entitlements: Vec<String>,
    /// What provenance says of this daemon.
    pub builder: Builder,
    /// The in-house Dockerfile frontend, unless it is turned off.
    pub dockerfile: Option<DockerfileFrontend>,
    /// Whether steps of all builds see the network through a proxy only.
    pub proxied: bool,
    /// Which frontends out of images may run.
    pub image_frontends: ImageFrontends,
    /// What frontends are told of the worker besides its platforms.
    pub worker: Worker,
}

pub(crate) struct EngineInner {
    pub(crate) parts: EngineParts,
    /// Journals of running builds. The channel only wakes those who wait for one to begin.
    running: Mutex<HashMap<String, Journal>>,
    recent: Mutex<VecDeque<(Instant, String, Journal)>>,
    begun: watch::Sender<u64>,
    /// Which requests of running builds made what others take as inputs.
    pub(crate) producers: Producers,
    /// Graphs of running build operations.
    pub(crate) nested: NestedGraphs,
}

/// Builds. Clones share it.
#[derive(Clone)]
pub struct Engine(Arc<EngineInner>);

/// How a build's progress can be followed.
pub enum Progress {
    /// It is running, or ended a moment ago.
    Live(Journal),
    /// It ended; the file of the history with this digest holds what was said.
    Past(Digest),
}

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Ends a build's journal and takes it off the list of running ones, however the build ends.
struct Running {
    engine: Arc<EngineInner>,
    id: String,
    journal: Journal,
    recorded: bool,
    done: bool,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.journal.close();
        lock(&self.engine.running).remove(&self.id);
        self.engine.remember(self.id.clone(), self.journal.clone());
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            let engine = Arc::downgrade(&self.engine);
            runtime.spawn(async move {
                tokio::time::sleep(RECENT.0).await;
                if let Some(engine) = engine.upgrade() {
                    engine.forget();
                }
            });
        }
        // Dropped before its end: the client went away.
        if self.recorded && !self.done {
            let (engine, id, journal) =
                (self.engine.clone(), self.id.clone(), self.journal.clone());
            if let Ok(runtime) = tokio::runtime::Handle::try_current() {
                runtime.spawn(async move {
                    engine.parts.history.completed(&id, &journal, Err(Fault::cancelled())).await
                });
            }
        }
    }
}

impl EngineInner {
    /// Keeps a closed journal for a moment.
    fn remember(&self, id: String, journal: Journal) {
        let mut recent = lock(&self.recent);
        recent.push_back((Instant::now(), id, journal));
        if recent.len() > RECENT.1 {
            recent.pop_front();
        }
    }

    /// Lets go of the journals whose moment is over.
    fn forget(&self) {
        let mut recent = lock(&self.recent);
        while recent.front().is_some_and(|(ended, ..)| ended.elapsed() >= RECENT.0) {
            recent.pop_front();
        }
    }

    /// The journal of a build that runs or ended a moment ago.
    fn live(&self, id: &str) -> Option<Journal> {
        if let Some(journal) = lock(&self.running).get(id) {
            return Some(journal.clone());
        }
        lock(&self.recent)
            .iter()
            .rev()
            .find(|(_, known, _)| known == id)
            .map(|(.., journal)| journal.clone())
    }
}

impl Engine {
    /// An engine of these parts.
    pub fn new(parts: EngineParts) -> Self {
        Self(Arc::new(EngineInner {
            parts,
            running: Mutex::default(),
            recent: Mutex::default(),
            begun: watch::Sender::new(0),
            producers: Producers::default(),
            nested: NestedGraphs::default(),
        }))
    }

    /// Its parts.
    pub fn parts(&self) -> &EngineParts {
        &self.0.parts
    }

    /// Builds. Dropping the future cancels the build: what nobody else needs is stopped and
    /// removed.
    pub async fn build(&self, mut request: BuildRequest) -> Result<BuildResponse> {
        request.simplify();
        if request.id.is_empty() {
            return Err(Fault::invalid("a build needs a ref"));
        }
        if request.id.len() > MAX_REF {
            return Err(Fault::invalid(format!(
                "the ref of a build may have {MAX_REF} bytes, and this one has {}",
                request.id.len()
            )));
        }
        let parts = &self.0.parts;
        let entitlements = request.entitlements(&parts.entitlements)?;
        parts.cache_backends.check_exports(&request.cache_exports)?;
        let wanted = AttestOptions::parse(&request.options)?;
        let exporters = request
            .exporters
            .iter()
            .map(|e| parts.exporters.resolve(&e.kind, &e.attrs))
            .collect::<Result<Vec<_>>>()?;
        let sessions =
            SessionGroup::new(parts.sessions.clone(), [SessionId::new(&request.session)]);
        let journal = Journal::new();
        let data = JobData {
            id: request.id.as_str().into(),
            sessions,
            entitlements,
            memo: SourceMemo::default(),
            ahead: Ahead::default(),
            wishes: Wishes::default(),
            judge: BuildJudge::default(),
            nested: Nested::default(),
        };
        let job = parts.solver.job(JobId(request.id.clone()), data.clone(), journal.clone())?;
        let mut running = self.begin(&request, journal.clone())?;
        let scope = BuildScope::new(self.0.clone(), &request, data, job, journal.clone());
        scope.judge_steps();
        if wanted.provenance.as_ref().is_some_and(|p| p.capture_usage) {
            scope.watch_usage();
        }
        let (id, internal) = (request.id.clone(), request.internal);
        let outcome = run(scope, request, wanted, exporters).await;
        journal.close();
        if !internal {
            parts.history.completed(&id, &journal, outcome.clone()).await;
        }
        running.done = true;
        outcome
    }

    fn begin(&self, request: &BuildRequest, journal: Journal) -> Result<Running> {
        let mut all = lock(&self.0.running);
        if all.contains_key(&request.id) {
            return Err(Fault::new(Code::AlreadyExists, format!("job ID {} exists", request.id)));
        }
        all.insert(request.id.clone(), journal.clone());
        drop(all);
        if !request.internal {
            self.0.parts.history.started(request);
        }
        self.0.begun.send_modify(|n| *n += 1);
        Ok(Running {
            engine: self.0.clone(),
            id: request.id.clone(),
            journal,
            recorded: !request.internal,
            done: false,
        })
    }

    /// How to follow the build `id`, which may be about to begin.
    pub async fn progress(&self, id: &str) -> Result<Progress> {
        let mut begun = self.0.begun.subscribe();
        let find = async {
            loop {
                if let Some(journal) = self.0.live(id) {
                    return Some(Progress::Live(journal));
                }
                if let Some(log) = self.0.parts.history.summary(id).and_then(|s| s.log) {
                    return Some(Progress::Past(log.digest));
                }
                if begun.changed().await.is_err() {
                    return None;
                }
            }
        };
        let found = tokio::time::timeout(STATUS_GRACE, find).await.ok().flatten();
        found.ok_or_else(|| Fault::not_found(format!("no such job {id}")))
    }
}

async fn run(
    scope: Arc<BuildScope>,
    request: BuildRequest,
    wanted: AttestOptions,
    exporters: Vec<Arc<dyn Exporter>>,
) -> Result<BuildResponse> {
    caches::import_all(&scope, &request.cache_imports);
    let asked = Asked {
        frontend: request.frontend.clone(),
        options: request.options.clone(),
        inputs: request.inputs.clone(),
    };
    let trail = Trail::root(asked);
    let (internal, options, inputs) =
        (request.internal, request.options.clone(), request.inputs.clone());
    let bridge = EngineBridge {
        scope: scope.clone(),
        options: options.clone(),
        inputs,
        depth: 0,
        trail: trail.clone(),
    };
    let platforms = options.get("platform").cloned();
    // A client that drives the build may look at its states until the build has ended.
    let mut _registration = None;
    let result: FrontendResult = if request.definition.is_none() && request.frontend.is_empty() {
        let (build, returned) = GatewayBuild::new(Arc::new(bridge));
        _registration = Some(scope.engine.parts.builds.register(&scope.id, build.clone()));
        let returned = returned_by_client(&scope, returned).await;
        build.release_containers().await;
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
        match finish(&scope, &finishing, &result).await {
            // What the cache had promised, and an exporter was the first to read, is gone: it is
            // made again.
            Err(fault) if tries < state::MAX_TRIES && made_again(&result, &fault).await => {}
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
    options: Options,
    platforms: Option<String>,
}

async fn made_again(result: &FrontendResult, fault: &Fault) -> bool {
    let mut again = false;
    for state in result.states() {
        again |= state::made_again(state.as_ref(), fault).await;
    }
    again
}

/// Solves and exports the result.
async fn finish(
    scope: &Arc<BuildScope>,
    how: &Finishing,
    result: &FrontendResult,
) -> Result<BuildResponse> {
    let mut exporters = how.exporters.clone();
    let mut input = export::solve_all(scope, result, &exporters).await?;
    if how.by_session {
        exporters.extend(export::chosen_by_client(scope, result).await?);
    }
    verify::warn(scope, how.platforms.as_deref(), &input, exporters.len());
    let attested = attestations::add(scope, &how.wanted, &how.options, result, &mut input).await?;
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
        let session = scope.engine.parts.sessions.get(&SessionId::new(&scope.session)).await?;
        session.finalize_export(response.clone()).await?;
    }
    let metadata = result
        .metadata
        .iter()
        .map(|(k, v)| (k.clone(), String::from_utf8_lossy(v).into_owned()))
        .collect();
    Ok(BuildResponse { exporter_response: response, written, metadata, provenance })
}

/// Waits for the client to return a result through the gateway (row `ctl.solve.gwmode`).
async fn returned_by_client(
    scope: &BuildScope,
    returned: oneshot::Receiver<Result<FrontendResult>>,
) -> Result<FrontendResult> {
    let gone = async {
        match scope.engine.parts.sessions.get(&SessionId::new(&scope.session)).await {
            Ok(session) => session.closed().await,
            // A build without a session can still be driven.
            Err(_) => std::future::pending().await,
        }
    };
    tokio::select! {
        biased;
        result = returned => result.map_err(|_| Fault::cancelled())?,
        () = gone => Err(Fault::cancelled().context("the client went away")),
    }
}
