//! Ordinary images, which have no table of contents: unpacked by the first pull, lazy by the second
//! one, on the same machine.

#![allow(clippy::unwrap_used)]

use crate::lazy::{
    EVERYTHING, FAST, FILES, SLOW, all, blobs, lab, pull, reads_survive_kills, status, sum,
    until_whole, words, wrong_bytes_are_asked_for_again,
};
use serde_json::Value;
use shipway_integration::{
    any, collect_garbage,
    lazy::{noise, tar_of},
    on_all, on_each,
};
use shipway_testkit::{BaseImage, Lab, Layer, SlowNetwork, run, wait_for};
use std::{path::Path, process::Command, time::Duration};

const SIZE: usize = 1 << 20;
/// Bytes of the large layer that cannot be compressed away.
pub const LARGE: u64 = (FILES * SIZE) as u64;
/// Most bytes of what is no layer: index, manifest and config, asked for by containerd and by us.
pub const LITTLE: u64 = 200_000;

/// busybox, and a layer of large files, small ones, and everything else that a layer may have.
pub fn image() -> BaseImage {
    let mut image = BaseImage::busybox();
    let dir = tempfile::tempdir().unwrap();
    let at = |path: &str| dir.path().join(path);
    for path in ["data", "various/small"] {
        std::fs::create_dir_all(at(path)).unwrap();
    }
    for n in 0..FILES {
        std::fs::write(at(&format!("data/{n}")), noise(n, SIZE)).unwrap();
    }
    for n in 0..300 {
        std::fs::write(at(&format!("various/small/{n}")), noise(1000 + n, 7 * n)).unwrap();
    }
    std::fs::write(at("various/zeros"), vec![0; 5 << 20]).unwrap();
    // What layers with a table of contents keep for themselves is nothing special here.
    std::fs::write(at("various/.prefetch.landmark"), "x").unwrap();
    std::fs::write(at(".prefetch.landmark"), "x").unwrap();
    std::fs::hard_link(at("data/3"), at("various/hard")).unwrap();
    std::os::unix::fs::symlink("../data/3", at("various/link")).unwrap();
    run(Command::new("mkfifo").arg(at("various/fifo"))).ok();
    run(Command::new("mknod").arg(at("various/null")).args(["c", "1", "3"])).ok();
    image.layers.push(Layer::of_dir(dir.path()));
    image
}

/// The same layer in zstd frames, each of so many bytes of the tar.
pub fn zstd_layer(layer: &Layer, frame: usize) -> Layer {
    let tar = tar_of(layer);
    let blob = tar.chunks(frame).flat_map(|part| zstd::bulk::compress(part, 1).unwrap()).collect();
    Layer { blob, ..layer.clone() }
}

pub fn layers(lab: &Lab) -> Vec<Value> {
    status(lab)["lazy"]["layers"].as_array().unwrap().clone()
}

/// Waits until what was unpacked is known.
#[track_caller]
fn until_known(lab: &Lab, count: usize) {
    wait_for("the layers to be known", Duration::from_secs(60), || {
        let (status, layers) = (status(lab), layers(lab));
        let plain = layers.iter().filter(|layer| layer["plain"] == true).count();
        match (status["lazy"]["waiting"].as_u64(), plain) {
            (Some(0), plain) if plain == count => Ok(()),
            _ => Err(status.to_string()),
        }
    });
}

/// Removes all images, and waits until nothing of them is left but what is kept as a cache.
#[track_caller]
pub fn remove(lab: &Lab, namespaces: &[&str]) {
    let directories = lab.dir().join("snapshotter/snapshots");
    wait_for("the snapshots to go", Duration::from_secs(30), || {
        for namespace in namespaces {
            for name in lab.ctr_in(namespace, ["images", "list", "--quiet"]).ok().lines() {
                // containerd may have removed it with another name of the same image.
                let _ = lab.ctr_in(namespace, ["images", "delete", "--sync", name]);
            }
        }
        collect_garbage(lab);
        let left = std::fs::read_dir(&directories).unwrap().count();
        let (used, mounts) =
            (layers(lab).iter().any(|l| l["used"] == true), lab.leftovers().mounts);
        if left == 0 && !used && mounts.is_empty() {
            Ok(())
        } else {
            Err(format!("{left} directories, {mounts:?}: {}", status(lab)))
        }
    });
}

