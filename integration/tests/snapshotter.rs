//! containerd with `shipway-snapshotter` as its plug-in: images, namespaces, builds, and kills of
//! either.

#![allow(clippy::unwrap_used)]

use serde_json::Value;
use shipway_containerd::Containerd;
use shipway_fault::Code;
use shipway_integration::{build_text, collect_garbage, nothing_left, on_all, remove_everything};
use shipway_storage::{Labels, LeaseId, SnapshotKey};
use shipway_testkit::{BaseImage, Finished, Flavour, Lab, LabOptions, Layer, run, wait_for};
use std::{
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

/// How long containerd may take to reach a snapshotter that is back: it tries every three seconds
/// at last.
const RECONNECT: Duration = Duration::from_secs(30);

fn lab(flavour: Flavour) -> Lab {
    let mut options = LabOptions::new(flavour);
    options.snapshotter = true;
    options.worker_config = "snapshotter = \"shipway\"\n".into();
    // What is pulled again is unpacked again.
    options.lazy_config = "plain = false\n".into();
    let mut lab = Lab::start(options);
    lab.start_registry();
    lab
}

/// An image of three layers, of which the last one hides something of the first; and its chain IDs.
fn image(lab: &Lab) -> (String, Vec<String>) {
    let mut image = BaseImage::busybox();
    for (path, text) in [("words/one", "1"), ("etc/.wh.group", "")] {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join(path);
        std::fs::create_dir_all(file.parent().unwrap()).unwrap();
        std::fs::write(file, text).unwrap();
        image.layers.push(Layer::of_dir(dir.path()));
    }
    image.push(&lab.registry(), "three", "1");
    let ids = image.layers.iter().map(|l| l.diff_id.parse::<shipway_oci::DiffId>().unwrap());
    let chain = ids.scan(None, |below, layer| {
        *below = Some(shipway_oci::ChainId::extend(*below, layer));
        *below
    });
    (format!("{}/three:1", lab.registry()), chain.map(|c| c.to_string()).collect())
}

fn pull(lab: &Lab, namespace: &str, image: &str) -> Finished {
    lab.ctr_in(namespace, ["images", "pull", "--plain-http", "--snapshotter", "shipway", image])
}

/// What `sh -c script` says in a container of the image. `ctr` sometimes hears nothing of a process
/// that ends at once, and is asked again then.
#[track_caller]
fn say(lab: &Lab, namespace: &str, image: &str, script: &str) -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let ask = || {
        let id = format!("say-{}", NEXT.fetch_add(1, Ordering::Relaxed));
        lab.ctr_in(
            namespace,
            ["run", "--rm", "--snapshotter", "shipway", image, &id, "sh", "-c", script],
        )
        .ok()
        .stdout
    };
    let first = ask();
    if first.is_empty() { ask() } else { first }
}

fn status(lab: &Lab) -> Value {
    let done = run(lab.snapshotter_command().args(["status", "--json"])).ok();
    serde_json::from_str(&done.stdout).unwrap()
}

fn entries(lab: &Lab, what: &str) -> usize {
    std::fs::read_dir(lab.dir().join("snapshotter").join(what)).unwrap().count()
}

/// Neither containerd nor the snapshotter has anything, and the disk is free.
#[track_caller]
fn all_gone(lab: &Lab) {
    nothing_left(lab);
    let status = status(lab);
    for kind in ["active", "views", "committed"] {
        assert_eq!(status["snapshots"][kind], 0, "{status}");
    }
    wait_for("the trash to be emptied", Duration::from_secs(10), || {
        match (entries(lab, "snapshots"), entries(lab, "trash")) {
            (0, 0) => Ok(()),
            left => Err(format!("{left:?}")),
        }
    });
}

fn block_on<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(work)
}

