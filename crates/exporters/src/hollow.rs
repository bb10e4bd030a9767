//! What happens to the blobs that an image in the store does without, because a remote snapshotter
//! serves their layers.

use shipway_fault::{Fault, Result};
use std::str::FromStr;

/// The namespace of dockerd, which takes an image that lacks blobs for none.
const DOCKERD: &str = "moby";

/// When the blobs of layers that a remote snapshotter serves are fetched for an image in the store.
/// It runs without them; other programs cannot save or push it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LazyBlobs {
    /// Before the image is named.
    Now,
    /// Once it is named, while the build has its answer.
    Async,
    /// When something is made of the image that has them inside: they are passed on to registries,
    /// and fetched for archives.
    #[default]
    OnPush,
}

impl LazyBlobs {
    /// The same where the image gets into these namespaces.
    pub(crate) fn within<'a>(self, mut namespaces: impl Iterator<Item = &'a str>) -> Self {
        if namespaces.any(|name| name == DOCKERD) { Self::Now } else { self }
    }
}

impl FromStr for LazyBlobs {
    type Err = Fault;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "now" => Ok(Self::Now),
            "async" => Ok(Self::Async),
            "on-push" => Ok(Self::OnPush),
            _ => Err(Fault::invalid(format!("{text:?} does not say when blobs are fetched"))
                .hint("want now, async or on-push")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dockerd_gets_whole_images() {
        for policy in [LazyBlobs::Async, LazyBlobs::OnPush] {
            assert_eq!(policy.within(["k8s.io", "moby"].into_iter()), LazyBlobs::Now);
            assert_eq!(policy.within(["default", "k8s.io"].into_iter()), policy);
        }
        assert!("later".parse::<LazyBlobs>().is_err());
    }
}
