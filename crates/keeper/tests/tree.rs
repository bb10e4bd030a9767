//! Layers as trees of the keeper's, for kernels that mount no images. As root, for only root
//! mounts.
//!
//! Each test has mounts of its own, which end with it; its keepers are killed with it.

#![allow(clippy::unwrap_used, clippy::disallowed_types)]

#[path = "../../erofs/tests/common/mod.rs"]
mod common;
mod lab;
#[path = "../../erofs/tests/common/mounted.rs"]
mod mounted;

use common::{Attrs, Layer, Thing, bytes};
use lab::{Daemon, Dice, Lab, Server, TestLayer};
use mounted::{assert_same, compare};
use rustix::mount::{MountFlags, UnmountFlags};
use shipway_erofs::{Form, OpaqueMark, Options};
use shipway_keeper::client::{ClientError, News};
use shipway_layermount::{MappedIds, Source, UserNamespace, clone_mapped, mount, unmount};
use std::{
    collections::HashMap,
    ffi::CString,
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

/// A layer and its files. Its image and data are all there, and nothing of it is good yet.
struct Made {
    layer: Layer,
    meta: Vec<u8>,
}

impl Made {
    fn new(mut layer: Layer) -> Self {
        let meta = bytes(&layer.image(), Form::WithDevice);
        Self { layer, meta }
    }

    fn files(&self, lab: &Lab, n: u32) -> TestLayer {
        TestLayer::of(lab, n, &self.meta, &self.layer.data)
    }
}

/// A directory that something can be mounted at.
fn at(lab: &Lab, name: &str) -> PathBuf {
    let at = lab.path("").with_file_name(name);
    fs::create_dir_all(&at).unwrap();
    at
}

fn mount_tree(lab: &Lab, n: u32) -> PathBuf {
    let at = at(lab, &format!("tree-{n}"));
    mount(&Source::Tree(lab.path(&n.to_string())), &at).unwrap();
    at
}

/// Has everything good that is waited for.
fn serve(daemon: Daemon) -> Server {
    Server::new(daemon, |keeper, n, blocks| keeper.have(n, blocks).unwrap())
}

fn overlay(options: &str, at: &Path) {
    let options = CString::new(options).unwrap();
    fs::create_dir_all(at).unwrap();
    rustix::mount::mount("overlay", at, "overlay", MountFlags::empty(), options.as_c_str())
        .unwrap();
}

#[test]
fn a_tree_is_what_was_inserted() {
    let lab = Lab::new();
    let _keeper = lab.start();
    let daemon = lab.connect();
    let mut layers = Vec::new();
    for seed in 1..=12 {
        let made = Made::new(Layer::random(u64::from(seed), 25 * seed as usize));
        daemon.add(&made.files(&lab, seed));
        layers.push((seed, made));
    }
    let server = serve(daemon);
    for (n, made) in &layers {
        let at = mount_tree(&lab, *n);
        compare(&at, &made.layer.model);
        // Once more, from what the kernel has kept.
        compare(&at, &made.layer.model);
        unmount(&at).unwrap();
    }
    drop(server);
}

/// As in a container, and in one that runs in it; and as a file system of the kernel's shows it.
#[test]
fn overlays_over_a_tree_show_what_they_show_over_the_image() {
    let lab = Lab::new();
    let _keeper = lab.start();
    let daemon = lab.connect();
    let mut made = Vec::new();
    // Below, a layer that the others hide parts of, by whiteouts and opaque directories.
    for n in 1..=9u32 {
        let options = Options::default();
        let mut layer = Layer::new(options, Attrs { mode: 0o755, ..Attrs::default() });
        // Names meet, since those of all makers begin alike.
        let mut maker = common::Maker::new(u64::from(n));
        for _ in 0..300 {
            let op = maker.op(&layer.model);
            layer.add(&op);
        }
        let made_one = Made::new(layer);
        let files = made_one.files(&lab, n);
        daemon.add(&files);
        made.push((n, files.meta_path.clone()));
    }
    let server = serve(daemon);
    let mounts: Vec<[PathBuf; 2]> = made
        .iter()
        .map(|(n, meta)| {
            let image = at(&lab, &format!("image-{n}"));
            let data = lab.path(&format!("{n}.data"));
            mount(&Source::Files { meta: meta.clone(), data }, &image).unwrap();
            [mount_tree(&lab, *n), image]
        })
        .collect();
    let mut compared = 0;
    for three in mounts.chunks(3) {
        let [tree, image] = [0, 1].map(|which| {
            let lower: Vec<&str> = three.iter().map(|m| m[which].to_str().unwrap()).collect();
            let [inner, outer, empty] =
                ["inner", "outer", "empty"].map(|name| at(&lab, &format!("{name}-{which}")));
            overlay(&format!("lowerdir={},xino=on", lower.join(":")), &inner);
            let both = format!("{}:{}", inner.display(), empty.display());
            overlay(&format!("lowerdir={both},xino=on"), &outer);
            [inner, outer]
        });
        for (tree, image) in tree.iter().zip(&image) {
            compared += assert_same(tree, image);
        }
        for path in tree.iter().rev().chain(image.iter().rev()) {
            rustix::mount::unmount(path, UnmountFlags::empty()).unwrap();
        }
    }
    assert!(compared > 300, "{compared}");
    for at in mounts.iter().flatten() {
        unmount(at).unwrap();
    }
    drop(server);
}

/// As of the other files of the directory: misses wait for a daemon, and errors do not stick,
/// though the kernel keeps what it has read.
#[test]
fn reads_of_what_is_missing_wait_and_errors_do_not_stick() {
    let lab = Lab::new();
    let _keeper = lab.start();
    let daemon = lab.connect();
    let mut layer = Layer::new(Options::default(), Attrs { mode: 0o755, ..Attrs::default() });
    layer.add(&common::Op::new("before", Thing::File(vec![1; 5000].into())));
    let contents: Vec<u8> = (0..9000).map(|n| n as u8 | 1).collect();
    layer.add(&common::Op::new("file", Thing::File(contents.clone().into())));
    let made = Made::new(layer);
    let files = made.files(&lab, 4);
    daemon.add(&files);
    drop(daemon);
    let at = mount_tree(&lab, 4);
    let read = || {
        let path = at.join("file");
        std::thread::spawn(move || fs::read(path))
    };
    // Names and attributes are there without any daemon.
    assert_eq!(fs::metadata(at.join("file")).unwrap().len(), 9000);
    let reader = read();
    let daemon = lab.connect();
    assert_eq!(daemon.news(), News::Miss { n: 4, blocks: 2..5 });
    daemon.keeper.fail(4, 2..5, rustix::io::Errno::IO).unwrap();
    // What could not be read ahead is asked for once more by whoever wants it.
    let fails = daemon.fail_all();
    assert_eq!(reader.join().unwrap().unwrap_err().raw_os_error(), Some(libc::EIO));
    let daemon = fails.stop();
    let reader = read();
    while !matches!(daemon.news(), News::Miss { n: 4, .. }) {}
    daemon.have(4, 2..4);
    assert!(!reader.is_finished(), "a block is missing");
    daemon.have(4, 4..5);
    assert_eq!(reader.join().unwrap().unwrap(), contents);
    // The kernel has it, whoever else is there.
    daemon.keeper.drop_blocks(4, 0..5).unwrap();
    drop(daemon);
    assert_eq!(fs::read(at.join("file")).unwrap(), contents);
    unmount(&at).unwrap();
}

/// Each look is at another layer, or it would be at what the kernel has kept.
#[test]
fn keepers_are_killed_under_those_who_look_at_trees() {
    const KILLS: u64 = 30;
    let lab = Arc::new(Lab::new());
    let mut keeper = lab.start();
    let daemon = lab.connect();
    let (stop, looks) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    // What a thread looks at, it gets from a daemon that lives through all of it.
    let (layers, wanted) = std::sync::mpsc::channel::<TestLayer>();
    let lookers: Vec<_> = (0..2u32)
        .map(|looker| {
            let (lab, stop, looks, layers) =
                (lab.clone(), stop.clone(), looks.clone(), layers.clone());
            std::thread::spawn(move || {
                let made = Made::new(Layer::random(u64::from(looker) + 40, 250));
                for round in 0.. {
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                    let n = round * 2 + looker;
                    layers.send(made.files(&lab, n)).unwrap();
                    let tree = lab.path(&n.to_string());
                    // A layer that is not added yet is none.
                    while fs::symlink_metadata(&tree).is_err() {
                        std::thread::yield_now();
                    }
                    let at = mount_tree(&lab, n);
                    compare(&at, &made.layer.model);
                    unmount(&at).unwrap();
                    looks.fetch_add(1, Ordering::Relaxed);
                }
            })
        })
        .collect();
    drop(layers);
    let daemons = {
        let (lab, stop) = (lab.clone(), stop.clone());
        std::thread::spawn(move || {
            let (mut daemon, mut added): (Daemon, Vec<TestLayer>) = (daemon, Vec::new());
            while !stop.load(Ordering::Relaxed) || !wanted_is_over(&wanted, &mut added) {
                let before = added.len();
                wanted_is_over(&wanted, &mut added);
                let mut gone = added[before..].iter().any(|layer| !add(&daemon, layer));
                match daemon.news.recv_timeout(std::time::Duration::from_millis(5)) {
                    Ok(News::Miss { n, blocks }) => {
                        gone |= daemon.keeper.have(n, blocks) == Err(ClientError::Gone);
                    }
                    Ok(News::Gone) => gone = true,
                    Ok(News::Touched { .. }) | Err(_) => {}
                }
                while gone {
                    daemon = lab.connect();
                    gone = added.iter().any(|layer| !add(&daemon, layer));
                }
            }
        })
    };
    let mut dice = Dice(0xdead);
    for _ in 0..KILLS {
        let seen = looks.load(Ordering::Relaxed);
        while looks.load(Ordering::Relaxed) == seen {
            assert!(!lookers.iter().any(|l| l.is_finished()), "a look went wrong");
            std::thread::yield_now();
        }
        for _ in 0..dice.below(3_000_000) {
            std::hint::spin_loop();
        }
        keeper.kill();
        keeper = lab.start();
    }
    stop.store(true, Ordering::Relaxed);
    lookers.into_iter().for_each(|looker| looker.join().unwrap());
    daemons.join().unwrap();
    println!("{} looks over {KILLS} kills", looks.load(Ordering::Relaxed));
}

/// Takes what is to be added; whether nothing more will be.
fn wanted_is_over(
    wanted: &std::sync::mpsc::Receiver<TestLayer>,
    added: &mut Vec<TestLayer>,
) -> bool {
    loop {
        match wanted.try_recv() {
            Ok(layer) => added.push(layer),
            Err(std::sync::mpsc::TryRecvError::Empty) => return false,
            Err(std::sync::mpsc::TryRecvError::Disconnected) => return true,
        }
    }
}

/// Adds a layer, unless the keeper is gone.
fn add(daemon: &Daemon, layer: &TestLayer) -> bool {
    use std::os::fd::AsFd as _;
    let (data, map, meta) = (layer.data.as_fd(), layer.map.as_fd(), layer.meta.as_fd());
    match daemon.keeper.add(layer.n, shipway_keeper::client::Files { data, map, meta }) {
        Ok(()) => true,
        Err(ClientError::Gone) => false,
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn a_large_directory_is_listed_and_searched() {
    const COUNT: usize = 10_000;
    let lab = Lab::new();
    let _keeper = lab.start();
    let daemon = lab.connect();
    let mut layer = Layer::new(Options::default(), Attrs { mode: 0o755, ..Attrs::default() });
    let name = |n: usize| format!("large/{n:0>width$}", width = 6 + n % 240);
    // Without the model's bookkeeping, which is not made for this many.
    for n in 0..COUNT {
        let mut op = common::Op::new(&name(n), Thing::File(Default::default()));
        op.attrs.uid = n as u32;
        op.insert(&mut layer.builder).unwrap();
    }
    let made = Made::new(layer);
    daemon.add(&made.files(&lab, 1));
    let at = mount_tree(&lab, 1);
    for _ in 0..2 {
        let mut seen = vec![false; COUNT];
        for entry in fs::read_dir(at.join("large")).unwrap() {
            let entry = entry.unwrap();
            let found = entry.metadata().unwrap();
            let n = found.uid() as usize;
            assert_eq!(entry.file_name().to_str().unwrap(), &name(n)["large/".len()..]);
            assert!(!std::mem::replace(&mut seen[n], true), "{n} is listed twice");
        }
        assert!(seen.iter().all(|seen| *seen));
    }
    for n in (0..COUNT).step_by(7) {
        assert_eq!(fs::symlink_metadata(at.join(name(n))).unwrap().uid() as usize, n);
        let missing = at.join(format!("{}x", name(n)));
        // Asked again, it is known not to be there.
        assert!((0..2).all(|_| fs::symlink_metadata(&missing).is_err()));
    }
    unmount(&at).unwrap();
}

/// No two files of any layers have one number, and a file keeps its own when it is written.
#[test]
fn numbers_of_inodes_are_those_of_one_file_and_stay() {
    let lab = Lab::new();
    let _keeper = lab.start();
    let daemon = lab.connect();
    // The same layer twice, with the same inodes.
    let mut layer = Layer::new(Options::default(), Attrs { mode: 0o755, ..Attrs::default() });
    for n in 0..20 {
        layer.add(&common::Op::new(&format!("file{n}"), Thing::File(vec![n; 5000].into())));
    }
    layer.add(&common::Op::new("link", Thing::HardLink("file3".into())));
    let made = Made::new(layer);
    let files: Vec<TestLayer> = [4, 5].map(|n| made.files(&lab, n)).into();
    files.iter().for_each(|files| daemon.add(files));
    let server = serve(daemon);
    let mounts = [4, 5].map(|n| mount_tree(&lab, n));
    let mut numbers = HashMap::new();
    for at in &mounts {
        for entry in fs::read_dir(at).unwrap() {
            let entry = entry.unwrap();
            let found = entry.metadata().unwrap();
            use std::os::unix::fs::DirEntryExt as _;
            assert_eq!(entry.ino(), found.ino());
            let name = if entry.file_name() == "link" { "file3".into() } else { entry.file_name() };
            let at = at.join(name);
            assert_eq!(*numbers.entry((found.dev(), found.ino())).or_insert(at.clone()), at);
        }
    }
    assert_eq!(numbers.len(), 40);
    let [up, work, merged] = ["up", "work", "merged"].map(|name| at(&lab, name));
    let lower = mounts.each_ref().map(|m| m.to_str().unwrap()).join(":");
    let options =
        format!("lowerdir={lower},upperdir={},workdir={},xino=on", up.display(), work.display());
    let number = |name: &str| {
        let found = fs::symlink_metadata(merged.join(name)).unwrap();
        (found.dev(), found.ino())
    };
    overlay(&options, &merged);
    let before = [number("file1"), number("file2")];
    fs::write(merged.join("file1"), b"other").unwrap();
    assert_eq!(before[0], number("file1"), "copied");
    // Nothing is remembered of what the number was, but what overlayfs finds of the file below.
    rustix::mount::unmount(&merged, UnmountFlags::empty()).unwrap();
    overlay(&options, &merged);
    assert_eq!(before.map(|(_, n)| n), [number("file1").1, number("file2").1], "found again");
    rustix::mount::unmount(&merged, UnmountFlags::empty()).unwrap();
    for at in &mounts {
        unmount(at).unwrap();
    }
    drop(server);
}

#[test]
fn a_tree_has_other_owners_in_a_user_namespace() {
    let lab = Lab::new();
    let _keeper = lab.start();
    let daemon = lab.connect();
    let mut layer = Layer::new(Options::default(), Attrs { mode: 0o755, ..Attrs::default() });
    let mut op = common::Op::new("file", Thing::File(vec![7; 5000].into()));
    (op.attrs.uid, op.attrs.gid) = (3, 4);
    layer.add(&op);
    let made = Made::new(layer);
    daemon.add(&made.files(&lab, 4));
    let server = serve(daemon);
    let (tree, clone) = (mount_tree(&lab, 4), at(&lab, "clone"));
    let ids = MappedIds::parse("0:100000:65536", "0:200000:65536").unwrap();
    clone_mapped(&tree, &UserNamespace::new(&ids).unwrap(), &clone).unwrap();
    let found = fs::metadata(clone.join("file")).unwrap();
    assert_eq!((found.uid(), found.gid()), (100_003, 200_004));
    assert_eq!(fs::read(clone.join("file")).unwrap(), vec![7; 5000]);
    // And in an overlay that a container of such a namespace would get.
    let [up, work, merged] = ["up", "work", "merged"].map(|name| at(&lab, name));
    let (lower, up, work) = (clone.display(), up.display(), work.display());
    overlay(&format!("lowerdir={lower},upperdir={up},workdir={work},xino=on"), &merged);
    let found = fs::metadata(merged.join("file")).unwrap();
    assert_eq!((found.uid(), found.gid()), (100_003, 200_004));
    fs::set_permissions(merged.join("file"), std::os::unix::fs::PermissionsExt::from_mode(0o600))
        .unwrap();
    assert_eq!(fs::metadata(merged.join("file")).unwrap().uid(), 100_003, "copied");
    rustix::mount::unmount(&merged, UnmountFlags::empty()).unwrap();
    for at in [&clone, &tree] {
        unmount(at).unwrap();
    }
    drop(server);
}

/// Where root is nobody, no images can be mounted, but FUSE can: with marks that overlayfs finds
/// there, too.
#[test]
fn a_keeper_without_privileges_serves_trees() {
    const LAB: &str = "KEEPER_TEST_LAB";
    let mut layer = Layer::new(
        Options { opaque: OpaqueMark::User, ..Options::default() },
        Attrs { mode: 0o755, ..Attrs::default() },
    );
    let text = |text: &str| Thing::File(text.as_bytes().into());
    for (path, thing) in [
        ("file", text("from the tree")),
        ("link", Thing::Symlink("file".into())),
        ("hard", Thing::HardLink("file".into())),
        ("both/upper", text("upper")),
        ("both/.wh.hidden", text("")),
        ("opaque/upper", text("upper")),
        ("opaque/.wh..wh..opq", text("")),
    ] {
        let mut op = common::Op::new(path, thing);
        if path == "file" {
            op.attrs.xattrs.insert(b"user.note".to_vec(), b"a note".to_vec());
        }
        assert!(layer.add(&op));
    }
    if let Some(lab) = std::env::var_os(LAB) {
        return in_user_namespace(Path::new(&lab), &layer);
    }
    let lab = Lab::new();
    let keeper = lab.start_rootless();
    let daemon = lab.connect();
    let made = Made::new(layer);
    daemon.add(&made.files(&lab, 1));
    let server = serve(daemon);
    for entry in ["both/hidden", "both/lower", "opaque/lower"] {
        let path = at(&lab, "lower").join(entry);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, b"lower").unwrap();
    }
    for name in ["tree", "up", "work", "merged"] {
        at(&lab, name);
    }
    let output = std::process::Command::new("nsenter")
        .args(["--user", "--mount", "--target", &keeper.0.id().to_string()])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "--nocapture", "a_keeper_without_privileges_serves_trees"])
        .env(LAB, lab.path("").parent().unwrap())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.contains("1 passed"), "{said}{errors}");
    drop(server);
}

