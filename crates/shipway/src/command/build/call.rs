//! `--call`, `--check` and `--format`: what a Dockerfile's frontend can tell without building (rows `dfs.*`).

use std::{process::ExitCode, sync::Arc};

use base64::{Engine, engine::general_purpose::STANDARD};
use serde::Deserialize;
use serde_json::{Value, json};
use shipway_client::Answer;
use shipway_fault::{Detail, Fault, Position, Result, SourceFile, Span, nearest};

use super::Args;
use crate::{csv, output};

const METHODS: [&str; 6] = ["build", "check", "lint", "outline", "targets", "subrequests.describe"];
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
        let fields = csv::fields(if args.check { "check" } else { &args.call })?;
        let mut call = Self { method: "build", format: "text", ignore_status: false };
        let mut format = args.format.clone();
        for field in fields {
            match field.split_once('=') {
                None => call.method = known("--call", &field, &METHODS)?,
                Some(("format", value)) => format = Some(value.to_owned()),
                Some(("ignorestatus", value)) => {
                    let wrong = || Fault::invalid(format!("--call: invalid value {value:?} of ignorestatus: want true or false"));
                    call.ignore_status = csv::boolean(value).ok_or_else(wrong)?;
                }
                Some((key, _)) => return Err(Fault::invalid(format!("--call: unknown key {key:?}: want format or ignorestatus"))),
            }
        }
        if let Some(format) = &format {
            call.format = known("--format", format, &FORMATS)?;
        }
        match call.method {
            "build" if format.is_some() => {
                return Err(Fault::invalid("--format says how --check and --call print").hint("add --check"));
            }
            "build" => return Ok(None),
            "check" => call.method = "lint",
            _ => {}
        }
        if call.format == "sarif" && call.method != "lint" {
            return Err(Fault::invalid(format!("--call={} has no form sarif", call.method)).hint("use --format json"));
        }
        Ok(Some(call))
    }

    /// Name of the request.
    pub(super) fn request(self) -> String {
        format!("frontend.{}", self.method)
    }

    /// Prints `answer`; findings make the exit code.
    pub(super) fn print(self, answer: &Answer) -> Result<ExitCode> {
        let text = |key: &str| String::from_utf8_lossy(answer.get(key).map(Vec::as_slice).unwrap_or_default()).into_owned();
        let found: Option<Findings> = match self.method {
            "lint" => Some(serde_json::from_str(&text("result.json")).map_err(|e| Fault::invalid(format!("read the findings: {e}")))?),
            _ => None,
        };
        match (self.format, &found) {
            ("json", _) => output::print(&(text("result.json") + "\n"))?,
            ("sarif", Some(found)) => output::print(&format!("{:#}\n", found.sarif()))?,
            (_, Some(found)) => {
                output::print(&(found.headline() + &text("result.txt")))?;
                if let Some(error) = &found.error {
                    return Err(error.fault(&found.sources));
                }
            }
            _ => output::print(&text("result.txt"))?,
        }
        let failed = !self.ignore_status && !matches!(text("result.statuscode").as_str(), "" | "0");
        Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
    }
}

