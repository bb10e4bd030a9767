use super::*;
use crate::listing::LIST_FROM;
use crate::{
    Download,
    standin::{Held, Seen, StandIn, answer, layer},
};
use http::Response;
use shipway_fault::Code;
use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

/// A bucket `b` in memory.
#[derive(Clone, Default)]
struct Store(Arc<Mutex<BTreeMap<String, (Bytes, SystemTime)>>>);

impl Store {
    fn put(&self, key: &str, bytes: &[u8], age: Duration) {
        let written = SystemTime::now() - age;
        self.0.lock().insert(key.into(), (Bytes::copy_from_slice(bytes), written));
    }

    fn keys(&self) -> Vec<String> {
        self.0.lock().keys().cloned().collect()
    }

    /// As much of the protocol as is used here.
    fn respond(&self, seen: &Seen) -> Response<Bytes> {
        let (path, query) = seen.target.split_once('?').unwrap_or((&seen.target, ""));
        let key = path.strip_prefix("/b/").unwrap_or_default().replace("%3A", ":");
        let mut objects = self.0.lock();
        match (seen.method.as_str(), query) {
            ("GET", q) if q.starts_with("list-type=2") => {
                let prefix = q.split("prefix=").nth(1).unwrap_or_default().replace("%2F", "/");
                let all: String = objects
                    .range(prefix.clone()..)
                    .take_while(|(k, _)| k.starts_with(&prefix))
                    .map(|(k, (bytes, at))| {
                        let (size, at) = (bytes.len(), timestamp::format(*at));
                        format!("<Contents><Key>{k}</Key><LastModified>{at}</LastModified><Size>{size}</Size></Contents>")
                    })
                    .collect();
                answer(
                    200,
                    format!(
                        "<ListBucketResult><IsTruncated>false</IsTruncated>{all}</ListBucketResult>"
                    ),
                )
            }
            ("GET" | "HEAD", "") => match objects.get(&key) {
                None => answer(404, "<Error><Code>NoSuchKey</Code></Error>"),
                Some((bytes, at)) => {
                    let from = seen
                        .header("range")
                        .strip_prefix("bytes=")
                        .and_then(|r| r.strip_suffix('-'));
                    let from: usize = from.map_or(0, |r| r.parse().unwrap());
                    let mut response =
                        answer(if from > 0 { 206 } else { 200 }, bytes.slice(from..));
                    let headers = response.headers_mut();
                    headers.insert("last-modified", httpdate::fmt_http_date(*at).parse().unwrap());
                    if from > 0 {
                        let range = format!("bytes {from}-{}/{}", bytes.len() - 1, bytes.len());
                        headers.insert("content-range", range.parse().unwrap());
                    }
                    response
                }
            },
            ("PUT", q) if seen.headers.contains_key("x-amz-copy-source") => {
                assert_eq!(q, "");
                let source = seen.header("x-amz-copy-source").replace("%3A", ":");
                let object = objects[source.strip_prefix("b/").unwrap()].0.clone();
                objects.insert(key, (object, SystemTime::now()));
                answer(200, "<CopyObjectResult><ETag>t</ETag></CopyObjectResult>")
            }
            ("PUT", q) => {
                let name = if q.is_empty() { key } else { format!("{key}?{q}") };
                objects.insert(name, (seen.body.clone(), SystemTime::now()));
                let mut response = answer(200, "");
                response.headers_mut().insert("etag", "\"e\"".parse().unwrap());
                response
            }
            ("POST", "uploads=") => answer(200, "<R><UploadId>u</UploadId></R>"),
            ("POST", "uploadId=u") => {
                let parts: Vec<String> =
                    objects.keys().filter(|k| k.starts_with(&format!("{key}?"))).cloned().collect();
                let number = |k: &String| {
                    k.split("partNumber=")
                        .nth(1)
                        .unwrap()
                        .split('&')
                        .next()
                        .unwrap()
                        .parse::<u32>()
                        .unwrap()
                };
                let mut parts: Vec<_> = parts.into_iter().map(|k| (number(&k), k)).collect();
                parts.sort();
                let whole: Vec<u8> =
                    parts.iter().flat_map(|(_, k)| objects.remove(k).unwrap().0.to_vec()).collect();
                objects.insert(key, (whole.into(), SystemTime::now()));
                answer(200, "<CompleteMultipartUploadResult/>")
            }
            ("DELETE", "uploadId=u") => {
                objects.retain(|k, _| !k.starts_with(&format!("{key}?")));
                answer(204, "")
            }
            other => panic!("{other:?}"),
        }
    }
}

