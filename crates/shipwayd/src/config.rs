//! The daemon's configuration: one TOML file with buildkitd's keys (rows `toml.*`), strict where
//! buildkitd is not: an unknown key is an error that names the nearest known one.

mod oci;
mod units;

use serde::Deserialize;
use shipway_fault::{Fault, Result, closest};
use std::{collections::BTreeMap, path::Path};

pub use oci::OciWorker;
pub use units::{DiskSpace, KeepStorage, MaxAge, Span, duration};

/// The whole file.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Deprecated spelling of `log.level = "debug"`.
    pub debug: bool,
    /// Deprecated spelling of `log.level = "trace"`.
    pub trace: bool,
    /// State directory.
    pub root: Option<String>,
    /// Entitlements that builds may ask for.
    #[serde(rename = "insecure-entitlements")]
    pub insecure_entitlements: Option<Vec<String>>,
    /// Whether steps of all builds reach the network through a recording proxy only.
    #[serde(rename = "proxyNetwork")]
    pub proxy_network: bool,
    /// Directory of the JSON files that provenance has about this daemon.
    #[serde(rename = "provenanceEnvDir")]
    pub provenance_env_dir: Option<String>,
    /// Logging.
    pub log: Log,
    /// Sockets.
    pub grpc: Grpc,
    /// Who may call, and what each may do.
    pub auth: Option<shipway_identity::AuthConfig>,
    /// Traces.
    pub otel: Otel,
    /// Devices of the host in steps.
    pub cdi: Cdi,
    /// Workers; `oci` is one that containerd stands in for.
    pub worker: Workers,
    /// Registries by host.
    pub registry: BTreeMap<String, shipway_registry::HostConfig>,
    /// Networks that images, downloads and repositories are not fetched from: `10.0.0.0/8`, or one
    /// address.
    #[serde(rename = "deniedNetworks")]
    pub denied_networks: Option<shipway_http::DeniedNetworks>,
    /// Name resolution in steps.
    pub dns: Option<Dns>,
    /// Networks that steps can ask for by name.
    pub networks: BTreeMap<String, NamedNetwork>,
    /// Certificates that steps trust.
    pub ca: Ca,
    /// What steps on the proxy network may reach.
    pub egress: Egress,
    /// How long finished builds are remembered.
    pub history: Option<History>,
    /// Frontends.
    pub frontend: Frontends,
    /// Images that are used before they are fetched.
    pub lazy: Lazy,
    /// Limits.
    pub system: System,
    /// Settings of the gha cache. Those that there are, for signatures, are refused.
    pub cache: Option<toml::Table>,
}

/// Images that are used before they are fetched.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Lazy {
    /// When the blobs of layers that a remote snapshotter serves are fetched for an image in the
    /// store: `now`, `async` or `on-push`.
    pub blobs: Option<String>,
    /// Control socket of shipway-snapshotter.
    #[serde(rename = "snapshotterControl")]
    pub snapshotter_control: Option<String>,
}

/// Logging.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Log {
    /// `text` or `json`.
    pub format: Option<String>,
    /// `error`, `warn`, `info`, `debug` or `trace`.
    pub level: Option<String>,
}

/// Sockets.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Grpc {
    /// Addresses to listen on.
    pub address: Vec<String>,
    /// Where metrics, health and running builds are shown.
    #[serde(rename = "debugAddress")]
    pub debug_address: Option<String>,
    /// Owner of unix sockets.
    pub uid: Option<u32>,
    /// Group of unix sockets; buildkitd takes only a number.
    pub gid: Option<Group>,
    /// Windows only; the log says so.
    #[serde(rename = "securityDescriptor")]
    pub security_descriptor: Option<String>,
    /// TLS of tcp sockets.
    pub tls: Tls,
}

/// TLS files.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[allow(missing_docs)]
pub struct Tls {
    pub cert: Option<String>,
    pub key: Option<String>,
    pub ca: Option<String>,
}

/// Traces.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Otel {
    /// Address of the collector that spans are sent to, unless the environment names one.
    pub endpoint: Option<String>,
    /// How it is spoken to: `grpc` or `http/protobuf`.
    pub protocol: Option<String>,
    /// Whether the spans of a build are kept with its record.
    pub history: Option<bool>,
    /// Where the daemon takes spans of steps.
    #[serde(rename = "socketPath")]
    pub socket_path: Option<String>,
}

/// Devices of the host in steps (row `toml.cdi`).
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Cdi {
    /// Whether steps get none.
    pub disabled: Option<bool>,
    /// Where they are described, instead of the usual places.
    #[serde(rename = "specDirs")]
    pub spec_dirs: Vec<String>,
    /// Names and kinds of those that every build may use.
    #[serde(rename = "autoAllowed")]
    pub auto_allowed: Vec<String>,
}

/// Workers.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Workers {
    /// Ours.
    pub containerd: Worker,
    /// BuildKit's own worker: its settings count where containerd stands in for it.
    pub oci: OciWorker,
}

