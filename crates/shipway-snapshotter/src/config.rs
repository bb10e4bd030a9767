//! The configuration: one TOML file, strict, every key of which has a default.
//! `config/shipway-snapshotter.toml` shows them all.

use crate::metrics::Address;
use serde::Deserialize;
use shipway_daemon::{LogFormat, LogLevel};
use shipway_fault::{Fault, Result, closest};
use shipway_layermount::Tier;
use shipway_snapstore::{Sharing, Xino};
use std::path::{Path, PathBuf};

/// The whole file.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Directory of the snapshots. The default is where containerd before 1.7.16 takes the size of
    /// the file system of images from, whatever it is told.
    pub root: PathBuf,
    /// Socket that containerd connects to.
    pub address: PathBuf,
    /// Socket of `status`.
    pub status_address: PathBuf,
    /// Socket by which root's programs give credentials.
    pub control_address: PathBuf,
    /// Whose snapshots a namespace may get when it asks for a chain ID.
    pub sharing: Sharing,
    /// Options of every overlay mount besides those that it needs.
    pub mount_options: Vec<String>,
    /// Numbers of files in overlays of layers that were not unpacked.
    pub xino: Xino,
    /// Whether ids of user namespaces are mapped here.
    pub remap_ids: bool,
    /// Layers that are read while they are fetched.
    pub lazy: Lazy,
    /// Registries.
    pub registry: Registries,
    /// Pulls of Kubernetes.
    pub cri: Cri,
    /// What Prometheus is told.
    pub metrics: Metrics,
    /// Logging.
    pub log: Log,
}

/// Layers that are read while they are fetched. Times are in seconds.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Lazy {
    /// Whether there are any.
    pub enabled: bool,
    /// Directory for what lives until the machine restarts.
    pub run: PathBuf,
    /// Socket of the keeper.
    pub keeper_address: PathBuf,
    /// Whether a keeper is started where none answers.
    pub start_keeper: bool,
    /// How the kernel reads layers: a name of [`Tier`]; the best that works if it is `auto`.
    pub tier: String,
    /// How long a read waits for contents before it fails.
    pub deadline: u64,
    /// How long a pull waits for a table of contents before the layer is unpacked the ordinary way.
    pub resolve_timeout: u64,
    /// Whether layers are fetched whole when nothing else is to do.
    pub background: bool,
    /// How ordinary layers are pulled that were never here.
    pub pull: Pull,
    /// Whether ordinary layers are made lazy for when they are pulled again.
    pub plain: bool,
    /// Whether such a layer is fetched once more if containerd does not have it any more.
    pub plain_from_registry: bool,
    /// Which SOCI indexes of images are used.
    pub soci: Soci,
    /// Bytes of answers in memory at once.
    pub memory: u64,
    /// Connections to each host.
    pub connections: usize,
    /// Percent of the file system that layers may take.
    pub max_percent: u8,
    /// Percent of the file system that stays free.
    pub min_free_percent: u8,
    /// How long from its first read on it is learned what of an image is read in which order; 0 if
    /// nothing is to be learned.
    pub learn: u64,
    /// Whether orders that others learned are looked for in the images' registries.
    pub find_profiles: bool,
    /// Whether what was learned here is put there.
    pub push_profiles: bool,
}

/// How ordinary layers are pulled that were never here.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Pull {
    /// By containerd, which has them unpacked.
    #[default]
    Containerd,
    /// As a whole by the snapshotter, into its own layers.
    Fast,
}

impl std::fmt::Display for Pull {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Containerd => "containerd",
            Self::Fast => "fast",
        })
    }
}

/// Which SOCI indexes of images are used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Soci {
    /// None.
    Off,
    /// Those that the images' own manifests name (version 2), for whose digests their authors
    /// stand.
    #[default]
    Image,
    /// Those, too, that somebody put beside images in their registries (version 1): who may write
    /// there decides what containers see, until a layer is whole.
    Referrers,
}

