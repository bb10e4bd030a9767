//! Pushing: blobs mounted or uploaded in one stream, manifests put (distribution-spec, "Push").

use crate::{
    Error, Repository,
    endpoint::{Capability, Endpoint},
    error::Kind,
    failure::check_status,
    limit::Priority,
    request::ApiRequest,
};
use bytes::Bytes;
use futures::{
    StreamExt, TryStreamExt,
    future::BoxFuture,
    stream::{self, BoxStream},
};
use http::{Method, Request, StatusCode, Uri, header};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use shipway_fault::Fault;
use shipway_http::{Body, Client, HttpError, Response, join};
use shipway_oci::{Descriptor, Digest, Index, Manifest, media};
use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::time::Instant;

/// Most tries for one blob; each starts from its first byte.
const MAX_TRIES: u32 = 4;
/// Repositories that are tried in turn to mount a blob from; each that does not serve costs a
/// request.
const MAX_MOUNTS: usize = 3;
/// Most bytes of a manifest that is pushed.
const MAX_MANIFEST: u64 = 4 << 20;

/// The bytes of a blob to push.
pub type BodyStream = BoxStream<'static, Result<Bytes, Fault>>;

/// How a blob got into the repository.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pushed {
    /// It was there.
    Existed,
    /// It came from another repository of the same registry.
    Mounted,
    /// It was sent.
    Uploaded,
}

/// Where to put the bytes.
enum Session {
    Done,
    At { uri: Uri, endpoint: Box<Endpoint> },
}

/// A blob on its way out.
struct Upload<'a> {
    descriptor: &'a Descriptor,
    action: String,
    open: &'a (dyn Fn() -> BoxFuture<'static, Result<BodyStream, Fault>> + Send + Sync),
    progress: Arc<dyn Fn(u64) + Send + Sync>,
}

