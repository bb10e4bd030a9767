//! A layer as the engine sees it: where it is written to, where it comes from and how that went.

use crate::{
    Blob, Hope, LayerStats, Source, Target,
    readahead::{Deltas, Spans, Windows},
};
use parking_lot::{Mutex, MutexGuard};
use std::{
    collections::{HashMap, VecDeque},
    ops::{Range, RangeInclusive},
    sync::Arc,
    time::Duration,
};

pub(crate) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock()
}

/// How long other sources are asked first after one failed; twice as long each time.
const FIRST_PENALTY: Duration = Duration::from_secs(1);
const LONGEST_PENALTY: Duration = Duration::from_secs(300);
/// How long a host is left alone that wants to be: no shorter, and no longer, whatever it says.
const PAUSE: RangeInclusive<Duration> = Duration::from_millis(100)..=Duration::from_secs(600);

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
    /// Whether it is no layer yet, but a blob that somebody waits for.
    pub is_pull: bool,
    sources: Mutex<Vec<Known>>,
    pauses: Arc<Pauses>,
}

/// Hosts that want to be left alone, and until when. One for all layers, for hosts count their
/// clients' requests and not those for a layer.
#[derive(Default)]
pub(crate) struct Pauses(Mutex<HashMap<String, Duration>>);

impl Hope {
    /// How long to wait before what failed is asked for again, `otherwise` if nobody said.
    pub(crate) fn pause(self, otherwise: Duration) -> Duration {
        match self {
            Self::After(pause) => pause.clamp(*PAUSE.start(), *PAUSE.end()),
            Self::Soon | Self::Elsewhere => otherwise,
        }
    }
}

impl Pauses {
    /// When a host may be asked again.
    fn end(&self, host: &str) -> Duration {
        self.0.lock().get(host).copied().unwrap_or_default()
    }

    fn pause(&self, host: &str, now: Duration, pause: Duration) {
        let mut all = self.0.lock();
        all.retain(|_, end| *end > now);
        let end = all.entry(host.to_owned()).or_default();
        *end = (*end).max(now + pause);
    }
}

/// What is to be read ahead.
#[derive(Default)]
pub(crate) struct Ahead {
    /// Blocks in the order of a profile.
    pub learned: VecDeque<Range<u64>>,
    /// Whether some of them are on their way into the queue.
    pub feeding: bool,
    pub deltas: Deltas,
    /// Blocks of the longest chunk that was read lately.
    pub longest: u64,
    pub windows: Windows,
}

/// A source, and how it went.
struct Known {
    source: Arc<dyn Source>,
    failures: u32,
    /// Others are asked first before.
    until: Duration,
}

impl Known {
    fn new(source: Arc<dyn Source>) -> Self {
        Self { source, failures: 0, until: Duration::ZERO }
    }
}

impl Layer {
    pub(crate) fn new(spec: LayerSpec, pauses: Arc<Pauses>) -> Self {
        let LayerSpec { target, sources, spans } = spec;
        Self {
            number: target.number(),
            blob: target.blob(),
            target,
            spans,
            stats: Arc::default(),
            ahead: Mutex::default(),
            is_pull: false,
            sources: Mutex::new(sources.into_iter().map(Known::new).collect()),
            pauses,
        }
    }

    /// Another place to fetch from.
    pub(crate) fn add_source(&self, source: Arc<dyn Source>) {
        locked(&self.sources).push(Known::new(source));
    }

    pub(crate) fn sources(&self) -> usize {
        locked(&self.sources).len()
    }

    /// The source to ask: the first that did not fail lately, and if there is a choice another one
    /// than `avoid`. If all want to be left alone, for how long; `None` if there is none at all.
    pub(crate) fn pick(
        &self,
        avoid: Option<usize>,
        now: Duration,
    ) -> Result<(usize, Arc<dyn Source>), Option<Duration>> {
        let sources = locked(&self.sources);
        let end = |known: &Known| self.pauses.end(known.source.host());
        let open = sources.iter().enumerate().filter(|(_, known)| end(known) <= now);
        let best = open.min_by_key(|(at, known)| {
            let failing = known.until > now;
            (failing, avoid == Some(*at), if failing { known.until } else { Duration::ZERO })
        });
        best.map(|(at, known)| (at, known.source.clone())).ok_or_else(|| {
            let opens = sources.iter().map(end).min();
            opens.map(|time| time.saturating_sub(now))
        })
    }

    /// A source gave what was asked for.
    pub(crate) fn succeeded(&self, source: usize) {
        if let Some(known) = locked(&self.sources).get_mut(source) {
            (known.failures, known.until) = (0, Duration::ZERO);
        }
    }

    /// A source failed: others are asked first for at least `pause`, and the longer the more often
    /// it failed in a row. If its host wants to be left alone, it is, for all layers.
    pub(crate) fn failed(&self, source: usize, now: Duration, hope: Hope, pause: Duration) {
        if let Some(known) = locked(&self.sources).get_mut(source) {
            let penalty = FIRST_PENALTY * 2u32.pow(known.failures.min(10));
            known.failures += 1;
            known.until = known.until.max(now + penalty.min(LONGEST_PENALTY).max(pause));
            if matches!(hope, Hope::After(_)) {
                self.pauses.pause(known.source.host(), now, pause);
            }
        }
    }
}
