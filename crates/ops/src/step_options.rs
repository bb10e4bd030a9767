//! What a build wants of vertices that is not part of what they are: another build that shares them
//! may want something else.

use crate::exec::mounts::cache_id;
use parking_lot::{Mutex, MutexGuard};
use shipway_llb::{Graph, LinuxResources, MountKind, Op};
use shipway_oci::Digest;
use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

/// What one build wants of its steps, gathered from all its definitions. Clones share them.
#[derive(Clone, Default)]
pub struct StepOptions(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    /// Limits of steps.
    limits: HashMap<Digest, LinuxResources>,
    /// Cache mounts that begin empty in this build: their ids, and whether they have something to
    /// begin with.
    empty: HashSet<(String, bool)>,
    /// Keys of those that were emptied already.
    emptied: HashSet<String>,
}

impl StepOptions {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock()
    }

    /// Notes what the build wants with one of its definitions.
    pub fn note(&self, graph: &Graph) {
        let mut state = self.lock();
        for vertex in &graph.vertices {
            if let Some(limits) = &vertex.metadata.resources {
                state.limits.insert(vertex.digest, limits.clone());
            }
            let Op::Exec(exec) = &vertex.op else { continue };
            // A build without cache starts with empty cache mounts (row `exec.mnt.cache.reset`).
            for mount in exec.mounts.iter().filter(|_| vertex.metadata.ignore_cache) {
                if let MountKind::Cache(cache) = &mount.kind {
                    state.empty.insert((cache_id(mount, cache).to_owned(), mount.input.is_some()));
                }
            }
        }
    }

    /// The limits of the step `vertex`.
    pub(crate) fn limits(&self, vertex: Digest) -> Option<LinuxResources> {
        self.lock().limits.get(&vertex).cloned()
    }

    /// Whether the cache mount `id` begins empty in this build.
    pub(crate) fn begins_empty(&self, id: &str, nested: bool) -> bool {
        self.lock().empty.contains(&(id.to_owned(), nested))
    }

    /// Calls `empty` if the cache mount `id`, whose key is `key`, begins empty in this build and
    /// was not emptied yet. What one step of the build leaves in it is there for the next one.
    pub(crate) fn empty_once(&self, id: &str, nested: bool, key: &str, empty: impl FnOnce()) {
        let mut state = self.lock();
        // Done under the lock: a step that runs beside this one must not get what is thrown away.
        if state.empty.contains(&(id.to_owned(), nested)) && state.emptied.insert(key.to_owned()) {
            empty();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use shipway_llb::{CacheMount, Edge, ExecOp, Mount, OpMetadata, Vertex};

    fn vertex(name: &str, id: &str, ignore_cache: bool, memory: i64) -> Arc<Vertex> {
        let cache = MountKind::Cache(CacheMount { id: id.into(), ..Default::default() });
        let mounts = vec![Mount { dest: "/c".into(), kind: cache, ..Default::default() }];
        let resources = (memory != 0).then(|| LinuxResources { memory, ..Default::default() });
        Arc::new(Vertex {
            digest: Digest::of(name),
            bytes: Default::default(),
            op: Op::Exec(ExecOp { mounts, ..Default::default() }),
            inputs: Vec::new(),
            platform: "linux/amd64".parse().expect("a platform"),
            constraints: Vec::new(),
            name: name.into(),
            metadata: OpMetadata { ignore_cache, resources, ..Default::default() },
        })
    }

    #[test]
    fn a_cache_mount_is_emptied_once_and_limits_are_found() {
        let options = StepOptions::default();
        let graph =
            |vertices| Graph { vertices, result: Edge { vertex: 0, output: 0 }, source: None };
        options.note(&graph(vec![
            vertex("a", "x", true, 0),
            vertex("b", "", true, 5),
            vertex("c", "y", false, 7),
        ]));
        let empties = |id: &str, nested: bool| {
            let mut done = false;
            options.empty_once(id, nested, &format!("key-{id}"), || done = true);
            done
        };
        assert!(options.begins_empty("x", false) && !options.begins_empty("y", false));
        assert!(empties("x", false) && !empties("x", false));
        // Another definition of the same build, such as that of another platform.
        options.note(&graph(vec![vertex("d", "x", true, 0)]));
        assert!(!empties("x", false));
        assert!(empties("/c", false) && !empties("y", false) && !empties("/c", true));
        let memory = |name: &str| options.limits(Digest::of(name)).map(|l| l.memory);
        assert_eq!((memory("a"), memory("b"), memory("c")), (None, Some(5), Some(7)));
    }
}
