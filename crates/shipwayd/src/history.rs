//! Build history on the wire (rows `ctl.hist.*`).

use crate::{config::duration, filter};
use prost::Message as _;
use shipway_attest::slsa;
use shipway_fault::{Fault, Result};
use shipway_grpc::status_of;
use shipway_history::{
    History, HistoryEventKind, HistoryRecord, HistoryStatus, HistorySummary, LogFile,
};
use shipway_identity::Caller;
use shipway_oci::{Descriptor, media, timestamp};
use shipway_proto::{google::rpc, moby::buildkit::v1 as wire};
use shipway_telemetry::stub;
use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};
use tokio::sync::{broadcast::error::RecvError, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

/// Media type of a build's log (row `so.h.status`).
const LOG: &str = "application/vnd.buildkit.status.v0";
/// Media type of a build's error, spelled as clients know it (row `so.h.err`).
const FAILURE: &str = "application/vnd.googeapis.google.rpc.status+proto";

fn descriptor(d: &Descriptor) -> wire::Descriptor {
    wire::Descriptor {
        media_type: d.media_type.clone(),
        digest: d.digest.to_string(),
        size: d.size as i64,
        annotations: d.annotations.clone(),
    }
}

/// What a build wrote; the first result stands in a field of its own as well, for clients from
/// before there were several.
fn result(written: &BTreeMap<usize, Descriptor>) -> wire::BuildResultInfo {
    wire::BuildResultInfo {
        result_deprecated: written.values().next().map(descriptor),
        results: written.iter().map(|(i, d)| (*i as i64, descriptor(d))).collect(),
        attestations: Vec::new(),
    }
}

fn of_file(file: &LogFile, media_type: &str) -> wire::Descriptor {
    wire::Descriptor {
        media_type: media_type.into(),
        digest: file.digest.to_string(),
        size: file.size as i64,
        ..Default::default()
    }
}

fn provenance(file: &LogFile) -> wire::Descriptor {
    let annotations = [("in-toto.io/predicate-type".to_owned(), slsa::V1.to_owned())].into();
    wire::Descriptor { annotations, ..of_file(file, media::IN_TOTO) }
}

/// The results of a finished build: of the build itself, and by platform.
fn results(
    r: &HistoryRecord,
) -> (Option<wire::BuildResultInfo>, BTreeMap<String, wire::BuildResultInfo>) {
    if r.completed.is_none() {
        return Default::default();
    }
    let (mut own, mut platforms) =
        (result(&r.written), BTreeMap::<String, wire::BuildResultInfo>::new());
    for (platform, file) in &r.provenance {
        let info = match platform {
            None => &mut own,
            Some(id) => platforms.entry(id.clone()).or_default(),
        };
        info.attestations.push(provenance(file));
    }
    (Some(own), platforms)
}

/// A build's error in full (row `so.h.err`).
pub fn fault_blob(fault: &Fault) -> Vec<u8> {
    let status = status_of(fault);
    match status.details() {
        [] => rpc::Status {
            code: status.code() as i32,
            message: status.message().to_owned(),
            details: Vec::new(),
        }
        .encode_to_vec(),
        // What travels as details is the whole status.
        whole => whole.to_vec(),
    }
}

fn record(r: &HistoryRecord) -> wire::BuildHistoryRecord {
    let error = r.error.as_ref().map(|f| {
        let status = status_of(f);
        // Details are in the file (row `so.h.err`).
        rpc::Status {
            code: status.code() as i32,
            message: status.message().to_owned(),
            details: Vec::new(),
        }
    });
    let (own, platforms) = results(r);
    wire::BuildHistoryRecord {
        r#ref: r.id.clone(),
        frontend: r.frontend.clone(),
        frontend_attrs: r.options.clone(),
        exporters: r
            .exporters
            .iter()
            .map(|e| wire::Exporter { r#type: e.kind.clone(), attrs: e.attrs.clone() })
            .collect(),
        error,
        external_error: r.failure.as_ref().map(|file| of_file(file, FAILURE)),
        created_at: Some(r.created.into()),
        completed_at: r.completed.map(Into::into),
        logs: r.log.as_ref().map(|file| of_file(file, LOG)),
        trace: r.trace.as_ref().map(|file| of_file(file, stub::MEDIA_TYPE)),
        exporter_response: r.response.clone(),
        result: own,
        results: platforms,
        generation: r.generation,
        pinned: r.pinned,
        num_cached_steps: r.steps.cached,
        num_total_steps: r.steps.total,
        num_completed_steps: r.steps.completed,
        num_warnings: r.steps.warnings,
    }
}

/// Which builds a listener wants to hear of (rows `ctl.hist.listen`, `so.h.filter`): containerd's
/// filters on some fields, and comparisons of times.
struct Wanted {
    times: Vec<TimeTest>,
    others: filter::Filter,
}

/// Fields that containerd's filters work on.
const FIELDS: &[&str] = &["ref", "status", "repository"];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Operator {
    AtLeast,
    AtMost,
    More,
    Less,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum TimeTest {
    /// In whole seconds.
    Started(Operator, i64),
    Completed(Operator, i64),
    /// In nanoseconds.
    Took(Operator, i128),
}

impl Operator {
    fn holds<T: Ord>(self, value: T, than: T) -> bool {
        match self {
            Self::AtLeast => value >= than,
            Self::AtMost => value <= than,
            Self::More => value > than,
            Self::Less => value < than,
        }
    }
}

fn seconds(time: SystemTime) -> i64 {
    match time.duration_since(UNIX_EPOCH) {
        Ok(since) => i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
        Err(before) => i64::try_from(before.duration().as_secs()).map_or(i64::MIN, |s| -s),
    }
}

impl TimeTest {
    /// The comparison that `part` is; `None` if it is none of a time.
    fn parse(part: &str, now: SystemTime) -> Result<Option<Self>> {
        let Some(end) = filter::field_length(part) else { return Ok(None) };
        let (field, rest) = (&part[..end], part[end..].trim_start());
        let operator = filter::operator(rest);
        let value = rest[operator.len()..].trim();
        let operator = match operator {
            ">=" => Operator::AtLeast,
            "<=" => Operator::AtMost,
            ">" => Operator::More,
            "<" => Operator::Less,
            _ => return Ok(None),
        };
        // A duration is so long ago.
        let time = || match duration(value) {
            Some(ago) => Ok(seconds(now) - i64::try_from(ago.as_secs()).unwrap_or(i64::MAX)),
            None => timestamp::parse(value).map(seconds).ok_or_else(|| {
                Fault::invalid(format!("invalid time {value}"))
                    .hint("want 48h, or 2006-01-02T15:04:05Z")
            }),
        };
        Ok(Some(match field {
            "startedAt" => Self::Started(operator, time()?),
            "completedAt" => Self::Completed(operator, time()?),
            "duration" => {
                let least = duration(value).ok_or_else(|| {
                    Fault::invalid(format!("invalid duration {value}"))
                        .hint("want for example 90s or 1h30m")
                })?;
                Self::Took(operator, i128::try_from(least.as_nanos()).unwrap_or(i128::MAX))
            }
            _ => return Ok(None),
        }))
    }

    fn holds(self, s: &HistorySummary) -> bool {
        match self {
            Self::Started(operator, than) => operator.holds(seconds(s.created), than),
            Self::Completed(operator, than) => {
                s.completed.is_some_and(|c| operator.holds(seconds(c), than))
            }
            Self::Took(operator, than) => {
                let took =
                    s.completed.map(|c| c.duration_since(s.created).unwrap_or_default().as_nanos());
                took.is_some_and(|took| {
                    operator.holds(i128::try_from(took).unwrap_or(i128::MAX), than)
                })
            }
        }
    }
}

impl Wanted {
    fn parse(text: &str, now: SystemTime) -> Result<Self> {
        let (mut times, mut others) = (Vec::new(), Vec::new());
        for part in filter::split(text)? {
            match TimeTest::parse(part.trim(), now)? {
                Some(test) => times.push(test),
                None => others.push(part),
            }
        }
        Ok(Self { times, others: filter::Filter::parse(&others.join(","), FIELDS)? })
    }

    fn parse_all(texts: &[String], now: SystemTime) -> Result<Vec<Self>> {
        filter::check_count(texts)?;
        texts.iter().map(|t| Self::parse(t, now)).collect()
    }

    fn matches(&self, s: &HistorySummary) -> bool {
        self.times.iter().all(|t| t.holds(s)) && self.others.matches(&|name| field(s, name))
    }
}

fn field(s: &HistorySummary, name: &str) -> Option<String> {
    match name {
        "ref" => Some(s.id.clone()),
        "status" => Some(
            match s.status {
                HistoryStatus::Running => "running",
                HistoryStatus::Completed => "completed",
                HistoryStatus::Error => "error",
                HistoryStatus::Canceled => "canceled",
            }
            .into(),
        ),
        "repository" => s.repository.clone(),
        _ => None,
    }
}

/// The builds there are that a listener hears of first: running ones, then those that ended, the
/// newest first where their number is limited.
fn existing(
    all: Vec<Arc<HistorySummary>>,
    request: &wire::BuildHistoryRequest,
    wanted: &[Wanted],
    caller: &Caller,
) -> Vec<Arc<HistorySummary>> {
    let is_wanted = |s: &Arc<HistorySummary>| {
        caller.sees(s.owner.as_deref())
            && (request.r#ref.is_empty() || s.id == request.r#ref)
            && (wanted.is_empty() || wanted.iter().any(|w| w.matches(s)))
    };
    let (mut running, mut ended): (Vec<_>, Vec<_>) =
        all.into_iter().filter(is_wanted).partition(|s| s.completed.is_none());
    if request.active_only {
        ended.clear();
    }
    if request.limit > 0 {
        ended.sort_by_key(|s| std::cmp::Reverse(s.created));
        ended.truncate(usize::try_from(request.limit).unwrap_or(usize::MAX));
    }
    running.append(&mut ended);
    running
}

/// A record, read without holding up others.
async fn load(history: &Arc<History>, id: &str) -> Option<Arc<HistoryRecord>> {
    let (history, id) = (history.clone(), id.to_owned());
    let get = move || Ok(history.get(&id));
    shipway_task::blocking("read a record of the history", get).await.ok().flatten()
}

/// What a listener is sent of a change; `None` where there is nothing to say any more.
async fn event(
    history: &Arc<History>,
    kind: HistoryEventKind,
    id: &str,
) -> Option<wire::BuildHistoryEvent> {
    let (kind, record) = match kind {
        HistoryEventKind::Deleted => (
            wire::BuildHistoryEventType::Deleted,
            wire::BuildHistoryRecord { r#ref: id.to_owned(), ..Default::default() },
        ),
        HistoryEventKind::Completed => {
            (wire::BuildHistoryEventType::Complete, record(&*load(history, id).await?))
        }
        // One that ended meanwhile is reported next.
        HistoryEventKind::Started => (
            wire::BuildHistoryEventType::Started,
            record(&*load(history, id).await.filter(|r| r.completed.is_none())?),
        ),
    };
    Some(wire::BuildHistoryEvent { r#type: kind as i32, record: Some(record) })
}

/// The stream of one listener, who hears of builds that `caller` may see.
pub fn listen(
    history: Arc<History>,
    request: wire::BuildHistoryRequest,
    caller: Caller,
) -> Result<ReceiverStream<std::result::Result<wire::BuildHistoryEvent, Status>>> {
    if request.limit < 0 {
        return Err(Fault::invalid(format!("invalid limit {}", request.limit)));
    }
    let wanted = Wanted::parse_all(&request.filter, SystemTime::now())?;
    let (all, mut changes) = history.listen();
    let first = existing(all, &request, &wanted, &caller);
    let (tx, rx) = mpsc::channel(8);
    shipway_task::spawn("send the history", async move {
        for summary in first {
            // As it stands now; one that was forgotten since then is none.
            let Some(there) = load(&history, &summary.id).await else { continue };
            let kind = if there.completed.is_some() {
                wire::BuildHistoryEventType::Complete
            } else {
                wire::BuildHistoryEventType::Started
            };
            let message =
                wire::BuildHistoryEvent { r#type: kind as i32, record: Some(record(&there)) };
            if tx.send(Ok(message)).await.is_err() {
                return;
            }
        }
        if request.early_exit {
            return;
        }
        loop {
            let change = tokio::select! {
                change = changes.recv() => change,
                () = tx.closed() => return,
            };
            let change = match change {
                Ok(change) => change,
                // A listener that fell behind misses events in the middle, as a slow client of any
                // log does.
                Err(RecvError::Lagged(_)) => continue,
                Err(RecvError::Closed) => return,
            };
            // Filters choose among what there is; of what happens from now on a listener hears
            // everything, as from BuildKit.
            let other = !request.r#ref.is_empty() && change.summary.id != request.r#ref;
            if other || !caller.sees(change.summary.owner.as_deref()) {
                continue;
            }
            let Some(message) = event(&history, change.kind, &change.summary.id).await else {
                continue;
            };
            if tx.send(Ok(message)).await.is_err() {
                return;
            }
        }
    });
    Ok(ReceiverStream::new(rx))
}

#[cfg(test)]
mod tests {
    use super::*;
    use shipway_fault::Detail;
    use std::time::Duration;

    #[test]
    fn errors_are_kept_with_their_details() {
        let decoded = |fault: &Fault| rpc::Status::decode(&fault_blob(fault)[..]).unwrap();
        let fault = Fault::not_found("no such thing").context("step");
        let plain = decoded(&fault);
        assert_eq!(
            (plain.code, plain.message.as_str(), plain.details.len()),
            (5, "step: no such thing", 0)
        );
        let full = decoded(&fault.detail(Detail::Exit(3)));
        assert_eq!(
            (full.code, full.message.as_str(), full.details.len()),
            (5, "step: no such thing", 1)
        );
    }

    fn summary(id: &str, created: u64, took: Option<u64>) -> Arc<HistorySummary> {
        let created = UNIX_EPOCH + Duration::from_secs(created);
        Arc::new(HistorySummary {
            id: id.into(),
            created,
            completed: took.map(|t| created + Duration::from_secs(t)),
            status: if took.is_some() { HistoryStatus::Completed } else { HistoryStatus::Running },
            repository: Some("https://example.org/a.git".into()),
            ..HistorySummary::default()
        })
    }

    #[test]
    fn times_are_compared_and_what_is_not_understood_is_an_error() {
        let now = UNIX_EPOCH + Duration::from_secs(10_000);
        let (old, young) = (summary("old", 1000, Some(100)), summary("young", 9000, Some(10)));
        let chosen = |filter: &str| {
            let wanted = Wanted::parse_all(&[filter.to_owned()], now)
                .unwrap_or_else(|e| panic!("{filter}: {e}"));
            [&old, &young]
                .into_iter()
                .filter(|s| wanted[0].matches(s))
                .map(|s| s.id.as_str())
                .collect::<Vec<_>>()
                .join(" ")
        };
        for (filter, ids) in [
            ("startedAt>=1h", "young"),
            ("startedAt<1h", "old"),
            ("startedAt>1970-01-01T02:29:59Z", "young"),
            ("startedAt>1970-01-01T02:30:00Z", ""),
            ("completedAt<=1970-01-01T00:18:20Z", "old"),
            ("duration>=100s", "old"),
            ("duration<1m", "young"),
            ("duration>1s,startedAt>=1h", "young"),
            ("duration>1s,ref~=^o", "old"),
            ("status==completed", "old young"),
            ("repository~=a[.]git$,ref!=old", "young"),
            ("status==error", ""),
        ] {
            assert_eq!(chosen(filter), ids, "{filter}");
        }
        for (filter, says) in [
            ("startedAt>=yesterday", "invalid time yesterday"),
            ("duration>2006-01-02T15:04:05Z", "invalid duration"),
            ("startedAt==1h", "no field"),
            ("size>=1", "unsupported operator"),
            ("name==x", "no field"),
        ] {
            let fault =
                Wanted::parse_all(&[filter.to_owned()], now).map(drop).unwrap_err().to_string();
            assert!(fault.contains(says), "{filter}: {fault}");
        }
    }

    #[test]
    fn running_builds_come_first_and_a_limit_takes_the_newest() {
        let all = || {
            vec![
                summary("a", 1, Some(1)),
                summary("run", 2, None),
                summary("b", 3, Some(1)),
                summary("c", 4, Some(1)),
            ]
        };
        let ids = |request: wire::BuildHistoryRequest| {
            let wanted = Wanted::parse_all(&request.filter, SystemTime::now()).unwrap();
            existing(all(), &request, &wanted, &Caller::unrestricted())
                .iter()
                .map(|s| s.id.clone())
                .collect::<Vec<_>>()
        };
        assert_eq!(ids(wire::BuildHistoryRequest::default()), ["run", "a", "b", "c"]);
        assert_eq!(
            ids(wire::BuildHistoryRequest { limit: 2, ..Default::default() }),
            ["run", "c", "b"]
        );
        assert_eq!(
            ids(wire::BuildHistoryRequest { active_only: true, ..Default::default() }),
            ["run"]
        );
        assert_eq!(
            ids(wire::BuildHistoryRequest { r#ref: "b".into(), ..Default::default() }),
            ["b"]
        );
        assert_eq!(
            ids(wire::BuildHistoryRequest {
                filter: vec!["ref==a".into(), "ref==c".into()],
                ..Default::default()
            }),
            ["a", "c"]
        );
    }
}
