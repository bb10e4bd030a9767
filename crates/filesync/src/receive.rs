//! The receiving side: compares what is sent with what is there, asks for what differs, writes it
//! (rows `cb.fsutil.flow`, `src.local*`).
//!
//! One thread applies entries in order, a few write files, and the calling task only distributes
//! packets. Requests wait in a queue of their own, because a receiver that stopped reading while it
//! asks would deadlock with a sender that stops reading while it sends.

mod apply;

use shipway_task::{blocking, named};
use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use futures::{StreamExt, future::BoxFuture};
use prost::Message;
use shipway_fault::{Fault, Result};
use shipway_proto::fsutil::types::packet::PacketType;
use tokio::{sync::mpsc, task::JoinSet};

use self::apply::Apply;
use crate::{
    Budget, ContentHash, KnownTree, Packet, PacketStream, PatternMatcher, Stat, disk,
    write::{Batch, Expected, FileWriter, Finished},
};

/// Threads that write files.
const WRITERS: usize = 2;
/// Neighbours in the tree go to the same thread, in runs of this many, so that its directory
/// handles serve them all.
const RUN: u32 = 64;
/// Packets taken at once, if so many are there.
const BATCH: usize = 128;
/// Batches waiting for a thread.
const QUEUE: usize = 4;
/// Grace for a sender to end its stream when all is done.
const GOODBYE: Duration = Duration::from_secs(10);

/// Name of the file that says what the sender has (see [`ReceiveOptions::listed`]), as in BuildKit:
/// for each entry the length of its `Stat`, four bytes with the lowest first, and the `Stat`.
pub const LISTING: &str = ".fsutil-metadata";

/// Whether an entry with unchanged metadata counts as unchanged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Differ {
    /// Yes.
    #[default]
    Metadata,
    /// No: every file is asked for.
    None,
}

/// How far a transfer is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Entries described so far.
    pub entries: u64,
    /// Files received whole.
    pub files: u64,
    /// Bytes received, descriptions included, as clients show it.
    pub bytes: u64,
    /// Whether this is the last report.
    pub done: bool,
}

/// What happened to an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChangeKind {
    /// It is new.
    Added,
    /// It was there and differs.
    Modified,
    /// It is gone, with everything below it.
    Deleted,
}

/// One change of the destination.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// Path of the entry.
    pub path: Arc<str>,
    /// What happened.
    pub kind: ChangeKind,
    /// Digest by [`ReceiveOptions::hash`], for files with content.
    pub digest: Option<[u8; 32]>,
}

/// Changes the stat of an entry.
pub type StatFn = dyn Fn(&mut Stat) + Send + Sync;

/// How to receive.
#[derive(Clone, Default)]
pub struct ReceiveOptions {
    /// Changes every entry's stat before it is compared and applied, for example its owner.
    pub map: Option<Arc<StatFn>>,
    /// What counts as a change.
    pub differ: Differ,
    /// Add to the destination without looking at what else is there, and delete nothing.
    pub merge: bool,
    /// What the destination holds, from an earlier transfer; without it, the destination is walked.
    pub known: Option<KnownTree>,
    /// Receive what these patterns match, with the directories above it, and of everything else
    /// only what it is: that is in the file [`LISTING`], which a sender's own of that name never
    /// replaces (row `src.local.meta`).
    pub listed: Option<Arc<PatternMatcher>>,
    /// Hears of progress after every batch of packets.
    pub progress: Option<Arc<dyn Fn(Progress) + Send + Sync>>,
    /// Hashes content on the way, but for files with extended attributes: which of these the file
    /// system keeps is known only there.
    pub hash: Option<Arc<dyn ContentHash>>,
    /// Bounds the memory that descriptions take; the process's without.
    pub budget: Option<Arc<Budget>>,
}

/// A finished transfer.
#[derive(Clone, Debug, Default)]
pub struct Received {
    /// What the sender has, which is what the destination now holds (with
    /// [`ReceiveOptions::merge`], a part of it).
    pub tree: KnownTree,
    /// What changed in the destination, in tree order except that links and deletions may come
    /// later.
    pub changes: Vec<Change>,
    /// Counts.
    pub progress: Progress,
}

/// Receives a tree into a directory.
pub struct Receiver {
    dest: PathBuf,
    options: ReceiveOptions,
}

impl Receiver {
    /// Receives into `dest`, which must exist.
    pub fn new(dest: &Path, options: ReceiveOptions) -> Self {
        Self { dest: dest.to_owned(), options }
    }

