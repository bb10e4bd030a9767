//! How one edge comes to its result: the decisions of the scheduler.
//!
//! An edge learns in three stages, each asking no more of its inputs than it must (rows
//! `so.states`, `so.earlyhit`):
//!
//! 1. *Fast*: its cache map and its inputs' fast keys give its keys by definition; the store says
//!    what they are aliases of.
//! 2. *Slow*: the store is asked for a result; if it has none, inputs are asked for their slow
//!    keys, and those whose content matters for their results, of which checksums give keys by
//!    content. An edge that cannot be in the store, because an input it depends on by definition is
//!    not, skips the rest of this stage, so that what must run anyway runs side by side.
//! 3. *Result*: all inputs' results; then the vertex runs, unless another edge does the same work
//!    (row `so.merge`).

use crate::{
    CacheKey, CacheMap, Operation,
    event::Effect,
    graph::{Edge, Graph, InputState, Level, Open, Phase, Probe, Waiter, Work},
    ids::{EdgeId, NodeNo},
    keys::{Candidates, InputKeys, Key},
};
use shipway_fault::{Fault, Result};
use std::{collections::BTreeMap, sync::Arc};

/// What a stage came to.
enum Stage<O> {
    /// Something asked for is not there yet.
    Wait,
    /// All is known up to this level.
    Settled(Level),
    /// The edge leaves the phase.
    Leave(Box<Phase<O>>),
}

/// A stage that cannot go on: it waits, or the edge fails.
pub(crate) enum Blocked {
    Wait,
    Fail(Fault),
}

impl From<Fault> for Blocked {
    fn from(fault: Fault) -> Self {
        Self::Fail(fault)
    }
}

impl Open {
    /// The store has no result for the keys of `probe`, and knows them by `primaries`.
    pub(crate) fn missed(&mut self, probe: Probe, primaries: Vec<CacheKey>) {
        if probe.load {
            self.probed.extend(&probe.keys);
            self.gone |= probe.strong && !primaries.is_empty();
        }
        self.looked.extend(probe.keys);
        if !primaries.is_empty() {
            self.aliases = primaries.into_iter().map(Key::stored).take(4).collect();
        }
    }

    /// Keys to ask the store for: strong ones before weak ones.
    fn unasked(&self, load: bool) -> (Vec<CacheKey>, bool) {
        let asked = if load { &self.probed } else { &self.looked };
        let of = |keys: &[Key]| -> Vec<CacheKey> {
            keys.iter()
                .filter(|k| k.askable() && !asked.contains(&k.key.0))
                .map(|k| k.key)
                .collect()
        };
        let strong = of(&self.candidates.strong);
        if strong.is_empty() { (of(&self.candidates.weak), false) } else { (strong, true) }
    }
}

impl<Op: Operation> Graph<Op> {
    /// Takes an edge as far as it can go.
    pub(crate) fn advance(&mut self, id: EdgeId) {
        let Some(edge) = self.edge_mut(id) else { return };
        let desired = edge.desired();
        let phase = std::mem::replace(&mut edge.phase, Phase::Open(Open::default()));
        let before = progress(&phase);
        let phase = match phase {
            Phase::Open(open) => self.probe_open(id, open, desired),
            Phase::Following(open, target) => self.follow(id, open, target, desired),
            Phase::Claimed(open) => self.claimed(id, open, desired),
            ended => ended,
        };
        let after = progress(&phase);
        let ended = matches!(phase, Phase::Saving(_) | Phase::Done(_) | Phase::Failed(..));
        if let Some(edge) = self.edge_mut(id) {
            edge.phase = phase;
        }
        if ended {
            self.release_inputs(id);
            self.answer(id);
        }
        if after != before {
            self.notify(id);
        }
    }

