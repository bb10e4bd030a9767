//! Tracing for what runs in a step (row `exec.otel`): the step's own context and a socket of the
//! daemon's that takes spans.

use shipway_executor::{ExecMount, MountSource};
use std::path::Path;

/// Where steps find the socket.
const SOCKET: &str = "/dev/otel-grpc.sock";

/// Adds to the environment of a step what programs look at, unless it is there, and gives the mount
/// of the socket; nothing where there is no socket, or where the build is in no trace.
pub(super) fn add(socket: Option<&Path>, env: &mut Vec<String>) -> Option<ExecMount> {
    let socket = socket?;
    let context = shipway_telemetry::environment();
    (!context.is_empty()).then(|| {
        fill(context, env);
        ExecMount {
            target: SOCKET.to_owned(),
            source: MountSource::Host(socket.to_owned()),
            read_only: false,
        }
    })
}

fn fill(context: Vec<String>, env: &mut Vec<String>) {
    let exporter = [
        "OTEL_TRACES_EXPORTER=otlp".to_owned(),
        format!("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT=unix://{SOCKET}"),
        "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL=grpc".to_owned(),
    ];
    for variable in exporter.into_iter().chain(context) {
        let name = variable.split_inclusive('=').next().unwrap_or_default();
        if !env.iter().any(|known| known.starts_with(name)) {
            env.push(variable);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_step_says_itself_stays() {
        let mut env = vec!["OTEL_TRACES_EXPORTER=none".to_owned(), "TRACEPARENTS=x".to_owned()];
        fill(vec!["TRACEPARENT=00-1".to_owned()], &mut env);
        let expected = [
            "OTEL_TRACES_EXPORTER=none",
            "TRACEPARENTS=x",
            "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT=unix:///dev/otel-grpc.sock",
            "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL=grpc",
            "TRACEPARENT=00-1",
        ];
        assert_eq!(env, expected);
    }

    #[test]
    fn a_build_without_a_trace_gets_nothing() {
        let mut env = Vec::new();
        assert!(add(Some(Path::new("/x")), &mut env).is_none() && env.is_empty());
    }
}
