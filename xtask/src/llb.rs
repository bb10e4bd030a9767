//! `cargo xtask llb`: the Dockerfile frontend beside another one (issue 4: equal graphs wherever a
//! reference is at hand).
//!
//! The answers are those of `crates/dockerfile2llb/examples/answers.rs`, which says what cases and
//! answers look like. A reference is any command that takes the same input and gives the same kind
//! of lines; with none, ours are printed.

use crate::cargo::{cargo, succeed};
use serde_json::Value;
use std::{
    collections::BTreeMap,
    fs::File,
    process::{Command, Stdio},
};

/// Differences shown of each kind, unless told otherwise.
const SHOWN: usize = 3;

/// Runs what the arguments ask for.
pub fn run(arguments: &[&str]) -> Result<(), String> {
    let (mut shown, mut reference, mut rest) = (SHOWN, None, arguments);
    loop {
        match rest {
            ["-n", n, more @ ..] => {
                (shown, rest) =
                    (n.parse().map_err(|_| format!("-n wants a number, not {n}"))?, more)
            }
            ["-r", command, more @ ..] => (reference, rest) = (Some(*command), more),
            _ => break,
        }
    }
    let [images, cases] = rest else {
        return Err("want: cargo xtask llb [-n SHOWN] [-r COMMAND] IMAGES CASES".into());
    };
    let directory = std::env::current_dir().map_err(|e| format!("the current directory: {e}"))?;
    let (images, cases) = (directory.join(images), directory.join(cases));
    let input = || File::open(&cases).map_err(|e| format!("{}: {e}", cases.display()));
    let mut ours = cargo();
    ours.args([
        "run",
        "--quiet",
        "--release",
        "--package",
        "shipway-dockerfile2llb",
        "--example",
        "answers",
        "--",
    ])
    .arg(&images);
    ours.stdin(input()?);
    let Some(reference) = reference else { return succeed(ours) };
    let mut theirs = Command::new("sh");
    theirs.args(["-c", reference]).stdin(input()?);
    let (ours, theirs) = (answers(ours)?, answers(theirs)?);
    if ours.len() != theirs.len() {
        return Err(format!("we gave {} answers, the reference {}", ours.len(), theirs.len()));
    }
    let mut table: BTreeMap<String, (usize, usize)> = BTreeMap::new();
    for (our, their) in ours.iter().zip(&theirs) {
        for (kind, a, b) in parts(our, their) {
            let (equal, all) = table.entry(kind.clone()).or_default();
            *all += 1;
            *equal += usize::from(a == b);
            if a != b && *all - *equal <= shown {
                println!("{kind} of {}\n  ours  {}\n  their {}", our["name"], short(&a), short(&b));
            }
        }
    }
    for (kind, (equal, all)) in table {
        println!("{kind:20} {equal} of {all} equal");
    }
    Ok(())
}

fn short(value: &Value) -> String {
    value.to_string().chars().take(600).collect()
}

fn answers(mut command: Command) -> Result<Vec<Value>, String> {
    let out = command
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .output()
        .map_err(|e| format!("{command:?}: {e}"))?;
    if !out.status.success() {
        return Err(format!("{command:?}: {}", out.status));
    }
    let values = serde_json::Deserializer::from_slice(&out.stdout).into_iter();
    values.collect::<Result<_, _>>().map_err(|e| format!("{command:?}: no JSON: {e}"))
}

/// What is compared of a pair of answers, by kind.
fn parts(our: &Value, their: &Value) -> Vec<(String, Value, Value)> {
    let request = our["request"].as_str().unwrap_or_default();
    if !our["error"].is_null() || !their["error"].is_null() {
        return vec![(
            format!("refusal of {request}"),
            our["error"].clone(),
            their["error"].clone(),
        )];
    }
    let meta = |answer: &Value, key: &str| match answer["meta"][key].as_str() {
        Some(text) => serde_json::from_str(&nameless(text)).unwrap_or_else(|_| text.into()),
        None => Value::Null,
    };
    let mut out = Vec::new();
    match request {
        "convertllb" => {
            let (a, b) = (meta(our, "result.json"), meta(their, "result.json"));
            for (kind, member) in
                [("graph", "def"), ("metadata", "metadata"), ("source map", "source")]
            {
                out.push((kind.to_owned(), a[member].clone(), b[member].clone()));
            }
        }
        "build" => {
            let keys = our["meta"]
                .as_object()
                .into_iter()
                .chain(their["meta"].as_object())
                .flat_map(|m| m.keys());
            for key in keys.collect::<std::collections::BTreeSet<_>>() {
                out.push((
                    key.split('/').next().unwrap_or_default().to_owned(),
                    meta(our, key),
                    meta(their, key),
                ));
            }
            out.push(("warnings".into(), sorted(&our["warns"]), sorted(&their["warns"])));
        }
        _ => out.push((request.to_owned(), meta(our, "result.json"), meta(their, "result.json"))),
    }
    out
}

/// Warnings of several stages come in any order.
fn sorted(list: &Value) -> Value {
    let mut list = list.as_array().cloned().unwrap_or_default();
    list.sort_by_key(Value::to_string);
    list.into()
}

/// Progress groups have random names; here all have the same.
fn nameless(text: &str) -> String {
    const KEY: &str = "\"id\": \"";
    let mut parts = text.split(KEY);
    let mut out = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let end = part.find('"').filter(|end| *end == 25).unwrap_or(0);
        out = out + KEY + &part[end..];
    }
    out
}
