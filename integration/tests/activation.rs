//! The daemon as systemd runs it: its sockets are there before it is, and it says when it is ready
//! and when it stops.

#![allow(clippy::unwrap_used)]

use rustix::process::Signal;
use shipway_integration::any;
use shipway_testkit::{Lab, Process, built, run, which};
use std::{os::unix::net::UnixDatagram, process::Command, time::Duration};

#[test]
fn a_connection_starts_the_daemon_which_says_that_it_is_ready() {
    let Some(activate) = which("systemd-socket-activate") else {
        // `cargo xtask test` installs what it can; a machine without systemd has no sockets to pass
        // on.
        eprintln!("systemd-socket-activate is absent");
        return;
    };
    let mut lab = Lab::complete(any());
    assert!(lab.stop_daemon(), "the daemon had to be killed");
    let notes = UnixDatagram::bind(lab.dir().join("notify")).unwrap();
    notes.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    let sockets = ["one.sock", "two.sock"].map(|name| lab.dir().join(name));
    let mut command = Command::new(activate);
    for socket in &sockets {
        command.arg("-l").arg(socket);
    }
    command
        .arg("-E")
        .arg(format!("NOTIFY_SOCKET={}", lab.dir().join("notify").display()))
        .arg("-E")
        .arg("PATH");
    command
        .arg(built("shipwayd"))
        .arg("--config")
        .arg(lab.dir().join("shipwayd.toml"))
        .args(["--addr", "fd://"]);
    let mut daemon = Process::start(
        "activated",
        command.env("PATH", lab.path()),
        &lab.dir().join("activated.log"),
    );
    shipway_testkit::wait_for("the sockets", Duration::from_secs(10), || {
        if sockets.iter().all(|s| s.exists()) { Ok(()) } else { Err(daemon.tail(20)) }
    });

    for socket in &sockets {
        let address = format!("unix://{}", socket.display());
        run(Command::new(built("shipway")).args([
            "--addr",
            &address,
            "--timeout",
            "20",
            "workers",
        ]))
        .ok();
    }
    let heard = || {
        let mut buffer = [0; 256];
        let length = notes.recv(&mut buffer).unwrap();
        String::from_utf8_lossy(&buffer[..length]).into_owned()
    };
    assert!(heard().contains("READY=1"));
    daemon.signal(Signal::TERM);
    assert!(heard().contains("STOPPING=1"));
    assert!(daemon.stop(Duration::from_secs(20)), "the daemon had to be killed");
    // The sockets are systemd's: they stay.
    assert!(sockets.iter().all(|s| s.exists()));
}
