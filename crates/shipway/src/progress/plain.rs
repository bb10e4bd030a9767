//! Progress as lines: `#1 [internal] load build definition`, `#1 DONE 0.1s`. One step is in the
//! foreground at a time, so that its output can be read; others get their turn when it ends, or
//! when they have waited.

use std::{collections::HashMap, fmt::Write};

use super::trace::{Interval, Step, Trace, seconds};
use crate::size;

/// A step keeps the foreground about this long against an equally busy one.
const ANTI_FLICKER: f64 = 5.0;
/// No step waits longer than this.
const MAX_DELAY: f64 = 10.0;
/// Counters are printed again after this time, or this part of the whole.
const MIN_TIME: f64 = 5.0;
const MIN_PART: f64 = 0.05;

/// The state of a plain view.
#[derive(Default)]
pub(super) struct Plain {
    current: Option<usize>,
    /// Numbers of steps, in the order in which they were first printed.
    numbers: HashMap<usize, usize>,
    /// What was last printed of a counter: when, and its value.
    printed: HashMap<(usize, String), (f64, i64)>,
    warned: HashMap<usize, usize>,
    any: bool,
    /// The foreground step's last line has no end yet.
    open_line: bool,
    /// Whether long names are cut (`PROGRESS_NO_TRUNC=0`).
    cut: bool,
}

/// Longest name, where names are cut.
const MAX_NAME: usize = 72;

impl Plain {
    /// A view that cuts long names, or not.
    pub(super) fn new(cut: bool) -> Self {
        Self { cut, ..Self::default() }
    }

    /// What is new since the last call.
    pub(super) fn lines(&mut self, trace: &mut Trace, now: f64) -> String {
        let mut out = String::new();
        let changed: Vec<usize> = (0..trace.steps.len())
            .filter(|at| trace.steps[*at].changed && !trace.steps[*at].hidden)
            .collect();
        let (mut ended, mut rest): (Vec<usize>, Vec<usize>) = changed
            .into_iter()
            .filter(|at| trace.steps[*at].is_started())
            .partition(|at| trace.steps[*at].is_completed());
        let stop = |at: &usize| {
            trace.steps[*at].intervals().last().and_then(|i| i.stop).unwrap_or(f64::MAX)
        };
        ended.sort_by(|a, b| stop(a).total_cmp(&stop(b)));
        // What is in the foreground is finished first.
        if let Some(at) = ended.iter().position(|at| Some(*at) == self.current) {
            let current = ended.remove(at);
            ended.insert(0, current);
        }
        for at in ended {
            self.print(trace, at, now, &mut out);
        }
        if rest.is_empty() {
            if self.current.is_none() {
                let open = trace
                    .order
                    .iter()
                    .copied()
                    .find(|at| !trace.steps[*at].is_completed() && !trace.steps[*at].hidden);
                if let Some(at) = open {
                    self.print(trace, at, now, &mut out);
                }
            }
            return out;
        }
        let Some(current) = self.current else {
            let busiest = busiest(trace, &rest, now);
            self.print(trace, busiest, now, &mut out);
            return out;
        };
        if rest.contains(&current) {
            self.print(trace, current, now, &mut out);
        }
        rest.retain(|at| *at != current);
        if let Some(next) = self.turn(trace, current, &rest, now) {
            self.print(trace, next, now, &mut out);
        }
        out
    }

    /// The step that takes the foreground from `current`, if it is time.
    fn turn(&self, trace: &Trace, current: usize, rest: &[usize], now: f64) -> Option<usize> {
        if self.current != Some(current) {
            return None;
        }
        if let Some(late) = rest.iter().find(|at| now - trace.steps[**at].waiting_since > MAX_DELAY)
        {
            return Some(*late);
        }
        let others: f64 = rest.iter().map(|at| speed(&trace.steps[*at], now)).sum();
        let own = speed(&trace.steps[current], now);
        let shown = now - trace.steps[current].waiting_since;
        (others > 0.0 && shown > ANTI_FLICKER * (own + others) / others)
            .then(|| busiest(trace, rest, now))
    }

    fn print(&mut self, trace: &mut Trace, at: usize, now: f64, out: &mut String) {
        let next = self.numbers.len() + 1;
        let number = *self.numbers.entry(at).or_insert(next);
        if self.current != Some(at) {
            if let Some(old) = self.current {
                self.end_line(out);
                let step = &mut trace.steps[old];
                step.updates = 0;
                let _ =
                    writeln!(out, "#{} ...", self.numbers.get(&old).copied().unwrap_or_default());
            }
            if self.any {
                out.push('\n');
            }
            self.any = true;
            let name = &trace.steps[at].name;
            let _ = match name.char_indices().nth(MAX_NAME).filter(|_| self.cut) {
                Some((end, _)) => writeln!(out, "#{number} {}...", &name[..end]),
                None => writeln!(out, "#{number} {name}"),
            };
        }
        let step = &mut trace.steps[at];
        let open = self.counters(step, at, number, out);
        for warning in step.warnings.iter().skip(*self.warned.get(&at).unwrap_or(&0)) {
            self.end_line(out);
            let _ = writeln!(out, "#{number} WARN: {}", String::from_utf8_lossy(&warning.short));
        }
        self.warned.insert(at, step.warnings.len());
        self.output(step, at, number, out);
        step.changed = false;
        if step.is_completed() && !open {
            self.end_line(out);
            step.updates = 0;
            self.current = None;
            let _ = writeln!(out, "#{number} {}", verdict(step));
        } else {
            if self.current != Some(at) {
                step.waiting_since = now;
            }
            self.current = Some(at);
        }
    }

