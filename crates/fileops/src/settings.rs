//! What a copy does with each file.

use crate::{check, chmod::Symbolic, place::Ids};
use rustix::fs::RawMode;
use shipway_fault::Result;
use shipway_filesync::PathFilter;
use shipway_llb::FileCopy;
use tokio_util::sync::CancellationToken;

const DIRECTORY_MODE: RawMode = 0o755;

/// What happens to permissions.
#[derive(Clone, Debug)]
pub(crate) enum ModeChange {
    Keep,
    Bits(RawMode),
    Symbolic(Symbolic),
}

impl ModeChange {
    fn of(copy: &FileCopy) -> Result<Self> {
        Ok(match (copy.mode_str.as_str(), copy.mode) {
            ("", None) => Self::Keep,
            ("", Some(bits)) => Self::Bits(bits & 0o7777),
            (text, _) => Self::Symbolic(Symbolic::parse(text)?),
        })
    }

    pub(crate) fn apply(&self, mode: RawMode, is_dir: bool) -> RawMode {
        match self {
            Self::Keep => mode & 0o7777,
            Self::Bits(bits) => *bits,
            Self::Symbolic(s) => s.apply(mode, is_dir),
        }
    }

    /// Of directories that are made on the way.
    pub(crate) fn for_parents(&self) -> RawMode {
        if let Self::Bits(bits) = self { bits & 0o777 } else { DIRECTORY_MODE }
    }
}

/// What is the same for all files of one action.
pub(crate) struct Settings {
    pub(crate) owner: Option<Ids>,
    pub(crate) time: Option<i64>,
    pub(crate) mode: ModeChange,
    pub(crate) filter: PathFilter,
    pub(crate) follow: bool,
    pub(crate) contents: bool,
    pub(crate) replace: bool,
    pub(crate) cancel: CancellationToken,
}

impl Settings {
    /// Fails once the copy is not wanted any more.
    pub(crate) fn check(&self) -> Result<()> {
        check(&self.cancel)
    }

    pub(crate) fn of(
        copy: &FileCopy,
        owner: Option<Ids>,
        cancel: &CancellationToken,
    ) -> Result<Self> {
        Ok(Self {
            owner,
            time: copy.timestamp,
            mode: ModeChange::of(copy)?,
            filter: PathFilter::new(&copy.include_patterns, &copy.exclude_patterns)?,
            follow: copy.follow_symlink,
            contents: copy.dir_copy_contents,
            replace: copy.always_replace_existing_dest_paths,
            cancel: cancel.clone(),
        })
    }
}
