//! The image config as it is written: the frontend's, with layers, history and times completed (row `ex.c.config`).

use base64::Engine as _;
use serde_json::{Value, value::RawValue};
use shipway_fault::{Fault, Result};
use shipway_oci::{DiffId, ImageConfig, Platform, timestamp};
use std::{collections::BTreeMap, time::SystemTime};

/// Mark of history entries that this exporter adds.
const COMMENT: &str = "buildkit.exporter.image.v0";
/// Field that holds a build cache (row `rc.inline`).
const INLINE_CACHE: &str = "moby.buildkit.cache.v0";
/// What Linux containers find programs in.
const DEFAULT_PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What is known of a layer besides its digest.
pub(crate) struct LayerNote {
    pub diff_id: DiffId,
    pub created_by: String,
    pub created: SystemTime,
}

/// A config for a result that came without one.
fn synthesised(platform: &Platform) -> Result<Vec<u8>> {
    let mut config = ImageConfig::empty(platform);
    config.config.working_dir = "/".into();
    if platform.os != "windows" {
        config.config.env = vec![DEFAULT_PATH.into()];
    }
    serde_json::to_vec(&config).map_err(|e| Fault::internal(format!("encode an image config: {e}")))
}

fn raw(value: &impl serde::Serialize) -> Result<Box<RawValue>> {
    serde_json::value::to_raw_value(value).map_err(|e| Fault::internal(format!("encode an image config: {e}")))
}

/// The final bytes. Keys are sorted, as Go's encoder does with maps, so that digests agree.
pub(crate) fn complete(
    given: Option<&[u8]>,
    base: Option<&[u8]>,
    platform: &Platform,
    layers: &[LayerNote],
    epoch: Option<SystemTime>,
    cache: Option<&[u8]>,
) -> Result<Vec<u8>> {
    let bytes = match given {
        Some(bytes) => bytes.to_vec(),
        None => synthesised(platform)?,
    };
    let bad = |e: serde_json::Error| Fault::invalid(format!("invalid image config for export: {e}"));
    if bytes.trim_ascii() == b"null" {
        return Err(Fault::invalid("invalid null image config for export"));
    }
    let mut fields: BTreeMap<String, Box<RawValue>> = serde_json::from_slice(&bytes).map_err(bad)?;
    for key in ["os", "architecture"] {
        let present = fields.get(key).is_some_and(|v| v.get().len() > 2);
        if !present {
            return Err(Fault::invalid(format!("invalid image config for export: missing {key}")));
        }
    }
    let parsed: BTreeMap<String, Value> = serde_json::from_slice(&bytes).map_err(bad)?;
    let history = match parsed.get("history") {
        Some(Value::Array(entries)) => entries.clone(),
        _ => Vec::new(),
    };
    let mut history = padded(history, layers);
    if let Some(epoch) = epoch {
        let base: Vec<Value> = base
            .and_then(|b| serde_json::from_slice::<Value>(b).ok())
            .and_then(|v| v.get("history").and_then(Value::as_array).cloned())
            .unwrap_or_default();
        clamp(&mut history, &base, epoch);
    }
    // What the frontend's config says of a cache is that of another image.
    fields.remove(INLINE_CACHE);
    if let Some(cache) = cache {
        fields.insert(INLINE_CACHE.into(), raw(&base64::engine::general_purpose::STANDARD.encode(cache))?);
    }
    let diff_ids: Vec<_> = layers.iter().map(|l| l.diff_id).collect();
    fields.insert("rootfs".into(), raw(&serde_json::json!({ "type": "layers", "diff_ids": diff_ids }))?);
    let last = history.iter().rev().find_map(|h| h.get("created").cloned());
    fields.insert("history".into(), raw(&history)?);
    match (fields.get("created"), epoch) {
        (Some(created), Some(epoch)) => {
            let text: Option<String> = serde_json::from_str(created.get()).map_err(bad)?;
            if text.as_deref().and_then(timestamp::parse).is_some_and(|t| t > epoch) {
                fields.insert("created".into(), raw(&timestamp::format(epoch))?);
            }
        }
        (Some(_), None) => {}
        (None, _) => {
            fields.insert("created".into(), raw(&last)?);
        }
    }
    serde_json::to_vec(&fields).map_err(|e| Fault::internal(format!("encode an image config: {e}")))
}

fn is_empty_layer(entry: &Value) -> bool {
    entry.get("empty_layer").and_then(Value::as_bool).unwrap_or(false)
}

