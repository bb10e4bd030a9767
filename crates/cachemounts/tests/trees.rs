//! Directories that are saved and restored, at a place in memory. As root, as the daemon is.

#![allow(clippy::unwrap_used)]

use async_trait::async_trait;
use bytes::Bytes;
use parking_lot::Mutex;
use shipway_cachemounts::*;
use shipway_fault::{Code, Result};
use shipway_oci::{Descriptor, Digest};
use std::{
    collections::{BTreeMap, HashMap, HashSet},
    ffi::OsStr,
    fs,
    os::unix::{
        ffi::OsStrExt,
        fs::{MetadataExt, PermissionsExt, symlink},
    },
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime},
};

/// A place in memory.
#[derive(Default)]
struct Memory {
    manifests: Mutex<BTreeMap<String, (Bytes, SystemTime)>>,
    blobs: Mutex<HashMap<Digest, Bytes>>,
    /// Whether it says when a name was written.
    times: bool,
    reads: Mutex<Vec<String>>,
}

#[async_trait]
impl Place for Memory {
    fn shown(&self) -> String {
        "memory".into()
    }

    async fn manifest(&self, name: &str) -> Result<Option<Bytes>> {
        self.reads.lock().push(name.to_owned());
        Ok(self.manifests.lock().get(name).map(|(bytes, _)| bytes.clone()))
    }

    async fn names(&self, prefix: &str) -> Result<Vec<Named>> {
        let all = self.manifests.lock();
        let named = all.iter().filter(|(name, _)| name.starts_with(prefix));
        let of = |(name, (_, at)): (&String, &(Bytes, SystemTime))| Named {
            name: name.clone(),
            written: self.times.then_some(*at),
        };
        Ok(named.map(of).collect())
    }

    async fn read(&self, blob: &Descriptor) -> Result<Bytes> {
        let found = self.blobs.lock().get(&blob.digest).cloned();
        found.ok_or_else(|| shipway_fault::Fault::not_found(format!("no blob {}", blob.digest)))
    }

    async fn present(&self, blobs: &[Descriptor]) -> Result<HashSet<Digest>> {
        let all = self.blobs.lock();
        Ok(blobs.iter().map(|b| b.digest).filter(|d| all.contains_key(d)).collect())
    }

    async fn write(&self, blob: &Descriptor, bytes: Bytes) -> Result<()> {
        assert_eq!(Descriptor::of(blob.media_type.clone(), &bytes), *blob);
        self.blobs.lock().insert(blob.digest, bytes);
        Ok(())
    }

    async fn publish(&self, name: &str, manifest: &Descriptor, bytes: Bytes) -> Result<()> {
        assert_eq!(Digest::of(&bytes), manifest.digest);
        let json: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
        let blobs = self.blobs.lock();
        // As a registry does.
        for blob in json["layers"].as_array().into_iter().flatten().chain([&json["config"]]) {
            let digest = blob["digest"].as_str().unwrap().parse().unwrap();
            assert!(blobs.contains_key(&digest), "{digest} is not there");
        }
        self.manifests.lock().insert(name.into(), (bytes, SystemTime::now()));
        Ok(())
    }
}

struct Lab {
    memory: Arc<Memory>,
    place: Arc<dyn Place>,
    dir: tempfile::TempDir,
}

impl Lab {
    fn new() -> Self {
        Self::at(Memory::default())
    }

    fn at(memory: Memory) -> Self {
        let memory = Arc::new(memory);
        Self { place: memory.clone(), memory, dir: tempfile::tempdir().unwrap() }
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        let path = self.dir.path().join(name);
        fs::create_dir_all(&path).unwrap();
        path
    }

    /// Saves `dir` as the mount `m` under `key`.
    async fn save_with(&self, key: &str, dir: &Path, limits: &Limits) -> SaveOutcome {
        let found = Archive::open(&self.place, key).await.unwrap();
        let mut archive = found.unwrap_or_else(|| Archive::empty(&self.place));
        let outcome = save(&mut archive, "m", dir.to_owned(), (), limits).await.unwrap();
        let unchanged = matches!(outcome, SaveOutcome::Unchanged(_));
        archive.publish(key, unchanged).await.unwrap();
        outcome
    }

    async fn save(&self, dir: &Path) -> SaveOutcome {
        self.save_with("key", dir, &Limits::default()).await
    }

    async fn restore_with(&self, dir: &Path, limits: &Limits) -> Result<Option<Restored>> {
        let archive = Archive::open(&self.place, "key").await?.unwrap();
        let restored = restore(&archive, "m", dir.to_owned(), (), limits).await?;
        Ok(restored.map(|(restored, ())| restored))
    }

    async fn restore(&self, dir: &Path) -> Result<Option<Restored>> {
        self.restore_with(dir, &Limits::default()).await
    }
}

