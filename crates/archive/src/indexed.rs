//! Layers with a table of contents: the tar that a layer is made of goes through the one reader of
//! tars on its way to the writer that decides where members or frames begin.
//!
//! The tar stays as it is, byte for byte. eStargz has its table behind the end of the archive,
//! where no reader of tars looks, but a digest of the whole is another one: the layer has a diffID
//! of its own, and unpacks to the same files. zstd:chunked has it where zstd skips it.

use crate::{
    Compression, CompressionKind, Indexed, Loss, Member, MemberKind, Packed, Tar, TarReader,
    block::joined,
    header,
    tar::{
        self,
        block::{self, Header},
    },
};
use bytes::{Buf as _, Bytes};
use libdeflater::Crc;
use shipway_estargz::{
    Dialect, MAX_ENTRIES, Order, Output, TOC_NAME, TarEntry, TarKind, Time, Writer, WriterOptions,
    files_in,
};
use shipway_fault::{Code, Fault, Result};
use shipway_oci::{DiffId, Hasher};
use std::{
    fs::File,
    io::{self, Read},
    mem,
    num::NonZero,
    ops::Range,
    os::unix::fs::FileExt as _,
    sync::mpsc::{Receiver, SyncSender, sync_channel},
    thread,
};

/// Bytes of a chunk where the options say nothing: what is fetched for one byte of a large file.
const CHUNK: u32 = 4 << 20;
/// Most bytes in the hands of the threads that compress, of which each has two chunks.
const IN_HAND: usize = 256 << 20;
/// Bytes of a file that are handed on at once.
const PIECE: usize = 128 << 10;
/// Most bytes of one entry's headers, and of what follows data: several of the largest extended
/// headers.
const MAX_HEADERS: usize = 8 << 20;
/// Blocks of the tar, and pieces of the blob, on their way between threads.
const QUEUE: usize = 8;

/// What becomes of files that the tar has under the names of those that the format adds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FormatFiles {
    /// They are the image's own: a layer with one cannot be written.
    Refused,
    /// An earlier writer of the format put them there, and they go. What is left is another tar
    /// than the one that was given.
    LeftOut,
}

/// Files of a layer in the order in which they are read.
#[derive(Clone, Copy, Debug)]
pub enum FirstFiles<'a> {
    /// By path. Those that the layer has not are passed over.
    Paths(&'a [Vec<u8>]),
    /// By pieces of the file of data that a snapshotter has of the layer
    /// ([`shipway_estargz::files_in`]).
    Pieces(&'a [Range<u64>]),
}

/// What of a layer is read first, so that it is to come first.
#[derive(Debug)]
pub struct ReadFirst<'a> {
    /// The files.
    pub files: FirstFiles<'a>,
    /// An empty file for the layer's tar, since what comes first may be at its end.
    pub spool: File,
}

/// How the writer is to write, and for whom.
fn options(compression: Compression, threads: usize) -> Result<(WriterOptions, Dialect)> {
    let (output, dialect) = match compression.kind {
        CompressionKind::Estargz => (Output::Estargz, Dialect::Containerd),
        CompressionKind::ZstdChunked(dialect) => (Output::ZstdChunked, dialect),
        plain => return Err(Fault::internal(format!("{plain} has no table of contents"))),
    };
    let chunk = compression.chunk_size.map_or(CHUNK, NonZero::get);
    let most = (IN_HAND / 2 / chunk as usize).max(1);
    Ok((
        WriterOptions {
            level: compression.level,
            chunk_size: chunk.into(),
            min_chunk_size: compression.min_chunk_size.map_or(0, NonZero::get).into(),
            // Nobody else looks for it.
            tar_split: dialect == Dialect::Podman,
            threads: NonZero::new(threads.min(most)).unwrap_or(NonZero::<usize>::MIN),
            ..WriterOptions::new(output)
        },
        dialect,
    ))
}

