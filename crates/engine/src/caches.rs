//! A build's caches: imported before it solves, exported after it (section 7 of the reference).

use crate::bridge::BuildScope;
use shipway_exporters::{ExportInput, Exporter, Response};
use shipway_fault::{Context as _, Fault, Result};
use shipway_oci::{Digest, ImageName};
use shipway_progress::Reporter;
use shipway_refs::{Compression, ImmutableRef};
use shipway_registry::{Mode as Direction, Repository};
use shipway_remotecache::{CacheRequest, Export, ExportOptions, Place, import};
use shipway_session::SessionId;
use shipway_sources::{Remote, SessionCredentials};
use std::{collections::HashSet, sync::Arc};

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

fn repository(scope: &BuildScope, request: &CacheRequest, direction: Direction) -> Result<(Repository, ImageName)> {
    let reference = request.needed("ref")?;
    let name: ImageName = reference.parse().map_err(|e| Fault::invalid(format!("failed to parse {reference}: {e}")))?;
    let credentials = Arc::new(SessionCredentials::new(scope.data.sessions.clone()));
    let repository = scope.engine.parts.registry.repository(&name, credentials, direction);
    Ok((if request.flag("registry.insecure")?.unwrap_or(false) { repository.insecure() } else { repository }, name))
}

/// Imports caches; a failure is told and fails nothing. They are in use until the build ends.
pub(crate) async fn import_all(scope: &Arc<BuildScope>, requests: &[CacheRequest]) {
    let fresh = requests.iter().filter(|r| scope.wants_import(r));
    futures::future::join_all(fresh.map(|r| import_one(scope, r))).await;
}

async fn import_one(scope: &Arc<BuildScope>, request: &CacheRequest) {
    let name = format!("importing cache manifest from {}", request.shown());
    let reporter = scope.journal.reporter(Digest::of(format!("{}\n{name}\n{:?}", scope.id, request.attrs)), name);
    reporter.started();
    let done = try_import(scope, request).await;
    let error = done.err().map(|fault| {
        tracing::info!(error = %fault, cache = request.shown(), "a cache was not imported");
        fault.to_string()
    });
    reporter.completed(error);
}

async fn try_import(scope: &Arc<BuildScope>, request: &CacheRequest) -> Result<()> {
    let parts = &scope.engine.parts;
    let (remote, reference) = match request.kind.as_str() {
        "registry" => {
            let (repository, name) = repository(scope, request, Direction::Pull)?;
            (Remote::Registry(Box::new(repository)), name.reference())
        }
        "local" => {
            let session = parts.sessions.get(&SessionId::new(&scope.session)).await?;
            let src = request.needed("src")?;
            (Remote::Client { store: session.store(&format!("local:{src}"))?, name: src.to_owned() }, request.needed("digest")?.to_owned())
        }
        other => return Err(Fault::unimplemented(format!("importing a {other} cache"))),
    };
    if let Some(attached) = import(&parts.caches, &parts.services.sources, remote, &reference).await? {
        scope.hold(attached);
    }
    Ok(())
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
) -> Result<ExportInput> {
    let Some(compression) = exporter.wants_layers().filter(|_| requests.iter().any(|r| r.kind == "inline")) else { return Ok(input) };
    let name = "preparing layers for inline cache";
    let reporter = scope.journal.reporter(Digest::of(format!("{}\n{name}", scope.id)), name);
    reporter.started();
    let done = prepare_inline(scope, &mut input, compression, &reporter).await;
    reporter.completed(done.as_ref().err().map(ToString::to_string));
    done.context(|| name)?;
    Ok(input)
}

async fn prepare_inline(scope: &BuildScope, input: &mut ExportInput, compression: Compression, reporter: &Reporter) -> Result<()> {
    let options = ExportOptions { compression, ..ExportOptions::default() };
    for platform in &input.platforms {
        let roots = std::slice::from_ref(&platform.state);
        if let Some(export) = Export::prepare(&scope.engine.parts.caches, roots, &options, reporter).await? {
            input.metadata.insert(format!("containerimage.inlinecache/{}", platform.id), export.inline()?);
        }
    }
    Ok(())
}

/// Exports caches, each under its own vertex; gives what the client is told (row `ex.resp.cache`).
pub(crate) async fn export_all(scope: &BuildScope, requests: &[CacheRequest], input: &ExportInput) -> Result<Response> {
    let each = requests.iter().filter(|r| r.kind != "inline").map(|request| async {
        match export_one(scope, request, input).await {
            Err(fault) if request.ignores_errors() => {
                tracing::info!(error = %fault, cache = request.shown(), "a cache was not exported");
                Ok(Response::new())
            }
            other => other,
        }
    });
    Ok(futures::future::try_join_all(each).await?.into_iter().flatten().collect())
}

async fn export_one(scope: &BuildScope, request: &CacheRequest, input: &ExportInput) -> Result<Response> {
    let name = match request.kind.as_str() {
        "local" => "exporting cache to client directory".to_owned(),
        kind => format!("exporting cache to {kind}"),
    };
    let reporter = scope.journal.reporter(Digest::of(format!("{}\n{name}\n{:?}", scope.id, request.attrs)), name.clone());
    reporter.started();
    let done = try_export(scope, request, input, &reporter).await;
    reporter.completed(done.as_ref().err().map(ToString::to_string));
    done
}

async fn try_export(scope: &BuildScope, request: &CacheRequest, input: &ExportInput, reporter: &Reporter) -> Result<Response> {
    let parts = &scope.engine.parts;
    let place = match request.kind.as_str() {
        "registry" => {
            let (repository, name) = repository(scope, request, Direction::Push)?;
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
    let export = Export::prepare(&parts.caches, &roots(input), &options, reporter).await?;
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
