//! How a vertex's work is done: claimed by one edge, run in its turn, stored, and given up when
//! it is not wanted.

use crate::{
    CacheKey, Operation, RecordMeta,
    event::{Effect, VertexProgress},
    graph::{
        Done, Graph, Level, Open, Phase, Probe, Reported, ResultOrigin, Run, Saving, Waiter, Work,
    },
    ids::{EdgeId, JobNo, NodeNo, TaskNo},
    keys::{Candidates, Key},
};
use shipway_fault::Fault;
use shipway_oci::Digest;

impl<Op: Operation> Graph<Op> {
    /// Everything the edge needs is there and the store has no result: the vertex must run, unless
    /// another edge does, or did, the same work.
    pub(crate) fn claim(&mut self, id: EdgeId, open: Open) -> Phase<Op::Output> {
        let keys: Vec<Key> = open.candidates.strong.iter().filter(|k| !k.fresh).copied().collect();
        for key in &keys {
            let Some(owner) = self.owners.get(&key.key.0).copied().filter(|o| *o != id) else {
                continue;
            };
            match self.edge(owner).map(|e| &e.phase) {
                Some(Phase::Done(done)) => {
                    let (value, keys) = (done.value.clone(), done.keys.clone());
                    return self.adopt(id, open, value, keys);
                }
                Some(Phase::Claimed(_) | Phase::Saving(_)) => {
                    self.share_jobs(id, owner);
                    self.want(owner, Waiter::Edge(id), Some(Level::Result));
                    return Phase::Following(open, owner);
                }
                _ => {}
            }
        }
        for key in keys {
            self.owners.insert(key.key.0, id);
        }
        self.claimed(id, open, Some(Level::Result))
    }

    /// Lets the jobs of `id` hold the vertex whose result it will take, and report it.
    fn share_jobs(&mut self, id: EdgeId, owner: EdgeId) {
        let jobs: Vec<JobNo> = self
            .nodes
            .get(&id.node)
            .map(|n| n.holders.edit(|h| h.iter().map(|(j, _)| *j).collect()))
            .unwrap_or_default();
        for job in jobs {
            self.hold(owner.node, job);
        }
    }

    pub(crate) fn follow(
        &mut self,
        id: EdgeId,
        open: Open,
        target: EdgeId,
        desired: Option<Level>,
    ) -> Phase<Op::Output> {
        match self.edge(target).map(|e| &e.phase) {
            _ if desired != Some(Level::Result) => {}
            Some(Phase::Done(done)) => {
                let (value, keys) = (done.value.clone(), done.keys.clone());
                self.want(target, Waiter::Edge(id), None);
                return self.adopt(id, open, value, keys);
            }
            Some(Phase::Claimed(_) | Phase::Saving(_)) => return Phase::Following(open, target),
            _ => {}
        }
        self.want(target, Waiter::Edge(id), None);
        self.probe_open(id, open, desired)
    }

    /// Takes the result of another edge that did the same work.
    fn adopt(
        &mut self,
        id: EdgeId,
        open: Open,
        value: Op::Output,
        keys: Vec<Key>,
    ) -> Phase<Op::Output> {
        if let Some(primary) = keys.first().filter(|k| k.durable) {
            self.alias(primary.key, &open.candidates);
        }
        if self.nodes.get(&id.node).is_some_and(|n| n.reported == Reported::Nothing) {
            self.report(id.node, VertexProgress::Cached);
        }
        Phase::Done(Done { value, from: ResultOrigin::Twin, keys })
    }

    /// Lets the other durable keys lead to `primary`, too.
    fn alias(&mut self, primary: CacheKey, candidates: &Candidates) {
        let keys: Vec<CacheKey> =
            candidates.all().filter(|k| k.durable && k.key != primary).map(|k| k.key).collect();
        if !keys.is_empty() {
            self.effects.push(Effect::Alias { primary, keys });
        }
    }

    pub(crate) fn claimed(
        &mut self,
        id: EdgeId,
        open: Open,
        desired: Option<Level>,
    ) -> Phase<Op::Output> {
        if desired != Some(Level::Result) {
            self.release(id);
            return self.probe_open(id, open, desired);
        }
        let Some(node) = self.nodes.get_mut(&id.node) else { return Phase::Claimed(open) };
        match &node.run {
            Run::Done(outputs) => match outputs.get(id.output).cloned() {
                Some(value) => self.save(id, open, value),
                None => {
                    let fault = Fault::internal(format!(
                        "{} gave {} outputs, and number {} was asked for",
                        node.vertex.name,
                        outputs.len(),
                        id.output
                    ));
                    let fault = self.attach_vertex(id.node, fault);
                    self.release(id);
                    self.failed(id, fault, Some(open))
                }
            },
            Run::Failed(fault) => {
                let fault = fault.clone();
                self.release(id);
                self.failed(id, fault, Some(open))
            }
            Run::Idle => {
                node.run = Run::Queued;
                self.queue.push_back(id.node);
                // The queue is served at the end of the step.
                self.dirty.nodes.insert(id.node);
                Phase::Claimed(open)
            }
            Run::Queued | Run::Running(_) => Phase::Claimed(open),
        }
    }

