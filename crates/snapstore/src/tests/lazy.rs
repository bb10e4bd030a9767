//! Layers that need not be unpacked.

use super::*;
use crate::{Kind, SNAPSHOT_REF, Xino, mounts::Point};
use std::time::{Duration, Instant};

const REMOTE: &str = "containerd.io/snapshot/remote";

struct Lab {
    dir: tempfile::TempDir,
    layers: Arc<Layers>,
    store: Store,
}

fn lab(options: Options) -> Lab {
    let dir = tempfile::tempdir().unwrap();
    let layers = Layers::new(&dir.path().join("layers"));
    let store = open_with(&dir.path().join("root"), options, layers.clone());
    Lab { dir, layers, store }
}

/// Nothing stays mounted that is not needed.
fn at_once() -> Options {
    Options { keep_mounted: Duration::ZERO, ..Options::default() }
}

fn wanted(chain_: u8, layer: &str) -> Labels {
    labels(&[(SNAPSHOT_REF, &chain(chain_)), ("layer", layer)])
}

impl Lab {
    /// Asks for a layer, as an unpacker does: the name of its snapshot.
    fn ask(&self, key: &str, parent: Option<&Name>, chain_: u8, layer: u64) -> Name {
        let labels = wanted(chain_, &layer.to_string());
        let error = self.store.prepare(&name(key), parent, labels).unwrap_err();
        assert_eq!(error.code(), Code::AlreadyExists, "{error}");
        let parent = parent.map_or("", Name::as_str);
        let filter = format!("labels.\"{SNAPSHOT_REF}\"=={},parent==\"{parent}\"", chain(chain_));
        let committed = |info: &Info| info.kind == Kind::Committed;
        list(&self.store, &[&filter]).into_iter().find(committed).unwrap().name
    }

    fn work(&self) {
        while self.store.work_once() {}
    }

    fn lowers(&self, mounts: &[Mount]) -> Vec<PathBuf> {
        option(mounts, "lowerdir").unwrap().split(':').map(PathBuf::from).collect()
    }

    fn restart(self) -> Self {
        drop(self.store);
        let store = open_with(&self.dir.path().join("root"), at_once(), self.layers.clone());
        Self { store, ..self }
    }
}

fn ids(layers: &[u64]) -> BTreeSet<LayerId> {
    layers.iter().copied().map(LayerId).collect()
}

#[test]
fn a_layer_that_need_not_be_unpacked_is_a_committed_snapshot_at_once() {
    let lab = lab(at_once());
    let store = &lab.store;
    let base = lab.ask("one/1/x", None, 1, 5);
    let info = store.stat(&base).unwrap();
    assert_eq!((info.kind, base.as_str()), (Kind::Committed, "one/1/x"));
    assert!(info.labels.contains_key(REMOTE));
    assert_eq!(store.usage(&base).unwrap(), Usage { bytes: 4096, inodes: 6 });
    // To know it is not to mount it.
    assert_eq!(lab.layers.mounted(), ids(&[]));
    // Ordinary ones stand on it as on any other.
    let mounts =
        store.prepare(&name("one/2/y"), Some(&base), labels(&[(SNAPSHOT_REF, &chain(2))])).unwrap();
    assert_eq!(lab.lowers(&mounts), [lab.layers.at(5)]);
    let view = store.view(&name("v"), Some(&base), Labels::new()).unwrap();
    assert_eq!(
        (view[0].kind, view[0].source.as_str()),
        ("bind", lab.layers.at(5).to_str().unwrap())
    );
    assert_eq!(view[0].options, ["ro", "rbind"]);
    // Another namespace gets the same.
    assert_eq!(lab.ask("two/1/x", None, 1, 5), base);
    assert_eq!(names(store, &["kind==committed"]).len(), 1);
    let totals = store.totals();
    assert_eq!((totals.places, totals.layers, totals.mounted, totals.uncounted), (1, 1, 1, 0));
    assert_eq!(totals.usage, Usage { bytes: 4096, inodes: 6 });
    for gone in ["v", "one/2/y"] {
        assert_eq!(lab.layers.mounted(), ids(&[5]));
        store.remove(&name(gone)).unwrap();
        lab.work();
    }
    assert_eq!((lab.layers.mounted(), lab.layers.holds().len()), (ids(&[]), 1));
    store.remove(&base).unwrap();
    // Found once, mounted by whoever needs it, released once.
    let [finds, releases, _, unmounts] = lab.layers.calls();
    assert_eq!((finds, releases, unmounts, lab.layers.holds().len()), (1, 1, 1, 0));
}

