//! Steps: mounts, users, environment, networks, secrets, and that a cancelled step leaves no
//! process.

#![allow(clippy::unwrap_used)]

use shipway_integration::{any, build, build_text, nothing_left, on_each, remove_everything};
use shipway_testkit::{Flavour, Lab, wait_for};
use std::{process::Stdio, time::Duration};

#[test]
fn what_steps_see() {
    on_each(|flavour| {
        let lab = Lab::complete(flavour);
        let secret = lab.dir().join("token");
        std::fs::write(&secret, "s3cret").unwrap();
        let text = r#"FROM busybox
ENV A=1
ARG B=2
RUN test "$A$B" = 12 && test "$(pwd)" = / && test "$(id -u)" = 0
WORKDIR /work/dir
RUN test "$(pwd)" = /work/dir && touch made
USER nobody
RUN test "$(id -u)" = 65534 && ! touch /forbidden 2>/dev/null
USER 1234:5678
RUN test "$(id -u):$(id -g)" = 1234:5678
USER root
RUN --mount=type=bind,target=/ctx test -f /ctx/file && ! touch /ctx/x 2>/dev/null
RUN --mount=type=tmpfs,target=/t echo x > /t/x
RUN test ! -e /t/x
RUN --mount=type=secret,id=token test "$(cat /run/secrets/token)" = s3cret
RUN --mount=type=secret,id=token,env=TOKEN test "$TOKEN" = s3cret
RUN test ! -e /run/secrets/token
RUN --mount=type=cache,target=/c echo kept > /c/kept
RUN --mount=type=cache,target=/c test "$(cat /c/kept)" = kept
RUN test ! -e /c/kept
RUN --network=none test "$(ls /sys/class/net)" = lo
RUN grep -q localhost /etc/hosts
RUN ["/bin/sh", "-c", "test $0 = name", "name"]
SHELL ["/bin/ash", "-ec"]
RUN false || true; test -n "$A"
"#;
        let context = lab.context("steps", &[("Dockerfile", text), ("file", "x")]);
        build(
            &lab,
            "steps:1",
            &context,
            &["--secret", &format!("id=token,src={}", secret.display())],
        )
        .ok();
        let missing = build_text(
            &lab,
            "steps:2",
            "FROM busybox\nRUN --mount=type=secret,id=absent,required=true true\n",
        )
        .failed();
        assert!(missing.all().contains("absent"), "{}", missing.all());
    });
}

/// Containers of steps: without the keepers of warm shims, which stay for a while.
fn steps(lab: &Lab) -> Vec<String> {
    let left = lab.leftovers();
    left.tasks
        .into_iter()
        .chain(left.containers)
        .filter(|c| !c.ends_with("-keeper"))
        .collect::<std::collections::BTreeSet<_>>()
        .into_iter()
        .collect()
}

#[test]
fn what_a_step_prints_is_seen_while_it_runs() {
    let lab = Lab::complete(any());
    let context =
        lab.context("log", &[("Dockerfile", "FROM busybox\nRUN echo early; sleep 600\n")]);
    let mut child = lab
        .shipway_command()
        .args(["build", "--progress", "plain"])
        .arg(&context)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = std::io::BufRead::lines(std::io::BufReader::new(child.stderr.take().unwrap()));
    assert!(
        lines.by_ref().map_while(Result::ok).any(|l| l.ends_with("early")),
        "the step's output never came"
    );
    assert_eq!(steps(&lab).len(), 1, "{:?}", lab.leftovers().tasks);

    // The client goes away: so do the step, its container and its process.
    child.kill().unwrap();
    child.wait().unwrap();
    wait_for("the step of a client that went away to end", Duration::from_secs(20), || {
        let left = steps(&lab);
        if left.is_empty() { Ok(()) } else { Err(format!("{left:?}")) }
    });
    // Its cancelled build is in nobody's way.
    build_text(&lab, "after:1", "FROM busybox\nRUN echo fine\n").ok();
}

/// A step that writes its output byte by byte, on both streams.
#[test]
fn many_small_writes_leave_no_memory_behind() {
    let mut lab = Lab::complete(any());
    let mut round = |n: u32| {
        let script = "i=0; while [ $i -lt 30000 ]; do printf x; printf y >&2; i=$((i+1)); done";
        let done = build_text(
            &lab,
            &format!("bytes:{n}"),
            &format!("FROM busybox\nRUN : {n}; {script}\n"),
        )
        .ok();
        let said = done.all().bytes().filter(|b| *b == b'x').count();
        assert!(said >= 30_000, "{said}");
        lab.daemon().memory()
    };
    // The first rounds warm up what the allocator and the daemon keep for good.
    let before = (1..=2).map(&mut round).max().unwrap();
    let after = (3..=4).map(&mut round).min().unwrap();
    assert!(after < before + (4 << 20), "{before} bytes before, {after} after");
}

