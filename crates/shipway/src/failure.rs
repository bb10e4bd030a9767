//! How a failure is told: the lines of the source it is about, what went wrong, and what to try.

use std::fmt::Write;

use shipway_fault::{Detail, Fault, SourceFile, Span};

use crate::Persona;

/// What to print about `fault`.
pub(crate) fn describe(fault: &Fault, persona: Persona) -> String {
    let mut out = String::new();
    for detail in fault.details() {
        if let Detail::Source { file, spans } = detail {
            out.push_str(&excerpt(file, spans));
        }
    }
    let word = match persona {
        Persona::Shipway => "ERROR",
        Persona::Buildctl => "error",
    };
    let _ = writeln!(out, "{word}: {fault}");
    for hint in fault.hints() {
        let _ = writeln!(out, "hint: {hint}");
    }
    out
}

/// The lines of `file` around `spans`, those within them marked.
pub(crate) fn excerpt(file: &SourceFile, spans: &[Span]) -> String {
    let text = String::from_utf8_lossy(&file.data);
    let lines: Vec<&str> = text.split('\n').collect();
    let last_of = |span: &Span| span.end.line.max(span.start.line);
    let first = spans.iter().map(|s| s.start.line).min().and_then(|n| usize::try_from(n).ok()).unwrap_or(0);
    let last = spans.iter().map(last_of).max().and_then(|n| usize::try_from(n).ok()).unwrap_or(0).min(lines.len());
    if first < 1 || first > lines.len() {
        return String::new();
    }
    // One line gets two more on either side, a longer stretch one.
    let around = if first == last { 2 } else { 1 };
    let (from, to) = (first.saturating_sub(around).max(1), (last + around).min(lines.len()));
    let mut out = format!("{}:{first}\n--------------------\n", file.filename);
    for number in from..=to {
        let inside = spans.iter().any(|s| usize::try_from(s.start.line).is_ok_and(|n| n <= number) && last_of(s) as usize >= number);
        let mark = if inside { ">>>" } else { "   " };
        let _ = writeln!(out, " {number:3} | {mark} {}", lines[number - 1].trim_end_matches('\r'));
    }
    out.push_str("--------------------\n");
    out
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use shipway_fault::Position;

    use super::*;

    #[test]
    fn a_failure_shows_its_lines_and_hints() {
        let file =
            SourceFile { filename: "Dockerfile".into(), data: b"FROM a\nRUN b\nRUN c\nRUN d\nRUN e\n".to_vec(), ..Default::default() };
        let line = |line| Position { line, character: 0 };
        let span = Span { start: line(3), end: line(3) };
        let fault = Fault::unknown("exit code: 1").context("failed to solve").hint("try again");
        let fault = fault.detail(Detail::Source { file: Arc::new(file.clone()), spans: vec![span] });
        assert_eq!(
            describe(&fault, Persona::Buildctl),
            "Dockerfile:3\n--------------------\n   1 |     FROM a\n   2 |     RUN b\n   3 | >>> RUN c\n   4 |     RUN d\n   5 |     RUN e\n\
             --------------------\nerror: failed to solve: exit code: 1\nhint: try again\n"
        );
        assert_eq!(excerpt(&file, &[Span { start: line(99), end: line(99) }]), "");
        assert_eq!(excerpt(&file, &[]), "");
    }
}
