//! Reporters, journals and watchers.

use crate::{Event, Group, LogStream, StatusUpdate, VertexUpdate, WarningUpdate};
use bytes::Bytes;
use shipway_fault::redact_text;
use shipway_oci::Digest;
use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::SystemTime,
};
use tokio::sync::Notify;

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One build's record: everything that was said, for replay and for any number of watchers. Clones share it.
#[derive(Clone, Default)]
pub struct Journal(Arc<JournalInner>);

#[derive(Default)]
struct JournalInner {
    state: Mutex<JournalState>,
    changed: Notify,
}

#[derive(Default)]
struct JournalState {
    events: Vec<Event>,
    closed: bool,
}

impl Journal {
    /// An empty, open journal.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds an event; dropped silently once the journal is closed.
    pub fn push(&self, event: Event) {
        let mut state = lock(&self.0.state);
        if !state.closed {
            state.events.push(event);
            drop(state);
            self.0.changed.notify_waiters();
        }
    }

    /// Ends the journal: vertices that started and did not end are closed as cancelled (row `so.st.encore`), and watchers come to their end.
    pub fn close(&self) {
        let mut state = lock(&self.0.state);
        if state.closed {
            return;
        }
        let mut open: Vec<VertexUpdate> = Vec::new();
        for event in &state.events {
            if let Event::Vertex(v) = event {
                open.retain(|o| o.digest != v.digest);
                if v.started.is_some() && v.completed.is_none() {
                    open.push(v.clone());
                }
            }
        }
        let now = SystemTime::now();
        for mut v in open {
            v.completed = Some(now);
            v.error = Some("context canceled".into());
            state.events.push(Event::Vertex(v));
        }
        state.closed = true;
        drop(state);
        self.0.changed.notify_waiters();
    }

    /// Follows the journal from its beginning.
    pub fn watch(&self) -> Watcher {
        Watcher { journal: self.clone(), next: 0 }
    }

    /// Everything said so far.
    pub fn events(&self) -> Vec<Event> {
        lock(&self.0.state).events.clone()
    }

    /// A reporter for a vertex of this build alone, such as an export.
    pub fn reporter(&self, digest: Digest, name: impl Into<String>) -> Reporter {
        let reporter = Reporter::new(digest, name.into(), Vec::new(), None);
        reporter.attach(self);
        reporter
    }
}

/// Reads a journal from its beginning to its end.
pub struct Watcher {
    journal: Journal,
    next: usize,
}

impl Watcher {
    /// The events since the last call, at least one; `None` when the journal is closed and all was read.
    pub async fn next(&mut self) -> Option<Vec<Event>> {
        let inner = self.journal.0.clone();
        loop {
            let changed = inner.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            {
                let state = lock(&inner.state);
                if state.events.len() > self.next {
                    let batch = state.events[self.next..].to_vec();
                    self.next = state.events.len();
                    return Some(batch);
                }
                if state.closed {
                    return None;
                }
            }
            changed.await;
        }
    }
}

/// One vertex's voice, heard in every journal attached. Clones share it.
#[derive(Clone)]
pub struct Reporter(Arc<ReporterInner>);

struct ReporterInner {
    state: Mutex<ReporterState>,
}

struct ReporterState {
    vertex: VertexUpdate,
    journals: Vec<Weak<JournalInner>>,
    /// What a journal attached later must hear: statuses and warnings by id, and all logs.
    past: Vec<Event>,
}

impl Reporter {
    /// A voice that nobody hears yet.
    pub fn new(digest: Digest, name: String, inputs: Vec<Digest>, group: Option<Group>) -> Self {
        let name = redact_text(&name);
        let vertex = VertexUpdate { digest, inputs, name, cached: false, started: None, completed: None, error: None, group };
        Self(Arc::new(ReporterInner { state: Mutex::new(ReporterState { vertex, journals: Vec::new(), past: Vec::new() }) }))
    }

    /// Lets `journal` hear this vertex: its state, what it said so far, and what it will say.
    pub fn attach(&self, journal: &Journal) {
        let mut state = lock(&self.0.state);
        let weak = Arc::downgrade(&journal.0);
        if state.journals.iter().any(|j| j.ptr_eq(&weak)) {
            return;
        }
        journal.push(Event::Vertex(state.vertex.clone()));
        for event in &state.past {
            journal.push(event.clone());
        }
        state.journals.push(weak);
    }

