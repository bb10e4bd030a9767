//! The order in which the files of an image are first read: learned, kept, shared.
//!
//! As text, so that people can read it and every version can be compared:
//!
//! ```text
//! shipway profile 1
//! layer sha256:…
//! layer sha256:…
//! 0 0 1024+16
//! 1 2 96+4
//! ```
//!
//! Layers are named first; then each line is a piece, in the order of reading: its layer's position
//! among them, in how many runs since it was not read, and its first block and number of blocks.

use crate::Credentials;
use bytes::Bytes;
use futures::{FutureExt, StreamExt, stream};
use shipway_fault::{Class, Code, Fault};
use shipway_oci::{Descriptor, Digest, ImageName, Manifest, media};
use shipway_registry::{Mode, Registry, Repository};
use std::{
    collections::HashMap,
    fmt::Write as _,
    fs, io,
    ops::Range,
    path::{Path, PathBuf},
    time::SystemTime,
};

/// Type of the artifact and of its only layer (OCI image-spec 1.1, `artifactType`).
pub const ARTIFACT: &str = "application/vnd.shipway.profile.v1";
/// The empty JSON object, which is the config of artifacts without one (OCI image-spec 1.1).
const EMPTY: &str = "application/vnd.oci.empty.v1+json";
const FIRST_LINE: &str = "shipway profile 1";
/// Most layers that a profile names.
pub(crate) const MAX_LAYERS: usize = 512;
/// Most pieces of a profile.
pub(crate) const MAX_PIECES: usize = 1 << 16;
/// Most bytes of a profile as text.
pub(crate) const MAX_BYTES: u64 = 2 << 20;
/// A piece that was not read in so many runs is forgotten.
const MAX_AGE: u8 = 8;
/// Most profiles that are kept on a machine.
const MAX_PROFILES: usize = 4096;
/// Most artifacts that are looked at for one image.
const MAX_ARTIFACTS: usize = 8;
/// When an artifact was made (OCI image-spec).
const CREATED: &str = "org.opencontainers.image.created";

/// A piece of a layer.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Piece {
    layer: u16,
    age: u8,
    blocks: Range<u64>,
}

/// The order in which blocks of an image's layers were first read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Profile {
    layers: Vec<Digest>,
    pieces: Vec<Piece>,
}

impl Profile {
    /// An empty one.
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether nothing is in it.
    pub fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// Blocks of the layer with the blob `layer` were read for the first time. What comes when the
    /// profile is full is not in it.
    pub fn touch(&mut self, layer: Digest, blocks: Range<u64>) {
        self.add(layer, 0, blocks);
    }

    fn add(&mut self, layer: Digest, age: u8, blocks: Range<u64>) {
        let known = self.layers.iter().position(|l| *l == layer);
        let full = self.layers.len() >= MAX_LAYERS && known.is_none();
        if full || blocks.start >= blocks.end {
            return;
        }
        let number = known.unwrap_or(self.layers.len());
        if known.is_none() {
            self.layers.push(layer);
        }
        let layer = number as u16;
        let full = self.pieces.len() >= MAX_PIECES;
        match self.pieces.last_mut() {
            // Programs mostly read on.
            Some(last) if (last.layer, last.age, last.blocks.end) == (layer, age, blocks.start) => {
                last.blocks.end = blocks.end;
            }
            _ if full => {}
            _ => self.pieces.push(Piece { layer, age, blocks }),
        }
    }

    /// The pieces in order: which layer, and which blocks of it.
    pub fn pieces(&self) -> impl Iterator<Item = (Digest, Range<u64>)> {
        self.pieces.iter().map(|p| (self.layers[usize::from(p.layer)], p.blocks.clone()))
    }

    /// The pieces of one layer, in order.
    pub fn of_layer(&self, layer: Digest) -> impl Iterator<Item = Range<u64>> {
        self.pieces().filter(move |(l, _)| *l == layer).map(|(_, blocks)| blocks)
    }