    fn end_line(&mut self, out: &mut String) {
        if std::mem::take(&mut self.open_line) {
            out.push('\n');
        }
    }

    /// Prints counters that moved enough; whether one is still running.
    fn counters(&mut self, step: &mut Step, at: usize, number: usize, out: &mut String) -> bool {
        let mut open = false;
        let moved = std::mem::take(&mut step.moved);
        for counter in step.counters.iter().filter(|c| moved.contains(&c.id)) {
            let time = seconds(counter.timestamp);
            let key = (at, counter.id.clone());
            if let (Some((last, value)), None) = (self.printed.get(&key), counter.completed) {
                let part = if counter.total > 0 {
                    (counter.current - value) as f64 / counter.total as f64
                } else {
                    0.0
                };
                if part < MIN_PART && time - last < MIN_TIME {
                    continue;
                }
            }
            self.printed.insert(key, (time, counter.current));
            self.end_line(out);
            let _ = write!(out, "#{number} {}", counter.id);
            if counter.total != 0 {
                let _ = write!(
                    out,
                    " {} / {}",
                    size::bytes(counter.current),
                    size::bytes(counter.total)
                );
            } else if counter.current != 0 {
                let _ = write!(out, " {}", size::bytes(counter.current));
            }
            if let Some(started) = counter.started {
                let elapsed = counter.completed.map_or(time, seconds) - seconds(started);
                if elapsed > 0.01 {
                    let _ = write!(out, " {elapsed:.1}s");
                }
            }
            open |= counter.completed.is_none();
            out.push_str(if counter.completed.is_some() { " done\n" } else { "\n" });
        }
        open
    }

    fn output(&mut self, step: &mut Step, at: usize, number: usize, out: &mut String) {
        let lines = std::mem::take(&mut step.lines);
        let count = lines.len();
        // A line whose beginning is printed goes on without a number.
        let continues = self.open_line && self.current == Some(at);
        for (i, line) in lines.into_iter().enumerate() {
            if i == 0 && continues {
                out.push_str(&line);
            } else {
                self.end_line(out);
                let _ = write!(out, "#{number} {line}");
            }
            if i + 1 < count || !step.unfinished {
                self.open_line = false;
                out.push('\n');
            } else {
                self.open_line = true;
            }
        }
    }
}

fn verdict(step: &Step) -> String {
    if !step.error.is_empty() {
        if step.is_cancelled() { "CANCELED".to_owned() } else { format!("ERROR: {}", step.error) }
    } else if step.cached {
        "CACHED".to_owned()
    } else {
        let length = |i: &Interval| i.stop.unwrap_or(i.start) - i.start;
        format!("DONE {:.1}s", step.intervals().iter().map(length).sum::<f64>())
    }
}

/// Updates per second since the step was last in the foreground.
fn speed(step: &Step, now: f64) -> f64 {
    f64::from(step.updates) / (now - step.waiting_since).max(0.001)
}

