use super::*;
use crate::{
    Download,
    standin::{Held, layer},
};
use shipway_testkit::GithubCache;

const SCOPE: &str = "refs/heads/feature";

fn attributes(github: &GithubCache, second: bool, more: &[(&str, &str)]) -> CacheAttributes {
    let (url, token) = (github.url(), github.token());
    let fixed = [(if second { "url_v2" } else { "url" }, url.as_str()), ("token", &token)];
    fixed.iter().chain(more).map(|(k, v)| ((*k).into(), (*v).into())).collect()
}

async fn open(github: &GithubCache, second: bool, more: &[(&str, &str)]) -> Arc<dyn ObjectCache> {
    let machine = Machine::new(Default::default())
        .with_environment(&[("GITHUB_API_URL", github.url().as_str())]);
    Gha::new(machine).open(&attributes(github, second, more)).await.unwrap()
}

async fn all(cache: &Arc<dyn ObjectCache>, layer: &Descriptor) -> Result<Bytes> {
    let mut download = Download::start(cache.clone(), layer).await?;
    let mut bytes = Vec::new();
    while let Some(piece) = download.next().await? {
        bytes.extend_from_slice(&piece);
    }
    Ok(bytes.into())
}

#[tokio::test]
async fn a_cache_goes_through_both_protocols() {
    for second in [false, true] {
        let github = GithubCache::start(SCOPE);
        let cache = open(&github, second, &[]).await;
        assert!(cache.configs().await.unwrap().is_empty());
        // More than one part, by either protocol.
        let large = Bytes::from(vec![5_u8; (64 << 20) + 7]);
        let (small, whole) = (layer(b"small"), layer(&large));
        let both = [small.clone(), whole.clone()];
        assert!(cache.present(&both).await.unwrap().is_empty());
        cache.write(&small, &Held("small".into())).await.unwrap();
        cache.write(&whole, &Held(large.clone())).await.unwrap();
        assert_eq!(cache.present(&both).await.unwrap().len(), 2, "{second}");
        // Somebody else was faster.
        cache.write(&small, &Held("small".into())).await.unwrap();
        cache.publish("{}".into()).await.unwrap();
        let scope = &Digest::of(SCOPE).hex()[..8];
        let index = format!("index-buildkit-1-{scope}#1");
        let keys = [
            format!("buildkit-blob-1-{}", small.digest),
            format!("buildkit-blob-1-{}", whole.digest),
            index,
        ];
        assert_eq!(github.keys(), keys, "{second}");
        assert_eq!(all(&cache, &small).await.unwrap(), "small");
        assert_eq!(Digest::of(all(&cache, &whole).await.unwrap()), whole.digest);
        let other = open(&github, second, &[]).await;
        assert_eq!(other.configs().await.unwrap(), ["{}"]);
        // Another name is another index, of the same layers.
        let named = open(&github, second, &[("scope", "other")]).await;
        assert!(named.configs().await.unwrap().is_empty());
        assert_eq!(named.present(&both).await.unwrap().len(), 2);
    }
}

#[tokio::test]
async fn an_index_changes_its_number_when_it_changes() {
    for second in [false, true] {
        let github = GithubCache::start(SCOPE);
        let cache = open(&github, second, &[]).await;
        cache.publish("[1]".into()).await.unwrap();
        github.take();
        cache.publish("[1]".into()).await.unwrap();
        // Looked for, read, and left.
        assert_eq!(github.take().len(), 2, "{second}");
        cache.publish("[1,2]".into()).await.unwrap();
        cache.publish("[3]".into()).await.unwrap();
        assert_eq!(cache.configs().await.unwrap(), ["[3]"]);
        let keys = github.keys();
        assert!(keys.len() == 3 && keys[2].ends_with("#3"), "{keys:?}");
        // The next number is taken by somebody who never finished.
        cache.publish("[4]".into()).await.unwrap();
        let last = github.keys().pop().unwrap();
        let blocked = last.replace("#4", "#5");
        let version = Cache::version();
        let config = Config::of(&attributes(&github, second, &[])).unwrap();
        let machine = Machine::new(Default::default());
        let token = Token::parse(&config.token, SystemTime::now()).unwrap();
        let client = machine.client().await.unwrap();
        let raw = Cache {
            calls: Calls::new(client.clone(), "test", Patience::default(), error),
            blobs: Calls::new(client, "test", Patience::default(), blocks::error),
            api: String::new(),
            entries: Mutex::default(),
            config,
            token,
        };
        raw.reserve(&blocked).await.unwrap();
        assert_eq!(version.len(), 64);
        cache.publish("[5]".into()).await.unwrap();
        assert!(github.keys().pop().unwrap().ends_with("#6"));
        assert_eq!(cache.configs().await.unwrap(), ["[5]"]);
    }
}

