//! Ports between frontends and the engine.
//!
//! A [`Frontend`] turns options and inputs into a [`FrontendResult`], calling back into the engine
//! through a [`Bridge`]. The bridge is the same for the in-house Dockerfile frontend, for clients
//! that drive a build themselves (crate `gateway` carries it over LLBBridge), and for frontends out
//! of images, which run in containers.

mod container;
mod sbom;
mod table;

pub use container::{Container, ContainerMount, ContainerProcess, ContainerRequest};

use bytes::Bytes;
use futures::{FutureExt as _, future::BoxFuture};
use shipway_attest::Attestation;
use shipway_fault::{Fault, Result, SourceFile, Span};
use shipway_llb::{Definition, ResolveOptions, SourceFacts, SourceOp, SourcePolicy};
use shipway_oci::{Digest, Platform};
use std::{collections::BTreeMap, sync::Arc};

pub use sbom::{Scan, Scanner};
pub use table::{ContextFiles, Frontend, Frontends, NamedContexts};

/// Options of a frontend (`FrontendAttrs`; rows `dfo.*`).
pub type FrontendOptions = BTreeMap<String, String>;

/// A lazily solved filesystem state, as a frontend holds it. Nothing runs until it is read,
/// evaluated or exported.
pub trait BuildRef: Send + Sync {
    /// Identity on the wire.
    fn id(&self) -> &str;

    /// The definition it came from.
    fn definition(&self) -> Option<&Definition>;

    /// Solves it.
    fn evaluate(&self) -> BoxFuture<'_, Result<()>>;

    /// Reads a file, or a range of it: offset and length, length 0 for the rest (row
    /// `gw.readfile`).
    fn read_file<'a>(
        &'a self,
        path: &'a str,
        range: Option<(u64, u64)>,
    ) -> BoxFuture<'a, Result<Bytes>>;

    /// Lists a directory; `include` is a pattern for names (row `gw.readdir`).
    fn read_dir<'a>(
        &'a self,
        path: &'a str,
        include: Option<&'a str>,
    ) -> BoxFuture<'a, Result<Vec<FileStat>>>;

    /// One entry (row `gw.statfile`).
    fn stat_file<'a>(&'a self, path: &'a str) -> BoxFuture<'a, Result<FileStat>>;
}

/// A file's metadata as fsutil has it (row `cb.fsutil.stat`): the mode is Go's `FileMode`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct FileStat {
    pub path: String,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub size: i64,
    /// Nanoseconds since the epoch.
    pub mod_time: i64,
    pub linkname: String,
    pub dev_major: i64,
    pub dev_minor: i64,
    pub xattrs: BTreeMap<String, Vec<u8>>,
}

/// An attestation whose content is a file or directory of a state.
pub type BuildAttestation = Attestation<Option<Arc<dyn BuildRef>>>;

/// What a frontend returns (row `gw.result`). A state of `None` is scratch.
#[derive(Clone, Default)]
pub struct FrontendResult {
    /// The state, where there is one for all platforms.
    pub single: Option<Option<Arc<dyn BuildRef>>>,
    /// States by platform id, in the order of `refs.platforms`.
    pub map: BTreeMap<String, Option<Arc<dyn BuildRef>>>,
    /// Metadata such as `containerimage.config` and `refs.platforms`.
    pub metadata: BTreeMap<String, Vec<u8>>,
    /// What is said of them, by platform id.
    pub attestations: BTreeMap<String, Vec<BuildAttestation>>,
    /// What can say more about a failure of these states.
    pub explain: Option<Arc<dyn Explain>>,
}

/// What a frontend knows about failures of its result: states are solved after it has returned, and
/// only it knows why they ask for what they ask for. The engine calls it with a failure whose
/// details name the vertex and its lines. It must hold no bridge, since the build would then hold
/// itself; it gets one for the call.
pub trait Explain: Send + Sync {
    /// The same fault, with hints if there are any to give.
    fn explain<'a>(&'a self, bridge: &'a dyn Bridge, fault: Fault) -> BoxFuture<'a, Fault>;
}

impl FrontendResult {
    /// A result of one state without metadata.
    pub fn of(state: Option<Arc<dyn BuildRef>>) -> Self {
        Self { single: Some(state), ..Self::default() }
    }

    /// All its states, those with attestations too.
    pub fn states(&self) -> impl Iterator<Item = &Arc<dyn BuildRef>> {
        let own = self.single.iter().flatten().chain(self.map.values().flatten());
        own.chain(self.attestations.values().flatten().filter_map(|a| a.content.as_ref()))
    }
}

