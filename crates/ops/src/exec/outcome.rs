//! What the end of a process means (rows `exec.err`, `exec.validexit`), with the reasons that an
//! exit code does not give.

use super::logs::StepLog;
use shipway_executor::ExitStatus;
use shipway_fault::{Class, Code, Detail, Fault, Result};
use shipway_gocompat::quote;
use shipway_host::Disk;
use shipway_storage::Mount;
use std::{io, path::Path};

/// A file system with less than this is full for a step's purposes.
const NOTHING_LEFT: u64 = 1 << 20;
/// One with more than this part free was not what a step found full: it has others, in memory.
const NEARLY_FULL: u64 = 10;

/// `Ok` if the process ended as it may; otherwise the fault that says why not.
pub(super) async fn judge(
    name: &str,
    valid: &[i32],
    status: Result<ExitStatus>,
    log: &StepLog,
    root: &[Mount],
) -> Result<()> {
    let prefix = format!("process {} did not complete successfully", quote(name));
    let status = match status {
        Ok(status) => status,
        Err(e) if e.is_cancelled() => return Err(e),
        Err(e) => return Err(e.context(prefix)),
    };
    let code = i32::try_from(status.code).unwrap_or(i32::MAX);
    let good = if valid.is_empty() { code == 0 } else { valid.contains(&code) };
    if good {
        return Ok(());
    }
    let mut message = format!("{prefix}: exit code: {}", status.code);
    let disk = disk_of(root).await;
    let full = log.no_space() || disk.is_some_and(|disk| is_full(&disk));
    if status.oom_killed {
        let peak = status
            .peak_memory
            .map(|p| format!("; its memory peaked at {} MiB", p >> 20))
            .unwrap_or_default();
        message
            .push_str(&format!(" (out of memory: the kernel killed a process of this step{peak})"));
    }
    if full {
        message.push_str(" (the disk is full: no space left on device)");
    }
    let mut fault = Fault::new(Code::Unknown, message)
        .with_class(Class::User)
        .detail(Detail::Exit(status.code));
    if status.oom_killed {
        fault = fault.hint("give the build more memory, or let the step use less, for example with fewer parallel jobs");
    }
    if full {
        fault = fault
            .with_class(Class::Environment)
            .hint("free some space, for example with `shipway prune`, and build again");
        if disk.is_some_and(|disk| is_full(&disk) || disk.free < disk.usable / NEARLY_FULL) {
            fault = fault.with_source(io::Error::from(io::ErrorKind::StorageFull));
        }
    }
    Err(fault)
}

/// The disk where the root filesystem keeps its changes.
async fn disk_of(root: &[Mount]) -> Option<Disk> {
    let dir = root.iter().find_map(Mount::writable_dir).map(Path::to_owned)?;
    shipway_task::blocking("look for space", move || Disk::of(&dir)).await.ok()
}

/// Whether nothing more can be written.
fn is_full(disk: &Disk) -> bool {
    disk.free < NOTHING_LEFT || (disk.inodes > 0 && disk.free_inodes == 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use shipway_oci::Digest;
    use shipway_progress::Reporter;

    async fn check(status: ExitStatus, valid: &[i32], said: &str, expected: &str) {
        let log = StepLog::new(
            Reporter::new(Digest::of("v"), "v".into(), vec![], None),
            Default::default(),
        );
        log.write(shipway_executor::Stream::Stderr, &said.to_owned().into());
        let text = judge("/bin/sh -c \"x\"", valid, Ok(status), &log, &[])
            .await
            .map_or_else(|e| e.to_string(), |()| "ok".into());
        assert_eq!(text, expected);
    }

    #[tokio::test]
    async fn an_end_is_explained() {
        let exit = |code| ExitStatus { code, ..Default::default() };
        let failed = r#"process "/bin/sh -c \"x\"" did not complete successfully: exit code: "#;
        check(exit(0), &[], "", "ok").await;
        check(exit(0), &[3], "", &format!("{failed}0")).await;
        check(exit(3), &[3], "", "ok").await;
        check(exit(1), &[], "", &format!("{failed}1")).await;
        let full = " (the disk is full: no space left on device)";
        check(exit(1), &[], "cp: No space left on device", &format!("{failed}1{full}")).await;
        let oom = " (out of memory: the kernel killed a process of this step; its memory peaked at 20 MiB)";
        check(
            ExitStatus { code: 137, oom_killed: true, peak_memory: Some(20 << 20) },
            &[],
            "",
            &format!("{failed}137{oom}"),
        )
        .await;
    }
}
