//! The port that exporters implement, and what they are given.

use async_trait::async_trait;
use futures::future::BoxFuture;
use parking_lot::Mutex;
use shipway_attest::Attestation;
use shipway_fault::Result;
use shipway_oci::{Descriptor, DiffId, ImageConfig, Platform};
use shipway_progress::Reporter;
use shipway_refs::ImmutableRef;
use shipway_session::{SessionGroup, SessionId};
use std::{collections::BTreeMap, sync::Arc};

/// Keys and values for the client (rows `ex.resp.*`).
pub type Response = BTreeMap<String, String>;

/// What an exporter did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Exported {
    /// What the client is answered.
    pub response: Response,
    /// The image that was written into the content store, for the history.
    pub written: Option<Descriptor>,
}

/// One platform's part of a result.
#[derive(Clone)]
pub struct ExportPlatform {
    /// Key in the result's metadata, such as `linux/amd64`.
    pub id: String,
    /// The platform.
    pub platform: Platform,
    /// The state; scratch has no layers.
    pub state: ImmutableRef,
}

/// A result to export.
#[derive(Clone)]
pub struct ExportInput {
    /// One entry per platform, in the order of `refs.platforms`.
    pub platforms: Vec<ExportPlatform>,
    /// Whether the frontend returned a map: an index is made and directories are split even for one
    /// entry (rows `ex.fs.split`, `df.arg.multi`).
    pub is_map: bool,
    /// Metadata of the frontend: `containerimage.config[/<platform>]` and others.
    pub metadata: BTreeMap<String, Vec<u8>>,
    /// Attestations of the platforms, by their ids.
    pub attestations: BTreeMap<String, Vec<ExportAttestation>>,
}

/// What the frontend says of `key` for the platform `id`, or for all of them.
pub(crate) fn metadata_of<'a>(
    metadata: &'a BTreeMap<String, Vec<u8>>,
    key: &str,
    id: &str,
) -> Option<&'a [u8]> {
    metadata.get(&format!("{key}/{id}")).or_else(|| metadata.get(key)).map(Vec::as_slice)
}

/// The layers of the base image of the platform `id`, as far as the frontend says.
pub(crate) fn base_layers(metadata: &BTreeMap<String, Vec<u8>>, id: &str) -> Vec<DiffId> {
    let base = metadata_of(metadata, "containerimage.base.config", id);
    let base = base.and_then(|json| serde_json::from_slice::<ImageConfig>(json).ok());
    base.map(|config| config.rootfs.diff_ids).unwrap_or_default()
}

/// An attestation to export.
pub type ExportAttestation = Attestation<Content>;

/// Makes a predicate when it is asked for: provenance says when everything was done.
pub type Maker = Arc<dyn Fn() -> BoxFuture<'static, Result<Vec<u8>>> + Send + Sync>;

/// Where an attestation's content is.
#[derive(Clone)]
pub enum Content {
    /// In a state, below the attestation's path.
    State(ImmutableRef),
    /// Made by the engine.
    Made(Maker),
}

/// The build that an export is for.
#[derive(Clone)]
pub struct ExportContext {
    /// The build's id.
    pub build: String,
    /// Which version of the defaults the client wants, as clients number them.
    pub compatibility: i64,
    /// Index of the exporter in the request: the id of its target in the client's session.
    pub index: usize,
    /// The session of the client that asked.
    pub session: SessionId,
    /// Clients that may give credentials.
    pub sessions: SessionGroup,
    /// Progress of the export's vertex.
    pub reporter: Reporter,
    /// What is left for the time when all exporters have succeeded.
    pub finalizers: Finalizers,
}

/// What exporters leave to be done when all of them have succeeded, beside the caches' export:
/// pushing (row `ex.img.push`).
#[derive(Clone, Default)]
pub struct Finalizers(Arc<Mutex<Vec<BoxFuture<'static, Result<()>>>>>);

impl Finalizers {
    /// Adds `work`, to be run after all others.
    pub fn push(&self, work: impl Future<Output = Result<()>> + Send + 'static) {
        self.0.lock().push(Box::pin(work));
    }

    /// The work so far, in order.
    pub fn take(&self) -> Vec<BoxFuture<'static, Result<()>>> {
        std::mem::take(&mut *self.0.lock())
    }
}

/// Is given each state of a build that is a part of what will be exported, lower ones first, as
/// soon as the build has made it.
pub type StateWatcher = Arc<dyn Fn(&ImmutableRef) + Send + Sync>;

/// Where an export goes that is not the client's own.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ExportTarget {
    /// A name of an image in containerd.
    Store(String),
    /// A name of an image in a registry.
    Push(String),
    /// A further namespace of containerd, which the configuration does not name.
    Namespace(String),
}

/// An exporter with its attributes checked.
#[async_trait]
pub trait Exporter: Send + Sync {
    /// Name of its progress vertex, such as `exporting to image`.
    fn name(&self) -> &str;

    /// Where the export goes, given what the frontend says with its result; before that is known
    /// (`None`), as far as the attributes say.
    fn targets(&self, metadata: Option<&BTreeMap<String, Vec<u8>>>) -> Vec<ExportTarget>;

    /// Whether layers will be needed compressed, so that compression may begin while later steps
    /// run.
    fn wants_layers(&self) -> Option<shipway_refs::Compression> {
        None
    }

    /// What wants to see states as they are made, for the export number `index` of `build`.
    fn watcher(&self, _build: &str, _index: usize) -> Option<StateWatcher> {
        None
    }

    /// Whether what steps open is to be noted, for an order of their layers' files.
    fn wants_opened(&self) -> bool {
        false
    }

    /// Exports.
    async fn export(&self, input: ExportInput, cx: &ExportContext) -> Result<Exported>;
}
