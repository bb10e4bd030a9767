//! Which states of a build will be exported as layers of an image, known before its vertices run,
//! so that layers are compressed, and shown to exporters, while later ones do.

use crate::op::LlbOp;
use parking_lot::Mutex;
use shipway_oci::Digest;
use shipway_refs::{Compression, ImmutableRef};
use shipway_solver::Vertex;
use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
};
use tokio::sync::watch;

/// What is to become of a state's topmost layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PlannedLayer {
    pub(crate) compression: Compression,
    /// Whether nothing but the export comes after it: then the layer is packed as it is committed.
    /// Others are packed in the background, because the next step waits for the commit.
    pub(crate) last: bool,
}

/// Where the layers below an operation's own come from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct BaseLayers {
    /// The inputs whose layers are layers of the output as well.
    pub(crate) inputs: Vec<usize>,
    /// Whether the operation puts a layer of its own on top.
    pub(crate) adds_layer: bool,
}

/// The layers that a build's exporters will want compressed. Clones share it; with the last of
/// them, at the end of the build, what is still being compressed for it stops.
#[derive(Clone, Default)]
pub struct ExportPlan(Arc<Inner>);

/// Is given each state that is planned, once it is made.
type Watcher = Arc<dyn Fn(&ImmutableRef) + Send + Sync>;

/// What is planned for a state.
struct Planned {
    layer: PlannedLayer,
    watchers: Vec<Watcher>,
}

#[derive(Default)]
struct Inner {
    states: Mutex<HashMap<(Digest, usize), Planned>>,
    /// Whether what steps open is noted.
    notes_opened: AtomicBool,
    /// Closed at the end.
    end: watch::Sender<()>,
}

impl ExportPlan {
    /// Plans the export of output `output` of `vertex` with `compression`. The first plan for a
    /// state holds. `watchers` are given it and the states below it that the build makes; it waits
    /// for them, so they must not block.
    pub fn add(
        &self,
        vertex: &Arc<Vertex<LlbOp>>,
        output: usize,
        compression: Compression,
        watchers: &[Watcher],
    ) {
        let mut states = self.0.states.lock();
        let mut queue = vec![(vertex, output, true)];
        while let Some((vertex, output, last)) = queue.pop() {
            // A state that others are made of as well is seen once.
            let std::collections::hash_map::Entry::Vacant(entry) =
                states.entry((vertex.id.digest, output))
            else {
                continue;
            };
            let layer = PlannedLayer { compression, last };
            entry.insert(Planned { layer, watchers: watchers.to_vec() });
            let BaseLayers { inputs, adds_layer } =
                vertex.op.base_layers(output, vertex.inputs.len());
            let below = inputs.into_iter().filter_map(|i| vertex.inputs.get(i));
            queue.extend(below.map(|(vertex, output)| (vertex, *output, last && !adds_layer)));
        }
    }

    /// Has it noted which files are opened by the steps whose layers are exported.
    pub fn note_opened(&self) {
        self.0.notes_opened.store(true, Relaxed);
    }

    /// Whether it is to be noted which files `vertex` opens.
    pub(crate) fn notes_opened(&self, vertex: Digest) -> bool {
        self.0.notes_opened.load(Relaxed)
            && self.0.states.lock().keys().any(|(exported, _)| *exported == vertex)
    }

    /// What is planned for the layer of output `output` of `vertex`.
    pub(crate) fn layer(&self, vertex: Digest, output: usize) -> Option<PlannedLayer> {
        self.0.states.lock().get(&(vertex, output)).map(|planned| planned.layer)
    }

    /// Shows `states`, the outputs of `vertex`, to those who watch for them.
    pub(crate) fn made(&self, vertex: Digest, states: &[ImmutableRef]) {
        for (output, state) in states.iter().enumerate() {
            let watchers =
                self.0.states.lock().get(&(vertex, output)).map(|planned| planned.watchers.clone());
            watchers.into_iter().flatten().for_each(|watch| watch(state));
        }
    }

    /// Waits for the end of the build.
    pub(crate) fn ended(&self) -> impl Future<Output = ()> + Send + use<> {
        let mut end = self.0.end.subscribe();
        async move { while end.changed().await.is_ok() {} }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_end_of_a_build_is_known() {
        let plan = ExportPlan::default();
        let (ended, other) = (plan.ended(), plan.clone());
        drop(plan);
        tokio::pin!(ended);
        assert!(futures::poll!(&mut ended).is_pending());
        drop(other);
        ended.await;
    }
}
