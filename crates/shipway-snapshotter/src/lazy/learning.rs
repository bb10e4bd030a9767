//! Learns in which order the files of an image are first read, from the first minute in which they
//! are, and has them fetched in that order when the image comes again. What no run here has taught
//! is looked for beside the image in its registry, where another machine may have put it; and where
//! it is wanted, what was learned here is put there.

use super::{Lazy, spans};
use parking_lot::Mutex;
use shipway_estargz::Landmark;
use shipway_fault::{Fault, Result};
use shipway_layerstore::{Layer, State};
use shipway_lazyfetch::{Profile, Profiles};
use shipway_oci::{Digest, ImageName};
use std::{
    collections::{BTreeMap, HashMap},
    ops::Range,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::sync::Semaphore;

/// Images whose reads are noted at the same time.
const MAX_RUNS: usize = 64;
/// Blocks that are noted for a first read: the least that the keeper tells apart.
const BLOCKS: u64 = 16;
/// How long an order is looked for in a registry.
const LOOK: Duration = Duration::from_secs(10);
/// Orders are put into registries one after another.
static SHARING: Semaphore = Semaphore::const_new(1);

/// An image that was pulled.
struct Run {
    image: ImageName,
    begun: Instant,
    /// Its layers: digests of their blobs, by number.
    layers: HashMap<u32, Digest>,
    /// When something of it was read first.
    first: Option<Instant>,
    profile: Profile,
}

type Runs = BTreeMap<Digest, Run>;

/// An image whose order was learned.
pub struct Learned {
    /// The image, as it was pulled.
    pub image: ImageName,
    /// Its manifest.
    pub manifest: Digest,
    /// What is known now, from all runs.
    pub profile: Profile,
}

/// The orders of images, by manifest.
pub struct Learning {
    profiles: Profiles,
    /// How long an image's reads are of interest; not at all if it is zero.
    time: Duration,
    runs: Mutex<Runs>,
}

impl Learning {
    /// Orders that are kept in `directory`, learned from the first `time` of runs.
    pub fn open(directory: &Path, time: Duration) -> Result<Self> {
        let profiles = Profiles::open(directory)
            .map_err(|e| Fault::io(format!("open {}", directory.display()), e))?;
        Ok(Self { profiles, time, runs: Mutex::default() })
    }

    /// A layer of the image with `manifest` is about to be used: which blocks of it were read
    /// before, in order. `None` if that was told already in this run.
    pub fn begin(
        &self,
        image: &ImageName,
        manifest: Digest,
        number: u32,
        layer: Digest,
    ) -> Option<Vec<Range<u64>>> {
        let mut runs = self.runs.lock();
        Self::start(&mut runs, image, manifest);
        if let Some(run) = runs.get_mut(&manifest)
            && run.layers.insert(number, layer).is_some()
        {
            return None;
        }
        // An order that comes from elsewhere is either there or finds the layer.
        let known = self.profiles.load(manifest);
        Some(known.map(|profile| profile.of_layer(layer).collect()).unwrap_or_default())
    }

    /// An image is about to be used. Whether to look for its order elsewhere: the first time in a
    /// run, if there is none here.
    pub fn should_look(&self, image: &ImageName, manifest: Digest) -> bool {
        Self::start(&mut self.runs.lock(), image, manifest)
            && self.profiles.load(manifest).is_none()
    }

    /// Begins a run, unless there is one or there are too many; whether it did.
    fn start(runs: &mut Runs, image: &ImageName, manifest: Digest) -> bool {
        if runs.contains_key(&manifest) {
            return false;
        }
        if runs.len() >= MAX_RUNS {
            // An image that was pulled and is not run makes room.
            let idle = runs.iter().filter(|(_, run)| run.first.is_none());
            let oldest = idle.min_by_key(|(_, run)| run.begun).map(|(manifest, _)| *manifest);
            if oldest.and_then(|oldest| runs.remove(&oldest)).is_none() {
                return false;
            }
        }
        let run = Run {
            image: image.clone(),
            begun: Instant::now(),
            layers: HashMap::new(),
            first: None,
            profile: Profile::new(),
        };
        runs.insert(manifest, run);
        true
    }

    /// Keeps an order that came from elsewhere; the layers that are used already, and their blocks.
    pub fn adopt(
        &self,
        manifest: Digest,
        profile: &Profile,
    ) -> std::io::Result<Vec<(u32, Vec<Range<u64>>)>> {
        let runs = self.runs.lock();
        self.profiles.store(manifest, profile)?;
        let layers = runs.get(&manifest).into_iter().flat_map(|run| &run.layers);
        Ok(layers.map(|(number, layer)| (*number, profile.of_layer(*layer).collect())).collect())
    }

    /// A piece of a layer of `blocks` was read for the first time, from `block` on.
    pub fn touched(&self, number: u32, block: u64, blocks: u64) {
        if self.time.is_zero() {
            return;
        }
        for run in self.runs.lock().values_mut() {
            let Some(layer) = run.layers.get(&number) else { continue };
            run.first.get_or_insert_with(Instant::now);
            run.profile.touch(*layer, block..(block + BLOCKS).min(blocks));
        }
    }

    /// Keeps what is known of the images whose time is over, and gives it.
    pub fn keep(&self) -> Vec<Learned> {
        self.end(|first| first.elapsed() >= self.time)
    }

    /// Keeps what is known so far, for this process ends.
    pub fn close(&self) {
        self.end(|_| true);
    }

    fn end(&self, is_over: impl Fn(Instant) -> bool) -> Vec<Learned> {
        let mut done = Vec::new();
        self.runs.lock().retain(|manifest, run| {
            let over = run.first.is_some_and(&is_over);
            if over {
                done.push((*manifest, run.image.clone(), std::mem::take(&mut run.profile)));
            }
            !over
        });
        let mut all = Vec::new();
        for (manifest, image, run) in done {
            match self.profiles.learn(manifest, &run) {
                Ok(()) => {
                    tracing::debug!(%manifest, "learned the order of reads");
                    let profile = self.profiles.load(manifest).unwrap_or(run);
                    all.push(Learned { image, manifest, profile });
                }
                Err(error) => {
                    tracing::warn!(%manifest, %error, "failed to keep the order of reads")
                }
            }
        }
        all
    }
}

impl Lazy {
    /// Begins to fetch what will be read first of a layer: as it was the last time, or as whoever
    /// made the layer says, or else what nearly every container reads.
    pub fn ahead(&self, image: &ImageName, manifest: Option<Digest>, layer: &Layer) {
        if layer.state() != State::Lazy {
            return;
        }
        let _runtime = self.runtime.enter();
        let (number, digest) = (layer.number().0, layer.key().blob);
        let learned = match manifest {
            Some(manifest) => match self.learning.begin(image, manifest, number, digest) {
                Some(learned) => learned,
                None => return,
            },
            None => Vec::new(),
        };
        match layer.landmark() {
            _ if !learned.is_empty() => self.fetcher.learned(number, learned),
            Some(Landmark::Prefetch { end }) => self.fetcher.landmark(number, end),
            // Converters set that mark wherever no order was given to them. Of an ordinary layer
            // each file costs a span of mebibytes. Without the manifest this is asked once more,
            // when that is known.
            Some(Landmark::NoPrefetch) | None if manifest.is_some() && !layer.is_plain() => {
                let first = spans::first(layer);
                if !first.is_empty() {
                    self.fetcher.likely(number, first);
                }
            }
            Some(Landmark::NoPrefetch) | None => {}
        }
    }

    /// Looks for the order of an image's reads in its registry, and has it followed.
    pub async fn look_for_order(&self, image: &ImageName, manifest: Digest) {
        if !self.config.lazy.find_profiles || !self.learning.should_look(image, manifest) {
            return;
        }
        let found = tokio::time::timeout(LOOK, self.resolver.order(image, manifest)).await;
        let profile = match found {
            Ok(Ok(Some(profile))) => profile,
            Ok(Ok(None)) | Err(_) => return,
            Ok(Err(fault)) => {
                return tracing::debug!(%image, %fault, "no order of reads was found");
            }
        };
        match self.learning.adopt(manifest, &profile) {
            Ok(layers) => {
                tracing::info!(%image, %manifest, "found the order of reads in the registry");
                for (number, blocks) in layers {
                    self.fetcher.learned(number, blocks);
                }
            }
            Err(error) => tracing::warn!(%image, %error, "failed to keep the order of reads"),
        }
    }

    /// Puts what was learned into the registries that the images came from, if that is wanted.
    pub fn share(self: &Arc<Self>, learned: Vec<Learned>) {
        if !self.config.lazy.push_profiles || learned.is_empty() {
            return;
        }
        let lazy = self.clone();
        shipway_task::spawn_on(&self.runtime, "share orders of reads", async move {
            let Ok(_one) = SHARING.acquire().await else { return };
            for Learned { image, manifest, profile } in learned {
                match lazy.resolver.share_order(&image, manifest, &profile).await {
                    Ok(true) => tracing::info!(%image, %manifest, "shared the order of reads"),
                    Ok(false) => {}
                    Err(fault) => {
                        tracing::warn!(%image, %fault, "failed to share the order of reads")
                    }
                }
            }
        });
    }
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init)]
mod tests {
    use super::*;

