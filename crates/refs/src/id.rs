//! Identities of states.

use shipway_oci::Digest;
use std::{
    fmt,
    sync::atomic::{AtomicU64, Ordering},
    time::{SystemTime, UNIX_EPOCH},
};

/// Identity of a state, stable across restarts. Clients see it in `du` and `prune`.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RefId(pub String);

impl fmt::Display for RefId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for RefId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A new identity: 25 characters, as clients are used to.
pub(crate) fn fresh_id() -> RefId {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
    let seed = format!("{now} {} {}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
    id_of(seed)
}

/// The identity that follows from `seed`.
pub(crate) fn id_of(seed: impl AsRef<[u8]>) -> RefId {
    RefId(
        Digest::of(seed)
            .as_bytes()
            .iter()
            .take(25)
            .map(|b| char::from(b"0123456789abcdefghijklmnopqrstuv"[usize::from(b & 31)]))
            .collect(),
    )
}
