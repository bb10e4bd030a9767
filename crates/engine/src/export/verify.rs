//! Whether a result is for the platforms that were asked for; if not, that is worth a warning (row
//! `ex.c.verify`).

use super::vertex_digest;
use crate::build::BuildScope;
use shipway_exporters::ExportInput;
use shipway_oci::{Digest, Platform};
use shipway_progress::{Event, WarningUpdate};
use std::{collections::BTreeSet, sync::Arc};

/// Warns on the vertex of the first exporter, or on one of its own if there is none.
pub(crate) fn warn(
    scope: &BuildScope,
    requested: Option<&str>,
    input: &ExportInput,
    exporters: usize,
) {
    let host = scope.parts.native();
    let warnings = warnings(requested, host, input);
    if warnings.is_empty() {
        return;
    }
    let vertex = if exporters > 0 {
        vertex_digest(scope.session.as_str(), "export", 0)
    } else {
        let vertex = Digest::of(format!("{}-verify", scope.id));
        let reporter = scope.journal.reporter(vertex, "Verifying build result");
        reporter.started();
        reporter.completed(None);
        vertex
    };
    for short in warnings {
        scope.journal.push(Event::Warning(Arc::new(WarningUpdate {
            vertex,
            level: 0,
            short,
            detail: Vec::new(),
            url: String::new(),
            source: None,
        })));
    }
}

fn warnings(requested: Option<&str>, host: &Platform, input: &ExportInput) -> Vec<String> {
    let nothing = !input.is_map
        && !input.metadata.contains_key("refs.platforms")
        && input.platforms.iter().all(|p| p.state.is_scratch());
    if nothing {
        return Vec::new();
    }
    let results: Vec<&Platform> = input.platforms.iter().map(|p| &p.platform).collect();
    compare(requested, host, &results, input.is_map)
}

fn compare(
    requested: Option<&str>,
    host: &Platform,
    results: &[&Platform],
    is_map: bool,
) -> Vec<String> {
    let (mut wanted, mut warnings) = (BTreeSet::new(), Vec::new());
    let host_text = host.to_string();
    let requested: Vec<&str> =
        requested.map_or_else(|| vec![host_text.as_str()], |r| r.split(',').collect());
    for text in &requested {
        match text.parse::<Platform>() {
            Err(e) => warnings.push(format!("Invalid platform result requested {text:?}: {e}")),
            Ok(platform) if !wanted.insert(platform.to_string()) => {
                warnings.push(format!("Duplicate platform result requested {text:?}"))
            }
            Ok(_) => {}
        }
    }
    if !warnings.is_empty() {
        return warnings;
    }
    let there: BTreeSet<String> = results.iter().map(|p| p.to_string()).collect();
    let list = |set: &BTreeSet<String>| set.iter().cloned().collect::<Vec<_>>().join(",");
    match (wanted.len(), results) {
        (1, [only]) => {
            // A request often names no version of the system where the result has one.
            let without = Platform { os_version: String::new(), ..(*only).clone() };
            if wanted.contains(&only.to_string()) || wanted.contains(&without.to_string()) {
                Vec::new()
            } else {
                vec![format!(
                    "Requested platform {:?} does not match result platform {:?}",
                    requested[0],
                    only.to_string()
                )]
            }
        }
        (2.., _) if !is_map => {
            vec!["Multiple platforms requested but result is not multi-platform".into()]
        }
        _ if wanted != there => {
            vec![format!(
                "Requested platforms {} do not match result platforms {}",
                list(&wanted),
                list(&there)
            )]
        }
        _ => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(requested: Option<&str>, results: &[&str], is_map: bool, expected: &str) {
        let results: Vec<Platform> = results.iter().map(|r| r.parse().unwrap()).collect();
        let host = "linux/amd64".parse().unwrap();
        let found =
            compare(requested, &host, &results.iter().collect::<Vec<_>>(), is_map).join("; ");
        assert_eq!(found, expected, "{requested:?}");
    }

    #[test]
    fn results_are_held_against_requests() {
        check(None, &["linux/amd64"], false, "");
        check(
            Some("linux/amd64,linux/arm64"),
            &["linux/amd64"],
            false,
            "Multiple platforms requested but result is not multi-platform",
        );
        check(Some("linux/amd64,linux/arm64"), &["linux/arm64", "linux/amd64"], true, "");
        let two =
            "Requested platforms linux/amd64 do not match result platforms linux/amd64,linux/arm64";
        check(None, &["linux/amd64", "linux/arm64"], true, two);
        let one =
            r#"Requested platform "linux/arm64" does not match result platform "linux/amd64""#;
        check(Some("linux/arm64"), &["linux/amd64"], false, one);
        check(
            Some("linux/arm64,linux/arm64"),
            &["linux/arm64"],
            true,
            r#"Duplicate platform result requested "linux/arm64""#,
        );
    }
}
