//! What an operation leaves when it fails: states that somebody may want to look into (row
//! `err.solve`).
//!
//! They live as long as the fault that they go with. What a process wrote is committed only when it
//! is asked for, since nearly nobody asks.

use crate::random_id;
use shipway_fault::{Attachment, Detail, Fault, Result, Subject, redact_text};
use shipway_llb::Vertex;
use shipway_refs::{ImmutableRef, MutableRef};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::OnceCell;

/// One state.
pub(crate) enum Remain {
    /// It was there before, or is finished.
    Done(ImmutableRef),
    /// A failed operation wrote it.
    Written(MutableRef),
}

enum Entry {
    Done(ImmutableRef),
    Written(Box<Written>),
}

/// A state that was written, until it is committed.
struct Written {
    open: Mutex<Option<MutableRef>>,
    committed: OnceCell<ImmutableRef>,
}

/// The states that go with a fault, by id.
pub struct Remains(Vec<(String, Entry)>);

/// States by their place in an operation; nothing where there is none.
pub(crate) type Places = Vec<Option<Remain>>;

impl Remains {
    /// Attaches the states of the failed operation `op` to its fault: what went into it, and what
    /// it was working on.
    pub(crate) fn attach(
        fault: Fault,
        op: &Vertex,
        inputs: Places,
        mounts: Places,
        subject: Option<Subject>,
    ) -> Fault {
        let mut remains = Self(Vec::new());
        let input_ids = inputs.into_iter().map(|i| remains.add(i)).collect();
        let mount_ids = mounts.into_iter().map(|m| remains.add(m)).collect();
        // The name for progress may have an address with a login.
        let description = op.metadata.description.iter();
        let description = description.map(|(key, text)| (key.clone(), redact_text(text))).collect();
        let fault = fault.detail(Detail::Solve {
            input_ids,
            mount_ids,
            op: op.shown().to_vec(),
            subject,
            description,
        });
        fault.detail(Detail::Attachment(Attachment(Arc::new(remains))))
    }

    /// An id for the state, the same one each time.
    fn add(&mut self, remain: Option<Remain>) -> String {
        let entry = match remain {
            None => return String::new(),
            Some(Remain::Done(state)) => {
                let same =
                    |entry: &Entry| matches!(entry, Entry::Done(known) if known.id() == state.id());
                if let Some((id, _)) = self.0.iter().find(|(_, entry)| same(entry)) {
                    return id.clone();
                }
                Entry::Done(state)
            }
            Some(Remain::Written(state)) => Entry::Written(Box::new(Written {
                open: Mutex::new(Some(state)),
                committed: OnceCell::new(),
            })),
        };
        // Without an id nobody can ask for the state; the failure itself is told all the same.
        let Ok(id) = random_id() else { return String::new() };
        self.0.push((id.clone(), entry));
        id
    }

    /// Those that go with `fault`.
    pub fn of(fault: &Fault) -> impl Iterator<Item = Arc<Self>> {
        fault.details().iter().filter_map(|d| match d {
            Detail::Attachment(Attachment(kept)) => kept.clone().downcast().ok(),
            _ => None,
        })
    }

    /// Their ids.
    pub fn ids(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(|(id, _)| id.as_str())
    }

    /// The state `id`.
    pub async fn state(&self, id: &str) -> Result<ImmutableRef> {
        let entry = self.0.iter().find(|(known, _)| known == id).map(|(_, entry)| entry);
        match entry
            .ok_or_else(|| Fault::not_found(format!("no state {id} of a failed operation")))?
        {
            Entry::Done(state) => Ok(state.clone()),
            Entry::Written(written) => {
                let commit = || async {
                    let state = written.open.lock().unwrap_or_else(PoisonError::into_inner).take();
                    let state = state.ok_or_else(|| {
                        Fault::not_found(format!("the state {id} of a failed operation was lost"))
                    })?;
                    let description = state.description().to_owned();
                    state.commit(description).await
                };
                written.committed.get_or_try_init(commit).await.cloned()
            }
        }
    }
}
