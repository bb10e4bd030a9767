//! What can be seen of a daemon: traces, from its clients to containerd and registries, and
//! metrics.

#![allow(clippy::unwrap_used)]

use parking_lot::Mutex;
use prost::Message as _;
use shipway_integration::{any, build_text};
use shipway_llb::{Definition, ExecDraft, MarshalOptions, State, VertexOptions};
use shipway_oci::Platform;
use shipway_proto::moby::buildkit::v1::{self as api, control_client::ControlClient};
use shipway_telemetry::otlp::{
    ExportTraceServiceRequest, ExportTraceServiceResponse, ResourceSpans, ScopeSpans, Span,
    trace_service_client::TraceServiceClient,
    trace_service_server::{TraceService, TraceServiceServer},
};
use shipway_testkit::{BaseImage, Lab, free_port, wait_for};
use std::{
    collections::{BTreeMap, HashMap},
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{TcpListener, TcpStream},
    sync::Arc,
    time::Duration,
};
use tonic::{Request, Response, Status, metadata::MetadataMap};

/// What must be in no span.
const SECRET: &str = "hunter2";
const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const CALLER: &str = "b7ad6b7169203331";
const BUILD: &str = "traced-build";

type Headers = BTreeMap<String, String>;

/// A collector: what it got, and the headers of the last request.
#[derive(Clone, Default)]
struct Collector(Arc<Mutex<(Vec<ExportTraceServiceRequest>, Headers)>>);

impl Collector {
    fn take(&self, request: ExportTraceServiceRequest, headers: Headers) {
        let mut got = self.0.lock();
        got.0.push(request);
        got.1 = headers;
    }

    /// All spans so far, by their id.
    fn spans(&self) -> HashMap<String, Span> {
        let got = self.0.lock();
        let resources = got.0.iter().flat_map(|r| &r.resource_spans);
        let spans = resources.flat_map(|r| &r.scope_spans).flat_map(|s| &s.spans);
        spans.map(|s| (hex::encode(&s.span_id), s.clone())).collect()
    }

    /// Serves OTLP over HTTP; gives the address.
    fn serve_http(&self) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let collector = self.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let collector = collector.clone();
                std::thread::spawn(move || {
                    let mut reader = BufReader::new(stream.try_clone().unwrap());
                    while let Some((first, headers)) = head(&mut reader) {
                        assert_eq!(first, "POST /v1/traces HTTP/1.1");
                        let mut body = vec![0; headers["content-length"].parse().unwrap()];
                        reader.read_exact(&mut body).unwrap();
                        assert_eq!(headers["content-type"], "application/x-protobuf");
                        collector.take(ExportTraceServiceRequest::decode(&*body).unwrap(), headers);
                        (&stream)
                            .write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
                            .unwrap();
                    }
                });
            }
        });
        address
    }

    /// Serves OTLP over gRPC; gives the address.
    fn serve_grpc(&self) -> String {
        let port = free_port();
        let address = format!("127.0.0.1:{port}");
        let (service, at) = (TraceServiceServer::new(self.clone()), address.parse().unwrap());
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            let server = tonic::transport::Server::builder().add_service(service).serve(at);
            runtime.unwrap().block_on(server).unwrap();
        });
        format!("http://{address}")
    }
}

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let (metadata, _, message) = request.into_parts();
        let headers = metadata.into_headers();
        let text = |(n, v): (&http::HeaderName, &http::HeaderValue)| {
            (n.to_string(), String::from_utf8_lossy(v.as_bytes()).into_owned())
        };
        self.take(message, headers.iter().map(text).collect());
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

/// The first line and the headers of an HTTP message; `None` at the end.
fn head(reader: &mut impl std::io::BufRead) -> Option<(String, Headers)> {
    let mut lines = reader.lines().map_while(Result::ok);
    let first = lines.next()?;
    let header = |line: String| {
        let (name, value) = line.split_once(':').unwrap();
        (name.to_lowercase(), value.trim().to_owned())
    };
    Some((first, lines.take_while(|line| !line.is_empty()).map(header).collect()))
}

/// The first line of a request, and the context it came with.
type Traced = (String, Option<String>);

/// What a registry was asked, and in which traces.
#[derive(Clone, Default)]
struct Asked(Arc<Mutex<Vec<Traced>>>);

impl Asked {
    /// Passes requests on to `upstream`; gives its own address.
    fn before(&self, upstream: String) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let asked = self.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let (asked, upstream) = (asked.clone(), upstream.clone());
                std::thread::spawn(move || {
                    let mut reader = BufReader::new(stream.try_clone().unwrap());
                    let Some((first, mut headers)) = head(&mut reader) else { return };
                    asked.0.lock().push((first.clone(), headers.remove("traceparent")));
                    headers.insert("connection".into(), "close".into());
                    let mut to = TcpStream::connect(&upstream).unwrap();
                    let headers = headers.iter().map(|(n, v)| format!("{n}: {v}\r\n"));
                    write!(to, "{first}\r\n{}\r\n", headers.collect::<String>()).unwrap();
                    let _ = std::io::copy(&mut to, &mut &stream);
                });
            }
        });
        address
    }
}

