//! The history: records and files of finished and running builds (rows `ctl.hist.*`, `so.h.*`).
//!
//! Of builds that ended only a [`HistorySummary`] is in memory: their records and files are on disk
//! (`kept`) and read when they are asked for. Texts of clients are bounded when they are recorded
//! (`clip`).

mod clip;
mod kept;

use clip::Budget;
use kept::Syncer;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use shipway_fault::{Fault, Result};
use shipway_llb::GitRef;
use shipway_oci::{Descriptor, Digest};
use shipway_progress::{Event, Journal};
use shipway_telemetry::meter;
use std::{
    collections::{BTreeMap, HashSet},
    fs::File,
    io::{self, Write},
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime},
};
use tokio::sync::broadcast;

/// Writes events as the bytes that clients read back as a build's log (row `so.h.status`), piece by
/// piece.
pub type LogEncoder = Arc<dyn Fn(&[Event], &mut dyn Write) -> io::Result<()> + Send + Sync>;

/// Turns an error into the bytes that clients read back as what a build failed with (row
/// `so.h.err`).
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
    /// The oldest ones go, whatever their number and age, while the files of all have more bytes.
    pub max_bytes: u64,
}

impl Default for HistoryLimits {
    fn default() -> Self {
        Self { max_age: Duration::from_secs(48 * 3600), max_entries: 50, max_bytes: 1_000_000_000 }
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

/// An exporter of a build, by type and attributes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExporterRecord {
    /// Type, such as `image`.
    pub kind: String,
    /// Attributes.
    pub attrs: BTreeMap<String, String>,
}

/// What is known of a build when it begins.
#[derive(Clone, Debug, Default)]
pub struct StartedBuild {
    /// Its id.
    pub id: String,
    /// Whose it is, where the daemon asks callers who they are.
    pub owner: Option<String>,
    /// Its frontend; empty for none.
    pub frontend: String,
    /// Options of the frontend.
    pub options: BTreeMap<String, String>,
    /// Its exporters.
    pub exporters: Vec<ExporterRecord>,
}

/// What is kept of a build that ended well.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FinishedBuild {
    /// Metadata of the result.
    pub metadata: BTreeMap<String, String>,
    /// What exporters wrote into the content store, by their index.
    pub written: BTreeMap<usize, Descriptor>,
    /// Provenance: by platform, or of the one result there is.
    pub provenance: Vec<(Option<String>, Vec<u8>)>,
}

/// One build.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct HistoryRecord {
    /// Its id.
    pub id: String,
    /// Whose it is, where the daemon asks callers who they are.
    #[serde(default)]
    pub owner: Option<String>,
    /// Its frontend; empty for builds driven by a client (row `so.h.resp`).
    pub frontend: String,
    /// Its options.
    pub options: BTreeMap<String, String>,
    /// Its exporters.
    pub exporters: Vec<ExporterRecord>,
    /// Why it failed.
    #[serde(with = "kept::fault")]
    pub error: Option<Fault>,
    /// The same with everything that was known of it: the lines of the Dockerfile, the step, the
    /// process.
    #[serde(default)]
    pub failure: Option<LogFile>,
    /// When it began.
    pub created: SystemTime,
    /// When it ended.
    pub completed: Option<SystemTime>,
    /// Its log.
    pub log: Option<LogFile>,
    /// The spans of its trace, a while after it ended (row `so.h.trace`).
    #[serde(default)]
    pub trace: Option<LogFile>,
    /// Provenance of its results: by platform, or of the one result there is (row
    /// `at.prov.history`).
    pub provenance: Vec<(Option<String>, LogFile)>,
    /// Metadata of its result (row `so.h.resp`).
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
        self.log
            .into_iter()
            .chain(self.failure)
            .chain(self.trace)
            .chain(self.provenance.iter().map(|(_, file)| *file))
    }
}

/// How a build stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum HistoryStatus {
    Running,
    Completed,
    Error,
    Canceled,
}

