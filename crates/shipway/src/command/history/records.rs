//! Finding records of builds, and how lists call them (rows `bx.history.*`).

use std::{collections::BTreeMap, time::Duration};

use futures::StreamExt;
use shipway_client::{Client, HistoryKind, HistoryQuery, HistoryRecord, Time};
use shipway_fault::{Fault, Result};
use shipway_gocompat::{GoDuration, path};
use shipway_oci::timestamp;

use crate::builders::BuildState;

/// Most records that are listed, the latest first.
const LIMIT: i32 = 50;

/// A record, and the daemon's time when it was given.
pub(super) struct Found {
    pub(super) record: HistoryRecord,
    pub(super) now: Option<Time>,
}

impl Found {
    /// How long the build took, or takes so far.
    pub(super) fn duration(&self) -> Option<Duration> {
        let end = self.record.completed_at.or(self.now)?;
        Some(end.since(self.record.created_at?))
    }
}

/// A condition as `--filter` has it, in the words of the daemon.
pub(super) fn condition(text: &str) -> Result<String> {
    const HINT: &str = "it is KEY=VALUE with ref, repository or status, or startedAt, completedAt or duration with <, <=, > or >=";
    let invalid = |what: &str| Fault::invalid(format!("{what} {text:?}")).hint(HINT);
    let at = text.find(['!', '=', '<', '>']).ok_or_else(|| invalid("invalid filter"))?;
    let (key, rest) = text.split_at(at);
    let operator = ["!=", "<=", ">=", "=", "<", ">"].into_iter().find(|o| rest.starts_with(o));
    let operator = operator.ok_or_else(|| invalid("invalid filter"))?;
    let value = &rest[operator.len()..];
    let is_equality = matches!(operator, "=" | "!=");
    let operator = match key {
        "ref" | "repository" | "status" if !is_equality => {
            return Err(invalid("invalid separator, expected = or != in"));
        }
        "status" if operator == "=" => "==",
        "ref" | "repository" if operator == "=" => "~=",
        "ref" | "repository" | "status" => operator,
        "startedAt" | "completedAt" | "duration" if is_equality => {
            return Err(invalid("invalid separator, expected <=, <, >= or > in"));
        }
        "startedAt" | "completedAt" => {
            let is_time = value.parse::<GoDuration>().is_ok() || timestamp::parse(value).is_some();
            if !is_time {
                return Err(invalid("invalid time in"));
            }
            operator
        }
        "duration" => {
            value.parse::<GoDuration>().map_err(|_| invalid("invalid duration in"))?;
            operator
        }
        _ => return Err(invalid("unsupported filter")),
    };
    // A pattern that is looked for as a text.
    let value = match operator {
        "~=" => quoted(value),
        _ => value.to_owned(),
    };
    Ok(format!("{key}{operator}{value}"))
}

/// The regular expression that matches `text`.
fn quoted(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if r"\.+*?()|[]{}^$".contains(c) {
            out.push('\\');
        }
        out.push(c);
    }
    out
}

/// Conditions that must all hold, as one filter.
fn all(conditions: &[String]) -> Vec<String> {
    let quote = |condition: &String| match condition.contains([',', '"', '\n']) {
        true => format!("\"{}\"", condition.replace('"', "\"\"")),
        false => condition.clone(),
    };
    match conditions.is_empty() {
        true => Vec::new(),
        false => vec![conditions.iter().map(quote).collect::<Vec<_>>().join(",")],
    }
}

/// The records that `conditions` allow, the latest first.
pub(super) async fn list(
    client: &Client,
    reference: &str,
    conditions: &[String],
) -> Result<Vec<Found>> {
    let query = HistoryQuery {
        reference: reference.to_owned(),
        filter: all(conditions),
        limit: LIMIT,
        ..HistoryQuery::default()
    };
    let (now, mut events) = client.history(query).await?;
    let mut found = Vec::new();
    while let Some(event) = events.next().await {
        let event = event?;
        if event.kind != HistoryKind::Deleted {
            found.push(Found { record: event.record, now });
        }
    }
    found.sort_by_key(|f| std::cmp::Reverse(f.record.created_at));
    Ok(found)
}

/// What a user calls a build: its id, also with builder and node before it; `^N`, N builds before
/// the latest; nothing, the latest.
enum Named<'a> {
    Before(usize),
    Id(&'a str),
}

