//! SLSA provenance in both versions (rows `at.prov.*`): version 1 is the model, version 0.2 another
//! view of it.

use crate::{
    BlobSource, Capture, ImageSource, MissingFetch, ProvenanceMode, ProvenanceOptions, SlsaVersion,
    intoto::{DigestSet, digest_set, slsa},
    purl::{PurlKind, blob_purl, image_purl},
    request::{ConfigSource, GitAddress, Parameters, RequestProvenance, commit},
};
use serde::Serialize;
use serde_json::{Map, Value, json};
use shipway_fault::{Detail, Fault, IncompleteMaterial, Result, redact};
use shipway_oci::{Descriptor, Platform, timestamp};
use std::{collections::BTreeMap, time::SystemTime};

const BUILD_TYPE_V1: &str =
    "https://github.com/moby/buildkit/blob/master/docs/attestations/slsa-definitions.md";
const BUILD_TYPE_V02: &str = "https://mobyproject.org/buildkit@v1";

/// A step of the build.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[allow(missing_docs)]
pub struct BuildStep {
    pub id: String,
    pub op: Value,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub inputs: Vec<String>,
}

/// All steps.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct BuildConfig {
    /// Steps, inputs first.
    #[serde(rename = "llbDefinition", skip_serializing_if = "Vec::is_empty")]
    pub steps: Vec<BuildStep>,
    /// Their ids by digest.
    #[serde(rename = "digestMapping", skip_serializing_if = "BTreeMap::is_empty")]
    pub digests: BTreeMap<String, String>,
}

/// A text that steps come from.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[allow(missing_docs)]
pub struct SourceInfo {
    #[serde(skip_serializing_if = "String::is_empty")]
    pub filename: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub language: String,
    /// In base64.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub data: String,
    /// The steps that made the text.
    #[serde(flatten)]
    pub config: BuildConfig,
}

/// Texts, and places in them by step.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[allow(missing_docs)]
pub struct Source {
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub locations: BTreeMap<String, Value>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub infos: Vec<SourceInfo>,
}

/// Layers by output of a step, such as `step1:0`: one list of layers for each way it was made.
pub type LayerMap = BTreeMap<String, Vec<Vec<Descriptor>>>;

/// What is known of the build besides what went in.
#[derive(Clone, Debug, Default, PartialEq)]
#[allow(missing_docs)]
pub struct Metadata {
    pub invocation: String,
    pub started: Option<SystemTime>,
    pub finished: Option<SystemTime>,
    pub source: Option<Source>,
    pub layers: LayerMap,
    /// Looks at the machine, if they were asked for.
    pub usage: Vec<Value>,
    /// Why images of the node's own store were taken, by their addresses among what went in.
    stored: BTreeMap<String, String>,
    vcs: BTreeMap<String, String>,
    /// What steps on the proxy network fetched that is not among the materials, if there are such
    /// steps.
    proxied: Option<Vec<MissingFetch>>,
    reproducible: bool,
    hermetic: bool,
    complete_request: bool,
    complete_materials: bool,
}

/// Who builds.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Builder {
    /// SlsaVersion of the Dockerfile frontend.
    pub dockerfile: String,
    /// What the operator adds (row `at.prov.env`).
    pub environment: Map<String, Value>,
}

/// The predicate.
#[derive(Clone, Debug, PartialEq)]
pub struct Predicate {
    version: SlsaVersion,
    builder_id: String,
    config_source: ConfigSource,
    request: Parameters,
    materials: Vec<(String, DigestSet)>,
    /// Steps, unless little is asked for.
    pub steps: Option<BuildConfig>,
    /// What is known of the build besides.
    pub metadata: Metadata,
    builder: Builder,
}

/// The address of an image among what went in.
fn image_uri(image: &ImageSource) -> String {
    let kind = if image.local { PurlKind::Oci } else { PurlKind::Docker };
    image_purl(kind, &image.name, image.platform.as_ref())
}

