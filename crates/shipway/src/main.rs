//! The client, in two personas: `shipway`, and `buildctl` when called by that name, with exactly
//! that program's arguments.
//!
//! Each command is a file in `command`; the doc comments of its arguments are its help. `spec`
//! reads the small languages of flags, `run` carries a build from options to its end, `progress`
//! draws it, `failure` reports what went wrong, `explain` why steps ran, `debugger` is a person in
//! a step, `dap` an editor.
//!
//! Dependencies worth a word: `clap` reads command lines; `base64` opens what exporters answer;
//! `tempfile` holds a Dockerfile or context that comes on standard input; `rustix` asks the
//! terminal for its size and the kernel who we are; `clap_complete` and `clap_mangen` write
//! completions and manuals from what `clap` knows; `rcgen` makes certificates; `toml` reads the
//! daemon's configuration for `doctor`.

mod buildctl;
mod builders;
mod command;
mod connect;
mod csv;
mod dap;
mod debugger;
mod driver;
mod explain;
mod failure;
mod metrics;
mod nodes;
mod notes;
mod output;
mod places;
mod progress;
mod run;
mod shipway;
mod size;
mod spec;
mod spread;
mod table;
mod template;

use std::{ffi::OsStr, io::IsTerminal, path::Path, process::ExitCode, time::Duration};

use shipway_fault::{Fault, Result};

/// Which program we are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Persona {
    /// Our own.
    Shipway,
    /// BuildKit's client.
    Buildctl,
}

impl Persona {
    /// By the name we were called.
    fn called(name: Option<&OsStr>) -> Self {
        match name.map(Path::new).and_then(Path::file_stem).and_then(OsStr::to_str) {
            Some("buildctl") => Self::Buildctl,
            _ => Self::Shipway,
        }
    }
}

fn main() -> ExitCode {
    let persona = Persona::called(std::env::args_os().next().as_deref());
    match start(persona) {
        Ok(code) => code,
        Err(fault) => {
            eprint!("{}", failure::describe(&fault, persona));
            ExitCode::FAILURE
        }
    }
}

fn start(persona: Persona) -> Result<ExitCode> {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime = runtime.map_err(|e| Fault::io("start the async runtime", e))?;
    let result = runtime.block_on(async {
        match persona {
            Persona::Shipway => shipway::main().await,
            Persona::Buildctl => buildctl::main().await.map(|()| ExitCode::SUCCESS),
        }
    });
    // A thread that waits for standard input must not keep us.
    runtime.shutdown_timeout(Duration::from_millis(100));
    result
}

/// Warnings go to standard error; with `debug`, everything.
pub(crate) fn log(debug: bool, json: bool) {
    let level = if debug { tracing::Level::DEBUG } else { tracing::Level::WARN };
    let colored = std::io::stderr().is_terminal()
        && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty());
    let builder = tracing_subscriber::fmt()
        .with_max_level(level)
        .with_writer(std::io::stderr)
        .with_target(debug)
        .with_ansi(colored);
    // A second call would mean a second start, which there is not.
    let _ = if json { builder.json().try_init() } else { builder.without_time().try_init() };
}
