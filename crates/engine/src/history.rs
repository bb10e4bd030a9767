//! What finished and running builds are remembered by (rows `ctl.hist.*`, `so.h.*`).
//!
//! Records live in memory, and those of builds that ended on disk too ([`kept`]); logs are files under the daemon's root, named by digest.

mod kept;

use crate::{BuildRequest, BuildResponse, ExporterRequest};
use serde::{Deserialize, Serialize};
use shipway_fault::{Fault, Result};
use shipway_oci::{Descriptor, Digest};
use shipway_progress::{Event, Journal};
use std::{
    collections::{BTreeMap, HashSet},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};
use tokio::sync::broadcast;

/// Turns events into the bytes that clients read back as a build's log (row `so.h.status`).
pub type LogEncoder = Arc<dyn Fn(&[Event]) -> Vec<u8> + Send + Sync>;

/// Turns an error into the bytes that clients read back as what a build failed with (row `so.h.err`).
pub type FaultEncoder = Arc<dyn Fn(&Fault) -> Vec<u8> + Send + Sync>;

/// How the files of finished builds are written.
#[derive(Clone)]
pub struct HistoryEncoders {
    /// Their logs.
    pub log: LogEncoder,
    /// Their errors.
    pub fault: FaultEncoder,
}

/// How much is remembered (row `toml.hist`).
#[derive(Clone, Copy, Debug)]
pub struct HistoryLimits {
    /// Records older than this may go.
    pub max_age: Duration,
    /// Records beyond this many may go.
    pub max_entries: usize,
}

impl Default for HistoryLimits {
    fn default() -> Self {
        Self { max_age: Duration::from_secs(48 * 3600), max_entries: 50 }
    }
}

/// A log or another file of a build, on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogFile {
    /// Digest of its bytes, and its name.
    pub digest: Digest,
    /// Its length.
    pub size: u64,
}

/// How many steps a build had.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Steps {
    pub total: i32,
    pub completed: i32,
    pub cached: i32,
    pub warnings: i32,
}

/// One build.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct HistoryRecord {
    /// Its id.
    pub id: String,
    /// Its frontend; empty for builds driven by a client (row `so.h.resp`).
    pub frontend: String,
    /// Its options.
    pub options: BTreeMap<String, String>,
    /// Its exporters.
    pub exporters: Vec<ExporterRequest>,
    /// Why it failed.
    #[serde(with = "kept::fault")]
    pub error: Option<Fault>,
    /// The same with everything that was known of it: the lines of the Dockerfile, the step, the process.
    #[serde(default)]
    pub failure: Option<LogFile>,
    /// When it began.
    pub created: SystemTime,
    /// When it ended.
    pub completed: Option<SystemTime>,
    /// Its log.
    pub log: Option<LogFile>,
    /// Provenance of its results: by platform, or of the one result there is (row `at.prov.history`).
    pub provenance: Vec<(Option<String>, LogFile)>,
    /// What its exporters answered.
    pub response: BTreeMap<String, String>,
    /// What its exporters wrote into the content store, by their index.
    pub written: BTreeMap<usize, Descriptor>,
    /// Whether it is kept whatever the limits.
    pub pinned: bool,
    /// Counts changes of the record.
    pub generation: i32,
    /// Its steps.
    pub steps: Steps,
}

impl HistoryRecord {
    /// Its files on disk.
    fn files(&self) -> impl Iterator<Item = LogFile> + '_ {
        self.log.into_iter().chain(self.failure).chain(self.provenance.iter().map(|(_, file)| *file))
    }
}

/// What happened to a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum HistoryEventKind {
    Started,
    Completed,
    Deleted,
}

/// A change of a record.
#[derive(Clone, Debug)]
pub struct HistoryEvent {
    /// What happened.
    pub kind: HistoryEventKind,
    /// The record as it is now, or as it was.
    pub record: Arc<HistoryRecord>,
}

/// Which records are wanted.
pub type HistoryFilter = Arc<dyn Fn(&HistoryRecord) -> bool + Send + Sync>;

/// All records, and those who listen for changes.
pub struct History {
    records: HistoryStore,
    changes: broadcast::Sender<HistoryEvent>,
    dir: PathBuf,
    limits: HistoryLimits,
    encode: HistoryEncoders,
}

/// Records by id.
type HistoryStore = Mutex<BTreeMap<String, Arc<HistoryRecord>>>;

fn lock(m: &HistoryStore) -> MutexGuard<'_, BTreeMap<String, Arc<HistoryRecord>>> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

impl History {
    /// The history kept in `dir`.
    pub fn open(dir: PathBuf, limits: HistoryLimits, encode: HistoryEncoders) -> Result<Self> {
        let records = kept::read(&dir).map_err(|e| Fault::io(format!("read the history in {}", dir.display()), e))?;
        let (changes, _) = broadcast::channel(256);
        Ok(Self { records: Mutex::new(records), changes, dir, limits, encode })
    }

