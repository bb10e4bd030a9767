//! Sources over the in-memory storage, with a registry, a web server and a git server on loopback.

#![allow(clippy::unwrap_used)]

mod web;

use bytes::Bytes;
use shipway_attest::Stored;
use shipway_fault::Code;
use shipway_http::DeniedNetworks;
use shipway_llb::ResolveOptions;
use shipway_oci::{
    ChainId, Descriptor, DiffId, Digest, ImageConfig, Index, Manifest, Platform, RootFs, media,
};
use shipway_progress::{Journal, Reporter};
use shipway_refs::{
    Compression, Fetch, LocalMount, NamedRef, NamedRequest, RecordType, RefStore, Sharing,
};
use shipway_registry::{Registry, RegistryConfig};
use shipway_session::{SessionGroup, SessionHub};
use shipway_sources::{LocalImages, SourceContext, SourceMemo, SourceOptions, SourceSpec, Sources};
use shipway_storage::{
    ContentStore, Images, Labels, LeaseId, Leases, built_labels, fake::FakeStorage,
};
use std::{
    collections::HashMap, os::unix::fs::MetadataExt, path::Path, process::Command, sync::Arc,
    time::SystemTime,
};
use web::{Web, ok, status};

struct Bench {
    fake: FakeStorage,
    refs: RefStore,
    sources: Sources,
    root: tempfile::TempDir,
}

impl Bench {
    async fn new() -> Self {
        Self::preferring(LocalImages::default()).await
    }

    async fn preferring(prefer: LocalImages) -> Self {
        let fake = FakeStorage::new().unwrap();
        let root = tempfile::tempdir().unwrap();
        let refs = RefStore::open(fake.storage(), root.path().to_owned()).await.unwrap();
        let files = Some(root.path().join("files.json"));
        let options = SourceOptions { prefer, files, ..Default::default() };
        let sources = Sources::new(refs.clone(), Registry::new(RegistryConfig::default()), options);
        Self { fake, refs, sources, root }
    }
}

fn cx() -> SourceContext {
    let sessions = SessionGroup::new(SessionHub::new(), []);
    let reporter = Reporter::new(Digest::of("v"), "v".into(), vec![], None);
    SourceContext::new(sessions, reporter, SourceMemo::default())
}

fn spec(identifier: impl Into<String>, attrs: &[(&str, &str)]) -> SourceSpec {
    let attrs = attrs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
    SourceSpec { identifier: identifier.into(), attrs, platform: "linux/amd64".parse().unwrap() }
}

/// An image of two platforms in one index, as documents by digest.
struct TwoPlatforms {
    documents: HashMap<Digest, Vec<u8>>,
    /// Lists of what refers to a document.
    referrers: HashMap<Digest, Vec<u8>>,
    index: Descriptor,
    layer: Descriptor,
    diff: DiffId,
}

fn image() -> TwoPlatforms {
    let mut documents = HashMap::new();
    let mut put = |media_type: &str, bytes: Vec<u8>| {
        let d = Descriptor::of(media_type, &bytes);
        documents.insert(d.digest, bytes);
        d
    };
    let layer = put(media::OCI_LAYER, b"this would be a tar".to_vec());
    let diff = DiffId(Digest::of(b"this would be a tar"));
    let mut manifests = Vec::new();
    for platform in ["linux/amd64", "linux/arm64"] {
        let platform: Platform = platform.parse().unwrap();
        let mut config = ImageConfig::empty(&platform);
        config.rootfs = RootFs { kind: "layers".into(), diff_ids: vec![diff] };
        let config = put(media::OCI_CONFIG, serde_json::to_vec(&config).unwrap());
        let manifest = Manifest {
            schema_version: 2,
            media_type: Some(media::OCI_MANIFEST.into()),
            artifact_type: None,
            config,
            layers: vec![layer.clone()],
            subject: None,
            annotations: Default::default(),
        };
        let mut entry = put(media::OCI_MANIFEST, serde_json::to_vec(&manifest).unwrap());
        entry.platform = Some(platform);
        manifests.push(entry);
    }
    let index = Index {
        schema_version: 2,
        media_type: Some(media::OCI_INDEX.into()),
        manifests,
        annotations: Default::default(),
    };
    let index = put(media::OCI_INDEX, serde_json::to_vec(&index).unwrap());
    TwoPlatforms { documents, referrers: HashMap::new(), index, layer, diff }
}

impl TwoPlatforms {
    fn put(
        &mut self,
        media_type: &str,
        bytes: impl serde::Serialize,
        notes: &[(&str, &str)],
    ) -> Descriptor {
        let bytes = serde_json::to_vec(&bytes).unwrap();
        let mut d = Descriptor::of(media_type, &bytes);
        d.annotations = notes.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        self.documents.insert(d.digest, bytes);
        d
    }

    fn put_manifest(&mut self, layers: &[Descriptor], notes: &[(&str, &str)]) -> Descriptor {
        let config = self.put(media::EMPTY_JSON, serde_json::json!({}), &[]);
        let manifest = serde_json::json!({ "schemaVersion": 2, "mediaType": media::OCI_MANIFEST, "config": config, "layers": layers });
        self.put(media::OCI_MANIFEST, manifest, notes)
    }

    /// Says two things of the first platform's image, and signs that; gives the manifest, what was
    /// said and the signature's manifest.
    fn attest(&mut self) -> (Descriptor, Vec<Descriptor>, Descriptor) {
        let mut index: Index = serde_json::from_slice(&self.documents[&self.index.digest]).unwrap();
        let said = ["p", "q"].map(|t| {
            self.put(
                media::IN_TOTO,
                serde_json::json!({ "predicateType": t }),
                &[("in-toto.io/predicate-type", t)],
            )
        });
        let about = index.manifests[0].digest.to_string();
        let notes = [
            ("vnd.docker.reference.type", "attestation-manifest"),
            ("vnd.docker.reference.digest", &*about),
        ];
        let manifest = self.put_manifest(&said, &notes);
        index.manifests.push(manifest.clone());
        self.index = self.put(media::OCI_INDEX, index, &[]);
        let bundle = self.put("application/vnd.dev.sigstore.bundle.v0.3+json", "signed", &[]);
        let mut signature = self.put_manifest(&[bundle], &[]);
        let mut other = self.put_manifest(&[], &[("no", "signature")]);
        other.artifact_type = Some("application/x".into());
        signature.artifact_type = Some("application/vnd.dev.sigstore.bundle.v0.3+json".into());
        let list = Index {
            schema_version: 2,
            media_type: Some(media::OCI_INDEX.into()),
            manifests: vec![other, signature.clone()],
            annotations: Default::default(),
        };
        self.referrers.insert(manifest.digest, serde_json::to_vec(&list).unwrap());
        (manifest, said.into(), signature)
    }
}

/// A registry that has the image under the tag `1` of every repository.
fn registry(image: &TwoPlatforms) -> Web {
    let (documents, referrers, index) =
        (image.documents.clone(), image.referrers.clone(), image.index.digest);
    Web::start(move |line, _| {
        let last = line.rsplit('/').next().unwrap();
        if line.contains("/referrers/") {
            return last
                .parse()
                .ok()
                .and_then(|d| referrers.get(&d))
                .map_or(status(404), |list| ok(list.clone()));
        }
        let digest = if last == "1" { Some(index) } else { last.parse().ok() };
        match digest.and_then(|d| documents.get(&d).map(|b| (d, b))) {
            None => status(404),
            Some((digest, bytes)) => {
                let kind = if digest == index { media::OCI_INDEX } else { media::OCI_MANIFEST };
                ok(bytes.clone())
                    .with("Docker-Content-Digest", digest.to_string())
                    .with("Content-Type", kind)
            }
        }
    })
}

