//! The port through which a request's credentials come; sessions implement it.

use async_trait::async_trait;
use shipway_fault::Fault;
use std::{fmt, time::Duration};

/// A user name and its secret. An empty name, or `<token>`, makes the secret an identity token
/// (OAuth2 refresh token).
#[derive(Clone, PartialEq, Eq, Default)]
pub struct Credentials {
    /// User name.
    pub username: String,
    /// Password or identity token.
    pub secret: String,
}

impl Credentials {
    /// Whether the secret is an identity token, to be traded for access tokens.
    pub fn is_identity_token(&self) -> bool {
        self.username.is_empty() || self.username == "<token>"
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Credentials({}, …)", self.username)
    }
}

/// An access token for the registry.
#[derive(Clone, PartialEq, Eq)]
pub struct Token {
    /// The token.
    pub token: String,
    /// How long it is good for from now; `None` when its issuer did not say (60 s by the
    /// specification).
    pub expires_in: Option<Duration>,
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Token(…, {:?})", self.expires_in)
    }
}

/// What a source of credentials gave, and whose that is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Given<T> {
    /// What it gave.
    pub what: T,
    /// Whose it is, as in [`CredentialSource::owners`]; anonymous if the source has
    /// one owner alone.
    pub owner: Option<String>,
}

impl<T> Given<T> {
    /// What the one owner of a source gave.
    pub fn alone(what: T) -> Self {
        Self { what, owner: None }
    }
}

/// Where a request's credentials come from (rows `cb.auth.*`).
///
/// `host` is the host that will be asked: `registry-1.docker.io` for Docker Hub, as clients expect.
/// A source that cannot answer returns `Ok(None)`: the request goes on as anonymous.
#[async_trait]
pub trait CredentialSource: Send + Sync + 'static {
    /// User name and secret for `host`.
    async fn credentials(&self, host: &str) -> Result<Option<Given<Credentials>>, Fault>;

    /// A token that the client's machine fetches from `realm`, so that the secret
    /// need not come here.
    async fn fetch_token(
        &self,
        realm: &str,
        service: &str,
        scopes: &[String],
        host: &str,
    ) -> Result<Option<Given<Token>>, Fault> {
        let _ = (realm, service, scopes, host);
        Ok(None)
    }

    /// Whose tokens for `host` the source may use, besides those of its own identity: several
    /// people may stand behind one source, and a token is for who brought it. Names are shared
    /// among sources; a source must be sure of the names it gives.
    async fn owners(&self, host: &str) -> Result<Vec<String>, Fault> {
        let _ = host;
        Ok(Vec::new())
    }

    /// Names whose credentials these are: challenges, and tokens of anonymous requests, are
    /// shared among sources that give the same name (for example a session's id), and with no other
    /// when there is none.
    fn identity(&self) -> Option<String> {
        None
    }
}

/// No credentials.
#[derive(Clone, Copy, Debug, Default)]
pub struct Anonymous;

#[async_trait]
impl CredentialSource for Anonymous {
    async fn credentials(&self, _host: &str) -> Result<Option<Given<Credentials>>, Fault> {
        Ok(None)
    }

    fn identity(&self) -> Option<String> {
        Some("anonymous".into())
    }
}