/// What a build without cache empties, it empties once (row `exec.mnt.cache.reset`).
#[test]
fn a_cache_mount_is_emptied_once_per_build() {
    let lab = Lab::complete(any());
    let text = r#"FROM busybox
RUN --mount=type=cache,id=shared,target=/c test ! -e /c/old && echo 1 > /c/first && touch /c/old
RUN --mount=type=cache,id=shared,target=/elsewhere test "$(cat /elsewhere/first)" = 1
RUN --mount=type=cache,target=/other test ! -e /other/x && touch /other/x
"#;
    let context = lab.context("cache-reset", &[("Dockerfile", text)]);
    build(&lab, "reset:1", &context, &[]).ok();
    // The same steps fail if they find what the first build left.
    build(&lab, "reset:2", &context, &["--no-cache"]).ok();
    build(&lab, "reset:3", &context, &["--no-cache"]).ok();
}

/// Names that cannot be looked up are no reason to give files to root.
#[test]
fn owners_by_name_need_the_name() {
    let lab = Lab::complete(any());
    let missing = "there is no root filesystem to look the name up in";
    for (n, (copy, expected)) in [
        ("COPY --chown=nobody Dockerfile /f", missing),
        ("COPY --link --chown=33:nobody Dockerfile /f", missing),
        ("ADD --chown=nobody Dockerfile /f", missing),
    ]
    .into_iter()
    .enumerate()
    {
        let failed =
            build_text(&lab, &format!("owner:{n}"), &format!("FROM scratch\n{copy}\n")).failed();
        assert!(failed.all().contains(expected), "{copy}: {}", failed.all());
    }
    let failed = build_text(
        &lab,
        "owner:linked",
        "FROM busybox\nCOPY --link --chown=nobody Dockerfile /f\n",
    )
    .failed();
    assert!(failed.all().contains(missing), "{}", failed.all());
    let failed =
        build_text(&lab, "owner:none", "FROM busybox\nCOPY --chown=nosuchuser Dockerfile /f\n")
            .failed();
    assert!(
        failed.all().contains("unable to find user nosuchuser: no matching entries in /etc/passwd"),
        "{}",
        failed.all()
    );
    let text = "FROM busybox\nCOPY --chown=nobody Dockerfile /f\nCOPY --link --chown=root Dockerfile /g\nRUN test $(stat -c %u /f) = 65534 && test $(stat -c %u /g) = 0\n";
    build_text(&lab, "owner:fine", text).ok();
}

/// An archive with newlines in names and values comes through `ADD`, into the layer, and out again.
#[test]
fn an_archive_with_newlines_is_added_whole() {
    on_each(|flavour| {
        let lab = Lab::complete(flavour);
        let text = r#"FROM scratch AS layer
ADD odd.tar /
FROM busybox
COPY --from=layer / /odd
RUN cd /odd && test $(stat -c %u tool) = 1234 && test "$(cat caf*/fi*)" = abc && touch /seen
FROM layer
COPY --from=1 /seen /
"#;
        let context = lab.context("newlines", &[("Dockerfile", text)]);
        std::fs::write(
            context.join("odd.tar"),
            include_bytes!("../../crates/archive/tests/corpus/python-pax.tar"),
        )
        .unwrap();
        let out = lab.dir().join("newlines.tar");
        build(
            &lab,
            "newlines:1",
            &context,
            &["--output", &format!("type=tar,dest={}", out.display())],
        )
        .ok();
        let list = std::process::Command::new("tar")
            .args(["-t", "--quoting-style=literal", "-f"])
            .arg(&out)
            .output()
            .unwrap();
        let list = String::from_utf8_lossy(&list.stdout).into_owned();
        assert!(list.contains("café\nbreak/fi\nle\n") && list.contains("link\nname\n"), "{list}");
    });
}

#[test]
fn network_host_needs_permission_and_then_works() {
    let lab = Lab::complete(any());
    let context = lab.context(
        "net",
        &[("Dockerfile", "FROM busybox\nRUN --network=host ls /sys/class/net > /net\n")],
    );
    let refused = build(&lab, "net:1", &context, &[]).failed();
    assert!(refused.all().contains("network.host"), "{}", refused.all());
    build(&lab, "net:1", &context, &["--allow", "network.host"]).ok();
}

