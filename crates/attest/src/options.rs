//! What a client asks for: `attest:provenance=…` and `attest:sbom=…` (rows `at.opts`,
//! `at.sbom.gen`, `at.prov.mode`, `at.prov.ver`, `at.prov.params`).

use shipway_fault::{Fault, Result, nearest};
use shipway_gocompat::{csv_fields, parse_bool};
use shipway_oci::ImageName;
use std::collections::BTreeMap;

/// Scanner unless another is asked for.
const SCANNER: &str = "docker/buildkit-syft-scanner:stable-1";

/// How much provenance says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ProvenanceMode {
    /// What went in, without arguments, secrets and steps.
    Min,
    /// Everything.
    #[default]
    Max,
}

/// SlsaVersion of the SLSA predicate.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum SlsaVersion {
    #[default]
    V1,
    V02,
}

/// Provenance as asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ProvenanceOptions {
    /// How much it says.
    pub mode: ProvenanceMode,
    /// In which form.
    pub version: SlsaVersion,
    /// Who built.
    pub builder_id: String,
    /// Whether the client claims that the build is reproducible.
    pub reproducible: bool,
    /// Whether only images carry it.
    pub inline_only: bool,
    /// Whether everything that goes in must be known.
    pub complete_materials: bool,
    /// Whether it says what the machine did meanwhile.
    pub capture_usage: bool,
    /// Name of its file; `provenance.json` unless given.
    pub filename: Option<String>,
}

/// An SBOM as asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SbomOptions {
    /// Image of the scanner.
    pub generator: ImageName,
    /// Further options of the scanner.
    pub params: BTreeMap<String, String>,
}

/// Attestations as asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct AttestOptions {
    pub provenance: Option<ProvenanceOptions>,
    pub sbom: Option<SbomOptions>,
}

/// `key=value` pairs; a word alone has an empty value.
fn attrs(kind: &str, text: &str) -> Result<BTreeMap<String, String>> {
    if text.is_empty() {
        return Ok(BTreeMap::new());
    }
    let fields = csv_fields(text, ',')
        .map_err(|why| Fault::invalid(format!("failed to parse {kind}: {why}")))?;
    Ok(fields
        .into_iter()
        .map(|f| {
            f.split_once('=')
                .map_or_else(|| (f.clone(), String::new()), |(k, v)| (k.into(), v.into()))
        })
        .collect())
}

impl AttestOptions {
    /// Reads frontend options; those that ask for no attestation are left alone.
    pub fn parse(options: &BTreeMap<String, String>) -> Result<Self> {
        let mut asked: BTreeMap<String, &str> = BTreeMap::new();
        for (key, value) in options {
            let kind = key
                .strip_prefix("build-arg:BUILDKIT_ATTEST_")
                .or_else(|| key.strip_prefix("attest:"));
            if let Some(kind) = kind {
                asked.insert(kind.to_lowercase(), value);
            }
        }
        let mut out = Self::default();
        for (kind, text) in asked {
            let mut attrs = attrs(&kind, text)?;
            let off = attrs
                .remove("disabled")
                .is_some_and(|v| v.is_empty() || parse_bool(&v) == Some(true));
            match kind.as_str() {
                "provenance" | "sbom" if off => {}
                "provenance" => out.provenance = Some(ProvenanceOptions::of(&attrs)?),
                "sbom" => out.sbom = Some(SbomOptions::of(attrs)?),
                other => {
                    let fault = Fault::invalid(format!("unknown attestation type {other:?}"));
                    return Err(match nearest(other, ["provenance", "sbom"]) {
                        Some(near) => fault.hint(format!("did you mean {near}?")),
                        None => fault.hint("it is provenance or sbom"),
                    });
                }
            }
        }
        Ok(out)
    }
}

