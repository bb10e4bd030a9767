//! The `local` and `tar` exporters: the result's files to the client (rows `ex.local*`, `ex.tar`,
//! `ex.fs.*`).

use crate::{
    options::{Attrs, Epoch},
    port::{ExportAttestation, ExportContext, ExportInput, ExportTarget, Exported, Exporter},
    statements,
};
use async_trait::async_trait;
use shipway_archive::{EntryKind, LayerTree};
use shipway_attest::{Subject, digest_set, filter_inline};
use shipway_fault::{Fault, Result};
use shipway_filesync::{Mapped, SendOptions, SendRoot, Sender, Sent, Stat};
use shipway_gocompat::FileMode;
use shipway_oci::{ChecksumAlgorithm, Digest};
use shipway_refs::LocalMount;
use shipway_session::Delivered;
use std::{
    collections::{BTreeMap, HashMap},
    fs::File,
    io::{ErrorKind, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

/// What both exporters take.
#[derive(Clone, Debug)]
struct TreeOptions {
    epoch: Epoch,
    split: Option<bool>,
    /// What names of attestations' files begin with.
    prefix: String,
}

impl TreeOptions {
    fn new(attrs: &BTreeMap<String, String>) -> Result<Self> {
        let mut attrs = Attrs::new(attrs);
        match attrs.text("mode").as_deref() {
            // The client deletes; what we send is the same (row `ex.local.mode`).
            None | Some("" | "copy" | "delete") => {}
            Some(other) => {
                return Err(Fault::invalid(format!("invalid local exporter mode {other:?}"))
                    .hint("use copy or delete"));
            }
        }
        let prefix = attrs.text("attestation-prefix").unwrap_or_default();
        Ok(Self { epoch: attrs.epoch()?, split: attrs.flag("platform-split")?, prefix })
    }
}

pub(crate) struct LocalExporter {
    options: TreeOptions,
}

pub(crate) struct TarExporter {
    options: TreeOptions,
}

impl LocalExporter {
    pub fn new(attrs: &BTreeMap<String, String>) -> Result<Self> {
        Ok(Self { options: TreeOptions::new(attrs)? })
    }
}

impl TarExporter {
    pub fn new(attrs: &BTreeMap<String, String>) -> Result<Self> {
        Ok(Self { options: TreeOptions::new(attrs)? })
    }
}

/// One platform's files.
struct Part {
    id: String,
    mount: LocalMount,
    /// What is said of them.
    statements: Option<tempfile::TempDir>,
}

impl TreeOptions {
    fn split(&self, input: &ExportInput) -> bool {
        self.split.unwrap_or(input.is_map)
    }

    /// The files of each platform, and what is said of them (row `at.files`).
    async fn parts(&self, input: &ExportInput) -> Result<Vec<Part>> {
        let mut all = Vec::new();
        for p in &input.platforms {
            let (id, mount) = (p.id.replace('/', "_"), p.state.mount().await?);
            let attestations =
                filter_inline(input.attestations.get(&p.id).cloned().unwrap_or_default());
            let statements = match attestations.is_empty() {
                true => None,
                false => Some(
                    self.statements(
                        attestations,
                        &mount,
                        self.epoch.of(&input.metadata, &p.id)?,
                        (input.is_map && !self.split(input)).then_some(&id),
                    )
                    .await?,
                ),
            };
            all.push(Part { id, mount, statements });
        }
        Ok(all)
    }

    async fn statements(
        &self,
        attestations: Vec<ExportAttestation>,
        mount: &LocalMount,
        epoch: Option<SystemTime>,
        id: Option<&String>,
    ) -> Result<tempfile::TempDir> {
        let (read, root) = (statements::read(attestations).await?, mount.path().to_owned());
        let (prefix, id) = (self.prefix.clone(), id.cloned());
        let work = move || {
            let all = statements::statements(&read, &subjects(&root)?);
            let dir = tempfile::tempdir()
                .map_err(|e| Fault::io("make a directory for attestations", e))?;
            for (path, statement) in all {
                let name = file_name(&prefix, &path, id.as_deref());
                if name.contains('/') || name.is_empty() {
                    return Err(Fault::invalid(format!(
                        "invalid name of an attestation's file: {name:?}"
                    )));
                }
                let failed = |e| Fault::io(format!("write the attestation {name}"), e);
                let json = serde_json::to_vec_pretty(&statement)
                    .map_err(|e| Fault::internal(format!("encode an attestation: {e}")))?;
                let path = dir.path().join(&name);
                let file = File::options().write(true).create_new(true).mode(0o600).open(path);
                let mut file = file.map_err(|e| match e.kind() {
                    ErrorKind::AlreadyExists => {
                        Fault::invalid(format!("duplicate attestation path name {name}"))
                    }
                    _ => failed(e),
                })?;
                file.write_all(&json).map_err(failed)?;
                if let Some(epoch) = epoch {
                    file.set_modified(epoch).map_err(failed)?;
                }
            }
            Ok(dir)
        };
        shipway_task::blocking("write attestations", work).await
    }
}

/// Refuses platforms that have the same file: side by side in one directory one would overwrite the
/// other (row `ex.fs.split`).
fn check_apart(trees: &[(String, PathBuf)]) -> Result<()> {
    let mut seen: HashMap<PathBuf, &str> = HashMap::new();
    for (id, root) in trees {
        let mut dirs = vec![PathBuf::new()];
        while let Some(dir) = dirs.pop() {
            let fail = |e| Fault::io(format!("list /{} of {id}", dir.display()), e);
            for entry in std::fs::read_dir(root.join(&dir)).map_err(fail)? {
                let entry = entry.map_err(fail)?;
                let path = dir.join(entry.file_name());
                if entry.file_type().map_err(fail)?.is_dir() {
                    dirs.push(path);
                } else if let Some(other) = seen.insert(path.clone(), id) {
                    let path = path.display();
                    return Err(Fault::invalid(format!("cannot overwrite {path} from {other} with {id} when split option is disabled"))
                        .hint("leave platform-split=false out, and each platform gets a directory"));
                }
            }
        }
    }
    Ok(())
}

/// [`check_apart`] for mounted results.
async fn check_parts_apart(input: &ExportInput, parts: &[Part]) -> Result<()> {
    let trees: Vec<_> = input
        .platforms
        .iter()
        .zip(parts)
        .map(|(p, part)| (p.id.clone(), part.mount.path().to_owned()))
        .collect();
    shipway_task::blocking("compare platforms", move || check_apart(&trees)).await
}

/// What an attestation's file is called; with a platform where files of several platforms lie
/// together.
fn file_name(prefix: &str, path: &str, platform: Option<&str>) -> String {
    let base = path.rsplit('/').next().unwrap_or_default();
    match (platform, base.rsplit_once('.')) {
        (None, _) => format!("{prefix}{base}"),
        (Some(p), Some((stem, extension))) => format!("{prefix}{stem}.{p}.{extension}"),
        (Some(p), None) => format!("{prefix}{base}.{p}"),
    }
}

/// Every regular file with its digest.
fn subjects(root: &Path) -> Result<Vec<Subject>> {
    let mut all = Vec::new();
    let tree = LayerTree::whole(root);
    tree.walk(|entry| {
        if matches!(entry.kind, EntryKind::File | EntryKind::HardLink(_)) {
            let path = tree.locate(&entry);
            let failed = |e| Fault::io(format!("read {}", path.display()), e);
            let checksum =
                ChecksumAlgorithm::Sha256.of(File::open(&path).map_err(failed)?).map_err(failed)?;
            let digest: Digest = checksum
                .parse()
                .map_err(|_| Fault::internal("a checksum is not a valid digest"))?;
            all.push(Subject {
                name: String::from_utf8_lossy(&entry.path).into_owned(),
                digest: digest_set(digest),
            });
        }
        Ok(())
    })?;
    Ok(all)
}

fn nanos(time: SystemTime) -> i64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |d| i64::try_from(d.as_nanos()).unwrap_or(i64::MAX))
}