#[test]
fn images_are_pulled_run_and_removed_without_a_trace() {
    on_all(|flavour| {
        let lab = lab(flavour);
        let (image, chain) = image(&lab);
        pull(&lab, "default", &image).ok();
        assert_eq!(status(&lab)["snapshots"]["committed"], chain.len());
        wait_for(
            "the layers to be counted",
            Duration::from_secs(10),
            || match status(&lab)["disk"]["uncounted"].as_u64() {
                Some(0) => Ok(()),
                other => Err(format!("{other:?}")),
            },
        );
        let script = "cat /words/one; test -e /etc/group || echo hidden; echo new > /words/one && cat /words/one; chown 7:8 /bin && ls -ldn /bin | awk '{print $3}'";
        assert_eq!(say(&lab, "default", &image, script), "1hidden\nnew\n7\n");
        assert_eq!(
            say(&lab, "default", &image, "cat /words/one"),
            "1",
            "what a container wrote is its own"
        );
        lab.ctr(["images", "delete", "--sync", &image]).ok();
        all_gone(&lab);
    });
}

#[test]
fn a_layer_is_had_once_by_all_namespaces_and_lost_by_none() {
    on_all(|flavour| {
        let lab = lab(flavour);
        let (image, chain) = image(&lab);
        pull(&lab, "default", &image).ok();
        let before = entries(&lab, "snapshots");
        assert_eq!(before, chain.len());
        // As whoever publishes an image does it, from the bottom up.
        let lease = LeaseId("publish".into());
        block_on(async {
            let containerd = Containerd::connect(lab.containerd_socket()).await.unwrap();
            containerd.ensure_namespace("other").await.unwrap();
            let storage = containerd.storage("other", "shipway").unwrap();
            storage.leases.create(&lease, &Labels::new()).await.unwrap();
            let mut parent = None;
            for (n, id) in chain.iter().enumerate() {
                let labels = Labels::from([("containerd.io/snapshot.ref".to_owned(), id.clone())]);
                let key = SnapshotKey(format!("alias-{n}"));
                let answer = storage
                    .snapshots
                    .prepare(&lease, &key, parent.as_ref(), &labels)
                    .await
                    .unwrap_err();
                assert_eq!(answer.code(), Code::AlreadyExists, "{answer}");
                let name = SnapshotKey(id.clone());
                assert_eq!(storage.snapshots.stat(&name).await.unwrap().parent, parent);
                parent = Some(name);
            }
        });
        pull(&lab, "other", &image).ok();
        assert_eq!(entries(&lab, "snapshots"), before, "nothing was unpacked again");
        lab.ctr_in("other", ["leases", "delete", "--sync", &lease.0]).ok();
        // Whoever leaves, the other one keeps it.
        lab.ctr(["images", "delete", "--sync", &image]).ok();
        collect_garbage(&lab);
        assert_eq!(say(&lab, "other", &image, "cat /words/one"), "1");
        pull(&lab, "default", &image).ok();
        lab.ctr_in("other", ["images", "delete", "--sync", &image]).ok();
        assert_eq!(say(&lab, "default", &image, "cat /words/one"), "1");
        lab.ctr(["images", "delete", "--sync", &image]).ok();
        all_gone(&lab);
    });
}

#[test]
fn our_builds_work_on_it() {
    on_all(|flavour| {
        let mut lab = lab(flavour);
        BaseImage::busybox().push(&lab.registry(), "library/busybox", "latest");
        lab.start_daemon();
        let text = "FROM busybox\nRUN echo built > /word && rm /etc/group\nRUN mkdir /d && mv /word /d/word\nCOPY Dockerfile /d/\n";
        build_text(&lab, "docker.io/library/app:1", text).ok();
        let said = say(
            &lab,
            "default",
            "docker.io/library/app:1",
            "cat /d/word; head -n 1 /d/Dockerfile; test -e /etc/group || echo gone",
        );
        assert_eq!(said, "built\nFROM busybox\ngone\n");
        assert!(lab.ctr(["snapshots", "list"]).ok().lines().count() <= 1, "overlayfs has nothing");
        lab.kill_snapshotter();
        lab.start_snapshotter();
        wait_for("a build after the snapshotter was killed", RECONNECT, || {
            let again = build_text(
                &lab,
                "docker.io/library/app:2",
                &format!("{text}RUN echo more >> /d/word\n"),
            );
            if again.code == Some(0) { Ok(()) } else { Err(again.all()) }
        });
        assert_eq!(say(&lab, "default", "docker.io/library/app:2", "cat /d/word"), "built\nmore\n");
        remove_everything(&lab);
        lab.stop_daemon();
        collect_garbage(&lab);
        all_gone(&lab);
    });
}

