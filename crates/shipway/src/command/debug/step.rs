//! `debug build`, and `debug REF`: steps that failed, as they were left.

use std::{path::PathBuf, process::ExitCode};

use shipway_client::{DebugBuild, Step, failed_step};
use shipway_fault::{Fault, Result};

use super::{Debug, run};
use crate::{
    Persona,
    command::build,
    connect::ConnectArgs,
    debugger::{
        Attached, Invoke, Looking, Monitor, Processes, Terminal, When, copy, described, listing,
    },
    output,
};

/// Look inside: builds where they stop, steps that failed, and the daemon
#[derive(clap::Args, Debug)]
pub(crate) struct DebugArgs {
    #[command(flatten)]
    invoke: InvokeArgs,
    #[command(flatten)]
    step: StepArgs,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(clap::Subcommand, Debug)]
enum Command {
    /// Build an image; where a step fails, open a shell in it
    #[command(visible_alias = "b")]
    Build(Box<build::Args>),
    #[command(flatten)]
    Inside(Debug),
}

/// What is run where a build stops.
#[derive(clap::Args, Debug, Default)]
pub(crate) struct InvokeArgs {
    /// Command to run in the step in place of a shell, or
    /// args=COMMAND,env=NAME=VALUE,cwd=DIR,user=NAME,tty=BOOL
    #[arg(long, global = true, value_name = "COMMAND")]
    invoke: Option<String>,
    /// With build: when to look into it
    #[arg(long, global = true, value_enum, default_value_t, value_name = "WHEN")]
    on: When,
}

/// A step that failed, and what to do in it; without anything else a shell is opened.
#[derive(clap::Args, Debug)]
#[group(id = "in-step", multiple = true)]
struct StepArgs {
    /// Failed step, as the failure of its build names it
    #[arg(value_name = "REF")]
    reference: Option<String>,
    /// Show the step: its command, variables, directory, user, mounts, and place in the Dockerfile
    #[arg(long, requires = "reference", group = "what")]
    show: bool,
    /// List a directory of the step
    #[arg(long, requires = "reference", group = "what", value_name = "DIR")]
    ls: Option<String>,
    /// Print a file of the step
    #[arg(long, requires = "reference", group = "what", value_name = "FILE")]
    cat: Option<String>,
    /// Copy a file or directory of the step to this machine
    #[arg(long, requires = "reference", group = "what", num_args = 2, value_names = ["PATH", "TO"])]
    cp: Vec<String>,
    /// Command to run in the step, whose exit code is ours
    #[arg(last = true, requires = "reference", group = "what", value_name = "COMMAND")]
    command: Vec<String>,
}

/// `debug` of the shipway persona; `debug` prints warnings in full.
pub(crate) async fn of_builds(
    connect: &ConnectArgs,
    args: DebugArgs,
    debug: bool,
) -> Result<ExitCode> {
    let invoke = args.invoke.invoke.as_deref().unwrap_or_default();
    match (args.command, args.step.reference.is_some()) {
        (Some(Command::Build(build)), false) => {
            let looking = Looking { invoke: Invoke::parse(invoke)?, when: args.invoke.on };
            build::run(connect, *build, debug, Some(&looking)).await
        }
        (Some(Command::Inside(command)), false) => {
            run(connect, Persona::Shipway, command).await.map(|()| ExitCode::SUCCESS)
        }
        (None, true) => step(connect, args.step, &Invoke::parse(invoke)?).await,
        (Some(_), true) => Err(Fault::invalid("debug: a failed step and a command")
            .hint("a command to run in the step comes after --")),
        (None, false) => Err(Fault::invalid("debug: nothing to look into").hint(
            "name a failed step, as the failure of its build does, or use `shipway debug build`",
        )),
    }
}

async fn step(connect: &ConnectArgs, args: StepArgs, invoke: &Invoke) -> Result<ExitCode> {
    let reference = args.reference.clone().unwrap_or_default();
    let client = connect.connect(Persona::Shipway).await?;
    let (build, _, step) = failed_step(&client, &reference).await?;
    let done = in_step(&build, &step, args, invoke).await;
    build.discard().await;
    done
}

async fn in_step(
    build: &DebugBuild,
    step: &Step,
    args: StepArgs,
    invoke: &Invoke,
) -> Result<ExitCode> {
    if args.show {
        return output::print(&described(step)).map(|()| ExitCode::SUCCESS);
    }
    for lost in step.mounts().iter().filter(|mount| mount.lost) {
        eprintln!("what was mounted on {} is not kept: it is empty", lost.path);
    }
    let files = args.ls.is_some() || args.cat.is_some() || !args.cp.is_empty();
    if files {
        let container = build.container(step).await?;
        let done = async {
            if let Some(dir) = &args.ls {
                output::print(&listing(&container.list(dir).await?))?;
            }
            if let Some(file) = &args.cat {
                container.read(file, output::print_bytes).await?;
            }
            if let [from, to] = args.cp.as_slice() {
                copy(&container, from, &PathBuf::from(to)).await?;
            }
            Ok(ExitCode::SUCCESS)
        };
        let done = done.await;
        container.release().await;
        return done;
    }
    let mut terminal = Terminal::open()?;
    if args.command.is_empty() {
        let next = Monitor::run(build, step, invoke, false, &mut terminal).await;
        return next.map(|_| ExitCode::SUCCESS);
    }
    let container = build.container(step).await?;
    let process = Invoke::command(args.command).of(step, terminal.is_terminal());
    let mut processes = Processes::default();
    let done = async {
        let number = processes.start(&container, process).await?;
        processes.attach(number, &mut terminal).await
    };
    let done = done.await;
    container.release().await;
    match done? {
        Attached::Ended(code) => Ok(ExitCode::from(u8::try_from(code).unwrap_or(u8::MAX))),
        Attached::Away => Ok(ExitCode::SUCCESS),
    }
}
