//! Faults to and from gRPC status (rows `net.errcodec`, `net.errjson`, `net.errunknown`).
//!
//! Hints have no place in BuildKit's protocol, so they travel as last lines of the message, one
//! `hint: …` each: existing clients print them under the error, and [`fault_of`] takes them off
//! again.

use std::sync::OnceLock;

use bytes::Bytes;
use prost::Message;
use shipway_fault::{Code, Detail, Fault};
use shipway_proto::google::rpc;
use tonic::Status;

use crate::details::{self, Program};

const HINT: &str = "\nhint: ";
/// A status travels in headers; beyond this, details are left out rather than failing the answer.
const MAX_DETAILS: usize = 2 << 20;
/// A peer's details beyond this many are dropped.
const MAX_DETAIL_COUNT: usize = 256;

static PROGRAM: OnceLock<Program> = OnceLock::new();

/// From now on errors say where in `program` they came from; for the start of a daemon.
pub fn tell_stacks(program: Program) {
    let _ = PROGRAM.set(program);
}

/// The status that carries `fault` to a client, with its typed details.
pub fn status_of(fault: &Fault) -> Status {
    let mut message = fault.to_string();
    for hint in fault.hints() {
        message.push_str(HINT);
        message.push_str(&hint.replace('\n', " "));
    }
    let code = tonic::Code::from_i32(fault.code() as i32);
    let mut left = MAX_DETAILS;
    let mut any = Vec::new();
    let stack = PROGRAM.get().map(|program| details::stack(fault, program));
    for encoded in stack.into_iter().chain(fault.details().iter().filter_map(details::encode)) {
        let Some(rest) = left.checked_sub(encoded.value.len() + encoded.type_url.len()) else {
            tracing::debug!(
                type_url = encoded.type_url,
                "error detail too large for a status, left out"
            );
            continue;
        };
        left = rest;
        any.push(encoded);
    }
    if any.is_empty() {
        return Status::new(code, message);
    }
    let status = rpc::Status { code: fault.code() as i32, message: message.clone(), details: any };
    Status::with_details(code, message, Bytes::from(status.encode_to_vec()))
}

/// The fault that `status` carries; details of unknown types are kept as [`Detail::Opaque`].
pub fn fault_of(status: &Status) -> Fault {
    let code = Code::from_number(status.code() as i32);
    let mut parts = status.message().split(HINT);
    let message = parts.next().unwrap_or_default().to_owned();
    let mut fault = Fault::new(code, message);
    for hint in parts {
        fault = fault.hint(hint.to_owned());
    }
    match rpc::Status::decode(status.details()) {
        Ok(decoded) => {
            for any in decoded.details.into_iter().take(MAX_DETAIL_COUNT) {
                fault = fault.detail(
                    details::decode(&any)
                        .unwrap_or(Detail::Opaque { type_url: any.type_url, value: any.value }),
                );
            }
        }
        Err(error) => tracing::debug!(%error, "undecodable status details"),
    }
    fault
}

