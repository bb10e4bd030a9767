//! Images written with tables of contents: there and runnable at once, whole for whoever pulls them
//! as a whole, and lazy for our snapshotter and for other programs.

#![allow(clippy::unwrap_used)]

use serde_json::Value;
use shipway_estargz::{PODMAN_POSITION, STARGZ_POSITION, TOC_DIGEST, UNCOMPRESSED_SIZE};
use shipway_integration::{
    Image, any,
    cri::{Cri, wire},
    ctr_run,
    lazy::noise,
    on_each, remove_everything,
};
use shipway_oci::Digest;
use shipway_testkit::{
    BaseImage, Finished, Flavour, Lab, LabOptions, Network, SlowNetwork, run, wait_for, which,
};
use std::{
    path::PathBuf,
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

/// Files of the large layer, and bytes of each.
const FILES: usize = 32;
const SIZE: usize = 1 << 20;
const NETWORK: Network = Network { latency: Duration::from_millis(2), bandwidth: 60 << 20 };

/// A context with [`FILES`] files that do not shrink, and a Dockerfile that puts them on busybox.
fn context(lab: &Lab) -> PathBuf {
    let dir = lab.context(
        "lazy",
        &[(
            "Dockerfile",
            "FROM busybox\nCOPY data /data\nRUN echo built > /p\nCMD [\"cat\", \"/p\"]\n",
        )],
    );
    std::fs::create_dir_all(dir.join("data")).unwrap();
    for n in 0..FILES {
        std::fs::write(dir.join(format!("data/{n}")), noise(n, SIZE)).unwrap();
    }
    dir
}

/// Builds with an image exporter that has more attributes.
#[track_caller]
fn build(lab: &Lab, name: &str, attributes: &str, more: &[&str]) -> Finished {
    let output = format!("type=image,name={name},{attributes}");
    let context = context(lab).to_string_lossy().into_owned();
    let fixed = ["build", "--progress", "plain", "--output", &output];
    lab.shipway(fixed.into_iter().chain(more.iter().copied()).chain([&*context]))
}

fn layers(manifest: &Value) -> &Vec<Value> {
    manifest["layers"].as_array().unwrap()
}

/// Whether each layer has this annotation.
fn have(manifest: &Value, annotation: &str) -> Vec<bool> {
    layers(manifest).iter().map(|l| l["annotations"][annotation].is_string()).collect()
}

/// A script that says what all files of a container are.
const ALL: &str = "find / -xdev -type f | grep -v -e ^/etc -e ^/dev | sort | xargs sha256sum";

#[test]
fn an_image_with_tables_is_there_at_once_and_whole_for_everybody() {
    on_each(|flavour| {
        let lab = Lab::complete(flavour);
        let name = format!("{}/lazy:1", lab.registry());
        let attributes = "push=true,compression=estargz,force-compression=true";
        build(&lab, &name, attributes, &[]).ok();
        let image = Image::of(&lab, &name);
        assert_eq!(have(&image.manifest, TOC_DIGEST), [true; 3]);
        assert_eq!(have(&image.manifest, UNCOMPRESSED_SIZE), [true; 3]);
        // What the config says of the layers is what they unpack to, under the names for that.
        for (layer, diff_id) in layers(&image.manifest)
            .iter()
            .zip(image.config["rootfs"]["diff_ids"].as_array().unwrap())
        {
            let (_, blob) =
                lab.registry_get(&format!("/v2/lazy/blobs/{}", layer["digest"].as_str().unwrap()));
            let path = lab.dir().join("layer.gz");
            std::fs::write(&path, blob).unwrap();
            let tar = Command::new("gzip").arg("-dc").arg(&path).output().unwrap().stdout;
            assert_eq!(Digest::of(&tar).to_string(), diff_id.as_str().unwrap());
            let size = layer["annotations"][UNCOMPRESSED_SIZE].as_str().unwrap();
            assert_eq!(tar.len().to_string(), size);
        }
        let snapshots = lab.ctr(["snapshots", "list"]).ok().stdout;
        for name in image.chain() {
            assert!(snapshots.contains(&name), "{name} is missing:\n{snapshots}");
        }
        assert_eq!(ctr_run(&lab, &name, &[]).ok().stdout, "built\n");
        let all = ctr_run(&lab, &name, &["sh", "-c", ALL]).ok().stdout;
        assert!(all.contains("/data/31") && !all.contains("stargz"), "{all}");
        // The same build with ordinary layers gives the same files, and the states are the same.
        let plain = format!("{}/plain:1", lab.registry());
        let log = build(&lab, &plain, "compression=gzip,force-compression=true", &[]).ok().all();
        assert!(log.contains("CACHED"), "{log}");
        assert_ne!(Image::of(&lab, &plain).chain(), image.chain());
        assert_eq!(ctr_run(&lab, &plain, &["sh", "-c", ALL]).ok().stdout, all);
        // A plain containerd takes the pushed layers for ordinary ones.
        remove_everything(&lab);
        lab.ctr(["images", "pull", "--plain-http", &name]).ok();
        assert_eq!(ctr_run(&lab, &name, &["sh", "-c", ALL]).ok().stdout, all);
    });
}

#[test]
fn what_is_there_stays_unless_it_is_forced() {
    let lab = Lab::complete(any());
    let name = format!("{}/lazy:1", lab.registry());
    build(&lab, &name, "compression=zstdchunked,compression-chunk-size=65536", &[]).ok();
    let image = Image::of(&lab, &name);
    assert_eq!(have(&image.manifest, TOC_DIGEST), [false, true, true], "the base is as it was");
    assert_eq!(have(&image.manifest, STARGZ_POSITION), [false, true, true]);
    let podman = format!("{}/podman:1", lab.registry());
    build(&lab, &podman, "compression=zstd:chunked,force-compression=true", &[]).ok();
    let other = Image::of(&lab, &podman);
    assert_eq!(have(&other.manifest, PODMAN_POSITION), [true; 3]);
    assert_eq!(have(&other.manifest, TOC_DIGEST), [false; 3]);
    assert_eq!(other.chain(), image.chain(), "zstd:chunked keeps the tar");
    assert_eq!(ctr_run(&lab, &podman, &[]).ok().stdout, "built\n");
    let refused =
        build(&lab, &name, "compression=estargz,oci-mediatypes=false", &[]).failed().all();
    assert!(refused.contains("conflicts with \"oci-mediatypes=false\""), "{refused}");
}

#[test]
fn caches_have_tables_and_are_used() {
    let lab = Lab::complete(any());
    let name = format!("{}/lazy:1", lab.registry());
    let cache = format!("type=registry,ref={}/lazy/cache:1", lab.registry());
    let to = format!("{cache},mode=max,compression=estargz,force-compression=true");
    let inline = "push=true,compression=estargz";
    build(&lab, &name, inline, &["--cache-to", &to, "--cache-to", "type=inline"]).ok();
    let (_, manifest) = lab.registry_get("/v2/lazy/cache/manifests/1");
    let manifest: Value = serde_json::from_slice(&manifest).unwrap();
    assert_eq!(have(&manifest, TOC_DIGEST), [true; 3]);
    for from in [cache, format!("type=registry,ref={name}")] {
        remove_everything(&lab);
        let again = format!("{}/again:1", lab.registry());
        let log = build(&lab, &again, "compression=gzip", &["--cache-from", &from]).ok().all();
        assert_eq!(log.matches("CACHED").count(), 3, "base, COPY and RUN of {from}\n{log}");
        assert_eq!(have(&Image::of(&lab, &again).manifest, TOC_DIGEST).last(), Some(&true));
        assert_eq!(ctr_run(&lab, &again, &[]).ok().stdout, "built\n");
    }
}

/// A command in a container of the image. The runtime's names are those of all labs.
fn words(image: &str, script: &str) -> Vec<String> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let id = format!("written-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    ["run", "--rm", "--snapshotter", "shipway", image, &id, "sh", "-c", script]
        .map(str::to_owned)
        .to_vec()
}

/// A lab with everything, whose snapshotter fetches what is asked for and nothing else.
fn lazy_lab(flavour: Flavour) -> Lab {
    let mut options = LabOptions::new(flavour);
    options.snapshotter = true;
    options.namespace = "k8s.io".into();
    options.sandbox = Some("docker.io/library/sandbox:1".into());
    options.lazy_config = "background = false\n".into();
    let mut lab = Lab::start(options);
    lab.start_registry();
    BaseImage::busybox().push(&lab.registry(), "library/busybox", "latest");
    lab.start_daemon();
    lab
}

#[track_caller]
fn is_lazy(flavour: Flavour, compression: &str) {
    let lab = lazy_lab(flavour);
    let name = format!("{}/lazy:1", lab.registry());
    build(&lab, &name, &format!("push=true,compression={compression},force-compression=true"), &[])
        .ok();
    let all = ctr_run(&lab, &name, &["sh", "-c", ALL]).ok().stdout;
    remove_everything(&lab);
    assert_eq!(lab.ctr(["content", "list", "--quiet"]).ok().lines().count(), 0);

    let slow = SlowNetwork::start(&lab.registry(), NETWORK);
    let image = format!("{}/lazy:1", slow.address());
    let id = Some(wire::Id { id: image.clone() });
    let _: wire::Id = Cri::of(&lab).call("PullImage", wire::PullImage { image: id });
    let pulled = slow.bytes();
    assert!(pulled < 2 << 20, "{pulled} bytes were fetched by the pull");
    let one = lab.ctr(words(&image, "sha256sum /data/7")).ok().stdout;
    assert!(all.contains(&one), "{one}");
    let fetched = slow.bytes() - pulled;
    assert!(fetched < (FILES / 2 * SIZE) as u64, "{fetched} bytes were fetched for one file");
    assert_eq!(lab.ctr(words(&image, ALL)).ok().stdout, all, "file by file the same");
    let status = run(lab.snapshotter_command().args(["status", "--json"])).ok();
    let status: Value = serde_json::from_str(&status.stdout).unwrap();
    assert_eq!(status["lazy"]["layers"].as_array().unwrap().len(), 3, "{status}");

    let Some(remote) = which("ctr-remote") else {
        eprintln!("ctr-remote is absent: only CRI pulled the image");
        return;
    };
    let mut command = Command::new(remote);
    command.env("PATH", lab.path()).arg("--address").arg(lab.containerd_socket());
    let pull = ["images", "rpull", "--plain-http", "--snapshotter", "shipway", &image];
    run(command.args(["--namespace", "other"]).args(pull)).ok();
    assert_eq!(lab.ctr_in("other", words(&image, ALL)).ok().stdout, all);
}

#[test]
fn an_image_written_lazy_is_pulled_lazily() {
    on_each(|flavour| is_lazy(flavour, "estargz"));
}

#[test]
fn zstd_chunked_written_lazy_is_pulled_lazily() {
    is_lazy(any(), "zstdchunked");
}

/// The first names in the tar of each layer of `lazy:1`, as tar lists them.
#[track_caller]
fn first_names(lab: &Lab, count: usize) -> Vec<Vec<String>> {
    let (_, manifest) = lab.registry_get("/v2/lazy/manifests/1");
    let mut manifest: Value = serde_json::from_slice(&manifest).unwrap();
    if let Some(image) = manifest["manifests"][0]["digest"].as_str() {
        let (_, bytes) = lab.registry_get(&format!("/v2/lazy/manifests/{image}"));
        manifest = serde_json::from_slice(&bytes).unwrap();
    }
    let names = |layer: &Value| {
        let digest = layer["digest"].as_str().unwrap();
        let (_, blob) = lab.registry_get(&format!("/v2/lazy/blobs/{digest}"));
        let path = lab.dir().join("listed");
        std::fs::write(&path, blob).unwrap();
        let zstd = layer["mediaType"].as_str().unwrap().ends_with("zstd");
        let how = if zstd { "--zstd" } else { "--gzip" };
        let list = run(Command::new("tar").args([how, "-tf"]).arg(&path)).ok().stdout;
        list.lines().take(count).map(str::to_owned).collect()
    };
    layers(&manifest).iter().map(names).collect()
}

#[test]
fn what_the_result_reads_comes_first_and_is_fetched_at_once() {
    let lab = lazy_lab(any());
    let name = format!("{}/lazy:1", lab.registry());
    // It never ends, and has been seen by then.
    let command = "cat /data/7 /data/3 /data/7 > /dev/null; sleep 600";
    let attributes = format!(
        "push=true,compression=estargz,force-compression=true,optimize={command},optimize-time=4"
    );
    build(&lab, &name, &attributes, &[]).ok();
    let names = first_names(&lab, 50);
    assert_eq!(names[1][..4], ["data/", "data/7", "data/3", ".prefetch.landmark"]);
    assert_eq!(names[2][0], ".no.prefetch.landmark");
    assert!(names[0].iter().any(|name| name == ".prefetch.landmark"), "busybox: {names:?}");
    let all = ctr_run(&lab, &name, &["sh", "-c", ALL]).ok().stdout;
    assert_eq!(all.lines().filter(|line| line.contains("/data/")).count(), FILES);
    let digest = Image::of(&lab, &name).target;
    build(&lab, &name, &attributes, &[]).ok();
    assert_eq!(Image::of(&lab, &name).target, digest, "the same order gives the same bytes");

    let failing = "compression=estargz,optimize=echo no such thing >&2; exit 3";
    let failed = build(&lab, &name, failing, &[]).failed().all();
    assert!(failed.contains("ended with exit code 3: no such thing"), "{failed}");

    // Nobody reads anything, and what will be read is there.
    remove_everything(&lab);
    let slow = SlowNetwork::start(&lab.registry(), NETWORK);
    let image = format!("{}/lazy:1", slow.address());
    let id = Some(wire::Id { id: image.clone() });
    let _: wire::Id = Cri::of(&lab).call("PullImage", wire::PullImage { image: id });
    let verified = || {
        let status = run(lab.snapshotter_command().args(["status", "--json"])).ok();
        let status: Value = serde_json::from_str(&status.stdout).unwrap();
        let layers = status["lazy"]["layers"].as_array().unwrap().clone();
        let large = layers.into_iter().max_by_key(|layer| layer["data"].as_u64()).unwrap();
        large["verified"].as_u64().unwrap()
    };
    let wanted = 2 * SIZE as u64;
    wait_for("what will be read to be fetched", Duration::from_secs(30), || match verified() {
        bytes if bytes >= wanted => Ok(()),
        bytes => Err(bytes.to_string()),
    });
    assert!(verified() < wanted + SIZE as u64, "{} bytes were fetched", verified());
    wait_for("the network to be quiet", Duration::from_secs(30), || {
        let before = slow.bytes();
        std::thread::park_timeout(Duration::from_millis(300));
        if slow.bytes() == before { Ok(()) } else { Err(slow.bytes().to_string()) }
    });
    slow.set_down(true);
    let read = lab.ctr(words(&image, "sha256sum /data/7 /data/3")).ok().stdout;
    assert!(read.lines().count() == 2 && read.lines().all(|line| all.contains(line)), "{read}");
}

#[test]
fn what_later_steps_read_comes_first() {
    let lab = lazy_lab(any());
    let name = format!("{}/lazy:1", lab.registry());
    let dir = context(&lab);
    let steps = "FROM busybox\nCOPY data /data\nRUN cat /data/9 /data/2 > /p\nRUN cat /data/30 /p > /dev/null\n";
    std::fs::write(dir.join("Dockerfile"), steps).unwrap();
    let output =
        format!("type=image,name={name},push=true,compression=zstdchunked,optimize-steps=true");
    let dir = dir.to_string_lossy();
    lab.shipway(["build", "--progress", "plain", "--output", &output, &dir]).ok();
    let image = Image::of(&lab, &name);
    assert_eq!(have(&image.manifest, STARGZ_POSITION), [false, true, true, true]);
    let listed = first_names(&lab, 5);
    assert_eq!(listed[1], ["data/", "data/9", "data/2", "data/30", ".prefetch.landmark"]);
    // What a step writes itself is not what will be read of its layer.
    assert_eq!(listed[2], ["p", ".prefetch.landmark"]);
    assert_eq!(listed[3], [".no.prefetch.landmark"]);
}

/// `shipway convert`; gives the digest that it prints.
#[track_caller]
fn convert(lab: &Lab, arguments: &[&str]) -> String {
    let socket = lab.containerd_socket().to_string_lossy().into_owned();
    let fixed = ["convert", "--containerd-addr", &socket, "--namespace", "default"];
    let done = lab.shipway(fixed.into_iter().chain(arguments.iter().copied())).ok();
    assert!(done.stderr.contains("became"), "{}", done.stderr);
    done.stdout.trim().to_owned()
}

#[test]
fn images_that_exist_are_converted_in_registries_and_in_the_store() {
    let mut lab = Lab::on(any());
    lab.start_registry();
    BaseImage::busybox().push(&lab.registry(), "plain", "1");
    let name = |name: &str| format!("{}/{name}", lab.registry());
    let files = |image: &str| ctr_run(&lab, image, &["sh", "-c", ALL]).ok().stdout;
    lab.ctr(["images", "pull", "--plain-http", &name("plain:1")]).ok();
    let plain = files(&name("plain:1"));

    // From registry to registry.
    let digest = convert(&lab, &[&name("plain:1"), &name("lazy:1")]);
    let (status, root) = lab.registry_get("/v2/lazy/manifests/1");
    assert_eq!((status, Digest::of(&root).to_string()), (200, digest.clone()));
    lab.ctr(["images", "pull", "--plain-http", &name("lazy:1")]).ok();
    let image = Image::of(&lab, &name("lazy:1"));
    assert_eq!(image.target, digest);
    assert_eq!(have(&image.manifest, TOC_DIGEST), [true]);
    assert_eq!(files(&name("lazy:1")), plain);
    // What was converted is as the option says, and converting it once more changes nothing.
    assert_eq!(convert(&lab, &[&name("lazy:1"), &name("copy:1")]), digest);

    // From the registry into the store, and within it.
    let stored = "containerd:example.org/chunked:1";
    convert(&lab, &["--compression", "zstdchunked", &name("plain:1"), stored]);
    let image = Image::of(&lab, "example.org/chunked:1");
    assert_eq!(have(&image.manifest, STARGZ_POSITION), [true]);
    assert_eq!(files("example.org/chunked:1"), plain);
    let list = lab.dir().join("first");
    std::fs::write(&list, "/bin/busybox\n/not/there\n").unwrap();
    let list = list.to_string_lossy();
    let ordered = "containerd:example.org/ordered:1";
    convert(
        &lab,
        &["--read-first", &list, "--platform", "linux/amd64,linux/arm64", stored, ordered],
    );
    let image = Image::of(&lab, "example.org/ordered:1");
    assert_eq!(have(&image.manifest, TOC_DIGEST), [true]);
    let found = files("example.org/ordered:1");
    let without = |text: &str| {
        text.lines()
            .filter(|l| !l.contains(".prefetch.landmark"))
            .map(|l| format!("{l}\n"))
            .collect::<String>()
    };
    assert!(found.contains("  /.prefetch.landmark"), "{found}");
    assert_eq!(without(&found), plain);
    assert!(lab.leftovers().leases.is_empty(), "{:?}", lab.leftovers().leases);

    // From the store to the registry.
    let digest = convert(&lab, &[ordered, &name("ordered:1")]);
    assert_eq!(lab.registry_get(&format!("/v2/ordered/manifests/{digest}")).0, 200);

    let refused = |arguments: &[&str]| {
        let failed = lab.shipway(["convert"].iter().chain(arguments)).failed();
        failed.stderr
    };
    assert!(refused(&[&name("absent:1"), &name("x:1")]).contains("not found"));
    let by_digest = format!("{}@{}", name("x"), Digest::of("x"));
    assert!(refused(&[&name("plain:1"), &by_digest]).contains("hint: name a tag"));
    let of = ["--read-first", &*list, "--compression", "gzip", &name("plain:1"), &name("x:1")];
    assert!(refused(&of).contains("is of no use"));
}
