//! What containerd's suite expects of every snapshotter, in our words.

use super::*;
use crate::{Kind, MAX_LABELS, MAX_NAME};

fn store() -> (tempfile::TempDir, Store) {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir.path().join("root"));
    (dir, store)
}

fn code<T: std::fmt::Debug>(result: Result<T>) -> Code {
    result.unwrap_err().code()
}

fn prepare(store: &Store, key: &str, parent: &str) -> Result<Vec<Mount>> {
    store.prepare(
        &name(key),
        Some(parent).filter(|p| !p.is_empty()).map(name).as_ref(),
        Labels::new(),
    )
}

fn view(store: &Store, key: &str, parent: &str) -> Result<Vec<Mount>> {
    store.view(&name(key), Some(parent).filter(|p| !p.is_empty()).map(name).as_ref(), Labels::new())
}

fn commit(store: &Store, to: &str, key: &str) -> Result<()> {
    store.commit(&name(to), &name(key), Labels::new())
}

/// A committed snapshot with a file of its own name.
fn layer(store: &Store, to: &str, parent: &str) {
    let mounts = prepare(store, "unpacking", parent).unwrap();
    std::fs::write(Path::new(upper(&mounts)).join(to), to).unwrap();
    commit(store, to, "unpacking").unwrap();
}

#[test]
fn a_committed_snapshot_takes_the_place_of_its_active_one() {
    let (_dir, store) = store();
    prepare(&store, "a", "").unwrap();
    let active = store.stat(&name("a")).unwrap();
    assert_eq!((active.kind, active.parent, active.created), (Kind::Active, None, active.updated));
    commit(&store, "c", "a").unwrap();
    let committed = store.stat(&name("c")).unwrap();
    assert_eq!((committed.kind, committed.parent.clone()), (Kind::Committed, None));
    assert!(committed.created > active.created);
    assert_eq!(code(store.stat(&name("a"))), Code::NotFound);
    prepare(&store, "b", "c").unwrap();
    commit(&store, "d", "b").unwrap();
    assert_eq!(store.stat(&name("d")).unwrap().parent, Some(name("c")));
    assert_eq!(list(&store, &[]), [committed, store.stat(&name("d")).unwrap()]);
}

#[test]
fn errors_have_containerds_codes() {
    let (_dir, store) = store();
    layer(&store, "base", "");
    prepare(&store, "active", "base").unwrap();
    view(&store, "view", "base").unwrap();
    for make in [prepare, view] {
        assert_eq!(code(make(&store, "x", "nothing")), Code::NotFound);
        assert_eq!(code(make(&store, "x", "active")), Code::InvalidArgument);
        for taken in ["base", "active", "view"] {
            assert_eq!(code(make(&store, taken, "base")), Code::AlreadyExists);
        }
    }
    assert_eq!(code(commit(&store, "new", "nothing")), Code::NotFound);
    assert_eq!(code(commit(&store, "base", "nothing")), Code::NotFound);
    assert_eq!(code(commit(&store, "base", "active")), Code::AlreadyExists);
    assert_eq!(code(commit(&store, "active", "active")), Code::AlreadyExists);
    for wrong in ["view", "base"] {
        assert_eq!(code(commit(&store, "new", wrong)), Code::FailedPrecondition);
    }
    assert_eq!(code(store.mounts(&name("nothing"))), Code::NotFound);
    assert_eq!(code(store.mounts(&name("base"))), Code::FailedPrecondition);
    assert_eq!(code(store.usage(&name("nothing"))), Code::NotFound);
    assert_eq!(code(store.update(&name("nothing"), Labels::new(), &[])), Code::NotFound);
    assert_eq!(code(store.remove(&name("nothing"))), Code::NotFound);
    let children = store.remove(&name("base")).unwrap_err();
    assert_eq!(children.code(), Code::FailedPrecondition);
    assert!(children.to_string().contains("cannot remove"), "{children}");
    // A failed call leaves nothing: neither a row nor a directory.
    assert_eq!(names(&store, &[]), ["active", "base", "view"]);
    let directories = std::fs::read_dir(_dir.path().join("root/snapshots")).unwrap().count();
    assert_eq!(directories, 3);
}

