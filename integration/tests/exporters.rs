//! Results as files: OCI and Docker archives that containerd imports, and plain directories; the
//! same bytes every time.

#![allow(clippy::unwrap_used)]

use shipway_integration::{Image, any, ctr_run, nothing_left, on_each, remove_everything};
use shipway_testkit::{Lab, run, wait_for};
use std::{
    os::unix::fs::MetadataExt as _,
    process::{Command, Stdio},
    time::Duration,
};

#[test]
fn archives_can_be_imported_and_run() {
    let lab = Lab::complete(any());
    let context = lab.context(
        "archive",
        &[("Dockerfile", "FROM busybox\nRUN echo archived > /a\nCMD [\"cat\", \"/a\"]\n")],
    );
    for kind in ["oci", "docker"] {
        let tar = lab.dir().join(format!("{kind}.tar"));
        let output =
            format!("type={kind},dest={},name=docker.io/library/from-{kind}:1", tar.display());
        lab.shipway([
            "build",
            "--progress",
            "plain",
            "--output",
            &output,
            context.to_str().unwrap(),
        ])
        .ok();
        lab.ctr_in("elsewhere", ["images", "import", tar.to_str().unwrap()]).ok();
        let images = lab.ctr_in("elsewhere", ["images", "list", "--quiet"]).ok();
        let image = images
            .lines()
            .find(|l| l.contains(&format!("from-{kind}")))
            .unwrap_or_else(|| panic!("{}", images.stdout))
            .to_owned();
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
    lab.shipway([
        "build",
        "--progress",
        "plain",
        "--output",
        out.to_str().unwrap(),
        context.to_str().unwrap(),
    ])
    .ok();
    assert_eq!(std::fs::read_to_string(out.join("dir/one")).unwrap(), "1\n");
    assert_eq!(std::fs::read_to_string(out.join("dir/two")).unwrap(), "2\n");
    assert_eq!(std::fs::metadata(out.join("dir/one")).unwrap().mode() & 0o777, 0o600);
    assert_eq!(std::fs::read_link(out.join("link")).unwrap().to_str(), Some("dir/one"));
}

#[test]
fn two_daemons_make_the_same_image_of_the_same_input() {
    // Everything that carries a time is pinned, so all bytes must be the same: layers, config,
    // manifest and index.
    let text = "FROM busybox AS made\nRUN mkdir /out && echo made > /out/made && ln /out/made /out/again\n\
                FROM busybox\nENV A=b\nCOPY file /dir/file\nCOPY --link file /linked\nCOPY --from=made /out /made\nRUN echo ran > /ran\nCMD [\"sh\"]\n";
    let made = || {
        let lab = Lab::complete(any());
        let context = lab.context("same", &[("Dockerfile", text), ("file", "content")]);
        let name = "docker.io/library/same:1";
        let output = format!("type=image,name={name},rewrite-timestamp=true");
        let epoch = "SOURCE_DATE_EPOCH=1700000000";
        lab.shipway([
            "build",
            "--output",
            &output,
            "--build-arg",
            epoch,
            &context.to_string_lossy(),
        ])
        .ok();
        assert_eq!(
            ctr_run(&lab, name, &["cat", "/dir/file", "/made/again"]).ok().stdout,
            "contentmade\n"
        );
        let image = Image::of(&lab, name);
        (image.layers(), image.config.to_string(), image.manifest.to_string(), image.target)
    };
    let (one, two) = (made(), made());
    assert_eq!(one.0, two.0, "layers");
    assert_eq!(one.1, two.1, "config");
    assert_eq!(one.2, two.2, "manifest");
    assert_eq!(one.3, two.3, "what the record points at");
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
        let there: Vec<String> =
            shipway_integration::snapshots(&lab).into_iter().map(|(name, _)| name).collect();
        assert!(
            image.chain().iter().all(|c| there.contains(c)),
            "{:?} of {there:?}",
            image.chain()
        );
    });
}

/// BuildKit's clients look for the mark on every layer that the build made, whether its times had
/// to change or not.
#[test]
fn layers_tell_the_epoch_they_were_rewritten_with() {
    let lab = Lab::complete(any());
    let context =
        lab.context("marked", &[("Dockerfile", "FROM busybox\nCOPY file /\n"), ("file", "old")]);
    run(Command::new("touch").args(["-d", "2001-01-01T00:00:00Z"]).arg(context.join("file"))).ok();
    let name = "docker.io/library/marked:1";
    let output = format!("type=image,name={name},rewrite-timestamp=true");
    lab.shipway([
        "build",
        "--output",
        &output,
        "--build-arg",
        "SOURCE_DATE_EPOCH=1700000000",
        context.to_str().unwrap(),
    ])
    .ok();
    let marks: Vec<_> = Image::of(&lab, name).manifest["layers"]
        .as_array()
        .unwrap()
        .iter()
        .map(|l| l["annotations"].clone())
        .collect();
    assert_eq!(
        marks,
        [
            serde_json::Value::Null,
            serde_json::json!({ "buildkit/rewritten-timestamp": "1700000000" })
        ]
    );
}

