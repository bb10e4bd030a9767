//! Certificates that a process is made to trust beside its image's (rows `exec.proxynet`,
//! `exec.ca`), without a trace of them in what it leaves.
//!
//! Programs read them in one file among the image's own, so that is where they are added: a mount
//! in its place would keep the process from replacing the file, as updates of it do.
//! [`Trust::restore`] takes out what [`Trust::add`] put in, and where the process left the file
//! alone, the layer has no copy of it.

use crate::{
    Access, RootView,
    noted::{Noted, marks, timestamps},
    stubs::{open_plain, parent_of, writable},
};
use rustix::{
    fs::{AtFlags, FileType, Mode, OFlags},
    io::Errno,
};
use serde::{Deserialize, Serialize};
use shipway_fault::{Fault, Result};
use shipway_storage::{Mount, overlay::Marks};
use std::{
    fs::File,
    io::{Read as _, Seek as _, Write as _},
    path::PathBuf,
};

/// Where systems have their certificates; the first that exists is used.
const BUNDLES: [&str; 6] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/pki/tls/cacert.pem",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "/etc/ssl/cert.pem",
];
/// Variables by which programs that do not read the system's certificates find a file of them.
const VARIABLES: [&str; 3] = ["SSL_CERT_FILE", "NODE_EXTRA_CA_CERTS", "REQUESTS_CA_BUNDLE"];
/// Largest file of certificates that is added to.
pub const MAX_BUNDLE: u64 = 10 << 20;
/// The marks are BuildKit's, which users look for.
const BEGIN: &[u8] = b"\n# buildkit proxy CA begin\n";
const END: &[u8] = b"# buildkit proxy CA end\n";

/// What was added to one root filesystem. It can be stored, for a process that outlives who started
/// it.
#[derive(Debug, Serialize, Deserialize)]
pub struct Trust {
    upper: PathBuf,
    /// The marks of the overlay whose upper directory that is, if it is.
    #[serde(with = "marks")]
    marks: Option<Marks>,
    /// Where it was added, without links.
    path: String,
    block: Vec<u8>,
    before: Noted,
    /// Whether the writable directory had the file before.
    in_upper: bool,
    /// The directories above it that the writable directory did not have, deepest first.
    copied: Vec<(String, Noted)>,
}

impl Trust {
    /// Adds `certificates` (PEM) to those of the root filesystem that `mounts` describe. `None` if
    /// it has none that could be added to. Blocks.
    pub fn add(mounts: &[Mount], certificates: &[u8]) -> Result<Option<Self>> {
        let fail =
            |e: std::io::Error| Fault::io("add certificates to those of the root filesystem", e);
        let Some((upper, marks)) = writable(mounts) else { return Ok(None) };
        let looked = RootView::open(mounts, Access::Read)?;
        let is_file = |path: &str| {
            looked
                .lstat(path)
                .is_ok_and(|s| FileType::from_raw_mode(s.st_mode) == FileType::RegularFile)
        };
        let Some(path) = BUNDLES.iter().filter_map(|b| looked.real_path(b)).find(|p| is_file(p))
        else {
            return Ok(None);
        };
        let upper_view = RootView::of_directory(&upper)?;
        let mut copied = Vec::new();
        let mut above = parent_of(&path);
        while marks.is_some() && above != "/" && upper_view.lstat(above).is_err() {
            let noted = Noted::of(&looked.lstat(above).map_err(|e| fail(e.into()))?);
            copied.push((above.to_owned(), noted));
            above = parent_of(above);
        }
        let in_upper = marks.is_none() || upper_view.lstat(&path).is_ok();
        drop(looked);
        let root = RootView::open(mounts, Access::Write)?;
        let fd = root
            .open_at(&path, OFlags::RDWR | OFlags::NOFOLLOW | OFlags::NONBLOCK, Mode::empty())
            .map_err(|e| fail(e.into()))?;
        let before = rustix::fs::fstat(&fd).map_err(|e| fail(e.into()))?;
        let mut file = File::from(fd);
        if u64::try_from(before.st_size).unwrap_or(u64::MAX) > MAX_BUNDLE {
            return Err(Fault::invalid(format!(
                "{path} of the root filesystem exceeds {MAX_BUNDLE} bytes"
            )));
        }
        let mut bytes = Vec::new();
        (&mut file).take(MAX_BUNDLE).read_to_end(&mut bytes).map_err(fail)?;
        let mut block = Vec::new();
        if bytes.last().is_some_and(|b| *b != b'\n') {
            block.push(b'\n');
        }
        block.extend_from_slice(BEGIN);
        block.extend_from_slice(certificates);
        if !certificates.ends_with(b"\n") {
            block.push(b'\n');
        }
        block.extend_from_slice(END);
        if let Err(e) = file.write_all(&block) {
            let _ = file.set_len(bytes.len() as u64);
            return Err(fail(e));
        }
        rustix::fs::futimens(&file, &timestamps(&before)).map_err(|e| fail(e.into()))?;
        let before = Noted::of(&before);
        Ok(Some(Self { upper, marks, path, block, before, in_upper, copied }))
    }

