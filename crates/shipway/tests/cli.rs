//! The program as people run it, in a sealed environment: help, versions, mistakes in arguments, no
//! daemon.

use std::{
    io::{Read as _, Write as _},
    os::unix::{net::UnixListener, process::CommandExt},
    process::{Command, Output, Stdio},
};

/// Runs us as `persona` with nothing of our environment.
fn run(persona: &str, arguments: &[&str]) -> Output {
    let home = tempfile::tempdir().expect("temp dir");
    Command::new(env!("CARGO_BIN_EXE_shipway"))
        .arg0(persona)
        .args(arguments)
        .env_clear()
        .env("HOME", home.path())
        .env("XDG_RUNTIME_DIR", home.path())
        .current_dir(home.path())
        .output()
        .expect("runs")
}

#[track_caller]
fn check(persona: &str, arguments: &[&str], code: i32, expected: &[&str]) {
    let output = run(persona, arguments);
    let text = String::from_utf8_lossy(&output.stdout).into_owned()
        + &String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{persona} {arguments:?}: {text}");
    for part in expected {
        assert!(text.contains(part), "{persona} {arguments:?} lacks {part:?}:\n{text}");
    }
}

#[test]
fn help_tells_what_there_is() {
    check(
        "shipway",
        &["--help"],
        0,
        &["build ", "du ", "prune ", "workers ", "history ", "--addr"],
    );
    let flags = [
        "--tag",
        "--build-arg",
        "--output",
        "--push",
        "--secret",
        "--cache-to",
        "--platform",
        "--no-cache",
        "--progress",
        "--iidfile",
    ];
    check("shipway", &["build", "--help"], 0, &flags);
    let store = ["imagetools ", "push ", "tag ", "save ", "load ", "prune-histories ", "debug "];
    check("shipway", &["--help"], 0, &store);
    let create = ["--append", "--dry-run", "--annotation", "--prefer-index", "--metadata-file"];
    check("shipway", &["imagetools", "create", "--help"], 0, &create);
    check("shipway", &["history", "--help"], 0, &["ls ", "inspect ", "export ", "rm "]);
    let completion = ["imagetools", "prune-histories", "dump-llb", "--no-trunc"];
    check("shipway", &["completion", "bash"], 0, &completion);
    check(
        "buildctl",
        &["--help"],
        0,
        &["build", "debug", "du", "prune", "--addr", "--tlscacert", "--wait"],
    );
    check("buildctl", &[], 0, &["Usage: buildctl"]);
    check(
        "buildctl",
        &["build", "--help"],
        0,
        &["--frontend", "--opt", "--local", "--oci-layout", "--export-cache", "--metadata-file"],
    );
}

#[test]
fn versions_have_the_words_that_programs_look_for() {
    let output = run("/usr/local/bin/buildctl", &["--version"]);
    let text = String::from_utf8(output.stdout).expect("utf-8");
    let words: Vec<&str> = text.split_whitespace().collect();
    assert_eq!((words.len(), words[0], &words[2][..1]), (4, "buildctl", "v"), "{text}");
    check("shipway", &["version"], 0, &["shipway "]);
}

#[test]
fn mistakes_are_named() {
    check("shipway", &["bild", "."], 2, &["bild", "build"]);
    check(
        "shipway",
        &["build", "."],
        1,
        &["ERROR: failed to build: failed to read dockerfile", "hint: name it with --file"],
    );
    check("shipway", &["imagetools", "create", "a"], 1, &["please set --tag or --dry-run"]);
    check(
        "shipway",
        &["imagetools", "create", "-t", "A B", "a"],
        1,
        &["is not the name of an image", "hint: "],
    );
    check("shipway", &["imagetools", "inspect", "--raw", "--format", "x", "a"], 2, &["--format"]);
    check("shipway", &["load", "-i", "/no/such"], 1, &["open /no/such"]);
    check(
        "shipway",
        &["tag", "a", "b", "--containerd-addr", "/no/such.sock"],
        1,
        &["/no/such.sock", "hint: is containerd running"],
    );
    check("shipway", &["history", "rm"], 2, &["REF"]);
    check("shipway", &["debug", "ctl", "x"], 2, &["--pin"]);
    check(
        "shipway",
        &["policy", "eval", "--print", "x"],
        1,
        &["policy eval: policies in Rego are not implemented", "hint: write rules as JSON"],
    );
    check("buildctl", &["debug", "dump-metadata"], 1, &["no such file", "hint: "]);
    check("shipway", &["build", "/no/such"], 1, &["unable to prepare context: open /no/such"]);
    check("shipway", &["build", "--progress", "plane", "."], 2, &["invalid progress mode plane"]);
    check("buildctl", &["build"], 1, &["error: ", "connect to unix:///"]);
    check(
        "shipway",
        &["--addr", "unixx://x", "du"],
        1,
        &[
            "ERROR: --addr: invalid address unixx://x: unknown scheme unixx",
            "hint: did you mean unix://x?",
        ],
    );
    check(
        "shipway",
        &["--addr", "unix:///no/such.sock", "workers"],
        1,
        &["connect to unix:///no/such.sock: "],
    );
}

#[test]
fn without_a_daemon_the_places_are_named_where_it_was_looked_for() {
    // Where one runs on this very machine, there is nothing to see.
    if std::path::Path::new("/run/shipway/shipwayd.sock").exists()
        || std::path::Path::new("/run/buildkit/buildkitd.sock").exists()
    {
        eprintln!("NOT TESTED: a daemon runs on this machine");
        return;
    }
    check(
        "shipway",
        &["du"],
        1,
        &[
            "found no daemon to talk to; tried",
            "unix:///run/shipway/shipwayd.sock",
            "hint: start one",
        ],
    );
    check("buildctl", &["du"], 1, &["buildkitd.sock"]);
}

/// Standard streams become a connection, and its end in one direction does not end the other (row
/// `ct.dial`).
#[test]
fn standard_input_and_output_are_a_connection_that_closes_by_halves() {
    let dir = tempfile::tempdir().expect("temp dir");
    let socket = dir.path().join("d.sock");
    let listener = UnixListener::bind(&socket).expect("listens");
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("a connection");
        let mut said = String::new();
        // Ends only if the end of standard input is passed on.
        stream.read_to_string(&mut said).expect("reads");
        stream
            .write_all(said.to_uppercase().as_bytes())
            .expect("writes after the other side has ended");
    });
    let mut client = Command::new(env!("CARGO_BIN_EXE_shipway"))
        .arg0("buildctl")
        .args(["--addr", &format!("unix://{}", socket.display()), "dial-stdio"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("runs");
    client.stdin.take().expect("piped").write_all(b"are you there?\n").expect("writes");
    let output = client.wait_with_output().expect("ends");
    assert_eq!((output.status.code(), &*output.stdout), (Some(0), &b"ARE YOU THERE?\n"[..]));
    server.join().expect("the server is content");
}
