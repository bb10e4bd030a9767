//! What the daemon may reach through us: SSH agents, keys as if they were in one, and other sockets
//! in raw mode (rows `cb.ssh*`).

use std::{
    collections::BTreeMap,
    io,
    os::unix::fs::FileTypeExt,
    path::{Path, PathBuf},
    sync::Arc,
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

use super::keys::KeyRing;

/// What an id means that names none.
const DEFAULT: &str = "default";
/// Largest message of an agent, as OpenSSH has it.
const MAX_AGENT_MESSAGE: u32 = 256 << 10;
/// What a build may ask an agent: its keys, signatures, extensions. It may not add or remove keys.
const ALLOWED: [u8; 3] = [11, 13, 27];
/// An agent's refusal, as a message.
const REFUSED: [u8; 5] = [0, 0, 0, 1, 5];

/// What is forwarded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SshSource {
    /// A socket.
    Socket {
        /// Where it is.
        path: PathBuf,
        /// Whether its bytes are passed on as they are; otherwise they are an agent's, and only
        /// what reads is let through.
        raw: bool,
    },
    /// Keys of files, as an agent of our own.
    Keys(Arc<KeyRing>),
}

/// Sockets by id.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SshAgents(BTreeMap<String, SshSource>);

impl SshAgents {
    /// Offers as `id` the socket at `paths`, or the keys in the files there; without any, the agent
    /// of our environment.
    pub fn add(&mut self, id: &str, paths: &[String], raw: bool) -> Result<()> {
        let id = if id.is_empty() { DEFAULT } else { id };
        let paths: Vec<&String> = paths.iter().filter(|p| !p.is_empty()).collect();
        let paths: Vec<PathBuf> = match paths[..] {
            _ if raw && paths.len() != 1 => {
                return Err(Fault::invalid(format!(
                    "raw mode must supply exactly one socket path for {id:?}"
                )));
            }
            [] => vec![
                std::env::var_os("SSH_AUTH_SOCK")
                    .filter(|v| !v.is_empty())
                    .map(PathBuf::from)
                    .ok_or_else(|| {
                        Fault::invalid("invalid empty ssh agent socket").hint(
                            "start an agent, so that SSH_AUTH_SOCK is set, or name its socket",
                        )
                    })?,
            ],
            _ => paths.into_iter().map(PathBuf::from).collect(),
        };
        let (mut socket, mut keys) = (None, KeyRing::default());
        for path in &paths {
            if socket.is_some() {
                return Err(Fault::invalid(format!("only single socket allowed for {id:?}")));
            }
            let found = std::fs::metadata(path)
                .map_err(|e| Fault::io(format!("forward SSH from {}", path.display()), e))?;
            if found.file_type().is_socket() {
                socket = Some(path.clone());
            } else if raw {
                return Err(Fault::invalid("raw mode only supported with socket paths"));
            } else {
                keys.add(path)?;
            }
        }
        let source = match socket {
            Some(_) if keys != KeyRing::default() => {
                return Err(Fault::invalid("invalid combination of keys and sockets"));
            }
            Some(path) => SshSource::Socket { path, raw },
            None => SshSource::Keys(Arc::new(keys)),
        };
        if self.0.insert(id.to_owned(), source).is_some() {
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

    async fn check_agent(
        &self,
        request: Request<CheckAgentRequest>,
    ) -> Result<Response<CheckAgentResponse>, Status> {
        self.find(&request.into_inner().id)?;
        Ok(Response::new(CheckAgentResponse {}))
    }

    async fn forward_agent(
        &self,
        request: Request<Streaming<BytesMessage>>,
    ) -> Result<Response<Self::ForwardAgentStream>, Status> {
        let id = request
            .metadata()
            .get(headers::SSH_ID)
            .and_then(|v| v.to_str().ok())
            .unwrap_or_default();
        let source = self.find(id)?.clone();
        let agent = match &source {
            SshSource::Socket { path, .. } => Some(connect(path).await?),
            SshSource::Keys(_) => None,
        };
        let (peer, answers) = Duplex::answering(request.into_inner().into_stream());
        shipway_task::spawn("forward an SSH agent", async move {
            let done = match (source, agent) {
                (SshSource::Socket { raw: true, .. }, Some(agent)) => pass(peer, agent).await,
                (SshSource::Socket { .. }, Some(agent)) => guard(peer, agent).await,
                (SshSource::Keys(keys), _) => serve(peer, &keys).await,
                (SshSource::Socket { .. }, None) => Ok(()),
            };
            if let Err(error) = done {
                tracing::debug!(%error, "SSH forwarding failed");
            }
        });
        Ok(Response::new(answers))
    }
}

async fn connect(socket: &Path) -> Result<UnixStream, Status> {
    UnixStream::connect(socket)
        .await
        .map_err(|e| Status::unavailable(format!("failed to connect to {}: {e}", socket.display())))
}

async fn pass(mut peer: Duplex<BytesMessage>, mut agent: UnixStream) -> io::Result<()> {
    tokio::io::copy_bidirectional(&mut peer, &mut agent).await.map(drop)
}

/// Lets through what [`ALLOWED`] has. The protocol is one answer per question, in order.
async fn guard(
    mut peer: impl AsyncRead + AsyncWrite + Unpin,
    mut agent: impl AsyncRead + AsyncWrite + Unpin,
) -> io::Result<()> {
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

/// Answers with `keys`.
async fn serve(mut peer: impl AsyncRead + AsyncWrite + Unpin, keys: &KeyRing) -> io::Result<()> {
    while let Some(question) = message(&mut peer).await? {
        let answer = keys.answer(&question[4..]);
        let length = u32::try_from(answer.len()).map_err(io::Error::other)?;
        peer.write_all(&[&length.to_be_bytes()[..], &answer].concat()).await?;
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
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("a message of {length} bytes is not an agent's"),
        ));
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
        let guarding = shipway_task::spawn("test", guard(peer, agent));
        let answering = shipway_task::spawn("test", async move {
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
