//! Tokens that say who calls (row `dp.auth.client`): each call of a connection carries one, in the
//! metadata `authorization`.

use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use http::{HeaderValue, Request, Response, Uri, header};
use parking_lot::Mutex;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde::Deserialize;
use shipway_fault::{Context as _, Fault, Result};
use shipway_http::{Client, DeniedNetworks, Timeouts, TlsSettings, no_body};
use std::{
    path::PathBuf,
    pin::Pin,
    str::FromStr,
    sync::Arc,
    task::Poll,
    time::{Duration, SystemTime},
};
use tokio::io::AsyncReadExt as _;
use tonic::{body::Body, transport::Channel};
use tower::Service;

/// Longest token, as daemons take it.
const MAX_TOKEN: u64 = 16 << 10;
/// Longest answer of who issues tokens.
const MAX_ANSWER: u64 = 64 << 10;
/// A token is replaced so long before it expires.
const EARLY: Duration = Duration::from_secs(60);
/// How long a token is used that does not say when it expires.
const USED: Duration = Duration::from_secs(120);
/// What tokens are requested for, unless something else is named.
const AUDIENCE: &str = "shipway";
/// What stays as it is in addresses (RFC 3986, "unreserved").
const UNRESERVED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b'~');

/// Where tokens come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TokenSource {
    /// A file, which is read for each call: who writes it replaces tokens before they expire.
    File(PathBuf),
    /// GitHub, for a job of GitHub Actions that has the permission `id-token: write`.
    GitHub {
        /// What the token is for, as the daemon's configuration has it.
        audience: String,
    },
}

impl FromStr for TokenSource {
    type Err = Fault;

    /// Reads `github` or `github,audience=NAME`.
    fn from_str(text: &str) -> Result<Self> {
        let (kind, rest) = text.split_once(',').unwrap_or((text, ""));
        let audience = match rest.split_once('=') {
            Some(("audience", name)) if !name.is_empty() => name,
            None if rest.is_empty() => AUDIENCE,
            _ => {
                return Err(Fault::invalid(format!("{rest:?} is not an option of {kind}"))
                    .hint("want github,audience=NAME"));
            }
        };
        match kind {
            "github" => Ok(Self::GitHub { audience: audience.to_owned() }),
            _ => Err(Fault::invalid(format!("{kind:?} does not issue tokens that are known here"))
                .hint("want github; tokens of others are read from a file (--token-file)")),
        }
    }
}

/// What GitHub answers.
#[derive(Deserialize)]
struct Issued {
    value: String,
}

/// The tokens of one connection.
struct Tokens {
    source: TokenSource,
    /// The last one, and until when it is used.
    last: Mutex<Option<(String, SystemTime)>>,
}

impl Tokens {
    async fn get(&self) -> Result<HeaderValue> {
        let token = match &self.source {
            TokenSource::File(path) => {
                let failed = |e| Fault::io(format!("read the token {}", path.display()), e);
                let file = tokio::fs::File::open(path).await.map_err(failed)?;
                let mut token = String::new();
                file.take(MAX_TOKEN + 1).read_to_string(&mut token).await.map_err(failed)?;
                if token.len() as u64 > MAX_TOKEN {
                    return Err(Fault::invalid(format!(
                        "{} has more than the {MAX_TOKEN} bytes of a token",
                        path.display()
                    )));
                }
                token
            }
            TokenSource::GitHub { audience } => {
                let now = SystemTime::now();
                let last = self.last.lock().clone().filter(|(_, until)| *until > now);
                match last {
                    Some((token, _)) => token,
                    None => {
                        let token = of_github(audience, |name| std::env::var(name).ok()).await;
                        let token = token.context(|| "request a token from GitHub")?;
                        *self.last.lock() = Some((token.clone(), until(&token, now)));
                        token
                    }
                }
            }
        };
        bearer(token.trim(), "the token has bytes that no token has")
    }
}

/// The value of `authorization` with `token`, or a fault that says what is `wrong` with it.
fn bearer(token: &str, wrong: &'static str) -> Result<HeaderValue> {
    let mut value =
        HeaderValue::from_str(&format!("Bearer {token}")).map_err(|_| Fault::invalid(wrong))?;
    value.set_sensitive(true);
    Ok(value)
}

/// Until when a token is used. Its claims are its own business otherwise.
fn until(token: &str, now: SystemTime) -> SystemTime {
    #[derive(Deserialize)]
    struct Claims {
        exp: u64,
    }
    let claims = token.split('.').nth(1).and_then(|part| BASE64_URL_SAFE_NO_PAD.decode(part).ok());
    let claims = claims.and_then(|json| serde_json::from_slice::<Claims>(&json).ok());
    let end = claims
        .and_then(|c| SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(c.exp)))
        .and_then(|end| end.checked_sub(EARLY));
    end.unwrap_or(now + USED)
}

