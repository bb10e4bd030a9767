//! Kubernetes' side of the house: what is built in its namespace is an image of CRI's at once, and
//! a pod runs it. kubelet removes images when the disk is short, as we remove cache.

#![allow(clippy::unwrap_used)]

use shipway_integration::{
    any, build,
    cri::{Cri, NODE, wire},
    ctr_run, on_all,
};
use shipway_testkit::{BaseImage, Flavour, Lab, LabOptions, wait_for};
use std::{
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

#[test]
fn a_pod_runs_what_was_built() {
    on_all(|flavour| drop(pod(LabOptions::new(flavour))));
}

#[test]
fn a_pod_runs_what_was_built_on_our_snapshotter() {
    on_all(|flavour| {
        let mut options = LabOptions::new(flavour);
        options.snapshotter = true;
        options.worker_config = "snapshotter = \"shipway\"\n".into();
        let (lab, cri) = pod(options);
        assert!(lab.ctr(["snapshots", "list"]).ok().lines().count() <= 1, "overlayfs has nothing");
        // What CRI tells kubelet of the disk is the snapshotter's; 1.6 takes the place for granted.
        wait_for("CRI to know what images take", Duration::from_secs(30), || {
            let found: wire::FileSystems = cri.call("ImageFsInfo", wire::Nothing {});
            let at = |f: &wire::FileSystem| {
                f.id.as_ref().is_some_and(|id| {
                    id.path == lab.dir().join("snapshotter").display().to_string()
                })
            };
            let place = flavour != Flavour::Newer || found.image.iter().any(at);
            let used =
                found.image.iter().filter_map(|f| f.used_bytes.as_ref()).any(|n| n.value > 0);
            if place && used { Ok(()) } else { Err(format!("{found:?}")) }
        });
    });
}

/// What kubelet does when the disk is short, builds, and our own collection, all at once and as
/// often as they can: builds succeed, and what is pinned or runs stays.
#[test]
fn kubelets_collection_and_ours_do_not_fight() {
    let (lab, cri) = node(LabOptions::new(any()));
    let held = "FROM busybox\nRUN echo held > /word\nENTRYPOINT [\"sleep\", \"600\"]\n";
    let held = lab.context("held", &[("Dockerfile", held)]);
    build(&lab, "held:1", &held, &[]).ok();
    wait_for_image(&cri, "held:1");
    let running = start(&lab, &cri, "held:1");
    let building = AtomicUsize::new(BUILDERS);
    let removed = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for builder in 0..BUILDERS {
            let (lab, building) = (&lab, &building);
            scope.spawn(move || {
                let _done = Done(building);
                for n in 0..BUILDS {
                    let text = format!(
                        "FROM busybox\nRUN echo {n} > /x\nRUN echo {builder} > /y && cat /x\n"
                    );
                    let name = format!("node-{builder}");
                    // Another image: kubelet removes images by their ids, with all names.
                    let pinned = format!("{text}LABEL pinned=yes\n");
                    let files = [("Dockerfile", &*text), ("Pinned", &*pinned)];
                    let context = lab.context(&name, &files);
                    build(lab, &format!("{name}:{n}"), &context, &[]).ok();
                    let to = format!("type=image,name=docker.io/library/{name}:pin,pinned=true");
                    let (file, path) = (context.join("Pinned"), context.to_string_lossy());
                    let file = file.to_string_lossy();
                    lab.shipway(["build", "--file", &*file, "--output", &*to, &*path]).ok();
                }
            });
        }
        scope.spawn(|| {
            while building.load(Ordering::SeqCst) > 0 {
                lab.shipway(["prune", "--all"]).ok();
            }
        });
        scope.spawn(|| {
            let cri = Cri::of(&lab);
            while building.load(Ordering::SeqCst) > 0 {
                removed.fetch_add(collect_as_kubelet(&cri), Ordering::SeqCst);
            }
        });
    });
    assert!(removed.load(Ordering::SeqCst) > 0, "kubelet found nothing to remove");
    let read = wire::ExecSync {
        container: running.container.id.clone(),
        command: vec!["cat".into(), "/word".into()],
        timeout: 20,
    };
    let said: wire::ExecDone = cri.call("ExecSync", read);
    assert_eq!(String::from_utf8_lossy(&said.stdout), "held\n");
    for builder in 0..BUILDERS {
        let name = format!("docker.io/library/node-{builder}:pin");
        let last = (BUILDS - 1).to_string();
        assert_eq!(ctr_run(&lab, &name, &["cat", "/x"]).ok().stdout.trim(), last);
    }
    stop(&cri, &running);
    // What kubelet removed is built again.
    build(&lab, "held:1", &held, &[]).ok();
    wait_for_image(&cri, "held:1");
}

const BUILDERS: usize = 2;
const BUILDS: usize = 4;

struct Done<'a>(&'a AtomicUsize);

