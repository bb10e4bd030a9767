//! One question to a repository: endpoints in turn, authentication, retries within a budget.

use crate::{
    Error, Repository,
    auth::{AuthHeader, ChallengeOutcome, Scopes},
    endpoint::{Capability, Endpoint},
    error::Kind,
    limit::{Permit, Priority},
    repository::Mode,
};
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request, StatusCode, Uri, header};
use shipway_http::{Client, HttpError, Response, display_of, full_body, no_body};
use std::time::{Duration, SystemTime};
use tokio::time::Instant;

/// Longest error document that is read.
const MAX_ERROR_BODY: u64 = 64 << 10;
/// Most characters of a server's words that are repeated.
const MAX_WORDS: usize = 400;
/// Most tries at one endpoint.
const MAX_TRIES: u32 = 5;

/// A question.
#[derive(Clone, Debug)]
pub(crate) struct ApiRequest {
    pub method: Method,
    /// What follows the repository's name, such as `manifests/latest`.
    pub tail: String,
    pub query: String,
    pub headers: HeaderMap,
    pub body: Bytes,
    pub need: Capability,
    pub load: Priority,
    /// Scopes besides the repository's own.
    pub scopes: Vec<String>,
    /// For errors: `resolve`, `fetch sha256:…`.
    pub action: String,
    /// Whether the last endpoint is asked again after a failure that may pass.
    pub retry: bool,
}

