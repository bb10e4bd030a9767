//! The graph's data: vertices, edges, and the phase each is in. What happens to it is in
//! [`crate::step`] and [`crate::advance`].

use crate::{
    CacheKey, CacheMap, Completion, ImportedCache, OpContext, Operation, Vertex, VertexId,
    event::Effect,
    ids::{EdgeId, ImportNo, JobNo, NodeNo, RequestNo, TaskNo},
    keys::{Candidates, Key},
};
use parking_lot::Mutex;
use shipway_fault::Fault;
use shipway_oci::Digest;
use shipway_progress::{Journal, Reporter};
use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque},
    sync::Arc,
};

/// How much is wanted of an edge; each level includes those before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Level {
    /// Its keys, as far as definitions and the store's aliases go; nothing is loaded or run.
    Fast,
    /// Its best keys: the store is asked for a result, and contents are computed, for which inputs
    /// may run.
    Slow,
    /// Its result.
    Result,
}

/// Who wants an edge.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Waiter {
    /// A request.
    Request(RequestNo),
    /// An edge that has it as input, or waits for it because it does the same work.
    Edge(EdgeId),
}

/// Everything the owner task knows.
pub(crate) struct Graph<Op: Operation> {
    pub(crate) nodes: HashMap<NodeNo, Node<Op>>,
    pub(crate) known: HashMap<Identity, NodeNo>,
    pub(crate) jobs: BTreeMap<JobNo, JobState<Op>>,
    /// How many imported caches the jobs have together.
    pub(crate) imports: usize,
    pub(crate) requests: BTreeMap<RequestNo, Request>,
    /// Which edge does, or did, the work of a strong key (row `so.merge`).
    pub(crate) owners: HashMap<Digest, EdgeId>,
    pub(crate) running: usize,
    pub(crate) max_parallel: Option<usize>,
    pub(crate) queue: VecDeque<NodeNo>,
    pub(crate) dirty: Dirty,
    /// Edges that failed only because something was cancelled; they start anew after the step (row
    /// `so.errcache`).
    pub(crate) forgotten: Vec<EdgeId>,
    pub(crate) next: u64,
    /// What this step asks of the world.
    pub(crate) effects: Vec<Effect<Op>>,
}

/// A vertex over given inputs. The same definition over an input that ignores the cache is another
/// node.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Identity {
    pub(crate) vertex: VertexId,
    pub(crate) inputs: Vec<EdgeId>,
}

pub(crate) struct JobState<Op: Operation> {
    pub(crate) data: Op::Job,
    pub(crate) journal: Journal,
    pub(crate) nodes: BTreeSet<NodeNo>,
    pub(crate) imports: Vec<Import<Op::Output>>,
}

/// A cache that a job imported.
pub(crate) struct Import<O> {
    pub(crate) no: ImportNo,
    pub(crate) cache: Arc<dyn ImportedCache<O>>,
    /// Waits for it to be read; `None` when it was.
    pub(crate) reading: Option<TaskNo>,
}

pub(crate) struct Request {
    pub(crate) job: JobNo,
    pub(crate) edge: EdgeId,
}

/// A vertex that some job is interested in.
pub(crate) struct Node<Op: Operation> {
    pub(crate) identity: Identity,
    pub(crate) vertex: Arc<Vertex<Op>>,
    pub(crate) cx: OpContext<Op::Job>,
    pub(crate) holders: Holders<Op::Job>,
    /// How often it was taken back because an input could no longer be had.
    pub(crate) recoveries: u32,
    /// How often its inputs had been taken back when it last ran.
    pub(crate) ran_over: u64,
    /// How many jobs have left; work cancelled after one left is tried again for the others.
    pub(crate) jobs_left: u64,
    pub(crate) reported: Reported,
    pub(crate) map: Work<Arc<CacheMap>>,
    /// One per input: checksum of what is read of it; `None` within if there is none.
    pub(crate) contents: Vec<Work<Option<Digest>>>,
    pub(crate) run: Run<Op::Output>,
    pub(crate) edges: BTreeMap<usize, Edge<Op::Output>>,
}

/// The jobs of a node, shared with its operation.
pub(crate) struct Holders<J>(pub(crate) SharedJobs<J>);

