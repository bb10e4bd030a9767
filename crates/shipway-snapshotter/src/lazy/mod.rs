//! Lazy layers, put together: what the labels of a Prepare name is found in a registry, made an
//! object of the store of layers, served by the keeper, mounted, fetched, and at last local.
//!
//! ```text
//! snapstore ──▶ Lazy ──▶ resolve ──▶ layerstore     which layer, and its files
//!                │          └──────▶ lazyfetch      table of contents; misses; the background
//!                ├──▶ link ────────▶ keeper         who answers the kernel
//!                └──▶ layermount                    how the kernel reads it
//! ```
//!
//! - [`labels`]: what containerd says of a layer; [`credentials`]: whom registries see.
//! - [`resolve`]: from labels to a layer that is served.
//! - [`plain`]: ordinary layers, which are lazy when they are pulled again.
//! - [`soci`]: ordinary layers that images have an index of.
//! - [`fast`]: ordinary layers that are pulled as a whole.
//! - [`link`]: the connection to the keeper; [`keeper`]: how one is started.
//! - [`spans`]: which files are neighbors; [`learning`]: what was read first, and in which order.
//! - [`report`]: what is told of layers.

mod credentials;
mod fast;
pub mod keeper;
mod labels;
mod learning;
mod link;
mod plain;
mod report;
mod resolve;
mod soci;
mod spans;

pub use labels::Wanted;
pub use report::{LayerReport, PullReport, Report, Totals};

use crate::{
    config::Config,
    control::{LayerPieces, Pieces},
    keyring::Keyring,
};
use credentials::AllCredentials;
use learning::Learning;
use link::{Link, Registered, Starter, served_files};
use parking_lot::{Mutex, MutexGuard};
use resolve::{Found, Resolver};
use shipway_estargz::DATA_BLOCK;
use shipway_fault::{Context as _, Fault, Result};
use shipway_host::Disk;
use shipway_keeper::client::News;
use shipway_layermount::{Source, Tier};
use shipway_layerstore::{Error, Good, Layer, LayerNumber, LayerStore, Options, State, Use};
use shipway_lazyfetch::{Event, Fetcher, Finish, Settings, Whole};
use shipway_snapstore::{Below, Labels, LayerId, LazyLayers, Restored, Usage};
use spans::Neighbors;
use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
    sync::{Arc, Weak, mpsc},
    time::Duration,
};
use tokio::{
    runtime::Handle,
    sync::{
        Semaphore,
        mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel},
        oneshot,
    },
};

/// How often it is looked whether the layers take more of the disk than they may.
const ROOM: Duration = Duration::from_secs(10);

/// Layers whose blobs are read whole at the same time: while one ends the next one begins.
const WHOLE_AT_ONCE: usize = 2;

/// A layer in use.
struct Held {
    layer: Arc<Layer>,
    holds: usize,
    /// What is mounted of it.
    mounted: Option<Source>,
    /// While its own files are mounted nothing of them may be taken away.
    whole: Option<Good>,
    /// Why it could not be brought whole, if that was tried.
    failed: Option<Fault>,
}

/// All of it.
pub struct Lazy {
    config: Config,
    tier: Tier,
    /// Why better ones were passed over.
    passed_over: Vec<(Tier, String)>,
    store: Arc<LayerStore>,
    link: Arc<Link>,
    fetcher: Fetcher,
    resolver: Resolver,
    neighbors: Arc<Neighbors>,
    learning: Learning,
    /// Ordinary layers that are to be lazy the next time.
    plain: plain::Queue,
    pulls: fast::Pulls,
    runtime: Handle,
    /// Layers to be brought whole, in order.
    wanted_whole: UnboundedSender<u32>,
    /// Those whose blobs are being read, and who waits for their ends.
    reading: Mutex<BTreeMap<u32, oneshot::Sender<()>>>,
    held: Mutex<BTreeMap<u32, Held>>,
    /// What happened to layers that are not served any more.
    retired: Mutex<Totals>,
    /// What the keeper said before the layers of an earlier life were back; `None` since.
    early: Mutex<Option<Vec<News>>>,
}

