//! Learns in which order the files of an image are first read, from the first minute in which they
//! are, and says so when the image comes again.

use parking_lot::{Mutex, MutexGuard};
use shipway_fault::{Fault, Result};
use shipway_lazyfetch::{Profile, Profiles};
use shipway_oci::Digest;
use std::{
    collections::{BTreeMap, HashMap},
    ops::Range,
    path::Path,
    time::{Duration, Instant},
};

/// How long an image's reads are of interest.
const START: Duration = Duration::from_secs(60);
/// Images whose reads are noted at the same time.
const MAX_RUNS: usize = 64;
/// Blocks that are noted for a first read: the least that the keeper tells apart.
const BLOCKS: u64 = 16;

/// An image that was pulled.
#[derive(Default)]
struct Run {
    /// Its layers: digests of their blobs, by number.
    layers: HashMap<u32, Digest>,
    /// When something of it was read first.
    first: Option<Instant>,
    profile: Profile,
}

/// The orders of images, by manifest.
pub struct Learning {
    profiles: Profiles,
    runs: Mutex<BTreeMap<Digest, Run>>,
}

impl Learning {
    /// Orders that are kept in `directory`.
    pub fn open(directory: &Path) -> Result<Self> {
        let profiles = Profiles::open(directory)
            .map_err(|e| Fault::io(format!("open {}", directory.display()), e))?;
        Ok(Self { profiles, runs: Mutex::default() })
    }

    fn runs(&self) -> MutexGuard<'_, BTreeMap<Digest, Run>> {
        self.runs.lock()
    }

    /// A layer of the image `manifest` is about to be used; which blocks of it were read before, in
    /// order.
    pub fn begin(&self, manifest: Digest, number: u32, layer: Digest) -> Vec<Range<u64>> {
        {
            let mut runs = self.runs();
            if runs.len() < MAX_RUNS || runs.contains_key(&manifest) {
                runs.entry(manifest).or_default().layers.insert(number, layer);
            }
        }
        let known = self.profiles.load(manifest);
        known.map(|profile| profile.of_layer(layer).collect()).unwrap_or_default()
    }

    /// A piece of a layer of `blocks` was read for the first time, from `block` on.
    pub fn touched(&self, number: u32, block: u64, blocks: u64) {
        for run in self.runs().values_mut() {
            let Some(layer) = run.layers.get(&number) else { continue };
            run.first.get_or_insert_with(Instant::now);
            run.profile.touch(*layer, block..(block + BLOCKS).min(blocks));
        }
    }

    /// Keeps what is known of the images whose first minute is over.
    pub fn keep(&self) {
        let mut done = Vec::new();
        self.runs().retain(|manifest, run| {
            let over = run.first.is_some_and(|first| first.elapsed() >= START);
            if over {
                done.push((*manifest, std::mem::take(run)));
            }
            !over
        });
        for (manifest, run) in done {
            match self.profiles.learn(manifest, &run.profile) {
                Ok(()) => tracing::debug!(%manifest, "learned the order of reads"),
                Err(error) => {
                    tracing::warn!(%manifest, %error, "failed to keep the order of reads")
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_order_of_first_reads_is_told_the_next_time() {
        let dir = tempfile::tempdir().unwrap();
        let (manifest, layer, other) =
            (Digest::of("manifest"), Digest::of("layer"), Digest::of("other"));
        let learning = Learning::open(dir.path()).unwrap();
        assert_eq!(learning.begin(manifest, 3, layer), []);
        learning.begin(manifest, 4, other);
        for (number, block) in [(3, 640), (4, 0), (3, 16), (9, 1)] {
            learning.touched(number, block, 650);
        }
        // Nothing is kept before the minute is over.
        learning.keep();
        assert!(Learning::open(dir.path()).unwrap().begin(manifest, 1, layer).is_empty());
        let run = learning.runs().remove(&manifest).unwrap();
        learning.profiles.learn(manifest, &run.profile).unwrap();
        let next = Learning::open(dir.path()).unwrap();
        assert_eq!(next.begin(manifest, 1, layer), [640..650, 16..32]);
        assert_eq!(next.begin(manifest, 2, other).first(), Some(&(0..16)));
        assert_eq!(next.begin(Digest::of("another"), 2, other), []);
    }
}
