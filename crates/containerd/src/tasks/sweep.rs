//! Owns the removal of what an earlier run left, or what a call that failed did: containers by
//! label, network namespaces, directories and mounts by place, and by name what containerd itself
//! lost.

use super::{Inner, orphans, prepare::remove_flat};
use futures::StreamExt;
use rustix::{
    fd::OwnedFd,
    fs::{Mode, OFlags},
};
use shipway_fault::Result;
use shipway_rootfs::mounts_below;
use shipway_task::blocking;
use std::{os::unix::fs::FileTypeExt, path::Path, time::Duration};

const AT_ONCE: usize = 8;
/// How long shims are given to end what they run.
const PATIENCE: Duration = Duration::from_secs(1);

/// Removes it all; fails if a container resists, because its snapshot would too. No process of this
/// run may run meanwhile.
pub(super) async fn sweep(inner: &Inner) -> Result<()> {
    // A shim that opens an output without a reader waits for one, and everything else waits
    // for the shim.
    let runs = inner.config.root.join("run");
    let outputs = blocking("open outputs", move || Ok(outputs(&runs))).await.unwrap_or_default();
    let destroyed = containers(inner).await;
    drop(outputs);
    inner.network.sweep().await?;
    let root = inner.config.root.clone();
    let clean = move || {
        for place in ["run", "secret"] {
            unmount_below(&root.join(place));
            for entry in std::fs::read_dir(root.join(place)).into_iter().flatten().flatten() {
                remove_flat(&entry.path());
            }
        }
        Ok(())
    };
    blocking("clean the executor's directory", clean).await?;
    destroyed
}

/// Removes our containers, whatever they are in the middle of.
pub(super) async fn containers(inner: &Inner) -> Result<()> {
    let ids = inner.api.our_containers().await?;
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
    let on_host = |work: fn(&str, &str)| {
        let (namespace, id_prefix) = (inner.api.namespace().to_owned(), inner.id_prefix.clone());
        blocking("remove orphans of containers", move || {
            work(&namespace, &id_prefix);
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
    for sandbox in inner.api.our_sandboxes().await? {
        inner.api.delete_sandbox(&sandbox).await?;
    }
    Ok(())
}

/// The reading ends of all outputs in `dir`.
fn outputs(dir: &Path) -> Vec<OwnedFd> {
    let below = |dir: &Path| {
        std::fs::read_dir(dir).into_iter().flatten().flatten().map(|e| e.path()).collect::<Vec<_>>()
    };
    let files = below(dir).into_iter().flat_map(|d| below(&d));
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
