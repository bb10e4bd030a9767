//! What the tests share: the workspace's reader of tars in front of this crate, blobs opened as a
//! snapshotter would.

#![allow(dead_code, clippy::unwrap_used)]

use shipway_archive::TarReader;
use shipway_estargz::{
    Annotated, Codec, Comparison, Difference, Expected, Frames, Kind, Layout, Output, Result, Tail,
    TarEntry, Toc, Writer, WriterOptions, Written,
};
use shipway_oci::Digest;
use std::{
    cell::RefCell,
    collections::BTreeMap,
    io::{BufReader, Read},
    path::PathBuf,
    rc::Rc,
};

/// A file that other programs made; see `corpus/README.md`.
pub fn corpus(name: &str) -> Vec<u8> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/corpus").join(name);
    std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// A layer that was opened.
pub struct Opened {
    pub blob: Vec<u8>,
    pub layout: Layout,
    pub toc: Toc,
}

/// Opens a blob by its annotations, as from a registry: first only its last bytes.
pub fn open(
    blob: Vec<u8>,
    annotations: &BTreeMap<String, String>,
    external: Option<&[u8]>,
) -> Result<Opened> {
    let annotated = Annotated::read(annotations)?.expect("a digest of the table of contents");
    let size = blob.len() as u64;
    let end = |n: u64| &blob[(size - n) as usize..];
    let layout = match annotated.layout(size) {
        Some(layout) => layout?,
        None => {
            let Tail::Need(n) = Tail::read(&[], size)? else { panic!("nothing is enough") };
            let Tail::Layout(layout) = Tail::read(end(n), size)? else {
                panic!("{n} bytes are not enough")
            };
            layout
        }
    };
    let expected =
        Expected { digest: annotated.toc_digest, uncompressed_size: annotated.uncompressed_size };
    let toc = match external {
        Some(toc) => Toc::read(toc, &layout, &expected)?,
        None => {
            let missing = layout.missing(size, 0).expect("a table inside");
            Toc::read(
                layout.toc_in(&blob[missing.start as usize..], size).unwrap(),
                &layout,
                &expected,
            )?
        }
    };
    Ok(Opened { layout, toc, blob })
}

impl Opened {
    /// The bytes of a chunk's frame.
    pub fn frame(&self, chunk: &shipway_estargz::Chunk) -> &[u8] {
        &self.blob[chunk.offset as usize..chunk.end as usize]
    }

    /// The data of the file at `path`, chunk by chunk.
    pub fn read(&self, path: &str) -> Result<Vec<u8>> {
        let entry =
            self.toc.find(path.as_bytes()).unwrap_or_else(|| panic!("no {path}")).resolved();
        let Kind::File { size, chunks } = entry.kind() else { panic!("{path} is no file") };
        let mut data = Vec::new();
        for chunk in chunks {
            data.extend(self.toc.read_chunk(self.layout.codec, chunk, self.frame(chunk))?);
        }
        assert_eq!(data.len() as u64, size);
        Ok(data)
    }

    /// The data of all files, frame by frame.
    pub fn read_all(&self) -> Result<BTreeMap<Vec<u8>, Vec<u8>>> {
        let mut all = BTreeMap::new();
        for chunks in self.toc.frames() {
            self.toc.read_frame(
                self.layout.codec,
                chunks,
                self.frame(chunks.last().unwrap()),
                |chunk, bytes| {
                    let data: &mut Vec<u8> =
                        all.entry(self.toc.entry(chunk.file).path().to_vec()).or_default();
                    data.extend_from_slice(bytes);
                    data.resize((chunk.file_offset + chunk.size) as usize, 0);
                    Ok(())
                },
            )?;
        }
        Ok(all)
    }

    /// The first difference between the tar and the table of contents.
    pub fn compare(&self) -> Option<Difference> {
        compare(&self.toc, self.layout.codec, &self.blob)
    }
}

