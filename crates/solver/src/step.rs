//! The state machine: the step between what happens ([`Event`]) and what that asks of the world
//! ([`Effect`]).
//!
//! A step is synchronous and total: any event is allowed at any time, and what comes too late is
//! ignored by its task number.

use crate::{
    CacheMap, Operation, SolvedVertex, Vertex,
    event::{Effect, Event, ProbeResult, VertexProgress},
    graph::{
        Edge, Graph, InFlight, JobState, Level, Node, Open, Phase, Reported, Request, Run, Waiter,
        Work,
    },
    ids::{EdgeId, JobNo, NodeNo, RequestNo, TaskNo},
};
use shipway_fault::{Detail, Fault, Result};
use shipway_oci::Digest;
use std::{collections::BTreeSet, sync::Arc};

impl<Op: Operation> Graph<Op> {
    /// Takes in what happened and says what to do.
    pub(crate) fn step(&mut self, event: Event<Op>) -> Vec<Effect<Op>> {
        match event {
            Event::Open { job, data, journal } => {
                self.jobs.insert(
                    job,
                    JobState { data, journal, nodes: BTreeSet::new(), imports: Vec::new() },
                );
            }
            Event::Close { job } => self.close(job),
            Event::Import { job, cache } => self.import(job, cache),
            Event::Imported { task, job } => self.imported(task, job),
            Event::Lost { job, vertex, output, fault, answer } => {
                let redone = self.lost(job, &vertex, output, &fault);
                // The receiver may be gone: then the result is not needed.
                let _ = answer.send(redone);
            }
            Event::Request { request, job, vertex, output } => {
                self.request(request, job, &vertex, output)
            }
            Event::Withdraw { request } => self.withdraw(request),
            Event::Mapped { task, node, result } => self.mapped(task, node, result),
            Event::Content { task, node, input, result } => self.content(task, node, input, result),
            Event::Probed { task, edge, answer } => self.probed(task, edge, answer),
            Event::Ran { task, node, result } => self.ran(task, node, result),
            Event::Saved { task, edge, primary } => self.saved(task, edge, primary),
        }
        self.settle();
        std::mem::take(&mut self.effects)
    }

    /// What a job's vertices came to.
    pub(crate) fn solved_for(&self, job: JobNo) -> Vec<SolvedVertex<Op>> {
        let nodes = self
            .jobs
            .get(&job)
            .into_iter()
            .flat_map(|j| &j.nodes)
            .filter_map(|no| self.nodes.get(no));
        let done = |(output, edge): (&usize, &Edge<Op::Output>)| match &edge.phase {
            Phase::Done(done) => Some((*output, done.value.clone())),
            _ => None,
        };
        let keys = |n: &Node<Op>| {
            n.edges
                .values()
                .flat_map(|e| e.phase.keys())
                .filter(|k| k.durable)
                .map(|k| k.key)
                .collect()
        };
        nodes
            .map(|n| SolvedVertex {
                vertex: n.vertex.clone(),
                outputs: n.edges.iter().filter_map(done).collect(),
                keys: keys(n),
            })
            .collect()
    }

    /// Looks at everything that may have changed until nothing changes.
    fn settle(&mut self) {
        loop {
            while let Some(edge) = self.dirty.pop() {
                self.advance(edge);
            }
            for node in std::mem::take(&mut self.dirty.nodes) {
                self.cancel_unwanted(node);
            }
            for edge in std::mem::take(&mut self.forgotten) {
                let Some(e) = self.edge_mut(edge).filter(|e| matches!(e.phase, Phase::Failed(..)))
                else {
                    continue;
                };
                if e.desired().is_none() {
                    e.phase = Phase::Open(Open::default());
                } else {
                    // A consumer that is busy with something else has yet to see it.
                    self.forgotten.push(edge);
                }
            }
            self.start_queued();
            if self.dirty.nodes.is_empty() {
                return;
            }
        }
    }

    fn request(&mut self, request: RequestNo, job: JobNo, vertex: &Arc<Vertex<Op>>, output: usize) {
        if !self.jobs.contains_key(&job) {
            self.effects.push(Effect::Reply {
                request,
                result: Err(Fault::cancelled().context("the job has ended")),
            });
            return;
        }
        let edge = self.load(vertex, output, job);
        self.requests.insert(request, Request { job, edge });
        self.want(edge, Waiter::Request(request), Some(Level::Result));
        // The edge may have its result already.
        self.dirty.push(edge);
    }

    fn withdraw(&mut self, request: RequestNo) {
        if let Some(r) = self.requests.remove(&request) {
            self.want(r.edge, Waiter::Request(request), None);
        }
    }