    /// Answers the requests for an edge that has ended.
    fn answer(&mut self, id: EdgeId) {
        let Some(edge) = self.edge(id) else { return };
        let result = match &edge.phase {
            Phase::Done(done) => Ok((done.value.clone(), done.from.completion())),
            Phase::Failed(fault, _) => Err(fault.clone()),
            _ => return,
        };
        let requests: Vec<_> = edge
            .wants
            .keys()
            .filter_map(|w| if let Waiter::Request(r) = w { Some(*r) } else { None })
            .collect();
        for request in requests {
            self.requests.remove(&request);
            self.want(id, Waiter::Request(request), None);
            self.effects.push(Effect::Reply { request, result: result.clone() });
        }
    }

    pub(crate) fn probe_open(
        &mut self,
        id: EdgeId,
        mut open: Open,
        desired: Option<Level>,
    ) -> Phase<Op::Output> {
        let Some(desired) = desired else {
            self.release_inputs(id);
            return Phase::Open(open);
        };
        loop {
            if open.probe.is_some() {
                return Phase::Open(open);
            }
            if open.settled >= Some(desired) {
                self.release_inputs(id);
                return Phase::Open(open);
            }
            let stage = match open.settled {
                None => self.fast(id, &mut open, desired),
                Some(Level::Fast) => self.slow(id, &mut open),
                Some(_) => self.result(id, &mut open),
            };
            match stage {
                Ok(Stage::Settled(level)) => open.settled = Some(level),
                Ok(Stage::Wait) | Err(Blocked::Wait) => return Phase::Open(open),
                Ok(Stage::Leave(phase)) => return *phase,
                Err(Blocked::Fail(fault)) => return self.failed(id, fault, Some(open)),
            }
        }
    }

    pub(crate) fn failed(
        &mut self,
        id: EdgeId,
        fault: Fault,
        open: Option<Open>,
    ) -> Phase<Op::Output> {
        if fault.is_cancelled() {
            self.forgotten.push(id);
        }
        Phase::Failed(fault, open)
    }

    fn fast(
        &mut self,
        id: EdgeId,
        open: &mut Open,
        desired: Level,
    ) -> Result<Stage<Op::Output>, Blocked> {
        self.raise(id, |_| Level::Fast);
        let map = self.map(id.node)?;
        self.await_inputs(id, Level::Fast)?;
        open.candidates = self.candidates(id, &map, false);
        if self.ask(id, open, desired >= Level::Slow) {
            return Ok(Stage::Wait);
        }
        Ok(Stage::Settled(Level::Fast))
    }

    fn slow(&mut self, id: EdgeId, open: &mut Open) -> Result<Stage<Op::Output>, Blocked> {
        if self.ask(id, open, true) {
            return Ok(Stage::Wait);
        }
        let map = self.map(id.node)?;
        if self.consult(id, open, &map, false)? {
            return Ok(Stage::Wait);
        }
        let content = |input: usize| map.inputs.get(input).is_some_and(|m| m.content);
        let unknown: Vec<bool> = self.unknown_inputs(id);
        // An input that the store does not know gives a hit by its content only.
        self.raise(id, |i| {
            if content(i) && unknown.get(i) == Some(&true) { Level::Result } else { Level::Slow }
        });
        if self.cannot_hit(id, &map) {
            open.candidates = self.candidates(id, &map, false);
            return Ok(Stage::Settled(Level::Slow));
        }
        self.await_inputs(id, Level::Slow)?;
        open.candidates = self.candidates(id, &map, false);
        if self.ask(id, open, true) || self.consult(id, open, &map, false)? {
            return Ok(Stage::Wait);
        }
        self.raise(id, |i| if content(i) { Level::Result } else { Level::Slow });
        self.contents(id, &map)?;
        open.candidates = self.candidates(id, &map, true);
        if self.ask(id, open, true) || self.consult(id, open, &map, true)? {
            return Ok(Stage::Wait);
        }
        Ok(Stage::Settled(Level::Slow))
    }

