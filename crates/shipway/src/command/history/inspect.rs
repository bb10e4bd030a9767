//! `history inspect`: what a build was asked for, how it went, and what is kept of it.

use std::{collections::BTreeMap, fmt::Write as _};

use futures::{StreamExt as _, future::BoxFuture};
use serde::Serialize;
use serde_json::Value;
use shipway_client::{Client, HistoryBlob, HistoryRecord, HistoryResult, Time};
use shipway_fault::{Detail, Fault, Result};
use shipway_gocompat::{GoDuration, csv_fields, parse_bool, parse_size, path};
use shipway_oci::{Digest, Index, Platform, media, timestamp};

use super::records::{self, Found};
use crate::{builders::BuildState, failure, output, size, table, template};

/// Most bytes of provenance or an index that are read.
const MAX_DOCUMENT: u64 = 16 << 20;
/// How deep indexes may lie in each other.
const MAX_DEPTH: usize = 4;
/// Lines that are shown of the step that failed.
const LINES: usize = 16;
/// On an attestation: what kind of statement it is.
const PREDICATE: &str = "in-toto.io/predicate-type";
const SLSA: &str = "https://slsa.dev/provenance/";
const SPDX: &str = "https://spdx.dev/Document";

/// Show a build that ran
#[derive(clap::Args, Debug)]
#[command(args_conflicts_with_subcommands = true)]
pub(super) struct Args {
    /// Id of the build, or ^N for the Nth before the latest [default: the latest]
    #[arg(value_name = "REF")]
    reference: Option<String>,
    /// pretty, json, or a Go template
    #[arg(long, default_value = "pretty", value_name = "FORMAT")]
    format: String,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(clap::Subcommand, Debug)]
enum Command {
    Attachment(Attachment),
}

/// Print a file that is kept of a build, such as its provenance
#[derive(clap::Args, Debug)]
struct Attachment {
    /// Id of the build, or ^N for the Nth before the latest [default: the latest]
    #[arg(value_name = "REF")]
    reference: Option<String>,
    /// Digest of the file
    digest: Option<Digest>,
    /// index, manifest, image, provenance, sbom, or a media type
    #[arg(long = "type", value_name = "TYPE")]
    kind: Option<String>,
    /// Of which platform
    #[arg(long, value_name = "PLATFORM")]
    platform: Option<Platform>,
}

