//! What keys that stand for credentials are made of: random bytes per registry, kept beside
//! Docker's configuration where other clients keep them, too.

use parking_lot::Mutex;
use std::{
    collections::BTreeMap,
    fs::{File, OpenOptions},
    io::{Read, Write},
    os::unix::fs::OpenOptionsExt,
    path::PathBuf,
};

use base64::{Engine, prelude::BASE64_STANDARD};
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use shipway_fault::Result;
use shipway_host::random_bytes;

const FILE: &str = ".token_seed";
const LOCK: &str = ".token_seed.lock";
const MAX_FILE: u64 = 1 << 20;

/// Seeds by registry.
#[derive(Default)]
pub(crate) struct Seeds {
    /// Where they are kept; without, they live as long as we do.
    dir: Option<PathBuf>,
    known: Mutex<BTreeMap<String, Seed>>,
}

#[derive(Clone, Serialize, Deserialize)]
struct Seed {
    #[serde(rename = "Seed")]
    seed: String,
}

impl Seeds {
    pub(crate) fn in_dir(dir: Option<PathBuf>) -> Self {
        Self { dir, known: Mutex::default() }
    }

    /// The seed for `host`, made if there is none. A home that cannot be written to is not a reason
    /// to have none.
    pub(crate) fn of(&self, host: &str) -> Result<Vec<u8>> {
        let mut known = self.known.lock();
        // Held until the file is written: others make seeds, too.
        let _lock = self.dir.as_ref().and_then(|dir| {
            let file = OpenOptions::new()
                .create(true)
                .truncate(false)
                .write(true)
                .mode(0o600)
                .open(dir.join(LOCK))
                .ok()?;
            flock(&file, FlockOperation::LockExclusive).ok()?;
            Some(file)
        });
        known.extend(self.read());
        if let Some(seed) = known.get(host).and_then(|s| BASE64_STANDARD.decode(&s.seed).ok()) {
            return Ok(seed);
        }
        let seed = random_bytes::<16>()?.to_vec();
        known.insert(host.to_owned(), Seed { seed: BASE64_STANDARD.encode(&seed) });
        if let Err(error) = self.write(&known) {
            tracing::debug!(%error, "failed to write the seeds of tokens");
        }
        Ok(seed)
    }

    /// What is kept; a file that was cut short has nothing.
    fn read(&self) -> BTreeMap<String, Seed> {
        let read = || {
            let mut text = Vec::new();
            File::open(self.dir.as_ref()?.join(FILE))
                .ok()?
                .take(MAX_FILE)
                .read_to_end(&mut text)
                .ok()?;
            serde_json::from_slice(&text).ok()
        };
        read().unwrap_or_default()
    }

    fn write(&self, known: &BTreeMap<String, Seed>) -> std::io::Result<()> {
        let Some(dir) = &self.dir else { return Ok(()) };
        let text = serde_json::to_vec_pretty(known)?;
        OpenOptions::new()
            .create(true)
            .truncate(true)
            .write(true)
            .mode(0o600)
            .open(dir.join(FILE))?
            .write_all(&text)
    }
}
