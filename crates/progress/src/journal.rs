//! Journals and watchers.

use crate::{Event, LogUpdate, VertexUpdate, WarningUpdate};
use parking_lot::Mutex;
use shipway_fault::SourceFile;
use shipway_oci::Digest;
use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::SystemTime,
};
use tokio::sync::Notify;

/// Memory that one build's events may take, as far as [`weight`] estimates it.
const MAX_MEMORY: usize = 128 << 20;
/// Warnings of one build.
const MAX_WARNINGS: usize = 1000;
/// Memory of one warning, without the text of the source that it points into.
const MAX_WARNING: usize = 64 << 10;
/// Texts of sources that the warnings of one build point into, all together.
const MAX_SOURCES: usize = 16 << 20;
/// Memory of the events that a watcher gets at once.
const MAX_BATCH: usize = 1 << 20;
/// What an event takes besides its texts: its allocations and its place in the list.
const OVERHEAD: usize = 192;

/// About how much memory an event takes, without the text of a source.
pub(crate) fn weight(event: &Event) -> usize {
    OVERHEAD
        + match event {
            Event::Vertex(v) => {
                v.name.len()
                    + v.inputs.len() * size_of::<Digest>()
                    + v.error.as_ref().map_or(0, String::len)
                    + v.miss.as_ref().map_or(0, |miss| miss.weight())
            }
            Event::Status(s) => s.id.len() + s.name.len(),
            Event::Log(l) => l.bytes.len(),
            Event::Warning(w) => warning_weight(w),
        }
}

fn warning_weight(w: &WarningUpdate) -> usize {
    let text = w.short.len()
        + w.url.len()
        + w.detail.iter().map(|d| d.len() + size_of::<String>()).sum::<usize>();
    text + w.source.as_ref().map_or(0, |s| size_of_val(&s.spans[..]))
}

/// One build's record: what was said, for replay and for any number of watchers. Clones share it.
#[derive(Clone, Default)]
pub struct Journal(pub(crate) Arc<JournalInner>);

#[derive(Default)]
pub(crate) struct JournalInner {
    state: Mutex<JournalState>,
    changed: Notify,
}

#[derive(Default)]
struct JournalState {
    /// Events in order, with numbers that only grow; what a later event stands for is `None` until
    /// the list is tidied.
    events: Vec<(u64, Option<Event>)>,
    next: u64,
    /// How many of `events` are `None`.
    gone: usize,
    memory: usize,
    /// Where the last state of a counter is.
    counters: HashMap<Digest, HashMap<String, u64>>,
    /// Where the last state of a vertex is.
    vertices: HashMap<Digest, u64>,
    warnings: usize,
    sources: Vec<Arc<SourceFile>>,
    /// Whether it was said that something is left out.
    clipped: bool,
    closed: bool,
}

impl JournalState {
    /// Adds an event within the bounds; says whether there is something new.
    fn add(&mut self, event: Event) -> bool {
        let event = match event {
            Event::Warning(warning) => match self.bounded(warning) {
                Some(warning) => Event::Warning(warning),
                None => return false,
            },
            event => event,
        };
        // The state of a counter stands for all earlier ones, and so does that of a vertex where
        // memory is short.
        let short = self.memory + weight(&event) > MAX_MEMORY;
        let replaced = match &event {
            Event::Status(s) => self.counters.get(&s.vertex).and_then(|c| c.get(&s.id)).copied(),
            Event::Vertex(v) if short => self.vertices.get(&v.digest).copied(),
            _ => None,
        };
        if let Some(old) = replaced {
            self.remove(old);
        } else if short {
            return self.clip(&event);
        }
        self.append(event);
        true
    }

    fn append(&mut self, event: Event) {
        match &event {
            Event::Status(s) => {
                self.counters.entry(s.vertex).or_default().insert(s.id.clone(), self.next);
            }
            Event::Vertex(v) => {
                self.vertices.insert(v.digest, self.next);
            }
            _ => {}
        }
        self.memory += weight(&event);
        self.events.push((self.next, Some(event)));
        self.next += 1;
    }

    fn remove(&mut self, number: u64) {
        let Ok(at) = self.events.binary_search_by_key(&number, |(n, _)| *n) else { return };
        let Some(event) = self.events[at].1.take() else { return };
        self.memory -= weight(&event);
        self.gone += 1;
        if self.gone > self.events.len() / 2 {
            self.events.retain(|(_, event)| event.is_some());
            self.gone = 0;
        }
    }

    /// Leaves `event` out, which is said once.
    fn clip(&mut self, event: &Event) -> bool {
        let (vertex, stream) = match event {
            Event::Log(log) => (log.vertex, log.stream),
            _ => return false,
        };
        if std::mem::replace(&mut self.clipped, true) {
            return false;
        }
        let notice =
            format!("\n[output clipped, log limit {}MiB of the build reached]\n", MAX_MEMORY >> 20);
        self.append(Event::Log(Arc::new(LogUpdate {
            vertex,
            stream,
            bytes: notice.into_bytes().into(),
            time: SystemTime::now(),
        })));
        true
    }

