//! What the engine and the operations ask of sources: by scheme to the module that knows it.

use crate::git::GitSpec;
use crate::{
    SourceMemo,
    blob::{BlobSpec, Blobs},
    flight::Flights,
    git::Gits,
    http::Files,
    image::{At, Images, LocalImages},
    local::Locals,
    remote::{Remote, RemoteLayers},
};
use shipway_attest::{BlobSource, Capture, GitSource, HttpSource, ImageSource, Stored};
use shipway_fault::{Fault, Result, redact};
use shipway_llb::SourceFacts;
use shipway_oci::{ChecksumAlgorithm, Digest, Platform};
use shipway_progress::Reporter;
use shipway_refs::{ImmutableRef, LayerSource, RefStore};
use shipway_registry::Registry;
use shipway_session::SessionGroup;
use std::{any::Any, collections::BTreeMap, path::PathBuf, sync::Arc};

/// A source as an operation names it.
#[derive(Clone, Debug)]
pub struct SourceSpec {
    /// Identifier with scheme.
    pub identifier: String,
    /// Attributes (rows `src.*`).
    pub attrs: BTreeMap<String, String>,
    /// Platform wanted, normalized.
    pub platform: Platform,
}

/// On whose behalf a source is used.
#[derive(Clone)]
pub struct SourceContext {
    /// Clients that may give credentials, files and secrets.
    pub sessions: SessionGroup,
    /// Where progress goes.
    pub reporter: Reporter,
    /// What the build was told before.
    pub memo: SourceMemo,
}

/// A source pinned to what it was when asked.
#[derive(Clone, Debug)]
pub struct Pin {
    /// Cache keys (row `so.key.multi`).
    pub keys: Vec<Digest>,
    /// Whether the keys mean nothing beyond this session (row `src.local.key`).
    pub ephemeral: bool,
    /// What it was pinned to, for provenance: for example an image's digest.
    pub digest: Option<String>,
    /// Why an image is the one of the node's own store, if no registry said so.
    pub stored: Option<Stored>,
}

/// What to resolve besides what comes for free.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ResolveWant {
    /// The objects of a git reference.
    pub git_objects: bool,
    /// A checksum of a file with these bytes behind it.
    pub http_checksum: Option<(ChecksumAlgorithm, bytes::Bytes)>,
    /// What is said of an image, with the statements of these types.
    pub attestations: Option<Vec<String>>,
}

/// What an administrator says about sources.
#[derive(Clone, Debug, Default)]
pub struct SourceOptions {
    /// Which images of containerd's store are preferred to a registry's.
    pub prefer: LocalImages,
    /// Where to keep what is known of files of web servers, which may be lost; without, it lasts as
    /// long as the daemon.
    pub files: Option<PathBuf>,
}

/// All source schemes. Cheap to clone.
#[derive(Clone)]
pub struct Sources {
    inner: Arc<Inner>,
}

struct Inner {
    images: Images,
    locals: Locals,
    files: Files,
    gits: Gits,
    blobs: Blobs,
}