type SharedJobs<J> = Arc<Mutex<Vec<(JobNo, J)>>>;

impl<J: Clone> Holders<J> {
    pub(crate) fn edit<R>(&self, f: impl FnOnce(&mut Vec<(JobNo, J)>) -> R) -> R {
        f(&mut self.0.lock())
    }
}

/// What was reported of a vertex.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reported {
    Nothing,
    Started,
    Ended,
}

/// A task in flight.
#[derive(Clone, Copy, Debug)]
pub(crate) struct InFlight {
    pub(crate) task: TaskNo,
    /// [`Node::jobs_left`] when it began.
    pub(crate) jobs_left: u64,
    /// How often inputs had been taken back when it began.
    pub(crate) redone: u64,
}

/// A thing computed once per vertex.
#[derive(Clone, Debug)]
pub(crate) enum Work<T> {
    Unasked,
    Asked(InFlight),
    Known(T),
    Failed(Fault),
}

impl<T> Work<T> {
    pub(crate) fn is(&self, task: TaskNo) -> bool {
        matches!(self, Self::Asked(f) if f.task == task)
    }
}

/// The operation itself.
#[derive(Clone, Debug)]
pub(crate) enum Run<O> {
    Idle,
    /// Waits for its turn.
    Queued,
    Running(InFlight),
    Done(Vec<O>),
    Failed(Fault),
}

pub(crate) struct Edge<O> {
    pub(crate) wants: BTreeMap<Waiter, Level>,
    pub(crate) phase: Phase<O>,
    /// What imported caches call it, once that was looked up.
    pub(crate) foreign: Option<Vec<Key>>,
    /// Results of imported caches that were taken already.
    pub(crate) taken: HashSet<(ImportNo, CacheKey)>,
    /// How often its result was taken back because it could no longer be had.
    pub(crate) redone: u32,
}

impl<O> Default for Edge<O> {
    fn default() -> Self {
        Self {
            wants: BTreeMap::new(),
            phase: Phase::Open(Open::default()),
            foreign: None,
            taken: HashSet::new(),
            redone: 0,
        }
    }
}

impl<O> Edge<O> {
    pub(crate) fn desired(&self) -> Option<Level> {
        self.wants.values().copied().max()
    }

    /// Whether the store, or an imported cache, may have results that were made from this edge's
    /// keys.
    pub(crate) fn may_have_consumers(&self) -> bool {
        self.phase.may_have_consumers()
            || self.foreign.as_ref().is_some_and(|keys| !keys.is_empty())
    }
}

/// Where an edge stands.
pub(crate) enum Phase<O> {
    /// It looks for its keys and for a stored result.
    Open(Open),
    /// Another edge does the same work; this one takes its result.
    Following(Open, EdgeId),
    /// It needs its vertex to run.
    Claimed(Open),
    /// Its vertex ran; the result is being stored.
    Saving(Saving<O>),
    /// It has its result.
    Done(Done<O>),
    /// It has none. Its keys stay known if they were.
    Failed(Fault, Option<Open>),
}

/// What an edge without result knows.
#[derive(Clone, Debug, Default)]
pub(crate) struct Open {
    /// Up to which level all is known that can be known; never [`Level::Result`].
    pub(crate) settled: Option<Level>,
    /// Keys it can have, as far as its inputs' keys are known.
    pub(crate) candidates: Candidates,
    /// Primaries that the store knows some of them by.
    pub(crate) aliases: Vec<Key>,
    /// Keys whose aliases were asked for.
    pub(crate) looked: HashSet<Digest>,
    /// Keys whose result was asked for.
    pub(crate) probed: HashSet<Digest>,
    /// Whether the store knows a strong key and has no result for it.
    pub(crate) gone: bool,
    pub(crate) probe: Option<Probe>,
}

/// A question to the store, or to imported caches.
#[derive(Clone, Debug)]
pub(crate) struct Probe {
    pub(crate) task: TaskNo,
    /// Keys that the store is asked for.
    pub(crate) keys: Vec<Digest>,
    pub(crate) load: bool,
    /// Whether they are strong ones.
    pub(crate) strong: bool,
}

pub(crate) struct Saving<O> {
    pub(crate) task: TaskNo,
    pub(crate) value: O,
    pub(crate) candidates: Candidates,
}

