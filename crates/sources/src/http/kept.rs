//! What is known of files that were fetched: in memory, and in one file of ours that may be lost.
//! The files themselves are states.

use crate::memo::KnownFile;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use shipway_fault::Fault;
use shipway_host::replace_file;
use shipway_oci::{Digest, timestamp};
use shipway_refs::RefId;
use std::{
    collections::HashMap,
    io::Read,
    io::Write as _,
    path::{Path, PathBuf},
    sync::Arc,
};

/// Most answers that are remembered.
const MAX_KNOWN: usize = 4096;
/// Largest file of them that is read.
const MAX_FILE: u64 = 16 << 20;

/// Known files by request.
#[derive(Default)]
pub(super) struct KnownFiles {
    all: Mutex<HashMap<Digest, (KnownFile, bool)>>,
    /// Held while the file is written, so that the last state is what stays.
    file: Option<Arc<tokio::sync::Mutex<PathBuf>>>,
}

/// One line of the file.
#[derive(Serialize, Deserialize)]
struct Line {
    request: Digest,
    digest: Digest,
    filename: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    etag: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    modified: Option<String>,
    state: String,
}

impl KnownFiles {
    /// Takes over what an earlier life knew. Blocks.
    pub(super) fn load(file: Option<PathBuf>) -> Self {
        let all = file.as_deref().map(read).unwrap_or_default();
        Self { all: Mutex::new(all), file: file.map(|f| Arc::new(tokio::sync::Mutex::new(f))) }
    }

    pub(super) fn get(&self, request: &Digest) -> Option<KnownFile> {
        self.all.lock().get(request).map(|(known, _)| known.clone())
    }

    /// Remembers a file; after a restart, too, if `lasting`.
    pub(super) async fn insert(&self, request: Digest, known: KnownFile, lasting: bool) {
        {
            let mut all = self.all.lock();
            if all.len() >= MAX_KNOWN {
                all.clear();
            }
            all.insert(request, (known, lasting));
        }
        let Some(file) = self.file.clone().filter(|_| lasting) else { return };
        let file = file.lock_owned().await;
        let text = self.text();
        let write = move || {
            write(&file, &text).map_err(|e| Fault::io(format!("write {}", file.display()), e))
        };
        if let Err(error) = shipway_task::blocking("remember downloaded files", write).await {
            tracing::warn!(%error, "failed to write the list of downloaded files");
        }
    }

    fn text(&self) -> String {
        let all = self.all.lock();
        let lines =
            all.iter().filter(|(_, (_, lasting))| *lasting).filter_map(|(request, (known, _))| {
                serde_json::to_string(&Line {
                    request: *request,
                    digest: known.digest,
                    filename: known.filename.clone(),
                    etag: known.etag.clone(),
                    modified: known.modified.map(timestamp::format),
                    state: known.state.0.clone(),
                })
                .ok()
            });
        lines.map(|line| line + "\n").collect()
    }
}

/// What is in the file, as far as it can be read: it may have been cut short.
fn read(path: &Path) -> HashMap<Digest, (KnownFile, bool)> {
    let mut text = String::new();
    if let Ok(file) = std::fs::File::open(path) {
        let _ = file.take(MAX_FILE).read_to_string(&mut text);
    }
    let known = |line: &str| {
        let line: Line = serde_json::from_str(line).ok()?;
        let modified = line.modified.as_deref().and_then(timestamp::parse);
        let known = KnownFile {
            digest: line.digest,
            filename: line.filename,
            etag: line.etag,
            modified,
            state: RefId(line.state),
        };
        Some((line.request, (known, true)))
    };
    text.lines().filter_map(known).take(MAX_KNOWN).collect()
}

fn write(path: &Path, text: &str) -> std::io::Result<()> {
    replace_file(path, 0o600, |file| file.write_all(text.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, UNIX_EPOCH};

    #[tokio::test]
    async fn what_is_known_is_known_after_a_restart_but_for_what_must_not_last() {
        let dir = tempfile::tempdir().unwrap();
        let file = Some(dir.path().join("files.json"));
        let known = |name: &str| KnownFile {
            digest: Digest::of(name),
            filename: name.into(),
            etag: Some("\"1\"".into()),
            modified: Some(UNIX_EPOCH + Duration::from_secs(1_700_000_000)),
            state: RefId("s".into()),
        };
        let first = KnownFiles::load(file.clone());
        first.insert(Digest::of("a"), known("a"), true).await;
        first.insert(Digest::of("b"), known("b"), false).await;
        first
            .insert(Digest::of("c"), KnownFile { etag: None, modified: None, ..known("c") }, true)
            .await;
        let second = KnownFiles::load(file.clone());
        assert_eq!(second.get(&Digest::of("a")), Some(known("a")));
        assert_eq!(second.get(&Digest::of("b")), None);
        assert_eq!(second.get(&Digest::of("c")), first.get(&Digest::of("c")));
        // A file that was cut short has its first entries still.
        let text = std::fs::read(file.as_ref().unwrap()).unwrap();
        std::fs::write(file.as_ref().unwrap(), &text[..text.len() - 5]).unwrap();
        let third = KnownFiles::load(file);
        assert_eq!([b"a", b"c"].iter().filter(|r| third.get(&Digest::of(r)).is_some()).count(), 1);
    }
}
