//! `shipway imagetools` on real registries, and beside `docker buildx imagetools` where that is
//! installed.

#![allow(clippy::unwrap_used)]

use serde_json::Value;
use shipway_integration::{any, ctr_run};
use shipway_oci::{Descriptor, Digest, Manifest, media};
use shipway_registry::{Anonymous, Mode, Registry, RegistryConfig};
use shipway_testkit::{BaseImage, Finished, Lab, Network, SlowNetwork, run};
use std::{sync::Arc, time::Duration};

/// A registry with an image for two platforms, of which one has provenance.
struct Images {
    lab: Lab,
    /// An index of one image for this machine.
    host: String,
    /// An index of an image for another one and its provenance.
    other: String,
}

impl Images {
    fn start() -> Self {
        let lab = Lab::complete(any());
        let (host, other) =
            (format!("{}/host:1", lab.registry()), format!("{}/other:1", lab.registry()));
        BaseImage::busybox().push(&lab.registry(), "host", "1");
        let context = lab
            .context("other", &[("Dockerfile", "FROM scratch\nCOPY file /\n"), ("file", "hello")]);
        let built = lab
            .shipway_command()
            .args(["build", "--platform", "linux/s390x", "--attest", "type=provenance"])
            .args(["--push", "-t", &other])
            .arg(&context)
            .output()
            .unwrap();
        assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
        Self { lab, host, other }
    }

    fn name(&self, name: &str) -> String {
        format!("{}/{name}", self.lab.registry())
    }

    #[track_caller]
    fn tools(&self, arguments: &[&str]) -> Finished {
        self.lab.shipway(["imagetools"].iter().chain(arguments))
    }

    /// What a repository has under a tag or digest.
    #[track_caller]
    fn manifest(&self, repository: &str, reference: &str) -> (String, Value) {
        let path = format!("/v2/{repository}/manifests/{reference}");
        let (status, bytes) = self.lab.registry_get(&path);
        assert_eq!(status, 200, "{path}: {}", String::from_utf8_lossy(&bytes));
        (Digest::of(&bytes).to_string(), serde_json::from_slice(&bytes).unwrap())
    }

    /// Everything below an index is in the repository.
    #[track_caller]
    fn is_whole(&self, repository: &str, index: &Value) {
        for entry in index["manifests"].as_array().unwrap() {
            let (_, manifest) = self.manifest(repository, entry["digest"].as_str().unwrap());
            let layers = manifest["layers"].as_array().unwrap();
            for blob in layers.iter().chain([&manifest["config"]]) {
                let path = format!("/v2/{repository}/blobs/{}", blob["digest"].as_str().unwrap());
                assert_eq!(self.lab.registry_get(&path).0, 200, "{path}");
            }
        }
    }
}

/// `docker buildx imagetools`, if it is installed.
fn buildx(lab: &Lab, arguments: &[&str]) -> Option<Finished> {
    let mut command = lab.buildx()?;
    Some(run(command.arg("imagetools").args(arguments)))
}

