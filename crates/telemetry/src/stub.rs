//! Spans as BuildKit keeps them with a build (row `so.h.trace`): the JSON of Go's `SpanStub`, one
//! document a line.

use crate::{
    context::TraceId,
    otlp::{AnyValue, KeyValue, Resource, Span, any_value, status},
};
use serde_json::{Value, json};
use shipway_fault::redact_text;
use shipway_oci::timestamp;
use std::time::{Duration, UNIX_EPOCH};

/// Media type of a build's trace.
pub const MEDIA_TYPE: &str = "application/vnd.buildkit.otlp.json.v0";
/// Longest text of a client's span.
const MAX_TEXT: usize = 4096;
/// Most attributes, events and links of a client's span.
const MAX_PARTS: usize = 128;
/// How deep a client's values are looked into.
const MAX_DEPTH: usize = 4;

/// A span as a line.
pub(crate) fn of(span: &Span, resource: &Resource, scope: &str) -> String {
    let status = span.status.as_ref();
    let events: Vec<Value> = span
        .events
        .iter()
        .take(MAX_PARTS)
        .map(|event| {
            json!({
                "Name": text(&event.name),
                "Attributes": attributes(&event.attributes),
                "DroppedAttributeCount": event.dropped_attributes_count,
                "Time": time(event.time_unix_nano),
            })
        })
        .collect();
    let links: Vec<Value> = span
        .links
        .iter()
        .take(MAX_PARTS)
        .map(|link| {
            json!({
                "SpanContext": context(&link.trace_id, &link.span_id, &link.trace_state, true),
                "Attributes": attributes(&link.attributes),
                "DroppedAttributeCount": link.dropped_attributes_count,
            })
        })
        .collect();
    let code = match status.map_or(status::StatusCode::Unset, |s| s.code()) {
        status::StatusCode::Unset => "Unset",
        status::StatusCode::Ok => "Ok",
        status::StatusCode::Error => "Error",
    };
    let line = json!({
        "Name": text(&span.name),
        "SpanContext": context(&span.trace_id, &span.span_id, &span.trace_state, false),
        "Parent": if span.parent_span_id.is_empty() {
            context(&[], &[], "", false)
        } else {
            context(&span.trace_id, &span.parent_span_id, "", false)
        },
        "SpanKind": span.kind,
        "StartTime": time(span.start_time_unix_nano),
        "EndTime": time(span.end_time_unix_nano),
        "Attributes": attributes(&span.attributes),
        "Events": events,
        "Links": links,
        "Status": {
            "Code": code,
            "Description": text(status.map_or("", |s| &s.message)),
        },
        "DroppedAttributes": span.dropped_attributes_count,
        "DroppedEvents": span.dropped_events_count,
        "DroppedLinks": span.dropped_links_count,
        "ChildSpanCount": 0,
        "Resource": attributes(&resource.attributes),
        "InstrumentationLibrary": { "Name": text(scope), "Version": "", "SchemaURL": "" },
    });
    format!("{line}\n")
}

/// The line that says that spans of a trace are missing.
pub(crate) fn dropped(trace: TraceId, count: usize) -> String {
    let span = Span {
        trace_id: trace.to_bytes().to_vec(),
        // Any that is valid and that nobody else has.
        span_id: (u64::MAX - count as u64).to_be_bytes().to_vec(),
        name: format!("{count} spans were dropped"),
        kind: 1,
        ..Span::default()
    };
    of(&span, &Resource::default(), "shipway")
}

fn text(of: &str) -> String {
    let mut text = redact_text(&of[..of.floor_char_boundary(MAX_TEXT)]);
    if of.len() > MAX_TEXT {
        text.push('…');
    }
    text
}

fn time(nanoseconds: u64) -> String {
    timestamp::format(UNIX_EPOCH + Duration::from_nanos(nanoseconds))
}

/// Ids of other lengths than they should have are none.
fn context(trace: &[u8], span: &[u8], state: &str, remote: bool) -> Value {
    let (zero, none) = ([0; 16], [0; 8]);
    json!({
        "TraceID": hex::encode(if trace.len() == 16 { trace } else { &zero }),
        "SpanID": hex::encode(if span.len() == 8 { span } else { &none }),
        "TraceFlags": "01",
        "TraceState": text(state),
        "Remote": remote,
    })
}

fn attributes(all: &[KeyValue]) -> Vec<Value> {
    all.iter()
        .take(MAX_PARTS)
        .map(|a| json!({ "Key": text(&a.key), "Value": value(a.value.as_ref()) }))
        .collect()
}

/// Of lists, clients read only those of texts.
fn value(of: Option<&AnyValue>) -> Value {
    use any_value::Value as Any;
    let (kind, value) = match of.and_then(|v| v.value.as_ref()) {
        Some(Any::BoolValue(v)) => ("BOOL", json!(v)),
        Some(Any::IntValue(v)) => ("INT64", json!(v)),
        Some(Any::DoubleValue(v)) if v.is_finite() => ("FLOAT64", json!(v)),
        Some(Any::ArrayValue(list)) => {
            let texts: Vec<_> =
                list.values.iter().take(MAX_PARTS).map(|v| plain(Some(v), 0)).collect();
            ("STRINGSLICE", json!(texts))
        }
        _ => ("STRING", json!(plain(of, 0))),
    };
    json!({ "Type": kind, "Value": value })
}

