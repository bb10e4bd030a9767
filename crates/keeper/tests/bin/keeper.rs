//! A keeper for tests to start and to kill: `keeper-under-test DIRECTORY DEADLINE_MILLISECONDS`.
//! With `confined` instead, a process that does what no keeper does.

use shipway_keeper::{Options, confine, run};
use std::{process::ExitCode, time::Duration};

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    // It does not outlive the test.
    let _ = rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL));
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["confined"] => {
            confine();
            // Which is still permitted.
            eprintln!("confined");
            let _ = std::fs::File::open("/");
            ExitCode::SUCCESS
        }
        [directory, deadline] => {
            let options = Options {
                deadline: Duration::from_millis(deadline.parse().unwrap_or(60_000)),
                ..Options::new(directory)
            };
            match run(&options) {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => {
                    eprintln!("keeper: {error}");
                    ExitCode::FAILURE
                }
            }
        }
        _ => ExitCode::from(2),
    }
}
