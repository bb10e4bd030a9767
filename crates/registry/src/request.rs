//! One question to a repository: endpoints in turn, authentication, retries within a budget.

use crate::{
    Error, Repository,
    auth::{Scopes, Sent, Verdict},
    error::Kind,
    hosts::{Endpoint, Scheme},
    limit::{Load, Permit},
    repository::Mode,
};
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request, StatusCode, Uri, header};
use shipway_http::{Client, HttpError, Response, display_of, full_body, no_body};
use std::time::Duration;
use tokio::time::Instant;

/// Longest error document that is read.
const MAX_ERROR_BODY: u64 = 64 << 10;
/// Most characters of a server's words that are repeated.
const MAX_WORDS: usize = 400;
/// Most tries at one endpoint.
const MAX_TRIES: u32 = 5;

/// What an endpoint must be able to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Need {
    Pull,
    Resolve,
    Push,
}

/// A question.
#[derive(Clone, Debug)]
pub(crate) struct Ask {
    pub method: Method,
    /// What follows the repository's name, such as `manifests/latest`.
    pub tail: String,
    pub query: String,
    pub headers: HeaderMap,
    pub body: Bytes,
    pub need: Need,
    pub load: Load,
    /// Scopes besides the repository's own.
    pub scopes: Vec<String>,
    /// For errors: `resolve`, `fetch sha256:…`.
    pub action: String,
    /// Whether the last endpoint is asked again after a failure that may pass.
    pub retry: bool,
}

impl Ask {
    pub(crate) fn new(
        method: Method,
        tail: impl Into<String>,
        need: Need,
        action: impl Into<String>,
    ) -> Self {
        Self {
            method,
            tail: tail.into(),
            query: String::new(),
            headers: HeaderMap::new(),
            body: Bytes::new(),
            need,
            load: Load::Light,
            scopes: Vec::new(),
            action: action.into(),
            retry: true,
        }
    }

    pub(crate) fn header(mut self, name: header::HeaderName, value: &str) -> Self {
        if let Ok(value) = HeaderValue::from_str(value) {
            self.headers.insert(name, value);
        }
        self
    }
}

/// A good answer (2xx), who gave it, and its place at that host.
#[derive(Debug)]
pub(crate) struct Reply {
    pub answer: Response,
    pub endpoint: Endpoint,
    pub permit: Permit,
}

impl Repository {
    /// Asks mirrors and then the origin; the first good answer wins. The origin's failure is the
    /// one that is told.
    pub(crate) async fn ask(&self, ask: &Ask) -> Result<Reply, Error> {
        let endpoints = self.endpoints(ask.need).await?;
        let mut earlier = Vec::new();
        for (i, endpoint) in endpoints.iter().enumerate() {
            let last = i + 1 == endpoints.len();
            let permit = self.registry().limits.enter(&endpoint.authority, ask.load).await;
            match self.ask_at(endpoint, ask, last && ask.retry).await {
                Ok(answer) => return Ok(Reply { answer, endpoint: endpoint.clone(), permit }),
                Err(kind) => {
                    let error = Error::new(self.name(), &endpoint.authority, &ask.action, kind);
                    if last || matches!(error.kind(), Kind::Local(_)) {
                        return Err(error.after(earlier));
                    }
                    tracing::info!(host = %endpoint.authority, %error, "mirror failed, trying the next host");
                    earlier.push(format!("the mirror {}: {error}", endpoint.authority));
                }
            }
        }
        Err(Error::new(
            self.name(),
            self.name().registry(),
            &ask.action,
            Kind::Config(
                format!("no configured host may be asked to {:?}", ask.need).to_lowercase(),
            ),
        ))
    }

    /// Asks one endpoint, again if the failure may pass and there is time.
    async fn ask_at(&self, endpoint: &Endpoint, ask: &Ask, retry: bool) -> Result<Response, Kind> {
        let client = self.registry().client(endpoint).await?;
        let timing = self.registry().config.timing;
        let (started, mut pause) = (Instant::now(), timing.backoff);
        let mut tries = 1;
        loop {
            let kind = match self.once(&client, endpoint, ask).await {
                Ok(answer) => return Ok(answer),
                Err(kind) => kind,
            };
            let wait = match &kind {
                Kind::TooManyRequests { retry_after: Some(after), .. } => {
                    (*after).max(timing.backoff.min(Duration::from_millis(100)))
                }
                _ => pause,
            };
            if !retry
                || !kind.is_transient()
                || tries >= MAX_TRIES
                || started.elapsed() + wait > timing.budget
            {
                return Err(kind);
            }
            tracing::debug!(host = %endpoint.authority, action = %ask.action, ?kind, "trying again in {wait:?}");
            tokio::time::sleep(wait).await;
            pause = (pause * 2).min(timing.max_backoff);
            tries += 1;
        }
    }

