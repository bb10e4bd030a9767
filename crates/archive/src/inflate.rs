//! Decompression of archives that builds are given.

use std::io::{self, BufRead, Cursor, Read};

/// Memory that a decompressor may take: an archive says how large its dictionary is, up to 4 GiB in
/// xz. `xz -9` and `zstd -19` need half of it.
const MAX_MEMORY: u64 = 128 << 20;
/// The same as a power of two, for zstd's window; its own tool has the same limit.
const MAX_WINDOW_LOG: u32 = MAX_MEMORY.ilog2();

/// What `input` holds, decompressed if it begins as gzip, bzip2, xz or zstd do.
pub fn inflate<'a>(mut input: impl BufRead + 'a) -> io::Result<Box<dyn Read + 'a>> {
    let mut magic = Vec::with_capacity(6);
    (&mut input).take(6).read_to_end(&mut magic)?;
    let head = magic.clone();
    let input = Cursor::new(magic).chain(input);
    Ok(match &head[..] {
        [0x1f, 0x8b, 0x08, ..] => Box::new(flate2::bufread::MultiGzDecoder::new(input)),
        [b'B', b'Z', b'h', ..] => Box::new(bzip2::bufread::MultiBzDecoder::new(input)),
        [0xfd, b'7', b'z', b'X', b'Z', 0] => {
            let stream = liblzma::stream::Stream::new_stream_decoder(
                MAX_MEMORY,
                liblzma::stream::CONCATENATED,
            )?;
            Box::new(liblzma::bufread::XzDecoder::new_stream(input, stream))
        }
        // A frame, or one to skip before it.
        [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => {
            let mut decoder = zstd::Decoder::with_buffer(input)?;
            decoder.window_log_max(MAX_WINDOW_LOG)?;
            Box::new(decoder)
        }
        _ => Box::new(input),
    })
}
