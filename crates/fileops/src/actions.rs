//! mkdir, mkfile, symlink, rm.

use crate::{
    path::RootPath,
    place::{Ids, Root, at_time, fault, finish, is_dir, is_regular, make_dir, remove_all},
    wildcard,
};
use rustix::{
    fd::AsFd,
    fs::{AtFlags, Gid, Mode, OFlags, Uid},
    io::Errno,
};
use shipway_fault::{Fault, Result};
use shipway_llb::{FileMkdir, FileMkfile, FileRm, FileSymlink};
use std::{fs::File, io::Write};

/// Makes a directory, and with `make_parents` those above it; one that is there stays as it is (row
/// `file.mkdir`).
pub(crate) fn mkdir(root: &Root, a: &FileMkdir, owner: Option<Ids>) -> Result<()> {
    let (path, mode) = (RootPath::from(&*a.path), a.mode & 0o777);
    if a.make_parents {
        return root.make_dirs(&path, mode, owner, a.timestamp).map(drop);
    }
    let real = root.real(&path)?;
    let make = || {
        let dir = root.dir(&real.parent())?;
        match make_dir(dir.as_fd(), real.name(), mode) {
            Err(Errno::EXIST) => Ok(()),
            Err(e) => Err(e),
            Ok(()) => finish(dir.as_fd(), real.name(), owner, Some(mode), a.timestamp),
        }
    };
    make().map_err(|e| fault("mkdir", &real, e))
}

/// Writes a file. One that is there is overwritten, through a link if it is one, and keeps its
/// permissions (row `file.mkfile`).
pub(crate) fn mkfile(root: &Root, a: &FileMkfile, owner: Option<Ids>) -> Result<()> {
    let mode = a.mode & 0o777;
    let real = root.real(&a.path.as_str().into())?;
    let write = || -> rustix::io::Result<()> {
        let mut is_new = true;
        match root.stat(&real) {
            Ok(there) if is_dir(&there) => return Err(Errno::ISDIR),
            Ok(there) if is_regular(&there) => is_new = false,
            // A FIFO or device that is there would block or do harm.
            Ok(_) => remove_all(root.dir(&real.parent())?.as_fd(), real.name(), 0)?,
            Err(_) => {}
        }
        let file = root.open_file(&real, OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC, mode)?;
        let mut file = File::from(file);
        file.write_all(&a.data).map_err(|e| Errno::from_io_error(&e).unwrap_or(Errno::IO))?;
        if let Some((uid, gid)) = owner {
            rustix::fs::fchown(&file, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))?;
        }
        if is_new {
            rustix::fs::fchmod(&file, Mode::from_raw_mode(mode))?;
        }
        if let Some(time) = a.timestamp {
            rustix::fs::futimens(&file, &at_time(time))?;
        }
        Ok(())
    };
    write().map_err(|e| fault("open", &real, e))
}

/// Makes a symbolic link, which must not be there yet (row `file.symlink`).
pub(crate) fn symlink(root: &Root, a: &FileSymlink, owner: Option<Ids>) -> Result<()> {
    let real = root.real(&a.newpath.as_str().into())?;
    let make = || {
        let dir = root.dir(&real.parent())?;
        rustix::fs::symlinkat(a.oldpath.as_str(), &dir, real.name())?;
        finish(dir.as_fd(), real.name(), owner, None, a.timestamp)
    };
    make().map_err(|e| fault(&format!("symlink {}", a.oldpath), &real, e))
}

/// Removes files and directories. No link is followed, neither at the end of a path nor where
/// wildcards begin (row `file.rm`).
pub(crate) fn rm(root: &Root, a: &FileRm) -> Result<()> {
    if !a.allow_wildcard {
        return rm_one(root, &a.path.as_str().into(), a.allow_not_found);
    }
    let found = match wildcard::resolve(root, &a.path, false) {
        Err(e) if a.allow_not_found && e.is_not_found() => return Ok(()),
        found => found?,
    };
    found.iter().try_for_each(|path| rm_one(root, path, a.allow_not_found))
}

