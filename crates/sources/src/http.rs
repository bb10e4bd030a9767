//! `http://` and `https://`: one file, asked for again only if it changed (rows `src.http*`).

mod attrs;
pub(crate) mod file;
mod kept;

use crate::{
    PinnedSource, SourceContext, SourceSpec,
    clients::ClientServices,
    keyed_locks::KeyedLocks,
    keys,
    login::{Login, split_login},
    memo::KnownFile,
    port::Source,
};
pub(crate) use attrs::Shape;
use attrs::{HttpSpec, Signed};
use bytes::Bytes;
use futures::StreamExt as _;
use futures::{FutureExt as _, future::BoxFuture};
use http::{HeaderMap, HeaderValue, Method, StatusCode, Uri, header};
use kept::KnownFiles;
use serde::Serialize;
use shipway_attest::{self as attest, Capture};
use shipway_fault::{Class, Code, Context, Fault, Result, redact};
use shipway_http::{BodyReader, Response};
use shipway_llb::{HttpFacts, ResolveOptions, SourceFacts};
use shipway_oci::{ChecksumAlgorithm, Digest};
use shipway_progress::Reporter;
use shipway_refs::{ImmutableRef, RecordType, RefStore};
use shipway_registry::Registry;
use shipway_session::Upload;
use shipway_signing::{Trusted, Validity, verify_detached};
use std::{path::PathBuf, time::SystemTime};

/// Most bytes that a checksum may have behind the file's.
const MAX_SUFFIX: usize = 4096;

/// HttpSource of web servers.
pub(crate) struct HttpSource {
    refs: RefStore,
    registry: Registry,
    locks: KeyedLocks,
    /// What was fetched, by request.
    known: KnownFiles,
}

#[derive(Serialize)]
struct HttpKey<'a> {
    filename: &'a str,
    perm: u32,
    uid: u32,
    gid: u32,
    digest: Digest,
    modified: Option<String>,
    secret: &'a str,
    headers: &'a [(String, String)],
}

impl HttpSource {
    /// `kept` is a file for what is known, so that it is after a restart, too.
    pub(crate) fn new(refs: RefStore, registry: Registry, kept: Option<PathBuf>) -> Self {
        Self { refs, registry, locks: KeyedLocks::default(), known: KnownFiles::load(kept) }
    }

    /// The file as this build knows it, with the checksum and the signature that are asked for.
    async fn verified(
        &self,
        file: &HttpSpec,
        cx: &SourceContext,
    ) -> Result<(KnownFile, ImmutableRef)> {
        let (known, state) = self.known_to_build(file, cx).await?;
        if let Some(wanted) = file.checksum.filter(|w| *w != known.digest) {
            return Err(mismatch(file, known.digest, wanted));
        }
        if let Some(signed) = &file.signed {
            verify(&state, &known.filename, signed.clone())
                .await
                .context(|| format!("verify the signature of {}", file.shown()))?;
        }
        Ok((known, state))
    }

    /// The file as this build knows it; asked for when it does not.
    async fn known_to_build(
        &self,
        file: &HttpSpec,
        cx: &SourceContext,
    ) -> Result<(KnownFile, ImmutableRef)> {
        let request = file.request_key();
        if let Some(known) = cx
            .memo
            .file(&request)
            .filter(|(known, _)| file.checksum.is_none_or(|c| c == known.digest))
        {
            return Ok(known);
        }
        let (known, state) = self.known_or_fetched(file, cx).await?;
        cx.memo.keep_file(request, known.clone(), state.clone());
        Ok((known, state))
    }

    fn recall(&self, file: &HttpSpec) -> Option<KnownFile> {
        self.known.get(&file.request_key())
    }

    async fn remember(&self, file: &HttpSpec, known: KnownFile) {
        // Nothing that was made of a password is kept, and an upload comes once.
        let lasting = file.login.is_none() && !file.is_upload();
        self.known.insert(file.request_key(), known, lasting).await;
    }

