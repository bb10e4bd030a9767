//! Base images made on the spot: busybox, or any directory, pushed to a registry on loopback as OCI
//! images.

use crate::{http, process::run};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use std::{
    collections::BTreeMap,
    os::unix::fs::symlink,
    path::Path,
    process::{Command, Stdio},
};

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
const ZSTD_LAYER: &str = "application/vnd.oci.image.layer.v1.tar+zstd";

fn digest(bytes: &[u8]) -> String {
    format!("sha256:{}", hex::encode(Sha256::digest(bytes)))
}

/// This machine's architecture in OCI's words.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// A gzipped layer.
#[derive(Clone)]
pub struct Layer {
    /// Compressed bytes.
    pub blob: Vec<u8>,
    /// Digest of the tar.
    pub diff_id: String,
    /// Annotations of its descriptor.
    pub annotations: BTreeMap<String, String>,
}

impl Layer {
    /// The layer of everything below `dir`, the same bytes for the same files.
    pub fn of_dir(dir: &Path) -> Self {
        let tar = Command::new("tar")
            .args([
                "--sort=name",
                "--mtime=@1700000000",
                "--owner=0",
                "--group=0",
                "--numeric-owner",
                "-cf",
                "-",
                "-C",
            ])
            .arg(dir)
            .arg(".")
            .stdin(Stdio::null())
            .output()
            .unwrap();
        assert!(
            tar.status.success(),
            "tar {}: {}",
            dir.display(),
            String::from_utf8_lossy(&tar.stderr)
        );
        Self::of_tar(&tar.stdout)
    }

    /// The layer with this tar.
    pub fn of_tar(tar: &[u8]) -> Self {
        use std::io::Write as _;
        let mut gzip = Command::new("gzip")
            .args(["-n", "-1", "-c"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdin = gzip.stdin.take().unwrap();
        let blob = std::thread::scope(|scope| {
            scope.spawn(move || stdin.write_all(tar).unwrap());
            gzip.wait_with_output().unwrap().stdout
        });
        Self { blob, diff_id: digest(tar), annotations: BTreeMap::new() }
    }
}

/// An image to push.
pub struct BaseImage {
    /// Layers, lowest first.
    pub layers: Vec<Layer>,
    /// The `config` object of the image's config.
    pub config: Value,
}

impl BaseImage {
    /// busybox with its applets, `/etc/passwd` and the usual directories.
    pub fn busybox() -> Self {
        let root = tempfile::tempdir().unwrap();
        let at = |path: &str| root.path().join(path);
        for dir in [
            "bin", "etc", "root", "tmp", "usr/bin", "usr/sbin", "sbin", "var/run", "home", "proc",
            "sys", "dev",
        ] {
            std::fs::create_dir_all(at(dir)).unwrap();
        }
        let busybox =
            ["/bin/busybox", "/usr/bin/busybox"].iter().map(Path::new).find(|p| p.exists());
        std::fs::copy(busybox.expect("busybox-static is not installed"), at("bin/busybox"))
            .unwrap();
        for applet in
            run(Command::new("/bin/busybox").arg("--list")).ok().lines().filter(|a| *a != "busybox")
        {
            symlink("/bin/busybox", at("bin").join(applet)).unwrap();
        }
        std::fs::write(
            at("etc/passwd"),
            "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/home:/bin/false\n",
        )
        .unwrap();
        std::fs::write(at("etc/group"), "root:x:0:\nnogroup:x:65534:\n").unwrap();
        use std::os::unix::fs::PermissionsExt as _;
        std::fs::set_permissions(at("tmp"), std::fs::Permissions::from_mode(0o1777)).unwrap();
        Self {
            layers: vec![Layer::of_dir(root.path())],
            config: json!({"Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"], "Cmd": ["sh"]}),
        }
    }

    /// A layer with programs of this machine and the libraries that they need.
    pub fn add_programs(&mut self, names: &[&str]) {
        let root = tempfile::tempdir().unwrap();
        for name in names {
            let program = crate::which(name).unwrap_or_else(|| panic!("{name} is not installed"));
            let needed = run(Command::new("ldd").arg(&program)).ok().stdout;
            let libraries = needed
                .split_whitespace()
                .filter(|w| w.starts_with('/'))
                .map(std::path::PathBuf::from);
            for file in libraries.chain([program]) {
                let to = root.path().join(file.strip_prefix("/").unwrap());
                std::fs::create_dir_all(to.parent().unwrap()).unwrap();
                std::fs::copy(&file, to).unwrap();
            }
        }
        self.layers.push(Layer::of_dir(root.path()));
    }

    /// Pushes it to `registry` as `name:tag`, behind an index of one platform, and returns the
    /// index's digest.
    pub fn push(&self, registry: &str, name: &str, tag: &str) -> String {
        let config = json!({
            "architecture": architecture(),
            "os": "linux",
            "created": "2023-11-14T22:13:20Z",
            "config": self.config,
            "rootfs": {"type": "layers", "diff_ids": self.layers.iter().map(|l| l.diff_id.clone()).collect::<Vec<_>>()},
            "history": self.layers.iter().map(|_| json!({"created": "2023-11-14T22:13:20Z", "created_by": "base"})).collect::<Vec<_>>(),
        });
        let config = config.to_string().into_bytes();
        put_blob(registry, name, &config);
        let layers: Vec<_> = self
            .layers
            .iter()
            .map(|layer| {
                let digest = put_blob(registry, name, &layer.blob);
                let zstd = layer.blob.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]);
                let kind = if zstd { ZSTD_LAYER } else { LAYER };
                let mut descriptor = descriptor(kind, &digest, &layer.blob);
                if !layer.annotations.is_empty() {
                    descriptor["annotations"] = json!(layer.annotations);
                }
                descriptor
            })
            .collect();
        let manifest = json!({"schemaVersion": 2, "mediaType": MANIFEST, "config": descriptor(CONFIG, &digest(&config), &config), "layers": layers});
        let manifest = manifest.to_string().into_bytes();
        let manifest_digest = digest(&manifest);
        put_manifest(registry, name, &manifest_digest, MANIFEST, &manifest);
        let mut entry = descriptor(MANIFEST, &manifest_digest, &manifest);
        entry["platform"] = json!({"architecture": architecture(), "os": "linux"});
        let index = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": [entry]})
            .to_string()
            .into_bytes();
        put_manifest(registry, name, tag, INDEX, &index);
        digest(&index)
    }
}

