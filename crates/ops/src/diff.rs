//! What one state has beyond another (row `op.diff`).

use crate::op::{Context, LlbOp, VertexOp, keyed};
use async_trait::async_trait;
use shipway_fault::Result;
use shipway_llb::DiffOp;
use shipway_refs::ImmutableRef;
use shipway_solver::CacheMap;

struct DiffVertex(DiffOp);

/// The work of `op`.
pub(crate) fn work(op: &DiffOp) -> Box<dyn VertexOp> {
    Box::new(DiffVertex(op.clone()))
}

#[async_trait]
impl VertexOp for DiffVertex {
    async fn cache_map(&self, of: &LlbOp, _cx: &Context) -> Result<CacheMap> {
        let key = (self.0.lower, self.0.upper);
        Ok(keyed("shipway.diff.v1", "", &key, of.vertex.inputs.len()))
    }

    async fn run(
        &self,
        of: &LlbOp,
        inputs: Vec<ImmutableRef>,
        _cx: &Context,
    ) -> Result<Vec<ImmutableRef>> {
        let state = |i: Option<usize>| i.and_then(|i| inputs.get(i)).filter(|s| !s.is_scratch());
        let (lower, upper) = (state(self.0.lower), state(self.0.upper));
        Ok(vec![of.services.refs.diff(lower, upper, of.vertex.name.clone()).await?])
    }

    fn takes_slot(&self) -> bool {
        false
    }
}
