//! What a build was seen to use (row `at.prov.capture`).

use serde::Serialize;
use shipway_fault::redact;
use shipway_oci::{Digest, ImageName, Platform, timestamp};
use std::{collections::HashSet, fmt, time::SystemTime};

/// A secret or an SSH agent.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[allow(missing_docs)]
pub struct Named {
    pub id: String,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub optional: bool,
}

/// A client's directory.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[allow(missing_docs)]
pub struct Local {
    pub name: String,
}

/// An image.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct ImageSource {
    /// Full name.
    pub name: ImageName,
    pub platform: Option<Platform>,
    pub digest: Option<Digest>,
    /// Whether it came from an OCI layout.
    pub local: bool,
    /// Why it is the one of the node's own store, if no registry said so.
    pub stored: Option<Stored>,
}

/// Why an image of the node's own store was taken for a name, and not what a registry has under it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stored {
    /// It was built here, at this time.
    Built(SystemTime),
    /// The client or the configuration wants it so.
    Wanted,
    /// The registry could not be asked.
    Fallback,
}

impl fmt::Display for Stored {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Built(time) => write!(f, "built here at {}", timestamp::format_whole(*time)),
            Self::Wanted => f.write_str("preferred to the registry"),
            Self::Fallback => f.write_str("the registry could not be asked"),
        }
    }
}

/// A commit of a repository.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct GitSource {
    /// Remote, with `#reference` if one was asked for.
    pub url: String,
    pub commit: String,
    /// What it came out of instead of its remote.
    pub bundle: Option<BlobSource>,
}

/// A single blob: a source of its own, or a file with commits of a repository.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlobSource {
    /// Its place, with its digest.
    pub name: ImageName,
    /// Whether it came from a client's store.
    pub local: bool,
}

/// A downloaded file.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct HttpSource {
    pub url: String,
    pub digest: Digest,
}

/// Everything that went in.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Sources {
    pub images: Vec<ImageSource>,
    pub blobs: Vec<BlobSource>,
    pub git: Vec<GitSource>,
    pub http: Vec<HttpSource>,
    pub local: Vec<Local>,
}

/// What one result was seen to use.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Capture {
    /// What went in.
    pub sources: Sources,
    /// Secrets by id.
    pub secrets: Vec<Named>,
    /// SSH agents by id.
    pub ssh: Vec<Named>,
    /// Whether a step could reach a network.
    pub network: bool,
    /// Whether something went in that is not among `sources`.
    pub incomplete: bool,
    /// Whether a step saw the network through a proxy only.
    pub proxied: bool,
    /// What such steps fetched that is not among `sources`.
    pub missing: Vec<MissingFetch>,
}

/// Something that a step on the proxy network asked for and that is not named by a digest (row
/// `at.prov.capture`).
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[allow(missing_docs)]
pub struct MissingFetch {
    /// Digest of the step.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub op: String,
    /// Its command line.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub name: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub method: String,
    #[serde(rename = "uri", skip_serializing_if = "String::is_empty")]
    pub url: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub reason: String,
}

fn same_platform(a: &Option<Platform>, b: &Option<Platform>) -> bool {
    match (a, b) {
        (Some(a), Some(b)) => {
            (&a.os, &a.architecture, &a.variant, &a.os_version)
                == (&b.os, &b.architecture, &b.variant, &b.os_version)
        }
        (None, None) => true,
        _ => false,
    }
}

fn add_named(all: &mut Vec<Named>, named: Named) {
    match all.iter_mut().find(|n| n.id == named.id) {
        // Needed once is needed.
        Some(known) => known.optional &= named.optional,
        None => all.push(named),
    }
}

impl Capture {
    /// Notes an image.
    pub fn add_image(&mut self, image: ImageSource) {
        let known = |i: &ImageSource| {
            i.name == image.name
                && i.local == image.local
                && same_platform(&i.platform, &image.platform)
        };
        match self.sources.images.iter_mut().find(|i| known(i)) {
            Some(known) => known.stored = known.stored.or(image.stored),
            None => self.sources.images.push(image),
        }
    }

    /// Notes a blob.
    pub fn add_blob(&mut self, blob: BlobSource) {
        if !self.sources.blobs.contains(&blob) {
            self.sources.blobs.push(blob);
        }
    }

    /// Notes a repository, without the password in its address.
    pub fn add_git(&mut self, git: GitSource) {
        let git = GitSource { url: redact(&git.url), ..git };
        if !self.sources.git.iter().any(|g| g.url == git.url) {
            self.sources.git.push(git);
        }
    }

