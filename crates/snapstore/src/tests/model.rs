//! Random operations against a plain model, with restarts between them and kills within them.

use super::*;
use crate::{Kind, SNAPSHOT_REF};
use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    time::Duration,
};

/// Operations of one life of a model.
const OPERATIONS: usize = 300;
/// Lives.
const SEEDS: u64 = 12;

struct Random(u64);

impl Random {
    fn next(&mut self, below: u64) -> u64 {
        // SplitMix64.
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % below
    }

    fn name(&mut self) -> String {
        let namespace = ["one", "two"][self.next(2) as usize];
        match self.next(3) {
            0 => format!("{namespace}/{}/{}", self.next(4), chain(self.next(3) as u8)),
            _ => format!("{namespace}/{}/key", self.next(12)),
        }
    }
}

#[derive(Clone, Debug, PartialEq)]
struct Known {
    kind: Kind,
    parent: Option<String>,
    labels: Labels,
    /// What is written in its files.
    files: u64,
}

type Model = BTreeMap<String, Known>;

#[derive(Clone, Debug)]
enum Operation {
    Create { kind: Kind, key: String, parent: Option<String>, labels: Labels },
    Commit { name: String, key: String, reference: Option<String> },
    Remove(String),
    Label(String, String),
    Work,
    Restart,
}

/// Mostly one that can succeed, out of what there is.
fn operation(random: &mut Random, model: &Model) -> Operation {
    fn pick(random: &mut Random, model: &Model, fits: impl Fn(&Known) -> bool) -> String {
        let fit: Vec<&String> = model.iter().filter(|(_, k)| fits(k)).map(|(n, _)| n).collect();
        match fit.len() as u64 {
            n if n > 0 && random.next(8) > 0 => fit[random.next(n) as usize].clone(),
            _ => random.name(),
        }
    }
    let reference = |random: &mut Random| (random.next(3) > 0).then(|| chain(random.next(3) as u8));
    // Of each chain ID the store of layers has the layer, which is the same for some of them.
    let labels = |random: &mut Random| {
        let mut labels = with_reference(&reference(random));
        if random.next(2) == 0 {
            labels.insert("layer".into(), random.next(3).to_string());
        }
        labels
    };
    match random.next(20) {
        0..8 => Operation::Create {
            kind: if random.next(4) == 0 { Kind::View } else { Kind::Active },
            key: random.name(),
            parent: (random.next(3) > 0)
                .then(|| pick(random, model, |k| k.kind == Kind::Committed)),
            labels: labels(random),
        },
        8..14 => Operation::Commit {
            name: random.name(),
            key: pick(random, model, |k| k.kind == Kind::Active),
            reference: reference(random),
        },
        14..17 => Operation::Remove(pick(random, model, |_| true)),
        17 => Operation::Label(pick(random, model, |_| true), format!("{}", random.next(3))),
        18 => Operation::Work,
        _ => Operation::Restart,
    }
}

fn with_reference(reference: &Option<String>) -> Labels {
    reference.iter().map(|r| (SNAPSHOT_REF.to_owned(), r.clone())).collect()
}

/// The chain ID a snapshot is known by.
fn chain_of(name: &str, known: &Known) -> Option<String> {
    let named = name
        .splitn(3, '/')
        .nth(2)
        .filter(|n| known.kind == Kind::Committed && n.starts_with("sha256:"));
    known.labels.get(SNAPSHOT_REF).cloned().or(named.map(str::to_owned))
}

fn alike(model: &Model, one: Option<&String>, other: Option<&String>) -> bool {
    match (one, other) {
        (None, None) => true,
        (Some(a), Some(b)) => {
            let (x, y) = (&model[a], &model[b]);
            let same = x.files == y.files
                || (chain_of(a, x).is_some() && chain_of(a, x) == chain_of(b, y));
            a == b || (same && alike(model, x.parent.as_ref(), y.parent.as_ref()))
        }
        _ => false,
    }
}

