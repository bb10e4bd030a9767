//! `debug`: what `buildctl debug` has (rows `ct.dbg.*`), for both personas.

mod step;

use std::{io::Read as _, path::PathBuf};

use futures::StreamExt;
use serde_json::{Map, Value, json};
use shipway_client::{Client, HistoryBlob, HistoryEvent, HistoryQuery};
use shipway_fault::{Code, Fault, Result};
use shipway_gocompat::quote;
use shipway_llb::{Definition, ExportCache, OpMetadata};
use shipway_oci::Digest;

use crate::{
    Persona,
    command::{history, info, workers},
    connect::ConnectArgs,
    output,
    progress::Mode,
    run::until_interrupted,
};

pub(crate) use step::{DebugArgs, of_builds};

/// Largest definition that is read.
const MAX_DEFINITION: u64 = 64 << 20;

/// Look inside
#[derive(clap::Subcommand, Debug)]
pub(crate) enum Debug {
    /// Print a definition as JSON, one operation a line; needs no daemon
    DumpLlb(DumpLlb),
    /// Refused: there is no such file
    #[command(hide = true)]
    DumpMetadata(DumpMetadata),
    /// List workers
    Workers(workers::Args),
    /// Show the daemon's version
    Info(info::Args),
    /// Show builds as they begin and end
    Monitor(Monitor),
    /// Show what a build said
    Logs(Logs),
    /// Pin, unpin or forget the record of a build
    Ctl(Ctl),
    /// Print a blob that the daemon keeps for a build
    Get(Get),
    /// List builds
    Histories(history::Histories),
}

#[derive(clap::Args, Debug)]
pub(crate) struct DumpLlb {
    /// File with an encoded definition; - or nothing for standard input
    file: Option<PathBuf>,
    /// Print a graph in Graphviz' language instead
    #[arg(long)]
    dot: bool,
}

#[derive(clap::Args, Debug)]
pub(crate) struct DumpMetadata {
    /// Directory of the daemon's state
    #[arg(long)]
    root: Option<PathBuf>,
}

#[derive(clap::Args, Debug)]
pub(crate) struct Monitor {
    /// Builds that ended, too
    #[arg(long)]
    completed: bool,
    /// Only this build
    #[arg(long = "ref", value_name = "REF", default_value = "", hide_default_value = true)]
    reference: String,
}

#[derive(clap::Args, Debug)]
pub(crate) struct Logs {
    /// Id of the build
    #[arg(value_name = "REF")]
    reference: String,
    /// How to show progress: auto, tty, plain, rawjson
    #[arg(long, default_value = "plain", value_name = "MODE")]
    progress: Mode,
    /// Print the build's trace instead, as it is kept
    #[arg(long)]
    trace: bool,
}

#[derive(clap::Args, Debug)]
#[command(group = clap::ArgGroup::new("what").required(true).multiple(false))]
pub(crate) struct Ctl {
    /// Id of the build
    #[arg(value_name = "REF")]
    reference: String,
    /// Keep the record for ever
    #[arg(long, group = "what")]
    pin: bool,
    /// Keep the record no longer than others
    #[arg(long, group = "what")]
    unpin: bool,
    /// Forget the record
    #[arg(long, group = "what")]
    delete: bool,
}

#[derive(clap::Args, Debug)]
pub(crate) struct Get {
    /// Digest of the blob
    digest: Digest,
}

pub(crate) async fn run(connect: &ConnectArgs, persona: Persona, command: Debug) -> Result<()> {
    let client = match command {
        Debug::DumpLlb(args) => return dump(args),
        Debug::DumpMetadata(_) => {
            return Err(Fault::new(
                Code::Unimplemented,
                "dump-metadata prints BuildKit's metadata_v2.db, and there is no such file: what is \
                 kept are containerd's snapshots and a cache index",
            )
            .hint("`du --verbose` shows all that is known of the build cache"));
        }
        _ => connect.connect(persona).await?,
    };
    match command {
        Debug::DumpLlb(_) | Debug::DumpMetadata(_) => Ok(()),
        Debug::Workers(args) => workers::run(&client, args).await,
        Debug::Info(args) => info::run(&client, args).await,
        Debug::Monitor(args) => until_interrupted(monitor(&client, args)).await,
        Debug::Logs(args) if args.trace => trace(&client, &args.reference).await,
        Debug::Logs(args) => history::logs(&client, &args.reference, args.progress).await,
        Debug::Ctl(args) => match args.delete {
            true => client.delete_history(&args.reference).await,
            false => client.pin_history(&args.reference, args.pin).await,
        },
        Debug::Get(args) => print_blob(&client, &args.digest.to_string()).await,
        Debug::Histories(args) => history::histories(&client, args).await,
    }
}

async fn print_blob(client: &Client, digest: &str) -> Result<()> {
    let mut stream = client.blob_stream(digest).await?;
    while let Some(part) = stream.next().await {
        output::print_bytes(&part?)?;
    }
    Ok(())
}

