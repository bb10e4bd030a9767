//! What an image is: its configs, and what is said of it (row `bx.imagetools.inspect`).

use base64::{Engine as _, engine::general_purpose::STANDARD};
use bytes::Bytes;
use serde_json::{Map, Value, json};
use shipway_convert::Source;
use shipway_fault::{Fault, Result};
use shipway_oci::{Descriptor, Digest, ImageConfig, ImageName, Index, Manifest, media};
use std::{collections::BTreeMap, sync::Arc};

/// How deep indexes may lie in each other.
const MAX_DEPTH: usize = 4;
/// Most manifests that are read.
const MAX_MANIFESTS: usize = 1000;
/// Annotations that name the image which an entry of an index is about.
const ABOUT: [&str; 2] = ["com.docker.reference.digest", "vnd.docker.reference.digest"];
/// On a layer: what kind of statement it is.
const PREDICATE: &str = "in-toto.io/predicate-type";
const SPDX: &str = "https://spdx.dev/Document";
const SLSA: &str = "https://slsa.dev/provenance/";

/// An image that was looked up.
pub struct Inspection {
    source: Arc<dyn Source>,
    /// The name that was asked for.
    pub name: ImageName,
    /// What the name leads to.
    pub root: Descriptor,
    /// Its bytes.
    pub bytes: Bytes,
    /// The same read, if it is an index.
    pub index: Option<Index>,
}

/// Images by platform, and manifests of what is said, by the image that they are about.
#[derive(Default)]
struct Found {
    images: BTreeMap<String, (Digest, Manifest)>,
    statements: BTreeMap<Digest, Vec<Manifest>>,
    read: usize,
}

/// What is said of one image, as Go's templates see it.
#[derive(Default)]
struct Said {
    sbom: Map<String, Value>,
    provenance: Map<String, Value>,
}

impl Inspection {
    /// Looks `name` up in `source`, which is opened for it.
    pub async fn of(source: Arc<dyn Source>, name: ImageName) -> Result<Self> {
        let root = source.root().await?;
        let bytes = source.manifest(&root).await?;
        let index = match media::is_index(&root.media_type) {
            true => Some(serde_json::from_slice(&bytes).map_err(|e| {
                Fault::invalid(format!("the index {} cannot be read: {e}", root.digest))
            })?),
            false => None,
        };
        Ok(Self { source, name, root, bytes, index })
    }

    /// What templates are given: `name`, `manifest`, `image`, `SBOM` and `Provenance`; the last
    /// three by platform if the image has several. `called` is the name as the user wrote it.
    pub async fn value(&self, called: &str) -> Result<Value> {
        let mut found = Found::default();
        self.find(&self.root, &mut found, MAX_DEPTH).await?;
        let (mut images, mut sboms, mut provenances) = (Map::new(), Map::new(), Map::new());
        for (platform, (digest, manifest)) in &found.images {
            images.insert(platform.clone(), self.config(&manifest.config).await?);
            let statements = found.statements.get(digest).map(Vec::as_slice).unwrap_or_default();
            let said = self.said(statements).await?;
            if !said.sbom.is_empty() {
                sboms.insert(platform.clone(), said.sbom.into());
            }
            if !said.provenance.is_empty() {
                provenances.insert(platform.clone(), said.provenance.into());
            }
        }
        // One platform is not looked up by its name.
        let several = images.len() > 1;
        let shown = |map: Map<String, Value>, none: Value| match several {
            true => Value::Object(map),
            false => map.into_iter().next().map_or(none, |(_, value)| value),
        };
        Ok(json!({
            "name": called,
            "manifest": self.manifest_value()?,
            "image": shown(images, Value::Null),
            "SBOM": shown(sboms, json!({})),
            "Provenance": shown(provenances, json!({})),
        }))
    }

