//! From LLB mounts to mounts of a process, and to the states that come out of it (rows
//! `exec.mnt.*`).

use super::resume::{HeldCache, HeldStates, StepNote};
use crate::{JobData, Services, cache_mounts::MountName};
use shipway_executor::{ExecMount, MountSource, RootFs, Secret};
use shipway_fault::{Fault, Result};
use shipway_gocompat::path::rooted;
use shipway_llb::{CacheMount, CacheSharing, ExecOp, Mount, MountKind, SshMount};
use shipway_progress::Reporter;
use shipway_refs::{
    ImmutableRef, LocalMount, MutableRef, NamedRef, NamedRequest, RecordType, Sharing, View,
};
use shipway_session::SessionGroup;
use shipway_sources::{SshAgent, forwarded_agent};
use shipway_storage::Mount as SnapshotMount;
use std::{collections::BTreeMap, os::unix::fs::PermissionsExt as _};

/// The mounts of a process.
pub(crate) struct MountPlan {
    pub(crate) root: RootFs,
    pub(crate) mounts: Vec<ExecMount>,
    /// The snapshots behind the mounts as they were asked for; none where nothing can be looked
    /// into.
    pub(crate) snapshots: Vec<Option<Vec<SnapshotMount>>>,
    pub(crate) guards: MountGuards,
}

/// What has to live as long as the process; dropping it throws away what was not taken out.
#[derive(Default)]
pub(crate) struct MountGuards {
    /// States of mounts, in their order.
    pub(super) states: Vec<MountedState>,
    views: Vec<View>,
    /// Unmounted before the states below them are given back.
    shared: Vec<LocalMount>,
    caches: Vec<HeldCache>,
    agents: Vec<SshAgent>,
    /// What the process reads that an earlier run of the daemon started.
    _left: Option<HeldStates>,
}

impl MountGuards {
    /// What a later run of the daemon needs to have the same; `None` where something belongs to
    /// this one: a client's agent, or a mount that several steps share.
    pub(super) fn note(&self, inputs: &[ImmutableRef]) -> Option<StepNote> {
        if !self.agents.is_empty() || !self.shared.is_empty() {
            return None;
        }
        let written = |mounted: &MountedState| match &mounted.state {
            OutputState::Written { state, .. } => {
                Some((mounted.mount, state.snapshot_key().clone()))
            }
            OutputState::Same(_) => None,
        };
        let views = self.views.iter().filter_map(|view| view.key.as_ref());
        let read = views.chain(inputs.iter().filter_map(ImmutableRef::snapshot_name));
        Some(StepNote::new(self.states.iter().filter_map(written), read, &self.caches))
    }
}

/// The state of one mount.
pub(super) struct MountedState {
    /// Which mount.
    pub(super) mount: usize,
    /// Which output it becomes; none is thrown away.
    pub(super) output: Option<usize>,
    pub(super) state: OutputState,
}

/// A state that was mounted.
pub(super) enum OutputState {
    /// A state the process could not change.
    Same(ImmutableRef),
    /// A state it wrote.
    Written {
        state: MutableRef,
        /// Where it was mounted.
        dest: String,
    },
}

/// Which builds mounts are planned for.
#[derive(Clone, Copy)]
pub(crate) struct MountContext<'a> {
    /// The clients that may be asked for secrets.
    pub(crate) sessions: &'a SessionGroup,
    /// The reporter that receives fetch progress.
    pub(crate) reporter: &'a Reporter,
    /// The builds that want the process; some want cache directories to begin empty.
    pub(crate) jobs: &'a [JobData],
}

struct Planner<'a> {
    services: &'a Services,
    exec: &'a ExecOp,
    inputs: &'a [ImmutableRef],
    cx: MountContext<'a>,
    /// Mounts of cache directories, by index of the mount.
    caches: BTreeMap<usize, Vec<SnapshotMount>>,
    guards: MountGuards,
    /// Where the states come from, if the process was started by an earlier run of the daemon.
    left: Option<HeldStates>,
}

