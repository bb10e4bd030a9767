//! The command line: buildkitd's flags (section 10 of the reference) for what exists, with the defaults of the name we were called by.

mod absent;
mod oci;

use crate::config::{Config, DiskSpace};
use absent::AbsentFlags;
use clap::Parser;
use oci::OciFlags;
use shipway_fault::{Fault, Result};
use std::path::{Path, PathBuf};

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
    /// Accepted for buildkitd's sake; there is no debug listener yet
    #[arg(long, env = "BUILDKITD_DEBUGADDR", hide = true)]
    pub debugaddr: Option<String>,
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
    /// Storage that garbage collection keeps, in MB
    #[arg(long = "containerd-worker-gc-keepstorage", visible_alias = "oci-worker-gc-keepstorage")]
    pub gc_keepstorage: Option<u64>,
    /// Images of containerd's store that FROM takes without asking a registry: built (here), always, never
    #[arg(long = "prefer-local-images")]
    pub prefer_local_images: Option<String>,
    /// AppArmor profile of steps
    #[arg(long = "containerd-worker-apparmor-profile")]
    pub apparmor_profile: Option<String>,
    /// Prints the version
    #[arg(long, short = 'v')]
    pub version: bool,
}

impl Flags {
    /// Takes what was said of the OCI worker for what was not said of containerd's.
    fn with_those_of_oci(mut self) -> Self {
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

    fn config(self) -> PathBuf {
        match self {
            Self::Shipwayd => "/etc/shipway/shipwayd.toml",
            Self::Buildkitd => "/etc/buildkit/buildkitd.toml",
        }
        .into()
    }

    fn root(self) -> &'static str {
        match self {
            Self::Shipwayd => "/var/lib/shipway",
            Self::Buildkitd => "/var/lib/buildkit",
        }
    }

    fn addresses(self) -> Vec<String> {
        match self {
            // The second is where nerdctl looks for a builder of the default namespace.
            Self::Shipwayd => vec!["unix:///run/shipway/shipwayd.sock".into(), "unix:///run/buildkit-default/buildkitd.sock".into()],
            Self::Buildkitd => vec!["unix:///run/buildkit/buildkitd.sock".into()],
        }
    }

    fn namespace(self) -> &'static str {
        match self {
            Self::Shipwayd => "default",
            Self::Buildkitd => "buildkit",
        }
    }
}

/// Where containerd listens unless told otherwise.
const CONTAINERD: &str = "/run/containerd/containerd.sock";

/// Flags, file and defaults brought together.
#[derive(Debug)]
pub struct Settings {
    /// The file, for everything that has no flag; flags are written into it.
    pub config: Config,
    /// State directory.
    pub root: PathBuf,
    /// Addresses to listen on.
    pub addresses: Vec<String>,
    /// Group of unix sockets.
    pub group: Option<String>,
    /// containerd's socket.
    pub containerd: String,
    /// Namespace.
    pub namespace: String,
    /// Snapshotter.
    pub snapshotter: String,
    /// Entitlements that may be granted.
    pub entitlements: Vec<String>,
    /// What the log should say about these settings.
    pub notes: Vec<String>,
}

