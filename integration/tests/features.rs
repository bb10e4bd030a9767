//! The table of features (`integration/features.md`) is true as far as a test can see: ids that
//! comments cite are its rows, tests that it names are there, and capabilities that the daemon
//! announces are done. `cargo test -p shipway-integration features:: -- --nocapture` prints the
//! counts.

#![allow(clippy::unwrap_used)]

use shipway_llb::caps;
use shipway_testkit::workspace;
use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
};

const TABLE: &str = "integration/features.md";
const STATES: [&str; 5] = ["done", "untested", "different", "refused", "open"];
/// What an open row's note begins with: the kind of work that closes it.
const KINDS: [&str; 10] = [
    "buildx client",
    "cache backend",
    "daemon",
    "deployment",
    "lazy pulling",
    "metrics",
    "rootless",
    "signatures",
    "tracing",
    "Windows",
];
/// Suites of other projects whose cases may be named. Their lists are not here, so only the form of
/// a name is checked.
const SUITES: [&str; 4] = ["buildctl", "client", "dockerfile", "solver"];
/// Where comments cite rows.
const CITING: [&str; 6] = ["crates", "integration", "proto", "xtask", "config", "README.md"];
/// Longest feature and longest note, in characters: a row is a line, not an essay.
const MAX_CELL: usize = 130;

struct Row {
    /// Number of the line in the table's file.
    line: usize,
    /// The heading that it stands under, with a number such as `2.3`.
    section: String,
    id: String,
    feature: String,
    state: String,
    /// What shows it: tests, cases of the Dockerfile frontend, cases of suites.
    shown: Vec<String>,
    note: String,
}

#[track_caller]
fn table() -> Vec<Row> {
    let text = fs::read_to_string(workspace().join(TABLE)).unwrap();
    let (mut rows, mut section) = (Vec::new(), String::new());
    for (number, line) in text.lines().enumerate() {
        if let Some(heading) = line.strip_prefix("## ").or_else(|| line.strip_prefix("### ")) {
            section = heading.to_owned();
            assert!(
                chapter(&section).is_some(),
                "{TABLE}:{}: a heading begins with a number: {heading}",
                number + 1
            );
        }
        let Some(cells) = line.strip_prefix("| ").and_then(|l| l.strip_suffix(" |")) else {
            continue;
        };
        let cells: Vec<&str> = cells.split('|').map(str::trim).collect();
        // The table before the first section explains the states.
        if cells[0] == "row" || section.is_empty() {
            continue;
        }
        let [id, feature, state, shown, note] = cells[..] else {
            panic!(
                "{TABLE}:{}: {} columns instead of 5 (row, feature, state, shown by, note)",
                number + 1,
                cells.len()
            )
        };
        let shown = shown.split(", ").filter(|s| !s.is_empty());
        let shown = shown.map(|s| match s.strip_prefix('`').and_then(|s| s.strip_suffix('`')) {
            Some(reference) => reference.to_owned(),
            None => panic!("{TABLE}:{}: {s:?} is not a reference in backticks, or not one after a comma and a space", number + 1),
        });
        let (id, feature, state, note) =
            (id.to_owned(), feature.to_owned(), state.to_owned(), note.to_owned());
        rows.push(Row {
            line: number + 1,
            section: section.clone(),
            id,
            feature,
            state,
            shown: shown.collect(),
            note,
        });
    }
    assert!(!rows.is_empty(), "{TABLE} has no rows");
    rows
}

/// Fails with all complaints, one a line.
#[track_caller]
fn none_of(complaints: &[String]) {
    assert!(complaints.is_empty(), "{} complaints:\n{}", complaints.len(), complaints.join("\n"));
}

/// " (did you mean …?)" where something is near.
fn near<'a>(wrong: &str, all: impl Iterator<Item = &'a str>) -> String {
    shipway_fault::nearest(wrong, all)
        .map(|near| format!(" (did you mean {near}?)"))
        .unwrap_or_default()
}