/// As [`crate::pack::flow`], with a table of contents.
pub(crate) fn flow(
    compression: Compression,
    (known, format_files): (Option<Tar>, FormatFiles),
    first: Option<ReadFirst<'_>>,
    threads: usize,
    produce: impl FnOnce(&mut dyn FnMut(Bytes) -> bool) -> Result<Option<Loss>> + Send,
    sink: &mut dyn FnMut(Bytes) -> Result<()>,
) -> Result<Packed> {
    let (options, dialect) = options(compression, threads)?;
    thread::scope(|scope| {
        let (to_index, blocks) = sync_channel::<Bytes>(QUEUE);
        let (done, results) = sync_channel::<Bytes>(QUEUE);
        let reading = scope.spawn(move || produce(&mut |block| to_index.send(block).is_ok()));
        let tar = known.clone();
        let indexing = scope
            .spawn(move || index(blocks, (tar, format_files), first, (options, dialect), done));
        let mut taken = Ok(());
        for bytes in &results {
            taken = sink(bytes);
            if taken.is_err() {
                break;
            }
        }
        // The thread that writes into it ends now, and the one that feeds that.
        drop(results);
        let (produced, indexed) = (joined(reading.join())?, joined(indexing.join())?);
        taken?;
        // A thread that is no longer read from was cancelled, and that is not the reason.
        let loss = match produced {
            Err(e) if e.is_cancelled() => return Err(indexed.err().unwrap_or(e)),
            produced => produced?,
        };
        let packed = indexed?;
        packed.tar.check(known.as_ref())?;
        Ok(Packed { loss, ..packed })
    })
}

/// Writes the layer whose tar comes in `blocks`.
fn index(
    blocks: Receiver<Bytes>,
    (known, format_files): (Option<Tar>, FormatFiles),
    first: Option<ReadFirst<'_>>,
    (options, dialect): (WriterOptions, Dialect),
    done: SyncSender<Bytes>,
) -> Result<Packed> {
    let is_estargz = options.output == Output::Estargz;
    let sink = move |bytes: &[u8]| {
        let sent = done.send(Bytes::copy_from_slice(bytes));
        sent.map_err(|_| io::Error::other(Fault::cancelled()))
    };
    let mut writer = match &known {
        Some(tar) => Writer::of_known(options, tar.hasher.clone(), sink)?,
        None => Writer::new(options, sink)?,
    };
    let input = Input {
        blocks,
        block: Bytes::new(),
        kept: Vec::new(),
        keeps: true,
        position: 0,
        crc: Crc::new(),
        size: 0,
        // The writer hashes what it is given, which may be less, or in another order.
        hasher: (format_files == FormatFiles::LeftOut).then(Hasher::new),
        spool: None,
    };
    let input = match first {
        Some(first) => reorder(input, &first, &mut writer)?,
        None => stream(input, (is_estargz, format_files), &mut writer)?,
    };
    let written = writer.finish().map_err(refused)?;
    let indexed = Indexed { diff_id: written.diff_id, annotations: written.annotations(dialect) };
    let hasher = input.hasher.unwrap_or(written.payload);
    let diff_id = known.map_or_else(|| DiffId(hasher.clone().finish()), |tar| tar.diff_id);
    Ok(Packed {
        tar: Tar { diff_id, size: input.size, crc: input.crc.sum(), hasher },
        digest: written.digest,
        size: written.size,
        loss: None,
        indexed: Some(indexed),
    })
}