fn known(what: &str, word: &str, words: &[&'static str]) -> Result<&'static str> {
    if let Some(known) = words.iter().find(|w| **w == word) {
        return Ok(known);
    }
    let fault = Fault::invalid(format!("{what}: unknown value {word:?}: want {}", words.join(", ")));
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
    #[serde(rename = "buildError")]
    error: Option<BuildError>,
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
}

#[derive(Deserialize)]
struct BuildError {
    message: String,
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

impl BuildError {
    /// The error as a build would end with it.
    fn fault(&self, sources: &[Source]) -> Fault {
        let fault = Fault::unknown(self.message.clone());
        let Some(source) = sources.get(self.location.source_index).filter(|_| !self.location.ranges.is_empty()) else { return fault };
        let data = STANDARD.decode(&source.data).unwrap_or_default();
        let file = SourceFile { filename: source.filename.clone(), language: source.language.clone(), data, definition: None };
        let position = |p: Place| Position { line: p.line, character: p.character };
        let spans = self.location.ranges.iter().map(|r| Span { start: position(r.start), end: position(r.end) }).collect();
        fault.detail(Detail::Source { file: Arc::new(file), spans })
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

    /// The findings in the Static Analysis Results Interchange Format, version 2.1.0 (OASIS), as code hosts and editors read it.
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
        let mut results: Vec<Value> = self.warnings().iter().map(|w| result(&w.rule_name, "warning", &w.detail, &w.location)).collect();
        results.extend(self.error.iter().map(|e| result("BuildError", "error", &e.message, &e.location)));
        json!({
            "$schema": "https://json.schemastore.org/sarif-2.1.0.json",
            "version": "2.1.0",
            "runs": [{
                "tool": {"driver": {"name": "shipway", "version": env!("CARGO_PKG_VERSION"), "rules": rules}},
                "results": results,
            }],
        })
    }

    fn places(&self, location: &Location) -> Vec<Value> {
        let uri = self.sources.get(location.source_index).map_or("Dockerfile", |s| &s.filename);
        let ranges = location.ranges.iter().filter(|r| r.start.line > 0);
        let place = |r: &Range| {
            let mut region = json!({"startLine": r.start.line, "endLine": r.end.line.max(r.start.line)});
            if r.start.character > 0 {
                region["startColumn"] = json!(r.start.character + 1);
            }
            json!({"physicalLocation": {"artifactLocation": {"uri": uri}, "region": region}})
        };
        ranges.map(place).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_read() {
        let check = |args: Args, want: &str| {
            let shown = match Call::of(&args) {
                Ok(None) => "build".to_owned(),
                Ok(Some(c)) => format!("{} {}{}", c.method, c.format, if c.ignore_status { " ignoring" } else { "" }),
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
        check(Args { check: true, format: Some("sarif".into()), ..call("build") }, "lint sarif");
        check(Args { format: Some("sarif".into()), ..call("outline") }, "error --call=outline has no form sarif");
        check(Args { format: Some("json".into()), ..call("build") }, "error --format says how --check and --call print");
        check(call("outlin"), "error --call: unknown value \"outlin\": want build, check, lint, outline, targets, subrequests.describe");
        check(call("lint,format=xml"), "error --format: unknown value \"xml\": want text, json, sarif");
    }

    fn findings(json: &str) -> Findings {
        serde_json::from_str(json).expect("JSON")
    }

    #[test]
    fn findings_become_sarif() {
        let found = findings(
            r#"{"warnings": [
                {"ruleName": "A", "description": "d", "url": "u", "detail": "x", "location": {"ranges": [{"start": {"line": 2}, "end": {"line": 3}}]}},
                {"ruleName": "A", "description": "d", "detail": "y", "location": {}}],
              "sources": [{"filename": "f", "data": "RlJPTSBhCg=="}],
              "buildError": {"message": "m", "location": {"ranges": [{"start": {"line": 1, "character": 4}, "end": {"line": 1}}]}}}"#,
        );
        let run = &found.sarif()["runs"][0];
        assert_eq!(run["tool"]["driver"]["rules"], json!([{"id": "A", "shortDescription": {"text": "d"}, "helpUri": "u"}]));
        let region = |i: usize| run["results"][i]["locations"][0]["physicalLocation"]["region"].clone();
        assert_eq!(region(0), json!({"startLine": 2, "endLine": 3}));
        assert_eq!(region(1), Value::Null);
        assert_eq!(region(2), json!({"startLine": 1, "endLine": 1, "startColumn": 5}));
        assert_eq!(run["results"][2]["level"], "error");
        assert_eq!(found.headline(), "Check complete, 2 warnings have been found!\n");
        let fault = found.error.as_ref().expect("error").fault(&found.sources);
        assert!(matches!(fault.details(), [Detail::Source { file, spans }] if file.data == b"FROM a\n" && spans.len() == 1));
    }

    #[test]
    fn nothing_found_is_said_too() {
        assert_eq!(findings(r#"{"warnings": null, "sources": []}"#).headline(), "Check complete, no warnings found.\n");
    }
}
