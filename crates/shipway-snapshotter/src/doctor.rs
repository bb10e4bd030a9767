//! What is missing on this host: one line for each thing that is looked at, with what to do.
//!
//! Three outcomes: `ok`; `note`, where something works less well than it could; `missing`, where
//! the snapshotter does not do its work. fscache is not looked at, for nothing here uses it.

use crate::{
    config::Config,
    disk::Disk,
    setup::Target,
    status::{self, Status},
};
use shipway_dockerconfig::DockerConfig;
use shipway_fault::{Code, Context as _, Fault, Result};
use shipway_layermount::{FuseFiles, ProbeLayer, Tier};
use std::{
    fs,
    os::unix::fs::FileTypeExt as _,
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, SystemTime},
};

/// Fewer free inodes than this are told.
const FEW_INODES: u64 = 10_000;
/// Least percent of the file system that images need to be of use.
const LITTLE_ROOM: u64 = 10;
/// How far ahead of the clock a file of ours may be dated, for a disk of another machine.
const AHEAD: Duration = Duration::from_secs(300);

/// How something was found.
#[derive(Debug)]
enum Found {
    /// As it should be; what was found, if that is of interest.
    Ok(String),
    /// It works, but less well than it could.
    Note(Fault),
    /// It does not work.
    Missing(Fault),
}

impl From<Result<String>> for Found {
    fn from(result: Result<String>) -> Self {
        result.map_or_else(Self::Missing, Self::Ok)
    }
}

/// One thing that is looked at.
struct Check {
    what: &'static str,
    found: Found,
}

