//! A layer as the engine sees it: where it is written to, where it comes from and how that went.

use crate::{
    Blob, LayerStats, Source, Target,
    readahead::{Deltas, Spans},
};
use std::{
    collections::VecDeque,
    ops::Range,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

pub(crate) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A layer to fetch.
pub struct LayerSpec {
    /// Where it is written to.
    pub target: Arc<dyn Target>,
    /// Where it comes from, in the order to ask.
    pub sources: Vec<Arc<dyn Source>>,
    /// Neighbors in the same directory, for reading ahead.
    pub spans: Option<Spans>,
}

pub(crate) struct Layer {
    pub number: u32,
    pub target: Arc<dyn Target>,
    pub blob: Blob,
    pub spans: Option<Spans>,
    pub stats: Arc<LayerStats>,
    pub ahead: Mutex<Ahead>,
    sources: Mutex<Vec<Known>>,
}

/// What is to be read ahead.
#[derive(Default)]
pub(crate) struct Ahead {
    /// Blocks in the order of a profile.
    pub learned: VecDeque<Range<u64>>,
    /// Whether some of them are on their way into the queue.
    pub feeding: bool,
    /// Whether there is, or was, a profile: then nothing is guessed.
    pub known: bool,
    pub deltas: Deltas,
}

/// A source, and how it went.
struct Known {
    source: Arc<dyn Source>,
    failures: u32,
    /// Better not asked before.
    until: Duration,
}

impl Layer {
    pub(crate) fn new(spec: LayerSpec) -> Self {
        let LayerSpec { target, sources, spans } = spec;
        let known = |source| Known { source, failures: 0, until: Duration::ZERO };
        Self {
            number: target.number(),
            blob: target.blob(),
            target,
            spans,
            stats: Arc::default(),
            ahead: Mutex::default(),
            sources: Mutex::new(sources.into_iter().map(known).collect()),
        }
    }

    /// Another place to fetch from.
    pub(crate) fn add_source(&self, source: Arc<dyn Source>) {
        locked(&self.sources).push(Known { source, failures: 0, until: Duration::ZERO });
    }

    pub(crate) fn sources(&self) -> usize {
        locked(&self.sources).len()
    }

    /// The source to ask: the first that did not fail lately, and if there is a choice another one
    /// than `avoid`.
    pub(crate) fn pick(
        &self,
        avoid: Option<usize>,
        now: Duration,
    ) -> Option<(usize, Arc<dyn Source>)> {
        let sources = locked(&self.sources);
        let best = sources.iter().enumerate().min_by_key(|(at, known)| {
            let failing = known.until > now;
            (failing, avoid == Some(*at), if failing { known.until } else { Duration::ZERO })
        });
        best.map(|(at, known)| (at, known.source.clone()))
    }

    /// A source gave what was asked for.
    pub(crate) fn succeeded(&self, source: usize) {
        if let Some(known) = locked(&self.sources).get_mut(source) {
            (known.failures, known.until) = (0, Duration::ZERO);
        }
    }

    /// A source failed, and is better not asked before `until`.
    pub(crate) fn failed(&self, source: usize, until: Duration) {
        if let Some(known) = locked(&self.sources).get_mut(source) {
            known.failures += 1;
            known.until = known.until.max(until);
        }
    }
}
