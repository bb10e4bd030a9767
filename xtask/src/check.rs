//! `cargo xtask check [CRATE]`: the inner loop of a change.
//!
//! Format, lints and tests of one crate and of those that depend on it, so that a change is checked
//! in seconds where [`crate::test`] takes many minutes. Lints are for all crates that depend on it,
//! live tests included, since those break where an interface changes; tests run of the crate itself
//! and of those that use it directly. Tests that need containerd are for `cargo xtask test`.

use crate::cargo::{cargo, succeed};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};

/// Its tests need root, containerd and minutes.
const LIVE: &str = "shipway-integration";

/// Checks the crate called `name`, with or without `shipway-`, or all of them.
pub fn run(name: Option<&str>) -> Result<(), String> {
    let users = users()?;
    let (lint, test) = match name {
        None => (users.keys().cloned().collect(), users.keys().cloned().collect()),
        Some(name) => {
            let name = known(&users, name)?;
            (dependents(&users, &name), direct(&users, &name))
        }
    };
    let packages = |names: &BTreeSet<String>| -> Vec<String> {
        names.iter().flat_map(|name| ["--package".to_owned(), name.clone()]).collect()
    };
    let mut format = cargo();
    match name {
        None => format.args(["fmt", "--all"]),
        Some(name) => format.args(["fmt", "--package"]).arg(known(&users, name)?),
    };
    succeed(with(format, &["--", "--check"]))?;
    let mut lints = cargo();
    lints.arg("clippy").args(packages(&lint));
    succeed(with(lints, &["--all-targets", "--quiet", "--", "-D", "warnings"]))?;
    let test: BTreeSet<String> = test.into_iter().filter(|name| name != LIVE).collect();
    let mut tests = cargo();
    tests.arg("test").args(packages(&test));
    succeed(with(tests, &["--quiet"]))?;
    println!("{} crates checked, {} tested", lint.len(), test.len());
    Ok(())
}

fn with(mut command: std::process::Command, rest: &[&str]) -> std::process::Command {
    command.args(rest);
    command
}

/// Crates of the workspace, each with those that depend on it.
type Users = BTreeMap<String, BTreeSet<String>>;

fn users() -> Result<Users, String> {
    let output = cargo()
        .args(["metadata", "--no-deps", "--format-version", "1"])
        .output()
        .map_err(|e| format!("cargo metadata: {e}"))?;
    let metadata: Value =
        serde_json::from_slice(&output.stdout).map_err(|e| format!("cargo metadata: {e}"))?;
    Ok(users_of(&metadata))
}

fn users_of(metadata: &Value) -> Users {
    let text = |value: &Value| value["name"].as_str().unwrap_or_default().to_owned();
    let packages = metadata["packages"].as_array().map_or(&[][..], Vec::as_slice);
    let mut users: Users =
        packages.iter().map(|package| (text(package), BTreeSet::new())).collect();
    for package in packages {
        for dependency in package["dependencies"].as_array().map_or(&[][..], Vec::as_slice) {
            if let Some(users) = users.get_mut(&text(dependency)) {
                users.insert(text(package));
            }
        }
    }
    users
}

fn known(users: &Users, name: &str) -> Result<String, String> {
    let whole = format!("shipway-{name}");
    let found = [name, &whole].into_iter().find(|name| users.contains_key(*name));
    found.map(str::to_owned).ok_or_else(|| format!("no crate {name} in the workspace"))
}

/// The crate and those that use it directly.
fn direct(users: &Users, name: &str) -> BTreeSet<String> {
    users.get(name).into_iter().flatten().cloned().chain([name.to_owned()]).collect()
}

/// The crate and all that depend on it.
fn dependents(users: &Users, name: &str) -> BTreeSet<String> {
    let (mut all, mut queue) = (BTreeSet::new(), vec![name.to_owned()]);
    while let Some(next) = queue.pop() {
        if all.insert(next.clone()) {
            queue.extend(users.get(&next).into_iter().flatten().cloned());
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_crate_is_checked_with_all_that_depends_on_it() {
        let package = |name: &str, dependencies: &[&str]| {
            let dependencies: Vec<_> =
                dependencies.iter().map(|name| serde_json::json!({ "name": name })).collect();
            serde_json::json!({ "name": name, "dependencies": dependencies })
        };
        let users = users_of(&serde_json::json!({ "packages": [
            package("shipway-a", &["serde"]),
            package("shipway-b", &["shipway-a"]),
            package("daemon", &["shipway-b"]),
            package("shipway-c", &[]),
        ] }));
        let names = |set: BTreeSet<String>| set.into_iter().collect::<Vec<_>>();
        let a = known(&users, "a").unwrap();
        assert_eq!(names(direct(&users, &a)), ["shipway-a", "shipway-b"]);
        assert_eq!(names(dependents(&users, &a)), ["daemon", "shipway-a", "shipway-b"]);
        assert_eq!(known(&users, "daemon").as_deref(), Ok("daemon"));
        assert!(known(&users, "d").is_err());
    }
}
