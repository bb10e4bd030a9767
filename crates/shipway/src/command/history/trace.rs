//! `history trace`: what a build's time went to, as a tree, or as JSON for Jaeger.

use serde::Deserialize;
use serde_json::{Value, json};
use shipway_fault::{Fault, Result};
use shipway_oci::timestamp;
use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fmt::Write as _,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// A span as it is kept: Go's `SpanStub`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct Span {
    name: String,
    span_context: Context,
    parent: Context,
    span_kind: i64,
    start_time: String,
    end_time: String,
    attributes: Option<Vec<Attribute>>,
    events: Option<Vec<Event>>,
    links: Option<Vec<Link>>,
    status: Status,
    resource: Option<Vec<Attribute>>,
    instrumentation_library: Library,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct Context {
    #[serde(rename = "TraceID")]
    trace: String,
    #[serde(rename = "SpanID")]
    span: String,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct Attribute {
    key: String,
    value: Typed,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct Typed {
    r#type: String,
    value: Value,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct Event {
    name: String,
    attributes: Option<Vec<Attribute>>,
    time: String,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct Link {
    span_context: Context,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct Status {
    code: String,
    description: String,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct Library {
    name: String,
    version: String,
}

impl Span {
    fn start(&self) -> SystemTime {
        timestamp::parse(&self.start_time).unwrap_or(UNIX_EPOCH)
    }

    fn took(&self) -> Duration {
        let end = timestamp::parse(&self.end_time).unwrap_or(UNIX_EPOCH);
        end.duration_since(self.start()).unwrap_or_default()
    }

    fn failure(&self) -> Option<&str> {
        (self.status.code == "Error").then_some(&self.status.description)
    }
}

fn parse(trace: &[u8]) -> Result<Vec<Span>> {
    let spans = serde_json::Deserializer::from_slice(trace).into_iter();
    let spans: Vec<Span> = spans
        .collect::<std::result::Result<_, _>>()
        .map_err(|e| Fault::unknown(format!("failed to parse the trace: {e}")))?;
    if spans.is_empty() { Err(Fault::not_found("the trace has no spans")) } else { Ok(spans) }
}

fn time(of: Duration) -> String {
    match of.as_secs_f64() {
        seconds if seconds < 1.0 => format!("{:.1} ms", seconds * 1e3),
        seconds => format!("{seconds:.2} s"),
    }
}

/// Control characters of a daemon are none of the terminal's.
fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// A line a span: how long after the first it began, how long it took, and what it is, below what
/// it was done for. Alike calls in a row are one line.
pub(super) fn tree(trace: &[u8]) -> Result<String> {
    let mut spans = parse(trace)?;
    spans.sort_by_key(Span::start);
    let began = spans[0].start();
    let known: HashSet<&str> = spans.iter().map(|s| &*s.span_context.span).collect();
    let mut below: HashMap<&str, Vec<usize>> = HashMap::new();
    let mut roots = Vec::new();
    for (at, span) in spans.iter().enumerate() {
        match known.contains(&*span.parent.span) {
            true => below.entry(&span.parent.span).or_default().push(at),
            false => roots.push(at),
        }
    }
    let children = |at: usize| below.get(&*spans[at].span_context.span).map_or(&[][..], |c| c);
    let mut text = String::new();
    let mut shown = HashSet::new();
    // Groups of alike spans that are yet to be shown, with their depth; the next one is the last.
    let grouped = |all: &[usize]| {
        let mut groups: Vec<Vec<usize>> = Vec::new();
        for at in all {
            match groups.last_mut() {
                Some(group)
                    if spans[group[0]].name == spans[*at].name
                        && spans[*at].failure() == spans[group[0]].failure()
                        && children(group[0]).is_empty()
                        && children(*at).is_empty() =>
                {
                    group.push(*at);
                }
                _ => groups.push(vec![*at]),
            }
        }
        groups
    };
    let mut todo: Vec<(usize, Vec<usize>)> =
        grouped(&roots).into_iter().rev().map(|group| (0, group)).collect();
    while let Some((depth, group)) = todo.pop() {
        // What is its own ancestor is shown once.
        if !shown.insert(group[0]) {
            continue;
        }
        let span = &spans[group[0]];
        let after = span.start().duration_since(began).unwrap_or_default();
        let took = group.iter().map(|at| spans[*at].took()).sum();
        let times = if group.len() > 1 { format!(" ×{}", group.len()) } else { String::new() };
        let failed = span.failure().map(|why| format!("  ERROR: {}", printable(why)));
        let _ = writeln!(
            text,
            "{:>10} {:>10}  {}{}{times}{}",
            format!("+{}", time(after)),
            time(took),
            "  ".repeat(depth.min(MAX_INDENT)),
            printable(&span.name),
            failed.unwrap_or_default(),
        );
        let next = grouped(children(group[0])).into_iter().rev();
        todo.extend(next.map(|group| (depth + 1, group)));
    }
    Ok(text)
}

/// Deepest indentation.
const MAX_INDENT: usize = 20;

/// The trace as Jaeger's HTTP API has it, which its viewer takes as a file.
pub(super) fn jaeger(trace: &[u8]) -> Result<String> {
    let spans = parse(trace)?;
    let mut processes: Vec<(Value, String)> = Vec::new();
    let mut traces: BTreeMap<String, Vec<Value>> = BTreeMap::new();
    for span in &spans {
        let process = process(span.resource.as_deref().unwrap_or_default());
        let id = match processes.iter().find(|(known, _)| *known == process) {
            Some((_, id)) => id.clone(),
            None => {
                let id = format!("p{}", processes.len() + 1);
                processes.push((process, id.clone()));
                id
            }
        };
        traces.entry(span.span_context.trace.clone()).or_default().push(converted(span, &id));
    }
    let processes: serde_json::Map<_, _> =
        processes.into_iter().map(|(process, id)| (id, process)).collect();
    let data: Vec<_> = traces
        .into_iter()
        .map(|(id, spans)| {
            json!({ "traceID": id, "spans": spans, "processes": processes, "warnings": null })
        })
        .collect();
    serde_json::to_string_pretty(&json!({ "data": data }))
        .map_err(|e| Fault::internal(format!("format the trace: {e}")))
}

fn process(resource: &[Attribute]) -> Value {
    const SERVICE: &str = "service.name";
    let name =
        resource.iter().find(|a| a.key == SERVICE).map_or(Value::Null, |a| a.value.value.clone());
    let tags: Vec<_> = resource.iter().filter(|a| a.key != SERVICE).map(tag).collect();
    json!({ "serviceName": name.as_str().unwrap_or_default(), "tags": tags })
}

fn tag(attribute: &Attribute) -> Value {
    let Typed { r#type, value } = &attribute.value;
    let (kind, value) = match r#type.as_str() {
        "BOOL" => ("bool", value.clone()),
        "INT64" => ("int64", value.clone()),
        "FLOAT64" => ("float64", value.clone()),
        "STRING" => ("string", value.clone()),
        _ => ("string", Value::String(value.to_string())),
    };
    json!({ "key": attribute.key, "type": kind, "value": value })
}

fn word(key: &str, value: &str) -> Value {
    json!({ "key": key, "type": "string", "value": value })
}

fn micros(of: Duration) -> u64 {
    u64::try_from(of.as_micros()).unwrap_or(u64::MAX)
}

fn since_epoch(of: SystemTime) -> u64 {
    micros(of.duration_since(UNIX_EPOCH).unwrap_or_default())
}

fn converted(span: &Span, process: &str) -> Value {
    let mut tags: Vec<_> = span.attributes.iter().flatten().map(tag).collect();
    let Library { name, version } = &span.instrumentation_library;
    tags.extend((!name.is_empty()).then(|| word("otel.library.name", name)));
    tags.extend((!version.is_empty()).then(|| word("otel.library.version", version)));
    let kind = match span.span_kind {
        2 => Some("server"),
        3 => Some("client"),
        4 => Some("producer"),
        5 => Some("consumer"),
        _ => None,
    };
    tags.extend(kind.map(|kind| word("span.kind", kind)));
    match &*span.status.code {
        "Ok" => tags.push(word("otel.status_code", "OK")),
        "Error" => {
            tags.push(json!({ "key": "error", "type": "bool", "value": true }));
            tags.push(word("otel.status_code", "ERROR"));
        }
        _ => {}
    }
    if !span.status.description.is_empty() {
        tags.push(word("otel.status_description", &span.status.description));
    }
    let reference = |kind: &str, to: &Context| json!({ "refType": kind, "traceID": to.trace, "spanID": to.span });
    let links = span.links.iter().flatten().map(|l| reference("FOLLOWS_FROM", &l.span_context));
    let references: Vec<_> = links.chain([reference("CHILD_OF", &span.parent)]).collect();
    let logs: Vec<_> = span
        .events
        .iter()
        .flatten()
        .map(|event| {
            let fields = event.attributes.iter().flatten().map(tag);
            let fields: Vec<_> = [word("event", &event.name)].into_iter().chain(fields).collect();
            let at = timestamp::parse(&event.time).unwrap_or(UNIX_EPOCH);
            json!({ "timestamp": since_epoch(at), "fields": fields })
        })
        .collect();
    json!({
        "traceID": span.span_context.trace,
        "spanID": span.span_context.span,
        "flags": 1,
        "operationName": span.name,
        "references": references,
        "startTime": since_epoch(span.start()),
        "duration": micros(span.took()),
        "tags": tags,
        "logs": logs,
        "processID": process,
        "warnings": null,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(name: &str, id: u8, parent: u8, start: u64, end: u64) -> Value {
        let context =
            |id: u8| json!({ "TraceID": "ab".repeat(16), "SpanID": format!("{id:016x}") });
        let at = |ms| timestamp::format(UNIX_EPOCH + Duration::from_millis(ms));
        json!({
            "Name": name, "SpanContext": context(id), "Parent": context(parent), "SpanKind": 3,
            "StartTime": at(start), "EndTime": at(end), "Links": null, "Events": null,
            "Attributes": [{ "Key": "n", "Value": { "Type": "INT64", "Value": 4 } }],
            "Status": { "Code": "Unset", "Description": "" },
            "Resource": [{ "Key": "service.name", "Value": { "Type": "STRING", "Value": "shipwayd" } }],
        })
    }

    fn trace(spans: &[Value]) -> Vec<u8> {
        spans.iter().map(|s| format!("{s}\n")).collect::<String>().into_bytes()
    }

    #[test]
    fn a_tree_has_what_was_done_below_what_it_was_done_for() {
        let mut failed = span("RUN \u{1b}false", 5, 1, 1010, 3010);
        failed["Status"] = json!({ "Code": "Error", "Description": "exit code: 1" });
        let all = [
            span("call", 3, 2, 1002, 1003),
            span("call", 4, 2, 1004, 1006),
            failed,
            span("FROM busybox", 2, 1, 1001, 1009),
            span("Solve", 1, 0, 1000, 3020),
            // They are each other's parents.
            span("odd", 8, 9, 1000, 1000),
            span("odder", 9, 8, 1000, 1000),
        ];
        let expected = "\
  +0.0 ms     2.02 s  Solve
  +1.0 ms     8.0 ms    FROM busybox
  +2.0 ms     3.0 ms      call ×2
 +10.0 ms     2.00 s    RUN  false  ERROR: exit code: 1
";
        let text = tree(&trace(&all)).unwrap();
        let lines =
            |text: &str| text.lines().map(|l| l.trim_start().to_owned()).collect::<Vec<_>>();
        assert_eq!(lines(&text), lines(expected));
        assert!(tree(b"").is_err() && tree(b"{").is_err());
    }

    #[test]
    fn jaeger_gets_what_its_viewer_reads() {
        let text = jaeger(&trace(&[span("a", 1, 0, 1, 3), span("b", 2, 1, 2, 3)])).unwrap();
        let read: Value = serde_json::from_str(&text).unwrap();
        let of = &read["data"][0];
        assert_eq!(of["traceID"], "ab".repeat(16));
        assert_eq!(of["processes"]["p1"]["serviceName"], "shipwayd");
        let b = &of["spans"][1];
        assert_eq!((&b["startTime"], &b["duration"]), (&json!(2000), &json!(1000)));
        assert_eq!(b["references"][0]["spanID"], format!("{:016x}", 1));
        assert_eq!(b["tags"][0], json!({ "key": "n", "type": "int64", "value": 4 }));
        assert_eq!(b["tags"][1]["value"], "client");
    }
}
