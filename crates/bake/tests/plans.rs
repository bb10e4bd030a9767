//! Plans of definitions, and what is refused. The expected plans in `cases` are what
//! `docker buildx bake --print` 0.29 prints of the same files.

#![allow(clippy::unwrap_used)]

use std::{collections::BTreeMap, io, path::Path, time::SystemTime};

use shipway_bake::{File, Granted, Host, Options, Parsed, Plan};
use shipway_fault::Result;

/// Variables and files that are told.
#[derive(Default)]
struct Told {
    env: BTreeMap<&'static str, &'static str>,
    files: BTreeMap<&'static str, &'static str>,
}

impl Host for Told {
    fn env(&self, name: &str) -> Option<String> {
        self.env.get(name).map(|v| (*v).to_owned())
    }

    fn read(&self, path: &str) -> io::Result<Option<Vec<u8>>> {
        Ok(self.files.get(path).map(|text| text.as_bytes().to_vec()))
    }

    fn home(&self) -> Option<String> {
        Some("/home/me".into())
    }

    fn now(&self) -> SystemTime {
        SystemTime::UNIX_EPOCH
    }

    fn random(&self, bytes: &mut [u8]) -> Result<()> {
        bytes.fill(1);
        Ok(())
    }
}

fn options() -> Options {
    let mut options = Options::default();
    options.builtins.insert("BAKE_CMD_CONTEXT".into(), "cwd://".into());
    options.builtins.insert("BAKE_LOCAL_PLATFORM".into(), "linux/amd64".into());
    options
}

fn file(name: &str, text: &str) -> File {
    File { name: name.to_owned(), data: text.as_bytes().to_vec() }
}

fn parse(files: &[File], host: &Told) -> Result<Parsed> {
    shipway_bake::parse(files, host, &options())
}

fn plan(files: &[File], host: &Told, targets: &[&str], sets: &[&str]) -> Result<Plan> {
    let texts = |list: &[&str]| list.iter().map(|t| (*t).to_owned()).collect::<Vec<_>>();
    let config = parse(files, host)?.config;
    config.plan(host, &texts(targets), &texts(sets), &mut Granted::default())
}

fn shown(plan: &Plan) -> String {
    shipway_oci::gojson::to_string_pretty(plan).unwrap() + "\n"
}

/// The plan of the default targets of files in `cases`.
#[track_caller]
fn check_case(names: &[&str], expected: &str) {
    let cases = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cases");
    let read = |name: &str| std::fs::read_to_string(cases.join(name)).unwrap();
    let files: Vec<File> = names.iter().map(|n| file(n, &read(n))).collect();
    let plan = plan(&files, &Told::default(), &["default"], &[]).unwrap();
    // The context is made clean only once it is known what it is.
    let clean = |text: String| text.replace("\"./app/\"", "\"app\"");
    assert_eq!(clean(shown(&plan)), read(expected));
}

#[test]
fn targets_inherit_from_left_to_right() {
    check_case(&["inherit.hcl"], "inherit.expected.json");
}

#[test]
fn a_matrix_makes_targets_and_their_group() {
    check_case(&["matrix.hcl"], "matrix.expected.json");
    let cases = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cases");
    let text = std::fs::read_to_string(cases.join("matrix.hcl")).unwrap();
    let config = parse(&[file("matrix.hcl", &text)], &Told::default()).unwrap().config;
    let group = config.groups.iter().find(|g| g.name == "app").unwrap();
    let all = ["app-alpine-1_0", "app-debian-1_0", "app-alpine-2_0", "app-debian-2_0"];
    assert_eq!(group.targets, all);
}

#[test]
fn expressions_have_the_values_of_others() {
    check_case(&["values.hcl"], "values.expected.json");
}

#[test]
fn json_is_another_form_of_the_same() {
    check_case(&["form.json"], "form.expected.json");
}

