//! The file: keys, records, and which records a result has.

use parking_lot::Mutex;
use redb::{
    Database, DatabaseError, Durability, MultimapTableDefinition, MultimapTableHandle as _,
    ReadableDatabase, ReadableTable, ReadableTableMetadata, StorageError, TableDefinition,
};
use serde::{Deserialize, Serialize};
use shipway_fault::{Class, Code, Context as _, Fault, Result};
use shipway_oci::Digest;
use shipway_solver::{CacheKey, KeyPart, RecordMeta};
use std::{
    collections::{HashMap, HashSet},
    path::Path,
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};
use tokio::sync::Notify;

type Key = [u8; 32];

/// Key to primary key; a primary leads to itself. Outlives its record as long as the records of
/// results that were made of it, so that these are found, and later results get the same primary.
const ALIASES: TableDefinition<Key, Key> = TableDefinition::new("aliases");
/// Primary key to a [`StoredRecord`] in JSON.
const RECORDS: TableDefinition<Key, &[u8]> = TableDefinition::new("records");
/// Primary key to the other keys that lead to it.
const KEYS: MultimapTableDefinition<Key, Key> = MultimapTableDefinition::new("keys");
/// Name of a result to the primaries of its records.
const RESULTS: MultimapTableDefinition<&str, Key> = MultimapTableDefinition::new("results");
/// What similar records are found by ([`RecordMeta::similar`]) to the primary of the latest of
/// them.
const SIMILAR: TableDefinition<Key, Key> = TableDefinition::new("similar");
/// `format` to [`FORMAT`]; [`SWEEP_AT`] to what that says.
const ABOUT: TableDefinition<&str, u64> = TableDefinition::new("about");

const FORMAT: u64 = 1;
/// At so many keys, unused ones are looked for.
const SWEEP_AT: &str = "sweep at";
/// Up to so many keys, unused ones are not looked for.
const FEW_KEYS: u64 = 1024;
/// Most entries that one transaction removes: builds' transactions wait for it.
const BATCH: usize = 256;
/// How long a write may stay in memory only.
const FLUSH_AFTER: Duration = Duration::from_millis(500);
const CACHE_BYTES: usize = 32 << 20;

pub(crate) struct Inner {
    db: Database,
    dirty: AtomicBool,
    /// At so many keys, unused ones are looked for: twice what was left the last time.
    sweep_at: AtomicU64,
    /// Held while they are.
    sweeping: Mutex<()>,
    /// What was stored meanwhile may lead to these.
    stored: Mutex<Option<HashSet<Key>>>,
    pub(crate) wake: Arc<Notify>,
}

/// What is stored under a primary key.
#[derive(Clone, Debug)]
pub struct Record {
    /// Name of the result.
    pub result: String,
    /// When it was stored.
    pub created: SystemTime,
    /// How it came about.
    pub meta: RecordMeta,
}

#[derive(Serialize, Deserialize)]
pub(crate) struct StoredRecord {
    result: String,
    /// Seconds since 1970.
    created: u64,
    op_keys: Vec<Digest>,
    output: usize,
    inputs: Vec<(Vec<Digest>, Option<Digest>)>,
    description: String,
    #[serde(default)]
    imported: bool,
    /// Names and fingerprints.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    parts: Vec<(String, u64)>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    contents: Vec<Option<Digest>>,
}

impl StoredRecord {
    fn new(result: String, meta: &RecordMeta) -> Self {
        let created =
            SystemTime::now().duration_since(UNIX_EPOCH).map(|d| d.as_secs()).unwrap_or_default();
        let inputs = meta
            .inputs
            .iter()
            .map(|(keys, selector)| (keys.iter().map(|k| k.0).collect(), *selector))
            .collect();
        let (op_keys, description) = (meta.op_keys.clone(), meta.description.clone());
        let parts = meta.parts.iter().map(|part| (part.name.clone(), part.fingerprint)).collect();
        Self {
            result,
            created,
            op_keys,
            output: meta.output,
            inputs,
            description,
            imported: meta.imported,
            parts,
            contents: meta.contents.clone(),
        }
    }

