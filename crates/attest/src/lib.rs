//! Attestations as data: what is said about a result, never how it is found out.
//!
//! [`Attestation`] is one statement on its way from its maker to the exporter that writes
//! it, generic over what holds its content. [`Capture`] is what a build was seen to use;
//! [`Predicate`] is SLSA provenance made of it, in both versions (rows `at.*`). [`AttestOptions`]
//! is what a client asks for. Nothing here reads a file, knows a graph or talks to others.

mod attestation;
mod capture;
mod intoto;
mod options;
mod predicate;
mod purl;
mod request;
mod usage;

pub use attestation::{
    Attestation, Kind, SubjectKind, SubjectSpec, core_first, filter_inline, keys,
};
pub use capture::{
    BlobSource, Capture, GitSource, HttpSource, ImageSource, Local, MissingFetch, Named, Sources,
    Stored,
};
pub use intoto::{DigestSet, SPDX, STATEMENT, Statement, Subject, digest_set, slsa};
pub use options::{AttestOptions, ProvenanceMode, ProvenanceOptions, SbomOptions, SlsaVersion};
pub use predicate::{
    BuildConfig, BuildStep, Builder, LayerMap, Metadata, Predicate, Source, SourceInfo,
};
pub use purl::{PurlKind, image_purl};
pub use request::{ConfigSource, GitAddress, Parameters, RequestProvenance, filter_args};
pub use usage::system_sample;
