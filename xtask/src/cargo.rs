//! Running cargo, and running things as root.

use std::{
    ffi::OsStr,
    path::PathBuf,
    process::{Command, ExitStatus},
};

/// cargo in the workspace.
pub fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(shipway_testkit::workspace());
    command
}

/// Whether we are root already.
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// `program` as root: as it is, or through sudo.
pub fn root_command(program: impl AsRef<OsStr>) -> Command {
    if is_root() {
        return Command::new(program);
    }
    let mut command = Command::new("sudo");
    let path = std::env::var("PATH").unwrap_or_default();
    command.args(["-E", "env", &format!("PATH={path}:/usr/sbin:/sbin")]).arg(program);
    command
}

/// Builds the programs with `profile` and starts the release of this program that does `second` as
/// root: containers, mounts and snapshots need it.
pub fn build_and_continue(profile: &str, second: &[&str]) -> Result<(), String> {
    println!("building ({profile}) …");
    let mut build = cargo();
    build.args(["build", "--profile", profile]);
    build.args(
        ["xtask", "shipwayd", "shipway", "shipway-snapshotter", "shipway-keeper"]
            .into_iter()
            .flat_map(|package| ["--package", package]),
    );
    succeed(build)?;
    let directory = if profile == "dev" { "debug" } else { profile };
    let program: PathBuf = shipway_testkit::profile_dir()
        .parent()
        .ok_or("the target directory has no parent")?
        .join(directory)
        .join("xtask");
    let mut again = root_command(program);
    again.args(second);
    succeed(again)
}

/// Runs `command` with our own outputs.
pub fn succeed(mut command: Command) -> Result<(), String> {
    match command.status() {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(format!("{command:?}: {}", ended(status))),
        Err(e) => Err(format!("{command:?}: {e}")),
    }
}

fn ended(status: ExitStatus) -> String {
    status.code().map_or_else(|| "ended by a signal".into(), |code| format!("exit code {code}"))
}
