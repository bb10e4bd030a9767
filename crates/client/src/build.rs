//! One build: a session, one `Control.Solve`, and the stream of its events beside it (rows
//! `ctl.solve`, `ctl.status`).

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use prost::Message;
use serde::Serialize;
use shipway_cachemounts::{DIGEST, Direction, FOUND, REQUEST, RESPONSE, Request};
use shipway_dockerconfig::DockerConfig;
use shipway_fault::{Fault, Result};
use shipway_gocompat::parse_bool;
use shipway_grpc::{fault_of, headers::DAEMON_GONE};
use shipway_oci::Digest;
use shipway_proto::{moby::buildkit::v1 as wire, pb};
use tokio::sync::mpsc;
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};

use crate::{
    Client, Status,
    layout::{self, LayoutName},
    policy::Policy,
    question::{Answer, Question},
    session::store as session_store,
    session::{
        Attached, FileTarget, LocalDirs, Receives, Secrets, Services, SshAgents, Stores, Targets,
        Uploads,
    },
};

/// Events that may still come after the end of a build, if each comes within this time of the last.
const LAST_EVENTS: Duration = Duration::from_secs(5);
/// The same for a build that failed before any event came, which usually means that none will.
const NO_EVENTS: Duration = Duration::from_millis(300);
/// How long the answer to a solve may lag behind the end of its session.
const LAST_ANSWER: Duration = Duration::from_secs(5);

/// Where an exporter's output goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// Nowhere on our side.
    None,
    /// A file.
    File(FileTarget),
    /// A directory; with `delete`, what the build did not produce goes.
    Dir {
        /// The directory.
        path: PathBuf,
        /// Whether other content of it is deleted.
        delete: bool,
    },
    /// An OCI layout.
    Layout(PathBuf),
}

/// What becomes of the result.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Export {
    /// The exporter, such as `image`.
    pub kind: String,
    /// Its attributes.
    pub attrs: BTreeMap<String, String>,
    /// Where its output goes.
    pub target: Target,
}

/// A cache to import from or export to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct CacheEntry {
    /// Its kind, such as `registry`.
    #[serde(rename = "Type")]
    pub kind: String,
    /// Its attributes.
    pub attrs: BTreeMap<String, String>,
}

/// A graph to build, as `llb` programs print it.
#[derive(Clone, Debug, PartialEq)]
pub struct Definition(pb::Definition);

impl Definition {
    /// Reads an encoded definition.
    pub fn read(bytes: &[u8]) -> Result<Self> {
        let definition = pb::Definition::decode(bytes)
            .map_err(|e| Fault::invalid(format!("failed to parse input: {e}")))?;
        if definition.def.is_empty() {
            return Err(Fault::invalid(
                "empty definition sent to build. Specify --frontend instead?",
            ));
        }
        Ok(Self(definition))
    }

    /// The file behind `url`, under the name `filename`.
    pub fn download(url: &str, filename: &str) -> Self {
        let attrs = BTreeMap::from([("http.filename".to_owned(), filename.to_owned())]);
        let source = pb::SourceOp { identifier: url.to_owned(), attrs };
        let source =
            pb::Op { op: Some(pb::op::Op::Source(source)), ..Default::default() }.encode_to_vec();
        let digest = Digest::of(&source).to_string();
        let description =
            BTreeMap::from([("llb.customname".to_owned(), format!("[internal] load {url}"))]);
        let metadata = BTreeMap::from([(
            digest.clone(),
            pb::OpMetadata { description, ..Default::default() },
        )]);
        let end = pb::Op { inputs: vec![pb::Input { digest, index: 0 }], ..Default::default() }
            .encode_to_vec();
        Self(pb::Definition { def: vec![source, end], metadata, ..Default::default() })
    }

    pub(crate) fn of_wire(definition: pb::Definition) -> Self {
        Self(definition)
    }

    pub(crate) fn into_wire(self) -> pb::Definition {
        self.0
    }

    /// Lets no step come from the cache.
    pub fn ignore_cache(&mut self) {
        for op in &self.0.def {
            self.0.metadata.entry(Digest::of(op).to_string()).or_default().ignore_cache = true;
        }
    }
}

