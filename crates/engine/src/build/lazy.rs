//! A lazy state by itself: what it is the result of, and the result once there is one.

use parking_lot::Mutex;
use shipway_fault::{Fault, Result};
use shipway_llb::Definition;
use shipway_oci::Digest;
use shipway_ops::LlbOp;
use shipway_refs::ImmutableRef;
use shipway_solver::Vertex;
use std::{collections::HashSet, sync::Arc};

/// The result of a vertex, which may not be there yet.
pub(crate) struct LazyState {
    /// A random name.
    pub(crate) id: String,
    pub(crate) definition: Definition,
    pub(crate) vertex: Arc<Vertex<LlbOp>>,
    /// Which output of the vertex it is.
    pub(crate) output: usize,
    solved: Mutex<Option<ImmutableRef>>,
}

impl LazyState {
    /// Output `output` of `vertex`, not solved yet.
    pub(crate) fn new(
        definition: Definition,
        (vertex, output): (Arc<Vertex<LlbOp>>, usize),
    ) -> Result<Self> {
        let id = shipway_host::random_id()?;
        Ok(Self { id, definition, vertex, output, solved: Mutex::default() })
    }

    /// The vertices that it needs.
    pub(crate) fn vertices(&self) -> HashSet<Digest> {
        let (mut seen, mut queue) = (HashSet::from([self.vertex.id.digest]), vec![&self.vertex]);
        while let Some(next) = queue.pop() {
            queue.extend(
                next.inputs.iter().map(|(input, _)| input).filter(|i| seen.insert(i.id.digest)),
            );
        }
        seen
    }

    /// A vertex that it needs, has `vertex` as an input, and is `placed`.
    pub(crate) fn wanting(&self, vertex: &str, placed: impl Fn(&str) -> bool) -> Option<String> {
        let mut seen = HashSet::new();
        let mut queue = vec![&self.vertex];
        while let Some(next) = queue.pop() {
            let digest = next.id.digest.to_string();
            if next.inputs.iter().any(|(input, _)| input.id.digest.to_string() == vertex)
                && placed(&digest)
            {
                return Some(digest);
            }
            queue.extend(
                next.inputs.iter().map(|(input, _)| input).filter(|i| seen.insert(i.id.digest)),
            );
        }
        None
    }

    /// Whether it was needed yet.
    pub(crate) fn is_solved(&self) -> bool {
        self.solved.lock().is_some()
    }

    /// The result, if there is one.
    pub(crate) fn solved(&self) -> Option<ImmutableRef> {
        self.solved.lock().clone()
    }

    /// Sets the result.
    pub(crate) fn solve(&self, result: ImmutableRef) {
        *self.solved.lock() = Some(result);
    }

    /// The result, if `fault` says that it is lost.
    pub(crate) fn lost(&self, fault: &Fault) -> Option<ImmutableRef> {
        self.solved().filter(|s| s.is_lost(fault))
    }

    /// Drops the result if it is still `lost`.
    pub(crate) fn forget(&self, lost: &ImmutableRef) {
        self.solved.lock().take_if(|now| now.is_same(lost));
    }
}
