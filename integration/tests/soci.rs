//! Images with SOCI indexes: ordinary layers, lazy when they are pulled first.

#![allow(clippy::unwrap_used)]

use crate::{
    lazy::{
        EVERYTHING, FAST, FILES, SLOW, lab, pull, reads_survive_kills, status, sum, until_whole,
        words, wrong_bytes_are_asked_for_again,
    },
    plain_lazy::{LARGE, image, layers, remove},
};
use serde_json::{Value, json};
use shipway_integration::{any, on_all, on_each};
use shipway_oci::{Descriptor, Digest, Index, Manifest, media, soci};
use shipway_testkit::{Lab, SlowNetwork, run, wait_for};
use std::time::Duration;

const SIZE: u64 = LARGE / FILES as u64;

/// Pushes the ordinary image as `plain:1`, and with an index as `soci:1`.
#[track_caller]
fn push(lab: &Lab) {
    image().push(&lab.registry(), "plain", "1");
    let at = |name: &str| format!("{}/{name}:1", lab.registry());
    let fixed = ["convert", "--soci", "--soci-min-layer-size", "100000"];
    let done = lab.shipway(fixed.into_iter().chain([&*at("plain"), &at("soci")])).ok();
    assert!(done.stderr.contains("made the zTOCs of 2 layers"), "{}", done.stderr);
    assert_eq!(Digest::of(get(lab, "soci", "1")).to_string(), done.stdout.trim());
}

#[track_caller]
fn get(lab: &Lab, name: &str, manifest: &str) -> Vec<u8> {
    let (status, bytes) = lab.registry_get(&format!("/v2/{name}/manifests/{manifest}"));
    assert_eq!(status, 200, "{name} {manifest}");
    bytes
}

fn index(lab: &Lab, name: &str, tag: &str) -> Index {
    serde_json::from_slice(&get(lab, name, tag)).unwrap()
}

fn manifest(lab: &Lab, name: &str, digest: Digest) -> Manifest {
    serde_json::from_slice(&get(lab, name, &digest.to_string())).unwrap()
}

/// Everything in the image without index, unpacked.
#[track_caller]
fn unpacked(lab: &Lab) -> String {
    let plain = format!("{}/plain:1", lab.registry());
    lab.ctr(["images", "pull", "--plain-http", "--snapshotter", "overlayfs", &plain]).ok();
    let mut words = words(&plain, EVERYTHING);
    words[3] = "overlayfs".into();
    let said = lab.ctr(words).ok().stdout;
    assert!(said.contains("various/hard") && said.lines().count() > 600, "{said}");
    said
}

/// Most bytes that a pull fetches: the windows of 64 MiB of contents, and what is around them.
const PULLED: u64 = 2 << 20;

#[test]
fn an_ordinary_image_with_an_index_is_lazy_when_it_is_pulled_first() {
    on_all(|flavour| {
        let lab = lab(flavour, "background = false\n");
        push(&lab);
        let slow = SlowNetwork::start(&lab.registry(), FAST);
        let image = format!("{}/soci:1", slow.address());
        pull(&lab, &image);
        let pulled = slow.bytes();
        assert!(pulled < PULLED, "{pulled} bytes were fetched by the pull: {}", status(&lab));
        // Some versions of containerd fetch the index as if it were an image.
        let content = lab.ctr(["content", "list", "--quiet"]).ok().stdout;
        let [own, _] = entries(&lab);
        for layer in manifest(&lab, "soci", own.digest).layers {
            assert!(!content.contains(&layer.digest.to_string()), "a layer was pulled: {content}");
        }
        let said = lab.ctr(words(&image, "sha256sum /data/33")).ok().stdout;
        assert_eq!(said, format!("{}  /data/33\n", sum(33)));
        let fetched = slow.bytes() - pulled;
        assert!(fetched > SIZE, "{fetched} bytes were fetched");
        assert!(fetched < LARGE / 3, "{fetched} bytes were fetched for one file");
        let layers = layers(&lab);
        let is_lazy = |l: &Value| l["state"] == "lazy" && l["soci"] == true && l["plain"] == false;
        assert!(layers.len() == 2 && layers.iter().all(is_lazy), "{layers:?}");
        let told = run(lab.snapshotter_command().arg("status")).ok().stdout;
        assert!(told.contains("SOCI, lazy"), "{told}");
        assert_eq!(lab.ctr(words(&image, EVERYTHING)).ok().stdout, unpacked(&lab));
    });
}

