//! The image of a layer out of its table of contents.

use crate::{Error, LayerKey, Refused, Result};
use shipway_erofs::{
    Attributes, Builder, DeviceNumber, Image, Inserted, Node, OpaqueMark, Options, Time, Xattr,
};
use shipway_estargz::{DATA_BLOCK, Entry, Kind, Toc};

/// The image of the layer `key`. It shows what containerd would unpack, and where the records of
/// `toc` say the data is.
pub(crate) fn image(key: &LayerKey, toc: &Toc, opaque: OpaqueMark) -> Result<Image> {
    if let Some(path) = toc.implicit_directories().next() {
        return Err(Refused::implicit(path));
    }
    let options = Options { uuid: key.uuid(), opaque };
    // Layers do not say what the root is; where it matters, it is that of the top of the overlay.
    let root = Attributes { mode: 0o755, ..Attributes::default() };
    let mut builder = Builder::new(options, &root).map_err(Refused::Image)?;
    let mut starts = toc.data_starts().peekable();
    for entry in toc.entries().filter(|entry| !entry.is_landmark()) {
        let refused = |error| Refused::entry(entry.path(), error);
        let inserted = insert(&mut builder, toc, entry).map_err(refused)?;
        let start = starts.next_if(|(id, _)| *id == entry.id()).map(|(_, start)| start);
        let is_there = match inserted {
            Inserted::File(extent) if extent.blocks > 0 => {
                start == Some(u64::from(extent.block) * DATA_BLOCK)
            }
            _ => start.is_none(),
        };
        if !is_there {
            return Err(Error::Foreign("place for data"));
        }
    }
    // A directory whose name makes it a whiteout, with something in it.
    if let Some(path) = builder.implied().map_err(Refused::Image)?.first() {
        return Err(Refused::implicit(path));
    }
    Ok(builder.finish().map_err(Refused::Image)?)
}

fn insert(
    builder: &mut Builder,
    toc: &Toc,
    entry: Entry<'_>,
) -> Result<Inserted, shipway_erofs::BuildError> {
    let xattrs: Vec<Xattr<'_>> =
        entry.xattrs().map(|(name, value)| Xattr { name, value }).collect();
    let mtime = entry.mtime();
    let attributes = Attributes {
        mode: entry.mode(),
        uid: entry.uid(),
        gid: entry.gid(),
        mtime: Time { seconds: mtime.seconds, nanoseconds: mtime.nanoseconds },
        xattrs: &xattrs,
    };
    let node = match entry.kind() {
        Kind::Directory => Node::Directory,
        Kind::File { size, .. } => Node::File { size },
        Kind::Symlink { target } => Node::Symlink { target },
        Kind::HardLink { target } => Node::HardLink { target: toc.entry(target).path() },
        Kind::CharDevice { major, minor } => Node::CharDevice(DeviceNumber { major, minor }),
        Kind::BlockDevice { major, minor } => Node::BlockDevice(DeviceNumber { major, minor }),
        Kind::Fifo => Node::Fifo,
    };
    builder.insert(entry.path(), &attributes, node)
}
