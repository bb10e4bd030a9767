//! Owns warm shims: starting a shim is about half of a trivial step's cost, so a shim serves one
//! process after another.
//!
//! The runc shim serves all containers of a group and lives while one of them exists. A slot is a
//! group of ours with a *keeper* in it: a container whose process was killed before it began, which
//! holds no memory. A process takes a free slot or makes one; it never shares one at a time,
//! because a shim creates its containers one by one. Where containerd knows sandboxes, the keeper's
//! is one, and processes are its containers (why is in `sandboxes`).

use super::api::{ProcessRef, Stdio, TaskApi};
use parking_lot::{Mutex, MutexGuard};
use shipway_executor::spec;
use shipway_fault::{Fault, Result};
use shipway_storage::{Mount, RawMount};
use shipway_task::spawn;
use std::{
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};
use tokio::sync::OnceCell;
use tokio_util::task::TaskTracker;

/// How long a shim without work stays.
const WARM: Duration = Duration::from_secs(20);

pub(super) struct Shims {
    api: TaskApi,
    busy: TaskTracker,
    prefix: String,
    made: AtomicU64,
    idle: Mutex<Vec<(Instant, Arc<Slot>)>>,
}

/// A shim to be.
pub(super) struct Slot {
    /// Value of the group annotation.
    pub(super) group: String,
    /// What holds the shim; set when it was tried.
    kept: OnceCell<KeptBy>,
    /// The container that the shim was started for, by which it is found on the host.
    founder: OnceLock<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum KeptBy {
    /// Nothing: it ends with its process.
    Nothing,
    /// A keeper.
    Keeper,
    /// A keeper that is a sandbox.
    Sandbox,
}

/// The container that holds the shim of a group.
pub(super) fn keeper_of(group: &str) -> String {
    format!("{group}-keeper")
}

impl Slot {
    fn keeper_id(&self) -> String {
        keeper_of(&self.group)
    }

    /// Container `id` has a task in the shim; the first one is what it was started for.
    pub(super) fn founded_by(&self, id: &str) {
        self.founder.get_or_init(|| id.to_owned());
    }

    /// The container that the shim was started for.
    pub(super) fn founder(&self) -> &str {
        self.founder.get().map(String::as_str).unwrap_or_default()
    }

    /// The sandbox in which its containers are, if they are in one.
    pub(super) fn sandbox(&self) -> Option<String> {
        (self.kept.get() == Some(&KeptBy::Sandbox)).then(|| self.keeper_id())
    }
}

impl Shims {
    pub(super) fn new(api: TaskApi, busy: TaskTracker, id_prefix: &str) -> Self {
        // Two runs of a daemon must not meet in one group: the old one's shims are being swept.
        let life = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap_or_default()
            .as_nanos();
        let prefix =
            format!("{id_prefix}{:x}", life as u64 ^ (u64::from(std::process::id()) << 40));
        Self { api, busy, prefix, made: AtomicU64::new(0), idle: Mutex::default() }
    }

    fn idle(&self) -> MutexGuard<'_, Vec<(Instant, Arc<Slot>)>> {
        self.idle.lock()
    }

    /// A free slot, or a new one.
    pub(super) fn take(&self) -> Arc<Slot> {
        match self.idle().pop() {
            Some((_, slot)) => slot,
            None => self.fresh(),
        }
    }

    /// A slot whose shim does not run yet.
    pub(super) fn fresh(&self) -> Arc<Slot> {
        let n = self.made.fetch_add(1, Ordering::Relaxed);
        Arc::new(Slot {
            group: format!("{}-{n}", self.prefix),
            kept: OnceCell::new(),
            founder: OnceLock::new(),
        })
    }

    /// The slot that `group` is, of an earlier run of the daemon, with a shim that was started for
    /// `founder`.
    pub(super) async fn left(&self, group: &str, founder: &str) -> Arc<Slot> {
        let keeper = keeper_of(group);
        let sandboxes = self.api.our_sandboxes().await.unwrap_or_default();
        let kept = if sandboxes.contains(&keeper) {
            KeptBy::Sandbox
        } else if matches!(self.api.exit_status(&ProcessRef::first(&keeper)).await, Ok(Some(_))) {
            KeptBy::Keeper
        } else {
            // The daemon ended while it was made.
            let _ = self.api.destroy(&keeper).await;
            KeptBy::Nothing
        };
        let (group, founder) = (group.to_owned(), OnceLock::from(founder.to_owned()));
        Arc::new(Slot { group, kept: OnceCell::new_with(Some(kept)), founder })
    }

