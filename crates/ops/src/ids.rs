//! Ids that nobody can guess.

use ring::rand::{SecureRandom as _, SystemRandom};
use shipway_fault::{Fault, Result};
use std::fmt::Write as _;

/// 128 random bits as a hexadecimal number: who has the id of a state was given it, since everybody
/// who reaches the daemon may ask for any id.
pub fn random_id() -> Result<String> {
    let mut bytes = [0u8; 16];
    SystemRandom::new()
        .fill(&mut bytes)
        .map_err(|_| Fault::internal("the system gives no random numbers"))?;
    Ok(bytes.iter().fold(String::with_capacity(32), |mut id, byte| {
        let _ = write!(id, "{byte:02x}");
        id
    }))
}
