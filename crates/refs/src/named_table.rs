//! The named states of a namespace: who holds each of them, and how one is made and ended.

use crate::{
    backend::Backend,
    id::RefId,
    mount::{LocalMount, WeakMount},
    record::{RecordBody, RecordMeta, RecordType, labels_of, lease_of, name_of},
};
use parking_lot::Mutex;
use shipway_fault::{Fault, Result};
use shipway_storage::{Labels, LeaseId, Mount, SnapshotKey};
use shipway_treehash::TreeIndex;
use std::{any::Any, sync::Arc, time::SystemTime};
use tokio::sync::{Notify, OnceCell, futures::Notified};

/// What happens when a named state is wanted while it is in use (row `exec.mnt.cache.share`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Sharing {
    /// All users have the same one at once.
    #[default]
    Shared,
    /// Another one of the same key is used or made.
    Private,
    /// The request waits.
    Locked,
}

/// One named state.
pub(crate) struct NamedEntry {
    pub id: RefId,
    pub meta: RecordMeta,
    pub lease: LeaseId,
    name: String,
    pub snapshot: SnapshotKey,
    mounts: OnceCell<Vec<Mount>>,
    state: Mutex<EntryState>,
    mounted: tokio::sync::Mutex<Option<WeakMount>>,
    pub index: TreeIndex,
    /// The layer that was made of it, with the generation it was made of.
    pub layered: tokio::sync::Mutex<Option<(u64, RefId)>>,
}

struct EntryState {
    holders: Holders,
    listing: Listing,
    /// Changes with every writer.
    generation: u64,
}

/// Who holds an entry.
#[derive(Clone, Copy)]
enum Holders {
    Free,
    Writers {
        count: usize,
        /// Whether no other writer may come.
        exclusive: bool,
    },
    Readers(usize),
}

/// Whether the table has an entry, and who ends its lease if it has not.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Listing {
    /// The table has it.
    Listed,
    /// What took it out of the table ends its lease.
    Evicted,
    /// Its last holder ends its lease.
    Discarded,
}

impl EntryState {
    fn in_use(&self) -> bool {
        !matches!(self.holders, Holders::Free)
    }

    /// Takes it out of the table, unless it is out; whether it did.
    fn unlist(&mut self, to: Listing) -> bool {
        let listed = self.listing == Listing::Listed;
        if listed {
            self.listing = to;
        }
        listed
    }
}

impl NamedEntry {
    fn new(id: RefId, meta: RecordMeta, name: String, snapshot: SnapshotKey) -> Self {
        // Generations of different runs must not be equal: ids of frozen states contain them.
        let generation = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or_default()
            .as_micros() as u64;
        let state = EntryState { holders: Holders::Free, listing: Listing::Listed, generation };
        Self {
            lease: lease_of(&id),
            id,
            meta,
            name,
            snapshot,
            mounts: OnceCell::new(),
            state: Mutex::new(state),
            mounted: Default::default(),
            index: TreeIndex::default(),
            layered: Default::default(),
        }
    }

    /// Takes it for writing if `sharing` allows that now.
    fn enter(&self, sharing: Sharing) -> bool {
        let mut state = self.state.lock();
        let exclusive = sharing != Sharing::Shared;
        let count = match state.holders {
            Holders::Free => 1,
            Holders::Writers { count, exclusive: false } if !exclusive => count + 1,
            Holders::Writers { .. } | Holders::Readers(_) => return false,
        };
        if state.listing != Listing::Listed {
            return false;
        }
        state.holders = Holders::Writers { count, exclusive };
        state.generation += 1;
        true
    }

    /// Takes it for reading if it is still of `generation`, which no writer has now.
    fn read(&self, generation: &str) -> bool {
        let mut state = self.state.lock();
        let count = match state.holders {
            Holders::Free => 1,
            Holders::Readers(count) => count + 1,
            Holders::Writers { .. } => return false,
        };
        let same = state.listing == Listing::Listed && state.generation.to_string() == generation;
        if same {
            state.holders = Holders::Readers(count);
        }
        same
    }

    /// The only writer becomes a reader; false if there are others.
    fn freeze(&self) -> bool {
        let mut state = self.state.lock();
        let only = matches!(state.holders, Holders::Writers { count: 1, .. });
        if only {
            state.holders = Holders::Readers(1);
        }
        only
    }

