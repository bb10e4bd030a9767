//! Each way in which a registry can fail, and what becomes of a read then.

#![allow(clippy::unwrap_used)]

mod common;

use common::{Asked, Lab, Layer, Link, MS, Plan, Reply, Server, Way, plain};
use shipway_fault::Code;
use shipway_lazyfetch::Hope;
use std::{sync::Arc, time::Duration};

const S: Duration = Duration::from_secs(1);
const WAY: Way =
    Way { rtt: Duration::from_millis(20), rate: 30e6, fair: true, busy: Duration::ZERO };

fn layer() -> Arc<Layer> {
    Plan::files(1, [100_000; 10]).build()
}

/// One read with one server: how long it took, and the requests.
async fn one(
    script: impl Fn(usize, &Asked) -> Reply + Send + Sync + 'static,
) -> (Duration, Result<(), Code>, Vec<Asked>) {
    let layer = layer();
    let server = Server::new("r.io", &layer.blob, &Link::new(WAY), script);
    let mut lab = Lab::new(&layer, &[&server], plain());
    // In the middle, so that there is something before it.
    let (took, result) = lab.read(layer.blocks_of_frame(5)).await;
    assert_eq!(layer.is_good(layer.blocks_of_frame(5)), result.is_ok());
    // What was on its way at the deadline ends as well.
    tokio::time::sleep(20 * S).await;
    assert_eq!(lab.fetcher.in_flight(), 0);
    (took, result.map_err(|f| f.code()), server.asked())
}

/// What is wrong once is asked for again, and how soon.
#[tokio::test(start_paused = true)]
async fn what_fails_once_is_asked_for_again() {
    let ms = |n: u32| n * MS;
    for (what, reply, fresh, least, most) in [
        ("nothing", Reply::Right, false, ms(20), ms(40)),
        ("flipped", Reply::Flipped, true, ms(60), ms(150)),
        ("short", Reply::Short(50_000), false, ms(60), ms(150)),
        ("empty", Reply::Short(0), false, ms(50), ms(150)),
        ("stall", Reply::Stall(20_000), false, 10 * S, 10 * S + ms(200)),
        ("stall at once", Reply::Stall(0), false, 10 * S, 10 * S + ms(200)),
        ("drip", Reply::Drip, false, 10 * S, 12 * S),
        ("hang", Reply::Hang, false, 5 * S, 5 * S + ms(200)),
        ("all", Reply::All, false, ms(20), ms(80)),
        ("other range", Reply::Elsewhere, false, ms(60), ms(150)),
        ("refusal", Reply::Refuse(Hope::Elsewhere), false, ms(60), ms(150)),
        ("500", Reply::Refuse(Hope::Soon), false, ms(60), ms(150)),
        ("429", Reply::Refuse(Hope::After(7 * S)), false, 7 * S, 7 * S + ms(100)),
        ("no connection", Reply::Down, false, ms(40), ms(150)),
    ] {
        let script = move |n: usize, _: &Asked| if n == 0 { reply.clone() } else { Reply::Right };
        let (took, result, asked) = one(script).await;
        assert_eq!(result, Ok(()), "{what}");
        assert!(took >= least && took <= most, "{what}: {took:?}");
        let again = asked.get(1).map(|a| a.fresh);
        let served = matches!(what, "nothing" | "all");
        assert_eq!(
            (asked.len(), again),
            if served { (1, None) } else { (2, Some(fresh)) },
            "{what}"
        );
        assert!(asked.iter().all(|a| a.range == asked[0].range), "{what}: {asked:?}");
    }
}

