//! Flags, file and defaults brought together. What is here is all that the daemon is made from
//! ([`crate::parts`], [`crate::serve`]), so a key or flag that changes nothing here has no effect:
//! then it is refused by name, or the log names it (`notes`). A test goes over all of them.

use crate::{
    config::{
        Cdi, Config, DiskSpace, GatewayFrontend, GcPolicy, Grpc, NamedNetwork, Otel, Runtime, Span,
        Worker, duration,
    },
    debug::DebugAddress,
    filter,
    flags::{Flags, Persona, stand_in},
    prune,
};
use shipway_containerd::{NetworkConfig, NetworkDefault, RuntimeOptions, TaskConfig};
use shipway_daemon::{LogFormat, LogLevel};
use shipway_executor::{CaBundle, etc::Dns};
use shipway_exporters::LazyBlobs;
use shipway_fault::{Context as _, Fault, Result};
use shipway_gocompat::parse_bool;
use shipway_grpc::ServerTls;
use shipway_history::HistoryLimits;
use shipway_identity::AuthConfig;
use shipway_netproxy::EgressRules;
use shipway_oci::{NetworkName, Platform};
use shipway_ops::{LogLimits, NetworkGrants};
use shipway_registry::RegistryConfig;
use shipway_sources::LocalImages;
use shipway_telemetry::ExportSettings;
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    time::Duration,
};

/// Default address of containerd.
const CONTAINERD: &str = "/run/containerd/containerd.sock";
/// Default control socket of shipway-snapshotter.
const SNAPSHOTTER_CONTROL: &str = "/run/shipway-snapshotter/control.sock";
/// Default directory of the JSON files that provenance has about this daemon.
const PROVENANCE: &str = "/etc/buildkit/provenance.d";
/// How long a list of platforms is good (row `toml.sys`).
const PLATFORMS_MAX_AGE: Duration = Duration::from_secs(20);
/// How long running builds may take when the daemon is to end.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);
/// How long running steps of an earlier run wait for their builds after a start: as long as
/// `shipway build` waits for its daemon.
const ADOPT_TIMEOUT: Duration = Duration::from_secs(60);
/// Transfers to or from one registry at once (row `toml.sys`).
const REGISTRY_CONCURRENCY: usize = 4;

/// What is logged, and how.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Logging {
    /// Least severe level that is logged.
    pub level: LogLevel,
    /// How.
    pub format: LogFormat,
}

/// Where to listen, and for whom.
#[derive(Clone, Debug)]
pub struct Listening {
    /// Addresses.
    pub addresses: Vec<String>,
    /// Owner of unix sockets.
    pub uid: Option<u32>,
    /// Group of unix sockets, by name or number.
    pub group: Option<String>,
    /// TLS of TCP sockets.
    pub tls: Option<ServerTls>,
    /// Whether callers are asked who they are.
    pub authenticated: bool,
}

/// What becomes of the spans of traces; without a collector and without the history, none is made.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TraceSettings {
    /// The collector that they are sent to.
    pub export: Option<ExportSettings>,
    /// Whether those of a build are kept with its record.
    pub history: bool,
    /// Socket at which the daemon takes spans of steps, where there is a collector.
    pub socket: PathBuf,
}

/// By what the daemon prunes by itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GcSettings {
    /// It does not.
    Off,
    /// These rules.
    Rules(Vec<GcPolicy>),
    /// Rules made of these limits; those that are not given do not count, and without any the
    /// defaults do.
    Limits {
        /// Never go below.
        reserved: Option<DiskSpace>,
        /// Go below.
        max_used: Option<DiskSpace>,
        /// Leave this much of the disk free.
        min_free: Option<DiskSpace>,
    },
}

