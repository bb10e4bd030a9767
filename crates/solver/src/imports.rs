//! Imported caches: asked after the store, and waited for only where the store has no result.
//!
//! Another machine may know the same work by other keys, because a tag has moved or a mirror packs
//! differently. What an imported cache calls an edge is kept beside the edge's own keys
//! (`Edge::foreign`): consumers combine it to ask that cache again, and it is good for nothing
//! else. The store never sees such a key, so a hostile cache cannot bring one job's results under
//! the keys of another job's work.

use crate::{
    CacheMap, ImportedCache, Operation, RecordMeta,
    advance::Blocked,
    event::{Effect, Promise},
    graph::{Graph, Import, Level, Open, Phase, Probe, Work},
    ids::{EdgeId, ImportNo, JobNo, NodeNo, TaskNo},
    keys::{Candidates, Key},
};
use std::sync::Arc;

/// How many names of imported caches for one edge are followed.
const FOREIGN: usize = 4;

/// An imported cache that was read.
type Read<O> = (ImportNo, Arc<dyn ImportedCache<O>>);

impl<Op: Operation> Graph<Op> {
    /// Lets `job` look into `cache` from now on.
    pub(crate) fn import(&mut self, job: JobNo, cache: Arc<dyn ImportedCache<Op::Output>>) {
        let (no, task) = (ImportNo(self.number()), self.task());
        let Some(state) = self.jobs.get_mut(&job) else { return };
        state.imports.push(Import { no, cache: cache.clone(), reading: Some(task) });
        self.imports += 1;
        self.effects.push(Effect::Read { task, job, cache });
    }

    /// An imported cache was read, or cannot be.
    pub(crate) fn imported(&mut self, task: TaskNo, job: JobNo) {
        let Some(state) = self.jobs.get_mut(&job) else { return };
        let Some(import) = state.imports.iter_mut().find(|i| i.reading == Some(task)) else {
            return;
        };
        import.reading = None;
        for node in state.nodes.clone() {
            self.consult_again(node);
        }
    }

    /// Lets the open edges of a node look into the caches of its jobs again: there is one more.
    pub(crate) fn consult_again(&mut self, no: NodeNo) {
        let Some(node) = self.nodes.get_mut(&no) else { return };
        for edge in node.edges.values_mut() {
            edge.foreign = None;
            if let Phase::Open(open) = &mut edge.phase {
                open.settled = open.settled.min(Some(Level::Fast));
            }
        }
        self.dirty_node(no);
    }

    /// The caches that the jobs of a node imported; those that are not read yet stop the
    /// caller.
    fn imports_of(&self, no: NodeNo) -> Result<Vec<Read<Op::Output>>, Blocked> {
        let Some(node) = self.nodes.get(&no).filter(|_| self.imports > 0) else {
            return Ok(Vec::new());
        };
        let jobs: Vec<JobNo> = node.holders.edit(|h| h.iter().map(|(job, _)| *job).collect());
        let imports =
            || jobs.iter().filter_map(|job| self.jobs.get(job)).flat_map(|job| &job.imports);
        if imports().any(|i| i.reading.is_some()) {
            return Err(Blocked::Wait);
        }
        Ok(imports().map(|i| (i.no, i.cache.clone())).collect())
    }

    /// Asks imported caches for a result where one is promised that was not taken yet; whether
    /// there was any.
    pub(crate) fn consult(
        &mut self,
        id: EdgeId,
        open: &mut Open,
        map: &CacheMap,
        contents: bool,
    ) -> Result<bool, Blocked> {
        if !open.candidates.all().any(Key::askable) {
            return Ok(false);
        }
        let imports = self.imports_of(id.node)?;
        if imports.is_empty() {
            return Ok(false);
        }
        let candidates = self.widened(id, map, contents);
        let taken = self.edge(id).map(|e| e.taken.clone()).unwrap_or_default();
        let mut promised = Vec::new();
        for (strong, keys) in [(true, &candidates.strong), (false, &candidates.weak)] {
            for key in keys.iter().filter(|k| k.askable()).map(|k| k.key) {
                let has = |(no, cache): &&Read<Op::Output>| {
                    cache.has_result(&key) && !taken.contains(&(*no, key))
                };
                promised.extend(imports.iter().filter(has).map(|(no, cache)| Promise {
                    no: *no,
                    cache: cache.clone(),
                    key,
                }));
            }
            if !promised.is_empty() {
                self.fetch(id, open, strong, promised);
                return Ok(true);
            }
        }
        // Its consumers ask by what the caches call it.
        let names = names(&imports, candidates.all().chain(open.candidates.all()));
        if let Some(edge) = self.edge_mut(id) {
            edge.foreign = Some(names);
        }
        Ok(false)
    }