impl ApiRequest {
    pub(crate) fn new(
        method: Method,
        tail: impl Into<String>,
        need: Capability,
        action: impl Into<String>,
    ) -> Self {
        Self {
            method,
            tail: tail.into(),
            query: String::new(),
            headers: HeaderMap::new(),
            body: Bytes::new(),
            need,
            load: Priority::Light,
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
    pub response: Response,
    pub endpoint: Endpoint,
    pub permit: Permit,
}

impl Repository {
    /// Asks mirrors and then the origin; the first good answer wins. The origin's failure is the
    /// one that is returned.
    pub(crate) async fn request(&self, request: &ApiRequest) -> Result<Reply, Error> {
        let endpoints = self.endpoints(request.need).await?;
        let mut earlier = Vec::new();
        for (i, endpoint) in endpoints.iter().enumerate() {
            let last = i + 1 == endpoints.len();
            let permit = self.registry().limits.enter(&endpoint.authority, request.load).await;
            match self.request_at(endpoint, request, last && request.retry).await {
                Ok(response) => return Ok(Reply { response, endpoint: endpoint.clone(), permit }),
                Err(kind) => {
                    let error = Error::new(self.name(), &endpoint.authority, &request.action, kind);
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
            &request.action,
            Kind::Config(
                format!("no configured host may be asked to {:?}", request.need).to_lowercase(),
            ),
        ))
    }

    /// Asks one endpoint, again if the failure may pass and there is time.
    async fn request_at(
        &self,
        endpoint: &Endpoint,
        request: &ApiRequest,
        retry: bool,
    ) -> Result<Response, Kind> {
        let client = self.registry().client(endpoint).await?;
        let timing = self.registry().config.timing;
        let (started, mut pause) = (Instant::now(), timing.backoff);
        let mut tries = 1;
        loop {
            let kind = match self.send_authenticated(&client, endpoint, request).await {
                Ok(response) => return Ok(response),
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
            tracing::debug!(host = %endpoint.authority, action = %request.action, ?kind, "trying again in {wait:?}");
            tokio::time::sleep(wait).await;
            pause = (pause * 2).min(timing.max_backoff);
            tries += 1;
        }
    }

    /// Asks once, answering challenges.
    pub(crate) async fn send_authenticated(
        &self,
        client: &Client,
        endpoint: &Endpoint,
        request: &ApiRequest,
    ) -> Result<Response, Kind> {
        let scopes = self.scopes(endpoint, request.need, &request.scopes);
        let mut tries = 0;
        loop {
            let sent =
                self.auth().header(client, endpoint, self.name().repository(), &scopes).await?;
            let response = match self.send(client, endpoint, request, sent.as_ref()).await {
                Err(HttpError::NotTls(why)) if self.registry().speak_plain(endpoint) => {
                    tracing::info!(host = %endpoint.authority, why, "falling back to plain HTTP");
                    continue;
                }
                other => other?,
            };
            // Another host's challenge (after a redirect) is not for the registry's credentials.
            let ours = response.uri.authority().is_some_and(|a| a.as_str() == endpoint.authority);
            if response.head.status == StatusCode::UNAUTHORIZED && ours {
                match self.auth().challenged(
                    endpoint,
                    self.name().repository(),
                    &response.head.headers,
                    sent.as_ref(),
                    tries,
                ) {
                    ChallengeOutcome::Retry => tries += 1,
                    ChallengeOutcome::Denied(reason) => {
                        return Err(denied(response, reason, sent.as_ref()).await);
                    }
                }
                continue;
            }
            return check_status(response, &request.method).await;
        }
    }

    async fn send(
        &self,
        client: &Client,
        endpoint: &Endpoint,
        request: &ApiRequest,
        sent: Option<&AuthHeader>,
    ) -> Result<Response, HttpError> {
        let uri = self.uri(endpoint, request)?;
        let headers = self.headers(endpoint, &request.headers, sent);
        if request.method == Method::GET || request.method == Method::HEAD {
            return client.fetch(request.method.clone(), uri, headers).await;
        }
        let body =
            if request.body.is_empty() { no_body() } else { full_body(request.body.clone()) };
        let mut http = Request::new(body);
        (*http.method_mut(), *http.uri_mut(), *http.headers_mut()) =
            (request.method.clone(), uri, headers);
        if request.body.is_empty() {
            http.headers_mut().insert(header::CONTENT_LENGTH, HeaderValue::from_static("0"));
        }
        client.send(http).await
    }

    pub(crate) fn headers(
        &self,
        endpoint: &Endpoint,
        own: &HeaderMap,
        sent: Option<&AuthHeader>,
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

    fn uri(&self, endpoint: &Endpoint, request: &ApiRequest) -> Result<Uri, HttpError> {
        let scheme = self.registry().scheme(endpoint);
        let mut query = request.query.clone();
        if let Some(registry) = &endpoint.stands_for {
            query = format!("ns={registry}{}{query}", if query.is_empty() { "" } else { "&" });
        }
        let mark = if query.is_empty() { "" } else { "?" };
        let text = format!(
            "{scheme}://{}{}/{}/{}{mark}{query}",
            endpoint.authority,
            endpoint.path,
            self.name().repository(),
            request.tail
        );
        text.parse().map_err(|_| HttpError::Protocol(format!("{text:?} is not a valid address")))
    }

    pub(crate) fn scopes(&self, endpoint: &Endpoint, need: Capability, more: &[String]) -> Scopes {
        let repository = match endpoint.prefix() {
            "" => self.name().repository().to_owned(),
            prefix => format!("{prefix}/{}", self.name().repository()),
        };
        // A pusher asks for both from the start: a token for reading would have to be replaced at
        // once.
        let push = need == Capability::Push || self.mode() == Mode::Push;
        let own = format!(
            "repository:{repository}:pull{}",
            if push && endpoint.capabilities.push { ",push" } else { "" }
        );
        Scopes::of([own.as_str()].into_iter().chain(more.iter().map(String::as_str)))
    }
}

/// Lets 2xx through and makes an error of everything else.
pub(crate) async fn check_status(response: Response, method: &Method) -> Result<Response, Kind> {
    let status = response.head.status;
    if status.is_success() {
        return Ok(response);
    }
    let request = format!("{method} request to {}", display_of(&response.uri));
    let wait = retry_after(&response.head.headers);
    let server = server_message(response).await;
    Err(match status.as_u16() {
        404 => Kind::NotFound,
        401 => Kind::Unauthorized { server, with_credentials: false },
        403 => Kind::Forbidden { server },
        429 => Kind::TooManyRequests { server, retry_after: wait },
        status => Kind::Status { status, request, server },
    })
}

pub(crate) async fn denied(response: Response, reason: String, sent: Option<&AuthHeader>) -> Kind {
    let with_credentials = sent.is_some_and(|s| s.with_credentials);
    let words = server_message(response).await;
    Kind::Unauthorized { server: if reason.is_empty() { words } else { reason }, with_credentials }
}

/// The server's words on an error; nothing when they cannot be had.
async fn server_message(response: Response) -> String {
    message_in(&response.body.collect(MAX_ERROR_BODY).await.unwrap_or_default())
}

/// When a server wants to be asked again, if it says so: in how many seconds, or at what date (RFC
/// 9110 10.2.3). A date that has passed is now.
pub(crate) fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get(header::RETRY_AFTER)?.to_str().ok()?.trim();
    if let Ok(seconds) = text.parse::<u32>() {
        return Some(Duration::from_secs(seconds.into()));
    }
    let at = httpdate::parse_http_date(text).ok()?;
    Some(at.duration_since(SystemTime::now()).unwrap_or_default())
}

/// A short, printable form of an error document: the specification's `errors` list, a token
/// server's `details`, or plain text.
pub(crate) fn message_in(body: &[u8]) -> String {
    let text = match serde_json::from_slice::<serde_json::Value>(body) {
        Ok(json) => message_in_json(&json),
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

fn message_in_json(json: &serde_json::Value) -> String {
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
    fn a_server_says_in_seconds_or_by_date_when_to_come_back() {
        let after = |text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::RETRY_AFTER, HeaderValue::from_str(text).unwrap());
            retry_after(&headers)
        };
        assert_eq!(after(" 120 "), Some(Duration::from_secs(120)));
        let soon = httpdate::fmt_http_date(SystemTime::now() + Duration::from_secs(600));
        let soon = after(&soon).unwrap().as_secs();
        assert!((590..=600).contains(&soon), "{soon}");
        // All three forms that a date may have.
        for past in [
            "Sun, 06 Nov 1994 08:49:37 GMT",
            "Sunday, 06-Nov-94 08:49:37 GMT",
            "Sun Nov  6 08:49:37 1994",
        ] {
            assert_eq!(after(past), Some(Duration::ZERO), "{past}");
        }
        for nonsense in ["", "soon", "-1", "1.5", "99999999999", "Sun, 06 Nov 1994"] {
            assert_eq!(after(nonsense), None, "{nonsense}");
        }
        assert_eq!(retry_after(&HeaderMap::new()), None);
    }

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
            assert_eq!(message_in(body.as_bytes()), want, "{body}");
        }
        assert_eq!(message_in("x".repeat(10_000).as_bytes()).chars().count(), MAX_WORDS + 1);
    }
}
