//! The build context: what `.dockerignore` leaves out, and that only changes travel.

#![allow(clippy::unwrap_used)]

use shipway_integration::{any, build, ctr_run, on_each};
use shipway_testkit::{BaseImage, Lab};

#[test]
fn ignored_files_are_not_there_and_links_and_modes_are() {
    let lab = Lab::complete(any());
    let files = [
        ("Dockerfile", "FROM busybox\nCOPY . /all\n"),
        (".dockerignore", "# comment\nnode_modules\n*.log\n!keep.log\nsub/**/*.tmp\n"),
        ("a.txt", "a"),
        ("x.log", "x"),
        ("keep.log", "k"),
        ("node_modules/m.js", "m"),
        ("sub/deep/er/t.tmp", "t"),
        ("sub/deep/er/s.txt", "s"),
    ];
    let context = lab.context("ignore", &files);
    std::os::unix::fs::symlink("a.txt", context.join("link")).unwrap();
    std::fs::hard_link(context.join("a.txt"), context.join("hard")).unwrap();
    use std::os::unix::fs::PermissionsExt as _;
    std::fs::set_permissions(context.join("a.txt"), std::fs::Permissions::from_mode(0o751))
        .unwrap();
    build(&lab, "ignore:1", &context, &[]).ok();
    let run = |script: &str| {
        ctr_run(&lab, "docker.io/library/ignore:1", &["sh", "-c", script]).ok().stdout
    };
    let list = run("cd /all; find . -type f -o -type l | sort");
    assert_eq!(
        list,
        "./.dockerignore\n./Dockerfile\n./a.txt\n./hard\n./keep.log\n./link\n./sub/deep/er/s.txt\n"
    );
    assert_eq!(run("stat -c %a /all/a.txt; readlink /all/link"), "751\na.txt\n");
}

/// Bytes that plain progress says were transferred for the context.
#[track_caller]
fn transferred(text: &str) -> f64 {
    let line = text
        .lines()
        .rfind(|l| l.contains("transferring context:"))
        .unwrap_or_else(|| panic!("no transfer in\n{text}"));
    let amount =
        line.split("transferring context:").nth(1).unwrap().split_whitespace().next().unwrap();
    let digits = amount.trim_end_matches(|c: char| c.is_alphabetic());
    let unit = match &amount[digits.len()..] {
        "B" => 1.0,
        "kB" | "KB" => 1e3,
        "MB" => 1e6,
        unit => panic!("{unit} in {line}"),
    };
    digits.parse::<f64>().unwrap() * unit
}

#[test]
fn one_changed_file_of_many_moves_one_file() {
    let lab = Lab::complete(any());
    let context = lab.context("many", &[("Dockerfile", "FROM busybox\nCOPY . /all\n")]);
    for n in 0..20_000 {
        let dir = context.join(format!("d{}", n / 200));
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(dir.join(format!("f{n}")), format!("{n} {}", "x".repeat(500))).unwrap();
    }
    let first = build(&lab, "many:1", &context, &[]).ok();
    assert!(transferred(&first.all()) > 10e6, "{}", first.all());
    std::fs::write(context.join("d0/f0"), "changed").unwrap();
    std::fs::remove_file(context.join("d1/f200")).unwrap();
    let second = build(&lab, "many:2", &context, &[]).ok();
    // Names and times of all the files are told again; contents are not.
    assert!(transferred(&second.all()) < 3e6, "{}", second.all());
    let out = ctr_run(
        &lab,
        "docker.io/library/many:2",
        &["sh", "-c", "cat /all/d0/f0; test ! -e /all/d1/f200; find /all -type f | wc -l"],
    )
    .ok();
    assert_eq!(out.stdout, "changed20000\n");
}

/// How many names files have is seen by programs: cron refuses a file that has two.
#[test]
fn a_file_with_one_name_has_one_link() {
    on_each(|flavour| {
        let native = (flavour == any()).then_some("native");
        for snapshotter in ["overlayfs"].into_iter().chain(native) {
            let mut lab = Lab::on(flavour);
            lab.configure_worker(&format!("  snapshotter = \"{snapshotter}\"\n"));
            lab.start_registry();
            BaseImage::busybox().push(&lab.registry(), "library/busybox", "latest");
            lab.start_daemon();
            let text = "FROM busybox AS other\nCOPY d /d\nFROM busybox\nCOPY job /etc/cron.d/job\nCOPY d /d\nCOPY --link d /linked\nCOPY --from=other /d /from\n\
                        RUN cd / && stat -c '%h %n' etc/cron.d/job d/* linked/* from/* > /seen && cat d/one linked/one\n";
            let context = lab.context(
                "links",
                &[("Dockerfile", text), ("job", "j"), ("d/one", "1"), ("d/two", "2")],
            );
            std::fs::hard_link(context.join("d/two"), context.join("d/zwei")).unwrap();
            let want: String = std::iter::once("1 etc/cron.d/job\n".to_owned())
                .chain(
                    ["d", "linked", "from"].map(|d| format!("1 {d}/one\n2 {d}/two\n2 {d}/zwei\n")),
                )
                .collect();
            for (tag, text) in [("links:1", "1"), ("links:2", "changed")] {
                std::fs::write(context.join("d/one"), text).unwrap();
                build(&lab, tag, &context, &[]).ok();
                let image = format!("docker.io/library/{tag}");
                let script = "cd / && cat seen && stat -c '%h %n' etc/cron.d/job d/* linked/* from/* && cat d/one linked/one from/one";
                let out = lab
                    .ctr([
                        "run",
                        "--rm",
                        "--snapshotter",
                        snapshotter,
                        &image,
                        "links",
                        "sh",
                        "-c",
                        script,
                    ])
                    .ok()
                    .stdout;
                // As the step saw it, and as a container of the image does.
                assert_eq!(
                    out,
                    format!("{want}{want}{}", text.repeat(3)),
                    "{tag} on {snapshotter}"
                );
            }
        }
    });
}

/// A checkout in the place of another, with files of equal names, sizes and times, is not the
/// other.
#[test]
fn a_checkout_in_the_place_of_another_is_not_the_other() {
    let lab = Lab::complete(any());
    let context = lab.context("checkout", &[("Dockerfile", "FROM busybox\nCOPY a.txt /\n")]);
    let time = std::time::SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1_600_000_000);
    let (here, other) = (context.join("a.txt"), context.with_extension("other"));
    for (file, text) in [(&here, "first"), (&other, "other")] {
        std::fs::write(file, text).unwrap();
        std::fs::File::options().write(true).open(file).unwrap().set_modified(time).unwrap();
    }
    let built = |tag: &str| {
        build(&lab, tag, &context, &[]).ok();
        ctr_run(&lab, &format!("docker.io/library/{tag}"), &["cat", "/a.txt"]).ok().stdout
    };
    assert_eq!(built("checkout:1"), "first");
    std::fs::rename(&other, &here).unwrap();
    assert_eq!(built("checkout:2"), "other");
    // Written in place, with its time put back.
    std::fs::write(&here, "third").unwrap();
    std::fs::File::options().write(true).open(&here).unwrap().set_modified(time).unwrap();
    assert_eq!(built("checkout:3"), "third");
}
