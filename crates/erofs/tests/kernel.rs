//! Images as the kernel sees them, and `fsck.erofs`: both are asked what is in them. As root, for
//! only root mounts EROFS.
//!
//! Nothing is mounted anywhere: a mount is a file descriptor (`fsmount`) that goes with the test,
//! however it ends.

#![allow(clippy::unwrap_used)]

mod common;
#[path = "common/mounted.rs"]
mod mounted;

use common::*;
use mounted::{compare, names_in};
use rustix::{
    fd::{AsFd, AsRawFd, OwnedFd},
    mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_flag,
        fsconfig_set_string, fsmount, fsopen,
    },
};
use shipway_erofs::*;
use std::{
    fs::{self, File},
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
    process::Command,
};

/// A mounted file system that is nowhere in the tree.
struct Mounted(OwnedFd);

impl Mounted {
    #[track_caller]
    fn new(kind: &str, options: &[(&str, Option<&Path>)]) -> Result<Self, String> {
        assert!(
            rustix::process::geteuid().is_root(),
            "mounts need root: run as root, as `cargo xtask test` does"
        );
        let context = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)
            .map_err(|e| format!("the kernel has no {kind}: {e}"))?;
        let told = |what: &str, error: rustix::io::Errno| {
            let mut log = [0; 512];
            let read = rustix::io::read(context.as_fd(), &mut log).unwrap_or(0);
            format!("{what}: {error} {}", String::from_utf8_lossy(&log[..read]))
        };
        for (key, value) in options {
            match value {
                Some(value) => fsconfig_set_string(context.as_fd(), *key, *value),
                None => fsconfig_set_flag(context.as_fd(), *key),
            }
            .map_err(|e| told(key, e))?;
        }
        fsconfig_create(context.as_fd()).map_err(|e| told("create", e))?;
        let fd = fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty());
        Ok(Self(fd.map_err(|e| told("fsmount", e))?))
    }

    fn root(&self) -> PathBuf {
        format!("/proc/self/fd/{}/.", self.0.as_raw_fd()).into()
    }
}

/// An image and its data in files of a directory that goes with it.
struct Lab {
    dir: tempfile::TempDir,
}

