//! Owns everything a process needs on the host before its container exists: its directory with
//! FIFOs, `hosts` and `resolv.conf`, its secrets, mounts of parts of snapshots, who its user is,
//! and what must not be left behind. Blocks; dropping [`Prepared`] undoes it.

use super::{Inner, left, spool::Spool, stdio, sweep::unmount_below};
use oci_spec::runtime::{self, User};
use shipway_executor::{
    ExecMount, MountSource, NetworkMode, OutputTarget, ProcessSpec, RootFs, Secret, Security, etc,
    spec,
};
use shipway_fault::{Context, Fault, Result};
use shipway_gocompat::path::rooted;
use shipway_rootfs::{Access, Attached, Identity, RootView, Stubs, Trust, identity};
use shipway_storage::Mount;
use std::{
    io::Write,
    os::unix::fs::{OpenOptionsExt, PermissionsExt, chown},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

/// Options that do not fit a page with the rest make `mount(2)` fail.
const MAX_OPTIONS: usize = 4096 - 512;
const TMPFS_MAGIC: i64 = 0x0102_1994;

/// What was prepared; dropping it removes it from the host.
pub(super) struct Prepared {
    /// Who the process runs as.
    pub(super) user: User,
    pub(super) mounts: Vec<runtime::Mount>,
    pub(super) stubs: Option<Stubs>,
    /// Certificates that the process is made to trust.
    pub(super) trust: Option<Trust>,
    pub(super) stdio: Option<stdio::Stdio>,
    // In this order: mounts go before the directories they are in, and the secrets before the tmpfs
    // they are on.
    _attached: Vec<Attached>,
    _left: Option<LeftMounts>,
    _dirs: Vec<OwnDir>,
    _secrets: Option<Arc<Attached>>,
}

impl Prepared {
    /// What an earlier run prepared for a process in `dir` that goes on.
    pub(super) fn left(dir: PathBuf, stubs: Option<Stubs>, trust: Option<Trust>) -> Self {
        Self {
            user: User::default(),
            mounts: Vec::new(),
            stubs,
            trust,
            stdio: None,
            _attached: Vec::new(),
            _left: Some(LeftMounts(dir.clone())),
            _dirs: vec![OwnDir(dir)],
            _secrets: None,
        }
    }
}

/// Mounts that an earlier run made below a directory.
struct LeftMounts(PathBuf);

impl Drop for LeftMounts {
    fn drop(&mut self) {
        unmount_below(&self.0);
    }
}

/// A directory of ours, removed with what is in it.
struct OwnDir(PathBuf);

impl OwnDir {
    fn new(path: PathBuf) -> Result<Self> {
        std::fs::create_dir_all(&path)
            .map_err(|e| Fault::io(format!("create {}", path.display()), e))?;
        Ok(Self(path))
    }
}

impl Drop for OwnDir {
    fn drop(&mut self) {
        remove_flat(&self.0);
    }
}

/// Removes a directory of ours and the files in it, but never what may still be mounted below.
pub(super) fn remove_flat(dir: &Path) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        let _ = if entry.file_type().is_ok_and(|t| t.is_dir()) {
            std::fs::remove_dir(&path)
        } else {
            std::fs::remove_file(&path)
        };
    }
    let _ = std::fs::remove_dir(dir);
}

fn bind<const N: usize>(target: &str, source: &Path, options: [&str; N]) -> runtime::Mount {
    spec::mount(target, "bind", source, options)
}

fn write_file(path: &Path, bytes: &[u8], mode: u32) -> Result<()> {
    let write = || {
        let mut file =
            std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
        file.write_all(bytes)?;
        file.set_permissions(std::fs::Permissions::from_mode(mode))
    };
    write().map_err(|e| Fault::io(format!("write {}", path.display()), e))
}

/// Where secrets go: a tmpfs, so that they never reach a disk. It is mounted while a process has
/// secrets, unless all of ours is on one anyway.
fn secret_dir(inner: &Inner, id: &str) -> Result<(OwnDir, Option<Arc<Attached>>)> {
    let root = inner.config.root.join("secret");
    let mut shared = inner.secrets.lock();
    let mounted = match shared.upgrade() {
        Some(mounted) => Some(mounted),
        None if rustix::fs::statfs(&inner.config.root)
            .is_ok_and(|s| i128::from(s.f_type) == i128::from(TMPFS_MAGIC)) =>
        {
            None
        }
        // Each at a place of its own: an earlier one may be going at this moment.
        None => {
            static COUNT: AtomicU64 = AtomicU64::new(0);
            let place = root.join(format!("tmpfs-{}", COUNT.fetch_add(1, Ordering::Relaxed)));
            Some(Arc::new(Attached::tmpfs(&place)?))
        }
    };
    *shared = mounted.as_ref().map(Arc::downgrade).unwrap_or_default();
    let place = mounted.as_ref().map_or(root.as_path(), |m| m.path());
    Ok((OwnDir::new(place.join(id))?, mounted))
}

