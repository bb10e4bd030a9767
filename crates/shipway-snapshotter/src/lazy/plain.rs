//! Ordinary layers: one that was unpacked is read once more, in the background, and made a layer of
//! the store, so that it is lazy when it is pulled again. Its blob comes from containerd's content
//! store, or if that has given it up, from the registry where this is allowed.

use super::{Lazy, Wanted};
use crate::content;
use bytes::{Buf as _, Bytes};
use parking_lot::Mutex;
use rustix::process::setpriority_process;
use serde::{Deserialize, Serialize};
use shipway_estargz::Codec;
use shipway_fault::{Class, Code, Fault, Result};
use shipway_layerstore::{LayerKey, Plain};
use shipway_oci::{Digest, ImageName};
use std::{
    collections::{BTreeMap, VecDeque},
    fs,
    io::{self, BufRead as _, BufReader, Read},
    path::{Path, PathBuf},
    sync::{Arc, Weak},
};
use tokio::sync::mpsc::{self, Receiver, UnboundedReceiver, UnboundedSender, unbounded_channel};

/// Directory of the layers that wait, a file for each.
const DIRECTORY: &str = "plain";
/// Most layers that wait; others are not lazy the next time.
const MAX_WAITING: usize = 1024;
/// Most bytes of a file.
const MAX_FILE: u64 = 4096;
/// After so many processes that ended over a layer it is left alone.
const MAX_TRIES: u8 = 3;
/// Layers that could not be made lazy, of which it is known why.
const MAX_REFUSED: usize = 64;
/// Pieces of a blob that wait to be read.
const PIECES: usize = 4;
/// Bytes of them that are looked at together.
pub(super) const BUFFER: usize = 64 << 10;

/// A layer that was unpacked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Unpacked {
    /// Digest of its blob.
    layer: Digest,
    /// containerd's namespace that has the blob.
    namespace: String,
    /// The image that it was pulled for.
    image: String,
    /// Digest of the image's manifest, where that was passed on.
    manifest: Option<Digest>,
    /// How often it was begun.
    tries: u8,
}

/// The layers that wait.
pub struct Queue {
    directory: PathBuf,
    wanted: UnboundedSender<Digest>,
    waiting: Mutex<BTreeMap<Digest, Unpacked>>,
    /// The latest last.
    refused: Mutex<VecDeque<(Digest, String)>>,
}

impl Queue {
    /// The one below `root`, with what an earlier process did not come to; and what it wants next.
    pub fn open(root: &Path) -> Result<(Self, UnboundedReceiver<Digest>)> {
        let directory = root.join(DIRECTORY);
        super::private_directory(&directory)?;
        let failed = |e| Fault::io(format!("read {}", directory.display()), e);
        let (wanted, next) = unbounded_channel();
        let mut waiting = BTreeMap::new();
        for entry in fs::read_dir(&directory).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            match load(&path).filter(|found| found.tries < MAX_TRIES) {
                Some(found) if waiting.len() < MAX_WAITING => {
                    let _ = wanted.send(found.layer);
                    waiting.insert(found.layer, found);
                }
                _ => fs::remove_file(&path).map_err(failed)?,
            }
        }
        let waiting = Mutex::new(waiting);
        Ok((Self { directory, wanted, waiting, refused: Mutex::default() }, next))
    }

    fn path(&self, layer: Digest) -> PathBuf {
        self.directory.join(layer.hex())
    }

    /// A layer is to be made lazy.
    fn push(&self, unpacked: Unpacked) {
        let layer = unpacked.layer;
        let mut waiting = self.waiting.lock();
        if waiting.len() >= MAX_WAITING || waiting.contains_key(&layer) {
            return;
        }
        self.save(&unpacked);
        waiting.insert(layer, unpacked);
        let _ = self.wanted.send(layer);
    }

    /// Without it the layer is forgotten by the next process, and that is all.
    fn save(&self, unpacked: &Unpacked) {
        let path = self.path(unpacked.layer);
        let written = serde_json::to_vec(unpacked).map_err(io::Error::from);
        if let Err(error) = written.and_then(|text| fs::write(&path, text)) {
            tracing::debug!(path = %path.display(), %error, "not written");
        }
    }

    /// A layer is begun.
    fn begin(&self, layer: Digest) -> Option<Unpacked> {
        let mut waiting = self.waiting.lock();
        let unpacked = waiting.get_mut(&layer)?;
        unpacked.tries += 1;
        self.save(unpacked);
        Some(unpacked.clone())
    }

    /// It is done with.
    fn end(&self, layer: Digest, done: &Result<()>) {
        let mut waiting = self.waiting.lock();
        waiting.remove(&layer);
        let _ = fs::remove_file(self.path(layer));
        drop(waiting);
        let mut refused = self.refused.lock();
        refused.retain(|(other, _)| *other != layer);
        // One whose blob has gone meanwhile may be lazy another time.
        if let Err(fault) = done
            && !fault.is_not_found()
        {
            refused.push_back((layer, fault.to_string()));
            if refused.len() > MAX_REFUSED {
                refused.pop_front();
            }
        }
    }

    /// How many wait, and which of the others could not be made lazy, and why.
    pub fn report(&self) -> (usize, Vec<(String, String)>) {
        let refused = self.refused.lock();
        let refused = refused.iter().map(|(layer, why)| (layer.to_string(), why.clone()));
        (self.waiting.lock().len(), refused.collect())
    }
}