/// What the store of layers is told.
fn options(config: &Config) -> Result<Options> {
    let percent = Disk::of(&config.root)?.usable / 100;
    Ok(Options {
        max_bytes: Some(percent * u64::from(config.lazy.max_percent)),
        min_free: percent * u64::from(config.lazy.min_free_percent),
        ..Options::default()
    })
}

fn private_directory(path: &Path) -> Result<()> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(|e| Fault::io(format!("make the directory {}", path.display()), e))
}

impl Lazy {
    /// Puts everything together and finds out how the kernel reads layers. Blocks; must be called
    /// within `runtime`.
    pub fn start(config: &Config, keyring: Arc<Keyring>, runtime: Handle) -> Result<Arc<Self>> {
        let run = &config.lazy.run;
        private_directory(&run.join("maps"))?;
        private_directory(&config.root.join("l"))?;
        let store = LayerStore::open(&config.root, options(config)?)?;
        for damage in store.damaged() {
            tracing::warn!(layer = %damage.layer, error = %damage.error, "a layer was damaged, and is fetched again when it is needed");
        }
        if store.is_first_of_boot() {
            clear(&run.join("maps"))?;
        }
        let starter = config.lazy.start_keeper.then(|| {
            let config = config.clone();
            Box::new(move || keeper::start(&config)) as Starter
        });
        let link = Arc::new(Link::new(config.lazy.keeper_address.clone(), starter));
        let (sender, news) = mpsc::channel();
        let keeping = link.clone();
        spawn("link", move || {
            keeping.run(move |said| {
                let _ = sender.send(said);
            });
        })?;
        let (tier, passed_over) = probe(config, &link);
        tracing::info!(tier = %tier, "lazy layers");
        if let Some(memory) = link.recall()
            && let Err(fault) = keyring.restore(&memory)
        {
            tracing::warn!(%fault, "credentials of the last process are lost");
        }
        let remembering = link.clone();
        keyring.keep_with(move |memory| remembering.remember(memory));
        let settings = Settings {
            memory: config.lazy.memory,
            connections: config.lazy.connections,
            deadline: Duration::from_secs(config.lazy.deadline),
            index: Duration::from_secs(config.lazy.resolve_timeout),
            ..Settings::default()
        };
        let credentials = AllCredentials::new(keyring, config.registry.docker_config.clone());
        let (fetcher, mut events) = Fetcher::new(settings.clone());
        let (wanted_whole, wholes) = unbounded_channel();
        let (plain, unpacked) = plain::Queue::open(&config.root)?;
        let lazy = Arc::new(Self {
            config: config.clone(),
            tier,
            passed_over,
            store: Arc::new(store),
            link,
            fetcher,
            resolver: Resolver::new(config, settings, credentials),
            neighbors: Arc::default(),
            learning: Learning::open(
                &config.root.join("profiles"),
                Duration::from_secs(config.lazy.learn),
            )?,
            plain,
            pulls: fast::Pulls::default(),
            runtime,
            wanted_whole,
            reading: Mutex::default(),
            held: Mutex::default(),
            retired: Mutex::default(),
            early: Mutex::new(Some(Vec::new())),
        });
        let wholes = bring_all(Arc::downgrade(&lazy), wholes);
        shipway_task::spawn_on(&lazy.runtime, "bring layers whole", wholes);
        let making = plain::make_all(Arc::downgrade(&lazy), unpacked);
        shipway_task::spawn_on(&lazy.runtime, "make ordinary layers lazy", making);
        let weak = Arc::downgrade(&lazy);
        let within = lazy.runtime.clone();
        spawn("misses", move || {
            let _runtime = within.enter();
            while let (Ok(said), Some(lazy)) = (news.recv(), weak.upgrade()) {
                lazy.hear(said);
            }
        })?;
        let weak = Arc::downgrade(&lazy);
        shipway_task::spawn_on(&lazy.runtime, "hear of fetches", async move {
            while let Some(event) = events.recv().await {
                let Some(lazy) = weak.upgrade() else { return };
                lazy.fetched(event);
            }
        });
        let weak = Arc::downgrade(&lazy);
        spawn("room", move || {
            while let Some(lazy) = weak.upgrade() {
                lazy.make_room();
                lazy.share(lazy.learning.keep());
                // Tables of contents leave much behind.
                shipway_daemon::memory::trim();
                drop(lazy);
                // Nobody wakes it; to look more often would do no harm.
                std::thread::park_timeout(ROOM);
            }
        })?;
        Ok(lazy)
    }

