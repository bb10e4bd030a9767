//! The official `docker-buildx`, unmodified: builds, hits the cache, pushes, shows errors, reads
//! history and usage.

#![allow(clippy::unwrap_used)]

use shipway_integration::{Image, any, ctr_run, on_each};
use shipway_testkit::{Finished, Lab, run};
use std::path::Path;

/// Runs buildx; `None`, after saying so, where it is absent.
fn buildx(lab: &Lab, arguments: &[&str]) -> Option<Finished> {
    match lab.buildx() {
        Some(mut command) => Some(run(command.args(arguments))),
        None => {
            eprintln!("docker-buildx is absent");
            None
        }
    }
}

fn build(lab: &Lab, context: &Path, more: &[&str]) -> Option<Finished> {
    let context = context.to_string_lossy();
    let arguments: Vec<&str> = ["build", "--progress", "plain"]
        .into_iter()
        .chain(more.iter().copied())
        .chain([&*context])
        .collect();
    buildx(lab, &arguments)
}

const DOCKERFILE: &str = "FROM busybox AS a\nRUN echo from buildx > /a\nFROM busybox\nCOPY --from=a /a /a\nCOPY file /file\nCMD [\"cat\", \"/a\", \"/file\"]\n";

#[test]
fn buildx_builds_and_the_image_runs() {
    on_each(|flavour| {
        let lab = Lab::complete(flavour);
        let context = lab.context("bx", &[("Dockerfile", DOCKERFILE), ("file", "a file\n")]);
        let output = ["--output", "type=image,name=docker.io/library/bx:1"];
        let Some(first) = build(&lab, &context, &output) else { return };
        first.ok();
        assert_eq!(
            ctr_run(&lab, "docker.io/library/bx:1", &[]).ok().stdout,
            "from buildx\na file\n"
        );
        let again = build(&lab, &context, &output).unwrap().ok();
        assert!(again.all().contains("CACHED"), "{}", again.all());
        // Our client and buildx share the cache.
        let ours = shipway_integration::build(&lab, "bx:2", &context, &[]).ok();
        assert!(ours.all().contains("CACHED"), "{}", ours.all());
        assert_eq!(
            Image::of(&lab, "docker.io/library/bx:2").chain(),
            Image::of(&lab, "docker.io/library/bx:1").chain()
        );
    });
}

#[test]
fn buildx_pushes_and_writes_metadata() {
    let lab = Lab::complete(any());
    let context = lab.context("bxpush", &[("Dockerfile", DOCKERFILE), ("file", "x\n")]);
    let (metadata, ids) = (lab.dir().join("metadata.json"), lab.dir().join("iid"));
    let tag = format!("{}/bx/app:1", lab.registry());
    let more = [
        "--push",
        "--tag",
        &tag,
        "--metadata-file",
        metadata.to_str().unwrap(),
        "--iidfile",
        ids.to_str().unwrap(),
    ];
    let Some(done) = build(&lab, &context, &more) else { return };
    done.ok();
    let metadata: serde_json::Value =
        serde_json::from_slice(&std::fs::read(metadata).unwrap()).unwrap();
    let (status, body) = lab.registry_get("/v2/bx/app/manifests/1");
    assert_eq!(status, 200);
    assert_eq!(metadata["containerimage.digest"], shipway_oci::Digest::of(&body).to_string());
    assert!(metadata["buildx.build.ref"].is_string(), "{metadata}");
    assert!(std::fs::read_to_string(ids).unwrap().starts_with("sha256:"));
}

#[test]
fn buildx_draws_the_lines_of_an_error() {
    let lab = Lab::complete(any());
    let context =
        lab.context("bxerror", &[("Dockerfile", "FROM busybox\nRUN echo broken >&2; exit 3\n")]);
    let Some(done) = build(&lab, &context, &[]) else { return };
    let text = done.failed().all();
    for says in ["Dockerfile:2", ">>> RUN echo broken >&2; exit 3", "exit code: 3"] {
        assert!(text.contains(says), "buildx does not say {says:?}:\n{text}");
    }
}

#[test]
fn buildx_exports_to_files() {
    let lab = Lab::complete(any());
    let context = lab.context(
        "bxfiles",
        &[("Dockerfile", "FROM scratch\nCOPY file /dir/file\n"), ("file", "exported\n")],
    );
    let (local, tar) = (lab.dir().join("out"), lab.dir().join("image.tar"));
    let Some(done) =
        build(&lab, &context, &["--output", &format!("type=local,dest={}", local.display())])
    else {
        return;
    };
    done.ok();
    assert_eq!(std::fs::read_to_string(local.join("dir/file")).unwrap(), "exported\n");
    build(&lab, &context, &["--output", &format!("type=oci,dest={}", tar.display())]).unwrap().ok();
    let list = run(std::process::Command::new("tar").arg("-tf").arg(&tar)).ok();
    for file in ["oci-layout", "index.json"] {
        assert!(list.lines().any(|l| l.trim_start_matches("./") == file), "{}", list.stdout);
    }
}

#[test]
fn buildx_sees_the_worker_the_cache_and_the_history() {
    let lab = Lab::complete(any());
    let context = lab.context("bxinfo", &[("Dockerfile", "FROM busybox\nRUN echo logged-line\n")]);
    let Some(done) = build(&lab, &context, &[]) else { return };
    done.ok();
    let inspect = buildx(&lab, &["inspect", "shipway"]).unwrap().ok();
    for says in ["running", "linux/amd64", "org.mobyproject.buildkit.worker.executor"] {
        assert!(
            inspect.stdout.contains(says)
                || says == "linux/amd64" && cfg!(not(target_arch = "x86_64")),
            "{}",
            inspect.stdout
        );
    }
    assert!(buildx(&lab, &["du"]).unwrap().ok().stdout.contains("Total:"));
    let history = buildx(&lab, &["history", "ls"]).unwrap().ok();
    assert!(history.stdout.contains("Completed"), "{}", history.stdout);
    let logs = buildx(&lab, &["history", "logs", "--progress", "plain"]).unwrap().ok();
    assert!(logs.all().contains("logged-line"), "{}", logs.all());
    buildx(&lab, &["prune", "--all", "--force"]).unwrap().ok();
}