    /// Gives up the claim on the work.
    pub(crate) fn release(&mut self, id: EdgeId) {
        self.owners.retain(|_, owner| *owner != id);
    }

    fn save(&mut self, id: EdgeId, open: Open, value: Op::Output) -> Phase<Op::Output> {
        let durable = |keys: &[Key]| -> Vec<CacheKey> {
            keys.iter().filter(|k| k.durable).map(|k| k.key).collect()
        };
        let (strong, weak) = (durable(&open.candidates.strong), durable(&open.candidates.weak));
        if strong.is_empty() {
            let keys = open.candidates.published();
            return Phase::Done(Done { value, from: ResultOrigin::Run, keys });
        }
        let meta = self.meta(id);
        let task = self.task();
        self.effects.push(Effect::Save {
            task,
            edge: id,
            strong,
            weak,
            value: value.clone(),
            meta,
        });
        Phase::Saving(Saving { task, value, candidates: open.candidates })
    }

    pub(crate) fn meta(&self, id: EdgeId) -> RecordMeta {
        let Some(node) = self.nodes.get(&id.node) else { return RecordMeta::default() };
        let Work::Known(map) = &node.map else { return RecordMeta::default() };
        let content = |work: &Work<Option<Digest>>| match work {
            Work::Known(content) => *content,
            _ => None,
        };
        let keys = |input: &EdgeId| -> Vec<CacheKey> {
            let keys = self.edge(*input).map(|e| e.phase.keys()).unwrap_or_default();
            keys.iter().filter(|k| k.durable).map(|k| k.key).collect()
        };
        RecordMeta {
            op_keys: map.keys.clone(),
            output: id.output,
            parts: map.parts.clone(),
            contents: node.contents.iter().map(content).collect(),
            inputs: node
                .identity
                .inputs
                .iter()
                .zip(&map.inputs)
                .map(|(input, m)| (keys(input), m.selector))
                .collect(),
            description: node.vertex.name.clone(),
            imported: false,
        }
    }

    /// The result is stored, or could not be.
    pub(crate) fn saved(&mut self, task: TaskNo, id: EdgeId, primary: Option<CacheKey>) {
        let Some(edge) = self.edge_mut(id) else { return };
        let Phase::Saving(saving) = &edge.phase else { return };
        if saving.task != task {
            return;
        }
        let keys = match primary {
            Some(key) => vec![Key {
                key,
                durable: true,
                fresh: saving.candidates.strong.iter().any(|k| k.fresh),
            }],
            None => saving.candidates.published(),
        };
        let value = saving.value.clone();
        edge.foreign = None;
        edge.phase = Phase::Done(Done { value, from: ResultOrigin::Run, keys });
        self.dirty.push(id);
        self.notify(id);
    }

    /// The store, or an imported cache, had the result.
    pub(crate) fn hit(
        &mut self,
        id: EdgeId,
        probe: &Probe,
        primary: Option<CacheKey>,
        value: Op::Output,
        link: bool,
    ) {
        let Some(edge) = self.edge_mut(id) else { return };
        let Phase::Open(open) = &mut edge.phase else { return };
        let open = std::mem::take(open);
        edge.foreign = None;
        let keys = primary
            .map_or_else(|| open.candidates.published(), |primary| vec![Key::stored(primary)]);
        edge.phase = Phase::Done(Done { value, from: ResultOrigin::Cache, keys });
        // Weak keys lead to the latest result; they prove nothing of the strong ones.
        if let Some(primary) =
            primary.filter(|_| link && probe.strong && open.candidates.all().count() > 1)
        {
            self.alias(primary, &open.candidates);
        }
        if self.nodes.get(&id.node).is_some_and(|n| n.reported == Reported::Nothing) {
            self.report(id.node, VertexProgress::Cached);
        }
        self.release_inputs(id);
        self.report_inputs_cached(id.node);
        self.notify(id);
    }

