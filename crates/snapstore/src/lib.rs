//! Snapshots as containerd's `overlayfs` snapshotter has them, kept by us: names, kinds, parents,
//! labels, times, usage and mounts. The program `shipway-snapshotter` serves this over gRPC;
//! nothing here knows the wire.
//!
//! # What a name is
//!
//! containerd's metadata store gives the names: `<namespace>/<number>/<key>` ([`Name::namespace`],
//! [`Name::local`]). To us they are one flat space of opaque strings, in which active snapshots,
//! views and committed snapshots live side by side. A client's own names (a chain ID, a container's
//! ID) exist only in containerd's database, one entry per namespace, and several entries may lead
//! to one of our names.
//!
//! # Sharing between namespaces
//!
//! An unpacker that passes `containerd.io/snapshot.ref` to Prepare says which chain ID it is about
//! to make. If we have it, we answer AlreadyExists, and containerd asks for the committed snapshots
//! with that label *and the parent it passed*, and enters the first one for the caller. So there
//! are two cases ([`Store::prepare`]):
//!
//! - A snapshot with this chain ID has that very parent: nothing has to be written.
//! - One has a parent of another name but of the same chain (both namespaces unpacked the base for
//!   themselves), or carries the chain ID only in its name: the key becomes an *alias*, a committed
//!   snapshot of its own with the parent that was passed and the same files.
//!
//! Files belong to a directory, not to a name: a directory goes when its last name goes.
//! [`Store::usage`] tells each name the whole size, since namespaces are accounted one by one;
//! [`Store::totals`] counts a directory once.
//!
//! # Truth and order
//!
//! `db.redb` is the truth. A change is flushed before it is answered; directories are made before
//! it and renamed into `trash/` after it. So a kill at any point leaves one of two things, both
//! mended by [`Store::open`]: a directory that no row names goes to the trash; a row whose
//! directory was lost (a power cut on a file system that does not order the two) is kept and is an
//! error on use. Bytes are counted after Commit, in the background, because containerd holds its
//! own write transaction meanwhile.
//!
//! Reads (Stat, List, Mounts) come from an index in memory, which a writer locks only to apply what
//! is on the disk already.
//!
//! # Layers that are not unpacked
//!
//! They come through a port, [`LazyLayers`], which is asked while no lock is held. A Prepare that
//! names such a layer is answered AlreadyExists, with a committed snapshot that has the layer in
//! the place of a directory; whoever asks for the same chain ID meanwhile waits for the answer.
//! Overlays mix both kinds of lower directories. A layer is mounted before it is named to anybody,
//! and until a while after the last active snapshot or view above it has gone ([`Store::work`]
//! unmounts it); what is needed at a start is mounted before [`Store::open`] returns. Containers
//! have references of their own. A layer that a stack has twice is in its overlay once, where it is
//! uppermost: it has nothing to add below itself.
//!
//! # User namespaces
//!
//! With [`Options::remap_ids`], which containerd 2 has to be told by the capability `remap-ids`, a
//! container's lower directories are clones of the mounts with mapped ids: one for each layer that
//! is a mount, and one of the directories of all snapshots. containerd's own option for it
//! (`uidmap=`) is of no use: versions of it clone the directory that all have in common without the
//! mounts in it, which shows layers empty.
//!
//! Dependencies worth a word: `redb` is one file with transactions, and gives its cache a limit;
//! `regex` is what `~=` of containerd's filters means; `rustix` for `openat2`, which keeps walks
//! below their root and on their mount.

#![cfg_attr(test, allow(clippy::unwrap_used))]

mod db;
mod disk;
mod filter;
mod index;
mod lazy;
mod mapped;
mod model;
mod mounts;
mod store;

#[cfg(test)]
mod tests;

pub use filter::Filters;
pub use lazy::{Below, LazyLayers, NoLazyLayers, Restored};
pub use model::{
    Info, Kind, Labels, LayerId, MAX_LABELS, MAX_NAME, Mount, Name, SNAPSHOT_REF, Time, Usage,
};
pub use store::{Options, Sharing, Store, Totals, Xino};
