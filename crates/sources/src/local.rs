//! `local://`: a client's directory, transferred into a state that is kept for the next transfer
//! (rows `src.local*`).

use crate::{
    PinnedSource, SourceContext, SourceSpec,
    clients::{ClientDirectory, ClientServices},
    keys,
    port::Source,
};
use futures::{FutureExt as _, future::BoxFuture};
use parking_lot::Mutex;
use serde::Serialize;
use shipway_attest::Capture;
use shipway_fault::{Context, Fault, Result};
use shipway_filesync::{
    ContentHash, Differ, FileSyncRequest, HashSink, KnownTree, PatternMatcher, ReceiveOptions,
    Received, Receiver, Stat, announced,
};
use shipway_gocompat::{FileMode, parse_bool};
use shipway_oci::Digest;
use shipway_progress::Reporter;
use shipway_refs::{ImmutableRef, NamedRequest, RecordType, RefId, RefStore, Sharing};
use shipway_session::SessionId;
use shipway_treehash::{FileHasher, FileStat, TreeIndex};
use std::{
    collections::HashMap,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

/// How often a transfer reports its progress.
const REPORT_EVERY: Duration = Duration::from_millis(100);
/// Most directories whose contents are remembered, so that the next transfer need not walk them.
const MAX_KNOWN: usize = 64;
/// Most entries that are remembered of all directories.
const MAX_ENTRIES: usize = 100_000;
/// Most files whose identities are remembered of directories that are walked.
const MAX_IDENTITIES: usize = 2_000_000;
/// Most patterns of a kind that are taken from an attribute.
const MAX_PATTERNS: usize = 100_000;

/// Clients' directories.
pub(crate) struct LocalSource {
    refs: RefStore,
    known: Mutex<HashMap<RefId, Known>>,
}

/// What is remembered of a directory.
enum Known {
    /// All that it holds.
    Tree(KnownTree),
    /// What a walk does not show of it.
    Identities(Vec<u64>),
}

impl Known {
    /// Entries, and files that have only an identity.
    fn len(&self) -> (usize, usize) {
        match self {
            Self::Tree(tree) => (tree.len(), 0),
            Self::Identities(identities) => (0, identities.len()),
        }
    }
}

/// Most names that are taken of a directory.
const MAX_NAMES: usize = 10_000;

/// A parsed local source.
#[derive(Debug, Default, PartialEq, Eq)]
struct LocalSpec {
    request: FileSyncRequest,
    session: Option<SessionId>,
    hint: String,
    differ: Differ,
    /// The only files whose content is wanted.
    listed: Option<Vec<String>>,
}

impl LocalSpec {
    fn parse(spec: &SourceSpec, name: &str) -> Result<Self> {
        let request =
            FileSyncRequest { dir_name: name.to_owned(), identify: true, ..Default::default() };
        let mut local = Self { request, ..Default::default() };
        for (key, value) in &spec.attrs {
            match key.as_str() {
                "local.session" => {
                    // `prefix:id` comes from clients with several contexts; the prefix is part of
                    // the name.
                    let (prefix, id) = value
                        .split_once(':')
                        .map_or((None, value.as_str()), |(p, id)| (Some(p), id));
                    if let Some(prefix) = prefix {
                        local.request.dir_name = format!("{prefix}-{name}");
                    }
                    local.session = Some(id).filter(|id| !id.is_empty()).map(SessionId::new);
                }
                "local.includepattern" => local.request.include = patterns(key, value)?,
                "local.excludepatterns" => local.request.exclude = patterns(key, value)?,
                "local.followpaths" => local.request.follow = patterns(key, value)?,
                "local.sharedkeyhint" => local.hint.clone_from(value),
                "local.differ" => {
                    local.differ = match value.as_str() {
                        "" | "metadata" => Differ::Metadata,
                        "none" => Differ::None,
                        _ => {
                            return Err(Fault::invalid(format!(
                                "{key}={value:?} is wrong: want metadata or none"
                            )));
                        }
                    }
                }
                "local.metadatatransfer" => match parse_bool(value) {
                    Some(true) => drop(local.listed.get_or_insert_default()),
                    Some(false) => local.listed = None,
                    None => {
                        return Err(Fault::invalid(format!("invalid value for {key} {value:?}")));
                    }
                },
                // Attributes come in the order of their names, so this is known to mean something.
                "local.metadatatransferexclude" => {
                    if let Some(listed) = &mut local.listed {
                        *listed = patterns(key, value)?;
                    }
                }
                _ => {}
            }
        }
        Ok(local)
    }
}

fn patterns(key: &str, value: &str) -> Result<Vec<String>> {
    // Go writes an absent list as `null`.
    let list: Option<Vec<String>> = serde_json::from_str(value)
        .map_err(|e| Fault::invalid(format!("{key} is not a JSON list of patterns: {e}")))?;
    let list = list.unwrap_or_default();
    if list.len() > MAX_PATTERNS {
        return Err(Fault::invalid(format!(
            "{key} has {} patterns, more than the {MAX_PATTERNS} accepted",
            list.len()
        )));
    }
    Ok(list)
}

#[derive(Serialize)]
struct LocalKey<'a> {
    session: &'a str,
    name: &'a str,
    include: &'a [String],
    exclude: &'a [String],
    follow: &'a [String],
    listed: Option<&'a [String]>,
}