/// The containerd worker.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[allow(missing_docs)]
pub struct Worker {
    pub enabled: Option<bool>,
    pub address: Option<String>,
    pub namespace: Option<String>,
    pub snapshotter: Option<String>,
    pub labels: BTreeMap<String, String>,
    pub platforms: Vec<String>,
    pub runtime: Runtime,
    pub rootless: bool,
    #[serde(rename = "apparmor-profile")]
    pub apparmor_profile: Option<String>,
    pub selinux: bool,
    #[serde(rename = "max-parallelism")]
    pub max_parallelism: usize,
    #[serde(rename = "defaultCgroupParent")]
    pub default_cgroup_parent: Option<String>,
    #[serde(rename = "networkMode")]
    pub network_mode: Option<String>,
    #[serde(rename = "cniConfigPath")]
    pub cni_config_path: Option<String>,
    #[serde(rename = "cniBinaryPath")]
    pub cni_binary_path: Option<String>,
    #[serde(rename = "cniPoolSize")]
    pub cni_pool_size: usize,
    #[serde(rename = "bridgeName")]
    pub bridge_name: Option<String>,
    #[serde(rename = "bridgeSubnet")]
    pub bridge_subnet: Option<String>,
    #[serde(rename = "preferLocalImages")]
    pub prefer_local_images: Option<String>,
    #[serde(rename = "replaceManagedImages")]
    pub replace_managed_images: Vec<String>,
    #[serde(rename = "publishNamespaces")]
    pub publish_namespaces: Vec<String>,
    pub gc: Option<bool>,
    pub gckeepstorage: Option<DiskSpace>,
    #[serde(rename = "reservedSpace")]
    pub reserved_space: Option<DiskSpace>,
    #[serde(rename = "maxUsedSpace")]
    pub max_used_space: Option<DiskSpace>,
    #[serde(rename = "minFreeSpace")]
    pub min_free_space: Option<DiskSpace>,
    pub gcpolicy: Vec<GcPolicy>,
}

/// The runtime of steps.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[allow(missing_docs)]
pub struct Runtime {
    pub name: Option<String>,
    pub path: Option<String>,
    pub options: toml::Table,
}

/// One rule of garbage collection.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[allow(missing_docs)]
pub struct GcPolicy {
    pub all: bool,
    pub filters: Vec<String>,
    #[serde(rename = "keepDuration")]
    pub keep_duration: Option<Span>,
    #[serde(rename = "keepBytes")]
    pub keep_bytes: Option<DiskSpace>,
    #[serde(rename = "reservedSpace")]
    pub reserved_space: Option<DiskSpace>,
    #[serde(rename = "maxUsedSpace")]
    pub max_used_space: Option<DiskSpace>,
    #[serde(rename = "minFreeSpace")]
    pub min_free_space: Option<DiskSpace>,
}

/// Name resolution.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[allow(missing_docs)]
pub struct Dns {
    pub nameservers: Vec<String>,
    pub options: Vec<String>,
    #[serde(rename = "searchDomains")]
    pub search_domains: Vec<String>,
    #[serde(rename = "resolvConf")]
    pub resolv_conf: Option<String>,
}

/// A network that steps can ask for by its name (row `exec.net.named`).
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct NamedNetwork {
    /// Its CNI configuration, a `.conflist` or `.conf`.
    #[serde(rename = "cniConfigPath")]
    pub cni_config_path: String,
    /// Where its plug-ins are; the worker's directory if empty.
    #[serde(rename = "cniBinaryPath")]
    pub cni_binary_path: Option<String>,
    /// Whether builds may use it without asking for its entitlement.
    #[serde(rename = "autoAllowed")]
    pub auto_allowed: bool,
}

/// What steps on the proxy network may reach, whatever their builds allow (row `toml.egress`).
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Egress {
    /// Hosts and networks; all if there are none.
    pub allow: Vec<String>,
    /// Those that are not, even if they are among the others.
    pub deny: Vec<String>,
}

/// Certificates that steps trust beside their image's (row `exec.ca`).
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Ca {
    /// A file of them in PEM.
    pub bundle: Option<String>,
}

/// History limits.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[allow(missing_docs)]
pub struct History {
    #[serde(rename = "maxAge")]
    pub max_age: Option<Span>,
    #[serde(rename = "maxEntries")]
    pub max_entries: Option<i64>,
    /// Bytes that the files of all records may have; no share of the disk.
    #[serde(rename = "maxUsedSpace")]
    pub max_used_space: Option<DiskSpace>,
}

/// Frontends.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Frontends {
    /// The in-house Dockerfile frontend.
    #[serde(rename = "dockerfile.v0")]
    pub dockerfile: DockerfileFrontend,
    /// Frontends in containers.
    #[serde(rename = "gateway.v0")]
    pub gateway: GatewayFrontend,
}

