//! Image names, as the distribution reference grammar has them.

use crate::{Digest, digest::DigestError};
use std::{fmt, str::FromStr};

/// A fully qualified image name: `registry/repository[:tag][@digest]`. Short names are completed as
/// Docker does: `busybox` is `docker.io/library/busybox:latest`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ImageName {
    registry: String,
    repository: String,
    tag: Option<String>,
    digest: Option<Digest>,
}

/// Why a text is not a valid image name, in the distribution library's words, because clients show
/// them; `why` says what it is about.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{words}")]
pub struct NameError {
    /// The library's words.
    pub words: String,
    /// What is wrong with it.
    pub why: &'static str,
}

impl NameError {
    fn new(words: impl Into<String>, why: &'static str) -> Self {
        Self { words: words.into(), why }
    }
}

/// Longest path within a registry, in bytes.
const MAX_PATH: usize = 255;
/// Longest text that is looked at; no valid name is longer.
const MAX_LEN: usize = 1024;
/// Longest tag.
const MAX_TAG: usize = 128;

impl ImageName {
    /// Host and port of the registry.
    pub fn registry(&self) -> &str {
        &self.registry
    }

    /// Host of the registry without its port, as in containerd's labels of where blobs came from.
    pub fn registry_host(&self) -> &str {
        match self.registry.strip_prefix('[').and_then(|r| r.split_once(']')) {
            Some((address, _)) => address,
            None => self.registry.split_once(':').map_or(&*self.registry, |(host, _)| host),
        }
    }

    /// Path within the registry, such as `library/busybox`.
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// `registry/repository` without tag or digest.
    pub fn locator(&self) -> String {
        format!("{}/{}", self.registry, self.repository)
    }

    /// The tag as written; `None` when only a digest was given.
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// The digest as written.
    pub fn digest(&self) -> Option<Digest> {
        self.digest
    }

    /// What to ask a registry for: the digest if there is one, else the tag.
    pub fn reference(&self) -> String {
        match (&self.digest, &self.tag) {
            (Some(d), _) => d.to_string(),
            (None, Some(t)) => t.clone(),
            (None, None) => "latest".into(),
        }
    }

    /// The same image pinned to `digest`, keeping the tag.
    #[must_use]
    pub fn with_digest(mut self, digest: Digest) -> Self {
        self.digest = Some(digest);
        self
    }

    /// The same image without a digest; gets the tag `latest` if it has none.
    #[must_use]
    pub fn without_digest(mut self) -> Self {
        self.digest = None;
        self.tag.get_or_insert_with(|| "latest".into());
        self
    }

    /// The name as a person writes it: `docker.io/library/` and nothing else is dropped.
    pub fn familiar(&self) -> String {
        let full = self.to_string();
        full.strip_prefix("docker.io/library/")
            .or_else(|| full.strip_prefix("docker.io/"))
            .unwrap_or(&full)
            .to_owned()
    }
}

impl fmt::Display for ImageName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.registry, self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

impl FromStr for ImageName {
    type Err = NameError;

    fn from_str(s: &str) -> Result<Self, NameError> {
        if s.len() == 64 && s.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
            let words = format!(
                "invalid repository name ({s}), cannot specify 64-byte hexadecimal strings"
            );
            return Err(NameError::new(words, "it looks like an image ID"));
        }
        let (registry, rest) = split_registry(s);
        let remote = rest.split_once(':').map_or(rest.as_str(), |(remote, _)| remote);
        if remote.to_lowercase() != remote {
            let shown: String = remote.chars().take(200).collect();
            let words =
                format!("invalid reference format: repository name ({shown}) must be lowercase");
            return Err(NameError::new(words, "it has upper case letters"));
        }
        let wrong = |why| NameError::new("invalid reference format", why);
        if s.len() > MAX_LEN {
            return Err(wrong("it is too long"));
        }
        let (name, digest) = match rest.split_once('@') {
            Some((name, digest)) => (name, Some(digest)),
            None => (rest.as_str(), None),
        };
        let (repository, tag) = match name.split_once(':') {
            Some((repository, tag)) => (repository, Some(tag)),
            None => (name, None),
        };
        if !is_registry(registry) {
            return Err(wrong("the registry's name is wrong"));
        }
        if !repository.split('/').all(is_component) {
            return Err(wrong("the repository's name is wrong"));
        }
        if !tag.is_none_or(is_tag) {
            return Err(wrong("the tag has a character that tags cannot have, or is too long"));
        }
        if !digest.is_none_or(has_form_of_digest) {
            return Err(wrong("the digest is not sha256:<64 hex characters>"));
        }
        if repository.len() > MAX_PATH {
            let words = format!("repository name must not be more than {MAX_PATH} characters");
            return Err(NameError::new(words, "it is too long"));
        }
        let digest: Option<Digest> =
            digest.map(str::parse).transpose().map_err(|e: DigestError| {
                NameError::new(e.words(), "the digest is not sha256:<64 hex characters>")
            })?;
        let tag = tag.map(str::to_owned).or_else(|| digest.is_none().then(|| "latest".to_owned()));
        Ok(Self { registry: registry.to_owned(), repository: repository.to_owned(), tag, digest })
    }
}