    /// Ends the connection to the keeper, which goes on.
    pub fn close(&self) {
        self.learning.close();
        self.link.close();
    }

    fn held(&self) -> MutexGuard<'_, BTreeMap<u32, Held>> {
        self.held.lock()
    }

    /// What the keeper says.
    fn hear(&self, said: News) {
        if let Some(early) = &mut *self.early.lock() {
            // A read that waits since before this process is of a layer that comes back.
            return early.push(said);
        }
        match said {
            News::Miss { n, blocks } => {
                let Some(registered) = self.link.layer(n) else {
                    tracing::warn!(layer = n, "a read of a layer that is not there");
                    return self.link.fail(n, blocks);
                };
                registered.layer.touch_blocks(&blocks);
                // It may be there already: the keeper was not told, or the machine was started
                // since it was written.
                match registered.layer.verify_blocks(blocks.clone()) {
                    Ok(good) => {
                        self.link.have(n, good.ranges());
                        if good.has(&blocks) {
                            if let Some(stats) = self.fetcher.stats(n) {
                                stats.found((blocks.end - blocks.start) * DATA_BLOCK);
                            }
                            return;
                        }
                    }
                    Err(error) => tracing::error!(layer = n, %error, "failed to look for data"),
                }
                self.fetcher.miss(n, blocks);
            }
            News::Touched { n, block } => {
                if let Some(registered) = self.link.layer(n) {
                    self.learning.touched(n, block, registered.layer.data_blocks());
                }
                self.fetcher.touched(n, block);
            }
            News::Gone => {}
        }
    }

    /// What the engine says.
    fn fetched(self: &Arc<Self>, event: Event) {
        match event {
            Event::Progress { layer, good } => self.link.have(layer, good.ranges()),
            Event::Failed { layer, blocks, fault } => {
                tracing::error!(layer, ?blocks, %fault, "failed to fetch what is read");
                self.link.fail(layer, blocks);
            }
            Event::Whole { layer, result } => {
                if let Err(fault) = &result {
                    tracing::error!(layer, %fault, "failed to bring a layer whole");
                }
                if let Some(held) = self.held().get_mut(&layer) {
                    held.failed = result.as_ref().err().cloned();
                }
                self.end_whole(layer);
                if result.is_ok() {
                    tracing::info!(layer, "a layer is whole");
                    let lazy = self.clone();
                    drop(shipway_task::blocking_on(
                        &self.runtime,
                        "swap a layer's mount",
                        move || {
                            lazy.graduate(layer);
                            Ok(())
                        },
                    ));
                }
            }
        }
    }

    /// The blob of a layer is not read any more.
    fn end_whole(&self, layer: u32) {
        // Whoever waits goes on when the sender is gone.
        drop(self.reading.lock().remove(&layer));
    }

    /// A whole layer does without those who fetch and serve: new mounts read its own files.
    fn graduate(&self, number: u32) {
        let mut held = self.held();
        let Some(entry) = held.get_mut(&number) else { return };
        let Some(old) = entry.mounted.clone() else { return };
        let swapped = self.local(&entry.layer).and_then(|found| match found {
            Some((source, good)) if source != old => {
                shipway_layermount::swap(&self.at(number), &old, &source)?;
                Ok(Some((source, good)))
            }
            _ => Ok(None),
        });
        match swapped {
            Ok(Some((source, good))) => {
                (entry.mounted, entry.whole) = (Some(source), Some(good));
            }
            Ok(None) => {}
            Err(fault) => {
                tracing::warn!(layer = number, %fault, "a whole layer stays with the keeper")
            }
        }
    }

    /// Where a layer is mounted.
    fn at(&self, number: u32) -> PathBuf {
        self.config.root.join("l").join(number.to_string())
    }

    fn served(&self, layer: &Layer) -> Result<Source> {
        let files = served_files(&self.config.lazy.run, layer.number().0);
        self.tier
            .served(&layer.meta_path(), &files)
            .ok_or_else(|| Fault::internal(format!("no mount of a layer by way of {}", self.tier)))
    }

    /// The layer's own files, and the hold on them, if all of it is there.
    fn local(&self, layer: &Layer) -> Result<Option<(Source, Good)>> {
        let Some(source) = self.tier.local(&layer.meta_path(), &layer.data_path()) else {
            return Ok(None);
        };
        Ok(layer.hold_whole()?.map(|good| (source, good)))
    }

    /// Has a layer served, and what it misses fetched. May be called again.
    fn serve(
        &self,
        layer: &Arc<Layer>,
        sources: Vec<Arc<dyn shipway_lazyfetch::Source>>,
    ) -> Result<()> {
        let number = layer.number().0;
        if self.link.layer(number).is_some() {
            return Ok(());
        }
        let path = self.config.lazy.run.join("maps").join(number.to_string());
        let failed = |e| Fault::io(format!("the map {}", path.display()), e);
        let map = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(failed)?;
        let size = layer.data_blocks().div_ceil(8);
        if map.metadata().map_err(failed)?.len() == size {
            // What an earlier process of ours had checked need not be checked again.
            layer.restore(&std::fs::read(&path).map_err(failed)?)?;
        } else {
            map.set_len(0).and_then(|()| map.set_len(size)).map_err(failed)?;
        }
        self.link.add(Arc::new(Registered { layer: layer.clone(), map }))?;
        let target = layer.clone();
        let spans = Some(self.neighbors.spans(layer));
        self.fetcher.add(shipway_lazyfetch::LayerSpec { target, sources, spans });
        Ok(())
    }

    /// Has a layer brought whole, when its turn comes.
    fn bring(&self, layer: &Arc<Layer>) {
        if self.config.lazy.background && layer.state() == State::Lazy {
            let _ = self.wanted_whole.send(layer.number().0);
        }
    }

    /// Begins to read the blob of a layer; whether that can be waited for.
    async fn begin_whole(&self, number: u32) -> Result<bool> {
        let layer = self.held().get(&number).map(|held| held.layer.clone());
        let Some(layer) = layer.filter(|layer| layer.state() == State::Lazy) else {
            return Ok(false);
        };
        let toc = match layer.is_plain() {
            true => None,
            false => Some(self.resolver.toc(&layer).await?),
        };
        self.fetcher.background(number, |report| match Finish::new(layer, toc, report) {
            Ok(finish) => Box::new(finish),
            Err(e) => Box::new(CannotStart(Fault::io("start a thread", e))),
        });
        Ok(true)
    }

    /// How a layer is used.
    fn usage_of(&self, number: LayerNumber) -> Use {
        match self.held().get(&number.0) {
            Some(Held { whole: Some(_), .. }) => Use::Mounted,
            Some(_) => Use::Served,
            None if self.link.layer(number.0).is_some() => Use::Served,
            None => Use::Nothing,
        }
    }

    /// Gives up what is over the limits.
    fn make_room(&self) {
        // A layer that nobody holds is served no more, so that it can go.
        let over = self.store.short_of(0).unwrap_or_default() > 0;
        if !over {
            return;
        }
        for layer in self.store.layers() {
            let number = layer.number().0;
            if !self.held().contains_key(&number) && self.link.layer(number).is_some() {
                self.forget(number);
            }
        }
        let done = self.store.make_room(0, &|number| self.usage_of(number)).map_err(Fault::from);
        let done = done.and_then(|room| {
            for number in &room.removed {
                tracing::info!(layer = %number, "removed a layer to make room");
                let _ = std::fs::remove_file(
                    self.config.lazy.run.join("maps").join(number.to_string()),
                );
            }
            for eviction in room.evictions {
                let eviction = eviction?;
                let number = eviction.layer().number().0;
                self.link.drop_blocks(number, eviction.blocks())?;
                self.store.punch(eviction)?;
            }
            Ok(())
        });
        if let Err(fault) = done {
            tracing::error!(%fault, "failed to make room");
        }
    }

    /// Nobody serves or fetches a layer any more; it stays as a cache.
    fn forget(&self, number: u32) {
        {
            // Who sums up sees what happened once.
            let mut retired = self.retired.lock();
            if let Some(stats) = self.fetcher.stats(number) {
                retired.add(&stats.read());
            }
            self.fetcher.remove(number);
        }
        self.end_whole(number);
        self.link.remove(number);
        self.neighbors.forget(number);
    }

    fn known(&self, id: LayerId) -> Result<Arc<Layer>> {
        let number = u32::try_from(id.0).map(LayerNumber);
        let layer = number.ok().and_then(|number| self.store.get(number));
        layer.ok_or_else(|| Fault::not_found(format!("there is no layer {}", id.0)))
    }

    /// Finds out whether a layer can be decompressed. If its files are damaged it is thrown away,
    /// unless snapshots stand on it.
    fn check(&self, layer: &Layer) -> Result<()> {
        let Err(error) = layer.check_spans() else { return Ok(()) };
        let is_damaged = matches!(error, Error::Damaged { .. } | Error::Plain(_));
        let (number, fault) = (layer.number(), Fault::from(error));
        if is_damaged && !self.held().contains_key(&number.0) {
            tracing::warn!(layer = %number, %fault, "a layer is damaged, and is made again when it is unpacked");
            self.store.remove(number)?;
        }
        Err(fault)
    }

    fn hold(&self, layer: &Arc<Layer>) {
        let mut held = self.held();
        let entry = held.entry(layer.number().0).or_insert_with(|| Held {
            layer: layer.clone(),
            holds: 0,
            mounted: None,
            whole: None,
            failed: None,
        });
        entry.holds += 1;
        layer.touch();
    }

    fn find_layer(self: &Arc<Self>, namespace: &str, wanted: &Wanted) -> Result<Arc<Layer>> {
        let limit = Duration::from_secs(self.config.lazy.resolve_timeout);
        let found = self.runtime.block_on(async {
            let work = self.resolver.resolve(self, namespace, wanted);
            let found = tokio::time::timeout(limit, work).await.unwrap_or_else(|_| {
                Err(Fault::new(
                    shipway_fault::Code::DeadlineExceeded,
                    format!("the layer was not found within {limit:.0?}"),
                ))
            });
            match found? {
                Found::Layer(layer) => Ok(layer),
                // It takes as long as a pull takes, which ends by itself if nothing comes.
                Found::Pull(pull) => pull.ended().await,
            }
        })?;
        if let State::Lying(difference) = found.state() {
            return Err(Fault::new(
                shipway_fault::Code::DataLoss,
                format!("its tar is not what its table of contents says: {difference}"),
            ));
        }
        Ok(found)
    }
}