impl Drop for Done<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Looks at the disk and removes every image that no container has and nobody pinned, as kubelet
/// does; says how many.
#[track_caller]
fn collect_as_kubelet(cri: &Cri) -> usize {
    let _: wire::FileSystems = cri.call("ImageFsInfo", wire::Nothing {});
    let images: wire::Images = cri.call("ListImages", wire::Nothing {});
    let containers: wire::Containers = cri.call("ListContainers", wire::Nothing {});
    let in_use: Vec<String> = containers.containers.into_iter().map(|c| c.image_id).collect();
    let sandbox = |tag: &String| tag.contains("/sandbox:");
    let mut removed = 0;
    for image in images.images {
        if image.pinned || in_use.contains(&image.id) || image.tags.iter().any(sandbox) {
            continue;
        }
        let remove = wire::RemoveImage { image: Some(wire::Id { id: image.id }) };
        // It may be gone, or be another one's by now.
        if cri.try_call::<wire::Nothing>("RemoveImage", remove).is_ok() {
            removed += 1;
        }
    }
    removed
}

/// A node of Kubernetes' with a builder, and an image for sandboxes.
#[track_caller]
fn node(mut options: LabOptions) -> (Lab, Cri) {
    options.namespace = "k8s.io".into();
    options.sandbox = Some("docker.io/library/sandbox:1".into());
    let mut lab = Lab::start(options);
    lab.start_registry();
    BaseImage::busybox().push(&lab.registry(), "library/busybox", "latest");
    lab.start_daemon();
    let cri = Cri::of(&lab);
    let pause =
        lab.context("pause", &[("Dockerfile", "FROM busybox\nENTRYPOINT [\"sleep\", \"600\"]\n")]);
    build(&lab, "sandbox:1", &pause, &[]).ok();
    wait_for_image(&cri, "sandbox:1");
    (lab, cri)
}

/// CRI hears of images by events, a moment later.
#[track_caller]
fn wait_for_image(cri: &Cri, tag: &str) {
    let name = format!("docker.io/library/{tag}");
    wait_for("CRI to list the image", Duration::from_secs(10), || {
        let images: wire::Images = cri.call("ListImages", wire::Nothing {});
        let tags: Vec<String> = images.images.into_iter().flat_map(|i| i.tags).collect();
        if tags.contains(&name) { Ok(()) } else { Err(format!("{tags:?}")) }
    });
}

/// A pod of one container.
struct Running {
    pod: wire::Id,
    container: wire::Id,
}

/// Runs an image as a pod of one container, which logs to `app.log`.
#[track_caller]
fn start(lab: &Lab, cri: &Cri, tag: &str) -> Running {
    let logs = lab.dir().join("pod-logs");
    std::fs::create_dir_all(&logs).unwrap();
    let node = wire::Namespaces { network: NODE, ..Default::default() };
    let sandbox = wire::Sandbox {
        metadata: Some(wire::Metadata {
            name: "pod".into(),
            uid: "1".into(),
            namespace: "default".into(),
        }),
        log_directory: logs.display().to_string(),
        linux: Some(wire::Linux {
            security: Some(wire::Security { namespaces: Some(node.clone()), ..Default::default() }),
        }),
    };
    let pod: wire::Id =
        cri.call("RunPodSandbox", wire::RunSandbox { config: Some(sandbox.clone()) });
    let container = wire::Container {
        metadata: Some(wire::ContainerMetadata { name: "app".into() }),
        image: Some(wire::Id { id: format!("docker.io/library/{tag}") }),
        log_path: "app.log".into(),
        linux: Some(wire::ContainerLinux {
            security: Some(wire::ContainerSecurity {
                namespaces: Some(node),
                ..Default::default()
            }),
        }),
        ..Default::default()
    };
    let create = wire::CreateContainer {
        sandbox: pod.id.clone(),
        config: Some(container),
        sandbox_config: Some(sandbox),
    };
    let container: wire::Id = cri.call("CreateContainer", create);
    let _: wire::Nothing = cri.call("StartContainer", container.clone());
    Running { pod, container }
}

/// Both calls may be made again, and have to be: containerd 1.6 answers an error when the container
/// ends by itself while it is being stopped.
#[track_caller]
fn stop(cri: &Cri, running: &Running) {
    for method in ["StopPodSandbox", "RemovePodSandbox"] {
        wait_for(method, Duration::from_secs(30), || {
            cri.try_call::<wire::Nothing>(method, running.pod.clone()).map_err(|e| e.to_string())
        });
    }
}

#[track_caller]
fn pod(options: LabOptions) -> (Lab, Cri) {
    let (lab, cri) = node(options);
    let text = "FROM busybox\nRUN echo built here > /word\nENTRYPOINT [\"cat\", \"/word\"]\n";
    build(&lab, "app:1", &lab.context("app", &[("Dockerfile", text)]), &[]).ok();
    wait_for_image(&cri, "app:1");
    let running = start(&lab, &cri, "app:1");
    wait_for("the pod's container to speak", Duration::from_secs(20), || {
        let log = lab.dir().join("pod-logs/app.log");
        let said = std::fs::read_to_string(log).unwrap_or_default();
        if said.contains("built here") { Ok(()) } else { Err(said) }
    });
    stop(&cri, &running);
    (lab, cri)
}