/// What is wrong for ever fails at the deadline, or at once where time does not help.
#[tokio::test(start_paused = true)]
async fn what_fails_for_ever_fails_at_the_deadline() {
    for (what, reply, code, least, most, tries) in [
        ("flipped", Reply::Flipped, Code::DataLoss, 60 * S, 61 * S, 10..30),
        ("hang", Reply::Hang, Code::DeadlineExceeded, 60 * S, 61 * S, 5..13),
        ("stall", Reply::Stall(5000), Code::DeadlineExceeded, 60 * S, 61 * S, 4..8),
        ("500", Reply::Refuse(Hope::Soon), Code::Unavailable, 60 * S, 61 * S, 10..30),
        ("down", Reply::Down, Code::Unavailable, 60 * S, 61 * S, 10..30),
        ("429", Reply::Refuse(Hope::After(3600 * S)), Code::Unavailable, 60 * S, 61 * S, 1..2),
        ("404", Reply::Refuse(Hope::Elsewhere), Code::Unavailable, MS, S, 2..3),
    ] {
        let script = move |_: usize, _: &Asked| reply.clone();
        let (took, result, asked) = one(script).await;
        assert_eq!(result, Err(code), "{what}");
        assert!(took >= least && took <= most, "{what}: {took:?}");
        assert!(tries.contains(&asked.len()), "{what}: {}", asked.len());
    }
}

#[tokio::test(start_paused = true)]
async fn an_outage_of_thirty_seconds_is_waited_out_and_what_is_local_does_not_notice() {
    let layer = layer();
    let down = |_: usize, asked: &Asked| {
        if (S..31 * S).contains(&asked.at) { Reply::Down } else { Reply::Right }
    };
    let server = Server::new("r.io", &layer.blob, &Link::new(WAY), down);
    let mut lab = Lab::new(&layer, &[&server], plain());
    lab.read(layer.blocks_of_frame(0)).await.1.unwrap();
    tokio::time::sleep(S).await;
    for frame in 1..9 {
        lab.fetcher.miss(1, layer.blocks_of_frame(frame));
    }
    let (took, result) = lab.read(layer.blocks_of_frame(0)).await;
    assert!(result.is_ok() && took < MS, "{took:?}");
    let (took, result) = lab.read(layer.blocks_of_frame(9)).await;
    assert!(result.is_ok() && took > 25 * S && took < 40 * S, "{took:?}");
    tokio::time::sleep(10 * S).await;
    assert!(layer.is_good(0..layer.blocks()));
    // Each missed frame was tried a few times, not without pause.
    assert!(server.asked().len() < 150, "{}", server.asked().len());
}

/// A read that failed leaves nothing behind: the next one begins anew.
#[tokio::test(start_paused = true)]
async fn the_next_read_heals() {
    let layer = layer();
    let wrong =
        |_: usize, asked: &Asked| if asked.at < 60 * S { Reply::Flipped } else { Reply::Right };
    let server = Server::new("r.io", &layer.blob, &Link::new(WAY), wrong);
    let mut lab = Lab::new(&layer, &[&server], plain());
    let blocks = layer.blocks_of_frame(3);
    let (_, failed) = lab.read(blocks.clone()).await;
    assert!(failed.unwrap_err().to_string().contains("expected sha256:"));
    assert_eq!(layer.written(blocks.start), 0);
    let (took, result) = lab.read(blocks.clone()).await;
    assert!(result.is_ok() && took < S, "{took:?}");
    assert_eq!(layer.written(blocks.start), 1);
    // It is counted after it was told.
    tokio::time::sleep(MS).await;
    let counters = lab.counters();
    assert_eq!((counters.misses, counters.failed), (1, 1));
    assert!(counters.wrong >= 5 && counters.last_error.is_some());
}

#[tokio::test(start_paused = true)]
async fn a_full_disk_fails_at_once() {
    let layer = layer();
    let server = Server::good(&layer.blob, WAY);
    let mut lab = Lab::new(&layer, &[&server], plain());
    layer.disk_full.store(true, std::sync::atomic::Ordering::SeqCst);
    let (took, result) = lab.read(layer.blocks_of_frame(0)).await;
    assert_eq!(result.unwrap_err().code(), Code::ResourceExhausted);
    assert!(took < S);
    layer.disk_full.store(false, std::sync::atomic::Ordering::SeqCst);
    lab.read(layer.blocks_of_frame(0)).await.1.unwrap();
}

