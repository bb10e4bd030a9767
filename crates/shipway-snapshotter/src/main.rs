//! The snapshotter of Shipway: a program that containerd asks for snapshots (a proxy plug-in).
//! `main` is a table of contents.
//!
//! - [`rpc`]: containerd's snapshots service on [`shipway_snapstore::Store`], by the crate
//!   `containerd-snapshots`.
//! - [`serve`]: sockets, ready and stop.
//! - [`lazy`]: layers that are not unpacked, and the keeper that serves them.
//! - [`content`]: blobs in containerd's content store.
//! - [`keyring`]: credentials that were given for repositories: by builders ([`control`]), and by
//!   kubelet with its pulls, which [`cri`] passes on to containerd.
//! - [`status`]: what it tells about itself; [`metrics`]: the same for Prometheus.
//! - [`setup`]: what containerd's configuration needs to find it; [`doctor`]: what is missing.
//! - [`config`]: its own file.
//!
//! Dependencies worth a word. `containerd-snapshots` is the server that the project's user asks
//! for. Its release 0.3 brings tonic 0.9 and what that stands on beside the tonic of the rest; none
//! of it is seen outside of [`rpc`]. It does not pass on the parent of Commit, which only unpackers
//! need that put layers together in any order (`rebase`, which is not advertised). `toml_edit`
//! changes containerd's configuration without touching other people's lines. `zeroize` wipes
//! credentials, as it does for rustls.

mod config;
mod content;
mod control;
mod cri;
mod doctor;
mod keyring;
mod lazy;
mod metrics;
mod rpc;
mod serve;
mod setup;
mod status;

use clap::{Parser, Subcommand};
use config::Config;
use shipway_daemon::memory::Kept;
use shipway_fault::{Class, Fault, Result};
use std::{path::PathBuf, process::ExitCode};

/// Where the configuration is, unless `--config` says it.
const CONFIG: &str = "/etc/shipway/shipway-snapshotter.toml";

/// Snapshots for containerd, shared by all namespaces. Without a command: serves them.
#[derive(Parser)]
#[command(version)]
struct Flags {
    /// Configuration file.
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Directory of the snapshots.
    #[arg(long, global = true, value_name = "DIR")]
    root: Option<PathBuf>,
    /// Socket that containerd connects to.
    #[arg(long, global = true, value_name = "PATH")]
    address: Option<PathBuf>,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Tells what a running snapshotter has.
    Status(status::show::Flags),
    /// Makes containerd use this snapshotter: writes what its configuration lacks, and leaves
    /// everything else as it is.
    Setup(setup::Flags),
    /// Tells what is missing on this host.
    Doctor(setup::Target),
    /// Answers reads of lazy layers. A process of its own, so that they go on when the snapshotter
    /// does not.
    Keeper {
        /// Directory for what lives until the machine restarts.
        #[arg(long, value_name = "DIR")]
        run: Option<PathBuf>,
        /// Socket that the snapshotter connects to.
        #[arg(long, value_name = "PATH")]
        socket: Option<PathBuf>,
        /// Seconds that a read waits before it fails.
        #[arg(long, value_name = "SECONDS")]
        deadline: Option<u64>,
        /// Starts the keeper and holds its state, as a service manager does.
        #[arg(long)]
        supervise: bool,
    },
}

fn main() -> ExitCode {
    match run(Flags::parse()) {
        Ok(code) => code,
        Err(fault) => {
            eprintln!("shipway-snapshotter: {fault}");
            for hint in fault.hints() {
                eprintln!("  hint: {hint}");
            }
            ExitCode::from(if fault.class() == Class::User { 2 } else { 1 })
        }
    }
}

fn run(flags: Flags) -> Result<ExitCode> {
    let required = flags.config.is_some();
    let mut config = Config::load(&flags.config.unwrap_or_else(|| CONFIG.into()), required)?;
    config.root = flags.root.unwrap_or(config.root);
    config.address = flags.address.unwrap_or(config.address);
    match flags.command {
        None => start(&config).map(|()| ExitCode::SUCCESS),
        Some(Command::Status(flags)) => {
            status::show::run(&config, &flags).map(|()| ExitCode::SUCCESS)
        }
        Some(Command::Setup(flags)) => setup::run(&config, &flags).map(|()| ExitCode::SUCCESS),
        Some(Command::Keeper { run, socket, deadline, supervise }) => {
            config.lazy.run = run.unwrap_or(config.lazy.run);
            config.lazy.keeper_address = socket.unwrap_or(config.lazy.keeper_address);
            config.lazy.deadline = deadline.unwrap_or(config.lazy.deadline);
            lazy::keeper::become_keeper(&config, supervise).map(|()| ExitCode::SUCCESS)
        }
        Some(Command::Doctor(target)) => Ok(doctor::run(&config, &target)),
    }
}

/// Little is kept of what layers take while they are fetched: hours without any follow.
const KEPT: Kept = Kept { largest: 256 << 10, all: 1 << 20 };

fn start(config: &Config) -> Result<()> {
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
    shipway_daemon::memory::tune(KEPT);
    shipway_daemon::start_log(config.log.level, config.log.format);
    // One thread for the sockets; what waits for the disk does so on others.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(serve::MAX_THREADS)
        .thread_name("disk")
        .build()
        .map_err(|e| Fault::io("start the runtime", e))?;
    let result = runtime.block_on(serve::run(config));
    // What still waits for the disk is as safe as it is from a kill.
    runtime.shutdown_background();
    result
}
