//! The direction of dependencies: every crate of `crates/` names its floor and depends on lower floors only; what belongs
//! to one crate alone is used by that crate alone.

#![allow(clippy::unwrap_used)]

use serde_json::Value;
use std::{collections::BTreeMap, process::Command};

/// External crates that only one of ours may use, because their types must not spread.
const SINGLE_USERS: &[(&str, &str)] = &[("containerd-client", "shipway-containerd"), ("containerd-snapshots", "shipway-snapshotter")];

struct Package {
    floor: Option<u64>,
    /// Names of dependencies, without those of tests.
    dependencies: Vec<String>,
}

fn packages() -> BTreeMap<String, Package> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args(["metadata", "--no-deps", "--format-version", "1", "--offline"])
        .current_dir(shipway_testkit::workspace())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
    let packages = metadata["packages"].as_array().unwrap().iter().map(|package| {
        let dependencies = package["dependencies"].as_array().unwrap().iter().filter(|d| d["kind"] != "dev");
        let names = dependencies.map(|d| d["name"].as_str().unwrap().to_owned()).collect();
        let floor = package["metadata"]["layout"]["floor"].as_u64();
        (package["name"].as_str().unwrap().to_owned(), Package { floor, dependencies: names })
    });
    packages.collect()
}

#[test]
fn crates_depend_on_lower_floors_only() {
    let packages = packages();
    let mut wrong = Vec::new();
    for (name, package) in packages.iter().filter(|(name, _)| !["xtask", "shipway-integration"].contains(&name.as_str())) {
        let Some(floor) = package.floor else {
            wrong.push(format!("{name} names no floor: [package.metadata.layout] floor = N"));
            continue;
        };
        for dependency in &package.dependencies {
            let Some(below) = packages.get(dependency).and_then(|p| p.floor) else { continue };
            if below >= floor {
                wrong.push(format!("{name} (floor {floor}) depends on {dependency} (floor {below})"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn what_is_private_to_a_crate_is_used_by_no_other() {
    for (name, package) in packages() {
        for (external, user) in SINGLE_USERS {
            assert!(
                name == *user || !package.dependencies.iter().any(|d| d == external),
                "{name} uses {external}, which is {user}'s alone"
            );
        }
    }
}

#[test]
fn the_programs_of_the_product_use_no_test_kit() {
    for (name, package) in packages() {
        let allowed = ["xtask", "shipway-integration"].contains(&name.as_str());
        assert!(allowed || !package.dependencies.iter().any(|d| d == "shipway-testkit"), "{name} depends on the test kit");
    }
}
