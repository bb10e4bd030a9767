//! Caches in object stores, with the stores that npm has for tests.

#![allow(clippy::unwrap_used)]

use shipway_integration::{any, remove_everything};
use shipway_testkit::{
    FaultyRegistry, GithubCache, Lab, Process, RegistryFault, free_port, lab_dir, run, wait_for,
    which,
};
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

/// A step that no two builds do alike, and one above it.
const TEXT: &str = "FROM busybox AS a\nRUN cat /proc/sys/kernel/random/uuid > /stamp\nRUN cp /stamp /copy\nFROM scratch\nCOPY --from=a /copy /copy\n";
/// The key that the S3 server knows. It checks the name of a key, and no signature.
const KEY: &str = "S3RVER";

/// A server that npm has, listening on a port of its own.
struct Store {
    port: u16,
    dir: PathBuf,
    _process: Process,
}

impl Store {
    /// `script` is a file of the package; `arguments` are made of directory and port.
    #[track_caller]
    fn start(lab: &Lab, script: &str, arguments: impl Fn(&str, &str) -> Vec<String>) -> Self {
        let script = lab_dir().join("node/node_modules").join(script);
        assert!(
            script.exists(),
            "{} is absent; `cargo xtask prepare` fetches it",
            script.display()
        );
        let node = which("node").expect("node is absent; `cargo xtask prepare` installs it");
        let (port, dir) = (free_port(), lab.dir().join("store"));
        fs::create_dir_all(&dir).unwrap();
        let mut command = Command::new(node);
        command.arg(&script).args(arguments(dir.to_str().unwrap(), &port.to_string()));
        command.env("AZURITE_ACCOUNTS", "me:c2VjcmV0LWtleS1vZi1henVyaXRl");
        let mut process = Process::start("store", &mut command, &lab.dir().join("store.log"));
        wait_for("the store to answer", Duration::from_secs(60), || {
            process.alive().unwrap_or_else(|e| panic!("{e}"));
            std::net::TcpStream::connect(("127.0.0.1", port)).map(drop).map_err(|e| e.to_string())
        });
        Self { port, dir, _process: process }
    }

    fn s3(lab: &Lab) -> Self {
        Self::start(lab, "s3rver/bin/s3rver.js", |dir, port| {
            let words = [
                "--directory",
                dir,
                "--address",
                "127.0.0.1",
                "--port",
                port,
                "--configure-bucket",
                "b",
            ];
            words.map(str::to_owned).to_vec()
        })
    }

