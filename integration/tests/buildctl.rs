//! `shipway` called as `buildctl`, and the real `buildctl` where it is: the same arguments, the same effect.

#![allow(clippy::unwrap_used)]

use shipway_integration::{any, ctr_run};
use shipway_testkit::{Lab, built, run, which};
use std::{
    path::{Path, PathBuf},
    process::Command,
};

/// Our client under buildctl's name, and the real one if it is on PATH.
fn clients(lab: &Lab) -> Vec<PathBuf> {
    let dir = lab.dir().join("as-buildctl");
    std::fs::create_dir_all(&dir).unwrap();
    std::os::unix::fs::symlink(built("shipway"), dir.join("buildctl")).unwrap();
    let real = which("buildctl");
    if real.is_none() {
        eprintln!("buildctl is absent: only ours under its name is tried");
    }
    [dir.join("buildctl")].into_iter().chain(real).collect()
}

fn command(lab: &Lab, client: &Path) -> Command {
    let mut command = Command::new(client);
    command.args(["--addr", &lab.daemon_address()]);
    command
}

#[test]
fn buildctl_builds_lists_and_prunes() {
    let lab = Lab::complete(any());
    let context = lab.context("bctl", &[("Dockerfile", "FROM busybox\nARG X\nRUN echo $X > /x\n"), ("file", "x")]);
    for (n, client) in clients(&lab).iter().enumerate() {
        let name = format!("docker.io/library/bctl:{n}");
        let metadata = lab.dir().join(format!("metadata-{n}.json"));
        let mut build = command(&lab, client);
        build.args(["build", "--progress=plain", "--frontend=dockerfile.v0", "--opt", &format!("build-arg:X=round {n}")]);
        build.args(["--local", &format!("context={}", context.display()), "--local", &format!("dockerfile={}", context.display())]);
        build.args(["--output", &format!("type=image,name={name},unpack=true")]).arg(format!("--metadata-file={}", metadata.display()));
        run(&mut build).ok();
        assert_eq!(ctr_run(&lab, &name, &["cat", "/x"]).ok().stdout, format!("round {n}\n"));
        let metadata: serde_json::Value = serde_json::from_slice(&std::fs::read(metadata).unwrap()).unwrap();
        assert!(metadata["containerimage.digest"].as_str().is_some_and(|d| d.starts_with("sha256:")), "{metadata}");

        let workers = run(command(&lab, client).args(["debug", "workers", "--format", "{{json .}}"])).ok();
        let workers: serde_json::Value = serde_json::from_str(&workers.stdout).unwrap();
        let labels = &workers[0]["labels"];
        assert_eq!(labels["org.mobyproject.buildkit.worker.executor"], "containerd", "{workers}");
        assert_eq!(labels["org.mobyproject.buildkit.worker.containerd.namespace"], "default", "{workers}");
        assert_eq!(labels["org.mobyproject.buildkit.worker.snapshotter"], "overlayfs", "{workers}");
        assert_eq!(labels["org.mobyproject.buildkit.worker.containerd.uuid"].as_str().map(str::len), Some(36), "{workers}");

        assert!(run(command(&lab, client).arg("du")).ok().stdout.contains("Total"));
        run(command(&lab, client).args(["prune", "--all"])).ok();
        let version = run(Command::new(client).arg("--version")).ok();
        assert_eq!(version.stdout.split_whitespace().next(), Some("buildctl"), "{}", version.stdout);
        assert!((3..=4).contains(&version.stdout.split_whitespace().count()), "{}", version.stdout);
    }
}

#[test]
fn a_stream_of_an_image_goes_to_standard_output() {
    let lab = Lab::complete(any());
    let context = lab.context("stream", &[("Dockerfile", "FROM scratch\nCOPY file /\n"), ("file", "x")]);
    for client in clients(&lab) {
        let mut build = command(&lab, &client);
        build.args(["build", "--progress=plain", "--frontend=dockerfile.v0", "--output", "type=docker,name=streamed:1"]);
        build.args(["--local", &format!("context={}", context.display()), "--local", &format!("dockerfile={}", context.display())]);
        let tar = lab.dir().join("streamed.tar");
        let output = build.stdout(std::fs::File::create(&tar).unwrap()).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let list = run(Command::new("tar").arg("-tf").arg(&tar)).ok();
        assert!(list.lines().any(|l| l == "manifest.json"), "{}", list.stdout);
        lab.ctr(["images", "import", tar.to_str().unwrap()]).ok();
        let images = lab.ctr(["images", "list", "--quiet"]).ok();
        assert!(images.stdout.contains("streamed:1"), "{}", images.stdout);
    }
}
