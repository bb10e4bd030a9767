//! Rules of the house that no lint has: what is read here is the text of the sources.

#![allow(clippy::unwrap_used)]

use shipway_testkit::workspace;
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

/// Crates that speak a wire, and may use what protobuf generates for it.
const WIRES: [&str; 10] = [
    "client",
    "containerd",
    "filesync",
    "gateway",
    "grpc",
    "llb",
    "session",
    "shipway-snapshotter",
    "shipwayd",
    "telemetry",
];
/// The crates of protobuf and gRPC.
const PROTOBUF: [&str; 6] =
    ["shipway-proto", "prost", "prost-reflect", "prost-types", "tonic", "tonic-prost"];
/// The modules of `llb` that turn protobuf into its own types and back; the others know no
/// protobuf.
const CONVERSIONS: [&str; 8] =
    ["canonical", "decode", "definition", "encode", "facts", "graph", "json", "policy"];

/// Circles of top-level modules that are left, by crate. Most are a type and what is built of it in
/// two files, or a port and the table of what implements it. A new one is refused, and one that is
/// no more leaves this list.
const CIRCLES: &[(&str, &[&str])] = &[
    ("shipway-snapshotter", &["config", "lazy", "metrics", "status"]),
    ("gateway", &["build", "containers", "convert", "processes", "service"]),
    ("layerstore", &["about", "disk", "error", "index"]),
    ("layerstore", &["fetch", "layer"]),
    (
        "ops",
        &["build", "devices", "exec", "export_plan", "failed_state", "job", "op", "step_options"],
    ),
];

/// Files whose helpers print why a test ends early.
const HELPERS_THAT_PRINT: [&str; 1] = ["integration/tests/buildx.rs"];

/// Sources below `of`, by their paths from the workspace's root.
#[track_caller]
fn sources(of: &str) -> BTreeMap<String, String> {
    let (root, mut all) = (workspace(), BTreeMap::new());
    let mut queue = vec![root.join(of)];
    while let Some(path) = queue.pop() {
        if path.is_dir() {
            queue.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        } else if path.extension().is_some_and(|kind| kind == "rs") {
            let name = path.strip_prefix(&root).unwrap().to_str().unwrap().to_owned();
            all.insert(name, fs::read_to_string(&path).unwrap());
        }
    }
    all
}

