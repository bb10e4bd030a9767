//! Owns processes that outlive the daemon that started them.
//!
//! A task and its shim are containerd's, so a process goes on when the daemon ends. What the next
//! run of the daemon needs to go on with it is in the process's own directory: a record
//! (`step.json`), written after the task was made and before the process begins, and what was read
//! of its output ([`super::spool`]). It is a file and not labels of the container, since it has
//! what labels have no room for (the mount points that are to be taken away), costs no call, and
//! shares the fate of the FIFOs beside it; a reboot ends the task as well.
//!
//! ```text
//!  written ──▶ begins ──▶ daemon dies ──▶ next run: sweep ──▶ held ──▶ resumed, ends
//!     │                                       │                └─────▶ abandoned: killed
//!     └ withdrawn before a kill               └ no record, or it never began: swept as ever
//! ```
//!
//! - **Which.** Those that a caller calls resumable, in the runc shim, with neither a terminal,
//!   input, a proxy, watched files, nor secrets: what is at the other end of these has ended with
//!   the daemon, and secrets are not to outlive it.
//! - **Held** means that its output is read (into the spool, so that it need not wait for anybody),
//!   and that the sweep and all later ones spare its container, its shim and what holds that, its
//!   directory with what is mounted there, its cgroup, and its network namespace with the address.
//! - **Output.** The shim has both ends of each FIFO open, so a process whose reader is gone is not
//!   told; it waits once 64 KiB are full. With the process the shim closes them, and what was in
//!   them is lost: so a process that ended *unseen* is reported as such.
//! - **Killed on purpose.** A record is withdrawn before a kill, so that nobody takes the exit of a
//!   cancelled process for its own.
//! - **Leaving.** A daemon that ends in order leaves what is dropped after [`super::Executor`]'s
//!   `leave` just as a kill would have. What the process needs is not dropped but forgotten.