impl LocalSource {
    pub(crate) fn new(refs: RefStore) -> Self {
        Self { refs, known: Mutex::default() }
    }

    /// Names directly in `dir` of a client's directory; nothing is transferred.
    pub(crate) async fn names(
        &self,
        name: &str,
        session: &SessionId,
        dir: &str,
        clients: &dyn ClientServices,
    ) -> Result<Vec<String>> {
        let below =
            |rest: &str| if dir.is_empty() { rest.to_owned() } else { format!("{dir}/{rest}") };
        let request = FileSyncRequest {
            dir_name: name.to_owned(),
            include: vec![below("*")],
            exclude: vec![below("*/*")],
            ..FileSyncRequest::default()
        };
        let Some(directory) = clients.directories(Some(session)).await?.into_iter().next() else {
            return Ok(Vec::new());
        };
        let paths = announced(directory.open(&request).await?, MAX_NAMES).await?;
        let prefix = below("");
        Ok(paths
            .iter()
            .filter_map(|p| p.strip_prefix(&prefix))
            .filter(|n| !n.is_empty() && !n.contains('/'))
            .map(str::to_owned)
            .collect())
    }

    async fn transfer(
        &self,
        local: &LocalSpec,
        directory: &dyn ClientDirectory,
        reporter: &Reporter,
    ) -> Result<ImmutableRef> {
        let name = &local.request.dir_name;
        let description = format!("local source for {name}");
        let listed = local.listed.as_ref().map(PatternMatcher::new).transpose()?.map(Arc::new);
        let request = NamedRequest {
            record_type: RecordType::LocalSource,
            key: format!(
                "local:{name}:{}:{}{}",
                local.hint,
                directory.shared_key(),
                if local.listed.is_some() { ":metadata" } else { "" }
            ),
            description: description.clone(),
            sharing: Sharing::Private,
            parent: None,
        };
        let state =
            self.refs.named(request).await.context(|| format!("prepare the {description}"))?;
        let known = self.take_known(state.id());
        let mount = state.mount().await?;
        let known = match known {
            _ if state.is_fresh() => Some(KnownTree::default()),
            Some(Known::Tree(tree)) => Some(tree),
            Some(Known::Identities(identities)) => {
                let dir = mount.path().to_owned();
                let walk = move || KnownTree::scan_identified(&dir, &identities);
                let tree = shipway_task::blocking("walk a directory", walk).await;
                Some(tree.context(|| format!("look at the {description}"))?)
            }
            None => None,
        };
        let stream = directory.open(&local.request).await?;
        let options = ReceiveOptions {
            differ: local.differ,
            known,
            listed,
            progress: Some(progress_of(name, reporter)),
            hash: Some(Arc::new(TransferHasher)),
            ..Default::default()
        };
        let digests = IndexGuard::begin(state.index());
        let received = Receiver::new(mount.path(), options)
            .run(stream)
            .await
            .context(|| format!("transfer {name}"))?;
        digests.end(&received);
        mount.unmount().await?;
        self.put_known(state.id().clone(), received.tree);
        state.freeze(description).await
    }

