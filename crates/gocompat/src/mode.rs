//! `os.FileMode`: its bits, which fsutil's protocol and BuildKit's gateway use on every platform,
//! and those of Unix (row `cb.fsutil.stat`).

/// A file's type and permissions as Go numbers them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FileMode(pub u32);

/// What kind of thing a mode describes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FileKind {
    /// A file with content, or another name of one.
    Regular,
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink,
    /// A named pipe.
    Fifo,
    /// A character device.
    CharDevice,
    /// A block device.
    BlockDevice,
    /// A socket or something unknown.
    Other,
}

const DIR: u32 = 1 << 31;
const SYMLINK: u32 = 1 << 27;
const DEVICE: u32 = 1 << 26;
const FIFO: u32 = 1 << 25;
const SOCKET: u32 = 1 << 24;
const SETUID: u32 = 1 << 23;
const SETGID: u32 = 1 << 22;
const CHAR_DEVICE: u32 = 1 << 21;
const STICKY: u32 = 1 << 20;
const IRREGULAR: u32 = 1 << 19;
/// A character device has the bit of devices besides its own.
const CHAR: u32 = DEVICE | CHAR_DEVICE;
const TYPE: u32 = DIR | SYMLINK | FIFO | SOCKET | DEVICE | CHAR_DEVICE | IRREGULAR;

impl FileMode {
    /// A directory with the permissions `perm` (Unix bits).
    pub fn directory(perm: u32) -> Self {
        Self(DIR | from_bits(perm))
    }

    /// A regular file with the permissions `perm` (Unix bits).
    pub fn regular(perm: u32) -> Self {
        Self(from_bits(perm))
    }

    /// A symbolic link.
    pub fn symlink() -> Self {
        Self(SYMLINK | 0o777)
    }

    /// The Go mode of Unix's `st_mode`. Sockets come out as regular files, as
    /// fsutil's do: what reads these modes makes headers of tar archives of them.
    pub fn from_unix(st_mode: u32) -> Self {
        let kind = match st_mode & 0o170_000 {
            0o040_000 => DIR,
            0o120_000 => SYMLINK,
            0o010_000 => FIFO,
            0o060_000 => DEVICE,
            0o020_000 => CHAR,
            _ => 0,
        };
        Self(kind | from_bits(st_mode))
    }

    /// Permission bits with set-id and sticky bits, as Unix has them.
    pub fn permissions(self) -> u32 {
        let special = [(SETUID, 0o4000), (SETGID, 0o2000), (STICKY, 0o1000)];
        (self.0 & 0o777)
            | special.iter().filter(|(go, _)| self.0 & go != 0).map(|(_, unix)| unix).sum::<u32>()
    }

    /// What it is.
    pub fn kind(self) -> FileKind {
        match self.0 & TYPE {
            0 => FileKind::Regular,
            DIR => FileKind::Directory,
            SYMLINK => FileKind::Symlink,
            FIFO => FileKind::Fifo,
            DEVICE => FileKind::BlockDevice,
            CHAR => FileKind::CharDevice,
            _ => FileKind::Other,
        }
    }

    /// Whether it is a directory.
    pub fn is_dir(self) -> bool {
        self.0 & DIR != 0
    }
}

fn from_bits(unix: u32) -> u32 {
    let special = [(0o4000, SETUID), (0o2000, SETGID), (0o1000, STICKY)];
    (unix & 0o777) | special.iter().filter(|(u, _)| unix & u != 0).map(|(_, go)| go).sum::<u32>()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_convert_both_ways() {
        for (unix, go, kind) in [
            (0o100644, 0o644, FileKind::Regular),
            (0o104755, (1 << 23) | 0o755, FileKind::Regular),
            (0o041777, (1 << 31) | (1 << 20) | 0o777, FileKind::Directory),
            (0o120777, (1 << 27) | 0o777, FileKind::Symlink),
            (0o020600, (1 << 26) | (1 << 21) | 0o600, FileKind::CharDevice),
            (0o060600, (1 << 26) | 0o600, FileKind::BlockDevice),
            (0o010600, (1 << 25) | 0o600, FileKind::Fifo),
            (0o140600, 0o600, FileKind::Regular),
        ] {
            let mode = FileMode::from_unix(unix);
            assert_eq!(
                (mode.0, mode.kind(), mode.permissions()),
                (go, kind, unix & 0o7777),
                "{unix:o}"
            );
        }
    }
}
