//! Parts of blobs for those who choose among hosts, limit and retry by themselves: one request, one
//! host.

use crate::{
    Error, Repository,
    endpoint::{Capability, Endpoint},
    error::Kind,
    failure::check_status,
    request::ApiRequest,
};
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, StatusCode, Uri, header};
use parking_lot::{Mutex, MutexGuard};
use shipway_http::{BodyReader, Client};
use shipway_oci::Digest;
use std::{
    collections::HashMap,
    fmt,
    ops::Range,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};
use tokio::time::Instant;

/// How long a redirect is followed again that does not say when it expires.
const REDIRECT_LIFE: Duration = Duration::from_secs(60);
/// The same for one that says so, at the most.
const MAX_REDIRECT_LIFE: Duration = Duration::from_secs(3600);
/// A redirect is not used when it is about to expire.
const REDIRECT_MARGIN: Duration = Duration::from_secs(5);
/// Most redirects that are remembered for one host of a repository.
const MAX_REDIRECTS: usize = 1024;

/// Which bytes of a blob to get.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BlobRange {
    /// These, which are not none.
    Bytes(Range<u64>),
    /// So many of its end, or all if it is shorter.
    Last(u64),
}

/// A host that may have a repository's blobs: a mirror or the origin. Cheap to clone; clones
/// remember together where blobs are redirected to.
///
/// Requests take no place among those that [`crate::RegistryConfig::max_concurrency`] counts and
/// are sent once: callers limit and retry.
#[derive(Clone)]
pub struct BlobHost {
    repository: Repository,
    endpoint: Arc<Endpoint>,
    redirects: Arc<Mutex<HashMap<Digest, Redirect>>>,
}

struct Redirect {
    /// Often signed, so that it is as secret as a token.
    uri: Uri,
    until: Instant,
}

impl fmt::Debug for BlobHost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BlobHost({} at {})", self.repository.name(), self.endpoint.authority)
    }
}

/// A part of a blob on its way.
#[derive(Debug)]
pub struct BlobPart {
    host: BlobHost,
    action: String,
    reader: BodyReader,
    start: u64,
    size: Option<u64>,
}

impl Repository {
    /// The hosts that may have the repository's blobs, in the order to ask.
    pub async fn blob_hosts(&self) -> Result<Vec<BlobHost>, Error> {
        let endpoints = self.endpoints(Capability::Pull).await?;
        let host = |endpoint| BlobHost {
            repository: self.clone(),
            endpoint: Arc::new(endpoint),
            redirects: Arc::default(),
        };
        Ok(endpoints.into_iter().map(host).collect())
    }
}

impl BlobHost {
    /// Host and port.
    pub fn authority(&self) -> &str {
        &self.endpoint.authority
    }

    /// The repository.
    pub fn repository(&self) -> &Repository {
        &self.repository
    }

    /// Begins to get a part of the blob, which has `size` bytes if that is known. With `fresh`,
    /// caches on the way are asked to get it anew (RFC 9111 5.2.1.4), and remembered redirects are
    /// forgotten. A server that does not know ranges sends the blob from its start; see
    /// [`BlobPart::start`].
    pub async fn open(
        &self,
        digest: Digest,
        size: Option<u64>,
        range: &BlobRange,
        fresh: bool,
    ) -> Result<BlobPart, Error> {
        let action = format!("fetch blob {digest}");
        let fail = |kind| self.error(&action, kind);
        let client = self.repository.registry().client(&self.endpoint).await.map_err(fail)?;
        let bytes = match range {
            BlobRange::Bytes(range) => format!("bytes={}-{}", range.start, range.end - 1),
            BlobRange::Last(n) => format!("bytes=-{n}"),
        };
        if fresh {
            self.redirects().remove(&digest);
        }
        if let Some(answer) = self.follow(&client, digest, &bytes).await.map_err(fail)? {
            return self.part(answer, size, range, action);
        }
        let mut ask = ApiRequest::new(
            Method::GET,
            format!("blobs/{digest}"),
            Capability::Pull,
            action.as_str(),
        )
        .header(header::RANGE, &bytes);
        if fresh {
            ask = ask.header(header::CACHE_CONTROL, "no-cache");
        }
        let answer = self
            .repository
            .send_authenticated(&client, &self.endpoint, &ask)
            .await
            .map_err(fail)?;
        self.remember(digest, &answer.uri);
        self.part(answer, size, range, action)
    }

