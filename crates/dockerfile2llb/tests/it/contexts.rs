//! How options change the source of a context.

use crate::support::Case;

/// The line of the vertex that loads the git context, with `option` set.
async fn load(option: &str) -> String {
    let case = Case::parse(&format!(
        "-- opts --\ncontext=https://h.io/a.git#main\n{option}\n-- Dockerfile --\nFROM scratch\nCOPY a /\n"
    ));
    let all = case.run("{}").await;
    all.lines()
        .find(|l| l.contains("load git source"))
        .unwrap_or_else(|| panic!("{all}"))
        .to_owned()
}

#[tokio::test]
async fn a_git_context_keeps_its_directory_of_git_on_request() {
    let (without, with, off) = (
        load("target=").await,
        load("build-arg:BUILDKIT_CONTEXT_KEEP_GIT_DIR=1").await,
        load("build-arg:BUILDKIT_CONTEXT_KEEP_GIT_DIR=0").await,
    );
    assert!(with.contains(" source.git.keepgitdir"), "{with}");
    assert!(!without.contains("keepgitdir") && off == without, "{without}");
}