#[test]
fn a_layer_is_asked_for_with_what_is_below_it() {
    let lab = lab(at_once());
    let base = lab.ask("one/1/x", None, 1, 5);
    let above = lab.ask("one/2/y", Some(&base), 2, 6);
    lab.ask("one/3/z", Some(&above), 3, 7);
    // One that containerd unpacked, by its name, and one that is no layer.
    for committed in [&*chain(4), "other"] {
        let committed = name(&format!("one/4/{committed}"));
        lab.store.prepare(&name("one/4/work"), None, Labels::new()).unwrap();
        lab.store.commit(&committed, &name("one/4/work"), Labels::new()).unwrap();
        lab.ask(&format!("{committed}-above"), Some(&committed), 5, 8);
    }
    let known = |n| Below::Chain(chain(n).parse().unwrap());
    let want = [Below::Nothing, known(1), known(2), known(4), Below::Unknown];
    assert_eq!(lab.layers.below(), want);
}

#[test]
fn overlays_mix_both_and_have_numbers_as_on_one_file_system() {
    for (xino, mount_options, expected) in [
        (Xino::On, None, "xino=on"),
        (Xino::Off, None, "xino=off"),
        (Xino::Auto, None, "xino=auto"),
        (Xino::On, Some("xino=off"), "xino=off"),
    ] {
        let mount_options: Vec<_> = mount_options.into_iter().map(str::to_owned).collect();
        let configured = mount_options.len();
        let lab = lab(Options { xino, mount_options, ..Options::default() });
        let base = lab.ask("n/1/x", None, 1, 1);
        lab.store.prepare(&name("n/2/y"), Some(&base), Labels::new()).unwrap();
        let middle = name("n/3/y");
        lab.store.commit(&middle, &name("n/2/y"), Labels::new()).unwrap();
        let top = lab.ask("n/4/z", Some(&middle), 3, 2);
        let mounts = lab.store.prepare(&name("n/5/a"), Some(&top), Labels::new()).unwrap();
        let own = lab.store.place(&middle).unwrap();
        assert_eq!(lab.lowers(&mounts), [lab.layers.at(2), own, lab.layers.at(1)]);
        let said: Vec<_> = mounts[0].options.iter().filter(|o| o.starts_with("xino")).collect();
        assert_eq!(said, [expected]);
        // Overlays of ordinary layers stay as they are.
        lab.store.prepare(&name("n/6/b"), None, Labels::new()).unwrap();
        lab.store.commit(&name("n/7/b"), &name("n/6/b"), Labels::new()).unwrap();
        let mounts =
            lab.store.prepare(&name("n/8/c"), Some(&name("n/7/b")), Labels::new()).unwrap();
        let said = mounts[0].options.iter().filter(|o| o.starts_with("xino")).count();
        assert_eq!(said, configured);
    }
}

/// The layer of an empty tar, as many images have several times.
#[test]
fn a_layer_that_is_there_twice_is_mounted_once_and_is_where_it_is_first() {
    let lab = lab(at_once());
    let one = lab.ask("n/1/a", None, 1, 7);
    let two = lab.ask("n/2/b", Some(&one), 2, 8);
    let three = lab.ask("n/3/c", Some(&two), 3, 7);
    let four = lab.ask("n/4/d", Some(&three), 4, 7);
    let mounts = lab.store.prepare(&name("n/5/e"), Some(&four), Labels::new()).unwrap();
    assert_eq!(lab.lowers(&mounts), [lab.layers.at(7), lab.layers.at(8)]);
    let holds: Vec<_> = lab.layers.holds().into_values().collect();
    assert_eq!(holds, [1, 1]);
    // A chain of nothing else is one directory.
    let other = lab.ask("n/6/f", Some(&one), 5, 7);
    let view = lab.store.view(&name("n/7/v"), Some(&other), Labels::new()).unwrap();
    assert_eq!(view[0].source, lab.layers.at(7).to_str().unwrap());
}

#[test]
fn what_is_not_needed_is_unmounted_after_a_while_and_mounted_again_on_demand() {
    let lab = lab(Options::default());
    let base = lab.ask("n/1/x", None, 1, 1);
    lab.store.prepare(&name("n/2/a"), Some(&base), Labels::new()).unwrap();
    lab.store.remove(&name("n/2/a")).unwrap();
    lab.work();
    assert_eq!(lab.layers.mounted(), ids(&[1]), "a minute has not passed");
    // With the last name it goes at once.
    lab.store.remove(&base).unwrap();
    assert_eq!((lab.layers.mounted(), lab.layers.holds().len()), (ids(&[]), 0));

    let lab = lab.restart();
    let base = lab.ask("n/1/x", None, 1, 1);
    for _ in 0..3 {
        lab.store.view(&name("n/2/v"), Some(&base), Labels::new()).unwrap();
        lab.work();
        assert_eq!(lab.layers.mounted(), ids(&[1]));
        lab.store.remove(&name("n/2/v")).unwrap();
        lab.work();
        assert_eq!(lab.layers.mounted(), ids(&[]));
    }
    // A Prepare that fails after it was mounted leaves it to the worker as well.
    lab.store.prepare(&name("n/3/a"), Some(&base), Labels::new()).unwrap();
    lab.store.remove(&name("n/3/a")).unwrap();
    lab.work();
    lab.store.kill.after(2);
    let died = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        lab.store.prepare(&name("n/4/a"), Some(&base), Labels::new())
    }));
    assert!(died.is_err());
    lab.work();
    assert_eq!(lab.layers.mounted(), ids(&[]));
}

