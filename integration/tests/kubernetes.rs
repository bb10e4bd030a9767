//! The manifests for Kubernetes (`config/kubernetes`): they say what its API understands and what
//! belongs together, `kubectl` puts them together, and the pod that they describe builds through
//! containerd's own CRI.

#![allow(clippy::unwrap_used)]

use serde_json::{Value, json};
use shipway_integration::{
    any,
    cri::{Cri, NODE, wire},
    images::{host_base, image_of_us},
    kubernetes::{Types, documents},
};
use shipway_testkit::{BaseImage, Lab, LabOptions, built, run, wait_for, which, workspace};
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

fn manifests() -> PathBuf {
    workspace().join("config/kubernetes")
}

fn types() -> Types {
    Types::read(&workspace().join("integration/kubernetes/types.json"))
}

#[track_caller]
fn document(path: &Path) -> Value {
    let mut all = documents(&fs::read_to_string(path).unwrap());
    assert_eq!(all.len(), 1, "{}", path.display());
    all.remove(0)
}

/// The objects of the base, by their kinds.
#[track_caller]
fn base() -> BTreeMap<String, Value> {
    let list = document(&manifests().join("base/kustomization.yaml"));
    let files = list["resources"].as_array().unwrap().iter().map(|name| name.as_str().unwrap());
    let objects = files.map(|name| document(&manifests().join("base").join(name)));
    objects.map(|o| (o["kind"].as_str().unwrap().to_owned(), o)).collect()
}

#[test]
fn mistakes_in_manifests_are_found() {
    let types = types();
    let good = base();
    let mistaken = |kind: &str, path: &str, value: Option<Value>, says: &str| {
        let mut object = good[kind].clone();
        let (parent, key) = path.rsplit_once('/').unwrap();
        let at = object.pointer_mut(parent).unwrap().as_object_mut().unwrap();
        match value {
            Some(value) => drop(at.insert(key.into(), value)),
            None => drop(at.remove(key)),
        }
        let problems = types.problems(&object);
        assert!(problems.len() == 1 && problems[0].contains(says), "{path}: {problems:?}");
    };
    let pod = "/spec/template/spec";
    mistaken("DaemonSet", &format!("{pod}/hostPid"), Some(json!(true)), "hostPid is not a field");
    mistaken("DaemonSet", &format!("{pod}/hostPID"), Some(json!("yes")), "not a boolean");
    mistaken("DaemonSet", &format!("{pod}/containers"), None, "has no containers");
    mistaken("DaemonSet", &format!("{pod}/containers"), Some(json!({})), "not a list");
    mistaken("DaemonSet", &format!("{pod}/volumes/0/name"), None, "volumes[0] has no name");
    mistaken("DaemonSet", "/spec/selector/matchLabels/x", Some(json!(1)), "not a string");
    mistaken("ConfigMap", "/kind", Some(json!("ConfigMop")), "core.v1.ConfigMop is not a type");
    mistaken("NetworkPolicy", "/apiVersion", Some(json!("networking.k8s.io/v9")), "not a type");
}

