//! What the snapshotter tells of itself while it works: status, metrics.

#![allow(clippy::unwrap_used)]

use crate::lazy::{lab, status};
use serde_json::Value;
use shipway_estargz::Output;
use shipway_integration::{
    any,
    cri::{Cri, wire},
    lazy::lazy_layer,
    smaps,
};
use shipway_testkit::{BaseImage, Lab, Layer, Process, free_port, run, wait_for};
use std::{
    collections::BTreeMap,
    io::{Read as _, Write as _},
    net::TcpStream,
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

/// busybox and a file, with tables of contents, pulled over CRI and read.
#[track_caller]
fn read_lazily(lab: &Lab) -> String {
    let mut image = BaseImage::busybox();
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("word"), "word".repeat(50_000)).unwrap();
    image.layers.push(Layer::of_dir(dir.path()));
    image.layers = image.layers.iter().map(|l| lazy_layer(l, Output::Estargz)).collect();
    image.push(&lab.registry(), "seen", "1");
    let image = format!("{}/seen:1", lab.registry());
    let id = Some(wire::Id { id: image.clone() });
    let _: wire::Id = Cri::of(lab).call("PullImage", wire::PullImage { image: id });
    let id = format!("seen-{}", std::process::id());
    let words = ["run", "--rm", "--snapshotter", "shipway", &image, &id, "wc", "-c", "/word"];
    assert!(lab.ctr(words).ok().stdout.starts_with("200000 "));
    image
}

/// Head and body of an answer.
fn get(port: u16, path: &str) -> (String, String) {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.to_owned(), body.to_owned())
}

#[test]
fn prometheus_hears_what_the_status_tells() {
    let port = free_port();
    let lab =
        lab(any(), &format!("background = false\n\n[metrics]\n  address = \"127.0.0.1:{port}\"\n"));
    let image = read_lazily(&lab);
    let status = status(&lab);
    let report = &status["lazy"];
    let layers = report["layers"].as_array().unwrap();
    assert_eq!(layers.len(), 2, "{status}");
    for layer in layers {
        assert_eq!(layer["images"], serde_json::json!([image]), "{layer}");
        assert_eq!(layer["mounted"], "served", "{layer}");
        assert_eq!(layer["tier"], report["tier"], "{layer}");
    }
    assert!(report["totals"]["misses"].as_u64().unwrap() > 0, "{report}");
    assert!(report["totals"]["network"].as_u64().unwrap() > 0, "{report}");

    let (head, page) = get(port, "/metrics");
    assert!(head.starts_with("HTTP/1.1 200") && head.contains("version=0.0.4"), "{head}");
    let samples: BTreeMap<&str, f64> = page
        .lines()
        .filter(|line| !line.starts_with('#'))
        .map(|line| line.rsplit_once(' ').unwrap())
        .map(|(name, value)| (name, value.parse().unwrap()))
        .collect();
    let sample = |name: &str| {
        let name = format!("shipway_snapshotter_{name}");
        *samples.get(&*name).unwrap_or_else(|| panic!("no {name} in\n{page}"))
    };
    let told = |value: &Value| value.as_f64().unwrap();
    assert_eq!(sample("keeper_up"), 1.0);
    assert_eq!(sample("fetched_bytes_total"), told(&report["totals"]["network"]));
    assert_eq!(sample("miss_seconds_count"), told(&report["totals"]["misses"]));
    assert_eq!(sample("miss_seconds_bucket{le=\"+Inf\"}"), sample("miss_seconds_count"));
    for layer in layers {
        let labels = format!("{{layer=\"{}\",digest={}}}", layer["layer"], layer["digest"]);
        for (name, field) in [
            ("layer_size_bytes", "size"),
            ("layer_verified_bytes", "verified"),
            ("layer_fetched_bytes_total", "network"),
            ("layer_misses_total", "misses"),
        ] {
            assert_eq!(sample(&format!("{name}{labels}")), told(&layer[field]), "{name} {layer}");
        }
    }
    assert!(get(port, "/").0.starts_with("HTTP/1.1 404"));

    // A layer that is gone from the images is not gone from the sums.
    for name in lab.ctr(["images", "list", "--quiet"]).ok().lines() {
        lab.ctr(["images", "delete", "--sync", name]).ok();
    }
    wait_for("the layers to be given up", Duration::from_secs(20), || {
        let status = self::status(&lab);
        let layers = status["lazy"]["layers"].as_array().unwrap();
        let used = layers.iter().any(|layer| layer["used"] == true || layer["requests"] != 0);
        if used { Err(status.to_string()) } else { Ok(()) }
    });
    let text = run(lab.snapshotter_command().arg("status")).ok().stdout;
    assert!(text.contains("lazy       by way of "), "{text}");
    let (_, page) = get(port, "/metrics");
    let fetched = page.lines().find(|l| l.starts_with("shipway_snapshotter_fetched_bytes_total "));
    let fetched: f64 = fetched.unwrap().rsplit_once(' ').unwrap().1.parse().unwrap();
    assert!(fetched >= told(&report["totals"]["network"]), "{page}");
}

fn wait_for_text(path: &Path, what: &str, found: impl Fn(&str) -> bool) -> String {
    wait_for(what, Duration::from_secs(30), || {
        let bytes = std::fs::read(path).unwrap_or_default();
        let text = String::from_utf8_lossy(&bytes).into_owned();
        if found(&text) { Ok(text) } else { Err(text) }
    })
}

