//! EROFS images of layers, made from what a layer's index says of its entries.
//!
//! ```text
//! Builder::insert per entry ──▶ Builder::finish ──▶ Image ──▶ Image::write ──▶ metadata file
//!                                                                                  │
//!                                       the kernel, Reader, Stored (FUSE tree) ◀──────┘
//! ```
//!
//! - A [`Builder`] takes entries in the order of the layer's tar and gives them the meaning that
//!   containerd gives them when it unpacks the layer for overlayfs: missing parents, replaced
//!   entries, hard links, whiteouts, opaque directories.
//! - An [`Image`] knows its size before it is written. It holds names, attributes, directories and
//!   symbolic links; the contents of regular files are elsewhere, in one *data file*, where every
//!   file begins at a block of its own, in the order of insertion.
//! - It is written in one of two [`Form`]s: for a mount with the data file as `device=`, or for one
//!   flat image of metadata and data one after the other. Only the superblock differs, and
//!   [`first_block`] makes one of the other.
//! - The bytes depend on the inserted entries and the [`Options`] alone.
//! - A [`Reader`] reads such images from memory, and [`Stored`] from files without a copy of them;
//!   both take any bytes and never panic.
//!
//! The format is that of the kernel's `fs/erofs/erofs_fs.h` as Linux 5.4 and newer read it (5.16
//! with a second device): no compression, 4 KiB blocks, extended inodes (64 bytes: nanoseconds,
//! 32-bit ids), directories and symbolic links inline where they fit, regular files flat at
//! *unified* addresses: block number = blocks of the metadata + block of the data file. No entry of
//! a hostile layer reaches the image unchecked, and each bound is a constant of the module
//! [`limits`].
//!
//! Memory is flat, below 100 bytes an entry beside its name: images of a million entries are made.
//! `hashbrown` is there for its `HashTable`, which finds an entry by directory and name through a
//! four-byte index; the standard library's maps would hold each name a second time.

mod builder;
mod error;
mod format;
mod image;
pub mod limits;
mod node;
mod path;
mod read;
mod stored;
mod tree;
mod xattr;

pub use builder::Builder;
pub use error::{BuildError, ReadError};
pub use image::{Form, Image, first_block};
pub use node::{Attributes, DeviceNumber, Extent, Inserted, Node, OpaqueMark, Options, Time};
pub use read::{Content, DirEntry, Directory, FoundXattr, Kind, Layout, Metadata, Nid, Reader};
pub use stored::{Bytes, Stored};
pub use xattr::Xattr;

/// Bytes of a block, in metadata and data alike.
pub const BLOCK: u64 = 4096;
