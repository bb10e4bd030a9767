//! Layers mounted by this machine's kernel, in each way that it can. As root, in mount namespaces
//! that go with the tests.

#![allow(clippy::unwrap_used)]

mod common;

use common::*;
use parking_lot::{Mutex, MutexGuard};
use rustix::{
    fs::CWD,
    mount::{
        MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags,
        mount_change, move_mount, open_tree,
    },
};
use shipway_layermount::*;
use std::{
    ffi::CString,
    fs::{self, File},
    io::{BufRead as _, BufReader},
    os::{fd::AsFd as _, unix::fs::MetadataExt as _},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    time::{Duration, Instant},
};

/// The ways that need the kernel.
const TIERS: [Tier; 5] = [Tier::File, Tier::FlatFile, Tier::Loop, Tier::FlatLoop, Tier::FuseTree];

/// Held by the test that runs: a child that another one starts has, for a moment, all that is open
/// here, and what is open cannot be unmounted.
static ALONE: Mutex<()> = Mutex::new(());

/// A directory with a server, a probe and mount points.
struct Lab {
    dir: tempfile::TempDir,
    server: Server,
    probed: ProbeLayer,
    served: FuseFiles,
    alone: MutexGuard<'static, ()>,
}

impl Lab {
    fn new() -> Self {
        let alone = ALONE.lock();
        own_mounts();
        let dir = directory();
        let server = Server::start(&dir.path().join("k"));
        let (layers, mounts) = (dir.path().join("layers"), dir.path().join("l"));
        [&layers.join("probe"), &mounts].into_iter().for_each(|d| fs::create_dir_all(d).unwrap());
        let probed = ProbeLayer::write(&layers.join("probe")).unwrap();
        let served = server.add(0, &probed.meta, &probed.data);
        Self { dir, server, probed, served, alone }
    }

    fn probe(&self, forced: Option<Tier>) -> shipway_fault::Result<Probe> {
        probe(&self.probed, Some(&self.served), forced)
    }

    /// The ways that work here; of the others it is told why they do not.
    fn tiers(&self) -> Vec<Tier> {
        let works = |tier: &Tier| match self.probe(Some(*tier)) {
            Ok(_) => true,
            Err(why) => {
                eprintln!("NOT TESTED: this kernel cannot do {tier:?}: {why}");
                false
            }
        };
        TIERS.into_iter().filter(works).collect()
    }

    /// Those in which a layer that is whole is mounted without the server, or could be.
    fn image_tiers(&self) -> Vec<Tier> {
        self.tiers().into_iter().filter(|tier| *tier != Tier::FuseTree).collect()
    }

    fn layer(&self, number: u32) -> (Layer, FuseFiles) {
        let layer = Layer::write(&self.dir.path().join("layers"), number);
        let files = self.server.layer(&layer);
        (layer, files)
    }

    /// A mount point.
    fn at(&self, name: &str) -> PathBuf {
        let path = self.dir.path().join("l").join(name);
        fs::create_dir_all(&path).unwrap();
        path
    }

    fn mounted(&self) -> Vec<Mounted> {
        scan(&self.dir.path().join("l")).unwrap()
    }

    /// What is below loop devices over files of this lab.
    fn loops(&self) -> Vec<String> {
        self.devices().into_iter().map(|(_, backing)| backing).collect()
    }

    /// Those devices, as directories of sysfs, and their files.
    fn devices(&self) -> Vec<(PathBuf, String)> {
        let mut found = Vec::new();
        for entry in fs::read_dir("/sys/block").unwrap() {
            let file = entry.unwrap().path().join("loop/backing_file");
            let Ok(backing) = fs::read_to_string(&file) else { continue };
            if backing.starts_with(self.dir.path().to_str().unwrap()) {
                found.push((file.with_file_name(""), backing.trim_end().to_owned()));
            }
        }
        found
    }

    fn assert_nothing_left(&self) {
        assert_eq!(self.mounted(), []);
        // Whoever looks at devices that come and go, as udev does, keeps them for a moment.
        let deadline = Instant::now() + Duration::from_secs(20);
        while !self.loops().is_empty() {
            assert!(Instant::now() < deadline, "left: {:?}", self.loops());
            std::thread::yield_now();
        }
    }
}