pub(crate) struct Done<O> {
    pub(crate) value: O,
    pub(crate) from: ResultOrigin,
    pub(crate) keys: Vec<Key>,
}

/// Where an edge has its result from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ResultOrigin {
    /// Its vertex ran.
    Run,
    /// Another edge, which did the same work.
    Twin,
    /// The store, or an imported cache.
    Cache,
}

impl ResultOrigin {
    pub(crate) fn completion(self) -> Completion {
        match self {
            Self::Run => Completion::Ran,
            Self::Twin | Self::Cache => Completion::Cached,
        }
    }
}

impl Open {
    pub(crate) fn keys(&self) -> Vec<Key> {
        if self.aliases.is_empty() { self.candidates.published() } else { self.aliases.clone() }
    }
}

/// What a consumer sees of an input.
pub(crate) enum InputState {
    Pending,
    Ready,
    Failed(Fault),
}

impl<O> Phase<O> {
    /// Whether the edge is known up to `level`.
    pub(crate) fn seen(&self, level: Level) -> InputState {
        let settled = |open: &Open| {
            if open.settled >= Some(level) { InputState::Ready } else { InputState::Pending }
        };
        match self {
            Self::Open(open) => settled(open),
            Self::Following(open, _) | Self::Claimed(open) => settled(open),
            Self::Saving(_) if level < Level::Result => InputState::Ready,
            Self::Saving(_) => InputState::Pending,
            Self::Done(_) => InputState::Ready,
            Self::Failed(fault, open) => match open {
                Some(open) if open.settled >= Some(level) => InputState::Ready,
                _ => InputState::Failed(fault.clone()),
            },
        }
    }

    /// Keys for consumers.
    pub(crate) fn keys(&self) -> Vec<Key> {
        match self {
            Self::Open(open)
            | Self::Following(open, _)
            | Self::Claimed(open)
            | Self::Failed(_, Some(open)) => open.keys(),
            Self::Saving(saving) => saving.candidates.published(),
            Self::Done(done) => done.keys.clone(),
            Self::Failed(_, None) => Vec::new(),
        }
    }

    /// Whether the store may have results that were made from this edge's keys.
    pub(crate) fn may_have_consumers(&self) -> bool {
        match self {
            Self::Open(open)
            | Self::Following(open, _)
            | Self::Claimed(open)
            | Self::Failed(_, Some(open)) => !open.aliases.is_empty(),
            Self::Saving(_) | Self::Done(_) => true,
            Self::Failed(_, None) => false,
        }
    }
}

/// Edges and nodes to look at again within this step.
#[derive(Default)]
pub(crate) struct Dirty {
    queue: VecDeque<EdgeId>,
    queued: HashSet<EdgeId>,
    pub(crate) nodes: BTreeSet<NodeNo>,
}

impl Dirty {
    pub(crate) fn push(&mut self, edge: EdgeId) {
        self.nodes.insert(edge.node);
        if self.queued.insert(edge) {
            self.queue.push_back(edge);
        }
    }

    pub(crate) fn pop(&mut self) -> Option<EdgeId> {
        let edge = self.queue.pop_front()?;
        self.queued.remove(&edge);
        Some(edge)
    }
}

impl<Op: Operation> Graph<Op> {
    pub(crate) fn new(max_parallel: Option<usize>) -> Self {
        Self {
            nodes: HashMap::new(),
            known: HashMap::new(),
            jobs: BTreeMap::new(),
            imports: 0,
            requests: BTreeMap::new(),
            owners: HashMap::new(),
            running: 0,
            max_parallel,
            queue: VecDeque::new(),
            dirty: Dirty::default(),
            forgotten: Vec::new(),
            next: 1,
            effects: Vec::new(),
        }
    }

    pub(crate) fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    pub(crate) fn edge(&self, id: EdgeId) -> Option<&Edge<Op::Output>> {
        self.nodes.get(&id.node)?.edges.get(&id.output)
    }

    pub(crate) fn edge_mut(&mut self, id: EdgeId) -> Option<&mut Edge<Op::Output>> {
        self.nodes.get_mut(&id.node)?.edges.get_mut(&id.output)
    }

