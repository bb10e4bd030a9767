//! Programs for processors that neither this machine nor its kernel's binfmt_misc runs (row
//! `exec.emulator`): `buildkit-qemu-<architecture>` on PATH is put before a step's own program. It
//! is mounted into the step's `/dev`, which is not part of what the step leaves.

use shipway_executor::{ExecMount, MountSource};
use shipway_oci::Platform;
use std::{ffi::OsStr, os::unix::fs::PermissionsExt as _, path::PathBuf};

/// Where a step finds its emulator.
const PLACE: &str = "/dev/.buildkit_qemu_emulator";

/// What runs without an emulator, and where emulators are.
#[derive(Clone, Debug, Default)]
pub struct Emulators {
    kernel: Vec<Platform>,
    dirs: Vec<PathBuf>,
}

/// QEMU's word for an architecture.
fn qemu_name(architecture: &str) -> &str {
    match architecture {
        "arm64" => "aarch64",
        "amd64" => "x86_64",
        "386" => "i386",
        other => other,
    }
}

impl Emulators {
    /// Emulators on `path`, a list as in `PATH`, for what is not among the platforms that the
    /// kernel runs.
    pub fn new(kernel: impl IntoIterator<Item = Platform>, path: &OsStr) -> Self {
        Self {
            kernel: kernel.into_iter().collect(),
            dirs: std::env::split_paths(path).filter(|d| d.is_absolute()).collect(),
        }
    }

    /// The emulator for `platform`, where one is needed and there.
    fn find(&self, platform: &Platform) -> Option<PathBuf> {
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
        let known = platform.os == "linux"
            && !platform.architecture.is_empty()
            && platform.architecture.chars().all(plain);
        // Of one architecture's variants the processor decides by itself.
        let runs =
            |p: &Platform| (&p.os, &p.architecture) == (&platform.os, &platform.architecture);
        if !known || self.kernel.iter().any(runs) {
            return None;
        }
        let name = format!("buildkit-qemu-{}", qemu_name(&platform.architecture));
        let is_program = |p: &PathBuf| {
            std::fs::metadata(p).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
        };
        let found = self.dirs.iter().map(|dir| dir.join(&name)).find(is_program);
        if found.is_none() {
            tracing::debug!(%platform, "neither the kernel nor {name} runs this platform's programs");
        }
        found
    }

    /// Puts an emulator for `platform` before the program in `args`, where one is needed and there.
    pub(crate) fn apply(
        &self,
        platform: &Platform,
        args: &mut Vec<String>,
        mounts: &mut Vec<ExecMount>,
    ) {
        if let Some(emulator) = self.find(platform) {
            args.insert(0, PLACE.to_owned());
            mounts.push(ExecMount {
                target: PLACE.to_owned(),
                source: MountSource::Host(emulator),
                read_only: true,
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_emulator_is_used_where_the_kernel_runs_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let program = |name: &str, mode: u32| {
            let path = dir.path().join(name);
            std::fs::write(&path, "").unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        };
        program("buildkit-qemu-aarch64", 0o755);
        program("buildkit-qemu-x86_64", 0o755);
        program("buildkit-qemu-s390x", 0o644);
        std::fs::create_dir(dir.path().join("buildkit-qemu-riscv64")).unwrap();
        let path = std::env::join_paths([std::path::Path::new("relative"), dir.path()]).unwrap();
        let kernel = ["linux/amd64", "linux/386"].map(|p| p.parse().unwrap());
        let check = |platform: &str, expected: Option<&str>| {
            let (mut args, mut mounts) = (vec!["sh".to_owned()], Vec::new());
            Emulators::new(kernel.clone(), &path).apply(
                &platform.parse().unwrap(),
                &mut args,
                &mut mounts,
            );
            let sources = mounts.iter().map(|m| match &m.source {
                MountSource::Host(path) => path.file_name().unwrap().to_str().unwrap(),
                other => panic!("{other:?}"),
            });
            assert_eq!(
                sources.collect::<Vec<_>>(),
                expected.into_iter().collect::<Vec<_>>(),
                "{platform}"
            );
            assert_eq!(args.len(), 1 + mounts.len());
        };
        check("linux/arm64", Some("buildkit-qemu-aarch64"));
        for native in ["linux/amd64", "linux/amd64/v3", "linux/386"] {
            check(native, None);
        }
        // Not executable, not a file, not there, not Linux.
        for none in ["linux/s390x", "linux/riscv64", "linux/ppc64le", "windows/arm64"] {
            check(none, None);
        }
    }
}
