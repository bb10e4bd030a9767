//! Images of containerd's own store in `FROM`, and names in it that are not a build's to take.

#![allow(clippy::unwrap_used)]

use shipway_integration::{Image, any, build_text, on_each};
use shipway_testkit::{BaseImage, Lab};

fn base(word: &str) -> BaseImage {
    let mut image = BaseImage::busybox();
    image.config["Labels"] = serde_json::json!({ "word": word });
    image
}

fn word(lab: &Lab, tag: &str) -> String {
    Image::of(lab, &format!("docker.io/library/{tag}")).config["config"]["Labels"]["word"]
        .as_str()
        .unwrap()
        .to_owned()
}

#[test]
fn a_pulled_image_is_asked_of_its_registry_and_a_built_one_is_not() {
    let mut lab = Lab::complete(any());
    let pulled = format!("{}/base:1", lab.registry());
    base("one").push(&lab.registry(), "base", "1");
    lab.ctr(["images", "pull", "--plain-http", &pulled]).ok();
    let text = format!("FROM {pulled}\nRUN true\n");
    build_text(&lab, "same:1", &text).ok();
    assert_eq!(word(&lab, "same:1"), "one");

    base("two").push(&lab.registry(), "base", "1");
    let built = build_text(&lab, "changed:1", &text).ok();
    assert_eq!(word(&lab, "changed:1"), "two");
    assert!(!built.all().contains("local image"), "{}", built.all());

    // The mirror of docker.io has an image of that name, too.
    base("registry").push(&lab.registry(), "library/app", "1");
    build_text(&lab, "app:1", &format!("FROM {pulled}\nLABEL word=built\n")).ok();
    let from = build_text(&lab, "from-built:1", "FROM app:1\nRUN true\n").ok();
    assert_eq!(word(&lab, "from-built:1"), "built");
    assert!(from.all().contains("local image, built "), "{}", from.all());

    lab.kill_registry();
    let offline = build_text(&lab, "offline:1", &text).ok();
    assert_eq!(word(&lab, "offline:1"), "one");
    assert!(offline.all().contains("using the local image"), "{}", offline.all());

    lab.stop_daemon();
    lab.start_registry();
    lab.configure_worker("preferLocalImages = \"never\"\n");
    lab.start_daemon();
    build_text(&lab, "from-registry:1", "FROM app:1\nRUN true\n").ok();
    assert_eq!(word(&lab, "from-registry:1"), "registry");
}

#[test]
fn a_name_that_cri_manages_is_not_taken() {
    on_each(|flavour| {
        let mut lab = Lab::complete(flavour);
        let text = "FROM busybox\nLABEL word=ours\n";
        for name in ["pause", "own"] {
            base("theirs").push(&lab.registry(), name, "1");
        }
        let name = |name: &str| format!("{}/{name}:1", lab.registry());
        let (pause, own) = (name("pause"), name("own"));
        let target = |name: &str| Image::of(&lab, name).target;
        lab.ctr(["images", "pull", "--plain-http", &pause]).ok();
        lab.ctr(["images", "label", &pause, "io.cri-containerd.image=managed"]).ok();
        let before = target(&pause);
        let failed = build_text(&lab, &pause, text).failed();
        for says in [pause.as_str(), "managed by Kubernetes", "replaceManagedImages"] {
            assert!(
                failed.all().contains(says),
                "the error does not say {says:?}:\n{}",
                failed.all()
            );
        }
        assert_eq!(target(&pause), before);

        // What was built here is ours to build again, though CRI marks every image of its
        // namespace.
        build_text(&lab, &own, text).ok();
        lab.ctr(["images", "label", &own, "io.cri-containerd.image=managed"]).ok();
        let first = target(&own);
        build_text(&lab, &own, "FROM busybox\nLABEL word=again\n").ok();
        assert_ne!(target(&own), first);
        // Unless somebody has pulled another one since.
        lab.ctr(["images", "pull", "--plain-http", &own]).ok();
        lab.ctr(["images", "label", &own, "io.cri-containerd.image=managed"]).ok();
        build_text(&lab, &own, text).failed();

        lab.stop_daemon();
        let allowed = format!("replaceManagedImages = [\"{}/pau*\"]\n", lab.registry());
        lab.configure_worker(&allowed);
        lab.start_daemon();
        build_text(&lab, &pause, text).ok();
        assert_ne!(Image::of(&lab, &pause).target, before);
        build_text(&lab, &own, text).failed();
    });
}
