//! One vertex's work.

use crate::{
    JobData, Services, build, exec, file,
    remains::{Remain, Remains},
};
use async_trait::async_trait;
use shipway_attest::Capture;
use shipway_fault::{Detail, Fault, Result};
use shipway_llb::{ExportCache, MountKind, NetMode, Op, Vertex};
use shipway_netproxy::Capture as Fetched;
use shipway_oci::Digest;
use shipway_refs::ImmutableRef;
use shipway_session::SessionGroup;
use shipway_solver::{CacheMap, InputMap, OpContext, Operation};
use shipway_sources::{PinnedSource, SourceContext, SourceSpec};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::OnceCell;

/// The work of one LLB vertex.
pub struct LlbOp {
    pub(crate) vertex: Arc<Vertex>,
    pub(crate) services: Arc<Services>,
    /// What a source was pinned to when its key was asked for.
    pin: OnceCell<PinnedSource>,
    /// What a process on the proxy network asked for when it ran.
    fetched: Mutex<Option<Fetched>>,
}

pub(crate) type Context = OpContext<JobData>;

impl LlbOp {
    /// The work of `vertex`.
    pub fn new(vertex: Arc<Vertex>, services: Arc<Services>) -> Self {
        Self { vertex, services, pin: OnceCell::new(), fetched: Mutex::default() }
    }

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

    /// Notes in `capture` what the operation used (row `at.prov.capture`). A source tells once it
    /// is pinned.
    pub fn capture(&self, capture: &mut Capture) -> Result<()> {
        match &self.vertex.op {
            Op::Source(_) => {
                if let (Some(spec), Some(pin)) = (self.spec(), self.pin.get()) {
                    self.services.sources.capture(&spec, pin, capture)?;
                }
            }
            Op::Exec(exec) => {
                for mount in &exec.mounts {
                    match &mount.kind {
                        MountKind::Secret(s) => capture.add_secret(&s.id, s.optional),
                        MountKind::Ssh(s) => capture.add_ssh(&s.id, s.optional),
                        _ => {}
                    }
                }
                exec.secret_env.iter().for_each(|s| capture.add_secret(&s.id, s.optional));
                capture.network |= exec.network != NetMode::None;
                if exec.proxied {
                    let fetched =
                        self.fetched.lock().unwrap_or_else(PoisonError::into_inner).clone();
                    let (op, name) = (self.vertex.digest.to_string(), exec.meta.args.join(" "));
                    exec::proxied::tell(fetched.as_ref(), &op, &name, capture);
                }
            }
            Op::Build(_) => capture.incomplete = true,
            Op::File(_) | Op::Merge(_) | Op::Diff(_) | Op::Passthrough(_) => {}
        }
        Ok(())
    }

    /// Remembers what the process asked for.
    pub(crate) fn fetched(&self, fetched: Option<Fetched>) {
        *self.fetched.lock().unwrap_or_else(PoisonError::into_inner) = fetched;
    }

    fn spec(&self) -> Option<SourceSpec> {
        let Op::Source(source) = &self.vertex.op else { return None };
        Some(SourceSpec {
            identifier: source.identifier.clone(),
            attrs: source.attrs.clone(),
            platform: self.vertex.platform.clone(),
        })
    }

    fn source(&self, cx: &Context) -> Result<Option<(SourceSpec, SourceContext)>> {
        let Some(spec) = self.spec() else { return Ok(None) };
        let memo = (cx.jobs)().first().map(|j| j.memo.clone()).unwrap_or_default();
        Ok(Some((spec, SourceContext::new(Self::sessions(cx)?, cx.reporter.clone(), memo))))
    }

    async fn pin(&self, spec: &SourceSpec, source: &SourceContext) -> Result<&PinnedSource> {
        self.pin.get_or_try_init(|| self.services.sources.pin(spec, source)).await
    }

    async fn map(&self, cx: &Context) -> Result<CacheMap> {
        // The engine asks each build; this is for the build that is first.
        if let Some(job) = (cx.jobs)().first() {
            job.entitlements.check(&self.vertex.op)?;
        }
        match &self.vertex.op {
            Op::Source(_) => {
                let Some((spec, source)) = self.source(cx)? else {
                    return Err(Fault::internal("a source is no source"));
                };
                let pin = self.pin(&spec, &source).await?;
                Ok(CacheMap {
                    keys: pin.keys.clone(),
                    inputs: Vec::new(),
                    ephemeral: pin.ephemeral,
                })
            }
            Op::Exec(op) => exec::cache_map(op, &self.vertex),
            Op::File(op) => file::cache_map(op, &self.vertex),
            Op::Passthrough(op) => {
                Ok(keyed("shipway.passthrough.v1", &op.id, &op.outputs, self.vertex.inputs.len()))
            }
            Op::Merge(op) => {
                Ok(keyed("shipway.merge.v1", "", &op.inputs, self.vertex.inputs.len()))
            }
            Op::Diff(op) => {
                Ok(keyed("shipway.diff.v1", "", &(op.lower, op.upper), self.vertex.inputs.len()))
            }
            Op::Build(op) => {
                let asked = (&op.builder, &op.inputs, &op.definition, &op.attrs);
                Ok(keyed("shipway.build.v1", "", &asked, self.vertex.inputs.len()))
            }
        }
    }

