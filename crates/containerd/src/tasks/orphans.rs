//! Owns what is left on the host where a call to containerd was cut off in the middle: a shim that
//! containerd has forgotten, processes and cgroups of a container that never got its task, the
//! runtime's own records of it. containerd removes none of these, because it knows of no task.
//!
//! All of them are found by the prefix with which the names of an executor's containers begin. A
//! command line proves nothing, since any process may have any, so a shim must also be root's, run
//! a shim's program, sit in its bundle, and see the file systems that we see. Blocks.

use super::{left::Spared, sweep::unmount_below};
use rustix::process::{Pid, Signal, kill_process};
use std::{
    fs,
    os::unix::ffi::OsStrExt as _,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// Where the runc shim has its runtime keep records, below it one directory per namespace.
const RUNTIME_RECORDS: &str = "/run/containerd/runc";
/// What the names of shims' programs begin with.
const SHIM: &str = "containerd-shim";
/// What the name of a directory of bundles begins with, which is the name of a plug-in: the one for
/// tasks, or the one for sandboxes.
const BUNDLES: &str = "io.containerd.";
const CGROUPS: &str = "/sys/fs/cgroup";
/// How deep below a hierarchy's root a cgroup of ours may be.
const CGROUP_DEPTH: usize = 8;
/// How long shims without tasks may take to end by themselves.
const GRACE: Duration = Duration::from_secs(1);
/// How long killed processes may take to be gone.
const DEATH: Duration = Duration::from_secs(2);

/// What begins the ids of an executor's containers: no other executor of this machine has it.
pub(super) fn id_prefix(root: &Path) -> String {
    use std::os::unix::fs::MetadataExt as _;
    // The same path may mean different directories in different mount namespaces.
    let place = fs::metadata(root).map_or(0, |m| m.dev().rotate_left(32) ^ m.ino());
    let digest = shipway_oci::Digest::of(format!("{} {place}", root.display())).hex();
    format!("shipway-{}-", &digest[..8])
}

/// Removes what is left of containers whose ids begin with `id_prefix` in `namespace`; but for
/// those that are `spared`, none of them may have a task any more.
pub(super) fn remove(namespace: &str, id_prefix: &str, spared: &Spared) {
    let began = Instant::now();
    let mut shims = shims(namespace, id_prefix, spared);
    while !shims.is_empty() && began.elapsed() < GRACE {
        pause();
        shims.retain(Shim::lives);
    }
    for shim in &shims {
        tracing::warn!(
            pid = shim.pid,
            id = shim.id,
            "killing orphaned shim: containerd has no record of it"
        );
        kill(shim.pid);
    }
    remove_cgroups(Path::new(CGROUPS), &|name| {
        name.contains(id_prefix) && !spared.has_cgroup(name)
    });
    let ours = |e: &PathBuf| name(e).starts_with(id_prefix) && !spared.has(&name(e));
    for entry in entries(&Path::new(RUNTIME_RECORDS).join(namespace)).filter(ours) {
        let _ = fs::remove_dir_all(entry);
    }
    // Bundles are side by side, so one leads to the others.
    for dir in shims.iter().filter_map(|s| s.bundle.parent()) {
        for bundle in entries(dir).filter(ours) {
            unmount_below(&bundle);
            let _ = fs::remove_dir_all(bundle);
        }
    }
}

/// Kills what is in cgroups of container `id` and removes them, and the runtime's record of it.
pub(super) fn remove_one(namespace: &str, id: &str) {
    let scope = format!("shipway-{id}.scope");
    remove_cgroups(Path::new(CGROUPS), &|name| name == id || name == scope);
    let _ = fs::remove_dir_all(Path::new(RUNTIME_RECORDS).join(namespace).join(id));
}

/// Kills the shims of containers whose ids begin with `id_prefix` in `namespace` and are not
/// `spared`; containerd then cleans up after those it knows.
pub(super) fn end_shims(namespace: &str, id_prefix: &str, spared: &Spared) {
    for shim in shims(namespace, id_prefix, spared) {
        tracing::warn!(
            pid = shim.pid,
            id = shim.id,
            "ending a shim that does not end what it runs"
        );
        kill(shim.pid);
    }
}

struct Shim {
    pid: i32,
    id: String,
    bundle: PathBuf,
}

impl Shim {
    /// The shim that process `pid` is, if it is one in `namespace` for a container whose id begins
    /// with `id_prefix`.
    fn of(pid: i32, namespace: &str, id_prefix: &str) -> Option<Self> {
        let of = |what: &str| PathBuf::from(format!("/proc/{pid}/{what}"));
        let line = fs::read(of("cmdline")).ok()?;
        let id = shim_id(&String::from_utf8_lossy(&line), namespace)
            .filter(|id| id.starts_with(id_prefix))?;
        let program = fs::read_link(of("exe")).ok()?;
        let bundle = before_removal(fs::read_link(of("cwd")).ok()?);
        let same_files = ["/proc/self/ns/mnt", "/proc/1/ns/mnt"]
            .map(|ns| fs::read_link(ns).ok())
            .contains(&fs::read_link(of("ns/mnt")).ok());
        (is_roots(&fs::read_to_string(of("status")).ok()?)
            && name(&program).starts_with(SHIM)
            && is_bundle(&bundle, namespace, &id)
            && same_files)
            .then_some(Self { pid, id, bundle })
    }

    fn lives(&self) -> bool {
        fs::read(format!("/proc/{}/cmdline", self.pid))
            .is_ok_and(|l| String::from_utf8_lossy(&l).contains(&self.id))
    }
}

/// The path that a directory has or had: the kernel marks links to those that are gone, as a bundle
/// is once containerd has forgotten its shim.
fn before_removal(link: PathBuf) -> PathBuf {
    match link.as_os_str().as_encoded_bytes().strip_suffix(b" (deleted)") {
        Some(path) => PathBuf::from(std::ffi::OsStr::from_bytes(path)),
        None => link,
    }
}

/// Whether a process with this status is root's by all of its user ids.
fn is_roots(status: &str) -> bool {
    status
        .lines()
        .find_map(|l| l.strip_prefix("Uid:"))
        .is_some_and(|ids| ids.split_whitespace().all(|id| id == "0"))
}

/// Whether `path` is where containerd keeps the bundle of container `id`: below its state
/// directory, by namespace and id. One that containerd removes is given a dot before its name
/// first.
fn is_bundle(path: &Path, namespace: &str, id: &str) -> bool {
    let mut parts = path.iter().rev();
    parts.next().is_some_and(|p| p.to_string_lossy().trim_start_matches('.') == id)
        && parts.next().is_some_and(|p| p == namespace)
        && parts.next().is_some_and(|p| p.to_string_lossy().starts_with(BUNDLES))
}

/// The container that the shim with this command line was started for.
fn shim_id(line: &str, namespace: &str) -> Option<String> {
    let words: Vec<&str> = line.split('\0').collect();
    let after = |flag: &str| words.iter().position(|w| *w == flag).and_then(|at| words.get(at + 1));
    let program = words.first()?.rsplit('/').next()?;
    (program.starts_with(SHIM) && after("-namespace") == Some(&namespace))
        .then(|| after("-id").map(|id| (*id).to_owned()))?
}

fn shims(namespace: &str, id_prefix: &str, spared: &Spared) -> Vec<Shim> {
    let pids = entries(Path::new("/proc")).filter_map(|p| name(&p).parse().ok());
    let shims = pids.filter_map(|pid| Shim::of(pid, namespace, id_prefix));
    shims.filter(|shim| !spared.has(&shim.id)).collect()
}

/// Removes all cgroups below `root` whose name is `ours`, and kills what is in them.
fn remove_cgroups(root: &Path, ours: &dyn Fn(&str) -> bool) {
    let mut found = Vec::new();
    find(root, ours, CGROUP_DEPTH, &mut found);
    for dir in found {
        let began = Instant::now();
        while fs::remove_dir(&dir).is_err() && dir.exists() && began.elapsed() < DEATH {
            let processes = fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
            processes.lines().filter_map(|p| p.parse().ok()).for_each(kill);
            // Frozen processes do not die.
            for (file, state) in [("freezer.state", "THAWED"), ("cgroup.freeze", "0")] {
                let _ = fs::OpenOptions::new()
                    .write(true)
                    .open(dir.join(file))
                    .and_then(|mut f| std::io::Write::write_all(&mut f, state.as_bytes()));
            }
            pause();
        }
        if dir.exists() {
            tracing::warn!(cgroup = %dir.display(), "failed to remove cgroup");
        }
    }
}

/// Directories below `dir` whose name is `ours`, and all below those, the innermost first.
fn find(dir: &Path, ours: &dyn Fn(&str) -> bool, depth: usize, found: &mut Vec<PathBuf>) {
    // Hierarchies of version 1 have links to each other at the top.
    let dirs = fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|e| e.file_type().is_ok_and(|t| t.is_dir()));
    for path in dirs.map(|e| e.path()) {
        let is_ours = ours(&name(&path));
        if depth > 0 {
            find(&path, if is_ours { &|_| true } else { ours }, depth - 1, found);
        }
        if is_ours {
            found.push(path);
        }
    }
}