#[tokio::test]
async fn what_is_said_of_an_image_is_told_with_its_signature() {
    let bench = Bench::new().await;
    let mut image = image();
    let (manifest, said, signature) = image.attest();
    let web = registry(&image);
    let source = spec(format!("docker-image://{}/a/b:1", web.host), &[]);
    let want = ResolveOptions { attestations: Some(vec!["q".into()]), ..Default::default() };
    let found = bench
        .sources
        .resolve(&source, &want, &cx())
        .await
        .unwrap()
        .image
        .unwrap()
        .attestations
        .unwrap();
    assert_eq!(
        (found.root, found.attestation, &found.signatures[..]),
        (image.index.digest, Some(manifest.digest), &[signature.digest][..])
    );
    let bundle = Digest::of(serde_json::to_vec("signed").unwrap());
    let mut told = [image.index.digest, manifest.digest, said[1].digest, signature.digest, bundle];
    told.sort();
    assert_eq!(found.blobs.keys().copied().collect::<Vec<_>>(), told);
    assert!(
        found
            .blobs
            .iter()
            .all(|(digest, (d, bytes))| *digest == Digest::of(bytes) && d.digest == *digest)
    );
    // Nothing is said of the other platform, and nothing is told that nobody asked for.
    let arm = SourceSpec { platform: "linux/arm64".parse().unwrap(), ..source.clone() };
    let other = bench
        .sources
        .resolve(&arm, &want, &cx())
        .await
        .unwrap()
        .image
        .unwrap()
        .attestations
        .unwrap();
    assert_eq!((other.attestation, other.blobs.len()), (None, 1));
    assert_ne!(other.image, found.image);
    let plain = bench
        .sources
        .resolve(&source, &ResolveOptions::default(), &cx())
        .await
        .unwrap()
        .image
        .unwrap();
    assert_eq!(plain.attestations, None);
}

#[tokio::test]
async fn an_image_is_pinned_and_made_a_state_without_fetching_a_layer() {
    let bench = Bench::new().await;
    let image = image();
    let web = registry(&image);
    let source = spec(format!("docker-image://{}/a/b:1", web.host), &[]);
    let pin = bench.sources.pin(&source, &cx()).await.unwrap();
    assert_eq!(pin.digest, Some(image.index.digest.to_string()));
    assert_eq!(
        (pin.keys.len(), pin.keys[1], pin.ephemeral),
        (2, ChainId::of([image.diff]).unwrap().0, false)
    );
    let state = bench.sources.fetch(&source, &pin, &cx()).await.unwrap();
    let layers = state.layers().await.unwrap();
    assert_eq!((layers[0].diff_id, layers[0].lazy), (image.diff, true));
    assert!(
        !web.log().iter().any(|l| l.contains("/blobs/") && l.contains(&image.layer.digest.hex())),
        "{:?}",
        web.log()
    );
    let blobs = state.blobs(Compression::default(), Fetch::Everything, None).await.unwrap();
    assert_eq!(
        (blobs[0].descriptor.digest, bench.fake.has(&image.layer).await.unwrap()),
        (image.layer.digest, true)
    );
    let meta = bench
        .sources
        .resolve(&source, &ResolveOptions::default(), &cx())
        .await
        .unwrap()
        .image
        .unwrap();
    assert_eq!(meta.digest, image.index.digest);
    assert!(String::from_utf8_lossy(&meta.config).contains("amd64"));

    // What was fetched once serves the pinned name without another question.
    web.forget();
    let pinned = spec(format!("docker-image://{}/a/b:1@{}", web.host, image.index.digest), &[]);
    assert_eq!(bench.sources.pin(&pinned, &cx()).await.unwrap().keys, pin.keys);
    assert_eq!(web.log(), [""; 0]);
    // Another platform is another key, and another layer limit too.
    let arm = SourceSpec { platform: "linux/arm64".parse().unwrap(), ..pinned };
    assert_ne!(bench.sources.pin(&arm, &cx()).await.unwrap().keys[0], pin.keys[0]);
}

/// What a registry does when it is asked for an image that containerd has, too.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Registered {
    Same,
    Changed,
    Gone,
    Hangs,
    /// Nobody listens.
    Down,
}

/// Which image a name of both containerd's store and a registry leads to: the store's (`true`) or
/// the registry's, why it is the store's, and what the registry was asked.
async fn which(
    prefer: LocalImages,
    built: bool,
    mode: &str,
    registered: Registered,
) -> (bool, Option<Stored>, Vec<String>) {
    let bench = Bench::preferring(prefer).await;
    let (ours, mut theirs) = (image(), image());
    theirs.put(media::OCI_MANIFEST, "makes another index", &[]);
    theirs.attest();
    let documents: HashMap<Digest, Vec<u8>> =
        ours.documents.iter().chain(&theirs.documents).map(|(d, b)| (*d, b.clone())).collect();
    let leads_to =
        if registered == Registered::Changed { theirs.index.digest } else { ours.index.digest };
    let web = Web::start(move |line, _| {
        match registered {
            Registered::Gone => return status(404),
            Registered::Hangs => std::thread::park(),
            _ => {}
        }
        let last = line.rsplit('/').next().unwrap();
        let digest = if last == "1" { leads_to } else { last.parse().unwrap() };
        let kind =
            if last == "1" || digest == leads_to { media::OCI_INDEX } else { media::OCI_MANIFEST };
        ok(documents[&digest].clone())
            .with("Docker-Content-Digest", digest.to_string())
            .with("Content-Type", kind)
    });
    let host = match registered {
        Registered::Down => {
            std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string()
        }
        _ => web.host.clone(),
    };
    let name = format!("{host}/local/app:1");
    let lease = LeaseId("test".into());
    bench.fake.create(&lease, &Labels::new()).await.unwrap();
    for bytes in ours.documents.values() {
        ContentStore::put(&bench.fake, &lease, Bytes::from(bytes.clone()), &Labels::new())
            .await
            .unwrap();
    }
    let labels = if built { built_labels(&ours.index, BUILT_AT) } else { Labels::new() };
    Images::put(&bench.fake, &name, &ours.index, &labels).await.unwrap();
    let cx = cx();
    let source = spec(format!("docker-image://{name}"), &[("image.resolvemode", mode)]);
    let pin = bench.sources.pin(&source, &cx).await.unwrap();
    let log = web.log();
    // Within a build, nothing is asked twice, and what was said of the tag is so of the digest.
    assert_eq!(
        bench
            .sources
            .resolve(&source, &ResolveOptions::default(), &cx)
            .await
            .unwrap()
            .image
            .unwrap()
            .digest
            .to_string(),
        pin.digest.clone().unwrap()
    );
    let pinned = spec(format!("docker-image://{name}@{}", pin.digest.clone().unwrap()), &[]);
    assert_eq!(bench.sources.pin(&pinned, &cx).await.unwrap().stored, pin.stored);
    assert_eq!(web.log(), log);
    (pin.digest == Some(ours.index.digest.to_string()), pin.stored, log)
}

