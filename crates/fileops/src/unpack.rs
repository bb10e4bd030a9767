//! Unpacking of tar archives that `ADD` was given (row `file.copy.unpack`). The archive is foreign:
//! every path is resolved by the kernel inside the directory it is unpacked in, sizes are bounded
//! by what was read, and only the kinds of entries that a file system has are made.

use crate::{
    path::RootPath,
    place::{Ids, Root, at_time, fault, finish, is_dir, is_regular, remove_all},
    settings::Settings,
};
use rustix::{
    fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    fs::{AtFlags, FileType, Gid, Mode, OFlags, RawMode, Uid, XattrFlags},
    io::Errno,
};
use shipway_archive::{Member, MemberKind, TarReader, inflate};
use shipway_fault::{Fault, Result};
use shipway_oci::is_image_xattr;
use std::{
    collections::BTreeMap,
    ffi::OsStr,
    fs::File,
    io::{self, BufReader, Read},
    os::unix::{ffi::OsStrExt, fs::FileExt},
    path::Path,
};

/// Parents that an archive does not mention; they are root's.
const IMPLIED_MODE: RawMode = 0o755;
/// Bytes written at once.
const BUFFER: usize = 128 << 10;
/// Longest path; the kernel takes none that is longer, and the way to it is looked at name by name.
const MAX_PATH: usize = 4095;
/// Memory for the directories whose times are set in the end.
const MAX_DIRECTORIES: usize = 256 << 20;

/// What `file` holds, decompressed.
fn reader(file: File) -> io::Result<Archive> {
    Ok(TarReader::new(inflate(BufReader::with_capacity(256 << 10, file))?))
}

/// Whether the file begins with a tar header.
fn is_archive(file: File) -> bool {
    reader(file).is_ok_and(|mut archive| matches!(archive.next_member(), Ok(Some(_))))
}

/// Unpacks `src` into the directory `dest`, if it is an archive; says whether it was.
pub(crate) fn run(
    source: &Root,
    src: &RootPath,
    target: &Root,
    dest: &RootPath,
    settings: &Settings,
) -> Result<bool> {
    let real = source.real(src)?;
    match source.lstat(&real) {
        Ok(stat) if is_regular(&stat) => {}
        _ => return Ok(false),
    }
    let open = || {
        source
            .open_regular(&real)
            .and_then(|file| file.ok_or(Errno::INVAL))
            .map_err(|e| fault("open", src, e))
    };
    if !is_archive(open()?) {
        return Ok(false);
    }
    target.make_dirs(dest, IMPLIED_MODE, settings.owner, settings.time)?;
    let root = target.sub(&target.real(dest)?)?;
    let what = || format!("unpack {src}");
    let fail = |e: io::Error| Fault::io(what(), e);
    let mut archive = reader(open()?).map_err(fail)?;
    let mut unpacker = Unpacker {
        root,
        settings,
        place: None,
        buffer: vec![0; BUFFER],
        directories: Directories { limit: MAX_DIRECTORIES, ..Directories::default() },
    };
    while let Some(member) = archive.next_member().map_err(fail)? {
        settings.check()?;
        unpacker
            .member(member, &mut archive)
            .map_err(|e| if e.is_cancelled() { e } else { e.context(what()) })?;
    }
    unpacker.finish();
    Ok(true)
}

type Archive = TarReader<Box<dyn Read>>;

struct Unpacker<'a> {
    root: Root,
    settings: &'a Settings,
    /// The directory of the last entry: neighbors in an archive are neighbors in the tree.
    place: Option<(RootPath, OwnedFd)>,
    buffer: Vec<u8>,
    /// Times of directories are set at the end, when nothing is made in them any more.
    directories: Directories,
}

/// Times of directories, and about how much memory they take.
#[derive(Default)]
struct Directories {
    times: BTreeMap<RootPath, i64>,
    memory: usize,
    limit: usize,
}

impl Directories {
    /// Remembers the time of a directory. An archive may name one any number of times.
    fn put(&mut self, path: RootPath, time: i64) -> Result<()> {
        let size = size_of::<(RootPath, i64)>() + path.as_ref().len();
        if self.times.insert(path, time).is_none() {
            self.memory += size;
        }
        if self.memory > self.limit {
            Err(Fault::invalid("the archive has too many directories"))
        } else {
            Ok(())
        }
    }
}