    fn fetch(
        &mut self,
        id: EdgeId,
        open: &mut Open,
        strong: bool,
        promised: Vec<Promise<Op::Output>>,
    ) {
        // A later job may import what has a result for other keys; what was promised here is taken
        // once, whether it can be had or not.
        if let Some(edge) = self.edge_mut(id) {
            edge.taken.extend(promised.iter().map(|p| (p.no, p.key)));
        }
        // Keys by definition alone lead to the latest result, and prove nothing of the others.
        let of =
            |keys: &[Key]| keys.iter().filter(|k| k.askable()).map(|k| k.key).collect::<Vec<_>>();
        let mut keys = if strong { of(&open.candidates.strong) } else { Vec::new() };
        keys.extend(of(&open.candidates.weak));
        let meta = RecordMeta { imported: true, ..self.meta(id) };
        let task = self.task();
        open.probe = Some(Probe { task, keys: Vec::new(), load: false, strong });
        self.effects.push(Effect::Fetch { task, edge: id, from: promised, keys, meta });
    }

    /// The edge's candidates by its inputs' own keys and by what imported caches call these.
    fn widened(&mut self, id: EdgeId, map: &CacheMap, contents: bool) -> Candidates {
        for input in self.nodes.get(&id.node).map(|n| n.identity.inputs.clone()).unwrap_or_default()
        {
            self.learn(input);
        }
        self.candidates_with(id, map, contents, |edge| {
            let mut keys = edge.phase.keys();
            keys.extend(edge.foreign.iter().flatten());
            keys
        })
    }

    /// Finds out what imported caches call an edge, and for that what they call its inputs. Without
    /// recursion: a foreign graph may be deep.
    fn learn(&mut self, id: EdgeId) {
        let mut stack = vec![id];
        while let Some(next) = stack.last().copied() {
            let known = |id: &EdgeId| self.edge(*id).is_none_or(|e| e.foreign.is_some());
            if known(&next) {
                stack.pop();
                continue;
            }
            let inputs =
                self.nodes.get(&next.node).map(|n| n.identity.inputs.clone()).unwrap_or_default();
            let unknown: Vec<EdgeId> = inputs.into_iter().filter(|i| !known(i)).collect();
            if !unknown.is_empty() {
                stack.extend(unknown);
                continue;
            }
            let names = self.names_of(next);
            if let Some(edge) = self.edge_mut(next) {
                edge.foreign = Some(names);
            }
        }
    }

    fn names_of(&mut self, id: EdgeId) -> Vec<Key> {
        let Some(Work::Known(map)) = self.nodes.get(&id.node).map(|n| &n.map) else {
            return Vec::new();
        };
        let (map, imports) = (map.clone(), self.imports_of(id.node).unwrap_or_default());
        let own = self.edge(id).map(|e| e.phase.keys()).unwrap_or_default();
        names(&imports, self.widened(id, &map, true).all().chain(&own))
    }
}

/// What the caches call the work that has one of `keys`.
fn names<'a, O>(imports: &[Read<O>], keys: impl Iterator<Item = &'a Key>) -> Vec<Key> {
    let mut names: Vec<Key> = Vec::new();
    for key in keys.filter(|k| k.askable()) {
        for name in imports.iter().filter_map(|(_, cache)| cache.primary(&key.key)) {
            if names.len() < FOREIGN && !names.iter().any(|n| n.key == name) {
                names.push(Key::stored(name));
            }
        }
    }
    names
}
