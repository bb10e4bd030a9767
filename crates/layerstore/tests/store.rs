//! Layers as a whole: made, found, removed, damaged.

#![allow(clippy::unwrap_used)]

mod common;

use common::{
    model::{Attrs, Dice, Op, Thing},
    *,
};
use shipway_erofs::{BuildError, Reader};
use shipway_estargz::Output;
use shipway_layerstore::{
    Error, LayerKey, LayerNumber, LayerStore, MAX_ABOUT, MAX_REPOSITORIES, MAX_REPOSITORY, Options,
    Refused, State,
};
use shipway_oci::Digest;
use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::FileExt as _,
    path::Path,
    sync::{Arc, Barrier},
};

fn op(path: &str, thing: Thing) -> Op {
    Op { path: path.into(), attrs: Attrs { mode: 0o755, ..Attrs::default() }, thing }
}

fn file(path: &str, text: &str) -> Op {
    op(path, Thing::File(text.as_bytes().into()))
}

fn plain(ops: &[Op]) -> Blob {
    let shape =
        Shape { output: Output::Estargz, chunk_size: 4096, min_chunk_size: 0, landmark: false };
    blob_of(ops, shape)
}

#[test]
fn layers_are_found_again() {
    let directory = directory();
    let (a, b) = (random_blob(1, 30), random_blob(2, 30));
    // As in life, with syncs and the kernel's name of this boot.
    let store = LayerStore::open(directory.path(), Options::default()).unwrap();
    assert!(store.find(&a.key).is_none() && store.layers().is_empty());
    let (first, second) = (a.create(&store), b.create(&store));
    assert_eq!((first.number(), second.number()), (LayerNumber(1), LayerNumber(2)));
    assert!(Arc::ptr_eq(&first, &store.find(&a.key).unwrap()));
    assert!(Arc::ptr_eq(&second, &store.get(LayerNumber(2)).unwrap()));
    // The same blob by another table of contents is another layer.
    let key = LayerKey { toc: Digest::of("another"), ..a.key };
    let third = store.create(key, &a.about, &a.toc).unwrap();
    assert_eq!(third.number(), LayerNumber(3));
    let uuid = |layer: &shipway_layerstore::Layer| {
        let meta = fs::read(layer.meta_path()).unwrap();
        assert_eq!(meta.len() as u64, layer.meta_bytes());
        let reader = Reader::open(&meta).unwrap();
        assert_eq!(u64::from(reader.data_blocks()), layer.data_blocks());
        reader.uuid()
    };
    let uuids: BTreeSet<_> = [&first, &second, &third].map(|layer| uuid(layer)).into();
    assert_eq!(uuids.len(), 3);
    assert_eq!(uuid(&first), a.key.uuid());
    // Another repository is remembered, over a restart as well.
    let elsewhere = shipway_layerstore::Description {
        repository: "elsewhere.test/other".to_owned(),
        ..a.about.clone()
    };
    assert!(Arc::ptr_eq(&first, &store.create(a.key, &elsewhere, &a.toc).unwrap()));
    drop((first, second, third, store));
    let store = LayerStore::open(directory.path(), Options::default()).unwrap();
    assert!(!store.is_first_of_boot() && store.damaged().is_empty());
    assert_eq!(store.layers().len(), 3);
    let layer = store.find(&a.key).unwrap();
    assert_eq!(layer.repositories(), ["registry.test/name", "elsewhere.test/other"]);
    assert_eq!(
        (layer.blob_size(), layer.codec(), layer.state()),
        (a.about.blob_size, a.about.codec, State::Lazy)
    );
    assert_eq!(layer.frames() as usize, a.toc.frames().count());
    a.fetch(&layer, a.all()).unwrap();
    assert_eq!(a.check_good(&layer), sorted(vec![a.all()]));
}

#[test]
fn an_empty_layer_is_one_too() {
    let directory = directory();
    let store = LayerStore::open(directory.path(), options("boot")).unwrap();
    let blob = plain(&[]);
    let layer = blob.create(&store);
    assert_eq!((layer.data_blocks(), layer.chunks()), (0, 0));
    assert_eq!(layer.extents(0..0).unwrap().count(), 0);
    assert!(layer.good().unwrap().is_empty());
    assert_eq!(layer.blocks_before(5).unwrap(), 0..0);
    layer.finish(&blob.toc, &blob.bytes[..], &mut drop).unwrap();
    assert_eq!(layer.state(), State::Whole);
    assert!(layer.restore(&[]).unwrap());
}

