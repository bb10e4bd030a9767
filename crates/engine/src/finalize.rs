//! The traces of builds that just ended: a trace is complete some time after its build, for clients
//! send their spans late (row `so.h.trace`).

use parking_lot::Mutex;
use shipway_history::History;
use shipway_telemetry::TraceRecording;
use std::{collections::HashMap, sync::Arc, time::Duration};
use tokio_util::sync::CancellationToken;

/// How long spans are waited for.
const LATE: Duration = Duration::from_secs(3);

/// Traces that are waited for, by the id of their build.
#[derive(Default)]
pub(crate) struct Finalizing(Mutex<HashMap<String, Pending>>);

#[derive(Clone, Default)]
struct Pending {
    hurry: CancellationToken,
    done: CancellationToken,
}

impl Finalizing {
    /// Adds the trace to the record of its build, which ended, when the last spans have come.
    pub(crate) fn keep(self: &Arc<Self>, history: Arc<History>, id: String, trace: TraceRecording) {
        let pending = Pending::default();
        // A build of the same name that ended before is not of interest any more.
        self.0.lock().insert(id.clone(), pending.clone());
        let all = self.clone();
        shipway_task::spawn("keep a trace", async move {
            let _ = tokio::time::timeout(LATE, pending.hurry.cancelled()).await;
            let of = id.clone();
            let add = move || match trace.text() {
                text if text.is_empty() => Ok(()),
                text => history.add_trace(&of, &text),
            };
            if let Err(error) = shipway_task::blocking("keep a trace", add).await {
                tracing::warn!(build = id, %error, "failed to keep the trace of the build");
            }
            let mut waiting = all.0.lock();
            // It may be the trace of a later build.
            if waiting.get(&id).is_some_and(|p| p.done == pending.done) {
                waiting.remove(&id);
            }
            drop(waiting);
            pending.done.cancel();
        });
    }

    /// Waits no longer for spans of the build, but until its record has its trace.
    pub(crate) async fn hurry(&self, id: &str) {
        let pending = self.0.lock().get(id).cloned();
        if let Some(pending) = pending {
            pending.hurry.cancel();
            pending.done.cancelled().await;
        }
    }

    /// The same for all builds, before the daemon ends.
    pub(crate) async fn hurry_all(&self) {
        let all: Vec<_> = self.0.lock().values().cloned().collect();
        all.iter().for_each(|pending| pending.hurry.cancel());
        for pending in all {
            pending.done.cancelled().await;
        }
    }
}