    fn take_known(&self, id: &RefId) -> Option<Known> {
        self.known.lock().remove(id)
    }

    fn put_known(&self, id: RefId, tree: KnownTree) {
        let new = if tree.len() > MAX_ENTRIES {
            Known::Identities(tree.identities())
        } else {
            Known::Tree(tree)
        };
        let mut known = self.known.lock();
        let full = |known: &HashMap<RefId, Known>| {
            let (entries, identities) = known
                .values()
                .chain([&new])
                .map(Known::len)
                .fold((0, 0), |a, b| (a.0 + b.0, a.1 + b.1));
            known.len() >= MAX_KNOWN || entries > MAX_ENTRIES || identities > MAX_IDENTITIES
        };
        while full(&known) {
            // Forgetting costs a walk, and a transfer for a client that identifies its files: which
            // one goes does not matter.
            let Some(other) = known.keys().next().cloned() else { return };
            known.remove(&other);
        }
        known.insert(id, new);
    }
}

impl Source for LocalSource {
    /// The key means nothing beyond the session (row `src.local.key`): steps depend on what they
    /// read instead.
    fn pin<'a>(
        &'a self,
        spec: &'a SourceSpec,
        cx: &'a SourceContext,
    ) -> BoxFuture<'a, Result<PinnedSource>> {
        async move {
            let local = LocalSpec::parse(spec, spec.locator())?;
            let session = local.session.clone().or_else(|| cx.clients.session_id());
            let session = session
                .ok_or_else(|| Fault::invalid("could not access local files without session"))?;
            let FileSyncRequest { dir_name: name, include, exclude, follow, .. } = &local.request;
            let listed = local.listed.as_deref();
            let key = keys::digest(
                "local",
                &LocalKey { session: session.as_str(), name, include, exclude, follow, listed },
            );
            Ok(PinnedSource {
                keys: vec![key],
                ephemeral: true,
                digest: Some(key.to_string()),
                stored: None,
            })
        }
        .boxed()
    }

    fn fetch<'a>(
        &'a self,
        spec: &'a SourceSpec,
        _pin: &'a PinnedSource,
        cx: &'a SourceContext,
    ) -> BoxFuture<'a, Result<ImmutableRef>> {
        async move {
            let local = LocalSpec::parse(spec, spec.locator())?;
            let mut last = Fault::invalid(format!(
                "no attached client has the directory {:?}",
                local.request.dir_name
            ));
            for directory in cx.clients.directories(local.session.as_ref()).await? {
                match self.transfer(&local, &*directory, &cx.reporter).await {
                    Ok(state) => return Ok(state),
                    // This client has no such directory; another one of the build may.
                    Err(e) if e.is_not_found() => last = e,
                    Err(e) => return Err(e),
                }
            }
            Err(last)
        }
        .boxed()
    }

    fn capture(&self, spec: &SourceSpec, _pin: &PinnedSource, capture: &mut Capture) -> Result<()> {
        capture.add_local(spec.locator());
        Ok(())
    }
}

/// Hashes files as they come, in the way that checksums of trees are made of.
struct TransferHasher;

/// What the hash needs to know of a file.
fn file_stat(mode: FileMode, uid: u32, gid: u32, size: i64, mtime: i64) -> FileStat {
    FileStat { size, mode: mode.permissions(), uid, gid, mtime }
}