const BUILT_AT: SystemTime = SystemTime::UNIX_EPOCH;

#[tokio::test]
async fn an_image_that_was_built_here_is_taken_and_one_that_was_pulled_is_asked_of_its_registry() {
    use LocalImages::{Always, Built, Never};
    use Registered::{Changed, Down, Gone, Hangs, Same};
    const HEAD: &str = "HEAD /v2/local/app/manifests/1";
    let (built, fallback, wanted) =
        (Some(Stored::Built(BUILT_AT)), Some(Stored::Fallback), Some(Stored::Wanted));
    for (prefer, is_built, mode, registered, ours, stored, asked) in [
        (Built, true, "default", Changed, true, built, false),
        (Built, false, "default", Same, true, None, true),
        (Built, false, "default", Changed, false, None, true),
        (Built, false, "default", Gone, true, fallback, true),
        (Built, false, "default", Hangs, true, fallback, true),
        (Built, false, "", Down, true, fallback, false),
        (Built, false, "local", Changed, true, wanted, false),
        (Built, true, "pull", Changed, false, None, true),
        (Always, false, "default", Changed, true, wanted, false),
        (Never, true, "default", Changed, false, None, true),
        (Never, true, "default", Down, true, fallback, false),
        (Never, true, "local", Changed, true, built, false),
    ] {
        let case = format!("{prefer:?}, built: {is_built}, {mode:?}, {registered:?}");
        let (was_ours, why, log) = which(prefer, is_built, mode, registered).await;
        assert_eq!((was_ours, why), (ours, stored), "{case}");
        assert_eq!(log.first().map(String::as_str), asked.then_some(HEAD), "{case}");
        // The manifests that are here are not fetched again, and what cannot be reached is not
        // asked again and again.
        assert!(registered == Changed || log.len() <= 1, "{case}: {log:?}");
    }
}

#[tokio::test]
async fn what_an_image_cannot_be_is_said() {
    let bench = Bench::new().await;
    let image = image();
    let web = registry(&image);
    let at = |reference: &str, attrs: &[(&str, &str)]| {
        spec(format!("docker-image://{}/a/b{reference}", web.host), attrs)
    };
    let wrong = Digest::of("wrong").to_string();
    let other = SourceSpec { platform: "linux/s390x".parse().unwrap(), ..at(":1", &[]) };
    for (source, code, words) in [
        (at(":none", &[]), Code::NotFound, "/a/b:none: not found"),
        (
            at(":1", &[("image.checksum", &wrong)]),
            Code::FailedPrecondition,
            "does not match expected checksum",
        ),
        (at(":1", &[("image.layerlimit", "2")]), Code::InvalidArgument, "layer limit 2 is greater"),
        (other, Code::NotFound, "no match for platform linux/s390x"),
        (spec("docker-imge://x", &[]), Code::InvalidArgument, "unknown source scheme"),
        (spec("docker-image://A b", &[]), Code::InvalidArgument, "failed to parse image"),
    ] {
        let fault = bench.sources.pin(&source, &cx()).await.unwrap_err();
        assert_eq!(fault.code(), code, "{fault:?}");
        assert!(fault.to_string().contains(words), "{fault}");
    }
}

#[tokio::test]
async fn a_web_file_is_fetched_once_and_again_when_it_changed() {
    let bench = Bench::new().await;
    let content = Arc::new(parking_lot::Mutex::new(("one", "\"1\"")));
    let served = content.clone();
    let web = Web::start(move |_, _| {
        let (body, etag) = *served.lock();
        ok(body).with("ETag", etag).with("Last-Modified", "Wed, 21 Oct 2015 07:28:00 GMT")
    });
    let source = spec(
        format!("http://{}/dir/file.txt", web.host),
        &[("http.perm", "0755"), ("http.uid", "7")],
    );
    let pin = bench.sources.pin(&source, &cx()).await.unwrap();
    assert_eq!(pin.digest, Some(Digest::of("one").to_string()));
    let state = bench.sources.fetch(&source, &pin, &cx()).await.unwrap();
    let mount = state.mount().await.unwrap();
    let file = mount.path().join("file.txt");
    let facts = std::fs::metadata(&file).unwrap();
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "one");
    assert_eq!((facts.mode() & 0o7777, facts.uid(), facts.mtime()), (0o755, 7, 1_445_412_480));
    assert_eq!(web.log(), ["GET /dir/file.txt"]);
    assert_eq!(bench.sources.pin(&source, &cx()).await.unwrap().keys, pin.keys);
    assert_eq!(web.log(), ["GET /dir/file.txt", "HEAD /dir/file.txt"]);
    // Another life of the daemon knows it, too.
    let options =
        SourceOptions { files: Some(bench.root.path().join("files.json")), ..Default::default() };
    let restarted =
        Sources::new(bench.refs.clone(), Registry::new(RegistryConfig::default()), options);
    assert_eq!(restarted.pin(&source, &cx()).await.unwrap().keys, pin.keys);
    assert_eq!(web.log().last().unwrap(), "HEAD /dir/file.txt");
    *content.lock() = ("two", "\"2\"");
    assert_ne!(bench.sources.pin(&source, &cx()).await.unwrap().keys, pin.keys);
}

#[tokio::test]
async fn a_web_file_with_a_checksum_needs_no_question_and_must_match() {
    let bench = Bench::new().await;
    let web = Web::start(|line, _| if line.contains("gone") { status(404) } else { ok("content") });
    let good = Digest::of("content").to_string();
    let source = spec(format!("http://{}/f", web.host), &[("http.checksum", &good)]);
    let pin = bench.sources.pin(&source, &cx()).await.unwrap();
    assert_eq!(web.log(), [""; 0]);
    bench.sources.fetch(&source, &pin, &cx()).await.unwrap();
    let bad = Digest::of("other").to_string();
    let source = spec(format!("http://{}/f", web.host), &[("http.checksum", &bad)]);
    let pin = bench.sources.pin(&source, &cx()).await.unwrap();
    let fault = bench.sources.fetch(&source, &pin, &cx()).await.err().unwrap();
    assert!(
        fault.to_string().contains("digest mismatch") && fault.to_string().contains(&good),
        "{fault}"
    );
    let gone = bench
        .sources
        .pin(&spec(format!("http://{}/gone?token=s3cret", web.host), &[]), &cx())
        .await
        .unwrap_err();
    assert_eq!(gone.code(), Code::NotFound);
    assert!(!format!("{gone:?}").contains("s3cret"), "{gone:?}");
    bench.refs.drained().await;
}