    /// The file as the server has it now: the one we have if the server says so, else fetched.
    async fn known_or_fetched(
        &self,
        file: &HttpSpec,
        cx: &SourceContext,
    ) -> Result<(KnownFile, ImmutableRef)> {
        let _turn = self.locks.lock(&file.request_key().to_string()).await;
        let mut have = None;
        if let Some(known) = self.recall(file)
            && let Some(state) = self.refs.get(&known.state).await
        {
            have = Some((known, state));
        }
        if file.is_upload() {
            // An address is for one upload, and a client can send it once only.
            if let Some(have) = have {
                return Ok(have);
            }
            let body =
                cx.clients.upload(file.uri.host().unwrap_or_default(), file.uri.path()).await?;
            let (known, state) =
                self.store(file, &HeaderMap::new(), Body::Upload(body), &cx.reporter).await?;
            self.remember(file, known.clone()).await;
            return Ok((known, state));
        }
        let client = self.registry.http_client().await?;
        let headers = headers(file, &*cx.clients).await?;
        if let Some((known, state)) = &have
            && let Some(etag) = &known.etag
            && let Ok(value) = HeaderValue::from_str(etag)
        {
            // HEAD first: some servers ignore `If-None-Match` on GET and would send everything.
            let mut conditional = headers.clone();
            conditional.insert(header::IF_NONE_MATCH, value);
            if let Ok(answer) = client.fetch(Method::HEAD, file.uri.clone(), conditional).await
                && matches!(answer.head.status, StatusCode::OK | StatusCode::NOT_MODIFIED)
                && etag_of(&answer.head.headers)
                    .map_or(answer.head.status == StatusCode::NOT_MODIFIED, |e| e == *etag)
            {
                return Ok((known.clone(), state.clone()));
            }
        }
        let answer = client.fetch(Method::GET, file.uri.clone(), headers).await;
        let answer = answer.map_err(Fault::from).context(|| format!("fetch {}", file.shown()))?;
        if !answer.head.status.is_success() {
            return Err(refused(file, &answer));
        }
        let (known, state) =
            self.store(file, &answer.head.headers, Body::Answer(answer.body), &cx.reporter).await?;
        self.remember(file, known.clone()).await;
        Ok((known, state))
    }

    /// Writes an answer's body into a new state.
    async fn store(
        &self,
        file: &HttpSpec,
        headers: &HeaderMap,
        mut body: Body,
        reporter: &Reporter,
    ) -> Result<(KnownFile, ImmutableRef)> {
        let filename = file::name_of(file, Some(headers));
        let etag = etag_of(headers);
        let text = |name: header::HeaderName| headers.get(name).and_then(|v| v.to_str().ok());
        // Some servers say UTC where the specification wants GMT.
        let modified = text(header::LAST_MODIFIED)
            .and_then(|t| httpdate::parse_http_date(&t.replace("UTC", "GMT")).ok());
        let total = text(header::CONTENT_LENGTH).and_then(|t| t.parse::<i64>().ok()).unwrap_or(0);
        let gzip = text(header::CONTENT_ENCODING).is_some_and(|e| e.eq_ignore_ascii_case("gzip"));
        let description = format!("http url {}", file.shown());
        let state = self.refs.mutable(None, description.clone(), RecordType::Regular, None).await?;
        let mount = state.mount().await?;
        let mut target = file::create(mount.path(), &filename, gzip).await?;
        let mut current = 0;
        let status = format!("downloading {filename}");
        while let Some(piece) = body.next().await.context(|| format!("fetch {}", file.shown()))? {
            current += piece.len() as i64;
            target.write(piece).await?;
            reporter.status(status.clone(), current, total, false);
        }
        if total > 0 && current != total {
            return Err(Fault::unavailable(format!(
                "fetch {}: got {current} of {total} bytes",
                file.shown()
            )));
        }
        let digest = target.finish(&file.shape, modified).await?;
        reporter.status(status, current, total, true);
        mount.unmount().await?;
        // A wrong file is not worth keeping.
        if let Some(wanted) = file.checksum.filter(|w| *w != digest) {
            state.release().await?;
            return Err(mismatch(file, digest, wanted));
        }
        let state = state.commit(description).await?;
        Ok((KnownFile { digest, filename, etag, modified, state: state.id().clone() }, state))
    }
}

