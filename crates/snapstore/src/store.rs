//! The operations.

use crate::{
    Below, Filters, LayerId, LazyLayers, Restored,
    db::{Change, Db},
    disk::{Disk, owner_of},
    index::Index,
    mapped::Clones,
    model::{
        Backing, DirectoryId, Info, Kind, Labels, Mount, Name, Row, SNAPSHOT_REF, Time, Usage,
        checked, lock, mapped_ids,
    },
    mounts::{Held, Mounts, Point, Tree},
};
use parking_lot::{Condvar, Mutex, RwLock};
use serde::Deserialize;
use shipway_fault::{Code, Context as _, Fault, Result};
use shipway_layermount::MappedIds;
use std::{
    collections::{BTreeSet, HashMap, HashSet, VecDeque},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

/// The label that says of a committed snapshot that its layer is not unpacked.
const REMOTE: &str = "containerd.io/snapshot/remote";

/// Whose snapshots a namespace may get when it asks for a chain ID.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Sharing {
    /// Those of every namespace, as with containerd's own content of the policy `shared`.
    #[default]
    Shared,
    /// Its own.
    Isolated,
}

/// Whether files of an overlay have the numbers and the device that they have on one file system
/// (the overlay's option `xino`). Matters where a layer is a file system of its own: without it,
/// files of different layers are on different devices, and change theirs when they are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Xino {
    /// Yes. Numbers of inodes are beyond 2³², which 32-bit programs without large files refuse.
    #[default]
    On,
    /// No.
    Off,
    /// If no number becomes larger by it.
    Auto,
}

impl Xino {
    fn option(self) -> &'static str {
        match self {
            Self::On => "xino=on",
            Self::Off => "xino=off",
            Self::Auto => "xino=auto",
        }
    }
}

/// How a store behaves.
#[derive(Clone, Debug)]
pub struct Options {
    /// Whose snapshots a namespace may get.
    pub sharing: Sharing,
    /// Options of every overlay mount besides those that it needs, for example `volatile`.
    pub mount_options: Vec<String>,
    /// Numbers of files in overlays of layers that were not unpacked.
    pub xino: Xino,
    /// Whether ids of user namespaces are mapped here, which containerd has to be told by the
    /// capability `remap-ids`. Otherwise it does it itself, by copying.
    pub remap_ids: bool,
    /// How long something stays mounted that no snapshot needs any more.
    pub keep_mounted: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            sharing: Sharing::default(),
            mount_options: Vec::new(),
            xino: Xino::default(),
            remap_ids: false,
            keep_mounted: Duration::from_secs(60),
        }
    }
}

/// How much there is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Active snapshots.
    pub active: u64,
    /// Views.
    pub views: u64,
    /// Names of committed snapshots.
    pub committed: u64,
    /// Directories and layers that committed snapshots have their files in.
    pub places: u64,
    /// How many of those are layers that were not unpacked.
    pub layers: u64,
    /// Layers and clones that are mounted.
    pub mounted: u64,
    /// What these take, as far as it was counted.
    pub usage: Usage,
    /// How many of them were not counted yet.
    pub uncounted: u64,
}

/// Snapshots below one root directory. All calls may block on the disk, but for [`Store::stat`] and
/// [`Store::list`].
pub struct Store {
    disk: Disk,
    options: Options,
    /// What the kernel and the configuration add to overlays.
    overlay_options: Vec<String>,
    layers: Arc<dyn LazyLayers>,
    db: Db,
    index: RwLock<Index>,
    /// The next number of a directory. Who holds it is the only writer, and reads an index that
    /// nobody changes.
    next: Mutex<DirectoryId>,
    jobs: Mutex<Jobs>,
    wake: Condvar,
    mounts: Mounts,
    clones: Clones,
    /// Layers of snapshots of which nothing is known any more.
    lost: Mutex<BTreeSet<LayerId>>,
    /// Chain IDs for which somebody asks the store of layers just now.
    asking: Mutex<HashMap<String, Arc<Asking>>>,
    #[cfg(test)]
    pub(crate) kill: crate::tests::Kill,
}

/// What is done later.
#[derive(Default)]
struct Jobs {
    count: VecDeque<DirectoryId>,
    trash: bool,
    /// When something may be unmounted.
    unmount: Option<Instant>,
    closed: bool,
}

