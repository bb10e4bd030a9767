//! Where device files lie, and how they are read.

use crate::{Device, Devices, spec::Spec};
use rustix::{
    fs::{FileType, Mode, OFlags},
    io::Errno,
};
use std::{
    collections::{BTreeMap, BTreeSet, btree_map::Entry},
    io::Read,
    path::{Path, PathBuf},
    sync::Arc,
};

/// Directories for device files unless configured; a later one wins.
pub const DEFAULT_DIRS: [&str; 3] = ["/etc/cdi", "/var/run/cdi", "/etc/buildkit/cdi"];
/// Bytes of a file.
const MAX_FILE: u64 = 1024 * 1024;
/// Entries of a directory.
const MAX_FILES: usize = 1000;

/// The directories with device files, and which devices every build may use.
#[derive(Clone, Debug, Default)]
pub struct CdiCatalog {
    dirs: Vec<PathBuf>,
    auto_allowed: BTreeSet<String>,
}

/// A device, or the files that disagree about it.
enum Claim {
    One(Device),
    Several(PathBuf),
}

impl CdiCatalog {
    /// Devices out of `dirs`, of which a later one wins; every build may use those whose name or
    /// kind is in `auto_allowed`.
    pub fn new(
        dirs: impl IntoIterator<Item = PathBuf>,
        auto_allowed: impl IntoIterator<Item = String>,
    ) -> Self {
        Self { dirs: dirs.into_iter().collect(), auto_allowed: auto_allowed.into_iter().collect() }
    }

    /// The devices there are now. Blocks.
    pub fn read(&self) -> Devices {
        let mut all = Devices::default();
        for dir in &self.dirs {
            let mut claims = BTreeMap::new();
            for path in list(dir, &mut all.problems) {
                match read_file(&path).and_then(|text| Spec::parse(&text)) {
                    Ok(spec) => self.claim(&path, spec, &mut claims, &mut all.problems),
                    Err(why) => all.problems.push(format!("{}: {why}", path.display())),
                }
            }
            // A name that files of one directory disagree about means nothing, whatever an earlier
            // directory says.
            for (name, claim) in claims {
                match claim {
                    Claim::One(device) => drop(all.by_name.insert(name, device)),
                    Claim::Several(_) => drop(all.by_name.remove(&name)),
                }
            }
        }
        all
    }

    fn claim(
        &self,
        path: &Path,
        spec: Spec,
        claims: &mut BTreeMap<String, Claim>,
        problems: &mut Vec<String>,
    ) {
        let spec = Arc::new(spec);
        for index in 0..spec.devices.len() {
            let device = Device::new(path, spec.clone(), index, &self.auto_allowed);
            match claims.entry(device.name.clone()) {
                Entry::Vacant(free) => drop(free.insert(Claim::One(device))),
                Entry::Occupied(mut taken) => {
                    let other = match taken.get() {
                        Claim::One(other) => other.path.clone(),
                        Claim::Several(other) => other.clone(),
                    };
                    problems.push(format!(
                        "{}: device {:?} is in {} too",
                        path.display(),
                        device.name,
                        other.display()
                    ));
                    taken.insert(Claim::Several(other));
                }
            }
        }
    }
}

/// The device files of a directory, sorted.
fn list(dir: &Path, problems: &mut Vec<String>) -> Vec<PathBuf> {
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Vec::new(),
        Err(e) => {
            problems.push(format!("{}: {e}", dir.display()));
            return Vec::new();
        }
    };
    let mut files: Vec<PathBuf> = Vec::new();
    for (seen, entry) in entries.flatten().enumerate() {
        if seen >= MAX_FILES {
            problems.push(format!(
                "{}: more than {MAX_FILES} entries; the others are not looked at",
                dir.display()
            ));
            break;
        }
        let is_dir = entry.file_type().is_ok_and(|t| t.is_dir());
        let path = entry.path();
        if !is_dir && path.extension().is_some_and(|e| e == "json" || e == "yaml") {
            files.push(path);
        }
    }
    files.sort();
    files
}