#[track_caller]
fn git(dir: &Path, arguments: &[&str]) -> String {
    let mut command = Command::new("git");
    command
        .current_dir(dir)
        .args(["-c", "user.name=t", "-c", "user.email=t@t", "-c", "init.defaultBranch=main"])
        .args(arguments);
    let out = command
        .env("GIT_CONFIG_GLOBAL", "/dev/null")
        .env("GIT_COMMITTER_DATE", "1000000000 +0000")
        .output()
        .unwrap();
    assert!(out.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8_lossy(&out.stdout).trim().to_owned()
}

/// `git daemon` over a directory, killed when dropped.
struct GitServer {
    port: u16,
    child: std::process::Child,
}

impl Drop for GitServer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl GitServer {
    #[track_caller]
    fn start(base: &Path) -> Self {
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        // The daemon's own program and not `git daemon`, so that killing it leaves nothing behind.
        let program = Path::new(&git(base, &["--exec-path"])).join("git-daemon");
        let mut command = Command::new(program);
        command.args([
            "--reuseaddr",
            "--export-all",
            "--listen=127.0.0.1",
            &format!("--port={port}"),
            &format!("--base-path={}", base.display()),
        ]);
        let server = Self { port, child: command.arg(base).spawn().unwrap() };
        let patience = std::time::Instant::now();
        while std::net::TcpStream::connect(("127.0.0.1", port)).is_err() {
            assert!(patience.elapsed().as_secs() < 20, "git daemon does not listen");
            std::thread::yield_now();
        }
        server
    }
}

#[tokio::test]
async fn a_git_commit_becomes_its_files() {
    let bench = Bench::new().await;
    let base = tempfile::tempdir().unwrap();
    let repo = base.path().join("r.git");
    std::fs::create_dir_all(repo.join("sub/dir")).unwrap();
    git(&repo, &["init", "-q"]);
    std::fs::write(repo.join("sub/dir/f"), "1").unwrap();
    std::fs::write(repo.join("top"), "1").unwrap();
    git(&repo, &["add", "."]);
    git(&repo, &["commit", "-qm", "one"]);
    git(&repo, &["tag", "-a", "v1", "-m", "v1"]);
    let one = git(&repo, &["rev-parse", "HEAD"]);
    std::fs::write(repo.join("top"), "2").unwrap();
    git(&repo, &["commit", "-qam", "two"]);
    let server = GitServer::start(base.path());
    let url = format!("git://127.0.0.1:{}/r.git", server.port);
    let at = |fragment: &str, attrs: &[(&str, &str)]| spec(format!("git://{url}{fragment}"), attrs);

    let read = async |source: &SourceSpec, path: &str| {
        let pin = bench.sources.pin(source, &cx()).await.unwrap();
        let state = bench.sources.fetch(source, &pin, &cx()).await.unwrap();
        let mount = state.mount().await.unwrap();
        let file = mount.path().join(path);
        (
            std::fs::read_to_string(&file).ok(),
            std::fs::metadata(&file).map_or(0, |m| m.mtime()),
            mount.path().join(".git").exists(),
        )
    };
    let text = |s: &str| Some(s.to_owned());
    assert_eq!(read(&at("", &[]), "top").await.0, text("2"));
    let (content, time, kept) = read(&at("#v1", &[("git.mtime", "commit")]), "top").await;
    assert_eq!((content, time, kept), (text("1"), 1_000_000_000, false));
    assert_eq!(read(&at(&format!("#{one}"), &[]), "top").await.0, text("1"));
    assert_eq!(read(&at("#main:sub/dir", &[]), "f").await.0, text("1"));
    // The branch has gone on; what it was is still there.
    let by_commit = [("git.checksum", one.as_str()), ("git.fetchbycommit", "true")];
    assert_eq!(read(&at("#main", &by_commit), "top").await.0, text("1"));
    let (head, _, kept) = read(&at("#main", &[("git.keepgitdir", "true")]), ".git/HEAD").await;
    assert!(kept && head.is_some());

    let tag = bench.sources.pin(&at("#v1", &[]), &cx()).await.unwrap();
    let commit = bench.sources.pin(&at(&format!("#{one}"), &[]), &cx()).await.unwrap();
    assert_eq!(tag.keys, commit.keys, "a tag and its commit are the same files");
    let meta = bench
        .sources
        .resolve(&at("#v1", &[]), &ResolveOptions::default(), &cx())
        .await
        .unwrap()
        .git
        .unwrap();
    assert_eq!(
        (meta.reference.as_str(), meta.commit_checksum.as_str()),
        ("refs/tags/v1", one.as_str())
    );
    bench.sources.pin(&at("#v1", &[("git.checksum", &one[..10])]), &cx()).await.unwrap();
    let fault =
        bench.sources.pin(&at("#main", &[("git.checksum", &one)]), &cx()).await.unwrap_err();
    assert!(fault.to_string().contains("expected checksum to match"), "{fault}");

    let build = cx();
    let want = ResolveOptions { git_objects: true, ..Default::default() };
    let meta = bench.sources.resolve(&at("#v1", &[]), &want, &build).await.unwrap().git.unwrap();
    assert!(meta.commit_object.starts_with(b"tree ") && meta.tag_object.starts_with(b"object "));
    git(&repo, &["tag", "-f", "-a", "v1", "-m", "moved"]);
    let again = bench
        .sources
        .resolve(&at("#v1", &[]), &ResolveOptions::default(), &build)
        .await
        .unwrap()
        .git
        .unwrap();
    assert_eq!(again.checksum, meta.checksum, "one build sees one tag");
    let later = bench
        .sources
        .resolve(&at("#v1", &[]), &ResolveOptions::default(), &cx())
        .await
        .unwrap()
        .git
        .unwrap();
    assert_ne!(later.checksum, meta.checksum);
    let fault = bench.sources.pin(&at("#nope", &[]), &cx()).await.unwrap_err();
    assert!(fault.to_string().contains("repository does not contain ref nope"), "{fault}");
    bench.refs.drained().await;
}

/// Submodules come along, in depth, unless the source says that they are not wanted (row
/// `src.git.sub`).
#[tokio::test]
async fn submodules_come_along_unless_they_are_skipped() {
    let bench = Bench::new().await;
    let base = tempfile::tempdir().unwrap();
    let server = GitServer::start(base.path());
    let url = |name: &str| format!("git://127.0.0.1:{}/{name}.git", server.port);
    let mut below: Option<&str> = None;
    for name in ["leaf", "branch", "root"] {
        let repo = base.path().join(format!("{name}.git"));
        std::fs::create_dir_all(&repo).unwrap();
        git(&repo, &["init", "-q"]);
        std::fs::write(repo.join("name"), name).unwrap();
        if let Some(below) = below {
            git(&repo, &["submodule", "-q", "add", &url(below), "sub"]);
        }
        git(&repo, &["add", "."]);
        git(&repo, &["commit", "-qm", name]);
        below = Some(name);
    }
    let read = async |attrs: &[(&str, &str)]| {
        let source = spec(format!("git://{}#main", url("root")), attrs);
        let pin = bench.sources.pin(&source, &cx()).await.unwrap();
        let state = bench.sources.fetch(&source, &pin, &cx()).await.unwrap();
        let mount = state.mount().await.unwrap();
        let names = ["name", "sub/name", "sub/sub/name"]
            .map(|n| std::fs::read_to_string(mount.path().join(n)).ok());
        (names, pin.keys)
    };
    let (with, without) = (read(&[]).await, read(&[("git.skipsubmodules", "true")]).await);
    assert_eq!(with.0, ["root", "branch", "leaf"].map(|n| Some(n.to_owned())));
    assert_eq!(without.0, [Some("root".to_owned()), None, None]);
    assert_ne!(with.1, without.1);
    bench.refs.drained().await;
}

#[tokio::test]
async fn a_git_commit_goes_through_a_bundle() {
    let bench = Bench::new().await;
    let base = tempfile::tempdir().unwrap();
    let repo = base.path().join("r.git");
    std::fs::create_dir_all(&repo).unwrap();
    git(&repo, &["init", "-q"]);
    for content in ["1", "2"] {
        std::fs::write(repo.join("top"), content).unwrap();
        git(&repo, &["add", "."]);
        git(&repo, &["commit", "-qm", content]);
    }
    git(&repo, &["tag", "-a", "v1", "-m", "v1", "HEAD~1"]);
    let (one, two) = (git(&repo, &["rev-parse", "HEAD~1"]), git(&repo, &["rev-parse", "HEAD"]));
    let server = GitServer::start(base.path());
    let source = |at: &str, fragment: &str, attrs: &[(&str, &str)]| {
        spec(format!("git://git://127.0.0.1:{at}/r.git{fragment}"), attrs)
    };
    let state = async |bench: &Bench, source: &SourceSpec| {
        let pin = bench.sources.pin(source, &cx()).await?;
        bench.sources.fetch(source, &pin, &cx()).await
    };

    // What was fetched before was shallow; a bundle has everything.
    let port = server.port.to_string();
    let plain = bench.sources.pin(&source(&port, "#main", &[]), &cx()).await.unwrap();
    state(&bench, &source(&port, "#main", &[])).await.unwrap();
    let mut bundles = Vec::new();
    for (fragment, name, commits) in
        [("#main", "refs/heads/main", "2"), ("#refs/tags/v1", "refs/tags/v1", "1")]
    {
        let wanted = source(&port, fragment, &[("git.checkoutbundle", "true")]);
        assert_ne!(bench.sources.pin(&wanted, &cx()).await.unwrap().keys, plain.keys);
        let made = state(&bench, &wanted).await.unwrap();
        let mount = made.mount().await.unwrap();
        assert_eq!(std::fs::read_dir(mount.path()).unwrap().count(), 1);
        let file = mount.path().join("bundle");
        let clone = base.path().join(name.replace('/', "-"));
        git(
            base.path(),
            &["clone", "-q", "--bare", file.to_str().unwrap(), clone.to_str().unwrap()],
        );
        assert_eq!(git(&clone, &["for-each-ref", "--format=%(refname)"]), name);
        assert_eq!(git(&clone, &["rev-list", "--count", name]), commits);
        bundles.push(std::fs::read(file).unwrap());
    }
    drop(server);

    // Nobody is asked but the registry.
    let known: HashMap<Digest, Vec<u8>> =
        bundles.iter().map(|b| (Digest::of(b), b.clone())).collect();
    let lie = Digest::of("other");
    let bytes = bundles[0].clone();
    let web = Web::start(move |line, _| match line.rsplit('/').next().unwrap().parse::<Digest>() {
        Ok(digest) if digest == lie => ok(bytes.clone()),
        Ok(digest) => known.get(&digest).map_or_else(|| status(404), |b| ok(b.clone())),
        Err(_) => status(404),
    });
    let at = |digest: Digest| format!("docker-image+blob://{}/foo/bundle@{digest}", web.host);
    let (of_main, of_tag) = (at(Digest::of(&bundles[0])), at(Digest::of(&bundles[1])));
    let from = |fragment: &str, bundle: &str, commit: &str| {
        source("1", fragment, &[("git.bundle", bundle), ("git.checksum", commit)])
    };
    let read = async |source: &SourceSpec| {
        // Each with a repository of its own.
        let bench = Bench::new().await;
        let made = state(&bench, source).await;
        let text = match &made {
            Ok(made) => std::fs::read_to_string(made.mount().await.unwrap().path().join("top"))
                .map_err(|e| e.to_string()),
            Err(fault) => Err(fault.to_string()),
        };
        drop(made);
        bench.refs.drained().await;
        text
    };
    for (fragment, bundle, commit, text) in [
        ("#main", &of_main, &two, "2"),
        (&*format!("#{two}"), &of_main, &two, "2"),
        ("", &of_main, &one, "1"),
        ("#refs/tags/v1", &of_tag, &one, "1"),
        ("#v1", &of_tag, &one, "1"),
    ] {
        assert_eq!(read(&from(fragment, bundle, commit)).await.as_deref(), Ok(text), "{fragment}");
    }
    for (fragment, bundle, commit, why) in [
        ("#main", &of_main, &one, "expected checksum to match"),
        ("#dev", &of_main, &two, "does not contain ref dev"),
        ("", &of_tag, &two, "not found in bundle"),
        ("#main", &at(lie), &two, "expected checksum to match"),
        ("#main", &at(Digest::of("nothing")), &two, "failed to fetch git bundle"),
    ] {
        let fault = read(&from(fragment, bundle, commit)).await.unwrap_err();
        assert!(fault.contains(why), "{fault} is not {why}");
    }
    let kept = from("#main", &of_main, &two);
    let kept = SourceSpec {
        attrs: kept.attrs.into_iter().chain([("git.keepgitdir".into(), "true".into())]).collect(),
        ..kept
    };
    let made = state(&bench, &kept).await.unwrap();
    let mount = made.mount().await.unwrap();
    assert_eq!(
        git(mount.path(), &["-c", "safe.directory=*", "for-each-ref", "--format=%(refname)"]),
        "refs/heads/main"
    );
    assert_eq!(
        bench.sources.pin(&from("#main", &of_main, &two), &cx()).await.unwrap().keys,
        plain.keys,
        "a bundle's commit is the same commit"
    );
}

#[tokio::test]
async fn a_blob_becomes_one_file() {
    let bench = Bench::new().await;
    let (bytes, lie) = ("a blob", Digest::of("other"));
    let digest = Digest::of(bytes);
    let web = Web::start(move |line, _| match line.rsplit('/').next().unwrap().parse::<Digest>() {
        Ok(asked) if asked == digest || asked == lie => ok(bytes),
        _ => status(404),
    });
    let at = |digest: &str, attrs: &[(&str, &str)]| {
        spec(format!("docker-image+blob://{}/foo/x{digest}", web.host), attrs)
    };
    let named = |digest: Digest| format!("@{digest}");
    for (attrs, name, mode) in [
        (&[][..], digest.hex().to_string(), 0o600),
        (&[("http.filename", "../a/layer.tar"), ("http.perm", "0644")], "layer.tar".into(), 0o644),
    ] {
        let source = at(&named(digest), attrs);
        let pin = bench.sources.pin(&source, &cx()).await.unwrap();
        assert_eq!(pin.digest, Some(digest.to_string()));
        let made = bench.sources.fetch(&source, &pin, &cx()).await.unwrap();
        let mount = made.mount().await.unwrap();
        let file = mount.path().join(name);
        assert_eq!(std::fs::read_to_string(&file).unwrap(), bytes);
        assert_eq!(
            (file.metadata().unwrap().mode() & 0o7777, file.metadata().unwrap().mtime()),
            (mode, 0)
        );
    }
    let keys = async |attrs: &[(&str, &str)]| {
        bench.sources.pin(&at(&named(digest), attrs), &cx()).await.unwrap().keys
    };
    assert_ne!(keys(&[]).await, keys(&[("http.uid", "5")]).await);
    for (digest, attrs, why) in [
        (":tag".to_owned(), &[][..], "invalid digest"),
        (named(digest), &[("http.perm", "x")], "want a number"),
        (named(digest), &[("image.recordtype", "x")], "invalid record type x"),
    ] {
        let fault = bench.sources.pin(&at(&digest, attrs), &cx()).await.unwrap_err();
        assert!(fault.to_string().contains(why), "{fault} is not {why}");
    }
    for (digest, why) in
        [(lie, "expected checksum to match"), (Digest::of("nothing"), "blob 127.0.0.1")]
    {
        let source = at(&named(digest), &[]);
        let pin = bench.sources.pin(&source, &cx()).await.unwrap();
        let fault = bench.sources.fetch(&source, &pin, &cx()).await.unwrap_err();
        assert!(fault.to_string().contains(why), "{fault} is not {why}");
    }
    bench.refs.drained().await;
}

/// Tells which point of a random series failed.
fn random() -> impl FnMut(u64) -> u64 {
    let seed =
        SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_nanos() as u64 | 1;
    eprintln!("seed {seed}");
    let mut state = seed;
    move |below| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % below
    }
}

