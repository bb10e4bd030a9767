//! Headers for archives that are written here and are no layers.

/// Bytes of a header; what an entry holds is padded to a multiple of it, and two of zeros end an
/// archive.
pub const BLOCK: usize = 512;

/// The header of an entry of `size` bytes: plain ustar (POSIX.1-1988), which is all that an archive
/// of images needs. `kind` is its type flag, such as `0` for a file; names beyond 100 bytes are
/// cut.
pub fn header(name: &str, size: u64, kind: u8, mode: u32) -> [u8; BLOCK] {
    let mut h = [0u8; BLOCK];
    let mut put = |at: usize, text: &[u8]| h[at..at + text.len()].copy_from_slice(text);
    put(0, &name.as_bytes()[..name.len().min(100)]);
    put(100, format!("{mode:07o}").as_bytes());
    put(108, b"0000000");
    put(116, b"0000000");
    // Sizes beyond octal's eleven digits are binary, as GNU tar and Go have it.
    if size < 1 << 33 {
        put(124, format!("{size:011o}").as_bytes());
    } else {
        put(124, &[0x80]);
        put(128, &size.to_be_bytes());
    }
    put(136, b"00000000000");
    put(148, b"        ");
    put(156, &[kind]);
    put(257, b"ustar\x0000");
    let sum: u32 = h.iter().map(|b| u32::from(*b)).sum();
    h[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    h
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_have_a_right_checksum() {
        let h = header("blobs/sha256/x", 1 << 20, b'0', 0o644);
        let mut blank = h;
        blank[148..156].fill(b' ');
        let sum: u32 = blank.iter().map(|b| u32::from(*b)).sum();
        assert_eq!(u32::from_str_radix(std::str::from_utf8(&h[148..154]).unwrap(), 8), Ok(sum));
        assert_eq!(&header("big", 1 << 40, b'0', 0)[124], &0x80);
    }
}
