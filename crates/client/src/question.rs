//! Questions to a frontend instead of a build (rows `ctl.solve.gwmode`, `dfs.*`): we drive the
//! build through the gateway, ask the frontend, and return what it said. Answers are metadata.

use std::collections::BTreeMap;

use prost::Message;
use shipway_fault::{Fault, Result};
use shipway_grpc::fault_of;
use shipway_proto::{
    MAX_MESSAGE,
    google::rpc,
    moby::buildkit::v1::frontend::{self as wire, llb_bridge_client::LlbBridgeClient},
    pb,
};
use tonic::metadata::AsciiMetadataValue;

use crate::token::Calls;

/// Names the build that a call of the gateway belongs to.
const BUILD_ID: &str = "buildkit-controlapi-buildid";
/// Tells frontends that questions are understood to be questions.
const CAPS: &str = "frontend.caps";
const SUBREQUESTS: &str = "moby.buildkit.frontend.subrequests";

/// What a frontend answered, by name: `result.json`, `result.txt` and others.
pub type Answer = BTreeMap<String, Vec<u8>>;

/// A frontend and what it is asked.
pub(crate) struct Question {
    frontend: String,
    options: BTreeMap<String, String>,
    inputs: BTreeMap<String, pb::Definition>,
}

impl Question {
    pub(crate) fn new(
        frontend: String,
        mut options: BTreeMap<String, String>,
        inputs: BTreeMap<String, pb::Definition>,
    ) -> Self {
        options.entry(CAPS.to_owned()).or_insert_with(|| SUBREQUESTS.to_owned());
        Self { frontend, options, inputs }
    }

    /// Asks within the build `reference` and ends it with the answer.
    pub(crate) async fn ask(self, calls: Calls, reference: &str) -> Result<Answer> {
        let id = id_of(reference)?;
        let mut gateway = gateway(calls);
        let solve = wire::SolveRequest {
            frontend: self.frontend,
            frontend_opt: self.options,
            frontend_inputs: self.inputs,
            allow_result_return: true,
            allow_result_array_ref: true,
            ..Default::default()
        };
        let answer = gateway.solve(of_build(solve, &id)).await;
        let done = match &answer {
            Ok(answer) => {
                let metadata = answer
                    .get_ref()
                    .result
                    .as_ref()
                    .map(|r| r.metadata.clone())
                    .unwrap_or_default();
                wire::ReturnRequest {
                    result: Some(wire::Result { metadata, ..Default::default() }),
                    error: None,
                }
            }
            Err(status) => wire::ReturnRequest { result: None, error: Some(status_of(status)) },
        };
        let returned = gateway.r#return(of_build(done, &id)).await;
        let answer = answer.map_err(|s| fault_of(&s))?.into_inner();
        returned.map_err(|s| fault_of(&s))?;
        Ok(answer.result.map(|r| r.metadata).unwrap_or_default())
    }
}

/// The gateway of the daemon.
pub(crate) fn gateway(calls: Calls) -> LlbBridgeClient<Calls> {
    LlbBridgeClient::new(calls)
        .max_decoding_message_size(MAX_MESSAGE)
        .max_encoding_message_size(MAX_MESSAGE)
}

/// The id of a build as its calls carry it.
pub(crate) fn id_of(reference: &str) -> Result<AsciiMetadataValue> {
    reference.parse().map_err(|_| Fault::invalid(format!("{reference:?} is not the id of a build")))
}

pub(crate) fn of_build<T>(message: T, id: &AsciiMetadataValue) -> tonic::Request<T> {
    let mut request = tonic::Request::new(message);
    request.metadata_mut().insert(BUILD_ID, id.clone());
    request
}

/// The status with its details, as it came.
pub(crate) fn status_of(status: &tonic::Status) -> rpc::Status {
    match rpc::Status::decode(status.details()) {
        Ok(whole) if whole.code != 0 => whole,
        _ => rpc::Status {
            code: status.code() as i32,
            message: status.message().to_owned(),
            details: Vec::new(),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_are_returned_whole() {
        let any = prost_types::Any { type_url: "t".into(), value: vec![1] };
        let whole = rpc::Status { code: 2, message: "m".into(), details: vec![any] };
        let with =
            tonic::Status::with_details(tonic::Code::Unknown, "m", whole.encode_to_vec().into());
        assert_eq!(status_of(&with), whole);
        let bare = tonic::Status::not_found("x");
        assert_eq!(
            status_of(&bare),
            rpc::Status { code: 5, message: "x".into(), details: Vec::new() }
        );
    }
}