/// Writes the tar as it comes.
fn stream(
    input: Input,
    (is_estargz, format_files): (bool, FormatFiles),
    writer: &mut Writer<impl FnMut(&[u8]) -> io::Result<()>>,
) -> Result<Input> {
    let (mut reader, mut buffer) = (TarReader::new(input), vec![0; PIECE]);
    while let Some(member) = reader.next_member().map_err(broken)? {
        let entry = entry(member);
        let is_left_out = entry.is_of_format() && format_files == FormatFiles::LeftOut;
        if is_estargz && entry.is_of_format() && !is_left_out {
            let path = String::from_utf8_lossy(&entry.path).into_owned();
            return Err(Fault::new(
                Code::FailedPrecondition,
                format!("a layer with the file {path} cannot be written as eStargz: the format has its own there"),
            )
            .hint("remove the file in the step that makes it, or use compression=zstdchunked"));
        }
        let headers = mem::take(&mut reader.input().kept);
        if is_left_out {
            reader.input().keeps = false;
            reader.skip().map_err(broken)?;
            reader.input().keeps = true;
            continue;
        }
        writer.entry(&entry, &headers).map_err(refused)?;
        reader.input().keeps = false;
        while writer.wants_data() {
            let room = writer.room(PIECE).map_err(refused)?;
            let Some(piece) = reader.piece(room).map_err(broken)? else {
                writer.filled(0).map_err(refused)?;
                break;
            };
            writer.filled(piece.len).map_err(refused)?;
        }
        // A file that has more than its header says is refused.
        while let Some(piece) = reader.piece(&mut buffer).map_err(broken)? {
            writer.data(&buffer[..piece.len]).map_err(refused)?;
        }
        reader.input().keeps = true;
        // Padding.
        reader.skip().map_err(broken)?;
        writer.raw(&mem::take(&mut reader.input().kept)).map_err(refused)?;
    }
    let mut input = reader.into_input();
    writer.raw(&mem::take(&mut input.kept)).map_err(refused)?;
    input.keeps = false;
    // What lossless writers of eStargz append.
    while format_files == FormatFiles::LeftOut
        && let Some(block) = block::read(&mut input).map_err(broken)?
    {
        let header = Header(block);
        if header.is_whole() && header.name() == TOC_NAME.as_bytes() {
            io::copy(&mut input, &mut io::sink()).map_err(broken)?;
        } else {
            writer.raw(&header.0).map_err(refused)?;
        }
    }
    loop {
        match input.read(&mut buffer).map_err(broken)? {
            0 => return Ok(input),
            n => writer.raw(&buffer[..n]).map_err(refused)?,
        }
    }
}

/// A member in the spool.
struct Spooled {
    entry: TarEntry,
    /// Where its headers begin, where its data does, and where its padding ends.
    headers: u64,
    data: u64,
    end: u64,
}

/// Writes the tar with what is read first at its beginning, and a landmark after that.
fn reorder(
    mut input: Input,
    first: &ReadFirst<'_>,
    writer: &mut Writer<impl FnMut(&[u8]) -> io::Result<()>>,
) -> Result<Input> {
    let spool = first.spool.try_clone().map_err(spooling)?;
    (input.spool, input.keeps) = (Some(spool), false);
    let (mut reader, mut members) = (TarReader::new(input), Vec::new());
    loop {
        let headers = reader.input().position;
        let Some(member) = reader.next_member().map_err(broken)? else { break };
        let data = reader.input().position;
        reader.skip().map_err(broken)?;
        let end = reader.input().position;
        members.push(Spooled { entry: entry(member), headers, data, end });
        if members.len() > MAX_ENTRIES {
            return Err(Fault::new(
                Code::ResourceExhausted,
                format!("a layer has more than {MAX_ENTRIES} entries"),
            ));
        }
    }
    let mut input = reader.into_input();
    io::copy(&mut input, &mut io::sink()).map_err(broken)?;
    let entries = || members.iter().map(|member| &member.entry);
    let order = match first.files {
        FirstFiles::Paths(paths) => Order::new(entries(), paths),
        FirstFiles::Pieces(pieces) => {
            Order::new(entries(), &files_in(entries(), pieces.iter().cloned()))
        }
    };
    let mut buffer = vec![0; PIECE];
    let mut put = |at: usize, writer: &mut Writer<_>| {
        let Spooled { entry, headers, data, end } = &members[at];
        let size = data - headers;
        if size > MAX_HEADERS as u64 {
            return Err(broken(tar::broken("the headers of an entry are too large")));
        }
        let mut head = vec![0; size as usize];
        first.spool.read_exact_at(&mut head, *headers).map_err(spooling)?;
        writer.entry(entry, &head).map_err(refused)?;
        let padding = match entry.kind {
            TarKind::File(size) => (end - data).saturating_sub(size),
            _ => end - data,
        };
        for (from, to, is_data) in [(*data, end - padding, true), (end - padding, *end, false)] {
            let mut at = from;
            while at < to {
                let n = buffer.len().min(usize::try_from(to - at).unwrap_or(usize::MAX));
                first.spool.read_exact_at(&mut buffer[..n], at).map_err(spooling)?;
                let piece = &buffer[..n];
                if is_data { writer.data(piece) } else { writer.raw(piece) }.map_err(refused)?;
                at += n as u64;
            }
        }
        Ok(())
    };
    let is_prefetched = !order.first.is_empty();
    order.first.into_iter().try_for_each(|at| put(at, writer))?;
    writer.landmark(is_prefetched).map_err(refused)?;
    order.rest.into_iter().try_for_each(|at| put(at, writer))?;
    writer.raw(&header::END).map_err(refused)?;
    Ok(input)
}