/// Everything that is to come back, in order of paths: names of one file have one number.
fn look(root: &Path) -> Vec<String> {
    let (mut all, mut queue, mut inodes) =
        (Vec::new(), vec![root.to_owned()], BTreeMap::<u64, usize>::new());
    let mut paths = Vec::new();
    while let Some(path) = queue.pop() {
        if fs::symlink_metadata(&path).unwrap().is_dir() {
            queue.extend(fs::read_dir(&path).unwrap().map(|e| e.unwrap().path()));
        }
        paths.push(path);
    }
    paths.sort();
    for path in paths {
        let meta = fs::symlink_metadata(&path).unwrap();
        let count = inodes.len();
        let number = (meta.is_file() && meta.nlink() > 1)
            .then(|| *inodes.entry(meta.ino()).or_insert(count));
        let contents = match meta.file_type() {
            kind if kind.is_file() => Digest::of(fs::read(&path).unwrap()).to_string(),
            kind if kind.is_symlink() => format!("{:?}", fs::read_link(&path).unwrap()),
            _ => String::new(),
        };
        let mut value = [0; 64];
        let attribute = rustix::fs::lgetxattr(&path, "user.note", &mut value[..])
            .map(|n| value[..n].to_vec())
            .unwrap_or_default();
        let mode = if meta.is_symlink() { 0 } else { meta.mode() };
        all.push(format!(
            "{:?} {mode:o} {}:{} {}.{} {number:?} {attribute:?} {contents}",
            path.strip_prefix(root).unwrap(),
            meta.uid(),
            meta.gid(),
            meta.mtime(),
            meta.mtime_nsec(),
        ));
    }
    all
}

/// A sequence of numbers that a seed makes.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    fn bytes(&mut self, n: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(n + 8);
        while bytes.len() < n {
            bytes.extend(self.next().to_le_bytes());
        }
        bytes.truncate(n);
        bytes
    }
}

/// Changes a tree at random: files, directories and links are made, and go.
fn change(root: &Path, random: &mut Random, steps: u64) {
    let mut dirs = vec![root.to_owned()];
    let mut at = 0;
    while at < dirs.len() {
        let inside = fs::read_dir(&dirs[at]).unwrap().map(Result::unwrap);
        dirs.extend(inside.filter(|e| e.file_type().unwrap().is_dir()).map(|e| e.path()));
        at += 1;
    }
    for _ in 0..steps {
        let dir = dirs[random.below(dirs.len() as u64) as usize].clone();
        let mut name = format!("{}", random.below(40)).into_bytes();
        if random.below(5) == 0 {
            name.extend([b'%', 0xff, b' ', b'"', b'\n']);
        }
        let path = dir.join(OsStr::from_bytes(&name));
        if fs::symlink_metadata(&path).is_ok_and(|m| m.is_dir()) {
            continue;
        }
        let _ = fs::remove_file(&path);
        match random.below(8) {
            0 => {
                fs::create_dir(&path).unwrap();
                dirs.push(path.clone());
            }
            1 => symlink(OsStr::from_bytes(b"../../etc/passwd"), &path).unwrap(),
            2 => {
                let file = fs::read_dir(&dir).unwrap().map(|e| e.unwrap().path());
                let file = file.filter(|p| fs::symlink_metadata(p).unwrap().is_file()).min();
                match file {
                    Some(first) => fs::hard_link(first, &path).unwrap(),
                    None => continue,
                }
            }
            3 => continue,
            4 => {
                let size = random.below(900_000) as usize;
                fs::write(&path, random.bytes(size)).unwrap();
            }
            _ => {
                let size = random.below(3000) as usize;
                fs::write(&path, random.bytes(size)).unwrap();
            }
        }
        if !fs::symlink_metadata(&path).unwrap().is_symlink() {
            let (uid, gid) = (random.below(3) as u32 * 1000, random.below(2) as u32 * 7);
            std::os::unix::fs::chown(&path, Some(uid), Some(gid)).unwrap();
            let mode = [0o644, 0o755, 0o4755, 0o1777, 0o400, 0][random.below(6) as usize];
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            if random.below(3) == 0 {
                let flags = rustix::fs::XattrFlags::empty();
                // Not every file system has them.
                let _ = rustix::fs::setxattr(&path, "user.note", &name, flags);
            }
        }
        let time = rustix::fs::Timespec {
            tv_sec: random.below(2_000_000_000) as i64,
            tv_nsec: random.below(1_000_000_000) as _,
        };
        let times = rustix::fs::Timestamps { last_access: time, last_modification: time };
        let flags = rustix::fs::AtFlags::SYMLINK_NOFOLLOW;
        rustix::fs::utimensat(rustix::fs::CWD, &path, &times, flags).unwrap();
    }
}