impl Unpacker<'_> {
    /// Takes the directory `path`, made with its parents if it is not there.
    fn enter(&mut self, path: RootPath) -> Result<(RootPath, OwnedFd)> {
        if let Some(place) = self.place.take()
            && place.0 == path
        {
            return Ok(place);
        }
        self.root.make_dirs(&path, IMPLIED_MODE, Some((0, 0)), None)?;
        let fd = self
            .root
            .real(&path)
            .and_then(|real| self.root.dir(&real).map_err(|e| fault("open", &path, e)))?;
        Ok((path, fd))
    }

    fn member(&mut self, mut member: Member, archive: &mut Archive) -> Result<()> {
        member.xattrs.retain(|(name, _)| is_image_xattr(name));
        let path = RootPath::new(&member.path);
        if path.is_root() {
            return Ok(());
        }
        check_length(&path)?;
        let place = self.enter(path.parent())?;
        let (dir, name) = (place.1.as_fd(), path.name());
        let error = |e: Errno| fault("write", &path, e);
        let mut replaced = false;
        match rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(there) if is_dir(&there) && member.kind == MemberKind::Directory => {}
            Ok(_) => {
                remove_all(dir, name, 0).map_err(error)?;
                replaced = true;
            }
            Err(_) => {}
        }
        match &member.kind {
            MemberKind::File => self.file(&member, archive, dir, &path)?,
            MemberKind::HardLink(first) => self.link(first, dir, &path)?,
            kind => {
                make(kind, dir, &path)?;
                let mode = (!matches!(kind, MemberKind::Symlink(_))).then_some(member.mode);
                finish(dir, name, Some(self.owner(&member)), mode, None).map_err(error)?;
                member.xattrs.iter().for_each(|(key, value)| set_xattr(dir, name, key, value));
                if *kind == MemberKind::Directory {
                    self.directories.put(path, member.mtime)?;
                } else {
                    rustix::fs::utimensat(
                        dir,
                        name,
                        &at_time(member.mtime),
                        AtFlags::SYMLINK_NOFOLLOW,
                    )
                    .map_err(error)?;
                }
            }
        }
        // What was replaced may have been a part of the way to the place.
        self.place = Some(place).filter(|_| !replaced);
        Ok(())
    }

    fn owner(&self, member: &Member) -> Ids {
        self.settings.owner.unwrap_or((member.uid, member.gid))
    }

    /// Makes a file; what the archive does not have of it stays a hole.
    fn file(
        &mut self,
        member: &Member,
        archive: &mut Archive,
        dir: BorrowedFd<'_>,
        path: &RootPath,
    ) -> Result<()> {
        let error = |e: Errno| fault("write", path, e);
        let io_error = |e: io::Error| error(Errno::from_io_error(&e).unwrap_or(Errno::IO));
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = File::from(
            rustix::fs::openat(dir, path.name(), flags, Mode::from_raw_mode(0o600))
                .map_err(error)?,
        );
        let mut end = 0;
        while let Some(piece) =
            archive.piece(&mut self.buffer).map_err(|e| Fault::io(format!("read {path}"), e))?
        {
            self.settings.check()?;
            file.write_all_at(&self.buffer[..piece.len], piece.offset).map_err(io_error)?;
            end = piece.offset + piece.len as u64;
        }
        if end < member.size {
            file.set_len(member.size).map_err(io_error)?;
        }
        let (uid, gid) = self.owner(member);
        rustix::fs::fchown(&file, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))
            .map_err(error)?;
        rustix::fs::fchmod(&file, Mode::from_raw_mode(member.mode)).map_err(error)?;
        for (key, value) in &member.xattrs {
            // As far as the file system takes them.
            let _ =
                rustix::fs::fsetxattr(&file, OsStr::from_bytes(key), value, XattrFlags::empty());
        }
        rustix::fs::futimens(&file, &at_time(member.mtime)).map_err(error)
    }

    fn link(&self, first: &[u8], dir: BorrowedFd<'_>, path: &RootPath) -> Result<()> {
        let first = RootPath::new(first);
        check_length(&first)?;
        let failed = |e| fault("link", &first, e);
        let first_dir = self.root.dir(&self.root.real(&first.parent())?).map_err(failed)?;
        rustix::fs::linkat(&first_dir, first.name(), dir, path.name(), AtFlags::empty())
            .map_err(failed)
    }

    fn finish(self) {
        self.directories.times.iter().for_each(|(path, time)| self.root.set_time(path, *time));
    }
}

