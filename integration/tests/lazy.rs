//! Images that run while they are fetched: pulls over CRI, containers, kills and outages, with a
//! slow network between.

#![allow(clippy::unwrap_used)]

use serde_json::Value;
use shipway_estargz::Output;
use shipway_integration::{
    any, collect_garbage,
    cri::{Cri, wire},
    lazy::{noise, push_noise},
    on_all, on_each,
};
use shipway_testkit::{
    BaseImage, FaultyRegistry, Flavour, Lab, LabOptions, Layer, Network, RegistryFault,
    SlowNetwork, run, wait_for, which,
};
use std::{
    fmt::Write as _,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

/// Files of the large layer.
pub const FILES: usize = 64;
/// Bytes of each.
const SIZE: usize = 1 << 20;

pub fn lab(flavour: Flavour, lazy: &str) -> Lab {
    lab_with(flavour, "", lazy)
}

/// With more settings outside of the table `lazy`.
fn lab_with(flavour: Flavour, more: &str, lazy: &str) -> Lab {
    let mut options = LabOptions::new(flavour);
    options.snapshotter_config = more.into();
    options.snapshotter = true;
    options.namespace = "k8s.io".into();
    options.sandbox = Some("docker.io/library/sandbox:1".into());
    options.lazy_config = lazy.into();
    let mut lab = Lab::start(options);
    lab.start_registry();
    lab
}

pub fn sum(n: usize) -> String {
    shipway_oci::Digest::of(noise(n, SIZE)).hex()
}

/// busybox, and a layer of [`FILES`] files, both with tables of contents.
pub fn push(registry: &str, output: Output) {
    push_noise(registry, FILES, SIZE, output);
}

pub fn pull(lab: &Lab, image: &str) {
    let cri = Cri::of(lab);
    let image = Some(wire::Id { id: image.into() });
    let _: wire::Id = cri.call("PullImage", wire::PullImage { image });
}

pub fn status(lab: &Lab) -> Value {
    let done = run(lab.snapshotter_command().args(["status", "--json"])).ok();
    serde_json::from_str(&done.stdout).unwrap()
}

/// A command in a container of the image. The runtime's names are those of all labs.
pub fn words(image: &str, script: &str) -> Vec<String> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let id = format!("lazy-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    ["run", "--rm", "--snapshotter", "shipway", image, &id, "sh", "-c", script]
        .map(str::to_owned)
        .to_vec()
}

pub fn blobs(lab: &Lab) -> usize {
    lab.ctr(["content", "list", "--quiet"]).ok().lines().count()
}

/// Waits until all layers are whole, and mounted as they are then.
pub fn until_whole(lab: &Lab, mounted: &str) {
    wait_for("all layers to be whole", Duration::from_secs(60), || {
        let status = status(lab);
        let layers = status["lazy"]["layers"].as_array().unwrap().clone();
        let local = |l: &Value| l["state"] == "whole" && l["mounted"] == mounted;
        if layers.len() == 2 && layers.iter().all(local) { Ok(()) } else { Err(status.to_string()) }
    });
}

/// A script that reads all files, and what it says.
pub fn all() -> (String, String) {
    let mut want = String::new();
    for n in 0..FILES {
        writeln!(want, "{}  /data/{n}", sum(n)).unwrap();
    }
    (format!("for n in $(seq 0 {}); do sha256sum /data/$n; done", FILES - 1), want)
}

/// Wrong bytes of a registry are asked for again: of the image `name` of that of `lab`, pulled
/// after `before` had its way with it.
#[track_caller]
pub fn wrong_bytes_are_asked_for_again(lab: &Lab, name: &str, before: impl FnOnce(&str)) {
    let wrong = Arc::new(AtomicU32::new(0));
    let fault = RegistryFault::CorruptSome(wrong.clone());
    let registry = FaultyRegistry::start(&lab.registry(), "/blobs/", fault);
    let image = format!("{}/{name}:1", registry.address());
    before(&image);
    pull(lab, &image);
    wrong.store(2, Ordering::Relaxed);
    let (script, want) = all();
    assert_eq!(lab.ctr(words(&image, &script)).ok().stdout, want);
    assert_eq!(wrong.load(Ordering::Relaxed), 0);
    assert!(status(lab)["lazy"]["totals"]["wrong"].as_u64().unwrap() >= 1, "{}", status(lab));
}

pub const FAST: Network = Network { latency: Duration::from_millis(2), bandwidth: 60 << 20 };

/// Settings that have the kernel read layers as trees in FUSE.
const TREE: &str = "tier = \"fuse-tree\"\n";

#[track_caller]
fn runs_before_it_is_there(flavour: Flavour, output: Output, more: &str) {
    let lab = lab(flavour, &format!("background = false\n{more}"));
    push(&lab.registry(), output);
    let slow = SlowNetwork::start(&lab.registry(), FAST);
    let image = format!("{}/lazy:1", slow.address());
    pull(&lab, &image);
    let pulled = slow.bytes();
    assert!(pulled < 2 << 20, "{pulled} bytes were fetched by the pull: {}", status(&lab));
    assert_eq!(blobs(&lab), 3, "index, manifest and config, but no layer");
    let log = std::fs::read_to_string(lab.dir().join("registry.log")).unwrap();
    let ours = || log.lines().filter(|line| line.contains("shipway-snapshotter/"));
    assert!(ours().any(|line| line.contains("/blobs/")), "{log}");
    // Orders of reads are looked for by tags such as `sha256-…`.
    let manifests = |line: &&str| {
        ["/manifests/1 ", "/manifests/sha256:"].iter().any(|manifest| line.contains(manifest))
    };
    assert_eq!(ours().find(manifests), None, "containerd has the manifest");
    let said = lab.ctr(words(&image, "sha256sum /data/7 /data/33")).ok().stdout;
    let mut want = String::new();
    for n in [7, 33] {
        writeln!(want, "{}  /data/{n}", sum(n)).unwrap();
    }
    assert_eq!(said, want);
    let fetched = slow.bytes() - pulled;
    assert!(fetched < 20 << 20, "{fetched} bytes were fetched for two files");
    // Another namespace has the same layers by another name.
    lab.ctr_in("other", ["images", "pull", "--plain-http", "--snapshotter", "shipway", &image])
        .ok();
    assert_eq!(lab.ctr_in("other", words(&image, "sha256sum /data/7 /data/33")).ok().stdout, want);
    assert_eq!(status(&lab)["lazy"]["layers"].as_array().unwrap().len(), 2);
    // Those of the containers go with a collection. Only the transfer service of containerd 2 says
    // in a plain pull which chain it unpacks.
    let unpacked = if flavour == Flavour::Newer { 0 } else { 2 };
    let directories = lab.dir().join("snapshotter/snapshots");
    wait_for("nothing but containers to have directories", Duration::from_secs(20), || {
        collect_garbage(&lab);
        match std::fs::read_dir(&directories).unwrap().count() {
            n if n == unpacked => Ok(()),
            n => Err(format!("{n} directories")),
        }
    });
    // The image goes; the layers stay as a cache, and coming back costs nothing.
    for namespace in ["other", "k8s.io"] {
        for name in lab.ctr_in(namespace, ["images", "list", "--quiet"]).ok().lines() {
            lab.ctr_in(namespace, ["images", "delete", "--sync", name]).ok();
        }
    }
    wait_for("the layers to be unmounted", Duration::from_secs(10), || {
        match lab.leftovers().mounts {
            left if left.is_empty() => Ok(()),
            left => Err(format!("{left:?}")),
        }
    });
    let before = slow.bytes();
    pull(&lab, &image);
    assert_eq!(lab.ctr(words(&image, "sha256sum /data/7 /data/33")).ok().stdout, want);
    let again = slow.bytes() - before;
    // What is read ahead may come once more.
    assert!(again < 3 << 19, "{again} bytes were fetched for what was there");
}

#[test]
fn an_image_runs_before_it_is_there() {
    on_all(|flavour| runs_before_it_is_there(flavour, Output::Estargz, ""));
}

#[test]
fn zstd_chunked_images_do_too() {
    runs_before_it_is_there(any(), Output::ZstdChunked, "");
}

#[test]
fn so_they_do_where_the_kernel_mounts_no_images() {
    on_all(|flavour| runs_before_it_is_there(flavour, Output::Estargz, TREE));
}

#[test]
fn the_rest_comes_by_itself_and_needs_nobody_then() {
    on_each(|flavour| {
        let mut lab = lab(flavour, "");
        push(&lab.registry(), Output::Estargz);
        let slow = SlowNetwork::start(&lab.registry(), FAST);
        let image = format!("{}/lazy:1", slow.address());
        pull(&lab, &image);
        lab.ctr(words(&image, "true")).ok();
        until_whole(&lab, "local");
        slow.set_down(true);
        assert!(lab.kill_keeper());
        let (script, want) = all();
        assert_eq!(lab.ctr(words(&image, &script)).ok().stdout, want);
        // What is whole is believed after a restart, and mounted as it was.
        lab.kill_snapshotter();
        lab.start_snapshotter();
        wait_for("containerd to reach the snapshotter", Duration::from_secs(30), || {
            let said = lab.ctr(words(&image, &script));
            if said.stdout == want { Ok(()) } else { Err(said.all()) }
        });
    });
}

/// Everything that a container sees of its files. Sizes of directories are the file system's own.
pub const EVERYTHING: &str = "cd / && find bin data various \\( -type d -exec stat -c '%n %f %u %g %Y' {} \\; \\) \
    -o -exec stat -c '%n %f %u %g %Y %s %h %t %T %N' {} \\; | sort && \
    find bin data various -type f | sort | xargs sha256sum";

/// zstd:chunked as podman, buildah and skopeo write it: by their hands, not ours.
#[test]
fn images_that_skopeo_made_are_lazy_and_what_they_are_when_unpacked() {
    if which("skopeo").is_none() {
        return eprintln!("NOT TESTED: skopeo is not on PATH");
    }
    let lab = lab(any(), "background = false\n");
    let mut image = BaseImage::busybox();
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    std::fs::create_dir(&data).unwrap();
    for n in 0..8 {
        // Some of it is zeros, which this writer leaves out.
        let zeros = vec![0; 300_000 * (n % 2)];
        std::fs::write(data.join(n.to_string()), [noise(n, SIZE), zeros].concat()).unwrap();
    }
    let various = dir.path().join("various");
    std::fs::create_dir(&various).unwrap();
    std::fs::write(various.join("empty"), "").unwrap();
    std::fs::write(various.join("small"), "small").unwrap();
    std::fs::hard_link(data.join("3"), various.join("hard")).unwrap();
    std::os::unix::fs::symlink("../data/3", various.join("link")).unwrap();
    run(std::process::Command::new("mkfifo").arg(various.join("fifo"))).ok();
    run(std::process::Command::new("mknod").arg(various.join("null")).args(["c", "1", "3"])).ok();
    image.layers.push(Layer::of_dir(dir.path()));
    image.push(&lab.registry(), "plain", "1");
    let at = |name: &str| format!("docker://{}/{name}:1", lab.registry());
    run(std::process::Command::new("skopeo")
        .args(["--insecure-policy", "copy", "--dest-compress-format", "zstd:chunked"])
        .args(["--src-tls-verify=false", "--dest-tls-verify=false"])
        .args([at("plain"), at("lazy")]))
    .ok();
    let slow = SlowNetwork::start(&lab.registry(), FAST);
    let lazy = format!("{}/lazy:1", slow.address());
    pull(&lab, &lazy);
    let pulled = slow.bytes();
    assert!(pulled < 2 << 20, "{pulled} bytes were fetched by the pull: {}", status(&lab));
    assert_eq!(blobs(&lab), 2, "manifest and config, but no layer");
    let said = lab.ctr(words(&lazy, EVERYTHING)).ok().stdout;
    assert_eq!(status(&lab)["lazy"]["layers"].as_array().unwrap().len(), 2);
    let plain = format!("{}/plain:1", lab.registry());
    lab.ctr(["images", "pull", "--plain-http", "--snapshotter", "overlayfs", &plain]).ok();
    let mut unpacked = words(&plain, EVERYTHING);
    unpacked[3] = "overlayfs".into();
    assert_eq!(said, lab.ctr(unpacked).ok().stdout);
    assert!(said.contains("various/hard") && said.lines().count() > 30, "{said}");
}

/// Containers whose root is nobody outside, on layers with other owners in between.
#[test]
fn containers_in_user_namespaces_have_lazy_layers() {
    if !Flavour::present().contains(&Flavour::Newer) {
        return eprintln!("NOT TESTED: user namespaces need containerd 2");
    }
    for tier in ["", TREE] {
        let lab =
            lab_with(Flavour::Newer, "remap_ids = true\n", &format!("background = false\n{tier}"));
        push(&lab.registry(), Output::Estargz);
        let slow = SlowNetwork::start(&lab.registry(), FAST);
        let image = format!("{}/lazy:1", slow.address());
        pull(&lab, &image);
        let script = "cut -c 1-40 /proc/self/uid_map && stat -c %u:%g /data /data/7 && \
            sha256sum /data/7 && echo more >> /data/7 && chown 5:6 /data/8 && \
            stat -c %u:%g /data/7 /data/8 && tail -n 1 /data/7";
        let mut command = words(&image, script);
        let maps = ["--uidmap=0:100000:65536", "--gidmap=0:200000:65536", "--remap-labels"];
        command.splice(1..1, maps.map(str::to_owned));
        let said = lab.ctr(command).ok().stdout;
        let mapped = format!("{:>10} {:>10} {:>10}", 0, 100_000, 65_536);
        let want = format!("{mapped}\n0:0\n0:0\n{}  /data/7\n0:0\n5:6\nmore\n", sum(7));
        // The last line of the file is not text, but what was added to it is its end.
        assert!(said.starts_with(want.trim_end_matches("more\n")), "{said}");
        assert!(said.ends_with("more\n"), "{said}");
        let fetched = slow.bytes();
        assert!(fetched < 30 << 20, "{fetched} bytes: layers were copied");
    }
}

/// A layer that is whole stays with the keeper, and needs nobody else.
#[test]
fn a_whole_tree_needs_no_registry() {
    let mut lab = lab(any(), TREE);
    push(&lab.registry(), Output::Estargz);
    let slow = SlowNetwork::start(&lab.registry(), FAST);
    let image = format!("{}/lazy:1", slow.address());
    pull(&lab, &image);
    lab.ctr(words(&image, "true")).ok();
    until_whole(&lab, "served");
    let told = status(&lab);
    assert_eq!(told["lazy"]["tier"], "fuse-tree");
    let better = told["lazy"]["passed_over"].as_array().unwrap();
    assert_eq!(better.len(), 4, "{told}");
    assert!(better.iter().all(|why| why[1].as_str().unwrap().contains("fuse-tree")), "{told}");
    slow.set_down(true);
    assert!(lab.kill_keeper());
    let (script, want) = all();
    assert_eq!(lab.ctr(words(&image, &script)).ok().stdout, want);
    lab.kill_snapshotter();
    lab.kill_keeper();
    lab.start_snapshotter();
    wait_for("containerd to reach the snapshotter", Duration::from_secs(30), || {
        let said = lab.ctr(words(&image, &script));
        if said.stdout == want { Ok(()) } else { Err(said.all()) }
    });
}

/// Without FUSE there is no keeper, and without a keeper images are unpacked as ever.
#[test]
fn without_fuse_images_are_unpacked() {
    let lab = lab(any(), "start_keeper = false\n");
    push(&lab.registry(), Output::Estargz);
    let image = format!("{}/lazy:1", lab.registry());
    pull(&lab, &image);
    assert_eq!(blobs(&lab), 5, "index, manifest, config and two layers");
    let (script, want) = all();
    assert_eq!(lab.ctr(words(&image, &script)).ok().stdout, want);
    let told = status(&lab);
    assert_eq!((&told["lazy"]["tier"], &told["lazy"]["keeper"]), (&"none".into(), &false.into()));
    let better = told["lazy"]["passed_over"].as_array().unwrap();
    assert!(better.len() == 5 && better[0][1].as_str().unwrap().contains("FUSE"), "{told}");
    assert_eq!(told["lazy"]["layers"].as_array().unwrap().len(), 0);
}

#[test]
fn reads_go_on_through_kills_and_outages() {
    on_each(|flavour| reads_go_on(flavour, ""));
}

#[test]
fn reads_of_trees_go_on_through_kills_and_outages() {
    reads_go_on(any(), TREE);
}

/// A network on which reading all files takes a while.
pub const SLOW: Network = Network { latency: Duration::from_millis(5), bandwidth: 8 << 20 };

#[track_caller]
fn reads_go_on(flavour: Flavour, more: &str) {
    let mut lab = lab(flavour, &format!("background = false\n{more}"));
    push(&lab.registry(), Output::Estargz);
    let slow = SlowNetwork::start(&lab.registry(), SLOW);
    let image = format!("{}/lazy:1", slow.address());
    pull(&lab, &image);
    reads_survive_kills(&mut lab, &slow, &image);
}

/// Reads all files while the snapshotter, the keeper, both and the network are away by turns.
#[track_caller]
pub fn reads_survive_kills(lab: &mut Lab, slow: &SlowNetwork, image: &str) {
    let (script, want) = all();
    let out = lab.dir().join("read");
    let mut command = lab.ctr_command_in("k8s.io");
    command.args(words(image, &script));
    command.stdout(std::fs::File::create(&out).unwrap());
    let mut reader = command.spawn().unwrap();
    let lines = || std::fs::read_to_string(&out).unwrap_or_default().lines().count();
    for round in 0..12 {
        let begun = lines();
        wait_for("the next file to be read", Duration::from_secs(40), || {
            if lines() > begun || lines() == FILES || reader.try_wait().unwrap().is_some() {
                return Ok(());
            }
            Err(format!("{begun} files, round {round}: {}", status(lab)))
        });
        match round % 4 {
            0 => {
                lab.kill_snapshotter();
                lab.start_snapshotter();
            }
            1 => assert!(lab.kill_keeper()),
            2 => {
                lab.kill_snapshotter();
                lab.kill_keeper();
                lab.start_snapshotter();
            }
            _ => {
                slow.set_down(true);
                lab.kill_keeper();
                slow.set_down(false);
            }
        }
    }
    assert!(reader.wait().unwrap().success(), "{}", status(lab));
    assert_eq!(std::fs::read_to_string(&out).unwrap(), want);
}