/// The fault of an I/O error that may wrap a status, as errors of a [`crate::Duplex`] do.
pub fn fault_of_io(what: impl std::fmt::Display, error: std::io::Error) -> Fault {
    match error.get_ref().and_then(|e| e.downcast_ref::<Status>()) {
        Some(status) => fault_of(status).context(what.to_string()),
        None => Fault::io(what, error),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use shipway_fault::{Position, SourceFile, Span, Subject};
    use shipway_proto::pb;

    use super::*;

    fn json(fault: Fault) -> Vec<(String, String)> {
        let status = status_of(&fault);
        let decoded = rpc::Status::decode(status.details()).expect("details decode");
        decoded
            .details
            .into_iter()
            .map(|d| (d.type_url, String::from_utf8(d.value).expect("JSON is text")))
            .collect()
    }

    /// The expected texts are what Go's `encoding/json` makes of the same messages.
    #[track_caller]
    fn check(detail: Detail, type_url: &str, expected: &str) {
        let fault = Fault::unknown("boom").detail(detail.clone());
        let got = json(fault.clone());
        assert_eq!(got[0].0, type_url);
        let (a, b): (serde_json::Value, serde_json::Value) = (
            serde_json::from_str(&got[0].1).expect("valid"),
            serde_json::from_str(expected).expect("valid"),
        );
        assert_eq!(a, b);
        assert_eq!(fault_of(&status_of(&fault)).details(), [detail]);
    }

    #[test]
    fn details_are_json_under_buildkits_names() {
        check(
            Detail::Vertex("sha256:ab".into()),
            "github.com/moby/buildkit/errdefs.Vertex+json",
            r#"{"digest":"sha256:ab"}"#,
        );
        check(
            Detail::Frontend { name: "gateway.v0".into(), source: "img".into() },
            "github.com/moby/buildkit/errdefs.Frontend+json",
            r#"{"name":"gateway.v0","source":"img"}"#,
        );
        check(
            Detail::FrontendCap("x".into()),
            "github.com/moby/buildkit/errdefs.FrontendCap+json",
            r#"{"name":"x"}"#,
        );
        check(
            Detail::Subrequest("y".into()),
            "github.com/moby/buildkit/errdefs.Subrequest+json",
            r#"{"name":"y"}"#,
        );
        let feature = Detail::Compatibility { version: 10, feature: "z".into() };
        check(
            feature,
            "github.com/moby/buildkit/errdefs.CompatibilityFeature+json",
            r#"{"version":10,"feature":"z"}"#,
        );
        let missing = shipway_fault::IncompleteMaterial {
            op: "sha256:ab".into(),
            method: "GET".into(),
            uri: "http://h/f".into(),
            reason: "upstream_error".into(),
            ..Default::default()
        };
        check(
            Detail::IncompleteMaterials(vec![missing]),
            "github.com/moby/buildkit/errdefs.ProvenanceMaterialsIncomplete+json",
            r#"{"incomplete":[{"op":"sha256:ab","method":"GET","uri":"http://h/f","reason":"upstream_error"}]}"#,
        );
        check(
            Detail::Exit(7),
            "github.com/moby/buildkit/gatewayapi.ExitMessage+json",
            r#"{"Code":7}"#,
        );
    }

    #[test]
    fn a_source_keeps_its_lines_and_positions() {
        let file = SourceFile {
            filename: "Dockerfile".into(),
            language: "Dockerfile".into(),
            data: b"FROM x\n".to_vec(),
            definition: Some(
                pb::Definition { def: vec![vec![1, 2]], ..Default::default() }.encode_to_vec(),
            ),
        };
        let span = Span {
            start: Position { line: 1, character: 0 },
            end: Position { line: 1, character: 6 },
        };
        check(
            Detail::Source { file: Arc::new(file), spans: vec![span, Span::default()] },
            "github.com/moby/buildkit/errdefs.Source+json",
            r#"{"info":{"filename":"Dockerfile","data":"RlJPTSB4Cg==","definition":{"def":["AQI="]},"language":"Dockerfile"},
               "ranges":[{"start":{"line":1},"end":{"line":1,"character":6}},{"start":{},"end":{}}]}"#,
        );
    }

    #[test]
    fn a_solve_error_is_canonical_protojson() {
        let meta = pb::Meta { args: vec!["sh".into()], ..Default::default() };
        let exec = pb::ExecOp {
            meta: Some(meta),
            mounts: vec![pb::Mount {
                input: -1,
                dest: "/".into(),
                mount_type: pb::MountType::Tmpfs as i32,
                ..Default::default()
            }],
            ..Default::default()
        };
        let op = pb::Op { op: Some(pb::op::Op::Exec(exec)), ..Default::default() };
        check(
            Detail::Solve {
                input_ids: vec!["a".into()],
                mount_ids: vec![],
                op: op.encode_to_vec(),
                subject: Some(Subject::FileAction(2)),
                description: [("llb.customname".to_owned(), "x".to_owned())].into(),
            },
            "github.com/moby/buildkit/errdefs.Solve+json",
            r#"{"inputIDs":["a"],"op":{"exec":{"meta":{"args":["sh"]},"mounts":[{"input":"-1","dest":"/","mountType":"TMPFS"}]}},"file":{"index":"2"},"description":{"llb.customname":"x"}}"#,
        );
    }

    #[test]
    fn unknown_details_pass_through() {
        let detail = Detail::Opaque {
            type_url: "github.com/moby/buildkit/stack.Stack+json".into(),
            value: b"{\"pid\":1}".to_vec(),
        };
        check(detail, "github.com/moby/buildkit/stack.Stack+json", "{\"pid\":1}");
    }

    #[test]
    fn hints_ride_in_the_message() {
        let fault = Fault::not_found("no such image")
            .context("resolve x")
            .hint("check the name")
            .hint("log in");
        let status = status_of(&fault);
        assert_eq!(
            status.message(),
            "resolve x: no such image\nhint: check the name\nhint: log in"
        );
        let back = fault_of(&status);
        assert_eq!(back.to_string(), "resolve x: no such image");
        assert_eq!(back.hints().collect::<Vec<_>>(), ["check the name", "log in"]);
        assert_eq!(back.code(), Code::NotFound);
    }

    #[test]
    fn hostile_details_do_no_harm() {
        for details in [&b"\xff\xff\xff"[..], b"", b"\x1a\x03\x0a\x01x"] {
            let status =
                Status::with_details(tonic::Code::Internal, "m", Bytes::copy_from_slice(details));
            assert_eq!(fault_of(&status).message(), "m");
        }
    }

    #[test]
    fn a_stack_says_where_the_fault_came_from() {
        let line = line!() + 1;
        let fault = Fault::unknown("boom").context("while testing");
        let program = Program {
            command: vec!["shipwayd".into()],
            version: "v1".into(),
            revision: "r".into(),
        };
        let any = details::stack(&fault, &program);
        assert_eq!(any.type_url, "github.com/moby/buildkit/stack.Stack+json");
        let stack: serde_json::Value = serde_json::from_slice(&any.value).expect("valid");
        assert_eq!((&stack["cmdline"][0], &stack["version"]), (&"shipwayd".into(), &"v1".into()));
        let frames = stack["frames"].as_array().expect("frames");
        assert_eq!(frames.len(), 2);
        for frame in frames {
            assert_eq!(
                (&frame["Name"], &frame["Line"]),
                (&"grpc::status".into(), &line.into()),
                "{frame}"
            );
        }
    }
}
