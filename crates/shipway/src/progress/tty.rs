//! The live view: a headline, a line per step with its counters and clock, and a window onto the
//! output of what runs.

use std::{fmt::Write, os::fd::AsFd};

use super::{
    colors::Palette,
    trace::{Interval, Step, Trace, seconds},
};
use crate::size;

/// Lines of a window onto output.
const WINDOW: usize = 6;

/// The state of a live view.
pub(super) struct Tty {
    phase: String,
    palette: Palette,
    /// Lines below the headline in the last frame.
    drawn: usize,
    window: usize,
    any: bool,
}

/// One line of the view.
struct Line {
    name: String,
    status: String,
    elapsed: f64,
    done: bool,
    color: Color,
    /// The step whose output may be shown below.
    output: Option<usize>,
}

#[derive(Clone, Copy)]
enum Color {
    Run,
    Cancel,
    Error,
}

/// Columns and rows of a terminal.
pub(super) fn size(terminal: impl AsFd) -> (usize, usize) {
    match rustix::termios::tcgetwinsize(terminal) {
        Ok(size) if size.ws_col > 0 && size.ws_row > 0 => (size.ws_col.into(), size.ws_row.into()),
        _ => (80, 10),
    }
}

impl Tty {
    /// A view with the headline `phase`, and `window` lines of output per running step.
    pub(super) fn new(phase: &str, palette: Palette, window: Option<usize>) -> Self {
        Self {
            phase: phase.to_owned(),
            palette,
            drawn: 0,
            window: window.unwrap_or(WINDOW).min(32),
            any: false,
        }
    }

    /// What to write so that the terminal shows `trace`. The last frame shows every step, however
    /// many.
    pub(super) fn frame(
        &mut self,
        trace: &Trace,
        now: f64,
        (width, height): (usize, usize),
        last: bool,
    ) -> String {
        let mut lines = lines(trace, now);
        let windows = self.windows(&mut lines, trace, width, height);
        if !last {
            let hidden: usize = windows.iter().map(|(_, text)| text.len()).sum();
            lines = fit(lines, height.saturating_sub(2 + hidden));
        }
        let mut out = String::new();
        if self.any {
            let _ = write!(out, "\x1b[{}A", self.drawn + 1);
        }
        self.any = true;
        out.push_str("\x1b[0G\x1b[?25l");
        out.push_str(&self.headline(trace, now, width, last));
        let mut drawn = 0;
        for line in &lines {
            let Some(text) = row(line, width) else { continue };
            let color = match line.color {
                Color::Run => &self.palette.run,
                Color::Cancel => &self.palette.cancel,
                Color::Error => &self.palette.error,
            };
            out.push_str(&if line.done { Palette::paint(color, &text) } else { text });
            out.push('\n');
            drawn += 1;
            for (_, text) in windows.iter().filter(|(at, _)| Some(*at) == line.output) {
                for text in text {
                    let text = pad(&format!(" => => # {text}"), width);
                    out.push_str(&Palette::paint(&self.palette.faint, &text));
                    out.push('\n');
                    drawn += 1;
                }
            }
        }
        if self.drawn > drawn {
            let gone = self.drawn - drawn;
            for _ in 0..gone {
                out.push_str("\x1b[2K\n");
            }
            let _ = write!(out, "\x1b[{gone}A\x1b[0G");
        }
        self.drawn = drawn;
        out.push_str("\x1b[?25h");
        out
    }

    fn headline(&self, trace: &Trace, now: f64, width: usize, last: bool) -> String {
        let (total, ended) = trace.counts();
        let started = trace.started.map_or(now, |s| s + trace.offset.unwrap_or(0.0));
        let finished = if last && ended > 0 && ended == total { "FINISHED" } else { "" };
        let text = format!(
            "[+] {} {:.1}s ({ended}/{total}) {finished}",
            self.phase,
            (now - started).max(0.0)
        );
        pad(&text, width) + "\n"
    }