/// Another source is asked without delay, and the one that fails is left alone.
#[tokio::test(start_paused = true)]
async fn another_source_takes_over() {
    for (what, reply, most) in [
        ("flipped", Reply::Flipped, 100 * MS),
        ("404", Reply::Refuse(Hope::Elsewhere), 100 * MS),
        ("429", Reply::Refuse(Hope::After(3600 * S)), 100 * MS),
        ("500", Reply::Refuse(Hope::Soon), 100 * MS),
        ("down", Reply::Down, 100 * MS),
        ("hang", Reply::Hang, 6 * S),
        ("short", Reply::Short(3), 100 * MS),
    ] {
        let layer = layer();
        let script = move |_: usize, _: &Asked| reply.clone();
        let bad = Server::new("mirror", &layer.blob, &Link::new(WAY), script);
        let good = Server::new("origin", &layer.blob, &Link::new(WAY), |_, _| Reply::Right);
        let mut lab = Lab::new(&layer, &[&bad, &good], plain());
        let (took, result) = lab.read(layer.blocks_of_frame(0)).await;
        assert!(result.is_ok() && took < most, "{what}: {took:?}");
        for frame in 1..9 {
            lab.read(layer.blocks_of_frame(frame)).await.1.unwrap();
        }
        assert_eq!((bad.asked().len(), good.asked().len()), (1, 9), "{what}");
    }
}

/// A second request is sent when the first is silent for much longer than usual.
#[tokio::test(start_paused = true)]
async fn silence_is_hedged() {
    let layer = layer();
    let slow = |n: usize, _: &Asked| if n == 4 { Reply::Late(4 * S) } else { Reply::Right };
    let server = Server::new("r.io", &layer.blob, &Link::new(WAY), slow);
    let mut lab = Lab::new(&layer, &[&server], plain());
    for frame in 0..4 {
        lab.read(layer.blocks_of_frame(frame)).await.1.unwrap();
    }
    let (took, result) = lab.read(layer.blocks_of_frame(4)).await;
    assert!(result.is_ok() && took < 200 * MS, "{took:?}");
    assert_eq!(server.asked().len(), 6);
    assert_eq!(lab.counters().retries, 1);
}

/// A server that does not know ranges is only usable near the start of a blob.
#[tokio::test(start_paused = true)]
async fn a_server_without_ranges_is_not_read_for_ever() {
    let layer = Plan::files(1, [1 << 20; 8]).build();
    let server = Server::new("r.io", &layer.blob, &Link::new(WAY), |_, _| Reply::All);
    let mut lab = Lab::new(&layer, &[&server], plain());
    lab.read(layer.blocks_of_frame(2)).await.1.unwrap();
    let (_, result) = lab.read(layer.blocks_of_frame(7)).await;
    assert!(result.unwrap_err().to_string().contains("does not know ranges"));
    // What came before the wanted bytes, and no more than was on its way after them.
    let received = lab.counters().network;
    assert!(received < 2 << 20, "{received}");
}

/// A mirror that does not have the blob does not make an outage of the registry final.
#[tokio::test(start_paused = true)]
async fn a_refusal_of_one_source_does_not_end_the_hope_for_another() {
    let layer = layer();
    let mirror =
        Server::new("mirror", &layer.blob, &Link::new(WAY), |_, _| Reply::Refuse(Hope::Elsewhere));
    let down = |_: usize, asked: &Asked| if asked.at < 30 * S { Reply::Down } else { Reply::Right };
    let origin = Server::new("origin", &layer.blob, &Link::new(WAY), down);
    let mut lab = Lab::new(&layer, &[&mirror, &origin], plain());
    let (took, result) = lab.read(layer.blocks_of_frame(0)).await;
    assert!(result.is_ok() && took > 30 * S && took < 45 * S, "{took:?}: {result:?}");
}

/// A registry that wants to be left alone is not asked by other reads either.
#[tokio::test(start_paused = true)]
async fn a_registry_that_limits_its_clients_is_left_alone() {
    let layer = layer();
    let busy = |_: usize, asked: &Asked| {
        if asked.at < 20 * S { Reply::Refuse(Hope::After(20 * S)) } else { Reply::Right }
    };
    let server = Server::new("r.io", &layer.blob, &Link::new(WAY), busy);
    let mut lab = Lab::new(&layer, &[&server], plain());
    lab.fetcher.miss(1, layer.blocks_of_frame(0));
    tokio::time::sleep(S).await;
    for frame in 1..9 {
        lab.fetcher.miss(1, layer.blocks_of_frame(frame));
        tokio::time::sleep(S).await;
    }
    let (took, result) = lab.read(layer.blocks_of_frame(9)).await;
    assert!(result.is_ok() && took > 10 * S && took < 13 * S, "{took:?}");
    assert!(server.asked().iter().filter(|a| a.at < 20 * S).count() == 1);
}

