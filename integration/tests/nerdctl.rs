//! An unmodified `nerdctl`, where it is: it finds that the daemon shares its image store, builds
//! without a load step through our `buildctl`, and runs the result.

#![allow(clippy::unwrap_used)]

use serde_json::Value;
use shipway_estargz::Output;
use shipway_integration::{any, lazy::lazy_layer, on_all};
use shipway_testkit::{BaseImage, Finished, Flavour, Lab, LabOptions, built, run, which};
use std::{path::Path, process::Command};

#[test]
fn nerdctl_builds_and_runs() {
    let Some(nerdctl) = which("nerdctl") else {
        eprintln!("nerdctl is absent");
        return;
    };
    let lab = Lab::complete(any());
    let bin = lab.dir().join("bin");
    std::fs::create_dir_all(&bin).unwrap();
    std::os::unix::fs::symlink(built("shipway"), bin.join("buildctl")).unwrap();
    let path = format!("{}:{}", bin.display(), lab.path().to_string_lossy());
    let nerdctl = |arguments: &[&str]| {
        let mut command = Command::new(&nerdctl);
        command.env("PATH", &path).env("BUILDKIT_HOST", lab.daemon_address());
        command.args([
            "--address",
            lab.containerd_socket().to_str().unwrap(),
            "--data-root",
            lab.dir().join("nerdctl").to_str().unwrap(),
        ]);
        run(command.args(arguments))
    };
    let context = lab.context(
        "nerd",
        &[("Dockerfile", "FROM busybox\nRUN echo by nerdctl > /n\nCMD [\"cat\", \"/n\"]\n")],
    );
    let built = nerdctl(&[
        "build",
        "--progress",
        "plain",
        "-t",
        "nerd:1",
        "-t",
        "nerd:2",
        context.to_str().unwrap(),
    ])
    .ok();
    assert!(!built.all().contains("Loaded image"), "there was a load step:\n{}", built.all());
    for tag in ["nerd:1", "nerd:2"] {
        assert_eq!(nerdctl(&["run", "--rm", "--net", "none", tag]).ok().stdout, "by nerdctl\n");
    }
    assert!(nerdctl(&["images"]).ok().stdout.contains("nerd"));
    nerdctl(&["builder", "prune", "--all", "--force"]).ok();
}

/// An image with tables of contents, pulled and run by nerdctl on our snapshotter, which containerd
/// knows by `name`; how many of its layers are lazy.
#[track_caller]
fn lazy_layers(nerdctl: &Path, flavour: Flavour, name: &str) -> usize {
    let mut options = LabOptions::new(flavour);
    options.snapshotter = true;
    options.snapshotter_name = name.into();
    options.lazy_config = "background = false\n".into();
    let mut lab = Lab::start(options);
    lab.start_registry();
    let mut image = BaseImage::busybox();
    image.layers = image.layers.iter().map(|l| lazy_layer(l, Output::Estargz)).collect();
    image.push(&lab.registry(), "nerd", "1");
    let image = format!("{}/nerd:1", lab.registry());
    let nerdctl = |arguments: &[&str]| -> Finished {
        let mut command = Command::new(nerdctl);
        command.env("PATH", lab.path());
        command.arg("--address").arg(lab.containerd_socket());
        command.arg("--data-root").arg(lab.dir().join("nerdctl"));
        command.args(["--snapshotter", name, "--insecure-registry"]);
        run(command.args(arguments))
    };
    nerdctl(&["pull", "--quiet", &image]).ok();
    let said = nerdctl(&["run", "--rm", "--net", "none", &image, "cat", "/etc/group"]).ok();
    assert_eq!(said.stdout, "root:x:0:\nnogroup:x:65534:\n");
    let status = run(lab.snapshotter_command().args(["status", "--json"])).ok().stdout;
    let status: Value = serde_json::from_str(&status).unwrap();
    status["lazy"]["layers"].as_array().unwrap().len()
}

/// nerdctl tells snapshotters where a layer comes from if it knows their names, or if containerd's
/// transfer service pulls for it, which tells whoever wants to hear it.
#[test]
fn nerdctl_pulls_lazily_by_a_name_that_it_knows() {
    let Some(nerdctl) = which("nerdctl") else {
        eprintln!("nerdctl is absent");
        return;
    };
    on_all(|flavour| {
        assert_eq!(lazy_layers(&nerdctl, flavour, "stargz"), 1, "by a name that it knows");
        // By our own name it depends on who pulls, but the image runs.
        let other = lazy_layers(&nerdctl, flavour, "shipway");
        eprintln!("by the name shipway {other} layers of 1 are lazy");
    });
}
