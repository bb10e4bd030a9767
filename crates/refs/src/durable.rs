//! What a power cut takes. Of a snapshot's files the kernel may have written nothing yet, though
//! containerd's own record of it, and ours, are on the disk: after a cut such a snapshot has its
//! name and short files.
//!
//! No commit waits for the disk. A committed snapshot bears the boot and the number of the period
//! in which it was committed; some seconds later its file system is synced, and a small file says
//! which periods that covers. At a start after another boot, what is of a later period is removed
//! before it can be used. A start after the same boot finds the kernel's caches whole, however the
//! daemon ended.

use parking_lot::Mutex;
use rustix::fs::{Mode, OFlags};
use serde::{Deserialize, Serialize};
use shipway_fault::{Code, Fault, Result};
use shipway_storage::{Labels, Mount, SnapshotKey};
use shipway_task::{blocking, spawn};
use std::{
    collections::{HashMap, HashSet},
    fs,
    io::{self, Write as _},
    os::{fd::OwnedFd, unix::fs::MetadataExt},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};
use tokio::sync::Notify;

/// Label of a committed snapshot: boot and period.
const WRITTEN: &str = "shipway/written";
/// How long what was committed waits for its sync; a cut loses no more builds than were done in
/// this time.
const PERIOD: Duration = Duration::from_secs(10);
/// Between the periods of two runs in one boot, so that none is used twice.
const PERIODS_PER_RUN: u64 = 1 << 32;
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// The name of the machine's present boot.
pub(crate) fn boot_id() -> Result<String> {
    let id = fs::read_to_string(BOOT_ID).map_err(|e| Fault::io(format!("read {BOOT_ID}"), e))?;
    Ok(id.trim().to_owned())
}

/// What the file says.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct SyncState {
    boot: String,
    /// Last period that is on the disk.
    synced: u64,
    /// Whether everything is, because the daemon shut down cleanly and nothing was written since.
    clean: bool,
    /// Snapshots that should be gone and that others use.
    lost: HashSet<String>,
}

/// Keeps account of what is on the disk.
pub(crate) struct Durable {
    file: PathBuf,
    boot: String,
    before: Option<SyncState>,
    now: Mutex<Unsynced>,
    /// Held while the file is written.
    mark: tokio::sync::Mutex<SyncState>,
    /// Snapshots that must not be used.
    lost: Mutex<HashSet<SnapshotKey>>,
    wake: Arc<Notify>,
}

struct Unsynced {
    period: u64,
    /// Where something was written in it: a path for each device.
    places: HashMap<u64, PathBuf>,
}

impl Durable {
    /// Reads what the last run left in `file`.
    pub fn open(file: PathBuf, boot: &str) -> Result<Arc<Self>> {
        let before: Option<SyncState> = match fs::read(&file) {
            // One that cannot be understood promises nothing.
            Ok(text) => serde_json::from_slice(&text).ok(),
            Err(e) if e.kind() == io::ErrorKind::NotFound => None,
            Err(e) => return Err(Fault::io(format!("read {}", file.display()), e)),
        };
        let mark = match &before {
            Some(mark) if mark.boot == boot => SyncState { clean: false, ..mark.clone() },
            _ => SyncState { boot: boot.to_owned(), ..SyncState::default() },
        };
        let lost = before.iter().flat_map(|m| &m.lost).map(|k| SnapshotKey(k.clone())).collect();
        let now = Unsynced {
            period: (mark.synced / PERIODS_PER_RUN + 1) * PERIODS_PER_RUN,
            places: HashMap::new(),
        };
        let durable = Arc::new(Self {
            file,
            boot: boot.to_owned(),
            before,
            now: Mutex::new(now),
            mark: tokio::sync::Mutex::new(mark),
            lost: Mutex::new(lost),
            wake: Arc::default(),
        });
        Ok(durable)
    }

    /// Whether a committed snapshot with these labels may be short since the last start of the
    /// machine.
    pub fn is_lost(&self, key: &SnapshotKey, labels: &Labels) -> bool {
        if self.lost.lock().contains(key) {
            return true;
        }
        let Some((boot, period)) = labels.get(WRITTEN).and_then(|w| w.rsplit_once('.')) else {
            return false;
        };
        match &self.before {
            _ if boot == self.boot => false,
            None => true,
            // Those of earlier boots have been looked through at earlier starts.
            Some(mark) => {
                boot == mark.boot && !mark.clean && period.parse().unwrap_or(u64::MAX) > mark.synced
            }
        }
    }

