//! `cargo xtask lab`: a shell in which `ctr`, `shipway` and buildx reach a private lab.

use crate::{cargo, packages};
use shipway_testkit::{BaseImage, Flavour, Lab, LabOptions, profile_dir};
use std::process::Command;

/// Prepares, builds, and goes on as root.
pub fn run() -> Result<(), String> {
    packages::prepare()?;
    cargo::build_and_continue("dev", &["lab-as-root"])
}

/// The shell itself.
pub fn as_root() -> Result<(), String> {
    let flavour = *Flavour::present().last().ok_or("no containerd is installed")?;
    let mut lab = Lab::start(LabOptions::new(flavour));
    lab.start_registry();
    BaseImage::busybox().push(&lab.registry(), "library/busybox", "latest");
    lab.start_daemon();
    println!(
        "containerd {} at $CONTAINERD_ADDRESS, a registry with busybox at $REGISTRY, shipwayd at $BUILDKIT_HOST.",
        flavour.version()
    );
    println!(
        "`shipway`, `shipwayd` and `ctr` are on PATH; logs are in {}. `exit` ends all of it.",
        lab.dir().display()
    );
    let path = format!("{}:{}", profile_dir().display(), lab.path().to_string_lossy());
    let mut shell = Command::new(std::env::var_os("SHELL").unwrap_or_else(|| "/bin/sh".into()));
    shell
        .env("PATH", path)
        .env("CONTAINERD_ADDRESS", lab.containerd_socket())
        .env("CONTAINERD_NAMESPACE", lab.namespace())
        .env("BUILDKIT_HOST", lab.daemon_address())
        .env("SHIPWAY_HOST", lab.daemon_address())
        .env("REGISTRY", lab.registry())
        .current_dir(lab.dir());
    // How the shell ended is its user's business.
    shell.status().map(drop).map_err(|e| format!("{shell:?}: {e}"))
}