    /// Runs the transfer to its end. If it fails or is dropped, the destination is somewhere
    /// between its old and its new state, and only a walk shows where: a [`KnownTree`] of it must
    /// be forgotten.
    pub async fn run(self, stream: PacketStream) -> Result<Received> {
        let PacketStream { mut incoming, outgoing } = stream;
        let result = self.transfer(&mut incoming, &outgoing).await;
        let (kind, data) = match &result {
            Ok(_) => (PacketType::PacketFin, String::new()),
            Err(fault) => (PacketType::PacketErr, fault.to_string()),
        };
        let last = Packet { r#type: kind.into(), data: data.into(), ..Default::default() };
        let goodbye = async {
            let _ = outgoing.send(last).await;
            drop(outgoing);
            if result.is_ok() {
                // Read to the end, so that the call ends cleanly and not by being torn down.
                while let Some(Ok(_)) = incoming.next().await {}
            }
        };
        let _ = tokio::time::timeout(GOODBYE, goodbye).await;
        result
    }

    async fn transfer(
        &self,
        incoming: &mut (impl futures::Stream<Item = Result<Packet>> + Unpin),
        outgoing: &mpsc::Sender<Packet>,
    ) -> Result<Received> {
        let (requests, queue) = mpsc::unbounded_channel();
        let mut helpers = JoinSet::new();
        helpers.spawn(named("request files", ask(queue, outgoing.clone())));
        let mut pool = Pool::start(&self.dest, &self.options, requests);
        let mut progress = Progress::default();
        if let Err(fault) = self.feed(&mut pool, incoming, &mut progress).await {
            // Nothing may be written any more once the failure is known.
            pool.stop().await;
            return Err(fault);
        }
        let mut received = pool.finish().await?;
        progress.done = true;
        received.progress = progress;
        if let Some(report) = &self.options.progress {
            report(progress);
        }
        Ok(received)
    }

    async fn feed(
        &self,
        pool: &mut Pool,
        incoming: &mut (impl futures::Stream<Item = Result<Packet>> + Unpin),
        progress: &mut Progress,
    ) -> Result<()> {
        let mut packets = incoming.ready_chunks(BATCH);
        while !pool.complete() {
            tokio::select! {
                batch = packets.next() => {
                    let batch = batch.ok_or_else(|| Fault::unavailable("the sender ended the transfer early"))?;
                    pool.distribute(batch, progress).await?;
                    if let Some(report) = &self.options.progress {
                        report(*progress);
                    }
                }
                event = pool.event() => event?,
            }
        }
        Ok(())
    }
}

/// Sends requests as fast as the sender takes them.
async fn ask(mut queue: mpsc::UnboundedReceiver<u32>, outgoing: mpsc::Sender<Packet>) {
    while let Some(id) = queue.recv().await {
        let request = Packet { r#type: PacketType::PacketReq.into(), id, ..Default::default() };
        if outgoing.send(request).await.is_err() {
            return;
        }
    }
}

/// The threads at work and the ways to them.
struct Pool {
    /// Given up at the empty STAT that ends the descriptions, after an empty batch has said so: a
    /// way that is merely closed means failure, and must not look like a tree that ends here, for
    /// whose absent rest everything would be deleted.
    stats: Option<mpsc::Sender<Vec<Stat>>>,
    applying: Option<BoxFuture<'static, Result<Apply>>>,
    /// The applied entries, once all are.
    applied: Option<Apply>,
    writers: Vec<mpsc::Sender<Batch>>,
    writing: JoinSet<Result<Vec<Finished>>>,
    ended: u64,
}

impl Pool {
    fn start(dest: &Path, options: &ReceiveOptions, requests: mpsc::UnboundedSender<u32>) -> Self {
        let expected: Vec<Expected> = (0..WRITERS).map(|_| Expected::default()).collect();
        let (stats, entries) = mpsc::channel(QUEUE);
        let applying = blocking("apply a transfer", {
            let (dest, options, expected) = (dest.to_owned(), options.clone(), expected.clone());
            move || Apply::new(&dest, options, expected, requests)?.run(entries)
        });
        let mut writing = JoinSet::new();
        let mut writers = Vec::new();
        for expected in expected {
            let (sink, batches) = mpsc::channel(QUEUE);
            let (dest, hash) = (dest.to_owned(), options.hash.clone());
            writing.spawn(blocking("write files", move || {
                FileWriter::new(disk::open_root(&dest)?, expected, hash).run(batches)
            }));
            writers.push(sink);
        }
        Self {
            stats: Some(stats),
            applying: Some(Box::pin(applying)),
            applied: None,
            writers,
            writing,
            ended: 0,
        }
    }

    /// Whether every entry is applied and every requested file has come.
    fn complete(&self) -> bool {
        self.applied.as_ref().is_some_and(|a| a.requested() <= self.ended)
    }

    /// Waits for a thread to end: the entries' does when all are applied, the others' only do in
    /// failure.
    async fn event(&mut self) -> Result<()> {
        let crashed = |e| Fault::internal(format!("receive files: {e}"));
        tokio::select! {
            applied = async {
                match &mut self.applying {
                    Some(handle) => handle.await,
                    None => std::future::pending().await,
                }
            } => {
                self.applying = None;
                self.applied = Some(applied?);
            }
            Some(written) = self.writing.join_next() => {
                written.map_err(crashed)??;
            }
        }
        Ok(())
    }

    async fn distribute(
        &mut self,
        packets: Vec<Result<Packet>>,
        progress: &mut Progress,
    ) -> Result<()> {
        let mut stats = Vec::new();
        let mut batches: [Batch; WRITERS] = Default::default();
        let mut described = false;
        for packet in packets {
            let packet = packet.map_err(|e| e.context("receive files"))?;
            progress.bytes += packet.encoded_len() as u64;
            match packet.r#type() {
                PacketType::PacketStat if self.stats.is_none() || described => {
                    return Err(Fault::invalid(
                        "the sender describes files after it said that all were described",
                    ));
                }
                PacketType::PacketStat => match packet.stat {
                    Some(stat) => {
                        progress.entries += 1;
                        stats.push(stat);
                    }
                    None => described = true,
                },
                PacketType::PacketData => {
                    if packet.data.is_empty() {
                        self.ended += 1;
                        progress.files += 1;
                    }
                    batches[(packet.id / RUN) as usize % WRITERS].push((packet.id, packet.data));
                }
                PacketType::PacketErr => {
                    return Err(Fault::unknown(format!(
                        "error from sender: {}",
                        String::from_utf8_lossy(&packet.data)
                    )));
                }
                PacketType::PacketFin => {
                    return Err(Fault::invalid(
                        "the sender ended the transfer before its files were received",
                    ));
                }
                PacketType::PacketReq => {
                    return Err(Fault::invalid(
                        "the sender asks for files instead of sending them",
                    ));
                }
            }
        }
        // A closed way means that its thread has failed: `event` says why.
        if let Some(sink) = &self.stats
            && !stats.is_empty()
            && sink.send(stats).await.is_err()
        {
            self.failure().await?;
        }
        if described
            && let Some(sink) = self.stats.take()
            && sink.send(Vec::new()).await.is_err()
        {
            self.failure().await?;
        }
        for (i, batch) in batches.into_iter().enumerate() {
            if !batch.is_empty() && self.writers[i].send(batch).await.is_err() {
                self.failure().await?;
            }
        }
        Ok(())
    }

    /// Lets every thread end, and forgets what it says.
    async fn stop(mut self) {
        self.stats = None;
        self.writers.clear();
        if let Some(applying) = self.applying {
            let _ = applying.await;
        }
        while self.writing.join_next().await.is_some() {}
    }

    /// Why a thread no longer takes anything.
    async fn failure(&mut self) -> Result<()> {
        while self.applying.is_some() || !self.writing.is_empty() {
            self.writers.clear();
            self.stats = None;
            self.event().await?;
        }
        Err(Fault::internal("a thread that receives files ended without saying why"))
    }

    /// Lets the writers end and settles what had to wait for them.
    async fn finish(mut self) -> Result<Received> {
        let crashed = |e| Fault::internal(format!("receive files: {e}"));
        self.writers.clear();
        let mut finished = Vec::new();
        while let Some(written) = self.writing.join_next().await {
            finished.extend(written.map_err(crashed)??);
        }
        let Some(applied) = self.applied else {
            return Err(Fault::internal("the transfer ended before its entries were applied"));
        };
        if finished.len() as u64 != applied.requested() {
            return Err(Fault::invalid("the sender ended some files twice and others never"));
        }
        blocking("finish a transfer", move || applied.finish(finished)).await
    }
}
