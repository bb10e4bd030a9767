//! Layers as other programs read them: GNU tar, gzip; and the same bytes for any number of threads.

#![allow(clippy::unwrap_used)]

use shipway_archive::{Compression, CompressionKind, LayerTree, Marks, pack, recompress, tar_of};
use std::{
    fs,
    num::NonZero,
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

fn pseudo_random(len: usize) -> Vec<u8> {
    let mut x = 0x9e3779b97f4a7c15u64;
    let mut out = Vec::with_capacity(len + 8);
    while out.len() < len {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        out.extend_from_slice(&x.to_le_bytes());
    }
    out.truncate(len);
    out
}

fn sample(root: &Path) {
    fs::create_dir_all(root.join("dir/sub")).unwrap();
    fs::write(root.join("dir/hello"), "hello\n").unwrap();
    fs::write(root.join("dir.txt"), "sorted after dir's children\n").unwrap();
    fs::hard_link(root.join("dir/hello"), root.join("dir/sub/again")).unwrap();
    symlink("../x", root.join("link")).unwrap();
    fs::write(root.join("a".repeat(150)), "long").unwrap();
    fs::write(root.join("ünïcode"), "u").unwrap();
    fs::set_permissions(root.join("dir.txt"), fs::Permissions::from_mode(0o4755)).unwrap();
    let mut big = pseudo_random(1_500_000);
    big.extend(vec![0; 1_600_000]);
    fs::write(root.join("big"), &big).unwrap();
    let times = rustix::fs::Timestamps {
        last_access: rustix::fs::Timespec { tv_sec: 1, tv_nsec: 0 },
        last_modification: rustix::fs::Timespec { tv_sec: 1_700_000_000, tv_nsec: 5 },
    };
    for entry in
        ["dir/sub", "dir/hello", "dir", "dir.txt", "link", &"a".repeat(150), "ünïcode", "big"]
    {
        rustix::fs::utimensat(
            rustix::fs::CWD,
            root.join(entry),
            &times,
            rustix::fs::AtFlags::SYMLINK_NOFOLLOW,
        )
        .unwrap();
    }
}

fn packed(
    tree: &LayerTree,
    compression: Compression,
    threads: usize,
) -> (Vec<u8>, shipway_archive::Packed) {
    let mut bytes = Vec::new();
    let packed = pack(tree, compression, None, NonZero::new(threads), &mut |b| {
        bytes.extend_from_slice(&b);
        Ok(())
    })
    .unwrap();
    (bytes, packed)
}

#[track_caller]
fn pipe(program: &str, args: &[&str], input: &[u8]) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("in"), input).unwrap();
    let input = fs::File::open(dir.path().join("in")).unwrap();
    let out =
        Command::new(program).args(args).stdin(input).stderr(Stdio::inherit()).output().unwrap();
    assert!(out.status.success(), "{program} {args:?}");
    out.stdout
}

#[test]
fn tar_reads_a_layer_in_path_order() {
    let dir = tempfile::tempdir().unwrap();
    sample(dir.path());
    let tree = LayerTree::whole(dir.path());
    let (bytes, packed) =
        packed(&tree, Compression { kind: CompressionKind::Uncompressed, ..Default::default() }, 1);
    assert_eq!(packed.tar.diff_id.0, packed.digest);
    assert_eq!(tar_of(&tree).unwrap().tar, packed.tar);
    assert_eq!((packed.tar.size, packed.tar.crc), (bytes.len() as u64, libdeflater::crc32(&bytes)));
    let list = String::from_utf8(pipe("tar", &["-t", "--quoting-style=literal"], &bytes)).unwrap();
    let want = format!(
        "{}\nbig\ndir/\ndir/hello\ndir/sub/\ndir/sub/again\ndir.txt\nlink\nünïcode\n",
        "a".repeat(150)
    );
    assert_eq!(list, want);
    let out = tempfile::tempdir().unwrap();
    pipe("tar", &["-x", "-C", out.path().to_str().unwrap()], &bytes);
    let status = Command::new("diff")
        .args(["-r", "--no-dereference"])
        .args([dir.path(), out.path()])
        .status()
        .unwrap();
    assert!(status.success());
    assert_eq!(
        fs::metadata(out.path().join("dir.txt")).unwrap().permissions().mode() & 0o7777,
        0o4755
    );
}

