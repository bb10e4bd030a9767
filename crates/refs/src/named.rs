//! Mutable states that outlive builds, found by key: cache mounts, clients' directories, git
//! repositories.

use crate::{
    ImmutableRef, LocalMount, RecordType, RefId, RefStore,
    frozen::{Frozen, Reader},
    mount::WeakMount,
    record::{Body, RecordMeta, fresh_id, labels_of, lease_of, name_of},
    store::Inner,
};
use parking_lot::Mutex;
use shipway_fault::{Context as _, Fault, Result};
use shipway_storage::{Labels, LeaseId, Mount, SnapshotKey};
use shipway_treehash::TreeIndex;
use std::{any::Any, fmt, sync::Arc, time::SystemTime};
use tokio::sync::{Notify, OnceCell};

/// What happens when a named state is wanted while it is in use (row `exec.mnt.cache.share`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Sharing {
    /// Everybody uses the same one at once.
    #[default]
    Shared,
    /// Another one of the same key is used or made.
    Private,
    /// One waits.
    Locked,
}

/// Which named state is wanted.
#[derive(Clone, Debug)]
pub struct NamedRequest {
    /// What it is for.
    pub record_type: RecordType,
    /// Its key, of any length. It must contain whatever distinguishes two of them (such as the id
    /// of `parent`).
    pub key: String,
    /// Description shown to users.
    pub description: String,
    /// Sharing.
    pub sharing: Sharing,
    /// What a new one starts from.
    pub parent: Option<ImmutableRef>,
}

/// All named states.
#[derive(Default)]
pub(crate) struct NamedTable {
    all: Mutex<Vec<Arc<NamedEntry>>>,
    /// Held while one is made, so that two requests do not make the same.
    making: tokio::sync::Mutex<()>,
    freed: Notify,
}

/// One named state.
pub(crate) struct NamedEntry {
    pub id: RefId,
    pub meta: RecordMeta,
    pub lease: LeaseId,
    name: String,
    pub snapshot: SnapshotKey,
    pub mounts: OnceCell<Vec<Mount>>,
    pub use_: Mutex<EntryUse>,
    mounted: tokio::sync::Mutex<Option<WeakMount>>,
    pub index: TreeIndex,
    /// The layer that was made of it, with the generation it was made of.
    pub layered: tokio::sync::Mutex<Option<(u64, RefId)>>,
}

/// Who holds an entry.
#[derive(Default)]
pub(crate) struct EntryUse {
    pub writers: usize,
    exclusive: bool,
    pub readers: usize,
    /// Changes with every writer.
    pub generation: u64,
    /// Gone from the table: existing handles only.
    pub evicted: bool,
    /// Its lease goes with the last who has it.
    lease_ends: bool,
}

impl NamedEntry {
    fn new(id: RefId, meta: RecordMeta, name: String, snapshot: SnapshotKey) -> Self {
        // Generations of different runs must not be equal: ids of frozen states contain them.
        let generation = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or_default()
            .as_micros() as u64;
        let use_ = Mutex::new(EntryUse { generation, ..EntryUse::default() });
        let lease = lease_of(&id);
        Self {
            id,
            meta,
            lease,
            name,
            snapshot,
            mounts: OnceCell::new(),
            use_,
            mounted: Default::default(),
            index: TreeIndex::default(),
            layered: Default::default(),
        }
    }

    /// Takes it for writing if `sharing` allows that now.
    fn enter(&self, sharing: Sharing) -> bool {
        let mut u = self.use_.lock();
        let free = match sharing {
            Sharing::Shared => !u.exclusive && u.readers == 0,
            Sharing::Private | Sharing::Locked => u.writers == 0 && u.readers == 0,
        };
        if u.evicted || !free {
            return false;
        }
        u.writers += 1;
        u.exclusive = sharing != Sharing::Shared;
        u.generation += 1;
        true
    }

    pub fn leave(self: &Arc<Self>, store: &Arc<Inner>, writer: bool) {
        let mut u = self.use_.lock();
        if writer {
            u.writers -= 1;
            u.exclusive &= u.writers > 0;
        } else {
            u.readers -= 1;
        }
        let last = u.lease_ends && u.writers + u.readers == 0;
        drop(u);
        store.uses.used(&self.id);
        if last {
            store.uses.forget(&self.id);
            let (store, entry) = (store.clone(), self.clone());
            store
                .background
                .clone()
                .spawn("delete a lease", async move { store.delete_lease(&entry.lease).await });
        }
        store.named.freed.notify_waiters();
    }

