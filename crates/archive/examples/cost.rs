//! What it costs to make a layer of a directory, by kind of compression: processor time of all
//! threads, which other work on the machine changes little, as medians of several rounds in turns.
//!
//! `cargo run --release -p shipway-archive --example cost -- DIRECTORY [ROUNDS [KIND…]]`

use shipway_archive::{Compression, CompressionKind, Dialect, LayerTree, pack, tar_of};
use shipway_fault::{Fault, Result};

const KINDS: [CompressionKind; 6] = [
    CompressionKind::Gzip,
    CompressionKind::Estargz,
    CompressionKind::Zstd,
    CompressionKind::ZstdChunked(Dialect::Containerd),
    CompressionKind::ZstdChunked(Dialect::Podman),
    CompressionKind::Uncompressed,
];

/// Ticks of a second in `/proc` (proc_pid_stat(5); the same on all Linux).
const TICKS: f64 = 100.0;

/// Seconds of processor time that this process has had: the 14th and 15th field of its state, of
/// which the second one, its name, ends with the last parenthesis.
fn spent() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
    fields.skip(11).take(2).filter_map(|ticks| ticks.parse::<f64>().ok()).sum::<f64>() / TICKS
}

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let usage = || Fault::invalid("usage: cost DIRECTORY [ROUNDS [KIND…]]");
    let tree = LayerTree::whole(args.next().ok_or_else(usage)?);
    let rounds = args.next().map_or(Some(5), |n| n.parse().ok()).ok_or_else(usage)?;
    let wanted: Vec<String> = args.collect();
    let mut kinds = KINDS.to_vec();
    kinds.retain(|kind| wanted.is_empty() || wanted.contains(&kind.to_string()));
    let tar = tar_of(&tree)?.tar;
    println!("a tar of {} MB", tar.size / 1_000_000);
    for known in [None, Some(tar)] {
        let mut costs = vec![(Vec::new(), 0); kinds.len()];
        for _ in 0..rounds {
            for (kind, (times, size)) in kinds.iter().zip(&mut costs) {
                let (compression, before) =
                    (Compression { kind: *kind, ..Default::default() }, spent());
                *size = pack(&tree, compression, known.clone(), None, &mut |_| Ok(()))?.size;
                times.push(spent() - before);
            }
        }
        println!("{}", if known.is_some() { "hashed before:" } else { "not hashed before:" });
        let mut base = None;
        for (kind, (times, size)) in kinds.iter().zip(&mut costs) {
            times.sort_by(f64::total_cmp);
            let time = times.get(times.len() / 2).copied().unwrap_or_default();
            let share = time / *base.get_or_insert(time);
            println!("{kind:>14} {time:6.2} s {share:6.2} x the first {:>6} MB", *size / 1_000_000);
        }
    }
    Ok(())
}
