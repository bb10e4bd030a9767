//! Records of past and running builds (rows `ctl.hist.*`).

use std::collections::BTreeMap;

use futures::{Stream, TryStreamExt};
use prost::Message as _;
use serde::Serialize;
use serde_json::{Map, Value, json};
use shipway_fault::{Fault, Result};
use shipway_grpc::fault_of;
use shipway_oci::timestamp;
use shipway_proto::{google::rpc, moby::buildkit::v1 as wire};

use crate::{Client, status::Time};

/// Header with the daemon's time.
const NOW: &str = "buildkit-current-timestamp";
/// Most bytes of what is kept of a failure.
const MAX_FAILURE: u64 = 16 << 20;

/// What happened to a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "UPPERCASE")]
#[allow(missing_docs)]
pub enum HistoryKind {
    Started,
    Complete,
    Deleted,
}

/// One build.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct HistoryRecord {
    /// Its id.
    #[serde(rename = "ref")]
    pub reference: String,
    /// Its frontend.
    pub frontend: String,
    /// Options of the frontend.
    pub frontend_attrs: BTreeMap<String, String>,
    /// Why it failed.
    pub error: Option<String>,
    /// When it began.
    pub created_at: Option<Time>,
    /// When it ended.
    pub completed_at: Option<Time>,
    /// What its exporters answered.
    pub exporter_response: BTreeMap<String, String>,
    /// How often the record was changed.
    pub generation: i32,
    /// Whether it is kept for ever.
    pub pinned: bool,
    /// Steps that the cache had.
    pub cached_steps: i32,
    /// Steps in all.
    pub total_steps: i32,
    /// Steps that ended.
    pub completed_steps: i32,
    /// Warnings.
    pub warnings: i32,
    /// gRPC's code of [`HistoryRecord::error`].
    #[serde(skip)]
    pub error_code: i32,
    /// Its exporters: type and attributes.
    #[serde(skip)]
    pub exporters: Vec<(String, BTreeMap<String, String>)>,
    /// What it said, as encoded events.
    #[serde(skip)]
    pub logs: Option<HistoryBlob>,
    /// Its spans.
    #[serde(skip)]
    pub trace: Option<HistoryBlob>,
    /// Why it failed, with everything that was known of it; see [`Client::failure`].
    #[serde(skip)]
    pub failure: Option<HistoryBlob>,
    /// What it made, if that has no platforms.
    #[serde(skip)]
    pub result: Option<HistoryResult>,
    /// What it made, by platform.
    #[serde(skip)]
    pub results: BTreeMap<String, HistoryResult>,
}

/// A file of a build; [`Client::blob`] reads it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HistoryBlob {
    /// Its media type.
    pub media_type: String,
    /// Its digest.
    pub digest: String,
    /// Its length.
    pub size: i64,
    /// Annotations.
    pub annotations: BTreeMap<String, String>,
}

/// What a build made.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HistoryResult {
    /// What is said of it.
    pub attestations: Vec<HistoryBlob>,
    /// What exporters wrote, by their index.
    pub results: BTreeMap<i64, HistoryBlob>,
}

/// Which records are wanted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HistoryQuery {
    /// Only this build.
    pub reference: String,
    /// Only builds that run.
    pub active: bool,
    /// What happens to records afterwards, too, without end.
    pub follow: bool,
    /// Only records that match all conditions of one of these, such as `status==error`.
    pub filter: Vec<String>,
    /// Most records, the latest first; 0 for all.
    pub limit: i32,
}

/// News of a record.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct HistoryEvent {
    /// What happened.
    #[serde(rename = "type")]
    pub kind: HistoryKind,
    /// The record.
    pub record: HistoryRecord,
}

impl From<wire::Descriptor> for HistoryBlob {
    fn from(d: wire::Descriptor) -> Self {
        let wire::Descriptor { media_type, digest, size, annotations } = d;
        Self { media_type, digest, size, annotations }
    }
}

impl From<wire::BuildResultInfo> for HistoryResult {
    fn from(info: wire::BuildResultInfo) -> Self {
        let mut results: BTreeMap<i64, HistoryBlob> =
            info.results.into_iter().map(|(n, d)| (n, d.into())).collect();
        // Daemons that knew one exporter only.
        if let Some(only) = info.result_deprecated.filter(|_| results.is_empty()) {
            results.insert(0, only.into());
        }
        let attestations = info.attestations.into_iter().map(HistoryBlob::from).collect();
        Self { attestations, results }
    }
}