/// A pair; the names of all fields are those that templates know.
#[derive(Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "PascalCase")]
struct Pair {
    name: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    value: String,
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// What is shown of a build.
#[derive(Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "PascalCase")]
struct Shown {
    #[serde(skip_serializing_if = "is_default")]
    name: String,
    #[serde(rename = "Ref")]
    reference: String,
    #[serde(skip_serializing_if = "is_default")]
    context: String,
    #[serde(skip_serializing_if = "is_default")]
    dockerfile: String,
    #[serde(rename = "VCSRepository", skip_serializing_if = "is_default")]
    vcs_repository: String,
    #[serde(rename = "VCSRevision", skip_serializing_if = "is_default")]
    vcs_revision: String,
    #[serde(skip_serializing_if = "is_default")]
    target: String,
    #[serde(skip_serializing_if = "is_default")]
    platform: Vec<String>,
    #[serde(skip_serializing_if = "is_default")]
    keep_git_dir: bool,
    #[serde(skip_serializing_if = "is_default")]
    named_contexts: Vec<Pair>,
    #[serde(skip_serializing_if = "is_default")]
    started_at: Option<Time>,
    #[serde(skip_serializing_if = "is_default")]
    completed_at: Option<Time>,
    /// Nanoseconds.
    #[serde(skip_serializing_if = "is_default")]
    duration: u64,
    status: &'static str,
    #[serde(skip_serializing_if = "is_default")]
    error: Option<Failure>,
    num_completed_steps: i32,
    num_total_steps: i32,
    num_cached_steps: i32,
    #[serde(skip_serializing_if = "is_default")]
    build_args: Vec<Pair>,
    #[serde(skip_serializing_if = "is_default")]
    labels: Vec<Pair>,
    config: Config,
    #[serde(skip_serializing_if = "is_default")]
    materials: Vec<Material>,
    #[serde(skip_serializing_if = "is_default")]
    attachments: Vec<Attached>,
    #[serde(skip_serializing_if = "is_default")]
    errors: Vec<String>,
}

/// Why a build failed.
#[derive(Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "PascalCase")]
struct Failure {
    #[serde(skip_serializing_if = "is_default")]
    code: i32,
    #[serde(skip_serializing_if = "is_default")]
    message: String,
    /// Of the step that failed.
    #[serde(skip_serializing_if = "is_default")]
    name: String,
    #[serde(skip_serializing_if = "is_default")]
    logs: Vec<String>,
    /// Lines of the Dockerfile, in base64.
    #[serde(skip_serializing_if = "is_default")]
    sources: String,
    #[serde(skip)]
    excerpt: String,
}

/// Options of the build. The titles are those of the pretty form.
#[derive(Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "PascalCase")]
struct Config {
    #[serde(skip_serializing_if = "is_default")]
    network: String,
    #[serde(skip_serializing_if = "is_default")]
    extra_hosts: Vec<String>,
    #[serde(skip_serializing_if = "is_default")]
    hostname: String,
    #[serde(skip_serializing_if = "is_default")]
    cgroup_parent: String,
    #[serde(skip_serializing_if = "is_default")]
    image_resolve_mode: String,
    #[serde(skip_serializing_if = "is_default")]
    multi_platform: bool,
    #[serde(skip_serializing_if = "is_default")]
    no_cache: bool,
    #[serde(skip_serializing_if = "is_default")]
    no_cache_filter: Vec<String>,
    #[serde(skip_serializing_if = "is_default")]
    shm_size: String,
    #[serde(skip_serializing_if = "is_default")]
    ulimit: String,
    #[serde(skip_serializing_if = "is_default")]
    memory: String,
    #[serde(skip_serializing_if = "is_default")]
    memory_swap: String,
    #[serde(rename = "CPUShares", skip_serializing_if = "is_default")]
    cpu_shares: String,
    #[serde(rename = "CPUPeriod", skip_serializing_if = "is_default")]
    cpu_period: String,
    #[serde(rename = "CPUQuota", skip_serializing_if = "is_default")]
    cpu_quota: String,
    #[serde(rename = "CPUSetCPUs", skip_serializing_if = "is_default")]
    cpuset_cpus: String,
    #[serde(rename = "CPUSetMems", skip_serializing_if = "is_default")]
    cpuset_mems: String,
    #[serde(rename = "CacheMountNS", skip_serializing_if = "is_default")]
    cache_mount_ns: String,
    #[serde(skip_serializing_if = "is_default")]
    dockerfile_check_config: String,
    #[serde(skip_serializing_if = "is_default")]
    source_date_epoch: String,
    #[serde(skip_serializing_if = "is_default")]
    sandbox_hostname: String,
    #[serde(skip_serializing_if = "is_default")]
    rest_raw: Vec<Pair>,
}

/// What a build used.
#[derive(Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "PascalCase")]
struct Material {
    #[serde(rename = "URI", skip_serializing_if = "is_default")]
    uri: String,
    #[serde(skip_serializing_if = "is_default")]
    digests: Vec<String>,
}

/// A file of a build.
#[derive(Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "PascalCase")]
struct Attached {
    #[serde(skip_serializing_if = "is_default")]
    digest: String,
    #[serde(skip_serializing_if = "is_default")]
    platform: String,
    #[serde(rename = "Type", skip_serializing_if = "is_default")]
    kind: String,
}

/// A path as it is seen from the current directory, if it is in it.
fn from_here(path: &str) -> String {
    let here = std::env::current_dir().unwrap_or_default();
    match std::path::Path::new(path).strip_prefix(here) {
        Ok(inside) if inside.as_os_str().is_empty() => ".".to_owned(),
        Ok(inside) => inside.to_string_lossy().into_owned(),
        Err(_) => path.to_owned(),
    }
}

/// The pairs whose keys begin with `prefix`.
fn pairs(attrs: &BTreeMap<String, String>, prefix: &str) -> Vec<Pair> {
    let of = |(key, value): (&String, &String)| {
        Some(Pair { name: key.strip_prefix(prefix)?.to_owned(), value: value.clone() })
    };
    attrs.iter().filter_map(of).collect()
}

impl Shown {
    /// What the record says by itself.
    fn of(found: &Found, state: Option<&BuildState>) -> Self {
        let record = &found.record;
        let mut attrs = record.frontend_attrs.clone();
        attrs.remove("frontend.caps");
        let mut shown = Self {
            name: records::name(&record.frontend_attrs, state),
            reference: record.reference.clone(),
            started_at: record.created_at,
            completed_at: record.completed_at,
            duration: found
                .duration()
                .and_then(|d| d.as_nanos().try_into().ok())
                .unwrap_or_default(),
            num_completed_steps: record.completed_steps,
            num_total_steps: record.total_steps,
            num_cached_steps: record.cached_steps,
            status: match (&record.error, record.completed_at) {
                (Some(_), _) if record.error_code == CANCELED => "canceled",
                (Some(_), _) => "failed",
                (None, Some(_)) => "completed",
                (None, None) => "running",
            },
            error: record.error.as_ref().map(|message| Failure {
                code: record.error_code,
                message: message.clone(),
                ..Failure::default()
            }),
            ..Self::default()
        };
        shown.places(&mut attrs, state);
        shown.options(attrs);
        shown
    }

