//! One chain ID under several names.

use super::*;
use crate::{Kind, SNAPSHOT_REF, Sharing};

struct Unpacker<'a> {
    store: &'a Store,
    namespace: &'a str,
    number: u32,
    /// Whether Commit repeats the label, as the unpackers of containerd 1.6's CRI and of later
    /// versions do.
    labeled: bool,
}

impl<'a> Unpacker<'a> {
    fn new(store: &'a Store, namespace: &'a str) -> Self {
        Self { store, namespace, number: 0, labeled: true }
    }

    fn key(&mut self, key: &str) -> Name {
        self.number += 1;
        name(&format!("{}/{}/{key}", self.namespace, self.number))
    }

    fn ask(&mut self, chain: &str, parent: Option<&Name>) -> (Name, Result<Vec<Mount>>) {
        let key = self.key(&format!("extract-1 {chain}"));
        let answer = self.store.prepare(&key, parent, labels(&[(SNAPSHOT_REF, chain)]));
        (key, answer)
    }

    /// What containerd does to have a layer: the name it enters for it, and whether anything was
    /// unpacked.
    fn layer(&mut self, chain: &str, parent: Option<&Name>) -> (Name, bool) {
        let (key, answer) = self.ask(chain, parent);
        match answer {
            Ok(mounts) => {
                std::fs::write(
                    Path::new(upper(&mounts)).join("by"),
                    format!("{} {chain}", self.namespace),
                )
                .unwrap();
                let name = self.key(chain);
                let own =
                    if self.labeled { labels(&[(SNAPSHOT_REF, chain)]) } else { Labels::new() };
                self.store.commit(&name, &key, own).unwrap();
                (name, true)
            }
            Err(error) => {
                assert_eq!(error.code(), Code::AlreadyExists, "{error}");
                let filter = format!(
                    "labels.\"{SNAPSHOT_REF}\"=={chain},parent==\"{}\"",
                    parent.map_or("", Name::as_str)
                );
                let found =
                    list(self.store, &[&filter]).into_iter().find(|i| i.kind == Kind::Committed);
                (found.expect("a committed snapshot with that label and parent").name, false)
            }
        }
    }

    fn image(&mut self, chains: &[String]) -> Vec<(Name, bool)> {
        let mut parent = None;
        chains
            .iter()
            .map(|chain| {
                let layer = self.layer(chain, parent.as_ref());
                parent = Some(layer.0.clone());
                layer
            })
            .collect()
    }
}

fn store() -> (tempfile::TempDir, Store) {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir.path().join("root"));
    (dir, store)
}

fn directories(dir: &tempfile::TempDir) -> usize {
    std::fs::read_dir(dir.path().join("root/snapshots")).unwrap().count()
}

#[test]
fn another_namespace_gets_the_same_snapshots_with_nothing_written() {
    let (dir, store) = store();
    let chains = [chain(1), chain(2), chain(3)];
    let first = Unpacker::new(&store, "build").image(&chains);
    let second = Unpacker::new(&store, "k8s.io").image(&chains);
    for ((a, unpacked), (b, again)) in first.iter().zip(&second) {
        assert!(*unpacked && !again && a == b);
    }
    assert_eq!((names(&store, &[]).len(), directories(&dir)), (3, 3));
    assert_eq!(store.totals().places, 3);
}

#[test]
fn a_layer_on_an_equal_base_of_another_name_becomes_a_name_of_the_same_files() {
    let (dir, store) = store();
    let mut build = Unpacker::new(&store, "build");
    let mut other = Unpacker::new(&store, "default");
    // Both unpack the base at the same time.
    let (key_a, a) = build.ask(&chain(1), None);
    let (key_b, b) = other.ask(&chain(1), None);
    a.unwrap();
    b.unwrap();
    let (base_a, base_b) = (build.key(&chain(1)), other.key(&chain(1)));
    for (to, key) in [(&base_a, &key_a), (&base_b, &key_b)] {
        store.commit(to, key, labels(&[(SNAPSHOT_REF, &chain(1))])).unwrap();
    }
    let (top_a, _) = build.layer(&chain(2), Some(&base_a));
    let (top_b, unpacked) = other.layer(&chain(2), Some(&base_b));
    assert!(!unpacked && top_a != top_b);
    assert_eq!(store.stat(&top_b).unwrap().parent, Some(base_b.clone()));
    assert_eq!((names(&store, &[]).len(), directories(&dir)), (4, 3));
    // The next one on top of the alias is found through both names.
    let (above_b, _) = other.layer(&chain(3), Some(&top_b));
    let (above_a, unpacked) = build.layer(&chain(3), Some(&top_a));
    assert!(!unpacked && above_a != above_b);
    // The same files are seen, and each has their size; the disk is counted once.
    while store.work_once() {}
    let lowers = |top: &Name, key: &str| {
        let mounts = store.view(&name(key), Some(top), Labels::new()).unwrap();
        option(&mounts, "lowerdir").unwrap().split(':').map(str::to_owned).collect::<Vec<_>>()
    };
    let (seen_a, seen_b) = (lowers(&above_a, "va"), lowers(&above_b, "vb"));
    assert_eq!(seen_a[..2], seen_b[..2]);
    assert_ne!(seen_a[2], seen_b[2]);
    assert_eq!(store.usage(&top_a).unwrap(), store.usage(&top_b).unwrap());
    let places = [&above_a, &top_a, &base_a, &base_b].map(|n| store.usage(n).unwrap().bytes);
    assert_eq!((store.totals().places, store.totals().usage.bytes), (4, places.iter().sum()));
    // Whoever removes its names harms nobody, in whatever order.
    for gone in ["va", above_a.as_str(), top_a.as_str(), base_a.as_str()] {
        store.remove(&name(gone)).unwrap();
    }
    store.cleanup().unwrap();
    assert_eq!(
        store.mounts(&name("vb")).unwrap()[0].options[0],
        format!("lowerdir={}", seen_b.join(":"))
    );
    assert_eq!(
        std::fs::read_to_string(Path::new(&seen_b[1]).join("by")).unwrap(),
        format!("build {}", chain(2))
    );
    for gone in ["vb", above_b.as_str(), top_b.as_str(), base_b.as_str()] {
        store.remove(&name(gone)).unwrap();
    }
    assert_eq!(directories(&dir), 0);
}

