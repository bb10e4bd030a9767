//! A lazy state of a build, as frontends and exporters hold it.

use super::{call_log::CallLog, lazy::LazyState, reads, scope::BuildScope};
use bytes::Bytes;
use futures::{FutureExt as _, future::BoxFuture};
use parking_lot::Mutex;
use shipway_fault::{Context as _, Detail, Fault, Result};
use shipway_frontend::{BuildRef, FileStat};
use shipway_llb::Definition;
use shipway_ops::FailedStates;
use shipway_refs::ImmutableRef;
use std::{
    collections::HashMap,
    path::Path,
    sync::{Arc, Weak},
};

/// A state that is solved when it is first needed.
pub struct EngineRef {
    pub(crate) lazy: Arc<LazyState>,
    /// The log of the frontend that asked for it.
    pub(crate) log: Weak<CallLog>,
    scope: Arc<BuildScope>,
    states: Arc<States>,
    /// Held while it is solved.
    solving: tokio::sync::Mutex<()>,
}

/// How often a result is made again that turns out to be lost: as often as it may have layers, for
/// they may be found missing one by one.
pub(crate) const MAX_TRIES: usize = 128;

/// A state that an operation left when it failed (row `err.solve`).
struct FailedRef {
    id: String,
    states: Arc<States>,
}

/// The states of one build by their ids: lazy ones while somebody holds them, and what failed
/// operations left.
pub(crate) struct States {
    lazy: Mutex<HashMap<String, Weak<EngineRef>>>,
    failed: FailedStates,
}

impl States {
    /// None but those that operations leave in `failed`.
    pub(crate) fn new(failed: FailedStates) -> Arc<Self> {
        Arc::new(Self { lazy: Mutex::default(), failed })
    }

    /// The lazy state that `state` is a reference to; none for what a failed operation left.
    pub(crate) fn find(&self, state: &dyn BuildRef) -> Option<Arc<EngineRef>> {
        self.lazy.lock().get(state.id()).and_then(Weak::upgrade)
    }

    /// The state behind a reference, solved.
    pub(crate) async fn state_of(&self, state: &dyn BuildRef) -> Result<ImmutableRef> {
        match self.find(state) {
            Some(state) => state.state().await,
            None => self.failed.state(state.id()).await,
        }
    }

    /// Does `work` with the state, and again with another one if the first turns out to be lost:
    /// the cache had promised it, and its bytes are gone.
    pub(crate) async fn with<T>(
        &self,
        state: &dyn BuildRef,
        work: impl AsyncFn(ImmutableRef) -> Result<T>,
    ) -> Result<T> {
        let mut tries = 0;
        loop {
            tries += 1;
            match work(self.state_of(state).await?).await {
                Err(fault) if tries < MAX_TRIES && self.made_again(state, &fault).await => {}
                done => return done,
            }
        }
    }

    /// Whether `fault` says that the state is lost, and it is made again when it is next asked for.
    pub(crate) async fn made_again(&self, state: &dyn BuildRef, fault: &Fault) -> bool {
        match self.find(state) {
            Some(state) => state.made_again(fault).await,
            None => false,
        }
    }

    /// The states that failed operations left, as far as `fault` names them.
    pub(crate) fn failed(self: &Arc<Self>, fault: &Fault) -> Vec<Arc<dyn BuildRef>> {
        let ids = self.failed.named_by(fault).into_iter();
        ids.map(|id| Arc::new(FailedRef { id, states: self.clone() }) as Arc<dyn BuildRef>)
            .collect()
    }

    async fn read<T: Send + 'static>(
        &self,
        state: &dyn BuildRef,
        f: impl FnOnce(&Path) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let mount = self
            .with(state, async |state| state.mount().await)
            .await
            .context(|| "read from a build's result")?;
        shipway_task::blocking("read from a build's result", move || f(mount.path())).await
    }
}

impl EngineRef {
    /// A handle on `lazy`, which is found among `states` as long as it is held.
    pub(crate) fn new(
        lazy: Arc<LazyState>,
        log: &Arc<CallLog>,
        scope: Arc<BuildScope>,
        states: Arc<States>,
    ) -> Arc<Self> {
        let (log, solving) = (Arc::downgrade(log), Default::default());
        let state = Arc::new(Self { lazy, log, scope, states, solving });
        state.states.lazy.lock().insert(state.lazy.id.clone(), Arc::downgrade(&state));
        state
    }