#[test]
fn the_worker_unmounts_when_the_time_has_come() {
    let keep_mounted = Duration::from_millis(1);
    let lab = lab(Options { keep_mounted, ..Options::default() });
    let base = lab.ask("n/1/x", None, 1, 1);
    std::thread::scope(|scope| {
        scope.spawn(|| lab.store.work());
        for _ in 0..3 {
            lab.store.prepare(&name("n/2/a"), Some(&base), Labels::new()).unwrap();
            assert_eq!(lab.layers.mounted(), ids(&[1]));
            lab.store.remove(&name("n/2/a")).unwrap();
            let deadline = Instant::now() + Duration::from_secs(60);
            while lab.layers.mounted() != ids(&[]) {
                assert!(Instant::now() < deadline, "it stays mounted");
                std::thread::yield_now();
            }
        }
        lab.store.close();
    });
}

#[test]
fn a_commit_needs_what_is_below_no_longer() {
    let lab = lab(at_once());
    let base = lab.ask("n/1/x", None, 1, 1);
    lab.store.prepare(&name("n/2/a"), Some(&base), Labels::new()).unwrap();
    lab.work();
    assert_eq!(lab.layers.mounted(), ids(&[1]));
    lab.store.commit(&name("n/3/c"), &name("n/2/a"), Labels::new()).unwrap();
    lab.work();
    assert_eq!(lab.layers.mounted(), ids(&[]));
}

#[test]
fn a_restart_mounts_what_is_needed_before_anybody_asks() {
    let lab = lab(at_once());
    let one = lab.ask("n/1/a", None, 1, 1);
    let two = lab.ask("n/2/b", Some(&one), 2, 2);
    let three = lab.ask("n/3/c", None, 3, 3);
    // Names in an order in which children come before their parents.
    lab.store.prepare(&name("a/active"), Some(&two), Labels::new()).unwrap();
    lab.store.view(&name("z/view"), Some(&three), Labels::new()).unwrap();
    lab.store.remove(&name("z/view")).unwrap();
    // The machine has started anew: nothing is mounted.
    for layer in [1, 2] {
        lab.layers.unmount(LayerId(layer)).unwrap();
    }
    let lab = lab.restart();
    assert_eq!(lab.layers.mounted(), ids(&[1, 2, 3]), "the last one is still there");
    lab.work();
    assert_eq!(lab.layers.mounted(), ids(&[1, 2]));
    assert_eq!(lab.store.totals().mounted, 2);
    // What cannot be mounted does not keep the rest from being served.
    lab.layers.lose(1);
    let lab = lab.restart();
    assert_eq!(lab.store.mounts(&name("a/active")).unwrap_err().code(), Code::DataLoss);
    lab.store.prepare(&name("b/active"), Some(&three), Labels::new()).unwrap();
    // And nobody gets it who asks for its chain.
    lab.store.prepare(&name("m/1/a"), None, labels(&[(SNAPSHOT_REF, &chain(1))])).unwrap();
    // Until it is found anew.
    lab.layers.lose_nothing();
    assert_eq!(lab.ask("m/2/a", None, 1, 1), one);
    lab.store.mounts(&name("a/active")).unwrap();
    assert_eq!(lab.layers.holds(), [1, 2, 3].map(|layer| (LayerId(layer), 1)).into());
}

