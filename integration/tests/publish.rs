//! One build, its image in several namespaces: with a snapshotter that shares, and with one that
//! does not.

#![allow(clippy::unwrap_used)]

use shipway_integration::{any, collect_garbage, nothing_left, on_each, remove_everything};
use shipway_testkit::{BaseImage, Flavour, Lab, LabOptions, wait_for};
use std::{
    fs::File,
    io::{ErrorKind, Read as _, Write as _},
    net::TcpListener,
    os::unix::fs::FileExt as _,
    time::Duration,
};

const IMAGE: &str = "docker.io/library/app:1";
const TEXT: &str = "FROM busybox\nRUN echo built > /word && rm /etc/group\nCOPY Dockerfile /d/\n";

fn lab(flavour: Flavour, snapshotter: &str, worker_config: &str) -> Lab {
    let mut options = LabOptions::new(flavour);
    options.snapshotter = snapshotter == "shipway";
    options.worker_config = format!("snapshotter = \"{snapshotter}\"\n{worker_config}");
    let mut lab = Lab::start(options);
    lab.start_registry();
    BaseImage::busybox().push(&lab.registry(), "library/busybox", "latest");
    lab.start_daemon();
    lab
}

fn output(more: &str) -> String {
    format!("type=image,name={IMAGE}{more}")
}

#[track_caller]
fn build(lab: &Lab, output: &str) -> shipway_testkit::Finished {
    let context = lab.context("app", &[("Dockerfile", TEXT)]);
    let context = context.to_string_lossy();
    lab.shipway(["build", "--progress", "plain", "--output", output, &context])
}

/// What a container of the image in `namespace` says. `ctr` sometimes hears nothing of a process
/// that ends at once, and is asked again then.
#[track_caller]
fn word(lab: &Lab, namespace: &str, snapshotter: &str) -> String {
    let script = "cat /word; head -n 1 /d/Dockerfile; test -e /etc/group || echo gone";
    let ask = |id: &str| {
        let words = ["run", "--rm", "--snapshotter", snapshotter, IMAGE, id, "sh", "-c", script];
        lab.ctr_in(namespace, words).ok().stdout
    };
    let first = ask("one");
    if first.is_empty() { ask("two") } else { first }
}

const SAYS: &str = "built\nFROM busybox\ngone\n";

fn directories(lab: &Lab) -> usize {
    std::fs::read_dir(lab.dir().join("snapshotter/snapshots")).unwrap().count()
}

/// The record's labels and whether all blobs are there, as `ctr` shows them.
#[track_caller]
fn record(lab: &Lab, namespace: &str) -> String {
    let rows = lab.ctr_in(namespace, ["images", "list"]).ok().stdout;
    rows.lines().find(|l| l.starts_with(IMAGE)).unwrap_or_default().to_owned()
}

#[test]
fn an_image_is_in_all_namespaces_without_a_copy_and_goes_from_each_alone() {
    on_each(|flavour| {
        let mut lab = lab(flavour, "shipway", "");
        build(&lab, &output("")).ok();
        let before = directories(&lab);
        build(&lab, &output(",\"namespaces=default,k8s.io,moby\",pinned=true")).ok();
        assert_eq!(directories(&lab), before, "nothing was unpacked again");
        for namespace in ["default", "k8s.io", "moby"] {
            assert!(record(&lab, namespace).contains("io.cri-containerd.pinned=pinned"));
            let check = lab.ctr_in(
                namespace,
                ["images", "check", "--snapshotter", "shipway", &format!("name=={IMAGE}")],
            );
            let check = check.ok().stdout;
            assert!(check.contains(" complete ") && check.contains(" true"), "{check}");
            assert_eq!(word(&lab, namespace, "shipway"), SAYS);
        }
        // The builder forgets everything, and one namespace after the other its image.
        remove_everything(&lab);
        assert_eq!(word(&lab, "k8s.io", "shipway"), SAYS);
        assert_eq!(word(&lab, "moby", "shipway"), SAYS);
        lab.ctr_in("k8s.io", ["images", "delete", "--sync", IMAGE]).ok();
        assert_eq!(word(&lab, "moby", "shipway"), SAYS);
        // It comes back from there.
        build(&lab, &output(",namespaces=k8s.io")).ok();
        lab.ctr_in("moby", ["images", "delete", "--sync", IMAGE]).ok();
        assert_eq!(word(&lab, "k8s.io", "shipway"), SAYS);
        for namespace in lab.namespaces() {
            for image in lab.ctr_in(&namespace, ["images", "list", "--quiet"]).ok().lines() {
                lab.ctr_in(&namespace, ["images", "delete", "--sync", image]).ok();
            }
        }
        remove_everything(&lab);
        lab.stop_daemon();
        collect_garbage(&lab);
        nothing_left(&lab);
        wait_for("the disk to be free", Duration::from_secs(10), || match directories(&lab) {
            0 => Ok(()),
            n => Err(format!("{n} directories")),
        });
    });
}

