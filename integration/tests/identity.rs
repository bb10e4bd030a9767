//! Who calls, and what each may do (rows `dp.auth.*`): a daemon on real containerd, with stand-ins
//! for an issuer of tokens and for the API of Kubernetes, over TLS on loopback.

#![allow(clippy::unwrap_used)]

use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use parking_lot::Mutex;
use ring::{
    rand::SystemRandom,
    signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair as _},
};
use serde_json::{Value, json};
use shipway_integration::any;
use shipway_proto::moby::buildkit::v1::{
    self as api,
    control_client::ControlClient,
    frontend::{self as wire, llb_bridge_client::LlbBridgeClient},
};
use shipway_testkit::{Finished, Lab, Process, built, free_port, run, wait_for, which};
use std::{
    collections::BTreeMap,
    fs,
    path::PathBuf,
    process::Command,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
    task::JoinHandle,
};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        ServerConfig,
        crypto::ring as provider,
        pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
    },
};

/// Certificates of one authority: for the daemon and the stand-ins, and for three people.
struct Certificates(PathBuf);

impl Certificates {
    #[track_caller]
    fn new(dir: PathBuf) -> Self {
        run(Command::new(built("shipway"))
            .args(["certs", "--host", "127.0.0.1", "--client", "alice"])
            .args(["--client", "bob", "--client", "carol"])
            .arg(&dir))
        .ok();
        Self(dir)
    }

    fn file(&self, name: &str) -> String {
        self.0.join(name).display().to_string()
    }

    fn acceptor(&self) -> TlsAcceptor {
        let chain = CertificateDer::pem_file_iter(self.0.join("daemon/cert.pem")).unwrap();
        let key = PrivateKeyDer::from_pem_file(self.0.join("daemon/key.pem")).unwrap();
        let config = ServerConfig::builder_with_provider(Arc::new(provider::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(chain.map(Result::unwrap).collect(), key)
            .unwrap();
        TlsAcceptor::from(Arc::new(config))
    }
}

/// A request as a stand-in sees it.
struct Asked {
    path: String,
    authorization: String,
    body: Value,
}

type Answer = dyn Fn(&Asked) -> Option<Value> + Send + Sync;

/// A server on loopback that answers with documents, over TLS.
struct StandIn {
    port: u16,
    asked: Arc<Mutex<Vec<String>>>,
    serving: JoinHandle<()>,
    _runtime: tokio::runtime::Runtime,
}

impl StandIn {
    fn start(port: u16, tls: TlsAcceptor, answer: Arc<Answer>) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let listener = runtime.block_on(TcpListener::bind(("127.0.0.1", port))).unwrap();
        let asked = Arc::<Mutex<Vec<String>>>::default();
        let seen = asked.clone();
        let serving = shipway_task::spawn_on(runtime.handle(), "stand-in", async move {
            while let Ok((tcp, _)) = listener.accept().await {
                let (tls, answer, seen) = (tls.clone(), answer.clone(), seen.clone());
                shipway_task::spawn("stand-in", async move {
                    let Ok(mut stream) = tls.accept(tcp).await else { return };
                    let mut request = Vec::new();
                    let Some(asked) = read(&mut stream, &mut request).await else { return };
                    seen.lock().push(asked.path.clone());
                    let (status, body) = match answer(&asked) {
                        Some(document) => ("200 OK", document.to_string()),
                        None => ("403 Forbidden", "{}".to_owned()),
                    };
                    let head = format!(
                        "HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
                        body.len()
                    );
                    let _ = stream.write_all(format!("{head}{body}").as_bytes()).await;
                    let _ = stream.shutdown().await;
                });
            }
        });
        Self { port, asked, serving, _runtime: runtime }
    }

    fn address(&self) -> String {
        format!("https://127.0.0.1:{}", self.port)
    }

    fn asked(&self, path: &str) -> usize {
        self.asked.lock().iter().filter(|p| *p == path).count()
    }
}

impl Drop for StandIn {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

/// One request: its head, and as much of a body as it says.
async fn read(
    stream: &mut (impl tokio::io::AsyncRead + Unpin),
    request: &mut Vec<u8>,
) -> Option<Asked> {
    loop {
        let text = String::from_utf8_lossy(request).into_owned();
        if let Some((head, body)) = text.split_once("\r\n\r\n") {
            let header = |name: &str| {
                head.lines().skip(1).find_map(|line| {
                    let (key, value) = line.split_once(": ")?;
                    key.eq_ignore_ascii_case(name).then(|| value.to_owned())
                })
            };
            let length = header("content-length").map_or(0, |v| v.parse().unwrap());
            if body.len() >= length {
                return Some(Asked {
                    path: head.split(' ').nth(1)?.to_owned(),
                    authorization: header("authorization").unwrap_or_default(),
                    body: serde_json::from_str(body).unwrap_or_default(),
                });
            }
        }
        if stream.read_buf(request).await.ok()? == 0 {
            return None;
        }
    }
}

/// A key of an issuer.
struct Key(String, EcdsaKeyPair);

impl Key {
    fn new(id: &str) -> Self {
        let (kind, random) = (&ECDSA_P256_SHA256_FIXED_SIGNING, SystemRandom::new());
        let bytes = EcdsaKeyPair::generate_pkcs8(kind, &random).unwrap();
        Self(id.to_owned(), EcdsaKeyPair::from_pkcs8(kind, bytes.as_ref(), &random).unwrap())
    }

