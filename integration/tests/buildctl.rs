//! `shipway` called as `buildctl`, and the real `buildctl` where it is: the same arguments, the
//! same effect.

#![allow(clippy::unwrap_used)]

use shipway_integration::{any, ctr_run};
use shipway_llb::{ExecDraft, MarshalOptions, State, VertexOptions};
use shipway_oci::Platform;
use shipway_testkit::{BaseImage, Lab, built, run, which};
use std::{
    io::BufRead as _,
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
    let context = lab.context(
        "bctl",
        &[("Dockerfile", "FROM busybox\nARG X\nRUN echo $X > /x\n"), ("file", "x")],
    );
    for (n, client) in clients(&lab).iter().enumerate() {
        let name = format!("docker.io/library/bctl:{n}");
        let metadata = lab.dir().join(format!("metadata-{n}.json"));
        let reference = lab.dir().join(format!("ref-{n}"));
        let mut build = command(&lab, client);
        build.args([
            "build",
            "--progress=plain",
            "--frontend=dockerfile.v0",
            "--opt",
            &format!("build-arg:X=round {n}"),
        ]);
        build.args([
            "--local",
            &format!("context={}", context.display()),
            "--local",
            &format!("dockerfile={}", context.display()),
        ]);
        build
            .args(["--output", &format!("type=image,name={name},unpack=true")])
            .arg(format!("--metadata-file={}", metadata.display()));
        build.arg(format!("--ref-file={}", reference.display()));
        run(&mut build).ok();
        assert_eq!(ctr_run(&lab, &name, &["cat", "/x"]).ok().stdout, format!("round {n}\n"));
        let metadata: serde_json::Value =
            serde_json::from_slice(&std::fs::read(metadata).unwrap()).unwrap();
        assert!(
            metadata["containerimage.digest"].as_str().is_some_and(|d| d.starts_with("sha256:")),
            "{metadata}"
        );

        let workers =
            run(command(&lab, client).args(["debug", "workers", "--format", "{{json .}}"])).ok();
        let workers: serde_json::Value = serde_json::from_str(&workers.stdout).unwrap();
        let labels = &workers[0]["labels"];
        assert_eq!(labels["org.mobyproject.buildkit.worker.executor"], "containerd", "{workers}");
        assert_eq!(
            labels["org.mobyproject.buildkit.worker.containerd.namespace"], "default",
            "{workers}"
        );
        assert_eq!(labels["org.mobyproject.buildkit.worker.snapshotter"], "overlayfs", "{workers}");
        assert_eq!(
            labels["org.mobyproject.buildkit.worker.containerd.uuid"].as_str().map(str::len),
            Some(36),
            "{workers}"
        );

        // What the build was called is what the history calls it.
        let reference = std::fs::read_to_string(reference).unwrap();
        let histories =
            run(command(&lab, client).args(["debug", "histories", "--format", "{{json .}}"])).ok();
        assert!(
            !reference.is_empty() && histories.stdout.contains(&format!("\"{reference}\"")),
            "{reference}: {}",
            histories.stdout
        );
        let info =
            run(command(&lab, client).args(["debug", "info", "--format", "{{json .}}"])).ok();
        let info: serde_json::Value = serde_json::from_str(&info.stdout).unwrap();
        assert!(
            info["buildkitVersion"]["version"].as_str().is_some_and(|v| v.starts_with('v')),
            "{info}"
        );

        assert!(run(command(&lab, client).arg("du")).ok().stdout.contains("Total"));
        run(command(&lab, client).args(["prune", "--all"])).ok();
        let version = run(Command::new(client).arg("--version")).ok();
        assert_eq!(
            version.stdout.split_whitespace().next(),
            Some("buildctl"),
            "{}",
            version.stdout
        );
        assert!((3..=4).contains(&version.stdout.split_whitespace().count()), "{}", version.stdout);
    }
}

