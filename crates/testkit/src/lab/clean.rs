//! Leaving nothing behind: tasks, shims, mounts, directories of this lab and of labs whose owner
//! was killed; and counting what a daemon left.

use super::{Flavour, Lab};
use rustix::process::{Pid, Signal, kill_process};
use std::path::Path;

pub(super) const PREFIX: &str = "shipway-lab-";

/// What is in a containerd, over all namespaces, and around it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Leftovers {
    pub images: Vec<String>,
    pub leases: Vec<String>,
    pub snapshots: Vec<String>,
    pub blobs: Vec<String>,
    pub ingests: Vec<String>,
    pub containers: Vec<String>,
    pub tasks: Vec<String>,
    /// Records of sandboxes, which containerd 1.6 does not have.
    pub sandboxes: Vec<String>,
    /// Command lines of shims of this containerd.
    pub shims: Vec<String>,
    /// Mount points below the lab's directory.
    pub mounts: Vec<String>,
}

impl Leftovers {
    /// Whether there is nothing at all.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

impl Lab {
    /// Names of the namespaces there are.
    pub fn namespaces(&self) -> Vec<String> {
        self.ctr_in("default", ["namespaces", "list", "--quiet"])
            .lines()
            .map(str::to_owned)
            .collect()
    }

    /// What there is now.
    pub fn leftovers(&self) -> Leftovers {
        let mut all = Leftovers::default();
        for namespace in self.namespaces() {
            let list = |arguments: &[&str], quiet: bool| -> Vec<String> {
                let answer = self.ctr_in(&namespace, arguments).ok();
                let skip = if quiet { 0 } else { 1 };
                let first =
                    |l: &str| l.split_whitespace().next().map(|w| format!("{namespace}/{w}"));
                answer.lines().skip(skip).filter_map(first).collect()
            };
            all.images.extend(list(&["images", "list", "--quiet"], true));
            all.leases.extend(list(&["leases", "list", "--quiet"], true));
            all.snapshots.extend(list(&["snapshots", "list"], false));
            if self.options.snapshotter {
                let name = &self.options.snapshotter_name;
                all.snapshots.extend(list(&["snapshots", "--snapshotter", name, "list"], false));
            }
            all.blobs.extend(list(&["content", "list", "--quiet"], true));
            all.ingests.extend(list(&["content", "active"], false));
            all.containers.extend(list(&["containers", "list", "--quiet"], true));
            all.tasks.extend(list(&["tasks", "list", "--quiet"], true));
            if self.flavour() == Flavour::Newer {
                all.sandboxes.extend(list(&["sandboxes", "list"], false));
            }
        }
        all.shims = shims(&self.dir).into_iter().map(|(_, command)| command).collect();
        let disk = self.dir.join("containerd-root");
        // The snapshotter's keeper serves as long as the lab lives.
        let keeper = self.dir.join("run/k");
        let ours = |m: &String| Path::new(m) == disk || Path::new(m) == keeper;
        all.mounts = mounts(&self.dir).into_iter().filter(|m| !ours(m)).collect();
        all
    }

    /// Kills all shims, as a host that is short of memory might; returns how many there were.
    pub fn kill_shims(&self) -> usize {
        let shims = shims(&self.dir);
        shims.iter().for_each(|(pid, _)| kill(*pid));
        shims.len()
    }

    /// `kill -9` of the process that serves lazy layers; whether there was one.
    pub fn kill_keeper(&self) -> bool {
        let run = format!("keeper --run {}", self.dir.join("run").display());
        let keepers = processes()
            .into_iter()
            .filter(|(_, command)| command.contains(&run) && !command.contains("--supervise"));
        keepers.map(|(pid, _)| kill(pid)).count() > 0
    }

