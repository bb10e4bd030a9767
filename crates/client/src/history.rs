//! Records of past and running builds (rows `ctl.hist.*`).

use std::collections::BTreeMap;

use futures::{Stream, TryStreamExt};
use serde::Serialize;
use shipway_fault::Result;
use shipway_grpc::fault_of;
use shipway_proto::moby::buildkit::v1 as wire;

use crate::{Client, status::Time};

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
#[derive(Clone, Debug, PartialEq, Serialize)]
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

impl From<wire::BuildHistoryRecord> for HistoryRecord {
    fn from(r: wire::BuildHistoryRecord) -> Self {
        Self {
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

impl Client {
    /// The records there are (only `reference`, if given), and then, if `follow`, what happens to
    /// them.
    pub async fn history(
        &self,
        reference: Option<&str>,
        follow: bool,
    ) -> Result<impl Stream<Item = Result<HistoryEvent>> + Send + Unpin + use<>> {
        let request = wire::BuildHistoryRequest {
            early_exit: !follow,
            r#ref: reference.unwrap_or_default().to_owned(),
            ..Default::default()
        };
        let answer = self
            .control()
            .listen_build_history(request)
            .await
            .map_err(|s| fault_of(&s).context("failed to list builds"))?;
        Ok(answer
            .into_inner()
            .map_ok(HistoryEvent::from)
            .map_err(|s| fault_of(&s).context("failed to list builds")))
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