    pub(crate) fn into_record(self) -> Record {
        let inputs = self
            .inputs
            .into_iter()
            .map(|(keys, selector)| (keys.into_iter().map(CacheKey).collect(), selector))
            .collect();
        let part = |(name, fingerprint)| KeyPart { name, fingerprint };
        let meta = RecordMeta {
            op_keys: self.op_keys,
            output: self.output,
            parts: self.parts.into_iter().map(part).collect(),
            inputs,
            contents: self.contents,
            description: self.description,
            imported: self.imported,
        };
        Record {
            result: self.result,
            created: UNIX_EPOCH + Duration::from_secs(self.created),
            meta,
        }
    }
}

/// Of a record, what it was made from.
#[derive(Deserialize)]
struct StoredInputs {
    inputs: Vec<(Vec<Digest>, Option<Digest>)>,
}

/// What nothing leads to or needs.
#[derive(Default)]
struct Unused {
    keys: Vec<Key>,
    similar: Vec<Key>,
}

fn fault(error: impl Into<redb::Error>) -> Fault {
    let error = error.into();
    Fault::new(Code::Internal, format!("the build cache index: {error}"))
        .with_class(Class::Environment)
        .with_source(error)
}

fn key(key: &CacheKey) -> Key {
    *key.0.as_bytes()
}

fn cache_key(key: Key) -> CacheKey {
    CacheKey(Digest::from_bytes(key))
}

pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    shipway_task::blocking("use the build cache index", work).await
}

/// Drops unused keys if there are many, then flushes a while after each first write, until the
/// database is gone.
pub(crate) async fn maintain(inner: Weak<Inner>, wake: Arc<Notify>) {
    if let Some(inner) = inner.upgrade().filter(|inner| inner.is_sweep_due().unwrap_or(false))
        && let Err(error) = blocking(move || inner.sweep_if_due()).await
    {
        tracing::warn!(%error, "failed to remove unused keys from the build cache index");
    }
    loop {
        wake.notified().await;
        tokio::time::sleep(FLUSH_AFTER).await;
        let Some(inner) = inner.upgrade() else { return };
        if let Err(error) = blocking(move || inner.flush()).await {
            tracing::warn!(%error, "failed to sync the build cache index to disk");
        }
    }
}

fn create_tables(tx: &redb::WriteTransaction) -> Result<()> {
    tx.open_table(ALIASES).map_err(fault)?;
    tx.open_table(RECORDS).map_err(fault)?;
    tx.open_table(SIMILAR).map_err(fault)?;
    tx.open_multimap_table(RESULTS).map_err(fault)?;
    tx.open_multimap_table(KEYS).map_err(fault)?;
    tx.open_table(ABOUT).map_err(fault)?.insert("format", FORMAT).map_err(fault)?;
    Ok(())
}

/// Fills [`KEYS`], which older files do not have.
fn turn_keys(tx: &redb::WriteTransaction) -> Result<()> {
    let aliases = tx.open_table(ALIASES).map_err(fault)?;
    let mut reverse = tx.open_multimap_table(KEYS).map_err(fault)?;
    for entry in aliases.iter().map_err(fault)? {
        let (alias, primary) = entry.map_err(fault)?;
        let (alias, primary) = (alias.value(), primary.value());
        if alias != primary {
            reverse.insert(primary, alias).map_err(fault)?;
        }
    }
    Ok(())
}

/// Both directions of what keys lead to.
struct Leads<'tx> {
    aliases: redb::Table<'tx, Key, Key>,
    reverse: redb::MultimapTable<'tx, Key, Key>,
}

