//! How a layer's bytes are compressed (rows `exp.compression*`).

use shipway_fault::{Fault, Result};
use shipway_oci::media;

/// A compression algorithm.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum CompressionKind {
    /// None: the tar as it is.
    Uncompressed,
    /// gzip.
    #[default]
    Gzip,
    /// zstd.
    Zstd,
}

impl CompressionKind {
    /// The kind a layer's media type names, or `None` for types that are no layer we know.
    pub fn of_media_type(media_type: &str) -> Option<Self> {
        let base = media_type.strip_prefix("application/vnd.")?;
        match base {
            "oci.image.layer.v1.tar" | "oci.image.layer.nondistributable.v1.tar" | "docker.image.rootfs.diff.tar" => {
                Some(Self::Uncompressed)
            }
            "docker.image.rootfs.foreign.diff.tar" => Some(Self::Uncompressed),
            _ if base.ends_with("+gzip") || base.ends_with(".tar.gzip") => Some(Self::Gzip),
            _ if base.ends_with("+zstd") || base.ends_with(".tar.zstd") => Some(Self::Zstd),
            _ => None,
        }
    }

    /// The OCI media type of a layer compressed so.
    pub fn media_type(self) -> &'static str {
        match self {
            Self::Uncompressed => media::OCI_LAYER,
            Self::Gzip => media::OCI_LAYER_GZIP,
            Self::Zstd => media::OCI_LAYER_ZSTD,
        }
    }
}

/// What an exporter asks of layers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Compression {
    /// Algorithm for layers that have no blob yet.
    pub kind: CompressionKind,
    /// Level as the algorithm counts it; `None` for our default.
    pub level: Option<i32>,
    /// Whether layers that exist with another compression are compressed anew.
    pub force: bool,
}

impl Compression {
    /// Reads the exporter attributes `compression`, `compression-level` and `force-compression`.
    pub fn parse(kind: Option<&str>, level: Option<&str>, force: Option<&str>) -> Result<Self> {
        let kind = match kind.unwrap_or_default() {
            "" | "gzip" => CompressionKind::Gzip,
            "uncompressed" => CompressionKind::Uncompressed,
            "zstd" => CompressionKind::Zstd,
            "estargz" => return Err(Fault::unimplemented("compression=estargz")),
            other => {
                return Err(
                    Fault::invalid(format!("unsupported layer compression type {other:?}")).hint("use one of: uncompressed, gzip, zstd")
                );
            }
        };
        let level = match level {
            None | Some("") => None,
            Some(text) => Some(text.parse().map_err(|_| Fault::invalid(format!("compression-level {text:?} is not a number")))?),
        };
        let force = match force {
            None => false,
            Some("") | Some("true") | Some("1") => true,
            Some("false") | Some("0") => false,
            Some(other) => return Err(Fault::invalid(format!("force-compression {other:?} is neither true nor false"))),
        };
        Ok(Self { kind, level, force })
    }
}
