//! How far a state of layers has come, and who has its record.

use parking_lot::Mutex;
use tokio::sync::MutexGuard;

/// How far a state has come. It only goes forward: what a lease has lost is another record's to
/// make again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum RecordStage {
    /// Its layers are known, and containerd knows nothing of it.
    Lazy,
    /// Its lease exists and keeps the blobs that are fetched or made for it.
    Leased,
    /// Its snapshot exists, and the lease keeps it.
    Committed,
}

/// The life of one record. Each step forward is made by one caller, while the others wait.
pub(crate) struct Life {
    stage: Mutex<RecordStage>,
    /// Held on the way to [`RecordStage::Leased`].
    leasing: tokio::sync::Mutex<()>,
    /// Held on the way to [`RecordStage::Committed`].
    committing: tokio::sync::Mutex<()>,
    hold: Mutex<Hold>,
}

/// Who has a record.
enum Hold {
    /// The table, and so many handles.
    Listed(usize),
    /// So many handles only: the last one ends the lease.
    Evicted(usize),
}

impl Hold {
    fn handles(&mut self) -> &mut usize {
        let (Self::Listed(handles) | Self::Evicted(handles)) = self;
        handles
    }
}

/// A step that this caller makes: [`LifeStep::done`] when it has.
pub(crate) struct LifeStep<'a> {
    life: &'a Life,
    to: RecordStage,
    _others_wait: MutexGuard<'a, ()>,
}

impl LifeStep<'_> {
    /// The state has come this far.
    pub fn done(self) {
        self.life.reached(self.to);
    }
}

impl Life {
    /// A life that begins at `stage`.
    pub fn at(stage: RecordStage) -> Self {
        Self {
            stage: Mutex::new(stage),
            leasing: Default::default(),
            committing: Default::default(),
            hold: Mutex::new(Hold::Listed(0)),
        }
    }

    /// How far it has come.
    pub fn stage(&self) -> RecordStage {
        *self.stage.lock()
    }

    /// The step to `to`, for the caller to make; `None` if the state has come that far.
    pub async fn step(&self, to: RecordStage) -> Option<LifeStep<'_>> {
        let way = if to == RecordStage::Committed { &self.committing } else { &self.leasing };
        let others_wait = way.lock().await;
        (self.stage() < to).then_some(LifeStep { life: self, to, _others_wait: others_wait })
    }

    /// Whether a caller is making the snapshot now.
    pub fn is_committing(&self) -> bool {
        self.stage() < RecordStage::Committed && self.committing.try_lock().is_err()
    }

    /// The state has come as far as `stage`.
    pub fn reached(&self, stage: RecordStage) {
        let mut now = self.stage.lock();
        *now = stage.max(*now);
    }

    /// Counts one more handle.
    pub fn retain(&self) {
        *self.hold.lock().handles() += 1;
    }

    /// Counts one handle less; whether it was the last one of a record that the table no longer
    /// has.
    pub fn release(&self) -> bool {
        let mut hold = self.hold.lock();
        *hold.handles() -= 1;
        matches!(*hold, Hold::Evicted(0))
    }

    /// Whether there are handles.
    pub fn in_use(&self) -> bool {
        *self.hold.lock().handles() > 0
    }

    /// The table no longer has it; false if it had not before.
    pub fn evict(&self) -> bool {
        let mut hold = self.hold.lock();
        let Hold::Listed(handles) = *hold else { return false };
        *hold = Hold::Evicted(handles);
        true
    }

    /// [`Life::evict`] unless there are handles; whether it did.
    pub fn evict_unused(&self) -> bool {
        let mut hold = self.hold.lock();
        let unused = matches!(*hold, Hold::Listed(0));
        if unused {
            *hold = Hold::Evicted(0);
        }
        unused
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn steps_are_made_once_and_never_back() {
        let life = Life::at(RecordStage::Lazy);
        drop(life.step(RecordStage::Leased).await.unwrap());
        assert_eq!(life.stage(), RecordStage::Lazy, "a step that was given up is none");
        life.step(RecordStage::Leased).await.unwrap().done();
        assert!(life.step(RecordStage::Leased).await.is_none());
        let step = life.step(RecordStage::Committed).await.unwrap();
        assert!(life.is_committing());
        step.done();
        assert!(!life.is_committing() && life.step(RecordStage::Committed).await.is_none());
        life.reached(RecordStage::Leased);
        assert_eq!(life.stage(), RecordStage::Committed);
    }

    #[test]
    fn the_last_handle_of_an_evicted_record_is_reported() {
        let life = Life::at(RecordStage::Committed);
        life.retain();
        assert!(life.in_use() && !life.evict_unused());
        assert!(!life.release(), "the table has it");
        life.retain();
        life.retain();
        assert!(life.evict() && !life.evict());
        assert!(!life.release());
        assert!(life.release());
        let life = Life::at(RecordStage::Lazy);
        assert!(life.evict_unused() && !life.evict_unused());
    }
}