fn overlay(lower: &[&Path], at: &Path) {
    let lower: Vec<_> = lower.iter().map(|l| l.to_str().unwrap()).collect();
    let options = CString::new(format!("lowerdir={}", lower.join(":"))).unwrap();
    fs::create_dir_all(at).unwrap();
    rustix::mount::mount("overlay", at, "overlay", MountFlags::empty(), options.as_c_str())
        .unwrap();
}

#[test]
fn the_probe_finds_a_way_and_says_why_no_better_one() {
    let lab = Lab::new();
    let found = lab.probe(None).unwrap();
    println!("{found:#?}");
    assert!(TIERS.contains(&found.tier), "no way to read layers here: {found:?}");
    let better: Vec<Tier> = found.passed_over.iter().map(|p| p.0).collect();
    assert_eq!(better, Tier::ALL[..better.len()]);
    assert_eq!(Tier::ALL[better.len()], found.tier);
    // Each that works can be forced, and what cannot work is refused.
    for tier in lab.tiers() {
        assert_eq!(lab.probe(Some(tier)).unwrap().tier, tier);
    }
    let missing = FuseFiles { tree: lab.dir.path().join("k/99"), ..lab.served.clone() };
    let refused = probe(&lab.probed, Some(&missing), Some(Tier::FuseTree)).unwrap_err();
    assert!(refused.to_string().contains("FuseTree"), "{refused}");
    // Without FUSE, layers are unpacked.
    let without = probe(&lab.probed, None, None).unwrap();
    assert_eq!((without.tier, without.passed_over.len()), (Tier::NotLazy, 5));
    lab.assert_nothing_left();
}

/// What a layer's directory is on makes a difference.
#[test]
fn on_tmpfs_the_metadata_comes_through_the_server() {
    let lab = Lab::new();
    let works = lab.tiers();
    if !works.contains(&Tier::FlatFile) {
        eprintln!("NOT TESTED: tmpfs below file-backed images");
        return;
    }
    let memory = lab.dir.path().join("memory");
    tmpfs(&memory);
    let probed = ProbeLayer::write(&memory).unwrap();
    let served = lab.server.add(1, &probed.meta, &probed.data);
    let found = probe(&probed, Some(&served), None).unwrap();
    assert_eq!(found.tier, Tier::FlatFile, "{found:?}");
    assert_eq!(found.passed_over[0].0, Tier::File);
    lab.assert_nothing_left();
    // The server still has files there.
    rustix::mount::unmount(&memory, UnmountFlags::DETACH).unwrap();
}

/// A server that tells lies is found out by the probe.
#[test]
fn wrong_bytes_are_no_way() {
    let lab = Lab::new();
    let mut bytes = fs::read(&lab.probed.data).unwrap();
    bytes[700_000] ^= 1;
    let wrong = lab.dir.path().join("wrong");
    fs::write(&wrong, bytes).unwrap();
    let served = lab.server.add(1, &lab.probed.meta, &wrong);
    for tier in lab.tiers() {
        let error = probe(&lab.probed, Some(&served), Some(tier)).unwrap_err();
        assert!(error.to_string().contains("wrong contents"), "{error}");
    }
    lab.assert_nothing_left();
}

