//! The index over files.

use async_trait::async_trait;
use parking_lot::Mutex;
use shipway_cachedb::{CacheDb, ResultStore};
use shipway_fault::Result;
use shipway_oci::Digest;
use shipway_solver::{CacheKey, CacheStore, KeyPart, RecordMeta};
use std::{collections::BTreeSet, sync::Arc};

/// Results are their names, while they exist.
#[derive(Default)]
struct Names(Mutex<BTreeSet<String>>);

impl Names {
    fn set(&self) -> parking_lot::MutexGuard<'_, BTreeSet<String>> {
        self.0.lock()
    }
}

#[async_trait]
impl ResultStore<String> for Names {
    fn id_of(&self, value: &String) -> Option<String> {
        self.set().insert(value.clone());
        (value != "nameless").then(|| value.clone())
    }
    async fn load(&self, id: &str) -> Result<Option<String>> {
        Ok(self.set().get(id).cloned())
    }
}

struct Lab {
    dir: tempfile::TempDir,
    names: Arc<Names>,
    db: CacheDb<String>,
}

impl Lab {
    async fn new() -> Self {
        let (dir, names) = (tempfile::tempdir().expect("a directory"), Arc::<Names>::default());
        let db =
            CacheDb::open(&dir.path().join("state/cache.db"), names.clone()).expect("an index");
        Self { dir, names, db }
    }
    async fn save(&self, keys: &[&str], value: &str) -> CacheKey {
        let meta = RecordMeta { description: format!("made {value}"), ..RecordMeta::default() };
        self.db.save(&keys_of(keys), &value.to_owned(), &meta).await.expect("saved")
    }
    async fn load(&self, keys: &[&str]) -> Option<(CacheKey, String)> {
        self.db.load(&keys_of(keys)).await.expect("loaded")
    }
    async fn primaries(&self, keys: &[&str]) -> Vec<CacheKey> {
        self.db.primaries(&keys_of(keys)).await.expect("looked up")
    }
    async fn reopen(self) -> Self {
        let Self { dir, names, db } = self;
        drop(db);
        let db =
            CacheDb::open(&dir.path().join("state/cache.db"), names.clone()).expect("an index");
        Self { dir, names, db }
    }
}

fn key(text: &str) -> CacheKey {
    CacheKey(Digest::of(text))
}

fn keys_of(keys: &[&str]) -> Vec<CacheKey> {
    keys.iter().map(|k| key(k)).collect()
}

#[tokio::test]
async fn keys_lead_to_the_primary_of_the_first() {
    let lab = Lab::new().await;
    assert_eq!(lab.save(&["content 1", "definition"], "one").await, key("content 1"));
    assert_eq!(lab.load(&["unknown", "definition"]).await, Some((key("content 1"), "one".into())));
    // The same definition gave something else: it leads there now, and the old content still to the
    // old result.
    assert_eq!(lab.save(&["content 2", "definition"], "two").await, key("content 2"));
    assert_eq!(lab.load(&["definition"]).await, Some((key("content 2"), "two".into())));
    assert_eq!(lab.load(&["content 1"]).await, Some((key("content 1"), "one".into())));
    // A result made again keeps its primary.
    lab.save(&["other", "content 1"], "three").await;
    assert_eq!(lab.save(&["content 1"], "four").await, key("other"));
    assert_eq!(lab.primaries(&["definition", "content 2", "nothing"]).await, [key("content 2")]);
}

#[tokio::test]
async fn a_result_that_is_gone_is_dropped_and_its_keys_stay() {
    let lab = Lab::new().await;
    lab.save(&["a"], "gone").await;
    lab.save(&["b"], "there").await;
    lab.names.set().remove("gone");
    assert_eq!(lab.load(&["a", "b"]).await, Some((key("b"), "there".into())));
    assert!(lab.db.keys_of("gone").expect("keys").is_empty());
    assert_eq!(lab.primaries(&["a"]).await, [key("a")]);
}