/// Somebody asks the store of layers for a chain ID.
struct Asking {
    labels: Labels,
    /// What came of it, when it has ended.
    ended: Mutex<Option<Answer>>,
    wake: Condvar,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Answer {
    /// It has to be unpacked.
    Unpack,
    /// There may be a snapshot of it now, or it was not found out.
    LookAgain,
}

impl Store {
    /// Opens what is below `root`, or makes it, and brings directories and database together.
    pub fn open(root: &Path, options: Options, layers: Arc<dyn LazyLayers>) -> Result<Self> {
        let disk = Disk::open(root)?;
        let (db, content) = Db::open(&disk.database())?;
        if content.new && !disk.is_empty()? {
            let _ = std::fs::remove_file(disk.database());
            let root = root.display();
            return Err(Fault::new(Code::FailedPrecondition, format!("{root} has directories of snapshots and no database"))
                .hint("put the file db.redb back, or remove the directory `snapshots`: without it nobody knows what they are"));
        }
        let mut index = Index::new(options.remap_ids);
        let mut jobs = Jobs { trash: true, unmount: Some(Instant::now()), ..Jobs::default() };
        // What others stand on comes first.
        let (committed, others): (Vec<_>, Vec<_>) =
            content.rows.into_iter().partition(|(_, row)| row.kind == Kind::Committed);
        for (name, row) in committed.into_iter().chain(others) {
            if let (Kind::Committed, Backing::Directory(id), None) =
                (row.kind, row.backing, row.usage)
            {
                jobs.count.push_back(id);
            }
            index.insert(name, row);
        }
        let thrown =
            disk.discard_unknown(|id| !index.names_of(Backing::Directory(id)).is_empty())?;
        if thrown > 0 {
            tracing::info!(
                directories = thrown,
                "what an interrupted operation left goes to the trash"
            );
        }
        // Never a number that is taken, even if the database is an old backup.
        let taken = index.places().filter_map(|place| match place {
            Backing::Directory(id) => Some(id.0 + 1),
            Backing::Layer(_) => None,
        });
        let next = DirectoryId(taken.max().unwrap_or(1).max(content.next.0));
        let of_snapshots = index.places().filter_map(|place| match place {
            Backing::Directory(_) => None,
            Backing::Layer(layer) => Some(layer),
        });
        let Restored { mounted, lost } = layers.restore(&of_snapshots.collect());
        let store = Self {
            overlay_options: overlay_options(&options.mount_options),
            clones: Clones::open(disk.mapped())?,
            disk,
            options,
            layers,
            db,
            index: RwLock::new(index),
            next: Mutex::new(next),
            jobs: Mutex::new(jobs),
            wake: Condvar::new(),
            mounts: Mounts::default(),
            lost: Mutex::new(lost),
            asking: Mutex::default(),
            #[cfg(test)]
            kill: crate::tests::Kill::default(),
        };
        mounted.into_iter().for_each(|layer| store.mounts.found(&Point::Layer(layer)));
        store.mount_wanted();
        Ok(store)
    }

    /// Mounts what snapshots need. What cannot be mounted is an error on use.
    fn mount_wanted(&self) {
        for point in self.read(|index| index.wanted().cloned().collect::<Vec<_>>()) {
            let points = match &point {
                Point::Mapped(_, Tree::Layer(layer)) => vec![Point::Layer(*layer), point],
                _ => vec![point],
            };
            if let Err(error) = self.hold(points) {
                tracing::error!(%error, "the files of a snapshot are not there");
            }
        }
    }

    fn read<T>(&self, look: impl FnOnce(&Index) -> T) -> T {
        look(&self.index.read())
    }

    /// Applies to the index what is on the disk.
    fn apply(&self, change: impl FnOnce(&mut Index)) {
        change(&mut self.index.write());
    }

    /// A point at which tests end the world.
    fn step(&self) {
        #[cfg(test)]
        self.kill.step();
    }

    /// What is known of a snapshot.
    pub fn stat(&self, name: &Name) -> Result<Info> {
        self.read(|index| index.get(name).map(|row| row.info(name)))
    }

    /// The snapshots that pass, in the order of their names.
    pub fn list(&self, filters: &Filters) -> Vec<Info> {
        self.read(|index| match filters.chains() {
            Some(chains) => {
                let mut found: Vec<_> = chains
                    .iter()
                    .flat_map(|c| index.with_chain(c))
                    .filter(|(name, row)| filters.matches(name, row))
                    // Who asks for a chain ID wants to stand on it, and takes the first.
                    .filter(|(_, row)| self.is_whole(row.backing))
                    .collect();
                found.sort_by_key(|(name, _)| *name);
                found.dedup_by_key(|(name, _)| *name);
                found.into_iter().map(|(name, row)| row.info(name)).collect()
            }
            None => index
                .rows()
                .iter()
                .filter(|(name, row)| filters.matches(name, row))
                .map(|(name, row)| row.info(name))
                .collect(),
        })
    }