    /// Opens a connection to where the blob is, or uses an idle one, and has a token fetched if one
    /// is needed. What fails here fails again when it matters.
    pub async fn warm(&self, digest: Digest) {
        let action = format!("look for blob {digest}");
        let Ok(client) = self.repository.registry().client(&self.endpoint).await else { return };
        let ask =
            ApiRequest::new(Method::HEAD, format!("blobs/{digest}"), Capability::Pull, &action);
        if let Err(kind) = self.repository.send_authenticated(&client, &self.endpoint, &ask).await {
            tracing::debug!(host = %self.endpoint.authority, ?kind, "cannot connect ahead");
        }
    }

    /// Asks where the blob was redirected to; `None` if it was not, or if that address is
    /// check_status no more.
    async fn follow(
        &self,
        client: &Client,
        digest: Digest,
        bytes: &str,
    ) -> Result<Option<shipway_http::Response>, Kind> {
        let known = self.redirects().get(&digest).map(|r| (r.uri.clone(), r.until));
        let Some((uri, until)) = known else { return Ok(None) };
        if until > Instant::now() {
            let mut headers = HeaderMap::new();
            let agent = &self.repository.registry().config.user_agent;
            for (name, value) in [(header::RANGE, bytes), (header::USER_AGENT, agent)] {
                if let Ok(value) = HeaderValue::from_str(value) {
                    headers.insert(name, value);
                }
            }
            let answer = client.fetch(Method::GET, uri, headers).await?;
            let status = answer.head.status;
            // The address may have expired, or the blob may have moved.
            if !status.is_client_error() || status == StatusCode::TOO_MANY_REQUESTS {
                return check_status(answer, &Method::GET).await.map(Some);
            }
        }
        self.redirects().remove(&digest);
        Ok(None)
    }

    fn remember(&self, digest: Digest, uri: &Uri) {
        if uri.authority().is_none_or(|a| a.as_str() == self.endpoint.authority) {
            return;
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let life = lifetime(uri.query().unwrap_or_default(), now);
        let mut redirects = self.redirects();
        if redirects.len() >= MAX_REDIRECTS {
            redirects.clear();
        }
        redirects.insert(digest, Redirect { uri: uri.clone(), until: Instant::now() + life });
    }

    fn redirects(&self) -> MutexGuard<'_, HashMap<Digest, Redirect>> {
        self.redirects.lock()
    }

    fn error(&self, action: &str, kind: Kind) -> Error {
        Error::new(self.repository.name(), &self.endpoint.authority, action, kind)
    }

    fn part(
        &self,
        answer: shipway_http::Response,
        size: Option<u64>,
        range: &BlobRange,
        action: String,
    ) -> Result<BlobPart, Error> {
        let header = |name: header::HeaderName| answer.head.headers.get(name)?.to_str().ok();
        let fail = |kind| self.error(&action, kind);
        let (start, said) = match answer.head.status {
            StatusCode::PARTIAL_CONTENT => {
                let text = header(header::CONTENT_RANGE).unwrap_or_default();
                let odd = || Kind::Protocol(format!("asked for {range:?} and got {text:?}"));
                let (got, total) = content_range(text).ok_or_else(|| fail(odd()))?;
                let asked = match (range, total.or(size)) {
                    (BlobRange::Bytes(range), _) => Some(range.clone()),
                    (BlobRange::Last(n), Some(total)) => Some(total.saturating_sub(*n)..total),
                    (BlobRange::Last(_), None) => None,
                };
                // Less is an answer that is cut short, for others to notice.
                if asked.is_none_or(|a| got.start != a.start || got.end > a.end) {
                    return Err(fail(odd()));
                }
                (got.start, total)
            }
            StatusCode::OK => (0, header(header::CONTENT_LENGTH).and_then(|n| n.parse().ok())),
            status => {
                return Err(fail(Kind::Protocol(format!("a blob came with status {status}"))));
            }
        };
        if let (Some(expected), Some(got)) = (size, said)
            && expected != got
        {
            return Err(fail(Kind::Size { expected, got }));
        }
        Ok(BlobPart { host: self.clone(), action, reader: answer.body, start, size: said })
    }
}

