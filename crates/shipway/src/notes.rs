//! What buildx writes into a metadata file besides the answers of exporters (rows `bx.m.*`): the
//! build's id, its provenance, its warnings.

use serde_json::{Map, Value, json};
use shipway_client::{Client, HistoryQuery, HistoryResult, Outcome, Warning};
use shipway_fault::{Fault, Result};
use shipway_gocompat::parse_bool;

use futures::StreamExt as _;

use crate::nodes::Nodes;

/// Most bytes of provenance.
const MAX_PROVENANCE: u64 = 64 << 20;
const PREDICATE: &str = "in-toto.io/predicate-type";
const V02: &str = "https://slsa.dev/provenance/v0.2";

/// How much of the provenance is written (`BUILDX_METADATA_PROVENANCE`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Provenance {
    Min,
    Max,
    Disabled,
}

/// What is written.
pub(crate) struct Notes {
    provenance: Provenance,
    warnings: bool,
}

impl Notes {
    /// As the environment says.
    pub(crate) fn of(env: impl Fn(&str) -> Option<String>) -> Self {
        let mode = env("BUILDX_METADATA_PROVENANCE").unwrap_or_default();
        let provenance = match mode.as_str() {
            "max" => Provenance::Max,
            "disabled" => Provenance::Disabled,
            other if parse_bool(other) == Some(false) => Provenance::Disabled,
            _ => Provenance::Min,
        };
        let warnings = env("BUILDX_METADATA_WARNINGS").and_then(|v| parse_bool(&v));
        Self { provenance, warnings: warnings.unwrap_or(false) }
    }

    /// What is written of a build that ended well, in parts on `nodes`; its id is that of the
    /// first, with the names that it is filed under.
    pub(crate) async fn of_build(
        &self,
        nodes: &Nodes,
        outcomes: &[(usize, Outcome)],
    ) -> Result<Map<String, Value>> {
        let mut notes = Map::new();
        for (n, (node, outcome)) in outcomes.iter().enumerate() {
            if n == 0 {
                let (builder, name) = nodes.names(*node);
                let id = format!("{builder}/{name}/{}", outcome.reference);
                notes.insert("buildx.build.ref".to_owned(), id.into());
            }
            if self.provenance != Provenance::Disabled {
                let client = nodes.client(*node).await?;
                self.provenance(&client, &outcome.reference, &mut notes)
                    .await
                    .map_err(|f| f.context("read the provenance for the metadata file"))?;
            }
        }
        Ok(notes)
    }

    /// What is written of the warnings of all builds of a run.
    pub(crate) fn of_warnings(&self, warnings: &[Warning]) -> Result<Map<String, Value>> {
        let mut notes = Map::new();
        if self.warnings && !warnings.is_empty() {
            let warnings = serde_json::to_value(warnings)
                .map_err(|e| Fault::internal(format!("encode the warnings: {e}")))?;
            notes.insert("buildx.build.warnings".to_owned(), warnings);
        }
        Ok(notes)
    }

    async fn provenance(
        &self,
        client: &Client,
        reference: &str,
        notes: &mut Map<String, Value>,
    ) -> Result<()> {
        let query = HistoryQuery { reference: reference.to_owned(), ..HistoryQuery::default() };
        let (_, mut events) = client.history(query).await?;
        let Some(event) = events.next().await.transpose()? else { return Ok(()) };
        let record = event.record;
        let mut results: Vec<(String, &HistoryResult)> =
            record.results.iter().map(|(p, result)| (format!("/{p}"), result)).collect();
        if results.is_empty() {
            results.extend(record.result.iter().map(|result| (String::new(), result)));
        }
        for (platform, result) in results {
            let is_provenance = |kind: &String| kind.starts_with("https://slsa.dev/provenance/");
            let found = result.attestations.iter().find_map(|blob| {
                Some((blob, blob.annotations.get(PREDICATE).filter(|kind| is_provenance(kind))?))
            });
            let Some((blob, kind)) = found else { continue };
            let bytes = client.blob(&blob.digest, MAX_PROVENANCE).await?;
            let said: Value = serde_json::from_slice(&bytes)
                .map_err(|e| Fault::invalid(format!("{} cannot be read: {e}", blob.digest)))?;
            let mut old = if kind == V02 { said } else { older(&said) };
            if let (Provenance::Min, Some(fields)) = (self.provenance, old.as_object_mut()) {
                fields.remove("buildConfig");
                fields.remove("metadata");
            }
            notes.insert(format!("buildx.build.provenance{platform}"), old);
        }
        Ok(())
    }
}

