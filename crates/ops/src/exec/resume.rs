//! Steps that outlive the daemon (row `dp.outlive`). A step is a task of containerd's, which goes
//! on when the daemon is killed, upgraded or stopped; the build that wants it comes again, and then
//! it is to go on with the step instead of beginning anew.
//!
//! - **Which step it is** ([`key`]) is a digest of all that decides what the process does and to
//!   what: the operation whole, with what is not in its cache key (addresses of hosts, proxies,
//!   selectors, ids of caches), limits, devices, and the names of its inputs' snapshots. So a
//!   changed build never gets a step of the one before.
//! - **What is stored** ([`StepNote`]) are the names of what it writes and reads. The next run of
//!   the daemon takes over these snapshots, and holds its cache mounts as they were held: one that
//!   is locked stays locked.
//! - **Who gets it**: the first vertex with the same key that would start a process
//!   ([`HeldSteps::take`]). Its log begins with what the step has said before. What comes out is
//!   committed as ever. Steps that nobody wanted within a time ([`HeldSteps::expire`]) are killed,
//!   and nothing is left of them.
//! - **Which do not**: those with secrets (they are not to outlive the daemon), SSH agents, the
//!   proxy network (all of which the daemon serves), inputs that are a client's directory or a git
//!   repository (the next transfer would change it under the process), cache mounts that begin
//!   empty in this build or are made from another state (steps share a mount of the daemon's),
//!   those whose reads are watched (`--optimize`), and containers of frontends and clients, which
//!   end with their caller. A step's spans for a build's traces are lost after the daemon's end.
//! - **What was not seen** is not made up: a step that failed while no daemon ran is run again,
//!   since the end of its output, and so the reason, is lost; one that succeeded is committed, and
//!   its log says that the end of it may be missing.

use super::key::own_key;
use crate::{key::KeyWriter, step_options::StepOptions};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use shipway_executor::{Edits, Executor, LeftProcess, ResourceLimits};
use shipway_fault::{Fault, Result};
use shipway_llb::{ExecOp, MountKind, Vertex};
use shipway_oci::Digest;
use shipway_refs::{
    ImmutableRef, Inherited, MutableRef, NamedRef, RecordType, RefId, RefStore, Sharing,
};
use shipway_storage::SnapshotKey;
use std::{collections::BTreeMap, sync::Arc, time::Duration};

/// By what a step is known to a later run of the daemon; `None` for one that ends with this run.
/// `options` are those of the builds that want it.
pub(super) fn key(
    exec: &ExecOp,
    vertex: &Vertex,
    inputs: &[ImmutableRef],
    options: &[StepOptions],
    (limits, edits): (&ResourceLimits, &Edits),
) -> Option<Digest> {
    if hangs_on_daemon(exec, options) {
        return None;
    }
    let mut key = KeyWriter::new("shipway.step.v1");
    key.text("operation", &own_key(exec, vertex).digest().to_string())
        .flag("ignore cache", vertex.metadata.ignore_cache)
        .text("proxies", &format!("{:?}", exec.meta.proxy))
        .text("hosts", &format!("{:?}", exec.meta.extra_hosts))
        .text("limits", &format!("{limits:?}"))
        .text("devices", &format!("{edits:?}"));
    for mount in &exec.mounts {
        key.text("selector", &mount.selector);
        if let MountKind::Cache(cache) = &mount.kind {
            key.text("cache", &cache.id).value("sharing", cache.sharing);
        }
    }
    for input in inputs {
        match input.snapshot_name() {
            Some(name) => key.text("input", &name.0),
            None if input.is_scratch() => key.flag("scratch", true),
            None => return None,
        };
    }
    Some(key.digest())
}

