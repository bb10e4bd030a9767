//! What a build restores into its cache mounts, and what it used of them for those that save.
//!
//! A mount is restored when a step first uses it, and only where this machine has none of its key.
//! Whatever fails is a warning of the step, and its mount begins empty.

use futures::future::BoxFuture;
use parking_lot::Mutex;
use rustix::{
    fd::{AsFd as _, AsRawFd as _, OwnedFd},
    fs::{Mode, OFlags},
};
use shipway_cachemounts::{Archive, Place, Request, Restored};
use shipway_fault::{Code, Fault, Result};
use shipway_gocompat::path::rooted;
use shipway_progress::Reporter;
use shipway_refs::{Filling, LocalMount, NamedRef, NamedRequest, RecordType, RefStore};
use shipway_rootfs::{open_directory, open_in_root};
use std::{
    collections::BTreeMap,
    fmt,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::sync::OnceCell;

/// Opens a place that a build restores from, with the build's credentials.
pub trait OpenPlace: Send + Sync {
    /// The place.
    fn open(&self) -> BoxFuture<'_, Result<Arc<dyn Place>>>;
}

/// A place to restore from.
pub struct MountSource {
    request: Request,
    place: Box<dyn OpenPlace>,
    /// What was found there, once a step asked.
    found: OnceCell<Option<Archive>>,
    /// How long it took so far.
    spent: Mutex<Duration>,
}

impl MountSource {
    /// The place of `request`, which is opened when a step needs it.
    pub fn new(request: Request, place: Box<dyn OpenPlace>) -> Self {
        Self { request, place, found: OnceCell::new(), spent: Mutex::default() }
    }

    /// What is left of the time that it may take.
    fn left(&self) -> Duration {
        self.request.limits.timeout.saturating_sub(*self.spent.lock())
    }

    /// `work`, for as long as there is time.
    async fn within<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        let (begun, left) = (Instant::now(), self.left());
        let done = tokio::time::timeout(left, work).await;
        *self.spent.lock() += begun.elapsed();
        done.unwrap_or_else(|_| {
            let limit = self.request.limits.timeout.as_secs();
            Err(Fault::new(Code::DeadlineExceeded, format!("it took more than {limit} s"))
                .hint("give it more time with timeout=10m"))
        })
    }

    /// What is at the place. A failure is reported once, and then there is nothing.
    async fn archive(&self, reporter: &Reporter) -> Option<&Archive> {
        let find = async {
            let place = self.place.open().await?;
            Archive::find(&place, &self.request.keys).await
        };
        let found = self.found.get_or_init(|| async {
            match self.within(find).await {
                Ok(Some(archive)) => Some(archive),
                Ok(None) => {
                    let text = format!("no cache mounts in {} yet", self.request.shown());
                    reporter.status(text, 0, 0, true);
                    None
                }
                Err(fault) => {
                    warn(reporter, &format!("cache mounts from {}", self.request.shown()), &fault);
                    None
                }
            }
        });
        found.await.as_ref()
    }
}

/// A cache mount that steps of a build used.
#[derive(Clone, Debug)]
pub struct UsedMount {
    /// What it is called in what is saved.
    pub name: MountName,
    /// How it is taken.
    pub request: NamedRequest,
    /// The part of it that steps see.
    selector: String,
}

/// The name of a cache mount in what is saved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountName {
    /// Its id in the graph.
    pub id: String,
    /// With what it shows, if it begins as something other than an empty directory.
    pub full: String,
}

impl MountName {
    pub(crate) fn new(id: &str, selector: &str, begins_with: bool) -> Self {
        let full = if begins_with { format!("{id}:{}", rooted(selector)) } else { id.to_owned() };
        Self { id: id.to_owned(), full }
    }
}

impl fmt::Display for MountName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // As it is in the Dockerfile.
        f.write_str(self.full.strip_prefix('/').unwrap_or(&self.full))
    }
}

/// The directory of a cache mount that is saved or restored. What it holds keeps it there.
pub struct MountDir<T> {
    /// Below the state's own mount, through no link out of it.
    fd: OwnedFd,
    mount: LocalMount,
    state: T,
}

impl<T> MountDir<T> {
    /// The part `selector` of `mount`, which shows `state`.
    fn open(mount: LocalMount, selector: &str, state: T) -> Result<Self> {
        let failed = |e: rustix::io::Errno| Fault::io(format!("open {selector}"), e.into());
        let root = open_directory(mount.path()).map_err(failed)?;
        let flags = OFlags::PATH | OFlags::DIRECTORY;
        let fd = open_in_root(root.as_fd(), selector, flags, Mode::empty()).map_err(failed)?;
        Ok(Self { fd, mount, state })
    }

