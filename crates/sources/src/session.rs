//! [`ClientServices`] over attached sessions.

use crate::clients::{ClientDirectory, ClientServices, SshAgent};
use async_trait::async_trait;
use futures::StreamExt as _;
use shipway_fault::{Code, Fault, Result};
use shipway_filesync::{FileSyncRequest, PacketStream};
use shipway_oci::Digest;
use shipway_registry::{CredentialSource, Credentials, Given, Token};
use shipway_session::{ClientStore, Session, SessionGroup, SessionId, TokenRequest, Upload};
use std::{
    collections::HashMap,
    future::Future,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// Credentials for registries out of a build's sessions (rows `cb.auth.*`): a token fetched by the
/// client if it does that, else its user name and secret, else nothing.
///
/// A token belongs to the session that brought it, and to others that prove to hold the same key
/// for the registry: those of one client, whose builds need no token each. A session that proves
/// nothing shares with none.
pub struct SessionCredentials {
    sessions: SessionGroup,
    /// Which session fetches tokens for a host, and under which name they are kept.
    owners: tokio::sync::Mutex<HashMap<(SessionId, String), Owner>>,
}

/// Under which name a session's tokens are kept.
#[derive(Clone)]
struct Owner {
    name: String,
    /// Whether the session fetches tokens itself.
    fetches: bool,
}

impl SessionCredentials {
    /// The credentials of `sessions`.
    pub fn new(sessions: SessionGroup) -> Self {
        Self { sessions, owners: Default::default() }
    }

    async fn owner(&self, session: &Session, host: &str) -> Result<Owner> {
        let mut owners = self.owners.lock().await;
        let key = (session.id().clone(), host.to_owned());
        if let Some(owner) = owners.get(&key) {
            return Ok(owner.clone());
        }
        let owner = match session.proven_authority(host).await? {
            Some(key) => {
                Owner { name: format!("token authority {}", Digest::of(key).hex()), fetches: true }
            }
            None => Owner { name: own_name(session), fetches: false },
        };
        owners.insert(key, owner.clone());
        Ok(owner)
    }
}

/// The name for what a session does not share.
fn own_name(session: &Session) -> String {
    format!("session {}", session.id().as_str())
}

/// The first answer that any attached session of the group has. A session that has gone has no
/// answer; one that fails is passed over, and its error is reported if no other answers.
async fn first<T, R>(group: &SessionGroup, ask: impl Fn(Session) -> R) -> Result<Option<T>>
where
    R: Future<Output = Result<Option<T>>>,
{
    let mut failed = None;
    for session in group.ids().iter().filter_map(|id| group.hub().try_get(id)) {
        match ask(session.clone()).await {
            Ok(Some(answer)) => return Ok(Some(answer)),
            Ok(None) => {}
            Err(_) if session.is_closed() => {}
            Err(e) => failed = Some(e),
        }
    }
    failed.map_or(Ok(None), Err)
}

#[async_trait]
impl CredentialSource for SessionCredentials {
    async fn credentials(&self, host: &str) -> Result<Option<Given<Credentials>>> {
        first(&self.sessions, async |s: Session| {
            let found = s.credentials(host).await?;
            let given = |c: shipway_session::Credentials| Credentials {
                username: c.username,
                secret: c.secret,
            };
            Ok(found.map(|c| Given { what: given(c), owner: Some(own_name(&s)) }))
        })
        .await
    }

    async fn fetch_token(
        &self,
        realm: &str,
        service: &str,
        scopes: &[String],
        host: &str,
    ) -> Result<Option<Given<Token>>> {
        let request = TokenRequest {
            client_id: "shipwayd".into(),
            host: host.into(),
            realm: realm.into(),
            service: service.into(),
            scopes: scopes.to_vec(),
        };
        first(&self.sessions, |s: Session| {
            let request = request.clone();
            async move {
                let owner = self.owner(&s, host).await?;
                // A client that has no authority to prove wants us to fetch.
                let found = if owner.fetches { s.fetch_token(request).await? } else { None };
                let token = found.filter(|t| !t.token.is_empty());
                let token = token.map(|t| Token {
                    expires_in: remaining(t.expires_in, t.issued_at),
                    token: t.token,
                });
                Ok(token.map(|what| Given { what, owner: Some(owner.name) }))
            }
        })
        .await
    }

    async fn owners(&self, host: &str) -> Result<Vec<String>> {
        let mut names = Vec::new();
        for session in self.sessions.ids().iter().filter_map(|id| self.sessions.hub().try_get(id)) {
            match self.owner(&session, host).await {
                Ok(owner) => names.push(owner.name),
                Err(_) if session.is_closed() => {}
                Err(error) => {
                    tracing::debug!(host, %error, "failed to verify the token authority of a session")
                }
            }
        }
        Ok(names)
    }

    fn identity(&self) -> Option<String> {
        self.sessions.ids().first().map(|id| format!("session {}", id.as_str()))
    }
}

/// What is left of a token's life. Issuers' clocks differ from ours: an issue time in the future
/// counts as now.
fn remaining(expires_in: i64, issued_at: i64) -> Option<Duration> {
    let life = u64::try_from(expires_in).ok().filter(|s| *s > 0)?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let age = u64::try_from(issued_at)
        .ok()
        .filter(|s| *s > 0)
        .map_or(0, |issued| now.saturating_sub(issued));
    Some(Duration::from_secs(life.saturating_sub(age)))
}

struct SessionDirs(Session);

#[async_trait]
impl ClientDirectory for SessionDirs {
    fn shared_key(&self) -> &str {
        self.0.shared_key()
    }

    async fn open(&self, request: &FileSyncRequest) -> Result<PacketStream> {
        self.0.file_sync(request)
    }
}

/// A socket below the directory `below` that leads to the SSH agent `id` of the first of `sessions`
/// that forwards it.
pub async fn forwarded_agent(sessions: &SessionGroup, id: &str, below: &Path) -> Result<SshAgent> {
    let found = first(sessions, async |s: Session| Ok(s.ssh_check(id).await?.then_some(s))).await?;
    let session = found.ok_or_else(|| {
        Fault::new(Code::FailedPrecondition, format!("no SSH key {id:?} forwarded from the client"))
            .hint("give the client's agent with --ssh default")
    })?;
    let failed = |e| Fault::io("make a socket for the SSH agent", e);
    // A directory of our own keeps other users of this machine away from the socket.
    let dir = tempfile::Builder::new().prefix("shipway-ssh-").tempdir_in(below).map_err(failed)?;
    // The path of a socket must be short, which that of a state directory need not be.
    let opened = std::fs::File::open(dir.path()).map_err(failed)?;
    let near = PathBuf::from(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&opened)));
    let listener = tokio::net::UnixListener::bind(near.join(AGENT)).map_err(failed)?;
    let id = id.to_owned();
    let serving = shipway_task::spawn("serve an SSH agent", async move {
        // Connections end with the task that serves them.
        let mut open = tokio::task::JoinSet::new();
        loop {
            tokio::select! {
                accepted = listener.accept() => {
                    let Ok((mut near, _)) = accepted else { return };
                    let Ok(mut far) = session.ssh_forward(&id) else { return };
                    open.spawn(shipway_task::named("forward to an SSH agent", async move {
                        tokio::io::copy_bidirectional(&mut near, &mut far).await.map(drop)
                    }));
                }
                Some(_) = open.join_next() => {}
            }
        }
    });
    let socket = dir.path().join(AGENT);
    Ok(SshAgent::new(dir, socket, serving))
}