#[test]
fn a_layer_is_mounted_read_through_nested_overlays_and_unmounted() {
    let lab = Lab::new();
    let (layer, files) = lab.layer(1);
    for tier in lab.tiers() {
        let source = tier.served(&layer.meta, &files).unwrap();
        let at = lab.at("1");
        let before = lab.server.reads();
        mount(&source, &at).unwrap();
        let again = mount(&source, &at).unwrap_err();
        assert_eq!(again.code(), shipway_fault::Code::AlreadyExists);
        check(&at, 1);
        assert!(lab.server.reads() > before, "{tier:?}: the bytes come from the server");
        let [mounted] = &lab.mounted()[..] else { panic!("{:?}", lab.mounted()) };
        assert!(mounted.reads(&source), "{tier:?} {mounted:?}");
        assert!(mounted.uuid().is_none_or(|uuid| uuid == layer.uuid));
        // An image is not what an administrator mounts: set-id bits and devices count.
        let options = fs::read_to_string("/proc/thread-self/mounts").unwrap();
        let line = options.lines().find(|l| l.contains(at.to_str().unwrap())).unwrap();
        assert!(line.contains(" ro,") && !line.contains("nosuid") && !line.contains("nodev"));
        let [empty, inner, outer] = ["empty", "inner", "outer"].map(|n| lab.dir.path().join(n));
        fs::create_dir_all(&empty).unwrap();
        overlay(&[&at, &empty], &inner);
        overlay(&[&inner, &empty], &outer);
        check(&outer, 1);
        // The mount may go while overlays have it; they keep it.
        assert_eq!(unmount(&at).unwrap(), Unmounted::Gone);
        check(&outer, 1);
        for path in [&outer, &inner] {
            rustix::mount::unmount(path, UnmountFlags::empty()).unwrap();
        }
        assert_eq!(unmount(&at).unwrap(), Unmounted::Nothing);
        lab.assert_nothing_left();
        // One that is in use goes from the path, and its devices when that ends.
        mount(&source, &at).unwrap();
        let file = File::open(at.join("f3")).unwrap();
        assert_eq!(unmount(&at).unwrap(), Unmounted::InUse);
        assert_eq!(lab.mounted(), []);
        drop(file);
        lab.assert_nothing_left();
    }
}

/// Readers with cold caches: each look at the layer is another mount of the same files, made and
/// taken away beside the one that is looked for. What is in the caches of others stays there.
#[test]
fn a_layer_that_became_whole_is_read_from_the_disk_with_no_wrong_byte_meanwhile() {
    const SWAPS: usize = 12;
    let lab = Lab::new();
    let (layer, files) = lab.layer(3);
    let flat = layer.flat();
    for tier in lab.image_tiers() {
        let served = tier.served(&layer.meta, &files).unwrap();
        let local = match tier {
            // Without a table of devices the local file has to be flat as well.
            Tier::FlatLoop => {
                assert_eq!(tier.local(&layer.meta, &layer.data), None);
                Source::Loop(flat.clone())
            }
            tier => tier.local(&layer.meta, &layer.data).unwrap(),
        };
        let at = lab.at("3");
        mount(&served, &at).unwrap();
        // A container that has been running all along.
        let (empty, inner) = (lab.dir.path().join("empty"), lab.dir.path().join("inner"));
        fs::create_dir_all(&empty).unwrap();
        overlay(&[&at, &empty], &inner);
        let held = File::open(at.join("f3")).unwrap();
        let (done, looks) = (AtomicBool::new(false), AtomicU64::new(0));
        std::thread::scope(|scope| {
            for n in 0..2 {
                let (at, inner, done, looks) = (&at, &inner, &done, &looks);
                let other = lab.at(&format!("cold{n}"));
                let cold = [&served, &local][n % 2];
                scope.spawn(move || {
                    while !done.load(Ordering::Relaxed) {
                        // The path is never empty, whichever mount is there.
                        check(at, 3);
                        check_file(&inner.join("f3"), 3, 3);
                        mount(cold, &other).unwrap();
                        check_file(&other.join("f2"), 3, 2);
                        unmount(&other).unwrap();
                        looks.fetch_add(1, Ordering::Relaxed);
                    }
                });
            }
            for turn in 0..SWAPS {
                let seen = looks.load(Ordering::Relaxed);
                let (from, to) = [(&served, &local), (&local, &served)][turn % 2];
                swap(&at, from, to).unwrap();
                while looks.load(Ordering::Relaxed) < seen + 2 {
                    std::thread::yield_now();
                }
            }
            // In the end it is local.
            swap(&at, &served, &local).unwrap();
            done.store(true, Ordering::Relaxed);
        });
        let mounts = lab.mounted();
        let [mounted] = &mounts[..] else { panic!("{tier:?}: {mounts:?}") };
        assert!(mounted.reads(&local), "{tier:?} {mounted:?}");
        assert!(!mounted.reads(&served), "{tier:?} {mounted:?}");
        // New readers do not ask the server; on loop devices, neither do those from before.
        let before = lab.server.reads();
        let cold = lab.at("cold");
        mount(&local, &cold).unwrap();
        check(&cold, 3);
        unmount(&cold).unwrap();
        check(&at, 3);
        assert_eq!(lab.server.reads(), before, "{tier:?}");
        // However often its file was changed, a device passes the page cache over.
        for (device, file) in lab.devices() {
            assert_eq!(fs::read_to_string(device.join("dio")).unwrap(), "1\n", "{file}");
        }
        let on_server = lab.loops().iter().any(|file| file.contains("/k/"));
        assert!(!on_server, "{tier:?}: {:?}", lab.loops());
        rustix::mount::unmount(&inner, UnmountFlags::empty()).unwrap();
        drop(held);
        unmount(&at).unwrap();
        lab.assert_nothing_left();
        println!("{tier:?}: {} looks during {SWAPS} swaps", looks.into_inner());
    }
}