fn rm_one(root: &Root, path: &RootPath, allow_not_found: bool) -> Result<()> {
    if path.is_root() {
        return Err(Fault::invalid("rmPath: invalid empty path"));
    }
    let real = root.real_entry(path, false)?;
    let remove = |dir: rustix::fd::OwnedFd| {
        remove_all(dir.as_fd(), real.name(), 0).map_err(|e| fault("remove", &real, e))
    };
    let there = |dir: &rustix::fd::OwnedFd| {
        rustix::fs::statat(dir, real.name(), AtFlags::SYMLINK_NOFOLLOW).map(drop)
    };
    match root.dir(&real.parent()).and_then(|dir| there(&dir).map(|()| dir)) {
        Ok(dir) => remove(dir),
        Err(Errno::NOENT) if allow_not_found => Ok(()),
        Err(e) => Err(fault("stat", &real, e)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        fs,
        os::unix::{ffi::OsStrExt, fs::MetadataExt},
        path::Path,
    };

    fn lab() -> (tempfile::TempDir, Root) {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let root = Root::open(dir.path()).expect("open");
        (dir, root)
    }

    fn exists(dir: &tempfile::TempDir, path: &str) -> bool {
        fs::symlink_metadata(dir.path().join(path)).is_ok()
    }

    #[test]
    fn directories_are_made_with_owner_mode_and_time() {
        let (dir, root) = lab();
        let a = FileMkdir {
            path: "/a/b".into(),
            mode: 0o710,
            make_parents: true,
            timestamp: Some(5_000_000_001),
            ..Default::default()
        };
        mkdir(&root, &a, None).expect("mkdir");
        let made = fs::metadata(dir.path().join("a/b")).expect("stat");
        assert_eq!((made.mode() & 0o7777, made.mtime(), made.mtime_nsec()), (0o710, 5, 1));
        let missing = FileMkdir { path: "/x/y".into(), mode: 0o755, ..Default::default() };
        assert_eq!(
            mkdir(&root, &missing, None).expect_err("no parent").to_string(),
            "mkdir /x/y: no such file or directory"
        );
    }

    #[test]
    fn nothing_is_written_outside() {
        let (dir, root) = lab();
        let outside = tempfile::tempdir().expect("a temporary directory");
        std::os::unix::fs::symlink(outside.path(), dir.path().join("out")).expect("symlink");
        let a = FileMkfile {
            path: "/out/f".into(),
            mode: 0o644,
            data: "x".into(),
            ..Default::default()
        };
        let absent = format!("open {}/f: no such file or directory", outside.path().display());
        assert_eq!(
            mkfile(&root, &a, None)
                .expect_err("the link's target does not exist inside")
                .to_string(),
            absent
        );
        mkdir(
            &root,
            &FileMkdir {
                path: "/out/d".into(),
                mode: 0o755,
                make_parents: true,
                ..Default::default()
            },
            None,
        )
        .expect("mkdir");
        assert!(Path::new(outside.path()).read_dir().expect("list").next().is_none());
        rm(&root, &FileRm { path: "/out".into(), ..Default::default() }).expect("rm");
        assert!(outside.path().exists() && !exists(&dir, "out"));
    }

    #[test]
    fn removal_knows_wildcards_and_absence() {
        let (dir, root) = lab();
        for name in ["a1", "a2", "b"] {
            fs::create_dir_all(dir.path().join(name).join("sub")).expect("mkdir");
        }
        rm(&root, &FileRm { path: "/a*".into(), allow_wildcard: true, ..Default::default() })
            .expect("rm");
        assert!(!exists(&dir, "a1") && !exists(&dir, "a2") && exists(&dir, "b"));
        let error = |path: &str, wildcard: bool| {
            let a = FileRm { path: path.into(), allow_wildcard: wildcard, ..Default::default() };
            rm(&root, &a).expect_err(path).to_string()
        };
        assert_eq!(error("/none/x", false), "stat /none/x: no such file or directory");
        assert_eq!(error("/none", true), "stat /none: no such file or directory");
        assert_eq!(error("/none/*", true), "lstat /none: no such file or directory");
        assert_eq!(error("/", false), "rmPath: invalid empty path");
        for (path, allow_wildcard) in [("/none/x", false), ("/none/*", true)] {
            rm(&root, &FileRm { path: path.into(), allow_not_found: true, allow_wildcard })
                .expect("rm");
        }
    }

    #[test]
    fn removal_follows_no_link_at_the_end_and_before_wildcards() {
        let (dir, root) = lab();
        fs::create_dir_all(dir.path().join("d/sub")).expect("mkdir");
        std::os::unix::fs::symlink("/d", dir.path().join("link")).expect("symlink");
        std::os::unix::fs::symlink("/nowhere", dir.path().join("dangling")).expect("symlink");
        rm(&root, &FileRm { path: "/link/*".into(), allow_wildcard: true, ..Default::default() })
            .expect("rm");
        assert!(exists(&dir, "d/sub"));
        rm(&root, &FileRm { path: "/link/sub".into(), ..Default::default() }).expect("rm");
        rm(&root, &FileRm { path: "/dangling".into(), ..Default::default() }).expect("rm");
        assert!(!exists(&dir, "d/sub") && exists(&dir, "link") && !exists(&dir, "dangling"));
    }

    #[test]
    fn what_has_a_name_of_any_bytes_is_removed() {
        let (dir, root) = lab();
        let name = std::ffi::OsStr::from_bytes(b"d/\xff\xfe/\xe9");
        fs::create_dir_all(dir.path().join(name)).expect("mkdir");
        rm(&root, &FileRm { path: "/d".into(), ..Default::default() }).expect("rm");
        assert!(!exists(&dir, "d"));
    }

    #[test]
    fn a_file_that_is_there_keeps_its_mode() {
        let (dir, root) = lab();
        let mode = || fs::metadata(dir.path().join("f")).expect("stat").mode() & 0o7777;
        let write = |mode: u32, data: &'static str| {
            mkfile(
                &root,
                &FileMkfile { path: "/f".into(), mode, data: data.into(), ..Default::default() },
                None,
            )
            .expect("mkfile");
        };
        write(0o640, "long");
        assert_eq!(mode(), 0o640);
        write(0o755, "new");
        assert_eq!(
            (mode(), fs::read_to_string(dir.path().join("f")).expect("read").as_str()),
            (0o640, "new")
        );
    }
}
