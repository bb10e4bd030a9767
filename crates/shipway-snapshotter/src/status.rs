//! What the snapshotter tells about itself: one JSON object for who connects to its second socket.

use crate::{
    config::Config,
    keyring::{Keyring, Known},
    lazy::{Lazy, Report},
};
use serde::{Deserialize, Serialize};
use shipway_fault::{Fault, Result};
use shipway_snapstore::{Sharing, Store, Totals};
use std::{io::Read as _, os::unix::net, path::PathBuf, sync::Arc, time::Duration};
use tokio::{io::AsyncWriteExt as _, net::UnixStream};
use tokio_stream::{Stream, StreamExt as _};

/// Most bytes that are read of an answer.
const MAX_ANSWER: u64 = 16 << 20;
/// How long one side waits for the other.
const PATIENCE: Duration = Duration::from_secs(5);

/// The answer. Fields are added, never changed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
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
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Snapshots {
    pub active: u64,
    pub views: u64,
    pub committed: u64,
}

/// Directories of committed snapshots.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
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

impl Status {
    fn of(store: &Store, lazy: Option<&Lazy>, keyring: &Keyring, config: &Config) -> Self {
        let Totals { active, views, committed, places, usage, uncounted, .. } = store.totals();
        Self {
            version: env!("CARGO_PKG_VERSION").into(),
            root: config.root.clone(),
            sharing: match config.sharing {
                Sharing::Shared => "shared".into(),
                Sharing::Isolated => "isolated".into(),
            },
            snapshots: Snapshots { active, views, committed },
            disk: Disk { directories: places, bytes: usage.bytes, inodes: usage.inodes, uncounted },
            lazy: lazy.map(Lazy::report),
            credentials: keyring.known(),
        }
    }
}

/// Answers everybody who connects.
pub async fn serve(
    connections: impl Stream<Item = UnixStream>,
    store: Arc<Store>,
    lazy: Option<Arc<Lazy>>,
    keyring: Arc<Keyring>,
    config: Config,
) {
    let mut connections = std::pin::pin!(connections);
    while let Some(mut connection) = connections.next().await {
        let Ok(mut text) =
            serde_json::to_vec(&Status::of(&store, lazy.as_deref(), &keyring, &config))
        else {
            continue;
        };
        text.push(b'\n');
        // Small enough for the kernel to take at once; who does not read holds up nobody for long.
        let told = tokio::time::timeout(PATIENCE, connection.write_all(&text)).await;
        tracing::debug!(told = matches!(told, Ok(Ok(()))), "status");
    }
}

/// Asks the snapshotter that runs.
pub fn ask(config: &Config) -> Result<Status> {
    let path = &config.status_address;
    let failed = |e| Fault::io(format!("ask the snapshotter at {}", path.display()), e);
    let connection = net::UnixStream::connect(path)
        .map_err(|e| failed(e).hint("is shipway-snapshotter running?"))?;
    connection.set_read_timeout(Some(PATIENCE)).map_err(failed)?;
    let mut text = Vec::new();
    connection.take(MAX_ANSWER).read_to_end(&mut text).map_err(failed)?;
    serde_json::from_slice(&text)
        .map_err(|e| Fault::unavailable(format!("{} answers something else: {e}", path.display())))
}

/// The command `status`.
pub fn show(config: &Config, json: bool) -> Result<()> {
    let status = ask(config)?;
    if json {
        let text = serde_json::to_string_pretty(&status)
            .map_err(|e| Fault::internal(format!("encode the status: {e}")))?;
        println!("{text}");
        return Ok(());
    }
    let Status { version, root, sharing, snapshots, disk, lazy, credentials } = status;
    println!("version    {version}");
    println!("root       {}", root.display());
    println!("sharing    {sharing}");
    println!(
        "snapshots  {} active, {} views, {} committed",
        snapshots.active, snapshots.views, snapshots.committed
    );
    let more = if disk.uncounted > 0 {
        format!(", and {} not counted yet", disk.uncounted)
    } else {
        String::new()
    };
    println!(
        "disk       {} bytes in {} inodes of {} directories{more}",
        disk.bytes, disk.inodes, disk.directories
    );
    if let Some(lazy) = lazy {
        show_lazy(&lazy);
    }
    for Known { repository, giver } in &credentials {
        println!("credentials for {repository}, given by {giver}");
    }
    Ok(())
}

fn show_lazy(report: &Report) {
    let keeper = if report.keeper { "" } else { ", the keeper does not answer" };
    println!("lazy       by way of {}{keeper}", report.tier);
    for (tier, why) in &report.passed_over {
        println!("           not {tier}: {why}");
    }
    println!("layers     {}, {} bytes", report.layers.len(), report.bytes);
    for layer in &report.layers {
        let short = layer.digest.get(..19).unwrap_or(&layer.digest);
        let percent = (layer.verified * 100).checked_div(layer.data).unwrap_or(100);
        let mounted = layer.mounted.as_deref().unwrap_or("not mounted");
        println!(
            "  {:>4} {short} {} {percent:>3}% of {} bytes, {mounted}, {} misses{}",
            layer.layer,
            layer.state,
            layer.data,
            layer.misses,
            layer.median.map_or(String::new(), |m| {
                format!(" ({:.0} ms, worst {:.0} ms)", m * 1e3, layer.worst * 1e3)
            }),
        );
        for repository in &layer.repositories {
            println!("       of {repository}");
        }
        if let Some(error) = &layer.error {
            println!("       last error: {error}");
        }
    }
}