/// Sizes have to be the same for a loop device, and what was there stays if the swap fails.
#[test]
fn a_swap_that_cannot_be_leaves_what_is_there() {
    let lab = Lab::new();
    let (layer, files) = lab.layer(4);
    let longer = lab.dir.path().join("longer");
    let mut bytes = fs::read(&layer.data).unwrap();
    bytes.extend([0; 1 << 16]);
    fs::write(&longer, bytes).unwrap();
    for tier in lab.image_tiers() {
        let served = tier.served(&layer.meta, &files).unwrap();
        let wrong = match tier {
            Tier::Loop => Source::Loops { meta: layer.meta.clone(), data: longer.clone() },
            Tier::FlatLoop => Source::Loop(longer.clone()),
            // Not an image.
            _ => Source::File(longer.clone()),
        };
        let at = lab.at("4");
        mount(&served, &at).unwrap();
        assert!(swap(&at, &served, &wrong).is_err(), "{tier:?}");
        assert!(lab.mounted()[0].reads(&served) && lab.mounted().len() == 1);
        check(&at, 4);
        unmount(&at).unwrap();
        // Nor is there anything to swap now.
        assert!(swap(&at, &served, &tier.served(&layer.meta, &files).unwrap()).is_err());
        lab.assert_nothing_left();
    }
}

#[test]
fn a_data_file_that_anything_reads_is_told_from_one_that_nothing_does() {
    let lab = Lab::new();
    let (layer, files) = lab.layer(5);
    let owner = File::options().read(true).write(true).open(&layer.data).unwrap();
    // What the server has in common with whoever asks is the description: here not.
    assert!(is_used(owner.as_fd()).unwrap());
    drop(files);
    let lab = {
        let Lab { dir, server, probed, served, alone } = lab;
        drop(server);
        let server = Server::start(&dir.path().join("k"));
        let served = FuseFiles { ..served };
        server.add(0, &probed.meta, &probed.data);
        Lab { dir, server, probed, served, alone }
    };
    let alone = || !is_used(owner.as_fd()).unwrap();
    assert!(alone());
    let copy = owner.try_clone().unwrap();
    assert!(alone(), "a duplicate is the same description");
    let reader = File::open(&layer.data).unwrap();
    assert!(!alone());
    drop((copy, reader));
    assert!(alone());
    for tier in lab.tiers() {
        let Some(local) = tier.local(&layer.meta, &layer.data) else { continue };
        let at = lab.at("5");
        mount(&local, &at).unwrap();
        assert!(!alone(), "{tier:?}");
        // Nowhere to be seen, but an overlay has it.
        let (empty, inner) = (lab.dir.path().join("empty"), lab.dir.path().join("inner"));
        fs::create_dir_all(&empty).unwrap();
        overlay(&[&at, &empty], &inner);
        assert_eq!(unmount(&at).unwrap(), Unmounted::Gone);
        assert!(!alone(), "{tier:?}: in an overlay");
        rustix::mount::unmount(&inner, UnmountFlags::empty()).unwrap();
        assert!(alone(), "{tier:?}: free again");
        lab.assert_nothing_left();
    }
}

