//! A build's caches: imported while it solves, exported after it (section 7 of the reference).

use crate::{bridge::BuildScope, engine::EngineInner};
use shipway_exporters::{ExportInput, Exporter, Response};
use shipway_fault::{Code, Context as _, Fault, Result};
use shipway_oci::{Digest, ImageName};
use shipway_progress::{Reporter, WarningUpdate};
use shipway_refs::{Compression, ImmutableRef};
use shipway_registry::{Mode as Direction, Repository};
use shipway_remotecache::{CacheRequest, Export, ExportOptions, Import, Place, ReadCache};
use shipway_session::{SessionGroup, SessionId};
use shipway_solver::CacheKey;
use shipway_sources::{Remote, SessionCredentials};
use std::{collections::HashSet, sync::Arc, time::Duration};

/// How long the import of a cache may take, unless the configuration says otherwise. The build runs
/// meanwhile, as far as it gets without the cache.
pub const IMPORT_DEADLINE: Duration = Duration::from_secs(30);

/// Checks what is asked before anything is built (thirteenth trap of the reference).
pub(crate) fn check(exports: &[CacheRequest]) -> Result<()> {
    let mut seen: HashSet<(&str, String)> = HashSet::new();
    let mut doubles = Vec::new();
    for export in exports {
        let same = match (export.kind.as_str(), export.attrs.get("ref")) {
            ("inline", _) => continue,
            ("registry", Some(reference)) => reference.clone(),
            _ => format!("{:?}", export.attrs),
        };
        if !seen.insert((&export.kind, same)) {
            doubles.push(export.kind.as_str());
        }
        match export.kind.as_str() {
            "registry" | "local" => {
                export.needed(if export.kind == "local" { "dest" } else { "ref" })?;
                ExportOptions::of(export).context(|| format!("failed to configure {} cache exporter", export.kind))?;
            }
            "s3" | "gha" | "azblob" if export.ignores_errors() => {}
            "s3" | "gha" | "azblob" => return Err(Fault::unimplemented(format!("exporting a {} cache", export.kind))),
            other => return Err(Fault::invalid(format!("unknown cache exporter: {other:?}")).hint("use registry, local or inline")),
        }
    }
    if doubles.is_empty() { Ok(()) } else { Err(Fault::invalid(format!("duplicate cache exports [{}]", doubles.join(" ")))) }
}

fn repository(
    engine: &EngineInner,
    sessions: &SessionGroup,
    request: &CacheRequest,
    direction: Direction,
) -> Result<(Repository, ImageName)> {
    let reference = request.needed("ref")?;
    let name: ImageName = reference.parse().map_err(|e| Fault::invalid(format!("failed to parse {reference}: {e}")))?;
    let credentials = Arc::new(SessionCredentials::new(sessions.clone()));
    let repository = engine.parts.registry.repository(&name, credentials, direction);
    Ok((if request.flag("registry.insecure")?.unwrap_or(false) { repository.insecure() } else { repository }, name))
}

/// Imports caches, each beside the build (row `rc.lazyimp`): it is waited for where the index has
/// nothing, by everything that the build asks for, and by what is asked again for the same cache. A
/// failure is told and fails nothing.
pub(crate) fn import_all(scope: &BuildScope, requests: &[CacheRequest]) {
    for request in requests {
        scope.import(request, || {
            let name = format!("importing cache manifest from {}", request.shown());
            let reporter = scope.journal.reporter(Digest::of(format!("{}\n{name}\n{:?}", scope.id, request.attrs)), name);
            let importing = Importing {
                engine: scope.engine.clone(),
                sessions: scope.data.sessions.clone(),
                session: scope.session.clone(),
                reporter,
                request: request.clone(),
            };
            Import::new(&scope.engine.parts.caches, importing.run())
        });
    }
}

/// An import on its way. It does not hold the build, which may end before it does.
struct Importing {
    engine: Arc<EngineInner>,
    sessions: SessionGroup,
    session: String,
    reporter: Reporter,
    request: CacheRequest,
}

impl Importing {
    async fn run(self) -> Option<ReadCache> {
        self.reporter.started();
        let limit = self.engine.parts.import_deadline;
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
                tracing::info!(error = %fault, cache, "a cache was not imported");
                self.reporter.warn(WarningUpdate {
                    vertex: self.reporter.digest(),
                    level: 1,
                    short: format!("the cache {cache} was not imported: {fault}"),
                    detail: fault.hints().map(str::to_owned).collect(),
                    url: String::new(),
                    source: None,
                });
                self.reporter.completed(Some(fault.to_string()));
                None
            }
        }
    }

    async fn read(&self) -> Result<ReadCache> {
        let (parts, request) = (&self.engine.parts, &self.request);
        let (remote, reference) = match request.kind.as_str() {
            "registry" => {
                let (repository, name) = repository(&self.engine, &self.sessions, request, Direction::Pull)?;
                (Remote::Registry(Box::new(repository)), name.reference())
            }
            "local" => {
                let session = parts.sessions.get(&SessionId::new(&self.session)).await?;
                let src = request.needed("src")?;
                let store = session.store(&format!("local:{src}"))?;
                (Remote::Client { store, name: src.to_owned() }, request.needed("digest")?.to_owned())
            }
            other => return Err(Fault::unimplemented(format!("importing a {other} cache"))),
        };
        shipway_remotecache::read(&parts.services.sources, remote, &reference).await
    }
}

