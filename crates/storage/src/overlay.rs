//! The marks that an overlay leaves in its directories: names that are gone, and directories that
//! hide what lies below (the kernel's `filesystems/overlayfs`).

use rustix::{
    fd::AsFd,
    fs::{FileType, Stat},
};
use std::path::Path;

/// The namespace of extended attributes in which an overlay leaves its marks (mount option
/// `userxattr`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Marks {
    /// `trusted.overlay.`
    #[default]
    Trusted,
    /// `user.overlay.`
    User,
}

impl Marks {
    /// How the names of its attributes begin.
    pub fn prefix(self) -> &'static [u8] {
        match self {
            Self::Trusted => b"trusted.overlay.",
            Self::User => b"user.overlay.",
        }
    }

    /// Name of the attribute of a directory that hides what lies below it.
    pub fn opaque(self) -> &'static str {
        match self {
            Self::Trusted => "trusted.overlay.opaque",
            Self::User => "user.overlay.opaque",
        }
    }

    /// Whether the directory at `path` hides what lies below it; links are not followed.
    pub fn is_opaque(self, path: &Path) -> bool {
        let mut value = [0_u8; 8];
        let found = rustix::fs::lgetxattr(path, self.opaque(), &mut value);
        found == Ok(1) && value[0] == b'y'
    }

    /// Whether the open directory has the mark at all, whatever its value.
    pub fn has_opaque(self, dir: impl AsFd) -> bool {
        rustix::fs::fgetxattr(dir, self.opaque(), &mut [0_u8; 8][..]).is_ok()
    }
}

/// Whether `stat` is of a whiteout, which removes a name from the layers below: a character device
/// 0:0.
pub fn is_whiteout(stat: &Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice && stat.st_rdev == 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{CWD, Mode, XattrFlags, makedev, mknodat};
    use std::fs;

    #[test]
    fn marks_are_told_from_what_looks_like_them() {
        assert!(rustix::process::geteuid().is_root(), "run as root, as `cargo xtask test` does");
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = |name: &str| dir.path().join(name);
        for (name, device) in [("gone", 0), ("null", makedev(1, 3))] {
            let mode = Mode::from_raw_mode(0);
            mknodat(CWD, path(name), FileType::CharacterDevice, mode, device).expect("mknod");
        }
        let stat = |name: &str| rustix::fs::lstat(path(name)).expect("stat");
        assert!(is_whiteout(&stat("gone")) && !is_whiteout(&stat("null")));
        for (name, value) in [("opaque", b"y"), ("merged", b"n")] {
            fs::create_dir(path(name)).expect("mkdir");
            let key = Marks::Trusted.opaque();
            rustix::fs::setxattr(path(name), key, value, XattrFlags::empty()).expect("setxattr");
        }
        assert!(Marks::Trusted.is_opaque(&path("opaque")));
        assert!(!Marks::Trusted.is_opaque(&path("merged")));
        assert!(!Marks::User.is_opaque(&path("opaque")));
        let open = |name: &str| fs::File::open(path(name)).expect("open");
        assert!(Marks::Trusted.has_opaque(open("merged")));
        assert!(!Marks::User.has_opaque(open("opaque")));
    }
}