/// Looks at everything, and says so; succeeds if nothing is missing.
pub fn run(config: &Config, target: &Target) -> ExitCode {
    let mut well = true;
    for Check { what, found } in checks(config, target) {
        let (word, said, fault) = match found {
            Found::Ok(said) => ("ok", said, None),
            Found::Note(fault) => ("note", fault.to_string(), Some(fault)),
            Found::Missing(fault) => {
                well = false;
                ("missing", fault.to_string(), Some(fault))
            }
        };
        let colon = if said.is_empty() { "" } else { ": " };
        println!("{word:<8} {what}{colon}{said}");
        for hint in fault.iter().flat_map(Fault::hints) {
            println!("         hint: {hint}");
        }
    }
    if well { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn failed(what: impl Into<String>) -> Fault {
    Fault::new(Code::FailedPrecondition, what.into())
}

fn checks(config: &Config, target: &Target) -> Vec<Check> {
    let running = status::ask_now(config);
    let status = running.as_ref().ok();
    let mut checks = Vec::new();
    let mut add = |what, found| checks.push(Check { what, found });
    let kernel = Kernel::read();
    add("overlayfs in the kernel", kernel.file_system("overlay").map(|()| String::new()).into());
    if config.lazy.enabled {
        add("FUSE in the kernel", fuse(&kernel, Path::new("/dev/fuse")).into());
        add("EROFS in the kernel", kernel.file_system("erofs").map(|()| String::new()).into());
        add("layers without unpacking", tier(config, status));
        add("the keeper", keeper(config, status));
    }
    add("containerd of a known version", target.version().map(|v| v.to_string()).into());
    let set_up = target.is_set_up(config).and_then(|done| match done {
        true => Ok(String::new()),
        false => Err(failed("it does not know the snapshotter")
            .hint("shipway-snapshotter setup, then systemctl restart containerd")),
    });
    add("containerd's configuration", set_up.into());
    let version = running.as_ref().map(|status| status.version.clone());
    add("a snapshotter that runs", version.map_err(Fault::clone).into());
    add("room on the disk", room(config));
    add("the clock", clock(SystemTime::now(), made(config)).into());
    add("credentials", credentials(config, status));
    checks
}

/// What the kernel has, and what it could load.
struct Kernel {
    /// `/proc/filesystems`.
    file_systems: String,
    /// Lists of modules: one path each, possibly with more on the line.
    modules: String,
}

impl Kernel {
    fn read() -> Self {
        let release = rustix::system::uname().release().to_string_lossy().into_owned();
        let modules = Path::new("/lib/modules").join(release);
        let text = |path: &Path| fs::read_to_string(path).unwrap_or_default();
        Self {
            file_systems: text(Path::new("/proc/filesystems")),
            modules: ["modules.builtin", "modules.dep"]
                .map(|list| text(&modules.join(list)))
                .concat(),
        }
    }

    /// Whether a file system is there, or comes when it is mounted.
    fn file_system(&self, name: &str) -> Result<()> {
        if self.file_systems.split_whitespace().any(|word| word == name) {
            return Ok(());
        }
        let is_it = |line: &str| {
            let path = line.split(':').next().unwrap_or_default();
            let file = path.rsplit('/').next().unwrap_or_default();
            file.split('.').next() == Some(name)
        };
        match self.modules.lines().any(is_it) {
            true => Err(failed("its module is not loaded").hint(format!(
                "modprobe {name}, and a line {name} in /etc/modules-load.d/shipway.conf"
            ))),
            false => Err(failed("this kernel has none").hint(format!(
                "a kernel with CONFIG_{}_FS, or its package of further modules",
                name.to_uppercase()
            ))),
        }
    }
}

fn fuse(kernel: &Kernel, device: &Path) -> Result<String> {
    kernel.file_system("fuse")?;
    let open = fs::File::options().read(true).write(true).open(device);
    let what = || format!("open {}", device.display());
    open.map(|_| String::new()).map_err(|e| {
        Fault::io(what(), e).hint("run as root; in a container, pass the device /dev/fuse in")
    })
}

/// How the kernel reads layers that are not unpacked: as the snapshotter that runs has found, or as
/// far as it can be tried without one.
fn tier(config: &Config, status: Option<&Status>) -> Found {
    let report = status.and_then(|status| status.lazy.as_ref());
    let (name, passed_over) = match report {
        Some(report) => (report.tier.clone(), report.passed_over.clone()),
        None => {
            return match tried() {
                Ok(()) => Found::Ok("the kernel mounts EROFS from files".into()),
                Err(why) => Found::Note(why),
            };
        }
    };
    let reasons: Vec<String> =
        passed_over.iter().map(|(tier, why)| format!("not {tier}: {why}")).collect();
    let reasons = reasons.join("; ");
    let forced = config.lazy.tier != "auto";
    if name == Tier::NotLazy.name() && !forced {
        return Found::Missing(
            failed(format!("every layer is unpacked ({reasons})"))
                .hint("see FUSE, EROFS and the keeper above"),
        );
    }
    if name == Tier::File.name() || forced {
        return Found::Ok(format!("by way of {name}"));
    }
    let note = failed(format!("by way of {name} ({reasons})"));
    Found::Note(match name.as_str() {
        "flat-file" => note.hint("put `root` on ext4 or xfs for metadata without the keeper"),
        _ => note.hint("Linux 6.12 with CONFIG_EROFS_FS_BACKED_BY_FILE needs no loop devices"),
    })
}

/// Mounts a small layer from files, in a mount namespace of its own.
fn tried() -> Result<()> {
    let directory = std::env::temp_dir().join(format!("shipway-doctor-{}", std::process::id()));
    let attempt = || {
        fs::create_dir(&directory).map_err(|e| Fault::io("make a directory to try in", e))?;
        let layer = ProbeLayer::write(&directory)?;
        // What the keeper would serve is in a file; the other forms are not there, nor needed.
        let files = FuseFiles {
            data: layer.data.clone(),
            img: directory.join("img"),
            tree: directory.join("tree"),
        };
        shipway_layermount::probe(&layer, Some(&files), Some(Tier::File)).map(drop)
    };
    let tried = attempt();
    let _ = fs::remove_dir_all(&directory);
    tried.context(|| "mount EROFS from files").map_err(|fault| {
        fault.hint("Linux 6.12 with CONFIG_EROFS_FS_BACKED_BY_FILE; older ones use loop devices")
    })
}

fn keeper(config: &Config, status: Option<&Status>) -> Found {
    let socket = &config.lazy.keeper_address;
    if status.and_then(|status| status.lazy.as_ref()).is_some_and(|report| report.keeper) {
        return Found::Ok(String::new());
    }
    let is_socket = fs::symlink_metadata(socket).is_ok_and(|m| m.file_type().is_socket());
    if status.is_none() && (is_socket || config.lazy.start_keeper) {
        return Found::Ok("as soon as the snapshotter runs".into());
    }
    let fault = match is_socket {
        true => failed(format!("{} does not answer", socket.display())),
        false => failed(format!("there is no {}", socket.display())),
    };
    Found::Missing(fault.hint("systemctl enable --now shipway-snapshotter-keeper.socket"))
}

/// Room where the layers are, or will be.
fn room(config: &Config) -> Found {
    let there = config.root.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    match Disk::of(there) {
        Ok(disk) => enough(there, disk, u64::from(config.lazy.min_free_percent)),
        Err(fault) => Found::Missing(fault),
    }
}

/// Whether there is enough of a file system of which `least` percent stay free.
fn enough(at: &Path, disk: Disk, least: u64) -> Found {
    let Disk { usable, free, inodes, free_inodes } = disk;
    let said = format!("{} MiB free of {} MiB at {}", free >> 20, usable >> 20, at.display());
    if inodes > 0 && free_inodes < FEW_INODES {
        let few = failed(format!("{free_inodes} inodes are free at {}", at.display()));
        return Found::Missing(few.hint("remove images, or move `root` to another file system"));
    }
    if disk.free_percent() <= least {
        return Found::Missing(failed(said).hint(format!(
            "lazy layers leave {least} % free (`lazy.min_free_percent`): remove images, or move `root`"
        )));
    }
    if disk.free_percent() <= least + LITTLE_ROOM {
        return Found::Note(failed(said).hint("images will soon need room that is not there"));
    }
    Found::Ok(said)
}

/// When the newest thing here was made, as far as is known.
fn made(config: &Config) -> Option<(PathBuf, SystemTime)> {
    let program = std::env::current_exe().ok();
    let dated = program.into_iter().chain([config.root.clone()]).filter_map(|path| {
        let time = path.metadata().ok()?.modified().ok()?;
        Some((path, time))
    });
    dated.max_by_key(|(_, time)| *time)
}

/// A clock that is behind makes certificates and tokens of registries invalid.
fn clock(now: SystemTime, made: Option<(PathBuf, SystemTime)>) -> Result<String> {
    match made {
        Some((path, time)) if time > now + AHEAD => Err(failed(format!(
            "it is before {} was made, so registries' certificates and tokens will be refused",
            path.display()
        ))
        .hint("timedatectl set-ntp true")),
        _ => Ok(String::new()),
    }
}

fn credentials(config: &Config, status: Option<&Status>) -> Found {
    let path = &config.registry.docker_config;
    if let Err(fault) = DockerConfig::load(path) {
        return Found::Missing(fault.hint("log in again, or set `registry.docker_config`"));
    }
    let given = status.map_or(0, |status| status.credentials.len());
    let file = if path.exists() { "" } else { ", which is not there" };
    Found::Ok(format!("{given} repositories', and {}{file}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(found: &Found) -> (&'static str, String) {
        match found {
            Found::Ok(said) => ("ok", said.clone()),
            Found::Note(fault) => ("note", fault.to_string()),
            Found::Missing(fault) => ("missing", fault.to_string()),
        }
    }

    #[test]
    fn a_kernel_has_a_file_system_or_could_load_it_or_cannot() {
        let kernel = Kernel {
            file_systems: "nodev\tsysfs\n\text4\nnodev\toverlay\n".into(),
            modules: "kernel/fs/erofs/erofs.ko.xz: kernel/lib/lz4.ko\nkernel/fs/fuse/fuse.ko\nkernel/fs/fuse/cuse.ko:\n".into(),
        };
        kernel.file_system("overlay").unwrap();
        for (name, says, hint) in [
            ("erofs", "not loaded", "modprobe erofs"),
            ("fuse", "not loaded", "modprobe fuse"),
            ("virtiofs", "has none", "CONFIG_VIRTIOFS_FS"),
            // A name within another one is none.
            ("use", "has none", "CONFIG_USE_FS"),
        ] {
            let fault = kernel.file_system(name).unwrap_err();
            assert!(fault.to_string().contains(says), "{fault}");
            assert!(fault.hints().any(|h| h.contains(hint)), "{fault:?}");
        }
        let all = Kernel { file_systems: "nodev\tfuse\n".into(), modules: String::new() };
        fuse(&all, Path::new("/dev/null")).unwrap();
        let fault = fuse(&all, Path::new("/nonexistent/fuse")).unwrap_err();
        assert!(fault.hints().any(|h| h.contains("/dev/fuse")), "{fault:?}");
    }

    #[test]
    fn room_is_enough_or_short() {
        const GIB: u64 = 1 << 30;
        let at = Path::new("/x");
        for ([usable, free], [inodes, free_inodes], word) in [
            ([100 * GIB, 50 * GIB], [0, 0], "ok"),
            ([100 * GIB, 50 * GIB], [1 << 20, 1 << 19], "ok"),
            ([100 * GIB, 50 * GIB], [1 << 20, 100], "missing"),
            ([100 * GIB, 14 * GIB], [0, 0], "note"),
            ([100 * GIB, 5 * GIB], [0, 0], "missing"),
            ([0, 0], [0, 0], "ok"),
        ] {
            let disk = Disk { usable, free, inodes, free_inodes };
            let found = enough(at, disk, 5);
            assert_eq!(said(&found).0, word, "{disk:?} {found:?}");
        }
    }

    #[test]
    fn a_clock_behind_what_is_here_is_told() {
        let now = SystemTime::now();
        let made = |ahead: u64| Some((PathBuf::from("/x"), now + Duration::from_secs(ahead)));
        clock(now, None).unwrap();
        clock(now, made(60)).unwrap();
        let fault = clock(now, made(3600)).unwrap_err();
        assert!(fault.to_string().contains("before /x was made"), "{fault}");
    }

    #[test]
    fn the_way_of_reading_layers_is_told_with_what_is_better() {
        let config = Config::default();
        let status = |tier: &str| {
            let mut status = Status::default();
            let passed_over = vec![("file".to_owned(), "Block device required".to_owned())];
            let report =
                crate::lazy::Report { tier: tier.into(), passed_over, ..Default::default() };
            status.lazy = Some(report);
            status
        };
        for (name, word) in
            [("file", "ok"), ("flat-file", "note"), ("loop", "note"), ("none", "missing")]
        {
            let found = tier(&config, Some(&status(name)));
            assert_eq!(said(&found).0, word, "{found:?}");
            assert_eq!(said(&found).1.contains("Block device"), word != "ok", "{found:?}");
        }
        // What the configuration says is as it should be.
        let mut forced = config;
        forced.lazy.tier = "loop".into();
        assert_eq!(said(&tier(&forced, Some(&status("loop")))).0, "ok");
    }

    #[test]
    fn a_keeper_answers_or_will() {
        let mut config = Config::default();
        config.lazy.keeper_address = "/nonexistent/keeper.sock".into();
        let mut status = Status { lazy: Some(Default::default()), ..Status::default() };
        assert_eq!(said(&keeper(&config, None)).0, "ok", "one is started");
        assert_eq!(said(&keeper(&config, Some(&status))).0, "missing");
        status.lazy = Some(crate::lazy::Report { keeper: true, ..Default::default() });
        assert_eq!(said(&keeper(&config, Some(&status))).0, "ok");
        config.lazy.start_keeper = false;
        let found = keeper(&config, None);
        assert!(said(&found).1.contains("there is no /nonexistent/keeper.sock"), "{found:?}");
    }
}