#[test]
fn services_of_compose_files_are_targets() {
    check_case(&["services.yaml"], "services.expected.json");
}

#[test]
fn later_files_are_merged_over_earlier_ones() {
    check_case(&["first.hcl", "second.hcl"], "merged.expected.json");
}

/// The attributes `args` of the target `a`.
fn args(text: &str, env: &[(&'static str, &'static str)], sets: &[&str]) -> String {
    let host = Told { env: env.iter().copied().collect(), ..Told::default() };
    match plan(&[file("docker-bake.hcl", text)], &host, &["a"], sets) {
        Ok(plan) => {
            let args = plan.targets["a"].args.iter();
            let shown: Vec<String> =
                args.map(|(k, v)| format!("{k}={}", v.as_deref().unwrap_or("null"))).collect();
            shown.join(" ")
        }
        Err(fault) => format!("error {fault}"),
    }
}

#[test]
fn the_environment_sets_variables_of_their_type() {
    let text = r#"
variable "S" { default = "s" }
variable "N" { default = 1 }
variable "B" { default = false }
variable "L" {
  type = list(number)
  default = []
}
variable "M" {
  type = map(string)
  default = {}
}
target "a" { args = { S = S, N = N + 1, B = !B, L = jsonencode(L), M = jsonencode(M) } }
"#;
    assert_eq!(args(text, &[], &[]), "B=true L=[] M={} N=2 S=s");
    let env = [("S", "x"), ("N", "2"), ("B", "true"), ("L", "1,2"), ("M", "a:b,c:d")];
    assert_eq!(args(text, &env, &[]), r#"B=false L=[1,2] M={"a":"b","c":"d"} N=3 S=x"#);
    assert_eq!(args(text, &[("L_JSON", "[3]")], &[]), "B=true L=[3] M={} N=2 S=s");
    assert!(args(text, &[("N", "x")], &[]).contains("failed to parse N as number"));
    assert!(args(text, &[("L", "a")], &[]).contains("failed to convert variable L from CSV"));
}

#[test]
fn overrides_reach_targets_by_patterns() {
    let text = "target \"a\" { args = { X = \"1\" } }\ntarget \"ab\" {}\n";
    assert_eq!(args(text, &[], &["a*.args.Y=2", "a.args.X="]), "X= Y=2");
    assert_eq!(args(text, &[("Z", "z")], &["*.args.Z", "*.args.NO"]), "X=1 Z=z");
    for (set, why) in [
        ("a", "invalid override key a, expected target.name"),
        ("a.tags", "invalid override a.tags, expected target.name=value"),
        ("b.tags=x", "could not find any target matching 'b'"),
        ("a.args=x", "invalid key a.args, args requires name"),
        ("a.tgas=x", "--set for target a: unknown key: tgas"),
        ("a.pull=perhaps", "--set for target a: invalid value perhaps for boolean key pull"),
    ] {
        assert_eq!(args(text, &[], &[set]), format!("error {why}"));
    }
    let host = Told::default();
    let text = "target \"a\" {\n tags = [\"x\"]\n output = [\"type=docker\"]\n}\n";
    let files = [file("x.hcl", text)];
    let sets = ["*.tags+=y", "*.platform=linux/arm64", "*.push=true", "*.network=none"];
    let target = &plan(&files, &host, &["a"], &sets).unwrap().targets["a"];
    assert_eq!(target.tags, Some(vec!["x".to_owned(), "y".to_owned()]));
    assert_eq!(target.platforms, Some(vec!["linux/arm64".to_owned()]));
    let outputs: Vec<String> = target.outputs.iter().flatten().map(|o| o.to_string()).collect();
    assert_eq!(outputs, ["type=docker", "type=image,push=true"]);
    assert_eq!(target.network.as_deref(), Some("none"));
}

/// What is wrong with a definition in HCL.
fn refused(text: &str) -> String {
    match plan(&[file("x.hcl", text)], &Told::default(), &["a"], &[]) {
        Ok(plan) => shown(&plan),
        Err(fault) => fault.to_string(),
    }
}

#[track_caller]
fn check_refused(text: &str, why: &str) {
    assert_eq!(refused(text), why, "{text}");
}

#[test]
fn mistakes_are_told_with_their_place() {
    let mut wrong = Vec::new();
    for (text, why) in [
        (
            "target \"a\" {\n args = { A = x }\n}\n",
            "x.hcl:2,15-16: Unknown variable; There is no variable named \"x\".",
        ),
        (
            "target \"a\" {\n args = [1]\n}\n",
            "x.hcl:2,9-12: Unsuitable value type; Unsuitable value: map of string required",
        ),
        (
            "target \"a\" {\n args = { A = \"x${null}\" }\n}\n",
            "x.hcl:2,19-23: Invalid template interpolation value; The expression result is null. Cannot include a null value in a string template.",
        ),
        ("target \"a\" {\n inherits = [\"b\"]\n}\n", "failed to find target b"),
        ("target \"a\" {\n contexts = { x = \"target:a\" }\n}\n", "target a cannot link to itself"),
        (
            "target \"a\" {\n contexts = { x = \"target:b\" }\n}\ntarget \"b\" {\n contexts = { x = \"target:a\" }\n}\n",
            "infinite loop from b to a",
        ),
        (
            "target \"a\" {\n args = { A = target.a.args.A }\n}\n",
            "x.hcl:2,9-32: reference cycle not allowed for target.a.args",
        ),
        (
            "variable \"A\" { default = B }\nvariable \"B\" { default = A }\ntarget \"a\" {}\n",
            "x.hcl:2,26-27: variable cycle not allowed for A",
        ),
        (
            "function \"f\" {\n params = []\n result = f()\n}\ntarget \"a\" {}\n",
            "x.hcl:3,11-14: function cycle not allowed for f",
        ),
        ("target \"a\" {\n name = \"x\"\n}\n", "x.hcl:1,1-11: name requires matrix"),
        (
            "target \"a.b\" {}\n",
            "x.hcl:1,1-13: Invalid name; \"a.b\": only \"[a-zA-Z0-9_-]+\" are allowed",
        ),
        (
            "target \"a\" {\n matrix = { x = [1, 1] }\n name = \"t${x}\"\n}\n",
            "x.hcl:1,1-11: Invalid name; duplicate name \"t1\"",
        ),
        (
            "group \"a\" {}\n",
            "x.hcl:1,1-10: Missing required argument; The argument \"targets\" is required, but no definition was found.",
        ),
        (
            "variable \"V\" {\n default = 1\n validation {\n  condition = V > 1\n  error_message = \"too small: ${V}\"\n }\n}\ntarget \"a\" {}\n",
            "x.hcl:4,15-20: Validation failed; too small: 1",
        ),
        (
            "target \"a\" {\n output = [\"type=\"]\n}\n",
            "x.hcl:2,11-20: Unsuitable value type; Unsuitable value: type is required for output",
        ),
        (
            "target \"a\" {\n context = true ? [1] : {}\n}\n",
            "x.hcl:2,12-27: Inconsistent conditional result types; The true and false result expressions must have consistent types. The 'true' value is tuple, but the 'false' value is object.",
        ),
    ] {
        let found = refused(text);
        if found != why {
            wrong.push(format!("{text}  is {found}\n  not {why}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(refused("target \"a\" {\n").contains("Invalid HCL; "));
}

#[test]
fn what_would_take_too_much_is_refused() {
    let nested = format!("target \"a\" {{\n args = {}{}\n}}\n", "[".repeat(99), "]".repeat(99));
    check_refused(
        &nested,
        "x.hcl:1,1-2: Invalid HCL; expressions are nested more than 64 levels deep",
    );
    // As deep as may be is no trouble.
    let deep =
        format!("target \"a\" {{\n call = length({}{})\n}}\n", "[".repeat(60), "]".repeat(60));
    assert!(plan(&[file("x.hcl", &deep)], &Told::default(), &["a"], &[]).is_ok());
    let mut chain = String::from("target \"a\" {}\nvariable \"v0\" { default = \"x\" }\n");
    for n in 1..400 {
        chain = format!("variable \"v{n}\" {{ default = v{} }}\n{chain}", n - 1);
    }
    let fault = plan(&[file("x.hcl", &chain)], &Told::default(), &["a"], &[]).unwrap_err();
    assert!(fault.to_string().contains("nested more than 160 levels deep"), "{fault}");
    let mut bomb = String::from("target \"a\" {}\nv0 = \"xxxxxxxxxxxxxxxxxxxx\"\n");
    for n in 1..40 {
        bomb.push_str(&format!("v{n} = \"${{v{0}}}${{v{0}}}${{v{0}}}\"\n", n - 1));
    }
    let fault = plan(&[file("x.hcl", &bomb)], &Told::default(), &["a"], &[]).unwrap_err();
    assert!(fault.to_string().contains("makes values that are too large"), "{fault}");
    let mut tower = String::from("target \"a\" {}\nw000 = []\n");
    for n in 1..300 {
        tower.push_str(&format!("w{n:03} = [w{:03}]\n", n - 1));
    }
    let fault = plan(&[file("x.hcl", &tower)], &Told::default(), &["a"], &[]).unwrap_err();
    assert!(fault.to_string().contains("nested more than 128 levels deep"), "{fault}");
    let slow = "target \"a\" {}\nx = [for a in range(1000) : [for b in range(1000) : [for c in range(1000) : 1]]]\n";
    let fault = plan(&[file("x.hcl", slow)], &Told::default(), &["a"], &[]).unwrap_err();
    assert!(fault.to_string().contains("too l"), "{fault}");
    let matrix = "target \"a\" {\n matrix = { x = range(1000), y = range(1000) }\n name = \"t${x}-${y}\"\n}\n";
    check_refused(matrix, "x.hcl:2,11-47: the matrix makes more than 10000 targets");
    let huge = File { name: "x.hcl".into(), data: vec![b' '; shipway_bake::MAX_FILE + 1] };
    assert!(plan(&[huge], &Told::default(), &["a"], &[]).is_err());
}

/// The targets that a Compose file makes, or what is wrong with it.
fn compose(text: &str, host: &Told) -> String {
    match plan(&[file("compose.yaml", text)], host, &["default"], &[]) {
        Ok(plan) => shown(&plan),
        Err(fault) => fault.to_string(),
    }
}

#[test]
fn compose_files_lead_to_others() {
    let files = BTreeMap::from([
        (".env", "TAG=7\n"),
        (
            "base/common.yaml",
            "services:\n  common:\n    build:\n      context: .\n      args: {A: '1', T: \"${TAG}\"}\n",
        ),
        ("more/compose.yaml", "services:\n  extra:\n    image: extra:${LOCAL}\n    build: src\n"),
        ("more/.env", "LOCAL=here\n"),
        ("web.env", "FROM_FILE=f\n"),
    ]);
    let host = Told { files, ..Told::default() };
    let text = "include: [more/compose.yaml]\nservices:\n  web:\n    extends: {file: base/common.yaml, service: common}\n    env_file: web.env\n    build:\n      args: {A: '2', FROM_FILE: }\n";
    let plan = plan(&[file("compose.yaml", text)], &host, &["default"], &[]).unwrap();
    let web = &plan.targets["web"];
    assert_eq!(web.context.as_deref(), Some("base"));
    let args: Vec<(&str, Option<&str>)> =
        web.args.iter().map(|(k, v)| (k.as_str(), v.as_deref())).collect();
    assert_eq!(args, [("A", Some("2")), ("FROM_FILE", Some("f")), ("T", Some("7"))]);
    let extra = &plan.targets["extra"];
    assert_eq!(extra.context.as_deref(), Some("more/src"));
    assert_eq!(extra.tags, Some(vec!["extra:here".to_owned()]));
}

#[test]
fn compose_files_are_checked_as_far_as_they_build() {
    let host = Told::default();
    for (text, why) in [
        (
            "services:\n  a:\n    build: {contxt: .}\n",
            "services.a.build additional properties 'contxt' not allowed",
        ),
        ("services:\n  a:\n    build: [1]\n", "services.a.build: invalid type array for build"),
        (
            "services:\n  a:\n    build: {args: {A: [1]}}\n",
            "services.a.build.args.A must be a boolean, null, number or string",
        ),
        (
            "services:\n  a: {}\n",
            "service \"a\" has neither an image nor a build context specified: invalid compose project",
        ),
        ("foo: {}\n", "empty compose file"),
        (
            "services:\n  a:\n    image: ${A:?gone}\n",
            "error while interpolating services.a.image: required variable A is missing a value: gone",
        ),
        (
            "services:\n  a:\n    build: {secrets: [x]}\n",
            "service \"a\" refers to undefined build secret x: invalid compose project",
        ),
        (
            "services:\n  a:\n    scale: many\n    image: x\n",
            "error while interpolating services.a.scale: failed to cast to expected type: \"many\"",
        ),
        (
            "services:\n  a: {extends: a, image: x}\n",
            "circular reference with extends: service \"a\" extends \"a\"",
        ),
    ] {
        assert_eq!(compose(text, &host), format!("failed to parse compose file: {why}"), "{text}");
    }
}

#[test]
fn variables_are_listed_with_type_and_value() {
    let text = "variable \"A\" {\n default = \"x\"\n description = \"An A\"\n}\nvariable \"B\" {\n type = list(string)\n}\nvariable \"C\" { default = { a = 1 } }\n";
    let parsed = parse(&[file("x.hcl", text)], &Told::default()).unwrap();
    let shown = serde_json::to_string(&parsed.variables).unwrap();
    assert_eq!(
        shown,
        r#"[{"name":"A","description":"An A","value":"x"},{"name":"B","type":"list of string"},{"name":"C","value":"{\"a\":1}"}]"#
    );
}

#[test]
fn global_attributes_see_what_blocks_set() {
    let text = "target \"a\" {\n  context = \"x\"\n}\nc = target.a.context\nd = \"${c}-${target.a.name}\"\n";
    let parsed = parse(&[file("x.hcl", text)], &Told::default()).unwrap();
    assert_eq!(parsed.config.targets[0].context.as_deref(), Some("x"));
    // Also where a block asks for the attribute, and before it was evaluated for itself.
    let text = format!("target \"b\" {{\n  context = d\n}}\n{text}");
    let parsed = parse(&[file("x.hcl", &text)], &Told::default()).unwrap();
    assert_eq!(parsed.config.targets[0].context.as_deref(), Some("x-a"));
}

#[test]
fn blocks_see_of_others_what_these_set_and_what_is_not_set() {
    let text = r#"
target "a" {
  args = { N = 1 }
  output = ["type=docker,dest=x"]
}
target "b" {
  description = target.a.description == "" ? "none" : "some"
  args = { N = target.a.args.N, T = target.a.target == null ? "null" : "set", O = target.a.output[0].dest }
  tags = [target.a.name, length(keys(target.a))]
}
"#;
    let config = parse(&[file("x.hcl", text)], &Told::default()).unwrap().config;
    let b = &config.targets[1];
    assert_eq!(b.description, "none");
    let args: Vec<&str> = b.args.values().map(|v| v.as_deref().unwrap()).collect();
    assert_eq!(args, ["1", "x", "null"]);
    // All attributes of a target, and its name.
    assert_eq!(b.tags.as_ref().unwrap(), &["a", "29"]);
}
