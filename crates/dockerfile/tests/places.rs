//! One file in, the place of its mistake or of its violations out, as `line:column text`.

use shipway_dockerfile::{Dockerfile, Lines, Linter, Source, Token};
use shipway_fault::Span;

/// The exact ones of `spans`, with what they mark.
#[track_caller]
fn marked(text: &str, spans: &[Span]) -> Vec<String> {
    let exact = spans.iter().filter(|s| s.end.character > 0);
    let show = |s: &Span| {
        let (from, to) = (s.start.character as usize, s.end.character as usize);
        assert_eq!(s.start.line, s.end.line);
        let line = text
            .trim_start_matches('\u{feff}')
            .lines()
            .nth(s.start.line as usize - 1)
            .expect("line");
        format!(
            "{}:{from} {}",
            s.start.line,
            line.chars().skip(from).take(to - from).collect::<String>()
        )
    };
    exact.map(show).collect()
}

#[track_caller]
fn mistake(text: &str, place: &str) {
    let error = Dockerfile::parse(text.as_bytes()).expect_err(text);
    let lines = error.lines.expect("lines");
    let spans = error.spans(&Source::new(text));
    assert_eq!(marked(text, &spans).join(", "), place, "for {text:?}: {error}");
    // Whatever is marked, the lines are those that everybody is told.
    let numbers = |spans: &[Span]| spans.iter().map(|s| s.start.line).collect::<Vec<_>>();
    assert_eq!(numbers(&spans), numbers(&lines.spans()));
}

#[test]
fn mistakes_are_pointed_at() {
    for (body, place) in [
        ("  COPPY a b", "2:2 COPPY"),
        ("COPY \\\n  --lnk a b", "3:2 --lnk"),
        ("COPY --lnk=\"a b\" a b", "2:5 --lnk=\"a b\""),
        ("COPY --from=a --from=b a b", "2:14 --from=b"),
        ("COPY --link=maybe a b", "2:5 --link=maybe"),
        ("COPY a", "2:5 a"),
        ("COPY", "2:0 COPY"),
        ("COPY a <<E\nE", "2:7 <<E"),
        ("RUN <<EOF\nx", "2:6 EOF"),
        ("RUN [\"a\", 1]", "2:4 [\"a\", 1]"),
        ("ENV a=b c d=e", "2:8 c"),
        ("ENV a=b \\\n# between\n\n c d=e", "5:1 c"),
        ("ENV", "2:0 ENV"),
        ("ENV a", "2:4 a"),
        ("ENV a=b =c", "2:8 =c"),
        ("LABEL é=b ü", "2:10 ü"),
        ("ARG =x", "2:4 =x"),
        ("SHELL a b", "2:6 a b"),
        ("VOLUME [\"\"]", "2:7 [\"\"]"),
        ("USER", "2:0 USER"),
        ("HEALTHCHECK --interval=1 CMD x", "2:12 --interval=1"),
        ("HEALTHCHECK --retries=x CMD x", "2:12 --retries=x"),
        ("HEALTHCHECK run x", "2:12 run"),
        ("ONBUILD ONBUILD RUN x", "2:8 ONBUILD"),
        ("RUN --network=x/z y", "2:14 x/z"),
        ("RUN --security=maybe y", "2:15 maybe"),
        ("RUN --mount=type=cache,from=$x y", "2:23 from=$x"),
        ("FROM a AS 1x", "2:10 1x"),
        ("FROM a b", "2:5 a b"),
        ("FROM --plaform=x a", "2:5 --plaform=x"),
        ("RU\\\nNN a", "2:0 RU"),
    ] {
        mistake(&format!("FROM a\n{body}"), place);
    }
    mistake("  RUN x", "1:2 RUN");
    // These lines are counted from 0.
    for (text, place) in [
        ("# escape=x\nFROM a", "1:0 # escape=x"),
        ("# check=skip=all\n# check=skip=all\nFROM a", "2:0 # check=skip=all"),
    ] {
        let error = Dockerfile::parse(text.as_bytes()).expect_err(text);
        assert_eq!(marked(text, &error.spans(&Source::new(text))).join(", "), place);
    }
    mistake("\u{feff}RUN x", "1:0 RUN");
    mistake("# escape=`\nFROM a\nRUN x `\n y\nCOPY `\n  --lnk a b\r\n", "6:2 --lnk");
}

