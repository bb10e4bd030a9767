//! Unpacking of tar archives that `ADD` was given (row `file.copy.unpack`). The archive is foreign: every path is resolved by the kernel inside
//! the directory it is unpacked in, sizes are bounded by what was read, and only the kinds of entries that a file system has are made.

use super::{
    copy::Settings,
    path::RootPath,
    place::{Ids, Root, at_time, fault, finish, is_dir, is_regular, remove_all},
};
use rustix::{
    fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    fs::{AtFlags, FileType, Gid, Mode, OFlags, RawMode, Uid, XattrFlags},
    io::Errno,
};
use shipway_fault::{Fault, Result};
use std::{
    ffi::OsStr,
    fs::File,
    io::{self, BufReader, Read, Seek, Write},
    path::Path,
};
use tar::{Archive, Entry, EntryType, Header};

/// Parents that an archive does not mention; they are root's.
const IMPLIED_MODE: RawMode = 0o755;
const XATTR: &str = "SCHILY.xattr.";
/// Bytes written at once.
const BUFFER: usize = 128 << 10;

/// The decompressed bytes of `file`.
fn decompressed(mut file: File) -> io::Result<Box<dyn Read>> {
    let mut magic = [0_u8; 6];
    let mut n = 0;
    while n < magic.len() {
        match file.read(&mut magic[n..])? {
            0 => break,
            more => n += more,
        }
    }
    file.rewind()?;
    let file = BufReader::with_capacity(256 << 10, file);
    Ok(match &magic[..n] {
        [0x1f, 0x8b, 0x08, ..] => Box::new(flate2::bufread::MultiGzDecoder::new(file)),
        [b'B', b'Z', b'h', ..] => Box::new(bzip2::bufread::MultiBzDecoder::new(file)),
        [0xfd, b'7', b'z', b'X', b'Z', 0] => Box::new(liblzma::bufread::XzDecoder::new_multi_decoder(file)),
        // A frame, or one to skip before it.
        [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Box::new(zstd::Decoder::with_buffer(file)?),
        _ => Box::new(file),
    })
}

/// Whether the file begins with a tar header.
fn is_archive(file: File) -> bool {
    let Ok(reader) = decompressed(file) else { return false };
    let mut archive = Archive::new(reader);
    archive.entries().is_ok_and(|mut entries| matches!(entries.next(), Some(Ok(_))))
}

/// Unpacks `src` into the directory `dest`, if it is an archive; says whether it was.
pub(super) fn run(source: &Root, src: &RootPath, target: &Root, dest: &RootPath, settings: &Settings) -> Result<bool> {
    let real = source.real(src)?;
    match source.lstat(&real) {
        Ok(stat) if is_regular(&stat) => {}
        _ => return Ok(false),
    }
    let open = || source.open_file(&real, OFlags::RDONLY | OFlags::NONBLOCK, 0).map(File::from).map_err(|e| fault("open", src, e));
    if !is_archive(open()?) {
        return Ok(false);
    }
    target.make_dirs(dest, IMPLIED_MODE, settings.owner, settings.time)?;
    let root = target.sub(&target.real(dest)?)?;
    let what = || format!("unpack {src}");
    let fail = |e: io::Error| Fault::io(what(), e);
    let mut archive = Archive::new(decompressed(open()?).map_err(fail)?);
    let mut unpacker = Unpacker { root, settings, place: None, buffer: vec![0; BUFFER], directories: Vec::new() };
    for entry in archive.entries().map_err(fail)? {
        settings.stop.check()?;
        unpacker.entry(&mut entry.map_err(fail)?).map_err(|e| if e.is_cancelled() { e } else { e.context(what()) })?;
    }
    unpacker.finish();
    Ok(true)
}

type Packed<'a> = Entry<'a, Box<dyn Read>>;

struct Unpacker<'a> {
    root: Root,
    settings: &'a Settings,
    /// The directory of the last entry: neighbours in an archive are neighbours in the tree.
    place: Option<(RootPath, OwnedFd)>,
    buffer: Vec<u8>,
    /// Times of directories are set at the end, when nothing is made in them any more.
    directories: Vec<(RootPath, i64)>,
}

/// Attributes of an entry besides its owner.
struct Attributes {
    ids: Ids,
    mode: RawMode,
    /// Nanoseconds since the epoch.
    time: i64,
    xattrs: Vec<(String, Vec<u8>)>,
}

