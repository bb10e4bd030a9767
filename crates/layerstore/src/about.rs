//! What a layer is: one small file of text that says so, with a checksum.

use crate::{Error, Refused, Result, disk};
use serde::{Deserialize, Serialize};
use shipway_estargz::{Codec, Landmark};
use shipway_oci::{DiffId, Digest, Hasher};
use std::{fmt, path::Path};

/// Name of the file.
pub(crate) const ABOUT: &str = "about";
/// Version of all that is in the directory of a layer; layers of another are made again.
const VERSION: u32 = 1;
/// Most bytes of it.
pub const MAX_ABOUT: u64 = 64 << 10;
/// Most repositories that a layer remembers; later ones take the place of the oldest.
pub const MAX_REPOSITORIES: usize = 32;
/// Most bytes of a repository's name, host included.
pub const MAX_REPOSITORY: usize = 512;
/// Most bytes of the difference that a lying layer remembers.
const MAX_DIFFERENCE: usize = 1024;

/// What makes two layers the same: the same blob, read by the same table of contents.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct LayerKey {
    /// Digest of the blob, as the manifest has it.
    pub blob: Digest,
    /// Digest of the table of contents, as the manifest has it, or of another index.
    pub toc: Digest,
}

impl LayerKey {
    /// A hash of both.
    pub(crate) fn digest(&self) -> Digest {
        let mut hasher = Hasher::new();
        hasher.update(self.blob.as_bytes());
        hasher.update(self.toc.as_bytes());
        hasher.finish()
    }

    /// The UUID of the layer's file system: layers that meet in one overlay should differ in it.
    pub fn uuid(&self) -> [u8; 16] {
        let mut uuid = [0; 16];
        uuid.copy_from_slice(&self.digest().as_bytes()[..16]);
        uuid
    }
}

/// Number of a layer, and the name of its directory. None is used twice between two starts of the
/// machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct LayerNumber(pub u32);

impl fmt::Display for LayerNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What is told of a layer, beside its key, when it is made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Description {
    /// Bytes of the blob.
    pub blob_size: u64,
    /// How it is compressed.
    pub codec: Codec,
    /// Where it was seen: `host/name`.
    pub repository: String,
}

/// How much is known of a layer's data.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum State {
    /// Parts may be there; all are checked before they are served.
    #[default]
    Lazy,
    /// All of it is there and on the disk, and the tar says the same as the table of contents.
    Whole,
    /// The tar says something else than the table of contents: the first difference.
    Lying(String),
}

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum StoredCodec {
    Gzip,
    Zstd,
    // Earlier versions refuse these, and so have the layers made again.
    PlainGzip,
    PlainZstd,
    SealedGzip,
    SealedZstd,
    IndexedGzip,
}

/// How the pieces of a layer's blob are decompressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pieces {
    /// Each is a gzip member or zstd frame.
    Frames,
    /// By a file of spans, of this length and digest.
    Spans(u64, Digest),
    /// Not at all: the layer is whole, or it is not there.
    Sealed,
    /// By a file of spans that somebody else made, with a file of entries: lengths and digests of
    /// both.
    Indexed([(u64, Digest); 2]),
}

/// What never changes.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Fixed {
    version: u32,
    pub key: LayerKey,
    pub number: LayerNumber,
    pub blob_size: u64,
    codec: StoredCodec,
    /// As in [`Landmark`]: none, or where to stop fetching at once; zero for nothing ahead.
    landmark: Option<u64>,
    pub frames: u32,
    pub chunks: u32,
    pub data_blocks: u64,
    pub meta_bytes: u64,
    pub meta_digest: Digest,
    /// Of the file of spans, which only plain layers have.
    #[serde(default)]
    pub spans_bytes: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spans_digest: Option<Digest>,
    /// Of the file of entries, which only layers have that somebody else's index is of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub entries: Option<(u64, Digest)>,
    /// Digest of the tar, where all of it was read before the layer was made: of plain layers. Of
    /// those with somebody else's index, what the image's config says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub diff_id: Option<DiffId>,
}

impl Fixed {
    pub fn codec(&self) -> Codec {
        match self.codec {
            StoredCodec::Gzip
            | StoredCodec::PlainGzip
            | StoredCodec::SealedGzip
            | StoredCodec::IndexedGzip => Codec::Gzip,
            StoredCodec::Zstd | StoredCodec::PlainZstd | StoredCodec::SealedZstd => Codec::Zstd,
        }
    }

    pub fn is_plain(&self) -> bool {
        !matches!(self.codec, StoredCodec::Gzip | StoredCodec::Zstd)
    }

    pub fn is_sealed(&self) -> bool {
        matches!(self.codec, StoredCodec::SealedGzip | StoredCodec::SealedZstd)
    }

    pub fn landmark(&self) -> Option<Landmark> {
        self.landmark.map(|end| match end {
            0 => Landmark::NoPrefetch,
            end => Landmark::Prefetch { end },
        })
    }