/// A value as a text.
fn plain(of: Option<&AnyValue>, depth: usize) -> String {
    use any_value::Value as Any;
    if depth == MAX_DEPTH {
        return "…".to_owned();
    }
    match of.and_then(|v| v.value.as_ref()) {
        None => String::new(),
        Some(Any::StringValue(v)) => text(v),
        Some(Any::BoolValue(v)) => v.to_string(),
        Some(Any::IntValue(v)) => v.to_string(),
        Some(Any::DoubleValue(v)) => v.to_string(),
        Some(Any::BytesValue(v)) => hex::encode(&v[..v.len().min(MAX_TEXT)]),
        Some(Any::ArrayValue(list)) => {
            let all = list.values.iter().take(MAX_PARTS).map(|v| plain(Some(v), depth + 1));
            text(&all.collect::<Vec<_>>().join(","))
        }
        Some(Any::KvlistValue(list)) => {
            let pair = |a: &KeyValue| format!("{}={}", a.key, plain(a.value.as_ref(), depth + 1));
            text(&list.values.iter().take(MAX_PARTS).map(pair).collect::<Vec<_>>().join(","))
        }
        Some(_) => String::new(),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::otlp::{ArrayValue, span};

    fn any(value: any_value::Value) -> Option<AnyValue> {
        Some(AnyValue { value: Some(value) })
    }

    fn attribute(key: &str, value: any_value::Value) -> KeyValue {
        KeyValue { key: key.into(), value: any(value), ..KeyValue::default() }
    }

    #[test]
    fn a_span_has_the_form_that_clients_read() {
        use any_value::Value as Any;
        let list = vec![AnyValue { value: Some(Any::IntValue(1)) }];
        let span = Span {
            trace_id: vec![0xab; 16],
            span_id: vec![0xcd; 8],
            parent_span_id: vec![0xef; 8],
            name: "FROM https://u:p@r.example/i".into(),
            kind: span::SpanKind::Client as i32,
            start_time_unix_nano: 1_000_000_001,
            end_time_unix_nano: 2_000_000_000,
            attributes: vec![
                attribute("s", Any::StringValue("t".into())),
                attribute("b", Any::BoolValue(true)),
                attribute("i", Any::IntValue(-4)),
                attribute("f", Any::DoubleValue(0.5)),
                attribute("nan", Any::DoubleValue(f64::NAN)),
                attribute("l", Any::ArrayValue(ArrayValue { values: list })),
            ],
            status: Some(crate::otlp::Status {
                code: status::StatusCode::Error as i32,
                message: "no".into(),
            }),
            ..Span::default()
        };
        let line = of(&span, &Resource::default(), "lib");
        assert!(line.ends_with("}\n") && line.lines().count() == 1);
        let read: Value = serde_json::from_str(&line).unwrap();
        assert_eq!(read["Name"], "FROM https://xxxxx:xxxxx@r.example/i");
        assert_eq!(read["SpanContext"]["TraceID"], "ab".repeat(16));
        assert_eq!(read["Parent"]["SpanID"], "ef".repeat(8));
        assert_eq!(read["StartTime"], "1970-01-01T00:00:01.000000001Z");
        assert_eq!((&read["SpanKind"], &read["Status"]["Code"]), (&json!(3), &json!("Error")));
        let values: Vec<_> = read["Attributes"]
            .as_array()
            .unwrap()
            .iter()
            .map(|a| {
                format!(
                    "{}:{}={}",
                    a["Key"].as_str().unwrap(),
                    a["Value"]["Type"].as_str().unwrap(),
                    a["Value"]["Value"]
                )
            })
            .collect();
        let expected = [
            r#"s:STRING="t""#,
            "b:BOOL=true",
            "i:INT64=-4",
            "f:FLOAT64=0.5",
            r#"nan:STRING="NaN""#,
            r#"l:STRINGSLICE=["1"]"#,
        ];
        assert_eq!(values, expected);
    }

    #[test]
    fn hostile_spans_become_small_lines() {
        use any_value::Value as Any;
        let mut deep = any(Any::StringValue("x".into()));
        for _ in 0..50 {
            deep = any(Any::ArrayValue(ArrayValue { values: deep.into_iter().collect() }));
        }
        let long = attribute(&"k".repeat(MAX_TEXT + 1), Any::StringValue("v".repeat(1 << 20)));
        let deep = KeyValue { key: "deep".into(), value: deep, ..KeyValue::default() };
        let span = Span {
            trace_id: vec![1],
            span_id: vec![2; 100],
            attributes: vec![long, deep],
            start_time_unix_nano: u64::MAX,
            events: vec![span::Event::default(); MAX_PARTS + 1],
            ..Span::default()
        };
        let line = of(&span, &Resource::default(), "");
        assert!(line.len() < 30_000, "{}", line.len());
        let read: Value = serde_json::from_str(&line).unwrap();
        assert_eq!(read["SpanContext"]["TraceID"], "0".repeat(32));
        assert_eq!(read["Events"].as_array().unwrap().len(), MAX_PARTS);
        assert_eq!(read["Attributes"][1]["Value"]["Value"][0], "…");
    }
}
