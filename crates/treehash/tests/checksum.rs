//! What a checksum depends on, and what not.

#![allow(clippy::unwrap_used)]

use shipway_oci::Digest;
use shipway_treehash::{
    FileHasher, FileStat, KnownContents, PIECE, PathFilter, PathVerdict, Selector, TreeFile,
    TreeIndex,
};
use std::{
    cell::RefCell,
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt, symlink},
    path::Path,
    sync::Arc,
};

fn tree(root: &Path) {
    fs::create_dir_all(root.join("src/deep")).unwrap();
    for (file, text) in
        [("src/a.go", "a"), ("src/b.go", "b"), ("src/deep/c.txt", "c"), ("readme", "r")]
    {
        fs::write(root.join(file), text).unwrap();
    }
    symlink("/src", root.join("link")).unwrap();
}

fn sum(root: &Path, selector: &Selector) -> String {
    TreeIndex::default().checksum(root, selector, None).unwrap().to_string()
}

#[test]
fn contents_and_modes_count_and_times_do_not() {
    let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    tree(one.path());
    tree(two.path());
    for path in ["/", "src", "src/", "readme", "link"] {
        assert_eq!(
            sum(one.path(), &Selector::path(path)),
            sum(two.path(), &Selector::path(path)),
            "{path}"
        );
    }
    assert_eq!(sum(one.path(), &Selector::path("link")), sum(one.path(), &Selector::path("src")));
    let index = TreeIndex::default();
    let before = index.checksum(two.path(), &Selector::path("src"), None).unwrap();
    fs::write(two.path().join("readme"), "other").unwrap();
    assert_eq!(index.checksum(two.path(), &Selector::path("src"), None).unwrap(), before);
    fs::set_permissions(two.path().join("src/a.go"), fs::Permissions::from_mode(0o600)).unwrap();
    let changed = index.checksum(two.path(), &Selector::path("src"), None).unwrap();
    assert_ne!(changed, before);
    fs::write(two.path().join("src/a.go"), "x").unwrap();
    assert_ne!(index.checksum(two.path(), &Selector::path("src"), None).unwrap(), changed);
    let missing = index.checksum(two.path(), &Selector::path("src/nothing"), None).unwrap_err();
    assert!(missing.is_not_found());
    assert_eq!(missing.to_string(), "\"/src/nothing\": not found");
}

#[test]
fn attributes_that_a_layer_has_count() {
    let dir = tempfile::tempdir().unwrap();
    tree(dir.path());
    let set = |path: &str, name: &str, value: &[u8]| {
        rustix::fs::lsetxattr(dir.path().join(path), name, value, rustix::fs::XattrFlags::empty())
            .expect(name);
    };
    let now = || sum(dir.path(), &Selector::path("src"));
    let mut before = now();
    // A capability of the second version: cap_net_raw=ep.
    let capability = [0x0200_0001_u32, 1 << 13, 0, 0, 0].map(u32::to_le_bytes).concat();
    for (path, name, value) in [
        ("src/a.go", "user.note", &b"1"[..]),
        ("src/a.go", "user.note", b"2"),
        ("src/deep", "user.note", b"1"),
        ("src/a.go", "security.capability", &capability),
        ("src/a.go", "user.large", &[7; 2000]),
    ] {
        set(path, name, value);
        let after = now();
        assert_ne!(after, before, "{path} {name}");
        before = after;
    }
    // Others are in no layer.
    set("src/a.go", "trusted.note", b"1");
    assert_eq!(now(), before);
}

#[test]
fn wildcards_see_only_what_they_match() {
    let dir = tempfile::tempdir().unwrap();
    tree(dir.path());
    let go = Selector { wildcard: true, ..Selector::path("src/*.go") };
    let before = sum(dir.path(), &go);
    fs::write(dir.path().join("src/deep/c.txt"), "changed").unwrap();
    assert_eq!(sum(dir.path(), &go), before);
    fs::write(dir.path().join("src/c.go"), "c").unwrap();
    assert_ne!(sum(dir.path(), &go), before);
}

#[test]
fn a_malformed_pattern_fails_where_there_is_a_name_to_match() {
    let dir = tempfile::tempdir().unwrap();
    tree(dir.path());
    let checksum = |path: &str| {
        TreeIndex::default().checksum(
            dir.path(),
            &Selector { wildcard: true, ..Selector::path(path) },
            None,
        )
    };
    assert_eq!(checksum("src/[a-").unwrap_err().to_string(), "syntax error in pattern \"src/[a-\"");
    assert_eq!(checksum("none*/[a-").unwrap(), checksum("none*").unwrap());
}

struct OnlyText;

impl PathFilter for OnlyText {
    fn decide(&self, path: &str, is_dir: bool) -> PathVerdict {
        match (is_dir, path.ends_with(".txt")) {
            (true, _) => PathVerdict::Descend,
            (_, true) => PathVerdict::Take,
            _ => PathVerdict::Skip,
        }
    }
}

