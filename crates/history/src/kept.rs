//! The history on disk, so that it outlives the daemon: a JSON file for each build that ended,
//! named by the digest of the build's id, which a client chose and which is not a file name; and
//! beside them logs and other files, named by their own digests.
//!
//! A file is written under another name and renamed, so that readers never see half of one. It
//! reaches the disk a moment later ([`Syncer`]), for a build does not wait for disks: what a power
//! cut leaves short is known by its size or its digest, and is then gone.

use super::{HistoryRecord, HistorySummary, LogFile};
use parking_lot::Mutex;
use shipway_fault::{Fault, Result};
use shipway_host::replace_file;
use shipway_oci::{Digest, Hasher};
use std::{
    collections::HashSet,
    fs::File,
    io::{self, BufWriter, Read, Write},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

/// What the name of a record's file ends in.
const RECORD: &str = "json";
/// What the name of a file ends in that is being written.
const FRESH: &str = "new";
/// Most bytes of a record, written or read.
pub(super) const MAX_RECORD: u64 = 8 << 20;

fn record_path(dir: &Path, id: &str) -> PathBuf {
    dir.join(Digest::of(id).hex()).with_extension(RECORD)
}

fn fresh_path(dir: &Path) -> PathBuf {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    dir.join(COUNT.fetch_add(1, Ordering::Relaxed).to_string()).with_extension(FRESH)
}

/// The bytes of a record. One that is too large for [`read`] loses what clients and frontends said,
/// but never itself.
fn encode(record: &HistoryRecord) -> Result<Vec<u8>> {
    let json = |record: &HistoryRecord| {
        serde_json::to_vec(record)
            .map_err(|e| Fault::internal(format!("encode a build's record: {e}")))
    };
    let fits = |bytes: &Vec<u8>| bytes.len() as u64 <= MAX_RECORD;
    let bytes = json(record)?;
    if fits(&bytes) {
        return Ok(bytes);
    }
    let mut less = record.clone();
    (less.options, less.exporters, less.response) = Default::default();
    let bytes = json(&less)?;
    if fits(&bytes) {
        return Ok(bytes);
    }
    (less.provenance, less.written) = Default::default();
    json(&less)
        .map(Some)
        .map(|b| b.filter(fits))?
        .ok_or_else(|| Fault::internal("a build's record is too large to keep"))
}

/// Writes the record of a build that ended, all or nothing, and gives its path.
pub(super) fn write(dir: &Path, record: &HistoryRecord) -> Result<PathBuf> {
    let path = record_path(dir, &record.id);
    let bytes = encode(record)?;
    replace_file(&path, 0o666, |file| file.write_all(&bytes))
        .map_err(|e| Fault::io(format!("write the build's record {}", path.display()), e))?;
    Ok(path)
}

/// What fills a file.
pub(super) type Fill<'f> = dyn Fn(&mut dyn Write) -> io::Result<()> + 'f;

/// Writes a file that is named by its digest, piece by piece.
pub(super) fn write_file(dir: &Path, fill: &Fill<'_>) -> Result<LogFile> {
    struct Hashed<W>(W, Hasher, u64);
    impl<W: Write> Write for Hashed<W> {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let n = self.0.write(bytes)?;
            self.1.update(&bytes[..n]);
            self.2 += n as u64;
            Ok(n)
        }
        fn flush(&mut self) -> io::Result<()> {
            self.0.flush()
        }
    }
    let fresh = fresh_path(dir);
    let write = || {
        let mut out = Hashed(BufWriter::new(File::create(&fresh)?), Hasher::new(), 0);
        fill(&mut out)?;
        out.flush()?;
        let Hashed(_, hasher, size) = out;
        let file = LogFile { digest: hasher.finish(), size };
        std::fs::rename(&fresh, file_path(dir, file.digest))?;
        Ok(file)
    };
    write().map_err(|e| {
        let _ = std::fs::remove_file(&fresh);
        Fault::io(format!("write a file of a build into {}", dir.display()), e)
    })
}

/// Where the file with this digest is.
pub(super) fn file_path(dir: &Path, digest: Digest) -> PathBuf {
    dir.join(digest.hex())
}

/// Whether a file's bytes are those of its name.
pub(super) fn is_whole(path: &Path, expected: Digest) -> io::Result<bool> {
    let mut file = File::open(path)?;
    let mut hasher = Hasher::new();
    let mut buffer = vec![0; 256 << 10];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hasher.finish() == expected),
            n => hasher.update(&buffer[..n]),
        }
    }
}

/// Forgets a record.
pub(super) fn remove(dir: &Path, id: &str) {
    let _ = std::fs::remove_file(record_path(dir, id));
}

/// The record of a build that ended.
pub(super) fn read(dir: &Path, id: &str) -> Option<HistoryRecord> {
    read_record(&record_path(dir, id)).filter(|r| r.id == id)
}

fn read_record(path: &Path) -> Option<HistoryRecord> {
    let file = File::open(path).ok()?;
    if !file.metadata().is_ok_and(|m| m.is_file() && m.len() <= MAX_RECORD) {
        return None;
    }
    let mut bytes = Vec::new();
    file.take(MAX_RECORD).read_to_end(&mut bytes).ok()?;
    serde_json::from_slice(&bytes).ok()
}

