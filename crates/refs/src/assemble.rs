//! States put together of layers that are known: only the list of layers is made here.

use crate::{
    id::{RefId, id_of},
    layer::{BlobPlace, KnownBlob, LazyLayer, StackedLayer},
    layered::LayeredRef,
    life::RecordStage,
    record::{RecordBody, RecordMeta, RecordType},
    records::{Record, Records},
};
use std::{sync::Arc, time::SystemTime};

/// The state of an image's layers, lowest first; nothing is fetched. The same layers give the same
/// id.
pub(crate) fn image(
    records: &Arc<Records>,
    layers: Vec<LazyLayer>,
    description: String,
    record_type: RecordType,
) -> LayeredRef {
    if layers.is_empty() {
        return LayeredRef::scratch(records);
    }
    let mut seed = String::from("image");
    let mut stack: Vec<Arc<StackedLayer>> = Vec::with_capacity(layers.len());
    for layer in layers {
        seed += &format!(" {} {}", layer.diff_id, layer.descriptor.digest);
        let stacked = records.stacked_layer(layer.diff_id, stack.last());
        let place = layer.source.map_or(BlobPlace::Stored(None), BlobPlace::Remote);
        stacked.know(KnownBlob { descriptor: layer.descriptor, place });
        if let Some(created) = layer.created {
            stacked.set_created(created);
        }
        stack.push(stacked);
    }
    let meta = RecordMeta {
        record_type,
        description,
        created: SystemTime::now(),
        parents: Vec::new(),
        body: RecordBody::Layers(Vec::new()),
    };
    LayeredRef::insert(records, Record::new(id_of(seed), meta, stack, RecordStage::Lazy))
}

/// The state of `layers`, which `how` and their snapshots identify.
pub(crate) fn assembled(
    records: &Arc<Records>,
    how: &str,
    layers: Vec<Arc<StackedLayer>>,
    parents: Vec<RefId>,
    description: String,
) -> LayeredRef {
    let seed = layers.iter().fold(how.to_owned(), |s, c| s + " " + &c.snapshot.0);
    let meta = RecordMeta {
        record_type: RecordType::Regular,
        description,
        created: SystemTime::now(),
        parents,
        body: RecordBody::Layers(Vec::new()),
    };
    LayeredRef::insert(records, Record::new(id_of(seed), meta, layers, RecordStage::Lazy))
}
