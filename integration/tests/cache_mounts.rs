//! Contents of cache mounts that travel from one machine to another.

#![allow(clippy::unwrap_used)]

use shipway_integration::any;
use shipway_testkit::{Lab, Process, free_port, lab_dir, wait_for, which};
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

/// Two programs that are slow without what they kept: one has many small files, as cargo's registry
/// has, and one has files named by what is in them, as Go's build cache has. Both add to it.
const TEXT: &str = r#"FROM busybox AS a
ARG ROUND
COPY cargo go /bin/
RUN --mount=type=cache,target=/root/.cargo cargo
RUN --mount=type=cache,id=go-build,target=/root/.cache,sharing=locked go
RUN --mount=type=cache,id=owned,target=/owned,uid=1000,gid=1000,mode=750 \
    if [ -e /owned/file ]; then echo warm; else echo cold; touch /owned/file; fi > /log/owned; \
    stat -c '%u:%g %a' /owned >> /log/owned
FROM scratch
COPY --from=a /log /
"#;
/// Writes 400 files with attributes, hard and symbolic links, and says what it found.
const CARGO: &str = r#"#!/bin/sh
mkdir -p /log && cd /root/.cargo
if [ -e registry/done ]; then echo warm; else echo cold; fi > /log/cargo
find . -type f -o -type l | sort | xargs -r stat -c '%n %F %a %u:%g %Y %h %N' > /log/cargo.found
find . -type f | sort | xargs -r md5sum >> /log/cargo.found
mkdir -p registry/src && chmod 751 registry
if [ ! -e registry/done ]; then
  for n in $(seq 400); do echo "crate $n $(cat /proc/sys/kernel/random/uuid)" > registry/src/$n; done
  chmod 600 registry/src/7 && chown 5:6 registry/src/8 && touch -d '2020-01-02 03:04:05' registry/src/9
  ln registry/src/1 registry/linked && ln -s ../../outside registry/link
  touch registry/done
fi
echo "$ROUND" > registry/round
find . -type f -o -type l | sort | xargs -r stat -c '%n %F %a %u:%g %Y %h %N' > /log/cargo.left
find . -type f | sort | xargs -r md5sum >> /log/cargo.left
"#;
const GO: &str = r#"#!/bin/sh
cd /root/.cache
if [ -e 00 ]; then echo warm; else echo cold; fi > /log/go
mkdir -p 00 && head -c 6000000 /dev/urandom > new
[ -e 00/first ] || cp new 00/first
head -c 10000 new > "00/$(md5sum < new | cut -c 1-32)" && rm new
find . -type f | sort | xargs md5sum > /log/go.left
"#;

fn context(lab: &Lab) -> PathBuf {
    let context = lab.context("project", &[("Dockerfile", TEXT), ("cargo", CARGO), ("go", GO)]);
    for name in ["cargo", "go"] {
        run_chmod(&context.join(name));
    }
    context
}

fn run_chmod(path: &Path) {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
}

/// A round of work: what the steps said, by name, and what was reported.
struct Round {
    log: BTreeMap<String, String>,
    text: String,
}

impl Round {
    #[track_caller]
    fn of(lab: &Lab, round: &str, more: &[&str]) -> Self {
        let out = lab.dir().join(format!("out-{round}"));
        let output = format!("type=local,dest={}", out.display());
        let argument = format!("ROUND={round}");
        let fixed = ["build", "--progress", "plain", "--output", &output, "--build-arg", &argument];
        let context = context(lab).display().to_string();
        let all = fixed.into_iter().chain(more.iter().copied()).chain([context.as_str()]);
        let text = lab.shipway(all).ok().all();
        let files = fs::read_dir(&out).unwrap().map(Result::unwrap);
        let log = files.map(|file| {
            let name = file.file_name().into_string().unwrap();
            (name, fs::read_to_string(file.path()).unwrap())
        });
        Self { log: log.collect(), text }
    }

    #[track_caller]
    fn is(&self, state: &str) {
        for program in ["cargo", "go"] {
            assert_eq!(self.log[program], format!("{state}\n"), "{program}: {}", self.text);
        }
        assert_eq!(self.log["owned"], format!("{state}\n1000:1000 750\n"), "{}", self.text);
    }

    #[track_caller]
    fn without_warnings(&self) {
        assert!(
            !self.text.contains("not saved") && !self.text.contains("not restored"),
            "{}",
            self.text
        );
    }
}

/// Two machines, each with a containerd of its own.
fn machines() -> [Lab; 2] {
    [Lab::complete(any()), Lab::complete(any())]
}

/// Saves on one machine and restores on another, empty one; gives the first one.
#[track_caller]
fn travels(to: &str, from: &str) -> Lab {
    let [first, second] = machines();
    let cold = Round::of(&first, "1", &["--cache-mount-to", to]);
    cold.is("cold");
    cold.without_warnings();
    assert!(cold.text.contains("saving cache mounts to"), "{}", cold.text);
    let warm = Round::of(&second, "2", &["--cache-mount-from", from]);
    warm.is("warm");
    warm.without_warnings();
    assert_eq!(warm.log["cargo.found"], cold.log["cargo.left"], "{}", warm.text);
    assert!(warm.log["cargo.found"].contains("600 0:0"), "{}", warm.log["cargo.found"]);
    // Another build finds what is here, and restores nothing over it.
    let again = Round::of(&second, "3", &["--cache-mount-from", from]);
    again.is("warm");
    assert!(!again.text.contains("restoring cache mount"), "{}", again.text);
    assert_eq!(again.log["cargo.found"], warm.log["cargo.left"]);
    first
}

