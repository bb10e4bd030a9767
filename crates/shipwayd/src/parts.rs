//! Putting the daemon together: each subsystem built from its part of the settings.

use crate::{
    auth::Authenticate,
    config::Cdi,
    control::WorkerInfo,
    debug::DebugAddress,
    gc, history, private,
    settings::{Listening, Settings, TraceSettings},
    status,
    telemetry::Telemetry,
    worker::{self, Platforms},
};
use shipway_attest::Builder;
use shipway_buildcache::{CacheIndex, Place, Quota};
use shipway_cdi::CdiCatalog;
use shipway_containerd::{Containerd, ContainerdNamespaces, TaskExecutor};
use shipway_dockerfile2llb::{DockerfileContexts, DockerfileFrontend};
use shipway_engine::{Engine, EngineParts, ImageFrontends};
use shipway_executor::Executor as _;
use shipway_exporters::{Exporters, Publishing};
use shipway_fault::{Class, Code, Context as _, Fault, Result};
use shipway_frontend::{Frontends, Worker};
use shipway_history::{History, HistoryEncoders};
use shipway_host::{Disk, random_id};
use shipway_ops::{Emulators, HeldSteps, LeftSteps, Services};
use shipway_refs::RefStore;
use shipway_registry::Registry;
use shipway_remotecache::Backends;
use shipway_session::SessionHub;
use shipway_solver::{Limits, Solver};
use shipway_sources::{LayerSources, SourceOptions, Sources};
use shipway_storage::Storage;
use std::{fs::File, path::Path, sync::Arc, time::Duration};

/// The daemon, ready to serve.
pub struct Parts {
    /// What builds.
    pub engine: Engine,
    /// What keeps bytes.
    pub storage: Storage,
    /// What ListWorkers says.
    pub worker: Arc<WorkerInfo>,
    /// What makes spans.
    pub telemetry: Telemetry,
    /// What becomes of them.
    pub traces: TraceSettings,
    /// Where metrics and the like are shown.
    pub debug: Option<DebugAddress>,
    /// How long running builds may take when the daemon is to end.
    pub drain_timeout: Duration,
    /// How long steps of an earlier run wait for their builds.
    pub adopt_timeout: Duration,
    /// Recognizes callers.
    pub auth: Authenticate,
    /// Held as long as the process runs, so that no second daemon uses the same root.
    _locks: Vec<File>,
}

/// containerd's own snapshotters.
const LOCAL_SNAPSHOTTERS: [&str; 7] =
    ["overlayfs", "native", "btrfs", "zfs", "devmapper", "blockfile", "erofs"];
/// Directories below the root, each with an owner of its own.
const PLACES: [&str; 4] = ["executor", "refs", "history", "sockets"];
/// What of the root counts towards the limits of garbage collection, besides states in containerd.
const BESIDES: [&str; 4] = ["cache.redb", "history", "files.json", "refs/uses.json"];
/// Our own lock, and the one of a buildkitd that might have the same root.
const LOCKS: [&str; 2] = ["shipwayd.lock", "buildkitd.lock"];

