//! Blobs from other nodes, by way of mirrors in `hosts.toml`: a node without a way to the registry
//! pulls what another one has, eagerly and lazily.

#![allow(clippy::unwrap_used)]

use parking_lot::Mutex;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use serde_json::Value;
use shipway_estargz::Output;
use shipway_integration::{
    any, ctr_run,
    lazy::{noise, push_noise},
};
use shipway_oci::Digest;
use shipway_testkit::{Lab, LabOptions, run, wait_for, which};
use std::{
    collections::HashMap,
    fs::File,
    io::{BufRead as _, BufReader, Write as _},
    net::{TcpListener, TcpStream},
    os::fd::AsFd as _,
    process::Command,
    sync::Arc,
    time::Duration,
};

/// Files of the image's large layer, and bytes of each.
const FILES: usize = 16;
const SIZE: usize = 512 << 10;

/// What a node's containerd has: contents by digest, and digests by name and tag.
#[derive(Default)]
struct Contents {
    blobs: HashMap<String, Vec<u8>>,
    tags: HashMap<String, String>,
}

impl Contents {
    /// Everything in the lab's store, with the image `repository:tag`.
    #[track_caller]
    fn of(lab: &Lab, image: &str, tag: &str) -> Self {
        let list = lab.ctr(["content", "list", "--quiet"]).ok().stdout;
        let blob = |digest: &str| {
            let mut get = lab.ctr_command_in(lab.namespace());
            let command = get.args(["content", "get", digest]).output().unwrap();
            assert!(command.status.success(), "{digest}");
            (digest.to_owned(), command.stdout)
        };
        let blobs = list.lines().map(blob).collect();
        let target = shipway_integration::Image::of(lab, image).target;
        Self { blobs, tags: [(tag.to_owned(), target)].into() }
    }
}

/// A node's mirror: it has what its node has, says 404 of all else, and serves requests for one
/// registry, which they name with `ns`.
struct Mirror {
    address: String,
    asked: Arc<Mutex<Vec<String>>>,
}

impl Mirror {
    /// Listens at `host`, in the network of the thread that calls it, for as long as the test runs.
    #[track_caller]
    fn start(host: &str, registry: &str, contents: Contents) -> Self {
        let listener = TcpListener::bind((host, 0)).unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let asked: Arc<Mutex<Vec<String>>> = Arc::default();
        let (log, contents, ns) =
            (asked.clone(), Arc::new(contents), format!("ns={}", registry.replace(':', "%3A")));
        let plain = format!("ns={registry}");
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (log, contents) = (log.clone(), contents.clone());
                let (ns, plain) = (ns.clone(), plain.clone());
                // Clients hang up when they like.
                std::thread::spawn(move || drop(serve(&stream, &contents, &[ns, plain], &log)));
            }
        });
        Self { address, asked }
    }

    fn asked(&self) -> Vec<String> {
        self.asked.lock().clone()
    }
}

/// One request: what it asked for, whether for a part, and what was answered, go to `log`.
fn serve(
    stream: &TcpStream,
    contents: &Contents,
    ns: &[String],
    log: &Mutex<Vec<String>>,
) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream).lines();
    let request = lines.next().transpose()?.unwrap_or_default();
    let mut range = None;
    while let Some(line) = lines.next().transpose()?.filter(|line| !line.is_empty()) {
        if let Some((name, value)) = line.split_once(": ")
            && name.eq_ignore_ascii_case("range")
        {
            range = value.strip_prefix("bytes=").map(str::to_owned);
        }
    }
    let mut words = request.split(' ');
    let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let last = path.rsplit('/').next().unwrap_or_default();
    let digest = contents.tags.get(last).map_or(last, String::as_str);
    let named = query.split('&').any(|part| ns.iter().any(|ns| ns == part));
    let found = contents.blobs.get(digest).filter(|_| named && path.starts_with("/v2/"));
    let (status, head, body) = match found {
        _ if path == "/v2/" => ("200 OK", String::new(), &[][..]),
        None if !named => ("400 Bad Request", String::new(), &[][..]),
        None => ("404 Not Found", String::new(), &[][..]),
        Some(blob) => {
            let json: Value = serde_json::from_slice(blob).unwrap_or_default();
            let kind = match path.contains("/manifests/") {
                true => json["mediaType"].as_str().unwrap_or_default().to_owned(),
                false => "application/octet-stream".to_owned(),
            };
            let head = format!("Content-Type: {kind}\r\nDocker-Content-Digest: {digest}\r\n");
            match range.as_deref().and_then(|range| part(range, blob.len())) {
                None => ("200 OK", head, &blob[..]),
                Some((from, to)) => (
                    "206 Partial Content",
                    format!("{head}Content-Range: bytes {from}-{}/{}\r\n", to - 1, blob.len()),
                    &blob[from..to],
                ),
            }
        }
    };
    let part = if range.is_some() { " part" } else { "" };
    log.lock().push(format!("{method} {path} {}{part}", &status[..3]));
    let mut writer = stream;
    write!(
        writer,
        "HTTP/1.1 {status}\r\nConnection: close\r\nAccept-Ranges: bytes\r\nContent-Length: {}\r\n{head}\r\n",
        body.len()
    )?;
    if method != "HEAD" {
        writer.write_all(body)?;
    }
    Ok(())
}

/// Which bytes of `len` a range is about: `a-b`, `a-` or `-n`.
fn part(range: &str, len: usize) -> Option<(usize, usize)> {
    let (from, to) = range.split_once('-')?;
    Some(match (from.parse::<usize>(), to.parse::<usize>()) {
        (Ok(from), Ok(to)) if from < len => (from, len.min(to + 1)),
        (Ok(from), Err(_)) if from < len => (from, len),
        (Err(_), Ok(last)) => (len.saturating_sub(last), len),
        _ => return None,
    })
}