#[test]
fn who_makes_the_same_layer_gets_it() {
    let directory = directory();
    let store = LayerStore::open(directory.path(), options("boot")).unwrap();
    let blob = random_blob(3, 200);
    let barrier = Barrier::new(8);
    let numbers: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..8)
            .map(|_| {
                scope.spawn(|| {
                    barrier.wait();
                    blob.create(&store).number()
                })
            })
            .collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    assert_eq!(numbers, [LayerNumber(1); 8]);
    assert_eq!(store.layers().len(), 1);
}

#[test]
fn layers_that_cannot_be_lazy_are_refused() {
    let directory = directory();
    let store = LayerStore::open(directory.path(), options("boot")).unwrap();
    let refused = |ops: &[Op]| {
        let blob = plain(ops);
        match store.create(blob.key, &blob.about, &blob.toc) {
            Err(Error::Refused(why)) => why,
            other => panic!("{other:?}"),
        }
    };
    // Its attributes would be those of the directory below.
    let implicit = |path: &str| Refused::ImplicitDirectory { path: path.to_owned() };
    assert_eq!(refused(&[file("a/b/c", "x")]), implicit("a"));
    assert_eq!(refused(&[op("d/", Thing::Directory), file("d/b\n/c", "x")]), implicit("d/b\\n"));
    // A whiteout that is a directory with something in it.
    assert_eq!(refused(&[op(".wh.d/", Thing::Directory), file(".wh.d/c", "x")]), implicit(".wh.d"));
    // What unpacking would fail at.
    let entry = |path: &str, error| Refused::Entry { path: path.to_owned(), error };
    assert_eq!(refused(&[file(".wh.", "")]), entry(".wh.", BuildError::Whiteout));
    let hidden = [file(".wh.x", ""), op("y", Thing::HardLink(b".wh.x".to_vec()))];
    assert_eq!(refused(&hidden), entry("y", BuildError::HardLink));
    let mut deceit = op("d/", Thing::Directory);
    deceit.attrs.xattrs.insert(b"trusted.overlay.opaque".to_vec(), b"y".to_vec());
    assert_eq!(refused(&[deceit]), entry("d", BuildError::XattrName));
    let blob = plain(&[file("a", "x")]);
    let mut about = blob.about.clone();
    about.repository = "r".repeat(MAX_REPOSITORY + 1);
    let long = store.create(blob.key, &about, &blob.toc);
    assert!(matches!(long, Err(Error::Refused(Refused::RepositoryName))));
    // Nothing of them stays.
    assert!(store.layers().is_empty());
    let left: Vec<_> = fs::read_dir(directory.path().join("layers"))
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .filter(|name| name != "boot" && name != "trash")
        .collect();
    assert_eq!(left, [""; 0]);
}

#[test]
fn repositories_are_bounded() {
    let directory = directory();
    let store = LayerStore::open(directory.path(), options("boot")).unwrap();
    let layer = plain(&[file("a", "x")]).create(&store);
    let long = |n: usize| format!("{n:0>MAX_REPOSITORY$}");
    (0..2 * MAX_REPOSITORIES).for_each(|n| layer.add_repository(&long(n)).unwrap());
    assert!(layer.add_repository(&(long(0) + "x")).is_err());
    let want: Vec<_> = (MAX_REPOSITORIES..2 * MAX_REPOSITORIES).map(long).collect();
    assert_eq!(layer.repositories(), want);
    let about = directory.path().join("layers/1/about");
    assert!(fs::metadata(&about).unwrap().len() < MAX_ABOUT);
    drop((layer, store));
    let store = LayerStore::open(directory.path(), options("boot")).unwrap();
    assert_eq!(store.layers()[0].repositories(), want);
    drop(store);
    // A longer file is none of ours.
    let mut text = fs::read(&about).unwrap();
    text.resize(MAX_ABOUT as usize + 1, b'\n');
    fs::write(&about, text).unwrap();
    let store = LayerStore::open(directory.path(), options("boot")).unwrap();
    assert!(matches!(store.damaged()[0].error, Error::Damaged { file: "about", .. }));
}

#[test]
fn one_process_at_a_time() {
    let directory = directory();
    let store = LayerStore::open(directory.path(), options("boot")).unwrap();
    let second = LayerStore::open(directory.path(), options("boot"));
    assert!(matches!(second, Err(Error::Locked(_))));
    drop(store);
    assert!(LayerStore::open(directory.path(), options("boot")).is_ok());
}

