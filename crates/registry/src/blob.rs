//! Blobs: streamed, resumed where a connection broke, checked on demand.

use crate::{
    Error, Repository,
    endpoint::Capability,
    error::Kind,
    limit::{Permit, Priority},
    request::ApiRequest,
};
use bytes::Bytes;
use futures::{Stream, stream};
use http::{Method, StatusCode, header};
use shipway_http::{BodyReader, HttpError};
use shipway_oci::{Descriptor, Digest, Hasher};
use std::{fmt, ops::Range};

/// A failure that comes after this many new bytes is a first one again.
const GOOD_PROGRESS: u64 = 256 << 10;
/// A broken connection is one strike, a stall two; this many end the transfer.
const STRIKES: u32 = 4;

/// A blob, or a part of one, on its way. A connection that breaks is replaced by one that
/// continues.
pub struct BlobReader {
    repository: Repository,
    descriptor: Descriptor,
    action: String,
    /// Next byte to hand out.
    at: u64,
    end: u64,
    open: Option<Open>,
    hasher: Option<Hasher>,
    strikes: u32,
    struck_at: u64,
    host: String,
}

impl fmt::Debug for BlobReader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BlobReader({} {}..{})", self.descriptor.digest, self.at, self.end)
    }
}

struct Open {
    reader: BodyReader,
    /// Bytes to drop first, because the server sends from its start.
    skip: u64,
    _permit: Permit,
}

impl Repository {
    /// The blob from `offset` to its end. The caller checks the digest, or asks for it with
    /// [`BlobReader::verified`].
    pub async fn fetch_blob(
        &self,
        descriptor: &Descriptor,
        offset: u64,
    ) -> Result<BlobReader, Error> {
        self.fetch_range(descriptor, offset..descriptor.size).await
    }

    /// The blob's bytes in `range` (cut to its size). Works with servers that ignore ranges, at the
    /// price of what comes before.
    pub async fn fetch_range(
        &self,
        descriptor: &Descriptor,
        range: Range<u64>,
    ) -> Result<BlobReader, Error> {
        let end = range.end.min(descriptor.size);
        let mut reader = BlobReader {
            repository: self.clone(),
            action: format!("fetch blob {}", descriptor.digest),
            descriptor: descriptor.clone(),
            at: range.start.min(end),
            end,
            open: None,
            hasher: None,
            strikes: 0,
            struck_at: range.start,
            host: self.name().registry().to_owned(),
        };
        if reader.at < reader.end {
            reader.reopen(true).await?;
        }
        Ok(reader)
    }

    /// Length of a blob of which only the digest is known.
    pub async fn blob_size(&self, digest: Digest) -> Result<u64, Error> {
        let action = format!("look for blob {digest}");
        let reply = self
            .request(&ApiRequest::new(
                Method::HEAD,
                format!("blobs/{digest}"),
                Capability::Pull,
                &action,
            ))
            .await?;
        let said = reply.response.head.headers.get(header::CONTENT_LENGTH);
        let size = said.and_then(|v| v.to_str().ok()?.parse().ok());
        size.ok_or_else(|| {
            Error::new(
                self.name(),
                self.name().registry(),
                &action,
                Kind::Protocol("the response has no Content-Length".into()),
            )
        })
    }

    /// Whether the registry has the blob.
    pub async fn blob_exists(&self, descriptor: &Descriptor) -> Result<bool, Error> {
        let action = format!("look for blob {}", descriptor.digest);
        match self
            .request(&ApiRequest::new(
                Method::HEAD,
                format!("blobs/{}", descriptor.digest),
                Capability::Pull,
                action,
            ))
            .await
        {
            Ok(_) => Ok(true),
            Err(e) if e.is_not_found() => Ok(false),
            Err(e) => Err(e),
        }
    }
}

impl BlobReader {
    /// Checks the digest as the bytes pass; the last piece is followed by an error if it is not the
    /// promised one. Only for a reader at the start of a whole blob. Costs processor time on the
    /// reading task: a content store that checks for itself makes it needless.
    #[must_use]
    pub fn verified(mut self) -> Self {
        if self.at == 0 && self.end == self.descriptor.size {
            self.hasher = Some(Hasher::new());
        }
        self
    }

    /// Position of the next byte in the blob.
    pub fn position(&self) -> u64 {
        self.at
    }

    /// The next piece; `None` at the end.
    pub async fn next(&mut self) -> Result<Option<Bytes>, Error> {
        loop {
            if self.at >= self.end {
                self.open = None;
                return self.check().map(|()| None);
            }
            let Some(open) = &mut self.open else {
                self.reopen(false).await?;
                continue;
            };
            let failure = match open.reader.next().await {
                Ok(Some(piece)) => match self.take(piece)? {
                    Some(piece) => return Ok(Some(piece)),
                    None => continue,
                },
                Ok(None) => {
                    HttpError::Broken(format!("it ended after {} of {} bytes", self.at, self.end))
                }
                Err(failure) => failure,
            };
            self.open = None;
            self.strike(failure).await?;
        }
    }

