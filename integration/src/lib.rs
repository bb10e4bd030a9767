//! Live tests: one file per behavior below `tests/`, each against a containerd, registry and
//! daemon of its own. What several of them share is here.

#![allow(clippy::unwrap_used, clippy::missing_panics_doc)]

pub mod cri;
pub mod images;
pub mod kubernetes;
pub mod lazy;
pub mod random;

use serde_json::Value;
use shipway_oci::{ChainId, DiffId, Digest};
use shipway_testkit::{Finished, Flavour, Lab, Leftovers, Process, free_port, wait_for};
use std::{net::TcpStream, path::Path, process::Command, time::Duration};

/// Runs `check` on every containerd that is here, and says which one when it fails.
pub fn on_each(check: impl Fn(Flavour)) {
    let present = Flavour::present();
    assert!(!present.is_empty(), "no containerd is installed; `cargo xtask test` installs it");
    for flavour in present {
        eprintln!("on containerd {} ({flavour:?})", flavour.version());
        check(flavour);
    }
}

/// The same on every containerd that can be had, for what depends on how a version talks to its
/// plug-ins.
pub fn on_all(check: impl Fn(Flavour)) {
    let all = Flavour::all();
    assert!(!all.is_empty(), "no containerd is installed; `cargo xtask test` installs it");
    for flavour in all {
        eprintln!("on containerd {} ({flavour:?})", flavour.version());
        check(flavour);
    }
}

/// The containerd for tests whose behavior does not depend on its version: the newest here.
pub fn any() -> Flavour {
    *Flavour::present().last().expect("no containerd is installed; `cargo xtask test` installs it")
}

/// `shipway build` of `context`, tagged, with plain progress; more arguments before the context.
#[track_caller]
pub fn build(lab: &Lab, tag: &str, context: &Path, more: &[&str]) -> Finished {
    let context = context.to_string_lossy();
    let fixed = ["build", "--progress", "plain", "--tag", tag];
    lab.shipway(fixed.into_iter().chain(more.iter().copied()).chain([&*context]))
}

/// Builds the Dockerfile `text` in a context of its own and tags it.
#[track_caller]
pub fn build_text(lab: &Lab, tag: &str, text: &str) -> Finished {
    let name = tag.replace([':', '/'], "-");
    build(lab, tag, &lab.context(&name, &[("Dockerfile", text)]), &[])
}

/// `ctr run` of an image's own command, or of another. On a busy machine `ctr` sometimes hears
/// nothing of a process that ends at once, but its exit code: one that succeeded without a word is
/// asked again.
#[track_caller]
pub fn ctr_run(lab: &Lab, image: &str, command: &[&str]) -> Finished {
    use std::sync::atomic::{AtomicU32, Ordering};
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let run = || {
        let id = format!("run-{}", NEXT.fetch_add(1, Ordering::Relaxed));
        let words = ["run", "--rm", image, &id];
        lab.ctr(words.into_iter().chain(command.iter().copied()))
    };
    let silent = |f: &Finished| f.code == Some(0) && f.stdout.is_empty();
    let first = run();
    if silent(&first) { run() } else { first }
}

/// Serves the repositories below `base` by git's own protocol until the process is dropped; gives
/// its port, too.
#[track_caller]
pub fn git_daemon(base: &Path) -> (Process, u16) {
    let port = free_port();
    let mut daemon = Command::new("git");
    daemon
        .args(["daemon", "--reuseaddr", "--export-all", "--listen=127.0.0.1"])
        .arg(format!("--port={port}"))
        .arg(format!("--base-path={}", base.display()));
    let process = Process::start("git", &mut daemon, &base.join("git.log"));
    wait_for("git to listen", Duration::from_secs(20), || {
        TcpStream::connect(("127.0.0.1", port)).map(drop).map_err(|e| e.to_string())
    });
    (process, port)
}

/// An image as containerd has it.
pub struct Image {
    /// Digest that the record points at: an index or a manifest.
    pub target: String,
    /// Digest of the manifest.
    pub digest: String,
    /// The manifest.
    pub manifest: Value,
    /// The config.
    pub config: Value,
}

impl Image {
    /// Reads the record `name` and what it points at. Attestations of an index are passed over.
    #[track_caller]
    pub fn of(lab: &Lab, name: &str) -> Self {
        let list = lab.ctr(["images", "list", &format!("name=={name}")]).ok();
        let row = list
            .lines()
            .find(|l| l.starts_with(name))
            .unwrap_or_else(|| panic!("there is no image {name}:\n{}", list.stdout));
        let target = row.split_whitespace().find(|w| w.starts_with("sha256:")).unwrap().to_owned();
        let mut digest = target.clone();
        let mut manifest = blob(lab, &digest);
        if let Some(entries) = manifest["manifests"].as_array() {
            let entry = entries
                .iter()
                .find(|e| e["platform"]["os"] != "unknown")
                .expect("an index without an image");
            digest = entry["digest"].as_str().unwrap().to_owned();
            manifest = blob(lab, &digest);
        }
        let config = blob(lab, manifest["config"]["digest"].as_str().unwrap());
        Self { target, digest, manifest, config }
    }

