//! Reads archives of images: OCI layouts in a tar, and what `docker save` wrote before it wrote
//! such (`manifest.json` with layers by path).

use crate::tarball::{IMAGE_NAME, REF_NAME};
use async_trait::async_trait;
use bytes::Bytes;
use futures::{StreamExt as _, stream};
use serde::Deserialize;
use shipway_archive::{MemberKind, TarReader, inflate};
use shipway_convert::{Source, file_stream};
use shipway_fault::{Code, Fault, Result};
use shipway_oci::{Descriptor, Digest, Hasher, Index, Manifest, media};
use shipway_registry::BodyStream;
use std::{
    cell::Cell,
    collections::{BTreeMap, HashMap},
    fs::File,
    io::{BufReader, Read, Seek as _, Write as _},
    os::unix::fs::FileExt as _,
    path::Path,
    rc::Rc,
    sync::Arc,
};

/// Most members of an archive.
const MAX_MEMBERS: usize = 100_000;
/// Most bytes of a manifest, an index or a config.
const MAX_DOCUMENT: u64 = 4 << 20;
/// Most images in an archive, and layers of an image.
const MAX_ENTRIES: usize = 1000;
/// Most bytes that a compressed archive becomes, or that come through a pipe.
const MAX_SPOOL: u64 = 1 << 40;
/// Most links from one member to another that are followed.
const MAX_LINKS: usize = 4;

/// Where a member's contents are in the archive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Region {
    start: u64,
    len: u64,
}

/// A member that is a file, or another name of one.
enum Member {
    File(Region),
    Link(String),
}

/// An archive of images.
pub struct Archive {
    file: Arc<File>,
    members: HashMap<String, Member>,
    /// Manifests that were made of `manifest.json`, and where blobs are that have no name by
    /// digest.
    made: HashMap<Digest, Bytes>,
    blobs: HashMap<Digest, Region>,
    images: Vec<(Option<String>, Descriptor)>,
}

/// One image of an archive.
pub struct ArchiveImage {
    archive: Arc<Archive>,
    root: Descriptor,
}

/// Counts what is read.
struct Counted<R> {
    from: R,
    at: Rc<Cell<u64>>,
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
        let read = self.from.read(into)?;
        self.at.set(self.at.get() + read as u64);
        Ok(read)
    }
}

/// An entry of `manifest.json`.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Legacy {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    #[serde(default)]
    layers: Option<Vec<String>>,
}

/// A path without `./` before it.
fn plain(path: &str) -> &str {
    let mut path = path;
    while let Some(rest) = path.strip_prefix("./").or_else(|| path.strip_prefix('/')) {
        path = rest;
    }
    path
}

/// The path of a link's target, relative to the link; `None` if it leads out of the archive.
fn beside(link: &str, target: &str) -> Option<String> {
    let mut parts: Vec<&str> = match target.starts_with('/') {
        true => Vec::new(),
        false => link.split('/').collect(),
    };
    parts.pop();
    for part in target.split('/') {
        match part {
            "" | "." => {}
            ".." => _ = parts.pop()?,
            part => parts.push(part),
        }
    }
    Some(parts.join("/"))
}

/// Copies what is left of `from` into a file that is gone when it is closed.
fn spool(from: impl Read, limit: u64) -> Result<File> {
    let failed = |e| Fault::io("unpack the archive into a temporary file", e);
    let mut file = tempfile::tempfile().map_err(failed)?;
    let copied = std::io::copy(&mut from.take(limit + 1), &mut file).map_err(failed)?;
    if copied > limit {
        return Err(Fault::invalid(format!("the archive has more than {limit} bytes")));
    }
    file.flush().and_then(|()| file.rewind()).map_err(failed)?;
    Ok(file)
}

impl Archive {
    /// Reads the archive in `path`, or on standard input without one. Blocks.
    pub fn open(path: Option<&Path>) -> Result<Self> {
        let Some(path) = path else {
            let stdin = BufReader::new(std::io::stdin().lock());
            let failed = |e| Fault::io("read the archive from standard input", e);
            return Self::read(spool(inflate(stdin).map_err(failed)?, MAX_SPOOL)?);
        };
        let failed = |e| Fault::io(format!("open {}", path.display()), e);
        let mut file = File::open(path).map_err(failed)?;
        let mut head = Vec::new();
        (&mut file).take(262).read_to_end(&mut head).map_err(failed)?;
        let is_regular = file.metadata().map_err(failed)?.is_file();
        if is_regular && head.get(257..262) == Some(b"ustar") {
            file.rewind().map_err(failed)?;
            return Self::read(file);
        }
        // Compressed, or a pipe.
        let input = BufReader::new(std::io::Cursor::new(head).chain(file));
        Self::read(spool(inflate(input).map_err(failed)?, MAX_SPOOL)?)
    }

