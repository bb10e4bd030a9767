//! Where the context and the Dockerfile are: directories, URLs, or standard input.

use std::{
    io::Read,
    path::{Path, PathBuf},
};

use shipway_fault::{Fault, Result};
use tempfile::{NamedTempFile, TempDir};

/// Largest Dockerfile on standard input.
const MAX_DOCKERFILE: u64 = 16 << 20;
/// Default names of a Dockerfile, in order.
const NAMES: [&str; 3] = ["Dockerfile", "dockerfile", "Containerfile"];

/// What a Dockerfile on standard input is called.
const STDIN: &str = "stdin";

/// Where a context is.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// On this machine.
    Directory(PathBuf),
    /// Where the daemon finds it.
    Remote(String),
    /// A tar on standard input, of which this was read already.
    Stdin(Vec<u8>),
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
    /// What the user calls it.
    pub(super) shown: String,
    /// Where the daemon gets the Dockerfile from, if that is neither this machine nor the context.
    pub(super) dockerfile_url: Option<String>,
    /// What standard input held; gone with this.
    _kept: Vec<TempDir>,
}

impl Input {
    /// Finds the context `context` and the Dockerfile `file`, reading standard input if one of them
    /// is `-`.
    pub(super) fn read(file: Option<&str>, context: &str) -> Result<Self> {
        if context == "-" {
            return match file {
                Some("-") => Err(Fault::invalid(
                    "invalid argument: can't use stdin for both build context and dockerfile",
                )),
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
                return Err(Fault::invalid(format!("the context {context} is not a directory"))
                    .hint("name its Dockerfile with --file"));
            }
            Err(e) => {
                return Err(Fault::io(format!("unable to prepare context: open {context}"), e));
            }
        }
        let context = Place::Directory(dir.clone());
        match file {
            Some("-") => {
                let dir = stdin_dockerfile(std::io::stdin())?;
                Ok(Self {
                    dockerfile_dir: Some(dir.path().to_owned()),
                    shown: STDIN.to_owned(),
                    _kept: vec![dir],
                    ..Self::of(context, NAMES[0])
                })
            }
            Some(url) if is_download(url) => Ok(Self {
                dockerfile_url: Some(url.to_owned()),
                shown: url.to_owned(),
                ..Self::of(context, NAMES[0])
            }),
            Some(file) => {
                let (dir, filename) = split(Path::new(file))?;
                Ok(Self {
                    dockerfile_dir: Some(dir),
                    shown: file.to_owned(),
                    ..Self::of(context, &filename)
                })
            }
            None => {
                let filename = default_name(&dir)?;
                let shown = dir.components().collect::<PathBuf>().join(&filename);
                let shown =
                    shown.strip_prefix(".").unwrap_or(&shown).to_string_lossy().into_owned();
                Ok(Self { dockerfile_dir: Some(dir), shown, ..Self::of(context, &filename) })
            }
        }
    }

    /// A context whose Dockerfile is `text`, which is called `shown`.
    pub(super) fn inline(context: &str, text: &str, shown: &str) -> Result<Self> {
        let place = match is_remote(context) {
            true => Place::Remote(context.to_owned()),
            false => Place::Directory(PathBuf::from(context)),
        };
        let dir = stdin_dockerfile(text.as_bytes())?;
        Ok(Self {
            dockerfile_dir: Some(dir.path().to_owned()),
            shown: shown.to_owned(),
            _kept: vec![dir],
            ..Self::of(place, NAMES[0])
        })
    }

    /// A context with a Dockerfile in it.
    fn of(context: Place, filename: &str) -> Self {
        let filename = filename.to_owned();
        Self {
            context,
            dockerfile_dir: None,
            shown: filename.clone(),
            filename,
            dockerfile_url: None,
            _kept: Vec::new(),
        }
    }

    fn remote(file: Option<&str>, context: &str) -> Result<Self> {
        let place = Place::Remote(context.to_owned());
        match file {
            Some("-") => {
                let dir = stdin_dockerfile(std::io::stdin())?;
                Ok(Self {
                    dockerfile_dir: Some(dir.path().to_owned()),
                    shown: STDIN.to_owned(),
                    _kept: vec![dir],
                    ..Self::of(place, NAMES[0])
                })
            }
            Some(url) if is_download(url) => Ok(Self {
                dockerfile_url: Some(url.to_owned()),
                shown: url.to_owned(),
                ..Self::of(place, NAMES[0])
            }),
            // Within the context, which only the daemon sees.
            file => Ok(Self::of(place, file.unwrap_or(NAMES[0]))),
        }
    }

    /// The address of a Dockerfile that the daemon has to fetch before it is offered to it: a
    /// context from elsewhere takes one from directories only.
    pub(super) fn awaited_dockerfile(&self) -> Option<String> {
        let is_remote = matches!(self.context, Place::Remote(_));
        self.dockerfile_url.clone().filter(|_| is_remote && self.dockerfile_dir.is_none())
    }

    /// Takes the text of the Dockerfile that was awaited.
    pub(super) fn take_dockerfile(&mut self, text: &[u8]) -> Result<()> {
        let dir = stdin_dockerfile(text)?;
        self.dockerfile_dir = Some(dir.path().to_owned());
        self._kept.push(dir);
        Ok(())
    }

