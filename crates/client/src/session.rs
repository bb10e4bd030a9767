//! The client's side of a session: a gRPC server inside a `Control.Session` stream (rows
//! `ctl.session`, `ses.*`, `cb.*`).
//!
//! What a caller offers becomes [`Services`]; [`Services::attach`] opens the stream and serves them
//! until the handle is dropped.

mod auth;
mod files;
mod health;
mod keys;
mod secrets;
mod seeds;
mod ssh;
pub(crate) mod store;
mod targets;
mod upload;

use std::{collections::BTreeMap, path::Path};

use shipway_dockerconfig::DockerConfig;
use shipway_fault::{Fault, Result};
use shipway_grpc::{Duplex, TunnelPeer, fault_of, frames, headers, serve_tunnel};
use shipway_oci::Hasher;
use shipway_proto::moby::buildkit::v1::BytesMessage;
use tokio_util::task::AbortOnDropHandle;
use tonic::{
    Request,
    metadata::{Ascii, MetadataMap, MetadataValue},
    service::RoutesBuilder,
};

pub use self::{
    files::LocalDirs,
    keys::KeyRing,
    secrets::{MAX_SECRET, SecretSource, Secrets},
    ssh::{SshAgents, SshSource},
    targets::FileTarget,
    upload::Uploads,
};
pub(crate) use self::{
    store::Stores,
    targets::{Receives, Targets},
};
use crate::Client;

/// Everything that a session offers.
pub(crate) struct Services {
    pub(crate) dirs: LocalDirs,
    pub(crate) targets: Targets,
    pub(crate) stores: Stores,
    pub(crate) docker: Option<DockerConfig>,
    pub(crate) secrets: Secrets,
    pub(crate) ssh: SshAgents,
    pub(crate) uploads: Uploads,
}

/// A session that is being served.
pub(crate) struct Attached {
    pub(crate) id: String,
    server: AbortOnDropHandle<Result<()>>,
}

impl Attached {
    /// Waits for the session to end, which while a build runs means that the daemon has gone.
    pub(crate) async fn ended(&mut self) -> Fault {
        match (&mut self.server).await {
            Ok(Ok(())) => Fault::unavailable("the daemon ended the session"),
            Ok(Err(fault)) => fault,
            Err(error) => Fault::internal(format!("serve the session: {error}")),
        }
    }
}

impl Services {
    /// The server, and the methods it announces: a daemon asks only for what is announced.
    fn routes(self) -> (RoutesBuilder, Vec<&'static str>) {
        let mut routes = RoutesBuilder::default();
        let mut methods = vec!["/grpc.health.v1.Health/Check"];
        routes.add_service(health::service());
        if !self.dirs.is_empty() {
            routes.add_service(self.dirs.service());
            methods.push("/moby.filesync.v1.FileSync/DiffCopy");
        }
        if !self.targets.is_empty() {
            routes.add_service(self.targets.service());
            methods.push("/moby.filesync.v1.FileSend/DiffCopy");
        }
        if !self.stores.is_empty() {
            methods.extend(self.stores.methods());
            routes.add_service(self.stores.service());
        }
        if let Some(docker) = self.docker {
            routes.add_service(auth::service(docker));
            methods.extend(auth::METHODS);
        }
        if !self.secrets.is_empty() {
            routes.add_service(self.secrets.service());
            methods.push("/moby.buildkit.secrets.v1.Secrets/GetSecret");
        }
        if !self.ssh.is_empty() {
            routes.add_service(self.ssh.service());
            methods.extend([
                "/moby.sshforward.v1.SSH/CheckAgent",
                "/moby.sshforward.v1.SSH/ForwardAgent",
            ]);
        }
        if !self.uploads.is_empty() {
            routes.add_service(self.uploads.service());
            methods.push("/moby.upload.v1.Upload/Pull");
        }
        (routes, methods)
    }

    /// Opens a session with `client` and serves it.
    pub(crate) async fn attach(self, client: &Client, shared_key: &str) -> Result<Attached> {
        let id = shipway_host::random_id()?;
        let (routes, methods) = self.routes();
        let (sink, stream) = frames::<BytesMessage>();
        let mut call = Request::new(stream);
        announce(call.metadata_mut(), &id, shared_key, &methods)?;
        let answers = client
            .control()
            .session(call)
            .await
            .map_err(|s| fault_of(&s).context("open a session"))?
            .into_inner();
        let duplex = Duplex::new(answers, sink);
        let server = AbortOnDropHandle::new(shipway_task::spawn(
            "serve the session",
            serve_tunnel(duplex, routes.routes(), TunnelPeer::Daemon),
        ));
        Ok(Attached { id, server })
    }
}

fn announce(
    metadata: &mut MetadataMap,
    id: &str,
    shared_key: &str,
    methods: &[&'static str],
) -> Result<()> {
    let value = |text: &str| {
        text.parse::<MetadataValue<Ascii>>().map_err(|_| {
            Fault::internal(format!("{text:?} cannot be sent in a session's metadata"))
        })
    };
    metadata.insert(headers::SESSION_ID, value(id)?);
    metadata.insert(headers::SESSION_NAME, value("")?);
    metadata.insert(headers::SESSION_SHARED_KEY, value(shared_key)?);
    for method in methods {
        metadata.append(headers::SESSION_METHOD, MetadataValue::from_static(method));
    }
    Ok(())
}

/// The key under which a daemon may keep what it received of these directories: stable for the same
/// directories of the same machine, so that the next build sends only what changed.
pub fn shared_key<'a>(dirs: impl IntoIterator<Item = (&'a str, &'a Path)>) -> String {
    let machine = ["/etc/machine-id", "/proc/sys/kernel/hostname"]
        .iter()
        .find_map(|path| std::fs::read_to_string(path).ok());
    let mut hasher = Hasher::new();
    hasher.update(machine.unwrap_or_default().trim());
    let dirs: BTreeMap<&str, &Path> = dirs.into_iter().collect();
    for (name, dir) in dirs {
        let dir = dir.canonicalize().unwrap_or_else(|_| dir.to_owned());
        hasher.update([0]);
        hasher.update(name);
        hasher.update([0]);
        hasher.update(dir.as_os_str().as_encoded_bytes());
    }
    hasher.finish().hex()
}
