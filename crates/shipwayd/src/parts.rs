//! Putting the daemon together: each subsystem built from its part of the settings.

use crate::{config::Cdi, control::WorkerInfo, flags::Settings, gc, history, status, worker};
use shipway_attest::Builder;
use shipway_cachedb::CacheDb;
use shipway_cdi::Registry as DeviceRegistry;
use shipway_containerd::{Containerd, NetworkConfig, NetworkDefault, TaskConfig, TaskExecutor};
use shipway_dockerfile2llb::DockerfileFrontend;
use shipway_engine::{Engine, EngineParts, History, HistoryEncoders, HistoryLimits, ImageFrontends};
use shipway_executor::{Executor as _, etc::Dns};
use shipway_exporters::Exporters;
use shipway_fault::{Context as _, Fault, Result};
use shipway_frontend::Worker;
use shipway_oci::Platform;
use shipway_ops::{Emulators, Services};
use shipway_refs::RefStore;
use shipway_registry::{Registry, RegistryConfig};
use shipway_remotecache::CacheIndex;
use shipway_session::SessionHub;
use shipway_solver::{Limits, Solver};
use shipway_sources::{LocalImages, SourceOptions, Sources};
use shipway_storage::Storage;
use std::{fs::File, path::Path, sync::Arc};

/// The daemon, ready to serve.
pub struct Parts {
    /// What builds.
    pub engine: Engine,
    /// What keeps bytes.
    pub storage: Storage,
    /// What ListWorkers says.
    pub worker: Arc<WorkerInfo>,
    /// Held while we live, so that no second daemon uses the same root.
    _lock: File,
}

