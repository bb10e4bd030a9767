//! Memory for what senders describe: a sender that describes without end, or that never sends what
//! it described, must not take it all.

use shipway_fault::{Code, Fault, Result};
use std::sync::{
    Arc, LazyLock,
    atomic::{AtomicUsize, Ordering},
};

/// What the descriptions of one transfer may take.
const MAX_TRANSFER: usize = 1 << 30;
/// What those of all transfers together may take.
const MAX_TOGETHER: usize = 2 << 30;
/// What an entry takes besides its texts: its places in the tree, among the changes and in the
/// tables of what was asked for.
pub(crate) const ENTRY: usize = 256;

/// A bound of the memory that transfers which share it take.
#[derive(Debug)]
pub struct Budget {
    each: usize,
    together: usize,
    used: AtomicUsize,
}

impl Budget {
    /// At most `each` bytes for a transfer, and `together` for all.
    pub fn new(each: usize, together: usize) -> Arc<Self> {
        Arc::new(Self { each, together, used: AtomicUsize::new(0) })
    }

    /// That of this process.
    pub fn shared() -> Arc<Self> {
        static SHARED: LazyLock<Arc<Budget>> =
            LazyLock::new(|| Budget::new(MAX_TRANSFER, MAX_TOGETHER));
        SHARED.clone()
    }
}

/// What one transfer took; given back when it ends.
#[derive(Debug)]
pub(crate) struct BudgetShare {
    budget: Arc<Budget>,
    bytes: usize,
}

impl BudgetShare {
    pub(crate) fn of(budget: Arc<Budget>) -> Self {
        Self { budget, bytes: 0 }
    }

    pub(crate) fn take(&mut self, bytes: usize) -> Result<()> {
        let exhausted = |what: &str| Err(Fault::new(Code::ResourceExhausted, what.to_owned()));
        if self.bytes.saturating_add(bytes) > self.budget.each {
            return exhausted("the sender's tree is too large").map_err(|e: Fault| {
                e.hint("exclude what the build does not need in .dockerignore")
            });
        }
        self.bytes += bytes;
        if self.budget.used.fetch_add(bytes, Ordering::Relaxed).saturating_add(bytes)
            > self.budget.together
        {
            return exhausted("too many large directories are being received")
                .map_err(|e: Fault| e.hint("try again when other builds have their files"));
        }
        Ok(())
    }
}

impl Drop for BudgetShare {
    fn drop(&mut self) {
        self.budget.used.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}