/// It counts its clients' requests, whatever layer they are for; another registry is not it.
#[tokio::test(start_paused = true)]
async fn a_registry_that_limits_its_clients_is_left_alone_by_all_layers() {
    let layers = [1, 2, 3].map(|number| Plan::files(number, [50_000; 4]).build());
    let busy = |_: usize, asked: &Asked| {
        if asked.at < 20 * S { Reply::Refuse(Hope::After(20 * S)) } else { Reply::Right }
    };
    let link = Link::new(WAY);
    let first = Server::new("r.io", &layers[0].blob, &link, busy);
    let second = Server::new("r.io", &layers[1].blob, &link, busy);
    let other = Server::new("other.io", &layers[2].blob, &link, |_, _| Reply::Right);
    let mut lab = Lab::new(&layers[0], &[&first], plain());
    lab.fetcher.add(layers[1].spec(common::sources(&[&second])));
    lab.fetcher.add(layers[2].spec(common::sources(&[&other])));
    lab.fetcher.miss(1, layers[0].blocks_of_frame(0));
    tokio::time::sleep(S).await;
    lab.fetcher.miss(2, layers[1].blocks_of_frame(0));
    lab.fetcher.background(2, common::Keep::made(&layers[1]).0);
    lab.fetcher.miss(3, layers[2].blocks_of_frame(0));
    tokio::time::sleep(S).await;
    assert!(layers[2].is_good(layers[2].blocks_of_frame(0)));
    assert_eq!((first.asked().len(), second.asked().len()), (1, 0));
    lab.whole().await.unwrap();
    assert!(second.asked().iter().all(|asked| asked.at >= 20 * S), "{:?}", second.asked());
}

/// Nobody is left alone for years because it said so once.
#[tokio::test(start_paused = true)]
async fn a_registry_is_asked_again_after_ten_minutes() {
    let layer = layer();
    let busy = |n: usize, _: &Asked| match n {
        0 => Reply::Refuse(Hope::After(S * u32::MAX)),
        _ => Reply::Right,
    };
    let server = Server::new("r.io", &layer.blob, &Link::new(WAY), busy);
    let mut lab = Lab::new(&layer, &[&server], plain());
    lab.read(layer.blocks_of_frame(0)).await.1.unwrap_err();
    tokio::time::sleep(601 * S).await;
    lab.read(layer.blocks_of_frame(1)).await.1.unwrap();
}

/// What was on the disk before the boot is checked and not fetched, whatever the registry does;
/// what is wrong there is fetched.
#[tokio::test(start_paused = true)]
async fn what_is_on_the_disk_is_not_fetched() {
    let layer = layer();
    let mut claimed = layer.data.clone();
    claimed[(layer.blocks_of_frame(3).start * common::BLOCK) as usize] ^= 1;
    *layer.claimed.lock() = Some(claimed);
    let script = |n: usize, _: &Asked| if n == 0 { Reply::Right } else { Reply::Down };
    let server = Server::new("r.io", &layer.blob, &Link::new(WAY), script);
    let mut lab = Lab::new(&layer, &[&server], plain());
    lab.fetcher.learned(1, [layer.blocks_of_frame(7)]);
    for frame in 0..10 {
        let (took, result) = lab.read(layer.blocks_of_frame(frame)).await;
        assert!(result.is_ok() && (took < MS) == (frame != 3), "{frame}: {took:?}");
    }
    tokio::time::sleep(MS).await;
    let counters = lab.counters();
    assert_eq!((server.asked().len(), counters.misses, counters.requests), (1, 10, 1));
    assert!(counters.local >= 900_000 && counters.network < 101_000, "{counters:?}");
}

