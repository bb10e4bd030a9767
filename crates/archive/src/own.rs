//! Where a snapshot's own layer is, as its mounts show.

use crate::LayerTree;
use shipway_fault::{Fault, Result};
use shipway_storage::Mount;
use std::path::PathBuf;

/// The layer of an active snapshot, or of a committed one as its view shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OwnLayer {
    /// It is a directory of its own.
    Tree(LayerTree),
    /// The snapshotter has no layers to look at: this is the whole state, to be compared with its
    /// parent's ([`LayerTree::compared`]).
    Whole(PathBuf),
}

impl OwnLayer {
    /// Finds the layer of a snapshot with `mounts`; `has_parent` if it is not the lowest.
    ///
    /// # Errors
    ///
    /// `Unimplemented` if nothing is known of what such mounts show.
    pub fn of(mounts: &[Mount], has_parent: bool) -> Result<Self> {
        match mounts {
            [Mount::Overlay(overlay)] => {
                let frozen = overlay.frozen();
                let (top, below) = frozen.lower.split_first().ok_or_else(|| unknown(mounts))?;
                let lowest = below.is_empty() && !has_parent;
                Ok(Self::Tree(if lowest {
                    LayerTree::lowest(top)
                } else {
                    LayerTree::overlay(top, below.to_vec(), overlay.marks())
                }))
            }
            [Mount::Bind(bind)] if has_parent => Ok(Self::Whole(bind.source.clone())),
            [Mount::Bind(bind)] => Ok(Self::Tree(LayerTree::lowest(&bind.source))),
            _ => Err(unknown(mounts)),
        }
    }
}

fn unknown(mounts: &[Mount]) -> Fault {
    let kinds: Vec<&str> = mounts.iter().map(Mount::kind).collect();
    Fault::unimplemented(format!("finding the layer in a snapshot with mounts of kind {kinds:?}"))
        .hint("use a snapshotter whose mounts are overlays or binds: overlayfs, native")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::Marks;
    use shipway_storage::{Overlay, RawMount, Upper};

    #[test]
    fn the_own_layer_is_the_upper_or_the_topmost_directory() {
        let overlay = |upper: Option<&str>, lower: &[&str], options: &[&str]| {
            Mount::Overlay(Overlay {
                upper: upper.map(|dir| Upper { dir: dir.into(), work: "/w".into() }),
                lower: lower.iter().map(PathBuf::from).collect(),
                options: options.iter().map(|o| (*o).to_owned()).collect(),
                ..Overlay::default()
            })
        };
        let check = |mount: Mount, has_parent, want| {
            assert_eq!(OwnLayer::of(&[mount], has_parent).unwrap(), want);
        };
        let tree = |top: &str, below: &[&str], marks| {
            let below = below.iter().map(PathBuf::from).collect();
            OwnLayer::Tree(LayerTree::overlay(top, below, marks))
        };
        let lowest = |dir: &str| OwnLayer::Tree(LayerTree::lowest(dir));
        let active = overlay(Some("/u"), &["/a", "/b"], &[]);
        check(active, true, tree("/u", &["/a", "/b"], Marks::Trusted));
        let view = overlay(None, &["/a", "/b"], &["userxattr"]);
        check(view, true, tree("/a", &["/b"], Marks::User));
        check(overlay(None, &["/a"], &[]), true, tree("/a", &[], Marks::Trusted));
        check(overlay(None, &["/a"], &[]), false, lowest("/a"));
        check(Mount::bind("/s", false), false, lowest("/s"));
        check(Mount::bind("/s", true), true, OwnLayer::Whole("/s".into()));
    }

    #[test]
    fn mounts_that_are_not_understood_are_refused_by_kind() {
        let other = Mount::Other(RawMount { kind: "erofs".into(), ..RawMount::default() });
        for mounts in [vec![other.clone()], vec![Mount::bind("/s", true), other], vec![]] {
            let fault = OwnLayer::of(&mounts, true).unwrap_err();
            assert!(fault.is_unimplemented(), "{fault}");
        }
        let fault = OwnLayer::of(&[Mount::Other(RawMount::default())], true).unwrap_err();
        assert!(fault.to_string().contains("of kind [\"\"]"), "{fault}");
    }
}