/// What to build, with what, and what becomes of it.
#[derive(Clone, Debug, Default)]
pub struct SolveOptions {
    /// Id of the build; made up if empty.
    pub reference: String,
    /// The graph, when there is no frontend.
    pub definition: Option<Definition>,
    /// The frontend, such as `dockerfile.v0`.
    pub frontend: String,
    /// Its options.
    pub frontend_attrs: BTreeMap<String, String>,
    /// States that it is given, by name.
    pub frontend_inputs: BTreeMap<String, Definition>,
    /// What becomes of the result.
    pub exports: Vec<Export>,
    /// Caches to write.
    pub cache_exports: Vec<CacheEntry>,
    /// Caches to read.
    pub cache_imports: Vec<CacheEntry>,
    /// Places to save contents of cache mounts to; only our daemon knows them.
    pub mount_saves: Vec<CacheEntry>,
    /// Places to restore contents of cache mounts from.
    pub mount_restores: Vec<CacheEntry>,
    /// Privileges that the build may use.
    pub entitlements: Vec<String>,
    /// Do not list the build in the history.
    pub internal: bool,
    /// What the build may use.
    pub policy: Option<Policy>,
    /// Steps reach the network only through a recording proxy.
    pub proxy_network: bool,
    /// Directories to offer.
    pub dirs: LocalDirs,
    /// OCI layouts to offer, by name.
    pub layouts: BTreeMap<String, PathBuf>,
    /// Secrets to offer.
    pub secrets: Secrets,
    /// Sockets to offer.
    pub ssh: SshAgents,
    /// Streams to offer.
    pub uploads: Uploads,
    /// Credentials to offer.
    pub docker: Option<DockerConfig>,
    /// How long a daemon is waited for that goes away during the build, which is then sent again
    /// ([`Client::build`]); `None` for not at all.
    pub reconnect: Option<Duration>,
    /// Key by which the daemon keeps what it received of the directories; see
    /// [`crate::shared_key`].
    pub shared_key: String,
}

/// A build that went well.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Id of the build.
    pub reference: String,
    /// What exporters answered.
    pub response: BTreeMap<String, String>,
}

/// Why a build failed, and whether that was the end of its daemon and not of the build.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) fault: Fault,
    pub(crate) daemon_gone: bool,
}

impl From<Fault> for Ended {
    fn from(fault: Fault) -> Self {
        Self { fault, daemon_gone: false }
    }
}

/// What the session serves for the exports and caches, and what is to be recorded in layouts
/// afterwards.
pub(crate) struct Plan {
    targets: Targets,
    stores: BTreeMap<String, session_store::Layout>,
    exported: Vec<PathBuf>,
    cached: Vec<(PathBuf, String)>,
    /// Saves of cache mounts by their number: the directory, and what they are called there.
    saved: Vec<(usize, PathBuf, String)>,
    /// Caches that keep nothing but what their index lists.
    reset: Vec<PathBuf>,
}

/// Whether a layout is to lose what its index does not list.
fn resets(attrs: &BTreeMap<String, String>) -> Result<bool> {
    let Some(reset) = attrs.get("reset") else { return Ok(false) };
    parse_bool(reset).ok_or_else(|| {
        Fault::invalid(format!("failed to parse reset attribute: invalid value {reset:?}"))
    })
}

impl Plan {
    pub(crate) fn of(options: &mut SolveOptions) -> Result<Self> {
        let mut plan = Self {
            targets: Targets::default(),
            stores: BTreeMap::new(),
            exported: Vec::new(),
            cached: Vec::new(),
            saved: Vec::new(),
            reset: Vec::new(),
        };
        for (name, dir) in &options.layouts {
            plan.stores.insert(
                format!("oci:{name}"),
                session_store::Layout { dir: dir.clone(), writable: false },
            );
        }
        for (index, export) in options.exports.iter().enumerate() {
            let received = match &export.target {
                Target::None => continue,
                Target::File(target) => Receives::File(target.clone()),
                Target::Dir { path, delete } => {
                    Receives::Dir { path: path.clone(), delete: *delete }
                }
                Target::Layout(dir) => {
                    let layout = session_store::Layout { dir: dir.clone(), writable: true };
                    if plan.stores.insert("export".to_owned(), layout).is_some() {
                        return Err(Fault::invalid("only one output can be an OCI layout"));
                    }
                    plan.exported.push(dir.clone());
                    continue;
                }
            };
            plan.targets.0.insert(index, received);
        }
        plan.caches(options)?;
        plan.mounts(options)?;
        Ok(plan)
    }

