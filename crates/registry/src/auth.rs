//! Who we say we are: challenges remembered, tokens fetched once and renewed before they expire (rows `cb.auth.*`).
//!
//! Secrets and tokens live in header values marked sensitive and in types whose `Debug` hides them; no message names one.

use crate::{
    CredentialSource, Credentials, Token,
    challenge::{self, Challenge},
    error::Kind,
    hosts::{Endpoint, Scheme, is_loopback},
    request::{retry_after, server_words},
    transport::{Client, display_of, full_body, host_of, no_body},
};
use base64::{Engine, prelude::BASE64_STANDARD};
use http::{HeaderMap, HeaderValue, Method, Request, Uri, header};
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use serde::Deserialize;
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt::{self, Write},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::time::Instant;

/// Longest answer of a token server.
const MAX_TOKEN_ANSWER: u64 = 1 << 20;
/// Life of a token whose issuer does not say (distribution's token specification).
const DEFAULT_LIFE: Duration = Duration::from_secs(60);
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

    /// Adds blank-separated scopes; what is no scope is passed over.
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
        let join = |actions: &BTreeSet<String>| actions.iter().map(String::as_str).collect::<Vec<_>>().join(",");
        self.0.iter().map(|((kind, name), actions)| format!("{kind}:{name}:{}", join(actions))).collect()
    }
}

/// What is known for one identity.
#[derive(Default)]
pub(crate) struct AuthStore {
    /// By host and repository.
    challenges: Mutex<HashMap<String, Challenge>>,
    /// By realm, service and scopes; the inner lock makes concurrent requests wait for one fetch.
    tokens: Mutex<HashMap<String, Arc<tokio::sync::Mutex<Option<Cached>>>>>,
}

#[derive(Clone)]
struct Cached {
    sent: Sent,
    renew_at: Instant,
}

/// An `Authorization` header and where it came from.
#[derive(Clone)]
pub(crate) struct Sent {
    pub header: HeaderValue,
    pub with_credentials: bool,
    token_key: Option<String>,
}

impl fmt::Debug for Sent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Sent(…)")
    }
}

/// What to do after a 401.
pub(crate) enum Verdict {
    /// Ask again: a better answer is known now.
    Retry,
    /// There is nothing more to say; the server's reason.
    Denied(String),
}

