//! Mutable states that outlive builds, found by key: cache mounts, clients' directories, git
//! repositories.

use crate::{
    frozen::Frozen,
    id::{RefId, fresh_id},
    immutable::ImmutableRef,
    mount::LocalMount,
    named_table::{EntryWriter, NamedEntry, NamedTable, Sharing},
    record::{RecordBody, RecordMeta, RecordType, name_of},
    records::Records,
};
use shipway_fault::{Context as _, Fault, Result};
use shipway_storage::{Mount, SnapshotKey};
use shipway_treehash::TreeIndex;
use std::{fmt, sync::Arc, time::SystemTime};

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
    /// What happens while it is in use.
    pub sharing: Sharing,
    /// What a new one starts from.
    pub parent: Option<ImmutableRef>,
}

/// A named state in use.
pub struct NamedRef {
    records: Arc<Records>,
    writer: EntryWriter,
    mounts: Vec<Mount>,
    fresh: bool,
}

impl fmt::Debug for NamedRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NamedRef({}, {:?})", self.id(), self.entry().meta.description)
    }
}

impl NamedRef {
    /// The state that `request` asks for, as it was left, or a new one.
    pub(crate) async fn take(
        records: &Arc<Records>,
        table: &Arc<NamedTable>,
        request: NamedRequest,
    ) -> Result<Self> {
        let records = records.clone();
        loop {
            let freed = table.freed();
            tokio::pin!(freed);
            freed.as_mut().enable();
            let making = table.making.lock().await;
            let found = table.with_key(&request.key, request.record_type);
            for entry in &found {
                let taken = table.write(entry, request.sharing).await;
                if let Some((writer, mounts)) =
                    taken.context(|| format!("take {}", request.description))?
                {
                    return Ok(Self { records, writer, mounts, fresh: false });
                }
            }
            let taken = found.iter().any(|s| s.in_use());
            if !taken || request.sharing == Sharing::Private {
                let made = make(&records, table, &request, fresh_id()).await;
                let (writer, mounts) = made.context(|| format!("make {}", request.description))?;
                return Ok(Self { records, writer, mounts, fresh: true });
            }
            drop(making);
            freed.await;
        }
    }

    /// The state with this id; `None` if there is none, or if `sharing` does not allow that now.
    pub(crate) async fn again(
        records: &Arc<Records>,
        table: &Arc<NamedTable>,
        id: &RefId,
        sharing: Sharing,
    ) -> Result<Option<Self>> {
        let Some(entry) = table.list().into_iter().find(|entry| entry.id == *id) else {
            return Ok(None);
        };
        let taken = table.write(&entry, sharing).await?;
        let records = records.clone();
        Ok(taken.map(|(writer, mounts)| Self { records, writer, mounts, fresh: false }))
    }

    /// A new state for `request` to fill; `None` if there is one of that key.
    pub(crate) async fn fill(
        records: &Arc<Records>,
        table: &Arc<NamedTable>,
        request: NamedRequest,
    ) -> Result<Option<Filling>> {
        let _making = table.making.lock().await;
        if !table.with_key(&request.key, request.record_type).is_empty() {
            return Ok(None);
        }
        let id = fresh_id();
        // Before there is a state, so that there never is one without a mark.
        records.backend.filling.add(&id).await?;
        let request = NamedRequest { sharing: Sharing::Locked, ..request };
        let made = make(records, table, &request, id).await;
        let (writer, mounts) = made.context(|| format!("make {}", request.description))?;
        let state = Self { records: records.clone(), writer, mounts, fresh: true };
        Ok(Some(Filling(Some(state))))
    }

    fn entry(&self) -> &NamedEntry {
        self.writer.entry()
    }

    /// Its identity.
    pub fn id(&self) -> &RefId {
        &self.entry().id
    }

    /// Whether it was made by this request and is empty, or equal to its parent.
    pub fn is_fresh(&self) -> bool {
        self.fresh
    }

    /// The known digests of its files, to be updated by callers that write.
    pub fn index(&self) -> &TreeIndex {
        &self.entry().index
    }

    /// Key of the active snapshot.
    pub fn snapshot_key(&self) -> &SnapshotKey {
        &self.entry().snapshot
    }

    /// Mounts for a process that writes.
    pub fn mounts(&self) -> &[Mount] {
        &self.mounts
    }

    /// The state as a writable directory of the host. All handles on the state share one mount.
    pub async fn mount(&self) -> Result<LocalMount> {
        self.writer.mount(&self.mounts).await
    }

    /// Ends writing for now and hands the state out for reading, without copying a file. Until the
    /// returned ref and its clones are gone, requests for the key get another state
    /// ([`Sharing::Private`]) or wait. Drop mounts first. It becomes a layer only when its layers
    /// are asked for, or when something is written on top of it.
    pub async fn freeze(self, description: impl Into<String>) -> Result<ImmutableRef> {
        let reader = self.writer.freeze()?;
        let id = RefId(format!("{}-{}", reader.entry().id, reader.entry().generation()));
        Ok(Frozen::new(self.records, reader, id, description.into(), self.mounts).into())
    }

    /// Throws the state away, as when its contents turned out to be damaged: no new handle finds it
    /// any more, and it vanishes with its last handle.
    pub async fn discard(self) -> Result<()> {
        self.writer.discard();
        Ok(())
    }
}

/// A named state that nobody else gets before it is whole. Dropped without [`Filling::done`] it
/// vanishes, and so it does if the daemon ends before.
#[derive(Debug)]
pub struct Filling(Option<NamedRef>);

impl Filling {
    /// The state as a writable directory of the host.
    pub async fn mount(&self) -> Result<LocalMount> {
        match &self.0 {
            Some(state) => state.mount().await,
            None => Err(Fault::internal("a state that is whole is filled")),
        }
    }

    /// It is whole: requests that wait for it get it. Drop mounts first.
    pub async fn done(mut self) -> Result<()> {
        if let Some(state) = &self.0 {
            state.records.backend.filling.remove(state.id()).await?;
        }
        self.0.take();
        Ok(())
    }
}

impl Drop for Filling {
    fn drop(&mut self) {
        if let Some(state) = self.0.take() {
            // Its mark stays: the next start finds what is not removed until then.
            state.writer.discard();
        }
    }
}

async fn make(
    records: &Records,
    table: &Arc<NamedTable>,
    request: &NamedRequest,
    id: RefId,
) -> Result<(EntryWriter, Vec<Mount>)> {
    let mut below = None;
    let mut parents = Vec::new();
    if let Some(parent) = &request.parent {
        let parent = parent.layered().await?;
        parent.materialize(None).await?;
        below = parent.record().snapshot().cloned();
        parents = vec![parent.id().clone()];
    }
    let (name, snapshot) = (name_of(&request.key), records.backend.fresh_key("named"));
    let meta = RecordMeta {
        record_type: request.record_type,
        description: request.description.clone(),
        created: SystemTime::now(),
        parents,
        body: RecordBody::Named { name: name.clone(), snapshot: snapshot.clone() },
    };
    table.make(id, meta, (name, snapshot), below, request.sharing).await
}