    /// Asks once, answering challenges.
    pub(crate) async fn once(
        &self,
        client: &Client,
        endpoint: &Endpoint,
        ask: &Ask,
    ) -> Result<Response, Kind> {
        let scopes = self.scopes(endpoint, ask.need, &ask.scopes);
        let mut tries = 0;
        loop {
            let sent =
                self.auth().header(client, endpoint, self.name().repository(), &scopes).await?;
            let answer = match self.send(client, endpoint, ask, sent.as_ref()).await {
                Err(HttpError::NotTls(why)) if self.registry().speak_plain(endpoint) => {
                    tracing::info!(host = %endpoint.authority, why, "falling back to plain HTTP");
                    continue;
                }
                other => other?,
            };
            // Another host's challenge (after a redirect) is not for the registry's credentials.
            let ours = answer.uri.authority().is_some_and(|a| a.as_str() == endpoint.authority);
            if answer.head.status == StatusCode::UNAUTHORIZED && ours {
                match self.auth().challenged(
                    endpoint,
                    self.name().repository(),
                    &answer.head.headers,
                    sent.as_ref(),
                    tries,
                ) {
                    Verdict::Retry => tries += 1,
                    Verdict::Denied(reason) => {
                        return Err(denied(answer, reason, sent.as_ref()).await);
                    }
                }
                continue;
            }
            return good(answer, &ask.method).await;
        }
    }

    async fn send(
        &self,
        client: &Client,
        endpoint: &Endpoint,
        ask: &Ask,
        sent: Option<&Sent>,
    ) -> Result<Response, HttpError> {
        let uri = self.uri(endpoint, ask)?;
        let headers = self.headers(endpoint, &ask.headers, sent);
        if ask.method == Method::GET || ask.method == Method::HEAD {
            return client.fetch(ask.method.clone(), uri, headers).await;
        }
        let body = if ask.body.is_empty() { no_body() } else { full_body(ask.body.clone()) };
        let mut request = Request::new(body);
        (*request.method_mut(), *request.uri_mut(), *request.headers_mut()) =
            (ask.method.clone(), uri, headers);
        if ask.body.is_empty() {
            request.headers_mut().insert(header::CONTENT_LENGTH, HeaderValue::from_static("0"));
        }
        client.send(request).await
    }

    pub(crate) fn headers(
        &self,
        endpoint: &Endpoint,
        own: &HeaderMap,
        sent: Option<&Sent>,
    ) -> HeaderMap {
        let mut headers = endpoint.headers.clone();
        if let Ok(agent) = HeaderValue::from_str(&self.registry().config.user_agent) {
            headers.entry(header::USER_AGENT).or_insert(agent);
        }
        for (name, value) in own {
            headers.insert(name.clone(), value.clone());
        }
        if let Some(sent) = sent {
            headers.insert(header::AUTHORIZATION, sent.header.clone());
        }
        headers
    }

    fn uri(&self, endpoint: &Endpoint, ask: &Ask) -> Result<Uri, HttpError> {
        let scheme = self.registry().scheme(endpoint);
        let mut query = ask.query.clone();
        if let Some(registry) = &endpoint.stands_for {
            query = format!("ns={registry}{}{query}", if query.is_empty() { "" } else { "&" });
        }
        let mark = if query.is_empty() { "" } else { "?" };
        let text = format!(
            "{scheme}://{}{}/{}/{}{mark}{query}",
            endpoint.authority,
            endpoint.path,
            self.name().repository(),
            ask.tail
        );
        text.parse().map_err(|_| HttpError::Protocol(format!("{text:?} is no address")))
    }

    pub(crate) fn scopes(&self, endpoint: &Endpoint, need: Need, more: &[String]) -> Scopes {
        let repository = match endpoint.prefix() {
            "" => self.name().repository().to_owned(),
            prefix => format!("{prefix}/{}", self.name().repository()),
        };
        // A pusher asks for both from the start: a token for reading would have to be replaced at
        // once.
        let push = need == Need::Push || self.mode() == Mode::Push;
        let own = format!(
            "repository:{repository}:pull{}",
            if push && endpoint.capabilities.push { ",push" } else { "" }
        );
        Scopes::of([own.as_str()].into_iter().chain(more.iter().map(String::as_str)))
    }
}