/// The first difference between the tar of `blob` and `toc`.
pub fn compare(toc: &Toc, codec: Codec, blob: &[u8]) -> Option<Difference> {
    let comparison = RefCell::new(Comparison::new(toc, codec));
    let frames = BufReader::new(Frames::new(codec, blob).unwrap());
    each(
        frames,
        |entry, _| _ = comparison.borrow_mut().entry(entry),
        |bytes| comparison.borrow_mut().data(bytes),
    )
    .unwrap();
    comparison.into_inner().finish()
}

/// Keeps what is read through it.
struct Recorder<R>(R, Rc<RefCell<Vec<u8>>>);

impl<R: Read> Read for Recorder<R> {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        let n = self.0.read(buf)?;
        self.1.borrow_mut().extend_from_slice(&buf[..n]);
        Ok(n)
    }
}

/// Reads a tar: each entry with all bytes since the last data, and the data. Gives the bytes at the
/// end.
pub fn each(
    tar: impl Read,
    mut entry: impl FnMut(&TarEntry, &[u8]),
    mut data: impl FnMut(&[u8]),
) -> std::io::Result<Vec<u8>> {
    let seen = Rc::new(RefCell::new(Vec::new()));
    let mut recorder = Recorder(tar, seen.clone());
    let mut reader = TarReader::new(&mut recorder);
    let mut buffer = vec![0; 10_000];
    while let Some(member) = reader.next_member()? {
        entry(&TarEntry::from(&member), &seen.take());
        while let Some(piece) = reader.piece(&mut buffer)? {
            data(&buffer[..piece.len]);
            seen.take();
        }
    }
    recorder.read_to_end(&mut Vec::new())?;
    Ok(seen.take())
}

/// Writes `tar` as a layer, without change to its bytes.
#[track_caller]
pub fn write(tar: &[u8], options: WriterOptions) -> Result<(Vec<u8>, Written)> {
    let mut blob = Vec::new();
    let written = {
        let writer = RefCell::new(Writer::new(options, |bytes: &[u8]| {
            blob.extend_from_slice(bytes);
            Ok(())
        })?);
        let failed = RefCell::new(Ok(()));
        let keep = |result: Result<()>| {
            let mut failed = failed.borrow_mut();
            if failed.is_ok() {
                *failed = result;
            }
        };
        let end = each(
            tar,
            |entry, header| keep(writer.borrow_mut().entry(entry, header)),
            |bytes| keep(writer.borrow_mut().data(bytes)),
        )?;
        failed.into_inner()?;
        let mut writer = writer.into_inner();
        writer.raw(&end)?;
        writer.finish()?
    };
    assert_eq!((written.digest, written.size), (Digest::of(&blob), blob.len() as u64));
    Ok((blob, written))
}

/// Options for small tests.
pub fn options(output: Output, chunk_size: u64) -> WriterOptions {
    WriterOptions { chunk_size, ..WriterOptions::new(output) }
}

/// A small generator of numbers (xorshift).
pub struct Dice(pub u64);

impl Dice {
    pub fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % n.max(1) as u64) as usize
    }

    /// Another seed each time where there is time for random tests (`SHIPWAY_FUZZ_SECONDS`), and
    /// for how long.
    pub fn seeded(seed: u64) -> (Self, Option<std::time::Duration>) {
        let time: Option<u64> =
            std::env::var("SHIPWAY_FUZZ_SECONDS").ok().and_then(|n| n.parse().ok());
        let now = std::time::SystemTime::now()
            .duration_since(std::time::SystemTime::UNIX_EPOCH)
            .map_or(1, |d| d.as_secs());
        let seed = if time.is_some() { now } else { seed };
        println!("seed {seed}");
        // A quarter each for the tests of this crate, as the Dockerfile's parser has the whole.
        (Self(seed), time.map(|n| std::time::Duration::from_secs(n) / 4))
    }
}
