//! The `image` exporter: into containerd's image store and to registries (rows `ex.img.*`).

use crate::{
    hollow::LazyBlobs,
    learn,
    lease::ExportLease,
    options::{Attrs, ImageOptions},
    port::{
        ExportContext, ExportInput, ExportPlatform, ExportTarget, Exported, Exporter, Response,
        StateWatcher,
    },
    publish::{PINNED, Publication, ahead::Ahead, target::Target},
    push::{self, Blobs, PushOptions},
    replace::may_replace,
    services::ExportServices,
    writer::{Writer, Written},
};
use async_trait::async_trait;
use base64::Engine as _;
use parking_lot::Mutex;
use shipway_fault::{Context as _, Fault, Result};
use shipway_oci::{Descriptor, Digest, ImageName, Platform, gojson};
use shipway_refs::{Compression, Fetch, ImmutableRef};
use shipway_storage::{Storage, built_labels};
use std::{collections::BTreeMap, sync::Arc, time::SystemTime};

pub(crate) struct ImageExporter {
    inner: Arc<ExportServices>,
    options: ImageOptions,
    push: Option<PushOptions>,
    store: bool,
    /// Whether the image in the store may lack layers that a registry has (row
    /// `ex.img.incomplete`).
    incomplete: bool,
    canonical: bool,
    dangling: Option<Dangling>,
    /// Other namespaces that get the image.
    publish: Vec<(String, Storage)>,
    /// What they get before the build has ended.
    ahead: Mutex<Option<Arc<Ahead>>>,
    /// Whether kubelet is asked not to remove it.
    pinned: bool,
    metadata: BTreeMap<String, Vec<u8>>,
}

/// `dangling-name-prefix`, and whether only for images without a name.
struct Dangling {
    prefix: String,
    empty_only: bool,
}

impl ImageExporter {
    pub fn new(inner: Arc<ExportServices>, attrs: &BTreeMap<String, String>) -> Result<Self> {
        let mut attrs = Attrs::new(attrs);
        let mut options = ImageOptions::take(&mut attrs)?;
        options.inline.get_or_insert(true);
        let push = attrs.flag("push")?.unwrap_or(false);
        let by_digest = attrs.flag("push-by-digest")?.unwrap_or(false);
        let insecure = attrs.flag("registry.insecure")?.unwrap_or(false);
        let store = attrs.flag("store")?.unwrap_or(true);
        // Every image in the store is unpacked here: its snapshots are the steps' own.
        attrs.flag("unpack")?;
        let incomplete = attrs.flag("unsafe-internal-store-allow-incomplete")?.unwrap_or(false);
        let canonical = attrs.flag("name-canonical")?.unwrap_or(false);
        let empty_only = attrs.flag("danging-name-empty-only")?.unwrap_or(false);
        let dangling = attrs
            .text("dangling-name-prefix")
            .filter(|p| !p.is_empty())
            .map(|prefix| Dangling { prefix, empty_only });
        let namespaces = attrs.text("namespaces");
        let pinned = attrs.flag("pinned")?.unwrap_or(false);
        if let (false, Some(_)) = (store, &namespaces) {
            return Err(Fault::invalid("namespaces are for images in the store, and store=false"));
        }
        let publish =
            if store { inner.publishing.targets(namespaces.as_deref())? } else { Vec::new() };
        let push = push.then_some(PushOptions { by_digest, insecure });
        Ok(Self {
            inner,
            options,
            push,
            store,
            incomplete,
            canonical,
            dangling,
            publish,
            ahead: Mutex::default(),
            pinned,
            metadata: attrs.rest(),
        })
    }

    /// Names to write, and whether canonical ones are added.
    fn names(
        &self,
        metadata: &BTreeMap<String, Vec<u8>>,
        written: &Written,
    ) -> (Vec<String>, bool) {
        // Short names are completed, or `nerdctl run app` would not find what was built as `app`.
        // Pushing by digest is for names without a tag, and must see that there is none.
        let by_digest = self.push.is_some_and(|p| p.by_digest);
        let full = |name: String| match name.parse::<ImageName>() {
            Ok(full) if !by_digest => full.to_string(),
            _ => name,
        };
        let names = self.options.names(metadata).into_iter().map(full).collect();
        with_dangling(names, self.canonical, self.dangling.as_ref(), written.root.digest)
    }