fn machine() -> Machine {
    Machine::new(Default::default())
}

fn attributes(url: &str, more: &[(&str, &str)]) -> CacheAttributes {
    let fixed = [
        ("bucket", "b"),
        ("region", "r"),
        ("endpoint_url", url),
        ("use_path_style", "true"),
        ("access_key_id", "me"),
        ("secret_access_key", "secret"),
    ];
    fixed.iter().chain(more).map(|(k, v)| ((*k).into(), (*v).into())).collect()
}

async fn open(standin: &StandIn, more: &[(&str, &str)]) -> Arc<dyn ObjectCache> {
    S3::new(machine()).open(&attributes(&standin.url(), more)).await.unwrap()
}

async fn serve(store: &Store) -> StandIn {
    let store = store.clone();
    StandIn::start(move |seen| store.respond(seen)).await
}

#[tokio::test]
async fn a_cache_is_written_and_read() {
    let store = Store::default();
    let standin = serve(&store).await;
    let cache = open(&standin, &[("name", "one;two"), ("prefix", "p/")]).await;
    assert!(cache.configs().await.unwrap().is_empty());
    let content = Bytes::from_static(b"a layer");
    let descriptor = layer(&content);
    assert!(cache.present(std::slice::from_ref(&descriptor)).await.unwrap().is_empty());
    standin.take();
    cache.write(&descriptor, &Held(content.clone())).await.unwrap();
    // The store is told which bytes to expect, in a way that every S3 knows.
    let put = standin.take().remove(0);
    assert_eq!(put.header("x-amz-content-sha256"), descriptor.digest.hex());
    assert!(put.header("authorization").starts_with("AWS4-HMAC-SHA256 Credential=me/"));
    for newer in ["x-amz-sdk-checksum-algorithm", "x-amz-trailer", "content-encoding"] {
        assert!(!put.headers.contains_key(newer), "{newer}");
    }
    cache.publish("{}".into()).await.unwrap();
    let key = format!("p/blobs/{}", descriptor.digest);
    assert_eq!(store.keys(), [key.as_str(), "p/manifests/one", "p/manifests/two"]);
    assert_eq!(cache.configs().await.unwrap(), ["{}"]);
    let mut download = Download::start(cache, &descriptor).await.unwrap();
    assert_eq!(download.next().await.unwrap(), Some(content));
    assert_eq!(download.next().await.unwrap(), None);
}

#[tokio::test]
async fn one_list_tells_what_is_there() {
    let store = Store::default();
    let standin = serve(&store).await;
    let layers: Vec<_> = (0..50_u32).map(|n| layer(&n.to_le_bytes())).collect();
    for (n, layer) in layers.iter().enumerate().filter(|(n, _)| n % 2 == 0) {
        store.put(&format!("blobs/{}", layer.digest), &(n as u32).to_le_bytes(), Duration::ZERO);
    }
    let cache = open(&standin, &[]).await;
    assert_eq!(cache.present(&layers).await.unwrap().len(), 25);
    assert_eq!(standin.take().len(), 1);
    // Few are asked for one by one.
    assert_eq!(cache.present(&layers[..2]).await.unwrap().len(), 1);
    let asked: Vec<_> = standin.take().into_iter().map(|s| s.method).collect();
    assert_eq!(asked, ["HEAD", "HEAD"]);
    // What has another length is not the layer.
    store.put(&format!("blobs/{}", layers[0].digest), b"torn", Duration::ZERO);
    store.put(&format!("blobs/{}", layers[2].digest), b"to", Duration::ZERO);
    assert_eq!(cache.present(&layers).await.unwrap().len(), 24);
}

#[tokio::test]
async fn caches_are_listed_with_their_times() {
    let store = Store::default();
    let standin = serve(&store).await;
    for (key, age) in [("p/manifests/a-1", 10), ("p/manifests/a-2", 0), ("p/manifests/b", 0)] {
        store.put(key, b"{}", Duration::from_secs(age));
    }
    let cache = open(&standin, &[("prefix", "p/")]).await;
    let mut names = cache.names("a-").await.unwrap();
    names.sort_by_key(|(_, written)| *written);
    assert_eq!(names.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), ["a-1", "a-2"]);
    assert!(names.iter().all(|(_, written)| written.is_some()));
    assert!(cache.names("c").await.unwrap().is_empty());
    assert_eq!(standin.take().len(), 2);
}

