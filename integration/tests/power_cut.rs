//! A power cut: what was not on the disk yet is gone, and nothing that is served afterwards is
//! short.

#![allow(clippy::unwrap_used)]

use shipway_integration::{build, on_each};
use shipway_testkit::{Lab, LabOptions, run};
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::Command,
};

const SIZE: u64 = 1 << 30;

/// A disk in a file, with containerd and the daemon on it.
struct Disk {
    dir: tempfile::TempDir,
}

impl Disk {
    fn new() -> Self {
        let disk = Self {
            dir: tempfile::Builder::new().prefix("shipway-cut").tempdir_in("/var/tmp").unwrap(),
        };
        std::fs::File::create(disk.image()).unwrap().set_len(SIZE).unwrap();
        run(Command::new("mkfs.ext4").arg("-q").arg(disk.image())).ok();
        disk.mounted()
    }

    /// What is on the disk now, and not what the kernel would write to it later.
    fn cut(&self) -> Self {
        let after = Self {
            dir: tempfile::Builder::new().prefix("shipway-cut").tempdir_in("/var/tmp").unwrap(),
        };
        run(Command::new("cp").arg("--sparse=always").arg(self.image()).arg(after.image())).ok();
        after.mounted()
    }

    fn mounted(self) -> Self {
        std::fs::create_dir_all(self.place()).unwrap();
        run(Command::new("mount").args(["-o", "loop"]).arg(self.image()).arg(self.place())).ok();
        self
    }

    fn image(&self) -> PathBuf {
        self.dir.path().join("disk")
    }

    fn place(&self) -> PathBuf {
        self.dir.path().join("m")
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        run(Command::new("umount").arg("--lazy").arg(self.place()));
    }
}

/// Name and contents of every file below `dir`.
fn files(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut left = vec![dir.to_owned()];
    while let Some(next) = left.pop() {
        for entry in std::fs::read_dir(next).unwrap().map(Result::unwrap) {
            if entry.file_type().unwrap().is_dir() {
                left.push(entry.path());
            } else {
                found.insert(
                    entry.path().strip_prefix(dir).unwrap().to_owned(),
                    std::fs::read(entry.path()).unwrap(),
                );
            }
        }
    }
    found
}

#[test]
fn after_a_power_cut_nothing_is_short() {
    on_each(|flavour| {
        let contexts = tempfile::tempdir().unwrap();
        let context = contexts.path().join("context");
        for n in 0..200 {
            let dir = context.join(format!("files/d{}", n % 10));
            std::fs::create_dir_all(&dir).unwrap();
            std::fs::write(dir.join(format!("f{n}")), format!("{n} ").repeat(2000)).unwrap();
        }
        std::fs::write(
            context.join("Dockerfile"),
            "FROM scratch\nCOPY files /files\nCOPY files/d1 /again\n",
        )
        .unwrap();
        let out = |name: &str| contexts.path().join(name);
        let output = |name: &str| format!("type=local,dest={}", out(name).display());
        let options = |disk: &Disk, boot: &str| {
            let options = LabOptions {
                keep_in: Some(disk.place().join("lab")),
                boot: Some(boot.into()),
                ..LabOptions::new(flavour)
            };
            LabOptions { worker_config: "  snapshotter = \"overlayfs\"\n".into(), ..options }
        };

        let disk = Disk::new();
        let mut lab = Lab::start(options(&disk, "one"));
        lab.start_daemon();
        // What programs make at their first start is there since long.
        run(Command::new("sync").arg("--file-system").arg(disk.place())).ok();
        let first = build(&lab, "cut:1", &context, &["--output", &output("first")]).ok();
        assert!(!first.all().contains("CACHED"), "{}", first.all());
        // The daemon is in the middle of its life; the disk has what it has.
        let after = disk.cut();
        let want = files(&out("first"));
        assert_eq!(want.len(), 220);

        let mut second = Lab::start(options(&after, "two"));
        second.start_daemon();
        build(&second, "cut:1", &context, &["--output", &output("second")]).ok();
        let got = files(&out("second"));
        let short: Vec<_> = want
            .iter()
            .filter(|(name, text)| got.get(*name) != Some(text))
            .map(|(name, _)| name)
            .collect();
        assert!(
            short.is_empty(),
            "{} of {} files are wrong after the cut, such as {:?}",
            short.len(),
            want.len(),
            short[0]
        );
        assert_eq!(got.len(), want.len());
        drop(second);

        // After an end in peace everything is still cached.
        assert!(lab.stop_daemon());
        let after = disk.cut();
        let mut third = Lab::start(options(&after, "three"));
        third.start_daemon();
        let cached = build(&third, "cut:1", &context, &["--output", &output("third")]).ok();
        assert_eq!(
            cached.all().lines().filter(|l| l.ends_with("CACHED")).count(),
            2,
            "{}",
            cached.all()
        );
        assert_eq!(files(&out("third")), want);
    });
}
