//! A build's caches: imported while it solves, exported after it (rows `rc.*`).

use super::vertex_digest;
use crate::{build::BuildScope, parts::EngineParts, permit};
use shipway_buildcache::room_was_made;
use shipway_exporters::{ExportInput, Exporter, Response};
use shipway_fault::{Code, Context as _, Fault, Result};
use shipway_oci::Digest;
use shipway_progress::{LogStream, Reporter};
use shipway_refs::{Compression, ImmutableRef};
use shipway_remotecache::{
    CacheBackend, CacheClients, CacheRequest, Export, ExportOptions, INLINE, Import, ReadCache,
};
use shipway_solver::CacheKey;
use std::{collections::HashSet, sync::Arc, time::Duration};

/// How long the import of a cache may take, unless the configuration says otherwise. The build runs
/// meanwhile, as far as it gets without the cache.
pub const IMPORT_DEADLINE: Duration = Duration::from_secs(30);

/// Imports caches, each beside the build (row `rc.lazyimp`): it is waited for where the index has
/// nothing, by everything that the build asks for, and by what is asked again for the same cache. A
/// failure is reported and fails nothing, but a cache that the build's caller may not read.
pub(crate) fn import_all(scope: &BuildScope, requests: &[CacheRequest]) -> Result<()> {
    permit::imports(&scope.parts, &scope.caller, requests)?;
    for request in requests {
        scope.import(request, || {
            let name = format!("importing cache manifest from {}", request.shown());
            let reporter = scope
                .journal
                .reporter(Digest::of(format!("{}\n{name}\n{:?}", scope.id, request.attrs)), name);
            let importing = Importing {
                parts: scope.parts.clone(),
                clients: clients(scope),
                reporter,
                request: request.clone(),
            };
            Import::new(&scope.parts.caches, importing.run())
        });
    }
    Ok(())
}

/// An import on its way. It does not hold the build, which may end before it does.
struct Importing {
    parts: Arc<EngineParts>,
    clients: CacheClients,
    reporter: Reporter,
    request: CacheRequest,
}

impl Importing {
    async fn run(self) -> Option<ReadCache> {
        self.reporter.started();
        let limit = self.parts.import_deadline;
        let done = tokio::time::timeout(limit, self.read()).await;
        let done = done.unwrap_or_else(|_| {
            let late = format!("it was not read within {} seconds", limit.as_secs());
            Err(Fault::new(Code::DeadlineExceeded, late).hint("the build goes on without it"))
        });
        match done {
            Ok(cache) => {
                self.reporter.completed(None);
                Some(cache)
            }
            Err(fault) => {
                let cache = self.request.shown();
                tracing::info!(error = %fault, cache, "failed to import cache");
                self.reporter
                    .warn_of(format!("the cache {cache} was not imported: {fault}"), &fault);
                self.reporter.completed(Some(fault.to_string()));
                None
            }
        }
    }

    async fn read(&self) -> Result<ReadCache> {
        let parts = &self.parts;
        let source = parts
            .cache_backends
            .importer(&self.request)?
            .source(&self.request, &self.clients)
            .await?;
        shipway_remotecache::read(&parts.services.sources, &source).await
    }
}

/// The clients of a build, as its caches see them.
pub(crate) fn clients(scope: &BuildScope) -> CacheClients {
    CacheClients { all: scope.data.sessions.clone(), own: scope.session.clone() }
}

/// Keys of what is not to be exported, though it may be used (row `llb.md.exportcache`).
async fn withheld(scope: &BuildScope) -> HashSet<CacheKey> {
    let known = scope.job.solved_vertices().await;
    known.into_iter().filter(|k| !k.vertex.op.is_for_export()).flat_map(|k| k.keys).collect()
}

/// States that a cache is exported for.
fn roots(input: &ExportInput) -> Vec<ImmutableRef> {
    input.platforms.iter().map(|p| p.state.clone()).collect()
}

/// Adds caches to the metadata of an exporter that writes image configs, if one was asked for (row
/// `rc.inline`).
pub(crate) async fn inline(
    scope: &BuildScope,
    requests: &[CacheRequest],
    exporter: &dyn Exporter,
    mut input: ExportInput,
    reporter: &Reporter,
) -> Result<ExportInput> {
    let Some(compression) =
        exporter.wants_layers().filter(|_| requests.iter().any(|r| r.kind == INLINE))
    else {
        return Ok(input);
    };
    let name = "preparing layers for inline cache";
    reporter.status(name, 0, 0, false);
    prepare_inline(scope, &mut input, compression, reporter).await.context(|| name)?;
    reporter.status(name, 0, 0, true);
    Ok(input)
}