impl LayerPieces for Lazy {
    fn pieces(&self, directory: &Path, inodes: &[u64], length: u64, most: usize) -> Result<Pieces> {
        let number = directory.file_name().and_then(|name| name.to_str()?.parse().ok());
        let number = number.filter(|number| self.at(*number) == directory);
        let layer = number.and_then(|number| self.store.get(LayerNumber(number)));
        let layer = layer.ok_or_else(|| {
            Fault::not_found(format!("{} is not the directory of a layer", directory.display()))
        })?;
        // The trees of the keeper show other numbers than images have.
        if self.tier == Tier::FuseTree {
            return Ok(vec![None; inodes.len()]);
        }
        Ok(layer.pieces(inodes, length, most)?)
    }
}

/// Layers as snapshots stand on them.
pub struct LazyPort(pub Arc<Lazy>);

impl LazyLayers for LazyPort {
    fn restore(&self, layers: &BTreeSet<LayerId>) -> Restored {
        let lazy = &self.0;
        let mut restored = Restored::default();
        let mounted =
            shipway_layermount::scan(&lazy.config.root.join("l")).unwrap_or_else(|fault| {
                tracing::error!(%fault, "failed to see what is mounted");
                Vec::new()
            });
        let mut known = Vec::new();
        for id in layers {
            match lazy.known(*id) {
                Ok(layer) => known.push(layer),
                Err(_) => drop(restored.lost.insert(*id)),
            }
        }
        let sources = lazy.resolver.sources_of(&lazy.runtime, &known);
        for (layer, sources) in known.into_iter().zip(sources) {
            let id = LayerId(layer.number().0.into());
            lazy.hold(&layer);
            if let Err(fault) = lazy.serve(&layer, sources) {
                tracing::error!(layer = id.0, %fault, "failed to serve a layer");
            }
            lazy.bring(&layer);
            let local = lazy.local(&layer).ok().flatten();
            let (local, good) = local.unzip();
            let sources: Vec<Source> = lazy.served(&layer).ok().into_iter().chain(local).collect();
            let number = layer.number().0;
            match shipway_layermount::adopt(&lazy.at(number), &mounted, &sources) {
                Ok(Some(n)) => {
                    if let Some(entry) = lazy.held().get_mut(&number) {
                        entry.mounted = Some(sources[n].clone());
                        entry.whole = good.filter(|_| n == 1);
                    }
                    restored.mounted.insert(id);
                }
                Ok(None) => {}
                Err(fault) => tracing::error!(layer = number, %fault, "failed to adopt a mount"),
            }
        }
        let early = lazy.early.lock().take();
        let _runtime = lazy.runtime.enter();
        early.into_iter().flatten().for_each(|said| lazy.hear(said));
        for mount in &mounted {
            let name = mount.at.file_name().and_then(|n| n.to_str()).and_then(|n| n.parse().ok());
            if name.is_none_or(|n| !layers.contains(&LayerId(n)))
                && let Err(fault) = shipway_layermount::unmount(&mount.at)
            {
                tracing::error!(at = %mount.at.display(), %fault, "failed to unmount");
            }
        }
        restored
    }

