//! Pushed images are in the registry, whole, and can be pulled and run from there.

#![allow(clippy::unwrap_used)]

use shipway_integration::{Image, any, build, ctr_run, on_each, remove_everything};
use shipway_testkit::Lab;

#[test]
fn what_was_pushed_can_be_pulled_back_and_run() {
    let lab = Lab::complete(any());
    let context = lab.context(
        "push",
        &[("Dockerfile", "FROM busybox\nRUN echo pushed > /p\nCMD [\"cat\", \"/p\"]\n")],
    );
    let name = format!("{}/some/app:1", lab.registry());
    build(&lab, &name, &context, &["--push"]).ok();
    let image = Image::of(&lab, &name);
    let (status, body) = lab.registry_get("/v2/some/app/manifests/1");
    assert_eq!(status, 200);
    assert_eq!(shipway_oci::Digest::of(&body).to_string(), image.target);

    remove_everything(&lab);
    lab.ctr(["images", "pull", "--plain-http", &name]).ok();
    assert_eq!(ctr_run(&lab, &name, &[]).ok().stdout, "pushed\n");
}

#[test]
fn a_push_to_nowhere_says_where_and_leaves_the_local_image() {
    let lab = Lab::complete(any());
    let context = lab.context("nowhere", &[("Dockerfile", "FROM busybox\nRUN echo 1 > /p\n")]);
    let port = shipway_testkit::free_port();
    let name = format!("127.0.0.1:{port}/app:1");
    let failed = build(&lab, &name, &context, &["--push"]).failed();
    assert!(failed.all().contains(&format!("127.0.0.1:{port}")), "{}", failed.all());
}

#[test]
fn a_failed_push_keeps_the_cache_and_a_failed_export_keeps_the_push() {
    let lab = Lab::complete(any());
    let context = lab.context("beside", &[("Dockerfile", "FROM busybox\nRUN echo 1 > /p\n")]);
    let context = context.to_string_lossy();
    let cache = format!("type=registry,ref={}/beside/cache:1,mode=max", lab.registry());
    let nowhere =
        format!("type=image,name=127.0.0.1:{}/beside:1,push=true", shipway_testkit::free_port());
    lab.shipway(["build", "--output", &nowhere, "--cache-to", &cache, &context]).failed();
    assert_eq!(
        lab.registry_get("/v2/beside/cache/manifests/1").0,
        200,
        "the cache went with the push"
    );
    // With two exporters, nothing is pushed if the other one fails.
    let somewhere = format!("type=image,name={}/beside/app:1,push=true", lab.registry());
    lab.shipway(["build", "--output", &somewhere, "--output", "type=tar,dest=/dev/full", &context])
        .failed();
    assert_eq!(
        lab.registry_get("/v2/beside/app/manifests/1").0,
        404,
        "it was pushed though the build failed"
    );
    lab.shipway(["build", "--output", &somewhere, &context]).ok();
    assert_eq!(lab.registry_get("/v2/beside/app/manifests/1").0, 200);
}

/// What is built here comes from no registry, so nothing but the first push can tell where its
/// layer may be mounted from.
#[test]
fn a_layer_that_was_pushed_is_mounted_by_the_next_push_to_the_same_registry() {
    on_each(|flavour| {
        let lab = Lab::complete(flavour);
        let context = lab.context(
            "mounted",
            &[("Dockerfile", "FROM busybox\nRUN head -c 3000000 /dev/urandom > /p\n")],
        );
        let name = |repository: &str| format!("{}/{repository}:1", lab.registry());
        build(&lab, &name("team/one"), &context, &["--push"]).ok();
        let layer = Image::of(&lab, &name("team/one")).layers().pop().unwrap();
        let list = lab.ctr(["content", "list"]).ok();
        let row = list.lines().find(|l| l.starts_with(&layer)).unwrap().to_owned();
        assert!(row.contains("containerd.io/distribution.source.127.0.0.1=team/one"), "{row}");

        build(&lab, &name("team/two"), &context, &["--push"]).ok();
        let log = std::fs::read_to_string(lab.dir().join("registry.log")).unwrap();
        let asked = format!("POST /v2/team/two/blobs/uploads/?mount={layer}&from=team%2Fone");
        let plain = format!("POST /v2/team/two/blobs/uploads/?mount={layer}&from=team/one");
        assert!(
            log.lines().any(|l| (l.contains(&asked) || l.contains(&plain)) && l.contains("201")),
            "{log}"
        );
        assert!(
            !log.lines().any(|l| l.contains("PUT /v2/team/two/blobs/uploads/")
                && l.contains(&layer.replace(':', "%3A"))),
            "{log}"
        );
        assert_eq!(lab.registry_get(&format!("/v2/team/two/blobs/{layer}")).0, 200);
    });
}

#[test]
fn an_image_that_may_lack_layers_keeps_those_that_a_push_had_to_send() {
    let lab = Lab::complete(any());
    let context = |from: &str| {
        lab.context("incomplete", &[("Dockerfile", &format!("FROM {from}\nLABEL a=b\n"))])
    };
    let push = |from: &str, name: &str| {
        let output =
            format!("type=image,name={name},push=true,unsafe-internal-store-allow-incomplete=true");
        lab.shipway(["build", "--output", &output, &context(from).to_string_lossy()]).ok();
        Image::of(&lab, name).layers()
    };
    let is_stored = |layer: &str| {
        lab.ctr(["content", "list"]).ok().stdout.lines().any(|line| line.starts_with(layer))
    };
    let registry = lab.registry();
    // Busybox comes from the mirror of another registry: the layer has to be sent.
    let sent = format!("{registry}/incomplete/sent:1");
    let layers = push("busybox", &sent);
    assert!(layers.iter().all(|layer| is_stored(layer)), "{layers:?}");

    // Within a registry layers are mounted, so they are not fetched for a push.
    remove_everything(&lab);
    assert!(!layers.iter().any(|layer| is_stored(layer)), "{layers:?}");
    let mounted = push(&sent, &format!("{registry}/incomplete/mounted:1"));
    assert_eq!(mounted, layers);
    assert!(!layers.iter().any(|layer| is_stored(layer)), "{layers:?}");
    for layer in &layers {
        assert_eq!(lab.registry_get(&format!("/v2/incomplete/mounted/blobs/{layer}")).0, 200);
    }
}
