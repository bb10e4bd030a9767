//! The client against a registry that misbehaves on demand.

#![allow(clippy::unwrap_used)]

mod fake;
mod tls;

use async_trait::async_trait;
use bytes::Bytes;
use fake::{Fake, Reply, ok, registry, status};
use futures::{FutureExt, StreamExt, stream};
use parking_lot::Mutex;
use shipway_fault::{Class, Code, Fault};
use shipway_oci::{Descriptor, Digest, ImageName, Manifest, media};
use shipway_registry::{
    Anonymous, BlobHost, BlobRange, CredentialSource, Credentials, Given, HostConfig, Mode, Pushed,
    RegistryConfig, Repository,
};
use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

const MANIFEST: &str = r#"{"schemaVersion":2,"config":{},"layers":[]}"#;

fn pull(host: &str) -> Repository {
    at(host, RegistryConfig::default(), Arc::new(Anonymous), Mode::Pull)
}

fn at(
    host: &str,
    config: RegistryConfig,
    credentials: Arc<dyn CredentialSource>,
    mode: Mode,
) -> Repository {
    let name: ImageName = format!("{host}/a/b:1").parse().unwrap();
    registry(config).repository(&name, credentials, mode)
}

fn layer(bytes: &[u8]) -> Descriptor {
    Descriptor::of(media::OCI_LAYER_GZIP, bytes)
}

fn manifest() -> Reply {
    let headers = vec![
        ("content-type", media::OCI_MANIFEST.to_owned()),
        ("docker-content-digest", Digest::of(MANIFEST).to_string()),
        ("content-length", MANIFEST.len().to_string()),
    ];
    Reply::Full(200, headers, MANIFEST.into())
}

fn error(e: impl Into<Fault>) -> Fault {
    e.into()
}

struct Login;

#[async_trait]
impl CredentialSource for Login {
    async fn credentials(&self, _: &str) -> Result<Option<Given<Credentials>>, Fault> {
        Ok(Some(Given::alone(Credentials { username: "me".into(), secret: "s3cret".into() })))
    }
}

async fn read(reader: shipway_registry::BlobReader) -> Result<Vec<u8>, Fault> {
    let mut pieces = std::pin::pin!(reader.into_stream());
    let mut all = Vec::new();
    while let Some(piece) = pieces.next().await {
        all.extend_from_slice(&piece?);
    }
    Ok(all)
}

#[tokio::test]
async fn a_tag_is_resolved_by_head_and_its_manifest_checked() {
    let fake = Fake::start(|_| manifest()).await;
    let repository = pull(&fake.host);
    let found = repository.resolve("1").await.unwrap();
    assert_eq!(found, Descriptor::of(media::OCI_MANIFEST, MANIFEST.as_bytes()));
    assert_eq!(repository.fetch_manifest(&found).await.unwrap(), MANIFEST);
    assert_eq!(
        fake.log(),
        ["HEAD /v2/a/b/manifests/1".to_owned(), format!("GET /v2/a/b/manifests/{}", found.digest)]
    );
    assert!(fake.asked()[0].header("accept").contains(media::OCI_INDEX));
}

#[tokio::test]
async fn a_head_that_says_too_little_is_followed_by_get() {
    for head in [405, 200] {
        let fake =
            Fake::start(move |a| if a.method == "HEAD" { status(head) } else { ok(MANIFEST) })
                .await;
        let found = pull(&fake.host).resolve("1").await.unwrap();
        assert_eq!(found, Descriptor::of(media::OCI_MANIFEST, MANIFEST.as_bytes()));
    }
}

