//! What the caller of a build has to be allowed besides building: where results and caches go to
//! and come from, and which images it is made from. All of it is asked of
//! [`Caller::check`](shipway_identity::Caller::check), before anything is done.

use crate::{parts::EngineParts, request::BuildRequest};
use shipway_cachemounts::{Direction, Request};
use shipway_exporters::{ExportTarget, Exporter};
use shipway_fault::Result;
use shipway_identity::{Action, Caller};
use shipway_llb::SourceOp;
use shipway_remotecache::CacheRequest;
use std::{collections::BTreeMap, sync::Arc};

/// Schemes of sources that come from registries.
const IMAGES: [&str; 2] = ["docker-image://", "docker-image+blob://"];

/// The caches of a request, and the places that contents of cache mounts are saved to and restored
/// from.
pub(crate) fn caches(
    parts: &EngineParts,
    request: &BuildRequest,
    saves: &[Request],
    restores: &[Request],
) -> Result<()> {
    let caller = &request.caller;
    if !caller.is_restricted() {
        return Ok(());
    }
    let backends = &parts.cache_backends;
    for cache in &request.cache_exports {
        for place in backends.places(cache)? {
            caller.check(Action::ExportCache(&place))?;
        }
    }
    for mount in saves {
        for place in backends.mount_places(mount, Direction::Save)? {
            caller.check(Action::ExportCache(&place))?;
        }
    }
    for mount in restores {
        for place in backends.mount_places(mount, Direction::Restore)? {
            caller.check(Action::ImportCache(&place))?;
        }
    }
    imports(parts, caller, &request.cache_imports)
}

/// Caches to import: of the request, or those that a frontend asks for.
pub(crate) fn imports(
    parts: &EngineParts,
    caller: &Caller,
    requests: &[CacheRequest],
) -> Result<()> {
    for cache in requests.iter().filter(|_| caller.is_restricted()) {
        for place in parts.cache_backends.places(cache)? {
            caller.check(Action::ImportCache(&place))?;
        }
    }
    Ok(())
}

/// Where exporters write to. Before the build (`None`) that is what attributes say, and when its
/// result is there, what the frontend says, too.
pub(crate) fn exports(
    caller: &Caller,
    exporters: &[Arc<dyn Exporter>],
    metadata: Option<&BTreeMap<String, Vec<u8>>>,
) -> Result<()> {
    for target in exporters.iter().flat_map(|exporter| exporter.targets(metadata)) {
        let action = match &target {
            ExportTarget::Store(name) => Action::Store(name),
            ExportTarget::Push(name) => Action::Push(name),
            ExportTarget::Namespace(name) => Action::Publish(name),
        };
        // What was said before the build is in the log already.
        match metadata {
            None => caller.check(action)?,
            Some(_) => caller.check_again(action)?,
        }
    }
    Ok(())
}

/// A source, as it will be used.
pub(crate) fn source(caller: &Caller, source: &SourceOp) -> Result<()> {
    match IMAGES.iter().find_map(|scheme| source.identifier.strip_prefix(scheme)) {
        Some(image) => caller.check_again(Action::Pull(image)),
        None => Ok(()),
    }
}