/// Whether a step needs something that ends with the daemon, or with the build that began it.
fn hangs_on_daemon(exec: &ExecOp, options: &[StepOptions]) -> bool {
    exec.proxied
        || !exec.secret_env.is_empty()
        || exec.mounts.iter().any(|mount| match &mount.kind {
            MountKind::Secret(_) | MountKind::Ssh(_) => true,
            MountKind::Cache(cache) => {
                let id = super::mounts::cache_id(mount, cache);
                mount.input.is_some() || options.iter().any(|o| o.begins_empty(id, false))
            }
            MountKind::Bind | MountKind::Tmpfs { .. } => false,
        })
}

/// A cache mount that a step has.
pub(super) struct HeldCache {
    /// What it is found by.
    pub(super) key: String,
    pub(super) sharing: Sharing,
    pub(super) state: NamedRef,
}

/// What is stored of a step, besides its key.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct StepNote {
    /// Snapshots that it writes, by the mount.
    written: BTreeMap<usize, String>,
    /// Snapshots that it reads.
    read: Vec<String>,
    /// Cache mounts.
    caches: Vec<CacheNote>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct CacheNote {
    key: String,
    id: String,
    sharing: SharingNote,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum SharingNote {
    Shared,
    Private,
    Locked,
}

impl From<Sharing> for SharingNote {
    fn from(sharing: Sharing) -> Self {
        match sharing {
            Sharing::Shared => Self::Shared,
            Sharing::Private => Self::Private,
            Sharing::Locked => Self::Locked,
        }
    }
}

impl From<SharingNote> for Sharing {
    fn from(sharing: SharingNote) -> Self {
        match sharing {
            SharingNote::Shared => Self::Shared,
            SharingNote::Private => Self::Private,
            SharingNote::Locked => Self::Locked,
        }
    }
}

impl StepNote {
    pub(super) fn new<'a>(
        written: impl Iterator<Item = (usize, SnapshotKey)>,
        read: impl Iterator<Item = &'a SnapshotKey>,
        caches: &[HeldCache],
    ) -> Self {
        let cache = |cache: &HeldCache| CacheNote {
            key: cache.key.clone(),
            id: cache.state.id().0.clone(),
            sharing: cache.sharing.into(),
        };
        Self {
            written: written.map(|(mount, key)| (mount, key.0)).collect(),
            read: read.map(|key| key.0.clone()).collect(),
            caches: caches.iter().map(cache).collect(),
        }
    }

    /// The text that is stored.
    pub(super) fn text(&self) -> Option<String> {
        serde_json::to_string(self).ok()
    }

    fn snapshots(&self) -> Vec<SnapshotKey> {
        self.written.values().chain(&self.read).cloned().map(SnapshotKey).collect()
    }
}

/// The states of a step that an earlier run of the daemon started.
pub(crate) struct HeldStates {
    written: BTreeMap<usize, SnapshotKey>,
    inherited: Inherited,
    caches: Vec<HeldCache>,
}

impl HeldStates {
    /// The state that the step writes by its mount `index`, on top of `below`.
    pub(super) async fn state(
        &mut self,
        refs: &RefStore,
        index: usize,
        below: Option<&ImmutableRef>,
        description: String,
    ) -> Result<MutableRef> {
        let key = self.written.get(&index);
        let key = key.ok_or_else(|| Fault::internal(format!("mount {index} was not left")))?;
        refs.resume(&mut self.inherited, key, below, description, RecordType::Regular).await
    }

    /// The cache mount that is found by `key`.
    pub(super) fn cache(&mut self, key: &str) -> Result<HeldCache> {
        let at = self.caches.iter().position(|cache| cache.key == key);
        let at = at.ok_or_else(|| Fault::internal(format!("the cache {key:?} was not left")))?;
        Ok(self.caches.swap_remove(at))
    }
}

/// A step that an earlier run of the daemon started, and that waits for a build.
pub(super) struct HeldStep {
    pub(super) process: LeftProcess,
    pub(super) states: HeldStates,
}

/// The processes that an earlier run of the daemon left, with what they have.
pub struct LeftSteps(Vec<(LeftProcess, Option<StepNote>)>);

