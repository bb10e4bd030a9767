//! Documents from issuers and from the Kubernetes API: over TLS only, bounded, without redirects.

use http::{Method, Request, StatusCode, Uri, header};
use serde::de::DeserializeOwned;
use shipway_fault::{Class, Code, Context as _, Fault, Result};
use shipway_http::{Client, DeniedNetworks, Timeouts, TlsSettings, display_of, full_body, no_body};
use std::{path::PathBuf, time::Duration};

/// Largest document: a set of keys, a TokenReview.
pub(crate) const MAX_DOCUMENT: u64 = 1 << 20;

/// A caller waits meanwhile, so these are short.
const TIMEOUTS: Timeouts = Timeouts {
    connect: Duration::from_secs(5),
    response: Duration::from_secs(5),
    stall: Duration::from_secs(5),
    stall_bytes: 1,
};

/// A client that trusts the machine's authorities and those of the file `ca`. Reads files.
pub(crate) fn client(ca: Option<&PathBuf>) -> Result<Client> {
    let tls = TlsSettings { ca: ca.into_iter().cloned().collect(), ..TlsSettings::default() };
    Client::new(&tls, TIMEOUTS, DeniedNetworks::default()).map_err(Fault::invalid)
}

/// The address `text`, which has to be one for HTTPS.
pub(crate) fn https(text: &str) -> Result<Uri> {
    let uri: Uri =
        text.parse().map_err(|e| Fault::invalid(format!("{text:?} is not an address: {e}")))?;
    match uri.scheme_str() {
        Some("https") if uri.authority().is_some() => Ok(uri),
        _ => Err(Fault::invalid(format!("{text:?} is not an address with https://"))
            .hint("keys and tokens are not sent over plain HTTP")),
    }
}

/// The document at `uri`.
pub(crate) async fn get<T: DeserializeOwned>(client: &Client, uri: &Uri) -> Result<T> {
    let mut request = Request::new(no_body());
    *request.uri_mut() = uri.clone();
    request.headers_mut().insert(header::ACCEPT, header::HeaderValue::from_static("*/*"));
    answer(client, request).await.context(|| format!("fetch {}", display_of(uri)))
}

/// What is answered to the document `body`, which is posted with the bearer token `token`.
pub(crate) async fn post<T: DeserializeOwned>(
    client: &Client,
    uri: &Uri,
    token: &str,
    body: String,
) -> Result<T> {
    let what = || format!("post to {}", display_of(uri));
    let mut value = header::HeaderValue::from_str(&format!("Bearer {token}")).map_err(|_| {
        Fault::invalid("the token for the Kubernetes API is not one").context(what())
    })?;
    value.set_sensitive(true);
    let request = Request::builder()
        .method(Method::POST)
        .uri(uri.clone())
        .header(header::CONTENT_TYPE, "application/json")
        .header(header::ACCEPT, "application/json")
        .header(header::AUTHORIZATION, value)
        .body(full_body(body))
        .map_err(|e| Fault::internal(format!("make a request: {e}")).context(what()))?;
    answer(client, request).await.context(what)
}

async fn answer<T: DeserializeOwned>(
    client: &Client,
    request: Request<shipway_http::Body>,
) -> Result<T> {
    let response = client.send(request).await.map_err(Fault::from)?;
    let status = response.head.status;
    if !status.is_success() {
        let code = match status {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => Code::PermissionDenied,
            _ => Code::Unavailable,
        };
        return Err(
            Fault::new(code, format!("the answer is {status}")).with_class(Class::Environment)
        );
    }
    let bytes = response.body.collect(MAX_DOCUMENT).await.map_err(Fault::from)?;
    serde_json::from_slice(&bytes).map_err(|e| {
        // The words of the error may have parts of the document in them.
        let place = format!("line {}, column {}", e.line(), e.column());
        Fault::unknown(format!("the answer is not the JSON that was expected ({place})"))
            .with_class(Class::Environment)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_for_https() {
        assert_eq!(https("https://issuer.test/x").unwrap().path(), "/x");
        for bad in ["http://issuer.test", "issuer.test", "https://", "file:///etc/passwd", ""] {
            assert!(https(bad).is_err(), "{bad}");
        }
    }
}