/// The first pull, all that the image has when it is unpacked, and its removal.
#[track_caller]
fn unpacked_once(lab: &Lab, image: &str, count: usize) -> String {
    pull(lab, image);
    until_known(lab, count);
    let eager = lab.ctr(words(image, EVERYTHING)).ok().stdout;
    assert!(eager.contains("various/hard") && eager.lines().count() > 600, "{eager}");
    remove(lab, &["k8s.io"]);
    assert_eq!(blobs(lab), 0);
    eager
}

/// The second pull, which fetches no layer, and the read of one file, which fetches little.
#[track_caller]
fn lazy_then(lab: &Lab, slow: &SlowNetwork, image: &str) {
    let before = slow.bytes();
    pull(lab, image);
    let pulled = slow.bytes() - before;
    assert!(pulled < LITTLE, "{pulled} bytes were fetched by the pull: {}", status(lab));
    assert_eq!(blobs(lab), 3, "index, manifest and config, but no layer");
    let said = lab.ctr(words(image, "sha256sum /data/33")).ok().stdout;
    assert_eq!(said, format!("{}  /data/33\n", sum(33)));
    let fetched = slow.bytes() - before - pulled;
    assert!(fetched > SIZE as u64, "{fetched} bytes were fetched");
    assert!(fetched < LARGE / 3, "{fetched} bytes were fetched for one file");
    assert!(layers(lab).iter().all(|layer| layer["state"] == "lazy" && layer["used"] == true));
}

#[test]
fn the_second_pull_of_an_ordinary_image_is_lazy() {
    on_all(|flavour| {
        let lab = lab(flavour, "background = false\n");
        image().push(&lab.registry(), "plain", "1");
        let slow = SlowNetwork::start(&lab.registry(), FAST);
        let image = format!("{}/plain:1", slow.address());
        let eager = unpacked_once(&lab, &image, 2);
        assert!(slow.bytes() > LARGE, "the first pull fetches all of it");
        // What is kept of the layers is a small part of them.
        let kept = status(&lab)["lazy"]["bytes"].as_u64().unwrap();
        assert!(kept < LARGE / 50, "{kept} bytes are kept");
        lazy_then(&lab, &slow, &image);
        // Another namespace has the same layers by another name.
        let before = slow.bytes();
        lab.ctr_in("other", ["images", "pull", "--plain-http", "--snapshotter", "shipway", &image])
            .ok();
        let fetched = slow.bytes() - before;
        // Only the transfer service of containerd 2 says in a plain pull what it unpacks.
        if flavour == shipway_testkit::Flavour::Newer {
            assert!(fetched < LITTLE, "{fetched} bytes were fetched for another namespace");
        }
        assert_eq!(lab.ctr_in("other", words(&image, EVERYTHING)).ok().stdout, eager);
        assert_eq!(lab.ctr(words(&image, EVERYTHING)).ok().stdout, eager);
        assert_eq!(layers(&lab).len(), 2);
        // It goes, and comes back from what is on the disk.
        remove(&lab, &["k8s.io", "other"]);
        let before = slow.bytes();
        pull(&lab, &image);
        assert_eq!(lab.ctr(words(&image, EVERYTHING)).ok().stdout, eager);
        let again = slow.bytes() - before;
        assert!(again < LITTLE, "{again} bytes were fetched for what was there");
    });
}