#[test]
fn rows_have_a_state_and_what_it_needs() {
    let (rows, mut wrong, mut seen) = (table(), Vec::new(), BTreeMap::new());
    for row in &rows {
        let Row { line, id, feature, state, shown, note, .. } = row;
        let mut complain = |why: String| wrong.push(format!("{TABLE}:{line}: {id}: {why}"));
        if !is_id(id) {
            complain("not an id, which is lower-case words with dots between them".into());
        }
        if let Some(first) = seen.insert(id.as_str(), line) {
            complain(format!("is a row already in line {first}"));
        }
        if feature.is_empty() || [feature, note].iter().any(|cell| cell.chars().count() > MAX_CELL)
        {
            complain(format!(
                "feature and note are lines of at most {MAX_CELL} characters, and there is a feature"
            ));
        }
        match state.as_str() {
            "done" if shown.is_empty() => {
                complain("done, and nothing shows it: name a test, or call it untested".into())
            }
            "untested" if !shown.is_empty() => complain(
                "untested, and a test is named: call it done, or take the test away".into(),
            ),
            "different" | "refused" | "open" if note.is_empty() => {
                complain(
                    "say why it is different, how it is refused, or which kind of work is open"
                        .into(),
                );
            }
            "open"
                if !KINDS
                    .iter()
                    .any(|kind| note == kind || note.starts_with(&format!("{kind}: "))) =>
            {
                complain(format!(
                    "an open row's note begins with the kind of work, one of: {}",
                    KINDS.join(", ")
                ));
            }
            state if STATES.contains(&state) => {}
            state => {
                complain(format!("{state:?} is not a state{}", near(state, STATES.into_iter())))
            }
        }
    }
    println!("{}", counts(&rows));
    none_of(&wrong);
}

/// The number of the chapter that a section such as `2.3 Steps` belongs to.
fn chapter(section: &str) -> Option<u32> {
    section.split(['.', ' ']).next()?.parse().ok()
}

/// How many rows of each chapter have each state, and how many open ones wait for each kind of
/// work.
fn counts(rows: &[Row]) -> String {
    let mut chapters: BTreeMap<u32, BTreeMap<&str, usize>> = BTreeMap::new();
    let (mut all, mut kinds) = (BTreeMap::new(), BTreeMap::new());
    for row in rows {
        *chapters
            .entry(chapter(&row.section).unwrap())
            .or_default()
            .entry(&row.state)
            .or_default() += 1;
        *all.entry(row.state.as_str()).or_default() += 1;
        if row.state == "open" {
            *kinds.entry(row.note.split(':').next().unwrap_or_default()).or_insert(0) += 1;
        }
    }
    let line = |name: &str, counts: &BTreeMap<&str, usize>| {
        let cells = STATES.iter().map(|state| format!("{:>10}", counts.get(state).unwrap_or(&0)));
        format!("{name:>8}{}{:>8}\n", cells.collect::<String>(), counts.values().sum::<usize>())
    };
    let heads = STATES.iter().map(|state| format!("{state:>10}")).collect::<String>();
    let mut text = format!("{:>8}{heads}{:>8}\n", "chapter", "all");
    for (chapter, counts) in &chapters {
        text += &line(&chapter.to_string(), counts);
    }
    text += &line("all", &all);
    let kinds: Vec<String> = kinds.iter().map(|(kind, n)| format!("{kind} {n}")).collect();
    let _ = write!(text, "open: {}", kinds.join(", "));
    text
}

fn is_id(text: &str) -> bool {
    let word = |w: &str| {
        !w.is_empty() && w.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-')
    };
    text.contains('.') && text.split('.').all(word)
}

/// Files with one of these endings below a path, or the file that it is.
fn files(path: &Path, endings: &[&str], found: &mut Vec<PathBuf>) {
    if path.is_dir() {
        for entry in fs::read_dir(path).unwrap() {
            let path = entry.unwrap().path();
            if !path.ends_with("target") {
                files(&path, endings, found);
            }
        }
    } else if path.extension().is_some_and(|e| endings.iter().any(|ending| e == *ending)) {
        found.push(path.to_owned());
    }
}