impl Attributes {
    fn of(entry: &mut Packed<'_>, owner: Option<Ids>) -> Self {
        let (mut exact, mut xattrs) = (None, Vec::new());
        if let Ok(Some(records)) = entry.pax_extensions() {
            for record in records.flatten() {
                match record.key() {
                    Ok("mtime") => exact = record.value().ok().and_then(nanoseconds),
                    Ok(key) => {
                        if let Some(name) = key.strip_prefix(XATTR) {
                            xattrs.push((name.to_owned(), record.value_bytes().to_vec()));
                        }
                    }
                    Err(_) => {}
                }
            }
        }
        // Empty numbers are common and mean zero.
        let header = entry.header();
        let whole = || i64::try_from(header.mtime().unwrap_or_default()).unwrap_or_default().saturating_mul(1_000_000_000);
        Self {
            ids: owner.unwrap_or((header.uid().unwrap_or_default() as u32, header.gid().unwrap_or_default() as u32)),
            mode: header.mode().unwrap_or_default() & 0o7777,
            time: exact.unwrap_or_else(whole),
            xattrs,
        }
    }
}

/// A decimal number of seconds, as PAX headers have it.
fn nanoseconds(text: &str) -> Option<i64> {
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    if !fraction.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let fraction = format!("{fraction:0<9}").get(..9)?.parse::<i64>().ok()?;
    let seconds = whole.parse::<i64>().ok()?.checked_mul(1_000_000_000)?;
    if whole.starts_with('-') { seconds.checked_sub(fraction) } else { seconds.checked_add(fraction) }
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
        let fd = self.root.real(&path).and_then(|real| self.root.dir(&real).map_err(|e| fault("open", &path, e)))?;
        Ok((path, fd))
    }

    fn entry(&mut self, entry: &mut Packed<'_>) -> Result<()> {
        let path = RootPath::new(entry.path_bytes());
        let kind = entry.header().entry_type();
        if path.is_root() || matches!(kind, EntryType::XGlobalHeader | EntryType::GNULongName | EntryType::GNULongLink | EntryType::XHeader)
        {
            return Ok(());
        }
        let place = self.enter(path.parent())?;
        let (dir, name) = (place.1.as_fd(), path.name());
        let error = |e: Errno| fault("write", &path, e);
        let mut replaced = false;
        match rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(there) if is_dir(&there) && kind == EntryType::Directory => {}
            Ok(_) => {
                remove_all(dir, name, 0).map_err(error)?;
                replaced = true;
            }
            Err(_) => {}
        }
        let attributes = Attributes::of(entry, self.settings.owner);
        match kind {
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => self.file(entry, dir, &path, &attributes)?,
            EntryType::Link => self.link(entry, dir, &path)?,
            kind => {
                make(kind, entry.header(), entry.link_name_bytes().as_deref(), dir, &path)?;
                let mode = (kind != EntryType::Symlink).then_some(attributes.mode);
                finish(dir, name, Some(attributes.ids), mode, None).map_err(error)?;
                attributes.xattrs.iter().for_each(|(key, value)| set_xattr(dir, name, key, value));
                if kind == EntryType::Directory {
                    self.directories.push((path, attributes.time));
                } else {
                    rustix::fs::utimensat(dir, name, &at_time(attributes.time), AtFlags::SYMLINK_NOFOLLOW).map_err(error)?;
                }
            }
        }
        // What was replaced may have been a part of the way to the place.
        self.place = Some(place).filter(|_| !replaced);
        Ok(())
    }

    fn file(&mut self, entry: &mut Packed<'_>, dir: BorrowedFd<'_>, path: &RootPath, a: &Attributes) -> Result<()> {
        let error = |e: Errno| fault("write", path, e);
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mut file = File::from(rustix::fs::openat(dir, path.name(), flags, Mode::from_raw_mode(0o600)).map_err(error)?);
        loop {
            self.settings.stop.check()?;
            let n = match entry.read(&mut self.buffer) {
                Ok(0) => break,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                n => n.map_err(|e| Fault::io(format!("read {path}"), e))?,
            };
            file.write_all(&self.buffer[..n]).map_err(|e| error(Errno::from_io_error(&e).unwrap_or(Errno::IO)))?;
        }
        rustix::fs::fchown(&file, Some(Uid::from_raw(a.ids.0)), Some(Gid::from_raw(a.ids.1))).map_err(error)?;
        rustix::fs::fchmod(&file, Mode::from_raw_mode(a.mode)).map_err(error)?;
        for (key, value) in &a.xattrs {
            // As far as the file system takes them.
            let _ = rustix::fs::fsetxattr(&file, key.as_str(), value, XattrFlags::empty());
        }
        rustix::fs::futimens(&file, &at_time(a.time)).map_err(error)
    }

    fn link(&self, entry: &Packed<'_>, dir: BorrowedFd<'_>, path: &RootPath) -> Result<()> {
        let first = RootPath::new(entry.link_name_bytes().ok_or_else(|| no_target(path))?);
        let failed = |e| fault("link", &first, e);
        let first_dir = self.root.dir(&self.root.real(&first.parent())?).map_err(failed)?;
        rustix::fs::linkat(&first_dir, first.name(), dir, path.name(), AtFlags::empty()).map_err(failed)
    }

    fn finish(self) {
        self.directories.iter().rev().for_each(|(path, time)| self.root.set_time(path, *time));
    }
}