    fn public(&self) -> Value {
        let point = self.1.public_key().as_ref();
        let part = |bytes: &[u8]| BASE64_URL_SAFE_NO_PAD.encode(bytes);
        json!({"kty": "EC", "crv": "P-256", "kid": self.0, "x": part(&point[1..33]), "y": part(&point[33..])})
    }

    /// A token of the job of a repository, with some claims changed.
    fn token(&self, issuer: &str, repository: &str, changed: Value) -> String {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
        let mut claims = json!({
            "iss": issuer, "sub": format!("repo:{repository}:ref:refs/heads/main"), "aud": "shipway",
            "repository": repository, "iat": now, "nbf": now, "exp": now + 600,
        });
        for (name, value) in changed.as_object().unwrap() {
            claims[name] = value.clone();
        }
        let part = |value: &Value| BASE64_URL_SAFE_NO_PAD.encode(value.to_string());
        let header = json!({"alg": "ES256", "kid": self.0, "typ": "JWT"});
        let signed = format!("{}.{}", part(&header), part(&claims));
        let signature = self.1.sign(&SystemRandom::new(), signed.as_bytes()).unwrap();
        format!("{signed}.{}", BASE64_URL_SAFE_NO_PAD.encode(signature))
    }
}

/// An issuer that gives the keys there are.
fn issuer(certificates: &Certificates, keys: Arc<Mutex<Vec<Value>>>, port: u16) -> StandIn {
    let address = format!("https://127.0.0.1:{port}");
    let answer = move |asked: &Asked| match &*asked.path {
        "/.well-known/openid-configuration" => {
            Some(json!({"issuer": address, "jwks_uri": format!("{address}/keys")}))
        }
        "/keys" => Some(json!({ "keys": *keys.lock() })),
        _ => None,
    };
    StandIn::start(port, certificates.acceptor(), Arc::new(answer))
}

/// A daemon of the lab's that knows callers, with a port.
struct Daemon {
    process: Process,
    port: u16,
    log: PathBuf,
    root: PathBuf,
}

impl Daemon {
    #[track_caller]
    fn start(lab: &Lab, certificates: &Certificates, name: &str, auth: &str) -> Self {
        let port = free_port();
        let config = lab.dir().join(format!("{name}.toml"));
        let text = fs::read_to_string(lab.dir().join("shipwayd.toml")).unwrap();
        fs::write(&config, format!("{text}\n{auth}")).unwrap();
        let (log, root) = (lab.dir().join(format!("{name}.log")), lab.dir().join(name));
        let mut command = Command::new(built("shipwayd"));
        command.arg("--config").arg(&config).arg("--root").arg(&root).env("PATH", lab.path());
        command.args(["--log-format=json", "--allow-insecure-entitlement=network.host"]);
        command.arg(format!("--addr=tcp://127.0.0.1:{port}"));
        command.arg(format!("--addr=unix://{}", root.join("s.sock").display()));
        for (flag, file) in
            [("tlscert", "cert.pem"), ("tlskey", "key.pem"), ("tlscacert", "ca.pem")]
        {
            command.arg(format!("--{flag}={}", certificates.file(&format!("daemon/{file}"))));
        }
        let mut process = Process::start(name, &mut command, &log);
        wait_for("the daemon to listen", Duration::from_secs(30), || {
            process.alive()?;
            let said = process.tail(50);
            if said.matches("\"listening\"").count() == 2 { Ok(()) } else { Err(said) }
        });
        Self { process, port, log, root }
    }