impl Default for Lazy {
    fn default() -> Self {
        Self {
            enabled: true,
            run: "/run/shipway-snapshotter".into(),
            keeper_address: "/run/shipway-snapshotter/keeper.sock".into(),
            start_keeper: true,
            tier: "auto".into(),
            deadline: 60,
            resolve_timeout: 10,
            background: true,
            pull: Pull::default(),
            plain: true,
            plain_from_registry: false,
            soci: Soci::default(),
            memory: 16 << 20,
            connections: 64,
            max_percent: 20,
            min_free_percent: 5,
            learn: 60,
            find_profiles: true,
            push_profiles: false,
        }
    }
}

impl Lazy {
    /// The way to read layers that is asked for, if it is.
    pub fn tier(&self) -> Result<Option<Tier>> {
        if self.tier == "auto" { Ok(None) } else { self.tier.parse().map(Some) }
    }
}

/// Registries.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Registries {
    /// Directory with containerd's `hosts.toml` files.
    pub config_path: PathBuf,
    /// Docker's configuration file, for credentials.
    pub docker_config: PathBuf,
}

impl Default for Registries {
    fn default() -> Self {
        Self {
            config_path: "/etc/containerd/certs.d".into(),
            docker_config: "/root/.docker/config.json".into(),
        }
    }
}

/// Pulls of Kubernetes.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Cri {
    /// Socket that kubelet may have as the endpoint of its image service.
    pub address: PathBuf,
    /// containerd's socket, to which everything is passed on.
    pub containerd: PathBuf,
}

impl Default for Cri {
    fn default() -> Self {
        Self {
            address: "/run/shipway-snapshotter/cri.sock".into(),
            containerd: "/run/containerd/containerd.sock".into(),
        }
    }
}

/// What Prometheus is told.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Metrics {
    /// Where it may ask; nowhere if it is empty.
    address: String,
}

impl Metrics {
    /// Where Prometheus may ask, if it may.
    pub fn address(&self) -> Result<Option<Address>> {
        let text = &self.address;
        if text.is_empty() { Ok(None) } else { text.parse().map(Some) }
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            root: "/var/lib/containerd/io.containerd.snapshotter.v1.shipway".into(),
            address: "/run/shipway-snapshotter/snapshotter.sock".into(),
            status_address: "/run/shipway-snapshotter/status.sock".into(),
            control_address: "/run/shipway-snapshotter/control.sock".into(),
            sharing: Sharing::default(),
            mount_options: Vec::new(),
            xino: Xino::default(),
            remap_ids: false,
            lazy: Lazy::default(),
            registry: Registries::default(),
            cri: Cri::default(),
            metrics: Metrics::default(),
            log: Log::default(),
        }
    }
}

/// Logging, to the standard error.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Log {
    /// The least important that is logged.
    pub level: LogLevel,
    /// How.
    pub format: LogFormat,
}