/// What the model answers and becomes. A fresh `files` is for what is made now; sharing may give
/// any of several.
fn expect(model: &mut Model, operation: &Operation, files: u64) -> (Option<Code>, BTreeSet<u64>) {
    let mut choices = BTreeSet::new();
    let error = match operation {
        Operation::Create { kind, key, parent, labels } => {
            let bad_parent = parent.as_ref().and_then(|p| match model.get(p).map(|k| k.kind) {
                None => Some(Code::NotFound),
                Some(Kind::Committed) => None,
                Some(_) => Some(Code::InvalidArgument),
            });
            let row =
                |kind, files| Known { kind, parent: parent.clone(), labels: labels.clone(), files };
            let mut error = bad_parent.or(model.contains_key(key).then_some(Code::AlreadyExists));
            if let (None, Kind::Active, Some(chain)) = (error, kind, labels.get(SNAPSHOT_REF)) {
                let mut whole = false;
                for (name, known) in model.iter().filter(|(_, k)| k.kind == Kind::Committed) {
                    if chain_of(name, known).as_ref() == Some(chain)
                        && alike(model, known.parent.as_ref(), parent.as_ref())
                    {
                        choices.insert(known.files);
                        whole |= known.parent == *parent
                            && known.labels.get(SNAPSHOT_REF) == Some(chain);
                    }
                }
                if choices.is_empty()
                    && let Some(layer) = labels.get("layer")
                {
                    choices.insert(LAYER_FILES + layer.parse::<u64>().unwrap());
                }
                if let Some(first) = choices.first().copied() {
                    error = Some(Code::AlreadyExists);
                    if !whole {
                        model.insert(key.clone(), row(Kind::Committed, first));
                    }
                }
            }
            if error.is_none() {
                model.insert(key.clone(), row(*kind, files));
            }
            error
        }
        Operation::Commit { name, key, reference } => match model.get(key).cloned() {
            None => Some(Code::NotFound),
            Some(_) if model.contains_key(name) => Some(Code::AlreadyExists),
            Some(k) if k.kind != Kind::Active => Some(Code::FailedPrecondition),
            Some(k) => {
                model.remove(key);
                model.insert(
                    name.clone(),
                    Known { kind: Kind::Committed, labels: with_reference(reference), ..k },
                );
                None
            }
        },
        Operation::Remove(name) => match model.get(name) {
            None => Some(Code::NotFound),
            Some(_) if model.values().any(|k| k.parent.as_ref() == Some(name)) => {
                Some(Code::FailedPrecondition)
            }
            Some(_) => {
                model.remove(name);
                None
            }
        },
        Operation::Label(name, value) => match model.get_mut(name) {
            None => Some(Code::NotFound),
            Some(known) => {
                known.labels.insert("l".into(), value.clone());
                None
            }
        },
        Operation::Work | Operation::Restart => None,
    };
    (error, choices)
}

fn run(store: &Store, operation: &Operation) -> Result<()> {
    match operation {
        Operation::Create { kind, key, parent, labels } => {
            let parent = parent.as_deref().map(name);
            let make = if *kind == Kind::View { Store::view } else { Store::prepare };
            make(store, &name(key), parent.as_ref(), labels.clone()).map(drop)
        }
        Operation::Commit { name: to, key, reference } => {
            store.commit(&name(to), &name(key), with_reference(reference))
        }
        Operation::Remove(gone) => store.remove(&name(gone)),
        Operation::Label(of, value) => {
            store.update(&name(of), labels(&[("l", value)]), &["labels.l".into()]).map(drop)
        }
        Operation::Work => {
            while store.work_once() {}
            Ok(())
        }
        Operation::Restart => Ok(()),
    }
}

struct Life {
    store: Store,
    layers: Arc<Layers>,
    root: PathBuf,
    model: Model,
    next: u64,
    happened: Happened,
}

/// What the lives went through, so that a test that tests nothing is noticed.
#[derive(Clone, Copy, Debug, Default)]
struct Happened {
    killed: u32,
    /// Kills after which the operation was done, or had never been.
    done: u32,
    undone: u32,
    committed: u32,
    /// New names for files of others, and answers that nothing was needed.
    shared: u32,
    answered: u32,
    removed: u32,
    /// Calls of [`Layers`].
    layers: [u32; 4],
}

impl Life {
    /// Names, kinds, parents and labels, as the store tells them. That a layer is not unpacked is
    /// told by a label, which is looked at here.
    fn told(&self) -> BTreeMap<String, (Kind, Option<String>, Labels)> {
        let mut all = BTreeMap::new();
        for mut info in list(&self.store, &[]) {
            let lazy = info.labels.remove("containerd.io/snapshot/remote").is_some();
            assert_eq!(lazy, self.store.place(&info.name).is_err(), "{info:?}");
            let parent = info.parent.map(String::from);
            all.insert(info.name.as_str().to_owned(), (info.kind, parent, info.labels));
        }
        all
    }