    pub fn set(&mut self, codec: Codec, landmark: Option<Landmark>, pieces: Pieces) {
        self.codec = match (codec, pieces) {
            (Codec::Gzip, Pieces::Frames) => StoredCodec::Gzip,
            (Codec::Zstd, Pieces::Frames) => StoredCodec::Zstd,
            (Codec::Gzip, Pieces::Spans(..)) => StoredCodec::PlainGzip,
            (Codec::Zstd, Pieces::Spans(..)) => StoredCodec::PlainZstd,
            (Codec::Gzip, Pieces::Sealed) => StoredCodec::SealedGzip,
            (Codec::Zstd, Pieces::Sealed) => StoredCodec::SealedZstd,
            // Only gzip has such indexes.
            (_, Pieces::Indexed(_)) => StoredCodec::IndexedGzip,
        };
        (self.spans_bytes, self.spans_digest) = match pieces {
            Pieces::Spans(bytes, digest) | Pieces::Indexed([(bytes, digest), _]) => {
                (bytes, Some(digest))
            }
            Pieces::Frames | Pieces::Sealed => (0, None),
        };
        self.entries = match pieces {
            Pieces::Indexed([_, entries]) => Some(entries),
            Pieces::Spans(..) | Pieces::Frames | Pieces::Sealed => None,
        };
        // No blob has data at its very beginning, where a header is.
        self.landmark = landmark.map(|landmark| match landmark {
            Landmark::NoPrefetch => 0,
            Landmark::Prefetch { end } => end,
        });
    }

    pub fn new(key: LayerKey, number: LayerNumber) -> Self {
        Self {
            version: VERSION,
            key,
            number,
            blob_size: 0,
            codec: StoredCodec::Gzip,
            landmark: None,
            frames: 0,
            chunks: 0,
            data_blocks: 0,
            meta_bytes: 0,
            meta_digest: Digest::from_bytes([0; 32]),
            spans_bytes: 0,
            spans_digest: None,
            entries: None,
            diff_id: None,
        }
    }
}

/// What changes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Changing {
    /// Where the layer was seen, the latest last.
    pub repositories: Vec<String>,
    /// The first difference between tar and table of contents, if one was found.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lie: Option<String>,
}

impl Changing {
    /// Adds a repository; says whether that changed anything.
    pub fn add(&mut self, repository: &str) -> Result<bool> {
        if repository.len() > MAX_REPOSITORY {
            return Err(Refused::RepositoryName.into());
        }
        if repository.is_empty() || self.repositories.iter().any(|known| known == repository) {
            return Ok(false);
        }
        if self.repositories.len() >= MAX_REPOSITORIES {
            self.repositories.remove(0);
        }
        self.repositories.push(repository.to_owned());
        Ok(true)
    }

    /// Makes it a lying one.
    pub fn lies(&mut self, difference: &str) {
        let cut = difference.floor_char_boundary(MAX_DIFFERENCE);
        self.lie = Some(difference[..cut].to_owned());
    }
}

/// Both, as they are in the file.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct About {
    #[serde(flatten)]
    pub fixed: Fixed,
    #[serde(flatten)]
    pub changing: Changing,
}

impl About {
    fn encode(&self) -> Result<Vec<u8>> {
        let mut text =
            serde_json::to_vec(self).map_err(|e| Error::io("write what a layer is", e))?;
        let sum = Digest::of(&text).to_string();
        text.push(b'\n');
        text.extend_from_slice(sum.as_bytes());
        text.push(b'\n');
        Ok(text)
    }

    fn decode(bytes: &[u8]) -> Result<Self, &'static str> {
        let (text, sum) = bytes
            .strip_suffix(b"\n")
            .and_then(|b| b.iter().rposition(|c| *c == b'\n').map(|at| (&b[..at], &b[at + 1..])))
            .ok_or("it has no checksum")?;
        if Digest::of(text).to_string().as_bytes() != sum {
            return Err("its checksum is wrong");
        }
        let about: Option<Self> = serde_json::from_slice(text).ok();
        about
            .filter(|about| about.fixed.version == VERSION)
            .ok_or("it is not of a version that is known")
    }

    /// Puts it in the directory of a layer, in the place of what was there.
    pub fn save(&self, directory: &Path, durable: bool) -> Result<()> {
        disk::replace(directory, ABOUT, &self.encode()?, durable)
    }

    pub fn load(directory: &Path, number: LayerNumber) -> Result<Self> {
        let damaged = |why| Error::Damaged { layer: number, file: ABOUT, why };
        let bytes = disk::read(&directory.join(ABOUT), MAX_ABOUT)?.ok_or(damaged("it is long"))?;
        let about = Self::decode(&bytes).map_err(damaged)?;
        if about.fixed.number != number {
            return Err(damaged("it is of another layer"));
        }
        Ok(about)
    }
}