    fn caches(&mut self, options: &mut SolveOptions) -> Result<()> {
        for entry in options.cache_exports.iter().filter(|e| e.kind == "local") {
            let dir = entry
                .attrs
                .get("dest")
                .ok_or_else(|| Fault::invalid("local cache exporter requires dest"))?;
            self.offer(dir, true);
            let tag = entry.attrs.get("tag").map_or("latest", String::as_str);
            self.cached.push((dir.into(), tag.to_owned()));
            self.reset.extend(resets(&entry.attrs)?.then(|| PathBuf::from(dir)));
        }
        let mut imports = Vec::new();
        for mut entry in std::mem::take(&mut options.cache_imports) {
            if entry.kind == "local" {
                let dir = entry
                    .attrs
                    .get("src")
                    .ok_or_else(|| Fault::invalid("local cache importer requires src"))?
                    .clone();
                if !entry.attrs.contains_key("digest") {
                    let tag = entry.attrs.get("tag").map_or("latest", String::as_str);
                    match layout::find(dir.as_ref(), tag) {
                        Ok(Some(digest)) => _ = entry.attrs.insert("digest".to_owned(), digest),
                        // A cache that is not there yet does not keep from building.
                        Ok(None) => {
                            tracing::warn!(
                                "local cache import at {dir} skipped: no digest found for tag {tag}"
                            );
                            continue;
                        }
                        Err(fault) => {
                            tracing::warn!("local cache import at {dir} skipped: {fault}");
                            continue;
                        }
                    }
                }
                self.offer(&dir, false);
            }
            imports.push(entry);
        }
        options.cache_imports = imports;
        Ok(())
    }

    /// Lets the daemon read a directory, and write to it if `writable` or if it may already.
    fn offer(&mut self, dir: &str, writable: bool) {
        let layout = self.stores.entry(format!("local:{dir}"));
        let layout =
            layout.or_insert_with(|| session_store::Layout { dir: dir.into(), writable: false });
        layout.writable |= writable;
    }

    /// Finds out what directories have for saves and restores of cache mounts: the names of
    /// artifacts are in their indexes, which the daemon does not see.
    fn mounts(&mut self, options: &mut SolveOptions) -> Result<()> {
        for (number, entry) in options.mount_saves.iter_mut().enumerate() {
            let request = Request::of(&entry.kind, &entry.attrs, Direction::Save)?;
            let Some(dir) = request.attrs.get("dest").filter(|_| entry.kind == "local") else {
                continue;
            };
            // Blobs of any of them are used again.
            let tags = known_tags(dir);
            let exact = tags.iter().find(|(tag, _)| tag == request.keys.exact());
            let other = || tags.iter().rev().find(|(tag, _)| tag.starts_with(&request.base));
            name_found(entry, exact.or_else(other));
            self.offer(dir, true);
            self.saved.push((number, dir.into(), request.keys.exact().to_owned()));
            self.reset.extend(resets(&request.attrs)?.then(|| PathBuf::from(dir)));
        }
        for entry in &mut options.mount_restores {
            let request = Request::of(&entry.kind, &entry.attrs, Direction::Restore)?;
            let Some(dir) = request.attrs.get("src").filter(|_| entry.kind == "local") else {
                continue;
            };
            let tags = known_tags(dir);
            let exact = tags.iter().find(|(tag, _)| tag == request.keys.exact());
            let fallback = || {
                request.keys.fallback().iter().find_map(|prefix| {
                    let same = tags.iter().find(|(tag, _)| tag == prefix);
                    same.or_else(|| tags.iter().rev().find(|(tag, _)| tag.starts_with(prefix)))
                })
            };
            name_found(entry, exact.or_else(fallback));
            self.offer(dir, false);
        }
        Ok(())
    }

    /// Lists in layouts what the build wrote into them, by what it answered.
    pub(crate) fn settle(&self, response: &BTreeMap<String, String>) -> Result<()> {
        record(&self.exported, &self.cached, response)?;
        for (number, dir, name) in &self.saved {
            if let Some(manifest) = response.get(&format!("{RESPONSE}{number}")) {
                layout::put(dir, manifest.as_bytes(), &[LayoutName::Tag(name)])?;
            }
        }
        for dir in &self.reset {
            if let Err(fault) = layout::reset(dir) {
                tracing::warn!("{fault}");
            }
        }
        Ok(())
    }