/// A repository with enough in it for a checkout to take a while.
fn big_repository(at: &Path) -> String {
    for n in 0..300 {
        let dir = at.join(format!("dir{}", n % 20));
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(dir.join(format!("f{n}")), format!("{n}\n").repeat(500)).unwrap();
    }
    git(at, &["init", "--quiet", "--initial-branch=main"]);
    git(at, &["config", "uploadpack.allowAnySHA1InWant", "true"]);
    git(at, &["add", "."]);
    git(at, &["commit", "--quiet", "-m", "all"]);
    git(at, &["rev-parse", "HEAD"])
}

#[tokio::test]
async fn a_build_that_is_cancelled_at_any_point_leaves_a_usable_git_repository() {
    let base = tempfile::tempdir().unwrap();
    let repository = base.path().join("r");
    std::fs::create_dir_all(&repository).unwrap();
    big_repository(&repository);
    let server = GitServer::start(base.path());
    let bench = Bench::new().await;
    let source = spec(format!("git://git://127.0.0.1:{}/r#main", server.port), &[]);
    let whole = async || {
        let cx = cx();
        let pin = bench.sources.pin(&source, &cx).await?;
        bench.sources.fetch(&source, &pin, &cx).await
    };
    let started = std::time::Instant::now();
    whole().await.unwrap();
    let long = started.elapsed().as_micros() as u64;
    let mut random = random();
    for _ in 0..15 {
        // A repository of its own every now and then, so that its making is cut short, too.
        if random(4) == 0 {
            kept_repository(&bench, &source).await.0.discard().await.unwrap();
        }
        let cut = std::time::Duration::from_micros(random(long));
        let cancelled = tokio::time::timeout(cut, whole()).await;
        drop(cancelled);
        let state =
            whole().await.unwrap_or_else(|e| panic!("after a cancellation at {cut:?}: {e:?}"));
        let mount = state.mount().await.unwrap();
        assert_eq!(std::fs::read_dir(mount.path()).unwrap().count(), 20);
    }
}

