//! Keepers as processes, on the kernel as it is. As root, for only root mounts.
//!
//! Each test has mounts of its own, which end with it; its keepers are killed with it.

#![allow(clippy::unwrap_used, clippy::disallowed_types)]

mod lab;

use lab::*;
use rustix::{
    fs::{FallocateFlags, fallocate},
    io::Errno,
    process::{Pid, Signal, kill_process},
};
use shipway_keeper::{
    client::{ClientError, Files, News},
    message::FdName,
};
use std::{
    fs::{self, File},
    io::Read,
    os::{
        fd::AsFd,
        unix::{
            fs::FileExt,
            process::{CommandExt, ExitStatusExt},
        },
    },
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

#[test]
fn a_layer_is_listed_and_read_up_to_its_end() {
    let lab = Lab::new();
    let _keeper = lab.start();
    let daemon = lab.connect();
    assert_eq!(lab.names(), Vec::<String>::new());
    let (one, two) = (lab.layer(1, 10, &[]), lab.layer(27, 3, &image(3).0));
    daemon.add(&one);
    daemon.add(&two);
    assert_eq!(lab.names(), ["1.data", "27.data", "27.img"]);
    one.fill(0..10);
    daemon.have(1, 0..10);
    let file = lab.open("1.data");
    let mut whole = Vec::new();
    (&file).read_to_end(&mut whole).unwrap();
    assert_eq!((whole.len(), wrong(1, 0, &whole)), (10 * BLOCK as usize, None));
    let mut end = [0; 9000];
    assert_eq!(file.read_at(&mut end, 9 * BLOCK + 1).unwrap(), 4095);
    assert_eq!(wrong(1, 9 * BLOCK + 1, &end[..4095]), None);
    assert_eq!(file.read_at(&mut end, 10 * BLOCK).unwrap(), 0);
    assert!(File::options().write(true).open(lab.path("1.data")).is_err());
    assert!(File::open(lab.path("2.data")).is_err() && File::open(lab.path("1.img")).is_err());
    let listed = daemon.keeper.list().unwrap();
    assert_eq!(listed.iter().map(|l| (l.n, l.data_blocks)).collect::<Vec<_>>(), [(1, 10), (27, 3)]);
    assert_eq!(listed[1].meta_bytes, fs::metadata(&two.meta_path).unwrap().len());
    // The same once more, another of that number, and none.
    daemon.add(&one);
    let files = |layer: &TestLayer| {
        let all = [&layer.data, &layer.map, &layer.meta].map(|f| f.try_clone().unwrap());
        move |keeper: &shipway_keeper::client::Keeper, n| {
            let [data, map, meta] = all.each_ref().map(AsFd::as_fd);
            keeper.add(n, Files { data, map, meta })
        }
    };
    assert_eq!(files(&two)(&daemon.keeper, 1), Err(ClientError::Refused(Errno::EXIST)));
    two.data.set_len(5).unwrap();
    assert_eq!(files(&two)(&daemon.keeper, 3), Err(ClientError::Refused(Errno::INVAL)));
    daemon.keeper.drop_blocks(1, 0..10).unwrap();
    daemon.keeper.remove(1).unwrap();
    assert_eq!(lab.names(), ["27.data", "27.img"]);
    // Its map may say that they are good, so they are not to be taken away.
    let unknown = daemon.keeper.drop_blocks(1, 0..10);
    assert_eq!(unknown, Err(ClientError::Refused(Errno::NOENT)));
}

#[test]
fn erofs_is_mounted_over_a_layer_in_both_forms() {
    let lab = Lab::new();
    let _keeper = lab.start();
    let daemon = lab.connect();
    let layer = lab.layer(1, 700, &image(700).0);
    daemon.add(&layer);
    let with_device = lab.mount_erofs(&[
        ("source", Some(layer.meta_path.as_path())),
        ("device", Some(lab.path("1.data").as_path())),
        ("ro", None),
    ]);
    let flat = lab.mount_erofs(&[("source", Some(lab.path("1.img").as_path())), ("ro", None)]);
    // Whatever the kernel asks for comes when it asks.
    let server = daemon.serve(&[&layer]);
    for root in [&with_device, &flat] {
        assert_eq!(fs::read_dir(root.root()).unwrap().count(), 1);
        let file = File::open(root.root().join("file")).unwrap();
        let mut middle = [0; 70_000];
        file.read_exact_at(&mut middle, 1_000_000).unwrap();
        assert_eq!(wrong(1, 1_000_000, &middle), None);
        // By somebody who could not open the keeper's files.
        let mut cat = Command::new("cat");
        let read = cat.stdin(Stdio::from(file)).uid(65_534).gid(65_534).output().unwrap();
        assert!(read.status.success(), "{}", String::from_utf8_lossy(&read.stderr));
        assert_eq!(read.stdout.len() as u64, 700 * BLOCK);
        assert_eq!(wrong(1, 0, &read.stdout), None);
    }
    drop((with_device, flat));
    drop(server);
}

#[test]
fn a_read_of_what_is_missing_waits_until_it_is_there() {
    let lab = Lab::new();
    let _keeper = lab.start();
    let daemon = lab.connect();
    let layer = lab.layer(5, 100, &[]);
    daemon.add(&layer);
    layer.fill(0..11);
    daemon.have(5, 0..11);
    let reader = lab.read_in_thread("5.data", 10 * BLOCK + 5, 3 * BLOCK as usize);
    assert_eq!(daemon.news(), News::Miss { n: 5, blocks: 11..14 });
    layer.fill(11..13);
    daemon.have(5, 11..13);
    daemon.keeper.list().unwrap();
    assert!(!reader.is_finished(), "a block is missing");
    layer.fill(13..14);
    daemon.have(5, 13..14);
    assert_eq!(wrong(5, 10 * BLOCK + 5, &reader.join().unwrap().unwrap()), None);
    assert_eq!(daemon.news(), News::Touched { n: 5, block: 10 });
}

#[test]
fn an_error_does_not_stick() {
    let lab = Lab::new();
    let _keeper = lab.start();
    let daemon = lab.connect();
    let layer = lab.layer(5, 100, &image(100).0);
    daemon.add(&layer);
    let mounted = lab.mount_erofs(&[
        ("source", Some(layer.meta_path.as_path())),
        ("device", Some(lab.path("5.data").as_path())),
        ("ro", None),
    ]);
    let file = File::open(mounted.root().join("file")).unwrap();
    let direct = lab.open("5.data");
    let fails = daemon.fail_all();
    assert_eq!(file.read_at(&mut [0; 100], 0).unwrap_err().raw_os_error(), Some(libc::EIO));
    assert_eq!(direct.read_at(&mut [0; 100], 0).unwrap_err().raw_os_error(), Some(libc::EIO));
    let daemon = fails.stop();
    let server = daemon.serve(&[&layer]);
    let mut bytes = [0; 100];
    file.read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!(wrong(5, 0, &bytes), None);
    direct.read_exact_at(&mut bytes, 50_000).unwrap();
    assert_eq!(wrong(5, 50_000, &bytes), None);
    drop(server);
}

#[test]
fn a_reader_that_is_killed_is_let_go() {
    let lab = Lab::new();
    let _keeper = lab.start();
    let daemon = lab.connect();
    let layer = lab.layer(5, 100, &[]);
    daemon.add(&layer);
    let mut reader =
        Command::new("cat").arg(lab.path("5.data")).stdout(Stdio::null()).spawn().unwrap();
    assert!(matches!(daemon.news(), News::Miss { n: 5, .. }));
    reader.kill().unwrap();
    assert_eq!(reader.wait().unwrap().signal(), Some(libc::SIGKILL));
    // Nothing waits any more: the next daemon hears of nothing but of a read that comes now.
    drop(daemon);
    let daemon = lab.connect();
    let other = lab.read_in_thread("5.data", 50 * BLOCK, 100);
    assert_eq!(daemon.news(), News::Miss { n: 5, blocks: 50..51 });
    daemon.keeper.fail(5, 0..100, Errno::IO).unwrap();
    assert!(other.join().unwrap().is_err());
}

#[test]
fn reads_wait_for_a_daemon_and_each_daemon_hears_of_them() {
    let lab = Lab::new();
    let _keeper = lab.start();
    let daemon = lab.connect();
    let layer = lab.layer(5, 100, &[]);
    daemon.add(&layer);
    layer.fill(0..1);
    daemon.have(5, 0..1);
    let first = lab.read_in_thread("5.data", 20 * BLOCK, 100);
    assert_eq!(daemon.news(), News::Miss { n: 5, blocks: 20..21 });
    drop(daemon);
    // Without any daemon: what is there is read, what is not waits.
    let second = lab.read_in_thread("5.data", 30 * BLOCK, 100);
    let mut bytes = [0; 100];
    lab.open("5.data").read_exact_at(&mut bytes, 7).unwrap();
    assert_eq!(wrong(5, 7, &bytes), None);
    let daemon = lab.connect();
    let mut blocks = Vec::new();
    while blocks.len() < 2 {
        match daemon.news() {
            News::Miss { n: 5, blocks: missing } => blocks.push(missing.start),
            News::Touched { .. } => {}
            other => panic!("{other:?}"),
        }
    }
    blocks.sort_unstable();
    assert_eq!(blocks, [20, 30]);
    layer.fill(20..31);
    daemon.have(5, 20..31);
    for (reader, block) in [(first, 20), (second, 30)] {
        assert_eq!(wrong(5, block * BLOCK, &reader.join().unwrap().unwrap()), None);
    }
}

#[test]
fn a_read_that_waits_too_long_fails_and_the_next_does_not() {
    let lab = Lab::new();
    let _keeper = lab.start_with(&[], 50);
    let daemon = lab.connect();
    let layer = lab.layer(5, 100, &[]);
    daemon.add(&layer);
    let file = lab.open("5.data");
    for _ in 0..3 {
        assert_eq!(file.read_at(&mut [0; 10], 0).unwrap_err().raw_os_error(), Some(libc::EIO));
    }
    layer.fill(0..1);
    daemon.have(5, 0..1);
    let mut bytes = [0; 10];
    file.read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!(wrong(5, 0, &bytes), None);
}

/// Readers at random places of two layers, and a daemon that gives what is missing, takes away
/// again what is there, and connects again when the keeper is gone.
struct Load {
    stop: Arc<AtomicBool>,
    reads: Arc<AtomicU64>,
    threads: Vec<std::thread::JoinHandle<()>>,
}

const LAYERS: [u32; 2] = [3, 4];
const LOAD_BLOCKS: u64 = 256;

impl Load {
    #[track_caller]
    fn start(lab: &Arc<Lab>, drops: bool) -> Self {
        let (stop, reads) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let daemon = lab.connect();
        let layers: Vec<TestLayer> =
            LAYERS.map(|n| lab.layer(n, LOAD_BLOCKS, &image(LOAD_BLOCKS).0)).into();
        layers.iter().for_each(|layer| daemon.add(layer));
        let mut threads = Vec::new();
        for number in 0..3u64 {
            let (lab, stop, reads) = (lab.clone(), stop.clone(), reads.clone());
            threads.push(std::thread::spawn(move || {
                let mut dice = Dice(0x5eed + number);
                let files = LAYERS.map(|n| (n, lab.open(&format!("{n}.data"))));
                while !stop.load(Ordering::Relaxed) {
                    let (n, file) = &files[dice.below(2) as usize];
                    let at = dice.below(LOAD_BLOCKS * BLOCK);
                    let size = [100, 5000, 70_000, 400_000][dice.below(4) as usize];
                    let mut bytes = vec![0; size.min(LOAD_BLOCKS * BLOCK - at) as usize];
                    file.read_exact_at(&mut bytes, at).unwrap();
                    assert_eq!(wrong(*n, at, &bytes), None);
                    reads.fetch_add(1, Ordering::Relaxed);
                }
            }));
        }
        let (lab, ended) = (lab.clone(), stop.clone());
        threads.push(std::thread::spawn(move || {
            let mut daemon = daemon;
            let mut dice = Dice(77);
            while !ended.load(Ordering::Relaxed) {
                let done = match daemon.news.recv_timeout(Duration::from_millis(20)) {
                    Ok(News::Gone) => Err(ClientError::Gone),
                    Ok(News::Miss { n, blocks }) => {
                        let layer = layers.iter().find(|l| l.n == n).unwrap();
                        layer.fill(blocks.clone());
                        daemon.keeper.have(n, blocks)
                    }
                    Ok(News::Touched { .. }) | Err(_) => Ok(()),
                };
                let done = done.and_then(|()| {
                    if !drops || dice.below(3) > 0 {
                        return Ok(());
                    }
                    let layer = &layers[dice.below(2) as usize];
                    let start = dice.below(LOAD_BLOCKS);
                    let blocks = start..(start + 1 + dice.below(60)).min(LOAD_BLOCKS);
                    daemon.keeper.drop_blocks(layer.n, blocks.clone())?;
                    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                    let (at, length) = (blocks.start * BLOCK, (blocks.end - blocks.start) * BLOCK);
                    fallocate(&layer.data, flags, at, length).unwrap();
                    Ok(())
                });
                match done {
                    Ok(()) => {}
                    Err(ClientError::Gone) => daemon = lab.connect(),
                    Err(error) => panic!("{error}"),
                }
            }
            // Nobody waits for the last blocks.
            for layer in &layers {
                layer.fill(0..LOAD_BLOCKS);
                while daemon.keeper.have(layer.n, 0..LOAD_BLOCKS).is_err()
                    || daemon.keeper.list().is_err()
                {
                    daemon = lab.connect();
                }
            }
        }));
        Self { stop, reads, threads }
    }

    /// Returns when `more` reads were done, all right so far.
    #[track_caller]
    fn wait_for(&self, more: u64) {
        let (from, until) = (self.reads.load(Ordering::Relaxed), Instant::now() + PATIENCE);
        while self.reads.load(Ordering::Relaxed) < from + more {
            assert!(Instant::now() < until, "stuck after {from} reads");
            assert!(!self.threads.iter().any(|t| t.is_finished()), "a thread failed");
            std::thread::yield_now();
        }
    }

    fn stop(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        let reads = self.reads.load(Ordering::Relaxed);
        self.threads.into_iter().for_each(|thread| thread.join().unwrap());
        reads
    }
}

#[test]
fn fifty_keepers_are_killed_and_no_reader_sees_it() {
    let lab = Arc::new(Lab::new());
    let mut keeper = lab.start();
    let load = Load::start(&lab, true);
    let mut dice = Dice(0xdead);
    for _ in 0..50 {
        load.wait_for(1 + dice.below(20));
        keeper.kill();
        keeper = lab.start();
    }
    load.wait_for(20);
    println!("{} reads over 50 kills", load.stop());
}

#[test]
fn keepers_that_are_told_to_end_leave_everything_to_the_next() {
    let lab = Arc::new(Lab::new());
    let mut keeper = lab.start();
    let load = Load::start(&lab, true);
    for _ in 0..10 {
        load.wait_for(10);
        kill_process(Pid::from_child(&keeper.0), Signal::TERM).unwrap();
        assert!(keeper.0.wait().unwrap().success());
        keeper = lab.start();
    }
    load.wait_for(20);
    println!("{} reads over 10 handovers", load.stop());
}

#[test]
fn blocks_are_dropped_under_readers_and_none_gets_a_hole() {
    let lab = Arc::new(Lab::new());
    let _keeper = lab.start();
    let load = Load::start(&lab, true);
    load.wait_for(1000);
    load.stop();
}

#[test]
fn the_service_manager_holds_what_a_keeper_had() {
    let lab = Lab::new();
    let manager = Manager::new(&lab);
    let mut keeper = lab.start_under(&manager, |_| true);
    let daemon = lab.connect();
    let (one, two) = (lab.layer(1, 10, &[]), lab.layer(2, 10, &image(10).0));
    daemon.add(&one);
    daemon.add(&two);
    let gone = lab.layer(9, 1, &[]);
    daemon.add(&gone);
    daemon.keeper.remove(9).unwrap();
    let names = ["fuse", "l1.data", "l1.map", "l1.meta", "l2.data", "l2.map", "l2.meta", "slots"];
    assert_eq!(manager.names(), names);
    one.fill(0..5);
    daemon.have(1, 0..5);
    let reader = lab.read_in_thread("1.data", 0, 6 * BLOCK as usize);
    while !matches!(daemon.news(), News::Miss { n: 1, .. }) {}
    let file = lab.open("1.data");
    // Both are lost, and the daemon with what it held; the reader waits.
    keeper.kill();
    drop(daemon);
    lab.forget_held();
    let mut keeper = lab.start_under(&manager, |_| true);
    let mut bytes = [0; 100];
    file.read_exact_at(&mut bytes, 4 * BLOCK).unwrap();
    assert_eq!(wrong(1, 4 * BLOCK, &bytes), None);
    let daemon = lab.connect();
    assert_eq!(daemon.keeper.list().unwrap().len(), 2);
    while !matches!(daemon.news(), News::Miss { n: 1, .. }) {}
    one.fill(5..6);
    daemon.have(1, 5..6);
    assert_eq!(wrong(1, 0, &reader.join().unwrap().unwrap()), None);
    // What was not kept is waited for.
    keeper.kill();
    let _keeper = lab.start_under(&manager, |name| !name.starts_with("l1."));
    let reader = std::thread::spawn(move || {
        let mut bytes = [0; 100];
        file.read_exact_at(&mut bytes, 0).map(|()| bytes)
    });
    let daemon = lab.connect();
    assert_eq!(daemon.keeper.list().unwrap().len(), 1);
    daemon.add(&one);
    assert_eq!(wrong(1, 0, &reader.join().unwrap().unwrap()), None);
    daemon.keeper.shut_down().unwrap();
    while daemon.news() != News::Gone {}
    assert_eq!(manager.names(), Vec::<String>::new());
}

#[test]
fn a_daemon_holds_what_a_keeper_had() {
    let lab = Lab::new();
    let mut keeper = lab.start();
    let daemon = lab.connect();
    let layer = lab.layer(8, 10, &[]);
    daemon.add(&layer);
    let all = [FdName::Fuse, FdName::Slots, FdName::Data(8), FdName::Map(8), FdName::Meta(8)];
    assert_eq!(lab.held.names(), all);
    // The next daemon gets it too, with nothing of its own.
    drop(daemon);
    lab.forget_held();
    let daemon = lab.connect();
    daemon.keeper.list().unwrap();
    assert_eq!(lab.held.names(), all);
    // What a daemon has it remember comes back, to the next daemon and the next keeper.
    for word in ["one", "two"] {
        let memory = rustix::fs::memfd_create("memory", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::io::write(&memory, word.as_bytes()).unwrap();
        daemon.keeper.remember(memory.as_fd()).unwrap();
    }
    drop(daemon);
    lab.forget_held();
    let daemon = lab.connect();
    let remembered = || {
        let mut bytes = [0; 3];
        lab.held.memory().unwrap().read_exact_at(&mut bytes, 0).unwrap();
        bytes
    };
    daemon.keeper.list().unwrap();
    assert_eq!(&remembered(), b"two");
    let file = lab.open("8.data");
    keeper.kill();
    while daemon.news() != News::Gone {}
    assert_eq!(daemon.keeper.list(), Err(ClientError::Gone));
    assert_eq!(daemon.keeper.have(8, 0..1), Err(ClientError::Gone));
    let _keeper = lab.start();
    let daemon = lab.connect();
    layer.fill(0..10);
    daemon.have(8, 0..10);
    let mut bytes = [0; 100];
    file.read_exact_at(&mut bytes, 7777).unwrap();
    assert_eq!(wrong(8, 7777, &bytes), None);
    daemon.keeper.remove(8).unwrap();
    daemon.keeper.list().unwrap();
    assert_eq!(lab.held.names(), [FdName::Fuse, FdName::Slots, FdName::Memory]);
    assert_eq!(&remembered(), b"two");
}

#[test]
fn a_connection_that_nobody_holds_is_replaced() {
    let lab = Lab::new();
    let mut keeper = lab.start();
    let daemon = lab.connect();
    daemon.add(&lab.layer(8, 10, &[]));
    keeper.kill();
    drop(daemon);
    lab.forget_held();
    let _keeper = lab.start();
    let daemon = lab.connect();
    assert_eq!(daemon.keeper.list().unwrap(), []);
    assert_eq!(lab.names(), Vec::<String>::new());
    daemon.add(&lab.layer(9, 10, &[]));
    assert_eq!(lab.names(), ["9.data"]);
}

#[test]
fn the_end_is_an_unmounted_file_system() {
    let lab = Lab::new();
    let mut keeper = lab.start();
    let daemon = lab.connect();
    daemon.add(&lab.layer(8, 10, &[]));
    assert!(lab.is_mounted());
    daemon.keeper.shut_down().unwrap();
    assert!(keeper.0.wait().unwrap().success());
    assert!(!lab.is_mounted());
    while daemon.news() != News::Gone {}
    // Told to end with nothing to hand over and nobody to hand it to.
    let mut keeper = lab.start();
    drop(lab.connect());
    assert!(lab.is_mounted());
    kill_process(Pid::from_child(&keeper.0), Signal::TERM).unwrap();
    assert!(keeper.0.wait().unwrap().success());
    assert!(!lab.is_mounted());
}

#[test]
fn messages_that_are_none_are_passed_over() {
    let lab = Lab::new();
    let _keeper = lab.start();
    let raw = lab.connect_raw();
    let mut dice = Dice(0xf00d);
    let layer = lab.layer(1, 10, &[]);
    for round in 0..2000 {
        let mut bytes: Vec<u8> = (0..1 + dice.below(60)).map(|_| dice.next() as u8).collect();
        if round % 2 == 0 {
            // A kind that exists, but not the one that ends it.
            bytes[0] = 1;
            bytes.resize(32, 0);
            bytes[1] = dice.below(9) as u8;
        }
        let fds = if round % 3 == 0 { vec![layer.data.as_fd()] } else { vec![] };
        if send_raw(&raw, &bytes, &fds) == Err(Errno::AGAIN) {
            drain(&raw);
        }
        if round % 64 == 0 {
            drain(&raw);
        }
    }
    drop(raw);
    let daemon = lab.connect();
    daemon.add(&layer);
    layer.fill(0..10);
    daemon.have(1, 0..10);
    let mut bytes = [0; 100];
    lab.open("1.data").read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!(wrong(1, 0, &bytes), None);
}

#[test]
fn a_hundred_layers_fit_into_three_megabytes() {
    let lab = Lab::new();
    let keeper = lab.start();
    let daemon = lab.connect();
    let (meta, _) = image(1000);
    let layers: Vec<TestLayer> = (0..100).map(|n| lab.layer(n, 1000, &meta)).collect();
    layers.iter().for_each(|layer| daemon.add(layer));
    for layer in &layers {
        layer.fill(0..100);
        daemon.have(layer.n, 0..100);
        let mut bytes = vec![0; 100 * BLOCK as usize];
        lab.open(&format!("{}.data", layer.n)).read_exact_at(&mut bytes, 0).unwrap();
        assert_eq!(wrong(layer.n, 0, &bytes), None);
    }
    // Pages of maps of good blocks are the page cache's, those of requests in flight our own.
    let status = fs::read_to_string(format!("/proc/{}/status", keeper.0.id())).unwrap();
    let kilobytes = |name: &str| -> u64 {
        let line = status.lines().find(|l| l.starts_with(name)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    };
    let (anon, shared) = (kilobytes("RssAnon:"), kilobytes("RssShmem:"));
    println!("{anon} kB and {shared} kB shared, of files {} kB", kilobytes("RssFile:"));
    assert!(kilobytes("VmLck:") > 0, "nothing is locked");
    assert!(kilobytes("Seccomp:") == 2, "system calls are not filtered");
    assert!(anon + shared <= 3 << 10, "{status}");
}

#[test]
fn a_system_call_that_no_keeper_makes_is_its_end() {
    let confined =
        Command::new(env!("CARGO_BIN_EXE_keeper-under-test")).arg("confined").output().unwrap();
    assert_eq!(confined.stderr, b"confined\n");
    assert_eq!(confined.status.signal(), Some(libc::SIGSYS));
}

#[test]
fn many_reads_that_wait_hold_nobody_up() {
    let lab = Lab::new();
    let _keeper = lab.start();
    let daemon = lab.connect();
    let layer = lab.layer(5, 1000, &[]);
    daemon.add(&layer);
    layer.fill(0..1);
    daemon.have(5, 0..1);
    let readers: Vec<_> = (1..=300).map(|b| lab.read_in_thread("5.data", b * BLOCK, 10)).collect();
    let mut missed = 0;
    while missed < 300 {
        missed += u32::from(matches!(daemon.news(), News::Miss { .. }));
    }
    let mut bytes = [0; 10];
    lab.open("5.data").read_exact_at(&mut bytes, 0).unwrap();
    layer.fill(0..1000);
    daemon.have(5, 0..1000);
    for (reader, block) in readers.into_iter().zip(1..) {
        assert_eq!(wrong(5, block * BLOCK, &reader.join().unwrap().unwrap()), None);
    }
}
