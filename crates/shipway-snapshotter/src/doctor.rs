//! What the snapshotter lacks on this host. fscache is not looked at, for nothing here uses it.

use crate::{
    config::Config,
    setup::Target,
    status::{self, Status},
};
use shipway_dockerconfig::DockerConfig;
use shipway_fault::{Context as _, Fault, Result};
use shipway_host::doctor::{self, Check, Found, Kernel, Room, clock, failed, newest};
use shipway_layermount::{FuseFiles, ProbeLayer, Tier};
use std::{fs, os::unix::fs::FileTypeExt as _, path::Path, process::ExitCode, time::SystemTime};

/// Least percent of the file system that images need to be of use.
const LITTLE_ROOM: u64 = 10;

/// Looks at everything, and says so; succeeds if nothing is missing.
pub fn run(config: &Config, target: &Target) -> ExitCode {
    let (text, well) = doctor::report(&checks(config, target));
    print!("{text}");
    if well { ExitCode::SUCCESS } else { ExitCode::FAILURE }
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
    add("the clock", clock(SystemTime::now(), newest([&*config.root])).into());
    add("credentials", credentials(config, status));
    checks
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
    let least = u64::from(config.lazy.min_free_percent);
    let mend = format!(
        "lazy layers leave {least} % free (`lazy.min_free_percent`): remove images, or move `root`"
    );
    let soon = "images will soon need room that is not there";
    Room { least, useful: LITTLE_ROOM, mend: &mend, soon }.at(&config.root)
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

    #[test]
    fn fuse_is_a_file_system_and_a_device() {
        let all = Kernel { file_systems: "nodev\tfuse\n".into(), modules: String::new() };
        fuse(&all, Path::new("/dev/null")).unwrap();
        let fault = fuse(&all, Path::new("/nonexistent/fuse")).unwrap_err();
        assert!(fault.hints().any(|h| h.contains("/dev/fuse")), "{fault:?}");
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
            assert_eq!(found.said().0, word, "{found:?}");
            assert_eq!(found.said().1.contains("Block device"), word != "ok", "{found:?}");
        }
        // What the configuration says is as it should be.
        let mut forced = config;
        forced.lazy.tier = "loop".into();
        assert_eq!(tier(&forced, Some(&status("loop"))).said().0, "ok");
    }

    #[test]
    fn a_keeper_answers_or_will() {
        let mut config = Config::default();
        config.lazy.keeper_address = "/nonexistent/keeper.sock".into();
        let mut status = Status { lazy: Some(Default::default()), ..Status::default() };
        assert_eq!(keeper(&config, None).said().0, "ok", "one is started");
        assert_eq!(keeper(&config, Some(&status)).said().0, "missing");
        status.lazy = Some(crate::lazy::Report { keeper: true, ..Default::default() });
        assert_eq!(keeper(&config, Some(&status)).said().0, "ok");
        config.lazy.start_keeper = false;
        let found = keeper(&config, None);
        assert!(found.said().1.contains("there is no /nonexistent/keeper.sock"), "{found:?}");
    }
}
