//! What happens in a build, as the daemon reports it (rows `ctl.status.*`). Serializes as Go's
//! client prints it, one event per line.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::{Engine, engine::general_purpose::STANDARD};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};
use shipway_fault::{Position, SourceFile, Span};
use shipway_oci::timestamp;
use shipway_proto::{moby::buildkit::v1 as wire, pb};

/// A moment; RFC 3339 in JSON.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Time(pub SystemTime);

impl Time {
    /// 1970, which stands for times that are not set.
    pub fn epoch() -> Self {
        Self(UNIX_EPOCH)
    }

    /// Now.
    pub fn now() -> Self {
        Self(SystemTime::now())
    }

    /// How long after `earlier` this is; nothing if it is before it.
    pub fn since(self, earlier: Self) -> Duration {
        self.0.duration_since(earlier.0).unwrap_or_default()
    }
}

impl From<prost_types::Timestamp> for Time {
    fn from(t: prost_types::Timestamp) -> Self {
        // Times before 1970 or beyond any calendar come from broken peers and must not panic.
        let seconds = u64::try_from(t.seconds).unwrap_or(0).min(1 << 40);
        let nanos = u32::try_from(t.nanos).unwrap_or(0).min(999_999_999);
        Self(UNIX_EPOCH + Duration::new(seconds, nanos))
    }
}

impl Serialize for Time {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&timestamp::format(self.0))
    }
}

impl<'de> Deserialize<'de> for Time {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        timestamp::parse(&text)
            .map(Time)
            .ok_or_else(|| D::Error::custom(format!("{text:?} is not a time")))
    }
}

/// Go prints bytes as base64.
mod bytes_as_text {
    use super::*;

    pub(super) fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&STANDARD.encode(bytes))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Vec<u8>, D::Error> {
        STANDARD.decode(String::deserialize(deserializer)?).map_err(D::Error::custom)
    }
}

mod list_of_bytes_as_text {
    use super::*;

    pub(super) fn serialize<S: Serializer>(
        list: &[Vec<u8>],
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(list.iter().map(|bytes| STANDARD.encode(bytes)))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Vec<Vec<u8>>, D::Error> {
        let texts = Vec::<String>::deserialize(deserializer)?;
        texts.iter().map(|text| STANDARD.decode(text).map_err(D::Error::custom)).collect()
    }
}

fn is_zero(n: &i64) -> bool {
    *n == 0
}

fn is_zero_32(n: &i32) -> bool {
    *n == 0
}

fn is_false(b: &bool) -> bool {
    !*b
}

/// Vertices shown as one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProgressGroup {
    /// Which group.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub id: String,
    /// What to call it.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub name: String,
    /// Whether the group shows only once a stronger member has started.
    #[serde(default, skip_serializing_if = "is_false")]
    pub weak: bool,
}

/// Why the cache had no result for a step. Other daemons than ours say nothing of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct CacheMiss {
    /// `ignored`: the build wants no cache for the step or for `inputs`; `uncacheable`: what the
    /// step or `inputs` come to is not stored; `gone`: the result was pruned or lost; `changed`:
    /// the latest result of such a step was made of something else; `new`: nothing like it is
    /// known.
    pub reason: String,
    /// Names of the inputs that are the reason.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub inputs: Vec<String>,
    /// Names of the inputs in which other files are read.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub contents: Vec<String>,
    /// Whether the step itself is another.
    #[serde(skip_serializing_if = "is_false")]
    pub operation: bool,
    /// What of it, such as `env VERSION`, as far as that is known.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub parts: Vec<String>,
}

/// State of a step.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Vertex {
    /// Its digest.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub digest: String,
    /// What it needs.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub inputs: Vec<String>,
    /// What to call it.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub name: String,
    /// When it started.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub started: Option<Time>,
    /// When it ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub completed: Option<Time>,
    /// Whether the cache had it.
    #[serde(skip_serializing_if = "is_false")]
    pub cached: bool,
    /// Why it failed.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub error: String,
    /// What it is shown as a part of.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub progress_group: Option<ProgressGroup>,
    /// Why it ran.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cache_miss: Option<CacheMiss>,
}

/// A counter within a step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VertexStatus {
    /// What it counts.
    pub id: String,
    /// The step.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub vertex: String,
    /// Its name; usually empty.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub name: String,
    /// To do in all, or 0.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub total: i64,
    /// Done.
    #[serde(default)]
    pub current: i64,
    /// When it was said.
    pub timestamp: Time,
    /// When it started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started: Option<Time>,
    /// When it ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub completed: Option<Time>,
}

/// Output of a step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Log {
    /// The step.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub vertex: String,
    /// 1 for its output, 2 for its errors.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub stream: i64,
    /// The bytes.
    #[serde(with = "bytes_as_text")]
    pub data: Vec<u8>,
    /// When it came.
    pub timestamp: Time,
}

/// A text that lines can be drawn from.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct SourceText {
    /// Its name.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub filename: String,
    /// The whole text.
    #[serde(with = "bytes_as_text", skip_serializing_if = "Vec::is_empty")]
    pub data: Vec<u8>,
    /// Its language.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub language: String,
}