/// What is cited as `row` or `rows` in `text`: ids, or beginnings of ids with a `*`, each with its
/// line. A list may go on in the next line of a comment.
fn citations(text: &str) -> Vec<(usize, String)> {
    let lines =
        text.lines().map(|line| line.trim_start().trim_start_matches(['/', '!', '#', '*']).trim());
    let words: Vec<(usize, &str)> = lines
        .enumerate()
        .flat_map(|(n, line)| line.split_whitespace().map(move |w| (n + 1, w)))
        .collect();
    let mut found = Vec::new();
    for (i, (_, word)) in words.iter().enumerate() {
        if !["row", "rows"].contains(&word.trim_start_matches('(').to_lowercase().as_str()) {
            continue;
        }
        for (line, word) in &words[i + 1..] {
            let Some(quoted) = word.strip_prefix('`') else {
                if *word == "and" {
                    continue;
                }
                break;
            };
            let (id, rest) = quoted.split_once('`').unwrap_or((quoted, ""));
            if !is_id(id.strip_suffix('*').unwrap_or(id).trim_end_matches('.'))
                && !is_id(&id.replace('*', "x"))
            {
                break;
            }
            found.push((*line, id.to_owned()));
            if !rest.is_empty() && rest != "," {
                break;
            }
        }
    }
    found
}

#[test]
fn citations_are_found_in_all_their_forms() {
    let text = "/// Waits (row `so.gc.when`).\n//! Both (rows `exec.mnt.*`, `exec.key` and\n//! `llb.*`); not `a.b`.\n// Row `file.copy*`, in words.\n\
                | row | `x.y` |\nlet row = `a.b`;\n/// Of rows\n/// `df.run`, `followpaths`, `df.cmd`.";
    let found: Vec<String> =
        citations(text).into_iter().map(|(line, id)| format!("{line} {id}")).collect();
    assert_eq!(
        found,
        ["1 so.gc.when", "2 exec.mnt.*", "2 exec.key", "3 llb.*", "4 file.copy*", "8 df.run"]
    );
}

#[test]
fn rows_that_are_cited_exist() {
    let rows = table();
    let ids: BTreeSet<&str> = rows.iter().map(|r| r.id.as_str()).collect();
    let mut paths = Vec::new();
    for path in CITING {
        files(&workspace().join(path), &["rs", "proto", "md", "toml"], &mut paths);
    }
    let (mut wrong, mut cited) = (Vec::new(), 0);
    let here = [TABLE, "integration/tests/features.rs"].map(|p| workspace().join(p));
    for path in paths.iter().filter(|p| !here.contains(p)) {
        let shown = path.strip_prefix(workspace()).unwrap().display();
        for (line, id) in citations(&fs::read_to_string(path).unwrap()) {
            cited += 1;
            let there = match id.strip_suffix('*') {
                Some(start) => ids.range(start..).next().is_some_and(|id| id.starts_with(start)),
                None => ids.contains(id.as_str()),
            };
            if !there {
                wrong.push(format!(
                    "{shown}:{line}: {TABLE} has no row {id}{}",
                    near(&id, ids.iter().copied())
                ));
            }
        }
    }
    assert!(cited > 300, "only {cited} citations: are they still found?");
    none_of(&wrong);
}

/// The names of the tests in a source.
fn tests_of(source: &str) -> BTreeSet<&str> {
    let (mut names, mut attributed) = (BTreeSet::new(), false);
    for line in source.lines().map(str::trim_start) {
        if line.starts_with("#[test]") || line.starts_with("#[tokio::test") {
            attributed = true;
        } else if let Some((_, rest)) =
            line.split_once("fn ").filter(|(before, _)| before.is_empty() || *before == "async ")
        {
            let name = rest.split(['(', '<']).next().unwrap_or_default();
            if std::mem::take(&mut attributed) {
                names.insert(name);
            }
        }
    }
    names
}