    /// Which part of what `other` reads this one knows, from 0 to 1.
    pub fn share_of(&self, other: &Self) -> f64 {
        let known = self.covered();
        let (mut all, mut rest) = (0, 0);
        for (layer, blocks) in other.pieces() {
            let known = known.get(&layer).map(Vec::as_slice).unwrap_or_default();
            all += blocks.end - blocks.start;
            rest += without(&blocks, known).iter().map(|r| r.end - r.start).sum::<u64>();
        }
        if all == 0 { 1.0 } else { 1.0 - rest as f64 / all as f64 }
    }

    /// The blocks of each layer, in the order of the layer.
    fn covered(&self) -> HashMap<Digest, Vec<Range<u64>>> {
        let mut covered: HashMap<Digest, Vec<Range<u64>>> = HashMap::new();
        for (layer, blocks) in self.pieces() {
            covered.entry(layer).or_default().push(blocks);
        }
        for ranges in covered.values_mut() {
            ranges.sort_unstable_by_key(|r| r.start);
        }
        covered
    }

    /// Brings another run in: its order is the newest, and what only earlier runs read comes after
    /// it, until it has not been read for some runs.
    pub fn merge(&mut self, run: &Self) {
        if run.is_empty() {
            return;
        }
        let old = std::mem::take(self);
        let covered = run.covered();
        for (layer, blocks) in run.pieces() {
            self.touch(layer, blocks);
        }
        for piece in old.pieces.iter().filter(|p| p.age < MAX_AGE) {
            let layer = old.layers[usize::from(piece.layer)];
            let seen = covered.get(&layer).map(Vec::as_slice).unwrap_or_default();
            for rest in without(&piece.blocks, seen) {
                self.add(layer, piece.age + 1, rest);
            }
        }
    }

    /// As text.
    pub fn to_text(&self) -> String {
        let mut text = format!("{FIRST_LINE}\n");
        for layer in &self.layers {
            let _ = writeln!(text, "layer {layer}");
        }
        for Piece { layer, age, blocks } in &self.pieces {
            let line = format!("{layer} {age} {}+{}\n", blocks.start, blocks.end - blocks.start);
            if text.len() + line.len() > MAX_BYTES as usize {
                break;
            }
            text.push_str(&line);
        }
        text
    }

    /// From text, which may come from anybody.
    pub fn from_text(text: &[u8]) -> Result<Self, Fault> {
        let bad = |why: String| {
            Fault::new(Code::InvalidArgument, format!("the profile is not valid: {why}"))
                .with_class(Class::Environment)
        };
        if text.len() as u64 > MAX_BYTES {
            return Err(bad(format!("it has more than {MAX_BYTES} bytes")));
        }
        let text = std::str::from_utf8(text).map_err(|e| bad(e.to_string()))?;
        let mut lines = text.lines();
        if lines.next() != Some(FIRST_LINE) {
            return Err(bad(format!("it does not begin with {FIRST_LINE:?}")));
        }
        let mut profile = Self::default();
        for (number, line) in lines.enumerate() {
            let wrong = || bad(format!("line {}", number + 2));
            if let Some(layer) = line.strip_prefix("layer ") {
                let layer = layer.parse().map_err(|_| wrong())?;
                if profile.layers.len() >= MAX_LAYERS || profile.layers.contains(&layer) {
                    return Err(wrong());
                }
                profile.layers.push(layer);
                continue;
            }
            let piece = piece(line).filter(|p| usize::from(p.layer) < profile.layers.len());
            if profile.pieces.len() >= MAX_PIECES {
                return Err(wrong());
            }
            profile.pieces.push(piece.ok_or_else(wrong)?);
        }
        Ok(profile)
    }