/// `ctr pull`, running.
fn pulling(lab: &Lab, image: &str) -> Child {
    let mut command = Command::new(lab.ctr_path());
    command.env("PATH", lab.path()).arg("--address").arg(lab.containerd_socket());
    command.args(["images", "pull", "--plain-http", "--snapshotter", "shipway", image]);
    command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

/// Waits until the snapshotter has made its `n`-th directory, or the pull is over.
fn until_directory(lab: &Lab, pull: &mut Child, n: usize) {
    wait_for("a snapshot to be made", Duration::from_secs(60), || {
        if entries(lab, "snapshots") >= n || pull.try_wait().unwrap().is_some() {
            Ok(())
        } else {
            Err("none yet".into())
        }
    });
}

#[track_caller]
fn pulled_at_last(lab: &Lab, image: &str) {
    wait_for("the image to be pulled", RECONNECT, || {
        let done = pull(lab, "default", image);
        if done.code == Some(0) { Ok(()) } else { Err(done.all()) }
    });
}

/// Removes all images and leases, as an administrator after a crash would, once containerd reaches
/// the snapshotter.
fn clear(lab: &Lab) {
    for image in lab.ctr(["images", "list", "--quiet"]).ok().lines() {
        lab.ctr(["images", "delete", image]).ok();
    }
    for lease in lab.ctr(["leases", "list", "--quiet"]).ok().lines() {
        lab.ctr(["leases", "delete", lease]).ok();
    }
    wait_for("everything to be collected", RECONNECT, || {
        collect_garbage(lab);
        let left = lab.leftovers();
        if left.snapshots.is_empty() && status(lab)["snapshots"]["committed"] == 0 {
            Ok(())
        } else {
            Err(format!("{left:?} {}", status(lab)))
        }
    });
}

#[test]
fn the_snapshotter_may_be_killed_between_and_within_operations() {
    on_all(|flavour| {
        let mut lab = lab(flavour);
        let (image, _) = image(&lab);
        for n in 1..=6 {
            let mut pull = pulling(&lab, &image);
            until_directory(&lab, &mut pull, n);
            lab.kill_snapshotter();
            lab.start_snapshotter();
            pull.wait().unwrap();
            pulled_at_last(&lab, &image);
            lab.kill_snapshotter();
            lab.start_snapshotter();
            wait_for("a container to run", RECONNECT, || {
                let id = format!("try-{n}");
                let done = lab.ctr([
                    "run",
                    "--rm",
                    "--snapshotter",
                    "shipway",
                    &image,
                    &id,
                    "sh",
                    "-c",
                    "cat /words/one; sleep 0.1",
                ]);
                if done.code == Some(0) && done.stdout == "1" {
                    return Ok(());
                }
                // What a failed attempt made is in the way of the next.
                lab.ctr(["containers", "delete", &id]);
                lab.ctr(["snapshots", "--snapshotter", "shipway", "delete", &id]);
                Err(done.all())
            });
            clear(&lab);
        }
        assert!(
            lab.stop_snapshotter(),
            "SIGTERM is enough, though containerd keeps its connection"
        );
        lab.start_snapshotter();
        all_gone(&lab);
    });
}

#[test]
fn both_may_be_killed_and_agree_afterwards() {
    on_all(|flavour| {
        let mut lab = lab(flavour);
        let (image, chain) = image(&lab);
        for n in 1..=4 {
            let mut pull = pulling(&lab, &image);
            until_directory(&lab, &mut pull, n);
            if n % 2 == 0 {
                lab.kill_snapshotter();
                lab.kill_containerd();
                lab.start_snapshotter();
            } else {
                lab.kill_containerd();
            }
            pull.kill().unwrap();
            pull.wait().unwrap();
            lab.start_containerd();
            pulled_at_last(&lab, &image);
            assert_eq!(say(&lab, "default", &image, "cat /words/one"), "1");
            // What the interrupted pull had begun goes with its lease; what is left is the image.
            for lease in lab.ctr(["leases", "list", "--quiet"]).ok().lines() {
                lab.ctr(["leases", "delete", lease]).ok();
            }
            collect_garbage(&lab);
            let names = status(&lab)["snapshots"].clone();
            assert_eq!(
                (&names["active"], &names["committed"]),
                (&0.into(), &chain.len().into()),
                "{names}"
            );
            assert_eq!(entries(&lab, "snapshots"), chain.len());
            clear(&lab);
        }
        all_gone(&lab);
    });
}

#[test]
fn setup_is_taken_back_and_doctor_says_what_is_missing() {
    on_all(|flavour| {
        let mut lab = lab(flavour);
        let doctor = |lab: &Lab| {
            let mut command = lab.snapshotter_command();
            command
                .arg("doctor")
                .arg("--containerd")
                .arg(lab.containerd_path())
                .arg("--containerd-config")
                .arg(lab.dir().join("containerd.toml"));
            run(&mut command)
        };
        let healthy = doctor(&lab).ok();
        assert!(!healthy.stdout.contains("missing"), "{}", healthy.stdout);
        let tier = status(&lab)["lazy"]["tier"].as_str().unwrap().to_owned();
        for what in [
            "ok       FUSE in the kernel",
            "ok       EROFS in the kernel",
            &format!("layers without unpacking: by way of {tier}"),
            "ok       the keeper",
            // How much there is depends on the machine.
            " room on the disk: ",
            "ok       the clock",
        ] {
            assert!(healthy.stdout.contains(what), "no {what:?} in {}", healthy.stdout);
        }
        let plugins = lab.ctr(["plugins", "list"]).ok().stdout;
        let ours = |plugins: &str| {
            plugins.lines().any(|l| {
                l.contains("io.containerd.snapshotter.v1")
                    && l.contains("shipway")
                    && l.contains("ok")
            })
        };
        assert!(ours(&plugins), "{plugins}");

        let config = lab.dir().join("containerd.toml");
        let set_up = std::fs::read_to_string(&config).unwrap();
        let undo = ["setup", "--undo", "--containerd-config"];
        run(lab.snapshotter_command().args(undo).arg(&config)).ok();
        assert!(!std::fs::read_to_string(&config).unwrap().contains("shipway\""));
        let sick = doctor(&lab).failed();
        assert!(sick.stdout.contains("missing  containerd's configuration"), "{}", sick.stdout);
        lab.kill_snapshotter();
        assert!(doctor(&lab).failed().stdout.contains("missing  a snapshotter that runs"));

        // `--print` writes nothing and shows what would be.
        let mut print = lab.snapshotter_command();
        print
            .args(["setup", "--print", "--containerd"])
            .arg(lab.containerd_path())
            .arg("--containerd-config")
            .arg(&config);
        assert_eq!(run(&mut print).ok().stdout, set_up);
    });
}

#[test]
fn what_setup_writes_is_what_containerd_understands() {
    on_all(|flavour| {
        let lab = lab(flavour);
        let cri = "[plugins.\"io.containerd.grpc.v1.cri\".containerd";
        let plain = format!("version = 2\n{cri}]\n  snapshotter = \"overlayfs\"\n");
        let runtimes =
            format!("{plain}{cri}.runtimes.runc]\n  runtime_type = \"io.containerd.runc.v2\"\n");
        for text in ["version = 2\n", &plain, &runtimes] {
            let file = lab.dir().join("other.toml");
            std::fs::write(&file, text).unwrap();
            let mut setup = lab.snapshotter_command();
            setup
                .args(["setup", "--containerd"])
                .arg(lab.containerd_path())
                .arg("--containerd-config")
                .arg(&file);
            run(&mut setup).ok();
            let dump = run(Command::new(lab.containerd_path())
                .arg("--config")
                .arg(&file)
                .args(["config", "dump"]))
            .ok()
            .stdout
            .replace('"', "'");
            let section = match flavour {
                Flavour::System | Flavour::Between => {
                    "[plugins.'io.containerd.grpc.v1.cri'.containerd]"
                }
                Flavour::Newer => "[plugins.'io.containerd.cri.v1.images']",
            };
            let section =
                dump.split(section).nth(1).unwrap_or_else(|| panic!("no {section} in\n{dump}"));
            let settings = section.split("[plugins").next().unwrap();
            assert!(settings.contains("snapshotter = 'shipway'"), "{text}\n{settings}");
            assert!(dump.contains("[proxy_plugins.shipway]"), "{dump}");
        }
    });
}
