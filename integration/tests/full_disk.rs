//! A disk that is full. Where old cache can go, it goes and builds succeed; where nothing can, the
//! error says so, whichever part met it first, and after a prune builds work again. What `du` shows
//! is what the disk has lost.

#![allow(clippy::unwrap_used)]

use shipway_host::Disk;
use shipway_integration::{
    any, build, build_text, random::Random, remove_everything, remove_images,
};
use shipway_testkit::{BaseImage, Lab, LabDisk, LabOptions};

#[test]
fn a_full_disk_is_named_and_a_prune_helps() {
    let mut lab =
        Lab::start(LabOptions { disk: Some(LabDisk::Memory(48 << 20)), ..LabOptions::new(any()) });
    lab.start_registry();
    BaseImage::busybox().push(&lab.registry(), "library/busybox", "latest");
    lab.start_daemon();
    // A step fills it.
    let failed =
        build_text(&lab, "full:1", "FROM busybox\nRUN dd if=/dev/zero of=/big bs=1M count=100\n")
            .failed();
    assert!(failed.all().contains("disk is full"), "{}", failed.all());
    // A layer fits as a snapshot, and not again as a blob.
    let failed =
        build_text(&lab, "full:2", "FROM busybox\nRUN dd if=/dev/urandom of=/big bs=1M count=30\n")
            .failed();
    assert!(failed.all().contains("disk is full"), "{}", failed.all());
    remove_everything(&lab);
    build_text(&lab, "full:3", "FROM busybox\nRUN echo fits > /small\n").ok();
}

/// A lab whose containerd has a disk of 400 MB, and a daemon with its usual limits, which are
/// larger.
#[track_caller]
fn small_disk() -> Lab {
    let disk = Some(LabDisk::Ext4(400 << 20));
    let mut lab = Lab::start(LabOptions { disk, ..LabOptions::new(any()) });
    lab.start_registry();
    BaseImage::busybox().push(&lab.registry(), "library/busybox", "latest");
    lab.start_daemon();
    lab
}

#[track_caller]
fn disk_of(lab: &Lab) -> Disk {
    Disk::of(&lab.dir().join("containerd-root")).unwrap()
}

/// Builds that leave nothing but cache, until there is less than `free` left on the disk.
#[track_caller]
fn fill(lab: &Lab, name: &str, free: u64) {
    let mut number = 0;
    while disk_of(lab).free >= free {
        number += 1;
        let text =
            format!("FROM busybox\nRUN dd if=/dev/urandom of=/{name}-{number} bs=1M count=30\n");
        let context = lab.context(&format!("{name}-{number}"), &[("Dockerfile", &text)]);
        let context = context.to_string_lossy();
        lab.shipway(["build", "--output", "type=cacheonly", &*context]).ok();
    }
}

#[test]
fn builds_succeed_on_a_disk_that_is_full_of_old_cache() {
    let lab = small_disk();
    fill(&lab, "old", 60 << 20);
    // A step fills it.
    let text = "FROM busybox\nRUN dd if=/dev/zero of=/big bs=1M count=120\n";
    let built = build_text(&lab, "large:1", text).ok();
    assert!(built.all().contains("the disk was full: removed"), "{}", built.all());
    remove_images(&lab);

    // What a client sends, a copy of it, and its blob do.
    fill(&lab, "more", 60 << 20);
    let context = lab.context("copied", &[("Dockerfile", "FROM busybox\nCOPY big /big\n")]);
    let mut random = Random::new(7);
    let bytes: Vec<u8> = (0..(70 << 20) / 8).flat_map(|_| random.bits().to_le_bytes()).collect();
    std::fs::write(context.join("big"), bytes).unwrap();
    let built = build(&lab, "large:2", &context, &[]).ok();
    assert!(built.all().contains("the disk was full: removed"), "{}", built.all());
    assert!(build(&lab, "large:2", &context, &[]).ok().all().contains("CACHED"));
}

#[test]
fn what_du_shows_is_what_the_disk_has_lost() {
    let lab = small_disk();
    let before = disk_of(&lab).used();
    for (tag, mb) in [("one:1", 20), ("two:1", 30)] {
        let text = format!(
            "FROM busybox\nRUN dd if=/dev/urandom of=/{mb} bs=1M count={mb}\nRUN mkdir /d && for i in $(seq 300); do head -c 9000 /dev/urandom > /d/$i; done\n"
        );
        build_text(&lab, tag, &text).ok();
    }
    fill(&lab, "private", 200 << 20);
    let rows = lab.shipway(["du", "--format", "{{json .}}"]).ok();
    let rows: Vec<serde_json::Value> = serde_json::from_str(&rows.stdout).unwrap();
    let sum = |shared: bool| -> u64 {
        let rows = rows.iter().filter(|row| row["shared"].as_bool() == Some(shared));
        rows.map(|row| row["size"].as_u64().unwrap()).sum()
    };
    let (shared, private) = (sum(true), sum(false));
    // Each layer of an image is there twice, as a snapshot and as a blob.
    assert!(shared > 2 * (50 << 20) && private >= 30 << 20, "{shared} shared, {private} private");
    rustix::fs::sync();
    let lost = disk_of(&lab).used() - before;
    let apart = lost.abs_diff(shared + private);
    assert!(apart * 50 <= lost, "{lost} bytes are used, and du shows {}", shared + private);
    // A prune that removes nothing says what the next one removes.
    let would = lab.shipway(["prune", "--all", "--dry-run"]).ok();
    assert_eq!(disk_of(&lab).used() - before, lost, "it removed something");
    let total =
        |text: &str| text.lines().rev().find(|l| l.starts_with("Total:")).map(str::to_owned);
    let did = lab.shipway(["prune", "--all"]).ok();
    assert_eq!(total(&would.stdout), total(&did.stdout), "{}\n{}", would.stdout, did.stdout);
}