    /// The index with its own digest and size, or the manifest's descriptor.
    fn manifest_value(&self) -> Result<Value> {
        let failed = |e: serde_json::Error| Fault::internal(format!("encode a manifest: {e}"));
        let Some(index) = &self.index else {
            return serde_json::to_value(&self.root).map_err(failed);
        };
        let mut value = json!({"schemaVersion": index.schema_version});
        if let Some(media_type) = &index.media_type {
            value["mediaType"] = media_type.as_str().into();
        }
        value["digest"] = self.root.digest.to_string().into();
        value["size"] = self.root.size.into();
        value["manifests"] = serde_json::to_value(&index.manifests).map_err(failed)?;
        if !index.annotations.is_empty() {
            value["annotations"] = serde_json::to_value(&index.annotations).map_err(failed)?;
        }
        Ok(value)
    }

    async fn find(&self, entry: &Descriptor, found: &mut Found, depth: usize) -> Result<()> {
        let left = depth.checked_sub(1).ok_or_else(|| {
            Fault::invalid(format!("indexes lie more than {MAX_DEPTH} deep in each other"))
        })?;
        found.read += 1;
        if found.read > MAX_MANIFESTS {
            return Err(Fault::invalid(format!(
                "the image has more than {MAX_MANIFESTS} manifests"
            )));
        }
        let unreadable = |e: serde_json::Error| {
            Fault::invalid(format!("the manifest {} cannot be read: {e}", entry.digest))
        };
        if media::is_index(&entry.media_type) {
            let bytes = self.source.manifest(entry).await?;
            let index: Index = serde_json::from_slice(&bytes).map_err(unreadable)?;
            for entry in &index.manifests {
                Box::pin(self.find(entry, found, left)).await?;
            }
            return Ok(());
        }
        if !media::is_manifest(&entry.media_type) {
            return Ok(());
        }
        let bytes = self.source.manifest(entry).await?;
        let manifest: Manifest = serde_json::from_slice(&bytes).map_err(unreadable)?;
        let about = ABOUT.iter().find_map(|key| entry.annotations.get(*key));
        if let Some(image) = about {
            let image = image
                .parse()
                .map_err(|e| Fault::invalid(format!("{image:?} is not a valid digest: {e}")))?;
            found.statements.entry(image).or_default().push(manifest);
            return Ok(());
        }
        let platform = match &entry.platform {
            Some(platform) => platform.clone().normalized(),
            None => self.read_config(&manifest.config).await?.platform(),
        };
        found.images.insert(platform.to_string(), (entry.digest, manifest));
        Ok(())
    }

    async fn read_config(&self, descriptor: &Descriptor) -> Result<ImageConfig> {
        let bytes = self.source.config(descriptor).await?;
        serde_json::from_slice(&bytes).map_err(|e| {
            Fault::invalid(format!("the config {} cannot be read: {e}", descriptor.digest))
        })
    }

    /// The config with the fields that OCI has.
    async fn config(&self, descriptor: &Descriptor) -> Result<Value> {
        let mut config = self.read_config(descriptor).await?;
        config.config.healthcheck = None;
        config.config.on_build.clear();
        config.config.shell.clear();
        serde_json::to_value(&config).map_err(|e| Fault::internal(format!("encode a config: {e}")))
    }

    async fn said(&self, statements: &[Manifest]) -> Result<Said> {
        let mut said = Said::default();
        let mut more = Vec::new();
        for layer in statements.iter().flat_map(|manifest| &manifest.layers) {
            let Some(kind) = layer.annotations.get(PREDICATE) else { continue };
            let is_signed = is_signed(&layer.media_type);
            if layer.media_type != media::IN_TOTO && !is_signed {
                continue;
            }
            let (sbom, provenance) = (kind == SPDX, kind.starts_with(SLSA));
            if !sbom && !provenance {
                continue;
            }
            let bytes = self.source.config(layer).await?;
            let predicate = predicate(&bytes, is_signed)
                .map_err(|f| f.context(format!("read the statement {}", layer.digest)))?;
            match () {
                () if provenance => _ = said.provenance.insert("SLSA".to_owned(), predicate),
                () if said.sbom.is_empty() => {
                    said.sbom.insert("SPDX".to_owned(), predicate);
                }
                () => more.push(predicate),
            }
        }
        if !more.is_empty() {
            said.sbom.insert("AdditionalSPDXs".to_owned(), more.into());
        }
        Ok(said)
    }
}

