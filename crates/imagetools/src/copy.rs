//! A manifest or index with all that it leads to, from one place to another.

use bytes::Bytes;
use futures::{StreamExt as _, TryStreamExt as _, future::BoxFuture, stream};
use parking_lot::Mutex;
use shipway_convert::{Progress, Source, Target};
use shipway_fault::{Context as _, Fault, Result};
use shipway_oci::{Descriptor, Digest, Index, Manifest, media};
use std::{collections::HashMap, sync::Arc};
use tokio::sync::OnceCell;

/// Blobs of one manifest, and manifests of one index, that are copied at the same time. What a
/// registry is sent at once is limited by its client.
const PARALLEL: usize = 4;
/// How deep indexes, and what refers to what refers, may lie in each other.
const MAX_DEPTH: usize = 4;
/// Most entries of an index, layers of an image, and manifests that refer to one.
const MAX_ENTRIES: usize = 1000;
/// What travels with the manifest that it refers to (row `bx.imagetools.create`): attestations,
/// and the signatures of cosign. Others, such as results of scanners, are of their registry.
const TRAVELS: [&str; 3] = [
    "application/vnd.docker.attestation.manifest.v1+json",
    "application/vnd.dev.cosign.artifact.sig.v1+json",
    "application/vnd.dev.sigstore.bundle.v0.3+json",
];

/// Copies into one target; what was copied once is not copied again.
pub struct Copier {
    target: Arc<dyn Target>,
    progress: Progress,
    done: Mutex<HashMap<Digest, Arc<OnceCell<()>>>>,
}

fn parse<T: serde::de::DeserializeOwned>(bytes: &[u8], digest: Digest) -> Result<T> {
    serde_json::from_slice(bytes)
        .map_err(|e| Fault::invalid(format!("the manifest {digest} cannot be read: {e}")))
}

fn bounded<T>(list: &[T], what: &str) -> Result<()> {
    if list.len() > MAX_ENTRIES {
        return Err(Fault::invalid(format!("{what} more than {MAX_ENTRIES} entries")));
    }
    Ok(())
}

impl Copier {
    /// Copies to `target`, and tells `progress` of blobs.
    pub fn new(target: Arc<dyn Target>, progress: Progress) -> Self {
        Self { target, progress, done: Mutex::default() }
    }

    /// Copies `descriptor`, which `source` has, and all that it leads to, and what refers to it.
    pub async fn copy(&self, source: &Arc<dyn Source>, descriptor: &Descriptor) -> Result<()> {
        self.entry(source, descriptor, MAX_DEPTH).await
    }

    /// Copies what refers to the manifest `subject`.
    pub async fn referrers(&self, source: &Arc<dyn Source>, subject: Digest) -> Result<()> {
        self.referring(source, subject, MAX_DEPTH).await
    }

    fn once(&self, digest: Digest) -> Arc<OnceCell<()>> {
        self.done.lock().entry(digest).or_default().clone()
    }