    /// Stores it in the repository of `image` as an artifact that refers to the manifest `subject`.
    /// Needs the right to push.
    pub async fn push(
        &self,
        registry: &Registry,
        image: &ImageName,
        subject: &Descriptor,
        created: &str,
        credentials: &dyn Credentials,
    ) -> Result<Descriptor, Fault> {
        let repository = registry.repository(image, credentials.of(image), Mode::Push);
        let text = Bytes::from(self.to_text());
        let (config, layer) = (Descriptor::of(EMPTY, b"{}"), Descriptor::of(ARTIFACT, &text));
        for (descriptor, bytes) in [(&config, Bytes::from_static(b"{}")), (&layer, text)] {
            let open = || {
                let bytes = bytes.clone();
                async move { Ok(stream::iter([Ok(bytes)]).boxed()) }.boxed()
            };
            repository.push_blob(descriptor, [], open, |_| {}).await?;
        }
        let manifest = Manifest {
            schema_version: 2,
            media_type: Some(media::OCI_MANIFEST.to_owned()),
            artifact_type: Some(ARTIFACT.to_owned()),
            config,
            layers: vec![layer],
            subject: Some(Descriptor::new(
                subject.media_type.clone(),
                subject.digest,
                subject.size,
            )),
            annotations: [(CREATED.to_owned(), created.to_owned())].into(),
        };
        Ok(repository.push_referrer(&manifest).await?)
    }

    /// The newest profile that refers to the manifest `subject`; `None` if there is none.
    pub async fn find(
        registry: &Registry,
        image: &ImageName,
        subject: Digest,
        credentials: &dyn Credentials,
    ) -> Result<Option<Self>, Fault> {
        Self::beside(&registry.repository(image, credentials.of(image), Mode::Pull), subject).await
    }

    /// [`Profile::find`] in `repository`.
    pub async fn beside(repository: &Repository, subject: Digest) -> Result<Option<Self>, Fault> {
        let mut found = repository.referrers(subject).await?;
        found.retain(|d| d.artifact_type.as_deref() == Some(ARTIFACT));
        found.sort_by_key(|d| std::cmp::Reverse(d.annotations.get(CREATED).cloned()));
        let mut failed = None;
        for descriptor in found.into_iter().take(MAX_ARTIFACTS) {
            let read = async {
                let manifest = repository.fetch_manifest(&descriptor).await?;
                let manifest: Manifest = serde_json::from_slice(&manifest)
                    .map_err(|e| Fault::invalid(format!("the profile's manifest: {e}")))?;
                let ours = manifest.subject.is_some_and(|s| s.digest == subject);
                let layer = manifest.layers.into_iter().find(|l| l.media_type == ARTIFACT);
                let Some(layer) = layer.filter(|l| ours && l.size <= MAX_BYTES) else {
                    return Err(Fault::invalid("the artifact is no profile of the image"));
                };
                Self::from_text(&repository.fetch_small_blob(&layer).await?)
            };
            match read.await {
                Ok(profile) => return Ok(Some(profile)),
                Err(fault) => failed = Some(fault),
            }
        }
        failed.map_or(Ok(None), Err)
    }
}

fn piece(line: &str) -> Option<Piece> {
    let mut words = line.split(' ');
    let (layer, age, blocks) = (words.next()?, words.next()?, words.next()?);
    let (start, length) = blocks.split_once('+')?;
    let (start, length): (u64, u64) = (start.parse().ok()?, length.parse().ok()?);
    let end = start.checked_add(length).filter(|_| length > 0)?;
    if words.next().is_some() {
        return None;
    }
    Some(Piece { layer: layer.parse().ok()?, age: age.parse().ok()?, blocks: start..end })
}

/// The parts of `range` that are in none of `others`, which are in order.
fn without(range: &Range<u64>, others: &[Range<u64>]) -> Vec<Range<u64>> {
    let (mut at, mut left) = (range.start, Vec::new());
    for other in others {
        if other.start >= range.end {
            break;
        }
        if other.start > at {
            left.push(at..other.start);
        }
        at = at.max(other.end);
    }
    if at < range.end {
        left.push(at..range.end);
    }
    left
}

/// Profiles of a machine, by manifest.
#[derive(Clone, Debug)]
pub struct Profiles(PathBuf);

impl Profiles {
    /// Those in `directory`, which is made if it is not there.
    pub fn open(directory: impl Into<PathBuf>) -> io::Result<Self> {
        let directory = directory.into();
        fs::create_dir_all(&directory)?;
        Ok(Self(directory))
    }

