//! How a layer's bytes are compressed (rows `cmp.*`).

use shipway_fault::{Fault, Result};
use shipway_gocompat::parse_bool;
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
    /// The kind a layer's media type names, or `None` for types that are not known layers.
    pub fn of_media_type(media_type: &str) -> Option<Self> {
        let base = media_type.strip_prefix("application/vnd.")?;
        match base {
            "oci.image.layer.v1.tar"
            | "oci.image.layer.nondistributable.v1.tar"
            | "docker.image.rootfs.diff.tar" => Some(Self::Uncompressed),
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
                return Err(Fault::invalid(format!(
                    "unsupported layer compression type {other:?}"
                ))
                .hint("use one of: uncompressed, gzip, zstd"));
            }
        };
        let level = match level {
            None | Some("") => None,
            Some(text) => Some(text.parse().map_err(|_| {
                Fault::invalid(format!("compression-level {text:?} is not a number"))
            })?),
        };
        let force = match force {
            None => false,
            Some("") => true,
            Some(text) => parse_bool(text).ok_or_else(|| {
                Fault::invalid(format!("non-bool value {text} specified for force-compression"))
                    .hint("use true or false")
            })?,
        };
        Ok(Self { kind, level, force })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn force_is_spelled_as_go_spells_it() {
        let force = |text| Compression::parse(None, None, Some(text)).map(|c| c.force);
        for (texts, want) in [
            (["", "1", "t", "T", "TRUE", "true", "True"], true),
            (["0", "f", "F", "false", "FALSE", "False", "0"], false),
        ] {
            for text in texts {
                assert_eq!(force(text).unwrap(), want, "{text}");
            }
        }
        assert_eq!(
            force("yes").unwrap_err().to_string(),
            "non-bool value yes specified for force-compression"
        );
    }

    #[test]
    fn levels_are_numbers_and_kinds_have_names() {
        let level = |text| Compression::parse(Some("zstd"), text, None).map(|c| (c.kind, c.level));
        for (text, want) in
            [(None, None), (Some(""), None), (Some("19"), Some(19)), (Some("-1"), Some(-1))]
        {
            assert_eq!(level(text).unwrap(), (CompressionKind::Zstd, want), "{text:?}");
        }
        assert_eq!(
            level(Some("best")).unwrap_err().to_string(),
            "compression-level \"best\" is not a number"
        );
        let kind = |text| {
            Compression::parse(Some(text), None, None).map(|c| c.kind).map_err(|f| f.to_string())
        };
        assert_eq!(
            (kind(""), kind("uncompressed")),
            (Ok(CompressionKind::Gzip), Ok(CompressionKind::Uncompressed))
        );
        for (text, why) in [
            ("estargz", "compression=estargz"),
            ("nydus", "unsupported layer compression type \"nydus\""),
        ] {
            assert!(kind(text).unwrap_err().contains(why), "{text}");
        }
    }
}
