//! What is asked of a cache: its kind and attributes (rows `rc.*`).

use serde_json::Value;
use shipway_fault::{Class, Code, Fault, Result};
use shipway_gocompat::parse_bool;
use shipway_oci::Digest;
use shipway_refs::Compression;
use std::collections::BTreeMap;

/// A cache to import or export, by kind and attributes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CacheRequest {
    /// `registry`, `local`, `inline` or another one.
    pub kind: String,
    /// Attributes.
    pub attrs: BTreeMap<String, String>,
}

impl CacheRequest {
    /// An attribute that must be there.
    pub fn needed(&self, key: &str) -> Result<&str> {
        let found = self.attrs.get(key).map(String::as_str).filter(|v| !v.is_empty());
        found.ok_or_else(|| Fault::invalid(format!("{} cache requires {key}", self.kind)))
    }

    /// A flag, if it is given.
    pub fn flag(&self, key: &str) -> Result<Option<bool>> {
        let Some(text) = self.attrs.get(key) else { return Ok(None) };
        let invalid =
            || Fault::invalid(format!("failed to parse {key}: {text:?} is neither true nor false"));
        parse_bool(text).map(Some).ok_or_else(invalid)
    }

    /// What it is for people: the reference of a cache in a registry, else the kind with a number
    /// that follows from the attributes (row `rc.vertex`).
    pub fn shown(&self) -> String {
        if let Some(reference) =
            self.attrs.get("ref").filter(|r| self.kind == "registry" && !r.is_empty())
        {
            return reference.clone();
        }
        let digest = Digest::of(format!("{} {:?}", self.kind, self.attrs));
        let number =
            digest.as_bytes().iter().take(8).fold(0_u64, |n, byte| n << 8 | u64::from(*byte));
        format!("{}:{number}", self.kind)
    }

    /// Whether a failure to export fails nothing (row `rc.ignore`).
    pub fn ignores_errors(&self) -> bool {
        matches!(self.flag("ignore-error"), Ok(Some(true)))
    }

    /// Whether the build succeeds without this export, which failed by `fault`: because that was
    /// requested, or because a place that is only tried (`best_effort`) does not answer, or not
    /// now, and nothing was requested.
    pub fn excuses(&self, fault: &Fault, best_effort: bool) -> bool {
        let passing = matches!(
            fault.code(),
            Code::Unavailable | Code::DeadlineExceeded | Code::ResourceExhausted
        );
        let untold = matches!(self.flag("ignore-error"), Ok(None));
        self.ignores_errors()
            || best_effort && untold && passing && fault.class() == Class::Environment
    }
}

/// What stands for a secret in what is kept.
const MASK: &str = "xxxxx";

/// A build's options as they may be kept: without what opens the places that caches are imported
/// from (row `rc.frontend`).
pub fn without_secrets(options: &BTreeMap<String, String>) -> BTreeMap<String, String> {
    let mut options = options.clone();
    if let Some(imports) = options.get_mut("cache-imports") {
        // What cannot be read is refused when it is used, and is not kept.
        *imports = serde_json::from_str(imports)
            .map(|mut json| {
                mask(&mut json);
                json.to_string()
            })
            .unwrap_or_default();
    }
    options
}

fn mask(json: &mut Value) {
    match json {
        Value::Array(all) => all.iter_mut().for_each(mask),
        Value::Object(fields) => {
            for (key, value) in fields {
                if shipway_objectcache::SECRETS.contains(&key.as_str()) {
                    *value = MASK.into();
                } else {
                    mask(value);
                }
            }
        }
        _ => {}
    }
}

/// Whose results are exported (row `rc.mode`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ExportMode {
    /// Those whose layers are layers of the build's results.
    #[default]
    Min,
    /// Every step's.
    Max,
}

/// How a cache is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ExportOptions {
    /// Whose results.
    pub mode: ExportMode,
    /// How layers are compressed.
    pub compression: Compression,
    /// OCI media types, or Docker's.
    pub oci_types: bool,
    /// An image manifest, or an index of blobs as older registries' caches are (row `rc.reg.idx`).
    pub image_manifest: bool,
}

impl ExportOptions {
    /// The options of `request`. A mode that is not known is `min`.
    pub fn of(request: &CacheRequest) -> Result<Self> {
        let text = |key: &str| request.attrs.get(key).map(String::as_str);
        let compression = Compression::take(|key| request.attrs.get(key).cloned())?;
        let oci_types = request.flag("oci-mediatypes")?.unwrap_or(true);
        let image_manifest = request.flag("image-manifest")?.unwrap_or(oci_types);
        if image_manifest && !oci_types {
            return Err(Fault::invalid(
                "invalid configuration for remote cache, OCI mediatypes are required for image-manifest cache format",
            ));
        }
        let mode = if text("mode") == Some("max") { ExportMode::Max } else { ExportMode::Min };
        Ok(Self { mode, compression, oci_types, image_manifest })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_of_imports_are_not_kept() {
        let imports = r#"[{"Type":"s3","Attrs":{"bucket":"b","secret_access_key":"hidden","session_token":"hidden","access_key_id":"hidden"}},{"Type":"gha","Attrs":{"token":"hidden","ghtoken":"hidden","scope":"s"}}]"#;
        let options = BTreeMap::from([
            ("cache-imports".to_owned(), imports.to_owned()),
            ("target".to_owned(), "t".to_owned()),
        ]);
        let kept = without_secrets(&options);
        assert_eq!(kept["target"], "t");
        assert!(kept["cache-imports"].contains(r#""bucket":"b""#));
        assert!(kept["cache-imports"].contains(r#""scope":"s""#));
        assert!(!kept["cache-imports"].contains("hidden"));
        let garbage = BTreeMap::from([("cache-imports".to_owned(), "[hidden".to_owned())]);
        assert_eq!(without_secrets(&garbage)["cache-imports"], "");
    }

    #[test]
    fn a_place_that_is_only_tried_fails_no_build_unless_told() {
        let request = |ignore: Option<&str>| CacheRequest {
            kind: "s3".into(),
            attrs: ignore.map(|v| ("ignore-error".to_owned(), v.to_owned())).into_iter().collect(),
        };
        let (busy, wrong) = (Fault::unavailable("busy"), Fault::invalid("wrong"));
        for (ignore, best_effort, excused) in [
            (None, true, [true, false]),
            (None, false, [false, false]),
            (Some("true"), false, [true, true]),
            (Some("false"), true, [false, false]),
        ] {
            let request = request(ignore);
            let got = [&busy, &wrong].map(|fault| request.excuses(fault, best_effort));
            assert_eq!(got, excused, "{ignore:?} {best_effort}");
        }
    }

    #[test]
    fn the_manifest_follows_the_types_unless_told() {
        let of = |attrs: &[(&str, &str)]| {
            let attrs = attrs.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect();
            ExportOptions::of(&CacheRequest { kind: "registry".into(), attrs })
        };
        let plain = of(&[]).unwrap();
        assert!(plain.image_manifest && plain.oci_types && plain.mode == ExportMode::Min);
        assert!(!of(&[("oci-mediatypes", "false")]).unwrap().image_manifest);
        assert!(of(&[("oci-mediatypes", "false"), ("image-manifest", "true")]).is_err());
        assert_eq!(of(&[("mode", "max")]).unwrap().mode, ExportMode::Max);
        assert_eq!(of(&[("mode", "x")]).unwrap().mode, ExportMode::Min);
    }
}
