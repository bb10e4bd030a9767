//! What one build is: data that everything done for the build shares.

use crate::{
    BuildPolicy, BuildRequest,
    build::state::EngineRef,
    parts::EngineParts,
    provenance::{
        call_log::{ProducerGuard, Producers},
        usage::Sampler,
    },
};
use parking_lot::Mutex;
use shipway_frontend::{BuildRef, Explain, FrontendResult};
use shipway_oci::Digest;
use shipway_ops::{JobData, LlbOp, NestedGraphs};
use shipway_progress::Journal;
use shipway_remotecache::{CacheRequest, Import};
use shipway_session::SessionId;
use shipway_solver::Job;
use std::{
    collections::HashMap,
    sync::{Arc, OnceLock, Weak},
    time::SystemTime,
};

/// What running builds share. Clones share it, too.
#[derive(Clone, Default)]
pub(crate) struct Shared {
    /// Which requests of running builds made what others take as inputs.
    pub(crate) producers: Producers,
    /// Graphs of running build operations.
    pub(crate) nested: NestedGraphs,
}

/// What all bridges and states of one build share. The job ends with it.
pub(crate) struct BuildScope {
    itself: Weak<Self>,
    pub(crate) parts: Arc<EngineParts>,
    /// What it shares with other builds.
    pub(crate) shared: Shared,
    pub(crate) id: String,
    /// Its client.
    pub(crate) session: SessionId,
    /// What it brings to its vertices.
    pub(crate) data: JobData,
    pub(crate) job: Job<LlbOp>,
    pub(crate) journal: Journal,
    /// What it may use.
    pub(crate) policy: BuildPolicy,
    /// What its provenance is called.
    pub(crate) invocation: String,
    /// When it began.
    pub(crate) started: SystemTime,
    /// Whether its steps see the network through a proxy only.
    pub(crate) proxied: bool,
    /// Which version of the exporters' defaults it wants.
    pub(crate) compatibility: i64,
    finished: OnceLock<SystemTime>,
    imports: Mutex<Vec<(CacheRequest, Arc<Import>)>>,
    explainers: Mutex<Vec<Arc<dyn Explain>>>,
    producers: Mutex<Vec<ProducerGuard>>,
    states: Mutex<HashMap<String, Weak<EngineRef>>>,
    usage: OnceLock<Sampler>,
}

impl BuildScope {
    /// Lets the build look into the cache of `request` until it ends, which `import` begins to read
    /// unless this build has asked for it (row `rc.dedupe`).
    pub(crate) fn import(&self, request: &CacheRequest, import: impl FnOnce() -> Arc<Import>) {
        let mut imports = self.imports.lock();
        if imports.iter().all(|(asked, _)| asked != request) {
            let import = import();
            self.job.import(import.clone());
            imports.push((request.clone(), import));
        }
    }

    /// What the build imports.
    pub(crate) fn imports(&self) -> Vec<Arc<Import>> {
        self.imports.lock().iter().map(|(_, import)| import.clone()).collect()
    }

    pub(crate) fn new(
        parts: Arc<EngineParts>,
        shared: Shared,
        request: &BuildRequest,
        data: JobData,
        job: Job<LlbOp>,
        journal: Journal,
    ) -> Arc<Self> {
        let started = SystemTime::now();
        let nested = data.nested.clone();
        let scope = Arc::new_cyclic(|itself| Self {
            itself: itself.clone(),
            proxied: request.proxied || parts.proxied,
            parts,
            shared,
            id: request.id.clone(),
            session: request.session.clone(),
            policy: request.policy.clone(),
            data,
            job,
            journal,
            invocation: Digest::of(format!("{}\n{started:?}", request.id)).hex()[..25].to_owned(),
            started,
            compatibility: request.compatibility,
            finished: OnceLock::new(),
            imports: Mutex::default(),
            explainers: Mutex::default(),
            producers: Mutex::default(),
            states: Mutex::default(),
            usage: OnceLock::new(),
        });
        nested.set(scope.itself.clone());
        scope
    }

    /// When it was done with everything but writing.
    pub(crate) fn finished(&self) -> SystemTime {
        *self.finished.get_or_init(SystemTime::now)
    }

    /// Looks at the machine from time to time from now on.
    pub(crate) fn watch_usage(&self) {
        self.usage.get_or_init(Sampler::start);
    }

    /// What was seen, if it was asked for.
    pub(crate) fn usage(&self) -> Vec<serde_json::Value> {
        self.usage.get().map(Sampler::samples).unwrap_or_default()
    }

    /// Keeps a producer known until the build ends.
    pub(crate) fn hold_producer(&self, producer: ProducerGuard) {
        self.producers.lock().push(producer);
    }

    /// Remembers what can explain failures of this build's states.
    pub(crate) fn add_explainer(&self, result: &mut FrontendResult) {
        if let Some(explain) = result.explain.take() {
            self.explainers.lock().push(explain);
        }
    }

    /// What can explain failures of this build's states.
    pub(crate) fn explainers(&self) -> Vec<Arc<dyn Explain>> {
        self.explainers.lock().clone()
    }

    /// Makes a state of the build known by its id.
    pub(crate) fn add_state(&self, state: &Arc<EngineRef>) {
        let mut states = self.states.lock();
        states.insert(state.id.clone(), Arc::downgrade(state));
    }

    /// Forgets the state `id`.
    pub(crate) fn remove_state(&self, id: &str) {
        self.states.lock().remove(id);
    }

    /// The state of this build that `state` is a reference to; none for what a failed operation
    /// left.
    pub(crate) fn state_of(&self, state: &dyn BuildRef) -> Option<Arc<EngineRef>> {
        let states = self.states.lock();
        states.get(state.id()).and_then(Weak::upgrade)
    }

    /// The scope itself, unless the build has ended.
    pub(crate) fn this(&self) -> Option<Arc<Self>> {
        self.itself.upgrade()
    }
}