/// The in-house Dockerfile frontend.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[allow(missing_docs)]
pub struct DockerfileFrontend {
    pub enabled: Option<bool>,
}

/// Frontends in containers.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[allow(missing_docs)]
pub struct GatewayFrontend {
    pub enabled: Option<bool>,
    #[serde(rename = "allowedRepositories")]
    pub allowed_repositories: Vec<String>,
}

/// Limits of the system.
/// A group by its number or its name.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(untagged)]
#[allow(missing_docs)]
pub enum Group {
    Id(u32),
    Name(String),
}

impl std::fmt::Display for Group {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Id(id) => id.fmt(f),
            Self::Name(name) => name.fmt(f),
        }
    }
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[allow(missing_docs)]
pub struct System {
    #[serde(rename = "platformsCacheMaxAge")]
    pub platforms_cache_max_age: Option<MaxAge>,
    #[serde(rename = "maxRegistryConcurrency")]
    pub max_registry_concurrency: Option<usize>,
    /// How long running builds may take when the daemon is to end.
    #[serde(rename = "drainTimeout")]
    pub drain_timeout: Option<Span>,
    /// How long running steps of an earlier run wait for their builds after a start.
    #[serde(rename = "adoptTimeout")]
    pub adopt_timeout: Option<Span>,
    /// How long the import of a cache may take.
    #[serde(rename = "cacheImportTimeout")]
    pub cache_import_timeout: Option<Span>,
    /// How many steps are kept that failed.
    #[serde(rename = "keepFailedSteps")]
    pub keep_failed_steps: Option<usize>,
    /// How long each of them.
    #[serde(rename = "keepFailedStepsFor")]
    pub keep_failed_steps_for: Option<Span>,
}

impl Config {
    /// Parses the text of a file called `name`.
    pub fn parse(text: &str, name: &str) -> Result<Self> {
        toml::from_str(text).map_err(|e| {
            let fault = Fault::invalid(format!("{e}").trim_end().to_owned())
                .context(format!("parse the configuration file {name}"));
            match suggestion(e.message()) {
                Some(known) => fault.hint(format!("did you mean `{known}`?")),
                None => fault,
            }
        })
    }

    /// Reads `path`; a file that is not there is an empty one unless it was asked for by name.
    pub fn load(path: &Path, required: bool) -> Result<Self> {
        match std::fs::read_to_string(path) {
            Ok(text) => Self::parse(&text, &path.display().to_string()),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound && !required => Ok(Self::default()),
            Err(e) => Err(Fault::io(format!("read the configuration file {}", path.display()), e)),
        }
    }
}

/// The known key nearest to the unknown one that serde's message names.
fn suggestion(message: &str) -> Option<String> {
    let rest = message.strip_prefix("unknown field `")?;
    let (unknown, rest) = rest.split_once('`')?;
    let known: Vec<&str> = rest.split('`').skip(1).step_by(2).collect();
    closest(unknown, known).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buildkitd_files_are_read() {
        let c = Config::parse(
            r#"
            debug = true
            insecure-entitlements = ["network.host"]
            [worker.containerd]
              namespace = "default"
              networkMode = "host"
              gc = false
              reservedSpace = "10GB"
              [[worker.containerd.gcpolicy]]
                keepDuration = "48h"
                maxUsedSpace = "20%"
            [registry."docker.io"]
              mirrors = ["127.0.0.1:5000"]
            [worker.oci]
              max-parallelism = 1
            [history]
              maxAge = 172800
            "#,
            "x.toml",
        )
        .unwrap();
        assert_eq!(c.worker.containerd.namespace.as_deref(), Some("default"));
        assert_eq!(c.registry["docker.io"].mirrors, ["127.0.0.1:5000"]);
        assert_eq!(
            c.worker.containerd.gcpolicy[0].keep_duration.map(|d| d.0.as_secs()),
            Some(48 * 3600)
        );
    }

    #[test]
    fn a_group_is_a_number_as_in_buildkitd_or_a_name() {
        let group = |value: &str| {
            let parsed = Config::parse(&format!("[grpc]\ngid = {value}\n"), "x.toml");
            parsed.map(|c| c.grpc.gid.map(|g| g.to_string()).unwrap_or_default())
        };
        assert_eq!(group("7").unwrap(), "7");
        assert_eq!(group("'docker'").unwrap(), "docker");
        assert!(group("-1").is_err() && group("[7]").is_err());
    }

    #[test]
    fn an_unknown_key_names_the_nearest() {
        let e = Config::parse("[worker.containerd]\nnamespaces = 'x'\n", "x.toml").unwrap_err();
        assert!(e.to_string().contains("unknown field `namespaces`"), "{e}");
        assert_eq!(e.hints().collect::<Vec<_>>(), ["did you mean `namespace`?"]);
        let e = Config::parse("debgu = true", "x.toml").unwrap_err();
        assert_eq!(e.hints().collect::<Vec<_>>(), ["did you mean `debug`?"]);
    }
}
