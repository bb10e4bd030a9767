//! Checksums in other hash functions than the one that names things: what a policy may want to know
//! of a file.

use sha2::{Digest, Sha256, Sha384, Sha512};
use std::io::{self, Read};

/// A hash function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum ChecksumAlgorithm {
    Sha256,
    Sha384,
    Sha512,
}

fn read<H: Digest>(mut from: impl Read) -> io::Result<Vec<u8>> {
    let (mut hasher, mut buffer) = (H::new(), vec![0; 64 << 10]);
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return Ok(hasher.finalize().to_vec()),
            Ok(n) => hasher.update(&buffer[..n]),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
}

impl ChecksumAlgorithm {
    /// The checksum of all that `from` has, as `<algorithm>:<hex>`.
    pub fn of(self, from: impl Read) -> io::Result<String> {
        let (name, sum) = match self {
            Self::Sha256 => ("sha256", read::<Sha256>(from)?),
            Self::Sha384 => ("sha384", read::<Sha384>(from)?),
            Self::Sha512 => ("sha512", read::<Sha512>(from)?),
        };
        Ok(format!("{name}:{}", hex::encode(sum)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_name_their_function() {
        let check = |algorithm: ChecksumAlgorithm, start: &str| {
            assert!(algorithm.of(&b"abc"[..]).unwrap().starts_with(start))
        };
        check(ChecksumAlgorithm::Sha256, "sha256:ba7816bf");
        check(ChecksumAlgorithm::Sha384, "sha384:cb00753f");
        check(ChecksumAlgorithm::Sha512, "sha512:ddaf35a1");
    }
}
