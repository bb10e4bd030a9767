//! Records on disk, so that the history outlives the daemon: a JSON file each, beside the logs, named by the digest of the build's id, which a
//! client chose and which is no file name.

use super::HistoryRecord;
use shipway_fault::{Fault, Result};
use shipway_oci::Digest;
use std::{
    collections::{BTreeMap, HashSet},
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

/// What the name of a record's file ends in.
const RECORD: &str = "json";
/// A larger file is no record of ours.
const MAX_RECORD: u64 = 8 << 20;

fn path(dir: &Path, id: &str) -> PathBuf {
    dir.join(Digest::of(id).hex()).with_extension(RECORD)
}

/// Writes the record of a build that ended, all or nothing.
pub(super) fn write(dir: &Path, record: &HistoryRecord) -> Result<()> {
    let path = path(dir, &record.id);
    let fail = |e: io::Error| Fault::io(format!("write the build's record {}", path.display()), e);
    let bytes = serde_json::to_vec(record).map_err(|e| fail(e.into()))?;
    let fresh = path.with_extension("new");
    std::fs::write(&fresh, bytes).and_then(|()| std::fs::rename(&fresh, &path)).map_err(fail)
}

/// Forgets a record.
pub(super) fn remove(dir: &Path, id: &str) {
    let _ = std::fs::remove_file(path(dir, id));
}

/// Reads what an earlier life kept, and removes what belongs to no record: logs of builds that the life's end cut off, and broken files.
pub(super) fn read(dir: &Path) -> io::Result<BTreeMap<String, Arc<HistoryRecord>>> {
    std::fs::create_dir_all(dir)?;
    let mut records = BTreeMap::new();
    let mut others = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        let path = entry.path();
        let small = entry.metadata().is_ok_and(|m| m.is_file() && m.len() <= MAX_RECORD);
        let is_record = small && path.extension().is_some_and(|e| e == RECORD);
        let record: Option<HistoryRecord> = if is_record { serde_json::from_slice(&std::fs::read(&path)?).ok() } else { None };
        match record {
            Some(record) => drop(records.insert(record.id.clone(), Arc::new(record))),
            None => others.push(path),
        }
    }
    let wanted: HashSet<String> = records.values().flat_map(|r| r.files()).map(|f| f.digest.hex()).collect();
    for path in others {
        if !path.file_name().is_some_and(|n| wanted.contains(&*n.to_string_lossy())) {
            let _ = if path.is_dir() { std::fs::remove_dir_all(&path) } else { std::fs::remove_file(&path) };
        }
    }
    Ok(records)
}

/// What is kept of a build's error: its code and its words.
pub(super) mod fault {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};
    use shipway_fault::{Code, Fault};

    pub fn serialize<S: Serializer>(fault: &Option<Fault>, serializer: S) -> Result<S::Ok, S::Error> {
        fault.as_ref().map(|f| (f.code() as i32, f.to_string())).serialize(serializer)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Fault>, D::Error> {
        let told = Option::<(i32, String)>::deserialize(deserializer)?;
        Ok(told.map(|(code, message)| Fault::new(Code::from_number(code), message)))
    }
}
