//! Scans of results that no frontend scanned (row `at.sbom.proc`).

use crate::{build::Build, export, frontends::EngineBridge, provenance::ResultProvenance};
use shipway_attest::SbomOptions;
use shipway_exporters::{Content, ExportAttestation};
use shipway_fault::{Context as _, Result};
use shipway_frontend::{FrontendOptions, Scan, Scanner};
use shipway_llb::{ResolveMode, State};
use std::{collections::BTreeMap, sync::Arc};

/// Runs the scanner over each result.
pub(crate) async fn scan(
    build: &Arc<Build>,
    sbom: &SbomOptions,
    options: &FrontendOptions,
    known: &BTreeMap<String, Arc<ResultProvenance>>,
) -> Result<Vec<(String, ExportAttestation)>> {
    // What the scanner uses is not what the result is made of.
    let (scope, bridge) = (&build.scope, EngineBridge::unlogged(build.clone()));
    let mode = options.get("image-resolve-mode").and_then(|mode| ResolveMode::parse(mode));
    let mode = mode.unwrap_or_default();
    let platform = scope.parts.native().clone();
    let scanner = Scanner::find(&bridge, sbom, platform, mode)
        .await
        .context(|| "find the scanner for an SBOM")?;
    // `no-cache` without stages is for all of them.
    let ignore_cache = options.get("no-cache").is_some_and(String::is_empty);
    let mut found = Vec::new();
    for (id, known) in known {
        let core = State::from_definition(&known.state.lazy.definition)?;
        let scan = Scan { platform: id, core: &core, extras: &BTreeMap::new(), ignore_cache };
        let attestation = scanner.scan(&bridge, &scan, scope.session.as_str()).await?;
        let state = export::state_of(build, &attestation.content).await?;
        found.push((id.clone(), attestation.with(Content::State(state))));
    }
    Ok(found)
}