    /// Whether what is written without a commit may be short.
    pub fn was_cut(&self) -> bool {
        self.before.as_ref().is_none_or(|m| m.boot != self.boot && !m.clean)
    }

    /// An error for a snapshot that may be short and could not be removed.
    pub fn check(&self, key: &SnapshotKey) -> Result<()> {
        if !self.lost.lock().contains(key) {
            return Ok(());
        }
        let what = format!(
            "the snapshot {key} was not on the disk yet when the machine lost power, and something still uses it"
        );
        Err(Fault::new(Code::FailedPrecondition, what)
            .hint("remove the containers that were made of it, and start the daemon again"))
    }

    /// Begins this run: `lost` is what could not be removed.
    pub async fn begin(self: &Arc<Self>, lost: HashSet<SnapshotKey>) -> Result<()> {
        let mut mark = self.mark.lock().await;
        mark.lost = lost.iter().map(|k| k.0.clone()).collect();
        *self.lost.lock() = lost;
        self.write(&mark).await?;
        let (durable, wake) = (Arc::downgrade(self), self.wake.clone());
        spawn("sync snapshots", async move {
            loop {
                wake.notified().await;
                if durable.strong_count() == 0 {
                    return;
                }
                tokio::time::sleep(PERIOD).await;
                let Some(durable) = durable.upgrade() else { return };
                if let Err(e) = durable.sync(false).await {
                    tracing::warn!(error = %e, "failed to sync snapshots to disk, will retry");
                    durable.wake.notify_one();
                }
            }
        });
        Ok(())
    }

    /// The labels of a snapshot that is committed next, whose files were written through `mounts`.
    pub fn labels(&self, mounts: &[Mount]) -> Labels {
        let mut now = self.now.lock();
        for dir in mounts.iter().filter_map(Mount::writable_dir) {
            if let Ok(meta) = fs::metadata(dir) {
                now.places.insert(meta.dev(), dir.to_owned());
            }
        }
        self.wake.notify_one();
        Labels::from([(WRITTEN.into(), format!("{}.{}", self.boot, now.period))])
    }

    /// Writes to the disk what was committed so far; `clean` if nothing more will be.
    pub async fn sync(&self, clean: bool) -> Result<()> {
        let mut mark = self.mark.lock().await;
        let (period, places) = {
            let mut now = self.now.lock();
            now.period += 1;
            (now.period - 1, std::mem::take(&mut now.places))
        };
        if places.is_empty() && !clean {
            return Ok(());
        }
        let paths = places.clone();
        let sync = move || {
            let synced = paths.iter().try_for_each(|(device, path)| sync_device(*device, path));
            synced.map_err(|e| Fault::io("sync the snapshots", e))
        };
        if let Err(e) = blocking("sync snapshots", sync).await {
            self.now.lock().places.extend(places);
            return Err(e);
        }
        (mark.synced, mark.clean) = (period, clean);
        self.write(&mark).await
    }

    async fn write(&self, mark: &SyncState) -> Result<()> {
        let (text, file) = (
            serde_json::to_vec(mark).map_err(|e| Fault::internal(e.to_string()))?,
            self.file.clone(),
        );
        let write = move || {
            write_synced(&file, &text)
                .map_err(|e| Fault::io(format!("write {}", file.display()), e))
        };
        blocking("write to the disk", write).await
    }
}

impl Drop for Durable {
    fn drop(&mut self) {
        self.wake.notify_one();
    }
}

/// Syncs the file system `device`, which something at `path` was on. One that is not there any more
/// was written when it was unmounted.
fn sync_device(device: u64, path: &Path) -> io::Result<()> {
    // What was written may have been removed since.
    let there = path.ancestors().find(|p| fs::metadata(p).is_ok_and(|m| m.dev() == device));
    let Some(there) = there else { return Ok(()) };
    Ok(rustix::fs::syncfs(open_dir(there)?)?)
}

fn open_dir(path: &Path) -> io::Result<OwnedFd> {
    Ok(rustix::fs::open(path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?)
}

/// Replaces `file` as a whole, for good.
fn write_synced(file: &Path, text: &[u8]) -> io::Result<()> {
    let dir = file.parent().unwrap_or(Path::new("."));
    let new = file.with_extension("new");
    let mut made = fs::File::create(&new)?;
    made.write_all(text)?;
    made.sync_all()?;
    fs::rename(&new, file)?;
    Ok(rustix::fs::fsync(open_dir(dir)?)?)
}
