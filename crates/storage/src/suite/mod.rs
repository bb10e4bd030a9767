//! Conformance checks that every storage passes: run over the fake in unit tests, and over real
//! containerds live. Each function takes a storage, panics with what failed, and leaves nothing
//! behind.

#![allow(clippy::unwrap_used, clippy::missing_panics_doc)]

mod content;
mod images;
mod leases;
mod snapshots;

pub use content::{content, content_in_flight};
pub use images::images;
pub use leases::leases;
pub use snapshots::{layers, snapshots};

use crate::{Labels, LeaseId, Storage};
use std::sync::atomic::{AtomicU32, Ordering};

/// Every check, one after the other.
pub async fn all(storage: &Storage) {
    content(storage).await;
    content_in_flight(storage).await;
    leases(storage).await;
    snapshots(storage).await;
    layers(storage).await;
    images(storage).await;
}

/// A new lease, unlike any other of this process.
async fn lease(storage: &Storage) -> LeaseId {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let id =
        LeaseId(format!("suite-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed)));
    storage.leases.create(&id, &Labels::new()).await.unwrap();
    id
}

fn labels<const N: usize>(pairs: [(&str, &str); N]) -> Labels {
    pairs.into_iter().map(|(k, v)| (k.to_owned(), v.to_owned())).collect()
}

/// Bytes that do not compress and repeat for the same seed.
fn noise(seed: u64, length: usize) -> bytes::Bytes {
    let mut state = seed | 1;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    std::iter::repeat_with(next).take(length).collect::<Vec<_>>().into()
}