/// Builds everything, and gives back where it is to be served.
pub async fn build(settings: Settings, telemetry: Telemetry) -> Result<(Parts, Listening)> {
    if !rustix::process::geteuid().is_root() {
        return Err(Fault::invalid("shipwayd needs to run as root")
            .hint("start it with sudo, or as a systemd service"));
    }
    // Every setting is used, or the compiler says so.
    let Settings {
        root,
        // Used by `main`, as are the notes.
        logging: _,
        notes: _,
        listening,
        debug,
        drain_timeout,
        adopt_timeout,
        traces,
        containerd: address,
        namespace,
        tasks,
        cgroup_parent,
        max_parallelism,
        platforms,
        platforms_max_age,
        labels,
        gc,
        registry,
        import_deadline,
        failures,
        prefer_local_images,
        lazy_blobs,
        snapshotter_control,
        replace_managed_images,
        publish_namespaces,
        history,
        cdi,
        entitlements,
        networks,
        provenance,
        dockerfile,
        gateway,
        proxied,
        egress,
        log_limits,
        auth,
    } = settings;
    let auth = Authenticate::new(auth)?;
    private::dir(&root).context(|| "make the state directory")?;
    for place in PLACES {
        private::dir(&root.join(place))?;
    }
    let locks = LOCKS.iter().map(|name| lock(&root, name)).collect::<Result<_>>()?;
    if let Some(profile) = &tasks.apparmor {
        apparmor(profile)?;
    }
    let containerd = Containerd::connect(&address)
        .await
        .context(|| format!("connect to containerd at {address}"))?;
    let uuid =
        containerd.server_uuid().await.context(|| format!("talk to containerd at {address}"))?;
    containerd.ensure_namespace(&namespace).await?;
    let snapshotter = tasks.snapshotter.clone();
    let storage = containerd.storage(&namespace, &snapshotter)?;
    // Limits of garbage collection are about the disk that snapshots are on.
    let disk = containerd
        .snapshots_at(&snapshotter)
        .await?
        .filter(|at| at.is_dir())
        .unwrap_or_else(|| root.clone());
    let (profile, ca) = (tasks.apparmor.clone(), tasks.ca.clone());
    if let Some(bundle) = &ca {
        // Read for each step; what is wrong from the start is better reported now.
        bundle.read()?;
    }
    let executor = Arc::new(TaskExecutor::new(&containerd, &namespace, tasks)?);
    let left = executor.sweep().await;
    let left = left.context(|| "remove what an earlier run left in containerd")?;
    let left = LeftSteps::new(left);
    let network = if executor.has_cni() { "cni" } else { "host" };
    let registry = Registry::new(registry);
    // containerd's own snapshotters fetch nothing, so they get no credentials.
    let control = (!LOCAL_SNAPSHOTTERS.contains(&&*snapshotter)).then_some(snapshotter_control);
    let layers = LayerSources::new(registry.clone(), control);
    let (place, snapshots) = (root.join("refs"), left.snapshots());
    let (refs, inherited) =
        RefStore::open_inheriting(storage.clone(), place, &layers, &snapshots).await?;
    let held = left.hold(&refs, executor.clone(), inherited).await?;
    let held = match adopt_timeout.is_zero() {
        true => {
            held.expire(adopt_timeout).await;
            HeldSteps::default()
        }
        false => held,
    };
    let sessions = SessionHub::new();
    let options =
        SourceOptions { prefer: prefer_local_images, files: Some(root.join("files.json")), layers };
    let sources = Sources::new(refs.clone(), registry.clone(), options);
    let publishing = Publishing {
        namespaces: Arc::new(ContainerdNamespaces::new(&containerd, &snapshotter)),
        own: namespace.clone(),
        default: publish_namespaces,
    };
    publishing.check().context(|| "publishNamespaces")?;
    let exporters = Exporters::new(
        refs.clone(),
        registry.clone(),
        replace_managed_images,
        publishing,
        lazy_blobs,
        executor.clone(),
    );
    let caches = CacheIndex::open(&root.join("cache.redb"), refs.clone())?;
    let solver = Solver::new(Arc::new(caches.clone()), Limits { max_parallel: max_parallelism });
    let encode =
        HistoryEncoders { log: Arc::new(status::log_blob), fault: Arc::new(history::fault_blob) };
    let history = Arc::new(History::open(root.join("history"), history, encode)?);
    let platforms = Platforms::new(platforms, platforms_max_age);
    let rules = gc::rules(&gc, Disk::of(&disk).map_or(0, |disk| disk.usable));
    let quota = Quota::new(
        caches.clone(),
        rules.iter().map(|rule| rule.options()).collect::<Result<_>>()?,
        Place { disk: disk.clone(), besides: BESIDES.map(|name| root.join(name)).into() },
    );
    let services = Arc::new(Services {
        refs,
        sources,
        executor,
        held,
        sockets: sockets(&root)?,
        cgroup_parent,
        devices: (cdi.disabled != Some(true)).then(|| Arc::new(devices(&cdi))),
        emulators: Emulators::new(platforms.now(), &std::env::var_os("PATH").unwrap_or_default()),
        log_limits,
        trace_socket: traces.export.is_some().then(|| traces.socket.clone()),
        ca,
        quota,
        egress: Arc::new(egress),
        authority: Default::default(),
    });
    let (id, labels) = (
        worker_id(&root)?,
        worker::labels(&uuid, &namespace, &snapshotter, network, profile.as_deref(), &labels),
    );
    let version = worker::version();
    let described = Worker {
        id: id.clone(),
        labels: labels.clone(),
        package: version.package,
        version: version.version,
        revision: version.revision,
        ..Worker::default()
    };
    let cache_backends = Backends::new(registry);
    let engine = Engine::new(EngineParts {
        services,
        solver,
        sessions,
        caches,
        import_deadline,
        cache_backends,
        exporters,
        builds: Default::default(),
        history,
        traces: telemetry.traces.clone(),
        platforms: platforms.now(),
        entitlements,
        networks,
        builder: Builder {
            dockerfile: worker::version().dockerfile_version,
            environment: provenance_environment(&provenance)?,
        },
        frontends: Frontends::default().with("dockerfile.v0", DockerfileFrontend, dockerfile),
        contexts: Arc::new(DockerfileContexts),
        proxied,
        image_frontends: ImageFrontends::new(
            gateway.enabled != Some(false),
            &gateway.allowed_repositories,
        )?,
        failures,
        worker: described,
    });
    let worker = WorkerInfo { id, labels, platforms, gc: rules, disk };
    tracing::info!(containerd = %address, %namespace, %snapshotter, root = %root.display(), "ready");
    let worker = Arc::new(worker);
    let parts = Parts {
        engine,
        storage,
        worker,
        telemetry,
        traces,
        debug,
        drain_timeout,
        adopt_timeout,
        auth,
        _locks: locks,
    };
    Ok((parts, listening))
}

