//! All sources, in a table by scheme.

use crate::{
    PinnedSource, SourceContext, SourceSpec,
    blob::BlobSource,
    git::GitSource,
    http::HttpSource,
    image::{ImageKind, ImageSource, LocalImages},
    keyed_locks::KeyedLocks,
    local::LocalSource,
    port::Source,
    remote::{LayerSources, RegistryImage, Remote},
    snapshotter::RemoteImage,
};
use shipway_attest::Capture;
use shipway_fault::{Fault, Result, redact};
use shipway_llb::{ResolveOptions, SourceFacts};
use shipway_refs::{ImmutableRef, LayerSource, RefStore};
use shipway_registry::{Anonymous, Registry};
use shipway_session::{SessionGroup, SessionId};
use std::{path::PathBuf, sync::Arc};

/// What an administrator says about sources.
#[derive(Clone, Default)]
pub struct SourceOptions {
    /// Which images of containerd's store are preferred to a registry's.
    pub prefer: LocalImages,
    /// Where to keep what is known of files of web servers, which may be lost; without, it lasts as
    /// long as the daemon.
    pub files: Option<PathBuf>,
    /// The layers that states have yet to fetch, those that an earlier run knew among them.
    pub layers: LayerSources,
}

/// A kind of source with its schemes.
type Row = (&'static [&'static str], Arc<dyn Source>);

/// All kinds of sources. Cheap to clone.
#[derive(Clone)]
pub struct Sources {
    by_scheme: Arc<[Row]>,
    /// The source `local` once more, for what only it can do.
    local: Arc<LocalSource>,
    layers: LayerSources,
}

impl Sources {
    /// Sources over these. Sessions come with each call ([`SourceContext`]).
    pub fn new(refs: RefStore, registry: Registry, options: SourceOptions) -> Self {
        let (layers, locks) = (options.layers, KeyedLocks::default());
        let image = |kind| {
            Arc::new(ImageSource {
                refs: refs.clone(),
                registry: registry.clone(),
                locks: locks.clone(),
                layers: layers.clone(),
                prefer: options.prefer,
                kind,
            })
        };
        let local = Arc::new(LocalSource::new(refs.clone()));
        let http = Arc::new(HttpSource::new(refs.clone(), registry.clone(), options.files));
        let git = Arc::new(GitSource::new(refs.clone(), registry.clone()));
        let blob = Arc::new(BlobSource { refs: refs.clone(), registry: registry.clone() });
        let by_scheme: [Row; _] = [
            (&["docker-image"], image(ImageKind::Registry)),
            (&["oci-layout"], image(ImageKind::Layout)),
            (&["local"], local.clone()),
            (&["http", "https"], http),
            (&["git"], git),
            (&["docker-image+blob", "oci-layout+blob"], blob),
        ];
        Self { by_scheme: Arc::new(by_scheme), local, layers }
    }

    /// The kind of source that `identifier` names.
    fn of(&self, identifier: &str) -> Result<&dyn Source> {
        let Some((scheme, _)) = identifier.split_once("://") else {
            return Err(Fault::invalid(format!(
                "failed to parse {identifier:?}: a source is written scheme://…"
            )));
        };
        if let Some((_, source)) =
            self.by_scheme.iter().find(|(schemes, _)| schemes.contains(&scheme))
        {
            return Ok(&**source);
        }
        let fault =
            Fault::invalid(format!("unknown source scheme {scheme:?} in {:?}", redact(identifier)));
        let known = self.by_scheme.iter().flat_map(|(schemes, _)| schemes.iter().copied());
        Err(match shipway_fault::nearest(scheme, known) {
            Some(near) => fault.hint(format!("did you mean {near}://?")),
            None => fault,
        })
    }

    /// Pins a source; nothing is fetched that fetching could avoid. Called for a vertex's cache
    /// map; the result is remembered for `fetch`.
    pub async fn pin(&self, spec: &SourceSpec, cx: &SourceContext) -> Result<PinnedSource> {
        self.of(&spec.identifier)?.pin(spec, cx).await
    }

    /// The state of a pinned source. Images are lazy: no layer is fetched.
    pub async fn fetch(
        &self,
        spec: &SourceSpec,
        pin: &PinnedSource,
        cx: &SourceContext,
    ) -> Result<ImmutableRef> {
        self.of(&spec.identifier)?.fetch(spec, pin, cx).await
    }

    /// Resolves a source's metadata (rows `gw.resolveimg`, `gw.resolvesrc`).
    pub async fn resolve(
        &self,
        spec: &SourceSpec,
        options: &ResolveOptions,
        cx: &SourceContext,
    ) -> Result<SourceFacts> {
        self.of(&spec.identifier)?.resolve(spec, options, cx).await
    }

    /// Notes in `capture` what a pinned source is (row `at.prov.capture`).
    pub fn capture(
        &self,
        spec: &SourceSpec,
        pin: &PinnedSource,
        capture: &mut Capture,
    ) -> Result<()> {
        self.of(&spec.identifier)?.capture(spec, pin, capture)
    }

    /// The layers of `remote`, for lazy states; each is fetched once however many want it.
    pub fn layers_of(&self, remote: Arc<dyn Remote>) -> Arc<dyn LayerSource> {
        let place = remote.repository().map(|name| RegistryImage {
            image: RemoteImage { name: name.without_digest(), layers: Vec::new() },
            // Those of the builds that want the layers come with them.
            credentials: Arc::new(Anonymous),
        });
        self.layers.of(remote, place)
    }

    /// Lets the clients of `sessions` answer for what has yet to be fetched of `state` (row
    /// `so.unlazy`): the client whose build began it may have gone, or be another.
    pub fn wanted_by(&self, state: &ImmutableRef, sessions: &SessionGroup) {
        for source in state.sources() {
            self.layers.wanted_by(source.id(), sessions);
        }
    }

    /// Names directly in `dir` (empty for the top) of a client's directory, for suggestions;
    /// nothing is transferred.
    pub async fn local_names(
        &self,
        local: &str,
        session: &SessionId,
        dir: &str,
        sessions: &SessionGroup,
    ) -> Result<Vec<String>> {
        self.local.names(local, session, dir, sessions).await
    }
}