    /// One holder less; whether it was the last one of an entry whose lease ends with it.
    fn leave(&self) -> bool {
        let mut state = self.state.lock();
        state.holders = match state.holders {
            Holders::Free | Holders::Writers { count: 1, .. } | Holders::Readers(1) => {
                Holders::Free
            }
            Holders::Writers { count, exclusive } => {
                Holders::Writers { count: count - 1, exclusive }
            }
            Holders::Readers(count) => Holders::Readers(count - 1),
        };
        state.listing == Listing::Discarded && !state.in_use()
    }

    /// Whether a handle has it.
    pub fn in_use(&self) -> bool {
        self.state.lock().in_use()
    }

    /// Which writer's contents it has; ids of frozen states contain it.
    pub fn generation(&self) -> u64 {
        self.state.lock().generation
    }

    /// Its mounts for a process that writes, asked for once.
    async fn mounts(&self, backend: &Backend) -> Result<&[Mount]> {
        let ask = || async { backend.storage.snapshots.mounts(&self.snapshot).await };
        Ok(self.mounts.get_or_try_init(ask).await?)
    }
}

/// Holds an entry for writing.
pub(crate) struct EntryWriter(EntryHolder);

/// Holds an entry for reading.
pub(crate) struct EntryReader(EntryHolder);

/// Counts as one holder of an entry.
struct EntryHolder {
    table: Arc<NamedTable>,
    entry: Arc<NamedEntry>,
}

impl Drop for EntryHolder {
    fn drop(&mut self) {
        let last = self.entry.leave();
        self.table.left(&self.entry);
        if last {
            self.table.end(&self.entry);
        }
        self.table.freed.notify_waiters();
    }
}

impl EntryWriter {
    /// What it holds.
    pub fn entry(&self) -> &Arc<NamedEntry> {
        &self.0.entry
    }

    /// Ends writing for now, and reads.
    pub fn freeze(self) -> Result<EntryReader> {
        let entry = self.entry();
        if !entry.freeze() {
            return Err(Fault::internal(format!(
                "{:?} is frozen while others write",
                entry.meta.description
            )));
        }
        self.0.table.left(entry);
        Ok(EntryReader(self.0))
    }

    /// The state as a writable directory of the host. All holders share one mount.
    pub async fn mount(&self, mounts: &[Mount]) -> Result<LocalMount> {
        let EntryHolder { table, entry } = &self.0;
        let mut mounted = entry.mounted.lock().await;
        if let Some(mount) = mounted.as_ref().and_then(WeakMount::upgrade) {
            return Ok(mount);
        }
        let guard: Arc<dyn Any + Send + Sync> = entry.clone();
        let mount = table.backend.mount(mounts, Some(guard)).await?;
        *mounted = mount.downgrade();
        Ok(mount)
    }

    /// Throws the state away: no new handle finds it, and it vanishes with its last holder.
    pub fn discard(self) {
        self.0.table.discard(self.entry());
    }
}

impl EntryReader {
    /// What it holds.
    pub fn entry(&self) -> &Arc<NamedEntry> {
        &self.0.entry
    }

    /// The table that has the entry.
    pub fn table(&self) -> &Arc<NamedTable> {
        &self.0.table
    }
}

/// All named states of a namespace.
pub(crate) struct NamedTable {
    backend: Arc<Backend>,
    all: Mutex<Vec<Arc<NamedEntry>>>,
    /// Held while one is made, so that two requests do not make the same.
    pub making: tokio::sync::Mutex<()>,
    freed: Notify,
}

impl NamedTable {
    /// None yet.
    pub fn new(backend: Arc<Backend>) -> Arc<Self> {
        Arc::new(Self {
            backend,
            all: Mutex::default(),
            making: Default::default(),
            freed: Notify::new(),
        })
    }

    /// Takes over an entry of an earlier run.
    pub fn load(&self, id: RefId, meta: RecordMeta) {
        if let RecordBody::Named { name, snapshot } = &meta.body {
            let entry = NamedEntry::new(id, meta.clone(), name.clone(), snapshot.clone());
            self.all.lock().push(Arc::new(entry));
        }
    }

    /// All of them.
    pub fn list(&self) -> Vec<Arc<NamedEntry>> {
        self.all.lock().clone()
    }

    /// Those with this key and type, the newest first.
    pub fn with_key(&self, key: &str, record_type: RecordType) -> Vec<Arc<NamedEntry>> {
        let name = name_of(key);
        let mut found: Vec<_> = self
            .all
            .lock()
            .iter()
            .filter(|s| s.name == name && s.meta.record_type == record_type)
            .cloned()
            .collect();
        found.sort_by_key(|s| std::cmp::Reverse(s.meta.created));
        found
    }

