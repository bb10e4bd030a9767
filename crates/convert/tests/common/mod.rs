//! A store with images made for a test.

#![allow(dead_code, reason = "not every test reads bytes")]

use serde_json::json;
use shipway_archive::{Compression, CompressionKind, LayerTree, pack};
use shipway_convert::Stored;
use shipway_oci::{Descriptor, Digest, Index, Manifest, Platform, media};
use shipway_storage::{GC_FLAT, Labels, LeaseId, Storage, fake::FakeStorage};
use std::{path::Path, sync::Arc};

/// On an entry of an index: the image that it is about.
pub const ABOUT: &str = "vnd.docker.reference.digest";

pub struct Lab {
    pub fake: FakeStorage,
    pub lease: LeaseId,
}

impl Lab {
    pub async fn new() -> Self {
        let (fake, lease) = (FakeStorage::new().unwrap(), LeaseId("test".into()));
        let flat = Labels::from([(GC_FLAT.to_owned(), "true".to_owned())]);
        fake.storage().leases.create(&lease, &flat).await.unwrap();
        Self { fake, lease }
    }

    pub fn storage(&self) -> Storage {
        self.fake.storage()
    }

    pub async fn put(&self, media_type: &str, bytes: Vec<u8>) -> Descriptor {
        let descriptor = Descriptor::of(media_type, &bytes);
        self.storage().content.put(&self.lease, bytes.into(), &Labels::new()).await.unwrap();
        descriptor
    }

    pub async fn json(&self, media_type: &str, value: &impl serde::Serialize) -> Descriptor {
        self.put(media_type, serde_json::to_vec(value).unwrap()).await
    }

    /// A layer with the files in `dir`, and its diffID.
    pub async fn packed(&self, dir: &Path, kind: CompressionKind) -> (Descriptor, Digest) {
        let tree = LayerTree::whole(dir).at(Some(1_000_000_000));
        let mut blob = Vec::new();
        let compression = Compression { kind, ..Compression::default() };
        let packed = pack(&tree, compression, None, None, &mut |bytes| {
            blob.extend_from_slice(&bytes);
            Ok(())
        })
        .unwrap();
        (self.put(kind.media_type(), blob).await, packed.tar.diff_id.0)
    }

    pub async fn image(&self, platform: &str, layers: &[(Descriptor, Digest)]) -> Descriptor {
        let platform: Platform = platform.parse().unwrap();
        let diff_ids: Vec<String> = layers.iter().map(|(_, id)| id.to_string()).collect();
        let config = json!({
            "architecture": platform.architecture,
            "os": platform.os,
            "unknown": {"kept": [1, 2]},
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        });
        let manifest = Manifest {
            schema_version: 2,
            media_type: Some(media::DOCKER_MANIFEST.into()),
            artifact_type: None,
            config: self.json(media::DOCKER_CONFIG, &config).await,
            layers: layers.iter().map(|(layer, _)| layer.clone()).collect(),
            subject: None,
            annotations: [
                ("k".to_owned(), "v".to_owned()),
                ("escaped".to_owned(), "<v>".to_owned()),
            ]
            .into(),
        };
        let descriptor = self.json(media::DOCKER_MANIFEST, &manifest).await;
        Descriptor { platform: Some(platform), ..descriptor }
    }

    pub async fn index(&self, manifests: Vec<Descriptor>) -> Descriptor {
        let index = Index {
            schema_version: 2,
            media_type: Some(media::DOCKER_LIST.into()),
            manifests,
            annotations: Default::default(),
        };
        self.json(media::DOCKER_LIST, &index).await
    }

    pub async fn attestation(&self, about: &Descriptor) -> Descriptor {
        let manifest = Manifest {
            schema_version: 2,
            media_type: Some(media::OCI_MANIFEST.into()),
            artifact_type: None,
            config: self.json(media::OCI_CONFIG, &json!({"os": "unknown"})).await,
            layers: vec![self.put(media::IN_TOTO, b"{}".to_vec()).await],
            subject: None,
            annotations: Default::default(),
        };
        let mut descriptor = self.json(media::OCI_MANIFEST, &manifest).await;
        descriptor.platform = Some(Platform::new("unknown", "unknown", ""));
        descriptor.annotations = [
            ("vnd.docker.reference.type".to_owned(), "attestation-manifest".to_owned()),
            (ABOUT.to_owned(), about.digest.to_string()),
        ]
        .into();
        descriptor
    }

    pub async fn bytes(&self, descriptor: &Descriptor) -> Vec<u8> {
        let bytes = self.storage().content.read_all(descriptor.digest, 16 << 20).await.unwrap();
        assert_eq!(bytes.len() as u64, descriptor.size);
        bytes.to_vec()
    }

    pub async fn read<T: serde::de::DeserializeOwned>(&self, descriptor: &Descriptor) -> T {
        serde_json::from_slice(&self.bytes(descriptor).await).unwrap()
    }

    /// The image `old` of this store, and a place for a new one in `to`.
    pub async fn ends(&self, old: &Descriptor, to: &Self) -> (Arc<Stored>, Arc<Stored>) {
        self.storage().images.put("old", old, &Labels::new()).await.unwrap();
        let source = Arc::new(Stored::new(self.storage(), "old".into()));
        (source, Arc::new(Stored::new(to.storage(), "new".into())))
    }
}