fn busiest(trace: &Trace, steps: &[usize], now: f64) -> usize {
    let late = |at: usize| now - trace.steps[at].waiting_since > MAX_DELAY;
    let better = |a: usize, b: usize| {
        let faster = speed(&trace.steps[b], now) > speed(&trace.steps[a], now);
        if (late(b) && !late(a)) || (late(a) == late(b) && faster) { b } else { a }
    };
    steps.iter().copied().reduce(better).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Prints a recording of events (as `--progress rawjson` writes them), drawing after each.
    #[track_caller]
    fn check(recording: &str, expected: &str) {
        let (mut trace, mut plain, mut out) = (Trace::new(false), Plain::default(), String::new());
        for (i, line) in recording.lines().filter(|l| !l.trim().is_empty()).enumerate() {
            let now = 1000.0 + i as f64 / 10.0;
            trace.update(serde_json::from_str(line).expect(line), now);
            out.push_str(&plain.lines(&mut trace, now));
        }
        out.push_str(&trace.failures());
        let shown: Vec<&str> = out.lines().collect();
        let wanted: Vec<&str> =
            expected.trim().lines().map(|l| l.strip_prefix("            ").unwrap_or(l)).collect();
        assert_eq!(shown, wanted, "\n{out}");
    }

    #[test]
    fn steps_follow_each_other() {
        check(
            r#"
{"vertexes":[{"digest":"sha256:1","name":"[internal] load build definition from Dockerfile"}]}
{"vertexes":[{"digest":"sha256:1","name":"[internal] load build definition from Dockerfile","started":"2026-01-01T00:00:00Z"}],"statuses":[{"id":"transferring dockerfile:","vertex":"sha256:1","current":0,"timestamp":"2026-01-01T00:00:00Z","started":"2026-01-01T00:00:00Z"}]}
{"vertexes":[{"digest":"sha256:1","name":"[internal] load build definition from Dockerfile","started":"2026-01-01T00:00:00Z","completed":"2026-01-01T00:00:00.04Z"}],"statuses":[{"id":"transferring dockerfile:","vertex":"sha256:1","current":1234,"timestamp":"2026-01-01T00:00:00.04Z","started":"2026-01-01T00:00:00Z","completed":"2026-01-01T00:00:00.04Z"}]}
{"vertexes":[{"digest":"sha256:2","name":"[2/3] RUN a","started":"2026-01-01T00:00:01Z"},{"digest":"sha256:3","name":"[1/3] FROM x","started":"2026-01-01T00:00:01Z","completed":"2026-01-01T00:00:01Z","cached":true}]}
{"logs":[{"vertex":"sha256:2","stream":1,"data":"b25lCnR3","timestamp":"2026-01-01T00:00:01.5Z"}]}
{"logs":[{"vertex":"sha256:2","stream":1,"data":"bwo=","timestamp":"2026-01-01T00:00:12Z"}]}
{"vertexes":[{"digest":"sha256:2","name":"[2/3] RUN a","started":"2026-01-01T00:00:01Z","completed":"2026-01-01T00:00:14.26Z","error":"process did not complete: exit code: 1"}]}
{"vertexes":[{"digest":"sha256:4","name":"[3/3] RUN b","started":"2026-01-01T00:00:01Z","completed":"2026-01-01T00:00:01Z","error":"x: context canceled"}]}
"#,
            "
            #1 [internal] load build definition from Dockerfile
            #1 transferring dockerfile:
            #1 transferring dockerfile: 1.23kB 0.0s done
            #1 DONE 0.0s

            #2 [1/3] FROM x
            #2 CACHED

            #3 [2/3] RUN a
            #3 0.500 one
            #3 0.500 two
            #3 ERROR: process did not complete: exit code: 1

            #4 [3/3] RUN b
            #4 CANCELED
            ------
             > [2/3] RUN a:
            0.500 one
            0.500 two
            ------",
        );
    }

    #[test]
    fn the_foreground_changes_hands_and_counters_are_sparing() {
        check(
            r#"
{"vertexes":[{"digest":"sha256:1","name":"a","started":"2026-01-01T00:00:00Z"}]}
{"vertexes":[{"digest":"sha256:2","name":"b","started":"2026-01-01T00:00:00Z"}]}
{"statuses":[{"id":"sha256:layer","vertex":"sha256:1","total":2000000,"current":1000,"timestamp":"2026-01-01T00:00:01Z","started":"2026-01-01T00:00:00Z"}]}
{"statuses":[{"id":"sha256:layer","vertex":"sha256:1","total":2000000,"current":2000,"timestamp":"2026-01-01T00:00:01.1Z","started":"2026-01-01T00:00:00Z"}]}
{"statuses":[{"id":"sha256:layer","vertex":"sha256:1","total":2000000,"current":2000000,"timestamp":"2026-01-01T00:00:02Z","started":"2026-01-01T00:00:00Z","completed":"2026-01-01T00:00:02Z"}]}
{"vertexes":[{"digest":"sha256:2","name":"b","started":"2026-01-01T00:00:00Z","completed":"2026-01-01T00:00:03Z"}],"warnings":[{"vertex":"sha256:2","level":1,"short":"b2xk"}]}
{"vertexes":[{"digest":"sha256:1","name":"a","started":"2026-01-01T00:00:00Z","completed":"2026-01-01T00:00:04Z"}]}
"#,
            "
            #1 a
            #1 sha256:layer 1.00kB / 2.00MB 1.0s
            #1 sha256:layer 2.00MB / 2.00MB 2.0s done
            #1 ...

            #2 b
            #2 WARN: old
            #2 DONE 3.0s

            #1 a
            #1 DONE 4.0s",
        );
    }

    #[test]
    fn groups_show_once_something_strong_has_started() {
        check(
            r#"
{"vertexes":[{"digest":"sha256:1","name":"weak one","started":"2026-01-01T00:00:00Z","completed":"2026-01-01T00:00:01Z","progressGroup":{"id":"g","name":"the group","weak":true}}]}
{"vertexes":[{"digest":"sha256:2","name":"strong one","started":"2026-01-01T00:00:02Z","completed":"2026-01-01T00:00:03Z","progressGroup":{"id":"g","name":"the group"}}]}
"#,
            "
            #1 the group
            #1 DONE 2.0s",
        );
    }
}