    fn result(&mut self, id: EdgeId, open: &mut Open) -> Result<Stage<Op::Output>, Blocked> {
        self.raise(id, |_| Level::Result);
        let map = self.map(id.node)?;
        self.await_inputs(id, Level::Result)?;
        self.contents(id, &map)?;
        open.candidates = self.candidates(id, &map, true);
        if self.ask(id, open, true) || self.consult(id, open, &map, true)? {
            return Ok(Stage::Wait);
        }
        let open = std::mem::take(open);
        Ok(Stage::Leave(Box::new(self.claim(id, open))))
    }

    /// Asks the store for what was not asked yet; whether there was anything.
    fn ask(&mut self, id: EdgeId, open: &mut Open, load: bool) -> bool {
        let (keys, strong) = open.unasked(load);
        if keys.is_empty() {
            return false;
        }
        let task = self.task();
        open.probe = Some(Probe { task, keys: keys.iter().map(|k| k.0).collect(), load, strong });
        self.effects.push(Effect::Probe { task, edge: id, keys, load });
        true
    }

    /// The cache map, asked for if need be.
    fn map(&mut self, no: NodeNo) -> Result<Arc<CacheMap>, Blocked> {
        let node = self.nodes.get(&no).ok_or(Blocked::Wait)?;
        match &node.map {
            Work::Known(map) => Ok(map.clone()),
            Work::Failed(fault) => Err(fault.clone().into()),
            Work::Asked(_) => Err(Blocked::Wait),
            Work::Unasked => {
                let flight = self.flight(no);
                let node = self.nodes.get_mut(&no).ok_or(Blocked::Wait)?;
                node.map = Work::Asked(flight);
                let (vertex, cx) = (node.vertex.clone(), node.cx.clone());
                self.effects.push(Effect::Map { task: flight.task, node: no, vertex, cx });
                Err(Blocked::Wait)
            }
        }
    }

    /// Checksums of all inputs whose content matters, asked for as their results come.
    fn contents(&mut self, id: EdgeId, map: &CacheMap) -> Result<(), Blocked> {
        let inputs =
            self.nodes.get(&id.node).map(|n| n.identity.inputs.clone()).unwrap_or_default();
        let mut wait = false;
        for (i, input) in
            inputs.iter().enumerate().filter(|(i, _)| map.inputs.get(*i).is_some_and(|m| m.content))
        {
            let value = match self.edge(*input).map(|e| &e.phase) {
                Some(Phase::Done(done)) => done.value.clone(),
                Some(Phase::Failed(fault, _)) => return Err(fault.clone().into()),
                Some(_) => {
                    wait = true;
                    continue;
                }
                None => return Err(Fault::cancelled().into()),
            };
            let node = self.nodes.get(&id.node).ok_or(Blocked::Wait)?;
            match node.contents.get(i) {
                Some(Work::Known(_)) | None => {}
                Some(Work::Failed(fault)) => return Err(fault.clone().into()),
                Some(Work::Asked(_)) => wait = true,
                Some(Work::Unasked) => {
                    wait = true;
                    let flight = self.flight(id.node);
                    let node = self.nodes.get_mut(&id.node).ok_or(Blocked::Wait)?;
                    node.contents[i] = Work::Asked(flight);
                    let (vertex, cx) = (node.vertex.clone(), node.cx.clone());
                    self.effects.push(Effect::Content {
                        task: flight.task,
                        node: id.node,
                        vertex,
                        input: i,
                        value,
                        cx,
                    });
                }
            }
        }
        if wait { Err(Blocked::Wait) } else { Ok(()) }
    }

    fn await_inputs(&self, id: EdgeId, level: Level) -> Result<(), Blocked> {
        let node = self.nodes.get(&id.node).ok_or(Blocked::Wait)?;
        let mut wait = false;
        for input in &node.identity.inputs {
            match self.edge(*input).map(|e| e.phase.seen(level)) {
                Some(InputState::Ready) => {}
                Some(InputState::Pending) => wait = true,
                Some(InputState::Failed(fault)) => return Err(fault.into()),
                None => return Err(Fault::cancelled().into()),
            }
        }
        if wait { Err(Blocked::Wait) } else { Ok(()) }
    }

