//! The file: one table of rows by name, and the next number of a directory.

use crate::model::{DirectoryId, Name, Row};
use redb::{Database, Durability, ReadableTable, TableDefinition};
use shipway_fault::{Class, Code, Context as _, Fault, Result};
use std::path::Path;

/// Name to a [`Row`] in JSON.
const SNAPSHOTS: TableDefinition<&str, &[u8]> = TableDefinition::new("snapshots");
/// `format` to [`FORMAT`], `next` to the next number of a directory.
const ABOUT: TableDefinition<&str, u64> = TableDefinition::new("about");

const FORMAT: u64 = 1;
/// What redb may keep of the file in memory.
const CACHE_BYTES: usize = 1 << 20;

pub(crate) struct Db(Database);

/// What was in the file.
pub(crate) struct Content {
    pub(crate) rows: Vec<(Name, Row)>,
    pub(crate) next: DirectoryId,
    /// Whether the file was made just now.
    pub(crate) new: bool,
}

/// One change; what is put under a name replaces what is there.
#[derive(Default)]
pub(crate) struct Change<'a> {
    pub(crate) remove: Option<&'a Name>,
    pub(crate) put: Option<(&'a Name, &'a Row)>,
    pub(crate) next: Option<DirectoryId>,
}

fn fault(error: impl Into<redb::Error>) -> Fault {
    let error = error.into();
    let code = match &error {
        redb::Error::Io(e) if e.kind() == std::io::ErrorKind::StorageFull => {
            Code::ResourceExhausted
        }
        _ => Code::Internal,
    };
    Fault::new(code, format!("the database of snapshots: {error}"))
        .with_class(Class::Environment)
        .with_source(error)
}

impl Db {
    pub(crate) fn open(path: &Path) -> Result<(Self, Content)> {
        let opened = Database::builder().set_cache_size(CACHE_BYTES).create(path).map_err(|error| match error {
            redb::DatabaseError::DatabaseAlreadyOpen => {
                Fault::new(Code::FailedPrecondition, "another process has the database of snapshots open")
                    .hint("give each snapshotter its own root directory, or stop the other one")
            }
            error => fault(error).hint("nothing was changed; put a backup of the file in its place, or remove the whole root directory"),
        });
        let db = Self(opened.context(|| format!("open {}", path.display()))?);
        let content = db.content().context(|| format!("read {}", path.display()))?;
        Ok((db, content))
    }

    fn content(&self) -> Result<Content> {
        let tx = self.0.begin_write().map_err(fault)?;
        let content = {
            let mut about = tx.open_table(ABOUT).map_err(fault)?;
            let format = about.get("format").map_err(fault)?.map(|f| f.value());
            if format.is_some_and(|f| f != FORMAT) {
                let format = format.unwrap_or_default();
                return Err(Fault::invalid(format!(
                    "the database has format {format}; this version knows {FORMAT}"
                )));
            }
            about.insert("format", FORMAT).map_err(fault)?;
            let next = DirectoryId(about.get("next").map_err(fault)?.map_or(1, |n| n.value()));
            let snapshots = tx.open_table(SNAPSHOTS).map_err(fault)?;
            let mut rows = Vec::new();
            for entry in snapshots.iter().map_err(fault)? {
                let (name, bytes) = entry.map_err(fault)?;
                let row = serde_json::from_slice(bytes.value()).map_err(|e| {
                    Fault::new(Code::DataLoss, format!("the row of snapshot {}: {e}", name.value()))
                })?;
                rows.push((Name::new(name.value())?, row));
            }
            Content { rows, next, new: format.is_none() }
        };
        if content.new {
            tx.commit().map_err(fault)?;
        } else {
            tx.abort().map_err(fault)?;
        }
        Ok(content)
    }

    /// Makes a change that is on the disk when this returns.
    pub(crate) fn write(&self, change: &Change<'_>) -> Result<()> {
        self.change(change, Durability::Immediate)
    }

    /// Makes a change that may be lost in a crash.
    pub(crate) fn note(&self, change: &Change<'_>) -> Result<()> {
        self.change(change, Durability::None)
    }

    fn change(&self, change: &Change<'_>, durability: Durability) -> Result<()> {
        let mut tx = self.0.begin_write().map_err(fault)?;
        tx.set_durability(durability).map_err(fault)?;
        {
            let mut snapshots = tx.open_table(SNAPSHOTS).map_err(fault)?;
            if let Some(name) = change.remove {
                snapshots.remove(name.as_str()).map_err(fault)?;
            }
            if let Some((name, row)) = change.put {
                let bytes = serde_json::to_vec(row)
                    .map_err(|e| Fault::internal(format!("encode a snapshot: {e}")))?;
                snapshots.insert(name.as_str(), bytes.as_slice()).map_err(fault)?;
            }
            if let Some(next) = change.next {
                tx.open_table(ABOUT).map_err(fault)?.insert("next", next.0).map_err(fault)?;
            }
        }
        tx.commit().map_err(fault)
    }
}
