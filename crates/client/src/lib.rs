//! The client's end of BuildKit's API: connect, ask, build, and serve a session while a build runs
//! (rows `ctl.*`, `ses.*`, `cb.*`).
//!
//! - [`Client`]: a connection to a daemon, with a method per question; [`Location`]: where a daemon
//!   is.
//! - [`Client::build`] with [`SolveOptions`]: one `Control.Solve` with a session that offers the
//!   caller's directories, files to write, credentials, secrets and agents, and the build's
//!   [`Status`] events as they come.
//! - [`Client::ask`]: the same, for a question that a frontend answers instead of building.
//! - [`Client::hold`]: a build whose [`Held`] result other builds go on from; [`Client::share`]:
//!   directories that several builds read.
//! - [`Client::debug`]: a build that stays open when it fails, as a [`DebugBuild`], whose failed
//!   [`Step`] can be entered and looked into.
//! - [`WorkerInfo`], [`UsageInfo`], [`Status`] and the like: answers as plain data that serialize
//!   as Go's client prints them.
//!
//! Nothing here reads a command line, draws progress, or knows a Dockerfile; no protobuf type gets
//! out.
//!
//! Dependencies worth a word: `base64` decodes the passwords in Docker's configuration;
//! `prost-types` has the wire's times;
//! `ssh-key` reads OpenSSH's key files and `tokio-rustls` has what signs with them.

mod build;
mod client;
mod debug;
mod driven;
mod held;
mod history;
mod layout;
mod location;
mod model;
mod policy;
mod question;
mod reconnect;
mod session;
mod status;
mod token;
mod trace;

pub use build::{CacheEntry, Definition, Export, Outcome, SolveOptions, Target};
pub use client::{Client, ConnectOptions, PruneOptions};
pub use debug::{
    BuildState, DebugBuild, DebugContainer, DebugProcess, Event, FileEntry, Invocation, Place,
    ProcessInput, Step, StepMount, failed_step,
};
pub use held::{Held, HeldState, SharedDirs};
pub use history::{
    HistoryBlob, HistoryEvent, HistoryKind, HistoryQuery, HistoryRecord, HistoryResult,
};
pub use location::Location;
pub use model::{CdiDevice, DaemonInfo, DaemonVersion, PruneInfo, UsageInfo, WorkerInfo};
pub use policy::Policy;
pub use question::Answer;
pub use session::{
    FileTarget, KeyRing, LocalDirs, MAX_SECRET, SecretSource, Secrets, SshAgents, SshSource,
    Uploads, shared_key,
};
pub use shipway_dockerconfig::{AuthTls, DockerConfig};
pub use shipway_grpc::ClientTls;
pub use status::{
    CacheMiss, Lines, Log, ProgressGroup, SourceText, Status, Time, Vertex, VertexStatus, Warning,
};
pub use token::TokenSource;

/// An id for a build that no other has; for callers that need it before the build begins.
pub fn new_reference() -> shipway_fault::Result<String> {
    shipway_host::random_id()
}

/// The digest that the OCI layout in `dir` has under `tag`; without one the latest, or the only one
/// there is.
pub fn layout_digest(
    dir: &std::path::Path,
    tag: Option<&str>,
) -> shipway_fault::Result<Option<String>> {
    match (layout::find(dir, tag.unwrap_or("latest"))?, tag) {
        (None, None) => layout::only(dir),
        (found, _) => Ok(found),
    }
}
