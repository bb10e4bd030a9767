//! Random trees and random changes: what unpacking the layers of a state gives is the state, in
//! everything that `stat` and `listxattr` show, or the state has no snapshot under its chain ID. On
//! overlayfs and on a snapshotter that copies, on both containerds. `SHIPWAY_SEED` repeats one run;
//! `SHIPWAY_RANDOM_SECONDS` makes it as long as wanted.

#![allow(clippy::unwrap_used)]

use rustix::{
    fs::{AtFlags, CWD, FileType, Mode, Timespec, Timestamps, XattrFlags, makedev, mknodat},
    io::Errno,
};
use shipway_containerd::Containerd;
use shipway_fault::Result;
use shipway_integration::{on_each, random::Random};
use shipway_oci::{Descriptor, Digest};
use shipway_progress::Reporter;
use shipway_refs::{
    Compression, CompressionKind, ImmutableRef, LayerSource, LayerSourceId, LazyLayer, RecordType,
    RefStore,
};
use shipway_storage::{BlobReader, ContentStore, Labels, LeaseId, Storage};
use shipway_testkit::Lab;
use std::{
    collections::{BTreeMap, HashMap},
    ffi::OsStr,
    fs,
    os::unix::{
        ffi::{OsStrExt, OsStringExt},
        fs::{FileTypeExt, MetadataExt, PermissionsExt, lchown, symlink},
        net::UnixListener,
    },
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

/// How long each snapshotter of each containerd is tried.
const SECONDS: u64 = 4;
/// Steps on one another.
const STEPS: usize = 4;
/// Changes in one step.
const CHANGES: usize = 12;

/// A time of a file: usual ones, few enough to meet again, and odd ones.
fn time(random: &mut Random) -> Timespec {
    let tv_sec = match random.below(20) {
        0 => -5,
        1 => 1 << 34,
        2 => 0,
        _ => 1_000_000_000 + random.below(5) as i64,
    };
    Timespec { tv_sec, tv_nsec: *random.pick(&[0, 0, 1, 999_999_999]) }
}

/// A name of a file; a `strange` one may look like a whiteout.
fn name(random: &mut Random, strange: bool) -> Vec<u8> {
    match random.below(14) {
        0 => b"caf\xc3\xa9".to_vec(),
        1 => b"\xff\xfe".to_vec(),
        2 => vec![b'n'; 120],
        3 => b"new\nline".to_vec(),
        4 => b"a b".to_vec(),
        5 if strange => b".wh.b".to_vec(),
        n => vec![b'a' + n as u8],
    }
}

/// An access control list with user 1 in it.
fn acl(perm: u16) -> Vec<u8> {
    let mut value = 2u32.to_le_bytes().to_vec();
    for (tag, perm, id) in
        [(1u16, 7, u32::MAX), (2, perm, 1), (4, 5, u32::MAX), (16, 7, u32::MAX), (32, 5, u32::MAX)]
    {
        value.extend(tag.to_le_bytes());
        value.extend(perm.to_le_bytes());
        value.extend(id.to_le_bytes());
    }
    value
}

const CAPABILITY: [u8; 20] = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

fn attribute(random: &mut Random, strange: bool) -> (&'static str, Vec<u8>) {
    match random.below(if strange { 12 } else { 8 }) {
        0 | 1 => ("system.posix_acl_access", acl(random.below(8) as u16)),
        2 => ("system.posix_acl_default", acl(random.below(8) as u16)),
        3 | 4 => ("security.capability", CAPABILITY.to_vec()),
        5 => ("user.empty", Vec::new()),
        6 => ("user.lines", b"one\ntwo\0three=".to_vec()),
        7 => ("user.a", vec![random.below(256) as u8; random.below(300)]),
        8 => ("trusted.mine", b"1".to_vec()),
        9 => ("user.overlay.opaque", b"y".to_vec()),
        10 => ("user.a=b", b"1".to_vec()),
        _ => ("trusted.overlay.mine", b"y".to_vec()),
    }
}

/// All paths below `root`.
fn paths(root: &Path) -> Vec<PathBuf> {
    let (mut found, mut queue) = (Vec::new(), vec![root.to_owned()]);
    while let Some(dir) = queue.pop() {
        for entry in fs::read_dir(&dir).unwrap().flatten() {
            // What an overlay takes for a whiteout is listed in some directories, and not there.
            let Ok(meta) = entry.path().symlink_metadata() else { continue };
            if meta.is_dir() {
                queue.push(entry.path());
            }
            found.push(entry.path());
        }
    }
    found.sort();
    found
}

fn remove(path: &Path) -> std::io::Result<()> {
    if path.symlink_metadata()?.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) }
}

