//! Errors name the step and the cause, show the offending lines, and say what to try.

use shipway_integration::{any, build};
use shipway_testkit::Lab;

/// Builds `files` and expects a failure that says all of `says`.
#[track_caller]
fn check(lab: &Lab, name: &str, files: &[(&str, &str)], says: &[&str]) {
    let context = lab.context(name, files);
    let failed = build(lab, name, &context, &[]).failed();
    for word in says {
        assert!(
            failed.all().contains(word),
            "{name}: the error does not say {word:?}:\n{}",
            failed.all()
        );
    }
}

#[test]
fn mistakes_are_named_with_their_lines() {
    let lab = Lab::complete(any());
    check(
        &lab,
        "step",
        &[("Dockerfile", "FROM busybox\nRUN echo before\nRUN echo why >&2; exit 7\n")],
        &["Dockerfile:3", ">>> RUN echo why >&2; exit 7", "why", "exit code: 7"],
    );
    check(
        &lab,
        "instruction",
        &[("Dockerfile", "FROM busybox\nCOPPY a b\n")],
        &[
            "Dockerfile:2",
            ">>> COPPY a b\n     |     ^^^^^\n",
            "unknown instruction: COPPY",
            "COPY",
        ],
    );
    check(
        &lab,
        "missing",
        &[("Dockerfile", "FROM busybox\nCOPY settings.jsn /\n"), ("settings.json", "{}")],
        &[">>> COPY settings.jsn /\n     |          ^^^^^^^^^^^^\n", "settings.json"],
    );
    let ignored = [
        ("Dockerfile", "FROM busybox\nCOPY secret.txt /\n"),
        ("secret.txt", "x"),
        (".dockerignore", "*.md\nsecret*\n"),
    ];
    check(&lab, "ignored", &ignored, &["secret.txt", ".dockerignore", "secret*"]);
    check(
        &lab,
        "base",
        &[("Dockerfile", "FROM no-such-image:9\n")],
        &["Dockerfile:1", "no-such-image:9", "not found"],
    );
    check(
        &lab,
        "stage",
        &[("Dockerfile", "FROM busybox AS build\nFROM busybox\nCOPY --from=biuld /x /x\n")],
        &["biuld", "build"],
    );
    check(&lab, "user", &[("Dockerfile", "FROM busybox\nUSER nosuch\nRUN true\n")], &["nosuch"]);
    check(&lab, "empty", &[("Dockerfile", "")], &["empty"]);
}

#[test]
fn a_check_tells_all_mistakes_at_once_with_their_columns() {
    let lab = Lab::complete(any());
    let context = lab.context(
        "check",
        &[("Dockerfile", "FROM busybox as b\nENV A=$B\nCOPY --frm=b /x /\nEXPOSE 80/TPC\n")],
    );
    let checked = build(&lab, "check", &context, &["--check"]).failed().all();
    for part in [
        ">>> FROM busybox as b\n     |                  ^^\n",
        "hint: write AS",
        ">>> COPY --frm=b /x /\n     |          ^^^^^^^\n",
        "unknown flag: --frm (did you mean from?)",
    ] {
        assert!(checked.contains(part), "no {part:?} in\n{checked}");
    }
    let context = lab.context(
        "check2",
        &[("Dockerfile", "FROM busybox AS b\nENV A=$PTAH\nEXPOSE 80/TPC\nCOPY --chmod=9 x /\n")],
    );
    let checked = build(&lab, "check2", &context, &["--check"]).failed().all();
    for part in
        ["^^^^\n", "hint: did you mean PATH?", "invalid proto: TPC", "invalid chmod parameter: '9'"]
    {
        assert!(checked.contains(part), "no {part:?} in\n{checked}");
    }
    let sarif = build(&lab, "check2", &context, &["--check", "--format", "sarif"]).failed().all();
    assert!(
        sarif.contains("\"startColumn\": 8") && sarif.contains("\"insertedContent\""),
        "{sarif}"
    );
}

#[test]
fn a_missing_dockerfile_and_a_missing_context_are_named() {
    let lab = Lab::complete(any());
    let context = lab.context("nothing", &[("other", "x")]);
    let failed = build(&lab, "nothing", &context, &[]).failed();
    assert!(failed.all().contains("Dockerfile"), "{}", failed.all());
    let failed = build(&lab, "nowhere", std::path::Path::new("/nonexistent/context"), &[]).failed();
    assert!(failed.all().contains("/nonexistent/context"), "{}", failed.all());
}

#[test]
fn a_daemon_that_is_not_there_is_named() {
    let lab = Lab::on(any());
    let failed = lab.shipway(["workers"]).failed();
    assert!(failed.all().contains(&*lab.daemon_socket().to_string_lossy()), "{}", failed.all());
}