fn load(path: &Path) -> Option<Unpacked> {
    let mut text = Vec::new();
    fs::File::open(path).ok()?.take(MAX_FILE).read_to_end(&mut text).ok()?;
    let found: Unpacked = serde_json::from_slice(&text).ok()?;
    (path.file_name()?.to_str()? == found.layer.hex()).then_some(found)
}

impl Lazy {
    /// The layer that is wanted was unpacked by a client of `namespace`.
    pub(super) fn unpacked(&self, namespace: &str, wanted: &Wanted) {
        // One with a table of contents is lazy by that, if the registry answers the next time.
        let is_known = || self.store.find(&LayerKey::plain(wanted.layer)).is_some();
        if !self.config.lazy.plain || wanted.has_toc() || is_known() {
            return;
        }
        self.plain.push(Unpacked {
            layer: wanted.layer,
            namespace: namespace.to_owned(),
            image: wanted.image.to_string(),
            manifest: wanted.manifest,
            tries: 0,
        });
    }

    /// Reads the blob of a layer and makes the layer.
    fn make_plain(self: &Arc<Self>, unpacked: &Unpacked) -> Result<()> {
        let layer = unpacked.layer;
        let image =
            unpacked.image.parse::<ImageName>().map_err(|e| Fault::invalid(e.to_string()))?;
        let repository = image.locator();
        if let Some(known) = self.store.find(&LayerKey::plain(layer)) {
            return Ok(known.add_repository(&repository)?);
        }
        let (sender, pieces) = mpsc::channel(PIECES);
        let (lazy, of) = (self.clone(), unpacked.clone());
        let reading = shipway_task::spawn_on(&self.runtime, "read a blob", async move {
            let (config, resolver) = (&lazy.config, &lazy.resolver);
            match content::read(&config.cri.containerd, &of.namespace, layer, &sender).await {
                Err(fault) if fault.is_not_found() && config.lazy.plain_from_registry => {
                    resolver.blob(&image, of.manifest, layer, &sender).await
                }
                read => read,
            }
        });
        let mut blob = BufReader::with_capacity(BUFFER, Pieces { pieces, piece: Bytes::new() });
        let made = codec(&mut blob).and_then(|codec| Ok(Plain::read(codec, &mut blob)?));
        drop(blob);
        // If containerd did not give all of it, that is why.
        self.runtime.block_on(reading).unwrap_or_else(|e| Err(Fault::internal(e.to_string())))?;
        let made = made?;
        if made.digest() != layer {
            let message = format!("containerd's blob has the digest {}", made.digest());
            return Err(Fault::new(Code::DataLoss, message).with_class(Class::Environment));
        }
        let made = self.store.create_plain(&made, &repository)?;
        tracing::info!(layer = %made.number(), digest = %layer, "an ordinary layer is lazy when it is pulled again");
        Ok(())
    }
}

/// How a blob is compressed, by its first bytes.
pub(super) fn codec(blob: &mut BufReader<impl Read>) -> Result<Codec> {
    let start = blob.fill_buf().map_err(|e| Fault::io("read a blob", e))?;
    match start {
        [0x1f, 0x8b, ..] => Ok(Codec::Gzip),
        // Frames, and those that are skipped (RFC 8878 3.1).
        [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Ok(Codec::Zstd),
        _ => {
            let message = "the layer is compressed with neither gzip nor zstd";
            Err(Fault::new(Code::FailedPrecondition, message).with_class(Class::Environment))
        }
    }
}

/// A blob out of its pieces. Where they end early, the digest of what came is another.
struct Pieces {
    pieces: Receiver<Bytes>,
    piece: Bytes,
}

impl Read for Pieces {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.piece.is_empty() {
            match self.pieces.blocking_recv() {
                Some(piece) => self.piece = piece,
                None => return Ok(0),
            }
        }
        let taken = self.piece.len().min(buffer.len());
        buffer[..taken].copy_from_slice(&self.piece[..taken]);
        self.piece.advance(taken);
        Ok(taken)
    }
}

