//! The time of the newest file in an archive, for builds that are to look as old as their source (row `df.arg.sde`).

use shipway_fault::{Fault, Result};
use std::io::{self, Read};

/// The time of the newest regular file in a tar archive, in seconds since the epoch; plain, or compressed with gzip, bzip2, xz or zstd. None if
/// it has no file; an error if `data` is no archive.
pub fn newest_file(data: &[u8]) -> Result<Option<i64>> {
    let fail = |e: io::Error| Fault::invalid(format!("read the archive: {e}"));
    let mut archive = tar::Archive::new(inflated(data).map_err(fail)?);
    let mut newest = None;
    for entry in archive.entries().map_err(fail)? {
        let entry = entry.map_err(fail)?;
        if entry.header().entry_type().is_file() {
            let time = i64::try_from(entry.header().mtime().map_err(fail)?).unwrap_or(i64::MAX);
            newest = newest.max(Some(time));
        }
    }
    Ok(newest)
}

fn inflated(data: &[u8]) -> io::Result<Box<dyn Read + '_>> {
    Ok(match data {
        [0x1f, 0x8b, 0x08, ..] => Box::new(flate2::read::MultiGzDecoder::new(data)),
        [b'B', b'Z', b'h', ..] => Box::new(bzip2::read::MultiBzDecoder::new(data)),
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => Box::new(liblzma::read::XzDecoder::new_multi_decoder(data)),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Box::new(zstd::stream::read::Decoder::new(data)?),
        _ => Box::new(data),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;

    fn archive(times: &[(tar::EntryType, u64)]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for (kind, time) in times {
            let mut header = tar::Header::new_gnu();
            header.set_entry_type(*kind);
            header.set_mtime(*time);
            header.set_size(0);
            builder.append_data(&mut header, format!("f{time}"), io::empty()).expect("append");
        }
        builder.into_inner().expect("finish")
    }

    #[test]
    fn the_newest_regular_file_counts() {
        use tar::EntryType::{Directory, Regular};
        let plain = archive(&[(Regular, 5), (Regular, 9), (Regular, 7), (Directory, 20)]);
        assert_eq!(newest_file(&plain).expect("tar"), Some(9));
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(&plain).expect("compress");
        assert_eq!(newest_file(&gzip.finish().expect("compress")).expect("tar.gz"), Some(9));
        assert_eq!(newest_file(&archive(&[(Directory, 20)])).expect("tar"), None);
        assert!(newest_file(&[b'x'; 2000]).is_err());
    }
}