fn check_length(path: &RootPath) -> Result<()> {
    let path: &[u8] = path.as_ref();
    if path.len() <= MAX_PATH {
        return Ok(());
    }
    let shown = String::from_utf8_lossy(&path[..100]).into_owned();
    Err(Fault::invalid(format!(
        "the archive has a path of {} bytes, {shown}…: file name too long",
        path.len()
    )))
}

/// Makes a directory, symbolic link, device or FIFO.
fn make(kind: &MemberKind, dir: BorrowedFd<'_>, path: &RootPath) -> Result<()> {
    let name = path.name();
    let node = |file_type, device| {
        rustix::fs::mknodat(dir, name, file_type, Mode::from_raw_mode(0o600), device)
    };
    let made = match kind {
        MemberKind::Directory => match rustix::fs::mkdirat(dir, name, Mode::from_raw_mode(0o700)) {
            Err(Errno::EXIST) => Ok(()),
            made => made,
        },
        MemberKind::Symlink(target) => rustix::fs::symlinkat(OsStr::from_bytes(target), dir, name),
        MemberKind::Fifo => node(FileType::Fifo, 0),
        MemberKind::CharDevice(major, minor) => {
            node(FileType::CharacterDevice, rustix::fs::makedev(*major, *minor))
        }
        MemberKind::BlockDevice(major, minor) => {
            node(FileType::BlockDevice, rustix::fs::makedev(*major, *minor))
        }
        other => {
            return Err(Fault::invalid(format!(
                "the archive has an entry of unknown kind {other:?}, {path}"
            )));
        }
    };
    made.map_err(|e| fault("write", path, e))
}