/// The repository that is kept for a source, and where it is.
async fn kept_repository(bench: &Bench, source: &SourceSpec) -> (NamedRef, LocalMount) {
    let remote = source.identifier.strip_prefix("git://").unwrap().split('#').next().unwrap();
    let request = NamedRequest {
        record_type: RecordType::Internal,
        key: format!("git:{remote}"),
        description: String::new(),
        sharing: Sharing::Locked,
        parent: None,
    };
    let named = bench.refs.named(request).await.unwrap();
    let mount = named.mount().await.unwrap();
    (named, mount)
}

#[tokio::test]
async fn what_a_killed_git_or_a_power_cut_leaves_is_mended() {
    let base = tempfile::tempdir().unwrap();
    let repository = base.path().join("r");
    std::fs::create_dir_all(&repository).unwrap();
    big_repository(&repository);
    let server = GitServer::start(base.path());
    let bench = Bench::new().await;
    let source = spec(format!("git://git://127.0.0.1:{}/r#main", server.port), &[]);
    let whole = async || {
        let cx = cx();
        let pin = bench.sources.pin(&source, &cx).await?;
        bench.sources.fetch(&source, &pin, &cx).await
    };
    whole().await.unwrap();
    type Damage = fn(&Path);
    let damages: [(&str, Damage); 6] = [
        ("locks", |r| {
            for lock in [
                "shipway-index.lock",
                "config.lock",
                "shallow.lock",
                "packed-refs.lock",
                "HEAD.lock",
            ] {
                std::fs::write(r.join(lock), "").unwrap();
            }
            let tips = r.join("refs/shipway/tips");
            for tip in
                std::fs::read_dir(&tips).unwrap().map(|e| e.unwrap().path()).collect::<Vec<_>>()
            {
                std::fs::write(format!("{}.lock", tip.display()), "").unwrap();
            }
        }),
        ("no HEAD", |r| std::fs::remove_file(r.join("HEAD")).unwrap()),
        ("empty objects", |r| {
            let mut dirs = vec![r.join("objects")];
            while let Some(dir) = dirs.pop() {
                for entry in std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()) {
                    if entry.is_dir() {
                        dirs.push(entry);
                    } else {
                        std::fs::write(entry, "").unwrap();
                    }
                }
            }
        }),
        ("empty configuration", |r| std::fs::write(r.join("config"), "[core").unwrap()),
        ("no objects", |r| std::fs::remove_dir_all(r.join("objects")).unwrap()),
        ("nothing", |r| std::fs::remove_dir_all(r).unwrap()),
    ];
    for (what, damage) in damages {
        let (named, mount) = kept_repository(&bench, &source).await;
        damage(&mount.path().join("repository"));
        drop((mount, named));
        let state = whole().await.unwrap_or_else(|e| panic!("{what}: {e:?}"));
        let mount = state.mount().await.unwrap();
        assert_eq!(
            std::fs::read_to_string(mount.path().join("dir7/f7")).unwrap(),
            "7\n".repeat(500),
            "{what}"
        );
    }
}

