//! The lab itself: what the other tests stand on works without our daemon.

#![allow(clippy::unwrap_used)]

use shipway_integration::{ctr_run, on_each, remove_images};
use shipway_testkit::{BaseImage, FaultyRegistry, Lab, RegistryFault};

#[test]
fn a_made_image_is_pulled_and_run_and_removed_by_containerd_alone() {
    on_each(|flavour| {
        let mut lab = Lab::on(flavour);
        lab.start_registry();
        let digest = BaseImage::busybox().push(&lab.registry(), "library/busybox", "latest");
        assert!(digest.starts_with("sha256:"));
        let image = format!("{}/library/busybox:latest", lab.registry());
        lab.ctr(["images", "pull", "--plain-http", &image]).ok();
        assert_eq!(
            ctr_run(&lab, &image, &["sh", "-c", "echo $((6*7)); id -un; ls -ld /tmp | cut -c1-10"])
                .ok()
                .stdout,
            "42\nroot\ndrwxrwxrwt\n"
        );
        assert!(!lab.leftovers().is_empty());
        remove_images(&lab);
        let left = lab.leftovers();
        assert!(left.is_empty(), "{left:#?}");
    });
}

#[test]
fn a_faulty_registry_passes_on_what_is_not_meant() {
    let mut lab = Lab::on(shipway_integration::any());
    lab.start_registry();
    BaseImage::busybox().push(&lab.registry(), "base", "1");
    let good = FaultyRegistry::start(&lab.registry(), "/nothing/", RegistryFault::Hang);
    lab.ctr(["images", "pull", "--plain-http", &format!("{}/base:1", good.address())]).ok();
    let bad =
        FaultyRegistry::start(&lab.registry(), "/manifests/", RegistryFault::Status(500, "oh no"));
    lab.ctr(["images", "pull", "--plain-http", &format!("{}/base:1", bad.address())]).failed();
}

#[test]
fn a_dropped_lab_leaves_no_process_and_no_directory() {
    let mut lab = Lab::on(shipway_integration::any());
    lab.start_registry();
    let image = format!("{}/base:1", lab.registry());
    BaseImage::busybox().push(&lab.registry(), "base", "1");
    lab.ctr(["images", "pull", "--plain-http", &image]).ok();
    lab.ctr(["run", "--detach", &image, "sleeper", "sleep", "1000"]).ok();
    assert_eq!(lab.leftovers().tasks, ["default/sleeper"]);
    let dir = lab.dir().to_path_buf();
    drop(lab);
    assert!(!dir.exists());
    let below = dir.to_string_lossy().into_owned();
    let all = std::fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .filter_map(|e| std::fs::read(e.path().join("cmdline")).ok());
    let ours: Vec<_> = all
        .map(|c| String::from_utf8_lossy(&c).replace('\0', " "))
        .filter(|c| c.contains(&below))
        .collect();
    assert!(ours.is_empty(), "{ours:#?}");
}

#[test]
fn every_file_of_tests_is_part_of_the_program() {
    let here = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
    let program = std::fs::read_to_string(here.join("live.rs")).unwrap();
    let named = |stem: &str| program.lines().any(|line| line == format!("mod {stem};"));
    for entry in here.read_dir().unwrap().map(Result::unwrap) {
        let name = entry.file_name().into_string().unwrap();
        let stem = name.strip_suffix(".rs").expect("a file of tests");
        assert!(stem == "live" || named(stem), "live.rs does not name {stem}");
    }
}
