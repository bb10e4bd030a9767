//! What the scheduler asks of the world: operations to run and a store to remember results in.

use async_trait::async_trait;
use shipway_fault::{Fault, Result};
use shipway_oci::{Digest, Hasher};
use shipway_progress::Reporter;
use std::{collections::BTreeMap, fmt, sync::Arc};

/// Identity of a vertex: the digest of its definition, plus whether it ignores the cache (row
/// `so.ignorevariant`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct VertexId {
    /// Digest of the definition.
    pub digest: Digest,
    /// Whether the cache is not asked.
    pub ignore_cache: bool,
    /// Distinguishes vertices of one definition that are worked on in different ways.
    pub variant: u8,
}

/// Identity of one request's interest in the graph (`Solve.Ref`).
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct JobId(pub String);

impl fmt::Debug for JobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Identity of a result by what it depends on. Two vertices with a common key are the same work.
///
/// A key is the SHA-256 of the operation's key, the number of the output, and for each input the
/// input's key or content digest and its selector. All keys are therefore computable without
/// looking anything up, and a store needs only aliases (several keys, one primary) and records.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CacheKey(pub Digest);

/// What an operation's result depends on.
#[derive(Clone, Debug, Default)]
pub struct CacheMap {
    /// Keys of the operation itself without its inputs, at least one; any of them identifies it
    /// (row `so.key.multi`).
    pub keys: Vec<Digest>,
    /// One entry per input of the vertex.
    pub inputs: Vec<InputMap>,
    /// Whether the keys mean nothing beyond this build's session, so that results under them are
    /// not stored durably (row `so.key.random`).
    pub ephemeral: bool,
    /// What the keys are made of, as far as that is known: only to say how two operations differ.
    pub parts: Vec<KeyPart>,
}

/// A part of what an operation's key is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyPart {
    /// What it is called, such as `env VERSION`.
    pub name: String,
    /// Distinguishes its values. Not the value itself, which may be long and must not be shown.
    pub fingerprint: u64,
}

/// How a result depends on one input.
#[derive(Clone, Debug, Default)]
pub struct InputMap {
    /// Narrows the dependency to a part of the input (row `so.key.selector`).
    pub selector: Option<Digest>,
    /// Whether [`Operation::content_key`] can replace the input's own key by a checksum of its
    /// content (row `so.key.content`).
    pub content: bool,
}

/// What an operation may use while it works. Cheap to clone.
#[derive(Clone)]
pub struct OpContext<J> {
    /// Where progress goes: to every build that shares the vertex.
    pub reporter: Reporter,
    /// The data of every job interested at the moment of the call; never empty while the operation
    /// runs.
    pub jobs: Arc<dyn Fn() -> Vec<J> + Send + Sync>,
}

/// The work of one vertex. Futures are dropped when no job is interested any more; that must leave
/// nothing behind.
#[async_trait]
pub trait Operation: Send + Sync + 'static {
    /// A result; cheap to clone (a handle).
    type Output: Clone + Send + Sync + 'static;
    /// What a job brings: its sessions, its settings.
    type Job: Clone + Send + Sync + 'static;

    /// What the result depends on. Called once per vertex; must not need the inputs.
    async fn cache_map(&self, cx: &OpContext<Self::Job>) -> Result<CacheMap>;

    /// A checksum of what the operation reads of input number `input`, if it can be computed;
    /// called only for inputs whose [`InputMap::content`] is set.
    async fn content_key(
        &self,
        input: usize,
        value: &Self::Output,
        cx: &OpContext<Self::Job>,
    ) -> Result<Option<Digest>>;

    /// Does the work: one output per output index of the vertex.
    async fn run(
        &self,
        inputs: Vec<Self::Output>,
        cx: &OpContext<Self::Job>,
    ) -> Result<Vec<Self::Output>>;

    /// Whether running it counts against the parallelism limit (row `so.par`).
    fn takes_slot(&self) -> bool {
        true
    }

    /// Whether `fault` says that `value` can no longer be had, so that its vertex must run again
    /// (row `so.loaderr`).
    fn is_lost(value: &Self::Output, fault: &Fault) -> bool {
        let _ = (value, fault);
        false
    }
}

/// A node of the graph handed to the solver.
pub struct Vertex<Op: ?Sized> {
    /// Identity.
    pub id: VertexId,
    /// Name shown to users.
    pub name: String,
    /// Progress group, if any.
    pub group: Option<shipway_progress::Group>,
    /// Inputs: vertex and output index.
    pub inputs: Vec<(Arc<Vertex<Op>>, usize)>,
    /// The work.
    pub op: Arc<Op>,
}

impl<Op: ?Sized> Drop for Vertex<Op> {
    /// Takes a chain of vertices apart without recursion: a client's graph may be deep enough to
    /// exhaust the stack.
    fn drop(&mut self) {
        let mut doomed = std::mem::take(&mut self.inputs);
        while let Some((vertex, _)) = doomed.pop() {
            if let Some(mut vertex) = Arc::into_inner(vertex) {
                doomed.append(&mut vertex.inputs);
            }
        }
    }
}

