//! Registries that refuse, fail, hang, trickle or lie: a clear error that names the image as the
//! user wrote it, in bounded time, with nothing left behind.

#![allow(clippy::unwrap_used)]

use shipway_integration::{any, build, collect_garbage, nothing_left, remove_everything};
use shipway_testkit::{BaseImage, FaultyRegistry, Lab, Layer, RegistryFault};
use std::time::Duration;

/// Where a fault happens, which, what the error says, and within what time.
const CASES: &[(&str, &str, RegistryFault, &[&str], u64)] = &[
    (
        "refused",
        "/v2/",
        RegistryFault::Status(401, "{\"errors\":[{\"code\":\"UNAUTHORIZED\"}]}"),
        &["authorization"],
        30,
    ),
    ("busy", "/manifests/", RegistryFault::Status(429, "slow down"), &["429"], 60),
    ("broken", "/manifests/", RegistryFault::Status(500, "oh no"), &["500"], 60),
    ("brokenlayer", "/blobs/", RegistryFault::Status(500, "oh no"), &["500"], 60),
    ("silent", "/manifests/", RegistryFault::Hang, &[], 60),
    ("silentlayer", "/blobs/", RegistryFault::Hang, &[], 60),
    ("slow", "/manifests/", RegistryFault::Trickle, &[], 60),
    ("slowlayer", "/blobs/", RegistryFault::Trickle, &[], 60),
    ("lying", "/manifests/sha256", RegistryFault::Corrupt, &["digest"], 30),
    ("lyinglayer", "/blobs/", RegistryFault::Corrupt, &["digest"], 30),
];

#[test]
fn each_fault_is_a_clear_error_in_bounded_time() {
    let mut lab = Lab::on(any());
    lab.start_registry();
    for (n, (name, ..)) in CASES.iter().enumerate() {
        // Each has bytes of its own, or what one build fetched would help the next.
        let mut image = BaseImage::busybox();
        image.layers.push(Layer::of_tar(&vec![0; 1024 * (n + 2)]));
        image.config["Labels"] = serde_json::json!({ "case": name });
        image.push(&lab.registry(), name, "1");
    }
    BaseImage::busybox().push(&lab.registry(), "good", "1");
    let faulty: Vec<_> = CASES
        .iter()
        .map(|(_, path, fault, _, _)| FaultyRegistry::start(&lab.registry(), path, fault.clone()))
        .collect();
    for registry in &faulty {
        lab.configure_daemon(&format!("[registry.\"{}\"]\n  http = true\n", registry.address()));
    }
    lab.start_daemon();
    // All at once: several of them take a minute.
    std::thread::scope(|scope| {
        for ((name, _, _, says, limit), registry) in CASES.iter().zip(&faulty) {
            let lab = &lab;
            scope.spawn(move || {
                let image = format!("{}/{name}:1", registry.address());
                let context =
                    lab.context(name, &[("Dockerfile", &format!("FROM {image}\nRUN true\n"))]);
                let failed = build(lab, name, &context, &[]).failed();
                assert!(
                    failed.took < Duration::from_secs(*limit),
                    "{name}: took {:?}",
                    failed.took
                );
                for word in says.iter().chain([&image.as_str()]) {
                    assert!(
                        failed.all().contains(word),
                        "{name}: the error does not say {word:?}:\n{}",
                        failed.all()
                    );
                }
            });
        }
    });
    // The good one still works, and nothing of the bad ones stays.
    let good = lab
        .context("good", &[("Dockerfile", &format!("FROM {}/good:1\nRUN true\n", lab.registry()))]);
    build(&lab, "good:1", &good, &[]).ok();
    remove_everything(&lab);
    nothing_left(&lab);
}

#[test]
fn a_layer_that_is_not_what_the_config_says_is_refused() {
    let lab = Lab::complete(any());
    let mut image = BaseImage::busybox();
    image.layers[0].diff_id = format!("sha256:{}", "0".repeat(64));
    image.push(&lab.registry(), "library/forged", "1");
    let context =
        lab.context("forged", &[("Dockerfile", "FROM forged:1\nRUN echo must not run\n")]);
    let failed = build(&lab, "forged:2", &context, &[]).failed();
    for says in ["forged:1", "config"] {
        assert!(
            failed.all().to_lowercase().contains(says),
            "the error does not say {says:?}:\n{}",
            failed.all()
        );
    }
    collect_garbage(&lab);
}
