//! Last use and number of uses, in a file that may be lost.

use crate::id::RefId;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use std::{
    collections::HashMap,
    path::PathBuf,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// How often a state was used, and when last.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct UseCount {
    /// Milliseconds since 1970.
    last: u64,
    pub count: u64,
}

impl UseCount {
    pub fn last(self) -> SystemTime {
        UNIX_EPOCH + Duration::from_millis(self.last)
    }
}

pub(crate) struct LastUsed {
    file: PathBuf,
    table: Mutex<HashMap<String, UseCount>>,
    dirty: AtomicBool,
    saving: tokio::sync::Mutex<()>,
}

impl LastUsed {
    pub fn load(file: PathBuf) -> Self {
        let table = std::fs::read(&file)
            .ok()
            .and_then(|bytes| serde_json::from_slice(&bytes).ok())
            .unwrap_or_default();
        Self {
            file,
            table: Mutex::new(table),
            dirty: AtomicBool::new(false),
            saving: Default::default(),
        }
    }

    pub fn get(&self, id: &RefId) -> Option<UseCount> {
        self.table.lock().get(&id.0).copied()
    }

    /// Counts a use that ends now.
    pub fn used(&self, id: &RefId) {
        let now =
            SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis() as u64;
        let mut table = self.table.lock();
        let entry = table.entry(id.0.clone()).or_default();
        *entry = UseCount { last: now, count: entry.count + 1 };
        self.dirty.store(true, Ordering::Release);
    }

    pub fn forget(&self, id: &RefId) {
        if self.table.lock().remove(&id.0).is_some() {
            self.dirty.store(true, Ordering::Release);
        }
    }

    /// Writes what changed. Failure loses nothing that matters and is only logged.
    pub async fn save(&self) {
        let _one = self.saving.lock().await;
        if !self.dirty.swap(false, Ordering::AcqRel) {
            return;
        }
        let Ok(bytes) = serde_json::to_vec(&*self.table.lock()) else { return };
        let (file, half) = (self.file.clone(), self.file.with_extension("new"));
        let written = async {
            tokio::fs::write(&half, bytes).await?;
            tokio::fs::rename(&half, &file).await
        };
        if let Err(e) = written.await {
            tracing::warn!(file = %file.display(), error = %e, "failed to save times of last use");
        }
    }
}
