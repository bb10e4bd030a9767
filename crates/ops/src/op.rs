//! One vertex's work: what all operations have in common.

use crate::{
    JobData, Services,
    content::{self, ContentSelector},
    export_plan::{BaseLayers, PlannedLayer},
    failed_state::{FailedState, FailedStates},
};
use async_trait::async_trait;
use shipway_attest::Capture;
use shipway_buildcache::room_was_made;
use shipway_fault::{Detail, Fault, Result, Subject};
use shipway_llb::{ExportCache, Vertex};
use shipway_oci::Digest;
use shipway_progress::LogStream;
use shipway_refs::{ImmutableRef, MutableRef};
use shipway_session::SessionGroup;
use shipway_solver::{CacheMap, InputMap, OpContext, Operation};
use shipway_telemetry::{TARGET, traced_result};
use std::sync::Arc;
use tracing::{Span, info_span};

/// The work of one LLB vertex.
pub struct LlbOp {
    pub(crate) vertex: Arc<Vertex>,
    pub(crate) services: Arc<Services>,
    pub(crate) work: Box<dyn VertexOp>,
}

pub(crate) type Context = OpContext<JobData>;

/// One kind of LLB operation; `of` is the vertex that it is the operation of.
#[async_trait]
pub(crate) trait VertexOp: Send + Sync {
    /// What the result depends on.
    async fn cache_map(&self, of: &LlbOp, cx: &Context) -> Result<CacheMap>;

    /// The parts of input number `input` by whose content the result is known; `None` where it is
    /// by their keys alone.
    fn selectors(&self, _input: usize) -> Option<Vec<ContentSelector>> {
        None
    }

    /// Runs the operation. Gives its outputs, in order.
    async fn run(
        &self,
        of: &LlbOp,
        inputs: Vec<ImmutableRef>,
        cx: &Context,
    ) -> Result<Vec<ImmutableRef>>;

    /// Notes in `capture`, for provenance, what the operation used.
    fn capture(&self, _of: &LlbOp, _capture: &mut Capture) -> Result<()> {
        Ok(())
    }

    /// What output number `output` has below its own layer; the operation has `inputs` inputs.
    fn base_layers(&self, _output: usize, _inputs: usize) -> BaseLayers {
        BaseLayers::default()
    }

    /// Whether it counts towards the limit of operations that run at a time.
    fn takes_slot(&self) -> bool {
        true
    }
}

impl LlbOp {
    /// The clients of all builds that want this vertex.
    pub(crate) fn sessions(cx: &Context) -> Result<SessionGroup> {
        let jobs = (cx.jobs)();
        let Some(first) = jobs.first() else { return Err(Fault::cancelled()) };
        if jobs.len() == 1 {
            return Ok(first.sessions.clone());
        }
        let mut ids = Vec::new();
        for id in jobs.iter().flat_map(|j| j.sessions.ids()) {
            if !ids.contains(id) {
                ids.push(id.clone());
            }
        }
        Ok(SessionGroup::new(first.sessions.hub().clone(), ids))
    }

    /// Whether its result may be part of an exported cache (row `llb.md.exportcache`).
    pub fn is_for_export(&self) -> bool {
        self.vertex.metadata.export_cache != Some(ExportCache::No)
    }

    /// Notes in `capture` what the operation used (row `at.prov.capture`). A source is known once
    /// it is pinned.
    pub fn capture(&self, capture: &mut Capture) -> Result<()> {
        self.work.capture(self, capture)
    }

    /// What output number `output` has below its own layer.
    pub(crate) fn base_layers(&self, output: usize, inputs: usize) -> BaseLayers {
        self.work.base_layers(output, inputs)
    }

    /// Commits what output `output` is; compressed now, or in the background, if a build that
    /// shares the vertex exports it.
    pub(crate) async fn commit(
        &self,
        state: MutableRef,
        description: String,
        output: Option<usize>,
        cx: &Context,
    ) -> Result<ImmutableRef> {
        let jobs = (cx.jobs)();
        let planned = |job: &JobData| {
            Some((job.export_plan.layer(self.vertex.digest, output?)?, job.export_plan.ended()))
        };
        match jobs.iter().find_map(planned) {
            None => state.commit(description).await,
            Some((PlannedLayer { compression, last: true }, _)) => {
                state.commit_packed(description, compression).await
            }
            Some((PlannedLayer { compression, last: false }, ended)) => {
                let state = state.commit(description).await?;
                state.start_compression(compression, ended);
                Ok(state)
            }
        }
    }

