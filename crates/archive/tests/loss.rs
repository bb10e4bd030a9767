//! What a tar cannot say is found, and nothing else; what it can say is in it. As root, for the
//! kernel lets nobody else make such trees.

#![allow(clippy::unwrap_used)]

use rustix::fs::{
    AtFlags, CWD, FileType, Mode, Timespec, Timestamps, XattrFlags, makedev, mknodat,
};
use shipway_archive::{
    Compression, CompressionKind, EntryKind, LayerEntry, LayerTree, LossKind, Marks, pack, tar_of,
};
use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink},
    path::{Path, PathBuf},
    process::Command,
};

/// An access control list of user 1 and the mask, with the tags in the order in which the kernel
/// wants them.
fn acl() -> Vec<u8> {
    let mut value = 2u32.to_le_bytes().to_vec();
    for (tag, perm, id) in
        [(1u16, 6u16, u32::MAX), (2, 7, 1), (4, 4, u32::MAX), (16, 7, u32::MAX), (32, 4, u32::MAX)]
    {
        value.extend(tag.to_le_bytes());
        value.extend(perm.to_le_bytes());
        value.extend(id.to_le_bytes());
    }
    value
}

/// A tree before and after, and the same as an overlay's directories.
struct Lab(tempfile::TempDir);

impl Lab {
    #[track_caller]
    fn new() -> Self {
        assert!(rustix::process::geteuid().is_root(), "these tests need root");
        // Not in memory: such file systems may not have all kinds of attributes.
        let lab = Self(tempfile::tempdir_in("/var/tmp").unwrap());
        for dir in ["lower/d", "upper"] {
            fs::create_dir_all(lab.path(dir)).unwrap();
        }
        for dir in ["lower", "upper"] {
            fs::set_permissions(lab.path(dir), fs::Permissions::from_mode(0o755)).unwrap();
        }
        for file in ["lower/f", "lower/d/g"] {
            write(&lab.path(file), "old");
        }
        lab
    }

    fn path(&self, path: &str) -> PathBuf {
        self.0.path().join(path)
    }

    fn overlay(&self) -> LayerTree {
        LayerTree::overlay(self.path("upper"), vec![self.path("lower")], Marks::Trusted)
    }

    /// A copy of the lower directory, as snapshotters without an overlay make it.
    #[track_caller]
    fn copied(&self) -> LayerTree {
        assert!(
            Command::new("cp")
                .arg("-a")
                .args([self.path("lower"), self.path("after")])
                .status()
                .unwrap()
                .success()
        );
        LayerTree::compared(self.path("lower"), self.path("after"))
    }
}

/// A file of a time that a tar can say.
fn write(path: &Path, text: &str) {
    fs::write(path, text).unwrap();
    touch(path, (1_000_000_000, 0));
}

fn touch(path: &Path, (tv_sec, tv_nsec): (i64, i64)) {
    let time = Timespec { tv_sec, tv_nsec };
    let times = Timestamps { last_access: time, last_modification: time };
    rustix::fs::utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
}

fn time(path: &Path) -> (i64, i64) {
    let meta = fs::symlink_metadata(path).unwrap();
    (meta.mtime(), meta.mtime_nsec())
}

fn set(path: &Path, name: &str, value: &[u8]) {
    rustix::fs::lsetxattr(path, name, value, XattrFlags::empty()).unwrap();
}

fn device(path: &Path) {
    mknodat(CWD, path, FileType::CharacterDevice, Mode::empty(), makedev(0, 0)).unwrap();
}

fn entries(tree: &LayerTree) -> Vec<LayerEntry> {
    let mut entries = Vec::new();
    tree.walk(|e| {
        entries.push(e);
        Ok(())
    })
    .unwrap();
    entries
}

fn names(tree: &LayerTree) -> Vec<String> {
    entries(tree).into_iter().map(|e| String::from_utf8(e.path).unwrap()).collect()
}

#[track_caller]
fn loses(tree: &LayerTree, want: Option<(&str, LossKind)>) {
    let loss = tar_of(tree).unwrap().loss;
    assert_eq!(
        loss.as_ref().map(|l| (std::str::from_utf8(&l.path).unwrap(), l.kind.clone())),
        want
    );
    let plain = Compression { kind: CompressionKind::Uncompressed, ..Default::default() };
    assert_eq!(pack(tree, plain, None, None, &mut |_| Ok(())).unwrap().loss, loss);
}

fn attribute(name: &str) -> LossKind {
    LossKind::Attribute(name.as_bytes().to_vec())
}

