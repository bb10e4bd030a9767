//! Where the context and the Dockerfile are: directories, URLs, or standard input.

use std::{
    io::Read,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use shipway_fault::{Fault, Result};
use tempfile::TempDir;

/// Largest Dockerfile on standard input.
const MAX_DOCKERFILE: u64 = 16 << 20;
/// Names of a Dockerfile that nobody named, in order.
const NAMES: [&str; 3] = ["Dockerfile", "dockerfile", "Containerfile"];

/// Where a context is.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// On this machine.
    Directory(PathBuf),
    /// Where the daemon finds it.
    Remote(String),
}

/// What a build reads.
#[derive(Debug)]
pub(super) struct Input {
    /// The context.
    pub(super) context: Place,
    /// Directory of the Dockerfile, if it is on this machine.
    pub(super) dockerfile_dir: Option<PathBuf>,
    /// Name of the Dockerfile in its directory.
    pub(super) filename: String,
    /// What standard input held; gone with this.
    _kept: Vec<TempDir>,
}

impl Input {
    /// Finds the context `context` and the Dockerfile `file`, reading standard input if one of them is `-`.
    pub(super) fn read(file: Option<&str>, context: &str) -> Result<Self> {
        if context == "-" {
            return match file {
                Some("-") => Err(Fault::invalid("invalid argument: can't use stdin for both build context and dockerfile")),
                _ => Self::from_stdin(file),
            };
        }
        if is_remote(context) {
            return Self::remote(file, context);
        }
        let dir = PathBuf::from(context);
        match std::fs::metadata(&dir) {
            Ok(found) if found.is_dir() => {}
            Ok(_) => {
                return Err(Fault::invalid(format!("the context {context} is not a directory")).hint("name its Dockerfile with --file"));
            }
            Err(e) => return Err(Fault::io(format!("unable to prepare context: open {context}"), e)),
        }
        let mut kept = Vec::new();
        let (dockerfile_dir, filename) = match file {
            Some("-") => {
                let dir = stdin_dockerfile(std::io::stdin())?;
                let path = dir.path().to_owned();
                kept.push(dir);
                (path, NAMES[0].to_owned())
            }
            Some(url) if is_remote(url) => {
                return Err(Fault::new(shipway_fault::Code::Unimplemented, format!("a Dockerfile from a URL ({url}) is not implemented"))
                    .hint("fetch it first, and pass it with --file - on standard input"));
            }
            Some(file) => split(Path::new(file))?,
            None => (dir.clone(), default_name(&dir)?),
        };
        Ok(Self { context: Place::Directory(dir), dockerfile_dir: Some(dockerfile_dir), filename, _kept: kept })
    }

    fn remote(file: Option<&str>, context: &str) -> Result<Self> {
        let (dir, filename, kept) = match file {
            Some("-") => {
                let dir = stdin_dockerfile(std::io::stdin())?;
                (Some(dir.path().to_owned()), NAMES[0].to_owned(), vec![dir])
            }
            // Within the context, which only the daemon sees.
            file => (None, file.unwrap_or(NAMES[0]).to_owned(), Vec::new()),
        };
        Ok(Self { context: Place::Remote(context.to_owned()), dockerfile_dir: dir, filename, _kept: kept })
    }

    /// A tar is a context; anything else is a Dockerfile, whose context is empty.
    fn from_stdin(file: Option<&str>) -> Result<Self> {
        let failed = |e| Fault::io("read the context from standard input", e);
        let mut head = vec![0; 1024];
        let mut stdin = std::io::stdin().lock();
        let mut length = 0;
        while length < head.len() {
            match stdin.read(&mut head[length..]).map_err(failed)? {
                0 => break,
                n => length += n,
            }
        }
        head.truncate(length);
        if head.is_empty() {
            return Err(Fault::invalid("standard input is empty").hint("pipe a Dockerfile or a tar into it"));
        }
        let rest = head.as_slice().chain(stdin);
        if is_tar(&head) {
            let dir = unpack(rest)?;
            let (path, filename) = (dir.path().to_owned(), file.map_or_else(|| default_name(dir.path()), |f| Ok(f.to_owned()))?);
            return Ok(Self { context: Place::Directory(path.clone()), dockerfile_dir: Some(path), filename, _kept: vec![dir] });
        }
        if file.is_some() {
            return Err(Fault::invalid("--file needs a tar on standard input, and what is there is none"));
        }
        let empty = temporary()?;
        let dockerfile = stdin_dockerfile(rest)?;
        Ok(Self {
            context: Place::Directory(empty.path().to_owned()),
            dockerfile_dir: Some(dockerfile.path().to_owned()),
            filename: NAMES[0].to_owned(),
            _kept: vec![empty, dockerfile],
        })
    }
}

/// Whether the daemon, and not we, must fetch `text`.
pub(super) fn is_remote(text: &str) -> bool {
    ["http://", "https://", "git://", "ssh://", "git@", "github.com/"].iter().any(|prefix| text.starts_with(prefix))
}