fn descriptor(media_type: &str, digest: &str, bytes: &[u8]) -> Value {
    json!({"mediaType": media_type, "digest": digest, "size": bytes.len()})
}

/// Uploads a blob and returns its digest.
pub(crate) fn put_blob(registry: &str, name: &str, bytes: &[u8]) -> String {
    let digest = digest(bytes);
    let start =
        http::request("POST", registry, &format!("/v2/{name}/blobs/uploads/"), &[], &[]).unwrap();
    assert_eq!(start.status, 202, "start an upload to {registry}/{name}");
    let location = start.header("location").expect("an upload has a location").to_owned();
    let path = location.strip_prefix(&format!("http://{registry}")).unwrap_or(&location);
    let joint = if path.contains('?') { '&' } else { '?' };
    let headers = [("Content-Type", "application/octet-stream")];
    let done =
        http::request("PUT", registry, &format!("{path}{joint}digest={digest}"), &headers, bytes)
            .unwrap();
    assert_eq!(
        done.status,
        201,
        "upload {digest} to {registry}/{name}: {}",
        String::from_utf8_lossy(&done.body)
    );
    digest
}

pub(crate) fn put_manifest(
    registry: &str,
    name: &str,
    reference: &str,
    media_type: &str,
    bytes: &[u8],
) {
    let path = format!("/v2/{name}/manifests/{reference}");
    let done =
        http::request("PUT", registry, &path, &[("Content-Type", media_type)], bytes).unwrap();
    assert_eq!(
        done.status,
        201,
        "push {registry}/{name}:{reference}: {}",
        String::from_utf8_lossy(&done.body)
    );
}

/// A GET of the registry's API: status and body.
pub(crate) fn get(registry: &str, path: &str) -> (u16, Vec<u8>) {
    let accept = format!(
        "{INDEX}, {MANIFEST}, application/vnd.docker.distribution.manifest.v2+json, application/vnd.docker.distribution.manifest.list.v2+json"
    );
    match http::request("GET", registry, path, &[("Accept", &accept)], &[]) {
        Ok(answer) => (answer.status, answer.body),
        Err(_) => (0, Vec::new()),
    }
}
