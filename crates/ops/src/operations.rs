//! All operations, one line each. One that crate `llb` has and this list has not does not compile.

use crate::{
    Services, build, diff, exec, file, merge,
    op::{LlbOp, VertexOp},
    passthrough, source,
};
use shipway_llb::{Op, Vertex};
use std::sync::Arc;

/// The operation of `vertex`, by its module.
fn work_of(vertex: &Vertex) -> Box<dyn VertexOp> {
    match &vertex.op {
        Op::Source(op) => source::work(op, vertex),
        Op::Exec(op) => exec::work(op),
        Op::File(op) => file::work(op),
        Op::Merge(op) => merge::work(op),
        Op::Diff(op) => diff::work(op),
        Op::Passthrough(op) => passthrough::work(op),
        Op::Build(op) => build::work(op),
    }
}

impl LlbOp {
    /// The work of `vertex`.
    pub fn new(vertex: Arc<Vertex>, services: Arc<Services>) -> Self {
        let work = work_of(&vertex);
        Self { vertex, services, work }
    }
}
