//! Kubernetes' CRI, as much of it as tests speak.

use prost::Message;
use shipway_testkit::Lab;
use std::path::Path;
use tonic::{client::Grpc, transport::Channel};
use tonic_prost::ProstCodec;

/// The parts of Kubernetes' CRI (`runtime.v1`) that a pod of one container takes; field numbers are
/// its own.
#[allow(missing_docs)]
pub mod wire {
    use prost::Message;

    #[derive(Clone, PartialEq, Message)]
    pub struct Nothing {}

    /// An image by its name, also in answers.
    #[derive(Clone, PartialEq, Message)]
    pub struct PullImage {
        #[prost(message, optional, tag = "1")]
        pub image: Option<Id>,
    }

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
        #[prost(string, tag = "1")]
        pub id: String,
        #[prost(string, repeated, tag = "2")]
        pub tags: Vec<String>,
        #[prost(bool, tag = "8")]
        pub pinned: bool,
    }

    #[derive(Clone, PartialEq, Message)]
    pub struct RemoveImage {
        #[prost(message, optional, tag = "1")]
        pub image: Option<Id>,
    }

    #[derive(Clone, PartialEq, Message)]
    pub struct Containers {
        #[prost(message, repeated, tag = "1")]
        pub containers: Vec<ListedContainer>,
    }

    #[derive(Clone, PartialEq, Message)]
    pub struct ListedContainer {
        /// Id of its image.
        #[prost(string, tag = "5")]
        pub image_id: String,
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
        #[prost(int32, tag = "2")]
        pub pid: i32,
    }

    #[derive(Clone, PartialEq, Message)]
    pub struct Mount {
        #[prost(string, tag = "1")]
        pub container_path: String,
        #[prost(string, tag = "2")]
        pub host_path: String,
        #[prost(bool, tag = "3")]
        pub readonly: bool,
        /// 0 for private, 1 from the host to the container, 2 both ways.
        #[prost(int32, tag = "5")]
        pub propagation: i32,
    }

    #[derive(Clone, PartialEq, Message)]
    pub struct ExecSync {
        #[prost(string, tag = "1")]
        pub container: String,
        #[prost(string, repeated, tag = "2")]
        pub command: Vec<String>,
        #[prost(int64, tag = "3")]
        pub timeout: i64,
    }

    #[derive(Clone, PartialEq, Message)]
    pub struct ExecDone {
        #[prost(bytes = "vec", tag = "1")]
        pub stdout: Vec<u8>,
        #[prost(bytes = "vec", tag = "2")]
        pub stderr: Vec<u8>,
        #[prost(int32, tag = "3")]
        pub code: i32,
    }

    #[derive(Clone, PartialEq, Message)]
    pub struct Security {
        #[prost(message, optional, tag = "1")]
        pub namespaces: Option<Namespaces>,
        #[prost(bool, tag = "6")]
        pub privileged: bool,
    }

    #[derive(Clone, PartialEq, Message)]
    pub struct Linux {
        #[prost(message, optional, tag = "2")]
        pub security: Option<Security>,
    }

    #[derive(Clone, PartialEq, Message)]
    pub struct ContainerSecurity {
        #[prost(bool, tag = "2")]
        pub privileged: bool,
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
        #[prost(string, repeated, tag = "4")]
        pub args: Vec<String>,
        #[prost(message, repeated, tag = "7")]
        pub mounts: Vec<Mount>,
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

/// The mode of a namespace that is the node's own.
pub const NODE: i32 = 2;

/// A connection to containerd's CRI.
pub struct Cri(tokio::runtime::Runtime, Channel);

impl Cri {
    /// That of the lab's containerd.
    pub fn of(lab: &Lab) -> Self {
        Self::at(&lab.containerd_socket())
    }

    /// That behind a socket.
    pub fn at(socket: &Path) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let address = format!("unix://{}", socket.display());
        let channel = runtime
            .block_on(tonic::transport::Endpoint::from_shared(address).unwrap().connect())
            .unwrap();
        Self(runtime, channel)
    }

    /// Calls a method, which has to succeed.
    #[track_caller]
    pub fn call<A: Message + Default + 'static>(
        &self,
        method: &str,
        request: impl Message + 'static + Default,
    ) -> A {
        self.try_call(method, request).unwrap_or_else(|e| panic!("{method}: {e}"))
    }

    /// Calls a method.
    pub fn try_call<A: Message + Default + 'static>(
        &self,
        method: &str,
        request: impl Message + 'static + Default,
    ) -> Result<A, tonic::Status> {
        self.try_call_of("runtime.v1", method, request)
    }

    /// Calls a method of a version of CRI.
    pub fn try_call_of<A: Message + Default + 'static>(
        &self,
        version: &str,
        method: &str,
        request: impl Message + 'static + Default,
    ) -> Result<A, tonic::Status> {
        let images = ["ListImages", "ImageFsInfo", "PullImage", "ImageStatus", "RemoveImage"];
        let service = if images.contains(&method) { "ImageService" } else { "RuntimeService" };
        let path =
            format!("/{version}.{service}/{method}").parse::<http::uri::PathAndQuery>().unwrap();
        self.0.block_on(async {
            let mut grpc = Grpc::new(self.1.clone());
            grpc.ready().await.unwrap();
            grpc.unary(tonic::Request::new(request), path, ProstCodec::default())
                .await
                .map(tonic::Response::into_inner)
        })
    }
}