#[tokio::test]
async fn an_export_with_nothing_new_is_two_requests_and_an_import_one() {
    let store = Store::default();
    let standin = serve(&store).await;
    let content = |n: u32| Bytes::from(n.to_le_bytes().repeat(1 << 14));
    let layers: Vec<_> = (0..100).map(|n| layer(&content(n))).collect();
    let config = Bytes::from(vec![b' '; 20_000]);
    // An export as `remotecache` does it: what is there, then what is not, then the config.
    let export = async || {
        let cache = open(&standin, &[]).await;
        let there = cache.present(&layers).await.unwrap();
        for (n, layer) in layers.iter().enumerate().filter(|(_, l)| !there.contains(&l.digest)) {
            cache.write(layer, &Held(content(n as u32))).await.unwrap();
        }
        cache.publish(config.clone()).await.unwrap();
        let asked = standin.take();
        (asked.len(), asked.iter().map(|s| s.body.len()).sum::<usize>())
    };
    let (first, all) = export().await;
    assert_eq!(first, 102);
    let (again, sent) = export().await;
    assert_eq!(again, 2);
    assert!(sent * 20 <= all, "{sent} of {all} bytes were sent again");
    open(&standin, &[]).await.configs().await.unwrap();
    assert_eq!(standin.take().len(), 1);
}

#[tokio::test]
async fn a_bucket_that_cannot_be_listed_or_is_large_is_asked_for_each() {
    let store = Store::default();
    let layers: Vec<_> = (0..9_u32).map(|n| layer(&n.to_le_bytes())).collect();
    for (n, layer) in layers.iter().enumerate() {
        store.put(&format!("blobs/{}", layer.digest), &(n as u32).to_le_bytes(), Duration::ZERO);
    }
    let mut sorted: Vec<_> = layers.iter().map(|l| format!("blobs/{}", l.digest)).collect();
    sorted.sort();
    let first = format!(
        "<L><IsTruncated>true</IsTruncated><Contents><Key>{}</Key><Size>4</Size></Contents></L>",
        sorted[3]
    );
    for (status, list, heads) in [(403, String::new(), 9), (501, String::new(), 9), (200, first, 5)]
    {
        let of = store.clone();
        let standin = StandIn::start(move |seen| match seen.target.contains("list-type") {
            true => answer(status, list.clone()),
            false => of.respond(seen),
        })
        .await;
        let cache = open(&standin, &[]).await;
        // Those that a list ought to have and has not are not there.
        let there = cache.present(&layers).await.unwrap().len();
        assert_eq!(there, if status == 200 { 6 } else { 9 });
        let asked = standin.take().into_iter().filter(|s| s.method == "HEAD").count();
        assert_eq!(asked, heads);
    }
}

#[tokio::test]
async fn old_layers_are_made_new_so_that_they_stay() {
    let store = Store::default();
    let standin = serve(&store).await;
    let (old, new) = (layer(b"old"), layer(b"new"));
    store.put(&format!("blobs/{}", old.digest), b"old", Duration::from_secs(7200));
    store.put(&format!("blobs/{}", new.digest), b"new", Duration::from_secs(10));
    let cache = open(&standin, &[("touch_refresh", "1h")]).await;
    let both = [old.clone(), new.clone()];
    assert_eq!(cache.present(&both).await.unwrap().len(), 2);
    let copies: Vec<_> = standin.take().into_iter().filter(|s| s.method == "PUT").collect();
    assert_eq!(copies.len(), 1);
    assert_eq!(copies[0].header("x-amz-metadata-directive"), "REPLACE");
    assert!(copies[0].target.contains(&old.digest.hex()));
    cache.present(&both).await.unwrap();
    assert!(standin.take().iter().all(|s| s.method == "HEAD"));
}