fn split(file: &Path) -> Result<(PathBuf, String)> {
    let missing = |e| Fault::io(format!("failed to read dockerfile: open {}", file.display()), e);
    if std::fs::metadata(file).map_err(missing)?.is_dir() {
        return Err(Fault::invalid(format!("failed to read dockerfile: {} is a directory", file.display())));
    }
    let name = file.file_name().and_then(|name| name.to_str());
    let name = name.ok_or_else(|| Fault::invalid(format!("{} cannot name a Dockerfile", file.display())))?;
    let dir = file.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    Ok((dir.to_owned(), name.to_owned()))
}

fn default_name(dir: &Path) -> Result<String> {
    let found = NAMES.iter().find(|name| dir.join(name).is_file());
    found.map(|name| (*name).to_owned()).ok_or_else(|| {
        Fault::not_found(format!("failed to read dockerfile: {} has none (looked for {})", dir.display(), NAMES.join(", ")))
            .hint("name it with --file")
    })
}

fn temporary() -> Result<TempDir> {
    tempfile::Builder::new().prefix("shipway-").tempdir().map_err(|e| Fault::io("make a temporary directory", e))
}

fn stdin_dockerfile(from: impl Read) -> Result<TempDir> {
    let failed = |e| Fault::io("read the Dockerfile from standard input", e);
    let mut text = Vec::new();
    from.take(MAX_DOCKERFILE + 1).read_to_end(&mut text).map_err(failed)?;
    if text.len() as u64 > MAX_DOCKERFILE {
        return Err(Fault::invalid("the Dockerfile on standard input is larger than 16 MB"));
    }
    let dir = temporary()?;
    std::fs::write(dir.path().join(NAMES[0]), text).map_err(failed)?;
    Ok(dir)
}

/// Whether this is the beginning of a tar, maybe compressed.
fn is_tar(head: &[u8]) -> bool {
    const COMPRESSED: [&[u8]; 4] = [b"\x1f\x8b\x08", b"BZh", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd"];
    COMPRESSED.iter().any(|magic| head.starts_with(magic)) || head.get(257..262) == Some(b"ustar")
}

/// Unpacks with the system's tar, which knows every compression there is and never writes outside its directory.
fn unpack(mut from: impl Read) -> Result<TempDir> {
    let dir = temporary()?;
    let archive = dir.path().with_extension("tar");
    let result = (|| {
        let failed = |e| Fault::io("read the context from standard input", e);
        let mut file = std::fs::File::create(&archive).map_err(failed)?;
        std::io::copy(&mut from, &mut file).map_err(failed)?;
        // From a file and not a pipe, because only then tar finds out the compression by itself.
        let output = Command::new("tar")
            .args(["--extract", "--no-same-owner", "--file"])
            .arg(&archive)
            .arg("--directory")
            .arg(dir.path())
            .stdin(Stdio::null())
            .output()
            .map_err(|e| Fault::io("unpack the context: start tar", e))?;
        if !output.status.success() {
            return Err(Fault::invalid(format!("unpack the context: {}", String::from_utf8_lossy(&output.stderr).trim())));
        }
        Ok(())
    })();
    let _ = std::fs::remove_file(&archive);
    result.map(|()| dir)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contexts_are_told_apart() {
        for (text, expected) in [
            ("https://example.com/x.git#main", true),
            ("git@example.com:x/y.git", true),
            ("github.com/x/y", true),
            (".", false),
            ("./https:", false),
        ] {
            assert_eq!(is_remote(text), expected, "{text}");
        }
        let dir = tempfile::tempdir().expect("temp dir");
        let context = dir.path().to_str().expect("utf-8");
        let failed = Input::read(None, context).expect_err("no Dockerfile");
        assert!(failed.to_string().contains("looked for Dockerfile, dockerfile, Containerfile"), "{failed}");
        std::fs::write(dir.path().join("Containerfile"), "FROM scratch\n").expect("writes");
        assert_eq!(Input::read(None, context).expect("found").filename, "Containerfile");
        std::fs::create_dir(dir.path().join("sub")).expect("creates");
        std::fs::write(dir.path().join("sub/x.Dockerfile"), "FROM scratch\n").expect("writes");
        let input = Input::read(Some(dir.path().join("sub/x.Dockerfile").to_str().expect("utf-8")), context).expect("found");
        assert_eq!((input.dockerfile_dir, input.filename.as_str()), (Some(dir.path().join("sub")), "x.Dockerfile"));
        assert!(Input::read(None, "/no/such/context").is_err());
        assert!(Input::read(Some("/no/such/file"), context).is_err());
    }

    #[test]
    fn a_tar_is_unpacked() {
        let dir = tempfile::tempdir().expect("temp dir");
        std::fs::write(dir.path().join("Dockerfile"), "FROM scratch\n").expect("writes");
        let tar = Command::new("tar").args(["-cz", "-C"]).arg(dir.path()).arg(".").output().expect("tar").stdout;
        assert!(is_tar(&tar) && !is_tar(b"FROM scratch\n"));
        let unpacked = unpack(tar.as_slice()).expect("unpacks");
        assert_eq!(std::fs::read_to_string(unpacked.path().join("Dockerfile")).expect("reads"), "FROM scratch\n");
        assert!(unpack(&b"\x1f\x8b\x08nonsense"[..]).is_err());
    }
}