pub(crate) struct Authorizer {
    pub store: Arc<AuthStore>,
    pub credentials: Arc<dyn CredentialSource>,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
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
    ) -> Result<Option<Sent>, Kind> {
        let known = locked(&self.store.challenges).get(&format!("{}/{repository}", endpoint.authority)).cloned();
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
        sent: Option<&Sent>,
        tries: u32,
    ) -> Verdict {
        let texts = headers.get_all(header::WWW_AUTHENTICATE).iter().filter_map(|v| v.to_str().ok());
        let key = format!("{}/{repository}", endpoint.authority);
        let Some(challenge) = challenge::parse(texts).into_iter().next() else {
            return Verdict::Denied(String::new());
        };
        let reason = match &challenge {
            Challenge::Bearer { error, .. } => error.chars().take(64).collect(),
            Challenge::Basic => String::new(),
        };
        let previous = locked(&self.store.challenges).get(&key).cloned();
        if let Some(token_key) = sent.and_then(|s| s.token_key.as_ref()) {
            locked(&self.store.tokens).remove(token_key);
        }
        // A fresh token or password that is refused, with nothing new in the challenge, will be refused again.
        let same = previous.as_ref() == Some(&challenge);
        let wider = match (&previous, &challenge) {
            (Some(Challenge::Bearer { scope: had, .. }), Challenge::Bearer { scope: wants, .. }) => {
                let (had, mut both) = (Scopes::of([had.as_str()]), Scopes::of([had.as_str()]));
                both.add(wants);
                both != had
            }
            _ => false,
        };
        let is_basic = challenge == Challenge::Basic;
        remember(&mut locked(&self.store.challenges), key, challenge);
        if tries >= 2 || (sent.is_some() && tries >= 1 && !wider) || (sent.is_some() && same && is_basic) {
            return Verdict::Denied(if reason.is_empty() { reason } else { format!("{reason}: authorization failed") });
        }
        Verdict::Retry
    }

    async fn basic(&self, endpoint: &Endpoint) -> Result<Option<Sent>, Kind> {
        let found = self.credentials.credentials(&endpoint.authority).await.map_err(Kind::Local)?;
        Ok(found.filter(|c| !c.username.is_empty() && !c.secret.is_empty()).and_then(|c| {
            let header = basic_header(&c)?;
            Some(Sent { header, with_credentials: true, token_key: None })
        }))
    }

    async fn bearer(&self, client: &Client, endpoint: &Endpoint, realm: &str, service: &str, scopes: &Scopes) -> Result<Sent, Kind> {
        let key = format!("{realm} {service} {} {}", endpoint.authority, scopes.list().join(" "));
        let slot = {
            let mut tokens = locked(&self.store.tokens);
            match tokens.get(&key) {
                Some(slot) => slot.clone(),
                None => {
                    let slot = Arc::default();
                    remember(&mut tokens, key.clone(), Arc::clone(&slot));
                    slot
                }
            }
        };
        let mut slot = slot.lock().await;
        if let Some(cached) = &*slot
            && cached.renew_at > Instant::now()
        {
            return Ok(cached.sent.clone());
        }
        let (token, with_credentials) = self.token(client, endpoint, realm, service, &scopes.list()).await?;
        let life = token.expires_in.unwrap_or(DEFAULT_LIFE);
        let mut header = HeaderValue::try_from(format!("Bearer {}", token.token))
            .map_err(|_| Kind::Auth { why: "the token has characters that headers cannot have".into(), status: None })?;
        header.set_sensitive(true);
        let sent = Sent { header, with_credentials, token_key: Some(key) };
        // Renewed a little early, so that a request that starts now does not arrive with a dead token.
        let renew_at = Instant::now() + life.saturating_sub((life / 4).min(Duration::from_secs(30)));
        *slot = Some(Cached { sent: sent.clone(), renew_at });
        Ok(sent)
    }

    async fn token(
        &self,
        client: &Client,
        endpoint: &Endpoint,
        realm: &str,
        service: &str,
        scopes: &[String],
    ) -> Result<(Token, bool), Kind> {
        let uri: Uri = realm.parse().map_err(|_| Kind::Protocol(format!("the registry names a wrong token server {:?}", cut(realm))))?;
        if !matches!(uri.scheme_str(), Some("http" | "https")) || uri.authority().is_none() {
            return Err(Kind::Protocol(format!("the registry names a wrong token server {:?}", cut(realm))));
        }
        let host = &endpoint.authority;
        if let Some(token) = self.credentials.fetch_token(realm, service, scopes, host).await.map_err(Kind::Local)? {
            return Ok((token, false));
        }
        let credentials = self.credentials.credentials(host).await.map_err(Kind::Local)?.filter(|c| !c.secret.is_empty());
        let asker = Asker { client, uri: &uri, service, scopes };
        let Some(credentials) = credentials else {
            return Ok((asker.get(None, "failed to fetch anonymous token").await?, false));
        };
        let plain = uri.scheme_str() == Some("http") && !is_loopback(uri.host().unwrap_or_default());
        if plain && endpoint.scheme == Scheme::Https {
            return Err(Kind::Auth { why: format!("refusing to send credentials to {} over plain HTTP", host_of(&uri)), status: None });
        }
        match asker.post(&credentials).await {
            // Token servers without OAuth2 answer with one of these (GCR 404, Artifactory 401, ACR 400, others 405).
            Err(Kind::Auth { status: Some(400 | 401 | 404 | 405), .. }) if !credentials.is_identity_token() => {
                Ok((asker.get(Some(&credentials), "failed to fetch oauth token").await?, true))
            }
            other => Ok((other?, true)),
        }
    }
}

