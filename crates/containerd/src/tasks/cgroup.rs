//! Owns the reading of a container's cgroup: peak memory and kills for want of it.

use std::path::{Path, PathBuf};

/// The cgroup in which a container's memory is counted.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(super) struct MemoryCgroup {
    dir: PathBuf,
    unified: bool,
}

/// What it counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct MemoryCount {
    pub(super) oom_killed: bool,
    pub(super) peak: Option<u64>,
}

impl MemoryCgroup {
    /// The cgroup of process `pid`, unless the host's are not visible here.
    pub(super) fn of(pid: u32) -> Option<Self> {
        let text = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
        Self::parse(&text, Path::new("/sys/fs/cgroup")).filter(|c| c.dir.is_dir())
    }

    fn parse(text: &str, root: &Path) -> Option<Self> {
        let (mut v1, mut v2) = (None, None);
        for line in text.lines() {
            let mut fields = line.splitn(3, ':');
            let (Some(id), Some(controllers), Some(path)) =
                (fields.next(), fields.next(), fields.next())
            else {
                continue;
            };
            let path = path.trim_start_matches('/');
            // The root cgroup counts the whole host; `..` means that it is outside of what we see.
            if path.is_empty() || path.split('/').any(|p| p == "..") {
                continue;
            }
            if controllers.split(',').any(|c| c == "memory") {
                v1 = Some(Self { dir: root.join("memory").join(path), unified: false });
            } else if id == "0" && controllers.is_empty() {
                v2 = Some(Self { dir: root.join(path), unified: true });
            }
        }
        v1.or(v2)
    }

    /// What was counted so far.
    pub(super) fn count(&self) -> MemoryCount {
        let read = |name: &str| std::fs::read_to_string(self.dir.join(name)).unwrap_or_default();
        let (events, peak) = if self.unified {
            ("memory.events", "memory.peak")
        } else {
            ("memory.oom_control", "memory.max_usage_in_bytes")
        };
        let oom_killed = read(events)
            .lines()
            .any(|l| l.strip_prefix("oom_kill ").is_some_and(|n| n.trim() != "0"));
        MemoryCount { oom_killed, peak: read(peak).trim().parse().ok() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(text: &str, expected: Option<(&str, bool)>) {
        let found = MemoryCgroup::parse(text, Path::new("/c"));
        assert_eq!(
            found,
            expected.map(|(dir, unified)| MemoryCgroup { dir: dir.into(), unified }),
            "{text}"
        );
    }

    #[test]
    fn memory_is_counted_in_either_hierarchy() {
        check("0::/a/b\n", Some(("/c/a/b", true)));
        check("5:cpu,memory:/x\n0::/a\n", Some(("/c/memory/x", false)));
        check("0::/\n", None);
        check("0::/../../x\n", None);
    }

    #[test]
    fn counts_are_read_from_the_files() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        std::fs::write(dir.path().join("memory.events"), "oom 2\noom_kill 1\n").expect("write");
        std::fs::write(dir.path().join("memory.peak"), "4096\n").expect("write");
        let cgroup = MemoryCgroup { dir: dir.path().into(), unified: true };
        assert_eq!(cgroup.count(), MemoryCount { oom_killed: true, peak: Some(4096) });
    }
}