    const MINUTE: Duration = Duration::from_secs(60);

    #[test]
    fn the_order_of_first_reads_is_told_the_next_time() {
        let dir = tempfile::tempdir().unwrap();
        let image = "r.example/a:1".parse().unwrap();
        let (manifest, layer, other) =
            (Digest::of("manifest"), Digest::of("layer"), Digest::of("other"));
        let learning = Learning::open(dir.path(), MINUTE).unwrap();
        assert_eq!(learning.begin(&image, manifest, 3, layer), Some(vec![]));
        assert_eq!(learning.begin(&image, manifest, 3, layer), None);
        learning.begin(&image, manifest, 4, other);
        for (number, block) in [(3, 640), (4, 0), (3, 16), (9, 1)] {
            learning.touched(number, block, 650);
        }
        // Nothing is kept before the minute is over, but at the end.
        assert!(learning.keep().is_empty());
        let again = || Learning::open(dir.path(), MINUTE).unwrap();
        assert_eq!(again().begin(&image, manifest, 1, layer), Some(vec![]));
        learning.close();
        let next = again();
        assert_eq!(next.begin(&image, manifest, 1, layer), Some(vec![640..650, 16..32]));
        assert_eq!(next.begin(&image, manifest, 2, other).unwrap().first(), Some(&(0..16)));
        assert_eq!(next.begin(&image, Digest::of("another"), 2, other), Some(vec![]));
        let next = again();
        assert!(!next.should_look(&image, manifest), "it is known");
    }