fn basic_header(c: &Credentials) -> Option<HeaderValue> {
    let mut header = HeaderValue::try_from(format!("Basic {}", BASE64_STANDARD.encode(format!("{}:{}", c.username, c.secret)))).ok()?;
    header.set_sensitive(true);
    Some(header)
}

fn cut(text: &str) -> String {
    text.chars().take(200).collect()
}

/// One question to a token server.
struct Asker<'a> {
    client: &'a Client,
    uri: &'a Uri,
    service: &'a str,
    scopes: &'a [String],
}

#[derive(Deserialize)]
struct TokenAnswer {
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

impl Asker<'_> {
    /// Distribution's own way: GET with the scopes in the query.
    async fn get(&self, credentials: Option<&Credentials>, what: &str) -> Result<Token, Kind> {
        let mut query = String::new();
        if !self.service.is_empty() {
            let _ = write!(query, "service={}&", encode(self.service));
        }
        for scope in self.scopes {
            let _ = write!(query, "scope={}&", encode(scope));
        }
        let base = self.uri.to_string();
        let joint = if base.contains('?') { '&' } else { '?' };
        let uri: Uri =
            format!("{base}{joint}{}", query.trim_end_matches('&')).parse().map_err(|_| Kind::Protocol("wrong token address".into()))?;
        let mut request = Request::new(no_body());
        *request.method_mut() = Method::GET;
        *request.uri_mut() = uri;
        if let Some(header) = credentials.and_then(basic_header) {
            request.headers_mut().insert(header::AUTHORIZATION, header);
        }
        self.ask(request, what).await
    }

    /// OAuth2's way: POST with a form.
    async fn post(&self, credentials: &Credentials) -> Result<Token, Kind> {
        let mut form = format!("client_id=shipway&service={}&scope={}", encode(self.service), encode(&self.scopes.join(" ")));
        let _ = match credentials.is_identity_token() {
            true => write!(form, "&grant_type=refresh_token&refresh_token={}", encode(&credentials.secret)),
            false => {
                write!(form, "&grant_type=password&username={}&password={}", encode(&credentials.username), encode(&credentials.secret))
            }
        };
        let mut request = Request::new(full_body(form));
        *request.method_mut() = Method::POST;
        *request.uri_mut() = self.uri.clone();
        request.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/x-www-form-urlencoded"));
        self.ask(request, "failed to fetch oauth token").await
    }

    async fn ask(&self, request: Request<crate::transport::Body>, what: &str) -> Result<Token, Kind> {
        let line = format!("{} request to {}", request.method(), display_of(self.uri));
        let failed = |why: String, status| Kind::Auth { why: format!("{what}: {why}"), status };
        let answer = self.client.send(request).await.map_err(|f| match f {
            f @ (crate::transport::Failure::Connect(_) | crate::transport::Failure::Tls(_)) => failed(f.to_string(), None),
            f => f.into(),
        })?;
        let status = answer.head.status;
        let wait = retry_after(&answer.head.headers);
        let body = answer.body.collect(MAX_TOKEN_ANSWER).await?;
        if status.as_u16() == 429 {
            return Err(Kind::TooManyRequests { server: server_words(&body), retry_after: wait });
        }
        if !status.is_success() {
            let words = server_words(&body);
            let words = if words.is_empty() { words } else { format!(": {words}") };
            return Err(failed(format!("unexpected status from {line}: {status}{words}"), Some(status.as_u16())));
        }
        let parsed: TokenAnswer =
            serde_json::from_slice(&body).map_err(|_| failed(format!("{line} was answered with something that is no token"), None))?;
        let token = parsed.access_token.filter(|t| !t.is_empty()).or(parsed.token.filter(|t| !t.is_empty()));
        let token = token.ok_or_else(|| failed("authorization server did not include a token in the response".into(), None))?;
        let expires_in = parsed.expires_in.filter(|s| s.is_finite() && *s > 0.0).map(|s| Duration::from_secs_f64(s.min(1e7)));
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
        assert_eq!(scopes.list(), ["registry:catalog:*", "repository:a/b:pull,push", "repository:h:5/c:pull"]);
    }
}