/// Sets an extended attribute of what cannot be opened, as far as the file system takes it.
fn set_xattr(dir: BorrowedFd<'_>, name: &OsStr, key: &[u8], value: &[u8]) {
    let path = Path::new("/proc/self/fd").join(dir.as_raw_fd().to_string()).join(name);
    let _ = rustix::fs::lsetxattr(&path, OsStr::from_bytes(key), value, XattrFlags::empty());
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs, os::unix::fs::MetadataExt, process::Command};
    use tar::EntryType;

    fn archive(entries: &[(&str, EntryType, &str)]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for (path, kind, content) in entries {
            let mut header = tar::Header::new_gnu();
            header.set_entry_type(*kind);
            header.set_mode(0o640);
            header.set_mtime(99);
            header.as_mut_bytes()[..path.len()].copy_from_slice(path.as_bytes());
            if matches!(kind, EntryType::Symlink | EntryType::Link) {
                header.set_link_name_literal(content).expect("a short link");
                header.set_size(0);
                header.set_cksum();
                builder.append(&header, io::empty()).expect("append");
            } else {
                header.set_size(content.len() as u64);
                header.set_cksum();
                builder.append(&header, content.as_bytes()).expect("append");
            }
        }
        builder.into_inner().expect("finish")
    }

    fn unpack(bytes: &[u8], target: &Path) -> Result<bool> {
        let source = tempfile::tempdir().expect("a temporary directory");
        fs::write(source.path().join("a.tar"), bytes).expect("write");
        let (source, target) = (Root::open(source.path())?, Root::open(target)?);
        let settings = Settings::of(&Default::default(), None, &Default::default())?;
        run(&source, &"/a.tar".into(), &target, &"/out".into(), &settings)
    }

    #[test]
    fn archives_are_unpacked_and_other_files_are_not() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let plain = archive(&[
            ("d/", EntryType::Directory, ""),
            ("d/f", EntryType::Regular, "hello"),
            ("l", EntryType::Link, "d/f"),
        ]);
        let gzip = {
            let mut encoder =
                flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            io::Write::write_all(&mut encoder, &plain).expect("write");
            encoder.finish().expect("finish")
        };
        let bz = {
            let mut encoder = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::fast());
            io::Write::write_all(&mut encoder, &plain).expect("write");
            encoder.finish().expect("finish")
        };
        let xz = {
            let mut encoder = liblzma::write::XzEncoder::new(Vec::new(), 1);
            io::Write::write_all(&mut encoder, &plain).expect("write");
            encoder.finish().expect("finish")
        };
        let zst = zstd::encode_all(&plain[..], 1).expect("compress");
        // A frame to skip, such as some tools begin with.
        let skippable = [&[0x50, 0x2a, 0x4d, 0x18, 2, 0, 0, 0, 9, 9][..], &zst].concat();
        for bytes in [plain, gzip, bz, xz, zst, skippable] {
            assert!(unpack(&bytes, dir.path()).expect("unpack"));
            assert_eq!(fs::read_to_string(dir.path().join("out/l")).expect("read"), "hello");
        }
        assert!(!unpack(b"no archive", dir.path()).expect("look"));
        assert!(!unpack(b"", dir.path()).expect("look"));
    }

    #[test]
    fn names_are_any_bytes_and_attributes_are_kept() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let mut builder = tar::Builder::new(Vec::new());
        let extended = [
            ("mtime", &b"77.25"[..]),
            ("SCHILY.xattr.user.a", b"b"),
            ("SCHILY.xattr.user.overlay.opaque", b"y"),
            ("path", b"d/\xff/caf\xe9"),
        ];
        builder.append_pax_extensions(extended).expect("append");
        let mut header = tar::Header::new_ustar();
        header.set_size(1);
        header.set_mode(0o4711);
        header.set_mtime(77);
        builder.append_data(&mut header, "short", &b"x"[..]).expect("append");
        assert!(unpack(&builder.into_inner().expect("finish"), dir.path()).expect("unpack"));
        let path = dir.path().join(OsStr::from_bytes(b"out/d/\xff/caf\xe9"));
        let stat = fs::metadata(&path).expect("stat");
        assert_eq!(
            (stat.mode() & 0o7777, stat.mtime(), stat.mtime_nsec()),
            (0o4711, 77, 250_000_000)
        );
        let mut value = [0; 8];
        let there = rustix::fs::lgetxattr(&path, "user.a", &mut value[..]);
        assert!(there == Ok(1) || there == Err(Errno::NOTSUP), "{there:?}");
        let mark = rustix::fs::lgetxattr(&path, "user.overlay.opaque", &mut value[..]);
        assert!(mark == Err(Errno::NODATA) || mark == Err(Errno::NOTSUP), "{mark:?}");
        // Directories that the archive does not mention.
        assert_eq!(
            fs::metadata(path.parent().expect("a parent")).expect("stat").mode() & 0o7777,
            0o755
        );
    }

    #[test]
    fn sparse_files_are_whole_and_stay_sparse() {
        let from = tempfile::tempdir().expect("a temporary directory");
        let sparse = File::create(from.path().join("sparse")).expect("create");
        for part in 0..30_u8 {
            sparse.write_all_at(&[part + 1; 1000], u64::from(part) << 20).expect("write");
        }
        sparse.set_len((31 << 20) + 7).expect("truncate");
        let expected = fs::read(from.path().join("sparse")).expect("read");
        for kind in [
            &["--format=oldgnu"][..],
            &["--format=gnu"],
            &["--format=posix", "--sparse-version=0.0"],
            &["--format=posix", "--sparse-version=0.1"],
            &["--format=posix", "--sparse-version=1.0"],
        ] {
            let to = tempfile::tempdir().expect("a temporary directory");
            let out = Command::new("tar")
                .args(kind)
                .args(["-S", "--hole-detection=raw", "-c", "-C"])
                .arg(from.path())
                .arg(".")
                .output();
            let bytes = out.expect("tar").stdout;
            assert!(bytes.len() < 1 << 20, "{kind:?}");
            assert!(unpack(&bytes, to.path()).expect("unpack"));
            let path = to.path().join("out/sparse");
            assert!(fs::read(&path).expect("read") == expected, "{kind:?}");
            assert!(fs::metadata(&path).expect("stat").blocks() * 512 < 4 << 20, "{kind:?}");
        }
    }

    #[test]
    fn long_paths_and_many_directories_are_refused() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        // Looked at name by name this would take minutes.
        let long = "a/".repeat(250_000);
        let with = |key: &str, kind: EntryType| {
            let mut builder = tar::Builder::new(Vec::new());
            builder.append_pax_extensions([(key, long.as_bytes())]).expect("append");
            let mut header = tar::Header::new_ustar();
            header.set_entry_type(kind);
            header.set_size(0);
            builder.append_data(&mut header, "short", io::empty()).expect("append");
            unpack(&builder.into_inner().expect("finish"), dir.path())
                .expect_err("too long")
                .to_string()
        };
        assert!(with("path", EntryType::Regular).ends_with("file name too long"));
        assert!(with("linkpath", EntryType::Link).ends_with("file name too long"));
        let mut directories = Directories { limit: 1000, ..Directories::default() };
        for n in 0..10_000 {
            directories.put("/same".into(), n).expect("one directory");
        }
        assert!((0..100).any(|n| directories.put(RootPath::from(&*format!("/{n}")), n).is_err()));
    }

    #[test]
    fn names_and_attributes_may_have_newlines() {
        // As Python's `tarfile` makes it.
        let bytes = include_bytes!("../../archive/tests/corpus/python-pax.tar");
        let dir = tempfile::tempdir().expect("a temporary directory");
        assert!(unpack(bytes, dir.path()).expect("unpack"));
        let out = dir.path().join("out");
        let tool = fs::metadata(out.join("tool")).expect("stat");
        assert_eq!((tool.uid(), tool.gid(), tool.mode() & 0o7777), (1234, 3_000_000, 0o755));
        let mut value = [0; 64];
        let capability =
            rustix::fs::lgetxattr(out.join("tool"), "security.capability", &mut value[..])
                .expect("a capability");
        assert!(value[..capability].contains(&b'\n'), "{:?}", &value[..capability]);
        assert_eq!(fs::read(out.join("café\nbreak/fi\nle")).expect("read"), b"abc");
        assert_eq!(
            fs::read_link(out.join("link\nname")).expect("read the link"),
            Path::new("tö\nthere")
        );
    }

    #[test]
    fn what_is_there_is_replaced_and_directories_are_merged() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        fs::create_dir_all(dir.path().join("out/d/keep")).expect("mkdir");
        fs::create_dir_all(dir.path().join("out/d/f/below")).expect("mkdir");
        let bytes = archive(&[
            ("d/", EntryType::Directory, ""),
            ("d/f", EntryType::Regular, "new"),
            ("e/f", EntryType::Regular, "first"),
            ("e", EntryType::Symlink, "d"),
            ("e/f", EntryType::Regular, "second"),
        ]);
        assert!(unpack(&bytes, dir.path()).expect("unpack"));
        let out = dir.path().join("out");
        assert!(out.join("d/keep").exists());
        assert_eq!(fs::metadata(out.join("d")).expect("stat").mtime(), 99);
        assert_eq!(
            (
                fs::read_to_string(out.join("d/f")).expect("read").as_str(),
                out.join("e").is_symlink()
            ),
            ("second", true)
        );
    }

    #[test]
    fn an_archive_cannot_leave_its_directory() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let outside = tempfile::tempdir().expect("a temporary directory");
        let away = outside.path().display().to_string();
        let bytes = archive(&[
            ("../../up", EntryType::Regular, "x"),
            ("link", EntryType::Symlink, &away),
            ("link/f", EntryType::Regular, "x"),
            ("rel", EntryType::Symlink, "../../.."),
            ("rel/g", EntryType::Regular, "x"),
        ]);
        assert!(unpack(&bytes, dir.path()).expect("unpack"));
        assert!(outside.path().read_dir().expect("list").next().is_none());
        assert!(dir.path().join("out/up").exists() && dir.path().join("out/g").exists());
        assert_eq!(dir.path().read_dir().expect("list").count(), 1);
    }
}