#[test]
fn manifests_are_what_the_api_of_kubernetes_understands() {
    let (types, base) = (types(), base());
    for (kind, object) in &base {
        assert_eq!(types.problems(object), Vec::<String>::new(), "{kind}");
    }
    for overlay in ["tls", "no-tls"] {
        let service = document(&manifests().join(overlay).join("service.yaml"));
        assert_eq!(types.problems(&service), Vec::<String>::new(), "{overlay}");
        let labels = &base["DaemonSet"]["spec"]["template"]["metadata"]["labels"];
        assert_eq!(&service["spec"]["selector"], labels, "{overlay}");
    }
    let binding = document(&manifests().join("tokens/clusterrolebinding.yaml"));
    assert_eq!(types.problems(&binding), Vec::<String>::new());
    let account = &base["ServiceAccount"]["metadata"];
    for key in ["name", "namespace"] {
        assert_eq!(binding["subjects"][0][key], account[key]);
    }
    // What names something names what is there.
    let set = &base["DaemonSet"]["spec"];
    let pod = &set["template"]["spec"];
    let labels = &set["template"]["metadata"]["labels"];
    assert_eq!(&set["selector"]["matchLabels"], labels);
    assert_eq!(&base["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"], labels);
    assert_eq!(pod["serviceAccountName"], base["ServiceAccount"]["metadata"]["name"]);
    assert_eq!(pod["volumes"][0]["configMap"]["name"], base["ConfigMap"]["metadata"]["name"]);
    let names = |list: &Value| -> Vec<String> {
        list.as_array().unwrap().iter().map(|v| v["name"].as_str().unwrap().into()).collect()
    };
    assert_eq!(names(&pod["containers"][0]["volumeMounts"]), names(&pod["volumes"]));
    // The namespace's own name is the only one without one.
    for (kind, object) in base.iter().filter(|(kind, _)| *kind != "Namespace") {
        let namespace = &object["metadata"]["namespace"];
        assert_eq!(*namespace, base["Namespace"]["metadata"]["name"], "{kind}");
    }
}

/// The daemon understands the configuration with the policies, and in a pod it has what it needs.
#[test]
fn the_daemon_reads_the_policies_of_the_manifests() {
    let patch = document(&manifests().join("tokens/configmap.yaml"));
    let dir = tempfile::tempdir().unwrap();
    let start = |pod: bool| {
        let file = dir.path().join("shipwayd.toml");
        fs::write(&file, patch[0]["value"].as_str().unwrap()).unwrap();
        let mut command = Command::new(built("shipwayd"));
        command.arg("--config").arg(file).arg("--root").arg(dir.path().join("root"));
        command.arg("--containerd-worker-addr=/nonexistent/containerd.sock");
        if pod {
            command
                .env("KUBERNETES_SERVICE_HOST", "10.0.0.1")
                .env("KUBERNETES_SERVICE_PORT", "443");
        }
        run(&mut command).failed().all()
    };
    let said = start(false);
    assert!(said.contains("this is not a pod"), "{said}");
    let said = start(true);
    assert!(said.contains("/nonexistent/containerd.sock"), "{said}");
}

#[test]
fn kubectl_puts_the_manifests_together() {
    let Some(kubectl) = which("kubectl") else {
        eprintln!("kubectl is absent: its kustomize is not asked");
        return;
    };
    let types = types();
    for (overlay, port, secret) in [
        ("base", false, false),
        ("tls", true, true),
        ("no-tls", true, false),
        ("tokens", true, true),
    ] {
        let done = run(Command::new(&kubectl).arg("kustomize").arg(manifests().join(overlay))).ok();
        let objects = documents(&done.stdout);
        for object in &objects {
            assert_eq!(types.problems(object), Vec::<String>::new(), "{overlay}: {object}");
        }
        let of = |kind: &str| objects.iter().find(|o| o["kind"] == kind);
        let pod = &of("DaemonSet").unwrap()["spec"]["template"]["spec"];
        let container = &pod["containers"][0];
        let args = container["args"].to_string();
        assert!(args.contains("unix:///run/shipway/shipwayd.sock"), "{args}");
        assert_eq!(args.contains("tcp://0.0.0.0:1234"), port, "{overlay}: {args}");
        assert_eq!(args.contains("--tlscacert="), secret, "{overlay}: {args}");
        assert_eq!(of("Service").is_some(), port, "{overlay}");
        assert!(container["image"].as_str().unwrap().starts_with("shipway-node:"), "{container}");
        let policy = &of("NetworkPolicy").unwrap()["spec"];
        let sources = policy["ingress"].as_array().map_or(0, Vec::len);
        assert_eq!(sources, usize::from(port), "{overlay}: {policy}");
        let volumes = pod["volumes"].to_string();
        assert_eq!(volumes.contains("shipway-daemon-certs"), secret, "{volumes}");
    }
}