/// One change, as a process in the file system could make it. Not every one succeeds, and none
/// needs to.
fn change(root: &Path, random: &mut Random, strange: bool) -> std::io::Result<()> {
    let all = paths(root);
    let mut dirs: Vec<PathBuf> =
        all.iter().filter(|p| p.symlink_metadata().unwrap().is_dir()).cloned().collect();
    dirs.push(root.to_owned());
    let new = random.pick(&dirs).join(OsStr::from_bytes(&name(random, strange)));
    let old = if all.is_empty() { new.clone() } else { random.pick(&all).clone() };
    let touch = |path: &Path, time: Timespec| {
        let times = Timestamps { last_access: time, last_modification: time };
        rustix::fs::utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW)
    };
    // Never opened if it is a pipe or a device.
    if new
        .symlink_metadata()
        .is_ok_and(|meta| random.one_in(2) || !meta.is_file() && !meta.is_dir())
    {
        remove(&new)?;
    }
    match random.below(if strange { 20 } else { 17 }) {
        0..3 => {
            fs::write(&new, vec![random.below(256) as u8; random.below(3000)])?;
            fs::set_permissions(
                &new,
                fs::Permissions::from_mode(*random.pick(&[0o644, 0o600, 0o4755, 0o2711, 0o0])),
            )?;
            touch(&new, time(random))?;
        }
        3 | 4 => {
            fs::create_dir(&new)?;
            fs::set_permissions(
                &new,
                fs::Permissions::from_mode(*random.pick(&[0o755, 0o1777, 0o2775, 0o700])),
            )?;
        }
        5 => {
            symlink(random.pick(&["a", "/b", "../c", &"x".repeat(150)]), &new)?;
            lchown(&new, Some(random.below(3) as u32), None)?;
            touch(&new, time(random))?;
        }
        6 => {
            let (kind, device) = *random.pick(&[
                (FileType::Fifo, 0),
                (FileType::CharacterDevice, makedev(1, 3)),
                (FileType::BlockDevice, makedev(7, 300)),
            ]);
            mknodat(CWD, &new, kind, Mode::from_raw_mode(0o620), device)?;
        }
        7 => fs::hard_link(&old, &new)?,
        8 => fs::rename(&old, &new)?,
        9 => remove(&old)?,
        10 => {
            // A directory anew, with another thing in it.
            remove(&old)?;
            fs::create_dir(&old)?;
            fs::write(old.join("b"), "b")?;
        }
        11 => {
            lchown(&old, Some(*random.pick(&[0, 1000, 3_000_000])), Some(*random.pick(&[0, 5])))?;
            fs::set_permissions(
                &old,
                fs::Permissions::from_mode(*random.pick(&[0o644, 0o755, 0o4755])),
            )?;
        }
        12 => touch(&old, time(random))?,
        13 => {
            // Written again, and seemingly what it was.
            let meta = old.symlink_metadata()?;
            if meta.is_file() {
                let mut text = fs::read(&old)?;
                if let (Some(byte), true) = (text.last_mut(), random.one_in(2)) {
                    *byte ^= 1;
                }
                fs::write(&old, text)?;
            }
            lchown(&old, Some(meta.uid()), Some(meta.gid()))?;
            touch(&old, Timespec { tv_sec: meta.mtime(), tv_nsec: meta.mtime_nsec() as _ })?;
        }
        14 | 15 => {
            let (name, value) = attribute(random, strange);
            rustix::fs::lsetxattr(&old, name, &value, XattrFlags::empty())?;
        }
        16 => rustix::fs::lremovexattr(&old, attribute(random, strange).0)?,
        17 => drop(UnixListener::bind(&new)?),
        18 => mknodat(CWD, &new, FileType::CharacterDevice, Mode::empty(), makedev(0, 0))?,
        _ => match random.below(3) {
            0 => lchown(root, Some(1000), None)?,
            1 => fs::set_permissions(root, fs::Permissions::from_mode(0o1777))?,
            _ => {
                let (name, value) = attribute(random, true);
                rustix::fs::lsetxattr(root, name, &value, XattrFlags::empty())?;
            }
        },
    }
    Ok(())
}