    /// Replaces all labels, or with field paths those that they name: `labels`, or `labels.<key>`
    /// of one that is set or, where `labels` has none, removed. Nothing else can be changed.
    pub fn update(&self, name: &Name, labels: Labels, paths: &[String]) -> Result<Info> {
        let _writer = lock(&self.next);
        let mut row = self.read(|index| index.get(name).map(|row| Row::clone(row)))?;
        if paths.is_empty() {
            row.labels = labels;
        } else {
            for path in paths {
                match path.strip_prefix("labels.") {
                    Some(key) => {
                        row.labels
                            .insert(key.to_owned(), labels.get(key).cloned().unwrap_or_default());
                    }
                    None if path == "labels" => row.labels = labels.clone(),
                    None => {
                        return Err(Fault::invalid(format!(
                            "cannot update {path:?} field on snapshot {name}"
                        )));
                    }
                }
            }
        }
        row.labels = checked(row.labels)?;
        row.updated = Time::now();
        self.db.write(&Change { put: Some((name, &row)), ..Change::default() })?;
        self.step();
        let info = row.info(name);
        let points = self.read(|index| index.get(name).map(|before| index.points(before)))?;
        self.apply(|index| index.replace(name, row));
        // Of ids that were mapped and are not any more.
        self.unneeded(&points);
        Ok(info)
    }

    /// What a snapshot takes on the disk without its parents. That of an active one is counted now,
    /// that of a view is nothing.
    pub fn usage(&self, name: &Name) -> Result<Usage> {
        let row = self.read(|index| index.get(name).cloned())?;
        match (row.kind, row.backing, row.usage) {
            (Kind::View, ..) => Ok(Usage::default()),
            (_, Backing::Layer(layer), _) => self.layers.usage(layer),
            (Kind::Committed, _, Some(usage)) => Ok(usage),
            (_, Backing::Directory(id), _) => self.disk.usage(id),
        }
        .context(|| format!("usage of snapshot {name}"))
    }

    /// The mounts of an active snapshot or a view. What they need is mounted.
    pub fn mounts(&self, key: &Name) -> Result<Vec<Mount>> {
        let (row, below, points) = self.read(|index| -> Result<_> {
            let row = index.get(key)?.clone();
            if row.kind == Kind::Committed {
                return Err(Fault::new(
                    Code::FailedPrecondition,
                    format!("snapshot {key} is neither active nor a view"),
                ));
            }
            let below = index
                .below(&row)
                .map(|r| r.map(|(_, row)| row.backing))
                .collect::<Result<Vec<_>>>()?;
            let points = index.points(&row);
            Ok((row, below, points))
        })?;
        self.hold(points)
            .and_then(|held| self.mounts_of(&row, &below, &held))
            .context(|| format!("mounts of snapshot {key}"))
    }

    /// The directory of a snapshot's own files, or the layer that they are.
    #[cfg(test)]
    pub(crate) fn place(&self, name: &Name) -> std::result::Result<PathBuf, LayerId> {
        match self.read(|index| index.get(name).unwrap().backing) {
            Backing::Directory(id) => Ok(self.disk.files(id)),
            Backing::Layer(layer) => Err(layer),
        }
    }

    /// Mounts what is not mounted of these, and keeps them mounted.
    pub(crate) fn hold(&self, points: Vec<Point>) -> Result<Vec<Held<'_>>> {
        if !points.is_empty() {
            // Whatever comes of it.
            self.look_later();
        }
        let mut held: Vec<Held<'_>> = Vec::with_capacity(points.len());
        for point in points {
            let made = match point.clone() {
                Point::Layer(layer) => self.mounts.hold(point, || {
                    // Whoever removes its last name from here on waits before it is given back.
                    if self.read(|index| index.names_of(Backing::Layer(layer)).is_empty()) {
                        return Err(Fault::not_found("its parent was removed just now"));
                    }
                    self.step();
                    self.layers.mount(layer)
                }),
                Point::Mapped(ids, tree) => {
                    let from = match tree {
                        Tree::Snapshots => self.disk.snapshots(),
                        Tree::Layer(layer) => path_of(&held, &Point::Layer(layer))?.to_owned(),
                    };
                    self.mounts.hold(point, || self.clones.mount(&ids, tree, &from))
                }
            };
            held.push(made?);
        }
        Ok(held)
    }