    /// Names its snapshots must have, lowest first.
    pub fn chain(&self) -> Vec<String> {
        let ids = self.config["rootfs"]["diff_ids"]
            .as_array()
            .unwrap()
            .iter()
            .map(|d| d.as_str().unwrap().parse::<DiffId>().unwrap());
        let chain = ids.scan(None, |below, layer| {
            *below = Some(ChainId::extend(*below, layer));
            *below
        });
        chain.map(|c| c.to_string()).collect()
    }

    /// Digests of its layers' blobs, lowest first.
    pub fn layers(&self) -> Vec<String> {
        self.manifest["layers"]
            .as_array()
            .unwrap()
            .iter()
            .map(|l| l["digest"].as_str().unwrap().to_owned())
            .collect()
    }
}

/// A JSON blob of containerd's content store, its digest verified.
#[track_caller]
pub fn blob(lab: &Lab, digest: &str) -> Value {
    let got = lab.ctr(["content", "get", digest]).ok();
    assert_eq!(
        Digest::of(&got.stdout).to_string(),
        digest,
        "a blob that does not match its digest"
    );
    serde_json::from_str(&got.stdout).unwrap()
}

/// Snapshots there are: name and parent.
pub fn snapshots(lab: &Lab) -> Vec<(String, String)> {
    let list = lab.ctr(["snapshots", "list"]).ok();
    let rows = list.lines().skip(1).map(|l| {
        let words: Vec<&str> = l.split_whitespace().collect();
        let parent = if words.len() > 2 { words[1] } else { "" };
        (words[0].to_owned(), parent.to_owned())
    });
    rows.collect()
}

/// A garbage collection that has ended when this returns.
pub fn collect_garbage(lab: &Lab) {
    lab.ctr(["leases", "create", "--id", "collect-now"]).ok();
    lab.ctr(["leases", "delete", "--sync", "collect-now"]).ok();
}

/// Removes every image record, and with them what only they kept.
#[track_caller]
pub fn remove_images(lab: &Lab) {
    for image in lab.ctr(["images", "list", "--quiet"]).ok().lines() {
        lab.ctr(["images", "delete", "--sync", image]).ok();
    }
}

/// Removes what builds are meant to leave, the images; then prunes all of the cache.
#[track_caller]
pub fn remove_everything(lab: &Lab) {
    remove_images(lab);
    lab.shipway(["prune", "--all"]).ok();
    collect_garbage(lab);
}

/// Ends the daemon, which then leaves nothing at all.
#[track_caller]
pub fn nothing_left_at_the_end(lab: &mut Lab) {
    assert!(lab.stop_daemon(), "the daemon had to be killed");
    let left = lab.leftovers();
    assert!(left.is_empty(), "{left:#?}");
}

/// Within `time` no container is there but those that keep shims warm.
#[track_caller]
pub fn containers_go(lab: &Lab, time: Duration) {
    wait_for("the container to go", time, || {
        let left = lab.leftovers().containers;
        if left.iter().all(|c| c.ends_with("-keeper")) { Ok(()) } else { Err(format!("{left:?}")) }
    });
}

/// Nothing is left in containerd or around it: at once of what was stored, within half a minute of
/// what was kept warm.
#[track_caller]
pub fn nothing_left(lab: &Lab) {
    let left = lab.leftovers();
    let stored = Leftovers {
        containers: Vec::new(),
        tasks: Vec::new(),
        sandboxes: Vec::new(),
        shims: Vec::new(),
        ..left
    };
    assert!(stored.is_empty(), "left behind: {stored:#?}");
    wait_for("warm shims to end", Duration::from_secs(30), || {
        let left = lab.leftovers();
        if left.is_empty() { Ok(()) } else { Err(format!("left behind: {left:#?}")) }
    });
}

/// KiB of a process's memory, by a field of `smaps_rollup` such as `Anonymous`.
#[track_caller]
pub fn smaps(pid: u32, field: &str) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
    let line = text.lines().find_map(|l| l.strip_prefix(field)?.strip_prefix(':'));
    let line = line.unwrap_or_else(|| panic!("no {field} in\n{text}"));
    line.trim().trim_end_matches(" kB").parse().unwrap()
}
