//! Authentication: challenges remembered, tokens fetched once and renewed before they expire
//! (rows `cb.auth.*`).
//!
//! Secrets and tokens live in header values marked sensitive and in types whose `Debug` hides them;
//! no message names one.

use crate::{
    CredentialSource, Credentials, Given, Token,
    challenge::{self, Challenge},
    endpoint::{Endpoint, Scheme},
    error::Kind,
    failure::{message_in, retry_after},
};
use base64::{Engine, prelude::BASE64_STANDARD};
use http::{HeaderMap, HeaderValue, Method, Request, Uri, header};
use parking_lot::Mutex;
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use serde::Deserialize;
use shipway_http::{Body, Client, HttpError, display_of, full_body, host_of, is_loopback, no_body};
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt::{self, Write},
    sync::{Arc, Weak},
    time::Duration,
};
use tokio::time::Instant;

/// Longest answer of a token server.
const MAX_TOKEN_RESPONSE: u64 = 1 << 20;
/// Lifetime of a token whose issuer does not give one (distribution's token specification).
const DEFAULT_LIFE: Duration = Duration::from_secs(60);
/// Most identities whose tokens are kept.
const MAX_IDENTITIES: usize = 128;
/// Most tokens and challenges that are remembered for one identity.
const MAX_REMEMBERED: usize = 4096;

/// What a token is for: `type:name:actions`, merged so that each thing occurs once.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Scopes(BTreeMap<(String, String), BTreeSet<String>>);

impl Scopes {
    pub(crate) fn of<'a>(texts: impl IntoIterator<Item = &'a str>) -> Self {
        let mut scopes = Self::default();
        texts.into_iter().for_each(|t| scopes.add(t));
        scopes
    }

    /// Adds blank-separated scopes; invalid scopes are skipped.
    pub(crate) fn add(&mut self, text: &str) {
        for scope in text.split_whitespace().take(64) {
            if let Some((kind, rest)) = scope.split_once(':')
                && let Some((name, actions)) = rest.rsplit_once(':')
            {
                let known = self.0.entry((kind.to_owned(), name.to_owned())).or_default();
                known.extend(actions.split(',').filter(|a| !a.is_empty()).map(str::to_owned));
            }
        }
    }

    pub(crate) fn list(&self) -> Vec<String> {
        let join = |actions: &BTreeSet<String>| {
            actions.iter().map(String::as_str).collect::<Vec<_>>().join(",")
        };
        self.0
            .iter()
            .map(|((kind, name), actions)| format!("{kind}:{name}:{}", join(actions)))
            .collect()
    }
}

/// What is known for one identity.
#[derive(Default)]
pub(crate) struct AuthStore {
    /// By host and repository.
    challenges: Mutex<HashMap<String, Challenge>>,
    /// By realm, service, host and scopes.
    tokens: Mutex<HashMap<String, Cached>>,
    /// By the same: concurrent requests wait for one fetch.
    turns: Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>,
}

/// What is known, by identity.
#[derive(Default)]
pub(crate) struct AuthStores(Mutex<Vec<(String, Arc<AuthStore>)>>);

impl AuthStores {
    pub(crate) fn of(&self, identity: Option<String>) -> Arc<AuthStore> {
        let Some(identity) = identity else { return Arc::default() };
        let mut stores = self.0.lock();
        let at = stores.iter().position(|(name, _)| *name == identity);
        let entry = match at {
            Some(at) => stores.remove(at),
            None => (identity, Arc::default()),
        };
        if stores.len() >= MAX_IDENTITIES {
            stores.remove(0);
        }
        let store = entry.1.clone();
        stores.push(entry);
        store
    }
}

impl AuthStore {
    /// The token under `key`, if it is still good.
    fn token(&self, key: &str) -> Option<AuthHeader> {
        self.tokens
            .lock()
            .get(key)
            .filter(|cached| cached.renew_at > Instant::now())
            .map(|cached| cached.sent.clone())
    }

    fn turn(&self, key: &str) -> Arc<tokio::sync::Mutex<()>> {
        let mut turns = self.turns.lock();
        if let Some(turn) = turns.get(key) {
            return turn.clone();
        }
        let turn = Arc::default();
        remember(&mut turns, key.to_owned(), Arc::clone(&turn));
        turn
    }
}

#[derive(Clone)]
struct Cached {
    sent: AuthHeader,
    renew_at: Instant,
}