#[test]
fn tokens_are_found_where_they_are_meant() {
    let check = |text: &str, token: Token, place: &str| {
        let lines = Lines { start: 1, end: text.lines().count() as i32 };
        let found: Vec<Span> = Source::new(text).find(lines, &token).into_iter().collect();
        assert_eq!(marked(text, &found).join(", "), place, "for {token:?} in {text:?}");
    };
    let variable = |name: &str| Token::Variable(name.into());
    let word = |text: &str| Token::Text(text.into());
    check("RUN $AB ${A:-x} $A", variable("A"), "1:10 A");
    check("ENV x='$A' y=\\$A z=\"'$A'\"", variable("A"), "1:22 A");
    check("COPY <<'A' <<B /d\n\\$x\nB $x ${y}\nA\n${y}\nB", variable("y"), "3:7 y");
    check("RUN echo", variable("A"), "");
    check("COPY ab a /a", word("a"), "1:8 a");
    check("COPY abc /", word("b"), "1:6 b");
    check("WORKDIR $dir", word("not/written"), "1:8 $dir");
    check("WORKDIR", word("x"), "1:0 WORKDIR");
    check("FROM --platform=x \\\n img as b", Token::Word(1), "2:5 as");
    check("FROM a", Token::Word(2), "");
    check(
        "FROM --platform=\"a b\" img",
        Token::Flag("--platform".into()),
        "1:5 --platform=\"a b\"",
    );
    check("COPY --link a b", Token::Arguments, "1:12 a b");
    check("RUN a \\\n b \\\n c", Token::Arguments, "1:4 a ");
    check("RUN a", Token::Keyword, "1:0 RUN");
    assert_eq!(Source::new("RUN a").find(Lines { start: 9, end: 9 }, &Token::Keyword), None);
    assert_eq!(Source::new("").find(Lines::default(), &Token::Keyword), None);
}

#[test]
fn violations_are_pointed_at_and_mended() {
    for (text, place, advice, mended) in [
        ("FROM a AS Bad", "1:10 Bad", "write bad", Some("bad")),
        ("FROM a as b", "1:7 as", "write AS", Some("AS")),
        ("from a AS b", "1:7 AS", "write as", Some("as")),
        ("FROM a AS scratch", "1:10 scratch", "give the stage another name than scratch", None),
        ("FROM a AS b\nFROM a AS b", "2:10 b", "give one of the two stages another name", None),
        ("FROM a\nRUN b\nrun c", "3:0 run", "write RUN", Some("RUN")),
        ("from a\nrun b\nRun c", "3:0 Run", "write run", Some("run")),
        (
            "FROM a\nMAINTAINER b",
            "2:0 MAINTAINER",
            "write LABEL org.opencontainers.image.authors=\"…\"",
            None,
        ),
        ("FROM a\nRUN b \\\n\n c", "", "remove the empty line, or begin it with #", None),
        ("# check=experimental=all\n# x y\nARG v", "3:4 v", "begin the comment with v", None),
    ] {
        let mut linter = Linter::new(
            shipway_dockerfile::LintConfig::of_file(text.as_bytes()).expect("settings"),
        );
        Dockerfile::parse_with(text.as_bytes(), &mut linter).expect("parses");
        let [lint] = linter.found() else { panic!("{:?}", linter.found()) };
        assert_eq!(marked(text, &lint.spans(&Source::new(text))).join(", "), place, "for {text:?}");
        assert!(lint.fix.advice.starts_with(advice), "{text:?}: {}", lint.fix.advice);
        assert_eq!(lint.fix.replacement.as_deref(), mended, "for {text:?}");
    }
}