/// What is always in memory of a build.
#[derive(Clone, Debug)]
pub struct HistorySummary {
    /// Its id.
    pub id: String,
    /// Whose it is, where the daemon asks callers who they are.
    pub owner: Option<String>,
    /// When it began.
    pub created: SystemTime,
    /// When it ended.
    pub completed: Option<SystemTime>,
    /// How it stands.
    pub status: HistoryStatus,
    /// The repository it was built from, as far as its options show.
    pub repository: Option<String>,
    /// Whether it is kept whatever the limits.
    pub pinned: bool,
    /// Its log.
    pub log: Option<LogFile>,
    /// What its exporters wrote into the content store.
    pub written: Vec<Digest>,
    /// Its log and its other files.
    pub files: Vec<LogFile>,
}

impl Default for HistorySummary {
    fn default() -> Self {
        Self {
            id: String::new(),
            owner: None,
            created: SystemTime::UNIX_EPOCH,
            completed: None,
            status: HistoryStatus::Running,
            repository: None,
            pinned: false,
            log: None,
            written: Vec::new(),
            files: Vec::new(),
        }
    }
}

impl HistorySummary {
    fn of(record: &HistoryRecord) -> Self {
        Self {
            id: record.id.clone(),
            owner: record.owner.clone(),
            created: record.created,
            completed: record.completed,
            status: match (&record.error, record.completed) {
                (_, None) => HistoryStatus::Running,
                (Some(f), _) if f.is_cancelled() => HistoryStatus::Canceled,
                (Some(_), _) => HistoryStatus::Error,
                (None, Some(_)) => HistoryStatus::Completed,
            },
            repository: repository(&record.options),
            pinned: record.pinned,
            log: record.log,
            written: record.written.values().map(|d| d.digest).collect(),
            files: record.files().collect(),
        }
    }
}

/// What the client says, or the address of the context where that is a repository (row
/// `so.h.filter`).
fn repository(options: &BTreeMap<String, String>) -> Option<String> {
    let address = |context: &String| GitRef::formatted(context, false);
    let remote = |address: String| address.split('#').next().unwrap_or_default().to_owned();
    options
        .get("vcs:source")
        .cloned()
        .or_else(|| options.get("context").and_then(address).map(remote))
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
    /// The build as it is now, or as it was.
    pub summary: Arc<HistorySummary>,
}

/// A build in memory.
struct Entry {
    summary: Arc<HistorySummary>,
    /// The whole, while it is not on disk.
    record: Option<Arc<HistoryRecord>>,
}

/// All records, and those who listen for changes.
pub struct History {
    entries: Mutex<BTreeMap<String, Entry>>,
    /// Held while files are written or removed: two records may share one.
    disk: Mutex<()>,
    /// Files whose digest was checked in this life.
    verified: Mutex<HashSet<Digest>>,
    changes: broadcast::Sender<HistoryEvent>,
    dir: PathBuf,
    limits: HistoryLimits,
    encode: HistoryEncoders,
    syncer: Syncer,
}

/// The fault that a build is not in the history.
#[track_caller]
pub fn unknown(id: &str) -> Fault {
    Fault::not_found(format!("no build {id} in the history"))
}

impl History {
    /// The history kept in `dir`, without what has been kept long enough.
    pub fn open(dir: PathBuf, limits: HistoryLimits, encode: HistoryEncoders) -> Result<Self> {
        let kept = kept::read_all(&dir)
            .map_err(|e| Fault::io(format!("read the history in {}", dir.display()), e))?;
        let (changes, _) = broadcast::channel(256);
        let entry =
            |s: HistorySummary| (s.id.clone(), Entry { summary: Arc::new(s), record: None });
        let entries = Mutex::new(kept.into_iter().map(entry).collect());
        let (disk, verified, syncer) = (Mutex::default(), Mutex::default(), Syncer::default());
        let history = Self { entries, disk, verified, changes, dir, limits, encode, syncer };
        history.trim();
        Ok(history)
    }