fn materials(capture: &Capture) -> Vec<(String, DigestSet)> {
    let sources = &capture.sources;
    let images =
        sources.images.iter().map(|i| (image_uri(i), i.digest.map(digest_set).unwrap_or_default()));
    // With the address of the repository whose commits it has.
    let blob = |b: &BlobSource, url: Option<&str>| {
        let kind = if b.local { PurlKind::Oci } else { PurlKind::Docker };
        (blob_purl(kind, &b.name, url), b.name.digest().map(digest_set).unwrap_or_default())
    };
    let blobs = sources.blobs.iter().map(|b| blob(b, None));
    let git = sources.git.iter().flat_map(|g| {
        let bundle = g.bundle.as_ref().map(|b| blob(b, Some(&g.url)));
        std::iter::once((g.url.clone(), commit(&g.commit))).chain(bundle)
    });
    let http = sources.http.iter().map(|h| (h.url.clone(), digest_set(h.digest)));
    images.chain(blobs).chain(git).chain(http).collect()
}

/// What is missing, in the reference's words (row `at.prov.complete`).
fn incomplete(capture: &Capture) -> Fault {
    let mut text = String::from(
        "provenance materials are incomplete\n\nThe build requested complete provenance materials, but not all dependencies could be captured.",
    );
    if !capture.sources.local.is_empty() {
        text.push_str("\n\nUncaptured local sources:");
        for local in &capture.sources.local {
            let name = if local.name.is_empty() { "<unnamed>" } else { &local.name };
            text.push_str(&format!("\n  - {name}\n    reason: local_source"));
        }
    }
    if !capture.missing.is_empty() {
        text.push_str("\n\nUncaptured requests:");
    }
    for m in &capture.missing {
        let name =
            [&m.name, &m.op, &m.url].into_iter().find(|t| !t.is_empty()).map_or("", String::as_str);
        text.push_str(&format!("\n  - {name}"));
        for (key, value) in [("method", &m.method), ("url", &m.url), ("reason", &m.reason)] {
            if !value.is_empty() {
                text.push_str(&format!("\n    {key}: {value}"));
            }
        }
    }
    let local = capture.sources.local.iter().map(|l| IncompleteMaterial {
        name: l.name.clone(),
        reason: "local_source".into(),
        ..IncompleteMaterial::default()
    });
    let fetched = capture.missing.iter().map(|m| IncompleteMaterial {
        op: m.op.clone(),
        name: m.name.clone(),
        method: m.method.clone(),
        uri: m.url.clone(),
        reason: m.reason.clone(),
        ..IncompleteMaterial::default()
    });
    Fault::invalid(text).detail(Detail::IncompleteMaterials(local.chain(fetched).collect()))
}

impl Predicate {
    /// The predicate about what `capture` saw, of which `request` asked for.
    pub fn new(
        capture: &Capture,
        request: &Parameters,
        options: &ProvenanceOptions,
        builder: Builder,
        git: GitAddress,
    ) -> Result<Self> {
        let known =
            RequestProvenance::new(&request.frontend, request.args.clone(), &capture.sources, git);
        let mut asked = request.clone();
        asked.args = known.request.map(|r| r.args).unwrap_or_default();
        asked.secrets.clone_from(&capture.secrets);
        asked.ssh.clone_from(&capture.ssh);
        asked.locals.extend(capture.sources.local.iter().cloned());
        let mut vcs = BTreeMap::new();
        asked.args.retain(|key, value| match key.strip_prefix("vcs:") {
            None => true,
            Some(what) => {
                let value = if what == "source" { redact(value) } else { value.clone() };
                if !value.is_empty() {
                    vcs.insert(what.to_owned(), value);
                }
                false
            }
        });
        let complete = !capture.incomplete && capture.sources.local.is_empty();
        if options.complete_materials && !complete {
            return Err(incomplete(capture));
        }
        let mut metadata = Metadata {
            vcs,
            proxied: capture.proxied.then(|| capture.missing.clone()),
            reproducible: options.reproducible,
            hermetic: complete && !capture.network,
            complete_request: !request.frontend.is_empty(),
            complete_materials: complete,
            stored: capture
                .sources
                .images
                .iter()
                .filter_map(|i| Some((image_uri(i), i.stored?.to_string())))
                .collect(),
            ..Metadata::default()
        };
        if options.mode == ProvenanceMode::Min && asked.scrub() {
            metadata.complete_request = false;
        }
        Ok(Self {
            version: options.version,
            builder_id: options.builder_id.clone(),
            config_source: known.config_source,
            request: asked,
            materials: materials(capture),
            steps: None,
            metadata,
            builder,
        })
    }