    fn asking(&self, words: &[&str]) -> Command {
        let mut command = Command::new(built("shipway"));
        command.args(["--addr", &format!("tcp://127.0.0.1:{}", self.port), "--timeout", "20"]);
        command.args(words);
        command
    }

    /// Asks with a token and the daemon's authority.
    #[track_caller]
    fn with_token(&self, certificates: &Certificates, token: &str, words: &[&str]) -> Finished {
        let file = self.root.join("token");
        fs::write(&file, token).unwrap();
        let (file, ca) = (file.display().to_string(), certificates.file("daemon/ca.pem"));
        let flags = ["--tlscacert", &ca, "--token-file", &file];
        run(&mut self.asking(&[&flags, words].concat()))
    }

    /// The lines of the log about decisions: who, the action, and how it was decided.
    fn audit(&self) -> Vec<BTreeMap<String, String>> {
        let text = fs::read_to_string(&self.log).unwrap();
        let lines = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let audit = lines.filter(|line| line["target"] == "audit").map(|line| {
            let fields = line["fields"].as_object().unwrap();
            let text = |v: &Value| v.as_str().map_or_else(|| v.to_string(), str::to_owned);
            fields.iter().map(|(k, v)| (k.clone(), text(v))).collect()
        });
        audit.collect()
    }

