//! Layers with a table of contents, made of ordinary ones, and what tests read in them.

use shipway_archive::TarReader;
use shipway_estargz::{
    Dialect, ESTARGZ_FOOTER, Output, TOC_DIGEST, TarEntry, Writer, WriterOptions,
};
use shipway_oci::Digest;
use shipway_testkit::{BaseImage, Layer};
use std::{
    cell::RefCell,
    io::{Read, Write as _},
    process::{Command, Stdio},
    rc::Rc,
};

/// Keeps what is read through it.
struct Recorder<R>(R, Rc<RefCell<Vec<u8>>>);

impl<R: Read> Read for Recorder<R> {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        let n = self.0.read(buf)?;
        self.1.borrow_mut().extend_from_slice(&buf[..n]);
        Ok(n)
    }
}

/// The tar of a layer.
pub fn tar_of(layer: &Layer) -> Vec<u8> {
    gzip("-dc", &layer.blob)
}

/// What `gzip` makes of some bytes.
fn gzip(options: &str, bytes: &[u8]) -> Vec<u8> {
    let mut gzip = Command::new("gzip")
        .arg(options)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = gzip.stdin.take().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(move || stdin.write_all(bytes).unwrap());
        gzip.wait_with_output().unwrap().stdout
    })
}

/// An eStargz layer whose table of contents has `to` in the place of every `from`, of the same
/// length: a right one of a publisher who lies.
pub fn lying_layer(layer: Layer, replaced: &[(String, String)]) -> Layer {
    // The footer is an empty gzip member that says where the table begins, in 16 hexadecimal
    // digits.
    let (body, footer) = layer.blob.split_at(layer.blob.len() - ESTARGZ_FOOTER);
    let digits = std::str::from_utf8(&footer[16..32]).unwrap();
    let (data, toc) = body.split_at(usize::from_str_radix(digits, 16).unwrap());
    let mut toc = String::from_utf8(gzip("-dc", toc)).unwrap();
    for (from, to) in replaced {
        assert!(from.len() == to.len() && toc.contains(from), "{from}");
        toc = toc.replace(from, to);
    }
    // A tar with one file, whose length is in the header.
    let size = toc[124..135].trim_start_matches('0');
    let json = &toc[512..][..usize::from_str_radix(size, 8).unwrap()];
    let digest = Digest::of(json).to_string();
    let blob = [data, &gzip("-nc", toc.as_bytes()), footer].concat();
    let diff_id = Digest::of(gzip("-dc", &blob)).to_string();
    let mut annotations = layer.annotations;
    annotations.insert(TOC_DIGEST.to_owned(), digest);
    Layer { blob, diff_id, annotations }
}

/// The layer with a table of contents, as our writer makes it.
pub fn lazy_layer(layer: &Layer, output: Output) -> Layer {
    let tar = tar_of(layer);
    let mut blob = Vec::new();
    let mut writer = Writer::new(WriterOptions::new(output), |bytes: &[u8]| {
        blob.extend_from_slice(bytes);
        Ok(())
    })
    .unwrap();
    let seen = Rc::new(RefCell::new(Vec::new()));
    let mut recorder = Recorder(&*tar, seen.clone());
    let mut reader = TarReader::new(&mut recorder);
    let mut buffer = vec![0; 64 << 10];
    while let Some(member) = reader.next_member().unwrap() {
        writer.entry(&TarEntry::from(&member), &seen.take()).unwrap();
        while let Some(piece) = reader.piece(&mut buffer).unwrap() {
            writer.data(&buffer[..piece.len]).unwrap();
            seen.take();
        }
    }
    recorder.read_to_end(&mut Vec::new()).unwrap();
    writer.raw(&seen.take()).unwrap();
    let written = writer.finish().unwrap();
    Layer {
        blob,
        diff_id: written.diff_id.to_string(),
        annotations: written.annotations(Dialect::Containerd),
    }
}

/// `size` bytes that are those of `n` alone: nothing that can be compressed away.
pub fn noise(n: usize, size: usize) -> Vec<u8> {
    let mut state = n as u64 + 0x9E37_79B9_7F4A_7C15;
    std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    })
    .take(size)
    .collect()
}

/// Pushes `lazy:1`: busybox, and a layer with so many files of [`noise`], `/data/0` and so on, both
/// with tables of contents.
pub fn push_noise(registry: &str, files: usize, size: usize, output: Output) {
    let mut image = BaseImage::busybox();
    let files: Vec<_> = (0..files).map(|n| (format!("data/{n}"), noise(n, size))).collect();
    image.layers.push(layer_of(&files));
    image.layers = image.layers.iter().map(|layer| lazy_layer(layer, output)).collect();
    image.push(registry, "lazy", "1");
}

/// An ordinary layer with these files.
pub fn layer_of(files: &[(String, Vec<u8>)]) -> Layer {
    let dir = tempfile::tempdir().unwrap();
    for (path, bytes) in files {
        let path = dir.path().join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, bytes).unwrap();
    }
    Layer::of_dir(dir.path())
}
