//! An image in containerd's store, of which some blobs may be elsewhere.

use async_trait::async_trait;
use bytes::Bytes;
use parking_lot::Mutex;
use shipway_convert::{Remote, Source, Stored};
use shipway_fault::{Class, Fault, Result};
use shipway_oci::{Descriptor, Digest, ImageName, Index, Manifest, media};
use shipway_registry::{BodyStream, Repository};
use shipway_storage::{DISTRIBUTION_SOURCE, LAYER_ORIGIN, Labels, Storage};
use std::collections::{BTreeSet, HashMap};

/// Opens a repository to read from it.
type Open = Box<dyn Fn(&ImageName) -> Repository + Send + Sync>;
/// Hears what is fetched from elsewhere.
type Note = Box<dyn Fn(String) + Send + Sync>;

/// An image in containerd's store. What is not there, since its layers are mounted lazily, is
/// streamed from where it came: labels on its manifests say it, ours for layers of images that
/// were built here, containerd's own for what was pulled.
pub struct Kept {
    stored: Stored,
    storage: Storage,
    name: String,
    open: Open,
    note: Note,
    origins: Mutex<HashMap<Digest, ImageName>>,
    noted: Mutex<BTreeSet<Digest>>,
}

/// Where a blob of `image` would be fetched from, by the labels of the manifest that names it.
fn origin(labels: &Labels, blob: Digest, image: Option<&ImageName>) -> Option<ImageName> {
    if let Some(built) = labels.get(&format!("{LAYER_ORIGIN}.{blob}")) {
        return built.parse().ok();
    }
    // `containerd.io/distribution.source.<registry>`: repositories, separated by commas.
    labels.iter().find_map(|(key, repositories)| {
        let registry = key.strip_prefix(DISTRIBUTION_SOURCE)?.strip_prefix('.')?;
        let repository = repositories.split(',').next()?;
        // containerd leaves the port out, which the image's own name may have.
        let own = image.map(ImageName::registry);
        let is_same = |own: &&str| own.split_once(':').is_some_and(|(host, _)| host == registry);
        let registry = own.filter(is_same).unwrap_or(registry);
        format!("{registry}/{repository}").parse().ok()
    })
}

impl Kept {
    /// The image `name` in `storage`. `open` opens repositories for what is not there, and `note`
    /// hears of it.
    pub fn new(
        storage: Storage,
        name: String,
        open: impl Fn(&ImageName) -> Repository + Send + Sync + 'static,
        note: impl Fn(String) + Send + Sync + 'static,
    ) -> Self {
        Self {
            stored: Stored::new(storage.clone(), name.clone()),
            storage,
            name,
            open: Box::new(open),
            note: Box::new(note),
            origins: Mutex::default(),
            noted: Mutex::default(),
        }
    }

    /// Notes where what `manifest` names comes from.
    async fn learn(&self, descriptor: &Descriptor, bytes: &[u8]) -> Result<()> {
        let children: Vec<Digest> = if media::is_index(&descriptor.media_type) {
            let index = serde_json::from_slice::<Index>(bytes);
            index.map(|i| i.manifests.iter().map(|m| m.digest).collect()).unwrap_or_default()
        } else {
            let manifest = serde_json::from_slice::<Manifest>(bytes);
            let children =
                |m: Manifest| m.layers.iter().chain([&m.config]).map(|d| d.digest).collect();
            manifest.map(children).unwrap_or_default()
        };
        let labels = match self.storage.content.info(descriptor.digest).await {
            Ok(info) => info.labels,
            // It came from elsewhere itself, and so does the rest.
            Err(e) if e.is_not_found() => Labels::new(),
            Err(e) => return Err(e),
        };
        let name = self.name.parse::<ImageName>().ok();
        let mut origins = self.origins.lock();
        let own = origins.get(&descriptor.digest).cloned();
        for child in children {
            if let Some(found) = origin(&labels, child, name.as_ref()).or_else(|| own.clone()) {
                origins.entry(child).or_insert(found);
            }
        }
        Ok(())
    }

    /// The place that `blob`, which is not in the store, is fetched from.
    fn elsewhere(&self, blob: &Descriptor, fault: Fault) -> Result<Remote> {
        let found = self.origins.lock().get(&blob.digest).cloned();
        let Some(found) = found else {
            let name = &self.name;
            let what = blob.platform.as_ref().map(|p| format!(" (for {p})")).unwrap_or_default();
            return Err(Fault::not_found(format!(
                "the image lacks {}{what} in containerd's store, and no label says where it is",
                blob.digest
            ))
            .with_class(Class::User)
            .with_source(fault)
            .hint(format!("fetch all of it, for example with `ctr images pull --all-platforms {name}`, or name the platforms that are there with --platform")));
        };
        if self.noted.lock().insert(blob.digest) {
            (self.note)(format!(
                "{} is not in the store: streaming it from {found}\n",
                blob.digest
            ));
        }
        Ok(Remote::new((self.open)(&found)))
    }
}

#[async_trait]
impl Source for Kept {
    async fn root(&self) -> Result<Descriptor> {
        self.stored.root().await
    }

    async fn manifest(&self, descriptor: &Descriptor) -> Result<Bytes> {
        let bytes = match self.stored.manifest(descriptor).await {
            Err(e) if e.is_not_found() => {
                self.elsewhere(descriptor, e)?.manifest(descriptor).await?
            }
            found => found?,
        };
        self.learn(descriptor, &bytes).await?;
        Ok(bytes)
    }

    async fn config(&self, descriptor: &Descriptor) -> Result<Bytes> {
        match self.stored.config(descriptor).await {
            Err(e) if e.is_not_found() => self.elsewhere(descriptor, e)?.config(descriptor).await,
            found => found,
        }
    }

    async fn blob(&self, descriptor: &Descriptor) -> Result<BodyStream> {
        match self.stored.blob(descriptor).await {
            Err(e) if e.is_not_found() => self.elsewhere(descriptor, e)?.blob(descriptor).await,
            found => found,
        }
    }

    fn origin(&self, blob: &Descriptor) -> Option<ImageName> {
        self.origins.lock().get(&blob.digest).cloned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_say_where_a_blob_is() {
        let (ours, theirs) = (Digest::of("a"), Digest::of("b"));
        let labels: Labels = [
            (format!("{LAYER_ORIGIN}.{ours}"), "r.io/base:1".to_owned()),
            (format!("{DISTRIBUTION_SOURCE}.docker.io"), "library/app,other/app".to_owned()),
        ]
        .into();
        assert_eq!(origin(&labels, ours, None).unwrap().locator(), "r.io/base");
        assert_eq!(origin(&labels, theirs, None).unwrap().locator(), "docker.io/library/app");
        assert_eq!(origin(&Labels::new(), ours, None), None);
        let labels = [(format!("{DISTRIBUTION_SOURCE}.localhost"), "a/b".to_owned())].into();
        let at = |image: &str| origin(&labels, ours, Some(&image.parse().unwrap())).unwrap();
        assert_eq!(at("localhost:5000/x").locator(), "localhost:5000/a/b");
        assert_eq!(at("other:5000/x").locator(), "localhost/a/b");
    }
}