#[tokio::test]
async fn large_layers_go_in_parts_and_leave_nothing_when_they_fail() {
    let store = Store::default();
    let broken = Arc::new(AtomicUsize::new(0));
    let (of, fails) = (store.clone(), broken.clone());
    let standin = StandIn::start(move |seen| {
        if seen.target.contains("partNumber=2") && fails.load(Ordering::Relaxed) == 1 {
            return answer(403, "<Error><Code>AccessDenied</Code></Error>");
        }
        of.respond(seen)
    })
    .await;
    let cache = open(&standin, &[]).await;
    let mut content = vec![7_u8; SINGLE as usize + 3];
    content[PART as usize] = 1;
    let content = Bytes::from(content);
    let descriptor = layer(&content);
    cache.write(&descriptor, &Held(content.clone())).await.unwrap();
    let key = format!("blobs/{}", descriptor.digest);
    assert_eq!(store.keys(), [key.as_str()]);
    assert_eq!(Digest::of(&store.0.lock()[&key].0), descriptor.digest);
    broken.store(1, Ordering::Relaxed);
    store.0.lock().clear();
    let failed = cache.write(&descriptor, &Held(content)).await.unwrap_err();
    assert_eq!(failed.code(), Code::PermissionDenied);
    assert!(store.keys().is_empty(), "{:?}", store.keys());
}

#[tokio::test]
async fn a_busy_store_is_asked_again_and_a_failing_one_not_for_ever() {
    let store = Store::default();
    let busy = Arc::new(AtomicUsize::new(2));
    let (of, left) = (store.clone(), busy.clone());
    let standin = StandIn::start(move |seen| {
        let more = left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1));
        match more {
            Ok(n) => {
                let status = if n % 2 == 0 { 503 } else { 429 };
                let mut response =
                    answer(status, "<Error><Code>SlowDown</Code><Message>slow</Message></Error>");
                response.headers_mut().insert("retry-after", "0".parse().unwrap());
                response
            }
            Err(_) => of.respond(seen),
        }
    })
    .await;
    let cache = open(&standin, &[]).await;
    let (content, descriptor) = (Bytes::from_static(b"x"), layer(b"x"));
    cache.write(&descriptor, &Held(content.clone())).await.unwrap();
    assert_eq!(standin.take().len(), 3);
    busy.store(1000, Ordering::Relaxed);
    let failed = cache.write(&descriptor, &Held(content)).await.unwrap_err();
    assert!(matches!(failed.code(), Code::Unavailable | Code::ResourceExhausted));
    assert!(failed.to_string().contains("SlowDown: slow"), "{failed}");
    assert_eq!(standin.take().len(), 5);
    let twice = open(&standin, &[("retry_max_attempts", "2")]).await;
    assert!(twice.configs().await.is_err());
    assert_eq!(standin.take().len(), 2);
}

#[tokio::test]
async fn a_store_that_asks_for_more_time_than_there_is_is_not_waited_for() {
    let standin = StandIn::start(|_| {
        let mut response = answer(429, "");
        response.headers_mut().insert("retry-after", "3600".parse().unwrap());
        response
    })
    .await;
    let cache = open(&standin, &[]).await;
    let failed = cache.configs().await.unwrap_err();
    assert_eq!(failed.code(), Code::ResourceExhausted);
    assert_eq!(standin.take().len(), 1);
}

#[tokio::test]
async fn bytes_from_outside_are_bounded() {
    let long = Bytes::from(vec![b'x'; MAX_ANSWER as usize + 1]);
    let standin = StandIn::start(move |_| answer(200, long.clone())).await;
    let cache = open(&standin, &[]).await;
    let layers: Vec<_> = (0..LIST_FROM as u32).map(|n| layer(&n.to_le_bytes())).collect();
    assert!(cache.present(&layers).await.is_err_and(|f| f.to_string().contains("larger than")));
    // A layer is as long as its descriptor says.
    let mut download = Download::start(cache, &layers[0]).await.unwrap();
    let failed = loop {
        match download.next().await {
            Ok(piece) => assert!(piece.is_some()),
            Err(fault) => break fault,
        }
    };
    assert!(failed.to_string().contains("is longer than 4 bytes"), "{failed}");
}

#[tokio::test]
async fn a_download_goes_on_where_it_broke() {
    let content = Bytes::from(vec![9_u8; 1000]);
    let whole = content.clone();
    let standin = StandIn::start(move |seen| {
        let range = seen.header("range").to_owned();
        let from: usize = match range.strip_prefix("bytes=").and_then(|r| r.strip_suffix('-')) {
            Some(from) => from.parse().unwrap(),
            None => 0,
        };
        // At most 400 bytes at a time.
        let to = (from + 400).min(whole.len());
        let mut response = answer(if from > 0 { 206 } else { 200 }, whole.slice(from..to));
        if from > 0 {
            let range = format!("bytes {from}-{}/1000", to - 1);
            response.headers_mut().insert("content-range", range.parse().unwrap());
        }
        response
    })
    .await;
    let cache = open(&standin, &[]).await;
    let mut download = Download::start(cache, &layer(&content)).await.unwrap();
    let mut got = Vec::new();
    while let Some(piece) = download.next().await.unwrap() {
        got.extend_from_slice(&piece);
    }
    assert_eq!(Bytes::from(got), content);
    assert_eq!(standin.take().len(), 3);
}

