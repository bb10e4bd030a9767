//! What is missing on this host.

use crate::{config::Config, setup::Target, status};
use shipway_fault::{Code, Fault, Result};
use std::process::ExitCode;

/// One thing that has to be right.
struct Check {
    what: String,
    result: Result<()>,
}

/// Looks at everything, and says so; succeeds if nothing is missing.
pub fn run(config: &Config, target: &Target) -> ExitCode {
    let mut well = true;
    for Check { what, result } in checks(config, target) {
        match result {
            Ok(()) => println!("ok       {what}"),
            Err(fault) => {
                well = false;
                println!("missing  {what}: {fault}");
                fault.hints().for_each(|hint| println!("         hint: {hint}"));
            }
        }
    }
    if well { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn checks(config: &Config, target: &Target) -> Vec<Check> {
    let missing = |what: &'static str, hint: &'static str| {
        Fault::new(Code::FailedPrecondition, what).hint(hint)
    };
    let overlay = match std::fs::read_to_string("/proc/filesystems") {
        Ok(text) if text.split_whitespace().any(|word| word == "overlay") => Ok(()),
        Ok(_) => Err(missing("this kernel has none, or has not loaded it", "modprobe overlay")),
        Err(e) => Err(Fault::io("read /proc/filesystems", e)),
    };
    let set_up = target.is_set_up(config).and_then(|done| match done {
        true => Ok(()),
        false => Err(missing("it does not know the snapshotter", "shipway-snapshotter setup")),
    });
    vec![
        Check { what: "overlayfs in the kernel".into(), result: overlay },
        Check { what: "containerd of a known version".into(), result: target.version().map(drop) },
        Check { what: "containerd's configuration".into(), result: set_up },
        Check { what: "a snapshotter that runs".into(), result: status::ask(config).map(drop) },
    ]
}
