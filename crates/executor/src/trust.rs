//! Certificate authorities of the operator's that steps trust without having them in their layers
//! (row `exec.ca`).

use bytes::Bytes;
use shipway_fault::{Class, Fault, Result};
use std::{
    io::Read as _,
    path::{Path, PathBuf},
};

/// Largest bundle, in bytes: a few hundred certificates.
pub const MAX_CA_BUNDLE: u64 = 1 << 20;
const BEGIN: &str = "-----BEGIN ";
const CERTIFICATE: &str = "CERTIFICATE-----";

/// A file of certificates in PEM. It is read for each step, so that a renewed one counts at once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CaBundle(PathBuf);

impl CaBundle {
    /// The bundle at `path`.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self(path.into())
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Its certificates. Blocks.
    ///
    /// # Errors
    /// If it cannot be read, is too large, or has anything but certificates: steps can read all of
    /// it.
    pub fn read(&self) -> Result<Bytes> {
        let shown = self.0.display();
        let failed = |e| {
            Fault::io(format!("read the certificates for steps, {shown}"), e)
                .with_class(Class::Environment)
                .hint("ca.bundle of the daemon's configuration names the file")
        };
        let mut text = String::new();
        let file = std::fs::File::open(&self.0).map_err(failed)?;
        file.take(MAX_CA_BUNDLE + 1).read_to_string(&mut text).map_err(failed)?;
        let wrong = |what: &str| {
            Fault::invalid(format!("{shown}, the certificates for steps, {what}"))
                .with_class(Class::Environment)
                .hint("ca.bundle of the daemon's configuration is a file of certificates in PEM")
        };
        if text.len() as u64 > MAX_CA_BUNDLE {
            return Err(wrong(&format!("exceeds {MAX_CA_BUNDLE} bytes")));
        }
        let mut blocks = text.split(BEGIN).skip(1).peekable();
        if blocks.peek().is_none() {
            return Err(wrong("has no certificate"));
        }
        if !blocks.all(|block| block.starts_with(CERTIFICATE)) {
            return Err(wrong("has something that is not a certificate"));
        }
        Ok(text.into())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const ONE: &str = "# corporate\n-----BEGIN CERTIFICATE-----\nMII=\n-----END CERTIFICATE-----\n";

    #[test]
    fn a_bundle_has_certificates_and_nothing_else() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let read = |text: &str| {
            std::fs::write(file.path(), text).unwrap();
            CaBundle::new(file.path()).read().map_err(|e| e.to_string())
        };
        assert_eq!(read(ONE).unwrap(), ONE);
        assert_eq!(read(&ONE.repeat(3)).unwrap().len(), 3 * ONE.len());
        assert!(read("").unwrap_err().contains("has no certificate"));
        let key = format!("{ONE}-----BEGIN PRIVATE KEY-----\nx\n-----END PRIVATE KEY-----\n");
        assert!(read(&key).unwrap_err().contains("not a certificate"));
        let large = ONE.repeat(MAX_CA_BUNDLE as usize / ONE.len() + 1);
        assert!(read(&large).unwrap_err().contains("exceeds"));
        assert!(CaBundle::new("/no/such/file").read().is_err());
    }
}