/// Names of the crates, without `shipway-`.
#[track_caller]
fn crates() -> Vec<String> {
    let crates = fs::read_dir(workspace().join("crates")).unwrap().map(Result::unwrap);
    let crates = crates.filter(|entry| entry.path().join("Cargo.toml").exists());
    let mut names: Vec<String> =
        crates.map(|entry| entry.file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// The text without comments, and without the tests at its end.
fn code(text: &str) -> String {
    let mut code = String::new();
    for line in text.lines() {
        if line == "mod tests {" {
            break;
        }
        let line = line.split_once("//").map_or(line, |(code, _)| code);
        code += line;
        code.push('\n');
    }
    code
}

type Module = Vec<String>;

/// A path through modules, as `use` has it or an expression: its words, without `{`, `*` and `as`.
fn paths(code: &str) -> Vec<Vec<String>> {
    let mut found = Vec::new();
    for keyword in ["crate::", "super::", "self::"] {
        for (at, _) in code.match_indices(keyword) {
            let before = code[..at].chars().next_back();
            if before.is_none_or(|c| !c.is_alphanumeric() && !"_:$".contains(c)) {
                tree(&mut Vec::new(), &code[at..], &mut found);
            }
        }
    }
    found
}

/// Reads a tree of paths; gives how much of `text` it takes.
fn tree(above: &mut Vec<String>, text: &str, found: &mut Vec<Vec<String>>) -> usize {
    let (depth, mut at) = (above.len(), 0);
    loop {
        let rest = &text[at..];
        let word = rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len());
        if word > 0 {
            above.push(rest[..word].to_owned());
            at += word;
            match text[at..].strip_prefix("::") {
                Some(_) => at += 2,
                None => break found.push(above.clone()),
            }
        } else if rest.starts_with('{') {
            at += 1;
            loop {
                let next = &text[at..];
                at += next.len() - next.trim_start_matches([' ', '\n', ',']).len();
                match text[at..].chars().next() {
                    None => break,
                    Some('}') => {
                        at += 1;
                        break;
                    }
                    Some(_) => match tree(above, &text[at..], found) {
                        0 => at += 1,
                        taken => at += taken,
                    },
                }
            }
            break;
        } else {
            // Everything of a module, or nothing that a path could go on with.
            if rest.starts_with('*') {
                at += 1;
                found.push(above.clone());
            }
            break;
        }
    }
    above.truncate(depth);
    // A name that something is imported under is none of a module.
    let alias = text[at..].strip_prefix(" as ").map_or(0, |name| {
        4 + name.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(name.len())
    });
    at + alias
}

/// The modules of a crate, by their paths, with their code.
fn modules(of: &str) -> BTreeMap<Module, String> {
    let src = format!("crates/{of}/src/");
    let module = |name: &str| -> Module {
        let name = name[src.len()..].trim_end_matches(".rs").trim_end_matches("/mod");
        let words = name.split('/').map(str::to_owned);
        if matches!(name, "lib" | "main") { Module::new() } else { words.collect() }
    };
    // Files of tests in a folder of their own are no part of the crate.
    let sources = sources(&src).into_iter().filter(|(name, _)| !name.contains("/tests"));
    sources.map(|(name, text)| (module(&name), code(&text))).collect()
}

/// What a module gives on under its own name: other modules' items, by name.
fn exports(code: &str) -> BTreeMap<String, Vec<String>> {
    let mut exports = BTreeMap::new();
    for (at, _) in code.match_indices("pub") {
        let rest = code[at + 3..].trim_start_matches("(crate)").trim_start_matches("(super)");
        let Some(rest) = rest.strip_prefix(" use ") else { continue };
        let mut found = Vec::new();
        tree(&mut Vec::new(), rest, &mut found);
        exports.extend(found.into_iter().filter_map(|path| Some((path.last()?.clone(), path))));
    }
    exports
}

/// The top-level modules of a crate with those that each uses.
fn top_level_uses(of: &str) -> BTreeMap<String, BTreeSet<String>> {
    let modules = modules(of);
    let exports: BTreeMap<&Module, BTreeMap<String, Vec<String>>> =
        modules.iter().map(|(module, code)| (module, exports(code))).collect();
    let resolve = |module: &Module, path: &[String]| -> Module {
        let (mut module, mut path) = (module.clone(), path.to_vec());
        // Each turn goes down a path or over one export; a circle of exports does not compile.
        for _ in 0..32 {
            let Some(word) = path.first().cloned() else { break };
            let mut below = module.clone();
            below.push(word.clone());
            match word.as_str() {
                "crate" => module = Module::new(),
                "super" => drop(module.pop()),
                "self" => {}
                _ if modules.contains_key(&below) => module = below,
                _ => match exports.get(&module).and_then(|names| names.get(&word)) {
                    Some(full) => {
                        path.splice(0..1, full.iter().cloned());
                        continue;
                    }
                    None => break,
                },
            }
            path.remove(0);
        }
        module
    };
    let mut uses: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for (module, code) in &modules {
        let Some(top) = module.first() else { continue };
        let used = uses.entry(top.clone()).or_default();
        for path in paths(code) {
            used.extend(resolve(module, &path).first().filter(|other| *other != top).cloned());
        }
    }
    uses
}

/// The largest sets of modules that use each other, around some corners.
fn circles(uses: &BTreeMap<String, BTreeSet<String>>) -> BTreeSet<Vec<String>> {
    let reachable = |from: &String| {
        let (mut seen, mut queue) = (BTreeSet::new(), vec![from]);
        while let Some(next) = queue.pop() {
            queue
                .extend(uses.get(next).into_iter().flatten().filter(|m| seen.insert((*m).clone())));
        }
        seen
    };
    let reachable: BTreeMap<&String, BTreeSet<String>> =
        uses.keys().map(|module| (module, reachable(module))).collect();
    let around = |module: &String| -> Vec<String> {
        let from = &reachable[module];
        from.iter()
            .filter(|m| reachable.get(m).is_some_and(|r| r.contains(module)))
            .cloned()
            .collect()
    };
    uses.keys().map(around).filter(|circle| circle.len() > 1).collect()
}

#[test]
fn modules_of_a_crate_make_no_circles() {
    let mut left: Vec<(&str, Vec<&str>)> =
        CIRCLES.iter().map(|(of, circle)| (*of, circle.to_vec())).collect();
    let mut new = Vec::new();
    for of in crates() {
        for circle in circles(&top_level_uses(&of)) {
            let known = left.iter().position(|(known, modules)| *known == of && *modules == circle);
            match known {
                Some(at) => drop(left.swap_remove(at)),
                None => new.push(format!("{of}: {}", circle.join(", "))),
            }
        }
    }
    assert!(new.is_empty(), "modules that use each other in circles:\n{}", new.join("\n"));
    assert!(left.is_empty(), "circles that are no more, or others now: {left:?}");
}

#[test]
fn circles_are_found_through_exports_and_trees_of_paths() {
    let check = |text: &str, expected: &[&str]| {
        let found: Vec<String> = paths(text).iter().map(|path| path.join("::")).collect();
        assert_eq!(found, expected, "{text}");
    };
    check(
        "use crate::{a::{self, B}, c as d, e::*};",
        &["crate::a::self", "crate::a::B", "crate::c", "crate::e"],
    );
    check("let x = crate::a::f(super::g());", &["crate::a::f", "super::g"]);
    check("not_crate::x; other::crate::y", &[]);
    assert_eq!(exports("pub use a::{B, c::D as E};")["D"], ["a", "c", "D"]);
    let uses = |text: &str| -> BTreeMap<String, BTreeSet<String>> {
        let line = |line: &str| {
            let (module, used) = line.split_once(" -> ").unwrap();
            (module.to_owned(), used.split(' ').map(str::to_owned).collect())
        };
        text.split(", ").map(line).collect()
    };
    assert_eq!(circles(&uses("a -> b, b -> c, c -> d, d -> e")), BTreeSet::new());
    let circle = |modules: &[&str]| modules.iter().map(|m| (*m).to_owned()).collect::<Vec<_>>();
    let both = BTreeSet::from([circle(&["a", "b", "c"]), circle(&["x", "y"])]);
    assert_eq!(circles(&uses("a -> b, b -> c x, c -> a, x -> y, y -> x")), both);
}

#[test]
fn protobuf_stays_at_the_wires() {
    let mut wrong = Vec::new();
    for of in crates().iter().filter(|of| *of != "proto") {
        let manifest = fs::read_to_string(workspace().join("crates").join(of).join("Cargo.toml"));
        let manifest = manifest.unwrap();
        // Tests may speak any wire.
        let dependencies = manifest.split("[dev-dependencies]").next().unwrap();
        for used in PROTOBUF {
            let used = dependencies.lines().any(|line| {
                line.strip_prefix(used).is_some_and(|rest| rest.starts_with(['.', ' ', '=']))
            });
            if used && !WIRES.contains(&of.as_str()) {
                wrong.push(format!("{of} depends on protobuf, and speaks no wire"));
            }
        }
    }
    for (name, text) in sources("crates/llb/src") {
        let module = Path::new(&name).file_stem().unwrap().to_str().unwrap();
        if code(&text).contains("shipway_proto") && !CONVERSIONS.contains(&module) {
            wrong.push(format!("{name} knows protobuf, and is no conversion"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// A function in the code of tests.
struct TestFunction {
    /// Where it begins, as `file:line`.
    place: String,
    /// Its attributes, a line each.
    attributes: Vec<String>,
    /// All of it, in lines.
    lines: Vec<String>,
}

impl TestFunction {
    fn has(&self, attribute: &str) -> bool {
        self.attributes.iter().any(|line| line.contains(attribute))
    }

    /// What is between its name and its body.
    fn signature(&self) -> String {
        self.lines.join(" ").split_once('{').map_or_else(String::new, |(s, _)| s.to_owned())
    }
}

/// Functions in files of tests, and in modules of tests at the end of other files.
fn test_functions() -> Vec<TestFunction> {
    let mut all = Vec::new();
    let texts = ["crates", "integration", "xtask"].map(sources).into_iter().flatten();
    for (name, text) in texts {
        let lines: Vec<&str> = text.lines().collect();
        let whole = name.contains("/tests/") || name.ends_with("/tests.rs");
        let start = if whole { Some(0) } else { lines.iter().position(|l| *l == "mod tests {") };
        let mut at = start.unwrap_or(lines.len());
        while at < lines.len() {
            let indent = &lines[at][..lines[at].len() - lines[at].trim_start().len()];
            let line = lines[at].trim_start();
            let line = line.trim_start_matches("pub ").trim_start_matches("pub(crate) ");
            let begins = ["fn ", "async fn "].iter().any(|word| line.starts_with(word));
            let end = || lines[at..].iter().position(|l| *l == format!("{indent}}}"));
            let Some(end) = begins.then(end).flatten() else {
                at += 1;
                continue;
            };
            let above = lines[..at].iter().rev().take_while(|line| {
                let line = line.trim_start();
                line.starts_with("#[") || line.starts_with("//")
            });
            all.push(TestFunction {
                place: format!("{name}:{}", at + 1),
                attributes: above.map(|line| (*line).to_owned()).collect(),
                lines: lines[at..=at + end].iter().map(|line| (*line).to_owned()).collect(),
            });
            at += end + 1;
        }
    }
    all
}

#[test]
fn helpers_of_tests_name_their_callers_when_they_fail() {
    let helpers = test_functions().into_iter().filter(|f| {
        let asserts = f.lines.iter().any(|line| line.contains("assert"));
        let signature = f.signature();
        // The attribute has no effect on futures, and methods stand for the thing itself.
        asserts && !f.has("test]") && !signature.contains("async fn") && !signature.contains("self")
    });
    let taking = helpers.filter(|f| !f.signature().contains("()"));
    let wrong: Vec<String> =
        taking.filter(|f| !f.has("#[track_caller]")).map(|f| f.place).collect();
    assert!(wrong.is_empty(), "these need #[track_caller]:\n{}", wrong.join("\n"));
}

#[test]
fn no_test_ends_early_without_a_word() {
    let mut wrong = Vec::new();
    for test in test_functions().iter().filter(|f| f.has("test]")) {
        assert!(!test.has("#[ignore"), "{} is ignored", test.place);
        for (at, line) in test.lines.iter().enumerate() {
            let returns = ["return;", "else { return };"].iter().any(|r| line.trim().ends_with(r));
            let told = test.lines[at.saturating_sub(4)..at].iter().any(|l| l.contains("eprintln!"));
            let file = test.place.split(':').next().unwrap();
            if returns && !told && !HELPERS_THAT_PRINT.contains(&file) {
                wrong.push(format!("{} (line {} of it)", test.place, at + 1));
            }
        }
    }
    assert!(wrong.is_empty(), "say with eprintln! what is not tested:\n{}", wrong.join("\n"));
}

#[test]
fn public_items_are_documented_and_lints_hold_everywhere() {
    let mut manifests: Vec<PathBuf> =
        crates().iter().map(|of| workspace().join("crates").join(of)).collect();
    manifests.extend(["integration", "xtask"].map(|of| workspace().join(of)));
    for package in manifests {
        let manifest = fs::read_to_string(package.join("Cargo.toml")).unwrap();
        let lints = manifest.split("[lints]").nth(1).unwrap_or_default();
        assert!(
            lints.trim_start().starts_with("workspace = true"),
            "{} has not the workspace's lints",
            package.display()
        );
    }
    let lints = fs::read_to_string(workspace().join("Cargo.toml")).unwrap();
    assert!(lints.contains("missing_docs = \"warn\""), "public items may go without documentation");
    for (name, text) in sources("crates") {
        // Names of attributes, which are those of the wire, are documented as a whole.
        let excused = ["crates/llb/src/attr.rs", "crates/proto/src/lib.rs"].contains(&&*name);
        assert!(
            excused || !text.contains("#![allow(missing_docs)]"),
            "{name} as a whole goes without documentation"
        );
    }
}