/// The registry and the rest of a name. What comes before the first slash is a registry if it looks
/// like a host's name.
fn split_registry(s: &str) -> (&str, String) {
    const DEFAULT: &str = "docker.io";
    let (registry, rest) = match s.split_once('/') {
        None => (DEFAULT, s),
        Some(("index.docker.io", rest)) => (DEFAULT, rest),
        Some((host, rest))
            if host == "localhost" || host.contains(['.', ':']) || host.to_lowercase() != host =>
        {
            (host, rest)
        }
        Some(_) => (DEFAULT, s),
    };
    let official = registry == DEFAULT && !rest.contains('/');
    (registry, if official { format!("library/{rest}") } else { rest.to_owned() })
}

fn is_registry(text: &str) -> bool {
    let (host, port) = match text.strip_prefix('[').and_then(|t| t.split_once(']')) {
        Some((address, port)) => {
            (Err(address), port.strip_prefix(':').or((!port.is_empty()).then_some("?")))
        }
        None => match text.split_once(':') {
            Some((host, port)) => (Ok(host), Some(port)),
            None => (Ok(text), None),
        },
    };
    let label = |l: &str| {
        !l.is_empty()
            && l.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
            && !l.starts_with('-')
            && !l.ends_with('-')
    };
    let host = match host {
        Ok(name) => name.split('.').all(label),
        Err(address) => {
            !address.is_empty() && address.bytes().all(|b| b.is_ascii_hexdigit() || b == b':')
        }
    };
    host && port.is_none_or(|p| !p.is_empty() && p.bytes().all(|b| b.is_ascii_digit()))
}

/// Lower case letters and digits in groups, between which there is a dot, one or two underscores,
/// or dashes.
fn is_component(text: &str) -> bool {
    let group = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    let separator = |t: &str| matches!(t, "" | "." | "_" | "__") || t.bytes().all(|b| b == b'-');
    text.starts_with(group) && text.ends_with(group) && text.split(group).all(separator)
}

fn is_tag(text: &str) -> bool {
    let ok = |c: char| c.is_ascii_alphanumeric() || "_.-".contains(c);
    !text.is_empty()
        && text.len() <= MAX_TAG
        && text.chars().all(ok)
        && !text.starts_with(['.', '-'])
}

fn has_form_of_digest(text: &str) -> bool {
    let Some((algorithm, hex)) = text.split_once(':') else { return false };
    let part = |p: &str| {
        p.starts_with(|c: char| c.is_ascii_alphabetic())
            && p.bytes().all(|b| b.is_ascii_alphanumeric())
    };
    algorithm.split(['-', '_', '+', '.']).all(part)
        && hex.len() >= 32
        && hex.bytes().all(|b| b.is_ascii_hexdigit())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_names_are_completed() {
        let d = format!("sha256:{}", "0".repeat(64));
        for (text, want) in [
            ("busybox", "docker.io/library/busybox:latest"),
            ("me/app:1", "docker.io/me/app:1"),
            ("localhost/app", "localhost/app:latest"),
            ("localhost:5000/a/b:c", "localhost:5000/a/b:c"),
            ("docker.io/busybox", "docker.io/library/busybox:latest"),
            ("[::1]:5000/a__b", "[::1]:5000/a__b:latest"),
            ("me/a--b.c_d", "docker.io/me/a--b.c_d:latest"),
            (&format!("a@{d}"), &format!("docker.io/library/a@{d}")),
            (&format!("r.io/a:t@{d}"), &format!("r.io/a:t@{d}")),
        ] {
            assert_eq!(text.parse::<ImageName>().unwrap().to_string(), want);
        }
        assert_eq!("docker.io/library/a:1".parse::<ImageName>().unwrap().familiar(), "a:1");
    }

    #[test]
    fn what_is_no_name_is_refused() {
        let format = "invalid reference format";
        let hex = "0".repeat(64);
        for (bad, words) in [
            ("", format),
            ("a/B", "invalid reference format: repository name (a/B) must be lowercase"),
            (
                "Stage",
                "invalid reference format: repository name (library/Stage) must be lowercase",
            ),
            ("a:", format),
            ("a b", format),
            ("a//b", format),
            ("-a", format),
            ("a..b", format),
            ("a___b", format),
            ("r.io:x/a", format),
            ("[::1/a", format),
            ("a@sha256:1", format),
            ("../x", format),
            (
                &hex,
                &format!(
                    "invalid repository name ({hex}), cannot specify 64-byte hexadecimal strings"
                ),
            ),
            (&format!("a@sha1:{}", &hex[..40]), "unsupported digest algorithm"),
            (&format!("a@sha256:{}", &hex[..40]), "invalid checksum digest length"),
            (&format!("a@sha256:{}", "A".repeat(64)), "invalid checksum digest format"),
            (&"a".repeat(300), "repository name must not be more than 255 characters"),
        ] {
            assert_eq!(bad.parse::<ImageName>().unwrap_err().to_string(), words, "{bad}");
        }
    }
}