/// A secret of the clients; `None` if it is optional and no client has it.
pub(super) async fn secret(
    sessions: &SessionGroup,
    id: &str,
    optional: bool,
) -> Result<Option<Vec<u8>>> {
    let found = sessions.any(|session| async move {
        session.secret(id).await?.ok_or_else(|| Fault::not_found(format!("secret {id}: not found")))
    });
    match found.await {
        Ok(bytes) => Ok(Some(bytes)),
        Err(e) if optional && e.is_not_found() => Ok(None),
        Err(e) => {
            Err(e.hint(format!("give the build the secret with `--secret id={id},src=<file>`")))
        }
    }
}

/// Plans all mounts of `exec`; of a process that has them already, by the states that it has.
pub(crate) async fn plan(
    services: &Services,
    exec: &ExecOp,
    inputs: &[ImmutableRef],
    cx: MountContext<'_>,
    left: Option<HeldStates>,
) -> Result<MountPlan> {
    let mut planner = Planner {
        services,
        exec,
        inputs,
        cx,
        caches: BTreeMap::new(),
        guards: MountGuards::default(),
        left,
    };
    planner.take_caches().await?;
    let (mut root, mut mounts, mut snapshots) = (None, Vec::new(), vec![None; exec.mounts.len()]);
    for (index, mount) in exec.mounts.iter().enumerate() {
        let dest = destination(&exec.meta.cwd, &mount.dest, root.is_some())?;
        if dest == "/" {
            let planned = planner.root(index, mount).await?;
            snapshots[index] = Some(planned.mounts.clone());
            root = Some(planned);
        } else if let Some(source) = planner.source(index, mount).await? {
            if let MountSource::Snapshot(mounts) | MountSource::SnapshotPath { mounts, .. } =
                &source
            {
                snapshots[index] = Some(mounts.clone());
            }
            mounts.push(ExecMount { target: dest, source, read_only: mount.readonly });
        }
    }
    let root = root.ok_or_else(|| Fault::invalid("exec op with no rootfs"))?;
    planner.guards._left = planner.left.take();
    Ok(MountPlan { root, mounts, snapshots, guards: planner.guards })
}

/// Where a mount goes. Only the first one is the root filesystem; another one there would hide it.
fn destination(cwd: &str, dest: &str, has_root: bool) -> Result<String> {
    let whole = if dest.starts_with('/') { rooted(dest) } else { rooted(&format!("{cwd}/{dest}")) };
    if whole == "/" && (has_root || !dest.starts_with('/')) {
        return Err(Fault::invalid(format!("mount {dest:?} would cover the root filesystem")));
    }
    Ok(whole)
}

/// What a cache directory is known by.
pub(crate) fn cache_id<'a>(mount: &'a Mount, cache: &'a CacheMount) -> &'a str {
    if cache.id.is_empty() { &mount.dest } else { &cache.id }
}

/// All of a snapshot, or a part of it.
fn part(mounts: Vec<SnapshotMount>, selector: &str) -> MountSource {
    match rooted(selector) {
        path if path == "/" => MountSource::Snapshot(mounts),
        path => MountSource::SnapshotPath { mounts, path },
    }
}

