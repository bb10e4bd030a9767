//! From definitions to lazy states: decoded, checked against policies and entitlements, and made
//! into vertices.

use super::{
    call_log::{CallLog, FrontendCall},
    heavy::heavy,
    lazy::LazyState,
    scope::BuildScope,
    state::{EngineRef, States},
    vertices,
};
use futures::{FutureExt as _, future::BoxFuture};
use shipway_fault::Result;
use shipway_llb::{Caps, Definition, Graph, NetMode, Op, SourcePolicy, Vertex};
use shipway_oci::Digest;
use shipway_ops::SolveNested;
use shipway_refs::ImmutableRef;
use std::sync::Arc;

/// One build: what is shared by all that is done for it, and its states.
pub(crate) struct Build {
    pub(crate) scope: Arc<BuildScope>,
    pub(crate) states: Arc<States>,
}

impl Build {
    /// A build without states, which its own operations may ask to solve graphs.
    pub(crate) fn new(scope: Arc<BuildScope>) -> Arc<Self> {
        let states = States::new(scope.data.failed.clone());
        let build = Arc::new(Self { scope, states });
        let nested: Arc<dyn SolveNested> = build.clone();
        build.scope.data.nested.set(Arc::downgrade(&nested));
        build
    }

    /// The lazy state of a definition, which `log` asks for.
    pub(crate) async fn state(
        &self,
        definition: Definition,
        policies: &[SourcePolicy],
        log: &Arc<CallLog>,
    ) -> Result<Arc<EngineRef>> {
        let scope = &self.scope;
        let decode = |definition: Definition| {
            let platform = scope.parts.native().clone();
            heavy(move || {
                Graph::decode(&definition, &Caps::llb(), &platform).map(|graph| (definition, graph))
            })
        };
        let (definition, graph) = decode(definition).await?;
        let (definition, graph) = match scope.checked(definition.clone(), &graph, policies).await? {
            Some(changed) => decode(changed).await?,
            None => (definition, graph),
        };
        // Every build is checked, whichever runs the vertex in the end: a shared or cached result
        // needs the permission too.
        for vertex in &graph.vertices {
            if let Op::Exec(exec) = &vertex.op {
                scope.data.entitlements.check(exec)?;
            }
        }
        scope.data.step_options.note(&graph);
        let graph = scope.with_proxy(scope.with_devices(graph).await?);
        let made = vertices::of_graph(&graph, &scope.parts.services, false);
        let lazy = Arc::new(LazyState::new(definition, made)?);
        log.note_state(lazy.clone());
        Ok(EngineRef::new(lazy, log, scope.clone(), self.states.clone()))
    }
}

impl BuildScope {
    /// The graph with the devices that steps get instead of those they ask for.
    async fn with_devices(&self, mut graph: Graph) -> Result<Graph> {
        let wants =
            |vertex: &Vertex| matches!(&vertex.op, Op::Exec(exec) if !exec.devices.is_empty());
        if !graph.vertices.iter().any(|v| wants(v)) {
            return Ok(graph);
        }
        let there = self.parts.services.devices().await?;
        for vertex in graph.vertices.iter_mut().filter(|v| wants(v)) {
            if let Op::Exec(exec) = &mut Arc::make_mut(vertex).op {
                self.data.entitlements.grant_devices(exec, &there)?;
            }
        }
        Ok(graph)
    }

    /// The graph whose steps see the network through a proxy only, where the build is like that.
    fn with_proxy(&self, mut graph: Graph) -> Graph {
        for vertex in graph.vertices.iter_mut().filter(|_| self.proxied) {
            if let Op::Exec(exec) = &mut Arc::make_mut(vertex).op {
                exec.proxied = exec.network != NetMode::None;
            }
        }
        graph
    }
}

impl SolveNested for Build {
    fn solve_nested(
        &self,
        of: Digest,
        definition: Definition,
    ) -> BoxFuture<'_, Result<ImmutableRef>> {
        async move {
            if definition.ops.is_empty() {
                return self.scope.parts.services.refs.scratch();
            }
            // What it takes counts as incomplete in provenance, so this log is not read.
            let state =
                self.state(definition, &[], &CallLog::root(FrontendCall::default())).await?;
            let _known = self.scope.shared.nested.enter(of, state.lazy.vertices())?;
            state.state().await
        }
        .boxed()
    }
}