/// Why `reference` leads nowhere.
fn check_reference(reference: &str) -> Result<(), String> {
    if let Some(case) = reference.strip_prefix("suite:") {
        let well_formed = case
            .split_once('/')
            .is_some_and(|(suite, name)| SUITES.contains(&suite) && name.starts_with("Test"));
        return if well_formed {
            Ok(())
        } else {
            Err(format!("want suite:<{}>/Test…", SUITES.join(",")))
        };
    }
    if let Some(case) = reference.strip_prefix("case:") {
        let dir = workspace().join("crates/dockerfile2llb/tests/cases");
        if dir.join(format!("{case}.case")).is_file() {
            return Ok(());
        }
        let mut all = Vec::new();
        files(&dir, &["case"], &mut all);
        let stems = all.iter().filter_map(|p| p.file_stem()?.to_str());
        return Err(format!("the Dockerfile frontend has no case {case}{}", near(case, stems)));
    }
    let Some((file, test)) = reference.split_once("::") else {
        return Err("want <file>::<test>, case:<name> or suite:<suite>/<name>".into());
    };
    let path = if file.contains('/') {
        format!("crates/{file}")
    } else {
        format!("integration/tests/{file}")
    };
    let source = fs::read_to_string(workspace().join(&path)).map_err(|e| format!("{path}: {e}"))?;
    let tests = tests_of(&source);
    if tests.contains(test) {
        Ok(())
    } else {
        Err(format!("{path} has no test {test}{}", near(test, tests.iter().copied())))
    }
}

#[test]
fn what_shows_a_row_exists() {
    let mut wrong = Vec::new();
    for Row { line, id, shown, .. } in table() {
        for reference in shown {
            if let Err(why) = check_reference(&reference) {
                wrong.push(format!("{TABLE}:{line}: {id}: {reference}: {why}"));
            }
        }
    }
    none_of(&wrong);
    assert!(
        check_reference("features.rs::what_shows_a_row_exist")
            .unwrap_err()
            .contains("did you mean what_shows_a_row_exists?")
    );
    assert!(
        check_reference("features.rs::check_reference").is_err(),
        "a function that is not a test"
    );
    assert!(check_reference("nowhere.rs::x").is_err() && check_reference("case:nothing").is_err());
    assert!(check_reference("suite:client/x").is_err() && check_reference("x").is_err());
}

/// What BuildKit's clients may name though neither BuildKit nor this daemon announces it.
const UNREGISTERED: [&str; 2] = ["exec.meta.removemountstubs.recursive", "file.copy.modestring"];

#[test]
fn capabilities_have_rows_and_those_that_are_announced_are_done() {
    let rows: BTreeMap<String, String> = table().into_iter().map(|r| (r.id, r.state)).collect();
    let named = |prefix: &str, names: &[&str]| {
        names.iter().map(|n| format!("cap.{prefix}{n}")).collect::<Vec<_>>()
    };
    let announced = [named("", caps::LLB), named("gw.", caps::GATEWAY)].concat();
    let missing = [named("", caps::LLB_MISSING), named("gw.", caps::GATEWAY_MISSING)].concat();
    let mut wrong = Vec::new();
    let mut check = |ids: &[String], states: &[&str], why: &str| {
        for id in ids {
            match rows.get(id) {
                None => wrong.push(format!("{TABLE} has no row {id}, which is {why}")),
                Some(state) if !states.contains(&state.as_str()) => {
                    wrong.push(format!("{id} is {why}, and {TABLE} calls it {state}"))
                }
                Some(_) => {}
            }
        }
    };
    check(
        &announced,
        &["done", "untested", "different"],
        "announced to clients (shipway_llb::caps)",
    );
    check(&missing, &["open", "refused"], "listed as missing (shipway_llb::caps)");
    check(&named("", &UNREGISTERED), &["done", "untested"], "done without being announced");
    let known: BTreeSet<String> =
        [announced, missing, named("", &UNREGISTERED)].concat().into_iter().collect();
    for id in rows
        .keys()
        .filter(|id| id.starts_with("cap.") && !id.starts_with("cap.df.") && !known.contains(*id))
    {
        wrong.push(format!("{id} is a row, and shipway_llb::caps has no such capability"));
    }
    none_of(&wrong);
}