    /// Stops `journal` from hearing more.
    pub fn detach(&self, journal: &Journal) {
        let weak = Arc::downgrade(&journal.0);
        lock(&self.0.state).journals.retain(|j| !j.ptr_eq(&weak));
    }

    /// The vertex's digest.
    pub fn digest(&self) -> Digest {
        lock(&self.0.state).vertex.digest
    }

    /// The vertex's name.
    pub fn name(&self) -> String {
        lock(&self.0.state).vertex.name.clone()
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
        let mut state = lock(&self.0.state);
        change(&mut state.vertex);
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
        });
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

    /// The result came from the cache, or was never needed (row `so.st.cached`). Says nothing if work was done already.
    pub fn cached(&self) {
        if lock(&self.0.state).vertex.completed.is_some() {
            return;
        }
        self.vertex(|v| {
            let now = SystemTime::now();
            v.started.get_or_insert(now);
            v.completed = Some(now);
            v.cached = true;
        });
    }

    /// Whether a journal that somebody still has hears it.
    pub fn is_heard(&self) -> bool {
        lock(&self.0.state).journals.iter().any(|j| j.strong_count() > 0)
    }

    /// Whether the vertex was reported as ended.
    pub fn is_completed(&self) -> bool {
        lock(&self.0.state).vertex.completed.is_some()
    }

    /// Sets a counter; `done` ends it.
    pub fn status(&self, id: impl Into<String>, current: i64, total: i64, done: bool) {
        self.named_status(id, "", current, total, done);
    }

    /// Sets a counter that also says what is done, such as `transferring`, for programs that look for that.
    pub fn named_status(&self, id: impl Into<String>, name: &str, current: i64, total: i64, done: bool) {
        let (id, now) = (id.into(), SystemTime::now());
        let mut state = lock(&self.0.state);
        let vertex = state.vertex.digest;
        let place = state.past.iter().position(|e| matches!(e, Event::Status(s) if s.id == id));
        let started = match place.map(|i| &state.past[i]) {
            Some(Event::Status(s)) => s.started,
            _ => Some(now),
        };
        let completed = done.then_some(now);
        let update = StatusUpdate { vertex, id, name: name.to_owned(), current, total, time: now, started, completed };
        match place {
            Some(i) => state.past[i] = Event::Status(update.clone()),
            None => state.past.push(Event::Status(update.clone())),
        }
        Self::say(&mut state, Event::Status(update));
    }

    /// Output of the vertex.
    pub fn log(&self, stream: LogStream, bytes: Bytes) {
        let mut state = lock(&self.0.state);
        let event = Event::Log { vertex: state.vertex.digest, stream, bytes, time: SystemTime::now() };
        state.past.push(event.clone());
        Self::say(&mut state, event);
    }

    /// A warning about the vertex.
    pub fn warn(&self, warning: WarningUpdate) {
        let mut state = lock(&self.0.state);
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
                Event::Log { bytes, .. } => String::from_utf8_lossy(bytes).into_owned(),
                Event::Warning(w) => w.short.clone(),
            })
            .collect()
    }

    #[test]
    fn a_journal_attached_late_hears_what_was_said() {
        let r = Reporter::new(Digest::of("v"), "v".into(), vec![], None);
        r.started();
        r.log(LogStream::Stdout, "hello".into());
        r.status("x", 1, 2, false);
        r.status("x", 2, 2, true);
        let j = Journal::new();
        r.attach(&j);
        r.completed(None);
        assert_eq!(names(&j.events()), ["v started", "hello", "x 2/2", "v started done"]);
    }

    #[tokio::test]
    async fn closing_ends_open_vertices_and_watchers() {
        let j = Journal::new();
        j.reporter(Digest::of("a"), "a").started();
        let mut w = j.watch();
        assert!(w.next().await.is_some());
        j.close();
        let last = w.next().await.expect("the open vertex is closed");
        assert!(matches!(&last[..], [Event::Vertex(v)] if v.error.as_deref() == Some("context canceled")));
        assert!(w.next().await.is_none());
    }
}