    /// A span of the traces of a build that wants the vertex; `what` of it is done stands before
    /// its name.
    fn span(&self, what: &str, cx: &Context) -> Span {
        let jobs = (cx.jobs)();
        let build = jobs.first().and_then(|job| job.trace.id());
        info_span!(target: TARGET, parent: build, "vertex", otel.name = format!("{what}{}", cx.reporter.name()), vertex = %self.vertex.digest)
    }

    /// Runs the operation, and once more where it found the disk full and there is more room now.
    async fn run_with_room(
        &self,
        inputs: Vec<ImmutableRef>,
        cx: &Context,
    ) -> Result<Vec<ImmutableRef>> {
        let writing = self.services.quota.enter().await;
        let done = self.work.run(self, inputs.clone(), cx).await;
        if let Err(fault) = &done
            && let Some(pruned) = writing.made_room(fault).await
        {
            cx.reporter.log(LogStream::Stderr, room_was_made(pruned).as_bytes());
            return self.work.run(self, inputs, cx).await;
        }
        done
    }

    /// [`content::checksum`], which may fetch the state, and so fill the disk.
    async fn checksum(
        &self,
        value: &ImmutableRef,
        selectors: &[ContentSelector],
        cx: &Context,
    ) -> Result<Digest> {
        let writing = self.services.quota.enter().await;
        let sum = content::checksum(value, selectors, &cx.reporter).await;
        match &sum {
            Err(fault) if writing.made_room(fault).await.is_some() => {
                content::checksum(value, selectors, &cx.reporter).await
            }
            _ => sum,
        }
    }

    /// The failing operation as a typed detail, with the states that went into it.
    fn failed(
        &self,
        fault: Fault,
        inputs: &[ImmutableRef],
        subject: Option<Subject>,
        cx: &Context,
    ) -> Fault {
        if fault.is_cancelled() || fault.details().iter().any(|d| matches!(d, Detail::Solve { .. }))
        {
            return fault;
        }
        let inputs = inputs.iter().map(|i| Some(FailedState::Done(i.clone()))).collect();
        FailedStates::attach(fault, &self.vertex, &(cx.jobs)(), inputs, Vec::new(), subject)
    }
}

/// The key of an operation that only arranges its inputs.
pub(crate) fn keyed(
    kind: &str,
    id: &str,
    arrangement: &impl std::fmt::Debug,
    inputs: usize,
) -> CacheMap {
    let mut key = crate::key::KeyWriter::new(kind);
    key.text("id", id).value("inputs", arrangement);
    key.map(vec![InputMap::default(); inputs])
}

#[async_trait]
impl Operation for LlbOp {
    type Output = ImmutableRef;
    type Job = JobData;

    async fn cache_map(&self, cx: &Context) -> Result<CacheMap> {
        let span = self.span("cache request: ", cx);
        let mapped = traced_result(span, self.work.cache_map(self, cx)).await;
        mapped.map_err(|e| self.failed(e, &[], None, cx))
    }

    async fn content_key(
        &self,
        input: usize,
        value: &ImmutableRef,
        cx: &Context,
    ) -> Result<Option<Digest>> {
        let Some(selectors) = self.work.selectors(input) else { return Ok(None) };
        self.services.sources.wanted_by(value, &Self::sessions(cx)?);
        let subject = Subject::CacheInput(i64::try_from(input).unwrap_or(-1));
        traced_result(self.span("checksum for: ", cx), self.checksum(value, &selectors, cx))
            .await
            .map(Some)
            .map_err(|e| self.failed(e, std::slice::from_ref(value), Some(subject), cx))
    }

    async fn run(&self, inputs: Vec<ImmutableRef>, cx: &Context) -> Result<Vec<ImmutableRef>> {
        let sessions = Self::sessions(cx)?;
        inputs.iter().for_each(|i| self.services.sources.wanted_by(i, &sessions));
        let before = inputs.clone();
        let done = traced_result(self.span("", cx), self.run_with_room(inputs, cx)).await;
        if let Ok(states) = &done {
            (cx.jobs)().iter().for_each(|job| job.export_plan.made(self.vertex.digest, states));
        }
        done.map_err(|e| self.failed(e, &before, None, cx))
    }

    fn is_lost(value: &ImmutableRef, fault: &Fault) -> bool {
        value.is_lost(fault)
    }

    fn takes_slot(&self) -> bool {
        self.work.takes_slot()
    }
}
