//! Ordinary layers that are unpacked once, into the layer itself, while their blobs come.

use crate::{Layer, LayerStore, Plain, Result, written::Data};
use shipway_estargz::Codec;
use shipway_oci::{DiffId, Digest};
use shipway_plainlayer::{SPAN, Scanner};
use std::{io::Read, sync::Arc};

/// The contents of an ordinary layer, written but not a layer of the store yet. The caller compares
/// [`Unpacked::digest`] with what is wanted. Dropping it removes the data.
pub struct Unpacked {
    plain: Plain,
    data: Data,
}

impl Unpacked {
    /// Digest of the blob that was read.
    pub fn digest(&self) -> Digest {
        self.plain.digest()
    }

    /// Digest of its tar.
    pub fn diff_id(&self) -> DiffId {
        self.plain.diff_id()
    }

    /// Bytes of its data, holes included.
    pub fn bytes(&self) -> u64 {
        self.data.bytes()
    }
}

impl LayerStore {
    /// Reads a whole blob and writes the contents of its files, each byte once.
    ///
    /// Also of a blob that cannot be resumed, such as one long zstd frame: the layer is
    /// [sealed](Layer::is_sealed) then.
    pub fn unpack(&self, codec: Codec, blob: impl Read) -> Result<Unpacked> {
        self.unpack_with_spans_of(SPAN, codec, blob)
    }

    /// With spans of at least `length` bytes of the tar.
    pub fn unpack_with_spans_of(
        &self,
        length: u64,
        codec: Codec,
        blob: impl Read,
    ) -> Result<Unpacked> {
        let mut data = Data::new(self.new_directory()?, self.options.min_free)?;
        let scanner = Scanner::new(codec, blob).map_err(shipway_plainlayer::Error::from)?;
        let scanner = scanner.spans_of(length).allow_long_spans();
        let plain = Plain::of(codec, scanner, Some(&mut data))?;
        Ok(Unpacked { plain, data })
    }

    /// Makes a layer that was seen in `repository`, `host/name`, of a blob that was unpacked, which
    /// the caller has checked to be the one that is wanted. It is
    /// [whole](crate::State::Whole), and on the disk. If the layer is there already, in whatever
    /// state, this is that one.
    ///
    /// [`crate::Error::Refused`] if the layer has to be unpacked the ordinary way.
    pub fn create_unpacked(&self, unpacked: Unpacked, repository: &str) -> Result<Arc<Layer>> {
        let Unpacked { plain, data } = unpacked;
        self.create_of(&plain, Some(&data), repository)
    }
}
