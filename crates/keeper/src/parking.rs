//! Reads that wait, as this process knows them. The same are in the shared memory of
//! [`Slots`](shipway_fusewire::Slots), which a successor begins with.
//!
//! The thread that takes an entry out, under the lock, is the only one that answers it and gives up
//! its place there.

use shipway_fusewire::{Parked, ParkedId, Unique};
use std::time::{Duration, Instant};

/// A read that waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ParkedRead {
    /// Its place in the shared memory.
    pub(crate) id: ParkedId,
    /// What is read.
    pub(crate) read: Parked,
    /// When it began to wait here.
    pub(crate) since: Instant,
    /// Whether it was reported to the present daemon.
    pub(crate) reported: bool,
}

/// All of them, in the order in which they began to wait.
#[derive(Debug, Default)]
pub(crate) struct Waiting {
    entries: Vec<ParkedRead>,
}

impl Waiting {
    pub(crate) fn push(&mut self, entry: ParkedRead) {
        self.entries.push(entry);
    }

    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    /// The one with this number, sent again by the kernel or not.
    pub(crate) fn find(&mut self, unique: Unique) -> Option<&mut ParkedRead> {
        self.entries.iter_mut().find(|e| e.read.unique.first() == unique.first())
    }

    /// Takes out those that `wanted` says.
    pub(crate) fn take(&mut self, wanted: impl Fn(&ParkedRead) -> bool) -> Vec<ParkedRead> {
        self.entries.extract_if(.., |e| wanted(e)).collect()
    }

    /// Each, to be reported.
    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = &mut ParkedRead> {
        self.entries.iter_mut()
    }

    /// When the next has waited for `deadline`.
    pub(crate) fn next_deadline(&self, deadline: Duration) -> Option<Instant> {
        self.entries.first().map(|e| e.since + deadline)
    }
}