#[test]
fn clones_for_user_namespaces_have_their_owners() {
    let lab = Lab::new();
    let (layer, files) = lab.layer(6);
    let ids = MappedIds::parse("0:100000:3", "0:200000:65536").unwrap();
    let namespace = UserNamespace::new(&ids).unwrap();
    for tier in lab.tiers() {
        let (at, clone) = (lab.at("6"), lab.at("6.mapped"));
        mount(&tier.served(&layer.meta, &files).unwrap(), &at).unwrap();
        clone_mapped(&at, &namespace, &clone).unwrap();
        let owners = |root: &Path| {
            [0, 1, 2, 3].map(|n| {
                let found = fs::metadata(root.join(format!("f{n}"))).unwrap();
                (found.uid(), found.gid())
            })
        };
        assert_eq!(owners(&at), [(0, 0), (1, 1), (2, 2), (3, 3)]);
        // The last has no owner in the namespace, which shows as nobody.
        let nobody = fs::read_to_string("/proc/sys/kernel/overflowuid").unwrap();
        let mapped = [
            (100_000, 200_000),
            (100_001, 200_001),
            (100_002, 200_002),
            (nobody.trim().parse().unwrap(), 200_003),
        ];
        assert_eq!(owners(&clone), mapped);
        check(&clone, 6);
        let (empty, inner) = (lab.dir.path().join("empty"), lab.dir.path().join("inner"));
        fs::create_dir_all(&empty).unwrap();
        overlay(&[&clone, &empty], &inner);
        assert_eq!(owners(&inner), mapped);
        let found = lab.mounted();
        let [one, other] = &found[..] else { panic!("{found:?}") };
        assert!(!one.mapped && other.mapped && one.device == other.device);
        rustix::mount::unmount(&inner, UnmountFlags::empty()).unwrap();
        for path in [&clone, &at] {
            assert_eq!(unmount(path).unwrap(), Unmounted::Gone);
        }
        lab.assert_nothing_left();
    }
    // A directory is cloned likewise, but without what is mounted in it: the trap for who clones a
    // common parent of mount points.
    let clone = lab.dir.path().join("all");
    fs::create_dir_all(&clone).unwrap();
    let (at, beside) = (lab.at("6"), lab.at("beside"));
    fs::write(beside.join("file"), b"x").unwrap();
    let tier = lab.tiers()[0];
    mount(&tier.served(&layer.meta, &files).unwrap(), &at).unwrap();
    clone_mapped(&lab.dir.path().join("l"), &namespace, &clone).unwrap();
    assert_eq!(fs::metadata(clone.join("beside/file")).unwrap().uid(), 100_000);
    assert_eq!(fs::read_dir(clone.join("6")).unwrap().count(), 0);
    unmount(&clone).unwrap();
    unmount(&at).unwrap();
    // No process is left of a namespace, and the kernel says what it does not take.
    let overlapping = MappedIds::parse("0:1:2,1:9:1", "0:0:1").unwrap();
    assert!(UserNamespace::new(&overlapping).is_err());
    match fs::read_to_string("/proc/thread-self/children") {
        Ok(children) => assert_eq!(children, ""),
        Err(error) => eprintln!("NOT TESTED: whether a process is left: {error}"),
    }
}

#[test]
fn paths_are_as_long_as_the_kernel_takes_them() {
    let lab = Lab::new();
    let (layer, _) = lab.layer(2);
    let at = lab.at("2");
    let parent = lab.dir.path().join("x".repeat(100));
    fs::create_dir(&parent).unwrap();
    for (length, fits) in [(MAX_PATH, true), (MAX_PATH + 1, false)] {
        let meta = parent.join("m".repeat(length - parent.as_os_str().len() - 1));
        fs::copy(&layer.meta, &meta).unwrap();
        let mounted = mount(&Source::Files { meta, data: layer.data.clone() }, &at);
        match (mounted, fits) {
            (Ok(()), true) => check(&at, 2),
            (Err(error), false) => assert!(error.to_string().contains("255"), "{error}"),
            (Err(error), true) if !lab.tiers().contains(&Tier::File) => {
                eprintln!("NOT TESTED: long paths: {error}");
            }
            (mounted, _) => panic!("{length}: {mounted:?}"),
        }
        unmount(&at).unwrap();
    }
}

