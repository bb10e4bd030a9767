//! What is said of an image, and who signed that (row `gw.resolvesrc.img`): for clients whose
//! policies check it.

use super::{
    resolve::{Documents, Kind, parse},
    select,
};
use crate::remote::media_type_of;
use bytes::Bytes;
use shipway_fault::{Context as _, Result};
use shipway_llb::AttestationChain;
use shipway_oci::{Descriptor, Index, Manifest, Platform, media};

/// Artifact types of signatures, the preferred one first.
const SIGNATURES: [&str; 2] = [
    "application/vnd.dev.sigstore.bundle.v0.3+json",
    "application/vnd.dev.cosign.artifact.sig.v1+json",
];
/// Annotation that says of an entry of an index which other entry it is about.
const REFERENCE_DIGEST: &str = "vnd.docker.reference.digest";
/// Annotation on a statement's layer.
const PREDICATE_TYPE: &str = "in-toto.io/predicate-type";

/// The documents about the image of `platform` below `main`, with the statements of the types
/// `predicates`; `None` if `main` is a lone manifest, about which nothing can be said.
pub(crate) async fn chain(
    documents: &Documents<'_>,
    main: &Descriptor,
    platform: &Platform,
    predicates: &[String],
) -> Result<Option<AttestationChain>> {
    if !media::is_index(&main.media_type) {
        return Ok(None);
    }
    let bytes = documents.read(main, Kind::Manifest).await?;
    let index: Index = parse(&bytes, main)?;
    let image = select::candidates(&index, platform).first().map(|d| d.digest);
    let mut chain = AttestationChain {
        root: main.digest,
        image,
        attestation: None,
        signatures: Vec::new(),
        blobs: Default::default(),
    };
    let mut keep = |descriptor: &Descriptor, bytes: Bytes| {
        drop(chain.blobs.insert(descriptor.digest, (descriptor.clone(), bytes)))
    };
    keep(main, bytes);
    let about = |d: &&Descriptor| {
        let says = |key: &str| d.annotations.get(key).map(String::as_str);
        says(select::REFERENCE_TYPE) == Some("attestation-manifest")
            && says(REFERENCE_DIGEST) == image.map(|i| i.to_string()).as_deref()
    };
    let Some(said) = index.manifests.iter().find(about) else { return Ok(Some(chain)) };
    let bytes =
        documents.read(said, Kind::Manifest).await.context(|| "read an image's attestations")?;
    let manifest: Manifest = parse(&bytes, said)?;
    keep(said, bytes);
    for layer in manifest
        .layers
        .iter()
        .filter(|l| l.annotations.get(PREDICATE_TYPE).is_some_and(|t| predicates.contains(t)))
    {
        keep(
            layer,
            documents.read(layer, Kind::Config).await.context(|| "read an image's attestation")?,
        );
    }
    let mut signature = None;
    if let Some(remote) = documents.remote {
        let referrers = remote
            .referrers(said.digest)
            .await
            .context(|| "look for signatures of an image's attestations")?;
        let rank =
            |d: &Descriptor| SIGNATURES.iter().position(|s| d.artifact_type.as_deref() == Some(s));
        signature = referrers
            .into_iter()
            .filter_map(|d| Some((rank(&d)?, d)))
            .min_by_key(|(rank, _)| *rank)
            .map(|(_, d)| d);
    }
    if let Some(found) = &signature {
        let bytes = documents
            .read(found, Kind::Manifest)
            .await
            .context(|| "read a signature of an image's attestations")?;
        let kind = media_type_of(&bytes);
        let manifest: Option<Manifest> =
            kind.filter(|k| media::is_manifest(k)).map(|_| parse(&bytes, found)).transpose()?;
        keep(found, bytes);
        for layer in manifest.iter().flat_map(|m| &m.layers) {
            keep(
                layer,
                documents
                    .read(layer, Kind::Config)
                    .await
                    .context(|| "read a signature of an image's attestations")?,
            );
        }
    }
    chain.attestation = Some(said.digest);
    chain.signatures = signature.map(|d| d.digest).into_iter().collect();
    Ok(Some(chain))
}
