//! Checks of the lease port.

use super::{labels, lease};
use crate::{GC_FLAT, GC_REF_CONTENT, Labels, LeaseId, LeaseResource, SnapshotKey, Storage};
use shipway_fault::Code;
use shipway_oci::Digest;

/// Creation, listing by label, resources, references by label, flat leases.
pub async fn leases(storage: &Storage) {
    let leases = &storage.leases;
    let id = LeaseId(format!("suite-named-{}", std::process::id()));
    leases.create(&id, &labels([("suite/kind", "cache"), (GC_FLAT, "true")])).await.unwrap();
    let error = leases.create(&id, &Labels::new()).await.unwrap_err();
    assert_eq!(error.code(), Code::AlreadyExists, "{error:?}");
    let found = leases.list(&["labels.\"suite/kind\"==cache".into()]).await.unwrap();
    assert_eq!(found.iter().map(|l| l.id.clone()).collect::<Vec<_>>(), std::slice::from_ref(&id));
    assert_eq!(found[0].labels.get("suite/kind").map(String::as_str), Some("cache"));
    assert!(leases.list(&["labels.\"suite/kind\"==other".into()]).await.unwrap().is_empty());

    // Resources need not exist, come back as they went in, and adding twice is adding once.
    let resources = [
        LeaseResource::Content(Digest::of("nowhere")),
        LeaseResource::Snapshot(
            storage.snapshots.name().into(),
            SnapshotKey("suite-nowhere".into()),
        ),
    ];
    for resource in &resources {
        leases.add(&id, resource.clone()).await.unwrap();
        leases.add(&id, resource.clone()).await.unwrap();
    }
    let mut listed = leases.resources(&id).await.unwrap();
    listed.sort_by_key(|r| !matches!(r, LeaseResource::Content(_)));
    assert_eq!(listed, resources);
    leases.remove(&id, resources[0].clone()).await.unwrap();
    assert_eq!(leases.resources(&id).await.unwrap(), resources[1..]);

    // A flat lease keeps a blob and not what its labels refer to; any other lease keeps both.
    let made = lease(storage).await;
    let child = storage.content.put(&made, "child".into(), &Labels::new()).await.unwrap();
    let reference = format!("{GC_REF_CONTENT}.0");
    let parent = storage
        .content
        .put(&made, "parent".into(), &labels([(&reference, &child.to_string())]))
        .await
        .unwrap();
    let deep = lease(storage).await;
    leases.add(&deep, LeaseResource::Content(parent)).await.unwrap();
    leases.add(&id, LeaseResource::Content(parent)).await.unwrap();
    leases.delete(&made, true).await.unwrap();
    assert!(storage.content.info(child).await.is_ok(), "a label's reference is not followed");
    leases.delete(&deep, true).await.unwrap();
    assert!(storage.content.info(parent).await.is_ok(), "the flat lease does not keep its blob");
    assert!(
        storage.content.info(child).await.unwrap_err().is_not_found(),
        "a flat lease follows labels"
    );

    leases.delete(&id, true).await.unwrap();
    leases.delete(&id, true).await.expect("a lease that is gone is no error");
    assert!(storage.content.info(parent).await.unwrap_err().is_not_found());
    assert!(leases.add(&id, LeaseResource::Content(parent)).await.unwrap_err().is_not_found());
    let error = storage
        .content
        .put(&id, "late".into(), &Labels::new())
        .await
        .expect_err("work under a lease that is gone");
    assert!(error.is_not_found(), "{error:?}");
}
