//! Ordinary images that the snapshotter pulls as a whole, with `pull = "fast"`: fetched in parts,
//! unpacked once, and never seen by containerd's content store.

#![allow(clippy::unwrap_used)]

use crate::{
    lazy::{EVERYTHING, FAST, blobs, lab, pull, status, words},
    plain_lazy::{LARGE, LITTLE, image, layers, remove, zstd_layer},
};
use shipway_integration::{
    any,
    cri::{Cri, wire},
    on_all,
};
use shipway_oci::Digest;
use shipway_testkit::{
    BaseImage, FaultyRegistry, Flavour, Lab, Layer, Network, RegistryFault, SlowNetwork, run,
    wait_for,
};
use std::{
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

const SETTINGS: &str = "pull = \"fast\"\nbackground = false\n";

/// All that an image has when containerd has unpacked it itself.
#[track_caller]
fn twin(lab: &Lab, image: &str) -> String {
    let pulled = ["images", "pull", "--plain-http", "--snapshotter", "overlayfs", image];
    lab.ctr_in("twin", pulled).ok();
    let mut run = words(image, EVERYTHING);
    *run.iter_mut().find(|word| *word == "shipway").unwrap() = "overlayfs".into();
    let eager = lab.ctr_in("twin", run).ok().stdout;
    assert!(eager.lines().count() > 600, "{eager}");
    eager
}

/// What is being made in the store of layers, or was and is not any more.
fn unfinished(lab: &Lab) -> Vec<String> {
    let names = std::fs::read_dir(lab.dir().join("snapshotter/layers")).unwrap();
    let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.starts_with("new.")).collect()
}

/// A pull over CRI that may fail.
fn try_pull(lab: &Lab, image: &str) -> Result<(), String> {
    try_pull_at(&lab.containerd_socket(), image)
}

fn try_pull_at(socket: &Path, image: &str) -> Result<(), String> {
    let image = Some(wire::Id { id: image.into() });
    let pulled: Result<wire::Id, _> =
        Cri::at(socket).try_call("PullImage", wire::PullImage { image });
    pulled.map(drop).map_err(|e| e.to_string())
}

#[track_caller]
fn all_whole(lab: &Lab, count: usize) {
    let layers = layers(lab);
    let is_whole = |l: &serde_json::Value| l["state"] == "whole" && l["plain"] == true;
    assert!(layers.len() == count && layers.iter().all(is_whole), "{}", status(lab));
    assert_eq!(unfinished(lab), [""; 0]);
}

#[test]
fn an_ordinary_image_is_pulled_whole_and_unpacked_once() {
    on_all(|flavour| {
        let mut lab = lab(flavour, SETTINGS);
        let made = image();
        made.push(&lab.registry(), "plain", "1");
        let eager = twin(&lab, &format!("{}/plain:1", lab.registry()));
        let slow = SlowNetwork::start(&lab.registry(), FAST);
        let image = format!("{}/plain:1", slow.address());
        pull(&lab, &image);
        // Each byte of a blob comes once, and none of them to containerd.
        let compressed: u64 = made.layers.iter().map(|layer| layer.blob.len() as u64).sum();
        let pulled = slow.bytes();
        assert!(
            pulled >= compressed && pulled < compressed + LITTLE,
            "{pulled} bytes were fetched for {compressed}"
        );
        assert_eq!(blobs(&lab), 3, "index, manifest and config, but no layer");
        all_whole(&lab, 2);
        assert_eq!(status(&lab)["lazy"]["pulling"], serde_json::json!([]));
        let told = run(lab.snapshotter_command().arg("status")).ok().stdout;
        assert!(told.contains("pull       fast\n") && told.contains("plain, whole"), "{told}");
        assert_eq!(lab.ctr(words(&image, EVERYTHING)).ok().stdout, eager);
        // Nobody is needed any more.
        slow.set_down(true);
        lab.kill_keeper();
        assert_eq!(lab.ctr(words(&image, EVERYTHING)).ok().stdout, eager);
        lab.kill_snapshotter();
        lab.start_snapshotter();
        wait_for("containerd to reach the snapshotter", Duration::from_secs(30), || {
            let said = lab.ctr(words(&image, EVERYTHING));
            if said.stdout == eager { Ok(()) } else { Err(said.all()) }
        });
        slow.set_down(false);
        // Another namespace has the same layers by another name.
        let before = slow.bytes();
        lab.ctr_in("other", ["images", "pull", "--plain-http", "--snapshotter", "shipway", &image])
            .ok();
        let fetched = slow.bytes() - before;
        // Only the transfer service of containerd 2 says in a plain pull what it unpacks.
        if flavour == Flavour::Newer {
            assert!(fetched < LITTLE, "{fetched} bytes were fetched for another namespace");
        }
        assert_eq!(lab.ctr_in("other", words(&image, EVERYTHING)).ok().stdout, eager);
        // It goes, and comes back from what is on the disk.
        remove(&lab, &["k8s.io", "other"]);
        let before = slow.bytes();
        pull(&lab, &image);
        assert_eq!(lab.ctr(words(&image, EVERYTHING)).ok().stdout, eager);
        let again = slow.bytes() - before;
        assert!(again < LITTLE, "{again} bytes were fetched for what was there");
        all_whole(&lab, 2);
    });
}

