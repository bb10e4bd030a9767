//! Results that can no longer be had (row `so.loaderr`): a cache promised them, and what had
//! their bytes is gone.
//!
//! That often shows only when they are read: a checksum, a step, an export. The edges that
//! have such a result from the cache are taken back, with those that ran on top of it and merely
//! carry it on (a merge); the records are dropped; and what needs them waits until they were made
//! again.

use crate::{
    CacheKey, Operation, Vertex,
    event::Effect,
    graph::{Graph, Open, Phase, ResultOrigin, Run, Work},
    ids::{EdgeId, JobNo, NodeNo},
};
use shipway_fault::Fault;
use std::{collections::BTreeSet, sync::Arc};

/// How often one vertex starts again because an input is lost. Each time a record goes, so this is
/// for stores that keep on promising.
const MAX_RECOVERIES: u32 = 128;

impl<Op: Operation> Graph<Op> {
    /// Whether `fault`, with which a task of the node ended that began when its inputs had been
    /// `redone` so often, means no more than that an input is lost; then the node starts again when
    /// it is there.
    pub(crate) fn recover(&mut self, no: NodeNo, redone: u64, fault: &Fault) -> bool {
        let Some(node) =
            self.nodes.get(&no).filter(|n| n.recoveries < MAX_RECOVERIES && !fault.is_cancelled())
        else {
            return false;
        };
        let inputs = node.identity.inputs.clone();
        if self.redone(no) == redone {
            let doomed = self.doomed(fault);
            if !inputs.iter().any(|i| doomed.contains(i)) {
                return false;
            }
            self.take_back(doomed);
        }
        if let Some(node) = self.nodes.get_mut(&no) {
            node.recoveries += 1;
        }
        self.start_again(no);
        true
    }

    /// Takes back the result of a request if `fault` says that it is lost and it can be made again,
    /// or if it is being made again already.
    pub(crate) fn lost(
        &mut self,
        job: JobNo,
        vertex: &Arc<Vertex<Op>>,
        output: usize,
        fault: &Fault,
    ) -> bool {
        if !self.jobs.contains_key(&job) {
            return false;
        }
        let id = self.load(vertex, output, job);
        match self.edge(id).map(|e| &e.phase) {
            Some(Phase::Done(done)) if Op::is_lost(&done.value, fault) => {
                let doomed = self.doomed(fault);
                let again = doomed.contains(&id);
                if again {
                    self.take_back(doomed);
                }
                again
            }
            _ => true,
        }
    }

    /// How often the inputs of a node were taken back.
    pub(crate) fn redone(&self, no: NodeNo) -> u64 {
        let inputs = self.nodes.get(&no).map_or(&[][..], |n| &n.identity.inputs);
        inputs.iter().filter_map(|i| self.edge(*i)).map(|e| u64::from(e.redone)).sum()
    }

    /// The edges whose result is lost and can be made again: it is from the cache, or was made of
    /// such.
    fn doomed(&self, fault: &Fault) -> BTreeSet<EdgeId> {
        let edges = self.nodes.iter().flat_map(|(no, n)| {
            n.edges.iter().map(move |(output, e)| (EdgeId { node: *no, output: *output }, n, e))
        });
        let mut left: Vec<_> = edges
            .filter_map(|(id, node, edge)| match &edge.phase {
                Phase::Done(done) if Op::is_lost(&done.value, fault) => Some((id, node, done)),
                _ => None,
            })
            .collect();
        let mut doomed = BTreeSet::new();
        loop {
            // Twins that share a key with one of these can have nothing else from it.
            let made: BTreeSet<CacheKey> = left
                .iter()
                .filter(|(.., done)| done.from == ResultOrigin::Run)
                .flat_map(|(.., done)| &done.keys)
                .map(|k| k.key)
                .collect();
            let before = left.len();
            left.retain(|(id, node, done)| {
                let goes = match done.from {
                    ResultOrigin::Cache => true,
                    ResultOrigin::Run => {
                        node.ran_over != self.redone(id.node)
                            || node.identity.inputs.iter().any(|i| doomed.contains(i))
                    }
                    ResultOrigin::Twin => !done.keys.iter().any(|k| made.contains(&k.key)),
                };
                if goes {
                    doomed.insert(*id);
                }
                !goes
            });
            if left.len() == before {
                return doomed;
            }
        }
    }

    /// Opens edges again that have a result, and whatever was concluded from these results.
    fn take_back(&mut self, edges: BTreeSet<EdgeId>) {
        for id in &edges {
            let Some(node) = self.nodes.get_mut(&id.node) else { continue };
            let Some(edge) = node.edges.get_mut(&id.output) else { continue };
            let Phase::Done(done) =
                std::mem::replace(&mut edge.phase, Phase::Open(Open::default()))
            else {
                continue;
            };
            edge.redone += 1;
            edge.foreign = None;
            if done.from == ResultOrigin::Run {
                node.run = Run::Idle;
            }
            self.effects.push(Effect::Forget { value: done.value });
            self.release(*id);
            self.dirty.push(*id);
        }
        let reads: Vec<(NodeNo, Vec<usize>)> = self
            .nodes
            .iter()
            .map(|(no, n)| {
                (
                    *no,
                    n.identity
                        .inputs
                        .iter()
                        .enumerate()
                        .filter(|(_, i)| edges.contains(i))
                        .map(|(i, _)| i)
                        .collect(),
                )
            })
            .filter(|(_, inputs): &(NodeNo, Vec<usize>)| !inputs.is_empty())
            .collect();
        for (no, inputs) in reads {
            let Some(node) = self.nodes.get_mut(&no) else { continue };
            for input in inputs {
                let slot =
                    node.contents.get_mut(input).map(|slot| std::mem::replace(slot, Work::Unasked));
                if let Some(Work::Asked(flight)) = slot {
                    self.effects.push(Effect::Cancel { task: flight.task });
                }
            }
            self.start_again(no);
        }
    }

    /// Lets the edges of a node that have no result begin anew, but for those whose vertex runs.
    fn start_again(&mut self, no: NodeNo) {
        let Some(node) = self.nodes.get_mut(&no) else { return };
        let running = matches!(node.run, Run::Running(_));
        let mut claims = Vec::new();
        for (output, edge) in &mut node.edges {
            match &mut edge.phase {
                Phase::Open(open) => {
                    if let Some(probe) = open.probe.take() {
                        self.effects.push(Effect::Cancel { task: probe.task });
                    }
                }
                Phase::Claimed(_) if !running => claims.push(EdgeId { node: no, output: *output }),
                _ => continue,
            }
            edge.foreign = None;
            edge.phase = Phase::Open(Open::default());
        }
        for id in claims {
            self.release(id);
        }
        self.dirty_node(no);
    }
}
