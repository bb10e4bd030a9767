//! Steps on the proxy network (rows `exec.proxynet`, `so.proxy`): what they reach, what is told of
//! it, and what is left of it.

#![allow(clippy::unwrap_used)]

use serde_json::Value;
use shipway_integration::{Image, any, blob, nothing_left, on_each, remove_everything};
use shipway_testkit::{BaseImage, Finished, Lab, Layer, built, free_port, run, wait_for};
use std::{
    io::{BufRead as _, BufReader, Write as _},
    net::{IpAddr, TcpListener},
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

/// A loopback address that the step's own `NO_PROXY` does not have.
const HOST: &str = "127.0.0.2";

/// A web server on the host's loopback.
struct Server {
    port: u16,
    /// Requests so far.
    asked: Arc<AtomicUsize>,
}

impl Server {
    fn start() -> Self {
        let listener = TcpListener::bind((HOST, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let asked = Arc::new(AtomicUsize::new(0));
        let count = asked.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let count = count.clone();
                std::thread::spawn(move || {
                    let peer = stream.peer_addr().unwrap().ip();
                    let mut lines = BufReader::new(&stream).lines().map_while(Result::ok);
                    let path = lines
                        .next()
                        .and_then(|l| l.split(' ').nth(1).map(str::to_owned))
                        .unwrap_or_default();
                    while lines.next().is_some_and(|l| !l.is_empty()) {}
                    count.fetch_add(1, Ordering::SeqCst);
                    let (status, body) = answer(&path, peer);
                    if path != "/hang" {
                        let head = format!(
                            "HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
                            body.len()
                        );
                        let _ = (&stream).write_all(format!("{head}{body}").as_bytes());
                    } else {
                        // Until the other side gives up.
                        for _ in lines {}
                    }
                });
            }
        });
        Self { port, asked }
    }

    fn url(&self, path: &str) -> String {
        format!("http://{HOST}:{}{path}", self.port)
    }

    fn asked(&self) -> usize {
        self.asked.load(Ordering::SeqCst)
    }
}

fn answer(path: &str, peer: IpAddr) -> (&'static str, String) {
    match path {
        "/missing" => ("404 Not Found", "nothing".into()),
        "/peer" => ("200 OK", peer.to_string()),
        path => ("200 OK", format!("this is {path}\n")),
    }
}

/// `openssl s_server` with a certificate for [`HOST`] that is a root of its own; ends with the
/// value.
pub(crate) struct TlsServer {
    port: u16,
    /// Its certificate, as a file.
    pub(crate) root: PathBuf,
    process: std::process::Child,
}

impl TlsServer {
    pub(crate) fn start(dir: &Path) -> Self {
        let (key, root, port) = (dir.join("server.key"), dir.join("server.pem"), free_port());
        let files = dir.join("tls-files");
        std::fs::create_dir_all(&files).unwrap();
        std::fs::write(files.join("file"), "this came by TLS\n").unwrap();
        run(Command::new("openssl")
            .args([
                "req",
                "-x509",
                "-newkey",
                "ec",
                "-pkeyopt",
                "ec_paramgen_curve:P-256",
                "-nodes",
                "-days",
                "2",
                "-subj",
                "/CN=test",
            ])
            .args(["-addext", "basicConstraints=critical,CA:FALSE"])
            .args(["-addext", &format!("subjectAltName=IP:{HOST}"), "-keyout"])
            .arg(&key)
            .arg("-out")
            .arg(&root))
        .ok();
        let process = Command::new("openssl")
            .args(["s_server", "-quiet", "-WWW", "-accept", &format!("{HOST}:{port}"), "-cert"])
            .arg(&root)
            .arg("-key")
            .arg(&key)
            .current_dir(&files)
            .spawn()
            .unwrap();
        Self { port, root, process }
    }

    pub(crate) fn url(&self, path: &str) -> String {
        format!("https://{HOST}:{}{path}", self.port)
    }
}

impl Drop for TlsServer {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// busybox with `curl`, which checks certificates, and the certificates that it checks with.
pub(crate) fn web_image() -> BaseImage {
    let mut image = BaseImage::busybox();
    image.add_programs(&["curl"]);
    let root = tempfile::tempdir().unwrap();
    std::fs::create_dir_all(root.path().join("etc/ssl/certs")).unwrap();
    std::fs::write(root.path().join("etc/ssl/certs/ca-certificates.crt"), "# none\n").unwrap();
    image.layers.push(Layer::of_dir(root.path()));
    image
}

struct Web {
    lab: Lab,
    dir: PathBuf,
}

impl Web {
    /// A build of `text` with the proxy network, by our client under buildctl's name.
    fn command(&self, name: &str, text: &str, more: &[&str]) -> Command {
        let context = self.lab.context(name, &[("Dockerfile", text)]);
        let client = self.dir.join("buildctl");
        if !client.exists() {
            std::fs::create_dir_all(&self.dir).unwrap();
            std::os::unix::fs::symlink(built("shipway"), &client).unwrap();
        }
        let mut command = Command::new(client);
        command.args([
            "--addr",
            &self.lab.daemon_address(),
            "build",
            "--progress=plain",
            "--frontend=dockerfile.v0",
            "--proxy-network",
        ]);
        command.args([
            "--local",
            &format!("context={}", context.display()),
            "--local",
            &format!("dockerfile={}", context.display()),
        ]);
        command
            .args(["--output", &format!("type=image,name=docker.io/library/{name}:1,unpack=true")])
            .args(more);
        command
    }

