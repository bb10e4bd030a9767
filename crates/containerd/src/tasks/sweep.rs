//! Owns the removal of what an earlier run left, or what a call that failed did: containers by
//! label, network namespaces, directories and mounts by place, and by name what containerd itself
//! lost.

use super::{
    Inner,
    left::{self, Spared},
    orphans,
    prepare::remove_flat,
};
use futures::StreamExt;
use rustix::{
    fd::OwnedFd,
    fs::{Mode, OFlags},
};
use shipway_executor::LeftProcess;
use shipway_fault::Result;
use shipway_rootfs::mounts_below;
use shipway_task::blocking;
use std::{
    os::unix::fs::FileTypeExt,
    path::{Path, PathBuf},
    time::Duration,
};

const AT_ONCE: usize = 8;
/// How long shims are given to end what they run.
const PATIENCE: Duration = Duration::from_secs(1);

/// Removes it all but what may be resumed, which is returned; fails if a container resists, because
/// its snapshot would too. No process of this run may run meanwhile.
pub(super) async fn sweep(inner: &Inner) -> Result<Vec<LeftProcess>> {
    let left = left::hold(inner).await?;
    let spared = inner.spared.lock().clone();
    // A shim that opens an output without a reader waits for one, and everything else waits
    // for the shim.
    let (runs, of_others) = (inner.config.root.join("run"), spared.clone());
    let open = move || Ok(outputs(&runs, &of_others));
    let outputs = blocking("open outputs", open).await.unwrap_or_default();
    let destroyed = containers(inner).await;
    drop(outputs);
    inner.network.sweep(|name| spared.has_netns(name)).await?;
    let root = inner.config.root.clone();
    let clean = move || {
        for place in ["run", "secret"] {
            for entry in unspared(&root.join(place), &spared) {
                unmount_below(&entry);
                remove_flat(&entry);
            }
        }
        Ok(())
    };
    blocking("clean the executor's directory", clean).await?;
    destroyed.map(|()| left)
}

/// Removes our containers, whatever they are in the middle of, but for those that are spared.
pub(super) async fn containers(inner: &Inner) -> Result<()> {
    let spared = inner.spared.lock().clone();
    let mut ids = inner.api.our_containers().await?;
    ids.retain(|id| !spared.has(id));
    let each = |delete: bool| {
        let one = move |id: &String| {
            let id = id.clone();
            async move {
                inner.api.end_task(&id).await?;
                if delete { inner.api.delete_container(&id).await } else { Ok(()) }
            }
        };
        futures::stream::iter(ids.iter().map(one).collect::<Vec<_>>())
            .buffer_unordered(AT_ONCE)
            .collect::<Vec<Result<()>>>()
    };
    let on_host = |work: fn(&str, &str, &Spared)| {
        let (namespace, id_prefix) = (inner.api.namespace().to_owned(), inner.id_prefix.clone());
        let spared = spared.clone();
        blocking("remove orphans of containers", move || {
            work(&namespace, &id_prefix, &spared);
            Ok(())
        })
    };
    // Records go last: with them containerd would forget where the tasks are that it is still
    // making.
    let mut tasks = std::pin::pin!(each(false));
    if tokio::time::timeout(PATIENCE, &mut tasks).await.is_err() {
        // A shim whose creation of a container was cut off may wait for ten seconds for output that
        // cannot come.
        let _ = on_host(orphans::end_shims).await;
        let _ = tasks.await;
    }
    on_host(orphans::remove).await?;
    each(true).await.into_iter().collect::<Result<()>>()?;
    for sandbox in inner.api.our_sandboxes().await?.iter().filter(|id| !spared.has(id)) {
        inner.api.delete_sandbox(sandbox).await?;
    }
    Ok(())
}

/// What is in `dir` and belongs to no container that is spared.
fn unspared(dir: &Path, spared: &Spared) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let others = entries.filter(|e| !spared.has(&e.file_name().to_string_lossy()));
    others.map(|e| e.path()).collect()
}

/// The reading ends of all outputs in `dir`.
fn outputs(dir: &Path, spared: &Spared) -> Vec<OwnedFd> {
    let files = unspared(dir, spared).into_iter().flat_map(|d| unspared(&d, spared));
    let fifos =
        files.filter(|f| std::fs::symlink_metadata(f).is_ok_and(|m| m.file_type().is_fifo()));
    fifos
        .filter_map(|f| {
            rustix::fs::open(&f, OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty())
                .ok()
        })
        .collect()
}

/// Unmounts everything at and below `dir`, the innermost first.
pub(crate) fn unmount_below(dir: &Path) {
    let points = mounts_below(dir).unwrap_or_else(|e| {
        tracing::warn!(dir = %dir.display(), "failed to find mounts that were left: {e}");
        Vec::new()
    });
    for point in points {
        let flags = rustix::mount::UnmountFlags::DETACH | rustix::mount::UnmountFlags::NOFOLLOW;
        if let Err(e) = rustix::mount::unmount(&point, flags) {
            tracing::warn!("failed to unmount {}: {e}", point.display());
        }
    }
}