    /// Variables that name the file, for a process with `env` that does not set them itself.
    pub fn environment(&self, env: &[String]) -> Vec<String> {
        let is_set =
            |name: &str| env.iter().any(|e| e.split_once('=').is_some_and(|(n, _)| n == name));
        VARIABLES
            .iter()
            .filter(|name| !is_set(name))
            .map(|name| format!("{name}={}", self.path))
            .collect()
    }

    /// Takes out what was added. Blocks.
    pub fn restore(self) -> Result<()> {
        let fail = |e: std::io::Error| Fault::io("take certificates out of a step's files", e);
        let upper = RootView::of_directory(&self.upper)?;
        let fd = match open_plain(
            &upper,
            &self.path,
            OFlags::RDWR | OFlags::NONBLOCK | OFlags::NOFOLLOW,
        ) {
            Ok(fd) => fd,
            // Removed, or something else is in its place.
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::ISDIR | Errno::NXIO) => {
                return Ok(());
            }
            Err(e) => return Err(fail(e.into())),
        };
        let now = rustix::fs::fstat(&fd).map_err(|e| fail(e.into()))?;
        if FileType::from_raw_mode(now.st_mode) != FileType::RegularFile {
            return Ok(());
        }
        let mut file = File::from(fd);
        let mut bytes = Vec::new();
        (&mut file).take(2 * MAX_BUNDLE).read_to_end(&mut bytes).map_err(fail)?;
        let Some(at) = bytes.windows(self.block.len()).position(|w| w == self.block) else {
            return Ok(());
        };
        let untouched =
            self.before.is_same(&now) && now.st_size == self.before.size + self.block.len() as i64;
        if untouched && !self.in_upper {
            return self.remove(&upper).map_err(|e| fail(e.into()));
        }
        // What follows the block moves up, in place: the file may have other names.
        let rest = at + self.block.len();
        let mut tail = bytes.split_off(rest);
        file.read_to_end(&mut tail).map_err(fail)?;
        file.seek(std::io::SeekFrom::Start(at as u64)).map_err(fail)?;
        file.write_all(&tail).map_err(fail)?;
        file.set_len((at + tail.len()) as u64).map_err(fail)?;
        rustix::fs::futimens(&file, &timestamps(&now)).map_err(|e| fail(e.into()))
    }

    /// Removes the copy that adding made, and the directories that are there only for it.
    fn remove(&self, upper: &RootView) -> rustix::io::Result<()> {
        let remove = |path: &str, flags: AtFlags| {
            let dir = open_plain(upper, parent_of(path), OFlags::RDONLY | OFlags::DIRECTORY)?;
            let times = rustix::fs::fstat(&dir)?;
            rustix::fs::unlinkat(&dir, path.rsplit('/').next().unwrap_or_default(), flags)?;
            rustix::fs::futimens(&dir, &timestamps(&times))
        };
        remove(&self.path, AtFlags::empty())?;
        for (path, before) in &self.copied {
            let Ok(dir) = open_plain(upper, path, OFlags::RDONLY | OFlags::DIRECTORY) else {
                break;
            };
            if self.marks.is_some_and(|marks| marks.has_opaque(&dir))
                || !rustix::fs::fstat(&dir).is_ok_and(|now| before.is_same(&now))
                || remove(path, AtFlags::REMOVEDIR).is_err()
            {
                break;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use shipway_storage::{Overlay, Upper};
    use std::{
        fs,
        path::Path,
        time::{Duration, SystemTime},
    };

    const CERTIFICATE: &[u8] = b"-----BEGIN CERTIFICATE-----\nMII=\n-----END CERTIFICATE-----\n";

    /// An overlay whose image has certificates, linked to as Alpine does it; `bundle` is where they
    /// are in its layer and in the writable one.
    fn lab() -> (tempfile::TempDir, Vec<Mount>, PathBuf) {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = |n: &str| dir.path().join(n);
        fs::create_dir_all(path("low/usr/share/certs")).expect("mkdir");
        fs::create_dir_all(path("low/etc/ssl")).expect("mkdir");
        for name in ["up", "work"] {
            fs::create_dir(path(name)).expect("mkdir");
        }
        fs::write(path("low/usr/share/certs/ca.crt"), "original").expect("write");
        std::os::unix::fs::symlink("/usr/share/certs/ca.crt", path("low/etc/ssl/cert.pem"))
            .expect("symlink");
        let old =
            fs::FileTimes::new().set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(1000));
        for name in
            ["low/usr/share/certs/ca.crt", "low/usr/share/certs", "low/usr/share", "low/usr"]
        {
            fs::File::open(path(name)).expect("open").set_times(old).expect("set times");
        }
        let mounts = vec![Mount::Overlay(Overlay {
            upper: Some(Upper { dir: path("up"), work: path("work") }),
            lower: vec![path("low")],
            ..Overlay::default()
        })];
        (dir, mounts, "usr/share/certs/ca.crt".into())
    }

    fn entries(dir: &Path) -> usize {
        fs::read_dir(dir).expect("read a directory").count()
    }

    #[test]
    fn a_step_that_leaves_the_file_alone_leaves_no_copy_of_it() {
        assert!(rustix::process::geteuid().is_root(), "overlays need root");
        let (dir, mounts, bundle) = lab();
        let trust = Trust::add(&mounts, CERTIFICATE).expect("add").expect("there is a bundle");
        assert_eq!(trust.environment(&["SSL_CERT_FILE=/mine".into()]).len(), VARIABLES.len() - 1);
        let view = RootView::open(&mounts, Access::Read).expect("look");
        let shown =
            view.read_file("/etc/ssl/cert.pem", 1 << 20).expect("read").expect("it is there");
        let shown = String::from_utf8(shown).expect("text");
        assert!(
            shown.starts_with("original\n\n# buildkit proxy CA begin\n-----BEGIN CERTIFICATE-----"),
            "{shown}"
        );
        assert!(dir.path().join("up").join(&bundle).exists());
        // As one does who did not add it.
        let stored = serde_json::to_string(&trust).expect("data");
        serde_json::from_str::<Trust>(&stored).expect("trust").restore().expect("restore");
        assert_eq!(entries(&dir.path().join("up")), 0);
    }

    #[test]
    fn what_a_step_changes_stays_without_what_was_added() {
        assert!(rustix::process::geteuid().is_root(), "overlays need root");
        let (dir, mounts, bundle) = lab();
        let bundle = dir.path().join("up").join(bundle);
        let trust = Trust::add(&mounts, CERTIFICATE).expect("add").expect("there is a bundle");
        let appended = |text: &str| {
            fs::OpenOptions::new()
                .append(true)
                .open(&bundle)
                .expect("open")
                .write_all(text.as_bytes())
                .expect("append");
        };
        appended("the step's");
        let when = SystemTime::UNIX_EPOCH + Duration::from_secs(5000);
        fs::File::open(&bundle).expect("open").set_modified(when).expect("set time");
        trust.restore().expect("restore");
        assert_eq!(fs::read_to_string(&bundle).expect("read"), "originalthe step's");
        assert_eq!(fs::metadata(&bundle).expect("stat").modified().expect("a time"), when);
        // Another step above it, in the same writable directory.
        let trust = Trust::add(&mounts, CERTIFICATE).expect("add").expect("there is a bundle");
        trust.restore().expect("restore");
        assert_eq!(fs::read_to_string(&bundle).expect("read"), "originalthe step's");
        // Replaced and removed.
        let trust = Trust::add(&mounts, CERTIFICATE).expect("add").expect("there is a bundle");
        fs::remove_file(&bundle).expect("remove");
        std::os::unix::fs::symlink("/etc/passwd", &bundle).expect("symlink");
        trust.restore().expect("restore");
        assert!(fs::symlink_metadata(&bundle).expect("stat").is_symlink());
    }

    #[test]
    fn a_root_without_certificates_is_left_alone_and_a_huge_file_is_refused() {
        assert!(rustix::process::geteuid().is_root(), "overlays need root");
        let (dir, mounts, bundle) = lab();
        fs::File::options()
            .write(true)
            .open(dir.path().join("low").join(&bundle))
            .expect("open")
            .set_len(MAX_BUNDLE + 1)
            .expect("grow");
        assert!(
            Trust::add(&mounts, CERTIFICATE)
                .expect_err("too large")
                .to_string()
                .contains("exceeds")
        );
        let (dir, mounts, bundle) = lab();
        fs::remove_file(dir.path().join("low").join(bundle)).expect("remove");
        assert!(Trust::add(&mounts, CERTIFICATE).expect("add").is_none());
        assert_eq!(entries(&dir.path().join("up")), 0);
    }
}