    #[test]
    fn runs_are_learned_when_their_time_is_over_and_not_where_nobody_wants_it() {
        for (time, learned) in [(Duration::from_nanos(1), 1), (Duration::ZERO, 0)] {
            let dir = tempfile::tempdir().unwrap();
            let image = "r.example/a:1".parse().unwrap();
            let (manifest, layer) = (Digest::of("manifest"), Digest::of("layer"));
            let learning = Learning::open(dir.path(), time).unwrap();
            learning.begin(&image, manifest, 3, layer);
            learning.touched(3, 0, 100);
            let all = learning.keep();
            assert_eq!(all.len(), learned);
            for Learned { manifest: of, profile, .. } in all {
                assert_eq!(
                    (of, profile.of_layer(layer).collect::<Vec<_>>()),
                    (manifest, vec![0..16])
                );
            }
        }
    }

    #[test]
    fn an_order_from_elsewhere_is_for_layers_that_are_there_and_that_come() {
        let dir = tempfile::tempdir().unwrap();
        let image = "r.example/a:1".parse().unwrap();
        let (manifest, first, second) =
            (Digest::of("manifest"), Digest::of("first"), Digest::of("second"));
        let learning = Learning::open(dir.path(), MINUTE).unwrap();
        assert!(learning.should_look(&image, manifest));
        assert!(!learning.should_look(&image, manifest), "once is enough");
        assert_eq!(learning.begin(&image, manifest, 1, first), Some(vec![]));
        let mut profile = Profile::new();
        profile.touch(second, 5..6);
        profile.touch(first, 7..9);
        assert_eq!(learning.adopt(manifest, &profile).unwrap(), [(1, vec![7..9])]);
        assert_eq!(learning.begin(&image, manifest, 2, second), Some(vec![5..6]));
    }

    #[test]
    fn images_that_are_not_run_make_room_for_others() {
        let dir = tempfile::tempdir().unwrap();
        let image = "r.example/a:1".parse().unwrap();
        let learning = Learning::open(dir.path(), MINUTE).unwrap();
        let manifest = |n: u32| Digest::of(n.to_string());
        for n in 0..2 * MAX_RUNS as u32 {
            assert!(learning.should_look(&image, manifest(n)));
            learning.begin(&image, manifest(n), n, Digest::of("layer"));
            if n != 5 {
                learning.touched(n, 0, 1);
            }
            assert_eq!(learning.runs.lock().len(), MAX_RUNS.min(n as usize + 1));
            if n as usize == MAX_RUNS {
                break;
            }
        }
        assert!(!learning.runs.lock().contains_key(&manifest(5)));
        assert!(!learning.should_look(&image, manifest(1000)), "all others are run");
    }
}