    /// Where the build's files were.
    fn places(&mut self, attrs: &mut BTreeMap<String, String>, state: Option<&BuildState>) {
        if let Some(state) = state {
            self.context = from_here(&state.local_path);
            self.dockerfile = match state.dockerfile_path.strip_prefix(&state.local_path) {
                Some(inside) => inside.trim_start_matches('/').to_owned(),
                None => state.dockerfile_path.clone(),
            };
        }
        let is_remote = attrs.contains_key("context");
        if self.context.is_empty() {
            self.context = attrs.remove("context").unwrap_or_default();
        }
        let filename = attrs.remove("filename");
        if self.dockerfile.is_empty() {
            self.dockerfile = match (filename, attrs.get("vcs:localdir:dockerfile")) {
                (Some(name), Some(dir)) => path::join(dir, &name),
                (name, _) => name.unwrap_or_default(),
            };
        }
        if !is_remote {
            self.vcs_repository = attrs.get("vcs:source").cloned().unwrap_or_default();
            self.vcs_revision = attrs.get("vcs:revision").cloned().unwrap_or_default();
        }
    }

    fn options(&mut self, mut attrs: BTreeMap<String, String>) {
        let mut take = |key: &str| attrs.remove(key);
        self.target = take("target").unwrap_or_default();
        if let Some(list) = take("platform") {
            for text in list.split(',').filter(|p| !p.is_empty()) {
                match text.parse::<Platform>() {
                    Ok(platform) => self.platform.push(platform.to_string()),
                    Err(e) => self.errors.push(format!("failed to parse {text}: ({e})")),
                }
            }
        }
        let errors = &mut self.errors;
        let mut boolean = |text: Option<String>| {
            let Some(text) = text else { return false };
            parse_bool(&text).unwrap_or_else(|| {
                errors.push(format!("failed to parse {text}: (it is not true or false)"));
                false
            })
        };
        self.keep_git_dir = boolean(take("build-arg:BUILDKIT_CONTEXT_KEEP_GIT_DIR"));
        let several = boolean(take("build-arg:BUILDKIT_MULTI_PLATFORM"));
        let several = boolean(take("multi-platform")) || several;
        let no_cache = take("no-cache");
        let hosts = take("add-hosts").unwrap_or_default();
        let mut text = |key: &str| attrs.remove(key).unwrap_or_default();
        self.config = Config {
            network: text("force-network-mode"),
            extra_hosts: csv_fields(&hosts, ',')
                .unwrap_or_default()
                .into_iter()
                .filter(|host| !host.is_empty())
                .collect(),
            hostname: text("hostname"),
            cgroup_parent: text("cgroup-parent"),
            image_resolve_mode: text("image-resolve-mode"),
            multi_platform: several,
            no_cache: no_cache.as_deref() == Some(""),
            no_cache_filter: no_cache
                .iter()
                .flat_map(|stages| stages.split(','))
                .filter(|stage| !stage.is_empty())
                .map(str::to_owned)
                .collect(),
            shm_size: text("shm-size"),
            ulimit: text("ulimit"),
            memory: text("memory"),
            memory_swap: text("memswap"),
            cpu_shares: text("cpushares"),
            cpu_period: text("cpuperiod"),
            cpu_quota: text("cpuquota"),
            cpuset_cpus: text("cpusetcpus"),
            cpuset_mems: text("cpusetmems"),
            cache_mount_ns: text("build-arg:BUILDKIT_CACHE_MOUNT_NS"),
            dockerfile_check_config: text("build-arg:BUILDKIT_DOCKERFILE_CHECK"),
            source_date_epoch: text("build-arg:SOURCE_DATE_EPOCH"),
            sandbox_hostname: text("build-arg:SANDBOX_HOSTNAME"),
            rest_raw: Vec::new(),
        };
        self.named_contexts = pairs(&attrs, "context:");
        self.build_args = pairs(&attrs, "build-arg:");
        self.labels = pairs(&attrs, "label:");
        attrs.retain(|key, _| {
            !["vcs:", "build-arg:", "label:", "context:", "attest:"]
                .iter()
                .any(|prefix| key.starts_with(prefix))
        });
        self.config.rest_raw = pairs(&attrs, "");
    }