impl Repository {
    /// Brings a blob into the repository. It is looked for first; then mounted from one of the
    /// first few repositories `mount_from` of the same registry; then uploaded. `open` gives the
    /// bytes from the start, and is called again for each new try; `progress` hears how many bytes
    /// have gone (which falls back to 0 with a new try).
    pub async fn push_blob<'m>(
        &self,
        descriptor: &Descriptor,
        mount_from: impl IntoIterator<Item = &'m str>,
        open: impl Fn() -> BoxFuture<'static, Result<BodyStream, Fault>> + Send + Sync,
        progress: impl Fn(u64) + Send + Sync + 'static,
    ) -> Result<Pushed, Error> {
        if self.blob_exists(descriptor).await? {
            return Ok(Pushed::Existed);
        }
        let action = format!("push blob {}", descriptor.digest);
        let upload = Upload { descriptor, action, open: &open, progress: Arc::new(progress) };
        let timing = self.registry().config.timing;
        let mut pause = timing.backoff;
        // A registry that does not mount opens an upload instead; the last one is used.
        let mut open_session = None;
        let mounts: Vec<&str> = mount_from.into_iter().take(MAX_MOUNTS).collect();
        for from in mounts {
            open_session = Some(self.start_upload(&upload, Some(from)).await?);
            if matches!(open_session, Some(Session::Done)) {
                break;
            }
        }
        for tries in 1.. {
            let session = match open_session.take() {
                Some(session) => session,
                None => self.start_upload(&upload, None).await?,
            };
            let Session::At { uri, endpoint } = session else { return Ok(Pushed::Mounted) };
            let started = Instant::now();
            let fail = |kind| Error::new(self.name(), &endpoint.authority, &upload.action, kind);
            let kind = match self.put_stream(&upload, &uri, &endpoint).await {
                Ok(response) => {
                    confirm(&response, descriptor.digest).map_err(fail)?;
                    return Ok(Pushed::Uploaded);
                }
                Err(kind) => kind,
            };
            // A token that died under way is renewed by the next try; a quick refusal is meant.
            let stale = matches!(kind, Kind::Unauthorized { .. })
                && started.elapsed() > Duration::from_secs(30);
            if tries >= MAX_TRIES || !(kind.is_transient() || stale) {
                return Err(fail(kind));
            }
            tracing::info!(host = %endpoint.authority, action = %upload.action, ?kind, "upload failed, trying again in {pause:?}");
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(timing.max_backoff);
        }
        Err(Error::new(
            self.name(),
            self.name().registry(),
            &upload.action,
            Kind::Protocol("gave up".into()),
        ))
    }

    /// Mounts a blob from the repository `from` of the same registry; `false` when the registry
    /// would rather have it uploaded.
    pub async fn mount_blob(&self, descriptor: &Descriptor, from: &str) -> Result<bool, Error> {
        let action = format!("push blob {}", descriptor.digest);
        let nothing = || -> BoxFuture<'static, Result<BodyStream, Fault>> {
            Box::pin(async { Ok(stream::empty().boxed()) })
        };
        let upload = Upload { descriptor, action, open: &nothing, progress: Arc::new(|_| {}) };
        Ok(matches!(self.start_upload(&upload, Some(from)).await?, Session::Done))
    }

    /// Asks for a place to upload to; with `mount`, the blob may be there at once.
    async fn start_upload(
        &self,
        upload: &Upload<'_>,
        mount: Option<&str>,
    ) -> Result<Session, Error> {
        let request =
            ApiRequest::new(Method::POST, "blobs/uploads/", Capability::Push, &upload.action);
        let mut reply = None;
        if let Some(from) = mount {
            let mut request = request.clone();
            request.query = format!("mount={}&from={from}", upload.descriptor.digest);
            request.scopes = vec![format!("repository:{from}:pull")];
            match self.request(&request).await {
                Ok(r) => reply = Some(r),
                Err(error) => tracing::debug!(%error, from, "cannot mount, uploading instead"),
            }
        }
        let reply = match reply {
            Some(reply) => reply,
            None => self.request(&request).await?,
        };
        if reply.response.head.status == StatusCode::CREATED {
            return Ok(Session::Done);
        }
        let fail = |kind| Error::new(self.name(), &reply.endpoint.authority, &upload.action, kind);
        let location =
            reply.response.head.headers.get(header::LOCATION).and_then(|l| l.to_str().ok());
        let location = location.ok_or_else(|| {
            fail(Kind::Protocol("the registry did not say where to upload to (no Location)".into()))
        })?;
        let uri = upload_uri(&reply.response.uri, location, upload.descriptor.digest)
            .map_err(|f| fail(f.into()))?;
        Ok(Session::At { uri, endpoint: Box::new(reply.endpoint) })
    }

    /// Sends the bytes in one PUT. The header is renewed once if the token is refused before
    /// anything of weight was sent.
    async fn put_stream(
        &self,
        upload: &Upload<'_>,
        uri: &Uri,
        endpoint: &Endpoint,
    ) -> Result<Response, Kind> {
        let _permit = self.registry().limits.enter(&endpoint.authority, Priority::Heavy).await;
        let client: Client = self.registry().client(endpoint).await?;
        let scopes = self.scopes(endpoint, Capability::Push, &[]);
        let ours = uri.authority().is_some_and(|a| a.as_str() == endpoint.authority);
        let mut tries = 0;
        loop {
            let sent = match ours {
                true => {
                    self.auth().header(&client, endpoint, self.name().repository(), &scopes).await?
                }
                false => None,
            };
            let (body, count) = upload.body().await?;
            let mut request = Request::new(body);
            *request.method_mut() = Method::PUT;
            *request.uri_mut() = uri.clone();
            if ours {
                *request.headers_mut() =
                    self.headers(endpoint, &header::HeaderMap::new(), sent.as_ref());
            }
            let headers = request.headers_mut();
            headers.insert(
                header::CONTENT_TYPE,
                header::HeaderValue::from_static("application/octet-stream"),
            );
            headers.insert(header::CONTENT_LENGTH, upload.descriptor.size.into());
            // The registry may have to hash or move the bytes before it answers.
            let settle = self.registry().config.timing.http.stall
                + Duration::from_secs(upload.descriptor.size >> 23);
            let response = client.send_long(request, count, upload.descriptor.size, settle).await?;
            if response.head.status == StatusCode::UNAUTHORIZED && ours {
                self.challenged(endpoint, response, sent.as_ref(), &mut tries).await?;
                continue;
            }
            return check_status(response, &Method::PUT).await;
        }
    }

    /// Puts a manifest or index under `reference` (a tag, or its digest).
    pub async fn push_manifest(
        &self,
        bytes: Bytes,
        media_type: &str,
        reference: &str,
    ) -> Result<Descriptor, Error> {
        self.put_manifest(bytes, media_type, reference).await.map(|(descriptor, _)| descriptor)
    }

    /// Puts a manifest that refers to another one ([`Manifest::subject`]) under its digest, where
    /// [`Repository::referrers`] finds it. In a registry that keeps no lists of its own, that is an
    /// index under a tag, which is written again with the manifest in it (OCI distribution-spec
    /// 1.1, "Referrers Tag Schema"); who writes it at the same time may be lost.
    pub async fn push_referrer(&self, manifest: &Manifest) -> Result<Descriptor, Error> {
        let bytes = serde_json::to_vec(manifest).map_err(|e| self.no_referrer(e.to_string()))?;
        self.push_referrer_bytes(bytes.into(), manifest).await
    }

    fn no_referrer(&self, why: String) -> Error {
        Error::new(self.name(), self.name().registry(), "push referrer", Kind::Protocol(why))
    }

    /// The same for a manifest that was read from `bytes` and keeps its digest.
    pub async fn push_referrer_bytes(
        &self,
        bytes: Bytes,
        manifest: &Manifest,
    ) -> Result<Descriptor, Error> {
        let fail = |why: String| self.no_referrer(why);
        let subject = manifest.subject.as_ref();
        let subject = subject.ok_or_else(|| fail("the manifest has no subject".into()))?.digest;
        let digest = Digest::of(&bytes);
        let media_type = manifest.media_type.as_deref().unwrap_or(media::OCI_MANIFEST);
        let (mut descriptor, listed) =
            self.put_manifest(bytes, media_type, &digest.to_string()).await?;
        descriptor.artifact_type.clone_from(&manifest.artifact_type);
        descriptor.annotations.clone_from(&manifest.annotations);
        if listed {
            return Ok(descriptor);
        }
        let mut manifests = self.referrers(subject).await?;
        if manifests.iter().all(|m| m.digest != digest) {
            manifests.push(descriptor.clone());
            let index = Index {
                schema_version: 2,
                media_type: Some(media::OCI_INDEX.to_owned()),
                manifests,
                annotations: Default::default(),
            };
            let index = serde_json::to_vec(&index).map_err(|e| fail(e.to_string()))?;
            let tag = format!("sha256-{}", subject.hex());
            self.put_manifest(index.into(), media::OCI_INDEX, &tag).await?;
        }
        Ok(descriptor)
    }

    /// Puts a manifest; also whether the registry says that it lists it by its subject.
    async fn put_manifest(
        &self,
        bytes: Bytes,
        media_type: &str,
        reference: &str,
    ) -> Result<(Descriptor, bool), Error> {
        let descriptor = Descriptor::of(media_type, &bytes);
        let mut request = ApiRequest::new(
            Method::PUT,
            format!("manifests/{reference}"),
            Capability::Push,
            format!("push manifest {}", descriptor.digest),
        )
        .header(header::CONTENT_TYPE, media_type);
        if descriptor.size > MAX_MANIFEST {
            let kind = Kind::TooLarge { what: "the manifest", limit: MAX_MANIFEST };
            return Err(Error::new(self.name(), self.name().registry(), &request.action, kind));
        }
        request.body = bytes;
        let reply = self.request(&request).await?;
        confirm(&reply.response, descriptor.digest).map_err(|kind| {
            Error::new(self.name(), &reply.endpoint.authority, &request.action, kind)
        })?;
        let listed = reply.response.head.headers.contains_key("oci-subject");
        Ok((descriptor, listed))
    }
}

