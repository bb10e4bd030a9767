//! What sources need of the clients attached to a build: credentials, secrets, directories. A
//! narrow port, so that sources are tested without sessions; `session.rs` implements it.

use async_trait::async_trait;
use shipway_fault::{Fault, Result};
use shipway_filesync::{FileSyncRequest, PacketStream};
use shipway_registry::CredentialSource;
use shipway_session::{ClientStore, SessionId, Upload};
use std::{
    path::{Path, PathBuf},
    sync::Arc,
};
use tokio::task::JoinHandle;

/// A client that has directories.
#[async_trait]
pub(crate) trait ClientDirectory: Send + Sync {
    /// The client's own name for itself, stable over its builds; empty if it gives none.
    fn shared_key(&self) -> &str;

    /// Starts the transfer.
    async fn open(&self, request: &FileSyncRequest) -> Result<PacketStream>;
}

/// The clients of a build.
#[async_trait]
pub(crate) trait ClientServices: Send + Sync + 'static {
    /// Their credentials for registries.
    fn credentials(&self) -> Arc<dyn CredentialSource>;

    /// The first secret of this name; `None` if no client has it.
    async fn secret(&self, id: &str) -> Result<Option<Vec<u8>>>;

    /// Sessions that have directories: the one asked for, if it is attached, and then the others.
    async fn directories(
        &self,
        session: Option<&SessionId>,
    ) -> Result<Vec<Arc<dyn ClientDirectory>>>;

    /// A socket that leads to a client's SSH agent.
    async fn ssh_agent(&self, id: &str) -> Result<SshAgent>;

    /// A content store of a client: of the session asked for, or of the first that has one.
    async fn client_store(&self, session: Option<&SessionId>, id: &str) -> Result<ClientStore> {
        let _ = session;
        Err(Fault::not_found(format!("no attached client has the content store {id:?}")))
    }

    /// What a client sends for the address `http://<host><path>`.
    async fn upload(&self, host: &str, path: &str) -> Result<Upload> {
        Err(Fault::not_found(format!("no attached client uploads http://{host}{path}")))
    }

    /// Identity of the build's first session, part of keys that must not outlive it.
    fn session_id(&self) -> Option<SessionId>;
}

/// A socket on this machine that leads to a client's SSH agent, until dropped.
pub struct SshAgent {
    socket: PathBuf,
    serving: JoinHandle<()>,
    _dir: tempfile::TempDir,
}

impl SshAgent {
    pub(crate) fn new(dir: tempfile::TempDir, socket: PathBuf, serving: JoinHandle<()>) -> Self {
        Self { socket, serving, _dir: dir }
    }

    /// Where the socket is.
    pub fn socket(&self) -> &Path {
        &self.socket
    }
}

impl Drop for SshAgent {
    fn drop(&mut self) {
        self.serving.abort();
    }
}
