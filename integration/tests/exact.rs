//! What is under a chain ID is what unpacking the layer gives: steps that pack to the same tar do
//! not meet, and what no layer tells stays in its build.

#![allow(clippy::unwrap_used)]

use rustix::fs::XattrFlags;
use shipway_integration::{
    Image, any, build, build_text, ctr_run, nothing_left, on_each, remove_everything, snapshots,
};
use shipway_testkit::{BaseImage, Lab};
use std::{fs, path::Path, process::Command};

/// A build whose steps need what no layer tells, and one that packs to the same but for that.
fn roots(base: &str) -> [String; 2] {
    [
        format!("{base}RUN true\nRUN test \"$(stat -c %u /)\" = 0\n"),
        format!(
            "{base}RUN chown 1000 /\nUSER 1000\nRUN touch /x\nRUN test \"$(stat -c %u /)\" = 1000 && test -e /x\n"
        ),
    ]
}

/// Members of a layer, as tar lists them.
#[track_caller]
fn members(lab: &Lab, digest: &str) -> String {
    let file = lab.dir().join("layer.tgz");
    let path = lab.ctr_path().display().to_string();
    let get = format!(
        "'{path}' -a {} -n {} content get {digest} > {}",
        lab.containerd_socket().display(),
        lab.namespace(),
        file.display()
    );
    assert!(Command::new("sh").args(["-c", &get]).status().unwrap().success());
    let list = Command::new("tar").arg("--numeric-owner").arg("-tvzf").arg(&file).output().unwrap();
    String::from_utf8(list.stdout).unwrap()
}

#[test]
fn steps_with_equal_tars_do_not_meet_and_images_are_what_containerd_unpacks() {
    on_each(|flavour| {
        let mut lab = Lab::complete(flavour);
        for (order, base) in
            [("plain", "FROM busybox\n"), ("owned", "FROM busybox\nRUN echo other > /other\n")]
        {
            let [plain, owned] = roots(base);
            let tags = [format!("plain-{order}:1"), format!("owned-{order}:1")];
            let mut builds = [(&tags[0], plain), (&tags[1], owned)];
            if order == "owned" {
                builds.reverse();
            }
            for (tag, text) in builds {
                build_text(&lab, tag, &text).ok();
            }
            let look = "stat -c %u / && ls /x 2>/dev/null || true";
            for (tag, want) in tags.iter().zip(["0\n", "0\n/x\n"]) {
                let seen = ctr_run(&lab, &format!("docker.io/library/{tag}"), &["sh", "-c", look])
                    .ok()
                    .stdout;
                assert_eq!(seen, want, "{tag}: containerd passes over entries of the root");
            }
        }
        // Other tools do not pass over it.
        let image = Image::of(&lab, "docker.io/library/owned-plain:1");
        let list = members(&lab, &image.layers()[1]);
        assert!(list.lines().any(|l| l.contains("1000/0") && l.ends_with(" ./")), "{list}");
        assert!(
            !members(&lab, &image.layers()[2]).contains(" ./\n"),
            "only the layer that changed it has an entry of the root"
        );

        // The daemon's next life knows the states again, and a prune takes them all.
        assert!(lab.stop_daemon(), "the daemon had to be killed");
        lab.start_daemon();
        let again = build_text(&lab, "again:1", &roots("FROM busybox\n")[1]).ok();
        assert_eq!(
            again.stderr.matches(" CACHED").count(),
            4,
            "the base and three steps: {}",
            again.stderr
        );
        assert_eq!(Image::of(&lab, "docker.io/library/again:1").layers(), image.layers());
        remove_everything(&lab);
        nothing_left(&lab);
    });
}

#[test]
fn what_no_layer_tells_is_there_for_later_steps_and_not_in_the_image() {
    on_each(|flavour| {
        let lab = Lab::complete(flavour);
        let text = "FROM busybox\nRUN echo 1 > /kept && echo 2 > /gone\nRUN touch /.wh.gone && chmod 700 /root\nRUN test -e /.wh.gone && cat /gone\n";
        build_text(&lab, "named:1", text).ok();
        // To whoever unpacks the layer it is a whiteout, as everywhere.
        let seen = ctr_run(
            &lab,
            "docker.io/library/named:1",
            &["sh", "-c", "ls -a / | grep -e gone -e kept"],
        )
        .ok();
        assert_eq!(seen.stdout, "kept\n");
        remove_everything(&lab);
        nothing_left(&lab);
    });
}

