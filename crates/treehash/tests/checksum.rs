//! What a checksum depends on, and what not.

#![allow(clippy::unwrap_used)]

use shipway_treehash::{PathFilter, PathVerdict, Selector, TreeIndex};
use std::{
    fs,
    os::unix::fs::{PermissionsExt, symlink},
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
    TreeIndex::default().checksum(root, selector).unwrap().to_string()
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
    let before = index.checksum(two.path(), &Selector::path("src")).unwrap();
    fs::write(two.path().join("readme"), "other").unwrap();
    assert_eq!(index.checksum(two.path(), &Selector::path("src")).unwrap(), before);
    fs::set_permissions(two.path().join("src/a.go"), fs::Permissions::from_mode(0o600)).unwrap();
    let changed = index.checksum(two.path(), &Selector::path("src")).unwrap();
    assert_ne!(changed, before);
    fs::write(two.path().join("src/a.go"), "x").unwrap();
    assert_ne!(index.checksum(two.path(), &Selector::path("src")).unwrap(), changed);
    let missing = index.checksum(two.path(), &Selector::path("src/nothing")).unwrap_err();
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
        TreeIndex::default()
            .checksum(dir.path(), &Selector { wildcard: true, ..Selector::path(path) })
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
