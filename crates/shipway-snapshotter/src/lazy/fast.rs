//! Layers that are pulled as a whole: an ordinary layer that was never here is fetched in parallel
//! parts and unpacked once, into a layer of the store, while containerd waits for its Prepare. The
//! layer is whole then, and mounted from its own files. containerd hears that the snapshot exists,
//! so it does not fetch, store or unpack the blob.
//!
//! The digest of the blob is checked before there is a layer, and that of the tar before a snapshot
//! stands on it (`vouch`). Whatever fails leaves the pull to containerd.

use super::{
    Lazy, PullReport,
    plain::{BUFFER, codec},
};
use bytes::Bytes;
use parking_lot::Mutex;
use shipway_fault::{Class, Code, Fault, Result};
use shipway_layerstore::{Layer, LayerKey, Unpacked};
use shipway_lazyfetch::{Blob, Finish, Whole};
use shipway_oci::{Descriptor, Digest, ImageName};
use std::{
    collections::BTreeMap,
    io::BufReader,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};
use tokio::sync::{Semaphore, oneshot, watch};

/// Most layers that are pulled at the same time: each keeps a core busy.
const MOST_AT_ONCE: usize = 4;

type Ended = Option<Result<Arc<Layer>>>;

/// A layer that is being pulled.
#[derive(Clone)]
pub struct Pull(watch::Receiver<Ended>);

impl Pull {
    /// The layer, when it is there.
    pub async fn ended(mut self) -> Result<Arc<Layer>> {
        let ended = self.0.wait_for(Option::is_some).await;
        let gone = || Err(Fault::internal("the pull of a layer ended early"));
        ended.ok().and_then(|ended| ended.clone()).unwrap_or_else(gone)
    }
}

/// The layers that are being pulled, by the digests of their blobs.
pub struct Pulls {
    running: Mutex<BTreeMap<Digest, Running>>,
    slots: Arc<Semaphore>,
}

struct Running {
    pull: Pull,
    image: String,
    size: u64,
    received: Arc<AtomicU64>,
}

impl Default for Pulls {
    fn default() -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let slots = Arc::new(Semaphore::new(cores.min(MOST_AT_ONCE)));
        Self { running: Mutex::default(), slots }
    }
}

impl Pulls {
    /// What is told of them.
    pub fn report(&self) -> Vec<PullReport> {
        let running = self.running.lock();
        let report = |(digest, running): (&Digest, &Running)| PullReport {
            digest: digest.to_string(),
            image: running.image.clone(),
            size: running.size,
            received: running.received.load(Ordering::Relaxed),
        };
        running.iter().map(report).collect()
    }
}

/// A pull is over, however it ended.
struct Ending(Arc<Lazy>, Digest);

impl Drop for Ending {
    fn drop(&mut self) {
        self.0.pulls.running.lock().remove(&self.1);
    }
}

/// Passes a blob on, and counts it.
struct Counted {
    whole: Finish,
    received: Arc<AtomicU64>,
}

impl Whole for Counted {
    fn bytes(&mut self, bytes: &Bytes) -> Result<(), Fault> {
        self.received.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        self.whole.bytes(bytes)
    }

    fn finish(self: Box<Self>) -> Result<(), Fault> {
        Box::new(self.whole).finish()
    }
}

impl Lazy {
    /// Pulls a layer of `image`, once however many want it, and whoever of them goes.
    pub(super) fn pull(self: &Arc<Self>, image: &ImageName, layer: &Descriptor) -> Pull {
        let mut running = self.pulls.running.lock();
        if let Some(running) = running.get(&layer.digest) {
            return running.pull.clone();
        }
        let (sender, ended) = watch::channel(None);
        let (pull, received) = (Pull(ended), Arc::<AtomicU64>::default());
        let entry = Running {
            pull: pull.clone(),
            image: image.to_string(),
            size: layer.size,
            received: received.clone(),
        };
        running.insert(layer.digest, entry);
        drop(running);
        let ending = Ending(self.clone(), layer.digest);
        let (image, layer) = (image.clone(), layer.clone());
        shipway_task::spawn_on(&self.runtime, "pull a layer", async move {
            let pulled = ending.0.pulled(&image, &layer, received).await;
            match &pulled {
                Ok(made) => {
                    let number = made.number();
                    tracing::info!(layer = %number, digest = %layer.digest, "pulled a layer");
                }
                Err(fault) => {
                    tracing::warn!(digest = %layer.digest, %fault, "a layer is left to containerd");
                }
            }
            // Who comes later finds it in the store.
            drop(ending);
            let _ = sender.send(Some(pulled));
        });
        pull
    }

    async fn pulled(
        &self,
        image: &ImageName,
        layer: &Descriptor,
        received: Arc<AtomicU64>,
    ) -> Result<Arc<Layer>> {
        let slot = self.pulls.slots.clone().acquire_owned().await;
        let _slot = slot.map_err(|_| Fault::internal("no layer is pulled any more"))?;
        let (repository, digest) = (image.locator(), layer.digest);
        if let Some(known) = self.store.find(&LayerKey::plain(digest)) {
            let found = known.clone();
            let add = move || Ok(found.add_repository(&repository)?);
            shipway_task::blocking("note where a layer was seen", add).await?;
            return Ok(known);
        }
        let sources = self.resolver.sources_at(image).await?;
        let (sender, unpacked) = oneshot::channel();
        let store = self.store.clone();
        let whole = Finish::reading(move |blob| {
            let mut blob = BufReader::with_capacity(BUFFER, blob);
            let codec = codec(&mut blob)?;
            let _ = sender.send(store.unpack(codec, &mut blob)?);
            Ok(())
        });
        let whole = whole.map_err(|e| Fault::io("start a thread", e))?;
        let whole = Box::new(Counted { whole, received });
        let blob = Blob { digest, size: layer.size };
        let (counters, read) = self.fetcher.pull(blob, sources, whole).await;
        self.retired.lock().add(&counters);
        read?;
        let unpacked: Unpacked =
            unpacked.await.map_err(|_| Fault::internal("nothing was unpacked"))?;
        if unpacked.digest() != digest {
            self.retired.lock().wrong += 1;
            let message = format!("the blob that came has the digest {}", unpacked.digest());
            return Err(Fault::new(Code::DataLoss, message).with_class(Class::Environment));
        }
        let store = self.store.clone();
        shipway_task::blocking("make a layer", move || {
            Ok(store.create_unpacked(unpacked, &repository)?)
        })
        .await
    }
}
