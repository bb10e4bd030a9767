//! The `shipway` persona.

use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};
use shipway_fault::{Code, Fault, Result};

use crate::{
    Persona,
    command::{
        bake, build, builders, certs, completion, convert, dap, debug, dial_stdio, doctor, du,
        history, imagetools, info, prune, store, version, workers,
    },
    connect::ConnectArgs,
};

const PERSONA: Persona = Persona::Shipway;

/// Builds images on the containerd you already run
#[derive(Parser, Debug)]
#[command(name = "shipway", version = env!("CARGO_PKG_VERSION"))]
struct Line {
    #[command(flatten)]
    connect: ConnectArgs,
    /// Builder whose daemon to talk to; `shipway ls` lists them
    #[arg(long, global = true, value_name = "NAME", conflicts_with = "addr")]
    builder: Option<String>,
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
    /// Build targets that a file defines
    #[command(visible_alias = "f")]
    Bake(Box<bake::Args>),
    /// Show how much space the build cache takes
    Du(du::Args),
    /// Remove build cache
    Prune(prune::Prune),
    /// List workers
    Workers(workers::Args),
    /// Show the daemon's version
    Info(info::Args),
    /// Look at builds that ran
    History(history::Args),
    /// Forget builds that ended and are not pinned
    PruneHistories(history::Histories),
    Debug(Box<debug::DebugArgs>),
    Dap(dap::DapArgs),
    /// Write an image again with layers that can be pulled lazily
    Convert(Box<convert::Args>),
    Certs(certs::Args),
    Doctor(doctor::Args),
    Imagetools(Box<imagetools::Args>),
    Push(store::PushArgs),
    Tag(store::TagArgs),
    Save(store::SaveArgs),
    Load(store::LoadArgs),
    /// Pass standard input and output to the daemon
    DialStdio,
    /// Print our version
    Version,
    Create(builders::CreateArgs),
    Use(builders::UseArgs),
    /// List builders
    Ls,
    Inspect(builders::InspectArgs),
    Rm(builders::RemoveArgs),
    Stop(builders::StopArgs),
    /// Policies in Rego, which are not implemented
    #[command(hide = true)]
    Policy(PolicyArgs),
    #[command(hide = true)]
    Completion(completion::CompletionArgs),
    #[command(hide = true)]
    Manuals(completion::ManualArgs),
}

/// Any arguments: what they ask for is refused by its name.
#[derive(clap::Args, Debug)]
struct PolicyArgs {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<String>,
}

impl PolicyArgs {
    fn refuse(&self) -> Fault {
        let what = self.arguments.first().map_or("policy", String::as_str);
        Fault::new(
            Code::Unimplemented,
            format!("policy {what}: policies in Rego are not implemented"),
        )
        .hint("write rules as JSON, and give them to build with --source-policy-file")
    }
}

pub(crate) async fn main() -> Result<ExitCode> {
    let line = Line::parse();
    crate::log(line.debug, false);
    let mut connect = line.connect;
    connect.builder = line.builder;
    match line.command {
        Command::Build(args) => return build::run(&connect, *args, line.debug, None).await,
        Command::Bake(args) => return bake::run(&connect, *args, line.debug).await,
        Command::Du(args) => du::run(&connect.connect(PERSONA).await?, args).await,
        Command::Prune(args) => prune::run_or_show(&connect.connect(PERSONA).await?, args).await,
        Command::Workers(args) => workers::run(&connect.connect(PERSONA).await?, args).await,
        Command::Info(args) => info::run(&connect.connect(PERSONA).await?, args).await,
        Command::History(args) => {
            history::run(&connect, &connect.connect(PERSONA).await?, args).await
        }
        Command::PruneHistories(args) => {
            history::prune(&connect.connect(PERSONA).await?, args).await
        }
        Command::Debug(args) => return debug::of_builds(&connect, *args, line.debug).await,
        Command::Dap(args) => dap::run(&connect, args).await,
        Command::Convert(args) => convert::run(*args).await,
        Command::Certs(args) => certs::run(&args),
        Command::Doctor(args) => return doctor::run(&connect, args).await,
        Command::Imagetools(args) => imagetools::run(*args).await,
        Command::Push(args) => store::push(args).await,
        Command::Tag(args) => store::tag(args).await,
        Command::Save(args) => store::save(args).await,
        Command::Load(args) => store::load(args).await,
        Command::DialStdio => dial_stdio::run(&connect, PERSONA).await,
        Command::Version => version::run(PERSONA),
        Command::Create(args) => builders::create(args).await,
        Command::Use(args) => builders::use_builder(&args),
        Command::Ls => builders::list().await,
        Command::Inspect(args) => builders::inspect(args).await,
        Command::Rm(args) => builders::remove(args).await,
        Command::Stop(args) => builders::stop(args).await,
        Command::Policy(args) => Err(args.refuse()),
        Command::Completion(args) => completion::print(Line::command(), &args),
        Command::Manuals(args) => completion::manuals(Line::command(), &args),
    }
    .map(|()| ExitCode::SUCCESS)
}
