//! What resolving a source finds out without fetching it (row `gw.resolvesrc`): for frontends,
//! and for clients that decide on sources.

use crate::SourceOp;
use bytes::Bytes;
use shipway_oci::{ChecksumAlgorithm, Descriptor, Digest};
use shipway_proto::{moby::buildkit::v1::frontend as wire, pb};
use std::{collections::BTreeMap, time::SystemTime};

/// How the name of an image is resolved: `image.resolvemode` of a source, and
/// `image-resolve-mode` of a build.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum ResolveMode {
    /// At the registry, and in the local image store if the registry does not answer; images that
    /// the daemon is configured to prefer in the store first.
    #[default]
    Default,
    /// At the registry only.
    ForcePull,
    /// In the local image store, then at the registry.
    PreferLocal,
}

impl ResolveMode {
    /// The mode called `text`: `default` or empty, `pull` or `local`.
    pub fn parse(text: &str) -> Option<Self> {
        match text {
            "" | "default" => Some(Self::Default),
            "pull" => Some(Self::ForcePull),
            "local" => Some(Self::PreferLocal),
            _ => None,
        }
    }

    /// The value of the attribute `image.resolvemode`; empty for the default.
    pub fn attr(self) -> &'static str {
        match self {
            Self::Default => "",
            Self::ForcePull => "pull",
            Self::PreferLocal => "local",
        }
    }
}

/// What to resolve of a source, and how. Each kind of source goes by what it knows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ResolveOptions {
    /// How the name of an image is resolved, unless the source itself says that
    /// (`image.resolvemode`).
    pub mode: ResolveMode,
    /// Whether the objects of a git reference are wanted.
    pub git_objects: bool,
    /// Whether another checksum of a file is wanted: of its bytes and these behind them.
    pub http_checksum: Option<(ChecksumAlgorithm, Bytes)>,
    /// Whether the attestations of an image are wanted, with the statements of these predicate
    /// types.
    pub attestations: Option<Vec<String>>,
}

/// What is known of a source; at most one of them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SourceFacts {
    /// For `docker-image` and `oci-layout`.
    pub image: Option<ImageFacts>,
    /// For `git`.
    pub git: Option<GitFacts>,
    /// For `http` and `https`.
    pub http: Option<HttpFacts>,
}

/// An image as resolved (row `gw.resolveimg`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageFacts {
    /// Full name, pinned if a policy says so.
    pub name: String,
    /// Digest of the manifest or index that the name led to.
    pub digest: Digest,
    /// The image config of the platform asked for; empty if it is not wanted.
    pub config: Bytes,
    /// What is said of it, if that was asked for and there is something.
    pub attestations: Option<Box<AttestationChain>>,
}

/// The documents by which a policy may check an image (row `gw.resolvesrc.img`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AttestationChain {
    /// The index.
    pub root: Digest,
    /// The platform's manifest in it.
    pub image: Option<Digest>,
    /// The manifest of what is said of that.
    pub attestation: Option<Digest>,
    /// Manifests of signatures of that in turn.
    pub signatures: Vec<Digest>,
    /// All of them but the image's manifest, and the statements and signatures themselves.
    pub blobs: BTreeMap<Digest, (Descriptor, Bytes)>,
}

/// Where a git reference leads (row `gw.resolvesrc.git`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GitFacts {
    /// The commit, or the annotated tag.
    pub checksum: String,
    /// Full name of the reference.
    pub reference: String,
    /// The commit that an annotated tag leads to; empty without one.
    pub commit_checksum: String,
    /// The commit's text, if it was asked for.
    pub commit_object: Bytes,
    /// The annotated tag, likewise.
    pub tag_object: Bytes,
}

/// A file of a web server as resolved (row `gw.resolvesrc.http`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HttpFacts {
    /// Digest of the file.
    pub digest: String,
    /// Name of the file.
    pub filename: String,
    /// When the server says that it was changed.
    pub last_modified: Option<SystemTime>,
    /// The checksum that was asked for, and the bytes that it has behind those of the file.
    pub other: Option<(String, Bytes)>,
}

impl SourceFacts {
    /// The message in which frontends and deciding clients learn of it, for the source as it was
    /// resolved.
    pub fn to_pb(self, source: SourceOp) -> wire::ResolveSourceMetaResponse {
        wire::ResolveSourceMetaResponse {
            source: Some(pb::SourceOp { identifier: source.identifier, attrs: source.attrs }),
            image: self.image.map(|i| wire::ResolveSourceImageResponse {
                digest: i.digest.to_string(),
                config: i.config.to_vec(),
                attestation_chain: i.attestations.map(|a| a.into_pb()),
            }),
            git: self.git.map(|g| wire::ResolveSourceGitResponse {
                checksum: g.checksum,
                r#ref: g.reference,
                commit_checksum: g.commit_checksum,
                commit_object: g.commit_object.to_vec(),
                tag_object: g.tag_object.to_vec(),
            }),
            http: self.http.map(|h| wire::ResolveSourceHttpResponse {
                checksum: h.digest,
                filename: h.filename,
                last_modified: h.last_modified.map(Into::into),
                checksum_response: h.other.map(|(digest, suffix)| wire::ChecksumResponse {
                    digest,
                    suffix: suffix.to_vec(),
                }),
            }),
        }
    }
}

impl AttestationChain {
    fn into_pb(self) -> wire::AttestationChain {
        let text = |digest: Option<Digest>| digest.map(|d| d.to_string()).unwrap_or_default();
        let blob = |(descriptor, data): (Descriptor, Bytes)| wire::Blob {
            descriptor: Some(wire::Descriptor {
                media_type: descriptor.media_type,
                digest: descriptor.digest.to_string(),
                size: descriptor.size as i64,
                annotations: descriptor.annotations,
            }),
            data: data.to_vec(),
        };
        wire::AttestationChain {
            root: self.root.to_string(),
            image_manifest: text(self.image),
            attestation_manifest: text(self.attestation),
            signature_manifests: self.signatures.iter().map(ToString::to_string).collect(),
            blobs: self
                .blobs
                .into_iter()
                .map(|(digest, b)| (digest.to_string(), blob(b)))
                .collect(),
        }
    }
}