    fn close(&mut self, job: JobNo) {
        let Some(state) = self.jobs.remove(&job) else { return };
        self.imports -= state.imports.len();
        self.effects.extend(
            state.imports.iter().filter_map(|i| i.reading).map(|task| Effect::Cancel { task }),
        );
        let ended: Vec<RequestNo> =
            self.requests.iter().filter(|(_, r)| r.job == job).map(|(no, _)| *no).collect();
        for request in ended {
            self.withdraw(request);
            self.effects.push(Effect::Reply { request, result: Err(Fault::cancelled()) });
        }
        let mut unheld = Vec::new();
        for no in state.nodes {
            let Some(node) = self.nodes.get_mut(&no) else { continue };
            node.jobs_left += 1;
            let alone = node.holders.edit(|h| {
                h.retain(|(j, _)| *j != job);
                h.is_empty()
            });
            if alone {
                // Open work is ended while its journal still records it.
                unheld.push((no, node.cx.reporter.clone()));
            } else {
                node.cx.reporter.detach(&state.journal);
                if !state.imports.is_empty() {
                    // What the others waited for need not come any more.
                    self.dirty_node(no);
                }
            }
        }
        for (no, _) in &unheld {
            self.remove(*no);
        }
        for (_, reporter) in unheld {
            reporter.detach(&state.journal);
        }
    }

    /// Takes a node out of the graph that no job holds.
    fn remove(&mut self, no: NodeNo) {
        let Some(node) = self.nodes.get(&no) else { return };
        let edges: Vec<EdgeId> =
            node.edges.keys().map(|output| EdgeId { node: no, output: *output }).collect();
        for edge in &edges {
            self.release_inputs(*edge);
            self.notify(*edge);
            self.abandon(*edge);
        }
        let Some(node) = self.nodes.remove(&no) else { return };
        self.known.remove(&node.identity);
        self.owners.retain(|_, owner| owner.node != no);
        let flights = [&node.map]
            .into_iter()
            .filter_map(|w| if let Work::Asked(f) = w { Some(*f) } else { None });
        let flights: Vec<InFlight> = flights
            .chain(
                node.contents
                    .iter()
                    .filter_map(|w| if let Work::Asked(f) = w { Some(*f) } else { None }),
            )
            .collect();
        for flight in flights {
            self.effects.push(Effect::Cancel { task: flight.task });
        }
        if let Run::Running(flight) = node.run {
            self.effects.push(Effect::Cancel { task: flight.task });
            self.running -= usize::from(node.vertex.op.takes_slot());
        }
        if node.reported == Reported::Started {
            self.effects.push(Effect::Report {
                reporter: node.cx.reporter,
                what: VertexProgress::Completed(Some(Fault::cancelled().to_string())),
            });
        }
    }

    /// Whether a failed task is to be tried again: it was cancelled after one of its jobs left, and
    /// others still want it.
    fn try_again(&self, node: NodeNo, flight: InFlight, fault: &Fault) -> bool {
        fault.is_cancelled()
            && self.nodes.get(&node).is_some_and(|n| n.jobs_left != flight.jobs_left)
    }

    fn mapped(&mut self, task: TaskNo, no: NodeNo, result: Result<CacheMap>) {
        let Some(node) = self.nodes.get_mut(&no).filter(|n| n.map.is(task)) else { return };
        let Work::Asked(flight) = node.map else { return };
        let result = result.and_then(|mut map| {
            if map.keys.is_empty() {
                return Err(Fault::internal(format!(
                    "the operation of {} has no cache key",
                    node.vertex.name
                )));
            }
            map.inputs.resize_with(node.vertex.inputs.len(), Default::default);
            Ok(map)
        });
        node.map = Work::Unasked;
        match result {
            Ok(map) => node.map = Work::Known(Arc::new(map)),
            Err(fault) if self.try_again(no, flight, &fault) => {}
            Err(fault) => {
                self.report(no, VertexProgress::Completed(Some(fault.to_string())));
                let fault = self.attach_vertex(no, fault);
                self.fail_node(no, &fault, |_| true);
                if let Some(node) = self.nodes.get_mut(&no)
                    && !fault.is_cancelled()
                {
                    node.map = Work::Failed(fault);
                }
            }
        }
        self.dirty_node(no);
    }

    fn content(&mut self, task: TaskNo, no: NodeNo, input: usize, result: Result<Option<Digest>>) {
        let Some(node) = self.nodes.get_mut(&no) else { return };
        let Some(slot) = node.contents.get_mut(input).filter(|w| w.is(task)) else { return };
        let Work::Asked(flight) = std::mem::replace(slot, Work::Unasked) else { return };
        match result {
            Ok(content) => {
                *slot = Work::Known(content);
                node.edges.values_mut().for_each(|e| e.foreign = None);
            }
            Err(fault)
                if self.try_again(no, flight, &fault)
                    || self.recover(no, flight.redone, &fault) => {}
            Err(fault) => {
                self.report(no, VertexProgress::Completed(Some(fault.to_string())));
                let fault = self.attach_vertex(no, fault);
                self.fail_node(
                    no,
                    &fault,
                    |phase| matches!(phase, Phase::Open(open) if open.settled >= Some(Level::Fast)),
                );
                if let Some(slot) = self.nodes.get_mut(&no).and_then(|n| n.contents.get_mut(input))
                    && !fault.is_cancelled()
                {
                    *slot = Work::Failed(fault);
                }
            }
        }
        self.dirty_node(no);
    }

