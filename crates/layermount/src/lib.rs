//! Layers as directories. A layer is an EROFS image: metadata in a small local file, contents in a
//! data file that is local, or that a FUSE server has (the *keeper*), which answers for what is
//! there and waits for what is not; where the kernel reads no such images, the server has the layer
//! as a directory. This crate knows files and mount points only.
//!
//! ```text
//! probe ──▶ Tier ──▶ Tier::served / Tier::local ──▶ Source ──▶ mount, swap, unmount
//!                                                     ▲
//!                                    scan, adopt ─────┘  after a restart
//! ```
//!
//! - [`Tier`] is a way in which this kernel can read layers that are not complete. [`probe()`]
//!   finds the best one by doing it once, with a small layer, never by the kernel's version.
//! - [`Source`] is what a mount reads. [`mount()`] mounts it, [`swap`] puts another one with the
//!   same contents in its place without the path ever being empty, [`unmount`] takes it away.
//! - [`scan()`] finds what an earlier life mounted, and [`adopt`] goes on with it or takes it away.
//! - [`is_used`] says whether anything has a file in use that is about to change.
//! - [`MappedIds`] and [`clone_mapped`] make clones of mounts for user namespaces.
//!
//! Mounts are read-only and neither `nosuid` nor `nodev`: they are what images are. They are made
//! in the mount namespace of the thread that calls. Nothing here keeps state, so two calls for one
//! path must not run at the same time.
//!
//! The kernel parses these images, so they have to be made by `shipway-erofs` from checked input,
//! never come from outside.
//!
//! `libc` is there for the few system calls that `rustix` lacks, which are `unsafe` and in one
//! module.

#![cfg_attr(test, allow(clippy::unwrap_used))]

mod idmap;
mod loops;
mod mount;
mod probe;
mod scan;
mod sys;
mod tier;

pub use idmap::{IdRange, MAX_RANGES, MappedIds, UserNamespace, clone_mapped};
pub use mount::{MAX_PATH, Unmounted, is_mount_point, is_used, mount, swap, unmount};
pub use probe::{Probe, ProbeLayer, probe};
pub use scan::{Mounted, adopt, mount_table, scan};
pub use tier::{FuseFiles, Source, Tier};

use shipway_fault::Fault;
use std::{fmt, io};

fn io_fault(what: impl fmt::Display, error: impl Into<io::Error>) -> Fault {
    Fault::io(what, error.into())
}
