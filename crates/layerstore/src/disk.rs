//! Files that are there as a whole or not at all.

use crate::{Error, Result};
use std::{
    fs::{self, File},
    io::{self, Read as _, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

/// Makes a directory that only root enters, unless it is there.
pub(crate) fn make_directory(path: &Path) -> Result<()> {
    match fs::DirBuilder::new().recursive(true).mode(0o700).create(path) {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        made => made.map_err(Error::at("make", path)),
    }
}

/// A new file that is read and written.
pub(crate) fn create(path: &Path) -> Result<File> {
    let mut options = File::options();
    let file = options.read(true).write(true).create(true).truncate(true).mode(0o600).open(path);
    file.map_err(Error::at("create", path))
}

/// Waits until a file, or a directory's names, are on the disk.
pub(crate) fn sync(path: &Path, file: &File) -> Result<()> {
    file.sync_all().map_err(Error::at("sync", path))
}

/// Waits for several at once: file systems write down together what is asked for together.
pub(crate) fn sync_all(files: &[(PathBuf, File)]) -> Result<()> {
    let sync = |(path, file): &(PathBuf, File)| sync(path, file);
    std::thread::scope(|scope| {
        let start = |one| std::thread::Builder::new().spawn_scoped(scope, move || sync(one));
        let threads: Vec<_> = files.iter().map(start).collect();
        threads.into_iter().zip(files).try_for_each(|(thread, one)| match thread {
            Ok(thread) => thread.join().unwrap_or_else(|_| sync(one)),
            // There is no thread to be had.
            Err(_) => sync(one),
        })
    })
}

pub(crate) fn sync_directory(path: &Path) -> Result<()> {
    let directory = File::open(path).map_err(Error::at("open", path))?;
    sync(path, &directory)
}

/// Gives the file `name` in `directory` new contents, in one step.
pub(crate) fn replace(directory: &Path, name: &str, bytes: &[u8], durable: bool) -> Result<()> {
    let (path, new) = (directory.join(name), directory.join(format!("{name}.new")));
    let mut file = create(&new)?;
    file.write_all(bytes).map_err(Error::at("write", &new))?;
    if durable {
        sync(&new, &file)?;
    }
    fs::rename(&new, &path).map_err(Error::at("rename", &new))?;
    if durable { sync_directory(directory) } else { Ok(()) }
}

/// The contents of a file; `None` if they are more than `most` bytes.
pub(crate) fn read(path: &Path, most: u64) -> Result<Option<Vec<u8>>> {
    let file = File::open(path).map_err(Error::at("open", path))?;
    let mut bytes = Vec::new();
    file.take(most + 1).read_to_end(&mut bytes).map_err(Error::at("read", path))?;
    Ok(Some(bytes).filter(|b| b.len() as u64 <= most))
}