/// Keys of what is not to be exported, though it may be used (row `llb.md.exportcache`).
async fn withheld(scope: &BuildScope) -> HashSet<CacheKey> {
    let known = scope.job.known().await;
    known.into_iter().filter(|k| !k.vertex.op.is_for_export()).flat_map(|k| k.keys).collect()
}

/// States that a cache is exported for.
fn roots(input: &ExportInput) -> Vec<ImmutableRef> {
    input.platforms.iter().map(|p| p.state.clone()).collect()
}

/// Adds caches to the metadata of an exporter that writes image configs, if one was asked for (row `rc.inline`).
pub(crate) async fn inline(
    scope: &BuildScope,
    requests: &[CacheRequest],
    exporter: &dyn Exporter,
    mut input: ExportInput,
    reporter: &Reporter,
) -> Result<ExportInput> {
    let Some(compression) = exporter.wants_layers().filter(|_| requests.iter().any(|r| r.kind == "inline")) else { return Ok(input) };
    let name = "preparing layers for inline cache";
    reporter.status(name, 0, 0, false);
    prepare_inline(scope, &mut input, compression, reporter).await.context(|| name)?;
    reporter.status(name, 0, 0, true);
    Ok(input)
}

async fn prepare_inline(scope: &BuildScope, input: &mut ExportInput, compression: Compression, reporter: &Reporter) -> Result<()> {
    let options = ExportOptions { compression, ..ExportOptions::default() };
    let withheld = withheld(scope).await;
    for platform in &input.platforms {
        let roots = std::slice::from_ref(&platform.state);
        if let Some(export) = Export::prepare(&scope.engine.parts.caches, &scope.imports(), roots, &withheld, &options, reporter).await? {
            input.metadata.insert(format!("containerimage.inlinecache/{}", platform.id), export.inline(&platform.state).await?);
        }
    }
    Ok(())
}

/// Exports caches, each under its own vertex; gives what the client is told (row `ex.resp.cache`).
/// All are brought to their end before one fails the build.
pub(crate) async fn export_all(scope: &BuildScope, requests: &[CacheRequest], input: &ExportInput) -> Result<Response> {
    let each = requests.iter().filter(|r| r.kind != "inline").enumerate().map(|(index, request)| async move {
        match export_one(scope, index, request, input).await {
            Err(fault) if request.ignores_errors() => {
                tracing::info!(error = %fault, cache = request.shown(), "a cache was not exported");
                Ok(Response::new())
            }
            other => other,
        }
    });
    let all = futures::future::join_all(each).await;
    Ok(all.into_iter().collect::<Result<Vec<Response>>>()?.into_iter().flatten().collect())
}

async fn export_one(scope: &BuildScope, index: usize, request: &CacheRequest, input: &ExportInput) -> Result<Response> {
    let name = match request.kind.as_str() {
        "local" => "exporting cache to client directory".to_owned(),
        kind => format!("exporting cache to {kind}"),
    };
    let reporter = scope.journal.reporter(Digest::of(format!("{}-cache-{index}", scope.session)), name);
    reporter.started();
    let done = try_export(scope, request, input, &reporter).await;
    reporter.completed(done.as_ref().err().map(ToString::to_string));
    done
}

async fn try_export(scope: &BuildScope, request: &CacheRequest, input: &ExportInput, reporter: &Reporter) -> Result<Response> {
    let parts = &scope.engine.parts;
    let place = match request.kind.as_str() {
        "registry" => {
            let (repository, name) = repository(&scope.engine, &scope.data.sessions, request, Direction::Push)?;
            Place::Registry { repository: Box::new(repository), tag: name.tag().unwrap_or("latest").to_owned() }
        }
        "local" => {
            let session = parts.sessions.get(&SessionId::new(&scope.session)).await?;
            Place::Client(session.store(&format!("local:{}", request.needed("dest")?))?)
        }
        other => return Err(Fault::unimplemented(format!("exporting a {other} cache"))),
    };
    let options = ExportOptions::of(request)?;
    reporter.status("preparing build cache for export", 0, 0, false);
    let export = Export::prepare(&parts.caches, &scope.imports(), &roots(input), &withheld(scope).await, &options, reporter).await?;
    reporter.status("preparing build cache for export", 0, 0, true);
    let Some(export) = export else {
        reporter.status("skipping cache export for empty result", 0, 0, true);
        return Ok(Response::new());
    };
    let content = &parts.services.refs.storage().content;
    let descriptor = export.write(&place, content, &options, reporter).await?;
    let json = serde_json::to_string(&descriptor).map_err(|e| Fault::internal(format!("encode a descriptor: {e}")))?;
    Ok(Response::from([("cache.manifest".to_owned(), json)]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn doubles_and_unknown_kinds_are_refused_before_the_build() {
        let request = |kind: &str, attrs: &[(&str, &str)]| CacheRequest {
            kind: kind.into(),
            attrs: attrs.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect(),
        };
        let say = |all: &[CacheRequest]| check(all).err().map(|e| e.to_string()).unwrap_or_default();
        let registry = request("registry", &[("ref", "a/b")]);
        assert_eq!(say(&[registry.clone(), request("inline", &[]), request("inline", &[])]), "");
        assert!(say(&[registry.clone(), registry]).contains("duplicate cache exports [registry]"));
        assert!(say(&[request("x", &[])]).contains("unknown cache exporter"));
        assert!(say(&[request("local", &[])]).contains("requires dest"));
        assert_eq!(say(&[request("s3", &[("ignore-error", "true")])]), "");
        assert!(!say(&[request("s3", &[])]).is_empty());
    }
}
