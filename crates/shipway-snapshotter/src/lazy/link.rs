//! The connection to the keeper: made when it is lost, with the layers told again, and the keeper
//! itself started where no service manager does.

use parking_lot::{Condvar, Mutex, MutexGuard};
use rustix::{
    fd::AsFd as _,
    fs::{MemfdFlags, memfd_create},
    io::Errno,
};
use shipway_fault::{Fault, Result};
use shipway_keeper::client::{ClientError, Files, Holder, Keeper, News};
use shipway_layermount::{FuseFiles, ProbeLayer};
use shipway_layerstore::Layer;
use std::{
    collections::BTreeMap,
    fs::File,
    ops::Range,
    os::unix::{fs::FileExt as _, process::CommandExt as _},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

/// Pause between attempts to reach the keeper, and after how many of them one is started.
const PAUSE: Duration = Duration::from_millis(50);
const ATTEMPTS: u32 = 4;
/// How long somebody waits for the keeper who cannot do without.
const PATIENCE: Duration = Duration::from_secs(10);

/// Number of the layer that kernels are tried with: no other's, and not the same in each process,
/// for the kernel remembers what another version of this program may have made differently.
fn probe_number() -> u32 {
    (u32::MAX >> 1) + std::process::id()
}

/// Where the keeper of `run` serves a layer.
pub fn served_files(run: &Path, number: u32) -> FuseFiles {
    let k = run.join("k");
    FuseFiles {
        data: k.join(format!("{number}.data")),
        img: k.join(format!("{number}.img")),
        tree: k.join(number.to_string()),
    }
}

/// What the keeper is told of a layer.
pub struct Registered {
    pub layer: Arc<Layer>,
    /// The map of good blocks.
    pub map: File,
}

/// How a keeper is started.
pub type Starter = Box<dyn Fn() -> Command + Send + Sync>;

/// The connection.
pub struct Link {
    socket: PathBuf,
    held: Holder,
    starter: Option<Starter>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    keeper: Option<Arc<Keeper>>,
    layers: BTreeMap<u32, Arc<Registered>>,
    /// What the keeper is to remember.
    memory: Option<File>,
    closed: bool,
}

impl Link {
    /// A connection to the keeper at `socket`, to be made by [`Link::run`]. `starter` makes the
    /// command that starts one where there is none.
    pub fn new(socket: PathBuf, starter: Option<Starter>) -> Self {
        Self {
            socket,
            held: Holder::default(),
            starter,
            state: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }

    /// Keeps the connection until [`Link::close`]; `news` gets what the keeper says. Blocks.
    pub fn run(&self, news: impl Fn(News) + Send + Sync + 'static) {
        let news = Arc::new(news);
        let mut attempts = 0;
        while !self.lock().closed {
            let (sender, gone) = std::sync::mpsc::channel();
            let early = Arc::new(Early::new());
            let hear = {
                let (news, early) = (news.clone(), early.clone());
                move |said: News| {
                    if said == News::Gone {
                        let _ = sender.send(());
                    }
                    early.hear(said, &*news);
                }
            };
            match Keeper::connect(&self.socket, &self.held, hear) {
                Ok(keeper) => {
                    attempts = 0;
                    if self.begin(Arc::new(keeper)) {
                        early.open(&*news);
                        // Whoever drops the sender has ended, too.
                        let _ = gone.recv();
                        self.lock().keeper = None;
                        if !self.lock().closed {
                            tracing::warn!("the connection to the keeper has ended");
                        }
                    }
                }
                Err(error) => {
                    attempts += 1;
                    if attempts % ATTEMPTS == 1 {
                        self.start(error);
                    }
                    self.changed.wait_for(&mut self.lock(), PAUSE * attempts.min(20));
                }
            }
        }
    }

    /// Tells a new keeper of all layers; whether that went well.
    fn begin(&self, keeper: Arc<Keeper>) -> bool {
        let mut state = self.lock();
        for (number, registered) in &state.layers {
            if let Err(error) = add(&keeper, *number, registered) {
                tracing::error!(layer = number, %error, "failed to add a layer to the keeper");
                if error == ClientError::Gone {
                    return false;
                }
            }
        }
        if let Some(memory) = &state.memory
            && let Err(error) = keeper.remember(memory.as_fd())
        {
            tracing::warn!(%error, "the keeper does not remember credentials");
        }
        state.keeper = Some(keeper);
        drop(state);
        self.changed.notify_all();
        true
    }

    /// What an earlier process of ours had the keeper remember.
    pub fn recall(&self) -> Option<File> {
        // What it remembers comes before the answer.
        self.keeper().ok()?.list().ok()?;
        self.held.memory()
    }

    /// Has the keeper remember a file, over restarts of either process.
    pub fn remember(&self, memory: File) {
        let mut state = self.lock();
        if let Some(keeper) = &state.keeper
            && let Err(error) = keeper.remember(memory.as_fd())
        {
            tracing::debug!(%error, "the next keeper is told what to remember");
        }
        state.memory = Some(memory);
    }

    fn start(&self, error: ClientError) {
        let Some(starter) = &self.starter else {
            return tracing::warn!(socket = %self.socket.display(), %error, "no keeper");
        };
        // It goes on when this process is killed, and gets no signal from its terminal.
        let mut command = starter();
        command.stdin(Stdio::null()).stdout(Stdio::null()).process_group(0);
        match command.spawn() {
            Ok(mut child) => {
                tracing::info!(pid = child.id(), "started a keeper");
                let reaper = std::thread::Builder::new().name("reap".into());
                let _ = reaper.spawn(move || child.wait());
            }
            Err(error) => tracing::error!(%error, "failed to start a keeper"),
        }
    }

    /// The keeper, waited for if it is away.
    fn keeper(&self) -> Result<Arc<Keeper>> {
        let until = Instant::now() + PATIENCE;
        let mut state = self.lock();
        loop {
            if let Some(keeper) = &state.keeper {
                return Ok(keeper.clone());
            }
            let left = until.saturating_duration_since(Instant::now());
            if state.closed || left.is_zero() {
                return Err(Fault::from(ClientError::Gone)
                    .hint("is shipway-snapshotter-keeper.service running?"));
            }
            self.changed.wait_for(&mut state, left);
        }
    }

    /// Has the keeper serve a layer. Its files can be opened when this returns.
    pub fn add(&self, registered: Arc<Registered>) -> Result<()> {
        let number = registered.layer.number().0;
        self.lock().layers.insert(number, registered.clone());
        let added = self.keeper().and_then(|keeper| Ok(add(&keeper, number, &registered)?));
        if added.is_err() {
            self.lock().layers.remove(&number);
        }
        added
    }

    /// Waits until the keeper is there.
    pub fn wait(&self) -> Result<()> {
        self.keeper().map(drop)
    }

    /// The keeper serves a layer no more.
    pub fn remove(&self, number: u32) {
        let keeper = {
            let mut state = self.lock();
            state.layers.remove(&number);
            state.keeper.clone()
        };
        if let Some(keeper) = keeper
            && let Err(error) = keeper.remove(number)
        {
            tracing::debug!(layer = number, %error, "the keeper was not told");
        }
    }

    /// Blocks are good. A keeper that is away asks again for what somebody waits for.
    pub fn have(&self, number: u32, good: &[Range<u64>]) {
        let keeper = self.lock().keeper.clone();
        if let Some(keeper) = keeper {
            for blocks in good {
                if keeper.have(number, blocks.clone()).is_err() {
                    return;
                }
            }
        }
    }

    /// Blocks cannot be had now.
    pub fn fail(&self, number: u32, blocks: Range<u64>) {
        let keeper = self.lock().keeper.clone();
        if let Some(keeper) = keeper {
            let _ = keeper.fail(number, blocks, Errno::IO);
        }
    }

    /// Blocks are good no more, and nobody reads them when this returns.
    pub fn drop_blocks(&self, number: u32, blocks: Range<u64>) -> Result<()> {
        Ok(self.keeper()?.drop_blocks(number, blocks)?)
    }

    /// Has the keeper serve the layer that kernels are tried with, until [`Link::end_probe`].
    pub fn probe(&self, layer: &ProbeLayer, run: &Path) -> Result<FuseFiles> {
        let keeper = self.keeper()?;
        let open = |path: &Path| {
            File::open(path).map_err(|e| Fault::io(format!("open {}", path.display()), e))
        };
        let (data, meta) = (open(&layer.data)?, open(&layer.meta)?);
        let map = memfd_create("probe", MemfdFlags::CLOEXEC)
            .map(File::from)
            .map_err(|e| Fault::io("make a map of blocks", e.into()))?;
        let all = vec![u8::MAX; layer.data_blocks.div_ceil(8) as usize];
        map.write_all_at(&all, 0).map_err(|e| Fault::io("write a map of blocks", e))?;
        let files = Files { data: data.as_fd(), map: map.as_fd(), meta: meta.as_fd() };
        let number = probe_number();
        keeper.add(number, files)?;
        Ok(served_files(run, number))
    }

    /// The kernel was tried.
    pub fn end_probe(&self) {
        self.remove(probe_number());
    }

    /// A layer that the keeper was told of.
    pub fn layer(&self, number: u32) -> Option<Arc<Registered>> {
        self.lock().layers.get(&number).cloned()
    }

    /// Whether there is a connection.
    pub fn is_up(&self) -> bool {
        self.lock().keeper.is_some()
    }

    /// Ends the connection; the keeper goes on.
    pub fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        state.keeper = None;
        drop(state);
        self.changed.notify_all();
    }
}

/// What a new keeper says before it is the one that is answered: it says it once, and an answer
/// that goes nowhere leaves a read waiting.
struct Early(Mutex<Option<Vec<News>>>);

impl Early {
    fn new() -> Self {
        Self(Mutex::new(Some(Vec::new())))
    }

    /// Passes on what is said, now or later.
    fn hear(&self, said: News, news: &dyn Fn(News)) {
        match &mut *self.0.lock() {
            Some(early) => early.push(said),
            None => news(said),
        }
    }

    /// Passes on what was said so far, and from now on everything at once.
    fn open(&self, news: &dyn Fn(News)) {
        self.0.lock().take().into_iter().flatten().for_each(news);
    }
}

fn add(keeper: &Keeper, number: u32, registered: &Registered) -> Result<(), ClientError> {
    let failed = |_| ClientError::Io(Errno::IO);
    let data = registered.layer.data().map_err(failed)?;
    let meta = registered.layer.meta().map_err(failed)?;
    let files = Files { data: data.as_fd(), map: registered.map.as_fd(), meta: meta.as_fd() };
    keeper.add(number, files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_new_keeper_says_is_heard_once_it_can_be_answered() {
        let heard = Mutex::new(Vec::new());
        let news = |said| heard.lock().push(said);
        let miss = |n| News::Miss { n, blocks: 0..1 };
        let early = Early::new();
        early.hear(miss(1), &news);
        assert!(heard.lock().is_empty());
        early.open(&news);
        early.hear(miss(2), &news);
        assert!(*heard.lock() == [miss(1), miss(2)]);
    }
}
