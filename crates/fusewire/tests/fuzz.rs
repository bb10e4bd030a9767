//! Any bytes are a request or an error. The seed is fixed unless time is given.

use shipway_fusewire::{Operation, Request};
use shipway_testkit::Rounds;

/// Rounds when no time is given.
const ROUNDS: usize = 200_000;

#[test]
fn any_bytes_are_a_request_or_an_error() {
    let rounds = Rounds::new(ROUNDS, 6, 0x5eed_f05e);
    let mut dice = rounds.dice();
    let mut next = || dice.next();
    let (mut requests, mut forgotten) = (0, 0);
    for _ in rounds {
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