/// All settings.
#[derive(Debug)]
pub struct Settings {
    /// State directory.
    pub root: PathBuf,
    /// Log.
    pub logging: Logging,
    /// Sockets.
    pub listening: Listening,
    /// Where metrics and the like are shown.
    pub debug: Option<DebugAddress>,
    /// How long running builds may take when the daemon is to end.
    pub drain_timeout: Duration,
    /// How long running steps of an earlier run wait for their builds after a start; zero if steps
    /// end with the daemon.
    pub adopt_timeout: Duration,
    /// What becomes of spans.
    pub traces: TraceSettings,
    /// containerd's socket.
    pub containerd: String,
    /// Namespace.
    pub namespace: String,
    /// How steps run; also the snapshotter.
    pub tasks: TaskConfig,
    /// Cgroup that those of steps are in, unless they name one.
    pub cgroup_parent: Option<String>,
    /// Steps that may run at once; `None` for no limit.
    pub max_parallelism: Option<usize>,
    /// Platforms, native first; those that are found if there are none.
    pub platforms: Vec<Platform>,
    /// When to look again for platforms; `None` for never.
    pub platforms_max_age: Option<Duration>,
    /// Labels of the worker beside our own.
    pub labels: BTreeMap<String, String>,
    /// Garbage collection.
    pub gc: GcSettings,
    /// Registries.
    pub registry: RegistryConfig,
    /// How long a build waits for a cache that it imports.
    pub import_deadline: Duration,
    /// Which failed steps are kept.
    pub failures: shipway_engine::FailureLimits,
    /// Which images of the store are taken without asking their registry.
    pub prefer_local_images: LocalImages,
    /// When blobs are fetched that images in the store do without.
    pub lazy_blobs: LazyBlobs,
    /// Control socket of shipway-snapshotter.
    pub snapshotter_control: PathBuf,
    /// Names of images that Kubernetes manages and that builds may take.
    pub replace_managed_images: Vec<String>,
    /// Further namespaces that images in the store are published to.
    pub publish_namespaces: Vec<String>,
    /// How long finished builds are remembered.
    pub history: HistoryLimits,
    /// Devices of the host.
    pub cdi: Cdi,
    /// Entitlements that may be granted.
    pub entitlements: Vec<String>,
    /// Networks that steps can ask for, and those of them that need no asking.
    pub networks: NetworkGrants,
    /// Directory of the JSON files that provenance has about this daemon.
    pub provenance: PathBuf,
    /// Whether there is the in-house Dockerfile frontend.
    pub dockerfile: bool,
    /// Which frontends may run in containers.
    pub gateway: GatewayFrontend,
    /// Whether steps of all builds reach the network through a recording proxy only.
    pub proxied: bool,
    /// What steps on the proxy network may reach at all.
    pub egress: EgressRules,
    /// How much of a step's output is passed on.
    pub log_limits: LogLimits,
    /// Who may call, and what each may do; everybody everything if there is nothing.
    pub auth: Option<AuthConfig>,
    /// What the log should say about these settings.
    pub notes: Vec<String>,
}

impl Settings {
    /// Reads the file that the flags name and lays the flags over it.
    pub fn load(flags: Flags, persona: Persona) -> Result<Self> {
        let path = flags.config.clone().unwrap_or_else(|| persona.config());
        let config = Config::load(&path, flags.config.is_some() && persona == Persona::Shipwayd)?;
        Self::of(flags, config, persona)
    }