    fn read(file: File) -> Result<Self> {
        let broken = |e| Fault::io("read the archive", e).with_class(shipway_fault::Class::User);
        let at = Rc::new(Cell::new(0));
        let mut members = HashMap::new();
        let mut tar = TarReader::new(Counted { from: BufReader::new(&file), at: at.clone() });
        while let Some(member) = tar.next_member().map_err(broken)? {
            let path = String::from_utf8_lossy(&member.path).into_owned();
            let path = plain(&path).to_owned();
            let found = match member.kind {
                MemberKind::File => Member::File(Region { start: at.get(), len: member.size }),
                MemberKind::Symlink(target) => {
                    match beside(&path, &String::from_utf8_lossy(&target)) {
                        Some(target) => Member::Link(target),
                        None => continue,
                    }
                }
                MemberKind::HardLink(target) => {
                    Member::Link(plain(&String::from_utf8_lossy(&target)).to_owned())
                }
                _ => continue,
            };
            members.insert(path, found);
            if members.len() > MAX_MEMBERS {
                return Err(Fault::invalid(format!(
                    "the archive has more than {MAX_MEMBERS} files"
                )));
            }
        }
        drop(tar);
        let mut archive = Self {
            file: Arc::new(file),
            members,
            made: HashMap::new(),
            blobs: HashMap::new(),
            images: Vec::new(),
        };
        archive.list()?;
        Ok(archive)
    }

    fn region(&self, path: &str) -> Result<Region> {
        let mut path = plain(path);
        for _ in 0..=MAX_LINKS {
            match self.members.get(path) {
                Some(Member::File(region)) => return Ok(*region),
                Some(Member::Link(target)) => path = target,
                None => break,
            }
        }
        Err(Fault::not_found(format!("the archive has no file {path}"))
            .with_class(shipway_fault::Class::User))
    }

    fn document(&self, path: &str) -> Result<Bytes> {
        let region = self.region(path)?;
        if region.len > MAX_DOCUMENT {
            return Err(Fault::invalid(format!("{path} is larger than {MAX_DOCUMENT} bytes")));
        }
        let mut bytes = vec![0; region.len as usize];
        self.file
            .read_exact_at(&mut bytes, region.start)
            .map_err(|e| Fault::io(format!("read {path} in the archive"), e))?;
        Ok(bytes.into())
    }

    /// Finds the images.
    fn list(&mut self) -> Result<()> {
        let unreadable =
            |name: &'static str| move |e| Fault::invalid(format!("{name} cannot be read: {e}"));
        if self.members.contains_key("index.json") {
            let index: Index = serde_json::from_slice(&self.document("index.json")?)
                .map_err(unreadable("index.json"))?;
            if index.manifests.len() > MAX_ENTRIES {
                return Err(Fault::invalid(format!(
                    "the archive has more than {MAX_ENTRIES} images"
                )));
            }
            for mut entry in index.manifests {
                let full = entry.annotations.remove(IMAGE_NAME);
                // OCI's own annotation is a tag, or a name in full where its writer meant that.
                let short = entry.annotations.remove(REF_NAME).filter(|n| n.contains(['/', ':']));
                self.images.push((full.or(short), entry));
            }
            return Ok(());
        }
        if !self.members.contains_key("manifest.json") {
            return Err(Fault::invalid("this is not an archive of images")
                .hint("it has neither index.json nor manifest.json; `docker save` and `shipway save` write such"));
        }
        let entries: Vec<Legacy> = serde_json::from_slice(&self.document("manifest.json")?)
            .map_err(unreadable("manifest.json"))?;
        if entries.len() > MAX_ENTRIES {
            return Err(Fault::invalid(format!("the archive has more than {MAX_ENTRIES} images")));
        }
        for entry in entries {
            let root = self.legacy(&entry)?;
            let names = entry.repo_tags.unwrap_or_default();
            if names.is_empty() {
                self.images.push((None, root.clone()));
            }
            self.images.extend(names.into_iter().map(|name| (Some(name), root.clone())));
        }
        Ok(())
    }

