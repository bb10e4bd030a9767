//! A lazy state of a build, as frontends and exporters hold it.

use super::{reads, scope::BuildScope};
use crate::{frontends, provenance::call_log::CallLog};
use async_trait::async_trait;
use bytes::Bytes;
use parking_lot::{Mutex, MutexGuard};
use shipway_fault::{Context as _, Detail, Fault, Result};
use shipway_frontend::{BuildRef, FileStat};
use shipway_llb::Definition;
use shipway_oci::Digest;
use shipway_ops::LlbOp;
use shipway_refs::{Compression, ImmutableRef};
use shipway_solver::Vertex;
use std::{
    collections::HashSet,
    path::Path,
    sync::{Arc, Weak},
};

/// A state that is solved when it is first needed.
pub struct EngineRef {
    pub(crate) id: String,
    pub(crate) definition: Definition,
    pub(crate) vertex: Arc<Vertex<LlbOp>>,
    pub(crate) output: usize,
    /// The log of the frontend that asked for it.
    pub(crate) log: Weak<CallLog>,
    scope: Arc<BuildScope>,
    solved: Mutex<Option<ImmutableRef>>,
    /// Held while it is solved.
    solving: tokio::sync::Mutex<()>,
}

/// How often a result is made again that turns out to be lost: as often as it may have layers, for
/// they may be found missing one by one.
pub(crate) const MAX_TRIES: usize = 128;

/// A state that an operation left when it failed (row `err.solve`).
pub(crate) struct FailedRef {
    id: String,
    scope: Arc<BuildScope>,
}

impl FailedRef {
    /// All that `fault` names.
    pub(crate) fn of(scope: &Arc<BuildScope>, fault: &Fault) -> Vec<Arc<dyn BuildRef>> {
        let ids = scope.data.failed.named_by(fault).into_iter();
        ids.map(|id| Arc::new(Self { id, scope: scope.clone() }) as Arc<dyn BuildRef>).collect()
    }
}

/// The state behind a reference of the build, solved.
pub(crate) async fn state_of(scope: &BuildScope, state: &dyn BuildRef) -> Result<ImmutableRef> {
    match scope.state_of(state) {
        Some(state) => state.state().await,
        None => scope.data.failed.state(state.id()).await,
    }
}

/// Does `work` with the state, and again with another one if the first turns out to be lost: the
/// cache had promised it, and its bytes are gone.
pub(crate) async fn with<T>(
    scope: &BuildScope,
    state: &dyn BuildRef,
    work: impl AsyncFn(ImmutableRef) -> Result<T>,
) -> Result<T> {
    let mut tries = 0;
    loop {
        tries += 1;
        match work(state_of(scope, state).await?).await {
            Err(fault) if tries < MAX_TRIES && made_again(scope, state, &fault).await => {}
            done => return done,
        }
    }
}

/// Whether `fault` says that the state is lost, and it is made again when it is next asked for.
pub(crate) async fn made_again(scope: &BuildScope, state: &dyn BuildRef, fault: &Fault) -> bool {
    match scope.state_of(state) {
        Some(state) => state.made_again(fault).await,
        None => false,
    }
}

/// Lets the build's vertices know that the state will be exported with `compression`.
pub(crate) fn plan_export(scope: &BuildScope, state: &dyn BuildRef, compression: Compression) {
    if let Some(state) = scope.state_of(state).filter(|s| !s.is_solved()) {
        scope.data.export_plan.add(&state.vertex, state.output, compression);
    }
}

async fn read<T: Send + 'static>(
    scope: &BuildScope,
    state: &dyn BuildRef,
    f: impl FnOnce(&Path) -> Result<T> + Send + 'static,
) -> Result<T> {
    let mount = with(scope, state, async |state| state.mount().await)
        .await
        .context(|| "read from a build's result")?;
    shipway_task::blocking("read from a build's result", move || f(mount.path())).await
}

impl EngineRef {
    pub(crate) fn new(
        definition: Definition,
        made: (Arc<Vertex<LlbOp>>, usize),
        log: &Arc<CallLog>,
        scope: Arc<BuildScope>,
    ) -> Result<Self> {
        let (vertex, output) = made;
        let (id, log) = (shipway_host::random_id()?, Arc::downgrade(log));
        let (solved, solving) = (Mutex::default(), Default::default());
        Ok(Self { id, definition, vertex, output, log, scope, solved, solving })
    }

    /// The vertices that it needs.
    pub(crate) fn vertices(&self) -> HashSet<Digest> {
        let (mut seen, mut queue) = (HashSet::from([self.vertex.id.digest]), vec![&self.vertex]);
        while let Some(next) = queue.pop() {
            queue.extend(
                next.inputs.iter().map(|(input, _)| input).filter(|i| seen.insert(i.id.digest)),
            );
        }
        seen
    }

