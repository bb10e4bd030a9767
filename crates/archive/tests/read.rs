//! The reader of archives, on what GNU tar and Python's `tarfile` make, on bombs, and on mutations
//! of all that.

#![allow(clippy::unwrap_used)]

use shipway_archive::{
    Compression, CompressionKind, LayerTree, MemberKind, TarReader, inflate, newest_file, pack,
};
use shipway_testkit::Rounds;
use std::{
    fs::{self, File},
    io::{self, Read, Write as _},
    os::unix::fs::FileExt,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

const PYTHON: &[u8] = include_bytes!("corpus/python-pax.tar");
const MIB: usize = 1 << 20;

/// A member with its contents.
type Whole = (shipway_archive::Member, Vec<u8>);

/// All members; contents are put together as a file system would.
#[track_caller]
fn read(tar: impl Read) -> io::Result<Vec<Whole>> {
    let (mut tar, mut all, mut buffer) = (TarReader::new(tar), Vec::new(), [0; 700]);
    while let Some(member) = tar.next_member()? {
        let mut content = Vec::new();
        while let Some(piece) = tar.piece(&mut buffer)? {
            assert!(
                piece.offset >= content.len() as u64
                    && piece.offset + piece.len as u64 <= member.size
            );
            // What mutations say of sizes is not made.
            if piece.offset < 64 * MIB as u64 {
                content.resize(piece.offset as usize, 0);
                content.extend_from_slice(&buffer[..piece.len]);
            }
        }
        if member.size < 64 * MIB as u64 {
            content.resize(member.size as usize, 0);
        }
        all.push((member, content));
    }
    Ok(all)
}

/// A file of holes with `parts` pieces of data.
fn sparse(path: &Path, parts: u64) {
    let file = File::create(path).unwrap();
    for part in 0..parts {
        file.write_all_at(&[part as u8 + 1; 5000], part * 50_000).unwrap();
    }
    file.set_len(parts * 50_000 + 3).unwrap();
}

#[track_caller]
fn tar(dir: &Path, arguments: &[&str]) -> Vec<u8> {
    let out = Command::new("tar")
        .arg("-C")
        .arg(dir)
        .args(["-c", "--owner=web:1000", "--group=web:1001"])
        .args(arguments)
        .arg(".")
        .output()
        .unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    out.stdout
}

/// A small tree as GNU tar packs it in all its formats; sparse files in four of them.
fn archives(dir: &Path) -> Vec<(Vec<&'static str>, Vec<u8>)> {
    fs::create_dir_all(dir.join("sub")).unwrap();
    fs::write(dir.join("sub/plain"), "text").unwrap();
    fs::hard_link(dir.join("sub/plain"), dir.join("again")).unwrap();
    std::os::unix::fs::symlink("sub/plain", dir.join("link")).unwrap();
    for parts in [0, 3, 40] {
        sparse(&dir.join(format!("sparse{parts}")), parts);
    }
    let kinds: [&[&str]; 8] = [
        &["--format=v7"],
        &["--format=ustar"],
        &["--format=oldgnu", "-S"],
        &["--format=gnu", "-S"],
        &["--format=posix"],
        &["--format=posix", "-S", "--sparse-version=0.0"],
        &["--format=posix", "-S", "--sparse-version=0.1"],
        &["--format=posix", "-S", "--sparse-version=1.0"],
    ];
    let packed = |kind: &[&'static str]| {
        let holes: &[&str] = if kind.contains(&"-S") { &["--hole-detection=raw"] } else { &[] };
        (kind.to_vec(), tar(dir, &[kind, holes].concat()))
    };
    kinds.into_iter().map(packed).collect()
}

#[test]
fn what_gnu_tar_packs_is_read_whole() {
    let dir = tempfile::tempdir().unwrap();
    for (kind, bytes) in archives(dir.path()) {
        let sparse_kind = kind.contains(&"-S");
        assert!(
            !sparse_kind || bytes.len() < 600_000,
            "{kind:?} has {} bytes: nothing is sparse",
            bytes.len()
        );
        let all = read(&bytes[..]).unwrap_or_else(|e| panic!("{kind:?}: {e}"));
        assert_eq!(all.len(), 8, "{kind:?}");
        for (member, content) in all {
            let path = dir.path().join(String::from_utf8(member.path.clone()).unwrap());
            match &member.kind {
                MemberKind::File => {
                    assert!(content == fs::read(&path).unwrap(), "{kind:?} {}", path.display())
                }
                MemberKind::Directory => assert!(path.is_dir()),
                MemberKind::Symlink(to) => assert_eq!(to, b"sub/plain"),
                MemberKind::HardLink(to) => assert!(
                    fs::read(dir.path().join(std::str::from_utf8(to).unwrap())).unwrap() == b"text"
                ),
                other => panic!("{other:?}"),
            }
            assert_eq!((member.uid, member.gid), (1000, 1001), "{kind:?}");
        }
    }
}

#[test]
fn long_names_are_read_whole() {
    let dir = tempfile::tempdir().unwrap();
    let (long, target) = ("n".repeat(200), "t".repeat(200));
    fs::write(dir.path().join(&long), "x").unwrap();
    std::os::unix::fs::symlink(&target, dir.path().join("link")).unwrap();
    for format in ["--format=gnu", "--format=posix"] {
        let all = read(&tar(dir.path(), &[format])[..]).unwrap();
        let names: Vec<_> =
            all.iter().map(|(m, _)| String::from_utf8(m.path.clone()).unwrap()).collect();
        assert!(names.contains(&format!("./{long}")), "{format}: {names:?}");
        assert!(
            all.iter().any(|(m, _)| m.kind == MemberKind::Symlink(target.clone().into())),
            "{format}"
        );
    }
}

#[test]
fn records_may_have_newlines() {
    let all = read(PYTHON).unwrap();
    let (tool, text) = &all[0];
    assert_eq!(
        (tool.uid, tool.gid, tool.mode, &text[..]),
        (1234, 3_000_000, 0o755, &b"#!/bin/sh\n"[..])
    );
    assert_eq!(tool.mtime, 1_700_000_000_250_000_000);
    let capability = b"\x01\0\0\x02\n\x04\0\0\0\0\0\0\0\0\0\0\0\0\0\0".to_vec();
    assert_eq!(
        tool.xattrs,
        [
            (b"security.capability".to_vec(), capability),
            (b"user.text".to_vec(), b"two\nlines=".to_vec())
        ]
    );
    let (file, text) = &all[1];
    assert_eq!(
        (&file.path[..], file.uid, &text[..]),
        ("café\nbreak/fi\nle".as_bytes(), 7, &b"abc"[..])
    );
    assert_eq!(all[2].0.path, b"link\nname");
    assert_eq!(all[2].0.kind, MemberKind::Symlink("tö\nthere".into()));
    assert_eq!(all[3].0.path, [&[b'd'; 120][..], b"/", &[b'f'; 120]].concat());
    assert_eq!(all.len(), 4);
}

/// What is unpacked with such names is packed with them, too, and other programs read it.
#[test]
fn layers_keep_names_and_attributes_with_newlines() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let name = "é\n".repeat(60);
    fs::create_dir(dir.path().join("a\nb")).unwrap();
    fs::write(dir.path().join("a\nb").join(&name), "x").unwrap();
    let value = b"1\n20 path=elsewhere\n";
    rustix::fs::setxattr(
        dir.path().join("a\nb").join(&name),
        "user.lines",
        value,
        rustix::fs::XattrFlags::empty(),
    )
    .unwrap();
    let mut bytes = Vec::new();
    let plain = Compression { kind: CompressionKind::Uncompressed, ..Default::default() };
    pack(&LayerTree::whole(dir.path()), plain, None, None, &mut |b| {
        bytes.extend_from_slice(&b);
        Ok(())
    })
    .unwrap();
    let all = read(&bytes[..]).unwrap();
    assert_eq!(all[0].0.path, b"a\nb/");
    assert_eq!(all[1].0.path, format!("a\nb/{name}").into_bytes());
    assert_eq!(all[1].0.xattrs, [(b"user.lines".to_vec(), value.to_vec())]);
    let out = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    fs::write(out.path().join("tar"), &bytes).unwrap();
    let done = Command::new("tar")
        .arg("--xattrs")
        .arg("-C")
        .arg(out.path())
        .arg("-xf")
        .arg(out.path().join("tar"))
        .status()
        .unwrap();
    assert!(done.success());
    let unpacked = out.path().join("a\nb").join(&name);
    let mut read_back = [0; 64];
    let n = rustix::fs::getxattr(&unpacked, "user.lines", &mut read_back[..]).unwrap();
    assert_eq!((fs::read(&unpacked).unwrap(), &read_back[..n]), (b"x".to_vec(), &value[..]));
}

