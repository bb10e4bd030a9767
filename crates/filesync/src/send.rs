//! The sending side: walks a tree, then answers requests for files (rows `cb.filesync`,
//! `cb.fsutil.flow`).

use parking_lot::Mutex;
use shipway_task::blocking;
use std::{
    io::{self, Read},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use futures::StreamExt;
use shipway_fault::{Code, Fault, Result};
use shipway_gocompat::{FileKind, FileMode};
use shipway_proto::fsutil::types::packet::PacketType;
use tokio::{
    sync::mpsc::{self, UnboundedReceiver, UnboundedSender},
    task::JoinSet,
};

use crate::{
    Mapped, Packet, PacketStream, PathFilter, Stat, disk,
    follow::{follow_paths, without_nested},
    path::join,
    walk::{self, Details, Visitor},
};

/// Files read at the same time.
const READERS: usize = 4;
/// Content per packet; peers take anything below gRPC's message limit, and clients of Go's defaults
/// take 4 MiB.
const CHUNK: usize = 256 << 10;

/// Changes the stat of an entry or refuses it.
pub type MapFn = dyn Fn(&mut Stat) -> Mapped + Send + Sync;

/// What to send of a directory.
#[derive(Clone, Default)]
pub struct SendOptions {
    /// If any, only what matches these.
    pub include: Vec<String>,
    /// Nothing that matches these.
    pub exclude: Vec<String>,
    /// Paths to include with every link they lead through.
    pub follow: Vec<String>,
    /// Sees every entry before it is sent.
    pub map: Option<Arc<MapFn>>,
    /// Distinguish files by more than size and time, as the receiver asked
    /// ([`crate::FileSyncRequest::identify`]).
    pub identify: bool,
}

/// One directory to send.
#[derive(Clone)]
pub struct SendRoot {
    /// Where it is.
    pub dir: PathBuf,
    /// If given, the entry in the sent tree below which the content appears: its path is one name,
    /// its mode a directory's.
    pub under: Option<Stat>,
    /// What of it to send.
    pub options: SendOptions,
}

/// Counts of a finished transfer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sent {
    /// Entries described.
    pub entries: u64,
    /// Files whose content was asked for.
    pub files: u64,
    /// Bytes of content.
    pub bytes: u64,
}

/// Sends trees.
pub struct Sender {
    roots: Vec<SendRoot>,
    /// Whether the directories may have entries in common.
    merge: bool,
    progress: Option<Arc<dyn Fn(Sent) + Send + Sync>>,
}

impl Sender {
    /// Sends what `options` let through of `dir`.
    pub fn new(dir: impl Into<PathBuf>, options: SendOptions) -> Self {
        Self {
            roots: vec![SendRoot { dir: dir.into(), under: None, options }],
            merge: false,
            progress: None,
        }
    }

    /// Sends several directories, each below its own name; they are sorted by it.
    pub fn many(mut roots: Vec<SendRoot>) -> Result<Self> {
        roots.sort_by(|a, b| name_of(a).cmp(name_of(b)));
        for (i, root) in roots.iter().enumerate() {
            let name = name_of(root);
            if name.is_empty() || name.contains('/') || name == "." || name == ".." {
                return Err(Fault::invalid(format!("{name:?} cannot name a directory to send")));
            }
            if i > 0 && name_of(&roots[i - 1]) == name {
                return Err(Fault::invalid(format!("two directories to send are called {name:?}")));
            }
        }
        Ok(Self { roots, merge: false, progress: None })
    }

    /// Sends several directories as one; what two of them have must be a directory in both.
    pub fn merged(roots: Vec<SendRoot>) -> Self {
        Self { roots, merge: true, progress: None }
    }

    /// Reports after each packet of content.
    #[must_use]
    pub fn on_progress(mut self, progress: Arc<dyn Fn(Sent) + Send + Sync>) -> Self {
        self.progress = Some(progress);
        self
    }

