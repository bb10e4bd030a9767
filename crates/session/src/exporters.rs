//! Clients that choose exporters when the result is there, and want to know how exporting ended
//! (row `cb.exporter`).

use std::{collections::BTreeMap, time::Duration};

use shipway_fault::{Code, Result};
use shipway_proto::moby::exporter::v1::{
    FinalizeExportRequest, FindExportersRequest, exporter_client::ExporterClient,
};

use crate::{
    Session,
    call::{client, optional},
};

/// A client may look at the result before it chooses.
const LIMIT: Duration = Duration::from_secs(120);
/// Clients need not care for either.
const TOLERATED: [Code; 2] = [Code::Unavailable, Code::Unimplemented];

impl Session {
    /// The exporters, by type and attributes, that the client wants for a result with this
    /// metadata, whose states it may read by these ids.
    pub async fn find_exporters(
        &self,
        metadata: BTreeMap<String, Vec<u8>>,
        refs: Vec<String>,
    ) -> Result<Vec<(String, BTreeMap<String, String>)>> {
        let mut client = client!(ExporterClient, self);
        let call = client.find_exporters(FindExportersRequest { metadata, refs });
        let answer = optional(LIMIT, "ask the client for exporters", &TOLERATED, call).await?;
        Ok(answer.unwrap_or_default().exporters.into_iter().map(|e| (e.r#type, e.attrs)).collect())
    }

    /// Tells the client what all exporters answered; it may refuse the build for it.
    pub async fn finalize_export(&self, exporter_response: BTreeMap<String, String>) -> Result<()> {
        let mut client = client!(ExporterClient, self);
        let call = client.finalize_export(FinalizeExportRequest { exporter_response });
        optional(LIMIT, "tell the client what was exported", &TOLERATED, call).await.map(drop)
    }
}
