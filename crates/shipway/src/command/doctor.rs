//! `doctor`: what the build daemon lacks on this host, with what to do about it.
//!
//! What is in files is read below a root directory, which is the host's but in tests.

mod rootless;

use std::{
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    process::ExitCode,
    time::SystemTime,
};

use serde::Deserialize;
use shipway_containerd::Containerd;
use shipway_fault::{Fault, Result};
use shipway_host::doctor::{self, Check, Found, Kernel, Room, clock, failed, newest};

use crate::{Persona, connect::ConnectArgs, output};

/// Oldest containerd that is supported.
const OLDEST: (u32, u32) = (1, 6);
/// Percent of a disk that garbage collection leaves free by default, roughly.
const LEAST_FREE: u64 = 5;
/// Percent beyond that for builds to be of use.
const LITTLE_ROOM: u64 = 10;
/// Where programs are that containerd starts.
const SYSTEM_PATH: [&str; 6] =
    ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"];

/// Look at what this host lacks for building, and say what to do
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// Configuration file of the daemon
    #[arg(long, value_name = "FILE", default_value = "/etc/shipway/shipwayd.toml")]
    config: PathBuf,
    /// Look at what a containerd without root needs, for this user
    #[arg(long)]
    rootless: bool,
}

/// What of the daemon's configuration is looked at.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Config {
    root: Option<PathBuf>,
    grpc: Grpc,
    worker: Workers,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Grpc {
    address: Vec<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Workers {
    containerd: Worker,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Worker {
    address: Option<PathBuf>,
    namespace: Option<String>,
    snapshotter: Option<String>,
    #[serde(rename = "networkMode")]
    network_mode: Option<String>,
    #[serde(rename = "cniConfigPath")]
    cni_config: Option<PathBuf>,
    #[serde(rename = "cniBinaryPath")]
    cni_programs: Option<PathBuf>,
}

impl Config {
    fn load(path: &Path) -> Result<Self> {
        match std::fs::read_to_string(path) {
            Ok(text) => toml::from_str(&text).map_err(|e| {
                Fault::invalid(format!("parse {}: {}", path.display(), e.message()))
                    .hint("shipwayd says at its start which line is wrong")
            }),
            // Everything has a default.
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Self::default()),
            Err(e) => Err(Fault::io(format!("read {}", path.display()), e)),
        }
    }

    fn address(&self) -> PathBuf {
        let address = self.worker.containerd.address.clone();
        address.unwrap_or_else(|| "/run/containerd/containerd.sock".into())
    }

    /// The first socket that the daemon makes, or the one that systemd makes for it.
    fn socket(&self) -> PathBuf {
        let unix = self.grpc.address.iter().find_map(|a| a.strip_prefix("unix://"));
        unix.unwrap_or("/run/shipway/shipwayd.sock").into()
    }

    fn snapshotter(&self) -> &str {
        self.worker.containerd.snapshotter.as_deref().unwrap_or("overlayfs")
    }

    fn namespace(&self) -> &str {
        self.worker.containerd.namespace.as_deref().unwrap_or("default")
    }
}

pub(crate) async fn run(connect: &ConnectArgs, args: Args) -> Result<ExitCode> {
    let host = Host { root: "/".into(), user: User::own() };
    let checks = if args.rootless {
        rootless::checks(&host)
    } else {
        let (config, broken) = match Config::load(&args.config) {
            Ok(config) => (config, None),
            Err(fault) => (Config::default(), Some(fault)),
        };
        let engine = Engine::ask(&config).await;
        let mut checks = host.checks(&config, &engine);
        let read = match broken {
            Some(fault) => Found::Missing(fault),
            None if args.config.exists() => Found::Ok(args.config.display().to_string()),
            None => Found::Ok("defaults".into()),
        };
        checks.insert(0, Check { what: "the configuration", found: read });
        let answer = match connect.connect(Persona::Shipway).await {
            Ok(client) => client.info().await.map(|info| info.buildkit_version.version),
            Err(fault) => Err(fault),
        };
        let answer = answer.map_err(|fault| {
            fault.hint(
                "systemctl enable --now shipwayd.socket; journalctl -u shipwayd says why it ends",
            )
        });
        checks.push(Check { what: "a daemon that answers", found: answer.into() });
        checks
    };
    let (text, well) = doctor::report(&checks);
    output::print(&text)?;
    Ok(if well { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// What containerd says of itself.
struct Engine {
    version: Result<String>,
    namespaces: Vec<String>,
    snapshotters: Vec<String>,
    /// Where its snapshots are.
    snapshots: Option<PathBuf>,
}

impl Engine {
    async fn ask(config: &Config) -> Self {
        let silent = |fault| Self {
            version: Err(fault),
            namespaces: Vec::new(),
            snapshotters: Vec::new(),
            snapshots: None,
        };
        let containerd = match Containerd::connect(config.address()).await {
            Ok(containerd) => containerd,
            Err(fault) => return silent(fault),
        };
        let all = async {
            Ok(Self {
                version: Ok(containerd.version().await?.version),
                namespaces: containerd.namespaces().await?,
                snapshotters: containerd.snapshotters().await?,
                snapshots: containerd.snapshots_at(config.snapshotter()).await?,
            })
        };
        all.await.unwrap_or_else(silent)
    }
}

/// Who asks.
#[derive(Clone, Debug)]
struct User {
    name: String,
    uid: u32,
    /// All groups.
    groups: Vec<u32>,
}

impl User {
    fn own() -> Self {
        let groups = rustix::process::getgroups().unwrap_or_default();
        let own = rustix::process::getegid();
        let uid = rustix::process::geteuid().as_raw();
        let users = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
        let name = users.lines().find_map(|line| {
            let mut fields = line.split(':');
            let name = fields.next()?;
            (fields.nth(1)?.parse() == Ok(uid)).then(|| name.to_owned())
        });
        Self {
            name: name.unwrap_or_else(|| uid.to_string()),
            uid,
            groups: groups.into_iter().chain([own]).map(|g| g.as_raw()).collect(),
        }
    }
}

/// The host as its files show it.
struct Host {
    root: PathBuf,
    user: User,
}

impl Host {
    fn path(&self, path: impl AsRef<Path>) -> PathBuf {
        let path = path.as_ref();
        self.root.join(path.strip_prefix("/").unwrap_or(path))
    }

    fn text(&self, path: &str) -> Option<String> {
        std::fs::read_to_string(self.path(path)).ok()
    }

    fn names(&self, directory: impl AsRef<Path>) -> Vec<String> {
        let entries = std::fs::read_dir(self.path(directory)).into_iter().flatten().flatten();
        let mut names: Vec<String> =
            entries.map(|e| e.file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }

    /// A program where those of the system are.
    fn program(&self, name: &str) -> Option<PathBuf> {
        SYSTEM_PATH.iter().map(|dir| Path::new(dir).join(name)).find(|p| self.path(p).is_file())
    }

    fn checks(&self, config: &Config, engine: &Engine) -> Vec<Check> {
        let mut checks = Vec::new();
        let mut add = |what, found| checks.push(Check { what, found });
        add("containerd", self.containerd(config, engine));
        add("containerd's namespace", namespace(config, engine));
        add("the snapshotter", snapshotter(config, engine));
        add("overlayfs in the kernel", overlayfs(config));
        add("the runtime of steps", self.runtime().into());
        add("cgroups", self.cgroups());
        add("the network of steps", self.network(&config.worker.containerd));
        add("the resolver of steps", self.resolver());
        add("programs of other processors", self.emulators());
        let room = Room {
            least: LEAST_FREE,
            useful: LITTLE_ROOM,
            mend: "shipway prune --all; ctr images prune --all; or limit the cache with maxUsedSpace",
            soon: "garbage collection will take cache that builds could use",
        };
        let snapshots = engine.snapshots.clone().unwrap_or_else(|| "/var/lib/containerd".into());
        add("room for images", room.at(&self.path(snapshots)));
        let state = config.root.clone().unwrap_or_else(|| "/var/lib/shipway".into());
        let made = newest([&*self.path(&state)]);
        add("room for the daemon's state", room.at(&self.path(state)));
        add("the clock", clock(SystemTime::now(), made).into());
        add("the socket", self.socket(&config.socket()));
        checks
    }

    fn containerd(&self, config: &Config, engine: &Engine) -> Found {
        let socket = config.address();
        let version = match &engine.version {
            Ok(version) => version,
            Err(fault) => {
                let fault = fault.clone();
                let there = self.path(&socket).symlink_metadata().is_ok();
                return Found::Missing(match there {
                    false if self.program("containerd").is_none() => {
                        fault.hint("apt install containerd")
                    }
                    false => fault.hint(
                        "systemctl start containerd, or name its socket in worker.containerd.address",
                    ),
                    true if self.user.uid != 0 => fault.hint("only root may use its socket: sudo"),
                    true => fault.hint("systemctl status containerd"),
                });
            }
        };
        match version_of(version) {
            Some(found) if found < OLDEST => Found::Missing(
                failed(format!("{version} is too old"))
                    .hint(format!("{}.{} or newer", OLDEST.0, OLDEST.1)),
            ),
            Some(_) => Found::Ok(format!("{version} at {}", socket.display())),
            None => Found::Note(
                failed(format!("its version {version:?} is not known"))
                    .hint("1.6 or newer is needed"),
            ),
        }
    }

    fn runtime(&self) -> Result<String> {
        let program = |name: &str, package: &str| {
            self.program(name).ok_or_else(|| {
                failed(format!("there is no {name} in {}", SYSTEM_PATH.join(":")))
                    .hint(format!("apt install {package}, or put it on containerd's PATH"))
            })
        };
        let shim = program("containerd-shim-runc-v2", "containerd")?;
        let runc = program("runc", "runc")?;
        Ok(format!("{} by {}", runc.display(), shim.display()))
    }

    fn cgroups(&self) -> Found {
        const WANTED: [&str; 3] = ["cpu", "memory", "pids"];
        if let Some(controllers) = self.text("/sys/fs/cgroup/cgroup.controllers") {
            let has = |name: &&str| controllers.split_whitespace().any(|word| word == *name);
            let missing: Vec<&str> = WANTED.into_iter().filter(|name| !has(name)).collect();
            if missing.is_empty() {
                return Found::Ok("version 2".into());
            }
            let what = format!("version 2 without {}", missing.join(", "));
            return Found::Note(
                failed(what).hint("boot with cgroup_enable=memory, or steps have no such limits"),
            );
        }
        if self.path("/sys/fs/cgroup/memory").is_dir() || self.path("/sys/fs/cgroup/cpu").is_dir() {
            return Found::Ok("version 1".into());
        }
        Found::Missing(
            failed("none are mounted, so that no step can be started")
                .hint("mount -t cgroup2 none /sys/fs/cgroup; in a container, run it privileged"),
        )
    }

    fn network(&self, worker: &Worker) -> Found {
        let mode = worker.network_mode.as_deref().unwrap_or("auto");
        if ["host", "none"].contains(&mode) {
            return Found::Ok(format!("networkMode is {mode:?}"));
        }
        let list = worker.cni_config.clone().unwrap_or_else(|| "/etc/buildkit/cni.json".into());
        let programs = worker.cni_programs.clone().unwrap_or_else(|| "/opt/cni/bin".into());
        let has_list = self.path(&list).is_file();
        if mode == "auto" && !has_list {
            return Found::Note(
                failed(format!("steps are on the host's, since there is no {}", list.display()))
                    .hint(
                        "networkMode = \"bridge\" gives them one of their own, with CNI's plug-ins",
                    ),
            );
        }
        if mode == "cni" && !has_list {
            return Found::Missing(
                failed(format!("there is no {}", list.display()))
                    .hint("write one, name it in cniConfigPath, or use networkMode = \"bridge\""),
            );
        }
        let needed: &[&str] =
            if mode == "bridge" { &["bridge", "host-local", "loopback"] } else { &[] };
        let there = self.names(&programs);
        let missing: Vec<&str> =
            needed.iter().copied().filter(|n| !there.iter().any(|t| t == n)).collect();
        if there.is_empty() || !missing.is_empty() {
            let missing =
                if missing.is_empty() { "plug-ins of CNI".into() } else { missing.join(", ") };
            let fault = failed(format!("there is no {missing} in {}", programs.display()));
            // Debian has them elsewhere.
            return Found::Missing(match self.names("/usr/lib/cni").is_empty() {
                true => fault.hint("apt install containernetworking-plugins"),
                false => fault.hint("cniBinaryPath = \"/usr/lib/cni\""),
            });
        }
        Found::Ok(format!("by CNI, {}", programs.display()))
    }

    fn resolver(&self) -> Found {
        let servers = |path: &str| -> Vec<String> {
            let text = self.text(path).unwrap_or_default();
            let lines = text.lines().filter_map(|line| line.trim().strip_prefix("nameserver"));
            lines.map(|server| server.trim().to_owned()).filter(|s| !s.is_empty()).collect()
        };
        let all = servers("/etc/resolv.conf");
        let far = |server: &String| !server.starts_with("127.") && server != "::1";
        if all.iter().any(far) {
            return Found::Ok(all.join(", "));
        }
        let resolved = servers("/run/systemd/resolve/resolv.conf");
        if resolved.iter().any(far) {
            return Found::Ok(format!("{}, by systemd-resolved", resolved.join(", ")));
        }
        let what = match all.is_empty() {
            true => "/etc/resolv.conf names no server".to_owned(),
            false => format!(
                "{} is this host alone, which steps on a network of their own do not reach",
                all.join(", ")
            ),
        };
        Found::Note(failed(what).hint("name servers in the table [dns] of shipwayd.toml"))
    }

    fn emulators(&self) -> Found {
        const AT: &str = "/proc/sys/fs/binfmt_misc";
        let (mut all, mut unfixed) = (Vec::new(), Vec::new());
        for name in self.names(AT) {
            let Some(processor) = name.strip_prefix("qemu-") else { continue };
            let text = self.text(&format!("{AT}/{name}")).unwrap_or_default();
            if !text.starts_with("enabled") {
                continue;
            }
            let flags = text.lines().find_map(|line| line.strip_prefix("flags:")).unwrap_or("");
            if !flags.contains('F') {
                unfixed.push(processor.to_owned());
            }
            all.push(processor.to_owned());
        }
        if !unfixed.is_empty() {
            return Found::Note(
                failed(format!("{} are registered without the flag F, and not found in images", unfixed.join(", ")))
                    .hint("apt install --reinstall qemu-user-static binfmt-support, or register with flags: F"),
            );
        }
        match all.is_empty() {
            true => Found::Note(
                failed("none can be run, unless an emulator buildkit-qemu-… is on shipwayd's PATH")
                    .hint("apt install qemu-user-static binfmt-support, to build for them"),
            ),
            false => Found::Ok(all.join(", ")),
        }
    }

    /// Whether this user may connect.
    fn socket(&self, socket: &Path) -> Found {
        let Ok(meta) = self.path(socket).metadata() else {
            return Found::Missing(
                failed(format!("there is no {}", socket.display()))
                    .hint("systemctl enable --now shipwayd.socket"),
            );
        };
        let group = self.group(meta.gid());
        let (mode, user) = (meta.mode(), &self.user);
        let allowed = user.uid == 0
            || (user.uid == meta.uid() && mode & 0o200 != 0)
            || (user.groups.contains(&meta.gid()) && mode & 0o020 != 0)
            || mode & 0o002 != 0;
        if mode & 0o002 != 0 {
            return Found::Note(
                failed(format!("everybody may use {}, and be root by it", socket.display()))
                    .hint("SocketMode=0660 and a SocketGroup= in shipwayd.socket"),
            );
        }
        if allowed {
            return Found::Ok(format!("root and the group {group} may use {}", socket.display()));
        }
        let fault = failed(format!(
            "{} may not use {}, which is for root and the group {group}",
            user.name,
            socket.display()
        ));
        Found::Missing(match meta.gid() {
            0 => fault
                .hint("a SocketGroup= in shipwayd.socket, or --group of shipwayd, lets others in"),
            _ => fault.hint(format!("sudo usermod -aG {group} {}, and log in again", user.name)),
        })
    }

    fn group(&self, gid: u32) -> String {
        let text = self.text("/etc/group").unwrap_or_default();
        let name = text.lines().find_map(|line| {
            let mut fields = line.split(':');
            let name = fields.next()?;
            (fields.nth(1)?.parse() == Ok(gid)).then(|| name.to_owned())
        });
        name.unwrap_or_else(|| gid.to_string())
    }
}

fn namespace(config: &Config, engine: &Engine) -> Found {
    let name = config.namespace();
    let there = &engine.namespaces;
    if engine.version.is_ok() && !there.iter().any(|n| n == name) && !there.is_empty() {
        return Found::Note(
            failed(format!("{name:?} is new; there are {}", there.join(", "))).hint(
                "worker.containerd.namespace: \"k8s.io\" for Kubernetes, \"moby\" for dockerd",
            ),
        );
    }
    Found::Ok(format!("{name:?}"))
}

fn snapshotter(config: &Config, engine: &Engine) -> Found {
    let name = config.snapshotter();
    if engine.version.is_err() {
        return Found::Note(
            failed(format!("{name:?}, of which nothing is known")).hint("see containerd above"),
        );
    }
    if engine.snapshotters.iter().any(|s| s == name) {
        return Found::Ok(format!("{name:?}"));
    }
    let fault = failed(format!("containerd has no {name:?} that works"));
    Found::Missing(match name {
        "shipway" => fault.hint("shipway-snapshotter setup, then systemctl restart containerd"),
        _ => fault
            .hint(format!("ctr plugins ls; those that work: {}", engine.snapshotters.join(", "))),
    })
}

fn overlayfs(config: &Config) -> Found {
    match Kernel::read().file_system("overlay") {
        Ok(()) => Found::Ok(String::new()),
        Err(fault) if ["overlayfs", "shipway"].contains(&config.snapshotter()) => {
            Found::Missing(fault)
        }
        Err(fault) => Found::Note(fault),
    }
}

/// Major and minor number, as in `v2.1.9` and `1.6.20~ds1`.
fn version_of(text: &str) -> Option<(u32, u32)> {
    let mut numbers = text.trim_start_matches('v').split('.');
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests;