    /// A manifest over what an entry of `manifest.json` names.
    fn legacy(&mut self, entry: &Legacy) -> Result<Descriptor> {
        let config = self.document(&entry.config)?;
        let config = self.blob(media::DOCKER_CONFIG, Digest::of(&config), &entry.config)?;
        let paths = entry.layers.clone().unwrap_or_default();
        if paths.len() > MAX_ENTRIES {
            return Err(Fault::invalid(format!("an image has more than {MAX_ENTRIES} layers")));
        }
        let mut layers = Vec::with_capacity(paths.len());
        for path in &paths {
            let region = self.region(path)?;
            let (digest, media_type) = self.look_at(region)?;
            layers.push(self.blob(media_type, digest, path)?);
        }
        let manifest = Manifest {
            schema_version: 2,
            media_type: Some(media::DOCKER_MANIFEST.to_owned()),
            artifact_type: None,
            config,
            layers,
            subject: None,
            annotations: BTreeMap::new(),
        };
        let bytes = serde_json::to_vec(&manifest)
            .map_err(|e| Fault::internal(format!("encode a manifest: {e}")))?;
        let root = Descriptor::of(media::DOCKER_MANIFEST, &bytes);
        self.made.insert(root.digest, bytes.into());
        Ok(root)
    }

    fn blob(&mut self, media_type: &str, digest: Digest, path: &str) -> Result<Descriptor> {
        let region = self.region(path)?;
        self.blobs.insert(digest, region);
        Ok(Descriptor::new(media_type, digest, region.len))
    }

    /// The digest of a layer, and its type by its first bytes.
    fn look_at(&self, region: Region) -> Result<(Digest, &'static str)> {
        let failed = |e| Fault::io("read a layer in the archive", e);
        let (mut at, end) = (region.start, region.start.saturating_add(region.len));
        let (mut hasher, mut piece) = (Hasher::new(), vec![0; 256 << 10]);
        let mut media_type = media::DOCKER_LAYER;
        while at < end {
            let want = (end - at).min(piece.len() as u64) as usize;
            self.file.read_exact_at(&mut piece[..want], at).map_err(failed)?;
            if at == region.start {
                media_type = match &piece[..want.min(4)] {
                    [0x1f, 0x8b, ..] => media::DOCKER_LAYER_GZIP,
                    [0x28, 0xb5, 0x2f, 0xfd] => media::DOCKER_LAYER_ZSTD,
                    _ => media::DOCKER_LAYER,
                };
            }
            hasher.update(&piece[..want]);
            at += want as u64;
        }
        Ok((hasher.finish(), media_type))
    }

    /// The images that the archive names, in its order. One may have several names, or none.
    pub fn images(&self) -> impl Iterator<Item = (Option<&str>, &Descriptor)> {
        self.images.iter().map(|(name, root)| (name.as_deref(), root))
    }

    /// The image `root`, to be copied.
    pub fn image(self: &Arc<Self>, root: &Descriptor) -> ArchiveImage {
        ArchiveImage { archive: self.clone(), root: root.clone() }
    }

    /// Where a blob is.
    fn find(&self, digest: Digest) -> Result<Region> {
        match self.blobs.get(&digest) {
            Some(region) => Ok(*region),
            None => self.region(&format!("blobs/sha256/{}", digest.hex())).map_err(|f| {
                f.hint(
                    "an archive of one platform has no others: name those it has with --platform",
                )
            }),
        }
    }

    fn small(&self, descriptor: &Descriptor) -> Result<Bytes> {
        let digest = descriptor.digest;
        if let Some(bytes) = self.made.get(&digest) {
            return Ok(bytes.clone());
        }
        let region = self.find(digest)?;
        if region.len > MAX_DOCUMENT {
            return Err(Fault::invalid(format!("{digest} is larger than {MAX_DOCUMENT} bytes")));
        }
        let mut bytes = vec![0; region.len as usize];
        self.file
            .read_exact_at(&mut bytes, region.start)
            .map_err(|e| Fault::io(format!("read {digest} in the archive"), e))?;
        if Digest::of(&bytes) != digest {
            return Err(damaged(digest));
        }
        Ok(bytes.into())
    }
}

fn damaged(digest: Digest) -> Fault {
    Fault::new(Code::DataLoss, format!("{digest} is damaged in the archive"))
        .with_class(shipway_fault::Class::User)
}

impl ArchiveImage {
    /// Whether the archive has `blob`. One of some platforms may have an index of more.
    pub fn has(&self, blob: &Descriptor) -> bool {
        self.archive.made.contains_key(&blob.digest) || self.archive.find(blob.digest).is_ok()
    }
}

