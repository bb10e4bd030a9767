//! The `oci` and `docker` exporters: an image as one tar to the client (rows `ex.oci.*`,
//! `ex.docker`).

use crate::{
    image, learn,
    lease::ExportLease,
    options::{Attrs, ImageOptions},
    port::{ExportContext, ExportInput, ExportTarget, Exported, Exporter, Response},
    services::ExportServices,
    tarball::Tarball,
    writer::{Writer, Written},
};
use async_trait::async_trait;
use bytes::Bytes;
use shipway_fault::{Fault, Result};
use shipway_oci::{Descriptor, ImageName, Index, gojson, media};
use shipway_refs::{Compression, Fetch};
use shipway_session::{ClientStore, Delivered, Session};
use std::{collections::BTreeMap, sync::Arc};

/// Which programs read the archive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Variant {
    /// An OCI layout.
    Oci,
    /// An OCI layout with what `docker load` wants besides.
    Docker,
}

pub(crate) struct ArchiveExporter {
    inner: Arc<ExportServices>,
    variant: Variant,
    options: ImageOptions,
    /// Whether the client gets blobs for a content store of its own instead of a tar (row
    /// `ex.oci.tar`).
    store: bool,
    metadata: BTreeMap<String, Vec<u8>>,
}

impl ArchiveExporter {
    pub fn new(
        inner: Arc<ExportServices>,
        variant: Variant,
        attrs: &BTreeMap<String, String>,
    ) -> Result<Self> {
        let mut attrs = Attrs::new(attrs);
        let store = !attrs.flag("tar")?.unwrap_or(true);
        let options = ImageOptions::take(&mut attrs)?;
        let options = if variant == Variant::Oci { options.with_oci_types() } else { options };
        Ok(Self { inner, variant, options, store, metadata: attrs.rest() })
    }

    /// Names with tag, completed (row `ex.oci.name`).
    fn names(&self, metadata: &BTreeMap<String, Vec<u8>>) -> Result<Vec<ImageName>> {
        let parse = |n: &String| {
            n.parse::<ImageName>().map_err(|e| Fault::invalid(format!("failed to parse {n}: {e}")))
        };
        self.options.names(metadata).iter().map(parse).collect()
    }
}

fn json(value: &impl serde::Serialize) -> Result<Bytes> {
    gojson::to_string(value)
        .map(Bytes::from)
        .map_err(|e| Fault::internal(format!("encode an archive's index: {e}")))
}

/// How many layers are known by descriptor only, if there are such.
fn missing(input: &ExportInput) -> Option<usize> {
    let layers = input.platforms.iter().filter_map(|p| p.state.known_layers()).flatten();
    Some(layers.filter(|layer| layer.lazy).count()).filter(|n| *n > 0)
}

fn blob_path(descriptor: &Descriptor) -> String {
    format!("blobs/sha256/{}", descriptor.digest.hex())
}

/// `index.json`: one entry per name (containerd's archive format).
fn index(root: &Descriptor, names: &[ImageName]) -> Index {
    let mut manifests = Vec::new();
    for name in names {
        let mut entry = root.clone();
        entry.annotations.insert("io.containerd.image.name".into(), name.to_string());
        entry.annotations.insert(
            "org.opencontainers.image.ref.name".into(),
            name.tag().unwrap_or("latest").to_owned(),
        );
        manifests.push(entry);
    }
    if manifests.is_empty() {
        manifests.push(root.clone());
    }
    Index {
        schema_version: 2,
        media_type: Some(media::OCI_INDEX.into()),
        manifests,
        annotations: BTreeMap::new(),
    }
}

/// `manifest.json`, which `docker load` reads.
fn docker_manifest(written: &Written, names: &[ImageName]) -> Result<Bytes> {
    let only =
        written.manifests.first().ok_or_else(|| Fault::internal("an image without a manifest"))?;
    json(&serde_json::json!([{
        "Config": blob_path(&only.config),
        "RepoTags": names.iter().map(ImageName::familiar).collect::<Vec<_>>(),
        "Layers": only.layers.iter().map(blob_path).collect::<Vec<_>>(),
    }]))
}

impl ArchiveExporter {
    /// Blobs first, then what names them; the client writes the layout's index from our answer.
    async fn fill(&self, store: &ClientStore, written: &Written) -> Result<()> {
        let content = &self.inner.refs.storage().content;
        let (data, manifests) = written.blobs();
        for blob in data.iter().chain(&manifests) {
            let mut reader = content.reader(blob.digest).await?;
            store.write(blob, reader.as_mut()).await?;
        }
        Ok(())
    }

