//! Contents of a build's cache mounts: where they are restored from, and saving them after it.

use super::{caches, vertex_digest};
use crate::{build::BuildScope, parts::EngineParts, request::BuildRequest};
use futures::{FutureExt as _, future::BoxFuture};
use shipway_cachemounts::{
    Archive, Direction, Place, REQUEST, RESPONSE, Request, SaveOutcome, Saved, save,
};
use shipway_exporters::Response;
use shipway_fault::{Code, Context as _, Fault, Result};
use shipway_oci::Descriptor;
use shipway_ops::{CacheMounts, MountSource, OpenPlace, UsedMount};
use shipway_progress::Reporter;
use shipway_remotecache::{CacheClients, CacheRequest};
use std::{sync::Arc, time::Duration};

/// How long a save waits for a cache mount that another step has for itself.
const LOCK_WAIT: Duration = Duration::from_secs(30);

/// What a build asks for with its cache mounts.
#[derive(Clone, Debug, Default)]
pub(crate) struct MountRequests {
    pub saves: Vec<Request>,
    pub restores: Vec<Request>,
}

impl MountRequests {
    /// Takes them out of what `request` asks for with caches, and checks them.
    pub fn take(request: &mut BuildRequest) -> Result<Self> {
        Ok(Self {
            saves: taken(&mut request.cache_exports, Direction::Save)?,
            restores: taken(&mut request.cache_imports, Direction::Restore)?,
        })
    }

    /// What steps restore from.
    pub fn sources(&self, parts: &Arc<EngineParts>, clients: &CacheClients) -> CacheMounts {
        let source = |request: &Request| {
            let (parts, clients) = (parts.clone(), clients.clone());
            let place = Opener { parts, clients, request: request.clone() };
            MountSource::new(request.clone(), Box::new(place))
        };
        CacheMounts::new(self.restores.iter().map(source).collect())
    }
}

fn taken(caches: &mut Vec<CacheRequest>, direction: Direction) -> Result<Vec<Request>> {
    let (ours, others) = std::mem::take(caches)
        .into_iter()
        .partition(|c: &CacheRequest| c.kind.starts_with(REQUEST));
    *caches = others;
    let of = |cache: &CacheRequest| {
        Request::of(cache.kind.trim_start_matches(REQUEST), &cache.attrs, direction)
    };
    ours.iter().map(of).collect()
}

/// Opens a place with the credentials of the build's clients.
struct Opener {
    parts: Arc<EngineParts>,
    clients: CacheClients,
    request: Request,
}

impl OpenPlace for Opener {
    fn open(&self) -> BoxFuture<'_, Result<Arc<dyn Place>>> {
        let backends = &self.parts.cache_backends;
        backends.mounts(&self.request, &self.clients, Direction::Restore).boxed()
    }
}

/// Saves the cache mounts that the build used, to each place under a vertex of its own; gives what
/// the client is answered. Nothing that fails here fails the build, which is done.
pub(crate) async fn save_all(scope: &BuildScope, requests: &[Request]) -> Response {
    let each = requests.iter().enumerate().map(|(index, request)| async move {
        let digest = vertex_digest(scope.session.as_str(), "cache-mounts", index);
        let name = format!("saving cache mounts to {}", request.shown());
        let reporter = scope.journal.reporter(digest, name);
        reporter.started();
        let limit = request.limits.timeout;
        let saved = tokio::time::timeout(limit, save_to(scope, request, &reporter)).await;
        let saved = saved.unwrap_or_else(|_| {
            let late = format!("it took more than {} s", limit.as_secs());
            Err(Fault::new(Code::DeadlineExceeded, late).hint("give it more time with timeout=10m"))
        });
        let written = saved.unwrap_or_else(|fault| {
            warn(&reporter, "cache mounts", &fault);
            None
        });
        reporter.completed(None);
        let json = written.and_then(|descriptor| serde_json::to_string(&descriptor).ok());
        json.map(|json| (format!("{RESPONSE}{index}"), json))
    });
    futures::future::join_all(each).await.into_iter().flatten().collect()
}