/// A request to solve (row `gw.solve`).
#[derive(Clone, Default)]
pub struct SolveRequest {
    /// What to solve; `None` with no frontend gives scratch.
    pub definition: Option<Definition>,
    /// Frontend to run instead.
    pub frontend: String,
    /// Its options.
    pub options: FrontendOptions,
    /// Its inputs.
    pub inputs: BTreeMap<String, Definition>,
    /// Whether to solve now rather than when needed.
    pub evaluate: bool,
    /// Rules for its sources, besides those of the build.
    pub policies: Vec<SourcePolicy>,
    /// Caches that may have results.
    pub cache_imports: Vec<CacheImport>,
}

/// A cache to import, by kind and attributes (row `gw.solve`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CacheImport {
    /// `registry`, `local` or another one.
    pub kind: String,
    /// Attributes.
    pub attrs: BTreeMap<String, String>,
}

/// Metadata of a source (row `gw.resolvesrc`).
#[derive(Clone, Debug, Default)]
pub struct SourceMeta {
    /// The source as resolved.
    pub source: SourceOp,
    /// What is known of it.
    pub facts: SourceFacts,
}

/// A request for a source's metadata.
#[derive(Clone, Debug, Default)]
pub struct SourceRequest {
    /// Identifier with scheme, such as `docker-image://docker.io/library/busybox:latest`.
    pub identifier: String,
    /// Attributes as on a source op.
    pub attrs: BTreeMap<String, String>,
    /// Platform; `None` is the worker's.
    pub platform: Option<Platform>,
    /// Name for the progress vertex; empty for a generic one.
    pub log_name: String,
    /// What is wanted, and how an image is resolved.
    pub options: ResolveOptions,
    /// Whether the image's config is not wanted.
    pub no_config: bool,
    /// Rules for it, besides those of the build.
    pub policies: Vec<SourcePolicy>,
}

/// A warning a frontend gives (row `gw.warn`).
#[derive(Clone, Debug, Default)]
#[allow(missing_docs)]
pub struct Warning {
    /// Vertex it belongs to.
    pub vertex: Option<Digest>,
    pub level: i64,
    pub short: String,
    pub detail: Vec<String>,
    pub url: String,
    pub file: Option<Arc<SourceFile>>,
    pub spans: Vec<Span>,
}

/// A worker as frontends know it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Worker {
    pub id: String,
    pub labels: BTreeMap<String, String>,
    /// Platforms it can run, native first.
    pub platforms: Vec<Platform>,
    /// Name of the program.
    pub package: String,
    /// Version of the API that it has.
    pub version: String,
    /// Version of the program itself.
    pub revision: String,
}

/// What the engine offers a frontend. One bridge belongs to one build.
pub trait Bridge: Send + Sync {
    /// The worker that runs this.
    fn worker(&self) -> Worker {
        Worker { platforms: self.platforms(), ..Worker::default() }
    }

    /// Options of the build.
    fn options(&self) -> &FrontendOptions;

    /// Session of the client that asked for the build.
    fn session(&self) -> &str;

    /// Platforms the worker can run, native first.
    fn platforms(&self) -> Vec<Platform>;

    /// Solves a definition or runs another frontend.
    fn solve(&self, request: SolveRequest) -> BoxFuture<'_, Result<FrontendResult>>;

    /// Metadata of a source; images with config.
    fn resolve_source(&self, request: SourceRequest) -> BoxFuture<'_, Result<SourceMeta>>;

    /// Inputs by name (row `gw.inputs`).
    fn inputs(&self) -> BoxFuture<'_, Result<BTreeMap<String, Definition>>>;

    /// Names in the directory `dir` (empty for the top) of a client's directory, without
    /// transferring anything; for suggestions only, so an empty answer is fine.
    fn local_names<'a>(
        &'a self,
        local: &'a str,
        session: &'a str,
        dir: &'a str,
    ) -> BoxFuture<'a, Result<Vec<String>>> {
        async move {
            let _ = (local, session, dir);
            Ok(Vec::new())
        }
        .boxed()
    }

    /// The states that failed operations left, for looking into: their ids are among the details
    /// of `fault`.
    fn failed_states(&self, fault: &Fault) -> Vec<Arc<dyn BuildRef>> {
        let _ = fault;
        Vec::new()
    }

    /// A container over states of the build.
    fn new_container(
        &self,
        request: ContainerRequest,
    ) -> BoxFuture<'_, Result<Arc<dyn Container>>> {
        async move { Err(Fault::unimplemented(format_args!("container {}", request.name))) }.boxed()
    }

    /// Shows a warning on the build's status.
    fn warn(&self, warning: Warning) -> BoxFuture<'_, Result<()>>;
}
