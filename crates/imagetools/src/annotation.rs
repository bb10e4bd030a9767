//! `LEVEL[PLATFORM]:KEY=VALUE`, as buildx writes annotations.

use shipway_fault::{Fault, Result};
use shipway_oci::Platform;

/// What an annotation is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// An index.
    Index,
    /// The entry of an index in a layout.
    IndexDescriptor,
    /// A manifest.
    Manifest,
    /// The entry of a manifest in an index.
    ManifestDescriptor,
}

impl Level {
    fn parse(text: &str) -> Option<Self> {
        Some(match text {
            "index" => Self::Index,
            "index-descriptor" => Self::IndexDescriptor,
            "manifest" => Self::Manifest,
            "manifest-descriptor" => Self::ManifestDescriptor,
            _ => return None,
        })
    }

    /// As it is written.
    pub fn name(self) -> &'static str {
        match self {
            Self::Index => "index",
            Self::IndexDescriptor => "index-descriptor",
            Self::Manifest => "manifest",
            Self::ManifestDescriptor => "manifest-descriptor",
        }
    }
}

/// An annotation, and what it is on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Annotation {
    /// What it is on, if that was said.
    pub level: Option<Level>,
    /// Of which platform only.
    pub platform: Option<Platform>,
    /// Its key.
    pub key: String,
    /// Its value.
    pub value: String,
}

impl Annotation {
    /// Reads `KEY=VALUE`, or `LEVEL[PLATFORM],…:KEY=VALUE`, which is one for each level.
    pub fn parse(text: &str) -> Result<Vec<Self>> {
        let (left, value) = text.split_once('=').ok_or_else(|| {
            Fault::invalid(format!("invalid annotation {text:?}, expected key=value"))
        })?;
        let of = |level, platform, key: &str| Self {
            level,
            platform,
            key: key.to_owned(),
            value: value.to_owned(),
        };
        let Some((levels, key)) = left.split_once(':') else {
            return Ok(vec![of(None, None, left)]);
        };
        let one = |word: &str| {
            let (name, platform) = match word.strip_suffix(']').and_then(|w| w.split_once('[')) {
                Some((name, platform)) => (name, Some(platform)),
                None => (word, None),
            };
            let level = Level::parse(name).ok_or_else(|| {
                Fault::invalid(format!("unknown annotation type {name:?}")).hint(
                    "it is index, index-descriptor, manifest or manifest-descriptor, with a \
                     platform in brackets if it is for that only",
                )
            })?;
            let parse = |p: &str| {
                p.parse().map_err(|e| Fault::invalid(format!("invalid platform {p:?}: {e}")))
            };
            Ok(of(Some(level), platform.map(parse).transpose()?, key))
        };
        levels.split(',').map(one).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn annotations_say_what_they_are_on() {
        let shown = |text: &str| match Annotation::parse(text) {
            Ok(all) => all
                .iter()
                .map(|a| {
                    let level = a.level.map_or("-", Level::name);
                    let platform = a.platform.as_ref().map(ToString::to_string);
                    format!("{level} {} {}={}", platform.unwrap_or_default(), a.key, a.value)
                })
                .collect::<Vec<_>>()
                .join("; "),
            Err(e) => format!("error {e}"),
        };
        assert_eq!(shown("a=b=c"), "-  a=b=c");
        assert_eq!(shown("index:a=b:c"), "index  a=b:c");
        assert_eq!(
            shown("index,manifest-descriptor[linux/arm64]:org.x.y=z"),
            "index  org.x.y=z; manifest-descriptor linux/arm64 org.x.y=z"
        );
        assert_eq!(shown("a"), "error invalid annotation \"a\", expected key=value");
        assert_eq!(shown("indx:a=b"), "error unknown annotation type \"indx\"");
        assert!(shown("index[*]:a=b").starts_with("error invalid platform \"*\""));
    }
}