/// A registry that says which digest it stored must name ours.
fn confirm(response: &Response, expected: Digest) -> Result<(), Kind> {
    let said = response
        .head
        .headers
        .get("docker-content-digest")
        .and_then(|d| d.to_str().ok())
        .and_then(|d| d.parse().ok());
    match said {
        Some(got) if got != expected => Err(Kind::Digest { expected, got }),
        _ => Ok(()),
    }
}

/// The upload's address with the digest added.
fn upload_uri(asked: &Uri, location: &str, digest: Digest) -> Result<Uri, HttpError> {
    let mut uri = join(asked, location)?;
    // Registries behind a proxy that ends TLS often call themselves http; what was asked over HTTPS
    // stays there.
    if asked.scheme_str() == Some("https") && uri.scheme_str() == Some("http") {
        if asked.host() != uri.host() {
            return Err(HttpError::Protocol(
                "refusing to upload over plain HTTP to another host".into(),
            ));
        }
        let path = uri.path_and_query().map_or("/", |p| p.as_str());
        uri = join(asked, path)?;
    }
    let joint = if uri.query().is_some_and(|q| !q.is_empty()) { "&" } else { "?" };
    let text = uri.to_string();
    join(&uri, &format!("{}{joint}digest={digest}", text.trim_end_matches('?')))
}

