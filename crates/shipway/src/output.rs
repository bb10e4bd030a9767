//! Writing results to standard output and to files.

use std::{
    collections::BTreeMap,
    fs::File,
    io::Write,
    path::{Path, PathBuf},
};

use base64::{Engine, engine::general_purpose::STANDARD};
use serde_json::{Map, Value};
use shipway_fault::{Fault, Result};
use tokio::io::{AsyncWrite, BufWriter};

/// Bytes that are written at once.
const BUFFER: usize = 256 << 10;

/// Prints `text`. A reader that wants no more, such as `head`, is not an error.
pub(crate) fn print(text: &str) -> Result<()> {
    print_bytes(text.as_bytes())
}

/// The same for what may be no text.
pub(crate) fn print_bytes(bytes: &[u8]) -> Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(bytes).and_then(|()| out.flush()) {
        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Fault::io("write to standard output", e))
        }
        _ => Ok(()),
    }
}

/// Writes `path` whole or not at all.
pub(crate) fn write_file(path: &Path, data: &[u8]) -> Result<()> {
    write(path, data, 0o666)
}

/// The same for a file that nobody else may read.
pub(crate) fn write_private(path: &Path, data: &[u8]) -> Result<()> {
    write(path, data, 0o600)
}

/// The umask takes its part of `mode`.
fn write(path: &Path, data: &[u8], mode: u32) -> Result<()> {
    let failed = |e| Fault::io(format!("write {}", path.display()), e);
    let special = std::fs::metadata(path).is_ok_and(|m| !m.is_file());
    if special {
        return std::fs::write(path, data).map_err(failed);
    }
    let dir = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut file = tempfile::Builder::new()
        .prefix(".shipway-")
        .permissions(std::os::unix::fs::PermissionsExt::from_mode(mode))
        .tempfile_in(dir)
        .map_err(failed)?;
    file.write_all(data).map_err(failed)?;
    file.persist(path).map_err(|e| failed(e.error)).map(drop)
}

/// A file that is written piece by piece, and has its name once it is whole; or standard output.
pub(crate) enum NewFile {
    Stdout,
    File {
        file: tempfile::NamedTempFile,
        path: PathBuf,
    },
    /// What is there and no file, such as a pipe.
    Special(File),
}

impl NewFile {
    /// Begins the file `path`, or standard output without one.
    pub(crate) fn open(path: Option<&Path>) -> Result<Self> {
        let Some(path) = path else { return Ok(Self::Stdout) };
        let failed = |e| Fault::io(format!("write {}", path.display()), e);
        if std::fs::metadata(path).is_ok_and(|found| !found.is_file()) {
            return File::options().write(true).open(path).map(Self::Special).map_err(failed);
        }
        let dir = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let file = tempfile::Builder::new()
            .prefix(".shipway-")
            .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666))
            .tempfile_in(dir)
            .map_err(failed)?;
        Ok(Self::File { file, path: path.to_owned() })
    }

    /// Where its bytes go. Writing does not block, so that it can be given up.
    pub(crate) fn writer(&self) -> Result<Box<dyn AsyncWrite + Send + Unpin>> {
        let of = |file: &File| -> Result<Box<dyn AsyncWrite + Send + Unpin>> {
            let file = file.try_clone().map_err(|e| Fault::io("write the file", e))?;
            Ok(Box::new(BufWriter::with_capacity(BUFFER, tokio::fs::File::from_std(file))))
        };
        match self {
            Self::Stdout => Ok(Box::new(BufWriter::with_capacity(BUFFER, tokio::io::stdout()))),
            Self::File { file, .. } => of(file.as_file()),
            Self::Special(file) => of(file),
        }
    }

    /// Gives it its name. One that is dropped before is gone.
    pub(crate) fn keep(self) -> Result<()> {
        match self {
            Self::File { file, path } => file
                .persist(&path)
                .map(drop)
                .map_err(|e| Fault::io(format!("write {}", path.display()), e.error)),
            Self::Stdout | Self::Special(_) => Ok(()),
        }
    }
}

/// What exporters answered, as the metadata file has it: values that are JSON objects in base64 as
/// objects (row `ct.b.meta`), and `more` among them.
pub(crate) fn metadata(response: &BTreeMap<String, String>, more: Map<String, Value>) -> String {
    let decode = |text: &String| {
        let data = STANDARD.decode(text).ok()?;
        let object: Map<String, Value> = serde_json::from_slice(&data).ok()?;
        (!object.is_empty()).then_some(Value::Object(object))
    };
    let values: BTreeMap<String, Value> = response
        .iter()
        .map(|(key, text)| (key.clone(), decode(text).unwrap_or_else(|| text.as_str().into())))
        .chain(more)
        .collect();
    serde_json::to_string_pretty(&values).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metadata_shows_objects_as_objects() {
        let response = BTreeMap::from([
            (
                "containerimage.descriptor".to_owned(),
                "eyJkaWdlc3QiOiJzaGEyNTY6YSIsInNpemUiOjd9".to_owned(),
            ),
            ("containerimage.digest".to_owned(), "sha256:a".to_owned()),
            ("empty".to_owned(), "e30=".to_owned()),
        ]);
        assert_eq!(
            metadata(&response, Map::new()),
            "{\n  \"containerimage.descriptor\": {\n    \"digest\": \"sha256:a\",\n    \"size\": 7\n  },\n  \"containerimage.digest\": \"sha256:a\",\n  \"empty\": \"e30=\"\n}"
        );
    }
}
