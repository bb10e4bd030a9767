//! The tree of a layer, for kernels that cannot mount its image: what is asked of a node is read
//! from the metadata, each time anew. So nothing has to be remembered of what the kernel knows, and
//! a successor answers as its predecessor would have.
//!
//! Nothing in a tree ever changes, so the kernel keeps all that it was sent: entries and their
//! absence, attributes, targets of links, listings, contents. Nor does it ask to open a file, once
//! it has learned that no server needs that. It learns it for the whole connection: should an image
//! be mounted by way of the same connection later, then its contents are in the page cache twice,
//! which costs memory and is not wrong.

use crate::{
    layer::{File, Layer, errno, inode_of, type_of},
    limits::MAX_READ,
};
use rustix::io::Errno;
use shipway_erofs::{Nid, ReadError, limits};
use shipway_fusewire::{DirBuffer, NodeAttributes, NodeId, Opened, Operation, Reply, Unique};
use std::ops::ControlFlow;

/// Answers what is asked of an inode, except to read it.
pub(crate) fn answer<'r>(
    layer: &Layer,
    nid: Nid,
    operation: &Operation<'_>,
    unique: Unique,
    reply: &'r mut Reply,
) -> &'r [u8] {
    match *operation {
        Operation::Lookup { name } => match lookup(layer, nid, name) {
            Ok(Some(found)) => reply.entry(unique, &found),
            Ok(None) => reply.no_entry(unique),
            Err(error) => reply.error(unique, error),
        },
        Operation::GetAttr => match layer.attributes(File::Tree(nid)) {
            Ok(found) => reply.attributes(unique, &found),
            Err(error) => reply.error(unique, error),
        },
        // The kernel does without, then and for all other files, and keeps what it reads.
        Operation::Open { .. } => reply.error(unique, Errno::NOSYS),
        Operation::OpenDir => {
            let kept = Opened { keep_cache: true, cache_directory: true, ..Opened::default() };
            reply.opened(unique, kept)
        }
        Operation::ReadLink => reply.data(unique, limits::PATH_BYTES, |out| {
            let image = layer.image()?;
            let target = image.metadata(nid).and_then(|inode| image.target(&inode, out));
            target.map_err(|error| match error {
                ReadError::Kind => Errno::INVAL,
                other => errno(other),
            })
        }),
        Operation::ReadDir { offset, size, .. } => {
            let size = (size as usize).min(MAX_READ);
            reply.data(unique, size, |out| list(layer, nid, offset, out, false))
        }
        Operation::ReadDirPlus { offset, size, .. } => {
            let size = (size as usize).min(MAX_READ);
            reply.data(unique, size, |out| list(layer, nid, offset, out, true))
        }
        Operation::GetXattr { name, size } => xattr(layer, nid, name, size, unique, reply),
        Operation::ListXattr { size } => xattrs(layer, nid, size, unique, reply),
        _ => reply.error(unique, Errno::NOSYS),
    }
}

/// The entry `name` of a directory, or, if it is `.`, an inode of any kind itself.
fn lookup(layer: &Layer, nid: Nid, name: &[u8]) -> Result<Option<NodeAttributes>, Errno> {
    if name == b"." {
        return layer.attributes(File::Tree(nid)).map(Some);
    }
    let image = layer.image()?;
    let found = image.metadata(nid).and_then(|directory| image.lookup(&directory, name));
    found.map_err(errno)?.map(|nid| layer.attributes(File::Tree(nid))).transpose()
}

/// Fills `out` with entries from `offset` on, with attributes if `plus`.
fn list(layer: &Layer, nid: Nid, offset: u64, out: &mut [u8], plus: bool) -> Result<usize, Errno> {
    let image = layer.image()?;
    let directory = image.metadata(nid).map_err(errno)?;
    let mut buffer = DirBuffer::new(out);
    let listed = image.list(&directory, offset, |entry| {
        let inode = inode_of(layer.number(), entry.nid);
        let added = if !plus {
            buffer.add(inode, type_of(entry.kind), entry.name, entry.next)
        } else if matches!(entry.name, b"." | b"..") {
            // They are not looked up.
            let itself = NodeAttributes {
                inode,
                ..NodeAttributes::new(NodeId(0), type_of(entry.kind), 0, 0)
            };
            buffer.add_with(&itself, entry.name, entry.next)
        } else {
            let found = layer.attributes(File::Tree(entry.nid)).map_err(|_| ReadError::Io)?;
            buffer.add_with(&found, entry.name, entry.next)
        };
        Ok(if added { ControlFlow::Continue(()) } else { ControlFlow::Break(()) })
    });
    match listed {
        // What comes before is sent; a read that goes on from there gets the error.
        Err(error) if buffer.filled() == 0 => Err(errno(error)),
        _ => Ok(buffer.filled()),
    }
}

/// Answers with `length` bytes that `fill` writes, if there is room for them where they are wanted.
fn sized(
    length: u64,
    room: u32,
    unique: Unique,
    reply: &mut Reply,
    fill: impl FnOnce(&mut [u8]) -> Result<(), ReadError>,
) -> &[u8] {
    match u32::try_from(length) {
        Ok(length) if room == 0 => reply.size(unique, length),
        Ok(length) if length <= room => {
            let length = length as usize;
            reply.data(unique, length, |out| fill(out).map(|()| length).map_err(errno))
        }
        _ => reply.error(unique, Errno::RANGE),
    }
}

fn xattr<'r>(
    layer: &Layer,
    nid: Nid,
    name: &[u8],
    room: u32,
    unique: Unique,
    reply: &'r mut Reply,
) -> &'r [u8] {
    let image = match layer.image() {
        Ok(image) => image,
        Err(error) => return reply.error(unique, error),
    };
    match image.metadata(nid).and_then(|inode| image.xattr(&inode, name)) {
        Ok(Some(value)) => {
            sized(value.end - value.start, room, unique, reply, |out| image.value(&value, out))
        }
        Ok(None) => reply.error(unique, Errno::NODATA),
        Err(error) => reply.error(unique, errno(error)),
    }
}

fn xattrs<'r>(
    layer: &Layer,
    nid: Nid,
    room: u32,
    unique: Unique,
    reply: &'r mut Reply,
) -> &'r [u8] {
    let image = match layer.image() {
        Ok(image) => image,
        Err(error) => return reply.error(unique, error),
    };
    let mut length = 0;
    let counted = image.metadata(nid).and_then(|inode| {
        image.xattr_names(&inode, |prefix, rest| {
            length += (prefix.len() + rest.len() + 1) as u64;
            ControlFlow::Continue(())
        })?;
        Ok(inode)
    });
    let inode = match counted {
        Ok(inode) => inode,
        Err(error) => return reply.error(unique, errno(error)),
    };
    sized(length, room, unique, reply, |out| {
        let mut rest = out;
        image.xattr_names(&inode, |prefix, name| {
            for part in [prefix, name, &[0]] {
                let Some((start, after)) =
                    std::mem::take(&mut rest).split_at_mut_checked(part.len())
                else {
                    return ControlFlow::Break(());
                };
                start.copy_from_slice(part);
                rest = after;
            }
            ControlFlow::Continue(())
        })
    })
}
