//! Digests of files' contents, for callers that need not read them.

use crate::{
    Error, Layer, Result, State,
    layer::{META, Open},
};
use shipway_erofs::{BLOCK, Bytes, Content, Layout, Metadata, Nid, ReadError, Stored};
use shipway_oci::Digest;
use std::{fs::File, os::unix::fs::FileExt as _};

/// The image's file.
struct Meta(File);

impl Bytes for Meta {
    fn read(&self, at: u64, out: &mut [u8]) -> Result<(), ReadError> {
        self.0.read_exact_at(out, at).map_err(|_| ReadError::Io)
    }
}

impl Layer {
    /// For each inode of the mounted image, the digests (SHA-256) of its contents in pieces of
    /// `length` bytes, of which the last one may be shorter. Nothing is read or fetched for that.
    /// A read of such a piece gets bytes with its digest, or an error.
    ///
    /// `None` where they are not known: of what is not a regular file, or has chunks of zeros or of
    /// other lengths. At most `most` digests are given in all, of the inodes that come first; of a
    /// layer that is [`State::Lying`] none.
    pub fn pieces(
        &self,
        inodes: &[u64],
        length: u64,
        most: usize,
    ) -> Result<Vec<Option<Vec<Digest>>>> {
        if length == 0 || matches!(self.state(), State::Lying(_)) {
            return Ok(vec![None; inodes.len()]);
        }
        let damaged =
            |_| Error::Damaged { layer: self.number(), file: META, why: "it has no head" };
        let (meta, mut first) = (Meta(self.meta()?), [0; BLOCK as usize]);
        meta.read(0, &mut first).map_err(damaged)?;
        let layout = Layout::of(&first, self.meta_bytes()).map_err(damaged)?;
        let (image, open) = (Stored::new(&layout, &meta), self.open()?);
        let mut left = most as u64;
        let of_inode = |inode: &u64| {
            let Ok(inode) = image.metadata(Nid(*inode)) else { return Ok(None) };
            if inode.size.div_ceil(length) > left {
                return Ok(None);
            }
            let found = pieces_of(open, &inode, length)?;
            left -= found.as_ref().map_or(0, |found| found.len() as u64);
            Ok(found)
        };
        inodes.iter().map(of_inode).collect()
    }
}

fn pieces_of(open: &Open, inode: &Metadata, length: u64) -> Result<Option<Vec<Digest>>> {
    let (Content::File(extent), size @ 1..) = (inode.content, inode.size) else { return Ok(None) };
    let start = u64::from(extent.block) * BLOCK;
    let first = open.index.partition_point(|record| record.data < start)?;
    let (mut found, mut at) = (Vec::new(), 0);
    for chunk in open.index.chunks(first..open.index.count) {
        let record = chunk?.record;
        let Some(digest) = record.digest else { return Ok(None) };
        if record.data != start + at || record.size != length.min(size - at) {
            return Ok(None);
        }
        found.push(digest);
        at += record.size;
        if at == size {
            return Ok(Some(found));
        }
    }
    Ok(None)
}
