//! What the frontend says of a COPY that found nothing.

use crate::support::Case;
use shipway_fault::{Detail, Fault, Position, SourceFile, Span};
use std::sync::Arc;

const CASE: &str = "-- Dockerfile --
FROM scratch AS o
FROM scratch
COPY secret/key /
COPY src/mian.c nothing* gone/*.c secret/*.key /dst/
COPY --from=o /x /
-- .dockerignore --
# what stays here

secret
-- names src --
main.c
util.c
";

async fn check(line: i32, message: &str, hints: &[&str]) {
    let case = Case::parse(CASE);
    let (fake, result) = case.build("{}").await;
    let explain = result.unwrap().explain.unwrap();
    let file = SourceFile { data: case.section("Dockerfile").into(), ..SourceFile::default() };
    let at = Position { line, character: 0 };
    let fault = Fault::not_found(message.to_owned())
        .context("failed to calculate checksum of ref x")
        .detail(Detail::Source { file: Arc::new(file), spans: vec![Span { start: at, end: at }] });
    let told = explain.explain(&*fake, fault.clone()).await;
    assert_eq!(told.to_string(), fault.to_string());
    assert_eq!(told.hints().collect::<Vec<_>>(), hints);
}

#[tokio::test]
async fn missing_sources_are_pointed_at() {
    let case = Case::parse(&format!("-- opts --\nsource-columns=true\n{CASE}"));
    let (fake, result) = case.build("{}").await;
    let explain = result.unwrap().explain.unwrap();
    let file =
        Arc::new(SourceFile { data: case.section("Dockerfile").into(), ..SourceFile::default() });
    for (line, message, want) in [
        (3, "\"/secret/key\": not found", (5, 15)),
        (4, "\"/src/mian.c\": not found", (5, 15)),
        (5, "lstat /x: no such file or directory", (14, 16)),
        (5, "exit code: 1", (0, 0)),
    ] {
        let at = Position { line, character: 0 };
        let detail =
            Detail::Source { file: file.clone(), spans: vec![Span { start: at, end: at }] };
        let told = explain.explain(&*fake, Fault::not_found(message).detail(detail)).await;
        let [Detail::Source { spans, .. }] = told.details() else { panic!("{told:?}") };
        assert_eq!((spans[0].start.character, spans[0].end.character), want, "{message}");
    }
}

#[tokio::test]
async fn missing_sources_are_explained() {
    check(
        3,
        "\"/secret/key\": not found",
        &["secret/key of the build context is excluded by line 3 of .dockerignore: secret"],
    )
    .await;
    check(
        4,
        "\"/src/mian.c\": not found",
        &["the build context (the directory given to the build) has no src/mian.c; did you mean src/main.c?"],
    )
    .await;
    let gone = "the build context (the directory given to the build) has no gone/*.c";
    check(4, "lstat /gone: no such file or directory", &[gone]).await;
    let hidden = "secret/*.key of the build context is excluded by line 3 of .dockerignore: secret";
    check(4, "lstat /secret: no such file or directory", &[hidden]).await;
    // Another instruction's lines, another path, another kind of failure.
    check(5, "\"/x\": not found", &[]).await;
    check(4, "\"/secret/key\": not found", &[]).await;
    check(3, "exit code: 1", &[]).await;
}
