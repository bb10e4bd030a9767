//! [`Lab`]: the private containerd, registry and daemon together.

mod clean;
mod config;

pub use clean::Leftovers;

use crate::{Finished, Process, built, free_port, image, lab_dir, process::run, wait_for, which};
use std::{
    ffi::OsStr,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

/// Which containerd.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flavour {
    /// The distribution's, on PATH (1.6 on Debian 12).
    System,
    /// The one of Debian's next suite, unpacked below `target/lab/next` (1.7).
    Between,
    /// The newer one unpacked below `target/lab/root` (2.1).
    Newer,
}

impl Flavour {
    /// Those that are here. A test that finds fewer than two says so.
    pub fn present() -> Vec<Self> {
        Self::all().into_iter().filter(|f| *f != Self::Between).collect()
    }

    /// All that are here, for what depends on each version's way of talking to its plug-ins.
    pub fn all() -> Vec<Self> {
        let all = [Self::System, Self::Between, Self::Newer];
        all.into_iter().filter(|f| f.containerd().is_some()).collect()
    }

    /// Its bin directory, if it is not on PATH anyway.
    fn bin(self) -> Option<PathBuf> {
        match self {
            Self::System => None,
            Self::Between => Some(lab_dir().join("next/usr/bin")),
            Self::Newer => Some(lab_dir().join("root/usr/bin")),
        }
    }

    fn containerd(self) -> Option<PathBuf> {
        match self.bin() {
            Some(bin) => Some(bin.join("containerd")).filter(|p| p.exists()),
            None => std::env::split_paths(&std::env::var_os("PATH")?)
                .map(|d| d.join("containerd"))
                .find(|p| p.exists()),
        }
    }

    /// PATH for it: its own shim has to come first.
    fn path(self) -> std::ffi::OsString {
        let path = std::env::var_os("PATH").unwrap_or_default();
        std::env::join_paths(self.bin().into_iter().chain(std::env::split_paths(&path))).unwrap()
    }

    /// Its version, as it prints it.
    pub fn version(self) -> String {
        let Some(program) = self.containerd() else { return "absent".into() };
        run(Command::new(program).arg("--version"))
            .stdout
            .split_whitespace()
            .nth(2)
            .unwrap_or("unknown")
            .to_owned()
    }
}

/// What a lab should have.
#[derive(Clone, Debug)]
pub struct LabOptions {
    /// Which containerd.
    pub flavour: Flavour,
    /// Namespace the daemon works in.
    pub namespace: String,
    /// Lines for the daemon's TOML.
    pub daemon_config: String,
    /// Lines for its table `worker.containerd`.
    pub worker_config: String,
    /// Flags of the daemon.
    pub daemon_flags: Vec<String>,
    /// Variables of the daemon's environment.
    pub daemon_environment: Vec<(String, String)>,
    /// Whether containerd has `shipway-snapshotter` as its plug-in.
    pub snapshotter: bool,
    /// What containerd calls it.
    pub snapshotter_name: String,
    /// Lines for the snapshotter's TOML, outside of its tables.
    pub snapshotter_config: String,
    /// Lines for the table `lazy` of the snapshotter's TOML.
    pub lazy_config: String,
    /// Image of CRI's sandboxes; containerd has no CRI without.
    pub sandbox: Option<String>,
    /// Directory to work in and to keep; a temporary one otherwise.
    pub keep_in: Option<PathBuf>,
    /// The disk that containerd has for itself; the machine's otherwise.
    pub disk: Option<LabDisk>,
    /// What the daemon takes for the name of the machine's present life; the machine's own
    /// otherwise.
    pub boot: Option<String>,
}

/// A disk of containerd's own.
#[derive(Clone, Copy, Debug)]
pub enum LabDisk {
    /// So many bytes of memory.
    Memory(u64),
    /// A file of so many bytes with the file system that machines have, ext4.
    Ext4(u64),
}