impl From<wire::BuildHistoryRecord> for HistoryRecord {
    fn from(r: wire::BuildHistoryRecord) -> Self {
        let error_code = r.error.as_ref().map(|e| e.code).unwrap_or_default();
        Self {
            error_code,
            exporters: r.exporters.into_iter().map(|e| (e.r#type, e.attrs)).collect(),
            logs: r.logs.map(HistoryBlob::from),
            trace: r.trace.map(HistoryBlob::from),
            failure: r.external_error.map(HistoryBlob::from),
            result: r.result.map(HistoryResult::from),
            results: r.results.into_iter().map(|(p, info)| (p, info.into())).collect(),
            reference: r.r#ref,
            frontend: r.frontend,
            frontend_attrs: r.frontend_attrs,
            error: r.error.map(|e| e.message),
            created_at: r.created_at.map(Time::from),
            completed_at: r.completed_at.map(Time::from),
            exporter_response: r.exporter_response,
            generation: r.generation,
            pinned: r.pinned,
            cached_steps: r.num_cached_steps,
            total_steps: r.num_total_steps,
            completed_steps: r.num_completed_steps,
            warnings: r.num_warnings,
        }
    }
}

impl From<wire::BuildHistoryEvent> for HistoryEvent {
    fn from(event: wire::BuildHistoryEvent) -> Self {
        let kind = match event.r#type() {
            wire::BuildHistoryEventType::Started => HistoryKind::Started,
            wire::BuildHistoryEventType::Complete => HistoryKind::Complete,
            wire::BuildHistoryEventType::Deleted => HistoryKind::Deleted,
        };
        Self { kind, record: event.record.unwrap_or_default().into() }
    }
}

/// A map without what Go leaves out: values that are empty or zero.
fn kept(fields: impl IntoIterator<Item = (&'static str, Value)>) -> Value {
    let is_kept = |value: &Value| match value {
        Value::Null | Value::Bool(false) => false,
        Value::Number(n) => n.as_i64() != Some(0),
        Value::String(text) => !text.is_empty(),
        Value::Array(list) => !list.is_empty(),
        Value::Object(map) => !map.is_empty(),
        Value::Bool(true) => true,
    };
    let fields = fields.into_iter().filter(|(_, value)| is_kept(value));
    Value::Object(fields.map(|(key, value)| (key.to_owned(), value)).collect())
}

impl HistoryBlob {
    fn value(&self) -> Value {
        kept([
            ("media_type", json!(self.media_type)),
            ("digest", json!(self.digest)),
            ("size", json!(self.size)),
            ("annotations", json!(self.annotations)),
        ])
    }
}

impl HistoryResult {
    fn value(&self) -> Value {
        let results: Map<String, Value> =
            self.results.iter().map(|(n, blob)| (n.to_string(), blob.value())).collect();
        let attestations: Vec<Value> = self.attestations.iter().map(HistoryBlob::value).collect();
        // For readers from before there were several.
        let first = self.results.values().next().map_or(Value::Null, HistoryBlob::value);
        kept([
            ("ResultDeprecated", first),
            ("Attestations", attestations.into()),
            ("Results", results.into()),
        ])
    }
}

impl HistoryRecord {
    /// The record as it is in a bundle that Docker Desktop imports (row `bx.history.export`): the
    /// names and the order are those that Go gives to the fields of the message. Attributes of
    /// caches that may be secret are left out.
    pub fn bundled(&self) -> Value {
        let time = |time: Option<Time>| {
            let since = time.and_then(|t| t.0.duration_since(std::time::UNIX_EPOCH).ok());
            since.map_or(Value::Null, |t| {
                kept([("seconds", t.as_secs().into()), ("nanos", t.subsec_nanos().into())])
            })
        };
        let error = self.error.as_ref().map_or(Value::Null, |message| {
            kept([("code", self.error_code.into()), ("message", json!(message))])
        });
        let exporters: Vec<Value> = self
            .exporters
            .iter()
            .map(|(kind, attrs)| kept([("Type", json!(kind)), ("Attrs", json!(attrs))]))
            .collect();
        let mut attrs = self.frontend_attrs.clone();
        if let Some(caches) = attrs.get_mut("cache-imports") {
            *caches = without_secrets(caches).unwrap_or_default();
        }
        let blob =
            |blob: &Option<HistoryBlob>| blob.as_ref().map_or(Value::Null, HistoryBlob::value);
        let results: Map<String, Value> =
            self.results.iter().map(|(platform, r)| (platform.clone(), r.value())).collect();
        kept([
            ("Ref", json!(self.reference)),
            ("Frontend", json!(self.frontend)),
            ("FrontendAttrs", json!(attrs)),
            ("Exporters", exporters.into()),
            ("error", error),
            ("CreatedAt", time(self.created_at)),
            ("CompletedAt", time(self.completed_at)),
            ("logs", blob(&self.logs)),
            ("ExporterResponse", json!(self.exporter_response)),
            ("Result", self.result.as_ref().map_or(Value::Null, HistoryResult::value)),
            ("Results", results.into()),
            ("Generation", self.generation.into()),
            ("trace", blob(&self.trace)),
            ("pinned", self.pinned.into()),
            ("numCachedSteps", self.cached_steps.into()),
            ("numTotalSteps", self.total_steps.into()),
            ("numCompletedSteps", self.completed_steps.into()),
            ("externalError", blob(&self.failure)),
            ("numWarnings", self.warnings.into()),
        ])
    }
}

/// Imported caches with what names them only.
fn without_secrets(caches: &str) -> Option<String> {
    let mut caches: Vec<Map<String, Value>> = serde_json::from_str(caches).ok()?;
    for cache in &mut caches {
        if let Some(attrs) = cache.get_mut("Attrs").and_then(Value::as_object_mut) {
            attrs.retain(|key, _| key == "scope" || key == "ref");
        }
    }
    serde_json::to_string(&caches).ok()
}

impl Client {
    /// The records that `query` asks for, and the daemon's time, where it says that.
    pub async fn history(
        &self,
        query: HistoryQuery,
    ) -> Result<(Option<Time>, impl Stream<Item = Result<HistoryEvent>> + Send + Unpin + use<>)>
    {
        let request = wire::BuildHistoryRequest {
            active_only: query.active,
            early_exit: !query.follow,
            r#ref: query.reference,
            filter: query.filter,
            limit: query.limit,
        };
        let answer = self
            .control()
            .listen_build_history(request)
            .await
            .map_err(|s| fault_of(&s).context("failed to list builds"))?;
        let now = answer.metadata().get(NOW).and_then(|v| v.to_str().ok());
        let now = now.and_then(timestamp::parse).map(Time);
        let events = answer
            .into_inner()
            .map_ok(HistoryEvent::from)
            .map_err(|s| fault_of(&s).context("failed to list builds"));
        Ok((now, events))
    }

    /// Why the build failed, with the lines of its Dockerfile and the step that failed, where the
    /// daemon kept that.
    pub async fn failure(&self, record: &HistoryRecord) -> Result<Option<Fault>> {
        let Some(blob) = &record.failure else { return Ok(None) };
        let bytes = self.blob(&blob.digest, MAX_FAILURE).await?;
        let status = rpc::Status::decode(&bytes[..]).map_err(|e| {
            Fault::invalid(format!("the failure {} cannot be read: {e}", blob.digest))
        })?;
        let details = tonic::Status::with_details(
            tonic::Code::from(status.code),
            status.message.clone(),
            bytes.into(),
        );
        Ok(Some(fault_of(&details)))
    }

    /// Lets the daemon complete the record of the build `reference`, such as its trace.
    pub async fn finalize_history(&self, reference: &str) -> Result<()> {
        let request = wire::UpdateBuildHistoryRequest {
            r#ref: reference.to_owned(),
            finalize: true,
            ..Default::default()
        };
        self.update(request, "finalize").await
    }

    /// Forgets the build `reference`.
    pub async fn delete_history(&self, reference: &str) -> Result<()> {
        let request = wire::UpdateBuildHistoryRequest {
            r#ref: reference.to_owned(),
            delete: true,
            ..Default::default()
        };
        self.update(request, "delete").await
    }

    /// Keeps the build `reference` for ever, or no longer.
    pub async fn pin_history(&self, reference: &str, pinned: bool) -> Result<()> {
        let request = wire::UpdateBuildHistoryRequest {
            r#ref: reference.to_owned(),
            pinned,
            ..Default::default()
        };
        self.update(request, "pin").await
    }

    async fn update(&self, request: wire::UpdateBuildHistoryRequest, what: &str) -> Result<()> {
        let reference = request.r#ref.clone();
        let answer = self.control().update_build_history(request).await;
        answer
            .map(drop)
            .map_err(|s| fault_of(&s).context(format!("{what} the record of build {reference}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_bundled_as_go_writes_the_message() {
        let blob = |name: &str| HistoryBlob {
            media_type: "m".into(),
            digest: format!("sha256:{name}"),
            size: 3,
            annotations: BTreeMap::new(),
        };
        let record = wire::BuildHistoryRecord {
            r#ref: "r1".into(),
            frontend: "dockerfile.v0".into(),
            frontend_attrs: [
                ("target".to_owned(), "x".to_owned()),
                (
                    "cache-imports".to_owned(),
                    r#"[{"Type":"s3","Attrs":{"ref":"a","secret_access_key":"S"}}]"#.to_owned(),
                ),
            ]
            .into(),
            created_at: Some(prost_types::Timestamp { seconds: 7, nanos: 5 }),
            num_total_steps: 2,
            ..Default::default()
        };
        let mut record = HistoryRecord::from(record);
        record.logs = Some(blob("logs"));
        record.result = Some(HistoryResult {
            attestations: vec![blob("a")],
            results: [(0, blob("image"))].into(),
        });
        assert_eq!(
            record.bundled().to_string(),
            r#"{"Ref":"r1","Frontend":"dockerfile.v0","FrontendAttrs":{"cache-imports":"[{\"Type\":\"s3\",\"Attrs\":{\"ref\":\"a\"}}]","target":"x"},"CreatedAt":{"seconds":7,"nanos":5},"logs":{"media_type":"m","digest":"sha256:logs","size":3},"Result":{"ResultDeprecated":{"media_type":"m","digest":"sha256:image","size":3},"Attestations":[{"media_type":"m","digest":"sha256:a","size":3}],"Results":{"0":{"media_type":"m","digest":"sha256:image","size":3}}},"numTotalSteps":2}"#
        );
        record.frontend_attrs.insert("cache-imports".into(), "not JSON with SECRET".into());
        assert!(!record.bundled().to_string().contains("SECRET"));
    }
}
