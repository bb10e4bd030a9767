//! What the snapshotter tells about itself: one JSON object for who connects to its status socket.
//!
//! - [`show`]: the command, for people.

pub mod show;

use crate::{
    config::Config,
    keyring::{Keyring, Known},
    lazy::{Lazy, Report, Wanted},
};
use serde::{Deserialize, Serialize};
use shipway_fault::{Fault, Result};
use shipway_snapstore::{Filters, Sharing, Store, Totals};
use std::{
    collections::{BTreeSet, HashMap},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::UnixStream,
};
use tokio_stream::{Stream, StreamExt as _};

/// Most bytes that are read of an answer.
const MAX_ANSWER: u64 = 16 << 20;
/// How long one side waits for the other.
const PATIENCE: Duration = Duration::from_secs(5);

/// The answer. Fields are added, never changed.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// Version of the program that runs.
    pub version: String,
    /// Directory of the snapshots.
    pub root: PathBuf,
    /// `shared` or `isolated`.
    pub sharing: String,
    /// Names, by kind.
    pub snapshots: Snapshots,
    /// What committed snapshots take, each directory counted once whatever the number of its names.
    pub disk: Disk,
    /// Lazy layers, if there may be any.
    #[serde(default)]
    pub lazy: Option<Report>,
    /// Repositories that credentials were given for.
    #[serde(default)]
    pub credentials: Vec<Known>,
}

/// Numbers of names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Snapshots {
    pub active: u64,
    pub views: u64,
    pub committed: u64,
}

/// Directories of committed snapshots.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Disk {
    /// How many there are.
    pub directories: u64,
    /// Bytes of their blocks.
    pub bytes: u64,
    /// Their inodes.
    pub inodes: u64,
    /// How many of them are not in these sums yet.
    pub uncounted: u64,
}

/// Everything that is told of.
pub struct Observed {
    /// Snapshots.
    pub store: Arc<Store>,
    /// Layers, if there may be lazy ones.
    pub lazy: Option<Arc<Lazy>>,
    /// Credentials.
    pub keyring: Arc<Keyring>,
    /// The configuration.
    pub config: Config,
}

impl Observed {
    /// How it is now.
    pub async fn status(self: &Arc<Self>) -> Result<Status> {
        let this = self.clone();
        // It looks at files.
        shipway_task::blocking("collect the status", move || Ok(this.collect())).await
    }

    fn collect(&self) -> Status {
        let Totals { active, views, committed, places, usage, uncounted, .. } = self.store.totals();
        let mut lazy = self.lazy.as_deref().map(Lazy::report);
        if let Some(report) = &mut lazy {
            self.name_images(report);
        }
        Status {
            version: env!("CARGO_PKG_VERSION").into(),
            root: self.config.root.clone(),
            sharing: match self.config.sharing {
                Sharing::Shared => "shared".into(),
                Sharing::Isolated => "isolated".into(),
            },
            snapshots: Snapshots { active, views, committed },
            disk: Disk { directories: places, bytes: usage.bytes, inodes: usage.inodes, uncounted },
            lazy,
            credentials: self.keyring.known(),
        }
    }

    /// Layers are known by their blobs; which images they are of is what snapshots are labeled
    /// with.
    fn name_images(&self, report: &mut Report) {
        let mut images: HashMap<String, BTreeSet<String>> = HashMap::new();
        for info in self.store.list(&Filters::default()) {
            if let Some((digest, image)) = Wanted::pulled_for(&info.labels) {
                images.entry(digest.to_owned()).or_default().insert(image.to_owned());
            }
        }
        for layer in &mut report.layers {
            layer.images = images.get(&layer.digest).into_iter().flatten().cloned().collect();
        }
    }
}

/// Answers everybody who connects.
pub async fn serve(connections: impl Stream<Item = UnixStream>, observed: Arc<Observed>) {
    let mut connections = std::pin::pin!(connections);
    while let Some(mut connection) = connections.next().await {
        let status = observed.status().await;
        let encoded = status.map(|status| serde_json::to_vec(&status));
        let mut text = match encoded {
            Ok(Ok(text)) => text,
            failed => {
                tracing::error!(?failed, "failed to tell the status");
                continue;
            }
        };
        text.push(b'\n');
        // Small enough for the kernel to take at once; who does not read holds up nobody for long.
        let told = tokio::time::timeout(PATIENCE, connection.write_all(&text)).await;
        tracing::debug!(told = matches!(told, Ok(Ok(()))), "status");
    }
}

/// Asks the snapshotter that runs.
pub async fn ask(config: &Config) -> Result<Status> {
    let path = &config.status_address;
    let failed = |e| Fault::io(format!("ask the snapshotter at {}", path.display()), e);
    let work = async {
        let connection = UnixStream::connect(path)
            .await
            .map_err(|e| failed(e).hint("is shipway-snapshotter running?"))?;
        let mut text = Vec::new();
        connection.take(MAX_ANSWER).read_to_end(&mut text).await.map_err(failed)?;
        serde_json::from_slice(&text).map_err(|e| {
            Fault::unavailable(format!("{} answers something else: {e}", path.display()))
        })
    };
    let late = |_| failed(std::io::ErrorKind::TimedOut.into());
    tokio::time::timeout(PATIENCE, work).await.map_err(late)?
}

/// [`ask`] for who has no runtime.
pub fn ask_now(config: &Config) -> Result<Status> {
    runtime()?.block_on(ask(config))
}

fn runtime() -> Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| Fault::io("start the runtime", e))
}