#[async_trait]
impl Source for ArchiveImage {
    async fn root(&self) -> Result<Descriptor> {
        Ok(self.root.clone())
    }

    async fn manifest(&self, descriptor: &Descriptor) -> Result<Bytes> {
        self.archive.small(descriptor)
    }

    async fn config(&self, descriptor: &Descriptor) -> Result<Bytes> {
        self.archive.small(descriptor)
    }

    async fn blob(&self, descriptor: &Descriptor) -> Result<BodyStream> {
        let region = self.archive.find(descriptor.digest)?;
        if region.len != descriptor.size {
            return Err(damaged(descriptor.digest));
        }
        let bytes = file_stream(&self.archive.file, region.start, region.len);
        let next = |(mut bytes, mut hasher, digest): (BodyStream, Hasher, Digest)| async move {
            match bytes.next().await.transpose()? {
                Some(piece) => {
                    hasher.update(&piece);
                    Ok(Some((piece, (bytes, hasher, digest))))
                }
                None if hasher.finish() == digest => Ok(None),
                None => Err(damaged(digest)),
            }
        };
        Ok(stream::try_unfold((bytes, Hasher::new(), descriptor.digest), next).boxed())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ArchiveKind, ArchiveWriter, Copier};
    use std::process::Command;

    #[track_caller]
    fn tar(files: &[(&str, &[u8])], options: &str) -> File {
        let dir = tempfile::tempdir().unwrap();
        for (path, bytes) in files {
            let path = dir.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, bytes).unwrap();
        }
        let made = Command::new("tar")
            .args([options, "-", "-C"])
            .arg(dir.path())
            .arg(".")
            .output()
            .unwrap();
        assert!(made.status.success());
        spool(&made.stdout[..], u64::MAX - 1).unwrap()
    }

    async fn read(source: &dyn Source, blob: &Descriptor) -> Result<Vec<u8>> {
        let (mut bytes, mut all) = (source.blob(blob).await?, Vec::new());
        while let Some(piece) = bytes.next().await.transpose()? {
            all.extend_from_slice(&piece);
        }
        Ok(all)
    }

    #[tokio::test]
    async fn what_docker_wrote_before_layouts_is_an_image() {
        let config = br#"{"rootfs":{}}"#;
        let layer = vec![7u8; 600 << 10];
        let list = br#"[{"Config":"c.json","RepoTags":["app:1","r.io/app:2"],"Layers":["1/layer.tar","1/layer.tar","2/layer.tar"]}]"#;
        let file = tar(
            &[
                ("c.json", config),
                ("manifest.json", list),
                ("1/layer.tar", &layer),
                ("2/layer.tar", &[0x1f, 0x8b, 8, 0, 0]),
            ],
            "-cf",
        );
        let archive = Arc::new(Archive::read(file).unwrap());
        let names: Vec<_> = archive.images().map(|(name, _)| name.unwrap().to_owned()).collect();
        assert_eq!(names, ["app:1", "r.io/app:2"]);
        let root = archive.images().next().unwrap().1.clone();
        let image = archive.image(&root);
        let manifest: Manifest =
            serde_json::from_slice(&image.manifest(&root).await.unwrap()).unwrap();
        assert_eq!(&image.config(&manifest.config).await.unwrap()[..], config);
        let kinds: Vec<&str> = manifest.layers.iter().map(|l| &*l.media_type).collect();
        assert_eq!(kinds, [media::DOCKER_LAYER, media::DOCKER_LAYER, media::DOCKER_LAYER_GZIP]);
        assert_eq!(read(&image, &manifest.layers[0]).await.unwrap(), layer);
    }

    #[tokio::test]
    async fn an_archive_is_read_as_it_was_written() {
        let list = br#"[{"Config":"c.json","RepoTags":["app:1"],"Layers":["l"]}]"#;
        let file = tar(&[("c.json", b"{}"), ("manifest.json", list), ("l", &[1u8; 5000])], "-cf");
        let first = Arc::new(Archive::read(file).unwrap());
        let root = first.images().next().unwrap().1.clone();
        let source: Arc<dyn Source> = Arc::new(first.image(&root));
        for kind in [ArchiveKind::Docker, ArchiveKind::Oci, ArchiveKind::OciGzip] {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("image.tar");
            let out = tokio::fs::File::create(&path).await.unwrap();
            let writer = ArchiveWriter::new(kind, out).await.unwrap();
            for name in ["docker.io/library/app:1", "r.io/b:2"] {
                let target = writer.image(name.parse().unwrap());
                Copier::new(target.clone(), Arc::new(|_| {})).copy(&source, &root).await.unwrap();
                target.finish(&root).await.unwrap();
            }
            writer.finish().await.unwrap();

            let second = Arc::new(Archive::open(Some(&path)).unwrap());
            let names: Vec<_> = second.images().map(|(name, _)| name.unwrap().to_owned()).collect();
            assert_eq!(names, ["docker.io/library/app:1", "r.io/b:2"]);
            let again = second.images().next().unwrap().1.clone();
            assert_eq!(again.digest, root.digest);
            let image = second.image(&again);
            let manifest: Manifest =
                serde_json::from_slice(&image.manifest(&again).await.unwrap()).unwrap();
            assert_eq!(read(&image, &manifest.layers[0]).await.unwrap(), [1u8; 5000]);
            // Each blob once, whatever leads to it.
            let list = Command::new("tar").arg("-tf").arg(&path).output().unwrap().stdout;
            let list = String::from_utf8(list).unwrap();
            assert_eq!(
                list.lines().filter(|l| l.starts_with("blobs/sha256/") && l.len() > 13).count(),
                3
            );
            let docker = second.document("manifest.json");
            assert_eq!(docker.is_ok(), kind == ArchiveKind::Docker);
            if let Ok(docker) = docker {
                let read: Vec<Legacy> = serde_json::from_slice(&docker).unwrap();
                assert_eq!(read[0].repo_tags.as_ref().unwrap(), &["app:1", "r.io/b:2"]);
            }
        }
    }

    #[test]
    fn compressed_archives_are_unpacked() {
        let list = br#"[{"Config":"c.json","RepoTags":null,"Layers":[]}]"#;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image.tar.gz");
        let mut packed = tar(&[("c.json", b"{}"), ("manifest.json", list)], "-czf");
        std::io::copy(&mut packed, &mut File::create(&path).unwrap()).unwrap();
        let archive = Archive::open(Some(&path)).unwrap();
        assert_eq!(archive.images().map(|(name, _)| name).collect::<Vec<_>>(), [None]);
    }

    #[tokio::test]
    async fn what_is_damaged_or_too_large_is_refused() {
        let list = br#"[{"Config":"c.json","RepoTags":[],"Layers":["../x"]}]"#;
        let refused = |files: &[(&str, &[u8])]| {
            Archive::read(tar(files, "-cf")).map(drop).unwrap_err().to_string()
        };
        assert!(refused(&[("a", b"")]).contains("not an archive of images"));
        assert!(refused(&[("manifest.json", list), ("c.json", b"{}")]).contains("no file ../x"));
        assert!(refused(&[("manifest.json", b"[")]).contains("manifest.json cannot be read"));
        let large = vec![b' '; MAX_DOCUMENT as usize + 1];
        assert!(refused(&[("index.json", &large)]).contains("larger than"));
        let many = format!("[{}]", vec![r#"{"Config":"c"}"#; MAX_ENTRIES + 1].join(","));
        assert!(refused(&[("manifest.json", many.as_bytes())]).contains("more than 1000 images"));
        assert!(spool(&[0u8; 11][..], 10).unwrap_err().message().contains("more than 10 bytes"));

        // A blob that is not what its name says.
        let digest = Digest::of("right");
        let root = Descriptor::new(media::OCI_MANIFEST, digest, 5);
        let index = Index {
            schema_version: 2,
            media_type: None,
            manifests: vec![root.clone()],
            annotations: BTreeMap::new(),
        };
        let index = serde_json::to_vec(&index).unwrap();
        let path = format!("blobs/sha256/{}", digest.hex());
        let file = tar(&[("index.json", &index), (&path, b"wrong")], "-cf");
        let image = Arc::new(Archive::read(file).unwrap()).image(&root);
        assert!(image.manifest(&root).await.unwrap_err().message().contains("damaged"));
        assert!(read(&image, &root).await.unwrap_err().message().contains("damaged"));
    }

    #[test]
    fn links_lead_within_the_archive() {
        assert_eq!(beside("a/b/c", "../d/e").as_deref(), Some("a/d/e"));
        assert_eq!(beside("a", "../d"), None);
        assert_eq!(beside("a/b", "/c").as_deref(), Some("c"));
        assert_eq!((plain("././a"), plain("/a")), ("a", "a"));
    }
}