impl LeftSteps {
    /// Reads what was stored of them.
    pub fn new(left: Vec<LeftProcess>) -> Self {
        let read = |process: LeftProcess| {
            let note = serde_json::from_str(&process.stored.note).ok();
            (process, note)
        };
        Self(left.into_iter().map(read).collect())
    }

    /// The snapshots of each, for [`RefStore::open_inheriting`].
    pub fn snapshots(&self) -> Vec<Vec<SnapshotKey>> {
        let of = |note: &Option<StepNote>| note.as_ref().map(StepNote::snapshots);
        self.0.iter().map(|(_, note)| of(note).unwrap_or_default()).collect()
    }

    /// Holds those of which everything is there, `inherited` among it; the others are ended.
    pub async fn hold(
        self,
        refs: &RefStore,
        executor: Arc<dyn Executor>,
        inherited: Vec<Option<Inherited>>,
    ) -> Result<HeldSteps> {
        let mut steps = Vec::new();
        for ((process, note), inherited) in self.0.into_iter().zip(inherited) {
            let states = match (note, inherited) {
                (Some(note), Some(inherited)) => states(refs, note, inherited).await?,
                _ => None,
            };
            match states {
                Some(states) => steps.push(HeldStep { process, states }),
                None => {
                    tracing::info!(container = process.id, "a step was left without its files");
                    executor.abandon(&process.id).await;
                }
            }
        }
        if !steps.is_empty() {
            tracing::info!(steps = steps.len(), "steps of an earlier run go on");
        }
        Ok(HeldSteps { executor: Some(executor), steps: Arc::new(Mutex::new(steps)) })
    }
}

async fn states(
    refs: &RefStore,
    note: StepNote,
    inherited: Inherited,
) -> Result<Option<HeldStates>> {
    let mut caches = Vec::new();
    for CacheNote { key, id, sharing } in note.caches {
        let sharing = sharing.into();
        let Some(state) = refs.named_again(&RefId(id), sharing).await? else { return Ok(None) };
        caches.push(HeldCache { key, sharing, state });
    }
    let written = note.written.into_iter().map(|(mount, key)| (mount, SnapshotKey(key)));
    Ok(Some(HeldStates { written: written.collect(), inherited, caches }))
}

/// Steps of an earlier run of the daemon that wait for a build. Clones share them. Without an
/// executor, as by default, steps end with the daemon.
#[derive(Clone, Default)]
pub struct HeldSteps {
    executor: Option<Arc<dyn Executor>>,
    steps: Arc<Mutex<Vec<HeldStep>>>,
}

impl HeldSteps {
    /// Whether steps of this run may outlive it.
    pub fn outlive(&self) -> bool {
        self.executor.is_some()
    }

    /// The step that is known by `key`, for the caller to go on with or to abandon.
    pub(super) fn take(&self, key: Digest) -> Option<HeldStep> {
        let mut steps = self.steps.lock();
        let at = steps.iter().position(|step| step.process.stored.key == key)?;
        Some(steps.swap_remove(at))
    }

    /// Ends the steps that no build wanted within `limit`.
    pub async fn expire(&self, limit: Duration) {
        if self.steps.lock().is_empty() {
            return;
        }
        tokio::time::sleep(limit).await;
        let late = std::mem::take(&mut *self.steps.lock());
        for HeldStep { process, states } in late {
            tracing::info!(container = process.id, "no build came for a step that was left");
            if let Some(executor) = &self.executor {
                executor.abandon(&process.id).await;
            }
            // What it uses goes after it.
            drop(states);
        }
    }

    /// The daemon ends: those that still wait are left to the next run.
    pub fn leave(&self) {
        // Dropped, their snapshots would be removed.
        std::mem::forget(std::mem::take(&mut *self.steps.lock()));
    }
}

#[cfg(test)]
mod tests;