    fn entry<'a>(
        &'a self,
        source: &'a Arc<dyn Source>,
        descriptor: &'a Descriptor,
        depth: usize,
    ) -> BoxFuture<'a, Result<()>> {
        Box::pin(async move {
            let left = depth.checked_sub(1).ok_or_else(|| {
                Fault::invalid(format!("manifests lie more than {MAX_DEPTH} deep in each other"))
            })?;
            let once = self.once(descriptor.digest);
            once.get_or_try_init(async || {
                let bytes = source.manifest(descriptor).await?;
                match &*descriptor.media_type {
                    t if media::is_index(t) => self.index(source, descriptor, bytes, left).await,
                    t if media::is_manifest(t) => self.manifest(source, descriptor, bytes).await,
                    other => Err(Fault::invalid(format!(
                        "{} is neither a manifest nor an index, but {other:?}",
                        descriptor.digest
                    ))),
                }?;
                self.referring(source, descriptor.digest, left).await
            })
            .await
            .copied()
        })
    }

    async fn index(
        &self,
        source: &Arc<dyn Source>,
        descriptor: &Descriptor,
        bytes: Bytes,
        depth: usize,
    ) -> Result<()> {
        let index: Index = parse(&bytes, descriptor.digest)?;
        bounded(&index.manifests, "an index has")?;
        let children: Vec<Digest> = index.manifests.iter().map(|entry| entry.digest).collect();
        let work = index.manifests.iter().map(|entry| self.entry(source, entry, depth));
        let work: Vec<_> = work.collect();
        stream::iter(work).buffer_unordered(PARALLEL).try_collect::<()>().await?;
        self.target.manifest(descriptor, bytes, &children).await
    }

    async fn manifest(
        &self,
        source: &Arc<dyn Source>,
        descriptor: &Descriptor,
        bytes: Bytes,
    ) -> Result<()> {
        let manifest: Manifest = parse(&bytes, descriptor.digest)?;
        bounded(&manifest.layers, "an image has")?;
        let blobs: Vec<&Descriptor> = manifest.layers.iter().chain([&manifest.config]).collect();
        let work = blobs.iter().filter(|blob| !media::is_foreign(&blob.media_type));
        let work = work.map(|blob| self.blob(source, blob));
        let work: Vec<BoxFuture<'_, Result<()>>> = work.map(|w| Box::pin(w) as _).collect();
        stream::iter(work).buffer_unordered(PARALLEL).try_collect::<()>().await?;
        let children: Vec<Digest> = blobs.iter().map(|blob| blob.digest).collect();
        self.target.manifest(descriptor, bytes, &children).await
    }

    async fn blob(&self, source: &Arc<dyn Source>, blob: &Descriptor) -> Result<()> {
        let once = self.once(blob.digest);
        let copy = async || self.target.copy(blob, source, &self.progress).await;
        once.get_or_try_init(copy)
            .await
            .context(|| format!("copy the blob {}", blob.digest))
            .copied()
    }

    async fn referring(
        &self,
        source: &Arc<dyn Source>,
        subject: Digest,
        depth: usize,
    ) -> Result<()> {
        let all = source.referrers(subject).await?;
        bounded(&all, "the list of what refers to a manifest has")?;
        let travels = |entry: &&Descriptor| {
            entry.artifact_type.as_deref().is_some_and(|kind| TRAVELS.contains(&kind))
        };
        for entry in all.iter().filter(travels) {
            self.entry(source, entry, depth)
                .await
                .context(|| format!("copy what refers to {subject}"))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use async_trait::async_trait;
    use shipway_registry::BodyStream;
    use std::collections::{BTreeMap, BTreeSet};

    /// Documents and blobs in memory; what refers to what.
    #[derive(Default)]
    struct Memory {
        blobs: BTreeMap<String, Bytes>,
        referrers: Vec<(Digest, Descriptor)>,
    }

    #[async_trait]
    impl Source for Memory {
        async fn root(&self) -> Result<Descriptor> {
            Err(Fault::internal("not asked for"))
        }
        async fn manifest(&self, descriptor: &Descriptor) -> Result<Bytes> {
            let found = self.blobs.get(&descriptor.digest.to_string()).cloned();
            found.ok_or_else(|| Fault::not_found(descriptor.digest.to_string()))
        }
        async fn config(&self, descriptor: &Descriptor) -> Result<Bytes> {
            self.manifest(descriptor).await
        }
        async fn blob(&self, descriptor: &Descriptor) -> Result<BodyStream> {
            let bytes = self.manifest(descriptor).await?;
            Ok(stream::iter([Ok(bytes)]).boxed())
        }
        async fn referrers(&self, subject: Digest) -> Result<Vec<Descriptor>> {
            Ok(self
                .referrers
                .iter()
                .filter(|(s, _)| *s == subject)
                .map(|(_, d)| d.clone())
                .collect())
        }
    }

    impl Memory {
        fn put(&mut self, media_type: &str, text: String) -> Descriptor {
            let descriptor = Descriptor::of(media_type, text.as_bytes());
            self.blobs.insert(descriptor.digest.to_string(), text.into());
            descriptor
        }

        fn manifest_of(&mut self, layers: &[&Descriptor], artifact: Option<&str>) -> Descriptor {
            let config = self.put(media::OCI_CONFIG, format!("{{\"n\":{}}}", self.blobs.len()));
            let manifest = Manifest {
                schema_version: 2,
                media_type: Some(media::OCI_MANIFEST.into()),
                artifact_type: None,
                config,
                layers: layers.iter().map(|l| (*l).clone()).collect(),
                subject: None,
                annotations: BTreeMap::new(),
            };
            let mut made = self.put(media::OCI_MANIFEST, serde_json::to_string(&manifest).unwrap());
            made.artifact_type = artifact.map(str::to_owned);
            made
        }

        fn index_of(&mut self, entries: &[&Descriptor]) -> Descriptor {
            let index = Index {
                schema_version: 2,
                media_type: Some(media::OCI_INDEX.into()),
                manifests: entries.iter().map(|e| (*e).clone()).collect(),
                annotations: BTreeMap::new(),
            };
            self.put(media::OCI_INDEX, serde_json::to_string(&index).unwrap())
        }
    }

    /// What it got, in order; a manifest before what it leads to is an error.
    #[derive(Default)]
    struct Strict(Mutex<Vec<Digest>>);

    #[async_trait]
    impl Target for Strict {
        async fn copy(&self, blob: &Descriptor, _: &Arc<dyn Source>, _: &Progress) -> Result<()> {
            self.0.lock().push(blob.digest);
            Ok(())
        }
        async fn config(&self, _: &Descriptor, _: Bytes) -> Result<()> {
            Err(Fault::internal("nothing is made anew"))
        }
        async fn manifest(&self, d: &Descriptor, bytes: Bytes, children: &[Digest]) -> Result<()> {
            assert_eq!(d.digest, Digest::of(&bytes));
            let mut got = self.0.lock();
            assert!(children.iter().all(|child| got.contains(child)), "a child is missing");
            got.push(d.digest);
            Ok(())
        }
        async fn finish(&self, _: &Descriptor) -> Result<()> {
            Ok(())
        }
    }

    async fn copied(source: Memory, root: &Descriptor) -> Result<Vec<Digest>> {
        let target = Arc::new(Strict::default());
        let source: Arc<dyn Source> = Arc::new(source);
        Copier::new(target.clone(), Arc::new(|_| {})).copy(&source, root).await?;
        let got = target.0.lock().clone();
        Ok(got)
    }

    #[tokio::test]
    async fn everything_is_copied_once_and_children_first() {
        let mut memory = Memory::default();
        let shared = memory.put(media::OCI_LAYER_GZIP, "shared".into());
        let own = memory.put(media::OCI_LAYER_GZIP, "own".into());
        let foreign = Descriptor::of(media::OCI_FOREIGN_GZIP, b"kept by its vendor");
        let (a, b) =
            (memory.manifest_of(&[&shared], None), memory.manifest_of(&[&shared, &own], None));
        let inner = memory.index_of(&[&a]);
        let root = memory.index_of(&[&inner, &b, &a]);
        let signature = memory.manifest_of(&[], Some(TRAVELS[1]));
        let scan = memory.manifest_of(&[], Some("application/x-scan"));
        memory.referrers = vec![(a.digest, signature.clone()), (a.digest, scan.clone())];
        let all: BTreeSet<String> = memory.blobs.keys().cloned().collect();

        let got = copied(memory, &root).await.unwrap();
        let set: BTreeSet<String> = got.iter().map(ToString::to_string).collect();
        assert_eq!(set.len(), got.len(), "something came twice");
        // The scan and its config stay where they are; the foreign layer is nobody's.
        assert_eq!(all.difference(&set).count(), 2);
        assert!(set.contains(&signature.digest.to_string()) && !got.contains(&scan.digest));
        assert!(!got.contains(&foreign.digest));
    }

    #[tokio::test]
    async fn foreign_layers_are_left_out() {
        let mut memory = Memory::default();
        let foreign = Descriptor::of(media::OCI_FOREIGN_GZIP, b"kept by its vendor");
        let bytes = serde_json::to_string(&Manifest {
            schema_version: 2,
            media_type: None,
            artifact_type: None,
            config: memory.put(media::OCI_CONFIG, "{}".into()),
            layers: vec![foreign.clone()],
            subject: None,
            annotations: BTreeMap::new(),
        });
        let root = memory.put(media::OCI_MANIFEST, bytes.unwrap());
        struct Lenient(Strict);
        #[async_trait]
        impl Target for Lenient {
            async fn copy(&self, b: &Descriptor, s: &Arc<dyn Source>, p: &Progress) -> Result<()> {
                self.0.copy(b, s, p).await
            }
            async fn config(&self, d: &Descriptor, b: Bytes) -> Result<()> {
                self.0.config(d, b).await
            }
            async fn manifest(&self, d: &Descriptor, _: Bytes, _: &[Digest]) -> Result<()> {
                self.0.0.lock().push(d.digest);
                Ok(())
            }
            async fn finish(&self, _: &Descriptor) -> Result<()> {
                Ok(())
            }
        }
        let target = Arc::new(Lenient(Strict::default()));
        let source: Arc<dyn Source> = Arc::new(memory);
        Copier::new(target.clone(), Arc::new(|_| {})).copy(&source, &root).await.unwrap();
        let got = target.0.0.lock().clone();
        assert!(!got.contains(&foreign.digest) && got.len() == 2, "{got:?}");
    }

    #[tokio::test]
    async fn depth_and_numbers_are_bounded() {
        let mut memory = Memory::default();
        let mut root = memory.manifest_of(&[], None);
        for _ in 0..MAX_DEPTH {
            root = memory.index_of(&[&root]);
        }
        let deep = copied(memory, &root).await.unwrap_err();
        assert!(deep.message().contains("deep"), "{deep}");

        let mut memory = Memory::default();
        let one = memory.manifest_of(&[], None);
        let wide = memory.index_of(&vec![&one; MAX_ENTRIES + 1]);
        assert!(copied(memory, &wide).await.unwrap_err().message().contains("more than"));

        let mut memory = Memory::default();
        let odd = memory.put("text/plain", "hello".into());
        let odd = memory.index_of(&[&odd]);
        assert!(copied(memory, &odd).await.unwrap_err().message().contains("neither"));
    }
}
