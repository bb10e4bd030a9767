//! The engine: builds by id, from request to response.

use crate::{
    build::{Build, BuildScope, Shared},
    export::mounts::{self, MountRequests},
    failures::without_states,
    finalize::Finalizing,
    parts::EngineParts,
    permit, pipeline,
    request::{BuildRequest, BuildResponse, ExporterRequest},
};
use parking_lot::Mutex;
use shipway_attest::AttestOptions;
use shipway_fault::{Code, Fault, Result};
use shipway_history::{ExporterRecord, StartedBuild};
use shipway_identity::Caller;
use shipway_oci::Digest;
use shipway_ops::JobData;
use shipway_progress::Journal;
use shipway_remotecache::CacheClients;
use shipway_session::SessionGroup;
use shipway_solver::JobId;
use shipway_telemetry::{
    TraceContext, TraceRecording,
    meter::{self, BuildKind},
};
use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::sync::watch;
use tracing::Span;

/// Longest name of a build: it is kept with everything that is remembered of it.
const MAX_REF: usize = 1024;

/// How long a status request waits for its build to begin (row `so.st.replay`).
const STATUS_GRACE: Duration = Duration::from_secs(6);

/// How long ended builds can be followed from memory (row `so.st.keep`): a status
/// request may come after a short build's end.
const RECENT: Duration = Duration::from_secs(10);

/// How many of them.
const MAX_RECENT: usize = 64;

struct EngineInner {
    parts: Arc<EngineParts>,
    /// Running builds. The channel only wakes those who wait for one to begin.
    running: Mutex<HashMap<String, Followed>>,
    recent: Mutex<VecDeque<(Instant, String, Followed)>>,
    begun: watch::Sender<u64>,
    shared: Shared,
    finalizing: Arc<Finalizing>,
}

/// A build that can be followed.
#[derive(Clone)]
struct Followed {
    journal: Journal,
    began: Instant,
    /// Whose it is, where that matters.
    owner: Option<Arc<str>>,
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

/// Ends a build's journal and takes it off the list of running ones, however the build ends.
struct Running {
    engine: Arc<EngineInner>,
    id: String,
    followed: Followed,
    recorded: bool,
    done: bool,
    trace: Option<TraceRecording>,
    frontend: String,
}

impl Running {
    /// Counts the build, which ended so.
    fn count(&self, failure: Option<&Fault>) {
        let status = match failure {
            None => "completed",
            Some(fault) if fault.is_cancelled() => "canceled",
            Some(_) => "error",
        };
        let code = failure.map_or_else(String::new, |fault| format!("{:?}", fault.code()));
        let frontend = self.frontend.clone();
        meter::BUILDS.add(BuildKind { frontend, status, code });
        meter::BUILD_TIMES.add(status, self.followed.began.elapsed());
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.followed.journal.close();
        self.engine.running.lock().remove(&self.id);
        self.engine.remember(self.id.clone(), self.followed.clone());
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            let engine = Arc::downgrade(&self.engine);
            shipway_task::spawn_on(&runtime, "forget a build's progress", async move {
                tokio::time::sleep(RECENT).await;
                if let Some(engine) = engine.upgrade() {
                    engine.forget();
                }
            });
        }
        if !self.done {
            self.count(Some(&Fault::cancelled()));
        }
        // Dropped before its end: the client disconnected.
        if self.recorded && !self.done {
            let (engine, id, journal) =
                (self.engine.clone(), self.id.clone(), self.followed.journal.clone());
            let trace = self.trace.take();
            if let Ok(runtime) = tokio::runtime::Handle::try_current() {
                shipway_task::spawn_on(&runtime, "record a cancelled build", async move {
                    let history = &engine.parts.history;
                    history.completed(&id, &journal, Err(Fault::cancelled())).await;
                    if let Some(trace) = trace {
                        engine.finalizing.keep(history.clone(), id, trace);
                    }
                });
            }
        }
    }
}

impl EngineInner {
    /// Keeps a build whose journal is closed for a moment.
    fn remember(&self, id: String, followed: Followed) {
        let mut recent = self.recent.lock();
        recent.push_back((Instant::now(), id, followed));
        if recent.len() > MAX_RECENT {
            recent.pop_front();
        }
    }

    /// Lets go of the journals whose moment is over.
    fn forget(&self) {
        let mut recent = self.recent.lock();
        while recent.front().is_some_and(|(ended, ..)| ended.elapsed() >= RECENT) {
            recent.pop_front();
        }
    }

    /// The journal of a build that runs or ended a moment ago, if `caller` may see it.
    fn live(&self, id: &str, caller: &Caller) -> Option<Journal> {
        let running = self.running.lock().get(id).cloned();
        let recent = || {
            let recent = self.recent.lock();
            recent.iter().rev().find(|(_, known, _)| known == id).map(|(.., f)| f.clone())
        };
        let found = running.or_else(recent)?;
        caller.sees(found.owner.as_deref()).then_some(found.journal)
    }
}

impl Engine {
    /// An engine of these parts.
    pub fn new(parts: EngineParts) -> Self {
        let shared = Shared::new(&parts);
        Self(Arc::new(EngineInner {
            parts: Arc::new(parts),
            running: Mutex::default(),
            recent: Mutex::default(),
            begun: watch::Sender::new(0),
            shared,
            finalizing: Arc::default(),
        }))
    }

    /// Its parts.
    pub fn parts(&self) -> &EngineParts {
        &self.0.parts
    }

    /// The ids of the builds that run, and since when each does.
    pub fn running(&self) -> Vec<(String, Instant)> {
        self.0.running.lock().iter().map(|(id, build)| (id.clone(), build.began)).collect()
    }

