//! What is told of layers.

use super::{Held, Lazy};
use serde::{Deserialize, Serialize};
use shipway_layermount::{Source, Tier};
use shipway_layerstore::{Layer, State};
use shipway_lazyfetch::Counters;
use std::sync::Arc;

/// How layers are read here, and what is known of each. Fields are added, never changed.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Report {
    /// The way in which the kernel reads layers that are not complete.
    pub tier: String,
    /// Better ways, and why they are not taken.
    pub passed_over: Vec<(String, String)>,
    /// Whether the keeper is there.
    pub keeper: bool,
    /// Bytes that all layers take on the disk.
    pub bytes: u64,
    /// What happened since the snapshotter was started, also to layers that are not served now.
    pub totals: Totals,
    /// All layers.
    pub layers: Vec<LayerReport>,
    /// How ordinary layers are pulled that were never here: by `containerd`, or `fast`.
    pub pull: String,
    /// The layers that are being pulled as a whole.
    pub pulling: Vec<PullReport>,
    /// How many ordinary layers wait for being made lazy.
    pub waiting: usize,
    /// Those that cannot be, by the digests of their blobs, and why.
    pub refused: Vec<(String, String)>,
}

/// A layer on its way. Sizes are in bytes.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct PullReport {
    /// Digest of its blob.
    pub digest: String,
    /// The image that it is of.
    pub image: String,
    /// Of its blob.
    pub size: u64,
    /// Of its blob that has come.
    pub received: u64,
}

/// Sums over all layers. Sizes are in bytes, times in seconds.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Totals {
    /// Compressed bytes that were fetched.
    pub network: u64,
    /// Bytes that were waited for and found on the disk.
    pub cache: u64,
    /// Requests to registries.
    pub requests: u64,
    /// Those that repeated earlier ones.
    pub retries: u64,
    /// Answers whose bytes were wrong.
    pub wrong: u64,
    /// Reads that had to wait, and were served.
    pub misses: u64,
    /// Reads that had to wait, and failed.
    pub failed: u64,
    /// How long those that were served waited together.
    pub waited: f64,
    /// How many of them waited less than so long.
    pub times: Vec<(f64, u64)>,
}

impl Totals {
    pub(super) fn add(&mut self, counters: &Counters) {
        self.network += counters.network;
        self.cache += counters.local;
        self.requests += counters.requests;
        self.retries += counters.retries;
        self.wrong += counters.wrong;
        self.misses += counters.misses;
        self.failed += counters.failed;
        self.waited += counters.waited.as_secs_f64();
        // The times are the same for all.
        self.times.resize(counters.times.len(), (0.0, 0));
        for (sum, (time, count)) in self.times.iter_mut().zip(&counters.times) {
            *sum = (time.as_secs_f64(), sum.1 + count);
        }
    }
}

/// What is known of a layer. Sizes are in bytes, times in seconds.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct LayerReport {
    /// Its number.
    pub layer: u32,
    /// Digest of its blob.
    pub digest: String,
    /// Where it was seen.
    pub repositories: Vec<String>,
    /// Images that there are snapshots of it for, as their pulls named them.
    pub images: Vec<String>,
    /// Of its blob.
    pub size: u64,
    /// Of its data.
    pub data: u64,
    /// Of its data that is on the disk.
    pub local: u64,
    /// Of its data that was checked in this boot.
    pub verified: u64,
    /// Whether it is an ordinary layer, lazy by what was found out when it was unpacked.
    pub plain: bool,
    /// Whether it is an ordinary layer, lazy by the image's SOCI index.
    pub soci: bool,
    /// `lazy`, `whole` or `lying`.
    pub state: String,
    /// How it is mounted: `served` by the keeper, `local`, or not at all.
    pub mounted: Option<String>,
    /// The way in which the kernel reads that mount, by the name that it has in the configuration.
    pub tier: Option<String>,
    /// Whether snapshots stand on it.
    pub used: bool,
    /// Compressed bytes that were fetched.
    pub network: u64,
    /// Bytes that were waited for and found on the disk, after a restart of the machine for
    /// example. What the kernel or the keeper answers by itself is not seen here.
    pub cache: u64,
    /// Requests to registries.
    pub requests: u64,
    /// Answers whose bytes were wrong.
    pub wrong: u64,
    /// Reads that had to wait, and those of them that failed.
    pub misses: u64,
    /// See `misses`.
    pub failed: u64,
    /// How long half of them waited at most.
    pub median: Option<f64>,
    /// How long the worst of them waited.
    pub worst: f64,
    /// The last thing that went wrong.
    pub error: Option<String>,
}

