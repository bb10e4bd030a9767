//! The command line: buildkitd's flags (rows `fl.*`) for what exists, with the defaults of the name
//! we were called by.

mod absent;
mod oci;

use crate::config::KeepStorage;
use clap::Parser;
use std::path::{Path, PathBuf};

pub use absent::AbsentFlags;
pub use oci::{OciFlags, stand_in};

/// Builds container images on the containerd you already run.
#[derive(Parser, Debug, Default)]
#[command(name = "shipwayd", disable_version_flag = true)]
pub struct Flags {
    /// Path of the configuration file
    #[arg(long)]
    pub config: Option<PathBuf>,
    /// Path of the state directory
    #[arg(long)]
    pub root: Option<PathBuf>,
    /// Listening address (unix://, tcp://, fd://); may be repeated
    #[arg(long)]
    pub addr: Vec<String>,
    /// Group (name or gid) that owns the unix socket
    #[arg(long)]
    pub group: Option<String>,
    /// Debug output in logs
    #[arg(long)]
    pub debug: bool,
    /// Deprecated: use --log-level=trace
    #[arg(long, hide = true)]
    pub trace: bool,
    /// Log level (error, warn, info, debug, trace)
    #[arg(long = "log-level", env = "BUILDKITD_LOG_LEVEL")]
    pub log_level: Option<String>,
    /// Log format (text, json)
    #[arg(long = "log-format")]
    pub log_format: Option<String>,
    /// Address for metrics, health and running builds, such as 127.0.0.1:6060; none by default
    #[arg(long, env = "BUILDKITD_DEBUGADDR")]
    pub debugaddr: Option<String>,
    /// Socket at which the daemon takes spans of steps, where it has a collector of traces
    #[arg(long = "otel-socket-path")]
    pub otel_socket_path: Option<String>,
    /// Certificate file to use on tcp addresses
    #[arg(long)]
    pub tlscert: Option<String>,
    /// Key file to use on tcp addresses
    #[arg(long)]
    pub tlskey: Option<String>,
    /// CA file to verify clients
    #[arg(long)]
    pub tlscacert: Option<String>,
    /// Allows an entitlement: network.host, security.insecure; may be repeated
    #[arg(long = "allow-insecure-entitlement")]
    pub allow_insecure_entitlement: Vec<String>,
    /// How long running builds may take after SIGTERM, such as 10m; a second signal ends them
    #[arg(long = "drain-timeout", value_name = "DURATION")]
    pub drain_timeout: Option<String>,
    /// How long running steps wait for their builds after a restart, such as 5m; 0s for not at all
    #[arg(long = "adopt-timeout", value_name = "DURATION")]
    pub adopt_timeout: Option<String>,
    /// Gives no devices of the host (CDI) to steps
    #[arg(long = "cdi-disabled", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub cdi_disabled: Option<bool>,
    /// Directory with descriptions of devices (CDI) instead of the usual ones; may be repeated
    #[arg(long = "cdi-spec-dir")]
    pub cdi_spec_dir: Vec<String>,
    /// Lets steps of all builds reach the network through a recording proxy only
    #[arg(long = "proxy-network", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub proxy_network: Option<bool>,
    /// Flags of BuildKit's other worker
    #[command(flatten)]
    pub oci: OciFlags,
    /// buildkitd's flags for what is not here
    #[command(flatten)]
    pub absent: AbsentFlags,
    /// Accepted for buildkitd's sake: the containerd worker is always enabled
    #[arg(long = "containerd-worker", hide = true, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub containerd_worker: Option<String>,
    /// containerd's socket
    #[arg(long = "containerd-worker-addr", env = "CONTAINERD_ADDRESS")]
    pub containerd_addr: Option<String>,
    /// Namespace in containerd for images, snapshots and steps
    #[arg(long = "containerd-worker-namespace")]
    pub namespace: Option<String>,
    /// Snapshotter
    #[arg(long = "containerd-worker-snapshotter")]
    pub snapshotter: Option<String>,
    /// Runtime of steps, such as io.containerd.runc.v2
    #[arg(long = "containerd-worker-runtime")]
    pub runtime: Option<String>,
    /// Labels of the worker (name=value); may be repeated
    #[arg(long = "containerd-worker-labels")]
    pub labels: Vec<String>,
    /// Platforms of the worker; may be repeated
    #[arg(long = "containerd-worker-platform")]
    pub platforms: Vec<String>,
    /// Network of steps: auto, cni, bridge, host, none
    #[arg(long = "containerd-worker-net")]
    pub net: Option<String>,
    /// CNI configuration
    #[arg(long = "containerd-cni-config-path")]
    pub cni_config_path: Option<String>,
    /// Directory of CNI plugins
    #[arg(long = "containerd-cni-binary-dir")]
    pub cni_binary_dir: Option<String>,
    /// Number of network namespaces kept ready
    #[arg(long = "containerd-cni-pool-size")]
    pub cni_pool_size: Option<usize>,
    /// Steps that may run at once; 0 for no limit
    #[arg(long = "containerd-max-parallelism")]
    pub max_parallelism: Option<usize>,
    /// Automatic garbage collection
    #[arg(long = "containerd-worker-gc", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub gc: Option<bool>,
    /// What garbage collection keeps: RESERVED or RESERVED,FREE,MAXIMUM, each in MB or as a
    /// percentage of the disk
    #[arg(long = "containerd-worker-gc-keepstorage")]
    pub gc_keepstorage: Option<KeepStorage>,
    /// Binary of the low-level runtime, which buildkitd has a flag for with its OCI worker only
    #[arg(skip)]
    pub binary: Option<String>,
    /// Images of containerd's store that FROM takes without asking a registry: built (here),
    /// always, never
    #[arg(long = "prefer-local-images")]
    pub prefer_local_images: Option<String>,
    /// When blobs that a remote snapshotter does without are fetched for images in the store: now,
    /// async, on-push
    #[arg(long = "lazy-blobs")]
    pub lazy_blobs: Option<String>,
    /// AppArmor profile of steps
    #[arg(long = "containerd-worker-apparmor-profile")]
    pub apparmor_profile: Option<String>,
    /// Prints the version
    #[arg(long, short = 'v')]
    pub version: bool,
}

