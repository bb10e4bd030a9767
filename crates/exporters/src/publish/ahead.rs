//! Layers get into other namespaces while the build goes on, so that little is left when it ends.
//!
//! What is done here is done under the target's lease and named by nothing: a build that fails
//! leaves nothing, and one that succeeds looks again at all of it. So errors only end this work
//! early, and a snapshotter that does not share its snapshots is not asked twice.

use super::target::Target;
use futures::future::BoxFuture;
use parking_lot::Mutex;
use shipway_fault::Result;
use shipway_oci::{ChainId, Digest};
use shipway_refs::{Compression, Fetch, ImmutableRef};
use shipway_storage::{Labels, SnapshotKey, Storage};
use std::{collections::HashSet, mem, sync::Arc};
use tokio::{sync::mpsc, task::JoinHandle};

/// What one export does ahead in other namespaces.
pub(crate) struct Ahead {
    /// The builder's own stores.
    from: Storage,
    compression: Compression,
    build: String,
    stage: Mutex<Stage>,
}

enum Stage {
    /// No state was committed yet.
    Waiting(Vec<Arc<Target>>),
    /// Snapshots and blobs each have a worker: a layer's blob is there long after its snapshot.
    Working(Vec<Arc<Target>>, [Worker; 2]),
    Finished,
}

/// What was published, by namespace.
type Known<T> = Arc<Mutex<HashSet<(String, T)>>>;

/// A task that is given states; it ends early when this is dropped.
struct Worker {
    states: Option<mpsc::UnboundedSender<ImmutableRef>>,
    task: JoinHandle<()>,
}

impl Worker {
    /// Publishes what `find` finds of each state in each target. A target where that fails, or
    /// where `publish` says by `false` that there is no use in it, is left alone from then on.
    fn start<T, F, P>(
        name: &'static str,
        targets: &[Arc<Target>],
        mut find: F,
        mut publish: P,
    ) -> Self
    where
        T: Clone + Send + Sync + 'static,
        F: FnMut(ImmutableRef) -> BoxFuture<'static, Result<Vec<T>>> + Send + 'static,
        P: FnMut(Arc<Target>, Vec<T>) -> BoxFuture<'static, Result<bool>> + Send + 'static,
    {
        let mut targets = targets.to_vec();
        // As many states as the graph of the build has vertices at most.
        let (states, mut queue) = mpsc::unbounded_channel::<ImmutableRef>();
        let task = shipway_task::spawn(name, async move {
            while let Some(state) = queue.recv().await {
                let found = match find(state).await {
                    Ok(found) => found,
                    Err(error) => {
                        tracing::debug!(%error, "failed to publish ahead, will retry when the image is exported");
                        continue;
                    }
                };
                let each = targets.iter().map(|target| publish(target.clone(), found.clone()));
                let done = futures::future::join_all(each).await;
                for (target, done) in mem::take(&mut targets).into_iter().zip(done) {
                    match done {
                        Ok(true) => targets.push(target),
                        Ok(false) => {}
                        Err(error) => {
                            tracing::debug!(namespace = target.namespace, %error, "failed to publish ahead, will retry when the image is exported");
                        }
                    }
                }
            }
        });
        Self { states: Some(states), task }
    }

    fn give(&self, state: &ImmutableRef) {
        if let Some(states) = &self.states {
            // One that has ended has nothing to do.
            let _ = states.send(state.clone());
        }
    }

    /// Waits until it has done what it was given.
    async fn finish(mut self) {
        self.states = None;
        let _ = (&mut self.task).await;
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Ahead {
    /// Will work for `targets`, with layers compressed as `compression` says. `build` names it.
    pub fn new(
        targets: Vec<Arc<Target>>,
        from: &Storage,
        compression: Compression,
        build: String,
    ) -> Self {
        Self { from: from.clone(), compression, build, stage: Mutex::new(Stage::Waiting(targets)) }
    }

    /// Publishes the layers of `state` in the background, those below its own included.
    pub fn committed(&self, state: &ImmutableRef) {
        let mut stage = self.stage.lock();
        if let Stage::Waiting(targets) = &mut *stage {
            let targets = mem::take(targets);
            let workers = [self.snapshots(&targets), self.blobs(&targets)];
            *stage = Stage::Working(targets, workers);
        }
        if let Stage::Working(_, workers) = &*stage {
            workers.iter().for_each(|worker| worker.give(state));
        }
    }

    /// Waits for the end of what was begun, and gives the targets back. There are none if it was
    /// called before.
    pub async fn finish(&self) -> Vec<Arc<Target>> {
        let stage = mem::replace(&mut *self.stage.lock(), Stage::Finished);
        match stage {
            Stage::Waiting(targets) => targets,
            Stage::Working(targets, workers) => {
                futures::future::join_all(workers.map(Worker::finish)).await;
                targets
            }
            Stage::Finished => Vec::new(),
        }
    }

    fn snapshots(&self, targets: &[Arc<Target>]) -> Worker {
        let (from, build) = (self.from.clone(), self.build.clone());
        let find = move |state: ImmutableRef| -> BoxFuture<'static, Result<Vec<ChainId>>> {
            let from = from.clone();
            Box::pin(async move {
                let layers = state.known_layers().filter(|_| state.is_exact()).unwrap_or_default();
                let chains: Vec<ChainId> = layers.iter().map(|layer| layer.chain_id).collect();
                // What nobody has needed yet is not there to be shared.
                let top = chains.last().map(|top| SnapshotKey::from(*top));
                match top {
                    Some(top) if from.snapshots.stat(&top).await.is_ok() => Ok(chains),
                    _ => Ok(Vec::new()),
                }
            })
        };
        let bound: Known<ChainId> = Arc::default();
        let publish =
            move |target: Arc<Target>, chains: Vec<ChainId>| -> BoxFuture<'static, Result<bool>> {
                let (bound, build) = (bound.clone(), build.clone());
                Box::pin(async move {
                    let mut below = None;
                    for chain in chains {
                        let one = (target.namespace.clone(), chain);
                        if !bound.lock().contains(&one) {
                            let key = SnapshotKey(format!("shipway-ahead-{build}-{chain}"));
                            if target.bind(&key, chain, below, Labels::new()).await?.is_some() {
                                target.to.snapshots.remove(&key).await?;
                                return Ok(false);
                            }
                            bound.lock().insert(one);
                        }
                        below = Some(chain);
                    }
                    Ok(true)
                })
            };
        Worker::start("publish snapshots ahead", targets, find, publish)
    }

    fn blobs(&self, targets: &[Arc<Target>]) -> Worker {
        let compression = self.compression;
        let find = move |state: ImmutableRef| -> BoxFuture<'static, Result<Vec<Digest>>> {
            Box::pin(async move {
                // A client's directory is no layer before it is exported.
                if state.known_layers().is_none() {
                    return Ok(Vec::new());
                }
                let blobs = state.blobs(compression, Fetch::Nothing, None).await?;
                let stored = blobs.iter().filter(|blob| blob.lazy.is_none());
                Ok(stored.map(|blob| blob.descriptor.digest).collect())
            })
        };
        let shared: Known<Digest> = Arc::default();
        let publish =
            move |target: Arc<Target>, blobs: Vec<Digest>| -> BoxFuture<'static, Result<bool>> {
                let shared = shared.clone();
                Box::pin(async move {
                    for blob in blobs {
                        let one = (target.namespace.clone(), blob);
                        if !shared.lock().contains(&one) {
                            target.child(blob).await?;
                            shared.lock().insert(one);
                        }
                    }
                    Ok(true)
                })
            };
        Worker::start("publish blobs ahead", targets, find, publish)
    }
}