    /// Points the names at the image; those that do already are left alone.
    async fn name_all(
        &self,
        (names, canonical, epoch): (&[String], bool, Option<SystemTime>),
        written: &Written,
        lease: &ExportLease,
        cx: &ExportContext,
    ) -> Result<()> {
        let storage = self.inner.refs.storage();
        let groups = with_canonical(names, canonical, written.root.digest);
        let points_here = async |name: &String| match storage.images.get(name).await {
            Ok(image) => {
                let same = image.target.digest == written.root.digest
                    && image.target.media_type == written.root.media_type;
                if !same {
                    may_replace(&image, &self.inner.replaceable)?;
                }
                let pinned = image.labels.get(PINNED.0).is_some_and(|v| v == PINNED.1);
                Ok(same && image.built().is_some() && (pinned || !self.pinned))
            }
            Err(e) if e.is_not_found() => Ok(false),
            Err(e) => Err(e),
        };
        let all = groups.iter().flat_map(|(_, group)| group);
        let named = futures::future::try_join_all(all.map(points_here)).await?;
        if !named.contains(&true) {
            written.protect(&storage.content, lease).await?;
        }
        let mut named = named.into_iter();
        let mut labels = built_labels(&written.root, SystemTime::now());
        if self.pinned {
            labels.insert(PINNED.0.to_owned(), PINNED.1.to_owned());
        }
        for (name, group) in groups {
            let status = format!("naming to {name}");
            cx.reporter.status(status.clone(), 0, 0, false);
            for name in group {
                if named.next() != Some(true) {
                    storage
                        .images
                        .put_at(&name, &written.root, &labels, epoch)
                        .await
                        .context(|| status.clone())?;
                }
            }
            cx.reporter.status(status, 0, 0, true);
        }
        Ok(())
    }

    /// When blobs are fetched that the image does without.
    fn lazy_blobs(&self) -> LazyBlobs {
        let others = self.publish.iter().map(|(name, _)| name.as_str());
        self.inner.lazy_blobs.within(others.chain([self.inner.publishing.own.as_str()]))
    }

    /// Whether the image of a platform is unpacked here, once it has a name.
    fn is_unpacked(&self, p: &ExportPlatform) -> bool {
        !self.incomplete && p.platform.rank_for(&Platform::host()).is_some()
    }

    /// The other namespaces, for the export number `index` of `build`.
    fn targets(&self, build: &str, index: usize) -> Vec<Arc<Target>> {
        let (namespaces, from) = (&self.inner.publishing.namespaces, self.inner.refs.storage());
        let target = |to| Arc::new(Target::new(to, namespaces, from, (build, index)));
        self.publish.iter().map(target).collect()
    }

    /// Makes the image in the other namespaces, all at the same time.
    async fn publish_all(
        &self,
        (names, canonical, time): (&[String], bool, Option<SystemTime>),
        written: &Written,
        (states, unpacked): (&[ImmutableRef], &[usize]),
        cx: &ExportContext,
    ) -> Result<()> {
        let groups = with_canonical(names, canonical, written.root.digest);
        let names: Vec<String> = groups.into_iter().flat_map(|(_, all)| all).collect();
        let ahead = self.ahead.lock().take();
        let targets = match ahead {
            Some(ahead) => ahead.finish().await,
            None => self.targets(&cx.build, cx.index),
        };
        let publication = Publication {
            written,
            states,
            unpacked,
            names: &names,
            time,
            pinned: self.pinned,
            replaceable: &self.inner.replaceable,
            cx,
        };
        let each = targets.iter().map(|target| publication.publish(target));
        futures::future::try_join_all(each).await.map(drop)
    }
}

/// Fetches the blobs that an image has done without: its manifest keeps them from now on.
async fn fetch_all(states: Vec<ImmutableRef>, compression: Compression) {
    for state in states {
        if let Err(error) = state.blobs(compression, Fetch::Everything, None).await {
            tracing::warn!(image = state.description(), %error, "failed to fetch the blobs of an image, it runs without them");
        }
    }
}

