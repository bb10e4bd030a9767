//! Snapshots of the fake: directories, copied from their parents, shared by namespaces.

use super::{FakeStorage, SNAPSHOTTER, SnapshotState, State, filter::Filters, relabel};
use crate::{
    ContentStore, Labels, LeaseId, LeaseResource, Mount, SNAPSHOT_REF, SnapshotInfo, SnapshotKey,
    SnapshotKind, Snapshotter, Usage,
};
use async_trait::async_trait;
use shipway_fault::{Code, Fault, Result};
use shipway_oci::{Descriptor, DiffId, Digest};
use std::{
    fs::Permissions,
    io::Write as _,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Arc,
};

/// The directory of a snapshot, which goes with its last name.
pub(super) struct SnapshotDir(PathBuf);

impl std::ops::Deref for SnapshotDir {
    type Target = Path;

    fn deref(&self) -> &Path {
        &self.0
    }
}

impl Drop for SnapshotDir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn missing(key: &SnapshotKey) -> Fault {
    Fault::not_found(format!("snapshot {:?} does not exist", key.0))
}

fn exists(key: &SnapshotKey) -> Fault {
    Fault::new(Code::AlreadyExists, format!("snapshot {:?} exists", key.0))
}

fn info(key: &SnapshotKey, snapshot: &SnapshotState) -> SnapshotInfo {
    SnapshotInfo {
        key: key.clone(),
        parent: snapshot.parent.clone(),
        kind: snapshot.kind,
        labels: snapshot.labels.clone(),
    }
}

fn mounts(snapshot: &SnapshotState) -> Vec<Mount> {
    vec![Mount::bind(&**snapshot.dir, snapshot.kind != SnapshotKind::Active)]
}

impl FakeStorage {
    fn start(
        &self,
        lease: &LeaseId,
        key: &SnapshotKey,
        parent: Option<&SnapshotKey>,
        labels: &Labels,
        kind: SnapshotKind,
    ) -> Result<Vec<Mount>> {
        let wanted = labels.get(SNAPSHOT_REF).map(|name| SnapshotKey(name.clone()));
        let shared = wanted.as_ref().and_then(|name| self.0.peers.snapshot(name, parent));
        let mut state = self.state();
        state.known(lease)?;
        if let Some(name) = wanted.filter(|name| state.snapshots.contains_key(name)) {
            return Err(exists(&name));
        }
        if state.snapshots.contains_key(key) {
            return Err(exists(key));
        }
        let from = match parent {
            None => None,
            Some(parent) => {
                let snapshot = state.snapshots.get(parent).ok_or_else(|| missing(parent))?;
                if snapshot.kind != SnapshotKind::Committed {
                    return Err(Fault::new(
                        Code::FailedPrecondition,
                        format!("parent {:?} is not committed", parent.0),
                    ));
                }
                Some(snapshot.dir.clone())
            }
        };
        // One transaction before the snapshotter is asked, one after.
        state.committed(2);
        if let Some((name, snapshot)) = shared {
            state.snapshots.insert(name.clone(), snapshot);
            state.keep(lease, LeaseResource::Snapshot(SNAPSHOTTER.into(), name.clone()))?;
            return Err(exists(&name));
        }
        state.next += 1;
        let dir = self.0.root.path().join(state.next.to_string());
        let made = std::fs::create_dir(&dir)
            .and_then(|()| std::fs::set_permissions(&dir, Permissions::from_mode(0o755)));
        made.map_err(|e| Fault::io("make a snapshot's directory", e))?;
        if let Some(from) = from {
            run(Command::new("cp").arg("-a").arg(from.join(".")).arg(&dir), None)?;
        }
        let dir = Arc::new(SnapshotDir(dir));
        let snapshot = SnapshotState { parent: parent.cloned(), kind, labels: labels.clone(), dir };
        let mounts = mounts(&snapshot);
        state.snapshots.insert(key.clone(), snapshot);
        state.keep(lease, LeaseResource::Snapshot(SNAPSHOTTER.into(), key.clone()))?;
        Ok(mounts)
    }
}

#[async_trait]
impl Snapshotter for FakeStorage {
    fn name(&self) -> &str {
        SNAPSHOTTER
    }