/// How many transactions containerd has committed to its database: bbolt numbers them. The number
/// of the last one is in the newer of the two pages that its file begins with, 64 bytes into it.
#[track_caller]
fn transactions(lab: &Lab) -> u64 {
    let path = lab.dir().join("containerd-root/io.containerd.metadata.v1.bolt/meta.db");
    let file = File::open(path).unwrap();
    let mut size = [0; 4];
    file.read_exact_at(&mut size, 24).unwrap();
    let number = |page: u64| {
        let mut number = [0; 8];
        file.read_exact_at(&mut number, page * u64::from(u32::from_ne_bytes(size)) + 64).unwrap();
        u64::from_ne_bytes(number)
    };
    number(0).max(number(1))
}

/// Transactions from the last step of a build of eight layers of its own on, by the time that the
/// build has its answer and its leases are gone. `more` is added to the output; the step ends once
/// the layers below it are in `namespaces`.
#[track_caller]
fn transactions_at_the_end(lab: &Lab, more: &str, namespaces: &[&str]) -> u64 {
    const BELOW: usize = 8;
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut text = String::from("FROM busybox\n");
    for n in 1..BELOW {
        text.push_str(&format!("RUN echo {port} > /file-{n}\n"));
    }
    text.push_str(&format!("RUN --network=host wget -q -O /last http://127.0.0.1:{port}/\n"));
    let context = lab.context(&format!("counted-{port}"), &[("Dockerfile", &text)]);
    let output = format!("type=image,name=docker.io/library/counted:{port}{more}");
    std::thread::scope(|scope| {
        let build = scope.spawn(|| {
            let context = context.to_string_lossy();
            let words =
                ["build", "--progress", "plain", "--allow", "network.host", "--output", &output];
            lab.shipway(words.into_iter().chain([&*context])).ok();
        });
        let last_step = || match listener.accept() {
            Ok((stream, _)) => Ok(stream),
            Err(e) if e.kind() == ErrorKind::WouldBlock && !build.is_finished() => Err("no".into()),
            Err(e) => panic!("the build ended without its last step: {e}"),
        };
        let mut last_step = wait_for("the last step", Duration::from_secs(120), last_step);
        assert!(last_step.read(&mut [0; 1024]).unwrap() > 0);
        wait_for("the layers below", Duration::from_secs(60), || {
            for namespace in namespaces {
                let count = |words: &[&str]| lab.ctr_in(namespace, words).ok().lines().count();
                // With a line of headings.
                let snapshots = count(&["snapshots", "--snapshotter", "shipway", "list"]);
                let blobs = count(&["content", "list", "--quiet"]);
                if snapshots <= BELOW || blobs < BELOW {
                    return Err(format!("{namespace}: {snapshots} snapshots, {blobs} blobs"));
                }
            }
            Ok(())
        });
        let before = transactions(lab);
        last_step.write_all(b"HTTP/1.0 200 OK\r\n\r\nend").unwrap();
        drop(last_step);
        build.join().unwrap();
        wait_for("the leases to go", Duration::from_secs(20), || {
            let leases = |namespace: &&str| {
                lab.ctr_in(namespace, ["leases", "list", "--quiet"]).ok().lines().count()
            };
            match namespaces.iter().map(leases).sum() {
                0 => Ok(()),
                n => Err(format!("{n} leases")),
            }
        });
        transactions(lab) - before
    })
}

