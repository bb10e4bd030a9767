//! Questions about a Dockerfile instead of a build: describe, targets, outline, lint (rows
//! `dfs.*`). Answers are metadata only.

use crate::{
    build_context::BuildContext,
    convert::{Converted, TargetOutline, convert},
    error::ConvertError,
    plan::Scope,
    reading::{lint_config, marshal, parse, parse_any, warn_all},
};
use base64::Engine as _;
use serde_json::{Value, json};
use shipway_dockerfile::{Dockerfile, Lines, Lint, LintConfig, Linter, Source};
use shipway_fault::{Detail, Fault, Result, SourceFile, Span};
use shipway_frontend::FrontendResult;
use shipway_llb::Definition;
use shipway_oci::gojson;

/// Version of all answers.
const VERSION: &str = "1.0.0";

/// Answers `request`.
pub async fn answer(cx: &BuildContext, request: &str) -> Result<FrontendResult> {
    match request {
        "frontend.subrequests.describe" => describe(),
        "frontend.targets" => {
            let file = parse_any(cx, &mut Linter::default()).map_err(|f| cx.fault(f))?;
            targets(cx, &file)
        }
        "frontend.outline" => outline(cx).await,
        "frontend.lint" => lint(cx).await,
        "frontend.convertllb" => convert_llb(cx).await,
        _ => {
            // Clients know it by its detail; another code than this they would print.
            let fault = Fault::unknown(format!("unsupported request {request}"));
            Err(fault.detail(Detail::Subrequest(request.into())))
        }
    }
}

fn result(answer: &Value, text: String, extra: &[(&str, &str)]) -> Result<FrontendResult> {
    let mut result = FrontendResult::default();
    result.metadata.insert("result.json".into(), go_json(answer)?.into_bytes());
    result.metadata.insert("result.txt".into(), text.into_bytes());
    result.metadata.insert("version".into(), VERSION.into());
    result.metadata.extend(extra.iter().map(|(k, v)| ((*k).to_owned(), v.as_bytes().to_vec())));
    Ok(result)
}

/// Indented JSON as Go writes it.
fn go_json(value: &Value) -> Result<String> {
    gojson::to_string_pretty(value)
        .map_err(|e| Fault::internal(format!("failed to encode an answer: {e}")))
}

/// Converts the target as a build would: its rules are heard on the status, and are errors if the
/// file says so.
async fn converted(cx: &BuildContext) -> Result<Converted> {
    let mut linter = Linter::new(lint_config(cx).map_err(|f| cx.fault(f))?);
    let asked = async {
        let file = parse(cx, &mut linter)?;
        convert(cx, &file, None, Scope::Target, &mut linter).await
    };
    let asked = asked.await;
    warn_all(cx, &mut linter).await?;
    asked.map_err(|f| cx.fault(f))
}

/// The target's graph as JSON (row `dfs.convert`).
async fn convert_llb(cx: &BuildContext) -> Result<FrontendResult> {
    let converted = converted(cx).await?;
    let mut result = FrontendResult::default();
    result
        .metadata
        .insert("result.json".into(), go_json(&marshal(cx, &converted)?.to_json()?)?.into_bytes());
    result.metadata.insert("version".into(), "0.1.0".into());
    Ok(result)
}

/// Rows of cells, each column as wide as its widest cell and `gap` more.
fn table(rows: &[Vec<String>], gap: usize) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |c: usize| {
        rows.iter().filter_map(|r| r.get(c)).map(|t| t.chars().count()).max().unwrap_or(0) + gap
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut out = String::new();
    for row in rows {
        for (c, cell) in row.iter().enumerate() {
            // The last cell needs no padding.
            let width = if c + 1 == row.len() { 0 } else { widths[c] };
            out += &format!("{cell:<width$}");
        }
        out.push('\n');
    }
    out
}

fn describe() -> Result<FrontendResult> {
    let named = |names: &[&str]| {
        names.iter().map(|n| json!({"name": n, "description": ""})).collect::<Vec<_>>()
    };
    let request = |name: &str, description: &str, opts: Value| {
        json!({
            "name": name,
            "version": VERSION,
            "type": "rpc",
            "description": description,
            "opts": opts,
            "inputs": null,
            "metadata": named(&["result.json", "result.txt"]),
            "refs": null,
        })
    };
    let all = [
        (
            "frontend.outline",
            "List all parameters current build target supports",
            json!([{"name": "target", "description": "Target build stage"}]),
        ),
        ("frontend.targets", "List all targets current build supports", json!([])),
        ("frontend.subrequests.describe", "List available subrequest types", Value::Null),
    ];
    let mut rows = vec![["NAME", "VERSION", "DESCRIPTION"].map(String::from).to_vec()];
    rows.extend(all.iter().map(|(name, description, _)| {
        vec![name.replacen("frontend.", "", 1), VERSION.into(), (*description).into()]
    }));
    let answer: Vec<Value> =
        all.into_iter().map(|(name, description, opts)| request(name, description, opts)).collect();
    result(&Value::Array(answer), table(&rows, 1), &[])
}

