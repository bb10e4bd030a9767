//! The time of the newest file in an archive, for builds that are to look as old as their source
//! (row `df.arg.sde`).

use crate::{MemberKind, TarReader, inflate};
use shipway_fault::{Fault, Result};
use std::io::{self, BufRead};

/// The time of the newest regular file in a tar archive, in seconds since the epoch; plain, or
/// compressed with gzip, bzip2, xz or zstd. None if it has no file; an error if `input` is no
/// archive. Blocks: call it off the async threads.
pub fn newest_file(input: impl BufRead) -> Result<Option<i64>> {
    let fail = |e: io::Error| Fault::invalid(format!("read the archive: {e}"));
    let mut archive = TarReader::new(inflate(input).map_err(fail)?);
    let mut newest = None;
    while let Some(member) = archive.next_member().map_err(fail)? {
        if member.kind == MemberKind::File {
            newest = newest.max(Some(member.mtime.div_euclid(1_000_000_000)));
        }
    }
    Ok(newest)
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
        assert_eq!(newest_file(&plain[..]).expect("tar"), Some(9));
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(&plain).expect("compress");
        assert_eq!(newest_file(&gzip.finish().expect("compress")[..]).expect("tar.gz"), Some(9));
        assert_eq!(newest_file(&archive(&[(Directory, 20)])[..]).expect("tar"), None);
        assert!(newest_file(&[b'x'; 2000][..]).is_err());
    }
}