#[test]
fn a_stream_of_an_image_goes_to_standard_output() {
    let lab = Lab::complete(any());
    let context =
        lab.context("stream", &[("Dockerfile", "FROM scratch\nCOPY file /\n"), ("file", "x")]);
    for client in clients(&lab) {
        let mut build = command(&lab, &client);
        build.args([
            "build",
            "--progress=plain",
            "--frontend=dockerfile.v0",
            "--output",
            "type=docker,name=streamed:1",
        ]);
        build.args([
            "--local",
            &format!("context={}", context.display()),
            "--local",
            &format!("dockerfile={}", context.display()),
        ]);
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

#[test]
fn key_files_are_an_agent_of_the_steps() {
    let mut lab = Lab::on(any());
    lab.start_registry();
    let mut image = BaseImage::busybox();
    image.add_programs(&["ssh-add"]);
    image.push(&lab.registry(), "library/keys", "latest");
    lab.start_daemon();
    let keys = ["one", "two"].map(|name| {
        let path = lab.dir().join(name);
        run(Command::new("ssh-keygen")
            .args(["-q", "-t", "ed25519", "-N", "", "-C", name, "-f"])
            .arg(&path))
        .ok();
        path.display().to_string()
    });
    let public =
        |name: &str| std::fs::read_to_string(lab.dir().join(format!("{name}.pub"))).unwrap();
    let text = "FROM keys\nRUN --mount=type=ssh ssh-add -L > /all && ! ssh-add -D\n\
                RUN --mount=type=ssh,id=other ssh-add -L > /other\nFROM scratch\nCOPY --from=0 /all /other /\n";
    let context = lab.context("keys", &[("Dockerfile", text)]);
    let client = &clients(&lab)[0];
    let build = |ssh: &[String], out: &Path| {
        let mut build = command(&lab, client);
        build.args(["build", "--progress=plain", "--frontend=dockerfile.v0"]);
        build.args([
            "--local",
            &format!("context={}", context.display()),
            "--local",
            &format!("dockerfile={}", context.display()),
        ]);
        run(build
            .args(ssh.iter().map(|s| format!("--ssh={s}")))
            .args(["--output", &format!("type=local,dest={}", out.display())]))
    };
    let out = lab.dir().join("out");
    build(&[format!("default={},{}", keys[0], keys[1]), format!("other={}", keys[1])], &out).ok();
    assert_eq!(std::fs::read_to_string(out.join("all")).unwrap(), public("one") + &public("two"));
    assert_eq!(std::fs::read_to_string(out.join("other")).unwrap(), public("two"));
    let secret = lab.dir().join("locked").display().to_string();
    run(Command::new("ssh-keygen").args([
        "-q",
        "-t",
        "ed25519",
        "-N",
        "passphrase",
        "-f",
        &secret,
    ]))
    .ok();
    let refused = build(&[format!("default={secret}")], &out).failed();
    assert!(
        refused.all().contains(&format!("the key {secret} is protected by a passphrase")),
        "{}",
        refused.all()
    );
}

#[test]
fn a_local_cache_that_is_reset_keeps_nothing_of_older_builds() {
    let lab = Lab::complete(any());
    let client = &clients(&lab)[0];
    let cache = lab.dir().join("cache");
    let build = |round: &str, more: &str| {
        let context = lab.context(
            round,
            &[("Dockerfile", &*format!("FROM busybox\nRUN echo {round} > /round\n"))],
        );
        let mut build = command(&lab, client);
        build.args([
            "build",
            "--progress=plain",
            "--frontend=dockerfile.v0",
            "--debug-json-cache-metrics=stdout",
        ]);
        build.args([
            "--local",
            &format!("context={}", context.display()),
            "--local",
            &format!("dockerfile={}", context.display()),
        ]);
        run(build.args([
            "--export-cache",
            &format!("type=local,mode=max,dest={}{more}", cache.display()),
        ]))
        .ok()
    };
    let blobs = || std::fs::read_dir(cache.join("blobs/sha256")).unwrap().count();
    let told = build("one", "").stdout;
    let first = blobs();
    let numbers: serde_json::Value = serde_json::from_str(told.lines().last().unwrap()).unwrap();
    assert_eq!((&numbers["miss"], &numbers["from"]), (&1.into(), &1.into()), "{told}");
    build("two", "");
    assert!(blobs() > first);
    build("two", ",reset=true");
    assert_eq!(blobs(), first);
    let again = build("two", ",reset=true").stdout;
    let numbers: serde_json::Value = serde_json::from_str(again.lines().last().unwrap()).unwrap();
    assert_eq!((&numbers["miss"], &numbers["user_cached"]), (&0.into(), &2.into()), "{again}");
}

/// `buildctl debug` and `prune-histories`, ours and the real one side by side.
#[test]
fn buildctl_looks_inside() {
    let lab = Lab::complete(any());
    let context = lab.context("inside", &[("Dockerfile", "FROM busybox\nRUN echo said-this\n")]);
    let local = format!("={}", context.display());
    let clients = clients(&lab);
    let definition = lab.dir().join("definition");
    std::fs::write(&definition, graph()).unwrap();
    let mut dumps = Vec::new();
    for (n, client) in clients.iter().enumerate() {
        let reference = lab.dir().join(format!("inside-{n}"));
        // It sees the build begin and end.
        let mut monitor = command(&lab, client)
            .args(["debug", "monitor"])
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let events = std::io::BufReader::new(monitor.stdout.take().unwrap());
        run(command(&lab, client)
            .args(["build", "--frontend", "dockerfile.v0", "--no-cache"])
            .args(["--local", &format!("context{local}"), "--local", &format!("dockerfile{local}")])
            .arg(format!("--ref-file={}", reference.display())))
        .ok();
        let id = std::fs::read_to_string(&reference).unwrap();
        let done = format!("event: COMPLETE ref:{id}");
        assert!(events.lines().map(Result::unwrap).any(|line| line == done), "{done}");
        monitor.kill().unwrap();
        monitor.wait().unwrap();

        let logs = run(command(&lab, client).args(["debug", "logs", &id, "--progress=plain"])).ok();
        assert!(logs.all().contains("said-this"), "{}", logs.all());
        let trace = run(command(&lab, client).args(["debug", "logs", "--trace", &id]));
        assert!(trace.stderr.contains("does not have trace") || !trace.stdout.is_empty());
        let pinned = || {
            let list = run(command(&lab, client).args(["debug", "histories"])).ok().stdout;
            list.lines().any(|line| line.contains(&id) && line.ends_with('*'))
        };
        run(command(&lab, client).args(["debug", "ctl", "--pin", &id])).ok();
        assert!(pinned());
        run(command(&lab, client).arg("prune-histories")).ok();
        assert!(pinned(), "a pinned build was forgotten");
        run(command(&lab, client).args(["debug", "ctl", "--unpin", &id])).ok();
        let listed = run(command(&lab, client).arg("prune-histories")).ok().stdout;
        assert!(listed.contains(&id), "{listed}");
        let gone = run(command(&lab, client).args(["debug", "ctl", "--delete", &id])).failed();
        assert!(gone.stderr.contains(&id), "{}", gone.stderr);
        run(command(&lab, client).args(["debug", "ctl", &id])).failed();

        let digest = shipway_oci::Digest::of("no such blob").to_string();
        assert!(
            run(command(&lab, client).args(["debug", "get", &digest]))
                .failed()
                .stderr
                .contains("not found")
        );
        let dump = |dot: &[&str]| {
            let mut dump = Command::new(client);
            run(dump.args(["debug", "dump-llb"]).args(dot).arg(&definition)).ok().stdout
        };
        let lines: Vec<serde_json::Value> =
            dump(&[]).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let mut drawn: Vec<String> = dump(&["--dot"]).lines().map(str::to_owned).collect();
        drawn.sort();
        dumps.push((lines, drawn));
    }
    let (lines, drawn) = &dumps[0];
    assert!(
        lines.iter().any(|l| l["Op"]["Op"]["source"]["identifier"]
            == "docker-image://docker.io/library/busybox:latest"),
        "{lines:?}"
    );
    assert!(drawn.iter().any(|l| l.contains("shape=\"box\"")), "{drawn:?}");
    for other in &dumps[1..] {
        assert_eq!(dumps[0], *other);
    }
}

/// A definition with an image and a step.
fn graph() -> Vec<u8> {
    let image = "docker.io/library/busybox:latest";
    let base = State::image(image, "", Default::default(), VertexOptions::default());
    let args = ["sh", "-c", "echo x"].map(str::to_owned).into();
    let stepped = base.run(ExecDraft { args, ..ExecDraft::default() }, VertexOptions::default());
    let options = MarshalOptions {
        platform: Platform::new("linux", "amd64", ""),
        caps: None,
        local_unique_id: String::new(),
    };
    stepped.marshal(&options).unwrap().encode()
}