    /// As people read it; `asked` is whether the build was named.
    fn pretty(&self, asked: bool) -> String {
        let mut out = String::new();
        let mut block = String::new();
        let mut row = |title: &str, value: &str| {
            if !value.is_empty() {
                let _ = writeln!(block, "{title}:\t{value}");
            }
        };
        row("Name", &self.name);
        row("Ref", if asked { "" } else { &self.reference });
        row("Context", &self.context);
        row("Dockerfile", &self.dockerfile);
        row("VCS Repository", &self.vcs_repository);
        row("VCS Revision", &self.vcs_revision);
        row("Target", &self.target);
        row("Platforms", &self.platform.join(", "));
        row("Keep Git Dir", if self.keep_git_dir { "true" } else { "" });
        out += &(table::align(&block) + "\n");
        out += &listed("NAMED CONTEXT", &self.named_contexts);

        let started = self.started_at.map(|t| timestamp::format_whole(t.0)).unwrap_or_default();
        let started = started.replace('T', " ").replace('Z', " UTC");
        let time = records::duration(std::time::Duration::from_nanos(self.duration));
        let running = if self.status == "running" { " (running)" } else { "" };
        let mut block = format!("Started:\t{started}\nDuration:\t{time}{running}\n");
        match (&self.error, self.status) {
            (_, "canceled") => block.push_str("Status:\tCanceled\n"),
            (Some(error), _) => {
                let code = shipway_fault::Code::from_number(error.code);
                let _ = writeln!(block, "Error:\t{code:?} {}", error.message);
            }
            _ => {}
        }
        let cached = match self.num_total_steps {
            0 => 0.0,
            total => f64::from(self.num_cached_steps) / f64::from(total) * 100.0,
        };
        let (done, total) = (self.num_completed_steps, self.num_total_steps);
        let _ = writeln!(block, "Build Steps:\t{done}/{total} ({cached:.0}% cached)");
        out += &(table::align(&block) + "\n");
        out += &(table::align(&self.config.rows()) + "\n");
        out += &listed("BUILD ARG", &self.build_args);
        out += &listed("LABEL", &self.labels);
        if !self.materials.is_empty() {
            let mut block = "URI\tDIGEST\n".to_owned();
            for material in &self.materials {
                let _ = writeln!(block, "{}\t{}", material.uri, material.digests.join(", "));
            }
            out += &format!("Materials:\n{}\n", table::align(&block));
        }
        if !self.attachments.is_empty() {
            let mut block = "DIGEST\tPLATFORM\tTYPE\n".to_owned();
            for Attached { digest, platform, kind } in &self.attachments {
                let _ = writeln!(block, "{digest}\t{platform}\t{kind}");
            }
            out += &format!("Attachments:\n{}\n", table::align(&block));
        }
        if let Some(error) = &self.error {
            out += &error.excerpt;
            if !error.logs.is_empty() {
                let _ = writeln!(out, "Logs:\n> => {}:", error.name);
                for line in &error.logs {
                    let _ = writeln!(out, "> {line}");
                }
                out.push('\n');
            }
        }
        let _ = writeln!(out, "Print build logs: shipway history logs {}", self.reference);
        out
    }
}

/// gRPC's code of what was canceled.
const CANCELED: i32 = 1;

/// A size in bytes in Docker's units of 1024; what is no number stays.
fn humanized(text: &str) -> String {
    match parse_size(text) {
        Some(bytes) if bytes >= 0 => size::binary(bytes),
        _ => text.to_owned(),
    }
}

impl Config {
    fn rows(&self) -> String {
        let truth = |set: bool| if set { "true".to_owned() } else { String::new() };
        let rows = [
            ("Network", self.network.clone()),
            ("Hostname", self.hostname.clone()),
            ("Extra Hosts", self.extra_hosts.join(", ")),
            ("Cgroup Parent", self.cgroup_parent.clone()),
            ("Image Resolve Mode", self.image_resolve_mode.clone()),
            ("Multi-Platform", truth(self.multi_platform)),
            ("No Cache", truth(self.no_cache)),
            ("No Cache Filter", self.no_cache_filter.join(", ")),
            ("Shm Size", self.shm_size.clone()),
            ("Resource Limits", self.ulimit.clone()),
            ("Memory", humanized(&self.memory)),
            ("Memory Swap", humanized(&self.memory_swap)),
            ("CPU Shares", self.cpu_shares.clone()),
            ("CPU Period", self.cpu_period.clone()),
            ("CPU Quota", self.cpu_quota.clone()),
            ("CPUSet CPUs", self.cpuset_cpus.clone()),
            ("CPUSet Mems", self.cpuset_mems.clone()),
            ("Cache Mount Namespace", self.cache_mount_ns.clone()),
            ("Dockerfile Check Config", self.dockerfile_check_config.clone()),
            ("Source Date Epoch", self.source_date_epoch.clone()),
            ("Sandbox Hostname", self.sandbox_hostname.clone()),
        ];
        let told = rows.iter().filter(|(_, value)| !value.is_empty());
        let told = told.map(|(title, value)| format!("{title}:\t{value}\n"));
        let rest = self.rest_raw.iter().map(|p| format!("{}:\t{}\n", p.name, p.value));
        told.chain(rest).collect()
    }
}

fn listed(title: &str, pairs: &[Pair]) -> String {
    if pairs.is_empty() {
        return String::new();
    }
    let rows: String = pairs.iter().map(|p| format!("{}\t{}\n", p.name, p.value)).collect();
    table::align(&format!("{title}\tVALUE\n{rows}")) + "\n"
}

/// A file of a build, and the platform it is about.
struct File {
    platform: Option<String>,
    blob: HistoryBlob,
}

impl File {
    fn kind(&self) -> &str {
        self.blob.annotations.get(PREDICATE).unwrap_or(&self.blob.media_type)
    }
}

/// All files of a build that the daemon still has.
async fn files(client: &Client, record: &HistoryRecord) -> Result<Vec<File>> {
    let mut files = Vec::new();
    let of = |result: &HistoryResult, platform: Option<&str>, files: &mut Vec<File>| {
        let platform = platform.map(str::to_owned);
        let file = |blob: &HistoryBlob| File { platform: platform.clone(), blob: blob.clone() };
        files.extend(result.attestations.iter().map(file));
    };
    let all = record.result.iter().map(|r| (None, r));
    let all = all.chain(record.results.iter().map(|(p, r)| (Some(p.as_str()), r)));
    for (platform, result) in all {
        of(result, platform, &mut files);
        for blob in result.results.values() {
            walk(client, blob, platform.map(str::to_owned), MAX_DEPTH, &mut files).await?;
        }
    }
    files.sort_by(|a, b| {
        (&a.platform, a.kind().to_owned()).cmp(&(&b.platform, b.kind().to_owned()))
    });
    Ok(files)
}

/// An image that a build made, and the images in it.
fn walk<'a>(
    client: &'a Client,
    blob: &'a HistoryBlob,
    platform: Option<String>,
    depth: usize,
    files: &'a mut Vec<File>,
) -> BoxFuture<'a, Result<()>> {
    Box::pin(async move {
        if depth == 0 || client.blob_size(&blob.digest).await?.is_none() {
            return Ok(());
        }
        let about = blob.annotations.get("vnd.docker.reference.type").map(String::as_str);
        if about != Some("attestation-manifest") {
            files.push(File { platform: platform.clone(), blob: blob.clone() });
        }
        if !media::is_index(&blob.media_type) {
            return Ok(());
        }
        let bytes = client.blob(&blob.digest, MAX_DOCUMENT).await?;
        let index: Index = serde_json::from_slice(&bytes).map_err(|e| {
            Fault::invalid(format!("the index {} cannot be read: {e}", blob.digest))
        })?;
        for entry in index.manifests {
            let platform = entry.platform.as_ref().map(ToString::to_string).or(platform.clone());
            let blob = HistoryBlob {
                media_type: entry.media_type,
                digest: entry.digest.to_string(),
                size: i64::try_from(entry.size).unwrap_or(i64::MAX),
                annotations: entry.annotations,
            };
            walk(client, &blob, platform, depth - 1, files).await?;
        }
        Ok(())
    })
}

