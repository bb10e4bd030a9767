//! The operations.

use crate::{
    Filters, LayerId, LazyLayers,
    db::{Change, Db},
    disk::Disk,
    index::Index,
    model::{
        Backing, DirectoryId, Info, Kind, Labels, Mount, Name, Row, SNAPSHOT_REF, Time, Usage,
        checked,
    },
};
use serde::Deserialize;
use shipway_fault::{Code, Context as _, Fault, Result};
use std::{
    collections::{HashSet, VecDeque},
    path::{Path, PathBuf},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock},
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

/// How a store behaves.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Whose snapshots a namespace may get.
    pub sharing: Sharing,
    /// Options of every overlay mount besides those that it needs, for example `volatile`.
    pub mount_options: Vec<String>,
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
    #[cfg(test)]
    pub(crate) kill: crate::tests::Kill,
}

/// What is done later.
#[derive(Default)]
struct Jobs {
    count: VecDeque<DirectoryId>,
    trash: bool,
    closed: bool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What a panicking thread left is as consistent as what a kill leaves.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
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
        let mut index = Index::default();
        let mut jobs = Jobs { trash: true, ..Jobs::default() };
        for (name, row) in content.rows {
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
        Ok(Self {
            overlay_options: overlay_options(&options.mount_options),
            disk,
            options,
            layers,
            db,
            index: RwLock::new(index),
            next: Mutex::new(next),
            jobs: Mutex::new(jobs),
            wake: Condvar::new(),
            #[cfg(test)]
            kill: crate::tests::Kill::default(),
        })
    }

