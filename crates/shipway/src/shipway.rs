//! The `shipway` persona.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use shipway_fault::Result;

use crate::{
    Persona,
    command::{build, convert, dial_stdio, du, history, info, prune, version, workers},
    connect::ConnectArgs,
};

const PERSONA: Persona = Persona::Shipway;

/// Builds images on the containerd you already run
#[derive(Parser, Debug)]
#[command(name = "shipway", version = env!("CARGO_PKG_VERSION"))]
struct Line {
    #[command(flatten)]
    connect: ConnectArgs,
    /// Print what goes on, and warnings in full
    #[arg(short = 'D', long, global = true)]
    debug: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Build an image from a Dockerfile
    #[command(visible_alias = "b")]
    Build(Box<build::Args>),
    /// Show how much space the build cache takes
    Du(du::Args),
    /// Remove build cache
    Prune(prune::Args),
    /// List workers
    Workers(workers::Args),
    /// Show the daemon's version
    Info(info::Args),
    /// Look at builds that ran
    History(history::Args),
    /// Write an image again with layers that can be pulled lazily
    Convert(Box<convert::Args>),
    /// Pass standard input and output to the daemon
    DialStdio,
    /// Print our version
    Version,
}

pub(crate) async fn main() -> Result<ExitCode> {
    let line = Line::parse();
    crate::log(line.debug, false);
    let connect = line.connect;
    match line.command {
        Command::Build(args) => return build::run(&connect, *args, line.debug).await,
        Command::Du(args) => du::run(&connect.connect(PERSONA).await?, args).await,
        Command::Prune(args) => prune::run(&connect.connect(PERSONA).await?, args).await,
        Command::Workers(args) => workers::run(&connect.connect(PERSONA).await?, args).await,
        Command::Info(args) => info::run(&connect.connect(PERSONA).await?, args).await,
        Command::History(args) => history::run(&connect.connect(PERSONA).await?, args).await,
        Command::Convert(args) => convert::run(*args).await,
        Command::DialStdio => dial_stdio::run(&connect, PERSONA).await,
        Command::Version => version::run(PERSONA),
    }
    .map(|()| ExitCode::SUCCESS)
}