impl BlobPart {
    /// Where in the blob the first byte is: 0 if the server does not know ranges, otherwise what
    /// was asked for.
    pub fn start(&self) -> u64 {
        self.start
    }

    /// The blob's length, if the server said.
    pub fn size(&self) -> Option<u64> {
        self.size
    }

    /// The next piece; `None` at the end, which may come too early.
    pub async fn next(&mut self) -> Result<Option<Bytes>, Error> {
        self.reader.next().await.map_err(|f| self.host.error(&self.action, f.into()))
    }
}

/// First byte, end and length of a `Content-Range` (RFC 9110 14.4).
fn content_range(text: &str) -> Option<(Range<u64>, Option<u64>)> {
    let (range, total) = text.strip_prefix("bytes ")?.trim().split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let (first, last): (u64, u64) = (first.parse().ok()?, last.parse().ok()?);
    let total = if total == "*" { None } else { Some(total.parse().ok()?) };
    let end = last.checked_add(1)?;
    (first < end && total.is_none_or(|t| end <= t)).then_some((first..end, total))
}

/// How long an address with this query is check_status: signed ones of the usual stores say so.
fn lifetime(query: &str, now: Duration) -> Duration {
    let said = query.split('&').find_map(|pair| {
        let (key, value) = pair.split_once('=')?;
        let number: u64 = value.parse().ok()?;
        match key.to_ascii_lowercase().as_str() {
            "x-amz-expires" | "x-goog-expires" => Some(Duration::from_secs(number)),
            "expires" => Some(Duration::from_secs(number).saturating_sub(now)),
            _ => None,
        }
    });
    let life = said.map(|life| life.saturating_sub(REDIRECT_MARGIN)).unwrap_or(REDIRECT_LIFE);
    life.min(MAX_REDIRECT_LIFE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn redirects_are_remembered_up_to_a_number() {
        let registry = crate::Registry::new(crate::RegistryConfig::default());
        let name = "r.io/a:1".parse().unwrap();
        let repository = registry.repository(&name, Arc::new(crate::Anonymous), crate::Mode::Pull);
        let host = repository.blob_hosts().await.unwrap().remove(0);
        let uri: Uri = "https://cdn.test/blob".parse().unwrap();
        for n in 0..MAX_REDIRECTS + 3 {
            host.remember(Digest::of(n.to_string()), &uri);
        }
        assert_eq!(host.redirects().len(), 3);
        // The registry itself is no redirect.
        host.remember(Digest::of("x"), &"https://r.io/v2/a/blobs/x".parse().unwrap());
        assert_eq!(host.redirects().len(), 3);
    }

    #[test]
    fn content_ranges_are_read() {
        for (text, want) in [
            ("bytes 0-0/1", Some((0..1, Some(1)))),
            ("bytes 5-9/*", Some((5..10, None))),
            ("bytes 5-9/9", None),
            ("bytes 9-5/20", None),
            ("bytes */20", None),
            ("bytes 0-18446744073709551615/*", None),
            ("items 0-1/2", None),
            ("", None),
        ] {
            assert_eq!(content_range(text), want, "{text}");
        }
    }

    #[test]
    fn signed_addresses_say_how_long_they_are_good() {
        let now = Duration::from_secs(1_000_000);
        for (query, seconds) in [
            ("", 60),
            ("x=1&X-Amz-Date=20250101T000000Z&X-Amz-Expires=1200&X-Amz-Signature=s", 1195),
            ("X-Goog-Expires=3", 0),
            ("Expires=1000100&Signature=s&Key-Pair-Id=k", 95),
            ("Expires=1", 0),
            ("X-Amz-Expires=99999999", 3600),
            ("X-Amz-Expires=never", 60),
        ] {
            assert_eq!(lifetime(query, now), Duration::from_secs(seconds), "{query}");
        }
    }
}
