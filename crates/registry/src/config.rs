//! Configuration of registries: mirrors, plain HTTP, certificates, limits.

use serde::Deserialize;
use shipway_http::{DeniedNetworks, KeyPair, Timeouts};
use std::{collections::BTreeMap, path::PathBuf, time::Duration};

/// Settings of the distribution client. `Default` is right for a machine without special
/// registries.
#[derive(Clone, Debug)]
pub struct RegistryConfig {
    /// Per registry name (such as `docker.io` or `localhost:5000`), as in `[registry."host"]` (row
    /// `toml.reg`).
    pub hosts: BTreeMap<String, HostConfig>,
    /// Directory laid out like containerd's `certs.d`: `<host>/hosts.toml`. Read again for every
    /// image, so that edits count at once. A registry named in `hosts` does not look here.
    pub config_path: Option<PathBuf>,
    /// How many blobs travel to or from one host at once (row `toml.sys`,
    /// `maxRegistryConcurrency`); manifests have one more.
    pub max_concurrency: usize,
    /// How long to wait for what.
    pub timing: Timing,
    /// Networks that are not connected to, whatever names an address in them: images, downloads,
    /// token servers.
    pub denied: DeniedNetworks,
    /// Product name in `User-Agent`.
    pub user_agent: String,
}

impl Default for RegistryConfig {
    fn default() -> Self {
        Self {
            hosts: BTreeMap::new(),
            config_path: None,
            max_concurrency: 4,
            timing: Timing::default(),
            denied: DeniedNetworks::default(),
            user_agent: concat!("shipway/", env!("CARGO_PKG_VERSION")).into(),
        }
    }
}

/// One registry's settings, in the words of the daemon's TOML (rows `toml.reg`, `toml.reg.tls`).
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HostConfig {
    /// Hosts, or `host/path`, asked before the registry itself.
    pub mirrors: Vec<String>,
    /// Speak plain HTTP. Unset, loopback hosts may fall back to it and others never do.
    pub http: Option<bool>,
    /// Do not verify the server's certificate.
    pub insecure: Option<bool>,
    /// Files with further root certificates.
    pub ca: Vec<PathBuf>,
    /// Client certificates.
    pub keypair: Vec<KeyPair>,
    /// Directories whose `*.crt` are root certificates and whose `*.cert`/`*.key` are client
    /// certificates.
    pub tlsconfigdir: Vec<PathBuf>,
}

/// How long to wait for what. Whatever a registry does, a request that makes no progress ends
/// within about a minute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timing {
    /// For connections and for transfers.
    pub http: Timeouts,
    /// First pause before trying again; doubles each time (row `so.retry`: 1 to 8 s).
    pub backoff: Duration,
    /// Longest pause, unless `Retry-After` asks for a longer one that the budget allows.
    pub max_backoff: Duration,
    /// No new try starts after this long.
    pub budget: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            http: Timeouts::default(),
            backoff: Duration::from_secs(1),
            max_backoff: Duration::from_secs(8),
            budget: Duration::from_secs(35),
        }
    }
}
