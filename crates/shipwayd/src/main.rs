//! The builder daemon. `main` is a table of contents: settings, log, parts, sockets, and an orderly
//! end.

mod auth;
mod config;
mod content;
mod control;
mod debug;
mod drain;
mod filter;
mod flags;
mod gc;
mod history;
mod memory;
mod parts;
mod private;
mod prune;
mod serve;
mod settings;
mod status;
mod telemetry;
mod worker;

use clap::Parser as _;
use flags::{Flags, Persona};
use settings::Settings;
use shipway_fault::{Class, Fault, Result};
use std::process::ExitCode;
use telemetry::Telemetry;

fn main() -> ExitCode {
    let argv0 = std::env::args().next().unwrap_or_default();
    let persona = Persona::of(&argv0);
    let flags = Flags::parse();
    if flags.version {
        let v = worker::version();
        let name = if persona == Persona::Buildkitd { "buildkitd" } else { "shipwayd" };
        println!("{name} {} {} {}", v.package, v.version, v.revision);
        return ExitCode::SUCCESS;
    }
    match Settings::load(flags, persona).and_then(run) {
        Ok(()) => ExitCode::SUCCESS,
        Err(fault) => {
            eprintln!("shipwayd: {fault}");
            for hint in fault.hints() {
                eprintln!("  hint: {hint}");
            }
            ExitCode::from(if fault.class() == Class::User { 2 } else { 1 })
        }
    }
}

fn run(settings: Settings) -> Result<()> {
    private::umask();
    memory::tune();
    let telemetry = Telemetry::start(settings.logging, &settings.traces);
    for note in &settings.notes {
        tracing::warn!("{note}");
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .thread_name("shipwayd")
        .build()
        .map_err(|e| Fault::io("start the runtime", e))?;
    let version = worker::version();
    let command = std::env::args().collect();
    shipway_grpc::tell_stacks(shipway_grpc::Program {
        command,
        version: version.version,
        revision: version.revision,
    });
    runtime.block_on(async {
        let (parts, listening) = parts::build(settings, telemetry).await?;
        let listeners = serve::bind(&listening).await?;
        serve::run(parts, listeners).await
    })
}
