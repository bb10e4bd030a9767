//! The images that Shipway builds of itself (`config/images`): one with a containerd inside, which
//! drivers of builders start and talk to through commands.

#![allow(clippy::unwrap_used)]

use shipway_integration::{
    any,
    images::{host_base, image_of_us},
};
use shipway_testkit::{Lab, built, run, wait_for};
use std::{fs, os::unix::fs::PermissionsExt as _, process::Command, time::Duration};

/// What a driver does with it: wait for `buildctl debug workers`, then `buildctl dial-stdio`, both
/// started in the container.
#[test]
fn a_container_with_a_containerd_inside_builds() {
    let mut lab = Lab::on(any());
    lab.start_registry();
    host_base(&["containerd", "containerd-shim-runc-v2", "runc", "git"]).push(
        &lab.registry(),
        "library/host",
        "1",
    );
    lab.start_daemon();
    image_of_us(&lab, "builder", "host:1", "shipway-builder:1");

    let state = lab.dir().join("state");
    fs::create_dir(&state).unwrap();
    let mount = format!("type=bind,src={},dst=/var/lib/buildkit,options=rbind:rw", state.display());
    lab.ctr([
        "run",
        "--detach",
        "--privileged",
        "--mount",
        &mount,
        // Drivers' engines mount it, ctr does not.
        "--mount",
        "type=cgroup,src=cgroup,dst=/sys/fs/cgroup,options=rw:nosuid:noexec:nodev",
        "docker.io/library/shipway-builder:1",
        "builder",
        "shipway-builder",
        "--allow-insecure-entitlement=network.host",
    ])
    .ok();
    let mut count = 0;
    let mut exec = |command: &[&str]| {
        count += 1;
        let id = format!("exec-{count}");
        let words = ["tasks", "exec", "--exec-id", &id, "builder"];
        lab.ctr(words.into_iter().chain(command.iter().copied()))
    };
    wait_for("the builder to be ready", Duration::from_secs(60), || {
        let workers = exec(&["buildctl", "debug", "workers"]);
        if workers.code == Some(0) { Ok(()) } else { Err(workers.all()) }
    });
    let version = exec(&["buildkitd", "--version"]).ok().stdout;
    assert_eq!(version.split_whitespace().count(), 4, "{version}");

    // `nerdctl exec -i NAME COMMAND…`, as far as an address of a container needs it.
    let bin = lab.dir().join("bin");
    fs::create_dir(&bin).unwrap();
    let mut ctr = lab.ctr_command_in(lab.namespace());
    ctr.args(["tasks", "exec", "--exec-id"]);
    let words: Vec<String> = std::iter::once(ctr.get_program())
        .chain(ctr.get_args())
        .map(|word| format!("'{}'", word.to_str().unwrap()))
        .collect();
    let script = format!(
        "#!/bin/sh\n[ \"$1 $2\" = 'exec -i' ] || exit 9\nshift 2\nexec {} dial-$$ \"$@\"\n",
        words.join(" ")
    );
    fs::write(bin.join("nerdctl"), script).unwrap();
    fs::set_permissions(bin.join("nerdctl"), fs::Permissions::from_mode(0o755)).unwrap();

    let context = lab.context(
        "inside",
        &[(
            "Dockerfile",
            "FROM scratch AS made\nCOPY busybox /bin/sh\nRUN echo built inside > /word\n\
             FROM scratch\nCOPY --from=made /word /\n",
        )],
    );
    fs::copy("/bin/busybox", context.join("busybox")).unwrap();
    let out = lab.dir().join("out");
    let path = std::env::join_paths(
        std::iter::once(bin).chain(std::env::split_paths(&std::env::var_os("PATH").unwrap())),
    );
    run(Command::new(built("shipway"))
        .env("PATH", path.unwrap())
        .args(["--addr", "nerdctl-container://builder", "build", "--progress", "plain", "-o"])
        .arg(&out)
        .arg(&context))
    .ok();
    assert_eq!(fs::read_to_string(out.join("word")).unwrap(), "built inside\n");
    assert!(state.join("containerd").is_dir(), "containerd keeps everything in the volume");

    lab.ctr(["tasks", "kill", "builder"]).ok();
    wait_for("the builder to end", Duration::from_secs(30), || {
        let tasks = lab.ctr(["tasks", "list"]).ok().stdout;
        let stopped = |l: &str| l.starts_with("builder ") && l.contains("STOPPED");
        if tasks.lines().any(stopped) { Ok(()) } else { Err(tasks) }
    });
    // Its exit code is the daemon's.
    lab.ctr(["tasks", "delete", "builder"]).ok();
}