/// What is stored beside a result, for cache exports, `du`, and to say how later work differs.
#[derive(Clone, Debug, Default)]
pub struct RecordMeta {
    /// The operation's keys (from [`CacheMap::keys`]).
    pub op_keys: Vec<Digest>,
    /// Output index.
    pub output: usize,
    /// What the operation's keys are made of (from [`CacheMap::parts`]).
    pub parts: Vec<KeyPart>,
    /// Keys of each input with the selector.
    pub inputs: Vec<(Vec<CacheKey>, Option<Digest>)>,
    /// Checksums of what is read of the inputs, where they were computed; as many as `inputs`, or
    /// none.
    pub contents: Vec<Option<Digest>>,
    /// The vertex's name.
    pub description: String,
    /// Whether the result came from an imported cache.
    pub imported: bool,
}

/// How many keys of an operation a record is found by that another is compared with.
const SIMILAR_BY_KEY: usize = 4;

impl RecordMeta {
    /// What a store finds the latest record by that this one is worth comparing with, the best
    /// first: one of the same operation, or else one with the same name.
    pub fn similar(&self) -> Vec<Digest> {
        let name = |kind: &str, of: &[u8]| {
            let mut h = Hasher::new();
            h.update(kind.as_bytes());
            h.update((self.output as u64).to_le_bytes());
            h.update(of);
            h.finish()
        };
        let keys = self.op_keys.iter().take(SIMILAR_BY_KEY);
        let by_key = keys.map(|key| name("operation\0", key.as_bytes()));
        by_key.chain([name("name\0", self.description.as_bytes())]).collect()
    }
}

/// How a requested edge was completed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Completion {
    /// The operation ran.
    Ran,
    /// The result came from the cache.
    Cached,
}

/// Remembers results by key. Implementations keep aliases durable even when a record is pruned.
#[async_trait]
pub trait CacheStore<O>: Send + Sync {
    /// The primary keys that `keys` are known aliases of (unknown ones are left out), without
    /// duplicates.
    async fn primaries(&self, keys: &[CacheKey]) -> Result<Vec<CacheKey>>;

    /// The first of `keys` (or of their primaries) that has a loadable record: its primary and the
    /// result. A record whose result is gone is dropped and skipped (row `so.loaderr`).
    async fn load(&self, keys: &[CacheKey]) -> Result<Option<(CacheKey, O)>>;

    /// Stores `value` under the primary that `keys[0]` already has, or else under `keys[0]` itself,
    /// and returns that primary. All keys become its aliases, also those that led elsewhere before:
    /// the first key is the one the value follows from. An existing record of the primary is
    /// replaced.
    async fn save(&self, keys: &[CacheKey], value: &O, meta: &RecordMeta) -> Result<CacheKey>;

    /// Stores `value`, which an imported cache gave for `keys`, where nothing is known yet: a key
    /// that leads somewhere keeps leading there, and a record whose result can be loaded stays.
    /// Returns the primary of the first key.
    async fn adopt(&self, keys: &[CacheKey], value: &O, meta: &RecordMeta) -> Result<CacheKey>;

    /// Drops the records of `value`, which can no longer be had. Keys stay known.
    async fn forget(&self, value: &O) -> Result<()>;

    /// The latest record that is found by one of `meta`'s [names](RecordMeta::similar): what work
    /// is compared with that the store has no result for. A store may know none.
    async fn similar(&self, meta: &RecordMeta) -> Result<Option<RecordMeta>> {
        let _ = meta;
        Ok(None)
    }

    /// Makes `keys` aliases of `primary`, whose record stays as it is. A store that keeps no
    /// aliases may do nothing.
    async fn alias(&self, primary: CacheKey, keys: &[CacheKey]) -> Result<()> {
        let _ = (primary, keys);
        Ok(())
    }
}

/// A cache from elsewhere that one job looks into besides the store, until it ends (row
/// `so.combined`).
///
/// What it says is not to be trusted beyond that: its names for work lead to its own results only,
/// and nothing is stored under them.
#[async_trait]
pub trait ImportedCache<O>: Send + Sync {
    /// Waits until the cache was read. One that cannot be read, or not in time, knows nothing.
    async fn ready(&self);

    /// The primary key under which the cache knows the work with this key. Asked only when it is
    /// [ready](ImportedCache::ready).
    fn primary(&self, key: &CacheKey) -> Option<CacheKey>;

    /// Whether it promises a result for the key.
    fn has_result(&self, key: &CacheKey) -> bool;

    /// That result.
    async fn load(&self, key: &CacheKey) -> Result<Option<O>>;
}

/// Bounds on the solver's work.
#[derive(Clone, Copy, Debug, Default)]
pub struct Limits {
    /// How many operations that [count](Operation::takes_slot) run at once (row `so.par`); `None`
    /// for no limit.
    pub max_parallel: Option<usize>,
}

/// A vertex of a job as it is worked on.
pub struct SolvedVertex<Op: Operation> {
    /// The vertex whose operation does the work.
    pub vertex: Arc<Vertex<Op>>,
    /// The results that it has, by output.
    pub outputs: BTreeMap<usize, Op::Output>,
    /// Keys of its outputs in the store, as far as they are known.
    pub keys: Vec<CacheKey>,
}
