//! The image config as it is written: the frontend's, with layers, history and times completed (row
//! `ex.c.config`).

use base64::Engine as _;
use serde::Deserialize;
use serde_json::value::RawValue;
use shipway_fault::{Fault, Result};
use shipway_oci::{DiffId, History, ImageConfig, Platform, RootFs, gojson, timestamp};
use std::{collections::BTreeMap, time::SystemTime};

/// Mark of history entries that this exporter adds.
const COMMENT: &str = "buildkit.exporter.image.v0";
/// Field that holds a build cache (row `rc.inline`).
const INLINE_CACHE: &str = "moby.buildkit.cache.v0";
/// What Linux containers find programs in.
const DEFAULT_PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What is known of a layer besides its digest.
pub(crate) struct LayerHistory {
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

/// What is read of a config; everything else is passed on as it is written.
#[derive(Deserialize)]
struct Known {
    #[serde(default)]
    os: Option<String>,
    #[serde(default)]
    architecture: Option<String>,
    #[serde(default)]
    history: Option<Vec<History>>,
}

/// The final bytes, which are those that BuildKit writes for the same input: keys sorted, other
/// fields passed on but for white space and what Go escapes, history entries read and written
/// again.
pub(crate) fn complete(
    given: Option<&[u8]>,
    base: Option<&[u8]>,
    platform: &Platform,
    layers: &[LayerHistory],
    epoch: Option<SystemTime>,
    cache: Option<&[u8]>,
) -> Result<Vec<u8>> {
    let bytes = match given.filter(|g| !g.is_empty()) {
        Some(bytes) => bytes.to_vec(),
        None => synthesised(platform)?,
    };
    let bad =
        |e: serde_json::Error| Fault::invalid(format!("invalid image config for export: {e}"));
    let raw = |value: serde_json::Result<Box<RawValue>>| {
        value.map_err(|e| Fault::internal(format!("encode an image config: {e}")))
    };
    if bytes.trim_ascii() == b"null" {
        return Err(Fault::invalid("invalid null image config for export"));
    }
    let mut fields: BTreeMap<String, Box<RawValue>> =
        serde_json::from_slice(&bytes).map_err(bad)?;
    let known: Known = serde_json::from_slice(&bytes).map_err(bad)?;
    for (key, value) in [("os", &known.os), ("architecture", &known.architecture)] {
        if value.as_deref().unwrap_or_default().is_empty() {
            return Err(Fault::invalid(format!("invalid image config for export: missing {key}")));
        }
    }
    let mut history = padded(known.history, layers);
    if let Some(epoch) = epoch {
        let base = base
            .and_then(|b| serde_json::from_slice::<ImageConfig>(b).ok())
            .map(|b| b.history)
            .unwrap_or_default();
        clamp(history.as_deref_mut().unwrap_or_default(), &base, epoch);
    }
    if let Some(cache) = cache {
        let text = base64::engine::general_purpose::STANDARD.encode(cache);
        fields.insert(INLINE_CACHE.into(), raw(serde_json::value::to_raw_value(&text))?);
    }
    let rootfs =
        RootFs { kind: "layers".into(), diff_ids: layers.iter().map(|l| l.diff_id).collect() };
    fields.insert("rootfs".into(), raw(serde_json::value::to_raw_value(&rootfs))?);
    let last = history.iter().flatten().rev().find_map(|h| h.created.clone());
    fields.insert("history".into(), raw(serde_json::value::to_raw_value(&history))?);
    match (fields.get("created"), epoch) {
        (Some(created), Some(epoch)) => {
            let text: Option<String> = serde_json::from_str(created.get()).map_err(bad)?;
            let time = text.map(|t| {
                timestamp::parse(&t).ok_or_else(|| {
                    Fault::invalid(format!("failed to unmarshal creation time {t:?}"))
                })
            });
            if time.transpose()?.is_some_and(|t| t > epoch) {
                fields.insert(
                    "created".into(),
                    raw(serde_json::value::to_raw_value(&timestamp::format(epoch)))?,
                );
            }
        }
        (Some(_), None) => {}
        (None, _) => {
            fields.insert("created".into(), raw(serde_json::value::to_raw_value(&last))?);
        }
    }
    let json = serde_json::to_string(&fields)
        .map_err(|e| Fault::internal(format!("encode an image config: {e}")))?;
    Ok(gojson::compact(&json).into_bytes())
}

/// The history with exactly one non-empty entry per layer. Entries without a time get their
/// layer's, and where they have no layer that of the entry before, or at first that of the first
/// new layer. `None` is what Go calls a nil list.
fn padded(history: Option<Vec<History>>, layers: &[LayerHistory]) -> Option<Vec<History>> {
    let mut unnamed = layers.iter();
    let mut history = history;
    for entry in history.iter_mut().flatten().filter(|e| !e.empty_layer) {
        match unnamed.next() {
            // More entries than layers should not be; those that have none are marked so.
            None => entry.empty_layer = true,
            Some(layer) if entry.created.is_none() => {
                entry.created = Some(timestamp::format(layer.created))
            }
            Some(_) => {}
        }
    }
    if unnamed.len() > 0 {
        let added = unnamed.map(|layer| History {
            created: Some(timestamp::format(layer.created)),
            created_by: layer.created_by.clone(),
            comment: COMMENT.into(),
            ..History::default()
        });
        history.get_or_insert_default().extend(added);
    }
    let entries = history.as_deref_mut().unwrap_or_default();
    let lacking = entries.iter().position(|e| e.created.is_none()).unwrap_or(entries.len());
    let (before, after) = entries.split_at_mut(lacking);
    let first_new = after.iter().find_map(|e| e.created.clone());
    let mut last = first_new.or_else(|| before.iter().rev().find_map(|e| e.created.clone()));
    for entry in after {
        match &entry.created {
            None => entry.created = last.clone(),
            Some(time) => last = Some(time.clone()),
        }
    }
    history
}

/// Times later than `epoch` become `epoch`, but for the entries that the base image has.
fn clamp(history: &mut [History], base: &[History], epoch: SystemTime) {
    let inherited = history.iter().zip(base).take_while(|(h, b)| h == b).count();
    for entry in history.iter_mut().skip(inherited) {
        let time = entry.created.as_deref().and_then(timestamp::parse);
        if time.is_none_or(|t| t > epoch) {
            entry.created = Some(timestamp::format(epoch));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;
    use shipway_oci::Digest;

    fn note(name: &str) -> LayerHistory {
        LayerHistory {
            diff_id: DiffId(Digest::of(name)),
            created_by: name.into(),
            created: timestamp::parse("2020-01-01T00:00:00Z").unwrap(),
        }
    }

    fn text(config: &str, base: Option<&str>, layers: &[&str], epoch: Option<&str>) -> String {
        let layers: Vec<_> = layers.iter().map(|l| note(l)).collect();
        let epoch = epoch.map(|e| timestamp::parse(e).unwrap());
        let bytes = complete(
            Some(config.as_bytes()),
            base.map(str::as_bytes),
            &Platform::host(),
            &layers,
            epoch,
            None,
        )
        .unwrap();
        String::from_utf8(bytes).unwrap()
    }

    fn check(config: &str, layers: &[&str], epoch: Option<&str>) -> Value {
        serde_json::from_str(&text(config, None, layers, epoch)).unwrap()
    }

    #[test]
    fn missing_history_is_padded_and_surplus_is_marked() {
        let c = check(r#"{"os":"linux","architecture":"amd64"}"#, &["a", "b"], None);
        assert_eq!(c["history"].as_array().unwrap().len(), 2);
        assert_eq!(c["history"][1]["created_by"], "b");
        let c = check(
            r#"{"os":"linux","architecture":"amd64","history":[{"created_by":"x"},{"created_by":"y"}]}"#,
            &["a"],
            None,
        );
        assert_eq!(
            (c["history"][0].get("empty_layer"), &c["history"][1]["empty_layer"]),
            (None, &Value::Bool(true))
        );
        assert_eq!(c["rootfs"]["diff_ids"].as_array().unwrap().len(), 1);
    }

    #[test]
    fn the_epoch_clamps_times() {
        let c = check(
            r#"{"os":"linux","architecture":"amd64","created":"2026-01-01T00:00:00Z"}"#,
            &["a"],
            Some("2001-01-01T00:00:00Z"),
        );
        assert_eq!(c["created"], "2001-01-01T00:00:00Z");
        assert_eq!(c["history"][0]["created"], "2001-01-01T00:00:00Z");
    }

    /// Worked out by hand from what Go's encoder and BuildKit's exporter do.
    #[test]
    fn the_bytes_are_those_of_go() {
        let (a, b) = (DiffId(Digest::of("a")), DiffId(Digest::of("b")));
        let diffs = |ids: &str| format!(r#""rootfs":{{"type":"layers","diff_ids":{ids}}}"#);
        let (none, one, two) =
            (diffs("null"), diffs(&format!(r#"["{a}"]"#)), diffs(&format!(r#"["{a}","{b}"]"#)));
        let os = r#""architecture":"amd64""#;
        for (name, given, layers, epoch, want) in [
            (
                "nothing",
                r#"{"os":"linux","architecture":"amd64"}"#,
                &[][..],
                None,
                format!(r#"{{{os},"created":null,"history":null,"os":"linux",{none}}}"#),
            ),
            (
                "an empty list stays one",
                r#"{"os":"linux","architecture":"amd64","history":[],"rootfs":null}"#,
                &[],
                None,
                format!(r#"{{{os},"created":null,"history":[],"os":"linux",{none}}}"#),
            ),
            (
                "steps without layers have no time of their own",
                r#"{"os":"linux","architecture":"amd64","history":[{"created_by":"ENV A=<b>","empty_layer":true,"x":1}]}"#,
                &[],
                None,
                format!(
                    r#"{{{os},"created":null,"history":[{{"created_by":"ENV A=\u003cb\u003e","empty_layer":true}}],"os":"linux",{none}}}"#
                ),
            ),
            (
                "unknown fields, escapes and numbers are passed on",
                r#"{"os":"linux", "architecture":"amd64",
                "z": {"k": [1.0, 1e3, "a & b\u0026\/"]}, "config":{"Env":null, "Cmd":[]}, "moby.buildkit.cache.v0": "e30="}"#,
                &["a"],
                None,
                format!(
                    r#"{{{os},"config":{{"Env":null,"Cmd":[]}},"created":"2020-01-01T00:00:00Z","history":[{{"created":"2020-01-01T00:00:00Z","created_by":"a","comment":"buildkit.exporter.image.v0"}}],"moby.buildkit.cache.v0":"e30=","os":"linux",{one},"z":{{"k":[1.0,1e3,"a \u0026 b\u0026\/"]}}}}"#
                ),
            ),
            (
                "the first new layer's time, then the one before",
                r#"{"os":"linux","architecture":"amd64","created":"2019-05-05T00:00:00.50Z","history":[{"created":"2018-01-01T00:00:00.000Z"},{"created_by":"ENV","empty_layer":true},{"created_by":"RUN"},{"created_by":"CMD","author":"","empty_layer":true}]}"#,
                &["a", "b"],
                None,
                format!(
                    r#"{{{os},"created":"2019-05-05T00:00:00.50Z","history":[{{"created":"2018-01-01T00:00:00Z"}},{{"created":"2020-01-01T00:00:00Z","created_by":"ENV","empty_layer":true}},{{"created":"2020-01-01T00:00:00Z","created_by":"RUN"}},{{"created":"2020-01-01T00:00:00Z","created_by":"CMD","empty_layer":true}}],"os":"linux",{two}}}"#
                ),
            ),
            (
                "null is not a time",
                r#"{"os":"linux","architecture":"amd64","created":null}"#,
                &[],
                Some("2001-01-01T00:00:00Z"),
                format!(r#"{{{os},"created":null,"history":null,"os":"linux",{none}}}"#),
            ),
            (
                "offsets are kept",
                r#"{"os":"linux","architecture":"amd64","history":[{"created":"2000-01-01T02:00:00.10+02:00"}]}"#,
                &["a"],
                Some("2001-01-01T00:00:00Z"),
                format!(
                    r#"{{{os},"created":"2000-01-01T02:00:00.1+02:00","history":[{{"created":"2000-01-01T02:00:00.1+02:00"}}],"os":"linux",{one}}}"#
                ),
            ),
        ] {
            assert_eq!(text(given, None, layers, epoch), want, "{name}");
        }
    }

    #[test]
    fn entries_of_the_base_keep_their_times() {
        let base = r#"{"os":"linux","architecture":"amd64","history":[{"created":"2018-01-01T00:00:00.0Z","comment":"&"},{"created":"2018-01-02T00:00:00Z"}]}"#;
        let given = r#"{"os":"linux","architecture":"amd64","history":[{"created":"2018-01-01T00:00:00Z","comment":"\u0026"},{"created":"2018-01-03T00:00:00Z"},{"created":"2018-01-02T00:00:00Z"}]}"#;
        let c: Value = serde_json::from_str(&text(
            given,
            Some(base),
            &["a", "b", "c"],
            Some("2001-01-01T00:00:00Z"),
        ))
        .unwrap();
        let times: Vec<_> = c["history"]
            .as_array()
            .unwrap()
            .iter()
            .map(|h| h["created"].as_str().unwrap())
            .collect();
        assert_eq!(times, ["2018-01-01T00:00:00Z", "2001-01-01T00:00:00Z", "2001-01-01T00:00:00Z"]);
    }

    #[test]
    fn a_config_without_platform_is_refused() {
        for (given, want) in [
            (r#"{"os":"linux"}"#, "missing architecture"),
            (r#"{"os":"","architecture":"a"}"#, "missing os"),
            ("null", "null image config"),
        ] {
            let bad = complete(Some(given.as_bytes()), None, &Platform::host(), &[], None, None)
                .unwrap_err();
            assert!(bad.to_string().contains(want), "{bad}");
        }
        // An empty config is none.
        assert!(complete(Some(b""), None, &Platform::host(), &[], None, None).is_ok());
    }
}