/// A lab whose registry is asked through `asked`, with a daemon that is yet to be started.
fn lab(asked: &Asked) -> (Lab, String) {
    let mut lab = Lab::on(any());
    lab.start_registry();
    BaseImage::busybox().push(&lab.registry(), "library/busybox", "latest");
    let registry = asked.before(lab.registry());
    lab.configure_daemon(&format!("[registry.\"{registry}\"]\n  http = true\n"));
    (lab, registry)
}

fn definition(registry: &str, script: &str) -> Definition {
    let image = format!("{registry}/library/busybox:latest");
    let base = State::image(&image, "", BTreeMap::new(), Default::default());
    let args = ["sh", "-c", script].map(str::to_owned).to_vec();
    let step = base
        .add_env("TOKEN", SECRET)
        .run(ExecDraft { args, ..ExecDraft::default() }, VertexOptions::named("a step"));
    let options =
        MarshalOptions { platform: Platform::host(), caps: None, local_unique_id: String::new() };
    step.marshal(&options).unwrap()
}

fn in_trace(metadata: &mut MetadataMap) {
    metadata.insert("traceparent", format!("00-{TRACE}-{CALLER}-01").parse().unwrap());
}

/// Builds as a client that traces would; sends a span of its own; waits for the record.
fn traced_build(lab: &Lab, definition: &Definition) -> api::BuildHistoryRecord {
    let work = async {
        let address = lab.daemon_address().parse().unwrap();
        let channel = shipway_grpc::dial(&address, None).await.unwrap();
        let mut control = ControlClient::new(channel.clone());
        let mut solve = Request::new(api::SolveRequest {
            r#ref: BUILD.into(),
            definition: Some(Definition::to_pb(definition)),
            ..Default::default()
        });
        in_trace(solve.metadata_mut());
        control.solve(solve).await.unwrap();
        let span = Span {
            trace_id: hex::decode(TRACE).unwrap(),
            span_id: hex::decode(CALLER).unwrap(),
            name: "a client".into(),
            ..Span::default()
        };
        let scope = ScopeSpans { spans: vec![span], ..ScopeSpans::default() };
        let spans = ResourceSpans { scope_spans: vec![scope], ..ResourceSpans::default() };
        let request = ExportTraceServiceRequest { resource_spans: vec![spans] };
        TraceServiceClient::new(channel).export(request).await.unwrap();
        let finalize = api::UpdateBuildHistoryRequest {
            r#ref: BUILD.into(),
            finalize: true,
            ..Default::default()
        };
        control.update_build_history(finalize).await.unwrap();
        let request = api::BuildHistoryRequest { early_exit: true, ..Default::default() };
        let mut events = control.listen_build_history(request).await.unwrap().into_inner();
        events.message().await.unwrap().unwrap().record.unwrap()
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async { tokio::time::timeout(Duration::from_secs(120), work).await }).unwrap()
}

/// Whether `span` is below the span with the id `above`.
fn is_below(spans: &HashMap<String, Span>, span: &Span, above: &str) -> bool {
    let mut parent = hex::encode(&span.parent_span_id);
    for _ in 0..spans.len() {
        if parent == above {
            return true;
        }
        let Some(next) = spans.get(&parent) else { return false };
        parent = hex::encode(&next.parent_span_id);
    }
    false
}

fn attribute(span: &Span, name: &str) -> String {
    let found = span.attributes.iter().find(|a| a.key == name);
    found.map_or_else(String::new, |a| format!("{:?}", a.value))
}