#[test]
fn zstd_in_several_frames_is_lazy_and_in_one_it_is_not() {
    let lab = lab(any(), "background = false\n");
    let mut several = image();
    let large = several.layers[1].clone();
    several.layers[1] = zstd_layer(&large, 3 << 20);
    several.push(&lab.registry(), "several", "1");
    let mut one = image();
    one.layers[1] = zstd_layer(&large, usize::MAX);
    one.push(&lab.registry(), "one", "1");
    let slow = SlowNetwork::start(&lab.registry(), FAST);
    let at = |name: &str| format!("{}/{name}:1", slow.address());
    let eager = unpacked_once(&lab, &at("several"), 2);
    lazy_then(&lab, &slow, &at("several"));
    assert_eq!(lab.ctr(words(&at("several"), EVERYTHING)).ok().stdout, eager);
    remove(&lab, &["k8s.io"]);
    // The base is lazy, and its large layer is unpacked each time; status says why.
    pull(&lab, &at("one"));
    wait_for("the layer to be refused", Duration::from_secs(60), || {
        let status = status(&lab);
        let refused = &status["lazy"]["refused"];
        match refused[0][1].as_str() {
            Some(why) if why.contains("in one piece") && refused.as_array().unwrap().len() == 1 => {
                Ok(())
            }
            _ => Err(status.to_string()),
        }
    });
    assert_eq!(lab.ctr(words(&at("one"), EVERYTHING)).ok().stdout, eager);
    let told = run(lab.snapshotter_command().arg("status")).ok().stdout;
    assert!(told.contains("is not lazy: ") && told.contains("plain, lazy"), "{told}");
}

#[test]
fn the_rest_of_an_ordinary_image_comes_by_itself() {
    on_each(|flavour| {
        let mut lab = lab(flavour, "");
        image().push(&lab.registry(), "plain", "1");
        let slow = SlowNetwork::start(&lab.registry(), FAST);
        let image = format!("{}/plain:1", slow.address());
        let eager = unpacked_once(&lab, &image, 2);
        pull(&lab, &image);
        lab.ctr(words(&image, "true")).ok();
        until_whole(&lab, "local");
        slow.set_down(true);
        assert!(lab.kill_keeper());
        assert_eq!(lab.ctr(words(&image, EVERYTHING)).ok().stdout, eager);
        // What is whole is believed after a restart, and mounted as it was.
        lab.kill_snapshotter();
        lab.start_snapshotter();
        wait_for("containerd to reach the snapshotter", Duration::from_secs(30), || {
            let said = lab.ctr(words(&image, EVERYTHING));
            if said.stdout == eager { Ok(()) } else { Err(said.all()) }
        });
    });
}

#[test]
fn reads_of_ordinary_images_go_on_through_kills_and_outages() {
    let mut lab = lab(any(), "background = false\n");
    image().push(&lab.registry(), "plain", "1");
    let slow = SlowNetwork::start(&lab.registry(), SLOW);
    let image = format!("{}/plain:1", slow.address());
    pull(&lab, &image);
    // A kill while the layers are read once more, or before that: the next process does it.
    for _ in 0..2 {
        lab.kill_snapshotter();
        lab.kill_keeper();
        lab.start_snapshotter();
    }
    until_known(&lab, 2);
    remove(&lab, &["k8s.io"]);
    lazy_then(&lab, &slow, &image);
    reads_survive_kills(&mut lab, &slow, &image);
}