impl Flags {
    /// Takes what was said of the OCI worker for what was not said of containerd's.
    pub fn with_those_of_oci(mut self) -> Self {
        let oci = std::mem::take(&mut self.oci);
        self.labels.extend(oci.labels);
        self.platforms.extend(oci.platforms);
        self.snapshotter = self.snapshotter.or(oci.snapshotter.filter(|s| s != "auto"));
        self.net = self.net.or(oci.net);
        self.cni_config_path = self.cni_config_path.or(oci.cni_config_path);
        self.cni_binary_dir = self.cni_binary_dir.or(oci.cni_binary_dir);
        self.cni_pool_size = self.cni_pool_size.or(oci.cni_pool_size);
        self.max_parallelism = self.max_parallelism.or(oci.max_parallelism);
        self.gc = self.gc.or(oci.gc);
        self.gc_keepstorage = self.gc_keepstorage.or(oci.gc_keepstorage);
        self.binary = self.binary.or(oci.binary);
        self.apparmor_profile = self.apparmor_profile.or(oci.apparmor_profile);
        self.absent.selinux = self.absent.selinux.or(oci.selinux);
        self.absent.worker_rootless = self.absent.worker_rootless.or(oci.rootless);
        self
    }
}

/// Which program we are, by `argv[0]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Persona {
    /// `shipwayd`.
    Shipwayd,
    /// `buildkitd`: its defaults for everything.
    Buildkitd,
}

impl Persona {
    /// By the name the program was called.
    pub fn of(argv0: &str) -> Self {
        match Path::new(argv0).file_name().and_then(|n| n.to_str()) {
            Some("buildkitd") => Self::Buildkitd,
            _ => Self::Shipwayd,
        }
    }

    pub fn config(self) -> PathBuf {
        match self {
            Self::Shipwayd => "/etc/shipway/shipwayd.toml",
            Self::Buildkitd => "/etc/buildkit/buildkitd.toml",
        }
        .into()
    }

    pub fn root(self) -> &'static str {
        match self {
            Self::Shipwayd => "/var/lib/shipway",
            Self::Buildkitd => "/var/lib/buildkit",
        }
    }

    pub fn addresses(self) -> Vec<String> {
        match self {
            // The second is where nerdctl looks for a builder of the default namespace.
            Self::Shipwayd => vec![
                "unix:///run/shipway/shipwayd.sock".into(),
                "unix:///run/buildkit-default/buildkitd.sock".into(),
            ],
            Self::Buildkitd => vec!["unix:///run/buildkit/buildkitd.sock".into()],
        }
    }

    pub fn namespace(self) -> &'static str {
        match self {
            Self::Shipwayd => "default",
            Self::Buildkitd => "buildkit",
        }
    }
}
