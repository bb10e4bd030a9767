//! What a large layer costs. Alone in its process, since it looks at what the process has.

#![allow(clippy::unwrap_used)]

use shipway_erofs::*;
use std::{fs, io, time::Instant};

/// Resident bytes at most since the last [`reset`].
fn peak() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}

fn reset() {
    fs::write("/proc/self/clear_refs", "5").unwrap();
}

/// A tree of `count` entries beside the root, a twentieth of them directories and some symbolic
/// links; returns the bytes of their names.
fn fill(builder: &mut Builder, count: usize) -> u64 {
    let mut text = 0;
    for n in 0..count {
        let path = if n % 20 == 0 {
            format!("usr/share/{n:0>8}")
        } else {
            format!("usr/share/{:0>8}/file-{n:0>8}.txt", n - n % 20)
        };
        let node = match n % 20 {
            0 => Node::Directory,
            7 => Node::Symlink { target: b"../some/other/place" },
            _ => Node::File { size: 5000 },
        };
        text += path.rsplit('/').next().unwrap().len() as u64;
        builder
            .insert(path.as_bytes(), &Attributes { mode: 0o644, ..Attributes::default() }, node)
            .unwrap();
    }
    text
}

#[test]
fn a_million_entries_cost_less_than_a_hundred_bytes_each() {
    const COUNT: usize = 1_000_000;
    const EACH: u64 = 100;
    let builder = || Builder::new(Options::default(), &Attributes::default()).unwrap();
    let mut small = builder();
    let started = Instant::now();
    fill(&mut small, 17_011);
    let inserted = started.elapsed();
    let image = small.finish().unwrap();
    let mut bytes = Vec::with_capacity(image.bytes() as usize);
    image.write(Form::WithDevice, &mut bytes).unwrap();
    println!(
        "{} inodes: {inserted:?} to insert, {:?} in all, {} bytes",
        image.inodes(),
        started.elapsed(),
        image.bytes()
    );
    drop((image, bytes));

    reset();
    let before = peak();
    let mut large = builder();
    let started = Instant::now();
    let text = fill(&mut large, COUNT);
    let built = peak() - before;
    let image = large.finish().unwrap();
    image.write(Form::Flat, &mut io::sink()).unwrap();
    let most = peak() - before;
    let each = |bytes: u64| bytes.saturating_sub(text) / COUNT as u64;
    println!(
        "{COUNT} entries: {} and at most {} bytes each beside names, image of {}, {:?}",
        each(built),
        each(most),
        image.bytes(),
        started.elapsed()
    );
    assert!(each(most) <= EACH, "{} bytes each", each(most));

    // Directories that one path implies count like others.
    let mut implied = builder();
    let refused = (0..).find_map(|n| {
        let path = format!("{n}/{}", "d/".repeat(2000));
        implied.insert(path.as_bytes(), &Attributes::default(), Node::Directory).err()
    });
    assert_eq!(refused, Some(BuildError::TooManyEntries));
    assert!(implied.len() >= limits::ENTRIES - 1);
}