    /// What the build's session offers, taken from here and from `options`.
    pub(crate) fn services(&mut self, options: &mut SolveOptions) -> Services {
        Services {
            dirs: std::mem::take(&mut options.dirs),
            targets: std::mem::take(&mut self.targets),
            stores: Stores::new(std::mem::take(&mut self.stores)),
            docker: options.docker.take(),
            secrets: std::mem::take(&mut options.secrets),
            ssh: std::mem::take(&mut options.ssh),
            uploads: std::mem::take(&mut options.uploads),
        }
    }
}

/// The tags in a directory's index, the last written last.
fn known_tags(dir: &str) -> Vec<(String, String)> {
    layout::tags(dir.as_ref()).unwrap_or_else(|fault| {
        tracing::warn!("{fault}");
        Vec::new()
    })
}

/// Lets the daemon know which artifact is meant.
fn name_found(entry: &mut CacheEntry, found: Option<&(String, String)>) {
    let (name, digest) = found.cloned().unzip();
    for (key, value) in [(FOUND, name), (DIGEST, digest)] {
        match value {
            Some(value) => entry.attrs.insert(key.to_owned(), value),
            None => entry.attrs.remove(key),
        };
    }
}

/// Cache options, and those of a type of our own for contents of cache mounts.
fn with_mounts(caches: &[CacheEntry], mounts: &[CacheEntry]) -> Vec<wire::CacheOptionsEntry> {
    let ours = |e: &CacheEntry| wire::CacheOptionsEntry {
        r#type: format!("{REQUEST}{}", e.kind),
        attrs: e.attrs.clone(),
    };
    entries(caches).into_iter().chain(mounts.iter().map(ours)).collect()
}