impl<'tx> Leads<'tx> {
    fn open(tx: &'tx redb::WriteTransaction) -> Result<Self> {
        let aliases = tx.open_table(ALIASES).map_err(fault)?;
        Ok(Self { aliases, reverse: tx.open_multimap_table(KEYS).map_err(fault)? })
    }

    /// The primary that `key` leads to.
    fn get(&self, key: Key) -> Result<Option<Key>> {
        Ok(self.aliases.get(key).map_err(fault)?.map(|primary| primary.value()))
    }

    /// Makes `key` lead to `primary`.
    fn lead(&mut self, key: Key, primary: Key) -> Result<()> {
        let before = self.aliases.insert(key, primary).map_err(fault)?.map(|p| p.value());
        if before == Some(primary) {
            return Ok(());
        }
        if let Some(before) = before {
            self.reverse.remove(before, key).map_err(fault)?;
        }
        if key != primary {
            self.reverse.insert(primary, key).map_err(fault)?;
        }
        Ok(())
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.wake.notify_one();
        if let Err(error) = self.flush() {
            tracing::warn!(%error, "failed to sync the build cache index to disk");
        }
    }
}

impl Inner {
    /// Opens the file at `path`, or makes it. A damaged one, or one of another format, is moved
    /// aside.
    pub(crate) fn open(path: &Path) -> Result<Arc<Self>> {
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent)
                .map_err(|e| Fault::io(format!("make {}", parent.display()), e))?;
        }
        let attempt = || match std::panic::catch_unwind(|| Self::try_open(path)) {
            Ok(result) => result,
            Err(_) => Err(OpenError::Damaged("it made the database panic".into())),
        };
        let problem = match attempt() {
            Ok(inner) => return Ok(Arc::new(inner)),
            Err(OpenError::Fault(fault)) => {
                return Err(fault.context(format!("open {}", path.display())));
            }
            Err(OpenError::Damaged(problem)) => problem,
        };
        let aside = path.with_extension(format!("damaged-{}", std::process::id()));
        tracing::warn!(path = %path.display(), aside = %aside.display(), problem, "failed to open the build cache index, starting with an empty one");
        std::fs::rename(path, &aside)
            .map_err(|e| Fault::io(format!("move {} aside", path.display()), e))?;
        match attempt() {
            Ok(inner) => Ok(Arc::new(inner)),
            Err(OpenError::Fault(fault)) => Err(fault),
            Err(OpenError::Damaged(problem)) => Err(Fault::internal(problem)),
        }
        .context(|| format!("make {} anew", path.display()))
    }

    fn try_open(path: &Path) -> std::result::Result<Self, OpenError> {
        Self::of(Database::builder().set_cache_size(CACHE_BYTES).create(path))
    }

    /// The index in a file that was opened.
    fn of(
        opened: std::result::Result<Database, DatabaseError>,
    ) -> std::result::Result<Self, OpenError> {
        let db = match opened {
            Ok(db) => db,
            Err(DatabaseError::DatabaseAlreadyOpen) => {
                return Err(OpenError::Fault(
                    Fault::new(
                        Code::FailedPrecondition,
                        "another process has the build cache index open",
                    )
                    .hint("give each daemon its own root directory, or stop the other one"),
                ));
            }
            // An ordinary I/O error (no permission, disk full) says nothing about the file's
            // content; unfit content does.
            Err(DatabaseError::Storage(StorageError::Io(e)))
                if e.kind() != std::io::ErrorKind::InvalidData =>
            {
                return Err(OpenError::Fault(Fault::io("the build cache index", e)));
            }
            Err(e) => return Err(OpenError::Damaged(e.to_string())),
        };
        let inner = Self {
            db,
            dirty: AtomicBool::new(false),
            sweep_at: AtomicU64::new(FEW_KEYS),
            sweeping: Mutex::default(),
            stored: Mutex::default(),
            wake: Arc::default(),
        };
        match inner.begin() {
            Ok(()) => Ok(inner),
            Err(fault) => Err(OpenError::Damaged(fault.to_string())),
        }
    }

    /// Makes the tables.
    fn begin(&self) -> Result<()> {
        self.write(|tx| {
            let about = tx.open_table(ABOUT).map_err(fault)?;
            let format = about.get("format").map_err(fault)?.map(|f| f.value());
            let sweep_at = about.get(SWEEP_AT).map_err(fault)?.map(|at| at.value());
            drop(about);
            if format.is_some_and(|f| f != FORMAT) {
                return Err(Fault::invalid(format!(
                    "it has format {}, this daemon writes {FORMAT}",
                    format.unwrap_or_default()
                )));
            }
            self.sweep_at.store(sweep_at.unwrap_or(FEW_KEYS), Ordering::Relaxed);
            let known = tx.list_multimap_tables().map_err(fault)?.any(|t| t.name() == KEYS.name());
            create_tables(tx)?;
            if known { Ok(()) } else { turn_keys(tx) }
        })
    }

    /// Drops the keys that lead to no record, nor to what a record's result was made of, if there
    /// are many more than the last time. Builds go on meanwhile: what is unused is found in a
    /// snapshot of the index, and dropped a few at a time.
    pub(crate) fn sweep_if_due(&self) -> Result<()> {
        let _one = self.sweeping.lock();
        if !self.is_sweep_due()? {
            return Ok(());
        }
        *self.stored.lock() = Some(HashSet::new());
        let dropped = self.unused().and_then(|unused| self.drop_unused(&unused));
        *self.stored.lock() = None;
        dropped?;
        let sweep_at = FEW_KEYS.max(2 * self.keys()?);
        self.sweep_at.store(sweep_at, Ordering::Relaxed);
        self.write(|tx| {
            tx.open_table(ABOUT).map_err(fault)?.insert(SWEEP_AT, sweep_at).map_err(fault)?;
            Ok(())
        })
    }

    /// Whether there are many more keys than the last time.
    fn is_sweep_due(&self) -> Result<bool> {
        Ok(self.keys()? > self.sweep_at.load(Ordering::Relaxed))
    }

    /// How many keys there are.
    fn keys(&self) -> Result<u64> {
        let tx = self.db.begin_read().map_err(fault)?;
        tx.open_table(ALIASES).map_err(fault)?.len().map_err(fault)
    }

    /// What is unused as the index is now.
    fn unused(&self) -> Result<Unused> {
        let tx = self.db.begin_read().map_err(fault)?;
        let records = tx.open_table(RECORDS).map_err(fault)?;
        let (mut useful, mut kept) = (HashSet::<Key>::new(), HashSet::<Key>::new());
        for record in records.iter().map_err(fault)? {
            let (primary, bytes) = record.map_err(fault)?;
            useful.insert(primary.value());
            kept.insert(primary.value());
            let Ok(stored) = serde_json::from_slice::<StoredInputs>(bytes.value()) else {
                continue;
            };
            useful.extend(stored.inputs.iter().flat_map(|(keys, _)| keys).map(|k| *k.as_bytes()));
        }
        let mut unused = Unused::default();
        for (table, keep, found) in
            [(ALIASES, &useful, &mut unused.keys), (SIMILAR, &kept, &mut unused.similar)]
        {
            for entry in tx.open_table(table).map_err(fault)?.iter().map_err(fault)? {
                let (key, primary) = entry.map_err(fault)?;
                if !keep.contains(&primary.value()) {
                    found.push(key.value());
                }
            }
        }
        Ok(unused)
    }

    /// Drops what is unused still.
    fn drop_unused(&self, unused: &Unused) -> Result<()> {
        for keys in unused.keys.chunks(BATCH) {
            self.write(|tx| {
                let mut aliases = tx.open_table(ALIASES).map_err(fault)?;
                let mut reverse = tx.open_multimap_table(KEYS).map_err(fault)?;
                let stored = self.stored.lock();
                for k in keys {
                    let Some(primary) = aliases.get(k).map_err(fault)?.map(|p| p.value()) else {
                        continue;
                    };
                    if !stored.as_ref().is_some_and(|stored| stored.contains(&primary)) {
                        aliases.remove(k).map_err(fault)?;
                        reverse.remove(primary, *k).map_err(fault)?;
                    }
                }
                Ok(())
            })?;
        }
        for names in unused.similar.chunks(BATCH) {
            self.write(|tx| {
                let mut similar = tx.open_table(SIMILAR).map_err(fault)?;
                let records = tx.open_table(RECORDS).map_err(fault)?;
                for name in names {
                    let primary = similar.get(name).map_err(fault)?.map(|p| p.value());
                    let Some(primary) = primary else { continue };
                    if records.get(primary).map_err(fault)?.is_none() {
                        similar.remove(name).map_err(fault)?;
                    }
                }
                Ok(())
            })?;
        }
        Ok(())
    }

    /// Runs `work` in a transaction that a flush makes durable later.
    fn write<T>(&self, work: impl FnOnce(&redb::WriteTransaction) -> Result<T>) -> Result<T> {
        let mut tx = self.db.begin_write().map_err(fault)?;
        tx.set_durability(Durability::None).map_err(fault)?;
        let value = work(&tx)?;
        tx.commit().map_err(fault)?;
        if !self.dirty.swap(true, Ordering::AcqRel) {
            self.wake.notify_one();
        }
        Ok(value)
    }

    pub(crate) fn flush(&self) -> Result<()> {
        if !self.dirty.swap(false, Ordering::AcqRel) {
            return Ok(());
        }
        let flush = || {
            let mut tx = self.db.begin_write().map_err(fault)?;
            // Opening after a crash then needs no walk through the whole file.
            tx.set_quick_repair(true);
            tx.commit().map_err(fault)
        };
        flush().inspect_err(|_| self.dirty.store(true, Ordering::Release))
    }

    pub(crate) fn clear(&self) -> Result<()> {
        self.write(|tx| {
            tx.delete_table(ALIASES).map_err(fault)?;
            tx.delete_table(RECORDS).map_err(fault)?;
            tx.delete_table(SIMILAR).map_err(fault)?;
            tx.delete_multimap_table(RESULTS).map_err(fault)?;
            tx.delete_multimap_table(KEYS).map_err(fault)?;
            create_tables(tx)
        })
    }

    pub(crate) fn primary(&self, of: &CacheKey) -> Result<Option<CacheKey>> {
        let tx = self.db.begin_read().map_err(fault)?;
        let aliases = tx.open_table(ALIASES).map_err(fault)?;
        Ok(aliases.get(key(of)).map_err(fault)?.map(|p| cache_key(p.value())))
    }

    pub(crate) fn primaries(&self, keys: &[CacheKey]) -> Result<Vec<CacheKey>> {
        let tx = self.db.begin_read().map_err(fault)?;
        let aliases = tx.open_table(ALIASES).map_err(fault)?;
        let (mut found, mut seen) = (Vec::new(), HashSet::new());
        for k in keys {
            if let Some(primary) = aliases.get(key(k)).map_err(fault)?.map(|p| cache_key(p.value()))
                && seen.insert(primary)
            {
                found.push(primary);
            }
        }
        Ok(found)
    }

    pub(crate) fn aliases_of(
        &self,
        primaries: &HashSet<CacheKey>,
    ) -> Result<HashMap<CacheKey, Vec<CacheKey>>> {
        let tx = self.db.begin_read().map_err(fault)?;
        let aliases = tx.open_table(ALIASES).map_err(fault)?;
        let reverse = tx.open_multimap_table(KEYS).map_err(fault)?;
        let mut found: HashMap<CacheKey, Vec<CacheKey>> = HashMap::new();
        for primary in primaries {
            let itself = aliases.get(key(primary)).map_err(fault)?.map(|p| p.value());
            let itself = itself.filter(|p| *p == key(primary)).map(Ok);
            let others = reverse.get(key(primary)).map_err(fault)?;
            let others = others.map(|k| k.map(|k| k.value()).map_err(fault));
            let keys: Vec<_> = itself
                .into_iter()
                .chain(others)
                .map(|k| k.map(cache_key))
                .collect::<Result<_>>()?;
            if !keys.is_empty() {
                found.insert(*primary, keys);
            }
        }
        Ok(found)
    }

    /// The name of the result under a primary.
    pub(crate) fn result_of(&self, primary: &CacheKey) -> Result<Option<String>> {
        Ok(self.record(primary)?.map(|r| r.result))
    }

    pub(crate) fn record(&self, primary: &CacheKey) -> Result<Option<StoredRecord>> {
        let tx = self.db.begin_read().map_err(fault)?;
        let records = tx.open_table(RECORDS).map_err(fault)?;
        let Some(bytes) = records.get(key(primary)).map_err(fault)? else { return Ok(None) };
        // What cannot be read is as good as absent.
        Ok(serde_json::from_slice(bytes.value()).ok())
    }

    /// The latest record that is found by `name`, one of [`RecordMeta::similar`].
    pub(crate) fn similar(&self, name: &Digest) -> Result<Option<StoredRecord>> {
        let tx = self.db.begin_read().map_err(fault)?;
        let similar = tx.open_table(SIMILAR).map_err(fault)?;
        let primary = similar.get(*name.as_bytes()).map_err(fault)?.map(|p| cache_key(p.value()));
        primary.map_or(Ok(None), |primary| self.record(&primary))
    }

    pub(crate) fn keys_of(&self, result: &str) -> Result<Vec<CacheKey>> {
        let tx = self.db.begin_read().map_err(fault)?;
        let results = tx.open_multimap_table(RESULTS).map_err(fault)?;
        let keys = results.get(result).map_err(fault)?;
        keys.map(|k| k.map(|k| cache_key(k.value())).map_err(fault)).collect()
    }

    /// Stores a record of `result`, if there is one, under the primary that the first of `keys` has
    /// or becomes; all keys lead to it.
    pub(crate) fn save(
        &self,
        keys: &[CacheKey],
        result: Option<String>,
        meta: &RecordMeta,
    ) -> Result<CacheKey> {
        let lead = |leads: &mut Leads<'_>, k, primary| leads.lead(k, primary);
        self.store(keys, result, meta, lead, |_| true)
    }

    /// The same, but keys that lead somewhere stay, and so does a record, unless it is that of the
    /// result `gone`.
    pub(crate) fn adopt(
        &self,
        keys: &[CacheKey],
        result: Option<String>,
        meta: &RecordMeta,
        gone: Option<&str>,
    ) -> Result<CacheKey> {
        let add = |leads: &mut Leads<'_>, k, primary| match leads.get(k)? {
            Some(_) => Ok(()),
            None => leads.lead(k, primary),
        };
        self.store(keys, result, meta, add, |before| {
            before.is_none_or(|before| Some(before) == gone)
        })
    }

    fn store(
        &self,
        keys: &[CacheKey],
        result: Option<String>,
        meta: &RecordMeta,
        lead: impl Fn(&mut Leads<'_>, Key, Key) -> Result<()>,
        replace: impl FnOnce(Option<&str>) -> bool,
    ) -> Result<CacheKey> {
        let Some(first) = keys.first() else {
            return Err(Fault::internal("a result to store has no key"));
        };
        self.write(|tx| {
            let mut leads = Leads::open(tx)?;
            let primary = leads.get(key(first))?.unwrap_or(key(first));
            for k in keys.iter().map(key).chain([primary]) {
                lead(&mut leads, k, primary)?;
            }
            if let Some(stored) = &mut *self.stored.lock() {
                let inputs = meta.inputs.iter().flat_map(|(keys, _)| keys);
                stored.extend(inputs.map(key).chain([primary]));
            }
            let Some(result) = result else { return Ok(cache_key(primary)) };
            let mut results = tx.open_multimap_table(RESULTS).map_err(fault)?;
            let mut records = tx.open_table(RECORDS).map_err(fault)?;
            let before = records
                .get(primary)
                .map_err(fault)?
                .and_then(|b| serde_json::from_slice::<StoredRecord>(b.value()).ok());
            if replace(before.as_ref().map(|b| b.result.as_str())) {
                let stored = StoredRecord::new(result, meta);
                let bytes = serde_json::to_vec(&stored)
                    .map_err(|e| Fault::internal(format!("encode a cache record: {e}")))?;
                records.insert(primary, bytes.as_slice()).map_err(fault)?;
                if let Some(before) = before {
                    results.remove(before.result.as_str(), primary).map_err(fault)?;
                }
                results.insert(stored.result.as_str(), primary).map_err(fault)?;
                let mut similar = tx.open_table(SIMILAR).map_err(fault)?;
                for name in meta.similar() {
                    similar.insert(*name.as_bytes(), primary).map_err(fault)?;
                }
            }
            Ok(cache_key(primary))
        })
    }

    /// Makes `keys` lead to `primary`; nothing is written if they do.
    pub(crate) fn alias(&self, primary: CacheKey, keys: &[CacheKey]) -> Result<()> {
        let wanted: Vec<CacheKey> = keys.iter().copied().chain([primary]).collect();
        let known = wanted.iter().map(|k| self.primary(k)).collect::<Result<Vec<_>>>()?;
        if known.iter().all(|k| *k == Some(primary)) {
            return Ok(());
        }
        self.write(|tx| {
            let mut leads = Leads::open(tx)?;
            wanted.iter().try_for_each(|k| leads.lead(key(k), key(&primary)))
        })
    }

    /// Drops the record under `primary` if it is still that of `result`.
    pub(crate) fn drop_record(&self, primary: &CacheKey, result: &str) -> Result<()> {
        self.write(|tx| {
            let mut records = tx.open_table(RECORDS).map_err(fault)?;
            let now = records
                .get(key(primary))
                .map_err(fault)?
                .and_then(|b| serde_json::from_slice::<StoredRecord>(b.value()).ok());
            if now.is_some_and(|r| r.result == result) {
                records.remove(key(primary)).map_err(fault)?;
                tx.open_multimap_table(RESULTS)
                    .map_err(fault)?
                    .remove(result, key(primary))
                    .map_err(fault)?;
            }
            Ok(())
        })
    }

    pub(crate) fn forget_results(&self, gone: &[String]) -> Result<usize> {
        let mut dropped = 0;
        for some in gone.chunks(BATCH) {
            dropped += self.forget_some(some)?;
        }
        if dropped > 0 {
            self.sweep_if_due()?;
        }
        Ok(dropped)
    }

    fn forget_some(&self, gone: &[String]) -> Result<usize> {
        self.write(|tx| {
            let mut results = tx.open_multimap_table(RESULTS).map_err(fault)?;
            let mut records = tx.open_table(RECORDS).map_err(fault)?;
            let mut dropped = 0;
            for result in gone {
                let keys = results.remove_all(result.as_str()).map_err(fault)?;
                for k in
                    keys.map(|k| k.map(|k| k.value()).map_err(fault)).collect::<Result<Vec<_>>>()?
                {
                    records.remove(k).map_err(fault)?;
                    dropped += 1;
                }
            }
            Ok(dropped)
        })
    }
}

enum OpenError {
    Fault(Fault),
    Damaged(String),
}

#[cfg(test)]
mod tests;