/// Whether a statement lies in an envelope of signatures.
fn is_signed(media_type: &str) -> bool {
    media_type.starts_with("application/vnd.in-toto.") && media_type.ends_with("+dsse")
}

/// What a statement says. Signatures are not looked at.
fn predicate(bytes: &[u8], is_signed: bool) -> Result<Value> {
    let invalid = |e: serde_json::Error| Fault::invalid(e.to_string());
    let opened;
    let bytes = match is_signed {
        true => {
            let envelope: Value = serde_json::from_slice(bytes).map_err(invalid)?;
            let payload = envelope["payload"].as_str().unwrap_or_default();
            opened = STANDARD
                .decode(payload)
                .map_err(|e| Fault::invalid(format!("the payload is not base64: {e}")))?;
            &opened[..]
        }
        false => bytes,
    };
    let mut statement: Value = serde_json::from_slice(bytes).map_err(invalid)?;
    Ok(sorted(statement["predicate"].take()))
}

/// Keys in order, as Go prints what it has no type for.
fn sorted(value: Value) -> Value {
    match value {
        Value::Object(map) => {
            let sorted: BTreeMap<String, Value> =
                map.into_iter().map(|(key, value)| (key, sorted(value))).collect();
            Value::Object(sorted.into_iter().collect())
        }
        Value::Array(list) => list.into_iter().map(sorted).collect(),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use async_trait::async_trait;
    use futures::StreamExt as _;
    use shipway_registry::BodyStream;

    /// Documents by digest; the last one is the root.
    #[derive(Default)]
    struct Memory(Vec<(Descriptor, Bytes)>);

    impl Memory {
        fn put(&mut self, media_type: &str, value: Value) -> Descriptor {
            let bytes = Bytes::from(value.to_string());
            let descriptor = Descriptor::of(media_type, &bytes);
            self.0.push((descriptor.clone(), bytes));
            descriptor
        }

        fn image(&mut self, platform: &str, env: &str) -> Descriptor {
            let (os, architecture) = platform.split_once('/').unwrap();
            let config = self.put(
                media::OCI_CONFIG,
                json!({"architecture": architecture, "os": os, "config": {"Env": [env], "Shell": ["x"]},
                    "rootfs": {"type": "layers", "diff_ids": []}, "own": 1}),
            );
            let manifest = json!({"schemaVersion": 2, "config": config, "layers": []});
            let mut made = self.put(media::OCI_MANIFEST, manifest);
            made.platform = Some(platform.parse().unwrap());
            made
        }

        fn statements(&mut self, about: &Descriptor, layers: &[(&str, &str, Value)]) -> Descriptor {
            let layers: Vec<Descriptor> = layers
                .iter()
                .map(|(media_type, kind, value)| {
                    let mut layer = self.put(media_type, value.clone());
                    layer.annotations.insert(PREDICATE.to_owned(), (*kind).to_owned());
                    layer
                })
                .collect();
            let config = self.put(media::OCI_CONFIG, json!({}));
            let manifest = json!({"schemaVersion": 2, "config": config, "layers": layers});
            let mut made = self.put(media::OCI_MANIFEST, manifest);
            made.annotations.insert(ABOUT[1].to_owned(), about.digest.to_string());
            made
        }
    }

    #[async_trait]
    impl Source for Memory {
        async fn root(&self) -> Result<Descriptor> {
            Ok(self.0.last().unwrap().0.clone())
        }
        async fn manifest(&self, wanted: &Descriptor) -> Result<Bytes> {
            let found = self.0.iter().find(|(d, _)| d.digest == wanted.digest);
            found.map(|(_, b)| b.clone()).ok_or_else(|| Fault::not_found("no such document"))
        }
        async fn config(&self, wanted: &Descriptor) -> Result<Bytes> {
            self.manifest(wanted).await
        }
        async fn blob(&self, wanted: &Descriptor) -> Result<BodyStream> {
            let bytes = self.manifest(wanted).await?;
            Ok(futures::stream::iter([Ok(bytes)]).boxed())
        }
    }

    async fn value(memory: Memory) -> Result<Value> {
        let name = "r.io/a:1".parse().unwrap();
        Inspection::of(Arc::new(memory), name).await?.value("a:1").await
    }

    #[tokio::test]
    async fn one_platform_is_shown_as_it_is() {
        let mut memory = Memory::default();
        let image = memory.image("linux/amd64", "A=1");
        let signed =
            json!({"payload": STANDARD.encode(r#"{"predicate":{"b":1,"a":{"d":2,"c":3}}}"#)});
        let said = memory.statements(
            &image,
            &[
                (
                    "application/vnd.in-toto.provenance+dsse",
                    "https://slsa.dev/provenance/v1",
                    signed,
                ),
                (media::IN_TOTO, SPDX, json!({"predicate": {"name": "first"}})),
                (media::IN_TOTO, SPDX, json!({"predicate": {"name": "second"}})),
                (media::IN_TOTO, "https://example.org/other", json!({})),
            ],
        );
        let index =
            json!({"schemaVersion": 2, "mediaType": media::OCI_INDEX, "manifests": [image, said]});
        let root = memory.put(media::OCI_INDEX, index);
        let value = value(memory).await.unwrap();
        assert_eq!(value["name"], "a:1");
        assert_eq!(value["manifest"]["digest"], root.digest.to_string());
        assert_eq!(value["manifest"]["manifests"].as_array().unwrap().len(), 2);
        // As Go's types have it: in their order, with what OCI knows only.
        assert_eq!(
            value["image"].to_string(),
            r#"{"architecture":"amd64","os":"linux","config":{"Env":["A=1"]},"rootfs":{"type":"layers","diff_ids":null}}"#
        );
        assert_eq!(value["Provenance"].to_string(), r#"{"SLSA":{"a":{"c":3,"d":2},"b":1}}"#);
        assert_eq!(
            value["SBOM"].to_string(),
            r#"{"SPDX":{"name":"first"},"AdditionalSPDXs":[{"name":"second"}]}"#
        );
    }

    #[tokio::test]
    async fn several_platforms_are_shown_by_name() {
        let mut memory = Memory::default();
        let (amd, arm) = (memory.image("linux/amd64", "A=1"), memory.image("linux/arm64", "A=2"));
        let said = memory.statements(
            &arm,
            &[(media::IN_TOTO, "https://slsa.dev/provenance/v0.2", json!({"predicate": {"x": 1}}))],
        );
        memory.put(media::OCI_INDEX, json!({"schemaVersion": 2, "manifests": [amd, arm, said]}));
        let value = value(memory).await.unwrap();
        assert_eq!(value["image"]["linux/arm64"]["config"]["Env"][0], "A=2");
        assert_eq!(value["Provenance"].to_string(), r#"{"linux/arm64":{"SLSA":{"x":1}}}"#);
        assert_eq!(value["SBOM"], json!({}));
    }

    #[tokio::test]
    async fn a_manifest_alone_is_its_descriptor() {
        let mut memory = Memory::default();
        let mut image = memory.image("linux/arm64", "A=1");
        image.platform = None;
        let value = value(memory).await.unwrap();
        assert_eq!(value["manifest"], serde_json::to_value(&image).unwrap());
        assert_eq!(value["image"]["architecture"], "arm64");
        assert_eq!(value["Provenance"], json!({}));
    }

    #[tokio::test]
    async fn what_is_too_deep_or_too_much_is_refused() {
        let mut memory = Memory::default();
        let mut root = memory.image("linux/amd64", "A=1");
        let wide = json!({"schemaVersion": 2, "manifests": vec![root.clone(); MAX_MANIFESTS]});
        for _ in 0..MAX_DEPTH {
            let index = json!({"schemaVersion": 2, "manifests": [root]});
            root = memory.put(media::OCI_INDEX, index);
        }
        assert!(value(memory).await.unwrap_err().message().contains("deep"));
        let mut memory = Memory::default();
        memory.image("linux/amd64", "A=1");
        memory.put(media::OCI_INDEX, wide);
        assert!(value(memory).await.unwrap_err().message().contains("more than"));
    }
}