fn named(text: &str) -> Result<Named<'_>> {
    match text.strip_prefix('^') {
        None if text.is_empty() => Ok(Named::Before(0)),
        None => Ok(Named::Id(text.rsplit('/').next().unwrap_or(text))),
        Some(n) => n.parse().map(Named::Before).map_err(|_| {
            Fault::invalid(format!("invalid offset {text:?}"))
                .hint("^1 is the build before the latest")
        }),
    }
}

/// The build that `text` names.
pub(super) async fn find(client: &Client, text: &str) -> Result<Found> {
    let found = match named(text)? {
        Named::Id(id) => list(client, id, &[]).await?.into_iter().next(),
        Named::Before(n) => list(client, "", &[]).await?.into_iter().nth(n),
    };
    found.ok_or_else(|| {
        let fault = match text {
            "" => Fault::not_found("no records found"),
            text if text.starts_with('^') => {
                Fault::not_found(format!("no build found with offset {text}"))
            }
            text => Fault::not_found(format!("no record found for ref {text:?}")),
        };
        fault.hint("`shipway history ls` lists the builds that are remembered")
    })
}

/// What a build is called in lists: by its directory, its stage, or its repository. `state` is what
/// the client that built noted.
pub(super) fn name(attrs: &BTreeMap<String, String>, state: Option<&BuildState>) -> String {
    let attr = |key: &str| attrs.get(key).map(String::as_str).filter(|v| !v.is_empty());
    if let Some(name) = attr("build-arg:BUILDKIT_BUILD_NAME") {
        return name.to_owned();
    }
    let context = attr("context").or_else(|| attr("vcs:localdir:context").filter(|v| *v != "."));
    let is_remote = |text: &str| text.contains("://") || text.starts_with("git@");
    let source = attr("vcs:source").or_else(|| attr("input:context").filter(|v| is_remote(v)));
    let mut file = attr("filename").filter(|v| *v != "Dockerfile").unwrap_or_default().to_owned();
    if let Some(dir) = attr("vcs:localdir:dockerfile").filter(|v| *v != ".") {
        file = path::join(dir, &file);
    }
    let mut directory = String::new();
    if let Some(state) = state.filter(|state| !is_remote(&state.local_path)) {
        if !matches!(state.local_path.as_str(), "" | "-") {
            directory.clone_from(&state.local_path);
        }
        if !matches!(state.dockerfile_path.as_str(), "" | "-" | "Dockerfile") {
            file.clone_from(&state.dockerfile_path);
        }
    }
    let is_usual = file.is_empty() || file.ends_with("/Dockerfile");
    let file = file.strip_suffix("/Dockerfile").unwrap_or(&file).to_owned();
    let mut out = if file.starts_with(&directory) && file.len() > directory.len() {
        // Below the directory: from its own name on.
        file[directory.rfind('/').map_or(0, |at| at + 1)..].to_owned()
    } else {
        let whole = if file.is_empty() { &directory } else { &file };
        match whole.rsplit_once('/') {
            Some((above, last)) if !is_usual => format!("{}/{last}", path::base(above)),
            Some((_, last)) => last.to_owned(),
            None => whole.clone(),
        }
    };
    if let Some(context) = context {
        context.clone_into(&mut out);
    }
    if let Some(target) = attr("target") {
        out = if out.is_empty() { target.to_owned() } else { format!("{out} ({target})") };
    }
    match source {
        Some(source) if out.is_empty() => source.to_owned(),
        _ => out,
    }
}

/// How long something took: `1.5s`, `2m  3s`.
pub(super) fn duration(time: Duration) -> String {
    let seconds = time.as_secs();
    match seconds {
        0..60 => format!("{:.1}s", time.as_secs_f64()),
        _ => format!("{}m {:2}s", seconds / 60, seconds % 60),
    }
}

