//! From a frontend's result to exporters.

pub(crate) mod caches;
pub(crate) mod mounts;
pub(crate) mod verify;

use crate::{
    build::{Build, BuildScope},
    permit,
};
use shipway_buildcache::room_was_made;
use shipway_exporters::{
    ExportContext, ExportInput, ExportPlatform, Exported, Exporter, Finalizers, Response,
    StateWatcher,
};
use shipway_fault::{Context as _, Fault, Result};
use shipway_frontend::{BuildRef, FrontendResult};
use shipway_oci::{Descriptor, Digest, Platform};
use shipway_progress::LogStream;
use shipway_refs::{Compression, ImmutableRef};
use shipway_remotecache::CacheRequest;
use shipway_telemetry::{TARGET, traced_result};
use std::{collections::BTreeMap, sync::Arc};
use tracing::info_span;

/// `refs.platforms` of a frontend's metadata.
#[derive(serde::Deserialize)]
struct Platforms {
    #[serde(rename = "Platforms", default)]
    platforms: Option<Vec<PlatformEntry>>,
}

#[derive(serde::Deserialize)]
struct PlatformEntry {
    #[serde(rename = "ID", default)]
    id: String,
    #[serde(rename = "Platform")]
    platform: Platform,
}

/// One platform's id, platform and unsolved state.
type Wanted<'a> = (String, Platform, &'a Option<Arc<dyn BuildRef>>);

/// The state behind a reference, solved; nothing at all is an empty one.
pub(crate) async fn state_of(
    build: &Build,
    state: &Option<Arc<dyn BuildRef>>,
) -> Result<ImmutableRef> {
    match state {
        None => build.scope.parts.services.refs.scratch(),
        Some(r) => build.states.state_of(r.as_ref()).await,
    }
}

/// Lets the build's vertices know that the state will be exported with `compression`, and by whom
/// it is watched for.
fn plan_export(
    build: &Build,
    state: &dyn BuildRef,
    compression: Compression,
    watchers: &[StateWatcher],
) {
    if let Some(state) = build.states.find(state).filter(|s| !s.lazy.is_solved()) {
        let (plan, lazy) = (&build.scope.data.export_plan, &state.lazy);
        plan.add(&lazy.vertex, lazy.output, compression, watchers);
    }
}

/// Solves everything in `result`, all platforms at once, for `exporters`.
pub(crate) async fn solve_all(
    build: &Build,
    result: &FrontendResult,
    exporters: &[Arc<dyn Exporter>],
) -> Result<ExportInput> {
    let (scope, listed) = (&build.scope, listed(result)?);
    let mut wanted: Vec<Wanted<'_>> = Vec::new();
    match (&result.single, listed) {
        (Some(state), listed) => {
            let entry = listed.and_then(|l| l.into_iter().next());
            let platform = match entry {
                Some(e) => (e.id, e.platform),
                None => (
                    scope.parts.native().to_string(),
                    config_platform(result)?.unwrap_or_else(|| scope.parts.native().clone()),
                ),
            };
            wanted.push((platform.0, platform.1, state));
        }
        (None, None) if result.map.is_empty() => {}
        (None, None) => {
            return Err(Fault::invalid(
                "unable to export multiple refs, missing platforms mapping",
            ));
        }
        (None, Some(listed)) => {
            for e in listed {
                let state = result
                    .map
                    .get(&e.id)
                    .ok_or_else(|| Fault::invalid(format!("failed to find ref for ID {}", e.id)))?;
                wanted.push((e.id, e.platform, state));
            }
        }
    }
    if let Some(compression) = exporters.iter().find_map(|e| e.wants_layers()) {
        let watching = exporters.iter().enumerate().filter_map(|(n, e)| e.watcher(&scope.id, n));
        let watching: Vec<StateWatcher> = watching.collect();
        for (_, platform, state) in &wanted {
            // Images of other platforms are not unpacked here.
            let runs = platform.rank_for(&Platform::host()).is_some();
            let watchers = if runs { &watching[..] } else { &[] };
            if let Some(state) = state {
                plan_export(build, state.as_ref(), compression, watchers);
            }
        }
        if exporters.iter().any(|e| e.wants_opened()) {
            build.scope.data.export_plan.note_opened();
        }
    }
    let solved =
        futures::future::try_join_all(wanted.iter().map(|(_, _, state)| state_of(build, state)))
            .await?;
    let platforms = wanted
        .into_iter()
        .zip(solved)
        .map(|((id, platform, _), state)| ExportPlatform { id, platform, state })
        .collect();
    let attestations = BTreeMap::new();
    Ok(ExportInput {
        platforms,
        is_map: result.single.is_none(),
        metadata: result.metadata.clone(),
        attestations,
    })
}