/// This thread gives way to others as long as this lives.
struct LowPriority;

/// The lowest priority, and that of a process about which nobody said anything.
const LOWEST: i32 = 19;
const USUAL: i32 = 0;

impl LowPriority {
    fn take() -> Self {
        // Of a thread, as Linux has it. Where it is not allowed, the work is as important as other.
        let _ = setpriority_process(None, LOWEST);
        Self
    }
}

impl Drop for LowPriority {
    fn drop(&mut self) {
        let _ = setpriority_process(None, USUAL);
    }
}

/// Makes layers lazy that were unpacked, one at a time.
pub async fn make_all(lazy: Weak<Lazy>, mut wanted: UnboundedReceiver<Digest>) {
    while let Some(layer) = wanted.recv().await {
        let Some(lazy) = lazy.upgrade() else { return };
        let Some(unpacked) = lazy.plain.begin(layer) else { continue };
        let worker: Arc<Lazy> = lazy.clone();
        let made = shipway_task::blocking("make an ordinary layer lazy", move || {
            let _low = LowPriority::take();
            worker.make_plain(&unpacked)
        })
        .await;
        if let Err(fault) = &made {
            tracing::info!(digest = %layer, %fault, "an ordinary layer is not lazy when it is pulled again");
        }
        lazy.plain.end(layer, &made);
        shipway_daemon::memory::trim();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unpacked(n: u64) -> Unpacked {
        Unpacked {
            layer: Digest::of(n.to_le_bytes()),
            namespace: "n".into(),
            image: "r.example/a:1".into(),
            manifest: None,
            tries: 0,
        }
    }

    fn drain(next: &mut UnboundedReceiver<Digest>) -> Vec<Digest> {
        std::iter::from_fn(|| next.try_recv().ok()).collect()
    }

    #[test]
    fn what_waits_survives_and_ends_after_some_tries() {
        let root = tempfile::tempdir().unwrap();
        let (queue, mut next) = Queue::open(root.path()).unwrap();
        let (one, two, three) = (unpacked(1), unpacked(2), unpacked(3));
        for layer in [&one, &two, &one, &three] {
            queue.push(layer.clone());
        }
        assert_eq!(drain(&mut next), [one.layer, two.layer, three.layer]);
        assert_eq!(queue.begin(one.layer), Some(Unpacked { tries: 1, ..one.clone() }));
        queue.end(one.layer, &Ok(()));
        assert_eq!(queue.begin(one.layer), None);
        queue.end(three.layer, &Err(Fault::invalid("it is long")));
        queue.end(one.layer, &Err(Fault::not_found("no blob")));
        let (waiting, refused) = queue.report();
        assert_eq!((waiting, refused.len()), (1, 1));
        assert!(refused[0].0 == three.layer.to_string() && refused[0].1.contains("it is long"));
        // Somebody else's file, and one that a kill left half written.
        std::fs::write(root.path().join("plain/other"), "{").unwrap();
        std::fs::write(root.path().join("plain").join(one.layer.hex()), "{\"la").unwrap();
        for _ in 0..MAX_TRIES {
            let (queue, mut next) = Queue::open(root.path()).unwrap();
            assert_eq!(drain(&mut next), [two.layer]);
            queue.begin(two.layer).unwrap();
        }
        let (queue, mut next) = Queue::open(root.path()).unwrap();
        assert_eq!((drain(&mut next), queue.report().0), (vec![], 0));
        assert_eq!(std::fs::read_dir(root.path().join("plain")).unwrap().count(), 0);
    }

    #[test]
    fn not_too_many_wait() {
        let root = tempfile::tempdir().unwrap();
        let (queue, mut next) = Queue::open(root.path()).unwrap();
        (0..MAX_WAITING as u64 + 3).for_each(|n| queue.push(unpacked(n)));
        assert_eq!((drain(&mut next).len(), queue.report().0), (MAX_WAITING, MAX_WAITING));
        for n in 0..MAX_REFUSED as u64 + 3 {
            queue.end(unpacked(n).layer, &Err(Fault::invalid("x")));
        }
        assert_eq!(queue.report().1.len(), MAX_REFUSED);
    }

    #[test]
    fn blobs_say_how_they_are_compressed() {
        let of = |bytes: &[u8]| codec(&mut BufReader::new(bytes)).ok();
        assert_eq!(of(&[0x1f, 0x8b, 8]), Some(Codec::Gzip));
        assert_eq!(of(&[0x28, 0xb5, 0x2f, 0xfd]), Some(Codec::Zstd));
        assert_eq!(of(&[0x5a, 0x2a, 0x4d, 0x18, 0]), Some(Codec::Zstd));
        assert_eq!((of(b"file.txt\0"), of(b"")), (None, None));
    }
}