#[test]
fn a_snapshot_that_has_its_chain_id_only_in_its_name_is_found_too() {
    let (dir, store) = store();
    let chains = [chain(1), chain(2)];
    let mut build = Unpacker::new(&store, "build");
    build.labeled = false;
    let first = build.image(&chains);
    let second = Unpacker::new(&store, "default").image(&chains);
    assert!(first.iter().zip(&second).all(|((a, _), (b, unpacked))| a != b && !unpacked));
    let third = Unpacker::new(&store, "k8s.io").image(&chains);
    assert_eq!(second, third);
    assert_eq!((names(&store, &[]).len(), directories(&dir)), (4, 2));
    let survives = open_again(store, &dir);
    for (name, _) in first.iter().rev() {
        survives.remove(name).unwrap();
    }
    assert_eq!(directories(&dir), 2);
}

fn open_again(store: Store, dir: &tempfile::TempDir) -> Store {
    drop(store);
    open(&dir.path().join("root"))
}

#[test]
fn other_chains_are_not_taken_for_the_same() {
    let (_dir, store) = store();
    let mut one = Unpacker::new(&store, "one");
    let (base, _) = one.layer(&chain(1), None);
    let (other_base, _) = one.layer(&chain(9), None);
    one.layer(&chain(2), Some(&base));
    let mut two = Unpacker::new(&store, "two");
    // The same chain ID on another base is a lie of somebody's; who asks gets what it unpacks
    // itself.
    for parent in [Some(&other_base), None] {
        assert!(two.ask(&chain(2), parent).1.is_ok());
    }
    // One that is still being unpacked is no answer, nor one that only looks like it.
    two.ask(&chain(5), None).1.unwrap();
    assert!(two.ask(&chain(5), None).1.is_ok());
    let odd = two.key("not-a-chain");
    store.prepare(&name("x"), None, Labels::new()).unwrap();
    store.commit(&odd, &name("x"), Labels::new()).unwrap();
    assert!(two.ask("not-a-chain", None).1.is_ok());
}

#[test]
fn the_usual_errors_come_before_any_sharing() {
    let (_dir, store) = store();
    let mut one = Unpacker::new(&store, "one");
    let (base, _) = one.layer(&chain(1), None);
    assert_eq!(one.ask(&chain(1), Some(&name("nothing"))).1.unwrap_err().code(), Code::NotFound);
    let active = one.ask(&chain(2), Some(&base)).0;
    assert_eq!(one.ask(&chain(1), Some(&active)).1.unwrap_err().code(), Code::InvalidArgument);
    let taken = store.prepare(&active, None, labels(&[(SNAPSHOT_REF, &chain(1))])).unwrap_err();
    assert!(taken.to_string().contains(active.as_str()), "{taken}");
}

#[test]
fn isolated_namespaces_get_their_own_only() {
    let dir = tempfile::tempdir().unwrap();
    let options = Options { sharing: Sharing::Isolated, ..Options::default() };
    let store = open_with(&dir.path().join("root"), options, Arc::new(NoLazyLayers));
    let mut one = Unpacker::new(&store, "one");
    one.layer(&chain(1), None);
    assert!(one.ask(&chain(1), None).1.is_err());
    assert!(Unpacker::new(&store, "two").ask(&chain(1), None).1.is_ok());
}

#[test]
fn a_snapshot_whose_files_are_lost_is_offered_to_nobody() {
    let (dir, store) = store();
    Unpacker::new(&store, "one").layer(&chain(1), None);
    std::fs::remove_dir_all(dir.path().join("root/snapshots/1")).unwrap();
    let (again, unpacked) = Unpacker::new(&store, "two").layer(&chain(1), None);
    assert!(unpacked);
    // Nor is it among those that whoever asks next has to choose from.
    assert_eq!(Unpacker::new(&store, "three").layer(&chain(1), None), (again, false));
    assert_eq!(names(&store, &[]).len(), 2);
}