    fn ran(&mut self, task: TaskNo, no: NodeNo, result: Result<Vec<Op::Output>>) {
        let Some(node) = self.nodes.get_mut(&no) else { return };
        let Run::Running(flight) = node.run else { return };
        if flight.task != task {
            return;
        }
        self.running -= usize::from(node.vertex.op.takes_slot());
        node.run = Run::Idle;
        match result {
            Ok(outputs) => {
                node.run = Run::Done(outputs);
                node.ran_over = flight.redone;
                self.report(no, VertexProgress::Completed(None));
            }
            Err(fault) if self.try_again(no, flight, &fault) => {}
            Err(fault) if self.recover(no, flight.redone, &fault) => {
                self.report(no, VertexProgress::Completed(None))
            }
            Err(fault) => {
                self.report(no, VertexProgress::Completed(Some(fault.to_string())));
                let fault = self.attach_vertex(no, fault);
                self.fail_node(no, &fault, |phase| matches!(phase, Phase::Claimed(_)));
                if let Some(node) = self.nodes.get_mut(&no)
                    && !fault.is_cancelled()
                {
                    node.run = Run::Failed(fault);
                }
            }
        }
        self.dirty_node(no);
    }

    fn probed(&mut self, task: TaskNo, edge: EdgeId, answer: ProbeResult<Op::Output>) {
        let Some(e) = self.edge_mut(edge) else { return };
        let Phase::Open(open) = &mut e.phase else { return };
        let Some(probe) = open.probe.take_if(|p| p.task == task) else { return };
        match answer {
            ProbeResult::Hit(primary, value) => self.hit(edge, &probe, Some(primary), value, true),
            ProbeResult::Imported(primary, value) => self.hit(edge, &probe, primary, value, false),
            ProbeResult::Miss(primaries) => open.missed(probe, primaries),
        }
        self.dirty.push(edge);
    }

    /// Marks all edges of a node for another look.
    pub(crate) fn dirty_node(&mut self, no: NodeNo) {
        let outputs: Vec<usize> =
            self.nodes.get(&no).map(|n| n.edges.keys().copied().collect()).unwrap_or_default();
        self.dirty.nodes.insert(no);
        for output in outputs {
            self.dirty.push(EdgeId { node: no, output });
        }
    }

    /// Names the vertex in its fault, once.
    pub(crate) fn attach_vertex(&self, no: NodeNo, fault: Fault) -> Fault {
        match self.nodes.get(&no) {
            Some(node) if !fault.details().iter().any(|d| matches!(d, Detail::Vertex(_))) => {
                fault.detail(Detail::Vertex(node.vertex.id.digest.to_string()))
            }
            _ => fault,
        }
    }

    /// Reports progress of a vertex.
    pub(crate) fn report(&mut self, no: NodeNo, what: VertexProgress) {
        let Some(node) = self.nodes.get_mut(&no) else { return };
        node.reported =
            if what == VertexProgress::Started { Reported::Started } else { Reported::Ended };
        self.effects.push(Effect::Report { reporter: node.cx.reporter.clone(), what });
    }

    /// Reports inputs that never ran and are not wanted as cached, and theirs (row `so.st.cached`).
    pub(crate) fn report_inputs_cached(&mut self, no: NodeNo) {
        let mut stack = vec![no];
        while let Some(no) = stack.pop() {
            let inputs: Vec<EdgeId> =
                self.nodes.get(&no).map(|n| n.identity.inputs.clone()).unwrap_or_default();
            for input in inputs {
                let Some(node) = self.nodes.get(&input.node) else { continue };
                let busy = node.edges.values().any(|e| {
                    e.desired() == Some(Level::Result) && !matches!(e.phase, Phase::Done(_))
                });
                if node.reported == Reported::Nothing && !busy {
                    self.report(input.node, VertexProgress::Cached);
                    stack.push(input.node);
                }
            }
        }
    }

    pub(crate) fn task(&mut self) -> TaskNo {
        TaskNo(self.number())
    }

    pub(crate) fn flight(&mut self, no: NodeNo) -> InFlight {
        let jobs_left = self.nodes.get(&no).map(|n| n.jobs_left).unwrap_or_default();
        InFlight { task: self.task(), jobs_left, redone: self.redone(no) }
    }
}
