//! Kubernetes' side of the house: what is built in its namespace is an image of CRI's at once, and
//! a pod runs it.

#![allow(clippy::unwrap_used)]

use prost::Message;
use shipway_integration::{build, on_all};
use shipway_testkit::{BaseImage, Flavour, Lab, LabOptions, wait_for};
use std::time::Duration;
use tonic::{client::Grpc, transport::Channel};
use tonic_prost::ProstCodec;

/// The parts of Kubernetes' CRI (`runtime.v1`) that a pod of one container takes; field numbers are
/// its own.
mod wire {
    use prost::Message;

    #[derive(Clone, PartialEq, Message)]
    pub struct Nothing {}

    #[derive(Clone, PartialEq, Message)]
    pub struct FileSystems {
        #[prost(message, repeated, tag = "1")]
        pub image: Vec<FileSystem>,
    }

    #[derive(Clone, PartialEq, Message)]
    pub struct FileSystem {
        #[prost(message, optional, tag = "2")]
        pub id: Option<MountPoint>,
        #[prost(message, optional, tag = "3")]
        pub used_bytes: Option<Number>,
    }

    #[derive(Clone, PartialEq, Message)]
    pub struct MountPoint {
        #[prost(string, tag = "1")]
        pub path: String,
    }

    #[derive(Clone, PartialEq, Message)]
    pub struct Number {
        #[prost(uint64, tag = "1")]
        pub value: u64,
    }

    #[derive(Clone, PartialEq, Message)]
    pub struct Images {
        #[prost(message, repeated, tag = "1")]
        pub images: Vec<Image>,
    }

    #[derive(Clone, PartialEq, Message)]
    pub struct Image {
        #[prost(string, repeated, tag = "2")]
        pub tags: Vec<String>,
    }

    /// Name, and where it applies uid and namespace.
    #[derive(Clone, PartialEq, Message)]
    pub struct Metadata {
        #[prost(string, tag = "1")]
        pub name: String,
        #[prost(string, tag = "2")]
        pub uid: String,
        #[prost(string, tag = "3")]
        pub namespace: String,
    }

    #[derive(Clone, PartialEq, Message)]
    pub struct ContainerMetadata {
        #[prost(string, tag = "1")]
        pub name: String,
    }

    #[derive(Clone, PartialEq, Message)]
    pub struct Namespaces {
        #[prost(int32, tag = "1")]
        pub network: i32,
    }

    #[derive(Clone, PartialEq, Message)]
    pub struct Security {
        #[prost(message, optional, tag = "1")]
        pub namespaces: Option<Namespaces>,
    }

    #[derive(Clone, PartialEq, Message)]
    pub struct Linux {
        #[prost(message, optional, tag = "2")]
        pub security: Option<Security>,
    }

    #[derive(Clone, PartialEq, Message)]
    pub struct ContainerSecurity {
        #[prost(message, optional, tag = "3")]
        pub namespaces: Option<Namespaces>,
    }

    #[derive(Clone, PartialEq, Message)]
    pub struct ContainerLinux {
        #[prost(message, optional, tag = "2")]
        pub security: Option<ContainerSecurity>,
    }

    #[derive(Clone, PartialEq, Message)]
    pub struct Sandbox {
        #[prost(message, optional, tag = "1")]
        pub metadata: Option<Metadata>,
        #[prost(string, tag = "3")]
        pub log_directory: String,
        #[prost(message, optional, tag = "8")]
        pub linux: Option<Linux>,
    }

    #[derive(Clone, PartialEq, Message)]
    pub struct RunSandbox {
        #[prost(message, optional, tag = "1")]
        pub config: Option<Sandbox>,
    }

    /// A sandbox or container by its id, in requests and answers.
    #[derive(Clone, PartialEq, Message)]
    pub struct Id {
        #[prost(string, tag = "1")]
        pub id: String,
    }

    #[derive(Clone, PartialEq, Message)]
    pub struct Container {
        #[prost(message, optional, tag = "1")]
        pub metadata: Option<ContainerMetadata>,
        #[prost(message, optional, tag = "2")]
        pub image: Option<Id>,
        #[prost(string, tag = "11")]
        pub log_path: String,
        #[prost(message, optional, tag = "15")]
        pub linux: Option<ContainerLinux>,
    }

    #[derive(Clone, PartialEq, Message)]
    pub struct CreateContainer {
        #[prost(string, tag = "1")]
        pub sandbox: String,
        #[prost(message, optional, tag = "2")]
        pub config: Option<Container>,
        #[prost(message, optional, tag = "3")]
        pub sandbox_config: Option<Sandbox>,
    }
}

/// The namespace mode of the node itself.
const NODE: i32 = 2;

struct Cri(tokio::runtime::Runtime, Channel);

impl Cri {
    fn of(lab: &Lab) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let address = format!("unix://{}", lab.containerd_socket().display());
        let channel = runtime
            .block_on(tonic::transport::Endpoint::from_shared(address).unwrap().connect())
            .unwrap();
        Self(runtime, channel)
    }

    #[track_caller]
    fn call<A: Message + Default + 'static>(
        &self,
        method: &str,
        request: impl Message + 'static + Default,
    ) -> A {
        self.try_call(method, request).unwrap_or_else(|e| panic!("{method}: {e}"))
    }

    fn try_call<A: Message + Default + 'static>(
        &self,
        method: &str,
        request: impl Message + 'static + Default,
    ) -> Result<A, tonic::Status> {
        let service = if ["ListImages", "ImageFsInfo"].contains(&method) {
            "ImageService"
        } else {
            "RuntimeService"
        };
        let path =
            format!("/runtime.v1.{service}/{method}").parse::<http::uri::PathAndQuery>().unwrap();
        self.0.block_on(async {
            let mut grpc = Grpc::new(self.1.clone());
            grpc.ready().await.unwrap();
            grpc.unary(tonic::Request::new(request), path, ProstCodec::default())
                .await
                .map(tonic::Response::into_inner)
        })
    }
}

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
    let node = wire::Namespaces { network: NODE };
    let sandbox = wire::Sandbox {
        metadata: Some(wire::Metadata {
            name: "pod".into(),
            uid: "1".into(),
            namespace: "default".into(),
        }),
        log_directory: logs.display().to_string(),
        linux: Some(wire::Linux {
            security: Some(wire::Security { namespaces: Some(node.clone()) }),
        }),
    };
    let pod: wire::Id =
        cri.call("RunPodSandbox", wire::RunSandbox { config: Some(sandbox.clone()) });
    let container = wire::Container {
        metadata: Some(wire::ContainerMetadata { name: "app".into() }),
        image: Some(wire::Id { id: "docker.io/library/app:1".into() }),
        log_path: "app.log".into(),
        linux: Some(wire::ContainerLinux {
            security: Some(wire::ContainerSecurity { namespaces: Some(node) }),
        }),
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
