//! `cargo xtask demo`: a small multi-stage image, built by `shipwayd` on a private containerd and
//! run by `ctr` a moment later.

use crate::{cargo, packages};
use shipway_testkit::{BaseImage, Finished, Flavour, Lab, LabOptions};
use std::{path::PathBuf, time::Duration};

/// Where `--keep` keeps things: short, because sockets live there.
const KEPT: &str = "/var/tmp/shipway-demo";

const DOCKERFILE: &str = r#"FROM busybox AS words
WORKDIR /out
RUN --mount=type=cache,target=/var/cache/words \
    date > /var/cache/words/last && echo "built in a containerd task" > word

FROM busybox AS greeting
COPY name /etc/name
RUN <<EOT
  echo "Hello, $(cat /etc/name)!" > /greeting
EOT

FROM busybox
LABEL org.example.made-by=shipway
COPY --from=words /out/word /word
COPY --from=greeting /greeting /greeting
CMD ["/bin/sh", "-c", "cat /greeting; echo This image was $(cat /word)."]
"#;

/// Prepares, builds, and goes on as root.
pub fn run(keep: bool) -> Result<(), String> {
    packages::prepare()?;
    let second: &[&str] = if keep { &["demo-as-root", "--keep"] } else { &["demo-as-root"] };
    cargo::build_and_continue("dev", second)
}

fn step(what: &str, took: Duration, output: &str) {
    println!("\n== {what}: {:.2} s", took.as_secs_f64());
    for line in output.lines().filter(|l| !l.trim().is_empty()) {
        println!("   {line}");
    }
}

fn good(done: Finished) -> Result<Finished, String> {
    if done.code == Some(0) { Ok(done) } else { Err(format!("{}\n{}", done.command, done.all())) }
}

/// The demonstration itself.
pub fn as_root(keep: bool) -> Result<(), String> {
    let flavour = if Flavour::present().contains(&Flavour::System) {
        Flavour::System
    } else {
        Flavour::Newer
    };
    if keep {
        stop_as_root()?;
    }
    let keep_in = keep.then(|| PathBuf::from(KEPT));
    let mut lab = Lab::start(LabOptions { keep_in, ..LabOptions::new(flavour) });
    lab.start_registry();
    BaseImage::busybox().push(&lab.registry(), "library/busybox", "latest");
    lab.start_daemon();
    println!(
        "A private containerd {}, a registry with busybox, and shipwayd run in {}.",
        flavour.version(),
        lab.dir().display()
    );

    let context = lab.context("hello", &[("Dockerfile", DOCKERFILE), ("name", "world\n")]);
    let context = context.to_string_lossy().into_owned();
    let build = ["build", "--progress", "plain", "--tag", "demo:latest", &context];
    let image = "docker.io/library/demo:latest";

    let built = good(lab.shipway(build))?;
    step(
        "shipway build --tag demo:latest hello/   (pulls busybox, runs two steps)",
        built.took,
        &built.all(),
    );
    let ran = good(lab.ctr(["run", "--rm", image, "demo"]))?;
    step(
        &format!(
            "ctr run --rm {image} demo   (nothing was loaded or unpacked: the image was there)"
        ),
        ran.took,
        &ran.stdout,
    );
    let again = good(lab.shipway(build))?;
    step("shipway build again   (everything from the cache)", again.took, &again.all());
    match lab.buildx() {
        None => println!("\n== docker-buildx is absent: not shown"),
        Some(mut buildx) => {
            let done = good(shipway_testkit::run(buildx.args([
                "build",
                "--progress",
                "plain",
                "--output",
                "type=image,name=docker.io/library/demo:buildx",
                &context,
            ])))?;
            step(
                "docker-buildx build, the unmodified client, on the same daemon",
                done.took,
                &done.all(),
            );
        }
    }
    let snapshots = good(lab.ctr(["images", "list", "--quiet"]))?;
    step("ctr images list", snapshots.took, &snapshots.stdout);

    if keep {
        println!("\nAll of it keeps running. To go on by hand (as root):");
        let ctr = lab.ctr_path();
        println!(
            "  {} --addr {} build --tag mine {context}",
            shipway_testkit::built("shipway").display(),
            lab.daemon_address()
        );
        println!(
            "  {} --address {} run --rm {image} demo2",
            ctr.display(),
            lab.containerd_socket().display()
        );
        println!("  docker buildx create --name shipway --driver remote {}", lab.daemon_address());
        println!("  cargo xtask stop      ends it");
        lab.leave_running();
    }
    Ok(())
}

/// Ends what `--keep` left.
pub fn stop() -> Result<(), String> {
    let mut command = cargo::root_command(std::env::current_exe().map_err(|e| e.to_string())?);
    command.arg("stop-as-root");
    cargo::succeed(command)
}

/// The part of [`stop`] that needs root.
pub fn stop_as_root() -> Result<(), String> {
    Lab::clear(KEPT.as_ref());
    Ok(())
}
