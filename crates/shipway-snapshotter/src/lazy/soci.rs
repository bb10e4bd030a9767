//! SOCI indexes: what somebody else found out of an image's ordinary layers, so that they are lazy
//! when they are pulled first.
//!
//! Which index is used decides what containers see, until a layer is whole and was compared with
//! it. One of version 2 is named by the image's manifest, and so its author stands for it as for
//! the layers themselves: from the manifest's digest down to each span everything is verified. One
//! of version 1 is whatever the registry says that refers to the image; it is used only where that
//! is allowed.

use super::{
    Lazy,
    resolve::{Image, Resolver},
};
use crate::config::Soci;
use shipway_fault::{Class, Code, Context as _, Fault, Result};
use shipway_layerstore::LayerKey;
use shipway_oci::{Descriptor, DiffId, Digest, ImageConfig, ImageName, Manifest, soci};
use shipway_plainlayer::MAX_ZTOC;
use std::{collections::BTreeMap, sync::Arc};

/// The index of a layer.
pub(super) struct Ztoc {
    descriptor: Descriptor,
    /// What the image's config says of the layer's tar.
    pub diff_id: DiffId,
}

/// By the digests of the layers.
pub(super) type Ztocs = BTreeMap<Digest, Ztoc>;

impl Ztoc {
    /// What the layer with the blob `layer` is found by.
    pub fn key(&self, layer: Digest) -> LayerKey {
        LayerKey::indexed(layer, self.descriptor.digest, self.diff_id)
    }
}

fn not_valid(what: &str) -> Fault {
    Fault::new(Code::DataLoss, what.to_owned()).with_class(Class::Environment)
}

impl Resolver {
    /// The indexes of an image's layers, none if they cannot be had.
    pub(super) async fn ztocs(&self, lazy: &Lazy, name: &ImageName, image: &Image) -> Arc<Ztocs> {
        let setting = lazy.config.lazy.soci;
        if setting == Soci::Off || (setting == Soci::Image && image.soci.is_none()) {
            return Arc::default();
        }
        let found = image.ztocs.get_or_try_init(|| self.find_ztocs(name, image)).await;
        found.cloned().unwrap_or_else(|fault| {
            tracing::info!(image = %name, %fault, "the SOCI index is not used");
            Arc::default()
        })
    }

    async fn find_ztocs(&self, name: &ImageName, image: &Image) -> Result<Arc<Ztocs>> {
        let repository = self.repository(name);
        let index = match image.soci {
            // Its length is not known, its digest is.
            Some(index) => Descriptor::new("", index, 0),
            None => {
                let all = repository.referrers(image.manifest.digest).await?;
                let is_index =
                    |entry: &Descriptor| entry.artifact_type.as_deref() == Some(soci::INDEX_V1);
                match all.into_iter().find(is_index) {
                    Some(index) => index,
                    None => return Ok(Arc::default()),
                }
            }
        };
        let config = async { Ok::<_, Fault>(repository.fetch_small_blob(&image.config).await?) };
        let bytes = async { Ok(repository.fetch_manifest(&index).await?) };
        let (bytes, config) = tokio::try_join!(bytes, config)?;
        read(&bytes, &config, image).context(|| format!("read the SOCI index {}", index.digest))
    }

    /// The bytes of a layer's index.
    pub(super) async fn ztoc(&self, image: &ImageName, ztoc: &Ztoc) -> Result<Vec<u8>> {
        let size = usize::try_from(ztoc.descriptor.size).unwrap_or(usize::MAX);
        if size > MAX_ZTOC {
            return Err(not_valid("the zTOC of a layer is too large"));
        }
        let mut bytes = Vec::with_capacity(size);
        let mut reader = self.repository(image).fetch_blob(&ztoc.descriptor, 0).await?.verified();
        while let Some(piece) = reader.next().await? {
            bytes.extend_from_slice(&piece);
        }
        Ok(bytes)
    }
}