    /// Whether a handle has it.
    pub fn in_use(&self) -> bool {
        let u = self.use_.lock();
        u.writers + u.readers > 0
    }

    /// Marks it as gone if no handle has it.
    pub fn evict_unused(&self) -> bool {
        let mut u = self.use_.lock();
        if u.evicted || u.writers + u.readers > 0 {
            return false;
        }
        u.evicted = true;
        true
    }

    async fn mounts(&self, store: &Inner) -> Result<&[Mount]> {
        let ask = || async { store.storage.snapshots.mounts(&self.snapshot).await };
        Ok(self.mounts.get_or_try_init(ask).await?)
    }
}

impl NamedTable {
    /// Takes over an entry of an earlier run.
    pub fn load(&self, id: RefId, meta: RecordMeta) {
        if let Body::Named { name, snapshot } = &meta.body {
            let entry = NamedEntry::new(id, meta.clone(), name.clone(), snapshot.clone());
            self.all.lock().push(Arc::new(entry));
        }
    }

    pub fn list(&self) -> Vec<Arc<NamedEntry>> {
        self.all.lock().clone()
    }

    pub fn by_id(&self, id: &RefId) -> Option<Arc<NamedEntry>> {
        self.all.lock().iter().find(|s| s.id == *id).cloned()
    }

    fn named(&self, name: &str, record_type: RecordType) -> Vec<Arc<NamedEntry>> {
        self.all
            .lock()
            .iter()
            .filter(|s| s.name == name && s.meta.record_type == record_type)
            .cloned()
            .collect()
    }

    pub fn drop_entry(&self, entry: &NamedEntry) {
        self.all.lock().retain(|s| s.id != entry.id);
    }
}

impl RefStore {
    /// The named state, as it was left, or a new one.
    pub async fn named(&self, request: NamedRequest) -> Result<NamedRef> {
        let store = &self.0;
        let name = name_of(&request.key);
        loop {
            let freed = store.named.freed.notified();
            tokio::pin!(freed);
            freed.as_mut().enable();
            let making = store.named.making.lock().await;
            let mut named = store.named.named(&name, request.record_type);
            named.sort_by_key(|s| std::cmp::Reverse(s.meta.created));
            for entry in &named {
                if entry.enter(request.sharing) {
                    let writer = Writer { store: store.clone(), entry: entry.clone() };
                    match entry.mounts(store).await {
                        Ok(mounts) => {
                            return Ok(NamedRef { mounts: mounts.to_vec(), writer, fresh: false });
                        }
                        // Somebody pruned it; it will not come back.
                        Err(e) if e.is_not_found() => {
                            drop(writer);
                            store.evict_entry(entry).await;
                        }
                        Err(e) => {
                            return Err(e).context(|| format!("take {}", request.description));
                        }
                    }
                }
            }
            let taken = named.iter().any(|s| s.in_use());
            if !taken || request.sharing == Sharing::Private {
                return store
                    .make_entry(&request, name)
                    .await
                    .context(|| format!("make {}", request.description));
            }
            drop(making);
            freed.await;
        }
    }
}

impl RefStore {
    /// Throws away the named states of a key: no new handle finds them, and each vanishes with the
    /// last who has it.
    pub fn discard_named(&self, record_type: RecordType, key: &str) {
        let store = &self.0;
        store
            .named
            .named(&name_of(key), record_type)
            .iter()
            .for_each(|entry| store.evict_named(entry));
        // Who waits for one gets a new one.
        store.named.freed.notify_waiters();
    }
}

impl Inner {
    fn evict_named(self: &Arc<Self>, entry: &Arc<NamedEntry>) {
        let unused = {
            let mut u = entry.use_.lock();
            (u.evicted, u.lease_ends) = (true, true);
            u.writers + u.readers == 0
        };
        self.named.drop_entry(entry);
        if unused {
            self.uses.forget(&entry.id);
            let (store, entry) = (self.clone(), entry.clone());
            self.background
                .clone()
                .spawn("delete a lease", async move { store.delete_lease(&entry.lease).await });
        }
    }