#[test]
fn an_ordinary_layer_loses_nothing_and_has_no_entry_of_the_root() {
    let lab = Lab::new();
    write(&lab.path("upper/new"), "new");
    symlink("new", lab.path("upper/link")).unwrap();
    fs::hard_link(lab.path("upper/new"), lab.path("upper/again")).unwrap();
    mknodat(CWD, lab.path("upper/pipe"), FileType::Fifo, Mode::RUSR, 0).unwrap();
    device(&lab.path("upper/f"));
    for mark in ["trusted.overlay.origin", "trusted.overlay.impure"] {
        set(&lab.path("upper"), mark, b"y");
    }
    loses(&lab.overlay(), None);
    assert_eq!(names(&lab.overlay()), ["again", "f", "link", "new", "pipe"]);
    loses(&LayerTree::lowest(lab.path("lower")), None);
    loses(&lab.copied(), None);
}

#[test]
fn changes_of_the_root_are_an_entry_that_unpacking_passes_over() {
    for change in [
        (|root: &Path| chown(root, Some(1000), None).unwrap()) as fn(&Path),
        |root| fs::set_permissions(root, fs::Permissions::from_mode(0o1777)).unwrap(),
        |root| set(root, "user.a", b"b"),
        |root| set(root, "system.posix_acl_default", &acl()),
    ] {
        let lab = Lab::new();
        let copied = lab.copied();
        for root in ["upper", "after"] {
            change(&lab.path(root));
        }
        for tree in [lab.overlay(), copied, LayerTree::lowest(lab.path("after"))] {
            loses(&tree, Some(("", LossKind::Root)));
            let root = entries(&tree).swap_remove(0);
            let is = fs::metadata(tree.root()).unwrap();
            assert_eq!(
                (root.path.len(), root.kind, root.mode, root.uid),
                (0, EntryKind::Directory, is.mode() & 0o7777, is.uid())
            );
        }
        assert_eq!(
            names(&LayerTree::whole(lab.path("after"))),
            ["d", "d/g", "f"],
            "what is no layer has no root"
        );
        // The next layer finds it below: an overlay snapshotter hands on the owner, one that copies
        // all.
        fs::create_dir(lab.path("next")).unwrap();
        let owner = fs::metadata(lab.path("upper")).unwrap().uid();
        chown(lab.path("next"), Some(owner), None).unwrap();
        let next = LayerTree::overlay(
            lab.path("next"),
            vec![lab.path("upper"), lab.path("lower")],
            Marks::Trusted,
        );
        loses(&next, None);
        assert_eq!(
            names(&next).len(),
            usize::from(owner == 0),
            "permissions and attributes of the root are not what they were"
        );
    }
}

#[test]
fn the_root_is_written_as_tools_write_it() {
    let lab = Lab::new();
    fs::set_permissions(lab.path("upper"), fs::Permissions::from_mode(0o700)).unwrap();
    set(&lab.path("upper"), "user.a", b"b");
    let mut tar = Vec::new();
    let plain = Compression { kind: CompressionKind::Uncompressed, ..Default::default() };
    pack(&lab.overlay(), plain, None, None, &mut |b| {
        tar.extend_from_slice(&b);
        Ok(())
    })
    .unwrap();
    let mut archive = tar::Archive::new(&tar[..]);
    let mut all = archive.entries().unwrap();
    let mut only = all.next().unwrap().unwrap();
    assert_eq!((&only.path_bytes()[..], only.header().mode().unwrap()), (&b"./"[..], 0o700));
    let records: Vec<_> = only
        .pax_extensions()
        .unwrap()
        .unwrap()
        .map(|r| r.unwrap().key().unwrap().to_owned())
        .collect();
    assert_eq!(records, ["SCHILY.xattr.user.a"]);
    assert!(all.next().is_none());
}

