//! The control socket, by which root's programs give credentials for what they will have read: a
//! builder those of its build's client.
//!
//! # Form
//!
//! A Unix stream socket (`control_address`, by default `/run/shipway-snapshotter/control.sock`),
//! open to root alone: its mode says so, and the kernel is asked who connected. A request is one
//! JSON object on a line, its answer another one; requests of a connection are answered in turn,
//! and either side may close it. A line has 64 KiB at the most. Unknown fields are refused.
//!
//! ```text
//! {"credentials":{"repository":"r.example/team/app","username":"me","secret":"…","seconds":3600}}
//! {"ok":true}
//! ```
//!
//! Fields of `credentials`:
//!
//! - `repository`: `registry/path`, as in an image's name; a tag or digest is passed over. Docker
//!   Hub is `docker.io`.
//! - `username` and `secret`: name and password. With an empty name, or without one, the secret is
//!   an identity token.
//! - `token`, instead of these: a bearer token that is good for pulls from the repository.
//! - `host`: the only host that may see them, with its port: a mirror of the registry. Without it,
//!   the registry itself (`registry-1.docker.io` for Docker Hub).
//! - `seconds`: how long they are good, from now: 1 to 86400.
//!
//! They are used for every layer that is fetched from that repository, also for those that are
//! there already, before any other credentials. To give them again for the same repository and
//! `host` replaces them; give a token again before it expires.
//!
//! What cannot be done is answered by `{"error":"…","code":"InvalidArgument"}`, and the connection
//! goes on; `code` is gRPC's name of it. They outlive a restart of the snapshotter, not one of the
//! machine.

use crate::keyring::{Giver, Grant, Hosts, Keyring, Login, Secret};
use serde::{Deserialize, Serialize};
use shipway_fault::{Code, Fault, Result};
use shipway_oci::ImageName;
use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::UnixStream,
    sync::Semaphore,
};
use tokio_stream::{Stream, StreamExt as _};
use zeroize::Zeroizing;

