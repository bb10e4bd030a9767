//! One question to a repository: endpoints in turn, authentication, retries within a budget.

use crate::{
    Error, Repository,
    auth::{AuthHeader, ChallengeOutcome, Scopes},
    endpoint::{Capability, Endpoint},
    error::Kind,
    failure::{check_status, server_message},
    limit::{Permit, Priority},
    repository::Mode,
};
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request, StatusCode, Uri, header};
use shipway_http::{Client, HttpError, Response, full_body, no_body};
use std::time::Duration;
use tokio::time::Instant;

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
                self.challenged(endpoint, response, sent.as_ref(), &mut tries).await?;
                continue;
            }
            return check_status(response, &request.method).await;
        }
    }

    /// Learns from a 401 to what was sent with `sent`. An error if nothing better can be sent.
    pub(crate) async fn challenged(
        &self,
        endpoint: &Endpoint,
        response: Response,
        sent: Option<&AuthHeader>,
        tries: &mut u32,
    ) -> Result<(), Kind> {
        let headers = &response.head.headers;
        match self.auth().challenged(endpoint, self.name().repository(), headers, sent, *tries) {
            ChallengeOutcome::Retry => {
                *tries += 1;
                Ok(())
            }
            ChallengeOutcome::Denied(reason) => Err(denied(response, reason, sent).await),
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

/// The error for a 401 that no other credentials can help; `reason` stands for the server's words.
async fn denied(response: Response, reason: String, sent: Option<&AuthHeader>) -> Kind {
    let with_credentials = sent.is_some_and(|s| s.with_credentials);
    let words = server_message(response).await;
    Kind::Unauthorized { server: if reason.is_empty() { words } else { reason }, with_credentials }
}
