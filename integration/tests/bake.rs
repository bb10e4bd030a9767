//! Targets of bake definitions, built by our client on a real daemon (rows `bx.bake.*`), and
//! builders that buildx sees, too (rows `bx.create` and others).

#![allow(clippy::unwrap_used)]

use std::process::Output;

use serde_json::Value;
use shipway_integration::{any, git_daemon};
use shipway_testkit::Lab;

const DEFINITION: &str = r#"
variable "WORD" { default = "plain" }

group "default" { targets = ["app", "twin"] }

target "base" {
  context = "src"
  target  = "base"
  args    = { WORD = WORD }
}

target "app" {
  context    = "src"
  dockerfile = "app.Dockerfile"
  contexts   = { base = "target:base" }
  output     = ["out/app"]
}

target "twin" {
  inherits          = ["app"]
  dockerfile-inline = <<EOT
FROM base
COPY b /twin
EOT
  output            = ["out/twin"]
}

target "broken" {
  context           = "src"
  dockerfile-inline = "FROM scratch\nCOPY missing /\n"
}
"#;

struct Scene {
    lab: Lab,
    dir: std::path::PathBuf,
}

impl Scene {
    fn new() -> Self {
        let lab = Lab::complete(any());
        let files = [
            ("docker-bake.hcl", DEFINITION),
            (
                "src/Dockerfile",
                "FROM scratch AS base\nARG WORD\nCOPY a /\nCOPY <<EOF /word\n$WORD\nEOF\nENV FROM_BASE=yes\n",
            ),
            ("src/app.Dockerfile", "FROM base\nCOPY b /\nCOPY <<EOF /env\n$FROM_BASE\nEOF\n"),
            ("src/a", "a"),
            ("src/b", "b"),
        ];
        let dir = lab.context("bake", &files);
        Self { lab, dir }
    }

    /// Runs `shipway bake` with `arguments` where the definition is.
    fn bake(&self, arguments: &[&str]) -> Output {
        let mut command = self.lab.shipway_command();
        command.args(["bake", "--progress", "plain"]).args(arguments).current_dir(&self.dir);
        command.env("WORD", "spoken").output().unwrap()
    }

