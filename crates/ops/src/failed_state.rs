//! The states that an operation leaves when it fails, for looking into (row
//! `err.solve`).
//!
//! They belong to the builds that wanted the operation and live until those end; the fault has only
//! their ids. What a process wrote is committed only when it is asked for, which is rare.

use crate::JobData;
use parking_lot::{Mutex, MutexGuard};
use shipway_fault::{Detail, Fault, Result, Subject, redact_text};
use shipway_host::random_id;
use shipway_llb::Vertex;
use shipway_refs::{ImmutableRef, MutableRef};
use std::{collections::HashMap, sync::Arc};
use tokio::sync::OnceCell;

/// Most states that are kept for one build.
const MAX_STATES: usize = 20_000;

/// One state.
pub(crate) enum FailedState {
    /// It was there before, or is finished.
    Done(ImmutableRef),
    /// A failed operation wrote it.
    Written(MutableRef),
}

/// States by their slot in an operation; nothing where there is none.
pub(crate) type BySlot = Vec<Option<FailedState>>;

enum Entry {
    Done(ImmutableRef),
    Written(Box<Written>),
}

/// A state that was written, until it is committed.
struct Written {
    open: Mutex<Option<MutableRef>>,
    committed: OnceCell<ImmutableRef>,
}

/// The states that failed operations of one build left, by id. Clones share them.
#[derive(Clone, Default)]
pub struct FailedStates(Arc<Mutex<HashMap<String, Arc<Entry>>>>);

/// A state that a failed operation left, committed.
#[derive(Clone)]
pub struct LeftState {
    /// Its id in the fault.
    pub id: String,
    /// The state.
    pub state: ImmutableRef,
    /// Whether the operation wrote it; else it was there before.
    pub written: bool,
}

/// The states of one failed operation, as they get their ids.
#[derive(Default)]
struct Collected(Vec<(String, Arc<Entry>)>);

impl Collected {
    /// An id for the state, the same one each time; empty where there is none.
    fn add(&mut self, state: Option<FailedState>) -> String {
        let entry = match state {
            None => return String::new(),
            Some(FailedState::Done(state)) => {
                let same =
                    |entry: &Entry| matches!(entry, Entry::Done(known) if known.id() == state.id());
                if let Some((id, _)) = self.0.iter().find(|(_, entry)| same(entry)) {
                    return id.clone();
                }
                Entry::Done(state)
            }
            Some(FailedState::Written(state)) => Entry::Written(Box::new(Written {
                open: Mutex::new(Some(state)),
                committed: OnceCell::new(),
            })),
        };
        // Without an id the state cannot be asked for; the failure itself is reported all the same.
        let Ok(id) = random_id() else { return String::new() };
        self.0.push((id.clone(), Arc::new(entry)));
        id
    }
}

impl FailedStates {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, Arc<Entry>>> {
        self.0.lock()
    }

    /// Keeps states as long as there is room. A failure is reported without the others.
    fn keep(&self, collected: &Collected) {
        let mut states = self.lock();
        let room = MAX_STATES.saturating_sub(states.len());
        states.extend(collected.0.iter().take(room).cloned());
    }

    /// Gives the states of the failed operation `op` to the builds `jobs`, and their ids to its
    /// fault: of what went into it, and of what it was working on.
    pub(crate) fn attach(
        fault: Fault,
        op: &Vertex,
        jobs: &[JobData],
        inputs: BySlot,
        mounts: BySlot,
        subject: Option<Subject>,
    ) -> Fault {
        let mut collected = Collected::default();
        let input_ids = inputs.into_iter().map(|i| collected.add(i)).collect();
        let mount_ids = mounts.into_iter().map(|m| collected.add(m)).collect();
        jobs.iter().for_each(|job| job.failed.keep(&collected));
        // The name for progress may have an address with a login.
        let description = op.metadata.description.iter();
        let description = description.map(|(key, text)| (key.clone(), redact_text(text))).collect();
        fault.detail(Detail::Solve {
            input_ids,
            mount_ids,
            op: op.shown().to_vec(),
            subject,
            description,
        })
    }

    /// The ids of those that `fault` names.
    pub fn named_by(&self, fault: &Fault) -> Vec<String> {
        let states = self.lock();
        let mut ids: Vec<String> = Vec::new();
        for detail in fault.details() {
            if let Detail::Solve { input_ids, mount_ids, .. } = detail {
                let named = input_ids.iter().chain(mount_ids);
                ids.extend(named.filter(|id| states.contains_key(*id)).cloned());
            }
        }
        ids.sort_unstable();
        ids.dedup();
        ids
    }

    /// The states that `fault` names, committed; those that cannot be are left out.
    pub async fn left(&self, fault: &Fault) -> Vec<LeftState> {
        let mut all = Vec::new();
        for id in self.named_by(fault) {
            let entry = self.lock().get(&id).cloned();
            let written = entry.is_some_and(|entry| matches!(*entry, Entry::Written(_)));
            match self.state(&id).await {
                Ok(state) => all.push(LeftState { id, state, written }),
                Err(error) => tracing::debug!(%id, %error, "failed to keep a failed step's state"),
            }
        }
        all
    }

    /// Gives the build what another one's operation left, under the same ids.
    pub fn adopt(&self, left: Vec<LeftState>) {
        let entry = |left: LeftState| (left.id, Arc::new(Entry::Done(left.state)));
        self.keep(&Collected(left.into_iter().map(entry).collect()));
    }

    /// The state `id`.
    pub async fn state(&self, id: &str) -> Result<ImmutableRef> {
        let entry = self.lock().get(id).cloned();
        let entry = entry
            .ok_or_else(|| Fault::not_found(format!("no state {id} of a failed operation")))?;
        match &*entry {
            Entry::Done(state) => Ok(state.clone()),
            Entry::Written(written) => {
                let commit = || async {
                    let state = written.open.lock().take();
                    let state = state.ok_or_else(|| {
                        Fault::not_found(format!("the state {id} of a failed operation was lost"))
                    })?;
                    let description = format!("left by a failed step: {}", state.description());
                    state.commit(description).await
                };
                written.committed.get_or_try_init(commit).await.cloned()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use shipway_refs::RefStore;
    use shipway_storage::fake::FakeStorage;

    #[tokio::test]
    async fn a_build_keeps_no_more_states_than_it_may() {
        let root = tempfile::tempdir().unwrap();
        let storage = FakeStorage::new().unwrap().storage();
        let refs = RefStore::open(storage, root.path().to_owned()).await.unwrap();
        let entry = Arc::new(Entry::Done(refs.scratch().unwrap()));
        let states = FailedStates::default();
        for number in 0..=MAX_STATES {
            states.keep(&Collected(vec![(number.to_string(), entry.clone())]));
        }
        assert!(states.state("0").await.is_ok());
        assert!(states.state(&MAX_STATES.to_string()).await.is_err_and(|f| f.is_not_found()));
        let fault = |id: usize| {
            Fault::unknown("x").detail(Detail::Solve {
                input_ids: vec![id.to_string()],
                mount_ids: vec![String::new(), "0".into()],
                op: Vec::new(),
                subject: None,
                description: Default::default(),
            })
        };
        assert_eq!(states.named_by(&fault(1)), ["0", "1"]);
        assert_eq!(states.named_by(&fault(MAX_STATES)), ["0"]);
    }
}
