//! How many transfers one host sees at once (row `so.regconc`).

use parking_lot::Mutex;
use std::{collections::HashMap, sync::Arc};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// What kind of request asks for a place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Priority {
    /// A manifest, or another short question: has one place that blobs cannot take.
    Light,
    /// A blob.
    Heavy,
}

/// Places at each host, shared by all requests of the daemon.
#[derive(Debug)]
pub(crate) struct Limits {
    blobs: usize,
    hosts: Mutex<HashMap<String, Arc<Host>>>,
}

#[derive(Debug)]
struct Host {
    blobs: Arc<Semaphore>,
    all: Arc<Semaphore>,
}

/// A place, held until dropped.
#[derive(Debug)]
pub(crate) struct Permit {
    _blob: Option<OwnedSemaphorePermit>,
    _any: Option<OwnedSemaphorePermit>,
}

impl Limits {
    pub(crate) fn new(blobs: usize) -> Self {
        Self { blobs: blobs.max(1), hosts: Mutex::default() }
    }

    pub(crate) async fn enter(&self, host: &str, load: Priority) -> Permit {
        let places = {
            let mut hosts = self.hosts.lock();
            let new = || {
                Arc::new(Host {
                    blobs: Arc::new(Semaphore::new(self.blobs)),
                    all: Arc::new(Semaphore::new(self.blobs + 1)),
                })
            };
            hosts.entry(host.to_owned()).or_insert_with(new).clone()
        };
        // The semaphores are never closed, so that a missing permit cannot occur.
        let blob = match load {
            Priority::Heavy => places.blobs.clone().acquire_owned().await.ok(),
            Priority::Light => None,
        };
        Permit { _blob: blob, _any: places.all.clone().acquire_owned().await.ok() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt;

    #[tokio::test]
    async fn blobs_leave_a_place_for_manifests() {
        let limits = Limits::new(2);
        let _a = limits.enter("h", Priority::Heavy).await;
        let b = limits.enter("h", Priority::Heavy).await;
        assert!(limits.enter("h", Priority::Heavy).now_or_never().is_none());
        assert!(limits.enter("h", Priority::Light).now_or_never().is_some());
        assert!(limits.enter("other", Priority::Heavy).now_or_never().is_some());
        drop(b);
        assert!(limits.enter("h", Priority::Heavy).now_or_never().is_some());
    }
}
