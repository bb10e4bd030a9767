//! A build that its client drives through the gateway (row `ctl.solve.gwmode`): `Control.Solve`
//! without a graph, beside calls of the gateway, until a result is returned.

use std::collections::BTreeMap;

use shipway_fault::{Fault, Result};
use shipway_grpc::fault_of;
use shipway_proto::moby::buildkit::v1::frontend as wire;
use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;
use tonic::metadata::AsciiMetadataValue;

use crate::{
    Client, SolveOptions, Status,
    build::{Followed, Opened, Plan, solve_fault},
    question::{gateway, id_of, of_build},
    session::Attached,
    token::Calls,
};

/// The build, which ends when this is dropped.
pub(crate) struct Driven {
    pub(crate) calls: Calls,
    pub(crate) id: AsciiMetadataValue,
    pub(crate) reference: String,
    plan: Plan,
    solve: AbortOnDropHandle<Result<BTreeMap<String, String>>>,
    followed: Followed,
    _session: Attached,
}

/// What asks for the result of the frontend of `options`, which they lose: the build itself has
/// none.
pub(crate) fn ask_frontend(options: &mut SolveOptions) -> wire::SolveRequest {
    let inputs = std::mem::take(&mut options.frontend_inputs);
    let imports = options.cache_imports.iter();
    wire::SolveRequest {
        frontend: std::mem::take(&mut options.frontend),
        frontend_opt: options.frontend_attrs.clone(),
        frontend_inputs: inputs.into_iter().map(|(name, d)| (name, d.into_wire())).collect(),
        cache_imports: imports
            .map(|e| wire::CacheOptionsEntry { r#type: e.kind.clone(), attrs: e.attrs.clone() })
            .collect(),
        allow_result_return: true,
        allow_result_array_ref: true,
        ..Default::default()
    }
}

impl Driven {
    /// Begins a build that is open until it is ended.
    pub(crate) async fn begin(
        client: &Client,
        options: SolveOptions,
        events: mpsc::Sender<Status>,
    ) -> Result<Self> {
        let Opened { reference, plan, request, session, followed } =
            client.attach(options, events).await?;
        let id = id_of(&reference)?;
        let mut control = client.control();
        let solve = shipway_task::spawn("hold a build", async move {
            let solved = control.solve(request).await;
            solved.map(|s| s.into_inner().exporter_response).map_err(|s| solve_fault(&s))
        });
        let solve = AbortOnDropHandle::new(solve);
        Ok(Self { calls: client.calls(), id, reference, plan, solve, followed, _session: session })
    }

    /// Asks the gateway for `ask`.
    pub(crate) async fn solve(
        &self,
        ask: wire::SolveRequest,
    ) -> std::result::Result<wire::Result, tonic::Status> {
        let answer = gateway(self.calls.clone()).solve(of_build(ask, &self.id)).await?;
        Ok(answer.into_inner().result.unwrap_or_default())
    }

    /// Ends the build with a result, which is exported, or with a failure; gives what exporters
    /// answered.
    pub(crate) async fn end(self, answer: wire::ReturnRequest) -> Result<BTreeMap<String, String>> {
        let returned = gateway(self.calls).r#return(of_build(answer, &self.id)).await;
        let solved = match self.solve.await {
            Ok(solved) => solved,
            Err(error) => Err(Fault::internal(format!("hold a build: {error}"))),
        };
        self.followed.finish(solved.is_err()).await;
        let response = solved?;
        returned.map_err(|s| fault_of(&s))?;
        self.plan.settle(&response)?;
        Ok(response)
    }
}