/// An `Authorization` header and where it came from.
#[derive(Clone)]
pub(crate) struct AuthHeader {
    pub header: HeaderValue,
    pub with_credentials: bool,
    /// Where the token is kept, and under which key.
    kept: Option<(Weak<AuthStore>, String)>,
}

impl fmt::Debug for AuthHeader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("AuthHeader(…)")
    }
}

/// What to do after a 401.
pub(crate) enum ChallengeOutcome {
    /// Send again: a better credential is known now.
    Retry,
    /// No other credentials to try; the server's reason.
    Denied(String),
}

pub(crate) struct Authorizer {
    pub stores: Arc<AuthStores>,
    pub store: Arc<AuthStore>,
    pub credentials: Arc<dyn CredentialSource>,
}

fn remember<V>(map: &mut HashMap<String, V>, key: String, value: V) {
    if map.len() >= MAX_REMEMBERED {
        map.clear();
    }
    map.insert(key, value);
}

impl Authorizer {
    /// The header for a request to `endpoint`, if something is known of what it wants.
    pub(crate) async fn header(
        &self,
        client: &Client,
        endpoint: &Endpoint,
        repository: &str,
        scopes: &Scopes,
    ) -> Result<Option<AuthHeader>, Kind> {
        let known = self
            .store
            .challenges
            .lock()
            .get(&format!("{}/{repository}", endpoint.authority))
            .cloned();
        match known {
            None => Ok(None),
            Some(Challenge::Basic) => self.basic(endpoint).await,
            Some(Challenge::Bearer { realm, service, scope, .. }) => {
                let mut scopes = scopes.clone();
                scopes.add(&scope);
                self.bearer(client, endpoint, &realm, &service, &scopes).await.map(Some)
            }
        }
    }

    /// Learns from a 401. `sent` is the header that was refused.
    pub(crate) fn challenged(
        &self,
        endpoint: &Endpoint,
        repository: &str,
        headers: &HeaderMap,
        sent: Option<&AuthHeader>,
        tries: u32,
    ) -> ChallengeOutcome {
        let texts =
            headers.get_all(header::WWW_AUTHENTICATE).iter().filter_map(|v| v.to_str().ok());
        let key = format!("{}/{repository}", endpoint.authority);
        let Some(challenge) = challenge::parse(texts).into_iter().next() else {
            return ChallengeOutcome::Denied(String::new());
        };
        let reason = match &challenge {
            Challenge::Bearer { error, .. } => error.chars().take(64).collect(),
            Challenge::Basic => String::new(),
        };
        let previous = self.store.challenges.lock().get(&key).cloned();
        if let Some((store, token_key)) = sent.and_then(|s| s.kept.as_ref())
            && let Some(store) = store.upgrade()
        {
            store.tokens.lock().remove(token_key);
        }
        // A fresh token or password that is refused, with nothing new in the challenge, will be
        // refused again.
        let same = previous.as_ref() == Some(&challenge);
        let wider = match (&previous, &challenge) {
            (
                Some(Challenge::Bearer { scope: had, .. }),
                Challenge::Bearer { scope: wants, .. },
            ) => {
                let (had, mut both) = (Scopes::of([had.as_str()]), Scopes::of([had.as_str()]));
                both.add(wants);
                both != had
            }
            _ => false,
        };
        let is_basic = challenge == Challenge::Basic;
        remember(&mut self.store.challenges.lock(), key, challenge);
        if tries >= 2
            || (sent.is_some() && tries >= 1 && !wider)
            || (sent.is_some() && same && is_basic)
        {
            return ChallengeOutcome::Denied(if reason.is_empty() {
                reason
            } else {
                format!("{reason}: authorization failed")
            });
        }
        ChallengeOutcome::Retry
    }

    async fn basic(&self, endpoint: &Endpoint) -> Result<Option<AuthHeader>, Kind> {
        let found = self.credentials.credentials(&endpoint.authority).await.map_err(Kind::Local)?;
        Ok(found
            .map(|given| given.what)
            .filter(|c| !c.username.is_empty() && !c.secret.is_empty())
            .and_then(|c| {
                let header = basic_header(&c)?;
                Some(AuthHeader { header, with_credentials: true, kept: None })
            }))
    }