    async fn stat(&self, key: &SnapshotKey) -> Result<SnapshotInfo> {
        self.state().snapshots.get(key).map(|s| info(key, s)).ok_or_else(|| missing(key))
    }

    async fn prepare(
        &self,
        lease: &LeaseId,
        key: &SnapshotKey,
        parent: Option<&SnapshotKey>,
        labels: &Labels,
    ) -> Result<Vec<Mount>> {
        self.start(lease, key, parent, labels, SnapshotKind::Active)
    }

    async fn view(
        &self,
        lease: &LeaseId,
        key: &SnapshotKey,
        parent: Option<&SnapshotKey>,
        labels: &Labels,
    ) -> Result<Vec<Mount>> {
        self.start(lease, key, parent, labels, SnapshotKind::View)
    }

    async fn mounts(&self, key: &SnapshotKey) -> Result<Vec<Mount>> {
        match self.state().snapshots.get(key) {
            Some(s) if s.kind != SnapshotKind::Committed => Ok(mounts(s)),
            // containerd says the same of committed ones: they have no mounts.
            _ => Err(missing(key)),
        }
    }

    async fn commit(
        &self,
        lease: &LeaseId,
        name: &SnapshotKey,
        key: &SnapshotKey,
        labels: &Labels,
    ) -> Result<()> {
        let mut state = self.state();
        state.keep(lease, LeaseResource::Snapshot(SNAPSHOTTER.into(), name.clone()))?;
        if state.snapshots.contains_key(name) {
            return Err(exists(name));
        }
        match state.snapshots.get(key).map(|s| s.kind) {
            None => return Err(missing(key)),
            Some(SnapshotKind::Active) => {}
            Some(kind) => {
                return Err(Fault::new(
                    Code::FailedPrecondition,
                    format!("snapshot {:?} is {kind:?}, not active", key.0),
                ));
            }
        }
        if let Some(mut snapshot) = state.snapshots.remove(key) {
            // Labels given at Prepare are not inherited.
            snapshot.labels = labels.clone();
            snapshot.kind = SnapshotKind::Committed;
            state.snapshots.insert(name.clone(), snapshot);
            state.committed(1);
        }
        Ok(())
    }

    async fn remove(&self, key: &SnapshotKey) -> Result<()> {
        let mut state = self.state();
        match state.snapshots.get(key).map(|s| s.kind) {
            None => return Err(missing(key)),
            Some(SnapshotKind::Committed) => {
                return Err(Fault::internal(format!(
                    "committed snapshot {:?} goes with its leases, never directly",
                    key.0
                )));
            }
            Some(_) => {}
        }
        state.snapshots.remove(key);
        state.committed(1);
        Ok(())
    }

    async fn update_labels(&self, key: &SnapshotKey, labels: &Labels) -> Result<()> {
        let mut state = self.state();
        let snapshot = state.snapshots.get_mut(key).ok_or_else(|| missing(key))?;
        relabel(&mut snapshot.labels, labels);
        state.committed(1);
        Ok(())
    }

    async fn usage(&self, key: &SnapshotKey) -> Result<Usage> {
        let (dir, parent) = {
            let state = self.state();
            let snapshot = state.snapshots.get(key).ok_or_else(|| missing(key))?;
            (snapshot.dir.clone(), parent_dir(&state, snapshot))
        };
        let own = measure(&dir)?;
        let below = parent.map(|p| measure(&p)).transpose()?.unwrap_or_default();
        Ok(Usage {
            bytes: own.bytes.saturating_sub(below.bytes),
            inodes: own.inodes.saturating_sub(below.inodes),
        })
    }

    async fn list(&self, filters: &[String]) -> Result<Vec<SnapshotInfo>> {
        let filters = Filters::parse(filters)?;
        let state = self.state();
        let all = state.snapshots.iter().filter(|(key, s)| {
            let field = |f: &str| match f {
                "name" => Some(key.0.clone()),
                "parent" => s.parent.as_ref().map(|p| p.0.clone()),
                "kind" => Some(format!("{:?}", s.kind)),
                _ => None,
            };
            filters.matches(&field, &s.labels)
        });
        Ok(all.map(|(key, s)| info(key, s)).collect())
    }