fn no_target(path: &RootPath) -> Fault {
    Fault::invalid(format!("the archive has a link without target, {path}"))
}

/// Makes a directory, symbolic link, device or FIFO.
fn make(kind: EntryType, header: &Header, target: Option<&[u8]>, dir: BorrowedFd<'_>, path: &RootPath) -> Result<()> {
    let name = path.name();
    let made = match kind {
        EntryType::Directory => match rustix::fs::mkdirat(dir, name, Mode::from_raw_mode(0o700)) {
            Err(Errno::EXIST) => Ok(()),
            made => made,
        },
        EntryType::Symlink => rustix::fs::symlinkat(target.ok_or_else(|| no_target(path))?, dir, name),
        EntryType::Fifo | EntryType::Char | EntryType::Block => {
            let number = |n: io::Result<Option<u32>>| n.ok().flatten().unwrap_or_default();
            let device = rustix::fs::makedev(number(header.device_major()), number(header.device_minor()));
            let file_type = match kind {
                EntryType::Fifo => FileType::Fifo,
                EntryType::Char => FileType::CharacterDevice,
                _ => FileType::BlockDevice,
            };
            rustix::fs::mknodat(dir, name, file_type, Mode::from_raw_mode(0o600), device)
        }
        other => return Err(Fault::invalid(format!("the archive has an entry of unknown kind {other:?}, {path}"))),
    };
    made.map_err(|e| fault("write", path, e))
}

/// Sets an extended attribute of what cannot be opened, as far as the file system takes it.
fn set_xattr(dir: BorrowedFd<'_>, name: &OsStr, key: &str, value: &[u8]) {
    let path = Path::new("/proc/self/fd").join(dir.as_raw_fd().to_string()).join(name);
    let _ = rustix::fs::lsetxattr(&path, key, value, XattrFlags::empty());
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        fs,
        os::unix::{ffi::OsStrExt, fs::MetadataExt},
        path::Path,
    };

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
        let plain = archive(&[("d/", EntryType::Directory, ""), ("d/f", EntryType::Regular, "hello"), ("l", EntryType::Link, "d/f")]);
        let gzip = {
            let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
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
        let extended = [("mtime", &b"77.25"[..]), ("SCHILY.xattr.user.a", b"b"), ("path", b"d/\xff/caf\xe9")];
        builder.append_pax_extensions(extended).expect("append");
        let mut header = tar::Header::new_ustar();
        header.set_size(1);
        header.set_mode(0o4711);
        header.set_mtime(77);
        builder.append_data(&mut header, "short", &b"x"[..]).expect("append");
        assert!(unpack(&builder.into_inner().expect("finish"), dir.path()).expect("unpack"));
        let path = dir.path().join(OsStr::from_bytes(b"out/d/\xff/caf\xe9"));
        let stat = fs::metadata(&path).expect("stat");
        assert_eq!((stat.mode() & 0o7777, stat.mtime(), stat.mtime_nsec()), (0o4711, 77, 250_000_000));
        let mut value = [0; 8];
        let there = rustix::fs::lgetxattr(&path, "user.a", &mut value[..]);
        assert!(there == Ok(1) || there == Err(Errno::NOTSUP), "{there:?}");
        // Directories that the archive does not mention.
        assert_eq!(fs::metadata(path.parent().expect("a parent")).expect("stat").mode() & 0o7777, 0o755);
    }

    #[test]
    fn seconds_may_have_a_fraction() {
        for (text, expected) in [
            ("77", Some(77_000_000_000)),
            ("77.25", Some(77_250_000_000)),
            ("0.1234567891", Some(123_456_789)),
            ("-1.5", Some(-1_500_000_000)),
            ("1.x", None),
            ("", None),
        ] {
            assert_eq!(nanoseconds(text), expected, "{text}");
        }
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
        assert_eq!((fs::read_to_string(out.join("d/f")).expect("read").as_str(), out.join("e").is_symlink()), ("second", true));
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