#[tokio::test]
async fn random_trees_come_back_as_they_were() {
    for seed in 1..=12 {
        let (lab, mut random) = (Lab::new(), Random(seed * 0x9e37_79b9));
        let source = lab.path("source");
        for round in 0..4 {
            change(&source, &mut random, if round == 0 { 60 } else { 12 });
            let before = look(&source);
            let saved = *lab.save(&source).await.saved();
            let target = lab.path(&format!("target-{round}"));
            let restored = lab.restore(&target).await.unwrap().unwrap();
            assert_eq!(look(&target), before, "seed {seed}, round {round}");
            assert_eq!(look(&source), before);
            assert_eq!((restored.files, restored.bytes), (saved.files, saved.bytes));
        }
    }
}

#[tokio::test]
async fn a_second_save_uploads_what_changed() {
    let (lab, mut random) = (Lab::new(), Random(7));
    let source = lab.path("source");
    for n in 0..300 {
        fs::write(source.join(format!("small-{n}")), random.bytes(4000)).unwrap();
    }
    let mut large = random.bytes(12 << 20);
    fs::write(source.join("large"), &large).unwrap();
    let first = *lab.save(&source).await.saved();
    assert!(first.written > 13_000_000, "{first:?}");
    let again = lab.save(&source).await;
    assert!(matches!(again, SaveOutcome::Unchanged(saved) if saved.written == 0), "{again:?}");
    // What is inserted moves all that comes after it.
    large.splice(5_000_000..5_000_000, *b"inserted");
    fs::write(source.join("large"), &large).unwrap();
    fs::write(source.join("small-7"), "other").unwrap();
    fs::remove_file(source.join("small-8")).unwrap();
    let changed = *lab.save(&source).await.saved();
    assert!(changed.written * 20 < first.written, "{changed:?} after {first:?}");
    let target = lab.path("target");
    lab.restore(&target).await.unwrap();
    assert_eq!(look(&target), look(&source));
}

#[tokio::test]
async fn packs_do_not_pile_up_and_no_more_is_fetched_than_is_used() {
    let (lab, mut random) = (Lab::new(), Random(9));
    let source = lab.path("source");
    fs::write(source.join("stays"), random.bytes(5 << 20)).unwrap();
    for _ in 0..60 {
        fs::write(source.join("changes"), random.bytes(300_000)).unwrap();
        lab.save(&source).await;
    }
    let (manifest, _) = lab.memory.manifests.lock()["key"].clone();
    let manifest: serde_json::Value = serde_json::from_slice(&manifest).unwrap();
    let layers = manifest["layers"].as_array().unwrap().len();
    assert!(layers < 16, "{layers} layers");
    let restored = lab.restore(&lab.path("target")).await.unwrap().unwrap();
    assert!(restored.fetched < 2 * restored.bytes, "{restored:?}");
}

#[tokio::test]
async fn the_oldest_files_are_left_out_first() {
    let lab = Lab::new();
    let source = lab.path("source");
    for (name, age, size) in [("new", 1, 400), ("old", 3, 400), ("middle", 2, 400), ("none", 9, 0)]
    {
        let path = source.join(name);
        fs::write(&path, vec![b'x'; size]).unwrap();
        let time = SystemTime::now() - Duration::from_secs(age * 1000);
        fs::File::options().write(true).open(path).unwrap().set_modified(time).unwrap();
    }
    fs::hard_link(source.join("old"), source.join("zold")).unwrap();
    let limits = Limits { max_size: 1000, ..Limits::default() };
    let saved = *lab.save_with("key", &source, &limits).await.saved();
    assert_eq!((saved.files, saved.bytes, saved.beyond, saved.left_out), (3, 800, 1, 1));
    let target = lab.path("target");
    lab.restore(&target).await.unwrap();
    let mut names: Vec<_> = fs::read_dir(target).unwrap().map(|e| e.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["middle", "new", "none"]);
    // Who restores has a limit, too.
    let limits = Limits { max_size: 799, ..Limits::default() };
    let said = lab.restore_with(&lab.path("other"), &limits).await.unwrap_err();
    assert!(said.code() == Code::ResourceExhausted, "{said}");
    assert!(fs::read_dir(lab.path("other")).unwrap().next().is_none());
}

#[tokio::test]
async fn what_is_no_file_is_left_out() {
    let lab = Lab::new();
    let source = lab.path("source");
    let node = |name: &str, kind| {
        let mode = rustix::fs::Mode::RUSR;
        rustix::fs::mknodat(rustix::fs::CWD, source.join(name), kind, mode, 0).unwrap();
    };
    node("fifo", rustix::fs::FileType::Fifo);
    node("socket", rustix::fs::FileType::Socket);
    fs::write(source.join("file"), "contents").unwrap();
    let saved = *lab.save(&source).await.saved();
    assert_eq!((saved.files, saved.left_out), (1, 2));
}