    /// The warning as it is kept, if it still is: short enough, and with one copy of its source for
    /// all that point into it.
    fn bounded(&mut self, mut warning: Arc<WarningUpdate>) -> Option<Arc<WarningUpdate>> {
        if self.warnings == MAX_WARNINGS {
            return None;
        }
        self.warnings += 1;
        if warning_weight(&warning) > MAX_WARNING {
            Arc::make_mut(&mut warning).shorten();
        }
        if let Some(file) = warning.source.as_ref().map(|s| s.file.clone()) {
            match self.source(&file) {
                Some(known) if Arc::ptr_eq(&known, &file) => {}
                Some(known) => Arc::make_mut(&mut warning)
                    .source
                    .iter_mut()
                    .for_each(|s| s.file = known.clone()),
                None => Arc::make_mut(&mut warning).source = None,
            }
        }
        Some(warning)
    }

    /// The kept copy of `file`; none if it is too much.
    fn source(&mut self, file: &Arc<SourceFile>) -> Option<Arc<SourceFile>> {
        let known =
            self.sources.iter().find(|known| Arc::ptr_eq(known, file) || known == &file).cloned();
        known.or_else(|| {
            let size = |f: &SourceFile| {
                OVERHEAD
                    + f.filename.len()
                    + f.data.len()
                    + f.definition.as_ref().map_or(0, Vec::len)
            };
            let all: usize = self.sources.iter().map(|f| size(f)).sum();
            (all + size(file) <= MAX_SOURCES).then(|| {
                self.sources.push(file.clone());
                file.clone()
            })
        })
    }

    /// The vertices that started and did not end, in the order of their last events.
    fn open(&self) -> Vec<VertexUpdate> {
        let mut seen = HashSet::new();
        let last = self.events.iter().rev().filter_map(|(_, event)| match event {
            Some(Event::Vertex(v)) if seen.insert(v.digest) => Some(v),
            _ => None,
        });
        let mut open: Vec<_> = last
            .filter(|v| v.started.is_some() && v.completed.is_none())
            .map(|v| VertexUpdate::clone(v))
            .collect();
        open.reverse();
        open
    }
}

impl WarningUpdate {
    /// Cuts the texts so that all of them are within the limit.
    fn shorten(&mut self) {
        let mut left = MAX_WARNING;
        let mut cut = |text: &mut String| {
            let mut at = text.len().min(left);
            while !text.is_char_boundary(at) {
                at -= 1;
            }
            text.truncate(at);
            text.shrink_to_fit();
            left -= at;
        };
        cut(&mut self.short);
        cut(&mut self.url);
        // The lines themselves take memory, too.
        self.detail.truncate(MAX_WARNING / 64);
        self.detail.iter_mut().for_each(&mut cut);
        self.detail.shrink_to_fit();
        if let Some(source) = &mut self.source {
            source.spans.truncate(MAX_WARNING / 64);
            source.spans.shrink_to_fit();
        }
    }
}

impl Journal {
    /// An empty, open journal.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds an event; dropped silently once the journal is closed.
    pub fn push(&self, event: Event) {
        let mut state = self.0.state.lock();
        if !state.closed && state.add(event) {
            drop(state);
            self.0.changed.notify_waiters();
        }
    }

    /// Ends the journal: vertices that started and did not end are closed as cancelled (row
    /// `so.st.encore`), and watchers come to their end.
    pub fn close(&self) {
        let mut state = self.0.state.lock();
        if state.closed {
            return;
        }
        let now = SystemTime::now();
        for mut v in state.open() {
            v.completed = Some(now);
            v.error = Some("context canceled".into());
            state.add(Event::Vertex(Arc::new(v)));
        }
        state.closed = true;
        drop(state);
        self.0.changed.notify_waiters();
    }

    /// Follows the journal from its beginning.
    pub fn watch(&self) -> Watcher {
        Watcher { journal: self.clone(), next: 0 }
    }

    /// Everything that was said and is kept.
    pub fn events(&self) -> Vec<Event> {
        self.0.state.lock().events.iter().filter_map(|(_, event)| event.clone()).collect()
    }
}

/// Reads a journal from its beginning to its end.
pub struct Watcher {
    journal: Journal,
    next: u64,
}

impl Watcher {
    /// The next events since the last call, at least one; `None` when the journal is closed and all
    /// was read.
    pub async fn next(&mut self) -> Option<Vec<Event>> {
        let inner = self.journal.0.clone();
        loop {
            let changed = inner.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            {
                let state = inner.state.lock();
                let batch = self.take(&state);
                if !batch.is_empty() {
                    return Some(batch);
                }
                if state.closed {
                    return None;
                }
            }
            changed.await;
        }
    }

