//! `shipway push`, `tag`, `save` and `load`: images in a real containerd's store.

#![allow(clippy::unwrap_used)]

use serde_json::Value;
use shipway_integration::{Image, any, blob, ctr_run, on_each, remove_everything};
use shipway_oci::Digest;
use shipway_testkit::{BaseImage, Finished, Flavour, Lab, Network, SlowNetwork, run};
use std::{
    io::Read as _,
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

/// Our client in the namespace `namespace`.
fn command_in(lab: &Lab, namespace: &str, arguments: &[&str]) -> Command {
    let mut command = lab.shipway_command();
    command
        .args(arguments)
        .arg("--containerd-addr")
        .arg(lab.containerd_socket())
        .args(["--namespace", namespace]);
    command
}

#[track_caller]
fn shipway(lab: &Lab, arguments: &[&str]) -> Finished {
    run(&mut command_in(lab, lab.namespace(), arguments))
}

/// An image of this machine's platform with provenance, in the store as `name`.
#[track_caller]
fn build_attested(lab: &Lab, name: &str) {
    let base = format!("FROM {}/library/busybox\nCOPY file /\n", lab.registry());
    let context = lab.context("attested", &[("Dockerfile", &base), ("file", "hello\n")]);
    let context = context.to_string_lossy();
    lab.shipway(["build", "--attest", "type=provenance", "-t", name, &context]).ok();
}

/// The lease that keeps what is being copied is gone.
#[track_caller]
fn keeps_nothing(lab: &Lab) {
    let leases = lab.leftovers().leases;
    assert!(!leases.iter().any(|lease| lease.contains("shipway-convert-")), "{leases:?}");
}

#[track_caller]
fn pushed(lab: &Lab, repository: &str, reference: &str) -> (String, Value) {
    let (status, bytes) = lab.registry_get(&format!("/v2/{repository}/manifests/{reference}"));
    assert_eq!(status, 200, "{repository}:{reference}");
    (Digest::of(&bytes).to_string(), serde_json::from_slice(&bytes).unwrap())
}

#[track_caller]
fn are_tagged_pushed_saved_and_loaded(flavour: Flavour) {
    let lab = Lab::complete(flavour);
    build_attested(&lab, "app:1");
    let built = Image::of(&lab, "docker.io/library/app:1");
    let name = format!("{}/pushed:1", lab.registry());
    shipway(&lab, &["tag", "app:1", &name]).ok();
    let done = shipway(&lab, &["push", &name, "--progress", "plain"]).ok();
    assert_eq!(done.stdout, format!("{}\n", built.target), "{}", done.stderr);
    assert!(done.stderr.contains("copying sha256:"), "{}", done.stderr);
    let (digest, index) = pushed(&lab, "pushed", "1");
    assert_eq!(digest, built.target);
    let said = index["manifests"][1]["digest"].as_str().unwrap();
    assert_eq!(pushed(&lab, "pushed", said).1["layers"].as_array().unwrap().len(), 1);
    // Again, with nothing to do; and one platform only.
    shipway(&lab, &["push", &name]).ok();
    let few = shipway(&lab, &["push", &name, "--platform", "linux/s390x"]).failed().stderr;
    assert!(few.contains("none of the manifests match") && few.contains("hint: there is"), "{few}");

    let (docker, oci) = (lab.dir().join("docker.tar"), lab.dir().join("oci.tar.gz"));
    let text = |path: &Path| path.to_string_lossy().into_owned();
    shipway(&lab, &["save", "-o", &text(&docker), "app:1", &name]).ok();
    shipway(&lab, &["save", "-o", &text(&oci), "--format", "oci-gzip", "app:1"]).ok();
    let members = run(Command::new("tar").arg("-tf").arg(&docker)).ok().stdout;
    assert!(members.contains("manifest.json") && members.contains("index.json"), "{members}");

    // Loaded where nothing else is, by us and by others.
    for (namespace, archive) in [("one", &docker), ("two", &oci)] {
        let done = run(&mut command_in(&lab, namespace, &["load", "-i", &text(archive)])).ok();
        assert!(done.stdout.contains("Loaded image: docker.io/library/app:1\n"), "{}", done.stdout);
        let list = lab.ctr_in(namespace, ["images", "list"]).ok().stdout;
        assert!(list.contains(&built.target), "{list}");
        let id = format!("loaded-{namespace}-{}", std::process::id());
        let run = ["run", "--rm", "docker.io/library/app:1", &id, "cat", "/file"];
        lab.ctr_in(namespace, ["images", "unpack", "docker.io/library/app:1"]);
        assert_eq!(lab.ctr_in(namespace, run).ok().stdout, "hello\n");
    }
    let names = lab.ctr_in("one", ["images", "list", "--quiet"]).ok().stdout;
    assert_eq!(names.lines().count(), 2, "{names}");
    lab.ctr_in("three", ["images", "import", &text(&docker)]).ok();
    let theirs = lab.ctr_in("three", ["images", "list"]).ok().stdout;
    assert!(theirs.contains(&built.target), "{theirs}");
    let exported = lab.dir().join("exported.tar");
    lab.ctr(["images", "export", &text(&exported), "docker.io/library/app:1"]).ok();
    run(&mut command_in(&lab, "four", &["load", "-i", &text(&exported)])).ok();
    // Through a pipe.
    let mut save = command_in(&lab, lab.namespace(), &["save", "app:1", "--progress", "none"]);
    let mut save = save.stdout(Stdio::piped()).spawn().unwrap();
    let mut load = command_in(&lab, "five", &["load", "--tag", "other:2"]);
    let load = load.stdin(save.stdout.take().unwrap()).output().unwrap();
    assert!(load.status.success(), "{}", String::from_utf8_lossy(&load.stderr));
    assert!(save.wait().unwrap().success());
    let list = lab.ctr_in("five", ["images", "list", "--quiet"]).ok().stdout;
    assert_eq!(list, "docker.io/library/other:2\n");
    keeps_nothing(&lab);
}

#[test]
fn images_are_tagged_pushed_saved_and_loaded() {
    on_each(are_tagged_pushed_saved_and_loaded);
}

/// What skopeo makes of an image, as Docker wrote it before it wrote layouts.
#[test]
fn older_archives_are_loaded() {
    let lab = Lab::complete(any());
    let archive = lab.dir().join("legacy.tar");
    let from = format!("docker://{}/library/busybox:latest", lab.registry());
    let to = format!("docker-archive:{}:legacy:1", archive.display());
    run(Command::new("skopeo").args(["copy", "--src-tls-verify=false", &from, &to])).ok();
    let archive = archive.to_string_lossy().into_owned();
    let done = shipway(&lab, &["load", "-i", &archive]).ok();
    assert_eq!(done.stdout, "Loaded image: docker.io/library/legacy:1\n");
    lab.ctr(["images", "unpack", "docker.io/library/legacy:1"]);
    let said = ctr_run(&lab, "docker.io/library/legacy:1", &["echo", "runs"]).ok();
    assert_eq!(said.stdout, "runs\n");
}

/// Removes the layers of `image` from the store, as where a remote snapshotter serves them.
#[track_caller]
fn hollow(lab: &Lab, image: &str) -> Vec<String> {
    let layers = Image::of(lab, image).layers();
    lab.ctr(["content", "rm"].into_iter().chain(layers.iter().map(String::as_str))).ok();
    layers
}

#[test]
fn what_is_not_in_the_store_is_streamed_from_where_it_came() {
    let lab = Lab::complete(any());
    let base = format!("{}/library/busybox:latest", lab.registry());
    lab.ctr(["images", "pull", "--plain-http", &base]).ok();
    let layers = hollow(&lab, &base);
    let name = format!("{}/moved:1", lab.registry());
    shipway(&lab, &["tag", &base, &name]).ok();
    shipway(&lab, &["push", &name, "--progress", "plain"]).ok();
    let (digest, _) = pushed(&lab, "moved", "1");
    assert_eq!(digest, Image::of(&lab, &base).target);
    // Within the registry it is mounted; into an archive it is fetched.
    let archive = lab.dir().join("whole.tar");
    let text = archive.to_string_lossy().into_owned();
    let done = shipway(&lab, &["save", "-o", &text, &base, "--progress", "plain"]).ok();
    assert!(done.stderr.contains("is not in the store: streaming it from"), "{}", done.stderr);
    let members = run(Command::new("tar").arg("-tf").arg(&archive)).ok().stdout;
    assert!(members.contains(layers[0].strip_prefix("sha256:").unwrap()), "{members}");

    // Without a label that says from where, it is said how to get it.
    run(&mut command_in(&lab, "bare", &["load", "-i", &text])).ok();
    lab.ctr_in("bare", ["content", "rm", &layers[0]]).ok();
    let save = ["save", "-o", "/dev/null", &base];
    let failed = run(&mut command_in(&lab, "bare", &save)).failed().stderr;
    assert!(failed.contains("no label says where it is"), "{failed}");
    assert!(failed.contains("hint: fetch all of it"), "{failed}");
    let absent = shipway(&lab, &["push", "nothing:1"]).failed().stderr;
    assert!(absent.contains("containerd has no image docker.io/library/nothing:1"), "{absent}");
    assert!(absent.contains("--namespace"), "{absent}");
}

#[test]
fn bad_archives_are_refused_and_leave_nothing() {
    let lab = Lab::complete(any());
    build_attested(&lab, "app:1");
    let dir = lab.dir().join("bad");
    std::fs::create_dir(&dir).unwrap();
    let archive = dir.join("app.tar");
    let text = |path: &Path| path.to_string_lossy().into_owned();
    shipway(&lab, &["save", "-o", &text(&archive), "app:1"]).ok();
    let layer = Image::of(&lab, "docker.io/library/app:1").layers().pop().unwrap();
    // Namespaces share blobs, and one that is there is not read again.
    remove_everything(&lab);
    let load = |file: &Path| {
        run(&mut command_in(&lab, "bad", &["load", "-i", &text(file)])).failed().stderr
    };
    // A byte of the layer that the build added.
    let mut bytes = std::fs::read(&archive).unwrap();
    let path = format!("blobs/sha256/{}", layer.strip_prefix("sha256:").unwrap());
    let at = bytes.windows(path.len()).position(|w| w == path.as_bytes()).unwrap();
    bytes[at + 512 + 20] ^= 1;
    let flipped = dir.join("flipped.tar");
    std::fs::write(&flipped, &bytes).unwrap();
    assert!(load(&flipped).contains("is damaged in the archive"));
    let cut = dir.join("cut.tar");
    std::fs::write(&cut, &bytes[..bytes.len() / 2]).unwrap();
    assert!(load(&cut).contains("read the archive"));
    let other = dir.join("other.tar");
    std::fs::write(dir.join("file"), "x").unwrap();
    run(Command::new("tar").arg("-cf").arg(&other).arg("-C").arg(&dir).arg("file")).ok();
    let refused = load(&other);
    assert!(
        refused.contains("not an archive of images") && refused.contains("hint: "),
        "{refused}"
    );
    assert_eq!(lab.ctr_in("bad", ["images", "list", "--quiet"]).ok().stdout, "");
    assert_eq!(lab.ctr_in("bad", ["leases", "list", "--quiet"]).ok().stdout, "");
    let left: Vec<_> = std::fs::read_dir(&dir).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left.len(), 5, "{left:?}");
}