#[test]
fn mounts_are_those_of_containerds_overlayfs() {
    let (dir, store) = store();
    let root = dir.path().join("root").canonicalize().unwrap();
    let path = |id: u64, what: &str| format!("{}/snapshots/{id}/{what}", root.display());
    let bind = |source: String, access: &str| {
        vec![Mount { kind: "bind", source, options: vec![access.into(), "rbind".into()] }]
    };
    assert_eq!(prepare(&store, "a", "").unwrap(), bind(path(1, "fs"), "rw"));
    assert_eq!(view(&store, "v", "").unwrap(), bind(path(2, "fs"), "ro"));
    commit(&store, "one", "a").unwrap();
    assert_eq!(view(&store, "v1", "one").unwrap(), bind(path(1, "fs"), "ro"));
    let index: &[&str] = if Path::new("/sys/module/overlay/parameters/index").exists() {
        &["index=off"]
    } else {
        &[]
    };
    let overlay = |options: &[String]| {
        let options =
            options.iter().cloned().chain(index.iter().map(|o| (*o).to_owned())).collect();
        vec![Mount { kind: "overlay", source: "overlay".into(), options }]
    };
    let writable = |id: u64, lower: &str| {
        overlay(&[
            format!("workdir={}", path(id, "work")),
            format!("upperdir={}", path(id, "fs")),
            format!("lowerdir={lower}"),
        ])
    };
    assert_eq!(prepare(&store, "b", "one").unwrap(), writable(4, &path(1, "fs")));
    commit(&store, "two", "b").unwrap();
    let both = format!("{}:{}", path(4, "fs"), path(1, "fs"));
    assert_eq!(view(&store, "v2", "two").unwrap(), overlay(&[format!("lowerdir={both}")]));
    assert_eq!(prepare(&store, "c", "two").unwrap(), writable(6, &both));
    for key in ["v", "v1", "v2", "c"] {
        let again = store.mounts(&name(key)).unwrap();
        assert!(!again.is_empty(), "{key}");
    }
    assert_eq!(store.mounts(&name("c")).unwrap(), writable(6, &both));
}

#[test]
fn configured_mount_options_are_on_overlays_only_and_win() {
    let dir = tempfile::tempdir().unwrap();
    let mount_options = vec!["volatile".to_owned(), "index=on".to_owned()];
    let store = open_with(
        dir.path(),
        Options { mount_options, ..Options::default() },
        Arc::new(NoLazyLayers),
    );
    assert_eq!(prepare(&store, "a", "").unwrap()[0].options, ["rw", "rbind"]);
    commit(&store, "one", "a").unwrap();
    let mounts = prepare(&store, "b", "one").unwrap();
    assert_eq!(mounts[0].options[3..], ["volatile", "index=on"]);
}

#[test]
fn labels_are_updated_by_path_and_nothing_else_is() {
    let (_dir, store) = store();
    layer(&store, "c", "");
    prepare(&store, "a", "c").unwrap();
    view(&store, "v", "c").unwrap();
    for key in ["c", "a", "v"] {
        let key = name(key);
        let before = store.stat(&key).unwrap();
        let update = |values: &[(&str, &str)], paths: &[&str]| {
            store.update(
                &key,
                labels(values),
                &paths.iter().map(|p| (*p).to_owned()).collect::<Vec<_>>(),
            )
        };
        let after =
            update(&[("l1", "v1"), ("l2", "v2"), ("l3", "v3"), ("empty", "")], &[]).unwrap();
        assert_eq!(after.labels, labels(&[("l1", "v1"), ("l2", "v2"), ("l3", "v3")]));
        assert!(after.updated > before.updated);
        assert_eq!(
            (after.created, after.kind, &after.parent),
            (before.created, before.kind, &before.parent)
        );
        // Of the named ones, one is set, and one is removed because the new labels do not have it.
        let after = update(&[("l1", "new"), ("l4", "v4")], &["labels.l1", "labels.l2"]).unwrap();
        assert_eq!(after.labels, labels(&[("l1", "new"), ("l3", "v3")]));
        let after = update(&[("a.b/c", "x")], &["labels.a.b/c"]).unwrap();
        assert_eq!(after.labels, labels(&[("l1", "new"), ("l3", "v3"), ("a.b/c", "x")]));
        let after = update(&[("l4", "v4")], &["labels"]).unwrap();
        assert_eq!(after.labels, labels(&[("l4", "v4")]));
        for immutable in ["parent", "name", "kind", "created_at", "labelsx", ""] {
            assert_eq!(code(update(&[], &["labels.l5", immutable])), Code::InvalidArgument);
        }
        assert_eq!(store.stat(&key).unwrap(), after);
    }
    // Labels of an active snapshot are not those of the committed one.
    store.commit(&name("d"), &name("a"), labels(&[("own", "1"), ("none", "")])).unwrap();
    assert_eq!(store.stat(&name("d")).unwrap().labels, labels(&[("own", "1")]));
}