    /// Runs the transfer to its end.
    pub async fn run(self, stream: PacketStream) -> Result<Sent> {
        let PacketStream { mut incoming, outgoing } = stream;
        let (requests, queue) = mpsc::unbounded_channel();
        let merge = self.merge;
        let resolve = move || {
            self.roots
                .into_iter()
                .map(|r| Ok((walk::resolve_root(&r.dir)?, r)))
                .collect::<Result<Vec<_>>>()
        };
        let roots = blocking("send files", resolve).await?;
        let shared = Arc::new(Shared {
            files: Mutex::new(Vec::new()),
            roots,
            queue: Mutex::new(queue),
            outgoing: outgoing.clone(),
            counts: Counts::default(),
            progress: self.progress,
        });
        let mut tasks: JoinSet<Result<()>> = JoinSet::new();
        tasks.spawn(blocking("list files", {
            let shared = shared.clone();
            move || {
                if merge {
                    shared.walk_merged()
                } else {
                    shared.walk(&mut |stat, source| shared.describe(stat, source))
                }
            }
        }));
        for _ in 0..READERS {
            let shared = shared.clone();
            tasks.spawn(blocking("read files", move || shared.read_files()));
        }
        let result = loop {
            tokio::select! {
                packet = incoming.next() => match packet {
                    None => break Err(Fault::unavailable("the receiver ended the transfer early")),
                    Some(Err(fault)) => break Err(fault.context("receive requests for files")),
                    Some(Ok(packet)) => match shared.handle(packet, &requests) {
                        Ok(false) => {}
                        Ok(true) => break Ok(()),
                        Err(fault) => break Err(fault),
                    },
                },
                Some(done) = tasks.join_next() => match done {
                    Ok(Ok(())) => {}
                    // A receiver that fails says why before it goes, and that is the error to
                    // return.
                    Ok(Err(fault)) if fault.code() == Code::Unavailable => break Err(last_words(&mut incoming).await.unwrap_or(fault)),
                    Ok(Err(fault)) => break Err(fault),
                    Err(error) => break Err(Fault::internal(format!("send files: {error}"))),
                },
            }
        };
        drop(requests);
        let last = match &result {
            Ok(()) => Packet { r#type: PacketType::PacketFin.into(), ..Default::default() },
            Err(fault) => Packet {
                r#type: PacketType::PacketErr.into(),
                data: fault.to_string().into(),
                ..Default::default()
            },
        };
        // A receiver that is gone needs no goodbye; one that is stuck must not keep us.
        let _ = tokio::time::timeout(std::time::Duration::from_secs(5), outgoing.send(last)).await;
        result.map(|()| shared.counts.get())
    }
}

/// The error that a receiver reports.
fn reported(packet: &Packet) -> Fault {
    Fault::unknown(format!("error from receiver: {}", String::from_utf8_lossy(&packet.data)))
}

/// The error that a receiver sent before it went away, if it sent one.
async fn last_words(
    incoming: &mut (impl futures::Stream<Item = Result<Packet>> + Unpin),
) -> Option<Fault> {
    let find = async {
        while let Some(Ok(packet)) = incoming.next().await {
            if packet.r#type() == PacketType::PacketErr {
                return Some(reported(&packet));
            }
        }
        None
    };
    tokio::time::timeout(std::time::Duration::from_secs(1), find).await.ok().flatten()
}

fn name_of(root: &SendRoot) -> &str {
    root.under.as_ref().map_or("", |s| &s.path)
}

/// What can be asked for.
struct Source {
    root: usize,
    path: Box<str>,
    size: u64,
}

#[derive(Default)]
struct Counts {
    entries: AtomicU64,
    files: AtomicU64,
    bytes: AtomicU64,
}

impl Counts {
    fn get(&self) -> Sent {
        let load = |n: &AtomicU64| n.load(Ordering::Relaxed);
        Sent { entries: load(&self.entries), files: load(&self.files), bytes: load(&self.bytes) }
    }
}