    #[track_caller]
    fn has_audit(&self, wanted: &[(&str, &str)]) {
        let audit = self.audit();
        let has = |line: &BTreeMap<String, String>| {
            wanted.iter().all(|(key, part)| line.get(*key).is_some_and(|v| v.contains(part)))
        };
        assert!(audit.iter().any(has), "no {wanted:?} in {audit:#?}");
    }
}

#[track_caller]
fn says(done: Finished, part: &str) {
    let done = done.failed();
    assert!(done.all().contains(part), "{part} is not in\n{}", done.all());
}

fn lab() -> Lab {
    let mut lab = Lab::complete(any());
    assert!(lab.stop_daemon(), "the daemon had to be killed");
    lab
}

/// A directory to build from.
fn context(lab: &Lab, name: &str) -> String {
    let text = format!("FROM {}/library/busybox\nRUN echo {name} > /x\n", lab.registry());
    lab.context(name, &[("Dockerfile", &text)]).display().to_string()
}

#[test]
fn callers_do_what_policies_allow_them_and_see_their_own() {
    let lab = lab();
    let certificates = Certificates::new(lab.dir().join("certs"));
    let registry = lab.registry();
    let auth = format!(
        r#"
        [[auth.policy]]
        name = "root"
        claims = {{ uid = "0" }}
        allow = {{ admin = true, store = "*" }}
        [[auth.policy]]
        name = "people"
        subject = ["cert:alice", "cert:bob"]
        [auth.policy.allow]
        store = "docker.io/library/mine"
        pull = "{registry}/library/*"
        push = "{registry}/people/*"
        cacheExport = "registry:{registry}/people/*"
        "#
    );
    let mut daemon = Daemon::start(&lab, &certificates, "policies", &auth);
    let by = |who: &str, words: &[&str]| {
        let dir = certificates.file(who);
        run(&mut daemon.asking(&[&["--tlsdir", &dir], words].concat()))
    };
    let root = |words: &[&str]| {
        let address = format!("unix://{}", daemon.root.join("s.sock").display());
        run(Command::new(built("shipway")).args(["--addr", &address]).args(words))
    };
    let context = context(&lab, "policies");
    let build = |who: &str, more: &[&str]| {
        by(who, &[&["build", "--progress=plain", &context], more].concat())
    };

    by("alice", &["workers"]).ok();
    says(by("carol", &["workers"]), "cert:carol may not use this daemon");
    says(by("carol", &["workers"]), "no [[auth.policy]]");
    says(
        run(&mut daemon.asking(&["--tlscacert", &certificates.file("alice/ca.pem"), "workers"])),
        "",
    );

    build("alice", &["--tag=mine:1"]).ok();
    let image = |name: &str| lab.ctr(["images", "list", "-q"]).ok().stdout.contains(name);
    assert!(image("docker.io/library/mine:1"));
    says(
        build("alice", &["--tag=theirs:1"]),
        "cert:alice may not store an image as docker.io/library/theirs:1",
    );
    says(
        build("alice", &["--tag=theirs:1"]),
        r#"(people) allows it: `allow` of one of them needs store"#,
    );
    // The name that comes with the result is no way around.
    let named = "--output=type=image,name=*,image.name=docker.io/library/theirs:1";
    says(build("alice", &[named]), "may not store an image as docker.io/library/theirs:1");
    let dangling = "--output=type=image,dangling-name-prefix=docker.io/library/theirs";
    says(build("alice", &[dangling]), "may not store an image as docker.io/library/theirs");
    let spaced = "--output=type=image,name=mine:2,\"namespaces=k8s.io\"";
    says(build("alice", &[spaced]), "may not publish images to the namespace k8s.io");
    let pushed =
        |name: &str| format!("--output=type=image,name={registry}/{name}:1,push=true,store=false");
    build("alice", &[&pushed("people/app")]).ok();
    says(build("alice", &[&pushed("peoples/app")]), "may not push the image");
    assert_eq!(lab.registry_get("/v2/peoples/app/tags/list").0, 404);
    says(build("alice", &["--allow=network.host"]), "may not use the entitlement network.host");
    let cache = |name: &str| format!("--cache-to=type=registry,ref={registry}/{name}:1");
    build("alice", &["--tag=mine:5", &cache("people/cache")]).ok();
    says(build("alice", &[&cache("other/cache")]), "may not export a cache to registry:");
    let import = format!("--cache-from=type=registry,ref={registry}/people/cache:1");
    says(build("alice", &[&import]), "may not import the cache registry:");
    let other = lab.context("other", &[("Dockerfile", "FROM docker.io/library/alpine\n")]);
    let other = other.display().to_string();
    says(
        by("alice", &["build", "--tag=mine:6", &other]),
        "may not build from the image docker.io/library/alpine",
    );
    let nested = format!("FROM scratch\nCOPY --from={registry}/secret/base / /\n");
    let nested = lab.context("nested", &[("Dockerfile", &nested)]).display().to_string();
    says(by("alice", &["build", "--tag=mine:6", &nested]), "may not build from the image");
    says(by("alice", &["prune"]), "cert:alice may not prune");
    says(by("alice", &["du"]), "cert:alice may not see what uses the disk");

    // The history is each one's own, but for who administers the daemon.
    build("bob", &["--tag=mine:3"]).ok();
    let list = |done: Finished| -> Vec<String> {
        let lines = done.ok().stdout;
        let records = lines.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        records.map(|r| r["ref"].as_str().unwrap().rsplit('/').next().unwrap().to_owned()).collect()
    };
    let history = ["history", "ls", "--format=json", "--no-trunc"];
    let (alices, bobs, all) =
        (list(by("alice", &history)), list(by("bob", &history)), list(root(&history)));
    assert_eq!((bobs.len(), all.len()), (1, alices.len() + 1), "{alices:?} {bobs:?} {all:?}");
    assert!(!alices.contains(&bobs[0]) && all.contains(&bobs[0]));
    for words in [["history", "logs"], ["history", "rm"], ["history", "inspect"]] {
        by("alice", &[&words[..], &[&bobs[0]]].concat()).failed();
    }
    by("bob", &["history", "logs", &bobs[0]]).ok();
    root(&["history", "logs", &bobs[0]]).ok();
    assert_eq!(list(by("bob", &history)), bobs);
    root(&["history", "rm", &bobs[0]]).ok();
    assert!(list(by("bob", &history)).is_empty());
    root(&["du"]).ok();

    // BuildKit's client, ours under its name and the real one.
    let link = lab.dir().join("buildctl");
    std::os::unix::fs::symlink(built("shipway"), &link).unwrap();
    for buildctl in [link].into_iter().chain(which("buildctl")) {
        let ask = |who: &str, words: &[&str]| {
            let (address, dir) =
                (format!("tcp://127.0.0.1:{}", daemon.port), certificates.file(who));
            run(Command::new(&buildctl).args(["--addr", &address, "--tlsdir", &dir]).args(words))
        };
        let output = |name: &str| format!("type=image,name={name}");
        let words = |output: &str| {
            let local = |name: &str| format!("--local={name}={context}");
            [
                "build",
                "--frontend=dockerfile.v0",
                &local("context"),
                &local("dockerfile"),
                "--output",
                output,
            ]
            .map(str::to_owned)
        };
        let build = |who: &str, name: &str| {
            let words = words(&output(name));
            ask(who, &words.each_ref().map(String::as_str))
        };
        build("alice", "docker.io/library/mine:4").ok();
        says(build("alice", "docker.io/library/theirs:4"), "may not store an image");
        says(build("carol", "docker.io/library/mine:4"), "cert:carol may not");
        says(ask("bob", &["prune"]), "cert:bob may not prune");
    }
    assert!(!image("theirs"));

    for wanted in [
        &[("message", "allowed"), ("who", "cert:alice"), ("action", "build"), ("policy", "people")]
            [..],
        &[
            ("message", "allowed"),
            ("who", "cert:alice"),
            ("action", "push"),
            ("what", "people/app"),
        ],
        &[
            ("message", "denied"),
            ("who", "cert:alice"),
            ("action", "store"),
            ("policies", "people"),
        ],
        &[("message", "denied"), ("who", "cert:carol"), ("kind", "certificate")],
        &[("message", "allowed"), ("who", "unix:0"), ("action", "admin"), ("policy", "root")],
    ] {
        daemon.has_audit(wanted);
    }
    let exported = daemon.audit().into_iter().find(|line| line["action"] == "push").unwrap();
    assert!(exported["build"].len() >= 20, "{exported:?}");
    assert!(daemon.process.stop(Duration::from_secs(20)), "the daemon had to be killed");
}

#[test]
fn tokens_of_an_issuer_are_identities_while_their_keys_are_known() {
    let lab = lab();
    let certificates = Certificates::new(lab.dir().join("certs"));
    let (first, second) = (Key::new("first"), Key::new("second"));
    let keys = Arc::new(Mutex::new(vec![first.public()]));
    let stand_in = issuer(&certificates, keys.clone(), free_port());
    let address = stand_in.address();
    let auth = format!(
        r#"
        [[auth.oidc]]
        name = "github"
        issuer = "{address}"
        audience = ["shipway"]
        ca = "{}"
        [[auth.policy]]
        name = "ours"
        subject = "github:*"
        claims = {{ repository = "org/*" }}
        [[auth.policy]]
        name = "people"
        subject = "cert:alice"
        "#,
        certificates.file("daemon/ca.pem")
    );
    let mut daemon = Daemon::start(&lab, &certificates, "tokens", &auth);
    let ask = |token: &str| daemon.with_token(&certificates, token, &["workers"]);
    let token = |key: &Key, repository: &str| key.token(&address, repository, json!({}));
    let good = token(&first, "org/app");
    ask(&good).ok();
    let context = context(&lab, "tokens");
    let output = format!("--output=type=local,dest={}", lab.dir().join("out").display());
    daemon.with_token(&certificates, &good, &["build", &output, &context]).ok();
    assert_eq!(
        (stand_in.asked("/keys"), stand_in.asked("/.well-known/openid-configuration")),
        (1, 1)
    );

    says(ask(&token(&first, "other/app")), "github:repo:other/app:ref:refs/heads/main may not use");
    says(ask(&first.token(&address, "org/app", json!({"aud": "other"}))), "another audience");
    says(ask(&first.token(&address, "org/app", json!({"exp": 1}))), "expired");
    says(ask(&first.token("https://127.0.0.1:1", "org/app", json!({}))), "no issuer");
    let forged = Key("first".to_owned(), Key::new("x").1);
    says(ask(&token(&forged, "org/app")), "not its issuer's");
    let claims = good.split('.').nth(1).unwrap();
    let none = BASE64_URL_SAFE_NO_PAD.encode(r#"{"alg":"none"}"#);
    says(ask(&format!("{none}.{claims}.")), "signed with \"none\"");
    says(ask("x"), "not valid");

    // Without a token there are certificates, and without either there is nothing.
    let ca = certificates.file("daemon/ca.pem");
    run(&mut daemon.asking(&["--tlsdir", &certificates.file("alice"), "workers"])).ok();
    says(run(&mut daemon.asking(&["--tlscacert", &ca, "workers"])), "wants to know who calls");
    let file = daemon.root.join("token").display().to_string();
    fs::write(&file, &good).unwrap();
    says(run(&mut daemon.asking(&["--token-file", &file, "workers"])), "without TLS");
    says(
        run(daemon
            .asking(&["--tlsdir", &certificates.file("alice"), "--auth=github", "workers"])
            .env_remove("ACTIONS_ID_TOKEN_REQUEST_URL")),
        "$ACTIONS_ID_TOKEN_REQUEST_URL is not set",
    );

    // A job of GitHub's gets its token from GitHub.
    let given = good.clone();
    let answer = move |asked: &Asked| {
        let known =
            asked.path == "/token?x=1&audience=shipway" && asked.authorization == "Bearer job";
        known.then(|| json!({ "value": given }))
    };
    let github = StandIn::start(free_port(), certificates.acceptor(), Arc::new(answer));
    let mut job = daemon.asking(&["--tlscacert", &ca, "--auth=github", "workers"]);
    job.env("ACTIONS_ID_TOKEN_REQUEST_URL", format!("{}/token?x=1", github.address()))
        .env("ACTIONS_ID_TOKEN_REQUEST_TOKEN", "job")
        .env("SSL_CERT_FILE", &ca);
    run(&mut job).ok();

    // Another key takes the place of the first.
    *keys.lock() = vec![second.public()];
    let new = token(&second, "org/app");
    wait_for("the new key to be looked for", Duration::from_secs(60), || {
        let done = ask(&new);
        if done.code == Some(0) { Ok(()) } else { Err(done.all()) }
    });
    says(ask(&good), "has no key \"first\"");
    // The issuer goes away: what is known of it is still good.
    drop(stand_in);
    ask(&new).ok();
    says(ask(&token(&Key::new("third"), "org/app")), "has no key \"third\"");

    daemon.has_audit(&[
        ("message", "allowed"),
        ("who", "github:repo:org/app:ref:refs/heads/main"),
        ("kind", "oidc"),
        ("action", "build"),
        ("policy", "ours"),
    ]);
    daemon.has_audit(&[("message", "denied"), ("who", "github:repo:other/app")]);
    daemon.has_audit(&[("message", "not recognized"), ("why", "expired"), ("peer", "127.0.0.1")]);
    let log = fs::read_to_string(&daemon.log).unwrap();
    for secret in [&good, &new] {
        for part in secret.split('.').skip(1) {
            assert!(!log.contains(part), "a part of a token is in the log");
        }
    }
    assert!(daemon.process.stop(Duration::from_secs(20)), "the daemon had to be killed");
}

#[test]
fn service_accounts_are_who_the_api_of_kubernetes_says() {
    let lab = lab();
    let certificates = Certificates::new(lab.dir().join("certs"));
    let own = lab.dir().join("own-token");
    fs::write(&own, "own\n").unwrap();
    let answer = |asked: &Asked| {
        let spec = &asked.body["spec"];
        let good = asked.path == "/apis/authentication.k8s.io/v1/tokenreviews"
            && asked.authorization == "Bearer own"
            && asked.body["apiVersion"] == "authentication.k8s.io/v1"
            && asked.body["kind"] == "TokenReview"
            && spec["audiences"] == json!(["shipway"]);
        let account = spec["token"].as_str()?.strip_prefix("token-of-")?.replace('-', ":");
        let user = json!({"username": format!("system:serviceaccount:{account}"), "uid": "u",
            "groups": ["system:serviceaccounts"]});
        let known = !account.contains("unknown");
        let status = json!({"authenticated": known, "user": user, "audiences": ["shipway"]});
        good.then(|| json!({"kind": "TokenReview", "status": status}))
    };
    let api = StandIn::start(free_port(), certificates.acceptor(), Arc::new(answer));
    const REVIEWS: &str = "/apis/authentication.k8s.io/v1/tokenreviews";
    let auth = format!(
        r#"
        [auth.kubernetes]
        server = "{}"
        ca = "{}"
        tokenFile = "{}"
        [[auth.policy]]
        name = "team"
        claims = {{ namespace = "team", kind = "kubernetes" }}
        "#,
        api.address(),
        certificates.file("daemon/ca.pem"),
        own.display()
    );
    let mut daemon = Daemon::start(&lab, &certificates, "accounts", &auth);
    let ask = |token: &str| daemon.with_token(&certificates, token, &["workers"]);
    ask("token-of-team-builder").ok();
    let context = context(&lab, "accounts");
    let output = format!("--output=type=local,dest={}", lab.dir().join("out").display());
    daemon.with_token(&certificates, "token-of-team-builder", &["build", &output, &context]).ok();
    says(ask("token-of-other-builder"), "kubernetes:system:serviceaccount:other:builder may not");
    says(ask("token-of-unknown-x"), "does not know it");
    // All calls of the three were three questions, or a few more where the machine is slow.
    let asked = api.asked(REVIEWS);
    assert!((3..=6).contains(&asked), "{asked} questions");
    // The API does not take the daemon's own token any more.
    fs::write(&own, "withdrawn").unwrap();
    says(ask("token-of-team-other"), "system:auth-delegator");
    drop(api);
    says(ask("token-of-team-third"), "does not say whose the token is");
    daemon.has_audit(&[
        ("message", "allowed"),
        ("who", "kubernetes:system:serviceaccount:team:builder"),
        ("kind", "kubernetes"),
        ("policy", "team"),
    ]);
    let log = fs::read_to_string(&daemon.log).unwrap();
    assert!(!log.contains("token-of-") && !log.contains("withdrawn"), "a token is in the log");
    assert!(daemon.process.stop(Duration::from_secs(20)), "the daemon had to be killed");
}

#[test]
fn what_cannot_be_meant_stops_the_daemon() {
    let dir = tempfile::tempdir().unwrap();
    for (text, why) in [
        ("[auth]\n", "lets nobody in"),
        ("[[auth.policy]]\nname = 'x'\n", "applies to nobody"),
        (
            "[[auth.policy]]\nname = 'x'\nsubject = '*'\nallow = { all = true }\n",
            "unknown field `all`",
        ),
    ] {
        let file = dir.path().join("shipwayd.toml");
        fs::write(&file, text).unwrap();
        let mut command = Command::new(built("shipwayd"));
        let done = run(command.arg("--config").arg(&file).arg("--root").arg(dir.path().join("r")));
        says(done, why);
    }
}

/// A request of the build `id`, as clients that drive their builds make them.
fn of_build<T>(id: &str, message: T) -> tonic::Request<T> {
    let mut request = tonic::Request::new(message);
    request.metadata_mut().insert("buildkit-controlapi-buildid", id.parse().unwrap());
    request
}

/// What a client that drives its build, or a frontend, says in the middle of it is asked of the
/// same policies as the request.
#[test]
fn the_name_that_a_frontend_gives_is_no_way_around_a_policy() {
    let lab = lab();
    let certificates = Certificates::new(lab.dir().join("certs"));
    let auth = r#"
        [[auth.policy]]
        name = "all"
        subject = "*"
        allow = { store = "docker.io/library/mine", pull = "none/*" }
        "#;
    let mut daemon = Daemon::start(&lab, &certificates, "driven", auth);
    let socket = shipway_grpc::Address::Unix(daemon.root.join("s.sock"));
    let tcp = shipway_grpc::Address::Tcp(format!("127.0.0.1:{}", daemon.port));
    let file = |name: &str| PathBuf::from(certificates.file(name));
    let tls = shipway_grpc::ClientTls {
        server_name: None,
        ca: Some(file("alice/ca.pem")),
        identity: Some((file("alice/cert.pem"), file("alice/key.pem"))),
    };
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let work = async {
        let channel = shipway_grpc::dial(&socket, None).await.unwrap();
        let others = shipway_grpc::dial(&tcp, Some(&tls)).await.unwrap();
        let mut bridge = LlbBridgeClient::new(channel.clone());
        let mut other = LlbBridgeClient::new(others.clone());
        let build = |id: &'static str| {
            let mut control = ControlClient::new(channel.clone());
            let exporter = api::Exporter {
                r#type: "image".into(),
                attrs: [("name".to_owned(), "*".to_owned())].into(),
            };
            let request = api::SolveRequest {
                r#ref: id.into(),
                exporters: vec![exporter],
                ..Default::default()
            };
            shipway_task::spawn("test", async move { control.solve(request).await })
        };
        let finish = |id, name: &str| {
            let name = base64::prelude::BASE64_STANDARD.encode(name);
            let exporter_attr = json!({ "image.name": name }).to_string().into_bytes();
            of_build(id, wire::SolveRequest { r#final: true, exporter_attr, ..Default::default() })
        };
        let denied = |status: tonic::Status, part: &str| {
            assert_eq!(status.code(), tonic::Code::PermissionDenied, "{status}");
            assert!(status.message().contains(part), "{part}: {status}");
        };

        let solved = build("first");
        bridge.ping(of_build("first", wire::PingRequest {})).await.unwrap();
        // It is driven by who has begun it.
        let stranger = other.ping(of_build("first", wire::PingRequest {})).await.unwrap_err();
        assert_eq!(stranger.code(), tonic::Code::NotFound, "{stranger}");
        let mut followed = ControlClient::new(others.clone());
        let request = api::StatusRequest { r#ref: "first".into() };
        assert_eq!(followed.status(request).await.unwrap_err().code(), tonic::Code::NotFound);
        let cache = wire::CacheOptionsEntry {
            r#type: "registry".into(),
            attrs: [("ref".to_owned(), "other.test/cache".to_owned())].into(),
        };
        let solve = wire::SolveRequest { cache_imports: vec![cache], ..Default::default() };
        let status = bridge.solve(of_build("first", solve)).await.unwrap_err();
        denied(status, "may not import the cache registry:other.test/cache:latest");
        let image = wire::ResolveSourceMetaRequest {
            source: Some(shipway_proto::pb::SourceOp {
                identifier: "docker-image://docker.io/library/alpine:3".into(),
                ..Default::default()
            }),
            ..Default::default()
        };
        let status = bridge.resolve_source_meta(of_build("first", image)).await.unwrap_err();
        denied(status, "may not build from the image docker.io/library/alpine:3");
        bridge.solve(finish("first", "docker.io/library/theirs:1")).await.unwrap();
        let status = solved.await.unwrap().unwrap_err();
        denied(status, "unix:0 may not store an image as docker.io/library/theirs:1");

        // A build of that name is in the history, and its owner's.
        let mut control = ControlClient::new(others.clone());
        let request = api::SolveRequest { r#ref: "first".into(), ..Default::default() };
        let status = control.solve(request).await.unwrap_err();
        assert_eq!(status.code(), tonic::Code::AlreadyExists, "{status}");

        let solved = build("second");
        bridge.solve(finish("second", "docker.io/library/mine:7")).await.unwrap();
        solved.await.unwrap().unwrap();
    };
    runtime.block_on(async { tokio::time::timeout(Duration::from_secs(120), work).await }).unwrap();
    let images = lab.ctr(["images", "list", "-q"]).ok().stdout;
    assert!(images.contains("library/mine:7") && !images.contains("theirs"), "{images}");
    assert!(daemon.process.stop(Duration::from_secs(20)), "the daemon had to be killed");
}