#[test]
fn what_a_tar_has_no_word_for_is_found() {
    type Case = (fn(&Path), &'static str, LossKind);
    let cases: [Case; 8] = [
        (
            |at| drop(std::os::unix::net::UnixListener::bind(at.join("s")).unwrap()),
            "s",
            LossKind::Socket,
        ),
        (|at| write(&at.join(".wh.x"), ""), ".wh.x", LossKind::WhiteoutName),
        (|at| fs::create_dir(at.join(".wh.x")).unwrap(), ".wh.x", LossKind::WhiteoutName),
        (
            |at| {
                write(&at.join("x"), "");
                set(&at.join("x"), "trusted.mine", b"1");
            },
            "x",
            LossKind::Attribute(b"trusted.mine".to_vec()),
        ),
        (
            |at| {
                symlink("f", at.join("x")).unwrap();
                set(&at.join("x"), "trusted.mine", b"1");
            },
            "x",
            LossKind::Attribute(b"trusted.mine".to_vec()),
        ),
        (
            |at| {
                fs::create_dir(at.join("x")).unwrap();
                set(&at.join("x"), "user.overlay.opaque", b"y");
            },
            "x",
            LossKind::Attribute(b"user.overlay.opaque".to_vec()),
        ),
        (
            |at| {
                write(&at.join("x"), "");
                set(&at.join("x"), "user.a=b", b"y");
            },
            "x",
            LossKind::Attribute(b"user.a=b".to_vec()),
        ),
        (
            |at| {
                fs::create_dir(at.join("x")).unwrap();
                write(&at.join("x/plain"), "");
                set(&at.join("x"), "system.posix_acl_default", &acl());
            },
            "x/plain",
            LossKind::Inherited,
        ),
    ];
    for (make, path, kind) in cases {
        let lab = Lab::new();
        let copied = lab.copied();
        for root in ["upper", "after"] {
            make(&lab.path(root));
        }
        for tree in [lab.overlay(), copied, LayerTree::lowest(lab.path("after"))] {
            loses(&tree, Some((path, kind.clone())));
        }
    }
}

#[test]
fn devices_like_whiteouts_hide_nothing_where_there_is_no_overlay() {
    let lab = Lab::new();
    let copied = lab.copied();
    fs::remove_file(lab.path("after/f")).unwrap();
    device(&lab.path("after/f"));
    loses(&copied, Some(("f", LossKind::WhiteoutDevice)));
    loses(&LayerTree::lowest(lab.path("after")), Some(("f", LossKind::WhiteoutDevice)));
}

#[test]
fn marks_of_another_namespace_are_no_marks() {
    let lab = Lab::new();
    fs::create_dir(lab.path("upper/d")).unwrap();
    set(&lab.path("upper/d"), "user.overlay.opaque", b"y");
    assert!(!names(&lab.overlay()).contains(&"d/g".to_owned()), "nothing is hidden");
    let user = LayerTree::overlay(lab.path("upper"), vec![lab.path("lower")], Marks::User);
    assert_eq!(names(&user), ["d", "d/g"]);
    loses(&user, None);
}

#[test]
fn attributes_of_images_are_told_and_compared() {
    let lab = Lab::new();
    let copied = lab.copied();
    let capability = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    for root in ["upper", "after"] {
        let (f, d) = (lab.path(root).join("f"), lab.path(root).join("d"));
        let _ = fs::create_dir(&d);
        write(&f, "old");
        set(&d, "system.posix_acl_default", &acl());
        set(&f, "system.posix_acl_access", &acl());
        set(&f, "security.capability", &capability);
        fs::hard_link(&f, lab.path(root).join("g")).unwrap();
    }
    for tree in [lab.overlay(), copied] {
        loses(&tree, None);
        let all: Vec<_> = entries(&tree)
            .into_iter()
            .map(|e| {
                (
                    String::from_utf8(e.path).unwrap(),
                    e.xattrs
                        .into_iter()
                        .map(|(n, _)| String::from_utf8(n).unwrap())
                        .collect::<Vec<_>>(),
                )
            })
            .collect();
        let want = [
            ("d", vec!["system.posix_acl_default"]),
            ("f", vec!["security.capability", "system.posix_acl_access"]),
            // The owner that is given to the second name takes the capability away.
            ("g", vec!["security.capability"]),
        ];
        assert_eq!(
            all,
            want.map(|(p, n)| (p.to_owned(), n.into_iter().map(String::from).collect()))
        );
    }
}

#[test]
fn attributes_that_went_from_a_directory_stay_where_it_is_not_made_anew() {
    let lab = Lab::new();
    set(&lab.path("lower/d"), "user.a", b"b");
    let copied = lab.copied();
    rustix::fs::removexattr(lab.path("after/d"), "user.a").unwrap();
    loses(&copied, Some(("d", attribute("user.a"))));
    fs::create_dir(lab.path("upper/d")).unwrap();
    loses(&lab.overlay(), None);
}

#[test]
fn contents_count_where_nothing_else_differs() {
    let lab = Lab::new();
    let copied = lab.copied();
    write(&lab.path("after/f"), "new");
    assert_eq!(names(&copied), ["f"]);
}

#[test]
fn links_that_the_tar_does_not_tell_of_are_found() {
    // A second name of a file that is not told itself.
    let lab = Lab::new();
    let copied = lab.copied();
    assert!(
        Command::new("cp")
            .arg("-a")
            .args([lab.path("lower/f"), lab.path("upper/f")])
            .status()
            .unwrap()
            .success()
    );
    for root in ["upper", "after"] {
        fs::hard_link(lab.path(root).join("f"), lab.path(root).join("z")).unwrap();
    }
    loses(&lab.overlay(), Some(("f", LossKind::Links)));
    loses(&copied, Some(("f", LossKind::Links)));

    // A name outside.
    let lab = Lab::new();
    write(&lab.path("upper/new"), "new");
    fs::hard_link(lab.path("upper/new"), lab.path("outside")).unwrap();
    loses(&lab.overlay(), Some(("new", LossKind::Links)));

    // Two names that became two files, without any other difference.
    let lab = Lab::new();
    fs::hard_link(lab.path("lower/f"), lab.path("lower/h")).unwrap();
    let copied = lab.copied();
    loses(&copied, None);
    fs::remove_file(lab.path("after/h")).unwrap();
    for root in ["after", "upper"] {
        assert!(
            Command::new("cp")
                .arg("-a")
                .args([lab.path("lower/f"), lab.path(root).join("h")])
                .status()
                .unwrap()
                .success()
        );
    }
    loses(&copied, Some(("h", LossKind::Links)));
    loses(&lab.overlay(), Some(("h", LossKind::Links)));
    // One of them goes: that is told.
    fs::remove_file(lab.path("after/h")).unwrap();
    loses(&copied, None);
}

#[test]
fn what_is_settled_has_the_times_of_its_tar() {
    let lab = Lab::new();
    for dir in ["lower/set", "lower/kept"] {
        fs::create_dir(lab.path(dir)).unwrap();
    }
    write(&lab.path("lower/d/h"), "");
    touch(&lab.path("lower/d"), (500, 7));
    touch(&lab.path("lower/set"), (500, 7));
    touch(&lab.path("lower/kept"), (500, 7));
    let copied = lab.copied();
    for root in ["upper", "after"] {
        let at = |path: &str| lab.path(root).join(path);
        for dir in ["d", "set", "kept", "new", "new/deep"] {
            let _ = fs::create_dir(at(dir));
        }
        for file in ["new/file", "new/deep/file", "before", "after"] {
            write(&at(file), "");
        }
        symlink("x", at("new/link")).unwrap();
        mknodat(CWD, at("new/pipe"), FileType::Fifo, Mode::RUSR, 0).unwrap();
        for path in ["new/file", "new/link", "new/pipe", "new/deep", "new"] {
            touch(&at(path), (600, 9));
        }
        touch(&at("before"), (-5, 3));
        touch(&at("after"), (i64::MAX / 1_000_000_000 + 1, 3));
        // Written again within a second.
        write(&at("f"), "old");
        touch(&at("f"), (1_000_000_000, 9));
        // Nothing in it changed, but its time was set.
        touch(&at("set"), (600, 9));
        // A name came and went, and the time of when it came was kept, as for mount points.
        write(&at("kept/stub"), "");
        let then = time(&at("kept"));
        fs::remove_file(at("kept/stub")).unwrap();
        touch(&at("kept"), then);
        // Only something in it was touched, and is what it was.
        let _ = fs::remove_file(at("d/g"));
        assert!(
            Command::new("cp")
                .arg("-a")
                .args([lab.path("lower/d/g"), at("d/g")])
                .status()
                .unwrap()
                .success()
        );
    }
    for (tree, root) in [(lab.overlay(), "upper"), (copied, "after")] {
        let before = tar_of(&tree).unwrap();
        assert_ne!(time(&lab.path(root).join("new")).1, 0, "looking changes nothing");
        assert_eq!(names(&tree).contains(&"set".to_owned()), root == "upper", "{:?}", names(&tree));
        assert!(!names(&tree).contains(&"kept".to_owned()), "{:?}", names(&tree));
        let settled = tar_of(&tree.clone().settled()).unwrap();
        assert_eq!(settled, before);
        assert_eq!(tar_of(&tree).unwrap(), settled);
        for (path, want) in [
            ("new/file", (600, 0)),
            ("new/link", (600, 0)),
            ("new/pipe", (600, 0)),
            ("new/deep", (600, 0)),
            ("new", (600, 0)),
            // containerd sets what it cannot set to the epoch.
            ("before", (0, 0)),
            ("after", (0, 0)),
            ("d", (500, 7)),
            ("kept", (500, 7)),
            // Whole trees are full of times that were set: by what copied them.
            ("set", if root == "upper" { (600, 0) } else { (500, 7) }),
            ("f", (1_000_000_000, 0)),
        ] {
            assert_eq!(time(&lab.path(root).join(path)), want, "{root}/{path}");
        }
    }
}
