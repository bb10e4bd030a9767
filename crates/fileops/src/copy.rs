//! Copying between roots (rows `file.copy*`).
//!
//! One thread walks; files are copied by several. A directory gets its times when the last
//! worker in it is done, so that a copy has the times of its source throughout.

mod beside;
mod data;
mod tree;
mod work;

pub use beside::Beside;

use crate::{
    check,
    path::RootPath,
    place::{Ids, Root, fault, is_dir},
    settings::Settings,
    unpack, wildcard,
};
use rustix::io::Errno;
use shipway_fault::{Fault, Result};
use shipway_filesync::PathFilter;
use shipway_llb::FileCopy;
use tokio_util::sync::CancellationToken;

/// A file or directory to copy.
struct Source {
    path: RootPath,
    /// Whether it was written with `/.` at its end, so that a directory is merged with the
    /// destination.
    merged: bool,
}

/// Does the action.
pub(crate) fn run(
    source: &Root,
    target: &Root,
    copy: &FileCopy,
    owner: Option<Ids>,
    beside: Option<&Beside>,
    cancel: &CancellationToken,
) -> Result<()> {
    let settings = Settings::of(copy, owner, cancel)?;
    if !copy.create_dest_path {
        let above = target.real(&copy.dest.as_str().into())?.parent();
        target.lstat(&above).map_err(|e| {
            fault("lstat", &above, e).context(format!("failed to stat {}", copy.dest))
        })?;
    }
    let sources = if copy.allow_wildcard {
        let found = wildcard::resolve(source, &copy.src, copy.follow_symlink)?;
        if found.is_empty() {
            if copy.allow_empty_wildcard {
                return Ok(());
            }
            return Err(Fault::not_found(format!("{} not found", RootPath::from(&*copy.src))));
        }
        let wanted = named_out(copy)?;
        found
            .into_iter()
            .filter(|path| wanted(path))
            .map(|path| Source { path, merged: false })
            .collect()
    } else {
        vec![Source { path: copy.src.as_str().into(), merged: copy.src.ends_with("/.") }]
    };
    // Several sources may be one file by several ways.
    let beside = beside.filter(|_| sources.len() == 1 && copy.timestamp.is_none());
    for src in &sources {
        check(cancel)?;
        if copy.attempt_unpack
            && unpack::run(source, &src.path, target, &copy.dest.as_str().into(), &settings)?
        {
            continue;
        }
        one(source, src, target, &copy.dest, &settings, beside)?;
    }
    Ok(())
}

/// Which of the files and directories that a wildcard found are not excluded by name. The patterns
/// are relative to what is copied: within a directory that is its contents, but what the wildcard
/// itself found has only its name, or its whole path.
fn named_out(copy: &FileCopy) -> Result<impl Fn(&RootPath) -> bool> {
    let filter = PathFilter::new(&[], &copy.exclude_patterns)?;
    Ok(move |path: &RootPath| {
        let whole = path.to_string();
        filter.is_empty()
            || filter.keeps(&path.name().to_string_lossy())
                && filter.keeps(whole.trim_start_matches('/'))
    })
}

/// Directories made on the way whose times are set last.
struct Made<'a> {
    root: &'a Root,
    time: Option<i64>,
    dirs: Vec<RootPath>,
}

impl Made<'_> {
    fn finish(self) {
        let Some(time) = self.time else { return };
        self.dirs.iter().rev().for_each(|path| self.root.set_time(path, time));
    }
}

/// The directory that the path as written means to copy into.
fn directory_part(dest: &str) -> RootPath {
    let names_directory = dest.ends_with('/') || dest.ends_with("/.") || dest == ".";
    let whole = RootPath::from(dest);
    if names_directory { whole } else { whole.parent() }
}

/// Copies one source.
fn one(
    source: &Root,
    src: &Source,
    target: &Root,
    dest: &str,
    settings: &Settings,
    beside: Option<&Beside>,
) -> Result<()> {
    let mode = settings.mode.for_parents();
    let mut made = Made { root: target, time: settings.time, dirs: Vec::new() };
    made.dirs.extend(target.make_dirs(
        &directory_part(dest),
        mode,
        settings.owner,
        settings.time,
    )?);

    let from = source.real_entry(&src.path, settings.follow)?;
    let stat = source.source(&from)?;
    let mut to = target.real(&dest.into())?;
    let there = match target.stat(&to) {
        Ok(stat) => Some(stat),
        Err(Errno::NOENT | Errno::NOTDIR) => None,
        Err(e) => return Err(fault("lstat", &to, e).context("failed to lstat destination path")),
    };
    let goes_into = match &there {
        Some(_) if is_dir(&stat) => !settings.contents,
        Some(at) => is_dir(at),
        None => false,
    };
    if goes_into && !src.merged {
        to = to.join(src.path.name());
    }
    let needed = if settings.contents && is_dir(&stat) && there.is_none() {
        to.clone()
    } else {
        to.parent()
    };
    made.dirs.extend(target.make_dirs(&needed, mode, settings.owner, settings.time)?);

    let beside = beside.map(|b| b.of(&from, &to));
    tree::copy(source, &from, target, &to, settings, beside)?;
    made.finish();
    Ok(())
}

#[cfg(test)]
mod tests;