/// A scheme that is known, with the rest of the identifier.
enum Scheme<'a> {
    Image(At<'a>),
    Local(&'a str),
    Http,
    Git(&'a str),
    Blob,
}

impl<'a> Scheme<'a> {
    fn of(identifier: &'a str) -> Result<Self> {
        let (scheme, rest) = identifier.split_once("://").ok_or_else(|| {
            Fault::invalid(format!(
                "failed to parse {identifier:?}: a source is written scheme://…"
            ))
        })?;
        match scheme {
            "docker-image" => Ok(Self::Image(At::Registry(rest))),
            "oci-layout" => Ok(Self::Image(At::Layout(rest))),
            "local" => Ok(Self::Local(rest)),
            "http" | "https" => Ok(Self::Http),
            "git" => Ok(Self::Git(rest)),
            "docker-image+blob" | "oci-layout+blob" => Ok(Self::Blob),
            _ => {
                let known = ["docker-image", "local", "http", "https", "git", "oci-layout"];
                let fault = Fault::invalid(format!(
                    "unknown source scheme {scheme:?} in {:?}",
                    redact(identifier)
                ));
                Err(match shipway_fault::nearest(scheme, known) {
                    Some(near) => fault.hint(format!("did you mean {near}://?")),
                    None => fault,
                })
            }
        }
    }
}

impl Sources {
    /// Sources over these. Sessions come with each call ([`SourceContext`]).
    pub fn new(refs: RefStore, registry: Registry, options: SourceOptions) -> Self {
        let flights = Flights::default();
        let inner = Inner {
            images: Images {
                refs: refs.clone(),
                registry: registry.clone(),
                flights,
                prefer: options.prefer,
            },
            locals: Locals::new(refs.clone()),
            files: Files::new(refs.clone(), registry.clone(), options.files),
            gits: Gits::new(refs.clone(), registry.clone()),
            blobs: Blobs { refs, registry },
        };
        Self { inner: Arc::new(inner) }
    }

    /// Pins a source; nothing is fetched that fetching could avoid. Called for a vertex's cache
    /// map; the result is remembered for `fetch`.
    pub async fn pin(&self, spec: &SourceSpec, cx: &SourceContext) -> Result<Pin> {
        let Inner { images, locals, files, gits, blobs } = &*self.inner;
        match Scheme::of(&spec.identifier)? {
            Scheme::Image(reference) => images.pin(spec, reference, cx).await,
            Scheme::Local(name) => locals.pin(spec, name, &cx.sessions),
            Scheme::Http => files.pin(spec, &cx.sessions, &cx.memo, &cx.reporter).await,
            Scheme::Blob => blobs.pin(spec),
            Scheme::Git(remote) => {
                gits.pin(spec, remote, &cx.sessions, &cx.memo, &cx.reporter).await
            }
        }
    }

    /// The state of a pinned source. Images are lazy: no layer is fetched.
    pub async fn fetch(
        &self,
        spec: &SourceSpec,
        pin: &Pin,
        cx: &SourceContext,
    ) -> Result<ImmutableRef> {
        let Inner { images, locals, files, gits, blobs } = &*self.inner;
        match Scheme::of(&spec.identifier)? {
            Scheme::Image(reference) => images.fetch(spec, reference, pin, cx).await,
            Scheme::Local(name) => locals.fetch(spec, name, &cx.sessions, &cx.reporter).await,
            Scheme::Http => files.fetch(spec, pin, &cx.sessions, &cx.memo, &cx.reporter).await,
            Scheme::Blob => blobs.fetch(spec, &cx.sessions).await,
            Scheme::Git(remote) => {
                gits.fetch(spec, remote, pin, &cx.sessions, &cx.memo, &cx.reporter).await
            }
        }
    }

    /// Resolves a source's metadata (rows `gw.resolveimg`, `gw.resolvesrc`); modes are in attr
    /// `image.resolvemode`.
    pub async fn resolve(
        &self,
        spec: &SourceSpec,
        want: ResolveWant,
        cx: &SourceContext,
    ) -> Result<SourceFacts> {
        let Inner { images, files, gits, .. } = &*self.inner;
        match Scheme::of(&spec.identifier)? {
            Scheme::Image(reference) => {
                images.resolve(spec, reference, want.attestations.as_deref(), cx).await
            }
            Scheme::Local(_) | Scheme::Blob => Ok(SourceFacts::default()),
            Scheme::Http => {
                files.resolve(spec, want.http_checksum, &cx.sessions, &cx.memo, &cx.reporter).await
            }
            Scheme::Git(remote) => {
                gits.resolve(spec, remote, want.git_objects, &cx.sessions, &cx.memo, &cx.reporter)
                    .await
            }
        }
    }

    /// Notes in `capture` what a pinned source is (row `at.prov.capture`).
    pub fn capture(&self, spec: &SourceSpec, pin: &Pin, capture: &mut Capture) -> Result<()> {
        match Scheme::of(&spec.identifier)? {
            Scheme::Image(at) => capture.add_image(ImageSource {
                name: at.parse(spec)?.name,
                platform: Some(spec.platform.clone()),
                digest: pin.digest.as_ref().and_then(|d| d.parse().ok()),
                local: matches!(at, At::Layout(_)),
                stored: pin.stored,
            }),
            Scheme::Blob => {
                let at = BlobSpec::parse(spec)?.at;
                capture.add_blob(BlobSource { local: at.store.is_some(), name: at.name });
            }
            Scheme::Local(name) => capture.add_local(name),
            Scheme::Http => {
                if let Some(digest) = pin.digest.as_ref().and_then(|d| d.parse().ok()) {
                    capture.add_http(HttpSource { url: spec.identifier.clone(), digest });
                }
            }
            Scheme::Git(locator) => {
                let git = GitSpec::parse(spec, locator)?;
                for secret in
                    [&git.token_secret, &git.header_secret].into_iter().filter(|s| !s.is_empty())
                {
                    capture.add_secret(secret, true);
                }
                if !git.ssh_agent.is_empty() {
                    capture.add_ssh(&git.ssh_agent, false);
                }
                let reference = Some(&git.reference)
                    .filter(|r| !r.is_empty())
                    .map(|r| format!("#{r}"))
                    .unwrap_or_default();
                let commit = pin.digest.clone().unwrap_or_default();
                capture.add_git(GitSource {
                    url: format!("{}{reference}", git.shown()),
                    commit,
                    bundle: git
                        .bundle
                        .map(|b| BlobSource { local: b.0.store.is_some(), name: b.0.name }),
                });
            }
        }
        Ok(())
    }

    /// The layers of `remote`, for lazy states; each is fetched once however many want it.
    pub fn layers_of(&self, remote: Arc<dyn Remote>) -> Arc<dyn LayerSource> {
        self.inner.images.layers_of(remote)
    }

    /// Lets the clients of `sessions` answer for what has yet to be fetched of `state` (row
    /// `so.unlazy`): the one whose build began it may have gone, or be somebody else.
    pub fn wanted_by(&self, state: &ImmutableRef, sessions: &SessionGroup) {
        for source in state.sources() {
            let source: Arc<dyn Any + Send + Sync> = source;
            if let Some(layers) = source.downcast_ref::<RemoteLayers>() {
                layers.join(sessions);
            }
        }
    }

    /// Names directly in `dir` (empty for the top) of a client's directory, for suggestions;
    /// nothing is transferred.
    pub async fn local_names(
        &self,
        local: &str,
        session: &str,
        dir: &str,
        sessions: &SessionGroup,
    ) -> Result<Vec<String>> {
        self.inner.locals.names(local, session, dir, sessions).await
    }
}