    /// Predicate type.
    pub fn kind(&self) -> &'static str {
        match self.version {
            SlsaVersion::V1 => slsa::V1,
            SlsaVersion::V02 => slsa::V02,
        }
    }

    /// The predicate as JSON.
    pub fn json(&self) -> Value {
        match self.version {
            SlsaVersion::V1 => self.v1(),
            SlsaVersion::V02 => self.v02(),
        }
    }

    fn materials(&self) -> Value {
        let one = |(uri, digest): &(String, DigestSet)| {
            let mut out = json!({ "uri": uri });
            if !digest.is_empty() {
                out["digest"] = json!(digest);
            }
            out
        };
        Value::Array(self.materials.iter().map(one).collect())
    }

    fn buildkit_metadata(&self) -> Value {
        let mut out = Map::new();
        let m = &self.metadata;
        if !m.vcs.is_empty() {
            out.insert("vcs".into(), json!(m.vcs));
        }
        if let Some(source) = &m.source {
            out.insert("source".into(), json!(source));
        }
        if !m.layers.is_empty() {
            out.insert("layers".into(), json!(m.layers));
        }
        if !m.stored.is_empty() {
            out.insert("localImages".into(), json!(m.stored));
        }
        if !m.usage.is_empty() {
            out.insert("sysUsage".into(), json!(m.usage));
        }
        if let Some(missing) = &m.proxied {
            let mut network = json!({ "mode": "proxy" });
            if !missing.is_empty() {
                network["proxy"] = json!({ "incomplete": missing });
            }
            out.insert("network".into(), network);
        }
        Value::Object(out)
    }

    /// What the builder knows by itself.
    fn environment(&self, platform_key: &str) -> Map<String, Value> {
        let mut out = Map::new();
        if let Some(steps) = self.steps.as_ref().filter(|_| self.version == SlsaVersion::V1) {
            out.insert("buildConfig".into(), json!(steps));
        }
        out.insert(platform_key.into(), json!(Platform::host().to_string()));
        if self.request.frontend == "dockerfile.v0" && !self.builder.dockerfile.is_empty() {
            out.insert("dockerfileVersion".into(), json!(self.builder.dockerfile));
        }
        out.extend(self.builder.environment.clone());
        out
    }

    fn v1(&self) -> Value {
        let m = &self.metadata;
        let mut definition = Map::new();
        definition.insert("buildType".into(), json!(BUILD_TYPE_V1));
        definition.insert(
            "externalParameters".into(),
            json!({ "configSource": self.config_source, "request": self.request }),
        );
        definition.insert(
            "internalParameters".into(),
            Value::Object(self.environment("builderPlatform")),
        );
        if !self.materials.is_empty() {
            definition.insert("resolvedDependencies".into(), self.materials());
        }
        let mut metadata = Map::new();
        metadata.insert("invocationId".into(), json!(m.invocation));
        put_time(&mut metadata, "startedOn", m.started);
        put_time(&mut metadata, "finishedOn", m.finished);
        metadata.insert("buildkit_metadata".into(), self.buildkit_metadata());
        put_flag(&mut metadata, "buildkit_hermetic", m.hermetic);
        metadata.insert(
            "buildkit_completeness".into(),
            json!({ "request": m.complete_request, "resolvedDependencies": m.complete_materials }),
        );
        put_flag(&mut metadata, "buildkit_reproducible", m.reproducible);
        json!({
            "buildDefinition": definition,
            "runDetails": { "builder": { "id": self.builder_id }, "metadata": metadata },
        })
    }

    fn v02(&self) -> Value {
        let m = &self.metadata;
        let mut config = Map::new();
        let source = &self.config_source;
        for (key, text) in [("uri", &source.uri), ("entryPoint", &source.path)] {
            if !text.is_empty() {
                config.insert(key.into(), json!(text));
            }
        }
        if !source.digest.is_empty() {
            config.insert("digest".into(), json!(source.digest));
        }
        let mut out = Map::new();
        out.insert("builder".into(), json!({ "id": self.builder_id }));
        out.insert("buildType".into(), json!(BUILD_TYPE_V02));
        if !self.materials.is_empty() {
            out.insert("materials".into(), self.materials());
        }
        out.insert(
            "invocation".into(),
            json!({ "configSource": config, "parameters": self.request, "environment": self.environment("platform") }),
        );
        if let Some(steps) = &self.steps {
            out.insert("buildConfig".into(), json!(steps));
        }
        let mut metadata = Map::new();
        metadata.insert("buildInvocationID".into(), json!(m.invocation));
        put_time(&mut metadata, "buildStartedOn", m.started);
        put_time(&mut metadata, "buildFinishedOn", m.finished);
        metadata.insert(
            "completeness".into(),
            json!({ "parameters": m.complete_request, "environment": true, "materials": m.complete_materials }),
        );
        metadata.insert("reproducible".into(), json!(m.reproducible));
        metadata.insert(
            "https://mobyproject.org/buildkit@v1#metadata".into(),
            self.buildkit_metadata(),
        );
        put_flag(&mut metadata, "https://mobyproject.org/buildkit@v1#hermetic", m.hermetic);
        out.insert("metadata".into(), Value::Object(metadata));
        Value::Object(out)
    }
}