    /// Lays the flags over a configuration.
    pub fn of(flags: Flags, config: Config, persona: Persona) -> Result<Self> {
        let Config {
            debug,
            trace,
            root,
            insecure_entitlements,
            proxy_network,
            denied_networks,
            provenance_env_dir,
            log,
            grpc,
            auth,
            otel,
            cdi,
            worker,
            registry,
            dns,
            networks,
            ca,
            egress,
            history,
            frontend,
            lazy,
            system,
            cache,
        } = config;
        let mut notes: Vec<String> = flags.absent.notes().collect();
        let mut note = |set: bool, text: &str| notes.extend(set.then(|| text.to_owned()));
        note(debug, "debug is deprecated: use log.level = \"debug\"");
        note(trace, "trace is deprecated: use log.level = \"trace\"");
        note(flags.trace, "--trace is deprecated: use --log-level=trace");
        check_caches(cache.as_ref())?;

        let root =
            flags.root.clone().or(root.map(Into::into)).unwrap_or_else(|| persona.root().into());
        let (mut w, oci) = (worker.containerd, worker.oci);
        if w.enabled == Some(false) {
            notes.push(
                "worker.containerd.enabled = false has no effect but that [worker.oci] counts: steps run in containerd all the same".into(),
            );
        }
        let word = |enabled: Option<bool>| enabled.map(|e| if e { "true" } else { "false" });
        let containerd = flags.containerd_worker.as_deref().or(word(w.enabled.filter(|e| !e)));
        let oci_worker = flags.oci.enabled.as_deref().or(word(oci.enabled()));
        for (flag, value) in [
            ("--containerd-worker", &flags.containerd_worker),
            ("--oci-worker", &flags.oci.enabled),
        ] {
            if !value.as_deref().is_none_or(|v| ["true", "false", "auto"].contains(&v)) {
                return Err(Fault::invalid(format!("invalid value of {flag}: {:?}", value))
                    .hint("want true, false or auto"));
            }
        }
        let stand_in = stand_in(oci_worker, containerd, &root, persona.root())?;
        notes.extend(flags.oci.without_effect(stand_in.is_some()));
        let flags = match &stand_in {
            Some(stand_in) => {
                notes.push(stand_in.note.clone());
                notes.extend(oci.fill(&mut w));
                flags.with_those_of_oci()
            }
            None => {
                let others = oci.keys.iter().filter(|k| *k != "enabled");
                let why = "it is for an OCI worker, and steps run on the containerd worker";
                notes.extend(others.map(|key| format!("worker.oci.{key} has no effect: {why}")));
                flags
            }
        };
        flags.absent.check(w.rootless, w.selinux)?;

        let mut logging = Logging::default();
        if flags.debug || debug {
            logging.level = LogLevel::Debug;
        }
        if let Some(level) = &log.level {
            logging.level = level.parse()?;
        }
        if flags.trace || trace {
            logging.level = LogLevel::Trace;
        }
        if let Some(level) = &flags.log_level {
            logging.level = level.parse()?;
        }
        if let Some(format) = flags.log_format.as_deref().or(log.format.as_deref()) {
            logging.format = format.parse()?;
        }

        let Grpc { address, debug_address, uid, gid, security_descriptor, tls } = grpc;
        let mut note = |set: bool, text: &str| notes.extend(set.then(|| text.to_owned()));
        note(
            security_descriptor.is_some(),
            "grpc.securityDescriptor has no effect: it is for Windows",
        );
        let tls = match (
            flags.tlscert.or(tls.cert),
            flags.tlskey.or(tls.key),
            flags.tlscacert.or(tls.ca),
        ) {
            (Some(cert), Some(key), ca) => Some(ServerTls {
                cert: cert.into(),
                key: key.into(),
                client_ca: ca.map(Into::into),
                client_optional: auth.as_ref().is_some_and(AuthConfig::takes_tokens),
            }),
            (None, None, None) => None,
            _ => {
                return Err(Fault::invalid(
                    "TLS needs a certificate and a key (grpc.tls.cert, grpc.tls.key)",
                )
                .hint(
                    "give both --tlscert and --tlskey, or neither, and --tlscacert only with them",
                ));
            }
        };
        let addresses = [flags.addr, address, persona.addresses()]
            .into_iter()
            .find(|a| !a.is_empty())
            .unwrap_or_default();
        let listening = Listening {
            addresses,
            uid,
            group: flags.group.or(gid.map(|g| g.to_string())),
            tls,
            authenticated: auth.is_some(),
        };

        let entitlements = entitlements(
            if flags.allow_insecure_entitlement.is_empty() {
                insecure_entitlements.unwrap_or_default()
            } else {
                flags.allow_insecure_entitlement
            },
            flags.cdi_disabled.or(cdi.disabled) == Some(true),
        )?;
        let dirs = [
            flags.cdi_spec_dir,
            cdi.spec_dirs,
            shipway_cdi::DEFAULT_DIRS.map(str::to_owned).into(),
        ];
        let cdi = Cdi {
            disabled: flags.cdi_disabled.or(cdi.disabled),
            spec_dirs: dirs.into_iter().find(|d| !d.is_empty()).unwrap_or_default(),
            auto_allowed: cdi.auto_allowed,
        };

        if let Some(keep) = flags.gc_keepstorage {
            (w.gckeepstorage, w.reserved_space) = (None, keep.reserved);
            (w.min_free_space, w.max_used_space) = (keep.min_free, keep.max_used);
        }
        let Worker {
            enabled: _,
            address,
            namespace,
            snapshotter,
            labels,
            platforms,
            runtime,
            // Refused above.
            rootless: _,
            selinux: _,
            apparmor_profile,
            max_parallelism,
            default_cgroup_parent,
            network_mode,
            cni_config_path,
            cni_binary_path,
            cni_pool_size,
            bridge_name,
            bridge_subnet,
            prefer_local_images,
            replace_managed_images,
            publish_namespaces,
            gc,
            gckeepstorage,
            reserved_space,
            max_used_space,
            min_free_space,
            gcpolicy,
        } = w;
        let limits = [gckeepstorage, reserved_space, max_used_space, min_free_space]
            .iter()
            .any(Option::is_some);
        let mut note = |set: bool, text: &str| notes.extend(set.then(|| text.to_owned()));
        note(
            limits && !gcpolicy.is_empty(),
            "gckeepstorage, reservedSpace, maxUsedSpace and minFreeSpace have no effect beside gcpolicy",
        );
        let some = |size: Option<DiskSpace>| size.filter(|s| !s.is_zero());
        let gc = match (flags.gc.or(gc), gcpolicy) {
            (Some(false), _) => GcSettings::Off,
            (_, rules) if !rules.is_empty() => {
                for rule in &rules {
                    filter::parse_all(&rule.filters, prune::FIELDS)
                        .context(|| "gcpolicy.filters")?;
                }
                GcSettings::Rules(rules)
            }
            _ => {
                let (max_used, min_free) = (some(max_used_space), some(min_free_space));
                let set =
                    some(reserved_space).is_some() || max_used.is_some() || min_free.is_some();
                note(
                    set && gckeepstorage.is_some(),
                    "gckeepstorage has no effect beside reservedSpace, maxUsedSpace and minFreeSpace",
                );
                GcSettings::Limits {
                    reserved: some(reserved_space).or(some(gckeepstorage).filter(|_| !set)),
                    max_used,
                    min_free,
                }
            }
        };

        let mut network = NetworkConfig::default();
        if let Some(mode) = flags.net.or(network_mode) {
            network.mode = self::network_mode(&mode)?;
        }
        let variable = |name: &str| std::env::var(name).unwrap_or_default();
        if network.mode == NetworkDefault::Auto
            && parse_bool(&variable("BUILDKIT_NETWORK_BRIDGE_AUTO")) == Some(true)
        {
            network.mode = NetworkDefault::Bridge;
        }
        network.init_lock =
            Some(variable("BUILDKIT_CNI_INIT_LOCK_PATH")).filter(|v| !v.is_empty()).map(Into::into);
        if network.mode == NetworkDefault::Bridge {
            network.bridge.name =
                bridge_name.filter(|n| !n.is_empty()).unwrap_or(network.bridge.name);
            network.bridge.subnet =
                bridge_subnet.filter(|s| !s.is_empty()).unwrap_or(network.bridge.subnet);
            note(
                flags.cni_config_path.is_some() || cni_config_path.is_some(),
                "cniConfigPath has no effect with the network mode \"bridge\"",
            );
        } else {
            note(
                bridge_name.is_some(),
                "bridgeName has no effect: it is for the network mode \"bridge\"",
            );
            note(
                bridge_subnet.is_some(),
                "bridgeSubnet has no effect: it is for the network mode \"bridge\"",
            );
        }
        network.cni_config =
            flags.cni_config_path.or(cni_config_path).map_or(network.cni_config, PathBuf::from);
        network.cni_bin =
            flags.cni_binary_dir.or(cni_binary_path).map_or(network.cni_bin, PathBuf::from);
        network.pool = Some(flags.cni_pool_size.unwrap_or(cni_pool_size))
            .filter(|n| *n > 0)
            .unwrap_or(network.pool);
        let networks = named_networks(networks, &mut network)?;

        let (log_limits, unread) = log_limits(variable);
        notes.extend(unread);

        let mut tasks = TaskConfig::new(root.join("executor"));
        let Runtime { name, path, options } = runtime;
        tasks.runtime = flags.runtime.or(name).unwrap_or(tasks.runtime);
        let options = serde_json::to_value(options)
            .map_err(|e| Fault::invalid(format!("worker.containerd.runtime.options: {e}")))?;
        tasks.options = RuntimeOptions::parse(&tasks.runtime, options)
            .context(|| "worker.containerd.runtime.options")?;
        tasks.binary = flags.binary.or(path);
        tasks.snapshotter = flags.snapshotter.or(snapshotter).unwrap_or_else(|| "overlayfs".into());
        tasks.apparmor = flags.apparmor_profile.or(apparmor_profile).filter(|p| !p.is_empty());
        tasks.network = network;
        if let Some(dns) = dns {
            tasks.dns = Dns {
                nameservers: dns.nameservers,
                options: dns.options,
                search: dns.search_domains,
                resolv_conf: dns.resolv_conf.filter(|p| !p.is_empty()).map(PathBuf::from),
            };
        }
        tasks.ca = ca.bundle.filter(|p| !p.is_empty()).map(CaBundle::new);

        let mut all_labels = labels;
        for label in flags.labels {
            let (k, v) = label.split_once('=').ok_or_else(|| {
                Fault::invalid(format!("--containerd-worker-labels {label:?}: want name=value"))
            })?;
            all_labels.insert(k.into(), v.into());
        }
        let platforms = if flags.platforms.is_empty() { platforms } else { flags.platforms };
        let concurrency = match system.max_registry_concurrency {
            Some(0) => {
                return Err(Fault::invalid("system.maxRegistryConcurrency must be greater than 0"));
            }
            given => given.unwrap_or(REGISTRY_CONCURRENCY),
        };
        let defaults = HistoryLimits::default();
        let history = history.unwrap_or_default();
        let history = HistoryLimits {
            max_age: history.max_age.map_or(defaults.max_age, |s| s.0),
            max_entries: history
                .max_entries
                .map_or(defaults.max_entries, |n| usize::try_from(n).unwrap_or(0)),
            max_bytes: match history.max_used_space {
                None => defaults.max_bytes,
                Some(DiskSpace::Bytes(bytes)) => bytes,
                Some(DiskSpace::Percent(_)) => {
                    return Err(Fault::invalid("history.maxUsedSpace is no share of a disk")
                        .hint("give bytes, such as \"500MB\""));
                }
            },
        };
        let (traces, about) = traces(&otel, flags.otel_socket_path, &root)?;
        notes.extend(about);
        let debug = flags.debugaddr.or(debug_address).filter(|a| !a.is_empty());
        Ok(Self {
            root,
            logging,
            listening,
            debug: debug.map(|a| a.parse().context(|| "debugAddress (--debugaddr)")).transpose()?,
            drain_timeout: span("drain-timeout", flags.drain_timeout, system.drain_timeout)?
                .unwrap_or(DRAIN_TIMEOUT),
            adopt_timeout: span("adopt-timeout", flags.adopt_timeout, system.adopt_timeout)?
                .unwrap_or(ADOPT_TIMEOUT),
            traces,
            containerd: flags.containerd_addr.or(address).unwrap_or_else(|| CONTAINERD.into()),
            namespace: [flags.namespace, namespace, stand_in.and_then(|s| s.namespace)]
                .into_iter()
                .flatten()
                .next()
                .unwrap_or_else(|| persona.namespace().into()),
            tasks,
            cgroup_parent: default_cgroup_parent,
            max_parallelism: Some(flags.max_parallelism.unwrap_or(max_parallelism))
                .filter(|n| *n > 0),
            platforms: platforms
                .iter()
                .map(|p| {
                    p.parse().map_err(|e: shipway_oci::PlatformError| Fault::invalid(e.to_string()))
                })
                .collect::<Result<_>>()?,
            platforms_max_age: system
                .platforms_cache_max_age
                .map_or(Some(PLATFORMS_MAX_AGE), |age| age.0),
            labels: all_labels,
            gc,
            registry: RegistryConfig {
                hosts: registry,
                config_path: Some("/etc/containerd/certs.d".into()),
                max_concurrency: concurrency,
                denied: denied_networks.unwrap_or_default(),
                ..RegistryConfig::default()
            },
            failures: shipway_engine::FailureLimits {
                count: system
                    .keep_failed_steps
                    .unwrap_or(shipway_engine::FailureLimits::default().count),
                age: system
                    .keep_failed_steps_for
                    .map_or(shipway_engine::FailureLimits::default().age, |span| span.0),
            },
            import_deadline: system
                .cache_import_timeout
                .map_or(shipway_engine::IMPORT_DEADLINE, |s| s.0),
            prefer_local_images: match flags.prefer_local_images.or(prefer_local_images) {
                None => LocalImages::default(),
                Some(text) => text.parse().context(|| "preferLocalImages")?,
            },
            lazy_blobs: match flags.lazy_blobs.or(lazy.blobs) {
                None => LazyBlobs::default(),
                Some(text) => text.parse().context(|| "lazy.blobs")?,
            },
            snapshotter_control: lazy
                .snapshotter_control
                .map_or_else(|| SNAPSHOTTER_CONTROL.into(), PathBuf::from),
            replace_managed_images,
            publish_namespaces,
            history,
            cdi,
            entitlements,
            networks,
            provenance: provenance_env_dir.map_or_else(|| PROVENANCE.into(), PathBuf::from),
            dockerfile: frontend.dockerfile.enabled != Some(false),
            gateway: frontend.gateway,
            proxied: flags.proxy_network.unwrap_or(proxy_network),
            egress: EgressRules::new(&egress.allow, &egress.deny).context(|| "egress")?,
            log_limits,
            auth,
            notes,
        })
    }
}

