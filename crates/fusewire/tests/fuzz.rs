//! Any bytes are a request or an error. The seed is fixed unless time is given.

use shipway_fusewire::{Operation, Request};
use std::time::{Duration, Instant, SystemTime};

/// Rounds when no time is given.
const ROUNDS: usize = 200_000;

#[test]
fn any_bytes_are_a_request_or_an_error() {
    let time = std::env::var("SHIPWAY_FUZZ_SECONDS")
        .ok()
        .and_then(|n| n.parse().ok())
        .map(|n| Duration::from_secs(n) / 6);
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(1, |d| d.as_secs());
    let mut state = if time.is_some() { now | 1 } else { 0x5eed_f05e };
    println!("seed {state}");
    let mut next = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let started = Instant::now();
    let (mut requests, mut forgotten) = (0, 0);
    for round in 0.. {
        if time.map_or(round >= ROUNDS, |time| started.elapsed() >= time) {
            break;
        }
        let length = (next() % 200) as usize;
        let mut bytes: Vec<u8> =
            (0..length).map(|_| if next() % 3 == 0 { next() as u8 } else { 0 }).collect();
        if length >= 8 && next() % 8 != 0 {
            let told = if next() % 4 == 0 { (next() % 300) as u32 } else { length as u32 };
            bytes[..4].copy_from_slice(&told.to_ne_bytes());
            bytes[4..8].copy_from_slice(&((next() % 50) as u32).to_ne_bytes());
        }
        if let Ok(request) = Request::parse(&bytes) {
            requests += 1;
            match request.operation {
                Operation::Lookup { name } => {
                    assert!(!name.is_empty() && !name.contains(&0) && !name.contains(&b'/'))
                }
                Operation::BatchForget(forget) => forgotten += forget.nodes().count(),
                _ => {}
            }
        }
    }
    assert!(requests > 1000 && forgotten > 0, "{requests} requests, {forgotten} forgotten");
}