#[test]
fn layers_are_published_while_the_build_goes_on() {
    let mut lab = lab(any(), "shipway", "");
    let alone = transactions_at_the_end(&lab, "", &[]);
    let namespaces = ["k8s.io", "moby", "other"];
    let more = ",\"namespaces=k8s.io,moby,other\"";
    let published = transactions_at_the_end(&lab, more, &namespaces);
    eprintln!("{alone} transactions alone, {published} with three namespaces");
    // For each: two for the last snapshot, its blob, the config and the manifest each, the record,
    // and the end of the lease. Each of the seven layers below would be four more.
    assert!(published <= alone + 3 * 14, "{published} transactions, and {alone} without");
    for namespace in namespaces {
        let check = lab.ctr_in(namespace, ["images", "check", "--snapshotter", "shipway"]).ok();
        assert!(check.stdout.contains(" complete "), "{}", check.stdout);
    }
    remove_everything(&lab);
    for namespace in namespaces {
        for image in lab.ctr_in(namespace, ["images", "list", "--quiet"]).ok().lines() {
            lab.ctr_in(namespace, ["images", "delete", "--sync", image]).ok();
        }
    }
    lab.stop_daemon();
    collect_garbage(&lab);
    nothing_left(&lab);
}

#[test]
fn other_snapshotters_unpack_for_each_namespace() {
    on_each(|flavour| {
        let mut lab = lab(flavour, "overlayfs", "publishNamespaces = [\"other\"]\n");
        build(&lab, &output("")).ok();
        for namespace in ["default", "other"] {
            let check = lab.ctr_in(namespace, ["images", "check", &format!("name=={IMAGE}")]);
            let check = check.ok().stdout;
            assert!(check.contains(" complete ") && check.contains(" true"), "{check}");
            assert_eq!(word(&lab, namespace, "overlayfs"), SAYS);
        }
        // A build that names its own leaves the others alone.
        build(&lab, "type=image,name=docker.io/library/app:2,namespaces=").ok();
        let others = lab.ctr_in("other", ["images", "list", "--quiet"]).ok().stdout;
        assert_eq!(others.trim(), IMAGE);
        lab.ctr_in("other", ["images", "delete", "--sync", IMAGE]).ok();
        assert_eq!(word(&lab, "default", "overlayfs"), SAYS);
        remove_everything(&lab);
        lab.stop_daemon();
        collect_garbage(&lab);
        nothing_left(&lab);
    });
}

#[test]
fn what_cannot_be_published_is_refused_before_the_build() {
    let mut lab = lab(any(), "overlayfs", "");
    for (more, says) in [
        (",namespaces=a/b", "not a valid name of a containerd namespace"),
        (",namespaces=other,store=false", "store=false"),
    ] {
        let failed = build(&lab, &output(more)).failed();
        assert!(failed.all().contains(says), "{}", failed.all());
        assert!(!failed.all().contains("FROM"), "{}", failed.all());
    }
    // A name of Kubernetes' own image is not taken in its namespace either.
    build(&lab, &output("")).ok();
    let pause = lab.ctr_in(
        "k8s.io",
        ["images", "pull", "--plain-http", &format!("{}/library/busybox:latest", lab.registry())],
    );
    pause.ok();
    let name = format!("{}/library/busybox:latest", lab.registry());
    lab.ctr_in("k8s.io", ["images", "label", &name, "io.cri-containerd.image=managed"]).ok();
    let refused = build(&lab, &format!("type=image,name={name},namespaces=k8s.io")).failed();
    assert!(refused.all().contains("is managed by Kubernetes"), "{}", refused.all());
    lab.ctr_in("k8s.io", ["images", "delete", "--sync", &name]).ok();
    remove_everything(&lab);
    lab.stop_daemon();
    nothing_left(&lab);
}
