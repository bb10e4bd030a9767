//! A remote snapshotter as builds see it: what a Prepare has to say for it to find a layer, the
//! credentials that it needs for that, and what it knows of files that it has not fetched. Labels
//! are kept and shown, so credentials go another way: to `shipway-snapshotter` over its control
//! socket, where they stay in memory.

use serde::Deserialize;
use shipway_fault::{Fault, Result};
use shipway_oci::{Descriptor, Digest, ImageName};
use shipway_refs::{FilePieces, LayerContents};
use shipway_registry::Credentials;
use shipway_storage::Labels;
use std::{
    io::{self, BufRead as _, ErrorKind, Read as _, Write as _},
    os::unix::net,
    path::{Path, PathBuf},
    time::Duration,
};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::UnixStream,
};

/// Most bytes of a label that containerd takes, key and value together.
const MAX_LABEL: usize = 4096;
/// How long credentials are good for the snapshotter, in seconds: as long as a build may take, and
/// the most that it accepts.
const GOOD_FOR: u64 = 86_400;
/// How long an answer is waited for.
const PATIENCE: Duration = Duration::from_secs(5);
/// Largest answer that is read, in bytes.
const MAX_ANSWER: u64 = 64 << 10;
/// Largest one with digests of files: there are 8192 of them at the most, of 75 bytes.
const MAX_PIECES: u64 = 1 << 20;

/// What containerd passes on to snapshotters begins with this.
const PASSED_ON: &str = "containerd.io/snapshot/";
/// Labels for snapshotters as CRI, nerdctl and containerd's transfer service set them (containerd,
/// `pkg/snapshotters/annotations.go`): image, manifest, layer, this and the layers above.
const CRI: [&str; 4] = [
    "containerd.io/snapshot/cri.image-ref",
    "containerd.io/snapshot/cri.manifest-digest",
    "containerd.io/snapshot/cri.layer-digest",
    "containerd.io/snapshot/cri.image-layers",
];
/// The same as ctr-remote sets them (stargz-snapshotter, `fs/source`): image, layer, layers.
const STARGZ: [&str; 3] = [
    "containerd.io/snapshot/remote/stargz.reference",
    "containerd.io/snapshot/remote/stargz.digest",
    "containerd.io/snapshot/remote/stargz.layers",
];

/// An image at its registry.
#[derive(Clone, Debug)]
pub(crate) struct RemoteImage {
    /// Its name, with the digest of its manifest.
    pub name: ImageName,
    /// Its layers, lowest first; empty if they are not known.
    pub layers: Vec<Digest>,
}

impl RemoteImage {
    /// The labels of a Prepare by which a remote snapshotter finds `layer`.
    pub fn labels(&self, layer: &Descriptor) -> Labels {
        let (name, digest) = (self.name.to_string(), layer.digest.to_string());
        let manifest = self.name.digest().map(|d| d.to_string()).unwrap_or_default();
        let longest = CRI[3].len().max(STARGZ[2].len());
        let mut layers = digest.clone();
        let above = self.layers.iter().skip_while(|d| **d != layer.digest).skip(1);
        for next in above.map(|d| format!(",{d}")) {
            if longest + layers.len() + next.len() > MAX_LABEL {
                break;
            }
            layers += &next;
        }
        let cri = CRI.into_iter().zip([&name, &manifest, &digest, &layers]);
        let stargz = STARGZ.into_iter().zip([&name, &digest, &layers]);
        let fits =
            |key: &str, value: &str| !value.is_empty() && key.len() + value.len() <= MAX_LABEL;
        let own = layer.annotations.iter().filter(|(key, _)| key.starts_with(PASSED_ON));
        own.map(|(key, value)| (key.as_str(), value))
            .chain(cri)
            .chain(stargz)
            .filter(|(key, value)| fits(key, value))
            .map(|(key, value)| (key.to_owned(), value.clone()))
            .collect()
    }
}

/// The control socket of `shipway-snapshotter`.
#[derive(Clone, Debug)]
pub(crate) struct SnapshotterControl(pub PathBuf);