/// Provenance of SLSA's version 1 in the form of version 0.2, which metadata files have.
fn older(said: &Value) -> Value {
    let definition = &said["buildDefinition"];
    let (external, details) = (&definition["externalParameters"], &said["runDetails"]);
    let mut out = Map::new();
    out.insert("builder".into(), json!({"id": details["builder"]["id"]}));
    out.insert("buildType".into(), "https://mobyproject.org/buildkit@v1".into());
    if let Some(list) = definition["resolvedDependencies"].as_array() {
        let material = |m: &Value| kept(&[("uri", &m["uri"]), ("digest", &m["digest"])]);
        out.insert("materials".into(), list.iter().map(material).collect());
    }
    let source = &external["configSource"];
    let source = kept(&[
        ("uri", &source["uri"]),
        ("digest", &source["digest"]),
        ("entryPoint", &source["path"]),
    ]);
    let mut environment = definition["internalParameters"].as_object().cloned().unwrap_or_default();
    let config = environment.remove("buildConfig");
    let platform = environment.remove("builderPlatform").unwrap_or_default();
    let environment: Map<String, Value> =
        [("platform".to_owned(), platform)].into_iter().chain(environment).collect();
    out.insert(
        "invocation".into(),
        json!({"configSource": source, "parameters": external["request"], "environment": environment}),
    );
    if let Some(config) = config {
        out.insert("buildConfig".into(), config);
    }
    let metadata = &details["metadata"];
    if metadata.is_object() {
        let complete = &metadata["buildkit_completeness"];
        let flag = |value: &Value| value.as_bool().unwrap_or(false);
        let mut fields = kept(&[
            ("buildInvocationID", &metadata["invocationId"]),
            ("buildStartedOn", &metadata["startedOn"]),
            ("buildFinishedOn", &metadata["finishedOn"]),
        ]);
        fields["completeness"] = json!({
            "parameters": flag(&complete["request"]),
            "environment": true,
            "materials": flag(&complete["resolvedDependencies"]),
        });
        fields["reproducible"] = flag(&metadata["buildkit_reproducible"]).into();
        let own = metadata.get("buildkit_metadata").cloned().unwrap_or_else(|| json!({}));
        fields["https://mobyproject.org/buildkit@v1#metadata"] = own;
        if flag(&metadata["buildkit_hermetic"]) {
            fields["https://mobyproject.org/buildkit@v1#hermetic"] = true.into();
        }
        out.insert("metadata".into(), fields);
    }
    out.into()
}

/// The fields that have a value.
fn kept(fields: &[(&str, &Value)]) -> Value {
    let kept = fields.iter().filter(|(_, value)| !value.is_null());
    Value::Object(kept.map(|(key, value)| ((*key).to_owned(), (*value).clone())).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_environment_says_how_much_is_written() {
        let mode = |value: Option<&str>| {
            Notes::of(|name| {
                value.filter(|_| name == "BUILDX_METADATA_PROVENANCE").map(str::to_owned)
            })
            .provenance
        };
        assert_eq!(mode(None), Provenance::Min);
        assert_eq!(mode(Some("max")), Provenance::Max);
        assert_eq!(
            (mode(Some("disabled")), mode(Some("0"))),
            (Provenance::Disabled, Provenance::Disabled)
        );
        assert_eq!(mode(Some("1")), Provenance::Min);
    }

    #[test]
    fn provenance_is_written_in_the_older_form() {
        let said = json!({
            "buildDefinition": {
                "buildType": "x",
                "externalParameters": {"configSource": {"path": "Dockerfile"}, "request": {"frontend": "dockerfile.v0"}},
                "internalParameters": {"buildConfig": {"llbDefinition": []}, "builderPlatform": "linux/amd64", "own": 1},
                "resolvedDependencies": [{"uri": "pkg:docker/a", "digest": {"sha256": "1"}, "name": "n"}],
            },
            "runDetails": {"builder": {"id": "me"}, "metadata": {
                "invocationId": "i", "startedOn": "2026-01-02T03:04:05Z",
                "buildkit_metadata": {"vcs": {"source": "s"}},
                "buildkit_completeness": {"request": true, "resolvedDependencies": false},
                "buildkit_hermetic": true,
            }},
        });
        assert_eq!(
            older(&said),
            json!({
                "builder": {"id": "me"},
                "buildType": "https://mobyproject.org/buildkit@v1",
                "materials": [{"uri": "pkg:docker/a", "digest": {"sha256": "1"}}],
                "invocation": {
                    "configSource": {"entryPoint": "Dockerfile"},
                    "parameters": {"frontend": "dockerfile.v0"},
                    "environment": {"platform": "linux/amd64", "own": 1},
                },
                "buildConfig": {"llbDefinition": []},
                "metadata": {
                    "buildInvocationID": "i",
                    "buildStartedOn": "2026-01-02T03:04:05Z",
                    "completeness": {"parameters": true, "environment": true, "materials": false},
                    "reproducible": false,
                    "https://mobyproject.org/buildkit@v1#metadata": {"vcs": {"source": "s"}},
                    "https://mobyproject.org/buildkit@v1#hermetic": true,
                },
            })
        );
    }
}