/// Builds everything.
pub async fn build(settings: &Settings) -> Result<Parts> {
    if !rustix::process::geteuid().is_root() {
        return Err(Fault::invalid("shipwayd needs to run as root").hint("start it with sudo, or as a systemd service"));
    }
    let root = &settings.root;
    std::fs::create_dir_all(root).map_err(|e| Fault::io(format!("make the state directory {}", root.display()), e))?;
    let lock = lock(root)?;
    let containerd =
        Containerd::connect(&settings.containerd).await.context(|| format!("connect to containerd at {}", settings.containerd))?;
    let uuid = containerd.server_uuid().await.context(|| format!("talk to containerd at {}", settings.containerd))?;
    containerd.ensure_namespace(&settings.namespace).await?;
    let storage = containerd.storage(&settings.namespace, &settings.snapshotter)?;
    let config = &settings.config;
    let w = &config.worker.containerd;

    let mut network = NetworkConfig::default();
    if let Some(mode) = &w.network_mode {
        network.mode = network_mode(mode)?;
    }
    if let Some(path) = &w.cni_config_path {
        network.cni_config = path.into();
    }
    if let Some(path) = &w.cni_binary_path {
        network.cni_bin = path.into();
    }
    if let Some(name) = w.bridge_name.as_ref().filter(|n| !n.is_empty()) {
        network.bridge.name.clone_from(name);
    }
    if let Some(subnet) = w.bridge_subnet.as_ref().filter(|s| !s.is_empty()) {
        network.bridge.subnet.clone_from(subnet);
    }
    let variable = |name: &str| std::env::var(name).unwrap_or_default();
    if network.mode == NetworkDefault::Auto && go_true(&variable("BUILDKIT_NETWORK_BRIDGE_AUTO")) {
        network.mode = NetworkDefault::Bridge;
    }
    network.init_lock = Some(variable("BUILDKIT_CNI_INIT_LOCK_PATH")).filter(|v| !v.is_empty()).map(Into::into);
    if w.cni_pool_size > 0 {
        network.pool = w.cni_pool_size;
    }
    let mut tasks = TaskConfig::new(root.join("executor"));
    if let Some(runtime) = &w.runtime.name {
        tasks.runtime.clone_from(runtime);
    }
    tasks.binary.clone_from(&w.runtime.path);
    tasks.snapshotter.clone_from(&settings.snapshotter);
    tasks.apparmor.clone_from(&w.apparmor_profile);
    tasks.network = network;
    if let Some(dns) = &config.dns {
        tasks.dns = Dns { nameservers: dns.nameservers.clone(), options: dns.options.clone(), search: dns.search_domains.clone() };
    }
    let executor = TaskExecutor::new(&containerd, &settings.namespace, tasks)?;
    executor.sweep().await.context(|| "remove what an earlier run left in containerd")?;
    let network = if executor.has_cni() { "cni" } else { "host" };
    let refs = RefStore::open(storage.clone(), root.join("refs")).await?;

    let registry = Registry::new(RegistryConfig {
        hosts: config.registry.clone(),
        config_path: Some("/etc/containerd/certs.d".into()),
        max_concurrency: config.system.max_registry_concurrency.unwrap_or(4).max(1),
        ..RegistryConfig::default()
    });
    let sessions = SessionHub::new();
    let options = SourceOptions { prefer: local_images(w.prefer_local_images.as_deref())?, files: Some(root.join("files.json")) };
    let sources = Sources::new(refs.clone(), registry.clone(), options);
    let exporters = Exporters::new(refs.clone(), registry.clone(), sessions.clone(), w.replace_managed_images.clone());
    let cache = CacheDb::open(&root.join("cache.redb"), Arc::new(shipway_engine::RefResults(refs.clone())))?;
    let limits = Limits { max_parallel: (w.max_parallelism > 0).then_some(w.max_parallelism) };
    let caches = CacheIndex::new(cache, refs.clone());
    let solver = Solver::new(Arc::new(caches.clone()), limits);
    let limits = match &config.history {
        None => HistoryLimits::default(),
        Some(h) => HistoryLimits {
            max_age: h.max_age.map_or(HistoryLimits::default().max_age, |s| s.0),
            max_entries: h.max_entries.map_or(HistoryLimits::default().max_entries, |n| usize::try_from(n).unwrap_or(0)),
        },
    };
    let encode = HistoryEncoders { log: Arc::new(status::log_blob), fault: Arc::new(history::fault_blob) };
    let history = Arc::new(History::open(root.join("history"), limits, encode)?);
    let platforms = match w.platforms.is_empty() {
        true => worker::detect_platforms(),
        false => w.platforms.iter().map(|p| p.parse::<Platform>().map_err(|e| Fault::invalid(e.to_string()))).collect::<Result<_>>()?,
    };
    let sockets = sockets(root)?;
    let services = Arc::new(Services {
        refs,
        sources,
        executor: Arc::new(executor),
        sockets,
        cgroup_parent: w.default_cgroup_parent.clone(),
        devices: (config.cdi.disabled != Some(true)).then(|| Arc::new(devices(&config.cdi))),
        emulators: Emulators::new(worker::detect_platforms(), &std::env::var_os("PATH").unwrap_or_default()),
        authority: Default::default(),
    });
    let (id, labels) = (worker_id(root)?, worker::labels(&uuid, &settings.namespace, &settings.snapshotter, network, &w.labels));
    let version = worker::version();
    let told = Worker {
        id: id.clone(),
        labels: labels.clone(),
        package: version.package,
        version: version.version,
        revision: version.revision,
        ..Worker::default()
    };
    let engine = Engine::new(EngineParts {
        services,
        solver,
        sessions,
        caches,
        import_deadline: config.system.cache_import_timeout.map_or(shipway_engine::IMPORT_DEADLINE, |s| s.0),
        registry,
        exporters,
        builds: Default::default(),
        history,
        platforms: platforms.clone(),
        entitlements: settings.entitlements.clone(),
        builder: Builder {
            dockerfile: worker::version().dockerfile_version,
            environment: provenance_environment(config.provenance_env_dir.as_deref())?,
        },
        dockerfile: (config.frontend.dockerfile.enabled != Some(false)).then_some(DockerfileFrontend),
        proxied: config.proxy_network,
        image_frontends: ImageFrontends::new(
            config.frontend.gateway.enabled != Some(false),
            &config.frontend.gateway.allowed_repositories,
        )?,
        worker: told,
    });
    let worker = WorkerInfo { id, labels, platforms, gc: gc::rules(w, root) };
    tracing::info!(containerd = %settings.containerd, namespace = %settings.namespace, snapshotter = %settings.snapshotter, root = %root.display(), "ready");
    Ok(Parts { engine, storage, worker: Arc::new(worker), _lock: lock })
}