#[test]
fn the_rest_comes_by_itself_and_is_compared_with_the_index() {
    on_each(|flavour| {
        let mut lab = lab(flavour, "");
        push(&lab);
        let slow = SlowNetwork::start(&lab.registry(), FAST);
        let image = format!("{}/soci:1", slow.address());
        pull(&lab, &image);
        lab.ctr(words(&image, "sha256sum /data/3 /data/50")).ok();
        until_whole(&lab, "local");
        slow.set_down(true);
        assert!(lab.kill_keeper());
        let everything = lab.ctr(words(&image, EVERYTHING)).ok().stdout;
        // What is whole is believed after a restart, and mounted as it was.
        lab.kill_snapshotter();
        lab.start_snapshotter();
        wait_for("containerd to reach the snapshotter", Duration::from_secs(30), || {
            let said = lab.ctr(words(&image, EVERYTHING));
            if said.stdout == everything { Ok(()) } else { Err(said.all()) }
        });
        assert_eq!(everything, unpacked(&lab));
    });
}

#[test]
fn reads_go_on_through_kills_and_outages() {
    let mut lab = lab(any(), "background = false\n");
    push(&lab);
    let slow = SlowNetwork::start(&lab.registry(), SLOW);
    let image = format!("{}/soci:1", slow.address());
    pull(&lab, &image);
    reads_survive_kills(&mut lab, &slow, &image);
}

#[test]
fn wrong_bytes_of_a_registry_are_asked_for_again() {
    let lab = lab(any(), "background = false\n");
    push(&lab);
    wrong_bytes_are_asked_for_again(&lab, "soci", |_| ());
}

/// The entries of `soci:1`: image and index.
fn entries(lab: &Lab) -> [Descriptor; 2] {
    index(lab, "soci", "1").manifests.try_into().unwrap()
}

/// Puts a manifest in the place of another; gives its descriptor.
fn put(lab: &Lab, name: &str, old: &Descriptor, value: &Value) -> Value {
    let bytes = value.to_string().into_bytes();
    let mut descriptor = old.clone();
    (descriptor.digest, descriptor.size) = (Digest::of(&bytes), bytes.len() as u64);
    lab.registry_put_manifest(name, &descriptor.digest.to_string(), &old.media_type, &bytes);
    json!(descriptor)
}

/// An index that says something else than the layer is used, until the whole layer was read: then
/// the difference is reported, and the index is not used again.
#[test]
fn an_index_that_lies_is_found_out() {
    let lab = lab(any(), "");
    push(&lab);
    let [image, index] = entries(&lab);
    let mut soci = manifest(&lab, "soci", index.digest);
    let ztoc = soci.layers.last_mut().unwrap();
    let (_, mut bytes) = lab.registry_get(&format!("/v2/soci/blobs/{}", ztoc.digest));
    // One of the files is a second younger.
    let time = b"2023-11-14T22:13:20Z";
    let at = bytes.windows(time.len()).rposition(|found| found == time).unwrap();
    bytes[at + 18] = b'1';
    lab.registry_put_blob("soci", &bytes);
    ztoc.digest = Digest::of(&bytes);
    let soci = put(&lab, "soci", &index, &json!(soci));
    let mut lies = json!(manifest(&lab, "soci", image.digest));
    lies["annotations"][soci::INDEX_DIGEST] = soci["digest"].clone();
    let lies = put(&lab, "soci", &image, &lies);
    let all = json!({"schemaVersion": 2, "mediaType": media::OCI_INDEX, "manifests": [lies, soci]});
    let all = all.to_string().into_bytes();
    lab.registry_put_manifest("soci", "lies", media::OCI_INDEX, &all);
    let name = format!("{}/soci:lies", lab.registry());
    pull(&lab, &name);
    wait_for("the lie to be found", Duration::from_secs(60), || {
        let layers = layers(&lab);
        let lying = layers.iter().find(|layer| layer["state"] == "lying");
        match lying.and_then(|layer| layer["error"].as_str()) {
            Some(error) if error.contains("another time in the tar than in the index") => Ok(()),
            _ => Err(status(&lab).to_string()),
        }
    });
    // The image with the honest index has the same blob, and is not harmed when it is pulled anew.
    remove(&lab, &["k8s.io"]);
    let honest = format!("{}/soci:1", lab.registry());
    pull(&lab, &honest);
    assert_eq!(lab.ctr(words(&honest, EVERYTHING)).ok().stdout, unpacked(&lab));
    wait_for("the honest layers to be whole", Duration::from_secs(60), || {
        let whole = layers(&lab).iter().filter(|layer| layer["state"] == "whole").count();
        if whole == 2 { Ok(()) } else { Err(status(&lab).to_string()) }
    });
}