/// The platforms that the frontend lists, checked as clients expect it (row `ex.c.platforms`).
fn listed(result: &FrontendResult) -> Result<Option<Vec<PlatformEntry>>> {
    let Some(json) = result.metadata.get("refs.platforms") else { return Ok(None) };
    let parsed: Option<Platforms> = serde_json::from_slice(json).map_err(|e| {
        Fault::invalid(format!("failed to parse platforms passed to exporter: {e}"))
    })?;
    let entries = parsed.and_then(|p| p.platforms).unwrap_or_default();
    if entries.is_empty() {
        return Err(Fault::invalid("invalid empty platforms index for exporter"));
    }
    for entry in &entries {
        if entry.id.is_empty() {
            return Err(Fault::invalid("invalid empty platform key for exporter"));
        }
        if entry.platform.os.is_empty() || entry.platform.architecture.is_empty() {
            return Err(Fault::invalid(format!(
                "invalid platform value {} for exporter",
                entry.platform
            )));
        }
    }
    Ok(Some(entries))
}

fn config_platform(result: &FrontendResult) -> Result<Option<Platform>> {
    let Some(json) = result.metadata.get("containerimage.config") else { return Ok(None) };
    // The exporter refuses what is not a config at all.
    let Ok(Some(config)) = serde_json::from_slice::<Option<shipway_oci::ImageConfig>>(json) else {
        return Ok(None);
    };
    match (config.os.is_empty(), config.architecture.is_empty()) {
        (true, true) => Ok(None),
        (false, false) => Ok(Some(config.platform())),
        _ => Err(Fault::invalid(
            "invalid image config: os and architecture must be specified together",
        )),
    }
}

/// The exporters that the client wants now that it can look at the result (row `cb.exporter`).
pub(crate) async fn chosen_by_client(
    scope: &BuildScope,
    result: &FrontendResult,
) -> Result<Vec<Arc<dyn Exporter>>> {
    let session = scope.data.sessions.hub().get(&scope.session).await?;
    let states = result.single.iter().flatten().chain(result.map.values().flatten());
    let refs = states.map(|s| s.id().to_owned()).collect();
    let chosen = session.find_exporters(result.metadata.clone(), refs).await?;
    chosen.iter().map(|(kind, attrs)| scope.parts.exporters.resolve(kind, attrs)).collect()
}

/// The digest of the vertex that stands for exporter or cache export `index` of a session (`kind`
/// is `export` or `cache`), as clients work it out to know it among the vertices of a build (row
/// `ex.vertex`).
pub(crate) fn vertex_digest(session: &str, kind: &str, index: usize) -> Digest {
    Digest::of(format!("{session}-{kind}-{index}"))
}

/// One exporter's vertex.
struct ExportVertex<'a> {
    exporter: &'a Arc<dyn Exporter>,
    cx: ExportContext,
}

impl<'a> ExportVertex<'a> {
    fn new(scope: &BuildScope, index: usize, exporter: &'a Arc<dyn Exporter>) -> Self {
        let digest = vertex_digest(scope.session.as_str(), "export", index);
        let cx = ExportContext {
            build: scope.id.clone(),
            compatibility: scope.compatibility,
            index,
            session: scope.session.clone(),
            sessions: scope.data.sessions.clone(),
            reporter: scope.journal.reporter(digest, exporter.name()),
            finalizers: Finalizers::default(),
        };
        Self { exporter, cx }
    }