impl Config {
    /// Parses the text of a file called `name`.
    pub fn parse(text: &str, name: &str) -> Result<Self> {
        let config: Self = toml::from_str(text).map_err(|e| {
            let fault = Fault::invalid(format!("{e}").trim_end().to_owned())
                .context(format!("parse the configuration file {name}"));
            match suggestion(e.message()) {
                Some(known) => fault.hint(format!("did you mean `{known}`?")),
                None => fault,
            }
        })?;
        for (key, path) in [
            ("root", &config.root),
            ("address", &config.address),
            ("status_address", &config.status_address),
            ("control_address", &config.control_address),
            ("lazy.run", &config.lazy.run),
            ("lazy.keeper_address", &config.lazy.keeper_address),
            ("registry.config_path", &config.registry.config_path),
            ("registry.docker_config", &config.registry.docker_config),
            ("cri.address", &config.cri.address),
            ("cri.containerd", &config.cri.containerd),
        ] {
            if !path.is_absolute() {
                return Err(Fault::invalid(format!(
                    "`{key}` of {name} is not an absolute path: {:?}",
                    path.display()
                )));
            }
        }
        config
            .metrics
            .address()
            .map_err(|fault| fault.context(format!("`metrics.address` of {name}")))?;
        config.lazy.tier().map_err(|fault| fault.context(format!("`lazy.tier` of {name}")))?;
        for (key, percent) in [
            ("lazy.max_percent", config.lazy.max_percent),
            ("lazy.min_free_percent", config.lazy.min_free_percent),
        ] {
            if percent > 100 {
                return Err(Fault::invalid(format!("`{key}` of {name} is more than 100")));
            }
        }
        for (key, number) in [
            ("lazy.deadline", config.lazy.deadline),
            ("lazy.resolve_timeout", config.lazy.resolve_timeout),
            ("lazy.memory", config.lazy.memory),
            ("lazy.connections", config.lazy.connections as u64),
        ] {
            if number == 0 {
                return Err(Fault::invalid(format!("`{key}` of {name} is zero")));
            }
        }
        if let Some(option) = config.mount_options.iter().find(|o| o.is_empty() || o.contains(','))
        {
            return Err(Fault::invalid(format!(
                "`mount_options` of {name} wants one option each, not {option:?}"
            )));
        }
        Ok(config)
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

    const SAMPLE: &str = include_str!("../../../config/shipway-snapshotter.toml");

    #[test]
    fn the_sample_is_understood_and_shows_the_defaults() {
        let plain = Config::parse(SAMPLE, "sample").unwrap();
        // Keys that are only mentioned are "#key" without a space.
        let mentioned: Vec<&str> = SAMPLE
            .lines()
            .map(|l| {
                l.trim_start()
                    .strip_prefix('#')
                    .filter(|r| !r.starts_with(' ') && !r.is_empty())
                    .unwrap_or(l)
            })
            .collect();
        let all = mentioned.join("\n");
        let uncommented = Config::parse(&all, "sample").unwrap();
        assert_eq!(format!("{plain:?}"), format!("{:?}", Config::default()));
        assert_eq!(
            format!("{uncommented:?}"),
            format!(
                "{:?}",
                Config {
                    mount_options: vec!["volatile".into()],
                    metrics: Metrics { address: "127.0.0.1:9464".into() },
                    ..Config::default()
                }
            )
        );
        // No key is missing in it.
        let shown: toml::Table = toml::from_str(&all).unwrap();
        let mut keys: Vec<&str> = shown.keys().map(String::as_str).collect();
        keys.sort_unstable();
        assert_eq!(
            keys,
            [
                "address",
                "control_address",
                "cri",
                "lazy",
                "log",
                "metrics",
                "mount_options",
                "registry",
                "remap_ids",
                "root",
                "sharing",
                "status_address",
                "xino"
            ]
        );
        let keys = |table: &str| shown[table].as_table().unwrap().len();
        assert_eq!((keys("lazy"), keys("registry")), (19, 2));
        assert_eq!((keys("cri"), keys("metrics"), keys("log")), (2, 1, 2));
    }

    #[test]
    fn what_is_wrong_is_named() {
        const METRICS: Option<&str> = Some("want unix:///path or 127.0.0.1:9464");
        for (text, says, hint) in [
            ("rot = '/x'", "unknown field `rot`", Some("did you mean `root`?")),
            ("[log]\nlevels = 'x'", "unknown field `levels`", Some("did you mean `level`?")),
            ("sharing = 'some'", "unknown variant `some`", None),
            ("xino = 'yes'", "unknown variant `yes`", None),
            ("root = 'relative'", "`root` of x.toml is not an absolute path", None),
            ("mount_options = ['a,b']", "one option each", None),
            ("[metrics]\naddress = 'x'", "`metrics.address` of x.toml: \"x\" is not", METRICS),
            ("[lazy]\ntier = 'fast'", "there are file, flat-file", None),
            ("[lazy]\npull = 'slow'", "unknown variant `slow`", None),
            ("[lazy]\nsoci = 'v1'", "unknown variant `v1`", None),
            ("[lazy]\nmax_percent = 101", "more than 100", None),
            ("[lazy]\nconnections = 0", "`lazy.connections` of x.toml is zero", None),
            ("[registry]\nconfig_path = 'x'", "not an absolute path", None),
        ] {
            let error = Config::parse(text, "x.toml").unwrap_err();
            assert!(error.to_string().contains(says), "{error}");
            assert_eq!(error.hints().next(), hint);
        }
        assert!(Config::load(Path::new("/nonexistent/x.toml"), false).is_ok());
        assert!(Config::load(Path::new("/nonexistent/x.toml"), true).is_err());
    }
}
