//! Checks of the image port.

use super::{labels, lease};
use crate::{GC_REF_CONTENT, Labels, Storage};
use shipway_oci::{Descriptor, media};

/// Creation, re-pointing with others' labels kept, protection of what the name points at.
pub async fn images(storage: &Storage) {
    let images = &storage.images;
    let name = format!("suite.example/image-{}:latest", std::process::id());
    let kept = lease(storage).await;
    let config = storage.content.put(&kept, "{\"config\":1}".into(), &Labels::new()).await.unwrap();
    let reference = format!("{GC_REF_CONTENT}.config");
    let references = labels([(&reference, &config.to_string())]);
    let (one, two) = ("{\"manifest\":1}", "{\"manifest\":2}");
    storage.content.put(&kept, one.into(), &references).await.unwrap();
    storage.content.put(&kept, two.into(), &references).await.unwrap();
    let first = Descriptor::of(media::OCI_MANIFEST, one.as_bytes());
    let second = Descriptor::of(media::OCI_MANIFEST, two.as_bytes());

    assert!(images.get(&name).await.unwrap_err().is_not_found());
    images
        .put(&name, &first, &labels([("mine", "1"), ("io.cri-containerd.image", "managed")]))
        .await
        .unwrap();
    let record = images.get(&name).await.unwrap();
    assert_eq!((&record.name, &record.target), (&name, &first));
    assert!(record.updated.is_some());

    // Another program's label survives a new target.
    images.put(&name, &second, &labels([("mine", "2")])).await.unwrap();
    let record = images.get(&name).await.unwrap();
    assert_eq!(record.target, second);
    assert_eq!(record.labels, labels([("mine", "2"), ("io.cri-containerd.image", "managed")]));
    let listed = images.list(&[format!("name==\"{name}\"")]).await.unwrap();
    assert_eq!(listed.len(), 1);

    // The name keeps the manifest and, by its label, the config; the manifest it no longer names
    // goes.
    storage.leases.delete(&kept, true).await.unwrap();
    assert!(
        storage.content.info(second.digest).await.is_ok(),
        "the image does not keep its manifest"
    );
    assert!(storage.content.info(config).await.is_ok(), "the manifest does not keep its config");
    assert!(
        storage.content.info(first.digest).await.unwrap_err().is_not_found(),
        "a manifest without a name stayed"
    );
    images.delete(&name, true).await.unwrap();
    assert!(images.delete(&name, true).await.unwrap_err().is_not_found());
    assert!(storage.content.info(config).await.unwrap_err().is_not_found());
}