/// Ctrl-C ends a copy in the middle.
#[test]
fn an_interrupted_save_leaves_no_file() {
    let lab = Lab::complete(any());
    let slow = SlowNetwork::start(
        &lab.registry(),
        Network { latency: Duration::ZERO, bandwidth: 64 << 10 },
    );
    // An image whose layer has to come over a slow line.
    let base = BaseImage::busybox();
    base.push(&lab.registry(), "slow", "1");
    let name = format!("{}/slow:1", lab.registry());
    lab.ctr(["images", "pull", "--plain-http", &name]).ok();
    let image = Image::of(&lab, &name);
    hollow(&lab, &name);
    let label = "containerd.io/distribution.source.127.0.0.1";
    let there = format!("containerd.io/distribution.source.{}", slow.address());
    for digest in [&image.digest, &image.target] {
        lab.ctr(["content", "label", digest, &format!("{label}="), &format!("{there}=slow")]).ok();
    }
    assert!(blob(&lab, &image.digest)["layers"].is_array());
    let dir = lab.dir().join("interrupted");
    std::fs::create_dir(&dir).unwrap();
    let out = dir.join("image.tar").to_string_lossy().into_owned();
    let mut command =
        command_in(&lab, lab.namespace(), &["save", "-o", &out, &name, "--progress", "plain"]);
    let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
    let mut said = child.stderr.take().unwrap();
    let (mut text, mut byte) = (Vec::new(), [0]);
    while !String::from_utf8_lossy(&text).contains("streaming it from") {
        assert_eq!(said.read(&mut byte).unwrap(), 1, "{}", String::from_utf8_lossy(&text));
        text.push(byte[0]);
    }
    assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 1, "there is a file on its way");
    run(Command::new("kill").args(["-INT", &child.id().to_string()])).ok();
    assert!(!child.wait().unwrap().success());
    assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 0);
    keeps_nothing(&lab);
}
