//! An index of very many records.

#![allow(clippy::unwrap_used)]

use super::*;
use redb::{StorageBackend, backends::FileBackend};
use std::{fs::File, io};

fn name(number: usize) -> CacheKey {
    CacheKey(Digest::of(number.to_string()))
}

/// A record of each of `numbers`, made of the one before, in one transaction.
#[track_caller]
fn fill(inner: &Inner, numbers: std::ops::Range<usize>) {
    inner
        .write(|tx| {
            let mut leads = Leads::open(tx)?;
            let mut records = tx.open_table(super::RECORDS).map_err(fault)?;
            let mut results = tx.open_multimap_table(RESULTS).map_err(fault)?;
            for number in numbers {
                let primary = key(&name(number));
                leads.lead(primary, primary)?;
                leads.lead(key(&CacheKey(Digest::of(format!("also {number}")))), primary)?;
                let meta = RecordMeta {
                    op_keys: vec![Digest::of("op")],
                    inputs: vec![(vec![name(number.saturating_sub(1))], None)],
                    description: "[2/3] RUN make -j and more of what people write there".into(),
                    ..RecordMeta::default()
                };
                let stored = StoredRecord::new(number.to_string(), &meta);
                let bytes = serde_json::to_vec(&stored).unwrap();
                records.insert(primary, bytes.as_slice()).map_err(fault)?;
                results.insert(&*number.to_string(), primary).map_err(fault)?;
            }
            Ok(())
        })
        .unwrap();
}

/// A file, and how many bytes of it were read.
#[derive(Debug)]
struct Counted {
    file: FileBackend,
    read: Arc<AtomicU64>,
}

impl StorageBackend for Counted {
    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.read.fetch_add(out.len() as u64, Ordering::Relaxed);
        self.file.read(offset, out)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.file.set_len(len)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.file.write(offset, data)
    }

    fn close(&self) -> io::Result<()> {
        self.file.close()
    }
}

/// Bytes that a start reads of the file at `path`, and then one look-up of the record `number`.
#[track_caller]
fn bytes_read(path: &Path, number: usize) -> [u64; 2] {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let read = Arc::new(AtomicU64::new(0));
    let backend = Counted { file: FileBackend::new(file).unwrap(), read: read.clone() };
    let opened = Database::builder().set_cache_size(CACHE_BYTES).create_with_backend(backend);
    let Ok(inner) = Inner::of(opened) else { panic!("{} cannot be opened", path.display()) };
    assert!(!inner.is_sweep_due().unwrap());
    let start = read.load(Ordering::Relaxed);
    assert_eq!(inner.result_of(&name(number)).unwrap(), Some(number.to_string()));
    [start, read.load(Ordering::Relaxed) - start]
}

#[test]
fn a_start_reads_as_little_of_many_records_as_of_few() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("cache.redb");
    let mut seen = Vec::new();
    for many in [1000, 20_000] {
        let inner = Inner::open(&path).unwrap();
        fill(&inner, many / 2..many);
        inner.sweep_at.store(u64::MAX, Ordering::Relaxed);
        inner
            .write(|tx| {
                let mut about = tx.open_table(ABOUT).map_err(fault)?;
                about.insert(SWEEP_AT, u64::MAX).map(drop).map_err(fault)
            })
            .unwrap();
        inner.flush().unwrap();
        // As a kill leaves it, and as an orderly end does.
        let killed = dir.path().join("killed.redb");
        std::fs::copy(&path, &killed).unwrap();
        drop(inner);
        for path in [&path, &killed] {
            let size = std::fs::metadata(path).unwrap().len();
            seen.push((size, bytes_read(path, many - 1)));
        }
    }
    println!("{seen:?}");
    let [few @ .., many_after_end, many_after_kill] = &seen[..] else { panic!("{seen:?}") };
    for (many, few) in [many_after_end, many_after_kill].iter().zip(few) {
        assert!(many.0 > 10 * few.0, "{seen:?}");
        for (many, few) in many.1.iter().zip(few.1) {
            assert!(*many <= few + MORE, "{seen:?}");
        }
    }
}

/// What a file that is twenty times as large may cost more, in bytes: pages of its root and of the
/// way to one record, and a bit for each page of it.
const MORE: u64 = 64 << 10;

#[test]
fn a_start_leaves_unused_keys_for_later() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("cache.redb");
    let inner = Inner::open(&path).unwrap();
    fill(&inner, 0..2000);
    let gone: Vec<String> = (0..1000).map(|number| number.to_string()).collect();
    for some in gone.chunks(BATCH) {
        inner.forget_some(some).unwrap();
    }
    drop(inner);
    let inner = Inner::open(&path).unwrap();
    assert!(inner.is_sweep_due().unwrap() && inner.primary(&name(5)).unwrap().is_some());
    inner.sweep_if_due().unwrap();
    assert!(inner.primary(&name(5)).unwrap().is_none());
    assert_eq!(inner.result_of(&name(1999)).unwrap(), Some("1999".into()));
    let of = inner.aliases_of(&HashSet::from([name(1007)])).unwrap();
    assert_eq!(of[&name(1007)], [name(1007), CacheKey(Digest::of("also 1007"))]);
}

#[test]
fn unused_keys_go_a_few_at_a_time_and_what_is_stored_meanwhile_keeps_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let inner = Inner::open(&dir.path().join("cache.redb")).unwrap();
    fill(&inner, 0..4000);
    let gone: Vec<String> = (0..3000).map(|number| number.to_string()).collect();
    for some in gone.chunks(BATCH) {
        inner.forget_some(some).unwrap();
    }
    // As a sweep does, with a build in between.
    *inner.stored.lock() = Some(HashSet::new());
    let unused = inner.unused().unwrap();
    // The record 3000 was made of the result 2999, which the next sweep leaves for that.
    assert_eq!(unused.keys.len(), 2 * 2999);
    let meta = RecordMeta { inputs: vec![(vec![name(5)], None)], ..RecordMeta::default() };
    inner.save(&[name(9)], Some("made again".into()), &meta).unwrap();
    inner.drop_unused(&unused).unwrap();
    *inner.stored.lock() = None;
    let known = |number: usize| inner.primary(&name(number)).unwrap().is_some();
    let all = [4, 5, 6, 9, 2998, 2999, 3000];
    assert_eq!(all.map(known), [false, true, false, true, false, true, true]);
    assert!(inner.aliases_of(&HashSet::from([name(4)])).unwrap().is_empty());
}

#[test]
fn a_sweep_is_due_again_when_there_are_twice_as_many_also_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("cache.redb");
    let inner = Inner::open(&path).unwrap();
    fill(&inner, 0..1000);
    assert!(inner.is_sweep_due().unwrap());
    inner.sweep_if_due().unwrap();
    drop(inner);
    let inner = Inner::open(&path).unwrap();
    assert!(!inner.is_sweep_due().unwrap());
    fill(&inner, 1000..2001);
    assert!(inner.is_sweep_due().unwrap());
}

#[test]
fn an_index_of_an_older_version_knows_the_keys_of_its_records() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("cache.redb");
    let inner = Inner::open(&path).unwrap();
    inner.save(&[name(1), name(2)], Some("it".into()), &RecordMeta::default()).unwrap();
    inner.write(|tx| tx.delete_multimap_table(KEYS).map(drop).map_err(fault)).unwrap();
    drop(inner);
    let inner = Inner::open(&path).unwrap();
    let of = inner.aliases_of(&HashSet::from([name(1)])).unwrap();
    assert_eq!(of[&name(1)], [name(1), name(2)]);
}