struct Builder<'a> {
    inner: &'a Inner,
    id: &'a str,
    dir: &'a Path,
    secrets: &'a Path,
    mounts: Vec<runtime::Mount>,
    attached: Vec<Attached>,
}

impl Builder<'_> {
    fn snapshot(
        &mut self,
        target: &str,
        mounts: &[Mount],
        path: Option<&str>,
        read_only: bool,
    ) -> Result<()> {
        let [mount] = mounts else {
            return Err(Fault::unimplemented(format!(
                "mounting a snapshot of {} mounts at {target}",
                mounts.len()
            )));
        };
        let access = if read_only { Access::Read } else { Access::Write };
        let mode = if read_only { "ro" } else { "rw" };
        let mut raw = mount.raw();
        let long = raw.options.iter().map(|o| o.len() + 1).sum::<usize>() > MAX_OPTIONS;
        if path.is_none() && !long {
            // An active snapshot that is only read would be locked by mounting it as it is; and one
            // without an upper directory is read-only anyway.
            raw.options.retain(|o| o != "ro" && o != "rw");
            raw.options.push(mode.into());
            self.mounts.push(spec::mount(target, &raw.kind, raw.source, raw.options));
            return Ok(());
        }
        let at = self.dir.join(format!("mount-{}", self.attached.len()));
        let attached = Attached::new(mounts, access, path.unwrap_or("/"), &at)?;
        self.mounts.push(bind(target, attached.path(), ["rbind", mode]));
        self.attached.push(attached);
        Ok(())
    }

    fn secret(
        &mut self,
        target: &str,
        bytes: &Secret,
        (uid, gid, mode): (u32, u32, u32),
    ) -> Result<()> {
        let path = self.secrets.join(self.mounts.len().to_string());
        write_file(&path, &bytes.0, 0o600)?;
        let own = chown(&path, Some(uid), Some(gid)).and_then(|()| {
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode & 0o777))
        });
        own.map_err(|e| Fault::io(format!("set the owner of the secret for {target}"), e))?;
        self.mounts.push(bind(target, &path, ["rbind", "ro", "nosuid", "nodev", "noexec"]));
        Ok(())
    }

    fn add(&mut self, mount: &ExecMount) -> Result<()> {
        let (target, read_only) = (mount.target.as_str(), mount.read_only);
        let mode = if read_only { "ro" } else { "rw" };
        match &mount.source {
            MountSource::Snapshot(mounts) => self.snapshot(target, mounts, None, read_only),
            MountSource::SnapshotPath { mounts, path } => {
                let path = rooted(path);
                self.snapshot(
                    target,
                    mounts,
                    Some(&path).filter(|p| p.as_str() != "/").map(String::as_str),
                    read_only,
                )
                .map_err(|e| {
                    if e.is_not_found() {
                        Fault::not_found(format!(
                            "failed to mount {target}: lstat {path}: no such file or directory"
                        ))
                    } else {
                        e
                    }
                })
            }
            MountSource::Host(path) => {
                self.mounts.push(bind(target, path, ["rbind", mode]));
                Ok(())
            }
            MountSource::Content { bytes, uid, gid, mode } => {
                self.secret(target, bytes, (*uid, *gid, *mode))
            }
            MountSource::Tmpfs { size } => {
                let mut options = vec!["nosuid".to_owned(), mode.to_owned()];
                if *size > 0 {
                    options.push(format!("size={size}"));
                }
                self.mounts.push(spec::mount(target, "tmpfs", "tmpfs", options));
                Ok(())
            }
        }
        .context(|| format!("mount {target} into container {}", self.id))
    }

    fn etc(&mut self, process: &ProcessSpec, host_network: bool) -> Result<()> {
        let files = [
            ("resolv.conf", self.inner.config.dns.resolv_conf_now(host_network)?),
            ("hosts", etc::hosts(&process.hostname, &process.extra_hosts)),
        ];
        for (name, text) in files {
            let path = self.dir.join(name);
            write_file(&path, text.as_bytes(), 0o644)?;
            self.mounts.push(bind(
                &format!("/etc/{name}"),
                &path,
                ["nosuid", "noexec", "nodev", "rbind", "ro"],
            ));
        }
        Ok(())
    }
}

/// Whether `path` is at or below one of the mounts.
fn is_covered(path: &str, mounts: &[ExecMount]) -> bool {
    mounts.iter().any(|m| {
        let target = rooted(&m.target);
        path == target
            || path.strip_prefix(target.as_str()).is_some_and(|rest| rest.starts_with('/'))
    })
}