impl LabOptions {
    /// A temporary lab on `flavour`.
    pub fn new(flavour: Flavour) -> Self {
        Self {
            flavour,
            namespace: "default".into(),
            daemon_config: String::new(),
            worker_config: String::new(),
            daemon_flags: Vec::new(),
            daemon_environment: Vec::new(),
            snapshotter: false,
            snapshotter_name: "shipway".into(),
            snapshotter_config: String::new(),
            lazy_config: String::new(),
            sandbox: None,
            keep_in: None,
            disk: None,
            boot: None,
        }
    }
}

/// A private containerd, and on demand a registry and a `shipwayd`, in one directory.
pub struct Lab {
    options: LabOptions,
    /// Order matters: fields drop in this order.
    daemon: Option<Process>,
    containerd: Option<Process>,
    snapshotter: Option<Process>,
    registry: Option<(u16, Process)>,
    dir: PathBuf,
    _temporary: Option<tempfile::TempDir>,
}

impl Lab {
    /// Starts containerd.
    pub fn start(options: LabOptions) -> Self {
        clean::sweep();
        let temporary = options.keep_in.is_none().then(|| {
            // Not below target/: paths of unix sockets must stay short. Not in /tmp: that may be
            // memory.
            tempfile::Builder::new().prefix(clean::PREFIX).tempdir_in("/var/tmp").unwrap()
        });
        let dir = match (&temporary, &options.keep_in) {
            (Some(temporary), _) => temporary.path().to_path_buf(),
            (None, Some(dir)) => dir.clone(),
            (None, None) => unreachable!("one of the two was chosen above"),
        };
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(dir.join("owner"), std::process::id().to_string()).unwrap();
        let mut lab = Self {
            options,
            daemon: None,
            containerd: None,
            snapshotter: None,
            registry: None,
            dir,
            _temporary: temporary,
        };
        lab.mount_disk();
        if lab.options.snapshotter {
            lab.start_snapshotter();
        }
        lab.start_containerd();
        lab
    }

    fn mount_disk(&self) {
        let Some(disk) = self.options.disk else { return };
        let root = self.dir.join("containerd-root");
        std::fs::create_dir_all(&root).unwrap();
        let mut mount = Command::new("mount");
        match disk {
            LabDisk::Memory(size) => {
                let size = format!("size={size},mode=0711");
                mount.args(["-t", "tmpfs", "-o", &size, "shipway-lab"]);
            }
            LabDisk::Ext4(size) => {
                let file = self.dir.join("disk");
                std::fs::File::create(&file).unwrap().set_len(size).unwrap();
                run(Command::new("mkfs.ext4").args(["-q", "-m", "0"]).arg(&file)).ok();
                mount.args(["-o", "loop"]).arg(&file);
            }
        }
        run(mount.arg(&root)).ok();
    }

    /// More lines for the daemon's TOML, for when it is started next.
    pub fn configure_daemon(&mut self, toml: &str) {
        self.options.daemon_config.push_str(toml);
    }

    /// More lines for the table `worker.containerd`, for when the daemon is started next.
    pub fn configure_worker(&mut self, toml: &str) {
        self.options.worker_config.push_str(toml);
    }

    /// A flag of the daemon, for when it is started next.
    pub fn daemon_flag(&mut self, flag: &str) {
        self.options.daemon_flags.push(flag.into());
    }

    /// A variable of the daemon's environment, for when it is started next.
    pub fn daemon_environment(&mut self, name: &str, value: &str) {
        self.options.daemon_environment.push((name.into(), value.into()));
    }

    /// A temporary lab with containerd only.
    pub fn on(flavour: Flavour) -> Self {
        Self::start(LabOptions::new(flavour))
    }

    /// A temporary lab with containerd, a registry that has `library/busybox:latest`, and the
    /// daemon.
    pub fn complete(flavour: Flavour) -> Self {
        let mut lab = Self::on(flavour);
        lab.start_registry();
        crate::BaseImage::busybox().push(&lab.registry(), "library/busybox", "latest");
        lab.start_daemon();
        lab
    }

    /// Its directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The containerd it runs on.
    pub fn flavour(&self) -> Flavour {
        self.options.flavour
    }