/// How long ago something was, as Docker says it.
pub(super) fn ago(time: Duration) -> String {
    let seconds = time.as_secs();
    let (minutes, hours) = (seconds / 60, (seconds + 1800) / 3600);
    let text = match (seconds, minutes, hours) {
        (0, ..) => "Less than a second".to_owned(),
        (1, ..) => "1 second".to_owned(),
        (..60, ..) => format!("{seconds} seconds"),
        (_, 1, _) => "About a minute".to_owned(),
        (_, ..60, _) => format!("{minutes} minutes"),
        (_, _, 1) => "About an hour".to_owned(),
        (_, _, ..48) => format!("{hours} hours"),
        (_, _, ..336) => format!("{} days", hours / 24),
        (_, _, ..1440) => format!("{} weeks", hours / 24 / 7),
        (_, _, ..17520) => format!("{} months", hours / 24 / 30),
        _ => format!("{} years", hours / 24 / 365),
    };
    text + " ago"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conditions_are_checked_and_translated() {
        for (text, want) in [
            ("status=error", "status==error"),
            ("status!=running", "status!=running"),
            ("ref=a.b", r"ref~=a\.b"),
            ("repository=https://x/y.git", r"repository~=https://x/y\.git"),
            ("startedAt>=1h", "startedAt>=1h"),
            ("completedAt<2026-01-02T03:04:05Z", "completedAt<2026-01-02T03:04:05Z"),
            ("duration>10s", "duration>10s"),
        ] {
            assert_eq!(condition(text).expect(text), want);
        }
        for (text, why) in [
            ("status", "invalid filter"),
            ("status>error", "expected = or !="),
            ("duration=10s", "expected <=, <, >= or >"),
            ("duration>ten", "invalid duration"),
            ("startedAt<yesterday", "invalid time"),
            ("size>1", "unsupported filter"),
        ] {
            let refused = condition(text).expect_err(text);
            assert!(refused.message().contains(why), "{text}: {refused}");
            assert!(refused.hints().next().is_some());
        }
        let two = ["a==b".to_owned(), "c==d,\"e\"".to_owned()];
        assert_eq!(all(&two), [r#"a==b,"c==d,""e""""#]);
        assert!(all(&[]).is_empty());
    }

    #[test]
    fn builds_are_named_by_id_or_from_the_latest() {
        let shown = |text| match named(text) {
            Ok(Named::Id(id)) => id.to_owned(),
            Ok(Named::Before(n)) => format!("-{n}"),
            Err(e) => e.message().to_owned(),
        };
        assert_eq!(shown(""), "-0");
        assert_eq!(shown("^2"), "-2");
        assert_eq!(shown("builder/node/abc"), "abc");
        assert_eq!(shown("abc"), "abc");
        assert_eq!(shown("^x"), "invalid offset \"^x\"");
    }

    #[test]
    fn names_say_what_was_built() {
        let check = |attrs: &[(&str, &str)], state: Option<(&str, &str)>, want: &str| {
            let attrs = attrs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
            let state = state.map(|(local, file)| BuildState {
                local_path: local.to_owned(),
                dockerfile_path: file.to_owned(),
                ..BuildState::default()
            });
            assert_eq!(name(&attrs, state.as_ref()), want);
        };
        check(&[("build-arg:BUILDKIT_BUILD_NAME", "mine"), ("target", "x")], None, "mine");
        check(&[("context", "https://x/y.git"), ("target", "x")], None, "https://x/y.git (x)");
        check(&[("target", "x")], None, "x");
        check(&[("vcs:localdir:context", "sub")], None, "sub");
        check(&[("vcs:source", "https://x/y.git")], None, "https://x/y.git");
        check(&[], Some(("/home/me/app", "/home/me/app/Dockerfile")), "app");
        check(&[], Some(("/home/me/app", "/home/me/app/sub/x.Dockerfile")), "app/sub/x.Dockerfile");
        check(&[], Some(("/home/me/app", "/etc/files/x.Dockerfile")), "files/x.Dockerfile");
        check(&[("target", "t")], Some(("/home/me/app", "")), "app (t)");
        check(&[], None, "");
    }

    #[test]
    fn times_are_said_as_docker_says_them() {
        let at = Duration::from_secs;
        assert_eq!(duration(Duration::from_millis(1540)), "1.5s");
        assert_eq!(duration(at(123)), "2m  3s");
        for (seconds, want) in [
            (0, "Less than a second ago"),
            (1, "1 second ago"),
            (59, "59 seconds ago"),
            (61, "About a minute ago"),
            (600, "10 minutes ago"),
            (3599, "59 minutes ago"),
            (3600, "About an hour ago"),
            (7200, "2 hours ago"),
            (3 * 86400, "3 days ago"),
            (21 * 86400, "3 weeks ago"),
            (90 * 86400, "3 months ago"),
            (800 * 86400, "2 years ago"),
        ] {
            assert_eq!(ago(at(seconds)), want, "{seconds}");
        }
    }
}