/// A directory as a mount that shares what is mounted below it, as systemd makes all of a node.
struct Shared(PathBuf);

impl Shared {
    fn new(dir: &Path) -> Self {
        run(Command::new("mount").arg("--rbind").arg(dir).arg(dir)).ok();
        let shared = Self(dir.to_owned());
        run(Command::new("mount").arg("--make-rshared").arg(dir)).ok();
        shared
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&*self.0, rustix::mount::UnmountFlags::DETACH);
    }
}

/// The directories of a node as the lab has them.
struct Node<'a>(&'a Lab);

impl Node<'_> {
    /// A path, or a text with paths, on this node.
    fn of(&self, text: &str) -> String {
        let lab = self.0.dir();
        let mut text = text.to_owned();
        for (there, here) in [
            ("/run/containerd", lab.to_path_buf()),
            ("/var/lib/containerd", lab.join("containerd-root")),
            ("/var/lib/shipway", lab.join("pod-state")),
            ("/run/shipway", lab.join("pod-run")),
        ] {
            text = text.replace(there, &here.display().to_string());
        }
        text
    }

    /// A volume's directory on this node.
    fn volume(&self, volume: &Value, base: &BTreeMap<String, Value>) -> String {
        if let Some(path) = volume["hostPath"]["path"].as_str() {
            let path = self.of(path);
            if volume["hostPath"]["type"] == "DirectoryOrCreate" {
                fs::create_dir_all(&path).unwrap();
            }
            return path;
        }
        let files = self.0.dir().join("pod-config");
        fs::create_dir_all(&files).unwrap();
        for (name, text) in base["ConfigMap"]["data"].as_object().unwrap() {
            fs::write(files.join(name), self.of(text.as_str().unwrap())).unwrap();
        }
        files.display().to_string()
    }
}

/// What kubelet makes of the pod's only container.
fn container(node: &Node<'_>, base: &BTreeMap<String, Value>) -> wire::Container {
    let pod = &base["DaemonSet"]["spec"]["template"]["spec"];
    let container = &pod["containers"][0];
    let volume = |name: &Value| {
        pod["volumes"].as_array().unwrap().iter().find(|v| v["name"] == *name).unwrap()
    };
    let mounts = container["volumeMounts"].as_array().unwrap().iter().map(|mount| wire::Mount {
        container_path: node.of(mount["mountPath"].as_str().unwrap()),
        host_path: node.volume(volume(&mount["name"]), base),
        readonly: mount["readOnly"] == true,
        propagation: match mount["mountPropagation"].as_str() {
            Some("HostToContainer") => 1,
            Some("Bidirectional") => 2,
            _ => 0,
        },
    });
    let args = container["args"].as_array().unwrap();
    wire::Container {
        metadata: Some(wire::ContainerMetadata { name: "shipwayd".into() }),
        image: Some(wire::Id { id: "docker.io/library/shipway-node:1".into() }),
        args: args.iter().map(|arg| node.of(arg.as_str().unwrap())).collect(),
        mounts: mounts.collect(),
        log_path: "shipwayd.log".into(),
        linux: Some(wire::ContainerLinux {
            security: Some(wire::ContainerSecurity {
                privileged: container["securityContext"]["privileged"] == true,
                namespaces: Some(wire::Namespaces {
                    network: NODE,
                    pid: if pod["hostPID"] == true { NODE } else { 0 },
                }),
            }),
        }),
    }
}