async fn trace(client: &Client, reference: &str) -> Result<()> {
    let query = HistoryQuery { reference: reference.to_owned(), ..HistoryQuery::default() };
    let (_, mut events) = client.history(query).await?;
    let event = events.next().await.transpose()?;
    let event = event.ok_or_else(|| Fault::not_found(format!("ref {reference} not found")))?;
    match event.record.trace {
        Some(trace) => print_blob(client, &trace.digest).await,
        None => Err(Fault::not_found(format!("ref {reference} does not have trace"))),
    }
}

async fn monitor(client: &Client, args: Monitor) -> Result<()> {
    let query = HistoryQuery {
        reference: args.reference,
        active: !args.completed,
        follow: true,
        ..HistoryQuery::default()
    };
    let (_, mut events) = client.history(query).await?;
    while let Some(event) = events.next().await {
        output::print(&described(&event?))?;
    }
    Ok(())
}

/// An event as buildctl prints it.
fn described(event: &HistoryEvent) -> String {
    let record = &event.record;
    let mut out = format!("event: {} ref:{}\n", history::kind(event.kind), record.reference);
    let mut row = |title: &str, text: String| out.push_str(&format!("  {title}: {text}\n"));
    if record.total_steps != 0 {
        row("cache", format!("{}/{}", record.cached_steps, record.total_steps));
    }
    if record.warnings != 0 {
        row("warnings", record.warnings.to_string());
    }
    for (title, blob) in [("logs", &record.logs), ("trace", &record.trace)] {
        if let Some(blob) = blob {
            row(title, text(blob));
        }
    }
    let all = record.result.iter().map(|r| (String::new(), r));
    let all = all.chain(record.results.iter().map(|(p, r)| (format!("[{p}] "), r)));
    for (of, result) in all {
        for blob in result.results.values() {
            row(&format!("{of}descriptor"), text(blob));
        }
        for blob in &result.attestations {
            row(&format!("{of}attestation"), text(blob));
        }
    }
    out
}

/// A descriptor in the text form of protobuf.
fn text(blob: &HistoryBlob) -> String {
    let HistoryBlob { media_type, digest, size, annotations } = blob;
    let pairs = annotations.iter().map(|(k, v)| format!(" annotations:{{key:{k:?} value:{v:?}}}"));
    let pairs: String = pairs.collect();
    format!("media_type:{media_type:?} digest:{digest:?} size:{size}{pairs}")
}

fn dump(args: DumpLlb) -> Result<()> {
    let mut bytes = Vec::new();
    match args.file.as_deref().filter(|path| path.as_os_str() != "-") {
        Some(path) => {
            let failed = |e| Fault::io(format!("read {}", path.display()), e);
            let file = std::fs::File::open(path).map_err(failed)?;
            file.take(MAX_DEFINITION + 1).read_to_end(&mut bytes).map_err(failed)?;
        }
        None => {
            let stdin = std::io::stdin().lock().take(MAX_DEFINITION + 1).read_to_end(&mut bytes);
            stdin.map_err(|e| Fault::io("read the definition from standard input", e))?;
        }
    }
    if bytes.len() as u64 > MAX_DEFINITION {
        return Err(Fault::invalid(format!(
            "the definition is larger than {MAX_DEFINITION} bytes"
        )));
    }
    let definition = Definition::decode(&bytes)?;
    output::print(&if args.dot { dot(&definition)? } else { lines(&definition)? })
}

/// An operation as JSON in the wire's names, its digest, and the names of what it needs.
struct Op {
    digest: Digest,
    op: Value,
    inputs: Vec<(Digest, i64)>,
    metadata: Option<Value>,
}

/// What is known of an operation, as Go encodes it.
fn metadata(known: &OpMetadata) -> Value {
    let mut out = Map::new();
    if known.ignore_cache {
        out.insert("ignore_cache".to_owned(), true.into());
    }
    if !known.description.is_empty() {
        out.insert("description".to_owned(), json!(known.description));
    }
    match known.export_cache {
        Some(ExportCache::Yes) => _ = out.insert("export_cache".to_owned(), json!({"Value": true})),
        Some(ExportCache::No) => _ = out.insert("export_cache".to_owned(), json!({})),
        None => {}
    }
    if !known.caps.is_empty() {
        let caps: Map<String, Value> =
            known.caps.iter().map(|cap| (cap.clone(), true.into())).collect();
        out.insert("caps".to_owned(), caps.into());
    }
    out.into()
}

fn ops(definition: &Definition) -> Result<Vec<Op>> {
    let all = shipway_llb::json::operations(definition)?;
    let digests: Vec<Digest> = all.iter().map(|op| op.digest).collect();
    let of = |op: shipway_llb::json::JsonOp| Op {
        digest: op.digest,
        inputs: op.inputs.iter().map(|(at, output)| (digests[*at], *output)).collect(),
        op: op.op,
        metadata: definition.metadata.get(&op.digest.to_string()).map(metadata),
    };
    Ok(all.into_iter().map(of).collect())
}

