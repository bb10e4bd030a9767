//! Builds that outlive their daemon: one that is cut off because the daemon goes away is sent once
//! more when it is back (row `dp.reconnect`). What had been done is in its cache.

use crate::{Client, Outcome, SolveOptions, Status};
use shipway_fault::{Fault, Result};
use std::time::Duration;
use tokio::{sync::mpsc, time::Instant};
use tokio_util::sync::CancellationToken;

/// Between two looks at whether the daemon is back.
const PAUSE: Duration = Duration::from_millis(250);
/// How often one build is sent again: a build that its daemon does not survive would else never
/// end.
const MAX_TIMES: usize = 3;

impl Client {
    /// Builds. Events go to `events` as they come; `stop` cancels the build and still delivers what
    /// it says at its end; dropping the future cancels it at once. A build that is sent again
    /// ([`SolveOptions::reconnect`]) has the events of each time.
    pub async fn build(
        &self,
        options: SolveOptions,
        events: mpsc::Sender<Status>,
        stop: CancellationToken,
    ) -> Result<Outcome> {
        if options.frontend.is_empty() == options.definition.is_none() {
            return Err(Fault::invalid("a build needs either a frontend or a definition"));
        }
        match options.reconnect {
            Some(patience) => self.persevere(options, patience, events, stop).await,
            None => {
                let driven = self.drive(options, None, events, stop).await;
                driven.map(|(outcome, _)| outcome).map_err(|ended| ended.fault)
            }
        }
    }

    /// Builds, and does so again when the daemon goes away meanwhile and is back within
    /// `patience`. A build that reads streams is not sent again: they can be read once.
    async fn persevere(
        &self,
        options: SolveOptions,
        patience: Duration,
        events: mpsc::Sender<Status>,
        stop: CancellationToken,
    ) -> Result<Outcome> {
        let mut options = options;
        if options.reference.is_empty() {
            options.reference = shipway_host::random_id()?;
        }
        for _ in 0..MAX_TIMES {
            let again = (options.uploads.is_empty() && self.reconnects()).then(|| options.clone());
            let ended = match self.drive(options, None, events.clone(), stop.clone()).await {
                Ok((outcome, _)) => return Ok(outcome),
                Err(ended) => ended,
            };
            match again.filter(|_| ended.daemon_gone && !stop.is_cancelled()) {
                Some(again) => options = again,
                None => return Err(ended.fault),
            }
            tracing::warn!("the daemon went away: the build goes on when it is back");
            if !self.is_back(patience, &stop).await {
                return Err(ended.fault);
            }
        }
        let last = self.drive(options, None, events, stop).await;
        last.map(|(outcome, _)| outcome).map_err(|ended| ended.fault)
    }

    /// Waits until the daemon takes builds; whether it does.
    async fn is_back(&self, patience: Duration, stop: &CancellationToken) -> bool {
        let until = Instant::now() + patience;
        let asking = async {
            // One that is ending answers that it takes no builds.
            while self.workers(Vec::new()).await.is_err() {
                tokio::time::sleep(PAUSE).await;
            }
        };
        tokio::select! {
            () = asking => true,
            () = tokio::time::sleep_until(until) => false,
            () = stop.cancelled() => false,
        }
    }
}
