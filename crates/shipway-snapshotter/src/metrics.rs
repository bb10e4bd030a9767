//! What [`crate::status`] tells, for Prometheus: its text format (version 0.0.4) at `/metrics` of a
//! socket that is closed unless the configuration says where it is.
//!
//! What there is to tell is in a [`Status`] already, counted where it happens; crate `daemon` has
//! the format and the listener.

use crate::{
    lazy::{LayerReport, Report},
    status::{Observed, Status},
};
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::body::Incoming;
use shipway_daemon::metrics::{Kind, Page};
use shipway_fault::{Fault, Result};
use std::{net::SocketAddr, path::PathBuf, str::FromStr, sync::Arc, time::Duration};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
};
use tokio_stream::{Stream, StreamExt as _};

/// Pause after an accept error such as "too many open files", so that the loop does not spin.
const PAUSE: Duration = Duration::from_millis(50);
/// What all names begin with.
const PREFIX: &str = "shipway_snapshotter_";

/// Where metrics are told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A Unix socket.
    Unix(PathBuf),
    /// An address of this machine alone.
    Loopback(SocketAddr),
}

impl FromStr for Address {
    type Err = Fault;

    fn from_str(text: &str) -> Result<Self> {
        if let Some(path) = text.strip_prefix("unix://") {
            return match path.starts_with('/') {
                true => Ok(Self::Unix(path.into())),
                false => Err(Fault::invalid(format!("{path:?} is not an absolute path"))),
            };
        }
        let address: SocketAddr = text.parse().map_err(|_| {
            Fault::invalid(format!("{text:?} is not an address of metrics"))
                .hint("want unix:///path or 127.0.0.1:9464")
        })?;
        if !address.ip().is_loopback() {
            return Err(Fault::invalid(format!("{address} can be reached by other machines"))
                .hint(
                    "want 127.0.0.1; images' names are nobody else's business, so let a proxy ask",
                ));
        }
        Ok(Self::Loopback(address))
    }
}

/// Listens at an address of this machine.
pub async fn listen(address: SocketAddr) -> Result<impl Stream<Item = TcpStream>> {
    let listener = TcpListener::bind(address)
        .await
        .map_err(|e| Fault::io(format!("listen on {address}"), e))?;
    let accepted =
        tokio_stream::wrappers::TcpListenerStream::new(listener).then(|accepted| async {
            if let Err(error) = &accepted {
                tracing::warn!(%error, "a connection for metrics was not accepted");
                tokio::time::sleep(PAUSE).await;
            }
            accepted
        });
    Ok(accepted.filter_map(std::io::Result::ok))
}

/// Answers everybody who connects.
pub async fn serve<S>(connections: impl Stream<Item = S>, observed: Arc<Observed>)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let answer = move |request: Request<Incoming>| {
        let observed = observed.clone();
        async move { answer(&request, &observed).await }
    };
    shipway_daemon::debug::serve(connections, answer).await;
}

async fn answer(request: &Request<Incoming>, observed: &Arc<Observed>) -> Response<Full<Bytes>> {
    let (status, text) = match (request.method(), request.uri().path()) {
        (&Method::GET | &Method::HEAD, "/metrics") => match observed.status().await {
            Ok(status) => (StatusCode::OK, page(&status)),
            Err(fault) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{fault}\n")),
        },
        (_, "/metrics") => (StatusCode::METHOD_NOT_ALLOWED, String::new()),
        _ => (StatusCode::NOT_FOUND, "metrics are at /metrics\n".to_owned()),
    };
    let mut response = Response::new(Full::new(Bytes::from(text)));
    *response.status_mut() = status;
    response.headers_mut().insert(
        header::CONTENT_TYPE,
        header::HeaderValue::from_static(shipway_daemon::metrics::FORMAT),
    );
    response
}