#[test]
fn images_are_combined_and_copied_with_what_is_said_of_them() {
    let images = Images::start();
    let (host, other) = (images.host.as_str(), images.other.as_str());
    // Another name for the registry, which therefore takes nothing from the first by mounting.
    let network = Network { latency: Duration::ZERO, bandwidth: 100 << 20 };
    let elsewhere = SlowNetwork::start(&images.lab.registry(), network);
    let (one, two) = (images.name("multi:1"), images.name("multi:2"));
    let far = format!("{}/far/multi:1", elsewhere.address());
    let metadata = images.lab.dir().join("metadata.json");
    let metadata = metadata.to_string_lossy();
    let note = "index,manifest-descriptor[linux/s390x]:org.example.k=v<1";
    let done = images.tools(&[
        "create",
        "-t",
        &one,
        "-t",
        &two,
        "--tag",
        &far,
        "--annotation",
        note,
        "--progress",
        "plain",
        "--metadata-file",
        &metadata,
        host,
        other,
    ]);
    let said = done.ok().all();
    for part in ["pushing", "copying sha256:", &format!("from {other} to")] {
        assert!(said.contains(part), "{part}: {said}");
    }

    let dry = images.tools(&["create", "--dry-run", "--annotation", note, host, other]).ok();
    let text = dry.stdout.strip_suffix('\n').unwrap();
    let digest = Digest::of(text).to_string();
    for (repository, tag) in [("multi", "1"), ("multi", "2"), ("far/multi", "1")] {
        let (got, index) = images.manifest(repository, tag);
        assert_eq!(got, digest, "{repository}:{tag}");
        images.is_whole(repository, &index);
        let entries = index["manifests"].as_array().unwrap();
        assert_eq!(entries.len(), 3, "{index}");
        assert_eq!(index["annotations"]["org.example.k"], "v<1");
        assert_eq!(entries[1]["annotations"]["org.example.k"], "v<1");
        assert_eq!(entries[2]["annotations"]["vnd.docker.reference.digest"], entries[1]["digest"]);
    }
    let wrote: Value = serde_json::from_str(&std::fs::read_to_string(&*metadata).unwrap()).unwrap();
    assert_eq!(wrote["containerimage.descriptor"]["digest"], digest.as_str());
    let repositories = wrote["image.name"].as_str().unwrap().split(',').count();
    assert_eq!(repositories, 2, "{wrote}");
    images.lab.ctr(["images", "pull", "--plain-http", &one]).ok();
    assert_eq!(ctr_run(&images.lab, &one, &["echo", "runs"]).ok().stdout, "runs\n");

    // Appended by digest and by a described descriptor, in the repository of the tag.
    let (_, index) = images.manifest("multi", "1");
    let manifest = index["manifests"][1]["digest"].as_str().unwrap();
    let file = images.lab.dir().join("descriptor.json");
    let described = serde_json::json!({"digest": manifest, "platform": {"os": "linux", "architecture": "s390x", "variant": "z1"}});
    std::fs::write(&file, described.to_string()).unwrap();
    let three = images.name("multi:3");
    let only = index["manifests"][0]["digest"].as_str().unwrap();
    images.tools(&["create", "-t", &three, only]).ok();
    images.tools(&["create", "-t", &three, "--append", "-f", &file.to_string_lossy()]).ok();
    let (_, appended) = images.manifest("multi", "3");
    let platforms: Vec<&Value> =
        appended["manifests"].as_array().unwrap().iter().map(|m| &m["platform"]).collect();
    assert_eq!(platforms.len(), 2, "{appended}");
    assert_eq!(platforms[1]["variant"], "z1");

    // One platform, with what is said of it, and a manifest alone.
    let picked = images.name("picked:1");
    images.tools(&["create", "-t", &picked, "--platform", "linux/s390x", &one]).ok();
    let (_, few) = images.manifest("picked", "1");
    assert_eq!(few["manifests"].as_array().unwrap().len(), 2, "{few}");
    images.is_whole("picked", &few);
    let alone = images.name("alone:1");
    let source = format!("{}@{manifest}", images.name("multi"));
    images.tools(&["create", "-t", &alone, "--prefer-index=false", &source]).ok();
    assert_eq!(images.manifest("alone", "1").0, manifest);

    let refused = |arguments: &[&str]| images.tools(arguments).failed().stderr;
    assert!(refused(&["create", host]).contains("can't push with no tags specified"));
    assert!(refused(&["create", "-t", &one, &images.name("absent:1")]).contains("not found"));
    let none = refused(&["create", "-t", &one, "--platform", "linux/arm64", other]);
    assert!(none.contains("none of the manifests match") && none.contains("hint: "), "{none}");
    let unclear = refused(&["create", "-t", &one, host, manifest]);
    assert!(unclear.contains("cannot infer repository"), "{unclear}");
}

