//! Debian packages as `cargo xtask dist` makes them: the same bytes each time, and installed,
//! upgraded, removed and purged in this machine's own Debian as a chroot over it sees it. Nothing
//! is installed into the machine, and no service of it is started.

#![allow(clippy::unwrap_used)]

use shipway_integration::images::stripped;
use shipway_testkit::{Finished, built, run, which};
use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    process::Command,
};

/// Programs of a few bytes that do what ours do, for where only packing them matters: disks of
/// tests are small.
#[track_caller]
fn small(to: &Path) -> PathBuf {
    let programs = to.join("small");
    fs::create_dir(&programs).unwrap();
    for name in ["shipwayd", "shipway", "shipway-snapshotter", "shipway-keeper"] {
        let path = programs.join(name);
        let script = format!("#!/bin/sh\nexec '{}' \"$@\"\n", built(name).display());
        fs::write(&path, script).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }
    programs
}

/// Packages of `programs` in `out`.
#[track_caller]
fn dist(programs: &Path, out: &Path, more: &[&str]) {
    let mut xtask = Command::new(built("xtask"));
    xtask.arg("dist").arg("--programs").arg(programs).arg("--out").arg(out);
    xtask.args(more).env("SOURCE_DATE_EPOCH", "1700000000");
    run(&mut xtask).ok();
}

fn files_of(dir: &Path) -> BTreeMap<String, PathBuf> {
    let entries = fs::read_dir(dir).unwrap().map(|e| e.unwrap());
    entries.map(|e| (e.file_name().into_string().unwrap(), e.path())).collect()
}

/// A directory that can be the upper one of an overlay: not below target/, where it may be on one.
fn workplace() -> tempfile::TempDir {
    tempfile::Builder::new().prefix("shipway-packages-").tempdir_in("/var/tmp").unwrap()
}

#[test]
fn packages_of_the_same_files_are_the_same_bytes() {
    let dir = workplace();
    let programs = small(dir.path());
    let (one, two) = (dir.path().join("one"), dir.path().join("two"));
    dist(&programs, &one, &[]);
    // Times and modes of files are not those of this machine.
    for path in files_of(&programs).values() {
        run(Command::new("touch").args(["-d", "2001-01-01"]).arg(path)).ok();
        run(Command::new("chmod").arg("700").arg(path)).ok();
    }
    dist(&programs, &two, &[]);
    let (one, two) = (files_of(&one), files_of(&two));
    assert_eq!(one.keys().collect::<Vec<_>>(), two.keys().collect::<Vec<_>>());
    let kinds = |end: &str| one.keys().filter(|name| name.ends_with(end)).count();
    assert_eq!((kinds(".deb"), kinds(".tar.xz")), (2, 1), "{one:?}");
    for (name, path) in &one {
        assert!(fs::read(path).unwrap() == fs::read(&two[name]).unwrap(), "{name} differs");
    }
    let tarball = one.values().find(|path| path.extension().is_some_and(|e| e == "xz")).unwrap();
    let listed = run(Command::new("tar").arg("-tvf").arg(tarball)).ok().stdout;
    for program in ["shipwayd", "shipway", "shipway-snapshotter", "shipway-keeper"] {
        let is_it = |l: &str| {
            l.starts_with("-rwxr-xr-x root/root") && l.ends_with(&format!("usr/bin/{program}"))
        };
        assert!(listed.lines().any(is_it), "{listed}");
    }
}

/// This machine's root file system with changes of its own.
struct Machine(tempfile::TempDir);

impl Machine {
    fn new() -> Self {
        let dir = workplace();
        for name in ["upper", "work", "root", "packages"] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        Self(dir)
    }

    fn upper(&self) -> PathBuf {
        self.0.path().join("upper")
    }

    /// Runs a script in it. It sees the packages in `/mnt`, and no service manager in `/run`.
    #[track_caller]
    fn run(&self, script: &str) -> Finished {
        const ENTER: &str = r#"
            mount -t overlay -o "lowerdir=/,upperdir=$1/upper,workdir=$1/work" overlay "$1/root"
            mount -t tmpfs tmpfs "$1/root/run"
            mount --rbind /dev "$1/root/dev"
            mount --rbind /proc "$1/root/proc"
            mount --bind "$1/packages" "$1/root/mnt"
            exec chroot "$1/root" /bin/sh -euc "$2"
        "#;
        run(Command::new("unshare")
            .args(["--mount", "--propagation", "private", "/bin/sh", "-euc", ENTER, "enter"])
            .arg(self.0.path())
            .arg(script)
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("DEBIAN_FRONTEND", "noninteractive"))
    }

    /// What is not as it is on the machine itself: paths from the root.
    fn changed(&self) -> Vec<String> {
        let (mut changed, mut queue) = (Vec::new(), vec![self.upper()]);
        while let Some(dir) = queue.pop() {
            for entry in fs::read_dir(dir).unwrap().map(|e| e.unwrap()) {
                let (path, kind) = (entry.path(), entry.file_type().unwrap());
                let real = Path::new("/").join(path.strip_prefix(self.upper()).unwrap());
                let same = match () {
                    () if kind.is_dir() => {
                        queue.push(path);
                        real.is_dir()
                    }
                    // An overlay's mark of a file that was removed.
                    () if kind.is_char_device() => !real.exists(),
                    () if kind.is_symlink() => {
                        fs::read_link(&path).ok() == fs::read_link(&real).ok()
                    }
                    () => fs::read(&path).ok() == fs::read(&real).ok(),
                };
                if !same {
                    changed.push(real.display().to_string());
                }
            }
        }
        changed.sort();
        changed
    }
}