/// Name of the socket for spans of steps, below the daemon's root.
const TRACE_SOCKET: &str = "otel-grpc.sock";

/// What becomes of spans (rows `toml.otel`, `env.otel`), and what of the environment has no effect.
fn traces(
    otel: &Otel,
    socket: Option<String>,
    root: &Path,
) -> Result<(TraceSettings, Vec<String>)> {
    let variable = |name: &str| std::env::var(name).ok().filter(|v| !v.is_empty());
    let mut notes = Vec::new();
    for (name, why) in [
        ("JAEGER_TRACE", "Jaeger takes OTLP (OTEL_EXPORTER_OTLP_ENDPOINT)"),
        ("OTEL_METRICS_EXPORTER", "metrics are fetched from grpc.debugAddress"),
        ("OTEL_EXPORTER_OTLP_COMPRESSION", "spans are sent uncompressed"),
        ("OTEL_EXPORTER_OTLP_TRACES_COMPRESSION", "spans are sent uncompressed"),
    ] {
        if variable(name).is_some_and(|value| value != "none") {
            notes.push(format!("{name} has no effect: {why}"));
        }
    }
    let found = ExportSettings::find(&variable, otel.endpoint.as_deref(), otel.protocol.as_deref());
    let export = match found {
        Err(fault)
            if variable("OTEL_IGNORE_ERROR").as_deref().and_then(parse_bool) == Some(true) =>
        {
            notes.push(format!("spans are sent nowhere: {fault}"));
            None
        }
        found => found.context(|| "where to send spans (OTEL_EXPORTER_OTLP_*, [otel])")?,
    };
    let on = !shipway_telemetry::is_disabled(&variable);
    let traces = TraceSettings {
        export: export.filter(|_| on),
        history: on && otel.history != Some(false),
        socket: socket
            .or_else(|| otel.socket_path.clone())
            .map_or_else(|| root.join(TRACE_SOCKET), PathBuf::from),
    };
    Ok((traces, notes))
}