    /// Completes when a holder leaves next.
    pub fn freed(&self) -> Notified<'_> {
        self.freed.notified()
    }

    /// Takes an entry for writing if `sharing` allows that now. One whose snapshot is gone leaves
    /// the table.
    pub async fn write(
        self: &Arc<Self>,
        entry: &Arc<NamedEntry>,
        sharing: Sharing,
    ) -> Result<Option<(EntryWriter, Vec<Mount>)>> {
        if !entry.enter(sharing) {
            return Ok(None);
        }
        let writer = EntryWriter(EntryHolder { table: self.clone(), entry: entry.clone() });
        match entry.mounts(&self.backend).await {
            Ok(mounts) => Ok(Some((writer, mounts.to_vec()))),
            // It was pruned by another program, and will not come back.
            Err(e) if e.is_not_found() => {
                drop(writer);
                self.evict(entry).await;
                Ok(None)
            }
            Err(e) => Err(e),
        }
    }

    /// Takes the entry with the id `entry` for reading if no writer had it since `generation`.
    pub fn read(
        self: &Arc<Self>,
        entry: &str,
        generation: &str,
    ) -> Option<(EntryReader, Vec<Mount>)> {
        let entry = self.list().into_iter().find(|s| s.id.0 == entry)?;
        let mounts = entry.mounts.get()?.clone();
        let read = entry.read(generation);
        read.then(|| (EntryReader(EntryHolder { table: self.clone(), entry }), mounts))
    }

    /// Makes a new one for writing, on top of `below`.
    pub async fn make(
        self: &Arc<Self>,
        id: RefId,
        meta: RecordMeta,
        (name, snapshot): (String, SnapshotKey),
        below: Option<SnapshotKey>,
        sharing: Sharing,
    ) -> Result<(EntryWriter, Vec<Mount>)> {
        let (table, backend) = (self.clone(), self.backend.clone());
        let entry = Arc::new(NamedEntry::new(id, meta, name, snapshot));
        // Cut off in the middle, it would leave an orphaned lease and snapshot.
        let work = async move {
            let storage = &backend.storage;
            let made = async {
                storage.leases.create(&entry.lease, &labels_of(&entry.meta)).await?;
                let (lease, key) = (&entry.lease, &entry.snapshot);
                storage.snapshots.prepare(lease, key, below.as_ref(), &Labels::new()).await
            };
            let mounts = match made.await {
                Ok(mounts) => mounts,
                Err(e) => {
                    backend.delete_lease(&entry.lease).await;
                    return Err(e);
                }
            };
            let _ = entry.mounts.set(mounts.clone());
            entry.enter(sharing);
            table.all.lock().push(entry.clone());
            Ok((EntryWriter(EntryHolder { table, entry }), mounts))
        };
        self.backend.background.finish("make a named state", work).await
    }

    /// Ends an entry: its lease goes, and the snapshot with it.
    pub async fn evict(&self, entry: &NamedEntry) {
        entry.state.lock().listing = Listing::Evicted;
        self.remove(entry);
        self.backend.delete_lease(&entry.lease).await;
    }

    /// Takes an entry that no handle has out of the table; its lease is then the caller's to end.
    pub fn take_unused(&self, id: &RefId) -> Option<Arc<NamedEntry>> {
        let entry = self.list().into_iter().find(|s| s.id == *id)?;
        let mut state = entry.state.lock();
        let taken = !state.in_use() && state.unlist(Listing::Evicted);
        drop(state);
        taken.then(|| {
            self.remove(&entry);
            entry
        })
    }

    /// Throws an entry away: no new handle finds it, and it vanishes with its last holder.
    pub fn discard(&self, entry: &NamedEntry) {
        let mut state = entry.state.lock();
        let unused = state.unlist(Listing::Discarded) && !state.in_use();
        drop(state);
        self.remove(entry);
        if unused {
            self.end(entry);
        }
    }

    /// Wakes the requests that wait for an entry.
    pub fn wake(&self) {
        self.freed.notify_waiters();
    }

    fn remove(&self, entry: &NamedEntry) {
        self.all.lock().retain(|s| s.id != entry.id);
    }

    /// Counts the end of a use.
    fn left(&self, entry: &NamedEntry) {
        self.backend.uses.used(&entry.id);
    }

    /// Ends a discarded entry that no handle has any more.
    fn end(&self, entry: &NamedEntry) {
        self.backend.uses.forget(&entry.id);
        self.backend.start_lease_delete(&entry.lease);
    }
}