    fn build(&self, name: &str, text: &str, more: &[&str]) -> Finished {
        run(&mut self.command(name, text, more))
    }

    fn provenance(&self, name: &str) -> Value {
        let index =
            blob(&self.lab, &Image::of(&self.lab, &format!("docker.io/library/{name}:1")).target);
        let said = index["manifests"]
            .as_array()
            .unwrap()
            .iter()
            .find(|m| m["platform"]["os"] == "unknown")
            .unwrap();
        let manifest = blob(&self.lab, said["digest"].as_str().unwrap());
        blob(&self.lab, manifest["layers"][0]["digest"].as_str().unwrap())["predicate"].clone()
    }
}

fn materials(predicate: &Value) -> Vec<(String, String)> {
    let all = predicate["buildDefinition"]["resolvedDependencies"].as_array().unwrap();
    let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
    all.iter()
        .map(|m| (text(&m["uri"]), text(&m["digest"]["sha256"])))
        .filter(|(uri, _)| uri.starts_with("http"))
        .collect()
}

const MAX: &[&str] = &["--opt", "attest:provenance=mode=max"];

fn web(mut lab: Lab) -> Web {
    lab.start_registry();
    web_image().push(&lab.registry(), "library/web", "latest");
    lab.start_daemon();
    let dir = lab.dir().join("as-buildctl");
    Web { lab, dir }
}

#[test]
fn steps_reach_the_outside_by_the_proxy_only_and_what_they_fetch_is_told() {
    on_each(|flavour| {
        let mut lab = Lab::on(flavour);
        let (plain, tls) = (Server::start(), TlsServer::start(lab.dir()));
        // The proxy believes whom the daemon's host believes.
        lab.daemon_environment("SSL_CERT_FILE", &tls.root.to_string_lossy());
        let web = web(lab);
        let (http, https, direct) = (plain.url("/file"), tls.url("/file"), plain.url("/direct"));
        let bundle = "/etc/ssl/certs/ca-certificates.crt";
        let text = format!(
            "FROM web\nRUN curl -fsS {http} > /http && curl -fsS {https} > /https && grep -q 'buildkit proxy CA begin' {bundle} && \
             test $HTTP_PROXY = $https_proxy\n\
             RUN unset HTTP_PROXY http_proxy && ! curl -sS -m 5 {direct} && test \"$(ls /sys/class/net)\" = lo\n\
             RUN --network=none test -z \"$HTTP_PROXY$https_proxy\" && ! grep -q buildkit {bundle}\n\
             RUN echo '# mine' >> {bundle}\n"
        );
        let built = web.build("fetched", &text, MAX).ok();
        assert!(built.all().contains("proxy network requests:"), "{}", built.all());
        assert!(built.all().contains(&format!("- GET {http} -> 200")), "{}", built.all());
        assert_eq!(plain.asked(), 1, "a step went around the proxy");
        let name = "docker.io/library/fetched:1";
        let image = Image::of(&web.lab, name);
        assert!(
            !image.config["config"].to_string().to_lowercase().contains("proxy"),
            "{}",
            image.config
        );
        // The first step's layer has its two files, the last one's the bundle as the step left it.
        let layers = image.layers();
        let of = |layer: &str, arguments: &[&str]| {
            let ctr = format!(
                "{} --address {} --namespace default",
                web.lab.ctr_path().display(),
                web.lab.containerd_socket().display()
            );
            let script =
                format!("{ctr} content get {layer} | gzip -dcf | tar {}", arguments.join(" "));
            run(Command::new("sh").args(["-c", &script]).env("PATH", web.lab.path())).ok().stdout
        };
        let first = &layers[layers.len() - 4];
        let names: Vec<String> = of(first, &["-t"])
            .lines()
            .map(|l| l.trim_end_matches('/').to_owned())
            .filter(|l| l != "." && !l.is_empty())
            .collect();
        assert_eq!(names, ["http", "https"], "{names:?}");
        assert_eq!(of(first, &["-xO", "https"]), "this came by TLS\n");
        for layer in &layers[layers.len() - 3..layers.len() - 1] {
            assert_eq!(
                of(layer, &["-t"]).lines().filter(|l| l.contains("etc")).count(),
                0,
                "a step that fetched nothing changed its trust"
            );
        }
        assert_eq!(of(&layers[layers.len() - 1], &["-xO", &bundle[1..]]), "# none\n# mine\n");

        let predicate = web.provenance("fetched");
        let digest = |text: &str| shipway_oci::Digest::of(text).hex();
        assert_eq!(
            materials(&predicate),
            [
                (http.clone(), digest("this is /file\n")),
                (https.clone(), digest("this came by TLS\n"))
            ]
        );
        let metadata = &predicate["runDetails"]["metadata"];
        assert_eq!(metadata["buildkit_metadata"]["network"]["mode"], "proxy", "{metadata}");
        assert_eq!(metadata["buildkit_hermetic"], Value::Null);

        // Without the proxy it is another step, which does not take the proxied one's result.
        let context = web.lab.context(
            "unproxied",
            &[("Dockerfile", &*format!("FROM web\nRUN curl -fsS {http} > /http\n"))],
        );
        web.build("again", &format!("FROM web\nRUN curl -fsS {http} > /http\n"), &[]).ok();
        let before = plain.asked();
        shipway_integration::build(&web.lab, "unproxied:1", &context, &[]).ok();
        assert_eq!(plain.asked(), before + 1);
        remove_everything(&web.lab);
        nothing_left(&web.lab);
        assert_eq!(
            std::fs::read_dir(web.lab.dir().join("shipwayd/executor/netns")).unwrap().count(),
            0
        );
    });
}

#[test]
fn the_source_policy_decides_on_what_steps_fetch() {
    let mut lab = Lab::on(any());
    lab.configure_daemon("[egress]\n  deny = [\"127.0.0.3\"]\n");
    let web = web(lab);
    let server = Server::start();
    // Nobody listens there, which the proxy does not even find out.
    let outside = "http://127.0.0.3:9/";
    let policy = web.lab.dir().join("policy.json");
    let rule = |action: &str, from: &str, to: &str| serde_json::json!({ "action": action, "selector": { "identifier": server.url(from) }, "updates": { "identifier": server.url(to) } });
    let rules = serde_json::json!({ "rules": [rule("DENY", "/denied", ""), rule("CONVERT", "/old", "/new")] });
    std::fs::write(&policy, rules.to_string()).unwrap();
    let flag = format!("--source-policy-file={}", policy.display());
    let text = format!(
        "FROM web\nRUN ! curl -fsS {} && ! curl -fsS {outside} && curl -fsS {} > /file\n",
        server.url("/denied"),
        server.url("/old")
    );
    let built = web.build("judged", &text, &[&[&*flag], MAX].concat()).ok();
    assert!(
        built.all().contains(&format!("- GET {} -> 403", server.url("/denied"))),
        "{}",
        built.all()
    );
    assert!(built.all().contains(&format!("- GET {outside} -> 403")), "{}", built.all());
    let predicate = web.provenance("judged");
    let digest = shipway_oci::Digest::of("this is /new\n").hex();
    assert_eq!(materials(&predicate), [(server.url("/new"), digest)]);
    assert_eq!(server.asked(), 1);

    // Complete materials are refused where something could not be recorded, and the refusal names
    // it.
    let text = format!("FROM web\nRUN curl -sS {} || true\n", server.url("/missing"));
    let strict = ["--opt", "attest:provenance=mode=max,complete-materials=true"];
    let refused = web.build("strict", &text, &strict).failed().all();
    assert!(
        refused.contains("provenance materials are incomplete")
            && refused.contains(&server.url("/missing")),
        "{refused}"
    );
    assert!(refused.contains("unsuccessful_response"), "{refused}");
    // What a cached step once fetched is not known any more, and nothing else is said.
    let text = format!("FROM web\nRUN curl -fsS {} > /kept\n", server.url("/kept"));
    web.build("cached", &text, MAX).ok();
    assert_eq!(materials(&web.provenance("cached")).len(), 1);
    web.build("cached", &text, MAX).ok();
    let predicate = web.provenance("cached");
    assert_eq!(materials(&predicate), []);
    let told =
        &predicate["runDetails"]["metadata"]["buildkit_metadata"]["network"]["proxy"]["incomplete"];
    assert_eq!(told[0]["reason"], "cached_result", "{predicate}");
}

#[test]
fn a_daemon_that_is_killed_while_a_step_fetches_leaves_nothing() {
    let mut web = web(Lab::on(any()));
    let server = Server::start();
    let text = format!("FROM web\nRUN curl -fsS {} > /file\n", server.url("/hang"));
    let mut building =
        web.command("hang", &text, &[]).stderr(std::process::Stdio::null()).spawn().unwrap();
    wait_for("the step to ask", Duration::from_secs(120), || {
        if server.asked() > 0 { Ok(()) } else { Err("not yet".into()) }
    });
    web.lab.kill_daemon();
    assert!(!building.wait().unwrap().success());
    web.lab.start_daemon();
    let text = format!("FROM web\nRUN curl -fsS {} > /file\n", server.url("/file"));
    web.build("after", &text, &[]).ok();
    remove_everything(&web.lab);
    nothing_left(&web.lab);
    assert_eq!(
        std::fs::read_dir(web.lab.dir().join("shipwayd/executor/netns")).unwrap().count(),
        0
    );
}
