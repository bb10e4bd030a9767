//! The keeper as a program of its own: next to nothing stays in memory beside what it serves, while
//! the snapshotter, with a registry's client in it, takes many times as much. The snapshotter
//! becomes this program (`shipway-snapshotter keeper`, which reads the configuration) or has it
//! started by its supervisor.

use rustix::{fs::Mode, process::umask};
use shipway_fault::{Fault, Result};
use shipway_keeper::{Options, run, supervise};
use std::{
    ffi::OsString,
    io::{IsTerminal as _, stderr},
    os::unix::process::CommandExt as _,
    process::{Command, ExitCode},
    time::Duration,
};
use tracing::level_filters::LevelFilter;

const USAGE: &str = "\
shipway-keeper answers reads of lazy layers; shipway-snapshotter starts it.

  --run DIR            directory for what lives until the machine restarts
  --socket PATH        socket that the snapshotter connects to (keeper.sock in DIR)
  --deadline SECONDS   how long a read waits before it fails (60)
  --log-level LEVEL    error, warn, info, debug or trace (info)
  --log-format FORMAT  text or json (text)
  --supervise          start the keeper and hold its state, as a service manager does
";

/// What the command line says.
#[derive(Debug)]
struct Flags {
    options: Options,
    level: LevelFilter,
    json: bool,
    supervise: bool,
}

fn main() -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    if arguments.iter().any(|a| a == "--help") {
        print!("{USAGE}");
        return ExitCode::SUCCESS;
    }
    let flags = match parse(&arguments) {
        Ok(flags) => flags,
        Err(fault) => {
            eprint!("shipway-keeper: {fault}\n\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    // What is made here is root's alone.
    umask(Mode::from_raw_mode(0o077));
    let log = tracing_subscriber::fmt().with_max_level(flags.level).with_writer(stderr);
    match flags.json {
        true => log.json().init(),
        false => log.with_ansi(stderr().is_terminal()).init(),
    }
    let done = match flags.supervise {
        true => supervise(|| keeper(&arguments), &flags.options.directory),
        false => run(&flags.options),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(fault) => {
            eprintln!("shipway-keeper: {fault}");
            for hint in fault.hints() {
                eprintln!("  hint: {hint}");
            }
            ExitCode::FAILURE
        }
    }
}

/// This program with the same flags, but not as a supervisor.
fn keeper(arguments: &[OsString]) -> Command {
    // What it was started from, even if that was replaced since.
    let mut command = Command::new("/proc/self/exe");
    command.arg0("shipway-keeper").args(arguments.iter().filter(|a| *a != "--supervise"));
    command
}

fn parse(arguments: &[OsString]) -> Result<Flags> {
    let (mut directory, mut socket, mut deadline) = (None, None, None);
    let (mut level, mut json, mut supervise) = (LevelFilter::INFO, false, false);
    let mut rest = arguments.iter();
    while let Some(flag) = rest.next() {
        let name = flag.to_string_lossy();
        if name == "--supervise" {
            supervise = true;
            continue;
        }
        let value = rest.next().ok_or_else(|| Fault::invalid(format!("{name} needs a value")))?;
        let text = value.to_string_lossy();
        let wrong = || Fault::invalid(format!("{text:?} is not a value of {name}"));
        match &*name {
            "--run" => directory = Some(value.clone()),
            "--socket" => socket = Some(value.clone()),
            "--deadline" => {
                deadline = Some(Duration::from_secs(text.parse().map_err(|_| wrong())?));
            }
            "--log-level" => level = text.parse().map_err(|_| wrong())?,
            "--log-format" if text == "text" => json = false,
            "--log-format" if text == "json" => json = true,
            "--log-format" => return Err(wrong()),
            _ => return Err(Fault::invalid(format!("unknown flag {name}"))),
        }
    }
    let directory = directory.ok_or_else(|| Fault::invalid("--run is missing"))?;
    let mut options = Options::new(directory);
    options.socket = socket.map_or(options.socket, Into::into);
    options.deadline = deadline.unwrap_or(options.deadline);
    Ok(Flags { options, level, json, supervise })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn parsed(words: &[&str]) -> Result<Flags> {
        parse(&words.iter().map(OsString::from).collect::<Vec<OsString>>())
    }

    #[test]
    fn flags_say_all_that_can_be_set() {
        let least = parsed(&["--run", "/r"]).expect("the rest has defaults");
        assert_eq!(least.options.socket, Path::new("/r/keeper.sock"));
        assert_eq!(least.options.deadline, shipway_keeper::DEADLINE);
        assert!(!least.json && !least.supervise && least.level == LevelFilter::INFO);
        let all =
            "--run /r --socket /s --deadline 7 --log-level debug --log-format json --supervise";
        let all = parsed(&all.split(' ').collect::<Vec<_>>()).expect("all are known");
        assert_eq!(all.options.directory, Path::new("/r"));
        assert_eq!(all.options.socket, Path::new("/s"));
        assert_eq!(all.options.deadline, Duration::from_secs(7));
        assert!(all.json && all.supervise && all.level == LevelFilter::DEBUG);
    }

    #[test]
    fn wrong_flags_are_named() {
        for (words, says) in [
            (&["--socket", "/s"][..], "--run is missing"),
            (&["--run"], "--run needs a value"),
            (&["--run", "/r", "--speed", "9"], "unknown flag --speed"),
            (&["--run", "/r", "--deadline", "soon"], "\"soon\" is not a value of --deadline"),
            (&["--run", "/r", "--log-format", "xml"], "\"xml\" is not a value of --log-format"),
        ] {
            let fault = parsed(words).expect_err("wrong").to_string();
            assert!(fault.contains(says), "{words:?}: {fault}");
        }
    }
}
