//! Completions for shells, and manuals, for packages to install.

use std::path::PathBuf;

use clap_complete::Shell;
use shipway_fault::{Fault, Result};

use crate::output;

/// Print the completion of a shell
#[derive(clap::Args, Debug)]
pub(crate) struct CompletionArgs {
    /// bash, zsh or fish
    shell: Shell,
}

/// Write the manuals of all commands
#[derive(clap::Args, Debug)]
pub(crate) struct ManualArgs {
    /// Directory that gets them
    directory: PathBuf,
}

pub(crate) fn print(mut command: clap::Command, args: &CompletionArgs) -> Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut command, "shipway", &mut script);
    output::print(&String::from_utf8_lossy(&script))
}

pub(crate) fn manuals(command: clap::Command, args: &ManualArgs) -> Result<()> {
    clap_mangen::generate_to(command, &args.directory)
        .map_err(|e| Fault::io(format!("write manuals into {}", args.directory.display()), e))
}
