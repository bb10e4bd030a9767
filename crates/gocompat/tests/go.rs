//! Every function against what Go returns for the same arguments.

#![allow(clippy::unwrap_used)]

use serde_json::{Value, json};
use shipway_gocompat::{FileMode, Glob, GoDuration, InvalidDuration, parse_bool, path, quote};
use std::collections::BTreeMap;

/// One case a line, as a JSON array: the function's name in Go, its arguments, what Go 1.26
/// returns. `null` is an error whose text is not compared.
const TABLE: &str = include_str!("go.jsonl");

/// What our function returns for `args`.
fn call(function: &str, args: &[Value]) -> Value {
    let text = |at: usize| args[at].as_str().unwrap();
    match function {
        "os.FileMode" => {
            json!(FileMode::from_unix(args[0].as_u64().unwrap().try_into().unwrap()).0)
        }
        "path.Base" => json!(path::base(text(0))),
        "path.Clean" => json!(path::clean(text(0))),
        "path.Join" => json!(path::join(text(0), text(1))),
        "path.Match" => json!(Glob::new(text(0)).ok().map(|glob| glob.matches(text(1)))),
        "strconv.ParseBool" => json!(parse_bool(text(0))),
        "strconv.Quote" => json!(quote(text(0))),
        "time.Duration.String" => json!(GoDuration(args[0].as_i64().unwrap()).to_string()),
        "time.ParseDuration" => text(0).parse().map_or_else(
            |e: InvalidDuration| json!(e.to_string()),
            |GoDuration(nanos)| json!(nanos),
        ),
        unknown => panic!("{unknown} is in the table and not here"),
    }
}

#[test]
fn all_functions_return_what_go_returns() {
    let (mut wrong, mut cases) = (Vec::new(), BTreeMap::<String, usize>::new());
    for line in TABLE.lines() {
        let row: Vec<Value> = serde_json::from_str(line).unwrap();
        let (function, args, want) =
            (row[0].as_str().unwrap(), &row[1..row.len() - 1], &row[row.len() - 1]);
        let got = call(function, args);
        if got != *want {
            wrong.push(format!("{line}: {got}"));
        }
        *cases.entry(function.to_owned()).or_default() += 1;
    }
    assert!(wrong.is_empty(), "{} of {cases:?} differ:\n{}", wrong.len(), wrong.join("\n"));
    assert!(!cases.is_empty() && cases.values().all(|n| *n >= 10), "too few cases: {cases:?}");
}