/// All that `stat` and `listxattr` show of one path, but what only the file system decides: inode
/// numbers, blocks, the times of access and change, sizes and link counts of directories. Nobody
/// decides when the root was changed, nor, where directories are `copied` with what is in them,
/// when those were.
fn seen(path: &Path, inodes: &mut HashMap<u64, String>, root: bool, copied: bool) -> String {
    let meta = path.symlink_metadata().unwrap();
    let kind = meta.file_type();
    let mut text = format!("{:o} {}:{} {:x}", meta.mode(), meta.uid(), meta.gid(), meta.rdev());
    if !(root || copied && kind.is_dir()) {
        text += &format!(" at {}.{:09}", meta.mtime(), meta.mtime_nsec());
    }
    if !kind.is_dir() {
        let first = inodes
            .entry(meta.ino())
            .or_insert_with(|| path.file_name().unwrap().to_string_lossy().into_owned());
        text += &format!(" size {} links {} of {first}", meta.size(), meta.nlink());
    }
    if kind.is_file() {
        text += &format!(" {}", Digest::of(fs::read(path).unwrap()).hex());
    } else if kind.is_symlink() {
        text += &format!(" -> {}", fs::read_link(path).unwrap().display());
    } else if kind.is_socket() {
        text += " socket";
    }
    let mut names = vec![0; 4096];
    let n = match rustix::fs::llistxattr(path, &mut names) {
        Err(Errno::NOTSUP) => 0,
        n => n.unwrap(),
    };
    let mut names: Vec<&[u8]> = names[..n].split(|b| *b == 0).filter(|n| !n.is_empty()).collect();
    names.sort_unstable();
    for name in names {
        let mut value = vec![0; 4096];
        let n = rustix::fs::lgetxattr(path, name, &mut value).unwrap();
        text += &format!(" {}={:?}", String::from_utf8_lossy(name), &value[..n]);
    }
    text
}

fn tree(root: &Path, copied: bool) -> BTreeMap<Vec<u8>, String> {
    let mut inodes = HashMap::new();
    let mut all = BTreeMap::from([(Vec::new(), seen(root, &mut inodes, true, copied))]);
    for path in paths(root) {
        let name = path.strip_prefix(root).unwrap().to_owned().into_os_string().into_vec();
        all.insert(name, seen(&path, &mut inodes, false, copied));
    }
    all
}

/// What differs between two trees.
fn differences(one: &BTreeMap<Vec<u8>, String>, other: &BTreeMap<Vec<u8>, String>) -> Vec<String> {
    let names = one.keys().chain(other.keys()).collect::<std::collections::BTreeSet<_>>();
    let differs = names.into_iter().filter(|n| one.get(*n) != other.get(*n));
    differs
        .map(|n| {
            format!("{:?}:\n  {:?}\n  {:?}", String::from_utf8_lossy(n), one.get(n), other.get(n))
        })
        .collect()
}

/// Blobs of another namespace.
struct From(LayerSourceId, Storage);

#[async_trait::async_trait]
impl LayerSource for From {
    fn id(&self) -> LayerSourceId {
        self.0
    }

    async fn fetch(
        &self,
        layer: &Descriptor,
        content: &dyn ContentStore,
        lease: &LeaseId,
        _: Option<&Reporter>,
    ) -> Result<()> {
        let blob = self.1.content.read_all(layer.digest, layer.size).await?;
        content.put(lease, blob, &Labels::new()).await.map(drop)
    }

    async fn open(&self, layer: &Descriptor) -> Result<Box<dyn BlobReader>> {
        self.1.content.reader(layer.digest).await
    }

    fn describe(&self) -> String {
        "the namespace of the states".into()
    }
}

async fn tree_of(state: &ImmutableRef, store: &RefStore) -> BTreeMap<Vec<u8>, String> {
    tree(state.mount().await.unwrap().path(), store.storage().snapshots.name() == "native")
}

/// An image of layers whose blobs are in `from`.
async fn image(
    store: &RefStore,
    layers: &[shipway_refs::LayerBlob],
    from: &Storage,
) -> ImmutableRef {
    let source: Arc<dyn LayerSource> = Arc::new(From(LayerSourceId::next(), from.clone()));
    let lazy = |b: &shipway_refs::LayerBlob| LazyLayer {
        diff_id: b.diff_id,
        descriptor: b.descriptor.clone(),
        source: Some(source.clone()),
        created: None,
    };
    store.image(layers.iter().map(lazy).collect(), "image", RecordType::Regular).await.unwrap()
}

/// What became of states.
#[derive(Default)]
struct Tally {
    /// How many there were.
    all: usize,
    /// How many had no snapshot under their chain ID.
    own: usize,
    /// How many of those could have had it: safe, but a copy for nothing.
    needless: usize,
}

