//! Content digests and the identifiers made of them. `ring`, which TLS brings anyway, hashes about
//! half again as fast as `sha2`, and bytes of layers are hashed several times on their way.

use ring::digest::{Context, SHA256};
use serde::{Deserialize, Serialize};
use std::{fmt, str::FromStr};

/// A sha256 digest, printed as `sha256:<hex>`. Copyable: 32 bytes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Digest([u8; 32]);

/// Why a text is not a valid digest.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("invalid digest {0:?}: want sha256:<64 hex characters>")]
pub struct DigestError(pub String);

impl DigestError {
    /// The digest library's words for it, which clients show.
    pub fn words(&self) -> &'static str {
        const FORMAT: &str = "invalid checksum digest format";
        match self.0.split_once(':') {
            None | Some(("", _) | (_, "")) => FORMAT,
            Some(("sha256", hex)) if hex.len() != 64 => "invalid checksum digest length",
            Some(("sha256", _)) => FORMAT,
            Some((algorithm, hex)) => {
                let word = |w: &str| {
                    w.starts_with(|c: char| c.is_ascii_lowercase())
                        || w.starts_with(|c: char| c.is_ascii_digit())
                };
                let known = algorithm.split(['.', '_', '+', '-']).all(word)
                    && hex.chars().all(|c| c.is_ascii_alphanumeric() || "=_-".contains(c));
                if known { "unsupported digest algorithm" } else { FORMAT }
            }
        }
    }
}

/// Incremental sha256.
#[derive(Clone)]
pub struct Hasher(Context);

impl fmt::Debug for Hasher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Hasher")
    }
}

impl Default for Hasher {
    fn default() -> Self {
        Self(Context::new(&SHA256))
    }
}

impl Hasher {
    /// A hasher of nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds bytes.
    pub fn update(&mut self, bytes: impl AsRef<[u8]>) {
        self.0.update(bytes.as_ref());
    }

    /// The digest of all bytes added.
    pub fn finish(self) -> Digest {
        Digest::of_ring(&self.0.finish())
    }
}

impl Digest {
    fn of_ring(digest: &ring::digest::Digest) -> Self {
        let mut bytes = [0; 32];
        bytes.copy_from_slice(digest.as_ref());
        Self(bytes)
    }

    /// The digest of `bytes`.
    pub fn of(bytes: impl AsRef<[u8]>) -> Self {
        Self::of_ring(&ring::digest::digest(&SHA256, bytes.as_ref()))
    }

    /// The digest with these raw bytes.
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// Raw bytes.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The 64 hex characters, without the algorithm.
    pub fn hex(&self) -> String {
        hex::encode(self.0)
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.hex())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", &self.hex()[..12])
    }
}

impl FromStr for Digest {
    type Err = DigestError;

    fn from_str(s: &str) -> Result<Self, DigestError> {
        let bad = || DigestError(s.chars().take(100).collect());
        let hex = s.strip_prefix("sha256:").ok_or_else(bad)?;
        let mut bytes = [0; 32];
        hex::decode_to_slice(hex, &mut bytes).map_err(|_| bad())?;
        if hex.bytes().any(|b| b.is_ascii_uppercase()) {
            return Err(bad());
        }
        Ok(Self(bytes))
    }
}

impl Serialize for Digest {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let s = std::borrow::Cow::<str>::deserialize(d)?;
        s.parse().map_err(serde::de::Error::custom)
    }
}

macro_rules! id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub Digest);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:?})"), self.0)
            }
        }

        impl FromStr for $name {
            type Err = DigestError;
            fn from_str(s: &str) -> Result<Self, DigestError> {
                s.parse().map(Self)
            }
        }
    };
}

id! {
    /// Digest of a layer's uncompressed tar. Changes with any byte of the tar, not with its
    /// compression.
    DiffId
}
id! {
    /// Identity of a stack of layers: the first layer's diffID, then
    /// `sha256(parent + " " + diffID)` for each above it (OCI image-spec, config.md, "Layer
    /// ChainID"). It is the *name* of the committed snapshot in containerd.
    ChainId
}

impl ChainId {
    /// The chain id of `layer` on top of `parent`.
    pub fn extend(parent: Option<ChainId>, layer: DiffId) -> Self {
        match parent {
            None => Self(layer.0),
            Some(p) => Self(Digest::of(format!("{p} {layer}"))),
        }
    }

    /// The chain id of a whole stack, lowest layer first; `None` for no layers.
    pub fn of(layers: impl IntoIterator<Item = DiffId>) -> Option<Self> {
        layers.into_iter().fold(None, |parent, layer| Some(Self::extend(parent, layer)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_round_trip_and_refuse_what_is_none() {
        let d = Digest::of("hello");
        assert_eq!(d.to_string().parse(), Ok(d));
        for bad in ["", "sha256:", "sha256:zz", "md5:00", &d.to_string().to_uppercase()] {
            assert!(bad.parse::<Digest>().is_err(), "{bad}");
        }
    }

    #[test]
    fn chain_ids_follow_the_specification() {
        let (a, b) = (DiffId(Digest::of("a")), DiffId(Digest::of("b")));
        assert_eq!(ChainId::of([a]), Some(ChainId(a.0)));
        assert_eq!(ChainId::of([a, b]), Some(ChainId(Digest::of(format!("{a} {b}")))));
        assert_eq!(ChainId::of([]), None);
    }
}
