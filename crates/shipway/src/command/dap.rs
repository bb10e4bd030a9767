//! `dap build`: a build as editors go through it.

use shipway_fault::Result;

use crate::{
    command::build,
    connect::ConnectArgs,
    dap::{Adapter, Launch},
};

/// Speak the Debug Adapter Protocol, for editors
#[derive(clap::Args, Debug)]
pub(crate) struct DapArgs {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand, Debug)]
enum Command {
    /// Build an image step by step: an editor's launch request may name dockerfile, contextPath,
    /// target and stopOnEntry
    Build(Box<build::Args>),
}

pub(crate) async fn run(connect: &ConnectArgs, args: DapArgs) -> Result<()> {
    let Command::Build(args) = args.command;
    let connect = connect.clone();
    let prepare = move |launch: Launch| {
        let (connect, args) = (connect.clone(), args.clone());
        async move {
            let args = args.launched(launch.dockerfile, launch.context_path, launch.target);
            build::prepared(&connect, args).await
        }
    };
    Adapter::serve(tokio::io::stdin(), tokio::io::stdout(), prepare).await
}
