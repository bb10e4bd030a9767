//! Secrets, SSH agents and uploads from the client (rows `cb.secrets`, `cb.ssh*`, `cb.upload`).

use std::{pin::Pin, time::Duration};

use bytes::Bytes;
use futures::{Stream, StreamExt};
use shipway_fault::{Code, Result};
use shipway_grpc::{Duplex, Frame, frames, headers};
use shipway_proto::moby::{
    buildkit::secrets::v1::{GetSecretRequest, secrets_client::SecretsClient},
    sshforward::v1::{BytesMessage as SshBytes, CheckAgentRequest, ssh_client::SshClient},
    upload::v1::{BytesMessage as UploadBytes, upload_client::UploadClient},
};
use tonic::Request;

use crate::{
    Session,
    call::{add, client, eager, eager_faults, optional},
};

/// A secret may come from a helper program.
const LIMIT: Duration = Duration::from_secs(60);
/// The agent that is meant when none is named.
const DEFAULT_AGENT: &str = "default";

/// A connection to an SSH agent of the client.
pub type SshStream = Duplex<SshBytes>;

/// Content that the client uploads.
pub type Upload = Pin<Box<dyn Stream<Item = Result<Bytes>> + Send>>;

fn agent(id: &str) -> &str {
    if id.is_empty() { DEFAULT_AGENT } else { id }
}

impl Session {
    /// The secret `id`, if the client has it.
    pub async fn secret(&self, id: &str) -> Result<Option<Vec<u8>>> {
        let mut client = client!(SecretsClient, self);
        let request = GetSecretRequest { id: id.to_owned(), ..Default::default() };
        let what = format!("ask the client for the secret {id}");
        let tolerated = [Code::NotFound, Code::Unimplemented];
        Ok(optional(LIMIT, &what, &tolerated, client.get_secret(request)).await?.map(|a| a.data))
    }

    /// Whether the client forwards the SSH agent `id`; empty means the default one.
    pub async fn ssh_check(&self, id: &str) -> Result<bool> {
        let id = agent(id);
        let mut client = client!(SshClient, self);
        let what = format!("ask the client for the SSH agent {id}");
        let call = client.check_agent(CheckAgentRequest { id: id.to_owned() });
        // Clients answer an unknown id with a plain error; only one that has no agents at all lacks
        // the method.
        Ok(optional(LIMIT, &what, &[Code::NotFound, Code::Unimplemented], call).await?.is_some())
    }

    /// Connects to the SSH agent `id`; empty means the default one.
    pub fn ssh_forward(&self, id: &str) -> Result<SshStream> {
        let (sink, stream) = frames();
        let mut call = Request::new(stream);
        add(call.metadata_mut(), headers::SSH_ID, agent(id))?;
        let mut client = client!(SshClient, self);
        Ok(Duplex::new(eager(async move { client.forward_agent(call).await }), sink))
    }

    /// Pulls what the client uploads for the URL `http://<host><path>`.
    pub fn upload_pull(&self, host: &str, path: &str) -> Result<Upload> {
        let (sink, stream) = frames::<UploadBytes>();
        let mut call = Request::new(stream);
        add(call.metadata_mut(), headers::UPLOAD_HOST, host)?;
        add(call.metadata_mut(), headers::UPLOAD_PATH, path)?;
        let mut client = client!(UploadClient, self);
        let answers = eager_faults(async move { client.pull(call).await });
        // Our direction stays open as long as we read, because the call ends with it.
        let answers = answers.map(move |message| {
            let _open = &sink;
            message.map(Frame::into_bytes).map_err(|e| e.context("pull an upload from the client"))
        });
        Ok(Box::pin(answers))
    }
}
