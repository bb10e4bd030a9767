//! Containers read an image that is still being fetched while everything beneath them is killed, in
//! any order: the snapshotter, the keeper, both, containerd, and all of them.
//!
//! `SHIPWAY_KILLS` is how often each is killed, a few times for each image, and
//! `SHIPWAY_KILLS_SEED` makes the order the same again.

#![allow(clippy::unwrap_used)]

use crate::lazy::{FILES, lab, pull, push, status, sum};
use shipway_estargz::Output;
use shipway_integration::{on_each, random::Random};
use shipway_testkit::{Flavour, Lab, Network, SlowNetwork, wait_for};
use std::{path::PathBuf, time::Duration};

/// How often each is killed under one image, and in all unless the environment says otherwise.
const KILLS: u64 = 3;
/// About how long a kill and what follows it take.
const KILL_TAKES: f64 = 1.5;
/// What has to come over the network after each kill.
const PROGRESS: u64 = 64 << 10;
const READERS: usize = 3;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Victim {
    Snapshotter,
    Keeper,
    Both,
    Containerd,
    All,
}

const VICTIMS: [Victim; 5] =
    [Victim::Snapshotter, Victim::Keeper, Victim::Both, Victim::Containerd, Victim::All];

fn kill(lab: &mut Lab, victim: Victim) {
    let containerd = matches!(victim, Victim::Containerd | Victim::All);
    let snapshotter = matches!(victim, Victim::Snapshotter | Victim::Both | Victim::All);
    let keeper = matches!(victim, Victim::Keeper | Victim::Both | Victim::All);
    if containerd {
        lab.kill_containerd();
    }
    if snapshotter {
        lab.kill_snapshotter();
    }
    if keeper {
        lab.kill_keeper();
    }
    if snapshotter {
        lab.start_snapshotter();
    }
    if containerd {
        lab.start_containerd();
    }
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|n| n.parse().expect("a number"))
}

/// A container that reads all files, beginning with another one than the others, and writes what
/// it read into a file of the host.
struct Reader {
    id: String,
    out: PathBuf,
    order: Vec<usize>,
}

impl Reader {
    fn start(lab: &Lab, image: &str, n: usize) -> Self {
        // The runtime's names are those of all labs.
        let dir = lab.dir().file_name().unwrap().to_string_lossy().to_lowercase();
        let id = format!("reader-{dir}-{n}");
        let dir = lab.dir().join("readers");
        std::fs::create_dir_all(&dir).unwrap();
        let first = n * FILES / READERS;
        let order: Vec<usize> = (first..FILES).chain(0..first).collect();
        let names: Vec<String> = order.iter().map(|n| format!("/data/{n}")).collect();
        let script = format!("sha256sum {} > /out/{n} 2>&1", names.join(" "));
        let mount = format!("type=bind,src={},dst=/out,options=rbind:rw", dir.display());
        let words = ["run", "--detach", "--snapshotter", "shipway", "--mount", &mount];
        lab.ctr(words.iter().chain(&[image, &id, "sh", "-c", &script])).ok();
        Self { id, out: dir.join(n.to_string()), order }
    }

    fn has_read(&self) -> String {
        std::fs::read_to_string(&self.out).unwrap_or_default()
    }

    fn wants(&self) -> String {
        self.order.iter().map(|n| format!("{}  /data/{n}\n", sum(*n))).collect()
    }
}

/// Kills each of [`VICTIMS`] so many times.
#[track_caller]
fn readers_outlive(flavour: Flavour, times: u64, seed: u64) {
    println!("SHIPWAY_KILLS={times} SHIPWAY_KILLS_SEED={seed}");
    let mut random = Random::new(seed);
    let mut lab = lab(flavour, "background = false\n");
    push(&lab.registry(), Output::Estargz);
    // So slow that reads go on for as long as there are kills.
    let time = KILL_TAKES * (times * VICTIMS.len() as u64) as f64;
    let bandwidth = (((FILES << 20) as f64 / time) as u64).clamp(1 << 20, 8 << 20);
    let slow = SlowNetwork::start(
        &lab.registry(),
        Network { latency: Duration::from_millis(5), bandwidth },
    );
    let image = format!("{}/lazy:1", slow.address());
    pull(&lab, &image);
    let readers: Vec<Reader> = (0..READERS).map(|n| Reader::start(&lab, &image, n)).collect();
    let complete = || readers.iter().all(|r| r.has_read().lines().count() == FILES);

    let mut left: Vec<Victim> =
        VICTIMS.iter().flat_map(|v| std::iter::repeat_n(*v, times as usize)).collect();
    let mut beneath_readers = 0;
    while !left.is_empty() {
        let victim = left.swap_remove(random.below(left.len()));
        let before = slow.bytes();
        kill(&mut lab, victim);
        beneath_readers += u64::from(!complete());
        wait_for("data to come after a kill", Duration::from_secs(60), || {
            if slow.bytes() > before + PROGRESS || complete() {
                return Ok(());
            }
            Err(format!("{victim:?} was killed, {} to go: {}", left.len(), status(&lab)))
        });
    }
    assert!(beneath_readers > times, "the readers were done after {beneath_readers} kills");
    wait_for("the readers to end", Duration::from_secs(240), || {
        if complete() { Ok(()) } else { Err(status(&lab).to_string()) }
    });
    for reader in &readers {
        assert_eq!(reader.has_read(), reader.wants());
        lab.ctr(["tasks", "delete", "--force", &reader.id]);
        lab.ctr(["containers", "delete", &reader.id]).ok();
    }
    // No process is stuck, and nothing stays mounted.
    lab.ctr(["images", "delete", "--sync", &image]).ok();
    for name in lab.ctr(["images", "list", "--quiet"]).ok().lines() {
        lab.ctr(["images", "delete", "--sync", name]).ok();
    }
    wait_for("the layers to be unmounted", Duration::from_secs(20), || {
        match lab.leftovers().mounts {
            left if left.is_empty() => Ok(()),
            left => Err(format!("{left:?}")),
        }
    });
    println!("{beneath_readers} kills while containers read, {} bytes", slow.bytes());
}

#[test]
fn readers_outlive_kills_of_everything_beneath_them() {
    let all = number("SHIPWAY_KILLS").unwrap_or(KILLS);
    let seed = number("SHIPWAY_KILLS_SEED").unwrap_or(u64::from(std::process::id()));
    on_each(|flavour| {
        let mut left = all;
        while left > 0 {
            let times = left.min(KILLS);
            readers_outlive(flavour, times, seed + all - left);
            left -= times;
        }
    });
}
