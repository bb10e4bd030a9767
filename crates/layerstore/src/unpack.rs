//! Ordinary layers that are unpacked once, into the layer itself, while their blobs come.

use crate::{Error, Layer, LayerStore, Plain, Result, disk, layer::DATA};
use rustix::fs::{Advice, CWD, RenameFlags, fadvise, renameat_with};
use shipway_estargz::{Codec, DataPlaces, Toc};
use shipway_oci::{DiffId, Digest};
use shipway_plainlayer::{SPAN, Scanner};
use std::{
    fs::{self, File},
    io::Read,
    num::NonZeroU64,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    sync::Arc,
};

/// Bytes after which the disk is asked to write them, and whether it has room for more.
const PORTION: u64 = 16 << 20;

/// A layer's data, in a directory of its own until the layer is made.
pub(crate) struct Data {
    directory: PathBuf,
    file: File,
    places: DataPlaces,
    /// Where files begin, in order.
    starts: Vec<u64>,
    /// Where the next bytes go, if the current file has a place.
    at: Option<u64>,
    /// Up to where the disk was asked.
    asked: u64,
    /// Bytes of the file system that others should find free.
    min_free: u64,
}

impl Data {
    fn new(store: &LayerStore) -> Result<Self> {
        let directory = store.new_directory()?;
        let path = directory.join(DATA);
        let file = disk::create(&path).inspect_err(|_| _ = fs::remove_dir_all(&directory))?;
        Ok(Self {
            directory,
            file,
            places: DataPlaces::default(),
            starts: Vec::new(),
            at: None,
            asked: 0,
            min_free: store.options.min_free,
        })
    }

    /// The next file.
    pub fn file(&mut self, path: &[u8], size: u64) {
        self.at = self.places.next(path, size);
        self.starts.extend(self.at);
    }

    /// The next bytes of the file that came last.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let Some(at) = &mut self.at else { return Ok(()) };
        // Zeros are the holes between.
        if bytes.iter().any(|byte| *byte != 0) {
            let failed = |e| Error::io("write data of a layer", e);
            self.file.write_all_at(bytes, *at).map_err(failed)?;
        }
        *at += bytes.len() as u64;
        if *at - self.asked >= PORTION {
            let portion = NonZeroU64::new(*at - self.asked);
            // So that little is left for the end. The kernel begins to write what it is told that
            // nobody needs, and keeps it until that is done.
            let _ = fadvise(&self.file, self.asked, portion, Advice::DontNeed);
            self.asked = *at;
            self.check_room()?;
        }
        Ok(())
    }

    /// A few bytes of a blob can be many of a layer.
    fn check_room(&self) -> Result<()> {
        let found = rustix::fs::fstatvfs(&self.file).map_err(Error::at("stat", &self.directory))?;
        match found.f_bavail.saturating_mul(found.f_frsize) < self.min_free {
            true => Err(Error::NoSpace { what: "write data of a layer".to_owned() }),
            false => Ok(()),
        }
    }

    /// Moves it into the directory of its layer; gives it with its new path.
    pub fn place(&self, directory: &Path, toc: &Toc, size: u64) -> Result<(PathBuf, File)> {
        if !toc.data_starts().map(|(_, start)| start).eq(self.starts.iter().copied()) {
            return Err(Error::Foreign("place for data"));
        }
        let (from, to) = (self.directory.join(DATA), directory.join(DATA));
        self.file.set_len(size).map_err(Error::at("write", &from))?;
        renameat_with(CWD, &from, CWD, &to, RenameFlags::NOREPLACE)
            .map_err(Error::at("rename", &from))?;
        let file = self.file.try_clone().map_err(Error::at("open", &to))?;
        Ok((to, file))
    }
}

impl Drop for Data {
    fn drop(&mut self) {
        // What cannot be removed now is at the next start.
        let _ = fs::remove_dir_all(&self.directory);
    }
}

/// The contents of an ordinary layer, written but not a layer of the store yet. The caller compares
/// [`Unpacked::digest`] with what is wanted. Dropping it removes the data.
pub struct Unpacked {
    plain: Plain,
    data: Data,
}

impl Unpacked {
    /// Digest of the blob that was read.
    pub fn digest(&self) -> Digest {
        self.plain.digest()
    }

    /// Digest of its tar.
    pub fn diff_id(&self) -> DiffId {
        self.plain.diff_id()
    }

    /// Bytes of its data, holes included.
    pub fn bytes(&self) -> u64 {
        self.data.places.end()
    }
}

impl LayerStore {
    /// Reads a whole blob and writes the contents of its files, each byte once.
    ///
    /// Also of a blob that cannot be resumed, such as one long zstd frame: the layer is
    /// [sealed](Layer::is_sealed) then.
    pub fn unpack(&self, codec: Codec, blob: impl Read) -> Result<Unpacked> {
        self.unpack_with_spans_of(SPAN, codec, blob)
    }

    /// With spans of at least `length` bytes of the tar.
    pub fn unpack_with_spans_of(
        &self,
        length: u64,
        codec: Codec,
        blob: impl Read,
    ) -> Result<Unpacked> {
        let mut data = Data::new(self)?;
        let scanner = Scanner::new(codec, blob).map_err(shipway_plainlayer::Error::from)?;
        let scanner = scanner.spans_of(length).allow_long_spans();
        let plain = Plain::of(codec, scanner, Some(&mut data))?;
        Ok(Unpacked { plain, data })
    }

    /// Makes a layer that was seen in `repository`, `host/name`, of a blob that was unpacked, which
    /// the caller has checked to be the one that is wanted. It is
    /// [whole](crate::State::Whole), and on the disk. If the layer is there already, in whatever
    /// state, this is that one.
    ///
    /// [`Error::Refused`] if the layer has to be unpacked the ordinary way.
    pub fn create_unpacked(&self, unpacked: Unpacked, repository: &str) -> Result<Arc<Layer>> {
        let Unpacked { plain, data } = unpacked;
        self.create_of(&plain, Some(&data), repository)
    }
}
