//! One file in, its violations out.

use std::time::Instant;

use shipway_dockerfile::{Dockerfile, Finding, Lines, LintConfig, Linter, Rule, is_secret_name};

#[track_caller]
fn check(text: &str, expected: &[&str]) {
    let mut linter = Linter::new(LintConfig::of_file(text.as_bytes()).expect("settings"));
    Dockerfile::parse_with(text.as_bytes(), &mut linter).expect("parses");
    let found: Vec<String> = linter.found().iter().map(|l| l.short()).collect();
    assert_eq!(found, expected, "for {text:?}");
}

#[test]
fn rules_of_the_text() {
    check("FROM a\nRUN b \\\n\n c", &["NoEmptyContinuation: Empty continuation line (line 4)"]);
    check("FROM a AS Bad", &["StageNameCasing: Stage name 'Bad' should be lowercase (line 1)"]);
    check("FROM a as b", &["FromAsCasing: 'as' and 'FROM' keywords' casing do not match (line 1)"]);
    check("from a as b", &[]);
    check(
        "FROM a AS x\nFROM b AS X\n",
        &[
            "StageNameCasing: Stage name 'X' should be lowercase (line 2)",
            "DuplicateStageName: Duplicate stage name \"x\", stage names should be unique (line 2)",
        ],
    );
    check(
        "FROM a AS context",
        &[
            "ReservedStageName: Stage name should not use the same name as reserved stage \"context\" (line 1)",
        ],
    );
    check(
        "FROM a\nMAINTAINER b",
        &[
            "MaintainerDeprecated: Maintainer instruction is deprecated in favor of using label (line 2)",
        ],
    );
    check(
        "FROM a\nrun b\nRUN c",
        &[
            "ConsistentInstructionCasing: Command 'run' should match the case of the command majority (uppercase) (line 2)",
        ],
    );
    check(
        "from a\nrun b\nRun c",
        &[
            "ConsistentInstructionCasing: Command 'Run' should match the case of the command majority (lowercase) (line 3)",
        ],
    );
}

#[test]
fn settings() {
    let bad = "FROM a as B\nMAINTAINER x\n";
    check(&format!("# check=skip=all\n{bad}"), &[]);
    let selected = format!("# check=skip=FromAsCasing,MaintainerDeprecated;error=true\n{bad}");
    check(&selected, &["StageNameCasing: Stage name 'B' should be lowercase (line 2)"]);
    // Only what stands before the first blank counts.
    check(
        &format!("# check=skip=FromAsCasing, MaintainerDeprecated\n{bad}"),
        &[
            "StageNameCasing: Stage name 'B' should be lowercase (line 2)",
            "MaintainerDeprecated: Maintainer instruction is deprecated in favor of using label (line 3)",
        ],
    );
    check(
        "FROM a\n# check=skip=MaintainerDeprecated\nMAINTAINER x\nMAINTAINER y",
        &[
            "MaintainerDeprecated: Maintainer instruction is deprecated in favor of using label (line 4)",
        ],
    );
    let described = "# wrong words\nARG A\n# A is right\nARG A\n# stage\nFROM a AS b\n";
    check(described, &[]);
    check(
        &format!("# check=experimental=all\n{described}"),
        &[
            "InvalidDefinitionDescription: Comment for ARG should follow the format: `# A <description>` (line 3)",
            "InvalidDefinitionDescription: Comment for FROM should follow the format: `# b <description>` (line 7)",
        ],
    );
    for (text, message) in [
        ("skip", "invalid check option \"skip\""),
        ("skp=x", "invalid check option \"skp\""),
        (
            "error=x",
            "failed to parse check option \"error=x\": strconv.ParseBool: parsing \"x\": invalid syntax",
        ),
    ] {
        assert_eq!(LintConfig::parse(text).expect_err(text).message, message);
    }
}

#[test]
fn violations_may_fail_the_build() {
    let mut linter =
        Linter::new(LintConfig::parse("error=true;skip=UndefinedVar").expect("settings"));
    linter.report(Finding::UndefinedVar { name: "x", suggestion: None }, Lines::default(), &[]);
    assert!(linter.error().is_ok());
    linter.report(
        Finding::UndefinedArgInFrom { arg: "x", suggestion: Some("y") },
        Lines { start: 2, end: 3 },
        &[],
    );
    assert_eq!(
        linter.error().expect_err("fails").message,
        "lint violation found for rules: UndefinedArgInFrom"
    );
    let lint = &linter.take()[0];
    assert_eq!(
        (lint.short().as_str(), lint.lines.spans().len()),
        ("UndefinedArgInFrom: FROM argument 'x' is not declared (did you mean y?) (line 2)", 2)
    );
}

#[test]
fn names_and_pages() {
    assert_eq!(Rule::ALL.len(), 22);
    assert_eq!(
        Rule::JSONArgsRecommended.url(),
        "https://docs.docker.com/go/dockerfile/rule/json-args-recommended/"
    );
    assert_eq!(Rule::InvalidBaseImagePlatform.url(), "");
    let secret = ["API_KEY", "token", "DB_PASSWORD", "auth"];
    let harmless = ["KEYRING", "PUBLIC_KEY", "TOKEN_FILE", "key_version", "monkey"];
    assert!(
        secret.iter().all(|n| is_secret_name(n)) && !harmless.iter().any(|n| is_secret_name(n))
    );
}

#[test]
fn large_files_are_quick() {
    let block = "# about it\nARG A=1 B=${A:-2}\nENV P=/usr/bin:$P Q=\"a b\"\nRUN apt-get update && \\\n    apt-get install -y curl\nCOPY --from=x --chown=1:1 a b /c/\n";
    let blocks = block.repeat(10_000 / 6 + 1);
    let text = format!("FROM a\n{blocks}");
    let best = (0..10).map(|_| {
        let start = Instant::now();
        Dockerfile::parse(text.as_bytes()).expect("parses");
        start.elapsed()
    });
    let best = best.min().expect("ten rounds");
    println!("{} lines in {best:?}", text.lines().count());
    // Unoptimised code takes several times as long as what users run.
    let limit = if cfg!(debug_assertions) { 500 } else { 20 };
    assert!(best.as_millis() < limit, "took {best:?}");
}

#[test]
fn hostile_files_end_soon() {
    let n = 30_000;
    let long = |piece: &str| format!("FROM a\nRUN x{}", piece.repeat(n));
    for text in [
        long(" \\\n a"),
        long("\nFORM x"),
        long(" <<"),
        long("\nONBUILD RUN x"),
        format!("FROM a\n{} x", "ONBUILD ".repeat(8000)),
        format!("FROM a\nRUN {}", "[".repeat(n)),
        format!("FROM a\nRUN {}", "{\"a\":".repeat(8000)),
        format!("FROM a\nRUN [{}", "{\"a\":".repeat(8000)),
        format!("FROM a\nRUN{}", " --mount=a".repeat(6000)),
        format!("FROM a\nENV{} x", " a=".repeat(n / 2)),
        long("\n# check=skip=all\nMAINTAINER x"),
    ] {
        let start = Instant::now();
        let _ = Dockerfile::diagnose(text.as_bytes(), &mut Linter::default());
        assert!(start.elapsed().as_secs() < 10, "{:?} took {:?}", &text[..40], start.elapsed());
    }
}