/// The files of each platform, below its own directory when they are split. The client owns what it
/// receives.
fn send_options(epoch: Option<SystemTime>) -> SendOptions {
    let map = move |stat: &mut Stat| {
        if let Some(epoch) = epoch {
            stat.mod_time = nanos(epoch);
        }
        Mapped::Keep
    };
    SendOptions { map: Some(Arc::new(map)), ..SendOptions::default() }
}

#[async_trait]
impl Exporter for LocalExporter {
    /// What it makes is the client's.
    fn targets(&self, _: Option<&BTreeMap<String, Vec<u8>>>) -> Vec<ExportTarget> {
        Vec::new()
    }

    fn name(&self) -> &str {
        "exporting to client directory"
    }

    async fn export(&self, input: ExportInput, cx: &ExportContext) -> Result<Exported> {
        let session = cx.sessions.hub().get(&cx.session).await?;
        let parts = self.options.parts(&input).await?;
        let split = self.options.split(&input);
        let epoch = self.options.epoch.whole(&input)?;
        let options = send_options(epoch);
        let time = nanos(epoch.unwrap_or_else(SystemTime::now));
        let directory = |id: &String| Stat {
            path: id.clone(),
            mode: FileMode::directory(0o755).0,
            mod_time: time,
            ..Stat::default()
        };
        let root = |part: &Part, dir: &Path| SendRoot {
            dir: dir.to_owned(),
            under: split.then(|| directory(&part.id)),
            options: options.clone(),
        };
        let mut roots = Vec::new();
        for part in &parts {
            roots.push(root(part, part.mount.path()));
            roots.extend(part.statements.as_ref().map(|dir| root(part, dir.path())));
        }
        if !split && parts.len() > 1 {
            check_parts_apart(&input, &parts).await?;
        }
        let merged = parts.iter().any(|p| p.statements.is_some()) || !split && parts.len() > 1;
        let sender = match (split, parts.as_slice()) {
            (false, []) => return Ok(Exported::default()),
            _ if merged => Sender::merged(roots),
            (false, _) => Sender::new(parts[0].mount.path(), options),
            (true, _) => Sender::many(roots)?,
        };
        cx.reporter.status("copying files", 0, 0, false);
        let reporter = cx.reporter.clone();
        let progress =
            move |sent: Sent| reporter.status("copying files", sent.bytes as i64, 0, false);
        let sent =
            sender.on_progress(Arc::new(progress)).run(session.file_send_dir(cx.index)?).await?;
        cx.reporter.status("copying files", sent.bytes as i64, 0, true);
        drop(parts);
        Ok(Exported::default())
    }
}