#[test]
fn the_pod_of_the_daemon_set_builds_images_of_its_node() {
    let mut options = LabOptions::new(any());
    options.namespace = "k8s.io".into();
    options.sandbox = Some("docker.io/library/sandbox:1".into());
    let mut lab = Lab::start(options);
    lab.start_registry();
    BaseImage::busybox().push(&lab.registry(), "library/busybox", "latest");
    host_base(&["git"]).push(&lab.registry(), "library/host", "1");
    lab.start_daemon();
    let pause =
        lab.context("pause", &[("Dockerfile", "FROM busybox\nENTRYPOINT [\"sleep\", \"600\"]\n")]);
    shipway_integration::build(&lab, "sandbox:1", &pause, &[]).ok();
    image_of_us(&lab, "node", "host:1", "shipway-node:1");
    assert!(lab.stop_daemon(), "the daemon had to be killed");

    let _shared = Shared::new(lab.dir());
    let (node, base) = (Node(&lab), base());
    let container = container(&node, &base);
    let cri = Cri::of(&lab);
    let logs = lab.dir().join("pod-logs");
    fs::create_dir(&logs).unwrap();
    let sandbox = wire::Sandbox {
        metadata: Some(wire::Metadata {
            name: "shipway".into(),
            uid: "1".into(),
            namespace: "shipway".into(),
        }),
        log_directory: logs.display().to_string(),
        linux: Some(wire::Linux {
            security: Some(wire::Security {
                namespaces: Some(wire::Namespaces { network: NODE, pid: NODE }),
                privileged: true,
            }),
        }),
    };
    let pod: wire::Id =
        cri.call("RunPodSandbox", wire::RunSandbox { config: Some(sandbox.clone()) });
    let create = wire::CreateContainer {
        sandbox: pod.id.clone(),
        config: Some(container),
        sandbox_config: Some(sandbox),
    };
    let container: wire::Id = cri.call("CreateContainer", create);
    let _: wire::Nothing = cri.call("StartContainer", container.clone());

    // As kubelet probes it; buildctl finds the socket where it is in a pod.
    let socket = format!("unix://{}", node.of("/run/shipway/shipwayd.sock"));
    let probe = &base["DaemonSet"]["spec"]["template"]["spec"]["containers"][0]["readinessProbe"];
    let command: Vec<String> = probe["exec"]["command"]
        .as_array()
        .unwrap()
        .iter()
        .map(|word| word.as_str().unwrap().to_owned())
        .collect();
    let command = [&command[..1], &["--addr".to_owned(), socket.clone()], &command[1..]].concat();
    wait_for("the pod to be ready", Duration::from_secs(60), || {
        let probe = wire::ExecSync {
            container: container.id.clone(),
            command: command.clone(),
            timeout: 10,
        };
        let said = || fs::read_to_string(logs.join("shipwayd.log")).unwrap_or_default();
        let done: wire::ExecDone =
            cri.try_call("ExecSync", probe).map_err(|e| format!("{e}\n{}", said()))?;
        if done.code == 0 { Ok(()) } else { Err(format!("{done:?}\n{}", said())) }
    });
    // Files of the context, a cache of the daemon's and what a step leaves reach steps on the node.
    let text = "FROM scratch\nCOPY busybox /bin/sh\n\
                RUN --mount=type=cache,target=/cache echo in a pod > /cache/word\n\
                RUN --mount=type=cache,target=/cache read word < /cache/word && echo $word > /word\n\
                RUN read word < /word && [ \"$word\" = 'in a pod' ]\n";
    let context = lab.context("in-a-pod", &[("Dockerfile", text)]);
    fs::copy("/bin/busybox", context.join("busybox")).unwrap();
    run(Command::new(built("shipway"))
        .args(["--addr", &socket, "build", "--progress", "plain", "--tag", "pod:1"])
        .arg(&context))
    .ok();
    wait_for("CRI to list the image", Duration::from_secs(10), || {
        let images: wire::Images = cri.call("ListImages", wire::Nothing {});
        let tags: Vec<String> = images.images.into_iter().flat_map(|i| i.tags).collect();
        let is_there = tags.iter().any(|t| t == "docker.io/library/pod:1");
        if is_there { Ok(()) } else { Err(format!("{tags:?}")) }
    });
    for method in ["StopPodSandbox", "RemovePodSandbox"] {
        wait_for(method, Duration::from_secs(60), || {
            cri.try_call::<wire::Nothing>(method, pod.clone()).map_err(|e| e.to_string())
        });
    }
}
