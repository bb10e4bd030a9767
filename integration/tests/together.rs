//! Builds, prunes and removed images at the same time: no build notices, and nothing is left.

#![allow(clippy::unwrap_used)]

use shipway_integration::{any, build, collect_garbage, nothing_left, remove_everything};
use shipway_testkit::Lab;
use std::sync::atomic::{AtomicUsize, Ordering};

const BUILDERS: usize = 4;
const BUILDS: usize = 6;

#[test]
fn builds_do_not_notice_prunes_and_removed_images() {
    let lab = Lab::complete(any());
    let building = AtomicUsize::new(BUILDERS);
    std::thread::scope(|scope| {
        for builder in 0..BUILDERS {
            let (lab, building) = (&lab, &building);
            scope.spawn(move || {
                // Also when a build fails: the others must come to an end.
                let _done = Done(building);
                for n in 0..BUILDS {
                    // Some work is shared between builders, some is new, some is cached.
                    let text = format!(
                        "FROM busybox AS one\nRUN echo {n} > /x; sleep 0.0{n}\nFROM busybox\nCOPY --from=one /x /x\nRUN echo {builder}{} > /y && cat /x /y\n",
                        n / 2
                    );
                    let context = lab.context(&format!("together-{builder}"), &[("Dockerfile", &text)]);
                    let archive = lab.dir().join(format!("together-{builder}.tar"));
                    let to_file = format!("type=oci,dest={}", archive.display());
                    let tag = format!("together-{builder}:{n}");
                    let output = ["-o", &*to_file];
                    build(lab, &tag, &context, if n % 3 == 2 { &output } else { &[] }).ok();
                }
            });
        }
        scope.spawn(|| {
            while building.load(Ordering::SeqCst) > 0 {
                lab.shipway(["prune", "--all"]).ok();
            }
        });
        scope.spawn(|| {
            while building.load(Ordering::SeqCst) > 0 {
                let names = lab.ctr(["images", "list", "-q"]).ok().stdout;
                match names.lines().next() {
                    // Another build may have named it anew, or the list may be old.
                    Some(name) => drop(lab.ctr(["images", "remove", "--sync", name])),
                    None => collect_garbage(&lab),
                }
            }
        });
    });
    remove_everything(&lab);
    nothing_left(&lab);
}

struct Done<'a>(&'a AtomicUsize);

impl Drop for Done<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}