    /// Whether it was needed yet.
    pub(crate) fn is_solved(&self) -> bool {
        self.solved().is_some()
    }

    fn solved(&self) -> MutexGuard<'_, Option<ImmutableRef>> {
        self.solved.lock()
    }

    async fn made_again(&self, fault: &Fault) -> bool {
        let Some(lost) = self.solved().clone().filter(|s| s.is_lost(fault)) else { return false };
        if !self.scope.job.lost(self.vertex.clone(), self.output, fault.clone()).await {
            return false;
        }
        // Another caller may have been here meanwhile.
        self.solved().take_if(|now| now.is_same(&lost));
        true
    }

    /// The state, solved now if it was not before. Errors carry the lines of the source that the
    /// failing vertex came from (row `err.source`).
    pub async fn state(&self) -> Result<ImmutableRef> {
        let _one = self.solving.lock().await;
        if let Some(solved) = self.solved().clone() {
            return Ok(solved);
        }
        let solve = async {
            match self.scope.job.build(self.vertex.clone(), self.output).await {
                Ok((state, _)) => {
                    let sources = &self.scope.parts.services.sources;
                    sources.wanted_by(&state, &self.scope.data.sessions);
                    Ok(state)
                }
                Err(fault) => Err(frontends::explain(&self.scope, self.place(fault)).await),
            }
        };
        let state = solve.await?;
        *self.solved() = Some(state.clone());
        Ok(state)
    }

    fn place(&self, fault: Fault) -> Fault {
        let vertex = fault.details().iter().find_map(|d| match d {
            Detail::Vertex(digest) => Some(digest.clone()),
            _ => None,
        });
        let (Some(vertex), Some(source)) = (vertex, &self.definition.source) else { return fault };
        let placed = |digest: &str| source.find(digest).next().is_some();
        // What has no lines of its own, such as the file that an instruction adds, is shown by the
        // lines of what wants it.
        let of =
            if placed(&vertex) { vertex } else { self.wanting(&vertex, placed).unwrap_or(vertex) };
        let places: Vec<_> = source
            .find(&of)
            .map(|(file, spans)| Detail::Source { file: file.clone(), spans: spans.to_vec() })
            .collect();
        // Clients take what comes first for the innermost, which is what was said last (row
        // `err.source`).
        places.into_iter().rev().fold(fault, Fault::detail)
    }

    /// A vertex that has `vertex` as an input and is `placed`.
    fn wanting(&self, vertex: &str, placed: impl Fn(&str) -> bool) -> Option<String> {
        let mut seen = HashSet::new();
        let mut queue = vec![&self.vertex];
        while let Some(next) = queue.pop() {
            let digest = next.id.digest.to_string();
            if next.inputs.iter().any(|(input, _)| input.id.digest.to_string() == vertex)
                && placed(&digest)
            {
                return Some(digest);
            }
            queue.extend(
                next.inputs.iter().map(|(input, _)| input).filter(|i| seen.insert(i.id.digest)),
            );
        }
        None
    }
}

impl Drop for EngineRef {
    fn drop(&mut self) {
        self.scope.remove_state(&self.id);
    }
}

/// A reference of ours: `$definition` says what it came from.
macro_rules! build_ref {
    ($kind:ty, $definition:expr) => {
        #[async_trait]
        impl BuildRef for $kind {
            fn id(&self) -> &str {
                &self.id
            }

            fn definition(&self) -> Option<&Definition> {
                let definition: fn(&$kind) -> Option<&Definition> = $definition;
                definition(self)
            }

            async fn evaluate(&self) -> Result<()> {
                state_of(&self.scope, self).await.map(drop)
            }

            async fn read_file(&self, path: &str, range: Option<(u64, u64)>) -> Result<Bytes> {
                let path = path.to_owned();
                read(&self.scope, self, move |root| reads::read_file(root, &path, range)).await
            }

            async fn read_dir(&self, path: &str, include: Option<&str>) -> Result<Vec<FileStat>> {
                let (path, include) = (path.to_owned(), include.map(str::to_owned));
                read(&self.scope, self, move |root| {
                    reads::read_dir(root, &path, include.as_deref())
                })
                .await
            }

            async fn stat_file(&self, path: &str) -> Result<FileStat> {
                let path = path.to_owned();
                read(&self.scope, self, move |root| reads::stat_file(root, &path)).await
            }
        }
    };
}

build_ref!(EngineRef, |state| Some(&state.definition));
build_ref!(FailedRef, |_| None);
