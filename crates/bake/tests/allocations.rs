//! What a plan costs in calls to the allocator, which are most of the time that `bake --print`
//! takes.

#![allow(clippy::unwrap_used)]
// An allocator cannot be written without.
#![allow(unsafe_code)]

use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
    io,
    time::SystemTime,
};

use shipway_bake::{File, Granted, Host, Options};

/// The system's allocator, which counts what the current thread asks it for.
struct Counting;

thread_local! {
    static CALLS: Cell<usize> = const { Cell::new(0) };
    static BYTES: Cell<usize> = const { Cell::new(0) };
}

fn count(bytes: usize) {
    CALLS.set(CALLS.get() + 1);
    BYTES.set(BYTES.get() + bytes);
}

// SAFETY: all is the system's; what is counted is in cells of the thread, which allocate nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        // SAFETY: as the caller has promised.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: as the caller has promised.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(size.saturating_sub(layout.size()));
        // SAFETY: as the caller has promised.
        unsafe { System.realloc(at, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

struct Nowhere;

impl Host for Nowhere {
    fn env(&self, _: &str) -> Option<String> {
        None
    }

    fn read(&self, _: &str) -> io::Result<Option<Vec<u8>>> {
        Ok(None)
    }

    fn home(&self) -> Option<String> {
        None
    }

    fn now(&self) -> SystemTime {
        SystemTime::UNIX_EPOCH
    }

    fn random(&self, bytes: &mut [u8]) -> shipway_fault::Result<()> {
        bytes.fill(0);
        Ok(())
    }
}

/// A definition of so many targets with what most of them have.
fn definition(targets: usize) -> File {
    let mut text = String::from(
        "variable \"TAG\" { default = \"latest\" }\n\
         target \"_base\" {\n  dockerfile = \"Dockerfile\"\n  platforms = [\"linux/amd64\"]\n  \
         args = { A = \"1\" }\n  labels = { vendor = \"x\" }\n}\n",
    );
    for n in 0..targets {
        text += &format!(
            "target \"t{n}\" {{\n  inherits = [\"_base\"]\n  context = \"./{n}\"\n  \
             args = {{ NAME = \"t{n}\", N = {n} }}\n  tags = [\"example.org/t{n}:${{TAG}}\"]\n  \
             cache-from = [\"type=registry,ref=example.org/cache:t{n}\"]\n  \
             output = [\"type=image\"]\n}}\n"
        );
    }
    let names: Vec<String> = (0..targets).map(|n| format!("\"t{n}\"")).collect();
    text += &format!("group \"default\" {{\n  targets = [{}]\n}}\n", names.join(", "));
    File { name: "docker-bake.hcl".into(), data: text.into_bytes() }
}

/// Calls to the allocator, and bytes, for the printed plan of so many targets.
#[track_caller]
fn cost(targets: usize) -> (usize, usize) {
    let files = [definition(targets)];
    let before = (CALLS.get(), BYTES.get());
    let parsed = shipway_bake::parse(&files, &Nowhere, &Options::default()).unwrap();
    let wanted = ["default".to_owned()];
    let plan = parsed.config.plan(&Nowhere, &wanted, &[], &mut Granted::default()).unwrap();
    assert_eq!(plan.targets.len(), targets);
    assert!(serde_json::to_string(&plan).unwrap().len() > 100 * targets);
    (CALLS.get() - before.0, BYTES.get() - before.1)
}

#[test]
fn a_target_costs_some_hundred_allocations_however_many_there_are() {
    cost(1);
    let ((few, few_bytes), (many, many_bytes)) = (cost(100), cost(400));
    println!("{few} and {many} allocations, {few_bytes} and {many_bytes} bytes");
    assert!(many < 400 * MOST, "{} for a target", many / 400);
    assert!(many_bytes < 400 * MOST_BYTES, "{} bytes for a target", many_bytes / 400);
    assert!(many < 4 * few + few / 10, "{few} for 100 targets, {many} for 400");
}

/// Allocations for one target, at most: a fifth more than they are now.
const MOST: usize = 300;
/// The same in bytes.
const MOST_BYTES: usize = 36_000;
