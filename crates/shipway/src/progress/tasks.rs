//! Work of our own, drawn as the steps of a build are.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use shipway_client::{Log, Status, Time, Vertex, VertexStatus};
use shipway_convert::{Progress, Step};
use shipway_fault::Result;
use shipway_oci::Digest;
use tokio::sync::mpsc;

use super::{Mode, View, start};

/// A counter is shown again after this time, and at its end.
const PACE: Duration = Duration::from_millis(100);

/// A view of several tasks.
pub(crate) struct Tasks {
    events: mpsc::Sender<Status>,
    view: View,
}

/// One task: a name, lines, and counters of blobs. Clones are the same task.
#[derive(Clone)]
pub(crate) struct Task {
    events: mpsc::Sender<Status>,
    vertex: Vertex,
    counters: Arc<Mutex<HashMap<Digest, Counter>>>,
}

struct Counter {
    started: Time,
    shown: Instant,
    ended: bool,
}

impl Tasks {
    /// Starts a view; `phase` is its headline.
    pub(crate) fn start(mode: Mode, phase: &str) -> Result<Self> {
        let (events, view) = start(mode, phase)?;
        Ok(Self { events, view })
    }

    /// Begins a task.
    pub(crate) async fn begin(&self, name: &str) -> Task {
        Task::begin(&self.events, name).await
    }

    /// Waits until everything is drawn.
    pub(crate) async fn finish(self) -> Result<()> {
        drop(self.events);
        self.view.finish().await.map(drop)
    }
}

impl Task {
    /// Begins a task in a view that shows others, too.
    pub(crate) async fn begin(events: &mpsc::Sender<Status>, name: &str) -> Self {
        let vertex = Vertex {
            digest: Digest::of(name).to_string(),
            name: name.to_owned(),
            started: Some(Time::now()),
            ..Vertex::default()
        };
        let task =
            Self { events: events.clone(), vertex: vertex.clone(), counters: Arc::default() };
        task.send(Status { vertexes: vec![vertex], ..Status::default() }).await;
        task
    }

    async fn send(&self, status: Status) {
        // A view that is gone must not end the work.
        let _ = self.events.send(status).await;
    }

    /// Shows what is not waited for: a view that lags behind loses counters, never the work time.
    fn show(&self, status: Status) {
        let _ = self.events.try_send(status);
    }

    /// Shows lines.
    pub(crate) fn log(&self, text: String) {
        let log = Log {
            vertex: self.vertex.digest.clone(),
            stream: 1,
            data: text.into_bytes(),
            timestamp: Time::now(),
        };
        self.show(Status { logs: vec![log], ..Status::default() });
    }

    /// Hears how far blobs are.
    pub(crate) fn progress(&self) -> Progress {
        let task = self.clone();
        Arc::new(move |step| task.count(step))
    }

    fn count(&self, Step { digest, converts, done, size }: Step) {
        let now = Time::now();
        let started = {
            let mut counters = self.counters.lock();
            let is_new = !counters.contains_key(&digest);
            let counter = counters.entry(digest).or_insert_with(|| Counter {
                started: now,
                shown: Instant::now(),
                ended: false,
            });
            let ends = done >= size;
            let is_due = is_new || ends || counter.shown.elapsed() >= PACE;
            if counter.ended || !is_due {
                return;
            }
            (counter.shown, counter.ended) = (Instant::now(), ends);
            counter.started
        };
        let count = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
        let doing = if converts { "converting" } else { "copying" };
        let counter = VertexStatus {
            id: format!("{doing} {digest}"),
            vertex: self.vertex.digest.clone(),
            name: String::new(),
            total: count(size),
            current: count(done),
            timestamp: now,
            started: Some(started),
            completed: (done >= size).then_some(now),
        };
        self.show(Status { statuses: vec![counter], ..Status::default() });
    }

    /// Ends the task as `result` says, and gives it back.
    pub(crate) async fn end<T>(self, result: Result<T>) -> Result<T> {
        let error = match &result {
            Ok(_) => String::new(),
            Err(fault) => fault.to_string(),
        };
        let vertex = Vertex { completed: Some(Time::now()), error, ..self.vertex.clone() };
        self.send(Status { vertexes: vec![vertex], ..Status::default() }).await;
        result
    }
}

#[cfg(test)]
mod tests {
    use shipway_fault::Fault;

    use super::*;

    #[tokio::test]
    async fn counters_are_shown_at_their_beginning_and_end() {
        let (events, mut queue) = mpsc::channel(16);
        let task = Task { events, vertex: Vertex::default(), counters: Arc::default() };
        let (progress, digest) = (task.progress(), Digest::of("x"));
        for done in [0, 1, 2, 3, 10, 10] {
            progress(Step { digest, converts: false, done, size: 10 });
        }
        task.log("hi\n".to_owned());
        assert!(task.end(Err::<(), _>(Fault::invalid("why"))).await.is_err());
        drop(progress);
        let (mut counts, mut lines, mut errors) = (Vec::new(), 0, Vec::new());
        while let Some(status) = queue.recv().await {
            counts.extend(status.statuses.iter().map(|s| (s.current, s.completed.is_some())));
            lines += status.logs.len();
            errors.extend(status.vertexes.into_iter().map(|v| v.error));
        }
        assert_eq!(counts, [(0, false), (10, true)]);
        assert_eq!((lines, errors), (1, vec!["why".to_owned()]));
    }
}