/// Numbers name maps and files of others, which outlive the process and not the boot.
#[test]
fn numbers_are_not_used_twice_in_a_boot() {
    let directory = directory();
    let blob = random_blob(4, 10);
    for (boot, number) in [("a", 1), ("a", 2), ("a", 3), ("b", 1), ("b", 2)] {
        let store = LayerStore::open(directory.path(), options(boot)).unwrap();
        assert_eq!(store.is_first_of_boot(), number == 1);
        let layer = blob.create(&store);
        assert_eq!(layer.number(), LayerNumber(number));
        blob.fetch(&layer, 0..blob.all().end / 2).unwrap();
        store.remove(layer.number()).unwrap();
        assert!(store.find(&blob.key).is_none() && store.get(layer.number()).is_none());
        assert!(matches!(store.remove(layer.number()), Err(Error::NoLayer(_))));
        // Who has it open goes on.
        blob.fetch(&layer, blob.all()).unwrap();
        assert_eq!(blob.check_good(&layer), sorted(vec![blob.all()]));
    }
    let trash = directory.path().join("layers/trash");
    assert_eq!(fs::read_dir(&trash).unwrap().count(), 5);
    let store = LayerStore::open(directory.path(), options("b")).unwrap();
    store.empty_trash().unwrap();
    assert_eq!(fs::read_dir(&trash).unwrap().count(), 0);
    // A file that says nothing is of another boot, and layers that are there keep their numbers.
    let layer = blob.create(&store);
    assert_eq!(layer.number(), LayerNumber(3));
    drop((layer, store));
    for text in ["", "b", "b\n", "b\n7", "b\n00000000xx\n", "\u{0}\n"] {
        fs::write(directory.path().join("layers/boot"), text).unwrap();
        let store = LayerStore::open(directory.path(), options("b")).unwrap();
        assert!(store.is_first_of_boot(), "{text:?}");
        let again = plain(&[file("a", text)]).create(&store);
        assert_eq!(again.number(), LayerNumber(4), "{text:?}");
        store.remove(again.number()).unwrap();
    }
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let to = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &to);
        } else {
            fs::copy(entry.path(), to).unwrap();
        }
    }
}

/// Making a layer is steps, and what is there after each of them is either nothing or all.
#[test]
fn half_made_layers_are_thrown_away() {
    let directory = directory();
    let blob = random_blob(5, 30);
    let store = LayerStore::open(directory.path(), options("boot")).unwrap();
    let other = random_blob(6, 30);
    other.create(&store);
    blob.create(&store);
    drop(store);
    let layers = directory.path().join("layers");
    let files = ["meta", "index", "claims", "data", "about"];
    for some in 0..=files.len() {
        let new = layers.join("new.7");
        fs::create_dir(&new).unwrap();
        for file in &files[..some] {
            fs::copy(layers.join("2").join(file), new.join(file)).unwrap();
        }
        fs::write(layers.join("1/about.new"), "half").unwrap();
        let store = LayerStore::open(directory.path(), options("boot")).unwrap();
        assert!(store.damaged().is_empty());
        assert_eq!(store.layers().len(), 2);
        assert!(!new.exists());
        store.find(&other.key).unwrap().add_repository(&format!("{some}")).unwrap();
        store.empty_trash().unwrap();
    }
    // After a power cut files may be short or not there.
    for file in files {
        for cut in [true, false] {
            let path = layers.join("2").join(file);
            if cut {
                fs::File::options().write(true).open(&path).unwrap().set_len(1).unwrap();
            } else {
                fs::remove_file(&path).unwrap();
            }
            let store = LayerStore::open(directory.path(), options("boot")).unwrap();
            assert_eq!(store.damaged().len(), 1, "{file}");
            assert_eq!(store.damaged()[0].layer, LayerNumber(2));
            assert!(store.find(&blob.key).is_none());
            store.empty_trash().unwrap();
            // Made again, in its old place for the next round.
            let number = blob.create(&store).number().to_string();
            drop(store);
            fs::rename(layers.join(&number), layers.join("2")).unwrap();
            let about = fs::read_to_string(layers.join("2/about")).unwrap();
            let text = about.lines().next().unwrap();
            let text = text.replace(&format!("\"number\":{number}"), "\"number\":2");
            let sum = Digest::of(&text);
            fs::write(layers.join("2/about"), format!("{text}\n{sum}\n")).unwrap();
        }
    }
    let store = LayerStore::open(directory.path(), options("boot")).unwrap();
    assert!(store.damaged().is_empty());
}

/// What another version wrote is made again.
#[test]
fn layers_of_another_version_are_made_again() {
    let directory = directory();
    let blob = random_blob(7, 10);
    drop(blob.create(&LayerStore::open(directory.path(), options("boot")).unwrap()));
    let path = directory.path().join("layers/1/about");
    let about = fs::read_to_string(&path).unwrap();
    let text = about.lines().next().unwrap();
    let newer = text.replace("\"version\":1", "\"version\":2");
    assert_ne!(newer, text);
    fs::write(&path, format!("{newer}\n{}\n", Digest::of(&newer))).unwrap();
    let store = LayerStore::open(directory.path(), options("boot")).unwrap();
    let [damage] = store.damaged() else { panic!("{:?}", store.damaged()) };
    assert!(damage.error.to_string().contains("version"), "{}", damage.error);
    assert_eq!(blob.create(&store).number(), LayerNumber(2));
}

