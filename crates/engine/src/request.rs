//! What is asked of the engine, and what it answers.

use shipway_fault::{Fault, Result};
use shipway_frontend::FrontendOptions;
use shipway_history::FinishedBuild;
use shipway_identity::{Action, Caller};
use shipway_llb::{Definition, SourcePolicy};
use shipway_oci::NetworkName;
use shipway_ops::{Entitlements, NetworkGrants};
use shipway_remotecache::CacheRequest;
use shipway_session::SessionId;
use std::collections::BTreeMap;

/// An exporter by type and attributes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExporterRequest {
    /// Type, such as `image`.
    pub kind: String,
    /// Attributes.
    pub attrs: BTreeMap<String, String>,
}

/// The policy of one build.
#[derive(Clone, Debug, Default)]
pub struct BuildPolicy {
    /// Rules of the request.
    pub rules: SourcePolicy,
    /// Session of the client that decides.
    pub session: Option<SessionId>,
}

impl BuildPolicy {
    /// Whether everything is allowed as it is.
    pub(crate) fn is_empty(&self) -> bool {
        self.rules.is_empty() && self.session.is_none()
    }
}

/// A build (row `ctl.solve.req`).
#[derive(Clone, Debug, Default)]
pub struct BuildRequest {
    /// Identity, chosen by the client.
    pub id: String,
    /// What to solve, unless a frontend or the client decides.
    pub definition: Option<Definition>,
    /// Frontend to run; empty for none.
    pub frontend: String,
    /// Its options.
    pub options: FrontendOptions,
    /// Its inputs.
    pub inputs: BTreeMap<String, Definition>,
    /// Session of the client.
    pub session: SessionId,
    /// What becomes of the result.
    pub exporters: Vec<ExporterRequest>,
    /// Whether the client is asked for more exporters once the result is there (row `cb.exporter`).
    pub session_exporters: bool,
    /// What the build asks to be allowed.
    pub entitlements: Vec<String>,
    /// Whether it is left out of the history (row `ctl.solve.internal`).
    pub internal: bool,
    /// What it may use.
    pub policy: BuildPolicy,
    /// Whether its steps see the network through a proxy only; the daemon may want that of all
    /// builds.
    pub proxied: bool,
    /// Which version of the exporters' defaults it wants, as the client numbers them.
    pub compatibility: i64,
    /// Caches to export.
    pub cache_exports: Vec<CacheRequest>,
    /// Caches to import.
    pub cache_imports: Vec<CacheRequest>,
    /// Who asks for it.
    pub caller: Caller,
}

/// How a build ended well.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BuildResponse {
    /// Keys and values of all exporters and of the frontend (rows `ex.resp.*`).
    pub exporter_response: BTreeMap<String, String>,
    /// What the history keeps.
    pub finished: FinishedBuild,
}

impl BuildRequest {
    /// The built-in frontend by its other name becomes the built-in frontend, unless the
    /// Dockerfile's own context is given by name.
    pub(crate) fn simplify(&mut self) {
        let named = self
            .options
            .keys()
            .any(|k| k == "context:dockerfile.v0" || k.starts_with("context:dockerfile.v0::"));
        if self.frontend == "gateway.v0"
            && self.options.get("source").is_some_and(|s| s == "dockerfile.v0")
            && !named
        {
            self.frontend = "dockerfile.v0".into();
            self.options.remove("source");
        }
    }

    /// The entitlements asked for, if the daemon allows them (rows `so.ent`, `so.ent.err`).
    pub(crate) fn entitlements(
        &self,
        allowed: &[String],
        networks: &NetworkGrants,
    ) -> Result<Entitlements> {
        let mut granted = Entitlements { networks: networks.clone(), ..Entitlements::default() };
        for asked in &self.entitlements {
            self.caller.check(Action::Entitlement(asked))?;
            if let Some(network) = NetworkName::of_entitlement(asked) {
                networks.find(&network)?;
                granted.networks.allowed.insert(network);
                continue;
            }
            let (name, which) = asked
                .split_once('=')
                .map_or((asked.as_str(), None), |(name, which)| (name, Some(which)));
            match (name, which) {
                ("network.host", None) => granted.network_host = true,
                ("security.insecure", None) => granted.security_insecure = true,
                ("device", which) => granted.devices.add(which)?,
                _ => return Err(Fault::invalid(format!("unknown entitlement {asked}"))),
            }
            if !allowed.iter().any(|a| a == name) {
                let message = format!(
                    "granting entitlement {name} is not allowed by build daemon configuration"
                );
                let advice = match name {
                    "device" => {
                        "the daemon is configured not to give devices to steps: `disabled` of [cdi] in its configuration, or --cdi-disabled"
                            .into()
                    }
                    _ => format!(
                        "allow it with `insecure-entitlements = [\"{name}\"]` in the daemon's configuration or --allow-insecure-entitlement"
                    ),
                };
                return Err(Fault::new(shipway_fault::Code::PermissionDenied, message).hint(advice));
            }
        }
        Ok(granted)
    }
}