/// Puts an index of version 1 beside `plain:1`, by the tag that stands for the list of referrers.
fn refer(lab: &Lab) {
    let [_, known] = entries(lab);
    let mut soci = manifest(lab, "soci", known.digest);
    for blob in soci.layers.iter().chain([&soci.config]) {
        let (_, bytes) = lab.registry_get(&format!("/v2/soci/blobs/{}", blob.digest));
        lab.registry_put_blob("plain", &bytes);
    }
    let image = index(lab, "plain", "1").manifests.remove(0);
    soci.config.media_type = soci::INDEX_V1.to_owned();
    soci.subject = Some(Descriptor::new(&*image.media_type, image.digest, image.size));
    let artifact = Descriptor {
        artifact_type: Some(soci::INDEX_V1.to_owned()),
        ..Descriptor::new(media::OCI_MANIFEST, known.digest, 0)
    };
    let artifact = put(lab, "plain", &artifact, &json!(soci));
    let list = json!({"schemaVersion": 2, "mediaType": media::OCI_INDEX, "manifests": [artifact]});
    let tag = format!("sha256-{}", image.digest.hex());
    let list = list.to_string().into_bytes();
    lab.registry_put_manifest("plain", &tag, media::OCI_INDEX, &list);
}

/// What somebody put beside an image counts only where that is allowed.
#[test]
fn an_index_that_refers_to_an_image_is_used_if_that_is_wanted() {
    for (setting, is_lazy) in [("", false), ("soci = \"referrers\"\n", true)] {
        let lab = lab(any(), &format!("background = false\nplain = false\n{setting}"));
        push(&lab);
        refer(&lab);
        let slow = SlowNetwork::start(&lab.registry(), FAST);
        let image = format!("{}/plain:1", slow.address());
        pull(&lab, &image);
        let pulled = slow.bytes();
        assert_eq!(pulled < PULLED, is_lazy, "{setting:?}: {pulled} bytes were fetched");
        assert_eq!(layers(&lab).len(), if is_lazy { 2 } else { 0 }, "{}", status(&lab));
        assert_eq!(lab.ctr(words(&image, EVERYTHING)).ok().stdout, unpacked(&lab));
    }
}

#[test]
fn without_the_setting_layers_are_unpacked() {
    let lab = lab(any(), "background = false\nplain = false\nsoci = \"off\"\n");
    push(&lab);
    let slow = SlowNetwork::start(&lab.registry(), FAST);
    pull(&lab, &format!("{}/soci:1", slow.address()));
    assert!(slow.bytes() > LARGE && layers(&lab).is_empty(), "{}", status(&lab));
}

/// Within containerd's store, as `soci convert` does it, and from there to the registry.
#[test]
fn images_in_the_store_get_indexes() {
    let lab = lab(any(), "background = false\n");
    push(&lab);
    let (plain, stored) = (format!("{}/plain:1", lab.registry()), "containerd:example.org/soci:1");
    lab.ctr(["images", "pull", "--plain-http", "--snapshotter", "overlayfs", &plain]).ok();
    let socket = lab.containerd_socket().to_string_lossy().into_owned();
    let fixed = ["convert", "--soci", "--containerd-addr", &socket, "--namespace", "k8s.io"];
    let convert = |more: &[&str]| {
        lab.shipway(fixed.into_iter().chain(more.iter().copied())).ok().stdout.trim().to_owned()
    };
    let from = format!("containerd:{plain}");
    let least = ["--soci-min-layer-size", "100000"];
    let made = convert(&[&least[..], &[&*from, stored]].concat());
    assert_eq!(made, Digest::of(get(&lab, "soci", "1")).to_string(), "the same bytes as elsewhere");
    let pushed = format!("{}/again:1", lab.registry());
    assert_eq!(convert(&[&least[..], &[stored, &pushed]].concat()), made);
    // containerd keeps all of it.
    shipway_integration::collect_garbage(&lab);
    let all = lab.ctr(["content", "list", "--quiet"]).ok().stdout;
    for entry in entries(&lab) {
        let manifest = manifest(&lab, "soci", entry.digest);
        for child in manifest.layers.iter().chain([&manifest.config]) {
            assert!(all.contains(&child.digest.to_string()), "{} is missing", child.digest);
        }
    }
    // A small layer gets no index, and an image without large ones cannot be converted.
    let small = format!("{}/small:1", lab.registry());
    let args = [&fixed[..], &[&*from, &*small]].concat();
    let done = lab.shipway(args).ok();
    assert!(done.stderr.contains("made the zTOCs of 1 layers"), "{}", done.stderr);
    assert!(done.stderr.contains("fewer than 10485760"), "{}", done.stderr);
    let all = ["--soci-min-layer-size", "1000000000", &*from, "containerd:example.org/none:1"];
    let none = lab.shipway([&fixed[..], &all[..]].concat()).failed();
    assert!(none.stderr.contains("no layer of the image can have a zTOC"), "{}", none.stderr);
    let both = lab.shipway(["convert", "--soci", "--compression", "zstd", "a:1", "b:1"]).failed();
    assert!(both.stderr.contains("cannot be used with"), "{}", both.stderr);
    // Other programs take it for an image like others.
    let again = ["images", "pull", "--plain-http", "--snapshotter", "overlayfs", &pushed];
    lab.ctr_in("other", again).ok();
}
