//! Images made of this machine's files and of our own programs.

use serde_json::json;
use shipway_testkit::{BaseImage, Lab, Layer, built, run, which, workspace};
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

/// Our programs without what is for debuggers, which is most of a debug build, in a new directory
/// below `at`.
#[track_caller]
pub fn stripped(at: &Path) -> PathBuf {
    let programs = at.join("programs");
    fs::create_dir(&programs).unwrap();
    for name in ["shipwayd", "shipway", "shipway-snapshotter", "shipway-keeper"] {
        run(Command::new("strip").arg("-o").arg(programs.join(name)).arg(built(name))).ok();
    }
    programs
}

/// busybox and programs of this machine in `/usr/bin`, with the libraries that they and ours need.
#[track_caller]
pub fn host_base(programs: &[&str]) -> BaseImage {
    let root = tempfile::tempdir().unwrap();
    let put = |from: &Path, to: &str| {
        let to = root.path().join(to.trim_start_matches('/'));
        fs::create_dir_all(to.parent().unwrap()).unwrap();
        fs::copy(from, to).unwrap();
    };
    let ours = ["shipwayd", "shipway"].map(built);
    let theirs = programs.iter().map(|name| {
        let program =
            which(name).or_else(|| Some(Path::new("/usr/sbin").join(name)).filter(|p| p.exists()));
        program.unwrap_or_else(|| panic!("{name} is not installed"))
    });
    let theirs: Vec<PathBuf> = theirs.collect();
    for program in ours.iter().chain(&theirs) {
        // A program without libraries is not ldd's to list.
        let needed = run(Command::new("ldd").arg(program)).stdout;
        for library in needed.split_whitespace().filter(|w| w.starts_with('/')) {
            put(Path::new(library), library);
        }
    }
    for (name, program) in programs.iter().zip(&theirs) {
        put(program, &format!("usr/bin/{name}"));
    }
    let mut image = BaseImage::busybox();
    image.layers.push(Layer::of_dir(root.path()));
    image.config = json!({
        "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
        "Cmd": ["sh"],
    });
    image
}

/// Builds the image `target` of `config/images` on `base` and tags it.
#[track_caller]
pub fn image_of_us(lab: &Lab, target: &str, base: &str, tag: &str) {
    let programs = stripped(lab.dir());
    let context = workspace().join("config/images").display().to_string();
    let programs = format!("programs={}", programs.display());
    let base = format!("BASE={base}");
    lab.shipway([
        "build",
        "--progress",
        "plain",
        "--target",
        target,
        "--build-arg",
        &base,
        "--build-context",
        &programs,
        "--tag",
        tag,
        &context,
    ])
    .ok();
}
