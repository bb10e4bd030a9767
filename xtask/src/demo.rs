//! `cargo xtask demo`: a small multi-stage image, built by `shipwayd` on a private containerd and
//! run by `ctr` a moment later.

use crate::{cargo, packages};
use shipway_testkit::{
    BaseImage, Finished, Flavour, Lab, LabOptions, Network, SlowNetwork, wait_for, which,
};
use std::{
    io::{BufRead as _, BufReader, Read as _},
    path::PathBuf,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

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

    if !keep {
        lazy(flavour)?;
    }

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

/// An image with tables of contents, made by another hand, runs while it is fetched over a slow
/// network; the snapshotter is killed meanwhile, and a second namespace runs it.
fn lazy(flavour: Flavour) -> Result<(), String> {
    let Some(remote) = which("ctr-remote") else {
        println!("\n== ctr-remote is absent: lazy images are not shown");
        return Ok(());
    };
    let mut lab = Lab::start(LabOptions { snapshotter: true, ..LabOptions::new(flavour) });
    lab.start_registry();
    let plain = format!("{}/programs:plain", lab.registry());
    let mut image = BaseImage::busybox();
    image.add_programs(&["git", "containerd", "runc", "openssl"]);
    image.push(&lab.registry(), "programs", "plain");
    let converted = format!("{}/programs:lazy", lab.registry());
    let ctr_remote = |lab: &Lab, namespace: &str, arguments: &[&str]| {
        let mut command = Command::new(&remote);
        command.env("PATH", lab.path()).arg("--address").arg(lab.containerd_socket());
        good(shipway_testkit::run(command.args(["--namespace", namespace]).args(arguments)))
    };
    good(lab.ctr(["images", "pull", "--plain-http", &plain]))?;
    ctr_remote(&lab, "default", &["images", "convert", "--estargz", "--oci", &plain, &converted])?;
    good(lab.ctr(["images", "push", "--plain-http", &converted]))?;
    for image in [&plain, &converted] {
        good(lab.ctr(["images", "delete", "--sync", image]))?;
    }
    let network = Network { latency: Duration::from_millis(10), bandwidth: 20 << 20 };
    println!(
        "\nNow a network of 20 MiB/s and 10 ms each way, and containerd {} with shipway-snapshotter.",
        flavour.version()
    );

    let slow = SlowNetwork::start(&lab.registry(), network);
    let started = Instant::now();
    let full = format!("{}/programs:plain", slow.address());
    good(lab.ctr(["images", "pull", "--plain-http", "--snapshotter", "overlayfs", &full]))?;
    let run =
        |lab: &Lab, namespace: &str, snapshotter: &str, image: &str, id: &str, script: &str| {
            let words =
                ["run", "--rm", "--snapshotter", snapshotter, image, id, "sh", "-c", script];
            good(lab.ctr_in(namespace, words))
        };
    let script = "echo hello, from $(busybox | head -n 1)";
    let said = run(&lab, "default", "overlayfs", &full, "demo-full", script)?;
    let bytes = slow.bytes();
    step(
        &format!("the plain image, pulled and run on overlayfs ({} KiB fetched)", bytes >> 10),
        started.elapsed(),
        &said.stdout,
    );

    let started = Instant::now();
    let image = format!("{}/programs:lazy", slow.address());
    let pull = ["images", "rpull", "--plain-http", "--snapshotter", "shipway", &image];
    ctr_remote(&lab, "default", &pull)?;
    let said = run(&lab, "default", "shipway", &image, "demo-lazy", script)?;
    step(
        &format!(
            "the same with tables of contents, lazily ({} KiB fetched so far)",
            (slow.bytes() - bytes) >> 10
        ),
        started.elapsed(),
        &said.stdout,
    );

    let mut reader = lab.ctr_command_in("default");
    let all = "echo reading; sha256sum $(find /usr /bin -xdev -type f) | sha256sum";
    reader.args(["run", "--rm", "--snapshotter", "shipway", &image, "demo-read", "sh", "-c", all]);
    let started = Instant::now();
    let mut reading = reader.stdout(Stdio::piped()).spawn().map_err(|e| e.to_string())?;
    let mut said = BufReader::new(reading.stdout.take().ok_or("no output")?);
    let mut read = String::new();
    said.read_line(&mut read).map_err(|e| e.to_string())?;
    lab.kill_snapshotter();
    lab.kill_keeper();
    lab.start_snapshotter();
    said.read_to_string(&mut read).map_err(|e| e.to_string())?;
    if !reading.wait().map_err(|e| e.to_string())?.success() {
        return Err("a read failed when the snapshotter was killed".to_owned());
    }
    step(
        "everything read in a container, while the snapshotter and its keeper are killed",
        started.elapsed(),
        &read,
    );
    // containerd looks for it again after some seconds.
    wait_for("containerd to reach the snapshotter", Duration::from_secs(30), || {
        let listed = lab.ctr(["snapshots", "--snapshotter", "shipway", "list"]);
        if listed.code == Some(0) { Ok(()) } else { Err(listed.all()) }
    });

    let started = Instant::now();
    ctr_remote(&lab, "second", &pull)?;
    let again = run(&lab, "second", "shipway", &image, "demo-second", all)?;
    if again.stdout != read {
        return Err("the second namespace sees something else".to_owned());
    }
    step("the same image in a second namespace", started.elapsed(), &again.stdout);
    let status = good(shipway_testkit::run(lab.snapshotter_command().arg("status")))?;
    step("shipway-snapshotter status", status.took, &status.stdout);
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
