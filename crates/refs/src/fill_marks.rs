//! Marks on the disk of named states that are being filled: one that its daemon did not live to
//! fill is half of something, and is removed at the next start.

use crate::id::RefId;
use shipway_fault::{Fault, Result};
use shipway_task::blocking;
use std::{collections::HashSet, fs, io::ErrorKind, path::PathBuf};

/// A directory with an empty file for each state that is being filled, named by its id.
pub(crate) struct FillMarks(PathBuf);

impl FillMarks {
    /// Those in `dir`, which need not be there.
    pub fn new(dir: PathBuf) -> Self {
        Self(dir)
    }

    /// Marks a state.
    pub async fn add(&self, id: &RefId) -> Result<()> {
        let (dir, path) = (self.0.clone(), self.0.join(&id.0));
        let write = move || {
            fs::create_dir_all(&dir)
                .and_then(|()| fs::write(&path, ""))
                .map_err(|e| Fault::io(format!("write {}", path.display()), e))
        };
        blocking("mark a state", write).await
    }

    /// The state is whole.
    pub async fn remove(&self, id: &RefId) -> Result<()> {
        let path = self.0.join(&id.0);
        let remove = move || match fs::remove_file(&path) {
            Err(e) if e.kind() != ErrorKind::NotFound => {
                Err(Fault::io(format!("remove {}", path.display()), e))
            }
            _ => Ok(()),
        };
        blocking("unmark a state", remove).await
    }

    /// The states that an earlier run marked.
    pub async fn list(&self) -> Result<HashSet<RefId>> {
        let dir = self.0.clone();
        let list = move || {
            let entries = match fs::read_dir(&dir) {
                Err(e) if e.kind() == ErrorKind::NotFound => return Ok(HashSet::new()),
                entries => entries,
            };
            entries
                .and_then(|entries| entries.collect::<Result<Vec<_>, _>>())
                .map(|all| {
                    let name = |e: fs::DirEntry| e.file_name().into_string().ok().map(RefId);
                    all.into_iter().filter_map(name).collect()
                })
                .map_err(|e| Fault::io(format!("list {}", dir.display()), e))
        };
        blocking("read marks of states", list).await
    }
}