    fn path(&self, manifest: Digest) -> PathBuf {
        self.0.join(manifest.hex())
    }

    /// The profile of an image; `None` if there is none, or none that can be read.
    pub fn load(&self, manifest: Digest) -> Option<Profile> {
        let path = self.path(manifest);
        if fs::metadata(&path).ok()?.len() > MAX_BYTES {
            return None;
        }
        Profile::from_text(&fs::read(path).ok()?).ok()
    }

    /// Merges a run into what is known of an image. Old profiles go when there are too many.
    pub fn learn(&self, manifest: Digest, run: &Profile) -> io::Result<()> {
        let mut profile = self.load(manifest).unwrap_or_default();
        profile.merge(run);
        self.store(manifest, &profile)
    }

    /// Stores a profile in the place of what was known.
    pub fn store(&self, manifest: Digest, profile: &Profile) -> io::Result<()> {
        let (path, new) = (self.path(manifest), self.0.join("new"));
        fs::write(&new, profile.to_text())?;
        fs::rename(&new, path)?;
        self.trim(MAX_PROFILES)
    }

    fn trim(&self, most: usize) -> io::Result<()> {
        let mut all: Vec<(SystemTime, PathBuf)> = Vec::new();
        for entry in fs::read_dir(&self.0)? {
            let entry = entry?;
            let time =
                entry.metadata().and_then(|m| m.modified()).unwrap_or(SystemTime::UNIX_EPOCH);
            all.push((time, entry.path()));
        }
        all.sort();
        let surplus = all.len().saturating_sub(most);
        for (_, path) in all.into_iter().take(surplus) {
            fs::remove_file(path)?;
        }
        Ok(())
    }

    /// The directory.
    pub fn directory(&self) -> &Path {
        &self.0
    }
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init)]
mod tests {
    use super::*;

    fn digest(n: u8) -> Digest {
        Digest::from_bytes([n; 32])
    }

    fn profile(pieces: &[(u8, Range<u64>)]) -> Profile {
        let mut profile = Profile::new();
        for (layer, blocks) in pieces {
            profile.touch(digest(*layer), blocks.clone());
        }
        profile
    }

    #[track_caller]
    fn check(profile: &Profile, want: &[(u8, u8, Range<u64>)]) {
        let got: Vec<_> = profile
            .pieces
            .iter()
            .map(|p| (profile.layers[usize::from(p.layer)].as_bytes()[0], p.age, p.blocks.clone()))
            .collect();
        assert_eq!(got, want);
        assert_eq!(Profile::from_text(profile.to_text().as_bytes()).unwrap(), *profile);
    }

    #[test]
    fn runs_are_merged_and_what_is_not_read_any_more_is_forgotten() {
        let mut known = profile(&[(1, 0..10), (1, 10..20), (2, 5..6), (2, 9..9), (1, 50..60)]);
        check(&known, &[(1, 0, 0..20), (2, 0, 5..6), (1, 0, 50..60)]);
        assert_eq!(known.of_layer(digest(1)).collect::<Vec<_>>(), [0..20, 50..60]);
        // Another order, and a part of what was known.
        known.merge(&profile(&[(3, 0..1), (1, 55..60), (1, 5..8)]));
        let want = [
            (3, 0, 0..1),
            (1, 0, 55..60),
            (1, 0, 5..8),
            (1, 1, 0..5),
            (1, 1, 8..20),
            (2, 1, 5..6),
            (1, 1, 50..55),
        ];
        check(&known, &want);
        known.merge(&Profile::new());
        check(&known, &want);
        for _ in 0..MAX_AGE {
            known.merge(&profile(&[(3, 0..1)]));
        }
        check(&known, &[(3, 0, 0..1), (1, 8, 55..60), (1, 8, 5..8)]);
        known.merge(&profile(&[(3, 0..1)]));
        check(&known, &[(3, 0, 0..1)]);
    }