    fn take(&mut self, state: &JournalState) -> Vec<Event> {
        let from = state.events.partition_point(|(number, _)| *number < self.next);
        let (mut batch, mut size) = (Vec::new(), 0);
        for (number, event) in &state.events[from..] {
            if size >= MAX_BATCH {
                break;
            }
            if let Some(event) = event {
                size += weight(event);
                batch.push(event.clone());
            }
            self.next = number + 1;
        }
        batch
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{LogStream, Reporter, SourceSpan};

    fn vertex() -> Digest {
        Digest::of("v")
    }

    fn warning(text: &str, file: Option<SourceFile>) -> Event {
        let source = file.map(|file| SourceSpan { file: Arc::new(file), spans: Vec::new() });
        let (short, detail, url) = (text.to_owned(), vec![text.to_owned(); 3], String::new());
        Event::Warning(Arc::new(WarningUpdate {
            vertex: vertex(),
            level: 1,
            short,
            detail,
            url,
            source,
        }))
    }

    #[tokio::test]
    async fn closing_ends_open_vertices_and_watchers() {
        let j = Journal::new();
        j.reporter(Digest::of("a"), "a").started();
        let mut w = j.watch();
        assert!(w.next().await.is_some());
        j.close();
        let last = w.next().await.expect("the open vertex is closed");
        assert!(
            matches!(&last[..], [Event::Vertex(v)] if v.error.as_deref() == Some("context canceled"))
        );
        assert!(w.next().await.is_none());
    }

    #[tokio::test]
    async fn a_counter_is_kept_in_its_last_state_and_watchers_miss_nothing_else() {
        let j = Journal::new();
        let mut w = j.watch();
        let status = |current| {
            let (id, time) = ("layer".to_owned(), SystemTime::now());
            let update = crate::StatusUpdate {
                vertex: vertex(),
                id,
                name: String::new(),
                current,
                total: 0,
                time,
                started: None,
                completed: None,
            };
            Event::Status(Arc::new(update))
        };
        let log = |text: String| {
            let (stream, bytes, time) =
                (LogStream::Stdout, text.into_bytes().into(), SystemTime::now());
            Event::Log(Arc::new(LogUpdate { vertex: vertex(), stream, bytes, time }))
        };
        let (mut logs, mut states) = (0, Vec::new());
        for i in 0..10_000 {
            j.push(status(i));
            if i % 100 == 0 {
                j.push(log(format!("line {i}")));
            }
            if i % 1000 == 999 {
                for event in w.next().await.expect("the journal is open") {
                    match event {
                        Event::Log(_) => logs += 1,
                        Event::Status(s) => states.push(s.current),
                        _ => {}
                    }
                }
            }
        }
        assert_eq!((logs, states), (100, (1..=10).map(|n| n * 1000 - 1).collect()));
        let kept = j.events();
        assert_eq!(kept.len(), 101);
        assert!(matches!(kept.last(), Some(Event::Status(s)) if s.current == 9999));
        assert!(j.0.state.lock().events.len() < 250);
    }

    #[test]
    fn warnings_are_limited_in_number_and_size() {
        let j = Journal::new();
        let file = |n: usize| SourceFile {
            filename: format!("f{n}"),
            data: vec![b'x'; 1 << 20],
            ..SourceFile::default()
        };
        for n in 0..MAX_WARNINGS + 10 {
            // All but a few of the sources are the same, in copies of their own.
            j.push(warning(&"é".repeat(200_000), Some(file(n.min(20)))));
        }
        let kept = j.events();
        assert_eq!(kept.len(), MAX_WARNINGS);
        let mut sources = HashSet::new();
        for event in &kept {
            let Event::Warning(w) = event else { panic!("{event:?}") };
            assert!(warning_weight(w) <= MAX_WARNING + OVERHEAD && w.short.starts_with('é'));
            sources.extend(w.source.iter().map(|s| Arc::as_ptr(&s.file)));
        }
        assert_eq!(sources.len(), 15, "they are 16 MiB together");
    }

    #[test]
    fn logs_of_a_build_are_limited_and_its_vertices_still_end() {
        let j = Journal::new();
        let all: Vec<_> =
            (0..40).map(|n| j.reporter(Digest::of(format!("{n}")), format!("{n}"))).collect();
        all.iter().for_each(Reporter::started);
        let piece = vec![b'x'; 1 << 20];
        for _ in 0..5 {
            all.iter().for_each(|r| r.log(LogStream::Stdout, &piece));
        }
        assert!(j.0.state.lock().memory <= MAX_MEMORY + (1 << 10));
        all.iter().for_each(|r| r.completed(None));
        let events = j.events();
        let ended = events
            .iter()
            .filter(|e| matches!(e, Event::Vertex(v) if v.completed.is_some()))
            .count();
        assert_eq!(ended, 40);
        let notices = events
            .iter()
            .filter(|e| matches!(e, Event::Log(l) if l.bytes.starts_with(b"\n[output clipped")))
            .count();
        assert_eq!(notices, 1);
    }

    #[tokio::test]
    async fn a_watcher_gets_a_long_log_in_pieces() {
        let j = Journal::new();
        let reporter = j.reporter(vertex(), "v");
        let piece = vec![b'x'; MAX_BATCH / 2];
        (0..8).for_each(|_| reporter.log(LogStream::Stdout, &piece));
        j.close();
        let (mut w, mut batches, mut events) = (j.watch(), 0, 0);
        while let Some(batch) = w.next().await {
            batches += 1;
            events += batch.len();
        }
        assert_eq!((batches, events), (4, 9));
    }
}
