//! A vertex's voice.

use crate::{
    CacheMiss, Event, Group, Journal, LogStream, LogUpdate, StatusUpdate, VertexUpdate,
    WarningUpdate,
    journal::{JournalInner, weight},
};
use parking_lot::Mutex;
use shipway_fault::{Fault, redact_text};
use shipway_oci::Digest;
use std::{
    collections::HashMap,
    sync::{Arc, Weak},
    time::{Duration, Instant, SystemTime},
};

/// A counter's states are reported at most this often; its first and its last one always.
const STATUS_INTERVAL: Duration = Duration::from_millis(100);
/// Counters of one vertex.
const MAX_COUNTERS: usize = 4096;
/// Memory that one vertex's output may take, with what its pieces cost.
const MAX_LOG: usize = 32 << 20;
/// Warnings of one vertex.
const MAX_WARNINGS: usize = 1000;

/// One vertex's voice, heard in every journal attached. Clones share it.
#[derive(Clone)]
pub struct Reporter(Arc<ReporterInner>);

struct ReporterInner {
    state: Mutex<ReporterState>,
}

struct ReporterState {
    vertex: Arc<VertexUpdate>,
    journals: Vec<Weak<JournalInner>>,
    /// What a journal attached later must hear: all logs and warnings.
    past: Vec<Event>,
    /// The same of counters: their last states.
    counters: Vec<Counter>,
    /// Where in `counters` which one is.
    places: HashMap<String, usize>,
    log: usize,
    warnings: usize,
}

/// A counter's last state.
struct Counter {
    update: Arc<StatusUpdate>,
    /// When a state of it was last reported.
    reported: Instant,
}

impl Journal {
    /// A reporter for a vertex of this build alone, such as an export.
    pub fn reporter(&self, digest: Digest, name: impl Into<String>) -> Reporter {
        let reporter = Reporter::new(digest, name.into(), Vec::new(), None);
        reporter.attach(self);
        reporter
    }
}

impl Reporter {
    /// A reporter without a journal.
    pub fn new(digest: Digest, name: String, inputs: Vec<Digest>, group: Option<Group>) -> Self {
        let name = redact_text(&name);
        let vertex = VertexUpdate {
            digest,
            inputs,
            name,
            cached: false,
            started: None,
            completed: None,
            error: None,
            miss: None,
            group,
        };
        let state = ReporterState {
            vertex: Arc::new(vertex),
            journals: Vec::new(),
            past: Vec::new(),
            counters: Vec::new(),
            places: HashMap::new(),
            log: 0,
            warnings: 0,
        };
        Self(Arc::new(ReporterInner { state: Mutex::new(state) }))
    }

    /// Lets `journal` hear this vertex: its state, what it said so far, and what it will say.
    pub fn attach(&self, journal: &Journal) {
        let mut state = self.0.state.lock();
        let weak = Arc::downgrade(&journal.0);
        if state.journals.iter().any(|j| j.ptr_eq(&weak)) {
            return;
        }
        journal.push(Event::Vertex(state.vertex.clone()));
        state.past.iter().for_each(|event| journal.push(event.clone()));
        state
            .counters
            .iter()
            .for_each(|counter| journal.push(Event::Status(counter.update.clone())));
        state.journals.push(weak);
    }

    /// Stops `journal` from hearing more.
    pub fn detach(&self, journal: &Journal) {
        let weak = Arc::downgrade(&journal.0);
        self.0.state.lock().journals.retain(|j| !j.ptr_eq(&weak));
    }

    /// The vertex's digest.
    pub fn digest(&self) -> Digest {
        self.0.state.lock().vertex.digest
    }

    /// The vertex's name.
    pub fn name(&self) -> String {
        self.0.state.lock().vertex.name.clone()
    }

    fn say(state: &mut ReporterState, event: Event) {
        state.journals.retain(|weak| match weak.upgrade() {
            Some(inner) => {
                Journal(inner).push(event.clone());
                true
            }
            None => false,
        });
    }

    fn vertex(&self, change: impl FnOnce(&mut VertexUpdate)) {
        let mut state = self.0.state.lock();
        change(Arc::make_mut(&mut state.vertex));
        let event = Event::Vertex(state.vertex.clone());
        Self::say(&mut state, event);
    }

