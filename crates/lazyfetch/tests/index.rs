//! Tables of contents of layers that other programs made, from a registry that misbehaves.

#![allow(clippy::unwrap_used)]

mod common;

use common::{Asked, Link, MS, Reply, Server, Way, sources};
use futures::FutureExt;
use shipway_fault::{Code, Fault};
use shipway_lazyfetch::{Hope, IndexRequest, Indexed, Settings, index, index_all};
use shipway_oci::Digest;
use std::{collections::BTreeMap, path::PathBuf, sync::Arc, time::Duration};
use tokio::time::Instant;

const S: Duration = Duration::from_secs(1);
const WAY: Way =
    Way { rtt: Duration::from_millis(20), rate: 30e6, fair: true, busy: Duration::ZERO };

fn corpus(name: &str) -> Vec<u8> {
    let corpus = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../estargz/tests/corpus");
    std::fs::read(corpus.join(name)).unwrap()
}

fn annotations(name: &str) -> BTreeMap<String, String> {
    serde_json::from_slice(&corpus(&format!("{name}.json"))).unwrap()
}

/// A request for a layer of the corpus, with nothing of it known but what a manifest says.
fn request(name: &str, servers: &[&Arc<Server>]) -> IndexRequest {
    let blob = corpus(name);
    IndexRequest {
        digest: Digest::of(&blob),
        size: Some(blob.len() as u64),
        annotations: annotations(name),
        sources: sources(servers),
        external: None,
    }
}

fn server(
    blob: &[u8],
    script: impl Fn(usize, &Asked) -> Reply + Send + Sync + 'static,
) -> Arc<Server> {
    Server::new("r.io", blob, &Link::new(WAY), script)
}

async fn find(request: &IndexRequest) -> Result<Indexed, Fault> {
    index(request, &Settings::default()).await
}

#[tokio::test(start_paused = true)]
async fn one_request_brings_the_table_of_every_dialect() {
    for name in [
        "estargz.tgz",
        "estargz-dot-chunks.tgz",
        "estargz-packed.tgz",
        "estargz-lossless.tgz",
        "zstd-stargz.tzst",
        "zstd-podman.tzst",
    ] {
        for size_is_known in [true, false] {
            let server = server(&corpus(name), |_, _| Reply::Right);
            let mut request = request(name, &[&server]);
            if !size_is_known {
                request.size = None;
            }
            let found = find(&request).await.unwrap();
            assert!(!found.toc.is_empty() && found.rtt >= 20 * MS && found.rtt < 30 * MS);
            assert_eq!(
                (server.asked().len(), found.size),
                (1, corpus(name).len() as u64),
                "{name}"
            );
        }
    }
}

/// A blob whose table of contents is longer than what is asked for first.
fn large() -> (Vec<u8>, BTreeMap<String, String>) {
    use shipway_estargz::{Dialect, Output, Writer, WriterOptions};
    let mut tar = tar::Builder::new(Vec::new());
    let mut name = 1u64;
    for n in 0..20_000 {
        let mut header = tar::Header::new_ustar();
        header.set_size(0);
        header.set_mode(0o644);
        let mut random = || {
            name = name.wrapping_mul(6364136223846793005).wrapping_add(1);
            name
        };
        let name = format!("{n}-{:x}{:x}", random(), random());
        tar.append_data(&mut header, name, &[][..]).unwrap();
    }
    let tar = tar.into_inner().unwrap();
    let mut blob = Vec::new();
    let mut writer = Writer::new(WriterOptions::new(Output::Estargz), |bytes: &[u8]| {
        blob.extend_from_slice(bytes);
        Ok(())
    })
    .unwrap();
    let mut reader = shipway_archive::TarReader::new(&tar[..]);
    let mut at = 0;
    while let Some(member) = reader.next_member().unwrap() {
        let entry = shipway_estargz::TarEntry {
            path: member.path.clone(),
            kind: shipway_estargz::TarKind::File(0),
            mode: member.mode,
            uid: 0,
            gid: 0,
            mtime: Default::default(),
            xattrs: vec![],
        };
        writer.entry(&entry, &tar[at..at + 512]).unwrap();
        at += 512;
    }
    writer.raw(&tar[at..]).unwrap();
    let written = writer.finish().unwrap();
    let annotations = written.annotations(Dialect::Containerd);
    (blob, annotations)
}

#[tokio::test(start_paused = true)]
async fn a_long_table_takes_a_second_request_for_the_rest() {
    let (blob, annotations) = large();
    let server = server(&blob, |_, _| Reply::Right);
    let request = IndexRequest {
        digest: Digest::of(&blob),
        size: Some(blob.len() as u64),
        annotations,
        sources: sources(&[&server]),
        external: None,
    };
    let found = find(&request).await.unwrap();
    assert_eq!(found.toc.len(), 20_000);
    let ranges = server.ranges();
    let (first, second) = (ranges[0].clone(), ranges[1].clone());
    assert_eq!((ranges.len(), first.end - first.start), (2, 256 << 10));
    assert_eq!((second.start, second.end), (found.layout.toc.unwrap().start, first.start));
}