    fn read(&self, path: &str) -> String {
        std::fs::read_to_string(self.dir.join(path)).unwrap().trim().to_owned()
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn targets_go_on_from_one_another_and_share_a_context() {
    let scene = Scene::new();
    let done = scene.bake(&["--metadata-file", "meta.json", "--set", "*.args.UNUSED=1"]);
    assert!(done.status.success(), "{}", text(&done.stderr));
    for (path, want) in [
        ("out/app/a", "a"),
        ("out/app/b", "b"),
        ("out/app/word", "spoken"),
        // What the linked target set is known where others go on from it.
        ("out/app/env", "yes"),
        ("out/twin/twin", "b"),
        ("out/twin/word", "spoken"),
    ] {
        assert_eq!(scene.read(path), want, "{path}");
    }
    let metadata: Value = serde_json::from_str(&scene.read("meta.json")).unwrap();
    let targets: Vec<&String> = metadata.as_object().unwrap().keys().collect();
    assert_eq!(targets, ["app", "twin"]);
    // Steps are called by their targets, and the linked one is built once.
    let log = text(&done.stderr);
    let started =
        |step: &str| log.lines().filter(|l| l.starts_with('#') && l.ends_with(step)).count();
    assert_eq!(started("[base 1/2] COPY a /"), 1, "{log}");
}

#[test]
fn a_target_that_fails_is_named_with_its_lines() {
    let scene = Scene::new();
    let done = scene.bake(&["broken"]);
    assert!(!done.status.success());
    let log = text(&done.stderr);
    assert!(log.contains("target broken: "), "{log}");
    assert!(log.contains(">>> COPY missing /"), "{log}");
}

#[test]
fn what_was_not_granted_is_refused_before_anything_is_built() {
    let scene = Scene::new();
    let out = scene.lab.context("elsewhere", &[]);
    let output = format!("app.output={}", out.display());
    std::fs::write(
        scene.dir.join("greedy.hcl"),
        format!(
            "target \"app\" {{\n context = \"src\"\n network = \"host\"\n output = [\"{}\"]\n}}\n",
            out.display()
        ),
    )
    .unwrap();
    let done = scene.bake(&["-f", "greedy.hcl", "app"]);
    let log = text(&done.stderr);
    assert!(!done.status.success());
    assert!(log.contains("additional privileges requested"), "{log}");
    assert!(log.contains("--allow network.host --allow fs.write="), "{log}");
    // Who sets an output on the command line means it.
    let printed = scene.bake(&["--print", "--set", &output, "app"]);
    assert!(printed.status.success(), "{}", text(&printed.stderr));
    let plan: Value = serde_json::from_slice(&printed.stdout).unwrap();
    assert_eq!(plan["target"]["app"]["output"][0]["dest"], out.to_str().unwrap());
}

#[test]
fn targets_and_mistakes_are_listed() {
    let scene = Scene::new();
    let listed = scene.bake(&["--list", "type=variables,format=json"]);
    let variables: Value = serde_json::from_slice(&listed.stdout).unwrap();
    assert_eq!(variables[0]["name"], "WORD");
    assert_eq!(variables[0]["value"], "spoken");
    let listed = text(&scene.bake(&["--list", "targets"]).stdout);
    assert!(
        listed.lines().any(|l| l.split_whitespace().eq(["default", "app,", "twin"])),
        "{listed}"
    );
    let checked = scene.bake(&["--check", "base"]);
    assert!(checked.status.success(), "{}", text(&checked.stderr));
    assert!(text(&checked.stdout).starts_with("base\n"), "{}", text(&checked.stdout));
}

#[test]
fn both_programs_see_the_same_builders() {
    let lab = Lab::complete(any());
    let state = lab.context("buildx", &[]);
    let endpoint = lab.daemon_address();
    let ours = |arguments: &[&str]| {
        let mut command = std::process::Command::new(lab.shipway_command().get_program());
        command.args(arguments).env_clear().env("BUILDX_CONFIG", &state).output().unwrap()
    };
    let created = ours(&["create", "--name", "one", "--use", "--bootstrap", &endpoint]);
    assert!(created.status.success(), "{}", text(&created.stderr));
    assert_eq!(text(&created.stdout), "one\n");
    // The builder that is used is the one that commands talk to.
    let shown = ours(&["info"]);
    assert!(shown.status.success(), "{}", text(&shown.stderr));
    let listed = text(&ours(&["ls"]).stdout);
    assert!(listed.lines().any(|l| l.starts_with("one*") && l.contains("remote")), "{listed}");
    assert!(listed.contains("running"), "{listed}");
    let Some(buildx) = lab.buildx() else { return eprintln!("docker-buildx is absent") };
    let program = buildx.get_program().to_owned();
    let theirs = |arguments: &[&str]| {
        let mut command = std::process::Command::new(&program);
        let done = command.args(arguments).env("BUILDX_CONFIG", &state).output().unwrap();
        assert!(done.status.success(), "{arguments:?}: {}", text(&done.stderr));
        text(&done.stdout)
    };
    assert!(theirs(&["ls"]).lines().any(|l| l.starts_with("one*")));
    theirs(&["create", "--name", "two", "--driver", "remote", "--use", &endpoint]);
    let shown = text(&ours(&["inspect"]).stdout);
    assert!(shown.lines().any(|l| l.split_whitespace().eq(["Name:", "two"])), "{shown}");
    let removed = ours(&["rm", "two", "one"]);
    assert!(removed.status.success(), "{}", text(&removed.stderr));
    assert!(!theirs(&["ls"]).contains("two"));
}

/// A definition in a repository: its contexts are there, wherever bake is run, and both programs
/// make the same plan of it.
#[test]
fn a_definition_from_elsewhere_has_its_contexts_there() {
    let lab = Lab::complete(any());
    let definition = r#"
group "default" { targets = ["top", "sub"] }
target "top" { output = ["out/top"] }
target "sub" {
  context  = "sub"
  contexts = { other = "other" }
  output   = ["out/sub"]
}
target "here" {
  context           = BAKE_CMD_CONTEXT
  dockerfile-inline = "FROM scratch\nCOPY local /\n"
  output            = ["out/here"]
}
target "greedy" {
  inherits = ["top"]
  secret   = ["id=x,src=/etc/hostname"]
}
"#;
    let files = [
        ("repo/docker-bake.hcl", definition),
        ("repo/Dockerfile", "FROM scratch\nCOPY top /\n"),
        ("repo/top", "of the top"),
        ("repo/sub/Dockerfile", "FROM scratch\nCOPY file /\nCOPY --from=other o /\n"),
        ("repo/sub/file", "below"),
        ("repo/other/o", "beside"),
        ("work/local", "of this machine"),
    ];
    let base = lab.context("elsewhere", &files);
    let git = "git init -q -b main . && git config user.email a@b && git config user.name n && \
               git add . && git commit -qm 1";
    let mut command = std::process::Command::new("sh");
    let made = command.args(["-c", git]).current_dir(base.join("repo")).output().unwrap();
    assert!(made.status.success(), "{}", text(&made.stderr));
    let (_daemon, port) = git_daemon(&base);
    let url = format!("git://127.0.0.1:{port}/repo#main");
    let work = base.join("work");
    let bake = |arguments: &[&str]| {
        let mut command = lab.shipway_command();
        command.args(["bake", "--progress", "plain", &url]).args(arguments);
        command.current_dir(&work).output().unwrap()
    };
    let made = bake(&["default", "here"]);
    assert!(made.status.success(), "{}", text(&made.stderr));
    for (path, want) in [
        ("out/top/top", "of the top"),
        ("out/sub/file", "below"),
        ("out/sub/o", "beside"),
        ("out/here/local", "of this machine"),
    ] {
        assert_eq!(std::fs::read_to_string(work.join(path)).unwrap(), want, "{path}");
    }
    let greedy = text(&bake(&["greedy"]).stderr);
    assert!(greedy.contains("--allow fs.read=/etc/hostname"), "{greedy}");
    let plan: Value = serde_json::from_slice(&bake(&["--print", "here", "sub"]).stdout).unwrap();
    assert_eq!(plan["target"]["sub"]["context"], format!("git://127.0.0.1:{port}/repo#main:sub"));
    let Some(mut buildx) = lab.buildx() else { return eprintln!("docker-buildx is absent") };
    let theirs = buildx.args(["bake", "--print", &url, "here", "sub"]).current_dir(&work);
    let theirs = theirs.output().unwrap();
    assert!(theirs.status.success(), "{}", text(&theirs.stderr));
    let mut theirs: Value = serde_json::from_slice(&theirs.stdout).unwrap();
    // Older versions print the directory without its repository.
    let context = theirs["target"]["sub"]["context"].take();
    let ours = plan["target"]["sub"]["context"].clone();
    assert!(context == "sub" || context == ours, "{context}");
    theirs["target"]["sub"]["context"] = ours;
    assert_eq!(plan, theirs);
}