/// Waits until `running` steps are left and a shim is warm, so that nothing is in the middle of
/// being made or removed.
fn settled(lab: &Lab, running: usize) {
    wait_for("a warm shim", Duration::from_secs(30), || {
        let (left, tasks) = (lab.leftovers(), lab.ctr(["tasks", "list"]).ok().stdout);
        let keepers =
            tasks.lines().filter(|l| l.contains("-keeper") && l.contains("STOPPED")).count();
        // containerd runs steps in a shim that is there without starting its program, if it knows
        // how.
        let sandboxes = if lab.flavour() == Flavour::Newer { keepers } else { 0 };
        match (steps(lab).len() == running, keepers > 0, left.sandboxes.len() == sandboxes) {
            (true, true, true) => Ok(()),
            _ => Err(format!("{left:#?}\n{tasks}")),
        }
    });
}

#[test]
fn steps_share_shims_and_outlive_a_killed_one() {
    on_each(|flavour| {
        let lab = Lab::complete(flavour);
        build_text(&lab, "shims:1", "FROM busybox\nRUN echo 1 > /1\nRUN echo 2 > /2\n").ok();
        settled(&lab, 0);
        assert_ne!(lab.kill_shims(), 0);
        build_text(&lab, "shims:2", "FROM busybox\nRUN echo 3 > /3\nRUN cat /3\n").ok();

        let context =
            lab.context("killed", &[("Dockerfile", "FROM busybox\nRUN echo early; sleep 600\n")]);
        let mut command = lab.shipway_command();
        command
            .args(["build", "--progress", "plain"])
            .arg(&context)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut lines =
            std::io::BufRead::lines(std::io::BufReader::new(child.stderr.take().unwrap()))
                .map_while(Result::ok);
        assert!(lines.by_ref().any(|l| l.ends_with("early")), "the step's output never came");
        settled(&lab, 1);
        assert_ne!(lab.kill_shims(), 0);
        let rest: Vec<String> = lines.collect();
        assert!(!child.wait().unwrap().success());
        assert!(rest.iter().any(|l| l.contains("shim was killed")), "{rest:#?}");
        remove_everything(&lab);
        nothing_left(&lab);
    });
}

#[test]
fn programs_of_other_processors_run_by_an_emulator_on_path_and_it_leaves_no_trace() {
    let mut lab = Lab::complete(any());
    let workers = lab.shipway(["workers"]).ok().all();
    assert!(
        !workers.contains("linux/s390x"),
        "this kernel runs s390x programs by itself: {workers}"
    );
    // A stand-in that runs by the image's shell, and tells that it was used.
    let dir = lab.dir().join("emulators");
    std::fs::create_dir_all(&dir).unwrap();
    let emulator = dir.join("buildkit-qemu-s390x");
    std::fs::write(&emulator, "#!/bin/sh\nexport EMULATED=$0\nexec \"$@\"\n").unwrap();
    use std::os::unix::fs::PermissionsExt as _;
    std::fs::set_permissions(&emulator, std::fs::Permissions::from_mode(0o755)).unwrap();
    let path = std::env::join_paths(std::iter::once(dir).chain(std::env::split_paths(&lab.path())))
        .unwrap();
    assert!(lab.stop_daemon());
    lab.daemon_environment("PATH", &path.to_string_lossy());
    lab.start_daemon();
    let text = "FROM --platform=$BUILDPLATFORM busybox AS native\nRUN test -z \"$EMULATED\" && touch /native\n\
                FROM scratch\nCOPY --from=native / /\n\
                RUN echo \"$EMULATED\" > /emulated && test -x /dev/.buildkit_qemu_emulator && ! touch /dev/.buildkit_qemu_emulator 2>/dev/null\n\
                USER 1234\nRUN test -n \"$EMULATED\"\n";
    let out = lab.dir().join("out");
    let context = lab.context("emulated", &[("Dockerfile", text)]);
    build(
        &lab,
        "emulated:1",
        &context,
        &["--platform", "linux/s390x", "-o", &out.to_string_lossy()],
    )
    .ok();
    assert_eq!(
        std::fs::read_to_string(out.join("emulated")).unwrap(),
        "/dev/.buildkit_qemu_emulator\n"
    );
    assert_eq!(
        std::fs::read_dir(out.join("dev")).unwrap().count(),
        0,
        "the emulator's mount point is left"
    );
    // A failure is told in words of the step.
    let text = "FROM --platform=$BUILDPLATFORM busybox AS native\nFROM scratch\nCOPY --from=native / /\nRUN false\n";
    let failed = build(
        &lab,
        "emulated:2",
        &lab.context("failing", &[("Dockerfile", text)]),
        &["--platform", "linux/s390x"],
    )
    .failed();
    assert!(
        failed.all().contains("process \"/bin/sh -c false\" did not complete"),
        "{}",
        failed.all()
    );
}