/// Keys that all image-like exporters answer (rows `ex.resp.*`).
pub(crate) fn response(written: &Written, root: &Descriptor) -> Result<Response> {
    let mut response =
        Response::from([("containerimage.digest".to_owned(), written.root.digest.to_string())]);
    if let [only] = written.manifests.as_slice()
        && only.descriptor.digest == written.root.digest
    {
        response.insert("containerimage.config.digest".into(), only.config.digest.to_string());
    }
    let json = gojson::to_string(root)
        .map_err(|e| Fault::internal(format!("encode a descriptor: {e}")))?;
    response.insert(
        "containerimage.descriptor".into(),
        base64::engine::general_purpose::STANDARD.encode(json),
    );
    Ok(response)
}

/// The names of an image, the dangling one included, and whether canonical ones are added (rows
/// `ex.img.dangling`, `ex.img.canonical`): an image that has only its dangling name gets none.
fn with_dangling(
    mut names: Vec<String>,
    mut canonical: bool,
    dangling: Option<&Dangling>,
    digest: Digest,
) -> (Vec<String>, bool) {
    if let Some(dangling) = dangling
        && (!dangling.empty_only || names.is_empty())
    {
        canonical &= !names.is_empty();
        names.push(format!("{}@{digest}", dangling.prefix));
    }
    (names, canonical)
}

/// Each name with all names that are written for it: itself, and with `canonical` itself with the
/// digest.
fn with_canonical(names: &[String], canonical: bool, digest: Digest) -> Vec<(String, Vec<String>)> {
    let with_digest =
        |name: &String| (canonical && !name.contains('@')).then(|| format!("{name}@{digest}"));
    names
        .iter()
        .map(|name| {
            (name.clone(), std::iter::once(name.clone()).chain(with_digest(name)).collect())
        })
        .collect()
}

#[async_trait]
impl Exporter for ImageExporter {
    fn name(&self) -> &str {
        "exporting to image"
    }

    fn targets(&self, metadata: Option<&BTreeMap<String, Vec<u8>>>) -> Vec<ExportTarget> {
        let mut all = metadata.cloned().unwrap_or_default();
        all.extend(self.metadata.clone());
        let mut names = self.options.names(&all);
        // `*` is the name that the frontend gives.
        names.retain(|name| metadata.is_some() || name != "*");
        let pushed = names.iter().filter(|_| self.push.is_some()).cloned().map(ExportTarget::Push);
        let dangling = self.dangling.iter().map(|dangling| dangling.prefix.clone());
        let stored = names.iter().cloned().chain(dangling).filter(|_| self.store);
        let default = &self.inner.publishing.default;
        let namespaces = self.publish.iter().map(|(name, _)| name.clone());
        pushed
            .chain(stored.map(ExportTarget::Store))
            .chain(namespaces.filter(|n| !default.contains(n)).map(ExportTarget::Namespace))
            .collect()
    }

    fn wants_layers(&self) -> Option<Compression> {
        Some(self.options.ahead())
    }

    fn wants_opened(&self) -> bool {
        self.options.optimize.as_ref().is_some_and(|optimize| optimize.steps)
    }

    fn watcher(&self, build: &str, index: usize) -> Option<StateWatcher> {
        // Those that are exported otherwise than they are committed have other layers.
        let (compression, rewritten) = (self.options.compression, self.options.rewrite);
        let unnamed = self.options.names(&BTreeMap::new()).is_empty() && self.dangling.is_none();
        if self.publish.is_empty()
            || self.incomplete
            || unnamed
            || rewritten
            || compression.kind.is_indexed()
        {
            return None;
        }
        let begin = || {
            let from = self.inner.refs.storage();
            let targets = self.targets(build, index);
            Arc::new(Ahead::new(targets, from, compression, format!("{build}-{index}")))
        };
        let ahead = self.ahead.lock().get_or_insert_with(begin).clone();
        Some(Arc::new(move |state| ahead.committed(state)))
    }