    async fn apply(&self, layer: &Descriptor, mounts: &[Mount]) -> Result<DiffId> {
        let blob = self.read_all(layer.digest, layer.size).await?;
        let target = match mounts {
            [Mount::Bind(bind)] => bind.source.clone(),
            _ => {
                return Err(Fault::invalid(format!("not mounts of the fake: {mounts:?}")));
            }
        };
        let tar = match blob.get(..4) {
            Some([0x1f, 0x8b, ..]) => run(Command::new("gzip").arg("-dc"), Some(&blob))?,
            Some([0x28, 0xb5, 0x2f, 0xfd]) => run(Command::new("zstd").arg("-dc"), Some(&blob))?,
            _ => blob.to_vec(),
        };
        unpack(&tar, &target)?;
        Ok(DiffId(Digest::of(&tar)))
    }
}

fn parent_dir(state: &State, snapshot: &SnapshotState) -> Option<Arc<SnapshotDir>> {
    state.snapshots.get(snapshot.parent.as_ref()?).map(|p| p.dir.clone())
}

fn measure(dir: &Path) -> Result<Usage> {
    let fault = |e| Fault::io(format!("measure {}", dir.display()), e);
    let mut usage = Usage { bytes: 0, inodes: 1 };
    for entry in std::fs::read_dir(dir).map_err(fault)? {
        let entry = entry.map_err(fault)?;
        let metadata = entry.metadata().map_err(fault)?;
        if metadata.is_dir() {
            let below = measure(&entry.path())?;
            usage.bytes += below.bytes;
            usage.inodes += below.inodes;
        } else {
            usage.bytes += metadata.size();
            usage.inodes += 1;
        }
    }
    Ok(usage)
}

/// Whiteouts first (they are about the layers below), then the files.
fn unpack(tar: &[u8], target: &Path) -> Result<()> {
    let names = run(Command::new("tar").args(["-tf", "-"]), Some(tar))?;
    for name in String::from_utf8_lossy(&names).lines() {
        let path = Path::new(name.trim_end_matches('/'));
        let Some(base) = path.file_name().and_then(|f| f.to_str()) else { continue };
        let dir = target.join(
            path.parent()
                .unwrap_or(Path::new(""))
                .strip_prefix("/")
                .unwrap_or(path.parent().unwrap_or(Path::new(""))),
        );
        if base == ".wh..wh..opq" {
            let _ = std::fs::remove_dir_all(&dir);
            std::fs::create_dir_all(&dir)
                .map_err(|e| Fault::io(format!("make {}", dir.display()), e))?;
        } else if let Some(gone) = base.strip_prefix(".wh.") {
            let gone = dir.join(gone);
            let _ = std::fs::remove_file(&gone).or_else(|_| std::fs::remove_dir_all(&gone));
        }
    }
    let fault = |e| Fault::io(format!("keep {}", target.display()), e);
    let root = std::fs::metadata(target).map_err(fault)?;
    let mut extract = Command::new("tar");
    extract.args([
        "-xf",
        "-",
        "--numeric-owner",
        "--same-permissions",
        "--xattrs",
        "--xattrs-include=*",
        "--exclude=.wh.*",
        "-C",
    ]);
    run(extract.arg(target), Some(tar))?;
    // containerd passes over entries of the root.
    std::fs::set_permissions(target, root.permissions()).map_err(fault)?;
    std::os::unix::fs::chown(target, Some(root.uid()), Some(root.gid())).map_err(fault)
}

/// Runs a program of the system with `input` on its standard input and gives what it printed.
fn run(command: &mut Command, input: Option<&[u8]>) -> Result<Vec<u8>> {
    let what = format!("run {:?}", command.get_program());
    let stdin = if input.is_some() { Stdio::piped() } else { Stdio::null() };
    let mut child = command
        .stdin(stdin)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|e| Fault::io(what.clone(), e))?;
    let output = std::thread::scope(|scope| {
        if let (Some(input), Some(mut pipe)) = (input, child.stdin.take()) {
            scope.spawn(move || pipe.write_all(input));
        }
        child.wait_with_output()
    });
    let output = output.map_err(|e| Fault::io(what.clone(), e))?;
    if !output.status.success() {
        return Err(Fault::unknown(format!(
            "{what}: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        )));
    }
    Ok(output.stdout)
}