#[test]
fn an_empty_machine_has_warm_cache_mounts_out_of_a_registry() {
    let store = Lab::complete(any());
    let place = format!("type=registry,ref={}/mounts:ci", store.registry());
    let first = travels(&format!("{place},key=feature/x"), &format!("{place},key=feature/x"));
    let (_, tags) = store.registry_get("/v2/mounts/tags/list");
    let tags = String::from_utf8(tags).unwrap();
    assert!(tags.contains("\"ci-feature_2fx\""), "{tags}");
    // What is new is little, and all that is sent; under another key, too.
    let sizes = || -> u64 {
        let blobs = store.dir().join("registry/docker/registry/v2/blobs");
        let mut dirs = vec![blobs];
        let mut all = 0;
        while let Some(dir) = dirs.pop() {
            for entry in fs::read_dir(dir).unwrap().map(Result::unwrap) {
                match entry.file_type().unwrap().is_dir() {
                    true => dirs.push(entry.path()),
                    false => all += entry.metadata().unwrap().len(),
                }
            }
        }
        all
    };
    let before = sizes();
    assert!(before > 6_000_000, "{before}");
    let second = Round::of(&first, "9", &["--cache-mount-to", &format!("{place},key=main")]);
    second.is("warm");
    second.without_warnings();
    let added = sizes() - before;
    assert!(added < 300_000, "{added} bytes were added to {before}");
    // Nothing is under this key: the newest of what begins like the second fallback is taken. Only
    // the mount that is asked for.
    let other = Lab::complete(any());
    let from = format!("{place},key=none,fallback=release;ma,id=go-build");
    let fallback = Round::of(&other, "4", &["--cache-mount-from", &from]);
    fallback.without_warnings();
    assert_eq!((&*fallback.log["cargo"], &*fallback.log["go"]), ("cold\n", "warm\n"));
    for line in second.log["go.left"].lines() {
        assert!(fallback.log["go.left"].contains(line), "{line}: {}", fallback.text);
    }
    // A build whose steps are cached asks for nothing.
    let from = "type=registry,ref=127.0.0.1:1/none";
    let cached = Round::of(&other, "4", &["--cache-mount-from", from]);
    cached.without_warnings();
    // A place that does not answer is a warning, and no more.
    let to = ["--cache-mount-from", from, "--cache-mount-to", from];
    other.shipway(["prune", "--all"]).ok();
    let alone = Round::of(&other, "5", &to);
    alone.is("cold");
    assert!(
        alone.text.contains("not restored") && alone.text.contains("not saved"),
        "{}",
        alone.text
    );
    // Nor is an image that has the name.
    let wrong = format!("type=registry,ref={}/library/busybox:latest", store.registry());
    other.shipway(["prune", "--all"]).ok();
    let alone = Round::of(&other, "6", &["--cache-mount-from", &wrong, "--cache-mount-to", &wrong]);
    alone.is("cold");
    assert!(alone.text.contains("there is something else under this name"), "{}", alone.text);
}

#[test]
fn an_empty_machine_has_warm_cache_mounts_out_of_a_directory() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().join("mounts");
    let to = format!("type=local,dest={},key=main,reset=true", dir.display());
    let first = travels(&to, &format!("type=local,src={},key=new,fallback=main", dir.display()));
    let blobs = || fs::read_dir(dir.join("blobs/sha256")).unwrap().count();
    let before = blobs();
    // What nothing names any more does not pile up.
    for round in ["7", "8"] {
        Round::of(&first, round, &["--cache-mount-to", &to]).without_warnings();
    }
    assert!(blobs() <= before + 6, "{} blobs after {before}", blobs());
    let none = dir.join("none");
    first.shipway(["prune", "--all"]).ok();
    let from = format!("type=local,src={}", none.display());
    let cold = Round::of(&first, "9", &["--cache-mount-from", &from]);
    cold.is("cold");
    cold.without_warnings();
}

#[test]
fn an_empty_machine_has_warm_cache_mounts_out_of_a_bucket() {
    let lab = Lab::complete(any());
    let script = lab_dir().join("node/node_modules/s3rver/bin/s3rver.js");
    assert!(script.exists(), "{} is absent; `cargo xtask prepare` fetches it", script.display());
    let node = which("node").expect("node is absent; `cargo xtask prepare` installs it");
    let (port, dir) = (free_port(), lab.dir().join("store"));
    fs::create_dir_all(&dir).unwrap();
    let mut command = Command::new(node);
    command.arg(script).arg("--directory").arg(&dir).args(["--address", "127.0.0.1", "--port"]);
    command.arg(port.to_string()).args(["--configure-bucket", "b"]);
    let mut process = Process::start("store", &mut command, &lab.dir().join("store.log"));
    wait_for("the store to answer", Duration::from_secs(60), || {
        process.alive().unwrap_or_else(|e| panic!("{e}"));
        std::net::TcpStream::connect(("127.0.0.1", port)).map(drop).map_err(|e| e.to_string())
    });
    let place = format!(
        "type=s3,bucket=b,region=us-east-1,endpoint_url=http://127.0.0.1:{port},use_path_style=true,access_key_id=S3RVER,secret_access_key=S3RVER"
    );
    let from = format!("{place},key=feature,fallback=ma");
    travels(&format!("{place},key=main"), &from);
    let wrong = place.replace("secret_access_key=S3RVER", "secret_access_key=hidden-secret");
    let wrong = wrong.replace("access_key_id=S3RVER", "access_key_id=nobody");
    let cold = Round::of(&lab, "5", &["--cache-mount-from", &wrong, "--cache-mount-to", &wrong]);
    cold.is("cold");
    assert!(cold.text.contains("not saved"), "{}", cold.text);
    assert!(!cold.text.contains("hidden-secret"), "{}", cold.text);
}
