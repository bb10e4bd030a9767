//! Paths within a tree: links are followed as if the tree's root were `/`.

use shipway_fault::{Code, Fault, Result};
use std::{
    collections::VecDeque,
    ffi::OsString,
    fs::{self, Metadata},
    io,
    path::{Component, Path, PathBuf},
};

/// Links followed before it is a loop, as BuildKit has it.
const MAX_LINKS: usize = 255;

/// A path without links on its way.
#[derive(Debug)]
pub struct Resolved {
    /// The path, relative to the root; empty for the root itself.
    pub path: PathBuf,
    /// What is there.
    pub metadata: Metadata,
}

/// Resolves `path` within `root`; a link at its end is followed if `follow` says so. What is
/// missing is `NotFound`, in the words that clients know (`"/a/b": not found`).
pub fn resolve(root: &Path, path: &Path, follow: bool) -> Result<Resolved> {
    let mut left: VecDeque<OsString> = names(path);
    let mut at = PathBuf::new();
    let mut metadata = stat(root, &at, path)?;
    let mut links = 0;
    while let Some(name) = left.pop_front() {
        if name == ".." {
            at.pop();
            metadata = stat(root, &at, path)?;
            continue;
        }
        if !metadata.is_dir() {
            return Err(missing(path));
        }
        at.push(&name);
        metadata = stat(root, &at, path)?;
        if !metadata.is_symlink() || (left.is_empty() && !follow) {
            continue;
        }
        links += 1;
        if links > MAX_LINKS {
            return Err(Fault::invalid(format!(
                "{:?}: more than {MAX_LINKS} links on the way, which may be a loop",
                display(path)
            )));
        }
        let full = root.join(&at);
        let target = fs::read_link(&full)
            .map_err(|e| Fault::io(format!("read the link {}", display(&at)), e))?;
        at.pop();
        if target.is_absolute() {
            at.clear();
        }
        metadata = stat(root, &at, path)?;
        for name in names(&target).into_iter().rev() {
            left.push_front(name);
        }
    }
    Ok(Resolved { path: at, metadata })
}

fn names(path: &Path) -> VecDeque<OsString> {
    let name = |c| match c {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some("..".into()),
        _ => None,
    };
    path.components().filter_map(name).collect()
}

fn stat(root: &Path, at: &Path, asked: &Path) -> Result<Metadata> {
    fs::symlink_metadata(root.join(at)).map_err(|e| match e.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => missing(asked),
        io::ErrorKind::InvalidFilename => {
            Fault::new(Code::InvalidArgument, format!("{:?}: the path is too long", display(asked)))
        }
        _ => Fault::io(format!("look at {:?}", display(asked)), e),
    })
}

/// The path as users write it, from the root.
fn display(path: &Path) -> String {
    format!("/{}", path.to_string_lossy().trim_start_matches('/'))
}

pub(crate) fn missing(path: &Path) -> Fault {
    Fault::not_found(format!("{:?}: not found", display(path)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn links_stay_inside() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        fs::create_dir_all(root.join("a/b")).unwrap();
        fs::write(root.join("a/file"), "").unwrap();
        symlink("/a", root.join("abs")).unwrap();
        symlink("../../../a/b", root.join("a/up")).unwrap();
        symlink("loop", root.join("loop")).unwrap();
        for (path, follow, want) in [
            ("/", true, Some("")),
            ("a/b", true, Some("a/b")),
            ("abs/b", true, Some("a/b")),
            ("abs", false, Some("abs")),
            ("abs", true, Some("a")),
            ("a/up", true, Some("a/b")),
            ("../../a", true, Some("a")),
            ("a/file/x", true, None),
            ("nowhere", true, None),
        ] {
            let got = resolve(root, Path::new(path), follow);
            assert_eq!(got.as_ref().ok().and_then(|r| r.path.to_str()), want, "{path}");
            if want.is_none() {
                assert_eq!(got.unwrap_err().to_string(), format!("\"/{path}\": not found"));
            }
        }
        assert!(resolve(root, Path::new("loop"), true).is_err_and(|e| !e.is_not_found()));
    }
}