/// Reads what an earlier life kept, and removes what belongs to no record: logs of builds that the
/// life's end cut off, and broken files.
pub(super) fn read_all(dir: &Path) -> io::Result<Vec<HistorySummary>> {
    std::fs::create_dir_all(dir)?;
    let mut all = Vec::new();
    let mut others = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        let is_record = path.extension().is_some_and(|e| e == RECORD);
        match is_record.then(|| read_record(&path)).flatten() {
            Some(record) => all.push(HistorySummary::of(&with_whole_files(dir, record))),
            None => others.push(path),
        }
    }
    let wanted: HashSet<String> =
        all.iter().flat_map(|r| &r.files).map(|f| f.digest.hex()).collect();
    for path in others {
        if !path.file_name().is_some_and(|n| wanted.contains(&*n.to_string_lossy())) {
            let _ = if path.is_dir() {
                std::fs::remove_dir_all(&path)
            } else {
                std::fs::remove_file(&path)
            };
        }
    }
    Ok(all)
}

/// A record without those of its files that are not there or have another size: they did not reach
/// the disk.
fn with_whole_files(dir: &Path, mut record: HistoryRecord) -> HistoryRecord {
    let there = |f: &LogFile| {
        std::fs::metadata(file_path(dir, f.digest)).is_ok_and(|m| m.is_file() && m.len() == f.size)
    };
    if record.files().all(|f| there(&f)) {
        return record;
    }
    tracing::warn!(build = record.id, "files of a build record are missing");
    record.log = record.log.filter(there);
    record.failure = record.failure.filter(there);
    record.trace = record.trace.filter(there);
    record.provenance.retain(|(_, f)| there(f));
    if let Err(fault) = write(dir, &record) {
        tracing::warn!(build = record.id, error = %fault, "failed to write a build record without its missing files");
    }
    record
}

/// Brings files to the disk, one after another, in the background.
#[derive(Clone, Default)]
pub(super) struct Syncer(Arc<Mutex<Pending>>);

#[derive(Default)]
struct Pending {
    paths: Vec<PathBuf>,
    running: bool,
}

impl Syncer {
    /// These files, and their names in `dir`.
    pub(super) fn add(&self, dir: &Path, paths: Vec<PathBuf>) {
        let mut pending = self.0.lock();
        pending.paths.extend(paths);
        if std::mem::replace(&mut pending.running, true) {
            return;
        }
        drop(pending);
        let (all, dir) = (self.0.clone(), dir.to_owned());
        let work = move || {
            loop {
                let batch = {
                    let mut pending = all.lock();
                    if pending.paths.is_empty() {
                        pending.running = false;
                        return;
                    }
                    std::mem::take(&mut pending.paths)
                };
                for path in batch.iter().chain([&dir]) {
                    // A file may be forgotten already.
                    let _ = File::open(path).and_then(|f| f.sync_all());
                }
            }
        };
        match tokio::runtime::Handle::try_current() {
            Ok(_) => {
                let work = move || {
                    work();
                    Ok(())
                };
                drop(shipway_task::blocking("sync files of the history", work));
            }
            Err(_) => work(),
        }
    }
}

/// What is kept of a build's error: its code, its words and its hints.
pub(super) mod fault {
    use super::super::clip::{MAX_VALUE, clipped};
    use serde::{Deserialize, Deserializer, Serialize, Serializer};
    use shipway_fault::{Code, Fault};

    pub fn serialize<S: Serializer>(
        fault: &Option<Fault>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        let kept = |f: &Fault| {
            let hints: Vec<String> = f.hints().map(|hint| clipped(hint, MAX_VALUE)).collect();
            (f.code() as i32, clipped(&f.to_string(), MAX_VALUE), hints)
        };
        fault.as_ref().map(kept).serialize(serializer)
    }

    /// Earlier versions kept no hints.
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Kept {
        Whole(i32, String, Vec<String>),
        Bare(i32, String),
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<Fault>, D::Error> {
        let (code, message, hints) = match Option::deserialize(deserializer)? {
            None => return Ok(None),
            Some(Kept::Whole(code, message, hints)) => (code, message, hints),
            Some(Kept::Bare(code, message)) => (code, message, Vec::new()),
        };
        Ok(Some(hints.into_iter().fold(Fault::new(Code::from_number(code), message), Fault::hint)))
    }
}

#[cfg(test)]
mod tests {
    use serde::{Deserialize, Serialize};
    use shipway_fault::{Code, Fault};

    #[derive(Serialize, Deserialize)]
    struct Record {
        #[serde(with = "super::fault")]
        error: Option<Fault>,
    }

    #[test]
    fn hints_of_errors_are_kept() {
        let read = |json: &str| {
            serde_json::from_str::<Record>(json).expect("a record").error.map(|f| {
                let hints: Vec<String> = f.hints().map(str::to_owned).collect();
                (f.code(), f.to_string(), hints)
            })
        };
        let fault = Fault::not_found("no such file").hint("look elsewhere").hint("or here");
        let json = serde_json::to_string(&Record { error: Some(fault) }).expect("json");
        let hints = ["look elsewhere", "or here"].map(str::to_owned).to_vec();
        assert_eq!(read(&json), Some((Code::NotFound, "no such file".to_owned(), hints)));
        assert_eq!(
            read(r#"{"error":[5,"old"]}"#),
            Some((Code::NotFound, "old".to_owned(), Vec::new()))
        );
        assert_eq!(read(r#"{"error":null}"#), None);
    }
}