async fn prepare_inline(
    scope: &BuildScope,
    input: &mut ExportInput,
    compression: Compression,
    reporter: &Reporter,
) -> Result<()> {
    let options = ExportOptions { compression, ..ExportOptions::default() };
    let withheld = withheld(scope).await;
    for platform in &input.platforms {
        let roots = std::slice::from_ref(&platform.state);
        if let Some(export) = Export::prepare(
            &scope.parts.caches,
            &scope.imports(),
            roots,
            &withheld,
            &options,
            reporter,
        )
        .await?
        {
            input.metadata.insert(
                format!("containerimage.inlinecache/{}", platform.id),
                export.inline(&platform.state).await?,
            );
        }
    }
    Ok(())
}

/// Exports caches, each under its own vertex; gives what the client is answered (row
/// `ex.resp.cache`). All are brought to their end before one fails the build.
pub(crate) async fn export_all(
    scope: &BuildScope,
    requests: &[CacheRequest],
    input: &ExportInput,
) -> Result<Response> {
    let each = requests.iter().filter(|r| r.kind != INLINE).enumerate().map(|(index, request)| async move {
        match export_one(scope, index, request, input).await {
            Err(fault) if excused(scope, request, &fault) => {
                tracing::info!(error = %fault, cache = request.shown(), "failed to export cache, ignored");
                Ok(Response::new())
            }
            other => other,
        }
    });
    let all = futures::future::join_all(each).await;
    Ok(all.into_iter().collect::<Result<Vec<Response>>>()?.into_iter().flatten().collect())
}

async fn export_one(
    scope: &BuildScope,
    index: usize,
    request: &CacheRequest,
    input: &ExportInput,
) -> Result<Response> {
    let backend = scope.parts.cache_backends.exporter(request)?;
    let reporter = scope
        .journal
        .reporter(vertex_digest(scope.session.as_str(), "cache", index), backend.export_title());
    reporter.started();
    let writing = scope.parts.services.quota.enter().await;
    let mut done = try_export(scope, backend, request, input, &reporter).await;
    if let Err(fault) = &done
        && let Some(pruned) = writing.made_room(fault).await
    {
        reporter.log(LogStream::Stderr, room_was_made(pruned).as_bytes());
        done = try_export(scope, backend, request, input, &reporter).await;
    }
    if let Err(fault) = done.as_ref()
        && excused(scope, request, fault)
    {
        reporter.warn_of(format!("the cache {} was not exported: {fault}", request.shown()), fault);
    }
    reporter.completed(done.as_ref().err().map(ToString::to_string));
    done
}

/// Whether a build succeeds without an export that failed (row `rc.ignore`).
fn excused(scope: &BuildScope, request: &CacheRequest, fault: &Fault) -> bool {
    let backend = scope.parts.cache_backends.exporter(request);
    request.excuses(fault, backend.is_ok_and(CacheBackend::is_best_effort))
}

async fn try_export(
    scope: &BuildScope,
    backend: &dyn CacheBackend,
    request: &CacheRequest,
    input: &ExportInput,
    reporter: &Reporter,
) -> Result<Response> {
    let parts = &scope.parts;
    let writer = backend.writer(request, &clients(scope)).await?;
    let options = ExportOptions::of(request)?;
    reporter.status("preparing build cache for export", 0, 0, false);
    let export = Export::prepare(
        &parts.caches,
        &scope.imports(),
        &roots(input),
        &withheld(scope).await,
        &options,
        reporter,
    )
    .await?;
    reporter.status("preparing build cache for export", 0, 0, true);
    let Some(export) = export else {
        reporter.status("skipping cache export for empty result", 0, 0, true);
        return Ok(Response::new());
    };
    let content = &parts.services.refs.storage().content;
    let Some(descriptor) = export.write(&*writer, content, &options, reporter).await? else {
        return Ok(Response::new());
    };
    let json = serde_json::to_string(&descriptor)
        .map_err(|e| Fault::internal(format!("encode a descriptor: {e}")))?;
    Ok(Response::from([("cache.manifest".to_owned(), json)]))
}