impl Source for HttpSource {
    fn pin<'a>(
        &'a self,
        spec: &'a SourceSpec,
        cx: &'a SourceContext,
    ) -> BoxFuture<'a, Result<PinnedSource>> {
        async move {
            let file = HttpSpec::parse(spec)?;
            let (digest, filename, modified) = match file.checksum {
                // What is known by its digest need not be asked for, unless it is to be read.
                Some(digest) if file.signed.is_none() => (digest, file::name_of(&file, None), None),
                _ => {
                    let known = self.verified(&file, cx).await?.0;
                    (known.digest, known.filename, known.modified)
                }
            };
            let key = HttpKey {
                filename: &filename,
                perm: file.shape.perm,
                uid: file.shape.uid,
                gid: file.shape.gid,
                digest,
                modified: modified.map(httpdate::fmt_http_date),
                secret: &file.auth_secret,
                headers: &file.headers,
            };
            Ok(PinnedSource {
                keys: vec![keys::digest("http", &key)],
                ephemeral: false,
                digest: Some(digest.to_string()),
                stored: None,
            })
        }
        .boxed()
    }

    fn fetch<'a>(
        &'a self,
        spec: &'a SourceSpec,
        pin: &'a PinnedSource,
        cx: &'a SourceContext,
    ) -> BoxFuture<'a, Result<ImmutableRef>> {
        async move {
            let file = HttpSpec::parse(spec)?;
            let wanted: Option<Digest> =
                file.checksum.or_else(|| pin.digest.as_ref().and_then(|d| d.parse().ok()));
            if let Some(known) = self.recall(&file)
                && Some(known.digest) == wanted
                && let Some(state) = self.refs.get(&known.state).await
            {
                return Ok(state);
            }
            let (known, state) = self.known_to_build(&file, cx).await?;
            match wanted {
                Some(wanted) if wanted != known.digest => {
                    Err(mismatch(&file, known.digest, wanted))
                }
                _ => Ok(state),
            }
        }
        .boxed()
    }

    fn resolve<'a>(
        &'a self,
        spec: &'a SourceSpec,
        options: &'a ResolveOptions,
        cx: &'a SourceContext,
    ) -> BoxFuture<'a, Result<SourceFacts>> {
        async move {
            let checksum = options.http_checksum.clone();
            if checksum.as_ref().is_some_and(|(_, suffix)| suffix.len() > MAX_SUFFIX) {
                return Err(Fault::invalid(format!(
                    "http checksum request suffix exceeds max size {MAX_SUFFIX}"
                )));
            }
            let file = HttpSpec::parse(spec)?;
            let http = match (file.checksum, checksum) {
                (Some(digest), None) if file.signed.is_none() => HttpFacts {
                    digest: digest.to_string(),
                    filename: file::name_of(&file, None),
                    ..HttpFacts::default()
                },
                (_, checksum) => {
                    let (known, state) = self.verified(&file, cx).await?;
                    let other = match checksum {
                        Some((algorithm, suffix)) => Some((
                            sum(&state, &known.filename, algorithm, suffix.clone()).await?,
                            suffix,
                        )),
                        None => None,
                    };
                    HttpFacts {
                        digest: known.digest.to_string(),
                        filename: known.filename,
                        last_modified: known.modified,
                        other,
                    }
                }
            };
            Ok(SourceFacts { http: Some(http), ..Default::default() })
        }
        .boxed()
    }

    fn capture(&self, spec: &SourceSpec, pin: &PinnedSource, capture: &mut Capture) -> Result<()> {
        if let Some(digest) = pin.digest.as_ref().and_then(|d| d.parse().ok()) {
            capture.add_http(attest::HttpSource { url: spec.identifier.clone(), digest });
        }
        Ok(())
    }
}

/// The checksum of the file in `state` with `suffix` behind it.
async fn sum(
    state: &ImmutableRef,
    filename: &str,
    algorithm: ChecksumAlgorithm,
    suffix: Bytes,
) -> Result<String> {
    let mount = state.mount().await.context(|| format!("hash {filename}"))?;
    let filename = filename.to_owned();
    let hash = move || {
        let failed = |e| Fault::io(format!("hash {filename}"), e);
        let file = file::open(mount.path(), &filename)?;
        algorithm.of(std::io::Read::chain(file, &suffix[..])).map_err(failed)
    };
    shipway_task::blocking("hash a file", hash).await
}

