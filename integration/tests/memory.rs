//! What builds take of the daemon's memory goes back.

#![allow(clippy::unwrap_used)]

use shipway_integration::{any, smaps};
use shipway_testkit::{Lab, wait_for};
use std::{process::Stdio, time::Duration};

/// What may stay, in KiB, beside what the daemon has when it has done nothing yet: threads that
/// wait for work, connections, and the pages of the cache's index that were read.
const STAYS: u64 = 8 << 10;
/// Longer than the daemon waits until it takes a build for the last one.
const PATIENCE: Duration = Duration::from_secs(90);

#[test]
fn what_large_exports_took_goes_back() {
    let mut lab = Lab::complete(any());
    let daemon = lab.daemon().pid();
    let private = || smaps(daemon, "Anonymous");
    let idle = private();
    // Of a file with a hole, so that no disk is needed for it.
    let context = lab.context(
        "large",
        &[("Dockerfile", "FROM busybox\nARG N\nRUN truncate -s 512M /large && echo $N > /n\n")],
    );
    let mut most = 0;
    for (n, kind) in ["uncompressed", "gzip", "zstd", "estargz"].into_iter().enumerate() {
        let mut command = lab.shipway_command();
        command.args(["build", "--progress", "plain", "--build-arg", &format!("N={n}")]);
        command.args([
            "--output",
            &format!("type=oci,dest=-,force-compression=true,compression={kind}"),
        ]);
        command.arg(&context).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut client = command.spawn().unwrap();
        let ended = wait_for("an export", Duration::from_secs(300), || {
            most = most.max(private());
            client.try_wait().unwrap().ok_or_else(|| "it runs".to_owned())
        });
        assert!(ended.success(), "{kind}: {ended}");
    }
    eprintln!("{idle} KiB idle, {most} KiB at most");
    wait_for("memory to go back", PATIENCE, || {
        let now = private();
        if now <= idle + STAYS { Ok(()) } else { Err(format!("{now} KiB, {idle} KiB at first")) }
    });
}