impl Lab {
    fn new(image: &Image, data: &[u8]) -> Self {
        // Not in /tmp, which may be a tmpfs: the kernel cannot read an image from there.
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let lab = Self { dir };
        let mut meta = File::create(lab.path("meta")).unwrap();
        image.write(Form::WithDevice, &mut meta).unwrap();
        fs::write(lab.path("data"), data).unwrap();
        let mut flat = File::create(lab.path("flat")).unwrap();
        image.write(Form::Flat, &mut flat).unwrap();
        flat.write_all_at(data, image.bytes()).unwrap();
        lab
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn with_device(&self) -> Mounted {
        let options = [
            ("source", Some(self.path("meta"))),
            ("device", Some(self.path("data"))),
            ("ro", None),
        ];
        Mounted::new("erofs", &options.each_ref().map(|(k, v)| (*k, v.as_deref()))).unwrap()
    }

    fn flat(&self) -> Mounted {
        Mounted::new("erofs", &[("source", Some(&self.path("flat"))), ("ro", None)]).unwrap()
    }

    /// The flat image as a block device, which is what kernels before 6.12 need. The kernel takes
    /// the device away with the mount.
    fn looped(&self) -> Mounted {
        let run = |command: &mut Command| {
            let output = command.output().expect("losetup, of the package mount");
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            String::from_utf8(output.stdout).unwrap().trim().to_owned()
        };
        let device = run(Command::new("losetup")
            .args(["--read-only", "--find", "--show"])
            .arg(self.path("flat")));
        let mounted = Mounted::new("erofs", &[("source", Some(Path::new(&device))), ("ro", None)]);
        run(Command::new("losetup").arg("--detach").arg(&device));
        mounted.unwrap()
    }

    fn fsck(&self) {
        // Contents only in the flat image: versions up to 1.5 look for those at unified addresses
        // in the first device.
        let device = format!("--device={}", self.path("data").display());
        for (image, option) in [("meta", &*device), ("flat", "--extract")] {
            let output = Command::new("fsck.erofs").arg(option).arg(self.path(image)).output();
            let output = output
                .expect("fsck.erofs: install the package erofs-utils, as `cargo xtask test` does");
            let text = format!(
                "{}{}",
                String::from_utf8_lossy(&output.stdout),
                String::from_utf8_lossy(&output.stderr)
            );
            assert!(
                output.status.success() && !text.contains("<E>"),
                "{image}: {}, {text}",
                output.status
            );
        }
    }
}

#[test]
fn the_kernel_sees_what_was_inserted() {
    for seed in 1..=24 {
        let mut layer = Layer::random(seed, 25 * seed as usize);
        let image = layer.image();
        let lab = Lab::new(&image, &layer.data);
        println!("seed {seed}: {} inodes, {} bytes", image.inodes(), image.bytes());
        compare(&lab.with_device().root(), &layer.model);
        compare(&lab.flat().root(), &layer.model);
        if seed % 8 == 0 {
            compare(&lab.looped().root(), &layer.model);
        }
        lab.fsck();
    }
}

/// Whole blocks, part of one, and every length of name; each name is looked up.
#[test]
fn a_directory_of_many_entries_is_searched_and_listed() {
    const COUNT: usize = 100_000;
    let mut layer = Layer::new(Options::default(), Attrs { mode: 0o755, ..Attrs::default() });
    let name = |n: usize| format!("{n:0>width$}", width = 6 + n % 250);
    for n in 0..COUNT {
        let attributes = Attributes { mode: 0o600, uid: n as u32, ..Attributes::default() };
        layer
            .builder
            .insert(format!("many/{}", name(n)).as_bytes(), &attributes, Node::File { size: 0 })
            .unwrap();
    }
    let image = layer.image();
    let lab = Lab::new(&image, &[]);
    let mounted = lab.with_device();
    let many = mounted.root().join("many");
    assert_eq!(fs::read_dir(&many).unwrap().count(), COUNT);
    for n in 0..COUNT {
        assert_eq!(fs::symlink_metadata(many.join(name(n))).unwrap().uid(), n as u32);
    }
    assert!(!many.join(format!("{}x", name(7))).exists() && !many.join("").join("zzz").exists());
    lab.fsck();
}

/// The contents of a file are found to its end however large it is, and holes of the data file are
/// zeros.
#[test]
fn files_reach_to_the_end_of_the_address_space() {
    const TIB: u64 = 1 << 40;
    let mut layer = Layer::new(Options::default(), Attrs { mode: 0o755, ..Attrs::default() });
    let mut insert = |name: &str, size| {
        layer.builder.insert(name.as_bytes(), &Attributes::default(), Node::File { size })
    };
    let Inserted::File(small) = insert("small", 10).unwrap() else { panic!("a file") };
    let Inserted::File(large) = insert("large", 15 * TIB + 5).unwrap() else { panic!("a file") };
    assert_eq!(insert("more", TIB), Err(BuildError::TooMuchData));
    assert_eq!((small.block, small.blocks, large.block), (0, 1, 1));
    let image = layer.image();
    let lab = Lab::new(&image, b"0123456789");
    let file = File::options().write(true).open(lab.path("data")).unwrap();
    file.set_len(u64::from(image.data_blocks()) * BLOCK).unwrap();
    file.write_all_at(b"almost", u64::from(large.block) * BLOCK + 15 * TIB - 1).unwrap();
    let mounted = lab.with_device();
    assert_eq!(fs::read(mounted.root().join("small")).unwrap(), b"0123456789");
    let found = File::open(mounted.root().join("large")).unwrap();
    assert_eq!(found.metadata().unwrap().len(), 15 * TIB + 5);
    let mut end = [0; 16];
    assert_eq!(found.read_at(&mut end, 15 * TIB - 3).unwrap(), 8);
    assert_eq!(end[..8], *b"\0\0almost");
    assert_eq!(found.read_at(&mut end, 7 * TIB).unwrap(), 16);
    assert_eq!(end, [0; 16]);
}

/// Whiteouts and opaque directories of such a layer hide what is below it, and the number of a file
/// stays when it is copied up.
#[test]
fn overlayfs_takes_the_layer() {
    let root = Attrs { mode: 0o755, ..Attrs::default() };
    let file = |text: &str| Thing::File(text.as_bytes().into());
    for opaque in [OpaqueMark::Trusted, OpaqueMark::User] {
        let layer = |uuid: u8, ops: &[Op]| {
            let mut layer = Layer::new(Options { uuid: [uuid; 16], opaque }, root.clone());
            ops.iter().for_each(|op| assert!(layer.add(op)));
            let image = layer.image();
            Lab::new(&image, &layer.data)
        };
        let below = layer(
            1,
            &[
                Op::new("gone", file("gone")),
                Op::new("kept", file("kept")),
                Op::new("dir/gone", file("gone")),
                Op::new("dir/kept", file("kept")),
                Op::new("opaque/gone", file("gone")),
                Op::new("opaque/deep/gone", file("gone")),
            ],
        );
        let above = layer(
            2,
            &[
                Op::new(".wh.gone", file("")),
                Op::new("dir/.wh.gone", file("")),
                Op::new("opaque/.wh..wh..opq", file("")),
                Op::new("opaque/new", file("new")),
            ],
        );
        let writable = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let at = |name: &str| writable.path().join(name);
        ["upper", "work", "above", "below"].iter().for_each(|dir| fs::create_dir(at(dir)).unwrap());
        // Overlayfs takes layers by their paths, so these are mounted, where nobody but this thread
        // sees it.
        let (above, below) = (above.with_device(), below.flat());
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                private_mounts();
                for (mounted, name) in [(&above, "above"), (&below, "below")] {
                    let flags = rustix::mount::MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
                    rustix::mount::move_mount(
                        mounted.0.as_fd(),
                        "",
                        rustix::fs::CWD,
                        at(name),
                        flags,
                    )
                    .unwrap();
                }
                let lower =
                    PathBuf::from(format!("{}:{}", at("above").display(), at("below").display()));
                let (upper, work) = (at("upper"), at("work"));
                let on = Path::new("on");
                let mut options = vec![
                    ("lowerdir", Some(&lower)),
                    ("upperdir", Some(&upper)),
                    ("workdir", Some(&work)),
                ];
                let on = on.to_owned();
                options.push(if opaque == OpaqueMark::User {
                    ("userxattr", None)
                } else {
                    ("xino", Some(&on))
                });
                let options: Vec<(&str, Option<&Path>)> =
                    options.iter().map(|(k, v)| (*k, v.map(PathBuf::as_path))).collect();
                let overlay = Mounted::new("overlay", &options).unwrap();
                let root = overlay.root();
                let text = |names: &[&str]| {
                    names.iter().map(|n| n.as_bytes().to_vec()).collect::<Vec<_>>()
                };
                assert_eq!(names_in(&root), text(&["dir", "kept", "opaque"]));
                assert_eq!(names_in(&root.join("dir")), text(&["kept"]));
                assert_eq!(names_in(&root.join("opaque")), text(&["new"]));
                assert!(
                    !root.join("gone").exists()
                        && !root.join("dir/gone").exists()
                        && !root.join("opaque/deep").exists()
                );
                assert_eq!(fs::read(root.join("dir/kept")).unwrap(), b"kept");
                let number = || fs::metadata(root.join("kept")).unwrap().ino();
                let before = number();
                fs::write(root.join("kept"), "changed").unwrap();
                if opaque == OpaqueMark::Trusted {
                    assert_eq!(number(), before);
                }
            });
            thread.join().unwrap();
        });
    }
}

/// Gives this thread mounts of its own, which end with it.
#[allow(unsafe_code)]
fn private_mounts() {
    use rustix::{
        mount::{MountPropagationFlags, mount_change},
        thread::{UnshareFlags, unshare_unsafe},
    };
    // SAFETY: the file descriptor table stays shared; only this thread's view of mounts and its
    // working directory part from the others'.
    unsafe { unshare_unsafe(UnshareFlags::FS | UnshareFlags::NEWNS) }
        .expect("mounts need root: run as root, as `cargo xtask test` does");
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).unwrap();
}