/// A place in a text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Place {
    /// Line, from 1.
    #[serde(skip_serializing_if = "is_zero_32")]
    pub line: i32,
    /// Character, from 0.
    #[serde(skip_serializing_if = "is_zero_32")]
    pub character: i32,
}

/// A stretch of a text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Lines {
    /// First place.
    pub start: Place,
    /// Last place.
    pub end: Place,
}

/// A warning.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Warning {
    /// The step it belongs to.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub vertex: String,
    /// Severity.
    #[serde(skip_serializing_if = "is_zero")]
    pub level: i64,
    /// One line.
    #[serde(with = "bytes_as_text", skip_serializing_if = "Vec::is_empty")]
    pub short: Vec<u8>,
    /// More lines.
    #[serde(with = "list_of_bytes_as_text", skip_serializing_if = "Vec::is_empty")]
    pub detail: Vec<Vec<u8>>,
    /// Where to read more.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub url: String,
    /// The text it is about.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source_info: Option<SourceText>,
    /// Where in it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub range: Vec<Lines>,
}

impl Lines {
    /// The first line, from 1.
    pub fn first_line(&self) -> i32 {
        self.start.line
    }
}

impl Warning {
    /// The text that the warning is about.
    pub fn source_file(&self) -> Option<SourceFile> {
        let SourceText { filename, data, language } = self.source_info.clone()?;
        Some(SourceFile { filename, language, data, definition: None })
    }

    /// The places in the text that the warning is about.
    pub fn spans(&self) -> Vec<Span> {
        let position = |p: Place| Position { line: p.line, character: p.character };
        self.range.iter().map(|r| Span { start: position(r.start), end: position(r.end) }).collect()
    }
}

/// One event of a build.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Status {
    /// Steps whose state changed.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub vertexes: Vec<Vertex>,
    /// Counters that moved.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub statuses: Vec<VertexStatus>,
    /// Output.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub logs: Vec<Log>,
    /// Warnings.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<Warning>,
}

fn vertex(v: wire::Vertex) -> Vertex {
    Vertex {
        digest: v.digest,
        inputs: v.inputs,
        name: v.name,
        started: v.started.map(Time::from),
        completed: v.completed.map(Time::from),
        cached: v.cached,
        error: v.error,
        progress_group: v.progress_group.map(|g| ProgressGroup {
            id: g.id,
            name: g.name,
            weak: g.weak,
        }),
        cache_miss: v.shipway_cache_miss.map(|m| CacheMiss {
            reason: m.reason,
            inputs: m.inputs,
            contents: m.contents,
            operation: m.operation,
            parts: m.parts,
        }),
    }
}

fn counter(s: wire::VertexStatus) -> VertexStatus {
    VertexStatus {
        id: s.id,
        vertex: s.vertex,
        name: s.name,
        total: s.total,
        current: s.current,
        timestamp: s.timestamp.map_or_else(Time::epoch, Time::from),
        started: s.started.map(Time::from),
        completed: s.completed.map(Time::from),
    }
}

fn log(l: wire::VertexLog) -> Log {
    Log {
        vertex: l.vertex,
        stream: l.stream,
        data: l.msg,
        timestamp: l.timestamp.map_or_else(Time::epoch, Time::from),
    }
}

fn lines(range: &pb::Range) -> Lines {
    let place = |p: Option<pb::Position>| {
        p.map_or_else(Place::default, |p| Place { line: p.line, character: p.character })
    };
    Lines { start: place(range.start), end: place(range.end) }
}

fn warning(w: wire::VertexWarning) -> Warning {
    Warning {
        vertex: w.vertex,
        level: w.level,
        short: w.short,
        detail: w.detail,
        url: w.url,
        source_info: w.info.map(|i| SourceText {
            filename: i.filename,
            data: i.data,
            language: i.language,
        }),
        range: w.ranges.iter().map(lines).collect(),
    }
}

impl From<wire::StatusResponse> for Status {
    fn from(r: wire::StatusResponse) -> Self {
        Self {
            vertexes: r.vertexes.into_iter().map(vertex).collect(),
            statuses: r.statuses.into_iter().map(counter).collect(),
            logs: r.logs.into_iter().map(log).collect(),
            warnings: r.warnings.into_iter().map(warning).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_read_and_print_as_go_does() {
        let line = r#"{"vertexes":[{"digest":"sha256:a","inputs":["sha256:b"],"name":"[1/2] RUN x","started":"2026-01-02T03:04:05.5Z","cached":true,"progressGroup":{"id":"g","weak":true}}],"statuses":[{"id":"extract","vertex":"sha256:a","total":7,"current":0,"timestamp":"2026-01-02T03:04:05Z"}],"logs":[{"vertex":"sha256:a","stream":1,"data":"aGkK","timestamp":"2026-01-02T03:04:06.123456789Z"}],"warnings":[{"vertex":"sha256:a","level":1,"short":"dw==","detail":["ZA=="],"sourceInfo":{"filename":"Dockerfile","data":"Rg=="},"range":[{"start":{"line":1},"end":{"line":1,"character":3}}]}]}"#;
        let status: Status = serde_json::from_str(line).expect("reads");
        assert_eq!(status.logs[0].data, b"hi\n");
        assert_eq!(serde_json::to_string(&status).expect("prints"), line);
    }
}