    /// `work` as the vertex's.
    async fn during<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        self.cx.reporter.started();
        let span = info_span!(target: TARGET, "vertex", otel.name = self.exporter.name());
        let done = traced_result(span, work).await;
        self.cx.reporter.completed(done.as_ref().err().map(ToString::to_string));
        done.context(|| self.exporter.name().to_owned())
    }

    async fn export(
        &self,
        scope: &BuildScope,
        caches: &[CacheRequest],
        input: ExportInput,
    ) -> Result<Exported> {
        let export = async {
            let writing = scope.parts.services.quota.enter().await;
            let done = self.export_once(scope, caches, input.clone()).await;
            // What is sent needs no room here, so nothing was sent yet.
            if let Err(fault) = &done
                && let Some(pruned) = writing.made_room(fault).await
            {
                self.cx.reporter.log(LogStream::Stderr, room_was_made(pruned).as_bytes());
                drop(self.cx.finalizers.take());
                return self.export_once(scope, caches, input).await;
            }
            done
        };
        self.during(export).await
    }

    async fn export_once(
        &self,
        scope: &BuildScope,
        caches: &[CacheRequest],
        input: ExportInput,
    ) -> Result<Exported> {
        let input =
            caches::inline(scope, caches, self.exporter.as_ref(), input, &self.cx.reporter).await?;
        self.exporter.export(input, &self.cx).await
    }

    /// Does what the exporter left for the time when all others have succeeded, too.
    async fn finalize(&self) -> Result<()> {
        let left = self.cx.finalizers.take();
        if left.is_empty() {
            return Ok(());
        }
        let all = async {
            for work in left {
                work.await?;
            }
            Ok(())
        };
        self.during(all).await
    }
}

/// Runs all exporters; their answers share one map (row `ex.multi`). Besides it, what each wrote
/// into the content store, by exporter. When all have succeeded, images are pushed and caches
/// exported side by side; one that fails does not keep another from its end (row `ex.img.push`).
pub(crate) async fn run_all(
    scope: &BuildScope,
    exporters: &[Arc<dyn Exporter>],
    caches: &[CacheRequest],
    input: &ExportInput,
) -> Result<(Response, BTreeMap<usize, Descriptor>)> {
    permit::exports(&scope.caller, exporters, Some(&input.metadata))?;
    let vertices: Vec<ExportVertex<'_>> =
        exporters.iter().enumerate().map(|(i, e)| ExportVertex::new(scope, i, e)).collect();
    let each = vertices.iter().map(|v| v.export(scope, caches, input.clone()));
    let (mut all, mut written) = (Response::new(), BTreeMap::new());
    for (index, exported) in futures::future::try_join_all(each).await?.into_iter().enumerate() {
        written.extend(exported.written.map(|d| (index, d)));
        all.extend(exported.response);
    }
    let pushes = futures::future::join_all(vertices.iter().map(ExportVertex::finalize));
    let (pushes, caches) = futures::join!(pushes, caches::export_all(scope, caches, input));
    pushes.into_iter().collect::<Result<()>>()?;
    all.extend(caches?);
    Ok((all, written))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn result(key: &str, value: &str) -> FrontendResult {
        FrontendResult {
            metadata: [(key.to_owned(), value.as_bytes().to_vec())].into(),
            ..FrontendResult::default()
        }
    }

    #[test]
    fn vertices_of_exports_are_known_by_session_and_place() {
        assert_eq!(vertex_digest("s", "export", 0), Digest::of("s-export-0"));
        assert_eq!(vertex_digest("s", "cache", 12), Digest::of("s-cache-12"));
    }

    #[test]
    fn platforms_are_checked_in_words_that_clients_know() {
        for (json, want) in [
            ("null", "invalid empty platforms index for exporter"),
            (r#"{"Platforms":[]}"#, "invalid empty platforms index for exporter"),
            (
                r#"{"Platforms":[{"Platform":{"os":"linux","architecture":"amd64"}}]}"#,
                "invalid empty platform key for exporter",
            ),
            (
                r#"{"Platforms":[{"ID":"a","Platform":{"os":"","architecture":"amd64"}}]}"#,
                "invalid platform value",
            ),
            (r#"{"Platforms":[{"ID":"a","Platform":{"os":"linux","architecture":"amd64"}}]}"#, ""),
        ] {
            let said = listed(&result("refs.platforms", json))
                .err()
                .map(|e| e.to_string())
                .unwrap_or_default();
            assert!(said.contains(want) && said.is_empty() == want.is_empty(), "{json}: {said}");
        }
        assert!(config_platform(&result("containerimage.config", r#"{"os":"linux"}"#)).is_err());
        assert_eq!(config_platform(&result("containerimage.config", "null")).unwrap(), None);
    }
}
