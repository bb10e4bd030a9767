//! Kubernetes' side of the house: what is built in its namespace is an image of CRI's at once, and
//! a pod runs it.

#![allow(clippy::unwrap_used)]

use shipway_integration::{
    build,
    cri::{Cri, NODE, wire},
    on_all,
};
use shipway_testkit::{BaseImage, Flavour, Lab, LabOptions, wait_for};
use std::time::Duration;

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

fn pod(mut options: LabOptions) -> (Lab, Cri) {
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
    let app = lab.context(
        "app",
        &[(
            "Dockerfile",
            "FROM busybox\nRUN echo built here > /word\nENTRYPOINT [\"cat\", \"/word\"]\n",
        )],
    );
    build(&lab, "app:1", &app, &[]).ok();

    // CRI hears of images by events, a moment later.
    wait_for("CRI to list the image", Duration::from_secs(10), || {
        let images: wire::Images = cri.call("ListImages", wire::Nothing {});
        let tags: Vec<String> = images.images.into_iter().flat_map(|i| i.tags).collect();
        if tags.iter().any(|t| t == "docker.io/library/app:1") {
            Ok(())
        } else {
            Err(format!("{tags:?}"))
        }
    });

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
        image: Some(wire::Id { id: "docker.io/library/app:1".into() }),
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
    let _: wire::Nothing = cri.call("StartContainer", container);
    wait_for("the pod's container to speak", Duration::from_secs(20), || {
        let said = std::fs::read_to_string(logs.join("app.log")).unwrap_or_default();
        if said.contains("built here") { Ok(()) } else { Err(said) }
    });
    // Both may be asked again, and have to be: containerd 1.6 answers an error when the container
    // ends by itself while it is being stopped.
    for method in ["StopPodSandbox", "RemovePodSandbox"] {
        wait_for(method, Duration::from_secs(30), || {
            cri.try_call::<wire::Nothing>(method, pod.clone()).map_err(|e| e.to_string())
        });
    }
    (lab, cri)
}