/// The text of a regular file. Opening it neither waits for a peer nor makes a terminal ours.
fn read_file(path: &Path) -> Result<String, String> {
    let words = |e: Errno| std::io::Error::from(e).to_string();
    let fd = rustix::fs::open(
        path,
        OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY,
        Mode::empty(),
    )
    .map_err(words)?;
    let stat = rustix::fs::fstat(&fd).map_err(words)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err("not a regular file".into());
    }
    let mut bytes = Vec::new();
    std::fs::File::from(fd)
        .take(MAX_FILE + 1)
        .read_to_end(&mut bytes)
        .map_err(|e| e.to_string())?;
    if bytes.len() as u64 > MAX_FILE {
        return Err(format!("larger than {MAX_FILE} bytes"));
    }
    String::from_utf8(bytes).map_err(|_| "not a text in UTF-8".into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn spec(kind: &str, name: &str, value: &str) -> String {
        format!(
            "cdiVersion: 0.6.0\nkind: {kind}\ndevices:\n- name: {name}\n  containerEdits: {{env: [V={value}]}}\n"
        )
    }

    #[test]
    fn only_files_that_can_be_used_count() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        std::fs::write(at("good.yaml"), spec("v/c", "a", "1")).unwrap();
        std::fs::write(at("good.json"), r#"{"cdiVersion":"0.3.0","kind":"v/j","devices":[{"name":"a","containerEdits":{"env":["A=1"]}}]}"#)
            .unwrap();
        std::fs::write(at("other.yml"), spec("v/yml", "a", "1")).unwrap();
        std::fs::write(at("half.yaml"), "kind: [").unwrap();
        std::fs::write(at("huge.yaml"), "#".repeat(1024 * 1024 + 1)).unwrap();
        std::fs::write(at("bytes.yaml"), b"\xff").unwrap();
        std::fs::create_dir(at("dir.yaml")).unwrap();
        symlink(at("dir.yaml"), at("linked-dir.yaml")).unwrap();
        symlink(at("cycle.yaml"), at("cycle.yaml")).unwrap();
        symlink(at("nothing"), at("dangling.yaml")).unwrap();
        symlink("/dev/zero", at("zero.yaml")).unwrap();
        rustix::fs::mknodat(
            rustix::fs::CWD,
            at("pipe.yaml"),
            FileType::Fifo,
            Mode::from_raw_mode(0o600),
            0,
        )
        .unwrap();
        let found =
            CdiCatalog::new([dir.path().to_owned(), at("absent"), at("half.yaml")], []).read();
        assert_eq!(found.iter().map(|d| d.name.as_str()).collect::<Vec<_>>(), ["v/c=a", "v/j=a"]);
        let mut problems =
            found.problems().iter().map(|p| p.trim_start_matches(dir.path().to_str().unwrap()));
        for (file, why) in [
            ("/bytes.yaml", "UTF-8"),
            ("/cycle.yaml", "symbolic links"),
            ("/dangling.yaml", "No such file"),
            ("/half.yaml", "line"),
            ("/huge.yaml", "larger than 1048576 bytes"),
            ("/linked-dir.yaml", "not a regular file"),
            ("/pipe.yaml", "not a regular file"),
            ("/zero.yaml", "not a regular file"),
            ("/half.yaml", "Not a directory"),
        ] {
            let problem = problems.next().unwrap_or_default();
            assert!(
                problem.starts_with(file) && problem.contains(why),
                "{problem} is not of {file}: {why}"
            );
        }
        assert_eq!(problems.next(), None);
    }

    #[test]
    fn a_later_directory_wins_and_a_disputed_name_means_nothing() {
        let (low, high) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        for (dir, file, name, value) in [
            (&low, "1", "a", "low"),
            (&low, "2", "b", "low"),
            (&low, "3", "b", "low"),
            (&low, "4", "c", "low"),
            (&high, "1", "a", "high"),
        ] {
            std::fs::write(dir.path().join(format!("{file}.yaml")), spec("v/c", name, value))
                .unwrap();
        }
        let registry = CdiCatalog::new([low.path().to_owned(), high.path().to_owned()], []);
        let found = registry.read();
        assert_eq!(found.iter().map(|d| d.name.as_str()).collect::<Vec<_>>(), ["v/c=a", "v/c=c"]);
        assert_eq!(found.edits(["v/c=a"]).unwrap().env, ["V=high"]);
        assert!(found.problems()[0].contains("device \"v/c=b\" is in"), "{:?}", found.problems());
        // A dispute above hides what is below.
        for file in ["2", "3"] {
            std::fs::write(high.path().join(format!("{file}.yaml")), spec("v/c", "c", "high"))
                .unwrap();
        }
        assert_eq!(registry.read().iter().map(|d| d.name.as_str()).collect::<Vec<_>>(), ["v/c=a"]);
    }

    #[test]
    fn a_directory_is_not_read_without_end() {
        let dir = tempfile::tempdir().unwrap();
        for i in 0..1001 {
            std::fs::write(dir.path().join(format!("{i}.txt")), "").unwrap();
        }
        let found = CdiCatalog::new([dir.path().to_owned()], []).read();
        assert!(found.problems()[0].contains("more than 1000 entries"), "{:?}", found.problems());
    }
}
