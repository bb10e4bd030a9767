//! What is absent: a second copy of a layer, an image that is not whole, a registry where none is
//! needed, other people's labels lost, anything left after a prune.

use shipway_integration::{
    Image, build, build_text, collect_garbage, ctr_run, nothing_left, nothing_left_at_the_end,
    on_each, remove_everything, snapshots,
};
use shipway_testkit::Lab;
use std::collections::BTreeSet;

const THREE_LAYERS: &str =
    "FROM busybox\nRUN echo one > /one\nCOPY Dockerfile /two\nRUN echo three > /three\n";

#[test]
fn a_steps_snapshot_is_committed_as_its_chain_id_and_there_is_no_other() {
    on_each(|flavour| {
        let lab = Lab::complete(flavour);
        build_text(&lab, "layers:1", THREE_LAYERS).ok();
        let image = Image::of(&lab, "docker.io/library/layers:1");
        let chain: BTreeSet<String> = image.chain().into_iter().collect();
        assert_eq!(chain.len(), 4, "{chain:?}");
        // Of local files (Dockerfile, ignore file, context) there may be snapshots without a
        // parent; of the image none but its chain.
        let all = snapshots(&lab);
        let names: BTreeSet<String> = all.iter().map(|(name, _)| name.clone()).collect();
        assert!(chain.is_subset(&names), "chain {chain:#?}\nis not in {all:#?}");
        let others: Vec<_> = all
            .iter()
            .filter(|(name, parent)| !chain.contains(name) && !parent.is_empty())
            .collect();
        assert!(others.is_empty(), "snapshots besides the image's own: {others:#?}");
        assert!(all.len() <= chain.len() + 3, "{all:#?}");
    });
}

#[test]
fn a_synchronous_collection_right_after_a_build_takes_nothing() {
    on_each(|flavour| {
        let lab = Lab::complete(flavour);
        build_text(&lab, "whole:1", THREE_LAYERS).ok();
        let before = Image::of(&lab, "docker.io/library/whole:1");
        collect_garbage(&lab);
        // Without our cache too: the image stands on its own.
        lab.shipway(["prune", "--all"]).ok();
        collect_garbage(&lab);
        let after = Image::of(&lab, "docker.io/library/whole:1");
        assert_eq!(before.target, after.target);
        let blobs = lab.ctr(["content", "list", "--quiet"]).ok();
        for layer in after.layers() {
            assert!(blobs.lines().any(|b| b == layer), "layer {layer} is gone");
        }
        let names: Vec<_> = snapshots(&lab).into_iter().map(|(name, _)| name).collect();
        for id in after.chain() {
            assert!(names.contains(&id), "snapshot {id} is gone: {names:?}");
        }
        assert_eq!(
            ctr_run(&lab, "docker.io/library/whole:1", &["cat", "/one", "/three"]).ok().stdout,
            "one\nthree\n"
        );
        // containerd's own opinion.
        let check = lab.ctr(["images", "check", "name==docker.io/library/whole:1"]).ok();
        assert!(check.stdout.contains("complete"), "{}", check.stdout);
    });
}

#[test]
fn other_programs_labels_on_the_record_survive_a_rebuild() {
    on_each(|flavour| {
        let lab = Lab::complete(flavour);
        build_text(&lab, "labeled:1", "FROM busybox\nRUN echo one > /x\n").ok();
        let name = "docker.io/library/labeled:1";
        let first = Image::of(&lab, name).target;
        lab.ctr(["images", "label", name, "io.cri-containerd.pinned=pinned"]).ok();
        build_text(&lab, "labeled:1", "FROM busybox\nRUN echo two > /x\n").ok();
        assert_ne!(Image::of(&lab, name).target, first);
        let list = lab.ctr(["images", "list", &format!("name=={name}")]).ok();
        assert!(list.stdout.contains("io.cri-containerd.pinned=pinned"), "{}", list.stdout);
    });
}

#[test]
fn an_image_built_from_a_local_image_needs_no_registry() {
    on_each(|flavour| {
        let mut lab = Lab::complete(flavour);
        build_text(&lab, "base.invalid/mine:1", "FROM busybox\nRUN echo local > /local\n").ok();
        // The cache and the daemon that knew it are gone; no registry knows the name.
        lab.shipway(["prune", "--all"]).ok();
        assert!(lab.stop_daemon(), "the daemon had to be killed");
        lab.start_daemon();
        build_text(&lab, "child:1", "FROM base.invalid/mine:1\nRUN cat /local > /copy\n").ok();
        assert_eq!(
            ctr_run(&lab, "docker.io/library/child:1", &["cat", "/copy"]).ok().stdout,
            "local\n"
        );
    });
}

#[test]
fn a_prune_leaves_nothing_behind() {
    on_each(|flavour| {
        let lab = Lab::complete(flavour);
        let text = "FROM busybox AS a\nRUN --mount=type=cache,target=/c echo 1 > /c/x; echo 1 > /1\nFROM busybox\nCOPY --from=a /1 /1\nCOPY . /all\n";
        let context = lab.context("prune", &[("Dockerfile", text), ("file", "content")]);
        build(&lab, "prune:1", &context, &[]).ok();
        // A build that fails leaves nothing of its own either.
        build_text(&lab, "prune:2", "FROM busybox\nRUN echo partial > /p && exit 3\n").failed();
        remove_everything(&lab);
        nothing_left(&lab);
        let usage = lab.shipway(["du"]).ok();
        assert!(!usage.stdout.contains("sha256:"), "{}", usage.stdout);
    });
}

#[test]
fn the_daemon_leaves_nothing_when_it_ends() {
    let mut lab = Lab::complete(shipway_integration::any());
    build_text(&lab, "end:1", "FROM busybox\nRUN echo 1 > /1\n").ok();
    remove_everything(&lab);
    nothing_left_at_the_end(&mut lab);
}
