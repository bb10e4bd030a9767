//! Directories and files that no other user of the host may look into: what builds leave below the
//! root holds their sources, logs and secrets.

use rustix::fs::{Mode, OFlags, fchmod, fstat};
use shipway_fault::{Fault, Result};
use std::{io::ErrorKind, os::unix::fs::DirBuilderExt as _, path::Path};

/// What a group and others may do with our directories.
const OTHERS: u32 = 0o077;

/// Leaves group and others out of every file and directory that this process makes without saying
/// more. Modes that are meant for a build's result or for a client are set explicitly where they
/// are made.
pub fn umask() {
    rustix::process::umask(Mode::from_raw_mode(OTHERS));
}

/// Makes `dir`, with its parents, for root alone, or takes over the one that is there.
pub fn dir(dir: &Path) -> Result<()> {
    let failed = |what: &str, e| Fault::io(format!("{what} {}", dir.display()), e);
    match std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir) {
        Err(e) if e.kind() != ErrorKind::AlreadyExists => return Err(failed("create", e)),
        _ => {}
    }
    let fd =
        rustix::fs::open(dir, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty());
    let fd = fd.map_err(|e| failed("open", e.into()))?;
    let there = fstat(&fd).map_err(|e| failed("look at", e.into()))?;
    let us = rustix::process::geteuid().as_raw();
    if there.st_uid != us {
        let owner = format!(
            "{} belongs to user {}, who could exchange what is in it",
            dir.display(),
            there.st_uid
        );
        return Err(Fault::invalid(owner)
            .hint(format!("change its owner to {us}, or choose another directory with --root")));
    }
    if there.st_mode & OTHERS != 0 {
        fchmod(&fd, Mode::from_raw_mode(there.st_mode & 0o700))
            .map_err(|e| failed("change the mode of", e.into()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};

    fn mode(path: &Path) -> u32 {
        path.metadata().unwrap().mode() & 0o7777
    }

    #[test]
    fn a_directory_is_made_private_or_becomes_it() {
        let root = tempfile::tempdir().unwrap();
        let (fresh, old) = (root.path().join("a/b"), root.path().join("old"));
        std::fs::create_dir(&old).unwrap();
        std::fs::set_permissions(&old, std::fs::Permissions::from_mode(0o755)).unwrap();
        for path in [&fresh, &old, &old] {
            dir(path).unwrap();
            assert_eq!(mode(path), 0o700);
        }
        std::fs::write(root.path().join("file"), "").unwrap();
        assert!(dir(&root.path().join("file")).is_err());
    }

    #[test]
    fn a_directory_of_another_user_is_refused() {
        assert!(
            rustix::process::geteuid().is_root(),
            "this test gives a directory away, which needs root"
        );
        let root = tempfile::tempdir().unwrap();
        std::os::unix::fs::chown(root.path(), Some(65534), None).unwrap();
        assert!(dir(root.path()).unwrap_err().to_string().contains("belongs to user 65534"));
    }
}