#[test]
fn a_name_is_free_again_when_its_snapshot_is_gone() {
    let (_dir, store) = store();
    layer(&store, "one", "");
    prepare(&store, "reused", "one").unwrap();
    store.remove(&name("reused")).unwrap();
    view(&store, "reused", "one").unwrap();
    store.remove(&name("reused")).unwrap();
    prepare(&store, "reused", "").unwrap();
    store.remove(&name("one")).unwrap();
    commit(&store, "one", "reused").unwrap();
    assert_eq!(names(&store, &[]), ["one"]);
}

#[test]
fn a_snapshot_with_children_stays_until_they_are_gone() {
    let (_dir, store) = store();
    layer(&store, "base", "");
    layer(&store, "middle", "base");
    prepare(&store, "top", "middle").unwrap();
    view(&store, "look", "middle").unwrap();
    for (blocked, freed_by) in [("middle", "top"), ("middle", "look"), ("base", "middle")] {
        assert_eq!(code(store.remove(&name(blocked))), Code::FailedPrecondition);
        store.remove(&name(freed_by)).unwrap();
    }
    store.remove(&name("base")).unwrap();
    assert!(names(&store, &[]).is_empty());
}

#[test]
fn lists_are_filtered_by_name_kind_parent_and_label() {
    let (_dir, store) = store();
    layer(&store, "p", "");
    prepare(&store, "unpacking", "").unwrap();
    store.commit(&name("pl"), &name("unpacking"), labels(&[("l", "1")])).unwrap();
    store.prepare(&name("al"), Some(&name("pl")), labels(&[("l", "2")])).unwrap();
    store.view(&name("vl"), Some(&name("pl")), labels(&[("l", "3")])).unwrap();
    prepare(&store, "a", "p").unwrap();
    view(&store, "v", "p").unwrap();
    for (filters, want) in [
        (&[][..], &["a", "al", "p", "pl", "v", "vl"][..]),
        (&["kind==active"], &["a", "al"]),
        (&["kind==view"], &["v", "vl"]),
        (&["kind==committed"], &["p", "pl"]),
        (&["name==p", "name==al"], &["al", "p"]),
        (&["name==al,labels.l"], &["al"]),
        (&["parent==p"], &["a", "v"]),
        (&["parent!=\"\""], &["a", "al", "v", "vl"]),
        (&["labels.l"], &["al", "pl", "vl"]),
        (&["labels.l==2"], &["al"]),
        (&["labels.l~=[12]", "kind==view"], &["al", "pl", "v", "vl"]),
    ] {
        assert_eq!(names(&store, filters), want, "{filters:?}");
    }
    for info in list(&store, &[]) {
        assert_eq!(store.stat(&info.name).unwrap(), info);
    }
}

#[test]
fn usage_is_exact_before_and_after_it_was_counted_and_survives() {
    let (dir, store) = store();
    let mounts = prepare(&store, "a", "").unwrap();
    let empty = store.usage(&name("a")).unwrap();
    assert_eq!(empty.inodes, 1);
    std::fs::write(Path::new(upper(&mounts)).join("f"), vec![1; 20_000]).unwrap();
    let full = store.usage(&name("a")).unwrap();
    assert!(full.bytes >= empty.bytes + 20_000 && full.inodes == 2, "{full:?}");
    commit(&store, "c", "a").unwrap();
    assert_eq!(store.totals().uncounted, 1);
    assert_eq!(store.usage(&name("c")).unwrap(), full);
    while store.work_once() {}
    assert_eq!((store.totals().uncounted, store.totals().usage), (0, full));
    assert_eq!(store.usage(&name("c")).unwrap(), full);
    view(&store, "v", "c").unwrap();
    assert_eq!(store.usage(&name("v")).unwrap(), Default::default());
    drop(store);
    let store = open(&dir.path().join("root"));
    assert_eq!(store.usage(&name("c")).unwrap(), full);
}