#[test]
fn a_build_is_one_trace_from_its_client_to_containerd_and_the_registry() {
    for protocol in ["grpc", "http/protobuf"] {
        let (collector, asked) = (Collector::default(), Asked::default());
        let (mut lab, registry) = lab(&asked);
        let endpoint = match protocol {
            "grpc" => collector.serve_grpc(),
            _ => collector.serve_http(),
        };
        lab.daemon_environment("OTEL_EXPORTER_OTLP_ENDPOINT", &endpoint);
        lab.daemon_environment("OTEL_EXPORTER_OTLP_PROTOCOL", protocol);
        lab.daemon_environment("OTEL_EXPORTER_OTLP_HEADERS", "x-tenant=a%20team");
        lab.daemon_environment("OTEL_SERVICE_NAME", "builder-7");
        lab.daemon_environment("OTEL_BSP_SCHEDULE_DELAY", "50");
        lab.start_daemon();

        let script = format!(
            "test -S /dev/otel-grpc.sock && [ $OTEL_TRACES_EXPORTER = otlp ] && case $TRACEPARENT in 00-{TRACE}-*-01) ;; *) exit 7;; esac"
        );
        let record = traced_build(&lab, &definition(&registry, &script));
        assert_eq!(record.error, None);

        // The request ends last, but spans come in no order.
        let spans = wait_for("spans to arrive", Duration::from_secs(30), || {
            let spans = collector.spans();
            let names = ["moby.buildkit.v1.Control/Solve", "a step", "a client"];
            match names.iter().find(|name| !spans.values().any(|s| s.name == **name)) {
                None => Ok(spans),
                Some(missing) => Err(format!("no {missing} among {} spans", spans.len())),
            }
        });
        let named = |name: &str| {
            let found = spans.iter().find(|(_, s)| s.name == name);
            found.unwrap_or_else(|| panic!("no span {name}"))
        };
        let (solve_id, solve) = named("moby.buildkit.v1.Control/Solve");
        assert_eq!(hex::encode(&solve.trace_id), TRACE);
        assert_eq!(hex::encode(&solve.parent_span_id), CALLER);
        assert!(attribute(solve, "shipway.build").contains(BUILD));
        let (step_id, step) = named("a step");
        assert_eq!(hex::encode(&step.parent_span_id), *solve_id);
        let of_containerd =
            |s: &Span| s.name.starts_with("containerd.services.") && is_below(&spans, s, step_id);
        assert!(spans.values().any(of_containerd), "no call to containerd below the step");
        let of_registry = |s: &Span| {
            attribute(s, "server.address").contains(&registry) && is_below(&spans, s, solve_id)
        };
        assert!(spans.values().filter(|s| of_registry(s)).count() > 1);
        assert!(
            spans
                .values()
                .filter(|s| s.trace_id == solve.trace_id)
                .all(|s| { s.name == "a client" || is_below(&spans, s, CALLER) })
        );

        let asked = asked.0.lock().clone();
        assert!(asked.len() > 1);
        for (request, traceparent) in &asked {
            let parent = traceparent.as_ref().unwrap_or_else(|| panic!("{request} in no trace"));
            let mut parts = parent.split('-').skip(1);
            assert_eq!(parts.next(), Some(TRACE), "{request}");
            assert!(spans.contains_key(parts.next().unwrap()), "{request}");
        }

        let got = collector.0.lock();
        assert_eq!(got.1["x-tenant"], "a team");
        let all = format!("{:?}", got.0);
        assert!(all.contains("builder-7") && !all.contains(SECRET));
        drop(got);

        // What the record has is what the collector got.
        let trace = record.trace.unwrap();
        assert_eq!(trace.media_type, "application/vnd.buildkit.otlp.json.v0");
        let text = lab.shipway(["history", "trace", BUILD]).ok().stdout;
        for name in ["moby.buildkit.v1.Control/Solve", "a step", "a client", "containerd."] {
            assert!(text.contains(name), "no {name} in\n{text}");
        }
        let json = lab.shipway(["history", "trace", "--json"]).ok().stdout;
        let json: serde_json::Value = serde_json::from_str(&json).unwrap();
        assert_eq!(json["data"][0]["traceID"], TRACE);
        // Older ones have no such command.
        let has_command = |mut buildx: std::process::Command| {
            shipway_testkit::run(buildx.args(["history", "--help"])).stdout.contains("trace")
        };
        if lab.buildx().is_some_and(has_command)
            && let Some(mut buildx) = lab.buildx()
        {
            let shown = shipway_testkit::run(buildx.args(["history", "trace", BUILD])).ok().stdout;
            let shown: serde_json::Value = serde_json::from_str(&shown).unwrap();
            assert_eq!(shown["data"][0]["traceID"], TRACE);
            let count = |of: &serde_json::Value| of["data"][0]["spans"].as_array().unwrap().len();
            assert_eq!(count(&shown), count(&json));
        }
    }
}

#[test]
fn a_trace_is_kept_without_a_collector_and_has_no_secrets() {
    let asked = Asked::default();
    let (mut lab, registry) = lab(&asked);
    lab.start_daemon();
    let script = "! test -e /dev/otel-grpc.sock && [ -z \"$TRACEPARENT$OTEL_TRACES_EXPORTER\" ]";
    assert_eq!(traced_build(&lab, &definition(&registry, script)).error, None);

    let text = format!(
        "FROM {registry}/library/busybox\nARG TOKEN\nENV VALUE=$TOKEN\nRUN true\nADD http://user:{SECRET}@127.0.0.1:1/{SECRET}?{SECRET} /x\n"
    );
    let context = lab.context("secret", &[("Dockerfile", &text)]);
    let argument = format!("TOKEN={SECRET}");
    let failed = lab.shipway(["build", "--build-arg", &argument, &context.to_string_lossy()]);
    assert_ne!(failed.code, Some(0));
    let json = lab.shipway(["history", "trace", "--json"]).ok().stdout;
    assert!(json.contains("moby.buildkit.v1.Control/Solve") && json.contains("moby.filesync.v1"));
    let leak = json.lines().find(|l| l.contains(&format!(":{SECRET}@")) || l.contains(&argument));
    assert_eq!(leak, None);
    // The log says in which trace a build was.
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    let id = json["data"][0]["traceID"].as_str().unwrap();
    let log = std::fs::read_to_string(lab.dir().join("shipwayd.log")).unwrap();
    assert!(log.lines().any(|l| l.contains(id) && l.contains("build failed")), "no {id} in {log}");
}

