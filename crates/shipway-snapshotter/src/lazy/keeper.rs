//! How the keeper is started: as the program `shipway-keeper` beside this one, which stays small. A
//! snapshotter that was installed without it is the keeper itself.

use crate::config::Config;
use shipway_daemon::{LogFormat, LogLevel};
use shipway_fault::{Fault, Result};
use std::{
    ffi::OsString, io::ErrorKind, os::unix::process::CommandExt as _, path::PathBuf,
    process::Command, time::Duration,
};

/// The keeper's program, if it is where this one is. This one may have been replaced since.
fn program() -> Option<PathBuf> {
    let this = std::env::current_exe().ok()?;
    Some(this.parent()?.join("shipway-keeper")).filter(|path| path.is_file())
}

/// The flags that say to a keeper what the configuration does.
fn flags(config: &Config, supervise: bool) -> Vec<OsString> {
    let format = match config.log.format {
        LogFormat::Text => "text",
        LogFormat::Json => "json",
    };
    let lazy = &config.lazy;
    let mut flags: Vec<OsString> = vec![
        "--run".into(),
        lazy.run.clone().into(),
        "--socket".into(),
        lazy.keeper_address.clone().into(),
        "--deadline".into(),
        lazy.deadline.to_string().into(),
        "--log-level".into(),
        LogLevel::as_str(config.log.level).into(),
        "--log-format".into(),
        format.into(),
    ];
    if supervise {
        flags.push("--supervise".into());
    }
    flags
}

/// Starts a keeper, and what starts it again, where no service manager does.
pub fn start(config: &Config) -> Command {
    if let Some(program) = program() {
        let mut command = Command::new(program);
        command.args(flags(config, true));
        return command;
    }
    let mut command = own(config);
    command.arg("--supervise");
    command
}

/// This program as the keeper.
fn own(config: &Config) -> Command {
    let mut command = Command::new("/proc/self/exe");
    let lazy = &config.lazy;
    command.arg("keeper").arg("--run").arg(&lazy.run).arg("--socket").arg(&lazy.keeper_address);
    command.arg("--deadline").arg(lazy.deadline.to_string());
    command
}

/// Goes on as the keeper, with the file descriptors that a service manager passed: by the program
/// if that is there.
pub fn become_keeper(config: &Config, supervise: bool) -> Result<()> {
    if let Some(program) = program() {
        let error = Command::new(&program).args(flags(config, supervise)).exec();
        if error.kind() != ErrorKind::NotFound {
            return Err(Fault::io(format!("start {}", program.display()), error));
        }
    }
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
    shipway_daemon::start_log(config.log.level, config.log.format);
    let options = shipway_keeper::Options {
        directory: config.lazy.run.clone(),
        socket: config.lazy.keeper_address.clone(),
        deadline: Duration::from_secs(config.lazy.deadline),
    };
    match supervise {
        true => shipway_keeper::supervise(|| own(config), &options.directory),
        false => shipway_keeper::run(&options),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_keepers_program_is_told_what_is_configured() {
        let mut config = Config::default();
        (config.lazy.run, config.lazy.deadline) = ("/r".into(), 7);
        config.lazy.keeper_address = "/s".into();
        config.log.level = LogLevel::Debug;
        let flags: Vec<String> =
            flags(&config, true).into_iter().map(|f| f.into_string().unwrap()).collect();
        let want =
            "--run /r --socket /s --deadline 7 --log-level debug --log-format text --supervise";
        assert_eq!(flags.join(" "), want);
    }
}
