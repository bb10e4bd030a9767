//! How a layer's bytes are compressed (rows `cmp.*`).

use shipway_estargz::{Dialect, MAX_CHUNK, PODMAN_CHECKSUM, TOC_DIGEST};
use shipway_fault::{Fault, Result};
use shipway_gocompat::parse_bool;
use shipway_oci::{Descriptor, media};
use std::{fmt, num::NonZero};

/// What layers become: an algorithm, with or without an index.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum CompressionKind {
    /// None: the tar as it is.
    Uncompressed,
    /// gzip.
    #[default]
    Gzip,
    /// zstd.
    Zstd,
    /// gzip with a table of contents behind the end of the tar, which makes it another tar.
    Estargz,
    /// zstd with a table of contents beside the tar, for one of two families of readers: containerd
    /// and its snapshotters know it as `zstdchunked`, podman and its relatives as `zstd:chunked`.
    ZstdChunked(Dialect),
}

/// Names as clients write them.
const NAMES: [(&str, CompressionKind); 6] = [
    ("uncompressed", CompressionKind::Uncompressed),
    ("gzip", CompressionKind::Gzip),
    ("zstd", CompressionKind::Zstd),
    ("estargz", CompressionKind::Estargz),
    ("zstdchunked", CompressionKind::ZstdChunked(Dialect::Containerd)),
    ("zstd:chunked", CompressionKind::ZstdChunked(Dialect::Podman)),
];

impl CompressionKind {
    /// The algorithm a layer's media type names, or `None` for types that are not known layers.
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

    /// What a layer is, by its media type and what its annotations say of an index; `None` for what
    /// is not a known kind of layer.
    pub fn of(layer: &Descriptor) -> Option<Self> {
        let algorithm = Self::of_media_type(&layer.media_type)?;
        let has = |key: &str| layer.annotations.contains_key(key);
        Some(match algorithm {
            Self::Gzip if has(TOC_DIGEST) => Self::Estargz,
            Self::Zstd if has(TOC_DIGEST) => Self::ZstdChunked(Dialect::Containerd),
            Self::Zstd if has(PODMAN_CHECKSUM) => Self::ZstdChunked(Dialect::Podman),
            _ => algorithm,
        })
    }

    /// The same without the index.
    pub fn algorithm(self) -> Self {
        match self {
            Self::Estargz => Self::Gzip,
            Self::ZstdChunked(_) => Self::Zstd,
            other => other,
        }
    }

    /// Whether layers get a table of contents.
    pub fn is_indexed(self) -> bool {
        self != self.algorithm()
    }

    /// Whether a layer of this kind does where `wanted` is asked for. An index does no harm.
    pub fn is_as_good_as(self, wanted: Self) -> bool {
        self == wanted || self.algorithm() == wanted
    }

    /// The OCI media type of a layer compressed so.
    pub fn media_type(self) -> &'static str {
        match self.algorithm() {
            Self::Uncompressed => media::OCI_LAYER,
            Self::Zstd | Self::ZstdChunked(_) => media::OCI_LAYER_ZSTD,
            Self::Gzip | Self::Estargz => media::OCI_LAYER_GZIP,
        }
    }
}

impl fmt::Display for CompressionKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = NAMES.iter().find(|(_, kind)| kind == self);
        f.write_str(name.map_or("", |(name, _)| name))
    }
}

/// What an exporter asks of layers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Compression {
    /// For layers that have no blob yet.
    pub kind: CompressionKind,
    /// Level as the algorithm counts it; `None` for our default.
    pub level: Option<i32>,
    /// Whether layers that exist with another compression are compressed anew.
    pub force: bool,
    /// Of indexed kinds: most bytes of a file that are fetched at once; `None` for 4 MiB.
    pub chunk_size: Option<NonZero<u32>>,
    /// Of indexed kinds: bytes of files that small ones are packed together up to, which makes the
    /// layer smaller, and reading one of them fetches all. `None` packs nothing, for containerd's
    /// own snapshotter before 0.13, and podman, cannot read it.
    pub min_chunk_size: Option<NonZero<u32>>,
}

impl Compression {
    /// Takes the attributes `compression`, `compression-level`, `force-compression`,
    /// `compression-chunk-size` and `compression-min-chunk-size` (both in bytes) of an exporter.
    pub fn take(mut attr: impl FnMut(&str) -> Option<String>) -> Result<Self> {
        let kind = attr("compression").unwrap_or_default();
        let known = NAMES.iter().find(|(name, _)| *name == kind).map(|(_, kind)| *kind);
        let kind = known.or(kind.is_empty().then(CompressionKind::default)).ok_or_else(|| {
            let names = NAMES.map(|(name, _)| name).join(", ");
            Fault::invalid(format!("unsupported layer compression type {kind:?}"))
                .hint(format!("use one of: {names}"))
        })?;
        let level = match attr("compression-level").as_deref() {
            None | Some("") => None,
            Some(text) => Some(text.parse().map_err(|_| {
                Fault::invalid(format!("compression-level {text:?} is not a number"))
            })?),
        };
        let force = match attr("force-compression").as_deref() {
            None => false,
            Some("") => true,
            Some(text) => parse_bool(text).ok_or_else(|| {
                Fault::invalid(format!("non-bool value {text} specified for force-compression"))
                    .hint("use true or false")
            })?,
        };
        let mut bytes = |key: &str| {
            let Some(text) = attr(key).filter(|text| !text.is_empty()) else { return Ok(None) };
            let invalid = |why| Fault::invalid(format!("{key} {text:?} {why}"));
            if !kind.is_indexed() {
                return Err(invalid("is of no use without a table of contents")
                    .hint("add compression=estargz or compression=zstdchunked"));
            }
            match text.parse() {
                Ok(0) => Ok(None),
                Ok(n) if u64::from(n) <= MAX_CHUNK => Ok(NonZero::new(n)),
                _ => Err(invalid("is not a number of bytes")
                    .hint(format!("use at most {MAX_CHUNK}, or leave it out"))),
            }
        };
        let (chunk_size, min_chunk_size) =
            (bytes("compression-chunk-size")?, bytes("compression-min-chunk-size")?);
        Ok(Self { kind, level, force, chunk_size, min_chunk_size })
    }

