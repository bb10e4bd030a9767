//! What programs take from the host in one way: random numbers, files that are replaced as a whole,
//! how large a file system is and when it is full; and what they report to be missing on it
//! ([`doctor`]).
//!
//! `rustix` asks for sizes; `ring` reads the kernel's random numbers, as it does for the keys of
//! TLS; `tempfile` makes names that no other file has.

mod disk;
pub mod doctor;

pub use disk::{Disk, bytes_of, is_out_of_space};

use ring::rand::{SecureRandom as _, SystemRandom};
use shipway_fault::{Fault, Result};
use std::{
    fs::{File, Permissions},
    io,
    os::unix::fs::PermissionsExt as _,
    path::Path,
};

/// Random bytes that cannot be guessed.
///
/// # Errors
///
/// `Internal` if the kernel gives none.
pub fn random_bytes<const N: usize>() -> Result<[u8; N]> {
    let mut bytes = [0; N];
    SystemRandom::new()
        .fill(&mut bytes)
        .map_err(|_| Fault::internal("failed to read random numbers"))?;
    Ok(bytes)
}

/// An id that cannot be guessed: 25 lower-case letters and digits, as BuildKit's, of 128 random
/// bits, such as `r9wq1bz0k7v3m5d8xjc2hn4ta`.
///
/// # Errors
///
/// Those of [`random_bytes`].
pub fn random_id() -> Result<String> {
    let mut number = u128::from_be_bytes(random_bytes()?);
    let digit = |_| {
        let digit = b"0123456789abcdefghijklmnopqrstuvwxyz"[(number % 36) as usize];
        number /= 36;
        char::from(digit)
    };
    Ok((0..25).map(digit).collect())
}

/// Replaces the file `path` by one with what `fill` writes: readers see the old file or the new one
/// and nothing in between, and after an error the old one. A power cut may still lose both unless
/// `fill` syncs the file. `mode` is that of a new file, from which the umask is taken.
///
/// # Errors
///
/// Those of `fill`, and of making and renaming a file in the directory of `path`.
pub fn replace_file(
    path: &Path,
    mode: u32,
    fill: impl FnOnce(&mut File) -> io::Result<()>,
) -> io::Result<()> {
    let directory = path.parent().filter(|p| !p.as_os_str().is_empty());
    let mut new = tempfile::Builder::new()
        .prefix(".new-")
        .permissions(Permissions::from_mode(mode))
        .tempfile_in(directory.unwrap_or(Path::new(".")))?;
    fill(new.as_file_mut())?;
    new.persist(path).map(drop).map_err(|e| e.error)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use std::io::Write as _;

    #[test]
    fn ids_are_long_and_never_the_same() {
        let (one, other) = (random_id().unwrap(), random_id().unwrap());
        assert!(one.len() == 25 && one.bytes().all(|b| b.is_ascii_alphanumeric()), "{one}");
        assert_ne!(one, other);
    }

    #[test]
    fn a_file_is_replaced_whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let write = |text: &'static str| move |file: &mut File| file.write_all(text.as_bytes());
        replace_file(&path, 0o640, write("one")).unwrap();
        replace_file(&path, 0o640, write("two")).unwrap();
        let failed = replace_file(&path, 0o640, |file| {
            file.write_all(b"half")?;
            Err(io::Error::other("no"))
        });
        assert_eq!(failed.unwrap_err().to_string(), "no");
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "two");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777 & !0o640, 0);
    }
}
