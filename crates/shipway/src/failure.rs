//! How a failure is reported: the lines of the source it is about, what went wrong, and what to
//! try.

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

/// The lines of `file` around `spans`, those within them marked, and what is meant of them
/// underlined.
pub(crate) fn excerpt(file: &SourceFile, spans: &[Span]) -> String {
    let text = String::from_utf8_lossy(&file.data);
    let lines: Vec<&str> = text.split('\n').collect();
    let last_of = |span: &Span| span.end.line.max(span.start.line);
    let first =
        spans.iter().map(|s| s.start.line).min().and_then(|n| usize::try_from(n).ok()).unwrap_or(0);
    let last = spans
        .iter()
        .map(last_of)
        .max()
        .and_then(|n| usize::try_from(n).ok())
        .unwrap_or(0)
        .min(lines.len());
    if first < 1 || first > lines.len() {
        return String::new();
    }
    // One line gets two more on either side, a longer stretch one.
    let around = if first == last { 2 } else { 1 };
    let (from, to) = (first.saturating_sub(around).max(1), (last + around).min(lines.len()));
    let mut out = format!("{}:{first}\n--------------------\n", file.filename);
    for number in from..=to {
        let inside = spans.iter().any(|s| {
            usize::try_from(s.start.line).is_ok_and(|n| n <= number)
                && last_of(s) as usize >= number
        });
        let mark = if inside { ">>>" } else { "   " };
        let line = lines[number - 1].trim_end_matches('\r').trim_start_matches('\u{feff}');
        let _ = writeln!(out, " {number:3} | {mark} {line}");
        for span in spans.iter().filter(|s| usize::try_from(s.start.line) == Ok(number)) {
            if let Some(carets) = carets(line, span) {
                let _ = writeln!(out, "     |     {carets}");
            }
        }
    }
    out.push_str("--------------------\n");
    out
}

/// Blanks and carets under what `span` has of `line`; `None` if it is the whole line.
fn carets(line: &str, span: &Span) -> Option<String> {
    let from = usize::try_from(span.start.character).ok()?;
    let to = if span.end.line == span.start.line {
        usize::try_from(span.end.character).ok()?
    } else {
        line.chars().count()
    };
    if to <= from {
        return None;
    }
    let mut out: String =
        line.chars().take(from).map(|c| if c == '\t' { '\t' } else { ' ' }).collect();
    out.extend(std::iter::repeat_n('^', to - from));
    Some(out)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use shipway_fault::Position;

    use super::*;

    #[test]
    fn a_failure_shows_its_lines_and_hints() {
        let file = SourceFile {
            filename: "Dockerfile".into(),
            data: b"FROM a\nRUN b\nRUN c\nRUN d\nRUN e\n".to_vec(),
            ..Default::default()
        };
        let line = |line| Position { line, character: 0 };
        let span = Span { start: line(3), end: line(3) };
        let fault = Fault::unknown("exit code: 1").context("failed to solve").hint("try again");
        let fault =
            fault.detail(Detail::Source { file: Arc::new(file.clone()), spans: vec![span] });
        assert_eq!(
            describe(&fault, Persona::Buildctl),
            "Dockerfile:3\n--------------------\n   1 |     FROM a\n   2 |     RUN b\n   3 | >>> RUN c\n   4 |     RUN d\n   5 |     RUN e\n\
             --------------------\nerror: failed to solve: exit code: 1\nhint: try again\n"
        );
        let exact = Span {
            start: Position { line: 1, character: 5 },
            end: Position { line: 1, character: 6 },
        };
        assert_eq!(
            excerpt(&file, &[exact]),
            "Dockerfile:1\n--------------------\n   1 | >>> FROM a\n     |          ^\n   2 |     RUN b\n   3 |     RUN c\n--------------------\n"
        );
        assert_eq!(
            carets(
                "\t\ta b",
                &Span {
                    start: Position { line: 1, character: 4 },
                    end: Position { line: 2, character: 0 }
                }
            )
            .unwrap(),
            "\t\t  ^"
        );
        assert_eq!(excerpt(&file, &[Span { start: line(99), end: line(99) }]), "");
        assert_eq!(excerpt(&file, &[]), "");
    }
}