    async fn send_tar(
        &self,
        session: &Session,
        written: &Written,
        root: &Descriptor,
        names: &[ImageName],
        response: &Response,
        cx: &ExportContext,
    ) -> Result<()> {
        cx.reporter.status("sending tarball", 0, 0, false);
        let mut tar = Tarball::new(session.file_send(cx.index, response)?);
        let sent = self.send(&mut tar, written, root, names).await;
        // A client that has the image already stops reading; only its answer shows that (row
        // `ex.oci.skip`).
        match tar.finish().await {
            Ok(Delivered::NotNeeded) => {}
            Ok(Delivered::Taken) => sent?,
            Err(fault) => return Err(fault),
        }
        cx.reporter.status("sending tarball", 0, 0, true);
        Ok(())
    }

    async fn send(
        &self,
        tar: &mut Tarball,
        written: &Written,
        root: &Descriptor,
        names: &[ImageName],
    ) -> Result<()> {
        let content = &self.inner.refs.storage().content;
        tar.directory("blobs/").await?;
        tar.directory("blobs/sha256/").await?;
        let (mut data, manifests) = written.blobs();
        data.extend(manifests);
        data.sort_by_key(|d| d.digest);
        data.dedup_by_key(|d| d.digest);
        for blob in &data {
            let mut reader = content.reader(blob.digest).await?;
            tar.begin(&blob_path(blob), reader.size()).await?;
            while let Some(bytes) = reader.next().await? {
                tar.data(bytes).await?;
            }
            tar.end().await?;
        }
        tar.file("index.json", json(&index(root, names))?).await?;
        if self.variant == Variant::Docker {
            tar.file("manifest.json", docker_manifest(written, names)?).await?;
        }
        tar.file("oci-layout", Bytes::from_static(br#"{"imageLayoutVersion":"1.0.0"}"#)).await
    }
}

#[async_trait]
impl Exporter for ArchiveExporter {
    /// What it makes is the client's.
    fn targets(&self, _: Option<&BTreeMap<String, Vec<u8>>>) -> Vec<ExportTarget> {
        Vec::new()
    }

    fn name(&self) -> &str {
        match self.variant {
            Variant::Oci => "exporting to oci image format",
            Variant::Docker => "exporting to docker image format",
        }
    }

    fn wants_layers(&self) -> Option<Compression> {
        Some(self.options.ahead())
    }

    fn wants_opened(&self) -> bool {
        self.options.optimize.as_ref().is_some_and(|optimize| optimize.steps)
    }

    async fn export(&self, mut input: ExportInput, cx: &ExportContext) -> Result<Exported> {
        if self.variant == Variant::Docker && input.is_map {
            return Err(Fault::invalid(
                "docker exporter does not currently support exporting manifest lists",
            )
            .hint("use type=oci, or build for one platform"));
        }
        input.metadata.extend(self.metadata.clone());
        let options = self.options.settled(
            &input,
            cx.compatibility,
            if self.variant == Variant::Oci { "oci" } else { "docker" },
        )?;
        let input = learn::prepared(&self.options, input, &self.inner, cx).await?;
        let epoch = self.options.epoch.whole(&input)?;
        let names = self.names(&input.metadata)?;
        let session = cx.sessions.hub().get(&cx.session).await?;
        let lease = ExportLease::new(&self.inner.refs.storage().leases, &cx.build, cx.index);
        let writer = Writer {
            refs: &self.inner.refs,
            lease: &lease,
            options: &options,
            reporter: &cx.reporter,
            fetch: Fetch::Everything,
        };
        let why = missing(&input).map(|n| format!("fetching {n} layers that the archive contains"));
        if let Some(why) = &why {
            cx.reporter.status(why.clone(), 0, 0, false);
        }
        let written = writer.write(&input).await?;
        if let Some(why) = why {
            cx.reporter.status(why, 0, 0, true);
        }
        let root = written.dated(epoch);
        let mut response = image::response(&written, &root)?;
        if !names.is_empty() {
            let text: Vec<String> = names.iter().map(ImageName::to_string).collect();
            response.insert("image.name".into(), text.join(","));
        }
        match self.store {
            true => self.fill(&session.store("export")?, &written).await?,
            false => self.send_tar(&session, &written, &root, &names, &response, cx).await?,
        }
        Ok(Exported { response, written: Some(root) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_has_an_entry_and_no_name_has_one_too() {
        let root = Descriptor::of(media::OCI_MANIFEST, b"{}");
        let names: Vec<ImageName> = ["a", "b.io/c:1"].iter().map(|n| n.parse().unwrap()).collect();
        let two = index(&root, &names);
        assert_eq!(two.manifests.len(), 2);
        assert_eq!(two.manifests[1].annotations["org.opencontainers.image.ref.name"], "1");
        assert_eq!(index(&root, &[]).manifests, [root]);
    }
}
