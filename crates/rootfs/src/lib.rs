//! Root filesystems of steps, as the daemon looks into them and changes them from outside.
//!
//! A [`RootView`] shows what a snapshot's mounts describe to the daemon alone; [`Attached`] makes a
//! part of it appear at a path of the host, for containers. Built on them: who a user is in an
//! image ([`identity`]), the removal of mount points that a runtime made ([`Stubs`]), certificates
//! beside the image's own ([`Trust`]), which files are opened in it ([`Opened`]).
//!
//! Paths inside a root are opened here and nowhere else ([`open_in_root`], [`open_beneath`]), and
//! the table of mounts is read here ([`mounts_below`]). Crate `filesync` has an opening of its own,
//! because it also runs on the client's side, where kernels and sandboxes without the call are.
//!
//! Nothing here knows what asks for a root filesystem. `libc` is for fanotify, which rustix has
//! not; the only `unsafe` is there.

mod attached;
pub mod identity;
mod mountinfo;
mod noted;
mod open;
mod opened;
mod stubs;
mod trust;
mod view;

pub use attached::Attached;
pub use identity::Identity;
pub use mountinfo::mounts_below;
pub use open::{open_beneath, open_directory, open_in_root, reopen_regular};
pub use opened::Opened;
pub use stubs::Stubs;
pub use trust::{MAX_BUNDLE, Trust};
pub use view::{Access, RootView};