/// What provenance says that the build used: both versions of it.
fn materials(provenance: &[u8]) -> Result<Vec<Material>> {
    let statement: Value = serde_json::from_slice(provenance)
        .map_err(|e| Fault::invalid(format!("the provenance cannot be read: {e}")))?;
    // The record keeps what is said; a statement wraps it.
    let said = statement.get("predicate").unwrap_or(&statement);
    let list = said["buildDefinition"]["resolvedDependencies"]
        .as_array()
        .or_else(|| said["materials"].as_array());
    let of = |material: &Value| Material {
        uri: material["uri"].as_str().unwrap_or_default().to_owned(),
        digests: material["digest"]
            .as_object()
            .iter()
            .flat_map(|set| set.iter())
            .map(|(kind, value)| format!("{kind}:{}", value.as_str().unwrap_or_default()))
            .collect(),
    };
    Ok(list.into_iter().flatten().map(of).collect())
}

/// The name of a step, and the last lines that it said.
async fn said(client: &Client, reference: &str, vertex: &str) -> Result<(String, Vec<String>)> {
    let (mut name, mut data) = (String::new(), Vec::new());
    let mut events = client.status(reference).await?;
    while let Some(status) = events.next().await {
        let status = status?;
        if let Some(found) = status.vertexes.iter().find(|v| v.digest == vertex) {
            name.clone_from(&found.name);
        }
        for log in status.logs.iter().filter(|log| log.vertex == vertex) {
            data.extend_from_slice(&log.data);
            // Only the end is shown.
            let excess = data.len().saturating_sub(1 << 20);
            data.drain(..excess);
        }
    }
    let text = String::from_utf8_lossy(&data);
    let lines: Vec<&str> = text.lines().filter(|line| !line.is_empty()).collect();
    let last = lines.len().saturating_sub(LINES);
    Ok((name, lines[last..].iter().map(|line| (*line).to_owned()).collect()))
}

