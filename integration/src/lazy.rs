//! Layers with a table of contents, made of ordinary ones, and what tests read in them.

use shipway_archive::TarReader;
use shipway_estargz::{Dialect, Output, TarEntry, Writer, WriterOptions};
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
    let mut gunzip = Command::new("gzip")
        .arg("-dc")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = gunzip.stdin.take().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(move || stdin.write_all(&layer.blob).unwrap());
        gunzip.wait_with_output().unwrap().stdout
    })
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
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("data")).unwrap();
    for n in 0..files {
        std::fs::write(dir.path().join(format!("data/{n}")), noise(n, size)).unwrap();
    }
    image.layers.push(Layer::of_dir(dir.path()));
    image.layers = image.layers.iter().map(|layer| lazy_layer(layer, output)).collect();
    image.push(registry, "lazy", "1");
}