/// What the index `bytes` of an image with the config `config` says.
fn read(bytes: &[u8], config: &[u8], image: &Image) -> Result<Arc<Ztocs>> {
    let index: Manifest =
        serde_json::from_slice(bytes).map_err(|e| Fault::invalid(e.to_string()))?;
    let subject = index.subject.as_ref().map(|subject| subject.digest);
    let (version, is_about) = match image.soci {
        Some(_) => (soci::INDEX_V2, true),
        None => (soci::INDEX_V1, subject == Some(image.manifest.digest)),
    };
    if index.config.media_type != version || !is_about {
        return Err(not_valid("it is of another version, or of another image"));
    }
    let config: ImageConfig = serde_json::from_slice(config)
        .map_err(|e| Fault::invalid(format!("the image's config: {e}")))?;
    let diff_ids = &config.rootfs.diff_ids;
    if diff_ids.len() != image.layers.len() {
        return Err(not_valid("the image's config has another number of layers"));
    }
    let ztocs: BTreeMap<Digest, &Descriptor> = soci::ztocs(&index).collect();
    let of_layers = image.layers.iter().zip(diff_ids).filter_map(|(layer, diff_id)| {
        let descriptor = (*ztocs.get(&layer.digest)?).clone();
        Some((layer.digest, Ztoc { descriptor, diff_id: *diff_id }))
    });
    Ok(Arc::new(of_layers.collect()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use tokio::sync::OnceCell;

    fn descriptor(text: &str) -> Descriptor {
        Descriptor::of("application/x", text.as_bytes())
    }

    fn image(soci: Option<Digest>) -> Image {
        let (manifest, config) = (descriptor("manifest"), descriptor("config"));
        let layers = ["one", "two", "three"].map(descriptor).into();
        Image { manifest, config, layers, soci, ztocs: OnceCell::new() }
    }

    fn index(version: &str, subject: Option<Descriptor>) -> Vec<u8> {
        let ztoc = |layer: &str, media_type: &str| {
            let mut ztoc = Descriptor::of(media_type, format!("ztoc of {layer}").as_bytes());
            let digest = Digest::of(layer).to_string();
            ztoc.annotations.insert(soci::LAYER_DIGEST.to_owned(), digest);
            ztoc
        };
        let index = Manifest {
            schema_version: 2,
            media_type: None,
            artifact_type: None,
            config: Descriptor::of(version, b"{}"),
            layers: vec![
                ztoc("three", soci::ZTOC),
                ztoc("one", soci::ZTOC),
                ztoc("elsewhere", soci::ZTOC),
                // What is fetched first, and not said of how a layer is read.
                ztoc("two", "application/vnd.amazon.soci.prefetch.v1+json"),
            ],
            subject,
            annotations: BTreeMap::new(),
        };
        serde_json::to_vec(&index).expect("JSON")
    }

    fn config(tars: &[&str]) -> Vec<u8> {
        let tars: Vec<String> = tars.iter().map(|tar| Digest::of(tar).to_string()).collect();
        let rootfs = json!({"type": "layers", "diff_ids": tars});
        serde_json::to_vec(&json!({"architecture": "amd64", "os": "linux", "rootfs": rootfs}))
            .expect("JSON")
    }

    #[test]
    fn an_index_is_of_the_layers_of_its_image() {
        let config = config(&["1", "2", "3"]);
        let image_v2 = image(Some(Digest::of("index")));
        let found = read(&index(soci::INDEX_V2, None), &config, &image_v2).expect("an index");
        let of =
            |layer: &str| found.get(&Digest::of(layer)).map(|z| (z.descriptor.digest, z.diff_id.0));
        assert_eq!(of("one"), Some((Digest::of("ztoc of one"), Digest::of("1"))));
        assert_eq!(of("three"), Some((Digest::of("ztoc of three"), Digest::of("3"))));
        assert_eq!((of("two"), of("elsewhere"), found.len()), (None, None, 2));
        let referring = index(soci::INDEX_V1, Some(descriptor("manifest")));
        assert_eq!(read(&referring, &config, &image(None)).expect("an index").len(), 2);
    }

    #[test]
    fn other_indexes_are_refused() {
        let config_of_three = config(&["1", "2", "3"]);
        let named = image(Some(Digest::of("index")));
        let v2 = index(soci::INDEX_V2, None);
        let of = |text: &str| Some(descriptor(text));
        for (index, config, image) in [
            (&index(soci::INDEX_V1, of("manifest")), &config_of_three, &named),
            (&v2, &config_of_three, &image(None)),
            (&index(soci::INDEX_V1, of("another")), &config_of_three, &image(None)),
            (&index(soci::INDEX_V1, None), &config_of_three, &image(None)),
            (&v2, &config(&["1", "2"]), &named),
            (&b"{".to_vec(), &config_of_three, &named),
        ] {
            assert!(read(index, config, image).is_err());
        }
    }
}