    fn read<T>(&self, look: impl FnOnce(&Index) -> T) -> T {
        look(&self.index.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Applies to the index what is on the disk.
    fn apply(&self, change: impl FnOnce(&mut Index)) {
        change(&mut self.index.write().unwrap_or_else(PoisonError::into_inner));
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
        self.apply(|index| index.replace(name, row));
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

    /// The mounts of an active snapshot or a view.
    pub fn mounts(&self, key: &Name) -> Result<Vec<Mount>> {
        let (row, below) = self.read(|index| -> Result<_> {
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
            Ok((row, below))
        })?;
        self.mounts_of(&row, &below).context(|| format!("mounts of snapshot {key}"))
    }

    #[cfg(test)]
    pub(crate) fn place(&self, name: &Name) -> PathBuf {
        self.files(self.read(|index| index.get(name).unwrap().backing)).unwrap()
    }

    fn files(&self, place: Backing) -> Result<PathBuf> {
        match place {
            Backing::Directory(id) => self.disk.present(id),
            Backing::Layer(layer) => self.layers.directory(layer),
        }
    }

    fn mounts_of(&self, row: &Row, below: &[Backing]) -> Result<Vec<Mount>> {
        let own = self.files(row.backing)?;
        let lowers = below.iter().map(|place| self.files(*place)).collect::<Result<Vec<_>>>()?;
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
        if let (Kind::Active, Backing::Directory(id)) = (row.kind, row.backing) {
            options.push(format!("workdir={}", self.disk.work(id).display()));
            options.push(format!("upperdir={}", own.display()));
        }
        let lowers: Vec<String> = lowers.iter().map(|p| p.display().to_string()).collect();
        options.push(format!("lowerdir={}", lowers.join(":")));
        options.extend(self.overlay_options.iter().cloned());
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
        let mut next = lock(&self.next);
        let below = self.read(|index| -> Result<Vec<Backing>> {
            let Some(parent) = parent else {
                index.vacant(key)?;
                return Ok(Vec::new());
            };
            let row = index.parent(parent)?;
            index.vacant(key)?;
            let further = index.below(row).map(|r| r.map(|(_, row)| row.backing));
            std::iter::once(Ok(row.backing)).chain(further).collect()
        })?;
        let parent_files = below
            .first()
            .map(|place| self.files(*place))
            .transpose()
            .context(|| format!("snapshot {key}"))?;
        let id = *next;
        self.disk.make(id, parent_files.as_deref())?;
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
        let mounts = self.mounts_of(&row, &below).context(|| format!("snapshot {key}"));
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
        let known = || self.read(|index| self.known(index, key, parent, chain));
        let layer = match known()? {
            Some(Known::Whole) => return Ok(true),
            Some(Known::Files(..)) => None,
            None => match self.layers.find(labels) {
                Some(layer) => Some(layer),
                None => return Ok(false),
            },
        };
        let adopted = {
            let _writer = lock(&self.next);
            // It may have come or gone meanwhile.
            known().and_then(|known| {
                let (backing, usage) = match (known, layer) {
                    (Some(Known::Whole), _) => return Ok(true),
                    (Some(Known::Files(backing, usage)), _) => (backing, usage),
                    (None, Some(layer)) => (Backing::Layer(layer), None),
                    (None, None) => return Ok(false),
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
                self.apply(|index| index.insert(key.clone(), row));
                Ok(true)
            })
        };
        if let Some(layer) = layer {
            self.release(layer);
        }
        adopted
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
            let whole = || match row.backing {
                Backing::Directory(id) => self.disk.present(id).is_ok(),
                Backing::Layer(_) => true,
            };
            if row.kind != Kind::Committed
                || !allowed
                || !index.same_chain(row.parent.as_ref(), parent)
                || !whole()
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
        let row =
            Row { kind: Kind::Committed, labels, created: now, updated: now, usage: None, ..row };
        self.db.write(&Change {
            remove: Some(key),
            put: Some((name, &row)),
            ..Change::default()
        })?;
        self.step();
        let place = row.backing;
        self.apply(|index| {
            index.remove(key);
            index.insert(name.clone(), row);
        });
        if let Backing::Directory(id) = place {
            self.later(|jobs| jobs.count.push_back(id));
        }
        Ok(())
    }

    /// Removes a name, and with its last name the files; those of others stay. Space is free after
    /// the next [`Store::cleanup`], or some time later.
    pub fn remove(&self, name: &Name) -> Result<()> {
        let (place, last) = {
            let _writer = lock(&self.next);
            let place = self.read(|index| {
                let row = index.get(name)?;
                match index.has_children(name) {
                    true => Err(Fault::new(
                        Code::FailedPrecondition,
                        format!("cannot remove snapshot {name}: it has children"),
                    )),
                    false => Ok(row.backing),
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
            (place, last)
        };
        if let (Backing::Layer(layer), true) = (place, last) {
            self.release(layer);
        }
        Ok(())
    }

    fn throw_away(&self, id: DirectoryId) {
        self.disk.discard(id);
        self.step();
        self.later(|jobs| jobs.trash = true);
    }

    fn release(&self, layer: LayerId) {
        if self.read(|index| index.names_of(Backing::Layer(layer)).is_empty()) {
            self.layers.release(layer);
        }
    }

    /// Frees the space of everything that was removed before this call.
    pub fn cleanup(&self) -> Result<()> {
        self.disk.empty_trash()
    }

    /// How much there is.
    pub fn totals(&self) -> Totals {
        self.read(|index| {
            let mut totals = Totals::default();
            let mut seen = HashSet::new();
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
                match row.usage {
                    Some(usage) => {
                        totals.usage.bytes += usage.bytes;
                        totals.usage.inodes += usage.inodes;
                    }
                    None => totals.uncounted += 1,
                }
            }
            totals
        })
    }

    fn later(&self, add: impl FnOnce(&mut Jobs)) {
        add(&mut lock(&self.jobs));
        self.wake.notify_all();
    }

    /// Counts what was committed and empties the trash, until [`Store::close`]. For a thread of its
    /// own.
    pub fn work(&self) {
        loop {
            let mut jobs = lock(&self.jobs);
            while !jobs.closed && !jobs.trash && jobs.count.is_empty() {
                jobs = self.wake.wait(jobs).unwrap_or_else(PoisonError::into_inner);
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
    let has = |key: &str| {
        configured
            .iter()
            .any(|o| o == key || o.strip_prefix(key).is_some_and(|rest| rest.starts_with('=')))
    };
    let mut options = configured.to_vec();
    // In a user namespace the kernel lets nobody write attributes of `trusted.`.
    if !has("userxattr") && in_user_namespace() {
        options.push("userxattr".into());
    }
    // Lower directories are shared by many overlays and may be moved, which an index does not bear.
    if !has("index") && Path::new("/sys/module/overlay/parameters/index").exists() {
        options.push("index=off".into());
    }
    options
}

fn in_user_namespace() -> bool {
    let map = std::fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    let fields: Vec<&str> = map.split_whitespace().collect();
    !fields.is_empty() && fields != ["0", "0", "4294967295"]
}