    /// A path of it that is good while this lives.
    pub fn path(&self) -> PathBuf {
        format!("/proc/self/fd/{}", self.fd.as_raw_fd()).into()
    }

    /// The state, unmounted.
    async fn close(self) -> Result<T> {
        let Self { fd, mount, state } = self;
        drop(fd);
        mount.unmount().await?;
        Ok(state)
    }
}

impl UsedMount {
    /// The mount as a directory, if there is one still. It is taken as steps take it, so that those
    /// that want it alone have it alone.
    pub async fn dir(&self, refs: &RefStore) -> Result<Option<MountDir<NamedRef>>> {
        let request = self.request.clone();
        if !refs.has_named(request.record_type, &request.key) {
            return Ok(None);
        }
        let named = refs.named(request).await?;
        if named.is_fresh() {
            // It was pruned meanwhile.
            named.discard().await?;
            return Ok(None);
        }
        let mount = named.mount().await?;
        MountDir::open(mount, &self.selector, named).map(Some)
    }
}

/// What one build does with contents of its cache mounts besides using them. Clones share it.
#[derive(Clone, Default)]
pub struct CacheMounts(Arc<Inner>);

#[derive(Default)]
struct Inner {
    sources: Vec<MountSource>,
    /// Cache mounts that steps used, by key.
    used: Mutex<BTreeMap<String, UsedMount>>,
}

impl CacheMounts {
    /// Those of a build that restores from `sources`, the first that has a mount.
    pub fn new(sources: Vec<MountSource>) -> Self {
        Self(Arc::new(Inner { sources, used: Mutex::default() }))
    }

    /// What steps used so far.
    pub fn used(&self) -> Vec<UsedMount> {
        self.0.used.lock().values().cloned().collect()
    }

    /// Notes that a step uses a mount.
    pub(crate) fn note(&self, name: &MountName, selector: &str, request: &NamedRequest) {
        let (name, selector) = (name.clone(), selector.to_owned());
        // Nothing is made of it again.
        let request = NamedRequest { parent: None, ..request.clone() };
        let make = || UsedMount { name, request: request.clone(), selector };
        self.0.used.lock().entry(request.key.clone()).or_insert_with(make);
    }

    /// Restores the mount that `request` asks for, if there is none here and a place has it.
    pub(crate) async fn restore(
        &self,
        refs: &RefStore,
        name: &MountName,
        selector: &str,
        request: &NamedRequest,
        reporter: &Reporter,
    ) {
        for source in self.0.sources.iter().filter(|s| s.request.limits.has(&name.id)) {
            if refs.has_named(RecordType::CacheMount, &request.key) {
                return;
            }
            let Some(archive) = source.archive(reporter).await else { continue };
            if archive.mount(&name.full).is_none() {
                continue;
            }
            let status = format!("restoring cache mount {name} from {}", archive.name());
            reporter.status(&status, 0, 0, false);
            let done = source.within(restored(refs, archive, source, name, selector, request));
            match done.await {
                Ok(Some(done)) => {
                    let bytes = i64::try_from(done.bytes).unwrap_or(i64::MAX);
                    reporter.status(&status, bytes, bytes, true);
                    return;
                }
                // Another build was faster.
                Ok(None) => reporter.status(&status, 0, 0, true),
                Err(fault) => {
                    reporter.status(&status, 0, 0, true);
                    warn(reporter, &format!("the cache mount {name}"), &fault);
                }
            }
        }
    }
}

async fn restored(
    refs: &RefStore,
    archive: &Archive,
    source: &MountSource,
    name: &MountName,
    selector: &str,
    request: &NamedRequest,
) -> Result<Option<Restored>> {
    let Some(filling) = refs.fill_named(request.clone()).await? else { return Ok(None) };
    let mount = filling.mount().await?;
    // Held by what writes, so that the directory is there as long as it does.
    let dir: MountDir<Filling> = MountDir::open(mount, selector, filling)?;
    let limits = &source.request.limits;
    let done = shipway_cachemounts::restore(archive, &name.full, dir.path(), dir, limits).await?;
    let Some((restored, dir)) = done else { return Ok(None) };
    dir.close().await?.done().await?;
    Ok(Some(restored))
}

fn warn(reporter: &Reporter, what: &str, fault: &Fault) {
    tracing::info!(error = %fault, what, "failed to restore");
    reporter.warn_of(format!("{what} not restored: {fault}"), fault);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_that_begins_with_something_has_another_name() {
        let name = |selector, nested| MountName::new("id", selector, nested).full;
        assert_eq!(name("/", false), "id");
        assert_eq!(name("cache", true), "id:/cache");
        assert_eq!(name("", true), "id:/");
        assert_eq!(MountName::new("//root/.cache", "/", false).to_string(), "/root/.cache");
    }
}
