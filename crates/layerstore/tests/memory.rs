//! Memory of layers that are open.

#![allow(clippy::unwrap_used, unsafe_code)]

mod common;

use common::{
    model::{Attrs, Op, Thing},
    *,
};
use shipway_estargz::Output;
use shipway_layerstore::{LayerKey, LayerStore};
use shipway_oci::Digest;
use std::{
    alloc::{GlobalAlloc, Layout, System},
    sync::atomic::{AtomicUsize, Ordering},
};

struct Counting;

static NOW: AtomicUsize = AtomicUsize::new(0);
static MOST: AtomicUsize = AtomicUsize::new(0);

// SAFETY: everything is the system allocator's; only sizes are added up.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let now = NOW.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        MOST.fetch_max(now, Ordering::Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn empty_files(count: usize) -> Blob {
    let file = |n: usize| Op {
        path: format!("{n}").into(),
        attrs: Attrs { mode: 0o644, ..Attrs::default() },
        thing: Thing::File(n.to_le_bytes().as_slice().into()),
    };
    let ops: Vec<Op> = (0..count).map(file).collect();
    let shape = Shape {
        output: Output::Estargz,
        chunk_size: 4096,
        min_chunk_size: 64 << 10,
        landmark: false,
    };
    blob_of(&ops, shape)
}

#[test]
fn a_hundred_layers_of_ten_thousand_entries_take_little() {
    const LAYERS: usize = 100;
    const ENTRIES: usize = 10_000;
    let directory = directory();
    let blob = empty_files(ENTRIES);
    let store = LayerStore::open(directory.path(), options("boot")).unwrap();
    for n in 0..LAYERS {
        let key = LayerKey { blob: Digest::of(n.to_le_bytes()), ..blob.key };
        store.create(key, &blob.about, &blob.toc).unwrap();
    }
    drop(store);
    let before = NOW.load(Ordering::Relaxed);
    MOST.store(before, Ordering::Relaxed);
    let store = LayerStore::open(directory.path(), options("boot")).unwrap();
    for layer in store.layers() {
        assert!(
            layer.restore(&map_of(layer.data_blocks(), std::slice::from_ref(&blob.all()))).unwrap()
        );
        assert_eq!(layer.missing(blob.all()).unwrap().count(), 0);
        drop(layer.verify_blocks(0..layer.data_blocks()).unwrap());
        layer.meta().unwrap();
    }
    let most = MOST.load(Ordering::Relaxed) - before;
    let now = NOW.load(Ordering::Relaxed) - before;
    println!("{now} bytes for {LAYERS} layers of {ENTRIES} entries, at most {most}");
    assert!(most < 5 << 20, "{most}");
}