impl Upload<'_> {
    /// A fresh body, and the count of what has left of it. Bytes that are not as many as promised
    /// fail the request here, with our own words, instead of at the registry.
    async fn body(&self) -> Result<(Body, Arc<AtomicU64>), Kind> {
        let stream = (self.open)().await.map_err(Kind::Local)?;
        let (total, digest) = (self.descriptor.size, self.descriptor.digest);
        let (sent, progress) = (Arc::new(AtomicU64::new(0)), self.progress.clone());
        progress(0);
        let counter = sent.clone();
        let wrong = move |got: u64| {
            Fault::internal(format!(
                "the blob {digest} has {got} bytes on our side and was announced with {total}"
            ))
        };
        let counted = stream.map(move |piece| {
            let piece = piece?;
            let now = counter.fetch_add(piece.len() as u64, Ordering::Relaxed) + piece.len() as u64;
            if now > total {
                return Err(wrong(now));
            }
            progress(now);
            Ok(piece)
        });
        let counter = sent.clone();
        let end = stream::once(async move {
            let got = counter.load(Ordering::Relaxed);
            if got == total { Ok(Bytes::new()) } else { Err(wrong(got)) }
        });
        let frames = counted
            .chain(end)
            .try_filter(|b| std::future::ready(!b.is_empty()))
            .map_ok(Frame::data);
        Ok((StreamBody::new(frames).boxed_unsync(), sent))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn upload_addresses_get_the_digest_and_keep_tls() {
        let digest = Digest::of("");
        let asked: Uri = "https://r.io/v2/a/blobs/uploads/".parse().unwrap();
        for (location, want) in [
            ("/v2/a/blobs/uploads/1", format!("https://r.io/v2/a/blobs/uploads/1?digest={digest}")),
            ("https://r.io/u?_state=x%3D", format!("https://r.io/u?_state=x%3D&digest={digest}")),
            ("http://r.io/u", format!("https://r.io/u?digest={digest}")),
            ("https://cdn.io/u", format!("https://cdn.io/u?digest={digest}")),
        ] {
            assert_eq!(upload_uri(&asked, location, digest).unwrap().to_string(), want);
        }
        assert!(upload_uri(&asked, "http://evil.io/u", digest).is_err());
    }
}