    fn written(&self, of: &str) -> u64 {
        match self.store.place(&name(of)) {
            Ok(directory) => std::fs::read_to_string(directory.join("files"))
                .ok()
                .and_then(|t| t.parse().ok())
                .unwrap_or(0),
            Err(layer) => LAYER_FILES + layer.0,
        }
    }

    fn open(root: &Path, layers: &Arc<Layers>) -> Store {
        let options = Options { keep_mounted: Duration::ZERO, ..Options::default() };
        open_with(root, options, layers.clone())
    }

    fn restart(self) -> Self {
        drop(self.store);
        Self { store: Self::open(&self.root, &self.layers), ..self }
    }

    /// Files that the snapshots below have, the parent's first. A layer counts where it is first.
    fn below(&self, known: &Known) -> Vec<u64> {
        let mut below = Vec::new();
        let mut next = known.parent.as_ref();
        while let Some(parent) = next {
            let files = self.model[parent].files;
            if files < LAYER_FILES || !below.contains(&files) {
                below.push(files);
            }
            next = self.model[parent].parent.as_ref();
        }
        below
    }

    /// Layers are held once if there are snapshots of them, and mounted if they are needed.
    fn check_layers(&self, exactly: bool) {
        let layer = |files: u64| files.checked_sub(LAYER_FILES).map(LayerId);
        let held = self.model.values().filter_map(|k| layer(k.files)).map(|l| (l, 1)).collect();
        assert_eq!(self.layers.holds(), held);
        let needed: BTreeSet<LayerId> = (self.model.values())
            .filter(|k| k.kind != Kind::Committed)
            .flat_map(|k| self.below(k))
            .filter_map(layer)
            .collect();
        let mounted = self.layers.mounted();
        assert!(mounted.is_superset(&needed), "{mounted:?} of {needed:?}");
        assert!(!exactly || mounted == needed, "{mounted:?} and not {needed:?}");
    }

    fn check(&self) {
        let want: BTreeMap<_, _> = self
            .model
            .iter()
            .map(|(n, k)| (n.clone(), (k.kind, k.parent.clone(), k.labels.clone())))
            .collect();
        assert_eq!(self.told(), want);
        let directories: BTreeSet<_> = std::fs::read_dir(self.root.join("snapshots"))
            .unwrap()
            .map(|e| e.unwrap().path().join("fs"))
            .collect();
        let places: BTreeSet<u64> =
            self.model.values().map(|k| k.files).filter(|f| *f < LAYER_FILES).collect();
        assert_eq!(directories.len(), places.len(), "a directory for each place and no other");
        self.check_layers(false);
        for (name_, known) in &self.model {
            if known.kind != Kind::View {
                assert_eq!(self.written(name_), known.files, "{name_}");
            }
            if known.kind == Kind::Committed {
                let usage = self.store.usage(&name(name_)).unwrap();
                assert!(usage != Usage::default());
            } else {
                // Each mounts what the model says is below it, in order.
                let mounts = self.store.mounts(&name(name_)).unwrap();
                let below = self.below(known);
                let single = (known.kind == Kind::View && below.len() == 1)
                    .then(|| mounts[0].source.as_str());
                let lowers = option(&mounts, "lowerdir").or(single).unwrap_or("");
                let seen: Vec<u64> = lowers
                    .split(':')
                    .filter(|l| !l.is_empty())
                    .map(|l| {
                        std::fs::read_to_string(Path::new(l).join("files"))
                            .unwrap()
                            .parse()
                            .unwrap()
                    })
                    .collect();
                assert_eq!(seen, below, "{name_}");
            }
        }
    }

    /// Takes over which of several equal files a new name got, and marks the files of what was
    /// made.
    fn settle(&mut self, operation: &Operation, choices: &BTreeSet<u64>, fresh: u64) {
        let Operation::Create { key, .. } = operation else { return };
        let Some(known) = self.model.get(key).cloned() else { return };
        if known.kind == Kind::Committed && choices.contains(&known.files) {
            let got = self.written(key);
            assert!(choices.contains(&got), "{got} is none of {choices:?}");
            if let Some(known) = self.model.get_mut(key) {
                known.files = got;
            }
        } else if known.files == fresh && known.kind == Kind::Active {
            let own = self.store.place(&name(key)).unwrap();
            std::fs::write(own.join("files"), fresh.to_string()).unwrap();
        }
    }