use super::{
    Inner,
    api::ProcessRef,
    cgroup::MemoryCgroup,
    is_runc,
    prepare::{self, Prepared},
    run::{self, Ended, Exit, ExitSender, Parts, check_id},
    shims::{Slot, keeper_of},
    spool::Spool,
    stdio::{Destination, Stdio},
};
use crate::network::NetnsGuard;
use containerd_client::types::v1::Status;
use serde::{Deserialize, Serialize};
use shipway_executor::{
    ExecMount, ExitStatus, LeftProcess, MountSource, OutputTarget, ProcessIo, ProcessSpec,
    Resumable,
};
use shipway_fault::{Fault, Result};
use shipway_oci::Digest;
use shipway_rootfs::{Stubs, Trust};
use shipway_task::blocking;
use std::{
    collections::HashMap,
    fs::File,
    io::Read as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// Name of the file with a process's output, in its directory.
pub(super) const SPOOL: &str = "output";
/// Name of the file with its record.
const RECORD: &str = "step.json";
/// Largest record, in bytes.
const MAX_RECORD: usize = 1 << 20;
/// Records of another version are not understood.
const VERSION: u32 = 1;

/// What is stored of a process; generic in whether it owns what is to be undone.
#[derive(Serialize, Deserialize)]
struct Record<S = Stubs, T = Trust> {
    version: u32,
    key: Digest,
    note: String,
    /// In milliseconds since the epoch.
    started: u64,
    group: String,
    founder: String,
    netns: Option<String>,
    /// Whether the namespace may serve another process afterwards.
    clean_network: bool,
    cgroup: Option<MemoryCgroup>,
    stubs: Option<S>,
    trust: Option<T>,
}

impl Record {
    /// The record in `dir`; `None` if there is none that is understood. Blocks.
    fn read(dir: &Path) -> Option<Self> {
        let mut bytes = Vec::new();
        let limit = MAX_RECORD as u64;
        File::open(dir.join(RECORD)).ok()?.take(limit).read_to_end(&mut bytes).ok()?;
        serde_json::from_slice(&bytes).ok().filter(|r: &Self| r.version == VERSION)
    }

    fn spared(&self) -> SparedParts {
        SparedParts {
            group: self.group.clone(),
            founder: self.founder.clone(),
            netns: self.netns.clone(),
        }
    }

    /// What there is to undo once the process in `dir` has ended.
    fn parts(&mut self, inner: &Inner, dir: PathBuf) -> Parts {
        Parts {
            prepared: Some(Prepared::left(dir, self.stubs.take(), self.trust.take())),
            netns: self.netns.as_deref().map(|name| inner.network.left(name)),
            created: false,
        }
    }
}

/// A record that is on the disk.
pub(super) struct StoredRecord(PathBuf);

impl StoredRecord {
    /// No later run goes on with the process.
    pub(super) async fn withdraw(&self) {
        let path = self.0.clone();
        let remove = move || {
            std::fs::remove_file(&path)
                .map_err(|e| Fault::io(format!("remove {}", path.display()), e))
        };
        if let Err(e) = blocking("withdraw a record", remove).await
            && !e.is_not_found()
        {
            tracing::warn!("{e}");
        }
    }
}

/// Where the process in container `id` has its directory.
fn dir_of(inner: &Inner, id: &str) -> PathBuf {
    inner.config.root.join("run").join(id)
}

/// Whether everything that a process hangs on can outlive this daemon.
pub(super) fn can_be_left(
    inner: &Inner,
    process: &ProcessSpec,
    mounts: &[ExecMount],
    io: &ProcessIo,
) -> bool {
    let has_secrets = mounts.iter().any(|m| matches!(m.source, MountSource::Content { .. }));
    is_runc(&inner.config.runtime)
        && !process.tty
        && process.proxy.is_none()
        && process.opened.is_none()
        && io.input.is_none()
        && io.control.is_none()
        && !has_secrets
}

/// Stores what a later run needs to go on with a process that was made in `slot` and has not begun.
/// One of which that fails just ends with this daemon.
pub(super) async fn store(
    inner: &Inner,
    process: &ProcessSpec,
    resumable: Resumable,
    slot: &Slot,
    parts: &Parts,
    cgroup: Option<&MemoryCgroup>,
) -> Option<StoredRecord> {
    let started = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let record = Record {
        version: VERSION,
        key: resumable.key,
        note: resumable.note,
        started: u64::try_from(started.as_millis()).unwrap_or_default(),
        group: slot.group.clone(),
        founder: slot.founder().to_owned(),
        netns: parts.netns.as_ref().map(|n| n.name().to_owned()),
        clean_network: prepare::leaves_network_clean(process),
        cgroup: cgroup.cloned(),
        stubs: parts.prepared.as_ref().and_then(|p| p.stubs.as_ref()),
        trust: parts.prepared.as_ref().and_then(|p| p.trust.as_ref()),
    };
    let bytes = serde_json::to_vec(&record).ok().filter(|b| b.len() <= MAX_RECORD)?;
    let path = dir_of(inner, &process.id).join(RECORD);
    let stored = StoredRecord(path.clone());
    let write = move || {
        let half = path.with_extension("half");
        std::fs::write(&half, bytes)
            .and_then(|()| std::fs::rename(&half, &path))
            .map_err(|e| Fault::io(format!("write {}", path.display()), e))
    };
    match blocking("record a step", write).await {
        Ok(()) => Some(stored),
        Err(e) => {
            tracing::debug!("the step will not outlive the daemon: {e}");
            None
        }
    }
}

/// What no sweep may touch, by container.
#[derive(Clone, Default)]
pub(super) struct Spared(HashMap<String, SparedParts>);

#[derive(Clone)]
struct SparedParts {
    group: String,
    founder: String,
    netns: Option<String>,
}

impl Spared {
    /// Their containers, those that hold their shims, and those that the shims are known by.
    fn ids(&self) -> impl Iterator<Item = String> + '_ {
        self.0
            .iter()
            .flat_map(|(id, parts)| [id.clone(), keeper_of(&parts.group), parts.founder.clone()])
    }

    /// Whether `id` is the container of one of them, or one that has to do with its shim.
    pub(super) fn has(&self, id: &str) -> bool {
        self.ids().any(|known| known == id)
    }

    /// Whether the name of a cgroup is one of theirs: the container's, or that of a unit of systemd
    /// with something before it.
    pub(super) fn has_cgroup(&self, name: &str) -> bool {
        let name = name.strip_suffix(".scope").unwrap_or(name);
        self.ids().filter(|id| !id.is_empty()).any(|id| {
            name.strip_suffix(&id).is_some_and(|before| before.is_empty() || before.ends_with('-'))
        })
    }

    /// Whether a network namespace is one of theirs.
    pub(super) fn has_netns(&self, name: &str) -> bool {
        self.0.values().any(|parts| parts.netns.as_deref() == Some(name))
    }

    /// Whether there is nothing.
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// A process of an earlier run, whose output is being read.
pub(super) struct Held {
    record: Record,
    stdio: Stdio,
    spool: Arc<Spool>,
}

/// Holds the processes that an earlier run left and that may be resumed.
pub(super) async fn hold(inner: &Inner) -> Result<Vec<LeftProcess>> {
    let (runs, prefix) = (inner.config.root.join("run"), inner.id_prefix.clone());
    let read = move || {
        let entries = std::fs::read_dir(&runs).into_iter().flatten().flatten();
        let ids = entries.map(|e| e.file_name().to_string_lossy().into_owned());
        let ids = ids.filter(|id| id.starts_with(&prefix) && check_id(id).is_ok());
        Ok(ids.filter_map(|id| Record::read(&runs.join(&id)).map(|r| (id, r))).collect::<Vec<_>>())
    };
    let records = blocking("look for steps that were left", read).await?;
    if records.is_empty() {
        return Ok(Vec::new());
    }
    let ours = inner.api.our_containers().await?;
    let mut left = Vec::new();
    for (id, record) in records.into_iter().filter(|(id, _)| ours.contains(id)) {
        match hold_one(inner, &id, record).await {
            Ok(Some(process)) => left.push(process),
            Ok(None) => {}
            Err(e) => tracing::debug!(container = id, "a step cannot be gone on with: {e}"),
        }
    }
    Ok(left)
}

async fn hold_one(inner: &Inner, id: &str, record: Record) -> Result<Option<LeftProcess>> {
    let dir = dir_of(inner, id);
    let open = move || {
        let spool = Spool::left(dir.join(SPOOL))?;
        let stdio = Stdio::reopen(&dir, &Destination::Spooled(spool.clone()))?;
        Ok((stdio, spool))
    };
    // Of this runtime: the pipes are the reactor's.
    let runtime = tokio::runtime::Handle::current();
    let open = move || {
        let _entered = runtime.enter();
        open()
    };
    let (stdio, spool) = blocking("open the output of a step", open).await?;
    // After the outputs are open: what ends from here on is read to its end.
    let ended_unseen = match inner.api.look_at(&ProcessRef::first(id)).await? {
        (Status::Running, _) => false,
        (Status::Stopped, _) => true,
        _ => return Ok(None),
    };
    let process = LeftProcess {
        id: id.to_owned(),
        stored: Resumable { key: record.key, note: record.note.clone() },
        started: UNIX_EPOCH + Duration::from_millis(record.started),
        ended_unseen,
    };
    inner.spared.lock().0.insert(id.to_owned(), record.spared());
    inner.held.lock().insert(id.to_owned(), Held { record, stdio, spool });
    Ok(Some(process))
}

/// Goes on with a held process and answers; like [`run::supervise`] from its start on.
pub(super) async fn supervise(
    inner: Arc<Inner>,
    process: ProcessSpec,
    output: OutputTarget,
    held: Held,
    mut answer: ExitSender,
) {
    inner.spared.lock().0.remove(&process.id);
    let Held { mut record, stdio, spool } = held;
    let (dir, place) = (dir_of(&inner, &process.id), ProcessRef::first(&process.id));
    let stored = StoredRecord(dir.join(RECORD));
    let mut parts = record.parts(&inner, dir);
    let slot = inner.shims.left(&record.group, &record.founder).await;
    let exit = Exit::of(&inner, &place);
    let ended = match spool.attach(output).await {
        Ok(()) => {
            let nothing = std::future::pending();
            exit.serve(&inner, &place, stdio, nothing, &mut answer, Some(&stored)).await
        }
        Err(e) => Err(e),
    };
    let mut result = match ended {
        Ok(Ended::Left) => return leave(&inner, process, parts, &slot),
        Ok(Ended::Exited(code)) => {
            let memory = run::settle(&mut parts, record.cgroup.take()).await;
            memory.map(|m| ExitStatus { code, oom_killed: m.oom_killed, peak_memory: m.peak })
        }
        Err(e) => Err(e),
    };
    if let Err(e) = parts.restore().await {
        result = result.and(Err(e));
    }
    let reusable = result.is_ok() && record.clean_network;
    if result.is_err() {
        stored.withdraw().await;
    }
    let cleaning = inner.cleaning.token();
    let _ = answer.send(result);
    run::clean_up(&inner, &process.id, parts, reusable, slot).await;
    drop(cleaning);
}

/// Leaves a process to a later run of the daemon.
pub(super) fn leave(inner: &Inner, process: ProcessSpec, parts: Parts, slot: &Slot) {
    let spared = SparedParts {
        group: slot.group.clone(),
        founder: slot.founder().to_owned(),
        netns: parts.netns.as_ref().map(|n| NetnsGuard::name(n).to_owned()),
    };
    tracing::info!(container = process.id, "a running step is left for the next start");
    inner.spared.lock().0.insert(process.id.clone(), spared);
    // Dropped they would undo what the process needs, its snapshots among it; and this daemon ends.
    std::mem::forget((process, parts));
}

/// Kills a held process and removes what there is of it.
pub(super) async fn abandon(inner: &Arc<Inner>, id: &str) {
    let Some(mut held) = inner.held.lock().remove(id) else { return };
    let dir = dir_of(inner, id);
    StoredRecord(dir.join(RECORD)).withdraw().await;
    let parts = held.record.parts(inner, dir);
    let slot = inner.shims.left(&held.record.group, &held.record.founder).await;
    run::clean_up(inner, id, parts, false, slot).await;
    // Its output was read to the end: the shim would else wait for that.
    drop(held);
    inner.spared.lock().0.remove(id);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spared() -> Spared {
        let parts = |netns: &str| SparedParts {
            group: "g-1".into(),
            founder: "first".into(),
            netns: Some(netns.into()),
        };
        Spared(HashMap::from([("it".to_owned(), parts("n-1"))]))
    }

    #[test]
    fn what_a_left_process_needs_is_spared_and_nothing_else() {
        let spared = spared();
        for id in ["it", "g-1-keeper", "first"] {
            assert!(spared.has(id), "{id}");
            for cgroup in [id.to_owned(), format!("shipway-{id}.scope"), format!("own-{id}.scope")]
            {
                assert!(spared.has_cgroup(&cgroup), "{cgroup}");
            }
        }
        for id in ["i", "it2", "g-1", "g-10-keeper", ""] {
            assert!(!spared.has(id) && !spared.has_cgroup(id), "{id}");
        }
        assert!(!spared.has_cgroup("split"));
        assert!(spared.has_netns("n-1") && !spared.has_netns("n-10"));
        assert!(Spared::default().is_empty() && !spared.is_empty());
    }

    #[test]
    fn a_record_is_read_back_and_what_is_none_is_not_believed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(RECORD);
        assert!(Record::read(dir.path()).is_none());
        let mut record = Record::<&Stubs, &Trust> {
            version: VERSION,
            key: Digest::of("k"),
            note: "{}".into(),
            started: 7,
            group: "g".into(),
            founder: "f".into(),
            netns: None,
            clean_network: true,
            cgroup: None,
            stubs: None,
            trust: None,
        };
        let write = |record: &Record<&Stubs, &Trust>| {
            std::fs::write(&path, serde_json::to_vec(record).unwrap()).unwrap();
        };
        write(&record);
        let read = Record::read(dir.path()).unwrap();
        assert_eq!((read.key, read.note.as_str(), read.started), (Digest::of("k"), "{}", 7));
        record.version = VERSION + 1;
        write(&record);
        assert!(Record::read(dir.path()).is_none(), "another version's");
        record.version = VERSION;
        record.note = "x".repeat(MAX_RECORD);
        write(&record);
        assert!(Record::read(dir.path()).is_none(), "too large");
        std::fs::write(&path, "{").unwrap();
        assert!(Record::read(dir.path()).is_none());
    }
}