fn ranges(spans: &[Span]) -> Value {
    let position = |p: shipway_fault::Position| {
        object([("line", json!(p.line)), ("character", json!(p.character))])
    };
    spans.iter().map(|s| json!({"start": position(s.start), "end": position(s.end)})).collect()
}

fn location(spans: &[Span]) -> Value {
    if spans.is_empty() { json!({}) } else { json!({"ranges": ranges(spans)}) }
}

/// Members that say something; Go's encoder leaves the others out.
fn object(members: impl IntoIterator<Item = (&'static str, Value)>) -> Value {
    let said = |v: &Value| {
        !(v.is_null() || v == "" || v == false || v == 0 || v.as_array().is_some_and(Vec::is_empty))
    };
    members
        .into_iter()
        .filter(|(_, v)| said(v))
        .map(|(k, v)| (k.to_owned(), v))
        .collect::<serde_json::Map<_, _>>()
        .into()
}

/// A name, also if it is empty, and what else there is to say.
fn named<const N: usize>(name: &str, rest: [(&'static str, Value); N]) -> Value {
    let mut out = serde_json::Map::from_iter([("name".to_owned(), json!(name))]);
    if let Value::Object(said) = object(rest) {
        out.extend(said);
    }
    out.into()
}

fn base64(data: &[u8]) -> String {
    base64::engine::general_purpose::STANDARD.encode(data)
}

fn targets(cx: &BuildContext, file: &Dockerfile) -> Result<FrontendResult> {
    let last = file.stages.len().saturating_sub(1);
    let mut rows = vec![["TARGET", "DESCRIPTION"].map(String::from).to_vec()];
    let mut all = Vec::new();
    for (i, stage) in file.stages.iter().enumerate() {
        all.push(object([
            ("name", json!(stage.name)),
            ("default", json!(i == last)),
            ("description", json!(stage.description)),
            ("base", json!(stage.base)),
            ("platform", json!(stage.platform)),
            ("location", location(&stage.lines.spans())),
        ]));
        let name = match (stage.name.as_str(), i == last) {
            ("", true) => "(default)".to_owned(),
            (name, true) => format!("{name} (default)"),
            (name, false) => name.to_owned(),
        };
        rows.push(vec![name, stage.description.clone()]);
    }
    let all = if all.is_empty() { Value::Null } else { Value::Array(all) };
    result(&json!({"targets": all, "sources": [base64(&cx.file.data)]}), table(&rows, 1), &[])
}

async fn outline(cx: &BuildContext) -> Result<FrontendResult> {
    let TargetOutline { name, description, args, secrets, ssh } = converted(cx).await?.outline;
    let at = |lines: Lines| location(&lines.spans());
    let arg = |a: &crate::outline::ArgInfo| {
        let rest = [
            ("description", json!(a.description)),
            ("value", json!(a.value)),
            ("location", at(a.lines)),
        ];
        named(&a.name, rest)
    };
    let asked = |a: &crate::outline::Asked| {
        named(&a.name, [("required", json!(a.required)), ("location", at(a.lines))])
    };
    let answer = object([
        ("name", json!(name)),
        ("description", json!(description)),
        ("args", args.iter().map(arg).collect()),
        ("secrets", secrets.iter().map(asked).collect()),
        ("ssh", ssh.iter().map(asked).collect()),
        ("sources", json!([base64(&cx.file.data)])),
    ]);
    let mut text = String::new();
    if !name.is_empty() || !description.is_empty() {
        let shown = if name.is_empty() { "(default)" } else { &name };
        let mut rows = vec![vec!["TARGET:".to_owned(), shown.to_owned()]];
        if !description.is_empty() {
            rows.push(vec!["DESCRIPTION:".into(), description.clone()]);
        }
        text += &(table(&rows, 1) + "\n");
    }
    if !args.is_empty() {
        let mut rows = vec![["BUILD ARG", "VALUE", "DESCRIPTION"].map(String::from).to_vec()];
        rows.extend(
            args.iter().map(|a| vec![a.name.clone(), a.value.clone(), a.description.clone()]),
        );
        text += &(table(&rows, 3) + "\n");
    }
    for (title, list) in [("SECRET", &secrets), ("SSH", &ssh)] {
        if !list.is_empty() {
            let mut rows = vec![vec![title.to_owned(), "REQUIRED".into()]];
            rows.extend(list.iter().map(|a| {
                vec![a.name.clone(), if a.required { "true".into() } else { String::new() }]
            }));
            text += &(table(&rows, 3) + "\n");
        }
    }
    result(&answer, text, &[])
}

/// Converts everything and answers with what the rules found; a failing conversion is part of the
/// answer (row `dfs.lint`). Requests for columns get all mistakes and the advice too.
async fn lint(cx: &BuildContext) -> Result<FrontendResult> {
    let config = lint_config(cx);
    let mut linter = Linter::new(config.as_ref().ok().cloned().unwrap_or_default());
    let scope = if cx.options.target.is_empty() { Scope::All } else { Scope::Target };
    let checked = async {
        let config = config?;
        let file = parse(cx, &mut linter).map_err(|first| match cx.options.columns {
            true => all_mistakes(cx, first, config, &mut linter),
            false => first,
        })?;
        convert(cx, &file, None, scope, &mut linter).await.map(drop)
    };
    let failed = checked.await.err();
    let mut found = linter.take();
    let columns = cx.source();
    let source = columns.as_ref();
    let warning = |l: &Lint| {
        let mut warning = object([
            ("ruleName", json!(l.rule.name())),
            ("description", json!(l.rule.description())),
            ("url", json!(l.rule.url())),
            ("detail", json!(l.message)),
            (
                "location",
                location(&source.map_or_else(|| l.lines.spans(), |source| l.spans(source))),
            ),
        ]);
        if source.is_some() {
            warning["fix"] = json!({"advice": l.fix.advice, "replacement": l.fix.replacement});
        }
        warning
    };
    let warnings: Value =
        if found.is_empty() { Value::Null } else { found.iter().map(warning).collect() };
    let mut answer = json!({"warnings": warnings, "sources": [self::source(&cx.file)]});
    let bad = failed.is_some() || !found.is_empty();
    if let Some(failure) = failed {
        answer["buildError"] = error(&failure, source);
        if source.is_some() {
            answer["errors"] = std::iter::once(&failure)
                .chain(&failure.others)
                .map(|f| error(f, source))
                .collect();
        }
    }
    found.sort_by_key(|l| l.lines.start);
    let text: String = found.iter().map(|l| print(l, &cx.file)).collect();
    result(&answer, text, &[("result.statuscode", if bad { "1" } else { "0" })])
}

/// A file that does not parse once more, now with all that is wrong with it. `first` is what the
/// strict reading said.
fn all_mistakes(
    cx: &BuildContext,
    first: ConvertError,
    config: LintConfig,
    linter: &mut Linter,
) -> ConvertError {
    *linter = Linter::new(config);
    let (_, mistakes) = Dockerfile::diagnose(&cx.file.data, linter);
    ConvertError::all(mistakes.into_iter().map(ConvertError::from)).err().unwrap_or(first)
}

fn error(failure: &ConvertError, source: Option<&Source<'_>>) -> Value {
    let mut places = failure.spans(source);
    places.sort_by_key(|spans| (spans.first().map(|s| s.start.line), spans.len()));
    places.dedup();
    let mut error =
        json!({"message": failure.fault.to_string(), "location": location(&places.concat())});
    if source.is_some() {
        error["hints"] = failure.fault.hints().collect();
    }
    error
}

/// The Dockerfile as Go encodes `pb.SourceInfo`.
fn source(file: &SourceFile) -> Value {
    let definition = file.definition.as_deref().and_then(|d| Definition::decode(d).ok()).map(|d| {
        let metadata = d.metadata.iter().map(|(digest, m)| {
            let caps: serde_json::Map<String, Value> =
                m.caps.iter().map(|c| (c.clone(), Value::Bool(true))).collect();
            let description =
                if m.description.is_empty() { Value::Null } else { json!(m.description) };
            (digest.clone(), object([("description", description), ("caps", caps.into())]))
        });
        let locations = d
            .source
            .iter()
            .flat_map(|s| s.locations.keys())
            .map(|digest| (digest.clone(), json!({})));
        json!({
            "def": d.ops.iter().map(|op| base64(op)).collect::<Vec<_>>(),
            "metadata": metadata.collect::<serde_json::Map<_, _>>(),
            "Source": {"locations": locations.collect::<serde_json::Map<_, _>>()},
        })
    });
    object([
        ("filename", json!(file.filename)),
        ("data", json!(base64(&file.data))),
        ("definition", definition.unwrap_or(Value::Null)),
        ("language", json!(file.language)),
    ])
}

/// A warning with the lines it is about.
fn print(lint: &Lint, file: &SourceFile) -> String {
    let url =
        if lint.rule.url().is_empty() { String::new() } else { format!(" - {}", lint.rule.url()) };
    let mut out = format!("\nWARNING: {}{url}\n{}\n", lint.rule.name(), lint.message);
    let text = String::from_utf8_lossy(&file.data);
    let lines: Vec<&str> = text.split('\n').collect();
    let at = |line: i32| usize::try_from(line).unwrap_or(0);
    let (first, last) = (at(lint.lines.start), at(lint.lines.end.max(lint.lines.start)));
    if first < 1 || first > lines.len() {
        return out;
    }
    let (mut from, mut to) = (first, last.min(lines.len()));
    // Some lines around it, as the reference shows.
    let wanted = if to == from { 4 } else { 2 };
    let mut added = 0;
    while added < wanted {
        if from > 1 {
            from -= 1;
            added += 1;
        }
        if to != lines.len() {
            to += 1;
            added += 1;
        }
        added += 1;
    }
    out += &format!("{}:{first}\n--------------------\n", file.filename);
    for (i, line) in lines.iter().enumerate().take(to).skip(from - 1) {
        let mark = if (first..=last).contains(&(i + 1)) { ">>>" } else { "   " };
        out += &format!(" {:3} | {mark} {line}\n", i + 1);
    }
    out + "--------------------\n"
}