/// A token of the job that runs (the variables are those that GitHub Actions sets).
async fn of_github(audience: &str, variable: impl Fn(&str) -> Option<String>) -> Result<String> {
    let needed = |name: &str| {
        variable(name).filter(|v| !v.is_empty()).ok_or_else(|| {
            Fault::invalid(format!("${name} is not set")).hint(
                "this works in a job of GitHub Actions with `permissions: { id-token: write }`",
            )
        })
    };
    let address = needed("ACTIONS_ID_TOKEN_REQUEST_URL")?;
    let token = needed("ACTIONS_ID_TOKEN_REQUEST_TOKEN")?;
    let mark = if address.contains('?') { '&' } else { '?' };
    let audience = utf8_percent_encode(audience, UNRESERVED);
    let uri: Uri = format!("{address}{mark}audience={audience}")
        .parse()
        .map_err(|_| Fault::invalid("$ACTIONS_ID_TOKEN_REQUEST_URL is not an address"))?;
    if uri.scheme_str() != Some("https") {
        return Err(Fault::invalid(
            "$ACTIONS_ID_TOKEN_REQUEST_URL is not an address with https://",
        ));
    }
    let value = bearer(&token, "$ACTIONS_ID_TOKEN_REQUEST_TOKEN is not a token")?;
    let mut request = Request::new(no_body());
    *request.uri_mut() = uri;
    request.headers_mut().insert(header::AUTHORIZATION, value);
    let client =
        Client::new(&TlsSettings::default(), Timeouts::default(), DeniedNetworks::default())
            .map_err(Fault::unknown)?;
    let response = client.send(request).await.map_err(Fault::from)?;
    let status = response.head.status;
    let body = response.body.collect(MAX_ANSWER).await.map_err(Fault::from)?;
    if !status.is_success() {
        return Err(Fault::unknown(format!("the answer is {status}")));
    }
    let issued: Issued = serde_json::from_slice(&body)
        .map_err(|_| Fault::unknown("the answer is not one with a token"))?;
    Ok(issued.value)
}

/// A connection whose calls carry a token, if there is one. Clones share it.
#[derive(Clone)]
pub(crate) struct Calls {
    channel: Channel,
    tokens: Option<Arc<Tokens>>,
}

impl Calls {
    /// Calls over `channel`.
    pub fn new(channel: Channel, source: Option<TokenSource>) -> Self {
        let tokens = |source| Arc::new(Tokens { source, last: Mutex::default() });
        Self { channel, tokens: source.map(tokens) }
    }
}

/// Why a call failed before it was answered.
type Failure = Box<dyn std::error::Error + Send + Sync>;

impl Service<Request<Body>> for Calls {
    type Response = Response<Body>;
    type Error = Failure;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Failure>> + Send>>;

    fn poll_ready(&mut self, cx: &mut std::task::Context<'_>) -> Poll<Result<(), Failure>> {
        self.channel.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        let Some(tokens) = self.tokens.clone() else {
            let call = self.channel.call(request);
            return Box::pin(async move { call.await.map_err(Into::into) });
        };
        // The one that is ready is taken, and another one left.
        let other = self.channel.clone();
        let mut channel = std::mem::replace(&mut self.channel, other);
        Box::pin(async move {
            match tokens.get().await {
                Ok(value) => {
                    request.headers_mut().insert(header::AUTHORIZATION, value);
                    channel.call(request).await.map_err(Into::into)
                }
                Err(fault) => Ok(shipway_grpc::status_of(&fault).into_http()),
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_are_named_as_flags_have_them() {
        let github = |audience: &str| TokenSource::GitHub { audience: audience.to_owned() };
        assert_eq!("github".parse::<TokenSource>().unwrap(), github("shipway"));
        assert_eq!("github,audience=x y".parse::<TokenSource>().unwrap(), github("x y"));
        for bad in ["", "gitlab", "github,audience=", "github,x=y", "github=x"] {
            assert!(bad.parse::<TokenSource>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_token_is_used_until_shortly_before_it_expires() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1000);
        let token = |claims: &str| format!("x.{}.y", BASE64_URL_SAFE_NO_PAD.encode(claims));
        assert_eq!(until(&token(r#"{"exp":1600}"#), now), now + Duration::from_secs(540));
        for unknown in ["", "opaque", &token("{}"), &token(r#"{"exp":18446744073709551615}"#)] {
            assert_eq!(until(unknown, now), now + USED, "{unknown}");
        }
    }

    #[tokio::test]
    async fn files_are_read_for_each_call_and_are_no_longer_than_tokens() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("token");
        let tokens = Tokens { source: TokenSource::File(file.clone()), last: Mutex::default() };
        assert!(tokens.get().await.unwrap_err().to_string().contains("no such file"));
        for text in ["one\n", "two"] {
            std::fs::write(&file, text).unwrap();
            let value = tokens.get().await.unwrap();
            assert_eq!(value.to_str().unwrap(), format!("Bearer {}", text.trim()));
            assert!(value.is_sensitive() && !format!("{value:?}").contains(text.trim()));
        }
        std::fs::write(&file, "a\nb").unwrap();
        assert!(tokens.get().await.is_err());
        std::fs::write(&file, "x".repeat(usize::try_from(MAX_TOKEN).unwrap() + 1)).unwrap();
        assert!(tokens.get().await.unwrap_err().to_string().contains("more than"));
    }

    #[tokio::test]
    async fn outside_of_a_job_github_issues_nothing_and_never_over_plain_http() {
        let fault = of_github("x", |_| None).await.unwrap_err();
        assert!(fault.to_string().contains("$ACTIONS_ID_TOKEN_REQUEST_URL"), "{fault}");
        assert!(fault.hints().any(|h| h.contains("id-token: write")), "{fault:?}");
        let fault = of_github("x", |_| Some("http://issuer.test/x".to_owned())).await.unwrap_err();
        assert!(fault.to_string().contains("https://"), "{fault}");
        let value = utf8_percent_encode("a b/ü", UNRESERVED).to_string();
        assert_eq!(value, "a%20b%2F%C3%BC");
    }
}
