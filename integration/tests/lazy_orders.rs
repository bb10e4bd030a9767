//! What one node learned of an image, another one follows: the order of first reads goes by way of
//! the image's registry.

#![allow(clippy::unwrap_used)]

use serde_json::Value;
use shipway_estargz::Output;
use shipway_integration::{
    any,
    cri::{Cri, wire},
    lazy::{noise, push_noise},
};
use shipway_testkit::{Lab, LabOptions, Network, SlowNetwork, run, wait_for, which};
use std::{fmt::Write as _, process::Command, time::Duration};

/// Files of the image's large layer, and bytes of each.
const FILES: usize = 24;
const SIZE: usize = 256 << 10;
/// Those that are read, in order.
const READ: [usize; 5] = [17, 3, 22, 8, 9];

fn push(registry: &str) {
    push_noise(registry, FILES, SIZE, Output::Estargz);
}

fn node(lazy: &str) -> Lab {
    Lab::start(LabOptions {
        snapshotter: true,
        namespace: "k8s.io".into(),
        sandbox: Some("docker.io/library/sandbox:1".into()),
        lazy_config: format!("background = false\n{lazy}"),
        ..LabOptions::new(any())
    })
}

/// Reads files in a container, and compares them.
#[track_caller]
fn read(lab: &Lab, image: &str, id: &str) {
    let id = format!("{id}-{}", std::process::id());
    let files = READ.map(|n| format!("/data/{n}"));
    let script = format!("sha256sum {}", files.join(" "));
    let words = ["run", "--rm", "--snapshotter", "shipway", image, &id, "sh", "-c", &script];
    let said = lab.ctr(words).ok().stdout;
    let mut want = String::new();
    for (n, file) in READ.iter().zip(files) {
        writeln!(want, "{}  {file}", shipway_oci::Digest::of(noise(*n, SIZE)).hex()).unwrap();
    }
    assert_eq!(said, want);
}

/// Bytes that are there and right of the large layer, and what is told of all.
fn verified(lab: &Lab) -> (u64, String) {
    let done = run(lab.snapshotter_command().args(["status", "--json"])).ok();
    let status: Value = serde_json::from_str(&done.stdout).unwrap();
    let layers = status["lazy"]["layers"].as_array().unwrap();
    let large = layers.iter().find(|layer| layer["data"] == FILES * SIZE);
    (large.map_or(0, |layer| layer["verified"].as_u64().unwrap()), status.to_string())
}

#[test]
fn what_one_node_learned_another_one_fetches_before_anybody_reads() {
    let mut first = node("learn = 1\npush_profiles = true\n");
    first.start_registry();
    let registry = first.registry();
    push(&registry);
    let image = format!("{registry}/lazy:1");
    let name = Some(wire::Id { id: image.clone() });
    let _: wire::Id = Cri::of(&first).call("PullImage", wire::PullImage { image: name });
    read(&first, &image, "teaches");
    let manifest = {
        let (status, body) = first.registry_get("/v2/lazy/manifests/1");
        assert_eq!(status, 200);
        let index: Value = serde_json::from_slice(&body).unwrap();
        index["manifests"][0]["digest"].as_str().unwrap().replace(':', "-")
    };
    wait_for("the order to be in the registry", Duration::from_secs(60), || {
        match first.registry_get(&format!("/v2/lazy/manifests/{manifest}")) {
            (200, _) => Ok(()),
            (status, _) => Err(format!("{status}: {}", verified(&first).1)),
        }
    });

    // What was learned is put in front by a conversion, from where the registry has it.
    let ordered = format!("{registry}/ordered:1");
    first.shipway(["convert", "--profile", &image, &image, &ordered]).ok();
    let (_, root) = first.registry_get("/v2/ordered/manifests/1");
    let mut root: Value = serde_json::from_slice(&root).unwrap();
    if let Some(image) = root["manifests"][0]["digest"].as_str() {
        let (_, bytes) = first.registry_get(&format!("/v2/ordered/manifests/{image}"));
        root = serde_json::from_slice(&bytes).unwrap();
    }
    let layers = root["layers"].as_array().unwrap();
    let large = layers.iter().max_by_key(|layer| layer["size"].as_u64()).unwrap();
    let path = first.dir().join("ordered.tar.gz");
    let (_, blob) =
        first.registry_get(&format!("/v2/ordered/blobs/{}", large["digest"].as_str().unwrap()));
    std::fs::write(&path, blob).unwrap();
    let names = run(Command::new("tar").arg("-tzf").arg(&path)).ok().stdout;
    let names: Vec<&str> = names.lines().collect();
    let landmark = names.iter().position(|name| *name == ".prefetch.landmark").unwrap();
    let files = names[..landmark].iter().filter(|name| !name.ends_with('/'));
    assert!(files.eq(&READ.map(|n| format!("./data/{n}"))), "{names:?}");
    assert_eq!(names.iter().filter(|name| name.contains("data/")).count(), FILES + 1);

    // Another node, another way to name the registry, and a client that tells nobody which manifest
    // it pulls.
    let second = node("");
    let network = Network { latency: Duration::from_millis(2), bandwidth: 20 << 20 };
    let slow = SlowNetwork::start(&registry, network);
    let image = format!("{}/lazy:1", slow.address());
    let remote = which("ctr-remote").expect("ctr-remote is absent; `cargo xtask test` fetches it");
    let mut pull = Command::new(remote);
    pull.env("PATH", second.path()).arg("--address").arg(second.containerd_socket());
    pull.args(["--namespace", "k8s.io", "images", "rpull", "--plain-http"]);
    run(pull.args(["--snapshotter", "shipway", &image])).ok();
    // Nobody has read anything, and yet what will be read is there: these files, and busybox.
    let expected = (READ.len() * SIZE) as u64;
    wait_for("what will be read to be fetched", Duration::from_secs(30), || {
        match verified(&second) {
            (bytes, _) if bytes >= expected => Ok(()),
            (_, status) => Err(status),
        }
    });
    let (bytes, status) = verified(&second);
    assert!(bytes < 2 * expected, "not all of it: {status}");
    wait_for("the network to be quiet", Duration::from_secs(30), || {
        let before = slow.bytes();
        std::thread::park_timeout(Duration::from_millis(300));
        if slow.bytes() == before { Ok(()) } else { Err(slow.bytes().to_string()) }
    });
    slow.set_down(true);
    read(&second, &image, "follows");
}