pub(super) async fn run(
    client: &Client,
    args: Args,
    state: impl Fn(&str) -> Option<BuildState>,
) -> Result<()> {
    if let Some(Command::Attachment(args)) = args.command {
        return attachment(client, args).await;
    }
    let asked = args.reference.unwrap_or_default();
    let found = records::find(client, &asked).await?;
    let record = &found.record;
    let state = state(&record.reference);
    let mut shown = Shown::of(&found, state.as_ref());
    if let (Some(failure), Some(error)) = (client.failure(record).await?, &mut shown.error) {
        for detail in failure.details() {
            match detail {
                Detail::Source { file, spans } => error.excerpt += &failure::excerpt(file, spans),
                Detail::Vertex(vertex) if error.name.is_empty() => {
                    (error.name, error.logs) = said(client, &record.reference, vertex).await?;
                }
                _ => {}
            }
        }
        use base64::{Engine as _, engine::general_purpose::STANDARD};
        error.sources = STANDARD.encode(&error.excerpt);
    }
    let files = files(client, record).await?;
    if let Some(provenance) = files.iter().find(|file| file.kind().starts_with(SLSA)) {
        let bytes = client.blob(&provenance.blob.digest, MAX_DOCUMENT).await?;
        shown.materials = materials(&bytes)?;
    }
    shown.attachments = files
        .iter()
        .map(|file| Attached {
            digest: file.blob.digest.clone(),
            platform: file.platform.clone().unwrap_or_default(),
            kind: file.kind().to_owned(),
        })
        .collect();
    let text = match args.format.as_str() {
        "pretty" | "" => shown.pretty(!asked.is_empty()),
        format => {
            let mut value = serde_json::to_value(&shown)
                .map_err(|e| Fault::internal(format!("format the output: {e}")))?;
            match format {
                "json" => template::render_indented("{{json .}}", &value)? + "\n",
                template => {
                    // As a text, which JSON does not have.
                    let nanos = i64::try_from(shown.duration).unwrap_or(i64::MAX);
                    value["Duration"] = GoDuration(nanos).to_string().into();
                    template::render_indented(template, &value)? + "\n"
                }
            }
        }
    };
    output::print(&text)
}

