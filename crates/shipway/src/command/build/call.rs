//! `--call`, `--check` and `--format`: what a Dockerfile's frontend can answer without building
//! (rows `dfs.*`).

use std::{process::ExitCode, sync::Arc};

use base64::{Engine, engine::general_purpose::STANDARD};
use serde::Deserialize;
use serde_json::{Value, json};
use shipway_client::Answer;
use shipway_fault::{Detail, Fault, Position, Result, SourceFile, Span, nearest};
use shipway_gocompat::parse_bool;

use super::{Args, context::Input};
use crate::{
    Persona, csv,
    failure::{describe, excerpt},
    output,
};

const METHODS: [&str; 7] =
    ["build", "check", "lint", "outline", "targets", "convertllb", "subrequests.describe"];
const FORMATS: [&str; 3] = ["text", "json", "sarif"];

/// A question and how its answer is printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Call {
    /// Name of the subrequest, without `frontend.`.
    method: &'static str,
    format: &'static str,
    /// Findings are no failure.
    ignore_status: bool,
}

impl Call {
    /// What `args` ask for; `None` is a build.
    pub(super) fn of(args: &Args) -> Result<Option<Self>> {
        let fields = csv::fields(if args.check == Some(true) { "check" } else { &args.call })?;
        let mut call = Self { method: "build", format: "text", ignore_status: false };
        let mut format = args.format.clone();
        for field in fields {
            match field.split_once('=') {
                None => call.method = known("--call", &field, &METHODS)?,
                Some(("format", value)) => format = Some(value.to_owned()),
                Some(("ignorestatus", value)) => {
                    let wrong = || {
                        Fault::invalid(format!(
                            "--call: invalid value {value:?} of ignorestatus: want true or false"
                        ))
                    };
                    call.ignore_status = parse_bool(value).ok_or_else(wrong)?;
                }
                Some((key, _)) => {
                    return Err(Fault::invalid(format!(
                        "--call: unknown key {key:?}: want format or ignorestatus"
                    )));
                }
            }
        }
        if let Some(format) = &format {
            call.format = known("--format", format, &FORMATS)?;
        }
        match call.method {
            "build" if format.is_some() => {
                return Err(Fault::invalid("--format says how --check and --call print")
                    .hint("add --check"));
            }
            "build" => return Ok(None),
            "check" => call.method = "lint",
            _ => {}
        }
        if call.format == "sarif" && call.method != "lint" {
            return Err(Fault::invalid(format!("--call={} has no form sarif", call.method))
                .hint("use --format json"));
        }
        Ok(Some(call))
    }

    /// Name of the request.
    pub(super) fn request(self) -> String {
        format!("frontend.{}", self.method)
    }

    /// Prints `answer` to a question about `input`; findings make the exit code.
    pub(super) fn print(self, answer: &Answer, input: &Input) -> Result<ExitCode> {
        let text = |key: &str| {
            String::from_utf8_lossy(answer.get(key).map(Vec::as_slice).unwrap_or_default())
                .into_owned()
        };
        let mut found: Option<Findings> = match self.method {
            "lint" => Some(
                serde_json::from_str(&text("result.json"))
                    .map_err(|e| Fault::invalid(format!("read the findings: {e}")))?,
            ),
            _ => None,
        };
        for source in
            found.iter_mut().flat_map(|f| &mut f.sources).filter(|s| s.filename == input.filename)
        {
            source.filename.clone_from(&input.shown);
        }
        // A graph has no other form.
        let json = self.format == "json" || !answer.contains_key("result.txt");
        match (self.format, &found) {
            (_, None) if json => output::print(&(text("result.json") + "\n"))?,
            ("json", _) => output::print(&(text("result.json") + "\n"))?,
            ("sarif", Some(found)) => output::print(&format!("{:#}\n", found.sarif()))?,
            (_, Some(found)) => {
                output::print(&found.text())?;
                if let Some(fault) = found.fault() {
                    return Err(fault);
                }
            }
            _ => output::print(&text("result.txt"))?,
        }
        Ok(if self.fails(answer) { ExitCode::FAILURE } else { ExitCode::SUCCESS })
    }

    /// Whether what was found is a failure.
    pub(super) fn fails(self, answer: &Answer) -> bool {
        let code = answer.get("result.statuscode").map(Vec::as_slice).unwrap_or_default();
        !self.ignore_status && !matches!(code, b"" | b"0")
    }
}