/// Puts the networks that are configured by name into `network`; which of them builds may use.
fn named_networks(
    all: BTreeMap<String, NamedNetwork>,
    network: &mut NetworkConfig,
) -> Result<NetworkGrants> {
    let mut grants = NetworkGrants::default();
    for (name, of) in all {
        let key = format!("networks.{name}");
        let name: NetworkName = name.parse().map_err(|e: shipway_oci::NetworkNameError| {
            Fault::invalid(e.to_string())
                .hint("it has letters, digits, - and _, and is not host, none, default or sandbox")
        })?;
        if of.cni_config_path.is_empty() {
            return Err(Fault::invalid(format!("{key} needs cniConfigPath"))
                .hint("it is the path of a CNI configuration, such as /etc/cni/net.d/x.conflist"));
        }
        let cni_bin = of.cni_binary_path.map_or_else(|| network.cni_bin.clone(), PathBuf::from);
        let of_cni =
            shipway_containerd::NamedNetwork { cni_config: of.cni_config_path.into(), cni_bin };
        network.named.insert(name.clone(), of_cni);
        if of.auto_allowed {
            grants.allowed.insert(name.clone());
        }
        grants.configured.insert(name);
    }
    Ok(grants)
}

/// The entitlements that may be granted. Row `d.device`: whether steps get devices is for `[cdi]`
/// to say.
fn entitlements(mut named: Vec<String>, no_devices: bool) -> Result<Vec<String>> {
    if let Some(unknown) = named
        .iter()
        .find(|e| !["network.host", "security.insecure", "device"].contains(&e.as_str()))
    {
        return Err(Fault::invalid(format!("invalid entitlement : {unknown}"))
            .hint("want network.host or security.insecure"));
    }
    named.retain(|e| e != "device");
    if !no_devices {
        named.push("device".into());
    }
    Ok(named)
}