#[test]
fn removed_files_are_gone_after_cleanup_and_so_is_what_an_old_life_left() {
    let (dir, store) = store();
    let root = dir.path().join("root");
    let count = |what: &str| std::fs::read_dir(root.join(what)).unwrap().count();
    layer(&store, "one", "");
    layer(&store, "two", "one");
    store.remove(&name("two")).unwrap();
    assert_eq!((count("snapshots"), count("trash")), (1, 1));
    store.cleanup().unwrap();
    assert_eq!((count("snapshots"), count("trash")), (1, 0));
    store.remove(&name("one")).unwrap();
    std::fs::create_dir(root.join("snapshots/77")).unwrap();
    drop(store);
    let store = open(&root);
    assert_eq!((count("snapshots"), count("trash")), (0, 2));
    while store.work_once() {}
    assert_eq!(count("trash"), 0);
    // Numbers are not given twice.
    layer(&store, "three", "");
    assert!(root.join("snapshots/3").exists());
}

#[test]
fn lost_files_are_an_error_on_use_and_can_be_removed() {
    let (dir, store) = store();
    let root = dir.path().join("root");
    layer(&store, "one", "");
    layer(&store, "two", "one");
    prepare(&store, "a", "two").unwrap();
    drop(store);
    std::fs::remove_dir_all(root.join("snapshots/1")).unwrap();
    let store = open(&root);
    assert_eq!(code(store.mounts(&name("a"))), Code::DataLoss);
    assert_eq!(code(prepare(&store, "b", "two")), Code::DataLoss);
    assert_eq!(code(store.usage(&name("one"))), Code::DataLoss);
    for key in ["a", "two", "one"] {
        store.remove(&name(key)).unwrap();
    }
    while store.work_once() {}
    assert_eq!(std::fs::read_dir(root.join("snapshots")).unwrap().count(), 0);
}

#[test]
fn directories_without_a_database_are_not_thrown_away() {
    let (dir, store) = store();
    let root = dir.path().join("root");
    layer(&store, "one", "");
    drop(store);
    std::fs::remove_file(root.join("db.redb")).unwrap();
    for _ in 0..2 {
        let error =
            Store::open(&root, Options::default(), Arc::new(NoLazyLayers)).map(drop).unwrap_err();
        assert_eq!(error.code(), Code::FailedPrecondition);
        assert!(root.join("snapshots/1/fs/one").exists());
    }
}

#[test]
fn a_root_belongs_to_one_store_and_a_foreign_file_is_not_touched() {
    let (dir, store) = store();
    let root = dir.path().join("root");
    let second =
        Store::open(&root, Options::default(), Arc::new(NoLazyLayers)).map(drop).unwrap_err();
    assert_eq!(second.code(), Code::FailedPrecondition);
    drop(store);
    std::fs::write(root.join("db.redb"), b"not a database, but somebody's").unwrap();
    Store::open(&root, Options::default(), Arc::new(NoLazyLayers)).map(drop).unwrap_err();
    assert_eq!(std::fs::read(root.join("db.redb")).unwrap(), b"not a database, but somebody's");
}

#[test]
fn what_is_too_long_is_refused() {
    let (_dir, store) = store();
    assert!(Name::new("").is_err());
    assert!(Name::new("x".repeat(MAX_NAME + 1)).is_err());
    let longest = Name::new("x".repeat(MAX_NAME)).unwrap();
    store.prepare(&longest, None, Labels::new()).unwrap();
    let many = labels(&[("k", &"v".repeat(MAX_LABELS))]);
    for result in [
        store.prepare(&name("a"), None, many.clone()).map(drop),
        store.view(&name("a"), None, many.clone()).map(drop),
        store.commit(&name("a"), &longest, many.clone()),
        store.update(&longest, many.clone(), &[]).map(drop),
    ] {
        assert_eq!(code(result), Code::InvalidArgument);
    }
}

#[test]
fn a_hundred_and_twenty_eight_layers_stand_on_each_other() {
    let (_dir, store) = store();
    let mut parent = String::new();
    for i in 0..128 {
        let next = format!("layer-{i}");
        layer(&store, &next, &parent);
        parent = next;
    }
    let mounts = view(&store, "v", &parent).unwrap();
    let lowers: Vec<_> = option(&mounts, "lowerdir").unwrap().split(':').collect();
    assert_eq!(lowers.len(), 128);
    for (i, lower) in lowers.iter().rev().enumerate() {
        assert!(Path::new(lower).join(format!("layer-{i}")).exists());
    }
}
