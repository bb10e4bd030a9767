//! What is known of a build so far, in the form that views draw from. Times are seconds since 1970.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    time::UNIX_EPOCH,
};

use shipway_client::{Log, Status, Time, Vertex, VertexStatus, Warning};

use super::screen::Screen;

/// Lines of a step's output that are shown when it fails, unless all are kept.
const LAST_LINES: usize = 10;
/// Steps that are kept whole; a hostile daemon must not fill our memory.
const MAX_LINES: usize = 1 << 20;
/// Longest line that is kept.
const MAX_LINE: usize = 1 << 20;

pub(super) fn seconds(time: Time) -> f64 {
    time.0.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

/// A stretch of time, without end while it lasts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Interval {
    pub(super) start: f64,
    pub(super) stop: Option<f64>,
}

/// A step, or a group of steps shown as one.
pub(super) struct Step {
    pub(super) name: String,
    pub(super) cached: bool,
    pub(super) error: String,
    /// Not shown (yet): a group of which nothing but weak members has started.
    pub(super) hidden: bool,
    members: Option<HashMap<String, Vertex>>,
    runs: BTreeMap<Time, Option<Time>>,
    pub(super) counters: Vec<VertexStatus>,
    /// Counters that moved since a view took them.
    pub(super) moved: Vec<String>,
    /// Output since a view took it: lines with their time, the last maybe unfinished.
    pub(super) lines: Vec<String>,
    pub(super) unfinished: bool,
    kept: VecDeque<String>,
    pub(super) warnings: Vec<Warning>,
    pub(super) screen: Screen,
    /// Number of updates since the step was last in the foreground, and when the first of them
    /// came.
    pub(super) updates: u32,
    pub(super) waiting_since: f64,
    pub(super) changed: bool,
}

impl Step {
    fn new(name: String) -> Self {
        Self {
            name,
            cached: false,
            error: String::new(),
            hidden: false,
            members: None,
            runs: BTreeMap::new(),
            counters: Vec::new(),
            moved: Vec::new(),
            lines: Vec::new(),
            unfinished: false,
            kept: VecDeque::new(),
            warnings: Vec::new(),
            screen: Screen::default(),
            updates: 0,
            waiting_since: 0.0,
            changed: false,
        }
    }

    fn touch(&mut self, now: f64) {
        if self.updates == 0 {
            self.waiting_since = now;
        }
        self.updates += 1;
        self.changed = true;
    }

    pub(super) fn is_started(&self) -> bool {
        !self.runs.is_empty()
    }

    pub(super) fn is_completed(&self) -> bool {
        self.intervals().last().is_some_and(|i| i.stop.is_some())
    }

    pub(super) fn is_cancelled(&self) -> bool {
        self.error.ends_with("context canceled")
    }

    /// When the step ran, stretches that overlap being one.
    pub(super) fn intervals(&self) -> Vec<Interval> {
        let mut out: Vec<Interval> = Vec::new();
        for (start, stop) in &self.runs {
            let next = Interval { start: seconds(*start), stop: stop.map(seconds) };
            match out.last_mut() {
                Some(Interval { stop: None, .. }) => break,
                Some(last) if last.stop.is_some_and(|stop| stop >= next.start) => {
                    last.stop = next.stop.map(|stop| stop.max(last.stop.unwrap_or(stop)));
                }
                _ => out.push(next),
            }
        }
        out
    }

    fn group(&mut self, vertex: Vertex) -> bool {
        let members = self.members.get_or_insert_default();
        members.insert(vertex.digest.clone(), vertex);
        let was_hidden = self.hidden;
        let before = (self.cached, self.error.clone(), self.runs.clone());
        self.cached = members.values().all(|m| m.cached);
        for member in members.values() {
            if let Some(started) = member.started {
                self.runs.insert(started, member.completed);
                self.hidden &= member.progress_group.as_ref().is_some_and(|g| g.weak);
            }
            if !member.error.is_empty() {
                self.hidden = false;
                if self.error.is_empty() {
                    self.error.clone_from(&member.error);
                }
            }
        }
        was_hidden != self.hidden || before != (self.cached, self.error.clone(), self.runs.clone())
    }
}

/// All steps of a build.
pub(crate) struct Trace {
    pub(super) steps: Vec<Step>,
    by_digest: HashMap<String, usize>,
    /// Steps that are shown, in the order in which they started.
    pub(super) order: Vec<usize>,
    /// When the first step started.
    pub(super) started: Option<f64>,
    /// Our clock minus the daemon's.
    pub(super) offset: Option<f64>,
    keep_all: bool,
}

impl Trace {
    /// With `keep_all`, all output is kept for [`Trace::failures`].
    pub(crate) fn new(keep_all: bool) -> Self {
        Self {
            steps: Vec::new(),
            by_digest: HashMap::new(),
            order: Vec::new(),
            started: None,
            offset: None,
            keep_all,
        }
    }