#[tokio::test]
async fn a_token_in_an_address_is_sent_and_shown_nowhere() {
    const TOKEN: &str = "s3cr3tt0k3n";
    let heads: Arc<parking_lot::Mutex<Vec<String>>> = Arc::default();
    let told = heads.clone();
    let web = Web::start(move |line, head| {
        // While git waits for the answer, its command line is there for everybody to read.
        let commands = std::fs::read_dir("/proc")
            .unwrap()
            .flatten()
            .filter_map(|p| std::fs::read(p.path().join("cmdline")).ok());
        let shown =
            commands.map(|c| String::from_utf8_lossy(&c).into_owned()).find(|c| c.contains(TOKEN));
        told.lock().extend([head.to_owned()].into_iter().chain(shown));
        if line.contains("/file") { ok("content") } else { status(403) }
    });
    let journal = Journal::new();
    let bench = Bench::new().await;
    let basic = |text: &str| {
        format!(
            "authorization: basic {}",
            base64::Engine::encode(&base64::prelude::BASE64_STANDARD, text).to_lowercase()
        )
    };
    for (user, login) in
        [(TOKEN.to_owned(), format!("{TOKEN}:")), (format!("me:{TOKEN}"), format!("me:{TOKEN}"))]
    {
        let reporter =
            journal.reporter(Digest::of(&user), format!("load git source https://{user}@h/a"));
        let sessions = SessionGroup::new(SessionHub::new(), []);
        let cx = SourceContext::new(sessions, reporter, SourceMemo::default());
        let git = spec(format!("git://http://{user}@{}/r.git#main", web.host), &[]);
        let fault = bench.sources.pin(&git, &cx).await.unwrap_err();
        assert!(!format!("{fault:?} {fault}").contains(TOKEN), "{fault:?}");
        cx.reporter.completed(Some(fault.to_string()));
        let asked = heads.lock().split_off(0).join("\n").to_lowercase();
        assert!(asked.contains(&basic(&login)) && !asked.contains(TOKEN), "{asked}");

        let file = spec(format!("http://{user}@{}/file", web.host), &[]);
        let pin = bench.sources.pin(&file, &cx).await.unwrap();
        let state = bench.sources.fetch(&file, &pin, &cx).await.unwrap();
        let asked = heads.lock().split_off(0).join("\n").to_lowercase();
        assert!(asked.contains(&basic(&login)) && !asked.contains(TOKEN), "{asked}");
        drop(state);
        let mut capture = shipway_attest::Capture::default();
        bench.sources.capture(&file, &pin, &mut capture).unwrap();
        bench.sources.capture(&git, &pin, &mut capture).unwrap();
        assert!(!format!("{capture:?}").contains(TOKEN), "{capture:?}");
        // There was a login, and a definition's address is told the same way.
        assert_eq!(
            capture.sources.git[0].url,
            format!("{}#main", shipway_fault::redact(&format!("http://{user}@{}/r.git", web.host)))
        );
        assert!(capture.sources.git[0].url.contains("xxxxx@"), "{capture:?}");
    }
    let unknown =
        bench.sources.pin(&spec(format!("ftp://me:{TOKEN}@h/f"), &[]), &cx()).await.unwrap_err();
    assert!(!format!("{unknown:?}").contains(TOKEN), "{unknown:?}");
    let said = format!("{:?}", journal.events());
    assert!(said.contains("git source") && !said.contains(TOKEN), "{said}");
    let kept = format!("{:?}", bench.refs.usage().await.unwrap());
    assert!(kept.contains("http url") && !kept.contains(TOKEN), "{kept}");
}

/// A file that `signing/fixtures/make.sh` made.
fn signed_fixture(name: &str) -> String {
    std::fs::read_to_string(signed_path(name)).unwrap()
}

fn signed_path(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../signing/fixtures").join(name)
}

/// What is wrong with a source, from its pin to its files; empty if nothing is.
async fn wrong_with(bench: &Bench, source: &SourceSpec) -> String {
    let cx = cx();
    let made = async {
        let pin = bench.sources.pin(source, &cx).await?;
        bench.sources.fetch(source, &pin, &cx).await
    };
    let made = made.await.map(drop).map_err(|fault| fault.to_string());
    let resolved = bench
        .sources
        .resolve(source, &ResolveOptions::default(), &cx)
        .await
        .map(drop)
        .map_err(|fault| fault.to_string());
    assert_eq!(made.is_ok(), resolved.is_ok(), "{made:?} {resolved:?}");
    made.err().unwrap_or_default()
}

#[tokio::test]
async fn git_commits_and_tags_are_verified() {
    const PGP: &str = "user1.pub";
    const SSH: &str = "ssh-ed25519.pub";
    const OTHER: &str = "ssh-other.pub";
    let (strict, tag, commit) =
        ("git.sig.rejectexpired", "git.sig.requiresignedtag", "git.sig.ignoresignedtag");
    for format in ["sha1", "sha256"] {
        let bench = Bench::new().await;
        let base = tempfile::tempdir().unwrap();
        let repo = base.path().join("r.git");
        let bundle = signed_path(&format!("git-{format}.bundle"));
        git(
            base.path(),
            &["clone", "-q", "--mirror", bundle.to_str().unwrap(), repo.to_str().unwrap()],
        );
        git(&repo, &["config", "uploadpack.allowAnySHA1InWant", "true"]);
        let sha = |reference: &str| git(&repo, &["rev-parse", reference]);
        // A commit that took another's signature.
        let taken = git(&repo, &["cat-file", "commit", "b-pgp"])
            .replace("\n\npgp", "\n\nanother message\n");
        std::fs::write(base.path().join("taken"), taken).unwrap();
        let taken = git(
            &repo,
            &["hash-object", "-w", "-t", "commit", base.path().join("taken").to_str().unwrap()],
        );
        git(&repo, &["update-ref", "refs/heads/tampered", &taken]);
        let server = GitServer::start(base.path());
        let source = |reference: &str, key: &str, attrs: &[&str]| {
            let keys = signed_fixture(key);
            let attrs: Vec<_> =
                attrs.iter().map(|a| (*a, "true")).chain([("git.sig.pubkey", &*keys)]).collect();
            spec(format!("git://git://127.0.0.1:{}/r.git#{reference}", server.port), &attrs)
        };
        for (reference, key, attrs, why) in [
            ("b-pgp", PGP, &[][..], ""),
            (&*sha("b-pgp"), PGP, &[], ""),
            ("b-pgp", PGP, &["git.keepgitdir"], ""),
            ("b-pgp", "user2.pub", &[], "signature made by unknown entity"),
            ("b-pgp", SSH, &[], "failed to read armored public key"),
            ("b-pgp", PGP, &[strict], "subkey expired"),
            ("b-unsigned", PGP, &[], "git object is not signed"),
            ("tampered", PGP, &[], "one of them was changed"),
            ("light", PGP, &[], ""),
            ("light", PGP, &[tag], "signed tag required but no signed tag found"),
            // The tag is not signed, its commit is.
            ("annotated", PGP, &[], ""),
            ("annotated", PGP, &[tag], "git object is not signed"),
            ("plain", PGP, &[], "git object is not signed"),
            // Its commit is not signed, the tag is.
            ("tag-pgp", PGP, &[], ""),
            ("tag-pgp", PGP, &[tag, "git.keepgitdir"], ""),
            ("tag-pgp", PGP, &[commit], "git object is not signed"),
            // The tag by one, the commit by another.
            ("tag-ssh", PGP, &[], ""),
            ("tag-ssh", PGP, &[tag], "failed to parse ssh public key"),
            ("tag-ssh", OTHER, &[tag], ""),
            ("tag-ssh", OTHER, &[commit], "failed to read armored public key"),
            (&*sha("tag-ssh"), OTHER, &[tag], ""),
            ("both", OTHER, &[strict], ""),
            ("both", SSH, &[], ""),
            ("both", SSH, &[tag], "failed to verify ssh signature: public key does not match"),
            ("both", SSH, &[tag, commit], "signed tag required but no signed tag found"),
            ("nested", OTHER, &[tag], ""),
            ("old", "expired.pub", &[], ""),
            ("old", "expired.pub", &[strict], "key expired"),
        ] {
            let wrong = wrong_with(&bench, &source(reference, key, attrs)).await;
            assert!(
                wrong.contains(why) && wrong.is_empty() == why.is_empty(),
                "{format} {reference} {key} {attrs:?}: {wrong:?} is not {why:?}"
            );
        }
        let said = bench.sources.pin(&source("both", "user1.pub", &[]), &cx()).await.unwrap_err();
        assert!(said.hints().any(|h| h.contains("the tag does not count either")), "{said:?}");

        // Signed or not, it is the same commit.
        let plain = spec(format!("git://git://127.0.0.1:{}/r.git#b-pgp", server.port), &[]);
        let pin = bench.sources.pin(&source("b-pgp", PGP, &[]), &cx()).await.unwrap();
        assert_eq!(bench.sources.pin(&plain, &cx()).await.unwrap().keys, pin.keys);
        // What moved since it was pinned is not what was verified.
        git(&repo, &["update-ref", "refs/heads/b-pgp", "b-unsigned"]);
        let moved =
            bench.sources.fetch(&source("b-pgp", PGP, &[]), &pin, &cx()).await.err().unwrap();
        assert!(moved.to_string().contains("git object is not signed"), "{moved}");
        // The tag is signed, but not what the server says about it.
        git(&repo, &["pack-refs", "--all"]);
        let packed = repo.join("packed-refs");
        let refs = std::fs::read_to_string(&packed).unwrap();
        let lie =
            refs.replace(&format!("^{}", sha("tag-ssh^{}")), &format!("^{}", sha("b-unsigned")));
        assert_ne!(lie, refs);
        std::fs::write(&packed, lie).unwrap();
        let wrong = wrong_with(&bench, &source("tag-ssh", OTHER, &[tag])).await;
        assert!(wrong.contains("but it leads to"), "{wrong}");
    }
}