/// Hosts have shared mounts, and other namespaces that follow them.
#[test]
fn a_swap_where_mounts_are_shared_reaches_all_that_share_them() {
    let lab = Lab::new();
    let (layer, files) = lab.layer(5);
    let l = lab.dir.path().join("l");
    rustix::mount::mount_bind(&l, &l).unwrap();
    mount_change(&l, MountPropagationFlags::SHARED).unwrap();
    for tier in lab.tiers() {
        if !matches!(tier, Tier::File | Tier::FlatFile) {
            continue;
        }
        let served = tier.served(&layer.meta, &files).unwrap();
        let local = tier.local(&layer.meta, &layer.data).unwrap();
        let at = lab.at("5");
        let peer = |step: &dyn Fn()| {
            // A namespace that follows ours, from before on.
            std::thread::scope(|scope| {
                let (started, start) = std::sync::mpsc::channel();
                let (done, end) = std::sync::mpsc::channel::<()>();
                let (l, at, served, local) = (&l, &at, &served, &local);
                let follower = scope.spawn(move || {
                    following_mounts();
                    started.send(()).unwrap();
                    end.recv().unwrap();
                    let found = scan(l).unwrap();
                    let [mounted] = &found[..] else { panic!("{found:?}") };
                    assert!(mounted.at == *at && mounted.reads(local) && !mounted.reads(served));
                    check(at, 5);
                });
                start.recv().unwrap();
                step();
                done.send(()).unwrap();
                follower.join().unwrap();
            });
        };
        peer(&|| {
            mount(&served, &at).unwrap();
            check(&at, 5);
            swap(&at, &served, &local).unwrap();
        });
        let found = lab.mounted();
        let [mounted] = &found[..] else { panic!("{found:?}") };
        assert!(mounted.reads(&local), "{tier:?} {mounted:?}");
        check(&at, 5);
        unmount(&at).unwrap();
        assert_eq!(lab.mounted(), []);
    }
    rustix::mount::unmount(&l, UnmountFlags::DETACH).unwrap();
    lab.assert_nothing_left();
}

#[test]
fn a_hundred_layers_are_mounted_and_gone() {
    let lab = Lab::new();
    let layers: Vec<_> = (1..=100).map(|n| lab.layer(n)).collect();
    for tier in lab.tiers() {
        let start = Instant::now();
        for (layer, files) in &layers {
            let at = lab.at(&layer.number.to_string());
            mount(&tier.served(&layer.meta, files).unwrap(), &at).unwrap();
        }
        let mounted = start.elapsed();
        assert_eq!(lab.mounted().len(), layers.len());
        let ats: Vec<_> = layers.iter().map(|(l, _)| lab.at(&l.number.to_string())).collect();
        for (n, at) in (1..).zip(&ats) {
            check_file(&at.join("f1"), n, 1);
        }
        for at in &ats {
            assert_eq!(unmount(at).unwrap(), Unmounted::Gone);
        }
        println!("{tier:?}: 100 mounts {mounted:?}, unmounted {:?}", start.elapsed() - mounted);
        lab.assert_nothing_left();
    }
}

/// Mounts, swaps and unmounts without end, as `plan` says.
fn go_on_until_killed(plan: &str) -> ! {
    let mut fields = plan.split('\n');
    let tier: Tier = fields.next().unwrap().parse().unwrap();
    let [at, meta, data, served, img, flat]: [PathBuf; 6] =
        fields.map(PathBuf::from).collect::<Vec<_>>().try_into().unwrap();
    let tree = PathBuf::new();
    let served = tier.served(&meta, &FuseFiles { data: served, img, tree }).unwrap();
    let local = match tier {
        Tier::FlatLoop => Source::Loop(flat),
        tier => tier.local(&meta, &data).unwrap(),
    };
    loop {
        mount(&served, &at).unwrap();
        swap(&at, &served, &local).unwrap();
        unmount(&at).unwrap();
        println!("turn");
    }
}

