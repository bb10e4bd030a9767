//! What steps left that failed, for a while after their builds, for looking into (row
//! `bx.debug.build`).
//!
//! A build's own failed states end with it. Those of the last builds are committed here, in the
//! background, and let go of: they are build cache like any other, listed and pruned by name, only
//! that garbage collection takes them first. What is kept of them is the fault, which says what the
//! step was, and their ids. They are found by an id that only the build's client has; it is not
//! in the history. A client's directory that the step saw is there until it changes.

use parking_lot::Mutex;
use shipway_buildcache::CacheIndex;
use shipway_fault::{Detail, Fault, Result};
use shipway_ops::{FailedStates, LeftState};
use shipway_refs::{PruneOptions, RefId};
use std::{
    collections::{BTreeSet, VecDeque},
    sync::{Arc, Weak},
    time::Duration,
};
use tokio::sync::watch;

/// The frontend whose only result is the failure of a step that is kept, with its states.
pub(crate) const FAILED_STEP: &str = "shipway.failed-step.v0";
/// Its option: which step.
const STEP: &str = "id";

/// How many failed steps are kept, and for how long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FailureLimits {
    /// Steps; none are kept if it is zero.
    pub count: usize,
    /// Time from the end of the build.
    pub age: Duration,
}

impl Default for FailureLimits {
    fn default() -> Self {
        Self { count: 16, age: Duration::from_secs(3600) }
    }
}

/// The steps that are kept.
pub(crate) struct Failures {
    limits: FailureLimits,
    caches: CacheIndex,
    kept: Mutex<VecDeque<Arc<Kept>>>,
}

struct Kept {
    id: String,
    fault: Fault,
    /// Its states, once they are committed.
    states: watch::Receiver<Option<Vec<State>>>,
}

#[derive(Clone)]
struct State {
    /// In the fault.
    name: String,
    id: RefId,
    written: bool,
}

/// The fault with the ids of those states only that `keep` wants.
fn with_states(fault: &Fault, keep: impl Fn(&str) -> bool) -> Fault {
    let kept = |ids: &[String]| {
        let kept = |id: &String| if keep(id) { id.clone() } else { String::new() };
        ids.iter().map(kept).collect()
    };
    fault.clone().map_details(|detail| match detail {
        Detail::Solve { input_ids, mount_ids, op, subject, description } => Detail::Solve {
            input_ids: kept(input_ids),
            mount_ids: kept(mount_ids),
            op: op.clone(),
            subject: *subject,
            description: description.clone(),
        },
        other => other.clone(),
    })
}

/// The fault as others may see it: without the ids of states.
pub(crate) fn without_states(fault: &Fault) -> Fault {
    with_states(fault, |_| false)
}

/// The id by which a client asks for the step: of the first state that it worked on, which its
/// fault names.
fn id_of(fault: &Fault) -> Option<&String> {
    fault.details().iter().find_map(|detail| match detail {
        Detail::Solve { mount_ids, input_ids, .. } => {
            mount_ids.iter().chain(input_ids).find(|id| !id.is_empty())
        }
        _ => None,
    })
}

impl Failures {
    pub(crate) fn new(limits: FailureLimits, caches: CacheIndex) -> Arc<Self> {
        Arc::new(Self { limits, caches, kept: Mutex::default() })
    }

    /// Keeps the step that failed with `fault`, if it left anything; gives the fault with a hint at
    /// that.
    pub(crate) fn keep(self: &Arc<Self>, fault: Fault, failed: &FailedStates) -> Fault {
        let known = failed.named_by(&fault);
        let Some(id) = id_of(&fault).filter(|id| known.contains(*id)).cloned() else {
            return fault;
        };
        if self.limits.count == 0 {
            return fault;
        }
        let (committed, states) = watch::channel(None);
        let kept = Arc::new(Kept { id: id.clone(), fault: fault.clone(), states });
        let mut all = self.kept.lock();
        all.push_back(kept.clone());
        let over = (all.len() > self.limits.count).then(|| all.pop_front()).flatten();
        drop(all);
        let (this, failed, named) = (Arc::downgrade(self), failed.clone(), fault.clone());
        let age = self.limits.age;
        shipway_task::spawn("keep a failed step", async move {
            let left = failed.left(&named).await;
            drop(failed);
            if let Some(this) = this.upgrade() {
                committed.send_replace(Some(this.let_go(left).await));
                if let Some(over) = over {
                    this.remove(&over).await;
                }
            }
            tokio::time::sleep(age).await;
            expire(&this, &kept).await;
        });
        fault.hint(format!(
            "`shipway debug {id}` opens a shell in what the failed step left, until {} after the \
             build",
            minutes(self.limits.age)
        ))
    }