impl ContentHash for TransferHasher {
    fn start(&self, stat: &Stat) -> Box<dyn HashSink> {
        Box::new(Sink(FileHasher::new(&file_stat(
            FileMode(stat.mode),
            stat.uid,
            stat.gid,
            stat.size,
            stat.mod_time,
        ))))
    }
}

struct Sink(FileHasher);

impl HashSink for Sink {
    fn update(&mut self, data: &[u8]) {
        self.0.update(data);
    }

    fn finish(self: Box<Self>) -> [u8; 32] {
        *self.0.finish().as_bytes()
    }
}

/// Keeps the index of a directory true while it is written. A transfer that does not come to its
/// end leaves nothing to trust.
struct IndexGuard(Option<TreeIndex>);

impl IndexGuard {
    fn begin(index: &TreeIndex) -> Self {
        Self(Some(index.clone()))
    }

    fn end(mut self, received: &Received) {
        let Some(index) = self.0.take() else { return };
        for change in &received.changes {
            let path = Path::new(&*change.path);
            match (change.digest, received.tree.get(&change.path)) {
                // A file that changed while it was sent has a time that no file has.
                (Some(digest), Some(e)) if e.has_content() && e.mtime != i64::MIN => {
                    index.record(
                        path,
                        &file_stat(e.mode, e.uid, e.gid, e.size, e.mtime),
                        Digest::from_bytes(digest),
                    );
                }
                _ => index.forget(path),
            }
        }
    }
}

impl Drop for IndexGuard {
    fn drop(&mut self) {
        if let Some(index) = &self.0 {
            index.clear();
        }
    }
}

type ProgressFn = Arc<dyn Fn(shipway_filesync::Progress) + Send + Sync>;