    /// The pieces as a stream.
    pub fn into_stream(self) -> impl Stream<Item = Result<Bytes, Error>> + Send + 'static {
        stream::try_unfold(self, |mut reader| async move {
            Ok(reader.next().await?.map(|piece| (piece, reader)))
        })
    }

    fn take(&mut self, mut piece: Bytes) -> Result<Option<Bytes>, Error> {
        let Some(open) = &mut self.open else { return Ok(None) };
        let skip = open.skip.min(piece.len() as u64);
        open.skip -= skip;
        let mut piece = piece.split_off(skip as usize);
        let left = self.end - self.at;
        if piece.len() as u64 > left {
            if self.end == self.descriptor.size {
                return Err(
                    self.fail(Kind::Size { expected: self.end, got: self.at + piece.len() as u64 })
                );
            }
            piece.truncate(left as usize);
        }
        if piece.is_empty() {
            return Ok(None);
        }
        self.at += piece.len() as u64;
        if let Some(hasher) = &mut self.hasher {
            hasher.update(&piece);
        }
        Ok(Some(piece))
    }

    fn check(&mut self) -> Result<(), Error> {
        let Some(hasher) = self.hasher.take() else { return Ok(()) };
        let (expected, got) = (self.descriptor.digest, hasher.finish());
        if expected == got { Ok(()) } else { Err(self.fail(Kind::Digest { expected, got })) }
    }

    /// Counts a failure and, while there is hope, pauses before the next try.
    async fn strike(&mut self, failure: HttpError) -> Result<(), Error> {
        if self.at - self.struck_at >= GOOD_PROGRESS {
            self.strikes = 0;
        }
        self.struck_at = self.at;
        self.strikes += match failure {
            HttpError::TimedOut { .. } => 2,
            HttpError::Broken(_) => 1,
            _ => STRIKES,
        };
        if self.strikes >= STRIKES {
            return Err(self.fail(failure.into()));
        }
        tracing::debug!(host = %self.host, action = %self.action, at = self.at, %failure, "resuming");
        if self.strikes > 1 {
            tokio::time::sleep(
                self.repository.registry().config.timing.backoff * (self.strikes - 1),
            )
            .await;
        }
        Ok(())
    }

    /// Opens a connection at the current position. A resumption does not try long: the strikes
    /// count.
    async fn reopen(&mut self, first: bool) -> Result<(), Error> {
        let mut request = ApiRequest::new(
            Method::GET,
            format!("blobs/{}", self.descriptor.digest),
            Capability::Pull,
            &self.action,
        );
        request.load = Priority::Heavy;
        request.retry = first;
        let partial = self.at > 0 || self.end < self.descriptor.size;
        if partial {
            let last = if self.end == self.descriptor.size {
                String::new()
            } else {
                (self.end - 1).to_string()
            };
            request = request.header(header::RANGE, &format!("bytes={}-{last}", self.at));
        }
        let reply = match self.repository.request(&request).await {
            Ok(reply) => reply,
            Err(e) if first || !e.kind().is_transient() => return Err(e),
            Err(e) => {
                let failure = match e.kind() {
                    Kind::TimedOut { waiting_for, after } => {
                        HttpError::TimedOut { waiting_for, after: *after }
                    }
                    _ => HttpError::Broken(e.to_string()),
                };
                return self.strike(failure).await;
            }
        };
        self.host.clone_from(&reply.endpoint.authority);
        let number = |name: header::HeaderName| {
            reply.response.head.headers.get(name)?.to_str().ok()?.parse::<u64>().ok()
        };
        let skip = match reply.response.head.status {
            StatusCode::PARTIAL_CONTENT => {
                let range = reply
                    .response
                    .head
                    .headers
                    .get(header::CONTENT_RANGE)
                    .and_then(|v| v.to_str().ok())
                    .unwrap_or_default();
                if !range.starts_with(&format!("bytes {}-", self.at)) {
                    return Err(self.fail(Kind::Protocol(format!(
                        "asked for bytes from {} and got {range:?}",
                        self.at
                    ))));
                }
                0
            }
            _ => {
                if let Some(got) = number(header::CONTENT_LENGTH)
                    && got != self.descriptor.size
                {
                    return Err(self.fail(Kind::Size { expected: self.descriptor.size, got }));
                }
                self.at
            }
        };
        self.open = Some(Open { reader: reply.response.body, skip, _permit: reply.permit });
        Ok(())
    }

    fn fail(&self, kind: Kind) -> Error {
        Error::new(self.repository.name(), &self.host, &self.action, kind)
    }
}