fn entries(dir: &Path) -> impl Iterator<Item = PathBuf> {
    fs::read_dir(dir).into_iter().flatten().flatten().map(|e| e.path())
}

fn name(path: &Path) -> std::borrow::Cow<'_, str> {
    path.file_name().unwrap_or_default().to_string_lossy()
}

fn kill(pid: i32) {
    if let Some(pid) = Pid::from_raw(pid) {
        let _ = kill_process(pid, Signal::KILL);
    }
}

/// Pause between two looks at what sends no events; on a thread for blocking work.
#[allow(clippy::disallowed_methods)]
fn pause() {
    std::thread::sleep(Duration::from_millis(20));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shims_are_known_by_their_arguments() {
        let line = |program: &str| {
            format!("{program}\0-namespace\0ns\0-id\0shipway-1-x\0-address\0/run/c.sock\0")
        };
        assert_eq!(
            shim_id(&line("/usr/bin/containerd-shim-runc-v2"), "ns").as_deref(),
            Some("shipway-1-x")
        );
        assert_eq!(shim_id(&line("/usr/bin/containerd-shim-runc-v2"), "other"), None);
        assert_eq!(shim_id(&line("/bin/grep"), "ns"), None);
        assert_eq!(shim_id("", "ns"), None);
    }

    #[test]
    fn a_process_with_a_shims_arguments_is_no_shim() {
        use std::{io::Read as _, os::unix::process::CommandExt as _, process::Stdio};
        let state = tempfile::tempdir().unwrap();
        let bundle = state.path().join("io.containerd.runtime.v2.task/ns/shipway-1-x");
        fs::create_dir_all(&bundle).unwrap();
        let mut command = std::process::Command::new("sh");
        command.arg0("containerd-shim-runc-v2").args([
            "-c",
            "echo up; read end",
            "-namespace",
            "ns",
            "-id",
            "shipway-1-x",
        ]);
        let mut fake = command
            .current_dir(&bundle)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        fake.stdout.take().unwrap().read_exact(&mut [0; 3]).unwrap();
        let pid = i32::try_from(fake.id()).unwrap();
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap();
        assert_eq!(shim_id(&String::from_utf8_lossy(&line), "ns").as_deref(), Some("shipway-1-x"));
        assert!(Shim::of(pid, "ns", "shipway-1-").is_none());
        drop(fake.stdin.take());
        fake.wait().unwrap();
    }

    #[test]
    fn a_bundle_that_was_removed_under_its_shim_is_known() {
        let state = tempfile::tempdir().unwrap();
        let bundle = state.path().join("a");
        fs::create_dir(&bundle).unwrap();
        let mut process = std::process::Command::new("cat")
            .current_dir(&bundle)
            .stdin(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let link = || fs::read_link(format!("/proc/{}/cwd", process.id())).unwrap();
        assert_eq!(before_removal(link()), bundle);
        fs::remove_dir(&bundle).unwrap();
        assert_ne!(link(), bundle);
        assert_eq!(before_removal(link()), bundle);
        drop(process.stdin.take());
        process.wait().unwrap();
    }

    #[test]
    fn a_shim_is_roots_and_sits_in_its_bundle() {
        assert!(
            is_roots("Name:\tx\nUid:\t0\t0\t0\t0\n")
                && !is_roots("Uid:\t1000\t0\t0\t0\n")
                && !is_roots("")
        );
        let at = |path: &str| is_bundle(Path::new(path), "ns", "a");
        assert!(
            at("/run/containerd/io.containerd.runtime.v2.task/ns/a")
                && at("/x/io.containerd.sandbox.controller.v1.shim/ns/a")
        );
        assert!(at("/run/containerd/io.containerd.runtime.v2.task/ns/.a"));
        assert!(
            !at("/tmp/ns/a")
                && !at("/run/containerd/io.containerd.runtime.v2.task/other/a")
                && !at("/")
        );
    }

    #[test]
    fn directories_of_ours_are_found_innermost_first() {
        let root = tempfile::tempdir().unwrap();
        for dir in
            ["cpu/ns/shipway-1-a/init", "cpu/ns/shipway-2-b", "memory/deep/er/shipway-1-c.scope"]
        {
            fs::create_dir_all(root.path().join(dir)).unwrap();
        }
        let mut found = Vec::new();
        find(root.path(), &|name| name.contains("shipway-1-"), CGROUP_DEPTH, &mut found);
        let mut found: Vec<_> = found
            .iter()
            .map(|p| p.strip_prefix(root.path()).unwrap().display().to_string())
            .collect();
        assert!(
            found.iter().position(|p| p.ends_with("init"))
                < found.iter().position(|p| p.ends_with("-a")),
            "{found:?}"
        );
        found.sort();
        assert_eq!(
            found,
            ["cpu/ns/shipway-1-a", "cpu/ns/shipway-1-a/init", "memory/deep/er/shipway-1-c.scope"]
        );
    }
}