async fn save_to(
    scope: &BuildScope,
    request: &Request,
    reporter: &Reporter,
) -> Result<Option<Descriptor>> {
    let used: Vec<UsedMount> = scope.data.cache_mounts.used();
    let used: Vec<_> = used.iter().filter(|u| request.limits.has(&u.name.id)).collect();
    if used.is_empty() {
        reporter.status("no step used such a cache mount", 0, 0, true);
        return Ok(None);
    }
    let clients = caches::clients(scope);
    let place = scope.parts.cache_backends.mounts(request, &clients, Direction::Save).await?;
    let (mut archive, mut unchanged) = base(&place, request).await?;
    let mut any = false;
    for mount in used {
        match save_one(scope, request, &mut archive, mount, reporter).await {
            Ok(Some(outcome)) => {
                any = true;
                unchanged &= matches!(outcome, SaveOutcome::Unchanged(_));
            }
            Ok(None) => {}
            Err(fault) => warn(reporter, &format!("the cache mount {}", mount.name), &fault),
        }
    }
    if any { archive.publish(request.keys.exact(), unchanged).await } else { Ok(None) }
}

/// What is saved under the key, or what another key has, whose blobs are used again; and whether
/// that can be what the key is to have.
async fn base(place: &Arc<dyn Place>, request: &Request) -> Result<(Archive, bool)> {
    match Archive::open(place, request.keys.exact()).await {
        Ok(Some(archive)) => return Ok((archive, true)),
        Ok(None) => {}
        // What is damaged is replaced; what is not ours is not.
        Err(fault) if fault.code() == Code::DataLoss || fault.is_not_found() => {
            tracing::info!(error = %fault, "failed to read saved cache mounts, saving all of them");
            return Ok((Archive::empty(place), false));
        }
        Err(fault) => return Err(fault),
    }
    match Archive::newest(place, &request.base).await {
        Ok(Some(archive)) => Ok((archive, false)),
        Ok(None) => Ok((Archive::empty(place), false)),
        Err(fault) => {
            tracing::debug!(error = %fault, "failed to look for other cache mounts");
            Ok((Archive::empty(place), false))
        }
    }
}

async fn save_one(
    scope: &BuildScope,
    request: &Request,
    archive: &mut Archive,
    mount: &UsedMount,
    reporter: &Reporter,
) -> Result<Option<SaveOutcome>> {
    let status = format!("saving {}", mount.name);
    reporter.status(&status, 0, 0, false);
    let saved = async {
        let dir = mount.dir(&scope.parts.services.refs);
        let dir = tokio::time::timeout(LOCK_WAIT, dir).await.unwrap_or_else(|_| {
            Err(Fault::unavailable(format!("it is in use for {} s", LOCK_WAIT.as_secs()))
                .hint("another build has it with sharing=locked"))
        });
        let Some(dir) = dir? else { return Ok(None) };
        let (path, limits) = (dir.path(), &request.limits);
        save(archive, &mount.name.full, path, dir, limits).await.map(Some)
    };
    let saved = saved.await.context(|| "save it");
    let bytes = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
    let total =
        saved.as_ref().ok().and_then(Option::as_ref).map_or(0, |s| bytes(s.saved().written));
    reporter.status(&status, total, total, true);
    if let Ok(Some(outcome)) = &saved {
        let Saved { beyond, left_out, .. } = *outcome.saved();
        for (count, why) in [
            (beyond, format!("max-size={} leaves no room for", request.limits.max_size)),
            (left_out, "not saved because they are no files, or changed:".to_owned()),
        ] {
            if count > 0 {
                let text = format!("{}: {why} {count} files", mount.name);
                reporter.status(text, bytes(count), bytes(count), true);
            }
        }
    }
    saved
}

fn warn(reporter: &Reporter, what: &str, fault: &Fault) {
    tracing::info!(error = %fault, what, "failed to save");
    reporter.warn_of(format!("{what} not saved: {fault}"), fault);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_for_cache_mounts_are_no_caches() {
        let cache = |kind: &str, attrs: &[(&str, &str)]| CacheRequest {
            kind: kind.into(),
            attrs: attrs.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect(),
        };
        let registry = cache("registry", &[("ref", "r.example/c")]);
        let mut request = BuildRequest {
            cache_exports: vec![
                registry.clone(),
                cache("shipway.cache-mounts.registry", &[("ref", "r.example/m"), ("key", "k")]),
            ],
            cache_imports: vec![cache("shipway.cache-mounts.local", &[("src", "d")])],
            ..BuildRequest::default()
        };
        let taken = MountRequests::take(&mut request).unwrap();
        assert_eq!(request.cache_exports, [registry]);
        assert!(request.cache_imports.is_empty());
        assert_eq!(taken.saves[0].keys.exact(), "cache-mounts-k");
        assert_eq!(taken.restores[0].kind, "local");
        request.cache_exports = vec![cache("shipway.cache-mounts.gha", &[])];
        let said = MountRequests::take(&mut request).unwrap_err().to_string();
        assert!(said.contains("cache mounts in a \"gha\""), "{said}");
    }
}
