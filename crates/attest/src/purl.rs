//! Package URLs of images.

use shipway_oci::{ImageName, Platform};
use std::fmt::Write as _;

/// Where an image lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PurlKind {
    /// In a registry.
    Docker,
    /// In an OCI layout.
    Oci,
}

/// Besides letters, digits and `-_.~`: what stands for itself in versions and qualifiers. In names
/// it does not, as a registry's port shows.
const PLAIN: &[u8] = b"$&+=:@";

/// Percent-encodes all but letters, digits, `-_.~` and what is `plain`.
fn escape(text: &str, plain: &[u8]) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-_.~".contains(&byte) || plain.contains(&byte) {
            out.push(byte as char);
        } else {
            _ = write!(out, "%{byte:02X}");
        }
    }
    out
}

/// The package URL of an image: its familiar name, the tag as version, digest and platform as
/// qualifiers.
pub fn image_purl(kind: PurlKind, name: &ImageName, platform: Option<&Platform>) -> String {
    let platform = platform.map(|p| ("platform", p.clone().normalized().to_string()));
    purl(kind, name, platform)
}

/// The package URL of a single blob; with a `repository`, of a bundle of its commits.
pub fn blob_purl(kind: PurlKind, name: &ImageName, repository: Option<&str>) -> String {
    let what = if repository.is_some() { "bundle" } else { "blob" };
    let whose = repository.map(|url| ("vcs_url", url.to_owned()));
    purl(kind, name, std::iter::once(("ref_type", what.to_owned())).chain(whose))
}

/// The qualifiers stand in the order of their names, after the digest.
fn purl(
    kind: PurlKind,
    name: &ImageName,
    more: impl IntoIterator<Item = (&'static str, String)>,
) -> String {
    let full = name.locator();
    let short = full
        .strip_prefix("docker.io/library/")
        .or_else(|| full.strip_prefix("docker.io/"))
        .unwrap_or(&full);
    let segments: Vec<String> = short.split('/').map(|segment| escape(segment, b"")).collect();
    let mut out = format!(
        "pkg:{}/{}",
        if kind == PurlKind::Oci { "oci" } else { "docker" },
        segments.join("/")
    );
    let tag = name.tag().or(name.digest().is_none().then_some("latest"));
    if let Some(tag) = tag {
        _ = write!(out, "@{}", escape(tag, PLAIN));
    }
    let digest = name.digest().map(|d| ("digest", d.to_string()));
    let qualifiers: Vec<String> = digest
        .into_iter()
        .chain(more)
        .map(|(key, value)| format!("{key}={}", escape(&value, PLAIN)))
        .collect();
    if !qualifiers.is_empty() {
        _ = write!(out, "?{}", qualifiers.join("&"));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use shipway_oci::Digest;

    #[test]
    fn bundles_say_whose_commits_they_have() {
        let digest = Digest::of("x");
        let name = format!("127.0.0.1:5/foo/bundle@{digest}").parse().unwrap();
        let want = format!(
            "pkg:docker/127.0.0.1%3A5/foo/bundle?digest={digest}&ref_type=bundle&vcs_url=https:%2F%2Fh%2Fa.git%23main"
        );
        assert_eq!(blob_purl(PurlKind::Docker, &name, Some("https://h/a.git#main")), want);
        let blob = format!("pkg:oci/127.0.0.1%3A5/foo/bundle?digest={digest}&ref_type=blob");
        assert_eq!(blob_purl(PurlKind::Oci, &name, None), blob);
    }

    #[test]
    fn names_become_package_urls() {
        let digest = Digest::of("x");
        for (name, platform, want) in [
            ("alpine", None, "pkg:docker/alpine@latest".to_owned()),
            ("library/alpine:3.15", None, "pkg:docker/alpine@3.15".to_owned()),
            ("user/test:v2", None, "pkg:docker/user/test@v2".to_owned()),
            ("ghcr.io/foo/bar", None, "pkg:docker/ghcr.io/foo/bar@latest".to_owned()),
            ("localhost:5000/a/b:1", None, "pkg:docker/localhost%3A5000/a/b@1".to_owned()),
            (&format!("alpine@{digest}"), None, format!("pkg:docker/alpine?digest={digest}")),
            (&format!("alpine:1@{digest}"), None, format!("pkg:docker/alpine@1?digest={digest}")),
            (
                "busybox",
                Some("linux/arm/v7"),
                "pkg:docker/busybox@latest?platform=linux%2Farm%2Fv7".to_owned(),
            ),
        ] {
            let platform = platform.map(|p| p.parse().unwrap());
            assert_eq!(
                image_purl(PurlKind::Docker, &name.parse().unwrap(), platform.as_ref()),
                want
            );
        }
    }
}