/// Longest line, in bytes.
pub const MAX_LINE: u64 = 64 << 10;
/// Most connections at once; further ones wait.
const MAX_CLIENTS: usize = 64;
/// Longest time that credentials are kept for, in seconds.
pub const MAX_SECONDS: u64 = 86_400;
/// How long a client may take to read an answer.
const PATIENCE: Duration = Duration::from_secs(5);

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum Request {
    Credentials(Given),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Given {
    repository: String,
    #[serde(default)]
    host: Option<String>,
    #[serde(default)]
    username: Option<String>,
    #[serde(default)]
    secret: Option<Secret>,
    #[serde(default)]
    token: Option<Secret>,
    seconds: u64,
}

#[derive(Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
enum Answer {
    Done { ok: bool },
    Failed { error: String, code: String },
}

impl From<Result<()>> for Answer {
    fn from(result: Result<()>) -> Self {
        match result {
            Ok(()) => Self::Done { ok: true },
            Err(fault) => {
                Self::Failed { error: fault.to_string(), code: format!("{:?}", fault.code()) }
            }
        }
    }
}

/// Serves everybody who connects and is root, or whom this process runs as.
pub async fn serve(connections: impl Stream<Item = UnixStream>, keyring: Arc<Keyring>) {
    let places = Arc::new(Semaphore::new(MAX_CLIENTS));
    let mut connections = std::pin::pin!(connections);
    while let Some(connection) = connections.next().await {
        let Ok(place) = places.clone().acquire_owned().await else { return };
        let keyring = keyring.clone();
        shipway_task::spawn("control", async move {
            let _place = place;
            if let Err(error) = talk(connection, &keyring).await {
                tracing::debug!(%error, "a control connection ended");
            }
        });
    }
}

/// Whether a user may give credentials.
fn admits(user: u32) -> bool {
    user == 0 || user == rustix::process::geteuid().as_raw()
}

async fn talk(mut connection: UnixStream, keyring: &Keyring) -> std::io::Result<()> {
    let user = connection.peer_cred()?.uid();
    if !admits(user) {
        tracing::warn!(user, "a user who may not use the control socket was refused");
        let refused = Fault::new(Code::PermissionDenied, "only root may give credentials");
        return answer(&mut connection, Err(refused)).await;
    }
    let (read, mut write) = connection.split();
    let mut read = BufReader::new(read);
    loop {
        let mut line = Zeroizing::new(Vec::with_capacity(4096));
        if (&mut read).take(MAX_LINE).read_until(b'\n', &mut line).await? == 0 {
            return Ok(());
        }
        let whole = line.last() == Some(&b'\n');
        let done = match whole {
            true => keep(&line, keyring),
            false => Err(Fault::invalid(format!("a request has {MAX_LINE} bytes at the most"))),
        };
        answer(&mut write, done).await?;
        if !whole {
            return Ok(());
        }
    }
}

async fn answer(
    to: &mut (impl tokio::io::AsyncWrite + Unpin),
    result: Result<()>,
) -> std::io::Result<()> {
    let mut text = serde_json::to_vec(&Answer::from(result)).map_err(std::io::Error::other)?;
    text.push(b'\n');
    tokio::time::timeout(PATIENCE, to.write_all(&text)).await?
}

/// Does what a line asks for.
fn keep(line: &[u8], keyring: &Keyring) -> Result<()> {
    // What a parser has to say may quote what it read.
    let Request::Credentials(given) = serde_json::from_slice(line).map_err(|e| {
        Fault::invalid(format!("not a valid request, at column {}", e.column()))
            .hint("see the documentation of the control socket for its form")
    })?;
    let image: ImageName = given.repository.parse().map_err(|e| {
        Fault::invalid(format!("{:?} is not a valid repository: {e}", given.repository))
    })?;
    if !(1..=MAX_SECONDS).contains(&given.seconds) {
        return Err(Fault::invalid(format!("`seconds` is not between 1 and {MAX_SECONDS}")));
    }
    let login = match (given.username, given.secret, given.token) {
        (username, Some(secret), None) => {
            Login::Password { username: username.unwrap_or_default(), secret }
        }
        (None, None, Some(token)) => Login::Token(token),
        _ => return Err(Fault::invalid("want either `secret`, with a `username`, or `token`")),
    };
    let hosts = given.host.map_or(Hosts::Own, Hosts::One);
    let until = Some(SystemTime::now() + Duration::from_secs(given.seconds));
    tracing::debug!(repository = image.locator(), ?hosts, "a builder gave credentials");
    keyring.give(&image, Grant { giver: Giver::Build, hosts, login, until });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::UnixListener;

    async fn client(keyring: &Arc<Keyring>) -> BufReader<UnixStream> {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let connections = tokio_stream::iter([theirs]).chain(tokio_stream::pending());
        shipway_task::spawn("serve", serve(connections, keyring.clone()));
        BufReader::new(ours)
    }

    async fn ask(client: &mut BufReader<UnixStream>, line: &str) -> String {
        client.write_all(format!("{line}\n").as_bytes()).await.unwrap();
        let mut answer = String::new();
        client.read_line(&mut answer).await.unwrap();
        answer.trim_end().to_owned()
    }

    #[tokio::test]
    async fn credentials_are_kept_for_their_time() {
        let keyring = Arc::default();
        let mut client = client(&keyring).await;
        let line = r#"{"credentials":{"repository":"r.example/a:1","username":"me","secret":"s3cret","seconds":60}}"#;
        assert_eq!(ask(&mut client, line).await, r#"{"ok":true}"#);
        let image: ImageName = "r.example/a".parse().unwrap();
        let grant = keyring.find(&image, "r.example", |_| true).unwrap();
        let secret = "s3cret".to_owned().into();
        assert_eq!(grant.login, Login::Password { username: "me".into(), secret });
        let left = grant.until.unwrap().duration_since(SystemTime::now()).unwrap();
        assert!(left <= Duration::from_secs(60) && left > Duration::from_secs(30), "{left:?}");
        let line = r#"{"credentials":{"repository":"r.example/a","host":"m.example:5000","token":"t0ken","seconds":86400}}"#;
        assert_eq!(ask(&mut client, line).await, r#"{"ok":true}"#);
        let grant = keyring.find(&image, "m.example:5000", |_| true).unwrap();
        assert_eq!(grant.login, Login::Token("t0ken".to_owned().into()));
    }

    #[tokio::test]
    async fn what_is_wrong_is_told_without_secrets_and_the_connection_goes_on() {
        let keyring = Arc::default();
        let mut client = client(&keyring).await;
        for (fields, says) in [
            (
                r#""repository":"r.example/R/x","secret":"s3cret","seconds":1"#,
                "not a valid repository",
            ),
            (r#""repository":"a","secret":"s3cret","seconds":0"#, "not between 1 and 86400"),
            (r#""repository":"a","secret":"s3cret","seconds":86401"#, "not between 1 and 86400"),
            (r#""repository":"a","seconds":1"#, "want either"),
            (r#""repository":"a","secret":"s3cret","token":"s3cret","seconds":1"#, "want either"),
            (r#""repository":"a","username":"u","token":"s3cret","seconds":1"#, "want either"),
            (r#""repository":"a","secret":"s3cret","seconds":"s3cret""#, "not a valid request"),
            (r#""repository":"a","s3cret":1,"seconds":1"#, "not a valid request"),
        ] {
            let told = ask(&mut client, &format!(r#"{{"credentials":{{{fields}}}}}"#)).await;
            assert!(told.contains(says) && told.contains("InvalidArgument"), "{fields}: {told}");
            assert!(!told.contains("s3cret"), "{told}");
        }
        let told = ask(&mut client, r#"{"forget":"everything"}"#).await;
        assert!(told.contains("not a valid request"), "{told}");
        assert_eq!(keyring.known(), []);
        let line = r#"{"credentials":{"repository":"a","secret":"s3cret","seconds":1}}"#;
        assert_eq!(ask(&mut client, line).await, r#"{"ok":true}"#);
    }

    #[tokio::test]
    async fn a_line_is_bounded() {
        let keyring = Arc::default();
        let mut client = client(&keyring).await;
        // It is refused before all of it was sent.
        let line = "x".repeat(MAX_LINE as usize);
        client.write_all(line.as_bytes()).await.unwrap();
        let mut told = String::new();
        client.read_line(&mut told).await.unwrap();
        assert!(told.contains("at the most"), "{told}");
        assert_eq!(client.read_line(&mut told).await.unwrap(), 0, "it is closed");
    }

    #[tokio::test]
    async fn others_than_root_are_refused_whatever_the_mode_of_the_socket() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control.sock");
        let listener = UnixListener::bind(&path).unwrap();
        for path in [dir.path(), &path] {
            rustix::fs::chmod(path, rustix::fs::Mode::from_raw_mode(0o777)).unwrap();
        }
        if !rustix::process::geteuid().is_root() {
            return assert!(!admits(rustix::process::geteuid().as_raw() + 1));
        }
        // Only this thread becomes somebody else.
        let nobody = std::thread::spawn(move || {
            rustix::thread::set_thread_uid(rustix::process::Uid::from_raw(65_534)).unwrap();
            std::os::unix::net::UnixStream::connect(path).unwrap()
        });
        let (accepted, _) = listener.accept().await.unwrap();
        let nobody = nobody.join().unwrap();
        nobody.set_nonblocking(true).unwrap();
        let connections = tokio_stream::iter([accepted]).chain(tokio_stream::pending());
        let keyring = Arc::default();
        shipway_task::spawn("serve", serve(connections, Arc::clone(&keyring)));
        let mut told = String::new();
        let mut client = BufReader::new(UnixStream::from_std(nobody).unwrap());
        client.read_line(&mut told).await.unwrap();
        assert!(told.contains("PermissionDenied"), "{told}");
        assert_eq!(keyring.known(), []);
    }
}
