//! Checks of the snapshot port.

use super::{labels, lease};
use crate::{Labels, SnapshotKey, SnapshotKind, Storage};
use shipway_fault::Code;
use shipway_oci::{ChainId, Descriptor, DiffId, Digest, media};

fn key(name: &str) -> SnapshotKey {
    SnapshotKey(format!("suite-{}-{name}", std::process::id()))
}

/// The life of a snapshot: active, committed as a name, parent of others; names taken; what leases
/// keep.
pub async fn snapshots(storage: &Storage) {
    let store = &storage.snapshots;
    let kept = lease(storage).await;
    let (active, base) = (key("active"), key("base"));

    let mounts = store.prepare(&kept, &active, None, &labels([("suite", "active")])).await.unwrap();
    assert!(!mounts.is_empty());
    assert_eq!(store.mounts(&active).await.unwrap(), mounts);
    let error = store.prepare(&kept, &active, None, &Labels::new()).await.unwrap_err();
    assert_eq!(error.code(), Code::AlreadyExists, "{error:?}");
    let found = store.stat(&active).await.unwrap();
    assert_eq!(
        (found.kind, found.parent, found.labels),
        (SnapshotKind::Active, None, labels([("suite", "active")]))
    );

    // Labels are those of the commit, not those of the preparation.
    store
        .commit(&kept, &base, &active, &labels([("suite", "base"), ("other.label/x", "1")]))
        .await
        .unwrap();
    assert!(
        store.stat(&active).await.unwrap_err().is_not_found(),
        "the active key survived the commit"
    );
    let found = store.stat(&base).await.unwrap();
    assert_eq!(found.kind, SnapshotKind::Committed);
    assert_eq!(found.labels, labels([("suite", "base"), ("other.label/x", "1")]));
    store
        .update_labels(&base, &labels([("suite", "changed"), ("other.label/x", "")]))
        .await
        .unwrap();
    assert_eq!(store.stat(&base).await.unwrap().labels, labels([("suite", "changed")]));
    let listed = store.list(&["labels.suite==changed".into()]).await.unwrap();
    assert_eq!(
        listed.iter().map(|s| s.key.clone()).collect::<Vec<_>>(),
        std::slice::from_ref(&base)
    );

    // A name that is taken: the active one stays, and can be removed.
    store.prepare(&kept, &active, None, &Labels::new()).await.unwrap();
    let error = store.commit(&kept, &base, &active, &Labels::new()).await.unwrap_err();
    assert!(error.is_already_exists(), "{error:?}");
    store.remove(&active).await.unwrap();
    assert!(store.remove(&active).await.unwrap_err().is_not_found());
    assert!(
        store
            .prepare(&kept, &active, Some(&key("absent")), &Labels::new())
            .await
            .unwrap_err()
            .is_not_found()
    );

    // Views are read-only and cannot be committed.
    let view = key("view");
    let mounts = store.view(&kept, &view, Some(&base), &Labels::new()).await.unwrap();
    assert!(mounts.iter().all(|m| m.writable_dir().is_none()), "{mounts:?}");
    assert_eq!(store.stat(&view).await.unwrap().kind, SnapshotKind::View);
    assert!(store.commit(&kept, &key("of-view"), &view, &Labels::new()).await.is_err());
    store.remove(&view).await.unwrap();

    // A lease on the child keeps its parents; without any lease all go.
    let other = lease(storage).await;
    store.prepare(&other, &active, Some(&base), &Labels::new()).await.unwrap();
    store.commit(&other, &key("child"), &active, &Labels::new()).await.unwrap();
    assert_eq!(store.stat(&key("child")).await.unwrap().parent, Some(base.clone()));
    storage.leases.delete(&kept, true).await.unwrap();
    assert!(store.stat(&base).await.is_ok(), "a child's lease does not keep its parent");
    storage.leases.delete(&other, true).await.unwrap();
    for gone in [base, key("child")] {
        assert!(store.stat(&gone).await.unwrap_err().is_not_found(), "{gone} outlived its leases");
    }

    // Both leases keep a name that was committed twice.
    let (a, b) = (lease(storage).await, lease(storage).await);
    let twice = key("twice");
    for (lease, active) in [(&a, key("one")), (&b, key("two"))] {
        store.prepare(lease, &active, None, &Labels::new()).await.unwrap();
        if let Err(e) = store.commit(lease, &twice, &active, &Labels::new()).await {
            assert!(e.is_already_exists(), "{e:?}");
            store.remove(&active).await.unwrap();
        }
    }
    storage.leases.delete(&a, true).await.unwrap();
    assert!(store.stat(&twice).await.is_ok(), "AlreadyExists did not put the name into the lease");
    storage.leases.delete(&b, true).await.unwrap();
    assert!(store.stat(&twice).await.unwrap_err().is_not_found());
}

/// A tar of one file `hello`, as GNU tar would write it: header, content, two empty blocks.
fn one_file_tar(content: &[u8]) -> Vec<u8> {
    let mut header = [0u8; 512];
    let mut put = |at: usize, text: &[u8]| header[at..at + text.len()].copy_from_slice(text);
    put(0, b"hello");
    put(100, b"0000644\0");
    put(108, b"0000000\0");
    put(116, b"0000000\0");
    put(124, format!("{:011o}\0", content.len()).as_bytes());
    put(136, b"00000000000\0");
    put(148, b"        ");
    put(156, b"0");
    put(257, b"ustar\x0000");
    let sum: u32 = header.iter().map(|b| u32::from(*b)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    let mut tar = header.to_vec();
    tar.extend_from_slice(content);
    tar.resize(tar.len().next_multiple_of(512) + 1024, 0);
    tar
}

/// Unpacking a layer and committing it as its chain ID.
pub async fn layers(storage: &Storage) {
    let store = &storage.snapshots;
    let kept = lease(storage).await;
    let tar = one_file_tar(b"hello world\n");
    let diff_id = DiffId(Digest::of(&tar));
    let layer = Descriptor::of(media::OCI_LAYER, &tar);
    storage.content.put(&kept, tar.into(), &Labels::new()).await.unwrap();

    let active = key("unpack");
    let mounts = store.prepare(&kept, &active, None, &Labels::new()).await.unwrap();
    assert_eq!(store.apply(&layer, &mounts).await.unwrap(), diff_id);
    assert!(store.usage(&active).await.unwrap().bytes >= 12);
    let chain = ChainId::of([diff_id]).unwrap();
    store.commit(&kept, &chain.into(), &active, &Labels::new()).await.unwrap();
    let usage = store.usage(&chain.into()).await.unwrap();
    assert!(usage.bytes >= 12 && usage.inodes >= 2, "{usage:?}");

    // A layer that is not stored cannot be unpacked.
    let mounts = store.prepare(&kept, &active, Some(&chain.into()), &Labels::new()).await.unwrap();
    let absent = Descriptor::of(media::OCI_LAYER, b"absent");
    store.apply(&absent, &mounts).await.expect_err("a missing layer");
    store.remove(&active).await.unwrap();
    storage.leases.delete(&kept, true).await.unwrap();
    assert!(store.stat(&chain.into()).await.unwrap_err().is_not_found());
}