#[test]
fn several_trees_lie_below_their_own_directories() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("f"), "text").unwrap();
    fs::hard_link(dir.path().join("f"), dir.path().join("g")).unwrap();
    let trees =
        ["linux_amd64", "", "x"].map(|under| (under.to_owned(), LayerTree::whole(dir.path())));
    let mut bytes = Vec::new();
    let mut sink = |piece: bytes::Bytes| {
        bytes.extend_from_slice(&piece);
        Ok(())
    };
    shipway_archive::pack_below(&trees, 7, &mut sink).unwrap();
    let list = String::from_utf8(pipe("tar", &["-t"], &bytes)).unwrap();
    assert_eq!(list, "linux_amd64/\nlinux_amd64/f\nlinux_amd64/g\nf\ng\nx/\nx/f\nx/g\n");
    let out = tempfile::tempdir().unwrap();
    pipe("tar", &["-x", "-C", out.path().to_str().unwrap()], &bytes);
    assert_eq!(fs::read_to_string(out.path().join("x/g")).unwrap(), "text");
    let mut times = Vec::new();
    let note = |e: shipway_archive::LayerEntry| {
        times.push(e.mtime);
        Ok(())
    };
    LayerTree::whole(dir.path()).at(Some(9)).walk(note).unwrap();
    assert_eq!(times, [9, 9]);
}

#[test]
fn the_bytes_do_not_depend_on_the_number_of_threads() {
    let dir = tempfile::tempdir().unwrap();
    sample(dir.path());
    let tree = LayerTree::whole(dir.path());
    for kind in [CompressionKind::Gzip, CompressionKind::Zstd] {
        let compression = Compression { kind, ..Default::default() };
        let one = packed(&tree, compression, 1);
        for threads in [2, 5] {
            assert!(one == packed(&tree, compression, threads), "{kind:?} with {threads} threads");
        }
        assert_eq!(one.1.tar, tar_of(&tree).unwrap().tar);
        assert_eq!(one.1.digest, shipway_oci::Digest::of(&one.0));
        if kind == CompressionKind::Gzip {
            assert_eq!(
                shipway_oci::Digest::of(pipe("gzip", &["-dc"], &one.0)),
                one.1.tar.diff_id.0
            );
        } else {
            let tar = zstd::stream::decode_all(&one.0[..]).unwrap();
            assert_eq!(shipway_oci::Digest::of(tar), one.1.tar.diff_id.0);
        }
    }
}

#[test]
fn overlays_say_what_is_gone() {
    use rustix::fs::{CWD, FileType, Mode, XattrFlags, makedev, mknodat};
    let dir = tempfile::tempdir().unwrap();
    let (lower, upper) = (dir.path().join("lower"), dir.path().join("upper"));
    fs::create_dir_all(lower.join("old/sub")).unwrap();
    fs::create_dir_all(lower.join("d")).unwrap();
    for there in ["old/kept", "old/gone", "old/sub/gone", "d/gone", "d/gone too"] {
        fs::write(lower.join(there), "text").unwrap();
    }
    for new in ["old", "new", "d"] {
        fs::create_dir_all(upper.join(new)).unwrap();
        // Root's attribute.
        rustix::fs::setxattr(upper.join(new), "trusted.overlay.opaque", b"y", XattrFlags::empty())
            .unwrap();
    }
    // Directories in one that hides everything hide everything, marked or not.
    fs::create_dir_all(upper.join("old/sub")).unwrap();
    assert!(
        Command::new("cp")
            .arg("-a")
            .args([lower.join("old/kept"), upper.join("old/kept")])
            .status()
            .unwrap()
            .success()
    );
    rustix::fs::removexattr(upper.join("d"), "trusted.overlay.opaque").unwrap();
    mknodat(CWD, upper.join("d/gone"), FileType::CharacterDevice, Mode::empty(), makedev(0, 0))
        .unwrap();
    // All whiteouts may be one.
    for other in ["d/gone too", "d/never"] {
        fs::hard_link(upper.join("d/gone"), upper.join(other)).unwrap();
    }
    let mut names = Vec::new();
    LayerTree::overlay(&upper, vec![lower], Marks::Trusted)
        .walk(|e| {
            names.push(format!("{} {:?}", String::from_utf8_lossy(&e.path), e.kind));
            Ok(())
        })
        .unwrap();
    let want = [
        "d Directory",
        "d/gone Whiteout",
        "d/gone too Whiteout",
        "new Directory",
        "old Directory",
        "old/gone Whiteout",
        "old/sub Directory",
        "old/sub/gone Whiteout",
    ];
    assert_eq!(names, want);
}

