//! Builders of several nodes: two daemons, each with a containerd of its own, that build one image
//! together (rows `bx.create`, `bx.o.multinode`), beside `docker buildx` on the same state.

#![allow(clippy::unwrap_used)]

use std::{
    path::PathBuf,
    process::{Command, Stdio},
};

use serde_json::Value;
use shipway_integration::any;
use shipway_oci::Platform;
use shipway_testkit::{Finished, Lab, built, run};

/// Two daemons as the nodes `pair0` and `pair1` of the builder `pair`; the second was created for
/// another platform than this machine's.
struct Pair {
    first: Lab,
    second: Lab,
    state: PathBuf,
    other: &'static str,
}

impl Pair {
    fn new() -> Self {
        let first = Lab::complete(any());
        let mut second = Lab::on(any());
        second.configure_daemon(&format!("[registry.\"{}\"]\nhttp = true\n", first.registry()));
        second.start_daemon();
        let state = first.context("builders", &[]);
        let other = match Platform::host().architecture.as_str() {
            "s390x" => "linux/riscv64",
            _ => "linux/s390x",
        };
        let pair = Self { first, second, state, other };
        pair.ours(&["create", "--name", "pair", "--use", &pair.first.daemon_address()]).ok();
        let second = pair.second.daemon_address();
        pair.ours(&["create", "--name", "pair", "--append", "--platform", other, &second]).ok();
        pair
    }

    fn both(&self) -> String {
        format!("{},{}", Platform::host(), self.other)
    }

    fn command(&self, program: PathBuf) -> Command {
        let mut command = Command::new(program);
        command
            .env("BUILDX_CONFIG", &self.state)
            .env("BUILDX_NO_DEFAULT_ATTESTATIONS", "1")
            .env_remove("BUILDX_BUILDER")
            .env_remove("SHIPWAY_HOST")
            .env_remove("BUILDKIT_HOST");
        command
    }

    #[track_caller]
    fn ours(&self, arguments: &[&str]) -> Finished {
        run(self.command(built("shipway")).args(arguments))
    }

    /// `docker buildx` on the same state, if it is installed.
    #[track_caller]
    fn theirs(&self, arguments: &[&str]) -> Option<Finished> {
        let program = self.first.buildx()?.get_program().into();
        Some(run(self.command(program).args(arguments)))
    }

    /// Builds that a node has in its history.
    #[track_caller]
    fn count(lab: &Lab) -> usize {
        let list = lab.shipway(["history", "ls", "--format", "{{.Ref}}"]).ok();
        list.lines().filter(|l| !l.is_empty()).count()
    }

    /// The index that a tag of the registry has.
    #[track_caller]
    fn index(&self, repository: &str, tag: &str) -> (String, Value) {
        let path = format!("/v2/{repository}/manifests/{tag}");
        let (status, bytes) = self.first.registry_get(&path);
        assert_eq!(status, 200, "{path}: {}", String::from_utf8_lossy(&bytes));
        let digest = shipway_oci::Digest::of(&bytes).to_string();
        (digest, serde_json::from_slice(&bytes).unwrap())
    }
}

/// Platforms and digests of an index.
fn entries(index: &Value) -> Vec<(String, String)> {
    let entries = index["manifests"].as_array().unwrap().iter();
    entries
        .map(|entry| {
            let platform: Platform = serde_json::from_value(entry["platform"].clone()).unwrap();
            (platform.to_string(), entry["digest"].as_str().unwrap().to_owned())
        })
        .collect()
}

const DOCKERFILE: &str = "FROM scratch\nARG TARGETPLATFORM\nCOPY file /\nCOPY <<EOF /platform\n$TARGETPLATFORM\nEOF\nLABEL made=here\n";

#[test]
fn nodes_build_their_platforms_and_one_index_is_pushed() {
    let pair = Pair::new();
    let files = [("Dockerfile", DOCKERFILE), ("file", "a file\n")];
    let context = pair.first.context("together", &files).display().to_string();
    let metadata = pair.first.dir().join("meta.json");
    let tag = |tag: &str| format!("{}/pair:{tag}", pair.first.registry());
    let both = pair.both();
    let build = |tag: &str| {
        let note = "--annotation=index:org.example.note=kept";
        let fixed = ["build", "--progress=plain", "--push", note, "--platform", &both, "--tag"];
        fixed.into_iter().chain([tag, &context]).map(str::to_owned).collect::<Vec<_>>()
    };
    let named = tag("ours");
    let mut line = build(&named);
    line.extend(["--metadata-file".into(), metadata.display().to_string()]);
    let words: Vec<&str> = line.iter().map(String::as_str).collect();
    let done = pair.ours(&words).ok();
    let log = done.all();
    for says in ["[pair0 internal]", "[pair1 internal]", "merging manifest list"] {
        assert!(log.contains(says), "the log does not say {says:?}:\n{log}");
    }
    let (digest, index) = pair.index("pair", "ours");
    let found = entries(&index);
    let platforms: Vec<&str> = found.iter().map(|(platform, _)| platform.as_str()).collect();
    assert_eq!(platforms, [Platform::host().to_string().as_str(), pair.other]);
    assert_eq!(index["annotations"]["org.example.note"], "kept");
    let metadata: Value = serde_json::from_slice(&std::fs::read(metadata).unwrap()).unwrap();
    assert_eq!(metadata["containerimage.digest"], digest);
    assert_eq!(metadata["containerimage.descriptor"]["digest"], digest);
    assert_eq!(metadata["image.name"], named);
    let id = metadata["buildx.build.ref"].as_str().unwrap();
    assert!(id.starts_with("pair/pair0/"), "{id}");
    // Each has its part, and neither has the other's.
    assert_eq!((Pair::count(&pair.first), Pair::count(&pair.second)), (1, 1));
    // The same as buildx makes of the same builder.
    let named = tag("theirs");
    let line = build(&named);
    let words: Vec<&str> = line.iter().map(String::as_str).collect();
    match pair.theirs(&words) {
        Some(done) => {
            done.ok();
            let (theirs, index) = pair.index("pair", "theirs");
            assert_eq!(entries(&index), found);
            assert_eq!(theirs, digest);
        }
        None => eprintln!("docker-buildx is absent"),
    }
    // What one node builds is no matter of the other's.
    let before = (Pair::count(&pair.first), Pair::count(&pair.second));
    let out = pair.first.dir().join("out").display().to_string();
    pair.ours(&["build", "--platform", pair.other, "--output", &out, &context]).ok();
    assert_eq!(std::fs::read_to_string(format!("{out}/platform")).unwrap().trim(), pair.other);
    assert_eq!((Pair::count(&pair.first), Pair::count(&pair.second)), (before.0, before.1 + 1));
}