    /// Work begins (again).
    pub fn started(&self) {
        self.vertex(|v| {
            if v.started.is_none() || v.completed.is_some() {
                v.started = Some(SystemTime::now());
            }
            v.completed = None;
            v.cached = false;
            v.error = None;
            v.miss = None;
        });
    }

    /// Says why work began.
    pub fn missed(&self, miss: CacheMiss) {
        self.vertex(|v| v.miss = Some(Arc::new(miss)));
    }

    /// Work ended, well or with an error.
    pub fn completed(&self, error: Option<String>) {
        self.vertex(|v| {
            let now = SystemTime::now();
            v.started.get_or_insert(now);
            v.completed = Some(now);
            v.error = error.as_deref().map(redact_text);
        });
    }

    /// The result came from the cache, or was never needed (row `so.st.cached`). Says nothing if
    /// work was done already.
    pub fn cached(&self) {
        if self.0.state.lock().vertex.completed.is_some() {
            return;
        }
        self.vertex(|v| {
            let now = SystemTime::now();
            v.started.get_or_insert(now);
            v.completed = Some(now);
            v.cached = true;
        });
    }

    /// Whether it reports to a journal that still exists.
    pub fn is_heard(&self) -> bool {
        self.0.state.lock().journals.iter().any(|j| j.strong_count() > 0)
    }

    /// Whether the vertex was reported as ended.
    pub fn is_completed(&self) -> bool {
        self.0.state.lock().vertex.completed.is_some()
    }

    /// Sets a counter; `done` ends it. States that follow each other closely are not all reported.
    pub fn status(&self, id: impl Into<String>, current: i64, total: i64, done: bool) {
        self.named_status(id, "", current, total, done);
    }

    /// Sets a counter that also says what is done, such as `transferring`, for programs that look
    /// for that.
    pub fn named_status(
        &self,
        id: impl Into<String>,
        name: &str,
        current: i64,
        total: i64,
        done: bool,
    ) {
        let (id, time, now) = (id.into(), SystemTime::now(), Instant::now());
        let mut state = self.0.state.lock();
        let vertex = state.vertex.digest;
        let place = state.places.get(&id).copied();
        let started = place.map_or(Some(time), |at| state.counters[at].update.started);
        let completed = done.then_some(time);
        let update = Arc::new(StatusUpdate {
            vertex,
            id: id.clone(),
            name: name.to_owned(),
            current,
            total,
            time,
            started,
            completed,
        });
        match place {
            Some(at) => {
                let counter = &mut state.counters[at];
                counter.update = update.clone();
                if !done && now.duration_since(counter.reported) < STATUS_INTERVAL {
                    return;
                }
                counter.reported = now;
            }
            None if state.counters.len() == MAX_COUNTERS => return,
            None => {
                let at = state.counters.len();
                state.places.insert(id, at);
                state.counters.push(Counter { update: update.clone(), reported: now });
            }
        }
        Self::say(&mut state, Event::Status(update));
    }

    /// Output of the vertex.
    pub fn log(&self, stream: LogStream, bytes: &[u8]) {
        self.log_at(stream, bytes, SystemTime::now());
    }

    /// Output that the vertex made at `time`.
    pub fn log_at(&self, stream: LogStream, bytes: &[u8], time: SystemTime) {
        let mut state = self.0.state.lock();
        if state.log >= MAX_LOG {
            return;
        }
        let mut bytes: Box<[u8]> = bytes.into();
        let vertex = state.vertex.digest;
        let event = |bytes| Event::Log(Arc::new(LogUpdate { vertex, stream, bytes, time }));
        let size = weight(&event(Box::default())) + bytes.len();
        state.log += size;
        if state.log >= MAX_LOG {
            bytes = format!("\n[output clipped, log limit {}MiB reached]\n", MAX_LOG >> 20)
                .into_bytes()
                .into();
        }
        let event = event(bytes);
        state.past.push(event.clone());
        Self::say(&mut state, event);
    }

