//! Tar headers: ustar where it can say it, a PAX header before it where it cannot (POSIX.1-2001
//! pax, `SCHILY.xattr`).

use crate::{
    EntryKind, LayerEntry,
    loss::WHITEOUT,
    tar::{
        block::{BLOCK, padding},
        pax::record,
    },
};

/// Largest number in a ustar field of 12 bytes.
const MAX_SIZE: u64 = 0o77777777777;
/// Largest number in a ustar field of 8 bytes.
const MAX_ID: u32 = 0o7777777;

/// The two empty blocks that end an archive.
pub const END: [u8; 2 * BLOCK] = [0; 2 * BLOCK];

/// Appends the headers of `entry` to `out`.
pub fn write(entry: &LayerEntry, out: &mut Vec<u8>) {
    let name = tar_name(entry);
    let link: &[u8] = match &entry.kind {
        EntryKind::HardLink(target) | EntryKind::Symlink(target) => target,
        _ => &[],
    };
    let mut records = Vec::new();
    if !fits(&name) {
        records.push((b"path".to_vec(), name.clone()));
    }
    if !fits(link) {
        records.push((b"linkpath".to_vec(), link.to_vec()));
    }
    if entry.uid > MAX_ID {
        records.push((b"uid".to_vec(), entry.uid.to_string().into_bytes()));
    }
    if entry.gid > MAX_ID {
        records.push((b"gid".to_vec(), entry.gid.to_string().into_bytes()));
    }
    if entry.size > MAX_SIZE {
        records.push((b"size".to_vec(), entry.size.to_string().into_bytes()));
    }
    if entry.mtime < 0 || entry.mtime as u64 > MAX_SIZE {
        records.push((b"mtime".to_vec(), entry.mtime.to_string().into_bytes()));
    }
    for (name, value) in &entry.xattrs {
        records.push(([b"SCHILY.xattr.", &name[..]].concat(), value.clone()));
    }
    if !records.is_empty() {
        records.sort();
        let body: Vec<u8> = records.iter().flat_map(|(k, v)| record(k, v)).collect();
        ustar(&pax_name(&entry.path), &[], b'x', 0o644, (0, 0), body.len() as u64, 0, (0, 0), out);
        let pad = padding(body.len() as u64);
        out.extend_from_slice(&body);
        out.resize(out.len() + pad, 0);
    }
    let (flag, device) = match entry.kind {
        EntryKind::File | EntryKind::Whiteout => (b'0', (0, 0)),
        EntryKind::HardLink(_) => (b'1', (0, 0)),
        EntryKind::Symlink(_) => (b'2', (0, 0)),
        EntryKind::CharDevice(major, minor) => (b'3', (major, minor)),
        EntryKind::BlockDevice(major, minor) => (b'4', (major, minor)),
        EntryKind::Directory => (b'5', (0, 0)),
        EntryKind::Fifo => (b'6', (0, 0)),
    };
    let ids = (entry.uid.min(MAX_ID), entry.gid.min(MAX_ID));
    let mtime = entry.mtime.clamp(0, MAX_SIZE as i64) as u64;
    ustar(&name, link, flag, entry.mode, ids, entry.size.min(MAX_SIZE), mtime, device, out);
}

/// Name in the archive: directories end with a slash, whiteouts have their prefix (OCI image-spec,
/// layer.md, "Whiteouts").
fn tar_name(entry: &LayerEntry) -> Vec<u8> {
    let mut name = entry.path.clone();
    match entry.kind {
        EntryKind::Directory if name.is_empty() => name.extend(b"./"),
        EntryKind::Directory => name.push(b'/'),
        EntryKind::Whiteout => {
            let at = name.iter().rposition(|b| *b == b'/').map_or(0, |i| i + 1);
            name.splice(at..at, WHITEOUT.iter().copied());
        }
        _ => {}
    }
    name
}

fn fits(name: &[u8]) -> bool {
    name.len() <= 100 && name.is_ascii()
}

fn pax_name(path: &[u8]) -> Vec<u8> {
    let (dir, base) = match path.iter().rposition(|b| *b == b'/') {
        Some(i) => (&path[..=i], &path[i + 1..]),
        None => (&[][..], path),
    };
    [dir, b"PaxHeaders.0/", base].concat()
}

#[allow(clippy::too_many_arguments)]
fn ustar(
    name: &[u8],
    link: &[u8],
    flag: u8,
    mode: u32,
    ids: (u32, u32),
    size: u64,
    mtime: u64,
    device: (u32, u32),
    out: &mut Vec<u8>,
) {
    let start = out.len();
    out.resize(start + BLOCK, 0);
    let h = &mut out[start..];
    text(&mut h[0..100], name);
    octal(&mut h[100..108], mode.into());
    octal(&mut h[108..116], ids.0.into());
    octal(&mut h[116..124], ids.1.into());
    octal(&mut h[124..136], size);
    octal(&mut h[136..148], mtime);
    h[148..156].fill(b' ');
    h[156] = flag;
    text(&mut h[157..257], link);
    h[257..265].copy_from_slice(b"ustar\x0000");
    octal(&mut h[329..337], device.0.into());
    octal(&mut h[337..345], device.1.into());
    let sum: u32 = h.iter().map(|b| u32::from(*b)).sum();
    octal(&mut h[148..155], sum.into());
}

/// As much of a text as fits; the whole of it is in the PAX header then, so bytes that are not
/// ASCII are left out here.
fn text(field: &mut [u8], value: &[u8]) {
    for (to, from) in field.iter_mut().zip(value.iter().filter(|b| b.is_ascii())) {
        *to = *from;
    }
}

/// Octal digits with leading zeros, ended by a zero byte.
fn octal(field: &mut [u8], mut value: u64) {
    let last = field.len() - 1;
    for digit in field[..last].iter_mut().rev() {
        *digit = b'0' + (value & 7) as u8;
        value >>= 3;
    }
    field[last] = 0;
}
