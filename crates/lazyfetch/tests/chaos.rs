//! Random reads from two registries that fail at random: what is good is right (layers in memory
//! compare all that is written), all reads end, and nothing is left behind.

#![allow(clippy::unwrap_used)]

mod common;

use common::{Asked, Dice, Keep, Lab, Link, MS, Plan, Reply, Server, Way, plain};
use parking_lot::Mutex;
use shipway_lazyfetch::{Event, Hope, Settings};
use std::time::Duration;

const S: Duration = Duration::from_secs(1);

/// A server that fails `percent` of all requests until some time.
fn bad(seed: u64, percent: u64, until: Duration) -> impl Fn(usize, &Asked) -> Reply + Send + Sync {
    let dice = Mutex::new(Dice(seed));
    move |_: usize, asked: &Asked| {
        let mut dice = dice.lock();
        if asked.at >= until || dice.next() % 100 >= percent {
            return Reply::Right;
        }
        let n = dice.next();
        match n % 11 {
            0 => Reply::Flipped,
            1 => Reply::Short((n % 50_000) as usize),
            2 => Reply::Stall((n % 50_000) as usize),
            3 => Reply::Hang,
            4 => Reply::Late((n % 4000) as u32 * MS),
            5 => Reply::All,
            6 => Reply::Elsewhere,
            7 => Reply::Refuse(Hope::Elsewhere),
            8 => Reply::Refuse(Hope::Soon),
            9 => Reply::Refuse(Hope::After((n % 9) as u32 * S)),
            _ => Reply::Down,
        }
    }
}

#[tokio::test(start_paused = true)]
async fn whatever_happens_all_reads_end_and_nothing_wrong_is_good() {
    for seed in 1..=6u64 {
        let mut dice = Dice(seed * 0x9e37_79b9);
        let files: Vec<u64> = (0..80).map(|_| 1 + dice.next() % 120_000).collect();
        let plan = Plan {
            chunk: 30_000,
            packed: 1 + (seed % 3) as usize,
            gap: seed % 2 * 30_000,
            ..Plan::files(1, files)
        };
        let layer = plan.build();
        let link = Link::new(Way::new(20, 30));
        let servers = [1, 2]
            .map(|n| Server::new(&format!("r{n}"), &layer.blob, &link, bad(seed * n, 40, 100 * S)));
        let memory = 4 << 20;
        let settings = Settings { memory, ..plain() };
        let mut lab = Lab::new(&layer, &[&servers[0], &servers[1]], settings);
        let frames = layer.frames.len();
        lab.fetcher.learned(1, (0..frames).step_by(5).map(|f| layer.blocks_of_frame(f)));
        if seed % 2 == 0 {
            lab.fetcher.background(1, Keep::made(&layer).0);
        }
        let (mut asked, mut answered, mut most) = (0, 0, 0);
        for _ in 0..60 {
            asked += 1;
            let blocks = layer.blocks_of_frame(dice.next() as usize % frames);
            // Each read has its own answer, whether others want the same or not.
            let start = tokio::time::Instant::now();
            let (_, result) = lab.read(blocks.clone()).await;
            answered += 1;
            assert!(start.elapsed() <= 60 * S + 10 * MS, "{:?}", start.elapsed());
            assert_eq!(layer.is_good(blocks), result.is_ok(), "{result:?}");
            most = most.max(lab.fetcher.in_flight());
        }
        assert_eq!(asked, answered);
        // The registries are well again.
        tokio::time::sleep(200 * S).await;
        for frame in 0..frames {
            lab.read(layer.blocks_of_frame(frame)).await.1.unwrap();
        }
        tokio::time::sleep(60 * S).await;
        assert_eq!(lab.fetcher.in_flight(), 0, "seed {seed}");
        assert!(layer.is_good(0..layer.blocks()) && most <= memory, "seed {seed}: {most}");
        // No chunk was written twice, but by the background beside a read.
        let twice = (0..layer.blocks()).filter(|b| layer.written(*b) > 2).count();
        assert_eq!(twice, 0, "seed {seed}");
        while let Ok(event) = lab.events.try_recv() {
            assert!(!matches!(event, Event::Failed { .. }), "seed {seed}: {event:?}");
        }
    }
}