    /// Namespace of the daemon.
    pub fn namespace(&self) -> &str {
        &self.options.namespace
    }

    /// Socket of containerd.
    pub fn containerd_socket(&self) -> PathBuf {
        self.dir.join("containerd.sock")
    }

    /// Socket of `shipwayd`.
    pub fn daemon_socket(&self) -> PathBuf {
        self.dir.join("shipwayd.sock")
    }

    /// The address clients are given.
    pub fn daemon_address(&self) -> String {
        format!("unix://{}", self.daemon_socket().display())
    }

    /// `address:port` of the registry.
    pub fn registry(&self) -> String {
        let (port, _) =
            self.registry.as_ref().expect("the lab has no registry: call start_registry");
        format!("127.0.0.1:{port}")
    }

    /// Starts containerd, or starts it again after [`Lab::kill_containerd`].
    pub fn start_containerd(&mut self) {
        let flavour = self.options.flavour;
        let program = flavour.containerd().unwrap_or_else(|| {
            panic!("{flavour:?} containerd is absent; `cargo xtask test` installs it")
        });
        let config = self.dir.join("containerd.toml");
        std::fs::write(
            &config,
            config::containerd(&self.dir, flavour, self.options.sandbox.as_deref()),
        )
        .unwrap();
        if self.options.snapshotter {
            let arguments = [
                "setup".as_ref(),
                "--containerd".as_ref(),
                program.as_os_str(),
                "--containerd-config".as_ref(),
                config.as_os_str(),
                "--name".as_ref(),
                self.options.snapshotter_name.as_ref(),
            ];
            run(self.snapshotter_command().args(arguments)).ok();
        }
        let mut command = Command::new(program);
        command.arg("--config").arg(&config).env("PATH", flavour.path());
        let mut process =
            Process::start("containerd", &mut command, &self.dir.join("containerd.log"));
        wait_for("containerd to answer", Duration::from_secs(60), || {
            process.alive().unwrap_or_else(|e| panic!("{e}"));
            let answer = self.ctr_command().arg("version").output().map_err(|e| e.to_string())?;
            if answer.status.success() {
                Ok(())
            } else {
                Err(String::from_utf8_lossy(&answer.stderr).into_owned())
            }
        });
        self.containerd = Some(process);
    }

    /// `kill -9` of containerd.
    pub fn kill_containerd(&mut self) {
        if let Some(mut process) = self.containerd.take() {
            process.kill();
        }
    }

    /// Our snapshotter with the lab's configuration, to be given a command.
    pub fn snapshotter_command(&self) -> Command {
        let mut command = Command::new(built("shipway-snapshotter"));
        command.arg("--config").arg(self.dir.join("shipway-snapshotter.toml"));
        command
    }

    /// Starts the snapshotter, or starts it again after [`Lab::kill_snapshotter`].
    pub fn start_snapshotter(&mut self) {
        std::fs::write(
            self.dir.join("shipway-snapshotter.toml"),
            config::snapshotter(
                &self.dir,
                &self.options.snapshotter_config,
                &self.options.lazy_config,
            ),
        )
        .unwrap();
        let mut command = self.snapshotter_command();
        let mut process = Process::start(
            "shipway-snapshotter",
            &mut command,
            &self.dir.join("shipway-snapshotter.log"),
        );
        wait_for("the snapshotter to answer", Duration::from_secs(30), || {
            process.alive().unwrap_or_else(|e| panic!("{e}"));
            let answer = run(self.snapshotter_command().arg("status"));
            if answer.code == Some(0) { Ok(()) } else { Err(answer.all()) }
        });
        self.snapshotter = Some(process);
    }

    /// The snapshotter's process.
    pub fn snapshotter(&mut self) -> &mut Process {
        self.snapshotter.as_mut().expect("the lab runs no snapshotter: set its option")
    }

    /// `kill -9` of the snapshotter.
    pub fn kill_snapshotter(&mut self) {
        if let Some(mut process) = self.snapshotter.take() {
            process.kill();
        }
    }

