//! What a package installs, in memory, and its tar: the same bytes for the same files, whoever
//! makes it and when.

use std::{collections::BTreeMap, io};

/// What is at a path.
#[derive(Clone, Debug)]
pub enum Entry {
    /// A directory.
    Directory,
    /// A file with these permission bits and contents.
    File(u32, Vec<u8>),
}

/// Files by their paths from the root, without a leading slash, and all directories above them.
#[derive(Clone, Debug, Default)]
pub struct Tree(BTreeMap<String, Entry>);

impl Tree {
    /// Adds a file, and the directories above it.
    pub fn file(&mut self, path: &str, mode: u32, contents: impl Into<Vec<u8>>) {
        for (at, _) in path.match_indices('/') {
            self.0.entry(path[..at].to_owned()).or_insert(Entry::Directory);
        }
        self.0.insert(path.to_owned(), Entry::File(mode, contents.into()));
    }

    /// Paths and contents of its files, in order.
    pub fn files(&self) -> impl Iterator<Item = (&str, &[u8])> {
        self.0.iter().filter_map(|(path, entry)| match entry {
            Entry::Directory => None,
            Entry::File(_, contents) => Some((path.as_str(), contents.as_slice())),
        })
    }

    /// Everything below another directory.
    pub fn below(&self, directory: &str) -> Self {
        let mut tree = Self::default();
        for (path, entry) in &self.0 {
            if let Entry::File(mode, contents) = entry {
                tree.file(&format!("{directory}/{path}"), *mode, contents.as_slice());
            }
        }
        tree
    }

    /// A tar of it, in which everything is root's and of the time `epoch` (seconds since 1970).
    /// Names begin with `prefix`.
    pub fn tar(&self, prefix: &str, epoch: u64) -> io::Result<Vec<u8>> {
        let mut tar = tar::Builder::new(Vec::new());
        let header = |kind: tar::EntryType, mode: u32, size: usize| -> io::Result<tar::Header> {
            let mut header = tar::Header::new_gnu();
            header.set_entry_type(kind);
            header.set_mode(mode);
            header.set_size(size as u64);
            header.set_mtime(epoch);
            header.set_uid(0);
            header.set_gid(0);
            header.set_username("root")?;
            header.set_groupname("root")?;
            Ok(header)
        };
        if !prefix.is_empty() {
            let mut root = header(tar::EntryType::Directory, 0o755, 0)?;
            tar.append_data(&mut root, prefix, io::empty())?;
        }
        for (path, entry) in &self.0 {
            let name = format!("{prefix}{path}");
            match entry {
                Entry::Directory => {
                    let mut header = header(tar::EntryType::Directory, 0o755, 0)?;
                    tar.append_data(&mut header, format!("{name}/"), io::empty())?;
                }
                Entry::File(mode, contents) => {
                    let mut header = header(tar::EntryType::Regular, *mode, contents.len())?;
                    tar.append_data(&mut header, name, contents.as_slice())?;
                }
            }
        }
        tar.into_inner()
    }
}