#[tokio::test]
async fn commits_in_bundles_are_verified() {
    let bytes = std::fs::read(signed_path("git-sha1.bundle")).unwrap();
    let base = tempfile::tempdir().unwrap();
    git(
        base.path(),
        &["clone", "-q", "--mirror", signed_path("git-sha1.bundle").to_str().unwrap(), "r"],
    );
    let commit = git(&base.path().join("r"), &["rev-parse", "both^{}"]);
    let digest = Digest::of(&bytes);
    let web = Web::start(move |_, _| ok(bytes.clone()));
    let bundle = format!("docker-image+blob://{}/foo/bundle@{digest}", web.host);
    for (keys, why) in [("ssh-other.pub", ""), ("ssh-ed25519.pub", "public key does not match")] {
        let bench = Bench::new().await;
        let keys = signed_fixture(keys);
        let required = [("git.sig.pubkey", &*keys), ("git.sig.requiresignedtag", "true")];
        let attrs =
            [&required[..], &[("git.bundle", &*bundle), ("git.checksum", &*commit)]].concat();
        let wrong = wrong_with(&bench, &spec("git://git://127.0.0.1:1/r.git#both", &attrs)).await;
        assert!(
            wrong.contains(why) && wrong.is_empty() == why.is_empty(),
            "{wrong:?} is not {why:?}"
        );
    }
}

#[tokio::test]
async fn downloaded_files_are_verified() {
    let content = std::fs::read(signed_path("data")).unwrap();
    let good = Digest::of(&content).to_string();
    let served = content.clone();
    let web = Web::start(move |line, _| match line.ends_with("/f") {
        true => ok(served.clone())
            .with("ETag", "\"1\"")
            .with("Last-Modified", "Tue, 14 Nov 2023 22:13:20 GMT"),
        false => ok("something else"),
    });
    let bench = Bench::new().await;
    let [one, two, expired, signature, old] =
        ["user1.pub", "user2.pub", "expired.pub", "user1.sig", "expired.sig"].map(signed_fixture);
    let merged = format!("{two}\n{one}");
    let (checksum, bad) = (("http.checksum", &*good), Digest::of("other").to_string());
    let needs_both = "http signature verification requires both pubkey and signature";
    for (path, keys, signature, more, why) in [
        ("f", &*one, &*signature, &[][..], ""),
        ("f", &merged, &signature, &[], ""),
        ("f", &one, &signature, &[checksum], ""),
        ("f", &one, &signature, &[("http.checksum", &*bad)], "digest mismatch"),
        ("f", &expired, &old, &[], ""),
        ("f", &two, &signature, &[], "failed to verify pgp signature: signature by "),
        ("f", &two, &signature, &[checksum], "signature made by unknown entity"),
        ("other", &one, &signature, &[], "one of them was changed"),
        ("f", &one, "", &[], needs_both),
        ("f", "", &signature, &[], needs_both),
        ("f", &one, "no signature", &[], "failed to decode armored signature"),
        ("f", "no key", &signature, &[], "failed to read armored public key"),
        ("f", &one, &signature, &[("http.sig.other", "x")], "http.sig.other"),
    ] {
        let attrs =
            [&[("http.sig.pubkey", keys), ("http.sig.signature", signature)], more].concat();
        let wrong = wrong_with(&bench, &spec(format!("http://{}/{path}", web.host), &attrs)).await;
        assert!(
            wrong.contains(why) && wrong.is_empty() == why.is_empty(),
            "{path} {more:?}: {wrong:?} is not {why:?}"
        );
    }
    let attrs = [("http.sig.pubkey", &*one), ("http.sig.signature", &*signature)];
    let [signed, plain] =
        [&attrs[..], &[]].map(|attrs| spec(format!("http://{}/f", web.host), attrs));
    let pin = bench.sources.pin(&signed, &cx()).await.unwrap();
    assert_eq!(
        bench.sources.pin(&plain, &cx()).await.unwrap().keys,
        pin.keys,
        "signed or not, it is the same file"
    );
    let state = bench.sources.fetch(&signed, &pin, &cx()).await.unwrap();
    assert_eq!(std::fs::read(state.mount().await.unwrap().path().join("f")).unwrap(), content);
}

#[tokio::test]
async fn addresses_that_are_denied_are_not_connected_to() {
    // Whoever is there is asked nothing.
    let web = Web::start(|line, _| panic!("{line}"));
    let bench = Bench::new().await;
    let denied = DeniedNetworks(vec!["127.0.0.0/8".parse().unwrap(), "::1".parse().unwrap()]);
    let config = RegistryConfig { denied, ..RegistryConfig::default() };
    let sources = Sources::new(bench.refs.clone(), Registry::new(config), SourceOptions::default());
    let port = web.host.rsplit(':').next().unwrap().to_owned();
    for host in [web.host.clone(), format!("localhost:{port}")] {
        for identifier in [
            format!("docker-image://{host}/a:1"),
            format!("http://{host}/f"),
            format!("git://http://{host}/r.git#main"),
        ] {
            let fault = sources.pin(&spec(identifier.clone(), &[]), &cx()).await.unwrap_err();
            assert!(fault.to_string().contains("deniedNetworks"), "{identifier}: {fault}");
        }
    }
    // The metadata service of a cloud is, unless it is said otherwise.
    for identifier in [
        "http://169.254.169.254/latest/meta-data",
        "git://http://169.254.169.254/r.git#main",
        "docker-image://169.254.169.254/a:1",
    ] {
        let fault = bench.sources.pin(&spec(identifier, &[]), &cx()).await.unwrap_err();
        assert!(fault.to_string().contains("deniedNetworks"), "{identifier}: {fault}");
    }
}