#[test]
fn filters_leave_out_files_and_empty_directories() {
    let dir = tempfile::tempdir().unwrap();
    tree(dir.path());
    let text = Selector { filter: Some(Arc::new(OnlyText)), ..Selector::path("src") };
    let before = sum(dir.path(), &text);
    fs::write(dir.path().join("src/a.go"), "changed").unwrap();
    fs::create_dir(dir.path().join("src/empty")).unwrap();
    assert_eq!(sum(dir.path(), &text), before);
    fs::set_permissions(dir.path().join("src"), fs::Permissions::from_mode(0o701)).unwrap();
    let narrow = sum(dir.path(), &text);
    assert_ne!(narrow, before);
    fs::write(dir.path().join("src/deep/c.txt"), "changed").unwrap();
    assert_ne!(sum(dir.path(), &text), narrow);
}

/// Knows what is in some files, and notes which it was asked for.
struct Known<'a> {
    root: &'a Path,
    knows: &'a dyn Fn(&Path) -> bool,
    asked: RefCell<Vec<String>>,
}

impl KnownContents for Known<'_> {
    fn pieces(&self, files: &[TreeFile<'_>]) -> Vec<Option<Vec<Digest>>> {
        let pieces = |file: &TreeFile<'_>| {
            let full = self.root.join(file.path);
            let found = full.symlink_metadata().unwrap();
            assert_eq!((file.inode, file.size), (found.ino(), found.size()));
            self.asked.borrow_mut().push(file.path.display().to_string());
            let bytes = fs::read(full).unwrap();
            let pieces = bytes.chunks(PIECE as usize).map(Digest::of);
            (self.knows)(file.path).then(|| pieces.collect())
        };
        files.iter().map(pieces).collect()
    }
}

/// Whatever is known of files, and whether they are read from the disk or come as a stream: the
/// checksums are the same. What is known is not read.
#[test]
fn known_and_read_contents_give_the_same_checksum() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    tree(root);
    fs::write(root.join("src/empty"), "").unwrap();
    let large: Vec<u8> = (0..2 * PIECE + 77).map(|n| ((n * n) >> 9) as u8).collect();
    for size in [PIECE - 1, PIECE, PIECE + 1, 2 * PIECE + 77] {
        let path = root.join("src").join(size.to_string());
        fs::write(&path, &large[..size as usize]).unwrap();
        rustix::fs::lsetxattr(&path, "user.note", b"1", rustix::fs::XattrFlags::empty()).unwrap();
    }
    for path in ["/", "src", "src/", &format!("src/{}", 2 * PIECE + 77), "readme", "link"] {
        let selector = Selector::path(path);
        let read = TreeIndex::default().checksum(root, &selector, None).unwrap();
        for (n, knows) in [&(|_: &Path| true) as &dyn Fn(&Path) -> bool, &|_| false, &|path| {
            path.as_os_str().len() % 2 == 0
        }]
        .into_iter()
        .enumerate()
        {
            let (index, known) =
                (TreeIndex::default(), Known { root, knows, asked: RefCell::default() });
            let sum = index.checksum(root, &selector, Some(&known)).unwrap();
            assert_eq!(sum, read, "{path} with {n}");
            let asked = known.asked.take();
            assert!(!asked.is_empty() && !asked.iter().any(|p| p == "src/empty"), "{asked:?}");
            // What is remembered is not asked for again.
            assert_eq!(index.checksum(root, &selector, Some(&known)).unwrap(), read);
            assert_eq!(known.asked.take(), Vec::<String>::new());
        }
    }
    // One that comes as a stream.
    let path = root.join("streamed");
    fs::write(&path, &large).unwrap();
    let found = path.symlink_metadata().unwrap();
    let mut hasher = FileHasher::new(&FileStat {
        size: found.size() as i64,
        mode: found.mode(),
        uid: found.uid(),
        gid: found.gid(),
        mtime: 0,
    });
    large.chunks(1_000_003).for_each(|part| hasher.update(part));
    assert_eq!(hasher.finish().to_string(), sum(root, &Selector::path("streamed")));
}

/// What is said to be known is not read, and is not taken if it cannot be.
#[test]
fn nothing_is_read_of_what_is_known() {
    struct Says(Vec<Digest>);
    impl KnownContents for Says {
        fn pieces(&self, files: &[TreeFile<'_>]) -> Vec<Option<Vec<Digest>>> {
            vec![Some(self.0.clone()); files.len()]
        }
    }
    let dir = tempfile::tempdir().unwrap();
    tree(dir.path());
    let selector = Selector::path("readme");
    let says = |pieces: Vec<Digest>| {
        TreeIndex::default().checksum(dir.path(), &selector, Some(&Says(pieces))).unwrap()
    };
    let read = TreeIndex::default().checksum(dir.path(), &selector, None).unwrap();
    assert_eq!(says(vec![Digest::of("r")]), read);
    assert_ne!(says(vec![Digest::of("x")]), read);
    // A file of a byte has one piece.
    assert_eq!(says(vec![Digest::of("x"); 2]), read);
    assert_eq!(says(Vec::new()), read);
}