/// Whether the file in `state` is signed.
async fn verify(state: &ImmutableRef, filename: &str, signed: Signed) -> Result<()> {
    let mount = state.mount().await?;
    let filename = filename.to_owned();
    let verify = move || {
        let file = file::open(mount.path(), &filename)?;
        // As BuildKit has it, no attribute asks for keys that are valid today.
        let trusted =
            Trusted { keys: &signed.keys, validity: Validity::AtSigning, now: SystemTime::now() };
        verify_detached(file, &signed.signature, &trusted)
    };
    shipway_task::blocking("verify a signature", verify).await
}

/// Where a file's bytes come from.
enum Body {
    Answer(BodyReader),
    Upload(Upload),
}

impl Body {
    async fn next(&mut self) -> Result<Option<Bytes>> {
        match self {
            Self::Answer(body) => body.next().await.map_err(Fault::from),
            Self::Upload(upload) => upload.next().await.transpose(),
        }
    }
}

/// Servers that know BuildKit by its name are to know us.
const USER_AGENT: &str = concat!("buildkit/v0.31 shipway/", env!("CARGO_PKG_VERSION"));

/// The headers of a request, with what the user wants kept secret marked so (row `src.http.auth`).
async fn headers(file: &HttpSpec, clients: &dyn ClientServices) -> Result<HeaderMap> {
    let mut headers = HeaderMap::new();
    headers.insert(header::USER_AGENT, HeaderValue::from_static(USER_AGENT));
    headers.insert(header::ACCEPT_ENCODING, HeaderValue::from_static("gzip"));
    for (name, value) in &file.headers {
        if let (Ok(name), Ok(value)) =
            (name.parse::<header::HeaderName>(), HeaderValue::from_str(value))
        {
            headers.insert(name, value);
        }
    }
    if let Some(login) = &file.login {
        headers.insert(header::AUTHORIZATION, login.header()?);
    }
    let host = file.uri.host().unwrap_or_default();
    let secrets = match file.auth_secret.as_str() {
        "" => vec![
            (format!("HTTP_AUTH_HEADER_{host}"), ""),
            (format!("HTTP_AUTH_TOKEN_{host}"), "Bearer "),
        ],
        named => vec![(named.to_owned(), "")],
    };
    for (name, prefix) in secrets {
        let found = match clients.secret(&name).await {
            Ok(found) => found,
            Err(e) if !file.auth_secret.is_empty() => {
                return Err(e.context(format!("failed to retrieve HTTP auth secret {name}")));
            }
            Err(_) => None,
        };
        let Some(secret) = found else {
            if file.auth_secret.is_empty() {
                continue;
            }
            return Err(Fault::not_found(format!(
                "failed to retrieve HTTP auth secret {name}: secret {name}: not found"
            )));
        };
        let text = [prefix.as_bytes(), secret.trim_ascii_end()].concat();
        let mut value = HeaderValue::from_bytes(&text)
            .map_err(|_| Fault::invalid(format!("the secret {name} cannot be sent as a header")))?;
        value.set_sensitive(true);
        headers.insert(header::AUTHORIZATION, value);
    }
    Ok(headers)
}

/// A weak and a strong tag of the same text name the same file for us.
fn etag_of(headers: &HeaderMap) -> Option<String> {
    let text = headers.get(header::ETAG)?.to_str().ok()?;
    let text = text.strip_prefix("W/").unwrap_or(text);
    (!text.is_empty() && text.len() <= 1024).then(|| text.to_owned())
}

fn refused(file: &HttpSpec, answer: &Response) -> Fault {
    let status = answer.head.status;
    let code = match status {
        StatusCode::NOT_FOUND | StatusCode::GONE => Code::NotFound,
        StatusCode::UNAUTHORIZED => Code::Unauthenticated,
        StatusCode::FORBIDDEN => Code::PermissionDenied,
        StatusCode::TOO_MANY_REQUESTS => Code::ResourceExhausted,
        s if s.is_server_error() => Code::Unavailable,
        _ => Code::Unknown,
    };
    let fault =
        Fault::new(code, format!("fetch {}: invalid response status {status}", file.shown()));
    match status {
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
            let host = file.uri.host().unwrap_or_default();
            fault.hint(format!(
                "give credentials as the secret HTTP_AUTH_TOKEN_{host} or HTTP_AUTH_HEADER_{host}"
            ))
        }
        _ => fault,
    }
}