#[test]
fn the_status_is_watched_until_ctrl_c() {
    let mut lab = lab(any(), "");
    // Into a file: an object on each line, over a restart of who is asked.
    let log = lab.dir().join("watched");
    let mut watch = lab.snapshotter_command();
    watch.args(["status", "--json", "--watch"]);
    let mut process = Process::start("status", &mut watch, &log);
    wait_for_text(&log, "two objects", |text| text.matches("\"version\"").count() >= 2);
    lab.kill_snapshotter();
    wait_for_text(&log, "an error", |text| text.contains("ask the snapshotter"));
    lab.start_snapshotter();
    let before = std::fs::read_to_string(&log).unwrap().matches("\"version\"").count();
    let text =
        wait_for_text(&log, "another object", |text| text.matches("\"version\"").count() > before);
    for line in text.lines().filter(|line| line.starts_with('{')) {
        let status: Value = serde_json::from_str(line).unwrap();
        assert_eq!(status["snapshots"]["active"], 0);
    }
    process.signal(rustix::process::Signal::INT);
    wait_for("the command to end", Duration::from_secs(10), || match process.alive() {
        Err(ended) if ended.contains("ExitStatus(unix_wait_status(0))") => Ok(()),
        state => Err(format!("{state:?}")),
    });

    // On a terminal: drawn over what was there, and left as it was.
    let screen = lab.dir().join("screen");
    // A shell that stays between would get Ctrl-C, too, and some give their own end as the result.
    let command = format!("exec {:?} status --watch", lab.snapshotter_command()).replace('"', "'");
    let mut terminal = Command::new("script")
        .args(["--quiet", "--flush", "--return", "--command", &command])
        .arg(&screen)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    wait_for_text(&screen, "two drawings", |text| text.matches("\x1b[Hversion").count() >= 2);
    // What the terminal makes of Ctrl-C is up to the terminal.
    terminal.stdin.as_mut().unwrap().write_all(b"\x03").unwrap();
    wait_for("the command to end", Duration::from_secs(10), || {
        terminal.try_wait().unwrap().map(|_| ()).ok_or_else(|| "it runs".to_owned())
    });
    let drawn = std::fs::read_to_string(&screen).unwrap();
    let (start, end) = (drawn.find("\x1b[?1049h"), drawn.rfind("\x1b[?1049l"));
    assert!(start.unwrap() < end.unwrap(), "{drawn:?}");
    assert!(terminal.wait().unwrap().success(), "{drawn:?}");
}

/// The keeper of the lab and what holds its state, with the programs that they are.
fn keepers(lab: &Lab) -> Vec<(u32, String)> {
    let run = lab.dir().join("run").display().to_string();
    let entries = std::fs::read_dir("/proc").unwrap().flatten();
    let pids = entries.filter_map(|e| e.file_name().to_str()?.parse::<u32>().ok());
    let is_keeper = |pid: u32| {
        let bytes = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        let words: Vec<&str> = bytes.split(|b| *b == 0).flat_map(std::str::from_utf8).collect();
        words.windows(2).any(|w| w[0] == "--run" && w[1] == run).then_some(())?;
        let program = std::fs::read_link(format!("/proc/{pid}/exe")).ok()?;
        Some((pid, program.file_name()?.to_str()?.to_owned()))
    };
    pids.filter_map(is_keeper).collect()
}

#[test]
fn little_stays_in_memory_with_a_hundred_layers_mounted() {
    const LAYERS: usize = 100;
    let mut lab = lab(any(), "background = false\nfind_profiles = false\n");
    let keepers = keepers(&lab);
    let programs: Vec<&str> = keepers.iter().map(|(_, program)| program.as_str()).collect();
    assert_eq!(programs, ["shipway-keeper"; 2], "is it built?");
    let snapshotter = lab.snapshotter().pid();
    // What is theirs alone: how much of a program is in memory depends on how it was built.
    let private = || {
        let pids = keepers.iter().map(|(pid, _)| *pid).chain([snapshotter]);
        pids.map(|pid| smaps(pid, "Anonymous") + smaps(pid, "Pss_Shmem")).sum::<u64>()
    };
    let idle = private();
    let mut image = BaseImage::busybox();
    for n in 1..LAYERS {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("data")).unwrap();
        std::fs::write(dir.path().join(format!("data/{n}")), format!("{n}\n")).unwrap();
        image.layers.push(Layer::of_dir(dir.path()));
    }
    image.layers = image.layers.iter().map(|l| lazy_layer(l, Output::Estargz)).collect();
    image.push(&lab.registry(), "many", "1");
    let image = format!("{}/many:1", lab.registry());
    let id = Some(wire::Id { id: image.clone() });
    let _: wire::Id = Cri::of(&lab).call("PullImage", wire::PullImage { image: id });
    let id = format!("many-{}", std::process::id());
    let words = ["run", "--rm", "--snapshotter", "shipway", &image, &id, "sh", "-c"];
    let sum = lab.ctr(words.into_iter().chain(["cat /data/* | wc -l"])).ok().stdout;
    assert_eq!(sum.trim(), (LAYERS - 1).to_string());
    let status = status(&lab);
    let layers = status["lazy"]["layers"].as_array().unwrap();
    let served = layers.iter().filter(|layer| layer["mounted"] == "served").count();
    assert_eq!(served, LAYERS, "{status}");
    assert!(idle <= 8 << 10, "{idle} KiB");
    // What a hundred tables of contents at once took goes back within some seconds.
    wait_for("little to stay in memory", Duration::from_secs(40), || {
        let (mounted, own) = (private(), smaps(snapshotter, "Rss"));
        eprintln!("{idle} KiB idle, {mounted} KiB with {LAYERS} layers; resident {own} KiB");
        if mounted <= 25 << 10 { Ok(()) } else { Err(format!("{mounted} KiB")) }
    });
    for (pid, program) in &keepers {
        let rss = smaps(*pid, "Rss");
        eprintln!("{program}: {rss} KiB");
        assert!(rss <= 8 << 10, "{program}: {rss} KiB");
    }
}