/// Who signs a request on a machine with this environment.
async fn signed_by(variables: &[(&str, &str)]) -> Result<(String, String)> {
    let s3 = S3::new(machine().with_environment(variables));
    let mut attributes = attributes("http://h", &[]);
    attributes.retain(|k, _| !k.contains("key"));
    let config = s3.config(&attributes)?;
    let (mut head, ()) =
        http::Request::get("http://h/b/k").body(()).expect("a request").into_parts();
    crate::calls::Sign::sign(&s3.signer(&config), &mut head).await?;
    let text = |name: &str| {
        head.headers.get(name).and_then(|v| v.to_str().ok()).unwrap_or_default().to_owned()
    };
    let who = text("authorization");
    let who = who.split("Credential=").nth(1).and_then(|w| w.split('/').next()).unwrap_or_default();
    Ok((who.to_owned(), text("x-amz-security-token")))
}

#[tokio::test]
async fn credentials_come_from_where_the_machine_has_them() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("credentials");
    std::fs::write(
        &file,
        "[default]\naws_access_key_id = first\naws_secret_access_key = s\n[ci]\naws_access_key_id = second\naws_secret_access_key = s\naws_session_token = t\n",
    )
    .unwrap();
    let file = file.to_str().unwrap();
    let metadata = StandIn::start(|seen| {
        let keys = |id: &str| {
            format!(r#"{{"Code":"Success","AccessKeyId":"{id}","SecretAccessKey":"s","Token":"t","Expiration":"2999-01-01T00:00:00Z"}}"#)
        };
        match seen.line().as_str() {
            "PUT /latest/api/token" => answer(200, "session"),
            "GET /latest/meta-data/iam/security-credentials/" => answer(200, "role"),
            "GET /latest/meta-data/iam/security-credentials/role"
                if seen.header("x-aws-ec2-metadata-token") == "session" =>
            {
                answer(200, keys("instance"))
            }
            "GET /task" if seen.header("authorization") == "pod" => answer(200, keys("task")),
            _ => answer(404, ""),
        }
    })
    .await;
    let (instance, task) = (metadata.url(), format!("{}/task", metadata.url()));
    let none = ("AWS_EC2_METADATA_DISABLED", "true");
    for (variables, who) in [
        (&[("AWS_ACCESS_KEY_ID", "env"), ("AWS_SECRET_ACCESS_KEY", "s"), none][..], ("env", "")),
        (&[("AWS_SHARED_CREDENTIALS_FILE", file), none], ("first", "")),
        (&[("AWS_SHARED_CREDENTIALS_FILE", file), ("AWS_PROFILE", "ci"), none], ("second", "t")),
        (
            &[
                ("AWS_CONTAINER_CREDENTIALS_FULL_URI", &task),
                ("AWS_CONTAINER_AUTHORIZATION_TOKEN", "pod"),
                none,
            ],
            ("task", "t"),
        ),
        (&[("AWS_EC2_METADATA_SERVICE_ENDPOINT", &instance)], ("instance", "t")),
    ] {
        let found = signed_by(variables).await;
        assert_eq!(found.unwrap(), (who.0.to_owned(), who.1.to_owned()), "{variables:?}");
    }
    let failed = signed_by(&[none]).await.unwrap_err();
    assert_eq!(failed.code(), Code::Unauthenticated);
    assert!(failed.to_string().contains("no usable credentials"), "{failed}");
}

#[test]
fn equal_places_are_one_cache() {
    let place = |more: &[(&str, &str)]| S3::new(machine()).places(&attributes("http://h", more));
    let plain = place(&[]).unwrap();
    assert_eq!(place(&[("mode", "max"), ("name", "buildkit")]).unwrap(), plain);
    assert_ne!(place(&[("name", "other")]).unwrap(), plain);
    assert_ne!(place(&[("prefix", "p/")]).unwrap(), plain);
    assert!(!plain.concat().contains("secret"));
}