#[tokio::test(start_paused = true)]
async fn what_fails_is_asked_for_again_within_the_limit() {
    let good = server(&corpus("estargz.tgz"), |_, _| Reply::Right);
    let toc = find(&request("estargz.tgz", &[&good])).await.unwrap().layout.toc.unwrap();
    for (what, reply, fresh) in [
        ("wrong table", Reply::FlippedAt((toc.start + toc.end) / 2), true),
        ("wrong footer", Reply::FlippedAt(toc.end + 20), true),
        ("short", Reply::Short(1000), false),
        ("hang", Reply::Hang, false),
        ("down", Reply::Down, false),
        ("refused", Reply::Refuse(Hope::Elsewhere), false),
        ("500", Reply::Refuse(Hope::Soon), false),
        ("429", Reply::Refuse(Hope::After(3 * S)), false),
        ("other range", Reply::Elsewhere, false),
    ] {
        let once = {
            let reply = reply.clone();
            move |n: usize, _: &Asked| if n == 0 { reply.clone() } else { Reply::Right }
        };
        let server_once = server(&corpus("estargz.tgz"), once);
        let found = find(&request("estargz.tgz", &[&server_once])).await;
        assert!(found.is_ok(), "{what}: {}", found.unwrap_err());
        assert_eq!(server_once.asked()[1].fresh, fresh, "{what}");
        // Another source has it.
        let bad = server(&corpus("estargz.tgz"), {
            let reply = reply.clone();
            move |_, _| reply.clone()
        });
        let good = server(&corpus("estargz.tgz"), |_, _| Reply::Right);
        let start = Instant::now();
        find(&request("estargz.tgz", &[&bad, &good])).await.unwrap();
        assert!(start.elapsed() < 6 * S, "{what}");
        assert_eq!((bad.asked().len(), good.asked().len()), (1, 1), "{what}");
        // Nobody has it.
        let start = Instant::now();
        find(&request("estargz.tgz", &[&bad])).await.unwrap_err();
        assert!(start.elapsed() <= 10 * S + 10 * MS, "{what}: {:?}", start.elapsed());
    }
}

#[tokio::test(start_paused = true)]
async fn a_layer_without_a_table_that_can_be_believed_is_an_error() {
    let blob: Vec<u8> = (0..=255).cycle().take(100_000).collect();
    let plain = server(&blob, |_, _| Reply::Right);
    let mut no_table = request("estargz.tgz", &[&plain]);
    (no_table.digest, no_table.size) = (Digest::of(&blob), Some(blob.len() as u64));
    let fault = find(&no_table).await.unwrap_err();
    assert_eq!((fault.code(), plain.asked().len()), (Code::NotFound, 2));
    // Its manifest does not vouch for it.
    let good = server(&corpus("estargz.tgz"), |_, _| Reply::Right);
    let mut unknown = request("estargz.tgz", &[&good]);
    unknown.annotations.clear();
    assert_eq!(find(&unknown).await.unwrap_err().code(), Code::FailedPrecondition);
    assert!(good.asked().is_empty());
    // It vouches for another one.
    let mut other = request("estargz.tgz", &[&good]);
    other.annotations = annotations("estargz-packed.tgz");
    assert_eq!(find(&other).await.unwrap_err().code(), Code::DataLoss);
    let mut nowhere = request("estargz.tgz", &[]);
    nowhere.sources.clear();
    assert_eq!(find(&nowhere).await.unwrap_err().code(), Code::Unavailable);
}

#[tokio::test(start_paused = true)]
async fn a_table_that_is_elsewhere_is_asked_for_there() {
    let server = server(&corpus("estargz-external.tgz"), |_, _| Reply::Right);
    let mut request = request("estargz-external.tgz", &[&server]);
    assert_eq!(find(&request).await.unwrap_err().code(), Code::NotFound);
    request.external = Some(Arc::new(|| async { Ok(corpus("estargz-external.toc")) }.boxed()));
    let found = find(&request).await.unwrap();
    assert!(found.layout.toc.is_none() && !found.toc.is_empty());
    request.external = Some(Arc::new(|| async { Ok(b"nonsense".to_vec()) }.boxed()));
    assert!(find(&request).await.is_err());
}

/// All layers of an image take hardly longer than one, and come in order.
#[tokio::test(start_paused = true)]
async fn layers_of_an_image_are_found_at_once() {
    let names = ["estargz.tgz", "zstd-podman.tzst", "estargz-packed.tgz", "estargz-dot-chunks.tgz"];
    let link = Link::new(WAY);
    let late = |n: usize, _: &Asked| if n == 0 { Reply::Right } else { Reply::Hang };
    let servers = names.map(|name| Server::new("r.io", &corpus(name), &link, late));
    let mut requests: Vec<IndexRequest> =
        names.iter().zip(&servers).map(|(name, server)| request(name, &[server])).collect();
    requests[1].annotations.clear();
    let start = Instant::now();
    let found = index_all(&requests, &Settings::default()).await;
    assert!(start.elapsed() < 40 * MS, "{:?}", start.elapsed());
    let sizes: Vec<Option<u64>> = found.iter().map(|f| f.as_ref().ok().map(|f| f.size)).collect();
    let mut want: Vec<Option<u64>> = requests.iter().map(|r| r.size).collect();
    want[1] = None;
    assert_eq!(sizes, want);
}