    /// The states as cache that goes first.
    async fn let_go(&self, left: Vec<LeftState>) -> Vec<State> {
        let mut all = Vec::new();
        for LeftState { id: name, state, written } in left {
            let id = state.id().clone();
            drop(state);
            if written {
                self.caches.refs().forget_use(&id);
            }
            all.push(State { name, id, written });
        }
        all
    }

    /// The failure that is asked for, whose states the build that asks gets.
    pub(crate) async fn open(
        &self,
        options: &shipway_frontend::FrontendOptions,
        into: &FailedStates,
    ) -> Fault {
        let id = options.get(STEP).map_or("", String::as_str);
        self.found(id, into).await.unwrap_or_else(|fault| fault)
    }

    async fn found(&self, id: &str, into: &FailedStates) -> Result<Fault> {
        let gone = |why: &str| {
            Fault::not_found(format!("the failed step {id:?} is not kept{why}")).hint(format!(
                "the last {} are, for {} after their builds, while there is room and the daemon \
                 runs: build again",
                self.limits.count,
                minutes(self.limits.age)
            ))
        };
        let kept = self.kept.lock().iter().find(|kept| kept.id == id).cloned();
        let kept = kept.ok_or_else(|| gone(""))?;
        let states =
            kept.states.clone().wait_for(Option::is_some).await.ok().and_then(|s| s.clone());
        let mut left = Vec::new();
        for State { name, id, written } in states.unwrap_or_default() {
            match self.caches.refs().get(&id).await {
                Some(state) => left.push(LeftState { id: name, state, written }),
                None if name == kept.id => return Err(gone(" any more")),
                None => {}
            }
        }
        if !left.iter().any(|state| state.id == kept.id) {
            return Err(gone(": its state could not be committed"));
        }
        let there: BTreeSet<String> = left.iter().map(|state| state.id.clone()).collect();
        into.adopt(left);
        // What is gone has no id, so that the rest can be looked into.
        Ok(with_states(&kept.fault, |id| there.contains(id)))
    }

    /// Removes what a step wrote, unless it turned out to be the result of another one as well.
    async fn remove(&self, kept: &Kept) {
        let states =
            kept.states.clone().wait_for(Option::is_some).await.ok().and_then(|s| s.clone());
        let written = states.into_iter().flatten().filter(|state| state.written);
        let ids: BTreeSet<RefId> = written
            .map(|state| state.id)
            .filter(|id| self.caches.keys_of(&id.to_string()).is_ok_and(|keys| keys.is_empty()))
            .collect();
        if ids.is_empty() {
            return;
        }
        let filter = move |usage: &shipway_refs::UsageRecord| ids.contains(&usage.id);
        let options =
            PruneOptions { all: true, filter: Some(Arc::new(filter)), ..PruneOptions::default() };
        if let Err(error) = self.caches.prune(options, &|_| {}).await {
            tracing::warn!(%error, "failed to remove what a failed step left; it is pruned later");
        }
    }

    /// Takes a step off the list; whether it was there.
    fn forget(&self, kept: &Arc<Kept>) -> bool {
        let mut all = self.kept.lock();
        let before = all.len();
        all.retain(|other| !Arc::ptr_eq(other, kept));
        all.len() < before
    }

    /// Removes all of them.
    pub(crate) async fn clear(&self) {
        let all = std::mem::take(&mut *self.kept.lock());
        for kept in all {
            self.remove(&kept).await;
        }
    }
}

/// Ends the time of `kept`, unless it has gone before.
async fn expire(failures: &Weak<Failures>, kept: &Arc<Kept>) {
    if let Some(failures) = failures.upgrade()
        && failures.forget(kept)
    {
        failures.remove(kept).await;
    }
}

fn minutes(time: Duration) -> String {
    match time.as_secs() / 60 {
        0 => format!("{} s", time.as_secs()),
        1 => "1 minute".to_owned(),
        n => format!("{n} minutes"),
    }
}