/// The counter that clients show as `transferring context: 2B`.
fn progress_of(name: &str, reporter: &Reporter) -> ProgressFn {
    let (id, reporter) = (format!("transferring {name}:"), reporter.clone());
    let last = Mutex::new(None::<Instant>);
    Arc::new(move |p| {
        let mut last = last.lock();
        if p.done || last.is_none_or(|t| t.elapsed() >= REPORT_EVERY) {
            *last = Some(Instant::now());
            reporter.named_status(id.clone(), "transferring", p.bytes as i64, 0, p.done);
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{SourceMemo, clients::SshAgent};
    use async_trait::async_trait;
    use shipway_filesync::{PacketStream, SendOptions, Sender};
    use shipway_oci::Platform;
    use shipway_storage::fake::FakeStorage;

    #[track_caller]
    fn parse(attrs: &[(&str, &str)]) -> Result<LocalSpec> {
        let attrs = attrs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        LocalSpec::parse(
            &SourceSpec { identifier: "local://context".into(), attrs, platform: Platform::host() },
            "context",
        )
    }

    #[test]
    fn attributes_are_read_as_clients_write_them() {
        let local = parse(&[
            ("local.session", "pre:s1"),
            ("local.excludepatterns", "[\"a\",\"!b\"]"),
            ("local.followpaths", "null"),
        ])
        .unwrap();
        assert_eq!(
            (local.request.dir_name.as_str(), local.session.as_ref().map(SessionId::as_str)),
            ("pre-context", Some("s1"))
        );
        assert_eq!((local.request.exclude.len(), local.request.follow.len()), (2, 0));
        assert!(parse(&[("local.includepattern", "a")]).is_err());
        assert!(parse(&[("local.differ", "b")]).is_err());
    }

    /// A client with one directory.
    struct Client {
        dir: std::path::PathBuf,
        asked: Mutex<Vec<FileSyncRequest>>,
    }

    #[async_trait]
    impl ClientDirectory for Client {
        fn shared_key(&self) -> &str {
            "client"
        }

        async fn open(&self, request: &FileSyncRequest) -> Result<PacketStream> {
            self.asked.lock().push(request.clone());
            if request.dir_name != "context" {
                return Err(Fault::not_found(format!(
                    "no access allowed to dir {:?}",
                    request.dir_name
                )));
            }
            let (near, far) = PacketStream::pair();
            let options = SendOptions { identify: request.identify, ..SendOptions::default() };
            shipway_task::spawn("send a directory", Sender::new(&self.dir, options).run(far));
            Ok(near)
        }
    }

    struct Clients(Arc<Client>);

    #[async_trait]
    impl ClientServices for Clients {
        fn credentials(&self) -> Arc<dyn shipway_registry::CredentialSource> {
            Arc::new(shipway_registry::Anonymous)
        }
        async fn secret(&self, _: &str) -> Result<Option<Vec<u8>>> {
            Ok(None)
        }
        async fn directories(
            &self,
            _: Option<&SessionId>,
        ) -> Result<Vec<Arc<dyn ClientDirectory>>> {
            Ok(vec![self.0.clone()])
        }
        async fn ssh_agent(&self, _: &str) -> Result<SshAgent> {
            Err(Fault::unimplemented("agents"))
        }
        fn session_id(&self) -> Option<SessionId> {
            Some("s1".into())
        }
    }

    #[tokio::test]
    async fn a_directory_is_kept_between_transfers_and_follows_the_client() {
        let (root, client) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let refs = RefStore::open(FakeStorage::new().unwrap().storage(), root.path().to_owned())
            .await
            .unwrap();
        let locals = LocalSource::new(refs.clone());
        let clients =
            Clients(Arc::new(Client { dir: client.path().to_owned(), asked: Mutex::default() }));
        let cx = SourceContext {
            clients: Arc::new(clients),
            reporter: Reporter::new(shipway_oci::Digest::of(""), "v".into(), vec![], None),
            memo: SourceMemo::default(),
        };
        let source = SourceSpec {
            identifier: "local://context".into(),
            attrs: Default::default(),
            platform: Platform::host(),
        };
        std::fs::write(client.path().join("a"), "1").unwrap();

        let pin = locals.pin(&source, &cx).await.unwrap();
        assert!(pin.ephemeral);
        let first = locals.fetch(&source, &pin, &cx).await.unwrap();
        let id = first.id().clone();
        let read = async |state: &ImmutableRef, name: &str| {
            let mount = state.mount().await.unwrap();
            std::fs::read_to_string(mount.path().join(name)).ok()
        };
        assert_eq!(read(&first, "a").await.as_deref(), Some("1"));
        drop(first);
        std::fs::remove_file(client.path().join("a")).unwrap();
        std::fs::write(client.path().join("b"), "2").unwrap();
        let second = locals.fetch(&source, &pin, &cx).await.unwrap();
        assert_eq!(
            (read(&second, "a").await, read(&second, "b").await.as_deref()),
            (None, Some("2"))
        );
        assert_eq!(locals.known.lock().len(), 1, "{id} was used again");

        // Another checkout in the same place: equal names, sizes and times.
        let time = std::time::SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000);
        let put = |text: &str| {
            std::fs::remove_file(client.path().join("b")).unwrap();
            std::fs::write(client.path().join("b"), text).unwrap();
            std::fs::File::options()
                .write(true)
                .open(client.path().join("b"))
                .unwrap()
                .set_modified(time)
                .unwrap();
        };
        put("3");
        drop(second);
        let third = locals.fetch(&source, &pin, &cx).await.unwrap();
        put("4");
        drop(third);
        let second = locals.fetch(&source, &pin, &cx).await.unwrap();
        assert_eq!(read(&second, "b").await.as_deref(), Some("4"));

        let other = SourceSpec { identifier: "local://other".into(), ..source };
        let fault = locals.fetch(&other, &pin, &cx).await.err().unwrap();
        assert!(fault.to_string().contains("no access allowed"), "{fault}");
        drop(second);
        refs.drained().await;
    }
}
