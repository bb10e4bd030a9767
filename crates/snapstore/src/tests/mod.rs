//! The store as a whole: containerd's behaviors, and random operations against a plain model.

mod conformance;
mod kernel;
mod lazy;
mod model;
mod sharing;

use crate::{
    Below, Filters, Info, Labels, LayerId, LazyLayers, Mount, Name, NoLazyLayers, Options,
    Restored, Store, Usage,
};
use parking_lot::{Mutex, MutexGuard};
use shipway_fault::{Code, Fault, Result};
use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
};

/// Ends the world at the n-th step from now, by a panic that only the test catches.
#[derive(Default)]
pub(crate) struct Kill(AtomicU32);

pub(crate) struct Killed;

impl Kill {
    /// At the `n`-th step from now, from 1.
    pub(crate) fn after(&self, n: u32) {
        self.0.store(n, Ordering::Relaxed);
    }

    pub(crate) fn step(&self) {
        let left = self.0.load(Ordering::Relaxed);
        if left > 0 {
            self.0.store(left - 1, Ordering::Relaxed);
            if left == 1 {
                std::panic::resume_unwind(Box::new(Killed));
            }
        }
    }
}

pub(crate) fn name(text: &str) -> Name {
    Name::new(text).unwrap()
}

pub(crate) fn labels(pairs: &[(&str, &str)]) -> Labels {
    pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
}

/// A chain ID; not a true one, but it looks like one.
pub(crate) fn chain(n: u8) -> String {
    format!("sha256:{}", format!("{n:02x}").repeat(32))
}

pub(crate) fn open(root: &Path) -> Store {
    open_with(root, Options::default(), Arc::new(NoLazyLayers))
}

pub(crate) fn open_with(root: &Path, options: Options, layers: Arc<dyn LazyLayers>) -> Store {
    Store::open(root, options, layers).unwrap()
}

pub(crate) fn list(store: &Store, filters: &[&str]) -> Vec<Info> {
    let filters: Vec<String> = filters.iter().map(|f| (*f).to_owned()).collect();
    store.list(&Filters::parse(&filters).unwrap())
}

pub(crate) fn names(store: &Store, filters: &[&str]) -> Vec<String> {
    list(store, filters).iter().map(|i| i.name.as_str().to_owned()).collect()
}

/// The value of an option of the only mount.
#[track_caller]
pub(crate) fn option<'a>(mounts: &'a [Mount], key: &str) -> Option<&'a str> {
    assert_eq!(mounts.len(), 1);
    mounts[0].options.iter().find_map(|o| o.strip_prefix(key)?.strip_prefix('='))
}

/// Where what is written into an active snapshot goes.
pub(crate) fn upper(mounts: &[Mount]) -> &str {
    option(mounts, "upperdir").unwrap_or(&mounts[0].source)
}

/// A store of layers that keeps its promises and watches that its user does. It outlives stores,
/// as what is mounted does.
///
/// The label `layer` names a layer by its number. What is mounted is a directory `l/<n>`, which is
/// elsewhere while it is not, with the number in a file `files`.
pub(crate) struct Layers {
    root: PathBuf,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    holds: BTreeMap<LayerId, u32>,
    mounted: BTreeSet<LayerId>,
    lost: BTreeSet<LayerId>,
    /// Whether finds wait.
    held_up: bool,
    finds: u32,
    releases: u32,
    mounts: u32,
    unmounts: u32,
    /// What was below the layers that were asked for.
    below: Vec<Below>,
    /// Namespaces and layers of what was committed.
    unpacked: Vec<(String, String)>,
}

/// What is in the file of a layer.
pub(crate) const LAYER_FILES: u64 = 1_000_000;

impl Layers {
    pub(crate) fn new(root: &Path) -> Arc<Self> {
        for what in ["l", "kept"] {
            std::fs::create_dir_all(root.join(what)).unwrap();
        }
        Arc::new(Self { root: root.canonicalize().unwrap(), state: Mutex::default() })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }

    pub(crate) fn at(&self, layer: u64) -> PathBuf {
        self.root.join("l").join(layer.to_string())
    }

    fn kept(&self, layer: LayerId) -> PathBuf {
        self.root.join("kept").join(layer.0.to_string())
    }