/// Checks that steps can be given the AppArmor profile (row `exec.sandbox`): on a host without
/// AppArmor the runtime would refuse each of them.
fn apparmor(profile: &str) -> Result<()> {
    let enabled = std::fs::read_to_string("/sys/module/apparmor/parameters/enabled")
        .is_ok_and(|t| t.starts_with('Y'));
    if !enabled {
        return Err(Fault::new(
            Code::FailedPrecondition,
            format!(
                "steps are to have the AppArmor profile {profile:?}, and this host has no AppArmor"
            ),
        )
        .with_class(Class::Environment)
        .hint("leave apparmor-profile (--containerd-worker-apparmor-profile) out"));
    }
    Ok(())
}

/// Where devices are described; the log says what of it cannot be used.
fn devices(config: &Cdi) -> CdiCatalog {
    let registry = CdiCatalog::new(
        config.spec_dirs.iter().map(Into::into),
        config.auto_allowed.iter().cloned(),
    );
    for problem in registry.read().problems() {
        tracing::warn!("devices: {problem}");
    }
    registry
}

/// An empty directory for sockets that steps get: those of a previous run lead nowhere.
fn sockets(root: &Path) -> Result<std::path::PathBuf> {
    let dir = root.join("sockets");
    let failed = |e| Fault::io(format!("make {}", dir.display()), e);
    match std::fs::remove_dir_all(&dir) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(failed(e)),
        _ => private::dir(&dir)?,
    }
    Ok(dir)
}

/// What the operator adds to provenance (row `at.prov.env`): the JSON objects of a directory,
/// merged.
fn provenance_environment(path: &Path) -> Result<serde_json::Map<String, serde_json::Value>> {
    /// Set by the daemon itself.
    const RESERVED: [&str; 4] = ["buildConfig", "builderPlatform", "dockerfileVersion", "platform"];
    let failed = |path: &Path, e| Fault::io(format!("read {}", path.display()), e);
    let mut files = match std::fs::read_dir(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Default::default()),
        entries => {
            let entries = entries
                .and_then(|e| e.map(|e| e.map(|e| e.path())).collect::<std::io::Result<Vec<_>>>());
            entries.map_err(|e| failed(path, e))?
        }
    };
    files.retain(|f| f.extension().is_some_and(|e| e == "json") && f.is_file());
    files.sort();
    let mut all = serde_json::Map::new();
    for file in files {
        let bytes = std::fs::read(&file).map_err(|e| failed(&file, e))?;
        let object: serde_json::Map<_, _> = serde_json::from_slice(&bytes)
            .map_err(|e| Fault::invalid(format!("failed to parse {}: {e}", file.display())))?;
        if let Some(key) = object.keys().find(|k| RESERVED.contains(&k.as_str())) {
            return Err(Fault::invalid(format!(
                "{}: {key} is set by the daemon itself",
                file.display()
            ))
            .hint("use another key"));
        }
        all.extend(object);
    }
    Ok(all)
}

fn lock(root: &Path, name: &str) -> Result<File> {
    let path = root.join(name);
    let file = File::create(&path).map_err(|e| Fault::io(format!("open {}", path.display()), e))?;
    rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive).map_err(
        |_| {
            Fault::new(
                Code::FailedPrecondition,
                format!("could not lock {}, another instance running?", path.display()),
            )
            .hint("give this one another --root, or stop the other")
        },
    )?;
    Ok(file)
}

/// The worker's id, made once per root.
fn worker_id(root: &Path) -> Result<String> {
    let path = root.join("workerid");
    match std::fs::read_to_string(&path) {
        Ok(id) if !id.trim().is_empty() => Ok(id.trim().to_owned()),
        _ => {
            let id = random_id()?;
            std::fs::write(&path, &id)
                .map_err(|e| Fault::io(format!("write {}", path.display()), e))?;
            Ok(id)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_provenance_tells_is_in_files_that_do_not_say_what_the_daemon_says() {
        let dir = tempfile::tempdir().unwrap();
        let read = || {
            provenance_environment(dir.path())
                .map(|all| serde_json::to_string(&all).unwrap())
                .map_err(|e| e.to_string())
        };
        std::fs::write(dir.path().join("1.json"), r#"{"a":1,"b":1}"#).unwrap();
        std::fs::write(dir.path().join("2.json"), r#"{"b":2}"#).unwrap();
        std::fs::write(dir.path().join("other"), "no JSON").unwrap();
        assert_eq!(read().unwrap(), r#"{"a":1,"b":2}"#);
        std::fs::write(dir.path().join("3.json"), r#"{"platform":"x"}"#).unwrap();
        assert!(read().unwrap_err().contains("platform is set by the daemon itself"));
        std::fs::write(dir.path().join("3.json"), "[]").unwrap();
        assert!(read().unwrap_err().contains("3.json"));
        assert!(provenance_environment(&dir.path().join("none")).unwrap().is_empty());
    }

    #[test]
    fn a_root_in_use_is_not_used_twice() {
        let root = tempfile::tempdir().unwrap();
        let held = lock(root.path(), LOCKS[1]).unwrap();
        assert!(
            lock(root.path(), LOCKS[1])
                .unwrap_err()
                .to_string()
                .contains("another instance running?")
        );
        lock(root.path(), LOCKS[0]).unwrap();
        drop(held);
        lock(root.path(), LOCKS[1]).unwrap();
    }
}