#[test]
fn a_context_on_standard_input_reaches_every_node() {
    let pair = Pair::new();
    let files = [("Dockerfile", DOCKERFILE), ("file", "a file\n")];
    let context = pair.first.context("stdin", &files);
    let tar = run(Command::new("tar").args(["-cf", "../stdin.tar", "."]).current_dir(&context));
    tar.ok();
    let tar = std::fs::File::open(context.with_file_name("stdin.tar")).unwrap();
    let out = pair.first.dir().join("out");
    let mut command = pair.command(built("shipway"));
    command.args(["build", "--platform", &pair.both(), "--output"]).arg(&out).arg("-");
    let done = command.stdin(Stdio::from(tar)).output().unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    for platform in [Platform::host().to_string(), pair.other.to_owned()] {
        let dir = out.join(platform.replace('/', "_"));
        let said = std::fs::read_to_string(dir.join("platform")).unwrap();
        assert_eq!(said.trim(), platform);
        assert_eq!(std::fs::read_to_string(dir.join("file")).unwrap(), "a file\n");
    }
}

#[test]
fn a_node_that_fails_ends_the_others() {
    let pair = Pair::new();
    let host = Platform::host().architecture;
    let other = pair.other.trim_start_matches("linux/");
    let text = format!(
        "FROM busybox AS {host}\nRUN sleep 600\nFROM scratch AS {other}\nCOPY missing /\n\
         FROM $TARGETARCH\n"
    );
    let context = pair.first.context("failing", &[("Dockerfile", &text)]).display().to_string();
    let both = pair.both();
    let words = ["build", "--progress", "plain", "--platform", &both, "-o", "type=cacheonly"];
    let words: Vec<&str> = words.into_iter().chain([context.as_str()]).collect();
    // Were the first not ended, this would take ten minutes.
    let log = pair.ours(&words).failed().all();
    assert!(log.contains("node pair1: "), "{log}");
    assert!(log.contains(">>> COPY missing /"), "{log}");
    let tar = ["build", "--platform", &both, "-o", "type=oci,dest=x.tar", &context];
    let refused = pair.ours(&tar).failed().all();
    assert!(refused.contains("oci for multi-node builds currently not supported"), "{refused}");
}

#[test]
fn linked_targets_of_several_nodes_are_built_where_they_are_used() {
    let pair = Pair::new();
    let definition = format!(
        "target \"base\" {{ context = \"src\" }}\n\
         target \"app\" {{\n  context = \"src\"\n  contexts = {{ base = \"target:base\" }}\n\
         \x20 dockerfile-inline = \"FROM base\\nCOPY b /\\n\"\n  platforms = [{}]\n\
         \x20 tags = [\"{}/app:1\"]\n  output = [\"type=registry\"]\n}}\n\
         target \"split\" {{\n  inherits = [\"base\"]\n  platforms = [\"{}\"]\n}}\n\
         target \"wrong\" {{\n  inherits = [\"app\"]\n  contexts = {{ base = \"target:split\" }}\n}}\n",
        pair.both().split(',').map(|p| format!("\"{p}\"")).collect::<Vec<_>>().join(", "),
        pair.first.registry(),
        pair.other,
    );
    let files = [
        ("docker-bake.hcl", definition.as_str()),
        (
            "src/Dockerfile",
            "FROM scratch\nARG TARGETPLATFORM\nCOPY a /\nENV BUILT_FOR=$TARGETPLATFORM\n",
        ),
        ("src/a", "a"),
        ("src/b", "b"),
    ];
    let dir = pair.first.context("bake", &files);
    let bake = |targets: &[&str]| {
        let mut command = pair.command(built("shipway"));
        command.args(["bake", "--progress=plain", "--metadata-file=meta.json"]);
        run(command.args(targets).current_dir(&dir))
    };
    bake(&["app"]).ok();
    let (digest, index) = pair.index("app", "1");
    let found = entries(&index);
    assert_eq!(found.len(), 2, "{index}");
    assert_eq!(found[1].0, pair.other);
    let metadata: Value =
        serde_json::from_slice(&std::fs::read(dir.join("meta.json")).unwrap()).unwrap();
    assert_eq!(metadata["app"]["containerimage.digest"], digest);
    let refused = bake(&["wrong"]).failed().all();
    assert!(refused.contains("targets build with different drivers"), "{refused}");
}
