//! What a build leaves on the host is for root alone: its sources, logs and secrets are nobody
//! else's. And what is in an image does not depend on that.

#![allow(clippy::unwrap_used)]

use shipway_integration::{any, build, git_daemon};
use shipway_testkit::{Lab, run};
use std::{
    fs,
    os::unix::{
        fs::{MetadataExt as _, PermissionsExt as _},
        process::CommandExt as _,
    },
    path::Path,
    process::{Command, Stdio},
};

/// A user without rights.
const NOBODY: u32 = 65534;

/// What `find` shows another user below `dir`.
fn seen_by_nobody(dir: &Path) -> Vec<String> {
    let found = run(Command::new("find").arg(dir).uid(NOBODY).gid(NOBODY).current_dir("/"));
    found.stdout.lines().map(str::to_owned).collect()
}

fn mode(path: &Path) -> u32 {
    fs::symlink_metadata(path).unwrap().mode() & 0o7777
}

#[test]
fn other_users_of_the_host_see_nothing_of_a_build() {
    let mut lab = Lab::complete(any());
    let root = lab.dir().join("shipwayd");
    // As an earlier version, or an administrator, may have left it.
    assert!(lab.stop_daemon(), "the daemon had to be killed");
    for dir in [root.clone(), root.join("history"), root.join("refs"), lab.dir().to_owned()] {
        fs::set_permissions(dir, fs::Permissions::from_mode(0o755)).unwrap();
    }
    let log = lab.dir().join("shipwayd.log").display().to_string();
    assert!(
        seen_by_nobody(lab.dir()).contains(&log),
        "another user does not get as far as the lab"
    );
    lab.start_daemon();

    let files = [(
        "Dockerfile",
        "FROM busybox\nCOPY . /big/\nRUN mknod -m 666 /disk b 8 0 && find /big | wc -l\nCOPY --from=busybox / /all/\n",
    )];
    let context = lab.context("private", &files);
    let data: Vec<u8> = (0..256_u32 * 1024).flat_map(u32::to_le_bytes).collect();
    for i in 0..64 {
        fs::write(context.join(format!("file-{i}")), &data).unwrap();
    }
    let mut client = lab.shipway_command();
    let mut client = client
        .args(["build", "--progress", "plain", "--tag", "private:1"])
        .arg(&context)
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut looks = 0;
    let ended = loop {
        assert_eq!(seen_by_nobody(&root), [root.display().to_string()]);
        looks += 1;
        if let Some(ended) = client.try_wait().unwrap() {
            break ended;
        }
    };
    assert!(ended.success(), "the build failed");
    assert!(looks > 1, "the build was over before anybody looked");

    assert_eq!(seen_by_nobody(&root), [root.display().to_string()]);
    let made = run(Command::new("find").arg(&root).args([
        "-xdev",
        "-perm",
        "/077",
        "-newer",
        &log.replace("shipwayd.log", "owner"),
    ]))
    .ok();
    let open: Vec<&str> = made.stdout.lines().filter(|l| !l.contains("/refs/mnt/")).collect();
    assert!(open.is_empty(), "open to others but for the directory they are in: {open:#?}");
    assert_eq!(
        (mode(&root), mode(&root.join("history")), mode(&root.join("cache.redb"))),
        (0o700, 0o700, 0o600)
    );
    assert_eq!(mode(&lab.daemon_socket()), 0o660);
}

#[test]
fn what_is_in_an_image_has_the_usual_modes() {
    let lab = Lab::complete(any());
    let repo = lab.context("repo", &[("plain", "one"), ("sub/run", "#!/bin/sh\n")]);
    let base = repo.parent().unwrap().to_path_buf();
    let commit = "umask 022; chmod +x sub/run; git init -q -b main . && git config user.email a@b && git config user.name n && git add -f . \
                  && git commit -qm 1";
    run(Command::new("sh").args(["-c", commit]).current_dir(&repo)).ok();
    let (_daemon, port) = git_daemon(&base);

    let text = format!(
        "FROM busybox\n\
         WORKDIR /work/deep\n\
         COPY file /copied/to/file\n\
         COPY --link file /linked/to/file\n\
         COPY <<EOF /made/file\ntext\nEOF\n\
         ADD git://127.0.0.1:{port}/repo#main /git/plain/\n\
         ADD --keep-git-dir=true git://127.0.0.1:{port}/repo#main /git/kept/\n\
         RUN --mount=type=cache,target=/cache/dir --mount=type=secret,id=none,target=/run/s stat -c '%a %n' /work /work/deep \
         /copied /copied/to /copied/to/file /linked/to /linked/to/file /made /made/file /git/plain /git/plain/plain /git/plain/sub \
         /git/plain/sub/run /git/kept/.git /git/kept/.git/HEAD /git/kept/plain /cache/dir /etc/resolv.conf /etc/hosts > /modes\n"
    );
    let context = lab.context("modes", &[("Dockerfile", &text), ("file", "x")]);
    build(&lab, "modes:1", &context, &[]).ok();
    let modes = shipway_integration::ctr_run(&lab, "docker.io/library/modes:1", &["cat", "/modes"])
        .ok()
        .stdout;
    for line in modes.lines() {
        let (mode, path) = line.split_once(' ').unwrap();
        let is_file = ["file", "plain/plain", "kept/plain", "HEAD", ".conf", "hosts"]
            .iter()
            .any(|f| path.ends_with(f));
        assert_eq!(mode, if is_file { "644" } else { "755" }, "{path}\n{modes}");
    }
    assert_eq!(modes.lines().count(), 19, "{modes}");
}
