//! What the daemon mounts for itself: images can hold set-id programs and devices, and whoever
//! reaches such a mount must have nothing of them.

#![allow(clippy::unwrap_used)]

use shipway_integration::{build, ctr_run, on_each};
use shipway_testkit::Lab;
use std::{
    collections::BTreeSet,
    sync::atomic::{AtomicBool, Ordering},
};

/// Mount points below the daemon's directory, each with its options.
fn mounts(lab: &Lab) -> BTreeSet<(String, String)> {
    let below = format!("{}/", lab.dir().join("shipwayd/refs").display());
    let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    let fields = table.lines().map(|l| l.split(' ').collect::<Vec<_>>());
    fields
        .filter(|f| f[4].starts_with(&below))
        .map(|f| (f[4].to_owned(), f[5].to_owned()))
        .collect()
}

#[test]
fn the_daemons_own_mounts_are_of_no_use_to_others() {
    on_each(|flavour| {
        let lab = Lab::complete(flavour);
        let text = "FROM busybox AS base\nRUN mkdir /b && cp /bin/busybox /b/ && chmod 4755 /b/busybox && mknod -m 666 /b/null c 1 3\n\
                    FROM base\nCOPY --chown=7:7 files /files\nCOPY --from=base /b/null /b/busybox /copied/\n\
                    RUN stat -c '%F %a %t %T' /copied/* > /seen && /copied/busybox true && echo x > /copied/null\n";
        let context = lab.context("own-mounts", &[("Dockerfile", text)]);
        for n in 0..3000 {
            let dir = context.join(format!("files/d{}", n % 30));
            std::fs::create_dir_all(&dir).unwrap();
            std::fs::write(dir.join(format!("f{n}")), "x").unwrap();
        }
        let ended = AtomicBool::new(false);
        let seen = std::thread::scope(|scope| {
            let watch = scope.spawn(|| {
                let mut seen = BTreeSet::new();
                while !ended.load(Ordering::Relaxed) {
                    seen.extend(mounts(&lab));
                    std::thread::yield_now();
                }
                seen
            });
            let done = build(&lab, "own-mounts:1", &context, &[]);
            ended.store(true, Ordering::Relaxed);
            done.ok();
            watch.join().unwrap()
        });
        assert!(!seen.is_empty(), "nothing was mounted for a copy");
        for (point, options) in seen {
            for option in ["nosuid", "nodev", "noexec"] {
                assert!(options.split(',').any(|o| o == option), "{point} is mounted {options}");
            }
        }
        // What they hold is copied and packed as it is, and works in a container.
        let image = ctr_run(&lab, "docker.io/library/own-mounts:1", &["cat", "/seen"]).ok();
        assert_eq!(image.stdout, "regular file 4755 0 0\ncharacter special file 666 1 3\n");
    });
}