    /// Which running steps get a window onto their output, and its lines: the busiest, as long as
    /// there is room.
    fn windows(
        &self,
        lines: &mut [Line],
        trace: &Trace,
        width: usize,
        height: usize,
    ) -> Vec<(usize, Vec<String>)> {
        let running = lines.iter().filter(|l| !l.done).count();
        let mut free = height.saturating_sub(2 + running);
        let window = self.window.min(height.saturating_sub(WINDOW + 1).max(1));
        let mut steps: Vec<usize> = lines
            .iter()
            .filter(|l| !l.done)
            .filter_map(|l| l.output)
            .filter(|at| trace.steps[*at].screen.written > 0)
            .collect();
        steps.sort_by_key(|at| std::cmp::Reverse(trace.steps[*at].screen.written));
        let mut out = Vec::new();
        for at in steps {
            if free <= window + 3 {
                break;
            }
            free -= window + 3;
            out.push((at, trace.steps[at].screen.last(window, width.saturating_sub(10).max(1))));
        }
        out
    }
}

/// `text` with spaces, or cut, so that it covers whatever the line showed before.
fn pad(text: &str, width: usize) -> String {
    let length = text.chars().count();
    if length > width {
        text.chars().take(width).collect()
    } else {
        text.to_owned() + &" ".repeat(width - length)
    }
}

fn row(line: &Line, width: usize) -> Option<String> {
    let timer = format!(" {:3.1}s", if line.elapsed < 0.05 { 0.0 } else { line.elapsed });
    let mut left = width.checked_sub(4 + timer.len() + 1).filter(|left| *left >= 12)?;
    let shown =
        !line.status.is_empty() && left + line.status.len() > 20 && left > line.status.len() + 1;
    if shown {
        left -= line.status.len() + 1;
    }
    let mut text = String::from(" => ");
    text.extend(line.name.chars().take(left));
    if shown {
        text.push(' ');
        text.push_str(&line.status);
    }
    let gap = width.saturating_sub(text.chars().count() + timer.len());
    Some(text + &" ".repeat(gap) + &timer)
}

fn total(intervals: &[Interval], now: f64) -> f64 {
    intervals.iter().map(|i| (i.stop.unwrap_or(now) - i.start).max(0.0)).sum()
}

