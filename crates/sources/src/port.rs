//! What a source is: the words, and the port that every kind of source implements.

use crate::{SourceMemo, clients::ClientServices};
use futures::{FutureExt as _, future::BoxFuture};
use shipway_attest::{Capture, Stored};
use shipway_fault::Result;
use shipway_llb::{ResolveOptions, SourceFacts};
use shipway_oci::{Digest, Platform};
use shipway_progress::Reporter;
use shipway_refs::ImmutableRef;
use shipway_session::SessionGroup;
use std::{collections::BTreeMap, sync::Arc};

/// A source as an operation names it.
#[derive(Clone, Debug)]
pub struct SourceSpec {
    /// Identifier with scheme, such as `docker-image://docker.io/library/busybox:latest`.
    pub identifier: String,
    /// Attributes (rows `src.*`).
    pub attrs: BTreeMap<String, String>,
    /// Platform wanted, normalized.
    pub platform: Platform,
}

impl SourceSpec {
    /// The identifier without its scheme.
    pub(crate) fn locator(&self) -> &str {
        self.identifier.split_once("://").map_or("", |(_, locator)| locator)
    }
}

/// On whose behalf a source is used.
#[derive(Clone)]
pub struct SourceContext {
    /// Clients that may give credentials, files and secrets.
    pub(crate) clients: Arc<dyn ClientServices>,
    /// Where progress goes.
    pub reporter: Reporter,
    /// What sources reported to the build before.
    pub(crate) memo: SourceMemo,
}

impl SourceContext {
    /// A build's use of a source: its clients, the vertex that progress goes to, and what the build
    /// knows already.
    pub fn new(sessions: SessionGroup, reporter: Reporter, memo: SourceMemo) -> Self {
        Self { clients: Arc::new(sessions), reporter, memo }
    }
}

/// A source pinned to what it was when asked.
#[derive(Clone, Debug)]
pub struct PinnedSource {
    /// Cache keys (row `so.key.multi`).
    pub keys: Vec<Digest>,
    /// Whether the keys mean nothing beyond this session (row `src.local.key`).
    pub ephemeral: bool,
    /// What it was pinned to, for provenance: for example an image's digest.
    pub digest: Option<String>,
    /// Why an image is the one of the node's own store, if no registry said so.
    pub stored: Option<Stored>,
}

/// One kind of source. What it is asked is always a source with one of its schemes.
pub(crate) trait Source: Send + Sync {
    /// Pins the source; nothing is fetched that fetching could avoid.
    fn pin<'a>(
        &'a self,
        spec: &'a SourceSpec,
        cx: &'a SourceContext,
    ) -> BoxFuture<'a, Result<PinnedSource>>;

    /// The state of a pinned source. It may be lazy.
    fn fetch<'a>(
        &'a self,
        spec: &'a SourceSpec,
        pin: &'a PinnedSource,
        cx: &'a SourceContext,
    ) -> BoxFuture<'a, Result<ImmutableRef>>;

    /// What can be known of the source without fetching it.
    fn resolve<'a>(
        &'a self,
        _spec: &'a SourceSpec,
        _options: &'a ResolveOptions,
        _cx: &'a SourceContext,
    ) -> BoxFuture<'a, Result<SourceFacts>> {
        async move { Ok(SourceFacts::default()) }.boxed()
    }

    /// Notes in `capture`, for provenance, what the pinned source is.
    fn capture(&self, spec: &SourceSpec, pin: &PinnedSource, capture: &mut Capture) -> Result<()>;
}