/// Status line and body of an answer.
fn get(port: u16, path: &str) -> (String, String) {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.lines().next().unwrap().to_owned(), body.to_owned())
}

#[test]
fn metrics_count_what_was_done_and_nothing_is_traced_where_that_is_off() {
    let asked = Asked::default();
    let (mut lab, registry) = lab(&asked);
    let port = free_port();
    lab.daemon_flag(&format!("--debugaddr=127.0.0.1:{port}"));
    lab.daemon_environment("OTEL_SDK_DISABLED", "true");
    lab.start_daemon();
    let dockerfile = format!("FROM {registry}/library/busybox\nRUN echo 1\n");
    build_text(&lab, "one:1", &dockerfile).ok();
    build_text(&lab, "one:2", &dockerfile).ok();
    build_text(&lab, "one:3", "FROM scratch\nCOPY none /\n");

    assert_eq!(get(port, "/healthz"), ("HTTP/1.1 200 OK".into(), "ok\n".into()));
    let (status, page) = get(port, "/metrics");
    assert_eq!(status, "HTTP/1.1 200 OK");
    let samples: BTreeMap<&str, f64> = page
        .lines()
        .filter(|line| !line.starts_with('#'))
        .map(|line| line.rsplit_once(' ').unwrap())
        .map(|(name, value)| (name, value.parse().unwrap()))
        .collect();
    let sample = |name: &str| *samples.get(name).unwrap_or_else(|| panic!("no {name} in\n{page}"));
    let done =
        r#"buildkit_builds_total{frontend="dockerfile.v0",status="completed",error_code=""}"#;
    assert_eq!(sample(done), 2.0);
    let failed =
        r#"buildkit_builds_total{frontend="dockerfile.v0",status="error",error_code="Unknown"}"#;
    assert_eq!(sample(failed), 1.0);
    assert_eq!(sample(r#"buildkit_build_duration_seconds_count{status="completed"}"#), 2.0);
    assert!(sample(r#"buildkit_builds_steps_total{kind="cached"}"#) >= 1.0);
    assert!(sample(r#"shipway_cache_lookups_total{outcome="local"}"#) >= 1.0);
    assert!(sample(r#"shipway_cache_lookups_total{outcome="miss"}"#) >= 1.0);
    assert_eq!((sample("shipway_builds_running"), sample("shipway_steps_running")), (0.0, 0.0));
    // busybox and a Dockerfile.
    let bytes = |peer: &str| {
        sample(&format!(r#"shipway_transferred_bytes_total{{peer="{peer}",direction="received"}}"#))
    };
    assert!(bytes("registry") > 10_000.0 && bytes("client") > dockerfile.len() as f64);
    let calls = |method: &str| {
        sample(&format!(
            r#"shipway_containerd_call_seconds_bucket{{method="containerd.services.{method}",le="+Inf"}}"#
        ))
    };
    assert!(calls("snapshots.v1.Snapshots/Commit") >= 1.0);
    let requests = |method: &str| {
        let method = format!("moby.buildkit.v1.Control/{method}");
        sample(&format!(r#"shipway_request_seconds_count{{method="{method}"}}"#))
    };
    assert_eq!((requests("Solve"), requests("Status")), (3.0, 3.0));
    assert_eq!(sample("shipway_steps_queued"), 0.0);
    assert!(sample("process_resident_memory_bytes") > 1e6);

    let (_, variables) = get(port, "/debug/vars");
    let variables: serde_json::Value = serde_json::from_str(&variables).unwrap();
    assert_eq!(variables[done], 2.0);
    assert_eq!(get(port, "/debug/requests").1, "0 builds run\n");
    let (status, why) = get(port, "/debug/pprof/profile");
    assert!(status.contains("501") && why.contains("perf record"), "{status} {why}");
    assert!(get(port, "/").0.contains("404"));

    assert!(asked.0.lock().iter().all(|(_, traceparent)| traceparent.is_none()));
    let none = lab.shipway(["history", "trace"]);
    assert!(none.code != Some(0) && none.stderr.contains("has no trace"), "{}", none.all());
}