/// What is looked at by a process in the keeper's namespaces.
#[track_caller]
fn in_user_namespace(lab: &Path, layer: &Layer) {
    let [tree, lower, up, work, merged] =
        ["tree", "lower", "up", "work", "merged"].map(|name| lab.join(name));
    // The kernel mounts no images here, which is what the tree is for.
    let image = Source::Files { meta: lab.join("1-meta"), data: lab.join("1-data") };
    let refused = mount(&image, &tree).unwrap_err();
    println!("images: {refused}");
    mount(&Source::Tree(lab.join("k/1")), &tree).unwrap();
    compare(&tree, &layer.model);
    let [tree, lower, up, work] = [&tree, &lower, &up, &work].map(|path| path.display());
    let dirs = format!("lowerdir={tree}:{lower},upperdir={up},workdir={work}");
    overlay(&format!("{dirs},userxattr,xino=on"), &merged);
    let names = |name| mounted::names_in(&merged.join(name));
    assert_eq!(names("both"), [&b"lower"[..], b"upper"]);
    assert_eq!(names("opaque"), [b"upper"]);
    assert_eq!(fs::read(merged.join("link")).unwrap(), b"from the tree");
    let number = fs::metadata(merged.join("file")).unwrap().ino();
    fs::write(merged.join("hard"), b"written").unwrap();
    assert_eq!(fs::read(merged.join("file")).unwrap(), b"from the tree", "copied, as ever");
    assert_eq!(fs::metadata(merged.join("file")).unwrap().ino(), number);
}
