//! Inputs as they are, in another order.

use crate::{
    export_plan::BaseLayers,
    op::{Context, LlbOp, VertexOp, keyed},
};
use async_trait::async_trait;
use shipway_fault::{Fault, Result};
use shipway_llb::PassthroughOp;
use shipway_refs::ImmutableRef;
use shipway_solver::CacheMap;

struct PassthroughVertex(PassthroughOp);

/// The work of `op`.
pub(crate) fn work(op: &PassthroughOp) -> Box<dyn VertexOp> {
    Box::new(PassthroughVertex(op.clone()))
}

#[async_trait]
impl VertexOp for PassthroughVertex {
    async fn cache_map(&self, of: &LlbOp, _cx: &Context) -> Result<CacheMap> {
        Ok(keyed("shipway.passthrough.v1", &self.0.id, &self.0.outputs, of.vertex.inputs.len()))
    }

    async fn run(
        &self,
        _of: &LlbOp,
        inputs: Vec<ImmutableRef>,
        _cx: &Context,
    ) -> Result<Vec<ImmutableRef>> {
        let output = |i: &usize| {
            inputs.get(*i).cloned().ok_or_else(|| {
                Fault::invalid(format!("passthrough of input {i}, which does not exist"))
            })
        };
        self.0.outputs.iter().map(output).collect()
    }

    fn base_layers(&self, output: usize, _inputs: usize) -> BaseLayers {
        let input = self.0.outputs.get(output).copied();
        BaseLayers { inputs: input.into_iter().collect(), adds_layer: false }
    }

    fn takes_slot(&self) -> bool {
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_output_has_the_layers_of_its_input() {
        let pass = PassthroughVertex(PassthroughOp { id: String::new(), outputs: vec![1, 0] });
        let expected = BaseLayers { inputs: vec![1], adds_layer: false };
        assert_eq!(pass.base_layers(0, 2), expected);
    }
}
