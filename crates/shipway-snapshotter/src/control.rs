//! The control socket, by which root's programs give credentials for what they will have read (a
//! builder those of its build's client), and ask what is known of files that were not read yet.
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
//! `host` replaces them; give a token again before it expires. They outlive a restart of the
//! snapshotter, not one of the machine.
//!
//! # Digests of contents
//!
//! ```text
//! {"pieces":{"layer":"/var/lib/shipway-snapshotter/l/7","length":4194304,"inodes":[36,42]}}
//! {"pieces":[["sha256:…","sha256:…"],null]}
//! ```
//!
//! `layer` is the directory with a layer's files, as it stands in the mounts of snapshots, and
//! `inodes` are numbers of files in it as `stat` shows them there, at most 1024. For each of them
//! the answer has the digests of its contents in pieces of `length` bytes, or `null` where they are
//! not known: the last piece is shorter, and an answer has 8192 digests at the most. They are what
//! the layer's verified index says, so nothing is read or fetched for them; a read of such a piece
//! gets bytes with its digest, or an error.
//!
//! # Errors
//!
//! What cannot be done is answered by `{"error":"…","code":"InvalidArgument"}`, and the connection
//! goes on; `code` is gRPC's name of it.

use crate::keyring::{Giver, Grant, Hosts, Keyring, Login, Secret};
use serde::{Deserialize, Serialize};
use shipway_fault::{Code, Fault, Result};
use shipway_oci::{Digest, ImageName};
use std::{
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
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
/// Most inodes of a request.
pub const MAX_INODES: usize = 1024;
/// Most digests of an answer.
pub const MAX_PIECES: usize = 8192;
/// How long a client may take to read an answer.
const PATIENCE: Duration = Duration::from_secs(5);

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum Request {
    Credentials(Given),
    Pieces(Asked),
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

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Asked {
    layer: PathBuf,
    length: u64,
    inodes: Vec<u64>,
}

/// For each of some files the digests of its pieces, where they are known.
pub type Pieces = Vec<Option<Vec<Digest>>>;

/// Knows what is in the files of layers.
pub trait LayerPieces: Send + Sync {
    /// Digests of the contents of `inodes` of the layer whose files are at `directory`, in pieces
    /// of `length` bytes; at most `most` of them. Blocks.
    fn pieces(&self, directory: &Path, inodes: &[u64], length: u64, most: usize) -> Result<Pieces>;
}

/// The layers, which are there some time after the socket is.
pub type Layers = Arc<OnceLock<Arc<dyn LayerPieces>>>;

#[derive(Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
enum Answer {
    Done { ok: bool },
    Known { pieces: Pieces },
    Failed { error: String, code: String },
}

impl From<Fault> for Answer {
    fn from(fault: Fault) -> Self {
        Self::Failed { error: fault.to_string(), code: format!("{:?}", fault.code()) }
    }
}

/// Serves everybody who connects and is root, or whom this process runs as.
pub async fn serve(
    connections: impl Stream<Item = UnixStream>,
    keyring: Arc<Keyring>,
    layers: Layers,
) {
    let places = Arc::new(Semaphore::new(MAX_CLIENTS));
    let mut connections = std::pin::pin!(connections);
    while let Some(connection) = connections.next().await {
        let Ok(place) = places.clone().acquire_owned().await else { return };
        let (keyring, layers) = (keyring.clone(), layers.clone());
        shipway_task::spawn("control", async move {
            let _place = place;
            if let Err(error) = talk(connection, &keyring, &layers).await {
                tracing::debug!(%error, "a control connection ended");
            }
        });
    }
}

/// Whether a user may use the socket.
fn admits(user: u32) -> bool {
    user == 0 || user == rustix::process::geteuid().as_raw()
}

async fn talk(
    mut connection: UnixStream,
    keyring: &Keyring,
    layers: &Layers,
) -> std::io::Result<()> {
    let user = connection.peer_cred()?.uid();
    if !admits(user) {
        tracing::warn!(user, "a user who may not use the control socket was refused");
        let refused = Fault::new(Code::PermissionDenied, "only root may use the control socket");
        return answer(&mut connection, refused.into()).await;
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
            true => done(&line, keyring, layers).await,
            false => Err(Fault::invalid(format!("a request has {MAX_LINE} bytes at the most"))),
        };
        answer(&mut write, done.unwrap_or_else(Answer::from)).await?;
        if !whole {
            return Ok(());
        }
    }
}

async fn answer(
    to: &mut (impl tokio::io::AsyncWrite + Unpin),
    what: Answer,
) -> std::io::Result<()> {
    let mut text = serde_json::to_vec(&what).map_err(std::io::Error::other)?;
    text.push(b'\n');
    tokio::time::timeout(PATIENCE, to.write_all(&text)).await?
}

/// Does what a line asks for.
async fn done(line: &[u8], keyring: &Keyring, layers: &Layers) -> Result<Answer> {
    // What a parser has to say may quote what it read.
    let request = serde_json::from_slice(line).map_err(|e| {
        Fault::invalid(format!("not a valid request, at column {}", e.column()))
            .hint("see the documentation of the control socket for its form")
    })?;
    match request {
        Request::Credentials(given) => keep(given, keyring).map(|()| Answer::Done { ok: true }),
        Request::Pieces(asked) => {
            pieces(asked, layers).await.map(|pieces| Answer::Known { pieces })
        }
    }
}

/// What is known of the contents of files.
async fn pieces(asked: Asked, layers: &Layers) -> Result<Pieces> {
    let Asked { layer, length, inodes } = asked;
    if inodes.len() > MAX_INODES {
        return Err(Fault::invalid(format!("a request has {MAX_INODES} inodes at the most")));
    }
    let layers = layers.get().cloned().ok_or_else(|| Fault::unavailable("there are no layers"))?;
    let look = move || layers.pieces(&layer, &inodes, length, MAX_PIECES);
    shipway_task::blocking("look for digests of files", look).await
}

/// Keeps credentials.
fn keep(given: Given, keyring: &Keyring) -> Result<()> {
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
        client_of(keyring, Layers::default()).await
    }

    async fn client_of(keyring: &Arc<Keyring>, layers: Layers) -> BufReader<UnixStream> {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let connections = tokio_stream::iter([theirs]).chain(tokio_stream::pending());
        shipway_task::spawn("serve", serve(connections, keyring.clone(), layers));
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

    /// One layer, whose inode `n` has `n` pieces.
    struct OneLayer;

    impl LayerPieces for OneLayer {
        fn pieces(&self, layer: &Path, inodes: &[u64], length: u64, most: usize) -> Result<Pieces> {
            if layer != Path::new("/l/7") {
                return Err(Fault::not_found(format!("{} is not a layer", layer.display())));
            }
            assert_eq!((length, most), (4096, MAX_PIECES));
            let pieces =
                |n: &u64| (*n > 0).then(|| (0..*n).map(|n| Digest::of(n.to_string())).collect());
            Ok(inodes.iter().map(pieces).collect())
        }
    }

    #[tokio::test]
    async fn digests_of_files_are_told_where_they_are_known() {
        let layers = Layers::default();
        let mut client = client_of(&Arc::default(), layers.clone()).await;
        let ask_for = |layer: &str, inodes: &[u64]| {
            serde_json::json!({"pieces": {"layer": layer, "length": 4096, "inodes": inodes}})
                .to_string()
        };
        let told = ask(&mut client, &ask_for("/l/7", &[1])).await;
        assert!(told.contains("Unavailable"), "{told}");
        assert!(layers.set(Arc::new(OneLayer)).is_ok());
        let told = ask(&mut client, &ask_for("/l/7", &[2, 0, 1])).await;
        let (zero, one) = (Digest::of("0"), Digest::of("1"));
        assert_eq!(told, format!(r#"{{"pieces":[["{zero}","{one}"],null,["{zero}"]]}}"#));
        let told = ask(&mut client, &ask_for("/l/8", &[1])).await;
        assert!(told.contains("NotFound"), "{told}");
        let told = ask(&mut client, &ask_for("/l/7", &[0; MAX_INODES])).await;
        assert!(told.starts_with(r#"{"pieces":[null,null"#), "{told}");
        let told = ask(&mut client, &ask_for("/l/7", &[0; MAX_INODES + 1])).await;
        assert!(told.contains("1024 inodes at the most"), "{told}");
        let told = ask(&mut client, r#"{"pieces":{"layer":"/l/7","length":4096}}"#).await;
        assert!(told.contains("not a valid request"), "{told}");
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
        shipway_task::spawn("serve", serve(connections, Arc::clone(&keyring), Layers::default()));
        let mut told = String::new();
        let mut client = BufReader::new(UnixStream::from_std(nobody).unwrap());
        client.read_line(&mut told).await.unwrap();
        assert!(told.contains("PermissionDenied"), "{told}");
        assert_eq!(keyring.known(), []);
    }
}
