//! Checks of the content port.

use super::{labels, lease, noise};
use crate::{Ingest, Labels, LeaseId, LeaseResource, Storage};
use bytes::Bytes;
use shipway_fault::Code;
use shipway_oci::Digest;

async fn write(
    storage: &Storage,
    lease: &LeaseId,
    reference: &str,
    expected: Option<Digest>,
    chunks: &[Bytes],
) -> crate::BlobInfo {
    let mut writer = storage
        .content
        .writer(lease, Ingest { reference: reference.into(), expected, size: None })
        .await
        .expect("open an ingest");
    for chunk in chunks {
        writer.write(chunk.clone()).await.expect("write");
    }
    writer.commit(expected, &labels([("suite", "write")])).await.expect("commit")
}

async fn read(storage: &Storage, digest: Digest, offset: u64) -> Vec<u8> {
    let mut reader = storage.content.reader(digest).await.expect("open a reader");
    reader.seek(offset).await.expect("seek");
    let mut bytes = Vec::new();
    while let Some(chunk) = reader.next().await.expect("read") {
        bytes.extend_from_slice(&chunk);
    }
    bytes
}

/// Writing, reading, labels, duplicates, wrong digests, abandoned ingests, protection by a lease.
pub async fn content(storage: &Storage) {
    let store = &storage.content;
    let kept = lease(storage).await;

    // In any pieces, the bytes come out as they went in, whole and from an offset.
    let bytes = noise(1, 5 << 20);
    let digest = Digest::of(&bytes);
    let pieces = [
        bytes.slice(..10),
        bytes.slice(10..300_000),
        bytes.slice(300_000..4_000_000),
        bytes.slice(4_000_000..),
    ];
    let blob = write(storage, &kept, "suite-pieces", None, &pieces).await;
    assert_eq!((blob.digest, blob.size), (digest, bytes.len() as u64));
    assert_eq!(
        store.info(digest).await.unwrap().labels.get("suite").map(String::as_str),
        Some("write")
    );
    assert!(read(storage, digest, 0).await == bytes, "the bytes differ");
    assert!(
        read(storage, digest, 4_999_999).await == bytes.slice(4_999_999..),
        "the bytes from an offset differ"
    );
    assert!(read(storage, digest, bytes.len() as u64).await.is_empty());
    assert_eq!(store.read_all(digest, 5 << 20).await.unwrap(), bytes);
    assert_eq!(
        store.read_all(digest, 100).await.unwrap_err().code(),
        Code::InvalidArgument,
        "read_all past its limit"
    );

    // An empty blob is a blob.
    let empty = write(storage, &kept, "suite-empty", None, &[]).await;
    assert_eq!((empty.digest, empty.size), (Digest::of(""), 0));
    assert_eq!(store.read_all(empty.digest, 0).await.unwrap(), Bytes::new());

    // A blob that is there: the writer says so, `put` sets its labels all the same.
    let again = Ingest { reference: "suite-again".into(), expected: Some(digest), size: None };
    let error =
        store.writer(&kept, again).await.err().expect("an existing blob must not be written");
    assert!(error.is_already_exists(), "{error:?}");
    assert_eq!(
        store.put(&kept, bytes.clone(), &labels([("suite.put", "1")])).await.unwrap(),
        digest
    );
    let found = store.info(digest).await.unwrap();
    assert_eq!(found.labels, labels([("suite", "write"), ("suite.put", "1")]));
    let small = store.put(&kept, "small".into(), &labels([("a/b.c", "x")])).await.unwrap();
    assert_eq!(store.info(small).await.unwrap().labels, labels([("a/b.c", "x")]));
    assert_eq!(store.put(&kept, "small".into(), &labels([("d", "y")])).await.unwrap(), small);

    // Labels change one by one; an empty value removes.
    store.update_labels(small, &labels([("a/b.c", ""), ("d", "z")])).await.unwrap();
    assert_eq!(store.info(small).await.unwrap().labels, labels([("d", "z")]));
    let listed = store.list(&["labels.d==z".into()]).await.unwrap();
    assert_eq!(listed.iter().map(|b| b.digest).collect::<Vec<_>>(), [small]);

    // A digest that does not match is refused and nothing stays.
    let wrong =
        Ingest { reference: "suite-wrong".into(), expected: Some(Digest::of("other")), size: None };
    let mut writer = store.writer(&kept, wrong).await.unwrap();
    writer.write("these bytes".into()).await.unwrap();
    writer
        .commit(Some(Digest::of("other")), &Labels::new())
        .await
        .expect_err("a wrong digest must be refused");
    assert!(store.info(Digest::of("other")).await.unwrap_err().is_not_found());
    assert!(store.info(Digest::of("these bytes")).await.unwrap_err().is_not_found());

    // Nothing is found of what is not there.
    let absent = Digest::of("absent");
    assert!(store.info(absent).await.unwrap_err().is_not_found());
    assert!(store.reader(absent).await.err().unwrap().is_not_found());
    assert!(store.update_labels(absent, &labels([("a", "b")])).await.unwrap_err().is_not_found());

    // The lease has all of it, and without the lease all of it goes.
    let resources = storage.leases.resources(&kept).await.unwrap();
    for digest in [digest, empty.digest, small] {
        assert!(
            resources.contains(&LeaseResource::Content(digest)),
            "{digest} is not in the lease: {resources:?}"
        );
    }
    storage.leases.delete(&kept, true).await.unwrap();
    for digest in [digest, empty.digest, small] {
        assert!(
            store.info(digest).await.unwrap_err().is_not_found(),
            "{digest} outlived its lease"
        );
    }
}

/// Writers at once: of the same blob, under the same reference, and one that is dropped.
pub async fn content_in_flight(storage: &Storage) {
    let store = &storage.content;
    let (first, second) = (lease(storage).await, lease(storage).await);
    let bytes = noise(7, 3 << 20);
    let digest = Digest::of(&bytes);
    let open = |lease: LeaseId| async move {
        store
            .writer(
                &lease,
                Ingest {
                    reference: "suite-same".into(),
                    expected: Some(digest),
                    size: Some(3 << 20),
                },
            )
            .await
            .unwrap()
    };
    let (mut a, mut b, mut c) =
        (open(first.clone()).await, open(second.clone()).await, open(first.clone()).await);
    a.write(bytes.clone()).await.unwrap();
    b.write(bytes.clone()).await.unwrap();
    c.write(bytes.slice(..1000)).await.unwrap();
    a.commit(Some(digest), &labels([("by", "a")])).await.unwrap();
    drop(c);
    let late = b
        .commit(Some(digest), &labels([("also", "b")]))
        .await
        .expect("a blob that came to be meanwhile is no error");
    assert_eq!(late.labels, labels([("by", "a"), ("also", "b")]));
    // Either lease alone keeps it.
    storage.leases.delete(&first, true).await.unwrap();
    assert!(store.info(digest).await.is_ok(), "the second writer's lease does not keep the blob");
    storage.leases.delete(&second, true).await.unwrap();
    assert!(store.info(digest).await.unwrap_err().is_not_found());
}