#[async_trait]
impl Exporter for TarExporter {
    /// What it makes is the client's.
    fn targets(&self, _: Option<&BTreeMap<String, Vec<u8>>>) -> Vec<ExportTarget> {
        Vec::new()
    }

    fn name(&self) -> &str {
        "exporting to client tarball"
    }

    async fn export(&self, input: ExportInput, cx: &ExportContext) -> Result<Exported> {
        let split = self.options.split(&input);
        let session = cx.sessions.hub().get(&cx.session).await?;
        let parts = self.options.parts(&input).await?;
        if !split && parts.len() > 1 {
            check_parts_apart(&input, &parts).await?;
        }
        cx.reporter.status("sending tarball", 0, 0, false);
        let mut sink = session.file_send(cx.index, &BTreeMap::new())?;
        let epoch = self.options.epoch.whole(&input)?.map(|e| nanos(e) / 1_000_000_000);
        let pack = move || {
            let mut trees = Vec::new();
            for part in &parts {
                let below = if split { part.id.clone() } else { String::new() };
                let dirs = [
                    Some(part.mount.path()),
                    part.statements.as_ref().map(tempfile::TempDir::path),
                ];
                trees.extend(
                    dirs.into_iter()
                        .flatten()
                        .map(|dir| (below.clone(), LayerTree::whole(dir).at(epoch))),
                );
            }
            let now = epoch.unwrap_or_else(|| nanos(SystemTime::now()) / 1_000_000_000);
            let mut send = |bytes: bytes::Bytes| {
                sink.blocking_write(&bytes)
                    .map_err(|e| Fault::io("send a tarball to the client", e))
            };
            let sent = shipway_archive::pack_below(&trees, now, &mut send).map(drop);
            (sink, sent)
        };
        let (sink, sent) = shipway_task::blocking("pack a tarball", move || Ok(pack())).await?;
        match sink.finish().await? {
            Delivered::NotNeeded => {}
            Delivered::Taken => sent?,
        }
        cx.reporter.status("sending tarball", 0, 0, true);
        Ok(Exported::default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn platforms_side_by_side_share_directories_but_no_file() {
        let root = tempfile::tempdir().unwrap();
        let tree = |id: &str, files: &[&str]| {
            let dir = root.path().join(id.replace('/', "_"));
            for file in files {
                let path = dir.join(file);
                std::fs::create_dir_all(path.parent().unwrap()).unwrap();
                std::fs::write(path, id).unwrap();
            }
            (id.to_owned(), dir)
        };
        let (a, b) = (tree("linux/amd64", &["bin/a", "x"]), tree("linux/arm64", &["bin/b"]));
        check_apart(&[a.clone(), b]).unwrap();
        let said = check_apart(&[a, tree("linux/386", &["bin/a"])]).unwrap_err().to_string();
        assert!(said.contains("cannot overwrite bin/a from linux/amd64 with linux/386 when split option is disabled"), "{said}");
    }

    #[test]
    fn files_of_attestations_are_named_after_their_platform_where_they_lie_together() {
        assert_eq!(file_name("", "/out/sbom.spdx.json", None), "sbom.spdx.json");
        assert_eq!(
            file_name("x-", "provenance.json", Some("linux_arm64")),
            "x-provenance.linux_arm64.json"
        );
    }
}
