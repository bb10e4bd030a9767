//! One at a time per name: whoever comes second waits and finds the work done (row `so.flight`).

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError, Weak},
};
use tokio::sync::{Mutex as AsyncMutex, OwnedMutexGuard};

/// Turns by name. Clones share them.
#[derive(Clone, Default)]
pub(crate) struct Flights(Arc<Mutex<HashMap<String, Weak<AsyncMutex<()>>>>>);

/// A turn; ends when dropped.
pub(crate) struct Turn {
    _guard: OwnedMutexGuard<()>,
}

impl Flights {
    /// Waits for the turn of `name`.
    pub(crate) async fn turn(&self, name: &str) -> Turn {
        let lock = {
            let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
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
        Turn { _guard: lock.lock_owned().await }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt;

    #[tokio::test]
    async fn the_second_waits_for_the_first_of_the_same_name() {
        let flights = Flights::default();
        let first = flights.turn("a").await;
        assert!(flights.turn("a").now_or_never().is_none());
        assert!(flights.turn("b").now_or_never().is_some());
        drop(first);
        assert!(flights.turn("a").now_or_never().is_some());
    }
}
