//! Devices of the host in steps: described by files, allowed by name, and seen inside (rows
//! `exec.cdi`, `so.cdi`, `df.run.device`).

#![allow(clippy::unwrap_used)]

use shipway_integration::{any, build, build_text, on_each};
use shipway_testkit::{BaseImage, Flavour, Lab};

/// A lab whose daemon reads device files in the directory `cdi`.
fn lab_with_devices(flavour: Flavour, cdi: &str) -> Lab {
    let mut lab = Lab::on(flavour);
    let dir = lab.dir().join("cdi");
    std::fs::create_dir(&dir).unwrap();
    lab.configure_daemon(&format!("[cdi]\n  specDirs = [\"{}\"]\n{cdi}", dir.display()));
    lab.start_registry();
    BaseImage::busybox().push(&lab.registry(), "library/busybox", "latest");
    lab.start_daemon();
    lab
}

/// A device with one of everything: `/dev/kmsg` under another name, which a step may not open of
/// itself; a variable, a mount, a hook and a group.
fn describe(lab: &Lab) {
    let (dir, at) = (lab.dir().join("cdi"), lab.dir().display());
    std::fs::write(lab.dir().join("given"), "from the host\n").unwrap();
    let file = format!(
        "cdiVersion: \"0.7.0\"\nkind: test.shipway/thing\nannotations: {{note: of the file}}\ncontainerEdits: {{env: [ALL=file]}}\n\
         devices:\n- name: one\n  containerEdits:\n    env: [THING=one]\n    additionalGids: [4242]\n\
         \x20   deviceNodes: [{{path: /dev/messages, hostPath: /dev/kmsg, permissions: w, fileMode: 0620}}]\n\
         \x20   mounts: [{{hostPath: {at}/given, containerPath: /opt/deep/given, options: [rbind, ro]}}]\n\
         \x20   hooks: [{{hookName: createRuntime, path: /bin/sh, args: [sh, -c, \"echo ran > {at}/hooked\"], env: [PATH=/bin]}}]\n"
    );
    std::fs::write(dir.join("thing.yaml"), file).unwrap();
    let free = r#"{"cdiVersion": "0.6.0", "kind": "test.shipway/free", "devices": [
        {"name": "a", "containerEdits": {"env": ["FREE=a"]}},
        {"name": "b", "annotations": {"org.mobyproject.buildkit.device.class": "shared"}, "containerEdits": {"env": ["FREE=b"]}}
    ], "annotations": {"org.mobyproject.buildkit.device.autoallow": "true"}}"#;
    std::fs::write(dir.join("free.json"), free).unwrap();
}

#[test]
fn a_step_sees_the_device_that_it_may_use() {
    on_each(|flavour| {
        let lab = lab_with_devices(flavour, "");
        describe(&lab);
        let step = "RUN --device=test.shipway/thing=one,required : > /dev/messages && test \"$ALL $THING\" = 'file one' && id -G | grep -qw 4242 \
                    && cat /opt/deep/given && ls -l /dev/messages | grep -q '^crw--w----.* 1, *11 ' && date +%N > /when\n";
        let text = format!(
            "FROM busybox\n{step}\
             RUN test -z \"$THING$ALL\" && test ! -e /opt/deep/given && test ! -e /dev/messages && mknod /m c 1 11 && ! (: > /m) && rm /m\n"
        );
        let refused = build_text(&lab, "refused:1", &text).failed();
        let said = refused.all();
        assert!(
            said.contains(
                "device test.shipway/thing=one is requested by the build but not allowed"
            ),
            "{said}"
        );
        assert!(said.contains("--allow device=test.shipway/thing=one"), "{said}");

        let context = lab.context("allowed", &[("Dockerfile", &text)]);
        for (i, allow) in
            ["device=test.shipway/thing=one", "device=test.shipway/thing"].into_iter().enumerate()
        {
            let built = build(&lab, "allowed:1", &context, &["--allow", allow]).ok();
            // The key is made of the device that was chosen, not of what was granted.
            assert_eq!(built.all().contains("from the host"), i == 0, "{}", built.all());
        }
        assert_eq!(std::fs::read_to_string(lab.dir().join("hooked")).unwrap(), "ran\n");
        build(
            &lab,
            "allowed:2",
            &lab.context("other", &[("Dockerfile", &text.replace("/when", "/then"))]),
            &["--allow", "device"],
        )
        .ok();
    });
}

#[test]
fn devices_are_found_by_kind_class_and_alias() {
    let lab = lab_with_devices(any(), "  autoAllowed = [\"test.shipway/thing\"]\n");
    let shown = || {
        lab.shipway(["workers", "--verbose"])
            .ok()
            .stdout
            .split_whitespace()
            .collect::<Vec<_>>()
            .join(" ")
    };
    assert!(!shown().contains("Devices:"));
    describe(&lab);
    let shown = shown();
    for line in [
        "Name: test.shipway/free=a AutoAllow: true Annotations: org.mobyproject.buildkit.device.autoallow: true",
        "Annotations: org.mobyproject.buildkit.device.class: shared",
        "Name: test.shipway/thing=one AutoAllow: true Annotations: note: of the file",
    ] {
        assert!(shown.contains(line), "{line} is not in {shown}");
    }
    let run = |device: &str, check: &str| {
        format!("RUN --device={device} test \"$THING,$FREE\" = {check}\n")
    };
    let text = [
        "FROM busybox\n".to_owned(),
        run("test.shipway/free", ",a"),
        run("shared", ",b"),
        run("test.shipway/none", ","),
    ]
    .concat();
    build_text(
        &lab,
        "found:1",
        &format!("{text}{}", run("test.shipway/thing=*,required=false", "one,")),
    )
    .ok();

    let aliased = lab.context(
        "aliased",
        &[("Dockerfile", &format!("FROM busybox\n{}", run("card,required", ",b")))],
    );
    build(&lab, "aliased:1", &aliased, &["--allow", "device=test.shipway/free=b,alias=card"]).ok();
    let missing = build(&lab, "aliased:2", &aliased, &[]).failed();
    assert!(
        missing.all().contains("required device \"card\" is not registered"),
        "{}",
        missing.all()
    );
}

#[test]
fn a_daemon_can_be_told_to_give_none() {
    let lab = lab_with_devices(any(), "  disabled = true\n");
    describe(&lab);
    let text = "FROM busybox\nRUN --device=test.shipway/free=a,required true\n";
    let failed = build_text(&lab, "none:1", text).failed();
    assert!(
        failed.all().contains("required device \"test.shipway/free=a\" is not registered"),
        "{}",
        failed.all()
    );
    assert!(failed.all().contains("disabled in the daemon's configuration"), "{}", failed.all());
    let context = lab.context("none", &[("Dockerfile", text)]);
    let failed = build(&lab, "none:2", &context, &["--allow", "device"]).failed();
    assert!(
        failed
            .all()
            .contains("granting entitlement device is not allowed by build daemon configuration"),
        "{}",
        failed.all()
    );
    build_text(
        &lab,
        "none:3",
        "FROM busybox\nRUN --device=test.shipway/free=a test -z \"$FREE\"\n",
    )
    .ok();
}