impl ProvenanceOptions {
    fn of(attrs: &BTreeMap<String, String>) -> Result<Self> {
        let truth = |key: &str| match attrs.get(key) {
            None => Ok(false),
            Some(v) => parse_bool(v).ok_or_else(|| {
                Fault::invalid(format!("failed to parse {key} flag {v:?}"))
                    .hint("it is true or false")
            }),
        };
        let mode = match attrs.get("mode").map(String::as_str) {
            None | Some("max" | "full") => ProvenanceMode::Max,
            Some("min") => ProvenanceMode::Min,
            Some(other) => {
                return Err(
                    Fault::invalid(format!("invalid mode {other:?}")).hint("it is min or max")
                );
            }
        };
        let version = match attrs.get("version").map(String::as_str) {
            None | Some("v1") => SlsaVersion::V1,
            Some("v0.2") => SlsaVersion::V02,
            Some("") => return Err(Fault::invalid("provenance SLSA version cannot be empty")),
            Some(other) => {
                return Err(Fault::invalid(format!("invalid provenance SLSA version: {other}"))
                    .hint("it is v1 or v0.2"));
            }
        };
        Ok(Self {
            mode,
            version,
            builder_id: attrs.get("builder-id").cloned().unwrap_or_default(),
            reproducible: truth("reproducible")?,
            inline_only: attrs.get("inline-only").and_then(|v| parse_bool(v)).unwrap_or(false),
            complete_materials: truth("complete-materials")?,
            capture_usage: attrs.get("capture-usage").and_then(|v| parse_bool(v)).unwrap_or(false),
            filename: attrs.get("filename").cloned(),
        })
    }

    /// Name of its file.
    pub fn file(&self) -> &str {
        self.filename.as_deref().unwrap_or("provenance.json")
    }
}

impl SbomOptions {
    fn of(mut attrs: BTreeMap<String, String>) -> Result<Self> {
        let generator = attrs.remove("generator").unwrap_or_else(|| SCANNER.to_owned());
        if generator.is_empty() {
            return Err(Fault::invalid("sbom generator cannot be empty"));
        }
        let generator = generator.parse().map_err(|e| {
            Fault::invalid(format!("failed to parse sbom generator {generator}: {e}"))
        })?;
        Ok(Self { generator, params: attrs })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(options: &[(&str, &str)]) -> Result<AttestOptions> {
        AttestOptions::parse(
            &options.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect(),
        )
    }

    #[test]
    fn options_are_read_as_clients_write_them() {
        let none = parse(&[("filename", "x")]).unwrap();
        assert_eq!(none, AttestOptions::default());
        let p = parse(&[("attest:provenance", "")]).unwrap().provenance.unwrap();
        assert_eq!(
            (p.mode, p.version, p.file()),
            (ProvenanceMode::Max, SlsaVersion::V1, "provenance.json")
        );
        let p = parse(&[(
            "attest:provenance",
            "mode=min,version=v0.2,\"builder-id=a,b\",inline-only=true",
        )])
        .unwrap()
        .provenance
        .unwrap();
        assert_eq!(
            (p.mode, p.version, p.builder_id.as_str(), p.inline_only),
            (ProvenanceMode::Min, SlsaVersion::V02, "a,b", true)
        );
        assert!(parse(&[("attest:provenance", "disabled=true")]).unwrap().provenance.is_none());
        let s = parse(&[("build-arg:BUILDKIT_ATTEST_SBOM", "generator=x/y,EXTRA=1")])
            .unwrap()
            .sbom
            .unwrap();
        assert_eq!(
            (s.generator.familiar().as_str(), s.params["EXTRA"].as_str()),
            ("x/y:latest", "1")
        );
    }

    #[test]
    fn wrong_options_are_named() {
        for (key, value, want) in [
            ("attest:provenence", "", "unknown attestation type"),
            ("attest:provenance", "mode=x", "invalid mode"),
            ("attest:provenance", "version=v3", "invalid provenance SLSA version"),
            ("attest:provenance", "\"mode", "failed to parse provenance"),
            ("attest:provenance", "reproducible=maybe", "reproducible"),
            ("attest:sbom", "generator=", "generator cannot be empty"),
        ] {
            assert!(
                parse(&[(key, value)]).unwrap_err().to_string().contains(want),
                "{key}={value}"
            );
        }
    }
}
