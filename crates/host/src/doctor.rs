//! What is missing on a host: one line for each thing that is looked at, with what to do. The
//! programs say what they look at; here is how it is reported, and what all of them look at.
//!
//! Three outcomes: `ok`; `note`, where something works less well than it could; `missing`, where it
//! does not work.

use crate::Disk;
use shipway_fault::{Code, Fault, Result};
use std::{
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

/// Fewer free inodes than this are reported.
const FEW_INODES: u64 = 10_000;
/// How far ahead of the clock a file of ours may be dated, for a disk of another machine.
const AHEAD: Duration = Duration::from_secs(300);

/// How something was found.
#[derive(Debug)]
pub enum Found {
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

impl Found {
    /// The outcome and what is said of it, for a report: `("ok", "…")`.
    pub fn said(&self) -> (&'static str, String) {
        match self {
            Self::Ok(said) => ("ok", said.clone()),
            Self::Note(fault) => ("note", fault.to_string()),
            Self::Missing(fault) => ("missing", fault.to_string()),
        }
    }
}

/// One thing that is looked at.
#[derive(Debug)]
pub struct Check {
    /// What it is.
    pub what: &'static str,
    /// How it was found.
    pub found: Found,
}

/// The lines of a report, and whether nothing is missing.
pub fn report(checks: &[Check]) -> (String, bool) {
    let (mut text, mut well) = (String::new(), true);
    for Check { what, found } in checks {
        let (word, said) = found.said();
        let colon = if said.is_empty() { "" } else { ": " };
        // Nothing can fail that writes into a string.
        let _ = writeln!(text, "{word:<8} {what}{colon}{said}");
        let fault = match found {
            Found::Ok(_) => continue,
            Found::Note(fault) => fault,
            Found::Missing(fault) => {
                well = false;
                fault
            }
        };
        for hint in fault.hints() {
            let _ = writeln!(text, "         hint: {hint}");
        }
    }
    (text, well)
}

/// What is not as it should be.
pub fn failed(what: impl Into<String>) -> Fault {
    Fault::new(Code::FailedPrecondition, what.into())
}

/// What the kernel has, and what it could load.
#[derive(Debug)]
pub struct Kernel {
    /// `/proc/filesystems`.
    pub file_systems: String,
    /// Lists of modules: one path each, possibly with more on the line.
    pub modules: String,
}

impl Kernel {
    /// The running one.
    pub fn read() -> Self {
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
    ///
    /// # Errors
    ///
    /// `FailedPrecondition` where it is not, with a hint of how to get it.
    pub fn file_system(&self, name: &str) -> Result<()> {
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

/// How much room a program wants on a file system.
#[derive(Clone, Copy, Debug)]
pub struct Room<'a> {
    /// Percent that it leaves free, so that it does nothing below.
    pub least: u64,
    /// Percent beyond these that it takes to be of use.
    pub useful: u64,
    /// What to do where there is less than the least.
    pub mend: &'a str,
    /// What to expect where it is of little use.
    pub soon: &'a str,
}

impl Room<'_> {
    /// Whether there is enough where `at` is, or will be.
    pub fn at(&self, at: &Path) -> Found {
        let there = at.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
        match Disk::of(there) {
            Ok(disk) => self.enough(there, disk),
            Err(fault) => Found::Missing(fault),
        }
    }

    /// Whether a file system has enough.
    pub fn enough(&self, at: &Path, disk: Disk) -> Found {
        let Disk { usable, free, inodes, free_inodes } = disk;
        let said = format!("{} MiB free of {} MiB at {}", free >> 20, usable >> 20, at.display());
        if inodes > 0 && free_inodes < FEW_INODES {
            let few = failed(format!("{free_inodes} inodes are free at {}", at.display()));
            return Found::Missing(
                few.hint("remove images, or move `root` to another file system"),
            );
        }
        if disk.free_percent() <= self.least {
            return Found::Missing(failed(said).hint(self.mend.to_owned()));
        }
        if disk.free_percent() <= self.least + self.useful {
            return Found::Note(failed(said).hint(self.soon.to_owned()));
        }
        Found::Ok(said)
    }
}

/// The newest of these files and this program, with when it was made, as far as is known.
pub fn newest<'a>(files: impl IntoIterator<Item = &'a Path>) -> Option<(PathBuf, SystemTime)> {
    let program = std::env::current_exe().ok();
    let all = program.into_iter().chain(files.into_iter().map(Path::to_path_buf));
    let dated = all.filter_map(|path| {
        let time = path.metadata().ok()?.modified().ok()?;
        Some((path, time))
    });
    dated.max_by_key(|(_, time)| *time)
}

/// A clock that is behind what was made here makes certificates and tokens of registries invalid.
///
/// # Errors
///
/// `FailedPrecondition` where it is behind.
pub fn clock(now: SystemTime, made: Option<(PathBuf, SystemTime)>) -> Result<String> {
    match made {
        Some((path, time)) if time > now + AHEAD => Err(failed(format!(
            "it is before {} was made, so registries' certificates and tokens will be refused",
            path.display()
        ))
        .hint("timedatectl set-ntp true")),
        _ => Ok(String::new()),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_report_says_how_to_mend_what_is_missing() {
        let check = |what, found| Check { what, found };
        let ok = check("one", Found::Ok(String::new()));
        let (text, well) = report(&[ok, check("two", Found::Note(failed("slow").hint("faster")))]);
        assert_eq!(text, "ok       one\nnote     two: slow\n         hint: faster\n");
        assert!(well);
        let (text, well) = report(&[check("three", Found::Missing(failed("gone")))]);
        assert_eq!((text.as_str(), well), ("missing  three: gone\n", false));
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
    }

    #[test]
    fn room_is_enough_or_short() {
        const GIB: u64 = 1 << 30;
        let room = Room { least: 5, useful: 10, mend: "mend", soon: "soon" };
        for ([usable, free], [inodes, free_inodes], word) in [
            ([100 * GIB, 50 * GIB], [0, 0], "ok"),
            ([100 * GIB, 50 * GIB], [1 << 20, 1 << 19], "ok"),
            ([100 * GIB, 50 * GIB], [1 << 20, 100], "missing"),
            ([100 * GIB, 14 * GIB], [0, 0], "note"),
            ([100 * GIB, 5 * GIB], [0, 0], "missing"),
            ([0, 0], [0, 0], "ok"),
        ] {
            let disk = Disk { usable, free, inodes, free_inodes };
            let found = room.enough(Path::new("/x"), disk);
            assert_eq!(found.said().0, word, "{disk:?} {found:?}");
        }
    }

    #[test]
    fn a_clock_behind_what_is_here_is_reported() {
        let now = SystemTime::now();
        let made = |ahead: u64| Some((PathBuf::from("/x"), now + Duration::from_secs(ahead)));
        clock(now, None).unwrap();
        clock(now, made(60)).unwrap();
        let fault = clock(now, made(3600)).unwrap_err();
        assert!(fault.to_string().contains("before /x was made"), "{fault}");
        let dir = tempfile::tempdir().unwrap();
        let file = fs::File::create(dir.path().join("new")).unwrap();
        file.set_modified(now + Duration::from_secs(99)).unwrap();
        assert_eq!(newest([&*dir.path().join("new")]).unwrap().0, dir.path().join("new"));
    }
}