    /// A warning that the vertex goes on without something that failed; what `fault` advises are
    /// its further lines.
    pub fn warn_of(&self, short: String, fault: &Fault) {
        self.warn(WarningUpdate {
            vertex: self.digest(),
            level: 1,
            short,
            detail: fault.hints().map(str::to_owned).collect(),
            url: String::new(),
            source: None,
        });
    }

    /// A warning about the vertex.
    pub fn warn(&self, warning: WarningUpdate) {
        let mut state = self.0.state.lock();
        if state.warnings == MAX_WARNINGS {
            return;
        }
        state.warnings += 1;
        let event = Event::Warning(Arc::new(warning));
        state.past.push(event.clone());
        Self::say(&mut state, event);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(events: &[Event]) -> Vec<String> {
        events
            .iter()
            .map(|e| match e {
                Event::Vertex(v) => format!(
                    "{} {}{}",
                    v.name,
                    if v.cached {
                        "cached"
                    } else if v.started.is_some() {
                        "started"
                    } else {
                        "known"
                    },
                    if v.completed.is_some() { " done" } else { "" }
                ),
                Event::Status(s) => format!("{} {}/{}", s.id, s.current, s.total),
                Event::Log(l) => String::from_utf8_lossy(&l.bytes).into_owned(),
                Event::Warning(w) => w.short.clone(),
            })
            .collect()
    }

    fn reporter() -> Reporter {
        Reporter::new(Digest::of("v"), "v".into(), vec![], None)
    }

    #[test]
    fn a_journal_attached_late_hears_what_was_said() {
        let r = reporter();
        r.started();
        r.log(LogStream::Stdout, b"hello");
        r.status("x", 1, 2, false);
        r.status("x", 2, 2, true);
        let j = Journal::new();
        r.attach(&j);
        r.completed(None);
        assert_eq!(names(&j.events()), ["v started", "hello", "x 2/2", "v started done"]);
    }

    #[tokio::test]
    async fn a_counter_is_told_rarely_but_its_end_always() {
        let (r, j) = (reporter(), Journal::new());
        r.attach(&j);
        let began = Instant::now();
        let (mut w, mut events) = (j.watch(), Vec::new());
        for i in 0..100_000 {
            r.status("x", i, 0, i == 99_999);
            // All that is reported at once is there at once: one state at most is new.
            if i == 0 || i == 99_999 {
                events.extend(w.next().await.expect("the journal is open"));
            }
        }
        let statuses: Vec<_> = events
            .iter()
            .filter_map(|e| if let Event::Status(s) = e { Some(s.current) } else { None })
            .collect();
        assert_eq!(statuses, [0, 99_999]);
        let said = j.events().len();
        assert!(said == 2, "{said} events after {:?}", began.elapsed());
        let s = r.0.state.lock();
        assert!(s.counters.len() == 1 && s.past.is_empty());
    }

    #[test]
    fn counters_of_a_vertex_are_limited() {
        let (r, j) = (reporter(), Journal::new());
        r.attach(&j);
        (0..MAX_COUNTERS + 100).for_each(|n| r.status(format!("{n}"), 1, 1, true));
        assert_eq!(j.events().len(), MAX_COUNTERS + 1);
    }

    #[test]
    fn many_small_pieces_of_output_are_limited_and_copied_exactly() {
        let r = reporter();
        let all = vec![b'x'; 64 << 10];
        for piece in 0..1_000_000 {
            r.log(LogStream::Stdout, &all[piece % 1000..][..1]);
        }
        let j = Journal::new();
        r.attach(&j);
        let events = j.events();
        let kept: usize = events.iter().map(weight).sum();
        assert!(kept <= MAX_LOG + 1024, "{kept}");
        assert!(
            matches!(events.last(), Some(Event::Log(l)) if l.bytes.ends_with(b"log limit 32MiB reached]\n"))
        );
    }

    #[test]
    fn warnings_of_a_vertex_are_limited() {
        let r = reporter();
        for n in 0..MAX_WARNINGS + 5 {
            let short = format!("{n}");
            r.warn(WarningUpdate {
                vertex: r.digest(),
                level: 1,
                short,
                detail: vec![],
                url: String::new(),
                source: None,
            });
        }
        let j = Journal::new();
        r.attach(&j);
        assert_eq!(j.events().len(), MAX_WARNINGS + 1);
    }
}