    pub(crate) fn holds(&self) -> BTreeMap<LayerId, u32> {
        self.state().holds.clone()
    }

    pub(crate) fn mounted(&self) -> BTreeSet<LayerId> {
        self.state().mounted.clone()
    }

    /// Calls so far: find, release, mount, unmount.
    pub(crate) fn calls(&self) -> [u32; 4] {
        let state = self.state();
        [state.finds, state.releases, state.mounts, state.unmounts]
    }

    /// From now on nothing is known of a layer.
    pub(crate) fn lose(&self, layer: u64) {
        self.state().lost.insert(LayerId(layer));
    }

    pub(crate) fn lose_nothing(&self) {
        self.state().lost.clear();
    }

    /// What was below the layers that were asked for since the last call.
    pub(crate) fn below(&self) -> Vec<Below> {
        std::mem::take(&mut self.state().below)
    }

    /// What was unpacked since the last call: namespaces and layers.
    pub(crate) fn unpacked(&self) -> Vec<(String, String)> {
        std::mem::take(&mut self.state().unpacked)
    }

    /// Makes every find wait, or lets those go on that do.
    pub(crate) fn hold_up(&self, held_up: bool) {
        self.state().held_up = held_up;
    }
}

impl LazyLayers for Layers {
    fn restore(&self, layers: &BTreeSet<LayerId>) -> Restored {
        let mut state = self.state();
        state.holds = layers.iter().map(|layer| (*layer, 1)).collect();
        for other in state.mounted.difference(layers).copied().collect::<Vec<_>>() {
            std::fs::rename(self.at(other.0), self.kept(other)).unwrap();
            state.mounted.remove(&other);
        }
        let lost = state.lost.intersection(layers).copied().collect();
        Restored { mounted: state.mounted.clone(), lost }
    }

    fn find(&self, _: &str, labels: &Labels, below: Below) -> Option<LayerId> {
        let layer = LayerId(labels.get("layer")?.parse().ok()?);
        let mut state = self.state();
        state.finds += 1;
        state.below.push(below);
        while state.held_up {
            drop(state);
            std::thread::yield_now();
            state = self.state();
        }
        if labels.contains_key("refused") {
            return None;
        }
        *state.holds.entry(layer).or_default() += 1;
        if !state.mounted.contains(&layer) {
            std::fs::create_dir_all(self.kept(layer)).unwrap();
            let number = (LAYER_FILES + layer.0).to_string();
            std::fs::write(self.kept(layer).join("files"), number).unwrap();
        }
        Some(layer)
    }

    fn unpacked(&self, namespace: &str, labels: &Labels) {
        let layer = labels.get("layer").cloned().unwrap_or_default();
        self.state().unpacked.push((namespace.to_owned(), layer));
    }

    fn mount(&self, layer: LayerId) -> Result<PathBuf> {
        let mut state = self.state();
        if state.lost.contains(&layer) {
            return Err(Fault::new(Code::DataLoss, "a layer is lost"));
        }
        assert!(state.holds.contains_key(&layer), "{layer:?} is mounted, and nobody holds it");
        state.mounts += 1;
        if state.mounted.insert(layer) {
            std::fs::rename(self.kept(layer), self.at(layer.0)).unwrap();
        }
        Ok(self.at(layer.0))
    }

    fn unmount(&self, layer: LayerId) -> Result<()> {
        let mut state = self.state();
        assert!(state.holds.contains_key(&layer), "{layer:?} is unmounted, and nobody holds it");
        assert!(state.mounted.remove(&layer), "{layer:?} is unmounted twice");
        state.unmounts += 1;
        std::fs::rename(self.at(layer.0), self.kept(layer)).unwrap();
        Ok(())
    }

    fn usage(&self, layer: LayerId) -> Result<Usage> {
        assert!(self.state().holds.contains_key(&layer));
        Ok(Usage { bytes: 4096, inodes: 1 + layer.0 })
    }

    fn release(&self, layer: LayerId) {
        let mut state = self.state();
        let holds = state.holds.get_mut(&layer).expect("released, and nobody holds it");
        *holds -= 1;
        state.releases += 1;
        if state.holds[&layer] == 0 {
            state.holds.remove(&layer);
            assert!(!state.mounted.contains(&layer), "{layer:?} is released and mounted");
        }
    }
}
