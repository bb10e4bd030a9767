//! The `buildctl` persona: BuildKit's client, argument for argument, so that programs which run it
//! can run us.

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use shipway_fault::{Fault, Result};

use crate::{
    Persona,
    command::{debug, dial_stdio, du, history, prune, solve, version},
    connect::ConnectArgs,
};

const PERSONA: Persona = Persona::Buildctl;

/// Build utility
#[derive(Parser, Debug)]
#[command(name = "buildctl", disable_version_flag = true)]
struct Line {
    #[command(flatten)]
    connect: ConnectArgs,
    /// Print what goes on
    #[arg(long, global = true)]
    debug: bool,
    /// Form of log messages: text or json
    #[arg(long, global = true, default_value = "text", value_parser = ["text", "json"])]
    log_format: String,
    /// Print the version
    #[arg(short, long)]
    version: bool,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Show how much space the build cache takes
    Du(du::Args),
    /// Remove build cache
    Prune(prune::Args),
    /// Forget builds that ended and are not pinned
    PruneHistories(history::Histories),
    /// Build with a frontend, or the LLB definition on standard input
    #[command(visible_alias = "b")]
    Build(Box<solve::Args>),
    /// Look inside
    Debug {
        #[command(subcommand)]
        command: debug::Debug,
    },
    /// Pass standard input and output to the daemon
    #[command(hide = true)]
    DialStdio,
}

pub(crate) async fn main() -> Result<()> {
    let line = Line::from_arg_matches(&Line::command().get_matches())
        .map_err(|e| Fault::invalid(e.to_string()))?;
    crate::log(line.debug, line.log_format == "json");
    if line.version {
        return version::run(PERSONA);
    }
    let connect = line.connect;
    match line.command {
        None => Line::command().print_help().map_err(|e| Fault::io("print the help", e)),
        Some(Command::DialStdio) => dial_stdio::run(&connect, PERSONA).await,
        Some(Command::Du(args)) => du::run(&connect.connect(PERSONA).await?, args).await,
        Some(Command::Prune(args)) => prune::run(&connect.connect(PERSONA).await?, args).await,
        Some(Command::Build(args)) => solve::run(&connect.connect(PERSONA).await?, *args).await,
        Some(Command::PruneHistories(args)) => {
            history::prune(&connect.connect(PERSONA).await?, args).await
        }
        Some(Command::Debug { command }) => debug::run(&connect, PERSONA, command).await,
    }
}