/// Whatever was mounted at the moment of a kill is recognized afterwards, used on, and taken away.
#[test]
fn a_process_that_is_killed_leaves_what_its_successor_understands() {
    const PLAN: &str = "LAYERMOUNT_TEST_PLAN";
    const KILLS: u64 = 25;
    if let Ok(plan) = std::env::var(PLAN) {
        go_on_until_killed(&plan);
    }
    let lab = Lab::new();
    let (layer, files) = lab.layer(7);
    let flat = layer.flat();
    let at = lab.at("7");
    for tier in lab.image_tiers() {
        let served = tier.served(&layer.meta, &files).unwrap();
        let local = match tier {
            Tier::FlatLoop => Source::Loop(flat.clone()),
            tier => tier.local(&layer.meta, &layer.data).unwrap(),
        };
        let sources = [local, served];
        let (mut adopted, mut anew) = (0, 0);
        for kill in 0..KILLS {
            let paths = [&at, &layer.meta, &layer.data, &files.data, &files.img, &flat];
            let mut plan = vec![tier.name()];
            plan.extend(paths.map(|p| p.to_str().unwrap()));
            let mut child = Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "--nocapture"])
                .arg("a_process_that_is_killed_leaves_what_its_successor_understands")
                .env(PLAN, plan.join("\n"))
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
            // Some turns, and some way into the next.
            let turns = 1 + kill as usize % 3;
            let told = lines.by_ref().map(|l| l.unwrap()).filter(|l| l.ends_with("turn"));
            assert_eq!(told.take(turns).count(), turns);
            for _ in 0..kill.wrapping_mul(0x9e37_79b9) % 300_000 {
                std::hint::spin_loop();
            }
            child.kill().unwrap();
            child.wait().unwrap();
            match adopt(&at, &lab.mounted(), &sources).unwrap() {
                Some(_) => adopted += 1,
                None => {
                    anew += 1;
                    mount(&sources[1], &at).unwrap();
                }
            }
            let [mounted] = &lab.mounted()[..] else { panic!("{:?}", lab.mounted()) };
            assert!(sources.iter().any(|s| mounted.reads(s)), "{tier:?} {mounted:?}");
            check(&at, 7);
            unmount(&at).unwrap();
            lab.assert_nothing_left();
        }
        println!("{tier:?}: of {KILLS} kills {adopted} left a mount and {anew} none");
        assert!(adopted > 0, "{tier:?}: no kill tested anything");
    }
}

/// A daemon was killed in the middle of a swap: the mount that was to go is on the new one.
#[test]
fn a_swap_is_finished_and_what_is_of_no_use_goes() {
    let lab = Lab::new();
    let (layer, files) = lab.layer(8);
    let (other, other_files) = lab.layer(9);
    for tier in lab.tiers() {
        let served = tier.served(&layer.meta, &files).unwrap();
        let of_other = tier.served(&other.meta, &other_files).unwrap();
        // Only where a swap mounts something.
        if !matches!(tier, Tier::File | Tier::FlatFile) {
            continue;
        }
        let local = tier.local(&layer.meta, &layer.data).unwrap();
        let (at, beside) = (lab.at("8"), lab.at("beside"));
        let stacked = |lower: &Source, upper: &Source| {
            mount(upper, &at).unwrap();
            mount(lower, &beside).unwrap();
            let clone = open_tree(CWD, &beside, OpenTreeFlags::OPEN_TREE_CLONE).unwrap();
            let flags =
                MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_BENEATH;
            match move_mount(clone.as_fd(), "", CWD, &at, flags) {
                Ok(()) => {}
                Err(rustix::io::Errno::INVAL) => {
                    eprintln!("NOT TESTED: a swap needs Linux 6.5");
                    return false;
                }
                Err(error) => panic!("{error}"),
            }
            unmount(&beside).unwrap();
            assert_eq!(lab.mounted().len(), 2);
            true
        };
        if stacked(&local, &served) {
            let sources = [served.clone(), local.clone()];
            assert_eq!(adopt(&at, &lab.mounted(), &sources).unwrap(), Some(1), "{tier:?}");
            let [mounted] = &lab.mounted()[..] else { panic!("{:?}", lab.mounted()) };
            assert!(mounted.reads(&local), "{tier:?} {mounted:?}");
            check(&at, 8);
        }
        unmount(&at).unwrap();
        if stacked(&of_other, &served) {
            assert_eq!(adopt(&at, &lab.mounted(), &[served.clone(), local.clone()]).unwrap(), None);
        }
        // Another layer, or something else.
        unmount(&at).unwrap();
        mount(&of_other, &at).unwrap();
        assert_eq!(adopt(&at, &lab.mounted(), &[served.clone(), local.clone()]).unwrap(), None);
        tmpfs(&at);
        assert_eq!(adopt(&at, &lab.mounted(), &[served.clone(), local.clone()]).unwrap(), None);
        lab.assert_nothing_left();
        mount(&served, &at).unwrap();
        assert_eq!(adopt(&at, &lab.mounted(), &[served]).unwrap(), Some(0));
        unmount(&at).unwrap();
        lab.assert_nothing_left();
    }
}
