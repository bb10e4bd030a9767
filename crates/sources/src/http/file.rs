//! The file that a download becomes: its name, its bytes, its owner and time.

use super::attrs::{HttpSpec, Shape};
use bytes::Bytes;
use flate2::write::MultiGzDecoder;
use http::{HeaderMap, header};
use shipway_fault::{Fault, Result};
use shipway_oci::{Digest, Hasher};
use std::{
    fs::File,
    io::Write,
    os::unix::fs::{OpenOptionsExt, PermissionsExt, chown},
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

/// A name for what has none.
const DEFAULT: &str = "download";
/// Longest name that filesystems take.
const MAX_NAME: usize = 255;

/// The name of the file: as asked for, or as the server says, or as the address ends (row
/// `src.http`).
pub(super) fn name_of(spec: &HttpSpec, headers: Option<&HeaderMap>) -> String {
    if !spec.shape.filename.is_empty() {
        return safe(&spec.shape.filename);
    }
    let said =
        headers.and_then(|h| disposition(h.get(header::CONTENT_DISPOSITION)?.to_str().ok()?));
    if let Some(name) = said {
        return safe(&name);
    }
    let last = spec.uri.path().rsplit('/').next().unwrap_or_default();
    let decoded = percent_encoding::percent_decode_str(last).decode_utf8().unwrap_or_default();
    safe(&decoded)
}

/// The last element of a path if it can name a file here, and a default otherwise.
pub(crate) fn safe(text: &str) -> String {
    let name = text.trim().trim_end_matches('/').rsplit('/').next().unwrap_or_default();
    let bad = name.is_empty()
        || name == "."
        || name == ".."
        || name.len() > MAX_NAME
        || name.chars().any(char::is_control);
    if bad { DEFAULT.to_owned() } else { name.to_owned() }
}

/// `filename` of a `Content-Disposition`.
fn disposition(value: &str) -> Option<String> {
    value.split(';').skip(1).find_map(|p| {
        let (key, v) = p.split_once('=')?;
        let v = v.trim().trim_matches('"');
        (key.trim().eq_ignore_ascii_case("filename") && !v.is_empty() && !v.ends_with('/'))
            .then(|| v.to_owned())
    })
}

/// The file that a state is.
pub(super) fn open(root: &Path, name: &str) -> Result<File> {
    let path = root.join(safe(name));
    let no_follow = rustix::fs::OFlags::NOFOLLOW.bits() as i32;
    std::fs::OpenOptions::new()
        .read(true)
        .custom_flags(no_follow)
        .open(path)
        .map_err(|e| Fault::io(format!("open {name}"), e))
}

/// A file being written. Its steps run where blocking is allowed.
pub(crate) struct DownloadFile {
    path: PathBuf,
    sink: Option<Sink>,
}

/// Where an answer's bytes go.
enum Sink {
    Plain(Box<Hashed>),
    /// The answer is compressed for the way only (`Content-Encoding`).
    Gzip(Box<MultiGzDecoder<Hashed>>),
}

/// The file, and the digest of what was written so far.
struct Hashed {
    file: File,
    hasher: Hasher,
}

impl Write for Hashed {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let n = self.file.write(bytes)?;
        self.hasher.update(&bytes[..n]);
        Ok(n)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.file.flush()
    }
}

/// Creates the file in a fresh state; `gzip` if what will be written is compressed and the file
/// shall not be.
pub(crate) async fn create(dir: &Path, name: &str, gzip: bool) -> Result<DownloadFile> {
    let path = dir.join(name);
    blocking(move || {
        let open = File::options().write(true).create_new(true).mode(0o600).open(&path);
        let file = open.map_err(|e| Fault::io(format!("create {}", path.display()), e))?;
        let plain = Hashed { file, hasher: Hasher::new() };
        let sink = if gzip {
            Sink::Gzip(Box::new(MultiGzDecoder::new(plain)))
        } else {
            Sink::Plain(Box::new(plain))
        };
        Ok(DownloadFile { path, sink: Some(sink) })
    })
    .await
}

impl DownloadFile {
    pub(crate) async fn write(&mut self, piece: Bytes) -> Result<()> {
        let Some(mut sink) = self.sink.take() else {
            return Err(Fault::internal("write to a file that is closed"));
        };
        let path = self.path.clone();
        let write = move || {
            let written = match &mut sink {
                Sink::Plain(plain) => plain.write_all(&piece),
                Sink::Gzip(decoder) => decoder.write_all(&piece),
            };
            written.map_err(|e| Fault::io(format!("write {}", path.display()), e))?;
            Ok(sink)
        };
        self.sink = Some(blocking(write).await?);
        Ok(())
    }

    /// Sets what the user asked for; the time is the server's, or the epoch, so that equal files
    /// make equal layers. Gives the digest.
    pub(crate) async fn finish(
        self,
        shape: &Shape,
        modified: Option<SystemTime>,
    ) -> Result<Digest> {
        let (perm, uid, gid) =
            (if shape.perm == 0 { 0o600 } else { shape.perm & 0o7777 }, shape.uid, shape.gid);
        let Self { path, sink } = self;
        let Some(sink) = sink else { return Err(Fault::internal("finish a file that is closed")) };
        blocking(move || {
            let Hashed { file, hasher } = match sink {
                Sink::Plain(plain) => *plain,
                Sink::Gzip(decoder) => decoder
                    .finish()
                    .map_err(|e| Fault::io(format!("decompress {}", path.display()), e))?,
            };
            let failed =
                |e| Fault::io(format!("set the owner, mode and time of {}", path.display()), e);
            chown(&path, Some(uid), Some(gid)).map_err(failed)?;
            // After the owner, whose change clears the set-id bits.
            file.set_permissions(std::fs::Permissions::from_mode(perm)).map_err(failed)?;
            let time = modified.unwrap_or(UNIX_EPOCH);
            file.set_times(std::fs::FileTimes::new().set_accessed(time).set_modified(time))
                .map_err(failed)?;
            Ok(hasher.finish())
        })
        .await
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    shipway_task::blocking("write a file", work).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::SourceSpec;
    use shipway_oci::Platform;

    #[track_caller]
    fn check(url: &str, filename: &str, disposition: &str, want: &str) {
        let attrs = [("http.filename".to_owned(), filename.to_owned())].into();
        let spec = HttpSpec::parse(&SourceSpec {
            identifier: url.into(),
            attrs,
            platform: Platform::host(),
        })
        .unwrap();
        let mut headers = HeaderMap::new();
        headers.insert(header::CONTENT_DISPOSITION, disposition.parse().unwrap());
        assert_eq!(name_of(&spec, Some(&headers)), want);
    }

    #[test]
    fn names_come_from_the_user_the_server_or_the_address() {
        check("https://h/a/b.tar?x=/c", "", "", "b.tar");
        check("https://h/a%20b", "", "", "a b");
        check("https://h/a", "wanted", "attachment; filename=said", "wanted");
        check("https://h/a", "", "attachment; filename=\"said.txt\"", "said.txt");
        check("https://h/a", "", "attachment; filename=\"../../etc/passwd\"", "passwd");
        check("https://h/", "", "", "download");
        check("https://h/%2e%2e", "", "", "download");
        check("https://h/a%2fb", "", "", "b");
        check("https://h/a%0ab", "", "", "download");
    }
}