fn spooling(error: io::Error) -> Fault {
    Fault::io("keep a layer in a temporary file", error)
}

fn broken(error: io::Error) -> Fault {
    match error.downcast::<Fault>() {
        Ok(fault) => fault,
        Err(error) => Fault::new(Code::DataLoss, format!("read a layer: {error}")),
    }
}

/// The fault of what the format has no place for, such as a name that is not valid text.
fn refused(error: shipway_estargz::Error) -> Fault {
    match error {
        shipway_estargz::Error::Io(error) => broken(error),
        error => Fault::from(error)
            .context("give a layer a table of contents")
            .hint("such a layer can be exported with compression=gzip or compression=zstd"),
    }
}

/// The bytes of a tar as they come. Those that are no file's data are kept.
struct Input {
    blocks: Receiver<Bytes>,
    block: Bytes,
    kept: Vec<u8>,
    keeps: bool,
    /// Bytes that were read.
    position: u64,
    crc: Crc,
    size: u64,
    hasher: Option<Hasher>,
    /// Gets everything.
    spool: Option<File>,
}

impl Read for Input {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        while self.block.is_empty() {
            match self.blocks.recv() {
                Ok(block) => {
                    self.crc.update(&block);
                    if let Some(hasher) = &mut self.hasher {
                        hasher.update(&block);
                    }
                    if let Some(spool) = &self.spool {
                        spool.write_all_at(&block, self.size)?;
                    }
                    self.size += block.len() as u64;
                    self.block = block;
                }
                // The end, or of no use any more: the producer knows.
                Err(_) => return Ok(0),
            }
        }
        let n = buf.len().min(self.block.len());
        self.block.copy_to_slice(&mut buf[..n]);
        self.position += n as u64;
        if self.keeps {
            if self.kept.len() + n > MAX_HEADERS {
                return Err(tar::broken("the headers of an entry are too large"));
            }
            self.kept.extend_from_slice(&buf[..n]);
        }
        Ok(n)
    }
}

/// A member in the words of the writer.
fn entry(member: Member) -> TarEntry {
    let Member { path, kind, mode, uid, gid, size, mtime, xattrs, .. } = member;
    let kind = match kind {
        MemberKind::File => TarKind::File(size),
        MemberKind::HardLink(target) => TarKind::HardLink(target),
        MemberKind::Symlink(target) => TarKind::Symlink(target),
        MemberKind::CharDevice(major, minor) => TarKind::CharDevice(major, minor),
        MemberKind::BlockDevice(major, minor) => TarKind::BlockDevice(major, minor),
        MemberKind::Directory => TarKind::Directory,
        MemberKind::Fifo => TarKind::Fifo,
        MemberKind::Other(other) => TarKind::Other(other),
    };
    let mtime = Time {
        seconds: mtime.div_euclid(1_000_000_000),
        nanoseconds: mtime.rem_euclid(1_000_000_000) as u32,
    };
    TarEntry { path, kind, mode, uid, gid, mtime, xattrs }
}