    fn turn(mut self, operation: &Operation, kill: Option<u32>) -> Self {
        self.next += 1;
        let fresh = self.next;
        let before = self.model.clone();
        let mut after = self.model.clone();
        let (code, choices) = expect(&mut after, operation, fresh);
        if let Some(steps) = kill {
            self.store.kill.after(steps);
        }
        let outcome = catch_unwind(AssertUnwindSafe(|| run(&self.store, operation)));
        self.store.kill.after(0);
        match outcome {
            Ok(result) => {
                assert_eq!(result.err().map(|e| e.code()), code);
                match (operation, code) {
                    (Operation::Commit { .. }, None) => self.happened.committed += 1,
                    (Operation::Remove(_), None) => self.happened.removed += 1,
                    (Operation::Create { .. }, Some(Code::AlreadyExists))
                        if after.len() > before.len() =>
                    {
                        self.happened.shared += 1
                    }
                    (Operation::Create { .. }, Some(Code::AlreadyExists))
                        if !choices.is_empty() =>
                    {
                        self.happened.answered += 1
                    }
                    _ => {}
                }
                self.model = after;
            }
            Err(payload) => {
                if !payload.is::<Killed>() {
                    std::panic::resume_unwind(payload);
                }
                self = self.restart();
                // All of it or nothing.
                let told = self.told();
                let is = |model: &Model| {
                    told.len() == model.len()
                        && told.iter().all(|(n, (kind, parent, labels))| {
                            model.get(n).is_some_and(|k| {
                                (&k.kind, &k.parent, &k.labels) == (kind, parent, labels)
                            })
                        })
                };
                self.happened.killed += 1;
                // What is alike before and after counts as neither.
                match (is(&before), is(&after)) {
                    (true, false) => self.happened.undone += 1,
                    (false, true) => self.happened.done += 1,
                    _ => {}
                }
                self.model = if is(&before) { before } else { after };
            }
        }
        self.settle(operation, &choices, fresh);
        if matches!(operation, Operation::Restart) {
            self = self.restart();
        }
        self
    }
}

#[test]
fn random_operations_restarts_and_kills_do_what_the_model_says() {
    let mut happened = Happened::default();
    for seed in 0..SEEDS {
        // In memory where there is such a directory: what is asked is order, and every flush costs.
        let memory = Path::new("/dev/shm");
        let dir = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() }
            .unwrap();
        let root = dir.path().join("root");
        let layers = Layers::new(&dir.path().join("layers"));
        let store = Life::open(&root, &layers);
        let mut life = Life { store, layers, root, model: Model::new(), next: 0, happened };
        let mut random = Random(seed);
        for turn in 0..OPERATIONS {
            let operation = operation(&mut random, &life.model);
            let kill = (random.next(4) == 0).then(|| random.next(3) as u32 + 1);
            eprintln!("seed {seed} turn {turn}: {operation:?} kill {kill:?}");
            life = life.turn(&operation, kill);
            life.check_layers(matches!(operation, Operation::Work) && kill.is_none());
            life.check();
        }
        // Nothing is left when everything was removed.
        while !life.model.is_empty() {
            for gone in life.model.keys().cloned().collect::<Vec<_>>() {
                life = life.turn(&Operation::Remove(gone), None);
            }
        }
        life.store.cleanup().unwrap();
        assert_eq!((life.layers.holds().len(), life.layers.mounted().len()), (0, 0));
        for (sum, more) in happened.layers.iter_mut().zip(life.layers.calls()) {
            *sum += more;
        }
        for what in ["snapshots", "trash"] {
            assert_eq!(std::fs::read_dir(life.root.join(what)).unwrap().count(), 0, "{what}");
        }
        happened = Happened { layers: happened.layers, ..life.happened };
    }
    let Happened { killed, done, undone, committed, shared, answered, removed, layers } = happened;
    eprintln!("{happened:?}");
    let counts = [killed, done, undone, committed, shared, answered, removed];
    assert!(counts.iter().chain(&layers).all(|n| *n >= 5), "{happened:?}");
}