    fn host(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// Files of the store, by what they are called below its directory.
    fn files(&self) -> Vec<(String, PathBuf)> {
        let mut files = Vec::new();
        let mut dirs = vec![self.dir.clone()];
        while let Some(dir) = dirs.pop() {
            for entry in fs::read_dir(dir).unwrap().map(Result::unwrap) {
                let path = entry.path();
                if path.is_dir() {
                    dirs.push(path);
                } else {
                    let name = path.strip_prefix(&self.dir).unwrap().to_str().unwrap().to_owned();
                    files.push((name, path));
                }
            }
        }
        files.sort();
        files
    }
}

/// What a cache in the bucket of `host` is called in `--cache-to` and `--cache-from`.
fn bucket(host: &str) -> String {
    format!(
        "type=s3,bucket=b,region=us-east-1,endpoint_url=http://{host},use_path_style=true,prefix=p/,access_key_id={KEY},secret_access_key={KEY}"
    )
}

/// Builds to a directory, and gives what the last step made.
fn built(lab: &Lab, context: &Path, more: &[&str]) -> (String, String) {
    let out = lab.dir().join("out");
    let output = format!("type=local,dest={}", out.display());
    let fixed = ["build", "--progress", "plain", "--output", &output];
    let context = context.display().to_string();
    let all = fixed.into_iter().chain(more.iter().copied()).chain([context.as_str()]);
    let text = lab.shipway(all).ok().all();
    (fs::read_to_string(out.join("copy")).unwrap(), text)
}

/// Whether any file below `dir` holds `text`.
fn holds(dir: &Path, text: &str) -> Option<PathBuf> {
    for entry in fs::read_dir(dir).unwrap().map(Result::unwrap) {
        let (path, kind) = (entry.path(), entry.file_type().unwrap());
        if kind.is_dir() {
            if let Some(found) = holds(&path, text) {
                return Some(found);
            }
        } else if kind.is_file() {
            let bytes = fs::read(&path).unwrap();
            if bytes.windows(text.len()).any(|w| w == text.as_bytes()) {
                return Some(path);
            }
        }
    }
    None
}

#[test]
fn a_bucket_keeps_a_cache_that_an_empty_machine_builds_from() {
    let lab = Lab::complete(any());
    let store = Store::s3(&lab);
    let context = lab.context("bucket", &[("Dockerfile", TEXT)]);
    let (from, to) = (bucket(&store.host()), format!("{},mode=max", bucket(&store.host())));
    let (stamp, text) = built(&lab, &context, &["--cache-to", &to]);
    assert!(text.contains("exporting cache to Amazon S3"), "{text}");
    let objects = || -> Vec<_> {
        let name = |(name, path): (String, PathBuf)| {
            let name = name.strip_suffix("._S3rver_object")?.to_owned();
            Some((name, fs::metadata(path).unwrap().modified().unwrap()))
        };
        store.files().into_iter().filter_map(name).collect()
    };
    let first = objects();
    let names: Vec<&str> = first.iter().map(|(name, _)| name.as_str()).collect();
    assert!(names.contains(&"b/p/manifests/buildkit"), "{names:?}");
    let layers = names.iter().filter(|n| n.starts_with("b/p/blobs/sha256:")).count();
    assert!(layers >= 3 && layers == names.len() - 1, "{names:?}");

    remove_everything(&lab);
    let (again, text) = built(&lab, &context, &["--cache-from", &from, "--cache-to", &to]);
    assert_eq!(again, stamp, "{text}");
    assert!(text.contains("importing cache manifest from s3:"), "{text}");
    assert!(!text.contains("writing layer"), "{text}");
    // The second export wrote nothing but the config.
    for ((before, then), (after, now)) in first.iter().zip(objects()) {
        assert_eq!(*before, after);
        assert!(before.contains("manifests") || *then == now, "{before} was written again");
    }

    // A layer that was damaged in the store is not taken for what it was.
    for (_, path) in
        store.files().iter().filter(|(n, _)| n.contains("blobs/") && n.ends_with("_object"))
    {
        let mut bytes = fs::read(path).unwrap();
        bytes.iter_mut().for_each(|b| *b ^= 0xff);
        fs::write(path, bytes).unwrap();
    }
    remove_everything(&lab);
    let output = format!("type=local,dest={}", lab.dir().join("damaged").display());
    let context = context.display().to_string();
    let damaged = lab.shipway(["build", "--output", &output, "--cache-from", &from, &context]);
    let read = fs::read_to_string(lab.dir().join("damaged/copy"));
    // Either way: another step's result, or an error that says why.
    match (damaged.code, read) {
        (Some(0), Ok(copy)) => assert_eq!(copy.len(), stamp.len(), "{}", damaged.all()),
        _ => assert!(damaged.all().contains("sha256:"), "{}", damaged.all()),
    }
}

#[test]
fn secrets_of_caches_are_nowhere_on_the_disk_nor_in_what_is_said() {
    let mut lab = Lab::complete(any());
    lab.daemon_flag("--debug");
    assert!(lab.stop_daemon(), "the daemon had to be killed");
    lab.start_daemon();
    let store = Store::s3(&lab);
    let context = lab.context("secrets", &[("Dockerfile", TEXT)]);
    let secret = "dont-keep-this-secret";
    let wrong = bucket(&store.host()).replace(
        &format!("access_key_id={KEY},secret_access_key={KEY}"),
        &format!("access_key_id=nobody,secret_access_key={secret},session_token={secret}"),
    );
    let (_, text) = built(
        &lab,
        &context,
        &["--cache-from", &wrong, "--cache-to", &format!("{wrong},ignore-error=true")],
    );
    assert!(text.contains("was not imported") && text.contains("was not exported"), "{text}");
    assert!(!text.contains(secret), "{text}");
    assert!(lab.stop_daemon(), "the daemon had to be killed");
    // The store's own log is among the files.
    assert_eq!(holds(lab.dir(), secret), None);
}

#[test]
fn keys_and_bucket_come_from_the_daemons_environment() {
    let mut lab = Lab::complete(any());
    let store = Store::s3(&lab);
    for (name, value) in [
        ("AWS_ACCESS_KEY_ID", KEY),
        ("AWS_SECRET_ACCESS_KEY", KEY),
        ("AWS_BUCKET", "b"),
        ("AWS_REGION", "us-east-1"),
    ] {
        lab.daemon_environment(name, value);
    }
    assert!(lab.stop_daemon(), "the daemon had to be killed");
    lab.start_daemon();
    let context = lab.context("environment", &[("Dockerfile", TEXT)]);
    let cache = format!("type=s3,endpoint_url=http://{},use_path_style=true", store.host());
    let (stamp, _) = built(&lab, &context, &["--cache-to", &format!("{cache},mode=max")]);
    remove_everything(&lab);
    let (again, text) = built(&lab, &context, &["--cache-from", &cache]);
    assert_eq!(again, stamp, "{text}");
}

#[test]
fn a_store_that_fails_is_a_warning_unless_it_must_not() {
    let lab = Lab::complete(any());
    let store = Store::s3(&lab);
    let faults = [
        ("busy", RegistryFault::Status(503, "<Error><Code>SlowDown</Code></Error>")),
        ("limited", RegistryFault::Status(429, "")),
    ];
    let context = lab.context("failing", &[("Dockerfile", TEXT)]);
    for (name, fault) in faults {
        let proxy = FaultyRegistry::start(&store.host(), "/", fault);
        let cache = format!("{},retry_max_attempts=2", bucket(&proxy.address()));
        let (_, text) = built(&lab, &context, &["--cache-from", &cache, "--cache-to", &cache]);
        assert!(text.contains("was not imported"), "{name}: {text}");
        assert!(text.contains("was not exported"), "{name}: {text}");
        let strict = format!("{cache},ignore-error=false");
        let path = context.display().to_string();
        let failed =
            lab.shipway(["build", "--output", "type=cacheonly", "--cache-to", &strict, &path]);
        assert!(failed.failed().all().contains("S3 at 127.0.0.1:"), "{name}");
    }
    // A request that can never succeed is not the place's fault.
    let path = context.display().to_string();
    let wrong = ["build", "--output", "type=cacheonly", "--cache-to", "type=s3,region=r", &path];
    assert!(lab.shipway(wrong).failed().all().contains("bucket ($AWS_BUCKET) not set"));
}

#[test]
fn githubs_cache_works_by_both_protocols() {
    let lab = Lab::complete(any());
    for attribute in ["url", "url_v2"] {
        let github = GithubCache::start("refs/heads/feature");
        let context = lab.context(attribute, &[("Dockerfile", TEXT)]);
        let cache = format!("type=gha,{attribute}={},token={}", github.url(), github.token());
        let to = format!("{cache},mode=max");
        remove_everything(&lab);
        // Nobody is there yet, and the first requests come too fast.
        github.limit(2);
        let (stamp, text) = built(&lab, &context, &["--cache-from", &cache, "--cache-to", &to]);
        assert!(text.contains("exporting to GitHub Actions Cache"), "{text}");
        assert!(!text.contains("was not"), "{text}");
        let keys = github.keys();
        let layers = keys.iter().filter(|k| k.starts_with("buildkit-blob-1-sha256:")).count();
        assert!(layers >= 3 && layers == keys.len() - 1, "{keys:?}");
        assert!(keys[layers].starts_with("index-buildkit-1-"), "{keys:?}");

        remove_everything(&lab);
        github.take();
        let (again, text) = built(&lab, &context, &["--cache-from", &cache, "--cache-to", &to]);
        assert_eq!(again, stamp, "{text}");
        // Nothing is new: nothing is begun, nothing is written.
        let asked = github.take();
        let writes = |a: &&String| {
            ["PUT", "PATCH", "CreateCacheEntry", "artifactcache/caches"]
                .iter()
                .any(|w| a.contains(w))
        };
        assert_eq!(asked.iter().filter(writes).count(), 0, "{asked:?}");

        // What GitHub threw away is built again, and written again.
        github.evict(|key| key.contains("blob"));
        remove_everything(&lab);
        let (other, text) = built(&lab, &context, &["--cache-from", &cache, "--cache-to", &to]);
        assert_ne!(other, stamp, "{text}");
        assert!(github.keys().iter().filter(|k| k.contains("blob")).count() >= 3);
    }
}

#[test]
fn the_published_client_gets_along_with_the_stand_in() {
    let modules = lab_dir().join("node/node_modules");
    assert!(
        modules.join("@actions/cache").exists(),
        "@actions/cache is absent; `cargo xtask prepare` fetches it"
    );
    let node = which("node").expect("node is absent; `cargo xtask prepare` installs it");
    let script = "
        const fs = require('fs');
        const cache = require(process.argv[1]);
        (async () => {
            fs.mkdirSync('data');
            fs.writeFileSync('data/file', 'contents');
            await cache.saveCache(['data'], 'key-1');
            fs.rmSync('data', { recursive: true });
            const hit = await cache.restoreCache(['data'], 'key-2', ['key-']);
            console.log('found', hit, fs.readFileSync('data/file', 'utf8'));
            console.log('none', await cache.restoreCache(['data'], 'other'));
            process.exit();
        })();";
    for second in [false, true] {
        let github = GithubCache::start("refs/heads/feature");
        let dir = tempfile::tempdir().unwrap();
        let mut command = Command::new(&node);
        command
            .args(["-e", script])
            .arg(modules.join("@actions/cache"))
            .current_dir(dir.path())
            .env("RUNNER_TEMP", dir.path())
            .env("GITHUB_WORKSPACE", dir.path())
            .env("ACTIONS_RUNTIME_TOKEN", github.token())
            .env("ACTIONS_CACHE_URL", format!("{}/", github.url()))
            .env("ACTIONS_RESULTS_URL", format!("{}/", github.url()));
        if second {
            command.env("ACTIONS_CACHE_SERVICE_V2", "true");
        }
        let said = run(&mut command).ok();
        assert!(said.stdout.contains("found key-1 contents"), "{}", said.all());
        assert!(said.stdout.contains("none undefined"), "{}", said.all());
        assert_eq!(github.keys(), ["key-1"]);
        let calls = github.take();
        let twirp = calls.iter().filter(|c| c.contains("/twirp/")).count();
        assert_eq!(twirp > 0, second, "{calls:?}");
    }
}

#[test]
fn a_container_keeps_a_cache_that_an_empty_machine_builds_from() {
    let lab = Lab::complete(any());
    let key = "c2VjcmV0LWtleS1vZi1henVyaXRl";
    let store = Store::start(&lab, "azurite/dist/src/blob/main.js", |dir, port| {
        let words = [
            "--blobHost",
            "127.0.0.1",
            "--blobPort",
            port,
            "--location",
            dir,
            "--disableTelemetry",
            "--disableProductStyleUrl",
        ];
        words.map(str::to_owned).to_vec()
    });
    let context = lab.context("container", &[("Dockerfile", TEXT)]);
    let cache = format!(
        "type=azblob,account_url=http://{}/me,account_name=me,secret_access_key={key},container=caches,name=one;two",
        store.host()
    );
    let to = format!("{cache},mode=max");
    let (stamp, text) = built(&lab, &context, &["--cache-from", &cache, "--cache-to", &to]);
    assert!(text.contains("exporting cache to Azure Blob Storage"), "{text}");
    assert!(!text.contains("was not"), "{text}");
    assert!(text.contains("writing layer"), "{text}");
    remove_everything(&lab);
    let (again, text) = built(&lab, &context, &["--cache-from", &cache, "--cache-to", &to]);
    assert_eq!(again, stamp, "{text}");
    assert!(!text.contains("writing layer"), "{text}");
    // The key of another account opens nothing, and is no reason to fail.
    let wrong = cache.replace(key, "d3Jvbmc=");
    let (_, text) = built(&lab, &context, &["--cache-from", &wrong]);
    assert!(text.contains("was not imported"), "{text}");
}
