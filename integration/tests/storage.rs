//! The storage ports over a real containerd pass the same suite as the fake, and say clearly when
//! containerd is gone.

#![allow(clippy::unwrap_used)]

use shipway_containerd::Containerd;
use shipway_fault::Code;
use shipway_storage::{Labels, LeaseId, suite};
use shipway_testkit::{Flavour, Lab};

fn block_on<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap()
        .block_on(work)
}

#[track_caller]
fn passes_the_suite(flavour: Flavour) {
    let lab = Lab::on(flavour);
    block_on(async {
        let containerd = Containerd::connect(lab.containerd_socket()).await.unwrap();
        containerd.ensure_namespace("suite").await.unwrap();
        containerd.ensure_namespace("suite").await.unwrap();
        let storage = containerd.storage("suite", "overlayfs").unwrap();
        suite::all(&storage).await;
        // Twice: nothing of the first run is in the way of the second.
        suite::all(&storage).await;
    });
    let left = lab.leftovers();
    assert!(left.is_empty(), "the suite left something: {left:#?}");
}

#[test]
fn the_suite_passes_on_the_systems_containerd() {
    passes_the_suite(Flavour::System);
}

#[test]
fn the_suite_passes_on_the_newer_containerd() {
    passes_the_suite(Flavour::Newer);
}

#[test]
fn a_blob_of_another_namespace_is_taken_over_without_its_bytes() {
    shipway_integration::on_each(|flavour| {
        let lab = Lab::on(flavour);
        block_on(async {
            let containerd = Containerd::connect(lab.containerd_socket()).await.unwrap();
            let (one, two) = (
                containerd.storage("one", "overlayfs").unwrap(),
                containerd.storage("two", "overlayfs").unwrap(),
            );
            let lease = LeaseId("shared".into());
            let bytes = bytes_of(9 << 20);
            for storage in [&one, &two] {
                storage.leases.create(&lease, &Labels::new()).await.unwrap();
                let labels = Labels::from([("here".to_owned(), "yes".to_owned())]);
                let digest =
                    storage.content.put(&lease, bytes.clone().into(), &labels).await.unwrap();
                let found = storage.content.info(digest).await.unwrap();
                assert_eq!((found.size, found.labels), (9 << 20, labels));
                assert_eq!(storage.content.read_all(digest, 10 << 20).await.unwrap(), bytes);
            }
        });
    });
}

#[test]
fn bytes_that_come_and_go_are_stored_all_the_same() {
    shipway_integration::on_each(|flavour| {
        let lab = Lab::on(flavour);
        block_on(async {
            let containerd = Containerd::connect(lab.containerd_socket()).await.unwrap();
            let storage = &containerd.storage("busy", "overlayfs").unwrap();
            // In one message, and in several.
            let blobs = &[bytes_of(1000), bytes_of(3 << 20)];
            let labels = &Labels::from([("here".to_owned(), "yes".to_owned())]);
            // The end of each lease takes the bytes away from under the others, unless one has them
            // already.
            let one = |n: usize| async move {
                for round in 0..40 {
                    let lease = LeaseId(format!("busy-{n}-{round}"));
                    storage.leases.create(&lease, &Labels::new()).await.unwrap();
                    let digest = storage
                        .content
                        .put(&lease, blobs[(n + round) % 2].clone().into(), labels)
                        .await
                        .unwrap();
                    assert_eq!(&storage.content.info(digest).await.unwrap().labels, labels);
                    storage.leases.delete(&lease, true).await.unwrap();
                }
            };
            tokio::join!(one(0), one(1), one(2), one(3));
        });
        let left = lab.leftovers();
        assert!(left.is_empty(), "{left:#?}");
    });
}

fn bytes_of(length: usize) -> Vec<u8> {
    (0..length).map(|n| (n / 7) as u8).collect()
}

#[test]
fn who_a_containerd_is() {
    shipway_integration::on_each(|flavour| {
        let lab = Lab::on(flavour);
        block_on(async {
            let containerd = Containerd::connect(lab.containerd_socket()).await.unwrap();
            assert_eq!(containerd.version().await.unwrap().version, flavour.version());
            let uuid = containerd.server_uuid().await.unwrap();
            assert_eq!(uuid.len(), 36, "{uuid:?}");
            assert_eq!(uuid, containerd.server_uuid().await.unwrap());
            assert!(containerd.snapshotters().await.unwrap().contains(&"overlayfs".to_owned()));
            // Where snapshots are is the disk that garbage collection is about; of a snapshotter
            // that is not there, contents tell.
            for name in ["overlayfs", "no-such-snapshotter"] {
                let disk = containerd.snapshots_at(name).await.unwrap().unwrap();
                assert!(
                    disk.starts_with(lab.dir().join("containerd-root")) && disk.is_dir(),
                    "{}",
                    disk.display()
                );
            }
        });
    });
}

#[test]
fn a_containerd_that_is_gone_is_a_clear_error_and_one_that_came_back_is_used_again() {
    shipway_integration::on_each(|flavour| {
        let mut lab = Lab::on(flavour);
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        let storage = runtime.block_on(async {
            let containerd = Containerd::connect(lab.containerd_socket()).await.unwrap();
            containerd.storage("suite", "overlayfs").unwrap()
        });
        lab.kill_containerd();
        let error = runtime.block_on(storage.leases.list(&[])).unwrap_err();
        assert_eq!(error.code(), Code::Unavailable, "{error:?}");
        let hint = format!("is containerd running at {}?", lab.containerd_socket().display());
        assert!(error.hints().any(|h| h == hint), "{error:?}");
        lab.start_containerd();
        runtime.block_on(async {
            suite::content(&storage).await;
            suite::snapshots(&storage).await;
        });
    });
    let nowhere = block_on(Containerd::connect("/nonexistent/containerd.sock")).err().unwrap();
    assert!(nowhere.to_string().starts_with("connect to containerd"), "{nowhere:?}");
    assert_eq!(nowhere.code(), Code::Unavailable, "{nowhere:?}");
}