#[tokio::test]
async fn failures_have_the_words_and_codes_that_people_know() {
    let body = |code: &str| {
        Bytes::from(format!(r#"{{"errors":[{{"code":"{code}","message":"the reason"}}]}}"#))
    };
    for (code, reply, want_code, want_class, words) in [
        (404, "MANIFEST_UNKNOWN", Code::NotFound, Class::User, vec!["/a/b:1: not found"]),
        (
            403,
            "DENIED",
            Code::PermissionDenied,
            Class::User,
            vec!["403 Forbidden", "denied: the reason"],
        ),
        (
            429,
            "TOOMANYREQUESTS",
            Code::ResourceExhausted,
            Class::Environment,
            vec!["429 Too Many Requests", "the reason"],
        ),
        (
            500,
            "UNKNOWN",
            Code::Unavailable,
            Class::Environment,
            vec!["500 Internal Server Error", "the reason", "/a/b:1"],
        ),
        (
            401,
            "UNAUTHORIZED",
            Code::Unauthenticated,
            Class::User,
            vec!["pull access denied, repository does not exist or may require authorization"],
        ),
    ] {
        let bytes = body(reply);
        let fake = Fake::start(move |_| Reply::Full(code, vec![], bytes.clone())).await;
        let digest = Descriptor::new(media::OCI_MANIFEST, Digest::of("x"), 1);
        let repository = pull(&fake.host);
        let fault = if code == 404 {
            error(repository.resolve("1").await.unwrap_err())
        } else {
            error(repository.fetch_manifest(&digest).await.unwrap_err())
        };
        assert_eq!((fault.code(), fault.class()), (want_code, want_class), "{fault:?}");
        for word in words {
            assert!(fault.to_string().contains(word), "{fault} lacks {word:?}");
        }
        assert!(fault.hints().any(|h| h.contains(&fake.host)), "{fault:?}");
    }
}

#[tokio::test]
async fn trouble_that_passes_is_waited_out_and_lasting_trouble_is_not() {
    for trouble in [500, 503, 429] {
        let count = AtomicU32::new(0);
        let fake =
            Fake::start(
                move |_| if count.fetch_add(1, SeqCst) < 2 { status(trouble) } else { manifest() },
            )
            .await;
        pull(&fake.host).resolve("1").await.unwrap();
        assert_eq!(fake.log().len(), 3);
    }
    let fake =
        Fake::start(|_| Reply::Full(429, vec![("retry-after", "3600".into())], Bytes::new())).await;
    let fault = error(pull(&fake.host).resolve("1").await.unwrap_err());
    assert!(fault.hints().any(|h| h.contains("3600 s")), "{fault:?}");
    assert_eq!(fake.log().len(), 1, "an hour is not waited for");
}

#[tokio::test]
async fn a_registry_that_never_answers_ends_in_an_error() {
    let fake = Fake::start(|_| Reply::Hang).await;
    let started = Instant::now();
    let fault = error(pull(&fake.host).resolve("1").await.unwrap_err());
    assert_eq!(fault.code(), Code::DeadlineExceeded, "{fault:?}");
    assert!(fault.to_string().contains("timed out waiting for an answer"), "{fault}");
    assert!(started.elapsed() < Duration::from_secs(5));
}

#[tokio::test]
async fn a_port_nobody_listens_on_is_named() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let host = listener.local_addr().unwrap().to_string();
    drop(listener);
    let fault = error(pull(&host).resolve("1").await.unwrap_err());
    assert_eq!(fault.code(), Code::Unavailable, "{fault:?}");
    assert!(fault.to_string().contains("refused") && fault.to_string().contains(&host), "{fault}");
}

#[tokio::test]
async fn a_blob_that_trickles_ends_in_an_error() {
    let bytes = vec![7; 100_000];
    let fake = Fake::start(move |_| {
        Reply::Stall(vec![("content-length", "100000".into())], Bytes::from_static(b"few"))
    })
    .await;
    let reader = pull(&fake.host).fetch_blob(&layer(&bytes), 0).await.unwrap();
    let started = Instant::now();
    let fault = read(reader).await.unwrap_err();
    assert!(
        fault.to_string().contains("Content-Range") || fault.to_string().contains("timed out"),
        "{fault}"
    );
    assert!(started.elapsed() < Duration::from_secs(5));
}

/// A registry with one blob that breaks the connection after `each` bytes and can do ranges, or
/// cannot.
async fn breaking(bytes: Vec<u8>, each: usize, ranges: bool) -> Fake {
    Fake::start(move |a| {
        let from: usize = if ranges {
            a.header("range")
                .trim_start_matches("bytes=")
                .trim_end_matches('-')
                .parse()
                .unwrap_or(0)
        } else {
            0
        };
        let rest = &bytes[from..];
        let code = if from > 0 { 206 } else { 200 };
        let headers = vec![
            ("content-length", rest.len().to_string()),
            ("content-range", format!("bytes {from}-{}/{}", bytes.len() - 1, bytes.len())),
        ];
        Reply::Break(code, headers, Bytes::copy_from_slice(&rest[..rest.len().min(each)]))
    })
    .await
}

#[tokio::test]
async fn a_broken_download_continues_where_it_broke() {
    let bytes: Vec<u8> = (0..900_000u32).map(|i| (i % 251) as u8).collect();
    let fake = breaking(bytes.clone(), 300_000, true).await;
    let reader = pull(&fake.host).fetch_blob(&layer(&bytes), 0).await.unwrap();
    assert!(read(reader.verified()).await.unwrap() == bytes);
    let ranges: Vec<String> = fake.asked().iter().map(|a| a.header("range").to_owned()).collect();
    assert_eq!(ranges.len(), 3, "{ranges:?}");
}

#[tokio::test]
async fn a_download_that_breaks_without_end_is_given_up() {
    let bytes = vec![1; 100_000];
    let fake = breaking(bytes.clone(), 10, true).await;
    let reader = pull(&fake.host).fetch_blob(&layer(&bytes), 0).await.unwrap();
    let fault = read(reader).await.unwrap_err();
    assert!(fault.to_string().contains("the connection broke"), "{fault}");
    assert!(fake.log().len() < 8);
}

#[tokio::test]
async fn ranges_are_served_even_by_servers_without_ranges() {
    let bytes: Vec<u8> = (0..=255).collect();
    for ranges in [true, false] {
        let content = bytes.clone();
        let fake = Fake::start(move |a| match a.header("range") {
            "bytes=10-19" if ranges => Reply::Full(
                206,
                vec![("content-range", "bytes 10-19/256".into())],
                Bytes::copy_from_slice(&content[10..20]),
            ),
            _ => ok(content.clone()),
        })
        .await;
        let reader = pull(&fake.host).fetch_range(&layer(&bytes), 10..20).await.unwrap();
        assert_eq!(read(reader).await.unwrap(), bytes[10..20]);
    }
}

#[tokio::test]
async fn wrong_bytes_are_refused_with_both_digests() {
    let (good, bad) = (b"good".to_vec(), b"evil".to_vec());
    let wrong = bad.clone();
    let fake = Fake::start(move |_| ok(wrong.clone())).await;
    let repository = pull(&fake.host);
    let reader = repository.fetch_blob(&layer(&good), 0).await.unwrap().verified();
    for fault in [
        read(reader).await.unwrap_err(),
        error(repository.fetch_manifest(&layer(&good)).await.unwrap_err()),
    ] {
        let text = fault.to_string();
        assert!(
            text.contains(&Digest::of(&good).to_string())
                && text.contains(&Digest::of(&bad).to_string()),
            "{text}"
        );
        assert_eq!((fault.code(), fault.class()), (Code::DataLoss, Class::Environment));
    }
    let longer = layer(b"longer than that");
    assert!(
        error(repository.fetch_blob(&longer, 0).await.unwrap_err())
            .to_string()
            .contains("size mismatch")
    );
    let pinned = Digest::of(MANIFEST).to_string();
    assert!(
        error(repository.resolve(&pinned).await.unwrap_err())
            .to_string()
            .contains("digest mismatch")
    );
}

#[tokio::test]
async fn a_huge_manifest_is_refused() {
    let fake = Fake::start(|_| ok(vec![b' '; 5 << 20])).await;
    let fault = error(
        pull(&fake.host).fetch_manifest(&Descriptor::new("", Digest::of(""), 1)).await.unwrap_err(),
    );
    assert!(fault.to_string().contains("larger than"), "{fault}");
}

#[tokio::test]
async fn redirects_are_followed_and_take_no_secrets_along() {
    let bytes = b"layer".to_vec();
    let content = bytes.clone();
    let storage = Fake::start(move |_| ok(content.clone())).await;
    // The same machine by another name is another host.
    let to = format!("http://{}/blob?sig=1", storage.host.replace("127.0.0.1", "localhost"));
    let fake = Fake::start(move |a| match a.header("authorization") {
        "" => {
            Reply::Full(401, vec![("www-authenticate", "Basic realm=\"r\"".into())], Bytes::new())
        }
        _ => Reply::Full(307, vec![("location", to.clone())], Bytes::new()),
    })
    .await;
    let repository = at(&fake.host, RegistryConfig::default(), Arc::new(Login), Mode::Pull);
    assert_eq!(read(repository.fetch_blob(&layer(&bytes), 0).await.unwrap()).await.unwrap(), bytes);
    assert_eq!(fake.asked().last().unwrap().header("authorization"), "Basic bWU6czNjcmV0");
    assert_eq!(storage.asked()[0].header("authorization"), "");
    let circle =
        Fake::start(|a| Reply::Full(302, vec![("location", a.path.clone())], Bytes::new())).await;
    assert!(
        error(pull(&circle.host).resolve("1").await.unwrap_err()).to_string().contains("redirects")
    );
}

/// A registry that wants a bearer token from its own `/token`, whose answers `token` gives.
async fn guarded(token: impl Fn(&fake::Asked) -> Reply + Send + Sync + 'static) -> Fake {
    Fake::start(move |a| {
        if a.path.starts_with("/token") {
            return token(a);
        }
        if a.header("authorization") == "Bearer tok" {
            return manifest();
        }
        let challenge = format!(
            "Bearer realm=\"http://{}/token\",service=\"svc\",scope=\"repository:a/b:pull\"{}",
            a.header("host"),
            if a.header("authorization").is_empty() { "" } else { ",error=\"insufficient_scope\"" }
        );
        Reply::Full(401, vec![("www-authenticate", challenge)], Bytes::new())
    })
    .await
}

#[tokio::test]
async fn an_anonymous_token_is_fetched_once_for_many_requests() {
    let fake = guarded(|_| ok(r#"{"token":"tok","expires_in":300}"#)).await;
    let repository = pull(&fake.host);
    let found = repository.resolve("1").await.unwrap();
    repository.fetch_manifest(&found).await.unwrap();
    let tokens: Vec<String> = fake.log().into_iter().filter(|l| l.contains("/token")).collect();
    assert_eq!(tokens, ["GET /token?service=svc&scope=repository%3Aa%2Fb%3Apull"]);
}

#[tokio::test]
async fn credentials_go_by_form_and_then_by_basic_where_forms_are_unknown() {
    let fake =
        guarded(|a| if a.method == "POST" { status(404) } else { ok(r#"{"access_token":"tok"}"#) })
            .await;
    at(&fake.host, RegistryConfig::default(), Arc::new(Login), Mode::Pull)
        .resolve("1")
        .await
        .unwrap();
    let asked = fake.asked();
    let post = asked.iter().find(|a| a.method == "POST").unwrap();
    assert_eq!(
        String::from_utf8_lossy(&post.body),
        "client_id=shipway&service=svc&scope=repository%3Aa%2Fb%3Apull&grant_type=password&username=me&password=s3cret"
    );
    let get = asked.iter().find(|a| a.path.starts_with("/token") && a.method == "GET").unwrap();
    assert_eq!(get.header("authorization"), "Basic bWU6czNjcmV0");
}

#[tokio::test]
async fn a_token_that_dies_is_renewed_and_a_refusal_is_final() {
    let count = AtomicU32::new(0);
    let fake = guarded(move |_| {
        let token = if count.fetch_add(1, SeqCst) == 0 { "old" } else { "tok" };
        ok(format!(r#"{{"token":"{token}","expires_in":3600}}"#))
    })
    .await;
    let repository = pull(&fake.host);
    let fault = error(repository.resolve("1").await.unwrap_err());
    assert_eq!(
        fault.to_string(),
        format!(
            "failed to resolve {h}/a/b:1 at {h}: pull access denied, repository does not exist or may require authorization: \
             server message: insufficient_scope: authorization failed",
            h = fake.host
        )
    );
    assert_eq!(fault.code(), Code::Unauthenticated);
    repository.resolve("1").await.unwrap();
    assert!(!format!("{fault:?}").contains("old"));
}

#[tokio::test]
async fn wrong_credentials_are_said_to_be_wrong_without_showing_them() {
    let fake = guarded(|_| {
        Reply::Full(401, vec![], r#"{"details":"incorrect username or password"}"#.into())
    })
    .await;
    let fault = error(
        at(&fake.host, RegistryConfig::default(), Arc::new(Login), Mode::Pull)
            .resolve("1")
            .await
            .unwrap_err(),
    );
    let text = format!("{fault:?}");
    assert!(
        text.contains("failed to authorize") && text.contains("incorrect username or password"),
        "{text}"
    );
    assert!(text.contains("docker login") && !text.contains("s3cret"), "{text}");
}

#[tokio::test]
async fn mirrors_are_asked_first_and_may_fail() {
    let origin = Fake::start(|_| manifest()).await;
    for bad in [404, 500, 401] {
        let mirror = Fake::start(move |_| status(bad)).await;
        let hosts = HashMap::from([(
            origin.host.clone(),
            HostConfig { mirrors: vec![format!("{}/hub", mirror.host)], ..Default::default() },
        )]);
        let config = RegistryConfig { hosts: hosts.into_iter().collect(), ..Default::default() };
        at(&origin.host, config, Arc::new(Anonymous), Mode::Pull).resolve("1").await.unwrap();
        assert_eq!(mirror.log()[0], format!("HEAD /v2/hub/a/b/manifests/1?ns={}", origin.host));
        assert!(mirror.log().len() <= 3, "a mirror gets no retries");
    }
    assert_eq!(origin.log().len(), 3);
}

#[tokio::test]
async fn pushes_go_to_the_origin_and_mirrors_are_left_alone() {
    let mirror = Fake::start(|_| manifest()).await;
    let origin = Fake::start(|_| status(201)).await;
    let hosts = [(
        origin.host.clone(),
        HostConfig { mirrors: vec![mirror.host.clone()], ..Default::default() },
    )];
    let config = RegistryConfig { hosts: hosts.into_iter().collect(), ..Default::default() };
    let repository = at(&origin.host, config, Arc::new(Anonymous), Mode::Push);
    repository.push_manifest(MANIFEST.into(), media::OCI_MANIFEST, "1").await.unwrap();
    assert!(mirror.log().is_empty());
    assert_eq!(origin.asked()[0].header("content-type"), media::OCI_MANIFEST);
    assert_eq!(origin.asked()[0].body, MANIFEST);
}

fn pieces(bytes: Vec<u8>) -> futures::stream::BoxStream<'static, Result<Bytes, Fault>> {
    stream::iter(bytes.chunks(1000).map(|c| Ok(Bytes::copy_from_slice(c))).collect::<Vec<_>>())
        .boxed()
}

#[tokio::test]
async fn a_blob_is_looked_for_then_uploaded_and_tried_again() {
    let bytes = vec![3; 10_000];
    let puts = AtomicU32::new(0);
    let fake = Fake::start(move |a| match a.method.as_str() {
        "HEAD" => status(404),
        "POST" => Reply::Full(202, vec![("location", "/upload/1?_state=x".into())], Bytes::new()),
        _ if puts.fetch_add(1, SeqCst) == 0 => status(503),
        _ => status(201),
    })
    .await;
    let repository = at(&fake.host, RegistryConfig::default(), Arc::new(Anonymous), Mode::Push);
    let seen = Arc::new(AtomicU64::new(0));
    let (content, heard) = (bytes.clone(), seen.clone());
    let open = move || {
        let content = content.clone();
        async move { Ok(pieces(content)) }.boxed()
    };
    let pushed = repository
        .push_blob(&layer(&bytes), None, open, move |n| heard.store(n, SeqCst))
        .await
        .unwrap();
    assert_eq!((pushed, seen.load(SeqCst)), (Pushed::Uploaded, 10_000));
    let last = fake.asked().pop().unwrap();
    assert_eq!(last.path, format!("/upload/1?_state=x&digest={}", Digest::of(&bytes)));
    assert_eq!((last.body.len(), last.header("content-length")), (10_000, "10000"));
}

#[tokio::test]
async fn blobs_that_are_there_or_can_be_mounted_are_not_sent() {
    let there = Fake::start(|_| status(200)).await;
    let mount = Fake::start(|a| status(if a.method == "HEAD" { 404 } else { 201 })).await;
    for (fake, want) in [(&there, Pushed::Existed), (&mount, Pushed::Mounted)] {
        let repository = at(&fake.host, RegistryConfig::default(), Arc::new(Anonymous), Mode::Push);
        let open = || async { Err(Fault::internal("not to be read")) }.boxed();
        assert_eq!(
            repository.push_blob(&layer(b"x"), Some("other/repo"), open, |_| {}).await.unwrap(),
            want
        );
    }
    assert_eq!(
        mount.log()[1],
        format!("POST /v2/a/b/blobs/uploads/?mount={}&from=other/repo", Digest::of(b"x"))
    );
}

#[tokio::test]
async fn some_repositories_are_tried_for_mounting_and_the_last_upload_is_used() {
    let fake = Fake::start(|a| match (a.method.as_str(), a.path.contains("from=c/")) {
        ("HEAD", _) => status(404),
        ("POST", true) => status(201),
        ("POST", false) => Reply::Full(202, vec![("location", "/u".into())], Bytes::new()),
        _ => status(201),
    })
    .await;
    let repository = at(&fake.host, RegistryConfig::default(), Arc::new(Anonymous), Mode::Push);
    let push = async |from: &[&str]| {
        let open = || async { Ok(stream::iter([Ok(Bytes::from_static(b"x"))]).boxed()) }.boxed();
        repository.push_blob(&layer(b"x"), from.iter().copied(), open, |_| {}).await.unwrap()
    };
    assert_eq!(push(&["a/1", "b/1", "c/1", "d/1"]).await, Pushed::Mounted);
    assert_eq!(fake.log().iter().filter(|l| l.starts_with("POST")).count(), 3);
    // The fourth would do, but the search ends somewhere.
    assert_eq!(push(&["a/1", "a/2", "a/3", "c/1"]).await, Pushed::Uploaded);
    assert_eq!(fake.log().iter().filter(|l| l.starts_with("POST")).count(), 6);
    assert_eq!(fake.log().iter().filter(|l| l.starts_with("PUT")).count(), 1);
}

#[tokio::test]
async fn our_own_failures_are_not_blamed_on_the_registry() {
    let fake = Fake::start(|a| match a.method.as_str() {
        "HEAD" => status(404),
        "POST" => Reply::Full(202, vec![("location", "/u".into())], Bytes::new()),
        _ => status(201),
    })
    .await;
    let repository = at(&fake.host, RegistryConfig::default(), Arc::new(Anonymous), Mode::Push);
    let calls = Arc::new(Mutex::new(0));
    let counted = calls.clone();
    let open = move || {
        *counted.lock() += 1;
        async {
            Ok(stream::iter([
                Ok(Bytes::from_static(b"12")),
                Err(Fault::not_found("blob vanished")),
            ])
            .boxed())
        }
        .boxed()
    };
    let fault = error(repository.push_blob(&layer(b"1234"), None, open, |_| {}).await.unwrap_err());
    assert!(fault.to_string().contains("blob vanished"), "{fault}");
    assert_eq!((fault.code(), *calls.lock()), (Code::NotFound, 1));
    let short = || async { Ok(pieces(vec![1])) }.boxed();
    let fault =
        error(repository.push_blob(&layer(b"1234"), None, short, |_| {}).await.unwrap_err());
    assert!(fault.to_string().contains("1 bytes on our side"), "{fault}");
}

#[tokio::test]
async fn tags_come_page_by_page() {
    let fake = Fake::start(|a| match a.path.as_str() {
        "/v2/a/b/tags/list" => Reply::Full(
            200,
            vec![("link", "</v2/a/b/tags/list?last=y>; rel=\"next\"".into())],
            r#"{"tags":["x","y"]}"#.into(),
        ),
        _ => ok(r#"{"name":"a/b","tags":["z"]}"#),
    })
    .await;
    assert_eq!(pull(&fake.host).tags().await.unwrap(), ["x", "y", "z"]);
}

#[tokio::test]
async fn what_refers_to_a_manifest_is_in_a_list_or_below_a_tag() {
    let subject = Digest::of("subject");
    let list = format!(
        r#"{{"schemaVersion":2,"mediaType":"{}","manifests":[{{"mediaType":"m","digest":"{}","size":3,"artifactType":"sig"}}]}}"#,
        media::OCI_INDEX,
        Digest::of("sig")
    );
    for (place, count) in [
        (format!("/v2/a/b/referrers/{subject}"), 1),
        (format!("/v2/a/b/manifests/sha256-{}", subject.hex()), 1),
        (String::new(), 0),
    ] {
        let bytes = list.clone();
        let digest = format!("/v2/a/b/manifests/{}", Digest::of(&list));
        let fake = Fake::start(move |a| {
            match a.path == place || (a.path == digest && place.contains("sha256-")) {
                true => Reply::Full(
                    200,
                    vec![("content-type", media::OCI_INDEX.into())],
                    bytes.clone().into(),
                ),
                false => status(404),
            }
        })
        .await;
        let found = pull(&fake.host).referrers(subject).await.unwrap();
        assert_eq!(found.len(), count, "{:?}", fake.log());
        assert!(found.iter().all(|d| d.digest == Digest::of("sig") && d.artifact_type.as_deref() == Some("sig")));
    }
}

/// A blob of which a server gives parts.
fn part(blob: &[u8], asked: &fake::Asked) -> Reply {
    let total = blob.len();
    let Some(range) = asked.header("range").strip_prefix("bytes=") else {
        return ok(blob.to_vec());
    };
    let (first, last) = range.split_once('-').unwrap();
    let range = match first {
        "" => total.saturating_sub(last.parse().unwrap())..total,
        _ => first.parse().unwrap()..last.parse::<usize>().unwrap() + 1,
    };
    let said = format!("bytes {}-{}/{total}", range.start, range.end - 1);
    Reply::Full(206, vec![("content-range", said)], blob[range].to_vec().into())
}

async fn get(
    host: &BlobHost,
    blob: &[u8],
    range: BlobRange,
    fresh: bool,
) -> Result<(u64, Vec<u8>), Fault> {
    let mut part = host.open(Digest::of(blob), Some(blob.len() as u64), &range, fresh).await?;
    let mut all = Vec::new();
    while let Some(piece) = part.next().await? {
        all.extend_from_slice(&piece);
    }
    Ok((part.start(), all))
}

#[tokio::test]
async fn parts_of_a_blob_come_in_one_request_from_one_host() {
    let blob: Vec<u8> = (0..=255).collect();
    let of_fake = blob.clone();
    let fake = Fake::start(move |asked| part(&of_fake, asked)).await;
    let hosts = pull(&fake.host).blob_hosts().await.unwrap();
    assert_eq!((hosts.len(), hosts[0].authority()), (1, fake.host.as_str()));
    let host = &hosts[0];
    let read = get(host, &blob, BlobRange::Bytes(10..20), false).await.unwrap();
    assert_eq!(read, (10, blob[10..20].to_vec()));
    let read = get(host, &blob, BlobRange::Last(6), true).await.unwrap();
    assert_eq!(read, (250, blob[250..].to_vec()));
    let read = get(host, &blob, BlobRange::Last(1000), false).await.unwrap();
    assert_eq!(read, (0, blob.clone()));
    host.warm(Digest::of(&blob)).await;
    let asked: Vec<(String, String)> = fake
        .asked()
        .iter()
        .map(|a| (a.header("range").to_owned(), a.header("cache-control").to_owned()))
        .collect();
    let want = [("bytes=10-19", ""), ("bytes=-6", "no-cache"), ("bytes=-1000", ""), ("", "")];
    assert_eq!(asked, want.map(|(range, cache)| (range.to_owned(), cache.to_owned())));
    assert!(fake.log()[3].starts_with("HEAD "));
}

#[tokio::test]
async fn what_is_not_the_asked_part_is_refused_or_said() {
    let blob: Vec<u8> = (0..=255).collect();
    let full = |said: &str| {
        let headers = vec![("content-range", said.to_owned())];
        Reply::Full(206, headers, Bytes::from_static(&[0; 10]))
    };
    for said in ["bytes 11-20/256", "bytes 10-20/256", "bytes 10-19/255", "bytes 10-19/5", "", "x"]
    {
        let said = said.to_owned();
        let fake = Fake::start(move |_| full(&said)).await;
        let host = pull(&fake.host).blob_hosts().await.unwrap().remove(0);
        get(&host, &blob, BlobRange::Bytes(10..20), false).await.unwrap_err();
        assert_eq!(fake.log().len(), 1);
    }
    // Too little is told apart by who reads.
    let fake = Fake::start(move |_| full("bytes 10-14/256")).await;
    let host = pull(&fake.host).blob_hosts().await.unwrap().remove(0);
    assert!(get(&host, &blob, BlobRange::Bytes(10..20), false).await.is_ok());
    // A server that does not know ranges.
    let of_fake = blob.clone();
    let fake = Fake::start(move |_| ok(of_fake.clone())).await;
    let host = pull(&fake.host).blob_hosts().await.unwrap().remove(0);
    let read = get(&host, &blob, BlobRange::Bytes(10..20), false).await.unwrap();
    assert_eq!(read, (0, blob));
    let error = get(&host, b"other", BlobRange::Bytes(1..2), false).await.unwrap_err();
    assert!(error.to_string().contains("size mismatch"), "{error}");
}

/// Where a blob is redirected to is remembered, without what only the registry may know, until
/// that address is good no more.
#[tokio::test]
async fn redirects_of_blobs_are_remembered_until_they_expire() {
    let blob: Vec<u8> = (0..=255).collect();
    let expired = Arc::new(AtomicU32::new(0));
    let (of_fake, state) = (blob.clone(), expired.clone());
    let store = Fake::start(move |asked| match state.load(SeqCst) {
        1 if asked.path.ends_with("sig=0") => status(403),
        2 => status(503),
        _ => part(&of_fake, asked),
    })
    .await;
    let (to, life) = (store.host.clone(), Arc::new(Mutex::new("X-Amz-Expires=600")));
    let (signed, count) = (life.clone(), AtomicU32::new(0));
    let fake = Fake::start(move |asked| {
        assert!(!asked.header("authorization").is_empty() || asked.header("x").is_empty());
        let n = count.fetch_add(1, SeqCst);
        let location = format!("http://{to}/blob?{}&sig={n}", signed.lock());
        Reply::Full(307, vec![("location", location)], Bytes::new())
    })
    .await;
    // The two fakes are one address with two ports, which are two hosts.
    let host = pull(&fake.host).blob_hosts().await.unwrap().remove(0);
    let range = || BlobRange::Bytes(10..20);
    for _ in 0..3 {
        assert_eq!(get(&host, &blob, range(), false).await.unwrap().1, blob[10..20]);
    }
    assert_eq!((fake.log().len(), store.log().len()), (1, 3));
    // The address is refused: the registry is asked again.
    expired.store(1, SeqCst);
    get(&host.clone(), &blob, range(), false).await.unwrap();
    assert_eq!((fake.log().len(), store.log().len()), (2, 5));
    // The store is in trouble, which a new address would not help.
    expired.store(2, SeqCst);
    get(&host, &blob, range(), false).await.unwrap_err();
    assert_eq!((fake.log().len(), store.log().len()), (2, 6));
    // Asked to forget everything on the way.
    expired.store(0, SeqCst);
    get(&host, &blob, range(), true).await.unwrap();
    assert_eq!(store.asked().last().unwrap().header("cache-control"), "no-cache");
    assert_eq!(fake.log().len(), 3);
    // One that expires at once is not used again.
    *life.lock() = "X-Amz-Expires=1";
    get(&host, &blob, range(), true).await.unwrap();
    get(&host, &blob, range(), false).await.unwrap();
    assert_eq!(fake.log().len(), 5);
}

/// A registry that lists what refers to a manifest is believed; in another one the list is an index
/// under a tag.
#[tokio::test]
async fn what_refers_to_a_manifest_is_found_again() {
    for lists in [true, false] {
        let kept: Arc<Mutex<HashMap<String, Bytes>>> = Arc::default();
        let of_fake = kept.clone();
        let fake = Fake::start(move |asked| {
            let name = asked.path.rsplit('/').next().unwrap().to_owned();
            let mut kept = of_fake.lock();
            if asked.method == "PUT" {
                kept.insert(name, asked.body.clone());
                kept.insert(Digest::of(&asked.body).to_string(), asked.body.clone());
                let listed = ("oci-subject", Digest::of(MANIFEST).to_string());
                return Reply::Full(
                    201,
                    lists.then_some(listed).into_iter().collect(),
                    Bytes::new(),
                );
            }
            match kept.get(&name) {
                Some(bytes) if !asked.path.contains("/referrers/") => {
                    let headers = vec![("content-type", media::OCI_INDEX.to_owned())];
                    Reply::Full(200, headers, bytes.clone())
                }
                _ => status(404),
            }
        })
        .await;
        let repository = at(&fake.host, RegistryConfig::default(), Arc::new(Anonymous), Mode::Push);
        let subject = Descriptor::of(media::OCI_MANIFEST, MANIFEST.as_bytes());
        let manifest = |n: &str| Manifest {
            schema_version: 2,
            media_type: Some(media::OCI_MANIFEST.into()),
            artifact_type: Some("application/x".into()),
            config: Descriptor::of("application/vnd.oci.empty.v1+json", b"{}"),
            layers: vec![],
            subject: Some(subject.clone()),
            annotations: [("n".to_owned(), n.to_owned())].into(),
        };
        let first = repository.push_referrer(&manifest("1")).await.unwrap();
        repository.push_referrer(&manifest("2")).await.unwrap();
        repository.push_referrer(&manifest("2")).await.unwrap();
        let found = repository.referrers(subject.digest).await.unwrap();
        if lists {
            assert_eq!(kept.lock().len(), 2);
            continue;
        }
        assert_eq!((found.len(), &found[0]), (2, &first));
        assert_eq!(found[1].artifact_type.as_deref(), Some("application/x"));
        assert_eq!(found[1].annotations["n"], "2");
        let none = Manifest { subject: None, ..manifest("3") };
        assert!(repository.push_referrer(&none).await.is_err());
    }
}