    /// Sets what `waiter` wants of `target`; `None` withdraws it.
    pub(crate) fn want(&mut self, target: EdgeId, waiter: Waiter, level: Option<Level>) {
        let Some(edge) = self.edge_mut(target) else { return };
        let before = edge.desired();
        match level {
            Some(level) => edge.wants.insert(waiter, level),
            None => edge.wants.remove(&waiter),
        };
        if edge.desired() != before {
            self.dirty.push(target);
        }
    }

    /// Looks again at all waiters of `edge`.
    pub(crate) fn notify(&mut self, edge: EdgeId) {
        let waiters: Vec<Waiter> =
            self.edge(edge).map(|e| e.wants.keys().copied().collect()).unwrap_or_default();
        for waiter in waiters {
            if let Waiter::Edge(consumer) = waiter {
                self.dirty.push(consumer);
            }
        }
    }

    /// The node of `vertex`, made if need be, with all it depends on; each is held by `job`.
    pub(crate) fn load(&mut self, vertex: &Arc<Vertex<Op>>, output: usize, job: JobNo) -> EdgeId {
        // Depth first without recursion: a foreign graph may be deep.
        let mut done: HashMap<*const Vertex<Op>, NodeNo> = HashMap::new();
        let mut stack: Vec<(&Arc<Vertex<Op>>, usize)> = vec![(vertex, 0)];
        let mut root = NodeNo(0);
        while let Some((v, next)) = stack.pop() {
            if let Some((input, _)) = v.inputs.get(next) {
                stack.push((v, next + 1));
                if !done.contains_key(&Arc::as_ptr(input)) {
                    stack.push((input, 0));
                }
                continue;
            }
            let inputs: Vec<EdgeId> = v
                .inputs
                .iter()
                .map(|(i, output)| EdgeId {
                    node: done.get(&Arc::as_ptr(i)).copied().unwrap_or(NodeNo(0)),
                    output: *output,
                })
                .collect();
            root = self.node(v, inputs);
            self.hold(root, job);
            done.insert(Arc::as_ptr(v), root);
        }
        let edge = EdgeId { node: root, output };
        self.ensure_edge(edge);
        edge
    }

    fn ensure_edge(&mut self, edge: EdgeId) {
        if let Some(node) = self.nodes.get_mut(&edge.node) {
            node.edges.entry(edge.output).or_default();
        }
    }

    fn node(&mut self, vertex: &Arc<Vertex<Op>>, inputs: Vec<EdgeId>) -> NodeNo {
        let identity = Identity { vertex: vertex.id, inputs };
        if let Some(no) = self.known.get(&identity) {
            return *no;
        }
        for input in &identity.inputs {
            self.ensure_edge(*input);
        }
        let no = NodeNo(self.number());
        let inputs = vertex.inputs.iter().map(|(v, _)| v.id.digest).collect();
        let reporter =
            Reporter::new(vertex.id.digest, vertex.name.clone(), inputs, vertex.group.clone());
        let shared: SharedJobs<Op::Job> = Arc::default();
        let jobs = shared.clone();
        let jobs = Arc::new(move || jobs.lock().iter().map(|(_, data)| data.clone()).collect());
        let node = Node {
            identity: identity.clone(),
            vertex: vertex.clone(),
            cx: OpContext { reporter, jobs },
            holders: Holders(shared),
            recoveries: 0,
            ran_over: 0,
            jobs_left: 0,
            reported: Reported::Nothing,
            map: Work::Unasked,
            contents: vertex.inputs.iter().map(|_| Work::Unasked).collect(),
            run: Run::Idle,
            edges: BTreeMap::new(),
        };
        self.nodes.insert(no, node);
        self.known.insert(identity, no);
        no
    }

    /// Lets `job` hold `node`, report it and share its data with it.
    pub(crate) fn hold(&mut self, node: NodeNo, job: JobNo) {
        let (Some(state), Some(n)) = (self.jobs.get_mut(&job), self.nodes.get(&node)) else {
            return;
        };
        if !state.nodes.insert(node) {
            return;
        }
        n.cx.reporter.attach(&state.journal);
        n.holders.edit(|h| h.push((job, state.data.clone())));
        if !state.imports.is_empty() {
            self.consult_again(node);
        }
    }
}
