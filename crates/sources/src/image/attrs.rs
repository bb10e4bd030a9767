//! Attributes of an image source (rows `src.image.*`).

use crate::SourceSpec;
use shipway_fault::{Fault, Result};
use shipway_llb::{ResolveMode, attr};
use shipway_oci::{Digest, ImageName};
use shipway_refs::RecordType;
use shipway_session::SessionId;
use shipway_storage::ImageRecord;
use std::str::FromStr;

/// Which images of containerd's store are taken for a name in `FROM` without asking its registry.
/// Whatever it says, the store is the fallback for a registry that cannot be asked, a digest is its
/// content wherever that is, and clients may ask for one or the other (`image.resolvemode`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LocalImages {
    /// Those that were built here: what was just built is what `FROM` means. Pulled ones may have
    /// changed since.
    #[default]
    Built,
    /// All.
    Always,
    /// None, as in BuildKit.
    Never,
}

impl LocalImages {
    pub(crate) fn prefers(self, record: &ImageRecord) -> bool {
        match self {
            Self::Built => record.built().is_some(),
            Self::Always => true,
            Self::Never => false,
        }
    }
}

impl FromStr for LocalImages {
    type Err = Fault;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "built" => Ok(Self::Built),
            "always" => Ok(Self::Always),
            "never" => Ok(Self::Never),
            _ => Err(Fault::invalid(format!("{text:?} does not say which local images to prefer"))
                .hint("want built, always or never")),
        }
    }
}

/// What an image is fetched from when it is not here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ImageLocation {
    /// The registry that its name names.
    Registry,
    /// A layout in a client's directory (row `src.oci`).
    Layout {
        /// The client; none for any of the build.
        session: Option<SessionId>,
        /// The client's name for the directory.
        store: String,
    },
}

/// A parsed image source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ImageSpec {
    pub name: ImageName,
    pub location: ImageLocation,
    pub mode: ResolveMode,
    pub record_type: RecordType,
    /// Use the first so many layers only.
    pub layer_limit: Option<usize>,
    /// What the name must lead to.
    pub checksum: Option<Digest>,
}

impl ImageSpec {
    pub(crate) fn parse(spec: &SourceSpec, reference: &str) -> Result<Self> {
        let name: ImageName = reference
            .parse()
            .map_err(|e| Fault::invalid(format!("failed to parse image {reference:?}: {e}")))?;
        let location = ImageLocation::Registry;
        let mut image = Self {
            name,
            location,
            mode: ResolveMode::default(),
            record_type: RecordType::Regular,
            layer_limit: None,
            checksum: None,
        };
        for (key, value) in &spec.attrs {
            let bad = |want: &str| {
                Fault::invalid(format!("image {reference}: {key}={value:?} is wrong: want {want}"))
            };
            match key.as_str() {
                attr::IMAGE_RESOLVE_MODE => {
                    image.mode =
                        ResolveMode::parse(value).ok_or_else(|| bad("default, pull or local"))?;
                }
                "image.recordtype" => {
                    image.record_type = match value.as_str() {
                        "" => RecordType::Regular,
                        v => v
                            .parse()
                            .ok()
                            .filter(|t| allowed(*t))
                            .ok_or_else(|| bad("regular, internal or frontend"))?,
                    }
                }
                "image.layerlimit" | "oci.layerlimit" => {
                    let limit = value.parse().ok().filter(|l| *l > 0);
                    image.layer_limit = Some(limit.ok_or_else(|| {
                        bad("a number of layers above 0").context("invalid layer limit")
                    })?);
                }
                "image.checksum" | "oci.checksum" => {
                    image.checksum =
                        Some(value.parse().map_err(|_| bad("sha256:<64 hex characters>"))?)
                }
                // Others are not ours, or hints that change nothing.
                _ => {}
            }
        }
        Ok(image)
    }

    /// An image in a client's layout.
    pub(crate) fn layout(spec: &SourceSpec, reference: &str) -> Result<Self> {
        let mut image = Self::parse(spec, reference)?;
        if image.name.digest().is_none() {
            return Err(Fault::invalid(format!("reference {reference:?} must have digest")));
        }
        let value = |key: &str| spec.attrs.get(key).cloned().unwrap_or_default();
        let store = Some(value(attr::OCI_STORE))
            .filter(|s| !s.is_empty())
            .unwrap_or_else(|| reference.split('@').next().unwrap_or_default().to_owned());
        let session = Some(value(attr::OCI_SESSION)).filter(|s| !s.is_empty());
        let session = session.map(|id| SessionId::new(&id));
        image.location = ImageLocation::Layout { session, store };
        Ok(image)
    }
}

fn allowed(t: RecordType) -> bool {
    matches!(t, RecordType::Regular | RecordType::Internal | RecordType::Frontend)
}

#[cfg(test)]
mod tests {
    use super::*;
    use shipway_oci::Platform;

    fn spec(attrs: &[(&str, &str)]) -> SourceSpec {
        let attrs = attrs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        SourceSpec {
            identifier: "docker-image://busybox".into(),
            attrs,
            platform: Platform::host(),
        }
    }

    #[test]
    fn attributes_are_read_and_mistakes_named() {
        let parse = |attrs: &[(&str, &str)]| ImageSpec::parse(&spec(attrs), "busybox");
        let image = parse(&[
            ("image.resolvemode", "pull"),
            ("image.recordtype", "frontend"),
            ("image.layerlimit", "2"),
        ])
        .unwrap();
        assert_eq!(
            (image.mode, image.record_type, image.layer_limit),
            (ResolveMode::ForcePull, RecordType::Frontend, Some(2))
        );
        assert_eq!(image.name.to_string(), "docker.io/library/busybox:latest");
        for (key, bad) in [
            ("image.resolvemode", "x"),
            ("image.recordtype", "source.local"),
            ("image.layerlimit", "0"),
            ("image.checksum", "sha256:1"),
        ] {
            let fault = parse(&[(key, bad)]).unwrap_err();
            assert!(fault.to_string().contains(key), "{fault}");
        }
    }
}
