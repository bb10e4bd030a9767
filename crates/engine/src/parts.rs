//! What an engine is made of.

use crate::{failures::FailureLimits, image_frontends::ImageFrontends};
use shipway_attest::Builder;
use shipway_buildcache::CacheIndex;
use shipway_exporters::Exporters;
use shipway_frontend::{Frontends, NamedContexts, Worker};
use shipway_gateway::Builds;
use shipway_history::History;
use shipway_oci::Platform;
use shipway_ops::{LlbOp, NetworkGrants, Services};
use shipway_remotecache::Backends;
use shipway_session::SessionHub;
use shipway_solver::Solver;
use shipway_telemetry::Traces;
use std::{sync::Arc, time::Duration};

/// What an engine is made of.
pub struct EngineParts {
    /// What operations work with.
    pub services: Arc<Services>,
    /// The scheduler.
    pub solver: Solver<LlbOp>,
    /// Attached clients.
    pub sessions: SessionHub,
    /// The solver's store.
    pub caches: CacheIndex,
    /// How long the import of a cache may take; the build goes on without one that takes longer.
    pub import_deadline: Duration,
    /// The kinds of places that caches are kept in.
    pub cache_backends: Backends,
    /// Exporters.
    pub exporters: Exporters,
    /// Builds driven by clients.
    pub builds: Builds,
    /// Finished builds.
    pub history: Arc<History>,
    /// The traces of running builds, where builds are to have them.
    pub traces: Option<Arc<Traces>>,
    /// Platforms that steps can run for, native first; at least one.
    pub platforms: Vec<Platform>,
    /// Entitlements that builds may be granted.
    pub entitlements: Vec<String>,
    /// Networks that steps may ask for by name, and those of them that every build may use.
    pub networks: NetworkGrants,
    /// What provenance says of this daemon.
    pub builder: Builder,
    /// The frontends that are part of the daemon.
    pub frontends: Frontends,
    /// How builds' named contexts are read.
    pub contexts: Arc<dyn NamedContexts>,
    /// Whether steps of all builds see the network through a proxy only.
    pub proxied: bool,
    /// Which frontends out of images may run.
    pub image_frontends: ImageFrontends,
    /// Which failed steps are kept.
    pub failures: FailureLimits,
    /// What frontends know of the worker besides its platforms.
    pub worker: Worker,
}

impl EngineParts {
    /// The platform of builds that name none.
    pub(crate) fn native(&self) -> &Platform {
        &self.platforms[0]
    }
}