/// Names may hold anything; on a terminal they hold no control characters.
fn clean(name: &str) -> String {
    name.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

fn lines(trace: &Trace, now: f64) -> Vec<Line> {
    // The daemon's clock, so that running clocks and those of ended steps agree.
    let now = now - trace.offset.unwrap_or(0.0);
    let mut out = Vec::new();
    for at in &trace.order {
        let step = &trace.steps[*at];
        let intervals = step.intervals();
        out.push(headline_of(step, *at, total(&intervals, now)));
        for counter in &step.counters {
            let Some(started) = counter.started else { continue };
            let status = match (counter.current, counter.total) {
                (0, 0) => String::new(),
                (current, 0) => size::bytes(current),
                (current, total) => format!("{} / {}", size::bytes(current), size::bytes(total)),
            };
            let elapsed = (counter.completed.map_or(now, seconds) - seconds(started)).max(0.0);
            let name = format!("=> {}", clean(&counter.id));
            out.push(Line {
                name,
                status,
                elapsed,
                done: counter.completed.is_some(),
                color: Color::Run,
                output: None,
            });
        }
        for warning in &step.warnings {
            let name = format!("WARN: {}", clean(&String::from_utf8_lossy(&warning.short)));
            let elapsed = total(&intervals[intervals.len().saturating_sub(1)..], now);
            out.push(Line {
                name,
                status: String::new(),
                elapsed,
                done: true,
                color: Color::Cancel,
                output: None,
            });
        }
    }
    out
}

fn headline_of(step: &Step, at: usize, elapsed: f64) -> Line {
    let mut name = clean(&step.name);
    let mut color = Color::Run;
    if step.is_cancelled() {
        (name, color) = (format!("CANCELED {name}"), Color::Cancel);
    } else if !step.error.is_empty() {
        (name, color) = (format!("ERROR {name}"), Color::Error);
    }
    if step.cached {
        name = format!("CACHED {name}");
    }
    Line {
        name,
        status: String::new(),
        elapsed,
        done: step.is_completed(),
        color,
        output: Some(at),
    }
}

/// The last `limit` lines; running ones that would be cut take the place of ended ones.
fn fit(lines: Vec<Line>, limit: usize) -> Vec<Line> {
    let Some(cut) = lines.len().checked_sub(limit).filter(|cut| *cut > 0) else { return lines };
    let mut running_above = lines[..cut].iter().filter(|l| !l.done).count();
    let mut droppable = lines[cut..].iter().filter(|l| l.done).count();
    let mut keep_above = running_above.min(droppable);
    droppable = keep_above;
    let mut out = Vec::new();
    for (i, line) in lines.into_iter().enumerate() {
        if i < cut {
            if !line.done {
                // Of those that run above the edge, the latest are kept.
                if running_above <= keep_above {
                    out.push(line);
                    keep_above -= 1;
                }
                running_above -= 1;
            }
        } else if line.done && droppable > 0 {
            droppable -= 1;
        } else {
            out.push(line);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recorded(events: &[&str]) -> Trace {
        let mut trace = Trace::new(true);
        for event in events {
            // 2026-01-01T00:00:00Z, so that both clocks agree.
            trace.update(serde_json::from_str(event).expect(event), 1_767_225_600.0);
        }
        trace
    }

    fn draw(tty: &mut Tty, trace: &Trace, height: usize, last: bool) -> Vec<String> {
        let frame = tty.frame(trace, 1_767_225_602.0, (60, height), last);
        frame.lines().map(|l| l.trim_end().to_owned()).collect()
    }

    const EVENTS: [&str; 2] = [
        r#"{"vertexes":[{"digest":"sha256:1","name":"[1/2] FROM x","started":"2026-01-01T00:00:00Z","completed":"2026-01-01T00:00:01Z"},
            {"digest":"sha256:2","name":"[2/2] RUN make all the things that take a very long name","started":"2026-01-01T00:00:00Z"}],
            "statuses":[{"id":"sha256:layer","vertex":"sha256:1","total":2000000,"current":2000000,"timestamp":"2026-01-01T00:00:01Z","started":"2026-01-01T00:00:00.5Z","completed":"2026-01-01T00:00:01Z"}]}"#,
        r#"{"logs":[{"vertex":"sha256:2","stream":1,"data":"aGVsbG8Kd29ybGQK","timestamp":"2026-01-01T00:00:01Z"}]}"#,
    ];

    #[test]
    fn a_frame_shows_steps_counters_clocks_and_output() {
        let trace = recorded(&EVENTS);
        let mut tty = Tty::new("Building", Palette::default(), None);
        assert_eq!(
            draw(&mut tty, &trace, 24, false),
            [
                "\u{1b}[0G\u{1b}[?25l[+] Building 2.0s (1/2)",
                " => [1/2] FROM x                                        1.0s",
                " => => sha256:layer 2.00MB / 2.00MB                     0.5s",
                " => [2/2] RUN make all the things that take a very lon  2.0s",
                " => => # hello",
                " => => # world",
                "\u{1b}[?25h",
            ]
        );
        let again = draw(&mut tty, &trace, 24, false);
        assert_eq!(again[0], "\u{1b}[6A\u{1b}[0G\u{1b}[?25l[+] Building 2.0s (1/2)");
    }

    #[test]
    fn on_a_low_terminal_what_runs_stays_in_sight() {
        let mut events: Vec<String> = vec![EVENTS[0].to_owned()];
        for i in 3..9 {
            events.push(format!(
                r#"{{"vertexes":[{{"digest":"sha256:{i}","name":"step {i}","started":"2026-01-01T00:00:00Z","completed":"2026-01-01T00:00:01Z","cached":true}}]}}"#
            ));
        }
        let trace = recorded(&events.iter().map(String::as_str).collect::<Vec<_>>());
        let mut tty = Tty::new("Building", Palette::default(), None);
        let frame = draw(&mut tty, &trace, 5, false);
        let names: Vec<&str> =
            frame[1..frame.len() - 1].iter().map(|l| l.get(4..12).unwrap_or_default()).collect();
        assert_eq!(names, ["[2/2] RU", "CACHED s", "CACHED s"]);
        assert_eq!(draw(&mut tty, &trace, 5, true).len(), 1 + 9 + 1);
    }
}
