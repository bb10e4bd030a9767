//! Who is attached (rows `ses.hdr.*`, `ses.lookup`).

use parking_lot::{Mutex, MutexGuard};
use std::{
    collections::{HashMap, HashSet},
    fmt,
    sync::Arc,
    time::Duration,
};

use futures::Stream;
use shipway_fault::{Code, Fault, Result};
use shipway_grpc::{Answers, Duplex, TracedChannel, TunnelChannel, headers};
use shipway_proto::moby::buildkit::v1::BytesMessage;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::Notify,
};
use tonic::{Status, metadata::MetadataMap};

use crate::health::HealthPolicy;

/// How long a caller waits for a session that is not there yet.
const PATIENCE: Duration = Duration::from_secs(5);
/// Ids and keys are short; what is longer is not one.
const MAX_VALUE: usize = 4096;
/// Methods a client may announce.
const MAX_METHODS: usize = 4096;

/// Names one attached client.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SessionId(Arc<str>);

impl SessionId {
    /// The id `id`. Of the form `prefix:id`, which callers use to tell apart contexts of one
    /// session, only the last part counts.
    pub fn new(id: &str) -> Self {
        match id.split_once(':') {
            Some((_, rest)) if !rest.is_empty() => Self(rest.into()),
            _ => Self(id.into()),
        }
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl From<&str> for SessionId {
    fn from(id: &str) -> Self {
        Self::new(id)
    }
}

/// All attached clients, or those of one owner. Cheap to clone.
#[derive(Clone, Default)]
pub struct SessionHub {
    hub: Arc<Hub>,
    /// Whose sessions are found; all if there is none.
    owner: Option<Arc<str>>,
}

#[derive(Default)]
struct Hub {
    sessions: Mutex<HashMap<SessionId, Session>>,
    changed: Notify,
}

/// One attached client. Cheap to clone; calls fail once it has gone.
#[derive(Clone)]
pub struct Session(Arc<Attached>);

struct Attached {
    id: SessionId,
    owner: Option<Arc<str>>,
    name: String,
    shared_key: String,
    /// Lower case.
    methods: HashSet<String>,
    tunnel: TunnelChannel,
}

impl SessionHub {
    /// An empty hub.
    pub fn new() -> Self {
        Self::default()
    }

    /// The same hub, in which only the sessions of `owner` are found; all of them if there is none.
    /// What is attached through it belongs to `owner`.
    #[must_use]
    pub fn of_owner(&self, owner: Option<Arc<str>>) -> Self {
        Self { hub: self.hub.clone(), owner }
    }

    /// Whether the session is found here.
    fn sees(&self, session: &Session) -> bool {
        self.owner.is_none() || session.0.owner == self.owner
    }

    /// Attaches the client that calls `Control.Session` with `metadata`; the answer ends when the
    /// session does.
    pub async fn attach(
        &self,
        metadata: &MetadataMap,
        incoming: impl Stream<Item = Result<BytesMessage, Status>> + Send + 'static,
    ) -> Result<Answers<BytesMessage>> {
        let (duplex, answers) = Duplex::answering(incoming);
        self.register(metadata, duplex).await?;
        Ok(answers)
    }

    /// Attaches the client at the other end of `io`, which announced itself with `metadata`. It is
    /// detached when the stream ends or its health checks fail; a newer session with the same id
    /// takes its place.
    pub async fn register(
        &self,
        metadata: &MetadataMap,
        io: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    ) -> Result<Session> {
        let text = |key| {
            metadata
                .get(key)
                .and_then(|v| v.to_str().ok())
                .filter(|v| v.len() <= MAX_VALUE)
                .unwrap_or_default()
        };
        let id = text(headers::SESSION_ID);
        if id.is_empty() {
            return Err(Fault::invalid(format!(
                "attach a session: the request lacks the metadata {}",
                headers::SESSION_ID
            )));
        }
        // An id is nobody's before it is used; while it is, another owner cannot take its place.
        let taken = || {
            let known = self.lock().get(&SessionId(id.into())).cloned();
            known.is_some_and(|s| !s.is_closed() && !self.sees(&s))
        };
        let refused =
            || Err(Fault::new(Code::PermissionDenied, format!("session {id} is somebody else's")));
        if taken() {
            return refused();
        }
        let methods = metadata.get_all(headers::SESSION_METHOD).iter().take(MAX_METHODS);
        let session = Session(Arc::new(Attached {
            id: SessionId(id.into()),
            owner: self.owner.clone(),
            name: text(headers::SESSION_NAME).to_owned(),
            shared_key: text(headers::SESSION_SHARED_KEY).to_owned(),
            methods: methods.filter_map(|m| m.to_str().ok()).map(str::to_lowercase).collect(),
            tunnel: TunnelChannel::connect(io).await?,
        }));
        let policy = HealthPolicy::of(text(headers::SESSION_HEALTH_TIMEOUT));
        tracing::debug!(session = %session.id(), name = session.name(), "session attached");
        {
            let mut sessions = self.lock();
            // Somebody else may have come first meanwhile.
            let known = sessions.get(session.id()).filter(|s| !s.is_closed());
            if known.is_some_and(|known| !self.sees(known)) {
                drop(sessions);
                session.close();
                return refused();
            }
            sessions.insert(session.id().clone(), session.clone());
        }
        self.hub.changed.notify_waiters();

        let span = tracing::info_span!("session", id = %session.id());
        shipway_task::spawn_in(span, self.clone().watch(session.clone(), policy));
        Ok(session)
    }

    /// Waits for the end of `session`, and brings it about when its client does not answer.
    async fn watch(self, session: Session, policy: HealthPolicy) {
        tokio::select! {
            () = session.closed() => {}
            fault = policy.monitor(session.channel()) => tracing::warn!(error = %fault, "session healthcheck failed fatally"),
        }
        session.close();
        let mut sessions = self.lock();
        if sessions.get(session.id()).is_some_and(|s| Arc::ptr_eq(&s.0, &session.0)) {
            sessions.remove(session.id());
        }
        drop(sessions);
        self.hub.changed.notify_waiters();
        tracing::debug!("session ended");
    }

    /// The session `id`, waiting a few seconds for it to be attached.
    pub async fn get(&self, id: &SessionId) -> Result<Session> {
        let found = async {
            loop {
                let changed = self.hub.changed.notified();
                tokio::pin!(changed);
                changed.as_mut().enable();
                if let Some(session) = self.try_get(id) {
                    return session;
                }
                changed.await;
            }
        };
        tokio::time::timeout(PATIENCE, found).await.map_err(|_| {
            Fault::new(
                Code::DeadlineExceeded,
                format!("no active session for {id}: context deadline exceeded"),
            )
            .hint("the client that asked for this build has disconnected")
        })
    }

    /// The session `id`, if it is attached now.
    pub fn try_get(&self, id: &SessionId) -> Option<Session> {
        self.lock().get(id).filter(|s| !s.is_closed() && self.sees(s)).cloned()
    }

    /// Number of attached sessions.
    pub fn len(&self) -> usize {
        self.lock().len()
    }

    /// Whether no client is attached.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Ends every session.
    pub fn close_all(&self) {
        for session in self.lock().values() {
            session.close();
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<SessionId, Session>> {
        self.hub.sessions.lock()
    }
}

impl Session {
    /// Its id.
    pub fn id(&self) -> &SessionId {
        &self.0.id
    }

    /// The name it gave, if any.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// Stable key of the directory that the client works in; empty if it gave none.
    pub fn shared_key(&self) -> &str {
        &self.0.shared_key
    }

    /// Whether the client serves `method`, of the form `/service/Method`, in any case of letters.
    pub fn supports(&self, method: &str) -> bool {
        self.0.methods.contains(&method.to_lowercase())
    }

    /// The connection to the client, for services that have no typed caller here.
    pub fn channel(&self) -> TracedChannel {
        TracedChannel::new(self.0.tunnel.channel(), "client")
    }

    /// Resolves when the client has gone.
    pub fn closed(&self) -> impl Future<Output = ()> + Send + 'static {
        self.0.tunnel.closed()
    }

    /// Whether the client has gone.
    pub fn is_closed(&self) -> bool {
        self.0.tunnel.is_closed()
    }

    /// Detaches the client; calls in flight fail.
    pub fn close(&self) {
        self.0.tunnel.close();
    }
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Session({})", self.id())
    }
}

impl fmt::Debug for SessionHub {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.lock().keys()).finish()
    }
}