#[tokio::test]
async fn pruning_drops_all_records_of_a_result() {
    let lab = Lab::new().await;
    lab.save(&["a"], "x").await;
    lab.save(&["b"], "x").await;
    lab.save(&["c"], "y").await;
    assert_eq!(
        lab.db.forget_results(vec!["x".into(), "never".into()]).await.expect("forgotten"),
        2
    );
    assert_eq!(
        (lab.load(&["a", "b"]).await, lab.load(&["c"]).await.map(|r| r.1)),
        (None, Some("y".into()))
    );
    lab.db.clear().await.expect("cleared");
    assert_eq!((lab.load(&["c"]).await, lab.primaries(&["c"]).await.len()), (None, 0));
}

#[tokio::test]
async fn what_an_import_gave_replaces_nothing_that_lives() {
    let lab = Lab::new().await;
    let adopt = async |keys: &[&str], value: &str| {
        let meta = RecordMeta { imported: true, ..RecordMeta::default() };
        lab.db.adopt(&keys_of(keys), &value.to_owned(), &meta).await.expect("stored")
    };
    lab.save(&["content", "definition"], "ours").await;
    lab.save(&["else"], "other").await;
    // Its key leads to a living record, and another one of its keys to somebody else's: both stay.
    assert_eq!(adopt(&["definition", "else", "new"], "theirs").await, key("content"));
    for (k, value) in
        [("content", "ours"), ("definition", "ours"), ("new", "ours"), ("else", "other")]
    {
        assert_eq!(lab.load(&[k]).await.map(|r| r.1), Some(value.into()), "{k}");
    }
    // Where the result is gone, and where there was none, it is as good as one made here.
    lab.names.set().remove("ours");
    assert_eq!(adopt(&["definition"], "theirs").await, key("content"));
    assert_eq!(adopt(&["never seen"], "theirs, too").await, key("never seen"));
    assert_eq!(lab.load(&["content"]).await.map(|r| r.1), Some("theirs".into()));
    assert!(lab.db.record(&key("content")).expect("read").is_some_and(|r| r.meta.imported));
    lab.save(&["content"], "made again").await;
    assert!(lab.db.record(&key("content")).expect("read").is_some_and(|r| !r.meta.imported));
}

#[tokio::test]
async fn a_lost_result_is_forgotten_under_all_its_keys() {
    let lab = Lab::new().await;
    lab.save(&["a"], "x").await;
    lab.save(&["b"], "x").await;
    lab.db.forget(&"x".to_owned()).await.expect("forgotten");
    assert_eq!(
        (lab.load(&["a", "b"]).await, lab.primaries(&["a", "b"]).await),
        (None, keys_of(&["a", "b"]))
    );
}

#[tokio::test]
async fn keys_of_dropped_records_do_not_stay_for_ever() {
    let lab = Lab::new().await;
    let inputs = vec![(keys_of(&["base"]), None)];
    lab.save(&["base", "base by tag"], "image").await;
    lab.db
        .save(
            &keys_of(&["step"]),
            &"made".to_owned(),
            &RecordMeta { inputs, ..RecordMeta::default() },
        )
        .await
        .expect("saved");
    for n in 0..300 {
        let names: Vec<String> = (0..4).map(|i| format!("key {i} of {n}")).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        lab.save(&names, &format!("result {n}")).await;
    }
    lab.db
        .forget_results(
            (0..300).map(|n| format!("result {n}")).chain(["image".to_owned()]).collect(),
        )
        .await
        .expect("forgotten");
    assert!(lab.primaries(&["key 0 of 0", "key 3 of 299"]).await.is_empty());
    // What a living result was made of leads to it, though its own record went.
    assert_eq!(lab.primaries(&["base by tag", "step"]).await, keys_of(&["base", "step"]));
}

#[tokio::test]
async fn aliases_and_results_without_name() {
    let lab = Lab::new().await;
    assert_eq!(lab.save(&["a", "b"], "nameless").await, key("a"));
    assert_eq!((lab.load(&["a"]).await, lab.primaries(&["b"]).await), (None, vec![key("a")]));
    lab.db.alias(key("p"), &keys_of(&["b", "c"])).await.expect("linked");
    assert_eq!(lab.primaries(&["a", "b", "c", "p"]).await, [key("a"), key("p")]);
}

