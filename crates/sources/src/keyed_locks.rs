//! One at a time per name: the second caller waits and finds the work done (row `so.flight`).

use parking_lot::Mutex;
use std::{
    collections::HashMap,
    sync::{Arc, Weak},
};
use tokio::sync::{Mutex as AsyncMutex, OwnedMutexGuard};

/// Turns by name. Clones share them.
#[derive(Clone, Default)]
pub(crate) struct KeyedLocks(Arc<Mutex<HashMap<String, Weak<AsyncMutex<()>>>>>);

/// A turn; ends when dropped.
pub(crate) struct KeyGuard {
    _guard: OwnedMutexGuard<()>,
}

impl KeyedLocks {
    /// Waits for the turn of `name`.
    pub(crate) async fn lock(&self, name: &str) -> KeyGuard {
        let lock = {
            let mut all = self.0.lock();
            match all.get(name).and_then(Weak::upgrade) {
                Some(lock) => lock,
                None => {
                    all.retain(|_, lock| lock.strong_count() > 0);
                    let lock = Arc::new(AsyncMutex::new(()));
                    all.insert(name.to_owned(), Arc::downgrade(&lock));
                    lock
                }
            }
        };
        KeyGuard { _guard: lock.lock_owned().await }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt;

    #[tokio::test]
    async fn the_second_waits_for_the_first_of_the_same_name() {
        let locks = KeyedLocks::default();
        let first = locks.lock("a").await;
        assert!(locks.lock("a").now_or_never().is_none());
        assert!(locks.lock("b").now_or_never().is_some());
        drop(first);
        assert!(locks.lock("a").now_or_never().is_some());
    }
}