    /// Fails the edges of a node in the phases that `which` names.
    pub(crate) fn fail_node(
        &mut self,
        no: NodeNo,
        fault: &Fault,
        which: impl Fn(&Phase<Op::Output>) -> bool,
    ) {
        let Some(node) = self.nodes.get_mut(&no) else { return };
        let mut failed = Vec::new();
        for (output, edge) in &mut node.edges {
            if edge.desired().is_none() || !which(&edge.phase) {
                continue;
            }
            let open = match &mut edge.phase {
                Phase::Open(open) | Phase::Claimed(open) => std::mem::take(open),
                _ => continue,
            };
            edge.phase = Phase::Failed(fault.clone(), Some(open));
            failed.push(EdgeId { node: no, output: *output });
        }
        for id in failed {
            if fault.is_cancelled() {
                self.forgotten.push(id);
            }
            self.release(id);
            self.dirty.push(id);
            self.notify(id);
        }
    }

    /// Ends what an edge of a node that goes has in flight.
    pub(crate) fn abandon(&mut self, id: EdgeId) {
        let Some(edge) = self.edge(id) else { return };
        match &edge.phase {
            Phase::Open(Open { probe: Some(probe), .. }) => {
                let task = probe.task;
                self.effects.push(Effect::Cancel { task });
            }
            Phase::Following(_, target) => {
                let target = *target;
                self.want(target, Waiter::Edge(id), None);
            }
            _ => {}
        }
    }

    /// Cancels a node's work that is no longer wanted. Only at the end of a step: interest may
    /// come back within it.
    pub(crate) fn cancel_unwanted(&mut self, no: NodeNo) {
        let Some(node) = self.nodes.get_mut(&no) else { return };
        let open = |level: Level| {
            node.edges
                .values()
                .any(|e| matches!(e.phase, Phase::Open(_)) && e.desired() >= Some(level))
        };
        let (fast, slow) = (open(Level::Fast), open(Level::Slow));
        let claimed = node.edges.values().any(|e| matches!(e.phase, Phase::Claimed(_)));
        let mut cancelled = Vec::new();
        for edge in node.edges.values_mut().filter(|e| e.desired().is_none()) {
            if let Phase::Open(open) = &mut edge.phase {
                cancelled.extend(open.probe.take().map(|probe| probe.task));
            }
        }
        if let Work::Asked(flight) = node.map
            && !fast
        {
            node.map = Work::Unasked;
            cancelled.push(flight.task);
        }
        for slot in node.contents.iter_mut().filter(|_| !slow) {
            if let Work::Asked(flight) = slot {
                cancelled.push(flight.task);
                *slot = Work::Unasked;
            }
        }
        if !claimed {
            match node.run {
                Run::Running(flight) => {
                    cancelled.push(flight.task);
                    self.running -= usize::from(node.vertex.op.takes_slot());
                    node.run = Run::Idle;
                    self.report(
                        no,
                        VertexProgress::Completed(Some(Fault::cancelled().to_string())),
                    );
                }
                Run::Queued => {
                    node.run = Run::Idle;
                    self.queue.retain(|n| *n != no);
                }
                _ => {}
            }
        }
        self.effects.extend(cancelled.into_iter().map(|task| Effect::Cancel { task }));
    }

    /// Starts what waits for its turn, as far as the limit allows (row `so.par`).
    pub(crate) fn start_queued(&mut self) {
        let mut waiting = std::mem::take(&mut self.queue);
        while let Some(no) = waiting.pop_front() {
            let Some(node) = self.nodes.get(&no) else { continue };
            let counts = node.vertex.op.takes_slot();
            if counts && self.max_parallel.is_some_and(|max| self.running >= max.max(1)) {
                self.queue.push_back(no);
            } else {
                self.start(no, counts);
            }
        }
    }

    fn start(&mut self, no: NodeNo, counts: bool) {
        let Some(node) = self.nodes.get(&no) else { return };
        let value = |input: &EdgeId| match self.edge(*input).map(|e| &e.phase) {
            Some(Phase::Done(done)) => Some(done.value.clone()),
            _ => None,
        };
        let inputs: Option<Vec<Op::Output>> = node.identity.inputs.iter().map(value).collect();
        let Some(inputs) = inputs else {
            // Inputs went with the job that asked for them, and the vertex was kept for one that
            // waits for its result.
            if let Some(node) = self.nodes.get_mut(&no) {
                node.run = Run::Idle;
            }
            self.fail_node(no, &Fault::cancelled(), |phase| matches!(phase, Phase::Claimed(_)));
            return;
        };
        let (flight, why) = (self.flight(no), self.why(no));
        self.running += usize::from(counts);
        self.report(no, VertexProgress::Started);
        self.report_inputs_cached(no);
        let Some(node) = self.nodes.get_mut(&no) else { return };
        node.run = Run::Running(flight);
        let (vertex, cx) = (node.vertex.clone(), node.cx.clone());
        self.effects.push(Effect::Run { task: flight.task, node: no, vertex, inputs, why, cx });
    }
}