/// containerd gives layers up when they are unpacked, if it is told to; here it never had it.
#[test]
fn what_containerd_has_given_up_is_fetched_once_more_if_that_is_allowed() {
    for allowed in [true, false] {
        let more = format!("background = false\nplain_from_registry = {allowed}\n");
        let mut lab = lab(any(), &more);
        let image = image();
        image.push(&lab.registry(), "plain", "1");
        let slow = SlowNetwork::start(&lab.registry(), FAST);
        let name = format!("{}/plain:1", slow.address());
        let layer = shipway_oci::Digest::of(&image.layers[1].blob);
        lab.kill_snapshotter();
        let waits = lab.dir().join("snapshotter/plain");
        let left = serde_json::json!({
            "layer": layer.to_string(), "namespace": "nobody", "image": name, "manifest": null, "tries": 0,
        });
        std::fs::write(waits.join(layer.hex()), left.to_string()).unwrap();
        lab.start_snapshotter();
        until_known(&lab, usize::from(allowed));
        assert_eq!(slow.bytes() > LARGE, allowed);
        assert_eq!(std::fs::read_dir(waits).unwrap().count(), 0);
        // Its base is not known, and it is.
        let before = slow.bytes();
        pull(&lab, &name);
        let pulled = slow.bytes() - before;
        assert_eq!(pulled < LARGE, allowed, "{pulled} bytes were fetched");
        let (script, want) = all();
        // On a busy machine ctr may end before it has copied the last lines.
        wait_for("all of the output", Duration::from_secs(60), || {
            let said = lab.ctr(words(&name, &script)).ok();
            if said.stdout == want { Ok(()) } else { Err(said.stdout) }
        });
    }
}

/// Changes a byte in the middle of a file.
fn damage(path: &Path) {
    let mut bytes = std::fs::read(path).unwrap();
    let at = bytes.len() / 2;
    bytes[at] ^= 1;
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn what_is_damaged_is_thrown_away_and_made_again() {
    let mut lab = lab(any(), "background = false\n");
    image().push(&lab.registry(), "plain", "1");
    let slow = SlowNetwork::start(&lab.registry(), FAST);
    let image = format!("{}/plain:1", slow.address());
    let eager = unpacked_once(&lab, &image, 2);
    lab.kill_snapshotter();
    let old: Vec<u64> = std::fs::read_dir(lab.dir().join("snapshotter/layers"))
        .unwrap()
        .filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok())
        .collect();
    assert_eq!(old.len(), 2);
    for number in &old {
        damage(&lab.dir().join(format!("snapshotter/layers/{number}/spans")));
    }
    lab.start_snapshotter();
    wait_for("containerd to reach the snapshotter", Duration::from_secs(30), || {
        let said = lab.ctr(["snapshots", "--snapshotter", "shipway", "list"]);
        if said.code == Some(0) { Ok(()) } else { Err(said.all()) }
    });
    let before = slow.bytes();
    pull(&lab, &image);
    assert!(slow.bytes() - before > LARGE, "the layers are unpacked: {}", status(&lab));
    assert_eq!(lab.ctr(words(&image, EVERYTHING)).ok().stdout, eager);
    until_known(&lab, 2);
    assert!(layers(&lab).iter().all(|l| !old.contains(&l["layer"].as_u64().unwrap())));
    remove(&lab, &["k8s.io"]);
    lazy_then(&lab, &slow, &image);
    assert_eq!(lab.ctr(words(&image, EVERYTHING)).ok().stdout, eager);
}

#[test]
fn wrong_bytes_of_a_registry_are_asked_for_again() {
    let lab = lab(any(), "background = false\n");
    image().push(&lab.registry(), "plain", "1");
    wrong_bytes_are_asked_for_again(&lab, "plain", |image| drop(unpacked_once(&lab, image, 2)));
}

#[test]
fn without_the_setting_everything_is_as_before() {
    let lab = lab(any(), "background = false\nplain = false\n");
    image().push(&lab.registry(), "plain", "1");
    let slow = SlowNetwork::start(&lab.registry(), FAST);
    let image = format!("{}/plain:1", slow.address());
    for _ in 0..2 {
        let before = slow.bytes();
        pull(&lab, &image);
        assert!(slow.bytes() - before > LARGE);
        assert!(layers(&lab).is_empty() && status(&lab)["lazy"]["waiting"] == 0);
        remove(&lab, &["k8s.io"]);
    }
}