    async fn make_entry(
        self: &Arc<Self>,
        request: &NamedRequest,
        name: String,
    ) -> Result<NamedRef> {
        let mut below = None;
        let mut parents = Vec::new();
        if let Some(parent) = &request.parent {
            let parent = parent.layered().await?;
            parent.materialize(None).await?;
            below = parent.layered_record()?.snapshot().cloned();
            parents = vec![parent.id().clone()];
        }
        let (id, snapshot) = (fresh_id(), self.fresh_key("named"));
        let meta = RecordMeta {
            record_type: request.record_type,
            description: request.description.clone(),
            created: SystemTime::now(),
            parents,
            body: Body::Named { name: name.clone(), snapshot: snapshot.clone() },
        };
        let entry = Arc::new(NamedEntry::new(id, meta, name, snapshot));
        let (store, exclusive) = (self.clone(), request.sharing != Sharing::Shared);
        // Cut off in the middle, it would leave an orphaned lease and snapshot.
        let work = async move {
            let made = async {
                store.storage.leases.create(&entry.lease, &labels_of(&entry.meta)).await?;
                store
                    .storage
                    .snapshots
                    .prepare(&entry.lease, &entry.snapshot, below.as_ref(), &Labels::new())
                    .await
            };
            let mounts = match made.await {
                Ok(mounts) => mounts,
                Err(e) => {
                    store.delete_lease(&entry.lease).await;
                    return Err(e);
                }
            };
            let _ = entry.mounts.set(mounts.clone());
            entry.enter(Sharing::Private);
            // No other handle exists yet, so the wider sharing can be set afterwards.
            entry.use_.lock().exclusive = exclusive;
            store.named.all.lock().push(entry.clone());
            Ok(NamedRef { writer: Writer { store, entry }, mounts, fresh: true })
        };
        self.background.finish("make a named state", work).await
    }

    /// Ends an entry: its lease goes, and the snapshot with it.
    pub async fn evict_entry(&self, entry: &NamedEntry) {
        entry.use_.lock().evicted = true;
        self.named.drop_entry(entry);
        self.delete_lease(&entry.lease).await;
    }
}

/// Holds an entry for writing.
struct Writer {
    store: Arc<Inner>,
    entry: Arc<NamedEntry>,
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.entry.leave(&self.store, true);
    }
}

/// A named state in use.
pub struct NamedRef {
    writer: Writer,
    mounts: Vec<Mount>,
    fresh: bool,
}

impl fmt::Debug for NamedRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NamedRef({}, {:?})", self.id(), self.writer.entry.meta.description)
    }
}

impl NamedRef {
    /// Its identity.
    pub fn id(&self) -> &RefId {
        &self.writer.entry.id
    }

    /// Whether it was made by this request and is empty, or equal to its parent.
    pub fn is_fresh(&self) -> bool {
        self.fresh
    }

    /// What is remembered of its files' digests. Tell it of what is written.
    pub fn index(&self) -> &TreeIndex {
        &self.writer.entry.index
    }

    /// Key of the active snapshot.
    pub fn snapshot_key(&self) -> &SnapshotKey {
        &self.writer.entry.snapshot
    }

    /// Mounts for a process that writes.
    pub fn mounts(&self) -> &[Mount] {
        &self.mounts
    }

    /// The state as a writable directory of the host. All who have the state share one mount.
    pub async fn mount(&self) -> Result<LocalMount> {
        let (store, entry) = (&self.writer.store, &self.writer.entry);
        let mut mounted = entry.mounted.lock().await;
        if let Some(mount) = mounted.as_ref().and_then(WeakMount::upgrade) {
            return Ok(mount);
        }
        let guard: Arc<dyn Any + Send + Sync> = entry.clone();
        let mount =
            LocalMount::new(&self.mounts, &store.mounts, &store.background, Some(guard)).await?;
        *mounted = mount.downgrade();
        Ok(mount)
    }

    /// Ends writing for now and hands the state out for reading, without copying a file. Until the
    /// returned ref and its clones are gone, requests for the key get another state
    /// ([`Sharing::Private`]) or wait. Drop mounts first. It becomes a layer only if somebody asks
    /// for its layers, or writes on top of it.
    pub async fn freeze(self, description: impl Into<String>) -> Result<ImmutableRef> {
        let Self { writer, mounts, .. } = self;
        let entry = writer.entry.clone();
        let id = {
            let mut u = entry.use_.lock();
            if u.writers > 1 {
                return Err(Fault::internal(format!(
                    "{:?} is frozen while others write",
                    entry.meta.description
                )));
            }
            u.readers += 1;
            RefId(format!("{}-{}", entry.id, u.generation))
        };
        let reader = Reader { store: writer.store.clone(), entry };
        drop(writer);
        Ok(Frozen::held(reader, id, description.into(), mounts))
    }

    /// Throws the state away, as when its contents turned out to be damaged: no new handle finds it
    /// any more, and it vanishes with the last who has it.
    pub async fn discard(self) -> Result<()> {
        self.writer.store.evict_named(&self.writer.entry);
        Ok(())
    }
}