#[tokio::test]
async fn one_list_of_keys_tells_what_is_there() {
    let github = GithubCache::start(SCOPE);
    let token = github.api_token();
    let api = [("repository", "o/r"), ("ghtoken", token.as_str())];
    let cache = open(&github, true, &api).await;
    let layers: Vec<_> = (0..120_u32).map(|n| layer(&n.to_le_bytes())).collect();
    for (n, layer) in layers.iter().enumerate().skip(10) {
        cache.write(layer, &Held(Bytes::copy_from_slice(&(n as u32).to_le_bytes()))).await.unwrap();
    }
    github.take();
    assert_eq!(cache.present(&layers).await.unwrap().len(), 110);
    // Two pages of the job's branch, and one of the other that it may read.
    let asked = github.take();
    assert_eq!(asked, ["GET /repos/o/r/actions/caches"; 3], "{asked:?}");
    // A token that the API does not accept is no obstacle.
    let cache = open(&github, true, &[("repository", "o/r"), ("ghtoken", "wrong")]).await;
    assert_eq!(cache.present(&layers[9..11]).await.unwrap().len(), 1);
}

#[tokio::test]
async fn limits_are_waited_for_and_what_was_evicted_is_gone() {
    for second in [false, true] {
        let github = GithubCache::start(SCOPE);
        let cache = open(&github, second, &[]).await;
        github.limit(3);
        cache.write(&layer(b"x"), &Held("x".into())).await.unwrap();
        github.limit(100);
        let failed = cache.write(&layer(b"y"), &Held("y".into())).await.unwrap_err();
        assert_eq!(failed.code(), Code::ResourceExhausted, "{failed}");
        let token = github.token();
        assert!(!format!("{failed:?}").contains(&token));
        github.limit(0);
        assert_eq!(all(&cache, &layer(b"x")).await.unwrap(), "x");
        github.evict(|key| key.contains("blob"));
        let other = open(&github, second, &[]).await;
        assert!(all(&other, &layer(b"x")).await.unwrap_err().is_not_found());
        assert!(other.present(&[layer(b"x")]).await.unwrap().is_empty());
    }
}

#[test]
fn attributes_are_read_as_buildkit_does() {
    let of = |given: &[(&str, &str)]| {
        let token = [("token", "t")];
        let all = token.iter().chain(given);
        Config::of(&all.map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect())
    };
    let plain = of(&[("url", "http://u/")]).unwrap();
    assert_eq!((plain.url.as_str(), plain.scope.as_str()), ("http://u", "buildkit"));
    assert!(!plain.second && plain.api.is_none() && plain.timeout == TIMEOUT);
    let both = [("url", "http://u"), ("url_v2", "http://v")];
    assert!(of(&both).is_ok_and(|c| c.second && c.url == "http://v"));
    let first = of(&[both[0], both[1], ("version", "1")]).unwrap();
    assert!(!first.second && first.url == "http://u");
    assert!(of(&[("url", "http://u"), ("version", "2")]).is_ok_and(|c| c.second));
    let old = "https://results-receiver.actions.githubusercontent.com/";
    assert!(of(&[("url", old)]).is_ok_and(|c| c.second));
    let more = [("url", "http://u"), ("timeout", "30s"), ("repository", "o/r"), ("ghtoken", "g")];
    let more = of(&more).unwrap();
    assert_eq!(more.timeout, Duration::from_secs(30));
    assert_eq!(more.api, Some(("o/r".into(), "g".into())));
    for (wrong, why) in [
        (&[][..], "url not set for github actions cache"),
        (&[("url", "")], "url not set"),
        (&[("url", "u")], "not a valid address"),
        (&[("url", "http://u?x")], "not a valid address"),
        (&[("url", "http://u"), ("version", "x")], "failed to parse api version"),
        (&[("url", "http://u"), ("timeout", "x")], "failed to parse timeout"),
        (&[("url", "http://u"), ("repository", "o/r?x"), ("ghtoken", "g")], "not a repository"),
    ] {
        let fault = of(wrong).map(drop).unwrap_err();
        assert!(fault.message().contains(why), "{fault}");
    }
    let none = Config::of(&CacheAttributes::new()).map(drop).unwrap_err();
    assert_eq!(none.message(), "token not set for github actions cache");
}

#[test]
fn errors_of_both_protocols_are_read() {
    let first =
        "\u{feff}{\"typeKey\":\"ArtifactCacheItemAlreadyExistsException\",\"message\":\"m\"}";
    let words = error(first.as_bytes());
    assert_eq!(
        (words.code.as_str(), words.message.as_str()),
        ("ArtifactCacheItemAlreadyExistsException", "m")
    );
    let second = error(br#"{"code":"already_exists","msg":"m"}"#);
    assert_eq!((second.code.as_str(), second.message.as_str()), ("already_exists", "m"));
    assert_eq!(error(b"<html>"), StoreError::default());
}