    fn unmount(&self, point: &Point) -> Result<()> {
        self.step();
        match point {
            Point::Layer(layer) => self.layers.unmount(*layer),
            Point::Mapped(ids, tree) => self.clones.unmount(ids, *tree),
        }
    }

    /// The ids that are mapped for a snapshot with these labels.
    fn mapped_ids(&self, labels: &Labels) -> Result<Option<Arc<MappedIds>>> {
        if self.options.remap_ids { mapped_ids(labels) } else { Ok(None) }
    }

    /// The files of a place as a snapshot sees them that it is below.
    fn lower(
        &self,
        place: Backing,
        ids: Option<&Arc<MappedIds>>,
        held: &[Held<'_>],
    ) -> Result<PathBuf> {
        let mapped = |tree| ids.map(|ids| path_of(held, &Point::Mapped(ids.clone(), tree)));
        match place {
            Backing::Directory(id) => {
                let files = self.disk.present(id)?;
                match (mapped(Tree::Snapshots), files.strip_prefix(self.disk.snapshots())) {
                    (Some(clone), Ok(inside)) => Ok(clone?.join(inside)),
                    _ => Ok(files),
                }
            }
            Backing::Layer(layer) => {
                let path = match mapped(Tree::Layer(layer)) {
                    Some(clone) => clone,
                    None => path_of(held, &Point::Layer(layer)),
                };
                path.map(Path::to_owned)
            }
        }
    }

    /// The mounts of a snapshot, with what is mounted for it.
    fn mounts_of(&self, row: &Row, below: &[Backing], held: &[Held<'_>]) -> Result<Vec<Mount>> {
        let Backing::Directory(id) = row.backing else {
            return Err(Fault::internal("a layer is a committed snapshot"));
        };
        let own = self.disk.present(id)?;
        let ids = self.mapped_ids(&row.labels)?;
        // A layer that is there twice, as that of an empty tar often is, has nothing to add below
        // itself, and overlays refuse a directory that they have already.
        let mut places: Vec<Backing> = Vec::with_capacity(below.len());
        for place in below {
            if !matches!(place, Backing::Layer(_)) || !places.contains(place) {
                places.push(*place);
            }
        }
        let lowers = places.iter().map(|place| self.lower(*place, ids.as_ref(), held));
        let lowers = lowers.collect::<Result<Vec<_>>>()?;
        let bind = |source: &Path, access: &str| {
            let options = vec![access.to_owned(), "rbind".to_owned()];
            Ok(vec![Mount { kind: "bind", source: source.display().to_string(), options }])
        };
        match (row.kind, lowers.as_slice()) {
            (Kind::Active, []) => return bind(&own, "rw"),
            (_, []) => return bind(&own, "ro"),
            (Kind::View, [one]) => return bind(one, "ro"),
            _ => {}
        }
        let mut options = Vec::new();
        if row.kind == Kind::Active {
            options.push(format!("workdir={}", self.disk.work(id).display()));
            options.push(format!("upperdir={}", own.display()));
        }
        let lowers: Vec<String> = lowers.iter().map(|p| p.display().to_string()).collect();
        options.push(format!("lowerdir={}", lowers.join(":")));
        options.extend(self.overlay_options.iter().cloned());
        if places.iter().any(|place| matches!(place, Backing::Layer(_)))
            && !is_set(&self.overlay_options, "xino")
        {
            options.push(self.options.xino.option().to_owned());
        }
        Ok(vec![Mount { kind: "overlay", source: "overlay".into(), options }])
    }

    /// Makes an active snapshot on a committed one, or on nothing.
    ///
    /// With the label [`SNAPSHOT_REF`] the caller says which chain ID it is about to make. If there
    /// is one with that parent after this call, the answer is AlreadyExists, no active snapshot was
    /// made, and [`Store::list`] finds it by label and parent.
    pub fn prepare(&self, key: &Name, parent: Option<&Name>, labels: Labels) -> Result<Vec<Mount>> {
        let labels = checked(labels)?;
        if let Some(chain) = labels.get(SNAPSHOT_REF)
            && self.adopt(key, parent, chain, &labels)?
        {
            return Err(Fault::new(
                Code::AlreadyExists,
                format!("target snapshot {chain:?} already exists"),
            ));
        }
        self.create(Kind::Active, key, parent, labels)
    }

    /// Makes a read-only view of a committed snapshot, or of nothing.
    pub fn view(&self, key: &Name, parent: Option<&Name>, labels: Labels) -> Result<Vec<Mount>> {
        self.create(Kind::View, key, parent, checked(labels)?)
    }

    fn create(
        &self,
        kind: Kind,
        key: &Name,
        parent: Option<&Name>,
        labels: Labels,
    ) -> Result<Vec<Mount>> {
        let ids = self.mapped_ids(&labels)?;
        let below = || {
            self.read(|index| -> Result<Vec<Backing>> {
                let Some(parent) = parent else {
                    index.vacant(key)?;
                    return Ok(Vec::new());
                };
                let row = index.parent(parent)?;
                index.vacant(key)?;
                let further = index.below(row).map(|r| r.map(|(_, row)| row.backing));
                std::iter::once(Ok(row.backing)).chain(further).collect()
            })
        };
        // What is below is mounted while no lock is held, and looked at again under the lock: the
        // parent's name may be another's by then.
        let mut seen = below()?;
        let (mut next, held) = loop {
            let held = self.hold(Point::under(ids.as_ref(), &seen));
            let next = lock(&self.next);
            match below()? {
                now if now == seen => break (next, held.context(|| format!("snapshot {key}"))?),
                now => seen = now,
            }
        };
        let below = seen;
        let owner = match (&ids, below.first()) {
            (Some(ids), _) => Some(ids.root()),
            (None, Some(place)) => {
                let files = self.lower(*place, None, &held);
                Some(files.and_then(|f| owner_of(&f)).context(|| format!("snapshot {key}"))?)
            }
            (None, None) => None,
        };
        let id = *next;
        self.disk.make(id, owner)?;
        self.step();
        let now = Time::now();
        let backing = Backing::Directory(id);
        let row = Row {
            backing,
            kind,
            parent: parent.cloned(),
            labels,
            created: now,
            updated: now,
            usage: None,
        };
        let mounts = self.mounts_of(&row, &below, &held).context(|| format!("snapshot {key}"));
        let following = DirectoryId(id.0 + 1);
        let stored = mounts.and_then(|mounts| {
            self.db.write(&Change {
                put: Some((key, &row)),
                next: Some(following),
                ..Change::default()
            })?;
            Ok(mounts)
        });
        if stored.is_err() {
            self.throw_away(id);
        } else {
            self.step();
            *next = following;
            self.apply(|index| index.insert(key.clone(), row));
        }
        stored
    }

    /// Whether a committed snapshot with the label `chain` and this very parent exists when this
    /// returns: one that was there, a new name for files that another one has, or a layer that need
    /// not be unpacked.
    fn adopt(
        &self,
        key: &Name,
        parent: Option<&Name>,
        chain: &str,
        labels: &Labels,
    ) -> Result<bool> {
        loop {
            match self.read(|index| self.known(index, key, parent, chain))? {
                Some(Known::Whole) => return Ok(true),
                Some(Known::Files(..)) => {
                    if let Some(done) = self.name(key, parent, chain, labels, None)? {
                        return Ok(done);
                    }
                }
                None => match self.ask(key, parent, chain, labels)? {
                    Some(done) => return Ok(done),
                    None => continue,
                },
            }
        }
    }

    /// Asks the store of layers for a chain ID, or waits for somebody who does so already; `None`
    /// if one has to look again for what there is.
    fn ask(
        &self,
        key: &Name,
        parent: Option<&Name>,
        chain: &str,
        labels: &Labels,
    ) -> Result<Option<bool>> {
        let asking = {
            let mut all = lock(&self.asking);
            if let Some(other) = all.get(chain).cloned() {
                drop(all);
                // Other labels may be those of another image, or of who may see it.
                return Ok(match other.wait() {
                    Answer::Unpack if other.labels == *labels => Some(false),
                    _ => None,
                });
            }
            let asking = Arc::new(Asking {
                labels: labels.clone(),
                ended: Mutex::default(),
                wake: Condvar::new(),
            });
            all.insert(chain.to_owned(), asking.clone());
            asking
        };
        let mut ending = Ending { store: self, chain, asking, answer: Answer::LookAgain };
        let below = parent.map_or(Below::Nothing, |parent| self.chain_of(parent));
        let Some(layer) = self.layers.find(key.namespace(), labels, below) else {
            ending.answer = Answer::Unpack;
            return Ok(Some(false));
        };
        lock(&self.lost).remove(&layer);
        self.step();
        self.name(key, parent, chain, labels, Some(layer))
    }

    /// The layers that a snapshot is a stack of.
    fn chain_of(&self, name: &Name) -> Below {
        self.read(|index| {
            let chain = index.get(name).ok().and_then(|row| row.chain(name)?.parse().ok());
            chain.map_or(Below::Unknown, Below::Chain)
        })
    }

    /// How many wait for what another one asks the store of layers.
    #[cfg(test)]
    pub(crate) fn waiting(&self, chain: &str) -> usize {
        // The table and who asks have it besides.
        lock(&self.asking).get(chain).map_or(0, |asking| Arc::strong_count(asking) - 2)
    }

    /// Makes `key` a name of the files that there are of a chain ID, or of a `layer` that was found
    /// for it; `None` if there is nothing any more.
    fn name(
        &self,
        key: &Name,
        parent: Option<&Name>,
        chain: &str,
        labels: &Labels,
        layer: Option<LayerId>,
    ) -> Result<Option<bool>> {
        // The hold on a layer that was found is its first snapshot's.
        let mut extra = layer;
        let named = {
            let _writer = lock(&self.next);
            // It may have come or gone meanwhile.
            self.read(|index| self.known(index, key, parent, chain)).and_then(|known| {
                let (backing, usage) = match (known, layer) {
                    (Some(Known::Whole), _) => return Ok(Some(true)),
                    (Some(Known::Files(backing, usage)), _) => (backing, usage),
                    (None, Some(layer)) => (Backing::Layer(layer), None),
                    (None, None) => return Ok(None),
                };
                let mut labels = labels.clone();
                if let Backing::Layer(_) = backing {
                    labels.insert(REMOTE.into(), "remote snapshot".into());
                }
                let now = Time::now();
                let row = Row {
                    backing,
                    kind: Kind::Committed,
                    parent: parent.cloned(),
                    labels,
                    created: now,
                    updated: now,
                    usage,
                };
                self.db.write(&Change { put: Some((key, &row)), ..Change::default() })?;
                self.step();
                let first = self.read(|index| index.names_of(backing).is_empty());
                if first && Some(backing) == layer.map(Backing::Layer) {
                    extra = None;
                }
                self.apply(|index| index.insert(key.clone(), row));
                Ok(Some(true))
            })
        };
        if let Some(layer) = extra {
            self.give_back(layer);
        }
        named
    }

    /// Whether files are where they should be.
    fn is_whole(&self, place: Backing) -> bool {
        match place {
            Backing::Directory(id) => self.disk.present(id).is_ok(),
            Backing::Layer(layer) => !lock(&self.lost).contains(&layer),
        }
    }

    /// What there is of a chain ID for who asks for it under `key`.
    fn known(
        &self,
        index: &Index,
        key: &Name,
        parent: Option<&Name>,
        chain: &str,
    ) -> Result<Option<Known>> {
        if let Some(parent) = parent {
            index.parent(parent)?;
        }
        index.vacant(key)?;
        let mut files = None;
        for (name, row) in index.with_chain(chain) {
            let allowed =
                self.options.sharing == Sharing::Shared || name.namespace() == key.namespace();
            if row.kind != Kind::Committed
                || !allowed
                || !index.same_chain(row.parent.as_ref(), parent)
                || !self.is_whole(row.backing)
            {
                continue;
            }
            if row.parent.as_ref() == parent
                && row.labels.get(SNAPSHOT_REF).is_some_and(|label| label == chain)
            {
                return Ok(Some(Known::Whole));
            }
            files.get_or_insert(Known::Files(row.backing, row.usage));
        }
        Ok(files)
    }

    /// Makes an active snapshot the committed `name`. It keeps its parent, and has the labels that
    /// are passed here only.
    pub fn commit(&self, name: &Name, key: &Name, labels: Labels) -> Result<()> {
        let labels = checked(labels)?;
        let prepared = self.make_committed(name, key, labels)?;
        if prepared.contains_key(SNAPSHOT_REF) {
            self.layers.unpacked(key.namespace(), &prepared);
        }
        Ok(())
    }

    /// See [`Store::commit`]; gives the labels that it had.
    fn make_committed(&self, name: &Name, key: &Name, labels: Labels) -> Result<Labels> {
        let _writer = lock(&self.next);
        let row = self.read(|index| {
            let row = index.get(key)?;
            index.vacant(name)?;
            match row.kind {
                Kind::Active => Ok(Row::clone(row)),
                _ => Err(Fault::new(
                    Code::FailedPrecondition,
                    format!("snapshot {key} is not active"),
                )),
            }
        })?;
        let now = Time::now();
        let prepared = row.labels.clone();
        let row =
            Row { kind: Kind::Committed, labels, created: now, updated: now, usage: None, ..row };
        self.db.write(&Change {
            remove: Some(key),
            put: Some((name, &row)),
            ..Change::default()
        })?;
        self.step();
        let place = row.backing;
        let points = self.read(|index| index.get(key).map(|row| index.points(row)))?;
        self.apply(|index| {
            index.remove(key);
            index.insert(name.clone(), row);
        });
        if let Backing::Directory(id) = place {
            self.later(|jobs| jobs.count.push_back(id));
        }
        self.unneeded(&points);
        Ok(prepared)
    }

    /// Something does not need these any more.
    fn unneeded(&self, points: &[Point]) {
        if !points.is_empty() {
            self.mounts.used(points);
            self.look_later();
        }
    }

    /// Has it looked at in a while whether everything that is mounted is needed.
    fn look_later(&self) {
        let due = Instant::now() + self.options.keep_mounted;
        self.later(|jobs| jobs.unmount = Some(jobs.unmount.map_or(due, |at| at.min(due))));
    }

    /// Removes a name, and with its last name the files; those of others stay. Space is free after
    /// the next [`Store::cleanup`], or some time later.
    pub fn remove(&self, name: &Name) -> Result<()> {
        let (place, last, points) = {
            let _writer = lock(&self.next);
            let (place, points) = self.read(|index| {
                let row = index.get(name)?;
                match index.has_children(name) {
                    true => Err(Fault::new(
                        Code::FailedPrecondition,
                        format!("cannot remove snapshot {name}: it has children"),
                    )),
                    false => Ok((row.backing, index.points(row))),
                }
            })?;
            self.db.write(&Change { remove: Some(name), ..Change::default() })?;
            self.step();
            self.apply(|index| index.remove(name));
            let last = self.read(|index| index.names_of(place).is_empty());
            if let (Backing::Directory(id), true) = (place, last) {
                // Still the only writer: a number that is thrown away is nobody's.
                self.throw_away(id);
            }
            (place, last, points)
        };
        self.unneeded(&points);
        if let (Backing::Layer(layer), true) = (place, last) {
            self.give_back(layer);
        }
        Ok(())
    }

    fn throw_away(&self, id: DirectoryId) {
        self.disk.discard(id);
        self.step();
        self.later(|jobs| jobs.trash = true);
    }

    /// Gives back one hold on a layer. If it was the last one, no snapshot is made of the layer, so
    /// nothing of it is mounted any more but what a Prepare is about to find out.
    fn give_back(&self, layer: LayerId) {
        let gone = || self.read(|index| index.names_of(Backing::Layer(layer)).is_empty());
        if gone() {
            self.mounts.retire(layer, |_| !gone(), |point| self.unmount(point));
        }
        self.step();
        self.layers.release(layer);
    }

    /// Frees the space of everything that was removed before this call.
    pub fn cleanup(&self) -> Result<()> {
        self.disk.empty_trash()
    }

    /// How much there is. Asks the store of layers what it has on the disk.
    pub fn totals(&self) -> Totals {
        let mut totals = Totals { mounted: self.mounts.count() as u64, ..Totals::default() };
        let mut usages = Vec::new();
        let layers = self.read(|index| {
            let (mut seen, mut layers) = (HashSet::new(), Vec::new());
            for row in index.rows().values() {
                match row.kind {
                    Kind::Active => totals.active += 1,
                    Kind::View => totals.views += 1,
                    Kind::Committed => totals.committed += 1,
                }
                if row.kind != Kind::Committed || !seen.insert(row.backing) {
                    continue;
                }
                totals.places += 1;
                match row.backing {
                    Backing::Directory(_) => usages.push(row.usage),
                    Backing::Layer(layer) => layers.push(layer),
                }
            }
            layers
        });
        totals.layers = layers.len() as u64;
        usages.extend(layers.into_iter().map(|layer| self.layers.usage(layer).ok()));
        for usage in usages {
            match usage {
                Some(usage) => {
                    totals.usage.bytes += usage.bytes;
                    totals.usage.inodes += usage.inodes;
                }
                None => totals.uncounted += 1,
            }
        }
        totals
    }

    fn later(&self, add: impl FnOnce(&mut Jobs)) {
        add(&mut lock(&self.jobs));
        self.wake.notify_all();
    }

    /// Counts what was committed, empties the trash and unmounts what nobody uses, until
    /// [`Store::close`]. For a thread of its own.
    pub fn work(&self) {
        loop {
            let mut jobs = lock(&self.jobs);
            while !jobs.closed && !jobs.trash && jobs.count.is_empty() {
                let left = jobs.unmount.map(|at| at.saturating_duration_since(Instant::now()));
                match left {
                    Some(Duration::ZERO) => break,
                    Some(left) => drop(self.wake.wait_for(&mut jobs, left)),
                    None => self.wake.wait(&mut jobs),
                }
            }
            if jobs.closed {
                return;
            }
            drop(jobs);
            self.work_once();
        }
    }

    /// Does one of the things that are to be done; whether there was any.
    pub(crate) fn work_once(&self) -> bool {
        let mut jobs = lock(&self.jobs);
        // Counting first: it is what somebody may ask for.
        if let Some(id) = jobs.count.pop_front() {
            drop(jobs);
            if let Err(error) = self.count(id) {
                tracing::warn!(%error, "the size of a snapshot is not known");
            }
            return true;
        }
        if jobs.unmount.take_if(|at| *at <= Instant::now()).is_some() {
            drop(jobs);
            let wanted = |point: &Point| self.read(|index| index.is_wanted(point));
            let unmount = |point: &Point| self.unmount(point);
            let next = self.mounts.unmount_idle(self.options.keep_mounted, wanted, unmount);
            let mut jobs = lock(&self.jobs);
            jobs.unmount = [jobs.unmount, next].into_iter().flatten().min();
            return true;
        }
        if std::mem::take(&mut jobs.trash) {
            drop(jobs);
            if let Err(error) = self.disk.empty_trash() {
                tracing::warn!(%error, "something stays in the trash");
            }
            return true;
        }
        false
    }

    fn count(&self, id: DirectoryId) -> Result<()> {
        let place = Backing::Directory(id);
        if self.read(|index| index.names_of(place).is_empty()) {
            return Ok(());
        }
        let usage = self.disk.usage(id)?;
        let _writer = lock(&self.next);
        for name in self.read(|index| index.names_of(place).to_vec()) {
            let row = self.read(|index| index.get(&name).map(|row| Row::clone(row)))?;
            if row.kind != Kind::Committed || row.usage.is_some() {
                continue;
            }
            let row = Row { usage: Some(usage), ..row };
            self.db.note(&Change { put: Some((&name, &row)), ..Change::default() })?;
            self.apply(|index| index.replace(&name, row));
        }
        Ok(())
    }

    /// Ends [`Store::work`]. What was not done is done after the next start.
    pub fn close(&self) {
        self.later(|jobs| jobs.closed = true);
    }
}

impl Asking {
    fn wait(&self) -> Answer {
        let mut ended = lock(&self.ended);
        loop {
            match *ended {
                Some(answer) => return answer,
                None => self.wake.wait(&mut ended),
            }
        }
    }
}

/// Tells those who wait what came of asking for a chain ID, however that ends.
struct Ending<'a> {
    store: &'a Store,
    chain: &'a str,
    asking: Arc<Asking>,
    answer: Answer,
}

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        lock(&self.store.asking).remove(self.chain);
        *lock(&self.asking.ended) = Some(self.answer);
        self.asking.wake.notify_all();
    }
}

