//! Writing results to standard output and to files.

use std::{collections::BTreeMap, io::Write, path::Path};

use base64::{Engine, engine::general_purpose::STANDARD};
use serde_json::{Map, Value};
use shipway_fault::{Fault, Result};

/// Prints `text`. A reader that wants no more, such as `head`, is not an error.
pub(crate) fn print(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
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

/// What exporters answered, as the metadata file has it: values that are JSON objects in base64 as
/// objects (row `ct.b.meta`).
pub(crate) fn metadata(response: &BTreeMap<String, String>) -> String {
    let decode = |text: &String| {
        let data = STANDARD.decode(text).ok()?;
        let object: Map<String, Value> = serde_json::from_slice(&data).ok()?;
        (!object.is_empty()).then_some(Value::Object(object))
    };
    let values: Map<String, Value> = response
        .iter()
        .map(|(key, text)| (key.clone(), decode(text).unwrap_or_else(|| text.as_str().into())))
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
            metadata(&response),
            "{\n  \"containerimage.descriptor\": {\n    \"digest\": \"sha256:a\",\n    \"size\": 7\n  },\n  \"containerimage.digest\": \"sha256:a\",\n  \"empty\": \"e30=\"\n}"
        );
    }
}