    /// Keeps a record over the daemon's end; that it was not kept is no failure of a build.
    fn keep(&self, record: &HistoryRecord) {
        if let Err(fault) = kept::write(&self.dir, record) {
            tracing::warn!(build = record.id, error = %fault, "the build's record will not outlive the daemon");
        }
    }

    fn tell(&self, kind: HistoryEventKind, record: Arc<HistoryRecord>) {
        // Nobody listening is no failure.
        let _ = self.changes.send(HistoryEvent { kind, record });
    }

    pub(crate) fn started(&self, request: &BuildRequest) {
        let record = Arc::new(HistoryRecord {
            id: request.id.clone(),
            frontend: request.frontend.clone(),
            options: request.options.iter().map(|(k, v)| (k.clone(), shipway_fault::redact_text(v))).collect(),
            exporters: request.exporters.clone(),
            error: None,
            failure: None,
            created: SystemTime::now(),
            completed: None,
            log: None,
            provenance: Vec::new(),
            response: BTreeMap::new(),
            written: BTreeMap::new(),
            pinned: false,
            generation: 0,
            steps: Steps::default(),
        });
        lock(&self.records).insert(record.id.clone(), record.clone());
        self.tell(HistoryEventKind::Started, record);
    }

    pub(crate) async fn completed(&self, id: &str, journal: &Journal, outcome: Result<BuildResponse>) {
        let events = journal.events();
        let (encode, dir) = (self.encode.clone(), self.dir.clone());
        let told = outcome.as_ref().map(|r| r.provenance.clone()).unwrap_or_default();
        let failed = outcome.as_ref().err().cloned();
        let work = move || {
            let failure = failed.map(|fault| write_file(&dir, &(encode.fault)(&fault))).transpose();
            let told = told.into_iter().map(|(platform, bytes)| Ok((platform, write_file(&dir, &bytes)?))).collect::<Result<_>>();
            (count(&events), write_file(&dir, &(encode.log)(&events)), told, failure)
        };
        let (steps, log, provenance, failure) = match tokio::task::spawn_blocking(work).await {
            Ok(done) => done,
            Err(e) => (Steps::default(), Err(Fault::internal(e.to_string())), Ok(Vec::new()), Ok(None)),
        };
        let provenance = provenance.inspect_err(|f: &Fault| tracing::warn!(build = id, error = %f, "the build's provenance was not kept"));
        let log = log.inspect_err(|f| tracing::warn!(build = id, error = %f, "the build's log was not kept")).ok();
        let failure = failure.inspect_err(|f| tracing::warn!(build = id, error = %f, "the build's error was not kept in full"));
        let record = {
            let mut records = lock(&self.records);
            let Some(old) = records.get(id) else { return };
            let mut record = HistoryRecord::clone(old);
            record.failure = failure.unwrap_or_default();
            record.completed = Some(SystemTime::now());
            record.log = log;
            record.steps = steps;
            record.provenance = provenance.unwrap_or_default();
            record.generation += 1;
            match outcome {
                Ok(response) => (record.response, record.written) = (response.exporter_response, response.written),
                Err(fault) => record.error = Some(fault.without_kept()),
            }
            let record = Arc::new(record);
            records.insert(id.to_owned(), record.clone());
            record
        };
        self.keep(&record);
        self.tell(HistoryEventKind::Completed, record);
        self.trim();
    }

    /// Forgets what exceeds both limits (row `so.h.gc`).
    fn trim(&self) {
        let gone: Vec<String> = {
            let records = lock(&self.records);
            let mut finished: Vec<_> = records.values().filter(|r| r.completed.is_some() && !r.pinned).collect();
            finished.sort_by_key(|r| std::cmp::Reverse(r.created));
            let old = |r: &HistoryRecord| r.created.elapsed().is_ok_and(|age| age > self.limits.max_age);
            // A cap beyond what BuildKit has: a busy daemon must stay small within the first two days as well.
            let hard = self.limits.max_entries.saturating_mul(4).max(1);
            let excess = finished.iter().enumerate().skip(self.limits.max_entries);
            excess.filter(|(i, r)| old(r) || *i >= hard).map(|(_, r)| r.id.clone()).collect()
        };
        for id in gone {
            let _ = self.delete(&id);
        }
    }

    /// Forgets a finished build.
    pub fn delete(&self, id: &str) -> Result<()> {
        let mut records = lock(&self.records);
        let record = records.get(id).cloned().ok_or_else(|| Fault::not_found(format!("no build {id} in the history")))?;
        if record.completed.is_none() {
            return Err(Fault::new(shipway_fault::Code::FailedPrecondition, format!("build {id} is still running")));
        }
        records.remove(id);
        let kept: HashSet<Digest> = records.values().flat_map(|r| r.files()).map(|f| f.digest).collect();
        drop(records);
        kept::remove(&self.dir, id);
        for file in record.files().filter(|f| !kept.contains(&f.digest)) {
            let _ = std::fs::remove_file(self.dir.join(file.digest.hex()));
        }
        self.tell(HistoryEventKind::Deleted, record);
        Ok(())
    }