    /// Keeps a record over the daemon's end, and says whether that worked; if not, the build does
    /// not fail.
    fn keep(&self, record: &HistoryRecord) -> bool {
        match kept::write(&self.dir, record) {
            Ok(path) => {
                let files = record.files().map(|f| kept::file_path(&self.dir, f.digest));
                self.syncer.add(&self.dir, files.chain([path]).collect());
                true
            }
            Err(fault) => {
                tracing::warn!(build = record.id, error = %fault, "failed to write the record of the build; it is lost when the daemon stops");
                false
            }
        }
    }

    fn publish(&self, kind: HistoryEventKind, summary: Arc<HistorySummary>) {
        // Having no listener is not an error.
        let _ = self.changes.send(HistoryEvent { kind, summary });
    }

    /// Puts a record into memory: as a whole, or its summary if it is on disk.
    fn insert(&self, record: HistoryRecord, on_disk: bool) -> Arc<HistorySummary> {
        let summary = Arc::new(HistorySummary::of(&record));
        let record = (!on_disk).then(|| Arc::new(record));
        self.entries.lock().insert(summary.id.clone(), Entry { summary: summary.clone(), record });
        summary
    }

    /// Records that a build began.
    pub fn started(&self, build: &StartedBuild) {
        let mut budget = Budget::default();
        let options =
            build.options.iter().map(|(k, v)| (k.clone(), shipway_fault::redact_text(v))).collect();
        let options = budget.map(&options);
        let exporter = |e: &ExporterRecord| ExporterRecord {
            kind: budget.text(&e.kind),
            attrs: budget.map(&e.attrs),
        };
        let record = HistoryRecord {
            id: build.id.clone(),
            owner: build.owner.clone(),
            exporters: build.exporters.iter().map(exporter).collect(),
            frontend: clip::clipped(&build.frontend, clip::MAX_VALUE),
            options,
            error: None,
            failure: None,
            created: SystemTime::now(),
            completed: None,
            log: None,
            trace: None,
            provenance: Vec::new(),
            response: BTreeMap::new(),
            written: BTreeMap::new(),
            pinned: false,
            generation: 0,
            steps: Steps::default(),
        };
        // Another build of that name is no longer of interest, nor are its files.
        if self.summary(&record.id).is_some_and(|s| s.completed.is_some()) {
            let _ = self.delete(&record.id);
        }
        let summary = self.insert(record, false);
        self.publish(HistoryEventKind::Started, summary);
    }

    /// Records how a build ended; `journal` has what happened meanwhile.
    pub async fn completed(
        self: &Arc<Self>,
        id: &str,
        journal: &Journal,
        outcome: Result<FinishedBuild>,
    ) {
        let (history, id, journal) = (self.clone(), id.to_owned(), journal.clone());
        let work = move || {
            history.complete(&id, &journal, outcome);
            Ok(())
        };
        if let Err(error) = shipway_task::blocking("record a build", work).await {
            tracing::warn!(%error, "failed to record a build");
        }
    }