fn entries(list: &[CacheEntry]) -> Vec<wire::CacheOptionsEntry> {
    list.iter()
        .map(|e| wire::CacheOptionsEntry { r#type: e.kind.clone(), attrs: e.attrs.clone() })
        .collect()
}

/// The request, without the session that is not open yet.
fn request(options: SolveOptions) -> Result<wire::SolveRequest> {
    let mut attrs = options.frontend_attrs;
    if !options.frontend.is_empty() && !options.cache_imports.is_empty() {
        let imports = serde_json::to_string(&options.cache_imports)
            .map_err(|e| Fault::internal(format!("encode cache imports: {e}")))?;
        attrs.insert("cache-imports".to_owned(), imports);
    }
    let first = options.exports.first().cloned();
    Ok(wire::SolveRequest {
        r#ref: options.reference,
        definition: options.definition.map(|d| d.0),
        exporter_deprecated: first.as_ref().map(|e| e.kind.clone()).unwrap_or_default(),
        exporter_attrs_deprecated: first.map(|e| e.attrs).unwrap_or_default(),
        exporters: options
            .exports
            .into_iter()
            .map(|e| wire::Exporter { r#type: e.kind, attrs: e.attrs })
            .collect(),
        frontend: options.frontend,
        frontend_attrs: attrs,
        frontend_inputs: options.frontend_inputs.into_iter().map(|(name, d)| (name, d.0)).collect(),
        cache: Some(wire::CacheOptions {
            exports: with_mounts(&options.cache_exports, &options.mount_saves),
            imports: with_mounts(&options.cache_imports, &options.mount_restores),
            ..Default::default()
        }),
        entitlements: options.entitlements,
        internal: options.internal,
        source_policy: options.policy.map(|p| p.0),
        proxy_network: options.proxy_network,
        ..Default::default()
    })
}

/// A build whose session is open and whose events are followed, before it is requested.
pub(crate) struct Opened {
    pub reference: String,
    pub plan: Plan,
    pub request: wire::SolveRequest,
    pub session: Attached,
    pub followed: Followed,
}

/// The stream of a build's events, followed beside the solve.
pub(crate) struct Followed {
    done: CancellationToken,
    any: Arc<AtomicBool>,
    task: AbortOnDropHandle<()>,
}

impl Followed {
    pub(crate) fn start(client: &Client, reference: String, events: mpsc::Sender<Status>) -> Self {
        let (done, any) = (CancellationToken::new(), Arc::new(AtomicBool::new(false)));
        let mut control = client.control();
        let (ended, seen) = (done.clone(), any.clone());
        let task = async move {
            let mut stream = match control.status(wire::StatusRequest { r#ref: reference }).await {
                Ok(answer) => answer.into_inner(),
                Err(status) => return tracing::debug!(%status, "failed to get status"),
            };
            loop {
                let message = tokio::select! {
                    message = stream.message() => message,
                    () = async { ended.cancelled().await; tokio::time::sleep(LAST_EVENTS).await } => return,
                };
                match message {
                    Ok(Some(message)) => {
                        seen.store(true, Ordering::Relaxed);
                        if events.send(message.into()).await.is_err() {
                            return;
                        }
                    }
                    Ok(None) => return,
                    Err(status) => return tracing::debug!(%status, "failed to receive status"),
                }
            }
        };
        Self {
            done,
            any,
            task: AbortOnDropHandle::new(shipway_task::spawn("serve questions", task)),
        }
    }

    /// Waits for the last events.
    pub(crate) async fn finish(self, failed: bool) {
        self.done.cancel();
        if failed && !self.any.load(Ordering::Relaxed) {
            let _ = tokio::time::timeout(NO_EVENTS, self.task).await;
        } else {
            let _ = self.task.await;
        }
    }
}

impl Client {
    /// Asks the frontend what its attribute `requestid` says; nothing is built. Events and `stop`
    /// are as for a build.
    pub async fn ask(
        &self,
        mut options: SolveOptions,
        events: mpsc::Sender<Status>,
        stop: CancellationToken,
    ) -> Result<Answer> {
        if options.frontend.is_empty() {
            return Err(Fault::invalid("a question needs a frontend"));
        }
        let inputs = std::mem::take(&mut options.frontend_inputs)
            .into_iter()
            .map(|(name, d)| (name, d.0))
            .collect();
        let question = Question::new(
            std::mem::take(&mut options.frontend),
            options.frontend_attrs.clone(),
            inputs,
        );
        let driven = self.drive(options, Some(question), events, stop).await;
        driven.map(|(_, answer)| answer).map_err(|ended| ended.fault)
    }

    /// Attaches the session of a build that is about to be requested, and follows it.
    pub(crate) async fn attach(
        &self,
        mut options: SolveOptions,
        events: mpsc::Sender<Status>,
    ) -> Result<Opened> {
        if options.reference.is_empty() {
            options.reference = shipway_host::random_id()?;
        }
        let mut plan = Plan::of(&mut options)?;
        let services = plan.services(&mut options);
        let (shared_key, reference) =
            (std::mem::take(&mut options.shared_key), options.reference.clone());
        let mut request = request(options)?;
        let session = services.attach(self, &shared_key).await?;
        request.session = session.id.clone();
        let followed = Followed::start(self, reference.clone(), events);
        Ok(Opened { reference, plan, request, session, followed })
    }

    pub(crate) async fn drive(
        &self,
        options: SolveOptions,
        question: Option<Question>,
        events: mpsc::Sender<Status>,
        stop: CancellationToken,
    ) -> Result<(Outcome, Answer), Ended> {
        let Opened { reference, plan, request, mut session, followed } =
            self.attach(options, events).await?;
        let mut control = self.control();
        let asked = async {
            match question {
                Some(question) => question.ask(self.calls(), &reference).await,
                None => Ok(Answer::new()),
            }
        };
        // A failed question ends the build with its failure, which therefore is the one to report.
        let mut solve = Box::pin(async {
            let (solved, asked) = tokio::join!(control.solve(request), asked);
            solved.map(|solved| (solved, asked))
        });
        let solved = tokio::select! {
            answer = &mut solve => answer.map_err(|s| ended(&s)),
            () = stop.cancelled() => Err(Fault::cancelled().into()),
            fault = session.ended() => match tokio::time::timeout(LAST_ANSWER, &mut solve).await {
                Ok(answer) => answer.map_err(|s| ended(&s)),
                Err(_) => Err(fault.into()),
            },
        };
        let solved =
            solved.map_err(|e: Ended| Ended { fault: e.fault.context("failed to solve"), ..e });
        // Dropping the call is what cancels the build; only then the last events can come.
        drop(solve);
        drop(session);
        followed.finish(solved.is_err()).await;
        let (solved, answer) = solved?;
        let response = solved.into_inner().exporter_response;
        plan.settle(&response)?;
        Ok((Outcome { reference, response }, answer?))
    }
}

/// A failed solve, and whether the daemon failed rather than the build.
fn ended(status: &tonic::Status) -> Ended {
    let broken =
        std::error::Error::source(status).is_some() && status.code() != tonic::Code::Cancelled;
    let daemon_gone = broken || status.metadata().contains_key(DAEMON_GONE);
    Ended { fault: solve_fault(status), daemon_gone }
}

/// A failed solve: what the daemon says, or that it can say nothing any more.
pub(crate) fn solve_fault(status: &tonic::Status) -> Fault {
    // Only what our own end found out has a source; what comes over the wire has none.
    let mut cause: &dyn std::error::Error = match std::error::Error::source(status) {
        Some(cause) if status.code() != tonic::Code::Cancelled => cause,
        _ => return fault_of(status),
    };
    while let Some(deeper) = cause.source() {
        cause = deeper;
    }
    Fault::unavailable(format!("the connection to the daemon broke during the build: {cause}"))
        .hint("the daemon's log says whether it stopped and why, for example `journalctl -u shipwayd`")
        .hint("steps that had ended are in the cache: build again to go on from there")
}

/// Lists in layouts what was written into them.
fn record(
    exported: &[PathBuf],
    cached: &[(PathBuf, String)],
    response: &BTreeMap<String, String>,
) -> Result<()> {
    if let Some(manifest) = response.get("cache.manifest") {
        for (dir, tag) in cached {
            layout::put(dir, manifest.as_bytes(), &[LayoutName::Tag(tag)])?;
        }
    }
    if let Some(descriptor) = response.get("containerimage.descriptor") {
        use base64::{Engine, engine::general_purpose::STANDARD};
        let broken = |e: base64::DecodeError| {
            Fault::invalid(format!("the daemon's image descriptor cannot be read: {e}"))
        };
        for dir in exported {
            let descriptor = STANDARD.decode(descriptor).map_err(broken)?;
            let names: Vec<LayoutName<'_>> = match response.get("image.name") {
                Some(names) => names.split(',').map(LayoutName::Image).collect(),
                None => vec![LayoutName::Tag("latest")],
            };
            layout::put(dir, &descriptor, &names)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cache_mounts_are_asked_for_with_what_directories_have_of_them() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().to_str().expect("text");
        for (tag, digest) in [("m-main", "sha256:a"), ("m-main-2", "sha256:b"), ("m", "sha256:c")] {
            let descriptor = format!("{{\"digest\":\"{digest}\"}}");
            layout::put(dir.path(), descriptor.as_bytes(), &[LayoutName::Tag(tag)]).expect("puts");
        }
        let entry = |kind: &str, attrs: &[(&str, &str)]| CacheEntry {
            kind: kind.to_owned(),
            attrs: attrs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect(),
        };
        let restore = |key, fallback| {
            entry("local", &[("src", path), ("tag", "m"), ("key", key), ("fallback", fallback)])
        };
        let mut options = SolveOptions {
            frontend: "dockerfile.v0".to_owned(),
            cache_imports: vec![entry("registry", &[("ref", "r.example/c")])],
            mount_saves: vec![
                entry("registry", &[("ref", "r.example/m")]),
                entry("local", &[("dest", path), ("tag", "m"), ("key", "new")]),
            ],
            mount_restores: vec![
                restore("main", ""),
                restore("x", "main"),
                restore("x", "main-"),
                restore("x", "y"),
            ],
            ..SolveOptions::default()
        };
        let plan = Plan::of(&mut options).expect("a plan");
        assert_eq!(plan.saved, [(1, dir.path().to_owned(), "m-new".to_owned())]);
        assert!(plan.stores[&format!("local:{path}")].writable);
        let request = request(options).expect("a request");
        assert!(!request.frontend_attrs["cache-imports"].contains("mounts"));
        let cache = request.cache.expect("cache options");
        let shown = |all: &[wire::CacheOptionsEntry]| {
            let found = |e: &wire::CacheOptionsEntry| {
                let of = |key: &str| e.attrs.get(key).cloned().unwrap_or_default();
                format!("{} {} {}", e.r#type, of(FOUND), of(DIGEST))
            };
            all.iter().map(found).collect::<Vec<_>>()
        };
        // The blobs of the last one are used again.
        let saves = ["shipway.cache-mounts.registry  ", "shipway.cache-mounts.local m sha256:c"];
        assert_eq!(shown(&cache.exports), saves);
        let restores = [
            "registry  ",
            "shipway.cache-mounts.local m-main sha256:a",
            "shipway.cache-mounts.local m-main sha256:a",
            "shipway.cache-mounts.local m-main-2 sha256:b",
            "shipway.cache-mounts.local  ",
        ];
        assert_eq!(shown(&cache.imports), restores);
    }
}