/// What refers to an image by `subject` goes with it, if it is a signature or an attestation.
#[test]
fn signatures_travel_with_the_image() {
    let images = Images::start();
    let (_, index) = images.manifest("other", "1");
    let image = &index["manifests"][0];
    // The lab's registry keeps no lists of referrers: there is an index under a tag.
    let bundle = "application/vnd.dev.sigstore.bundle.v0.3+json";
    let subject: Descriptor = serde_json::from_value(image.clone()).unwrap();
    let config = images.manifest("other", &subject.digest.to_string()).1["config"].clone();
    let config: Descriptor = serde_json::from_value(config).unwrap();
    let referring = |kind: &str| Manifest {
        schema_version: 2,
        media_type: Some(media::OCI_MANIFEST.into()),
        artifact_type: Some(kind.into()),
        config: config.clone(),
        layers: Vec::new(),
        subject: Some(Descriptor { platform: None, ..subject.clone() }),
        annotations: [("made by".to_owned(), "somebody".to_owned())].into(),
    };
    let registry = Registry::new(RegistryConfig::default());
    let name = images.other.parse().unwrap();
    let repository = registry.repository(&name, Arc::new(Anonymous), Mode::Push);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let signature = runtime.block_on(async {
        repository.push_referrer(&referring("application/x-scan")).await.unwrap();
        repository.push_referrer(&referring(bundle)).await.unwrap()
    });
    let tag = format!("sha256-{}", subject.digest.hex());
    assert_eq!(images.manifest("other", &tag).1["manifests"].as_array().unwrap().len(), 2);

    images.tools(&["create", "-t", &images.name("signed:1"), &images.other]).ok();
    let (_, found) = images.manifest("signed", &tag);
    let kinds: Vec<&Value> =
        found["manifests"].as_array().unwrap().iter().map(|m| &m["artifactType"]).collect();
    assert!(kinds.iter().any(|kind| *kind == bundle), "{found}");
    assert!(!kinds.iter().any(|kind| *kind == "application/x-scan"), "{found}");
    let digest = signature.digest.to_string();
    assert_eq!(images.manifest("signed", &digest).0, digest, "its bytes changed on the way");
}

#[test]
fn images_are_shown_as_buildx_shows_them() {
    let images = Images::start();
    let multi = images.name("multi:1");
    images.tools(&["create", "-t", &multi, &images.host, &images.other]).ok();
    let raw = images.tools(&["inspect", "--raw", &multi]).ok().stdout;
    assert_eq!(Digest::of(&raw).to_string(), images.manifest("multi", "1").0);
    let shown = images.tools(&["inspect", &multi]).ok().stdout;
    for part in
        ["Name:      ", "Manifests: \n", "  Platform:    linux/s390x\n", "attestation-manifest"]
    {
        assert!(shown.contains(part), "{part}: {shown}");
    }
    let format = |image: &str, template: &str| {
        images.tools(&["inspect", "--format", template, image]).ok().stdout
    };
    assert_eq!(
        format(&multi, r#"{{(index .Image "linux/s390x").OS}} {{.Name}}"#),
        format!("linux {multi}")
    );
    let provenance = format(&multi, r#"{{json (index .Provenance "linux/s390x").SLSA}}"#);
    let provenance: Value = serde_json::from_str(&provenance).unwrap();
    assert!(provenance["buildDefinition"].is_object(), "{provenance}");
    let single = format(&images.other, "{{json .Provenance.SLSA.buildDefinition.buildType}}");
    assert!(single.starts_with('"'), "{single}");
    let refused = images.tools(&["inspect", &images.name("absent:1")]).failed().stderr;
    assert!(refused.contains("not found") && refused.contains("hint: "), "{refused}");

    // The same of the program that has these forms.
    let templates = [
        "{{json .Manifest}}",
        "{{json .Image}}",
        "{{json .Provenance}}",
        "{{json .SBOM}}",
        "{{.Name}}",
        "{{json .}}",
        "{{.Manifest}}",
    ];
    let mut compared = 0;
    for image in [&multi, &images.other, &images.host] {
        let sources = [image.as_str(), images.other.as_str()];
        let mut cases = vec![vec!["inspect", image], vec!["inspect", "--raw", image]];
        cases.extend(templates.map(|t| vec!["inspect", "--format", t, image]));
        cases.push(["create", "--dry-run"].into_iter().chain(sources).collect());
        cases.push(vec!["create", "--dry-run", "--platform", "linux/s390x", &images.other]);
        for case in cases {
            let Some(theirs) = buildx(&images.lab, &case) else { continue };
            // Annotations are in any order there.
            let lines = |text: &str| {
                let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
                lines.sort();
                lines
            };
            let (ours, theirs) = (images.tools(&case).ok().stdout, theirs.ok().stdout);
            assert_eq!(
                lines(&ours),
                lines(&theirs),
                "{case:?}\n--- ours\n{ours}\n--- theirs\n{theirs}"
            );
            compared += 1;
        }
    }
    if compared == 0 {
        eprintln!("docker-buildx is absent: nothing was compared with it");
    }
}