    /// Notes a file, without the password in its address.
    pub fn add_http(&mut self, http: HttpSource) {
        let http = HttpSource { url: redact(&http.url), ..http };
        if !self.sources.http.iter().any(|h| h.url == http.url) {
            self.sources.http.push(http);
        }
    }

    /// Notes a client's directory.
    pub fn add_local(&mut self, name: &str) {
        if !self.sources.local.iter().any(|l| l.name == name) {
            self.sources.local.push(Local { name: name.to_owned() });
        }
    }

    /// Notes a secret.
    pub fn add_secret(&mut self, id: &str, optional: bool) {
        add_named(&mut self.secrets, Named { id: id.to_owned(), optional });
    }

    /// Notes an SSH agent.
    pub fn add_ssh(&mut self, id: &str, optional: bool) {
        let id = if id.is_empty() { "default" } else { id };
        add_named(&mut self.ssh, Named { id: id.to_owned(), optional });
    }

    /// Notes something that is missing.
    pub fn add_missing(&mut self, missing: MissingFetch) {
        self.incomplete = true;
        if !self.missing.contains(&missing) {
            self.missing.push(missing);
        }
    }

    /// Notes all that `other` noted.
    pub fn merge(&mut self, other: Capture) {
        other.sources.images.into_iter().for_each(|i| self.add_image(i));
        other.sources.blobs.into_iter().for_each(|b| self.add_blob(b));
        other.sources.git.into_iter().for_each(|g| self.add_git(g));
        other.sources.http.into_iter().for_each(|h| self.add_http(h));
        other.sources.local.iter().for_each(|l| self.add_local(&l.name));
        other.secrets.iter().for_each(|s| self.add_secret(&s.id, s.optional));
        other.ssh.iter().for_each(|s| self.add_ssh(&s.id, s.optional));
        self.network |= other.network;
        self.incomplete |= other.incomplete;
        self.proxied |= other.proxied;
        other.missing.into_iter().for_each(|m| self.add_missing(m));
    }

    /// Puts it in an order that does not depend on the order of events, and leaves out images by
    /// digest that are there by tag.
    #[must_use]
    pub fn tidied(mut self) -> Self {
        let label = |n: &ImageName| format!("{}:{}", n.locator(), n.tag().unwrap_or("latest"));
        // What is known of an image by digest is known of its tag, too.
        let by_digest: Vec<ImageSource> =
            self.sources.images.iter().filter(|i| i.name.digest().is_some()).cloned().collect();
        for image in self.sources.images.iter_mut().filter(|i| i.name.digest().is_none()) {
            let same =
                |i: &&ImageSource| i.digest == image.digest && label(&i.name) == label(&image.name);
            image.stored =
                image.stored.or_else(|| by_digest.iter().filter(same).find_map(|i| i.stored));
        }
        let tagged: HashSet<String> = self
            .sources
            .images
            .iter()
            .filter(|i| i.name.digest().is_none())
            .map(|i| label(&i.name))
            .collect();
        self.sources
            .images
            .retain(|i| i.name.digest().is_none() || !tagged.contains(&label(&i.name)));
        self.sources.images.sort_by_key(|i| i.name.to_string());
        self.sources.blobs.sort_by_key(|b| b.name.to_string());
        self.sources.git.sort_by(|a, b| a.url.cmp(&b.url));
        self.sources.http.sort_by(|a, b| a.url.cmp(&b.url));
        self.sources.local.sort_by(|a, b| a.name.cmp(&b.name));
        self.secrets.sort_by(|a, b| a.id.cmp(&b.id));
        self.ssh.sort_by(|a, b| a.id.cmp(&b.id));
        self.missing.sort_by(|a, b| {
            (&a.op, &a.url, &a.method, &a.reason).cmp(&(&b.op, &b.url, &b.method, &b.reason))
        });
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(name: &str) -> ImageSource {
        ImageSource {
            name: name.parse().unwrap(),
            platform: None,
            digest: None,
            local: false,
            stored: None,
        }
    }

    #[test]
    fn things_are_noted_once_and_a_need_stays_a_need() {
        let mut c = Capture::default();
        for i in ["b", "a", "a"] {
            c.add_image(image(i));
        }
        c.add_image(image(&format!("a:latest@{}", Digest::of("x"))));
        c.add_secret("s", true);
        c.add_secret("s", false);
        c.add_ssh("", true);
        let c = c.tidied();
        let names: Vec<String> = c.sources.images.iter().map(|i| i.name.familiar()).collect();
        assert_eq!(names, ["a:latest", "b:latest"]);
        assert_eq!((c.secrets[0].optional, c.ssh[0].id.as_str()), (false, "default"));
    }
}