    async fn made_again(&self, fault: &Fault) -> bool {
        let LazyState { vertex, output, .. } = &*self.lazy;
        let Some(lost) = self.lazy.lost(fault) else { return false };
        if !self.scope.job.lost(vertex.clone(), *output, fault.clone()).await {
            return false;
        }
        // Another caller may have been here meanwhile.
        self.lazy.forget(&lost);
        true
    }

    /// The state, solved now if it was not before. Errors carry the lines of the source that the
    /// failing vertex came from (row `err.source`).
    pub async fn state(&self) -> Result<ImmutableRef> {
        let _one = self.solving.lock().await;
        if let Some(solved) = self.lazy.solved() {
            return Ok(solved);
        }
        let state = match self.scope.job.build(self.lazy.vertex.clone(), self.lazy.output).await {
            Ok((state, _)) => state,
            Err(fault) => return Err(self.scope.explained(self.place(fault)).await),
        };
        self.scope.parts.services.sources.wanted_by(&state, &self.scope.data.sessions);
        self.lazy.solve(state.clone());
        Ok(state)
    }

    fn place(&self, fault: Fault) -> Fault {
        let vertex = fault.details().iter().find_map(|d| match d {
            Detail::Vertex(digest) => Some(digest.clone()),
            _ => None,
        });
        let LazyState { definition, .. } = &*self.lazy;
        let (Some(vertex), Some(source)) = (vertex, &definition.source) else { return fault };
        let placed = |digest: &str| source.find(digest).next().is_some();
        // What has no lines of its own, such as the file that an instruction adds, is shown by the
        // lines of what wants it.
        let wanting = || self.lazy.wanting(&vertex, placed);
        let of = if placed(&vertex) { None } else { wanting() }.unwrap_or(vertex);
        let places: Vec<_> = source
            .find(&of)
            .map(|(file, spans)| Detail::Source { file: file.clone(), spans: spans.to_vec() })
            .collect();
        // Clients take what comes first for the innermost, which is what was said last (row
        // `err.source`).
        places.into_iter().rev().fold(fault, Fault::detail)
    }
}

impl Drop for EngineRef {
    fn drop(&mut self) {
        self.states.lazy.lock().remove(&self.lazy.id);
    }
}

/// A reference of ours: `$id` is its name, and `$definition` says what it came from.
macro_rules! build_ref {
    ($kind:ty, $id:expr, $definition:expr) => {
        impl BuildRef for $kind {
            fn id(&self) -> &str {
                let id: fn(&$kind) -> &str = $id;
                id(self)
            }

            fn definition(&self) -> Option<&Definition> {
                let definition: fn(&$kind) -> Option<&Definition> = $definition;
                definition(self)
            }

            fn evaluate(&self) -> BoxFuture<'_, Result<()>> {
                async move { self.states.state_of(self).await.map(drop) }.boxed()
            }

            fn read_file<'a>(
                &'a self,
                path: &'a str,
                range: Option<(u64, u64)>,
            ) -> BoxFuture<'a, Result<Bytes>> {
                async move {
                    let path = path.to_owned();
                    self.states.read(self, move |root| reads::read_file(root, &path, range)).await
                }
                .boxed()
            }

            fn read_dir<'a>(
                &'a self,
                path: &'a str,
                include: Option<&'a str>,
            ) -> BoxFuture<'a, Result<Vec<FileStat>>> {
                async move {
                    let (path, include) = (path.to_owned(), include.map(str::to_owned));
                    let read = move |root: &Path| reads::read_dir(root, &path, include.as_deref());
                    self.states.read(self, read).await
                }
                .boxed()
            }

            fn stat_file<'a>(&'a self, path: &'a str) -> BoxFuture<'a, Result<FileStat>> {
                async move {
                    let path = path.to_owned();
                    self.states.read(self, move |root| reads::stat_file(root, &path)).await
                }
                .boxed()
            }
        }
    };
}

build_ref!(EngineRef, |state| &state.lazy.id, |state| Some(&state.lazy.definition));
build_ref!(FailedRef, |state| &state.id, |_| None);
