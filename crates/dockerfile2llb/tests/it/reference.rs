//! Dockerfiles converted side by side with BuildKit's frontend. Each file of `cases/` has a
//! Dockerfile, options, other files and under `want` what the reference answered: digests, names,
//! metadata and places of every vertex, metadata, warnings, errors. Where we differ on purpose the
//! expectation is edited: an image that a mount names has a place, and so has a refused subrequest.

use crate::support::Case;
use std::path::Path;

#[tokio::test]
async fn conversions_equal_the_references() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cases");
    let images = std::fs::read_to_string(dir.join("images.json")).unwrap();
    let only = std::env::var("CASE").unwrap_or_default();
    let mut paths: Vec<_> = std::fs::read_dir(&dir).unwrap().map(|e| e.unwrap().path()).collect();
    paths.retain(|p| {
        p.extension().is_some_and(|e| e == "case") && p.to_string_lossy().contains(&only)
    });
    paths.sort();
    assert!(!paths.is_empty());
    let mut wrong = Vec::new();
    for path in &paths {
        let case = Case::parse(&std::fs::read_to_string(path).unwrap());
        let (got, want) = (case.run(&images).await, case.want());
        if got != want {
            let differing = |a: &str, b: &str, sign: &str| -> String {
                a.lines()
                    .filter(|l| !b.lines().any(|m| m == *l))
                    .map(|l| format!("{sign} {l}\n"))
                    .collect()
            };
            let mut text = format!(
                "{}\n{}{}",
                path.display(),
                differing(want, &got, "-"),
                differing(&got, want, "+")
            );
            if text.lines().count() == 1 {
                text += "only the order differs\n";
            }
            wrong.push(text);
        }
    }
    assert!(wrong.is_empty(), "{} of {} differ:\n{}", wrong.len(), paths.len(), wrong.join("\n"));
}
