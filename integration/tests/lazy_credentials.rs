//! Lazy layers of registries that want a login: what kubelet's pulls bring, what builders give, and
//! what becomes of them.

#![allow(clippy::unwrap_used)]

use parking_lot::Mutex;
use serde_json::{Value, json};
use shipway_containerd::Containerd;
use shipway_estargz::Output;
use shipway_fault::Code;
use shipway_integration::{
    any,
    cri::{Cri, wire},
    lazy::lazy_layer,
    on_all,
};
use shipway_storage::{Labels, LeaseId, SnapshotKey};
use shipway_testkit::{
    BaseImage, FaultyRegistry, Flavour, Lab, LabOptions, Layer, RegistryFault, run, wait_for,
};
use std::{
    io::{BufRead as _, BufReader, Write as _},
    os::unix::net::UnixStream,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

/// `me:s3cret`, and the password of later.
const FIRST: &str = "Basic bWU6czNjcmV0";
const LATER: &str = "Basic bWU6bjN3czNjcmV0";

/// The parts of `PullImage` with credentials.
#[derive(Clone, PartialEq, prost::Message)]
struct PrivatePull {
    #[prost(message, optional, tag = "1")]
    image: Option<wire::Id>,
    #[prost(message, optional, tag = "2")]
    auth: Option<Auth>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Auth {
    #[prost(string, tag = "1")]
    username: String,
    #[prost(string, tag = "2")]
    password: String,
}

fn lab(flavour: Flavour) -> Lab {
    let mut options = LabOptions::new(flavour);
    options.snapshotter = true;
    options.namespace = "k8s.io".into();
    options.sandbox = Some("docker.io/library/sandbox:1".into());
    options.lazy_config = "background = false\ndeadline = 3\n".into();
    let mut lab = Lab::start(options);
    lab.start_registry();
    lab
}

/// busybox and a layer of files in directories of their own, both with tables of contents.
fn image(registry: &str) -> BaseImage {
    let mut image = BaseImage::busybox();
    let dir = tempfile::tempdir().unwrap();
    for name in ["a/first", "m/middle", "z/second"] {
        let file = dir.path().join(name);
        std::fs::create_dir_all(file.parent().unwrap()).unwrap();
        // What is beside a file comes with it, so there is much between.
        std::fs::write(file.with_file_name("much"), vec![b'x'; 4 << 20]).unwrap();
        std::fs::write(file, name.repeat(100)).unwrap();
    }
    image.layers.push(Layer::of_dir(dir.path()));
    image.layers = image.layers.iter().map(|l| lazy_layer(l, Output::Estargz)).collect();
    image.push(registry, "team/lazy", "1");
    image
}

fn private(lab: &Lab) -> (FaultyRegistry, Arc<Mutex<String>>) {
    let login = Arc::new(Mutex::new(FIRST.to_owned()));
    let fault = RegistryFault::Login(login.clone());
    (FaultyRegistry::start(&lab.registry(), "/v2/", fault), login)
}

/// Gives credentials as a builder does.
fn give(lab: &Lab, repository: &str, secret: &str) -> Value {
    let request = json!({"credentials": {
        "repository": repository, "username": "me", "secret": secret, "seconds": 600,
    }});
    let mut socket = UnixStream::connect(lab.dir().join("snapshotter-control.sock")).unwrap();
    writeln!(socket, "{request}").unwrap();
    let mut answer = String::new();
    BufReader::new(socket).read_line(&mut answer).unwrap();
    serde_json::from_str(&answer).unwrap()
}

fn status(lab: &Lab) -> Value {
    let done = run(lab.snapshotter_command().args(["status", "--json"])).ok();
    serde_json::from_str(&done.stdout).unwrap()
}

/// Whose credentials are known.
fn givers(lab: &Lab) -> Vec<String> {
    let status = status(lab);
    let known = status["credentials"].as_array().unwrap();
    known.iter().map(|known| known["giver"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn kubelets_pulls_bring_their_credentials() {
    on_all(|flavour| {
        let mut lab = lab(flavour);
        image(&lab.registry());
        let (registry, login) = private(&lab);
        let repository = format!("{}/team/lazy", registry.address());
        let image = format!("{repository}:1");
        let socket = lab.dir().join("snapshotter-cri.sock");
        let cri = Cri::at(&socket);
        let pull = |version: &str, password: &str| {
            let auth = Auth { username: "me".into(), password: password.into() };
            let image = Some(wire::Id { id: image.clone() });
            let request = PrivatePull { image, auth: Some(auth) };
            cri.try_call_of::<wire::Id>(version, "PullImage", request)
        };
        // What containerd says is what kubelet hears.
        let refused = pull("runtime.v1", "wr0ng").unwrap_err();
        assert!(refused.message().contains("401"), "{refused}");
        assert_eq!(givers(&lab), [""; 0], "what opens nothing is not kept");
        let pulled = match flavour {
            Flavour::Newer => {
                let refused = pull("runtime.v1alpha2", "s3cret").unwrap_err();
                assert_eq!(refused.code(), tonic::Code::Unimplemented, "{refused}");
                pull("runtime.v1", "s3cret")
            }
            Flavour::System | Flavour::Between => pull("runtime.v1alpha2", "s3cret"),
        };
        pulled.unwrap();
        assert_eq!(givers(&lab), ["kubelet"]);
        let images: wire::Images = cri.call("ListImages", wire::Nothing {});
        assert!(images.images.iter().any(|i| i.tags.contains(&image)), "{images:?}");
        let blobs = lab.ctr(["content", "list", "--quiet"]).ok().lines().count();
        assert_eq!(blobs, 3, "index, manifest and config, but no layer");

        // The pull is over, and what is read is fetched with what it brought.
        let read = |lab: &Lab, id: &str, file: &str| {
            static NEXT: AtomicU32 = AtomicU32::new(0);
            let next = NEXT.fetch_add(1, Ordering::Relaxed);
            let id = format!("private-{id}-{}-{next}", std::process::id());
            let words = ["run", "--rm", "--snapshotter", "shipway", &image, &id, "cat", file];
            lab.ctr(words)
        };
        assert_eq!(read(&lab, "first", "/a/first").ok().stdout, "a/first".repeat(100));
        // kubelet does not pull again when the snapshotter is back, nor when the keeper is.
        assert!(lab.kill_keeper());
        lab.kill_snapshotter();
        lab.start_snapshotter();
        assert_eq!(givers(&lab), ["kubelet"]);
        wait_for("containerd to reach the snapshotter", Duration::from_secs(30), || {
            let said = read(&lab, "again", "/m/middle");
            if said.stdout == "m/middle".repeat(100) { Ok(()) } else { Err(said.all()) }
        });
        *login.lock() = LATER.into();
        let failed = read(&lab, "refused", "/z/second").failed();
        assert_eq!(failed.stdout, "", "what cannot be fetched is an error, and nothing else");
        assert_eq!(give(&lab, &repository, "n3ws3cret"), json!({"ok": true}));
        assert_eq!(givers(&lab), ["build", "kubelet"]);
        assert_eq!(read(&lab, "second", "/z/second").ok().stdout, "z/second".repeat(100));

        // Nobody's log has a secret.
        let log = std::fs::read_to_string(lab.dir().join("shipway-snapshotter.log")).unwrap();
        assert!(log.contains("a pull brought credentials"), "{log}");
        for secret in ["wr0ng", "s3cret", &FIRST[6..], &LATER[6..]] {
            assert!(!log.contains(secret), "the log has {secret}");
            assert!(!status(&lab).to_string().contains(secret), "the status has {secret}");
        }
    });
}

#[test]
fn builders_give_credentials_before_they_ask_for_layers() {
    let lab = lab(any());
    let layer = image(&lab.registry()).layers.swap_remove(0);
    let (registry, _) = private(&lab);
    let repository = format!("{}/team/lazy", registry.address());
    let digest = shipway_oci::Digest::of(&layer.blob);
    let mut labels: Labels = layer
        .annotations
        .iter()
        .filter(|(key, _)| key.starts_with("containerd.io/snapshot/"))
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect();
    labels.extend(
        [
            ("containerd.io/snapshot.ref", layer.diff_id.clone()),
            ("containerd.io/snapshot/cri.image-ref", format!("{repository}:1")),
            ("containerd.io/snapshot/cri.layer-digest", digest.to_string()),
        ]
        .map(|(key, value)| (key.to_owned(), value)),
    );
    let prepare = |key: &str| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let lease = LeaseId(format!("for-{key}"));
            let containerd = Containerd::connect(lab.containerd_socket()).await.unwrap();
            containerd.ensure_namespace("build").await.unwrap();
            let storage = containerd.storage("build", "shipway").unwrap();
            storage.leases.create(&lease, &Labels::new()).await.unwrap();
            storage.snapshots.prepare(&lease, &SnapshotKey(key.into()), None, &labels).await
        })
    };
    prepare("without").expect("a layer that cannot be fetched is unpacked the ordinary way");
    // It is for another repository, and changes nothing.
    give(&lab, &format!("{}/team/other", registry.address()), "s3cret");
    prepare("other").expect("credentials are for their repository alone");
    give(&lab, &repository, "s3cret");
    let answer = prepare("with").unwrap_err();
    assert_eq!(answer.code(), Code::AlreadyExists, "{answer}");
    let refused = give(&lab, "r.example/UPPER", "s3cret");
    assert_eq!(refused["code"], "InvalidArgument", "{refused}");
}