/// States of one seed, on one another.
async fn one_run(seed: u64, states: &RefStore, others: &RefStore, what: &str, tally: &mut Tally) {
    let random = &mut Random::new(seed);
    let strange = random.one_in(2);
    let mut state: Option<ImmutableRef> = None;
    for step in 0..STEPS {
        let writable = states
            .mutable(state.as_ref(), format!("step {step}"), RecordType::Regular, None)
            .await
            .unwrap();
        let mount = writable.mount().await.unwrap();
        for _ in 0..=random.below(CHANGES) {
            let _ = change(mount.path(), random, strange);
        }
        mount.unmount().await.unwrap();
        let was_exact = state.as_ref().is_none_or(ImmutableRef::is_exact);
        let next =
            writable.commit("step").await.unwrap_or_else(|e| panic!("{what}, step {step}: {e}"));
        let compression = Compression { kind: CompressionKind::Zstd, ..Compression::default() };
        let layers = next
            .blobs(compression, shipway_refs::Fetch::Everything, None)
            .await
            .unwrap_or_else(|e| panic!("{what}, step {step}: {e}"));
        let unpacked = image(others, &layers, states.storage()).await;
        if let Err(e) = unpacked.materialize(None).await {
            // What is named like a whiteout can make tars that nobody unpacks.
            assert!(!next.is_exact(), "{what}, step {step}: {e}");
            tally.all += 1;
            tally.own += 1;
            return;
        }
        let (here, there) = (tree_of(&next, states).await, tree_of(&unpacked, others).await);
        let differ = differences(&here, &there);
        if next.is_exact() {
            assert!(
                differ.is_empty(),
                "{what}, step {step}: the state is not what unpacking gives:\n{}",
                differ.join("\n")
            );
        } else {
            tally.own += 1;
            if was_exact && differ.is_empty() {
                eprintln!(
                    "{what}, step {step}: the state is what unpacking gives, and has another name"
                );
                tally.needless += 1;
            }
            next.unpack(compression, None).await.unwrap();
        }
        // What others find here under the chain ID.
        let mut named = tree_of(&image(states, &layers, states.storage()).await, states).await;
        let mut there = there;
        // A directory that is named like a whiteout is made for what is in it, when it is unpacked.
        for tree in [&mut named, &mut there] {
            tree.retain(|name, _| {
                !name.split(|b| *b == b'/').any(|part| part.starts_with(b".wh."))
            });
        }
        let differ = differences(&named, &there);
        assert!(
            differ.is_empty(),
            "{what}, step {step}: what the chain ID names is not what unpacking gives:\n{}",
            differ.join("\n")
        );
        state = Some(next);
        tally.all += 1;
    }
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

#[track_caller]
fn on_snapshotter(snapshotter: &'static str) {
    let first = number("SHIPWAY_SEED");
    let time = Duration::from_secs(number("SHIPWAY_RANDOM_SECONDS").unwrap_or(SECONDS));
    on_each(|flavour| {
        let lab = Lab::on(flavour);
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let containerd = Containerd::connect(lab.containerd_socket()).await.unwrap();
            let open = async |namespace: &str| {
                containerd.ensure_namespace(namespace).await.unwrap();
                let storage = containerd.storage(namespace, snapshotter).unwrap();
                RefStore::open(storage, dir.path().join(namespace)).await.unwrap()
            };
            let (states, others) = (open("states").await, open("unpacked").await);
            let began = Instant::now();
            let mut seed = first.unwrap_or_else(|| SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64);
            let mut tally = Tally::default();
            while tally.all == 0 || first.is_none() && began.elapsed() < time {
                let what = format!("{snapshotter} of containerd {} with SHIPWAY_SEED={seed}", flavour.version());
                one_run(seed, &states, &others, &what, &mut tally).await;
                seed = seed.wrapping_add(1);
            }
            let Tally { all, own, needless } = tally;
            eprintln!("{snapshotter}: {all} states, {own} of them not told by their layers; the last seed was {}", seed.wrapping_sub(1));
            assert!(needless * 10 <= all.max(20), "{needless} of {all} states were given another name for nothing");
            states.drained().await;
            others.drained().await;
        });
    });
}

#[test]
fn random_states_on_overlayfs_are_what_unpacking_gives() {
    on_snapshotter("overlayfs");
}

#[test]
fn random_states_on_a_copying_snapshotter_are_what_unpacking_gives() {
    on_snapshotter("native");
}
