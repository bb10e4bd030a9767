//! An unmodified `nerdctl`, where it is: it finds that the daemon shares its image store, builds
//! without a load step through our `buildctl`, and runs the result.

#![allow(clippy::unwrap_used)]

use shipway_integration::any;
use shipway_testkit::{Lab, built, run, which};
use std::process::Command;

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