/// A header of `kind` that claims `size` bytes.
fn header(kind: u8, size: u64) -> [u8; 512] {
    let mut header = tar::Header::new_ustar();
    header.set_path("f").unwrap();
    header.set_entry_type(tar::EntryType::new(kind));
    header.set_size(size);
    header.set_mode(0o644);
    header.set_cksum();
    *header.as_bytes()
}

/// A member with extended records in front of it.
fn extended(records: &[(&str, String)], size: u64, content: &[u8]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    builder.append_pax_extensions(records.iter().map(|(k, v)| (*k, v.as_bytes()))).unwrap();
    let mut bytes = builder.into_inner().unwrap();
    bytes.truncate(bytes.len() - 1024);
    bytes.extend(header(b'0', size));
    bytes.extend(content);
    bytes.resize(bytes.len().next_multiple_of(512) + 1024, 0);
    bytes
}

/// Endless zeros that tell how many of them were taken.
struct Zeros(u64);

impl Read for Zeros {
    #[track_caller]
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        buf.fill(0);
        self.0 += buf.len() as u64;
        assert!(self.0 < 64 << 20, "read without end");
        Ok(buf.len())
    }
}

#[test]
fn special_entries_are_limited() {
    for kind in [b'L', b'K', b'x', b'g'] {
        let failed = read(header(kind, 8 << 30).chain(Zeros(0))).unwrap_err();
        assert!(failed.to_string().contains("too large"), "{failed}");
        let failed =
            newest_file(io::BufReader::new(header(kind, 8 << 30).chain(Zeros(0)))).unwrap_err();
        assert!(failed.to_string().contains("too large"), "{failed}");
    }
    // The largest that is read.
    let long = vec![b'n'; MIB - 1];
    let bytes = [&header(b'L', MIB as u64)[..], &long, &[0], &header(b'0', 0)].concat();
    assert_eq!(read(&bytes[..]).unwrap()[0].0.path, long);
}

