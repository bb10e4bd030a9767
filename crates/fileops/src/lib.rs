//! File actions on directories: making, removing, linking, copying and unpacking files, confined to
//! a root by the kernel (`openat2`).
//!
//! What to do comes as plain types of crate `llb`; nothing here knows graphs, vertices or states,
//! except that a copy may put files beside an overlay ([`Beside`]). Everything blocks.

mod actions;
mod chmod;
mod copy;
mod owner;
mod path;
mod place;
mod required;
mod settings;
mod unpack;
mod wildcard;

pub use copy::Beside;
pub use owner::OwnerRoots;
pub use required::first_missing;

use place::Root;
use shipway_fault::{Fault, Result};
use shipway_llb::{Chown, FileActionKind};
use std::path::Path;
use tokio_util::sync::CancellationToken;

/// Who is to own what an action makes.
pub fn owner_of(kind: &FileActionKind) -> Option<&Chown> {
    match kind {
        FileActionKind::Copy(a) => a.owner.as_ref(),
        FileActionKind::Mkfile(a) => a.owner.as_ref(),
        FileActionKind::Mkdir(a) => a.owner.as_ref(),
        FileActionKind::Symlink(a) => a.owner.as_ref(),
        FileActionKind::Rm(_) => None,
    }
}

/// Does one action in the directory `target`; a copy is from the directory `source`, and ends soon
/// after `cancel` is cancelled.
pub fn apply(
    kind: &FileActionKind,
    target: &Path,
    source: Option<&Path>,
    owners: &OwnerRoots<'_>,
    beside: Option<&Beside>,
    cancel: &CancellationToken,
) -> Result<()> {
    let target = Root::open(target)?;
    let owner = owners.resolve(owner_of(kind))?;
    match kind {
        FileActionKind::Mkdir(a) => actions::mkdir(&target, a, owner),
        FileActionKind::Mkfile(a) => actions::mkfile(&target, a, owner),
        FileActionKind::Symlink(a) => actions::symlink(&target, a, owner),
        FileActionKind::Rm(a) => actions::rm(&target, a),
        FileActionKind::Copy(a) => {
            let source = source.ok_or_else(|| Fault::internal("a copy without a source"))?;
            copy::run(&Root::open(source)?, &target, a, owner, beside, cancel)
        }
    }
}

/// Fails once the work is not wanted any more.
pub(crate) fn check(cancel: &CancellationToken) -> Result<()> {
    if cancel.is_cancelled() { Err(Fault::cancelled()) } else { Ok(()) }
}