    /// Prints the ends of all logs and what is in containerd.
    pub(super) fn dump(&self) {
        for log in ["shipwayd.log", "containerd.log", "shipway-snapshotter.log", "registry.log"] {
            let bytes = std::fs::read(self.dir.join(log)).unwrap_or_default();
            let text = String::from_utf8_lossy(&bytes);
            // What every start and every request says is of no use here.
            let dull = ["loading plugin", "\" 200 ", "\" 201 ", "\" 202 "];
            let lines: Vec<_> =
                text.lines().filter(|l| !dull.iter().any(|d| l.contains(d))).collect();
            eprintln!(
                "--- the end of {log}\n{}",
                lines[lines.len().saturating_sub(60)..].join("\n")
            );
        }
        if self.containerd.is_some() {
            for what in
                [["leases", "list"], ["snapshots", "list"], ["images", "list"], ["tasks", "list"]]
            {
                eprintln!("--- ctr {}\n{}", what.join(" "), self.ctr(what).all());
            }
        }
    }
}

/// Ends what runs in the lab's containerd, through containerd.
pub(super) fn tasks(lab: &Lab) {
    if lab.containerd.is_none() {
        return;
    }
    for namespace in lab.namespaces() {
        let list = lab.ctr_in(&namespace, ["tasks", "list", "--quiet"]);
        for id in list.lines() {
            lab.ctr_in(&namespace, ["tasks", "delete", "--force", id]);
        }
    }
}

/// Kills what still belongs to the lab in `dir` and unmounts what is mounted there.
pub(super) fn directory(dir: &Path) {
    for (pid, _) in shims(dir) {
        for child in children(pid) {
            kill(child);
        }
        kill(pid);
    }
    for mount in mounts(dir).iter().rev() {
        let _ = rustix::mount::unmount(mount.as_str(), rustix::mount::UnmountFlags::DETACH);
    }
}

/// Removes labs whose owner is gone: killed before it could clean up.
pub(super) fn sweep() {
    for entry in std::fs::read_dir("/var/tmp").into_iter().flatten().flatten() {
        if !entry.file_name().to_string_lossy().starts_with(PREFIX) {
            continue;
        }
        let Some(owner) =
            std::fs::read_to_string(entry.path().join("owner")).ok().filter(|o| !o.is_empty())
        else {
            continue;
        };
        if Path::new("/proc").join(owner.trim()).exists() {
            continue;
        }
        abandoned(&entry.path());
    }
}

/// Removes one lab whose owner is gone.
pub(super) fn abandoned(dir: &Path) {
    // Shims and what runs below them first, while one still shows the other.
    directory(dir);
    let below = format!("{}/", dir.display());
    for (pid, command) in processes() {
        if command.contains(&below) {
            kill(pid);
        }
    }
    directory(dir);
    let _ = std::fs::remove_dir_all(dir);
}

fn kill(pid: i32) {
    if let Some(pid) = Pid::from_raw(pid) {
        let _ = kill_process(pid, Signal::KILL);
    }
}

/// Processes and their command lines.
fn processes() -> Vec<(i32, String)> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries
        .filter_map(|e| e.file_name().to_str()?.parse::<i32>().ok())
        .filter(|p| *p != std::process::id() as i32);
    pids.filter_map(|pid| {
        let command = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        Some((pid, String::from_utf8_lossy(&command).replace('\0', " ")))
    })
    .collect()
}

fn shims(dir: &Path) -> Vec<(i32, String)> {
    let socket = dir.join("containerd.sock").to_string_lossy().into_owned();
    processes()
        .into_iter()
        .filter(|(_, c)| c.contains("containerd-shim") && c.contains(&socket))
        .collect()
}

fn children(pid: i32) -> Vec<i32> {
    let list =
        std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    list.split_whitespace().filter_map(|p| p.parse().ok()).collect()
}

/// Mount points below `dir`, in the order they were made.
fn mounts(dir: &Path) -> Vec<String> {
    let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let below = format!("{}/", dir.display());
    table
        .lines()
        .filter_map(|l| l.split(' ').nth(4))
        .filter(|m| m.starts_with(&below))
        .map(str::to_owned)
        .collect()
}