    fn find(&self, namespace: &str, labels: &Labels, below: Below) -> Option<LayerId> {
        let lazy = &self.0;
        if lazy.tier == Tier::NotLazy {
            return None;
        }
        let wanted = Wanted::of(labels)?;
        let found = lazy.find_layer(namespace, &wanted).and_then(|layer| {
            labels::vouch(layer.diff_id(), labels, below)?;
            Ok(layer)
        });
        match found {
            Ok(layer) => {
                lazy.hold(&layer);
                lazy.ahead(&wanted.image, wanted.manifest, &layer);
                lazy.bring(&layer);
                Some(LayerId(layer.number().0.into()))
            }
            Err(fault) => {
                tracing::info!(image = %wanted.image, layer = %wanted.layer, %fault, "a layer is unpacked the ordinary way");
                None
            }
        }
    }

    fn unpacked(&self, namespace: &str, labels: &Labels) {
        if self.0.tier != Tier::NotLazy
            && let Some(wanted) = Wanted::of(labels)
        {
            self.0.unpacked(namespace, &wanted);
        }
    }

    fn mount(&self, id: LayerId) -> Result<PathBuf> {
        let lazy = &self.0;
        let layer = lazy.known(id)?;
        let number = layer.number().0;
        let at = lazy.at(number);
        if lazy.held().get(&number).is_some_and(|held| held.mounted.is_some()) {
            return Ok(at);
        }
        layer.touch();
        let (source, good) = match lazy.local(&layer)? {
            Some((source, good)) => (source, Some(good)),
            None => {
                if lazy.link.layer(number).is_none() {
                    let layers = std::slice::from_ref(&layer);
                    let sources = lazy.resolver.sources_of(&lazy.runtime, layers).pop();
                    lazy.serve(&layer, sources.unwrap_or_default())?;
                }
                lazy.link.wait()?;
                (lazy.served(&layer)?, None)
            }
        };
        layer.meta()?;
        private_directory(&at)?;
        shipway_layermount::mount(&source, &at).context(|| format!("mount layer {number}"))?;
        if let Some(held) = lazy.held().get_mut(&number) {
            (held.mounted, held.whole) = (Some(source), good);
        }
        Ok(at)
    }