/// One long zstd frame, and a directory without an entry, which has to be unpacked.
#[test]
fn what_cannot_be_lazy_is_pulled_as_well() {
    let lab = lab(any(), SETTINGS);
    let mut made = image();
    made.layers[1] = zstd_layer(&made.layers[1], usize::MAX);
    made.push(&lab.registry(), "one", "1");
    let slow = SlowNetwork::start(&lab.registry(), FAST);
    let image = format!("{}/one:1", slow.address());
    let eager = twin(&lab, &format!("{}/one:1", lab.registry()));
    pull(&lab, &image);
    assert_eq!(blobs(&lab), 3, "index, manifest and config, but no layer");
    all_whole(&lab, 2);
    assert_eq!(lab.ctr(words(&image, EVERYTHING)).ok().stdout, eager);
    remove(&lab, &["k8s.io"]);
    let before = slow.bytes();
    pull(&lab, &image);
    assert!(slow.bytes() - before < LITTLE);
    assert_eq!(lab.ctr(words(&image, EVERYTHING)).ok().stdout, eager);
    // containerd takes the attributes of this directory from the layer below.
    let mut header = tar::Header::new_gnu();
    header.set_size(5);
    header.set_mode(0o644);
    let mut implicit = tar::Builder::new(Vec::new());
    implicit.append_data(&mut header, "root/here", &b"hello"[..]).unwrap();
    let implicit = implicit.into_inner().unwrap();
    let mut made = BaseImage::busybox();
    made.layers.push(Layer {
        blob: zstd::bulk::compress(&implicit, 1).unwrap(),
        diff_id: Digest::of(&implicit).to_string(),
        ..made.layers[0].clone()
    });
    made.push(&lab.registry(), "implicit", "1");
    let image = format!("{}/implicit:1", slow.address());
    pull(&lab, &image);
    let said = lab.ctr(words(&image, "stat -c %a /root && cat /root/here")).ok().stdout;
    let below =
        lab.ctr(words(&format!("{}/one:1", slow.address()), "stat -c %a /root")).ok().stdout;
    assert_eq!(said, format!("{below}hello"));
    assert_eq!(unfinished(&lab), [""; 0]);
}