/// An answer of the snapshotter.
#[derive(Deserialize)]
struct Answer {
    error: Option<String>,
    pieces: Option<FilePieces>,
}

impl LayerContents for SnapshotterControl {
    fn pieces(&self, layer: &Path, inodes: &[u64], length: u64) -> Result<FilePieces> {
        let request = serde_json::json!({"pieces": {
            "layer": layer,
            "length": length,
            "inodes": inodes,
        }});
        let ask = || {
            let mut stream = net::UnixStream::connect(&self.0)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            stream.set_write_timeout(Some(PATIENCE))?;
            stream.write_all(format!("{request}\n").as_bytes())?;
            let mut line = String::new();
            io::BufReader::new(stream.take(MAX_PIECES)).read_line(&mut line)?;
            Ok(serde_json::from_str::<Answer>(&line)?)
        };
        let failed = |e| Fault::io(format!("ask the snapshotter at {}", self.0.display()), e);
        let answer = ask().map_err(failed)?;
        match (answer.pieces, answer.error) {
            (Some(pieces), None) if pieces.len() == inodes.len() => Ok(pieces),
            (_, Some(error)) => {
                Err(Fault::unavailable(format!("the snapshotter refused: {error}")))
            }
            _ => Err(Fault::unavailable("the snapshotter answered something else")),
        }
    }
}