    async fn bearer(
        &self,
        client: &Client,
        endpoint: &Endpoint,
        realm: &str,
        service: &str,
        scopes: &Scopes,
    ) -> Result<AuthHeader, Kind> {
        let key = format!("{realm} {service} {} {}", endpoint.authority, scopes.list().join(" "));
        let owners = self.credentials.owners(&endpoint.authority).await.map_err(Kind::Local)?;
        let mut stores: Vec<Arc<AuthStore>> =
            owners.into_iter().map(|owner| self.stores.of(Some(owner))).collect();
        stores.push(self.store.clone());
        let turn = stores[0].turn(&key);
        let _turn = turn.lock().await;
        if let Some(sent) = stores.iter().find_map(|store| store.token(&key)) {
            return Ok(sent);
        }
        let (Given { what: token, owner }, with_credentials) =
            self.token(client, endpoint, realm, service, &scopes.list()).await?;
        let store = owner.map_or_else(|| self.store.clone(), |owner| self.stores.of(Some(owner)));
        let life = token.expires_in.unwrap_or(DEFAULT_LIFE);
        let mut header =
            HeaderValue::try_from(format!("Bearer {}", token.token)).map_err(|_| Kind::Auth {
                why: "the token has characters that headers cannot have".into(),
                status: None,
            })?;
        header.set_sensitive(true);
        let sent = AuthHeader {
            header,
            with_credentials,
            kept: Some((Arc::downgrade(&store), key.clone())),
        };
        // Renewed a little early, so that a request that starts now does not arrive with a dead
        // token.
        let renew_at =
            Instant::now() + life.saturating_sub((life / 4).min(Duration::from_secs(30)));
        remember(&mut store.tokens.lock(), key, Cached { sent: sent.clone(), renew_at });
        Ok(sent)
    }

    async fn token(
        &self,
        client: &Client,
        endpoint: &Endpoint,
        realm: &str,
        service: &str,
        scopes: &[String],
    ) -> Result<(Given<Token>, bool), Kind> {
        let uri = token_server(realm)?;
        let host = &endpoint.authority;
        if let Some(token) =
            self.credentials.fetch_token(realm, service, scopes, host).await.map_err(Kind::Local)?
        {
            return Ok((token, false));
        }
        let credentials = self
            .credentials
            .credentials(host)
            .await
            .map_err(Kind::Local)?
            .filter(|c| !c.what.secret.is_empty());
        let tokens = TokenClient { client, uri: &uri, client_id: "shipway", service, scopes };
        let Some(Given { what: credentials, owner }) = credentials else {
            return Ok((
                Given::alone(tokens.get(None, "failed to fetch anonymous token").await?),
                false,
            ));
        };
        let plain =
            uri.scheme_str() == Some("http") && !is_loopback(uri.host().unwrap_or_default());
        if plain && endpoint.scheme == Scheme::Https {
            return Err(Kind::Auth {
                why: format!("refusing to send credentials to {} over plain HTTP", host_of(&uri)),
                status: None,
            });
        }
        Ok((Given { what: tokens.with(&credentials).await?, owner }, true))
    }
}

/// The address of a token server.
pub(crate) fn token_server(realm: &str) -> Result<Uri, Kind> {
    let wrong =
        || Kind::Protocol(format!("the registry names a wrong token server {:?}", cut(realm)));
    let uri: Uri = realm.parse().map_err(|_| wrong())?;
    let check_status =
        matches!(uri.scheme_str(), Some("http" | "https")) && uri.authority().is_some();
    if check_status { Ok(uri) } else { Err(wrong()) }
}

fn basic_header(c: &Credentials) -> Option<HeaderValue> {
    let mut header = HeaderValue::try_from(format!(
        "Basic {}",
        BASE64_STANDARD.encode(format!("{}:{}", c.username, c.secret))
    ))
    .ok()?;
    header.set_sensitive(true);
    Some(header)
}

fn cut(text: &str) -> String {
    text.chars().take(200).collect()
}

/// One question to a token server.
pub(crate) struct TokenClient<'a> {
    pub client: &'a Client,
    pub uri: &'a Uri,
    /// How we call ourselves.
    pub client_id: &'a str,
    pub service: &'a str,
    pub scopes: &'a [String],
}

#[derive(Deserialize)]
struct TokenResponse {
    #[serde(default)]
    token: Option<String>,
    #[serde(default)]
    access_token: Option<String>,
    #[serde(default)]
    expires_in: Option<f64>,
}

fn encode(text: &str) -> impl fmt::Display + '_ {
    utf8_percent_encode(text, NON_ALPHANUMERIC)
}

