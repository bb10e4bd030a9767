//! Results as files: OCI and Docker archives that containerd imports, and plain directories; the same bytes every time.

#![allow(clippy::unwrap_used)]

use shipway_integration::{Image, any, build, ctr_run, nothing_left, on_each, remove_everything};
use shipway_testkit::{Lab, run, wait_for};
use std::{
    os::unix::fs::MetadataExt as _,
    process::{Command, Stdio},
    time::Duration,
};

#[test]
fn archives_can_be_imported_and_run() {
    let lab = Lab::complete(any());
    let context = lab.context("archive", &[("Dockerfile", "FROM busybox\nRUN echo archived > /a\nCMD [\"cat\", \"/a\"]\n")]);
    for kind in ["oci", "docker"] {
        let tar = lab.dir().join(format!("{kind}.tar"));
        let output = format!("type={kind},dest={},name=docker.io/library/from-{kind}:1", tar.display());
        lab.shipway(["build", "--progress", "plain", "--output", &output, context.to_str().unwrap()]).ok();
        lab.ctr_in("elsewhere", ["images", "import", tar.to_str().unwrap()]).ok();
        let images = lab.ctr_in("elsewhere", ["images", "list", "--quiet"]).ok();
        let image = images.lines().find(|l| l.contains(&format!("from-{kind}"))).unwrap_or_else(|| panic!("{}", images.stdout)).to_owned();
        let ran = lab.ctr_in("elsewhere", ["run", "--rm", &image, kind]).ok();
        assert_eq!(ran.stdout, "archived\n", "{kind}");
    }
}

#[test]
fn a_directory_has_the_files_as_they_are_in_the_image() {
    let lab = Lab::complete(any());
    let text = "FROM busybox AS a\nRUN mkdir -p /out/dir && echo 1 > /out/dir/one && chmod 600 /out/dir/one && ln -s dir/one /out/link\n\
                FROM scratch\nCOPY --from=a /out /\nCOPY file /dir/two\n";
    let context = lab.context("local", &[("Dockerfile", text), ("file", "2\n")]);
    let out = lab.dir().join("exported");
    lab.shipway(["build", "--progress", "plain", "--output", out.to_str().unwrap(), context.to_str().unwrap()]).ok();
    assert_eq!(std::fs::read_to_string(out.join("dir/one")).unwrap(), "1\n");
    assert_eq!(std::fs::read_to_string(out.join("dir/two")).unwrap(), "2\n");
    assert_eq!(std::fs::metadata(out.join("dir/one")).unwrap().mode() & 0o777, 0o600);
    assert_eq!(std::fs::read_link(out.join("link")).unwrap().to_str(), Some("dir/one"));
}

#[test]
fn two_daemons_make_the_same_image_of_the_same_input() {
    // Everything that carries a time is pinned, so the bytes must be the same.
    let text = "FROM busybox\nCOPY file /dir/file\nCOPY file /file\n";
    let digest = || {
        let lab = Lab::complete(any());
        let context = lab.context("same", &[("Dockerfile", text), ("file", "content")]);
        run(Command::new("touch").args(["-d", "2024-01-01T00:00:00Z"]).arg(context.join("file")).arg(context.join("Dockerfile"))).ok();
        build(&lab, "same:1", &context, &["--build-arg", "SOURCE_DATE_EPOCH=1700000000"]).ok();
        assert_eq!(ctr_run(&lab, "docker.io/library/same:1", &["cat", "/dir/file"]).ok().stdout, "content");
        shipway_integration::Image::of(&lab, "docker.io/library/same:1").layers()
    };
    assert_eq!(digest()[0], digest()[0], "the base layer differs");
}

#[test]
fn layers_have_no_times_later_than_the_epoch_and_the_image_runs() {
    on_each(|flavour| {
        let lab = Lab::complete(flavour);
        let context = lab.context("old", &[("Dockerfile", "FROM busybox\nRUN echo old > /old\n")]);
        let (name, context) = ("docker.io/library/old:1", context.to_string_lossy().into_owned());
        let output = format!("type=image,name={name},rewrite-timestamp=true");
        let epoch = "SOURCE_DATE_EPOCH=1000000000";
        lab.shipway(["build", "--output", &output, "--build-arg", epoch, &context]).ok();
        assert_eq!(ctr_run(&lab, name, &["stat", "-c", "%Y", "/old"]).ok().stdout, "1000000000\n");
        let image = Image::of(&lab, name);
        let there: Vec<String> = shipway_integration::snapshots(&lab).into_iter().map(|(name, _)| name).collect();
        assert!(image.chain().iter().all(|c| there.contains(c)), "{:?} of {there:?}", image.chain());
    });
}

#[test]
fn layers_that_will_be_exported_are_compressed_while_later_steps_run() {
    let lab = Lab::complete(any());
    let text = "FROM busybox AS other\nRUN echo other > /other\nFROM busybox\nRUN echo early > /early\nCOPY --from=other /other /\nRUN sleep 600\n";
    let context = lab.context("ahead", &[("Dockerfile", text)]);
    let mut command = lab.shipway_command();
    command.args(["build", "--progress", "plain", "--tag", "ahead:1"]).arg(&context);
    let mut client = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    // The step that runs waits for nothing that could be compressed later.
    wait_for("both layers below the running step to be blobs", Duration::from_secs(60), || {
        let blobs = lab.ctr(["content", "list"]).ok().stdout;
        let made = blobs.lines().filter(|l| l.contains("shipway/media-type")).count();
        assert!(made <= 2, "the other stage is not exported:\n{blobs}");
        if made == 2 { Ok(()) } else { Err(blobs) }
    });
    assert!(client.try_wait().unwrap().is_none(), "the build ended");
    client.kill().unwrap();
    client.wait().unwrap();
    // What the cancelled build holds is in use for a moment longer.
    wait_for("the cancelled build to let go of its layers", Duration::from_secs(20), || {
        remove_everything(&lab);
        let left = lab.leftovers();
        if left.leases.is_empty() { Ok(()) } else { Err(format!("{left:#?}")) }
    });
    nothing_left(&lab);
}
