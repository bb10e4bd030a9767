//! A disk that is full: the error says so, whichever part met it first, and after a prune builds
//! work again.

use shipway_integration::{any, build_text, remove_everything};
use shipway_testkit::{BaseImage, Lab, LabOptions};

#[test]
fn a_full_disk_is_named_and_a_prune_helps() {
    let mut lab = Lab::start(LabOptions { disk: Some(48 << 20), ..LabOptions::new(any()) });
    lab.start_registry();
    BaseImage::busybox().push(&lab.registry(), "library/busybox", "latest");
    lab.start_daemon();
    // A step fills it.
    let failed =
        build_text(&lab, "full:1", "FROM busybox\nRUN dd if=/dev/zero of=/big bs=1M count=100\n")
            .failed();
    assert!(failed.all().contains("disk is full"), "{}", failed.all());
    // A layer fits as a snapshot, and not again as a blob.
    let failed =
        build_text(&lab, "full:2", "FROM busybox\nRUN dd if=/dev/urandom of=/big bs=1M count=30\n")
            .failed();
    assert!(failed.all().contains("disk is full"), "{}", failed.all());
    remove_everything(&lab);
    build_text(&lab, "full:3", "FROM busybox\nRUN echo fits > /small\n").ok();
}
