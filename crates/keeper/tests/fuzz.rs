//! Any bytes are a message, one that is not known, or an error; and what is a message is the same
//! after it was written and read again. The seed is fixed unless time is given.

use shipway_keeper::message::{BYTES, Command, Event};
use shipway_testkit::Rounds;

/// Rounds when no time is given.
const ROUNDS: usize = 200_000;

#[test]
fn any_bytes_are_a_message_or_not() {
    let rounds = Rounds::new(ROUNDS, 6, 0x5eed_f05e);
    let mut dice = rounds.dice();
    let mut next = || dice.next();
    let (mut commands, mut events) = ([0; 16], [0; 16]);
    for _ in rounds {
        let length = if next() % 8 == 0 { next() % 64 } else { BYTES as u64 } as usize;
        let mut bytes: Vec<u8> =
            (0..length).map(|_| if next() % 3 == 0 { next() as u8 } else { 0 }).collect();
        if length >= 2 && next() % 8 != 0 {
            bytes[0] = 1 + (next() % 16 == 0) as u8;
            bytes[1] = (next() % 16) as u8 + if next() % 2 == 0 { 0 } else { 64 };
        }
        let kind = bytes.get(1).map_or(0, |kind| kind % 16) as usize;
        if let Ok(Some(command)) = Command::decode(&bytes) {
            commands[kind] += 1;
            assert_eq!(Command::decode(&command.encode()), Ok(Some(command)));
        }
        if let Ok(Some(event)) = Event::decode(&bytes) {
            events[kind] += 1;
            assert_eq!(Event::decode(&event.encode()), Ok(Some(event)));
        }
        if length < BYTES {
            assert!(Command::decode(&bytes).is_err() && Event::decode(&bytes).is_err());
        }
    }
    assert!(commands[1..10].iter().all(|n| *n > 100), "{commands:?}");
    assert!(events[..13].iter().all(|n| *n > 100), "{events:?}");
}