/// The background goes on after what breaks it, gives up when there is no hope, and begins anew.
#[tokio::test(start_paused = true)]
async fn the_background_survives_what_passes() {
    for (what, reply, ok) in [
        ("short", Reply::Short(5000), true),
        ("stall", Reply::Stall(5000), true),
        ("down", Reply::Down, true),
        ("refused", Reply::Refuse(Hope::Elsewhere), true),
        ("429", Reply::Refuse(Hope::After(30 * S)), true),
        ("flipped", Reply::Flipped, false),
    ] {
        let layer = layer();
        let script =
            move |n: usize, _: &Asked| if n % 3 == 1 { reply.clone() } else { Reply::Right };
        let server = Server::new("r.io", &layer.blob, &Link::new(WAY), script);
        let mut lab = Lab::new(&layer, &[&server], plain());
        let (keep, kept) = common::Keep::made(&layer);
        lab.fetcher.background(1, keep);
        let result = lab.whole().await;
        assert_eq!(result.is_ok(), ok, "{what}: {result:?}");
        assert!(kept.lock().len() == layer.blob.len(), "{what}");
        assert_eq!(lab.fetcher.in_flight(), 0, "{what}");
        assert!(layer.is_good(0..layer.blocks()) == ok, "{what}");
    }
    for (reply, code) in
        [(Reply::Refuse(Hope::Elsewhere), Code::Unavailable), (Reply::All, Code::Unavailable)]
    {
        let layer = Plan::files(1, [1 << 20; 10]).build();
        let script = move |_: usize, asked: &Asked| {
            if asked.range.start < 5 << 20 { Reply::Right } else { reply.clone() }
        };
        let server = Server::new("r.io", &layer.blob, &Link::new(WAY), script);
        let mut lab = Lab::new(&layer, &[&server], plain());
        lab.fetcher.background(1, common::Keep::made(&layer).0);
        assert_eq!(lab.whole().await.unwrap_err().code(), code);
        tokio::time::sleep(20 * S).await;
        assert_eq!(lab.fetcher.in_flight(), 0);
    }
}

/// Takes a blob that is no layer.
fn taken(
    layer: &Arc<Layer>,
) -> (Box<dyn shipway_lazyfetch::Whole>, Arc<parking_lot::Mutex<Vec<u8>>>) {
    let (make, kept) = common::Keep::made(layer);
    (make(Arc::new(drop)), kept)
}

/// A blob that somebody waits for comes in spite of what passes, begins at once, and fails soon if
/// there is no hope.
#[tokio::test(start_paused = true)]
async fn what_is_pulled_comes_or_fails() {
    for (what, reply, ok) in [
        ("right", Reply::Right, true),
        ("short", Reply::Short(5000), true),
        ("stall", Reply::Stall(5000), true),
        ("refused", Reply::Refuse(Hope::Elsewhere), true),
        ("flipped", Reply::Flipped, false),
    ] {
        let layer = layer();
        let script =
            move |n: usize, _: &Asked| if n % 3 == 1 { reply.clone() } else { Reply::Right };
        let server = Server::new("r.io", &layer.blob, &Link::new(WAY), script);
        let mut lab = Lab::new(&layer, &[&server], plain());
        // Somebody has just read.
        lab.read(layer.blocks_of_frame(2)).await.1.unwrap();
        let before = lab.counters().network;
        let (whole, kept) = taken(&layer);
        let start = tokio::time::Instant::now();
        let sources = common::sources(&[&server]);
        let blob = shipway_lazyfetch::Blob { digest: layer.digest, size: layer.blob.len() as u64 };
        let (counters, result) = lab.fetcher.pull(blob, sources, whole).await;
        assert_eq!(result.is_ok(), ok, "{what}: {result:?}");
        assert_eq!(*kept.lock() == layer.blob, ok, "{what}");
        assert!(what != "right" || start.elapsed() < S, "{:?}", start.elapsed());
        assert!(counters.network >= blob.size, "{counters:?}");
        assert_eq!((lab.fetcher.in_flight(), lab.counters().network), (0, before), "{what}");
    }
    for reply in [Reply::Refuse(Hope::Elsewhere), Reply::Down] {
        let layer = Plan::files(1, [1 << 20; 10]).build();
        let script = move |_: usize, asked: &Asked| {
            if asked.range.start < 5 << 20 { Reply::Right } else { reply.clone() }
        };
        let server = Server::new("r.io", &layer.blob, &Link::new(WAY), script);
        let lab = Lab::new(&layer, &[&server], plain());
        let blob = shipway_lazyfetch::Blob { digest: layer.digest, size: layer.blob.len() as u64 };
        let start = tokio::time::Instant::now();
        let (_, result) =
            lab.fetcher.pull(blob, common::sources(&[&server]), taken(&layer).0).await;
        assert_eq!(result.unwrap_err().code(), Code::Unavailable);
        assert!(start.elapsed() < 60 * S, "{:?}", start.elapsed());
        tokio::time::sleep(20 * S).await;
        assert_eq!(lab.fetcher.in_flight(), 0);
    }
}