    #[test]
    fn it_is_known_how_much_of_a_run_is_known() {
        let known = profile(&[(1, 0..10), (2, 5..6), (1, 20..30)]);
        for (run, share) in [
            (profile(&[]), 1.0),
            (profile(&[(1, 2..8), (2, 5..6)]), 1.0),
            (profile(&[(1, 8..12)]), 0.5),
            (profile(&[(1, 0..30)]), 2.0 / 3.0),
            (profile(&[(3, 0..4), (1, 0..1)]), 0.2),
        ] {
            assert!((known.share_of(&run) - share).abs() < 1e-9, "{run:?}");
        }
        assert_eq!(Profile::new().share_of(&known), 0.0);
    }

    #[test]
    fn profiles_have_limits() {
        let mut large = Profile::new();
        for n in 0..MAX_PIECES as u64 + 10 {
            large.touch(digest(1), n * 2..n * 2 + 1);
        }
        assert_eq!(large.pieces.len(), MAX_PIECES);
        assert_eq!(Profile::from_text(large.to_text().as_bytes()).unwrap(), large);
        // Large numbers are cut rather than not stored at all.
        let mut long = Profile::new();
        for n in 0..MAX_PIECES as u64 {
            long.touch(digest(1), n << 46..(n << 46) + (1 << 45));
        }
        let text = long.to_text();
        assert!(text.len() as u64 <= MAX_BYTES, "{}", text.len());
        assert!(!Profile::from_text(text.as_bytes()).unwrap().is_empty());
        let mut many = Profile::new();
        for n in 0..MAX_LAYERS + 5 {
            many.touch(Digest::of(n.to_string()), 0..1);
        }
        assert_eq!(many.layers.len(), MAX_LAYERS);
        let more = format!("{}layer {}\n", many.to_text(), digest(1));
        assert!(Profile::from_text(more.as_bytes()).is_err());
        let more = format!("{}0 0 5+1\n", large.to_text());
        assert!(Profile::from_text(more.as_bytes()).is_err());
        let padding = vec![b'\n'; MAX_BYTES as usize];
        let long = [FIRST_LINE.as_bytes(), &padding].concat();
        assert!(Profile::from_text(&long).unwrap_err().message().contains("bytes"));
    }

    #[test]
    fn what_is_no_profile_is_refused() {
        let layer = format!("layer {}", digest(1));
        for lines in [
            "0 0 1+1",
            &format!("{layer}\n{layer}"),
            &format!("{layer}\n0 0 1+0"),
            &format!("{layer}\n0 0 1"),
            &format!("{layer}\n0 0 1+1 1"),
            &format!("{layer}\n1 0 1+1"),
            &format!("{layer}\n0 300 1+1"),
            &format!("{layer}\n0 0 -1+1"),
            &format!("{layer}\n0 0 18446744073709551615+1"),
            &format!("{layer}\n\n"),
            "layer sha256:12",
        ] {
            let text = format!("{FIRST_LINE}\n{lines}");
            assert!(Profile::from_text(text.as_bytes()).is_err(), "{lines}");
        }
        for text in [&b""[..], b"shipway profile 2\n", b"\xff\xfe"] {
            assert!(Profile::from_text(text).is_err());
        }
    }

    #[test]
    fn profiles_are_kept_by_manifest_and_not_without_end() {
        let directory = tempfile::tempdir().unwrap();
        let profiles = Profiles::open(directory.path().join("profiles")).unwrap();
        assert_eq!(profiles.load(digest(1)), None);
        let run = profile(&[(1, 0..10)]);
        profiles.learn(digest(1), &run).unwrap();
        profiles.learn(digest(1), &profile(&[(1, 20..30)])).unwrap();
        check(&profiles.load(digest(1)).unwrap(), &[(1, 0, 20..30), (1, 1, 0..10)]);
        fs::write(profiles.path(digest(2)), "nonsense").unwrap();
        assert_eq!(profiles.load(digest(2)), None);
        profiles.learn(digest(2), &run).unwrap();
        assert_eq!(profiles.load(digest(2)), Some(run));
        profiles.trim(1).unwrap();
        assert_eq!(fs::read_dir(profiles.directory()).unwrap().count(), 1);
    }
}