    /// Asks the snapshotter to end; whether asking was enough.
    pub fn stop_snapshotter(&mut self) -> bool {
        self.snapshotter.take().is_none_or(|mut process| process.stop(Duration::from_secs(20)))
    }

    /// Starts the registry.
    pub fn start_registry(&mut self) {
        let port = free_port();
        let config = self.dir.join("registry.yml");
        std::fs::write(&config, config::registry(&self.dir, port)).unwrap();
        let program = which("docker-registry")
            .expect("docker-registry is absent; `cargo xtask test` fetches it");
        let mut command = Command::new(program);
        command.arg("serve").arg(&config);
        let mut process =
            Process::start("docker-registry", &mut command, &self.dir.join("registry.log"));
        wait_for("the registry to answer", Duration::from_secs(30), || {
            process.alive().unwrap_or_else(|e| panic!("{e}"));
            match image::get(&format!("127.0.0.1:{port}"), "/v2/") {
                (200, _) => Ok(()),
                (status, _) => Err(format!("status {status}")),
            }
        });
        self.registry = Some((port, process));
    }

    /// Ends the registry; what was pushed to it is there when one is started again, on another
    /// port.
    pub fn kill_registry(&mut self) {
        if let Some((_, mut process)) = self.registry.take() {
            process.kill();
        }
    }

    /// A manifest or blob as the registry gives it: status and body.
    pub fn registry_get(&self, path: &str) -> (u16, Vec<u8>) {
        image::get(&self.registry(), path)
    }

    /// Puts a blob into the repository `name` of the registry; gives its digest.
    pub fn registry_put_blob(&self, name: &str, bytes: &[u8]) -> String {
        image::put_blob(&self.registry(), name, bytes)
    }

    /// Puts a manifest into the repository `name` of the registry, by a tag or its digest.
    pub fn registry_put_manifest(&self, name: &str, reference: &str, kind: &str, bytes: &[u8]) {
        image::put_manifest(&self.registry(), name, reference, kind, bytes);
    }

    /// Starts `shipwayd`, or starts it again after [`Lab::kill_daemon`].
    pub fn start_daemon(&mut self) {
        let config = self.dir.join("shipwayd.toml");
        let registry = self.registry.as_ref().map(|_| self.registry());
        let toml = config::shipwayd(
            &self.dir,
            &self.options.namespace,
            registry.as_deref(),
            &self.options.worker_config,
            &self.options.daemon_config,
        );
        std::fs::write(&config, toml).unwrap();
        let mut command = match &self.options.boot {
            None => Command::new(built("shipwayd")),
            Some(boot) => {
                let file = self.dir.join("boot");
                std::fs::write(&file, format!("{boot}\n")).unwrap();
                let mut command = Command::new("unshare");
                command.args(["--mount", "--propagation", "slave", "sh", "-c"]);
                command
                    .arg("mount --bind \"$0\" /proc/sys/kernel/random/boot_id && exec \"$@\"")
                    .arg(file)
                    .arg(built("shipwayd"));
                command
            }
        };
        command
            .arg("--config")
            .arg(&config)
            .args(&self.options.daemon_flags)
            .env("PATH", self.options.flavour.path());
        command.envs(self.options.daemon_environment.iter().map(|(name, value)| (name, value)));
        let mut process = Process::start("shipwayd", &mut command, &self.dir.join("shipwayd.log"));
        let address = self.daemon_address();
        wait_for("shipwayd to answer", Duration::from_secs(30), || {
            process.alive().unwrap_or_else(|e| panic!("{e}"));
            let answer = run(Command::new(built("shipway")).args(["--addr", &address, "workers"]));
            if answer.code == Some(0) { Ok(()) } else { Err(answer.all()) }
        });
        self.daemon = Some(process);
    }

    /// The daemon's process.
    pub fn daemon(&mut self) -> &mut Process {
        self.daemon.as_mut().expect("the lab runs no shipwayd: call start_daemon")
    }

    /// `kill -9` of the daemon.
    pub fn kill_daemon(&mut self) {
        if let Some(mut process) = self.daemon.take() {
            process.kill();
        }
    }