/// The history with exactly one non-empty entry per layer, each with a time: its layer's, and for entries without a layer
/// that of the entry before, or of the first new layer.
fn padded(mut history: Vec<Value>, layers: &[LayerNote]) -> Vec<Value> {
    let time = |layer: &LayerNote| Value::String(timestamp::format(layer.created));
    let mut rest = layers.iter();
    for entry in &mut history {
        if is_empty_layer(entry) {
            continue;
        }
        match rest.next() {
            // More entries than layers should not be; those that have none are marked so.
            None => entry["empty_layer"] = Value::Bool(true),
            Some(layer) if lacks_time(entry) => entry["created"] = time(layer),
            Some(_) => {}
        }
    }
    history.extend(rest.map(|layer| serde_json::json!({ "created": time(layer), "created_by": layer.created_by, "comment": COMMENT })));
    let first_lacking = history.iter().position(lacks_time).unwrap_or(history.len());
    let after = history[first_lacking..].iter().find(|e| !lacks_time(e));
    let any = after.or_else(|| history.iter().rev().find(|e| !lacks_time(e)));
    let mut last = any.map_or_else(|| Value::String(timestamp::format(SystemTime::now())), |e| e["created"].clone());
    for entry in &mut history {
        match lacks_time(entry) {
            true => entry["created"] = last.clone(),
            false => last = entry["created"].clone(),
        }
    }
    history.into_iter().map(in_order).collect()
}

fn lacks_time(entry: &Value) -> bool {
    entry.get("created").is_none_or(Value::is_null)
}

/// An entry with its fields in the specification's order.
fn in_order(entry: Value) -> Value {
    let Value::Object(mut fields) = entry else { return entry };
    let mut out = serde_json::Map::new();
    for key in ["created", "created_by", "author", "comment", "empty_layer"] {
        if let Some(value) = fields.remove(key) {
            let absent = matches!(&value, Value::Bool(false)) || matches!(&value, Value::String(s) if s.is_empty());
            if !absent {
                out.insert(key.into(), value);
            }
        }
    }
    out.extend(fields);
    Value::Object(out)
}

/// Times later than `epoch` become `epoch`, but for the entries that the base image has.
fn clamp(history: &mut [Value], base: &[Value], epoch: SystemTime) {
    let mut diverged = false;
    for (i, entry) in history.iter_mut().enumerate() {
        if !diverged && base.get(i).cloned().map(in_order).as_ref() == Some(entry) {
            continue;
        }
        diverged = true;
        let time = entry.get("created").and_then(Value::as_str).and_then(timestamp::parse);
        if time.is_none_or(|t| t > epoch) {
            entry["created"] = Value::String(timestamp::format(epoch));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use shipway_oci::Digest;

    fn note(name: &str) -> LayerNote {
        LayerNote { diff_id: DiffId(Digest::of(name)), created_by: name.into(), created: timestamp::parse("2020-01-01T00:00:00Z").unwrap() }
    }

    fn check(config: &str, layers: &[&str], epoch: Option<&str>) -> Value {
        let layers: Vec<_> = layers.iter().map(|l| note(l)).collect();
        let epoch = epoch.map(|e| timestamp::parse(e).unwrap());
        let bytes = complete(Some(config.as_bytes()), None, &Platform::host(), &layers, epoch, None).unwrap();
        serde_json::from_slice(&bytes).unwrap()
    }

    #[test]
    fn missing_history_is_padded_and_surplus_is_marked() {
        let c = check(r#"{"os":"linux","architecture":"amd64"}"#, &["a", "b"], None);
        assert_eq!(c["history"].as_array().unwrap().len(), 2);
        assert_eq!(c["history"][1]["created_by"], "b");
        let c = check(r#"{"os":"linux","architecture":"amd64","history":[{"created_by":"x"},{"created_by":"y"}]}"#, &["a"], None);
        assert_eq!((c["history"][0].get("empty_layer"), &c["history"][1]["empty_layer"]), (None, &Value::Bool(true)));
        assert_eq!(c["rootfs"]["diff_ids"].as_array().unwrap().len(), 1);
    }

    #[test]
    fn the_epoch_clamps_times() {
        let c = check(r#"{"os":"linux","architecture":"amd64","created":"2026-01-01T00:00:00Z"}"#, &["a"], Some("2001-01-01T00:00:00Z"));
        assert_eq!(c["created"], "2001-01-01T00:00:00Z");
        assert_eq!(c["history"][0]["created"], "2001-01-01T00:00:00Z");
    }

    #[test]
    fn a_config_without_platform_is_refused() {
        let bad = complete(Some(b"{\"os\":\"linux\"}"), None, &Platform::host(), &[], None, None).unwrap_err();
        assert!(bad.to_string().contains("missing architecture"));
    }
}
