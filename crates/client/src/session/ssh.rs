//! Sockets that the daemon may reach through us: SSH agents, and others in raw mode (rows `cb.ssh*`).

use std::{
    collections::BTreeMap,
    io,
    os::unix::fs::FileTypeExt,
    path::{Path, PathBuf},
};

use futures::TryStreamExt;
use shipway_fault::{Fault, Result};
use shipway_grpc::{Answers, Duplex, headers};
use shipway_proto::moby::sshforward::v1::{
    BytesMessage, CheckAgentRequest, CheckAgentResponse,
    ssh_server::{Ssh, SshServer},
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::UnixStream,
};
use tonic::{Request, Response, Status, Streaming};

/// What an id means that names none.
const DEFAULT: &str = "default";
/// Largest message of an agent, as OpenSSH has it.
const MAX_AGENT_MESSAGE: u32 = 256 << 10;
/// What a build may ask an agent: its keys, signatures, extensions. It may not add or remove keys.
const ALLOWED: [u8; 3] = [11, 13, 27];
/// An agent's refusal, as a message.
const REFUSED: [u8; 5] = [0, 0, 0, 1, 5];

/// A socket to forward.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SshSource {
    /// Where it is.
    pub socket: PathBuf,
    /// Whether its bytes are passed on as they are; otherwise they are an agent's, and only what reads is let through.
    pub raw: bool,
}

/// Sockets by id.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SshAgents(BTreeMap<String, SshSource>);

impl SshAgents {
    /// Offers the socket at one of `paths` as `id`; without any, the agent of our environment.
    pub fn add(&mut self, id: &str, paths: &[String], raw: bool) -> Result<()> {
        let id = if id.is_empty() { DEFAULT } else { id };
        let paths: Vec<&String> = paths.iter().filter(|p| !p.is_empty()).collect();
        let socket = match paths[..] {
            [] if raw => return Err(Fault::invalid(format!("raw mode must supply exactly one socket path for {id:?}"))),
            [] => std::env::var_os("SSH_AUTH_SOCK").filter(|v| !v.is_empty()).map(PathBuf::from).ok_or_else(|| {
                Fault::invalid("invalid empty ssh agent socket").hint("start an agent, so that SSH_AUTH_SOCK is set, or name its socket")
            })?,
            [path] => PathBuf::from(path),
            _ => return Err(Fault::invalid(format!("only single socket allowed for {id:?}"))),
        };
        let found = std::fs::metadata(&socket).map_err(|e| Fault::io(format!("forward SSH from {}", socket.display()), e))?;
        if !found.file_type().is_socket() {
            return Err(Fault::unimplemented(format!("using {} as a key", socket.display()))
                .hint("add the key to an agent with ssh-add, and forward the agent"));
        }
        if self.0.insert(id.to_owned(), SshSource { socket, raw }).is_some() {
            return Err(Fault::invalid(format!("duplicate agent ID {id:?}")));
        }
        Ok(())
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn service(self) -> SshServer<Self> {
        SshServer::new(self)
    }

    fn find(&self, id: &str) -> Result<&SshSource, Status> {
        let id = if id.is_empty() { DEFAULT } else { id };
        self.0.get(id).ok_or_else(|| Status::not_found(format!("unset ssh forward key {id}")))
    }
}

#[tonic::async_trait]
impl Ssh for SshAgents {
    type ForwardAgentStream = Answers<BytesMessage>;

    async fn check_agent(&self, request: Request<CheckAgentRequest>) -> Result<Response<CheckAgentResponse>, Status> {
        self.find(&request.into_inner().id)?;
        Ok(Response::new(CheckAgentResponse {}))
    }

    async fn forward_agent(&self, request: Request<Streaming<BytesMessage>>) -> Result<Response<Self::ForwardAgentStream>, Status> {
        let id = request.metadata().get(headers::SSH_ID).and_then(|v| v.to_str().ok()).unwrap_or_default();
        let SshSource { socket, raw } = self.find(id)?.clone();
        let agent = connect(&socket).await?;
        let (peer, answers) = Duplex::answering(request.into_inner().into_stream());
        tokio::spawn(async move {
            let done = if raw { pass(peer, agent).await } else { guard(peer, agent).await };
            if let Err(error) = done {
                tracing::debug!(%error, socket = %socket.display(), "forwarding ended");
            }
        });
        Ok(Response::new(answers))
    }
}

async fn connect(socket: &Path) -> Result<UnixStream, Status> {
    UnixStream::connect(socket).await.map_err(|e| Status::unavailable(format!("failed to connect to {}: {e}", socket.display())))
}

async fn pass(mut peer: Duplex<BytesMessage>, mut agent: UnixStream) -> io::Result<()> {
    tokio::io::copy_bidirectional(&mut peer, &mut agent).await.map(drop)
}

/// Lets through what [`ALLOWED`] has. The protocol is one answer per question, in order.
async fn guard(mut peer: impl AsyncRead + AsyncWrite + Unpin, mut agent: impl AsyncRead + AsyncWrite + Unpin) -> io::Result<()> {
    while let Some(question) = message(&mut peer).await? {
        if ALLOWED.contains(&question[4]) {
            agent.write_all(&question).await?;
            agent.flush().await?;
            let answer = message(&mut agent).await?.ok_or(io::ErrorKind::UnexpectedEof)?;
            peer.write_all(&answer).await?;
        } else {
            peer.write_all(&REFUSED).await?;
        }
        peer.flush().await?;
    }
    peer.shutdown().await
}

/// The next message with its length; none at the end.
async fn message(from: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<Vec<u8>>> {
    let length = match from.read_u32().await {
        Ok(length) => length,
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(e) => return Err(e),
    };
    if length == 0 || length > MAX_AGENT_MESSAGE {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("a message of {length} bytes is not an agent's")));
    }
    let mut whole = vec![0; 4 + length as usize];
    whole[..4].copy_from_slice(&length.to_be_bytes());
    from.read_exact(&mut whole[4..]).await?;
    Ok(Some(whole))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_guarded_agent_signs_and_keeps_its_keys() {
        let (mut client, peer) = tokio::io::duplex(1024);
        let (agent, mut server) = tokio::io::duplex(1024);
        let guarding = tokio::spawn(guard(peer, agent));
        let answering = tokio::spawn(async move {
            let mut asked = Vec::new();
            while let Some(question) = message(&mut server).await.expect("reads") {
                asked.push(question[4]);
                server.write_all(&[0, 0, 0, 2, 12, 9]).await.expect("writes");
            }
            asked
        });
        // List, remove all, list.
        client.write_all(&[0, 0, 0, 1, 11, 0, 0, 0, 1, 19, 0, 0, 0, 1, 11]).await.expect("writes");
        let mut answers = vec![0; 17];
        client.read_exact(&mut answers).await.expect("reads");
        assert_eq!(answers, [0, 0, 0, 2, 12, 9, 0, 0, 0, 1, 5, 0, 0, 0, 2, 12, 9]);
        drop(client);
        guarding.await.expect("no panic").expect("ends well");
        assert_eq!(answering.await.expect("no panic"), [11, 11]);
    }
}
