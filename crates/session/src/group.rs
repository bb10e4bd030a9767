//! The clients that wait for one piece of work (row `ses.any`).

use shipway_fault::{Code, Fault, Result};

use crate::{Session, SessionHub, SessionId};

/// Sessions any of which may answer. Cheap to clone.
#[derive(Clone, Debug)]
pub struct SessionGroup {
    hub: SessionHub,
    ids: Vec<SessionId>,
}

impl SessionGroup {
    /// The sessions `ids` of `hub`; doubles and empty ids are dropped.
    pub fn new(hub: SessionHub, ids: impl IntoIterator<Item = SessionId>) -> Self {
        let mut kept: Vec<SessionId> = Vec::new();
        for id in ids {
            if !id.as_str().is_empty() && !kept.contains(&id) {
                kept.push(id);
            }
        }
        Self { hub, ids: kept }
    }

    /// Its members.
    pub fn ids(&self) -> &[SessionId] {
        &self.ids
    }

    /// The hub they are attached to.
    pub fn hub(&self) -> &SessionHub {
        &self.hub
    }

    /// Tries `f` with one session after the other until it succeeds; if it never does, gives its
    /// last error.
    pub async fn any<T, F, R>(&self, mut f: F) -> Result<T>
    where
        F: FnMut(Session) -> R,
        R: Future<Output = Result<T>>,
    {
        let mut last = None;
        for id in &self.ids {
            let tried = match self.hub.get(id).await {
                Ok(session) => f(session).await,
                Err(fault) => Err(fault),
            };
            match tried {
                Ok(value) => return Ok(value),
                Err(fault) => last = Some(fault),
            }
        }
        Err(last.unwrap_or_else(|| Fault::new(Code::FailedPrecondition, "no active sessions")))
    }
}