/// One operation a line.
fn lines(definition: &Definition) -> Result<String> {
    let line = |op: Op| {
        let inputs = op.inputs.iter().map(|(digest, output)| match output {
            0 => json!({"digest": digest}),
            n => json!({"digest": digest, "index": n}),
        });
        let inputs: Vec<Value> = inputs.collect();
        let mut value = Map::new();
        if !inputs.is_empty() {
            value.insert("inputs".to_owned(), inputs.into());
        }
        value.extend(op.op.as_object().cloned().unwrap_or_default());
        let metadata = op.metadata.unwrap_or_else(|| json!({}));
        format!("{}\n", json!({"Op": value, "Digest": op.digest, "OpMetadata": metadata}))
    };
    Ok(ops(definition)?.into_iter().map(line).collect())
}

/// A graph in Graphviz' language.
fn dot(definition: &Definition) -> Result<String> {
    let all = ops(definition)?;
    let mut out = "digraph {\n".to_owned();
    let q = |text: &str| quote(text);
    for op in &all {
        let digest = op.digest.to_string();
        let (label, shape) = drawn(&digest, &op.op["Op"]);
        out += &format!("  {} [label={} shape={}];\n", q(&digest), q(&label), q(shape));
    }
    for op in &all {
        for (n, (digest, _)) in op.inputs.iter().enumerate() {
            let mounts = op.op["Op"]["exec"]["mounts"].as_array();
            let is_of = |mount: &&Value| {
                let input = mount.get("input").map_or(Some(0), Value::as_u64);
                input == Some(n as u64) && mount["dest"] != "/"
            };
            let label = mounts.into_iter().flatten().rfind(is_of);
            let label = label.and_then(|mount| mount["dest"].as_str()).unwrap_or_default();
            let (from, to) = (digest.to_string(), op.digest.to_string());
            out += &format!("  {} -> {} [label={}];\n", q(&from), q(&to), q(label));
        }
    }
    Ok(out + "}\n")
}

/// The label and the shape of an operation.
fn drawn(digest: &str, op: &Value) -> (String, &'static str) {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let Some((kind, of)) = op.as_object().and_then(|op| op.iter().next()) else {
        return (digest.to_owned(), "plaintext");
    };
    match kind.as_str() {
        "source" => (text(&of["identifier"]), "ellipse"),
        "exec" => {
            let words = of["meta"]["args"].as_array().into_iter().flatten();
            (words.map(text).collect::<Vec<_>>().join(" "), "box")
        }
        "build" => ("build".to_owned(), "box3d"),
        "merge" => ("merge".to_owned(), "invtriangle"),
        "diff" => ("diff".to_owned(), "doublecircle"),
        "file" => {
            let actions = of["actions"].as_array().into_iter().flatten();
            let name = |action: &Value| {
                let (kind, of) = action["Action"].as_object()?.iter().next()?;
                let field = |key: &str| text(&of[key]);
                Some(match kind.as_str() {
                    "copy" => format!("copy{{src={}, dest={}}}", field("src"), field("dest")),
                    "symlink" => format!(
                        "symlink{{oldpath={}, newpath={}}}",
                        field("oldpath"),
                        field("newpath")
                    ),
                    kind => format!("{kind}{{path={}}}", field("path")),
                })
            };
            let names: Vec<String> = actions.filter_map(name).collect();
            (names.join(","), "note")
        }
        _ => (digest.to_owned(), "plaintext"),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use shipway_client::{HistoryKind, HistoryRecord, HistoryResult};

    use super::*;

    #[test]
    fn events_are_described() {
        let blob = |name: &str| HistoryBlob {
            media_type: "m".into(),
            digest: name.into(),
            size: 3,
            annotations: BTreeMap::new(),
        };
        let result =
            HistoryResult { attestations: vec![blob("a")], results: [(0, blob("i"))].into() };
        let record = HistoryRecord {
            reference: "r1".into(),
            cached_steps: 1,
            total_steps: 2,
            warnings: 3,
            logs: Some(blob("l")),
            results: [("linux/amd64".to_owned(), result)].into(),
            ..HistoryRecord::default()
        };
        let event = HistoryEvent { kind: HistoryKind::Complete, record };
        assert_eq!(
            described(&event),
            "event: COMPLETE ref:r1\n  cache: 1/2\n  warnings: 3\n  logs: media_type:\"m\" digest:\"l\" size:3\n  \
             [linux/amd64] descriptor: media_type:\"m\" digest:\"i\" size:3\n  \
             [linux/amd64] attestation: media_type:\"m\" digest:\"a\" size:3\n"
        );
    }

    #[test]
    fn operations_are_drawn() {
        let check = |op: Value, label: &str, shape: &str| {
            assert_eq!(drawn("sha256:d", &op), (label.to_owned(), shape), "{op}");
        };
        check(json!({"source": {"identifier": "docker-image://a"}}), "docker-image://a", "ellipse");
        check(json!({"exec": {"meta": {"args": ["sh", "-c", "x"]}}}), "sh -c x", "box");
        check(
            json!({"file": {"actions": [{"Action": {"mkdir": {"path": "/a"}}},
                {"Action": {"copy": {"src": "/x", "dest": "/y"}}}]}}),
            "mkdir{path=/a},copy{src=/x, dest=/y}",
            "note",
        );
        check(json!({"merge": {}}), "merge", "invtriangle");
        check(Value::Null, "sha256:d", "plaintext");
    }
}
