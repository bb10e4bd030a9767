//! Containers that a frontend asks the engine for (rows `gw.ctr.*`, `gw.exec`).

use crate::{BuildRef, FileStat};
use bytes::Bytes;
use futures::future::BoxFuture;
use shipway_executor::{ExitStatus, ProcessIo};
use shipway_fault::Result;
use shipway_llb::{HostIp, Mount, NetMode, SecretEnv, SecurityMode};
use std::sync::Arc;

/// A mount of a container; its input is `state`, whatever index it has.
#[derive(Clone)]
pub struct ContainerMount {
    /// Where and how.
    pub mount: Mount,
    /// What it shows; `None` is scratch.
    pub state: Option<Arc<dyn BuildRef>>,
}

/// A container asked for.
#[derive(Clone, Default)]
pub struct ContainerRequest {
    /// How its user calls it.
    pub name: String,
    /// Its mounts; one has the destination `/`.
    pub mounts: Vec<ContainerMount>,
    /// Its network.
    pub network: NetMode,
    /// Its host name; empty for the default.
    pub hostname: String,
    /// Lines of its `/etc/hosts`.
    pub extra_hosts: Vec<HostIp>,
}

/// A process to start in a container.
#[derive(Clone, Debug, Default)]
#[allow(missing_docs)]
pub struct ContainerProcess {
    pub args: Vec<String>,
    pub env: Vec<String>,
    pub secret_env: Vec<SecretEnv>,
    pub cwd: String,
    pub user: String,
    /// Whether its input and output are a terminal.
    pub tty: bool,
    pub security: SecurityMode,
    pub remove_mount_stubs_recursive: bool,
}

/// A container. Its processes end when it is dropped.
pub trait Container: Send + Sync {
    /// Starts a process. The end of the first one is the end of all. The future resolves when the
    /// process has ended, which may also be because it could not start; it need not be awaited.
    fn start(
        &self,
        process: ContainerProcess,
        io: ProcessIo,
    ) -> BoxFuture<'static, Result<ExitStatus>>;

    /// Reads a file of mount number `mount`, or a range of it: offset and length.
    fn read_file<'a>(
        &'a self,
        mount: usize,
        path: &'a str,
        range: Option<(u64, u64)>,
    ) -> BoxFuture<'a, Result<Bytes>>;

    /// Lists a directory of mount number `mount`; `include` is a pattern for names.
    fn read_dir<'a>(
        &'a self,
        mount: usize,
        path: &'a str,
        include: Option<&'a str>,
    ) -> BoxFuture<'a, Result<Vec<FileStat>>>;

    /// One entry of mount number `mount`.
    fn stat_file<'a>(&'a self, mount: usize, path: &'a str) -> BoxFuture<'a, Result<FileStat>>;

    /// Ends all processes and gives the mounts back; an error if there were processes to end.
    fn release(&self) -> BoxFuture<'_, Result<()>>;
}