#[test]
fn maps_of_sparse_files_are_limited_and_checked() {
    let one = |records: &[(&str, &str)], size: u64, content: &[u8]| {
        let records: Vec<_> = records.iter().map(|(k, v)| (*k, (*v).to_owned())).collect();
        read(&extended(&records, size, content)[..])
    };
    let good = one(
        &[("GNU.sparse.size", "20"), ("GNU.sparse.name", "real"), ("GNU.sparse.map", "2,3,10,2")],
        5,
        b"abcde",
    )
    .unwrap();
    assert_eq!(
        (&good[0].0.path[..], &good[0].1[..]),
        (&b"real"[..], &b"\0\0abc\0\0\0\0\0de\0\0\0\0\0\0\0\0"[..])
    );
    let bad: [(&str, &str, u64); 8] = [
        ("2,3,1,2", "20", 5),
        ("2,3,10", "20", 5),
        ("2,3,10,3", "20", 5),
        ("2,3,19,2", "20", 5),
        ("18446744073709551615,3,10,2", "20", 5),
        ("0,5", "-1", 5),
        ("0,x", "20", 5),
        ("0,99999999999999", "99999999999999", 5),
    ];
    for (map, size, stored) in bad {
        assert!(
            one(&[("GNU.sparse.size", size), ("GNU.sparse.map", map)], stored, b"abcde").is_err(),
            "{map}"
        );
    }
    assert!(one(&[("GNU.sparse.map", "0,5")], 5, b"abcde").is_err(), "no size");
    assert!(
        one(&[("GNU.sparse.size", "9"), ("GNU.sparse.numbytes", "5")], 5, b"abcde").is_err(),
        "out of order"
    );
    // Maps that never end: many numbers, one long number, blocks of the old form.
    let version_1 = |content: &[u8]| {
        let records =
            [("GNU.sparse.major", "1".to_owned()), ("GNU.sparse.realsize", "9".to_owned())];
        let mut bytes = extended(&records, 1 << 32, content);
        bytes.truncate(bytes.len() - 1024);
        read(bytes.chain(Zeros(0))).unwrap_err()
    };
    assert!(version_1(format!("{}\n", u64::MAX).as_bytes()).to_string().contains("too large"));
    assert!(version_1(&[b'1'; 2000]).to_string().contains("too large"));
    assert!(
        version_1(format!("262144\n{}", "0000\n".repeat(600_000)).as_bytes())
            .to_string()
            .contains("too large")
    );
    let mut old = header(b'S', 0);
    old[257..265].copy_from_slice(b"ustar  \0");
    old[482] = 1;
    old[483..495].copy_from_slice(b"00000000000\0");
    old[148..156].fill(b' ');
    let sum: u32 = old.iter().map(|b| u32::from(*b)).sum();
    old[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    struct More;
    impl Read for More {
        fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
            buf.fill(b'1');
            Ok(buf.len())
        }
    }
    let failed = read(old.chain(More)).unwrap_err();
    assert!(failed.kind() == io::ErrorKind::InvalidData, "{failed}");
}

