//! What happens to the graph ([`Event`]) and what it asks of the world ([`Effect`]).

use crate::{
    CacheKey, CacheMap, Completion, ImportedCache, OpContext, Operation, RecordMeta, Vertex,
    ids::{EdgeId, ImportNo, JobNo, NodeNo, RequestNo, TaskNo},
};
use shipway_fault::{Fault, Result};
use shipway_oci::Digest;
use shipway_progress::{CacheMiss, Journal, Reporter};
use std::sync::Arc;
use tokio::sync::oneshot;

/// A result that an imported cache promises.
pub(crate) struct Promise<O> {
    pub(crate) no: ImportNo,
    pub(crate) cache: Arc<dyn ImportedCache<O>>,
    /// What the cache knows it by.
    pub(crate) key: CacheKey,
}

/// Something that happened.
pub(crate) enum Event<Op: Operation> {
    /// A job begins.
    Open { job: JobNo, data: Op::Job, journal: Journal },
    /// A job ends.
    Close { job: JobNo },
    /// A job looks into another cache from now on.
    Import { job: JobNo, cache: Arc<dyn ImportedCache<Op::Output>> },
    /// A task ended: the cache was read.
    Imported { task: TaskNo, job: JobNo },
    /// A request's result can no longer be had.
    Lost {
        job: JobNo,
        vertex: Arc<Vertex<Op>>,
        output: usize,
        fault: Fault,
        answer: oneshot::Sender<bool>,
    },
    /// A job wants a result.
    Request { request: RequestNo, job: JobNo, vertex: Arc<Vertex<Op>>, output: usize },
    /// It does not any more.
    Withdraw { request: RequestNo },
    /// A task ended.
    Mapped { task: TaskNo, node: NodeNo, result: Result<CacheMap> },
    /// A task ended.
    Content { task: TaskNo, node: NodeNo, input: usize, result: Result<Option<Digest>> },
    /// A task ended.
    Probed { task: TaskNo, edge: EdgeId, answer: ProbeResult<Op::Output> },
    /// A task ended.
    Ran { task: TaskNo, node: NodeNo, result: Result<Vec<Op::Output>> },
    /// A task ended; `None` when the store failed.
    Saved { task: TaskNo, edge: EdgeId, primary: Option<CacheKey> },
}

/// What the store knows.
pub(crate) enum ProbeResult<O> {
    /// A result and its primary key.
    Hit(CacheKey, O),
    /// A result of an imported cache, with its primary key in the store, if it could be stored.
    Imported(Option<CacheKey>, O),
    /// No result, and these primaries.
    Miss(Vec<CacheKey>),
}

/// What the driver is to do.
pub(crate) enum Effect<Op: Operation> {
    /// Ask for the cache map.
    Map { task: TaskNo, node: NodeNo, vertex: Arc<Vertex<Op>>, cx: OpContext<Op::Job> },
    /// Ask for the checksum of what is read of an input.
    Content {
        task: TaskNo,
        node: NodeNo,
        vertex: Arc<Vertex<Op>>,
        input: usize,
        value: Op::Output,
        cx: OpContext<Op::Job>,
    },
    /// Ask the store for aliases and, with `load`, first for a result.
    Probe { task: TaskNo, edge: EdgeId, keys: Vec<CacheKey>, load: bool },
    /// Wait until an imported cache was read.
    Read { task: TaskNo, job: JobNo, cache: Arc<dyn ImportedCache<Op::Output>> },
    /// Ask imported caches for a result, by their keys; one that is there is stored under `keys`
    /// where nothing is known yet.
    Fetch {
        task: TaskNo,
        edge: EdgeId,
        from: Vec<Promise<Op::Output>>,
        keys: Vec<CacheKey>,
        meta: RecordMeta,
    },
    /// Drop the records of a result that can no longer be had, before the store is asked for
    /// anything else.
    Forget { value: Op::Output },
    /// Report why the operation is run, and run it.
    Run {
        task: TaskNo,
        node: NodeNo,
        vertex: Arc<Vertex<Op>>,
        inputs: Vec<Op::Output>,
        why: Option<Why>,
        cx: OpContext<Op::Job>,
    },
    /// Store a result: under a primary of the strong keys if there is one, else under the first of
    /// them, and under the weak ones too.
    Save {
        task: TaskNo,
        edge: EdgeId,
        strong: Vec<CacheKey>,
        weak: Vec<CacheKey>,
        value: Op::Output,
        meta: RecordMeta,
    },
    /// Let more keys lead to a primary. Nothing waits for it.
    Alias { primary: CacheKey, keys: Vec<CacheKey> },
    /// Drop a task.
    Cancel { task: TaskNo },
    /// Report progress of a vertex.
    Report { reporter: Reporter, what: VertexProgress },
    /// Answer a request.
    Reply { request: RequestNo, result: Result<(Op::Output, Completion)> },
}

/// What is reported of a vertex.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum VertexProgress {
    Started,
    Cached,
    Completed(Option<String>),
}

/// What is known of a miss when the vertex starts.
#[derive(Clone, Debug)]
pub(crate) enum Why {
    /// The reason.
    Known(CacheMiss),
    /// The store has no such work: how this, whose inputs have these names, differs from what it
    /// has, is to be found out.
    Unlike(RecordMeta, Vec<String>),
}