impl Lazy {
    /// What is known now.
    pub fn report(&self) -> Report {
        let layers = self.store.layers();
        let totals = {
            let retired = self.retired.lock();
            let mut totals = retired.clone();
            for stats in layers.iter().filter_map(|layer| self.fetcher.stats(layer.number().0)) {
                totals.add(&stats.read());
            }
            totals
        };
        let (waiting, refused) = self.plain.report();
        Report {
            pull: self.config.lazy.pull.to_string(),
            pulling: self.pulls.report(),
            waiting,
            refused,
            tier: self.tier.to_string(),
            passed_over: self
                .passed_over
                .iter()
                .map(|(t, why)| (t.to_string(), why.clone()))
                .collect(),
            keeper: self.link.is_up(),
            bytes: self.store.total().unwrap_or_default(),
            totals,
            layers: layers.iter().map(|layer| self.of_layer(layer)).collect(),
        }
    }

    fn of_layer(&self, layer: &Arc<Layer>) -> LayerReport {
        let number = layer.number().0;
        let held = self.held();
        let held = held.get(&number);
        let (state, lie) = match layer.state() {
            State::Lazy => ("lazy", None),
            State::Whole => ("whole", None),
            State::Lying(difference) => ("lying", Some(difference)),
        };
        let is_local = |source: &Source| {
            held.is_some_and(|h| h.whole.is_some()) || {
                matches!(source, Source::Files { data, .. } if *data == layer.data_path())
            }
        };
        let mounted = held.and_then(|held: &Held| held.mounted.as_ref());
        let usage = layer.usage().unwrap_or_default();
        // Files are opened only for layers that are served.
        let verified = self.link.layer(number).and_then(|_| layer.good().ok());
        let verified =
            verified.map_or(0, |good| good.ranges().iter().map(|r| r.end - r.start).sum());
        let mut report = LayerReport {
            layer: number,
            digest: layer.key().blob.to_string(),
            repositories: layer.repositories(),
            size: layer.blob_size(),
            plain: layer.is_plain() && !layer.is_indexed(),
            soci: layer.is_indexed(),
            data: layer.data_blocks() * BLOCK,
            local: usage.data,
            verified: verified * BLOCK,
            state: state.to_owned(),
            mounted: mounted.map(|s| if is_local(s) { "local" } else { "served" }.to_owned()),
            tier: mounted.map(|source| tier_of(source).to_string()),
            used: held.is_some(),
            error: lie.or_else(|| held.and_then(|h| h.failed.as_ref()).map(ToString::to_string)),
            ..LayerReport::default()
        };
        if let Some(stats) = self.fetcher.stats(number) {
            let counters = stats.read();
            report.network = counters.network;
            report.cache = counters.local;
            report.requests = counters.requests;
            report.wrong = counters.wrong;
            report.misses = counters.misses;
            report.failed = counters.failed;
            report.median = counters.median.map(|time| time.as_secs_f64());
            report.worst = counters.worst.as_secs_f64();
            report.error = report.error.or(counters.last_error.map(|fault| fault.to_string()));
        }
        report
    }
}

/// The way of reading that a mount is an instance of.
fn tier_of(source: &Source) -> Tier {
    match source {
        Source::Files { .. } => Tier::File,
        Source::File(_) => Tier::FlatFile,
        Source::Loops { .. } => Tier::Loop,
        Source::Loop(_) => Tier::FlatLoop,
        Source::Tree(_) => Tier::FuseTree,
    }
}

const BLOCK: u64 = shipway_estargz::DATA_BLOCK;