#[test]
fn dictionaries_are_limited() {
    let xz = |dictionary: u32| {
        let mut options = liblzma::stream::LzmaOptions::new_preset(0).unwrap();
        options.dict_size(dictionary);
        let mut filters = liblzma::stream::Filters::new();
        filters.lzma2(&options);
        let stream =
            liblzma::stream::Stream::new_stream_encoder(&filters, liblzma::stream::Check::Crc32)
                .unwrap();
        let mut encoder = liblzma::write::XzEncoder::new_stream(Vec::new(), stream);
        encoder.write_all(PYTHON).unwrap();
        encoder.finish().unwrap()
    };
    let opened = |bytes: &[u8]| inflate(bytes).and_then(read).map(|all| all.len());
    assert_eq!(opened(&xz(64 << 20)).unwrap(), 4);
    let mut bomb = xz(1 << 20);
    // The dictionary's size is a byte of the block header, which has a checksum.
    let at = bomb.windows(3).position(|w| w == [0x21, 1, 16]).unwrap();
    bomb[at + 2] = 40;
    let crc = libdeflater::crc32(&bomb[12..20]);
    bomb[20..24].copy_from_slice(&crc.to_le_bytes());
    assert!(opened(&bomb).is_err(), "a dictionary of 4 GiB");
    // A frame of zstd with a window of 2 GiB (RFC 8878 3.1.1.1.2).
    let window = |log: u8| [&[0x28, 0xb5, 0x2f, 0xfd, 0, (log - 10) << 3][..], &[1, 0, 0]].concat();
    let inflated = |bytes: &[u8]| inflate(bytes).and_then(|mut r| r.read_to_end(&mut Vec::new()));
    assert_eq!(inflated(&window(27)).unwrap(), 0);
    assert!(inflated(&window(31)).is_err());
}

#[test]
fn broken_archives_are_refused() {
    let whole = extended(&[("mtime", "5".into())], 3, b"abc");
    for length in [1, 511, 700, 1030, 1537] {
        assert!(read(&whole[..length]).is_err(), "{length}");
    }
    assert_eq!(read(&whole[..2048]).unwrap().len(), 1, "the zeros at the end may be missing");
    let mut bad = whole.clone();
    bad[0] ^= 1;
    assert!(read(&bad[..]).unwrap_err().to_string().contains("checksum"));
    assert!(read(&[b'x'; 2000][..]).is_err());
    assert_eq!(read(&[0; 1024][..]).unwrap().len(), 0);
}

/// Makes the checksums right again, so that mutations get past them.
fn sums(bytes: &mut [u8]) {
    for block in bytes.chunks_exact_mut(512).filter(|b| &b[257..262] == b"ustar") {
        block[148..156].fill(b' ');
        let sum: u32 = block.iter().map(|b| u32::from(*b)).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    }
}

/// Mutated archives: nothing panics, and nothing takes long. What still reads fits into what it was
/// read from.
#[test]
fn mutations_never_break_it() {
    const TOKENS: [&[u8]; 12] = [
        b"GNU.sparse.major=1\n",
        b"GNU.sparse.map=",
        b"GNU.sparse.offset=",
        b"99999999999999999999",
        b"-1",
        b"\xff\xff\xff\xff\xff\xff\xff\xff",
        b"\x80\0\0\0",
        b"18446744073709551615\n",
        b"\n",
        b"0",
        b"ustar\0",
        b"ustar  \0",
    ];
    let dir = tempfile::tempdir().unwrap();
    let mut corpus: Vec<_> = archives(dir.path()).into_iter().map(|(_, bytes)| bytes).collect();
    corpus.retain(|bytes| bytes.len() < 600_000);
    corpus.extend([
        PYTHON.to_vec(),
        extended(
            &[("GNU.sparse.size", "20".into()), ("GNU.sparse.map", "2,3,10,2".into())],
            5,
            b"abcde",
        ),
    ]);
    let rounds = Rounds::new(2000, 4, 0x7a12_5eed);
    let mut dice = rounds.dice();
    for round in rounds {
        let mut bytes = corpus[round % corpus.len()].clone();
        for _ in 0..=dice.below(4) {
            // Most of what matters is in headers.
            let block = dice.below(bytes.len() / 512) * 512;
            let at = block + dice.below(512);
            match dice.below(4) {
                0 => bytes[at] = dice.below(256) as u8,
                1 => bytes[block + 156] = b"0125xgLKS7"[dice.below(10)],
                2 => {
                    let token = TOKENS[dice.below(TOKENS.len())];
                    let end = (at + token.len()).min(bytes.len());
                    bytes[at..end].copy_from_slice(&token[..end - at]);
                }
                _ => bytes.truncate(at.max(512)),
            }
        }
        sums(&mut bytes);
        let begun = Instant::now();
        if let Ok(all) = read(&bytes[..]) {
            let kept: usize = all
                .iter()
                .map(|(m, _)| {
                    m.path.len() + m.xattrs.iter().map(|(k, v)| k.len() + v.len()).sum::<usize>()
                })
                .sum();
            assert!(kept <= bytes.len(), "round {round}");
        }
        assert!(
            begun.elapsed() < Duration::from_secs(10),
            "round {round} took {:?}",
            begun.elapsed()
        );
    }
}