/// Refuses settings of caches that would be trusted without effect: who asks for signatures must
/// not get caches that nobody verifies (row `toml.gha`).
fn check_caches(caches: Option<&toml::Table>) -> Result<()> {
    for (kind, settings) in caches.into_iter().flatten() {
        if kind != "gha" {
            return Err(Fault::invalid(format!("unknown field `cache.{kind}`"))
                .hint("did you mean `cache.gha`?"));
        }
        if let Some(key) = settings.as_table().and_then(|table| table.keys().next()) {
            return Err(match key.as_str() {
                "sign" | "verify" => Fault::unimplemented(format!(
                    "cache.gha.{key}: signatures of indexes in GitHub's cache"
                ))
                .hint("remove the table: these caches are neither signed nor verified"),
                _ => Fault::invalid(format!("unknown field `cache.gha.{key}`")),
            });
        }
    }
    Ok(())
}

/// The limits of a step's output that the environment sets (row `env.logclip`), and what is wrong
/// with them.
fn log_limits(variable: impl Fn(&str) -> String) -> (LogLimits, Vec<String>) {
    let (mut limits, mut notes) = (LogLimits::default(), Vec::new());
    for (name, limit) in [
        ("BUILDKIT_STEP_LOG_MAX_SIZE", &mut limits.size),
        ("BUILDKIT_STEP_LOG_MAX_SPEED", &mut limits.speed),
    ] {
        let text = variable(name);
        match LogLimits::parse(&text) {
            Some(wanted) => *limit = wanted,
            None if text.is_empty() => {}
            None => notes.push(format!(
                "{name}={text:?} has no effect: it is neither a number of bytes nor -1 for no limit"
            )),
        }
    }
    (limits, notes)
}

fn network_mode(text: &str) -> Result<NetworkDefault> {
    Ok(match text {
        "" | "auto" => NetworkDefault::Auto,
        "cni" => NetworkDefault::Cni,
        "bridge" => NetworkDefault::Bridge,
        "host" => NetworkDefault::Host,
        "none" => NetworkDefault::None,
        other => {
            return Err(Fault::invalid(format!("invalid network mode: {other:?}"))
                .hint("want auto, cni, bridge, host or none"));
        }
    })
}

/// A duration that a flag gives, or else the configuration.
fn span(flag: &str, given: Option<String>, configured: Option<Span>) -> Result<Option<Duration>> {
    let Some(text) = given else { return Ok(configured.map(|span| span.0)) };
    let given = duration(&text).ok_or_else(|| {
        Fault::invalid(format!("--{flag}: {text:?} is not a duration"))
            .hint("write it as 90s or 10m")
    })?;
    Ok(Some(given))
}

#[cfg(test)]
mod tests;
