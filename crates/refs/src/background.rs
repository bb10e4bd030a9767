//! Work that outlives the call that began it.

use shipway_fault::{Fault, Result};
use shipway_task::{blocking_on, spawn_on};
use std::future::Future;
use tokio::runtime::Handle;
use tokio_util::task::TaskTracker;

/// Background work that [`crate::RefStore::drained`] waits for. It can be begun outside of the
/// runtime, as by `Drop`.
#[derive(Clone)]
pub(crate) struct Background {
    runtime: Handle,
    tracker: TaskTracker,
}

impl Background {
    pub fn new() -> Self {
        let tracker = TaskTracker::new();
        // Closed trackers take new work, too; this one is waited for again and again.
        tracker.close();
        Self { runtime: Handle::current(), tracker }
    }

    /// Runs `work` to its end, whether or not the caller waits.
    pub fn spawn(&self, name: &'static str, work: impl Future<Output = ()> + Send + 'static) {
        spawn_on(&self.runtime, name, self.tracker.track_future(work));
    }

    /// Runs `work` to its end even if the caller goes away in the middle, because half of it would
    /// be worse than all.
    pub async fn finish<T: Send + 'static>(
        &self,
        name: &'static str,
        work: impl Future<Output = Result<T>> + Send + 'static,
    ) -> Result<T> {
        let (sender, result) = tokio::sync::oneshot::channel();
        self.spawn(name, async move { drop(sender.send(work.await)) });
        result.await.unwrap_or_else(|_| Err(Fault::internal(format!("{name}: panicked"))))
    }

    /// [`Background::spawn`] for work that blocks.
    pub fn blocking(&self, what: &'static str, work: impl FnOnce() + Send + 'static) {
        let token = self.tracker.token();
        // It runs without being waited for.
        drop(blocking_on(&self.runtime, what, move || {
            work();
            drop(token);
            Ok(())
        }));
    }

    /// Waits until there is none.
    pub async fn drained(&self) {
        self.tracker.wait().await;
    }
}