/// Whatever byte of whatever file is another: it is found, or it makes no difference to what is
/// served.
#[test]
fn damage_is_found() {
    let home = directory();
    let blob = random_blob(8, 80);
    let store = LayerStore::open(home.path(), options("boot")).unwrap();
    let layer = blob.create(&store);
    blob.fetch(&layer, 0..blob.all().end / 2).unwrap();
    layer.add_repository("another.test/name").unwrap();
    drop((layer, store));
    let mut found = [0; 4];
    for seed in 1..=400 {
        let mut dice = Dice::new(seed * 31);
        let work = directory();
        copy(home.path(), work.path());
        let which = dice.below(4);
        let name = ["about", "meta", "index", "claims"][which];
        let path = work.path().join("layers/1").join(name);
        let mut bytes = fs::read(&path).unwrap();
        for _ in 0..1 + dice.below(3) {
            let at = dice.below(bytes.len());
            bytes[at] = bytes[at].wrapping_add(1 + dice.below(255) as u8);
        }
        fs::write(&path, &bytes).unwrap();
        let store = LayerStore::open(work.path(), options("boot 2")).unwrap();
        if let Some(damage) = store.damaged().first() {
            assert!(matches!(&damage.error, Error::Damaged { file, .. } if *file == name));
            assert!(store.layers().is_empty());
            found[which] += 1;
            continue;
        }
        let layer = store.find(&blob.key).unwrap();
        if let Err(error) = layer.meta() {
            assert!(matches!(error, Error::Damaged { file: "meta", .. }));
            found[which] += 1;
            continue;
        }
        match blob.fetch(&layer, blob.all()) {
            Ok(_) => assert_eq!(blob.check_good(&layer), sorted(vec![blob.all()]), "{name}"),
            Err(Error::Damaged { file: "index", .. }) => found[which] += 1,
            Err(error) => panic!("{name}: {error}"),
        }
    }
    let [about, meta, index, claims] = found;
    // All of them, but for claims, which are only hints.
    assert!(about + meta + index > 200 && claims == 0, "{found:?}");
}

/// A page of an index is one of that layer, at that place.
#[test]
fn pages_of_an_index_are_not_exchanged() {
    let home = directory();
    let ops: Vec<Op> = (0..200).map(|n| file(&n.to_string(), &format!("{n}"))).collect();
    let blob = plain(&ops);
    let mut other: Vec<Op> = ops.clone();
    other[0] = file("0", "another");
    let other = plain(&other);
    let store = LayerStore::open(home.path(), options("boot")).unwrap();
    blob.create(&store);
    other.create(&store);
    drop(store);
    let index = |n: u32| home.path().join(format!("layers/{n}/index"));
    let right = fs::read(index(1)).unwrap();
    let swapped = [&right[4096..8192], &right[..4096], &right[8192..]].concat();
    for wrong in [swapped, fs::read(index(2)).unwrap()] {
        assert_eq!(wrong.len(), right.len());
        fs::write(index(1), wrong).unwrap();
        let store = LayerStore::open(home.path(), options("boot")).unwrap();
        let layer = store.find(&blob.key).unwrap();
        let read = layer.chunks_touching(blob.all());
        assert!(matches!(read, Err(Error::Damaged { file: "index", .. })));
    }
    fs::write(index(1), right).unwrap();
    let store = LayerStore::open(home.path(), options("boot")).unwrap();
    assert_eq!(store.find(&blob.key).unwrap().chunks_touching(blob.all()).unwrap().count(), 200);
}

/// The image that a mount will read was checked, and who opened it sees what was checked.
#[test]
fn the_image_is_read_from_its_beginning() {
    let home = directory();
    let blob = random_blob(9, 30);
    let store = LayerStore::open(home.path(), options("boot")).unwrap();
    let layer = blob.create(&store);
    for _ in 0..2 {
        let file = layer.meta().unwrap();
        let mut bytes = vec![0; layer.meta_bytes() as usize];
        std::io::Read::read_exact(&mut &file, &mut bytes).unwrap();
        assert_eq!(Reader::open(&bytes).unwrap().uuid(), blob.key.uuid());
        assert_eq!(file.read_at(&mut [0], layer.meta_bytes()).unwrap(), 0);
    }
}