impl Planner<'_> {
    /// The input of a mount; a state without layers counts as none.
    fn input(&self, mount: &Mount) -> Result<Option<&ImmutableRef>> {
        let Some(index) = mount.input else { return Ok(None) };
        let input = self.inputs.get(index).ok_or_else(|| {
            Fault::invalid(format!("missing input {index} of mount {}", mount.dest))
        })?;
        Ok(Some(input).filter(|i| !i.is_scratch()))
    }

    fn hold(&mut self, index: usize, mount: &Mount, state: OutputState) {
        self.guards.states.push(MountedState { mount: index, output: mount.output, state });
    }

    async fn writable(&mut self, index: usize, mount: &Mount) -> Result<MutableRef> {
        let description =
            format!("mount {} from exec {}", mount.dest, self.exec.meta.args.join(" "));
        let below = self.input(mount)?.cloned();
        if let Some(left) = &mut self.left {
            return left.state(&self.services.refs, index, below.as_ref(), description).await;
        }
        self.services
            .refs
            .mutable(below.as_ref(), description, RecordType::Regular, Some(self.cx.reporter))
            .await
    }

    async fn root(&mut self, index: usize, mount: &Mount) -> Result<RootFs> {
        if mount.kind != MountKind::Bind {
            return Err(Fault::invalid(format!(
                "invalid mount type {:?} for {}",
                mount.kind, mount.dest
            )));
        }
        let state = self.writable(index, mount).await?;
        let root = RootFs {
            snapshot: Some(state.snapshot_key().clone()),
            mounts: state.mounts().to_vec(),
            read_only: mount.readonly,
        };
        self.hold(index, mount, OutputState::Written { state, dest: mount.dest.clone() });
        Ok(root)
    }

    async fn source(&mut self, index: usize, mount: &Mount) -> Result<Option<MountSource>> {
        match &mount.kind {
            MountKind::Bind => self.bind(index, mount).await.map(Some),
            MountKind::Cache(_) => self.cache(index, mount).map(Some),
            MountKind::Tmpfs { size } => {
                Ok(Some(MountSource::Tmpfs { size: u64::try_from(*size).unwrap_or_default() }))
            }
            MountKind::Secret(s) => {
                let bytes = secret(self.cx.sessions, &s.id, s.optional).await?;
                Ok(bytes.map(|b| MountSource::Content {
                    bytes: Secret(b.into()),
                    uid: s.uid,
                    gid: s.gid,
                    mode: s.mode,
                }))
            }
            MountKind::Ssh(s) => {
                let id = &s.id;
                let there = self
                    .cx
                    .sessions
                    .any(|session| async move { session.ssh_check(id).await })
                    .await;
                match (there, s.optional) {
                    (Ok(false) | Err(_), true) => Ok(None),
                    (Ok(false), false) => Err(Fault::not_found(format!(
                        "no SSH key {id:?} forwarded from the client"
                    ))
                    .hint("forward an agent with `--ssh default`")),
                    (Err(e), false) => Err(e),
                    (Ok(true), _) => self.agent(s).await.map(Some),
                }
            }
        }
    }

    /// The socket of a client's SSH agent, for as long as the process lives.
    async fn agent(&mut self, ssh: &SshMount) -> Result<MountSource> {
        let agent = forwarded_agent(self.cx.sessions, &ssh.id, &self.services.sockets).await?;
        let failed = |e| Fault::io("give a step its SSH agent", e);
        std::os::unix::fs::chown(agent.socket(), Some(ssh.uid), Some(ssh.gid)).map_err(failed)?;
        std::fs::set_permissions(agent.socket(), std::fs::Permissions::from_mode(ssh.mode & 0o777))
            .map_err(failed)?;
        let source = MountSource::Host(agent.socket().to_owned());
        self.guards.agents.push(agent);
        Ok(source)
    }

    async fn bind(&mut self, index: usize, mount: &Mount) -> Result<MountSource> {
        let input = self.input(mount)?.cloned();
        match input.filter(|_| mount.readonly) {
            Some(state) => {
                // Not whether its content is whole or lazy, but that it exists: `view` makes it
                // exist.
                state.materialize(Some(self.cx.reporter)).await?;
                // A process that has it mounted needs no other view.
                let mut mounts = Vec::new();
                if self.left.is_none() {
                    let view = state.view().await?;
                    mounts.clone_from(&view.mounts);
                    self.guards.views.push(view);
                }
                let source = part(mounts, &mount.selector);
                self.hold(index, mount, OutputState::Same(state));
                Ok(source)
            }
            None => {
                let state = self.writable(index, mount).await?;
                let source = part(state.mounts().to_vec(), &mount.selector);
                self.hold(index, mount, OutputState::Written { state, dest: mount.dest.clone() });
                Ok(source)
            }
        }
    }

    fn cache(&mut self, index: usize, mount: &Mount) -> Result<MountSource> {
        let mounts = self
            .caches
            .remove(&index)
            .ok_or_else(|| Fault::internal(format!("cache mount {} was not taken", mount.dest)))?;
        let source = part(mounts, &mount.selector);
        if let Some(state) = self.input(mount)?.cloned() {
            self.hold(index, mount, OutputState::Same(state));
        }
        Ok(source)
    }

    /// Takes all cache mounts in the order of their keys, so that two steps that lock several never
    /// wait for each other.
    async fn take_caches(&mut self) -> Result<()> {
        let mut requests: Vec<(usize, NamedRequest)> = Vec::new();
        for (index, mount) in self.exec.mounts.iter().enumerate() {
            if let MountKind::Cache(cache) = &mount.kind {
                requests.push((index, self.cache_request(mount, cache)?));
            }
        }
        requests.sort_by(|(_, a), (_, b)| a.key.cmp(&b.key));
        let mut previous: Option<(String, usize)> = None;
        for (index, request) in requests {
            // One step may mount a cache at several places; it must not wait for itself.
            if let Some((_, same)) = previous.as_ref().filter(|(key, _)| *key == request.key)
                && let Some(mounts) = self.caches.get(same).cloned()
            {
                self.caches.insert(index, mounts);
                continue;
            }
            previous = Some((request.key.clone(), index));
            let mount = &self.exec.mounts[index];
            if let MountKind::Cache(cache) = &mount.kind {
                let empty =
                    || self.services.refs.discard_named(RecordType::CacheMount, &request.key);
                let each = |job: &JobData| {
                    job.step_options.empty_once(
                        cache_id(mount, cache),
                        mount.input.is_some(),
                        &request.key,
                        empty,
                    )
                };
                self.cx.jobs.iter().for_each(each);
                self.restore_cache(mount, cache, &request).await;
            }
            let (key, sharing) = (request.key.clone(), request.sharing);
            let cache = match &mut self.left {
                Some(left) => left.cache(&key)?,
                None => {
                    let state = self.services.refs.named(request).await?;
                    HeldCache { key, sharing, state }
                }
            };
            let mounts = self.cache_mounts(&cache.state).await?;
            self.caches.insert(index, mounts);
            self.guards.caches.push(cache);
        }
        Ok(())
    }

    /// Restores a cache directory that is not here, for the builds that have a place to restore it
    /// from, and notes that they use it.
    async fn restore_cache(&self, mount: &Mount, cache: &CacheMount, request: &NamedRequest) {
        let (id, nested) = (cache_id(mount, cache), mount.input.is_some());
        // What begins empty shows nothing but its root, whatever part of it a step asks for.
        let selector = if nested { mount.selector.as_str() } else { "/" };
        let name = MountName::new(id, selector, nested);
        for job in self.cx.jobs {
            if !job.step_options.begins_empty(id, nested) {
                let refs = &self.services.refs;
                let (mounts, reporter) = (&job.cache_mounts, self.cx.reporter);
                mounts.restore(refs, &name, selector, request, reporter).await;
            }
            job.cache_mounts.note(&name, selector, request);
        }
    }

    /// Mounts of a cache directory. An overlay must not be mounted twice for writing, so steps that
    /// share one share its mount.
    async fn cache_mounts(&mut self, named: &NamedRef) -> Result<Vec<SnapshotMount>> {
        if named.mounts().iter().all(|m| matches!(m, SnapshotMount::Bind(_))) {
            return Ok(named.mounts().to_vec());
        }
        let local = named.mount().await?;
        let bind = SnapshotMount::bind(local.path(), false);
        self.guards.shared.push(local);
        Ok(vec![bind])
    }

    fn cache_request(&self, mount: &Mount, cache: &CacheMount) -> Result<NamedRequest> {
        let parent = self.input(mount)?.cloned();
        let id = cache_id(mount, cache);
        let base = parent.as_ref().map(|p| format!(":{}", p.id())).unwrap_or_default();
        Ok(NamedRequest {
            record_type: RecordType::CacheMount,
            key: format!("cache-dir:{id}{base}"),
            description: format!(
                "cached mount {} from exec {}",
                mount.dest,
                self.exec.meta.args.join(" ")
            ),
            sharing: match cache.sharing {
                CacheSharing::Shared => Sharing::Shared,
                CacheSharing::Private => Sharing::Private,
                CacheSharing::Locked => Sharing::Locked,
            },
            parent,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_mounted_over_the_root() {
        let check = |dest: &str, has_root: bool, expected: Option<&str>| {
            assert_eq!(destination("/work", dest, has_root).ok().as_deref(), expected, "{dest}");
        };
        check("/", false, Some("/"));
        check("/./", true, None);
        check("//a/..", true, None);
        check("..", true, None);
        check("..", false, None);
        check("a/../b", true, Some("/work/b"));
        check("/c/", true, Some("/c"));
    }
}
