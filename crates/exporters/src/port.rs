//! What the engine asks of exporters.

use crate::{
    archive::{ArchiveExporter, Variant},
    image::ImageExporter,
    publish::Publishing,
    tree::{LocalExporter, TarExporter},
};
use async_trait::async_trait;
use futures::future::BoxFuture;
use shipway_attest::Attestation;
use shipway_fault::{Fault, Result, nearest};
use shipway_oci::Platform;
use shipway_progress::Reporter;
use shipway_refs::{ImmutableRef, RefStore};
use shipway_registry::Registry;
use shipway_session::{SessionGroup, SessionHub};
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

/// Keys and values for the client (rows `ex.resp.*`).
pub type Response = BTreeMap<String, String>;

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
    /// What is said of the platforms, by their ids.
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

/// An attestation to export.
pub type ExportAttestation = Attestation<Content>;

/// Makes a predicate when it is asked for: provenance tells when everything was done.
pub type Maker = Arc<dyn Fn() -> BoxFuture<'static, Result<Vec<u8>>> + Send + Sync>;

/// Where an attestation's content is.
#[derive(Clone)]
pub enum Content {
    /// In a state, below the attestation's path.
    State(ImmutableRef),
    /// Made by the engine.
    Made(Maker),
}

/// On whose behalf an export runs.
#[derive(Clone)]
pub struct ExportContext {
    /// The build's id.
    pub build: String,
    /// Which version of the defaults the client wants, as clients number them.
    pub compatibility: i64,
    /// Index of the exporter in the request: the id of its target in the client's session.
    pub index: usize,
    /// The session of the client that asked.
    pub session: String,
    /// Clients that may give credentials.
    pub sessions: SessionGroup,
    /// Progress of the export's vertex.
    pub reporter: Reporter,
    /// What is left for the time when all exporters have succeeded.
    pub finally: Finally,
}

/// What exporters leave to be done when all of them have succeeded, beside the caches' export:
/// pushing (row `ex.img.push`).
#[derive(Clone, Default)]
pub struct Finally(Arc<Mutex<Vec<BoxFuture<'static, Result<()>>>>>);

impl Finally {
    /// Leaves `work` for later.
    pub fn then(&self, work: impl Future<Output = Result<()>> + Send + 'static) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(Box::pin(work));
    }

    /// What was left, in order.
    pub fn take(&self) -> Vec<BoxFuture<'static, Result<()>>> {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// An exporter with its attributes checked.
#[async_trait]
pub trait Exporter: Send + Sync {
    /// Name of its progress vertex, such as `exporting to image`.
    fn name(&self) -> &str;

    /// Whether layers will be needed compressed, so that compression may begin while later steps
    /// run.
    fn wants_layers(&self) -> Option<shipway_refs::Compression> {
        None
    }

    /// Exports.
    async fn export(&self, input: ExportInput, cx: &ExportContext) -> Result<Response>;
}

/// All exporters.
#[derive(Clone)]
pub struct Exporters {
    inner: Arc<Inner>,
}

pub(crate) struct Inner {
    pub refs: RefStore,
    pub registry: Registry,
    pub hub: SessionHub,
    /// Names of images that may be replaced although CRI manages them and they are not ours; `*`
    /// stands for anything.
    pub replaceable: Vec<String>,
    pub publishing: Publishing,
}

impl Exporters {
    /// Exporters over these.
    ///
    /// An image that CRI manages and that was not built here keeps its name unless it matches one
    /// of `replaceable`, in which `*` stands for anything. Images in the store go to the namespaces
    /// of `publishing`, too.
    pub fn new(
        refs: RefStore,
        registry: Registry,
        hub: SessionHub,
        replaceable: Vec<String>,
        publishing: Publishing,
    ) -> Self {
        Self { inner: Arc::new(Inner { refs, registry, hub, replaceable, publishing }) }
    }

    /// The exporter of type `kind` (image, oci, docker, local, tar); wrong attributes and unknown
    /// types are errors here, before anything is built.
    pub fn resolve(
        &self,
        kind: &str,
        attrs: &BTreeMap<String, String>,
    ) -> Result<Arc<dyn Exporter>> {
        let inner = self.inner.clone();
        Ok(match kind {
            "image" => Arc::new(ImageExporter::new(inner, attrs)?),
            "oci" => Arc::new(ArchiveExporter::new(inner, Variant::Oci, attrs)?),
            "docker" => Arc::new(ArchiveExporter::new(inner, Variant::Docker, attrs)?),
            "local" => Arc::new(LocalExporter::new(inner, attrs)?),
            "tar" => Arc::new(TarExporter::new(inner, attrs)?),
            other => {
                let fault = Fault::invalid(format!("exporter \"{other}\" could not be found"));
                return Err(match nearest(other, ["image", "oci", "docker", "local", "tar"]) {
                    Some(near) => fault.hint(format!("did you mean type={near}?")),
                    None => fault.hint("use type=image, oci, docker, local or tar"),
                });
            }
        })
    }
}
