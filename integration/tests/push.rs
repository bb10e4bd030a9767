//! Pushed images are in the registry, whole, and can be pulled and run from there.

use shipway_integration::{Image, any, build, ctr_run, remove_everything};
use shipway_testkit::Lab;

#[test]
fn what_was_pushed_can_be_pulled_back_and_run() {
    let lab = Lab::complete(any());
    let context = lab.context("push", &[("Dockerfile", "FROM busybox\nRUN echo pushed > /p\nCMD [\"cat\", \"/p\"]\n")]);
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
    let nowhere = format!("type=image,name=127.0.0.1:{}/beside:1,push=true", shipway_testkit::free_port());
    lab.shipway(["build", "--output", &nowhere, "--cache-to", &cache, &context]).failed();
    assert_eq!(lab.registry_get("/v2/beside/cache/manifests/1").0, 200, "the cache went with the push");
    // With two exporters, nothing is pushed if the other one fails.
    let somewhere = format!("type=image,name={}/beside/app:1,push=true", lab.registry());
    lab.shipway(["build", "--output", &somewhere, "--output", "type=tar,dest=/dev/full", &context]).failed();
    assert_eq!(lab.registry_get("/v2/beside/app/manifests/1").0, 404, "it was pushed though the build failed");
    lab.shipway(["build", "--output", &somewhere, &context]).ok();
    assert_eq!(lab.registry_get("/v2/beside/app/manifests/1").0, 200);
}
