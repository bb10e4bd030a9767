//! Clones of mounts with the ids of user namespaces, below `m/`: `m/<mapping>/s` of the directories
//! of all snapshots, `m/<mapping>/<n>` of layer n.

use crate::{model::lock, mounts::Tree};
use parking_lot::Mutex;
use shipway_fault::{Context as _, Fault, Result};
use shipway_layermount::{MappedIds, UserNamespace, clone_mapped, is_mount_point, scan, unmount};
use shipway_oci::Digest;
use std::{
    collections::HashMap,
    io::ErrorKind,
    path::{Path, PathBuf},
    sync::Arc,
};

pub(crate) struct Clones {
    root: PathBuf,
    namespaces: Mutex<HashMap<Arc<MappedIds>, Arc<UserNamespace>>>,
}

impl Clones {
    /// Takes away what an earlier life left: containers have their own, and what is needed is made
    /// again under the same path.
    pub(crate) fn open(root: PathBuf) -> Result<Self> {
        match std::fs::read_dir(&root) {
            Err(e) if e.kind() == ErrorKind::NotFound => {}
            Err(e) => return Err(Fault::io(format!("read {}", root.display()), e)),
            Ok(mappings) => {
                for left in scan(&root)? {
                    unmount(&left.at)?;
                }
                for mapping in mappings.flatten() {
                    let clones = std::fs::read_dir(mapping.path()).into_iter().flatten().flatten();
                    // Whatever is not an empty directory stays.
                    clones.for_each(|c| drop(std::fs::remove_dir(c.path())));
                    let _ = std::fs::remove_dir(mapping.path());
                }
            }
        }
        Ok(Self { root, namespaces: Mutex::default() })
    }

    fn directory(&self, ids: &MappedIds) -> PathBuf {
        // As long as it takes to be sure that no two are alike, and no longer.
        self.root.join(&Digest::of(ids.to_string()).hex()[..16])
    }

    fn path(&self, ids: &MappedIds, tree: Tree) -> PathBuf {
        self.directory(ids).join(match tree {
            Tree::Snapshots => "s".to_owned(),
            Tree::Layer(layer) => layer.0.to_string(),
        })
    }

    /// The clone of `from`, mounted.
    pub(crate) fn mount(&self, ids: &Arc<MappedIds>, tree: Tree, from: &Path) -> Result<PathBuf> {
        let at = self.path(ids, tree);
        let namespace = {
            // The directory of a mapping is made and removed by one at a time.
            let mut namespaces = lock(&self.namespaces);
            std::fs::create_dir_all(&at)
                .map_err(|e| Fault::io(format!("make {}", at.display()), e))?;
            if is_mount_point(&at)? {
                return Ok(at);
            }
            match namespaces.get(ids) {
                Some(known) => known.clone(),
                None => {
                    let made = Arc::new(UserNamespace::new(ids)?);
                    namespaces.insert(ids.clone(), made.clone());
                    made
                }
            }
        };
        clone_mapped(from, &namespace, &at)
            .context(|| format!("files for a user namespace with {ids}"))?;
        Ok(at)
    }

    pub(crate) fn unmount(&self, ids: &MappedIds, tree: Tree) -> Result<()> {
        let at = self.path(ids, tree);
        unmount(&at)?;
        let mut namespaces = lock(&self.namespaces);
        let _ = std::fs::remove_dir(&at);
        // The last one.
        if std::fs::remove_dir(self.directory(ids)).is_ok() {
            namespaces.remove(ids);
        }
        Ok(())
    }
}