/// Whether a file is of the kind that `--type` names.
fn is_of(kind: &str, asked: &str) -> bool {
    match asked {
        "index" => kind == media::OCI_INDEX,
        "manifest" => kind == media::OCI_MANIFEST,
        "image" => kind == media::OCI_CONFIG,
        "provenance" => kind.starts_with(SLSA),
        "sbom" => kind == SPDX,
        other => kind == other,
    }
}

async fn attachment(client: &Client, args: Attachment) -> Result<()> {
    if args.digest.is_none() && args.kind.is_none() && args.platform.is_none() {
        return Err(Fault::invalid(
            "at least one of --type, --platform or DIGEST must be specified",
        )
        .hint("`shipway history inspect` lists what a build has"));
    }
    let reference = args.reference.unwrap_or_default();
    let found = records::find(client, &reference).await?;
    let digest = match args.digest {
        Some(digest) => digest.to_string(),
        None => {
            let files = files(client, &found.record).await?;
            let platform = args.platform.map(|p| p.to_string());
            let matches = |file: &&File| {
                (platform.is_none() || file.platform == platform)
                    && args.kind.as_deref().is_none_or(|asked| is_of(file.kind(), asked))
            };
            let file = files.iter().find(matches).ok_or_else(|| {
                Fault::not_found(format!("no matching attachment found for ref {reference:?}"))
                    .hint("`shipway history inspect` lists what a build has")
            })?;
            file.blob.digest.clone()
        }
    };
    let mut stream = client.blob_stream(&digest).await?;
    while let Some(part) = stream.next().await {
        output::print_bytes(&part?)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(attrs: &[(&str, &str)]) -> Found {
        let time = |text: &str| timestamp::parse(text).map(Time);
        Found {
            record: HistoryRecord {
                reference: "abc".into(),
                frontend_attrs: attrs
                    .iter()
                    .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
                    .collect(),
                created_at: time("2026-01-02T03:04:05.5Z"),
                completed_at: time("2026-01-02T03:04:07Z"),
                cached_steps: 1,
                total_steps: 4,
                completed_steps: 4,
                ..HistoryRecord::default()
            },
            now: None,
        }
    }

    #[test]
    fn a_record_is_shown_as_buildx_shows_it() {
        let found = found(&[
            ("filename", "x.Dockerfile"),
            ("vcs:localdir:dockerfile", "sub"),
            ("vcs:source", "https://x/y.git"),
            ("vcs:revision", "r1"),
            ("target", "t"),
            ("platform", "linux/amd64,linux/arm64/v8"),
            ("build-arg:A", "1"),
            ("build-arg:BUILDKIT_CONTEXT_KEEP_GIT_DIR", "1"),
            ("label:L", "2"),
            ("context:base", "docker-image://b"),
            ("no-cache", "a,b"),
            ("memory", "67108864"),
            ("memswap", "-1"),
            ("attest:provenance", "mode=max"),
            ("frontend.caps", "x"),
            ("own", "o"),
        ]);
        let mut shown = Shown::of(&found, None);
        shown.materials =
            vec![Material { uri: "pkg:docker/b".into(), digests: vec!["sha256:1".into()] }];
        shown.attachments = vec![Attached {
            digest: "sha256:2".into(),
            platform: "linux/amd64".into(),
            kind: "m".into(),
        }];
        let want = "Name:\t\tsub/x.Dockerfile (t)\n\
            Ref:\t\tabc\n\
            Dockerfile:\tsub/x.Dockerfile\n\
            VCS Repository:\thttps://x/y.git\n\
            VCS Revision:\tr1\n\
            Target:\t\tt\n\
            Platforms:\tlinux/amd64, linux/arm64\n\
            Keep Git Dir:\ttrue\n\n\
            NAMED CONTEXT\tVALUE\n\
            base\t\tdocker-image://b\n\n\
            Started:\t2026-01-02 03:04:05 UTC\n\
            Duration:\t1.5s\n\
            Build Steps:\t4/4 (25% cached)\n\n\
            No Cache Filter:\ta, b\n\
            Memory:\t\t\t64MiB\n\
            Memory Swap:\t\t-1\n\
            own:\t\t\to\n\n\
            BUILD ARG\tVALUE\n\
            A\t\t1\n\n\
            LABEL\tVALUE\n\
            L\t2\n\n\
            Materials:\n\
            URI\t\tDIGEST\n\
            pkg:docker/b\tsha256:1\n\n\
            Attachments:\n\
            DIGEST\t\tPLATFORM\tTYPE\n\
            sha256:2\tlinux/amd64\tm\n\n\
            Print build logs: shipway history logs abc\n";
        assert_eq!(shown.pretty(false), want);
        let json = serde_json::to_value(&shown).expect("encodes");
        assert_eq!(json["Config"]["NoCacheFilter"][1], "b");
        assert_eq!(
            (&json["Duration"], &json["Status"]),
            (&1_500_000_000.into(), &"completed".into())
        );
        assert!(json.get("Error").is_none() && json["Config"].get("Network").is_none());
    }

    #[test]
    fn a_failure_shows_code_and_words() {
        let mut found = found(&[("platform", "?")]);
        found.record.error = Some("process failed".into());
        found.record.error_code = 2;
        let mut shown = Shown::of(&found, None);
        assert_eq!(shown.errors.len(), 1);
        if let Some(error) = &mut shown.error {
            error.name = "[2/2] RUN x".into();
            error.logs = vec!["no such thing".into()];
            error.excerpt = "Dockerfile:1\n".into();
        }
        let text = shown.pretty(true);
        assert!(text.contains("Error:\t\tUnknown process failed\n"), "{text}");
        assert!(
            text.contains("Dockerfile:1\nLogs:\n> => [2/2] RUN x:\n> no such thing\n"),
            "{text}"
        );
        assert!(!text.contains("Ref:"), "{text}");
        found.record.error_code = CANCELED;
        assert!(Shown::of(&found, None).pretty(true).contains("Status:\t\tCanceled\n"));
    }

    #[test]
    fn materials_are_of_either_version() {
        let new = br#"{"buildDefinition":{"resolvedDependencies":[{"uri":"a","digest":{"sha256":"1"}}]}}"#;
        let old = br#"{"predicate":{"materials":[{"uri":"a","digest":{"sha256":"1"}}]}}"#;
        for text in [&new[..], &old[..]] {
            let read = materials(text).expect("reads");
            assert_eq!(read, [Material { uri: "a".into(), digests: vec!["sha256:1".into()] }]);
        }
        assert!(materials(b"[").is_err());
    }
}