#[test]
fn who_asks_for_one_chain_at_the_same_time_gets_one_snapshot() {
    let lab = lab(at_once());
    let ask = |key: &str, labels: Labels| lab.store.prepare(&name(key), None, labels);
    lab.layers.hold_up(true);
    let answers: Vec<_> = std::thread::scope(|scope| {
        let asking: Vec<_> = (0..6)
            .map(|n| scope.spawn(move || ask(&format!("n{n}/1/x"), wanted(1, "4")).unwrap_err()))
            .collect();
        while lab.store.waiting(&chain(1)) < 5 {
            std::thread::yield_now();
        }
        // Nobody else waits meanwhile, writers included.
        lab.store.prepare(&name("other"), None, Labels::new()).unwrap();
        lab.store.commit(&name("done"), &name("other"), Labels::new()).unwrap();
        lab.store.remove(&name("done")).unwrap();
        lab.layers.hold_up(false);
        asking.into_iter().map(|a| a.join().unwrap().code()).collect()
    });
    assert!(answers.iter().all(|code| *code == Code::AlreadyExists), "{answers:?}");
    assert_eq!(names(&lab.store, &[]).len(), 1);
    assert_eq!((lab.layers.calls()[0], lab.layers.holds()), (1, [(LayerId(4), 1)].into()));
    // That a layer has to be unpacked is found out once as well, but for those with other labels.
    lab.layers.hold_up(true);
    let mut refused = wanted(2, "4");
    refused.insert("refused".into(), "yes".into());
    std::thread::scope(|scope| {
        let same: Vec<_> = (0..4)
            .map(|n| {
                let labels = refused.clone();
                scope.spawn(move || ask(&format!("m{n}/1/x"), labels).map(drop))
            })
            .collect();
        while lab.store.waiting(&chain(2)) < 3 {
            std::thread::yield_now();
        }
        let other = scope.spawn(|| ask("other/1/x", wanted(2, "4")).unwrap_err().code());
        while lab.store.waiting(&chain(2)) < 4 {
            std::thread::yield_now();
        }
        lab.layers.hold_up(false);
        same.into_iter().for_each(|asked| asked.join().unwrap().unwrap());
        assert_eq!(other.join().unwrap(), Code::AlreadyExists);
    });
    assert_eq!((lab.layers.calls()[0], lab.layers.holds()), (3, [(LayerId(4), 1)].into()));
}

/// Between the moment when a Prepare sees what is below and the mount, the last snapshot of the
/// layer may go.
#[test]
fn a_layer_that_was_given_back_is_not_mounted() {
    let lab = lab(at_once());
    let base = lab.ask("n/1/x", None, 1, 1);
    let points = || vec![Point::Layer(LayerId(1))];
    drop(lab.store.hold(points()).unwrap());
    lab.store.remove(&base).unwrap();
    let error = lab.store.hold(points()).map(drop).unwrap_err();
    assert_eq!((error.code(), lab.layers.calls()[2]), (Code::NotFound, 1));
    assert_eq!((lab.layers.holds().len(), lab.layers.mounted()), (0, ids(&[])));
}

/// Finding and removing one layer at the same time, again and again: whoever has a snapshot of it
/// holds it.
#[test]
fn a_layer_that_is_found_and_removed_at_once_is_held_by_who_has_it() {
    let lab = lab(at_once());
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let lab = &lab;
            scope.spawn(move || {
                for turn in 0..60 {
                    let key = name(&format!("n{thread}/{turn}/x"));
                    let error = lab.store.prepare(&key, None, wanted(1, "1")).unwrap_err();
                    assert_eq!(error.code(), Code::AlreadyExists);
                    // It may be another's, and gone by now.
                    let active = name(&format!("n{thread}/{turn}/a"));
                    if lab.store.prepare(&active, Some(&key), Labels::new()).is_ok() {
                        let mounts = lab.store.mounts(&active).unwrap();
                        let files = lab.lowers(&mounts)[0].join("files");
                        assert_eq!(std::fs::read_to_string(files).unwrap(), "1000001");
                        lab.store.remove(&active).unwrap();
                    }
                    let _ = lab.store.remove(&key);
                    if thread == 0 {
                        lab.work();
                    }
                }
            });
        }
    });
    let left = names(&lab.store, &[]);
    left.iter().for_each(|n| lab.store.remove(&name(n)).unwrap());
    lab.work();
    assert_eq!((lab.layers.holds().len(), lab.layers.mounted()), (0, ids(&[])));
}

/// Only of what an unpacker asked for and got no layer for, by the labels that it asked with.
#[test]
fn what_had_to_be_unpacked_is_reported() {
    let lab = lab(at_once());
    let store = &lab.store;
    let mut refused = wanted(1, "4");
    refused.insert("refused".into(), "yes".into());
    store.prepare(&name("one/1/x"), None, refused).unwrap();
    assert_eq!(lab.layers.unpacked(), []);
    // An unpacker that says less at the end.
    store.commit(&name("one/2/base"), &name("one/1/x"), Labels::new()).unwrap();
    assert_eq!(lab.layers.unpacked(), [("one".to_owned(), "4".to_owned())]);
    store.commit(&name("one/3/again"), &name("one/1/x"), Labels::new()).unwrap_err();
    store.prepare(&name("one/4/container"), Some(&name("one/2/base")), Labels::new()).unwrap();
    store.commit(&name("one/5/image"), &name("one/4/container"), wanted(2, "5")).unwrap();
    lab.ask("two/1/x", None, 3, 6);
    assert_eq!(lab.layers.unpacked(), []);
}