impl TokenClient<'_> {
    /// Trades credentials for a token.
    pub(crate) async fn with(&self, credentials: &Credentials) -> Result<Token, Kind> {
        match self.post(credentials).await {
            // Token servers without OAuth2 answer with one of these (GCR 404, Artifactory 401, ACR
            // 400, others 405).
            Err(Kind::Auth { status: Some(400 | 401 | 404 | 405), .. })
                if !credentials.is_identity_token() =>
            {
                self.get(Some(credentials), "failed to fetch oauth token").await
            }
            other => other,
        }
    }

    /// Distribution's own way: GET with the scopes in the query.
    pub(crate) async fn get(
        &self,
        credentials: Option<&Credentials>,
        what: &str,
    ) -> Result<Token, Kind> {
        let mut query = String::new();
        if !self.service.is_empty() {
            let _ = write!(query, "service={}&", encode(self.service));
        }
        for scope in self.scopes {
            let _ = write!(query, "scope={}&", encode(scope));
        }
        let base = self.uri.to_string();
        let joint = if base.contains('?') { '&' } else { '?' };
        let uri: Uri = format!("{base}{joint}{}", query.trim_end_matches('&'))
            .parse()
            .map_err(|_| Kind::Protocol("wrong token address".into()))?;
        let mut request = Request::new(no_body());
        *request.method_mut() = Method::GET;
        *request.uri_mut() = uri;
        if let Some(header) = credentials.and_then(basic_header) {
            request.headers_mut().insert(header::AUTHORIZATION, header);
        }
        self.fetch(request, what).await
    }

    /// OAuth2's way: POST with a form.
    async fn post(&self, credentials: &Credentials) -> Result<Token, Kind> {
        let mut form = format!(
            "client_id={}&service={}&scope={}",
            self.client_id,
            encode(self.service),
            encode(&self.scopes.join(" "))
        );
        let _ = match credentials.is_identity_token() {
            true => write!(
                form,
                "&grant_type=refresh_token&refresh_token={}",
                encode(&credentials.secret)
            ),
            false => {
                write!(
                    form,
                    "&grant_type=password&username={}&password={}",
                    encode(&credentials.username),
                    encode(&credentials.secret)
                )
            }
        };
        let mut request = Request::new(full_body(form));
        *request.method_mut() = Method::POST;
        *request.uri_mut() = self.uri.clone();
        request.headers_mut().insert(
            header::CONTENT_TYPE,
            HeaderValue::from_static("application/x-www-form-urlencoded"),
        );
        self.fetch(request, "failed to fetch oauth token").await
    }

    async fn fetch(&self, request: Request<Body>, what: &str) -> Result<Token, Kind> {
        let line = format!("{} request to {}", request.method(), display_of(self.uri));
        let failed = |why: String, status| Kind::Auth { why: format!("{what}: {why}"), status };
        let response = self.client.send(request).await.map_err(|f| match f {
            f @ (HttpError::Connect(_) | HttpError::Tls(_)) => failed(f.to_string(), None),
            f => f.into(),
        })?;
        let status = response.head.status;
        let wait = retry_after(&response.head.headers);
        let body = response.body.collect(MAX_TOKEN_RESPONSE).await?;
        if status.as_u16() == 429 {
            return Err(Kind::TooManyRequests { server: message_in(&body), retry_after: wait });
        }
        if !status.is_success() {
            let words = message_in(&body);
            let words = if words.is_empty() { words } else { format!(": {words}") };
            return Err(failed(
                format!("unexpected status from {line}: {status}{words}"),
                Some(status.as_u16()),
            ));
        }
        let parsed: TokenResponse = serde_json::from_slice(&body)
            .map_err(|_| failed(format!("{line} did not return a valid token"), None))?;
        let token = parsed
            .access_token
            .filter(|t| !t.is_empty())
            .or(parsed.token.filter(|t| !t.is_empty()));
        let token = token.ok_or_else(|| {
            failed("authorization server did not include a token in the response".into(), None)
        })?;
        let expires_in = parsed
            .expires_in
            .filter(|s| s.is_finite() && *s > 0.0)
            .map(|s| Duration::from_secs_f64(s.min(1e7)));
        Ok(Token { token, expires_in })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scopes_are_merged() {
        let mut scopes = Scopes::of(["repository:a/b:pull", "repository:h:5/c:pull"]);
        scopes.add("repository:a/b:push,pull registry:catalog:* nonsense");
        assert_eq!(
            scopes.list(),
            ["registry:catalog:*", "repository:a/b:pull,push", "repository:h:5/c:pull"]
        );
    }
}
