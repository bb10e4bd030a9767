//! States one on top of the other (row `op.merge`).

use crate::{
    export_plan::BaseLayers,
    op::{Context, LlbOp, VertexOp, keyed},
};
use async_trait::async_trait;
use shipway_fault::Result;
use shipway_llb::MergeOp;
use shipway_refs::ImmutableRef;
use shipway_solver::CacheMap;

struct MergeVertex(MergeOp);

/// The work of `op`.
pub(crate) fn work(op: &MergeOp) -> Box<dyn VertexOp> {
    Box::new(MergeVertex(op.clone()))
}

#[async_trait]
impl VertexOp for MergeVertex {
    async fn cache_map(&self, of: &LlbOp, _cx: &Context) -> Result<CacheMap> {
        Ok(keyed("shipway.merge.v1", "", &self.0.inputs, of.vertex.inputs.len()))
    }

    async fn run(
        &self,
        of: &LlbOp,
        inputs: Vec<ImmutableRef>,
        _cx: &Context,
    ) -> Result<Vec<ImmutableRef>> {
        let inputs = self.0.inputs.iter().filter_map(|i| inputs.get((*i)?).cloned());
        let parts: Vec<ImmutableRef> = inputs.collect();
        Ok(vec![of.services.refs.merge(&parts, of.vertex.name.clone()).await?])
    }

    fn base_layers(&self, _output: usize, _inputs: usize) -> BaseLayers {
        BaseLayers { inputs: self.0.inputs.iter().copied().flatten().collect(), adds_layer: false }
    }

    fn takes_slot(&self) -> bool {
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_parts_are_layers_of_the_whole() {
        let merge = MergeVertex(MergeOp { inputs: vec![Some(0), None, Some(1)] });
        let expected = BaseLayers { inputs: vec![0, 1], adds_layer: false };
        assert_eq!(merge.base_layers(0, 2), expected);
    }
}