/// Makes the working directory, owned by the user, unless it is there.
fn working_directory(
    view: &RootView,
    root: &RootFs,
    cwd: &str,
    who: &Identity,
    mounts: &[ExecMount],
) -> Result<()> {
    if cwd == "/" || root.read_only || is_covered(cwd, mounts) || view.stat(cwd).is_ok() {
        return Ok(());
    }
    RootView::open(&root.mounts, Access::Write)?
        .make_dirs(cwd, 0o755, who.uid, who.gid)
        .map_err(|e| Fault::io(format!("create working directory {cwd}"), e.into()))
}

/// Prepares `process`, with where its output goes, whether it has input, and whether a later run of
/// the daemon may want its output.
pub(super) fn prepare(
    inner: &Inner,
    process: &ProcessSpec,
    root: &RootFs,
    mounts: &[ExecMount],
    io: (&OutputTarget, bool, bool),
) -> Result<Prepared> {
    let dir = OwnDir::new(inner.config.root.join("run").join(&process.id))?;
    let has_secrets = mounts.iter().any(|m| matches!(m.source, MountSource::Content { .. }));
    let (secrets, tmpfs) = if has_secrets {
        secret_dir(inner, &process.id).map(|(dir, tmpfs)| (Some(dir), tmpfs))?
    } else {
        (None, None)
    };
    let (output, input, spooled) = io;
    let output = match spooled {
        true => stdio::Destination::Spooled(Spool::new(dir.0.join(left::SPOOL), output.clone())),
        false => stdio::Destination::Direct(output.clone()),
    };
    let stdio = stdio::Stdio::open(
        &dir.0,
        stdio::StdioShape { prefix: "", terminal: process.tty, input },
        &output,
    )?;

    let view = RootView::open(&root.mounts, Access::Read)?;
    let identity = identity::resolve(&view, &process.user)?;
    let targets = mounts
        .iter()
        .map(|m| &m.target)
        .map(String::as_str)
        .chain(process.edits.mounts.iter().filter_map(|m| m.destination().to_str()));
    let stubs = if root.read_only {
        None
    } else {
        Stubs::before(&view, &root.mounts, targets, process.remove_stubs_recursively)
    };
    working_directory(&view, root, &rooted(&process.cwd), &identity, mounts)?;

    let host_network = inner.network.is_host(process);
    let mut builder = Builder {
        inner,
        id: &process.id,
        dir: &dir.0,
        secrets: secrets.as_ref().map_or(&dir.0, |s| &s.0),
        mounts: Vec::new(),
        attached: Vec::new(),
    };
    builder.etc(process, host_network)?;
    for mount in mounts {
        builder.add(mount)?;
    }
    let Builder { mounts, attached, .. } = builder;
    // Last, as nothing would take it out after a failure.
    let trusted = trusted(inner, process)?;
    let trust = match trusted.is_empty() || root.read_only {
        false => Trust::add(&root.mounts, &trusted)?,
        true => None,
    };
    Ok(Prepared {
        user: spec::user(identity.uid, identity.gid, identity.groups),
        mounts,
        stubs,
        trust,
        stdio: Some(stdio),
        _attached: attached,
        _left: None,
        _dirs: std::iter::once(dir).chain(secrets).collect(),
        _secrets: tmpfs,
    })
}

/// The certificates that `process` is made to trust: the operator's, and the proxy's.
fn trusted(inner: &Inner, process: &ProcessSpec) -> Result<Vec<u8>> {
    let mut all = match &inner.config.ca {
        Some(bundle) => bundle.read()?.to_vec(),
        None => Vec::new(),
    };
    if let Some(proxy) = &process.proxy {
        if !all.is_empty() && !all.ends_with(b"\n") {
            all.push(b'\n');
        }
        all.extend(proxy.0.trusted());
    }
    Ok(all)
}

/// Whether a namespace that `process` was in may serve another.
pub(super) fn leaves_network_clean(process: &ProcessSpec) -> bool {
    // Devices may bring interfaces of the host, and their hooks do what they like.
    let edited = !process.edits.interfaces.is_empty() || !process.edits.hooks.is_empty();
    let ours = matches!(process.network, NetworkMode::Default | NetworkMode::Named(_));
    process.security == Security::Sandbox && ours && !edited
}

#[cfg(test)]
mod tests {
    use super::*;
    use shipway_executor::{Edits, Hook};

    #[test]
    fn a_namespace_that_a_device_changed_serves_nobody_else() {
        let clean =
            |edits: Edits| leaves_network_clean(&ProcessSpec { edits, ..ProcessSpec::default() });
        assert!(clean(Edits { env: vec!["A=1".into()], ..Edits::default() }));
        assert!(!clean(Edits {
            interfaces: vec![("ib0".into(), "eth1".into())],
            ..Edits::default()
        }));
        assert!(!clean(Edits { hooks: vec![Hook::default()], ..Edits::default() }));
        assert!(!leaves_network_clean(&ProcessSpec {
            security: Security::Insecure,
            ..ProcessSpec::default()
        }));
    }
}