#[tokio::test]
async fn everything_is_there_after_a_restart() {
    let lab = Lab::new().await;
    lab.save(&["a", "b"], "x").await;
    let lab = lab.reopen().await;
    assert_eq!(lab.load(&["b"]).await, Some((key("a"), "x".into())));
    assert_eq!(
        lab.db.record(&key("b")).expect("read").map(|r| r.meta.description),
        Some("made x".into())
    );
}

#[tokio::test]
async fn a_kill_costs_at_most_what_was_not_flushed() {
    let lab = Lab::new().await;
    lab.save(&["a"], "x").await;
    lab.db.flush().await.expect("flushed");
    lab.save(&["b"], "y").await;
    // What a killed process leaves is the file as it is now.
    let left = lab.dir.path().join("left.db");
    std::fs::copy(lab.dir.path().join("state/cache.db"), &left).expect("copied");
    let db = CacheDb::open(&left, lab.names.clone()).expect("an index");
    assert!(db.record(&key("a")).expect("read").is_some());
}

#[tokio::test]
async fn a_damaged_file_is_moved_aside() {
    let lab = Lab::new().await;
    let path = lab.dir.path().join("damaged.db");
    for bytes in [
        b"not a database".to_vec(),
        vec![0; 100_000],
        Vec::from_iter((0..50_000u32).flat_map(u32::to_le_bytes)),
    ] {
        std::fs::write(&path, &bytes).expect("written");
        let db = CacheDb::open(&path, lab.names.clone()).expect("a new index");
        db.save(&[key("a")], &"x".to_owned(), &RecordMeta::default()).await.expect("saved");
    }
    let kept = std::fs::read_dir(lab.dir.path())
        .expect("listed")
        .filter_map(|e| e.ok()?.file_name().into_string().ok());
    assert!(
        kept.into_iter().any(|n| n.starts_with("damaged.damaged-")),
        "the damaged file is kept for study"
    );
}

#[tokio::test]
async fn two_processes_cannot_share_it() {
    let lab = Lab::new().await;
    let second = CacheDb::open(&lab.dir.path().join("state/cache.db"), lab.names.clone());
    assert!(
        second.is_err_and(|e| e.to_string().contains("another process") && e.hints().count() == 1)
    );
}

#[tokio::test]
async fn the_latest_similar_record_is_found_by_operation_and_then_by_name() {
    let lab = Lab::new().await;
    let meta = |operation: &str, name: &str, content: &str| RecordMeta {
        op_keys: vec![Digest::of(operation)],
        parts: vec![KeyPart { name: "part".into(), fingerprint: u64::MAX - 1 }],
        inputs: vec![(vec![key("input")], None)],
        contents: vec![Some(Digest::of(content))],
        description: name.into(),
        ..RecordMeta::default()
    };
    let save = async |key: &str, value: &str, meta: &RecordMeta| {
        lab.db.save(&keys_of(&[key]), &value.to_owned(), meta).await.expect("saved");
    };
    let found = async |db: &CacheDb<String>, operation: &str, name: &str| {
        let found = db.similar(&meta(operation, name, "")).await.expect("looked up");
        found.map(|meta| (meta.description, meta.contents, meta.parts[0].fingerprint))
    };
    let expected = |name: &str, content| {
        Some((name.to_owned(), vec![Some(Digest::of(content))], u64::MAX - 1))
    };
    assert_eq!(found(&lab.db, "op", "step").await, None);
    save("1", "one", &meta("op", "step", "x")).await;
    save("2", "two", &meta("op", "step", "y")).await;
    save("3", "three", &meta("other op", "step", "z")).await;
    assert_eq!(found(&lab.db, "op", "another name").await, expected("step", "y"));
    assert_eq!(found(&lab.db, "op", "step").await, expected("step", "y"));
    assert_eq!(found(&lab.db, "unknown", "step").await, expected("step", "z"));
    assert_eq!(found(&lab.db, "unknown", "unknown").await, None);
    lab.db.forget_results(vec!["two".into()]).await.expect("forgotten");
    // The latest is gone; that of the same name is there still.
    assert_eq!(found(&lab.db, "op", "step").await, expected("step", "z"));
    let lab = lab.reopen().await;
    assert_eq!(found(&lab.db, "other op", "").await, expected("step", "z"));
    lab.db.clear().await.expect("cleared");
    assert_eq!(found(&lab.db, "other op", "step").await, None);
}
