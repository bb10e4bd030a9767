//! From a checked graph to the solver's vertices.

use shipway_llb::{Graph, Op};
use shipway_ops::{LlbOp, Services};
use shipway_solver::{Vertex, VertexId};
use std::sync::Arc;

/// Variant of vertices on the proxy network.
const PROXIED: u8 = 1;

/// The solver's vertex and output index for the result of `graph`.
pub(crate) fn of_graph(
    graph: &Graph,
    services: &Arc<Services>,
    ignore_cache: bool,
) -> (Arc<Vertex<LlbOp>>, usize) {
    let mut made: Vec<Arc<Vertex<LlbOp>>> = Vec::with_capacity(graph.vertices.len());
    for vertex in &graph.vertices {
        // What a proxied process wrote, and what is made of it, is not shared with builds that have
        // no proxy (row `exec.proxynet`).
        let proxied = matches!(&vertex.op, Op::Exec(exec) if exec.proxied)
            || vertex.inputs.iter().any(|e| made[e.vertex].id.variant == PROXIED);
        let group = vertex.metadata.progress_group.as_ref().map(|g| shipway_progress::Group {
            id: g.id.clone(),
            name: g.name.clone(),
            weak: g.weak,
        });
        made.push(Arc::new(Vertex {
            id: VertexId {
                digest: vertex.digest,
                ignore_cache: ignore_cache || vertex.metadata.ignore_cache,
                variant: if proxied { PROXIED } else { 0 },
            },
            name: shipway_fault::redact_text(&vertex.name),
            group,
            inputs: vertex.inputs.iter().map(|e| (made[e.vertex].clone(), e.output)).collect(),
            op: Arc::new(LlbOp::new(vertex.clone(), services.clone())),
        }));
    }
    (made[graph.result.vertex].clone(), graph.result.output)
}
