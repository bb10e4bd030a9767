//! Sources as operations: pinned for the key, fetched when needed.

use crate::op::{Context, LlbOp, VertexOp};
use async_trait::async_trait;
use shipway_attest::Capture;
use shipway_fault::Result;
use shipway_llb::{SourceOp, Vertex};
use shipway_refs::ImmutableRef;
use shipway_solver::CacheMap;
use shipway_sources::{PinnedSource, SourceContext, SourceSpec};
use tokio::sync::OnceCell;

struct SourceVertex {
    spec: SourceSpec,
    /// What it was pinned to when its key was asked for.
    pin: OnceCell<PinnedSource>,
}

/// The work of `op`, the operation of `vertex`.
pub(crate) fn work(op: &SourceOp, vertex: &Vertex) -> Box<dyn VertexOp> {
    let spec = SourceSpec {
        identifier: op.identifier.clone(),
        attrs: op.attrs.clone(),
        platform: vertex.platform.clone(),
    };
    Box::new(SourceVertex { spec, pin: OnceCell::new() })
}

impl SourceVertex {
    async fn pin(&self, of: &LlbOp, cx: &SourceContext) -> Result<&PinnedSource> {
        self.pin.get_or_try_init(|| of.services.sources.pin(&self.spec, cx)).await
    }
}

/// The clients of all builds that want the source; the memory is that of the first.
fn context(cx: &Context) -> Result<SourceContext> {
    let memo = (cx.jobs)().first().map(|j| j.memo.clone()).unwrap_or_default();
    Ok(SourceContext::new(LlbOp::sessions(cx)?, cx.reporter.clone(), memo))
}

#[async_trait]
impl VertexOp for SourceVertex {
    async fn cache_map(&self, of: &LlbOp, cx: &Context) -> Result<CacheMap> {
        let pin = self.pin(of, &context(cx)?).await?;
        Ok(CacheMap { keys: pin.keys.clone(), ephemeral: pin.ephemeral, ..CacheMap::default() })
    }

    async fn run(
        &self,
        of: &LlbOp,
        _inputs: Vec<ImmutableRef>,
        cx: &Context,
    ) -> Result<Vec<ImmutableRef>> {
        let source = context(cx)?;
        let pin = self.pin(of, &source).await?;
        let state = of.services.sources.fetch(&self.spec, pin, &source).await?;
        state.reported_by(&cx.reporter);
        Ok(vec![state])
    }

    fn capture(&self, of: &LlbOp, capture: &mut Capture) -> Result<()> {
        match self.pin.get() {
            Some(pin) => of.services.sources.capture(&self.spec, pin, capture),
            None => Ok(()),
        }
    }
}