#[test]
fn what_is_wrong_is_never_mounted() {
    let lab = lab(any(), SETTINGS);
    let made = image();
    made.push(&lab.registry(), "plain", "1");
    let large = Digest::of(&made.layers[1].blob);
    let of_large = || layers(&lab).into_iter().find(|l| l["digest"] == large.to_string());
    let path = format!("/blobs/{large}");
    // Another time in the header of the gzip stream: the same files, and other bytes. containerd
    // does not take them either.
    let stored = blob_file(&lab.dir().join("registry"), &large.hex());
    let mut bytes = std::fs::read(&stored).unwrap();
    bytes[4] ^= 1;
    std::fs::write(&stored, &bytes).unwrap();
    try_pull(&lab, &format!("{}/plain:1", lab.registry())).unwrap_err();
    assert!(of_large().is_none(), "{}", status(&lab));
    assert!(status(&lab)["lazy"]["totals"]["wrong"].as_u64().unwrap() >= 1, "{}", status(&lab));
    assert_eq!(unfinished(&lab), [""; 0]);
    bytes[4] ^= 1;
    std::fs::write(&stored, &bytes).unwrap();
    // Some of the time: what is left to containerd is right.
    let wrong = Arc::new(AtomicU32::new(1));
    let fault = RegistryFault::CorruptSome(wrong.clone());
    let registry = FaultyRegistry::start(&lab.registry(), &path, fault);
    let image = format!("{}/plain:1", registry.address());
    pull(&lab, &image);
    assert_eq!(wrong.load(Ordering::Relaxed), 0);
    assert_eq!(blobs(&lab), 4, "index, manifest, config and the layer");
    let eager = twin(&lab, &format!("{}/plain:1", lab.registry()));
    assert_eq!(lab.ctr(words(&image, EVERYTHING)).ok().stdout, eager);
    // A config that says another digest of the tar: such a layer is nobody's snapshot, whether it
    // was just pulled or is there.
    let mut lie = self::image();
    lie.layers[1] =
        Layer { diff_id: Digest::of("another tar").to_string(), ..noted(&lie.layers[1]) };
    lie.push(&lab.registry(), "lie", "1");
    let image = format!("{}/lie:1", lab.registry());
    for _ in 0..2 {
        try_pull(&lab, &image).unwrap_err();
        let lie = Digest::of(&lie.layers[1].blob).to_string();
        let layer = layers(&lab).into_iter().find(|l| l["digest"] == lie).unwrap();
        assert!(layer["used"] == false && layer["mounted"].is_null(), "{layer}");
    }
}

/// Where the registry below `dir` keeps a blob.
fn blob_file(dir: &Path, hex: &str) -> PathBuf {
    let mut left = vec![dir.to_owned()];
    while let Some(dir) = left.pop() {
        for entry in std::fs::read_dir(dir).into_iter().flatten().map(Result::unwrap) {
            let path = entry.path().join("data");
            if entry.file_name() == hex && path.is_file() {
                return path;
            }
            if entry.file_type().unwrap().is_dir() {
                left.push(entry.path());
            }
        }
    }
    panic!("no blob {hex}")
}

/// The same layer with another blob.
fn noted(layer: &Layer) -> Layer {
    zstd_layer(layer, 8 << 20)
}

#[test]
fn an_end_in_the_middle_leaves_nothing() {
    let mut lab = lab(any(), SETTINGS);
    image().push(&lab.registry(), "plain", "1");
    let eager = twin(&lab, &format!("{}/plain:1", lab.registry()));
    let line = Network { latency: Duration::from_millis(2), bandwidth: 8 << 20 };
    let slow = SlowNetwork::start(&lab.registry(), line);
    let image = format!("{}/plain:1", slow.address());
    for stops in [true, false] {
        let (socket, name) = (lab.containerd_socket(), image.clone());
        let pulling = std::thread::spawn(move || try_pull_at(&socket, &name));
        wait_for("a part of the layer", Duration::from_secs(60), || {
            let status = status(&lab);
            let pulling = status["lazy"]["pulling"].as_array().unwrap().clone();
            let part = pulling.iter().any(|p| p["received"].as_u64().unwrap() > LARGE / 4);
            if part { Ok(()) } else { Err(status.to_string()) }
        });
        assert_eq!(unfinished(&lab).len(), 1);
        match stops {
            // Nobody who stops it waits for a pull.
            true => assert!(lab.stop_snapshotter()),
            false => lab.kill_snapshotter(),
        }
        pulling.join().unwrap().unwrap_err();
        lab.start_snapshotter();
        assert_eq!(unfinished(&lab), [""; 0]);
        wait_for("containerd to reach the snapshotter", Duration::from_secs(30), || {
            // A list that is empty is answered without the snapshotter.
            let said = lab.ctr(["snapshots", "--snapshotter", "shipway", "prepare", "reached"]);
            if said.code == Some(0) { Ok(()) } else { Err(said.all()) }
        });
        lab.ctr(["snapshots", "--snapshotter", "shipway", "remove", "reached"]).ok();
    }
    try_pull(&lab, &image).unwrap();
    assert_eq!(blobs(&lab), 3, "index, manifest and config, but no layer");
    all_whole(&lab, 2);
    assert_eq!(lab.ctr(words(&image, EVERYTHING)).ok().stdout, eager);
}
