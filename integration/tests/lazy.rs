//! Images that run while they are fetched: pulls over CRI, containers, kills and outages, with a
//! slow network between.

#![allow(clippy::unwrap_used)]

use serde_json::Value;
use shipway_estargz::Output;
use shipway_integration::{
    cri::{Cri, wire},
    lazy::lazy_layer,
    on_all,
};
use shipway_testkit::{
    BaseImage, Flavour, Lab, LabOptions, Layer, Network, SlowNetwork, run,
};
use std::{fmt::Write as _, time::Duration};

/// Files of the large layer, and bytes of each.
const FILES: usize = 64;
const SIZE: usize = 1 << 20;

fn lab(flavour: Flavour, lazy: &str) -> Lab {
    let mut options = LabOptions::new(flavour);
    options.snapshotter = true;
    options.namespace = "k8s.io".into();
    options.sandbox = Some("docker.io/library/sandbox:1".into());
    options.lazy_config = lazy.into();
    let mut lab = Lab::start(options);
    lab.start_registry();
    lab
}

/// What the file number `n` holds: nothing that can be compressed away.
fn contents(n: usize) -> Vec<u8> {
    let mut state = n as u64 + 0x9E37_79B9_7F4A_7C15;
    std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    })
    .take(SIZE)
    .collect()
}

fn sum(n: usize) -> String {
    shipway_oci::Digest::of(contents(n)).hex()
}

/// busybox, and a layer of [`FILES`] files, both with tables of contents.
fn push(registry: &str, output: Output) {
    let mut image = BaseImage::busybox();
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("data")).unwrap();
    for n in 0..FILES {
        std::fs::write(dir.path().join(format!("data/{n}")), contents(n)).unwrap();
    }
    image.layers.push(Layer::of_dir(dir.path()));
    image.layers = image.layers.iter().map(|layer| lazy_layer(layer, output)).collect();
    image.push(registry, "lazy", "1");
}

fn pull(lab: &Lab, image: &str) {
    let cri = Cri::of(lab);
    let image = Some(wire::Id { id: image.into() });
    let _: wire::Id = cri.call("PullImage", wire::PullImage { image });
}

fn status(lab: &Lab) -> Value {
    let done = run(lab.snapshotter_command().args(["status", "--json"])).ok();
    serde_json::from_str(&done.stdout).unwrap()
}

/// A command in a container of the image.
fn words<'a>(image: &'a str, id: &'a str, script: &'a str) -> [&'a str; 9] {
    ["run", "--rm", "--snapshotter", "shipway", image, id, "sh", "-c", script]
}

fn blobs(lab: &Lab) -> usize {
    lab.ctr(["content", "list", "--quiet"]).ok().lines().count()
}

#[test]
fn an_image_runs_before_it_is_there() {
    on_all(|flavour| {
        let lab = lab(flavour, "background = false\n");
        push(&lab.registry(), Output::Estargz);
        let network = Network { latency: Duration::from_millis(5), bandwidth: 30 << 20 };
        let slow = SlowNetwork::start(&lab.registry(), network);
        let image = format!("{}/lazy:1", slow.address());
        pull(&lab, &image);
        let pulled = slow.bytes();
        assert!(pulled < 2 << 20, "{pulled} bytes were fetched by the pull: {}", status(&lab));
        assert_eq!(blobs(&lab), 3, "index, manifest and config, but no layer");
        let said = lab.ctr(words(&image, "first", "sha256sum /data/7 /data/33")).ok().stdout;
        let mut want = String::new();
        for n in [7, 33] {
            writeln!(want, "{}  /data/{n}", sum(n)).unwrap();
        }
        assert_eq!(said, want);
        let fetched = slow.bytes() - pulled;
        assert!(fetched < 20 << 20, "{fetched} bytes were fetched for two files");
        let layers = status(&lab)["lazy"]["layers"].clone();
        assert_eq!(layers.as_array().unwrap().len(), 2, "{layers}");
        lab.ctr(["images", "delete", "--sync", &image]).ok();
        drop(lab);
    });
}
