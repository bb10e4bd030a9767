//! How much work a build's expansions may do.

use crate::error::{Error, Result};
use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering::Relaxed},
};

/// Steps of all expansions of one build together: some seconds.
const MAX_STEPS: u64 = 1_000_000_000;
/// Steps that a byte of a result counts for, since it stays in memory.
const RESULT_COST: u64 = 8;

/// What is left of the work that expansions may do, all together. Clones share it.
#[derive(Clone, Debug)]
pub struct Work(Arc<AtomicU64>);

impl Default for Work {
    fn default() -> Self {
        Self::of(MAX_STEPS)
    }
}

impl Work {
    /// Work of so many steps.
    pub fn of(steps: u64) -> Self {
        Self(Arc::new(AtomicU64::new(steps)))
    }

    /// Ends all work: its result is not wanted any more.
    pub fn stop(&self) {
        self.0.store(0, Relaxed);
    }

    pub(crate) fn left(&self) -> u64 {
        self.0.load(Relaxed)
    }

    /// Takes `steps`, or all that is left if that is less.
    pub(crate) fn take(&self, steps: u64) {
        // Never fails: there is always a value to store.
        let _ = self.0.fetch_update(Relaxed, Relaxed, |left| Some(left.saturating_sub(steps)));
    }

    /// Takes the steps of reading a text.
    pub(crate) fn read(&self, text: &str) -> Result<()> {
        let steps = text.len() as u64 + 1;
        if self.left() < steps {
            return Err(Error::new("the variables of the Dockerfile take too long to expand"));
        }
        self.take(steps);
        Ok(())
    }

    /// Takes the steps of keeping a result.
    pub(crate) fn keep(&self, text: &str) {
        self.take(text.len() as u64 * RESULT_COST);
    }
}