    /// Asks the daemon to end; whether asking was enough.
    pub fn stop_daemon(&mut self) -> bool {
        self.daemon.take().is_none_or(|mut process| process.stop(Duration::from_secs(20)))
    }

    /// The `ctr` that belongs to the containerd.
    pub fn ctr_path(&self) -> PathBuf {
        self.options.flavour.bin().map_or_else(|| PathBuf::from("ctr"), |bin| bin.join("ctr"))
    }

    /// The containerd's program.
    pub fn containerd_path(&self) -> PathBuf {
        self.options.flavour.containerd().expect("it was started from there")
    }

    /// PATH on which the containerd's own programs come first.
    pub fn path(&self) -> std::ffi::OsString {
        self.options.flavour.path()
    }

    /// Leaves everything running when this program ends; [`Lab::clear`] ends it later.
    pub fn leave_running(self) {
        std::mem::forget(self);
    }

    /// Ends what runs in a lab's directory, unmounts what is mounted there, and removes it.
    pub fn clear(dir: &Path) {
        clean::abandoned(dir);
    }

    fn ctr_command(&self) -> Command {
        let mut command = Command::new(self.ctr_path());
        command
            .env("PATH", self.options.flavour.path())
            .arg("--address")
            .arg(self.containerd_socket());
        command
    }

    /// `ctr` in `namespace`, to be started by the caller.
    pub fn ctr_command_in(&self, namespace: &str) -> Command {
        let mut command = self.ctr_command();
        command.args(["--namespace", namespace]);
        command
    }

    /// Runs `ctr` in the daemon's namespace.
    #[track_caller]
    pub fn ctr<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Finished {
        self.ctr_in(&self.options.namespace, arguments)
    }

    /// Runs `ctr` in `namespace`.
    #[track_caller]
    pub fn ctr_in<S: AsRef<OsStr>>(
        &self,
        namespace: &str,
        arguments: impl IntoIterator<Item = S>,
    ) -> Finished {
        run(self.ctr_command().args(["--namespace", namespace]).args(arguments))
    }

    /// Runs our client.
    #[track_caller]
    pub fn shipway<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Finished {
        run(Command::new(built("shipway")).args(["--addr", &self.daemon_address()]).args(arguments))
    }

    /// Our client, to be changed or started by the caller.
    pub fn shipway_command(&self) -> Command {
        let mut command = Command::new(built("shipway"));
        command.args(["--addr", &self.daemon_address()]);
        command
    }

    /// `docker-buildx` with a configuration of its own that knows the daemon as builder `shipway`;
    /// `None` if it is absent.
    pub fn buildx(&self) -> Option<Command> {
        let home = self.dir.join("buildx");
        let program = which("docker-buildx")?;
        let command = || {
            let mut command = Command::new(&program);
            command.env("BUILDX_CONFIG", &home).env("DOCKER_CONFIG", &home).env("HOME", &self.dir);
            command
        };
        if !home.exists() {
            std::fs::create_dir_all(&home).unwrap();
            run(command().args([
                "create",
                "--name",
                "shipway",
                "--driver",
                "remote",
                &self.daemon_address(),
            ]))
            .ok();
        }
        let mut command = command();
        command.env("BUILDX_BUILDER", "shipway");
        Some(command)
    }

    /// Writes files into a new directory `name` of the lab and returns it. Pairs of relative path
    /// and text.
    pub fn context(&self, name: &str, files: &[(&str, &str)]) -> PathBuf {
        let dir = self.dir.join("contexts").join(name);
        for (path, text) in files {
            let path = dir.join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        dir
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.dump();
        }
        if let Some(mut daemon) = self.daemon.take() {
            daemon.stop(Duration::from_secs(10));
        }
        clean::tasks(self);
        self.kill_containerd();
        self.kill_snapshotter();
        self.registry = None;
        clean::directory(&self.dir);
        if self.options.keep_in.is_some() {
            let _ = std::fs::remove_dir_all(&self.dir);
        }
    }
}