/// What dpkg and the tools of users leave whatever is installed.
fn of_the_tools(path: &str) -> bool {
    ["/var/lib/dpkg/", "/var/log/", "/var/cache/"].iter().any(|p| path.starts_with(p))
        || ["/etc/group-", "/etc/gshadow-", "/etc/ld.so.cache"].contains(&path)
}

#[test]
fn a_package_is_installed_upgraded_removed_and_purged() {
    for needed in ["dpkg", "chroot", "unshare"] {
        assert!(
            which(needed).is_some() || Path::new("/usr/sbin").join(needed).exists(),
            "{needed}"
        );
    }
    let machine = Machine::new();
    let packages = machine.0.path().join("packages");
    dist(&small(machine.0.path()), &packages, &["--version", "0.0.1"]);
    let programs = stripped(machine.0.path());
    dist(&programs, &packages, &["--version", "0.0.2", "--compress", "none"]);
    fs::remove_dir_all(programs).unwrap();

    let install = |version: &str| {
        machine.run(&format!(
            "dpkg -i /mnt/shipway_{version}_*.deb /mnt/shipway-snapshotter_{version}_*.deb"
        ))
    };
    install("0.0.1").ok();
    // Twice is as good as once.
    install("0.0.1").ok();
    let listed = machine.run("dpkg -L shipway shipway-snapshotter").ok().stdout;
    for path in listed.lines().filter(|line| line.starts_with('/') && *line != "/.") {
        let there = machine.upper().join(&path[1..]);
        let Ok(meta) = there.symlink_metadata() else {
            assert!(Path::new(path).is_dir(), "{path} is not there");
            continue;
        };
        let expected = match () {
            () if meta.is_dir() => 0o755,
            () if path.starts_with("/usr/bin/") => 0o755,
            () => 0o644,
        };
        let found = (meta.uid(), meta.gid(), meta.mode() & 0o7777);
        assert_eq!(found, (0, 0, expected), "{path}: {found:?}");
    }
    for path in [
        "/usr/bin/shipwayd",
        "/etc/shipway/shipwayd.toml",
        "/etc/shipway/shipway-snapshotter.toml",
        "/usr/lib/systemd/system/shipwayd.socket",
        "/usr/lib/systemd/system/shipway-snapshotter-keeper.service",
        "/usr/share/bash-completion/completions/shipway",
        "/usr/share/man/man1/shipway-build.1.gz",
        "/usr/share/man/man8/shipwayd.8.gz",
        "/usr/share/doc/shipway/copyright",
    ] {
        assert!(listed.lines().any(|line| line == path), "{path} is not among\n{listed}");
    }
    machine.run("dpkg -V shipway shipway-snapshotter").ok();
    machine.run("getent group shipway").ok();
    machine.run("systemctl is-enabled shipwayd.socket").ok();
    let manual = machine.run("zcat /usr/share/man/man8/shipwayd.8.gz").ok().stdout;
    assert!(
        manual.contains("\\-\\-config") && manual.contains("/etc/shipway/shipwayd.toml"),
        "{manual}"
    );
    if which("systemd-analyze").is_some() {
        let verified = machine.run(
            "systemd-analyze verify --man=no /usr/lib/systemd/system/shipway*.s* 2>&1 || true",
        );
        // What a systemd before 254 does not know and passes over.
        let ours = |l: &&str| l.contains("shipway") && !l.contains("FileDescriptorStorePreserve");
        let wrong: Vec<&str> = verified.stdout.lines().filter(ours).collect();
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    }

    // What an administrator changed stays changed.
    machine.run("echo '# mine' >> /etc/shipway/shipwayd.toml").ok();
    machine.run("systemctl disable shipwayd.socket").ok();
    install("0.0.2").ok();
    let version =
        machine.run("dpkg-query -W -f '${Version} ${db:Status-Status}' shipway").ok().stdout;
    assert_eq!(version, "0.0.2 installed");
    machine.run("shipwayd --version && shipway version && shipway-snapshotter --version").ok();
    machine.run("dpkg -V shipway-snapshotter").ok();
    let mine = || fs::read_to_string(machine.upper().join("etc/shipway/shipwayd.toml")).unwrap();
    assert!(mine().ends_with("# mine\n"));
    let wants = "etc/systemd/system/sockets.target.wants/shipwayd.socket";
    assert!(machine.upper().join(wants).symlink_metadata().is_err(), "it was disabled");

    machine.run("dpkg -r shipway shipway-snapshotter").ok();
    assert!(mine().ends_with("# mine\n"));
    assert!(!machine.upper().join("usr/bin/shipwayd").exists());
    machine.run("mkdir -p /var/lib/shipway/history").ok();
    machine.run("dpkg -P shipway shipway-snapshotter").ok();
    machine.run("dpkg-query -W shipway").failed();
    let left: Vec<String> = machine.changed().into_iter().filter(|p| !of_the_tools(p)).collect();
    assert!(left.is_empty(), "left behind: {left:#?}");
}
