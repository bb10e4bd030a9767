//! How cache keys are made: from an operation's keys and, for each input, its key or a checksum of
//! its content.

use crate::{CacheKey, CacheMap};
use shipway_oci::{Digest, Hasher};

/// How many keys of one edge its consumers see.
const PUBLISHED: usize = 4;
/// How many candidates one edge has of each strength.
const CANDIDATES: usize = 48;

/// A key with what is known about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Key {
    pub(crate) key: CacheKey,
    /// Means something beyond this build's session (row `so.key.random`): worth storing under.
    pub(crate) durable: bool,
    /// Comes from work that ignored the cache in this run: what is stored under it is older than
    /// the work and must not be used.
    pub(crate) fresh: bool,
}

impl Key {
    /// A key that the store knows.
    pub(crate) fn stored(key: CacheKey) -> Self {
        Self { key, durable: true, fresh: false }
    }

    /// Whether asking the store makes sense.
    pub(crate) fn askable(&self) -> bool {
        self.durable && !self.fresh
    }
}

/// What is known of one input when candidates are made.
pub(crate) struct InputKeys {
    /// The input's keys as it publishes them.
    pub(crate) keys: Vec<Key>,
    /// Checksum of what is read of it, where it was computed.
    pub(crate) content: Option<Digest>,
}

/// The keys an edge can be known by.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Candidates {
    /// With content wherever there is content: the value follows from these, so they decide where
    /// it is stored.
    pub(crate) strong: Vec<Key>,
    /// By definition alone. Only set where it differs from `strong`. They lead to the latest result
    /// of the same definition.
    pub(crate) weak: Vec<Key>,
}

impl Candidates {
    /// Of `output` of a vertex with `map`, whose identity says `ignore_cache`.
    pub(crate) fn of(
        map: &CacheMap,
        ignore_cache: bool,
        output: usize,
        inputs: &[InputKeys],
    ) -> Self {
        let combine = |content: bool| -> Vec<Key> {
            let choices: Vec<Vec<(Part, Trust)>> =
                inputs.iter().map(|i| i.choices(content)).collect();
            let mut found: Vec<Key> = Vec::new();
            for parts in products(&choices, CANDIDATES.div_ceil(map.keys.len().max(1))) {
                for op in &map.keys {
                    let key = Key {
                        key: hash(op, output, map, &parts),
                        durable: !map.ephemeral && parts.iter().all(|(_, t)| t.durable),
                        fresh: ignore_cache || parts.iter().any(|(_, t)| t.fresh),
                    };
                    if !found.iter().any(|f| f.key == key.key) {
                        found.push(key);
                    }
                }
            }
            found
        };
        let strong = combine(true);
        let weak =
            if inputs.iter().any(|i| i.content.is_some()) { combine(false) } else { Vec::new() };
        Self { strong, weak }
    }

    /// All of them, strong ones first.
    pub(crate) fn all(&self) -> impl Iterator<Item = &Key> {
        self.strong.iter().chain(&self.weak)
    }

    /// What consumers see of an edge that the store does not know: durable ones first, a few.
    pub(crate) fn published(&self) -> Vec<Key> {
        let mut keys: Vec<Key> = self.all().copied().collect();
        keys.sort_by_key(|k| !k.durable);
        keys.truncate(PUBLISHED);
        keys
    }
}

#[derive(Clone, Copy)]
enum Part {
    Key(CacheKey),
    Content(Digest),
}

#[derive(Clone, Copy)]
struct Trust {
    durable: bool,
    fresh: bool,
}

impl InputKeys {
    fn choices(&self, content: bool) -> Vec<(Part, Trust)> {
        match self.content {
            Some(digest) if content => {
                vec![(Part::Content(digest), Trust { durable: true, fresh: false })]
            }
            _ => self
                .keys
                .iter()
                .map(|k| (Part::Key(k.key), Trust { durable: k.durable, fresh: k.fresh }))
                .collect(),
        }
    }
}

/// At most `limit` ways to choose one of each; first choices come first.
fn products<T: Copy>(choices: &[Vec<T>], limit: usize) -> Vec<Vec<T>> {
    let mut rows: Vec<Vec<T>> = vec![Vec::new()];
    for options in choices {
        let mut next = Vec::new();
        for option in options {
            for row in &rows {
                if next.len() < limit.max(1) {
                    next.push(row.iter().copied().chain([*option]).collect());
                }
            }
        }
        rows = next;
    }
    rows
}

fn hash(op: &Digest, output: usize, map: &CacheMap, parts: &[(Part, Trust)]) -> CacheKey {
    let mut h = Hasher::new();
    h.update(b"shipway cache key 1\0");
    h.update(op.as_bytes());
    h.update((output as u64).to_le_bytes());
    h.update((parts.len() as u64).to_le_bytes());
    for (i, (part, _)) in parts.iter().enumerate() {
        match part {
            Part::Key(key) => {
                h.update([0]);
                h.update(key.0.as_bytes());
            }
            Part::Content(digest) => {
                h.update([1]);
                h.update(digest.as_bytes());
            }
        }
        match map.inputs.get(i).and_then(|m| m.selector) {
            Some(selector) => {
                h.update([1]);
                h.update(selector.as_bytes());
            }
            None => h.update([0]),
        }
    }
    CacheKey(h.finish())
}
