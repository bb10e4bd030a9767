//! Ending without failing builds (row `dp.drain`): what runs is waited for, and what comes goes
//! elsewhere, or comes again.

use shipway_fault::{Fault, Result};
use std::time::Duration;
use tokio_util::{
    sync::CancellationToken,
    task::{TaskTracker, task_tracker::TaskTrackerToken},
};

/// Whether the daemon is ending, and the builds that it waits for. Clones share it.
#[derive(Clone, Default)]
pub struct Drain {
    /// Cancelled when no more builds are admitted.
    begun: CancellationToken,
    /// Cancelled when those that run are not waited for any longer.
    over: CancellationToken,
    builds: TaskTracker,
}

impl Drain {
    /// Admits a build, which is waited for while the token lives; refuses it if the daemon is
    /// ending.
    pub fn admit(&self) -> Result<TaskTrackerToken> {
        // The token comes first, so that no build is missed by one who looks in between.
        let token = self.builds.token();
        self.check().map(|()| token)
    }

    /// Refuses what is of no use to a daemon that is ending.
    pub fn check(&self) -> Result<()> {
        if self.is_begun() { Err(refusal("takes no more builds")) } else { Ok(()) }
    }

    /// Whether the daemon is ending.
    pub fn is_begun(&self) -> bool {
        self.begun.is_cancelled()
    }

    /// Becomes cancelled when the daemon begins to end.
    pub fn begun(&self) -> CancellationToken {
        self.begun.clone()
    }

    /// Waits until builds have to stop; says why.
    pub async fn cut_off(&self) -> Fault {
        self.over.cancelled().await;
        refusal("stopped the build")
    }

    /// Admits no more builds, and waits for those that run: no longer than `limit`, and not beyond
    /// `stop`. Calls `leave` before those are cut off that have not ended.
    pub async fn finish(
        &self,
        limit: Duration,
        stop: impl Future<Output = ()>,
        leave: impl FnOnce(),
    ) {
        self.begun.cancel();
        self.builds.close();
        if !self.builds.is_empty() {
            tracing::info!(builds = self.builds.len(), ?limit, "waiting for running builds");
        }
        tokio::select! {
            () = self.builds.wait() => return,
            () = tokio::time::sleep(limit) => {
                tracing::warn!(builds = self.builds.len(), "builds did not end in time");
            }
            () = stop => tracing::warn!("stopping at once"),
        }
        leave();
        self.over.cancel();
    }
}

fn refusal(what: &str) -> Fault {
    Fault::unavailable(format!("the daemon is stopping and {what}")).hint(
        "build again once it is back, or on another node: steps that had ended are in the cache",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(3600);

    #[tokio::test(start_paused = true)]
    async fn running_builds_are_waited_for_and_others_refused() {
        let drain = Drain::default();
        let build = drain.admit().unwrap();
        let ending = drain.clone();
        let waiting = shipway_task::spawn("drain", async move {
            ending.finish(LONG, std::future::pending(), || ()).await;
        });
        drain.begun().cancelled().await;
        let refused = drain.admit().unwrap_err();
        assert_eq!(refused.code(), shipway_fault::Code::Unavailable);
        assert!(refused.hints().any(|h| h.contains("another node")), "{refused}");
        assert!(!waiting.is_finished());
        drop(build);
        waiting.await.unwrap();
        assert!(!drain.over.is_cancelled());
    }

    #[tokio::test(start_paused = true)]
    async fn what_does_not_end_in_time_or_before_a_second_signal_is_stopped() {
        let began = tokio::time::Instant::now();
        for (limit, stop) in [(LONG, true), (Duration::from_secs(7), false)] {
            let drain = Drain::default();
            let _build = drain.admit().unwrap();
            let stop = async move {
                if !stop {
                    std::future::pending::<()>().await;
                }
            };
            let (mut left, over) = (false, drain.over.clone());
            let leave = || left = !over.is_cancelled();
            drain.finish(limit, stop, leave).await;
            assert!(left, "before builds are cut off");
            assert!(drain.cut_off().await.to_string().contains("stopped the build"));
        }
        assert_eq!(began.elapsed().as_secs(), 7);
    }

    #[tokio::test(start_paused = true)]
    async fn nothing_that_runs_is_nothing_to_wait_for() {
        let began = tokio::time::Instant::now();
        let leave = || panic!("there is nothing to leave");
        Drain::default().finish(LONG, std::future::pending(), leave).await;
        assert_eq!(began.elapsed(), Duration::ZERO);
    }
}
