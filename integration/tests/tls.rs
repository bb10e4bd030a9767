//! The daemon over TCP: who may talk to it is a matter of certificates (rows `toml.grpc.tls`,
//! `fl.tls`).

#![allow(clippy::unwrap_used)]

use shipway_integration::any;
use shipway_testkit::{Finished, Lab, Process, built, free_port, run, wait_for, which};
use std::{
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

/// An authority with a certificate for a server and one for a client.
struct Authority(PathBuf);

impl Authority {
    #[track_caller]
    fn new(dir: PathBuf) -> Self {
        assert!(which("openssl").is_some(), "openssl is absent; `cargo xtask test` installs it");
        std::fs::create_dir(&dir).unwrap();
        let openssl = |words: &str| {
            run(Command::new("openssl").args(words.split(' ')).current_dir(&dir)).ok()
        };
        const KEY: &str = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes";
        openssl(&format!("req -x509 {KEY} -keyout ca.key -out ca.pem -subj /CN=authority -days 2"));
        std::fs::write(dir.join("names"), "subjectAltName=DNS:builder.test\n").unwrap();
        for name in ["server", "client"] {
            openssl(&format!("req {KEY} -keyout {name}.key -out {name}.csr -subj /CN={name}"));
            openssl(&format!(
                "x509 -req -in {name}.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -out {name}.pem -extfile names"
            ));
        }
        Self(dir)
    }

    fn file(&self, name: &str) -> String {
        self.0.join(name).display().to_string()
    }
}

/// A daemon of its own on the lab's containerd that listens on a port, with more flags.
fn serve(lab: &Lab, name: &str, flags: &[String]) -> (Process, u16) {
    let port = free_port();
    let mut command = Command::new(built("shipwayd"));
    command
        .arg("--config")
        .arg(lab.dir().join("shipwayd.toml"))
        .arg("--root")
        .arg(lab.dir().join(name))
        .env("PATH", lab.path());
    command.arg("--addr").arg(format!("tcp://127.0.0.1:{port}")).args(flags);
    let mut daemon = Process::start(name, &mut command, &log(lab, name));
    wait_for("the daemon to listen", Duration::from_secs(30), || {
        daemon.alive()?;
        if daemon.tail(50).contains("listening") { Ok(()) } else { Err(daemon.tail(20)) }
    });
    (daemon, port)
}

fn log(lab: &Lab, name: &str) -> PathBuf {
    lab.dir().join(format!("{name}.log"))
}

fn ask(port: u16, flags: &[String], command: &[&str]) -> Finished {
    let address = format!("tcp://127.0.0.1:{port}");
    run(Command::new(built("shipway"))
        .args(["--addr", &address, "--timeout", "20"])
        .args(flags)
        .args(command))
}

fn risks(path: &Path) -> bool {
    std::fs::read_to_string(path)
        .unwrap()
        .contains("anyone who can reach this address controls the daemon")
}

#[test]
fn over_tcp_a_client_needs_a_certificate_of_the_authority() {
    let mut lab = Lab::complete(any());
    assert!(lab.stop_daemon(), "the daemon had to be killed");
    let (ours, other) =
        (Authority::new(lab.dir().join("ours")), Authority::new(lab.dir().join("other")));
    let server = |ca: bool| {
        let mut flags = vec![
            format!("--tlscert={}", ours.file("server.pem")),
            format!("--tlskey={}", ours.file("server.key")),
        ];
        flags.extend(ca.then(|| format!("--tlscacert={}", ours.file("ca.pem"))));
        flags
    };
    let client = |trusts: &Authority, has: Option<&Authority>| {
        let mut flags = vec![
            "--tlsservername=builder.test".to_owned(),
            format!("--tlscacert={}", trusts.file("ca.pem")),
        ];
        flags.extend(has.iter().flat_map(|a| {
            [
                format!("--tlscert={}", a.file("client.pem")),
                format!("--tlskey={}", a.file("client.key")),
            ]
        }));
        flags
    };

    let (mut daemon, port) = serve(&lab, "mutual", &server(true));
    let good = client(&ours, Some(&ours));
    ask(port, &good, &["workers"]).ok();
    let context = lab.context("tls", &[("Dockerfile", "FROM busybox\nRUN echo over tls > /x\n")]);
    ask(
        port,
        &good,
        &["build", "--progress", "plain", "--tag", "tls:1", &context.display().to_string()],
    )
    .ok();
    for (what, flags) in [
        ("no certificate", client(&ours, None)),
        ("a certificate of another authority", client(&ours, Some(&other))),
        ("a client that trusts another authority", client(&other, Some(&ours))),
        ("no TLS", Vec::new()),
    ] {
        let refused = ask(port, &flags, &["workers"]);
        assert_ne!(refused.code, Some(0), "{what}: {}", refused.all());
    }
    let wrong_name: Vec<String> =
        good.iter().map(|f| f.replace("builder.test", "other.test")).collect();
    ask(port, &wrong_name, &["workers"]).failed();
    // After all these it still serves.
    ask(port, &good, &["workers"]).ok();
    assert!(daemon.stop(Duration::from_secs(20)), "the daemon had to be killed");
    assert!(!risks(&log(&lab, "mutual")));

    let (mut daemon, port) = serve(&lab, "open", &server(false));
    ask(port, &client(&ours, None), &["workers"]).ok();
    assert!(daemon.stop(Duration::from_secs(20)), "the daemon had to be killed");
    assert!(risks(&log(&lab, "open")), "nothing was said of clients without certificates");

    let (mut daemon, port) = serve(&lab, "plain", &[]);
    ask(port, &[], &["workers"]).ok();
    assert!(daemon.stop(Duration::from_secs(20)), "the daemon had to be killed");
    assert!(risks(&log(&lab, "plain")), "nothing was said of TCP without TLS");
}

/// Certificates that `shipway certs` makes let their holders in and nobody else, and renewed ones
/// are used while the daemon runs (row `dp.certs`).
#[test]
fn certificates_are_made_by_a_command_and_renewed_without_a_restart() {
    let mut lab = Lab::complete(any());
    assert!(lab.stop_daemon(), "the daemon had to be killed");
    let certs = lab.dir().join("certs");
    let make = |more: &[&str]| {
        run(Command::new(built("shipway"))
            .args(["certs", "--host", "builder.test", "--client", "alice"])
            .args(more)
            .arg(&certs))
        .ok()
    };
    make(&[]);
    let file = |name: &str| certs.join(name).display().to_string();
    let flags = [
        format!("--tlscert={}", file("daemon/cert.pem")),
        format!("--tlskey={}", file("daemon/key.pem")),
        format!("--tlscacert={}", file("daemon/ca.pem")),
    ];
    let (mut daemon, port) = serve(&lab, "certs", &flags);
    let by_address = [format!("--tlsdir={}", file("alice"))];
    let by_name = ["--tlsservername=builder.test".to_owned(), by_address[0].clone()];
    ask(port, &by_name, &["workers"]).ok();
    ask(port, &by_address, &["workers"]).failed();
    // The daemon's own certificate is no client's.
    let servers =
        ["--tlsservername=builder.test".to_owned(), format!("--tlsdir={}", file("daemon"))];
    ask(port, &servers, &["workers"]).failed();

    let text = "FROM busybox\nRUN sleep 4 && echo over an old connection > /x\n";
    let context = lab.context("renewed", &[("Dockerfile", text)]);
    let mut running = Process::start(
        "build",
        Command::new(built("shipway"))
            .args(["--addr", &format!("tcp://127.0.0.1:{port}")])
            .args(&by_name)
            .args(["build", "--progress", "plain", "--tag", "renewed:1"])
            .arg(&context),
        &log(&lab, "build"),
    );
    wait_for("the step to run", Duration::from_secs(30), || {
        running.alive()?;
        let said = running.tail(50);
        if said.contains("RUN sleep") { Ok(()) } else { Err(said) }
    });
    let cert = std::fs::read(certs.join("daemon/cert.pem")).unwrap();
    std::fs::write(certs.join("daemon/cert.pem"), "no PEM").unwrap();
    ask(port, &by_name, &["workers"]).ok();
    ask(port, &by_name, &["workers"]).ok();
    let complaints = || {
        let text = std::fs::read_to_string(log(&lab, "certs")).unwrap();
        text.matches("failed to use the new TLS files").count()
    };
    assert_eq!(complaints(), 1, "{}", daemon.tail(20));
    std::fs::write(certs.join("daemon/cert.pem"), cert).unwrap();
    make(&[]);
    ask(port, &by_address, &["workers"]).failed();
    make(&["--force", "--host", "127.0.0.1"]);
    ask(port, &by_address, &["workers"]).ok();
    wait_for("the build to end", Duration::from_secs(60), || match running.alive() {
        Ok(()) => Err(running.tail(20)),
        Err(_) => Ok(()),
    });
    assert!(
        lab.ctr(["images", "list", "-q"]).ok().stdout.contains("renewed:1"),
        "{}",
        running.tail(40)
    );
    assert!(daemon.stop(Duration::from_secs(20)), "the daemon had to be killed");
}

#[test]
fn half_of_what_tls_needs_stops_the_daemon() {
    let dir = tempfile::tempdir().unwrap();
    for flags in [&["--tlscert=/c"][..], &["--tlskey=/k"], &["--tlscacert=/ca"]] {
        let done =
            run(Command::new(built("shipwayd")).arg("--root").arg(dir.path()).args(flags)).failed();
        assert!(done.stderr.contains("TLS needs a certificate and a key"), "{}", done.stderr);
    }
}
