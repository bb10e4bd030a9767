//! Files of a step: lists, and copies to this machine.

use std::{
    fs::File,
    io::Write,
    path::{Path, PathBuf},
    time::{Duration, UNIX_EPOCH},
};

use shipway_client::{DebugContainer, FileEntry};
use shipway_fault::{Context as _, Fault, Result};
use shipway_oci::timestamp;

/// Deepest directory that is copied.
const MAX_DEPTH: usize = 256;

/// Directories as a list, a line each.
pub(crate) fn listing(entries: &[FileEntry]) -> String {
    let line = |entry: &FileEntry| {
        let modified =
            UNIX_EPOCH + Duration::from_nanos(u64::try_from(entry.modified).unwrap_or_default());
        let link = match entry.link.is_empty() {
            true => String::new(),
            false => format!(" -> {}", entry.link),
        };
        let time = timestamp::format(modified);
        let time = time.split('.').next().unwrap_or(&time).trim_end_matches('Z').replace('T', " ");
        format!(
            "{} {:>5} {:>5} {:>10} {time} {}{link}\n",
            mode(entry.mode),
            entry.uid,
            entry.gid,
            entry.size,
            entry.name
        )
    };
    entries.iter().map(line).collect()
}

/// Type and permissions, as `ls` shows them, of what Go has for them.
fn mode(mode: u32) -> String {
    let kind = match () {
        () if mode & (1 << 31) != 0 => 'd',
        () if mode & (1 << 27) != 0 => 'l',
        () if mode & (1 << 21) != 0 => 'c',
        () if mode & (1 << 26) != 0 => 'b',
        () if mode & (1 << 25) != 0 => 'p',
        () if mode & (1 << 24) != 0 => 's',
        () => '-',
    };
    let bit = |n: u32| match ("rwxrwxrwx".as_bytes()[8 - n as usize] as char, mode & (1 << n)) {
        (_, 0) => '-',
        (letter, _) => letter,
    };
    let mut text: Vec<char> = std::iter::once(kind).chain((0..9).rev().map(bit)).collect();
    for (special, at, letter) in [(23, 3, 's'), (22, 6, 's'), (20, 9, 't')] {
        if mode & (1 << special) != 0 {
            text[at] = if text[at] == 'x' { letter } else { letter.to_ascii_uppercase() };
        }
    }
    text.into_iter().collect()
}

/// Copies the file or directory `from` of a step to `to`, which must not be there, or is a
/// directory that gets it. Owners are not copied; devices and sockets are left out.
pub(crate) async fn copy(container: &DebugContainer, from: &str, to: &Path) -> Result<()> {
    let from = if from == "/" { from } else { from.trim_end_matches('/') };
    let entry = container.stat(from).await.context(|| format!("copy {from}"))?;
    let name = from.rsplit('/').next().filter(|name| !name.is_empty());
    let to = match (to.is_dir(), name) {
        (true, Some(name)) => to.join(plain(name)?),
        _ => to.to_owned(),
    };
    copy_entry(container, from.to_owned(), entry, to).await
}

/// A name that leads nowhere else.
fn plain(name: &str) -> Result<&str> {
    match name.is_empty() || name == "." || name == ".." || name.contains(['/', '\0']) {
        true => Err(Fault::invalid(format!("the daemon has a file called {name:?}"))),
        false => Ok(name),
    }
}

async fn copy_entry(
    container: &DebugContainer,
    from: String,
    entry: FileEntry,
    to: PathBuf,
) -> Result<()> {
    let mut queue = vec![(from, entry, to, 0)];
    while let Some((from, entry, to, depth)) = queue.pop() {
        let failed = |e| Fault::io(format!("write {}", to.display()), e);
        if entry.is_dir() {
            if depth == MAX_DEPTH {
                return Err(Fault::invalid(format!("{from} is too deep to be copied")));
            }
            // Nothing that is there is written through.
            std::fs::create_dir(&to).map_err(failed)?;
            let entries = container.list(&from).await.context(|| format!("copy {from}"))?;
            for entry in entries {
                let name = plain(&entry.name)?;
                let below = format!("{}/{name}", from.trim_end_matches('/'));
                let to = to.join(name);
                queue.push((below, entry, to, depth + 1));
            }
        } else if !entry.link.is_empty() && entry.mode & (1 << 27) != 0 {
            std::os::unix::fs::symlink(&entry.link, &to).map_err(failed)?;
        } else if entry.is_file() {
            use std::os::unix::fs::OpenOptionsExt as _;
            let mut options = File::options();
            let mut file = options
                .write(true)
                .create_new(true)
                .mode(entry.mode & 0o777)
                .open(&to)
                .map_err(failed)?;
            let write = |data: &[u8]| file.write_all(data).map_err(failed);
            container.read(&from, write).await.context(|| format!("copy {from}"))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_listed_with_type_and_permissions() {
        for (bits, expected) in [
            (0o644, "-rw-r--r--"),
            (1 << 31 | 0o755, "drwxr-xr-x"),
            (1 << 31 | 1 << 20 | 0o777, "drwxrwxrwt"),
            (1 << 27 | 0o777, "lrwxrwxrwx"),
            (1 << 23 | 0o755, "-rwsr-xr-x"),
            (1 << 22 | 0o644, "-rw-r-Sr--"),
            (1 << 26 | 1 << 21 | 0o600, "crw-------"),
        ] {
            assert_eq!(mode(bits), expected);
        }
        let entry = FileEntry {
            name: "a".into(),
            mode: 1 << 27 | 0o777,
            uid: 1,
            gid: 2,
            size: 3,
            modified: 86_400_000_000_000,
            link: "b".into(),
        };
        assert_eq!(
            listing(&[entry]),
            "lrwxrwxrwx     1     2          3 1970-01-02 00:00:00 a -> b\n"
        );
    }

    #[test]
    fn names_lead_nowhere_else() {
        for wrong in ["", ".", "..", "a/b", "../x", "a\0"] {
            assert!(plain(wrong).is_err(), "{wrong:?}");
        }
        assert_eq!(plain("a..b").unwrap(), "a..b");
    }
}