/// Where devices are described; the log says what of it cannot be used.
fn devices(config: &Cdi) -> DeviceRegistry {
    let registry = DeviceRegistry::new(config.spec_dirs.iter().map(Into::into), config.auto_allowed.iter().cloned());
    for problem in registry.read().problems() {
        tracing::warn!("devices: {problem}");
    }
    registry
}

/// An empty directory for sockets that steps get: those of an earlier life lead nowhere.
fn sockets(root: &Path) -> Result<std::path::PathBuf> {
    let dir = root.join("sockets");
    let failed = |e| Fault::io(format!("make {}", dir.display()), e);
    match std::fs::remove_dir_all(&dir) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(failed(e)),
        _ => std::fs::create_dir_all(&dir).map_err(failed)?,
    }
    Ok(dir)
}

/// What the operator wants told in provenance (row `at.prov.env`): the JSON objects of a directory, merged.
fn provenance_environment(dir: Option<&str>) -> Result<serde_json::Map<String, serde_json::Value>> {
    /// Told by the daemon itself.
    const RESERVED: [&str; 4] = ["buildConfig", "builderPlatform", "dockerfileVersion", "platform"];
    let path = Path::new(dir.unwrap_or("/etc/buildkit/provenance.d"));
    let failed = |path: &Path, e| Fault::io(format!("read {}", path.display()), e);
    let mut files = match std::fs::read_dir(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Default::default()),
        entries => {
            let entries = entries.and_then(|e| e.map(|e| e.map(|e| e.path())).collect::<std::io::Result<Vec<_>>>());
            entries.map_err(|e| failed(path, e))?
        }
    };
    files.retain(|f| f.extension().is_some_and(|e| e == "json") && f.is_file());
    files.sort();
    let mut all = serde_json::Map::new();
    for file in files {
        let bytes = std::fs::read(&file).map_err(|e| failed(&file, e))?;
        let object: serde_json::Map<_, _> =
            serde_json::from_slice(&bytes).map_err(|e| Fault::invalid(format!("failed to parse {}: {e}", file.display())))?;
        if let Some(key) = object.keys().find(|k| RESERVED.contains(&k.as_str())) {
            return Err(Fault::invalid(format!("{}: {key} is told by the daemon itself", file.display())).hint("use another key"));
        }
        all.extend(object);
    }
    Ok(all)
}

fn local_images(text: Option<&str>) -> Result<LocalImages> {
    text.map_or(Ok(LocalImages::default()), |t| t.parse().context(|| "preferLocalImages"))
}

/// What Go takes for a true value.
fn go_true(text: &str) -> bool {
    ["1", "t", "T", "true", "TRUE", "True"].contains(&text)
}

fn network_mode(text: &str) -> Result<NetworkDefault> {
    Ok(match text {
        "" | "auto" => NetworkDefault::Auto,
        "cni" => NetworkDefault::Cni,
        "bridge" => NetworkDefault::Bridge,
        "host" => NetworkDefault::Host,
        "none" => NetworkDefault::None,
        other => return Err(Fault::invalid(format!("invalid network mode: {other:?}")).hint("want auto, cni, bridge, host or none")),
    })
}

fn lock(root: &Path) -> Result<File> {
    let path = root.join("shipwayd.lock");
    let file = File::create(&path).map_err(|e| Fault::io(format!("open {}", path.display()), e))?;
    rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive).map_err(|_| {
        Fault::new(shipway_fault::Code::FailedPrecondition, format!("could not lock {}, another instance running?", path.display()))
            .hint("give this one another --root, or stop the other")
    })?;
    Ok(file)
}

/// The worker's id, made once per root.
fn worker_id(root: &Path) -> Result<String> {
    let path = root.join("workerid");
    match std::fs::read_to_string(&path) {
        Ok(id) if !id.trim().is_empty() => Ok(id.trim().to_owned()),
        _ => {
            let mut bytes = [0u8; 16];
            let random = File::open("/dev/urandom").and_then(|mut f| std::io::Read::read_exact(&mut f, &mut bytes));
            random.map_err(|e| Fault::io("make a worker id", e))?;
            let id = shipway_oci::Digest::of(bytes).hex()[..25].to_owned();
            std::fs::write(&path, &id).map_err(|e| Fault::io(format!("write {}", path.display()), e))?;
            Ok(id)
        }
    }
}