#[test]
fn layers_that_will_be_exported_are_compressed_while_later_steps_run() {
    let lab = Lab::complete(any());
    let text = "FROM busybox AS other\nRUN echo other > /other\nFROM busybox\nRUN echo early > /early\nCOPY --from=other /other /\nRUN sleep 600\n";
    let context = lab.context("ahead", &[("Dockerfile", text)]);
    let mut command = lab.shipway_command();
    command.args(["build", "--progress", "plain", "--tag", "ahead:1"]).arg(&context);
    let mut client =
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
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

/// What clients are told of an image, and what an archive's index says of it.
#[test]
fn the_descriptor_of_an_image_names_its_platform_and_no_time_of_its_making() {
    let lab = Lab::complete(any());
    let context = lab.context("told", &[("Dockerfile", "FROM busybox\nLABEL a=\"<&>\"\n")]);
    let context = context.to_str().unwrap();
    let arch = shipway_oci::Platform::host().architecture;
    let platform = serde_json::json!({ "architecture": arch, "os": "linux" });
    let file = lab.dir().join("told.json");
    let told = |output: &str| {
        lab.shipway([
            "build",
            "--metadata-file",
            file.to_str().unwrap(),
            "--output",
            output,
            context,
        ])
        .ok();
        let metadata: serde_json::Value =
            serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
        metadata["containerimage.descriptor"].clone()
    };
    let image = told("type=image,name=docker.io/library/told:1");
    assert_eq!((&image["platform"], image.get("annotations")), (&platform, None), "{image}");
    let annotated =
        told("type=image,name=docker.io/library/told:2,annotation-manifest-descriptor.k=v");
    assert_eq!(annotated["annotations"], serde_json::json!({ "k": "v" }));

    let tar = lab.dir().join("told.tar");
    let archive = told(&format!("type=oci,dest={}", tar.display()));
    let index = run(Command::new("tar").arg("-xOf").arg(&tar).arg("index.json")).ok().stdout;
    let index: serde_json::Value = serde_json::from_str(&index).unwrap();
    assert_eq!(index["manifests"][0], archive);
    assert_eq!(archive["platform"], platform);
    let created = archive["annotations"]["org.opencontainers.image.created"].as_str().unwrap();
    assert!(created.len() == "2006-01-02T15:04:05Z".len() && created.ends_with('Z'), "{created}");

    // The config has the label as Go writes it.
    let image = Image::of(&lab, "docker.io/library/told:1");
    let text = lab
        .ctr(["content", "get", image.manifest["config"]["digest"].as_str().unwrap()])
        .ok()
        .stdout;
    assert!(text.contains(r#""Labels":{"a":"\u003c\u0026\u003e"}"#), "{text}");
}

#[test]
fn annotations_have_a_place_or_are_refused_by_name() {
    let lab = Lab::complete(any());
    let context = lab.context("annotated", &[("Dockerfile", "FROM busybox\nLABEL a=b\n")]);
    let context = context.to_str().unwrap();
    let name = "docker.io/library/annotated:1";
    let export = |more: &str| {
        lab.shipway(["build", "--output", &format!("type=image,name={name},{more}"), context])
    };
    let arch = shipway_oci::Platform::host().architecture;
    export(&format!("oci-mediatypes=false,annotation.a=1,annotation[linux/{arch}].b=2")).ok();
    let image = Image::of(&lab, name);
    assert_eq!(image.manifest["mediaType"], "application/vnd.docker.distribution.manifest.v2+json");
    assert_eq!(image.manifest["annotations"], serde_json::json!({ "a": "1", "b": "2" }));
    for (more, words) in [
        (
            "annotation[linux/s390x].a=1",
            "invalid annotation: no platform linux/s390x found in source",
        ),
        (
            "oci-mediatypes=false,annotation-index.a=1",
            "cannot export annotations with \"oci-mediatypes=false\"",
        ),
        ("annotation-index.a=1", "index annotations not supported for single platform export"),
    ] {
        let failed = export(more).failed();
        assert!(failed.all().contains(words), "{more}: {}", failed.all());
    }
}