    async fn work(&self, inputs: Vec<ImmutableRef>, cx: &Context) -> Result<Vec<ImmutableRef>> {
        match &self.vertex.op {
            Op::Source(_) => {
                let Some((spec, source)) = self.source(cx)? else {
                    return Err(Fault::internal("a source is no source"));
                };
                let pin = self.pin(&spec, &source).await?;
                let state = self.services.sources.fetch(&spec, pin, &source).await?;
                state.reported_by(&cx.reporter);
                Ok(vec![state])
            }
            Op::Exec(op) => exec::run(self, op, inputs, cx).await,
            Op::File(op) => file::run(self, op, inputs, cx).await,
            Op::Passthrough(op) => op
                .outputs
                .iter()
                .map(|i| {
                    inputs.get(*i).cloned().ok_or_else(|| {
                        Fault::invalid(format!("passthrough of input {i}, which does not exist"))
                    })
                })
                .collect(),
            Op::Merge(op) => {
                let parts: Vec<ImmutableRef> =
                    op.inputs.iter().filter_map(|i| inputs.get((*i)?).cloned()).collect();
                Ok(vec![self.services.refs.merge(&parts, self.vertex.name.clone()).await?])
            }
            Op::Diff(op) => {
                let state =
                    |i: Option<usize>| i.and_then(|i| inputs.get(i)).filter(|s| !s.is_scratch());
                Ok(vec![
                    self.services
                        .refs
                        .diff(state(op.lower), state(op.upper), self.vertex.name.clone())
                        .await?,
                ])
            }
            Op::Build(op) => Ok(vec![build::run(op, &self.vertex, &inputs, cx).await?]),
        }
    }

    /// The failing operation as a typed detail, with the states that went into it.
    pub(crate) fn failed(
        &self,
        fault: Fault,
        inputs: &[ImmutableRef],
        subject: Option<shipway_fault::Subject>,
    ) -> Fault {
        if fault.is_cancelled() || fault.details().iter().any(|d| matches!(d, Detail::Solve { .. }))
        {
            return fault;
        }
        let inputs = inputs.iter().map(|i| Some(Remain::Done(i.clone()))).collect();
        Remains::attach(fault, &self.vertex, inputs, Vec::new(), subject)
    }
}

/// The key of an operation that only arranges its inputs.
fn keyed(kind: &str, id: &str, arrangement: &impl std::fmt::Debug, inputs: usize) -> CacheMap {
    let key = crate::key::KeyWriter::new(kind).text("id", id).value("inputs", arrangement).digest();
    CacheMap { keys: vec![key], inputs: vec![InputMap::default(); inputs], ephemeral: false }
}

#[async_trait]
impl Operation for LlbOp {
    type Output = ImmutableRef;
    type Job = JobData;

    async fn cache_map(&self, cx: &Context) -> Result<CacheMap> {
        self.map(cx).await.map_err(|e| self.failed(e, &[], None))
    }

    async fn content_key(
        &self,
        input: usize,
        value: &ImmutableRef,
        cx: &Context,
    ) -> Result<Option<Digest>> {
        let selectors = match &self.vertex.op {
            Op::Exec(op) => exec::selectors(op, input),
            Op::File(op) => file::selectors(op, input)?,
            _ => None,
        };
        let Some(selectors) = selectors else { return Ok(None) };
        self.services.sources.wanted_by(value, &Self::sessions(cx)?);
        let subject = shipway_fault::Subject::CacheInput(i64::try_from(input).unwrap_or(-1));
        file::checksum(value, &selectors, &cx.reporter)
            .await
            .map(Some)
            .map_err(|e| self.failed(e, std::slice::from_ref(value), Some(subject)))
    }

    async fn run(&self, inputs: Vec<ImmutableRef>, cx: &Context) -> Result<Vec<ImmutableRef>> {
        let sessions = Self::sessions(cx)?;
        inputs.iter().for_each(|i| self.services.sources.wanted_by(i, &sessions));
        let before = inputs.clone();
        self.work(inputs, cx).await.map_err(|e| self.failed(e, &before, None))
    }

    fn is_lost(value: &ImmutableRef, fault: &Fault) -> bool {
        value.is_lost(fault)
    }

    fn takes_slot(&self) -> bool {
        matches!(self.vertex.op, Op::Exec(_) | Op::File(_) | Op::Source(_))
    }
}