    /// The context, if it comes on standard input, as a file that several can read.
    pub(super) fn spool(&self) -> Result<Option<NamedTempFile>> {
        let Place::Stdin(head) = &self.context else { return Ok(None) };
        let failed = |e| Fault::io("keep the context from standard input", e);
        let mut file = tempfile::Builder::new().prefix("shipway-").tempfile().map_err(failed)?;
        let mut whole = head.as_slice().chain(std::io::stdin().lock());
        std::io::copy(&mut whole, &mut file).map_err(failed)?;
        Ok(Some(file))
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
            return Err(Fault::invalid("standard input is empty")
                .hint("pipe a Dockerfile or a tar into it"));
        }
        if is_tar(&head) {
            return Ok(Self::of(Place::Stdin(head), file.unwrap_or(NAMES[0])));
        }
        if file.is_some() {
            return Err(Fault::invalid(
                "--file needs a tar on standard input, and what is there is none",
            ));
        }
        let empty = temporary()?;
        let dockerfile = stdin_dockerfile(head.as_slice().chain(stdin))?;
        let context = Place::Directory(empty.path().to_owned());
        let (dockerfile_dir, shown) = (Some(dockerfile.path().to_owned()), STDIN.to_owned());
        Ok(Self {
            dockerfile_dir,
            shown,
            _kept: vec![empty, dockerfile],
            ..Self::of(context, NAMES[0])
        })
    }
}

/// Whether `text` is a file to download.
fn is_download(text: &str) -> bool {
    text.starts_with("http://") || text.starts_with("https://")
}

/// Whether the daemon, and not we, must fetch `text`.
pub(crate) fn is_remote(text: &str) -> bool {
    ["http://", "https://", "git://", "ssh://", "git@", "github.com/"]
        .iter()
        .any(|prefix| text.starts_with(prefix))
}

fn split(file: &Path) -> Result<(PathBuf, String)> {
    let missing = |e| Fault::io(format!("failed to read dockerfile: open {}", file.display()), e);
    if std::fs::metadata(file).map_err(missing)?.is_dir() {
        return Err(Fault::invalid(format!(
            "failed to read dockerfile: {} is a directory",
            file.display()
        )));
    }
    let name = file.file_name().and_then(|name| name.to_str());
    let name =
        name.ok_or_else(|| Fault::invalid(format!("{} cannot name a Dockerfile", file.display())))?;
    let dir = file.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    Ok((dir.to_owned(), name.to_owned()))
}

fn default_name(dir: &Path) -> Result<String> {
    let found = NAMES.iter().find(|name| dir.join(name).is_file());
    found.map(|name| (*name).to_owned()).ok_or_else(|| {
        Fault::not_found(format!(
            "failed to read dockerfile: {} has none (looked for {})",
            dir.display(),
            NAMES.join(", ")
        ))
        .hint("name it with --file")
    })
}

fn temporary() -> Result<TempDir> {
    tempfile::Builder::new()
        .prefix("shipway-")
        .tempdir()
        .map_err(|e| Fault::io("make a temporary directory", e))
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
pub(crate) fn is_tar(head: &[u8]) -> bool {
    const COMPRESSED: [&[u8]; 4] = [b"\x1f\x8b\x08", b"BZh", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd"];
    COMPRESSED.iter().any(|magic| head.starts_with(magic)) || head.get(257..262) == Some(b"ustar")
}

#[cfg(test)]
mod tests {
    use std::process::Command;

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
        assert!(
            failed.to_string().contains("looked for Dockerfile, dockerfile, Containerfile"),
            "{failed}"
        );
        std::fs::write(dir.path().join("Containerfile"), "FROM scratch\n").expect("writes");
        assert_eq!(Input::read(None, context).expect("found").filename, "Containerfile");
        std::fs::create_dir(dir.path().join("sub")).expect("creates");
        std::fs::write(dir.path().join("sub/x.Dockerfile"), "FROM scratch\n").expect("writes");
        let input = Input::read(
            Some(dir.path().join("sub/x.Dockerfile").to_str().expect("utf-8")),
            context,
        )
        .expect("found");
        assert_eq!(
            (input.dockerfile_dir, input.filename.as_str()),
            (Some(dir.path().join("sub")), "x.Dockerfile")
        );
        assert_eq!(input.shown, dir.path().join("sub/x.Dockerfile").to_string_lossy());
        let input = Input::read(Some("https://example.com/x?y"), context).expect("a URL");
        assert_eq!((input.dockerfile_dir, input.shown.as_str()), (None, "https://example.com/x?y"));
        assert_eq!(input.dockerfile_url.as_deref(), Some("https://example.com/x?y"));
        let mut input = Input::read(Some("https://example.com/x"), "https://example.com/x.git")
            .expect("both from elsewhere");
        assert_eq!(input.awaited_dockerfile().as_deref(), Some("https://example.com/x"));
        input.take_dockerfile(b"FROM scratch\n").expect("writes");
        assert!(input.dockerfile_dir.is_some() && input.awaited_dockerfile().is_none());
        assert!(Input::read(None, "/no/such/context").is_err());
        assert!(Input::read(Some("/no/such/file"), context).is_err());
    }

    #[test]
    fn a_tar_is_told_from_a_dockerfile() {
        let dir = tempfile::tempdir().expect("temp dir");
        std::fs::write(dir.path().join("Dockerfile"), "FROM scratch\n").expect("writes");
        for options in ["-c", "-cz"] {
            let tar = Command::new("tar")
                .args([options, "-C"])
                .arg(dir.path())
                .arg(".")
                .output()
                .expect("tar")
                .stdout;
            assert!(is_tar(&tar), "{options}");
        }
        assert!(!is_tar(b"FROM scratch\n") && !is_tar(b""));
    }
}