impl Settings {
    /// Reads the file that the flags name and lays the flags over it.
    pub fn load(flags: Flags, persona: Persona) -> Result<Self> {
        let path = flags.config.clone().unwrap_or_else(|| persona.config());
        let mut config = Config::load(&path, flags.config.is_some() && persona == Persona::Shipwayd)?;
        let root = flags.root.clone().or_else(|| config.root.clone().map(Into::into)).unwrap_or_else(|| persona.root().into());
        let disabled = config.worker.containerd.enabled == Some(false);
        let enabled = flags.containerd_worker.as_deref().or(disabled.then_some("false"));
        let oci_disabled = config.worker.oci.get("enabled").and_then(toml::Value::as_bool) == Some(false);
        let oci_enabled = flags.oci.enabled.as_deref().or(oci_disabled.then_some("false"));
        let stand_in = oci::stand_in(oci_enabled, enabled, &root, persona.root())?;
        let flags = if stand_in.is_some() { flags.with_those_of_oci() } else { flags };
        let w = &mut config.worker.containerd;
        w.network_mode = flags.net.or(w.network_mode.take());
        w.cni_config_path = flags.cni_config_path.or(w.cni_config_path.take());
        w.cni_binary_path = flags.cni_binary_dir.or(w.cni_binary_path.take());
        w.cni_pool_size = flags.cni_pool_size.unwrap_or(w.cni_pool_size);
        w.max_parallelism = flags.max_parallelism.unwrap_or(w.max_parallelism);
        w.runtime.name = flags.runtime.or(w.runtime.name.take());
        w.gc = flags.gc.or(w.gc);
        w.gckeepstorage = flags.gc_keepstorage.map(|mb| DiskSpace::Bytes(mb.saturating_mul(1_000_000))).or(w.gckeepstorage);
        w.prefer_local_images = flags.prefer_local_images.or(w.prefer_local_images.take());
        w.apparmor_profile = flags.apparmor_profile.or(w.apparmor_profile.take());
        flags.absent.check(w.rootless, w.selinux)?;
        if !flags.platforms.is_empty() {
            w.platforms = flags.platforms;
        }
        for label in flags.labels {
            let (k, v) =
                label.split_once('=').ok_or_else(|| Fault::invalid(format!("--containerd-worker-labels {label:?}: want name=value")))?;
            w.labels.insert(k.into(), v.into());
        }
        config.proxy_network = flags.proxy_network.unwrap_or(config.proxy_network);
        let cdi = &mut config.cdi;
        cdi.disabled = flags.cdi_disabled.or(cdi.disabled);
        let dirs = [flags.cdi_spec_dir, std::mem::take(&mut cdi.spec_dirs), shipway_cdi::DEFAULT_DIRS.map(str::to_owned).into()];
        cdi.spec_dirs = dirs.into_iter().find(|d| !d.is_empty()).unwrap_or_default();
        let mut entitlements = if flags.allow_insecure_entitlement.is_empty() {
            config.insecure_entitlements.clone().unwrap_or_default()
        } else {
            flags.allow_insecure_entitlement
        };
        for e in &entitlements {
            if !["network.host", "security.insecure", "device"].contains(&e.as_str()) {
                let fault = Fault::invalid(format!("invalid entitlement : {e}"));
                return Err(fault.hint("want network.host or security.insecure"));
            }
        }
        // Row `d.device`: whether steps get devices is for [cdi] to say.
        entitlements.retain(|e| e != "device");
        if config.cdi.disabled != Some(true) {
            entitlements.push("device".into());
        }
        if flags.debug || config.debug {
            config.log.level.get_or_insert_with(|| "debug".into());
        }
        if flags.trace || config.trace {
            config.log.level = Some("trace".into());
        }
        config.log.level = flags.log_level.or(config.log.level.take());
        config.log.format = flags.log_format.or(config.log.format.take());
        config.grpc.tls.cert = flags.tlscert.or(config.grpc.tls.cert.take());
        config.grpc.tls.key = flags.tlskey.or(config.grpc.tls.key.take());
        config.grpc.tls.ca = flags.tlscacert.or(config.grpc.tls.ca.take());
        let addresses =
            [flags.addr, config.grpc.address.clone(), persona.addresses()].into_iter().find(|a| !a.is_empty()).unwrap_or_default();
        let w = &config.worker.containerd;
        Ok(Self {
            root,
            addresses,
            group: flags.group.or_else(|| config.grpc.gid.map(|g| g.to_string())),
            containerd: flags.containerd_addr.or_else(|| w.address.clone()).unwrap_or_else(|| CONTAINERD.into()),
            namespace: [flags.namespace, w.namespace.clone(), stand_in.as_ref().and_then(|s| s.namespace.clone())]
                .into_iter()
                .flatten()
                .next()
                .unwrap_or_else(|| persona.namespace().into()),
            snapshotter: flags.snapshotter.or_else(|| w.snapshotter.clone()).unwrap_or_else(|| "overlayfs".into()),
            entitlements,
            notes: stand_in.map(|s| s.note).into_iter().collect(),
            config,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn called_as_buildkitd_it_takes_that_programs_defaults() {
        for (argv0, root, namespace) in
            [("/usr/bin/buildkitd", "/var/lib/buildkit", "buildkit"), ("shipwayd", "/var/lib/shipway", "default")]
        {
            let flags = Flags::parse_from(["x"]);
            let s = Settings::load(flags, Persona::of(argv0)).unwrap();
            assert_eq!((s.root.to_str().unwrap(), s.namespace.as_str()), (root, namespace));
        }
    }

    #[test]
    fn flags_for_what_is_absent_are_accepted_or_refused_by_name() {
        let load = |flag: &str| Settings::load(Flags::parse_from(["x", flag]), Persona::Buildkitd);
        for fine in ["--rootless=false", "--otel-socket-path=/x", "--containerd-worker-selinux=false"] {
            assert!(load(fine).is_ok(), "{fine}");
        }
        for (flag, what) in [("--rootless", "rootless"), ("--containerd-worker-selinux", "SELinux")] {
            assert!(load(flag).unwrap_err().to_string().contains(what), "{flag}");
        }
        let kept = load("--oci-worker-gc-keepstorage=5").unwrap().config.worker.containerd.gckeepstorage;
        assert_eq!(kept, Some(DiskSpace::Bytes(5_000_000)));
    }

    #[test]
    fn the_flag_for_the_proxy_network_wins_over_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("c.toml");
        std::fs::write(&file, "proxyNetwork = true\n").unwrap();
        let config = format!("--config={}", file.display());
        let load = |flags: &[&str]| {
            let flags = Flags::parse_from([&["x"], flags].concat());
            Settings::load(flags, Persona::Buildkitd).unwrap().config.proxy_network
        };
        assert!(load(&[&config]) && load(&["--proxy-network"]));
        assert!(!load(&[&config, "--proxy-network=false"]) && !load(&[]));
    }

    #[test]
    fn devices_are_for_steps_unless_they_are_disabled() {
        let check = |flags: &[&str], allowed: bool, dirs: &[&str]| {
            let s = Settings::load(Flags::parse_from([&["x"], flags].concat()), Persona::Buildkitd).unwrap();
            assert_eq!(
                (s.entitlements.contains(&"device".to_owned()), s.config.cdi.spec_dirs),
                (allowed, dirs.iter().map(|d| (*d).into()).collect())
            );
        };
        let usual = shipway_cdi::DEFAULT_DIRS;
        check(&[], true, &usual);
        check(&["--cdi-disabled=false", "--cdi-spec-dir=/a", "--cdi-spec-dir=/b"], true, &["/a", "/b"]);
        check(&["--cdi-disabled", "--allow-insecure-entitlement=device"], false, &usual);
    }

    #[test]
    fn the_suite_of_buildkit_starts_us_with_these_flags() {
        let flags = Flags::parse_from([
            "buildkitd",
            "--oci-worker=false",
            "--containerd-worker-gc=false",
            "--containerd-worker=true",
            "--containerd-worker-addr",
            "/x.sock",
            "--containerd-worker-labels=org.mobyproject.buildkit.worker.sandbox=true",
            "--config=/nonexistent/x.toml",
            "--root",
            "/r",
            "--addr",
            "unix:///y.sock",
            "--debug",
        ]);
        let s = Settings::load(flags, Persona::Buildkitd).unwrap();
        assert_eq!(
            (s.containerd.as_str(), s.addresses[0].as_str(), s.config.worker.containerd.gc),
            ("/x.sock", "unix:///y.sock", Some(false))
        );
        assert_eq!(s.config.log.level.as_deref(), Some("debug"));
    }

    #[test]
    fn told_to_run_an_oci_worker_it_runs_on_containerd() {
        let flags = Flags::parse_from([
            "buildkitd",
            "--oci-worker=true",
            "--containerd-worker=false",
            "--oci-worker-gc=false",
            "--oci-worker-labels=a=b",
            "--root",
            "/r",
        ]);
        let s = Settings::load(flags, Persona::Buildkitd).unwrap();
        assert!(s.namespace.starts_with("buildkit-"), "{}", s.namespace);
        assert_eq!((s.config.worker.containerd.gc, s.config.worker.containerd.labels["a"].as_str(), s.notes.len()), (Some(false), "b", 1));
    }
}
