//! Why a COPY found nothing: the line of the ignore file that hides the path, or the name that was
//! probably meant; and where in the instruction the path stands.
//!
//! States are solved after the frontend has returned, so this is kept with the result
//! ([`Explain`]).

use crate::build_context::CONTEXT;
use futures::{FutureExt as _, future::BoxFuture};
use shipway_dockerfile::{Lines, Source, pin};
use shipway_fault::{Detail, Fault, SourceFile, nearest};
use shipway_filesync::IgnoreFile;
use shipway_frontend::{Bridge, Explain};
use shipway_gocompat::{path, quote};
use std::{sync::Arc, time::Duration};

/// How long a client may take to list a directory for a suggestion.
const PATIENCE: Duration = Duration::from_secs(2);
/// Most paths of one instruction that are looked into.
const MAX_PATHS: usize = 16;

/// Paths of the main context that an instruction needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContextUse {
    pub lines: Lines,
    pub paths: Vec<String>,
}

/// What is known about the uses of the main context, which is a client's directory.
pub struct Explainer {
    /// The Dockerfile.
    pub file: Arc<SourceFile>,
    /// The main context's; none if that is not a directory of the client's.
    pub ignore: Option<IgnoreFile>,
    /// Name of the ignore file.
    pub ignore_name: String,
    /// Session that has the directory.
    pub session: String,
    pub uses: Vec<ContextUse>,
    /// Whether places are reported with columns.
    pub columns: bool,
}

/// What is said if the directory is not there that the wildcards of `path` begin in.
fn start_is_missing(path: &str) -> String {
    let inside = path::join("/", path);
    let fixed = inside.find(['*', '?', '[']).map_or(&*inside, |wild| &inside[..wild]);
    format!("lstat {}: no such file", fixed.rsplit_once('/').map_or("", |(dir, _)| dir))
}

impl Explainer {
    /// The paths that the failure is about: those it quotes, of the instruction that it points to.
    fn missing(&self, fault: &Fault) -> Vec<&str> {
        let text = fault.to_string();
        let starts = fault.details().iter().filter_map(|d| match d {
            Detail::Source { file, spans } if file.data == self.file.data => {
                spans.first().map(|s| s.start.line)
            }
            _ => None,
        });
        let starts: Vec<i32> = starts.collect();
        let uses = self.uses.iter().filter(|u| starts.contains(&u.lines.start));
        let paths = uses.flat_map(|u| &u.paths).filter(|p| {
            text.contains(&quote(&path::join("/", p))) || text.contains(&start_is_missing(p))
        });
        paths.map(String::as_str).take(MAX_PATHS).collect()
    }

    async fn hint(&self, bridge: &dyn Bridge, path: &str) -> String {
        let inside = path::join("/", path);
        let relative = inside.trim_start_matches('/');
        if let Some(Ok(Some(rule))) = self.ignore.as_ref().map(|ignore| ignore.excluder(relative)) {
            return format!(
                "{path} of the build context is excluded by line {} of {}: {}",
                rule.line, self.ignore_name, rule.text
            );
        }
        let (dir, base) = relative.rsplit_once('/').unwrap_or(("", relative));
        let asked = bridge.local_names(CONTEXT, &self.session, dir);
        let names = match tokio::time::timeout(PATIENCE, asked).await {
            Ok(Ok(names)) => names,
            _ => Vec::new(),
        };
        let none =
            format!("the build context (the directory given to the build) has no {relative}");
        match nearest(base, names.iter().map(String::as_str)) {
            Some(near) if near != base => {
                format!("{none}; did you mean {}?", path::join(dir, near))
            }
            _ => none,
        }
    }
}

/// The paths that a message quotes, and those in it that are absolute.
fn paths_in(message: &str) -> impl Iterator<Item = &str> {
    let absolute = message
        .split(' ')
        .map(|word| word.trim_end_matches(':'))
        .filter(|word| word.starts_with('/'));
    message.split('"').skip(1).step_by(2).chain(absolute)
}

impl Explainer {
    /// The fault with the columns of the paths that it is about.
    fn pinned(&self, fault: Fault) -> Fault {
        let message = fault.to_string();
        let missing = self.missing(&fault);
        let text = String::from_utf8_lossy(&self.file.data);
        let source = Source::new(&text);
        fault.clone().map_details(|detail| match detail {
            Detail::Source { file, spans } if file.data == self.file.data && !spans.is_empty() => {
                let lines =
                    Lines { start: spans[0].start.line, end: spans[spans.len() - 1].end.line };
                let written = missing
                    .iter()
                    .copied()
                    .chain(paths_in(&message))
                    .flat_map(|p| [p, p.trim_start_matches('/')]);
                let exact = written
                    .filter(|p| !p.is_empty())
                    .find_map(|path| source.find_text(lines, path));
                Detail::Source {
                    file: file.clone(),
                    spans: if exact.is_some() { pin(lines, exact) } else { spans.clone() },
                }
            }
            other => other.clone(),
        })
    }
}

impl Explain for Explainer {
    fn explain<'a>(&'a self, bridge: &'a dyn Bridge, fault: Fault) -> BoxFuture<'a, Fault> {
        async move {
            let text = fault.to_string();
            if !text.contains("not found") && !text.contains("no such file") {
                return fault;
            }
            let mut explained =
                if self.columns { self.pinned(fault.clone()) } else { fault.clone() };
            for path in self.missing(&fault) {
                let hint = self.hint(bridge, path).await;
                if !explained.hints().any(|h| h == hint) {
                    explained = explained.hint(hint);
                }
            }
            explained
        }
        .boxed()
    }
}