/// Attributes that images have, and one that they must not bring.
fn attributed(file: &Path) {
    let acl: Vec<u8> =
        [(1u16, 6u16, u32::MAX), (2, 7, 1), (4, 4, u32::MAX), (16, 7, u32::MAX), (32, 4, u32::MAX)]
            .iter()
            .fold(2u32.to_le_bytes().to_vec(), |v, (t, p, i)| {
                [v, t.to_le_bytes().into(), p.to_le_bytes().into(), i.to_le_bytes().into()].concat()
            });
    // With a line's end in it.
    let capability = [1, 0, 0, 2, 10, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    for (name, value) in [
        ("system.posix_acl_access", &acl[..]),
        ("security.capability", &capability),
        ("user.a", b"b\nc"),
        ("trusted.mine", b"1"),
        ("user.overlay.opaque", b"y"),
    ] {
        rustix::fs::lsetxattr(file, name, value, XattrFlags::empty()).unwrap();
    }
}

fn attributes(file: &Path) -> Vec<(String, Vec<u8>)> {
    let mut names = vec![0; 4096];
    let n = rustix::fs::llistxattr(file, &mut names).unwrap();
    let names = String::from_utf8(names[..n].to_vec()).unwrap();
    let value = |name: &str| {
        let mut value = vec![0; 4096];
        let n = rustix::fs::lgetxattr(file, name, &mut value).unwrap();
        (name.to_owned(), value[..n].to_vec())
    };
    let mut all: Vec<_> = names
        .split('\0')
        .filter(|n| !n.is_empty() && *n != "security.selinux")
        .map(value)
        .collect();
    all.sort();
    all
}

#[test]
fn attributes_of_images_go_through_archives_layers_and_containerd() {
    on_each(|flavour| {
        let lab = Lab::complete(flavour);
        let context = lab.context(
            "attributes",
            &[("Dockerfile", "FROM busybox\nADD a.tar /\nRUN true\n"), ("in/f", "text")],
        );
        let file = context.join("in/f");
        attributed(&file);
        let want: Vec<_> = attributes(&file)
            .into_iter()
            .filter(|(n, _)| n != "trusted.mine" && n != "user.overlay.opaque")
            .collect();
        assert_eq!(want.len(), 3);
        let tar = ["--xattrs", "--xattrs-include=*", "-cf", "a.tar", "-C", "in", "f"];
        assert!(Command::new("tar").current_dir(&context).args(tar).status().unwrap().success());
        let archive = lab.dir().join("image.tar");
        let output = format!("type=oci,name=other.invalid/attributes:1,dest={}", archive.display());
        build(&lab, "attributes:1", &context, &["--output", &output]).ok();
        build(&lab, "attributes:1", &context, &[]).ok();
        lab.ctr_in("other", ["images", "import", &archive.to_string_lossy()]).ok();
        for (namespace, image) in [
            (lab.namespace(), "docker.io/library/attributes:1"),
            ("other", "other.invalid/attributes:1"),
        ] {
            let at = lab.dir().join("mounted");
            fs::create_dir_all(&at).unwrap();
            lab.ctr_in(namespace, ["images", "mount", image, &at.to_string_lossy()]).ok();
            let seen = attributes(&at.join("f"));
            lab.ctr_in(namespace, ["images", "unmount", &at.to_string_lossy()]).ok();
            assert_eq!(seen, want, "{namespace}");
        }
    });
}

#[test]
fn a_file_of_the_same_size_and_time_is_another_file_where_snapshots_are_copies() {
    on_each(|flavour| {
        let mut lab = Lab::on(flavour);
        lab.start_registry();
        BaseImage::busybox().push(&lab.registry(), "library/busybox", "latest");
        lab.configure_worker("  snapshotter = \"native\"\n");
        lab.start_daemon();
        let base = "FROM busybox\nRUN echo good > /f && touch -d @1000000000 /f\n";
        let evil =
            format!("{base}RUN echo evil > /f && touch -d @1000000000 /f\nRUN grep evil /f\n");
        build_text(&lab, "evil:1", &evil).ok();
        build_text(&lab, "good:1", &format!("{base}RUN true\nRUN grep good /f\n")).ok();
        for (tag, want) in [("evil", "evil\n"), ("good", "good\n")] {
            let image = format!("docker.io/library/{tag}:1");
            let seen =
                lab.ctr(["run", "--rm", "--snapshotter", "native", &image, tag, "cat", "/f"]).ok();
            assert_eq!(seen.stdout, want);
        }
    });
}

#[test]
fn a_snapshot_of_another_versions_rule_is_not_used() {
    let mut lab = Lab::complete(any());
    let text = "FROM busybox\nRUN echo a > /a && touch -d @1000000000 /a\n";
    build_text(&lab, "old:1", text).ok();
    let top = Image::of(&lab, "docker.io/library/old:1").chain().pop().unwrap();
    lab.ctr(["snapshots", "label", &top, "shipway/exact=0"]).ok();
    assert!(lab.stop_daemon(), "the daemon had to be killed");
    lab.start_daemon();
    let again = build_text(&lab, "new:1", &format!("{text}RUN cat /a\n")).ok();
    assert_eq!(again.stderr.matches(" CACHED").count(), 1, "the base alone: {}", again.stderr);
    let all = snapshots(&lab);
    assert!(
        all.iter().any(|(name, parent)| name.starts_with("shipway-over-") && parent != &top),
        "{all:#?}"
    );
    assert!(all.iter().all(|(_, parent)| parent != &top), "something lies on it: {all:#?}");
}
