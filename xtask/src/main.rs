//! Developer commands, each sufficient on a fresh Debian machine with Rust: `cargo xtask demo`,
//! `test`, `lab`, `bench`, `dist`.
//!
//! Depends on nothing that needs `protoc`, because installing it is the first thing that happens
//! here.

mod bench;
mod cargo;
mod check;
mod demo;
mod dist;
mod llb;
mod packages;
mod shell;
mod test;

use std::process::ExitCode;

const HELP: &str = "\
cargo xtask demo [--keep]   build a small image on a private containerd and run it; --keep leaves all of it running
cargo xtask test            everything there is: format, lints, docs, unit tests, live tests on containerd 1.6 and 2.1
cargo xtask check [CRATE]   format, lints and unit tests of a crate and of what depends on it
cargo xtask lab             a shell with a private containerd, registry and shipwayd
cargo xtask bench [-n RUNS] [-w WORKLOAD,…] [NAME=ADDRESS …]
                            the benchmarks, on our daemon and on any other BuildKit-API address
cargo xtask llb [-n SHOWN] [-r COMMAND] IMAGES CASES
                            what the Dockerfile frontend answers for each case, or where that differs from what COMMAND answers
cargo xtask dist [--profile PROFILE | --programs DIR] [--out DIR] [--version VERSION] [--compress xz|none]
                            packages for Debian and a tarball, the same bytes for the same commit
cargo xtask prepare         installs and unpacks what the others need, and nothing else
cargo xtask stop            ends what `demo --keep` left running
";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let done = match words.as_slice() {
        ["demo"] => demo::run(false),
        ["demo", "--keep"] => demo::run(true),
        ["test"] => test::run(),
        ["check"] => check::run(None),
        ["check", name] => check::run(Some(name)),
        ["lab"] => shell::run(),
        ["bench", rest @ ..] => bench::run(rest),
        ["llb", rest @ ..] => llb::run(rest),
        ["dist", rest @ ..] => dist::run(rest),
        ["prepare"] => packages::prepare()
            .map(|missing| missing.0.iter().for_each(|m| println!("absent: {m}"))),
        ["stop"] => demo::stop(),
        // Second halves, started again as root once everything is built.
        ["demo-as-root"] => demo::as_root(false),
        ["demo-as-root", "--keep"] => demo::as_root(true),
        ["lab-as-root"] => shell::as_root(),
        ["bench-as-root", rest @ ..] => bench::as_root(rest),
        ["stop-as-root"] => demo::stop_as_root(),
        [] | ["help" | "--help" | "-h"] => {
            print!("{HELP}");
            Ok(())
        }
        _ => Err(format!("unknown command: {}\n\n{HELP}", arguments.join(" "))),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("{why}");
            ExitCode::FAILURE
        }
    }
}