    /// The same without an index, for what is compressed again later.
    #[must_use]
    pub fn plain(self) -> Self {
        let kind = self.kind.algorithm();
        Self { kind, chunk_size: None, min_chunk_size: None, ..self }
    }
}

/// What decides about the bytes of a layer, as a text: layers of one tar and one such text are
/// equal.
impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.kind)?;
        if let Some(level) = self.level {
            write!(f, " level={level}")?;
        }
        for (key, size) in [("chunk", self.chunk_size), ("min-chunk", self.min_chunk_size)] {
            if let Some(size) = size {
                write!(f, " {key}={size}")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take(attrs: &[(&str, &str)]) -> Result<Compression> {
        Compression::take(|key| {
            attrs.iter().find(|(k, _)| *k == key).map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn force_is_spelled_as_go_spells_it() {
        let force = |text| take(&[("force-compression", text)]).map(|c| c.force);
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
        let level = |text| {
            take(&[("compression", "zstd"), ("compression-level", text)]).map(|c| (c.kind, c.level))
        };
        for (text, want) in [("", None), ("19", Some(19)), ("-1", Some(-1))] {
            assert_eq!(level(text).unwrap(), (CompressionKind::Zstd, want), "{text:?}");
        }
        assert_eq!(
            level("best").unwrap_err().to_string(),
            "compression-level \"best\" is not a number"
        );
        let kind = |text| take(&[("compression", text)]).map(|c| c.kind);
        for (name, want) in NAMES.into_iter().chain([("", CompressionKind::Gzip)]) {
            assert_eq!(kind(name).unwrap(), want, "{name}");
            assert!(name.is_empty() || want.to_string() == name);
        }
        let refused = kind("nydus").unwrap_err();
        assert_eq!(refused.to_string(), "unsupported layer compression type \"nydus\"");
        assert!(refused.hints().any(|h| h.ends_with("estargz, zstdchunked, zstd:chunked")));
    }

    #[test]
    fn sizes_of_chunks_are_bounded_and_belong_to_an_index() {
        let sizes = |kind: &str, size: &str| {
            take(&[("compression", kind), ("compression-chunk-size", size)])
                .map(|c| (c.chunk_size.map(NonZero::get), c.to_string()))
                .map_err(|f| f.to_string())
        };
        let estargz = || "estargz".to_owned();
        assert_eq!(sizes("estargz", "65536"), Ok((Some(65536), "estargz chunk=65536".to_owned())));
        assert_eq!(sizes("estargz", ""), Ok((None, estargz())));
        assert_eq!(sizes("estargz", "0"), Ok((None, estargz())));
        assert!(sizes("estargz", &MAX_CHUNK.to_string()).is_ok());
        for (kind, size) in [
            ("estargz", (MAX_CHUNK + 1).to_string()),
            ("zstdchunked", "-1".to_owned()),
            ("estargz", "4M".to_owned()),
            ("gzip", "65536".to_owned()),
        ] {
            let refused = sizes(kind, &size).unwrap_err();
            assert!(refused.starts_with("compression-chunk-size \""), "{refused}");
        }
    }

    #[test]
    fn a_layer_is_what_its_type_and_annotations_say() {
        let layer = |media_type: &str, key: &str| {
            let mut layer = Descriptor::of(media_type, b"layer");
            layer.annotations.insert(key.to_owned(), "sha256:".to_owned());
            CompressionKind::of(&layer)
        };
        for (media_type, key, want) in [
            (media::OCI_LAYER_GZIP, TOC_DIGEST, Some(CompressionKind::Estargz)),
            (media::DOCKER_LAYER_GZIP, TOC_DIGEST, Some(CompressionKind::Estargz)),
            (media::OCI_LAYER_GZIP, "other", Some(CompressionKind::Gzip)),
            (
                media::OCI_LAYER_ZSTD,
                TOC_DIGEST,
                Some(CompressionKind::ZstdChunked(Dialect::Containerd)),
            ),
            (
                media::OCI_LAYER_ZSTD,
                PODMAN_CHECKSUM,
                Some(CompressionKind::ZstdChunked(Dialect::Podman)),
            ),
            (media::OCI_LAYER, TOC_DIGEST, Some(CompressionKind::Uncompressed)),
            (media::OCI_CONFIG, TOC_DIGEST, None),
        ] {
            assert_eq!(layer(media_type, key), want, "{media_type} {key}");
        }
        let (estargz, gzip) = (CompressionKind::Estargz, CompressionKind::Gzip);
        assert!(estargz.is_as_good_as(gzip) && !gzip.is_as_good_as(estargz));
    }
}