    fn step(&mut self, digest: &str, name: &str) -> usize {
        if let Some(at) = self.by_digest.get(digest) {
            return *at;
        }
        self.steps.push(Step::new(name.to_owned()));
        self.by_digest.insert(digest.to_owned(), self.steps.len() - 1);
        self.steps.len() - 1
    }

    /// Takes an event that came at `now`.
    pub(crate) fn update(&mut self, status: Status, now: f64) {
        for vertex in status.vertexes {
            self.vertex(vertex, now);
        }
        for counter in status.statuses {
            let Some(step) = self.by_digest.get(&counter.vertex).map(|at| &mut self.steps[*at])
            else {
                continue;
            };
            step.moved.retain(|id| *id != counter.id);
            step.moved.push(counter.id.clone());
            match step.counters.iter_mut().find(|c| c.id == counter.id) {
                Some(known) => *known = counter,
                None if counter.started.is_some() => step.counters.push(counter),
                None => continue,
            }
            step.touch(now);
        }
        for warning in status.warnings {
            if let Some(at) = self.by_digest.get(&warning.vertex) {
                self.steps[*at].warnings.push(warning);
                self.steps[*at].touch(now);
            }
        }
        for log in status.logs {
            if let Some(at) = self.by_digest.get(&log.vertex).copied() {
                self.log(at, &log, now);
            }
        }
    }

    fn vertex(&mut self, vertex: Vertex, now: f64) {
        if let Some(started) = vertex.started.map(seconds) {
            self.started.get_or_insert(started);
            self.offset.get_or_insert(now - started);
        }
        if let Some(group) = vertex.progress_group.clone() {
            let key = format!("group {}", group.id);
            let new = !self.by_digest.contains_key(&key);
            let at = self.step(&key, &group.name);
            self.by_digest.insert(vertex.digest.clone(), at);
            let step = &mut self.steps[at];
            step.hidden |= new;
            let changed = step.group(vertex);
            let shown = !step.hidden && step.is_started();
            if changed {
                step.touch(now);
            }
            if shown && !self.order.contains(&at) {
                self.order.push(at);
            }
            return;
        }
        let at = self.step(&vertex.digest, &vertex.name);
        let step = &mut self.steps[at];
        let Some(started) = vertex.started else {
            // A mere announcement says nothing new of a step that has started.
            if !step.is_started() {
                step.name = vertex.name;
            }
            return;
        };
        let first = !step.is_started();
        let changed = first
            || step.runs.get(&started) != Some(&vertex.completed)
            || (step.cached, step.error.as_str(), step.name.as_str())
                != (vertex.cached, vertex.error.as_str(), vertex.name.as_str());
        step.runs.insert(started, vertex.completed);
        (step.cached, step.error, step.name) = (vertex.cached, vertex.error, vertex.name);
        if changed {
            step.touch(now);
        }
        if first {
            self.order.push(at);
        }
    }

    fn log(&mut self, at: usize, log: &Log, now: f64) {
        let keep = if self.keep_all { MAX_LINES } else { LAST_LINES };
        let step = &mut self.steps[at];
        step.screen.write(&log.data);
        let elapsed =
            step.intervals().last().map_or(0.0, |i| (seconds(log.timestamp) - i.start).max(0.0));
        let digits = if elapsed < 10.0 {
            3
        } else if elapsed < 100.0 {
            2
        } else {
            1
        };
        let text = String::from_utf8_lossy(&log.data);
        let mut pieces = text.split('\n').peekable();
        while let Some(piece) = pieces.next() {
            let last = pieces.peek().is_none();
            if last && piece.is_empty() {
                break;
            }
            if step.unfinished
                && let Some(line) = step.kept.back_mut()
            {
                let room = MAX_LINE.saturating_sub(line.len());
                let piece: String = piece.chars().take(room).collect();
                line.push_str(&piece);
                match step.lines.last_mut() {
                    Some(line) => line.push_str(&piece),
                    None => step.lines.push(piece),
                }
            } else {
                let line = format!("{elapsed:.digits$} {piece}");
                step.kept.push_back(line.clone());
                if step.kept.len() > keep {
                    step.kept.pop_front();
                }
                step.lines.push(line);
            }
            step.unfinished = last;
        }
        if self.keep_all {
            // The live view draws the screen instead.
            step.lines.clear();
        }
        step.touch(now);
    }

    /// Steps in all and steps that have ended, not counting what is hidden.
    pub(super) fn counts(&self) -> (usize, usize) {
        let visible = || self.steps.iter().filter(|s| !s.hidden);
        (visible().count(), visible().filter(|s| s.is_completed()).count())
    }

    /// The output of the steps that failed, for the end of a view.
    pub(crate) fn failures(&self) -> String {
        let mut out = String::new();
        for step in self.order.iter().map(|at| &self.steps[*at]) {
            if step.error.is_empty() || step.is_cancelled() {
                continue;
            }
            out.push_str(&format!("------\n > {}:\n", step.name));
            for line in &step.kept {
                out.push_str(line);
                out.push('\n');
            }
            out.push_str("------\n");
        }
        out
    }
}