struct Shared {
    /// By id; taken when asked for, so that the queue of requests cannot outgrow the tree.
    files: Mutex<Vec<Option<Source>>>,
    roots: Vec<(PathBuf, SendRoot)>,
    queue: Mutex<UnboundedReceiver<Request>>,
    outgoing: mpsc::Sender<Packet>,
    counts: Counts,
    progress: Option<Arc<dyn Fn(Sent) + Send + Sync>>,
}

/// Takes an entry, and where its content is.
type EntrySink<'a> = dyn FnMut(Stat, Option<Source>) -> Result<()> + 'a;

/// A file and the id it was asked for by.
type Request = (u32, Source);

impl Shared {
    /// Takes a packet from the receiver; true if it was the last.
    fn handle(&self, packet: Packet, requests: &UnboundedSender<Request>) -> Result<bool> {
        match packet.r#type() {
            PacketType::PacketErr => Err(reported(&packet)),
            PacketType::PacketReq => {
                let source = self.files.lock().get_mut(packet.id as usize).and_then(Option::take);
                let source = source
                    .ok_or_else(|| Fault::invalid(format!("invalid file id {}", packet.id)))?;
                let _ = requests.send((packet.id, source));
                Ok(false)
            }
            PacketType::PacketFin => Ok(true),
            PacketType::PacketStat | PacketType::PacketData => Ok(false),
        }
    }

    fn send(&self, packet: Packet) -> Result<()> {
        self.outgoing
            .blocking_send(packet)
            .map_err(|_| Fault::unavailable("the receiver has gone away"))
    }

    /// All directories as one, in the order of the protocol.
    fn walk_merged(&self) -> Result<()> {
        let mut all: Vec<(Stat, Option<Source>)> = Vec::new();
        self.visit(&mut |stat, source| {
            all.push((stat, source));
            Ok(())
        })?;
        // A directory's content comes right after it: its separator sorts before everything else.
        all.sort_by(|(a, _), (b, _)| a.path.split('/').cmp(b.path.split('/')));
        let mut last: Option<Stat> = None;
        for (stat, source) in all {
            if let Some(last) = last.as_ref().filter(|last| last.path == stat.path) {
                let directories =
                    [last, &stat].iter().all(|s| FileMode(s.mode).kind() == FileKind::Directory);
                if !directories {
                    return Err(Fault::invalid(format!(
                        "cannot overwrite {} when split option is disabled",
                        stat.path
                    )));
                }
                continue;
            }
            last = Some(stat.clone());
            self.describe(stat, source)?;
        }
        self.send(Packet { r#type: PacketType::PacketStat.into(), ..Default::default() })
    }

    fn walk(&self, give: &mut EntrySink<'_>) -> Result<()> {
        self.visit(give)?;
        self.send(Packet { r#type: PacketType::PacketStat.into(), ..Default::default() })
    }

    fn visit(&self, give: &mut EntrySink<'_>) -> Result<()> {
        for (index, (dir, root)) in self.roots.iter().enumerate() {
            let options = &root.options;
            let mut include = options.include.clone();
            if !options.follow.is_empty()
                && let Some(targets) = follow_paths(dir, &options.follow)?
            {
                include.extend(targets);
                include = without_nested(include).unwrap_or_default();
            }
            let filter = PathFilter::new(&include, &options.exclude)?;
            let prefix = name_of(root);
            if let Some(under) = &root.under {
                let mut under = under.clone();
                under.mode = FileMode::directory(FileMode(under.mode).permissions()).0;
                give(under, None)?;
            }
            let details = Details { xattrs: true, identities: options.identify };
            walk::walk(
                dir,
                &filter,
                details,
                &mut Describe { give, index, prefix, map: options.map.as_deref() },
            )?;
        }
        Ok(())
    }

    fn describe(&self, stat: Stat, source: Option<Source>) -> Result<()> {
        self.files.lock().push(source);
        self.counts.entries.fetch_add(1, Ordering::Relaxed);
        self.send(Packet {
            r#type: PacketType::PacketStat.into(),
            stat: Some(stat),
            ..Default::default()
        })
    }

    /// Answers requests until there can be none any more.
    fn read_files(&self) -> Result<()> {
        let roots =
            self.roots.iter().map(|(dir, _)| disk::open_root(dir)).collect::<Result<Vec<_>>>()?;
        loop {
            let next = self.queue.lock().blocking_recv();
            let Some((id, source)) = next else { return Ok(()) };
            self.read_file(id, &source, &roots)?;
        }
    }

    fn read_file(&self, id: u32, source: &Source, roots: &[OwnedFd]) -> Result<()> {
        let failed = |what: &str, e| {
            Fault::io(
                format!("{what} {}", self.roots[source.root].0.join(&*source.path).display()),
                e,
            )
        };
        let data =
            |data| Packet { r#type: PacketType::PacketData.into(), id, data, ..Default::default() };
        match disk::open_file(&roots[source.root], &source.path) {
            // Gone, or a socket: as with every sender of this protocol, an empty file.
            Err(e) if gone(&e) => {}
            Err(e) => return Err(failed("open", e)),
            Ok(mut file) => {
                // A file that grows meanwhile is sent as long as it was described.
                let mut left = source.size;
                while left > 0 {
                    let mut buffer = vec![0; usize::try_from(left).unwrap_or(CHUNK).min(CHUNK)];
                    let n = match file.read(&mut buffer) {
                        Ok(0) => break,
                        Ok(n) => n,
                        Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                        Err(e) if e.kind() == io::ErrorKind::IsADirectory => break,
                        Err(e) => return Err(failed("read", e)),
                    };
                    buffer.truncate(n);
                    left -= n as u64;
                    self.send(data(Bytes::from(buffer)))?;
                    self.counts.bytes.fetch_add(n as u64, Ordering::Relaxed);
                    if let Some(progress) = &self.progress {
                        progress(self.counts.get());
                    }
                }
            }
        }
        // Counted first: the receiver may end the transfer as soon as it has the last.
        self.counts.files.fetch_add(1, Ordering::Relaxed);
        self.send(data(Bytes::new()))
    }
}

fn gone(error: &io::Error) -> bool {
    use rustix::io::Errno;
    let errno = Errno::from_io_error(error);
    matches!(errno, Some(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::NXIO))
}

/// Turns a walk's entries into packets.
struct Describe<'a, 'b> {
    give: &'a mut EntrySink<'b>,
    index: usize,
    prefix: &'a str,
    map: Option<&'a MapFn>,
}

impl Visitor for Describe<'_, '_> {
    fn map(&mut self, stat: &mut Stat) -> Mapped {
        self.map.map_or(Mapped::Keep, |map| map(stat))
    }

    fn entry(&mut self, mut stat: Stat) -> Result<()> {
        let kind = FileMode(stat.mode).kind();
        let source = (kind == FileKind::Regular).then(|| Source {
            root: self.index,
            path: stat.path.as_str().into(),
            size: stat.size.try_into().unwrap_or(0),
        });
        if !self.prefix.is_empty() {
            stat.path = join(self.prefix, &stat.path);
            if kind == FileKind::Symlink {
                if stat.linkname.starts_with('/') {
                    stat.linkname = format!("/{}{}", self.prefix, stat.linkname);
                }
            } else if !stat.linkname.is_empty() {
                stat.linkname = join(self.prefix, &stat.linkname);
            }
        }
        (self.give)(stat, source)
    }
}

/// Describes one existing path, for [`SendRoot::under`].
impl SendRoot {
    /// A directory to send below `name`, with the mode and owner it has.
    pub fn under(dir: &Path, name: &str, options: SendOptions) -> Result<Self> {
        let failed = |e| Fault::io(format!("stat {}", dir.display()), e);
        let meta = std::fs::metadata(dir).map_err(failed)?;
        let stat = walk::stat(name, dir, &meta, false).map_err(failed)?;
        Ok(Self { dir: dir.to_owned(), under: Some(stat), options })
    }
}