#[test]
fn overlays_do_not_tell_what_was_only_touched() {
    let dir = tempfile::tempdir().unwrap();
    let layer = |name: &str| dir.path().join(name);
    fs::create_dir_all(layer("bottom/d/deep")).unwrap();
    for there in ["d/same", "d/longer", "d/other", "d/later", "d/mode", "d/deep/below"] {
        fs::write(layer("bottom").join(there), "text").unwrap();
    }
    std::os::unix::fs::symlink("a", layer("bottom/d/link")).unwrap();
    let touch = |path: PathBuf, time: &str| {
        assert!(Command::new("touch").args(["-d", time]).arg(path).status().unwrap().success())
    };
    for whole in ["d/same", "d/other", "d/later"] {
        touch(layer("bottom").join(whole), "@1000");
    }
    fs::create_dir_all(layer("middle")).unwrap();
    assert!(
        Command::new("cp")
            .arg("-a")
            .args([layer("bottom"), layer("upper")])
            .status()
            .unwrap()
            .success()
    );
    fs::write(layer("upper/d/longer"), "text and more").unwrap();
    // Same length and time, other contents.
    fs::write(layer("upper/d/other"), "TEXT").unwrap();
    touch(layer("upper/d/other"), "@1000");
    touch(layer("upper/d/later"), "@1001");
    fs::set_permissions(layer("upper/d/mode"), fs::Permissions::from_mode(0o600)).unwrap();
    // A second name of a file that is the same is the first one told.
    fs::hard_link(layer("upper/d/same"), layer("upper/d/zweit")).unwrap();
    let mut names = Vec::new();
    LayerTree::overlay(layer("upper"), vec![layer("middle"), layer("bottom")], Marks::Trusted)
        .walk(|e| {
            names.push(format!("{} {:?}", String::from_utf8_lossy(&e.path), e.kind));
            Ok(())
        })
        .unwrap();
    assert_eq!(
        names,
        [
            "d Directory",
            "d/later File",
            "d/longer File",
            "d/mode File",
            "d/other File",
            "d/zweit File"
        ]
    );
}

#[test]
fn a_known_tar_is_checked_and_not_hashed() {
    let dir = tempfile::tempdir().unwrap();
    sample(dir.path());
    let tree = LayerTree::whole(dir.path());
    let tar = tar_of(&tree).unwrap().tar;
    let again = |known| pack(&tree, Compression::default(), Some(known), None, &mut |_| Ok(()));
    assert_eq!(again(tar.clone()).unwrap(), packed(&tree, Compression::default(), 1).1);
    // It believes what it is told, as long as the files are the same.
    let mut told = tar.clone();
    told.diff_id = shipway_oci::DiffId(shipway_oci::Digest::of("another"));
    assert_eq!(again(told.clone()).unwrap().tar, told);
    let hello = dir.path().join("dir/hello");
    let times =
        fs::FileTimes::new().set_modified(fs::metadata(&hello).unwrap().modified().unwrap());
    fs::write(&hello, "hullo\n").unwrap();
    fs::File::options().append(true).open(&hello).unwrap().set_times(times).unwrap();
    let failed = again(tar).unwrap_err();
    assert_eq!(failed.code(), shipway_fault::Code::FailedPrecondition, "{failed}");
}

#[test]
fn a_failing_sink_ends_the_packing() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("big"), pseudo_random(40_000_000)).unwrap();
    let failed =
        pack(&LayerTree::whole(dir.path()), Compression::default(), None, None, &mut |_| {
            Err(shipway_fault::Fault::cancelled())
        });
    assert!(failed.unwrap_err().is_cancelled());
}

#[test]
fn comparing_trees_tells_changes_with_their_parents() {
    let dir = tempfile::tempdir().unwrap();
    let (before, after) = (dir.path().join("before"), dir.path().join("after"));
    fs::create_dir_all(before.join("same/deep")).unwrap();
    fs::create_dir_all(before.join("quiet")).unwrap();
    for file in ["same/deep/kept", "same/deep/gone", "same/changed", "quiet/x"] {
        fs::write(before.join(file), "1").unwrap();
    }
    assert!(Command::new("cp").arg("-a").args([&before, &after]).status().unwrap().success());
    fs::remove_file(after.join("same/deep/gone")).unwrap();
    fs::write(after.join("same/changed"), "22").unwrap();
    fs::write(after.join("same/new"), "3").unwrap();
    let mut names = Vec::new();
    LayerTree::compared(before, after)
        .walk(|e| {
            names.push(format!("{} {:?}", String::from_utf8_lossy(&e.path), e.kind));
            Ok(())
        })
        .unwrap();
    assert_eq!(
        names,
        [
            "same Directory",
            "same/changed File",
            "same/deep Directory",
            "same/deep/gone Whiteout",
            "same/new File"
        ]
    );
}

#[test]
fn recompressing_keeps_the_tar() {
    let dir = tempfile::tempdir().unwrap();
    sample(dir.path());
    let tree = LayerTree::whole(dir.path());
    let kinds = [CompressionKind::Uncompressed, CompressionKind::Gzip, CompressionKind::Zstd];
    for from in kinds {
        let (bytes, before) = packed(&tree, Compression { kind: from, ..Default::default() }, 2);
        for kind in kinds {
            let mut pieces = bytes
                .chunks(70_000)
                .map(|c| Ok(Some(c.to_vec().into())))
                .collect::<Vec<_>>()
                .into_iter();
            let compression = Compression { kind, ..Default::default() };
            let after = recompress(
                &mut || pieces.next().unwrap_or(Ok(None)),
                from,
                compression,
                None,
                &mut |_| Ok(()),
            )
            .unwrap();
            assert_eq!(after, packed(&tree, compression, 1).1, "{from:?} to {kind:?}");
            assert_eq!(after.tar, before.tar);
        }
    }
}