fn known(what: &str, word: &str, words: &[&'static str]) -> Result<&'static str> {
    if let Some(known) = words.iter().find(|w| **w == word) {
        return Ok(known);
    }
    let fault =
        Fault::invalid(format!("{what}: unknown value {word:?}: want {}", words.join(", ")));
    Err(match nearest(word, words.iter().copied()) {
        Some(near) => fault.hint(format!("did you mean {near}?")),
        None => fault,
    })
}

/// What the rules found.
#[derive(Deserialize)]
struct Findings {
    warnings: Option<Vec<Warning>>,
    #[serde(default)]
    sources: Vec<Source>,
    /// The first mistake.
    #[serde(rename = "buildError")]
    error: Option<BuildError>,
    /// All of them, from a daemon that reports columns.
    #[serde(default)]
    errors: Vec<BuildError>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Warning {
    rule_name: String,
    #[serde(default)]
    description: String,
    #[serde(default)]
    url: String,
    #[serde(default)]
    detail: String,
    #[serde(default)]
    location: Location,
    fix: Option<Fix>,
}

/// What would make a warning go away.
#[derive(Deserialize)]
struct Fix {
    advice: String,
    /// What belongs in the place of the characters that the warning points at.
    replacement: Option<String>,
}

#[derive(Deserialize)]
struct BuildError {
    message: String,
    #[serde(default)]
    hints: Vec<String>,
    #[serde(default)]
    location: Location,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct Location {
    source_index: usize,
    ranges: Vec<Range>,
}

#[derive(Clone, Copy, Deserialize, Default)]
#[serde(default)]
struct Range {
    start: Place,
    end: Place,
}

#[derive(Clone, Copy, Deserialize, Default)]
#[serde(default)]
struct Place {
    line: i32,
    character: i32,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Source {
    filename: String,
    data: String,
    language: String,
}

impl Range {
    fn span(&self) -> Span {
        let position = |p: Place| Position { line: p.line, character: p.character };
        Span { start: position(self.start), end: position(self.end) }
    }

    /// Whether it is a part of a line.
    fn is_exact(&self) -> bool {
        self.start.line == self.end.line && self.end.character > self.start.character
    }
}

impl Location {
    /// The text that it is in, and where.
    fn of(&self, sources: &[Source]) -> Option<(SourceFile, Vec<Span>)> {
        let source = sources.get(self.source_index).filter(|_| !self.ranges.is_empty())?;
        let data = STANDARD.decode(&source.data).unwrap_or_default();
        let file = SourceFile {
            filename: source.filename.clone(),
            language: source.language.clone(),
            data,
            definition: None,
        };
        Some((file, self.ranges.iter().map(Range::span).collect()))
    }
}

impl BuildError {
    /// The error as a build would end with it.
    fn fault(&self, sources: &[Source]) -> Fault {
        let fault = self
            .hints
            .iter()
            .fold(Fault::unknown(self.message.clone()), |fault, hint| fault.hint(hint.clone()));
        match self.location.of(sources) {
            Some((file, spans)) => fault.detail(Detail::Source { file: Arc::new(file), spans }),
            None => fault,
        }
    }
}

impl Findings {
    fn warnings(&self) -> &[Warning] {
        self.warnings.as_deref().unwrap_or_default()
    }

    fn headline(&self) -> String {
        match (self.warnings().len(), &self.error) {
            (0, None) => "Check complete, no warnings found.\n".to_owned(),
            (0, Some(_)) => String::new(),
            (1, _) => "Check complete, 1 warning has been found!\n".to_owned(),
            (n, _) => format!("Check complete, {n} warnings have been found!\n"),
        }
    }

    /// The findings for people, in the order of their lines; but for the last mistake, which is the
    /// failure.
    fn text(&self) -> String {
        let mut out = self.headline();
        let mut warnings: Vec<&Warning> = self.warnings().iter().collect();
        warnings.sort_by_key(|w| w.location.ranges.first().map_or(0, |r| r.start.line));
        for warning in warnings {
            let url =
                if warning.url.is_empty() { String::new() } else { format!(" - {}", warning.url) };
            out += &format!("\nWARNING: {}{url}\n{}\n", warning.rule_name, warning.detail);
            if let Some((file, spans)) = warning.location.of(&self.sources) {
                out += &excerpt(&file, &spans);
            }
            if let Some(fix) = &warning.fix {
                out += &format!("hint: {}\n", fix.advice);
            }
        }
        for error in self.errors.split_last().map_or(&[][..], |(_, others)| others) {
            out += &format!("\n{}", describe(&error.fault(&self.sources), Persona::Shipway));
        }
        out
    }

    /// The last mistake.
    fn fault(&self) -> Option<Fault> {
        self.errors.last().or(self.error.as_ref()).map(|error| error.fault(&self.sources))
    }

    /// The findings in the Static Analysis Results Interchange Format, version 2.1.0 (OASIS), as
    /// code hosts and editors read it.
    fn sarif(&self) -> Value {
        let mut rules: Vec<Value> = Vec::new();
        for warning in self.warnings() {
            if !rules.iter().any(|r| r["id"] == warning.rule_name.as_str()) {
                let mut rule = json!({"id": warning.rule_name, "shortDescription": {"text": warning.description}});
                if !warning.url.is_empty() {
                    rule["helpUri"] = json!(warning.url);
                }
                rules.push(rule);
            }
        }
        let result = |rule: &str, level: &str, message: &str, location: &Location| json!({"ruleId": rule, "level": level, "message": {"text": message}, "locations": self.places(location)});
        let mut results = Vec::new();
        for warning in self.warnings() {
            let advice =
                warning.fix.as_ref().map(|f| format!(" ({})", f.advice)).unwrap_or_default();
            let mut found = result(
                &warning.rule_name,
                "warning",
                &(warning.detail.clone() + &advice),
                &warning.location,
            );
            if let Some(fix) = self.replacement(warning) {
                found["fixes"] = json!([fix]);
            }
            results.push(found);
        }
        let errors = if self.errors.is_empty() { self.error.as_slice() } else { &self.errors };
        for error in errors {
            let message = error
                .hints
                .iter()
                .fold(error.message.clone(), |message, hint| message + "\n" + hint);
            results.push(result("BuildError", "error", &message, &error.location));
        }
        json!({
            "$schema": "https://json.schemastore.org/sarif-2.1.0.json",
            "version": "2.1.0",
            "runs": [{
                "tool": {"driver": {"name": "shipway", "version": env!("CARGO_PKG_VERSION"), "rules": rules}},
                "columnKind": "unicodeCodePoints",
                "results": results,
            }],
        })
    }

    fn uri(&self, location: &Location) -> &str {
        self.sources.get(location.source_index).map_or("Dockerfile", |s| &s.filename)
    }

    /// One place per warning or error, with the part of a line that is meant if that is known, and
    /// all its lines around.
    fn places(&self, location: &Location) -> Vec<Value> {
        let lines = || location.ranges.iter().filter(|r| r.start.line > 0);
        let place = |region: Value, context: Option<Value>| {
            let mut physical =
                json!({"artifactLocation": {"uri": self.uri(location)}, "region": region});
            if let Some(context) = context {
                physical["contextRegion"] = context;
            }
            json!({"physicalLocation": physical})
        };
        let Some(first) = lines().map(|r| r.start.line).min() else { return Vec::new() };
        let last = lines().map(|r| r.end.line.max(r.start.line)).max().unwrap_or(first);
        let whole = json!({"startLine": first, "endLine": last});
        match lines().find(|r| r.is_exact()) {
            Some(exact) => vec![place(region(exact), (first != last).then_some(whole))],
            None => vec![place(whole, None)],
        }
    }

    fn replacement(&self, warning: &Warning) -> Option<Value> {
        let fix = warning.fix.as_ref()?;
        let exact = warning.location.ranges.iter().find(|r| r.is_exact())?;
        Some(json!({
            "description": {"text": fix.advice},
            "artifactChanges": [{
                "artifactLocation": {"uri": self.uri(&warning.location)},
                "replacements": [{"deletedRegion": region(exact), "insertedContent": {"text": fix.replacement.as_ref()?}}],
            }],
        }))
    }
}

/// A part of a line; columns are from 1 and the end is behind the last character.
fn region(exact: &Range) -> Value {
    json!({
        "startLine": exact.start.line,
        "startColumn": exact.start.character + 1,
        "endLine": exact.end.line,
        "endColumn": exact.end.character + 1,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_read() {
        let check = |args: Args, want: &str| {
            let shown = match Call::of(&args) {
                Ok(None) => "build".to_owned(),
                Ok(Some(c)) => format!(
                    "{} {}{}",
                    c.method,
                    c.format,
                    if c.ignore_status { " ignoring" } else { "" }
                ),
                Err(fault) => format!("error {fault}"),
            };
            assert_eq!(shown, want);
        };
        let call = |call: &str| Args { call: call.into(), ..Args::default() };
        check(call("build"), "build");
        check(call("check"), "lint text");
        check(call("lint,format=json,ignorestatus=true"), "lint json ignoring");
        check(call("outline"), "outline text");
        check(call("targets,format=json"), "targets json");
        check(Args { check: Some(false), ..call("build") }, "build");
        check(
            Args { check: Some(true), format: Some("sarif".into()), ..call("build") },
            "lint sarif",
        );
        check(
            Args { format: Some("sarif".into()), ..call("outline") },
            "error --call=outline has no form sarif",
        );
        check(
            Args { format: Some("json".into()), ..call("build") },
            "error --format says how --check and --call print",
        );
        check(
            call("outlin"),
            "error --call: unknown value \"outlin\": want build, check, lint, outline, targets, convertllb, subrequests.describe",
        );
        check(
            call("lint,format=xml"),
            "error --format: unknown value \"xml\": want text, json, sarif",
        );
    }

    fn findings(json: &str) -> Findings {
        serde_json::from_str(json).expect("JSON")
    }

    /// Two warnings and two mistakes in `FROM a\nCMD b\n`.
    fn some() -> Findings {
        findings(
            r#"{"warnings": [
                {"ruleName": "B", "description": "d", "url": "u", "detail": "x",
                 "location": {"ranges": [{"start": {"line": 2, "character": 4}, "end": {"line": 2, "character": 5}}]},
                 "fix": {"advice": "write c", "replacement": "c"}},
                {"ruleName": "A", "detail": "y", "location": {"ranges": [{"start": {"line": 1}, "end": {"line": 1}}, {"start": {"line": 2}, "end": {"line": 2}}]}},
                {"ruleName": "B", "detail": "z", "location": {}}],
              "sources": [{"filename": "f", "data": "RlJPTSBhCkNNRCBiCg=="}],
              "buildError": {"message": "m", "location": {}},
              "errors": [
                {"message": "m", "hints": ["h"], "location": {"ranges": [{"start": {"line": 1, "character": 5}, "end": {"line": 1, "character": 6}}]}},
                {"message": "n", "hints": [], "location": {}}]}"#,
        )
    }

    #[test]
    fn findings_are_drawn() {
        let found = some();
        assert_eq!(
            found.text(),
            "Check complete, 3 warnings have been found!\n\
             \nWARNING: B\nz\n\
             \nWARNING: A\ny\nf:1\n--------------------\n   1 | >>> FROM a\n   2 | >>> CMD b\n   3 |     \n--------------------\n\
             \nWARNING: B - u\nx\nf:2\n--------------------\n   1 |     FROM a\n   2 | >>> CMD b\n     |         ^\n   3 |     \n--------------------\nhint: write c\n\
             \nf:1\n--------------------\n   1 | >>> FROM a\n     |          ^\n   2 |     CMD b\n   3 |     \n--------------------\nERROR: m\nhint: h\n"
        );
        assert_eq!(found.fault().expect("error").to_string(), "n");
    }

    #[test]
    fn findings_become_sarif() {
        let run = &some().sarif()["runs"][0];
        assert_eq!(
            run["tool"]["driver"]["rules"][0],
            json!({"id": "B", "shortDescription": {"text": "d"}, "helpUri": "u"})
        );
        let result = |i: usize| run["results"][i].clone();
        let region = |i: usize| result(i)["locations"][0]["physicalLocation"]["region"].clone();
        let exact = |line: i32, from: i32, to: i32| json!({"startLine": line, "startColumn": from, "endLine": line, "endColumn": to});
        assert_eq!(
            (region(0), region(1), region(2)),
            (exact(2, 5, 6), json!({"startLine": 1, "endLine": 2}), Value::Null)
        );
        assert_eq!((region(3), region(4)), (exact(1, 6, 7), Value::Null));
        assert_eq!(
            (&result(3)["level"], &result(3)["message"]["text"]),
            (&json!("error"), &json!("m\nh"))
        );
        let change = &result(0)["fixes"][0]["artifactChanges"][0];
        assert_eq!(
            change["replacements"][0],
            json!({"deletedRegion": exact(2, 5, 6), "insertedContent": {"text": "c"}})
        );
        assert_eq!(result(1)["fixes"], Value::Null);
    }

    #[test]
    fn a_daemon_that_tells_lines_only_is_understood() {
        let found = findings(
            r#"{"warnings": [{"ruleName": "A", "detail": "y", "location": {"ranges": [{"start": {"line": 1}, "end": {"line": 1}}]}}],
              "sources": [{"filename": "f", "data": "RlJPTSBhCg=="}],
              "buildError": {"message": "m", "location": {"ranges": [{"start": {"line": 1}, "end": {"line": 1}}]}}}"#,
        );
        assert!(!found.text().contains('^') && found.text().contains(">>> FROM a"));
        assert_eq!(
            found.sarif()["runs"][0]["results"][1]["locations"][0]["physicalLocation"]["region"],
            json!({"startLine": 1, "endLine": 1})
        );
        let fault = found.fault().expect("error");
        assert!(
            matches!(fault.details(), [Detail::Source { file, spans }] if file.data == b"FROM a\n" && spans.len() == 1)
        );
    }

    #[test]
    fn nothing_found_is_said_too() {
        assert_eq!(
            findings(r#"{"warnings": null, "sources": []}"#).headline(),
            "Check complete, no warnings found.\n"
        );
    }
}