/// All metrics.
fn page(status: &Status) -> String {
    use Kind::Gauge;
    let mut page = Page::new(PREFIX);
    page.metric("info", Gauge, "The program that runs.");
    page.sample("info", &[("version", &status.version)], 1.0);
    page.metric("snapshots", Gauge, "Names of snapshots.");
    let kinds = &status.snapshots;
    for (kind, count) in
        [("active", kinds.active), ("view", kinds.views), ("committed", kinds.committed)]
    {
        page.sample("snapshots", &[("kind", kind)], count as f64);
    }
    let disk = &status.disk;
    page.one(
        "snapshot_bytes",
        Gauge,
        "What committed snapshots take on the disk.",
        disk.bytes as f64,
    );
    page.one("snapshot_inodes", Gauge, "Inodes of committed snapshots.", disk.inodes as f64);
    page.one(
        "snapshot_directories",
        Gauge,
        "Directories of committed snapshots.",
        disk.directories as f64,
    );
    if let Some(report) = &status.lazy {
        lazy(&mut page, report);
    }
    page.one(
        "credentials",
        Gauge,
        "Repositories that credentials were given for.",
        status.credentials.len() as f64,
    );
    page.text()
}

fn lazy(page: &mut Page, report: &Report) {
    use Kind::{Counter, Gauge, Histogram};
    page.metric("tier_info", Gauge, "The way in which the kernel reads layers that are not whole.");
    page.sample("tier_info", &[("tier", &report.tier)], 1.0);
    page.one("keeper_up", Gauge, "Whether the keeper answers.", f64::from(u8::from(report.keeper)));
    page.one("lazy_bytes", Gauge, "What all layers take on the disk.", report.bytes as f64);
    let totals = &report.totals;
    for (name, help, value) in [
        ("fetched_bytes_total", "Compressed bytes that came from registries.", totals.network),
        ("found_bytes_total", "Bytes that were waited for and found on the disk.", totals.cache),
        ("requests_total", "Requests to registries.", totals.requests),
        ("retries_total", "Requests that repeated earlier ones.", totals.retries),
        ("wrong_answers_total", "Answers whose bytes were wrong.", totals.wrong),
        ("failed_reads_total", "Reads that had to wait, and failed.", totals.failed),
    ] {
        page.one(name, Counter, help, value as f64);
    }
    page.metric("miss_seconds", Histogram, "How long reads waited that had to.");
    page.histogram("miss_seconds", &[], &totals.times, totals.misses, totals.waited);

    // A metric's samples have to be together.
    page.metric("layer_info", Gauge, "A layer: what it is of and how it is mounted.");
    for layer in &report.layers {
        let of = layer.images.first().or(layer.repositories.first()).map_or("", String::as_str);
        let labels = [
            ("layer", &*layer.layer.to_string()),
            ("digest", &layer.digest),
            ("image", of),
            ("state", &layer.state),
            ("mounted", layer.mounted.as_deref().unwrap_or("no")),
            ("tier", layer.tier.as_deref().unwrap_or("none")),
        ];
        page.sample("layer_info", &labels, 1.0);
    }
    type Value = fn(&LayerReport) -> Option<f64>;
    let per_layer: [(&str, Kind, &str, Value); 13] = [
        ("layer_size_bytes", Gauge, "Of a layer's blob.", |l| Some(l.size as f64)),
        ("layer_data_bytes", Gauge, "Of a layer's data.", |l| Some(l.data as f64)),
        ("layer_local_bytes", Gauge, "Of a layer's data on the disk.", |l| Some(l.local as f64)),
        (
            "layer_verified_bytes",
            Gauge,
            "Of it, what was checked since the machine was started.",
            |l| Some(l.verified as f64),
        ),
        ("layer_used", Gauge, "Whether snapshots stand on a layer.", |l| {
            Some(f64::from(u8::from(l.used)))
        }),
        (
            "layer_fetched_bytes_total",
            Counter,
            "Compressed bytes of a layer that came from registries.",
            |l| Some(l.network as f64),
        ),
        (
            "layer_found_bytes_total",
            Counter,
            "Bytes of a layer that were waited for and found on the disk.",
            |l| Some(l.cache as f64),
        ),
        ("layer_requests_total", Counter, "Requests for a layer.", |l| Some(l.requests as f64)),
        (
            "layer_wrong_answers_total",
            Counter,
            "Answers for a layer whose bytes were wrong.",
            |l| Some(l.wrong as f64),
        ),
        (
            "layer_misses_total",
            Counter,
            "Reads of a layer that had to wait, and were served.",
            |l| Some(l.misses as f64),
        ),
        (
            "layer_failed_reads_total",
            Counter,
            "Reads of a layer that had to wait, and failed.",
            |l| Some(l.failed as f64),
        ),
        ("layer_miss_median_seconds", Gauge, "How long half of the reads waited at most.", |l| {
            l.median
        }),
        ("layer_miss_worst_seconds", Gauge, "How long the worst of the reads waited.", |l| {
            Some(l.worst)
        }),
    ];
    for (name, kind, help, value) in per_layer {
        page.metric(name, kind, help);
        for layer in &report.layers {
            if let Some(value) = value(layer) {
                let labels = [("layer", &*layer.layer.to_string()), ("digest", &layer.digest)];
                page.sample(name, &labels, value);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lazy::Totals;
    use std::collections::{BTreeMap, BTreeSet};

    type Samples = BTreeMap<(String, BTreeMap<String, String>), f64>;

    /// Reads a page as the format's grammar has it, and refuses everything else.
    #[track_caller]
    fn parse(page: &str) -> Samples {
        let is_name = |text: &str| {
            text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
                && text.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
        };
        assert!(page.ends_with('\n'));
        let (mut samples, mut types) = (Samples::new(), BTreeMap::new());
        let (mut current, mut helped) = (String::new(), BTreeSet::new());
        for line in page.lines() {
            if let Some(rest) = line.strip_prefix("# HELP ") {
                let (name, _) = rest.split_once(' ').unwrap();
                assert!(helped.insert(name.to_owned()), "{name} twice");
                continue;
            }
            if let Some(rest) = line.strip_prefix("# TYPE ") {
                let (name, kind) = rest.split_once(' ').unwrap();
                assert!(["counter", "gauge", "histogram"].contains(&kind), "{line}");
                assert!(types.insert(name.to_owned(), kind.to_owned()).is_none(), "{name} twice");
                current = name.to_owned();
                continue;
            }
            let (name, rest) = line.split_at(line.find(['{', ' ']).unwrap());
            assert!(is_name(name), "{line}");
            let base = match types[&current].as_str() {
                "histogram" => {
                    ["_bucket", "_sum", "_count"].iter().find_map(|s| name.strip_suffix(s)).unwrap()
                }
                "counter" => {
                    assert!(name.ends_with("_total"), "{line}");
                    name
                }
                _ => name,
            };
            assert_eq!(base, current, "samples of a metric are together, after its type");
            let (mut labels, mut rest) = (BTreeMap::new(), rest.to_owned());
            if let Some(text) = rest.strip_prefix('{') {
                let mut text = text;
                loop {
                    let (label, quoted) = text.split_once("=\"").unwrap();
                    assert!(is_name(label), "{line}");
                    let mut value = String::new();
                    let mut characters = quoted.char_indices();
                    let end = loop {
                        match characters.next().unwrap() {
                            (_, '\\') => value.push(match characters.next().unwrap().1 {
                                'n' => '\n',
                                c @ ('\\' | '"') => c,
                                c => panic!("an escape {c:?} in {line}"),
                            }),
                            (at, '"') => break at,
                            (_, c) => value.push(c),
                        }
                    };
                    assert!(labels.insert(label.to_owned(), value).is_none(), "{line}");
                    text = &quoted[end + 1..];
                    match text.strip_prefix(',') {
                        Some(more) => text = more,
                        None => break,
                    }
                }
                rest = text.strip_prefix('}').unwrap().to_owned();
            }
            let value: f64 = rest.strip_prefix(' ').unwrap().parse().unwrap();
            let key = (name.to_owned(), labels);
            assert!(samples.insert(key, value).is_none(), "a sample twice: {line}");
        }
        assert_eq!(types.keys().collect::<Vec<_>>(), helped.iter().collect::<Vec<_>>());
        samples
    }

    fn get(samples: &Samples, name: &str, labels: &[(&str, &str)]) -> f64 {
        let labels = labels.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        samples[&(format!("{PREFIX}{name}"), labels)]
    }

    fn example() -> Status {
        let layer = |n: u32| LayerReport {
            layer: n,
            digest: format!("sha256:{n}"),
            images: vec!["r.example/\"odd\\\n:1".into()],
            state: "lazy".into(),
            mounted: (n == 1).then(|| "served".into()),
            tier: (n == 1).then(|| "loop".into()),
            verified: 4096,
            misses: 3,
            median: (n == 1).then_some(0.25),
            ..LayerReport::default()
        };
        let totals = Totals {
            network: 1 << 40,
            misses: 4,
            waited: 1.5,
            times: vec![(0.001024, 1), (0.002048, 3)],
            ..Totals::default()
        };
        let report = Report {
            tier: "loop".into(),
            keeper: true,
            totals,
            layers: vec![layer(1), layer(2)],
            ..Report::default()
        };
        Status { version: "1".into(), lazy: Some(report), ..Status::default() }
    }

    #[test]
    fn a_page_is_what_the_grammar_says_and_has_what_the_status_has() {
        let samples = parse(&page(&example()));
        assert_eq!(get(&samples, "keeper_up", &[]), 1.0);
        assert_eq!(get(&samples, "fetched_bytes_total", &[]), (1u64 << 40) as f64);
        for (bound, count) in [("0.001024", 1.0), ("0.002048", 3.0), ("+Inf", 4.0)] {
            assert_eq!(get(&samples, "miss_seconds_bucket", &[("le", bound)]), count);
        }
        assert_eq!(get(&samples, "miss_seconds_sum", &[]), 1.5);
        let first = [("layer", "1"), ("digest", "sha256:1")];
        assert_eq!(get(&samples, "layer_verified_bytes", &first), 4096.0);
        assert_eq!(get(&samples, "layer_miss_median_seconds", &first), 0.25);
        assert!(!samples.keys().any(|(name, labels)| {
            name.ends_with("miss_median_seconds") && labels["layer"] == "2"
        }));
        let info =
            samples.keys().find(|(name, l)| name.ends_with("layer_info") && l["layer"] == "1");
        let labels = &info.unwrap().1;
        assert_eq!(labels["image"], "r.example/\"odd\\\n:1");
        assert_eq!((&*labels["mounted"], &*labels["tier"]), ("served", "loop"));
        parse(&page(&Status::default()));
    }

    #[test]
    fn only_this_machine_may_be_told() {
        for (text, expected) in [
            ("unix:///run/m.sock", Address::Unix("/run/m.sock".into())),
            ("127.0.0.1:9464", Address::Loopback(([127, 0, 0, 1], 9464).into())),
        ] {
            assert_eq!(text.parse::<Address>().unwrap(), expected);
        }
        assert!(matches!("[::1]:1".parse::<Address>(), Ok(Address::Loopback(_))));
        for (text, says) in [
            ("0.0.0.0:9464", "other machines"),
            ("10.0.0.1:9464", "other machines"),
            ("localhost", "not an address"),
            ("unix://run/m.sock", "not an absolute path"),
        ] {
            let fault = text.parse::<Address>().unwrap_err();
            assert!(fault.to_string().contains(says), "{fault}");
        }
    }
}