/// What there is of a chain ID.
enum Known {
    /// A snapshot with the label and the parent.
    Whole,
    /// Its files, under another name or on another parent of the same chain.
    Files(Backing, Option<Usage>),
}

/// What every overlay mount needs here, unless the configuration says something else of the same
/// option.
fn overlay_options(configured: &[String]) -> Vec<String> {
    let mut options = configured.to_vec();
    // In a user namespace the kernel lets nobody write attributes of `trusted.`.
    if !is_set(configured, "userxattr") && in_user_namespace() {
        options.push("userxattr".into());
    }
    // Lower directories are shared by many overlays and may be moved, which an index does not bear.
    if !is_set(configured, "index") && Path::new("/sys/module/overlay/parameters/index").exists() {
        options.push("index=off".into());
    }
    options
}

/// Whether an option is among `options`, with or without a value.
fn is_set(options: &[String], key: &str) -> bool {
    let is = |o: &String| o.strip_prefix(key).is_some_and(|r| r.is_empty() || r.starts_with('='));
    options.iter().any(is)
}

/// Where something is that was mounted before.
fn path_of<'a>(held: &'a [Held<'_>], point: &Point) -> Result<&'a Path> {
    let found = held.iter().find(|h| h.point == *point);
    found.map(|h| h.path.as_path()).ok_or_else(|| Fault::internal(format!("{point:?} is not held")))
}

fn in_user_namespace() -> bool {
    let map = std::fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    let fields: Vec<&str> = map.split_whitespace().collect();
    !fields.is_empty() && fields != ["0", "0", "4294967295"]
}
