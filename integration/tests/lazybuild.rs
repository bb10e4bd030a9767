//! Builds on bases that are not there: read while they are fetched, exported without having been.

#![allow(clippy::unwrap_used)]

use serde_json::Value;
use shipway_estargz::{Output, TOC_DIGEST};
use shipway_integration::{
    Image, any, collect_garbage, ctr_run,
    lazy::{layer_of, lazy_layer, lying_layer, noise, push_noise},
    nothing_left, on_each, remove_everything,
};
use shipway_testkit::{
    BaseImage, FaultyRegistry, Finished, Flavour, Lab, LabOptions, Network, RegistryFault,
    SlowNetwork, run, wait_for,
};
use std::{
    io::{BufRead as _, BufReader, Write as _},
    os::unix::net::UnixListener,
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

/// Files of the large layer, and bytes of each.
const FILES: usize = 48;
const SIZE: usize = 1 << 20;
const MIB: u64 = 1 << 20;
const FAST: Network = Network { latency: Duration::from_millis(2), bandwidth: 60 << 20 };
/// What a build may fetch before its first step: documents, tables of contents, a shell.
const BEFORE_THE_FIRST_STEP: u64 = 3 * MIB;
/// What reading one file may fetch besides: its neighbors.
const ONE_FILE: u64 = 8 * MIB;

fn sum(n: usize) -> String {
    shipway_oci::Digest::of(noise(n, SIZE)).hex()
}

/// busybox, and a layer of [`FILES`] files, both with tables of contents.
fn push_base(registry: &str) {
    push_noise(registry, FILES, SIZE, Output::Estargz);
}

/// A lab whose registry has the base, and is far away.
struct Far {
    lab: Lab,
    slow: SlowNetwork,
}

impl Far {
    fn new(flavour: Flavour, snapshotter: &str, config: &str) -> Self {
        let mut options = LabOptions::new(flavour);
        options.snapshotter = snapshotter == "shipway";
        options.lazy_config = "background = false\n".into();
        options.worker_config = format!("snapshotter = \"{snapshotter}\"\n");
        let mut lab = Lab::start(options);
        lab.start_registry();
        push_base(&lab.registry());
        let slow = SlowNetwork::start(&lab.registry(), FAST);
        let config = config.replace("DIR", &lab.dir().to_string_lossy());
        lab.configure_daemon(&format!(
            "[registry.\"{}\"]\n  http = true\n{config}",
            slow.address()
        ));
        lab.start_daemon();
        Self { lab, slow }
    }

    /// Builds `text`, in which `BASE` is the base, with the output `output`.
    #[track_caller]
    fn build(&self, name: &str, text: &str, output: &str) -> Finished {
        let text = text.replace("BASE", &format!("{}/lazy:1", self.slow.address()));
        let context = self.lab.context(name, &[("Dockerfile", &text)]);
        let context = context.to_string_lossy();
        self.lab.shipway(["build", "--progress", "plain", "--output", output, &context])
    }

    /// Bytes that came from the registry during `work`.
    fn fetched<T>(&self, work: impl FnOnce() -> T) -> (u64, T) {
        let before = self.slow.bytes();
        let done = work();
        let fetched = self.slow.bytes() - before;
        eprintln!("{fetched} bytes were fetched");
        (fetched, done)
    }

    /// Digests of the base's layers, as the registry's manifest has them.
    fn base(&self) -> Vec<Value> {
        self.layers_at("lazy", "1")
    }

    /// The layers of an image at the registry.
    fn layers_at(&self, repository: &str, reference: &str) -> Vec<Value> {
        let get = |reference: &str| -> Value {
            let path = format!("/v2/{repository}/manifests/{reference}");
            let (status, body) = self.lab.registry_get(&path);
            assert_eq!(status, 200, "{path}");
            serde_json::from_slice(&body).unwrap()
        };
        let mut found = get(reference);
        if let Some(entries) = found["manifests"].as_array() {
            found = get(entries[0]["digest"].as_str().unwrap());
        }
        found["layers"].as_array().unwrap().clone()
    }

    /// How many of the base's blobs containerd has.
    fn blobs(&self) -> usize {
        let list = self.lab.ctr(["content", "list", "--quiet"]).ok().stdout;
        self.base().iter().filter(|l| list.contains(l["digest"].as_str().unwrap())).count()
    }

    /// Ends everything, and looks whether something is left.
    fn end(mut self) {
        remove_everything(&self.lab);
        self.lab.stop_daemon();
        collect_garbage(&self.lab);
        wait_for("the layers to be unmounted", Duration::from_secs(60), || {
            match self.lab.leftovers().mounts {
                left if left.is_empty() => Ok(()),
                left => Err(format!("{left:?}")),
            }
        });
        nothing_left(&self.lab);
    }
}

const APP: &str = "docker.io/library/app:1";

#[test]
fn steps_run_on_a_base_that_is_not_there() {
    on_each(|flavour| {
        let far = Far::new(flavour, "shipway", "");
        let (fetched, _) =
            far.fetched(|| far.build("first", "FROM BASE\nRUN true\n", "type=cacheonly").ok());
        assert!(fetched < BEFORE_THE_FIRST_STEP, "{fetched}");
        assert_eq!(far.blobs(), 0);

        let text = "FROM BASE\nRUN sha256sum /data/7 > /sum\n";
        let image = format!("type=image,name={APP}");
        let (fetched, _) = far.fetched(|| far.build("one", text, &image).ok());
        assert!(fetched < ONE_FILE, "{fetched} bytes were fetched for one file");
        let said = says(&far.lab, "default", &["cat", "/sum"]);
        assert_eq!(said, format!("{}  /data/7\n", sum(7)));

        let (fetched, again) = far.fetched(|| far.build("one", text, &image).ok());
        assert!(again.all().contains("CACHED"), "{}", again.all());
        assert!(fetched < MIB / 4, "{fetched} bytes were fetched for a cached build");
        assert_eq!(far.blobs(), 0);

        // What is built on that image has the same layers below, which are nowhere under the
        // image's name; and no record of the first build says where they are.
        far.lab.shipway(["prune", "--all"]).ok();
        let text = format!("FROM {APP}\nRUN cat /sum > /again\n");
        let output = format!("type=image,name={}/child:1,push=true", far.slow.address());
        let (fetched, _) = far.fetched(|| far.build("child", &text, &output).ok());
        assert!(fetched < ONE_FILE, "{fetched} bytes were fetched for an image on an image");
        let pushed = far.layers_at("child", "1");
        assert_eq!((pushed.len(), &pushed[..2]), (4, &far.base()[..]));
        assert_eq!(far.blobs(), 0);
        far.end();
    });
}

/// What a container of the image in `namespace` says, on our snapshotter. `ctr` sometimes hears
/// nothing of a process that ends at once, and is asked again then.
#[track_caller]
fn says(lab: &Lab, namespace: &str, command: &[&str]) -> String {
    // The runtime's names are those of all labs.
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let ask = || {
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let id = format!("lazybuild-{}-{n}", std::process::id());
        let words = ["run", "--rm", "--snapshotter", "shipway", APP, &id];
        lab.ctr_in(namespace, words.into_iter().chain(command.iter().copied())).ok().stdout
    };
    let first = ask();
    if first.is_empty() { ask() } else { first }
}

#[test]
fn on_an_ordinary_snapshotter_everything_is_as_it_was() {
    let far = Far::new(any(), "overlayfs", "");
    let image = format!("type=image,name={APP}");
    let (fetched, _) = far.fetched(|| far.build("first", "FROM BASE\nRUN true\n", &image).ok());
    assert!(fetched > FILES as u64 * SIZE as u64, "{fetched}");
    assert_eq!(far.blobs(), 2);
    let layers = Image::of(&far.lab, APP).manifest["layers"].clone();
    assert_eq!(layers[1]["annotations"][TOC_DIGEST], far.base()[1]["annotations"][TOC_DIGEST]);
    assert_eq!(ctr_run(&far.lab, APP, &["head", "-c", "0", "/data/1"]).ok().stdout, "");
    far.end();
}

#[test]
fn one_file_of_an_image_is_copied_without_the_rest() {
    let far = Far::new(any(), "shipway", "");
    let text = "FROM scratch\nCOPY --from=BASE /data/9 /nine\n";
    let dest = far.lab.dir().join("out");
    let output = format!("type=local,dest={}", dest.display());
    let (fetched, _) = far.fetched(|| far.build("copy", text, &output).ok());
    assert!(fetched < ONE_FILE, "{fetched} bytes were fetched for one file");
    assert_eq!(std::fs::read(dest.join("nine")).unwrap(), noise(9, SIZE));
    assert_eq!(far.blobs(), 0);
    // A build that needs no file of it has none.
    let image = format!("type=image,name={APP}");
    let (fetched, _) = far.fetched(|| far.build("label", "FROM BASE\nLABEL a=b\n", &image).ok());
    assert!(fetched < MIB / 4, "{fetched} bytes were fetched for a label");
    assert_eq!(far.blobs(), 0);
    far.end();
}

/// Pushes busybox with another layer of these files, lazy both, as `repository:1`.
fn push_files(far: &Far, repository: &str, files: &[(String, Vec<u8>)]) {
    let mut image = BaseImage::busybox();
    image.layers.push(layer_of(files));
    image.layers = image.layers.iter().map(|layer| lazy_layer(layer, Output::Estargz)).collect();
    image.push(&far.lab.registry(), repository, "1");
}

/// The daemon finds the lab's snapshotter, which is in `DIR`.
const CONTROL: &str = "[lazy]\n  snapshotterControl = \"DIR/snapshotter-control.sock\"\n";
/// Bytes of a file with several chunks.
const LARGE: usize = 30 << 20;

/// What a table of contents says of files is enough to find what was built of the same files,
/// wherever they came from; files that a step has changed are others.
#[test]
fn files_that_are_not_there_have_checksums() {
    let far = Far::new(any(), "shipway", CONTROL);
    let large = ("data/large".to_owned(), noise(1, LARGE));
    let small = |text: &str| ("data/small".to_owned(), text.as_bytes().to_vec());
    push_files(&far, "one", &[large.clone(), small("a")]);
    push_files(&far, "two", &[large.clone(), small("a"), ("more".into(), b"more".to_vec())]);
    let dest = far.lab.dir().join("out");
    let output = format!("type=local,dest={}", dest.display());
    let copy = |name: &str, from: &str| {
        let from = from.replace("HOST", &far.slow.address());
        let text = format!("FROM scratch\nCOPY {from} /data/large /data/small /\n");
        far.fetched(|| far.build(name, &text, &output).ok().all())
    };

    // From a client, who sends all of it.
    let context = far.lab.context("client", &[]);
    std::fs::create_dir_all(context.join("data")).unwrap();
    for (path, bytes) in [&large, &small("a")] {
        std::fs::write(context.join(path), bytes).unwrap();
    }
    let (_, said) = copy("client", "");
    assert!(!said.contains("CACHED"), "{said}");
    for (name, from) in [("one", "--from=HOST/one:1"), ("two", "--from=HOST/two:1")] {
        let (fetched, said) = copy(name, from);
        assert!(said.contains("CACHED"), "{said}");
        assert!(fetched < BEFORE_THE_FIRST_STEP, "{fetched} bytes were fetched for a checksum");
        assert_eq!(std::fs::read(dest.join("small")).unwrap(), b"a");
    }
    assert!(std::fs::read(dest.join("large")).unwrap() == large.1, "another file");

    // The same path, size and times as below.
    let build = |copies: &str| {
        let text = format!(
            "FROM {}/one:1 AS changed\n\
             RUN cp -p /data/small /old && printf b > /data/small && touch -r /old /data/small\n\
             FROM scratch\n{copies}",
            far.slow.address()
        );
        far.fetched(|| far.build("changed", &text, &output).ok().all())
    };
    let (fetched, _) = build("COPY --from=changed /data/small /\n");
    assert_eq!(std::fs::read(dest.join("small")).unwrap(), b"b");
    assert!(fetched < BEFORE_THE_FIRST_STEP, "{fetched}");
    // What the step has not changed is known still.
    let (fetched, said) = build("COPY --from=changed /data/large /data/small /\n");
    assert!(fetched > LARGE as u64, "{fetched} bytes for what was never built: {said}");
    let text = "FROM scratch\nCOPY --from=HOST/two:1 /data/large /alone\n";
    let text = text.replace("HOST", &far.slow.address());
    far.build("alone", &text, &output).ok();
    let (fetched, said) = build("COPY --from=changed /data/large /alone\n");
    assert!(said.matches("CACHED").count() > 1, "{said}");
    assert!(fetched < MIB / 4, "{fetched} bytes were fetched for a checksum");
    far.end();
}

/// A table of contents that says that a file has other contents than it has: what was built of the
/// real ones is found, and nothing is built, let alone kept, of the others.
#[test]
fn a_lying_table_leads_to_no_wrong_result() {
    const SIZE: usize = 5 << 20;
    let far = Far::new(any(), "shipway", CONTROL);
    let file = |n: usize| ("data/f".to_owned(), noise(n, SIZE));
    let digests = |n: usize| {
        let (_, bytes) = file(n);
        let whole = [shipway_oci::Digest::of(&bytes)];
        let pieces = bytes.chunks(4 << 20).map(shipway_oci::Digest::of);
        whole.into_iter().chain(pieces).map(|d| d.to_string()).collect::<Vec<_>>()
    };
    push_files(&far, "honest", &[file(1)]);
    let mut image = BaseImage::busybox();
    let says: Vec<_> = digests(2).into_iter().zip(digests(1)).collect();
    image.layers = vec![lying_layer(lazy_layer(&layer_of(&[file(2)]), Output::Estargz), &says)];
    image.push(&far.lab.registry(), "lying", "1");
    let dest = far.lab.dir().join("out");
    let output = format!("type=local,dest={}", dest.display());
    let copy = |of: &str| {
        let text = format!("FROM scratch\nCOPY --from={}/{of}:1 /data/f /\n", far.slow.address());
        far.build(of, &text, &output)
    };
    let result = || std::fs::read(dest.join("f")).unwrap();
    let failed = copy("lying").failed().all();
    assert!(failed.contains("/data/f") || failed.contains("/f"), "{failed}");
    let said = copy("honest").ok().all();
    assert!(!said.contains("CACHED"), "{said}");
    assert!(result() == file(1).1, "the file of the other image");
    // What the table says is what there is of it.
    let said = copy("lying").ok().all();
    assert!(said.contains("CACHED"), "{said}");
    assert!(result() == file(1).1, "the file of the other image");
    far.end();
}

#[test]
fn what_was_not_fetched_is_exported() {
    let mut far = Far::new(any(), "shipway", "");
    let text = "FROM BASE\nRUN echo made > /made\n";
    let base = far.base();
    let toc = |layers: &[Value]| layers.iter().map(annotation).collect::<Vec<_>>();

    // To another repository of the registry, and its cache.
    let host = far.slow.address();
    let output = format!("type=image,name={host}/team/app:1,push=true");
    let (fetched, _) = far.fetched(|| far.build("push", text, &output).ok());
    assert!(fetched < BEFORE_THE_FIRST_STEP, "{fetched} bytes were fetched for a push");
    let pushed = far.layers_at("team/app", "1");
    assert_eq!((pushed.len(), &pushed[..2]), (3, &base[..]), "descriptors with annotations");
    let log = std::fs::read_to_string(far.lab.dir().join("registry.log")).unwrap();
    let mounted = |digest: &str| {
        let of =
            |l: &&str| l.contains("POST /v2/team/app/blobs/uploads/?mount=") && l.contains(digest);
        log.lines().any(|l| of(&l) && l.contains("201"))
    };
    assert!(base.iter().all(|l| mounted(l["digest"].as_str().unwrap())), "{log}");
    assert_eq!(far.blobs(), 0);

    // The daemon is started again: it knows what it has not fetched, and from where it would be.
    assert!(far.lab.stop_daemon(), "the daemon had to be killed");
    far.lab.start_daemon();
    // By another name the registry is another one.
    let other = far.lab.registry();
    let cache = format!("type=registry,ref={other}/cache:1,mode=max");
    let context = far.lab.dir().join("contexts/push");
    let output = format!("type=image,name={other}/other/app:1,push=true,store=false");
    let words = ["build", "--progress", "plain", "--output", &output, "--cache-to", &cache];
    let again = far.lab.shipway(words.into_iter().chain([&*context.to_string_lossy()])).ok();
    assert!(again.all().contains("CACHED"), "{}", again.all());
    assert_eq!(toc(&far.layers_at("other/app", "1")), toc(&pushed));
    assert_eq!(toc(&far.layers_at("cache", "1"))[..2], toc(&base));
    assert_eq!(far.blobs(), 0, "they were passed on");

    // An archive has everything inside, and says what it waits for.
    let archive = far.lab.dir().join("app.tar");
    let output = format!("type=oci,dest={}", archive.display());
    let said = far.build("push", text, &output).ok().all();
    assert!(said.contains("fetching 2 layers that the archive contains"), "{said}");
    let names = run(std::process::Command::new("tar").arg("-tf").arg(&archive)).ok().stdout;
    for layer in &base {
        let hex = layer["digest"].as_str().unwrap().trim_start_matches("sha256:");
        assert!(names.contains(hex), "{names}");
    }
    far.end();
}

fn annotation(layer: &Value) -> Value {
    layer["annotations"][TOC_DIGEST].clone()
}

#[test]
fn a_setting_says_when_the_blobs_of_an_image_come() {
    let text = "FROM BASE\nRUN echo made > /made\n";
    let image = |more: &str| format!("type=image,name={APP}{more}");
    let now = Far::new(any(), "shipway", "[lazy]\n  blobs = \"now\"\n");
    now.build("app", text, &image("")).ok();
    assert_eq!(now.blobs(), 2);
    now.end();
    let later = Far::new(any(), "shipway", "[lazy]\n  blobs = \"async\"\n");
    later.build("app", text, &image("")).ok();
    wait_for("the blobs to come", Duration::from_secs(60), || match later.blobs() {
        2 => Ok(()),
        n => Err(format!("{n} blobs")),
    });
    later.end();
    // dockerd gets whole images whatever is set.
    let far = Far::new(any(), "shipway", "");
    far.build("app", text, &image(",namespaces=k8s.io")).ok();
    assert_eq!(far.blobs(), 0);
    assert_eq!(says(&far.lab, "k8s.io", &["cat", "/made"]), "made\n");
    far.build("app", text, &image(",namespaces=moby")).ok();
    assert_eq!(far.blobs(), 2);
    let check = far.lab.ctr_in("moby", ["images", "check", "--snapshotter", "shipway"]).ok().stdout;
    assert!(check.contains(" complete "), "{check}");
}

#[test]
fn the_snapshotter_is_given_the_credentials_of_the_build() {
    let mut options = LabOptions::new(any());
    options.snapshotter = true;
    options.worker_config = "snapshotter = \"shipway\"\n".into();
    let mut lab = Lab::start(options);
    lab.start_registry();
    BaseImage::busybox().push(&lab.registry(), "private", "1");
    let right = std::sync::Arc::new(parking_lot::Mutex::new("Basic bWU6czNjcmV0".to_owned()));
    let private = FaultyRegistry::start(&lab.registry(), "/v2/", RegistryFault::Login(right));
    let host = private.address();
    let socket = lab.dir().join("control.sock");
    lab.configure_daemon(&format!(
        "[registry.\"{host}\"]\n  http = true\n[lazy]\n  snapshotterControl = \"{}\"\n",
        socket.display()
    ));
    lab.start_daemon();
    let listener = UnixListener::bind(&socket).unwrap();
    let heard = std::thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        let mut line = String::new();
        BufReader::new(stream.try_clone().unwrap()).read_line(&mut line).unwrap();
        (&stream).write_all(b"{\"ok\":true}\n").unwrap();
        serde_json::from_str::<Value>(&line).unwrap()
    });
    let auth = serde_json::json!({"auths": {host.clone(): {"auth": "bWU6czNjcmV0"}}}).to_string();
    let home = lab.context("home", &[("config.json", &auth)]);
    let text = format!("FROM {host}/private:1\nRUN true\n");
    let context = lab.context("private", &[("Dockerfile", &text)]);
    let mut command = lab.shipway_command();
    command.args(["build", "--progress", "plain", "--output", "type=cacheonly"]).arg(&context);
    let said = run(command.env("DOCKER_CONFIG", home)).ok().all();
    let told = heard.join().unwrap();
    let told = &told["credentials"];
    assert_eq!(told["repository"], format!("{host}/private"), "{said}");
    assert_eq!(told["username"], "me");
    assert_eq!(told["secret"], "s3cret");
    let log = std::fs::read_to_string(lab.dir().join("shipwayd.log")).unwrap();
    assert!(!log.contains("s3cret") && !said.contains("s3cret"));
}