/// Nothing is asked for after the one who waited has gone.
#[tokio::test(start_paused = true)]
async fn what_nobody_waits_for_is_not_pulled() {
    let layer = Plan::files(1, [1 << 20; 40]).build();
    let server = Server::good(&layer.blob, WAY);
    let lab = Lab::new(&layer, &[&server], plain());
    let blob = shipway_lazyfetch::Blob { digest: layer.digest, size: layer.blob.len() as u64 };
    let work = lab.fetcher.pull(blob, common::sources(&[&server]), taken(&layer).0);
    assert!(tokio::time::timeout(100 * MS, work).await.is_err());
    let asked = server.asked().len();
    assert!(asked > 0);
    tokio::time::sleep(60 * S).await;
    assert_eq!((server.asked().len(), lab.fetcher.in_flight()), (asked, 0));
}

/// What somebody waits for may come by the background first: then it was served, and the request
/// for it is not repeated.
#[tokio::test(start_paused = true)]
async fn a_read_is_served_by_the_background_as_well() {
    let layer = layer();
    let frame = &layer.frames[7];
    let wanted = frame.offset..frame.offset + frame.len;
    let hangs = move |_: usize, asked: &Asked| {
        if asked.range == wanted { Reply::Hang } else { Reply::Right }
    };
    let server = Server::new("r.io", &layer.blob, &Link::new(WAY), hangs);
    let mut lab = Lab::new(&layer, &[&server], plain());
    lab.fetcher.background(1, common::Keep::made(&layer).0);
    tokio::time::sleep(MS).await;
    let (took, result) = lab.read(layer.blocks_of_frame(7)).await;
    assert!(result.is_ok() && took < 200 * MS, "{took:?}");
    tokio::time::sleep(MS).await;
    assert_eq!(lab.counters().misses, 1);
    let asked = server.asked().len();
    tokio::time::sleep(20 * S).await;
    assert_eq!((lab.counters().retries, lab.fetcher.in_flight()), (0, 0));
    assert!(server.asked().len() < asked + 10);
}

/// A layer that is removed in the middle of everything leaves nothing behind.
#[tokio::test(start_paused = true)]
async fn a_removed_layer_leaves_nothing() {
    let layer = Plan::files(1, [200_000; 40]).build();
    let server = Server::good(&layer.blob, WAY);
    let mut lab = Lab::new(&layer, &[&server], plain());
    lab.fetcher.background(1, common::Keep::made(&layer).0);
    lab.fetcher.learned(1, (0..30).map(|f| layer.blocks_of_frame(f)));
    lab.fetcher.miss(1, layer.blocks_of_frame(35));
    lab.fetcher.miss(1, layer.blocks_of_frame(3));
    tokio::time::sleep(30 * MS).await;
    assert!(lab.fetcher.in_flight() > 0);
    lab.fetcher.remove(1);
    tokio::time::sleep(S).await;
    assert_eq!(lab.fetcher.in_flight(), 0);
    let asked = server.asked().len();
    tokio::time::sleep(60 * S).await;
    assert_eq!(server.asked().len(), asked);
    while let Ok(event) = lab.events.try_recv() {
        assert!(matches!(event, shipway_lazyfetch::Event::Progress { .. }), "{event:?}");
    }
    // Its number is free for another one.
    lab.fetcher.add(layer.spec(common::sources(&[&server])));
    lab.read(layer.blocks_of_frame(39)).await.1.unwrap();
    let (_, unknown) = {
        lab.fetcher.remove(1);
        lab.read(0..1).await
    };
    assert!(unknown.unwrap_err().is_not_found());
}
