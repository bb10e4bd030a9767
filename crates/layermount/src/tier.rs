//! Ways to read a layer.

use shipway_fault::Fault;
use std::{
    fmt,
    path::{Path, PathBuf},
    str::FromStr,
};

/// The files of one layer that a FUSE server has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FuseFiles {
    /// The contents of the layer's files.
    pub data: PathBuf,
    /// Metadata in the flat form, and then the contents.
    pub img: PathBuf,
    /// The layer as a directory.
    pub tree: PathBuf,
}

/// A way in which a kernel reads layers, best first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Tier {
    /// A: metadata from a local file, contents from the server's, no block device (Linux 6.12).
    File,
    /// A′: as A, with the metadata through the server as well, where the kernel does not read
    /// images from the local file system: tmpfs and stacked ones.
    FlatFile,
    /// B: as A, with a loop device on each of the two files (Linux 5.16). What is mounted can be
    /// moved to other files.
    Loop,
    /// B′: a loop device on the server's flat image (Linux 5.8).
    FlatLoop,
    /// C: the server has the layer as a directory, where the kernel has no EROFS, or none that may
    /// be mounted, as in a user namespace.
    FuseTree,
    /// D: layers are unpacked before they are used.
    NotLazy,
}

impl Tier {
    /// All, best first.
    pub const ALL: [Self; 6] =
        [Self::File, Self::FlatFile, Self::Loop, Self::FlatLoop, Self::FuseTree, Self::NotLazy];

    /// Its name in settings.
    pub fn name(self) -> &'static str {
        match self {
            Self::File => "file",
            Self::FlatFile => "flat-file",
            Self::Loop => "loop",
            Self::FlatLoop => "flat-loop",
            Self::FuseTree => "fuse-tree",
            Self::NotLazy => "none",
        }
    }

    /// What a mount of a layer reads whose contents the server has; `None` where there is no such
    /// mount. `meta` is the layer's local file of metadata.
    pub fn served(self, meta: &Path, files: &FuseFiles) -> Option<Source> {
        let (meta, FuseFiles { data, img, tree }) = (meta.to_owned(), files.clone());
        match self {
            Self::File => Some(Source::Files { meta, data }),
            Self::FlatFile => Some(Source::File(img)),
            Self::Loop => Some(Source::Loops { meta, data }),
            Self::FlatLoop => Some(Source::Loop(img)),
            Self::FuseTree => Some(Source::Tree(tree)),
            Self::NotLazy => None,
        }
    }

    /// What a mount of a layer reads that is whole on the disk; `None` where such a layer stays
    /// with the server, since this kernel needs one file for it, or reads no images.
    pub fn local(self, meta: &Path, data: &Path) -> Option<Source> {
        let (meta, data) = (meta.to_owned(), data.to_owned());
        match self {
            Self::File => Some(Source::Files { meta, data }),
            Self::FlatFile | Self::Loop => Some(Source::Loops { meta, data }),
            Self::FlatLoop | Self::FuseTree | Self::NotLazy => None,
        }
    }
}

impl fmt::Display for Tier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Tier {
    type Err = Fault;
    fn from_str(text: &str) -> Result<Self, Fault> {
        Self::ALL.into_iter().find(|tier| tier.name() == text).ok_or_else(|| {
            let names = Self::ALL.map(Self::name).join(", ");
            Fault::invalid(format!("no way to read layers is called {text:?}; there are {names}"))
        })
    }
}

/// What a mount reads. Paths are absolute, without links and `..`: what is mounted is recognized by
/// them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// An image with a device table, and its device, as files.
    Files {
        /// The metadata.
        meta: PathBuf,
        /// The contents.
        data: PathBuf,
    },
    /// A flat image as a file.
    File(PathBuf),
    /// An image with a device table, and its device, each under a loop device.
    Loops {
        /// The metadata.
        meta: PathBuf,
        /// The contents.
        data: PathBuf,
    },
    /// A flat image under a loop device.
    Loop(PathBuf),
    /// A directory of a FUSE server, directly below where that is mounted.
    Tree(PathBuf),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_back_and_others_refused() {
        for tier in Tier::ALL {
            assert_eq!(tier.to_string().parse::<Tier>().unwrap(), tier);
        }
        let error = "file ".parse::<Tier>().unwrap_err();
        assert!(error.to_string().contains("flat-loop"), "{error}");
    }
}