#[tokio::test]
async fn the_exact_key_comes_first_then_the_newest_of_a_prefix() {
    for times in [true, false] {
        let lab = Lab::at(Memory { times, ..Memory::default() });
        let source = lab.path("source");
        for (n, key) in ["m-main", "m-release-2", "m-release-1", "m-mainly"].iter().enumerate() {
            fs::write(source.join("file"), key).unwrap();
            lab.save_with(key, &source, &Limits::default()).await;
            // The times in manifests have whole seconds: made what they would be on other days.
            let mut all = lab.memory.manifests.lock();
            let (bytes, at) = all.get_mut(*key).unwrap();
            let mut json: serde_json::Value = serde_json::from_slice(bytes).unwrap();
            json["annotations"]["org.opencontainers.image.created"] =
                format!("2026-01-0{}T00:00:00Z", n + 1).into();
            *bytes = json.to_string().into();
            *at = SystemTime::UNIX_EPOCH + Duration::from_secs(n as u64);
        }
        let find = async |key: &str, fallback: &str| {
            let keys = Keys::new("m", key, fallback).unwrap();
            let found = Archive::find(&lab.place, &keys).await.unwrap();
            found.map(|a| a.name().to_owned()).unwrap_or_default()
        };
        assert_eq!(find("main", "release").await, "m-main");
        assert_eq!(find("feature", "").await, "");
        assert_eq!(find("feature", "release-;main").await, "m-release-1");
        assert_eq!(find("feature", "x;main").await, "m-main");
        assert_eq!(find("feature", "mai").await, "m-mainly");
    }
}

#[tokio::test]
async fn damaged_blobs_are_refused_and_saved_again() {
    let (lab, mut random) = (Lab::new(), Random(3));
    let source = lab.path("source");
    fs::write(source.join("file"), random.bytes(100_000)).unwrap();
    lab.save(&source).await;
    let blobs: Vec<Digest> = lab.memory.blobs.lock().keys().copied().collect();
    for digest in blobs {
        let good = lab.memory.blobs.lock()[&digest].clone();
        let mut bad = good.to_vec();
        bad[good.len() / 2] ^= 1;
        lab.memory.blobs.lock().insert(digest, bad.into());
        let said = lab.restore(&lab.path(&digest.hex())).await.unwrap_err();
        assert!(said.to_string().contains("is damaged"), "{said}");
        lab.memory.blobs.lock().insert(digest, good);
    }
    // A pack that the place lost is written again, and a list that cannot be read, too.
    for lost in ["pack", "tree"] {
        let (manifest, _) = lab.memory.manifests.lock()["key"].clone();
        let manifest: serde_json::Value = serde_json::from_slice(&manifest).unwrap();
        let layers = manifest["layers"].as_array().unwrap().iter();
        let layer = layers.clone().find(|l| l["mediaType"].as_str().unwrap().contains(lost));
        let digest: Digest = layer.unwrap()["digest"].as_str().unwrap().parse().unwrap();
        lab.memory.blobs.lock().remove(&digest);
        assert!(lab.restore(&lab.path(&format!("without-{lost}"))).await.is_err());
        fs::write(source.join("more"), lost).unwrap();
        lab.save(&source).await;
        let target = lab.path(&format!("again-{lost}"));
        lab.restore(&target).await.unwrap();
        assert_eq!(look(&target), look(&source));
    }
}

#[tokio::test]
async fn what_a_mount_begins_with_is_replaced_and_never_written_through() {
    let lab = Lab::new();
    let source = lab.path("source");
    fs::create_dir(source.join("dir")).unwrap();
    fs::write(source.join("dir/file"), "saved").unwrap();
    fs::write(source.join("top"), "saved").unwrap();
    lab.save(&source).await;
    let (target, outside) = (lab.path("target"), lab.path("outside"));
    fs::write(outside.join("file"), "outside").unwrap();
    symlink(outside.join("file"), target.join("top")).unwrap();
    fs::create_dir(target.join("dir")).unwrap();
    fs::write(target.join("dir/file"), "of the image").unwrap();
    lab.restore(&target).await.unwrap();
    assert_eq!(look(&target), look(&source));
    assert_eq!(fs::read_to_string(outside.join("file")).unwrap(), "outside");
    // A link in place of a directory.
    let target = lab.path("linked");
    symlink(&outside, target.join("dir")).unwrap();
    assert!(lab.restore(&target).await.is_err());
    assert_eq!(fs::read_to_string(outside.join("file")).unwrap(), "outside");
}