    fn unmount(&self, id: LayerId) -> Result<()> {
        let lazy = &self.0;
        let number = lazy.known(id)?.number().0;
        shipway_layermount::unmount(&lazy.at(number))?;
        if let Some(held) = lazy.held().get_mut(&number) {
            (held.mounted, held.whole) = (None, None);
        }
        Ok(())
    }

    fn usage(&self, id: LayerId) -> Result<Usage> {
        let usage = self.0.known(id)?.usage()?;
        Ok(Usage { bytes: usage.total(), inodes: 5 })
    }

    fn release(&self, id: LayerId) {
        let lazy = &self.0;
        let Ok(number) = u32::try_from(id.0) else { return };
        let last = {
            let mut held = lazy.held();
            let Some(entry) = held.get_mut(&number) else { return };
            entry.holds -= 1;
            if entry.holds > 0 { None } else { held.remove(&number) }
        };
        let Some(last) = last else { return };
        if last.mounted.is_some()
            && let Err(fault) = shipway_layermount::unmount(&lazy.at(number))
        {
            tracing::error!(layer = number, %fault, "failed to unmount a layer");
        }
        let _ = std::fs::remove_dir(lazy.at(number));
        lazy.forget(number);
    }
}

/// Reads no blob.
struct CannotStart(Fault);

