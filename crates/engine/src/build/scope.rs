//! What one build is: data that everything done for the build shares.

use super::{
    call_log::{ProducerGuard, Producers},
    usage::Sampler,
};
use crate::{
    failures::Failures,
    parts::EngineParts,
    request::{BuildPolicy, BuildRequest},
};
use futures::future::BoxFuture;
use parking_lot::Mutex;
use shipway_fault::Fault;
use shipway_identity::Caller;
use shipway_oci::Digest;
use shipway_ops::{JobData, LlbOp, NestedGraphs};
use shipway_progress::Journal;
use shipway_remotecache::{CacheRequest, Import};
use shipway_session::SessionId;
use shipway_solver::Job;
use std::{
    sync::{Arc, OnceLock},
    time::SystemTime,
};

/// What running builds share. Clones share it, too.
#[derive(Clone)]
pub(crate) struct Shared {
    /// Which requests of running builds made what others take as inputs.
    pub(crate) producers: Producers,
    /// Graphs of running build operations.
    pub(crate) nested: NestedGraphs,
    /// What failed steps left.
    pub(crate) failures: Arc<Failures>,
}

impl Shared {
    pub(crate) fn new(parts: &EngineParts) -> Self {
        Self {
            producers: Producers::default(),
            nested: NestedGraphs::default(),
            failures: Failures::new(parts.failures, parts.caches.clone()),
        }
    }
}

/// What a frontend knows of the failures of what it asked for.
pub(crate) trait Explainer: Send + Sync {
    /// The fault, with hints if there are any.
    fn explain(&self, fault: Fault) -> BoxFuture<'_, Fault>;
}

/// What all bridges and states of one build share. The job ends with it.
pub(crate) struct BuildScope {
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
    /// Who asks for it.
    pub(crate) caller: Caller,
    /// Whether its steps see the network through a proxy only.
    pub(crate) proxied: bool,
    /// Which version of the exporters' defaults it wants.
    pub(crate) compatibility: i64,
    finished: OnceLock<SystemTime>,
    imports: Mutex<Vec<(CacheRequest, Arc<Import>)>>,
    explainers: Mutex<Vec<Arc<dyn Explainer>>>,
    producers: Mutex<Vec<ProducerGuard>>,
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
        Arc::new(Self {
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
            caller: request.caller.clone(),
            compatibility: request.compatibility,
            finished: OnceLock::new(),
            imports: Mutex::default(),
            explainers: Mutex::default(),
            producers: Mutex::default(),
            usage: OnceLock::new(),
        })
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

    /// Lets a frontend explain failures of this build's states from now on.
    pub(crate) fn add_explainer(&self, explainer: Arc<dyn Explainer>) {
        self.explainers.lock().push(explainer);
    }

    /// The fault with the hints that the build's frontends have for it.
    pub(crate) async fn explained(&self, mut fault: Fault) -> Fault {
        let explainers = self.explainers.lock().clone();
        for explainer in explainers {
            fault = explainer.explain(fault).await;
        }
        fault
    }
}
