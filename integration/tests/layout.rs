//! The direction of dependencies: every crate of `crates/` names its floor and depends on lower
//! floors only; what belongs to one crate alone is used by that crate alone; what is depended on is
//! used.

#![allow(clippy::unwrap_used)]

use serde_json::Value;
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

/// External crates that only one of ours may use, because their types must not spread.
const SINGLE_USERS: &[(&str, &str)] =
    &[("containerd-client", "shipway-containerd"), ("containerd-snapshots", "shipway-snapshotter")];

struct Package {
    floor: Option<u64>,
    /// Names of dependencies, without those of tests.
    dependencies: Vec<String>,
}

/// The packages of the workspace, as cargo describes them.
#[track_caller]
fn metadata() -> Vec<Value> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args(["metadata", "--no-deps", "--format-version", "1", "--offline"])
        .current_dir(shipway_testkit::workspace())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
    metadata["packages"].as_array().unwrap().clone()
}

fn packages() -> BTreeMap<String, Package> {
    let packages = metadata().into_iter().map(|package| {
        let dependencies =
            package["dependencies"].as_array().unwrap().iter().filter(|d| d["kind"] != "dev");
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
    for (name, package) in packages
        .iter()
        .filter(|(name, _)| !["xtask", "shipway-integration"].contains(&name.as_str()))
    {
        let Some(floor) = package.floor else {
            wrong.push(format!("{name} names no floor: [package.metadata.layout] floor = N"));
            continue;
        };
        for dependency in &package.dependencies {
            let Some(below) = packages.get(dependency).and_then(|p| p.floor) else { continue };
            if below >= floor {
                wrong.push(format!(
                    "{name} (floor {floor}) depends on {dependency} (floor {below})"
                ));
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
        assert!(
            allowed || !package.dependencies.iter().any(|d| d == "shipway-testkit"),
            "{name} depends on the test kit"
        );
    }
}

/// Packages with dependencies that only generated code names, which is not among the sources.
const GENERATED: &[(&str, &[&str])] =
    &[("shipway-proto", &["prost", "prost-types", "tonic", "tonic-prost"])];

/// Sources of a package that may use a dependency of `kind` (`normal`, `dev` or `build`, as cargo
/// calls them).
fn sources(root: &Path, kind: &str) -> String {
    let places: &[&str] = match kind {
        "build" => &["build.rs"],
        // Unit tests use what is for tests, too.
        "dev" => &["src", "tests", "benches", "examples"],
        _ => &["src"],
    };
    let mut queue: Vec<PathBuf> = places.iter().map(|place| root.join(place)).collect();
    let mut text = String::new();
    while let Some(path) = queue.pop() {
        if path.is_dir() {
            queue.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        } else if path.extension().is_some_and(|e| e == "rs") && path.exists() {
            // A link of the documentation is no use.
            for line in fs::read_to_string(&path)
                .unwrap()
                .lines()
                .filter(|l| !l.trim_start().starts_with("//"))
            {
                text += line;
                text.push('\n');
            }
        }
    }
    text
}

/// Whether `source` has a path that begins with `name`: not one of an item called so, as in
/// `self::name::x` or `a.name`.
fn names(source: &str, name: &str) -> bool {
    source.match_indices(name).any(|(at, _)| {
        let (before, after) = (&source[..at], &source[at + name.len()..]);
        let begins = !before.ends_with(|c: char| c.is_alphanumeric() || "_.:".contains(c))
            || before.ends_with("(::")
            || before.ends_with(" ::");
        let imported =
            before.ends_with("use ") && (after.starts_with(';') || after.starts_with(" as "));
        begins && (after.starts_with("::") || imported)
    })
}

#[test]
fn what_is_depended_on_is_used() {
    let mut unused = Vec::new();
    for package in metadata() {
        let root =
            Path::new(package["manifest_path"].as_str().unwrap()).parent().unwrap().to_owned();
        let generated = GENERATED
            .iter()
            .find(|(of, _)| package["name"] == *of)
            .map_or(&[][..], |(_, names)| names);
        for dependency in package["dependencies"].as_array().unwrap() {
            let name = dependency["rename"].as_str().or(dependency["name"].as_str()).unwrap();
            let kind = dependency["kind"].as_str().unwrap_or("normal");
            if !generated.contains(&name) && !names(&sources(&root, kind), &name.replace('-', "_"))
            {
                unused.push(format!("{}: {name} ({kind})", package["name"].as_str().unwrap()));
            }
        }
    }
    assert!(
        unused.is_empty(),
        "no source uses these (take the line out of Cargo.toml):\n{}",
        unused.join("\n")
    );
}

#[test]
fn uses_are_told_from_what_only_looks_like_one() {
    for used in [
        "use http::Uri;",
        "use {a, http::Uri};",
        "let x: &http::Uri;",
        "#[http::test]",
        "use http as h;",
        "f(::http::x)",
    ] {
        assert!(names(used, "http"), "{used}");
    }
    for unused in [
        "use crate::http::Uri;",
        "let http = 1;",
        "xhttp::a",
        "\"http://x\"",
        "self.http",
        "mod http;",
        "use https::a;",
    ] {
        assert!(!names(unused, "http"), "{unused}");
    }
}

#[test]
fn comments_have_lines_of_100_columns() {
    let mut wide = Vec::new();
    let mut directories: Vec<PathBuf> =
        ["crates", "integration", "xtask"].map(|dir| shipway_testkit::workspace().join(dir)).into();
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                directories.push(path);
            } else if path.extension().is_some_and(|kind| kind == "rs") {
                // rustfmt wraps code and leaves comments alone.
                let text = fs::read_to_string(&path).unwrap();
                let lines = text.lines().enumerate().filter(|(_, line)| {
                    line.trim_start().starts_with("//") && line.chars().count() > 100
                });
                wide.extend(lines.map(|(n, _)| format!("{}:{}", path.display(), n + 1)));
            }
        }
    }
    assert!(wide.is_empty(), "comments wider than 100 columns:\n{}", wide.join("\n"));
}
