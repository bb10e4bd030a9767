//! The store as a whole: containerd's behaviors, and random operations against a plain model.

mod conformance;
mod model;
mod sharing;

use crate::{Filters, Info, LazyLayers, Mount, Name, NoLazyLayers, Options, Store};
use std::{
    path::Path,
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

pub(crate) fn labels(pairs: &[(&str, &str)]) -> crate::Labels {
    pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
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
pub(crate) fn option<'a>(mounts: &'a [Mount], key: &str) -> Option<&'a str> {
    assert_eq!(mounts.len(), 1);
    mounts[0].options.iter().find_map(|o| o.strip_prefix(key)?.strip_prefix('='))
}

/// Where what is written into an active snapshot goes.
pub(crate) fn upper(mounts: &[Mount]) -> &str {
    option(mounts, "upperdir").unwrap_or(&mounts[0].source)
}