    /// Makes the keeper, once the slot's shim runs. Call it while the process is busy with its own.
    pub(super) async fn keep(&self, slot: &Slot) {
        slot.kept
            .get_or_init(|| async {
                if let Err(e) = self.make_keeper(slot).await {
                    tracing::debug!(group = slot.group, "cannot keep shim warm: {e}");
                    let _ = self.api.destroy(&slot.keeper_id()).await;
                    return KeptBy::Nothing;
                }
                if !self.api.has_sandboxes().await {
                    return KeptBy::Keeper;
                }
                match self.api.create_sandbox(&slot.keeper_id()).await {
                    Ok(()) => KeptBy::Sandbox,
                    Err(e) => {
                        tracing::debug!(group = slot.group, "cannot record shim as sandbox: {e}");
                        KeptBy::Keeper
                    }
                }
            })
            .await;
    }

    /// Whether the slot's shim still runs.
    pub(super) async fn lives(&self, slot: &Slot) -> bool {
        self.api.exit_status(&ProcessRef::first(&slot.keeper_id())).await.is_ok()
    }

    /// Removes what there is of a slot's keeper.
    pub(super) async fn close(&self, slot: &Slot) {
        let keeper = slot.keeper_id();
        let mut closed = self.api.destroy(&keeper).await;
        if slot.sandbox().is_some() {
            closed = closed.and(self.api.delete_sandbox(&keeper).await);
        }
        if let Err(e) = closed {
            tracing::warn!(group = slot.group, "failed to stop warm shim: {e}");
        }
    }

    async fn make_keeper(&self, slot: &Slot) -> Result<()> {
        let id = slot.keeper_id();
        let spec = serde_json::to_vec(&spec::keeper(&slot.group, &self.api.cgroups_path(&id)))
            .map_err(|e| Fault::internal(format!("write the specification of a keeper: {e}")))?;
        // What a runtime makes in the root would stay in containerd's state for ever, which removes
        // empty directories only: a mount goes with it all.
        let root = Mount::Other(RawMount {
            kind: "tmpfs".into(),
            source: "tmpfs".into(),
            target: String::new(),
            options: vec!["size=64k".into()],
        });
        self.api.create_container(&id, spec, None, None).await?;
        self.api.create_task(&id, &[root], Stdio::default()).await?;
        self.api.kill(&id).await
    }

    /// Gives a slot back, for the next process or to be closed after a while.
    pub(super) async fn put(self: &Arc<Self>, slot: Arc<Slot>) {
        match slot.kept.get() {
            None | Some(KeptBy::Nothing) => return,
            // A group whose shim was killed gets another one, which its dead keeper does not hold.
            Some(KeptBy::Keeper) if !self.lives(&slot).await => return self.close(&slot).await,
            Some(_) => {}
        }
        self.idle().push((Instant::now(), slot));
        let shims = Arc::downgrade(self);
        spawn("retire idle shims", async move {
            tokio::time::sleep(WARM + Duration::from_millis(100)).await;
            if let Some(shims) = shims.upgrade() {
                shims.retire_idle(Some(WARM)).await;
            }
        });
    }

    /// Closes the slots without work, or those that had none for `age`.
    pub(super) async fn retire_idle(&self, age: Option<Duration>) {
        let guard = self.busy.token();
        let old: Vec<Arc<Slot>> = {
            let mut idle = self.idle();
            let (old, young) =
                idle.drain(..).partition(|(since, _)| age.is_none_or(|a| since.elapsed() >= a));
            *idle = young;
            let old: Vec<(Instant, Arc<Slot>)> = old;
            old.into_iter().map(|(_, slot)| slot).collect()
        };
        for slot in old {
            self.close(&slot).await;
        }
        drop(guard);
    }
}