    /// For each input, whether its slow keys are final and the store knows none of them.
    fn unknown_inputs(&self, id: EdgeId) -> Vec<bool> {
        let Some(node) = self.nodes.get(&id.node) else { return Vec::new() };
        let unknown = |e: &Edge<Op::Output>| {
            matches!(e.phase.seen(Level::Slow), InputState::Ready) && !e.may_have_consumers()
        };
        node.identity.inputs.iter().map(|i| self.edge(*i).is_some_and(unknown)).collect()
    }

    /// Whether no key of the edge can lead to a stored result, whatever its inputs' contents are.
    fn cannot_hit(&self, id: EdgeId, map: &CacheMap) -> bool {
        let Some(node) = self.nodes.get(&id.node) else { return false };
        if map.ephemeral || node.vertex.id.ignore_cache {
            return true;
        }
        let inputs = node.identity.inputs.iter().enumerate();
        inputs.filter(|(i, _)| !map.inputs.get(*i).is_some_and(|m| m.content)).any(|(_, input)| {
            self.edge(*input).is_some_and(|e| {
                let askable =
                    || e.phase.keys().iter().chain(e.foreign.iter().flatten()).any(Key::askable);
                matches!(e.phase.seen(Level::Slow), InputState::Ready)
                    && (!e.may_have_consumers() || !askable())
            })
        })
    }

    pub(crate) fn candidates(&self, id: EdgeId, map: &CacheMap, contents: bool) -> Candidates {
        self.candidates_with(id, map, contents, |edge| edge.phase.keys())
    }

    /// The same with the keys that `keys` gives for inputs.
    pub(crate) fn candidates_with(
        &self,
        id: EdgeId,
        map: &CacheMap,
        contents: bool,
        keys: impl Fn(&Edge<Op::Output>) -> Vec<Key>,
    ) -> Candidates {
        let Some(node) = self.nodes.get(&id.node) else { return Candidates::default() };
        let content = |i: usize| match node.contents.get(i) {
            Some(Work::Known(digest)) if contents => *digest,
            _ => None,
        };
        let inputs: Vec<InputKeys> = node
            .identity
            .inputs
            .iter()
            .enumerate()
            .map(|(i, input)| InputKeys {
                keys: self.edge(*input).map(&keys).unwrap_or_default(),
                content: content(i),
            })
            .collect();
        Candidates::of(map, node.vertex.id.ignore_cache, id.output, &inputs)
    }

    /// Wants at least this of its inputs. Never less than before, so that nothing under way is
    /// cancelled by a new question.
    fn raise(&mut self, id: EdgeId, level: impl Fn(usize) -> Level) {
        let Some(node) = self.nodes.get(&id.node) else { return };
        let mut wanted: BTreeMap<EdgeId, Option<Level>> = BTreeMap::new();
        for (i, input) in node.identity.inputs.iter().enumerate() {
            let before = self.edge(*input).and_then(|e| e.wants.get(&Waiter::Edge(id)).copied());
            let entry = wanted.entry(*input).or_insert(before);
            *entry = (*entry).max(Some(level(i)));
        }
        for (input, level) in wanted {
            self.want(input, Waiter::Edge(id), level);
        }
    }

    /// Wants nothing of its inputs any more.
    pub(crate) fn release_inputs(&mut self, id: EdgeId) {
        let inputs =
            self.nodes.get(&id.node).map(|n| n.identity.inputs.clone()).unwrap_or_default();
        for input in inputs {
            self.want(input, Waiter::Edge(id), None);
        }
    }
}

/// What consumers can distinguish.
fn progress<O>(phase: &Phase<O>) -> (u8, Option<Level>) {
    match phase {
        Phase::Open(open) => (0, open.settled),
        Phase::Following(open, _) | Phase::Claimed(open) => (1, open.settled),
        Phase::Saving(_) => (2, None),
        Phase::Done(_) => (3, None),
        Phase::Failed(..) => (4, None),
    }
}
