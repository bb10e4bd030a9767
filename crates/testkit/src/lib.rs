//! Real parts for tests and developer commands: [`Lab`] is a private containerd, image registry and
//! `shipwayd` in a directory of its own, gone with everything they started when it is dropped, even
//! by a panic. [`Dice`] and [`Rounds`] are for random tests.
//!
//! Knows the daemon only as a program. Few dependencies, because `cargo xtask` builds it first:
//! `rustix` for signals, mounts and processes, `sha2` and `serde_json` to make base images,
//! `tempfile` for the directory.
//!
//! Everything here may panic: it is called by tests, and by commands whose user wants to see what
//! went wrong.

#![allow(clippy::unwrap_used, clippy::missing_panics_doc)]

mod faulty;
mod github_cache;
mod http;
mod image;
mod lab;
mod process;
mod random;
mod slow;
mod wait;

pub use faulty::{FaultyRegistry, RegistryFault};
pub use github_cache::GithubCache;
pub use image::{BaseImage, Layer};
pub use lab::{Flavour, Lab, LabDisk, LabOptions, Leftovers};
pub use process::{Finished, Process, run};
pub use random::{Dice, Rounds};
pub use slow::{Network, SlowNetwork};
pub use wait::{free_port, wait_for};

use std::path::PathBuf;

/// The workspace's directory: as cargo says now, not when this was compiled, because copies of the
/// workspace may share a target directory.
pub fn workspace() -> PathBuf {
    let package =
        std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
    let package = PathBuf::from(package).canonicalize().unwrap();
    package.ancestors().find(|dir| dir.join("Cargo.lock").exists()).unwrap().to_path_buf()
}

/// Where cargo builds, found from the running program: `target/<profile>/…`.
pub fn profile_dir() -> PathBuf {
    let exe = std::env::current_exe().unwrap();
    let dir = exe.parent().unwrap();
    // Test programs live one deeper.
    if dir.ends_with("deps") { dir.parent().unwrap().to_path_buf() } else { dir.to_path_buf() }
}

/// What is kept between runs: programs of other Debian suites.
pub fn lab_dir() -> PathBuf {
    profile_dir().parent().unwrap().join("lab")
}

/// A program of this workspace, built before.
pub fn built(name: &str) -> PathBuf {
    let path = profile_dir().join(name);
    assert!(
        path.exists(),
        "{} is not built; `cargo xtask test` builds it, or `cargo build -p {name}`",
        path.display()
    );
    path
}

/// The first program `name` on PATH or among the lab's own.
pub fn which(name: &str) -> Option<PathBuf> {
    let own = ["root/usr/bin", "root/usr/libexec/docker/cli-plugins", "next/usr/bin"]
        .map(|dir| lab_dir().join(dir));
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).chain(own).map(|dir| dir.join(name)).find(|p| p.is_file())
}