impl SnapshotterControl {
    /// Gives it credentials for the repository of `image`. Other snapshotters have no such socket:
    /// `false`.
    pub async fn give(&self, image: &ImageName, credentials: &Credentials) -> Result<bool> {
        let request = serde_json::json!({"credentials": {
            "repository": image.locator(),
            "username": credentials.username,
            "secret": credentials.secret,
            "seconds": GOOD_FOR,
        }});
        let failed = |e| Fault::io(format!("talk to the snapshotter at {}", self.0.display()), e);
        let asked = tokio::time::timeout(PATIENCE, self.ask(format!("{request}\n")));
        let line = match asked.await.unwrap_or_else(|_| Err(ErrorKind::TimedOut.into())) {
            Ok(line) => line,
            Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) => {
                return Ok(false);
            }
            Err(e) => return Err(failed(e)),
        };
        let answer: Answer = serde_json::from_str(&line).map_err(|e| failed(e.into()))?;
        match answer.error {
            None => Ok(true),
            Some(error) => Err(Fault::unavailable(format!("the snapshotter refused: {error}"))),
        }
    }

    async fn ask(&self, request: String) -> io::Result<String> {
        let mut stream = UnixStream::connect(&self.0).await?;
        stream.write_all(request.as_bytes()).await?;
        let mut line = String::new();
        BufReader::new(stream.take(MAX_ANSWER)).read_line(&mut line).await?;
        Ok(line)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use shipway_oci::media;

    fn digest(n: usize) -> Digest {
        Digest::of(n.to_string())
    }

    #[test]
    fn labels_say_where_a_layer_is_and_fit() {
        let manifest = digest(1000);
        let name: ImageName = "r.example/a/b:1".parse().unwrap();
        let image = RemoteImage {
            name: name.with_digest(manifest),
            layers: (0..100).map(digest).collect(),
        };
        let mut layer = Descriptor::new(media::OCI_LAYER_GZIP, digest(2), 7);
        let toc = "containerd.io/snapshot/stargz/toc.digest";
        layer.annotations.insert(toc.into(), "sha256:toc".into());
        layer.annotations.insert("other".into(), "x".into());
        layer.annotations.insert(format!("{PASSED_ON}long"), "x".repeat(MAX_LABEL));
        let labels = image.labels(&layer);
        assert_eq!(labels.len(), 8);
        assert_eq!(labels[toc], "sha256:toc");
        assert_eq!(labels[CRI[0]], format!("r.example/a/b:1@{manifest}"));
        assert_eq!(labels[CRI[1]], manifest.to_string());
        assert_eq!(
            (&labels[CRI[2]], &labels[STARGZ[1]]),
            (&digest(2).to_string(), &labels[CRI[2]])
        );
        assert!(labels[CRI[3]].starts_with(&format!("{},{},", digest(2), digest(3))));
        assert!(labels.iter().all(|(k, v)| k.len() + v.len() <= MAX_LABEL));
        let unknown = RemoteImage { layers: Vec::new(), ..image };
        assert_eq!(unknown.labels(&layer)[CRI[3]], digest(2).to_string());
    }

    #[test]
    fn digests_are_taken_as_they_are_told_and_everything_else_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let control = SnapshotterControl(dir.path().join("control.sock"));
        let ask = || control.pieces(Path::new("/l/7"), &[36, 42], 4096);
        assert!(ask().is_err(), "nobody listens");
        let listener = net::UnixListener::bind(&control.0).unwrap();
        let answered = |answer: &str| {
            std::thread::scope(|scope| {
                let asked = scope.spawn(ask);
                let (mut stream, _) = listener.accept().unwrap();
                let mut line = String::new();
                io::BufReader::new(&stream).read_line(&mut line).unwrap();
                // Who has heard enough closes.
                let _ = stream.write_all(answer.as_bytes());
                drop(stream);
                let sent: serde_json::Value = serde_json::from_str(&line).unwrap();
                let want = serde_json::json!({"layer": "/l/7", "length": 4096, "inodes": [36, 42]});
                assert_eq!(sent["pieces"], want);
                asked.join().unwrap()
            })
        };
        let known = answered(&format!("{{\"pieces\":[[\"{}\"],null]}}\n", digest(1)));
        assert_eq!(known.unwrap(), [Some(vec![digest(1)]), None]);
        let endless = "x".repeat(MAX_PIECES as usize + 1);
        for bad in [
            "{\"pieces\":[null]}\n",
            "{\"pieces\":[[\"sha256:7\"],null]}\n",
            "{\"error\":\"not the directory of a layer\",\"code\":\"NotFound\"}\n",
            "{\"ok\":true}\n",
            "",
            &endless,
        ] {
            assert!(answered(bad).is_err(), "{}", &bad[..bad.len().min(100)]);
        }
    }

    #[tokio::test]
    async fn credentials_are_one_line_and_so_is_the_answer() {
        let dir = tempfile::tempdir().unwrap();
        let control = SnapshotterControl(dir.path().join("control.sock"));
        let image: ImageName = "r.example/a/b:1".parse().unwrap();
        let credentials = Credentials { username: "me".into(), secret: "s\n\"".into() };
        assert!(!control.give(&image, &credentials).await.unwrap(), "nobody listens");
        let listener = tokio::net::UnixListener::bind(&control.0).unwrap();
        let serve = async |answer: &str| {
            let (stream, _) = listener.accept().await.unwrap();
            let mut stream = BufReader::new(stream);
            let mut line = String::new();
            stream.read_line(&mut line).await.unwrap();
            stream.get_mut().write_all(answer.as_bytes()).await.unwrap();
            serde_json::from_str::<serde_json::Value>(&line).unwrap()
        };
        let (given, line) =
            tokio::join!(control.give(&image, &credentials), serve("{\"ok\":true}\n"));
        assert!(given.unwrap());
        let sent = &line["credentials"];
        assert_eq!(sent["repository"], "r.example/a/b");
        assert_eq!(sent["username"], "me");
        assert_eq!(sent["secret"], "s\n\"");
        let refusal = "{\"error\":\"no such repository\",\"code\":\"InvalidArgument\"}\n";
        let (refused, _) = tokio::join!(control.give(&image, &credentials), serve(refusal));
        let refused = refused.unwrap_err().to_string();
        assert!(refused.contains("no such repository") && !refused.contains("me"), "{refused}");
        // Longer than any answer is.
        let endless = "x".repeat(MAX_ANSWER as usize + 1);
        let (refused, _) = tokio::join!(control.give(&image, &credentials), serve(&endless));
        assert!(refused.is_err());
    }
}
