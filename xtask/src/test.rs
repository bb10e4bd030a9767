//! `cargo xtask test`: everything there is, and one plain line at the end.

use crate::{
    cargo::{cargo, is_root},
    packages,
};
use parking_lot::Mutex;
use shipway_testkit::Flavour;
use std::{
    io::{BufRead as _, BufReader},
    process::{Command, Stdio},
    sync::Arc,
};

#[derive(Default)]
struct Tally {
    passed: u32,
    failed: u32,
    /// Names of what failed.
    failures: Vec<String>,
}

/// How long the Dockerfile's parser and expander are fuzzed.
const FUZZ_SECONDS: &str = "60";
/// How long random histories of builds are compared with builds without a cache.
const HISTORY_SECONDS: &str = "60";

/// Runs all checks and tests; an error if any failed.
pub fn run() -> Result<(), String> {
    let missing = packages::prepare()?;
    let mut tally = Tally::default();
    check(&mut tally, "cargo fmt", cargo().args(["fmt", "--all", "--", "--check"]));
    check(
        &mut tally,
        "cargo clippy",
        cargo().args(["clippy", "--workspace", "--all-targets", "--quiet", "--", "-D", "warnings"]),
    );
    let doc = &["doc", "--workspace", "--no-deps", "--document-private-items", "--quiet"];
    check(
        &mut tally,
        "cargo doc",
        cargo().args(doc).env("RUSTDOCFLAGS", "-D warnings -A rustdoc::private-intra-doc-links"),
    );
    // The programs that live tests start.
    check(&mut tally, "cargo build", cargo().args(["build", "--workspace", "--bins"]));
    tests(
        &mut tally,
        "unit tests",
        &["test", "--workspace", "--exclude", "shipway-integration", "--no-fail-fast"],
    );
    // Two at a time: each has a containerd and a daemon of its own. What fails beside the others
    // has failed: races live there.
    let live =
        &["test", "--package", "shipway-integration", "--no-fail-fast", "--", "--test-threads=2"];
    tests(&mut tally, "live tests", live);

    println!();
    for flavour in Flavour::all() {
        println!("live tests ran on containerd {} ({flavour:?})", flavour.version());
    }
    for absent in &missing.0 {
        println!("absent, tests that use it did not run: {absent}");
    }
    for failure in &tally.failures {
        println!("failed: {failure}");
    }
    println!("{} passed, {} failed", tally.passed, tally.failed);
    if tally.failed == 0 { Ok(()) } else { Err(String::new()) }
}

fn check(tally: &mut Tally, name: &str, command: &mut Command) {
    println!("== {name}");
    match command.status() {
        Ok(status) if status.success() => tally.passed += 1,
        _ => tally.fail(name),
    }
}

impl Tally {
    fn fail(&mut self, name: &str) {
        self.failed += 1;
        self.failures.push(name.to_owned());
    }

    /// Counts a line of a test program's output.
    fn line(&mut self, line: &str) -> bool {
        if let Some(summary) = line.strip_prefix("test result: ") {
            let count = |what: &str| {
                summary
                    .split(&[';', '.'][..])
                    .find_map(|p| p.trim().strip_suffix(what))
                    .and_then(|n| n.trim().parse::<u32>().ok())
                    .unwrap_or(0)
            };
            self.passed += count("passed");
            self.failed += count("failed");
            return true;
        }
        if let Some(name) = line.strip_prefix("test ").and_then(|l| l.strip_suffix(" ... FAILED")) {
            self.failures.push(name.to_owned());
        }
        false
    }
}

/// Runs tests, shows their output, and counts them. Tests run as root: snapshots and mounts need
/// it.
fn tests(tally: &mut Tally, name: &str, arguments: &[&str]) {
    println!("== {name}");
    let mut command = cargo();
    command
        .env("SHIPWAY_FUZZ_SECONDS", FUZZ_SECONDS)
        .env("SHIPWAY_HISTORY_SECONDS", HISTORY_SECONDS);
    command.args(arguments).stdout(Stdio::piped()).stderr(Stdio::piped());
    if !is_root() {
        let target = format!("{}-unknown-linux-gnu", std::env::consts::ARCH)
            .to_uppercase()
            .replace('-', "_");
        command.env(format!("CARGO_TARGET_{target}_RUNNER"), "sudo -E");
    }
    let before = tally.failed;
    let shared = Arc::new(Mutex::new((std::mem::take(tally), false)));
    let success = match command.spawn() {
        Err(e) => {
            eprintln!("{command:?}: {e}");
            false
        }
        Ok(mut child) => {
            let (out, err) = (child.stdout.take(), child.stderr.take());
            std::thread::scope(|scope| {
                let watch = |line: &str| {
                    let mut guard = shared.lock();
                    let summary = guard.0.line(line);
                    guard.1 |= summary;
                };
                if let Some(err) = err {
                    scope.spawn(move || copy(err, std::io::stderr(), |_| {}));
                }
                if let Some(out) = out {
                    copy(out, std::io::stdout(), watch);
                }
            });
            child.wait().is_ok_and(|s| s.success())
        }
    };
    let (counted, any) = std::mem::take(&mut *shared.lock());
    *tally = counted;
    // Something failed that no test program counted: it did not compile, or died.
    if !any || (!success && tally.failed == before) {
        tally.fail(&format!("{name}: not all of them could run"));
    }
}

fn copy(from: impl std::io::Read, mut to: impl std::io::Write, mut each: impl FnMut(&str)) {
    for line in BufReader::new(from).split(b'\n').map_while(Result::ok) {
        let line = String::from_utf8_lossy(&line);
        each(&line);
        let _ = writeln!(to, "{line}");
        let _ = to.flush();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_counted_from_what_test_programs_print() {
        let mut tally = Tally::default();
        tally.line("test a::b ... ok");
        tally.line("test a::c ... FAILED");
        tally.line("test result: FAILED. 12 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.1s");
        tally.line("test result: ok. 3 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.1s");
        assert_eq!((tally.passed, tally.failed, tally.failures), (15, 1, vec!["a::c".to_owned()]));
    }
}
