//! What there is of a layer before it is made.

use crate::{Error, Result, about::Pieces, disk, layer::DATA};
use rustix::fs::{Advice, CWD, RenameFlags, fadvise, renameat_with};
use shipway_estargz::{DataPlaces, Toc};
use shipway_oci::{DiffId, Digest};
use std::{
    fs::{self, File},
    num::NonZeroU64,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
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
    /// In `directory`, which is its own; the file system keeps `min_free` bytes free.
    pub fn new(directory: PathBuf, min_free: u64) -> Result<Self> {
        let path = directory.join(DATA);
        let file = disk::create(&path).inspect_err(|_| _ = fs::remove_dir_all(&directory))?;
        Ok(Self {
            directory,
            file,
            places: DataPlaces::default(),
            starts: Vec::new(),
            at: None,
            asked: 0,
            min_free,
        })
    }

    /// Bytes that it has so far, holes included.
    pub fn bytes(&self) -> u64 {
        self.places.end()
    }

    /// The next entry, and the length of its contents: nothing but files has any.
    pub fn entry(&mut self, path: &[u8], size: u64) {
        self.at = self.places.next(path, size);
        self.starts.extend(self.at);
    }

    /// The next bytes of the entry that came last.
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

/// What there is of a layer besides its table of contents when it is made.
#[derive(Clone, Copy)]
pub(crate) enum Made<'a> {
    /// Nothing.
    Toc,
    /// The whole blob was read.
    Plain {
        /// Digest of its tar.
        diff_id: DiffId,
        /// The file of spans, if it can be resumed.
        spans: Option<&'a [u8]>,
        /// All of its data, if it was written.
        data: Option<&'a Data>,
    },
    /// Somebody else's index.
    Index {
        /// What the image's config says of the tar.
        diff_id: DiffId,
        /// The file of spans.
        spans: &'a [u8],
        /// The file of entries.
        entries: &'a [u8],
    },
}

impl<'a> Made<'a> {
    pub fn pieces(self) -> Pieces {
        match self {
            Self::Toc => Pieces::Frames,
            Self::Plain { spans: Some(spans), .. } => {
                Pieces::Spans(spans.len() as u64, Digest::of(spans))
            }
            Self::Plain { spans: None, .. } => Pieces::Sealed,
            Self::Index { spans, entries, .. } => {
                Pieces::Indexed([spans, entries].map(|f| (f.len() as u64, Digest::of(f))))
            }
        }
    }

    pub fn diff_id(self) -> Option<DiffId> {
        match self {
            Self::Toc => None,
            Self::Plain { diff_id, .. } | Self::Index { diff_id, .. } => Some(diff_id),
        }
    }

    pub fn spans(self) -> Option<&'a [u8]> {
        match self {
            Self::Toc => None,
            Self::Plain { spans, .. } => spans,
            Self::Index { spans, .. } => Some(spans),
        }
    }

    pub fn entries(self) -> Option<&'a [u8]> {
        match self {
            Self::Toc | Self::Plain { .. } => None,
            Self::Index { entries, .. } => Some(entries),
        }
    }

    pub fn data(self) -> Option<&'a Data> {
        match self {
            Self::Toc | Self::Index { .. } => None,
            Self::Plain { data, .. } => data,
        }
    }
}