    fn complete(&self, id: &str, journal: &Journal, outcome: Result<FinishedBuild>) {
        let events = journal.events();
        let file = |what: &str, fill: &kept::Fill<'_>| {
            let written = kept::write_file(&self.dir, fill);
            let written = written
                .inspect_err(
                    |f| tracing::warn!(build = id, error = %f, "failed to write the {what} of the build"),
                )
                .ok()?;
            self.verified.lock().insert(written.digest);
            Some(written)
        };
        let one = self.disk.lock();
        let log = file("log", &|out| (self.encode.log)(&events, out));
        let failure = outcome
            .as_ref()
            .err()
            .and_then(|fault| file("error", &|out| out.write_all(&(self.encode.fault)(fault))));
        let statements = outcome.iter().flat_map(|r| &r.provenance);
        let statements = statements.filter_map(|(platform, bytes)| {
            Some((platform.clone(), file("provenance", &|out| out.write_all(bytes))?))
        });
        let provenance = statements.collect();
        let Some(mut record) = self.get(id).map(|r| HistoryRecord::clone(&r)) else { return };
        record.completed = Some(SystemTime::now());
        (record.log, record.failure, record.provenance, record.steps) =
            (log, failure, provenance, count(&events));
        record.generation += 1;
        for (counter, steps) in [
            (&meter::STEPS_TOTAL, record.steps.total),
            (&meter::STEPS_COMPLETED, record.steps.completed),
            (&meter::STEPS_CACHED, record.steps.cached),
            (&meter::STEPS_WARNINGS, record.steps.warnings),
        ] {
            counter.add(u64::try_from(steps).unwrap_or(0));
        }
        match outcome {
            Ok(response) => {
                (record.response, record.written) =
                    (Budget::default().map(&response.metadata), response.written)
            }
            Err(fault) => record.error = Some(fault),
        }
        let kept = self.keep(&record);
        let summary = self.insert(record, kept);
        drop(one);
        self.publish(HistoryEventKind::Completed, summary);
        self.trim();
    }

    /// Adds the trace of a build that ended; one that was forgotten meanwhile has none. Blocks.
    pub fn add_trace(&self, id: &str, text: &[u8]) -> Result<()> {
        let one = self.disk.lock();
        let Some(record) = self.get(id).filter(|r| r.completed.is_some()) else { return Ok(()) };
        let file = kept::write_file(&self.dir, &|out| out.write_all(text))?;
        self.verified.lock().insert(file.digest);
        let mut record = HistoryRecord::clone(&record);
        record.trace = Some(file);
        record.generation += 1;
        let kept = self.keep(&record);
        let summary = self.insert(record, kept);
        drop(one);
        self.publish(HistoryEventKind::Completed, summary);
        Ok(())
    }

    /// Forgets what exceeds both the limits of number and age, or that of bytes (row `so.h.gc`).
    /// Blocks.
    pub fn trim(&self) {
        let gone: Vec<String> = {
            let entries = self.entries.lock();
            let mut finished: Vec<_> = entries
                .values()
                .filter_map(|e| Some((e.summary.completed?, &e.summary)))
                .filter(|(_, s)| !s.pinned)
                .collect();
            finished.sort_by_key(|(completed, _)| std::cmp::Reverse(*completed));
            let old = |completed: &SystemTime| {
                completed.elapsed().is_ok_and(|age| age > self.limits.max_age)
            };
            // A cap beyond what BuildKit has: a busy daemon must stay small within the first two
            // days as well.
            let hard = self.limits.max_entries.saturating_mul(4).max(1);
            let size = |s: &HistorySummary| s.files.iter().map(|f| f.size).sum::<u64>();
            let pinned = entries.values().filter(|e| e.summary.pinned);
            let mut bytes: u64 = pinned.map(|e| size(&e.summary)).sum();
            let excess = finished.iter().enumerate().filter(|(i, (completed, s))| {
                bytes = bytes.saturating_add(size(s));
                // The latest is of use, however large.
                let large = *i > 0 && bytes > self.limits.max_bytes;
                large || *i >= self.limits.max_entries && (old(completed) || *i >= hard)
            });
            excess.map(|(_, (_, s))| s.id.clone()).collect()
        };
        for id in gone {
            let _ = self.delete(&id);
        }
    }

    /// Forgets a finished build. Blocks.
    pub fn delete(&self, id: &str) -> Result<()> {
        let _one = self.disk.lock();
        let mut entries = self.entries.lock();
        let summary = entries.get(id).map(|e| e.summary.clone()).ok_or_else(|| unknown(id))?;
        if summary.completed.is_none() {
            return Err(Fault::new(
                shipway_fault::Code::FailedPrecondition,
                format!("build {id} is still running"),
            ));
        }
        entries.remove(id);
        let kept: HashSet<Digest> =
            entries.values().flat_map(|e| &e.summary.files).map(|f| f.digest).collect();
        drop(entries);
        kept::remove(&self.dir, id);
        for file in summary.files.iter().filter(|f| !kept.contains(&f.digest)) {
            self.verified.lock().remove(&file.digest);
            let _ = std::fs::remove_file(kept::file_path(&self.dir, file.digest));
        }
        self.publish(HistoryEventKind::Deleted, summary);
        Ok(())
    }

    /// Keeps a build whatever the limits, or not. Blocks.
    pub fn pin(&self, id: &str, pinned: bool) -> Result<()> {
        let one = self.disk.lock();
        let mut record =
            self.get(id).map(|r| HistoryRecord::clone(&r)).ok_or_else(|| unknown(id))?;
        record.pinned = pinned;
        record.generation += 1;
        let (kind, kept) = match record.completed {
            Some(_) => (HistoryEventKind::Completed, self.keep(&record)),
            None => (HistoryEventKind::Started, false),
        };
        let summary = self.insert(record, kept);
        drop(one);
        self.publish(kind, summary);
        Ok(())
    }

    /// A build as it stands, in short.
    pub fn summary(&self, id: &str) -> Option<Arc<HistorySummary>> {
        self.entries.lock().get(id).map(|e| e.summary.clone())
    }

    /// One record. Blocks: those of builds that ended are on disk.
    pub fn get(&self, id: &str) -> Option<Arc<HistoryRecord>> {
        let in_memory = self.entries.lock().get(id)?.record.clone();
        in_memory.or_else(|| kept::read(&self.dir, id).map(Arc::new))
    }

    /// All builds in short, oldest first, and what happens from now on.
    pub fn listen(&self) -> (Vec<Arc<HistorySummary>>, broadcast::Receiver<HistoryEvent>) {
        let entries = self.entries.lock();
        let receiver = self.changes.subscribe();
        let mut all: Vec<_> = entries.values().map(|e| e.summary.clone()).collect();
        all.sort_by_key(|s| s.created);
        (all, receiver)
    }

    /// Whether `digest` is a log, an error or a predicate of a build, and its size.
    pub fn knows(&self, digest: Digest) -> Option<u64> {
        self.knows_of(digest, |_| true)
    }

    /// [`knows`](Self::knows), of the builds that are `visible`.
    pub fn knows_of(
        &self,
        digest: Digest,
        visible: impl Fn(&HistorySummary) -> bool,
    ) -> Option<u64> {
        let entries = self.entries.lock();
        let all = entries.values().map(|e| &e.summary).filter(|s| visible(s));
        all.flat_map(|s| &s.files).find(|f| f.digest == digest).map(|f| f.size)
    }

    /// What builds that are `visible` wrote into the content store: manifests and indexes.
    pub fn written(&self, visible: impl Fn(&HistorySummary) -> bool) -> HashSet<Digest> {
        let entries = self.entries.lock();
        let all = entries.values().map(|e| &e.summary).filter(|s| visible(s));
        all.flat_map(|s| s.written.iter().copied()).collect()
    }

    /// A log, an error or a predicate, if `digest` is one and its bytes are what its name says.
    /// Blocks.
    pub fn open_file(&self, digest: Digest) -> Result<Option<File>> {
        if self.knows(digest).is_none() {
            return Ok(None);
        }
        let path = kept::file_path(&self.dir, digest);
        let failed = |e| Fault::io(format!("read the file {digest} of a build"), e);
        if !self.verified.lock().contains(&digest) {
            if !kept::is_whole(&path, digest).map_err(failed)? {
                return Err(Fault::new(
                    shipway_fault::Code::DataLoss,
                    format!("the file {digest} of a build is not what it was: it is damaged"),
                ));
            }
            self.verified.lock().insert(digest);
        }
        File::open(&path).map(Some).map_err(failed)
    }
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
    let number = |f: &dyn Fn(&&&shipway_progress::VertexUpdate) -> bool| {
        last.values().filter(|v| f(v)).count() as i32
    };
    Steps {
        total: last.len() as i32,
        completed: number(&|v| v.completed.is_some()),
        cached: number(&|v| v.cached),
        warnings,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn open(dir: &Path) -> Arc<History> {
        open_with(dir, HistoryLimits::default())
    }

    fn open_with(dir: &Path, limits: HistoryLimits) -> Arc<History> {
        let encode = HistoryEncoders {
            log: Arc::new(|_, out| out.write_all(b"log")),
            fault: Arc::new(|f| f.to_string().into_bytes()),
        };
        Arc::new(History::open(dir.to_owned(), limits, encode).unwrap())
    }

    async fn build_with(
        history: &Arc<History>,
        id: &str,
        options: BTreeMap<String, String>,
        outcome: Result<FinishedBuild>,
    ) {
        history.started(&StartedBuild { id: id.into(), options, ..StartedBuild::default() });
        history.completed(id, &Journal::new(), outcome).await;
    }

    async fn build(history: &Arc<History>, id: &str, outcome: Result<FinishedBuild>) {
        build_with(history, id, [("target".into(), "x".into())].into(), outcome).await;
    }

    fn text(history: &History, file: LogFile) -> String {
        io::read_to_string(history.open_file(file.digest).unwrap().unwrap()).unwrap()
    }

    #[tokio::test]
    async fn what_ended_outlives_the_daemon_and_nothing_else_does() {
        let dir = tempfile::tempdir().unwrap();
        let first = open(dir.path());
        build(
            &first,
            "../../good",
            Ok(FinishedBuild {
                metadata: [("a".into(), "b".into())].into(),
                ..FinishedBuild::default()
            }),
        )
        .await;
        build(&first, "bad", Err(Fault::not_found("no such thing").context("step"))).await;
        build(&first, "gone", Ok(FinishedBuild::default())).await;
        first.pin("bad", true).unwrap();
        first.delete("gone").unwrap();
        first.started(&StartedBuild { id: "cut off".into(), ..StartedBuild::default() });
        std::fs::write(dir.path().join("stray"), "x").unwrap();
        std::fs::write(dir.path().join("broken.json"), "{").unwrap();
        drop(first);

        let next = open(dir.path());
        let ids: Vec<String> = next.listen().0.iter().map(|r| r.id.clone()).collect();
        assert_eq!(ids, ["../../good", "bad"]);
        assert_eq!(next.get("../../good").unwrap().response["a"], "b");
        let bad = next.get("bad").unwrap();
        let error = bad.error.clone().unwrap();
        assert_eq!(
            (error.to_string().as_str(), error.code()),
            ("step: no such thing", shipway_fault::Code::NotFound)
        );
        assert!(bad.pinned && bad.options["target"] == "x");
        assert_eq!(next.summary("bad").unwrap().status, HistoryStatus::Error);
        assert_eq!(
            (text(&next, bad.log.unwrap()), text(&next, bad.failure.unwrap())),
            ("log".into(), "step: no such thing".into())
        );
        next.delete("bad").unwrap();
        next.delete("../../good").unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[tokio::test]
    async fn a_trace_comes_later_and_goes_with_its_record() {
        let dir = tempfile::tempdir().unwrap();
        let first = open(dir.path());
        build(&first, "a", Ok(FinishedBuild::default())).await;
        let (before, mut changes) = (first.get("a").unwrap().generation, first.listen().1);
        first.add_trace("a", b"spans").unwrap();
        first.add_trace("forgotten", b"others").unwrap();
        let change = changes.try_recv().unwrap();
        assert_eq!((change.kind, &*change.summary.id), (HistoryEventKind::Completed, "a"));
        drop(first);
        let next = open(dir.path());
        let record = next.get("a").unwrap();
        assert!(record.generation > before);
        assert_eq!(text(&next, record.trace.unwrap()), "spans");
        next.delete("a").unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[tokio::test]
    async fn large_options_are_neither_kept_in_memory_nor_lose_the_record() {
        let dir = tempfile::tempdir().unwrap();
        let first = open(dir.path());
        // As large as a message may be; control characters are six bytes each in JSON.
        let huge = || {
            [("build-arg:x".to_owned(), "\u{1}".repeat(15 << 20)), ("target".into(), "x".into())]
                .into()
        };
        for i in 0..8 {
            build_with(&first, &format!("build-{i}"), huge(), Ok(FinishedBuild::default())).await;
        }
        let in_memory = first.entries.lock().values().filter(|e| e.record.is_some()).count();
        assert_eq!(in_memory, 0, "records of builds that ended are kept in memory");
        drop(first);
        let next = open(dir.path());
        assert_eq!(next.listen().0.len(), 8);
        let record = next.get("build-7").unwrap();
        assert!(
            record.options["target"] == "x"
                && record.options["build-arg:x"].len() < 2 * clip::MAX_VALUE
        );
        for file in std::fs::read_dir(dir.path()).unwrap() {
            assert!(file.unwrap().metadata().unwrap().len() <= kept::MAX_RECORD);
        }
    }

    #[tokio::test]
    async fn a_record_too_large_to_be_read_is_written_with_less() {
        let dir = tempfile::tempdir().unwrap();
        let first = open(dir.path());
        let platform = |i: usize| (Some(format!("{i}{}", "x".repeat(1000))), vec![0]);
        let provenance = (0..10_000).map(platform).collect();
        build(&first, "many", Ok(FinishedBuild { provenance, ..FinishedBuild::default() })).await;
        let next = open(dir.path());
        let record = next.get("many").unwrap();
        assert!(record.provenance.is_empty() && text(&next, record.log.unwrap()) == "log");
    }

    #[tokio::test]
    async fn files_that_did_not_reach_the_disk_are_gone_and_never_short() {
        let dir = tempfile::tempdir().unwrap();
        let first = open(dir.path());
        build(&first, "short", Err(Fault::not_found("no"))).await;
        let record = first.get("short").unwrap();
        let (log, failure) = (record.log.unwrap(), record.failure.unwrap());
        drop(first);
        std::fs::write(dir.path().join(log.digest.hex()), "l").unwrap();
        std::fs::write(dir.path().join(failure.digest.hex()), "NO").unwrap();
        let next = open(dir.path());
        assert_eq!(
            (next.get("short").unwrap().log, next.summary("short").unwrap().log),
            (None, None)
        );
        assert!(next.open_file(log.digest).unwrap().is_none());
        assert_eq!(
            next.open_file(failure.digest).unwrap_err().code(),
            shipway_fault::Code::DataLoss
        );
    }

    #[tokio::test]
    async fn old_records_beyond_the_number_go_also_at_a_start() {
        let dir = tempfile::tempdir().unwrap();
        let first = open(dir.path());
        for i in 0..5 {
            build(&first, &i.to_string(), Ok(FinishedBuild::default())).await;
        }
        first.pin("0", true).unwrap();
        drop(first);
        let next = open_with(
            dir.path(),
            HistoryLimits { max_age: Duration::ZERO, max_entries: 2, ..HistoryLimits::default() },
        );
        let ids: Vec<String> = next.listen().0.iter().map(|r| r.id.clone()).collect();
        assert_eq!(ids, ["0", "3", "4"]);
    }

    #[tokio::test]
    async fn the_oldest_records_go_when_all_take_too_many_bytes() {
        let dir = tempfile::tempdir().unwrap();
        let first = open(dir.path());
        for i in 0..5 {
            let finished = FinishedBuild {
                provenance: vec![(None, vec![i; 1000])],
                ..FinishedBuild::default()
            };
            build(&first, &i.to_string(), Ok(finished)).await;
        }
        let all: u64 = first.listen().0.iter().flat_map(|r| &r.files).map(|f| f.size).sum();
        first.pin("0", true).unwrap();
        drop(first);
        let ids = |max_bytes| {
            let next = open_with(dir.path(), HistoryLimits { max_bytes, ..Default::default() });
            next.listen().0.iter().map(|r| r.id.clone()).collect::<Vec<String>>()
        };
        assert_eq!(ids(all), ["0", "1", "2", "3", "4"]);
        assert_eq!(ids(all * 4 / 5), ["0", "2", "3", "4"]);
        assert_eq!(ids(0), ["0", "4"], "what is pinned and the latest stay");
    }

    #[test]
    fn a_repository_is_told_or_seen_in_the_context() {
        let of = |options: &[(&str, &str)]| {
            repository(&options.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect())
        };
        assert_eq!(
            of(&[("context", "https://example.org/a.git#main:sub")]).as_deref(),
            Some("https://example.org/a.git")
        );
        assert_eq!(
            of(&[("context", "https://example.org/a.git"), ("vcs:source", "x")]).as_deref(),
            Some("x")
        );
        assert_eq!((of(&[("context", ".")]), of(&[])), (None, None));
    }
}