impl Whole for CannotStart {
    fn bytes(&mut self, _: &bytes::Bytes) -> Result<(), Fault> {
        Err(self.0.clone())
    }

    fn finish(self: Box<Self>) -> Result<(), Fault> {
        Err(self.0)
    }
}

/// Brings layers whole, a few at a time, in the order in which they were asked for.
async fn bring_all(lazy: Weak<Lazy>, mut wanted: UnboundedReceiver<u32>) {
    let slots = Arc::new(Semaphore::new(WHOLE_AT_ONCE));
    while let Some(number) = wanted.recv().await {
        let Ok(slot) = slots.clone().acquire_owned().await else { return };
        let Some(lazy) = lazy.upgrade() else { return };
        let (sender, ended) = oneshot::channel();
        lazy.reading.lock().insert(number, sender);
        shipway_task::spawn("begin to bring a layer whole", async move {
            let _slot = slot;
            match lazy.begin_whole(number).await {
                Ok(true) => {}
                Ok(false) => return lazy.end_whole(number),
                Err(fault) => {
                    tracing::warn!(layer = number, %fault, "a layer is not brought whole");
                    if let Some(held) = lazy.held().get_mut(&number) {
                        held.failed = Some(fault);
                    }
                    return lazy.end_whole(number);
                }
            }
            drop(lazy);
            let _ = ended.await;
        });
    }
}

/// Starts a thread that the rest relies on. If it panics the process ends: it starts again as after
/// a kill, which harms nobody, while reads would wait in vain for a thread that is gone.
fn spawn(name: &'static str, work: impl FnOnce() + Send + 'static) -> Result<()> {
    let guarded = move || {
        if std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)).is_err() {
            tracing::error!(thread = name, "a thread panicked, the snapshotter ends");
            std::process::abort();
        }
    };
    std::thread::Builder::new()
        .name(name.into())
        .spawn(guarded)
        .map(drop)
        .map_err(|e| Fault::io("start a thread", e))
}

/// Removes the files in a directory.
fn clear(directory: &Path) -> Result<()> {
    let failed = |e| Fault::io(format!("clear {}", directory.display()), e);
    for entry in std::fs::read_dir(directory).map_err(failed)? {
        std::fs::remove_file(entry.map_err(failed)?.path()).map_err(failed)?;
    }
    Ok(())
}

/// Finds the way in which this kernel reads layers.
fn probe(config: &Config, link: &Link) -> (Tier, Vec<(Tier, String)>) {
    let passed = |fault: Fault| (Tier::NotLazy, vec![(Tier::File, fault.to_string())]);
    let directory = config.root.join("probe");
    let attempt = || -> Result<shipway_layermount::Probe> {
        private_directory(&directory)?;
        let layer = shipway_layermount::ProbeLayer::write(&directory)?;
        let served = link.wait().and_then(|()| link.probe(&layer, &config.lazy.run));
        let files = served.as_ref().ok();
        let probe = shipway_layermount::probe(&layer, files, config.lazy.tier()?)?;
        if let Err(fault) = &served {
            tracing::warn!(%fault, "layers cannot be lazy without a keeper");
        }
        Ok(probe)
    };
    let probed = attempt();
    link.end_probe();
    let _ = std::fs::remove_dir_all(&directory);
    match probed {
        Ok(probe) => {
            let reasons = probe.passed_over.into_iter().map(|(t, fault)| (t, fault.to_string()));
            (probe.tier, reasons.collect())
        }
        Err(fault) => {
            tracing::error!(%fault, "layers are not lazy");
            passed(fault)
        }
    }
}