    /// Builds. Dropping the future cancels the build: what no other build needs is stopped and
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
        let entitlements = request.entitlements(&parts.entitlements, &parts.networks)?;
        let cache_mounts = MountRequests::take(&mut request)?;
        permit::caches(parts, &request, &cache_mounts.saves, &cache_mounts.restores)?;
        parts.cache_backends.check_exports(&request.cache_exports)?;
        let wanted = AttestOptions::parse(&request.options)?;
        let exporters = request
            .exporters
            .iter()
            .map(|e| parts.exporters.resolve(&e.kind, &e.attrs))
            .collect::<Result<Vec<_>>>()?;
        permit::exports(&request.caller, &exporters, None)?;
        let hub = parts.sessions.of_owner(request.caller.owner().cloned());
        let sessions = SessionGroup::new(hub, [request.session.clone()]);
        let clients = CacheClients { all: sessions.clone(), own: request.session.clone() };
        let journal = Journal::new();
        let data = JobData {
            id: request.id.as_str().into(),
            sessions,
            entitlements,
            memo: Default::default(),
            export_plan: Default::default(),
            step_options: Default::default(),
            cache_mounts: cache_mounts.sources(parts, &clients),
            failed: Default::default(),
            judge: Default::default(),
            nested: Default::default(),
            trace: Span::current(),
        };
        let job = parts.solver.job(JobId(request.id.clone()), data.clone(), journal.clone())?;
        let mut running = self.begin(&request, journal.clone())?;
        let scope = BuildScope::new(
            parts.clone(),
            self.0.shared.clone(),
            &request,
            data,
            job,
            journal.clone(),
        );
        scope.judge_steps();
        if wanted.provenance.as_ref().is_some_and(|p| p.capture_usage) {
            scope.watch_usage();
        }
        let (id, internal) = (request.id.clone(), request.internal);
        let failed = scope.data.failed.clone();
        let mut outcome =
            pipeline::run(Build::new(scope.clone()), request, wanted, exporters).await;
        if let Ok(response) = &mut outcome {
            let saved = mounts::save_all(&scope, &cache_mounts.saves).await;
            response.exporter_response.extend(saved);
        }
        journal.close();
        if !internal {
            let finished = outcome.as_ref().map(|response| response.finished.clone());
            parts.history.completed(&id, &journal, finished.map_err(without_states)).await;
            if let Some(trace) = running.trace.take() {
                self.0.finalizing.keep(parts.history.clone(), id, trace);
            }
        }
        running.done = true;
        running.count(outcome.as_ref().err());
        if internal {
            return outcome;
        }
        outcome.map_err(|fault| self.0.shared.failures.keep(fault, &failed))
    }

    fn begin(&self, request: &BuildRequest, journal: Journal) -> Result<Running> {
        let mut all = self.0.running.lock();
        let past = self.0.parts.history.summary(&request.id);
        // A name that is used again takes the place of the build that had it.
        let others = past.is_some_and(|s| !request.caller.owns(s.owner.as_deref()));
        if others || all.contains_key(&request.id) {
            return Err(Fault::new(Code::AlreadyExists, format!("job ID {} exists", request.id)));
        }
        let owner = request.caller.owner().cloned();
        let followed = Followed { journal, began: Instant::now(), owner };
        all.insert(request.id.clone(), followed.clone());
        drop(all);
        if !request.internal {
            let exporter = |e: &ExporterRequest| ExporterRecord {
                kind: e.kind.clone(),
                attrs: e.attrs.clone(),
            };
            self.0.parts.history.started(&StartedBuild {
                id: request.id.clone(),
                owner: followed.owner.as_deref().map(str::to_owned),
                frontend: request.frontend.clone(),
                options: shipway_remotecache::without_secrets(&request.options),
                exporters: request.exporters.iter().map(exporter).collect(),
            });
        }
        self.0.begun.send_modify(|n| *n += 1);
        Ok(Running {
            engine: self.0.clone(),
            id: request.id.clone(),
            followed,
            recorded: !request.internal,
            done: false,
            trace: self.record_trace().filter(|_| !request.internal),
            frontend: request.frontend.clone(),
        })
    }

    /// Records the trace that the build is in, if it is recorded anywhere.
    fn record_trace(&self) -> Option<TraceRecording> {
        let traces = self.0.parts.traces.as_ref()?;
        let context = shipway_telemetry::current().filter(TraceContext::is_sampled)?;
        Some(traces.record(context.trace_id()))
    }

    /// Completes the record of a build now, rather than when its last spans may have come (row
    /// `ctl.hist.update`).
    pub async fn finalize(&self, id: &str) {
        self.0.finalizing.hurry(id).await;
    }

    /// [`finalize`](Self::finalize) of all builds.
    pub async fn finalize_all(&self) {
        self.0.finalizing.hurry_all().await;
    }

    /// Removes what failed steps left; for the daemon's end.
    pub async fn forget_failures(&self) {
        self.0.shared.failures.clear().await;
    }

    /// How `caller` can follow the build `id`, which may be about to begin. Builds of others are
    /// not found.
    pub async fn progress(&self, id: &str, caller: &Caller) -> Result<Progress> {
        let mut begun = self.0.begun.subscribe();
        let find = async {
            loop {
                if let Some(journal) = self.0.live(id, caller) {
                    return Some(Progress::Live(journal));
                }
                let past = self.0.parts.history.summary(id);
                let past = past.filter(|s| caller.sees(s.owner.as_deref()));
                if let Some(log) = past.and_then(|s| s.log) {
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