fn put_time(map: &mut Map<String, Value>, key: &str, time: Option<SystemTime>) {
    if let Some(time) = time {
        map.insert(key.into(), json!(timestamp::format(time)));
    }
}

fn put_flag(map: &mut Map<String, Value>, key: &str, flag: bool) {
    if flag {
        map.insert(key.into(), json!(true));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Stored, filter_args};
    use shipway_oci::Digest;

    fn predicate(
        options: &ProvenanceOptions,
        change: impl FnOnce(&mut Capture),
    ) -> Result<Predicate> {
        let mut capture = Capture::default();
        let digest = Some(Digest::of("x"));
        capture.add_image(ImageSource {
            name: "busybox".parse().unwrap(),
            platform: None,
            digest,
            local: false,
            stored: None,
        });
        capture.add_secret("s", false);
        change(&mut capture);
        let args = [("build-arg:A", "1"), ("vcs:source", "https://u:p@h/r"), ("filename", "F")];
        let args = args.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        let request = Parameters {
            frontend: "dockerfile.v0".into(),
            args: filter_args(&args),
            ..Parameters::default()
        };
        let builder = Builder {
            dockerfile: "1.2".into(),
            environment: Map::from_iter([("foo".to_owned(), json!("bar"))]),
        };
        Predicate::new(&capture, &request, options, builder, |_, _| None)
    }

    #[test]
    fn both_versions_tell_the_same() {
        let v1 = predicate(&ProvenanceOptions::default(), |c| c.network = true).unwrap().json();
        let external = &v1["buildDefinition"]["externalParameters"];
        assert_eq!(
            (&external["request"]["args"]["build-arg:A"], &external["configSource"]["path"]),
            (&json!("1"), &json!("F"))
        );
        assert_eq!(v1["buildDefinition"]["internalParameters"]["foo"], "bar");
        assert_eq!(
            v1["buildDefinition"]["resolvedDependencies"][0]["uri"],
            "pkg:docker/busybox@latest"
        );
        assert_eq!(
            v1["runDetails"]["metadata"]["buildkit_metadata"]["vcs"]["source"],
            "https://xxxxx:xxxxx@h/r"
        );
        assert_eq!(v1["runDetails"]["metadata"]["buildkit_hermetic"], Value::Null);
        assert_eq!(v1["runDetails"]["metadata"]["buildkit_metadata"]["localImages"], Value::Null);
        // A tag has what is known of its digest.
        let pinned = format!("busybox:latest@{}", Digest::of("x"));
        let built = Some(Stored::Built(SystemTime::UNIX_EPOCH));
        let image = ImageSource {
            name: pinned.parse().unwrap(),
            platform: None,
            digest: Some(Digest::of("x")),
            local: false,
            stored: built,
        };
        let local = predicate(&ProvenanceOptions::default(), |c| {
            c.add_image(image);
            *c = std::mem::take(c).tidied();
        });
        assert_eq!(
            local.unwrap().json()["runDetails"]["metadata"]["buildkit_metadata"]["localImages"],
            json!({ "pkg:docker/busybox@latest": "built here at 1970-01-01T00:00:00Z" })
        );
        let v02 = predicate(
            &ProvenanceOptions { version: SlsaVersion::V02, ..Default::default() },
            |_| {},
        )
        .unwrap()
        .json();
        assert_eq!(
            (&v02["invocation"]["configSource"]["entryPoint"], &v02["materials"][0]["uri"]),
            (&json!("F"), &json!("pkg:docker/busybox@latest"))
        );
        assert_eq!(v02["metadata"]["https://mobyproject.org/buildkit@v1#hermetic"], true);
        assert_eq!(v02["invocation"]["environment"]["dockerfileVersion"], "1.2");
    }

    #[test]
    fn little_is_told_in_mode_min_and_says_so() {
        let min = predicate(
            &ProvenanceOptions { mode: ProvenanceMode::Min, ..Default::default() },
            |_| {},
        )
        .unwrap()
        .json();
        let request = &min["buildDefinition"]["externalParameters"]["request"];
        assert_eq!((&request["args"], &request["secrets"]), (&Value::Null, &Value::Null));
        assert_eq!(min["runDetails"]["metadata"]["buildkit_completeness"]["request"], false);
    }

    #[test]
    fn the_proxy_network_is_told_with_what_it_could_not_record() {
        let fetched = |c: &mut Capture| {
            c.proxied = true;
            c.add_http(crate::HttpSource { url: "http://h/f".into(), digest: Digest::of("f") });
        };
        let v1 = predicate(&ProvenanceOptions::default(), fetched).unwrap().json();
        let metadata = &v1["runDetails"]["metadata"];
        assert_eq!(metadata["buildkit_metadata"]["network"], json!({ "mode": "proxy" }));
        assert_eq!(metadata["buildkit_completeness"]["resolvedDependencies"], true);
        assert_eq!(v1["buildDefinition"]["resolvedDependencies"][1]["uri"], "http://h/f");
        let missing = |c: &mut Capture| {
            c.proxied = true;
            c.add_missing(MissingFetch {
                op: "sha256:x".into(),
                name: "wget".into(),
                method: "GET".into(),
                url: "http://h/m".into(),
                reason: "unsuccessful_response".into(),
            });
        };
        let v1 = predicate(&ProvenanceOptions::default(), missing).unwrap().json();
        let metadata = &v1["runDetails"]["metadata"];
        let incomplete = &metadata["buildkit_metadata"]["network"]["proxy"]["incomplete"][0];
        assert_eq!(
            *incomplete,
            json!({ "op": "sha256:x", "name": "wget", "method": "GET", "uri": "http://h/m", "reason": "unsuccessful_response" })
        );
        assert_eq!(metadata["buildkit_completeness"]["resolvedDependencies"], false);
        let strict = ProvenanceOptions { complete_materials: true, ..Default::default() };
        let fault = predicate(&strict, missing).unwrap_err();
        assert!(
            fault.to_string().contains(
                "- wget\n    method: GET\n    url: http://h/m\n    reason: unsuccessful_response"
            ),
            "{fault}"
        );
        assert!(
            matches!(fault.details(), [Detail::IncompleteMaterials(all)] if all.len() == 1 && all[0].uri == "http://h/m")
        );
    }

    #[test]
    fn complete_materials_are_insisted_on() {
        let options = ProvenanceOptions { complete_materials: true, ..Default::default() };
        assert!(predicate(&options, |_| {}).is_ok());
        let fault = predicate(&options, |c| c.add_local("context")).unwrap_err();
        let why = fault.to_string();
        let material = IncompleteMaterial {
            name: "context".into(),
            reason: "local_source".into(),
            ..Default::default()
        };
        assert_eq!(fault.details(), [Detail::IncompleteMaterials(vec![material])]);
        assert!(
            why.contains("provenance materials are incomplete")
                && why.contains("- context\n    reason: local_source")
        );
    }
}