fn mismatch(file: &HttpSpec, got: Digest, expected: Digest) -> Fault {
    Fault::new(
        Code::FailedPrecondition,
        format!("digest mismatch for {}: {got} (expected: {expected})", file.shown()),
    )
    .with_class(Class::User)
    .hint("the file at that address has changed; if that is right, change the checksum")
}

impl HttpSpec {
    /// The address without what may be secret.
    fn shown(&self) -> String {
        shipway_http::display_of(&self.uri)
    }
}

/// An address that can be asked, and the user and password in it, encoded for a header.
fn address(text: &str) -> Result<(Uri, Option<Login>)> {
    let bad = |why: &str| {
        Fault::invalid(format!(
            "invalid URL {:?}: {why}",
            redact(text.split('?').next().unwrap_or_default())
        ))
    };
    let (plain, login) = split_login(text.split('#').next().unwrap_or_default());
    let uri: Uri = plain.parse().map_err(|e: http::uri::InvalidUri| bad(&e.to_string()))?;
    if uri.host().is_none_or(str::is_empty) {
        return Err(bad("it names no host"));
    }
    Ok((uri, login))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        SourceMemo,
        clients::{ClientDirectory, SshAgent},
    };
    use async_trait::async_trait;
    use shipway_oci::Platform;
    use shipway_storage::fake::FakeStorage;
    use std::sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    };

    /// A client that uploads, once.
    #[derive(Default)]
    struct Uploader(AtomicUsize);

    #[async_trait]
    impl ClientServices for Uploader {
        fn credentials(&self) -> Arc<dyn shipway_registry::CredentialSource> {
            Arc::new(shipway_registry::Anonymous)
        }
        async fn secret(&self, _: &str) -> Result<Option<Vec<u8>>> {
            Ok(None)
        }
        async fn directories(
            &self,
            _: Option<&shipway_session::SessionId>,
        ) -> Result<Vec<Arc<dyn ClientDirectory>>> {
            Ok(Vec::new())
        }
        async fn ssh_agent(&self, _: &str) -> Result<SshAgent> {
            Err(Fault::unimplemented("agents"))
        }
        async fn upload(&self, host: &str, path: &str) -> Result<Upload> {
            assert_eq!((host, path, self.0.fetch_add(1, Relaxed)), ("buildkit-session", "/id", 0));
            Ok(Box::pin(futures::stream::iter(["one ", "two"].map(|piece| Ok(piece.into())))))
        }
        fn session_id(&self) -> Option<shipway_session::SessionId> {
            None
        }
    }

    #[tokio::test]
    async fn an_upload_is_pulled_once_whoever_asks() {
        let root = tempfile::tempdir().unwrap();
        let refs = RefStore::open(FakeStorage::new().unwrap().storage(), root.path().to_owned())
            .await
            .unwrap();
        let files = HttpSource::new(refs.clone(), Registry::new(Default::default()), None);
        let reporter = Reporter::new(Digest::of(""), "v".into(), vec![], None);
        let clients = Arc::new(Uploader::default());
        let cx = SourceContext { clients, reporter, memo: SourceMemo::default() };
        let attrs = [("http.filename".to_owned(), "context".to_owned())].into();
        let spec = SourceSpec {
            identifier: "http://buildkit-session/id".into(),
            attrs,
            platform: Platform::host(),
        };
        let (pin, other) = tokio::join!(files.pin(&spec, &cx), files.pin(&spec, &cx));
        let pin = pin.unwrap();
        assert_eq!(pin.digest, Some(Digest::of("one two").to_string()));
        assert_eq!(other.unwrap().digest, pin.digest);
        let state = files.fetch(&spec, &pin, &cx).await.unwrap();
        let mount = state.mount().await.unwrap();
        assert_eq!(std::fs::read_to_string(mount.path().join("context")).unwrap(), "one two");
        drop((mount, state, cx));
        refs.drained().await;
    }
}
