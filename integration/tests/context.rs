//! The build context: what `.dockerignore` leaves out, and that only changes travel.

#![allow(clippy::unwrap_used)]

use shipway_integration::{any, build, ctr_run};
use shipway_testkit::Lab;

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
    std::fs::set_permissions(context.join("a.txt"), std::fs::Permissions::from_mode(0o751)).unwrap();
    build(&lab, "ignore:1", &context, &[]).ok();
    let run = |script: &str| ctr_run(&lab, "docker.io/library/ignore:1", &["sh", "-c", script]).ok().stdout;
    let list = run("cd /all; find . -type f -o -type l | sort");
    assert_eq!(list, "./.dockerignore\n./Dockerfile\n./a.txt\n./hard\n./keep.log\n./link\n./sub/deep/er/s.txt\n");
    assert_eq!(run("stat -c %a /all/a.txt; readlink /all/link"), "751\na.txt\n");
}

/// Bytes that plain progress says were transferred for the context.
fn transferred(text: &str) -> f64 {
    let line = text.lines().rfind(|l| l.contains("transferring context:")).unwrap_or_else(|| panic!("no transfer in\n{text}"));
    let amount = line.split("transferring context:").nth(1).unwrap().split_whitespace().next().unwrap();
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
    let out =
        ctr_run(&lab, "docker.io/library/many:2", &["sh", "-c", "cat /all/d0/f0; test ! -e /all/d1/f200; find /all -type f | wc -l"]).ok();
    assert_eq!(out.stdout, "changed20000\n");
}