    /// Keeps a build whatever the limits, or not.
    pub fn pin(&self, id: &str, pinned: bool) -> Result<()> {
        let mut records = lock(&self.records);
        let old = records.get(id).ok_or_else(|| Fault::not_found(format!("no build {id} in the history")))?;
        let mut record = HistoryRecord::clone(old);
        record.pinned = pinned;
        record.generation += 1;
        let record = Arc::new(record);
        records.insert(id.to_owned(), record.clone());
        drop(records);
        let kind = match record.completed {
            Some(_) => {
                self.keep(&record);
                HistoryEventKind::Completed
            }
            None => HistoryEventKind::Started,
        };
        self.tell(kind, record);
        Ok(())
    }

    /// One record.
    pub fn get(&self, id: &str) -> Option<Arc<HistoryRecord>> {
        lock(&self.records).get(id).cloned()
    }

    /// All records, oldest first, and what happens from now on.
    pub fn listen(&self) -> (Vec<Arc<HistoryRecord>>, broadcast::Receiver<HistoryEvent>) {
        let records = lock(&self.records);
        let receiver = self.changes.subscribe();
        let mut all: Vec<_> = records.values().cloned().collect();
        all.sort_by_key(|r| r.created);
        (all, receiver)
    }

    /// A log, an error or a predicate, if `digest` is one.
    pub fn log(&self, digest: Digest) -> Option<PathBuf> {
        let known = lock(&self.records).values().any(|r| r.files().any(|f| f.digest == digest));
        known.then(|| self.dir.join(digest.hex()))
    }
}

fn write_file(dir: &Path, bytes: &[u8]) -> Result<LogFile> {
    let digest = Digest::of(bytes);
    let path = dir.join(digest.hex());
    std::fs::write(&path, bytes).map_err(|e| Fault::io(format!("write {}", path.display()), e))?;
    Ok(LogFile { digest, size: bytes.len() as u64 })
}

fn count(events: &[Event]) -> Steps {
    let mut last = BTreeMap::new();
    let mut warnings = 0;
    for event in events {
        match event {
            Event::Vertex(v) => {
                last.insert(v.digest, &**v);
            }
            Event::Warning(_) => warnings += 1,
            _ => {}
        }
    }
    let number = |f: &dyn Fn(&&&shipway_progress::VertexUpdate) -> bool| last.values().filter(|v| f(v)).count() as i32;
    Steps { total: last.len() as i32, completed: number(&|v| v.completed.is_some()), cached: number(&|v| v.cached), warnings }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(dir: &Path) -> History {
        let encode = HistoryEncoders { log: Arc::new(|_| b"log".to_vec()), fault: Arc::new(|f| f.to_string().into_bytes()) };
        History::open(dir.to_owned(), HistoryLimits::default(), encode).unwrap()
    }

    async fn build(history: &History, id: &str, outcome: Result<BuildResponse>) {
        history.started(&BuildRequest { id: id.into(), options: [("target".into(), "x".into())].into(), ..BuildRequest::default() });
        history.completed(id, &Journal::new(), outcome).await;
    }

    #[tokio::test]
    async fn what_ended_outlives_the_daemon_and_nothing_else_does() {
        let dir = tempfile::tempdir().unwrap();
        let first = open(dir.path());
        build(&first, "../../good", Ok(BuildResponse::default())).await;
        build(&first, "bad", Err(Fault::not_found("no such thing").context("step"))).await;
        build(&first, "gone", Ok(BuildResponse::default())).await;
        first.pin("bad", true).unwrap();
        first.delete("gone").unwrap();
        first.started(&BuildRequest { id: "cut off".into(), ..BuildRequest::default() });
        std::fs::write(dir.path().join("stray"), "x").unwrap();
        std::fs::write(dir.path().join("broken.json"), "{").unwrap();
        drop(first);

        let next = open(dir.path());
        let ids: Vec<String> = next.listen().0.iter().map(|r| r.id.clone()).collect();
        assert_eq!(ids, ["../../good", "bad"]);
        let bad = next.get("bad").unwrap();
        let error = bad.error.clone().unwrap();
        assert_eq!((error.to_string().as_str(), error.code()), ("step: no such thing", shipway_fault::Code::NotFound));
        assert!(bad.pinned && bad.options["target"] == "x");
        let log = next.log(bad.log.unwrap().digest).unwrap();
        assert_eq!(std::fs::read(log).unwrap(), b"log");
        let failure = next.log(bad.failure.unwrap().digest).unwrap();
        assert_eq!(std::fs::read(failure).unwrap(), b"step: no such thing");
        next.delete("bad").unwrap();
        next.delete("../../good").unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