/// Name of an agent's socket.
const AGENT: &str = "agent.sock";

#[async_trait]
impl ClientServices for SessionGroup {
    fn credentials(&self) -> Arc<dyn CredentialSource> {
        Arc::new(SessionCredentials::new(self.clone()))
    }

    async fn secret(&self, id: &str) -> Result<Option<Vec<u8>>> {
        first(self, async |s: Session| s.secret(id).await).await
    }

    async fn directories(
        &self,
        session: Option<&SessionId>,
    ) -> Result<Vec<Arc<dyn ClientDirectory>>> {
        let mut clients: Vec<Arc<dyn ClientDirectory>> = Vec::new();
        if let Some(id) = session
            && let Ok(found) = self.hub().get(id).await
        {
            clients.push(Arc::new(SessionDirs(found)));
        }
        for id in self.ids().iter().filter(|id| Some(*id) != session) {
            // The first one may still be on its way: builds start before their sessions are
            // attached.
            let found = if clients.is_empty() {
                self.hub().get(id).await.ok()
            } else {
                self.hub().try_get(id)
            };
            clients.extend(found.map(|s| Arc::new(SessionDirs(s)) as Arc<dyn ClientDirectory>));
        }
        if clients.is_empty() {
            let fault = Fault::new(
                Code::FailedPrecondition,
                "could not access local files without session",
            );
            return Err(fault.hint("the client that asked for this build has disconnected"));
        }
        Ok(clients)
    }

    async fn upload(&self, host: &str, path: &str) -> Result<Upload> {
        // The first session may still be on its way: builds start before their sessions are
        // attached.
        if let Some(id) = self.ids().first() {
            let _ = self.hub().get(id).await;
        }
        let found = first(self, async |s: Session| {
            let mut upload = s.upload_pull(host, path)?;
            // A client without it says so instead of a first piece; a file without any is empty.
            Ok(Some(match upload.next().await {
                None => upload,
                Some(piece) => {
                    Box::pin(futures::stream::iter([Ok(piece?)]).chain(upload)) as Upload
                }
            }))
        });
        let missing =
            || Fault::not_found(format!("no attached client uploads http://{host}{path}"));
        found
            .await?
            .ok_or_else(|| missing().hint("the client that asked for this build has disconnected"))
    }

    async fn ssh_agent(&self, id: &str) -> Result<SshAgent> {
        forwarded_agent(self, id, &std::env::temp_dir()).await
    }

    async fn client_store(&self, session: Option<&SessionId>, id: &str) -> Result<ClientStore> {
        if let Some(session) = session {
            return self.hub().get(session).await?.store(id);
        }
        self.any(|s: Session| async move {
            if !s.supports("/containerd.services.content.v1.Content/Info") {
                return Err(Fault::not_found(format!("the client has no content store {id:?}")));
            }
            s.store(id)
        })
        .await
    }

    fn session_id(&self) -> Option<SessionId> {
        self.ids().first().cloned()
    }
}