    async fn export(&self, mut input: ExportInput, cx: &ExportContext) -> Result<Exported> {
        input.metadata.extend(self.metadata.clone());
        let options = self.options.settled(&input, cx.compatibility, "image")?;
        let input = learn::prepared(&self.options, input, &self.inner, cx).await?;
        let epoch = self.options.epoch.whole(&input)?;
        let storage = self.inner.refs.storage();
        let lease = ExportLease::new(&storage.leases, &cx.build, cx.index);
        let policy = self.lazy_blobs();
        // Only an image in the store needs layers here; a registry may have them already.
        let fetch = match policy {
            _ if !self.store || self.incomplete => Fetch::Nothing,
            LazyBlobs::Now => Fetch::Everything,
            LazyBlobs::Async | LazyBlobs::OnPush => {
                // Whether a snapshotter serves them is known when it has been asked. What has no
                // name is not unpacked.
                let named = !self.options.names(&input.metadata).is_empty();
                for p in input.platforms.iter().filter(|p| named && self.is_unpacked(p)) {
                    p.state.materialize(Some(&cx.reporter)).await.context(|| "exporting layers")?;
                }
                Fetch::Unserved
            }
        };
        let writer = Writer {
            refs: &self.inner.refs,
            lease: &lease,
            options: &options,
            reporter: &cx.reporter,
            fetch,
        };
        let written = writer.draft(&input).await?;
        let (names, canonical) = self.names(&input.metadata, &written);
        if self.store && !names.is_empty() {
            // The snapshots must be there before the record is (third invariant); other platforms'
            // are of no use here.
            let mut unpacked = Vec::new();
            for (n, p) in input.platforms.iter().enumerate().filter(|(_, p)| self.is_unpacked(p)) {
                unpacked.push(n);
                p.state
                    .unpack(self.options.compression, Some(&cx.reporter))
                    .await
                    .context(|| "unpacking the image")?;
            }
            self.name_all((&names, canonical, epoch), &written, &lease, cx).await?;
            let states: Vec<_> = input.platforms.iter().map(|p| p.state.clone()).collect();
            let whole = (&states[..], &unpacked[..]);
            self.publish_all((&names, canonical, epoch), &written, whole, cx).await?;
            if policy == LazyBlobs::Async && written.manifests.iter().any(|m| !m.lazy.is_empty()) {
                let fetching = fetch_all(states, self.options.compression);
                shipway_task::spawn("fetch the blobs of an image", fetching);
            }
        } else {
            written.protect(&storage.content, &lease).await?;
        }
        if self.push.is_some() && names.is_empty() {
            return Err(Fault::invalid("name is required for push")
                .hint("add name=<registry>/<repository>:<tag> to the output"));
        }
        let root = written.root.clone();
        let mut response = response(&written, &root)?;
        if !names.is_empty() {
            response.insert("image.name".into(), names.join(","));
        }
        if let Some(options) = self.push {
            let dangling =
                |n: &&String| self.dangling.as_ref().is_some_and(|d| n.starts_with(&d.prefix));
            let names: Vec<String> = names.iter().filter(|n| !dangling(n)).cloned().collect();
            let mut blobs = Blobs::new(&storage.content, &input, &written);
            if self.store && self.incomplete {
                blobs = blobs.keeping(self.options.compression);
            }
            let (inner, sessions, reporter) =
                (self.inner.clone(), cx.sessions.clone(), cx.reporter.clone());
            cx.finalizers.push(async move {
                // Until then all that is pushed stays.
                let _lease = lease;
                for name in &names {
                    push::push(
                        &inner.registry,
                        &blobs,
                        &written,
                        name,
                        options,
                        &sessions,
                        &reporter,
                    )
                    .await?;
                }
                Ok(())
            });
        }
        Ok(Exported { response, written: Some(root) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dangling_and_canonical_names_have_the_digest() {
        let digest = Digest::of("root");
        let dangling = |empty_only| Some(Dangling { prefix: "<none>".into(), empty_only });
        let check = |names: &[&str], canonical: bool, dangling: Option<Dangling>, want: &[&str]| {
            let names = names.iter().map(|n| (*n).to_owned()).collect();
            let (names, canonical) = with_dangling(names, canonical, dangling.as_ref(), digest);
            let all: Vec<String> = with_canonical(&names, canonical, digest)
                .into_iter()
                .flat_map(|(_, all)| all)
                .collect();
            assert_eq!(
                all,
                want.iter().map(|n| n.replace('#', &digest.to_string())).collect::<Vec<_>>()
            );
        };
        check(&["a:1"], false, None, &["a:1"]);
        check(&["a:1", "b@sha256:x"], true, None, &["a:1", "a:1@#", "b@sha256:x"]);
        check(&["a:1"], false, dangling(false), &["a:1", "<none>@#"]);
        check(&["a:1"], true, dangling(true), &["a:1", "a:1@#"]);
        for empty_only in [true, false] {
            check(&[], true, dangling(empty_only), &["<none>@#"]);
        }
    }
}
