//! From definitions to lazy states: decoded, checked against policies and entitlements, and made
//! into vertices.

use super::{heavy::heavy, scope::BuildScope, state::EngineRef, vertices};
use crate::provenance::call_log::{CallLog, FrontendCall};
use async_trait::async_trait;
use shipway_fault::{Fault, Result};
use shipway_llb::{Caps, Definition, Graph, NetMode, Op, SourcePolicy, Vertex};
use shipway_oci::Digest;
use shipway_ops::SolveNested;
use shipway_refs::ImmutableRef;
use std::sync::Arc;

impl BuildScope {
    /// The lazy state of a definition, which `log` asks for.
    pub(crate) async fn state(
        self: &Arc<Self>,
        definition: Definition,
        policies: &[SourcePolicy],
        log: &Arc<CallLog>,
    ) -> Result<Arc<EngineRef>> {
        let decode = |definition: Definition| {
            let platform = self.parts.native().clone();
            heavy(move || {
                Graph::decode(&definition, &Caps::llb(), &platform).map(|graph| (definition, graph))
            })
        };
        let (definition, graph) = decode(definition).await?;
        let (definition, graph) = match self.checked(definition.clone(), &graph, policies).await? {
            Some(changed) => decode(changed).await?,
            None => (definition, graph),
        };
        // Every build is checked, whichever runs the vertex in the end: a shared or cached result
        // needs the permission too.
        for vertex in &graph.vertices {
            if let Op::Exec(exec) = &vertex.op {
                self.data.entitlements.check(exec)?;
            }
        }
        self.data.step_options.note(&graph);
        let graph = self.with_proxy(self.with_devices(graph).await?);
        let made = vertices::of_graph(&graph, &self.parts.services, false);
        let state = Arc::new(EngineRef::new(definition, made, log, self.clone())?);
        self.add_state(&state);
        log.note_state(state.clone());
        Ok(state)
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

#[async_trait]
impl SolveNested for BuildScope {
    async fn solve_nested(&self, of: Digest, definition: Definition) -> Result<ImmutableRef> {
        let parts = &self.parts;
        if definition.ops.is_empty() {
            return parts.services.refs.scratch();
        }
        let scope = self.this().ok_or_else(Fault::cancelled)?;
        // What it takes counts as incomplete in provenance, so this log is not read.
        let state = scope.state(definition, &[], &CallLog::root(FrontendCall::default())).await?;
        let _known = self.shared.nested.enter(of, state.vertices())?;
        state.state().await
    }
}