/// A network namespace with nothing but loopback and a link to the host.
struct Apart {
    name: String,
    link: String,
    /// Address of the host's end, and of this one's.
    host: String,
}

impl Apart {
    fn new() -> Self {
        let id = std::process::id();
        let (name, link) = (format!("shipway-peer-{id}"), format!("shp{}", id % 1_000_000));
        let net = format!("10.213.{}", id % 250);
        let apart = Self { name, link, host: format!("{net}.1") };
        let (name, link) = (&*apart.name, &*apart.link);
        for command in [
            format!("ip netns add {name}"),
            format!("ip link add {link} type veth peer name eth0 netns {name}"),
            format!("ip addr add {net}.1/30 dev {link}"),
            format!("ip link set {link} up"),
            format!("ip -n {name} addr add {net}.2/30 dev eth0"),
            format!("ip -n {name} link set eth0 up"),
            format!("ip -n {name} link set lo up"),
        ] {
            let words: Vec<&str> = command.split(' ').collect();
            run(Command::new(words[0]).args(&words[1..])).ok();
        }
        apart
    }

    /// Runs `node` in there, with everything that it starts.
    fn within<T: Send>(&self, node: impl FnOnce() -> T + Send) -> T {
        let namespace = File::open(format!("/run/netns/{}", self.name)).unwrap();
        std::thread::scope(|scope| {
            let thread = scope.spawn(move || {
                let kind = Some(LinkNameSpaceType::Network);
                move_into_link_name_space(namespace.as_fd(), kind).unwrap();
                node()
            });
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }
}

impl Drop for Apart {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["link", "delete", &self.link]).status();
        let _ = Command::new("ip").args(["netns", "delete", &self.name]).status();
    }
}

#[test]
fn a_node_without_a_way_to_the_registry_pulls_from_another_ones_mirror() {
    let mut first = Lab::on(any());
    first.start_registry();
    let registry = first.registry();
    push_noise(&registry, FILES, SIZE, Output::Estargz);
    let image = format!("{registry}/lazy:1");
    first.ctr(["images", "pull", "--plain-http", &image]).ok();
    let apart = Apart::new();
    let mirror = Mirror::start(&apart.host, &registry, Contents::of(&first, &image, "1"));
    let remote = which("ctr-remote").expect("ctr-remote is absent; `cargo xtask test` fetches it");

    apart.within(|| {
        assert!(TcpStream::connect(&registry).is_err(), "there is a way to the registry");
        let second = Lab::start(LabOptions {
            snapshotter: true,
            namespace: "k8s.io".into(),
            lazy_config: "background = false\n".into(),
            ..LabOptions::new(any())
        });
        // The mirror on the node itself, which has nothing, and the one on the other node.
        let own = Mirror::start("127.0.0.1", &registry, Contents::default());
        let hosts = second.dir().join("certs.d");
        let dir = hosts.join(&registry);
        std::fs::create_dir_all(&dir).unwrap();
        let mut toml = format!("server = \"http://{registry}\"\n");
        for address in [&own.address, &mirror.address] {
            toml +=
                &format!("[host.\"http://{address}\"]\n  capabilities = [\"pull\", \"resolve\"]\n");
        }
        std::fs::write(dir.join("hosts.toml"), toml).unwrap();
        let hosts = hosts.to_string_lossy().into_owned();

        // Lazily: the pull and what is read after it.
        let mut pull = Command::new(remote);
        pull.env("PATH", second.path()).arg("--address").arg(second.containerd_socket());
        pull.args(["--namespace", "k8s.io", "images", "rpull", "--hosts-dir", &hosts]);
        run(pull.args(["--snapshotter", "shipway", &image])).ok();
        let id = format!("peers-{}", std::process::id());
        let read = ["sh", "-c", "sha256sum /data/5 /data/11"];
        let words = ["run", "--rm", "--snapshotter", "shipway", &image, &id];
        let said = second.ctr(words.into_iter().chain(read)).ok().stdout;
        let line = |n| format!("{}  /data/{n}\n", Digest::of(noise(n, SIZE)).hex());
        assert_eq!(said, line(5) + &line(11));
        let asked = mirror.asked();
        let whole = |line: &&String| {
            line.starts_with("GET") && line.contains("/blobs/") && line.ends_with(" 200")
        };
        let parts = asked.iter().filter(|line| line.ends_with(" 206 part")).count();
        assert!(parts >= 2 * 2, "tables of contents and files: {asked:#?}");
        assert!(asked.iter().filter(whole).count() <= 1, "no layer as a whole: {asked:#?}");
        assert!(own.asked().iter().any(|line| line.ends_with(" 404")), "{:#?}", own.asked());
        for line in asked.iter().chain(&own.asked()) {
            assert!(!line.contains(" 400"), "a request without its registry: {line}");
        }

        // Eagerly, in another namespace of the same node.
        let before = mirror.asked().len();
        second.ctr_in("other", ["images", "pull", "--hosts-dir", &hosts, &image]).ok();
        wait_for("the blobs to be fetched", Duration::from_secs(10), || {
            match mirror.asked()[before..].iter().filter(whole).count() {
                0 => Err(format!("{:#?}", mirror.asked())),
                _ => Ok(()),
            }
        });
        let id = format!("peers-eager-{}", std::process::id());
        let words = ["run", "--rm", &image, &id];
        let said = second.ctr_in("other", words.into_iter().chain(read)).ok().stdout;
        assert_eq!(said, line(5) + &line(11));
    });
    assert!(ctr_run(&first, &image, &["true"]).ok().stdout.is_empty());
}