impl Endpoint {
    pub(crate) fn can(&self, need: Need) -> bool {
        let c = self.capabilities;
        match need {
            Need::Pull => c.pull,
            Need::Resolve => c.pull && c.resolve,
            Need::Push => c.push,
        }
    }

    pub(crate) fn may_be_plain(&self) -> bool {
        self.scheme == Scheme::Either
    }
}

/// Lets 2xx through and makes an error of everything else.
pub(crate) async fn good(answer: Response, method: &Method) -> Result<Response, Kind> {
    let status = answer.head.status;
    if status.is_success() {
        return Ok(answer);
    }
    let request = format!("{method} request to {}", display_of(&answer.uri));
    let wait = retry_after(&answer.head.headers);
    let server = words_of(answer).await;
    Err(match status.as_u16() {
        404 => Kind::NotFound,
        401 => Kind::Unauthorized { server, with_credentials: false },
        403 => Kind::Forbidden { server },
        429 => Kind::TooManyRequests { server, retry_after: wait },
        status => Kind::Status { status, request, server },
    })
}

pub(crate) async fn denied(answer: Response, reason: String, sent: Option<&Sent>) -> Kind {
    let with_credentials = sent.is_some_and(|s| s.with_credentials);
    let words = words_of(answer).await;
    Kind::Unauthorized { server: if reason.is_empty() { words } else { reason }, with_credentials }
}

/// The server's words on an error; nothing when they cannot be had.
async fn words_of(answer: Response) -> String {
    server_words(&answer.body.collect(MAX_ERROR_BODY).await.unwrap_or_default())
}

/// When a server wants to be asked again, if it says so in seconds.
pub(crate) fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get(header::RETRY_AFTER)?.to_str().ok()?.trim();
    text.parse::<u32>().ok().map(|s| Duration::from_secs(s.into()))
}

/// A short, printable form of an error document: the specification's `errors` list, a token
/// server's `details`, or plain text.
pub(crate) fn server_words(body: &[u8]) -> String {
    let text = match serde_json::from_slice::<serde_json::Value>(body) {
        Ok(json) => json_words(&json),
        Err(_) => {
            let text = String::from_utf8_lossy(body);
            let text = text.trim();
            if text.starts_with('<') { String::new() } else { text.to_owned() }
        }
    };
    let clean: String =
        text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(MAX_WORDS + 1).collect();
    match clean.char_indices().nth(MAX_WORDS) {
        Some((end, _)) => format!("{}…", &clean[..end]),
        None => clean,
    }
}

fn json_words(json: &serde_json::Value) -> String {
    let word = |v: &serde_json::Value, key: &str| {
        v.get(key).and_then(|w| w.as_str()).unwrap_or_default().trim().to_owned()
    };
    let list = json.get("errors").and_then(|e| e.as_array()).map(Vec::as_slice).unwrap_or_default();
    let said: Vec<String> = list
        .iter()
        .take(5)
        .map(|e| match (word(e, "code").to_lowercase().replace('_', " "), word(e, "message")) {
            (code, message) if message.is_empty() => code,
            (code, message) if code.is_empty() => message,
            (code, message) => format!("{code}: {message}"),
        })
        .collect();
    if !said.is_empty() {
        return said.join("; ");
    }
    ["error_description", "details", "message", "error"]
        .iter()
        .map(|k| word(json, k))
        .find(|w| !w.is_empty())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn server_words_are_short_and_printable() {
        for (body, want) in [
            (
                r#"{"errors":[{"code":"MANIFEST_UNKNOWN","message":"manifest unknown"},{"code":"DENIED"}]}"#,
                "manifest unknown: manifest unknown; denied",
            ),
            (r#"{"details":"incorrect username or password"}"#, "incorrect username or password"),
            ("plain\x1b[31m text\n", "plain [31m text"),
            ("<html>…", ""),
            ("", ""),
            ("[1,2]", ""),
        ] {
            assert_eq!(server_words(body.as_bytes()), want, "{body}");
        }
        assert_eq!(server_words("x".repeat(10_000).as_bytes()).chars().count(), MAX_WORDS + 1);
    }
}
