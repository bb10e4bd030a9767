//! Data of layers: what is fetched, stored, believed, and what is not.

#![allow(clippy::unwrap_used)]

mod common;

use common::*;
use shipway_layerstore::LayerStore;

#[test]
fn what_is_fetched_is_good() {
    for seed in 1..=30 {
        let blob = random_blob(seed, 60);
        let directory = directory();
        let store = LayerStore::open(directory.path(), options("boot")).unwrap();
        let layer = blob.create(&store);
        assert_eq!(layer.data_blocks(), blob.all().end);
        assert_eq!(layer.chunks() as usize, blob.records.len());
        assert!(layer.good().unwrap().is_empty());
        let good = blob.fetch(&layer, blob.all()).unwrap();
        assert_eq!(sorted(good), sorted(vec![blob.all()]));
        assert_eq!(blob.check_good(&layer), sorted(vec![blob.all()]));
        assert_eq!(layer.extents(blob.all()).unwrap().count(), 0);
    }
}
